"""What the rows of Table 2 share: an image and a text embedding compared by cosine, and losses of several rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.networks import TextFeatures


class JointEmbedding(nn.Module):
    """Images (B, d_image) and captions' token embeddings (B, T, D) -> (B, d) each; a row adds its `loss`."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text

    def embed_image(self, x: Tensor) -> Tensor:
        """(B, d) from image features (B, d_image)."""
        return self.image(x)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, d) from token embeddings (B, T, D), zero after the last token."""
        return self.text(tokens)

    def embed(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings of a batch of pairs {"image", "text"} of classes `labels`, (B,); checked."""
        check_pairs(batch, labels)
        return self.embed_image(batch["image"]), self.embed_text(batch["text"])

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """The row's objective; beta is the weight of DMVAE's KLs, which other rows do not have."""
        raise NotImplementedError


def check_pairs(batch: Batch, labels: Tensor) -> None:
    """Raises DMVAEError unless the batch holds "image" and "text" and there is one label per pair."""
    lengths = {name: len(batch[name]) for name in ("image", "text") if name in batch} | {"labels": len(labels)}
    if len(lengths) < 3 or len(set(lengths.values())) > 1:
        raise DMVAEError(f"batch of {lengths}; expected as many of each of 'image', 'text' and labels.")


def lstm_text(token_dim: int, dim: int, hidden: int) -> nn.Module:
    """The paper's text network (Sec. 5.2), BiLSTM and maximum over time, with a linear map to (B, dim)."""
    return nn.Sequential(TextFeatures(token_dim, hidden), nn.Linear(2 * hidden, dim))


def ranking_loss(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """mean over m and n of different classes of max(0, margin + F(m, n) - F(m, m)), from scores F (B, B).

    Pair m is scores[m, m]. A batch of one class has no such m and n, and loss 0.
    """
    different = labels[:, None] != labels[None, :]
    hinge = (margin + scores - scores.diagonal()[:, None]).relu()
    return (hinge * different).sum() / different.sum().clamp_min(1)


def joint_embedding_loss(image: Tensor, text: Tensor, labels: Tensor) -> Terms:
    """The symmetric structured joint embedding of Reed et al. (2016): hinges on dot products in both directions.

    image, text: (B, d) of the pairs, labels: (B,). Terms "image" (captions compete) and "text" (images do).
    """
    scores = image @ text.T
    parts = {"image": ranking_loss(scores, labels, 1.0), "text": ranking_loss(scores.T, labels, 1.0)}
    return Terms(parts["image"] + parts["text"], parts)


class IdentityClassifier(nn.Module):
    """Norm-softmax: log-probabilities of the training classes from dot products with unit-length class vectors.

    classes: the labels that occur in training. features (B, d), labels (B,) -> mean cross-entropy.
    """

    def __init__(self, classes: Sequence[int], dim: int):
        super().__init__()
        self.register_buffer("classes", sorted_classes(classes))
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(self.classes), dim)))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = features @ F.normalize(self.weight, dim=-1).T
        return F.cross_entropy(logits, class_index(self.classes, labels))


def sorted_classes(classes: Sequence[int]) -> Tensor:
    """(C,) distinct labels in ascending order. Raises DMVAEError for none."""
    found = torch.as_tensor(classes, dtype=torch.int64).unique()
    if not len(found):
        raise DMVAEError("no training class given; give the labels that occur in training.")
    return found


def class_index(classes: Tensor, labels: Tensor) -> Tensor:
    """(B,) positions of `labels` among the sorted `classes`. Raises DMVAEError for labels that are not there."""
    index = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    if not torch.equal(classes[index], labels):
        unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
        raise DMVAEError(f"labels {unknown} are not among the {len(classes)} training classes the model was given.")
    return index
