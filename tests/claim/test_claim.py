"""The claim runner: statistics against numbers worked out elsewhere, bookkeeping with a stand-in command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recipes import _claim
from recipes._claim import (
    CellFailed,
    Claim,
    ClaimError,
    compare,
    last_values,
    read,
    run_claim,
    steps_to,
    summary,
    t_interval,
    verdict,
)

FAKE = """
import csv, pathlib, sys, time
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
if "--fail" in words: sys.exit("it went wrong")
if "--wait" in words: time.sleep(60)
if "--deaf" in words:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(60)
folder = pathlib.Path(value("--trainer.default_root_dir")) / "fake" / "run"
folder.mkdir(parents=True, exist_ok=True)
gain = float(value("--gain")) if "--gain" in words else 0.0
seed = int(value("--seed_everything"))
with (folder / "metrics.csv").open("w", newline="") as f:
    rows = csv.writer(f)
    value = "nan" if "--nan" in words else 0.5 + 0.01 * seed + gain * (1 + 0.1 * seed)
    rows.writerows([["step", "val/acc", "test/acc", "val/loss"], [1, 0.3, "", 1.0], [2, "", value, ""]])
    rows.writerows([[3, 0.4, "", 0.8 - gain], [5, "", "", 0.4 - gain]])
count = folder.parent.parent / "count"
count.write_text(count.read_text() + "x" if count.exists() else "x")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``python -m recipes.fake fit`` is a script that writes metrics.csv."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    original = _claim.cells

    def cells(claim: Claim, out: Path) -> list[_claim.Cell]:
        found = original(claim, out)
        for cell in found:
            cell.command[1:4] = [str(script)]
        return found

    monkeypatch.setattr(_claim, "cells", cells)
    return tmp_path


def claim(**more: object) -> Claim:
    arms = {"plain": _claim.Arm("fake"), "ours": _claim.Arm("fake", ["--gain", "0.1"]), "other": _claim.Arm("fake")}
    usual = {
        "recipe": "fake",
        "claim": "ours is better",
        "metric": "test/acc",
        "baseline": "plain",
        "technique": "ours",
    }
    return Claim(**{**usual, "arms": arms, "seeds": [1, 2, 3, 4, 5], **more})  # type: ignore[arg-type]


def test_interval_against_a_printed_table() -> None:
    # mean 3, sd sqrt(2.5), n 5; Student's t at 97.5 % with 4 degrees of freedom is 2.776445 in any table
    mean, low, high = t_interval([1, 2, 3, 4, 5])
    assert (mean, low, high) == pytest.approx(
        (3, 3 - 2.776445 * (2.5 / 5) ** 0.5, 3 + 2.776445 * (2.5 / 5) ** 0.5), abs=1e-5
    )
    with pytest.raises(ClaimError, match="two seeds"):
        t_interval([1.0])


@pytest.mark.parametrize(
    ("low", "high", "margin", "wanted"),
    [
        (0.01, 0.2, 0.0, "supported"),
        (-0.01, 0.2, 0.0, "inconclusive"),
        (-0.2, -0.01, 0.0, "not supported"),
        (0.01, 0.2, 0.05, "inconclusive"),
        (0.01, 0.04, 0.05, "not supported"),
        (0.0, 0.2, 0.0, "inconclusive"),
        (-0.02, 0.01, -0.03, "supported"),
        (-0.04, 0.01, -0.03, "inconclusive"),
        (-0.09, -0.04, -0.03, "not supported"),
    ],
)
def test_verdict(low: float, high: float, margin: float, wanted: str) -> None:
    assert verdict(low, high, margin) == wanted


def test_differences_are_paired_and_follow_the_direction() -> None:
    results = {
        "plain": dict(zip(range(1, 6), [0.1, 0.5, 0.9, 0.2, 0.4], strict=True)),
        "ours": dict(zip(range(1, 6), [0.2, 0.61, 0.99, 0.31, 0.49], strict=True)),
        "other": dict.fromkeys(range(1, 6), 0.5),
    }
    first, *rest = compare(claim(), results)
    assert (first.arm, first.over, first.verdict) == ("ours", "plain", "supported")  # unpaired it would drown
    assert first.mean == pytest.approx(0.1) and first.low > 0.08
    assert [(d.arm, d.over) for d in rest] == [("other", "plain"), ("ours", "other")]
    assert compare(claim(direction="min"), results)[0].verdict == "not supported"


