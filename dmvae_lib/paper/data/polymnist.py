"""PolyMNIST made anew: five modalities, each a handwritten digit of one class on a texture of its own (Sutter et al. 2021).

The published set's five background pictures are of unclear licence, so that these are textures of our own, drawn by the
code below. All else is its rule, and numbers on it compare with published ones in their order only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, locked, read_json, remove_leftovers, sha256, verify, write_json
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper import networks
from dmvae_lib.paper.data import SOURCES, DataSet, Splits, check_asked
from dmvae_lib.paper.data.digits import Labelled, handwritten, kept

SIDE = 256  # pixels of a texture
THRESHOLD = 128  # of 255: brighter pixels of a digit invert its background
VERSION = 2  # raise it when the code below draws other images from the same digits

# --- textures -------------------------------------------------------------------------------------------------------


def _axes() -> tuple[Tensor, Tensor]:
    at = torch.linspace(0, 1, SIDE, dtype=torch.float64)
    return at[:, None].expand(SIDE, SIDE), at[None].expand(SIDE, SIDE)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _spread(x: Tensor) -> Tensor:
    """Each channel over [0, 1], away from mid-grey, whose inverse would be itself."""
    low, high = x.flatten(1).aminmax(dim=1)
    x = 2 * (x - low[:, None, None]) / (high - low)[:, None, None] - 1
    return 0.5 + 0.5 * x.sign() * x.abs().sqrt()


def _smooth(generator: torch.Generator) -> Tensor:
    """Clouds of colour."""
    return _spread(F.interpolate(_uniform(generator, 1, 3, 9, 9), SIDE, mode="bicubic", align_corners=True)[0])


def _stripes(generator: torch.Generator) -> Tensor:
    """Two colours in slanting, wavy stripes some 10 pixels wide."""
    y, x = _axes()
    wave = (2 * torch.pi * (12 * x + 5 * y + 0.15 * (2 * torch.pi * 2 * y).sin())).sin()
    colours = torch.tensor([[0.95, 0.8, 0.15], [0.1, 0.25, 0.5]], dtype=torch.float64)
    share = (4 * wave).sigmoid()
    return colours[0, :, None, None] * share + colours[1, :, None, None] * (1 - share)


def _blobs(generator: torch.Generator) -> Tensor:
    """Discs of 4 to 12 pixels' radius, dark and bright, on a pale ground."""
    y, x = _axes()
    picture = torch.tensor([0.85, 0.9, 0.8], dtype=torch.float64)[:, None, None].repeat(1, SIDE, SIDE)
    for _ in range(120):
        at, radius, colour = _uniform(generator, 2), 4 + 8 * _uniform(generator, 1), _uniform(generator, 3)
        inside = (y - at[0]).square() + (x - at[1]).square() < (radius / SIDE).square()
        picture = torch.where(inside, (0.5 + 0.45 * (colour - 0.5).sign())[:, None, None], picture)
    return picture


def _grain(generator: torch.Generator) -> Tensor:
    """Noise from pixel to pixel, reddish and dark."""
    tint = torch.tensor([0.45, 0.25, 0.2], dtype=torch.float64)[:, None, None]
    return tint * (0.4 + 1.2 * _uniform(generator, 1, SIDE, SIDE)) * (0.8 + 0.4 * _uniform(generator, 3, SIDE, SIDE))


def _edges(generator: torch.Generator) -> Tensor:
    """Flat cells of random colours, dark or bright, with sharp edges."""
    y, x = _axes()
    at, colours = _uniform(generator, 120, 2), _uniform(generator, 120, 3)
    cell = torch.stack([(y - py).square() + (x - px).square() for py, px in at]).argmin(0)
    colours = torch.where(_uniform(generator, 120, 1) < 0.5, 0.3 * colours, 1 - 0.3 * colours)
    return colours[cell].permute(2, 0, 1)


TEXTURES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "smooth": _smooth, "stripes": _stripes, "blobs": _blobs, "grain": _grain, "edges": _edges,
}  # fmt: skip
MODALITIES = tuple(TEXTURES)


def texture(modality: str) -> Tensor:
    """(3, SIDE, SIDE) uint8, always the same."""
    drawn = TEXTURES[modality](torch.Generator().manual_seed(MODALITIES.index(modality)))
    return (255 * drawn.clamp(0, 1)).round().to(torch.uint8)


# --- tuples ---------------------------------------------------------------------------------------------------------


