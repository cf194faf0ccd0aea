"""What :func:`recipes._cli.run` does once torch is wanted: parse, build, train, report."""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import logging
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy

from recipes import _checkpoints, _errors, _renamed, _slurm
from recipes._atomic import AtomicTrainer
from recipes._cli import CONFIGS, fail
from recipes._loggers import MetricsCSV, start_wandb
from recipes._progress import Progress
from recipes._ranks import Ranks, Verdict, launched, verdict_of
from recipes._run import Run, SharedFolder, git_commit, quiet, rank, report, started_by_us
from recipes._stop import Interrupted, LastCheckpoint, Signals, SignalsInForce

log = logging.getLogger(__name__)
#: Settings that a model takes from the data, where its constructor has them.
LINKED = (
    "num_classes",
    "in_chans",
    "image_size",
    "class_names",
    "domain_names",
    "domain_classes",
    "class_texts",
    "class_sentences",
    "template",
    "vocabulary",
    "class_counts",
    "pairs",
    "vae",
)
#: "omegaconf" resolves each file alone; "omegaconf+" resolves after all files and flags are merged.
MODE = "omegaconf+"
#: Where our defaults differ from the Trainer's.
TRAINER = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the samplers are ours, cut by rank
}
#: The last run that ended well in this process, of the first rank; for what a recipe does after it.
finished: Run | None = None
#: Keys of a run's settings that belong to that one call and not to its checkpoint.
_OF_THE_CALL = ("config", "ckpt_path", "images", "texts", "classes", "return_predictions", "verbose", "weights_only")


def import_plugs() -> None:
    """Import every public module of callbacks/ and datamodules/, which makes their short class names known.

    A module that lacks an optional dependency is left out; its classes then fail by their full name, with the reason.
    """
    for package in ("callbacks", "datamodules"):
        try:
            root = importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            continue
        for module in pkgutil.iter_modules(root.__path__):
            if not module.name.startswith("_") and not (module.ispkg and package == "datamodules"):
                try:
                    importlib.import_module(f"{package}.{module.name}")
                except ModuleNotFoundError as error:
                    log.debug("%s.%s is left out: %s", package, module.name, error)


def _from_data(name: str, saved: dict[str, Any], data: LightningDataModule) -> Any:
    if name in saved:  # the words that the weights belong to, whatever training split is there now, if any
        if name == "vocabulary":
            data.use_vocabulary(saved[name])  # type: ignore[attr-defined]  # data of texts do
        return saved[name]
    try:
        return getattr(data, name)
    except AttributeError:
        raise ValueError(
            f"the model needs '{name}', and {type(data).__name__} has no such attribute; set it in its __init__"
        ) from None


def wandb_switch(value: str) -> str:
    """``auto``, ``online``, ``offline`` or ``off``; YAML reads a bare ``off`` as false."""
    value = {"false": "off", "no": "off", "true": "auto"}.get(str(value).lower(), str(value))
    if value not in ("auto", "online", "offline", "off"):
        raise argparse.ArgumentTypeError(f"expected auto, online, offline or off, got {value}")
    return value


def _ckpt_path(argv: list[str]) -> tuple[str | None, str | None]:
    """``ckpt_path`` and ``trainer.default_root_dir`` as typed, or as the last of the typed files says; None: neither.

    They have to be known before the settings are parsed: a checkpoint's own settings come before the typed ones.
    """
    found: dict[str, Any] = {}
    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if key in ("-c", "--config") and Path(value).is_file():
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ValueError(f"{value} is not YAML: {' '.join(str(error).split())}") from error
            if not isinstance(content, dict):
                raise ValueError(f"{value} holds no settings")
            if content:
                found |= {k: content[k] for k in ("ckpt_path",) if content.get(k)}
                trainer = content.get("trainer")
                if isinstance(trainer, dict) and trainer.get("default_root_dir"):
                    found["trainer.default_root_dir"] = trainer["default_root_dir"]
        elif key in ("--ckpt_path", "--trainer.default_root_dir") and value:
            found[key[2:]] = value
    path = found.get("ckpt_path")
    return (None if path in (None, "null") else str(path)), found.get("trainer.default_root_dir")


