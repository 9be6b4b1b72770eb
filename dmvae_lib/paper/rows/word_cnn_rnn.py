"""Table 2, Word CNN-RNN: a recurrent layer on temporal convolutions, averaged over time (Reed et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.rows.joint_embedding import JointEmbedding, feature_sizes
from dmvae_lib.paper.rows.word_cnn import TemporalConvolutions


class RecurrentText(nn.Module):
    """Convolutions of `dim` channels, a recurrent layer, the mean of its states over the tokens, a linear map:
    (B, T, D) -> (B, dim).
    """

    def __init__(self, token_dim: int, dim: int):
        super().__init__()
        self.convolutions = TemporalConvolutions(token_dim, dim)
        self.recurrent = nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        states, mask = self.convolutions(tokens)
        states = self.recurrent(states)[0] * mask[..., None]  # it runs onwards only: padding comes too late to matter
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, margin: float) -> JointEmbedding:
    """As `word_cnn.build`, its simplifications included, with a GRU before the average over time, where Reed et al. use a
    plain recurrent network over a third of the time steps.
    """
    (image_dim, token_dim), dim = feature_sizes(splits), retrieval_hidden
    return JointEmbedding(nn.Linear(image_dim, dim), RecurrentText(token_dim, dim), margin)
