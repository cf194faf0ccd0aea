"""``python -m recipes matrix``: tries every callback on every recipe, and with ``--pairs`` every two of them.

A cell takes three steps with a small network of the recipe, validates and tests, and checks the laws that one process
can check. The small forms of recipes and the laws are those of the tests (tests/laws/matrix.py says what a cell does),
so this needs a clone of the repository. Cells are dealt to processes of their own; one that dies or hangs costs its
cell and no other.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from recipes._cli import HOME, fail
from recipes._jobs import cores, interruptible, python_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = tuple[str, tuple[str, ...]]  # a recipe and one or two callbacks
Finding = dict[str, Any]  # see tests.laws.matrix.run

#: Seconds after which a cell hangs.
LIMIT = 300.0
#: How a verdict is drawn: sign and colour. Refusals bear the number of their reason.
SIGNS = {"plugs in": "+", "refuses": "", "breaks": "!", "crashes": "!!"}
COLORS = {"plugs in": "#79b791", "refuses": "#dcdcdc", "breaks": "#f0a202", "crashes": "#d7263d"}
TOGETHER = "#7fa7d6"
BAD = ("breaks", "crashes")
USAGE = """\
examples:
  python -m recipes matrix                                  every callback on every recipe
  python -m recipes matrix --pairs --jobs 8                 and every two of them
  python -m recipes matrix --callbacks my_module.Cutout     one of yours on every recipe
  python -m recipes matrix --callbacks my_module.Cutout,SAM,DSU --pairs --recipes classifier"""


class MatrixError(ValueError):
    """What was asked for can't be tried. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# ---------------------------------------------------------------------- processes


class Worker:
    """A process that tries one cell after the other.

    Args:
        output: file for what it says beside its findings.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.closed = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._said: TextIO | None = None

    def ask(self, question: dict[str, Any], limit: float = LIMIT) -> Any:
        """Its answer.

        Raises:
            MatrixError: if it died, took longer than so many seconds (it starts afresh at the next question), or is
                closed.
        """
        with self._lock:
            if self.closed:
                raise MatrixError("stopped")
            process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(limit, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            hung = not late.is_alive()
            late.cancel()
        if not answer.endswith("\n"):
            code = process.wait()
            self.end()
            raise MatrixError(f"took longer than {limit:g} s" if hung else f"its process ended with {code}")
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[str]:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        here = os.pathsep.join([python_path(), os.getcwd()])  # ours first: others have a package `tests`, too
        self._said = self.output.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.laws.matrix"],
            cwd=HOME,  # which `-m` puts first: the directory in which the user stands comes last
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": here},
            start_new_session=True,  # a terminal's Ctrl-C reaches it through us
        )
        return self._process

    def close(self) -> None:
        """End its process for good."""
        with self._lock:
            self.closed = True
        self.end()

    def end(self) -> None:
        """End its process, if it has one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        pass
        if self._said is not None:
            self._said.close()
            self._said = None


def attempt(cells: Sequence[Cell], workers: Sequence[Worker], done: Callable[[int, Finding], None]) -> None:
    """Try all cells, shared among the workers; ``done`` hears of each, with its number."""
    left: queue.SimpleQueue[tuple[int, Cell]] = queue.SimpleQueue()
    for numbered in enumerate(cells):
        left.put(numbered)
    ended: queue.SimpleQueue[tuple[int, Finding] | BaseException | None] = queue.SimpleQueue()

    def work(worker: Worker) -> None:
        try:
            while not worker.closed:
                try:
                    number, (recipe, names) = left.get_nowait()
                except queue.Empty:
                    break
                begun = time.monotonic()
                try:
                    finding = worker.ask({"recipe": recipe, "callbacks": list(names)})
                except MatrixError as error:
                    finding = {"recipe": recipe, "callbacks": list(names), "verdict": "crashes", "reason": str(error)}
                    finding |= {"laws": {}, "seconds": round(time.monotonic() - begun, 3)}
                ended.put((number, finding))
        except BaseException as error:
            ended.put(error)
        finally:
            ended.put(None)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        told = ended.get()
        if isinstance(told, BaseException):
            raise told
        if told is None:
            running -= 1
        else:
            done(*told)


