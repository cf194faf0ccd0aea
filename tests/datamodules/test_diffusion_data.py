"""MNIST, CelebA, ImageNet 64x64, COCO's captions and latents, on the embedded data and small trees of the layouts."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

import datamodules
from datamodules import MNIST, CelebA, COCOCaptions, EmojiCaptions, FashionMNIST, ImageNet64, Latents
from datamodules import latents as latents_module
from datamodules import mnist as mnist_module
from datamodules.celeba import ATTRIBUTES
from datamodules.imagenet import Planes
from datamodules.images import Files, ImageDataModule, decode
from datamodules.sampling import Draw, TrainBatches

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def save(file: Path, pixels: np.ndarray, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)


def values(data: ImageDataModule, part: Any) -> list[int]:
    """The mean of each image of a part, which the trees below make its number."""
    examples = data.part(part)
    return [round(float(examples[i]["image"].mean() * 255)) for i in range(len(examples))]


def one_line(error: pytest.ExceptionInfo[Any]) -> bool:
    return "\n" not in str(error.value)


# ---------------------------------------------------------------------- MNIST


def test_the_embedded_digits_are_what_their_readme_says() -> None:
    folder = mnist_module.FILE.parent
    sums = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(mnist_module.FILE.read_bytes()).hexdigest() == sums["mnist.npz"]
    assert "Juan Cazala" in (folder / "LICENSE").read_text() and "MIT" in (folder / "README.md").read_text()
    data = MNIST(batch_size=32)
    train, val, test = (data.part(p) for p in ("train", "val", "test"))
    assert [len(p) for p in (train, val, test)] == [7000, 1000, 2000]
    assert val.entries["label"].bincount().tolist() == [100] * 10
    assert test.entries["label"].bincount().tolist() == [200] * 10
    each = torch.tensor([1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978])
    assert torch.equal(train.entries["label"].bincount(), each - 300)
    rows = [row.numpy().tobytes() for p in (train, val, test) for row in p.images]  # type: ignore[union-attr]
    assert len(set(rows)) == 10_000, "no image is in two parts"
    assert not data.flip and not data.translate and data.in_chans == 1 and data.class_names == list("0123456789")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (32, 1, 28, 28) and batch["image"].dtype == torch.float32
    assert next(iter(MNIST(image_size=16).val_dataloader()))["image"].shape == (125, 1, 16, 16)


def test_the_official_digits_are_read(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = {"train": noise(60, 28, 28), "t10k": noise(20, 28, 28)}
    for name, array in images.items():
        label = (np.arange(len(array)) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 2051, len(array), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + array.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(array)) + label.tobytes())
    data = MNIST(str(tmp_path), val_size=10)
    test = data.part("test")
    assert torch.equal(test.images, torch.from_numpy(images["t10k"])[:, None])  # type: ignore[arg-type]
    assert test.entries["label"].tolist() == [i % 10 for i in range(20)] and len(data.part("train")) == 50
    with pytest.raises(FileNotFoundError, match="hasn't the files of MNIST .*--data.download true") as error:
        MNIST(str(tmp_path / "elsewhere")).part("test")
    assert one_line(error) and str(tmp_path / "elsewhere" / "MNIST" / "raw") in str(error.value)
    with pytest.raises(ValueError, match="the folder to fetch MNIST to"):
        MNIST(download=True)
    with pytest.raises(ValueError, match="at least 8, not 4"):
        MNIST(image_size=4)


def test_both_are_fetched_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("MNIST", "FashionMNIST"):
        note = lambda root, train, download, name=name: asked.append((name, train, download))  # noqa: E731
        monkeypatch.setattr(f"torchvision.datasets.{name}", note)
    MNIST(str(tmp_path), download=True).prepare_data()
    FashionMNIST(str(tmp_path), download=True).prepare_data()
    MNIST(str(tmp_path)).prepare_data()
    assert asked == [(name, train, True) for name in ("MNIST", "FashionMNIST") for train in (True, False)]


# ---------------------------------------------------------------------- CelebA


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine images, value 10 i, of which the parts in turn have every third; the odd ones smile, the first is old."""
    root = tmp_path / "celeba"
    partition, attributes = [], ["9", "Smiling Young "]
    for i in range(9):
        name = f"{i:06}.jpg"
        save(root / "img_align_celeba" / name, np.full((218, 178, 3), 10 * i, np.uint8), quality=95)
        partition.append(f"{name} {i % 3}")
        attributes.append(f"{name}  {1 if i % 2 else -1} {-1 if i == 0 else 1}")
    (root / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    (root / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    monkeypatch.setattr(CelebA, "counts", dict.fromkeys(("train", "val", "test"), 3))
    return tmp_path


def test_celeba_by_its_partition(faces: Path) -> None:
    for root in (faces, faces / "celeba"):
        data = CelebA(str(root), batch_size=3)
        assert (data.num_classes, data.class_names, data.domain_names) == (1, ["face"], ["celeba"])
        assert [values(data, part) for part in ("train", "val", "test")] == [[0, 30, 60], [10, 40, 70], [20, 50, 80]]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 3, 64, 64) and batch["label"].tolist() == [0, 0, 0]
    assert data.part("train").images is not None
    assert CelebA(str(faces), memory_gb=0.0).part("train").images is None


def test_an_attribute_is_the_label(faces: Path) -> None:
    data = CelebA(str(faces), attribute="Smiling")
    assert data.class_names == ["not Smiling", "Smiling"] and data.num_classes == 2
    assert data.part("train").entries["label"].tolist() == [0, 1, 0]
    assert data.part("val").entries["label"].tolist() == [1, 0, 1]
    assert CelebA(str(faces), attribute="Young").part("train").entries["label"].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="no attribute 'Sad'; there are: 5_o_Clock_Shadow, Arched_Eyebrows"):
        CelebA(str(faces), attribute="Sad")
    with pytest.raises(ValueError, match="hasn't 'Male' for all images: get it from https://mmlab") as error:
        CelebA(str(faces), attribute="Male").part("train")
    assert one_line(error)
    file = faces / "celeba" / "list_attr_celeba.txt"
    file.write_text(file.read_text().replace("000003.jpg", "000013.jpg"))
    with pytest.raises(ValueError, match="list_attr_celeba.txt has no image 000003.jpg"):
        CelebA(str(faces), attribute="Smiling").part("train")


