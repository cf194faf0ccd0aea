"""Which checkpoint is meant, whether it is ours to open, and the settings it was trained with."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Settings of models of texts that come from the training split: the words, and how many examples each class has.
LEARNED = ("vocabulary", "class_counts")


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or of another recipe. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass
class Saved:
    """A checkpoint chosen by ``--ckpt_path``: its file and the settings of the run that wrote it."""

    file: Path
    settings: dict[str, Any] = field(default_factory=dict)
    #: What its model was given by the training data, and no other data may give it.
    learned: dict[str, Any] = field(default_factory=dict)

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run it belongs to, if it is that run's last state: resuming goes on in that folder."""
        if self.file.name == "last.ckpt" and self.file.parent.name == "checkpoints":
            folder = self.file.parent.parent
        elif self.file.name.startswith("hpc_ckpt_"):  # Lightning's own, at SLURM's requeue signal
            folder = self.file.parent
        else:
            return None
        return folder if (folder / "config.yaml").is_file() else None


def _newest(files: list[Path]) -> Path | None:
    return max(files, key=lambda f: f.stat().st_mtime_ns, default=None)


def _best_of(run: Path) -> Path | None:
    """The best checkpoint of a run; where several were kept, the one that its ``last.ckpt`` calls the best."""
    kept = list((run / "checkpoints").glob("best*.ckpt"))
    last = run / "checkpoints" / "last.ckpt"
    if len(kept) > 1 and last.is_file():
        states = torch.load(last, weights_only=True, map_location="cpu").get("callbacks", {})
        paths = [s["best_model_path"] for s in states.values() if isinstance(s, dict) and "best_model_path" in s]
        names = {Path(path).name for path in paths}
        kept = [f for f in kept if f.name in names] or kept
    return _newest(kept)


def find(wanted: str, root: Path, recipe: str) -> Path | None:
    """The file that ``--ckpt_path`` means.

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
        file = _newest([*runs.glob("*/checkpoints/last.ckpt"), *runs.glob("*/hpc_ckpt_*.ckpt")])
    elif wanted == "best":
        newest = _newest(list(runs.glob("*/checkpoints/best*.ckpt")))
        file = _best_of(newest.parent.parent) if newest else None
    else:
        file = Path(wanted).expanduser()
        if not file.is_file():
            raise CheckpointError(f"there is no checkpoint {wanted}", "--ckpt_path takes last, last?, best or a file")
    if file is None and wanted != "last?":
        hint = "--ckpt_path last? starts afresh where there is none" if wanted == "last" else "train first: fit"
        raise CheckpointError(f"no run in {runs} has a '{wanted}' checkpoint", hint)
    return file


def read(file: Path, model: type, dotted: str, verb: str) -> Saved:
    """Open a checkpoint for a recipe: its settings, checked to be this recipe's.

    Args:
        file: the checkpoint.
        model: class of the recipe's LightningModule.
        dotted: its dotted name.
        verb: what is to be done with it, for the hint.

    Raises:
        CheckpointError: if it can't be read safely or belongs to another recipe.
    """
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        last = str(error).strip().splitlines()[-1][:160] if str(error).strip() else "unknown"
        raise CheckpointError(
            f"{file} holds objects that torch will not load safely ({last})",
            "keep to numbers, strings, lists, dicts and tensors in save_hyperparameters() and state_dict()",
        ) from error
    except Exception as error:
        raise CheckpointError(f"{file} is not a checkpoint that can be read ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{file} is not a Lightning checkpoint: it holds no 'state_dict'")
    stamp, given = checkpoint.get("recipe"), checkpoint.get("hyper_parameters", {})
    learned = {k: given[k] for k in LEARNED if k in given and "class_counts" in given}
    if isinstance(stamp, dict):
        if stamp["model"] != dotted:
            module = stamp["model"].rpartition(".")[0].removesuffix(".module")
            raise CheckpointError(
                f"{file} was saved by the recipe '{stamp['name']}' ({stamp['model']}), not by this one ({dotted})",
                f"python -m {module} {verb} --ckpt_path {file}",
            )
        return Saved(file, dict(stamp["config"]), learned)
    taken = inspect.signature(model).parameters
    values = {k: v for k, v in given.items() if not k.startswith("_")}
    alien = sorted(set(values) - set(taken))
    if alien and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise CheckpointError(
            f"{file} belongs to another model than {dotted}: that one has the setting '{alien[0]}', this one doesn't"
        )
    return Saved(file, {"model": values}, learned)
