from dmvae_lib.models.base import Modality, MultimodalVAE, Posterior, Terms
from dmvae_lib.models.dmvae import DMVAE
from dmvae_lib.models.jmvae import JMVAE, TELBO
from dmvae_lib.models.matching import matching_loss
from dmvae_lib.models.mmvae import MMVAE
from dmvae_lib.models.mvae import MVAE

__all__ = ["DMVAE", "JMVAE", "MMVAE", "MVAE", "TELBO", "Modality", "MultimodalVAE", "Posterior", "Terms"]
__all__ += ["matching_loss"]
