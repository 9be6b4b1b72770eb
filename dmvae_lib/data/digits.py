"""Paired digits for Sec. 5.1: MNIST-SVHN, a real subset of it, or what stands in for it without a download."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmvae_lib.data.embedded import VERSIONS, handwritten_digits, house_numbers
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import verify

TITLES = {
    "embedded": {"mnist": "scikit-learn digits", "svhn": "drawn house numbers"},
    "subset": {"mnist": "MNIST", "svhn": "SVHN (first 10,000 test images)"},
    "full": {"mnist": "MNIST", "svhn": "SVHN"},
}
SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
EVALUATIONS = ("test", "validation")

MNIST_SHA256 = {  # of the uncompressed files; their gz forms have the official MD5s
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SUBSET_MD5 = {  # of the raw bytes of the first 10,000 SVHN test images, (10000, 32, 32, 3), and labels, both uint8
    "X": "baa33556c0a057545047bfaa3001ef5f",
    "y": "88d7c15c2511f0cce9b7b3513f350cf7",
}
SUBSET_TRAIN = 8_000  # by index: neighbours are crops of one house number, a random split would leak


class Labelled(NamedTuple):
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """Paired digits, modalities "mnist" (1, 28, 28) and "svhn" (3, 32, 32), uint8.

    train, test: what to train on and what to evaluate on. titles: what the two modalities really are.
    """

    train: PairedData
    test: PairedData
    titles: dict[str, str]


def load_digits(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    permutations: int = 30,
    max_per_class: int = 10_000,
    seed: int = 0,
) -> Digits:
    """The digits of one source, each split paired by class on its own (`pair_by_class`).

    source: "embedded" (scikit-learn's handwritten digits, enlarged, and drawn house numbers; no files),
        "subset" (MNIST in full and the first 10,000 SVHN test images, 8,000 to train and 2,000 to test) or
        "full" (MNIST and SVHN, fetched into `root` where missing).
    evaluation: "test", or "validation": the last tenth of each modality's training images is then held out as `test`,
        for choices that must not see the test images.
    seed: of the pairing, and of what is drawn.

    Raises DMVAEError for an unknown source or evaluation and for files that are missing or damaged; no source stands
    in for another.
    """
    loaders = {"embedded": _embedded, "subset": _subset, "full": _full}
    if source not in loaders:
        raise DMVAEError(f"load_digits: unknown source {source!r}; expected one of {', '.join(loaders)}.")
    if evaluation not in EVALUATIONS:
        raise DMVAEError(f"load_digits: unknown evaluation {evaluation!r}; expected one of {', '.join(EVALUATIONS)}.")
    if not isinstance(seed, Integral) or seed < 0:
        raise DMVAEError(f"load_digits: seed={seed!r}; expected a whole number, at least 0.")
    train, test = loaders[source](Path(root), seed)
    for split in (train, test):
        for name, data in split.items():
            _check(name, data)
    if evaluation == "validation":
        # The versions of one embedded digit stay together: none may be trained on and another evaluated.
        kept = {name: _kept(len(data.labels), VERSIONS if source == "embedded" else 1) for name, data in train.items()}
        test = {name: Labelled(*(values[kept[name] :] for values in data)) for name, data in train.items()}
        train = {name: Labelled(*(values[: kept[name]] for values in data)) for name, data in train.items()}

    def paired(split: dict[str, Labelled]) -> PairedData:
        images = {name: data.images for name, data in split.items()}
        labels = {name: data.labels for name, data in split.items()}
        return PairedData.pair(images, labels, permutations, max_per_class, seed)

    return Digits(paired(train), paired(test), dict(TITLES[source]))


def _kept(n: int, versions: int) -> int:
    """How many of n training images stay when the last tenth is held out, a multiple of `versions`."""
    kept = n - n // 10
    return kept + -kept % versions


# --- sources: (train, test), each {name: Labelled} ---------------------------------------------------------------


def _embedded(root: Path, seed: int) -> tuple[dict[str, Labelled], dict[str, Labelled]]:
    train_images, train_labels, test_images, test_labels = handwritten_digits()
    # Even seeds draw training images and odd ones test images, so no two splits of any two seeds share a stream.
    return (
        {"mnist": Labelled(train_images, train_labels), "svhn": Labelled(*house_numbers(8_000, 2 * seed))},
        {"mnist": Labelled(test_images, test_labels), "svhn": Labelled(*house_numbers(2_000, 2 * seed + 1))},
    )


def _subset(root: Path, seed: int) -> tuple[dict[str, Labelled], dict[str, Labelled]]:
    n = SUBSET_TRAIN
    mnist = _mnist(root)
    images, labels = _svhn_subset(root)
    return (
        {"mnist": mnist["train"], "svhn": Labelled(images[:n], labels[:n])},
        {"mnist": mnist["test"], "svhn": Labelled(images[n:], labels[n:])},
    )


def _full(root: Path, seed: int) -> tuple[dict[str, Labelled], dict[str, Labelled]]:
    from torchvision.datasets import MNIST, SVHN
    from torchvision.datasets.utils import download_url

    folder = Path("MNIST", "raw")
    _fetch("MNIST", root, [folder / name for name in MNIST_SHA256], partial(MNIST, download=True))
    mnist = _mnist(root)
    svhn = {}
    for split in ("train", "test"):
        url, name, digest = SVHN.split_list[split]
        download = partial(download_url, url, filename=name, md5=digest)
        _fetch(f"SVHN ({split})", root / "svhn", [Path(name)], download)
        svhn[split] = _svhn(root, split)
    return (
        {"mnist": mnist["train"], "svhn": svhn["train"]},
        {"mnist": mnist["test"], "svhn": svhn["test"]},
    )


# --- files -------------------------------------------------------------------------------------------------------


def _mnist(root: Path) -> dict[str, Labelled]:
    """MNIST's "train" and "test" from torchvision's layout, root/MNIST/raw, every file verified."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder = root / "MNIST" / "raw"
    for name, digest in MNIST_SHA256.items():
        if not (folder / name).is_file():
            raise _missing("MNIST", folder / name)
        verify(folder / name, digest)

    # torchvision.datasets.MNIST would read a processed/*.pt instead, where there is one: an unverified file.
    def read(split: str) -> Labelled:
        images = read_image_file(str(folder / f"{split}-images-idx3-ubyte"))
        return Labelled(images[:, None], read_label_file(str(folder / f"{split}-labels-idx1-ubyte")))

    return {"train": read("train"), "test": read("t10k")}


def _svhn(root: Path, split: str) -> Labelled:
    """SVHN's "train" or "test" from root/svhn, verified; digit 0 is 0 (the files write 10)."""
    from torchvision.datasets import SVHN

    path = root / "svhn" / SVHN.split_list[split][1]
    verify(path, SVHN.split_list[split][2])
    data = SVHN(str(path.parent), split)
    return Labelled(torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels).long() % 10)


