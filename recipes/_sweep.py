"""``python -m recipes sweep <name>``: the runs of a W&B sweep file, here, on SLURM, or by W&B's own agent.

``configs/<recipe>/sweep.yaml`` is in W&B's format and goes to W&B's server as it is (``--on wandb``). Without it we
expand the file ourselves: ``grid`` in full, ``random`` with a seed; ``bayes`` needs the server's optimizer, so what it
spans is searched at random here, which is said. A run is the very command that W&B's agent would run, in a folder that
goes by what is typed: those that are done aren't run again, and one that was stopped goes on from its ``last.ckpt``.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from recipes._claim import last_values, source_version
from recipes._claim_results import ClaimError
from recipes._cli import CONFIGS, fail
from recipes._jobs import Jobs, cores, interruptible, last_lines

#: Runs of a search at random, where neither the file (``run_cap``) nor the user says how many.
RUNS = 20
_MACRO = re.compile(r"\$\{(?:envvar:)?\w+\}")


class SweepError(ValueError):
    """A sweep that can't be run as it stands. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# ---------------------------------------------------------------------- what the file says


@dataclass(frozen=True)
class Sweep:
    """A sweep file: ``content`` is all of it."""

    file: Path
    content: dict[str, Any]
    name: str
    method: str
    metric: str
    maximize: bool
    parameters: dict[str, dict[str, Any]]
    command: list[str]


def find(wanted: str, folder: Path = CONFIGS) -> Path:
    """The file that is meant: a path, or ``configs/<name>/sweep.yaml`` by its recipe's name."""
    file, own = Path(wanted).expanduser(), folder / wanted / "sweep.yaml"
    if file.is_file():
        return file
    if own.is_file():
        return own
    known = sorted(each.parent.name for each in folder.glob("*/sweep.yaml"))
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"recipes with one: {', '.join(known)}; or give a file"
    raise SweepError(f"there is no sweep '{wanted}'", hint)


