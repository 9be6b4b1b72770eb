"""Table 2, Triplet: a bidirectional max-margin ranking loss on cosine (Li et al. 2017's baseline)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.models.flowers.base import JointEmbedding, lstm_text, ranking_loss


class Triplet(JointEmbedding):
    """The paper's text network (Sec. 5.2); hinges on cosine with `margin`, in both directions,

        max(0, margin + cos(v_m, t_n) - cos(v_m, t_m)),     max(0, margin + cos(v_n, t_m) - cos(v_m, t_m)),

    each averaged over all m and n of different classes in the batch.
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int = 512, hidden: int = 512, margin: float = 0.2):
        super().__init__(nn.Linear(image_dim, dim), lstm_text(token_dim, dim, hidden))
        self.margin = margin

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """Terms "image" (captions compete for an image) and "text" (images compete for a caption)."""
        image, text = (F.normalize(embedding, dim=-1) for embedding in self.embed(batch, labels))
        cosine = image @ text.T
        parts = {
            "image": ranking_loss(cosine, labels, self.margin),
            "text": ranking_loss(cosine.T, labels, self.margin),
        }
        return Terms(parts["image"] + parts["text"], parts)
