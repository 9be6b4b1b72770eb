"""The rows of Tables 1 and 3 (Sec. 5.1), of the related models of Sec. 2, and the classifiers that judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.distributions import laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.metrics import chance, coherence, cross_coherence, predict
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, Terms
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.codes import chosen, codes
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.data.digits import MNIST_SVHN
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.rows import strong
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting
from dmvae_lib.training import Schedule

Dims = Mapping[str, int]
Weights = Mapping[str, float]

# --- models: functions of any data set that has networks ------------------------------------------------------------


def modalities(
    data: DataSet,
    family: str,
    likelihood: Any,
    shared_dim: int,
    private_dims: Dims,
    weights: Weights,
    width: float,
    initialise: str,
) -> dict[str, Modality]:
    """The data set's modalities with its networks of a family. Raises DMVAEError for options of other modalities."""
    if data.networks is None:
        raise DMVAEError(f"data set {data.name!r} has no networks; give it a function that makes them.")
    for what, given in (("private_dims", private_dims), ("weights", weights)):
        if set(given) != set(data.modalities):
            raise DMVAEError(f"{what} are for {', '.join(given)}; {data.name!r} has {', '.join(data.modalities)}.")
    networks = {
        name: data.networks(family, name, private_dims[name], shared_dim, width, initialise) for name in data.modalities
    }
    return {name: Modality(*of, private_dims[name], weights[name], likelihood) for name, of in networks.items()}


SCALE = 0.75  # of Laplace likelihoods (Shi et al. 2019), which MoPoE, MVTCAE and MMVAE+ took over
LIKELIHOODS: dict[str, tuple[str, Any]] = {  # {its name: the networks that go with it, and it}
    "bernoulli": ("dmvae", "bernoulli"),
    "laplace": ("mmvae", laplace(SCALE)._replace(unit=True)),
}


def dmvae(
    data: DataSet,
    splits: Splits,
    *,
    shared_dim: int,
    private_dims: Dims,
    weights: Weights,
    width: float,
    initialise: str,
    without: Sequence[str] = (),
    likelihood: str = "bernoulli",
) -> DMVAE:
    """Eq. 3, `without` some of its terms."""
    of = modalities(data, *LIKELIHOODS[likelihood], shared_dim, private_dims, weights, width, initialise)
    return DMVAE(of, shared_dim, without)


def _shared(data: DataSet, shared_dim: int, *rest: Any, likelihood: str = "bernoulli") -> dict[str, Modality]:
    """The modalities of a model with one code for all and no private ones."""
    return modalities(data, *LIKELIHOODS[likelihood], shared_dim, dict.fromkeys(data.modalities, 0), *rest)


def mvae(
    data: DataSet,
    splits: Splits,
    *,
    shared_dim: int,
    weights: Weights,
    width: float,
    initialise: str,
    random_subsets: int = 0,
    likelihood: str = "bernoulli",
) -> MVAE:
    """Wu & Goodman 2018: a product of experts; the bounds of all modalities, of each alone and of random subsets."""
    of = _shared(data, shared_dim, weights, width, initialise, likelihood=likelihood)
    return MVAE(of, shared_dim, random_subsets)


def mmvae(
    data: DataSet,
    splits: Splits,
    *,
    shared_dim: int,
    weights: Weights,
    width: float,
    initialise: str,
    particles: int,
    likelihood: str = "laplace",
) -> MMVAE:
    """Shi et al. 2019: a mixture of Laplace experts; its authors' likelihood, unless given, with networks of its own."""
    return MMVAE(_shared(data, shared_dim, weights, width, initialise, likelihood=likelihood), shared_dim, particles)


def _joint_encoder(data: DataSet, *sizes: Any) -> nn.Module:
    if data.joint_encoder is None:
        raise DMVAEError(f"data set {data.name!r} has no joint_encoder, which JMVAE and TELBO need; give it one.")
    return data.joint_encoder(*sizes)


