"""The benchmark compares like with like: the plain loop and MultiVae compute Eq. 3 as the library does."""

from dataclasses import replace

import pytest
import torch

from dmvae_lib import benchmark
from dmvae_lib.data import PairedData
from dmvae_lib.experiments import DMVAE_DIGITS, build
from dmvae_lib.profiles import get_profile


def tiny() -> tuple:
    torch.manual_seed(0)
    model = build(DMVAE_DIGITS, replace(get_profile("quick"), width=0.125))
    items = {"mnist": torch.rand(30, 1, 28, 28), "svhn": torch.rand(30, 3, 32, 32)}
    return model, PairedData.pair(items, dict.fromkeys(items, torch.arange(30) % 10), permutations=1)


def test_operations_are_those_counted_by_hand():
    """A full-size update of 100 pairs: forward passes of encoders (100) and decoders (300), backward twice that."""
    model = build(DMVAE_DIGITS, get_profile("paper"))
    batch = {"mnist": torch.rand(2, 1, 28, 28), "svhn": torch.rand(2, 3, 32, 32)}
    dense = {"mnist": 784 * 256 + 256 * 22, "svhn": 1024 * 512 + 512 * 28}
    sides, channels = (32, 16, 8, 4, 2), (3, 32, 64, 128, 256)
    convolutions = sum(i * o * 16 * s**2 for i, o, s in zip(channels, channels[1:], sides[1:]))
    decoders = 11 * 256 + 256 * 784 + 14 * 1024 + convolutions
    forward = 2 * (sum(dense.values()) + convolutions + 3 * decoders) * 2
    images = 2 * 2 * (784 * 256 + 3 * 32 * 16 * 16**2)  # nobody asks for the gradient of the images
    assert benchmark.operations(model, batch) == 3 * forward - images


def test_the_table_compares_every_contestant_with_the_machine():
    class Place:
        profile = replace(get_profile("smoke"), width=0.125, batch_size=5)
        device = "cpu"
        digits = type("Digits", (), {"train": tiny()[1]})

    few = {name: benchmark.CONTESTANTS[name] for name in ("dmvae_lib", "plain data-loader loop")}
    table = benchmark.measure(Place, few, rounds=1)
    assert list(table.index) == list(few) and table.loc["dmvae_lib", "ours is faster by"] == 1
    expected = table["GFLOP/s"] / table.attrs["matmul GFLOP/s"]
    assert (table["share of matmul rate"] / expected).tolist() == pytest.approx([1, 1])
    assert table["pairs per second"].min() > 0


def test_what_comes_before_the_first_update_is_not_its_time(monkeypatch):
    monkeypatch.setattr(benchmark, "seconds", lambda work, device: work())
    assert benchmark.seconds_per_update(lambda n: 7 + 0.5 * n, 10, torch.device("cpu")) == 0.5


def test_side_by_side_an_update_is_one_of_one_seed(monkeypatch):
    trained = []
    monkeypatch.setattr(benchmark, "train_side_by_side", lambda jobs, device: trained.append(jobs))
    monkeypatch.setattr(benchmark, "seconds_per_update", lambda updates, n, device: updates(n) or 5.0)
    (contestant,) = benchmark.ON_A_GPU.values()
    assert contestant(*tiny(), 5, torch.device("cpu"))() == 1
    assert {job.seed for job in trained[0]} == set(range(5)) == set(range(len({id(job.model) for job in trained[0]})))
