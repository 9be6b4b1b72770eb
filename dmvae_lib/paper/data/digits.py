"""MNIST-SVHN, paired digits for Sec. 5.1: in full, a real subset, or what stands in for it without a download."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import verify
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper import networks
from dmvae_lib.paper.data import ELSEWHERE, DataSet, Splits, check_asked
from dmvae_lib.paper.data.embedded_digits import VERSIONS, handwritten_digits, house_numbers

TITLES = {
    "embedded": {"mnist": "scikit-learn digits", "svhn": "drawn house numbers"},
    "subset": {"mnist": "MNIST", "svhn": "SVHN (first 10,000 test images)"},
    "full": {"mnist": "MNIST", "svhn": "SVHN"},
}
SHAPES = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}

MNIST_SHA256 = {  # of the uncompressed files, which torchvision does not verify; their gz forms have the official MD5s
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SUBSET = {  # the first 10,000 SVHN test images and their labels, both uint8: shape, and MD5 of the raw bytes
    "X": ((10_000, 32, 32, 3), "baa33556c0a057545047bfaa3001ef5f"),
    "y": ((10_000,), "88d7c15c2511f0cce9b7b3513f350cf7"),
}

Labelled: TypeAlias = tuple[Tensor, Tensor]  # uint8 images (N, C, H, W) and int64 labels (N,)
Parts: TypeAlias = tuple[Labelled, Labelled]  # to train on and to test on


def load(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    cache: str | os.PathLike | None = None,
    device: str = "cpu",
    permutations: int = 30,
) -> Splits:
    """The digits of one source, "mnist" (1, 28, 28) and "svhn" (3, 32, 32), each split paired by class on its own.

    source: "embedded" (scikit-learn's handwritten digits, enlarged, and drawn house numbers; no files),
        "subset" (MNIST in full and the first 10,000 SVHN test images, 8,000 to train and 2,000 to test) or
        "full" (MNIST and SVHN, fetched into `root` where missing).
    evaluation: "test", or "validation": the last tenth of each modality's training images is then held out as `test`,
        for choices that must not see the test images. Of "subset" it is left out of training either way, so that every
        run has a curve of validation scores.
    cache, device: not needed for digits.

    Raises DMVAEError for an unknown source or evaluation and for files that are missing or damaged; no source stands
    in for another.
    """
    check_asked("digits", source, evaluation)
    whole = _read(source, Path(root))
    if evaluation == "validation" or source == "subset":
        for name, (train, test) in whole.items():
            train, held = _cut(train, kept(train[1], source))
            whole[name] = train, held if evaluation == "validation" else test

    def paired(part: int) -> PairedData:
        images, labels = ({name: parts[part][i] for name, parts in whole.items()} for i in (0, 1))
        return PairedData.pair(images, labels, permutations)

    return Splits(paired(0), paired(1), dict(TITLES[source]), source)


# --- networks -------------------------------------------------------------------------------------------------------


def build_networks(
    family: str, modality: str, private_dim: int, shared_dim: int, width: float, initialise: str
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of one modality, as `DataSet` describes them. Raises DMVAEError for an unknown name."""
    dims = private_dim, shared_dim
    match family, modality:
        case (("dmvae" | "mmvae"), "mnist"):
            sizes = *dims, round((256 if family == "dmvae" else 400) * width), initialise
            encoder, decoder = networks.mnist_encoder(*sizes), networks.mnist_decoder(*sizes)
            return encoder, decoder if family == "dmvae" else nn.Sequential(decoder, nn.Sigmoid())
        case "dmvae", "svhn":
            return networks.svhn_encoder(*dims, width, initialise), networks.svhn_decoder(*dims, width, initialise)
        case "mmvae", "svhn":
            latent_dim = private_dim + shared_dim
            encoder = networks.mmvae_svhn_encoder(latent_dim, width, initialise)
            return encoder, networks.mmvae_svhn_decoder(latent_dim, width, initialise)
    raise DMVAEError(f"digits: no networks {family!r} for {modality!r}; expected dmvae or mmvae, mnist or svhn.")


def joint_encoder(shared_dim: int, width: float, initialise: str) -> nn.Module:
    """The joint network of JMVAE and TELBO: DMVAE's encoders to 2 * shared_dim features each, then 512 hidden units."""
    features = {
        "mnist": networks.mnist_encoder(0, shared_dim, round(256 * width), initialise),
        "svhn": networks.svhn_encoder(0, shared_dim, width, initialise),
    }
    return networks.JointEncoder(features, 4 * shared_dim, shared_dim, round(512 * width), initialise)


def classifier(modality: str) -> nn.Module:
    """The untrained evaluation classifier of a modality's images."""
    return networks.digit_classifier(*SHAPES[modality][:2])


MNIST_SVHN = DataSet(
    name="mnist-svhn",
    modalities=("mnist", "svhn"),
    load=load,
    networks=build_networks,
    # The release's 50 and 1 for the real data.
    weights={source: {"mnist": 5.0 if source == "embedded" else 50.0, "svhn": 1.0} for source in TITLES},
    classifier=classifier,
    joint_encoder=joint_encoder,
)


# --- sources and files ----------------------------------------------------------------------------------------------


def kept(labels: Tensor, source: str) -> int:
    """How many training items of a source there are without the last tenth, which is held out for validation."""
    n = len(labels) - len(labels) // 10
    # The versions of one embedded digit stay together: none may be trained on and another evaluated.
    return n + -n % (VERSIONS if source == "embedded" else 1)


def handwritten(source: str, root: Path) -> Parts:
    """The handwritten digits of a source, (N, 1, 28, 28), to train on and to test on. Errors as `load`'s."""
    if source == "embedded":
        written = handwritten_digits()
        return written[:2], written[2:]
    if source == "full":
        from torchvision.datasets import MNIST

        _fetch("MNIST", root, [Path("MNIST", "raw", name) for name in MNIST_SHA256], partial(MNIST, download=True))
    return _mnist(root)


def _read(source: str, root: Path) -> dict[str, Parts]:
    if source == "embedded":
        drawn = house_numbers(8_000, seed=0), house_numbers(2_000, seed=1)
        return {"mnist": handwritten(source, root), "svhn": drawn}
    if source == "subset":  # cut by index: neighbours are crops of one house number, a random split would leak
        return {"mnist": handwritten(source, root), "svhn": _cut(_svhn_subset(root), 8_000)}
    from torchvision.datasets import SVHN

    written = handwritten(source, root)
    for split in ("train", "test"):
        _fetch("SVHN", root / "svhn", [Path(SVHN.split_list[split][1])], partial(SVHN, split=split, download=True))
    return {"mnist": written, "svhn": (_svhn(root, "train"), _svhn(root, "test"))}


def _cut(data: Labelled, n: int) -> Parts:
    """The first n, and the rest."""
    images, labels = data
    return (images[:n], labels[:n]), (images[n:], labels[n:])


def _mnist(root: Path) -> Parts:
    """MNIST to train on and to test on from torchvision's layout, root/MNIST/raw, every file verified."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    folder = root / "MNIST" / "raw"
    for name, digest in MNIST_SHA256.items():
        if not (folder / name).is_file():
            raise _missing("MNIST", folder / name)
        verify(folder / name, digest)

    # torchvision.datasets.MNIST would read a processed/*.pt instead, where there is one: an unverified file.
    def read(split: str) -> Labelled:
        images = read_image_file(str(folder / f"{split}-images-idx3-ubyte"))
        return images[:, None], read_label_file(str(folder / f"{split}-labels-idx1-ubyte"))

    return read("train"), read("t10k")


def _svhn(root: Path, split: str) -> Labelled:
    """SVHN's "train" or "test" from root/svhn, verified; digit 0 is 0 (the files write 10, torchvision reads 0)."""
    from torchvision.datasets import SVHN

    path = root / "svhn" / SVHN.split_list[split][1]
    verify(path, SVHN.split_list[split][2])
    data = SVHN(str(path.parent), split)
    return torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels)


