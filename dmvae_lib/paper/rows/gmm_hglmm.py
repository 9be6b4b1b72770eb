"""Table 2, GMM+HGLMM: Fisher vectors of a caption's words under two mixtures, and CCA (Klein et al. 2015)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import trim
from dmvae_lib.paper.rows.joint_embedding import feature_sizes

PAIRS, WORDS = 5_000, 20_000  # at most, that mixtures and projections are fitted to


class HybridMixture(nn.Module):
    """p(x) = sum_k w_k prod_d f_kd(x_d), f_kd a Gaussian or, if `hybrid` and `laplacian[k, d]`, a Laplacian.

    weight: w, (K,); location, scale: (K, d), mean and standard deviation, or median and mean absolute deviation.
    Klein et al. define the hybrid by a weighted geometric mean of both densities and show that the weights are 0 or 1.
    """

    def __init__(self, components: int, dim: int, hybrid: bool):
        super().__init__()
        self.hybrid = hybrid
        self.register_buffer("weight", torch.full((components,), 1 / components))
        self.register_buffer("location", torch.zeros(components, dim))
        self.register_buffer("scale", torch.ones(components, dim))
        self.register_buffer("laplacian", torch.zeros(components, dim, dtype=torch.bool))

    def log_joint(self, x: Tensor) -> Tensor:
        """log w_k + log prod_d f_kd(x_d): (..., d) -> (..., K)."""
        by_component = []
        for location, scale, laplacian in zip(self.location, self.scale, self.laplacian):
            u = (x - location) / scale
            laplace, gauss = -u.abs() - math.log(2), -0.5 * u.square() - 0.5 * math.log(2 * math.pi)
            by_component.append((torch.where(laplacian, laplace, gauss) - scale.log()).sum(-1))
        return torch.stack(by_component, -1) + self.weight.log()

    def fit(self, x: Tensor, iterations: int = 20, seed: int = 0) -> list[float]:
        """EM on x, (n, d), from k-means; the mean log-likelihood before each iteration and after the last."""
        from sklearn.cluster import KMeans

        if len(x) < len(self.weight):
            raise DMVAEError(f"a mixture of {len(self.weight)} components needs as many words; found {len(x)}.")
        clusters = KMeans(len(self.weight), n_init=1, random_state=seed).fit_predict(x.cpu().numpy())
        order = x.argsort(0)
        self.maximise(x, F.one_hot(torch.as_tensor(clusters).long(), len(self.weight)).to(x), order)
        history = []
        for _ in range(iterations):
            log_joint = self.log_joint(x)
            history.append(log_joint.logsumexp(-1).mean().item())
            self.maximise(x, log_joint.softmax(-1), order)
        return [*history, self.log_joint(x).logsumexp(-1).mean().item()]

    def maximise(self, x: Tensor, responsibility: Tensor, order: Tensor) -> None:
        """The M-step for responsibilities (n, K): both densities' best parameters in every (k, d), then the better one.

        order: x.argsort(0), for the weighted medians.
        """
        floor = 1e-3 * x.std(0) + 1e-8  # no density may shrink on a single point
        self.weight.copy_((responsibility.mean(0) + 1e-10) / (1 + 1e-10 * len(self.weight)))
        for k, share in enumerate(responsibility.T):
            share = share / share.sum().clamp_min(1e-10)
            mean = share @ x
            deviation = (share @ (x - mean).square()).sqrt().maximum(floor)
            self.location[k], self.scale[k] = mean, deviation
            if not self.hybrid:
                continue
            below = (share[order].cumsum(0) < 0.5).sum(0, keepdim=True).clamp_max(len(x) - 1)
            median = x.gather(0, order.gather(0, below))[0]
            spread = (share @ (x - median).abs()).maximum(floor)
            # minus the mean log-density at these parameters: log(2 s) + 1, and log(sigma) + log(2 pi e) / 2
            self.laplacian[k] = (2 * spread).log() + 1 < deviation.log() + 0.5 * math.log(2 * math.pi * math.e)
            self.location[k] = torch.where(self.laplacian[k], median, mean)
            self.scale[k] = torch.where(self.laplacian[k], spread, deviation)

    def fisher_vectors(self, x: Tensor, mask: Tensor) -> Tensor:
        """The gradient of a caption's mean log-likelihood by location and scale, each divided by the square root of
        its Fisher information (taking components as known): words (B, T, d) and mask (B, T) -> (B, 2 * K * d).
        """
        share = self.log_joint(x).softmax(-1) * (mask / mask.sum(1, keepdim=True))[..., None]
        vectors = []
        for k, (location, scale, laplacian) in enumerate(zip(self.location, self.scale, self.laplacian)):
            u = (x - location) / scale
            by_location = torch.where(laplacian, u.sign(), u)
            by_scale = torch.where(laplacian, u.abs() - 1, (u.square() - 1) / math.sqrt(2))
            scores = torch.cat([by_location, by_scale], -1)
            vectors.append(torch.einsum("bt,btd->bd", share[..., k], scores) / self.weight[k].sqrt())
        return torch.cat(vectors, -1)


class GMMHGLMM(nn.Module):
    """Fisher vectors under a Gaussian mixture and a hybrid Gaussian-Laplacian mixture, PCA, CCA with the image.

    Nothing is trained by gradients: `fit` replaces the loss. Words go through PCA to `word_dim`; both Fisher vectors,
    concatenated, take signed square roots and unit length; PCA whitens them and the images to `text_dim` and
    `image_dim_reduced` dimensions, after which the canonical directions are the singular vectors of their covariance.

    Klein et al. use ICA on word2vec vectors where this uses PCA on the token embeddings that every row gets; mixtures
    and projections are fitted to a random part of the training pairs, PAIRS and WORDS of theirs.
    """

    def __init__(
        self,
        image_dim: int,
        token_dim: int,
        dim: int = 64,
        components: int = 30,
        word_dim: int = 64,
        text_dim: int = 256,
        image_dim_reduced: int = 256,
        iterations: int = 20,
    ):
        super().__init__()
        self.iterations, self.text_dim, self.image_dim_reduced = iterations, text_dim, image_dim_reduced
        self.gmm = HybridMixture(components, word_dim, hybrid=False)
        self.hglmm = HybridMixture(components, word_dim, hybrid=True)
        sizes = {"word": (token_dim, word_dim), "text": (4 * components * word_dim, dim), "image": (image_dim, dim)}
        for name, (size, reduced) in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_axes", torch.zeros(size, reduced))

    def embed_image(self, x: Tensor) -> Tensor:
        """(B, dim) canonical variates of image features (B, image_dim)."""
        return (x - self.image_mean) @ self.image_axes

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, dim) canonical variates of captions, token embeddings (B, T, token_dim)."""
        return (self.fisher_vectors(tokens) - self.text_mean) @ self.text_axes

    def fisher_vectors(self, tokens: Tensor) -> Tensor:
        """(B, 4 * components * word_dim), both mixtures', with signed square roots and unit length."""
        tokens, mask = trim(tokens)
        words = (tokens - self.word_mean) @ self.word_axes
        vectors = torch.cat([mixture.fisher_vectors(words, mask) for mixture in (self.gmm, self.hglmm)], -1)
        return F.normalize(vectors.sign() * vectors.abs().sqrt(), dim=-1)

    @torch.no_grad()
    def fit(self, data: PairedData, seed: int = 0) -> dict[str, list[float]]:
        """Fits everything to pairs of `data`; the mean log-likelihood of a word over EM's iterations, by mixture.

        Raises DMVAEError if there are fewer pairs or words than a projection has dimensions.
        """
        generator = torch.Generator().manual_seed(seed)
        batch = data.batch(torch.randperm(len(data), generator=generator)[:PAIRS])
        image, (tokens, mask) = batch["image"].to(self.word_mean), trim(batch["text"].to(self.word_mean))
        words = tokens[mask]
        words = words[torch.randperm(len(words), generator=generator)[:WORDS].to(words.device)]
        self.word_mean[:], self.word_axes[:] = principal_axes(words, self.word_axes.shape[1], whiten=False)
        words = (words - self.word_mean) @ self.word_axes
        mixtures = {"gmm": self.gmm, "hglmm": self.hglmm}
        history = {name: mixture.fit(words, self.iterations, seed) for name, mixture in mixtures.items()}
        text = torch.cat([self.fisher_vectors(part) for part in tokens.split(256)])
        self.image_mean[:], image_axes = principal_axes(image, self.image_dim_reduced)
        self.text_mean[:], text_axes = principal_axes(text, self.text_dim)
        covariance = ((image - self.image_mean) @ image_axes).T @ ((text - self.text_mean) @ text_axes) / len(text)
        left, _, right = torch.linalg.svd(covariance)
        dim = self.image_axes.shape[1]
        self.image_axes[:], self.text_axes[:] = image_axes @ left[:, :dim], text_axes @ right[:dim].T
        return history


def principal_axes(x: Tensor, dim: int, whiten: bool = True) -> tuple[Tensor, Tensor]:
    """(mean (D,), axes (D, dim)) of x, (n, D): (x - mean) @ axes are its principal components, `whiten`: of variance 1."""
    from sklearn.decomposition import PCA

    if dim > min(x.shape):
        raise DMVAEError(f"PCA to {dim} dimensions from {len(x)} items of {x.shape[1]}; expected no fewer of both.")
    fitted = PCA(dim, random_state=0).fit(x.cpu().numpy())
    axes = fitted.components_.T / (fitted.explained_variance_**0.5 if whiten else 1)
    return torch.as_tensor(fitted.mean_).to(x), torch.as_tensor(axes).to(x)


def build(data: DataSet, splits: Splits) -> GMMHGLMM:
    """`GMMHGLMM` for the data's features, of the sizes that its defaults say for every profile."""
    return GMMHGLMM(*feature_sizes(splits))
