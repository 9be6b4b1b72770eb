"""What the rows of Table 2 share: images and captions in one space, compared by cosine, and losses of several rows.

A row's model is an nn.Module with `embed_image`, `embed_text` and `loss(batch, labels, beta=1.0)` for a batch {"image", "text"}
of pairs; GMM+HGLMM has `fit` in place of a loss, and IATV has `match`, a second stage that judges pairs. Its `build`
makes it for the data's features and classes, of `retrieval_hidden` dimensions and LSTM states, or channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import Terms, matching_loss
from dmvae_lib.models.base import Batch
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.networks import TextFeatures


class JointEmbedding(nn.Module):
    """Images (B, d_image) and captions' token embeddings (B, T, D), zero after the last token -> (B, d) each.

    Its loss is the symmetric structured joint embedding of Reed et al. (2016), whose margin is the 0-1 loss, 1; rows
    with another are subclasses.
    """

    def __init__(self, image: nn.Module, text: nn.Module, margin: float = 1.0):
        super().__init__()
        self.image, self.text, self.margin = image, text, margin

    def embed_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def embed_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)

    def embed(self, batch: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both embeddings of a batch of pairs {"image", "text"} of classes `labels`, (B,); checked."""
        check_pairs(batch, labels)
        return self.embed_image(batch["image"]), self.embed_text(batch["text"])

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """`ranking` of dot products. beta, the weight of DMVAE's KLs, is for no other row."""
        image, text = self.embed(batch, labels)
        return Terms(others=ranking(image @ text.T, labels, self.margin))


class LSTMEmbedding(JointEmbedding):
    """A linear map of the image; the paper's text network (Sec. 5.2), BiLSTM and maximum over time, and a linear map.

    dim: of the embedding, and the LSTM's states in each direction.
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int, margin: float = 1.0):
        image = nn.Linear(image_dim, dim)
        super().__init__(image, nn.Sequential(TextFeatures(token_dim, dim), nn.Linear(2 * dim, dim)), margin)


def ranking(scores: Tensor, labels: Tensor, margin: float) -> dict[str, Tensor]:
    """Hinges on scores F (B, B) of image m and text n; pair m is F(m, m), its class labels[m]. The means over m and n
    of different classes, 0 for a batch of one class, of

        "image": max(0, margin + F(m, n) - F(m, m)),  captions compete for an image;
        "text":  max(0, margin + F(n, m) - F(m, m)),  images compete for a caption.
    """
    different = labels[:, None] != labels[None, :]

    def one_direction(scores: Tensor) -> Tensor:
        hinge = (margin + scores - scores.diagonal()[:, None]).relu()
        return (hinge * different).sum() / different.sum().clamp_min(1)

    return {"image": one_direction(scores), "text": one_direction(scores.T)}


def matching_terms(image: Tensor, text: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Eq. 4 of both directions, by name."""
    return dict(zip(("matching(image)", "matching(text)"), matching_loss(image, text, labels)))


class IdentityClassifier(nn.Module):
    """Norm-softmax: cross-entropy of the training classes from dot products with unit-length class vectors.

    classes: the labels that occur in training. features (B, d), labels (B,) -> its mean.
    """

    def __init__(self, classes: Sequence[int], dim: int):
        super().__init__()
        self.register_buffer("classes", sorted_classes(classes))
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(len(self.classes), dim)))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = features @ F.normalize(self.weight, dim=-1).T
        return F.cross_entropy(logits, class_index(self.classes, labels))


def check_pairs(batch: Batch, labels: Tensor) -> None:
    """Raises DMVAEError unless the batch holds "image" and "text" and there is one label per pair."""
    lengths = {name: len(batch[name]) for name in ("image", "text") if name in batch} | {"labels": len(labels)}
    if len(lengths) < 3 or len(set(lengths.values())) > 1:
        raise DMVAEError(f"batch of {lengths}; expected as many of each of 'image', 'text' and labels.")


def sorted_classes(classes: Sequence[int]) -> Tensor:
    """(C,) distinct labels in ascending order."""
    return torch.as_tensor(classes, dtype=torch.int64).unique()


def class_index(classes: Tensor, labels: Tensor) -> Tensor:
    """(B,) positions of `labels` among the sorted `classes`. Raises DMVAEError for labels that are not there."""
    index = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    if not torch.equal(classes[index], labels):
        unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
        raise DMVAEError(f"labels {unknown} are not among the {len(classes)} training classes the model was given.")
    return index


def feature_sizes(splits: Splits) -> tuple[int, int]:
    """Dimensions of an image's feature and of a token's embedding, for a row's `build`."""
    return splits.train.items["image"].shape[1], splits.train.items["text"].shape[2]


def sizes_and_classes(splits: Splits) -> tuple[int, int, list[int]]:
    """`feature_sizes` and the classes that occur in training."""
    assert splits.train.item_labels is not None
    return *feature_sizes(splits), splits.train.item_labels["image"].tolist()
