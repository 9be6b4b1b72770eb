"""JMVAE-kl: a joint inference network that unimodal networks learn to agree with (Suzuki et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Posterior, SharedVAE, Terms


class JointNetworkVAE(SharedVAE):
    """Inference with a network of its own for all modalities together: what JMVAE and TELBO have in common.

    joint_encoder({name: x} of all modalities) -> (B, 2 * shared_dim): the mean and log-variance of q(z | x_1..x_N);
        `dmvae_lib.networks.JointEncoder` is one.

    All modalities observed: q(z | x_1..x_N) from the joint network. One of several: its own q(z | x_i). Two or more
    but not all (N > 2, where neither paper has a network): the product of their q(z | x_i) with the prior expert.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, joint_encoder: nn.Module):
        super().__init__(modalities, shared_dim)
        self.joint_encoder = joint_encoder

    def joint(self, experts: Iterable[DiagonalGaussian]) -> DiagonalGaussian:
        """The posterior given some of the modalities."""
        experts = list(experts)
        return experts[0] if len(experts) == 1 else product_of_experts(experts, prior=True)

    def infer(self, batch: Batch) -> Posterior:
        """As for every model; with all modalities observed, `joint` is the joint network's."""
        posterior = super().infer(batch)  # its checks come first
        if len(batch) < len(self.names):
            return posterior
        statistics = self.joint_encoder({name: batch[name] for name in self.names})
        expected = (*posterior.joint.mean.shape[:-1], 2 * self.shared_dim)
        if tuple(statistics.shape) != expected:
            raise DMVAEError(
                f"joint encoder returned shape {tuple(statistics.shape)}, expected {expected}: mean and log-variance "
                f"({self.shared_dim} each)."
            )
        return posterior._replace(joint=DiagonalGaussian(*statistics.chunk(2, -1)))


class JMVAE(JointNetworkVAE):
    """Joint multimodal VAE, JMVAE-kl: the objective, for N modalities, is

        E_{q(z | x)}[sum_i lambda_i log p(x_i | z)] - beta KL(q(z | x) || p) - alpha sum_i KL(q(z | x) || q(z | x_i)),

    with x = x_1..x_N. alpha = 0.1 is the paper's. beta (warm-up) weighs the KL to the prior alone.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], shared_dim: int, joint_encoder: nn.Module, alpha: float = 0.1
    ):
        super().__init__(modalities, shared_dim, joint_encoder)
        if alpha < 0:
            raise DMVAEError(f"JMVAE: alpha={alpha}; it weighs a divergence and may not be negative.")
        self.alpha = self.arguments["alpha"] = alpha

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """The objective, negated. Terms: "elbo(joint)/log_likelihood(name)", "elbo(joint)/kl", and, before alpha,
        "kl(joint||name)"."""
        posterior = self.infer_all(batch)
        elbo = self.elbo("elbo(joint)", posterior.joint, posterior.targets)
        divergences = {f"kl(joint||{name})": posterior.joint.kl(q).mean() for name, q in posterior.shared.items()}
        total = self.negative(elbo, beta) + self.alpha * sum(divergences.values())
        return Terms(total, elbo | divergences)
