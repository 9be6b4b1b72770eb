"""`make field`: every row of the field's benchmarks, those of the package `multivae` too, trained into the ledger."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from independent import command_line

from dmvae_lib import DMVAEError
from dmvae_lib.paper.rows import cdsprites, polymnist
from dmvae_lib.paper.rows.cdsprites import CDSPRITES_ROWS
from dmvae_lib.paper.rows.polymnist import MISSING, POLYMNIST_ROWS
from dmvae_lib.paper.rows.successors import SUCCESSORS, SUCCESSORS_MISSING
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.workers import train_all


def runs_of(place: Setting, theirs: bool) -> list[Run]:
    """The judges, then seed by seed what decides most first; theirs: the rows that need the package multivae too."""
    judges = (*polymnist.JUDGES.values(), *cdsprites.JUDGES.values())
    sprites = [row for rows in CDSPRITES_ROWS.values() for row in rows.values()]
    full = [*POLYMNIST_ROWS.values(), *(SUCCESSORS.values() if theirs else ()), *sprites]
    gaps = [*MISSING.values(), *(SUCCESSORS_MISSING.values() if theirs else ())]
    later = [Run(row, seed, place) for rows in (full, gaps) for seed in range(place.seeds) for row in rows]
    return [*(Run(row, 0, place) for row in judges), *later]


def main() -> None:
    options = command_line(__doc__, profile="quick", seeds=1, device="auto", data="data", scheduler="none").parse_args()
    chosen = vars(options)
    scheduler = chosen.pop("scheduler")
    installed = find_spec("multivae") is not None
    try:
        place = setting(**chosen)
        if not installed:
            print(f"Left out, for want of the package multivae (pip install multivae): {', '.join(SUCCESSORS)}.")
        train_all(runs_of(place, installed), None if scheduler == "none" else scheduler)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    print("All are in the ledger. `make reproduce` with the same profile makes notebook 14 of them.")


if __name__ == "__main__":
    main()
