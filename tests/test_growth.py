"""Growth: what is measured, each point in a process of its own, and the picture of it."""

import growth
import pandas as pd
import pytest
import torch

from dmvae_lib import DMVAEError
from dmvae_lib.paper.profiles import get_profile


@pytest.fixture(scope="module")
def measured():
    axes = {"pairs": (growth.ITEMS, 50 * growth.ITEMS), "batch size": (1_000,)}  # the pairs in batches of 100
    return growth.measure("smoke", "cpu", axes)


def test_memory_follows_the_batch_and_not_the_number_of_pairings(measured):
    peak = measured["peak MB"]
    images = 784 + 3 * 32 * 32  # bytes of a pair, were it stored: 50 pairings would be 1.5 GB
    assert peak["pairs", 50 * growth.ITEMS] - peak["pairs", growth.ITEMS] < 0.05 * 49 * growth.ITEMS * images / 1e6
    assert peak["batch size", 1_000] > 1.5 * peak["pairs", growth.ITEMS]


def test_an_update_of_a_larger_batch_takes_longer(measured):
    times = measured["ms per update"]
    assert times["batch size", 1_000] > 2 * times["pairs", growth.ITEMS] > 0


def test_figure_has_a_column_for_every_axis_and_shows_the_table(measured):
    shown = growth.figure(measured)
    assert len(shown.axes) == 4
    (line,) = [line for line in shown.axes[0].lines if line.get_linestyle() == "-"]
    assert line.get_ydata().tolist() == measured.loc["pairs", "ms per update"].tolist()
    assert [ax.get_xlabel() for ax in shown.axes[:2]] == ["pairs", "batch size"]


@pytest.mark.parametrize("against", growth.AXES)
def test_every_axis_sets_its_own_size(against, one_thread):
    value = growth.AXES[against][1]
    model, data, plan = growth.case(against, value, get_profile("smoke"))
    sizes = {"pairs": len(data), "batch size": plan.batch_size, "modalities": len(model.names)}
    sizes["particles"] = getattr(model, "particles", None)
    assert sizes[against] == value
    loss = model.loss(data.batch(torch.arange(4))).total
    assert loss.isfinite()


def test_a_point_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(growth.sys, "executable", "false")
    with pytest.raises(DMVAEError, match="growth: batch size = 10 failed"):
        growth.measure("smoke", "cpu", {"batch size": (10,)})


def test_work_of_modalities_is_that_of_eq_3():
    table = pd.DataFrame(
        {"against": "modalities", "value": (1, 2, 5), "ms per update": (1.0, 3.0, 15.0), "peak MB": 1.0}
    ).set_index(["against", "value"])
    (dashed,) = [line for line in growth.figure(table).axes[0].lines if line.get_linestyle() == "--"]
    assert dashed.get_ydata().tolist() == pytest.approx([1, 3, 15])
