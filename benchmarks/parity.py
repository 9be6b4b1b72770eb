"""`make parity`: whether training in bfloat16 changes the scores: what a profile trains in it, trained in float32 beside.

Of each row the first SEEDS seeds, and the next ones that are here in both.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count, takewhile

import pandas as pd
from bench import where
from independent import command_line

from dmvae_lib import DMVAEError
from dmvae_lib.paper.pages import counted
from dmvae_lib.paper.published import MEASURES
from dmvae_lib.paper.rows import Row
from dmvae_lib.paper.rows.digits import TABLE1, TABLE3
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import Results, interval
from dmvae_lib.paper.workers import train_all
from dmvae_lib.training import resolve_device, resolve_precision

ROWS = (*TABLE1.values(), TABLE3["no private spaces"])
UPDATES = 2_400  # after which scores are compared: the profile's runs have them there, the others end there


def in_float32(place: Setting) -> Setting:
    """The setting on the validation split, in float32 and with the short budget; its runs are not the profile's."""
    name = f"{place.profile.name}-float32"
    short = {"steps": UPDATES, "particle_steps": UPDATES, "validate_every": 0}
    return replace(
        place, evaluation="validation", profile=replace(place.profile, name=name, precision="float32", **short)
    )


def seeds_of(row: Row, both: tuple[Setting, Setting]) -> range:
    """As many as the settings say, and further ones whose runs are here in both."""
    further = takewhile(lambda seed: all(Run(row, seed, to).recorded() for to in both), count(both[0].seeds))
    return range(both[0].seeds + len(list(further)))


def in_bfloat16(run: Run) -> dict[str, float]:
    """The run's validation scores after the short budget, out of its entry; it is trained where it has none.

    Raises DMVAEError for a run that was trained in float32, or has no score there.
    """
    made, curve = run.entry["made"], run.entry["curve"]
    if made["precision"] != "bfloat16":
        anew = f"delete {run.folder} and {run.entry_path} to train it in bfloat16"
        raise DMVAEError(f"{run} was trained in {made['precision']}, expected bfloat16; {anew}.")
    if UPDATES not in curve["updates"]:
        updates = ", ".join(map(str, curve["updates"]))
        raise DMVAEError(f"{run} has no validation scores after {UPDATES} updates (only {updates}).")
    at = curve["updates"].index(UPDATES)
    return {measure: curve[measure][at] for measure in run.scores}


def compare(scores: pd.DataFrame) -> pd.DataFrame:
    """scores: shares, a line per (row, seed), columns (measure, precision). A line per row and measure, in percent: the
    means, the mean of the differences bfloat16 - float32 paired by seed with its 95 % interval, the spread of float32
    over seeds (largest less smallest), whether the mean difference lies within it, and how many seeds there are."""
    lines = []
    for row, of_row in scores.groupby(level=0, sort=False):
        for measure in of_row.columns.unique(0):
            percent = 100 * of_row[measure]
            difference, *ends = interval((percent["bfloat16"] - percent["float32"]).tolist())
            spread = percent["float32"].max() - percent["float32"].min()
            facts = {"row": row, "measure": MEASURES.get(measure, measure), **percent.mean()}
            facts |= {"difference": difference, "from": ends[0], "to": ends[1], "spread of seeds": spread}
            lines.append(facts | {"agrees": "yes" if abs(difference) <= spread else "no", "seeds": len(percent)})
    return pd.DataFrame(lines).set_index(["row", "measure"])


def main() -> None:
    options = command_line(__doc__, profile="subset", seeds=3, device="auto", data="data").parse_args()
    try:
        if options.seeds < 2:
            raise DMVAEError(
                f"--seeds {options.seeds}; expected at least 2, whose spread is what differences are held against."
            )
        place = setting(**vars(options))
        if resolve_precision(place.profile.precision, resolve_device(options.device)) != "bfloat16":
            raise DMVAEError(
                f"profile {place.profile.name} trains in float32 on this device; take one that multiplies bfloat16 "
                "faster, as docs/speed.md says, and a profile whose precision is auto."
            )
        both = place, in_float32(place)
        seeds = [(row, seed) for row in ROWS for seed in seeds_of(row, both)]
        low, high = ([Run(row, seed, to) for row, seed in seeds] for to in both)
        found: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
        for runs, scores, precision in ((low, in_bfloat16, "bfloat16"), (high, lambda run: run.scores, "float32")):
            train_all([run for run in runs if run.recorded() is None], "auto")
            for run in runs:
                of_run = found.setdefault((run.row.title, run.seed), {})
                of_run |= {(measure, precision): share for measure, share in scores(run).items()}
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    table = compare(pd.DataFrame.from_dict(found, orient="index"))
    caption = (
        f"Training in bfloat16 against float32 on {where(resolve_device(options.device))}, validation split, "
        f"{UPDATES:,} updates of {place.profile.batch_size}, {counted(table['seeds'])}, percent. "
        "Difference: bfloat16 less float32, paired by seed, with its 95 % interval; agrees: its mean is no more than "
        "float32's seeds differ by, largest less smallest."
    )
    shown = Results(place, "benchmarks/parity.py").frame("parity", table.round(2), caption, low)
    print(f"{caption}\n{shown.to_string()}")


if __name__ == "__main__":
    main()
