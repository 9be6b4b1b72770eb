"""Table 2, Word2Vec: the mean word vector of a caption, mapped to the image's space (Reed et al. 2016's baseline)."""

from __future__ import annotations

from torch import Tensor, nn

from dmvae_lib.models.base import Batch, Terms
from dmvae_lib.models.flowers.base import JointEmbedding, joint_embedding_loss
from dmvae_lib.networks import trim


class MeanWord(nn.Module):
    """Token embeddings (B, T, D), zero after the last token -> their mean over the tokens, (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = trim(tokens)
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Word2Vec(JointEmbedding):
    """Linear maps of the image feature and of the mean word vector, structured joint embedding.

    The word vectors are the token embeddings that every row gets, not word2vec's. Reed et al. leave the image feature
    as it is; here, as in every row, a linear map brings it to `dim`, so that rows differ in text encoder and loss.
    """

    def __init__(self, image_dim: int, token_dim: int, dim: int = 512):
        super().__init__(nn.Linear(image_dim, dim), nn.Sequential(MeanWord(), nn.Linear(token_dim, dim)))

    def loss(self, batch: Batch, labels: Tensor, beta: float = 1.0) -> Terms:
        """`joint_embedding_loss`."""
        return joint_embedding_loss(*self.embed(batch, labels), labels)