def test_the_window_around_the_face_is_cut_out(tmp_path: Path) -> None:
    pixels = noise(218, 178, 3)
    save(tmp_path / "face.png", pixels)
    for crop_of in (CelebA.crop, (25, 57, 153, 185)):
        found = decode(tmp_path / "face.png", (128, 128), crop_of)
        np.testing.assert_array_equal(found.permute(1, 2, 0), pixels[121 - 64 : 121 + 64, 89 - 64 : 89 + 64])
    small = Image.fromarray(pixels[57:185, 25:153]).resize((32, 32), Image.Resampling.BICUBIC)
    [found] = Files([tmp_path / "face.png"], 3, (32, 32), CelebA.crop)[torch.tensor([0])]
    np.testing.assert_array_equal(found.permute(1, 2, 0), np.array(small))
    # a JPEG isn't decoded at a fraction of its size, where the window would lie elsewhere
    save(tmp_path / "face.jpg", np.kron(noise(11, 9, 1), np.ones((20, 20, 3), np.uint8))[:218, :178], quality=98)
    with Image.open(tmp_path / "face.jpg") as opened:
        wanted = opened.crop((25, 57, 153, 185)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode(tmp_path / "face.jpg", (8, 8), CelebA.crop).permute(1, 2, 0), np.array(wanted))
    save(tmp_path / "small.png", pixels[:180])
    with pytest.raises(ValueError, match="it has 178x180 pixels, which don't hold the window"):
        decode(tmp_path / "small.png", (8, 8), CelebA.crop)


