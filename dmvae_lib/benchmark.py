"""`make bench`: how fast DMVAE trains here, beside other ways to train the same networks and the machine's own limits."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm

from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.experiments import DMVAE_DIGITS, build
from dmvae_lib.independent import multivae_trainer
from dmvae_lib.models import DMVAE
from dmvae_lib.networks import Upsampling
from dmvae_lib.plots import benchmark_bars
from dmvae_lib.report import Results
from dmvae_lib.runs import Setting, command_line, setting
from dmvae_lib.training import Job, Schedule, resolve_device, train_side_by_side

STEPS, ROUNDS = 20, 5  # updates timed at a stretch; every contestant gets its stretch in each round
FIRST = {"cuda": 4}  # updates of ours after which all are alike: on a GPU those that come before its graph is replayed
LONGER = {"cuda": 50}  # ours is timed over so many times STEPS, where STEPS updates are over at once
SIDE_BY_SIDE = 5


def synchronise(device: torch.device) -> None:
    """Waits for the device's queue, so that a clock read next tells the time of the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work()` takes, with the device's queue empty before and after."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def seconds_per_update(updates: Callable[[int], object], n: int, device: torch.device) -> float:
    """Of `updates(n)` alone: the time of the first ones, with all that comes before them, is taken off."""
    first = FIRST.get(device.type, 1)
    alone = seconds(lambda: updates(first), device)
    return (seconds(lambda: updates(first + n), device) - alone) / n


def where(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# --- the contestants: each returns a function that updates with batches of batch_size, and returns seconds per update --


def ours(model: DMVAE, data: PairedData, batch_size: int, device: torch.device, seeds: int = 1) -> Callable[[], float]:
    """This library's `train_side_by_side`; an update is one of one seed."""
    models = [model, *(copy.deepcopy(model) for _ in range(1, seeds))]

    def updates(n: int) -> None:
        train_side_by_side([Job(one, data, Schedule(n, batch_size), seed) for seed, one in enumerate(models)], device)

    return lambda: seconds_per_update(updates, STEPS * LONGER.get(device.type, 1), device) / seeds


class PairsOfImages(Dataset):
    """The pairs as a data set of 8-bit images, each made a tensor when it is asked for, as torchvision's are."""

    def __init__(self, data: PairedData, n: int):
        rows = torch.arange(n) % len(data)
        images = {name: (255 * x).round().byte().movedim(1, -1).squeeze(-1) for name, x in data.batch(rows).items()}
        self.images = {name: x.cpu().numpy() for name, x in images.items()}
        self.labels = data.labels[rows].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], int]:
        pair = {name: to_tensor(Image.fromarray(np.asarray(images[row]))) for name, images in self.images.items()}
        return pair, self.labels[row]


def plain_loop(model: DMVAE, data: PairedData, batch_size: int, device: torch.device) -> Callable[[], float]:
    """A plain loop: one sample at a time through a data loader, one decoder pass per reconstruction, every term logged.

    It computes Eq. 3 on the same networks, as the authors' release does it.
    """
    model.to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    loader = DataLoader(PairsOfImages(data, STEPS * batch_size), batch_size, shuffle=True)

    def loop() -> None:
        log: dict[str, float] = {}
        for batch, _ in tqdm(loader, leave=False):
            batch = {name: x.to(device) for name, x in batch.items()}
            posterior = model.infer(batch)
            loss = torch.zeros((), device=device)
            for target, x in batch.items():
                private = posterior.private[target]
                for source, shared in {"joint": posterior.joint, **posterior.shared}.items():
                    logits = model.decode(target, private.rsample(), shared.rsample())
                    error = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1).mean()
                    terms = {
                        "error": model.weights[target] * error,
                        "private": private.kl().mean(),
                        "shared": shared.kl().mean(),
                    }
                    loss = loss + sum(terms.values())
                    for name, value in terms.items():
                        log[f"{target}<-{source}/{name}"] = log.get(f"{target}<-{source}/{name}", 0.0) + value.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return lambda: seconds(loop, device) / STEPS


def multivae(model: DMVAE, data: PairedData, batch_size: int, device: torch.device) -> Callable[[], float]:
    """One epoch of the DMVAE of the package `multivae` with its own trainer, on the same networks, all pairs in memory."""
    from multivae.data.datasets.base import MultimodalBaseDataset

    pairs = data.batch(torch.arange(STEPS * batch_size) % len(data))
    trainer = multivae_trainer(model, MultimodalBaseDataset(pairs), batch_size, device)
    return lambda: seconds(lambda: trainer.train_step(1), device) / STEPS