def partners(labels: Tensor, folds: list[int], generator: torch.Generator) -> Tensor:
    """(N,) which digit a modality has in each tuple: a random permutation of every class's, within each fold.

    labels: (N,), the tuples'; folds: their sizes, which sum to N, so that no digit of one is in tuples of another.
    """
    index = torch.arange(len(labels))
    for fold in index.split(folds):
        for label in labels[fold].unique():
            rows = fold[labels[fold] == label]
            index[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return index


def on_texture(digits: Tensor, picture: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 3, 28, 28) uint8: a random crop of the picture, (3, SIDE, SIDE), for each digit, (N, 1, 28, 28), its colours
    inverted, 255 - x, where the digit is brighter than THRESHOLD."""
    height, width = digits.shape[-2:]
    y, x = (torch.randint(SIDE - n + 1, (len(digits), 1), generator=generator) for n in (height, width))
    inside = SIDE * torch.arange(height)[:, None] + torch.arange(width)
    background = picture.flatten(1)[:, SIDE * y + x + inside.flatten()].movedim(1, 0).reshape(-1, 3, height, width)
    return torch.where(digits > THRESHOLD, 255 - background, background)


def load(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    cache: str | os.PathLike | None = None,
    device: str = "cpu",
    permutations: int = 30,
) -> Splits:
    """Tuples of five images (3, 28, 28), one of each texture, five different digits of one class.

    As many tuples as there are digits, 60,000 and 10,000 of MNIST in the sources "subset" and "full", those of
    scikit-learn in "embedded"; every digit is once in every modality. Drawn once, kept as uint8 in
    cache/polymnist-<source>/, and mapped from there, never read whole; None keeps nothing.
    evaluation: "test", or "validation": the tuples of the last tenth of the training digits, which are permuted apart.
    device, permutations: not used.

    Raises DMVAEError as `dmvae_lib.paper.data.digits.load` does, and for kept files that are damaged.
    """
    check_asked("polymnist", source, evaluation)
    train, test = handwritten(source, Path(root))
    n = kept(train[1], source)
    folds = {"train": (train, [n, len(train[1]) - n]), "test": (test, [len(test[1])])}
    items: dict[str, dict[str, np.ndarray]]
    if cache is None:
        items = {part: {name: _draw(part, name, *of) for name in MODALITIES} for part, of in folds.items()}
    else:
        items = _kept(Path(cache, f"polymnist-{source}"), folds)

    def tuples(part: str, rows: slice) -> PairedData:
        labels = folds[part][0][1]
        return PairedData.aligned({name: x[rows] for name, x in items[part].items()}, labels[rows])

    # Of "subset" the validation tenth is left out of training either way: every run has a curve of its scores.
    held_out = evaluation == "validation" or source == "subset"
    trained = tuples("train", slice(n if held_out else None))
    evaluated = tuples("test", slice(None)) if evaluation == "test" else tuples("train", slice(n, None))
    what = "scikit-learn digits" if source == "embedded" else "MNIST"
    return Splits(trained, evaluated, {name: f"{what} on {name}" for name in MODALITIES}, source)


def _draw(part: str, modality: str, digits: Labelled, folds: list[int]) -> np.ndarray:
    """All images of a part and a modality, which alone decide what is drawn."""
    images, labels = digits
    generator = torch.Generator().manual_seed(100 * ("train", "test").index(part) + MODALITIES.index(modality))
    index, picture = partners(labels, folds, generator), texture(modality)
    return np.concatenate([on_texture(images[rows], picture, generator).numpy() for rows in index.split(10_000)])


def _kept(folder: Path, folds: dict[str, tuple[Labelled, list[int]]]) -> dict[str, dict[str, np.ndarray]]:
    """The images of all parts and modalities as memory maps of the folder's files, drawn where they are not there."""
    paths = {part: {name: folder / f"{part}-{name}-{VERSION}.npy" for name in MODALITIES} for part in folds}
    note, repair = folder / f"sha256-{VERSION}.json", f"Delete the folder {folder} to draw the images anew."
    with locked(folder, "drawing PolyMNIST"):
        if not note.exists():
            remove_leftovers(folder)
            for part, of in folds.items():
                for name, path in paths[part].items():
                    with atomic_write(path) as temporary:
                        np.save(temporary, _draw(part, name, *of))
            write_json(note, {path.name: sha256(path) for of in paths.values() for path in of.values()})
    for name, digest in read_json(note, repair).items():
        verify(folder / name, digest, repair)
    return {
        part: {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in of.items()}
        for part, of in paths.items()
    }


# --- networks -------------------------------------------------------------------------------------------------------


def build_networks(
    family: str, modality: str, private_dim: int, shared_dim: int, width: float, initialise: str
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of any of the modalities, as `DataSet` describes them: MoPoE's authors' with half the channels,
    which leaves a CPU twice the updates.

    Three convolutions (3, stride 2) 16-32-64 from 28 x 28 to 4 x 4, 256 hidden units, ReLU; the decoder is their
    mirror image, without the hidden layer. Both families have the same. Raises DMVAEError for an unknown one.
    """
    if family not in ("dmvae", "mmvae"):
        raise DMVAEError(f"polymnist: no networks {family!r}; expected dmvae or mmvae.")
    a, b, c, hidden = (round(width * size) for size in (16, 32, 64, 256))
    code = private_dim + shared_dim
    encoder = nn.Sequential(
        nn.Conv2d(3, a, 3, 2, 1), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * c, hidden), nn.ReLU(), nn.Linear(hidden, 2 * code),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(code, 16 * c), nn.ReLU(), nn.Unflatten(1, (c, 4, 4)),
        nn.ConvTranspose2d(c, b, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(b, a, 3, 2, 1, 1), nn.ReLU(),
        nn.ConvTranspose2d(a, 3, 3, 2, 1, 1),
    )  # fmt: skip
    encoder, decoder = (networks.initialise(network, initialise) for network in (encoder, decoder))
    return encoder, decoder if family == "dmvae" else nn.Sequential(decoder, nn.Sigmoid())


def classifier(modality: str) -> nn.Module:
    """The untrained evaluation classifier of a modality's images: three convolutions 16-32-64 with batch normalisation."""
    layers: list[nn.Module] = []
    for i, o in pairwise((3, 16, 32, 64)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))


POLYMNIST = DataSet(
    name="polymnist",
    modalities=MODALITIES,
    load=load,
    networks=build_networks,
    weights={source: dict.fromkeys(MODALITIES, 2.5) for source in SOURCES},  # of the grid's 1 and 2.5
    classifier=classifier,
)