class RecipeCLI(LightningCLI):
    """Lightning's command line, with our folder, loggers, checkpoints and links.

    Args:
        model: class of the recipe.
        dotted: its dotted name.
        name: name of the recipe.
        verb: fit, validate, test or predict.
        argv: the arguments after the verb.
        signals: handlers of SIGINT and SIGTERM.
        debug: show the parser's tracebacks, too.
    """

    run_folder: Run | None = None
    ranks: Ranks | None = None
    #: Whether the same command, run again, goes on where this run stops.
    goes_on = False

    def __init__(
        self,
        model: type[LightningModule],
        dotted: str,
        name: str,
        verb: str,
        argv: list[str],
        signals: Signals,
        debug: bool,
    ) -> None:
        self._recipe, self._dotted, self._verb, self._signals = name, dotted, verb, signals
        self._saved: _checkpoints.Saved | None = None
        _renamed.check(argv, name)
        wanted, root = _ckpt_path(argv)
        if wanted:
            runs = Path(root or str(TRAINER["default_root_dir"]))
            self._saved = _checkpoints.find_and_read(wanted, runs, name, model, dotted, verb)
            if self._saved is not None and (done := _renamed.rename(self._saved.settings, name)):
                log.info(f"settings in {self._saved.file} that have another name now: {', '.join(done)}")
        parser = type("RecipeParser", (_errors.Parser,), {"debug": debug})
        default = CONFIGS / name / "default.yaml"
        files = [str(default)] if default.is_file() else []
        with (
            tempfile.NamedTemporaryFile("w", prefix=f"{name}-checkpoint-", suffix=".yaml") as settings,
            tempfile.NamedTemporaryFile("w", prefix=f"{name}-weights-", suffix=".yaml") as shaping,
        ):
            if self._saved is not None:  # above the defaults, below what is typed
                yaml.safe_dump(self._known(self._saved.settings, model, verb), settings, sort_keys=False)
                settings.flush()
                files.append(settings.name)
                if verb != "fit" and (shape := self._shape(model)):
                    yaml.safe_dump({"model": shape}, shaping)
                    shaping.flush()
                    place = 0  # behind the configs, which come first, and before the flags
                    while place < len(argv) and argv[place].partition("=")[0] in ("-c", "--config"):
                        place += 1 if "=" in argv[place] else 2
                    argv = [*argv[:place], "--config", shaping.name, *argv[place:]]
            super().__init__(
                model,
                LightningDataModule,
                subclass_mode_data=True,
                save_config_callback=None,
                parser_class=parser,
                parser_kwargs={
                    "parser_mode": MODE,
                    "prog": f"python -m recipes.{name}",
                    "allow_abbrev": False,
                    verb: {"parser_mode": MODE, "allow_abbrev": False, "default_config_files": files},
                },
                trainer_defaults=TRAINER,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=[verb, *argv],
            )

    def _shape(self, model: type[LightningModule]) -> dict[str, Any]:
        """Of a checkpoint's settings those without which its weights don't fit (the model's ``shaping``).

        A config that names another dataset to test on may set them, too; only flags are above the checkpoint then.
        """
        assert self._saved is not None
        saved = self._saved.settings.get("model")
        names = getattr(model, "shaping", ())
        return {k: saved[k] for k in names if k in saved} if isinstance(saved, dict) else {}

    def _known(self, settings: dict[str, Any], model: type[LightningModule], verb: str) -> dict[str, Any]:
        """A checkpoint's settings without those that this call doesn't have or takes from the data."""
        keep = {"seed_everything", "trainer", "model", "data", "wandb"}
        if verb == "fit":
            keep |= {"checkpoint", "test_after_fit", "last_every_n_steps"}
        kept = {key: value for key, value in settings.items() if key in keep and key not in _OF_THE_CALL}
        if isinstance(kept.get("model"), dict):
            kept["model"] = {k: v for k, v in kept["model"].items() if k not in LINKED}
        if isinstance(kept.get("trainer"), dict):
            # Runs stay where this call looks for them, and a checkpoint doesn't say that this call is a dry run.
            not_kept = ("default_root_dir", "fast_dev_run")
            kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k not in not_kept}
        return kept

    # ------------------------------------------------------------------ settings

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb that is wanted: each costs a second."""
        verbs = LightningCLI.subcommands()
        return {self._verb: verbs[self._verb] | {"weights_only", "verbose"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            if f"--model.{name}" in parser._option_string_actions:
                compute = functools.partial(_from_data, name, self._saved.learned if self._saved else {})
                parser.link_arguments("data", f"model.{name}", compute_fn=compute, apply_on="instantiate")
        parser.add_argument(
            "--wandb",
            type=wandb_switch,
            default="auto",
            help="W&B: auto is online with WANDB_MODE=online or a WANDB_API_KEY, else offline",
        )
        if self._verb == "predict":
            parser.add_argument(
                "--images",
                type=str | None,
                default=None,
                help="a folder of images and its subfolders, in place of the test data; writes predictions.csv",
            )
            parser.add_argument(
                "--texts",
                type=str | None,
                default=None,
                help="a file with a text in each line, in place of the test data; writes predictions.csv",
            )
            parser.add_argument(
                "--classes",
                type=str | None,
                default=None,
                help="names with commas, of recipes that take any: tells these classes apart; writes ranking.csv",
            )
        if self._verb != "fit":
            return
        parser.add_argument("--test_after_fit", type=bool, default=True, help="test with the last weights")
        parser.add_argument(
            "--last_every_n_steps", type=int, default=0, help="save last.ckpt within epochs, too, every so many steps"
        )
        skipped = {"dirpath", "save_last", "enable_version_counter"}
        parser.add_class_arguments(ModelCheckpoint, "checkpoint", skip=skipped, fail_untyped=False, instantiate=False)
        monitor, mode = getattr(self._model_class, "monitor", (None, "min"))
        ours = {"monitor": monitor, "mode": mode, "filename": "best", "auto_insert_metric_name": False}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in ours.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        if self._saved is not None:
            self.config[self._verb]["ckpt_path"] = str(self._saved.file)
        elif self.config[self._verb].get("ckpt_path"):  # last?, and there is none
            self.config[self._verb]["ckpt_path"] = None

    def _parse_ckpt_path(self) -> None:
        """Lightning's would put the checkpoint's settings above what was typed; ours are in already, below it."""

    # ------------------------------------------------------------------ the trainer

    def _settings(self) -> dict[str, Any]:
        """The resolved settings of this call, as plain values."""
        parser = self._parser(self._verb)
        text = parser.dump(self.config[self._verb], skip_none=False)
        return {k: v for k, v in yaml.safe_load(text).items() if k not in _OF_THE_CALL}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = {**dict(self._get(self.config_init, "trainer")), **kwargs}
        if config["strategy"] == "ModelParallelStrategy":  # Lightning has no short name for it; one file opens anywhere
            config["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        if isinstance(config["strategy"], ModelParallelStrategy):
            self._check_sharding()
        if found := re.match(r"(\w+?)_(spawn|fork|notebook)", str(config["strategy"])):
            wanted = str(config["strategy"]).replace(found[0], found[1], 1)
            raise ValueError(f"{found[0]} can't start the ranks of a recipe: use --trainer.strategy {wanted}")
        settings = self._settings()
        dry = bool(config["fast_dev_run"])
        resume = self._saved.run_folder if self._saved is not None and self._verb == "fit" and not dry else None
        run = Run.begin(self._recipe, self._verb, Path(config["default_root_dir"]), temporary=dry, resume=resume)
        self.run_folder = run
        if self._saved is not None and self._saved.warning:
            log.warning(self._saved.warning, extra={"console": rank() == 0})
        config["default_root_dir"] = str(run.folder)
        if rank() == 0 and not dry:
            commit = git_commit()
            head = f"# {self._recipe} {self._verb}, lightning {pl.__version__}, torch {torch.__version__}"
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            run.write_config(f"{head}{f', commit {commit}' if commit else ''}\n{text}")
        if dry:
            config["logger"] = False
        elif config["logger"] is None or config["logger"] is True:
            run.metrics = MetricsCSV(run.folder)
            wandb = start_wandb(run, settings.get("wandb") or "off", settings)
            config["logger"] = [run.metrics] + ([wandb] if wandb is not None else [])
        # Each rank has looked for it itself, and what a node sees of a shared folder may be some seconds old.
        saved = self._saved
        begins = f"begins with {saved.file} of step {saved.step}" if saved is not None else "begins with no checkpoint"
        self.ranks = Ranks(self._signals, functools.partial(_end_now, self), begins)
        config["callbacks"] = self._callbacks(config, run, settings, dry)
        trainer = AtomicTrainer(**config)
        self.ranks.follow(trainer)
        return trainer

    def _check_sharding(self) -> None:
        if "configure_model" not in _overridden(self.model):
            raise ValueError(
                f"the recipe {self._recipe} is not made for ModelParallelStrategy: use --trainer.strategy ddp"
            )
        if self._verb == "fit" and self._saved is not None:
            before = (self._saved.settings.get("trainer") or {}).get("strategy")
            # Lightning 2.6.6 takes an optimizer's numbers for those of all parameters, frozen ones too.
            if "ModelParallelStrategy" not in str(before):
                raise ValueError(
                    f"{self._saved.file} was saved by whole ranks, and ModelParallelStrategy would lose its "
                    f"optimizer's state: go on with --trainer.strategy {before or 'auto'}"
                )

    def _callbacks(self, config: dict[str, Any], run: Run, settings: dict[str, Any], dry: bool) -> list[Callback]:
        """Ours around the user's: the folder and the random streams first, the checkpoints last."""
        from callbacks.diagnostic import Diagnostic, check_names
        from callbacks.exact_resume import ExactResume
        from callbacks.nonfinite import StopOnNonFinite
        from callbacks.report import Report

        chosen = config["callbacks"] or []
        chosen = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
        # Diagnostics come behind techniques, which have left no trace by then; weights are averaged last, theirs too.
        chosen.sort(key=lambda c: 2 * isinstance(c, WeightAveraging) + isinstance(c, Diagnostic))
        check_names(chosen)
        has = {kind: any(isinstance(c, kind) for c in chosen) for kind in (ExactResume, Report, StopOnNonFinite)}
        assert self.ranks is not None
        result: list[Callback] = [self.ranks, SharedFolder(run), SignalsInForce(self._signals)]
        result += [] if has[ExactResume] else [ExactResume()]
        result += [] if has[Report] else [Report()]
        result += chosen
        result += [] if has[StopOnNonFinite] else [StopOnNonFinite()]
        monitor, _ = getattr(self._model_class, "monitor", (None, "min"))
        if config["enable_progress_bar"] is not False:
            result.append(Progress(monitor, terminal=sys.stdout.isatty()))
        if config["enable_checkpointing"] is False or dry or self._verb != "fit":
            config["enable_checkpointing"] = False
            return result
        own = dict(self._get(self.config_init, "checkpoint"))
        if own["monitor"] is not None:
            # One best.ckpt, also where a run that was killed after it was written is resumed from an older last.ckpt.
            own["enable_version_counter"] = own["save_top_k"] not in (0, 1)
            result.append(ModelCheckpoint(dirpath=run.checkpoints, save_last=False, **own))
        stamp = {"name": self._recipe, "model": self._dotted, "config": settings}
        every = self.config_init[self._verb]["last_every_n_steps"]
        result.append(LastCheckpoint(run.checkpoints, stamp, self._signals, every))
        return result

    # ------------------------------------------------------------------ verbs

    def fit(self, **arguments: Any) -> None:
        run, trainer = self.run_folder, self.trainer
        assert run is not None
        if arguments.get("ckpt_path"):
            log.info(f"goes on from {arguments['ckpt_path']}")
        log.info(self._headline())
        trainer.fit(weights_only=True, **arguments)
        if self._signals.received:  # after the last step: everything is saved
            raise Interrupted(self._signals.received, run.checkpoints / "last.ckpt")
        run.results |= _numbers(trainer)
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if best is not None and best.monitor and best.best_model_score is not None:
            run.results[f"best {best.monitor}"] = float(best.best_model_score)
        if best is not None and best.best_model_path and run.wandb is not None:
            score = {best.monitor: run.results.get(f"best {best.monitor}")} if best.monitor else {}
            metadata = {"recipe": self._recipe, "step": trainer.global_step, "epoch": trainer.current_epoch, **score}
            run.wandb.log_reference(f"{self._recipe}-{run.id}", Path(best.best_model_path), ["best"], metadata)
        can_test = "test_step" in _overridden(self.model) and "test_dataloader" in _overridden(self.datamodule)
        if self.config_init[self._verb]["test_after_fit"] and can_test:
            trainer.test(self.model, datamodule=self.datamodule, verbose=False, weights_only=True)
            run.results |= _numbers(trainer)

    def _evaluated(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if not arguments.get("ckpt_path"):
            log.warning("no --ckpt_path: these are the weights the model starts with")
        return {"weights_only": True, **arguments}

    def validate(self, **arguments: Any) -> None:
        self.trainer.validate(verbose=False, **self._evaluated(arguments))
        self.run_folder.results |= _numbers(self.trainer)  # type: ignore[union-attr]

    def test(self, **arguments: Any) -> None:
        self.trainer.test(verbose=False, **self._evaluated(arguments))
        self.run_folder.results |= _numbers(self.trainer)  # type: ignore[union-attr]

    def predict(self, **arguments: Any) -> None:
        run = self.run_folder
        assert run is not None
        folder = self.config_init[self._verb]["images"]
        if folder is not None:
            if not hasattr(self.datamodule, "predict_folder"):
                raise ValueError(f"{type(self.datamodule).__name__} can't read a folder of images: leave --images out")
            self.datamodule.predict_folder = Path(folder).expanduser()
        texts = self.config_init[self._verb]["texts"]
        if texts is not None:
            if not hasattr(self.datamodule, "predict_texts"):
                raise ValueError(f"{type(self.datamodule).__name__} can't read texts: leave --texts out")
            self.datamodule.predict_texts = Path(texts).expanduser()
        classes = self.config_init[self._verb]["classes"]
        if classes is not None:
            if folder is None:
                raise ValueError("--classes ranks classes for the images of a folder: give it with --images")
            if not hasattr(self.model, "set_classes"):
                name = type(self.model).__name__
                raise ValueError(f"{name} knows the classes it was trained on: leave --classes out")
            names = [name.strip() for name in classes.split(",") if name.strip()]
            if len(names) < 2:
                raise ValueError(f"--classes takes at least two names with commas between, not '{classes}'")
            self.model.set_classes(names)
        arguments["return_predictions"] = True
        if "predict_dataloader" in _overridden(self.model):  # it makes something, and needs no data for it
            if folder is not None:
                raise ValueError(f"{type(self.model).__name__} predicts nothing of images: leave --images out")
            arguments.pop("datamodule", None)
        found = self.trainer.predict(**self._evaluated(arguments))
        if found and not run.temporary:
            part = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
            if hasattr(self.model, "save_predictions"):
                for file in self.model.save_predictions(_join(found), run.folder, part):
                    log.info(f"predictions: {file}")
                return
            kind = "pt" if folder is None else "csv"
            file = run.folder / f"predictions{part}.{kind}"
            if folder is None:
                torch.save(_join(found), file)
            else:
                write_predictions(file, self.datamodule.files_to_predict(), _join(found), self.model)
                if classes is not None:
                    ranked = run.folder / f"ranking{part}.csv"
                    write_ranking(ranked, self.datamodule.files_to_predict(), _join(found), self.model)
                    log.info(f"ranking: {run.folder / 'ranking-*.csv' if part else ranked}")
            log.info(f"predictions: {run.folder / f'predictions-*.{kind}' if part else file}")

    def _headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        size = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
        trainer = self.trainer
        ranks = f", {trainer.world_size} ranks" if trainer.world_size > 1 else ""
        where = f"{type(trainer.accelerator).__name__.removesuffix('Accelerator').lower()}{ranks}"
        model, data = type(self.model).__name__, type(self.datamodule).__name__
        return f"{self._recipe}: {model}, {size} parameters, {data}, {where}"


def _overridden(thing: object) -> set[str]:
    """Methods of a Lightning object that its class defines itself."""
    base = LightningModule if isinstance(thing, LightningModule) else LightningDataModule
    return {n for n in dir(base) if getattr(type(thing), n, None) is not getattr(base, n, None)}


def _numbers(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _join(batches: list[Any]) -> Any:
    """The predictions of all batches as one: dicts of tensors are joined along the first axis, others stay a list."""
    if all(isinstance(b, dict) for b in batches):
        tensors = [k for k, v in batches[0].items() if isinstance(v, torch.Tensor)]
        return {k: torch.cat([b[k].cpu() for b in batches]) for k in tensors}
    if all(isinstance(b, torch.Tensor) for b in batches):
        return torch.cat([b.cpu() for b in batches])
    return batches


def write_predictions(file: Path, images: list[Path], found: Any, model: Any) -> None:
    """A table: file, class, confidence and, where the recipe tried an attack, whether the answer holds.

    Raises:
        ValueError: if the recipe doesn't predict classes.
    """
    if not isinstance(found, dict) or not {"index", "probability", "prediction"} <= found.keys():
        raise ValueError(f"{type(model).__name__} predicts no classes of images: leave --images out")
    names = list(getattr(model, "class_names", []))
    with file.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        rows.writerow(["file", "class", "confidence", *(["holds"] if "holds" in found else [])])
        for i, (index, answer) in enumerate(zip(found["index"].tolist(), found["prediction"].tolist(), strict=True)):
            name = names[answer] if answer < len(names) else str(answer)
            row = [str(images[index]), name, f"{float(found['probability'][i, answer]):.4f}"]
            rows.writerow([*row, *(["yes" if found["holds"][i] else "no"] if "holds" in found else [])])


def write_ranking(file: Path, images: list[Path], found: Any, model: Any) -> None:
    """A table: file, rank, class, confidence; all classes of each image, the most likely first."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        rows.writerow(["file", "rank", "class", "confidence"])
        for index, shares in zip(found["index"].tolist(), found["probability"], strict=True):
            order = shares.argsort(descending=True).tolist()
            for rank_, answer in enumerate(order, 1):
                rows.writerow([str(images[index]), rank_, model.class_names[answer], f"{float(shares[answer]):.4f}"])


def execute(model: str, name: str, verb: str, argv: list[str], *, debug: bool = False) -> int:
    """Run one verb of a recipe; the arguments are those of :func:`recipes._cli.run`, which is what to call.

    Returns:
        The exit code.
    """
    global finished
    finished = None
    cli = RecipeCLI.__new__(RecipeCLI)  # known here before its constructor, which does everything, has returned
    code = 1
    ours = launched(functools.partial(_end_now, cli), lambda: cli.ranks is not None and cli.ranks.connected)
    with quiet(), Signals() as signals, ours:
        try:
            cli.goes_on = verb == "fit" and _ckpt_path(argv)[0] in ("last", "last?")
            import_plugs()
            module, _, cls = model.rpartition(".")
            cli.__init__(getattr(importlib.import_module(module), cls), model, name, verb, argv, signals, debug)  # type: ignore[misc]
            assert cli.run_folder is not None
            report(cli.run_folder)
            finished = cli.run_folder if rank() == 0 else None
            code = 0
        except SystemExit as end:  # of the parser: help, or bad input that is said already
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Interrupted as stop:
            code = _interrupted(cli, stop, name)
        except Exception as error:
            if debug:
                traceback.print_exception(error)
            code = _failed(cli, error)
        finally:
            try:
                code = _end(cli, code)
            except Interrupted as stop:  # no second one comes
                code = _end(cli, stop.code)
    if code:
        finished = None
    return code


def _interrupted(cli: RecipeCLI, stop: Interrupted, name: str) -> int:
    verdict = cli.ranks.agreed() if cli.ranks is not None else None
    if verdict is not None and verdict.weight > 0:  # a launcher that saw another rank fail has sent the signal
        return _said(cli, verdict)
    trainer = getattr(cli, "trainer", None)
    requeue = stop.signum == getattr(signal, "SIGUSR1", None)
    if rank() != 0:
        # Lightning kills the first rank when one that it started ends with another code than 0, and srun may do so
        # (--kill-on-bad-exit) before the first rank has asked for the requeue.
        return 0 if started_by_us() or requeue else stop.code
    if stop.saved is not None and trainer is not None:
        log.info(f"stopped by {stop} at step {trainer.global_step}; saved {stop.saved}")
        if not requeue:
            log.info(f"go on with: python -m recipes.{name} fit --ckpt_path last")
    else:
        log.info(f"stopped by {stop}; nothing to save")
    if requeue:
        _requeue(cli)
    return stop.code


def _requeue(cli: RecipeCLI) -> None:
    """Ask SLURM to start this job again; it may end this process as soon as it is asked."""
    run = cli.run_folder
    saved = run is not None and (run.checkpoints / "last.ckpt").exists()
    goes_on = cli.goes_on and not (run is not None and run.temporary)
    if why := _slurm.why_not(getattr(cli, "trainer", None), goes_on, saved):
        log.warning(f"the job isn't requeued: {why}")
        return
    if cli.ranks is not None:  # no other rank waits for what SLURM says
        cli.ranks.end()
    if run is not None and run.wandb is not None:  # SLURM ends W&B's process, too, with what it hasn't written
        run.wandb.close(128 + signal.SIGUSR1, 15.0)
    _slurm.requeue()


def _failed(cli: RecipeCLI, error: Exception) -> int:
    own = verdict_of(rank(), error)
    if cli.ranks is not None and cli.ranks.connected:
        cli.ranks.tell(own)
        verdict = cli.ranks.agreed()
        if verdict is not None:
            return _said(cli, verdict)
    if not (started_by_us() and cli.run_folder is not None and _said_by_first_rank(cli.run_folder, own.line)):
        _say(cli, own)
    return own.code


def _where(cli: RecipeCLI) -> str:
    run = cli.run_folder
    logged = run is not None and not run.temporary and run.folder.is_dir() and rank() == 0
    return f"the traceback is in {run.folder / 'run.log'}" if run and logged else "--debug shows the traceback"


def _said(cli: RecipeCLI, verdict: Verdict) -> int:
    """Say, in one rank and once, why all of them end."""
    assert cli.ranks is not None
    if cli.ranks.says(verdict):
        _say(cli, verdict)
    return verdict.code


def _say(cli: RecipeCLI, verdict: Verdict) -> None:
    log.error("rank %d: %s\n%s", verdict.rank, verdict.line, verdict.trace, extra={"console": False})
    who = f" (rank {verdict.rank})" if verdict.rank and verdict.trace else ""
    fail(f"{verdict.line}{who}", *verdict.hints, *([_where(cli)] if verdict.trace and not verdict.plain else []))


def _end_now(cli: RecipeCLI, verdict: Verdict) -> None:
    """In a rank whose main thread waits for one that failed: say why, save the metrics, leave nothing running."""
    if cli.ranks is not None:
        _said(cli, verdict)
    else:
        fail(verdict.line, *verdict.hints)
    if cli.run_folder is not None and cli.run_folder.metrics is not None:
        cli.run_folder.metrics.save()
    _end(cli, verdict.code)
    sys.stdout.flush()
    sys.stderr.flush()


def _said_by_first_rank(run: Run, message: str, seconds: float = 2.0) -> bool:
    """Whether the first rank fails for the same reason, as it does where all ranks read the same bad input."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        file = run.folder / "run.log"
        if file.is_file() and message in file.read_text(encoding="utf-8"):
            return True
        time.sleep(0.1)
    return False


def _end(cli: RecipeCLI, code: int) -> int:
    """Leave nothing running: the ranks that Lightning started, W&B, the log file.

    Returns:
        The exit code: also of a run that ended well here, but not in another of its ranks.
    """
    told = cli.ranks.end() if cli.ranks is not None else None
    if told is not None and told.code < 128 and (code == 0 or told.weight > 0):
        code = _said(cli, told)
    strategy: Any = getattr(getattr(cli, "trainer", None), "strategy", None)
    well = code == 0
    for number, process in enumerate(getattr(getattr(strategy, "launcher", None), "procs", []), 1):
        try:
            ended = process.wait(30 if well else 3)  # after an error it may be stuck, waiting for this rank
            problem = f"ended with {ended}" if ended not in (0, 1, 2) else ""  # 1 and 2: it has said why
        except subprocess.TimeoutExpired:
            process.kill()
            ended, problem = 1, "still ran half a minute later, and was killed"
        if well and ended:
            code = 1
            if problem:
                fail(f"the first rank ended well, but rank {strategy.global_rank + number} {problem}")
    if cli.run_folder is not None:
        cli.run_folder.end(code)
    return code