def test_an_incomplete_celeba_is_named(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (faces / "celeba" / "img_align_celeba" / "000004.jpg").unlink()
    assert len(CelebA(str(faces)).part("train")) == 3
    with pytest.raises(ValueError, match="CelebA has 3 images of val, but 2 are in .*: the download is inco") as e:
        CelebA(str(faces)).part("val")
    assert one_line(e)
    (faces / "celeba" / "img_align_celeba").rename(faces / "images")
    with pytest.raises(FileNotFoundError, match="img_align_celeba is not there: CelebA expects celeba/.*https:") as e:
        CelebA(str(faces)).part("train")
    assert one_line(e)
    with pytest.raises(FileNotFoundError, match="list_eval_partition.txt is not there: CelebA expects celeba/"):
        CelebA(str(faces / "none")).part("train")
    with pytest.raises(ValueError, match="at least 8"):
        CelebA(str(faces), image_size=4)


# ---------------------------------------------------------------------- ImageNet, 64x64


def imagenet64(root: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Two files of training, with 3 and 5 images, and one of validation; three classes."""
    names = {"train": ("train_data_batch_1.npz", "train_data_batch_2.npz"), "test": ("val_data.npz",)}
    monkeypatch.setattr(ImageNet64, "files", names)
    monkeypatch.setattr(ImageNet64, "counts", {"train": 8, "test": 4})
    written = {}
    for name, size in zip((*names["train"], *names["test"]), (3, 5, 4), strict=True):
        written[name] = noise(size, 3 * 64 * 64), 1 + np.arange(size) % 2
        written[name][1][-1] = 1000
        arrays = {"data": written[name][0], "labels": written[name][1], "mean": np.zeros(3 * 64 * 64)}
        (np.savez_compressed if packed else np.savez)(root / name, **arrays)  # type: ignore[operator]
    return written


def as_image(row: np.ndarray) -> Tensor:
    """Pixel by pixel: first all red ones, row by row, then green, then blue."""
    return torch.from_numpy(np.stack([row[c * 4096 : (c + 1) * 4096].reshape(64, 64) for c in range(3)])).float() / 255


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("first", ["train", "test"])
def test_imagenet64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, first: Any) -> None:
    written = imagenet64(tmp_path, monkeypatch, packed)
    data = ImageNet64(str(tmp_path), val_size=3, batch_size=2)
    assert (data.num_classes, data.image_size, data.class_names[999]) == (1000, 64, "1000")
    data.part(first)
    test, train, val = data.part("test"), data.part("train"), data.part("val")
    images, label = written["val_data.npz"]
    assert test.entries["label"].tolist() == [int(each) - 1 for each in label] == [0, 1, 0, 999]
    assert all(torch.equal(test[i]["image"], as_image(images[i])) for i in range(4))
    rows = [*written["train_data_batch_1.npz"][0], *written["train_data_batch_2.npz"][0]]
    known = {as_image(row).numpy().tobytes(): i for i, row in enumerate(rows)}
    trained, held = ([known[p[i]["image"].numpy().tobytes()] for i in range(len(p))] for p in (train, val))
    assert sorted(trained + held) == list(range(8)) and len(held) == 3
    every = [*written["train_data_batch_1.npz"][1], *written["train_data_batch_2.npz"][1]]
    assert [every[i] - 1 for i in trained] == train.entries["label"].tolist()
    assert [every[i] - 1 for i in held] == val.entries["label"].tolist()
    assert isinstance(train.images, Planes) and isinstance(val.images, Planes)
    assert all(a is b for a, b in zip(train.images.arrays, val.images.arrays, strict=False)), "held in memory once"
    assert all(isinstance(array, np.memmap) != packed for array in train.images.arrays)
    whole = torch.cat([batch["image"] for batch in data.test_dataloader()])
    assert torch.equal(whole, torch.stack([test[i]["image"] for i in range(4)]))


def test_other_contents_than_imagenet64s_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet64(tmp_path, monkeypatch, False)
    load = lambda: ImageNet64(str(tmp_path), val_size=3).part("test")  # noqa: E731
    monkeypatch.setattr(ImageNet64, "counts", {"train": 8, "test": 50_000})
    with pytest.raises(ValueError, match="ImageNet has 50000 images of test, but 4 are in .*get it from h") as error:
        load()
    assert one_line(error)
    file = tmp_path / "val_data.npz"
    data, label = noise(4, 3 * 64 * 64), np.array([1, 2, 3, 4])
    wrong: list[dict[str, np.ndarray]] = [
        {"data": data[:, :-1], "labels": label},
        {"data": data, "labels": label[:-1]},
        {"data": data, "labels": label - 1},
        {"data": data.astype(np.float32), "labels": label},
    ]
    for arrays in wrong:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"must hold data uint8 \(N, 12288\) and labels \(N,\) of 1 to 1000") as e:
            load()
        assert one_line(e)
    np.savez(file, data=data)
    with pytest.raises(ValueError, match="val_data.npz can't be read .*labels.npy.*: get it from https"):
        load()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="val_data.npz can't be read"):
        load()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="val_data.npz is not there: ImageNet64 expects train_data_ba.*https"):
        load()


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet64(tmp_path, monkeypatch, False)

    class Loud:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "unpickled",))

    for save_as in (np.savez, np.savez_compressed):
        save_as(tmp_path / "val_data.npz", data=np.array([Loud()]), labels=np.array([1]))  # type: ignore[operator]
        with pytest.raises(ValueError, match="can't be read .*allow_pickle=False"):
            ImageNet64(str(tmp_path)).part("test")
    assert not (tmp_path / "unpickled").exists()


def test_the_official_names_and_counts() -> None:
    assert ImageNet64.files["train"][9] == "train_data_batch_10.npz" and len(ImageNet64.files["train"]) == 10
    assert ImageNet64.counts == {"train": 1_281_167, "test": 50_000}
    assert CelebA.counts == {"train": 162_770, "val": 19_867, "test": 19_962}
    assert COCOCaptions.counts == {"train": 82_783, "val": 40_504}
    assert len(set(ATTRIBUTES)) == 40


# ---------------------------------------------------------------------- COCO


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten images of training, value 20 i, and four of validation, 5 + 20 i, with three captions each."""
    for part, size, more in (("train", 10, 0), ("val", 4, 5)):
        names = {100 - i: f"COCO_{part}2014_{i:012}.jpg" for i in range(size)}  # ids in another order than the names
        for i, name in enumerate(names.values()):
            save(tmp_path / f"{part}2014" / name, np.full((30 + i, 40, 3), 20 * i + more, np.uint8), quality=95)
        rows = [
            {"image_id": key, "id": 10 * k + i, "caption": f" {part} {i}\ncaption {k} "}
            for k in range(3)
            for i, key in enumerate(names)
        ]
        images = [{"id": key, "file_name": name} for key, name in reversed(names.items())]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        file = tmp_path / "annotations" / f"captions_{part}2014.json"
        file.write_text(json.dumps({"images": images, "annotations": rows}))
    monkeypatch.setattr(COCOCaptions, "counts", {"train": 10, "val": 4})
    return tmp_path


def test_coco_and_its_captions(coco: Path) -> None:
    data = COCOCaptions(str(coco), image_size=16, val_size=3, batch_size=4, num_workers=0)
    trained, held, tested = (values(data, part) for part in ("train", "val", "test"))
    assert sorted(trained + held) == [20 * i for i in range(10)] and len(held) == 3
    assert tested == [5, 25, 45, 65] and not data.flip
    assert values(COCOCaptions(str(coco), image_size=16, val_size=3, seed=9), "val") == held
    [batch] = data.test_dataloader()
    assert batch["text"] == [f"val {i} caption 0" for i in range(4)] and batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].tolist() == batch["domain"].tolist() == [0] * 4 and data.class_names == ["photo"]
    [batch] = data.val_dataloader()
    assert batch["text"] == [f"train {value // 20} caption 0" for value in held]
    for batch in data.train_dataloader():
        assert [text.split(" caption ")[0] for text in batch["text"]] == [
            f"train {trained[i] // 20}" for i in batch["index"].tolist()
        ]


def test_a_caption_depends_on_seed_epoch_and_index_alone(coco: Path) -> None:
    make = lambda seed: COCOCaptions(str(coco), image_size=16, val_size=1, seed=seed).part("train")  # noqa: E731
    draws = [Draw(epoch, i) for epoch in range(20) for i in range(9)]
    texts = make(3).__getitems__(draws)["text"]
    assert [make(3)[draw]["text"] for draw in draws] == [[text][0] for text in texts]
    assert texts[9:18] != texts[:9] and texts != make(4).__getitems__(draws)["text"]
    drawn = [text.split()[-1] for text in texts]
    assert all(drawn.count(k) > 40 for k in "012")


def test_the_middle_of_a_photograph(tmp_path: Path, coco: Path) -> None:
    pixels = noise(30, 50, 3)
    save(tmp_path / "photo.png", pixels)
    found = decode(tmp_path / "photo.png", (30, 30), COCOCaptions.crop)
    np.testing.assert_array_equal(found.permute(1, 2, 0), pixels[:, 10:40])


def test_an_incomplete_coco_is_named(coco: Path) -> None:
    load = lambda: COCOCaptions(str(coco), val_size=3).part("test")  # noqa: E731
    file = coco / "annotations" / "captions_val2014.json"
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(ValueError, match="COCO has 4 captioned images of val2014, but 3 are in .*https://cocod") as e:
        load()
    assert one_line(e)
    for content in (file.read_text()[:100], "[]", '{"images": []}', '{"images": [], "annotations": [{"image_id": 1}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="captions_val2014.json isn't COCO's file of captions, or is cut short"):
            load()
    (coco / "val2014").rename(coco / "elsewhere")
    with pytest.raises(FileNotFoundError, match="val2014 is not there: COCOCaptions expects annotations/captions"):
        load()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="captions_val2014.json is not there: COCOCaptions expects annot") as e:
        load()
    assert one_line(e)
    with pytest.raises(ValueError, match="val_size must be at least 1"):
        COCOCaptions(str(coco), val_size=0)


# ---------------------------------------------------------------------- latents


def autoencoder(folder: Path, channels: int = 3, seed: int = 0, blocks: int = 2) -> Any:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(8,) * blocks,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
        )
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of grey images, two pixels a latent."""
    autoencoder(found := tmp_path_factory.mktemp("vae"), 1)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were encoded."""
    found: list[int] = []
    real = latents_module.moments

    def noted(vae: Any, images: Tensor) -> Tensor:
        found.append(len(images))
        return real(vae, images)

    monkeypatch.setattr(latents_module, "moments", noted)
    return found


