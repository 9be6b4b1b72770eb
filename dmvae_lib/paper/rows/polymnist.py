"""The field's benchmark: DMVAE on PolyMNIST beside MVAE and MMVAE, of this library; its successors are `successors.py`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from dmvae_lib.analysis import linear_probe, posterior_means
from dmvae_lib.errors import DMVAEError
from dmvae_lib.metrics import coherence_by_given, frechet_distance, joint_coherence, predict
from dmvae_lib.models import DMVAE, Terms
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.polymnist import POLYMNIST
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.rows import digits
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run
from dmvae_lib.training import Schedule

# --- schedules, objectives, what is trained on ----------------------------------------------------------------------


def tuples(profile: Profile) -> Schedule:
    """The profile's updates of every model, in float32: objectives of the package multivae give NaN in bfloat16."""
    return Schedule(profile.tuple_steps, profile.tuple_batch, profile.learning_rate)


def annealed(profile: Profile) -> Schedule:
    """The weight of the KLs rises at first (MVAE)."""
    return replace(tuples(profile), anneal_steps=profile.tuple_anneal_steps)


def one_source(
    model: DMVAE, batch: Mapping[str, Tensor], labels: Tensor | None, observed: object, beta: float
) -> Terms:
    """Eq. 3 by one of its N + 1 bounds for each target and item, drawn evenly and counted N + 1 times: without bias, at
    N decoded items in place of N (N + 1). Terms as Eq. 3's of a source named "drawn".

    Raises DMVAEError for a batch with missing items, of which it has no estimate.
    """
    if observed is not None:
        raise DMVAEError(
            "one source per target: items are missing; train on complete tuples, or by Eq. 3 (DMVAE.loss)."
        )
    posterior = model.infer_all(batch)
    sources = (posterior.joint, *posterior.shared.values())
    codes = torch.stack([q.rsample() for q in sources])  # (N + 1, B, s)
    divergences = torch.stack([q.kl() for q in sources])
    items, terms = torch.arange(codes.shape[1], device=codes.device), Terms(beta=beta)
    for target in model.names:
        drawn = torch.randint(len(sources), items.shape, device=codes.device)
        private = posterior.private[target]
        found = model.reconstruction(target, posterior, private.rsample(), codes[drawn, items])
        terms.log_likelihoods[f"{target}<-drawn"] = len(sources) * model.weights[target] * found.mean()
        terms.kls[f"{target}<-drawn/private"] = len(sources) * private.kl().mean()
        terms.kls[f"{target}<-drawn/shared"] = len(sources) * divergences[drawn, items].mean()
    return terms


def incomplete(splits: Splits, missing: float, seed: int = 0) -> PairedData:
    """The training tuples with each entry missing with probability `missing`, independently; a tuple that would have
    lost all keeps one, evenly drawn."""
    pairs, generator = splits.train, torch.Generator().manual_seed(seed)
    kept = torch.rand(len(pairs), len(pairs.names), generator=generator) >= missing
    spared = torch.randint(len(pairs.names), (len(pairs),), generator=generator)
    empty = (~kept.any(1)).nonzero().flatten()
    kept[empty, spared[empty]] = True
    return replace(pairs, observed=dict(zip(pairs.names, kept.T)))


# --- judges and measures --------------------------------------------------------------------------------------------


