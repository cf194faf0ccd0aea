"""``python -m recipes claim <name>``: trains the arms of a claim on paired seeds and says what came out.

``configs/<recipe>/claim.yaml`` states a claim, ``claim_<part>.yaml`` a further one of the same recipe
(``<name>/<part>``): the arms (a recipe and its arguments, as a user would type them), the metric, which arm is the
technique and which the baseline, and the seeds. A cell is one arm with one seed, trained by the very command that a
user types; cells that were trained before by the same command and the same source are not trained again. The verdict
is of the paired difference between technique and baseline.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from recipes import _measures
from recipes._claim_results import (
    STEPS_TO,
    Arm,
    Claim,
    ClaimError,
    compare,
    plot,
    plot_curves,
    steps_to,
    summary,
    t_interval,
    table,
    verdict,
)
from recipes._cli import CONFIGS, HOME, fail
from recipes._jobs import Jobs, cores, interruptible, last_lines

__all__ = ["Arm", "Claim", "ClaimError", "compare", "main", "read", "run_claim", "summary", "t_interval", "verdict"]
#: A claim is stated for at least so many seeds; an early look (``--seeds``) may take fewer.
SEEDS = 5


class CellFailed(ClaimError):
    """A training ended badly, or gave no number."""


# ---------------------------------------------------------------------- reading


def read(name: str, folder: Path = CONFIGS) -> Claim:
    """The claim of a name, ``recipe`` or ``recipe/part``, checked.

    Raises:
        ClaimError: if there is none, or it can't be decided as it stands.
    """
    recipe, _, part = name.partition("/")
    file = folder / recipe / (f"claim_{part}.yaml" if part else "claim.yaml")
    if not file.is_file():
        known = claimed(folder)
        near = difflib.get_close_matches(name, known, 1)
        tip = f"did you mean '{near[0]}'?" if near else f"those that have one: {', '.join(known)}"
        raise ClaimError(f"'{name}' has no claim ({file} is not there); {tip}")
    try:
        given, kind = yaml.safe_load(file.read_text(encoding="utf-8")), Claim
        if "grid" in given:  # not two arms but how measures rank many trainings
            given, kind = _measures.expand(given), _measures.Grid
        arms = {
            name: Arm(**{**arm, "args": [str(word) for word in arm.get("args") or []]})
            for name, arm in given["arms"].items()
        }
        shared = [str(word) for word in given.get("shared") or []]
        margin = float(given.get("margin", 0.0))
        also = [str(metric) for metric in given.get("also") or []]
        curves = [str(metric) for metric in given.get("curves") or []]
        own = {"recipe": recipe, "part": part, "arms": arms, "shared": shared, "margin": margin, "also": also}
        own |= {"curves": curves}
        claim = kind(**{**given, **own})
        seeds = [int(seed) for seed in claim.seeds]
    except (TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ClaimError(f"{file} is no claim: {' '.join(str(error).split())}") from error
    if len(set(seeds)) < max(SEEDS, len(seeds)):
        raise ClaimError(f"{file}: a claim needs at least {SEEDS} seeds, all different, not {claim.seeds}")
    for name, arm in arms.items():
        if not (HOME / "recipes" / arm.recipe / "__main__.py").is_file():
            known = sorted(each.parent.name for each in (HOME / "recipes").glob("*/__main__.py"))
            raise ClaimError(f"{file}: arm '{name}': no recipe '{arm.recipe}'; there are: {', '.join(known)}")
    for role in (claim.baseline, claim.technique):
        if role not in arms:
            raise ClaimError(f"{file}: there is no arm '{role}'; there are: {', '.join(arms)}")
    if claim.direction not in ("max", "min"):
        raise ClaimError(f"{file}: direction must be max or min, not '{claim.direction}'")
    return claim


def claimed(folder: Path = CONFIGS) -> list[str]:
    """Names of all claims: of each recipe ``recipe`` first, then ``recipe/part``."""
    files = [*folder.glob("*/claim.yaml"), *folder.glob("*/claim_*.yaml")]
    return sorted("/".join([file.parent.name, *file.stem.split("_", 1)[1:]]) for file in files)


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


#: What no number depends on.
_UNRELATED = re.compile(
    r"claim(_.*)?\.yaml|sweep\.yaml|_(claim(_results)?|measures|jobs|sweep|matrix|slurm|ranks|renamed)\.py"
)


def source_version() -> str:
    """A hash of everything that a number depends on here: our modules and the configs, claims left out."""
    digest = hashlib.sha256()
    for package in ("callbacks", "configs", "datamodules", "recipes"):
        for file in sorted((HOME / package).rglob("*")):
            if file.suffix in (".py", ".yaml", ".npz", ".safetensors") and not _UNRELATED.fullmatch(file.name):
                digest.update(f"{file.relative_to(HOME)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cells(claim: Claim, out: Path) -> list[Cell]:
    """All cells, seed by seed, so that an early look compares like with like.

    A folder goes by the arm's name and what is typed, so claims of a recipe share the arms that they have in common.
    """
    found = []
    for seed in claim.seeds:
        for name, arm in claim.arms.items():
            typed = hashlib.sha256("\0".join([arm.recipe, *claim.shared, *arm.args]).encode()).hexdigest()[:8]
            readable = re.sub(r"[^\w.-]+", "_", name)
            folder = out / "cells" / f"{readable}-{typed}" / f"seed-{seed}"
            options = ["--seed_everything", str(seed), "--wandb", "off", "--trainer.default_root_dir", str(folder)]
            command = [sys.executable, "-m", f"recipes.{arm.recipe}", "fit", *claim.shared, *arm.args, *options]
            found.append(Cell(name, seed, command, folder))
    return found


def value(record: dict[str, Any], metric: str) -> float:
    """What a cell gave: a metric's last value, or the wall-clock ``seconds`` of its training."""
    return float(record["seconds"] if metric == "seconds" else record["values"][metric])


