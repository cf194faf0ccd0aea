"""Captioned emoji: what is kept out of training, and captions that depend on seed, epoch and index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules import EmojiCaptions, EmojiDomains
from datamodules.captions import CLASS_TEXTS, SENTENCES, Captions, caption, family, words
from datamodules.emoji import CLASSES, FOLDER, STYLES
from datamodules.sampling import Draw

#: What no two of an emoji's spellings differ by.
PLAIN = str.maketrans("", "", "-")


@pytest.fixture(scope="module")
def captions() -> Captions:
    return Captions()


def test_concepts_of_validation_and_test_are_kept_out_by_code_point(captions: Captions) -> None:
    with np.load(FOLDER / "captions.npz") as arrays:
        points = [str(p).lower().replace("fe0f", "").translate(PLAIN) for p in arrays["codepoints"]]
    with np.load(FOLDER / "concepts.npz") as arrays:
        kept_out = {
            str(p).lower().replace("fe0f", "").translate(PLAIN)
            for p, s in zip(arrays["codepoints"], arrays["split"], strict=True)
            if s in ("val", "test")
        }
    data = EmojiCaptions(batch_size=4)
    trained = {points[i] for i in data.part("train").entries["concept"].tolist()}
    assert len(kept_out) == 66 + 129 and len(trained) > 1400
    assert not trained & kept_out
    for part, size in (("val", 66), ("test", 129)):
        there = {points[i] for i in data.part(part).entries["concept"].tolist()}  # type: ignore[arg-type]
        assert len(there) == size and there <= kept_out
        assert len(data.part(part)) == size * len(STYLES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f468-200d-2696-fe0f", "1f469-200d-2696-fe0f"),  # man judge, woman judge
        ("1f9d1-200d-2696-fe0f", "1f469-200d-2696-fe0f"),  # judge, woman judge
        ("1f9db", "1f9db-200d-2640-fe0f"),  # vampire, woman vampire
        ("2764-fe0f", "2764"),
        ("1f44b", "1f44b-1f3fb"),  # skin
    ],
)
def test_what_is_drawn_nearly_alike_is_one_family(one: str, other: str) -> None:
    assert family(one) == family(other)


def test_families_keep_others_apart(captions: Captions) -> None:
    assert family("1f600") != family("1f601") and family("1f468-200d-2696") != family("1f468-200d-1f373")
    test = {captions.name[i] for i in np.flatnonzero(captions.held == "test")}
    assert {"astronaut", "man astronaut", "woman astronaut"} <= test


def test_drawings_are_those_of_the_domains() -> None:
    captions, data = EmojiCaptions(batch_size=4), EmojiDomains(sources=STYLES, targets=STYLES, translate=0.0)
    for part in ("val", "test"):
        ours, theirs = captions.part(part), data.part(part)  # type: ignore[arg-type]
        assert isinstance(ours.images, torch.Tensor) and isinstance(theirs.images, torch.Tensor)
        assert sorted(ours.entries["label"].tolist()) == sorted(theirs.entries["label"].tolist())
        bytes_of = [{bytes(i.numpy().tobytes()) for i in s.images} for s in (ours, theirs)]  # type: ignore[union-attr]
        assert bytes_of[0] == bytes_of[1]


def test_styles_lack_what_they_lack() -> None:
    train = EmojiCaptions(batch_size=4).part("train")
    per_style = torch.bincount(train.entries["domain"], minlength=5)
    assert per_style[0] == per_style[1] == per_style[3] and per_style[2] == per_style[4] < per_style[0]
    assert isinstance(train.images, torch.Tensor)
    blank = (train.images == 255).flatten(1).all(1)
    assert not blank.any()


def test_captions_depend_on_seed_epoch_and_index_alone() -> None:
    one, other = EmojiCaptions(batch_size=4, seed=3).part("train"), EmojiCaptions(batch_size=9, seed=3).part("train")
    draws = [Draw(2, i) for i in (5, 900, 17)]
    texts = one.__getitems__(draws)["text"]
    assert texts[::-1] == other.__getitems__(draws[::-1])["text"]
    assert texts != one.__getitems__([Draw(3, d.position) for d in draws])["text"]
    assert texts != EmojiCaptions(batch_size=4, seed=4).part("train").__getitems__(draws)["text"]


def test_a_caption_says_only_what_is_known_of_its_emoji(captions: Captions) -> None:
    rng = np.random.default_rng(0)
    for i in range(0, 1644, 7):
        text = caption(captions.name[i], captions.keywords[i], rng)
        known = {*words(captions.name[i]), *words(" ".join(captions.keywords[i])), *words("a photo of a")}
        assert words(text) and set(words(text)) <= known


def test_the_vocabulary_is_of_training(captions: Captions) -> None:
    vocabulary = captions.vocabulary()
    assert len(vocabulary) == len(set(vocabulary))
    training = set(words("a photo of a " + " ".join([*CLASSES, *CLASS_TEXTS.values()])))
    for i in np.flatnonzero(captions.held == "train"):
        training |= {*words(captions.name[i]), *words(" ".join(captions.keywords[i]))}
    assert set(vocabulary) <= training


def test_sentences_are_of_training_concepts(captions: Captions) -> None:
    sentences = captions.sentences()
    assert list(sentences) == list(CLASSES) and {len(s) for s in sentences.values()} == {SENTENCES}
    assert sentences == Captions().sentences()
    for number, name in enumerate(CLASSES):
        known = set(words(CLASS_TEXTS.get(name, name)))
        for i in np.flatnonzero((captions.label == number) & (captions.split == "train")):
            known |= set(words(" ".join(captions.keywords[i])))
        assert {w for s in sentences[name] for w in words(s)} <= known


def test_a_small_image_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 8, not 4"):
        EmojiCaptions(image_size=4)
