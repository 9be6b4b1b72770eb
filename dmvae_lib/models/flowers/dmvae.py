"""Table 2, DMVAE: Eq. 3 on image and caption features with the matching loss, Eq. 4, in both directions (Sec. 5.2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Terms
from dmvae_lib.models.dmvae import DMVAE
from dmvae_lib.models.flowers.base import check_pairs
from dmvae_lib.models.matching import matching_loss
from dmvae_lib.networks import TextFeatures, feature_decoder, feature_encoder

CROSS_TERMS = ("image<-text", "text<-image")  # `without` them: the ablation of cross-reconstruction


class FlowerDMVAE(DMVAE):
    """DMVAE with the modalities "image", (B, image_dim), and "text", token embeddings (B, T, token_dim).

    The text decoder reconstructs the maximum over the LSTM's states. An item's embedding is the mean of its shared
    posterior q(z_s | x_i), which is also what Eq. 4 compares (the paper says "shared feature" in both places).

    weights: lambda_image and lambda_text of Eq. 3, Gaussian likelihoods of unit variance summed over the feature; the
        paper does not give them. matching: weight of Eq. 4; 0 leaves it out. evidence: False leaves Eq. 3 out, so that
        matching alone trains the encoders. without: terms of Eq. 3 to leave out, such as CROSS_TERMS.
    private_dims: of image and text; (0, 0) is the model without private spaces.
    """

    def __init__(
        self,
        image_dim: int,
        token_dim: int,
        shared_dim: int = 64,
        private_dims: tuple[int, int] = (3, 3),
        hidden: int = 512,
        decoder_hidden: int = 512,
        weights: tuple[float, float] = (1.0, 1.0),
        matching: float = 1.0,
        evidence: bool = True,
        without: Iterable[str] = (),
    ):
        if matching < 0 or not (matching or evidence):
            raise DMVAEError(
                f"FlowerDMVAE: matching={matching}, evidence={evidence}; expected a weight >= 0 and one of them."
            )

        def modality(dim: int, private_dim: int, weight: float, features: TextFeatures | None = None) -> Modality:
            encoder = feature_encoder(dim, private_dim, shared_dim)
            decoder = feature_decoder(dim, private_dim, shared_dim, decoder_hidden)
            return Modality(encoder, decoder, private_dim, weight, "gaussian", features)

        image = modality(image_dim, private_dims[0], weights[0])
        text = modality(2 * hidden, private_dims[1], weights[1], TextFeatures(token_dim, hidden))
        super().__init__({"image": image, "text": text}, shared_dim, without)
        self.matching, self.evidence = matching, evidence
        self.arguments |= {"image_dim": image_dim, "token_dim": token_dim, "hidden": hidden, "matching": matching}
        self.arguments |= {"private_dims": private_dims, "decoder_hidden": decoder_hidden, "weights": weights}
        self.arguments["evidence"] = evidence

    def embed_image(self, x: Tensor) -> Tensor:
        """(B, shared_dim), the mean of q(z_s | image)."""
        return self.infer({"image": x}).shared["image"].mean

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, shared_dim), the mean of q(z_s | text)."""
        return self.infer({"text": tokens}).shared["text"].mean

    def loss(  # type: ignore[override]  # Eq. 4 needs the classes
        self, batch: Batch, labels: Tensor, beta: float | Tensor = 1.0
    ) -> Terms:
        """Eq. 3's terms as `DMVAE.loss` names them, and, before their weight, "matching(image)", "matching(text)"."""
        check_pairs(batch, labels)
        posterior = self.infer_all(batch)
        terms = self.bounds(posterior, beta) if self.evidence else Terms(0)
        if not self.matching:
            return terms
        image, text = matching_loss(posterior.shared["image"].mean, posterior.shared["text"].mean, labels)
        parts = terms.parts | {"matching(image)": image, "matching(text)": text}
        return Terms(terms.total + self.matching * (image + text), parts)
