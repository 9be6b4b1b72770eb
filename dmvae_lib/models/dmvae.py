"""DMVAE: private and shared latent spaces, a product of experts, every cross-reconstruction (Sec. 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, MultimodalVAE, Posterior, Terms

PARTS = ("log_likelihood", "kl_private", "kl_shared")


class DMVAE(MultimodalVAE):
    """Private-shared disentangled multimodal VAE for N >= 1 modalities.

    The objective, Eq. 3, is one evidence lower bound for every target i and source s of the shared code,

        x_i <- s:   lambda_i E[log p(x_i | z_pi, z_s)] - KL(q(z_pi | x_i) || p) - KL(q(z_s | s) || p),

    where s is "joint" (the product of all experts with the prior, Eq. 2), i itself, or any other modality.
    Each carries its own KLs; one sample of z_pi serves all reconstructions of x_i.

    without: bounds to leave out by name ("svhn<-mnist", "mnist<-joint", …), whole or one part of them
        ("svhn<-joint/log_likelihood"): this is how Table 3 is made.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, without: Iterable[str] = ()):
        super().__init__(modalities, shared_dim)
        self.without = frozenset(without)
        self.arguments["without"] = sorted(self.without)
        bounds = [f"{target}<-{source}" for target in self.names for source in ("joint", *self.names)]
        known = {*bounds, *(f"{bound}/{part}" for bound in bounds for part in PARTS)}
        if self.without - known:
            raise DMVAEError(
                f"DMVAE: unknown terms {sorted(self.without - known)}; expected names among {', '.join(bounds)}, "
                f"or one of their parts, as in {bounds[0]}/{PARTS[0]}."
            )

    def joint(self, experts: Iterable[DiagonalGaussian]) -> DiagonalGaussian:
        """Eq. 2 with the prior expert; a single observed modality out of several stands alone (end of Sec. 4.2)."""
        experts = list(experts)
        if len(experts) == 1 < len(self.names):
            return experts[0]
        return product_of_experts(experts, prior=True)

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """Eq. 3 (negated). Terms are named "target<-source/part" with part in log_likelihood, kl_private, kl_shared.

        Shared codes are sampled once per source, private codes once per target.
        """
        return self.bounds(self.infer_all(batch), beta)

    def bounds(self, posterior: Posterior, beta: float | Tensor = 1.0) -> Terms:
        """Eq. 3 (negated) from the posterior given every modality, as `loss`."""
        shared = {"joint": posterior.joint, **posterior.shared}
        codes = {source: q.rsample() for source, q in shared.items()}
        kl_shared = {source: q.kl().mean() for source, q in shared.items()}
        parts: dict[str, Tensor] = {}
        for target in self.names:
            private = posterior.private[target]
            kl_private = private.kl().mean()
            sources = [source for source in shared if self._keeps(f"{target}<-{source}", "log_likelihood")]
            if sources:  # all reconstructions of this target in one pass of its decoder
                params = self.decode(target, private.rsample(), torch.stack([codes[source] for source in sources]))
                log_likelihood = (
                    self.log_likelihood(target, params, posterior.targets[target]).mean(-1) * self.weights[target]
                )
                parts |= {f"{target}<-{s}/log_likelihood": value for s, value in zip(sources, log_likelihood)}
            for source in shared:
                bound = f"{target}<-{source}"
                if self._keeps(bound, "kl_private"):
                    parts[f"{bound}/kl_private"] = kl_private
                if self._keeps(bound, "kl_shared"):
                    parts[f"{bound}/kl_shared"] = kl_shared[source]
        total = sum(-v if name.endswith("log_likelihood") else beta * v for name, v in parts.items())
        return Terms(total, parts)

    def _keeps(self, bound: str, part: str) -> bool:
        return bound not in self.without and f"{bound}/{part}" not in self.without
