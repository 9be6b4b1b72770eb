"""Table 2, Triplet: a bidirectional max-margin ranking loss on cosine (Li et al. 2017's baseline)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dmvae_lib.models import Terms
from dmvae_lib.models.base import Batch
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.rows.joint_embedding import LSTMEmbedding, feature_sizes, ranking


class Triplet(LSTMEmbedding):
    """`ranking` of cosines, with a margin, over all pairs of a batch."""

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """Terms "image" and "text", as `ranking`."""
        image, text = (F.normalize(embedding, dim=-1) for embedding in self.embed(batch, labels))
        return Terms(others=ranking(image @ text.T, labels, self.margin))


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, margin: float) -> Triplet:
    return Triplet(*feature_sizes(splits), retrieval_hidden, margin)
