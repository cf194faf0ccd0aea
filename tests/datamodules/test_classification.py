"""Fashion-MNIST, CIFAR, SVHN, Tiny ImageNet, ImageNet and the corruptions, on small trees of the official layouts."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from datamodules import CIFAR10, CIFAR10C, CIFAR100, CIFAR100C, SVHN, FashionMNIST, ImageNet, ImageNetC, TinyImageNet
from datamodules import fashion as fashion_module
from datamodules.corruptions import CORRUPTIONS
from datamodules.images import ImageDataModule, decode
from datamodules.splits import hold_out, keep_labels

RNG = np.random.default_rng(0)

# ---------------------------------------------------------------------- splits


@given(st.lists(st.integers(5, 30), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_part_is_held_out_evenly(counts: list[int], each: int, seed: int) -> None:
    label = torch.cat([torch.full((n,), 3 * c) for c, n in enumerate(counts)])
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))]
    size = each * len(counts) + (len(counts) - 1 if each < 5 else 0)
    kept, held = hold_out(label, size, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(label))) and len(held) == size
    shares = [int((label[held] == 3 * c).sum()) for c in range(len(counts))]
    assert max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)
    assert torch.equal(hold_out(label, size, seed)[1], held)


def test_splits_say_what_is_wrong() -> None:
    label = torch.tensor([0, 0, 0, 1])
    with pytest.raises(ValueError, match="4 of 4 examples can't be chosen evenly: class 1 has 1"):
        hold_out(label, 4)
    with pytest.raises(ValueError, match="labelled must be at least 1"):
        FashionMNIST(labelled=0)


def test_labels_are_kept_for_a_part_of_each_class() -> None:
    label = torch.arange(40) % 4
    found = keep_labels(label, 8, 3)
    assert [int((found == c).sum()) for c in (-1, 0, 1, 2, 3)] == [32, 2, 2, 2, 2]
    assert torch.equal(found[found >= 0], label[found >= 0])
    assert not torch.equal(found, keep_labels(label, 8, 4)) and keep_labels(label, None) is label


# ---------------------------------------------------------------------- Fashion-MNIST


def test_the_embedded_part_is_what_its_readme_says() -> None:
    folder = fashion_module.FILE.parent
    (line,) = (folder / "SHA256SUMS").read_text().splitlines()
    assert hashlib.sha256(fashion_module.FILE.read_bytes()).hexdigest() == line.split()[0]
    assert "Zalando SE" in (folder / "LICENSE").read_text() and "MIT" in (folder / "README.md").read_text()
    data = FashionMNIST(batch_size=32)
    train, val, test = (data.part(p) for p in ("train", "val", "test"))
    assert [len(p) for p in (train, val, test)] == [9000, 1000, 2000]
    for part, each in ((train, 900), (val, 100), (test, 200)):
        assert part.entries["label"].bincount().tolist() == [each] * 10
    assert train.images is not None and train.images.shape[1:] == (1, 28, 28) and data.in_chans == 1
    with np.load(fashion_module.FILE) as arrays:
        assert list(arrays["classes"]) == data.class_names
    # nothing of validation is trained on
    rows = {bytes(row.numpy()) for row in train.images}  # type: ignore[union-attr]  # a tensor's rows
    assert val.images is not None
    assert sum(bytes(row.numpy()) in rows for row in val.images) <= 1  # type: ignore[attr-defined]  # official duplicates


def test_sizes_and_labels_of_training() -> None:
    data = FashionMNIST(train_size=200, val_size=100, labelled=50, image_size=32, seed=3)
    train, val = data.part("train"), data.part("val")
    assert train.entries["label"].ge(0).sum() == 50 and len(train) == 200 and train.size == (32, 32)
    assert (val.entries["label"] >= 0).all() and len(val) == 100
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (64, 1, 32, 32) and 0 <= batch["image"].min() and batch["image"].max() <= 1
    again = FashionMNIST(train_size=200, val_size=100, labelled=50, image_size=32, seed=4)
    other = again.part("train").entries["label"]
    assert not torch.equal(train.entries["label"], other), "which ones are labelled goes with the seed"
    both = (train.entries["label"] >= 0) & (other >= 0)
    assert torch.equal(train.entries["label"][both], other[both]), "but not which ones train"


@pytest.mark.parametrize("packed", [False, True])
def test_the_official_files_are_read(tmp_path: Path, packed: bool) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = {
        "train": RNG.integers(0, 256, (60, 28, 28), np.uint8),
        "t10k": RNG.integers(0, 256, (20, 28, 28), np.uint8),
    }
    for name, array in images.items():
        label = (np.arange(len(array)) % 10).astype(np.uint8)
        contents = {
            f"{name}-images-idx3-ubyte": struct.pack(">IIII", 2051, len(array), 28, 28) + array.tobytes(),
            f"{name}-labels-idx1-ubyte": struct.pack(">II", 2049, len(array)) + label.tobytes(),
        }
        for file, content in contents.items():
            (raw / file).write_bytes(content)
            if packed:
                (raw / f"{file}.gz").write_bytes(gzip.compress(content))
    data = FashionMNIST(str(tmp_path), val_size=10)
    test, train = data.part("test"), data.part("train")
    assert torch.equal(test.images, torch.from_numpy(images["t10k"])[:, None]) and len(train) == 50  # type: ignore[arg-type]
    assert test.entries["label"].tolist() == [i % 10 for i in range(20)]
    with pytest.raises(FileNotFoundError, match="hasn't the files of Fashion-MNIST.*--data.download true") as error:
        FashionMNIST(str(tmp_path / "elsewhere")).part("test")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="download needs root"):
        FashionMNIST(download=True)


# ---------------------------------------------------------------------- CIFAR and SVHN


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision compares checksums, which a small tree can't have: here only that the files are there."""
    for module in ("cifar", "svhn"):
        there = lambda file, md5=None: Path(file).is_file()  # noqa: E731  # its signature
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", there)


