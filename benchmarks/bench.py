"""`make bench`: how fast DMVAE trains here, beside other ways to train the same networks and the machine's own limits."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec

import pandas as pd
import torch
import torch.nn.functional as F
from independent import command_line, multivae_trainer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor
from tqdm.auto import tqdm

from dmvae_lib import DMVAE, DMVAEError, PairedData, Schedule, train
from dmvae_lib.paper.rows.digits import DMVAE_ROW
from dmvae_lib.paper.runs import Setting, setting
from dmvae_lib.paper.tables import Results
from dmvae_lib.training import resolve_device

STEPS, ROUNDS = 20, 5  # updates timed at a stretch; every contestant gets its stretch in each round
LONGER = {"cuda": 50}  # ours is timed over so many times STEPS, where STEPS updates are over at once
Work = Callable[[], float]  # updates, and returns seconds per update


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work()` takes, with the device's queue empty before and after."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def seconds_per_update(updates: Callable[[int], object], n: int, device: torch.device) -> float:
    """Of `updates(n)` alone: the time of the first one, with all that comes before it, is taken off."""
    alone = seconds(lambda: updates(1), device)
    return (seconds(lambda: updates(1 + n), device) - alone) / n


def where(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# --- the contestants --------------------------------------------------------------------------------------------------


def ours(model: DMVAE, data: PairedData, batch_size: int, device: torch.device, precision: str = "float32") -> Work:
    """This library's `train`."""

    def updates(n: int) -> None:
        train(model, data, Schedule(n, batch_size, precision=precision), device=device)

    return lambda: seconds_per_update(updates, STEPS * LONGER.get(device.type, 1), device)


class PairsOfImages(Dataset):
    """The pairs as a data set of 8-bit images, each made a tensor when it is asked for, as torchvision's are."""

    def __init__(self, data: PairedData, n: int):
        batch = data.batch(torch.arange(n) % len(data))
        self.images = {name: (255 * x).round().byte().movedim(1, -1).squeeze(-1).numpy() for name, x in batch.items()}

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: to_tensor(Image.fromarray(images[row])) for name, images in self.images.items()}


def plain_loop(model: DMVAE, data: PairedData, batch_size: int, device: torch.device) -> Work:
    """A plain loop: one sample at a time through a data loader, one decoder pass per reconstruction, every term logged.

    It computes Eq. 3 on the same networks, as the authors' release does it.
    """
    model.to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    loader = DataLoader(PairsOfImages(data, STEPS * batch_size), batch_size, shuffle=True)

    def loop() -> None:
        log: dict[str, float] = {}
        for batch in tqdm(loader, leave=False):
            batch = {name: x.to(device) for name, x in batch.items()}
            posterior = model.infer(batch)
            loss = torch.zeros((), device=device)
            for target, x in batch.items():
                private = posterior.private[target]
                for source, shared in {"joint": posterior.joint, **posterior.shared}.items():
                    logits = model.decode(target, private.rsample(), shared.rsample())
                    error = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1).mean()
                    terms = {"private": private.kl().mean(), "shared": shared.kl().mean()}
                    terms["error"] = model.weights[target] * error
                    loss = loss + sum(terms.values())
                    for name, value in terms.items():
                        log[f"{target}<-{source}/{name}"] = log.get(f"{target}<-{source}/{name}", 0.0) + value.item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return lambda: seconds(loop, device) / STEPS


def multivae(model: DMVAE, data: PairedData, batch_size: int, device: torch.device) -> Work:
    """One epoch of the DMVAE of the package `multivae` with its own trainer, on the same networks, all pairs in memory."""
    from multivae.data.datasets.base import MultimodalBaseDataset

    pairs = data.batch(torch.arange(STEPS * batch_size) % len(data))
    trainer = multivae_trainer(model, MultimodalBaseDataset(pairs), batch_size, device)
    return lambda: seconds(lambda: trainer.train_step(1), device) / STEPS


OURS = "dmvae_lib"
CONTESTANTS: dict[str, Callable[..., Work]] = {
    OURS: ours,
    f"{OURS}, bfloat16": partial(ours, precision="bfloat16"),
    "plain data-loader loop": plain_loop,
    "MultiVae's trainer": multivae,
}