def test_a_claim_is_run_recorded_and_not_run_again(fake: Path) -> None:
    said: list[str] = []
    result = run_claim(claim(), fake / "out", 2, said.append)
    assert result["verdict"] == "supported"
    assert result["results"]["ours"][2] == pytest.approx(0.5 + 0.02 + 0.12)
    assert result["differences"][0]["mean"] == pytest.approx(0.13)
    assert len([line for line in said if "seed" in line and "eta" in line]) == 15
    written = json.loads((fake / "out" / "result.json").read_text())
    assert written["verdict"] == "supported" and (fake / "out" / "plot.png").stat().st_size > 5000
    assert "| ours over plain | +0.1300 [" in (fake / "out" / "table.md").read_text()
    run_claim(claim(), fake / "out", 2, said.append)
    counts = [f.read_text() for f in (fake / "out").rglob("count")]
    assert counts == ["x"] * 15, "a finished cell was trained again"
    arms = {**claim().arms, "ours": _claim.Arm("fake", ["--gain", "0.0"])}
    assert run_claim(claim(arms=arms), fake / "out", 2, said.append)["differences"][0]["mean"] == 0.0
    assert result["differences"][0]["gains"] == pytest.approx([0.11, 0.12, 0.13, 0.14, 0.15])
    row = summary([{**result, "minutes": 12.4}]).splitlines()
    assert row[2].startswith("| fake | ours is better |") and row[2].endswith("| 5 | **supported** | 12 |")
    assert row[0].count("|") == row[1].count("|") == row[2].count("|")


@pytest.mark.parametrize(
    ("curve", "target", "falling", "wanted"),
    [
        ([[0, 4.0], [10, 2.0], [20, 1.0]], 3.0, True, 5.0),
        ([[0, 4.0], [10, 2.0], [20, 1.0]], 1.0, True, 20.0),
        ([[0, 4.0], [10, 2.0], [20, 1.0]], 9.0, True, 0.0),
        ([[0, 4.0], [10, 2.0], [20, 3.0]], 1.0, True, 20.0),  # never: its last step
        ([[0, 0.0], [4, 1.0], [8, 0.0]], 0.5, False, 2.0),  # the first time counts
    ],
)
def test_steps_to(curve: list[list[float]], target: float, falling: bool, wanted: float) -> None:
    assert steps_to(curve, target, falling) == pytest.approx(wanted)


def test_a_metric_can_be_the_steps_to_the_baselines_last_value(fake: Path) -> None:
    stated = claim(metric="steps to val/loss", direction="min", also=["val/loss"], curves=["val/loss", "val/acc"])
    result = run_claim(stated, fake / "out", 2, lambda _: None)
    assert set(result["results"]["plain"].values()) == {5.0}  # its own end
    # from (3, 0.7) to (5, 0.3), to where the baseline ends: 0.4
    assert result["results"]["ours"][1] == pytest.approx(3 + 2 * 0.3 / 0.4) and result["verdict"] == "supported"
    assert (fake / "out" / "curves.png").stat().st_size > 5000
    assert "`steps to val/loss`" in (fake / "out" / "table.md").read_text()
    counts = [f.read_text() for f in (fake / "out").rglob("count")]
    run_claim(stated, fake / "out", 2, lambda _: None)
    assert counts == ["x"] * 15 == [f.read_text() for f in (fake / "out").rglob("count")]
    with pytest.raises(_claim.ClaimError, match="no 'val/other'"):
        run_claim(claim(metric="steps to val/other"), fake / "out", 2, lambda _: None)


