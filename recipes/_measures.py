"""Claims about generalization measures: a grid of trainings, and how well each measure ranks and tells their gaps.

``python -m recipes claim generalization_measures`` trains the grid with each seed, writes a row for each run into
``runs.csv``, and judges the measures by these rows alone. ``--csv FILE`` judges a table made elsewhere, such as W&B's
export: it needs the columns ``seed``, the axis that is held fixed (``within``), ``gap``, ``train_error``, ``floor`` and
those of the measures, by these names or as ``generalization_measures/<name>``.

A cell trains, one after the other in one process, the runs that share a seed and a value of ``within``: most of what a
short training takes is its start.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes._claim_results import Claim, ClaimError, t_interval

#: Under which name the numbers are logged.
LOGGED = "generalization_measures"
#: What is judged by, beside the measures.
NEEDED = ("gap", "train_error", "floor")
#: What is read where it's there.
OPTIONAL = ("unfit", "val_error", "val_loss", "train_loss", "risk_1", "risk_2")
Row = dict[str, float]

# ---------------------------------------------------------------------- what such a claim says


@dataclass(frozen=True)
class Grid(Claim):
    """A claim whose arms are the points of a grid; what it says is in the file, and the rule in :func:`judge`.

    Args:
        grid: axis to its values; ``args`` of the file have ``{axis}`` in their place.
        within: the axis that is held fixed for the second ranking.
        measures: what is judged.
        floor: by how much a measure must be off somewhere.
        tau: Kendall's tau above which a measure ranks well.
        close: within how much of the gap a measure is tight.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    within: str = ""
    measures: list[str] = field(default_factory=list)
    floor: float = 0.2
    tau: float = 0.8
    close: float = 0.1


