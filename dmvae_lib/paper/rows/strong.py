"""The strong judge: a residual network with augmentation, one-cycle AdamW, beside the protocol's small classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.networks import residual_classifier
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.training import Schedule, batches, resolve_device


def build(data: DataSet, splits: Splits, *, modality: str) -> nn.Module:
    """For any modality of images (N, C, H, W)."""
    return residual_classifier(splits.train.items[modality].shape[1])


def schedule(profile: Profile) -> Schedule:
    """The learning rate is the highest of the cycle."""
    return Schedule(profile.strong_steps, 128, 4e-3)


def fit(model: nn.Module, pairs: PairedData, seed: int, plan: Schedule, device: str) -> None:
    """Trains in place: AdamW, its rate up and down once (Smith & Topin 2018) as PyTorch's OneCycleLR does."""
    where = resolve_device(device)
    model.to(where).train()
    pairs = pairs.to(where)
    (name,), labels = pairs.names, pairs.labels
    assert labels is not None  # `one_modality` refuses items without
    optimiser = torch.optim.AdamW(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, plan.learning_rate, total_steps=plan.steps)
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        order = batches(pairs, plan.batch_size, seed, 0)
        for _ in tqdm(range(plan.steps), desc=f"strong judge of {name}", unit="step", leave=False):
            rows = next(order)
            loss = F.cross_entropy(model(pairs.batch(rows)[name]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