def cifar(root: Path, classes: int, each: int = 2) -> dict[str, Any]:
    """The pickled batches of the release; pixels as rows of 3072 numbers, red, green, blue."""
    official = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    folder = root / official.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    written: dict[str, Any] = {"train": [], "test": []}
    for part, files in (("train", official.train_list), ("test", official.test_list)):
        for name, _ in files:
            size = classes * each // len(files) if part == "train" else classes
            rows = RNG.integers(0, 256, (size, 3072), np.uint8)
            label = [i % classes for i in range(size)]
            (folder / name).write_bytes(pickle.dumps({"data": rows, key: label}))
            written[part].append((rows, label))
    meta = {official.meta["key"]: [f"class{i}" for i in range(classes)]}
    (folder / official.meta["filename"]).write_bytes(pickle.dumps(meta))
    return written


@pytest.mark.parametrize(("cls", "classes", "each"), [(CIFAR10, 10, 50), (CIFAR100, 100, 3)])
def test_cifar(cls: Any, classes: int, each: int, tmp_path: Path, small_files: None) -> None:
    written = cifar(tmp_path, classes, each)
    data = cls(str(tmp_path), val_size=classes, batch_size=4)
    test = data.part("test")
    rows, label = written["test"][0]
    assert torch.equal(test.images, torch.from_numpy(rows.reshape(-1, 3, 32, 32)))
    assert test.entries["label"].tolist() == label and data.num_classes == classes == len(data.class_names)
    assert len(data.part("train")) == classes * each - classes and len(data.part("val")) == classes
    assert data.translate == 0.125 and data.flip and len(set(data.class_names)) == classes
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "domain", "index"} and batch["image"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100, SVHN])
def test_missing_files_are_named(cls: Any, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"hasn't the files of {cls.__name__}, .*--data.download true, or from h"
    ) as error:
        cls(str(tmp_path)).part("train")
    assert "\n" not in str(error.value)


def test_svhn_counts_its_zeros_as_zeros(tmp_path: Path, small_files: None) -> None:
    images: dict[str, Any] = {}
    for part, size in (("train", 40), ("test", 20)):
        images[part] = RNG.integers(0, 256, (32, 32, 3, size), np.uint8)
        label = np.array([[1 + i % 10] for i in range(size)])  # the release writes 10 for the digit 0
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images[part], "y": label})
    data = SVHN(str(tmp_path), val_size=10)
    test = data.part("test")
    assert test.entries["label"].tolist() == [(1 + i) % 10 for i in range(20)] and not data.flip
    assert torch.equal(test.images, torch.from_numpy(images["test"]).permute(3, 2, 0, 1))  # type: ignore[arg-type]
    assert len(data.part("train")) == 30


