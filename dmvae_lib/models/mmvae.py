"""MMVAE: a mixture of Laplace experts trained with the DReG estimator of the IWAE bound (Shi et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dmvae_lib.distributions import DiagonalGaussian, Laplace, Mixture
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Observed, SharedVAE, Terms, batch_mean


def laplace_scale(logits: Tensor) -> Tensor:
    """The softmax over the d dimensions times d: scales (..., d) whose mean is one, so none can collapse alone."""
    return logits.softmax(-1) * logits.shape[-1]


class MMVAE(SharedVAE):
    """Mixture-of-experts multimodal VAE with q(z | x_1..x_N) = 1/N sum_m q(z | x_m), all Laplace.

    The objective averages one importance-weighted bound per modality ("looser": the average is outside the log),

        1/N sum_m E_{z_1..z_K ~ q(z | x_m)} [log 1/K sum_k w(z_k)],
        log w(z) = sum_i lambda_i log p(x_i | z) + beta (log p(z) - log q(z | x_1..x_N)),

    and its gradient is DReG's (Tucker et al. 2019): with w~_k = w_k / sum_j w_j and the parameters of q held
    constant in log w, the decoders and the prior get sum_k w~_k d log w_k, the encoders, which log w_k sees
    through z_k alone, sum_k w~_k^2 (d log w_k / d z_k) (d z_k / d encoder). This is the paper's estimator. For the
    encoders it is unbiased with one modality or one particle; otherwise it counts the particles of each expert as
    drawn from the mixture, and is off the bound's gradient by a few percent on average (small linear cases).

    Of an item with the modalities O observed, N, m and i run over O. The mean is over all items of the batch.

    encoder(x) -> (B, 2 s): the mean, then the logits of the scale, laplace_scale(logits) + 1e-6.
    The prior is Laplace(0, laplace_scale(prior_logits)), learnt. particles: K, per modality.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, particles: int = 30):
        super().__init__(modalities, shared_dim)
        if particles < 1:
            raise DMVAEError(f"MMVAE: particles={particles}; expected at least 1.")
        self.particles = self.arguments["particles"] = particles
        self.prior_logits = nn.Parameter(self._like().new_zeros(shared_dim))

    def posteriors(self, name: str, statistics: Tensor) -> tuple[DiagonalGaussian, Laplace]:
        """The Laplace expert of one modality; no private part."""
        private, shared = super().posteriors(name, statistics)  # whose second half is here the scale's logits
        return private, Laplace(shared.mean, laplace_scale(shared.logvar) + 1e-6)

    def joint(self, experts: Sequence[Laplace], observed: Sequence[Tensor] | None = None) -> Laplace | Mixture:
        """The equal-weight mixture of the observed experts; one expert alone is its own mixture."""
        return experts[0] if len(experts) == 1 else Mixture(experts, observed)

    def prior_distribution(self) -> Laplace:
        """p(z), of shape (s,), learnt."""
        return Laplace(torch.zeros_like(self.prior_logits), laplace_scale(self.prior_logits))

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """total = -bound, with DReG's gradient. Log-likelihoods "name<-joint" and the KL "joint", the Monte Carlo
        log q - log p, are plain means over particles and modalities, without gradient: they make up an ELBO. The other
        term, "importance weighting", is what the bound is above it, negated, and carries the gradient."""
        posterior = self.infer_all(batch, observed)
        experts = list(posterior.experts.values())
        z = torch.stack([q.rsample(n=self.particles) for q in experts])  # (N, K, B, s)
        masks = None if posterior.masks is None else list(posterior.masks.values())
        counted = None if masks is None else torch.stack(masks)[:, None]  # of an item, the experts that it has
        log_likelihoods = {name: self.weighted(name, posterior, z, counted) for name in self.names}  # (N, K, B)
        constant = Mixture([Laplace(q.mean.detach(), q.scale.detach()) for q in experts], masks)
        kl = constant.log_prob(z) - self.prior_distribution().log_prob(z)
        log_w = sum(log_likelihoods.values()) - beta * kl
        if z.requires_grad:  # the gradient of logsumexp holds w~ once; z's gets it a second time
            weight = log_w.detach().softmax(1)[..., None]
            z.register_hook(lambda gradient: weight * gradient)
        sources = torch.ones_like(log_w[:, 0]) if masks is None else torch.stack(masks).to(log_w)  # (N, B)
        sources = sources / sources.sum(0)

        def mean(values: Tensor) -> Tensor:
            """(N, B) -> a scalar: over the observed experts of an item, then over the items."""
            return batch_mean((values * sources).sum(0))

        bound = mean(log_w.logsumexp(1) - math.log(self.particles))
        parts = {f"{name}<-joint": mean(value.detach().mean(1)) for name, value in log_likelihoods.items()}
        divergence = mean(kl.detach().mean(1))
        elbo = sum(parts.values()) - beta * divergence
        return Terms(parts, {"joint": divergence}, {"importance weighting": elbo - bound}, beta)