def digits(**settings: Any) -> MNIST:
    common = {"train_size": 50, "val_size": 20, "image_size": 8, "batch_size": 10, "flip": True}
    return MNIST(**{**common, **settings})


def fitted(data: Latents) -> Tensor:
    return torch.cat([batch["image"] for batch in data.train_dataloader()])


def test_latents_are_those_of_the_autoencoder(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    data, plain = Latents(digits(seed=5), str(folder), str(tmp_path)), digits(seed=5)
    assert (data.in_chans, data.image_size, data.num_classes, data.vae) == (4, 4, 10, str(folder))
    assert data.class_names == plain.class_names and data.domain_names == ["mnist"] and plain.vae is None
    assert (data.batch_size, data.eval_batch_size, data.seed, data.flip) == (10, 20, 5, True)
    vae = AutoencoderKL.from_pretrained(folder).eval()
    flips = 0
    for batch, pixels in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        assert batch["image"].shape == (10, 4, 4, 4) and batch["image"].dtype == torch.float32
        assert all(torch.equal(batch[name], pixels[name]) for name in ("label", "domain", "index"))
        # the same draws mirror pixels and latents: the moments must be those of what the pixels' loader gives
        with torch.no_grad():
            posterior = vae.encode(pixels["image"] * 2 - 1).latent_dist
        drawn = torch.stack(
            [
                torch.from_numpy(np.random.default_rng((2112, 5, 0, i, 0)).standard_normal((4, 4, 4), np.float32))
                for i in batch["index"].tolist()
            ]
        )
        torch.testing.assert_close(batch["image"], 0.5 * (posterior.mean + posterior.std * drawn), rtol=2e-3, atol=2e-3)
        whole = plain.part("train").images
        assert isinstance(whole, Tensor)
        flips += int((pixels["image"] != whole[batch["index"]] / 255).flatten(1).any(1).sum())
    assert 10 < flips < 40
    kept = data.part("train").images
    assert isinstance(kept, latents_module.Moments) and isinstance(kept.array, np.memmap)
    assert kept.shape == (50, 2, 2, 4, 4, 4) and kept.array.dtype == np.float16
    assert data.part("val").images.shape == (20, 1, 2, 4, 4, 4)  # type: ignore[union-attr]  # not mirrored


def test_evaluation_draws_by_the_index_alone(folder: Path, tmp_path: Path) -> None:
    first, second = (
        Latents(digits(seed=s, eval_batch_size=b), str(folder), str(tmp_path)) for s, b in ((1, 7), (2, 9))
    )
    for name in ("val", "test"):
        one, other = (
            torch.cat([batch["image"] for batch in getattr(data, f"{name}_dataloader")()]) for data in (first, second)
        )
        assert torch.equal(one, other)
    images = torch.cat([batch["image"] for batch in first.val_dataloader()])
    assert torch.equal(images, torch.cat([batch["image"] for batch in first.val_dataloader()]))
    moments = torch.from_numpy(np.array(first.part("val").images.array)).float()[:, 0]  # type: ignore[union-attr]
    drawn = (images / 0.5 - moments[:, 0]) / moments[:, 1]
    assert abs(float(drawn.mean())) < 0.1 and float(drawn.std()) == pytest.approx(1, abs=0.1)
    assert not torch.allclose(drawn[0], drawn[1])
    evaluated = first.part("val").transform
    assert isinstance(evaluated, latents_module.Posterior) and not evaluated.training
    standard, index = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1, 1).expand(2, 1, 2, 4, 8, 8), torch.tensor([0, 1])
    of = lambda seed, epoch: latents_module.Posterior(seed, 2, False, 1.0)(standard, epoch, index)  # noqa: E731
    assert torch.equal(of(None, 0), of(None, 3)) and not torch.isclose(of(None, 0), of(0, 0)).any()


