"""`make bench`: how fast DMVAE trains here, beside other ways to train the same networks and the machine's own limits.

One run measures the networks of profiles quick and subset, on random images: what they show does not matter here.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.digits import SHAPES
from dmvae_lib.paper.profiles import Profile, get_profile
from dmvae_lib.paper.rows.digits import DMVAE_ROW
from dmvae_lib.paper.runs import cpu_name, setting
from dmvae_lib.paper.tables import Results
from dmvae_lib.training import model_objective, resolve_device, resolve_precision

NETWORKS = ("quick", "subset")  # the profiles whose networks and batches are measured
ITEMS = 8_000  # images of each modality
STEPS, ROUNDS = 20, 5  # updates timed at a stretch; every contestant gets its stretch in each round
LONGER = {"cuda": 50}  # ours is timed over so many times STEPS, where STEPS updates are over at once
ALONE = 3  # stretches of each process that is measured alone or beside others
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def peak_mb(device: torch.device) -> float:
    """MB, so far: of the device's memory allocated at most so far; of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the peak of the process that started this one
        (kilobytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1.024 * int(kilobytes) / 1e3
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else 1.024 * peak / 1e3


# --- the contestants --------------------------------------------------------------------------------------------------


def ours(
    model: DMVAE,
    data: PairedData,
    batch_size: int,
    device: torch.device,
    steps: int,
    precision: str = "float32",
    compiled: bool = False,
) -> Work:
    """This library's `train`; compiled: its objective by torch.compile, whose time to compile is not counted."""
    objective = torch.compile(model_objective) if compiled else model_objective

    def updates(n: int) -> None:
        train(model, data, Schedule(n, batch_size, precision=precision), device=device, objective=objective)

    return lambda: seconds_per_update(updates, steps * LONGER.get(device.type, 1), device)


class PairsOfImages(Dataset):
    """The pairs as a data set of 8-bit images, each made a tensor when it is asked for, as torchvision's are."""

    def __init__(self, data: PairedData, n: int):
        batch = data.batch(torch.arange(n) % len(data))
        self.images = {name: (255 * x).round().byte().movedim(1, -1).squeeze(-1).numpy() for name, x in batch.items()}

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: to_tensor(Image.fromarray(images[row])) for name, images in self.images.items()}


def plain_loop(model: DMVAE, data: PairedData, batch_size: int, device: torch.device, steps: int) -> Work:
    """A plain loop: one sample at a time through a data loader, one decoder pass per reconstruction, every term logged.

    It computes Eq. 3 on the same networks, as the authors' release does it.
    """
    model.to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    loader = DataLoader(PairsOfImages(data, steps * batch_size), batch_size, shuffle=True)

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

    return lambda: seconds(loop, device) / steps


def multivae(
    model: DMVAE, data: PairedData, batch_size: int, device: torch.device, steps: int, precision: str = "float32"
) -> Work:
    """One epoch of the DMVAE of the package `multivae` with its own trainer, on the same networks, all pairs in memory.

    As it comes, or, in fairness to ours, its networks in bfloat16; its own arithmetic would give NaN there."""
    from multivae.data.datasets.base import MultimodalBaseDataset

    if precision == "bfloat16":
        for network in (*model.encoders.values(), *model.decoders.values()):
            network.forward = partial(_in_bfloat16, network.forward, device)
    pairs = data.batch(torch.arange(steps * batch_size) % len(data))
    trainer = multivae_trainer(model, MultimodalBaseDataset(pairs), batch_size, device)
    return lambda: seconds(lambda: trainer.train_step(1), device) / steps


def _in_bfloat16(forward: Callable[[Tensor], Tensor], device: torch.device, x: Tensor) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return forward(x).float()


OURS, THEIRS = "dmvae_lib", "MultiVae's trainer"


def contestants(device: torch.device) -> dict[str, Callable[..., Work]]:
    """Who is measured on this device: bfloat16 where it is the faster one, MultiVae's trainer where it is installed."""
    found = {OURS: ours, "plain data-loader loop": plain_loop}
    if find_spec("multivae"):
        found[THEIRS] = multivae
    if resolve_precision("auto", device) == "bfloat16":
        low = {OURS: ours, THEIRS: multivae}
        found |= {f"{name}, bfloat16": partial(low[name], precision="bfloat16") for name in low if name in found}
    if device.type == "cuda":  # on a CPU the former is no other, and compiling gains nothing in a minute and a half
        found[f"{OURS}, float32 exact"] = partial(ours, precision="float32-exact")
        found[f"{OURS}, compiled"] = partial(ours, compiled=True)
        found[f"{OURS}, bfloat16, compiled"] = partial(ours, precision="bfloat16", compiled=True)
    return found


