"""Table 2, CMPM+CMPC: cross-modal projection matching and classification (Zhang & Lu 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.models.flowers.base import IdentityClassifier, JointEmbedding, lstm_text
from dmvae_lib.models.matching import matching_loss


def project(x: Tensor, y: Tensor) -> Tensor:
    """The projection of each row of x on the direction of the same row of y, (B, d)."""
    unit = F.normalize(y, dim=-1)
    return (x * unit).sum(-1, keepdim=True) * unit


class CMPMCMPC(JointEmbedding):
    """The paper's text network (Sec. 5.2); Eq. 4 in both directions and norm-softmax classification of projections:
    the image's projection on its caption, and the caption's on its image, must name the class.

    classes: the labels that occur in training. Zhang & Lu train the image network too; here its feature is fixed.
    """

    def __init__(self, image_dim: int, token_dim: int, classes: Sequence[int], dim: int = 512, hidden: int = 512):
        super().__init__(nn.Linear(image_dim, dim), lstm_text(token_dim, dim, hidden))
        self.classifier = IdentityClassifier(classes, dim)

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """Terms "matching(image)", "matching(text)", "classification(image)", "classification(text)"."""
        image, text = self.embed(batch, labels)
        matching_image, matching_text = matching_loss(image, text, labels)
        parts = {
            "matching(image)": matching_image,
            "matching(text)": matching_text,
            "classification(image)": self.classifier(project(image, text), labels),
            "classification(text)": self.classifier(project(text, image), labels),
        }
        return Terms(sum(parts.values()), parts)
