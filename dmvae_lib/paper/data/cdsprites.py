"""CdSprites+ made anew, levels 1 and 2: an image of one shape, and its caption.

The benchmark is github.com/gabinsane/multimodal-vae-comparison.

Level 1: the caption names the shape, a heart, a square or an ellipse; level 2: its size too. What no caption names is how
the shape is turned. Images are drawn here, not downloaded: numbers compare with the leaderboard's in their order only.
"""

from __future__ import annotations

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper import networks
from dmvae_lib.paper.data import SOURCES, DataSet, Splits, check_asked

SHAPES, SIZES = ("heart", "square", "ellipse"), {"small": 10.0, "big": 20.0}  # pixels from the centre to the edge
CAPTIONS = {1: SHAPES, 2: tuple(f"{size} {shape}" for size in SIZES for shape in SHAPES)}  # by class
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
SIDE, ITEMS = 64, {"train": 3_000, "test": 600}

# --- images and captions --------------------------------------------------------------------------------------------


def draw(labels: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """(N,) classes of a level -> (N, 3, SIDE, SIDE) uint8: a dark shape on white in the middle, turned at random."""
    names = [CAPTIONS[level][label].split() for label in labels.tolist()]
    radius = torch.tensor([SIZES[words[0]] if level > 1 else SIZES["big"] for words in names])[:, None, None]
    turn = 2 * torch.pi * torch.rand(len(labels), 1, 1, generator=generator)
    at = torch.arange(SIDE) - (SIDE - 1) / 2
    y, x = at[:, None] / radius, at / radius
    x, y = turn.cos() * x + turn.sin() * y, turn.cos() * y - turn.sin() * x
    inside = {  # positive inside, about 1 per radius at the edge
        "square": 0.8 - torch.maximum(x.abs(), y.abs()),
        "ellipse": 1 - (x.square() + (y / 0.55).square()).sqrt(),
        "heart": 0.9 - (x.square() + (1.15 * y + 0.25 - x.abs().clamp_min(1e-6).sqrt() * 0.75).square()).sqrt(),
    }
    shape = torch.stack([inside[words[-1]][i] for i, words in enumerate(names)])
    ink = (0.5 + shape * radius).clamp(0, 1)[:, None]  # one pixel of soft edge
    colour = torch.tensor([0.15, 0.25, 0.6])[:, None, None]
    return (255 * (1 - ink * (1 - colour))).round().to(torch.uint8)


def spell(labels: Tensor, level: int) -> Tensor:
    """(N,) classes of a level -> (N, L, 27) float32: the caption's letters one-hot, blanks behind it."""
    longest = max(map(len, CAPTIONS[level]))
    letters = torch.tensor([[ALPHABET.index(letter) for letter in text.ljust(longest)] for text in CAPTIONS[level]])
    return F.one_hot(letters, len(ALPHABET)).float()[labels]


class Reader(nn.Module):
    """Captions (B, L, 27), likeliest letters taken -> (B, C + 1) one-hot of the class that is spelt exactly, the last
    for what is no caption."""

    def __init__(self, level: int):
        super().__init__()
        self.register_buffer("known", spell(torch.arange(len(CAPTIONS[level])), level).argmax(-1))

    def forward(self, captions: Tensor) -> Tensor:
        same = (captions.argmax(-1)[:, None] == self.known).all(-1).float()
        return torch.cat([same, 1 - same.sum(1, keepdim=True)], 1)


def read(captions: Tensor) -> list[str]:
    """The likeliest letters of captions, (B, L, 27), as text."""
    return ["".join(ALPHABET[letter] for letter in row).rstrip() for row in captions.argmax(-1).tolist()]


def load(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    cache: str | os.PathLike | None = None,
    device: str = "cpu",
    permutations: int = 30,
    *,
    level: int,
) -> Splits:
    """Images (3, 64, 64) and captions (letters, 27) of a level, classes in turn: ITEMS of them, the same in every source.

    evaluation: "validation" draws other test images. root, cache, device, permutations: not used. Raises DMVAEError
    for an unknown source or evaluation.
    """
    check_asked("cdsprites", source, evaluation)

    def pairs(part: str, seed: int) -> PairedData:
        labels = torch.arange(ITEMS[part]) % len(CAPTIONS[level])
        image = draw(labels, level, torch.Generator().manual_seed(seed))
        captions = spell(torch.arange(len(CAPTIONS[level])), level)
        index = {"image": torch.arange(len(labels)), "caption": labels}
        return PairedData(
            {"image": image, "caption": captions}, index, {"image": labels, "caption": torch.arange(len(captions))}
        )

    titles = {"image": f"drawn sprites, level {level}", "caption": f"captions, level {level}"}
    return Splits(pairs("train", 0), pairs("test", 1 if evaluation == "test" else 2), titles, source)


# --- networks -------------------------------------------------------------------------------------------------------


def build_networks(
    family: str, modality: str, private_dim: int, shared_dim: int, width: float, initialise: str, level: int
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of one modality, as `DataSet` describes them: four convolutions (4, stride 2) for images, a
    layer of 256 hidden units for captions. Raises DMVAEError for unknown names."""
    code, (a, b, c, hidden) = private_dim + shared_dim, (round(width * size) for size in (16, 32, 64, 256))
    encoder: nn.Module
    decoder: nn.Module
    if family == "dmvae" and modality == "image":
        encoder = nn.Sequential(
            nn.Conv2d(3, a, 4, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 4, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(c, c, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * c, hidden), nn.ReLU(),
            nn.Linear(hidden, 2 * code),
        )  # fmt: skip
        decoder = nn.Sequential(
            nn.Linear(code, 16 * c), nn.ReLU(), nn.Unflatten(1, (c, 4, 4)), nn.ConvTranspose2d(c, c, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(c, b, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(b, a, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(a, 3, 4, 2, 1),
        )  # fmt: skip
    elif family == "dmvae" and modality == "caption":
        letters = max(map(len, CAPTIONS[level])), len(ALPHABET)
        size = letters[0] * letters[1]
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * code))
        decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, size), nn.Unflatten(1, letters)
        )  # fmt: skip
    else:
        raise DMVAEError(f"cdsprites: no networks {family!r} for {modality!r}; expected dmvae, and image or caption.")
    return networks.initialise(encoder, initialise), networks.initialise(decoder, initialise)


def classifier(modality: str, level: int) -> nn.Module:
    """The untrained evaluation classifier of images; captions are read (`Reader`) and need no training."""
    if modality == "caption":
        return Reader(level)
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for i, o in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, len(CAPTIONS[level])))


def _level(level: int) -> DataSet:
    return DataSet(
        name=f"cdsprites-{level}",
        modalities=("image", "caption"),
        load=partial(load, level=level),
        networks=partial(build_networks, level=level),
        # An image has 12,288 values, a caption 189 (level 1) or 351 (level 2): 65 or 35 to one, the weight near the latter.
        weights={source: {"image": 1.0, "caption": 30.0} for source in SOURCES},
        classifier=partial(classifier, level=level),
    )


CDSPRITES = {level: _level(level) for level in CAPTIONS}
