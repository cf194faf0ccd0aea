"""What W&B's offline files of a run hold."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def records(file: Path) -> list[Any]:
    """The records of a ``.wandb`` file: a LevelDB log (blocks of 32 KiB, chunks of crc, length, type) of protobufs."""
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):  # cut off
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@dataclass
class Tracked:
    """One offline run."""

    file: Path
    id: str = ""
    group: str = ""
    kind: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    code: int | None = None

    @property
    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row}

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(optimizer step, value) of one metric, in the order it was logged."""
        return [(row["trainer/global_step"], row[key]) for row in self.rows if key in row]


def finished(file: Path, seconds: float = 30) -> list[Any]:
    """The records of a run that has ended: W&B's own process writes the last one a moment later."""
    end = time.monotonic() + seconds
    while "exit" not in {record.WhichOneof("record_type") for record in records(file)}:
        assert time.monotonic() < end, f"{file} has no end"
        time.sleep(0.1)
    return records(file)


def tracked(file: Path, ended: bool = True) -> Tracked:
    """An offline file; ``ended``: of a run that has."""
    run = Tracked(file)
    for record in finished(file) if ended else records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            of = record.run
            run.id, run.group, run.kind, run.name = of.run_id, of.run_group, of.job_type, of.display_name
            run.tags = list(of.tags)
        for part in (record.config, record.run.config):
            run.config |= {item.key: json.loads(item.value_json) for item in part.update}
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            run.rows.append({**items, "_step": record.history.step.num})
        if kind == "summary":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
            run.summary |= {key: json.loads(value) for key, value in items.items()}
        if kind == "artifact":
            run.artifacts.append(record.artifact)
        if kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact)
        if kind == "exit":
            run.code = record.exit.exit_code
    return run


def offline_files(run: Path) -> list[Path]:
    """Of a run folder, oldest first."""
    return sorted(run.glob("wandb/*run-*/*.wandb"), key=lambda f: f.parent.name.removeprefix("offline-"))