def points(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of the axes' values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def named(point: dict[str, Any]) -> str:
    return " ".join(f"{axis}={value}" for axis, value in point.items())


def expand(given: dict[str, Any]) -> dict[str, Any]:
    """The file with its grid as arms. KeyError and ValueError for one that is no grid."""
    given = dict(given)
    grid, within, recipe, args = given["grid"], given["within"], given.pop("train"), given.pop("args")
    if within not in grid or len(grid) < 2 or not all(grid.values()) or not given.get("measures"):
        raise ValueError("a grid needs two or more axes with values, 'within' one of them, and measures")
    arms = {named(p): {"recipe": recipe, "args": [str(word).format(**p) for word in args]} for p in points(grid)}
    first = next(iter(arms))
    return {**given, "arms": arms, "metric": f"{LOGGED}/gap", "baseline": first, "technique": first}


# ---------------------------------------------------------------------- judging


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b, in [-1, 1]; nan where either is constant. Of anything with itself it is 1 to the last bit."""
    both = of_x = of_y = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        first, second = (a > c) - (a < c), (b > d) - (b < d)
        both, of_x, of_y = both + first * second, of_x + first * first, of_y + second * second
    return both / math.sqrt(of_x * of_y) if of_x and of_y else math.nan


def taus(rows: Sequence[Row], measure: str, within: str, target: str = "gap") -> tuple[float, float]:
    """Kendall's tau of a measure with the target, over these runs, and its mean over groups with ``within`` fixed.

    Runs without a finite value are left out; so are groups of fewer than three runs, or in which either is constant.
    """
    rows = [row for row in rows if math.isfinite(row.get(measure, math.nan))]
    pooled = kendall([row[measure] for row in rows], [row[target] for row in rows]) if len(rows) > 2 else math.nan
    found = []
    for value in sorted({row[within] for row in rows}):
        group = [row for row in rows if row[within] == value]
        if len(group) > 2:
            found.append(kendall([row[measure] for row in group], [row[target] for row in group]))
    found = [tau for tau in found if math.isfinite(tau)]
    return pooled, math.fsum(found) / len(found) if found else math.nan


Interval = tuple[float, float, float]


def over_seeds(values: Iterable[float]) -> Interval | None:
    """Mean and 95 % interval; None unless there are two or more, all of them numbers."""
    values = list(values)
    return t_interval(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


@dataclass(frozen=True)
class Measured:
    """What came out for one measure; ``pooled`` and ``within`` by seed, the others over all ranked runs."""

    pooled: dict[int, float]
    within: dict[int, float]
    low: float
    high: float
    off_median: float
    off_most: float


def by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return {seed: [r for r in rows if r["seed"] == seed] for seed in sorted({int(r["seed"]) for r in rows})}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Runs that fitted their training set (``unfit`` isn't 1): the others are counted, not ranked."""
    return [row for row in rows if not row.get("unfit")]


def measured(claim: Grid, rows: Sequence[Row], measure: str, target: str = "gap") -> Measured:
    """Ranks and distances of a measure over the runs that are ranked."""
    found = {seed: taus(ranked(own), measure, claim.within, target) for seed, own in by_seed(rows).items()}
    pairs = [(row[measure], row[target]) for row in ranked(rows) if math.isfinite(row.get(measure, math.nan))]
    if not pairs:
        raise ClaimError(f"no ranked run has a number for '{measure}'")
    off, values = sorted(abs(value - gap) for value, gap in pairs), [value for value, _ in pairs]
    pooled, within = ({seed: pair[i] for seed, pair in found.items()} for i in (0, 1))
    return Measured(pooled, within, min(values), max(values), off[len(off) // 2], off[-1])


def floors(rows: Sequence[Row]) -> dict[int, float]:
    """For each seed the largest floor of a run with training error 0; nan where no run has that."""
    fits = {seed: [r["floor"] for r in own if r["train_error"] == 0] for seed, own in by_seed(rows).items()}
    return {seed: max(values, default=math.nan) for seed, values in fits.items()}


def judge(claim: Grid, rows: Sequence[Row], measures: dict[str, Measured]) -> tuple[str, list[str]]:
    """The verdict, and the measures that are tight: pooled tau above ``tau``, and always within ``close`` of the gap.

    One pair of distributions is enough against all measures, so a seed's largest floor counts.
    """
    tight = []
    for name, each in measures.items():
        pooled = over_seeds(each.pooled.values())
        if pooled is not None and pooled[0] > claim.tau and each.off_most < claim.close:
            tight.append(name)
    floor = over_seeds(floors(rows).values())
    if tight or (floor is not None and floor[2] < claim.floor):
        return "not supported", tight
    return "supported" if floor is not None and floor[1] > claim.floor else "inconclusive", tight


# ---------------------------------------------------------------------- rows


def read_rows(claim: Grid, file: Path) -> list[Row]:
    """The runs of a table.

    Raises:
        ClaimError: if there is no such file, or a column or a number that is needed is missing.
    """
    try:
        with file.open(newline="", encoding="utf-8") as opened:
            table = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClaimError(f"{file} can't be read as a table: {error}") from error
    columns = list(table[0]) if table else []

    def column(name: str) -> str | None:
        names = [name, f"{LOGGED}/{name}", *(["seed_everything"] if name == "seed" else [])]
        ends = [c for c in columns if c and c.endswith(f"/{name}")]
        return next((n for n in [*names, *ends] if n in columns), None)

    needed = ["seed", claim.within, *NEEDED, *claim.measures]
    missing = [name for name in needed if column(name) is None]
    if missing or not table:
        raise ClaimError(f"{file} has no {'runs' if not table else 'column ' + ', '.join(missing)}")
    places = {name: column(name) for name in [*needed, *claim.grid, *OPTIONAL]}
    rows = []
    for number, line in enumerate(table, 2):
        row: Row = {}
        for name, place in places.items():
            try:
                row[name] = float(line[place]) if place is not None and line[place] else math.nan
            except ValueError:
                row[name] = math.nan
        for name in ("seed", claim.within, *NEEDED):
            if not math.isfinite(row[name]):
                raise ClaimError(f"{file}, line {number}: '{name}' is no number")
        rows.append({name: value for name, value in row.items() if math.isfinite(value)})
    return rows


def write_rows(claim: Grid, rows: Sequence[Row], file: Path) -> None:
    names = list(dict.fromkeys(["seed", *claim.grid, *claim.measures, *(name for row in rows for name in row)]))
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


# ---------------------------------------------------------------------- training


def groups(claim: Grid) -> dict[str, list[dict[str, Any]]]:
    """Cells of one seed: the points that share a value of ``within``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in points(claim.grid):
        found.setdefault(f"{claim.within}={point[claim.within]}", []).append(point)
    return found


def _short(claim: Grid, point: dict[str, Any]) -> str:
    """A run's name within its cell."""
    return named({axis: value for axis, value in point.items() if axis != claim.within})


def _as_folder(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def cells(claim: Grid, out: Path) -> list[Any]:
    """All cells, seed by seed."""
    from recipes._claim import Cell

    found = []
    for seed in claim.seeds:
        for group, members in groups(claim).items():
            runs = [f"{_short(claim, p)}: {shlex.join(claim.arms[named(p)].args)}" for p in members]
            recipe = claim.arms[named(members[0])].recipe
            typed = hashlib.sha256("\0".join([recipe, *runs]).encode()).hexdigest()[:8]
            folder = out / "cells" / f"{_as_folder(group)}-{typed}" / f"seed-{seed}"
            command = [sys.executable, "-m", "recipes._measures", str(folder), recipe, str(seed), *runs]
            found.append(Cell(group, seed, command, folder))
    return found


def train_group(folder: Path, recipe: str, seed: str, runs: Sequence[str]) -> int:
    """Train the runs of a cell, given as ``name: what is typed after fit``, and write one row with all their numbers.

    Returns:
        The exit code of the first that fails, or 0.
    """
    from recipes.__main__ import main as recipes_main
    from recipes._claim import last_values

    found: dict[str, float] = {}
    for run in runs:
        name, _, words = run.partition(": ")
        root = folder / "runs" / _as_folder(name)
        options = ["--seed_everything", seed, "--wandb", "off", "--trainer.default_root_dir", str(root)]
        code = recipes_main([recipe, "fit", *shlex.split(words), *options])
        if code:
            return code
        found |= {f"{name}/{metric}": value for metric, value in last_values(root, []).items()}
    file = folder / "group" / "all" / "metrics.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([list(found), list(found.values())])
    return 0


def rows_of(claim: Grid, records: dict[tuple[str, int], dict[str, Any]]) -> list[Row]:
    """A row for each run, from what the cells gave."""
    rows = []
    for seed in claim.seeds:
        for group, members in groups(claim).items():
            values = records[group, seed]["values"]
            for point in members:
                row: Row = {"seed": seed, **{axis: float(value) for axis, value in point.items()}}
                for name in (*claim.measures, *NEEDED, *OPTIONAL):
                    value = values.get(f"{_short(claim, point)}/{LOGGED}/{name}")
                    row |= {} if value is None else {name: value}
                rows.append(row)
    return rows


# ---------------------------------------------------------------------- what comes out


def run_claim(
    claim: Grid,
    out: Path,
    jobs: int,
    say: Callable[[str], None] = print,
    report_only: bool = False,
    table: Path | None = None,
) -> dict[str, Any]:
    """As :func:`recipes._claim.run_claim`; with ``table`` its runs are judged and nothing is trained."""
    from recipes._claim import Trainer, done, source_version

    records: dict[tuple[str, int], dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    if table is not None:
        rows = read_rows(claim, table)
    else:
        version, wanted = source_version(), cells(claim, out)
        one = {_short(claim, point): None for point in points(claim.grid)}
        metrics = [f"{name}/{LOGGED}/{metric}" for name in one for metric in (*NEEDED, *claim.measures)]
        found = ((cell, done(cell, None if report_only else version, metrics)) for cell in wanted)
        records = {(cell.arm, cell.seed): record for cell, record in found if record is not None}
        missing = [cell for cell in wanted if (cell.arm, cell.seed) not in records]
        if report_only and missing:
            first = f"{missing[0].arm}, seed {missing[0].seed}"
            raise ClaimError(f"{len(missing)} of {len(wanted)} cells aren't trained in {out}, such as {first}")
        if records:
            say(f"{len(records)} of {len(wanted)} cells are trained already")
        if missing:
            records |= Trainer(min(jobs, len(missing)), metrics[0], version, metrics[1:]).all(missing, say)
        rows = rows_of(claim, records)
        write_rows(claim, rows, out / "runs.csv")

    measures = {name: measured(claim, rows, name) for name in claim.measures}
    verdict, tight = judge(claim, rows, measures)
    controls = checks(claim, rows)
    text = describe(claim, rows, measures, controls, verdict, tight)
    draw(claim, rows, measures, verdict, out / "plot.png")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    floor = floors(rows)
    result = {
        "recipe": claim.name,
        "claim": claim.claim,
        "metric": "Kendall's tau with the gap",
        "results": {name: each.pooled for name, each in measures.items()},
        "within": {name: each.within for name, each in measures.items()},
        "off": {name: [each.off_median, each.off_most] for name, each in measures.items()},
        "floors": floor,
        "controls": controls,
        "tight": tight,
        "runs": {"all": len(rows), "ranked": len(ranked(rows)), "fitted": sum(r["train_error"] == 0 for r in rows)},
        "differences": [{"text": f"floor {_interval(over_seeds(floor.values()))}", "gains": list(floor.values())}],
        "verdict": verdict,
        "minutes": round(sum(r["seconds"] for r in records.values()) / 60, 1),
        "source": sorted({record["version"] for record in records.values()}),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(text)
    say(f"\ntable, plot, JSON{'' if table else ' and runs.csv'}: {out}")
    return result


def checks(claim: Grid, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What the judge says of measures that know the answer: each must have tau 1 with every seed and be found tight.

    The gap itself is fed in as a measure of the gap, and the held-out loss, where it is there, as a measure of the
    held-out loss: each is the same column twice, ordered alike, and off by 0.

    Raises:
        ClaimError: if that isn't what comes out.
    """
    found = {}
    for name in ("gap", "val_loss"):
        if all(name in row for row in rows):
            each = measured(claim, rows, name, target=name)
            pooled = sorted(set(each.pooled.values()))
            verdict, tight = judge(claim, rows, {name: each})
            found[f"{name} as a measure of itself"] = {"tau": pooled, "off": each.off_most, "verdict": verdict}
            if len(each.pooled) > 1 and (pooled != [1.0] or each.off_most or not tight):
                raise ClaimError(f"'{name}' fed in as its own measure has tau {pooled}: these runs can't be ranked")
    return found


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def describe(
    claim: Grid,
    rows: Sequence[Row],
    measures: dict[str, Measured],
    controls: dict[str, dict[str, Any]],
    verdict: str,
    tight: Sequence[str],
) -> str:
    """The result as Markdown."""
    fits, kept = [row for row in rows if row["train_error"] == 0], ranked(rows)
    lines = [f"Claim: {claim.claim}", ""]
    lines += [f"{len(rows)} runs, {len(by_seed(rows))} seeds: {len(fits)} with training error 0, {len(kept)} ranked."]
    lines += [f"The other {len(rows) - len(kept)} have a margin below 1e-3 and are not ranked."] * (
        len(rows) > len(kept)
    )
    lines += ["", f"| {claim.within} | runs | ranked | training error | gap | floor, of training error 0 |"]
    lines += ["| -- | -- | -- | -- | -- | -- |"]
    for value in sorted({row[claim.within] for row in rows}):
        own = [row for row in rows if row[claim.within] == value]
        span = [row["floor"] for row in own if row["train_error"] == 0]
        errors, gaps = (math.fsum(row[name] for row in own) / len(own) for name in ("train_error", "gap"))
        words = f"{min(span):.3f} to {max(span):.3f}" if span else "-"
        lines.append(f"| {value:g} | {len(own)} | {len(ranked(own))} | {errors:.3f} | {gaps:.3f} | {words} |")
    lines += ["", f"| measure | tau, all runs | tau, {claim.within} fixed | values | \\|value - gap\\|: median, most |"]
    lines += ["| -- | -- | -- | -- | -- |"]
    for name, each in measures.items():
        pair = [_interval(over_seeds(values.values())) for values in (each.pooled, each.within)]
        values = f"{each.low:.3g} to {each.high:.3g}"
        lines.append(f"| {name} | {pair[0]} | {pair[1]} | {values} | {each.off_median:.3g}, {each.off_most:.3g} |")
    lines += ["", "Kendall's tau-b of measure and gap for each seed: mean and 95 % interval over the seeds.", ""]
    floor = floors(rows)
    per_seed = ", ".join(f"seed {seed} {value:.3f}" for seed, value in floor.items())
    lines += [
        f"Floor (the largest of a run with training error 0): {per_seed}; {_interval(over_seeds(floor.values()))}."
    ]
    lines += [f"- {what}: tau {', '.join(map(str, c['tau']))}, off by {c['off']:g}" for what, c in controls.items()]
    rule = (
        f"Rule: floor above {claim.floor:g}, and no measure with tau above {claim.tau:g}, all runs taken together, that"
    )
    lines += [
        "",
        f"{rule} is within {claim.close:g} of the gap in each ranked run; such are: {', '.join(tight) or 'none'}.",
    ]
    return "\n".join([*lines, "", f"Verdict: **{verdict}**"])


def draw(claim: Grid, rows: Sequence[Row], measures: dict[str, Measured], verdict: str, file: Path) -> None:
    """Left: tau of each measure, over all runs and with ``within`` fixed. Right: how far its values are off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 1.8 + 0.36 * len(measures)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(measures)[::-1]
    for place, name in enumerate(names):
        each = measures[name]
        for shift, colour, values in ((0.15, "C0", each.pooled), (-0.15, "C1", each.within)):
            left.plot(list(values.values()), [place + shift] * len(values), ".", color=colour, alpha=0.35, markersize=5)
            if (found := over_seeds(values.values())) is not None:
                left.plot(found[1:], [place + shift] * 2, color=colour, linewidth=2)
                left.plot([found[0]], [place + shift], "o", color=colour, markersize=6)
        off = [abs(row[name] - row["gap"]) for row in ranked(rows) if name in row]
        right.plot([max(v, 1e-4) for v in off], [place] * len(off), ".", color="0.6", alpha=0.5, markersize=5)
        right.plot([max(each.off_median, 1e-4)], [place], "|", color="C3", markersize=14, markeredgewidth=2)
    left.plot([], [], "o-", color="C0", label="all runs")
    left.plot([], [], "o-", color="C1", label=f"{claim.within} fixed")
    left.axvline(0, color="black", linewidth=0.8)
    left.axvline(claim.tau, color="black", linewidth=0.8, linestyle="--")
    left.set_xlim(-1.05, 1.05)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("Kendall's tau with the gap")
    left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    left.set_title("ranking: single seeds, mean and 95 % interval", fontsize=10)
    right.axvline(
        claim.close, color="black", linewidth=0.8, linestyle="--", label=f"tight: below {claim.close:g} in all runs"
    )
    if (floor := over_seeds(floors(rows).values())) is not None:
        right.axvline(floor[0], color="C2", linewidth=1.5, label=f"floor on one of two distributions: {floor[0]:.2f}")
    right.plot([], [], "|", color="C3", markersize=10, markeredgewidth=2, label="median")
    right.set_xscale("log")
    right.set_xlabel("|value - gap|")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    right.set_title("tightness: each ranked run", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{claim.name}: {verdict}", fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    raise SystemExit(train_group(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
