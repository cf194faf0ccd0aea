"""Judging generalization measures: Kendall's tau, the rule, tables, and a grid trained by a stand-in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import _claim, _measures
from recipes._claim import ClaimError, read, summary
from recipes._measures import Grid, judge, kendall, measured, read_rows, run_claim, taus

# ---------------------------------------------------------------------- Kendall's tau


def test_tau_of_what_can_be_counted() -> None:
    assert kendall([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)  # one of six pairs is turned
    # a tie in x: of three pairs two count in x, three in y, and both agree
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert kendall([1, 1, 1], [1, 2, 3]) != kendall([1, 1, 1], [1, 2, 3])  # nan


numbers = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30)


@settings(deadline=None)
@given(numbers)
def test_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import kendalltau

    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    assert kendall(x, y) == pytest.approx(kendalltau(x, y).statistic, nan_ok=True, abs=1e-12)
    if len(set(x)) > 1:
        assert kendall(x, x) == 1.0


def test_pooled_and_within() -> None:
    # within each group the measure falls as the gap grows; the groups are in order
    rows: list[dict[str, float]]
    rows = [{"noise": n, "m": 10 * n + i, "gap": 10 * n - i, "seed": 1} for n in (0, 1) for i in range(3)]
    pooled, within = taus(rows, "m", "noise")
    assert within == -1.0 and pooled == pytest.approx((9 - 6) / 15)
    rows.append({"noise": 2, "m": 5.0, "gap": 1.0, "seed": 1})  # a group of one says nothing of its own
    assert taus(rows, "m", "noise")[1] == -1.0


# ---------------------------------------------------------------------- the rule


def grid(**more: Any) -> Grid:
    """The project's own, with two measures and its seeds."""
    found = read("generalization_measures")
    assert isinstance(found, Grid)
    return _claim.replace(found, measures=["close", "wild"], **more)


def rows(seeds: int = 5, floor: float = 0.27, error: float = 0.0) -> list[dict[str, float]]:
    """Runs in which ``close`` ranks the gap and lies 0.05 beside it, and ``wild`` ranks it and is far off."""
    found = []
    for seed in range(1, seeds + 1):
        for noise in (0.0, 0.5, 1.0):
            for i in range(4):
                gap = 0.1 + 0.3 * noise + 0.01 * i + 0.001 * seed
                row = {"seed": seed, "noise": noise, "gap": gap, "close": gap + 0.05, "wild": 7 * gap, "unfit": 0.0}
                found.append({**row, "val_loss": 1.0 + i, "train_error": error, "floor": floor if noise == 0 else 0.0})
    return found


def verdict(claim: Grid, table: list[dict[str, float]], names: list[str]) -> tuple[str, list[str]]:
    return judge(claim, table, {name: measured(claim, table, name) for name in names})


def test_a_measure_that_ranks_and_tells_the_gap_refutes_the_claim() -> None:
    table = rows()
    assert verdict(grid(), table, ["close", "wild"]) == ("not supported", ["close"])
    assert verdict(grid(close=0.04), table, ["close", "wild"]) == ("supported", [])  # it is off by 0.05
    assert verdict(grid(), table, ["wild"]) == ("supported", [])
    assert verdict(grid(), table, ["gap"]) == ("not supported", ["gap"])
    one_off = [dict(row) for row in table]
    one_off[7]["close"] += 0.2
    assert verdict(grid(), one_off, ["close"]) == ("supported", [])  # tight means in all runs


def test_the_floor_decides_where_no_measure_is_tight() -> None:
    assert verdict(grid(), rows(floor=0.1), ["wild"])[0] == "not supported"
    assert verdict(grid(), rows(error=0.01), ["wild"])[0] == "inconclusive"  # none fits its labels
    straddling = [{**row, "floor": 0.2 + (0.1 if row["seed"] == 1 else -0.01)} for row in rows()]
    assert verdict(grid(), straddling, ["wild"])[0] == "inconclusive"


