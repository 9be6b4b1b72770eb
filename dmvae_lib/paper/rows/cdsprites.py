"""CdSprites+: DMVAE by Eq. 3 beside DMVAE by the loss of the leaderboard on which it comes last."""

from __future__ import annotations

from dataclasses import replace

from dmvae_lib.metrics import coherence
from dmvae_lib.paper.data.cdsprites import CDSPRITES
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.rows import digits
from dmvae_lib.paper.rows.polymnist import judging, tuples
from dmvae_lib.paper.runs import Run
from dmvae_lib.training import Schedule


def sprites(profile: Profile) -> Schedule:
    """As PolyMNIST's rows, by updates of its own."""
    return replace(tuples(profile), steps=profile.sprite_steps)


JUDGES = {level: digits.judge(data, "image", judging) for level, data in CDSPRITES.items()}


def judged(run: Run) -> dict:
    """`coherence` by classes, captions counting where they are spelt exactly (the leaderboard's "strict"), and its judge."""
    data = run.row.data
    by = digits.judges(run.setting, data, judging)["image"]
    assert data.classifier is not None
    device = next(run.model.parameters()).device
    classifiers = {"image": by.model, "caption": data.classifier("caption").to(device)}
    scores = coherence(run.model, run.setting.splits(data).test, classifiers, samples=1_000)
    return {"scores": scores, "judges": digits.facts_of({"image": by})}


# The dimensions of the paper's private codes for images and captions (Sec. 5.2).
OPTIONS = {"shared_dim": 8, "private_dims": {"image": 3, "caption": 3}, "initialise": "release"}
REDUCED = ("image<-caption", "caption<-image")  # what the leaderboard's loss lacks: it has self and joint bounds only


def _rows(level: int) -> dict:
    row = replace(
        digits.DMVAE_ROW,
        name=f"cdsprites{level}-dmvae",
        title=f"DMVAE by Eq. 3, level {level}",
        data=CDSPRITES[level],
        schedule=sprites,
        evaluate=judged,
        options=OPTIONS,
    )
    reduced = replace(
        row,
        name=f"{row.name}-reduced",
        title=f"DMVAE without cross bounds, level {level}",
        options={**OPTIONS, "without": REDUCED},
    )
    return {of.title: of for of in (row, reduced)}


CDSPRITES_ROWS = {level: _rows(level) for level in CDSPRITES}
