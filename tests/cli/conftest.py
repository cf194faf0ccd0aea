"""What the tests of the command line share: the toy recipe, run in this process or in one of its own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

HOME = Path(__file__).resolve().parents[2]
if str(HOME) not in sys.path:  # `pytest` doesn't put the working directory there, `python -m pytest` does
    sys.path.insert(0, str(HOME))

TOY = "tests.cli.toy.ToyNet"


@dataclass
class Result:
    """How a command ended: its exit code, what it said, and the folder of all runs."""

    code: int
    out: str
    err: str
    root: Path

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def runs(self) -> list[Path]:
        """The run folders below the root, oldest first."""
        return sorted((f for f in self.root.glob("*/*") if f.is_dir()), key=lambda f: f.stat().st_ctime_ns)

    @property
    def run(self) -> Path:
        assert len(self.runs) == 1, f"one run was expected, not {self.runs}\n{self.out}\n{self.err}"
        return self.runs[0]


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without empty cells."""
    with (run / "metrics.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(f)]


def config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold the same numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def commit() -> str:
    """Of this checkout."""
    command = ["git", "-C", str(HOME), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    """No account, no settings of W&B from outside; the environment is afterwards as it was."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "wandb")}
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the toy recipe in this process: ``cli("fit", "--model.width", "3")``; ``raw=True`` adds no arguments."""
    root = tmp_path / "runs"

    def call(
        *words: object,
        raw: bool = False,
        data: bool = True,
        model: str = TOY,
        name: str = "toy",
        wandb: str = "off",
        pictures: bool = False,
    ) -> Result:
        import callbacks.report
        import tests.cli.toy  # noqa: F401  (its classes are known by their short names, as those of callbacks/ are)
        from recipes._cli import run

        argv = [str(w) for w in words]
        if not raw:
            argv += ["--wandb", wandb]
            argv += ["--trainer.default_root_dir", str(root)] if "--trainer.default_root_dir" not in argv else []
            argv += ["--data", "ToyData"] if data and "--data" not in argv and "--ckpt_path" not in argv else []
            if argv[0] == "fit" and not {"--trainer.max_epochs", "--ckpt_path"} & set(argv):
                argv += ["--trainer.max_epochs", "1"]
            argv = _class_first(argv)
        monkeypatch.setattr(sys, "argv", ["toyrun.py", *argv])
        capsys.readouterr()
        with monkeypatch.context() as patched:
            if not pictures:  # drawing takes longer than training
                patched.setattr(callbacks.report, "save_figure", lambda *_: None)
            code = run(model, name, argv)
        out, err = capsys.readouterr()
        return Result(code, out, err, root)

    return call


def _class_first(argv: list[str]) -> list[str]:
    """With ``--data`` right after the verb: settings of a class come after the class."""
    if "--data" not in argv:
        return argv
    i = argv.index("--data")
    return [*argv[:1], *argv[i : i + 2], *argv[1:i], *argv[i + 2 :]]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Result]:
    """Run the toy recipe as a process of its own, as a user does."""

    def call(*words: object, timeout: float = 120) -> Result:
        root = tmp_path / "runs"
        argv = [sys.executable, "-m", "tests.cli.toyrun", *map(str, words)]
        done = subprocess.run(
            argv, cwd=HOME, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, env=os.environ
        )
        return Result(done.returncode, done.stdout, done.stderr, root)

    return call
