"""Runs on Dask's workers: a real cluster of two processes, one of which is killed while it trains."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from toy import ROW, TOY, place_in
from tqdm.auto import tqdm

from dmvae_lib import DMVAEError
from dmvae_lib.paper import runs, workers
from dmvae_lib.paper.rows.digits import judge
from dmvae_lib.paper.runs import Run
from dmvae_lib.paper.workers import train_all
from dmvae_lib.training import model_objective

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def two_workers():
    """Two worker processes of one thread, as `dask worker` would start them on two machines."""
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options, silence_logs=50) as started:
        yield started


def noted(model, *rest, file):
    """The model's objective; notes the process of every update, and writes checkpoints all the time."""
    runs.train = partial(
        getattr(runs.train, "func", runs.train), checkpoint_seconds=0.0
    )  # a worker's, for the next run
    with open(file, "a") as notes:
        notes.write(f"{os.getpid()}\n")
    time.sleep(0.01)
    return model_objective(model, *rest)


def kill_one_that_trains(place, killed):
    """Kills the process that first has a checkpoint before its last update."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for checkpoint in (place.runs / "toys").glob("toy-dmvae-*/checkpoint.pt"):
            seed = checkpoint.parent.name.rsplit("-", 1)[1]
            *former, pid = map(int, (place.runs / f"{seed}.note").read_text().split())
            if len(former) < 150:
                os.kill(pid, signal.SIGKILL)
                killed.append((seed, pid))
                return
        time.sleep(0.02)


def test_a_killed_workers_run_is_trained_on_elsewhere_with_the_same_results(two_workers, tmp_path, one_thread):
    place = place_in(tmp_path, steps=200)
    todo = [Run(replace(ROW, objective=partial(noted, file=place.runs / f"{s}.note")), s, place) for s in range(4)]
    first = [Run(judge(TOY, name), 0, place) for name in TOY.modalities]
    place.runs.mkdir()
    killed = []
    killer = threading.Thread(target=kill_one_that_trains, args=(place, killed))
    killer.start()
    train_all([*first, *todo], two_workers.scheduler_address)
    killer.join()
    ((seed, pid),) = killed
    by = (place.runs / f"{seed}.note").read_text().split()
    assert by[0] == str(pid) != by[-1] and 200 <= len(by) < 260  # another process, from the checkpoint
    assert str(os.getpid()) not in by
    undisturbed = place_in(tmp_path / "undisturbed", steps=200)
    for run in todo:
        expected = Run(ROW, run.seed, undisturbed).entry
        assert run.recorded()["scores"] == expected["scores"] and run.entry["files"] == expected["files"]


def bad(model, batch, labels, observed, beta, error):
    raise error


def test_a_failure_names_its_run_and_the_others_finish(two_workers, tmp_path):
    place = place_in(tmp_path, steps=2)
    one, two = (
        Run(replace(ROW, name=name, objective=partial(bad, error=error)), 1, place)
        for name, error in (("nan", DMVAEError("step 3: not finite: kl.")), ("full", RuntimeError("out of memory")))
    )
    good = [Run(ROW, seed, place) for seed in range(2)]
    with pytest.raises(DMVAEError) as caught:
        train_all([one, two, *good], two_workers.scheduler_address)
    for part in ("2 of 4 runs", "nan, seed 1: step 3: not finite: kl.", "full, seed 1: RuntimeError('out of memory')"):
        assert part in str(caught.value)
    assert all(run.recorded() for run in good)


def kills(model, batch, labels, observed, beta):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_kills_its_workers_is_given_up_and_named(tmp_path):
    import dask

    run = Run(replace(ROW, name="deadly", objective=kills), 0, place_in(tmp_path))
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        with pytest.raises(DMVAEError, match="deadly, seed 0: 2 workers in a row were lost .* from the checkpoint"):
            train_all([run], "local:1")


def test_a_worker_with_other_packages_is_refused(two_workers, tmp_path, monkeypatch):
    place, here = place_in(tmp_path), workers.versions() | {"torch": "1.0"}
    monkeypatch.setattr(workers, "versions", lambda: here)
    with pytest.raises(DMVAEError, match=r"worker tcp://.* has torch .*, here 1.0. .*requirements.lock"):
        train_all([Run(ROW, 0, place)], two_workers.scheduler_address)
    assert not place.runs.exists()


def test_a_worker_of_several_threads_is_refused(tmp_path):
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options) as started, pytest.raises(DMVAEError, match="2 threads.*--nthreads 1"):
        train_all([Run(ROW, 0, place_in(tmp_path))], started.scheduler_address)


@pytest.mark.parametrize(
    "cores, memory, device, free, chosen",
    [
        (8, 64e9, "cpu", 0, "local:8"),
        (8, 13e9, "cpu", 0, "local:2"),
        (8, 9e9, "cpu", 0, None),
        (1, 64e9, "cpu", 0, None),
        (8, 64e9, "cuda", 140e9, "local:8"),
        (8, 64e9, "cuda", 17e9, "local:4"),
        (8, 64e9, "cuda", 7e9, None),
    ],
)
def test_auto_is_as_many_workers_as_there_are_cores_and_memory(
    tmp_path, monkeypatch, cores, memory, device, free, chosen
):
    monkeypatch.setattr("dask.system.CPU_COUNT", cores)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", memory)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 150e9))
    monkeypatch.setattr(workers, "resolve_device", lambda name: torch.device(device))
    assert workers.of_this_machine(place_in(tmp_path, gigabytes=4.0)) == chosen


@pytest.mark.parametrize("best, by", [("local:2", "local:2"), (None, "this process")])
def test_auto_trains_by_what_is_best_here(tmp_path, monkeypatch, best, by):
    trained = []
    monkeypatch.setattr(workers, "of_this_machine", lambda setting: best)
    monkeypatch.setattr(workers, "train", lambda runs, scheduler: trained.append(scheduler))
    monkeypatch.setattr(Run, "train", lambda run: trained.append("this process"))
    train_all([Run(ROW, 0, place_in(tmp_path))], "auto")
    assert trained == [by]
    train_all([], "auto")
    assert trained == [by]


def test_local_workers_have_a_core_each_and_leave_the_environment_alone(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with patch.dict(os.environ), workers.connect("local:2") as client:
        found = client.run(lambda: (os.environ.get("OMP_NUM_THREADS"), tqdm([]).disable))
    assert list(found.values()) == [("1", True)] * 2 and dict(os.environ) == before


class Noted:
    """In a run's place."""

    def __init__(self, name, folder):
        self.name, self.folder, self.entry_path = name, folder, folder / "order"

    def __str__(self):
        return self.name

    def train(self):
        with open(self.entry_path, "a") as file:
            file.write(f"{self.name} ")


def test_runs_are_trained_in_their_order(tmp_path):
    names, environment = list("hbgcafed"), dict(os.environ)
    workers.train([Noted(name, tmp_path) for name in names], "local:1")
    assert (tmp_path / "order").read_text().split() == names and dict(os.environ) == environment


def test_a_scheduler_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense", "local:many", "local:0", "local:-1"):
        with pytest.raises(DMVAEError, match=f"no Dask scheduler answers at '{address}'"):
            train_all([Run(ROW, 0, place_in(tmp_path))], address)


def test_results_that_are_not_seen_here(two_workers, tmp_path):
    class Elsewhere(Noted):
        def train(self):
            pass

    with pytest.raises(DMVAEError, match="has trained far, which is not seen here: workers need this file system"):
        workers.train([Elsewhere("far", tmp_path)], two_workers.scheduler_address)
