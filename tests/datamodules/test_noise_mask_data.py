"""Modalities, MedMNIST, RadImageNet, anybody's folders and random crops, on embedded data and small trees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resized_crop, rgb_to_grayscale

from datamodules import EmojiDomains, FashionMNIST, Folders, MedMNIST, Modalities, RadImageNet, medmnist, modalities
from datamodules.emoji import CLASSES as EMOJI
from datamodules.images import Augmentation, ImageDataModule, ImageSet
from datamodules.medmnist import SETS, Pictures
from datamodules.modalities import BRAIN, MODALITIES, coloured, spread

RNG = np.random.default_rng(0)
PARTS = ("train", "val", "test")


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def save(file: Path, value: int = 0, side: int = 8) -> None:
    """A grey square, all of whose pixels have this value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), value, np.uint8)).save(file)


def values(data: ImageDataModule, part: Any) -> list[int]:
    """The mean of each image of a part, which the trees below make its number."""
    examples = data.part(part)
    return [round(float(examples[i]["image"].mean() * 255)) for i in range(len(examples))]


def labels(data: ImageDataModule, part: Any) -> list[int]:
    return data.part(part).entries["label"].tolist()


def said(error: type[Exception], what: Callable[[], Any]) -> str:
    """What is said when this is done: one line."""
    with pytest.raises(error) as found:
        what()
    assert "\n" not in str(found.value)
    return str(found.value)


def pixels(examples: ImageSet) -> list[bytes]:
    assert isinstance(examples.images, Tensor)
    return [image.numpy().tobytes() for image in examples.images]


# ---------------------------------------------------------------------- random crops