def test_noise_and_flip_depend_on_seed_epoch_and_index_alone(folder: Path, tmp_path: Path) -> None:
    def seen(batch_size: int, world: int, epoch: int, seed: int = 3) -> dict[int, Tensor]:
        found = {}
        for rank in range(world):
            data = Latents(digits(batch_size=batch_size, seed=seed), str(folder), str(tmp_path))
            data.train_dataloader()
            order = TrainBatches(50, batch_size, seed, rank, world)
            order.set_epoch(epoch)
            for draws in order:
                batch = data.part("train").__getitems__(draws)
                found.update(zip(batch["index"].tolist(), batch["image"], strict=True))
        return found

    whole = seen(50, 1, 2)
    for other in (seen(10, 1, 2), seen(5, 2, 2)):
        assert len(other) == 50 and all(torch.equal(whole[i], other[i]) for i in whole)
    for other in (seen(50, 1, 3), seen(50, 1, 2, 4)):
        assert not any(torch.equal(whole[i], other[i]) for i in whole)
    state = torch.get_rng_state()
    seen(10, 1, 2)
    assert torch.equal(state, torch.get_rng_state()), "the global random state has moved"


def test_a_second_view_has_its_own_draws(folder: Path, tmp_path: Path) -> None:
    data = Latents(digits(), str(folder), str(tmp_path))
    data.views = 2
    batch = next(iter(data.train_dataloader()))
    assert batch["view"].shape == batch["image"].shape and not torch.equal(batch["view"], batch["image"])


