"""benchmarks/grid.py: its cells, its choice, and that the rows use what it chose."""

from dataclasses import replace
from pathlib import Path

import grid
import pandas as pd
import pytest
from toy import MVAE_ROW, ROW, place_in

from dmvae_lib.paper import runs
from dmvae_lib.paper.profiles import get_profile

SUBSET = get_profile("subset")
EVERY = [(of, title, row) for of, rows in grid.TABLES.items() for title, row in rows.items()]
COMMITTED = sorted((Path(__file__).parents[1] / "results").glob("*/grid_*.csv"))


def test_every_row_has_as_many_cells_as_its_neighbours_and_its_authors_values_are_among_them():
    sizes = {of: {title: len(grid.cells(of, title)) for title in rows} for of, rows in grid.TABLES.items()}
    assert set(sizes["table1"].values()) == {27} and set(sizes["polymnist"].values()) == {8}
    parts = {
        "matching loss alone": 3,
        "DMVAE without matching loss": 3,
    }  # DMVAE's own weight has nothing to weigh there
    assert sizes["table2"] == dict.fromkeys(grid.OWN, 9) | parts
    for of, of_rows in grid.AUTHORS.items():
        for title, published in of_rows.items():
            assert any(published.items() <= cell.items() for cell in grid.cells(of, title)), title


@pytest.mark.parametrize("of, title, row", EVERY, ids=lambda value: value if isinstance(value, str) else "")
def test_a_cell_sets_what_it_says_and_nothing_else(of, title, row):
    variants = [(cell, grid.variant(row, SUBSET, cell)) for cell in grid.cells(of, title)]
    assert len({made.name for _, made in variants}) == len(variants)
    for cell, made in variants:
        assert grid.present(made, SUBSET, cell) == cell
        assert replace(made.schedule(SUBSET), learning_rate=0) == replace(row.schedule(SUBSET), learning_rate=0)
        usual, arguments = row.arguments(SUBSET), made.arguments(SUBSET)
        assert {name for name in usual if usual[name] != arguments[name]} <= cell.keys() | {"weights"}
        if of == "polymnist":
            assert arguments["weights"] == dict.fromkeys(usual["weights"], cell["weights"])
        elif "lambda" in cell:
            assert list(usual["weights"].items())[1:] == list(arguments["weights"].items())[1:]


def test_a_short_run_anneals_for_the_same_share_of_its_updates(tmp_path):
    schedule = MVAE_ROW.schedule(grid.shortened(place_in(tmp_path, steps=40, anneal_steps=20), 0.2).profile)
    assert (schedule.steps, schedule.anneal_steps) == (8, 4)


def lines(*scores):
    return pd.DataFrame([dict(zip(("row", "score", "own", "seeds"), of)) for of in scores])


def test_the_highest_score_is_chosen_unless_the_rows_own_is_near_it():
    nothing = float("nan")  # it diverged
    far, near = ("a", 50.0, True, 1), ("b", 60.0 - grid.MARGIN, True, 1)
    found = grid.choose(lines(far, near, ("b", 60.0, False, 1), ("a", 60.0, False, 1), ("a", 60.0, False, 1)))
    assert found["highest"].tolist() == [False, False, True, True, False]
    assert found["chosen"].tolist() == [False, True, False, True, False]  # of equals the first
    found = grid.choose(
        lines(("c", nothing, True, 0), ("c", 10.0, False, 1), ("d", nothing, True, 0), ("e", 5.0, True, 1))
    )
    assert found["chosen"].tolist() == [False, True, False, True]


def test_where_some_cells_have_more_seeds_these_alone_decide():
    found = grid.choose(lines(("a", 30.0, False, 1), ("a", 20.0, False, 3), ("a", 10.0, True, 3), ("a", 19.0, True, 1)))
    assert found["highest"].tolist() == found["chosen"].tolist() == [False, True, False, False]


def test_a_cell_that_seems_better_than_the_rows_own_is_measured_again_beside_it(monkeypatch):
    scores = {("x", 1): 50.0, ("own", 1): 40.0, ("x", 3): 42.0, ("own", 3): 41.0, ("y", 1): 45.0}
    monkeypatch.setattr(grid, "TABLES", {"table1": {"MVAE": None}})
    monkeypatch.setattr(grid, "cells", lambda of, title: ["x", "own", "y"])
    monkeypatch.setattr(
        grid,
        "line",
        lambda of, place, title, cell: (
            lines((title, scores[cell, place.seeds], cell == "own", place.seeds)).iloc[0].to_dict()
        ),
    )
    found = grid.measure("table1", place_in(Path()))
    assert found["score"].tolist() == [42.0, 41.0, 45.0] and found["chosen"].tolist() == [False, True, False]


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """The grid of two rows on toys, 2 rates, 1 lambda and 1 initialisation, a fifth of 40 updates, and its setting."""
    monkeypatch.setattr(grid, "TABLES", {"table1": {"DMVAE": ROW, "MVAE": MVAE_ROW}})
    monkeypatch.setattr(grid, "RATES", {"table1": (1e-3, 1e3)})
    monkeypatch.setattr(grid, "LAMBDAS", (5.0,))
    monkeypatch.setattr(grid, "INITIALISATIONS", ("pytorch",))
    return replace(grid.shortened(place_in(tmp_path), 0.2), seeds=2)


def test_the_grid_is_of_short_runs_on_validation_data_and_an_interrupted_one_goes_on(toys, monkeypatch):
    usual, begun = runs.train, []

    def interrupted(model, data, plan, *arguments, **options):
        begun.append(plan.learning_rate)
        if len(begun) == 7:  # two judges and, in pairs of seeds, two cells and a half
            raise KeyboardInterrupt
        return usual(model, data, plan, *arguments, **options)

    monkeypatch.setattr(runs, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grid.measure("table1", toys)
    found = grid.measure("table1", toys)
    again = 2 * 2  # two more seeds of each row's highest
    assert len(begun) == 2 + 4 * 2 + 1 + again and not toys.results.exists()
    assert found["row"].tolist() == ["DMVAE", "DMVAE", "MVAE", "MVAE"] and (found["updates"] == 8).all()
    assert (
        toys.runs / "toys-validation" / "grid-toy-mvae.learning-rate-0.001.lambda-5.0.initialise-pytorch-1"
    ).exists()
    measures = ["left->top", "top->left", "Joint"]
    scored = found.dropna(subset="score")
    assert scored["score"].tolist() == pytest.approx(scored[measures].mean(axis=1).tolist(), abs=0.006)
    assert (
        found["seeds"].isin([0, 2, 4]).all()
        and (found.loc[found["highest"], "seeds"] == 4).all()
        and found["chosen"].sum() == 2
    )
    begun.clear()
    pd.testing.assert_frame_equal(grid.measure("table1", toys), found)
    assert set(begun) <= {1e3}  # what diverges is tried again


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-2:]))
def test_the_rows_use_what_the_committed_grid_chose(path):
    of, profile = path.stem.removeprefix("grid_"), get_profile(path.parent.name)
    frame = pd.read_csv(path)
    assert (
        frame["chosen"].tolist() == grid.choose(frame)["chosen"].tolist()
    )  # by the rule, of the scores that are there
    for title, row in grid.TABLES[of].items():
        of_row = frame[frame["row"] == title]
        cells = grid.cells(of, title)
        assert of_row[list(cells[0])].to_dict("records") == cells, title
        best = cells[of_row["chosen"].to_numpy().argmax()]
        assert grid.present(row, profile, best) == best, f"{title}: {path} chose {best}; write it into its row"
