"""The benchmark compares like with like: the plain loop computes Eq. 3 as the library does."""

from dataclasses import replace

import bench
import pandas as pd
import pytest
import torch
from standins import make_certain

from dmvae_lib import DMVAEError, PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.profiles import get_profile

CPU = torch.device("cpu")
SMALL = replace(get_profile("smoke"), width=0.125, batch_size=5)


def few_pairs(n: int = 30) -> PairedData:
    pairs = bench.random_pairs(SMALL).train
    first = {name: torch.arange(n) for name in pairs.names}
    return PairedData(pairs.items, first)


def splits() -> Splits:
    return Splits(few_pairs(), few_pairs(), {}, "embedded")


def test_operations_are_those_counted_by_hand():
    """A full-size update of 100 pairs: forward passes of encoders (100) and decoders (300), backward twice that."""
    model = bench.fresh(get_profile("paper"), splits())
    batch = {"mnist": torch.rand(2, 1, 28, 28), "svhn": torch.rand(2, 3, 32, 32)}
    dense = {"mnist": 784 * 256 + 256 * 22, "svhn": 1024 * 512 + 512 * 28}
    sides, channels = (32, 16, 8, 4, 2), (3, 32, 64, 128, 256)
    convolutions = sum(i * o * 16 * s**2 for i, o, s in zip(channels, channels[1:], sides[1:]))
    decoders = 11 * 256 + 256 * 784 + 14 * 1024 + convolutions
    forward = 2 * (sum(dense.values()) + convolutions + 3 * decoders) * 2
    images = 2 * 2 * (784 * 256 + 3 * 32 * 16 * 16**2)  # nobody asks for the gradient of the images
    assert bench.operations(model, batch) == 3 * forward - images


def test_the_plain_loop_has_the_gradient_of_eq_3_when_nothing_is_drawn():
    """Of all pairs in one batch; its gradient is what its first update leaves in `grad`."""
    model, data = bench.fresh(SMALL, splits()), few_pairs()
    make_certain(model)
    update = bench.plain_loop(model, data, 30, CPU, 1)
    model.eval()  # no dropout
    expected = torch.autograd.grad(model.loss(data.batch(torch.arange(30))).total, list(model.parameters()))
    update()
    for parameter, gradient in zip(model.parameters(), expected):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm()


def few(precision: str = "float32") -> dict:
    who = {bench.OURS: bench.ours, "plain data-loader loop": bench.plain_loop}
    return who if precision == "float32" else {bench.OURS: bench.ours, f"{bench.OURS}, bfloat16": bench.ours}


def test_the_table_compares_every_contestant_with_the_machine():
    table = bench.measure(SMALL, splits(), CPU, few(), rounds=1, steps=2)
    assert list(table.index) == list(few()) and table.loc[bench.OURS, "ours is faster by"] == 1
    expected = table["GFLOP/s"] / table.attrs["matmul GFLOP/s, float32"]
    assert (table["share of matmul rate"] / expected).tolist() == pytest.approx([1, 1])
    assert table["pairs per second"].min() > 0
    assert len(bench.bars(pd.concat({"a": table, "b": table}), "CPU").axes) == 2


def test_each_precision_is_measured_against_its_own_limit(monkeypatch):
    who = {name: lambda *_: lambda: 0.5 for name in few("bfloat16")}
    rates = {"float32": 1e9, "bfloat16": 4e9}
    monkeypatch.setattr(bench, "matmul_rate", lambda device, precision: rates[precision])
    shares = bench.measure(SMALL, splits(), CPU, who, 1)["share of matmul rate"]
    assert shares.iloc[0] == pytest.approx(4 * shares.iloc[1])


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_bfloat16_takes_part_where_it_is_faster_and_trains_in_it(monkeypatch, faster):
    seen = []
    monkeypatch.setattr(bench, "train", lambda *_, **options: seen.append(_[2].precision))
    monkeypatch.setattr(bench, "resolve_precision", lambda precision, device: faster)
    for name, who in bench.contestants(CPU).items():
        if name.startswith(bench.OURS):
            who(None, None, 5, CPU, 2)()
    assert seen == ["float32"] * 2 + ["bfloat16"] * 2 * (faster == "bfloat16")


def test_processes_side_by_side_fill_tables_by_the_sum_of_their_rates():
    found = bench.side_by_side(2, 1, "smoke", "cpu", steps=2)
    assert len(found) == 2 and all(process["seconds per update"] > 0 < process["peak MB"] for process in found)
    assert bench.runs_per_hour(100, [{"seconds per update": 1.0}, {"seconds per update": 0.5}]) == 36 + 72
    with pytest.raises(DMVAEError, match="(?s)smoke, nobody: one of them failed: .*KeyError"):
        bench.side_by_side(1, 1, "smoke", "cpu", "nobody")


def test_every_contestant_is_measured_in_one_process_and_in_one_on_each_core(monkeypatch):
    times = {(1, 4): 0.5, (4, 1): 1.0}
    found = lambda n, threads, *_: n * [{"seconds per update": times[n, threads], "peak MB": 7.0}]  # noqa: E731
    monkeypatch.setattr(bench, "side_by_side", found)
    peaks, per_hour = bench.alone_and_together(SMALL, "cpu", 4, ["ours", "theirs"])
    assert peaks == [7.0, 7.0] and list(per_hour.index) == ["ours", "theirs"]
    one, each = (3_600 / SMALL.steps * rate for rate in (2, 4))
    assert per_hour.loc["ours"].to_dict() == {"1 process of 4 threads": one, "4 processes of 1 thread": each}


def test_what_comes_before_the_first_update_is_not_its_time(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work, device: work())
    assert bench.seconds_per_update(lambda n: 7 + 0.5 * n, 10, CPU) == 0.5
