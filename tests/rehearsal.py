"""`make rehearsal`: all of `make reproduce PROFILE=paper`, a few updates of each run, on stand-ins for its downloads.

The stand-ins have the official names, shapes and numbers, so that memory, disk and every step are the paper's; what
they show is drawn, weights are random, and the text model has one layer. Their checksums replace the official ones in
this rehearsal's processes alone. Before them it runs without data and network, to end in one message that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm
from transformers import BertConfig, BertModel

from dmvae_lib.files import md5, sha256
from dmvae_lib.paper.data.embedded_digits import handwritten_digits, house_numbers
from dmvae_lib.paper.data.embedded_flowers import drawn_flowers
from dmvae_lib.paper.data.features import BERT_REVISION, _small_bert
from dmvae_lib.paper.data.flowers import CAPTION_FOLDER, CAPTIONS, CLASS_LISTS
from dmvae_lib.paper.reproduce import notebooks
from dmvae_lib.paper.runs import project_folder

MNIST = {"train": 60_000, "t10k": 10_000}
SVHN = {"train": 73_257, "test": 26_032}
FLOWERS, CLASSES = 8_189, {"test": range(1, 21), "validation": range(21, 41), "train": range(41, 103)}
# Every Python of the rehearsal runs this first: in place of the official checksums, those of the stand-ins.
OVERRIDE = """
import json, pathlib
from torchvision import datasets, models
from dmvae_lib.paper.data import digits
known = json.loads(pathlib.Path(__file__).with_name("checksums.json").read_text())
digits.MNIST_SHA256 = known["mnist"]
for split, digest in known["svhn"].items():
    datasets.SVHN.split_list[split][2] = digest
datasets.Flowers102._file_dict.update(known["flowers"])
models.ResNet101_Weights.IMAGENET1K_V1.value.url = known["resnet"]
"""


def write_mnist(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    images, labels, *_ = handwritten_digits()
    for split, n in MNIST.items():
        rows = torch.arange(n) % len(images)
        header = struct.pack(">4i", 2051, n, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images[rows].numpy().tobytes())
        header = struct.pack(">2i", 2049, n)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + labels[rows].byte().numpy().tobytes())
    return {path.name: sha256(path) for path in folder.iterdir()}


def write_svhn(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    images, labels = house_numbers(8_000)
    digests = {}
    for split, n in SVHN.items():
        rows, path = torch.arange(n) % len(images), folder / f"{split}_32x32.mat"
        labelled = labels[rows, None].byte()
        savemat(path, {"X": images[rows].permute(2, 3, 1, 0).numpy(), "y": labelled.where(labelled > 0, 10).numpy()})
        digests[split] = md5(path)
    return digests


def write_flowers(root: Path) -> dict[str, tuple[str, str]]:
    """Image i of class i mod 102, one of the drawn flowers, enlarged to a photograph's size, with its ten captions."""
    images, labels, captions = drawn_flowers()
    jpg, text = root / "flowers-102" / "jpg", root / CAPTION_FOLDER / "text_c10"
    jpg.mkdir(parents=True)
    of_class = np.arange(FLOWERS) % 102 + 1
    drawn = {label: (labels == label).nonzero().flatten().tolist() for label in labels.unique().tolist()}
    for number, label in enumerate(tqdm(of_class.tolist(), desc="flowers", leave=False), 1):
        rows = drawn[label % len(drawn)]
        row = rows[number // 102 % len(rows)]
        pixels = images[row].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((500, 500)).save(jpg / f"image_{number:05}.jpg")
        path = text / f"class_{label:05}" / f"image_{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in captions[row][:CAPTIONS]))
    for split, members in CLASSES.items():
        (text.parent / CLASS_LISTS[split]).write_text("".join(f"class_{label:05}\n" for label in members))
    about = {
        "label": ("imagelabels.mat", "labels", of_class),
        "setid": ("setid.mat", "trnid", np.arange(1, FLOWERS + 1)),
    }
    for name, key, values in about.values():
        savemat(jpg.parent / name, {key: values[None].astype(np.uint16)})
    return {kind: (name, md5(jpg.parent / name)) for kind, (name, _, _) in about.items()}


def write_networks(folder: Path) -> str:
    """ResNet-101 where torch looks for what it has downloaded, BERT where transformers does; ResNet-101's URL."""
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet101().state_dict(), checkpoints / "resnet101.pth")
    named = checkpoints / f"resnet101-{sha256(checkpoints / 'resnet101.pth')[:8]}.pth"
    (checkpoints / "resnet101.pth").rename(named)
    snapshot = folder / "hf" / "hub" / "models--google-bert--bert-base-uncased" / "snapshots" / BERT_REVISION
    tokenizer, _ = _small_bert()
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(snapshot)
    BertModel(config).save_pretrained(snapshot)
    return f"http://127.0.0.1:9/{named.name}"


def reproduce(profile: str, data: Path, environ: dict[str, str], **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dmvae_lib.paper.reproduce", "--profile", profile, "--data", str(data)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return subprocess.run(command, env=os.environ | environ | nowhere, **options)


def size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", default="1e-5", help="of the updates and pairings")
    options = parser.parse_args()
    root = project_folder() / "build" / "rehearsal"
    profile, data = f"paper@{options.share}", root / "data"
    if not (root / "checksums.json").exists():
        known = {"mnist": write_mnist(data / "MNIST" / "raw"), "svhn": write_svhn(data / "svhn")}
        known |= {"flowers": write_flowers(data), "resnet": write_networks(root)}
        (root / "checksums.json").write_text(json.dumps(known))
        (root / "sitecustomize.py").write_text(OVERRIDE)

    alone = reproduce(profile, root / "empty", {"HF_HOME": str(root / "no"), "TORCH_HOME": str(root / "no")}, capture_output=True, text=True)  # fmt: skip
    print(f"Without data and network, exit status {alone.returncode}: {alone.stderr.strip()}")
    assert alone.returncode == 1 and "MNIST is missing: there is no " in alone.stderr, "expected a message that says so"
    assert "Traceback" not in alone.stderr, "expected one message"

    begun = time.monotonic()
    environ = {"PYTHONPATH": str(root), "HF_HOME": str(root / "hf"), "TORCH_HOME": str(root / "torch")}
    done = reproduce(profile, data, environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, f"exit status {done.returncode}"
    minutes, memory = (time.monotonic() - begun) / 60, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    results = project_folder() / "results" / profile
    executed = {path.name for path in (results / "notebooks").glob("*.ipynb")}
    assert executed == {path.name for path in notebooks()}, executed
    features = size(project_folder() / "runs" / "features")
    print(
        f"With stand-ins: {minutes:.0f} min, {memory:.1f} GB of memory at most, data {size(data)}, all features {features}."
    )


if __name__ == "__main__":
    main()
