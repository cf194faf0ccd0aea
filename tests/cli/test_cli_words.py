"""What a user may type, and what is said where it can't be understood: one line, a hint, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Result, checkpoint, config

from recipes._cli import CONFIGS, with_own_configs

Run = Callable[..., Result]


def settings(result: Result) -> dict:
    assert result.code == 0, result.err
    return yaml.safe_load(result.out)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


# ---------------------------------------------------------------------- verbs


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("help",)])
def test_help_names_the_verbs(cli: Run, words: tuple[str, ...]) -> None:
    result = cli(*words, raw=True)
    assert result.code == 0 and result.err == ""
    for what in ("{fit,validate,test,predict}", "--print_config", "--ckpt_path last", "--wandb", "--debug"):
        assert what in result.out


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("fti",), "no command 'fti'", "did you mean 'fit'?"),
        (("tets", "--model.width", "3"), "no command 'tets'", "did you mean 'test'?"),
        (("qqq",), "no command 'qqq'", "the commands are fit, validate, test, predict"),
        (("--model.width", "3"), "no command given", "python -m recipes.toy fit --model.width 3"),
        (("--config", "x.yaml", "fti"), "no command 'fti'", "did you mean 'fit'?"),
    ],
)
def test_wrong_verb(cli: Run, words: tuple[str, ...], message: str, hint: str) -> None:
    result = cli(*words, raw=True)
    assert result.code == 2 and result.error_lines == [f"error: {message}"] and hint in result.err


@pytest.mark.parametrize(
    ("argv", "verb", "rest"),
    [
        (["fit"], "fit", []),
        (["--config", "x", "fit", "--a", "1"], "fit", ["--config", "x", "--a", "1"]),
        (["--config=x", "test"], "test", ["--config=x"]),
        (["--print_config", "fit"], "fit", ["--print_config"]),
        (["fit", "--trainer.logger.name", "test"], "fit", ["--trainer.logger.name", "test"]),
        (["--name", "test", "fit"], "fit", ["--name", "test"]),  # an option's value is no verb where there is another
        (["--fast", "fit"], "fit", ["--fast"]),
    ],
)
def test_the_verb_may_stand_anywhere(argv: list[str], verb: str, rest: list[str]) -> None:
    from recipes._cli import split_verb

    assert split_verb(argv) == (verb, rest, None)


def test_config_before_and_after_the_verb_are_the_same(cli: Run, file: Callable[[str, str], Path]) -> None:
    x = file("x.yaml", "model: {width: 5}\n")
    before = cli("--config", x, "fit", "--data", "ToyData", "--print_config", raw=True)
    after = cli("fit", "--config", x, "--data", "ToyData", "--print_config", raw=True)
    assert settings(before) == settings(after) and settings(after)["model"]["width"] == 5


# ---------------------------------------------------------------------- settings


def test_of_several_files_the_later_wins_and_flags_win_over_all(cli: Run, file: Callable[[str, str], Path]) -> None:
    a = file("a.yaml", "model: {width: 5, lr: 0.5}\ndata: {class_path: ToyData, init_args: {size: 48}}\n")
    b = file("b.yaml", "model: {width: 6, wait: 0.25}\n")
    found = settings(cli("fit", "--config", a, "--config", b, "--model.wait", 0.5, "--print_config", data=False))
    assert found["model"] == {"width": 6, "lr": 0.5, "wait": 0.5, "layer": "body"}
    found = settings(cli("fit", "--config", b, "--config", a, "--data.size", 40, "--print_config", data=False))
    assert found["model"]["width"] == 5 and found["model"]["wait"] == 0.25
    assert found["data"]["init_args"]["size"] == 40


def test_classes_are_known_by_their_short_names(cli: Run) -> None:
    found = settings(cli("fit", "--trainer.callbacks+=MixStyle", "--print_config"))
    assert found["data"]["class_path"] == "tests.cli.toy.ToyData"
    assert found["trainer"]["callbacks"][0]["class_path"].startswith("callbacks.")


def test_callbacks_are_stacked_cleared_and_merged(cli: Run, file: Callable[[str, str], Path]) -> None:
    first = file("first.yaml", "trainer: {callbacks: [{class_path: Noise, init_args: {sigma: 0.25}}]}\n")
    more = file("more.yaml", "trainer:\n  callbacks+: [{class_path: Noise, init_args: {sigma: 0.75}}]\n")

    def sigmas(*words: object) -> list[float]:
        callbacks = settings(cli("fit", *words, "--print_config"))["trainer"]["callbacks"]
        return [c["init_args"]["sigma"] for c in callbacks or []]

    added = ("--trainer.callbacks+=Noise", "--trainer.callbacks.sigma", 0.5)
    assert sigmas("--config", first) == [0.25]
    assert sigmas("--config", first, *added) == [0.25, 0.5]
    assert sigmas("--config", first, "--config", more) == [0.25, 0.75]
    assert sigmas("--config", first, "--config", first) == [0.25]
    assert sigmas("--config", first, "--trainer.callbacks", "null") == []
    assert sigmas("--config", first, *added, "--trainer.callbacks+=Noise") == [0.25, 0.5, 0.1]
    out = cli("fit", "--config", first, *added).out
    assert out.index("sigma is 0.25") < out.index("sigma is 0.5")  # and they run, in that order


def test_relative_interpolation_follows_flags(cli: Run, file: Callable[[str, str], Path]) -> None:
    c = file("c.yaml", "model: {width: '${..data.init_args.batch_size}'}\n")
    assert settings(cli("fit", "--config", c, "--print_config"))["model"]["width"] == 8
    assert settings(cli("fit", "--config", c, "--data.batch_size", 24, "--print_config"))["model"]["width"] == 24
    d = file("d.yaml", "model: {width: '${data.init_args.batch_size}'}\n")
    result = cli("fit", "--config", d)
    assert result.code == 2 and "Interpolation key" in result.error_lines[0] and "${..data" in result.err


def test_model_takes_its_classes_and_channels_from_the_data(cli: Run) -> None:
    result = cli("fit", "--data.num_classes", 7)
    hyper = checkpoint(result.run)["hyper_parameters"]
    assert hyper["num_classes"] == 7 and hyper["in_chans"] == 1 and hyper["class_names"][6] == "class 6"
    assert "num_classes" not in config(result.run)["model"]
    typed = cli("fit", "--model.num_classes", 7)
    assert typed.code == 2 and typed.error_lines == ["error: model.num_classes can't be set: it is taken from data"]


def test_default_config_is_used(cli: Run) -> None:
    result = cli("fit", "--print_config", raw=True, model="recipes.advstyle.module.DomainGeneralizer", name="advstyle")
    default = yaml.safe_load((Path(__file__).parents[2] / "configs/advstyle/default.yaml").read_text())
    found = settings(result)
    assert found["model"]["backbone"] == default["model"]["backbone"]
    assert found["data"]["class_path"].endswith(default["data"]["class_path"])
    assert found["trainer"]["max_epochs"] == default["trainer"]["max_epochs"]


# ---------------------------------------------------------------------- bad input

WRONG: list[tuple[list[str], str, str]] = [
    (["--model.wdith", "3"], "unknown: --model.wdith 3", "--model.wdith: did you mean --model.width?"),
    (["--trainer.max_epoch", "3"], "unknown: --trainer.max_epoch 3", "did you mean --trainer.max_epochs?"),
    (["--data", "ToyDaat"], "data: there is no class 'ToyDaat'", "ToyDaat: did you mean ToyData?"),
    (["--data", "EmojiDomain"], "data: there is no class 'EmojiDomain'", "did you mean EmojiDomains?"),
    (["--data", "torch.nn.Linear"], "data: 'torch.nn.Linear' is no LightningDataModule", ""),
    (["--data.batchsize", "3"], "data: ToyData has no setting 'batchsize'", "batchsize: did you mean batch_size?"),
    (["--data.batch_size", "x"], "data: ToyData: batch_size: expected int, got x", ""),
    (["--model.width", "a"], "model.width: expected int, got a", ""),
    (["--trainer.max_epochs", "a"], "trainer.max_epochs: expected int or null, got a", ""),
    (["--trainer.callbacks+=MixStile"], "trainer.callbacks: there is no class 'MixStile'", "did you mean MixStyle?"),
    (
        ["--trainer.callbacks+=Noise", "--trainer.callbacks.sgima", "3"],
        "trainer.callbacks: Noise has no setting 'sgima'",
        "sgima: did you mean sigma?",
    ),
    (
        ["--trainer.callbacks+=AdvStyle", "--trainer.callbacks.adv_weight", "x"],
        "trainer.callbacks: AdvStyle: adv_weight: expected float, got x",
        "",
    ),
    (
        ["--data", "EmojiDomains", "--data.concepts", "x"],
        "data: EmojiDomains: concepts: expected one of 'unseen', 'known', got x",
        "",
    ),
    (
        ["--data", "EmojiDomains", "--data.sources", "[notto]"],
        "there is no style 'notto'; there are: noto, twemoji, fluent, openmoji, fluent_mono",
        "",
    ),
    (["--model.layer", "x"], "there is no layer 'x'; the layers are: body, head", ""),
    (["--data.root", "/nope"], "/nope has no toys; get them at a toy shop", ""),
    (["--config", "nope.yaml"], "there is no file", ""),
    (["--wandb", "maybe"], "argument --wandb: expected auto, online, offline or off, got maybe", ""),
    (["--last_every_n_steps", "-1"], "last_every_n_steps must not be negative, but is -1", ""),
    (["extra"], "unknown: extra", ""),
    (["--checkpoint.monitor", "val/accc"], "could not find the monitored key", "traceback is in"),
    (["--trainer.accelerator", "gqu"], "gqu", "traceback is in"),
]


@pytest.mark.parametrize(("words", "message", "hint"), WRONG, ids=[" ".join(w) for w, _, _ in WRONG])
def test_bad_input_is_one_line_and_code_2(cli: Run, words: list[str], message: str, hint: str) -> None:
    wandb = words[1] if words[0] == "--wandb" else "off"
    result = cli("fit", *words, wandb=wandb)
    assert result.code == 2
    assert len(result.error_lines) == 1 and message in result.error_lines[0], result.err
    assert hint in result.err and "Traceback" not in result.err
    said = [line for line in result.err.splitlines() if not line.startswith(("error: ", "hint: "))]
    assert said == []


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("model: {wdith: 3}\n", "there is no setting 'model.wdith'", "did you mean model.width?"),
        ("moodel: {width: 3}\n", "there is no setting 'moodel.width'", "did you mean model.width?"),
        ("model: {width: many}\n", "model.width: expected int, got many", ""),
        ("model: [1, 2\n", "is not YAML: ", ""),
        ("just text\n", "holds no settings", ""),
        ("trainer: {logger: {class_path: WandLogger}}\n", "there is no class 'WandLogger'", "mean WandbLogger?"),
        (
            "trainer: {callbacks: [{class_path: Noise, init_args: {sgima: 3}}]}\n",
            "trainer.callbacks: Noise has no setting 'sgima'",
            "did you mean sigma?",
        ),
    ],
)
def test_bad_file_is_one_line_and_code_2(
    cli: Run, file: Callable[[str, str], Path], text: str, message: str, hint: str
) -> None:
    result = cli("fit", "--config", file("bad.yaml", text))
    assert result.code == 2
    assert len(result.error_lines) == 1 and message in result.error_lines[0], result.err
    assert hint in result.err and "Traceback" not in result.err


def test_without_data_the_line_lists_them(cli: Run) -> None:
    result = cli("fit", data=False)
    assert result.code == 2 and "EmojiDomains" in result.err


def test_debug_shows_the_traceback_and_keeps_the_code(cli: Run) -> None:
    for words, error in ((["--model.layer", "x"], "ValueError"), (["--model.width", "x"], "Got value: x")):
        result = cli("fit", *words, "--debug")
        assert result.code == 2 and "Traceback (most recent call last)" in result.err and error in result.err
        assert len(result.error_lines) == 1


def test_error_of_ours_has_code_1_and_its_traceback_in_the_log(cli: Run) -> None:
    result = cli("fit", "--trainer.callbacks", "Explode")
    assert result.code == 1 and result.error_lines == ["error: RuntimeError: boom"]
    assert f"hint: the traceback is in {result.run / 'run.log'}" in result.err and "Traceback" not in result.err
    assert "Traceback (most recent call last)" in (result.run / "run.log").read_text()


@pytest.mark.parametrize("package", ["callbacks", "datamodules"])
def test_shadowed_package_is_named(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = cli("fit", "--trainer.max_epochs", 1, raw=True)
    assert result.code == 2 and len(result.error_lines) == 1
    assert f"hides our package '{package}': {tmp_path / package}" in result.err and "recipes toy fit" in result.err
    (tmp_path / package / "__init__.py").unlink()  # a folder without it hides nothing
    assert cli("fti", raw=True).error_lines == ["error: no command 'fti'"]


def test_a_recipes_own_configs_go_by_name_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = str(CONFIGS / "advstyle" / "pacs.yaml")
    for words in (["--config", "pacs"], ["--config=pacs.yaml"], ["-c", "pacs.yaml"]):
        assert own in " ".join(with_own_configs("advstyle", ["--model.lr", "1", *words, "--debug"]))
    for words in (["--config", "nothing"], ["--config"], ["--config", "/x/pacs.yaml"], ["--model.name", "pacs"]):
        assert with_own_configs("advstyle", words) == words
    (tmp_path / "pacs").mkdir()  # a folder is no config
    assert with_own_configs("advstyle", ["--config", "pacs"]) == ["--config", own]
    (tmp_path / "pacs.yaml").write_text("model: {lr: 1}")
    assert with_own_configs("advstyle", ["--config", "pacs.yaml"]) == ["--config", "pacs.yaml"]


def test_flags_win_wherever_they_are_typed(cli: Run, tmp_path: Path) -> None:
    file, later = tmp_path / "file.yaml", tmp_path / "later.yaml"
    file.write_text("model: {lr: 0.3, wait: 0.1}\n")
    later.write_text("model: {wait: 0.2}\n")
    for words in (["--model.lr", 0.4, "--config", file], [f"--config={file}", "--model.lr", 0.4]):
        result = cli("fit", *words, "--config", later, "--print_config")
        assert yaml.safe_load(result.out)["model"]["lr"] == 0.4 and yaml.safe_load(result.out)["model"]["wait"] == 0.2
