"""The benchmarks' loaders on small trees of the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import datamodules
from datamodules import MSMT17, PACS, VLCS, DigitsDG, DomainNet, Market1501, MiniDomainNet, OfficeHome
from datamodules.domains import DomainBenchmark

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 2}


def picture(file: Path, value: int = 100, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (10, 12), value if mode in ("L", "P") else (value,) * len(mode)).save(file)


def listed(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def pacs(root: Path) -> None:
    for domain in PACS.domains:
        train, crossval = [], []
        for number, name in enumerate(PACS.classes, 1):
            for i in range(3):
                path = f"{domain}/{name}/{i}.jpg"
                picture(root / "kfold" / path, 10 * number)
                (crossval if i == 2 else train).append(f"{path} {number}")
        if domain == "sketch":
            train.append(f"{PACS.faulty} 1")  # it needn't be there
        listed(root / "splits" / f"{domain}_train_kfold.txt", train)
        listed(root / "splits" / f"{domain}_crossval_kfold.txt", crossval)
        listed(root / "splits" / f"{domain}_test_kfold.txt", train + crossval)


def folders(root: Path, cls: type[DomainBenchmark], parts: tuple[str, ...], names: list[str], each: int = 2) -> None:
    for domain in cls.domains:
        for part in parts:
            for number, name in enumerate(names):
                for i in range(each):
                    picture(root / domain / part / name / f"{part}{i}.jpg", number)


def domainnet(root: Path, cls: type[DomainNet], splits: str) -> None:
    for domain in cls.domains:
        for part, count in (("train", 2), ("test", 1)):
            lines = []
            for number in (0, 1, cls.counts and len(cls.classes) - 1):
                for i in range(count):
                    path = f"{domain}/class_{number:03}/{part}{i}.jpg"
                    picture(root / path, 50)
                    lines.append(f"{path} {number}")
            listed(root / splits / f"{domain}_{part}.txt", lines)


BUILD: dict[type[DomainBenchmark], Any] = {
    PACS: (pacs, {"photo": 21, "art_painting": 21, "cartoon": 21, "sketch": 22}),
    VLCS: (lambda root: folders(root, VLCS, ("train", "crossval", "test"), list("01234")), {}),
    OfficeHome: (
        lambda root: folders(root, OfficeHome, (".",), list(OfficeHome.classes), 10),
        dict.fromkeys(OfficeHome.domains, 650),
    ),
    DigitsDG: (
        lambda root: folders(root, DigitsDG, ("train", "val"), list("0123456789")),
        dict.fromkeys(DigitsDG.domains, 40),
    ),
    DomainNet: (lambda root: domainnet(root, DomainNet, "splits"), dict.fromkeys(DomainNet.domains, 9)),
    MiniDomainNet: (
        lambda root: domainnet(root, MiniDomainNet, "splits_mini"),
        dict.fromkeys(MiniDomainNet.domains, 9),
    ),
}
PUBLISHED = {PACS: 9991, OfficeHome: 15588, DigitsDG: 24000, DomainNet: 586575, MiniDomainNet: 140006}
every = pytest.mark.parametrize("cls", BUILD, ids=lambda c: c.__name__)


@pytest.fixture
def tree(cls: type[DomainBenchmark], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build, counts = BUILD[cls]
    build(tmp_path)
    monkeypatch.setattr(cls, "counts", counts)
    return tmp_path


def parts(data: DomainBenchmark) -> dict[str, set[str]]:
    found = {}
    for part in ("train", "val", "test"):
        files = data.part(part).files  # type: ignore[arg-type]
        assert files is not None and len(set(files)) == len(files)
        found[part] = {str(f) for f in files}
    return found


@pytest.mark.parametrize(("cls", "total"), PUBLISHED.items(), ids=lambda v: getattr(v, "__name__", v))
def test_the_counts_add_to_the_published_total(cls: type[DomainBenchmark], total: int) -> None:
    assert sum(cls.counts.values()) == total and set(cls.counts) == set(cls.domains)


@every
def test_sources_and_targets_and_what_is_known_before_reading(cls: type[DomainBenchmark], tree: Path) -> None:
    data = cls("/nowhere", **SMALL)
    assert data.num_classes == len(data.class_names) == len(set(data.class_names)) and data.in_chans == 3
    assert data.domain_names == list(cls.domains) and data.image_size == 8
    one = cls(str(tree), **SMALL)
    found = parts(one)
    assert found["train"] and found["val"] and not found["train"] & found["val"]
    assert one.part("train").entries["domain"].unique().tolist() == [0]
    assert one.part("test").entries["domain"].unique().tolist() == list(range(1, len(cls.domains)))
    out = cls(str(tree), sources=cls.domains[1:], targets=cls.domains[:1], **SMALL)  # leave one domain out
    assert out.part("test").entries["domain"].unique().tolist() == [0]
    assert len(parts(out)["train"]) == pytest.approx(len(found["train"]) * (len(cls.domains) - 1), abs=1)
    batch = next(iter(out.train_dataloader()))
    assert batch["image"].shape == (2, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["domain"].dtype == batch["index"].dtype == torch.int64
    assert cls.counts is BUILD[cls][1]


@every
def test_labels_follow_the_release(cls: type[DomainBenchmark], tree: Path) -> None:
    examples = cls(str(tree), **SMALL).part("train")
    assert examples.files is not None
    for file, label in zip(examples.files, examples.entries["label"].tolist(), strict=True):
        name = file.parent.name
        assert name == (
            f"class_{label:03}" if name.startswith("class_") else cls.classes[label] if cls is not VLCS else str(label)
        )


@every
def test_an_incomplete_download_is_named(
    cls: type[DomainBenchmark], tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cls.counts:
        monkeypatch.setattr(cls, "counts", {cls.domains[0]: 999})
        with pytest.raises(ValueError, match=rf"{cls.__name__} has 999 images of '{cls.domains[0]}', but \d+ are in"):
            cls(str(tree), **SMALL).part("train")
    else:
        (tree / "PASCAL" / "train" / "0").rename(tree / "elsewhere")
        with pytest.raises(ValueError, match="has 4 folders, but VLCS has 5 classes"):
            cls(str(tree), **SMALL).part("train")


@every
def test_a_missing_dataset_says_the_layout_and_where_to_get_it(cls: type[DomainBenchmark], tmp_path: Path) -> None:
    for root in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            cls(str(root), **SMALL).part("train")
        text = str(error.value)
        assert str(root) in text and cls.layout in text and cls.source in text and "\n" not in text


@every
def test_domains_that_cannot_be_are_refused(cls: type[DomainBenchmark]) -> None:
    with pytest.raises(ValueError, match=f"no domain 'moon'; there are: {cls.domains[0]}, {cls.domains[1]}"):
        cls(".", sources=["moon"], **SMALL)
    with pytest.raises(ValueError, match="source and target"):
        cls(".", sources=[cls.domains[0]], targets=[cls.domains[0]], **SMALL)
    with pytest.raises(ValueError, match="at least one of"):
        cls(".", sources=[], **SMALL)


def test_pacs_leaves_the_faulty_image_out_and_tests_on_all_of_a_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacs(tmp_path)
    monkeypatch.setattr(PACS, "counts", BUILD[PACS][1])
    data = PACS(str(tmp_path), sources=["sketch"], targets=["photo"], **SMALL)
    assert (len(data.part("train")), len(data.part("val")), len(data.part("test"))) == (14, 7, 21)
    (tmp_path / "kfold").rename(tmp_path / "images")  # Dassl's name for the folder
    assert len(PACS(str(tmp_path), **SMALL).part("train")) == 14


def test_office_home_holds_out_the_same_tenth_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, OfficeHome, (".",), list(OfficeHome.classes), 10)
    monkeypatch.setattr(OfficeHome, "counts", {})
    first, second = (OfficeHome(str(tmp_path), seed=seed, **SMALL) for seed in (1, 2))
    assert torch.bincount(first.part("val").entries["label"]).tolist() == [1] * 65
    assert first.part("val").files == second.part("val").files
    assert len(first.part("train")) == 9 * 65


def test_a_corrupt_image_is_named_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pacs(tmp_path)
    monkeypatch.setattr(PACS, "counts", BUILD[PACS][1])
    bad = tmp_path / "kfold" / "photo" / "dog" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    for memory in (4.0, 0.0):
        data = PACS(str(tmp_path), memory_gb=memory, **SMALL)
        with pytest.raises(ValueError, match=rf"{bad} can't be read as an image .*--data.on_corrupt skip"):
            list(data.train_dataloader())
        caplog.clear()
        rest = PACS(str(tmp_path), memory_gb=memory, on_corrupt="skip", **SMALL)
        labels = torch.cat([batch["label"] for batch in rest.train_dataloader()])
        assert len(rest.part("train")) == 13 and len(labels) == 12
        assert rest.part("train").entries["label"].tolist().count(0) == 1
        assert f"left out 1 files that can't be read as images: {bad}" in caplog.text


def test_on_disk_and_in_memory_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pacs(tmp_path)
    monkeypatch.setattr(PACS, "counts", BUILD[PACS][1])
    kept, read = (PACS(str(tmp_path), memory_gb=m, seed=3, **SMALL) for m in (4.0, 0.0))
    assert kept.part("train").images is not None and read.part("train").images is None
    for a, b in zip(kept.train_dataloader(), read.train_dataloader(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------- retrieval


def market(root: Path) -> dict[str, int]:
    base = root / "Market-1501-v15.09.15"
    for person in (2, 7, 11):
        for i in range(10):
            picture(base / "bounding_box_train" / f"{person:04}_c{i % 6 + 1}s1_0000{i}_00.jpg", person)
    for person in (3, 4):
        picture(base / "query" / f"{person:04}_c1s1_000001_00.jpg")
        for camera in (1, 2):
            picture(base / "bounding_box_test" / f"{person:04}_c{camera}s1_000009_01.jpg")
    picture(base / "bounding_box_test" / "0000_c3s1_000009_01.jpg")
    picture(base / "bounding_box_test" / "-1_c3s1_000009_01.jpg")
    (base / "bounding_box_test" / "Thumbs.db").write_text("")
    return {"train": 30, "query": 2, "gallery": 5, "persons": 3}


def msmt(root: Path, edition: str = "MSMT17_V1", train: str = "train", test: str = "test") -> dict[str, int]:
    base = root / edition
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}
    for person in (0, 1):
        for i in range(4):
            path = f"{person:04}/{person:04}_{i:03}_{i + 1:02}_0303morning_0015_0.jpg"
            picture(base / train / path)
            lists["val" if i == 3 else "train"].append(f"{path} {person}")
            picture(base / test / path)
            lists["query" if i == 0 else "gallery"].append(f"{path} {person}")
    for name, lines in lists.items():
        listed(base / f"list_{name}.txt", lines)
    return {"train": 6, "query": 2, "gallery": 6, "persons": 2}


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    counts = {"market1501": market(tmp_path), "msmt17": msmt(tmp_path)}
    for cls in (Market1501, MSMT17):
        monkeypatch.setattr(cls, "counts", counts)
    return tmp_path


def test_market_trains_on_relabelled_persons_and_leaves_junk_out(people: Path) -> None:
    data = Market1501(str(people), image_size=16)
    assert data.num_classes == 3 and data.image_size == 16
    train, val = data.part("train"), data.part("val")
    assert torch.bincount(train.entries["label"]).tolist() == [9, 9, 9]
    assert torch.bincount(val.entries["label"]).tolist() == [1, 1, 1]
    assert not set(train.files or []) & set(val.files or [])
    [batch] = data.test_dataloader()
    assert batch["image"].shape == (7, 3, 16, 8)
    assert batch["query"].tolist() == [True] * 2 + [False] * 5
    assert batch["label"][batch["query"]].tolist() == [3, 4]
    assert sorted(batch["label"][~batch["query"]].tolist()) == [0, 3, 3, 4, 4]
    assert batch["camera"].min() == 0 and batch["domain"].unique().tolist() == [0]


@pytest.mark.parametrize("edition", [("MSMT17_V1", "train", "test"), ("MSMT17_V2", "mask_train_v2", "mask_test_v2")])
def test_msmt_by_its_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edition: tuple[str, str, str]) -> None:
    monkeypatch.setattr(MSMT17, "counts", {"msmt17": msmt(tmp_path, *edition)})
    data = MSMT17(str(tmp_path), image_size=16)
    assert len(data.part("train")) == 6 and data.part("train").entries["camera"].tolist() == [0, 1, 2, 0, 1, 2]
    [batch] = data.test_dataloader()
    assert batch["query"].sum() == 2 and len(batch["query"]) == 8 and batch["domain"].unique().tolist() == [1]


def test_trained_on_one_and_tested_on_both(people: Path) -> None:
    data = MSMT17(str(people), targets=["market1501", "msmt17"], image_size=16)
    examples = data.part("test")
    assert torch.bincount(examples.entries["domain"]).tolist() == [7, 8]
    assert data.domain_names == ["market1501", "msmt17"] and data.num_classes == 2


@pytest.mark.parametrize("cls", [Market1501, MSMT17])
def test_missing_persons_are_named(cls: Any, tmp_path: Path, people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="is not there: .* expects .*; get it from http"):
        cls(str(tmp_path / "none")).part("train")
    with pytest.raises(ValueError, match="no dataset 'duke'; there are: market1501, msmt17"):
        cls(str(people), targets=["duke"])
    name = cls.trained_on
    monkeypatch.setattr(cls, "counts", {name: {**cls.counts[name], "train": 5}})
    with pytest.raises(ValueError, match=rf"{name} has 5 images for 'train', but \d+ are in"):
        cls(str(people)).part("train")


def test_everything_is_exported() -> None:
    assert {c.__name__ for c in BUILD} | {"Market1501", "MSMT17", "EmojiDomains", "Digits"} <= set(datamodules.__all__)
