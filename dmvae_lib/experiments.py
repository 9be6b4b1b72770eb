"""The paper's rows as data: each is a frozen `Experiment`; `run` trains it, or loads it from runs/."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib import networks
from dmvae_lib.data.digits import Digits, load_digits
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.distributions import laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import (
    atomic_write,
    check_seal,
    locked,
    read_json,
    remove,
    remove_leftovers,
    seal,
    sha256,
    verify,
    write_json,
)
from dmvae_lib.metrics import cross_coherence, joint_coherence
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, MultimodalVAE, Terms
from dmvae_lib.models.saving import fetched, load_weights, read_config
from dmvae_lib.profiles import Profile, get_profile
from dmvae_lib.source import source_digests
from dmvae_lib.training import Schedule, model_objective, resolve_device, train

NAMES = ("mnist", "svhn")
PACKAGES = ("dmvae_lib", "torch", "torchvision", "transformers", "numpy", "scikit-learn", "pandas", "matplotlib")


@dataclass(frozen=True)
class Experiment:
    """One row of a table: a model on the digits, its latent sizes and its objective.

    private_dims, weights: for MNIST and SVHN, weights of None being the profile's; without: terms of Eq. 3 that are
    left out (DMVAE); anneal: the share of the updates over which the weight of the KLs rises to 1.
    """

    name: str
    model: str = "DMVAE"
    shared_dim: int = 10
    private_dims: tuple[int, int] = (1, 4)
    weights: tuple[float, float] | None = None
    without: tuple[str, ...] = ()
    anneal: float = 0.0


DMVAE_DIGITS = Experiment("dmvae")

# The baselines have one latent space of MMVAE's size and weigh MNIST by the ratio of pixels, as MMVAE does.
BALANCED = (3072 / 784, 1.0)
_BASELINE = Experiment("", shared_dim=20, private_dims=(0, 0), weights=BALANCED)

TABLE1 = {
    "MVAE": replace(_BASELINE, name="mvae", model="MVAE", anneal=0.5),
    "MMVAE": replace(_BASELINE, name="mmvae", model="MMVAE"),
    "DMVAE": DMVAE_DIGITS,
}
RELATED = {  # discussed in Sec. 2, without numbers in the paper
    "JMVAE": replace(_BASELINE, name="jmvae", model="JMVAE"),
    "JVAE (TELBO)": replace(_BASELINE, name="telbo", model="TELBO"),
}
TABLE3 = {
    "full": DMVAE_DIGITS,
    "no PoE": Experiment("dmvae-no-poe", without=("mnist<-joint", "svhn<-joint")),
    "no crVAE M2S": Experiment("dmvae-no-m2s", without=("svhn<-mnist",)),
    "no crVAE S2M": Experiment("dmvae-no-s2m", without=("mnist<-svhn",)),
    "no crVAE": Experiment("dmvae-no-cross", without=("svhn<-mnist", "mnist<-svhn")),
    "no private spaces": Experiment("dmvae-no-private", private_dims=(0, 0)),
}
# The authors' public release multiplies the joint reconstructions by zero and keeps their KLs.
RELEASE = Experiment("dmvae-release", without=("mnist<-joint/log_likelihood", "svhn<-joint/log_likelihood"))

DIGITS = tuple(
    {
        experiment.name: experiment for experiment in (*TABLE1.values(), *RELATED.values(), *TABLE3.values(), RELEASE)
    }.values()
)


# --- the setting: profile, seeds, device, places --------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where and how experiments run: the parameters of every notebook.

    evaluation: "test", or "validation" to hold out part of the training data and leave the test data alone.
    """

    profile: Profile
    seeds: int = 1
    device: str = "auto"
    data: Path = Path("data")
    runs: Path = Path("runs")
    results: Path = Path("results")
    evaluation: str = "test"

    @property
    def digits(self) -> Digits:
        """The profile's digits, loaded once per process."""
        return _digits(self.profile.digits, str(self.data), self.evaluation, self.profile.permutations)