def columns(claim: Claim) -> tuple[list[str], list[str]]:
    """Columns of metrics.csv whose last value a claim wants, and those which it wants as curves."""
    wanted = [claim.metric, *claim.also]
    curves = [metric.removeprefix(STEPS_TO) for metric in wanted if metric.startswith(STEPS_TO)]
    return [metric.removeprefix(STEPS_TO) for metric in wanted], list(dict.fromkeys([*curves, *claim.curves]))


def done(cell: Cell, version: str | None, metrics: Sequence[str], curves: Sequence[str] = ()) -> dict[str, Any] | None:
    """What a cell gave, if it was trained by this command from this source (None: from any) and has the metrics."""
    try:
        record = json.loads(cell.record.read_text(encoding="utf-8"))
        same = record["command"] == cell.command[1:] and version in (None, record["version"])
        known = record.setdefault("curves", {})
        if same and (fresh := [metric for metric in curves if not known.get(metric)]):  # another claim didn't ask for
            known |= read_curves(cell.folder, fresh)
        same = same and all(known.get(metric) for metric in curves)
        return record if same and all(math.isfinite(value(record, metric)) for metric in metrics) else None
    except (OSError, TypeError, LookupError, json.JSONDecodeError):  # not there, or cut off while it was written
        return None


def last_values(folder: Path, metrics: Sequence[str]) -> dict[str, float]:
    """The last values of all metrics in the newest run's ``metrics.csv`` below a folder.

    Raises:
        ClaimError: if one of those named isn't there.
    """
    files = sorted(folder.glob("*/*/metrics.csv"), key=lambda f: f.stat().st_mtime)
    found: dict[str, float] = {}
    if files:
        with files[-1].open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                found |= {name: float(text) for name, text in row.items() if text}
    for metric in metrics:
        if metric not in found and metric != "seconds":
            raise ClaimError(f"no '{metric}' in {files[-1] if files else folder}: does the recipe log it?")
    return found


def read_curves(folder: Path, metrics: Sequence[str]) -> dict[str, list[list[float]]]:
    """(step, value) of these metrics in the newest run's ``metrics.csv`` below a folder, in the order of the steps."""
    files = sorted(folder.glob("*/*/metrics.csv"), key=lambda f: f.stat().st_mtime)
    found: dict[str, list[list[float]]] = {metric: [] for metric in metrics}
    with files[-1].open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            for metric in metrics:
                if row.get(metric):
                    found[metric].append([float(row["step"]), float(row[metric])])
    return {metric: sorted(points) for metric, points in found.items()}