def _svhn_subset(root: Path) -> Labelled:
    """The first 10,000 SVHN test images, from the file that holds just them or from the official one."""
    from torchvision.datasets import SVHN

    path, official = root / "svhn" / "test_32x32_first10000.npz", root / "svhn" / SVHN.split_list["test"][1]
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {"X": file["X"], "y": file["y"]}
        except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise DMVAEError(
                f"{path} cannot be read as arrays X and y ({error}): it is truncated or damaged. Delete it and fetch "
                "it again."
            ) from error
    elif official.is_file():
        path, data = official, _svhn(root, "test")
        found = {
            "X": data.images[:10_000].permute(0, 2, 3, 1).numpy(),
            "y": data.labels[:10_000].to(torch.uint8).numpy(),
        }
    else:
        raise _missing("the SVHN subset", path, f" (and no {official.name} beside it, whose first 10,000 images it is)")
    shapes = {"X": (10_000, 32, 32, 3), "y": (10_000,)}
    for name, values in found.items():
        if values.shape != shapes[name] or values.dtype != np.uint8:
            raise DMVAEError(
                f"{path}: {name} has shape {values.shape} and dtype {values.dtype}; expected {shapes[name]} and uint8. "
                "Delete the file and fetch it again."
            )
        digest = hashlib.md5(np.ascontiguousarray(values)).hexdigest()
        if digest != SUBSET_MD5[name]:
            raise DMVAEError(
                f"{path}: the bytes of {name} have MD5 {digest}, expected {SUBSET_MD5[name]}: the file is damaged or "
                "another version. Delete it and fetch it again."
            )
    images = torch.from_numpy(np.ascontiguousarray(found["X"].transpose(0, 3, 1, 2)))
    return Labelled(images, torch.from_numpy(found["y"]).long())


def _fetch(what: str, root: Path, names: list[Path], download: Callable[[str], object]) -> None:
    """Has `download(folder)` fetch what is missing of `names` below `root`: into a folder beside, then moved.

    So a download that is cut off leaves no half file. Nothing is fetched if nothing is missing.
    """
    missing = [name for name in names if not (root / name).is_file()]
    if not missing:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            download(folder)
            for name in missing:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(folder, name), root / name)
    except (OSError, RuntimeError) as error:
        raise _missing(what, root / missing[0], f" and fetching it failed ({error})") from error


def _missing(what: str, path: Path, detail: str = "") -> DMVAEError:
    return DMVAEError(
        f"{what} is missing: there is no {path.absolute()}{detail}. On a machine with network access "
        "`make reproduce PROFILE=paper` downloads MNIST and SVHN into data/; if the files are elsewhere, name their "
        "folder, `make reproduce DATA=folder` or the notebook's `data`. Profile quick needs no download."
    )


def _check(name: str, data: Labelled) -> None:
    """Images of `name`'s format and labels 0 to 9, one per image; a verified file can hold nothing else."""
    images, labels = data
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != SHAPES[name]:
        raise DMVAEError(
            f"{name}: images of shape {tuple(images.shape)} and {images.dtype}; expected (N, *{SHAPES[name]}), uint8."
        )
    if len(labels) != len(images):
        raise DMVAEError(f"{name}: labels and images of different length, {len(labels)} and {len(images)}.")
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) > 9:
        raise DMVAEError(f"{name}: expected labels 0 to 9, at least one; found {labels.unique().tolist()}.")
