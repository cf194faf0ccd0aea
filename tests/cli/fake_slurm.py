"""A SLURM of one machine: ``sbatch``, ``srun``, ``scontrol``, ``scancel`` and ``sacct`` as far as tests need them.

It is strict where it counts: options that SLURM doesn't know, or values it wouldn't take, are refused as SLURM does it.
:func:`install` puts the commands, and a ``python``, into a folder for the PATH; what happened is in its ``calls``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]
#: Long options of sbatch that are used here, and what SLURM takes for them; None: takes no value.
SBATCH = {
    "array": r"\d+(-\d+)?(%\d+)?",
    "comment": r".+",
    "cpus-per-task": r"\d+",
    "error": r".+",
    "gpus-per-node": r"\d+",
    "job-name": r"\S+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "open-mode": r"append|truncate",
    "output": r".+",
    "partition": r"\w+",
    "requeue": None,
    "signal": r"([RB]+:)?(SIG)?(USR1|USR2|TERM|INT)(@\d+)?",
    "time": r"\d+|(\d+-)?\d+:\d\d:\d\d",
    "wait": None,
    "wckey": r"\w+",
}
SRUN = {
    "cpus-per-task": r"\d+",
    "error": r".+",
    "kill-on-bad-exit": r"[01]",
    "ntasks": r"\d+",
    "output": r".+",
    "unbuffered": None,
}


def install(folder: Path) -> Path:
    """Make the commands; returns the folder to put on the PATH."""
    for name in ("bin", "calls", "jobs"):
        (folder / name).mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol", "scancel", "sacct", "python"):
        file = folder / "bin" / name
        words = shlex.join([sys.executable, str(HOME / "tests/cli/fake_slurm.py"), name, str(folder)])
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o755)
    return folder / "bin"


def calls(folder: Path, name: str) -> list[list[str]]:
    """The words of all calls of a command so far, in their order."""
    file = folder / "calls" / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def parse(command: str, known: dict[str, str | None], words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options before the first word that is none, and the rest; ends with SLURM's complaint if it doesn't know one."""
    found: dict[str, str] = {}
    words = list(words)
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).partition("=")
        name = name.removeprefix("--")
        if name not in known:
            raise SystemExit(f"{command}: unrecognized option '--{name}'")
        form = known[name]
        if form is not None:
            value = value if equals else words.pop(0)
            if not re.fullmatch(form, value):
                raise SystemExit(f"{command}: error: Invalid --{name} specification: {value}")
        elif equals and name != "requeue":
            raise SystemExit(f"{command}: option '--{name}' doesn't allow an argument")
        found[name] = value
    return found, words


def directives(script: Path) -> list[str]:
    """The options in a job script's head."""
    words: list[str] = []
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH"):
            words += shlex.split(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.startswith("#"):
            break
    return words


def _name(pattern: str, **values: str) -> Path:
    return Path(re.sub(r"%(\w)", lambda m: values.get(m[1], m[0]), pattern))


def sbatch(folder: Path, words: list[str]) -> int:
    typed, rest = parse("sbatch", SBATCH, words)
    script = Path(rest[0])
    written, none = parse("sbatch", SBATCH, directives(script))
    if none or not script.read_text().startswith("#!"):
        raise SystemExit("sbatch: error: This does not look like a batch script")
    number = 4242 + len(list((folder / "jobs").iterdir()))
    job = {"id": number, "options": {**written, **typed}, "words": rest, "folder": str(folder)}
    (folder / "jobs" / str(number)).write_text(json.dumps(job))
    print(f"Submitted batch job {number}", flush=True)
    if "wait" in typed:
        return run_job(folder, job)
    out = (folder / "jobs.log").open("a")
    subprocess.Popen(
        [sys.executable, __file__, "run-job", str(folder), str(number)],
        stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
    )  # fmt: skip
    return 0


def run_job(folder: Path, job: dict[str, Any]) -> int:
    """All tasks of an array, one after the other; each again as often as it is requeued."""
    options, number = job["options"], str(job["id"])
    first, _, last = options.get("array", "").partition("%")[0].partition("-")
    nodes, each = options.get("nodes", "1"), options.get("ntasks-per-node", "1")
    code = 0
    for task in range(int(first), int(last or first) + 1) if first else [None]:
        own = number if task is None else str(int(number) + 1000 + task)  # SLURM_JOB_ID differs from task to task
        name = number if task is None else f"{number}_{task}"
        environment = {**os.environ, "SLURM_JOB_ID": own, "SLURM_JOB_NAME": options.get("job-name", "script")}
        environment |= {"SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NTASKS_PER_NODE": each}
        environment |= {"SLURM_NTASKS": str(int(nodes) * int(each)), "SLURM_NODELIST": "localhost"}
        environment["SLURM_CPUS_PER_TASK"] = options.get("cpus-per-task", "1")
        if task is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task)}
        again = folder / f"requeue-{name}"
        for restart in range(5):
            environment |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
            log = _name(options.get("output", "slurm-%j.out"), j=own, A=number, a=str(task))
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as out:
                code = subprocess.run(
                    ["bash", *job["words"]], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
                ).returncode
            if not again.exists():
                break
            again.unlink()
        (folder / f"ended-{name}").write_text("COMPLETED" if code == 0 else "FAILED")
    return code


def srun(folder: Path, words: list[str]) -> int:
    options, command = parse("srun", SRUN, words)
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    ranks = []
    values = {"j": os.environ["SLURM_JOB_ID"], "A": os.environ.get("SLURM_ARRAY_JOB_ID", "")}
    values["a"] = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    for rank in range(int(options.get("ntasks", os.environ["SLURM_NTASKS"]))):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
        out = err = None
        if "output" in options:
            out = err = _name(options["output"], t=str(rank), **values).open("a")
        ranks.append(
            subprocess.Popen(
                command, env={**os.environ, **{k: str(v) for k, v in place.items()}}, stdout=out, stderr=err
            )
        )

    def to_all(signum: int, frame: object) -> None:
        for rank in ranks:
            rank.send_signal(signum)

    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, to_all)
    while any(rank.poll() is None for rank in ranks):
        if options.get("kill-on-bad-exit") == "1" and any(rank.returncode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    return max(rank.returncode if rank.returncode >= 0 else 128 - rank.returncode for rank in ranks)


def scontrol(folder: Path, words: list[str]) -> int:
    if len(words) != 2 or words[0] != "requeue" or not re.fullmatch(r"\d+(_\d+)?", words[1]):
        raise SystemExit(f"scontrol: invalid entity: {' '.join(words)}")
    if (folder / "refuse").exists():
        raise SystemExit((folder / "refuse").read_text())
    (folder / f"requeue-{words[1]}").touch()
    return 0


def sacct(folder: Path, words: list[str]) -> int:
    print("JobID|State|NodeList")
    for file in folder.glob("ended-*"):
        print(f"{file.name.removeprefix('ended-')}|{file.read_text()}|localhost")
    return 0


def python(folder: Path, words: list[str]) -> int:
    """Ours, which knows the toy as a recipe."""
    words = ["tests.cli.toyrun" if word == "recipes.toy" else word for word in words]
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    if command == "run-job":
        raise SystemExit(run_job(Path(place), json.loads((Path(place) / "jobs" / rest[0]).read_text())))
    with (Path(place) / "calls" / command).open("a") as calls_file:
        calls_file.write(json.dumps(rest) + "\n")
    if command == "scancel":
        raise SystemExit(0)
    raise SystemExit(globals()[command](Path(place), rest))