@contextmanager
def progress(total: int) -> Iterator[Callable[[Finding], None]]:
    """What is told of each finding: a bar in a terminal, else a line now and then; what is bad at once."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("cells", total=total)
    said, count = time.monotonic(), 0

    def done(finding: Finding) -> None:
        nonlocal said, count
        count += 1
        bar.update(task, advance=1, description=finding["recipe"])
        if finding["verdict"] in BAD:
            console.print(f"{label(finding)} {finding['verdict']}: {finding['reason']}", markup=False, highlight=False)
        elif not console.is_terminal and time.monotonic() - said > 30:
            said = time.monotonic()
            console.print(f"{count} of {total} cells", highlight=False)

    with bar:
        yield done


def label(finding: Finding) -> str:
    return f"{' + '.join(map(short, finding['callbacks']))} on {finding['recipe']}"


def short(name: str) -> str:
    """A callback's name without its module."""
    return name.rpartition(".")[2]


# ---------------------------------------------------------------------- which cells


def pairs(recipe: str, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Every two callbacks, also one of which a run can have two; techniques on the classifier in both orders."""
    names = list(kinds)
    found = list(itertools.combinations(names, 2))
    found += [(name, name) for name in names if kinds[name] != "other"]
    if recipe == "classifier":
        acting = [name for name in names if kinds[name] == "technique"]
        found += [(b, a) for a, b in itertools.combinations(acting, 2)]
    return found


# ---------------------------------------------------------------------- what is shown


def reason_of(finding: Finding) -> str:
    """Its reason, as the footnotes say it: without a list of layers."""
    text: str = finding["reason"]
    return text.split(". Layers: ")[0]


def _pattern(finding: Finding) -> tuple[str, str]:
    """Its reason with a gap where the recipe's network, module or data are named, and the name."""
    text = reason_of(finding)
    for name in finding.get("of", ()):
        if re.search(rf"\b{name}\b", text):
            return re.sub(rf"\b{name}\b", "\0", text), name
    return text, ""


class Notes:
    """Numbered reasons; those that differ only in the recipe's network, module or data are one."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self._names: dict[str, list[str]] = {}
        for finding in findings:
            if finding["verdict"] != "plugs in":
                pattern, name = _pattern(finding)
                names = self._names.setdefault(pattern, [])
                if name not in names:
                    names.append(name)
        self._numbers = {pattern: number for number, pattern in enumerate(self._names, 1)}

    def number(self, finding: Finding) -> int:
        return self._numbers[_pattern(finding)[0]]

    def lines(self) -> list[tuple[int, str]]:
        """(number, reason) in the order of their appearance."""
        return [(n, pattern.replace("\0", "/".join(self._names[pattern]))) for pattern, n in self._numbers.items()]


def sign(finding: Finding | None, notes: Notes) -> str:
    """How a cell stands in a table: ``+``, or the number of its reason, behind ``!`` where that is a fault."""
    if finding is None:
        return ""
    bare = SIGNS[finding["verdict"]]
    return bare if finding["verdict"] == "plugs in" else f"{bare}{notes.number(finding)}"


def grid(findings: Sequence[Finding]) -> tuple[list[str], list[str], dict[tuple[str, str], Finding]]:
    """Callbacks, recipes, and the finding of each (callback, recipe)."""
    of = {(f["callbacks"][0], f["recipe"]): f for f in findings if len(f["callbacks"]) == 1}
    return list(dict.fromkeys(c for c, _ in of)), list(dict.fromkeys(r for _, r in of)), of


def together(findings: Sequence[Finding]) -> list[Finding]:
    """Pairs that are refused though each plugs in by itself."""
    fits = {
        (f["recipe"], f["callbacks"][0]) for f in findings if len(f["callbacks"]) == 1 and f["verdict"] == "plugs in"
    }
    refused = [f for f in findings if len(f["callbacks"]) == 2 and f["verdict"] == "refuses"]
    return [f for f in refused if all((f["recipe"], name) in fits for name in f["callbacks"])]


def counts(findings: Sequence[Finding]) -> str:
    """``12 plug in, 3 refuse, none breaks a law, none crashes``."""
    many = {verdict: sum(f["verdict"] == verdict for f in findings) for verdict in SIGNS}
    words = [f"{many['plugs in']} plug in", f"{many['refuses']} refuse"]
    words += [f"{many['breaks'] or 'none'} broke a law", f"{many['crashes'] or 'none'} crashed"]
    return ", ".join(words)


def markdown(findings: Sequence[Finding]) -> str:
    """The table of single callbacks with its footnotes, and what there is to say of pairs."""
    callbacks, recipes, of = grid(findings)
    single, double = ([f for f in findings if len(f["callbacks"]) == n] for n in (1, 2))
    notes, out = Notes(single), list[str]()
    if single:
        out += [f"{len(single)} cells: {counts(single)}.", ""]
        out += ["| | " + " | ".join(recipes) + " |", "|---|" + ":-:|" * len(recipes)]
        for name in callbacks:
            signs = [sign(of.get((name, recipe)), notes) for recipe in recipes]
            out.append(f"| {short(name)} | " + " | ".join(signs) + " |")
        out += ["", *(f"{number}. {_escaped(text)}" for number, text in notes.lines())]
    if double:
        apart = together(findings)
        out += ["", f"{len(double)} pairs: {counts(double)}."]
        known = sum(f["verdict"] == "refuses" for f in double) - len(apart)
        out += [f"Of those that refuse, {known} do because one of the two does by itself.", ""]
        out += ["| recipe | pairs | plug in | refuse | broke a law | crashed |", "|---|--:|--:|--:|--:|--:|"]
        for recipe in dict.fromkeys(f["recipe"] for f in double):
            own = [f for f in double if f["recipe"] == recipe]
            many = [sum(f["verdict"] == verdict for f in own) for verdict in SIGNS]
            out.append(f"| {recipe} | {len(own)} | " + " | ".join(map(str, many)) + " |")
        shown = [f for f in double if f["verdict"] in BAD] + apart
        out += ["", *(f"- {label(f)} {f['verdict']}: {_escaped(reason_of(f))}" for f in shown)]
    return "\n".join(out).rstrip() + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def show(findings: Sequence[Finding]) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    callbacks, recipes, of = grid(findings)
    single, double = ([f for f in findings if len(f["callbacks"]) == n] for n in (1, 2))
    notes = Notes(single)
    styles = {"plugs in": "green", "refuses": "dim", "breaks": "bold yellow", "crashes": "bold red"}
    if single:
        heads = [recipe.replace("_", "\n") for recipe in recipes]
        widest = 2 + max(len(short(name)) for name in callbacks) + sum(max(map(len, h.split())) + 2 for h in heads)
        if widest > console.width:  # letters in place of names
            heads = [chr(ord("a") + place % 26) * (1 + place // 26) for place in range(len(recipes))]
            console.print(", ".join(f"{h}: {r}" for h, r in zip(heads, recipes, strict=True)), highlight=False)
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for head in heads:
            table.add_column(head, justify="center", vertical="bottom")
        for name in callbacks:
            row = [of.get((name, recipe)) for recipe in recipes]
            signs = [Text(sign(f, notes), style=styles[f["verdict"]] if f else "") for f in row]
            table.add_row(short(name), *signs)
        console.print(table)
        for number, text in notes.lines():
            console.print(f"{number:>3}  {text}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"\n{len(single)} cells: {counts(single)}", highlight=False)
    if double:
        apart = together(findings)
        for finding in [*(f for f in double if f["verdict"] in BAD), *apart]:
            words = f"{label(finding)} {finding['verdict']}: {reason_of(finding)}"
            console.print(words, markup=False, highlight=False, soft_wrap=True)
        console.print(f"{len(double)} pairs: {counts(double)}", highlight=False)
        console.print(f"{len(apart)} pairs refuse though each of the two plugs in by itself", highlight=False)


def draw(findings: Sequence[Finding]) -> Figure:
    """The table of single callbacks as a picture."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    callbacks, recipes, of = grid(findings)
    notes = Notes([f for f in findings if len(f["callbacks"]) == 1])
    wide = max(0.62 * len(recipes) + 2.6, 8.2)
    wrap = int(16 * (wide - 0.4))  # letters of this size in an inch
    lines = [piece for number, text in notes.lines() for piece in _wrapped(f"{number}  {text}", wrap)]
    high = 0.24 * len(callbacks) + 1.3
    figure = Figure((wide, high + 0.155 * len(lines) + 0.3))
    width, height = figure.get_size_inches()
    axis = figure.add_axes(
        (2.2 / width, 1 - (high - 0.05) / height, (0.62 * len(recipes)) / width, (high - 1.3) / height)
    )
    for y, name in enumerate(callbacks):
        for x, recipe in enumerate(recipes):
            finding = of.get((name, recipe))
            color = COLORS[finding["verdict"]] if finding else "white"
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
            axis.text(x, y, sign(finding, notes), ha="center", va="center", fontsize=8, color="#222222")
    axis.set(xlim=(-0.5, len(recipes) - 0.5), ylim=(len(callbacks) - 0.5, -0.5))
    axis.set_xticks(range(len(recipes)), recipes, rotation=40, ha="left", fontsize=8.5)
    axis.set_yticks(range(len(callbacks)), [short(name) for name in callbacks], fontsize=8.5)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    top = 1 - (high + 0.1) / height
    for number, line in enumerate(lines):
        figure.text(0.15 / width, top - 0.155 * number / height, line, fontsize=7.5, va="top", color="#333333")
    return figure


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="     ", drop_whitespace=True) or [""]


