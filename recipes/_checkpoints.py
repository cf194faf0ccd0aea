"""Which checkpoint is meant, whether it is ours to open, and the settings it was trained with."""

from __future__ import annotations

import inspect
import io
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes._atomic import BEFORE

#: Settings of models of texts that come from the training split: the words, and how many examples each class has.
LEARNED = ("vocabulary", "class_counts")


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or of another recipe. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Damaged(CheckpointError):
    """A checkpoint that isn't whole. ``why`` says in a few words what is wrong with it."""

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file} is not a checkpoint that can be read ({why})")
        self.why = why


@dataclass
class Saved:
    """A checkpoint chosen by ``--ckpt_path``: its file and the settings of the run that wrote it."""

    file: Path
    settings: dict[str, Any] = field(default_factory=dict)
    #: What its model was given by the training data, and no other data may give it.
    learned: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    #: What is said where another checkpoint of the run had to be taken than the newest.
    warning: str = ""

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run it belongs to, if it is that run's last state: resuming goes on in that folder."""
        own = self.file.name.removesuffix(BEFORE) == "last.ckpt" or self.warning
        if not own or self.file.parent.name != "checkpoints":
            return None
        folder = self.file.parent.parent
        return folder if (folder / "config.yaml").is_file() else None


def _newest(files: list[Path]) -> Path | None:
    return max(files, key=lambda f: f.stat().st_mtime_ns, default=None)


def _present(folder: Path, pattern: str) -> list[Path]:
    """Checkpoints below a folder; one that stands aside only where a kill left nothing in its place."""
    aside = [f for f in folder.glob(pattern + BEFORE) if not f.with_name(f.name.removesuffix(BEFORE)).exists()]
    return [*folder.glob(pattern), *aside]


def _best_of(run: Path) -> Path | None:
    """The best checkpoint of a run; where several were kept, the one that its ``last.ckpt`` calls the best."""
    kept = _present(run / "checkpoints", "best*.ckpt")
    last = run / "checkpoints" / "last.ckpt"
    if len(kept) > 1 and last.exists():
        try:
            states = _load(last).get("callbacks", {})
        except Damaged:
            states = {}
        paths = [s["best_model_path"] for s in states.values() if isinstance(s, dict) and "best_model_path" in s]
        names = {Path(path).name for path in paths}
        kept = [f for f in kept if f.name in names] or kept
    return _newest(kept)


