"""Zero-shot recognition and retrieval (Sec. 5.2, Table 2): embeddings of a test split, measures and their spread."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.metrics import class_similarity, precision_at_k, recognised
from dmvae_lib.pairing import PairedData

CLASS_HITS = 5  # of an image that a second stage re-ranks; for a class, 2 k images
CAPTIONS_PER_CLASS = 50  # that a second stage judges with every image
RESAMPLES = 10_000


@torch.no_grad()
def embed(model: nn.Module, data: PairedData, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """(images (M, d), captions (T, d)) of all items, each once, in their order in `data`; on the CPU."""
    model.eval()
    image, text = (
        torch.cat([function(_moved(items, model)).cpu() for items in data.items[name].split(batch_size)])
        for name, function in (("image", model.embed_image), ("text", model.embed_text))
    )
    return image, text


def evaluate_retrieval(model: nn.Module, data: PairedData, k: int = 50) -> dict[str, Any]:
    """Rank-1 and AP@k of a row of Table 2 on the classes of `data`, with its spread over classes, for k = 50:

    {"scores": {"rank1", "ap50"}, "rank1_interval", "ap50_interval", "per_class": [{"class", "images", "rank1", "ap50"}],
    "codes": {"top 3 captions", "top 3 images"}}: shares in [0, 1]; 95 % bootstrap intervals over classes
    (`class_bootstrap`); of the three captions nearest to each image, and of the three images nearest to each caption,
    those of its class (Figs. 6 and 7). A model with `match` re-ranks its top
    hits by it (`rerank`). Raises DMVAEError for fewer than k images and for classes that one modality lacks.
    """
    labels, text_labels = _labels(data)
    image, text = embed(model, data)
    classes, similarity = class_similarity(image, text, text_labels)
    recognising = retrieving = similarity
    if hasattr(model, "match"):
        scores = pair_scores(model, data, classes)
        recognising = rerank(similarity, scores, CLASS_HITS, dim=1)
        retrieving = rerank(similarity, scores, 2 * k, dim=0)
    hits = recognised(recognising, labels, classes).double()
    precision = precision_at_k(retrieving, labels, classes, k)
    images = (labels[:, None] == classes).double()  # (M, C)
    count, correct = images.sum(0), hits @ images
    alike = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    top3 = {"captions": text_labels[alike.topk(3, 1).indices] == labels[:, None]}
    top3["images"] = labels[alike.topk(3, 0).indices] == text_labels
    by_class = zip(classes.tolist(), count.long().tolist(), (correct / count).tolist(), precision.tolist())
    return {
        "scores": {"rank1": hits.mean().item(), f"ap{k}": precision.mean().item()},
        "rank1_interval": class_bootstrap(correct, count),
        f"ap{k}_interval": class_bootstrap(precision, torch.ones_like(precision)),
        "per_class": [dict(zip(("class", "images", "rank1", f"ap{k}"), values)) for values in by_class],
        "codes": {f"top 3 {what}": right.double().mean().item() for what, right in top3.items()},
    }


def class_bootstrap(total: Tensor, count: Tensor, seed: int = 0) -> list[float]:
    """The 95 % interval [low, high] of sum(total) / sum(count), both (C,), over classes drawn with replacement.

    It says how much the measure depends on which classes are tested; each draw's ranks are those among all classes.
    """
    drawn = torch.randint(len(total), (RESAMPLES, len(total)), generator=torch.Generator().manual_seed(seed))
    values = total[drawn].sum(1) / count[drawn].sum(1)
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


@torch.no_grad()
def pair_scores(model: nn.Module, data: PairedData, classes: Tensor, batch_size: int = 128) -> Tensor:
    """(M, C): the mean probability, by `model.match`, that an image and a caption of the class match.

    It takes CAPTIONS_PER_CLASS captions, evenly spaced among the class's, or all if there are fewer.
    """
    _, text_labels = _labels(data)
    columns = []
    for label in classes:
        rows = (text_labels == label).nonzero().flatten()
        rows = rows[torch.linspace(0, len(rows) - 1, min(CAPTIONS_PER_CLASS, len(rows))).long()]
        captions = _moved(data.items["text"][rows.to(data.items["text"].device)], model)
        parts = [model.match(_moved(images, model), captions) for images in data.items["image"].split(batch_size)]
        columns.append(torch.cat(parts).sigmoid().mean(1))
    return torch.stack(columns, 1).cpu()


def rerank(similarity: Tensor, scores: Tensor, hits: int, dim: int) -> Tensor:
    """similarity (M, C) with the `hits` most similar along `dim` put before all others, in the order of `scores`."""
    top = similarity.topk(min(hits, similarity.shape[dim]), dim).indices
    ahead = similarity.max() + 1 + scores.double().gather(dim, top)
    return similarity.double().scatter(dim, top, ahead)


def _labels(data: PairedData) -> tuple[Tensor, Tensor]:
    found = data.item_labels or {}
    if not {"image", "text"} <= found.keys():
        raise DMVAEError(f"retrieval needs images and captions with labels; the data has {', '.join(found) or 'none'}.")
    labels, text_labels = found["image"].cpu(), found["text"].cpu()
    if alone := set(labels.tolist()) ^ set(text_labels.tolist()):
        raise DMVAEError(f"classes {sorted(alone)} have images or captions alone; retrieval needs both of every class.")
    return labels, text_labels


def _moved(items: Tensor, model: nn.Module) -> Tensor:
    like = next(chain(model.parameters(), model.buffers()))
    return items.to(like.device).float()
