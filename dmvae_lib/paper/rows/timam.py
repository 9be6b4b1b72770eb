"""Table 2, TIMAM: identification, projection matching, adversarial modality discriminator (Sarafianos et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.models import Terms
from dmvae_lib.models.base import Batch
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.rows.joint_embedding import IdentityClassifier, LSTMEmbedding, matching_terms, sizes_and_classes


def reverse_gradient(x: Tensor) -> Tensor:
    """x itself, whose gradient changes sign on the way back."""
    return 2 * x.detach() - x


class TIMAM(LSTMEmbedding):
    """Norm-softmax classification of both embeddings with one set of class vectors; Eq. 4 in both directions; and
    `adversarial` times the cross-entropy of a discriminator that tells images from captions, which the discriminator
    minimises and the embeddings maximise.

    classes: the labels that occur in training. Sarafianos et al. train the image network and take turns between
    discriminator and embeddings; here the image feature is fixed and a reversed gradient does both in one step.
    """

    def __init__(self, image_dim: int, token_dim: int, classes: Sequence[int], dim: int, adversarial: float):
        super().__init__(image_dim, token_dim, dim)
        self.classifier = IdentityClassifier(classes, dim)
        self.discriminator = nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, 1))
        self.adversarial = adversarial

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        image, text = self.embed(batch, labels)
        identity = {"identity(image)": self.classifier(image, labels), "identity(text)": self.classifier(text, labels)}
        logits = self.discriminator(reverse_gradient(torch.cat([image, text])))[:, 0]
        is_image = torch.cat([torch.ones(len(image)), torch.zeros(len(text))]).to(logits)
        discriminator = self.adversarial * F.binary_cross_entropy_with_logits(logits, is_image)
        return Terms(others=identity | matching_terms(image, text, labels) | {"discriminator": discriminator})


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, adversarial: float) -> TIMAM:
    return TIMAM(*sizes_and_classes(splits), retrieval_hidden, adversarial)
