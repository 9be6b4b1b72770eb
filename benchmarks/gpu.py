"""The plan for a GPU: golden numbers, speed, and DMVAE trained for as many updates as by profile `paper`, five seeds at once.

    python benchmarks/gpu.py --data data --out runs/gpu --minutes 25

It needs no Jupyter. Each part's table is in --out when the part ends; results/ there has the ledger's entries. Stopped, or
out of minutes, the training goes on from its checkpoints when it is called again with the same --out (and --parts train).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from bench import contestants, measure, random_pairs, side_by_side, where
from tqdm.auto import tqdm

from dmvae_lib import DMVAEError, Schedule
from dmvae_lib.files import atomic_write
from dmvae_lib.paper.profiles import Profile, get_profile
from dmvae_lib.paper.published import TABLE1
from dmvae_lib.paper.rows.digits import DMVAE_ROW, judges, updates
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting, provenance
from dmvae_lib.paper.tables import compare, readable
from dmvae_lib.training import resolve_device

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden import GOLDEN, ROWS, numbers  # noqa: E402

UPDATES, BATCH = 168_000, 100  # profile `paper`'s: ten epochs of 1.68 million pairs
WORKERS = (1, 4, 8, 16)
TOLERANCE = 1e-6  # of the golden numbers in float64, as on every CPU
STEPS = 10  # updates of a measurement, fifty times as many of ours (`bench.LONGER`)


# --- (a) is the mathematics the same here? ----------------------------------------------------------------------------


def golden(device: torch.device, rows: list[str]) -> pd.DataFrame:
    """A line per row: the largest relative difference between the golden numbers and this device's, in float64."""
    recorded, lines = json.loads(GOLDEN.read_text()), {}
    for name in tqdm([name for name in rows if not ROWS[name].fit], desc="golden numbers", leave=False):
        found = numbers(ROWS[name], device)
        differences = [
            abs(found[when][term] - value) / max(abs(value), 1e-3)
            for when, values in recorded[name].items()
            for term, value in values.items()
        ]
        lines[name] = {"largest difference": max(differences), "agrees": max(differences) <= TOLERANCE}
    return pd.DataFrame.from_dict(lines, orient="index")


# --- (b) how fast is it? ----------------------------------------------------------------------------------------------


def speed(device: torch.device, profile: Profile, workers: tuple[int, ...], steps: int) -> dict[str, pd.DataFrame]:
    """ "trainers": `bench.measure`'s table; "workers": pairs per second of n processes together on the one device."""
    splits, who = random_pairs(profile), contestants(device)
    trainers = measure(profile, splits, device, who, rounds=3, steps=steps)
    ours = [name for name in who if name.startswith("dmvae_lib") and "compiled" not in name]
    rates = {}
    for n in tqdm(workers, desc="workers", leave=False):
        for name in ours:
            found = side_by_side(n, 1, profile.name, str(device), name, steps)
            rates.setdefault(name, {})[f"{n} workers"] = sum(
                profile.batch_size / process["seconds per update"] for process in found
            )
    return {"trainers": trainers, "workers": pd.DataFrame.from_dict(rates, orient="index").round(0)}


# --- (c) what does DMVAE reach? ---------------------------------------------------------------------------------------


def long(profile: Profile, steps: int) -> Schedule:
    """`steps` updates of `BATCH` pairs, in the profile's precision."""
    return replace(updates(profile), steps=steps, batch_size=BATCH, log_every=100)


def long_row(steps: int) -> Row:
    """DMVAE, trained for so many updates of 100 pairs."""
    title = f"DMVAE, {steps:,} updates of {BATCH}"
    return replace(DMVAE_ROW, name="dmvae-long", title=title, schedule=partial(long, steps=steps))


def train_seeds(options: argparse.Namespace, place: Setting, until: float) -> list[Run]:
    """The runs that are finished: one process a seed, all at once, stopped at `until` with a checkpoint each."""
    runs = [Run(long_row(options.updates), seed, place) for seed in range(options.seeds)]
    for judge in judges(place, DMVAE_ROW.data).values():
        judge.train()
    command = [sys.executable, __file__]
    for name in ("data", "out", "device", "profile", "updates"):
        command += [f"--{name}", str(getattr(options, name))]
    waiting = [run for run in runs if run.recorded() is None]
    processes = [subprocess.Popen([*command, "--seed", str(run.seed)]) for run in waiting]
    try:
        for run, process in zip(waiting, processes):
            if process.wait(max(1.0, until - time.monotonic())):
                print(f"{run} failed: see above.", file=sys.stderr)
    except subprocess.TimeoutExpired:
        print("out of minutes; call it again to go on.", file=sys.stderr)
    finally:
        for process in processes:  # each then finishes its update and writes its checkpoint
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    return [run for run in runs if run.recorded() is not None]


# --- all of it --------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=Path("data"), help="folder of the data files")
    made.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of what is found, and of checkpoints")
    made.add_argument("--device", default="cuda")
    made.add_argument("--profile", default="subset")
    made.add_argument("--minutes", type=float, default=25.0)
    made.add_argument("--parts", nargs="+", choices=("golden", "speed", "train"), default=["golden", "speed", "train"])
    made.add_argument("--updates", type=int, default=UPDATES)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    made.add_argument("--steps", type=int, default=STEPS, help="updates of a measurement")
    made.add_argument("--rows", nargs="+", default=list(ROWS), help="whose golden numbers are compared")
    made.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return made


def main() -> None:
    options, begun = parser().parse_args(), time.monotonic()
    try:
        device, profile = resolve_device(options.device), get_profile(options.profile)
        profile = replace(profile, precision="auto", writes_results=True)
        out = options.out.resolve()
        place = Setting(profile, options.seeds, options.device, options.data.resolve(), out / "runs", out / "results")
        if options.seed is not None:
            Run(long_row(options.updates), options.seed, place).train()
            return
        provenance(options.device, "float32")  # fails now, not after the training, where the library has no version
        if "golden" in options.parts:
            tell(out, "golden", {"golden numbers, float64": golden(device, options.rows)})
        if "speed" in options.parts:
            found = speed(device, profile, tuple(options.workers), options.steps)
            tell(out, "speed", {f"{name}: pairs per second on {where(device)}": of for name, of in found.items()})
        if "train" in options.parts:
            runs = train_seeds(options, place, begun + 60 * options.minutes)
            scores = {f"{long_row(options.updates).title}, {len(runs)} seeds": [run.scores for run in runs]}
            beside = {title: TABLE1["DMVAE"] for title in scores}
            tell(out, "train", {"coherence on the test pairs, percent": readable(compare(scores, beside))})
    except DMVAEError as error:
        sys.exit(f"\n{error}")


def tell(out: Path, part: str, tables: dict[str, pd.DataFrame]) -> None:
    """Prints the part's tables and keeps them, so that what comes after cannot lose them."""
    text = "\n\n".join(f"{title}\n{table.to_string()}" for title, table in tables.items())
    with atomic_write(out / f"{part}.txt") as temporary:
        temporary.write_text(f"{text}\n")
    print(text, flush=True)


if __name__ == "__main__":
    main()
