"""``python -m recipes``: the list of recipes; ``recipes <name> fit``: runs one; ``python -m recipes claim <name>``.

Cards are read with ``ast``; nothing is imported before it is known what is wanted.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import shutil
import sys
import textwrap
from pathlib import Path

FIELDS = ("Paper", "Perturbs", "Plugs in", "Claim", "Data", "Run time", "Command")
COLUMNS = {"Paper": "paper", "Perturbs": "perturbs", "Plugs in": "plugs in", "Data": "data", "Run time": "run time"}
USAGE = """\
run one:      python -m recipes.<name> fit          (or: recipes <name> fit)
its options:  python -m recipes.<name> --help
its claim:    python -m recipes claim <name>        (all of them: claim --all)
many runs:    python -m recipes sweep <name>        (its configs/<name>/sweep.yaml; options: sweep --help)
what fits:    python -m recipes matrix              (every callback on every recipe; options: matrix --help)"""


def read_cards(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """The card of every recipe: the docstring of its ``__init__.py``, line by line.

    Returns:
        Recipe name -> field -> text, in the order of the names; the docstring's first line is the field ``Title``.
    """
    cards = {}
    for file in sorted((folder or Path(__file__).parent).glob("*/__init__.py")):
        if file.parent.name.startswith("_"):
            continue
        lines = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()
        card, field = {"Title": lines[0] if lines else ""}, ""
        for line in lines[1:]:
            key, colon, text = line.partition(":")
            if colon and key in FIELDS:
                card[field := key] = text.strip()
            elif field and line.strip():  # a field may go on in the next line
                card[field] += " " + line.strip()
            else:
                field = ""
        cards[file.parent.name] = card
    return cards


def table(cards: dict[str, dict[str, str]], width: int) -> str:
    """The cards as a plain table of the given width, long cells wrapped."""
    head = ["name", *COLUMNS.values()]
    rows = [[name, *(card.get(field, "") for field in COLUMNS)] for name, card in cards.items()]
    natural = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    longest = [max(len(word) for row in [head, *rows] for word in [*row[i].split(), ""]) for i in range(len(head))]
    longest[0] = natural[0]
    widths = list(natural)
    while sum(widths) + 2 * len(widths) - 2 > width:  # take from the widest column that can still be wrapped
        i = max(range(len(widths)), key=lambda i: widths[i] if widths[i] > longest[i] else -1)
        if widths[i] <= longest[i]:
            break
        widths[i] -= 1
    out = []
    for row in [head, ["-" * w for w in widths], *rows]:
        cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=True)]
        for k in range(max(map(len, cells))):
            line = "  ".join(f"{c[k] if k < len(c) else '':{w}}" for c, w in zip(cells, widths, strict=True))
            out.append(line.rstrip())
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    """The ``recipes`` script. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "list", "help"):
        print(table(read_cards(), max(80, min(shutil.get_terminal_size((140, 24)).columns, 200))))
        print(f"\n{USAGE}")
        return 0
    name, rest = argv[0], argv[1:]
    if name == "claim":
        from recipes._claim import main as claim

        return claim(rest)
    if name == "sweep":
        from recipes._sweep import main as sweep

        return sweep(rest)
    if name == "matrix":
        from recipes._matrix import main as matrix

        return matrix(rest)
    known = read_cards()
    if name not in known:
        near = difflib.get_close_matches(name.removeprefix("recipes."), [*known, "claim", "sweep", "matrix"], 1)
        hint = f"did you mean '{near[0]}'?" if near else f"the recipes are: {', '.join(known)}"
        sys.stderr.write(f"error: no recipe '{name}'\nhint: {hint}\n")
        return 2
    before = sys.argv
    sys.argv = [sys.argv[0], *rest]
    try:  # as `python -m recipes.<name>` does it, so that the ranks Lightning starts are started that way, too
        runpy.run_module(f"recipes.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