def jmvae(data: DataSet, splits: Splits, *, shared_dim: int, weights: Weights, width: float, initialise: str) -> JMVAE:
    """Suzuki et al. 2016: a network for the joint posterior, to which each modality's is drawn."""
    of = _shared(data, shared_dim, weights, width, initialise)
    return JMVAE(of, shared_dim, _joint_encoder(data, shared_dim, width, initialise))


def telbo(data: DataSet, splits: Splits, *, shared_dim: int, weights: Weights, width: float, initialise: str) -> TELBO:
    """Vedantam et al. 2018: a network for the joint posterior, and a bound for each modality alone."""
    of = _shared(data, shared_dim, weights, width, initialise)
    return TELBO(of, shared_dim, _joint_encoder(data, shared_dim, width, initialise))


# --- schedules ------------------------------------------------------------------------------------------------------


def updates(profile: Profile) -> Schedule:
    """The profile's updates of every model of the digits but MMVAE."""
    return Schedule(profile.steps, profile.batch_size, profile.learning_rate, precision=profile.precision)


def annealed(profile: Profile) -> Schedule:
    """The weight of the KLs rises at first (MVAE)."""
    return replace(updates(profile), anneal_steps=profile.anneal_steps)


def by_particles(profile: Profile, particles: int | None = None) -> Schedule:
    """MMVAE's, whose updates cost `particles` times as much; the profile's number of them unless given."""
    # Some 0.5 GB of activations for each chunk of 500 codes of two modalities; larger ones are slower on a CPU.
    chunks = ceil((particles or profile.particles) * profile.particle_batch / 500)
    return replace(updates(profile), steps=profile.particle_steps, batch_size=profile.particle_batch, chunks=chunks)


def judging(profile: Profile) -> Schedule:
    """The evaluation classifiers' (MMVAE's protocol)."""
    return Schedule(profile.classifier_steps, 128)  # in float32: what judges is the same in every precision


# --- the classifiers that judge, and Sec. 5.1's evaluation ------------------------------------------------------------


def classifier(data: DataSet, splits: Splits, *, modality: str) -> nn.Module:
    """The data set's evaluation classifier of one modality."""
    if data.classifier is None:
        raise DMVAEError(
            f"data set {data.name!r} has no evaluation classifier; give it one, or a row without coherence."
        )
    return data.classifier(modality)


def one_modality(pairs: PairedData, name: str) -> PairedData:
    """The items of one modality, each once. Raises DMVAEError for items without classes."""
    if pairs.item_labels is None:
        raise DMVAEError(f"the items of {name!r} have no labels, which a classifier learns from; give them.")
    items = pairs.items[name]
    return PairedData({name: items}, {name: torch.arange(len(items))}, {name: pairs.item_labels[name]})


def training_items(splits: Splits, name: str) -> PairedData:
    """What a judge learns from: real training images as they are, none that was generated."""
    return one_modality(splits.train, name)


def cross_entropy(
    model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor | None, observed: object, beta: float
) -> Terms:
    """A classifier's objective."""
    (images,) = batch.values()
    return Terms(others={"cross_entropy": F.cross_entropy(model(images), labels)})


@torch.no_grad()
def accuracy(run: Run) -> dict:
    """The share of the modality's test images whose class a judge predicts."""
    device = next(run.model.parameters()).device
    items = one_modality(run.setting.splits(run.row.data).test, run.row.options["modality"]).to(device)
    rows = torch.arange(len(items), device=device).split(1_000)
    predicted = torch.cat([predict(run.model, *items.batch(part).values()) for part in rows])
    return {"scores": {"accuracy": cross_coherence(predicted, items.labels)}}


def judge(data: DataSet, modality: str, schedule: Callable[[Profile], Schedule] = judging) -> Row:
    """The row of a modality's evaluation classifier. Raises DMVAEError for an unknown modality."""
    if modality not in data.modalities:
        raise DMVAEError(f"unknown modality {modality!r}; {data.name!r} has {', '.join(data.modalities)}.")
    return Row(
        name=("" if data == MNIST_SVHN else f"{data.name}-") + f"classifier-{modality}",
        title=f"classifier of {modality}",
        data=data,
        build=classifier,
        schedule=schedule,
        evaluate=accuracy,
        options={"modality": modality},
        objective=cross_entropy,
        select=partial(training_items, name=modality),
    )