class Trainer:
    """Runs commands side by side, and ends them all when one fails or the user does.

    Args:
        jobs: how many at a time.
        metric: which column of their metrics.csv is the result.
        version: of the source, kept with each result.
        also: further columns that must be there.
        curves: columns that are kept whole.
        wandb: ``off``, ``offline`` or ``online``.
        group: W&B's group of all cells; an arm is a job type there.
    """

    def __init__(
        self,
        jobs: int,
        metric: str,
        version: str,
        also: Sequence[str] = (),
        curves: Sequence[str] = (),
        wandb: str = "off",
        group: str = "",
    ) -> None:
        self.wandb, self.group = wandb, group
        self.metric, self.version, self.also, self.curves = metric, version, also, curves
        self.jobs = Jobs(jobs)

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train one cell and record what it gave."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        output = cell.folder / "output.txt"
        command = list(cell.command)
        if self.wandb != "off":  # no number depends on it
            command[command.index("--wandb") + 1] = self.wandb
        place = {"WANDB_RUN_GROUP": self.group, "WANDB_JOB_TYPE": cell.arm, "WANDB_TAGS": f"seed-{cell.seed}"}
        place |= {"WANDB_NAME": f"{cell.arm}, seed {cell.seed}"}
        if code := self.jobs.run(command, output, place):
            raise CellFailed(
                f"{cell.arm}, seed {cell.seed} ended with {code}: {last_lines(output)} "
                f"(command: {shlex.join(cell.command)})"
            )
        seconds = round(time.monotonic() - begun, 1)
        record: dict[str, Any] = {"command": cell.command[1:], "version": self.version, "seconds": seconds}
        record["values"] = last_values(cell.folder, [self.metric, *self.also, *self.curves])
        if self.curves:
            record["curves"] = read_curves(cell.folder, self.curves)
        for metric in (self.metric, *self.also):
            if not math.isfinite(found := value(record, metric)):
                raise CellFailed(f"{cell.arm}, seed {cell.seed}: {metric} is {found} (see {cell.folder})")
        cell.record.write_text(json.dumps(record), encoding="utf-8")
        return record

    def all(self, wanted: Sequence[Cell], say: Callable[[str], None]) -> dict[tuple[str, int], dict[str, Any]]:
        """Results of all cells, in any order; a line for each that ends."""
        begun, records = time.monotonic(), {}
        futures: dict[Future[dict[str, Any]], Cell] = {self.jobs.pool.submit(self.train, cell): cell for cell in wanted}
        try:
            left = set(futures)
            while left:
                ended, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell, record = futures[future], future.result()
                    records[cell.arm, cell.seed] = record
                    eta = (time.monotonic() - begun) / len(records) * len(left)
                    gave = f"{self.metric} {value(record, self.metric):.4f}"
                    say(f"{len(records)}/{len(wanted)}  {cell.arm}, seed {cell.seed}: {gave}  eta {eta / 60:.0f} min")
        finally:
            self.jobs.stop()
        return records


# ---------------------------------------------------------------------- what comes out


