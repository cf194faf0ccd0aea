"""``python -m recipes claim <name>``: trains the arms of a claim on paired seeds and says what came out.

``configs/<recipe>/claim.yaml`` states the claim: the arms (a recipe and its arguments, as a user would type them), the
metric, which arm is the technique and which the baseline, and the seeds. A cell is one arm with one seed, trained by
the very command that a user types; cells that were trained before by the same command and the same source are not
trained again. The verdict is of the paired difference between technique and baseline.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes._cli import CONFIGS, HOME, fail

# ---------------------------------------------------------------------- what a claim says


class ClaimError(ValueError):
    """A claim that can't be decided as it stands; the message says why."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: a recipe and what is typed after ``fit``."""

    recipe: str
    args: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Claim:
    """``configs/<recipe>/claim.yaml``.

    ``metric`` is a column of metrics.csv, better when larger (``direction: max``) or smaller (``min``). ``shared`` are
    arguments of all arms. The claim holds if the technique beats the baseline by more than ``margin``, on average over
    the seeds.
    """

    recipe: str
    claim: str
    metric: str
    baseline: str
    technique: str
    arms: dict[str, Arm]
    seeds: list[int]
    direction: str = "max"
    margin: float = 0.0
    shared: list[str] = field(default_factory=list)


def read(recipe: str, folder: Path = CONFIGS) -> Claim:
    """The claim of a recipe, checked.

    Raises:
        ClaimError: if there is none, or it can't be decided as it stands.
    """
    file = folder / recipe / "claim.yaml"
    if not file.is_file():
        known = claimed(folder)
        near = difflib.get_close_matches(recipe, known, 1)
        tip = f"did you mean '{near[0]}'?" if near else f"those that have one: {', '.join(known)}"
        raise ClaimError(f"'{recipe}' has no claim ({file} is not there); {tip}")
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        arms = {
            name: Arm(arm["recipe"], [str(a) for a in arm.get("args") or []]) for name, arm in given["arms"].items()
        }
        claim = Claim(**{**given, "recipe": recipe, "arms": arms})
    except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ClaimError(f"{file} is no claim: {' '.join(str(error).split())}") from error
    for role in (claim.baseline, claim.technique):
        if role not in arms:
            raise ClaimError(f"{file}: there is no arm '{role}'; there are: {', '.join(arms)}")
    if claim.direction not in ("max", "min"):
        raise ClaimError(f"{file}: direction must be max or min, not '{claim.direction}'")
    return claim


def claimed(folder: Path = CONFIGS) -> list[str]:
    """Recipes that have a claim."""
    return sorted(file.parent.name for file in folder.glob("*/claim.yaml"))


# ---------------------------------------------------------------------- statistics


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and the ends of its two-sided Student interval.

    Raises:
        ClaimError: for fewer than two values.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        raise ClaimError("an interval needs at least two seeds")
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return mean, mean - reach, mean + reach


def verdict(low: float, high: float, margin: float = 0.0) -> str:
    """What an interval of the technique's gain says of "the gain is larger than ``margin``"."""
    return "supported" if low > margin else "not supported" if high < margin else "inconclusive"


@dataclass(frozen=True)
class Difference:
    """Gain of one arm over another (positive is better), paired by seed, with its 95 % interval."""

    arm: str
    over: str
    mean: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def compare(claim: Claim, results: dict[str, dict[int, float]]) -> list[Difference]:
    """The claimed difference first, then each other arm over the baseline, then the technique over each other arm."""
    others = [arm for arm in claim.arms if arm not in (claim.baseline, claim.technique)]
    pairs = [(claim.technique, claim.baseline)]
    pairs += [(arm, claim.baseline) for arm in others] + [(claim.technique, arm) for arm in others]
    sign = 1 if claim.direction == "max" else -1
    found = []
    for arm, over in pairs:
        gains = [sign * (results[arm][seed] - results[over][seed]) for seed in claim.seeds]
        mean, low, high = t_interval(gains)
        margin = claim.margin if over == claim.baseline else 0.0
        found.append(Difference(arm, over, mean, low, high, verdict(low, high, margin)))
    return found


# ---------------------------------------------------------------------- training the cells


@dataclass
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    command: list[str]
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / "cell.json"