@lru_cache(maxsize=8)
def judges(setting: Setting, data: DataSet, schedule: Callable[[Profile], Schedule] = judging) -> dict[str, Run]:
    """{modality: the run of its evaluation classifier}, of seed 0; built once per process."""
    return {name: Run(judge(data, name, schedule), 0, setting) for name in data.modalities}


def strong_judge(data: DataSet, modality: str, place: Setting) -> Row:
    """The row of a modality's strong judge (`rows/strong.py`), which does what `judge`'s does."""
    usual = judge(data, modality, strong.schedule)
    return replace(
        usual,
        name=f"strong-{usual.name}",
        title=f"strong {usual.title}",
        build=strong.build,
        fit=partial(strong.fit, plan=strong.schedule(place.profile), device=place.device),
    )


@lru_cache(maxsize=4)
def strong_judges(setting: Setting, data: DataSet) -> dict[str, Run]:
    """{modality: the run of its strong judge}, of seed 0; none in a profile without them and on a validation split."""
    if not setting.profile.strong_steps or setting.evaluation != "test":
        return {}
    return {name: Run(strong_judge(data, name, setting), 0, setting) for name in data.modalities}


STRONG_PAIRS = 5_000  # that a strong judge sees, drawn from the test pairs, and as many joint samples


def judged(run: Run) -> dict:
    """Table 1's measures (`dmvae_lib.metrics.coherence`) on the setting's evaluation pairs, and which judges said so.

    On test pairs also "strong": the same by the strong judges, on fewer pairs; "codes": what Figures 4 and 5 show
    (`dmvae_lib.paper.codes`); "chance": what knowing nothing scores, of a cross-coherence always the commonest digit.
    """
    by, splits = judges(run.setting, run.row.data), run.setting.splits(run.row.data)
    models = {name: judge.model for name, judge in by.items()}
    found = {"scores": coherence(run.model, splits.test, models), "judges": facts_of(by)}
    if run.setting.evaluation != "test":
        return found
    if stronger := strong_judges(run.setting, run.row.data):
        pairs = splits.test.select(chosen(splits, STRONG_PAIRS))
        strong_models = {name: judge.model for name, judge in stronger.items()}
        scores = coherence(run.model, pairs, strong_models, samples=len(pairs))
        found["strong"] = {"scores": scores, "pairs": len(pairs), "judges": facts_of(stronger)}
    commonest = dict.fromkeys(found["scores"].keys() - {"joint"}, chance(splits.test.labels)[1])
    beyond = codes(run.model, splits, models)
    return found | beyond | {"chance": dict(sorted(commonest.items())) | beyond["chance"]}


def facts_of(by: Mapping[str, Run]) -> dict[str, dict]:
    """{modality: its judge's accuracy and the SHA-256 of its weights}, for a run's entry."""
    return {name: judge.scores | {"sha256": judge.entry["files"]["model.safetensors"]} for name, judge in by.items()}


# --- the tables -----------------------------------------------------------------------------------------------------

DMVAE_ROW = Row(
    name="dmvae",
    title="DMVAE",
    data=MNIST_SVHN,
    build=dmvae,
    schedule=updates,
    evaluate=judged,
    options={"shared_dim": 10, "private_dims": {"mnist": 1, "svhn": 4}, "initialise": "release"},
    from_profile=("width",),
)
# The baselines have one latent space of MMVAE's size. Table 1's grid (benchmarks/grid.py) chose that MVAE weighs the data set's
# modalities as DMVAE does, and starts as its authors' from PyTorch's own initialisation.
MVAE_ROW = replace(
    DMVAE_ROW,
    name="mvae",
    title="MVAE",
    build=mvae,
    schedule=annealed,
    options={"shared_dim": 20, "initialise": "pytorch"},
)
# MMVAE weighs MNIST by the ratio of pixels, as its authors do, and starts by Kaiming's rule: by the same grid. The related models
# have what it has.
BASELINE = {"shared_dim": 20, "weights": {"mnist": 3072 / 784, "svhn": 1.0}, "initialise": "kaiming"}


