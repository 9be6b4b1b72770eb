"""Table 2, Word2Vec: the mean word vector of a caption, mapped to the image's space (Reed et al. 2016's baseline)."""

from __future__ import annotations

from torch import Tensor, nn

from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import trim
from dmvae_lib.paper.rows.joint_embedding import JointEmbedding, feature_sizes


class MeanWord(nn.Module):
    """Token embeddings (B, T, D), zero after the last token -> their mean over the tokens, (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = trim(tokens)
        return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def build(data: DataSet, splits: Splits, *, retrieval_hidden: int, margin: float) -> JointEmbedding:
    """Linear maps of the image feature and of the mean of the token embeddings that every row gets, not word2vec's.

    Reed et al. leave the image feature as it is; here, as in every row, a linear map brings it to `retrieval_hidden`
    dimensions, so that rows differ in text encoder and loss.
    """
    (image_dim, token_dim), dim = feature_sizes(splits), retrieval_hidden
    return JointEmbedding(nn.Linear(image_dim, dim), nn.Sequential(MeanWord(), nn.Linear(token_dim, dim)), margin)
