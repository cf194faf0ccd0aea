"""What a run of both stages is compared with: plain training as long, in a process of its own."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
from typing import Any

import yaml

from recipes._cli import fail

#: Before Lightning adds to it where it launches ranks.
_ENVIRONMENT = dict(os.environ)


def compare() -> int:
    """After a run of both stages: train plainly with the same settings as long, and print both results.

    Returns:
        The exit code; 0 where there is nothing to compare.
    """
    app: Any = sys.modules.get("recipes._app")
    run = getattr(app, "finished", None)
    if run is None or run.verb != "fit" or run.temporary:
        return 0
    file = run.folder / "config.yaml"
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = settings["model"]
    ours = {k: v for k, v in run.results.items() if k.startswith("test/")}
    if model["stage"] != "both" or not model["compare"] or not ours:
        return 0
    from recipes._claim import ClaimError, last_values

    folder = run.folder / "plain"
    words = ["-m", "recipes.noise_mask", "fit", "--config", str(file), "--model.stage", "plain"]
    words += ["--trainer.default_root_dir", str(folder)]
    if int(_ENVIRONMENT.get("WORLD_SIZE", _ENVIRONMENT.get("SLURM_NTASKS", "1"))) > 1:
        print(f"for plain training as long, launch likewise: python {shlex.join(words)}")
        return 0
    print("now plain training as long, to compare with (--model.compare false leaves it out)", flush=True)
    safe = ["-P"] if getattr(sys.flags, "safe_path", False) else []
    free_accelerator()
    code = wait(subprocess.Popen([sys.executable, *safe, *words], env=_ENVIRONMENT))
    if code:
        return code
    try:
        plain = last_values(folder, list(ours))
    except ClaimError as error:
        return fail(str(error))
    rows = [(name, value, plain[name], value - plain[name]) for name, value in sorted(ours.items())]
    with (run.folder / "comparison.csv").open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerows([("metric", "heated and fine-tuned", "plain", "difference"), *rows])
    width = max(len(name) for name, *_ in rows)
    print(f"{'one seed':{width + 2}}  heated   plain  difference")
    for name, *values in rows:
        print(f"  {name:{width}}  {values[0]:6.4f}  {values[1]:6.4f}  {values[2]:+10.4f}")
    print("over five seeds and with controls: python -m recipes claim noise_mask")
    return 0


def free_accelerator() -> None:
    """Give back what the first training's allocator still holds: the second one needs as much."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a training of ours, which saves itself when it is told to stop.

    Ctrl-C reaches it as it does us, so we only wait; SIGTERM reaches us alone and is handed on.
    """
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
