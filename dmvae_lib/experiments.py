"""The paper's rows as data: each is a frozen `Experiment`; `run` trains it, or loads it; Sec. 5.1's evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmvae_lib import networks
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.distributions import laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.metrics import cross_coherence, joint_coherence
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, MultimodalVAE, Terms
from dmvae_lib.models.saving import fetched, load_weights, read_config
from dmvae_lib.profiles import Profile, get_profile
from dmvae_lib.runs import Item, Run, Setting, Training, computed_once, run_items
from dmvae_lib.training import Schedule

NAMES = ("mnist", "svhn")


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
            model: MultimodalVAE = DMVAE(modalities, shared, experiment.without)
        case "MVAE":
            model = MVAE(modalities, shared)
        case "MMVAE":
            model = MMVAE(modalities, shared, profile.particles)
        case "JMVAE" | "TELBO":
            features = {
                "mnist": networks.mnist_encoder(0, shared, hidden),
                "svhn": networks.svhn_encoder(0, shared, width),
            }
            joint = networks.JointEncoder(features, 4 * shared, shared, round(512 * width))
            model = (JMVAE if experiment.model == "JMVAE" else TELBO)(modalities, shared, joint)
        case _:
            raise DMVAEError(
                f"experiment {experiment.name!r}: unknown model {experiment.model!r}; "
                "expected DMVAE, MVAE, MMVAE, JMVAE or TELBO."
            )
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


def schedule(experiment: Experiment, profile: Profile) -> Schedule:
    """The profile's budget for the experiment: MMVAE, whose updates cost K times as much, has one of its own."""
    if experiment.model == "MMVAE":
        decodings = len(NAMES) * profile.particles * profile.particle_batch
        chunks = math.ceil(decodings / 1_000)  # some 0.5 GB of activations each; larger ones are slower on a CPU
        return Schedule(profile.particle_steps, profile.particle_batch, profile.learning_rate, chunks=chunks)
    anneal = round(experiment.anneal * profile.steps)
    return Schedule(profile.steps, profile.batch_size, profile.learning_rate, anneal)


def training(experiment: Experiment, seed: int, setting: Setting, first: int | None = None) -> Training:
    """What makes the experiment's run.

    first: take only so many of SVHN's training images, in their order, for the pairs.
    """
    data, profile, name = setting.digits.train, setting.profile, experiment.name
    if first is not None:
        name = f"{name}-first-{first}"
        items, labels = (dict(of) | {"svhn": of["svhn"][:first]} for of in (data.items, data.item_labels))
        data = PairedData.pair(items, labels, profile.permutations)
    plan, config = schedule(experiment, profile), recipe(experiment, profile)
    return Training(partial(build, experiment, profile), data, plan, seed, setting, name, config)


def run(experiment: Experiment, seed: int, setting: Setting) -> Run:
    """The experiment's model trained from `seed`: loaded from runs/ if it is there, else trained, or trained on."""
    return training(experiment, seed, setting).run()


def learning_curve(setting: Setting) -> dict[int, Item]:
    """The work items of DMVAE, seed 0, on the first SVHN images alone: {so many: item}, as the profile says."""
    name = f"{DMVAE_DIGITS.name} on {{}} SVHN images"
    return {
        first: Item(name.format(first), 0, partial(training, DMVAE_DIGITS, 0, setting, first))
        for first in setting.profile.learning_curve
    }


def grid(experiments: Sequence, setting: Setting, training: Callable[..., Training] = training) -> list[Item]:
    """A work item for every experiment and each of the setting's seeds."""
    return [
        Item(experiment.name, seed, partial(training, experiment, seed, setting))
        for experiment in experiments
        for seed in range(setting.seeds)
    ]


def run_grid(
    experiments: Sequence,
    setting: Setting,
    training: Callable[..., Training] = training,
    scheduler: str | None = None,
) -> dict[tuple[str, int], Run]:
    """The run of every experiment and each of the setting's seeds: {(experiment.name, seed): Run}.

    scheduler: trains on many machines (`cluster.train`); None trains here.
    """
    return run_items(grid(experiments, setting, training), scheduler, setting.together)


# --- evaluation: Sec. 5.1 -------------------------------------------------------------------------------------------


def classifier(name: str, setting: Setting) -> tuple[Run, float]:
    """The evaluation classifier of one modality and its accuracy on that modality's test images.

    Raises DMVAEError for an unknown modality.
    """
    made = _judge(name, setting).run()
    device = next(made.model.parameters()).device
    test_items = _alone(setting.digits.test, name).to(device)
    chunks = _chunks(len(test_items), device)
    predicted = torch.cat([predict(made.model, test_items.batch(rows)[name]) for rows in chunks])
    return made, cross_coherence(predicted, test_items.labels)


def _judge(name: str, setting: Setting) -> Training:
    """The classifier, on all training images as they are, not on generated ones (MMVAE's protocol)."""
    if name not in NAMES:
        raise DMVAEError(f"unknown modality {name!r}; the digits have {', '.join(NAMES)}.")
    train_items = _alone(setting.digits.train, name)
    channels, size = train_items.items[name].shape[1:3]
    plan = Schedule(setting.profile.classifier_steps, 128)
    make = partial(networks.digit_classifier, channels, size)
    return Training(make, train_items, plan, 0, setting, f"classifier-{name}", {}, _classify)


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
    judges = {name: _judge(name, setting).run() for name in data.names}
    judged_by = "-".join(judge.info["hash"] for judge in judges.values())
    models = {name: judge.model for name, judge in judges.items()}
    path = run.folder / f"coherence-{setting.evaluation}-{data.fingerprint}-{judged_by}.json"
    return computed_once(path, lambda: coherence(run.model, data, models), coherence, "dmvae_lib.metrics")
