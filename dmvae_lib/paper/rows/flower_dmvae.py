"""Table 2, DMVAE: Eq. 3 on image and caption features with the matching loss, Eq. 4, in both directions (Sec. 5.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import DMVAE, Modality, Terms
from dmvae_lib.models.base import Batch, Observed
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import TextFeatures, feature_decoder, feature_encoder
from dmvae_lib.paper.rows.joint_embedding import check_pairs, feature_sizes, matching_terms

CROSS_TERMS = ("image<-text", "text<-image")  # `without` them: the ablation of cross-reconstruction
SHARED_DIM, PRIVATE_DIMS = 64, {"image": 3, "text": 3}  # Sec. 5.2


class FlowerDMVAE(DMVAE):
    """DMVAE with the modalities "image", (B, image_dim), and "text", token embeddings (B, T, token_dim).

    The text decoder reconstructs the maximum over the LSTM's states. An item's embedding is the mean of its shared
    posterior q(z_s | x_i), which is also what Eq. 4 compares (the paper says "shared feature" in both places).

    hidden: the LSTM's states in each direction, and the decoders' units. weights: lambda_image and lambda_text of Eq. 3,
        Gaussian likelihoods of unit variance summed over the feature. matching: weight of Eq. 4; 0 leaves it out.
        evidence: False leaves Eq. 3 out, so that matching alone trains the encoders. without: terms of Eq. 3 to leave
        out, such as CROSS_TERMS. private_dims: of image and text; zeros for both are the model without private spaces.
        shared_dim: of the space that both embed into.
    """

    def __init__(
        self,
        image_dim: int,
        token_dim: int,
        hidden: int,
        weights: Mapping[str, float],
        matching: float = 1.0,
        evidence: bool = True,
        private_dims: Mapping[str, int] = PRIVATE_DIMS,
        without: Iterable[str] = (),
        shared_dim: int = SHARED_DIM,
    ):
        if matching < 0 or not (matching or evidence):
            raise DMVAEError(f"FlowerDMVAE: {matching=}, {evidence=}; expected a weight >= 0 and one of them.")

        def modality(name: str, dim: int, features: TextFeatures | None = None) -> Modality:
            sizes = dim, private_dims[name], shared_dim
            made = feature_encoder(*sizes), feature_decoder(*sizes, hidden)
            return Modality(*made, private_dims[name], weights[name], "gaussian", features)

        image = modality("image", image_dim)
        text = modality("text", 2 * hidden, TextFeatures(token_dim, hidden))
        super().__init__({"image": image, "text": text}, shared_dim, without)
        self.matching, self.evidence = matching, evidence
        self.arguments |= {"image_dim": image_dim, "token_dim": token_dim, "hidden": hidden, "matching": matching}
        self.arguments |= {"private_dims": dict(private_dims), "weights": dict(weights), "evidence": evidence}

    def embed_image(self, x: Tensor) -> Tensor:
        """(B, shared_dim), the mean of q(z_s | image)."""
        return self.infer({"image": x}).shared["image"].mean

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, shared_dim), the mean of q(z_s | text)."""
        return self.infer({"text": tokens}).shared["text"].mean

    def loss(  # type: ignore[override]  # Eq. 4 needs the classes
        self, batch: Batch, labels: Tensor, observed: Observed | None = None, beta: float | Tensor = 1.0
    ) -> Terms:
        """Eq. 3's terms as `DMVAE.loss` names them and, with its weight, Eq. 4's "matching(image)", "matching(text)".

        observed: as for `DMVAE.loss`; Eq. 4 compares the pairs of which both items are there.
        """
        check_pairs(batch, labels)
        posterior = self.infer_all(batch, observed)
        terms = self.bounds(posterior, beta) if self.evidence else Terms(beta=beta)
        if not self.matching:
            return terms
        whole = posterior.present("image", "text")
        rows = slice(None) if whole is None else whole
        image, text = (posterior.shared[name].mean[rows] for name in ("image", "text"))
        found = matching_terms(image, text, labels[rows])
        return replace(terms, others={name: self.matching * value for name, value in found.items()})


def build(
    data: DataSet,
    splits: Splits,
    *,
    retrieval_hidden: int,
    matching: float,
    weights: Mapping[str, float],
    evidence: bool = True,
    private_dims: Mapping[str, int] = PRIVATE_DIMS,
    without: Iterable[str] = (),
) -> FlowerDMVAE:
    """`FlowerDMVAE` for the data's features, `retrieval_hidden` its `hidden`."""
    return FlowerDMVAE(*feature_sizes(splits), retrieval_hidden, weights, matching, evidence, private_dims, without)
