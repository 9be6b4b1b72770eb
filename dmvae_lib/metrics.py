"""The paper's measures (Sec. 5.1 and 5.2), shares in [0, 1], and the Fréchet distance of two sets of features."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import combinations
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import MultimodalVAE
from dmvae_lib.pairing import PairedData


def _same_length(**tensors: Tensor) -> None:
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise DMVAEError(f"expected tensors of one length, at least 1; found {lengths}.")


def cross_coherence(predicted: Tensor, labels: Tensor) -> float:
    """The share of cross-generated items whose predicted class is that of the item they came from (Table 1).
    predicted: (..., B) classes that a classifier sees in the generated items; labels: (B,). Protocol: MMVAE's."""
    _same_length(predicted=predicted.movedim(-1, 0), labels=labels)
    return (predicted == labels).double().mean().item()


def chance(labels: Tensor) -> tuple[float, float]:
    """What guessing scores in cross-coherence on labels (B,): by the classes' frequencies, and always the commonest."""
    share = labels.bincount().double() / len(labels)
    return share.square().sum().item(), share.max().item()


def joint_coherence(*predicted: Tensor) -> float:
    """The share of jointly generated items on which the classifiers of all modalities agree (Table 1, "Joint").
    predicted: for each modality (B,) classes of the items made from the same shared codes."""
    if len(predicted) < 2:
        raise DMVAEError(f"joint coherence compares at least two modalities; found {len(predicted)}.")
    _same_length(**{f"predicted[{i}]": p for i, p in enumerate(predicted)})
    return torch.stack([p == predicted[0] for p in predicted[1:]]).all(0).double().mean().item()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """(B,) the classes that a classifier, (B, ...) -> (B, C) logits, sees in images; a tie goes to the smaller class."""
    return model(images).argmax(-1)


def _on_device(
    measure: str, model: MultimodalVAE, data: PairedData, classifiers: Mapping[str, nn.Module], seed: int
) -> tuple[PairedData, Tensor, torch.Generator]:
    """Data, labels and a generator of the seed, where the model is. Raises DMVAEError if labels or classifiers lack."""
    lacking, labels = [name for name in model.names if name not in classifiers], data.labels
    if lacking or labels is None:
        what = f"classifiers of {', '.join(lacking)}" if lacking else "labels (PairedData.aligned(items, labels=...))"
        raise DMVAEError(f"{measure}: no {what}; it compares the classes seen in generated items with the true ones.")
    device = next(model.parameters()).device
    return data.to(device), labels.to(device), torch.Generator(device).manual_seed(seed)