# --- the limits ---------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP per second of a matrix product, the best of several; float32 on a GPU is TF32, unless exact."""
    n = 8_192 if device.type == "cuda" else 1_536
    a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, precision.removesuffix("-exact")))
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32-exact" else "high")
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


def random_pairs(profile: Profile) -> Splits:
    """As many images of noise as quick's and subset's have, paired as the profile says."""
    generator = torch.Generator().manual_seed(0)
    items = {name: torch.randint(256, (ITEMS, *shape), generator=generator).byte() for name, shape in SHAPES.items()}
    data = PairedData.pair(items, dict.fromkeys(SHAPES, torch.arange(ITEMS) % 10), profile.permutations)
    return Splits(data, data, {}, profile.source)


def fresh(profile: Profile, splits: Splits) -> DMVAE:
    """The profile's DMVAE, untrained."""
    torch.manual_seed(0)
    return DMVAE_ROW.model(splits, profile)


def measure(
    profile: Profile,
    splits: Splits,
    device: torch.device,
    who: Mapping[str, Callable],
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> pd.DataFrame:
    """A line per contestant: pairs per second and ms per update (median over rounds), how many times as fast dmvae_lib
    in float32 is (median of the rounds' ratios), GFLOP/s and their share of its precision's matrix-product rate.

    The limits are in `attrs`. Contestants take turns, so that what else the machine does meets all of them.
    """
    batch_size, data = profile.batch_size, splits.train
    kinds = {"bfloat16": "bfloat16", "exact": "float32-exact"}
    precisions = {name: next((kind for word, kind in kinds.items() if word in name), "float32") for name in who}
    rates, spent = [], []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # trainers print and draw bars
        made = {name: make(fresh(profile, splits), data, batch_size, device, steps) for name, make in who.items()}
        for work in made.values():
            work()  # warm: allocations, choice of kernels
        for _ in range(rounds):
            rates.append({name: matmul_rate(device, name) for name in dict.fromkeys(precisions.values())})
            spent.append({name: work() for name, work in made.items()})
    flops = operations(fresh(profile, splits), data.batch(torch.arange(batch_size)))
    rate, times = pd.DataFrame(rates).median(), pd.DataFrame(spent).rename_axis(columns="trainer")
    step = times.median()
    table = pd.DataFrame({"pairs per second": batch_size / step, "ms per update": 1e3 * step})
    table["ours is faster by"] = times.div(times[OURS], axis=0).median()
    table["GFLOP/s"] = flops / step / 1e9
    table["share of matmul rate"] = flops / step / rate[list(precisions.values())].to_numpy()
    limits = {f"matmul GFLOP/s, {precision}": measured / 1e9 for precision, measured in rate.items()}
    table.attrs = {"GFLOP per update": flops / 1e9, **limits, "copy GB/s": bandwidth(device) / 1e9}
    return table


# --- processes of their own: memory, and how tables are filled --------------------------------------------------------


def alone(profile: str, contestant: str, steps: str, device: str) -> dict[str, float]:
    """In a process of its own: {"seconds per update", "peak MB" above the start}; between, it waits for a line of input."""
    found, plan = resolve_device(device), get_profile(profile)
    torch.optim.Adam([torch.zeros(1)])  # loads a hundred MB of torch's modules
    start, splits = peak_mb(found), random_pairs(plan)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        work = contestants(found)[contestant](fresh(plan, splits), splits.train, plan.batch_size, found, int(steps))
        work()
    print("ready", flush=True)
    sys.stdin.readline()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        spent = sum(work() for _ in range(ALONE)) / ALONE
    return {"seconds per update": spent, "peak MB": peak_mb(found) - start}


def side_by_side(
    n: int, threads: int, profile: str, device: str = "auto", contestant: str = OURS, steps: int = STEPS
) -> list[dict[str, float]]:
    """What `alone` finds in each of n processes that work at the same time, of so many threads each.

    Raises DMVAEError with a process's last words where it fails.
    """
    command = [sys.executable, __file__, "--device", device, "--alone", profile, contestant, str(steps)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = [subprocess.Popen(command, text=True, env=environment, **pipes) for _ in range(n)]
    try:
        started = [process.stdout.readline() for process in processes]
        if all(line == "ready\n" for line in started):
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
        ends = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, words) in zip(processes, ends):
        if process.returncode:
            raise DMVAEError(f"{n} processes, {profile}, {contestant}: one of them failed: {words.strip()[-600:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


def runs_per_hour(steps: int, found: Sequence[Mapping[str, float]]) -> float:
    """How many runs of so many updates processes at this speed finish in an hour, all together."""
    return sum(3_600 / (steps * process["seconds per update"]) for process in found)


def alone_and_together(
    profile: Profile, device: str, cores: int, who: Iterable[str]
) -> tuple[list[float], pd.DataFrame]:
    """(peak MB of each contestant in one process of a thread for each core; its runs per hour, of the profile's length,
    so and, on a CPU, in a process on each core)."""
    one, each = f"1 process of {cores} threads", f"{cores} processes of 1 thread"
    ways = {one: (1, cores)}
    if resolve_device(device).type == "cpu":  # gpu.py has processes side by side on a GPU
        ways[each] = (cores, 1)
    found = {name: {way: side_by_side(*of, profile.name, device, name) for way, of in ways.items()} for name in who}
    peaks = [of[one][0]["peak MB"] for of in found.values()]
    return peaks, pd.DataFrame(found).map(partial(runs_per_hour, profile.steps)).T.rename_axis("trainer")


def bars(table: pd.DataFrame, device: str) -> Figure:
    """Pairs per second as bars, each with its share of the machine's matrix-product rate: a panel for each network."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    networks = table.index.unique(0)
    figure, axes = plt.subplots(1, len(networks), figsize=(9.0, 0.4 * len(table.loc[networks[0]]) + 1.3), sharey=True)
    for ax, name in zip(axes, networks):
        part = table.loc[name]
        drawn = ax.barh(part.index, part["pairs per second"], color=sns.color_palette("colorblind")[: len(part)])
        ax.bar_label(drawn, [f" {share:.0%}" for share in part["share of matmul rate"]], fontsize="small")
        ax.set(xlabel="pairs per second", title=f"networks of {name}")
        ax.margins(x=0.16)
        ax.grid(False)
        sns.despine(ax=ax, left=True)
    axes[0].invert_yaxis()
    figure.suptitle(f"{device}; labels: share of its matrix-product rate in that precision", fontsize="small", y=0.02)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = command_line(__doc__, device="auto")
    parser.add_argument("--alone", nargs=3, metavar=("PROFILE", "CONTESTANT", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)  # MultiVae's trainer says much
    try:
        if options.alone:
            print(json.dumps(alone(*options.alone, options.device)))
            return
        device = resolve_device(options.device)
        who, cores, tables, rates = contestants(device), os.cpu_count() or 1, {}, {}
        for missing in {THEIRS} - who.keys():
            print(f"{missing} is left out; `pip install multivae` brings it.", file=sys.stderr)
        for profile in map(get_profile, NETWORKS):
            tables[profile.name] = table = measure(profile, random_pairs(profile), device, who)
            table["peak MB"], rates[profile.name] = alone_and_together(profile, options.device, cores, who)
        place = setting("quick", device=options.device)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    table = pd.concat(tables, names=["networks"])
    limits = "; ".join(
        f"{name}: " + ", ".join(f"{what} {value:.1f}" for what, value in of.attrs.items())
        for name, of in tables.items()
    )
    caption = f"Training DMVAE on {where(device)}, networks and batches of two profiles on random images, "
    caption += f"median of {ROUNDS} rounds in turn, {STEPS} updates each. {limits}."
    if "bfloat16" not in caption:
        caption += " This device multiplies bfloat16 no faster than float32, so that it is left out."
    results = Results(place, "benchmarks/bench.py")
    results.frame("benchmark", table.round(3), caption)
    results.figure("benchmark_bars", bars(table, where(device)), caption)
    print(f"{caption}\n{table.round(2).to_string()}")
    per_hour = pd.concat(rates, names=["networks"])
    lengths = ", ".join(f"{get_profile(name).steps:,} updates of {name}" for name in tables)
    words = f"Runs of DMVAE in an hour on {where(device)}, {lengths}, evaluation aside: how tables are filled fastest."
    print(f"{words}\n{results.frame('runs_per_hour', per_hour.round(2), words).to_string()}")


if __name__ == "__main__":
    main()