def test_latents_are_computed_once(folder: Path, tmp_path: Path, calls: list[int]) -> None:
    first = fitted(Latents(digits(seed=1), str(folder), str(tmp_path)))
    assert calls == [25, 25, 25, 25]  # an image and its mirror image
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("MNIST-train-") and file.suffix == ".npy"
    calls.clear()
    same = digits(seed=1, batch_size=10, eval_batch_size=3, labelled=10)
    assert torch.equal(fitted(Latents(same, str(folder), str(tmp_path))), first)
    fitted(Latents(digits(seed=2), str(folder), str(tmp_path)))  # the images are the same
    assert not calls and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "settings", [{"train_size": 60}, {"flip": False}, {"image_size": 12}, {"val_size": 30}, {"cls": FashionMNIST}]
)
def test_other_images_have_other_latents(
    settings: dict[str, Any], folder: Path, tmp_path: Path, calls: list[int]
) -> None:
    fitted(Latents(digits(), str(folder), str(tmp_path)))
    calls.clear()
    cls = settings.pop("cls", None)
    common = {"train_size": 50, "val_size": 20, "image_size": 8, "batch_size": 10, "flip": True}
    data = digits(**settings) if cls is None else cls(**common)
    fitted(Latents(data, str(folder), str(tmp_path)))
    assert calls and len(list(tmp_path.iterdir())) == 2


def test_another_autoencoder_has_other_latents(folder: Path, tmp_path: Path, calls: list[int]) -> None:
    first = fitted(Latents(digits(), str(folder), str(tmp_path / "cache")))
    calls.clear()
    autoencoder(tmp_path / "vae", 1, seed=1)
    assert not torch.allclose(fitted(Latents(digits(), str(tmp_path / "vae"), str(tmp_path / "cache"))), first)
    assert calls


