"""The golden numbers: what guards the mathematics of every row of the tables.

`.venv/bin/python tests/test_golden.py` records them anew, into tests/golden.json.
"""

import json
import sys

import pytest
from golden import GOLDEN, ROWS, numbers

COMMAND = ".venv/bin/python tests/test_golden.py"


def check(row) -> None:
    expected, found = json.loads(GOLDEN.read_text()).get(row.name), numbers(row)
    advice = (
        f"or raise the row's version (its runs are then trained again) and run `{COMMAND}` to record the new numbers"
    )
    assert expected is not None, f"row {row.name} has no golden numbers: run `{COMMAND}`"
    for when, values in expected.items():
        assert found[when] == pytest.approx(values, rel=1e-6, abs=1e-9), (
            f"the mathematics of row {row.name} changed ({when}): undo it, {advice}"
        )
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_the_mathematics_is_the_recorded_one(row):
    check(row)


def test_no_row_is_recorded_that_is_gone():
    assert set(json.loads(GOLDEN.read_text())) == set(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.fit], ids=lambda row: row.name)
def test_the_steps_move_the_numbers_and_do_not_explode(row):
    start, after = json.loads(GOLDEN.read_text())[row.name].values()
    assert (
        abs(after["total"] - start["total"]) > 1e-4 * abs(start["total"]) and after["gradient"] < 10 * start["gradient"]
    )


@pytest.mark.parametrize("name", ["dmvae", "mvae", "jmvae", "flowers-dmvae"])
def test_a_changed_constant_is_seen_and_what_to_do_is_said(monkeypatch, name):
    from dmvae_lib import DiagonalGaussian, product_of_experts

    def changed(*arguments, **options):
        found = product_of_experts(*arguments, **options)
        return DiagonalGaussian(found.mean, found.logvar + 1e-4)

    if name == "jmvae":  # all there is to see it by are its posteriors
        usual = DiagonalGaussian.kl
        monkeypatch.setattr(DiagonalGaussian, "kl", lambda *arguments: usual(*arguments) * (1 + 1e-5))
    for module in [module for key, module in sys.modules.items() if key.startswith("dmvae_lib")]:
        if hasattr(module, "product_of_experts"):
            monkeypatch.setattr(module, "product_of_experts", changed)
    with pytest.raises(AssertionError, match=f"row {name} changed .*: undo it, or raise the row's version .*{COMMAND}"):
        check(ROWS[name])


if __name__ == "__main__":
    recorded = {name: numbers(row) for name, row in ROWS.items()}
    short = json.loads(json.dumps(recorded), parse_float=lambda digits: float(f"{float(digits):.9g}"))
    GOLDEN.write_text(json.dumps(short, indent=1) + "\n")
    print(f"{GOLDEN} has the numbers of {len(ROWS)} rows.")