def read(file: Path) -> Sweep:
    """A sweep file, checked as far as running it here needs.

    Raises:
        SweepError: if it isn't one.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"{file} can't be read: {' '.join(str(error).split())}") from error
    for key, kind in (("program", str), ("method", str), ("metric", dict), ("parameters", dict)):
        if not isinstance(given, dict) or not isinstance(given.get(key), kind) or not given[key]:
            raise SweepError(f"{file} is no sweep: it has no '{key}'", "see configs/classifier/sweep.yaml")
    goal = given["metric"].get("goal", "minimize")
    if not given["metric"].get("name") or goal not in ("minimize", "maximize"):
        raise SweepError(f"{file}: metric takes a name, and minimize or maximize as goal")
    for name, spec in given["parameters"].items():
        if not isinstance(spec, dict) or "parameters" in spec:
            raise SweepError(f"{file}: parameter '{name}' takes values, or a distribution (nested ones: --on wandb)")
    # configs/advstyle/sweep.yaml is the sweep `advstyle`, others are told apart by their own name
    own = file.stem if file.stem != "sweep" else file.resolve().parent.name
    command = given.get("command") or ["${env}", "${interpreter}", "${program}", "${args}"]
    return Sweep(
        file=file,
        content=given,
        name=own,
        method=given["method"],
        metric=str(given["metric"]["name"]),
        maximize=goal == "maximize",
        parameters=given["parameters"],
        command=[str(word) for word in command],
    )


# ---------------------------------------------------------------------- which runs


def draw(name: str, spec: dict[str, Any], rng: random.Random) -> Any:
    """One value of a parameter, by W&B's names of distributions.

    Raises:
        SweepError: for a distribution that is W&B's alone, or one that lacks its bounds.
    """
    if "value" in spec:
        return spec["value"]
    try:
        if "values" in spec:
            return rng.choices(spec["values"], spec.get("probabilities"))[0]
        whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
        kind = str(spec.get("distribution") or ("int_uniform" if whole else "uniform"))
        if kind in ("normal", "log_normal"):
            found = rng.gauss(float(spec.get("mu", 0.0)), float(spec.get("sigma", 1.0)))
            return _short(math.exp(found) if kind == "log_normal" else found)
        low, high = float(spec["min"]), float(spec["max"])
        if kind == "int_uniform":
            return rng.randint(int(low), int(high))
        if kind == "uniform":
            return _short(rng.uniform(low, high))
        if kind == "q_uniform":
            q = float(spec.get("q", 1.0))
            return _short(round(rng.uniform(low, high) / q) * q)
        if kind == "log_uniform":  # the bounds are exponents of e
            return _short(math.exp(rng.uniform(low, high)))
        if kind == "log_uniform_values":
            return _short(math.exp(rng.uniform(math.log(low), math.log(high))))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise SweepError(f"parameter '{name}' can't be drawn: {' '.join(str(error).split())} ({spec})") from error
    raise SweepError(f"parameter '{name}': the distribution '{kind}' is only known to W&B", "--on wandb")


def _short(value: float) -> float:
    """As many digits as somebody would type; they are the value that is trained with."""
    return float(f"{value:.6g}")


def settings(sweep: Sweep, runs: int | None, seed: int) -> list[dict[str, Any]]:
    """The settings of all runs, all different: a grid's points, or so many draws.

    Those of a greater number of runs with the same seed begin with those of a smaller one.

    Args:
        sweep: the file.
        runs: how many; None: what the file says (``run_cap``), else the whole grid, or :data:`RUNS` draws.
        seed: of the draws.
    """
    runs = runs if runs is not None else sweep.content.get("run_cap")
    if sweep.method == "grid":
        choices = []
        for name, spec in sweep.parameters.items():
            values = [spec["value"]] if "value" in spec else spec.get("values")
            if not isinstance(values, list) or not values:
                raise SweepError(f"{sweep.file}: a grid takes values, and parameter '{name}' has none")
            choices.append(values)
        points = itertools.product(*choices)
        return [dict(zip(sweep.parameters, point, strict=True)) for point in itertools.islice(points, runs)]
    if sweep.method not in ("random", "bayes"):
        raise SweepError(f"{sweep.file}: the method is grid, random or bayes, not '{sweep.method}'")
    found: dict[str, dict[str, Any]] = {}
    runs = RUNS if runs is None else runs
    for i in range(100 * runs):  # a small space of choices may hold fewer
        rng = random.Random(f"{seed}/{i}")
        point = {name: draw(name, spec, rng) for name, spec in sweep.parameters.items()}
        found.setdefault(json.dumps(point, default=str), point)
        if len(found) == runs:
            break
    return list(found.values())


def command_of(sweep: Sweep, point: dict[str, Any], further: Sequence[str] = ()) -> list[str]:
    """The command of one run, as W&B's agent would build it, but with our Python.

    Raises:
        SweepError: for a macro that only W&B's agent knows.
    """
    words: list[str] = []
    for word in sweep.command:
        if word == "${env}":  # finds the Python on the PATH; ours is known
            continue
        if word in ("${interpreter}", "python", "python3"):
            words.append(sys.executable)
        elif word == "${args}":
            words += [f"--{name}={_typed(value)}" for name, value in point.items()]
        else:
            word = word.replace("${program}", str(sweep.content["program"]))
            word = re.sub(r"\$\{envvar:(\w+)\}", lambda m: os.environ.get(m[1], m[1]), word)
            if macro := _MACRO.search(word):
                raise SweepError(f"{sweep.file}: only W&B's agent knows {macro[0]}", "--on wandb")
            words.append(word)
    return [*words, *further]


def _typed(value: Any) -> str:
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else json.dumps(value)


@dataclass
class Trial:
    """One run of a sweep: its settings, the command, and its folder."""

    point: dict[str, Any]
    command: list[str]
    folder: Path
    metric: str
    #: What came out, of this call or an earlier one; None: not run to its end yet.
    record: dict[str, Any] | None = field(default=None)

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def resuming(self) -> list[str]:
        """The command that goes on where an earlier call stopped; no other run's checkpoint lies in the folder."""
        return [*self.command, "--trainer.default_root_dir", str(self.folder), "--ckpt_path", "last?"]

    def look(self) -> None:
        """Read the record that is there; one of a failure counts until the run is tried again."""
        try:
            self.record = json.loads((self.folder / "trial.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or cut off while it was written
            self.record = None

    def begin(self) -> None:
        """Forget an attempt that failed: what is stopped from now on is neither done nor failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "trial.json").unlink(missing_ok=True)
        self.record = None

    def end(self, code: int, seconds: float, version: str) -> None:
        """Write down how the run ended; one that a signal stopped leaves nothing, and goes on next time."""
        if code < 0 or code > 128:
            return
        record: dict[str, Any] = {"settings": self.point, "command": self.command[1:], "version": version}
        record |= {"seconds": round(seconds, 1), "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            if code:
                raise ClaimError(f"ended with {code}: {last_lines(self.output)}")
            record["values"] = last_values(self.folder, [self.metric])
        except ClaimError as error:
            record["error"] = str(error)
        partial = self.folder / "trial.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        os.replace(partial, self.folder / "trial.json")
        self.record = record

    @property
    def failed(self) -> bool:
        return self.record is not None and "error" in self.record

    @property
    def value(self) -> float:
        """Of the sweep's metric, the last one logged; nan where there is none."""
        return float(self.record["values"][self.metric]) if self.record and not self.failed else math.nan


def trials(sweep: Sweep, points: Sequence[dict[str, Any]], out: Path, further: Sequence[str]) -> list[Trial]:
    """All runs; a folder goes by what is typed, so that a changed file keeps the runs it still has."""
    found = []
    for point in points:
        command = command_of(sweep, point, further)
        key = hashlib.sha256("\0".join(command[1:]).encode()).hexdigest()[:12]
        trial = Trial(point, command, out.resolve() / key, sweep.metric)
        trial.look()
        found.append(trial)
    return found


# ---------------------------------------------------------------------- running them


def train(trial: Trial, jobs: Jobs, version: str, environment: dict[str, str]) -> None:
    """Run one trial to its end, and write down what came out."""
    trial.begin()
    begun = time.monotonic()
    code = jobs.run(trial.resuming, trial.output, environment)
    trial.end(code, time.monotonic() - begun, version)


def graphics_cards() -> list[str]:
    """The cards that are ours to use, as CUDA_VISIBLE_DEVICES names them; asks the driver, not torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [card for card in given.split(",") if card.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i in range(len(re.findall(r"^GPU \d+:", said, re.M)))]


def run_here(wanted: Sequence[Trial], workers: int, group: str, progress: Callable[[Trial], None]) -> None:
    """Run trials side by side on this machine; each has a card of its own, where there are cards."""
    version, jobs = source_version(), Jobs(workers)
    cards, free = graphics_cards(), queue.SimpleQueue[str]()
    for i in range(workers if cards else 0):
        free.put(cards[i % len(cards)])

    def one(trial: Trial) -> None:
        environment = {"WANDB_RUN_GROUP": group}
        if not cards:
            return train(trial, jobs, version, environment)
        card = free.get()
        try:
            train(trial, jobs, version, {**environment, "CUDA_VISIBLE_DEVICES": card})
        finally:
            free.put(card)

    try:
        futures = {jobs.pool.submit(one, trial): trial for trial in wanted}
        left = set(futures)
        while left:
            ended, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()
                progress(futures[future])
    finally:
        jobs.stop()


class OnCluster:
    """One trial as a job of submitit, which pickles it, runs it on a node, and requeues it at preemption."""

    def __init__(self, trial: Trial, version: str, group: str) -> None:
        self.trial, self.version, self.group = trial, version, group

    def __call__(self) -> None:
        self.jobs = Jobs(1)
        # SLURM sends the signal of preemption to all processes, and only this one knows what to do.
        trial = self.trial
        words = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh", *trial.resuming]
        trial.folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        try:
            running = self.jobs.pool.submit(self.jobs.run, words, trial.output, {"WANDB_RUN_GROUP": self.group})
            code = running.result()
            trial.end(code, time.monotonic() - begun, self.version)
        finally:
            self.jobs.stop()

    def checkpoint(self) -> Any:
        """Called by submitit at preemption: the run saves ``last.ckpt``, and the requeued job goes on from it."""
        from submitit.helpers import DelayedSubmission

        self.jobs.grace = 100.0  # of the 120 s that SLURM gives notice
        self.jobs.stop()
        return DelayedSubmission(OnCluster(self.trial, self.version, self.group))


def run_on_cluster(
    wanted: Sequence[Trial],
    workers: int | None,
    group: str,
    progress: Callable[[Trial], None],
    *,
    folder: Path,
    options: dict[str, Any],
    cluster: str = "slurm",
) -> None:
    """Run trials as an array of SLURM jobs through submitit, and wait for them; Ctrl-C cancels them.

    Args:
        wanted: the trials.
        workers: how many at a time; None: as many as SLURM lets run.
        group: name of the group in W&B.
        progress: called with each that ends.
        folder: for submitit's files; nodes must see it.
        options: submitit's parameters, such as ``timeout_min`` and ``gpus_per_node``; others are sbatch's.
        cluster: ``slurm``, or ``local``: submitit's own processes, for trying it out.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise SweepError("SLURM's arrays need submitit", 'pip install "perturbation-recipes[slurm]"') from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise SweepError("there is no sbatch here: is this a login node of a SLURM cluster?", "--on local")
    given = {f"slurm_{key.removeprefix('slurm_')}": value for key, value in options.items()}
    # A job that ran into its limit again and again went on each time.
    executor = submitit.AutoExecutor(folder, cluster, **{f"{cluster}_max_num_timeout": 1000})
    try:
        executor.update_parameters(name=group, timeout_min=24 * 60, slurm_signal_delay_s=120)
        executor.update_parameters(**({"slurm_array_parallelism": workers} if workers else {}), **given)
    except (AssertionError, NameError, ValueError, TypeError) as error:
        raise SweepError(f"--slurm: {' '.join(str(error).split())[:300]}") from error
    version = source_version()
    for trial in wanted:
        trial.begin()  # before its job does, so that an attempt that failed isn't taken for its end
    try:
        jobs = executor.submit_array([OnCluster(trial, version, group) for trial in wanted])
    except Exception as error:  # what sbatch said
        raise SweepError(f"sbatch refused: {' '.join(str(error).split())[:300]}") from error
    print(f"submitted as {jobs[0].job_id.partition('_')[0]}; Ctrl-C cancels what isn't done", flush=True)
    left = list(zip(jobs, wanted, strict=True))
    try:
        while left:
            for job, trial in list(left):
                ended = job.done()
                trial.look()
                if trial.record is None and not ended:
                    continue
                if trial.record is None:
                    trial.record = {"error": f"job {job.job_id} ended ({job.state}); its log: {job.paths.stderr}"}
                left.remove((job, trial))
                progress(trial)
            time.sleep(1.0)
    finally:
        for job, _ in left:
            job.cancel(check=False)  # one that scancel knows no more keeps none of the others running


def run_one(trial: Trial, group: str) -> int:
    """Run one trial in the foreground: as a task of a job array, which hears SLURM's signals itself.

    Returns:
        Its exit code.
    """
    if trial.record and not trial.failed:
        print(f"done already: {trial.folder}")
        return 0
    trial.begin()
    begun = time.monotonic()
    environment = {**os.environ, "WANDB_RUN_GROUP": group}
    process: subprocess.Popen[str] | None = None
    early: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        if process is None:
            early.append(signum)
        else:
            process.send_signal(signum)

    # The run saves, and asks to be requeued; we wait for it. (A signal that comes twice at one moment counts once.)
    for name in ("SIGUSR1", "SIGTERM", "SIGINT"):
        if hasattr(signal, name):  # Windows lacks the first
            signal.signal(getattr(signal, name), pass_on)
    process = subprocess.Popen(
        trial.resuming,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    for signum in early:
        process.send_signal(signum)
    assert process.stdout is not None
    with trial.output.open("a", encoding="utf-8") as output:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            output.write(line)
    code = process.wait()
    trial.end(code, time.monotonic() - begun, source_version())
    if trial.failed and not code:
        fail(str(trial.record["error"]))  # type: ignore[index]
        return 1
    return code if code >= 0 else 128 - code


def run_by_wandb(sweep: Sweep, agents: int, runs: int | None, out: Path) -> int:
    """Create the sweep on W&B's server and run its agents here.

    Returns:
        The exit code.
    """
    from recipes._loggers import wandb_mode

    mode, why = wandb_mode("online")
    if mode != "online":
        raise SweepError(f"W&B's server is needed for this: {why}", "--on local runs the same file without it")
    import wandb

    try:
        project = sweep.content.get("project") or os.environ.get("WANDB_PROJECT", "perturbation-recipes")
        made = wandb.sweep(sweep.content, project=project)
    except Exception as error:
        raise SweepError(f"W&B didn't take the sweep: {' '.join(str(error).split())[:300]}") from error
    agents = min(agents, runs or agents)  # `--count 0` would mean: without end
    jobs = Jobs(agents)
    # The file says `python`: let it be ours. An agent passes on what ends it, so that no run is left behind.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"PATH": path, "WANDB_PROJECT": str(project)}
    out.mkdir(parents=True, exist_ok=True)
    futures = {}
    for i in range(agents):
        count = [] if runs is None else ["--count", str(runs // agents + (i < runs % agents))]
        words = [sys.executable, "-m", "wandb", "agent", "--forward-signals", *count, made]
        log = out / f"agent-{i}.txt"
        futures[jobs.pool.submit(jobs.run, words, log, environment)] = log
        print(f"agent {i}: {log}", flush=True)
    codes = []
    try:
        left = set(futures)
        while left:
            ended, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in ended:
                codes.append(future.result())
                if codes[-1]:
                    fail(f"an agent ended with {codes[-1]}: {last_lines(futures[future])}")
    finally:
        jobs.stop()
    return int(any(codes))


# ---------------------------------------------------------------------- what comes out


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Of each parameter the last part of its name, where that tells it from the others."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def ranked(all_trials: Sequence[Trial], maximize: bool) -> list[Trial]:
    """The best first; those without a number, and then those that failed or aren't run, last."""
    sign = -1.0 if maximize else 1.0
    return sorted(
        all_trials,
        key=lambda t: (t.record is None, t.failed, math.isnan(t.value), 0.0 if math.isnan(t.value) else sign * t.value),
    )


def report(sweep: Sweep, all_trials: Sequence[Trial], out: Path, say: Callable[[str], None]) -> None:
    """The table, sorted by the metric; as ``results.csv`` with all digits; and the command of the best."""
    order, names = ranked(all_trials, sweep.maximize), short_names(list(sweep.parameters))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow([sweep.metric, *sweep.parameters, "seconds", "state", "folder", "command"])
        for trial in order:
            gave = "" if trial.failed or trial.record is None else repr(trial.value)
            state = "not run" if trial.record is None else trial.record.get("error", "done")
            seconds = (trial.record or {}).get("seconds", "")
            typed = shlex.join(["python", *trial.command[1:]])
            settings_ = [_typed(trial.point[name]) for name in sweep.parameters]
            writer.writerow([gave, *settings_, seconds, state, trial.folder, typed])
    rows = [[sweep.metric, *names.values(), "seconds", "folder"]]
    for trial in order:
        if trial.record is not None and not trial.failed:
            cells = [_typed(trial.point[name]) for name in names]
            rows.append([f"{trial.value:.4f}", *cells, f"{trial.record['seconds']:.0f}", trial.folder.name])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else []:
        say("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    failed, missing = sum(t.failed for t in order), sum(t.record is None for t in order)
    if failed:
        say(f"{failed} of {len(order)} failed; running the sweep again tries them again:")
        for trial in order:
            if trial.failed:
                say(f"  {trial.folder.name}: {trial.record['error']}")  # type: ignore[index]
    if missing:
        say(f"{missing} of {len(order)} aren't run to their end; running the sweep again goes on with them")
    versions = {t.record.get("version") for t in order if t.record is not None and not t.failed}
    if versions - {source_version()}:
        say("some were trained from another source than the present one; --out elsewhere trains them anew")
    if order and order[0].record is not None and not order[0].failed:
        say(f"the best ({sweep.metric} {order[0].value:.4f}): {shlex.join(['python', *order[0].command[1:]])}")
    say(f"table: {out / 'results.csv'}")


class _Progress:
    """A line for each run that ends."""

    def __init__(self, sweep: Sweep, total: int, say: Callable[[str], None]) -> None:
        self.names, self.total, self.say = short_names(list(sweep.parameters)), total, say
        self.begun, self.ended = time.monotonic(), 0

    def __call__(self, trial: Trial) -> None:
        self.ended += 1
        point = " ".join(f"{short}={_typed(trial.point[name])}" for name, short in self.names.items())
        if trial.record is None:
            gave = "was stopped"
        elif trial.failed:
            gave = f"failed: {trial.record['error']}"
        else:
            gave = f"{trial.metric} {trial.value:.4f}"
        eta = (time.monotonic() - self.begun) / self.ended * (self.total - self.ended)
        self.say(f"{self.ended}/{self.total}  {point}: {gave}  eta {eta / 60:.0f} min")


# ---------------------------------------------------------------------- the command


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all commands here do."""

    def error(self, message: str) -> NoReturn:
        raise SweepError(message, "python -m recipes sweep --help")


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as gpus_per_node=1, got '{text}'")
    return key, yaml.safe_load(value)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{text}'")
    return int(text)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m recipes sweep",
        description="run a W&B sweep file here, on SLURM, or by W&B's agent; run again, it goes on with what's missing",
        usage="python -m recipes sweep NAME|FILE [options] [-- further arguments of every run]",
    )
    parser.add_argument("sweep", help="a recipe's name (its configs/<name>/sweep.yaml), or a file")
    parser.add_argument("--on", choices=["local", "slurm", "wandb"], default="local", help="where (default: local)")
    parser.add_argument(
        "--jobs",
        type=_count,
        help="at a time: processes (default: one per graphics card, else core), jobs of the array, or W&B's agents (1)",
    )
    parser.add_argument("--runs", type=_count, help=f"how many (default: run_cap, else a whole grid, else {RUNS})")
    parser.add_argument("--seed", type=int, default=0, help="of a search at random (default: 0)")
    parser.add_argument("--out", type=Path, help="the sweep's folder (default: runs/sweeps/<name>)")
    parser.add_argument("--trial", type=int, metavar="I", help="only the I-th run, from 0: for a job array of your own")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    parser.add_argument(
        "--slurm", type=_assignment, nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of each job: partition=gpu gpus_per_node=1 cpus_per_task=8 timeout_min=600 (default: a day)",
    )  # fmt: skip
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.further = argv[cut + 1 :]
    return args


def run(args: argparse.Namespace) -> int:
    """The command, with its arguments parsed. Returns the exit code."""

    def say(line: str) -> None:
        print(line, flush=True)

    if args.slurm and args.on != "slurm":
        raise SweepError("--slurm says what each job of --on slurm asks for", "add --on slurm, or leave --slurm out")
    sweep = read(find(args.sweep))
    out = args.out or Path("runs/sweeps") / sweep.name
    group = f"sweep-{out.resolve().name}"
    if args.on == "wandb":
        if args.further or args.trial is not None or args.report_only:
            raise SweepError("W&B's agent runs the file as it is: no further arguments, --trial or --report-only")
        return run_by_wandb(sweep, args.jobs or 1, args.runs, out)
    every = trials(sweep, settings(sweep, args.runs, args.seed), out, args.further)
    if args.trial is not None:
        if not 0 <= args.trial < len(every):
            raise SweepError(f"there is no run {args.trial}: the sweep has {len(every)}, from 0 to {len(every) - 1}")
        return run_one(every[args.trial], group)
    if not args.report_only:
        if sweep.method == "bayes":
            say("method bayes: only W&B's server chooses by what came out (--on wandb); searching at random instead")
        if "early_terminate" in sweep.content:
            say("early_terminate: only W&B's server ends bad runs early (--on wandb); all run to their end here")
        wanted = [trial for trial in every if trial.record is None or trial.failed]
        if len(wanted) < len(every):
            say(f"{len(every) - len(wanted)} of {len(every)} are done already")
        if wanted:
            progress = _Progress(sweep, len(wanted), say)
            say(f"{len(wanted)} runs of {sweep.content['program']}; their logs: {out}/*/output.txt")
            if args.on == "slurm":
                folder = out.resolve() / "submitit"
                run_on_cluster(wanted, args.jobs, group, progress, folder=folder, options=dict(args.slurm))
            else:
                workers = args.jobs or len(graphics_cards()) or cores()
                run_here(wanted, min(workers, len(wanted)), group, progress)
    report(sweep, every, out, say)
    return int(any(trial.record is None or trial.failed for trial in every))


def main(argv: list[str]) -> int:
    """``python -m recipes sweep``. Returns the exit code: 2 for bad input, 1 where a run failed."""
    with interruptible() as received:
        try:
            return run(_arguments(argv))
        except SweepError as error:
            return fail(str(error), *filter(None, [error.hint]))
        except OSError as error:  # such as a folder that can't be made
            return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:  # the children have been ended
            say = "stopped; the same command goes on with what's missing"
            sys.stderr.write(f"\n{say}\n")
            return 128 + (received[0] if received else signal.SIGINT)