def plain_window(u: list[float], height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the window of four draws, step by step."""
    share = scale[0] + (scale[1] - scale[0]) * u[0]
    limit = [max(3 / 4, min(4 / 3, r)) for r in (share * width / height, width / (share * height))]
    aspect = limit[0] * (limit[1] / limit[0]) ** u[1]
    w, h = (share * height * width * aspect) ** 0.5, (share * height * width / aspect) ** 0.5
    fit = min(1, width / w, height / h)
    w, h = max(1, min(width, round(w * fit))), max(1, min(height, round(h * fit)))
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(3, 40),
    st.integers(3, 40),
    st.sampled_from([1, 3]),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
)
def test_crops_against_torchvision_on_one_image_at_a_time(
    seed: int, height: int, width: int, channels: int, a: float, b: float
) -> None:
    scale = (min(a, b), max(a, b))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (5, channels, height, width), dtype=torch.uint8, generator=generator)
    augment = Augmentation(seed, 20, False, 0.0, crop_scale=scale)
    index = torch.tensor([3, 19, 0, 5, 6])
    found = augment(images, 4, index)
    assert found.dtype == torch.uint8 and found.shape == images.shape
    for image, u, out in zip(images, augment._draws(4, index).double(), found, strict=True):
        window = plain_window(u[5:].tolist(), height, width, scale)
        assert torch.equal(out, resized_crop(image, *window, [height, width], antialias=True))


def test_windows_are_drawn_as_torchvision_draws_them() -> None:
    """Where all windows fit: area, aspect and place have the same distributions."""
    scale, size = (0.2, 0.7), 800
    image = torch.empty(1, size, size)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(size, scale)
    rows = [crop.make_params([image]) for _ in range(3000)]
    theirs = torch.tensor([[r["left"], r["top"], r["left"] + r["width"], r["top"] + r["height"]] for r in rows])
    augment = Augmentation(0, 3000, False, 0.0, crop_scale=scale)
    ours = augment._windows(augment._draws(0, torch.arange(3000))[:, 5:], size, size)
    for name, of in {
        "area": lambda x: (x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]),
        "aspect": lambda x: (x[:, 2] - x[:, 0]) / (x[:, 3] - x[:, 1]),
        "left": lambda x: x[:, 0] / (size - x[:, 2] + x[:, 0]),
        "top": lambda x: x[:, 1] / (size - x[:, 3] + x[:, 1]),
    }.items():
        assert ks_2samp(of(ours.double()).numpy(), of(theirs.double()).numpy()).pvalue > 1e-3, name


@settings(max_examples=60, deadline=None)
@given(st.floats(0.02, 1.0), st.floats(0.02, 1.0), st.integers(100, 300), st.integers(100, 300))
def test_windows_have_the_area_and_the_aspect_that_were_asked_for(a: float, b: float, height: int, width: int) -> None:
    scale = (min(a, b), max(a, b))
    augment = Augmentation(1, 500, False, 0.0, crop_scale=scale)
    left, top, right, bottom = augment._windows(augment._draws(0, torch.arange(500))[:, 5:], height, width).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    w, h = (right - left).double(), (bottom - top).double()
    assert ((w + 0.5) / (h - 0.5)).min() >= 3 / 4 and ((w - 0.5) / (h + 0.5)).max() <= 4 / 3
    if max(width / height, height / width) <= 4 / 3:  # then there is a window of any area
        assert ((w + 0.5) * (h + 0.5)).min() >= scale[0] * height * width
        assert ((w - 0.5) * (h - 0.5)).max() <= scale[1] * height * width


def test_without_a_crop_the_same_numbers_are_drawn_as_ever() -> None:
    index = torch.arange(30)
    for view in (0, 1):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + 3 + 500_009 * (1 + view))
        wanted = torch.rand(30, 5, generator=generator)
        assert torch.equal(Augmentation(7, 30, True, 0.1)._draws(3, index, view), wanted)
        with_crop = Augmentation(7, 30, True, 0.1, crop_scale=(0.5, 1.0))._draws(3, index, view)
        assert with_crop.shape == (30, 9) and torch.equal(with_crop[:, :5], wanted), "flips and shifts stay the same"


def test_a_crop_comes_first_and_a_whole_one_is_none() -> None:
    images = torch.from_numpy(noise(30, 3, 16, 12))
    index = torch.arange(30)
    for flip, translate in ((False, 0.0), (True, 0.2)):
        plain, whole = (Augmentation(2, 30, flip, translate, crop_scale=c) for c in (None, (1.0, 1.0)))
        assert torch.equal(plain(images, 1, index), whole(images, 1, index))
    both, crop = (Augmentation(2, 30, flip, 0.0, crop_scale=(0.2, 0.5)) for flip in (True, False))
    mirrored = (both._draws(1, index)[:, 0] < 0.5).view(-1, 1, 1, 1)
    cut = crop(images, 1, index)
    assert torch.equal(both(images, 1, index), torch.where(mirrored, cut.flip(-1), cut))
    assert not torch.equal(cut, crop(images, 1, index, 1)), "a second view is another crop"
    assert not torch.equal(cut, crop(images, 2, index)), "another epoch is another crop"
    one = Augmentation(2, 30, False, 0.0, crop_scale=(0.2, 0.5))
    assert torch.equal(cut[7:8], one(images[7:8], 1, index[7:8]))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1), (-0.1, 0.5)])
def test_a_crop_has_a_share_of_the_image(scale: tuple[float, float]) -> None:
    assert f"0 < least <= most <= 1, not {scale}" in said(
        ValueError, lambda: Augmentation(0, 9, False, 0.0, crop_scale=scale)
    )


def test_data_crop_what_they_train_on_and_nothing_else() -> None:
    makers: list[Callable[..., ImageDataModule]] = [
        lambda **o: Modalities(["mnist", "brain"], train_size=64, **o),
        lambda **o: EmojiDomains(flip=False, translate=0.0, **o),
    ]
    for make in makers:
        cut, plain = make(seed=1, crop_scale=(0.3, 0.5)), make(seed=1)
        for a, b in zip(cut.train_dataloader(), plain.train_dataloader(), strict=True):
            assert torch.equal(a["index"], b["index"]) and a["image"].shape == b["image"].shape
            assert (a["image"] != b["image"]).flatten(1).any(1).all()
        for a, b in zip(cut.val_dataloader(), plain.val_dataloader(), strict=True):
            assert torch.equal(a["image"], b["image"])


# ---------------------------------------------------------------------- modalities


def test_the_embedded_slices_are_what_their_readme_says() -> None:
    wanted, name = (BRAIN.parent / "SHA256SUMS").read_text().split()
    assert name == BRAIN.name and hashlib.sha256(BRAIN.read_bytes()).hexdigest() == wanted
    assert "Louis Collins" in (BRAIN.parent / "LICENSE").read_text()
    assert "The nilearn developers" in (BRAIN.parent / "LICENSE.nilearn").read_text()
    with np.load(BRAIN) as arrays:
        images = arrays["images"]
        assert images.shape == (149, 64, 64) and arrays["slice_index"].tolist() == list(range(20, 169))
    assert (images == images[:, :, ::-1]).all(), "left and right are mirrored"


def test_all_modalities_share_one_label_space() -> None:
    data = Modalities()
    assert data.domain_names == ["fashion", "mnist", "emoji", "brain"] and data.num_classes == 10 + 10 + 17 + 6
    names = {i: data.class_names[i] for i in (0, 4, 10, 17, 20, 21, 36, 37, 42)}
    assert names == {
        0: "fashion: T-shirt/top",
        4: "fashion: Coat",
        10: "mnist: 0",
        17: "mnist: 7",
        20: "emoji: aquatic",
        21: "emoji: bird",
        36: "emoji: vehicle",
        37: "brain: band 1",
        42: "brain: band 6",
    }
    sizes = {"train": [2000, 2000, 2000, 71], "val": [500, 500, 330, 18], "test": [1000, 1000, 645, 24]}
    for part in PARTS:
        entries = data.part(part).entries
        assert entries["domain"].bincount().tolist() == sizes[part]
        label, domain = entries["label"], entries["domain"]
        counts = label.bincount(minlength=43)
        assert (counts > 0).all(), "each part has all classes"
        for first, last, name in ((0, 10, "fashion"), (10, 20, "mnist"), (20, 37, "emoji"), (37, 43, "brain")):
            own = (label >= first) & (label < last)
            assert (domain[own] == data.domain_names.index(name)).all()
        assert set(counts[:20].tolist()) == {sizes[part][0] // 10}
        images = data.part(part).images
        assert isinstance(images, Tensor) and images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert not data.flip


def test_images_and_labels_are_those_of_the_files() -> None:
    data = Modalities(["mnist", "fashion"], image_size=28, test_size=None)
    test, official = data.part("test"), FashionMNIST().official("test")
    assert torch.equal(test.images[2000:], official[0].expand(-1, 3, -1, -1))  # type: ignore[index]
    assert torch.equal(test.entries["label"][2000:], official[1] + 10)
    brain, emoji = (Modalities([name], image_size=64) for name in ("brain", "emoji"))
    with np.load(BRAIN) as arrays:
        slices = torch.from_numpy(arrays["images"])
    bands = [list(map(int, band)) for band in np.array_split(np.arange(131), 6)]
    assert [len(band) for band in bands] == [22, 22, 22, 22, 22, 21]
    for part, places in {
        "train": [*range(6), *range(16, 22)],
        "val": [12, 13, 14],
        "test": [7, 8, 9, 10],
    }.items():
        wanted = [(band[i], number) for number, band in enumerate(bands) for i in places if i < len(band)]
        found = brain.part(part)  # type: ignore[arg-type]
        assert torch.equal(found.images[:, 1], slices[[place for place, _ in wanted]])  # type: ignore[index]
        assert found.entries["label"].tolist() == [number for _, number in wanted]
    small = EmojiDomains(["fluent"], ["openmoji"]).part("test")
    large = v2.functional.resize(small.images, [64, 64], antialias=True)  # type: ignore[arg-type]
    among = dict(zip(pixels(emoji.part("test")), labels(emoji, "test"), strict=True))
    assert [among[image.numpy().tobytes()] for image in large] == small.entries["label"].tolist()


def test_no_picture_is_in_two_parts() -> None:
    data = Modalities(["fashion", "mnist"], train_size=None, test_size=None)
    parts = [pixels(data.part(part)) for part in PARTS]
    assert [len(rows) for rows in parts] == [9500 + 7500, 1000, 4000]
    sets = [set(rows) for rows in parts]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_no_concept_is_in_two_parts() -> None:
    every = {part: EmojiDomains(modalities.STYLES, modalities.STYLES).part(part) for part in PARTS}  # type: ignore[arg-type]
    concept = {row: int(c) for e in every.values() for row, c in zip(pixels(e), e.entries["concept"], strict=True)}
    data = Modalities(["emoji"], train_size=None)
    found = [{concept[row] for row in pixels(data.part(part))} for part in PARTS]
    assert [len(part) for part in found] == [455, 66, 129]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert [len(data.part(part)) for part in PARTS] == [455 * 5 - 1, 66 * 5, 129 * 5]
    drawn = [set(pixels(data.part(part))) for part in PARTS]
    assert not (drawn[0] & drawn[1] or drawn[0] & drawn[2] or drawn[1] & drawn[2]), "nor is a drawing"


def test_no_slice_is_in_two_parts_nor_next_to_one_of_its_band_in_another() -> None:
    with np.load(BRAIN) as arrays:
        place = {np.repeat(image[None], 3, 0).tobytes(): i for i, image in enumerate(arrays["images"][:131])}
    data = Modalities(["brain"], image_size=64)
    where = {part: [place[row] for row in pixels(data.part(part))] for part in PARTS}
    band = {i: label for part in PARTS for i, label in zip(where[part], labels(data, part), strict=True)}
    assert len(band) == sum(map(len, where.values())) == 71 + 18 + 24, "no slice is in two parts"
    assert [band[i] for i in sorted(band)] == sorted(band.values()), "bands follow each other"
    own = {i: part for part in PARTS for i in where[part]}
    for i in band:
        if i + 1 in band and band[i] == band[i + 1]:
            assert own[i] == own[i + 1]


def test_a_modality_is_held_out_and_can_be_probed() -> None:
    whole, data = Modalities(image_size=16), Modalities(held_out="mnist", image_size=16)
    assert data.domain_names == ["fashion", "emoji", "brain"] and data.num_classes == 33
    assert not any(name.startswith("mnist") for name in data.class_names)
    for part in PARTS:
        domain = whole.part(part).entries["domain"]
        kept = pixels(whole.part(part))
        assert pixels(data.part(part)) == [row for row, d in zip(kept, domain, strict=True) if d != 1]
        names = [data.class_names[i] for i in labels(data, part)]
        assert names == [whole.class_names[i] for i, d in zip(labels(whole, part), domain, strict=True) if d != 1]
    for examples, part in zip(data.probe_sets(), ("train", "test"), strict=True):
        domain = whole.part(part).entries["domain"]
        assert pixels(examples) == [r for r, d in zip(pixels(whole.part(part)), domain, strict=True) if d == 1]
        assert examples.entries["label"].tolist() == (whole.part(part).entries["label"][domain == 1] - 10).tolist()
        assert not examples.entries["domain"].any() and examples.transform is None
    absent = Modalities(["fashion"], held_out="brain")
    assert absent.num_classes == 10 and [len(part) for part in absent.probe_sets()] == [71, 24]
    assert "--data.held_out to one of: fashion, mnist, emoji, brain" in said(ValueError, whole.probe_sets)


def test_the_choice_of_images_does_not_depend_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(int(seed))
        data = Modalities(train_size=50, val_size=30, test_size=40)
        found.append([pixels(data.part(part)) for part in PARTS])
    assert found[0] == found[1]
    assert [len(rows) for rows in found[0]] == [200, 108, 144]
    more = Modalities(train_size=60, val_size=30, test_size=40)
    assert set(found[0][0]) < set(pixels(more.part("train"))), "what is chosen stays so in a larger size"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(any), st.integers(1, 60), st.integers(0, 99))
def test_images_are_spread_over_the_classes(counts: list[int], size: int, seed: int) -> None:
    label = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))]
    chosen = spread(label, size)
    assert chosen.tolist() == sorted(set(chosen.tolist())) and len(chosen) == min(size, len(label))
    share = label[chosen].bincount(minlength=len(counts)).tolist()
    assert all(s == n or s >= max(share) - 1 for s, n in zip(share, counts, strict=True))
    cut = [s for s, n in zip(share, counts, strict=True) if s < n]
    assert cut == sorted(cut, reverse=True), "what doesn't divide evenly goes to the first classes"
    assert set(chosen.tolist()) <= set(spread(label, size + 1).tolist())
    assert spread(label, None).tolist() == list(range(len(label)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(8, 40), st.integers(8, 40))
def test_images_become_coloured_squares(number: int, channels: int, side: int, size: int) -> None:
    images = torch.from_numpy(noise(number, channels, side, side))
    found = coloured(images, size)
    assert found.shape == (number, 3, size, size) and found.dtype == torch.uint8
    wanted = v2.functional.resize(images, [size, size], antialias=True).expand(-1, 3, -1, -1)
    assert torch.equal(found, wanted)


def test_modalities_say_what_is_wrong() -> None:
    for change, message in {
        "x": ({"modalities": ["x"]}, "no modality 'x'; there are: fashion, mnist, emoji, brain"),
        "twice": ({"modalities": ["mnist", "mnist"]}, "name each modality once"),
        "held": ({"held_out": "x"}, "no modality 'x'; there are: fashion"),
        "rest": ({"modalities": ["mnist"], "held_out": "mnist"}, "nothing is left to train on without 'mnist'"),
        "train": ({"train_size": 0}, "train_size must be at least 1, not 0"),
        "val": ({"val_size": 0}, "val_size must be at least 1, not 0"),
        "test": ({"test_size": -1}, "test_size must be at least 1, not -1"),
        "size": ({"image_size": 4}, "image_size must be at least 8, not 4"),
    }.values():
        assert message in said(ValueError, lambda change=change: Modalities(**change))
    greedy = Modalities(["mnist"], val_size=8000)
    assert "'mnist' has 8000 images to train and validate on: lower val_size" in said(
        ValueError, lambda: greedy.part("train")
    )


# ---------------------------------------------------------------------- MedMNIST


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of 30, 10 and 20 images."""
    facts = {flag: facts._replace(train=30, val=10, test=20) for flag, facts in SETS.items()}
    monkeypatch.setattr(medmnist, "SETS", facts)


def write(root: Path, flag: str, size: int = 28, compressed: bool = True, **other: np.ndarray) -> dict[str, np.ndarray]:
    """A set in the official layout; ``other`` replaces arrays of it."""
    facts, arrays = SETS[flag], {}
    for part, number in {"train": 30, "val": 10, "test": 20}.items():
        arrays[f"{part}_images"] = noise(number, size, size, *((3,) if facts.channels == 3 else ()))
        label = np.arange(number)[:, None] % len(facts.classes)
        if flag == "chestmnist":
            label = (np.arange(number)[:, None] == 2 * np.arange(14)).astype(int)
        arrays[f"{part}_labels"] = label.astype(np.uint8)
    arrays |= other
    name = f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"
    (np.savez_compressed if compressed else np.savez)(root / name, **arrays)
    return arrays


def test_the_table_of_sets() -> None:
    """Against the paper's table (arXiv 2110.14795), and what medmnist 3.0.2 says of the organ sets."""
    of = {f.removesuffix("mnist"): (sum(facts[:3]), facts.channels, len(facts.classes)) for f, facts in SETS.items()}
    assert of == {
        "path": (107_180, 3, 9),
        "chest": (112_120, 1, 14),
        "derma": (10_015, 3, 7),
        "oct": (109_309, 1, 4),
        "pneumonia": (5_856, 1, 2),
        "retina": (1_600, 3, 5),
        "breast": (780, 1, 2),
        "blood": (17_092, 3, 8),
        "tissue": (236_386, 1, 8),
        "organa": (34_561 + 6_491 + 17_778, 1, 11),
        "organc": (12_975 + 2_392 + 8_216, 1, 11),
        "organs": (13_932 + 2_452 + 8_827, 1, 11),
    }


@pytest.mark.parametrize("flag", SETS)
def test_each_set_is_read_in_its_official_parts(flag: str, small: None, tmp_path: Path) -> None:
    arrays = write(tmp_path, flag)
    task: Any = "binary" if flag == "chestmnist" else None
    data = MedMNIST(flag, str(tmp_path), task=task, batch_size=4)
    names = list(SETS[flag].classes) if task is None else ["no finding", "finding"]
    assert data.class_names == names and data.num_classes == len(names) and data.domain_names == [flag]
    assert data.in_chans == SETS[flag].channels and data.image_size == 28
    for part in PARTS:
        examples = data.part(part)
        images = torch.from_numpy(arrays[f"{part}_images"])
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        order = torch.randperm(len(examples))
        assert torch.equal(examples.images[order], images[order])  # type: ignore[index]
        label = arrays[f"{part}_labels"]
        assert labels(data, part) == (label[:, 0] if task is None else label.any(1)).astype(int).tolist()
        assert not examples.entries["domain"].any()
    assert data.flip == (not flag.startswith("organ")), "left and right are classes of the organ sets"
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, data.in_chans, 28, 28) and batch["image"].dtype == torch.float32