@pytest.mark.parametrize("seed_chooses", [True, False])
def test_images_that_a_seed_chooses_are_told_apart(
    seed_chooses: bool, folder: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MNIST.official

    def official(self: MNIST, part: Any) -> tuple[Tensor, Tensor]:
        images, label = real(self, part)
        return (images.roll(self.seed if seed_chooses else 0, 0), label)

    monkeypatch.setattr(MNIST, "official", official)
    for seed in (1, 2):
        calls.clear()
        fitted(Latents(digits(seed=seed), str(folder), str(tmp_path)))
        assert bool(calls) == (seed_chooses or seed == 1)


@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "shape"])
def test_a_damaged_cache_is_computed_again(
    damage: str, folder: Path, tmp_path: Path, calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = fitted(Latents(digits(), str(folder), str(tmp_path)))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "shape":
        np.save(file, np.zeros((50, 2, 2, 4, 4, 5), np.float16))
    else:
        file.write_bytes({"cut": whole[:-100], "empty": b"", "junk": b"junk" * 100}[damage])
    calls.clear()
    assert torch.equal(fitted(Latents(digits(), str(folder), str(tmp_path))), first)
    assert calls and "computed again" in caplog.text and file.read_bytes() == whole


def test_a_broken_off_run_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = latents_module.moments, []

    def breaks(vae: Any, images: Tensor) -> Tensor:
        if len(done) == 2:  # the first batch and its mirror images
            raise KeyboardInterrupt
        done.append(1)
        return real(vae, images)

    monkeypatch.setattr(latents_module, "moments", breaks)
    with pytest.raises(KeyboardInterrupt):
        fitted(Latents(digits(), str(folder), str(tmp_path)))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(latents_module, "moments", lambda vae, images: real(vae, images) * float("inf"))
    with pytest.raises(ValueError, match="aren't finite in half precision"):
        fitted(Latents(digits(), str(folder), str(tmp_path)))

    def lacks(vae: Any, images: Tensor) -> Tensor:
        raise FileNotFoundError("there is no file 1.jpg")

    monkeypatch.setattr(latents_module, "moments", lacks)
    with pytest.raises(FileNotFoundError, match="there is no file 1.jpg"):  # the cache isn't to blame
        fitted(Latents(digits(), str(folder), str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_cache_lies_where_it_should(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = Latents(digits(), str(folder))
    data.part("val")
    assert len(list((tmp_path / "perturbation-recipes" / "latents").glob("MNIST-val-*.npy"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="latents can't be kept in .*file .*; name another folder with --data.cache") as e:
        Latents(digits(), str(folder), str(tmp_path / "file")).part("val")
    assert one_line(e)


def test_captions_and_files_keep_their_entries(coco: Path, tmp_path: Path, calls: list[int]) -> None:
    autoencoder(tmp_path / "vae", 3)
    make = lambda: COCOCaptions(str(coco), image_size=16, val_size=2, batch_size=4, num_workers=0, seed=1)  # noqa: E731
    for batch, pixels in zip(
        Latents(make(), str(tmp_path / "vae"), str(tmp_path / "cache")).train_dataloader(),
        make().train_dataloader(),
        strict=True,
    ):
        assert batch["text"] == pixels["text"] and batch["image"].shape == (4, 4, 8, 8)
    assert calls == [8]  # not mirrored
    calls.clear()
    replaced = make().part("train").files
    assert replaced is not None
    replaced[1].write_bytes(b"another size")
    with pytest.raises(ValueError, match="can't be read as an image"):  # the latents of the old file aren't taken
        Latents(make(), str(tmp_path / "vae"), str(tmp_path / "cache")).part("train")
    emoji = Latents(EmojiCaptions(batch_size=4, translate=0.0), str(tmp_path / "vae"), str(tmp_path / "cache"))
    batch = emoji.part("val").__getitems__([Draw(0, 3)])
    assert set(batch) == {"image", "label", "domain", "concept", "index"}


def test_files_are_read_once_and_not_kept(faces: Path, tmp_path: Path, calls: list[int]) -> None:
    autoencoder(tmp_path / "vae", 3)
    make = lambda **more: Latents(  # noqa: E731
        CelebA(str(faces), image_size=16, batch_size=3, **more), str(tmp_path / "vae"), str(tmp_path / "cache")
    )
    data = make()
    assert data.part("train").files is None and isinstance(data.part("train").images, latents_module.Moments)
    calls.clear()
    for file in (faces / "celeba" / "img_align_celeba").iterdir():
        file.write_bytes(b"-" * file.stat().st_size)
    assert torch.equal(fitted(data), fitted(make())) and not calls
    smiling = make(attribute="Smiling")
    assert next(iter(smiling.train_dataloader()))["label"].sum() == 1 and smiling.num_classes == 2 and not calls


class Mean(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["image"])
        return (batch["image"].mean((2, 3)) - self.weight).pow(2).mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_has_them_encoded_before_it_begins(folder: Path, tmp_path: Path, calls: list[int]) -> None:
    data, model = Latents(digits(seed=3), str(folder), str(tmp_path)), Mean()
    when = []
    real = data.setup

    def setup(stage: str) -> None:
        when.append((stage, len(calls)))
        real(stage)

    data.setup = setup  # type: ignore[method-assign]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, datamodule=data)
    assert when == [("fit", 0), ("fit", 5)], "on one rank, then on all, for whom nothing is left to compute"
    assert torch.equal(torch.cat(model.seen), fitted(Latents(digits(seed=3), str(folder), str(tmp_path))))


def test_what_does_not_fit_is_said_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    with pytest.raises(FileNotFoundError, match="there is no autoencoder in .*: vae expects the folder of a") as e:
        Latents(digits(), str(tmp_path / "none"))
    errors.append(e)
    with pytest.raises(ValueError, match="images of 9 pixels can't be encoded: .* a multiple of 2; set image_s") as e:
        Latents(digits(image_size=9), str(folder))
    errors.append(e)
    with pytest.raises(ValueError, match="takes 1 channels, but EmojiCaptions has 3") as e:
        Latents(EmojiCaptions(translate=0.0), str(folder))
    errors.append(e)
    for setting in ({"translate": 0.1}, {"transform": torch.nn.Identity()}):
        with pytest.raises(ValueError, match="can't be shifted or transformed: set translate of MNIST to 0") as e:
            Latents(digits(**setting), str(folder))
        errors.append(e)
    other = tmp_path / "other"
    autoencoder(other, 1)
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="the autoencoder in .*other can't be read: ") as e:
        Latents(digits(), str(other), str(tmp_path)).part("val")
    errors.append(e)
    described = (folder / "config.json").read_text()
    for content in (described.replace("AutoencoderKL", "VQModel"), '{"_class_name": "AutoencoderKL"}', "junk", "[]"):
        (other / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json doesn't describe a diffusers AutoencoderKL") as e:
            Latents(digits(), str(other))
        errors.append(e)
    (other / "config.json").write_text(described)
    (other / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there is no autoencoder in .*other: vae expects"):
        Latents(digits(), str(other))
    data = Latents(digits(), str(folder), str(tmp_path))
    data.predict_folder = tmp_path
    with pytest.raises(ValueError, match="can't read a folder of images: leave --images out"):
        data.predict_dataloader()
    monkeypatch.setattr(latents_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs diffusers: pip install -e "\.\[diffusion\]"') as e:
        Latents(digits(), str(folder))
    assert all(map(one_line, [*errors, e]))


def test_weights_that_lack_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    autoencoder(tmp_path / "vae", 1)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "quant_conv.weight"}, file)
    with pytest.raises(ValueError, match="lacks weights, of quant_conv.weight for one"):
        Latents(digits(), str(tmp_path / "vae"), str(tmp_path)).part("val")


def test_latents_in_a_config(folder: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    given = {
        "class_path": "datamodules.Latents",
        "init_args": {
            "data": {"class_path": "datamodules.MNIST", "init_args": {"image_size": 16, "batch_size": 7}},
            "vae": str(folder),
        },
    }
    data = parser.instantiate(parser.parse_object({"data": given})).data
    assert isinstance(data, Latents) and isinstance(data.data, MNIST) and data.image_size == 8 and data.batch_size == 7


def test_importing_the_package_does_not_import_diffusers() -> None:
    code = "import sys, datamodules; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_they_are_exported() -> None:
    assert {"MNIST", "CelebA", "ImageNet64", "COCOCaptions", "Latents"} <= set(datamodules.__all__)
