"""Table 2, Word CNN-RNN: a recurrent layer on temporal convolutions, averaged over time (Reed et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.models.flowers.base import JointEmbedding, joint_embedding_loss
from dmvae_lib.models.flowers.word_cnn import TemporalConvolutions


class RecurrentText(nn.Module):
    """Convolutions, a recurrent layer, the mean of its states over the tokens, a linear map: (B, T, D) -> (B, dim)."""

    def __init__(self, token_dim: int, dim: int, channels: int):
        super().__init__()
        self.convolutions = TemporalConvolutions(token_dim, channels)
        self.recurrent = nn.GRU(channels, channels, batch_first=True)
        self.head = nn.Linear(channels, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        states, mask = self.convolutions(tokens)
        states = self.recurrent(states)[0] * mask[..., None]  # it runs onwards only: padding comes too late to matter
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))


class WordCNNRNN(JointEmbedding):
    """As `WordCNN`, its simplifications included, with a recurrent layer before the average over time.

    The layer is a GRU, where Reed et al. use a plain recurrent network over a third of the time steps.
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int = 512, channels: int = 512):
        super().__init__(nn.Linear(image_dim, dim), RecurrentText(token_dim, dim, channels))

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """`joint_embedding_loss`."""
        return joint_embedding_loss(*self.embed(batch, labels), labels)
