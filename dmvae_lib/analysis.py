"""What the latent codes hold: distinct styles, neighbours across modalities, linear probes, 2-D maps."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from dmvae_lib.models import MultimodalVAE
from dmvae_lib.pairing import PairedData


@torch.no_grad()
def distinct_codes(model: MultimodalVAE, name: str, n: int = 5, candidates: int = 512, seed: int = 0) -> Tensor:
    """(n, p) private codes whose images differ most (Fig. 4: "we pick those latent values that can express extreme styles").

    One dimension: n even steps from -1 to 3, as the paper says for MNIST. More: among `candidates` draws from the
    prior, decoded with the shared code zero, the one farthest from the mean image, then each time the one whose
    nearest chosen image is farthest away (greedy farthest-point rule, Euclidean distance of pixels).
    """
    device = next(model.parameters()).device
    if model.private_dims[name] == 1:
        return torch.linspace(-1, 3, n, device=device)[:, None]
    codes = model.private_prior(name, candidates, generator=torch.Generator(device).manual_seed(seed))
    images = model.mean(name, codes, codes.new_zeros(candidates, model.shared_dim)).flatten(1)
    distance = (images - images.mean(0)).norm(dim=1)
    chosen: list[int] = []
    for _ in range(n):
        chosen.append(int(distance.argmax()))
        to_chosen = (images - images[chosen[-1]]).norm(dim=1)
        distance = to_chosen if len(chosen) == 1 else torch.minimum(distance, to_chosen)
    return codes[chosen]


@torch.no_grad()
def posterior_means(model: MultimodalVAE, data: PairedData, rows: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """{"private": {name: (R, p)}, "shared": {name: (R, s)}} of the observations `rows` (all); "shared" also has "joint".
    Where an item is missing, its codes are zero, the prior's mean."""
    device = next(model.parameters()).device
    data, rows = data.to(device), torch.arange(len(data)) if rows is None else rows
    parts: dict[str, dict[str, list[Tensor]]] = {"private": {}, "shared": {}}
    for chunk in rows.to(device).split(1_000):
        posterior = model.infer(data.batch(chunk), data.masks(chunk))
        for part, codes in (("private", posterior.private), ("shared", {**posterior.shared, "joint": posterior.joint})):
            for name, q in codes.items():
                parts[part].setdefault(name, []).append(q.mean.cpu())
    return {part: {name: torch.cat(chunks) for name, chunks in codes.items()} for part, codes in parts.items()}


def neighbour_agreement(codes: dict[str, Tensor], labels: Tensor) -> float:
    """How often a point's nearest neighbour (Euclidean) from another modality has its class: the mean over all points.
    codes: {name: (N, s)} in one space, labels (N,). This is what the eye should see in Fig. 5, as a number in [0, 1].
    The paired item itself does not count: it is excluded."""
    hits = []
    for a, b in permutations(codes, 2):
        distance = torch.cdist(codes[a], codes[b]).fill_diagonal_(torch.inf)
        hits.append(labels[distance.argmin(1)] == labels)
    return torch.cat(hits).double().mean().item()


def mixing(codes: dict[str, Tensor]) -> float:
    """How often a point's nearest neighbour (Euclidean) is of another modality; 0 where modalities lie apart.
    codes: {name: (N, s)} in one space. Two modalities that are spread alike have about 0.5."""
    together = torch.cat(list(codes.values()))
    modality = torch.arange(len(codes)).repeat_interleave(len(together) // len(codes))
    distance = torch.cdist(together, together).fill_diagonal_(torch.inf)
    return (modality[distance.argmin(1)] != modality).double().mean().item()


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a logistic regression from standardised codes (N, d) to the class (N,).
    With d = 0 there is nothing to see and the answer is always the class most common in training: its share in the
    test."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if train.shape[1] == 0:
        return (test_labels == train_labels.mode().values).double().mean().item()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    return float(probe.fit(train.numpy(), train_labels.numpy()).score(test.numpy(), test_labels.numpy()))


def linear_r2(train: Tensor, train_values: Tensor, test: Tensor, test_values: Tensor) -> float:
    """What a linear regression from codes (N, d) tells of numbers (N, k) where there are no labels: its R^2 on the test.

    1 - (squared error) / (squared error of always answering the training mean), of all k numbers together; 0 with d = 0,
    below 0 for what is worse than the mean.
    """
    rows, values, test_rows, test_values = (x.double() for x in (train, train_values, test, test_values))
    centre, mean = rows.mean(0), values.mean(0)
    weights = torch.linalg.lstsq(
        rows - centre, values - mean, driver="gelsd"
    ).solution  # also of codes that are constant
    error = (test_values - mean - (test_rows - centre) @ weights).square().sum()
    return 1 - (error / (test_values - mean).square().sum()).item()


def tsne(codes: dict[str, Tensor], seed: int = 0) -> dict[str, np.ndarray]:
    """Codes of several modalities, {name: (N, s)}, in one t-SNE map, {name: (N, 2)} (Fig. 5)."""
    from sklearn.manifold import TSNE

    together = torch.cat(list(codes.values())).numpy()
    points = TSNE(random_state=seed, init="pca", perplexity=30).fit_transform(together)
    return dict(zip(codes, np.split(points, len(codes))))