def run_claim(
    claim: Claim,
    out: Path,
    jobs: int,
    say: Callable[[str], None] = print,
    report_only: bool = False,
    wandb: str = "off",
) -> dict[str, Any]:
    """Train what isn't trained yet and write ``result.json``, ``table.md`` and ``plot.png`` into ``out``.

    With ``report_only`` nothing is trained, and cells count that were trained from another source, too.

    Returns:
        What is in ``result.json``.
    """
    version = source_version()
    wanted = cells(claim, out.parent if claim.part else out)
    accepted = None if report_only else version
    metrics, curves = columns(claim)
    records = {(c.arm, c.seed): r for c in wanted if (r := done(c, accepted, metrics, curves)) is not None}
    missing = [c for c in wanted if (c.arm, c.seed) not in records]
    if report_only and missing:
        first = f"{missing[0].arm}, seed {missing[0].seed}"
        raise ClaimError(f"{len(missing)} of {len(wanted)} cells aren't trained in {out}, such as {first}")
    other = sum(record["version"] != version for record in records.values())
    if other:
        say(f"{other} of {len(wanted)} cells were trained from another source than the present one")
    if records:
        say(f"{len(records)} of {len(wanted)} cells are trained already")
    if missing:
        trainer = Trainer(min(jobs, len(missing)), metrics[0], version, metrics[1:], curves, wandb, claim.name)
        records |= trainer.all(missing, say)

    def number(arm: str, seed: int, metric: str) -> float:
        if not metric.startswith(STEPS_TO):
            return value(records[arm, seed], metric)
        name = metric.removeprefix(STEPS_TO)
        own, base = (records[each, seed]["curves"][name] for each in (arm, claim.baseline))
        return steps_to(own, base[-1][1], falling=base[-1][1] <= base[0][1])

    def of(metric: str) -> dict[str, dict[int, float]]:
        return {arm: {seed: number(arm, seed, metric) for seed in claim.seeds} for arm in claim.arms}

    results, also = of(claim.metric), {metric: of(metric) for metric in claim.also}
    differences = compare(claim, results)
    text = table(claim, results, differences, also)
    plot(claim, results, differences, out / "plot.png", also)
    if claim.curves:
        drawn = {
            metric: {arm: [records[arm, seed]["curves"][metric] for seed in claim.seeds] for arm in claim.arms}
            for metric in claim.curves
        }
        plot_curves(claim, drawn, out / "curves.png")
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    result = {
        "recipe": claim.name,
        "claim": claim.claim,
        "metric": claim.metric,
        "results": results,
        "also": also,
        "differences": [vars(d) | {"text": str(d)} for d in differences],
        "verdict": differences[0].verdict,
        "minutes": round(sum(r["seconds"] for r in records.values()) / 60, 1),
        "source": sorted({record["version"] for record in records.values()}),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(text)
    say(f"\ntable, plot and JSON: {out}")
    return result


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all commands here do."""

    def error(self, message: str) -> NoReturn:
        raise ClaimError(message)


def _seeds(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main(argv: list[str]) -> int:
    """``python -m recipes claim``. Returns the exit code: 2 for bad input, 1 where a training failed."""
    parser = _Parser(prog="python -m recipes claim", description="train the arms of a claim on paired seeds")
    parser.add_argument("recipe", nargs="?", help="whose claims, or recipe/part for one of several")
    parser.add_argument("--all", action="store_true", help="every recipe's, and one table of all")
    parser.add_argument("--jobs", type=int, default=cores(), help="trainings side by side (default: cores)")
    parser.add_argument("--seeds", type=_seeds, nargs="+", metavar="1,2,..", help="other seeds than the claim's")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is trained")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="of a grid of trainings: judge this table's runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/claims"), help="folder for results (default: runs/claims)"
    )
    tracked = "track the trainings with W&B: one group, an arm is a job type (default: off)"
    parser.add_argument("--wandb", choices=["off", "offline", "online"], default="off", help=tracked)
    with interruptible() as received:
        try:
            args = parser.parse_args(argv)
            if args.all == bool(args.recipe):
                return fail("name one recipe, or --all", f"python -m recipes claim {(claimed() or ['<name>'])[0]}")
            seeds = list(dict.fromkeys(seed for part in args.seeds or [] for seed in part))
            if args.jobs < 1 or (args.seeds and len(seeds) < 2):
                return fail("--jobs must be at least 1, and --seeds at least two different ones")
            own = [n for n in claimed() if n == args.recipe or n.startswith(f"{args.recipe}/")]
            names = claimed() if args.all else own
            claims = [read(name) for name in names or [args.recipe]]
            results = []
            for claim in claims:
                claim = replace(claim, seeds=seeds or claim.seeds)
                out, how = args.out / claim.name, {"report_only": args.report_only}
                if isinstance(claim, _measures.Grid) and args.wandb != "off":
                    return fail(f"'{claim.name}' is a claim of a grid of trainings, which W&B doesn't track")
                if isinstance(claim, _measures.Grid):
                    results.append(_measures.run_claim(claim, out, args.jobs, table=args.csv, **how))
                elif args.csv is not None:
                    return fail(f"--csv is for claims of a grid of trainings, which '{claim.name}' isn't")
                else:
                    results.append(run_claim(claim, out, args.jobs, wandb=args.wandb, **how))
            if len(results) > 1:
                print(summary(results))
        except ClaimError as error:
            code = fail(str(error))
            return 1 if isinstance(error, CellFailed) else code
        except KeyboardInterrupt:  # the children have been ended
            return 128 + (received[0] if received else signal.SIGINT)
    return 0
