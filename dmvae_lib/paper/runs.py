"""`Run`: a row with a seed and a profile, trained here or loaded, and what it leaves in the ledger."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import load, save
from torch import nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import (
    atomic_write,
    check_seal,
    locked,
    read_json,
    remove_leftovers,
    seal,
    sha256,
    verify,
    write_json,
)
from dmvae_lib.models.saving import load_weights, read_config
from dmvae_lib.paper.data import EVALUATIONS, DataSet, Splits
from dmvae_lib.paper.profiles import Profile, get_profile
from dmvae_lib.training import resolve_device, train

if TYPE_CHECKING:
    from dmvae_lib.pairing import PairedData
    from dmvae_lib.paper.rows.row import Row

PACKAGES = ("dmvae_lib", "torch", "torchvision", "transformers", "numpy", "scipy", "scikit-learn", "pandas")
WEIGHTS, HISTORY, ENTRY = "model.safetensors", "history.csv", "entry.json"

# --- where runs are made --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where and how runs are made: the parameters of every notebook.

    results: the profile's folder, in one whose README.md lists what is there. evaluation: "test", or "validation" to hold
        out part of the training data and leave the test data alone.
    """

    profile: Profile
    seeds: int = 1
    device: str = "auto"
    data: Path = Path("data")
    runs: Path = Path("runs")
    results: Path = Path("results")
    evaluation: str = "test"

    def splits(self, data_set: DataSet) -> Splits:
        """The data set from the profile's source, loaded once per process. Raises DMVAEError as its loader does."""
        where = {"source": self.profile.source, "root": str(self.data), "evaluation": self.evaluation}
        how = {"cache": str(self.runs / "features"), "device": str(resolve_device(self.device))}
        found = _splits(data_set.load, permutations=self.profile.permutations, **where, **how)
        if found.train.names != data_set.modalities:
            names = f"{', '.join(found.train.names)}, not {', '.join(data_set.modalities)}"
            raise DMVAEError(f"data set {data_set.name!r}: its loader gives {names}; let both say the same.")
        return found


@lru_cache(maxsize=4)
def _splits(load_data: Any, **options: Any) -> Splits:
    return load_data(**options)


def setting(
    profile: str = "quick", seeds: int = 1, device: str = "auto", data: str = "data", evaluation: str = "test"
) -> Setting:
    """The setting of a notebook; relative paths are relative to the project's folder.

    Raises DMVAEError for an unknown profile, device or evaluation, for no seed, and for values of another kind.
    """
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise DMVAEError(f"seeds={seeds!r}; expected how many seeds to run, a whole number of at least 1.")
    if not isinstance(data, (str, Path)) or "\0" in str(data):
        raise DMVAEError(f"data={data!r}; expected the path of the folder that holds the data files.")
    if evaluation not in EVALUATIONS:
        raise DMVAEError(f"evaluation={evaluation!r}; expected one of {', '.join(EVALUATIONS)}.")
    chosen, root = get_profile(profile), project_folder()
    resolve_device(device)
    return Setting(chosen, seeds, device, root / data, root / "runs", root / "results" / chosen.name, evaluation)


def project_folder() -> Path:
    """The nearest folder, from the working directory upwards, that holds notebooks/ and a Makefile; else here."""
    here = Path.cwd()
    marked = (f for f in (here, *here.parents) if (f / "notebooks").is_dir() and (f / "Makefile").exists())
    return next(marked, here)