# --- the limits ---------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP per second of a matrix product, the best of several; float32 on a GPU is TF32, as torch's convolutions are."""
    n = 8_192 if device.type == "cuda" else 1_536
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))
    finally:
        torch.set_float32_matmul_precision(before)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 256 MiB reads and writes, the best of several."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def operations(model: DMVAE, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of the matrix products and convolutions of one update, as its layers say."""
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).total.backward()
    return counter.get_total_flops()


# --- the measurement ----------------------------------------------------------------------------------------------


def fresh(place: Setting) -> DMVAE:
    """The profile's DMVAE, untrained."""
    torch.manual_seed(0)
    return DMVAE_ROW.model(place.splits(DMVAE_ROW.data), place.profile)


def measure(place: Setting, contestants: Mapping[str, Callable] = CONTESTANTS, rounds: int = ROUNDS) -> pd.DataFrame:
    """A line per contestant: pairs per second and ms per update (median over rounds), how many times as fast dmvae_lib
    in float32 is (median of the rounds' ratios), GFLOP/s and their share of its precision's matrix-product rate.

    The limits are in `attrs`. Contestants take turns, so that what else the machine does meets all of them.
    """
    device, batch_size = resolve_device(place.device), place.profile.batch_size
    data = place.splits(DMVAE_ROW.data).train
    precisions = {name: "bfloat16" if "bfloat16" in name else "float32" for name in contestants}
    rates, spent = [], []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # trainers print and draw bars
        made = {name: contestant(fresh(place), data, batch_size, device) for name, contestant in contestants.items()}
        for work in made.values():
            work()  # warm: allocations, choice of kernels
        for _ in range(rounds):
            rates.append({name: matmul_rate(device, name) for name in dict.fromkeys(precisions.values())})
            spent.append({name: work() for name, work in made.items()})
    flops = operations(fresh(place), data.batch(torch.arange(batch_size)))
    rate, times = pd.DataFrame(rates).median(), pd.DataFrame(spent).rename_axis(columns="trainer")
    step = times.median()
    table = pd.DataFrame({"pairs per second": batch_size / step, "ms per update": 1e3 * step})
    table["ours is faster by"] = times.div(times[OURS], axis=0).median()
    table["GFLOP/s"] = flops / step / 1e9
    table["share of matmul rate"] = flops / step / rate[list(precisions.values())].to_numpy()
    limits = {f"matmul GFLOP/s, {precision}": measured / 1e9 for precision, measured in rate.items()}
    table.attrs = {"GFLOP per update": flops / 1e9, **limits, "copy GB/s": bandwidth(device) / 1e9}
    return table


def bars(table: pd.DataFrame) -> Figure:
    """`measure`'s pairs per second as bars, each with its share of the machine's matrix-product rate."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    figure, ax = plt.subplots(figsize=(6.0, 0.6 * len(table) + 1.1))
    drawn = ax.barh(table.index, table["pairs per second"], color=sns.color_palette("colorblind")[: len(table)])
    ax.bar_label(drawn, [f" {share:.0%}" for share in table["share of matmul rate"]], fontsize="small")
    ax.set(xlabel="pairs per second (label: share of the matrix-product rate of its precision)")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(False)
    sns.despine(ax=ax, left=True)
    figure.tight_layout()
    return figure


def main() -> None:
    options = command_line(__doc__, profile="quick", device="auto", data="data").parse_args()
    contestants = dict(CONTESTANTS)
    if find_spec("multivae") is None:
        print("MultiVae is not installed and left out; `pip install multivae` brings it.", file=sys.stderr)
        del contestants["MultiVae's trainer"]
    logging.disable(logging.INFO)  # MultiVae's trainer says much
    try:
        place = setting(**vars(options))
        device = resolve_device(options.device)
        table = measure(place, contestants)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    limits = ", ".join(f"{name} {value:.1f}" for name, value in table.attrs.items())
    updates = f"{STEPS} updates" + (f", {STEPS * LONGER[device.type]:,} of ours" if device.type in LONGER else "")
    caption = f"Training DMVAE on {where(device)} (batch {place.profile.batch_size}, median of {ROUNDS} rounds of "
    caption += f"{updates}). {limits}."
    results = Results(place, "benchmarks/bench.py")
    results.frame("benchmark", table.round(3), caption)
    results.figure("benchmark_bars", bars(table), caption)
    print(f"{caption}\n{table.round(2).to_string()}")


if __name__ == "__main__":
    main()
