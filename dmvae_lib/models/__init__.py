from dmvae_lib.models.base import Modality, MultimodalVAE, Posterior, Terms
from dmvae_lib.models.dmvae import DMVAE
from dmvae_lib.models.matching import matching_loss

__all__ = ["DMVAE", "Modality", "MultimodalVAE", "Posterior", "Terms", "matching_loss"]
