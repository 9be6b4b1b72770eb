"""DMVAE: private-shared disentangled multimodal VAE, the reproducible companion to Lee & Pavlovic's paper."""

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, matching_loss
from dmvae_lib.pairing import PairedData, pair_by_class
from dmvae_lib.training import Schedule, train

__all__ = ["DMVAE", "JMVAE", "MMVAE", "MVAE", "TELBO", "DMVAEError", "DiagonalGaussian", "Modality", "PairedData"]
__all__ += ["Schedule", "matching_loss", "pair_by_class", "product_of_experts", "train"]
