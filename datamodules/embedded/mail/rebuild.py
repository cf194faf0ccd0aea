"""Finds the mails that repeat another one, and compares the list with the one that lies here.

    python datamodules/embedded/mail/rebuild.py            # search and compare
    python datamodules/embedded/mail/rebuild.py --write    # and write repeats.tsv and SHA256SUMS

Mails are gone through in their order, those of the training collections first. One is a repeat if it has the same
letters as one that was kept, or shares half of the triples of words with it (Jaccard index of at least 0.5).
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from datamodules.text import Mails, letters_of, words_of

HERE = Path(__file__).parent
#: Jaccard index from which on two mails are the same one. Chosen by looking: pairs below are mostly other issues of a
#: newsletter or advertisements written anew, those above the same text with another name, number or subject.
LEAST = 0.5


def triples(text: str) -> set[tuple[str, ...]]:
    """Three words of letters in a row, wherever they are; all there are of a shorter text."""
    words = [word for word in words_of(text) if word.isalpha()]
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def repeats(texts: Sequence[str], order: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Texts that repeat one which comes before in this order and is no repeat: that one, and their Jaccard index."""
    found: dict[int, tuple[int, float]] = {}
    letters: dict[str, int] = {}
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for i in order:
        own, key = triples(texts[i]), letters_of(texts[i])
        common = Counter(j for triple in own for j in having[triple])
        alike = [(n / (len(own) + sizes[j] - n), -j) for j, n in common.items()]
        index, first = max(alike, default=(0.0, 0))
        if key in letters:
            found[i] = letters[key], 1.0
        elif index >= LEAST:
            found[i] = -first, index
        else:
            letters[key], sizes[i] = i, len(own)
            for triple in own:
                having[triple].append(i)
    return found


def table() -> str:
    """What repeats.tsv should be."""
    mails = Mails.every()
    order = sorted(range(len(mails)), key=lambda i: (mails[i]["group"] not in Mails.collections[:2], i))
    found = repeats([Mails.cleaned(mail["text"]) for mail in mails], order)
    rows = [f"{i}\t{first}\t{index:.2f}" for i, (first, index) in sorted(found.items())]
    return "\n".join(["mail\trepeats\tjaccard", *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write, wanted, file = parser.parse_args().write, table(), HERE / "repeats.tsv"
    if write:
        file.write_text(wanted, encoding="utf-8")
        names = ("mails.jsonl.gz", "repeats.tsv")
        sums = [f"{hashlib.sha256((HERE / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (HERE / "SHA256SUMS").write_text("".join(sums))
    print("the same" if file.is_file() and file.read_text(encoding="utf-8") == wanted else "they differ")


if __name__ == "__main__":
    main()
