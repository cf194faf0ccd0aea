"""What a claim says and what came out of it: the statement, its statistics, the tables and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------- what a claim says


class ClaimError(ValueError):
    """A claim that can't be decided as it stands; the message says why."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: a recipe, what is typed after ``fit``, and a few words about it."""

    recipe: str
    args: list[str] = field(default_factory=list)
    about: str = ""


@dataclass(frozen=True)
class Claim:
    """``configs/<recipe>/claim.yaml``, or ``claim_<part>.yaml``.

    ``metric`` is a column of metrics.csv, better when larger (``direction: max``) or smaller (``min``). ``shared`` are
    arguments of all arms. The claim holds if the technique beats the baseline by more than ``margin``, on average over
    the seeds; a negative margin is what it may lose. ``also`` are metrics that are shown and not judged (``seconds``:
    of the training, with as many beside it as ``--jobs`` says). A metric ``steps to <metric>`` is the step at which an
    arm's curve first reaches what the baseline's has at the end, with the same seed; its last step where it never does.
    ``curves`` are metrics that are drawn over the steps.
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
    also: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.part}" if self.part else self.recipe


# ---------------------------------------------------------------------- curves

STEPS_TO = "steps to "
Curve = Sequence[Sequence[float]]


def steps_to(curve: Curve, target: float, falling: bool = True) -> float:
    """The step at which a curve of (step, value) first reaches a value, between its points by a straight line.

    Where it never does: its last step, which is too few.

    Args:
        curve: at least one point, in the order of the steps.
        target: the value.
        falling: whether it is reached from above.
    """
    sign = 1.0 if falling else -1.0
    gaps = [(float(step), sign * (float(value) - target)) for step, value in curve]
    if gaps[0][1] <= 0:
        return gaps[0][0]
    for (before, above), (after, below) in zip(gaps, gaps[1:], strict=False):
        if below <= 0:
            return before + (after - before) * above / (above - below)
    return gaps[-1][0]


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
    """Gain of one arm over another (positive is better), paired by seed, with its 95 % interval.

    ``gains`` are those of the single seeds, in their order.
    """

    arm: str
    over: str
    gains: list[float]
    mean: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        digits = 0 if max(abs(self.low), abs(self.high)) >= 100 else 4
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


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
        found.append(Difference(arm, over, gains, mean, low, high, verdict(low, high, margin)))
    return found


# ---------------------------------------------------------------------- tables and the plot


Results = dict[str, dict[int, float]]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _also(claim: Claim, also: dict[str, Results]) -> list[str]:
    """A table of the metrics that aren't judged: mean and standard deviation of each arm."""
    lines = [f"| arm | {' | '.join(f'`{metric}`' for metric in also)} |", "| -- " * (len(also) + 1) + "|"]
    for arm in claim.arms:
        places = {metric: 0 if metric == "seconds" or metric.startswith(STEPS_TO) else 3 for metric in also}
        pairs = {m: mean_and_sd([values[arm][seed] for seed in claim.seeds]) for m, values in also.items()}
        lines.append(
            f"| {arm} | {' | '.join(f'{a:.{places[m]}f} ± {b:.{places[m]}f}' for m, (a, b) in pairs.items())} |"
        )
    return lines


def table(
    claim: Claim, results: Results, differences: Sequence[Difference], also: dict[str, Results] | None = None
) -> str:
    """The result as Markdown: per seed, per arm, and the differences."""
    head = ["arm", *(f"seed {seed}" for seed in claim.seeds), "mean", "sd"]
    rows = [head, ["--"] * len(head)]
    for name in claim.arms:
        values = [results[name][seed] for seed in claim.seeds]
        mean, sd = mean_and_sd(values)
        digits = 0 if claim.metric.startswith(STEPS_TO) else 3
        rows.append([name, *(f"{v:.{digits}f}" for v in [*values, mean, sd])])
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
    if claim.margin:
        lines += ["", f"Over {claim.baseline} a gain counts from {claim.margin:+g} on."]
    lines += ["", *_also(claim, also)] if also else []
    about = [f"- {name}: {arm.about}" for name, arm in claim.arms.items() if arm.about]
    lines += ["", *about] if about else []
    return "\n".join([*lines, "", f"Verdict: **{differences[0].verdict}**"])


