"""Eq. 4: the class-aware matching loss between the two modalities' shared features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dmvae_lib.errors import DMVAEError


def matching_loss(image: Tensor, text: Tensor, labels: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """(L_M^I, L_M^T) of Eq. 4 for a batch of pairs: image and text (B, d), labels (B,).

    L_M^I is the mean over images of sum_n p log(p / (q + eps)), where p is the softmax of the image feature's
    projections on the unit-normalised text features, and q is uniform over the texts of the image's class;
    L_M^T is the same with the roles swapped. (Zhang & Lu 2018 call it cross-modal projection matching.)
    """
    if image.shape != text.shape or len(labels) != len(image):
        raise DMVAEError(
            f"matching_loss: image {tuple(image.shape)}, text {tuple(text.shape)}, labels {tuple(labels.shape)}; "
            "expected (B, d), (B, d), (B,)."
        )
    same = (labels[:, None] == labels[None, :]).to(image.dtype)
    target = (same / same.sum(1, keepdim=True) + eps).log()

    def one_direction(query: Tensor, reference: Tensor) -> Tensor:
        log_p = (query @ F.normalize(reference, dim=-1).T).log_softmax(1)
        return (log_p.exp() * (log_p - target)).sum(1).mean()

    return one_direction(image, text), one_direction(text, image)
