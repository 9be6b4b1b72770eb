"""Profiles: the same experiments and notebooks on different data and budgets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dmvae_lib.errors import DMVAEError


@dataclass(frozen=True)
class Profile:
    """What differs between a fresh laptop and the paper's setting; everything else is the same code.

    digits: source of the digit data (`load_digits`); width: hidden layers of the digit networks relative to the
    paper's; steps, batch_size: updates of every digit model; particles: MMVAE's K; particle_steps, particle_batch:
    MMVAE's own budget; learning_rate: Adam's; weights: lambda of Eq. 3 for MNIST and SVHN; classifier_steps:
    updates of the evaluation classifiers; flowers: source of the flowers (`load_flowers`); flower_steps,
    flower_hidden, flower_learning_rate: updates of every row of Table 2, its hidden layers, Adam's rate; flower_weights,
    flower_matching: lambda of Eq. 3 for image and text and the weight of Eq. 4, which the paper does not give (chosen
    on the validation classes of the embedded flowers, in subset and paper on those of Oxford-102); learning_curve:
    numbers of SVHN training images to train DMVAE on, beside all; writes_results: whether artefacts go to
    results/<profile>/; gigabytes: of memory that a process needs, the data included.
    """

    name: str
    digits: str
    width: float
    steps: int
    batch_size: int
    particles: int
    particle_steps: int
    particle_batch: int
    classifier_steps: int
    flowers: str
    flower_steps: int
    flower_hidden: int
    flower_weights: tuple[float, float]
    flower_matching: float
    learning_rate: float = 1e-3
    weights: tuple[float, float] = (50.0, 1.0)
    flower_learning_rate: float = 1e-3
    permutations: int = 30
    learning_curve: tuple[int, ...] = ()
    writes_results: bool = True
    gigabytes: float = 2.0


QUICK = Profile(  # its weights were chosen on the validation split of the embedded digits, its budget by the clock
    name="quick",
    digits="embedded",
    width=0.5,
    steps=800,
    batch_size=100,
    learning_rate=2e-3,
    weights=(5.0, 1.0),
    particles=10,
    particle_steps=400,
    particle_batch=50,
    classifier_steps=1_500,
    flowers="embedded",
    flower_steps=400,
    flower_hidden=128,
    flower_weights=(0.1, 0.1),
    flower_matching=10.0,
)

PROFILES = {
    profile.name: profile
    for profile in (
        replace(
            QUICK,
            name="smoke",
            steps=4,
            particle_steps=2,
            classifier_steps=20,
            flower_steps=2,
            permutations=2,
            learning_curve=(500,),
            writes_results=False,
        ),
        QUICK,
        Profile(
            name="subset",
            digits="subset",
            width=1.0,
            steps=2_400,  # five minutes on a core for each run of DMVAE; its validation scores still rise
            batch_size=50,  # on the validation split, twice the updates of half the batch were better, for the same work
            particles=4,
            particle_steps=2_400,
            particle_batch=50,
            classifier_steps=4_000,
            flowers="subset",
            flower_steps=900,  # two minutes on a core for each row; most rows' validation scores have levelled off
            flower_hidden=256,
            flower_weights=(0.1, 0.1),
            flower_matching=100.0,
            learning_curve=(1_000, 2_000, 4_000),
            gigabytes=4.0,
        ),
        Profile(
            name="paper",
            digits="full",
            width=1.0,
            steps=168_000,
            batch_size=100,
            particles=30,
            particle_steps=393_750,
            particle_batch=128,
            classifier_steps=10_000,
            flowers="full",
            flower_steps=20_000,
            flower_hidden=512,
            flower_weights=(0.1, 0.1),
            flower_matching=100.0,
            gigabytes=8.0,
        ),
    )
}


def get_profile(name: str) -> Profile:
    """The profile of that name; "subset@0.05" is `subset` with a twentieth of its models' updates and of its pairings, a rehearsal.

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
    shortened = ("steps", "particle_steps", "flower_steps", "permutations")
    steps = {field: max(1, round(part * getattr(PROFILES[base], field))) for field in shortened}
    return replace(PROFILES[base], name=name, **steps)
