"""`make reproduce`: train every row here, execute the notebooks, and compare this machine's numbers with the committed."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pandas as pd
import papermill
import torch
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, locked, remove_leftovers
from dmvae_lib.paper.data.digits import MNIST_SVHN
from dmvae_lib.paper.pages import write_pages
from dmvae_lib.paper.rows import JUDGES, ROWS
from dmvae_lib.paper.rows.digits import RELATED, RELEASE, TABLE1, TABLE3, budgets, learning_curve, strong_judges
from dmvae_lib.paper.rows.flowers import TABLE2
from dmvae_lib.paper.rows.incomplete import incomplete
from dmvae_lib.paper.runs import Run, Setting, project_folder, setting
from dmvae_lib.paper.tables import keeps, table
from dmvae_lib.paper.workers import train_all

DEFAULTS = {"profile": "quick", "seeds": 1, "device": "auto", "data": "data"}  # of every notebook's parameters cell
TABLES = {"Table 1": TABLE1 | RELATED, "Table 2": TABLE2, "Table 3": TABLE3 | {RELEASE.title: RELEASE}}
AT_ONCE = 2  # notebooks: while one draws or waits for a run's lock, another computes


def reproduce(place: Setting, scheduler: str | None = "auto") -> None:
    """Trains what this machine has not trained yet, executes the notebooks, prints the comparison. scheduler: `train_all`'s.

    Killed at any point and called again, it ends with the same results; a second call at the same time waits.
    """
    with locked(place.runs / place.profile.name, f"make reproduce PROFILE={place.profile.name}"):
        train(place, scheduler)
        execute_all(place)
        print(compare_with_committed(place))


def train(place: Setting, scheduler: str | None = "auto", rows: Sequence[str] = ()) -> None:
    """Trains what this machine has not trained yet, of the rows of these names if there are any.

    Raises DMVAEError for rows that the profile lacks, at once for missing data, and as `train_all` does.
    """
    runs = runs_of(place)
    if unknown := set(rows) - {run.row.name for run in runs}:
        known = ", ".join(dict.fromkeys(run.row.name for run in runs))
        raise DMVAEError(f"--train: no rows {', '.join(sorted(unknown))}; this profile has {known}.")
    runs = [run for run in runs if not rows or run.row.name in rows]
    for data in {run.row.data.name: run.row.data for run in runs}.values():
        place.splits(data)
    train_all(runs, scheduler)


def runs_of(place: Setting) -> list[Run]:
    """The judges, the strong ones too where the profile has them, every row and the incomplete ones with each of the
    setting's seeds, the learning curve and what the budget decides with one."""
    once = (learning_curve(place.profile) | budgets(place.profile)).values()
    with_gaps = {row.name: row for of in incomplete(place.profile).values() for row in of.values()}
    rows = [row for row in (ROWS | with_gaps).values() if row not in JUDGES]
    several = [Run(row, seed, place) for seed in range(place.seeds) for row in rows]  # a table of few seeds is whole
    strong = strong_judges(place, MNIST_SVHN).values()
    return [*(Run(row, 0, place) for row in JUDGES), *strong, *several, *(Run(row, 0, place) for row in once)]


