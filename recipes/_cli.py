"""The one command line that every recipe shares.

Nothing here imports torch: help, a missing or a wrong verb and a shadowed package are answered at once, and only then
does :func:`run` import :mod:`recipes._app`, where the work is done.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
CONFIGS = HOME / "configs"
#: What each verb does, as the short help says it.
VERBS = {
    "fit": "train, then test with the last weights",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "write predictions.pt",
}
#: Options that take no value, so that the verb may follow them.
_BARE = {"--print_config", "-h", "--help"}


def brief_help(name: str) -> str:
    """The help that is shown without importing torch."""
    me = f"python -m recipes.{name}"
    rows = [
        (f"{me} fit", f"train with configs/{name}/default.yaml"),
        (f"{me} fit --config my.yaml", "the same, some settings replaced (repeatable; the later wins)"),
        (f"{me} fit --config NAME", f"the same with configs/{name}/NAME.yaml, from any directory"),
        (f"{me} fit --print_config", "show every setting"),
        (f"{me} fit --trainer.fast_dev_run true", "one batch of each loop; leaves nothing behind"),
        (f"{me} fit --trainer.callbacks+=MixStyle", "stack a second technique"),
        (f"{me} fit --ckpt_path last", "go on where the newest run stopped (last? starts afresh if there is none)"),
        (f"{me} test --ckpt_path best", "evaluate the newest run's best checkpoint (or last, or a file)"),
        (f"{me} fit --wandb online", "W&B: auto (default), online, offline or off"),
        (f"{me} fit --debug", "show tracebacks"),
        (f"{me} fit --help", "all options (a few seconds: imports torch)"),
    ]
    width = max(len(command) for command, _ in rows)
    lines = [f"usage: {me} {{{','.join(VERBS)}}} [options]", ""]
    lines += [f"  {command:{width}}  {what}" for command, what in rows]
    return "\n".join(lines)


def fail(message: str, *hints: str) -> int:
    """Say what is wrong in one line on stderr, with what to do about it; returns the exit code of bad input."""
    sys.stderr.write(f"error: {message}\n" + "".join(f"hint: {hint}\n" for hint in hints))
    return 2


def split_verb(argv: list[str]) -> tuple[str | None, list[str], str | None]:
    """Finds the verb, wherever it stands: ``fit --config x`` and ``--config x fit`` are the same.

    Returns:
        The verb, all other arguments in their order, and, where there is no verb, the word that stands in its place.
    """
    value_of_an_option = False
    verbs: list[tuple[bool, int]] = []  # whether it could be an option's value, and its place
    wrong: str | None = None
    for i, word in enumerate(argv):
        if word in VERBS:
            verbs.append((value_of_an_option, i))
        elif wrong is None and not verbs and not word.startswith("-") and not value_of_an_option:
            wrong = word
        value_of_an_option = word.startswith("-") and word not in _BARE and "=" not in word
    if not verbs:
        return None, argv, wrong
    _, i = min(verbs)  # the first that can't be a value, else the first
    return argv[i], argv[:i] + argv[i + 1 :], None


def with_own_configs(name: str, argv: list[str]) -> list[str]:
    """``--config pacs`` is the recipe's own ``configs/<name>/pacs.yaml``, from any directory; a file of that name that
    lies where the user stands goes first. Configs come before all flags: so flags win, wherever they were typed."""
    configs: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        value = value if equals else next(words, "") if key in ("--config", "-c") else ""
        if key not in ("--config", "-c"):
            flags.append(word)
            continue
        own = CONFIGS / name / f"{Path(value).stem}.yaml"
        if value and not Path(value).is_file() and value in (own.stem, own.name) and own.is_file():
            value = str(own)
        configs += [f"{key}={value}"] if equals else [key, value] if value else [key]
    return configs + flags


def shadowed() -> tuple[str, str] | None:
    """The first of our packages that the working directory hides, and where it was found instead."""
    for package in ("callbacks", "datamodules"):
        spec = importlib.util.find_spec(package)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [spec.origin or "."])] if spec else []
        if places and (HOME / package) not in places:
            return package, str(places[0])
    return None


def run(model: str, name: str, args: list[str] | None = None) -> int:
    """Run a recipe.

    Args:
        model: dotted path of the LightningModule; a string, so that ``__main__`` stays light and the class is known
            by its importable name and not as ``__main__.X``, which no checkpoint could be opened with.
        name: name of the recipe, of its folder under ``configs/`` and of its folder under ``runs/``.
        args: the command line; ``sys.argv[1:]`` if omitted.

    Returns:
        The exit code: 0, 2 for bad input, 1 for an error of ours, 130 and 143 after SIGINT and SIGTERM.
    """
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(brief_help(name))
        return 0
    verb, rest, wrong = split_verb(argv)
    if wrong is not None:
        near = difflib.get_close_matches(wrong, VERBS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(VERBS)}"
        return fail(f"no command '{wrong}'", hint)
    if verb is None:
        return fail("no command given", f"type: python -m recipes.{name} fit {' '.join(rest)}")
    # OpenMP's threads spin while they wait; where something else runs, too, that costs a multiple of the work itself
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hidden = shadowed()
    if hidden:
        package, place = hidden
        return fail(
            f"this directory hides our package '{package}': {place} is found instead of {HOME / package}",
            f"run from another directory, or: recipes {name} {verb} ..., or: python -P -m recipes.{name} {verb} ...",
        )
    try:
        from recipes import _app

        return _app.execute(model, name, verb, with_own_configs(name, rest), debug=debug)
    except KeyboardInterrupt:  # while importing; later the signals are ours
        return 130
