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
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib import networks
from dmvae_lib.data.digits import Digits, load_digits
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.distributions import laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write
from dmvae_lib.metrics import cross_coherence, joint_coherence
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, MultimodalVAE, Terms
from dmvae_lib.profiles import Profile, get_profile
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

    Raises DMVAEError for an unknown profile or device, or no seed.
    """
    if not isinstance(seeds, int) or seeds < 1:
        raise DMVAEError(f"seeds={seeds!r}; expected how many seeds to run, a whole number of at least 1.")
    resolve_device(device)
    root = project_folder()
    places = {"runs": root / "runs", "results": root / "results" / profile}
    return Setting(get_profile(profile), seeds, device, root / data, evaluation=evaluation, **places)


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
    weights = dict(zip(NAMES, experiment.weights or profile.weights))
    private, shared, width = dict(zip(NAMES, experiment.private_dims)), experiment.shared_dim, profile.width
    mmvae = experiment.model == "MMVAE"
    hidden = round((400 if mmvae else 256) * width)
    mnist_encoder = networks.mnist_encoder(private["mnist"], shared, hidden)
    mnist_decoder = networks.mnist_decoder(private["mnist"], shared, hidden)
    if mmvae:
        mnist_decoder = nn.Sequential(mnist_decoder, nn.Sigmoid())
        svhn = networks.mmvae_svhn_encoder(shared, width), networks.mmvae_svhn_decoder(shared, width)
    else:
        dims = private["svhn"], shared, width
        svhn = networks.svhn_encoder(*dims), networks.svhn_decoder(*dims)
    networks_of = {"mnist": (mnist_encoder, mnist_decoder), "svhn": svhn}
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
    config = {
        "experiment": asdict(experiment),
        "width": profile.width,
        "weights": experiment.weights or profile.weights,
    }
    if experiment.model == "MMVAE":
        config["particles"] = profile.particles
    return train_or_load(lambda: build(experiment, profile), data, plan, seed, setting, experiment.name, config)


def run_grid(experiments: Sequence, setting: Setting, run_one: Callable = run) -> dict[tuple[str, int], Run]:
    """`run_one` for every experiment and each of the setting's seeds: {(experiment.name, seed): Run}."""
    grid = [(experiment, seed) for experiment in experiments for seed in range(setting.seeds)]
    bar = tqdm(grid, desc="runs", unit="run", leave=False, disable=len(grid) == 1)
    return {(experiment.name, seed): run_one(experiment, seed, setting) for experiment, seed in bar}


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

    A finished run is loaded, an interrupted one goes on from its checkpoint. The hash covers the configuration, the
    schedule, the data's fingerprint and the library's version (not its source: see `commit` in run.json).
    """
    config = config | {
        "name": name,
        "seed": seed,
        "schedule": asdict(plan),
        "data": data.fingerprint,
        "library": version("dmvae_lib"),
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    folder = setting.runs / setting.profile.name / name / f"seed{seed}-{digest}"
    device = resolve_device(setting.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = make()
    weights, record = folder / "model.safetensors", folder / "run.json"
    if not record.exists():  # written last: a run without it is not finished
        started = time.monotonic()
        if fit is None:
            history = train(model, data, plan, seed, device, folder, objective, f"{name}, seed {seed}")
        else:
            fit(model)
            history = pd.DataFrame(index=pd.Index([], name="step"))
        with atomic_write(weights) as temporary:
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        with atomic_write(folder / "history.csv") as temporary:
            history.to_csv(temporary)
        info = {"config": config, "hash": digest, "seconds": round(time.monotonic() - started, 1)} | provenance(device)
        with atomic_write(record) as temporary:
            temporary.write_text(json.dumps(info, indent=1))
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    try:
        info = json.loads(record.read_text())
        model.load_state_dict(load_file(weights, device=str(device)))
        history = pd.read_csv(folder / "history.csv", index_col="step")
    except Exception as error:  # truncated or foreign files: each reader raises its own kind
        raise DMVAEError(
            f"run {folder} cannot be read ({type(error).__name__}: {error}); delete that folder to train it anew."
        ) from error
    return Run(model.to(device).eval(), history, folder, info)


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
        lambda: networks.digit_classifier(channels, size), train_items, plan, 0, setting, f"classifier-{name}", {},
        _classify,
    )  # fmt: skip


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
    return computed_once(path, lambda: coherence(run.model, data, models))


def computed_once(path: Path, compute: Callable[[], dict]) -> dict:
    """What `compute()` returns, kept as JSON at `path` and read from there the next time."""
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(compute()))
    return json.loads(path.read_text())
