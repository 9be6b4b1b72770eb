"""The grid on many machines: a real Dask cluster of two worker processes, one of which is killed while it trains."""

import os
import signal
import threading
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tqdm.auto import tqdm

from dmvae_lib import DMVAEError, cluster, reproduce, runs
from dmvae_lib import experiments as ex
from dmvae_lib.data import PairedData
from dmvae_lib.data.digits import Digits
from dmvae_lib.data.embedded import handwritten_digits, house_numbers
from dmvae_lib.training import train_side_by_side

distributed = pytest.importorskip("distributed")
EXPERIMENTS = [ex.DMVAE_DIGITS, ex.TABLE3["no private spaces"]]


class FewDigits(runs.Setting):
    """Some of the embedded digits: every process draws its own, which takes seconds for all of them."""

    @property
    def digits(self):
        return few_digits()


@cache
def few_digits():
    images, labels, *_ = handwritten_digits()
    numbers, number_labels = house_numbers(400, seed=0)
    items, item_labels = {"mnist": images, "svhn": numbers}, {"mnist": labels, "svhn": number_labels}
    return Digits(PairedData.pair(items, item_labels, permutations=2), None, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    profile = replace(ex.get_profile("smoke"), steps=80, batch_size=10, width=0.125)
    setting = FewDigits(**vars(runs.setting("smoke", device="cpu")))
    return replace(setting, profile=profile, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def workers():
    """Two worker processes of one thread, as `dask worker` would start them on two machines."""
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options, silence_logs=50) as started:
        yield started


def noted(experiment, seed, setting):
    """The training; it writes a checkpoint at every row of the history, and notes which process begins, and after how
    many updates it ends."""
    note = setting.runs / f"{experiment.name}-{seed}.note"

    def train_and_note(jobs, device):
        ((job, updates),) = ((job, []) for job in jobs)

        def counted(*batch):
            updates.append(1)
            return job.objective(*batch)

        write(note, f"{os.getpid()} begins")
        histories = train_side_by_side([replace(job, objective=counted)], device, checkpoint_seconds=0.0)
        write(note, f"{os.getpid()} ends after {len(updates)}")
        return histories

    runs.train_side_by_side = train_and_note  # a worker trains one item at a time
    return ex.training(experiment, seed, setting)


def write(path, line):
    with open(path, "a") as file:
        file.write(line + "\n")


def kill_one_that_trains(runs, killed):
    """Kills the process that trains the first item with a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for checkpoint in runs.glob("*/*/*/checkpoint.pt"):
            seed = checkpoint.parent.name.removeprefix("seed").split("-")[0]
            note = runs / f"{checkpoint.parent.parent.name}-{seed}.note"
            pid = int(note.read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            killed.append((note, pid))
            return
        time.sleep(0.02)


def test_a_killed_workers_item_is_trained_on_elsewhere_with_the_same_results(workers, place, one_thread):
    killed = []
    killer = threading.Thread(target=kill_one_that_trains, args=(place.runs, killed))
    killer.start()
    with patch.object(runs, "train_side_by_side", train_side_by_side):  # `noted` is called here, too, to load the runs
        done = ex.run_grid(EXPERIMENTS, replace(place, seeds=2), noted, workers.scheduler_address)
    killer.join()

    ((note, pid),) = killed
    first, second, end = note.read_text().splitlines()
    assert first == f"{pid} begins" and second.endswith("begins") and second != first  # another process began
    assert end.startswith(second.split()[0])
    assert 0 < int(end.split()[-1]) < place.profile.steps  # from the checkpoint
    assert str(os.getpid()) not in {path.read_text().split()[0] for path in place.runs.glob("*.note")}

    undisturbed = ex.run_grid(EXPERIMENTS, replace(place, seeds=2, runs=place.runs / "undisturbed"))
    assert done.keys() == undisturbed.keys() and len(done) == 4
    for key, made in undisturbed.items():
        assert made.info["hash"] == done[key].info["hash"] and made.history.equals(done[key].history)
        for name, value in made.model.state_dict().items():
            assert torch.equal(value, done[key].model.state_dict()[name]), (key, name)


def fail_with_seed_1(experiment, seed, setting):
    if seed == 1:
        raise DMVAEError("step 3: not finite: kl.")
    if seed == 2:
        raise RuntimeError("out of memory")
    return ex.training(experiment, seed, setting)


def test_a_failure_names_its_item_and_the_others_finish(workers, place):
    short = replace(place, seeds=4, profile=replace(place.profile, steps=2))
    with pytest.raises(DMVAEError) as error:
        ex.run_grid([ex.DMVAE_DIGITS], short, fail_with_seed_1, workers.scheduler_address)
    for part in ("2 of 4 runs", "dmvae, seed 1: step 3: not finite: kl.", "dmvae, seed 2: RuntimeError: out of memory"):
        assert part in str(error.value)
    with patch.object(runs, "train_side_by_side", None):  # training again would fail
        assert [ex.run(ex.DMVAE_DIGITS, seed, short).info["config"]["seed"] for seed in (0, 3)] == [0, 3]
    with pytest.raises(DMVAEError, match="^dmvae, seed 1: step 3"):  # the same words without a cluster
        ex.run_grid([ex.DMVAE_DIGITS], short, fail_with_seed_1)


@pytest.mark.parametrize("what", ["source of dmvae_lib", "torch"])
def test_a_worker_with_another_library_is_refused(workers, place, what, monkeypatch):
    here = cluster.environment() | {what: "another"}
    monkeypatch.setattr(cluster, "environment", lambda: here)
    with pytest.raises(DMVAEError, match=rf"worker tcp://.* has {what} .*, here another"):
        ex.run_grid([ex.DMVAE_DIGITS], replace(place, runs=place.runs / "none"), scheduler=workers.scheduler_address)
    assert not (place.runs / "none").exists()


def test_a_worker_of_several_threads_is_refused(place):
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(**options) as started, pytest.raises(DMVAEError, match="2 threads.*--nthreads 1"):
        ex.run_grid([ex.DMVAE_DIGITS], place, scheduler=started.scheduler_address)


@pytest.mark.parametrize(
    "cores, threads, memory, device, chosen",
    [
        (8, "", 64e9, "cpu", "local:8"),
        (8, "3,1", 64e9, "cpu", "local:2"),
        (8, "8", 64e9, "cpu", None),
        (8, "", 13e9, "cpu", "local:2"),
        (8, "", 9e9, "cpu", None),
        (1, "", 64e9, "cpu", None),
        (8, "", 64e9, "cuda", None),
    ],
)
def test_a_machine_trains_as_many_runs_as_it_has_cores_and_memory(monkeypatch, cores, threads, memory, device, chosen):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr("dask.system.CPU_COUNT", cores)
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", memory)
    monkeypatch.setattr(cluster, "resolve_device", torch.device)
    assert cluster.local(device, 4.0) == chosen


@pytest.mark.parametrize(
    "scheduler, of_this_machine, trains",
    [
        ("auto", "local:2", "local:2"),
        ("auto", None, "this process"),
        (None, "local:2", "this process"),
        ("tcp://there:8786", "local:2", "tcp://there:8786"),
    ],
)
def test_make_reproduce_trains_by_the_scheduler_that_was_chosen(place, monkeypatch, scheduler, of_this_machine, trains):
    trained = []
    monkeypatch.setattr(reproduce, "flower_data", lambda place: None)
    monkeypatch.setattr(reproduce, "run_items", lambda items, together: trained.append(("this process", items)))
    monkeypatch.setattr(cluster, "train", lambda items, scheduler: trained.append((scheduler, items)))
    monkeypatch.setattr(cluster, "local", lambda device, gigabytes: of_this_machine)
    monkeypatch.setattr(cluster, "connect", lambda scheduler: SimpleNamespace(close=lambda: None))
    reproduce.train_all(place, scheduler)
    ((by, items),) = trained
    names = {(item.name, item.seed) for item in items}
    assert by == trains and len(names) == len(items)
    assert {("dmvae", 0), ("dmvae", 2), ("mvae", 0), ("dmvae-no-poe", 0), ("flowers-dmvae", 0)} <= names


def test_workers_of_this_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("dask.system.CPU_COUNT", 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with patch.dict(os.environ), cluster.connect("local:2") as client:
        found = client.run(lambda: (os.environ["OMP_NUM_THREADS"], tqdm([]).disable))
    assert list(found.values()) == [("3", True)] * 2


def test_items_are_trained_in_their_order(tmp_path):
    class Noted:
        def __init__(self, name):
            self.name = name

        def __str__(self):
            return self.name

        def run(self):
            write(tmp_path / "order", self.name)
            (tmp_path / "run.json").touch()
            return SimpleNamespace(folder=tmp_path)

    names, environment = list("hbgcafed"), dict(os.environ)
    cluster.train([Noted(name) for name in names], "local:1")
    assert (tmp_path / "order").read_text().split() == names
    assert dict(os.environ) == environment  # distributed leaves its workers' here


def test_the_bar_says_what_is_trained():
    processing = {
        "tcp://a": ("dmvae, seed 0 6f-1", "mvae, seed 1 6f-2"),
        "tcp://b": (),
        "tcp://c": ("mmvae, seed 2 6f-3",),
    }
    assert cluster._at_work(processing) == "3 workers: dmvae, seed 0; mmvae, seed 2"
    assert cluster._at_work({}) == "0 workers"


def test_a_scheduler_that_does_not_answer(place, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense", "local:many", "local:0", "local:-1"):
        with pytest.raises(DMVAEError, match=f"no Dask scheduler answers at '{address}'"):
            ex.run_grid([ex.DMVAE_DIGITS], place, scheduler=address)


def test_results_that_are_not_seen_here(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "VISIBLE_SECONDS", 0.0)
    with pytest.raises(DMVAEError, match="share this machine's file system"):
        cluster._wait_for(tmp_path / "elsewhere" / "run.json")
