"""`make reproduce`: train what the tables need, execute the notebooks, write the index of the results."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from tqdm import tqdm

from dmvae_lib import cluster
from dmvae_lib.errors import DMVAEError
from dmvae_lib.experiments import DIGITS, DMVAE_DIGITS, classifier_items, grid, learning_curve
from dmvae_lib.files import atomic_write, locked, remove_leftovers
from dmvae_lib.flower_experiments import FLOWERS, flower_data
from dmvae_lib.flower_experiments import training as flower_training
from dmvae_lib.report import index, readme_tables
from dmvae_lib.runs import OPTIONS, Setting, command_line, project_folder, run_items, setting

KERNEL = "python3"
AT_ONCE = 2  # notebooks: while one draws or waits for a run's lock, another computes
DEFAULTS = {name: option["default"] for name, option in OPTIONS.items()}  # of every notebook's parameters cell


def notebooks() -> list[Path]:
    """The project's notebooks in order."""
    return sorted((project_folder() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Executes a notebook by papermill and puts the result at `target` when it is whole and free of errors."""
    with atomic_write(target) as temporary:
        papermill.execute_notebook(
            source,
            temporary,
            parameters,
            kernel_name=KERNEL,
            cwd=project_folder(),
            progress_bar=False,
            extra_arguments=["--log-level=ERROR"],
        )
        notebook = nbformat.read(temporary, as_version=4)
        _tidy(notebook)
        nbformat.write(notebook, temporary)


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Removes what says when, where and how fast a notebook ran: timings, paths, progress bars; manifest.json has the facts."""
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    CoalesceStreamsPreprocessor().preprocess(notebook, {})  # where a stream was flushed depends on the clock


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or output.get("name") == "stderr"


def prepare(folder: Path) -> None:
    """Copies of the notebooks set to profile smoke, with their committed outputs, for nbval to run and compare."""
    runs = project_folder() / "runs" / "smoke"
    with locked(runs, "make reproduce PROFILE=smoke"):
        for path in runs.iterdir():  # so that the notebooks train anew
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.ipynb"):
        stale.unlink()
    for source in notebooks():
        target = folder / source.name
        papermill.execute_notebook(source, target, {"profile": "smoke"}, prepare_only=True, progress_bar=False)


def reproduce(options: argparse.Namespace) -> None:
    """Trains every experiment (so that progress shows here), then executes every notebook on the trained runs.

    Killed at any point and called again, it ends with the same results; a second call at the same time waits.
    """
    place = setting(options.profile, options.seeds, options.device, options.data)
    with locked(place.runs / place.profile.name, f"make reproduce PROFILE={place.profile.name}"):
        train_all(place, options.scheduler)
        execute_all(place, options)


def train_all(place: Setting, scheduler: str | None) -> None:
    """Every run that a notebook shows; scheduler: as of `cluster.train`, "auto" (`cluster.local`), or None: one process."""
    if scheduler == "auto":
        scheduler = cluster.local(place.device, place.profile.gigabytes)
    elif scheduler:
        cluster.connect(scheduler).close()
    flower_data(place), place.digits  # first what may be missing, then what takes long
    items = [
        *classifier_items(place),
        *grid(DIGITS, place),
        *grid([DMVAE_DIGITS], replace(place, seeds=max(place.seeds, 3))),  # notebook 09 shows the spread
        *learning_curve(place).values(),
        *grid(FLOWERS, place, flower_training),
    ]
    items = list({str(item): item for item in items}.values())
    if scheduler:
        cluster.train(items, scheduler)
    else:
        run_items(items, together=place.together)


def execute_all(place: Setting, options: argparse.Namespace) -> None:
    """Every notebook, then the pages that show what they made."""
    # A notebook's own defaults need no parameters cell from outside: so run, it is the notebook as it is committed.
    chosen = {name: getattr(options, name) for name in DEFAULTS}
    parameters = {name: value for name, value in chosen.items() if value != DEFAULTS[name]}
    keeps = place.profile.writes_results
    executed = place.results / "notebooks" if keeps else project_folder() / "build" / place.profile.name
    remove_leftovers(executed)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cluster.cores() // AT_ONCE)))  # of each kernel
    with ThreadPoolExecutor(AT_ONCE) as pool, tqdm(total=len(notebooks()), desc="notebooks", unit="notebook") as bar:
        waiting = {  # the last ones train models of their own: first what takes long
            pool.submit(execute, path, executed / path.name, parameters): path.stem for path in reversed(notebooks())
        }
        try:
            for done in as_completed(waiting):
                bar.set_postfix_str(waiting[done])
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if keeps:
        index(place.results.parent)
        readme_tables(project_folder() / "README.md", place.results.parent)
        print(f"Results are in {os.path.relpath(place.results)}; results/README.md shows those of all whole profiles.")
    else:
        print(
            f"Profile {place.profile.name} keeps no results; the executed notebooks are in {os.path.relpath(executed)}."
        )


def main() -> None:
    parser = command_line(__doc__, *OPTIONS)
    parser.add_argument(
        "--scheduler",
        default="auto",
        type=lambda word: None if word == "none" else word,
        help="who trains: Dask's workers at tcp://host:8786, local:4 processes here, none: this process; auto",
    )
    parser.add_argument(
        "--in-place", action="store_true", help="profile quick, then put the executed notebooks into notebooks/"
    )
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="copies for nbval, profile smoke")
    options = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        if options.prepare:
            prepare(options.prepare)
        elif options.in_place:
            reproduce(argparse.Namespace(**DEFAULTS, scheduler="auto"))
            for source in notebooks():
                with atomic_write(source) as temporary:
                    shutil.copyfile(project_folder() / "results" / "quick" / "notebooks" / source.name, temporary)
        else:
            reproduce(options)
    except (DMVAEError, papermill.PapermillExecutionError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command goes on from the last checkpoints.")


if __name__ == "__main__":
    main()
