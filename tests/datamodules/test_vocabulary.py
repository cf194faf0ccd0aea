"""Vocabularies, and word vectors from files as fastText and GloVe write them."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import vocabulary
from datamodules.vocabulary import check_vocabulary, most_frequent, read_vectors

# ---------------------------------------------------------------------- the words


def test_most_frequent_first_and_ties_by_the_alphabet() -> None:
    counts = {"pear": 2, "fig": 5, "apple": 2, "plum": 1}
    assert most_frequent(counts) == ["<pad>", "<unk>", "fig", "apple", "pear", "plum"]
    assert most_frequent(counts, min_count=2) == ["<pad>", "<unk>", "fig", "apple", "pear"]
    assert most_frequent(counts, max_words=2) == ["<pad>", "<unk>", "fig", "apple"]
    assert most_frequent({}) == ["<pad>", "<unk>"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh")), st.integers(1, 4), st.integers(1, 5))
def test_what_is_left_out_is_rarer(text: list[str], least: int, most: int) -> None:
    counts = Counter(text)
    kept = most_frequent(counts, least, most)[2:]
    assert kept == most_frequent(Counter(sorted(text, reverse=True)), least, most)[2:], "the order of reading counts"
    out = [w for w in counts if w not in kept]
    assert len(kept) <= most and all(counts[w] >= least for w in kept)
    assert all((counts[a], b) > (counts[b], a) for a in kept for b in out) or not kept
    assert all(counts[w] < least for w in out) or len(kept) == most


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], "begins with <pad> and <unk>, not with a, b"),
        ([], "not with nothing"),
        (["<unk>", "<pad>"], "begins with"),
        (["<pad>", "<unk>", "a", "b", "a"], "the word 'a' is twice"),
    ],
)
def test_what_is_no_vocabulary(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_vocabulary(words)


# ---------------------------------------------------------------------- vectors

GLOVE = "the 0.5 -1 2e-1\n, 1 2 3\n. . . 7 7 7\nat name@domain.com 4 5 6\ncafé -0.25 0 1\nthe 9 9 9\n"


def file(tmp_path: Path, content: str, name: str = "vectors.txt") -> Path:
    made = tmp_path / name
    made.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return made


def fasttext(content: str) -> str:
    """As fastText writes it: how many words and numbers first, and a blank at the end of each line."""
    lines = content.splitlines()
    return "\n".join([f"{len(lines)} 3", *(f"{line} " for line in lines), ""])


@pytest.mark.parametrize("name", ["v.txt", "v.txt.gz", "v.vec", "v.vec.gz"])
@pytest.mark.parametrize("dim", [None, 3])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_only_the_words_asked_for(tmp_path: Path, name: str, dim: int | None, ends: str) -> None:
    content = (fasttext(GLOVE) if ".vec" in name else GLOVE).replace("\n", ends)
    words = ["<pad>", "<unk>", "café", "missing", "the", "at name@domain.com"]
    vectors, found = read_vectors(file(tmp_path, content, name), words, dim)
    assert found.tolist() == [False, False, True, False, True, True] and found.dtype == torch.bool
    assert vectors.dtype == torch.float32 and vectors.shape == (6, 3)
    wanted = [[0, 0, 0], [0, 0, 0], [-0.25, 0, 1], [0, 0, 0], [0.5, -1, 0.2], [4, 5, 6]]
    assert torch.equal(vectors, torch.tensor(wanted)), "of words that come twice the first counts"


def test_padding_has_no_vector_whatever_the_file_says(tmp_path: Path) -> None:
    vectors, found = read_vectors(file(tmp_path, "<pad> 1 2\n<unk> 3 4\n"), ["<pad>", "<unk>"])
    assert vectors.tolist() == [[0, 0], [3, 4]] and found.tolist() == [False, True]


def test_a_word_may_be_a_number_or_any_other_sign(tmp_path: Path) -> None:
    content = "2002 1 2 3\n\u00a0 4 5 6\n\u2028 7 8 9\nnan 1 1 1\n"  # a line ends with \n and with nothing else
    vectors, found = read_vectors(file(tmp_path, content), ["2002", "\u00a0", "\u2028", "nan"])
    assert found.all() and vectors.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_is_written_is_read(tmp_path_factory: Any, data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 5))
    numbers = st.lists(st.floats(-9, 9, width=32), min_size=dim, max_size=dim)
    table = data.draw(st.dictionaries(st.text("abcü,-", min_size=1, max_size=4), numbers, min_size=1, max_size=8))
    wanted = data.draw(st.permutations([*list(table)[::2], "not there"]))
    content = "".join(f"{word} {' '.join(map(repr, row))}\n" for word, row in table.items())
    if data.draw(st.booleans()):
        content = f"{len(table)} {dim}\n{content}"
    vectors, found = read_vectors(file(tmp_path_factory.mktemp("v"), content), wanted)
    assert found.tolist() == [word in table for word in wanted]
    assert torch.equal(vectors, torch.tensor([table.get(word, [0.0] * dim) for word in wanted]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("a 1 2 3\nb 1 2\n", "line 2: 2 numbers, but the lines above have 3"),
        ("a 1 2 3\nb 1 2 3 4\n", "line 2: 4 numbers, but the lines above have 3"),
        ("a 1 2 3\nb 1 2 3\n\n", "line 3: 0 numbers"),
        ("9 3\na 1 2 3\nc 1 2 3 4 \n", "line 3: 4 numbers, but the lines above have 3"),
        ("a 1 2 3\nwanted 1 x 3\n", "line 2: what follows 'wanted' isn't all numbers"),
        ("a 1 2 3\nwanted 1 nan 3\n", "line 2: what follows 'wanted' isn't all numbers"),
        ("PK\x03\x04 and so on\n", "line 1: expected a word and numbers"),
        ("some words\nand more\n", "line 1: expected a word and numbers"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_vectors(file(tmp_path, content), ["wanted"])
    assert "\n" not in str(error.value) and "vectors.txt" in str(error.value)


@pytest.mark.parametrize("content", [GLOVE, fasttext(GLOVE)])
def test_vectors_of_another_size_than_the_models(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="has vectors of 3 numbers, but the model's words have 300"):
        read_vectors(file(tmp_path, content), ["the"], 300)


def test_no_file_and_one_that_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*none.vec"):
        read_vectors(tmp_path / "none.vec", ["a"])
    whole = gzip.compress(("a 1 2\n" * 1000).encode())
    cut = tmp_path / "cut.vec.gz"
    for content in (whole[: len(whole) // 2], b"not packed at all"):
        cut.write_bytes(content)
        with pytest.raises(ValueError, match="can't be unpacked"):
            read_vectors(cut, ["a"])


def test_the_progress_of_a_large_file_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(vocabulary, "LARGE", 0)
    with caplog.at_level("INFO"):
        read_vectors(file(tmp_path, "a 1\n" * 20_001), ["a"])
    assert "reading vectors.txt" in caplog.text and "vectors of 1 of 1 words" in caplog.text
