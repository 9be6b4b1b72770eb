"""What Figures 4 and 5 show of a model's codes, as numbers: digit and style of what it draws, where its codes lie."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import torch
from torch import Tensor, nn

from dmvae_lib.analysis import distinct_codes, linear_probe, mixing, neighbour_agreement, posterior_means
from dmvae_lib.errors import DMVAEError
from dmvae_lib.metrics import chance, predict
from dmvae_lib.models import MultimodalVAE
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import Splits

EMBEDDED, PROBED = 400, 4_000  # test pairs: Fig. 5 has 400
STYLES, COLUMNS = 5, 20  # Fig. 4 has five rows; columns of each class here


def chosen(splits: Splits, n: int) -> Tensor:
    """(n,) random test pairs, or all: the first of one fixed order."""
    return torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(0))[:n]


@torch.no_grad()
def synthesised(model: MultimodalVAE, batch: Mapping[str, Tensor], target: str) -> Tensor:
    """Fig. 4: (STYLES, B, ...) items of `target` from the batch's: in each row one private code (`distinct_codes`).

    The shared code is drawn once for each item. A model without private codes gives samples of its only code instead.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    if not model.private_dims[target]:
        return model.cross_generate(batch, target, STYLES, generator=generator)
    shared = model.infer(batch).joint.rsample(generator)
    return model.mean(target, distinct_codes(model, target, STYLES)[:, None], shared)


@torch.no_grad()
def misread(
    model: MultimodalVAE, pairs: PairedData, judge: nn.Module, source: str, target: str
) -> tuple[Tensor, Tensor, list[int | None]]:
    """Figure 4's failures, by a rule: of each class the first pair, by index, whose item drawn from `source` with a
    private code of the prior the judge of `target` misreads. The sources' items, those drawn, and as what they are read;
    white and None for a class whose first 1,000 pairs have none."""
    assert pairs.labels is not None
    device, given, drawn, read = next(model.parameters()).device, [], [], []
    generator = torch.Generator(device).manual_seed(0)
    for label in pairs.labels.unique():
        x = pairs.batch((pairs.labels == label).nonzero()[:1_000, 0])[source].to(device)
        made = model.cross_generate({source: x}, target, generator=generator)[0]
        seen = predict(judge, made)
        wrong = (seen != label).nonzero()[:1, 0]
        given.append(x[wrong] if len(wrong) else torch.ones_like(x[:1]))
        drawn.append(made[wrong] if len(wrong) else torch.ones_like(made[:1]))
        read.append(int(seen[wrong]) if len(wrong) else None)
    return torch.cat(given), torch.cat(drawn), read


@torch.no_grad()
def codes(model: MultimodalVAE, splits: Splits, judges: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """{"codes": {measure: share}, "chance": {measure: what knowing nothing scores}}, on random test pairs.

    "identity a->b": how often a judge sees a's class in the items of b that Fig. 4 draws from a; "style a->b": how
        often the private code inferred from such an item is nearest to its own row's, of the five.
    "alignment": `neighbour_agreement` of the shared codes, "mixing": `mixing` (Fig. 5).
    "private a", "shared a", "shared joint": a `linear_probe` each for the class.
    Raises DMVAEError for data without classes.
    """
    device, train_labels, test_labels = next(model.parameters()).device, splits.train.labels, splits.test.labels
    if train_labels is None or test_labels is None:
        raise DMVAEError("the codes' measures compare classes, and these data have none; give labels.")
    order = chosen(splits, len(test_labels))
    found: dict[str, tuple[float, float | None]] = {}  # measure: (share, chance)

    rows = torch.cat([order[test_labels[order] == label][:COLUMNS] for label in test_labels.unique()])
    batch, labels = splits.test.to(device).batch(rows.to(device)), test_labels[rows].to(device)
    for source, target in permutations(model.names, 2):
        drawn = synthesised(model, {source: batch[source]}, target).flatten(0, 1)
        seen = predict(judges[target], drawn).view(STYLES, -1)
        found[f"identity {source}->{target}"] = _share(seen == labels), chance(labels)[1]
        if model.private_dims[target]:
            inferred = model.infer({target: drawn}).private[target].mean
            nearest = torch.cdist(inferred, distinct_codes(model, target, STYLES)).argmin(1).view(STYLES, -1)
            row = torch.arange(STYLES, device=device)[:, None]
            found[f"style {source}->{target}"] = _share(nearest == row), 1 / STYLES

    rows = order[:EMBEDDED]
    shared = posterior_means(model, splits.test, rows)["shared"]
    del shared["joint"]
    found["alignment"] = neighbour_agreement(shared, test_labels[rows]), chance(test_labels[rows])[0]
    found["mixing"] = mixing(shared), None

    rows = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))[:PROBED]
    answers = test_labels[order[:PROBED]]
    learnt, tested = posterior_means(model, splits.train, rows), posterior_means(model, splits.test, order[:PROBED])
    for part, name in [(part, name) for part, of_part in learnt.items() for name in of_part]:
        if learnt[part][name].shape[1]:
            right = linear_probe(learnt[part][name], train_labels[rows], tested[part][name], answers)
            found[f"{part} {name}"] = right, chance(answers)[1]
    floors = {measure: floor for measure, (_, floor) in found.items() if floor is not None}
    return {"codes": {measure: share for measure, (share, _) in found.items()}, "chance": floors}


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
