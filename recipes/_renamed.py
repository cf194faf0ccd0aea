"""Settings that have another name than they had: old configs and flags say which, old checkpoints are read as they are.

A file or flag with an old name is refused with the new one, since it can be put right where it stands. A checkpoint
can't, so its stored settings are renamed while they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: Whose setting -> old name -> new name. "Whose" is a recipe's name, and then names are dotted paths as flags have them
#: (``model.width``), or a class of data or of a callback, and then they are names of its arguments.
#: Up to now no setting has been renamed or removed: over all 115 commits up to d09f7f7 every constructor argument of
#: every public class is still there. Whoever renames one adds it here in the same commit.
RENAMED: dict[str, dict[str, str]] = {}


class Renamed(ValueError):
    """A setting is given by a name that it had once. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _walk(settings: Any, recipe: str, path: str = "") -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """Each renamed setting: the dict that holds it, its old and its new name there, and the path of that dict."""
    if isinstance(settings, list):
        for i, each in enumerate(settings):
            yield from _walk(each, recipe, f"{path}[{i}]")
    if not isinstance(settings, dict):
        return
    own = str(settings.get("class_path", "")).rpartition(".")[2]
    arguments = settings.get("init_args")
    if isinstance(arguments, dict):
        for old, new in RENAMED.get(own, {}).items():
            if old in arguments:
                yield arguments, old, new, f"{path}.init_args"
    for old, new in RENAMED.get(recipe, {}).items():
        parent, _, name = old.rpartition(".")
        if path == parent and name in settings:
            yield settings, name, new.rpartition(".")[2], path
    for key, value in list(settings.items()):
        yield from _walk(value, recipe, f"{path}.{key}" if path else str(key))


def check(argv: list[str], recipe: str) -> None:
    """Look for old names in what is typed, flags and files of settings.

    Raises:
        Renamed: for the first one, with its new name.
    """
    classes: dict[str, str] = {}
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        value = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
        if flag in ("-c", "--config") and Path(value).is_file():
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except yaml.YAMLError:  # the parser says what is wrong with it
                continue
            for _, old, new, path in _walk(content, recipe):
                before = f"{path}." if path else ""
                raise Renamed(f"{value}: {before}{old} is now {before}{new}", "change the name in that file")
        if not flag.startswith("--"):
            continue
        key = flag[2:]
        if key.rstrip("+") in ("data", "trainer.callbacks"):
            classes[key.rstrip("+")] = value.rpartition(".")[2]
        now = RENAMED.get(recipe, {}).get(key)
        for owner, cls in classes.items():
            name = key.removeprefix(f"{owner}.").removeprefix("init_args.")
            if key.startswith(f"{owner}.") and name in RENAMED.get(cls, {}):
                now = f"{owner}.{RENAMED[cls][name]}"
        if now:
            raise Renamed(f"--{key} is now --{now}", f"type --{now} instead")


def rename(settings: dict[str, Any], recipe: str) -> list[str]:
    """Give a checkpoint's settings their present names, in place; returns what was done, as ``old -> new``."""
    done = []
    for holder, old, new, path in list(_walk(settings, recipe)):
        before = f"{path}." if path else ""
        value = holder.pop(old)
        holder.setdefault(new, value)
        done.append(f"{before}{old} -> {before}{new}")
    return done
