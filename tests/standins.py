"""What several tests have in the place of something else: downloads of a few items, archives, encoders that are certain."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from dmvae_lib.files import md5
from dmvae_lib.paper.data.flowers import CAPTION_FOLDER, CLASS_LISTS

LABELS = [3, 3, 1, 4, 1, 2, 4, 2]  # of flowers 1 to 8
CLASSES = {"train": (3, 4), "validation": (1,), "test": (2,)}


def write_svhn(folder: Path, n: int) -> dict[str, list[str]]:
    """n items of each split in SVHN's format, (32, 32, 3, n), digit 0 written 10; what torchvision's split_list says."""
    folder.mkdir()
    known = {}
    for seed, split in enumerate(("train", "test")):
        path = folder / f"{split}_32x32.mat"
        images = np.random.default_rng(seed).integers(256, size=(32, 32, 3, n), dtype=np.uint8)
        savemat(path, {"X": images, "y": np.arange(n, dtype=np.uint8)[:, None] % 10 + 1})
        known[split] = ["", path.name, md5(path)]
    return known


def caption_file(root: Path, number: int) -> Path:
    return root / CAPTION_FOLDER / "text_c10" / f"class_{LABELS[number - 1]:05}" / f"image_{number:05}.txt"


def write_oxford(root: Path) -> dict[str, tuple[str, str]]:
    """Oxford-102's layout with eight images of four classes and their captions; what torchvision's _file_dict says."""
    folder, generator = root / "flowers-102", np.random.default_rng(0)
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, len(LABELS) + 1):
        pixels = generator.integers(256, size=(20, 25, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "jpg" / f"image_{number:05}.jpg")
        path = caption_file(root, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"a flower of image {number}, caption {line}\n" for line in range(10)))
    for split, members in CLASSES.items():
        (root / CAPTION_FOLDER / CLASS_LISTS[split]).write_text("".join(f"class_{label:05}\n" for label in members))
    savemat(folder / "imagelabels.mat", {"labels": np.array([LABELS], dtype=np.uint8)})
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    return {key: (name, md5(folder / name)) for key, name in names.items()}


def packed(folder: Path, name: str, *members: tarfile.TarInfo) -> bytes:
    """A tar archive of a folder under a name of its own, and of further members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.add(folder, arcname=name)
        for of in members:
            file.addfile(of)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@torch.no_grad()
def make_certain(model) -> None:
    """DMVAE's posteriors get (almost) no variance: every draw is the mean."""
    for name, dim in model.private_dims.items():
        last = model.encoders[name][-1]
        for start, size in ((dim, dim), (2 * dim + model.shared_dim, model.shared_dim)):
            last.weight[start : start + size] = 0
            last.bias[start : start + size] = -30.0