# ---------------------------------------------------------------------- Tiny ImageNet and ImageNet


def picture(file: Path, size: tuple[int, int] = (64, 64), value: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 256, (*size, 3), np.uint8) if value is None else np.full((*size, 3), value, np.uint8)
    Image.fromarray(array).save(file, format="JPEG", quality=95)


def test_tiny_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{i:08d}" for i in reversed(range(200))]
    for i, wnid in enumerate(sorted(wnids)):
        for k in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", value=i)
    rows = [f"val_{i}.JPEG\t{wnids[i]}\t0\t0\t62\t62" for i in range(4)]
    for i in range(4):
        picture(root / "val" / "images" / f"val_{i}.JPEG", value=10 * i)
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n00000000\tentity, thing\nn00000001\tphysical entity\n")
    monkeypatch.setattr(TinyImageNet, "counts", {"train": 400, "test": 4})
    for given_root in (tmp_path, root):
        data = TinyImageNet(str(given_root), val_size=200)
        assert data.class_names[:3] == ["entity", "physical entity", "n00000002"]
        test, train = data.part("test"), data.part("train")
        assert test.entries["label"].tolist() == [199, 198, 197, 196]
        assert [round(float(test[i]["image"].mean() * 255)) for i in range(4)] == [0, 10, 20, 30]
        assert train.entries["label"].tolist() == list(range(200))
        assert [round(float(train[i]["image"].mean() * 255)) for i in (0, 50, 199)] == [0, 50, 199]
    monkeypatch.setattr(TinyImageNet, "counts", {"train": 400, "test": 10_000})
    with pytest.raises(ValueError, match="has 10000 images of test, but 4 are in"):
        TinyImageNet(str(root)).part("test")
    (root / "words.txt").unlink()
    with pytest.raises(FileNotFoundError, match="words.txt is not there: TinyImageNet expects"):
        TinyImageNet(str(root))


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ImageNet, "classes", 3)
    for i, wnid in enumerate(("n01", "n02", "n03")):
        for k in range(4):
            picture(tmp_path / "train" / wnid / f"{wnid}_{k}.JPEG", (40, 60), 20 * i)
        picture(tmp_path / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", (60, 40), 20 * i + 5)
    return tmp_path


def test_imagenet(imagenet: Path) -> None:
    data = ImageNet(str(imagenet), image_size=16, val_size=3)
    train, test = data.part("train"), data.part("test")
    assert train.entries["label"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and data.class_names == ["n01", "n02", "n03"]
    assert [round(float(test[i]["image"].mean() * 255)) for i in range(3)] == [5, 25, 45]
    assert test[0]["image"].shape == (3, 16, 16)
    picture(imagenet / "val" / "ILSVRC2012_val_00000007.JPEG")
    with pytest.raises(ValueError, match="aren't sorted by class: torchvision.datasets.ImageNet"):
        ImageNet(str(imagenet)).part("test")
    picture(imagenet / "train" / "n04" / "a.JPEG")
    with pytest.raises(ValueError, match="has 4 folders, but ImageNet has 3 classes"):
        ImageNet(str(imagenet))
    with pytest.raises(FileNotFoundError, match="ImageNet expects train/<class>"):
        ImageNet(str(imagenet / "elsewhere"))


@pytest.mark.parametrize("shape", [(80, 40), (40, 80), (64, 64)])
def test_the_middle_is_cut_out(shape: tuple[int, int], tmp_path: Path) -> None:
    """A square of 8/7 of the size just fits, and what is cut out of it is its middle, undistorted."""
    height, width = shape
    side = min(shape)
    array = np.zeros((*shape, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    array[top : top + side, left : left + side] = 100
    inner = side // 4
    array[height // 2 - inner : height // 2 + inner, width // 2 - inner : width // 2 + inner, 0] = 250
    Image.fromarray(array).save(tmp_path / "image.png")
    found = decode(tmp_path / "image.png", (28, 28), crop=8 / 7).float()
    assert found.shape == (3, 28, 28)
    assert (found[1] > 95).all(), "no edge of the longer side is in it"
    red = (found[0] > 175).sum(0).max(), (found[0] > 175).sum(1).max()
    assert all(abs(int(n) - 16) <= 1 for n in red), "half of 32 pixels"


# ---------------------------------------------------------------------- corruptions


@pytest.mark.parametrize(("cls", "classes"), [(CIFAR10C, 10), (CIFAR100C, 100)])
def test_cifar_corruptions_are_domains(
    cls: Any, classes: int, tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10C, "per_severity", 6)
    cifar(tmp_path / "clean", classes, 50 if classes == 10 else 3)
    folder = tmp_path / "corrupted"
    folder.mkdir()
    arrays = {name: RNG.integers(0, 256, (30, 32, 32, 3), np.uint8) for name in ("fog", "snow", "gaussian_blur")}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    label = np.arange(30) % classes
    np.save(folder / "labels.npy", label)
    chosen = ["snow", "gaussian_blur"]
    roots = (str(tmp_path / "clean"), str(folder))
    data = cls(*roots, corruptions=chosen, severities=[5, 2], val_size=classes, batch_size=4)
    test = data.part("test")
    rows = [*range(6, 12), *range(24, 30)]
    assert len(test) == 24 and test.entries["label"].tolist() == label[rows].tolist() * 2
    names = [data.domain_names[d] for d in test.entries["domain"].tolist()]
    assert names == ["snow"] * 12 + ["gaussian_blur"] * 12 and data.domain_names[0] == "clean"
    seen: list[Tensor] = [image for batch in data.test_dataloader() for image in batch["image"]]
    for i, name in enumerate(chosen):
        for k, row in enumerate(rows):
            wanted = torch.from_numpy(arrays[name][row]).permute(2, 0, 1).float() / 255
            assert torch.equal(seen[12 * i + k], wanted)
    assert set(data.part("train").entries["domain"].tolist()) == {0} and data.num_classes == classes
    with pytest.raises(FileNotFoundError, match=r"fog|gaussian_noise.npy is not there: get CIFAR"):
        cls(*roots, val_size=classes).part("test")
    with pytest.raises(ValueError, match="there is no corruption 'rain'; there are: gaussian_noise"):
        cls(*roots, corruptions=["rain"])
    with pytest.raises(ValueError, match="there is no severity '6'"):
        cls(*roots, severities=[6])
    np.save(folder / "fog.npy", arrays["fog"][:20])
    with pytest.raises(ValueError, match="fog.npy has 20 rows, but should have 30"):
        cls(*roots, corruptions=["fog"]).part("test")


def test_imagenet_corruptions_are_domains(imagenet: Path, tmp_path: Path) -> None:
    corrupted = tmp_path / "c"
    for name, place in (("fog", "fog"), ("snow", "weather/snow")):
        for severity in (1, 3):
            for i, wnid in enumerate(("n01", "n02", "n03")):
                picture(
                    corrupted / place / str(severity) / wnid / "a.JPEG", value=50 * severity + i + 10 * (name == "fog")
                )
    data = ImageNetC(str(imagenet), str(corrupted), ["snow", "fog"], [3, 1], image_size=16, val_size=3)
    test = data.part("test")
    assert test.entries["label"].tolist() == [0, 1, 2] * 4
    assert [data.domain_names[d] for d in test.entries["domain"].tolist()] == ["snow"] * 6 + ["fog"] * 6
    values = [round(float(test[i]["image"].mean() * 255)) for i in range(12)]
    assert values == [50, 51, 52, 150, 151, 152, 60, 61, 62, 160, 161, 162]
    with pytest.raises(FileNotFoundError, match="snow/2 is not there: get ImageNet-C"):
        ImageNetC(str(imagenet), str(corrupted), ["snow"], [2]).part("test")


def test_the_fifteen_of_the_benchmark_are_the_default() -> None:
    assert len(CORRUPTIONS) == 19 and CORRUPTIONS[14] == "jpeg_compression"
    data = CIFAR10C("a", "b")
    assert [CORRUPTIONS[i] for i in data.corruptions] == list(CORRUPTIONS[:15]) and data.severities == [1, 2, 3, 4, 5]


def test_they_are_named_to_the_command_line() -> None:
    for cls in (FashionMNIST, CIFAR10, CIFAR100, SVHN, TinyImageNet, ImageNet, CIFAR10C, CIFAR100C, ImageNetC):
        assert issubclass(cls, ImageDataModule) and cls.__doc__
