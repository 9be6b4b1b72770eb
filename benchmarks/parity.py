"""`make parity`: whether training in bfloat16 changes the scores: the same runs in both precisions, on validation data."""

from __future__ import annotations

import sys
from dataclasses import replace

import pandas as pd
from bench import where
from independent import command_line

from dmvae_lib import DMVAEError
from dmvae_lib.paper.published import MEASURES
from dmvae_lib.paper.rows.digits import TABLE1, TABLE3
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import Results
from dmvae_lib.paper.workers import train_all
from dmvae_lib.training import resolve_device, resolve_precision

ROWS = (*TABLE1.values(), TABLE3["no private spaces"])
UPDATES = 2_400  # of every row, at most
PRECISIONS = ("float32", "bfloat16")


def places(place: Setting) -> dict[str, Setting]:
    """The setting in each precision, with the short budget; runs of one precision are not the other's."""
    short = {name: min(UPDATES, getattr(place.profile, name)) for name in ("steps", "particle_steps")}
    return {
        name: replace(
            place, profile=replace(place.profile, name=f"{place.profile.name}-{name}", precision=name, **short)
        )
        for name in PRECISIONS
    }


def compare(scores: pd.DataFrame) -> pd.DataFrame:
    """scores: shares, a line per (row, seed), columns (measure, precision). A line per row and measure, in percent: the
    means, the mean of the differences bfloat16 - float32 paired by seed and its standard deviation, the standard
    deviation of float32 over seeds, and whether the mean difference lies within it."""
    lines = []
    for row, of_row in scores.groupby(level=0, sort=False):
        for measure in of_row.columns.unique(0):
            percent = 100 * of_row[measure]
            difference, spread = percent["bfloat16"] - percent["float32"], percent["float32"].std()
            facts = {"row": row, "measure": MEASURES.get(measure, measure), **percent.mean()}
            facts |= {"difference": difference.mean(), "sd of differences": difference.std(), "sd over seeds": spread}
            lines.append(facts | {"agrees": "yes" if abs(difference.mean()) <= spread else "no"})
    return pd.DataFrame(lines).set_index(["row", "measure"])


def main() -> None:
    options = command_line(__doc__, profile="subset", seeds=3, device="auto", data="data").parse_args()
    try:
        if options.seeds < 2:
            raise DMVAEError(
                f"--seeds {options.seeds}; expected at least 2, whose spread is what differences are held against."
            )
        place = setting(**vars(options), evaluation="validation")
        if resolve_precision("auto", resolve_device(options.device)) != "bfloat16":
            raise DMVAEError(
                "this device multiplies bfloat16 no faster than float32; take one that does, as docs/speed.md says."
            )
        found = {}
        for precision, there in places(place).items():
            runs = [Run(row, seed, there) for row in ROWS for seed in range(place.seeds)]
            train_all(runs, "auto")
            for run in runs:
                for measure, share in run.scores.items():
                    found.setdefault((run.row.title, run.seed), {})[measure, precision] = share
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    table = compare(pd.DataFrame.from_dict(found, orient="index"))
    updates = places(place)["float32"].profile
    caption = f"Training in bfloat16 against float32 on {where(resolve_device(options.device))}, validation split, "
    caption += f"{updates.steps:,} updates of {updates.batch_size} (MMVAE: {updates.particle_steps:,}), {place.seeds} seeds, percent."
    shown = Results(replace(place, evaluation="test"), "benchmarks/parity.py").frame("parity", table.round(2), caption)
    print(f"{caption}\n{shown.to_string()}")


if __name__ == "__main__":
    main()