def source_version() -> str:
    """A hash of everything that a number depends on here: our modules and the configs, claims left out."""
    digest = hashlib.sha256()
    for package in ("callbacks", "configs", "datamodules", "recipes"):
        for file in sorted((HOME / package).rglob("*")):
            if file.suffix in (".py", ".yaml", ".npz") and file.name not in ("claim.yaml", "sweep.yaml", "_claim.py"):
                digest.update(f"{file.relative_to(HOME)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cells(claim: Claim, out: Path) -> list[Cell]:
    """All cells, seed by seed, so that an early look compares like with like."""
    found = []
    for seed in claim.seeds:
        for name, arm in claim.arms.items():
            folder = out / "cells" / re.sub(r"[^\w.-]+", "_", name) / f"seed-{seed}"
            options = ["--seed_everything", str(seed), "--wandb", "off", "--trainer.default_root_dir", str(folder)]
            command = [sys.executable, "-m", f"recipes.{arm.recipe}", "fit", *claim.shared, *arm.args, *options]
            found.append(Cell(name, seed, command, folder))
    return found


def done(cell: Cell, version: str) -> dict[str, Any] | None:
    """What a cell gave, if it was trained by this command from this source."""
    try:
        record = json.loads(cell.record.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return record if (record["command"], record["version"]) == (cell.command[1:], version) else None


def last_value(folder: Path, metric: str) -> float:
    """The last value of a metric in the newest run's ``metrics.csv`` below a folder.

    Raises:
        ClaimError: if there is none.
    """
    files = sorted(folder.glob("*/*/metrics.csv"), key=lambda f: f.stat().st_mtime)
    if files:
        with files[-1].open(newline="", encoding="utf-8") as opened:
            values = [row[metric] for row in csv.DictReader(opened) if row.get(metric)]
        if values:
            return float(values[-1])
    raise ClaimError(f"no '{metric}' in {files[-1] if files else folder}: does the recipe log it?")


class Trainer:
    """Runs commands side by side, and ends them all when one fails or the user does.

    Args:
        jobs: how many at a time.
        metric: which column of their metrics.csv is the result.
        version: of the source, kept with each result.
    """

    def __init__(self, jobs: int, metric: str, version: str) -> None:
        self.metric, self.version = metric, version
        self.pool = ThreadPoolExecutor(jobs)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _path()}
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train one cell and record what it gave."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with (cell.folder / "output.txt").open("w", encoding="utf-8") as output:
            with self._lock:
                if self._stopped:
                    raise ClaimError("stopped")
                process = subprocess.Popen(
                    cell.command, stdout=output, stderr=subprocess.STDOUT, text=True, env=self.environment
                )
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code:
            said = (cell.folder / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise ClaimError(
                f"{cell.arm}, seed {cell.seed} ended with {code}: {' / '.join(said)} "
                f"(command: {shlex.join(cell.command)})"
            )
        record = {"command": cell.command[1:], "version": self.version, "seconds": round(time.monotonic() - begun, 1)}
        record["value"] = last_value(cell.folder, self.metric)
        cell.record.write_text(json.dumps(record), encoding="utf-8")
        return record

    def all(self, wanted: Sequence[Cell], say: Callable[[str], None]) -> dict[tuple[str, int], dict[str, Any]]:
        """Results of all cells, in any order; a line for each that ends."""
        begun, records = time.monotonic(), {}
        futures: dict[Future[dict[str, Any]], Cell] = {self.pool.submit(self.train, cell): cell for cell in wanted}
        try:
            left = set(futures)
            while left:
                ended, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell, record = futures[future], future.result()
                    records[cell.arm, cell.seed] = record
                    eta = (time.monotonic() - begun) / len(records) * len(left)
                    value = f"{self.metric} {record['value']:.4f}"
                    say(f"{len(records)}/{len(wanted)}  {cell.arm}, seed {cell.seed}: {value}  eta {eta / 60:.0f} min")
        finally:
            self.stop()
        return records

    def stop(self) -> None:
        """End what still runs."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _path() -> str:
    """PYTHONPATH with which a child finds the same packages as we did."""
    return os.pathsep.join([str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---------------------------------------------------------------------- what comes out


def table(claim: Claim, results: dict[str, dict[int, float]], differences: Sequence[Difference]) -> str:
    """The result as Markdown: per seed, per arm, and the differences."""
    head = ["arm", *(f"seed {seed}" for seed in claim.seeds), "mean", "sd"]
    rows = [head, ["--"] * len(head)]
    for name in claim.arms:
        values = [results[name][seed] for seed in claim.seeds]
        mean = math.fsum(values) / len(values)
        sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        rows.append([name, *(f"{v:.3f}" for v in values), f"{mean:.3f}", f"{sd:.3f}"])
    lines = [
        f"Claim: {claim.claim}",
        "",
        f"`{claim.metric}`:",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    lines += ["| difference | mean [95 % interval] | verdict |", "| -- | -- | -- |"]
    lines += [f"| {d.arm} over {d.over} | {d} | {d.verdict} |" for d in differences]
    return "\n".join([*lines, "", f"Verdict: **{differences[0].verdict}**"])


def plot(claim: Claim, results: dict[str, dict[int, float]], differences: Sequence[Difference], file: Path) -> None:
    """Left: every seed of every arm, seeds joined by lines. Right: the differences with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.42 * max(len(differences), 6)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    arms = list(claim.arms)
    for seed in claim.seeds:
        left.plot(range(len(arms)), [results[a][seed] for a in arms], "o-", color="0.6", linewidth=0.7, markersize=4)
    means = [math.fsum(results[a].values()) / len(results[a]) for a in arms]
    left.plot(range(len(arms)), means, "_", color="C3", markersize=26, markeredgewidth=2.5, label="mean")
    left.set_xticks(range(len(arms)), arms, rotation=25, ha="right")
    left.set_ylabel(claim.metric)
    left.margins(x=0.12)
    left.legend(frameon=False)
    left.set_title(f"{len(claim.seeds)} paired seeds", fontsize=10)
    for i, d in enumerate(reversed(differences)):
        colour = {"supported": "C2", "not supported": "C3", "inconclusive": "0.4"}[d.verdict]
        right.plot([d.low, d.high], [i, i], color=colour, linewidth=2)
        right.plot([d.mean], [i], "o", color=colour)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(differences)), [f"{d.arm} over {d.over}" for d in reversed(differences)])
    right.set_title("gain, with 95 % interval", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{claim.recipe}: {differences[0].verdict}", fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def run_claim(claim: Claim, out: Path, jobs: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train what isn't trained yet and write ``result.json``, ``table.md`` and ``plot.png`` into ``out``.

    Returns:
        What is in ``result.json``.
    """
    version = source_version()
    wanted = cells(claim, out)
    records = {(c.arm, c.seed): r for c in wanted if (r := done(c, version)) is not None}
    missing = [c for c in wanted if (c.arm, c.seed) not in records]
    if records:
        say(f"{len(records)} of {len(wanted)} cells are trained already")
    if missing:
        records |= Trainer(min(jobs, len(missing)), claim.metric, version).all(missing, say)
    results = {arm: {seed: records[arm, seed]["value"] for seed in claim.seeds} for arm in claim.arms}
    differences = compare(claim, results)
    text = table(claim, results, differences)
    plot(claim, results, differences, out / "plot.png")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    result = {
        "recipe": claim.recipe,
        "claim": claim.claim,
        "metric": claim.metric,
        "results": results,
        "differences": [vars(d) | {"text": str(d)} for d in differences],
        "verdict": differences[0].verdict,
        "minutes": round(sum(r["seconds"] for r in records.values()) / 60, 1),
        "source": version,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(text)
    say(f"\ntable, plot and JSON: {out}")
    return result


def summary(results: Sequence[dict[str, Any]]) -> str:
    """All claims as one Markdown table, in the README's format."""
    lines = [
        "| recipe | claim | metric: means of the arms | gain over the baseline [95 %] | seeds | verdict |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for r in results:
        means = ", ".join(f"{arm} {math.fsum(v.values()) / len(v):.3f}" for arm, v in r["results"].items())
        seeds = len(next(iter(r["results"].values())))
        gain = r["differences"][0]["text"]
        lines.append(
            f"| {r['recipe']} | {r['claim']} | `{r['metric']}`: {means} | {gain} | {seeds} | **{r['verdict']}** |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """``python -m recipes claim``. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes claim", description="train the arms of a claim on paired seeds"
    )
    parser.add_argument("recipe", nargs="?", help="whose claim")
    parser.add_argument("--all", action="store_true", help="every recipe's, and one table of all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings side by side (default: cores)")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the claim's")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/claims"), help="folder for results (default: runs/claims)"
    )
    args = parser.parse_args(argv)
    if args.all == bool(args.recipe):
        return fail("name one recipe, or --all", f"python -m recipes claim {(claimed() or ['<name>'])[0]}")
    if args.jobs < 1 or (args.seeds and len(set(args.seeds)) < 2):
        return fail("--jobs must be at least 1, and --seeds at least two different ones")
    received: list[int] = []

    def end(signum: int, frame: object) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        claims = [read(recipe) for recipe in (claimed() if args.all else [args.recipe])]
        results = []
        for claim in claims:
            if args.seeds:
                claim = Claim(**{**vars(claim), "seeds": list(dict.fromkeys(args.seeds))})
            results.append(run_claim(claim, args.out / claim.recipe, args.jobs))
        if args.all:
            print(summary(results))
    except ClaimError as error:
        return fail(str(error))
    except KeyboardInterrupt:  # the children have been ended
        return 128 + (received or [signal.SIGINT])[0]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0