def test_unfit_runs_are_not_ranked() -> None:
    table = rows()
    for row in table[::3]:
        row |= {"unfit": 1.0, "close": 1e6}
    found = measured(grid(), table, "close")
    assert set(found.pooled.values()) == {1.0} and found.off_most == pytest.approx(0.05)
    with pytest.raises(ClaimError, match="no ranked run has a number for 'close'"):
        measured(grid(), [{**row, "unfit": 1.0} for row in table], "close")


# ---------------------------------------------------------------------- tables


def write(file: Path, table: list[dict[str, float]], prefix: str = "") -> Path:
    names = {name: name if name == "noise" else prefix + name for name in table[0]}
    with file.open("w", newline="") as opened:
        out = csv.writer(opened)
        out.writerow([*({**names, "seed": "seed_everything"} if prefix else names).values(), "Name"])
        out.writerows([[*row.values(), "run"] for row in table])
    return file


def test_a_table_is_judged_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_claim.Trainer, "all", lambda *_: pytest.fail("it trains"))
    plain = run_claim(grid(), tmp_path / "a", 1, said.append, table=write(tmp_path / "a.csv", rows()))
    assert plain["verdict"] == "not supported" and plain["tight"] == ["close"]
    # as W&B exports it
    export = write(tmp_path / "b.csv", rows(), "generalization_measures/")
    again = run_claim(grid(), tmp_path / "b", 1, said.append, table=export)
    assert {**again, "floors": 0} == {**plain, "floors": 0}
    assert plain["results"]["wild"] == dict.fromkeys(range(1, 6), 1.0)
    controls = plain["controls"]
    assert controls["gap as a measure of itself"] == {"tau": [1.0], "off": 0.0, "verdict": "not supported"}
    assert controls["val_loss as a measure of itself"]["tau"] == [1.0]
    for name in ("result.json", "table.md", "plot.png"):
        assert (tmp_path / "a" / name).stat().st_size > 500
    saved = json.loads((tmp_path / "a" / "result.json").read_text())
    line = summary([saved]).splitlines()[2]
    assert "| `Kendall's tau with the gap`: close 1.000, wild 1.000 | floor +0.27 [+0.27, +0.27] | 5 |" in line
    text = (tmp_path / "a" / "table.md").read_text()
    assert "such are: close." in text and "| wild | +1.00 [+1.00, +1.00] |" in text


def test_tables_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match=r"can't be read as a table"):
        read_rows(grid(), tmp_path / "none.csv")
    table = [{k: v for k, v in row.items() if k not in ("wild", "gap")} for row in rows()]
    with pytest.raises(ClaimError, match="has no column gap, wild"):
        read_rows(grid(), write(tmp_path / "x.csv", table))
    (tmp_path / "y.csv").write_text("seed,noise\n")
    with pytest.raises(ClaimError, match="has no runs"):
        read_rows(grid(), tmp_path / "y.csv")
    bad = [dict(row) for row in rows()]
    bad[3]["gap"] = float("nan")
    with pytest.raises(ClaimError, match="line 5: 'gap' is no number"):
        read_rows(grid(), write(tmp_path / "z.csv", bad))


def test_the_option_is_for_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.csv", rows())
    assert _claim.main(["advstyle", "--csv", str(file), "--out", str(tmp_path)]) == 2
    assert "--csv is for claims of a grid" in capsys.readouterr().err
    assert _claim.main(["generalization_measures", "--csv", str(file), "--out", str(tmp_path)]) == 2
    assert "has no column params" in capsys.readouterr().err


# ---------------------------------------------------------------------- training the grid

FAKE = """
import csv, pathlib, shlex, sys
folder, recipe, seed, *runs = sys.argv[1:]
found = {}
for run in runs:
    name, _, words = run.partition(": ")
    words = shlex.split(words)
    noise = float(words[words.index("--noise") + 1])
    gap = 0.1 + 0.3 * noise + 0.01 * float(words[words.index("--width") + 1]) + 0.001 * int(seed)
    values = {"gap": gap, "train_error": 0.0, "floor": 0.3 - 0.3 * noise, "close": gap, "wild": -gap, "unfit": 0.0}
    found |= {f"{name}/generalization_measures/{key}": value for key, value in values.items()}
file = pathlib.Path(folder) / "group" / "all" / "metrics.csv"
file.parent.mkdir(parents=True, exist_ok=True)
with file.open("w", newline="") as opened:
    csv.writer(opened).writerows([list(found), list(found.values())])
count = pathlib.Path(folder) / "count"
count.write_text(count.read_text() + "x" if count.exists() else "x")
"""


