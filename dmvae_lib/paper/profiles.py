"""Profiles: the same rows and notebooks on different data and budgets; data, not code paths."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dmvae_lib.errors import DMVAEError


@dataclass(frozen=True)
class Profile:
    """What differs between a fresh laptop and the paper's setting; everything else is the same code.

    source: of every data set ("embedded", "subset" or "full").
    width: of the digit networks' hidden layers, relative to the paper's; steps, batch_size, learning_rate: of every
        model of the digits, by Adam; particles: MMVAE's K, which has particle_steps of particle_batch pairs instead;
        classifier_steps: updates of the evaluation classifiers; learning_curve: numbers of SVHN training images to
        train DMVAE on, beside all.
    retrieval_steps, retrieval_hidden, retrieval_learning_rate: updates of every row of Table 2, units of its hidden
        layers, Adam's rate; matching: the weight of Eq. 4, which the paper does not give (chosen on the validation
        classes of the profile's flowers).
    tuple_steps, tuple_batch: updates of every model of the field's benchmarks, and tuples in each; tuple_items: test
        tuples that they are measured on.
    permutations: how often every item is paired; writes_results: whether the runs' entries and what is made of them go
        to results/<name>/; gigabytes: of memory that a process needs, the data included; precision: as of `Schedule`.
    """

    name: str
    source: str
    width: float
    steps: int
    batch_size: int
    learning_rate: float
    particles: int
    particle_steps: int
    particle_batch: int
    classifier_steps: int
    retrieval_steps: int
    retrieval_hidden: int
    retrieval_learning_rate: float
    matching: float
    tuple_steps: int
    tuple_batch: int
    tuple_items: int
    permutations: int = 30
    learning_curve: tuple[int, ...] = ()
    writes_results: bool = True
    gigabytes: float = 2.0
    precision: str = "float32"


QUICK = Profile(  # its budget was chosen by the clock: all of the digits' rows in some minutes of two cores
    name="quick",
    source="embedded",
    width=0.5,
    steps=800,
    batch_size=100,
    learning_rate=2e-3,
    particles=10,
    particle_steps=400,
    particle_batch=50,
    classifier_steps=1_500,
    retrieval_steps=400,
    retrieval_hidden=128,
    retrieval_learning_rate=1e-3,
    matching=10.0,
    tuple_steps=150,
    tuple_batch=20,
    tuple_items=100,
)
SMOKE = replace(
    QUICK,
    name="smoke",
    steps=4,
    particle_steps=2,
    classifier_steps=20,
    retrieval_steps=2,
    tuple_steps=2,
    tuple_items=20,
    permutations=2,
    learning_curve=(500,),
    writes_results=False,
)
SUBSET = Profile(
    name="subset",
    source="subset",
    width=1.0,
    steps=2_400,  # five minutes on a core for each run of DMVAE; its validation scores still rise
    batch_size=50,  # on the validation split, twice the updates of half the batch were better, for the same work
    learning_rate=1e-3,
    particles=4,
    particle_steps=2_400,
    particle_batch=50,
    classifier_steps=4_000,
    retrieval_steps=900,  # two minutes on a core for each row; most rows' validation scores have levelled off
    retrieval_hidden=256,
    retrieval_learning_rate=1e-3,
    matching=100.0,
    tuple_steps=6_000,
    tuple_batch=50,
    tuple_items=2_000,
    learning_curve=(1_000, 2_000, 4_000),
    gigabytes=4.0,
)
PAPER = Profile(
    name="paper",
    source="full",
    width=1.0,
    steps=168_000,  # ten epochs of 1.68 million pairs
    batch_size=100,
    learning_rate=1e-3,
    particles=30,
    particle_steps=393_750,  # 30 epochs (Shi et al. 2019)
    particle_batch=128,
    classifier_steps=10_000,
    retrieval_steps=20_000,
    retrieval_hidden=512,
    retrieval_learning_rate=1e-3,
    matching=100.0,
    tuple_steps=70_200,  # 300 epochs of 60,000 tuples (Sutter et al. 2021)
    tuple_batch=256,
    tuple_items=2_000,
    gigabytes=8.0,
)
PROFILES = {profile.name: profile for profile in (SMOKE, QUICK, SUBSET, PAPER)}


def get_profile(name: str) -> Profile:
    """The profile of that name; "subset@0.05" is `subset` with a twentieth of its updates and pairings, a rehearsal.

    Raises DMVAEError for any other name and for a share that is not in (0, 1].
    """
    base, at, share = name.partition("@") if isinstance(name, str) else ("", "", "")
    if base not in PROFILES:
        raise DMVAEError(f"unknown profile {name!r}; expected one of {', '.join(PROFILES)} (quick needs no download).")
    if not at:
        return PROFILES[base]
    # Digits alone: the name becomes a folder's, and float() would take " 1", "1_0" and "nan" too.
    part = float(share) if re.fullmatch(r"[0-9]*\.?[0-9]+(e-[0-9]+)?", share, re.ASCII) else 0.0
    if not 0 < part <= 1:
        raise DMVAEError(
            f"profile {name!r}: the share of the updates after @ is {share!r}; expected a number in (0, 1]."
        )
    shortened = (
        "steps",
        "particle_steps",
        "retrieval_steps",
        "tuple_steps",
        "permutations",
    )  # the judges stay as they are
    steps = {field: max(1, round(part * getattr(PROFILES[base], field))) for field in shortened}
    return replace(PROFILES[base], name=name, **steps)
