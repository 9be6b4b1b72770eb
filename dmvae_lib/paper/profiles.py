"""Profiles: the same rows and notebooks on different data and budgets; data, not code paths."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from dmvae_lib.errors import DMVAEError


@dataclass(frozen=True)
class Profile:
    """What differs between a fresh laptop and the paper's setting; everything else is the same code.

    source: of every data set ("embedded", "subset" or "full").
    width: of the digit networks' hidden layers, relative to the paper's; steps, batch_size: of every model of the digits
        (a run goes on where steps are raised); learning_rate: theirs and the field's benchmarks', by Adam;
        anneal_steps: over which the weight of MVAE's KLs rises; particles: MMVAE's K, which has particle_steps of particle_batch pairs instead;
        classifier_steps: updates of the evaluation classifiers, strong_steps: of the strong ones, 0 for none (a strong
        judge takes a CPU longer than all of `quick`); learning_curve: numbers of SVHN training images to train DMVAE
        on, beside all; more_particles: Ks of MMVAE beside `particles`; twice: whether DMVAE is also trained for twice
        the updates; complete: shares of complete observations to train on, beside all, for
        incomplete_steps updates (notebook 13).
    retrieval_steps, retrieval_hidden: updates of every row of Table 2, units of its hidden layers.
    tuple_steps, sprite_steps, tuple_batch: updates of every model of the field's benchmarks, PolyMNIST and CdSprites+, and
        tuples in each; tuple_anneal_steps: over which MVAE's KLs rise there; tuple_items: test tuples that they are measured
        on.
    validate_every: updates between scores on the validation split, the curve in a run's entry, of a data set that leaves
        it out of training; 0: no curve.
    permutations: how often every item is paired; writes_results: whether the runs' entries and what is made of them go
        to results/<name>/; gigabytes: of memory that a process needs, the data included; precision: of the digits' rows, as of `Schedule`.
    """

    name: str
    source: str
    width: float
    steps: int
    batch_size: int
    learning_rate: float
    anneal_steps: int
    particles: int
    particle_steps: int
    particle_batch: int
    incomplete_steps: int
    classifier_steps: int
    retrieval_steps: int
    retrieval_hidden: int
    tuple_steps: int
    sprite_steps: int
    tuple_anneal_steps: int
    tuple_batch: int
    tuple_items: int
    validate_every: int = 0
    permutations: int = 30
    strong_steps: int = 0
    learning_curve: tuple[int, ...] = ()
    more_particles: tuple[int, ...] = ()
    twice: bool = False
    complete: tuple[float, ...] = (0.5, 0.2, 0.05)
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
    anneal_steps=400,
    particles=10,
    particle_steps=400,
    particle_batch=50,
    incomplete_steps=800,
    classifier_steps=1_500,
    retrieval_steps=400,
    retrieval_hidden=128,
    complete=(0.05,),
    tuple_steps=150,
    sprite_steps=1_000,
    tuple_anneal_steps=75,
    tuple_batch=20,
    tuple_items=100,
)
SMOKE = replace(
    QUICK,
    name="smoke",
    steps=4,
    anneal_steps=2,
    particle_steps=2,
    incomplete_steps=4,
    classifier_steps=20,
    retrieval_steps=2,
    tuple_steps=2,
    sprite_steps=2,
    tuple_anneal_steps=1,
    tuple_items=20,
    permutations=2,
    learning_curve=(500,),
    writes_results=False,
)
SUBSET = Profile(
    name="subset",
    source="subset",
    width=1.0,
    steps=12_000,  # 600,000 pairs
    batch_size=50,
    learning_rate=1e-3,
    anneal_steps=2_400,
    particles=4,
    particle_steps=12_000,
    particle_batch=50,
    incomplete_steps=4_800,
    classifier_steps=4_000,
    strong_steps=1_125,  # 20 epochs of the 7,200 house numbers
    retrieval_steps=900,  # two minutes on a core for each row; most rows' validation scores have levelled off
    retrieval_hidden=256,
    validate_every=1_200,
    tuple_steps=6_000,
    sprite_steps=6_000,
    tuple_anneal_steps=3_000,
    tuple_batch=50,
    tuple_items=2_000,
    learning_curve=(1_000, 2_000, 4_000),
    more_particles=(10, 30),
    twice=True,
    gigabytes=4.0,
    precision="auto",  # as results/subset/parity.md allows
)
PAPER = Profile(
    name="paper",
    source="full",
    width=1.0,
    steps=168_000,  # ten epochs of 1.68 million pairs, as MultiVae's; the release's command line has seven
    batch_size=100,
    learning_rate=1e-3,
    anneal_steps=84_000,
    particles=30,
    particle_steps=393_750,  # 30 epochs (Shi et al. 2019)
    particle_batch=128,
    incomplete_steps=168_000,
    classifier_steps=10_000,
    strong_steps=11_400,  # 20 epochs of SVHN
    retrieval_steps=20_000,
    retrieval_hidden=512,
    tuple_steps=70_200,  # 300 epochs of 60,000 tuples (Sutter et al. 2021)
    sprite_steps=70_200,
    tuple_anneal_steps=35_100,
    tuple_batch=256,
    tuple_items=2_000,
    gigabytes=8.0,
)
PROFILES = {profile.name: profile for profile in (SMOKE, QUICK, SUBSET, PAPER)}
JUDGING = ("classifier_steps", "strong_steps")
STEPS = [field.name for field in fields(Profile) if field.name.endswith("steps") and field.name not in JUDGING]


def shortened(profile: Profile, share: float) -> Profile:
    """The profile with that share of every model's updates, the annealing's too; the judges stay as they are."""
    return replace(profile, **{field: max(1, round(share * getattr(profile, field))) for field in STEPS})


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
    judged = min(PROFILES[base].strong_steps, 10)  # else a rehearsal would train little but the strong judges
    permutations = max(1, round(part * PROFILES[base].permutations))
    short = shortened(PROFILES[base], part)
    return replace(short, name=name, permutations=permutations, strong_steps=judged)
