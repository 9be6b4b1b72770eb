"""The paper's measures (Sec. 5.1 and 5.2): pure functions of tensors, each a number in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmvae_lib.errors import DMVAEError


def _same_length(**tensors: Tensor) -> None:
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise DMVAEError(f"expected tensors of one length, at least 1; found {lengths}.")


def cross_coherence(predicted: Tensor, labels: Tensor) -> float:
    """The share of cross-generated items whose predicted class is that of the item they came from (Table 1).

    predicted: (..., B) classes that a classifier sees in the generated items; labels: (B,). Protocol: MMVAE's.
    """
    _same_length(predicted=predicted.movedim(-1, 0), labels=labels)
    return (predicted == labels).double().mean().item()


def chance(labels: Tensor) -> tuple[float, float]:
    """What guessing scores in cross-coherence on labels (B,): by the classes' frequencies, and always the commonest."""
    share = labels.bincount().double() / len(labels)
    return share.square().sum().item(), share.max().item()


def joint_coherence(*predicted: Tensor) -> float:
    """The share of jointly generated items on which the classifiers of all modalities agree (Table 1, "Joint").

    predicted: for each modality (B,) classes of the items made from the same shared codes.
    """
    if len(predicted) < 2:
        raise DMVAEError(f"joint coherence compares at least two modalities; found {len(predicted)}.")
    _same_length(**{f"predicted[{i}]": p for i, p in enumerate(predicted)})
    return torch.stack([p == predicted[0] for p in predicted[1:]]).all(0).double().mean().item()


def class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(classes (C,), mean feature of each (C, d))."""
    classes, position = labels.unique(return_inverse=True)
    one_hot = F.one_hot(position, len(classes)).to(features.dtype)
    return classes, (one_hot.T @ features) / one_hot.sum(0)[:, None]


def class_similarity(image: Tensor, text: Tensor, text_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(classes (C,), cosine (M, C) of each image with each class-averaged text feature); image (M, d), text (T, d)."""
    _same_length(text=text, text_labels=text_labels)
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        raise DMVAEError(
            f"image features {tuple(image.shape)}, text features {tuple(text.shape)}; expected (M, d) and (T, d)."
        )
    for name, features in (("image", image), ("text", text)):
        if not features.isfinite().all():
            raise DMVAEError(f"{name} features hold values that are not finite; look at the model that made them.")
    classes, means = class_means(text, text_labels)
    return classes, F.normalize(image, dim=-1) @ F.normalize(means, dim=-1).T


def recognised(similarity: Tensor, image_labels: Tensor, classes: Tensor) -> Tensor:
    """(M,) whether the class most similar to an image, (M, C), is its own; a tie goes to the smaller class id."""
    _same_length(similarity=similarity, image_labels=image_labels)
    return classes[similarity.argmax(1)] == image_labels


def precision_at_k(similarity: Tensor, image_labels: Tensor, classes: Tensor, k: int = 50) -> Tensor:
    """(C,) the share of the k images most similar to a class, (M, C), that belong to it; a tie goes to the first image.

    Raises DMVAEError if there are fewer than k images.
    """
    _same_length(similarity=similarity, image_labels=image_labels)
    if not 1 <= k <= len(similarity):
        raise DMVAEError(f"AP@k with k={k} needs at least k images; found {len(similarity)}.")
    nearest = similarity.argsort(dim=0, descending=True, stable=True)[:k]
    return (image_labels[nearest] == classes).double().mean(0)


def rank1(image: Tensor, image_labels: Tensor, text: Tensor, text_labels: Tensor) -> float:
    """Image-to-text recognition (Table 2, Rank-1; Reed et al.'s protocol).

    The share of images (M, d) whose nearest class-averaged text feature, by cosine, has the image's class;
    text (T, d). A tie goes to the smaller class id.
    """
    classes, similarity = class_similarity(image, text, text_labels)
    return recognised(similarity, image_labels, classes).double().mean().item()


def average_precision_at_k(
    text: Tensor, text_labels: Tensor, image: Tensor, image_labels: Tensor, k: int = 50
) -> float:
    """Text-to-image retrieval (Table 2, AP@50; Reed et al.'s protocol): precision at k, averaged over classes.

    For each class-averaged text feature the share of its k nearest images, by cosine, that belong to the class.
    Raises DMVAEError if there are fewer than k images.
    """
    classes, similarity = class_similarity(image, text, text_labels)
    return precision_at_k(similarity, image_labels, classes, k).mean().item()