def small(folder: Path) -> Grid:
    """A grid of six points."""
    given = {
        **{"claim": "none", "train": "classifier", "args": ["--noise", "{noise}", "--width", "{width}"]},
        **{"grid": {"noise": [0, 1], "width": [1, 2, 3]}, "within": "noise", "measures": ["close", "wild"]},
        "seeds": [1, 2, 3, 4, 5],
    }
    (folder / "configs" / "fake").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "fake" / "claim.yaml").write_text(yaml.safe_dump(given))
    found = read("fake", folder / "configs")
    assert isinstance(found, Grid)
    return found


def test_a_grid_is_trained_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = small(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    original = _measures.cells

    def cells(claim: Grid, out: Path) -> list[Any]:
        found = original(claim, out)
        for cell in found:
            assert cell.command[1:3] == ["-m", "recipes._measures"]
            cell.command[1:3] = [str(tmp_path / "fake.py")]
        return found

    monkeypatch.setattr(_measures, "cells", cells)
    said: list[str] = []
    with pytest.raises(ClaimError, match="10 of 10 cells aren't trained"):
        run_claim(claim, tmp_path / "out", 2, said.append, report_only=True)
    result = run_claim(claim, tmp_path / "out", 2, said.append)
    assert [f.read_text() for f in (tmp_path / "out").rglob("count")] == ["x"] * 10
    assert result["results"] == {"close": dict.fromkeys(range(1, 6), 1.0), "wild": dict.fromkeys(range(1, 6), -1.0)}
    assert result["verdict"] == "not supported" and result["runs"] == {"all": 30, "ranked": 30, "fitted": 30}
    table = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert len(table) == 30 and table[0]["noise"] == "0.0" and float(table[1]["gap"]) == pytest.approx(0.121)
    again = run_claim(claim, tmp_path / "out", 2, said.append, report_only=True)
    assert {f.read_text() for f in (tmp_path / "out").rglob("count")} == {"x"} and again == result
    # what it wrote is what it reads
    told = run_claim(claim, tmp_path / "told", 2, said.append, table=tmp_path / "out" / "runs.csv")
    assert (told["results"], told["off"], told["verdict"]) == (result["results"], result["off"], result["verdict"])


def test_a_cell_types_what_a_user_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[list[str]] = []

    def main(argv: list[str]) -> int:
        typed.append(argv)
        root = Path(argv[argv.index("--trainer.default_root_dir") + 1]) / "classifier" / "run"
        root.mkdir(parents=True)
        (root / "metrics.csv").write_text("step,generalization_measures/gap\n1,0.25\n")
        return 3 if "5" in argv else 0

    monkeypatch.setattr("recipes.__main__.main", main)
    claim = small(tmp_path)
    (first, *_) = _measures.cells(claim, tmp_path)
    folder, recipe, seed, *runs = first.command[3:]
    assert _measures.train_group(Path(folder), recipe, seed, runs) == 0
    assert typed[1][:6] == ["classifier", "fit", "--noise", "0", "--width", "2"]
    assert typed[1][6:8] == ["--seed_everything", "1"]
    found = _claim.last_values(Path(folder), ["width=2/generalization_measures/gap"])
    assert found["width=3/generalization_measures/gap"] == 0.25
    assert _measures.train_group(tmp_path / "fails", recipe, "5", runs) == 3 and len(typed) == 4


def test_grids_that_are_none_are_refused(tmp_path: Path) -> None:
    small(tmp_path)
    file = tmp_path / "configs" / "fake" / "claim.yaml"
    good = yaml.safe_load(file.read_text())
    change: dict[str, Any]
    for change in ({"within": "depth"}, {"measures": []}, {"grid": {"noise": [0]}}, {"args": ["{depth}"]}, {"x": 1}):
        file.write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(ClaimError, match="is no claim"):
            read("fake", tmp_path / "configs")