def test_claims_of_a_recipe_share_the_arms_that_they_have_in_common(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {name: {"recipe": "classifier", "args": list(arm.args)} for name, arm in claim().arms.items()}
    common = {"metric": "test/acc", "baseline": "plain", "technique": "ours", "seeds": [1, 2, 3, 4, 5]}
    folder = fake / "configs" / "fake"
    folder.mkdir(parents=True)
    more = {**arms, "best": {"recipe": "classifier", "args": ["--gain", "0.2"]}}
    whole = {"claim": "one", "arms": arms, **common}
    part = {"claim": "two", "arms": more, **common, "margin": -0.03, "also": ["val/acc", "seconds"]}
    (folder / "claim.yaml").write_text(yaml.safe_dump(whole))
    (folder / "claim_part.yaml").write_text(yaml.safe_dump(part))
    original, listed = _claim.read, _claim.claimed
    monkeypatch.setattr(_claim, "read", lambda name: original(name, fake / "configs"))
    monkeypatch.setattr(_claim, "claimed", lambda folder=None: listed(fake / "configs"))
    assert _claim.claimed() == ["fake", "fake/part"]
    assert _claim.main(["fake", "--out", str(fake / "out")]) == 0
    said = capsys.readouterr().out
    assert [f.read_text() for f in (fake / "out").rglob("count")] == ["x"] * 20, "15, and 5 of the arm that is new"
    assert "| fake | one |" in said and "| fake/part | two |" in said
    text = (fake / "out" / "fake" / "part" / "table.md").read_text()
    assert "Over plain a gain counts from -0.03 on." in text and "| arm | `val/acc` | `seconds` |" in text
    row = next(line for line in text.splitlines() if line.startswith("| best | 0.4"))
    assert row.startswith("| best | 0.400 ± 0.000 | ")
    assert (fake / "out" / "fake" / "part" / "plot.png").stat().st_size > 5000
    assert _claim.main(["fake/part", "--out", str(fake / "out")]) == 0
    assert "| fake | one |" not in capsys.readouterr().out
    assert {f.read_text() for f in (fake / "out").rglob("count")} == {"x"}
    (folder / "claim_part.yaml").write_text(yaml.safe_dump({**part, "also": ["val/nothing"]}))
    assert _claim.main(["fake/part", "--out", str(fake / "out")]) == 2
    assert "no 'val/nothing' in" in capsys.readouterr().err
    assert _claim.main(["fake/prt", "--out", str(fake / "out")]) == 2
    assert "did you mean 'fake/part'?" in capsys.readouterr().err


def test_a_report_trains_nothing_and_says_what_is_missing(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClaimError, match="15 of 15 cells aren't trained in .*, such as plain, seed 1"):
        run_claim(claim(), fake / "out", 2, lambda line: None, report_only=True)
    assert not list((fake / "out").rglob("count"))
    trained = run_claim(claim(), fake / "out", 2, lambda line: None)
    monkeypatch.setattr(_claim, "source_version", lambda: "another")
    said: list[str] = []
    again = run_claim(claim(), fake / "out", 2, said.append, report_only=True)
    assert again["results"] == trained["results"] and again["source"] == trained["source"] != ["another"]
    assert said[0] == "15 of 15 cells were trained from another source than the present one"
    assert {f.read_text() for f in (fake / "out").rglob("count")} == {"x"}


def test_a_record_cut_off_while_written_is_trained_again(fake: Path) -> None:
    run_claim(claim(), fake / "out", 2, lambda line: None)
    first, second, *_ = sorted((fake / "out").rglob("cell.json"))
    first.write_text('{"command": [')
    second.write_text("{}")
    run_claim(claim(), fake / "out", 2, lambda line: None)
    assert sorted(f.read_text() for f in (fake / "out").rglob("count")) == ["x"] * 13 + ["xx"] * 2


def test_a_number_that_is_none_is_a_failure(fake: Path) -> None:
    arms = {**claim().arms, "ours": _claim.Arm("fake", ["--nan"])}
    with pytest.raises(CellFailed, match=r"ours, seed \d: test/acc is nan"):
        run_claim(claim(arms=arms), fake / "out", 1, lambda line: None)


def test_a_training_that_fails_ends_with_1(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {**claim().arms, "ours": _claim.Arm("fake", ["--fail"])}
    monkeypatch.setattr(_claim, "read", lambda name: claim(arms=arms))
    assert _claim.main(["fake", "--out", str(fake / "out")]) == 1
    assert "ended with 1: it went wrong" in capsys.readouterr().err


def test_seeds_are_given_by_commas_or_words(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_claim, "read", lambda name: claim())
    monkeypatch.setattr(_claim, "claimed", lambda: ["fake"])
    for words in (["7,8"], ["7", "8"], ["7,8", "8"]):
        assert _claim.main(["fake", "--out", str(fake / "out"), "--seeds", *words]) == 0
        found = json.loads((fake / "out" / "fake" / "result.json").read_text())
        assert list(found["results"]["ours"]) == ["7", "8"]


def test_a_child_that_hears_no_signal_is_ended(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_claim.Jobs, "grace", 0.5)
    arms = {"plain": _claim.Arm("fake", ["--deaf"]), "ours": _claim.Arm("fake", ["--deaf"])}
    deaf = _claim.cells(claim(arms=arms, seeds=[1]), fake / "out")
    trainer = _claim.Trainer(2, "test/acc", "v")
    futures = [trainer.jobs.pool.submit(trainer.train, cell) for cell in deaf]
    outputs = [cell.folder / "output.txt" for cell in deaf]
    for _ in range(100):
        time.sleep(0.1)
        if all(file.is_file() and "deaf" in file.read_text() for file in outputs):
            break
    begun = time.monotonic()
    trainer.jobs.stop()
    assert time.monotonic() - begun < 10  # they would sleep for a minute
    for future in futures:
        with pytest.raises(CellFailed, match="ended with -9"):
            future.result()


def test_the_runner_is_light() -> None:
    program = "import sys, recipes._claim; recipes._claim.t_interval([1.0, 2.0]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_source_is_trained_again(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_claim(claim(), fake / "out", 2, lambda line: None)
    monkeypatch.setattr(_claim, "source_version", lambda: "another")
    run_claim(claim(), fake / "out", 2, lambda line: None)
    assert {f.read_text() for f in (fake / "out").rglob("count")} == {"xx"}


def test_a_cell_that_fails_says_what_it_said(fake: Path) -> None:
    arms = {**claim().arms, "ours": _claim.Arm("fake", ["--fail"])}
    with pytest.raises(ClaimError, match=r"ours, seed \d ended with 1: it went wrong .command: .*--fail"):
        run_claim(claim(arms=arms), fake / "out", 1, lambda line: None)


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match="no 'test/acc'"):
        last_values(tmp_path, ["test/acc"])


def test_claims_that_cannot_be_decided_are_refused(tmp_path: Path) -> None:
    good = yaml.safe_load((_claim.CONFIGS / "advstyle" / "claim.yaml").read_text())
    for change, message in (
        ({"technique": "nobody"}, "there is no arm 'nobody'; there are: .*ERM"),
        ({"direction": "up"}, "max or min"),
        ({"arms": {"ERM": {}}}, "is no claim"),
        ({"colour": "red"}, "is no claim"),
        ({"arms": {**good["arms"], "ERM": {"recipe": "classifier", "arg": []}}}, "is no claim: .*'arg'"),
        ({"arms": {**good["arms"], "ERM": {"recipe": "clasifier"}}}, "no recipe 'clasifier'; there are: .*classifier"),
        ({"seeds": [1, 2, 3, 4]}, "at least 5 seeds"),
        ({"seeds": [1, 2, 3, 4, 4, 5]}, "all different"),
        ({"seeds": 5}, "is no claim"),
        ({"margin": "much"}, "is no claim"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "claim.yaml").write_text(yaml.safe_dump({**good, **change}))
        with pytest.raises(ClaimError, match=message):
            read("x", tmp_path)
    with pytest.raises(ClaimError, match="did you mean 'x'"):
        read("xx", tmp_path)


@pytest.mark.parametrize("recipe", _claim.claimed())
def test_every_claim_of_the_project_is_one(recipe: str) -> None:
    found = read(recipe)
    assert len(set(found.seeds)) >= 5 and len(found.arms) >= 3


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        [],
        ["nobody"],
        ["advstyle", "--all"],
        ["advstyle", "--jobs", "0"],
        ["advstyle", "--seeds", "1"],
        ["advstyle", "--seeds", "1,x"],
        ["--bogus"],
    ):
        assert _claim.main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said and len(said.splitlines()) <= 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_children(tmp_path: Path, signum: int, code: int) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    program = f"""
import sys, pathlib
from recipes import _claim
original = _claim.cells
def cells(claim, out):
    found = original(claim, out)
    for cell in found: cell.command[1:4] = [{str(tmp_path / "fake.py")!r}]
    return found
_claim.cells = cells
arm = _claim.Arm("fake", ["--wait"])
_claim.read = lambda name: _claim.Claim("fake", "c", "test/acc", "a", "b", {{"a": arm, "b": arm}}, [1, 2])
sys.exit(_claim.main(["fake", "--jobs", "2", "--out", {str(tmp_path / "out")!r}]))
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    for _ in range(100):
        time.sleep(0.1)
        if len(list((tmp_path / "out").rglob("output.txt"))) == 2:
            break
    time.sleep(0.5)
    os.kill(process.pid, signum)
    _, err = process.communicate(timeout=20)  # it waits for its children, which would sleep for a minute
    assert process.returncode == code and "Traceback" not in err
