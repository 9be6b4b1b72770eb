"""Table 2, CMPM+CMPC: cross-modal projection matching and classification (Zhang & Lu 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.models import Terms
from dmvae_lib.models.base import Batch
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.rows.joint_embedding import IdentityClassifier, LSTMEmbedding, matching_terms, sizes_and_classes


def project(x: Tensor, y: Tensor) -> Tensor:
    """The projection of each row of x on the direction of the same row of y, (B, d)."""
    unit = F.normalize(y, dim=-1)
    return (x * unit).sum(-1, keepdim=True) * unit


class CMPMCMPC(LSTMEmbedding):
    """Eq. 4 in both directions and, `classification` times, norm-softmax classification of projections: the image's
    projection on its caption, and the caption's on its image, must name the class.

    Both embeddings are batch-normalised, as in the authors' release (github.com/YingZhangDUT/
    Cross-Modal-Projection-Learning: its joint layers take MobileNet's argument scope, batch normalisation included).
    It gives the embeddings their length, which is the only temperature of these softmaxes: without it, on a part of
    Oxford-102, images came out five times as long as captions after 50 updates.

    classes: the labels that occur in training. Zhang & Lu train the image network too; here its feature is fixed.
    """

    def __init__(self, image_dim: int, token_dim: int, classes: Sequence[int], dim: int, classification: float):
        super().__init__(image_dim, token_dim, dim)
        self.image = nn.Sequential(self.image, nn.BatchNorm1d(dim))
        self.text.append(nn.BatchNorm1d(dim))
        self.classifier, self.classification = IdentityClassifier(classes, dim), classification

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        image, text = self.embed(batch, labels)
        classification = {
            "classification(image)": self.classification * self.classifier(project(image, text), labels),
            "classification(text)": self.classification * self.classifier(project(text, image), labels),
        }
        return Terms(others=matching_terms(image, text, labels) | classification)


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, classification: float) -> CMPMCMPC:
    return CMPMCMPC(*sizes_and_classes(splits), retrieval_hidden, classification)