@pytest.mark.parametrize("compressed", [True, False])
def test_the_larger_sizes_have_files_of_their_own(compressed: bool, small: None, tmp_path: Path) -> None:
    arrays = write(tmp_path, "bloodmnist", 64, compressed)
    data = MedMNIST("bloodmnist", str(tmp_path), size=64)
    assert data.image_size == 64 and data.file == tmp_path / "bloodmnist_64.npz"
    images = data.part("val").images
    assert isinstance(images, Pictures) and isinstance(images.array, np.memmap) != compressed
    index = torch.tensor([3, 9])
    assert torch.equal(images[index], torch.from_numpy(arrays["val_images"][[3, 9]]).permute(0, 3, 1, 2))


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.sampled_from([1, 3]), st.integers(8, 40), st.integers(8, 40), st.lists(st.integers(0, 5)))
def test_pictures_come_in_any_size_and_number_of_channels(
    colour: bool, channels: int, side: int, size: int, rows: list[int]
) -> None:
    rows = [*rows, 2]
    array = noise(6, side, side, *((3,) if colour else ()))
    pictures = Pictures(array, channels, size)
    assert len(pictures) == 6 and pictures.shape == (6, channels, size, size)
    found = pictures[torch.tensor(rows)]
    wanted = torch.from_numpy(array[rows])
    wanted = wanted.permute(0, 3, 1, 2) if colour else wanted.unsqueeze(1).expand(-1, channels, -1, -1)
    wanted = rgb_to_grayscale(wanted) if colour and channels == 1 else wanted
    assert torch.equal(found, v2.functional.resize(wanted, [size, size], antialias=True))


