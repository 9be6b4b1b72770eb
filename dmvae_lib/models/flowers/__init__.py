"""The rows of Table 2: one file each, with its text encoder and its loss; training and evaluation are shared.

Every row is an nn.Module with `embed_image` and `embed_text`, into one space compared by cosine, and `loss(batch,
labels, beta)` for a batch {"image", "text"} of pairs; GMM+HGLMM has `fit(data)` in its place. A row with `match` has a
second stage that judges pairs (IATV). `dmvae_lib.retrieval` evaluates them all.
"""

from torch import Tensor, nn

from dmvae_lib.models.base import Terms
from dmvae_lib.models.flowers.cmpm_cmpc import CMPMCMPC
from dmvae_lib.models.flowers.dmvae import CROSS_TERMS, FlowerDMVAE
from dmvae_lib.models.flowers.gmm_hglmm import GMMHGLMM
from dmvae_lib.models.flowers.iatv import IATV
from dmvae_lib.models.flowers.timam import TIMAM
from dmvae_lib.models.flowers.triplet import Triplet
from dmvae_lib.models.flowers.word2vec import Word2Vec
from dmvae_lib.models.flowers.word_cnn import WordCNN
from dmvae_lib.models.flowers.word_cnn_rnn import WordCNNRNN


def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, beta: float) -> Terms:
    """For `dmvae_lib.training.train`: the row's own loss, which sees the classes."""
    return model.loss(batch, labels, beta)


__all__ = [
    "CMPMCMPC",
    "CROSS_TERMS",
    "GMMHGLMM",
    "IATV",
    "TIMAM",
    "FlowerDMVAE",
    "Triplet",
    "Word2Vec",
    "WordCNN",
    "WordCNNRNN",
    "objective",
]