def plot(
    claim: Claim,
    results: Results,
    differences: Sequence[Difference],
    file: Path,
    also: dict[str, Results] | None = None,
) -> None:
    """Left: every seed of every arm, seeds joined by lines. Then: the differences of the seeds and their intervals.

    Right, where there are other metrics: the metric against the first of them, mean and standard deviation; where there
    are several and all are shares, bars of all of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 3 if also else 2
    size = (5.5 * panels, 1.6 + 0.42 * max(len(differences), 6))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right, *more = figure.subplots(1, panels, width_ratios=(1, 1.1, 0.9)[:panels])
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
        right.plot(d.gains, [i - 0.22] * len(d.gains), "o", color="0.6", markersize=3.5)
    right.axvline(0, color="black", linewidth=0.8)
    if claim.margin:
        right.axvline(claim.margin, color="black", linewidth=0.8, linestyle="--", label="margin over the baseline")
        right.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(differences)), [f"{d.arm} over {d.over}" for d in reversed(differences)])
    right.set_xlabel(f"gain in {claim.metric}" + (" (smaller is better)" if claim.direction == "min" else ""))
    right.set_title("gain: mean and 95 % interval; below it the single seeds", fontsize=10)
    shares = [v for each in (results, *(also or {}).values()) for seeds in each.values() for v in seeds.values()]
    several = also is not None and len(also) > 1 and all(0 <= v <= 1 for v in shares)  # bars in one unit
    if also and several:
        _bars(more[0], arms, claim.seeds, {**also, claim.metric: results})
    for axis, (metric, values) in zip([] if several else more, (also or {}).items(), strict=False):
        for arm in arms:
            x, y = (mean_and_sd([each[arm][seed] for seed in claim.seeds]) for each in (values, results))
            axis.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], fmt="o", markersize=4, capsize=2)
            axis.annotate(arm, (x[0], y[0]), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axis.set_xlabel(metric)
        axis.set_ylabel(claim.metric)
        axis.margins(0.15)
        axis.set_title("mean and standard deviation", fontsize=10)
    for axis in (left, right, *more):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{claim.name}: {differences[0].verdict}", fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def plot_curves(claim: Claim, curves: dict[str, dict[str, list[Curve]]], file: Path) -> None:
    """A panel for each metric: its mean over the seeds at each step, a line for each arm, the seeds' range shaded.

    Args:
        curves: metric to arm to the curves of its seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, arms) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for arm, seeds in arms.items():
            common = sorted(set.intersection(*({float(step) for step, _ in curve} for curve in seeds)))
            rows = [[value for step, value in curve if float(step) in common] for curve in seeds]
            columns = list(zip(*rows, strict=True))
            (line,) = axis.plot(common, [math.fsum(c) / len(c) for c in columns], label=arm, linewidth=1.3)
            axis.fill_between(
                common, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.1
            )
        if all(value > 0 for seeds in arms.values() for curve in seeds for _, value in curve):
            axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(metric, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{claim.name}: mean and range of {len(claim.seeds)} seeds", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def _bars(axis: Any, arms: Sequence[str], seeds: Sequence[int], metrics: dict[str, Results]) -> None:
    """Means of all metrics side by side for each arm, with standard deviations."""
    width = 0.8 / len(metrics)
    for number, (metric, values) in enumerate(metrics.items()):
        pairs = [mean_and_sd([values[arm][seed] for seed in seeds]) for arm in arms]
        places = [i + (number - (len(metrics) - 1) / 2) * width for i in range(len(arms))]
        means, deviations = zip(*pairs, strict=True)
        axis.bar(places, means, width, yerr=deviations, label=metric, error_kw={"linewidth": 0.8})
    axis.set_xticks(range(len(arms)), arms, rotation=25, ha="right")
    axis.legend(frameon=False, fontsize=8, ncols=len(metrics), loc="lower center", bbox_to_anchor=(0.5, 1.06))
    axis.set_title("mean and standard deviation", fontsize=10)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """All claims as one Markdown table, in the README's format."""
    lines = [
        "| recipe | claim | metric: means of the arms | gain over the baseline [95 %] | seeds | verdict | minutes |",
        "| -- | -- | -- | -- | -- | -- | -- |",
    ]
    for r in results:
        digits = 0 if r["metric"].startswith(STEPS_TO) else 3
        means = ", ".join(f"{arm} {math.fsum(v.values()) / len(v):.{digits}f}" for arm, v in r["results"].items())
        seeds = len(next(iter(r["results"].values())))
        gain = r["differences"][0]["text"]
        lines.append(
            f"| {r['recipe']} | {r['claim']} | `{r['metric']}`: {means} | {gain} | {seeds} | **{r['verdict']}** "
            f"| {r['minutes']:.0f} |"
        )
    return "\n".join(lines)
