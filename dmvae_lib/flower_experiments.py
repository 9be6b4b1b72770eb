"""Table 2's rows as data, on the profile's flowers: each is a frozen `FlowerExperiment`; `run` trains it or loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from dmvae_lib.data.flowers import FlowerData, load_flowers
from dmvae_lib.errors import DMVAEError
from dmvae_lib.experiments import run_grid
from dmvae_lib.models import flowers
from dmvae_lib.profiles import Profile
from dmvae_lib.retrieval import evaluate_retrieval
from dmvae_lib.runs import Run, Setting, Training, computed_once
from dmvae_lib.training import Schedule, resolve_device


@dataclass(frozen=True)
class FlowerExperiment:
    """One row of Table 2, or a variant of its DMVAE row.

    options: what differs from the row's own defaults, as (name, value) pairs.
    """

    name: str
    model: str
    options: tuple[tuple[str, object], ...] = field(default=())


def _dmvae(name: str, **options: object) -> FlowerExperiment:
    return FlowerExperiment(name, "DMVAE", tuple(options.items()))


FLOWER_DMVAE = _dmvae("flowers-dmvae")
TABLE2 = {
    "Word2Vec": FlowerExperiment("flowers-word2vec", "Word2Vec"),
    "GMM+HGLMM": FlowerExperiment("flowers-gmm-hglmm", "GMM+HGLMM"),
    "Word CNN": FlowerExperiment("flowers-word-cnn", "Word CNN"),
    "Word CNN-RNN": FlowerExperiment("flowers-word-cnn-rnn", "Word CNN-RNN"),
    "Triplet": FlowerExperiment("flowers-triplet", "Triplet"),
    "IATV": FlowerExperiment("flowers-iatv", "IATV"),
    "CMPM+CMPC": FlowerExperiment("flowers-cmpm-cmpc", "CMPM+CMPC"),
    "TIMAM": FlowerExperiment("flowers-timam", "TIMAM"),
    "DMVAE": FLOWER_DMVAE,
}
PARTS = {  # what each part of the DMVAE row contributes; the paper does not show it
    "DMVAE": FLOWER_DMVAE,
    "matching loss alone": _dmvae("flowers-matching", evidence=False),
    "without matching loss": _dmvae("flowers-no-matching", matching=0.0),
    "without private spaces": _dmvae("flowers-no-private", private_dims=(0, 0)),
    "without cross terms": _dmvae("flowers-no-cross", without=flowers.CROSS_TERMS),
}
FLOWERS = tuple({experiment.name: experiment for experiment in (*TABLE2.values(), *PARTS.values())}.values())


def flower_data(setting: Setting) -> FlowerData:
    """The profile's flowers; features are computed once, into runs/features, and loaded once per process."""
    device = str(resolve_device(setting.device))
    return _flowers(
        setting.profile.flowers, str(setting.data), setting.evaluation, str(setting.runs / "features"), device
    )


@lru_cache(maxsize=1)
def _flowers(source: str, root: str, evaluation: str, cache: str, device: str) -> FlowerData:
    data = load_flowers(source, root, evaluation, cache, device)
    # One scale for all image features, from the training images: a Gaussian likelihood of unit variance needs one.
    scale = data.train.items["image"].std().item()

    def scaled(split):
        return replace(split, items=split.items | {"image": split.items["image"] / scale})

    train, validation = scaled(data.train), scaled(data.validation)
    test = validation if data.test is data.validation else scaled(data.test)
    return replace(data, train=train, validation=validation, test=test)


def build(experiment: FlowerExperiment, profile: Profile, data: FlowerData) -> nn.Module:
    """The row's model for the data's feature sizes, at the profile's width."""
    image_dim, token_dim = data.train.items["image"].shape[1], data.train.items["text"].shape[2]
    classes = data.train.item_labels["image"].unique().tolist()
    hidden, options = profile.flower_hidden, dict(experiment.options)
    match experiment.model:
        case "Word2Vec":
            return flowers.Word2Vec(image_dim, token_dim, dim=hidden)
        case "GMM+HGLMM":
            return flowers.GMMHGLMM(image_dim, token_dim)
        case "Word CNN":
            return flowers.WordCNN(image_dim, token_dim, dim=hidden, channels=hidden)
        case "Word CNN-RNN":
            return flowers.WordCNNRNN(image_dim, token_dim, dim=hidden, channels=hidden)
        case "Triplet":
            return flowers.Triplet(image_dim, token_dim, dim=hidden, hidden=hidden)
        case "IATV":
            return flowers.IATV(image_dim, token_dim, classes, dim=hidden, hidden=hidden)
        case "CMPM+CMPC":
            return flowers.CMPMCMPC(image_dim, token_dim, classes, dim=hidden, hidden=hidden)
        case "TIMAM":
            return flowers.TIMAM(image_dim, token_dim, classes, dim=hidden, hidden=hidden)
        case "DMVAE":
            defaults: dict[str, Any] = {"hidden": hidden, "decoder_hidden": hidden, "weights": profile.flower_weights}
            return flowers.FlowerDMVAE(
                image_dim, token_dim, **defaults | {"matching": profile.flower_matching} | options
            )
    raise DMVAEError(
        f"experiment {experiment.name!r}: unknown model {experiment.model!r}; expected one of {', '.join(TABLE2)}."
    )


def training(experiment: FlowerExperiment, seed: int, setting: Setting) -> Training:
    """What makes the row's run: `flowers.objective` by Adam or, for GMM+HGLMM, a fit."""
    data, profile = flower_data(setting), setting.profile
    config = {"experiment": asdict(experiment), "hidden": profile.flower_hidden}
    if experiment.model == "DMVAE":
        config |= {"weights": profile.flower_weights, "matching": profile.flower_matching}
    fitted = experiment.model == "GMM+HGLMM"
    plan = Schedule(0 if fitted else profile.flower_steps, 64, profile.flower_learning_rate)
    return Training(
        partial(build, experiment, profile, data), data.train, plan, seed, setting, experiment.name, config,
        flowers.objective, partial(_fit, data, seed) if fitted else None,
    )  # fmt: skip


def run_flower(experiment: FlowerExperiment, seed: int, setting: Setting) -> Run:
    """The row's run, trained or loaded."""
    return training(experiment, seed, setting).run()


def _fit(data: FlowerData, seed: int, model: nn.Module) -> None:
    model.fit(data.train, seed)


def run_flower_grid(
    experiments: Sequence[FlowerExperiment], setting: Setting, scheduler: str | None = None
) -> dict[tuple[str, int], Run]:
    """The run of every experiment and each of the setting's seeds, as `run_grid`; the features come first."""
    flower_data(setting)
    return run_grid(experiments, setting, training, scheduler)


def evaluate_flowers(run: Run, setting: Setting) -> dict:
    """`evaluate_retrieval` of a run on the setting's evaluation classes; kept in the run's folder."""
    data = flower_data(setting).test
    path = run.folder / f"retrieval-{setting.evaluation}-{data.fingerprint}.json"
    found = computed_once(path, lambda: evaluate_retrieval(run.model, data), "dmvae_lib.retrieval")
    return found | {"ap50": found["ap"]}


def query_tokens(query: str, data: FlowerData) -> Tensor:
    """(1, 30, D) token embeddings of a caption of one's own, by the data's text model."""
    from dmvae_lib.data.features import token_embeddings

    return token_embeddings([query], data.text_model, progress=False)[0]