# --- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A row trained from a seed in a setting. It is what its configuration (`Row.config`) and its data say.

    `scores` and `entry` come from the ledger, in milliseconds, if it has an entry of this configuration; `model` and
    `history` need the weights here. What is missing is trained. An edit of the source makes nothing stale: what guards
    the mathematics is tests/test_golden.py and the row's `version`.
    """

    row: Row
    seed: int
    setting: Setting

    def __str__(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    def __reduce__(self) -> tuple:
        return Run, (self.row, self.seed, self.setting)  # another process loads what it needs

    @property
    def folder(self) -> Path:
        """runs/<profile>/<row>-<seed>/: model.safetensors, history.csv, entry.json and checkpoint.pt, to go on from."""
        place = self.setting
        part = "" if place.evaluation == "test" else f"-{place.evaluation}"
        return place.runs / f"{place.profile.name}{part}" / f"{self.row.name}-{self.seed}"

    @property
    def entry_path(self) -> Path:
        """The ledger's file; that in `folder` for a profile that writes no results and for validation."""
        if self.setting.profile.writes_results and self.setting.evaluation == "test":
            return self.setting.results / "runs" / f"{self.row.name}-{self.seed}.json"
        return self.folder / ENTRY

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that decides the run beside its data, as JSON."""
        return self.row.config(self.setting.profile, self.seed)

    def recorded(self) -> dict | None:
        """The ledger's entry if it is of this configuration; nothing is trained. Raises DMVAEError for a damaged one."""
        repair = (
            f"Take the committed one back by `git checkout -- {self.entry_path}`, or delete it to train the run anew."
        )
        return self._current(self.entry_path, repair)

    @cached_property
    def entry(self) -> dict:
        """What the run left in the ledger; trained first where there is no entry of this configuration."""
        found = self.recorded()
        return self.train().__dict__["entry"] if found is None else found

    @property
    def scores(self) -> dict[str, float]:
        """Every measure of the row on the evaluation split."""
        return self.entry["scores"]

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, ready for inference on the setting's device.

        Where the run is not on this machine but is the one in results/<profile>/models (`dmvae_lib.paper.weights`), that
        one, which has its weights in half precision; nothing is trained for it.
        """
        device, here_already = resolve_device(self.setting.device), (self.folder / ENTRY).exists()
        elsewhere = here_already or self.setting.evaluation != "test"
        for path in [] if elsewhere else (self.setting.results / "models").glob("*/config.json"):
            if read_config(path.parent).get("about", {}).get("run") == self.config:
                return load_weights(self._new_model(), path.parent).to(device)
        here = self.train().__dict__
        if "model" not in here:
            verify(self.folder / WEIGHTS, here["entry"]["files"][WEIGHTS], self._repair)
            here["model"] = self._new_model()
            here["model"].load_state_dict(load((self.folder / WEIGHTS).read_bytes()))
            here["model"].to(device).eval()
        return here["model"]

    @cached_property
    def history(self) -> pd.DataFrame:
        """The terms of the loss by updates, as `dmvae_lib.train` returns them; empty for a row that is fitted."""
        here = self.train().__dict__
        verify(self.folder / HISTORY, here["entry"]["files"][HISTORY], self._repair)
        return pd.read_csv(self.folder / HISTORY, index_col="step")

    def train(self) -> Run:
        """Sees to it that this machine has the run and that the ledger has its entry; returns the run itself.

        A run that is here is left as it is, one that was interrupted or had fewer updates goes on, one of another
        configuration or other data in its folder is replaced; while one process trains it, others wait. Raises
        DMVAEError for files that are damaged.
        """
        with locked(self.folder, f"training {self}"):
            remove_leftovers(self.folder)
            splits = self.setting.splits(self.row.data)
            pairs = self.row.select(splits)
            data = {"train": pairs.fingerprint, "test": splits.test.fingerprint}
            entry = self._current(self.folder / ENTRY, self._repair)
            if entry is None or entry["data"] != data:
                entry = self._train(pairs, data)
                write_json(self.folder / ENTRY, entry)  # last: a run without it is not finished
            written = (self.folder / ENTRY).read_bytes()
            if not self.entry_path.exists() or self.entry_path.read_bytes() != written:
                with locked(self.entry_path.parent, "writing the ledger"):
                    remove_leftovers(self.entry_path.parent)
                    with atomic_write(self.entry_path) as temporary:
                        temporary.write_bytes(written)
        self.__dict__["entry"] = entry
        return self

    @property
    def _repair(self) -> str:
        return f"Delete the folder {self.folder} to train the run anew."

    def _current(self, path: Path, repair: str) -> dict | None:
        if not path.exists():
            return None
        entry = check_seal(read_json(path, repair), str(path), repair)
        if entry["config"]["data"] != self.row.data.name:
            raise DMVAEError(
                f"{path} is of data set {entry['config']['data']!r}, and row {self.row.name!r} is now of "
                f"{self.row.data.name!r}; give the row a name of its own."
            )
        return entry if entry["config"] == self.config else None

    def _new_model(self) -> nn.Module:
        """With weights by the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.row.model(self.setting.splits(self.row.data), self.setting.profile)

    @torch.enable_grad()  # a judge's run may begin inside another run's evaluation
    def _train(self, pairs: PairedData, data: dict[str, str]) -> dict:
        """Trains and evaluates, writes weights and history, and returns the entry."""
        row, place = self.row, self.setting
        identity = self._begin(data)
        trained = replace(self)  # what `evaluate` sees; this one has a model once it has an entry
        model = trained.__dict__["model"] = self._new_model()
        if row.fit:
            started = time.monotonic()
            row.fit(model, pairs, self.seed)
            model.to(resolve_device(place.device)).eval()
            history = pd.DataFrame(index=pd.Index([], name="step"))
            history.attrs |= {"seconds": time.monotonic() - started, "precision": "float32"}
        else:
            schedule = row.schedule(place.profile)
            # A curve of scores is for choices, so on the validation split alone.
            watched = replace(self, setting=replace(place, evaluation="validation"))
            watched.__dict__["model"] = model
            every, validate = place.profile.validate_every, None
            if every or place.evaluation == "validation":
                validate = lambda model: row.evaluate(watched)["scores"]  # noqa: E731
            history = train(
                model, pairs, schedule, self.seed, place.device, self.folder, row.objective, str(self),
                identity=identity, evaluate=validate, evaluate_every=every,
            )  # fmt: skip
        with atomic_write(self.folder / WEIGHTS) as temporary:  # safetensors' own writer hides a full disk's errno
            temporary.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
        with atomic_write(self.folder / HISTORY) as temporary:
            history.to_csv(temporary)
        found = row.evaluate(trained)
        self.__dict__["model"] = model
        entry = {"row": row.name, "title": row.title, "seed": self.seed, "profile": place.profile.name}
        entry |= {"config": self.config, "data": data, "made": provenance(place.device, history.attrs["precision"])}
        entry |= {"seconds": round(history.attrs["seconds"], 1), "curve": _curve(history, found["scores"]), **found}
        return seal(entry | {"files": {name: sha256(self.folder / name) for name in (WEIGHTS, HISTORY)}})

    def _begin(self, data: dict[str, str]) -> str:
        """Removes what training in this folder by another configuration or on other data left, and says so.

        Returns what a run is beside its number of updates: one with fewer of them goes on, one with more does not.
        """
        schedule = dict(self.config["schedule"])
        steps = schedule.pop("steps")
        is_now = json.dumps([self.config | {"schedule": schedule}, data], sort_keys=True)
        identity = hashlib.sha256(is_now.encode()).hexdigest()[:16]
        note, checkpoint = self.folder / "identity", self.folder / "checkpoint.pt"
        former, _, had = note.read_text().partition(" ") if note.exists() else ("", "", "")
        goes_on = former == identity and int(had) <= steps
        for path in (self.folder / ENTRY, checkpoint):  # the entry first, before its weights are another's
            if path.exists() and not goes_on:
                print(f"{path} is of another configuration or other data of {self}; it is replaced.", file=sys.stderr)
        (self.folder / ENTRY).unlink(missing_ok=True)
        if not goes_on:
            checkpoint.unlink(missing_ok=True)
        with atomic_write(note) as temporary:
            temporary.write_text(f"{identity} {steps}")
        return identity


