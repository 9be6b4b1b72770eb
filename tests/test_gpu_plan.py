"""The plan for a GPU, rehearsed on the CPU at a tiny budget."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import pandas as pd
import parity
import pytest
import torch

from dmvae_lib.paper.runs import setting

CPU = torch.device("cpu")


def test_the_golden_numbers_hold_and_another_objective_is_seen(monkeypatch):
    assert gpu.golden(CPU, ["dmvae", "flowers-gmm-hglmm"])["agrees"].to_dict() == {"dmvae": True}
    other = replace(gpu.ROWS["dmvae"], options={**gpu.ROWS["dmvae"].options, "without": ["svhn<-mnist"]})
    monkeypatch.setitem(gpu.ROWS, "dmvae", other)
    with pytest.raises(KeyError, match="svhn<-mnist"):
        gpu.golden(CPU, ["dmvae"])
    monkeypatch.setattr(gpu, "numbers", lambda row, device: {"start": {"total": 1.00001}})
    monkeypatch.setattr(gpu.json, "loads", lambda text: {"mvae": {"start": {"total": 1.0}}})
    assert not gpu.golden(CPU, ["mvae"])["agrees"].any()


def test_the_seeds_are_trained_side_by_side_leave_entries_and_are_not_trained_twice(tmp_path):
    command = [
        sys.executable,
        gpu.__file__,
        "--device",
        "cpu",
        "--profile",
        "smoke",
        "--out",
        str(tmp_path),
        "--seeds",
        "2",
    ]
    command += ["--updates", "3", "--parts", "train"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    entries = {
        path.name: json.loads(path.read_text()) for path in (tmp_path / "results/runs").glob("dmvae-long-*.json")
    }
    assert entries.keys() == {"dmvae-long-0.json", "dmvae-long-1.json"}
    for entry in entries.values():
        assert entry["config"]["schedule"]["steps"] == 3 and entry["config"]["schedule"]["batch_size"] == 100
    assert "DMVAE, 3 updates of 100, 2 seeds" in printed and (tmp_path / "train.txt").read_text() in printed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/model.safetensors")}
    assert gpu.train_seeds(gpu.parser().parse_args(command[2:]), _place(tmp_path), 0.0)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/model.safetensors")}


def _place(out):
    profile = replace(gpu.get_profile("smoke"), writes_results=True, precision="auto")
    return gpu.Setting(profile, 2, "cpu", Path("data").resolve(), out / "runs", out / "results")


def test_speed_has_every_trainer_and_every_number_of_workers():
    found = gpu.speed(CPU, gpu.get_profile("smoke"), (1,), steps=1)
    assert list(found["workers"].columns) == ["1 workers"] and (found["workers"] > 0).all(axis=None)
    assert set(found["workers"].index) <= set(found["trainers"].index)


def test_parity_is_judged_by_differences_paired_by_seed_against_the_seeds_spread():
    """Worked out by hand: differences 1 and 3, whose interval is 12.7 times their standard error of 1; float32 50 and 54."""
    shares = {("A", 0): {("joint", "float32"): 0.50, ("joint", "bfloat16"): 0.51}}
    shares[("A", 1)] = {("joint", "float32"): 0.54, ("joint", "bfloat16"): 0.57}
    line = parity.compare(pd.DataFrame.from_dict(shares, orient="index")).loc[("A", "Joint")]
    assert line["difference"] == pytest.approx(2) and line["to"] == pytest.approx(2 + 12.706, abs=1e-3)
    assert line["spread of seeds"] == pytest.approx(4) and line["agrees"] == "yes"
    shares[("A", 1)][("joint", "bfloat16")] = 0.62
    assert parity.compare(pd.DataFrame.from_dict(shares, orient="index"))["agrees"].tolist() == ["no"]


def test_parity_takes_the_profiles_own_runs_and_those_of_float32_apart(monkeypatch):
    place = setting("subset")
    low, high = (parity.Run(parity.ROWS[0], 0, to) for to in (place, parity.in_float32(place)))
    assert low.folder != high.folder and high.entry_path.parent == high.folder  # nothing of it goes into results/
    assert [run.row.schedule(run.setting.profile).precision for run in (low, high)] == ["auto", "float32"]
    curve = {"updates": [1_200, parity.UPDATES], "joint": [0.1, 0.2]}
    entry = {"made": {"precision": "bfloat16"}, "curve": curve, "scores": {"joint": 0.3}}
    monkeypatch.setitem(low.__dict__, "entry", entry)
    assert parity.in_bfloat16(low) == {"joint": 0.2}
    curve["updates"] = [1_200, 4_800]
    with pytest.raises(parity.DMVAEError, match=r"no validation scores after 2400 updates \(only 1200, 4800\)"):
        parity.in_bfloat16(low)
    entry["made"]["precision"] = "float32"
    with pytest.raises(parity.DMVAEError, match="was trained in float32, expected bfloat16; delete"):
        parity.in_bfloat16(low)


def test_parity_takes_the_next_seeds_too_that_are_there_in_both(monkeypatch):
    there = {"subset": {0, 1, 2, 3, 5}, "subset-float32": {2, 3, 4, 5}}
    monkeypatch.setattr(parity.Run, "recorded", lambda run: run.seed in there[run.setting.profile.name] or None)
    place = setting("subset", seeds=2)
    assert parity.seeds_of(parity.ROWS[0], (place, parity.in_float32(place))) == range(4)
    assert parity.seeds_of(parity.ROWS[0], (replace(place, seeds=1), parity.in_float32(place))) == range(1)