def _seen(
    model: MultimodalVAE,
    data: PairedData,
    given: Collection[str],
    target: str,
    classifier: nn.Module,
    chunks: Iterable[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """The classes that a classifier sees in a target generated from the `given` of the data, chunk after chunk of rows."""
    batches = ({name: x for name, x in data.batch(rows).items() if name in given} for rows in chunks)
    return torch.cat([predict(classifier, model.cross_generate(x, target, generator=generator)[0]) for x in batches])


@torch.no_grad()
def coherence(
    model: MultimodalVAE, data: PairedData, classifiers: Mapping[str, nn.Module], seed: int = 0, samples: int = 10_000
) -> dict[str, float]:
    """Table 1's measures of a model of any modalities, with a classifier of each: {"mnist->svhn": share, "joint": share}.

    "mnist->svhn" and so on, for every ordered pair: `cross_coherence` over all observations that have the source, with
    z_s ~ q(z_s | source) and z_p ~ p(z_p); "joint": `joint_coherence` over `samples` shared codes from the prior.
    Model and classifiers on one device, in the mode (`eval()`) in which they are to be judged; the seed decides every draw.

    Raises DMVAEError for data without labels and for a modality without a classifier.
    """
    data, labels, generator = _on_device("coherence", model, data, classifiers, seed)
    result = {}
    for source in model.names:
        everything = torch.ones(len(data), dtype=torch.bool, device=labels.device)
        rows = (everything if data.observed is None else data.observed[source]).nonzero().flatten()
        for target in model.names:
            if source != target:
                seen = _seen(model, data, (source,), target, classifiers[target], rows.split(1_000), generator)
                result[f"{source}->{target}"] = cross_coherence(seen, labels[rows])
    drawn = [model.sample(len(chunk), generator) for chunk in torch.arange(samples).split(1_000)]
    jointly = [torch.cat([predict(classifiers[name], images[name]) for images in drawn]) for name in model.names]
    return result | {"joint": joint_coherence(*jointly)}


def class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(classes (C,), mean feature of each (C, d))."""
    classes, position = labels.unique(return_inverse=True)
    one_hot = F.one_hot(position, len(classes)).to(features.dtype)
    return classes, (one_hot.T @ features) / one_hot.sum(0)[:, None]


def class_similarity(image: Tensor, text: Tensor, text_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(classes (C,), cosine (M, C) of each image with each class-averaged text feature); image (M, d), text (T, d)."""
    _same_length(text=text, text_labels=text_labels)
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1]:
        found = f"image features {tuple(image.shape)}, text features {tuple(text.shape)}"
        raise DMVAEError(f"{found}; expected (M, d) and (T, d).")
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
    Raises DMVAEError if there are fewer than k images."""
    _same_length(similarity=similarity, image_labels=image_labels)
    if not 1 <= k <= len(similarity):
        raise DMVAEError(f"AP@k with k={k} needs at least k images; found {len(similarity)}.")
    nearest = similarity.argsort(dim=0, descending=True, stable=True)[:k]
    return (image_labels[nearest] == classes).double().mean(0)


def rank1(image: Tensor, image_labels: Tensor, text: Tensor, text_labels: Tensor) -> float:
    """Image-to-text recognition (Table 2, Rank-1; Reed et al.'s protocol).
    The share of images (M, d) whose nearest class-averaged text feature, by cosine, has the image's class; text (T, d).
    A tie goes to the smaller class id."""
    classes, similarity = class_similarity(image, text, text_labels)
    return recognised(similarity, image_labels, classes).double().mean().item()


def average_precision_at_k(
    text: Tensor, text_labels: Tensor, image: Tensor, image_labels: Tensor, k: int = 50
) -> float:
    """Text-to-image retrieval (Table 2, AP@50; Reed et al.'s protocol): precision at k, averaged over classes.
    For each class-averaged text feature the share of its k nearest images, by cosine, that belong to the class. Raises
    DMVAEError if there are fewer than k images."""
    classes, similarity = class_similarity(image, text, text_labels)
    return precision_at_k(similarity, image_labels, classes, k).mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Fréchet (Wasserstein-2) distance of the Gaussians that fit two sets of features (M, d) and (N, d).

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), C with M - 1 and N - 1 in the denominator, in float64. In an
    Inception network's features it is the FID (Heusel et al. 2017); in other features it must not be called that. It
    is biased upwards by few items: compare sets of equal size only.

    Raises DMVAEError for features of different width, fewer than two of them, or values that are not finite.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        found = f"features {tuple(a.shape)} and {tuple(b.shape)}"
        raise DMVAEError(f"{found}; expected (M, d) and (N, d), two or more of each.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise DMVAEError("the features hold values that are not finite; look at the network that made them.")
    roots, trace = [], 0.0
    for features in (a.double(), b.double()):
        centred = features - features.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
        values = values.clamp(min=0)
        roots.append(vectors * values.sqrt() @ vectors.T)
        trace += values.sum().item()
    # C_a C_b has the eigenvalues of R R^T with R = C_a^(1/2) C_b^(1/2), so the root's trace is the sum of R's singular
    # values: no product that is not symmetric has its root taken.
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum().item()
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    return max(apart + trace - 2 * cross, 0.0)


@torch.no_grad()
def coherence_by_given(
    model: MultimodalVAE, data: PairedData, classifiers: Mapping[str, nn.Module], seed: int = 0
) -> dict[str, float]:
    """Conditional coherence by the number of given modalities, {"1 given": share, ..., "N-1 given": share}.

    "k given": `cross_coherence` averaged over all targets and, for each, over all sets of k other modalities, with z_s
    from the posterior given the set and z_p ~ p(z_p) (the protocol of PolyMNIST, Sutter et al. 2021). Complete data of
    known classes; model and classifiers as for `coherence`. Raises DMVAEError for other data and as `coherence` does.
    """
    if data.observed is not None:
        raise DMVAEError("coherence_by_given: items are missing; give complete observations.")
    data, labels, generator = _on_device("coherence_by_given", model, data, classifiers, seed)
    chunks = torch.arange(len(data), device=labels.device).split(500)
    right: dict[int, list[float]] = {}
    for target in model.names:
        others = [name for name in model.names if name != target]
        for k in range(1, len(model.names)):
            for given in combinations(others, k):
                seen = _seen(model, data, given, target, classifiers[target], chunks, generator)
                right.setdefault(k, []).append(cross_coherence(seen, labels))
    return {f"{k} given": fmean(shares) for k, shares in right.items()}
