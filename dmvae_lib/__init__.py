"""DMVAE: private-shared disentangled multimodal VAE, the reproducible companion to Lee & Pavlovic's paper."""

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import DMVAE, JMVAE, MMVAE, MVAE, TELBO, Modality, matching_loss

__all__ = [
    "DMVAE",
    "JMVAE",
    "MMVAE",
    "MVAE",
    "TELBO",
    "DMVAEError",
    "DiagonalGaussian",
    "Modality",
    "matching_loss",
    "product_of_experts",
]
