"""Table 2, Word CNN: temporal convolutions over word vectors (Reed et al. 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import trim
from dmvae_lib.paper.rows.joint_embedding import JointEmbedding, feature_sizes


class TemporalConvolutions(nn.Module):
    """Token embeddings (B, T, D) -> two convolutions of width 3 with ReLU: (B, L, channels) and the mask (B, L)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(size, channels, 3, padding=1) for size in (token_dim, channels))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = trim(tokens)
        states = tokens.mT
        for layer in self.layers:  # states beyond a caption's end stay zero, so padding changes nothing
            states = layer(states).relu() * mask[:, None]
        return states.mT, mask


class ConvolutionalText(nn.Module):
    """Convolutions of `dim` channels, the maximum over time, a linear map: (B, T, D) -> (B, dim)."""

    def __init__(self, token_dim: int, dim: int):
        super().__init__()
        self.convolutions, self.head = TemporalConvolutions(token_dim, dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.convolutions(tokens)[0].amax(1))  # after ReLU no state is below the padding's zero


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, margin: float) -> JointEmbedding:
    """Reed et al. convolve one-hot words in three layers, pool over time by three after the second and flatten 30 words;
    here two layers read the token embeddings that every row gets, and the maximum over time replaces pooling and
    flattening, so that padding changes nothing. The image side is linear, as in every row (`word2vec.build`).
    """
    (image_dim, token_dim), dim = feature_sizes(splits), retrieval_hidden
    return JointEmbedding(nn.Linear(image_dim, dim), ConvolutionalText(token_dim, dim), margin)