def draw_pairs(findings: Sequence[Finding]) -> Figure:
    """Every two callbacks on each recipe: first in the list downwards, second to the right."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    double = [f for f in findings if len(f["callbacks"]) == 2]
    recipes = list(dict.fromkeys(f["recipe"] for f in double))
    names = list(dict.fromkeys(name for f in findings for name in f["callbacks"]))
    place = {name: number for number, name in enumerate(names)}
    kinds = [*COLORS, "together"]
    apart = {id(f) for f in together(findings)}
    wide = min(len(recipes), 3)
    rows = -(-len(recipes) // wide)
    side = max(0.115 * len(names), 1.6)
    figure = Figure((wide * (side + 0.4) + 1.9, rows * (side + 0.45) + 2.0), layout="constrained")
    axes = figure.subplots(rows, wide, squeeze=False)
    for axis in axes.flat[len(recipes) :]:
        axis.set_visible(False)
    for number, (axis, recipe) in enumerate(zip(axes.flat, recipes, strict=False)):
        values = [[float("nan")] * len(names) for _ in names]
        for finding in double:
            if finding["recipe"] == recipe:
                a, b = (place[name] for name in finding["callbacks"])
                verdict = "together" if id(finding) in apart else finding["verdict"]
                values[a][b] = kinds.index(verdict)
        colors = ListedColormap([*COLORS.values(), TOGETHER])
        axis.pcolormesh(values, cmap=colors, vmin=-0.5, vmax=len(kinds) - 0.5, edgecolors="white", linewidth=0.4)
        axis.set_title(recipe, fontsize=9)
        axis.set(aspect="equal", ylim=(len(names), 0))
        ticks = [each + 0.5 for each in range(len(names))]
        axis.set_yticks(ticks, [short(n) for n in names] if number % wide == 0 else [""] * len(names), fontsize=5.5)
        last = number >= len(recipes) - wide
        axis.set_xticks(ticks, [short(n) for n in names] if last else [""] * len(names), fontsize=5.5, rotation=90)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    words = {"plugs in": "plug in", "refuses": "refuse, as one of them does alone", "breaks": "break a law"}
    words |= {"crashes": "crash", "together": "refuse each other"}
    handles = [Patch(color=color, label=words[k]) for k, color in zip(kinds, [*COLORS.values(), TOGETHER], strict=True)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 * wide - 1, frameon=False, fontsize=8)
    return figure


def write(findings: Sequence[Finding], out: Path) -> list[Path]:
    """``matrix.json``, ``matrix.md``, ``matrix.png`` and, of pairs, ``pairs.png`` in the folder."""
    files = [out / "matrix.json", out / "matrix.md"]
    files[0].write_text(json.dumps(list(findings), indent=1), encoding="utf-8")
    files[1].write_text(markdown(findings), encoding="utf-8")
    for file, drawn, number in ((out / "matrix.png", draw, 1), (out / "pairs.png", draw_pairs, 2)):
        if any(len(f["callbacks"]) == number for f in findings):
            drawn(findings).savefig(file, dpi=130)
            files.append(file)
        else:
            file.unlink(missing_ok=True)  # an earlier matrix's
    return files


# ---------------------------------------------------------------------- the command


def _chosen(given: str | None, known: Sequence[str], what: str) -> list[str]:
    """Names of a list with commas; all if there is none.

    Raises:
        MatrixError: for one that isn't known.
    """
    names = [name.strip() for name in given.split(",") if name.strip()] if given else list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise MatrixError(
                f"no {what} '{name}'", f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            )
    return list(dict.fromkeys(names))


def _missing() -> str | None:
    """What the matrix needs and isn't there."""
    if not (HOME / "tests" / "laws" / "matrix.py").is_file():
        return f"the matrix needs the tests beside recipes/, which {HOME} hasn't: run it in a clone of the repository"
    if importlib.util.find_spec("pytest") is None:
        return "the matrix needs pytest, whose assertions the laws use: pip install pytest"
    return None