def find(wanted: str, root: Path, recipe: str) -> Path | None:
    """What ``--ckpt_path`` means: a file, or the folder of a checkpoint in shards.

    Args:
        wanted: ``last``, ``last?``, ``best`` or a path.
        root: the folder of all runs (``trainer.default_root_dir``).
        recipe: name of the recipe; runs lie in ``root/recipe``.

    Returns:
        The file; None only for ``last?`` with no checkpoint to go on from.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    runs = root / recipe
    if wanted in ("last", "last?"):
        file = _newest(_present(runs, "*/checkpoints/last.ckpt"))
    elif wanted == "best":
        newest = _newest(_present(runs, "*/checkpoints/best*.ckpt"))
        file = _best_of(newest.parent.parent) if newest else None
    else:
        file = Path(wanted).expanduser()
        if not file.is_file() and not (file / SHARDED).is_file():
            raise CheckpointError(f"there is no checkpoint {wanted}", "--ckpt_path takes last, last?, best or a file")
    if file is None and wanted != "last?":
        hint = "--ckpt_path last? starts afresh where there is none" if wanted == "last" else "train first: fit"
        raise CheckpointError(f"no run in {runs} has a '{wanted}' checkpoint", hint)
    return file


def find_and_read(wanted: str, root: Path, recipe: str, model: type, dotted: str, verb: str) -> Saved | None:
    """:func:`find`, then :func:`read`. Where the newest ``last`` isn't whole, the newest of its run that is whole.

    Checkpoints are written so that a killed run, a full disk or a dead machine leaves whole ones; if one isn't,
    something else was at work, so another is never taken without saying so, and one of another run never.
    """
    file = find(wanted, root, recipe)
    if file is None:
        return None
    try:
        return read(file, model, dotted, verb)
    except Damaged as damaged:
        if wanted not in ("last", "last?"):
            raise
        others = _present(file.parent, "best*.ckpt")
        for other in sorted(others, key=lambda f: f.stat().st_mtime_ns, reverse=True):
            try:
                saved = read(other, model, dotted, verb)
            except Damaged:
                continue
            saved.warning = (
                f"{file} can't be read ({damaged.why}); the newest whole checkpoint of that run is taken instead: "
                f"{other.name}, of step {saved.step}"
            )
            return saved
        hint = "no other checkpoint of that run is whole: name one with --ckpt_path FILE, or train anew without it"
        raise CheckpointError(str(damaged), hint) from damaged


# ---------------------------------------------------------------------- opening one

#: The file by which a folder is known as a checkpoint in shards, with everything that isn't a tensor.
SHARDED = "meta.pt"
#: What the list of a sharded checkpoint's tensors is made of. It is a pickle, and torch would run whatever is in it.
_LISTED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PureWindowsPath"),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "BytesStorageMetadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "TensorProperties._MEM_FORMAT_ENCODING",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Listing(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _LISTED
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")


def _check_shards(folder: Path) -> None:
    """Whether what torch will unpickle of a sharded checkpoint, beside tensors, is plain values."""
    with (folder / ".metadata").open("rb") as opened:
        listing = _Listing(opened).load()
    for index, place in listing.storage_data.items():
        if type(listing.state_dict_metadata[index.fqn]).__name__ != "BytesStorageMetadata":
            continue
        if getattr(place, "transform_descriptors", None):  # torch would undo them before it unpickles
            raise CheckpointError(f"{folder} can't be checked before it is opened: its entries are compressed")
        with (folder / place.relative_path).open("rb") as opened:
            opened.seek(place.offset)
            torch.load(io.BytesIO(opened.read(place.length)), weights_only=True, map_location="cpu")


def _load(file: Path) -> dict[str, Any]:
    """What a checkpoint holds; nothing in it is run, and what it holds is what was written.

    Raises:
        Damaged: if it isn't whole.
        CheckpointError: if it holds more than plain values and tensors, or something else.
    """
    sharded = file.is_dir()
    try:
        if sharded:
            _check_shards(file)
            checkpoint = torch.load(file / SHARDED, weights_only=True, map_location="cpu")
        else:
            if file.stat().st_size == 0:
                raise EOFError("it is empty")
            if not zipfile.is_zipfile(file):
                raise EOFError("its end is missing, or it is something else")
            checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
            with zipfile.ZipFile(file) as archive:  # torch doesn't compare the sums that it stores
                names, wrong = archive.namelist(), archive.testzip()
            if wrong is not None or len(set(names)) < len(names):
                raise EOFError(f"its {(wrong or 'data.pkl').rpartition('/')[2]} is not what was written")
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise Damaged(file, "it can't be unpickled") from error
        raise CheckpointError(
            f"{file} holds objects that torch will not load safely ({found[1]}): they could run code",
            "keep to numbers, strings, lists, dicts and tensors in save_hyperparameters() and state_dict()",
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        raise Damaged(file, str(error) if type(error) is EOFError and str(error) else type(error).__name__) from error
    if not isinstance(checkpoint, dict) or not (sharded or "state_dict" in checkpoint):
        raise CheckpointError(f"{file} is not a Lightning checkpoint: it holds no 'state_dict'")
    return checkpoint


def read(file: Path, model: type, dotted: str, verb: str) -> Saved:
    """Open a checkpoint for a recipe: its settings, checked to be this recipe's.

    Args:
        file: the checkpoint.
        model: class of the recipe's LightningModule.
        dotted: its dotted name.
        verb: what is to be done with it, for the hint.

    Raises:
        Damaged: if it isn't whole.
        CheckpointError: if it can't be read safely or belongs to another recipe.
    """
    checkpoint = _load(file)
    step = int(checkpoint.get("global_step", 0))
    stamp, given = checkpoint.get("recipe"), checkpoint.get("hyper_parameters", {})
    learned = {k: given[k] for k in LEARNED if k in given and "class_counts" in given}
    if isinstance(stamp, dict):
        if stamp["model"] != dotted:
            module = stamp["model"].rpartition(".")[0].removesuffix(".module")
            raise CheckpointError(
                f"{file} was saved by the recipe '{stamp['name']}' ({stamp['model']}), not by this one ({dotted})",
                f"python -m {module} {verb} --ckpt_path {file}",
            )
        return Saved(file, dict(stamp["config"]), learned, step)
    taken = inspect.signature(model).parameters
    values = {k: v for k, v in given.items() if not k.startswith("_")}
    alien = sorted(set(values) - set(taken))
    if alien and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise CheckpointError(
            f"{file} belongs to another model than {dotted}: that one has the setting '{alien[0]}', this one doesn't"
        )
    return Saved(file, {"model": values}, learned, step)
