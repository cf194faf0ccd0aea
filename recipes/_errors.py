"""One clear line for what a user can put right; a traceback only in run.log, or with ``--debug``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from recipes._cli import HOME

#: Errors that mean bad input; anything else is an error of ours.
BAD_INPUT = (
    ValueError,
    KeyError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ModuleNotFoundError,
    MisconfigurationException,
    OmegaConfBaseException,
)


def subclasses(cls: type) -> Iterator[type]:
    """All classes below one, at any depth."""
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and len(error.args) == 1 else str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        # From a loader's worker: its last line is the error.
        text = text.strip().splitlines()[-1]
        text = re.sub(r"^[\w.]+(?:Error|Exception|Loss): ", "", text)
    if isinstance(error, KeyError) and re.fullmatch(r"[\w./-]*", text):
        text = f"there is no '{text}'"
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException):  # the rest repeats the key
        lines = lines[:1]
    return " ".join(lines) or type(error).__name__


def is_bad_input(error: BaseException) -> bool:
    """Whether a user can put it right (exit code 2)."""
    mismatch = isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error)
    return isinstance(error, BAD_INPUT) or mismatch


def describe(error: BaseException) -> tuple[str, list[str]]:
    """The line for an exception and the hints below it."""
    message, hints = one_line(error), []
    if wrapped := re.search(rf"{_UNION}.*?Errors:\n\s+- (.*?)\n(?:\s+- |Given value)", str(error), re.S):
        message = " ".join(wrapped[1].split())  # of a class's __init__; jsonargparse lists it among its own
    if "Call to compute_fn of link" in message:
        message = message.rpartition(" failed: ")[2]
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = f"the checkpoint doesn't fit this model: {problems[0] if problems else ''}{more}"
        hints.append("leave out the --model settings that differ from the run that wrote it")
    if isinstance(error, ModuleNotFoundError):
        extra = {"open_clip": "clip", "diffusers": "diffusion", "transformers": "text", "autoattack": "attacks"}
        name = (error.name or "").partition(".")[0]
        if name in extra:
            hints.append(f'pip install "perturbation-recipes[{extra[name]}]"')
    if isinstance(error, OmegaConfBaseException):
        right, wrong = "${..data.init_args.batch_size}", "${data.init_args.batch_size}"
        hints.append(f"interpolations are relative here: {right}, not {wrong}")
    if getattr(error, "hint", ""):
        hints.append(str(error.hint))  # type: ignore[attr-defined]
    return message, hints


def raised_here(error: BaseException) -> bool:
    """Whether our own code raised it, so that its message needs no traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(HOME)


def near(word: str, pool: Any, cutoff: float = 0.6) -> str | None:
    """The word of the pool that is most like it, case aside; None if none is."""
    lower = {str(p).lower(): str(p) for p in pool}
    found = difflib.get_close_matches(word.lower(), lower, 1, cutoff)
    return lower[found[0]] if found else None


def _signature_of(path: str) -> set[str]:
    try:
        module, _, name = path.rpartition(".")
        return set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return set()


