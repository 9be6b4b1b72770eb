"""Many runs: one after the other in this process, or by Dask's workers, on this machine or a cluster."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from importlib.metadata import version
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from dmvae_lib.errors import DMVAEError
from dmvae_lib.paper.runs import PACKAGES, Run, Setting
from dmvae_lib.training import resolve_device

CONNECT_SECONDS = 8.0


def train_all(runs: Sequence[Run], scheduler: str | None = None) -> None:
    """Trains the runs, of one setting, that are not here yet, in their order: give those first that judge others.

    scheduler: None: in this process; else by Dask's workers: "auto" (as many of this machine
        as make sense), "local:4", or a scheduler's address, "tcp://host:8786". A run that fails does not keep the
    others from being trained. Raises DMVAEError, in the end, that names every failure by row and seed.
    """
    runs = list({(run.row.name, run.seed): run for run in runs}.values())
    if scheduler == "auto":
        scheduler = of_this_machine(runs[0].setting) if runs else None
    if scheduler:
        return train(runs, scheduler)
    failures = []
    with tqdm(runs, desc="runs", unit="run", leave=False, disable=len(runs) == 1) as bar:
        for run in bar:
            bar.set_postfix_str(str(run))
            try:
                replace(run).train()  # a copy, so that no model stays in memory
            except (DMVAEError, RuntimeError) as error:  # torch's own say when memory is full
                failures.append(f"{run}: {error}")
    if failures:
        raise DMVAEError(f"{len(failures)} of {len(runs)} runs failed:\n" + "\n".join(failures))


def of_this_machine(setting: Setting) -> str | None:
    """The scheduler that makes the most of this machine: local:N, a core each, as many as its memory takes, a GPU's too.

    None, this process alone, where that is one, and without the package distributed.
    """
    try:
        from dask.system import CPU_COUNT  # the container's
        from distributed.system import MEMORY_LIMIT
    except ImportError:
        return None
    device, size = resolve_device(setting.device), setting.profile.gigabytes * 1e9
    n = min(CPU_COUNT, MEMORY_LIMIT / size - 1)  # this process keeps its own
    if device.type == "cuda":
        n = min(n, torch.cuda.mem_get_info(device)[0] / size)
    return f"local:{int(n)}" if n >= 2 else None


def connect(scheduler: str):
    """A `distributed.Client`, to be closed. Raises DMVAEError where no scheduler answers."""
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise DMVAEError("a scheduler needs the package distributed: pip install 'dmvae_lib[cluster]'.") from None
    kind, _, number = scheduler.partition(":")
    try:
        if kind != "local":
            return Client(scheduler, timeout=CONNECT_SECONDS)
        if int(number) < 1:
            raise ValueError(f"{number} processes")
        # A core each, unless the environment says more, and no bars that would cover the one here; so early for torch.
        with dask.config.set({"distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}}):
            return Client(n_workers=int(number), threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0")
    except (OSError, ValueError) as error:
        raise DMVAEError(
            f"no Dask scheduler answers at {scheduler!r} ({str(error) or type(error).__name__}); expected the address "
            "that `dask scheduler` prints, such as tcp://host:8786, local:4 for four processes of this machine, auto or none."
        ) from error


class _Unfit(DMVAEError):
    """Nothing can be trained on that worker, so that all stops."""


def versions() -> dict[str, str]:
    """What must be the same wherever runs are trained."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def train_one(run: Run, expected: dict[str, str]) -> None:
    """On a worker: trains a run. Raises DMVAEError for one with other packages or several threads."""
    from distributed import get_worker

    worker, here = get_worker(), versions()
    if worker.state.nthreads != 1:
        raise _Unfit(
            f"worker {worker.address} has {worker.state.nthreads} threads, which would share one random generator; "
            f"start it by: dask worker --nthreads 1 --nworkers {worker.state.nthreads} {worker.scheduler.address}"
        )
    if differ := [f"{name} {here[name]}, here {value}" for name, value in expected.items() if here[name] != value]:
        raise _Unfit(f"worker {worker.address} has {'; '.join(differ)}. Give it requirements.lock and start it again.")
    run.train()


def train(runs: Sequence[Run], scheduler: str) -> None:
    """Trains the runs on the scheduler's workers, which share this machine's files, in their order.

    scheduler: its address, or local:N, N processes of this machine. Workers may come and go: Dask gives a lost one's run
    to another, where it goes on from its checkpoint. A run that fails is not tried again; the others finish, then
    DMVAEError names every failure. Raises DMVAEError at once where no scheduler answers, a worker does not fit, or the
    scheduler is lost.
    """
    bar = tqdm(total=len(runs), desc="runs", unit="run", leave=False)
    with patch.dict(os.environ), connect(scheduler) as client, bar:  # a local cluster changes the environment here too
        submitted = {  # a higher priority comes first
            client.submit(train_one, run, versions(), pure=False, priority=-place): run
            for place, run in enumerate(runs)
        }
        names, failures = {future.key: str(run) for future, run in submitted.items()}, []
        try:
            while submitted:
                at_work = [names[keys[0]] for keys in client.processing().values() if keys]
                bar.set_postfix_str(f"{len(at_work)} at work: {'; '.join(at_work[:3])}")
                for future in [future for future in submitted if future.done()]:
                    run = submitted.pop(future)
                    if future.cancelled():
                        raise CancelledError
                    if future.status == "error":
                        failures.append(_failure(run, future.exception()))
                        bar.write(failures[-1])
                    bar.update()
                time.sleep(1)
        except (OSError, CancelledError) as error:
            raise DMVAEError(
                f"the scheduler at {scheduler} is lost, {len(submitted)} of {len(runs)} runs are not finished; start it "
                "and its workers and run again: it goes on from the checkpoints."
            ) from error
    if failures:
        raise DMVAEError(f"{len(failures)} of {len(runs)} runs failed on {scheduler}:\n" + "\n".join(failures))
    if unseen := [str(run) for run in runs if not run.entry_path.exists()]:
        raise DMVAEError(f"{scheduler} has trained {unseen[0]}, which is not seen here: workers need this file system.")


def _failure(run: Run, error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, _Unfit):
        raise error
    if isinstance(error, KilledWorker):
        return (
            f"{run}: {error.allowed_failures + 1} workers in a row were lost while they trained it, the last at "
            f"{error.last_worker.address}; its log may say why (memory?). Run again to go on from the checkpoint."
        )
    return f"{run}: {error if isinstance(error, DMVAEError) else repr(error)}"