def _svhn_subset(root: Path) -> Labelled:
    """The first 10,000 SVHN test images, from the file that holds just them or from the official one."""
    from torchvision.datasets import SVHN

    path, official = root / "svhn" / "test_32x32_first10000.npz", root / "svhn" / SVHN.split_list["test"][1]
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in SUBSET}
        except Exception as error:  # NumPy raises whatever unpacking meets in a damaged file
            raise DMVAEError(
                f"{path} cannot be read as arrays X and y ({error}): it is damaged. Delete it and fetch it again."
            ) from error
    elif official.is_file():
        path, (images, labels) = official, _svhn(root, "test")
        found = {"X": images[:10_000].permute(0, 2, 3, 1).numpy(), "y": labels[:10_000].to(torch.uint8).numpy()}
    else:
        raise _missing("the SVHN subset", path, f" (and no {official.name} beside it, whose first 10,000 images it is)")
    for name, (shape, expected) in SUBSET.items():
        values = np.ascontiguousarray(found[name])
        digest = hashlib.md5(values).hexdigest()
        if (values.shape, values.dtype, digest) != (shape, np.uint8, expected):
            raise DMVAEError(
                f"{path}: {name} has shape {values.shape}, dtype {values.dtype} and bytes of MD5 {digest}; expected "
                f"{shape}, uint8 and {expected}: it is damaged or another version. Delete it and fetch it again."
            )
    return torch.from_numpy(found["X"].transpose(0, 3, 1, 2).copy()), torch.from_numpy(found["y"]).long()


def _fetch(what: str, root: Path, names: list[Path], download: Callable[[str], Any]) -> None:
    """Where one of `names` is missing below `root`, has torchvision download and verify them, then moves them there.

    The download goes into a folder beside: torchvision verifies archives, not what it unpacks from them, so a process
    that is killed, or two at a time, would else leave half a file under a whole one's name.
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
    except (OSError, RuntimeError, HTTPException) as error:
        raise _missing(what, root / missing[0], f" and fetching it failed ({error})") from error


def _missing(what: str, path: Path, detail: str = "") -> DMVAEError:
    return DMVAEError(
        f"{what} is missing: there is no {path.absolute()}{detail}. On a machine with network access "
        f"`make reproduce PROFILE=paper` downloads MNIST and SVHN into data/. {ELSEWHERE}"
    )
