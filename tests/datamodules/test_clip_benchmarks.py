"""CoOp's layouts on small trees: halves, few shots, sentences, and what is said where something is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules import clip_benchmarks as benchmarks
from datamodules.clip_benchmarks import (
    DTD,
    EmojiFewShot,
    EuroSAT,
    FewShotImageNet,
    FGVCAircraft,
    ImageNetA,
    ImageNetR,
    ImageNetSketch,
    ImageNetV2,
    Split,
    StanfordCars,
    few_shots,
    halves,
    read_sentences,
)

SMALL: dict[str, Any] = {"image_size": 16, "batch_size": 2}
SPLITS = [c for c in vars(benchmarks).values() if isinstance(c, type) and issubclass(c, Split) and c is not Split]
NAMES = ["forest", "river", "highway", "sea_lake", "pasture"]


def picture(file: Path, value: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (value, value, value)).save(file)


def tree(root: Path, cls: type[Split] = EuroSAT, each: int = 20, folder: str | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        for part, count in (("train", each), ("val", 6), ("test", 3)):
            for i in range(count):
                path = f"{name}/{part}{i}.jpg"
                picture(root / (folder or cls.images[0]) / path, 40 * label + 5)
                content[part].append([path, label, name])
    (root / cls.split_file).write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("cls", SPLITS, ids=lambda c: c.__name__)
def test_a_split_file_is_followed(cls: type[Split], tmp_path: Path) -> None:
    tree(tmp_path, cls)
    data = cls(str(tmp_path), shots=5, **SMALL)
    assert data.class_names == NAMES and data.class_texts[3] == "sea lake"
    assert data.domain_names == ["base", "novel"] and data.domain_classes == [[0, 1, 2], [3, 4]]
    train, val, test = (data.part(p) for p in ("train", "val", "test"))
    assert torch.bincount(train.entries["label"]).tolist() == [5, 5, 5]
    assert torch.bincount(val.entries["label"]).tolist() == [4] * 5
    assert torch.bincount(test.entries["label"]).tolist() == [3] * 5
    assert test.entries["domain"].tolist() == [0] * 9 + [1] * 6
    image = test[13]["image"]
    assert image.shape == (3, 16, 16) and abs(float(image.mean()) * 255 - 165) < 3
    assert "{}" in data.template and len(data.class_sentences["sea_lake"]) == 7
    assert data.class_sentences["sea_lake"][1] == "a bad photo of the sea lake."
    every = cls(str(tmp_path), shots=0, protocol="all", **SMALL)
    assert len(every.part("train")) == 100 and every.domain_names == ["all"]


def test_torchvisions_copy_serves_as_well(tmp_path: Path) -> None:
    tree(tmp_path, DTD, folder="dtd/dtd/images")
    assert len(DTD(str(tmp_path), **SMALL).part("test")) == 15


def test_torchvisions_cars_lie_below_a_folder_of_their_own(tmp_path: Path) -> None:
    tree(tmp_path, StanfordCars, folder="stanford_cars")
    assert len(StanfordCars(str(tmp_path), **SMALL).part("test")) == 15
    tree(tmp_path / "coop", StanfordCars, folder=".")
    assert len(StanfordCars(str(tmp_path / "coop"), **SMALL).part("test")) == 15


def test_classes_of_imagenet_that_are_called_alike_are_told_apart(tmp_path: Path) -> None:
    imagenet(tmp_path, "images/val")
    imagenet(tmp_path, "images/train")
    file = tmp_path / "classnames.txt"
    lines = file.read_text().splitlines()
    synsets = [line.split(" ", 1)[0] for line in lines]
    file.write_text("\n".join([f"{synsets[0]} sunglasses", f"{synsets[1]} sunglasses", *lines[2:]]))
    sentences = tmp_path / "sentences.json"
    names = ["sunglasses", *(line.split(" ", 1)[1] for line in lines[2:])]
    sentences.write_text(json.dumps({name: [f"{name} it is"] for name in names}))
    data = FewShotImageNet(str(tmp_path), shots=1, protocol="all", sentences=str(sentences), **SMALL)
    assert data.class_names == ["sunglasses (n01)", "cock", "sunglasses (n03)"]  # by synset
    assert data.class_texts == ["sunglasses", "cock", "sunglasses"]
    assert data.class_sentences["sunglasses (n03)"] == ["sunglasses it is"]


def test_there_are_eleven_datasets_and_four_variants() -> None:
    assert len(SPLITS) + len([FGVCAircraft, FewShotImageNet]) == 11
    assert all(issubclass(c, FewShotImageNet) for c in (ImageNetV2, ImageNetSketch, ImageNetA, ImageNetR))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 99))
def test_few_shots(labels: list[int], shots: int, seed: int) -> None:
    label = torch.tensor(labels)
    chosen = few_shots(label, shots, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    for each in set(labels):
        assert int((label[chosen] == each).sum()) == min(shots, labels.count(each))
    assert torch.equal(chosen, few_shots(label, shots, seed))
    base = label < 3  # the other classes don't change what is drawn of these
    alone = base.nonzero().squeeze(1)[few_shots(label[base], shots, seed)]
    assert set(alone.tolist()) == {i for i in chosen.tolist() if labels[i] < 3}


def test_another_seed_draws_others() -> None:
    label = torch.arange(10).repeat_interleave(50)
    assert len({tuple(few_shots(label, 4, seed).tolist()) for seed in range(5)}) == 5


@given(st.integers(2, 400))
def test_halves(classes: int) -> None:
    base, novel = halves(classes)
    assert base + novel == list(range(classes)) and len(base) == math.ceil(classes / 2)


def test_aircraft(tmp_path: Path) -> None:
    (tmp_path / "variants.txt").write_text("707-320\nA310\nSpitfire\n")
    for part in ("train", "val", "test"):
        (tmp_path / f"images_variant_{part}.txt").write_text(f"{part}1 A310\n{part}2 Spitfire\n{part}3 707-320\n")
        for i in (1, 2, 3):
            picture(tmp_path / "images" / f"{part}{i}.jpg")
    data = FGVCAircraft(str(tmp_path), **SMALL)
    assert data.part("test").entries["label"].tolist() == [1, 2, 0] and data.domain_classes == [[0, 1], [2]]
    assert sorted(data.part("train").entries["label"].tolist()) == [0, 1]
    (tmp_path / "images_variant_test.txt").write_text("x Concorde\n")
    with pytest.raises(ValueError, match="'Concorde' is not in variants.txt"):
        data.entries("test")


SYNSETS = {"n03": "tench", "n01": "great white shark", "n02": "cock"}


def imagenet(root: Path, *folders: str, names: tuple[str, ...] = ("n01", "n02", "n03"), each: int = 12) -> None:
    (root / "classnames.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classnames.txt").write_text("".join(f"{s} {n}\n" for s, n in SYNSETS.items()))
    for folder in folders:
        for number, name in enumerate(names):
            for i in range(each):
                picture(root / folder / name / f"{i:02}.jpeg", 30 * number)


def test_imagenet_and_its_variants(tmp_path: Path) -> None:
    imagenet(tmp_path / "one", "images/train", "images/val")
    data = FewShotImageNet(str(tmp_path / "one"), shots=5, protocol="all", **SMALL)
    assert data.class_names == ["great white shark", "cock", "tench"]
    parts = {p: {str(f) for f in data.part(p).files or []} for p in ("train", "val")}  # type: ignore[arg-type]
    assert [len(parts[p]) for p in ("train", "val")] == [15, 12] and not parts["train"] & parts["val"]
    assert len(data.part("test")) == 36
    imagenet(tmp_path / "v2", ImageNetV2.parts["test"] or "", names=("0", "1", "2"))
    two = ImageNetV2(str(tmp_path / "v2"), protocol="all", **SMALL)
    assert two.class_names == data.class_names and len(two.part("test")) == 36
    with pytest.raises(ValueError, match="to test on only"):
        two.part("train")
    for cls in (ImageNetSketch, ImageNetA, ImageNetR):
        root = tmp_path / cls.__name__
        imagenet(root, cls.parts["test"] or "", names=("n01", "n03"))
        variant = cls(str(root), protocol="all", **SMALL)
        assert variant.class_names == ["great white shark", "tench"]
        assert torch.bincount(variant.part("test").entries["label"]).tolist() == [12, 12]


# ---------------------------------------------------------------------- sentences


def test_sentences_of_a_file(tmp_path: Path) -> None:
    tree(tmp_path)
    file = tmp_path / "s.json"
    content = {"Forest": ["Trees.", "Green."], "RIVER": ["a", "b"], "highway": ["c", "d"], "sea lake": ["e", "f"]}
    file.write_text(json.dumps({**content, "Pasture": ["g", "h"], "another": ["x"]}))
    found = EuroSAT(str(tmp_path), sentences=str(file), **SMALL).class_sentences
    assert list(found) == NAMES and found["forest"] == ["Trees.", "Green."] and found["sea_lake"] == ["e", "f"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no sentences about pasture$"):
        read_sentences(file, NAMES)
    file.write_text(json.dumps({**content, "pasture": ["g"]}))
    with pytest.raises(ValueError, match="has 2 sentences about most classes, but of pasture 1"):
        read_sentences(file, NAMES)
    for text, words in (("[1]", "must hold"), ('{"a": "b"}', "must hold"), ('{"a": [""]}', "must hold"), ("{", "JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_sentences(file, NAMES)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_sentences(tmp_path / "none.json", NAMES)


# ---------------------------------------------------------------------- what is missing or wrong


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none is not there: EuroSAT expects 2750/.*get it by the steps"):
        EuroSAT(str(tmp_path / "none"), **SMALL)
    with pytest.raises(FileNotFoundError, match="split_zhou_EuroSAT.json is not there"):
        EuroSAT(str(tmp_path), **SMALL)
    content = tree(tmp_path)
    file = tmp_path / EuroSAT.split_file
    for broken, words in (
        ("{}", "no split file of CoOp's"),
        ("[", "no split file of CoOp's"),
        (json.dumps({**content, "val": [["a.jpg", 1, "forest"]]}), "class 1 is 'river' and 'forest'"),
        (json.dumps({**content, "val": [["a.jpg", 9, "moon"]]}), "labels must be 0 to 5"),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match=words):
            EuroSAT(str(tmp_path), **SMALL)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"shots": -1}, "shots must not"), ({"protocol": "some"}, "protocol must"), ({"image_size": 4}, "at least 8")],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    tree(tmp_path)
    with pytest.raises(ValueError, match=words):
        EuroSAT(str(tmp_path), **{**SMALL, **settings})


# ---------------------------------------------------------------------- embedded


def test_emoji_follow_the_protocol() -> None:
    data = EmojiFewShot(shots=5, seed=1)
    assert data.domain_classes == [list(range(9)), list(range(9, 17))] and data.domain_names == ["base", "novel"]
    train, val, test = (data.part(part) for part in ("train", "val", "test"))
    assert torch.bincount(train.entries["label"]).tolist() == [5] * 9
    assert max(torch.bincount(val.entries["label"]).tolist()) == 4 and set(val.entries["domain"].tolist()) == {0, 1}
    assert len(test) == 129 * 5 and set(test.entries["label"].tolist()) == set(range(17))
    assert ((test.entries["label"] >= 9).long() == test.entries["domain"]).all()
    other = EmojiFewShot(shots=5, seed=2).part("train")
    assert not torch.equal(other.images[:5], train.images[:5]), "another seed draws other shots"
    again = EmojiFewShot(shots=5, seed=1, protocol="all").part("train")
    of_base = again.entries["label"] < 9
    assert torch.equal(again.images[of_base], train.images), "base classes get the same shots in both protocols"
    assert {len(lines) for lines in data.class_sentences.values()} == {16}


def test_no_test_concept_is_trained_on() -> None:
    data = EmojiFewShot(shots=0)
    seen = {image.numpy().tobytes() for image in data.part("train").images}
    assert not any(image.numpy().tobytes() in seen for image in data.part("test").images)


@pytest.mark.parametrize(("settings", "words"), [({"shots": -1}, "shots"), ({"protocol": "some"}, "protocol must be")])
def test_bad_settings_of_emoji_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EmojiFewShot(**settings)