def ask_for_cells(args: argparse.Namespace, worker: Worker) -> list[Cell]:
    """The cells that are wanted, single ones first.

    Raises:
        MatrixError: for an unknown recipe or callback.
    """
    wanted = [name.strip() for name in (args.callbacks or "").split(",") if name.strip()]
    described = worker.ask({"describe": wanted})
    if "error" in described:
        near = difflib.get_close_matches(described["error"].split("'")[1], described["known"], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"ours are: {', '.join(described['known'])}"
        raise MatrixError(described["error"], hint)
    kinds = described["callbacks"]
    recipes = _chosen(args.recipes, described["recipes"], "recipe")
    cells: list[Cell] = [(recipe, (name,)) for recipe in recipes for name in kinds]
    if args.pairs:
        cells += [(recipe, pair) for recipe in recipes for pair in pairs(recipe, kinds)]
    return cells


def main(argv: list[str] | None = None) -> int:
    """``python -m recipes matrix``. Returns the exit code: 1 if a cell broke a law or crashed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes matrix",
        description="Try every callback on every recipe, made small: three steps, with the laws checked.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", metavar="A,B", help="these recipes (all)")
    parser.add_argument("--callbacks", metavar="X,Y", help="these callbacks (all); yours as my_module.MyTechnique")
    parser.add_argument("--pairs", action="store_true", help="also every two callbacks together")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes at a time (one for each core)")
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"), help="folder for the results (runs/matrix)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        return fail(f"--jobs must be at least 1, not {args.jobs}")
    if missing := _missing():
        return fail(missing)
    out = args.out.expanduser().resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "output.txt").write_text("", encoding="utf-8")
    except OSError as error:
        return fail(f"can't write to {out}: {error.strerror}", "choose another folder with --out")
    workers = [Worker(out / "output.txt") for _ in range(args.jobs)]
    begun, cells, findings = time.monotonic(), list[Cell](), dict[int, Finding]()
    with interruptible() as received:
        try:
            cells = ask_for_cells(args, workers[0])
            sys.stderr.write(f"{len(cells)} cells on {args.jobs} processes\n")
            with progress(len(cells)) as tell:

                def done(number: int, finding: Finding) -> None:
                    findings[number] = finding
                    tell(finding)

                attempt(cells, workers[: len(cells)], done)
        except MatrixError as error:
            return fail(str(error), *([error.hint] if error.hint else [f"what it said: {out / 'output.txt'}"]))
        except KeyboardInterrupt:
            pass
        finally:
            for worker in workers:
                worker.close()
    tried = [findings[number] for number in sorted(findings)]
    files = write(tried, out)
    show(tried)
    print(f"{time.monotonic() - begun:.0f} s; written: {', '.join(str(file) for file in files)}")
    if received:
        sys.stderr.write(f"stopped after {len(tried)} of {len(cells)} cells\n")
        return 128 + received[0]
    return int(any(f["verdict"] in BAD for f in tried))