def test_medmnist_in_other_sizes_and_channels(small: None, tmp_path: Path) -> None:
    write(tmp_path, "octmnist")
    data = MedMNIST("octmnist", str(tmp_path), image_size=32, in_chans=3, flip=False)
    assert (data.in_chans, data.image_size, data.flip) == (3, 32, False)
    image = data.part("test")[0]["image"]
    assert image.shape == (3, 32, 32) and torch.equal(image[0], image[2])


def test_medmnist_says_what_is_wrong(small: None, tmp_path: Path) -> None:
    root, arrays = str(tmp_path), write(tmp_path, "retinamnist")
    assert "no set 'xmnist'; there are: pathmnist, chestmnist" in said(ValueError, lambda: MedMNIST("xmnist", root))
    for change, message in {
        "size": ({"size": 32}, "28, 64, 128 and 224 pixels, not 32: set image_size"),
        "image_size": ({"image_size": 7}, "image_size must be at least 8, not 7"),
        "in_chans": ({"in_chans": 2}, "in_chans must be 1 or 3, not 2"),
        "task": ({"task": "binary"}, "'retinamnist' has one label an image, so leave task out"),
    }.values():
        assert message in said(ValueError, lambda change=change: MedMNIST("retinamnist", root, **change))
    assert "14 labels an image, but classifiers here learn one: --data.task binary asks" in said(
        ValueError, lambda: MedMNIST("chestmnist", root)
    )
    missing = said(FileNotFoundError, lambda: MedMNIST("pathmnist", root, size=128).part("val"))
    assert f"{tmp_path / 'pathmnist_128.npz'} is not there" in missing
    assert "https://zenodo.org/records/10519652/files/pathmnist_128.npz?download=1" in missing

    def after(message: str, **other: Any) -> None:
        write(tmp_path, "retinamnist", **other)
        found = said(ValueError, lambda: MedMNIST("retinamnist", root).part("val"))
        assert message in found and "10519652/files/retinamnist.npz" in found

    after("retinamnist has 10 images of val, but 9 are in", val_images=arrays["val_images"][:9])
    after("val_images uint8 (10, 28, 28, 3) and val_labels (10, 1), but has", val_images=noise(10, 28, 28))
    after("but has uint8 (10, 28, 28, 3) and (10, 2)", val_labels=np.zeros((10, 2), np.uint8))
    after("but has float32 (10, 28, 28, 3)", val_images=noise(10, 28, 28, 3).astype(np.float32))
    after("has val_labels from 0 to 5, but those of retinamnist are 0 to 4", val_labels=np.arange(10)[:, None] % 6)
    after("has val_labels from -1 to 0", val_labels=np.arange(10)[:, None] % 2 - 1)
    (tmp_path / "retinamnist.npz").write_bytes(b"cut short")
    assert "can't be read" in said(ValueError, lambda: MedMNIST("retinamnist", root).part("val"))
    np.savez(tmp_path / "retinamnist.npz", other=noise(3))
    assert "can't be read" in said(ValueError, lambda: MedMNIST("retinamnist", root).part("val"))