CONTESTANTS = {"dmvae_lib": ours, "plain data-loader loop": plain_loop, "MultiVae's trainer": multivae}
ON_A_GPU = {f"dmvae_lib, {SIDE_BY_SIDE} seeds side by side": partial(ours, seeds=SIDE_BY_SIDE)}


# --- the limits ---------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, n: int | None = None) -> float:
    """FLOP per second of a float32 matrix product, the best of several; on a GPU in TF32, as torch's convolutions."""
    n = n or (8_192 if device.type == "cuda" else 1_536)
    a, b = torch.randn(2, n, n, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else precision)
    try:
        return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))
    finally:
        torch.set_float32_matmul_precision(precision)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes, the best of several."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def operations(model: DMVAE, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the matrix products and convolutions of one update, as its layers say."""
    as_said = patch.object(Upsampling, "forward", nn.ConvTranspose2d.forward)
    with as_said, FlopCounterMode(display=False) as counter:
        model.loss(batch).total.backward()
    return counter.get_total_flops()


# --- the measurement ----------------------------------------------------------------------------------------------


def measure(place: Setting, steps_of: dict[str, Callable] = CONTESTANTS, rounds: int = ROUNDS) -> pd.DataFrame:
    """A line per contestant: pairs per second and ms per update (median over rounds), how many times faster dmvae_lib is
    (median of the rounds' ratios), GFLOP/s and their share of the matrix-product rate; the limits are in `attrs`."""
    device, batch_size, data = resolve_device(place.device), place.profile.batch_size, place.digits.train
    made = {}
    for name, contestant in steps_of.items():
        torch.manual_seed(0)
        with _silence():
            made[name] = contestant(build(DMVAE_DIGITS, place.profile), data, batch_size, device)
            made[name]()  # warm: allocations, choice of kernels
    spent: dict[str, list[float]] = {name: [] for name in made}
    rates = []
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        rates.append(matmul_rate(device))
        for name, work in made.items():
            with _silence():
                spent[name].append(work())
    flops = operations(build(DMVAE_DIGITS, place.profile), data.batch(torch.arange(batch_size)))
    rate = statistics.median(rates)
    lines = []
    for name, times in spent.items():
        step = statistics.median(times)
        ahead = statistics.median(other / own for own, other in zip(spent["dmvae_lib"], times))
        lines.append((name, batch_size / step, 1e3 * step, ahead, flops / step / 1e9, flops / step / rate))
    columns = ["trainer", "pairs per second", "ms per update", "ours is faster by", "GFLOP/s", "share of matmul rate"]
    table = pd.DataFrame(lines, columns=columns).set_index("trainer")
    table.attrs = {"GFLOP per update": flops / 1e9, "matmul GFLOP/s": rate / 1e9, "copy GB/s": bandwidth(device) / 1e9}
    return table


@contextlib.contextmanager
def _silence():
    """Others' trainers print, log and draw bars; a table is all that is wanted here."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    options = command_line(__doc__, "profile", "device", "data").parse_args()
    try:
        place = setting(**vars(options))
        device = resolve_device(options.device)
        steps_of = CONTESTANTS | (ON_A_GPU if device.type == "cuda" else {})
        if find_spec("multivae") is None:
            print("MultiVae is not installed and left out; `pip install multivae` brings it.", file=sys.stderr)
            del steps_of["MultiVae's trainer"]
        table = measure(place, steps_of)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    limits = ", ".join(f"{name} {value:.1f}" for name, value in table.attrs.items())
    updates = f"{STEPS} updates" + (f", {STEPS * LONGER[device.type]:,} of ours" if device.type in LONGER else "")
    caption = f"Training DMVAE on {where(device)} (batch {place.profile.batch_size}, median of {ROUNDS} rounds of {updates}). {limits}."
    results = Results(place, "dmvae_lib/benchmark.py")
    results.frame("benchmark", table.round(3), caption)
    results.figure("benchmark_bars", benchmark_bars(table), caption)
    print(f"{caption}\n{table.round(2).to_string()}")


if __name__ == "__main__":
    main()
