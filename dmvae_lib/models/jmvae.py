"""Models with an inference network for all modalities together: JMVAE-kl (Suzuki et al. 2016) and JVAE's triple ELBO
(Vedantam et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.func import functional_call

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Observed, Posterior, SharedVAE, Terms, batch_mean


class JointNetworkVAE(SharedVAE):
    """Inference with a network of its own for all modalities together: what JMVAE and TELBO have in common.

    joint_encoder({name: x} of all modalities) -> (B, 2 * shared_dim): the mean and log-variance of q(z | x_1..x_N).

    All modalities observed: q(z | x_1..x_N) from the joint network. One of several: its own q(z | x_i). Two or more
    but not all (N > 2, where neither paper has a network): the product of their q(z | x_i) with the prior expert.
    The objectives need every item whole.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, joint_encoder: nn.Module):
        super().__init__(modalities, shared_dim)
        self.joint_encoder = joint_encoder

    def joint(self, experts: Sequence[DiagonalGaussian], observed: Sequence[Tensor] | None = None) -> DiagonalGaussian:
        """The posterior given some of the modalities."""
        return experts[0] if len(experts) == 1 else product_of_experts(experts, prior=True)

    def infer(self, batch: Batch, observed: Observed | None = None) -> Posterior:
        """As for every model; with all modalities in the batch, `joint` is the joint network's. Raises DMVAEError for
        items of which a part is missing: leave the modality out of the batch instead."""
        if observed and not all(mask.all() for mask in observed.values()):
            raise DMVAEError(
                f"{type(self).__name__}: its joint network needs every modality of an item; take the complete items, "
                "or a model with an expert for each modality (DMVAE, MVAE, MMVAE)."
            )
        posterior = super().infer(batch)  # its checks come first
        if len(batch) < len(self.names):
            return posterior
        statistics = self.joint_encoder({name: batch[name] for name in self.names})
        expected = (len(posterior.joint.mean), 2 * self.shared_dim)
        if tuple(statistics.shape) != expected:
            found = f"joint encoder returned shape {tuple(statistics.shape)}, expected {expected}"
            raise DMVAEError(f"{found}: mean and log-variance ({self.shared_dim} each).")
        return posterior._replace(joint=DiagonalGaussian(*statistics.to(self._like().dtype).chunk(2, -1)))


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

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """The objective, negated. Log-likelihoods "name<-joint", the KL "joint", and "alpha kl(joint||name)"."""
        posterior = self.infer_all(batch, observed)
        bound = self.elbo("joint", posterior.joint, posterior, self.names)
        divergences = {
            f"alpha kl(joint||{name})": self.alpha * batch_mean(posterior.joint.kl(q))
            for name, q in posterior.shared.items()
        }
        return Terms(*bound, divergences, beta)


class TELBO(JointNetworkVAE):
    """JVAE with the triple ELBO (triple for two modalities, N + 1 bounds in general): the objective is

        E_{q(z | x)}[sum_i lambda_i log p(x_i | z)] - beta KL(q(z | x) || p)
        + sum_i ( E_{q(z | x_i)}[gamma_i log p(x_i | z)] - beta KL(q(z | x_i) || p) ),      x = x_1..x_N.

    The decoders learn from the first bound alone. The paper trains in two stages, and the second fits the unimodal
    networks to decoders that stay fixed; here both are taken in one step, the decoders' parameters being constants
    in the unimodal bounds. That is exact for the first stage, and the second follows the decoders as they move.

    unimodal_weights: gamma_i by name; each lambda_i (Modality.weight) where not given.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        shared_dim: int,
        joint_encoder: nn.Module,
        unimodal_weights: Mapping[str, float] | None = None,
    ):
        super().__init__(modalities, shared_dim, joint_encoder)
        self.unimodal_weights = self.weights | dict(unimodal_weights or {})
        self.arguments["unimodal_weights"] = self.unimodal_weights
        if set(self.unimodal_weights) != set(self.names) or min(self.unimodal_weights.values()) < 0:
            expected = f"weights >= 0 for {', '.join(self.names)}"
            raise DMVAEError(f"TELBO: unimodal_weights={unimodal_weights}; expected {expected}.")

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """The objective, negated. Log-likelihoods "name<-joint" and "name<-name", KLs "joint" and "name"."""
        posterior = self.infer_all(batch, observed)
        terms = Terms(*self.elbo("joint", posterior.joint, posterior, self.names), beta=beta)
        for name, q in posterior.shared.items():
            fixed = {key: value.detach() for key, value in self.decoders[name].named_parameters()}
            code = q.rsample()
            params = functional_call(self.decoders[name], fixed, code).to(code.dtype)
            log_likelihood = self.log_prob(name, params, posterior.targets[name])
            terms.log_likelihoods[f"{name}<-{name}"] = self.unimodal_weights[name] * batch_mean(log_likelihood)
            terms.kls[name] = batch_mean(q.kl())
        return terms