def _curve(history: pd.DataFrame, scores: dict[str, float], most: int = 25) -> dict[str, list]:
    """The loss and, where they were measured, the scores on the validation split by updates: {"updates": [...], ...}."""
    shown = history[[name for name in ("total", *scores) if name in history]]
    measured = shown.drop(columns="total", errors="ignore").dropna()
    if measured.shape[1]:
        shown = shown.loc[measured.index]
    shown = shown.iloc[:: -max(1, ceil(len(shown) / most))].iloc[::-1]  # the last update is always there
    return {"updates": shown.index.tolist()} | {
        name: [float(f"{value:.6g}") for value in values] for name, values in shown.items()
    }


def train_rows(rows: Iterable[Row], setting: Setting) -> list[Run]:
    """The runs of the rows, of all seeds of the setting; those whose entry the ledger lacks are trained here."""
    runs = [Run(row, seed, setting) for row in rows for seed in range(setting.seeds)]
    for run in runs:
        _ = run.entry
    return runs


# --- where an entry was made ------------------------------------------------------------------------------------------


def provenance(device: str, precision: str) -> dict[str, Any]:
    """What made a result beside its configuration: device, precision, threads, versions, commit, time."""
    found = resolve_device(device)
    return {
        "device": torch.cuda.get_device_name(found) if found.type == "cuda" else found.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    """The processor in its own words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache
def commit() -> str | None:
    """The commit of the project's checkout, with "+" if the library has uncommitted changes; None without git."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git
