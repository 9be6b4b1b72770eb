"""Table 2, Word CNN: temporal convolutions over word vectors (Reed et al. 2016)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.models.flowers.base import JointEmbedding, joint_embedding_loss
from dmvae_lib.networks import trim


class TemporalConvolutions(nn.Module):
    """Token embeddings (B, T, D) -> two convolutions of width 3 with ReLU: (B, L, channels) and the mask (B, L)."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        widths = [token_dim, channels, channels]
        self.layers = nn.ModuleList(nn.Conv1d(i, o, 3, padding=1) for i, o in pairwise(widths))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = trim(tokens)
        states = tokens.mT
        for layer in self.layers:  # states beyond a caption's end stay zero, so padding changes nothing
            states = layer(states).relu() * mask[:, None]
        return states.mT, mask


class ConvolutionalText(nn.Module):
    """Convolutions, the maximum over time, a linear map: (B, T, D) -> (B, dim)."""

    def __init__(self, token_dim: int, dim: int, channels: int):
        super().__init__()
        self.convolutions, self.head = TemporalConvolutions(token_dim, channels), nn.Linear(channels, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.convolutions(tokens)
        return self.head(states.amax(1))  # after ReLU no state is below the padding's zero


class WordCNN(JointEmbedding):
    """A convolutional text encoder, structured joint embedding.

    Reed et al. convolve one-hot words in three layers, pool over time by three after the second and flatten 30 words;
    here two layers read the token embeddings that every row gets, and the maximum over time replaces pooling and
    flattening, so that padding changes nothing. The image side is linear, as in every row (`Word2Vec`).
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int = 512, channels: int = 512):
        super().__init__(nn.Linear(image_dim, dim), ConvolutionalText(token_dim, dim, channels))

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """`joint_embedding_loss`."""
        return joint_embedding_loss(*self.embed(batch, labels), labels)