def setting(
    profile: str = "quick", seeds: int = 1, device: str = "auto", data: str = "data", evaluation: str = "test"
) -> Setting:
    """The setting of a notebook; relative paths are relative to the project's folder.

    Raises DMVAEError for an unknown profile or device, for no seed, and for values of another kind.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise DMVAEError(f"seeds={seeds!r}; expected how many seeds to run, a whole number of at least 1.")
    if not isinstance(data, (str, Path)) or "\0" in str(data):
        raise DMVAEError(f"data={data!r}; expected the path of the folder that holds the data files.")
    chosen = get_profile(profile)
    resolve_device(device)
    root = project_folder()
    places = {"runs": root / "runs", "results": root / "results" / chosen.name}
    return Setting(chosen, seeds, device, root / data, evaluation=evaluation, **places)


def project_folder() -> Path:
    """The nearest folder, from the working directory upwards, that holds notebooks/ and a Makefile; else here."""
    here = Path.cwd()
    found = (
        folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir() and (folder / "Makefile").exists()
    )
    return next(found, here)


@lru_cache(maxsize=2)
def _digits(source: str, root: str, evaluation: str, permutations: int) -> Digits:
    return load_digits(source, root, evaluation, permutations)


# --- from an experiment to a trained model --------------------------------------------------------------------------


def build(experiment: Experiment, profile: Profile) -> MultimodalVAE:
    """The experiment's model with fresh weights from torch's global generator."""
    model = _build(experiment, profile)
    model.experiment = recipe(experiment, profile)
    return model


def recipe(experiment: Experiment, profile: Profile) -> dict[str, Any]:
    """All that `build` reads, as JSON: what a run's configuration and a saved model keep of it."""
    config = {"experiment": asdict(experiment), "width": profile.width}
    config["weights"] = experiment.weights or profile.weights
    return config | ({"particles": profile.particles} if experiment.model == "MMVAE" else {})


def load_experiment(source: str | Path, **options: Any) -> MultimodalVAE:
    """The model of an experiment that was saved by `model.save` or pushed to the Hub, its networks made anew.

    source: a folder, or a repository of the Hub; options: `revision="a commit"` and others of the Hub's
    snapshot_download. Raises DMVAEError as `load` does, and for a model that no experiment made.
    """
    folder = fetched(source, **options)
    config = read_config(folder)
    made = config.get("experiment")
    if made is None:
        raise DMVAEError(f"{source} holds a model that is no experiment's; load it with {config['model']}.load.")
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in made["experiment"].items()
    }
    sizes = {key: value for key, value in made.items() if key != "experiment"}
    return load_weights(build(Experiment(**fields), replace(get_profile("quick"), **sizes)), folder)


def _build(experiment: Experiment, profile: Profile) -> MultimodalVAE:
    weights = dict(zip(NAMES, experiment.weights or profile.weights))
    private, shared, width = dict(zip(NAMES, experiment.private_dims)), experiment.shared_dim, profile.width
    hidden, mmvae = round(256 * width), experiment.model == "MMVAE"
    if mmvae:
        hidden = round(400 * width)
        networks_of = {
            "mnist": (
                networks.mnist_encoder(0, shared, hidden),
                nn.Sequential(networks.mnist_decoder(0, shared, hidden), nn.Sigmoid()),
            ),
            "svhn": (networks.mmvae_svhn_encoder(shared, width), networks.mmvae_svhn_decoder(shared, width)),
        }
    else:
        networks_of = {
            "mnist": (
                networks.mnist_encoder(private["mnist"], shared, hidden),
                networks.mnist_decoder(private["mnist"], shared, hidden),
            ),
            "svhn": (
                networks.svhn_encoder(private["svhn"], shared, width),
                networks.svhn_decoder(private["svhn"], shared, width),
            ),
        }
    likelihood = laplace(0.75)._replace(unit=True) if mmvae else "bernoulli"
    modalities = {name: Modality(*networks_of[name], private[name], weights[name], likelihood) for name in NAMES}
    match experiment.model:
        case "DMVAE":
            return DMVAE(modalities, shared, experiment.without)
        case "MVAE":
            return MVAE(modalities, shared)
        case "MMVAE":
            return MMVAE(modalities, shared, profile.particles)
        case "JMVAE" | "TELBO":
            features = {
                "mnist": networks.mnist_encoder(0, shared, hidden),
                "svhn": networks.svhn_encoder(0, shared, width),
            }
            joint = networks.JointEncoder(features, 4 * shared, shared, round(512 * width))
            return (JMVAE if experiment.model == "JMVAE" else TELBO)(modalities, shared, joint)
    raise DMVAEError(
        f"experiment {experiment.name!r}: unknown model {experiment.model!r}; "
        "expected DMVAE, MVAE, MMVAE, JMVAE or TELBO."
    )


