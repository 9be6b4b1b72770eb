"""The rows of notebook 13: training where only a share of the observations is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData, pair_many
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.rows.digits import DMVAE_ROW, MVAE_ROW
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.training import Schedule


def complete_in_part(splits: Splits, share: float, alone: bool = False) -> PairedData:
    """The training pairs as they would be if only a share of the items had met a partner.

    Of each class, the first `share` of the items that the protocol pairs are paired with one another. The others are
    paired too, and of each such pair one modality, at random, is kept; or none, with `alone`. So `share` of the
    observations are complete, and no item is in both kinds. (Masks put on the protocol's own pairs would hide little:
    an item is in 30 of them, so that at 5 % four items in five, 1 - 0.95^30, would still have a partner.)
    """
    pairs = splits.train
    if pairs.item_labels is None:
        raise DMVAEError("complete_in_part: the pairs have no labels, by which they are paired anew; give them.")
    classes = 1 + max(int(labels.max()) for labels in pairs.item_labels.values())
    one_hot = {name: F.one_hot(labels, classes) for name, labels in pairs.item_labels.items()}
    sizes = torch.stack([of.sum(0) for of in one_hot.values()]).amin(0)  # how many items of a class are paired
    rank = {name: (of.cumsum(0) * of).sum(1) - 1 for name, of in one_hot.items()}  # of an item in its class
    met = {name: rank[name] < share * sizes[labels] for name, labels in pairs.item_labels.items()}
    # As two classes of their own, items with and without a partner are paired among themselves.
    doubled = {name: 2 * labels + met[name] for name, labels in pairs.item_labels.items()}
    index = pair_many(doubled, permutations=int(pairs.index[pairs.names[0]].bincount().max()))
    complete = met[pairs.names[0]][index[pairs.names[0]]]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(complete), generator=generator)
    order = order[complete[order]] if alone else order
    kept = torch.randint(len(pairs.names), (len(complete),), generator=generator)
    observed = {name: (complete | (kept == i))[order] for i, name in enumerate(pairs.names)}
    return PairedData(pairs.items, {name: rows[order] for name, rows in index.items()}, pairs.item_labels, observed)


def fewer(profile: Profile, of: Callable[[Profile], Schedule]) -> Schedule:
    """A row's schedule with the updates that the profile gives to this comparison."""
    return replace(of(profile), steps=profile.incomplete_steps)


def _by_share(row: Row, profile: Profile, kind: str, alone: bool = False) -> dict[float, Row]:
    shorter = replace(row, name=f"{row.name}-gaps-100", schedule=partial(fewer, of=row.schedule))
    rows = {1.0: row if profile.incomplete_steps == profile.steps else shorter}
    for share in profile.complete:
        name, title = f"{row.name}-{kind}-{100 * share:g}", f"{row.title}, {share:.0%} complete"
        select = partial(complete_in_part, share=share, alone=alone)
        rows[share] = replace(rows[1.0], name=name, title=f"{title}, these alone" if alone else title, select=select)
    return rows


def incomplete(profile: Profile) -> dict[str, dict[float, Row]]:
    """{what is trained on what: {share of complete observations: row}}: all of them first, then the profile's shares.
    Table 1's rows in all but what they are trained on and, where the profile says so, for how many updates. None where it
    has no shares."""
    if not profile.complete:
        return {}
    return {
        "DMVAE, all observations": _by_share(DMVAE_ROW, profile, "gaps"),
        "MVAE, all observations": _by_share(MVAE_ROW, profile, "gaps"),
        "DMVAE, complete ones alone": _by_share(DMVAE_ROW, profile, "alone", alone=True),
    }