# ---------------------------------------------------------------------- RadImageNet


@pytest.fixture
def radiology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes of three modalities with two, one and one images in the parts, whose value is their number."""
    number = 0
    for part, each in {"train": 2, "val": 1, "test": 1}.items():
        lines = ["filename,label"]
        for folder, label in {
            "CT/lung/normal": "lung-normal",
            "CT/abd/normal": "abd-normal",
            "MR/abd/normal": "mriabd-normal",
            "US/thyroid": "thyroid_us",
        }.items():
            for _ in range(each):
                name = f"radiology_ai/{folder}/{number:03}.png"
                save(tmp_path / name, number)
                lines.append(f"{name},{label}")
                number += 1
        (tmp_path / f"RadiologyAI_{part}.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(RadImageNet, "classes", 4)
    return tmp_path


def test_radimagenet_by_its_lists(radiology: Path) -> None:
    data = RadImageNet(str(radiology), image_size=16, batch_size=4)
    assert data.class_names == ["abd-normal", "lung-normal", "mriabd-normal", "thyroid_us"]
    assert data.domain_names == ["CT", "MR", "US"] and data.num_classes == 4 and data.num_workers == 8
    assert [values(data, part) for part in PARTS] == [list(range(8)), list(range(8, 12)), list(range(12, 16))]
    assert labels(data, "train") == [1, 1, 0, 0, 2, 2, 3, 3] and labels(data, "val") == [1, 0, 2, 3]
    assert data.part("train").entries["domain"].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert data.part("test").images is not None and data.part("test").size == (16, 16)
    lazy = RadImageNet(str(radiology), num_workers=0, memory_gb=0.0, batch_size=4)
    assert lazy.part("train").images is None
    assert next(iter(lazy.train_dataloader()))["image"].shape == (4, 3, 224, 224)
    # the lists may lie among the images, and root may be their folder; the columns' order doesn't matter, nor a mark
    for part in PARTS:
        file = radiology / f"RadiologyAI_{part}.csv"
        lines = [",".join(reversed(line.split(","))) for line in file.read_text().split()]
        (radiology / "radiology_ai" / file.name).write_text("\n".join(lines), encoding="utf-8-sig")
        file.unlink()
    for root in (radiology, radiology / "radiology_ai"):
        assert values(RadImageNet(str(root)), "val") == [8, 9, 10, 11]


def test_radimagenet_says_what_is_wrong(radiology: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(radiology)
    nowhere = said(FileNotFoundError, lambda: RadImageNet(str(radiology / "x")))
    assert f"{radiology / 'x' / 'RadiologyAI_train.csv'} is not there" in nowhere
    assert "radiology_ai/<CT, MR or US>/<anatomy>/<pathology>/*.png" in nowhere and "radimagenet.com" in nowhere
    assert "image_size must be at least 8, not 4" in said(ValueError, lambda: RadImageNet(root, image_size=4))
    (radiology / "radiology_ai" / "US" / "thyroid" / "011.png").unlink()
    gone = said(FileNotFoundError, lambda: RadImageNet(root).part("val"))
    assert f"1 of the 4 images in {radiology / 'RadiologyAI_val.csv'} are missing" in gone and "thyroid/011.png" in gone
    for line, message in {
        "radiology_ai/CT/lung/normal/008.png,other": "008.png is of class 'other', which training hasn't",
        "radiology_ai/XR/lung/008.png,lung-normal": "008.png is in none of ('CT', 'MR', 'US')",
        "radiology_ai/PET/normal/CT,lung-normal": "normal/CT is in none of",
    }.items():
        (radiology / "RadiologyAI_val.csv").write_text(f"filename,label\n{line}\n")
        assert message in said(ValueError, lambda: RadImageNet(root).part("val"))
    for text in ("file,label\na,b\n", "filename,label\na\n", ""):
        (radiology / "RadiologyAI_val.csv").write_text(text)
        assert "must have the columns filename and label" in said(ValueError, lambda: RadImageNet(root).part("val"))
    monkeypatch.undo()
    assert "names 4 classes, but RadImageNet has 165" in said(ValueError, lambda: RadImageNet(root))


# ---------------------------------------------------------------------- anybody's folders


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Five, one and two images of each of two classes, whose value is their number."""
    number = 0
    for part, each in {"train": 5, "val": 1, "test": 2}.items():
        for name in ("b", "a"):
            for i in range(each):
                save(tmp_path / part / name / (f"{i}.png" if i else "deep/0.PNG"), number)
                number += 1
            save(tmp_path / part / name / ".hidden" / "x.png", 255)
            (tmp_path / part / name / "notes.txt").write_text("no image")
        save(tmp_path / part / ".ipynb_checkpoints" / "x.png", 255)
        save(tmp_path / part / "loose.png", 255)
    return tmp_path