def schedule(experiment: Experiment, profile: Profile) -> Schedule:
    """The profile's budget for the experiment: MMVAE, whose updates cost K times as much, has one of its own."""
    if experiment.model == "MMVAE":
        decodings = len(NAMES) * profile.particles * profile.particle_batch
        chunks = math.ceil(decodings / 1_000)  # some 0.5 GB of activations each; larger ones are slower on a CPU
        return Schedule(profile.particle_steps, profile.particle_batch, profile.learning_rate, chunks=chunks)
    anneal = round(experiment.anneal * profile.steps)
    return Schedule(profile.steps, profile.batch_size, profile.learning_rate, anneal)


@dataclass(frozen=True)
class Run:
    """A trained model with its history (`train`), its folder, and what made it (`info`, also in run.json)."""

    model: nn.Module
    history: pd.DataFrame
    folder: Path
    info: dict = field(repr=False)


def run(experiment: Experiment, seed: int, setting: Setting) -> Run:
    """The experiment's model trained from `seed`: loaded from runs/ if it is there, else trained, or trained on."""
    data, plan = setting.digits.train, schedule(experiment, setting.profile)
    profile = setting.profile
    config = recipe(experiment, profile)
    return train_or_load(partial(build, experiment, profile), data, plan, seed, setting, experiment.name, config)


class Item(NamedTuple):
    """A piece of work, `work()`: trains a run or loads it, in any process that sees the same folders."""

    name: str
    seed: int
    work: Callable[[], Run]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def run(self) -> Run:
        """The run. Raises DMVAEError that names experiment and seed."""
        try:
            return self.work()
        except DMVAEError as error:
            raise DMVAEError(f"{self}: {error}") from error


def grid(experiments: Sequence, setting: Setting, run_one: Callable = run) -> list[Item]:
    """A work item for every experiment and each of the setting's seeds."""
    return [
        Item(experiment.name, seed, partial(run_one, experiment, seed, setting))
        for experiment in experiments
        for seed in range(setting.seeds)
    ]


def run_items(items: Sequence[Item], scheduler: str | None = None) -> dict[tuple[str, int], Run]:
    """Every item's run, by name and seed: trained one after the other here, or by `cluster.train`, then loaded here."""
    if scheduler:
        from dmvae_lib import cluster

        cluster.train(items, scheduler)
    bar = tqdm(items, desc="runs", unit="run", leave=False, disable=len(items) == 1)
    return {(item.name, item.seed): item.run() for item in bar}


def run_grid(
    experiments: Sequence, setting: Setting, run_one: Callable = run, scheduler: str | None = None
) -> dict[tuple[str, int], Run]:
    """`run_one` for every experiment and each of the setting's seeds: {(experiment.name, seed): Run}.

    scheduler: trains on many machines (`cluster.train`); None trains here.
    """
    return run_items(grid(experiments, setting, run_one), scheduler)


