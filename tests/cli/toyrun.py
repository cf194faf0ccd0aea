"""``python -m tests.cli.toyrun fit``: the toy recipe as a command."""

from recipes._cli import run

raise SystemExit(run("tests.cli.toy.ToyNet", "toy"))
