"""The README's example runs as it stands, and shows what it says."""

import re
from pathlib import Path

import torch

from dmvae_lib.paper.pages import BEGIN, END, readme_results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_on_ones_own_data_runs_learns_what_the_views_share_and_is_saved(tmp_path, monkeypatch):
    code, saving = re.findall(r"```python\n(.*?)```", README, re.S)
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["drawn"].shape == (5, 8, 12)
    # A video of kind c is lowest in dimension c: what is drawn must be of the audio's kind (chance: a third).
    drawn = names["model"].cross_generate({"audio": names["audio"]}, target="video", n=5)[..., :3].argmin(-1)
    assert (drawn == names["kind"].argmax(1)).double().mean() > 0.7
    assert names["history"]["total"].iloc[-1] < names["history"]["total"].iloc[0]
    monkeypatch.chdir(tmp_path)
    exec(saving.split("# On the Hugging Face Hub")[0], names)
    audio = {"audio": names["audio"]}
    assert torch.equal(names["again"].infer(audio).joint.mean, names["model"].infer(audio).joint.mean)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_results_are_those_of_the_committed_files():
    shown = README[README.index(BEGIN) + len(BEGIN) : README.index(END)]
    expected = readme_results(ROOT / "results").strip()
    assert shown.strip() == expected, "dmvae_lib.paper.pages.write_pages puts them right"


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 180