def train_or_load(
    make: Callable[[], nn.Module],
    data: PairedData,
    plan: Schedule,
    seed: int,
    setting: Setting,
    name: str,
    config: dict,
    objective: Callable = model_objective,
    fit: Callable[[nn.Module], object] | None = None,
) -> Run:
    """The model `make()` trained on `data`, in runs/<profile>/<name>/seed<seed>-<configuration's hash>/.

    fit: fits the model in closed form or by EM; it then takes the place of `train`, and the history is empty.

    A finished run is loaded, an interrupted one goes on from its checkpoint; while one process trains it, others wait.
    The hash covers the configuration, the schedule, the data's fingerprint, the library's version, and the source of
    the model, the training, `make` and `objective` or `fit` (`source_digests`): after a change to any of it the run is
    trained anew in a folder of its own, and the old one stays. Changes to comments, to tables' rows, or to what
    evaluates and reports leave it as it is.

    Raises DMVAEError for a run whose files are not, byte for byte, those that were written.
    """
    config = config | {
        "name": name,
        "seed": seed,
        "schedule": asdict(plan),
        "data": data.fingerprint,
        "library": version("dmvae_lib"),
    }
    device = resolve_device(setting.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make()
    parts = {type(part) for part in model.modules()}
    config["code"] = source_digests(make, fit or objective, *parts, "dmvae_lib.networks", "dmvae_lib.training")
    config = json.loads(json.dumps(config))  # as run.json will give it back
    digest = configuration_hash(config)
    folder = setting.runs / setting.profile.name / name / f"seed{seed}-{digest}"
    weights, table, record = folder / "model.safetensors", folder / "history.csv", folder / "run.json"
    if not record.exists():  # written last: a run without it is not finished
        with locked(folder, f"training {name}, seed {seed}"):
            if not record.exists():
                remove_leftovers(folder)
                started = time.monotonic()
                if fit is None:
                    description = f"{name}, seed {seed}"
                    history = train(model, data, plan, seed, device, folder, objective, description, identity=digest)
                else:
                    fit(model)
                    history = pd.DataFrame(index=pd.Index([], name="step"))
                seconds = history.attrs.get("seconds", time.monotonic() - started)  # of all parts of a resumed run
                with atomic_write(weights) as temporary:  # safetensors' own writer hides a full disk's errno
                    temporary.write_bytes(save({key: value.contiguous() for key, value in model.state_dict().items()}))
                with atomic_write(table) as temporary:
                    history.to_csv(temporary)
                info = {"config": config, "hash": digest, "seconds": round(seconds, 1)}
                info |= {"files": {path.name: sha256(path) for path in (weights, table)}} | provenance(device)
                write_json(record, seal(info))
    remove(folder / "checkpoint.pt")
    repair = f"Delete the folder {folder} to train it anew."
    info = check_seal(read_json(record, repair), str(record), repair)
    if info["config"] != config:
        raise DMVAEError(f"{record} is another run's, {info['config']['name']} with hash {info['hash']}. {repair}")
    verify(weights, info["files"][weights.name], repair)
    verify(table, info["files"][table.name], repair)
    try:
        model.load_state_dict(load(weights.read_bytes()))
        history = pd.read_csv(table, index_col="step")
    except Exception as error:  # verified, so written by another version of safetensors or pandas
        raise DMVAEError(f"run {folder} cannot be read ({type(error).__name__}: {error}). {repair}") from error
    return Run(model.to(device).eval(), history, folder, info)


def configuration_hash(config: dict) -> str:
    """12 hexadecimal digits by which a run's folder and the manifest name its configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def provenance(device: torch.device) -> dict:
    """What an artefact needs beside its configuration to be made again: versions, commit, device, time."""
    return {
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@lru_cache
def _commit() -> str | None:
    """The commit of the project's checkout, with "+" if it has uncommitted changes to the library."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git


# --- evaluation: Sec. 5.1 -------------------------------------------------------------------------------------------


def classifier(name: str, setting: Setting) -> tuple[Run, float]:
    """The evaluation classifier of one modality and its accuracy on that modality's test images.

    Raises DMVAEError for an unknown modality.
    """
    made = _judge(name, setting)
    device = next(made.model.parameters()).device
    test_items = _alone(setting.digits.test, name).to(device)
    chunks = _chunks(len(test_items), device)
    predicted = torch.cat([predict(made.model, test_items.batch(rows)[name]) for rows in chunks])
    return made, cross_coherence(predicted, test_items.labels)


def _judge(name: str, setting: Setting) -> Run:
    """The classifier trained on all training images as they are, not on generated ones (MMVAE's protocol), or loaded."""
    if name not in NAMES:
        raise DMVAEError(f"unknown modality {name!r}; the digits have {', '.join(NAMES)}.")
    train_items = _alone(setting.digits.train, name)
    channels, size = train_items.items[name].shape[1:3]
    plan = Schedule(setting.profile.classifier_steps, 128)
    return train_or_load(
        partial(networks.digit_classifier, channels, size), train_items, plan, 0, setting, f"classifier-{name}", {},
        _classify,
    )  # fmt: skip


def classifier_items(setting: Setting) -> list[Item]:
    """The work items of the evaluation classifiers."""
    return [Item(f"classifier-{name}", 0, partial(_judge, name, setting)) for name in NAMES]


def _alone(data: PairedData, name: str) -> PairedData:
    """The items of one modality, each once."""
    items, labels = data.items[name], data.item_labels[name]
    return PairedData({name: items}, {name: labels}, {name: torch.arange(len(items))})


def _classify(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, beta: float) -> Terms:
    (images,) = batch.values()
    return Terms(nn.functional.cross_entropy(model(images), labels))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """(B,) predicted classes."""
    return model(images).argmax(-1)


@torch.no_grad()
def coherence(
    model: MultimodalVAE, data: PairedData, classifiers: dict[str, nn.Module], seed: int = 0, samples: int = 10_000
) -> dict[str, float]:
    """Table 1's measures of a model with a classifier for each modality, as shares in [0, 1].

    "mnist->svhn" and so on: cross-coherence over all pairs, z_s ~ q(z_s | source), z_p ~ p(z_p); "joint": over
    `samples` shared codes from the prior.
    """
    device = next(model.parameters()).device
    data, generator = data.to(device), torch.Generator(device).manual_seed(seed)
    result = {}
    for source in model.names:
        for target in model.names:
            if source != target:
                predicted = [
                    predict(classifiers[target], model.cross_generate({source: x}, target, generator=generator)[0])
                    for x in (data.batch(rows)[source] for rows in _chunks(len(data), device))
                ]
                result[f"{source}->{target}"] = cross_coherence(torch.cat(predicted), data.labels)
    drawn = [model.sample(len(rows), generator) for rows in _chunks(samples, device)]
    predicted = [torch.cat([predict(classifiers[name], images[name]) for images in drawn]) for name in model.names]
    return result | {"joint": joint_coherence(*predicted)}


def _chunks(n: int, device: torch.device, size: int = 1_000) -> Sequence[Tensor]:
    return torch.arange(n, device=device).split(size)


def evaluate(run: Run, setting: Setting) -> dict[str, float]:
    """`coherence` of a run on the setting's evaluation pairs; kept in the run's folder, by data and classifiers."""
    data = setting.digits.test
    judges = {name: _judge(name, setting) for name in data.names}
    judged_by = "-".join(judge.info["hash"] for judge in judges.values())
    models = {name: judge.model for name, judge in judges.items()}
    path = run.folder / f"coherence-{setting.evaluation}-{data.fingerprint}-{judged_by}.json"
    return computed_once(path, lambda: coherence(run.model, data, models), coherence, "dmvae_lib.metrics")


def computed_once(path: Path, compute: Callable[[], dict], *source: str | Callable) -> dict:
    """What `compute()` returns, kept as JSON at `path` and read from there the next time.

    It is computed anew when `source`, which computes it (`source_digests`), has changed since. What the path's name
    does not say, and the source does not, must not matter. Raises DMVAEError for a file that is damaged, or was
    put there from elsewhere.
    """
    about = {"about": f"{path.parent.name}/{path.name}", "code": source_digests(*source)}
    if (kept := _kept(path, about)) is None:
        with locked(path.parent, f"computing {path.name}"):
            if (kept := _kept(path, about)) is None:
                kept = seal(about | {"value": compute()})
                write_json(path, kept)
    return kept["value"]


def _kept(path: Path, about: dict) -> dict | None:
    if not path.exists():
        return None
    repair = "Delete it; it is computed anew."
    kept = check_seal(read_json(path, repair), str(path), repair)
    if kept["about"] != about["about"]:
        raise DMVAEError(f"{path} was made as {kept['about']}, for another run or data. {repair}")
    return kept if kept["code"] == about["code"] else None