# --- the notebooks ----------------------------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    """The project's notebooks in order."""
    return sorted((project_folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute_all(place: Setting) -> None:
    """Every notebook, two at a time, into results/<profile>/notebooks/, or build/ in a profile that keeps no results."""
    # A notebook's own defaults need no parameters cell from outside: so run, it is the notebook as it is committed.
    data = os.path.relpath(place.data, project_folder())
    chosen = {"profile": place.profile.name, "seeds": place.seeds, "device": place.device, "data": data}
    parameters = {name: value for name, value in chosen.items() if value != DEFAULTS[name]}
    executed = place.results / "notebooks" if keeps(place) else project_folder() / "build" / place.profile.name
    remove_leftovers(executed)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // AT_ONCE)))  # of each kernel
    with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(notebooks()), desc="notebooks", unit="notebook") as bar:
        longest_first = reversed(notebooks())  # the last ones train models of their own
        waiting = {pool.submit(execute, path, executed / path.name, parameters): path.stem for path in longest_first}
        try:
            for done in as_completed(waiting):
                bar.set_postfix_str(waiting[done])
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if keeps(place):
        write_pages(place.results.parent)
    print(f"The executed notebooks are in {os.path.relpath(executed)}.")


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Executes a notebook by papermill and puts the result at `target` when it is whole and free of errors.

    What says when, where and how fast it ran (timings, paths, progress bars) is removed: the ledger has the facts.
    """
    widget = "application/vnd.jupyter.widget-view+json"
    with atomic_write(target) as temporary:
        how = {"kernel_name": "python3", "cwd": project_folder(), "extra_arguments": ["--log-level=ERROR"]}
        papermill.execute_notebook(source, temporary, parameters, progress_bar=False, **how)
        notebook = nbformat.read(temporary, as_version=4)
        for part in (notebook, *notebook.cells):
            for key in ("papermill", "widgets", "execution"):
                part.metadata.pop(key, None)
            if "outputs" in part:
                shown = [output for output in part.outputs if output.get("name") != "stderr"]
                part.outputs = [output for output in shown if widget not in output.get("data", {})]
        CoalesceStreamsPreprocessor().preprocess(notebook, {})  # where a stream was flushed depends on the clock
        nbformat.write(notebook, temporary)
        temporary.write_text(relinked(temporary.read_text("utf-8"), source, target), "utf-8")


def relinked(text: str, source: Path, target: Path) -> str:
    """A notebook's JSON at `target`, where it was at `source`: Markdown links to the files beside it and around follow."""

    def moved(link: re.Match) -> str:
        path = source.parent / link[1]
        return f"]({os.path.relpath(path, target.parent)}" if path.exists() else link[0]

    return re.sub(r"\]\(([\w./-]+)", moved, text)


def prepare(folder: Path) -> None:
    """Copies of the notebooks set to profile smoke, with their committed outputs, for nbval to run and compare."""
    runs = project_folder() / "runs" / "smoke"
    with locked(runs, "make reproduce PROFILE=smoke"):
        for path in runs.iterdir():  # so that the notebooks train anew
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for former in folder.glob("*.ipynb"):
        former.unlink()
    for source in notebooks():
        target = folder / source.name
        papermill.execute_notebook(source, target, {"profile": "smoke"}, prepare_only=True, progress_bar=False)


# --- beside the committed numbers -------------------------------------------------------------------------------------


def compare_with_committed(place: Setting) -> str:
    """`comparison` as text, and in runs/<profile>/comparison.csv; or why there is none."""
    if not keeps(place):
        return f"Profile {place.profile.name} keeps no results, so there are none to compare with."
    cells, why = comparison(place)
    if cells is None:
        return f"This machine's numbers stand beside no committed ones: {why}."
    path = place.runs / place.profile.name / "comparison.csv"
    with atomic_write(path) as temporary:
        cells.to_csv(temporary, float_format="%.4f")
    judged = cells[cells["agrees"] != "–"]
    return (
        f"{cells.to_string(float_format='%.1f', na_rep='–')}\n\n{(judged['agrees'] == 'yes').sum()} of {len(judged)} cells agree "
        "with the committed numbers: |here - committed| <= 2 sd √(1/n + 1/m), n committed seeds with standard deviation sd, m "
        f"here.\nOf as many seeds of one machine, some {judged['by chance'].sum():.0f} would lie outside by chance. The table is "
        f"kept in {os.path.relpath(path)}."
    )


def comparison(place: Setting) -> tuple[pd.DataFrame | None, str]:
    """Each cell of Tables 1 to 3 in percent: committed (the ledger of git's HEAD), and here, over the seeds trained now.

    A cell agrees where |here - committed| <= 2 sd sqrt(1/n + 1/m), sd over the n committed seeds, m of them here; it has
    no verdict ("–") with fewer than two committed seeds. "by chance": the share of cells outside if
    all seeds were alike (Student's t with n - 1 degrees of freedom beyond 2). Without committed entries of the rows'
    present configurations there is no table; the text says why.
    """
    from scipy.stats import t as student

    with TemporaryDirectory() as folder:
        try:
            command = ["git", "-C", str(place.results), "archive", "HEAD", "runs"]
            archive = subprocess.run(command, capture_output=True, check=True).stdout
        except OSError:
            return None, "there is no git"
        except subprocess.CalledProcessError:
            return None, f"git's HEAD has no results/{place.results.name}/runs"
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        then = {name: table(rows, replace(place, results=Path(folder))) for name, rows in TABLES.items()}
    now = {name: table(rows, place, seeds=range(place.seeds)) for name, rows in TABLES.items()}
    cells = pd.concat(now, names=["table"])[["mean", "seeds"]].rename(columns={"mean": "here", "seeds": "m"})
    there = pd.concat(then, names=["table"])[["mean", "sd", "seeds"]]
    cells = there.rename(columns={"mean": "committed", "seeds": "n"}).join(cells, how="right")
    if not cells["n"].sum():
        return None, "those that git's HEAD has are of other configurations of the rows"
    cells["difference"] = cells["here"] - cells["committed"]
    allowed = 2 * cells["sd"] * (1 / cells["n"] + 1 / cells["m"]) ** 0.5
    cells["agrees"] = (cells["difference"].abs() <= allowed + 1e-9).map({True: "yes", False: "no"})
    cells.loc[cells["difference"].isna() | cells["sd"].isna(), "agrees"] = "–"
    cells["by chance"] = 2 * student.sf(2, (cells["n"] - 1).clip(lower=1))
    return cells, ""


def main() -> None:
    """The command line; see `make help`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="quick", help="smoke, quick, subset or paper; subset@0.05: a share of it")
    parser.add_argument("--seeds", default=1, type=int, help="how many seeds: 0, 1, …")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--data", default="data", help="folder of the data files")
    who = "who trains: Dask's workers at tcp://host:8786, local:4 processes here, none: this process; auto"
    parser.add_argument("--scheduler", default="auto", help=who)
    names = "train these rows (none: all of them) and stop there: no notebooks, no comparison"
    parser.add_argument("--train", nargs="*", metavar="ROW", help=names)
    parser.add_argument("--in-place", action="store_true", help="profile quick; executed notebooks go into notebooks/")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="copies for nbval, profile smoke")
    options = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        if options.prepare:
            prepare(options.prepare)
        elif options.in_place:
            reproduce(place := setting())
            for source in notebooks():
                executed = place.results / "notebooks" / source.name
                with atomic_write(source) as temporary:
                    temporary.write_text(relinked(executed.read_text("utf-8"), executed, source), "utf-8")
        else:
            place = setting(options.profile, options.seeds, options.device, options.data)
            scheduler = None if options.scheduler == "none" else options.scheduler
            if options.train is None:
                reproduce(place, scheduler)
            else:
                train(place, scheduler, options.train)
    except (DMVAEError, papermill.PapermillExecutionError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command goes on from the last checkpoints.")


if __name__ == "__main__":
    main()