def _variant(name: str, title: str, **options: Any) -> Row:
    return replace(DMVAE_ROW, name=name, title=title, options={**DMVAE_ROW.options, **options})


TABLE1 = {
    "MVAE": MVAE_ROW,
    "MMVAE": replace(
        DMVAE_ROW,
        name="mmvae",
        title="MMVAE",
        build=mmvae,
        schedule=by_particles,
        options=BASELINE,
        from_profile=("width", "particles"),
    ),
    "DMVAE": DMVAE_ROW,
}
RELATED = {  # discussed in Sec. 2, without numbers in the paper
    "JMVAE": replace(DMVAE_ROW, name="jmvae", title="JMVAE", build=jmvae, options=BASELINE),
    "JVAE (TELBO)": replace(DMVAE_ROW, name="telbo", title="JVAE (TELBO)", build=telbo, options=BASELINE),
}
ABLATED = {
    "no PoE": _variant("dmvae-no-poe", "no PoE", without=["mnist<-joint", "svhn<-joint"]),
    "no crVAE M2S": _variant("dmvae-no-m2s", "no crVAE M2S", without=["svhn<-mnist"]),
    "no crVAE S2M": _variant("dmvae-no-s2m", "no crVAE S2M", without=["mnist<-svhn"]),
    "no crVAE": _variant("dmvae-no-cross", "no crVAE", without=["svhn<-mnist", "mnist<-svhn"]),
    "no private spaces": _variant("dmvae-no-private", "no private spaces", private_dims={"mnist": 0, "svhn": 0}),
}
TABLE3 = {"full": DMVAE_ROW} | ABLATED
# The authors' public release multiplies the joint reconstructions by zero and keeps their KLs.
RELEASE = _variant(
    "dmvae-release", "as released", without=["log_likelihood(mnist<-joint)", "log_likelihood(svhn<-joint)"]
)
DIGITS = tuple({row.name: row for row in (*TABLE1.values(), *RELATED.values(), *TABLE3.values(), RELEASE)}.values())
JUDGES = {name: judge(MNIST_SVHN, name) for name in MNIST_SVHN.modalities}


def first_images(splits: Splits, modality: str, first: int, permutations: int) -> PairedData:
    """The training pairs made with only the first images of one modality, in their order; pairing takes as many of others."""
    items, labels = dict(splits.train.items), dict(splits.train.item_labels or {})
    items[modality], labels[modality] = items[modality][:first], labels[modality][:first]
    return PairedData.pair(items, labels, permutations)


def learning_curve(profile: Profile) -> dict[int, Row]:
    """DMVAE on the first SVHN training images, and as many of MNIST: {so many: its row}, as the profile says."""
    select = partial(first_images, modality="svhn", permutations=profile.permutations)
    return {
        n: replace(
            DMVAE_ROW, name=f"dmvae-first-{n}", title=f"DMVAE, {n:,} SVHN images", select=partial(select, first=n)
        )
        for n in profile.learning_curve
    }


def twice(profile: Profile) -> Schedule:
    """Twice the profile's updates."""
    return replace(updates(profile), steps=2 * profile.steps)


def budgets(profile: Profile) -> dict[str, Row]:
    """What the budget decides, as the profile says: {title: row} of MMVAE with more particles at the same number of pairs,
    and of DMVAE with twice the updates."""
    rows = {}
    for k in profile.more_particles:
        rows[f"MMVAE, K = {k}"] = replace(
            TABLE1["MMVAE"],
            name=f"mmvae-{k}",
            title=f"MMVAE, K = {k}",
            options={**BASELINE, "particles": k},
            from_profile=("width",),
            schedule=partial(by_particles, particles=k),
        )
    if profile.twice:
        longer = replace(DMVAE_ROW, name="dmvae-twice", title="DMVAE, twice the updates", schedule=twice)
        rows[longer.title] = longer
    return rows