def test_folders_are_parts_and_classes(own: Path) -> None:
    data = Folders(str(own), image_size=16, batch_size=5)
    assert data.class_names == ["a", "b"] and data.num_classes == 2 and data.domain_names == [own.name]
    assert [sorted(values(data, part)) for part in PARTS] == [list(range(10)), [10, 11], [12, 13, 14, 15]]
    assert labels(data, "train") == [0] * 5 + [1] * 5 and labels(data, "test") == [0, 0, 1, 1]
    assert values(data, "test")[:2] == [15, 14], "files are in the order of their names"
    assert next(iter(data.train_dataloader()))["image"].shape == (5, 3, 16, 16)
    assert Folders(str(own), memory_gb=0.0).part("test").images is None
    (own / "test" / "a" / "1.png").write_text("no image")
    assert len(Folders(str(own), on_corrupt="skip").part("test")) == 3
    assert "a/1.png can't be read" in said(ValueError, lambda: Folders(str(own)).part("test"))


def test_folders_hold_validation_images_out_of_training(own: Path) -> None:
    for file in sorted((own / "val").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (own / "val").rmdir()
    data = Folders(str(own), val_size=4)
    train, val = (values(data, part) for part in ("train", "val"))
    assert sorted(train + val) == list(range(10)) and labels(data, "val") == [0, 0, 1, 1]
    assert labels(data, "train") == [0, 0, 0, 1, 1, 1]
    assert all((value >= 5) == (label == 0) for value, label in zip(val, labels(data, "val"), strict=True))
    assert values(Folders(str(own), val_size=4, seed=9), "val") == val, "the same images in all runs"
    alone = said(FileNotFoundError, lambda: Folders(str(own)).part("val"))
    assert f"there is no folder {own / 'val'}" in alone and "--data.val_size" in alone
    assert "takes 5 images of a class, but 'a' has 5: lower --data.val_size" in said(
        ValueError, lambda: Folders(str(own), val_size=9).part("train")
    )


def test_folders_cut_out_the_middle_or_squash(tmp_path: Path) -> None:
    picture = np.zeros((8, 24), np.uint8)
    picture[:, 8:16] = 200
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(picture).save(tmp_path / "train" / "a" / "x.png")
    assert values(Folders(str(tmp_path), image_size=8, crop=1.0), "train") == [200]
    assert 50 < values(Folders(str(tmp_path), image_size=8), "train")[0] < 80


def test_folders_say_what_is_wrong(own: Path, tmp_path: Path) -> None:
    root = str(own)
    for change, message in {
        "image_size": ({"image_size": 4}, "image_size must be at least 8, not 4"),
        "val_size": ({"val_size": 0}, "val_size must be at least 1, not 0"),
        "crop": ({"crop": 0.5}, "crop must be 0 or at least 1, not 0.5"),
    }.values():
        assert message in said(ValueError, lambda change=change: Folders(root, **change))
    assert f"there is no folder {own / 'x' / 'train'}" in said(FileNotFoundError, lambda: Folders(str(own / "x")))
    both = said(ValueError, lambda: Folders(root, val_size=2).part("train"))
    assert f"there is {own / 'val'}: leave one of the two out" in both
    save(own / "test" / "c" / "x.png")
    strange = said(ValueError, lambda: Folders(root).part("test"))
    assert f"{own / 'test' / 'c'}: {own / 'train'} has no class 'c', but a, b" in strange
    (own / "train" / "c").mkdir()
    assert f"there is no image in {own / 'train' / 'c'}" in said(FileNotFoundError, lambda: Folders(root).part("train"))
    (own / "empty" / "train").mkdir(parents=True)
    assert "has no folders: put the images of each class into one" in said(
        FileNotFoundError, lambda: Folders(str(own / "empty"))
    )
    for file in [*(own / "val" / "a").rglob("*.*"), *(own / "val" / "b").rglob("*.*")]:
        if file.is_file() and ".hidden" not in file.parts:
            file.unlink()
    assert f"there is no image in {own / 'val'} (looked for .jpg" in said(
        FileNotFoundError, lambda: Folders(root).part("val")
    )


def test_the_new_data_are_all_exported() -> None:
    import datamodules

    for name in ("Folders", "MedMNIST", "Modalities", "RadImageNet"):
        assert name in datamodules.__all__ and issubclass(getattr(datamodules, name), ImageDataModule)
    assert set(MODALITIES) == {"fashion", "mnist", "emoji", "brain"} and MODALITIES["emoji"].classes == EMOJI