def judging(profile: Profile) -> Schedule:
    """A judge's for each of five modalities: a fifth of the updates of those of Table 1, by half as many images."""
    return replace(digits.judging(profile), steps=max(1, profile.classifier_steps // 5), batch_size=64)


JUDGES = {name: digits.judge(POLYMNIST, name, judging) for name in POLYMNIST.modalities}


def first(pairs: PairedData, n: int) -> PairedData:
    """The first n observations, or all if there are fewer."""
    return pairs.select(torch.arange(min(n, len(pairs))))


def features(judge: nn.Sequential, images: Tensor) -> Tensor:
    """(B, d) what a classifier's last layer sees in images."""
    return judge[:-1](images)


@torch.no_grad()
def measured(run: Run) -> dict:
    """The field's measures of a run on the first test tuples, as many as the profile's `tuple_items`.

    "scores": conditional coherence by the number of given modalities, and "joint", the share of unconditional samples
    in which all classifiers see one class. "judges": the classifiers' accuracy and weights. On test tuples also `beyond`.
    """
    splits, n = run.setting.splits(run.row.data), run.setting.profile.tuple_items
    by = digits.judges(run.setting, run.row.data, judging)
    test, classifiers, model = first(splits.test, n), {name: judge.model for name, judge in by.items()}, run.model
    scores = coherence_by_given(model, test, classifiers)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    drawn = [model.sample(len(rows), generator) for rows in torch.arange(len(test)).split(500)]
    samples = {name: torch.cat([images[name] for images in drawn]) for name in model.names}
    scores["joint"] = joint_coherence(*(predict(classifiers[name], x) for name, x in samples.items()))
    found = {"scores": scores, "judges": digits.facts_of(by)}
    if run.setting.evaluation == "validation":  # a curve of scores, or a choice by them
        return found
    return found | beyond(model, splits, n, classifiers, samples, generator)


def beyond(
    model: nn.Module,
    splits: Splits,
    n: int,
    classifiers: Mapping[str, nn.Sequential],
    samples: Mapping[str, Tensor],
    generator: torch.Generator,
) -> dict:
    """What the field measures beside coherence, on the first n test tuples; samples: {name: (n, ...)}, unconditional.

    "probes": accuracy of linear probes of the posteriors' means (given all modalities; of each modality's own codes,
    averaged). "frechet": the Fréchet distance of the samples to the tuples in each classifier's last features, averaged
    over modalities: no FID. "log_likelihood": importance-weighted, in nats a tuple, by 100 samples, of a twentieth of the
    tuples; under the model's own likelihood, so comparable only between rows of one.
    """
    test = first(splits.test, n)
    real = {name: x.to(generator.device) for name, x in test.batch(torch.arange(len(test))).items()}
    distances = [
        frechet_distance(features(classifiers[name], real[name]), features(classifiers[name], x))
        for name, x in samples.items()
    ]
    few = {name: x[: max(1, n // 20)] for name, x in real.items()}
    likelihood = model.log_likelihood(few, samples=100, generator=generator).mean().item()
    return {"probes": probes(model, splits, n), "frechet": fmean(distances), "log_likelihood": likelihood}


def probes(model: nn.Module, splits: Splits, n: int) -> dict[str, float]:
    """Test accuracies of linear probes for the class, trained on 2n training tuples: of the shared code given all
    modalities, "joint", and of each modality's own, "shared" and, where there is one, "private", averaged."""
    fitted, scored = first(splits.train, 2 * n), first(splits.test, n)
    trained, tested = (posterior_means(model, pairs, torch.arange(len(pairs))) for pairs in (fitted, scored))
    found: dict[str, list[float]] = {}
    for part, codes in trained.items():
        for name, values in codes.items():
            if values.shape[1]:
                share = linear_probe(values, fitted.labels, tested[part][name], scored.labels)
                found.setdefault("joint" if name == "joint" else part, []).append(share)
    return {part: fmean(shares) for part, shares in found.items()}


# --- rows -----------------------------------------------------------------------------------------------------------


def sizes(private: int) -> dict[str, Any]:
    """All models have codes of 64 dimensions for a modality, those of its own included."""
    return {"shared_dim": 64 - private, "private_dims": dict.fromkeys(POLYMNIST.modalities, private)}


# Alike for all rows, those of `successors.py` too: on validation tuples of `subset` MoPoE learnt to pass the class on early with
# these and the data set's weights, and not with a Laplace likelihood, its authors'. benchmarks/grid.py holds both against each other.
HOW = {"initialise": "release", "likelihood": "bernoulli"}
DMVAE_ROW = replace(
    digits.DMVAE_ROW,
    name="polymnist-dmvae",
    title="DMVAE",
    data=POLYMNIST,
    schedule=tuples,
    evaluate=measured,
    options={**sizes(4), **HOW},  # 4: SVHN's in the paper
)
MVAE_ROW = replace(
    DMVAE_ROW,
    name="polymnist-mvae",
    title="MVAE",
    build=digits.mvae,
    schedule=annealed,
    options={"shared_dim": 64, **HOW, "random_subsets": 1},
)
POLYMNIST_ROWS = {
    "DMVAE": DMVAE_ROW,
    "DMVAE, 32 private": replace(  # as many as MMVAE+ has
        DMVAE_ROW,
        name="polymnist-dmvae-private32",
        title="DMVAE, 32 private",
        options={**DMVAE_ROW.options, **sizes(32)},
    ),
    "DMVAE, one source": replace(
        DMVAE_ROW, name="polymnist-dmvae-one-source", title="DMVAE, one source", objective=one_source
    ),
    "MVAE": MVAE_ROW,
    "MMVAE": replace(
        MVAE_ROW,
        name="polymnist-mmvae",
        title="MMVAE",
        build=digits.mmvae,
        schedule=tuples,
        options={"shared_dim": 64, **HOW, "particles": 1},
    ),
}


def with_missing(row: Row, missing: float) -> Row:
    """The row trained on tuples with that share of entries missing."""
    percent = f"{round(100 * missing)}"
    return replace(
        row,
        name=f"{row.name}-missing{percent}",
        title=f"{row.title}, {percent} % missing",
        select=partial(incomplete, missing=missing),
    )


MISSING = {of.title: of for row in (DMVAE_ROW, MVAE_ROW) for of in (with_missing(row, 0.2), with_missing(row, 0.5))}