class Parser(LightningArgumentParser):
    """Says what is wrong in a line or two instead of a page of usage, with the nearest name that exists."""

    debug = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries things with this off
            super().error(message, ex)
        if self.debug and ex is not None:
            traceback.print_exception(ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = condense(message)
        hints = list(dict.fromkeys(hints_for(message, parser)))
        if re.search(r": (?:Callback|LightningDataModule) has no setting", text):
            hints = ["name the class before its settings"]
        if isinstance(ex, OmegaConfBaseException) or "nterpolation" in message:
            hints += describe(OmegaConfBaseException(message))[1]
        sys.stderr.write(f"error: {text}\n" + "".join(f"hint: {hint}\n" for hint in hints))
        if not hints and not text.startswith("there is no file"):
            sys.stderr.write(f"hint: all options: {parser.prog.replace(' [options]', '')} --help\n")
        self.exit(2)


#: How jsonargparse begins what it says of a class.
_CLASS = r"Problem with given class_path '(?:[\w]+\.)*(\w+)': "
_UNION = "Does not validate against any of the Union subtypes"
#: Which of a union's complaints says most: the first that holds one of these, in this order.
_TELLING = ("given class_path", "to a subclass", "import path string", "Expected a typing.Literal")


def _complaint(tail: str) -> str:
    """Of the complaints of a union's members (jsonargparse lists all) the one that fits what was meant.

    Args:
        tail: what follows after the line that says that none fits: ``Errors:`` and an indented list.
    """
    before, _, listed = tail.partition("Errors:\n")
    indent = before.rpartition("\n")[2]  # unions nest, each further to the right
    listed, _, given = listed.partition(f"\n{indent}Given value")
    errors = [_without_union(e) for e in re.split(rf"^{indent}  - ", listed, flags=re.M) if e.strip()]
    value = "".join(re.findall(r"value: (.*)$", given, re.M)[-1:])
    errors.sort(key=lambda e: "class_path 'lightning." in e)  # a base class, tried where no class was named
    for sign in _TELLING:
        for error in errors:
            if sign in error:
                return f"{error}: {value}" if "subclass" in error else error
    kinds = [m.group(1) for e in errors if (m := re.match(r"Expected (?:an? )?([\w.]+)", e))]
    if not kinds:
        return errors[0] if errors else ""
    names = " or ".join("null" if kind == "NoneType" else kind for kind in dict.fromkeys(kinds))
    return f"expected {names}" + (f", got {value}" if value else "")


def _without_union(text: str) -> str:
    head, union, tail = text.partition(_UNION)
    return " ".join((head + _complaint(tail) if union else text).split())


def condense(message: str) -> str:
    """jsonargparse's message in one line."""
    text = _without_union(re.sub(r"<class '([\w.]+)'>", r"\1", message.strip()))
    for pattern, better in (
        (r'(?:Parser|Subcommand "?\w+"?,?) key "([^"]+)":\s*', r"\1: "),
        (r"(?:- )?Expected a path but \S+ either not accessible or invalid (?:- )?", ""),
        (r"Expected an? (?:dot )?import path string: ([\w.]+)", r"there is no class '\1'"),
        (r"Import path does not correspond to a subclass of (\w+): (.*)", r"'\2' is no \1"),
        (rf"{_CLASS}Option '([\w.]+)' is not accepted", r"\1 has no setting '\2'"),
        (_CLASS, r"\1: "),
        (r"Subcommand '\w+' does not accept option '([\w.]+)'", r"there is no setting '\1'"),
        (r"[Ee]xpected an? ([\w.]+)\. Got value: ", r"expected \1, got "),
        (r"expected (?:collections\.abc\.Sequence|list)\b", "expected a list (such as [a, b])"),
        (r"Expected an? typing\.Literal\[(.*?)\]\. Got value: ", r"expected one of \1, got "),
        (r"unrecognized arguments?: ", "unknown: "),
        (r"^config: File does not exist: ", "there is no file "),
        (r"^config: Path is not a file: (.*)", r"\1 is not a file"),
        (r'^Linked "([\w.]+)" must be given via "(\w+)"\.', r"\1 can't be set: it is taken from \2"),
    ):
        text = re.sub(pattern, better, text)
    return text if len(text) < 400 else text[:397] + "..."


def hints_for(message: str, parser: LightningArgumentParser) -> Iterator[str]:
    """What could have been meant: options, keys of files, classes and their arguments."""
    parsers = [parser]
    action = getattr(parser, "_subcommands_action", None)
    if action is not None:
        parsers += action._name_parser_map.values()
    options = [o for p in parsers for o in p._option_string_actions if o.startswith("--")]
    pool = {o.lstrip("-").split(".")[-1] for o in options}
    keys = {o.lstrip("-") for o in options}
    for path in re.findall(r"(?:class_path '?\"?|subclass '?|subclass of '?)([\w.]+)", message):
        pool |= _signature_of(path)
    for word in re.findall(r"--([\w.+-]+)", message):
        found = near(word, keys, 0.75)
        if found and found != word:
            yield f"--{word}: did you mean --{found}?"
    found_keys = re.findall(
        r"Key '([\w.]+)' is not expected|[Oo]ption '([\w.]+)'"
        r"|No action for key \"([\w.]+)\"|key \"([\w.]+)\" .*not found",
        message,
    )
    for key in dict.fromkeys(next(k for k in group if k) for group in found_keys):
        found = near(key, keys, 0.75) or near(key.split(".")[-1], pool)
        if found and found != key:
            yield f"{key}: did you mean {found}?"
    if "arguments are required" in message and "data" in message:
        yield f"choose the data: --data {', or '.join(sorted(importlib.import_module('datamodules').__all__))}"
    names = {c.__name__ for base in (Callback, LightningDataModule, Logger) for c in subclasses(base)}
    pattern = r"(?:import path string|class path|subclass): ?'?\"?([\w.]+)"
    for word in re.findall(pattern, message) + re.findall(r"class_path: ([\w.]+)", message):
        short = word.split(".")[-1]
        found = near(short, names)
        if found and found != short and short not in names:
            yield f"{word}: did you mean {found}?"
            break
