"""``python -m tests.cli.ranks COMMANDS``: commands of the toy recipe, one after the other, as one rank of several.

COMMANDS is a JSON list of lists of words. Rank and port are in the environment, as a cluster's launcher puts them
there; so the cost of starting is paid once for all of them.
"""

import json
import sys

from recipes._cli import run

for words in json.loads(sys.argv[1]):
    code = run("tests.cli.toy.ToyNet", "toy", words)
    if code:
        raise SystemExit(code)
