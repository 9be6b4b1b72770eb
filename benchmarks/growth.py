"""`make growth`: time per update and peak memory against pairs, batch size, particles and modalities."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from bench import LONGER, peak_mb, seconds_per_update, where
from independent import command_line
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dmvae_lib import DMVAE, DMVAEError, Modality, PairedData, Schedule, train
from dmvae_lib.models import MultimodalVAE
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.digits import MNIST_SVHN, SHAPES
from dmvae_lib.paper.profiles import Profile, get_profile
from dmvae_lib.paper.rows.digits import TABLE1
from dmvae_lib.paper.runs import setting
from dmvae_lib.paper.tables import Results
from dmvae_lib.training import resolve_device

ITEMS = 8_000  # per modality; random pixels, since what they show does not matter here
AXES = {"pairs": tuple(ITEMS * n for n in (1, 6, 35, 210)), "batch size": (25, 50, 100, 200)}  # {against: values}
AXES |= {"particles": (1, 3, 10, 30), "modalities": (1, 2, 3, 5)}  # the paper has 1.68 million pairs
WORK = {  # {against: (how the work of an update grows, in words)}
    "pairs": (lambda x: 1, "flat"),
    "batch size": (lambda x: x, "∝ B"),
    "particles": (lambda x: x, "∝ K"),
    "modalities": (lambda x: x * (x + 1), "∝ N (N + 1)"),
}
ROUNDS, STRETCH = 3, 0.5  # how often, and for about how many seconds, updates are timed


def case(against: str, value: int, profile: Profile) -> tuple[MultimodalVAE, PairedData, Schedule]:
    """What to train for one point: the profile's DMVAE (MMVAE for the particles), with one size set to `value`."""
    row = TABLE1["MMVAE" if against == "particles" else "DMVAE"]
    if against in ("batch size", "particles"):
        profile = replace(profile, **{against.replace(" ", "_"): value})
    shapes = {f"svhn{i}": SHAPES["svhn"] for i in range(value)} if against == "modalities" else SHAPES
    torch.manual_seed(0)
    items = {name: torch.randint(256, (ITEMS, *shape), dtype=torch.uint8) for name, shape in shapes.items()}
    labels = dict.fromkeys(shapes, torch.arange(ITEMS) % 10)
    data = PairedData.pair(items, labels, value // ITEMS if against == "pairs" else 1)
    if against != "modalities":
        return row.model(Splits(data, data, {}, profile.source), profile), data, row.schedule(profile)
    private, shared = 4, 10
    networks = [MNIST_SVHN.networks("dmvae", "svhn", private, shared, profile.width, "release") for _ in shapes]
    modalities = {name: Modality(*made, private) for name, made in zip(shapes, networks)}
    return DMVAE(modalities, shared), data, row.schedule(profile)


def point(against: str, value: int, profile: Profile, device: torch.device) -> dict[str, float]:
    """To be measured in a process of its own: ms per update, the median of ROUNDS, and MB at the peak above the start."""
    torch.optim.Adam([torch.zeros(1)])  # loads a hundred MB of torch's modules, which no size changes
    start = peak_mb(device)
    model, data, plan = case(against, value, profile)

    def updates(n: int) -> None:
        train(model, data, replace(plan, steps=n), device=device)

    updates(1)  # warm: allocations, choice of kernels
    few = 2 * LONGER.get(device.type, 1)
    n = round(min(25 * few, max(few, STRETCH / max(1e-3, seconds_per_update(updates, few, device)))))
    per_update = statistics.median(seconds_per_update(updates, n, device) for _ in range(ROUNDS))
    return {"ms per update": 1e3 * per_update, "peak MB": peak_mb(device) - start}


def measure(profile: str, device: str = "auto", axes: Mapping[str, Sequence[int]] = AXES) -> pd.DataFrame:
    """A line for every axis and value, each measured by a fresh Python: ms per update, peak MB."""
    lines = []
    points = [(against, value) for against, values in axes.items() for value in values]
    for against, value in tqdm(points, desc="growth", unit="point", leave=False):
        command = [sys.executable, __file__, "--profile", profile, "--device", device]
        done = subprocess.run([*command, "--point", against, str(value)], capture_output=True, text=True)
        if done.returncode:
            raise DMVAEError(f"growth: {against} = {value} failed: {done.stderr.strip()[-600:]}")
        lines.append({"against": against, "value": value, **json.loads(done.stdout.splitlines()[-1])})
    return pd.DataFrame(lines).set_index(["against", "value"])


def figure(table: pd.DataFrame) -> Figure:
    """A column for every axis of `measure`'s table: time above, memory below, both beside the growth of the work."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, NullLocator

    axes_of = table.index.get_level_values("against").unique()
    shown, axes = plt.subplots(2, len(axes_of), figsize=(3.4 * len(axes_of), 6), squeeze=False, sharex="col")
    for column, against in zip(axes.T, axes_of):
        work, words = WORK[against]
        for ax, measured in zip(column, table.columns):
            values = table.loc[against, measured]
            line = pd.Series([work(x) for x in values.index], values.index)
            line *= values.iloc[-1] / line.iloc[-1]
            ax.plot(line, "--", color="0.5", label=words)
            ax.plot(values, "o-")
            ax.set(xlabel=against, ylabel=measured)
            if against == "pairs":
                ax.set_xscale("log")
            ax.set_ylim(0, 1.1 * max(values.max(), line.max()))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(values.index, [EngFormatter(sep="")(x) for x in values.index])
            ax.legend(fontsize="small", loc="lower right")
    shown.tight_layout()
    return shown


def main() -> None:
    parser = command_line(__doc__, profile="quick", device="auto")
    parser.add_argument("--point", nargs=2, metavar=("AGAINST", "VALUE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        device = resolve_device(options.device)
        if options.point:
            against, value = options.point
            print(json.dumps(point(against, int(value), get_profile(options.profile), device)))
            return
        place = setting(options.profile, device=options.device)
        table = measure(options.profile, options.device)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    caption = (
        f"Growth of one update's time and of the memory at its peak, data included, on {where(device)}: DMVAE, MMVAE for"
        " the particles (whose batch goes through in chunks), N modalities of SVHN's shape. Dashed: the growth of the"
        " work, N (N + 1) reconstructions in Eq. 3."
    )
    results = Results(place, "benchmarks/growth.py")
    results.frame("growth", table.round(2), caption)
    results.figure("growth_curves", figure(table), caption)
    print(f"{caption}\n{table.round(1).to_string()}")


if __name__ == "__main__":
    main()
