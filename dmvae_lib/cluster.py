"""Work items on many machines: the workers of a Dask scheduler train what `run_items` would train here."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch
from uuid import uuid4

from tqdm.auto import tqdm

from dmvae_lib.errors import DMVAEError
from dmvae_lib.training import resolve_device

if TYPE_CHECKING:
    from dmvae_lib.runs import Item

CONNECT_SECONDS = 8.0
VISIBLE_SECONDS = 90.0  # network file systems show another machine's new files late, by a minute at most
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scikit-learn", "scipy")  # what a result may depend on


class _Unfit(DMVAEError):
    """No item can be trained on that worker, so that the whole grid stops."""


def train(items: Sequence[Item], scheduler: str) -> None:
    """Trains every item on the scheduler's workers, into the same runs/ folder; returns when all of it is there.

    scheduler: a Dask scheduler's address (tcp://host:8786), whose workers share this machine's file system and have
        one thread each; or local:N, N processes on this machine. Workers may come and go: a lost worker's items are
        given to others, where they go on from their checkpoints.

    Nothing but an item's name travels back. An item that fails is not tried again; the others finish, then DMVAEError
    names every failure. Raises DMVAEError at once for a scheduler that does not answer or is lost, and for a worker
    with another environment, several threads or another file system.
    """
    # A local cluster sets its workers' environment in this process too, whenever it starts one.
    with (
        patch.dict(os.environ),
        connect(scheduler) as client,
        tqdm(total=len(items), desc="runs", unit="run", leave=False) as bar,
    ):
        from cloudpickle import dumps  # distributed's; takes a notebook's own functions too

        common = {"expected": environment(), "pure": False}
        waiting = {  # a higher priority comes first
            client.submit(_work, dumps(item), key=f"{item} {uuid4()}", priority=-place, **common): item
            for place, item in enumerate(items)
        }
        failures = []
        try:
            while waiting:
                bar.set_postfix_str(_at_work(client.processing()))
                for future in [future for future in waiting if future.done()]:
                    item = waiting.pop(future)
                    if future.status == "cancelled":
                        raise CancelledError
                    if future.status == "error":
                        failures.append(_failure(item, future.exception()))
                        bar.write(failures[-1])
                    else:
                        _wait_for(Path(future.result(), "run.json"))
                    bar.update()
                time.sleep(0.5)
        except (OSError, CancelledError) as error:
            raise DMVAEError(
                f"the scheduler at {scheduler} is lost, {len(waiting)} of {len(items)} runs are not finished; start "
                "scheduler and workers and run again: it goes on from the checkpoints."
            ) from error
    if failures:
        raise DMVAEError(
            f"{len(failures)} of {len(items)} runs failed on {scheduler}, the others are in runs/:\n"
            + "\n".join(failures)
        )


def local(device: str, gigabytes: float) -> str | None:
    """The scheduler that makes the most of this machine: local:N on a CPU, N cores training a run each, which is faster
    than all cores on one run; None, one process, for a GPU or a single core, and where memory has room for one run only.

    gigabytes: of memory that a process needs; this one keeps its own. OMP_NUM_THREADS, where set, is the cores that a
    run takes. None, too, without the package distributed.
    """
    if resolve_device(device).type != "cpu":
        return None
    try:
        from distributed.system import MEMORY_LIMIT
    except ImportError:
        return None
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = max(1, int(first)) if first.isdigit() else 1
    n = int(min(cores() // threads, MEMORY_LIMIT / (gigabytes * 1e9) - 1))
    return f"local:{n}" if n > 1 else None


def cores() -> int:
    """How many CPU cores this process may use: of its container where the package distributed is there to ask."""
    try:
        from dask.system import CPU_COUNT
    except ImportError:
        return os.cpu_count() or 1
    return CPU_COUNT


def connect(scheduler: str):
    """A `distributed.Client` of the scheduler, to be closed. Raises DMVAEError where none answers."""
    try:
        import dask
        from distributed import Client
    except ImportError:
        raise DMVAEError(
            "a scheduler needs the package distributed; install it by: pip install 'dmvae_lib[cluster]'."
        ) from None
    kind, _, number = scheduler.partition(":")
    try:
        if kind == "local":
            n = int(number)
            if n < 1:
                raise ValueError(f"{n} processes")
            threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n)))
            environ = {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}  # the workers' own bars would cover the grid's
            local = {"n_workers": n, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
            # only so early do they reach torch and tqdm
            with dask.config.set({"distributed.nanny.pre-spawn-environ": environ}):
                return Client(**local, set_as_default=False)
        return Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DMVAEError(
            f"no Dask scheduler answers at {scheduler!r} ({str(error) or type(error).__name__}); expected the address "
            "that `dask scheduler` prints, such as tcp://host:8786, local:4 for four processes of this machine, auto or none."
        ) from error


@lru_cache
def environment() -> dict[str, str]:
    """What must be the same wherever an item is trained: the library's source, as first seen, and the versions."""
    folder, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    versions = {package: version(package) for package in PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"source of dmvae_lib": digest.hexdigest()[:12], "python": python, **versions}


def _work(pickled: bytes, expected: dict[str, str]) -> str:
    """On a worker: trains an item, or loads it, and returns its folder. The item is unpickled once the sources agree."""
    from distributed import get_worker

    worker = get_worker()
    if worker.state.nthreads != 1:
        raise _Unfit(
            f"worker {worker.address} has {worker.state.nthreads} threads, which would share one random generator; "
            f"start it by: dask worker --nthreads 1 --nworkers {worker.state.nthreads} {worker.scheduler.address}"
        )
    here = environment()
    differ = [f"{name} {here.get(name)}, here {value}" for name, value in expected.items() if here.get(name) != value]
    if differ:
        raise _Unfit(
            f"worker {worker.address} has {'; '.join(differ)}. Give it this checkout and requirements.lock, and "
            "start it again."
        )
    return str(pickle.loads(pickled).run().folder)


def _at_work(processing: Mapping[str, Sequence[str]]) -> str:
    """How many workers there are, and what the first of them train; a task's key is its item and a random part."""
    names = [keys[0].rsplit(" ", 1)[0] for keys in processing.values() if keys]
    return f"{len(processing)} workers" + (": " if names else "") + "; ".join(names[:3])


def _failure(item: Item, error: BaseException) -> str:
    from distributed import KilledWorker

    if isinstance(error, _Unfit):
        raise error
    if isinstance(error, KilledWorker):
        return (
            f"{item}: {error.allowed_failures + 1} workers in a row were lost while they trained it, the last at "
            f"{error.last_worker.address}; its log may say why (memory?). Run again to go on from the checkpoint."
        )
    if isinstance(error, DMVAEError):  # names the item by itself
        return str(error)
    return f"{item}: {type(error).__name__}: {error}; the worker's log has the details."


def _wait_for(path: Path) -> None:
    """Returns when the file that a worker wrote is seen here; opening its folder makes NFS look again."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):
        if time.monotonic() > deadline:
            raise _Unfit(
                f"a worker wrote {path}, and it is not seen here; the workers must share this machine's file system."
            )
        time.sleep(1)
