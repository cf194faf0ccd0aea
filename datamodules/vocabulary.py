"""The words that a model of texts knows, and vectors for them from files of fastText or GloVe."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.loading import progress

log = logging.getLogger(__name__)
#: The first two words of every vocabulary.
PAD, UNKNOWN = "<pad>", "<unk>"
#: Megabytes of a file whose reading is shown.
LARGE = 200


def most_frequent(counts: Mapping[str, int], min_count: int = 1, max_words: int | None = None) -> list[str]:
    """A vocabulary: ``<pad>``, ``<unk>``, then words from the most frequent on, those alike in alphabetical order.

    Args:
        counts: how often each word occurs.
        min_count: rarer words are left out.
        max_words: at most so many, without the first two.
    """
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    return [PAD, UNKNOWN, *words[:max_words]]


def check_vocabulary(words: Sequence[str]) -> None:
    """ValueError for a list that doesn't begin with ``<pad>`` and ``<unk>``, or has a word twice."""
    if list(words[:2]) != [PAD, UNKNOWN]:
        raise ValueError(f"a vocabulary begins with {PAD} and {UNKNOWN}, not with {', '.join(words[:2]) or 'nothing'}")
    if len(set(words)) != len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise ValueError(f"the word '{twice}' is twice in the vocabulary")


# ---------------------------------------------------------------------- vectors


def _numbers(values: Iterable[bytes]) -> list[float] | None:
    """The numbers that these bytes write; None if one isn't a finite number."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def _columns(line: bytes) -> int:
    """How many numbers a line ends with, behind a word of at least one piece."""
    pieces = line.split(b" ")[1:]
    count = 0
    while count < len(pieces) and _numbers(pieces[len(pieces) - count - 1 :][:1]) is not None:
        count += 1
    return count


def read_vectors(file: Path, words: Sequence[str], dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Vectors of these words from a text file of fastText (``.vec``) or GloVe (``.txt``), also packed (``.gz``).

    A line is a word and its numbers, between blanks. The first line of fastText's files says how many words and
    columns there are; GloVe's have none. Words of several pieces (GloVe 840B has some) are words too. Of a word that
    comes twice the first line counts. The file is read line by line, and nothing but the words asked for is kept.

    Args:
        file: the file, of any size.
        words: what to look for, as it is written; ``<pad>`` never has a vector.
        dim: how many columns the model wants; any number if omitted.

    Returns:
        Vectors float32 (len(words), D), zero for words that weren't found, and which were, bool (len(words),).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file of other columns than wanted, or a line that is no word with its numbers (names it).
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} with word vectors")
    places = {word.encode(): i for i, word in enumerate(words) if word != PAD}
    vectors: Tensor | None = None
    found = torch.zeros(len(words), dtype=torch.bool)
    columns, number = 0, 0
    with file.open("rb") as raw, progress(f"reading {file.name}", file.stat().st_size >> 20, LARGE, "MB") as bar:
        lines = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        try:
            for number, line in enumerate(lines, 1):
                line = line.rstrip(b" \r\n")
                if number % 10_000 == 0:
                    bar.update(bar.task_ids[0], completed=raw.tell() >> 20)
                if vectors is None:
                    head = line.split(b" ")
                    header = number == 1 and len(head) == 2 and all(part.isdigit() for part in head)
                    columns = int(head[1]) if header else _columns(line)
                    if columns < 1:
                        raise ValueError(
                            f"{file}, line {number}: expected a word and numbers, as fastText and GloVe do"
                        )
                    if dim is not None and columns != dim:
                        raise ValueError(f"{file} has vectors of {columns} numbers, but the model's words have {dim}")
                    vectors = torch.zeros(len(words), columns)
                    if header:
                        continue
                if line.count(b" ") == columns:  # nearly all lines
                    word, _, rest = line.partition(b" ")
                else:
                    word, *values = line.rsplit(b" ", columns)
                    if _numbers(word.rsplit(b" ", 1)[1:]) is not None:  # too few numbers, or another one
                        raise ValueError(
                            f"{file}, line {number}: {_columns(line)} numbers, but the lines above have {columns}"
                        )
                    rest = b" ".join(values)
                place = places.get(word)
                if place is None or found[place]:
                    continue
                row = _numbers(rest.split(b" "))
                if row is None:
                    raise ValueError(f"{file}, line {number}: what follows '{word.decode()}' isn't all numbers")
                vectors[place], found[place] = torch.tensor(row), True
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{file} can't be unpacked behind line {number} ({error}): fetch it again") from None
    if vectors is None:
        raise ValueError(f"{file} is empty: it should have a word and its numbers in each line")
    log.info("%s: vectors of %d of %d words", file.name, int(found.sum()), len(words))
    return vectors, found
