"""Published text benchmarks, in the layout of their official archives and with their official splits.

The ten tasks of Attention AT (arXiv 2009.12064) in eight datasets, after Jain and Wallace (Attention is not
Explanation, NAACL 2019): sentences (SST, IMDB, 20 Newsgroups, AG News), questions (bAbI 1 to 3, CNN) and pairs of
sentences (SNLI, MultiNLI). Of questions, ``text`` is the story, ``query`` the question; of pairs ``text`` is the
premise, ``query`` the hypothesis: so it is in both codes (successar/AttentionExplanation,
shunk031/attention-meets-perturbation), where attention runs over the story or the premise, given the last state of the
other.

Texts are cleaned as little as can be; tokens are :class:`datamodules.text.TextDataModule`'s matter. Where the release
has no validation part, one is held out of its training part, the same one in all runs, of the size that the code of
Attention AT gives it.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch

from datamodules.images import choose
from datamodules.loading import progress
from datamodules.splits import hold_out
from datamodules.text import Examples, TextDataModule

Part = Literal["train", "val", "test"]
Read = TypeVar("Read")

# ---------------------------------------------------------------------- files


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that aren't blank, with their numbers counted from 1.

    Raises:
        ValueError: if it isn't UTF-8.
    """
    number = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't UTF-8 text behind line {number} ({error.reason}): fetch it again") from None


def text_of(file: Path, encoding: str = "utf-8") -> str:
    """What is in a text file.

    Raises:
        ValueError: if it is of another encoding.
    """
    try:
        return file.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} isn't {encoding.upper()} text ({error.reason}): fetch it again") from None


def read_all(files: Sequence[Path], read: Callable[[Path], Read], what: str) -> list[Read]:
    """What ``read`` makes of each file, in their order, several read at a time; the progress of many is shown."""
    size = 500  # one future a file would take more memory than the files
    pieces = [files[i : i + size] for i in range(0, len(files), size)]
    found: list[Read] = []
    # the threads wait for the disk, not for the processor
    with ThreadPoolExecutor(16) as pool, progress(what, len(files), 10_000, "files") as bar:
        for piece in pool.map(lambda piece: [read(file) for file in piece], pieces):
            found += piece
            bar.advance(bar.task_ids[0], len(piece))
    return found


def in_number_order(file: Path) -> tuple[int, str]:
    """By the number that a name begins with, 9 before 10."""
    digits = re.match(r"\d+", file.name)
    return int(digits.group()) if digits else -1, file.name


# ---------------------------------------------------------------------- parsers


class Tree(NamedTuple):
    """A node of a sentiment tree: a word, or the nodes it is made of."""

    label: int
    children: tuple[Tree, ...]
    word: str | None = None

    def words(self) -> list[str]:
        """The words below it, from left to right."""
        return [self.word] if self.word is not None else [word for child in self.children for word in child.words()]


#: What the Penn Treebank writes for characters that mean something in its files.
ESCAPED = {
    **{"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"},
    **{"``": '"', "''": '"'},
}


def unescape(word: str) -> str:
    r"""A word as it was before it was written in a tree: -LRB- is (, \/ is /, `` is ", and so on."""
    return ESCAPED.get(word.upper(), word.replace("\\/", "/").replace("\\*", "*"))


def parse_tree(line: str) -> Tree:
    """A tree in brackets, ``(3 (2 A) (4 delight))``, labels 0 to 4.

    Raises:
        ValueError: if it isn't one whole tree.
    """
    opened: list[tuple[int, list[Tree | str]]] = []  # nodes whose bracket isn't closed: label and what is inside
    done: Tree | None = None
    tokens = iter(re.findall(r"[()]|[^\s()]+", line))
    for token in tokens:
        if done is not None:
            raise ValueError(f"'{token}' stands behind the tree's end")
        if token == "(":
            label = next(tokens, "")
            if label not in ("0", "1", "2", "3", "4"):
                raise ValueError(f"a bracket must be followed by a label 0 to 4, not '{label}'")
            opened.append((int(label), []))
        elif not opened:
            raise ValueError(f"'{token}' stands outside of all brackets")
        elif token != ")":
            opened[-1][1].append(token)
        else:
            value, inside = opened.pop()
            nodes = tuple(each for each in inside if isinstance(each, Tree))
            words = [each for each in inside if isinstance(each, str)]
            if (len(words), bool(nodes)) not in ((1, False), (0, True)):
                raise ValueError(f"a node must hold one word or other nodes, not {len(nodes)} nodes and {words}")
            node = Tree(value, nodes, unescape(words[0]) if words else None)
            if opened:
                opened[-1][1].append(node)
            else:
                done = node
    if done is None:
        raise ValueError(f"brackets that aren't closed: {len(opened)}" if opened else "there is no tree")
    return done


class Question(NamedTuple):
    """A question of bAbI: its story up to there, and the number of that story."""

    story: str
    question: str
    answer: str
    number: int


def parse_babi(lines: Iterable[tuple[int, str]]) -> list[Question]:
    """Questions of numbered lines ``3 Where is Mary? <tab>bathroom<tab>1``; a line 1 begins another story.

    The lines without tabs are the story. Earlier questions are no part of it.

    Raises:
        ValueError: for another line; says which.
    """
    found: list[Question] = []
    facts: list[str] = []
    story = -1
    last = 0
    for place, line in lines:
        number, _, rest = line.partition(" ")
        if not number.isdigit() or not rest.strip():
            raise ValueError(f"line {place}: expected a number and a sentence, not '{line}'")
        if int(number) == 1:
            story, facts = story + 1, []
        elif int(number) != last + 1:
            raise ValueError(f"line {place}: {number} doesn't follow {last}; a story's lines count from 1")
        last = int(number)
        if "\t" not in rest:
            facts.append(rest.strip())
            continue
        question, answer = (piece.strip() for piece in rest.split("\t")[:2])
        if not question or not answer or not facts:
            raise ValueError(f"line {place}: expected a question, a tab and its answer behind a story, not '{line}'")
        found.append(Question(" ".join(facts), question, answer, story))
    return found


class Cloze(NamedTuple):
    """A question of CNN; ``answer`` and ``candidates`` are numbers of entities."""

    story: str
    question: str
    answer: int
    candidates: list[int]


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ENTITY = re.compile(r"@entity(\d+)")
_GAP = re.compile(r"@\s*placeholder")  # cut in two in some files, as the code of GA Reader (bdhingra/ga-reader) mends


def spell_entity(number: int) -> str:
    """An entity's name in letters alone, 12: entityonetwo; of digits, tokenizers would make words of their own."""
    return "entity" + "".join(_DIGITS[int(digit)] for digit in str(number))


def parse_cloze(content: str) -> Cloze:
    """Address, story, question with ``@placeholder``, answer and the list of entities, blank lines between them.

    ``@entity12`` becomes ``entityonetwo`` (:func:`spell_entity`), and ``@placeholder`` ``placeholder``. The answer is
    always among the candidates, though a story should lack it.

    Raises:
        ValueError: for another content; says in which line.
    """
    lines = content.split("\n")
    lines += [""] * (8 - len(lines))
    filled = [place for place in (1, 3, 5, 7) if lines[place].strip()]
    if filled:
        raise ValueError(f"line {filled[0] + 1}: expected a blank line between address, story, question and answer")
    story, question, answer = (lines[place].strip() for place in (2, 4, 6))
    if not _GAP.search(question):
        raise ValueError(f"line 5: expected a question with @placeholder, not '{question[:80]}'")
    named = _ENTITY.fullmatch(answer)
    if named is None:
        raise ValueError(f"line 7: expected an answer @entity<number>, not '{answer[:80]}'")
    number = int(named.group(1))
    candidates = sorted({int(entity) for entity in _ENTITY.findall(story)} | {number})
    return Cloze(spelled(story), spelled(question), number, candidates)


def spelled(text: str) -> str:
    """A story or question of CNN with its entities and its gap as words of letters."""
    return _GAP.sub("placeholder", _ENTITY.sub(lambda found: spell_entity(int(found[1])), text))


def strip_mail(text: str) -> str:
    """A newsgroup's message without its header, its signature and what it quotes, by scikit-learn's rules."""
    from sklearn.datasets import _twenty_newsgroups as rules

    body = rules.strip_newsgroup_footer(rules.strip_newsgroup_header(text))
    return " ".join(rules.strip_newsgroup_quoting(body).split())


def count_words(text: str) -> int:
    """Words and marks between them."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


# ---------------------------------------------------------------------- what they share


class TextBenchmark(TextDataModule):
    """What the benchmarks share: where their files are, and how many examples there must be.

    Args:
        root: folder in which the archive was unpacked, or the archive's own folder.

    Other arguments: see :class:`datamodules.text.TextDataModule`.

    Raises:
        FileNotFoundError: naming what is missing, the layout and how to get it.
        ValueError: for a malformed file (names it and the line), or other counts than the release's.
    """

    layout: ClassVar[str]
    source: ClassVar[str]
    #: Below root, the folders in which the layout may begin.
    tops: ClassVar[tuple[str, ...]] = (".",)
    #: Examples of each part of the release; a part that isn't here isn't checked.
    counts: ClassVar[Mapping[str, int]] = {}

    def __init__(self, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.root = Path(root).expanduser()

    def missing(self, what: Path) -> FileNotFoundError:
        name = type(self).__name__
        return FileNotFoundError(f"{what} is not there: {name} expects {self.layout}; get it by: {self.source}")

    def place(self, path: str) -> Path:
        """A file or folder of the layout.

        Raises:
            FileNotFoundError: if it isn't there.
        """
        for top in self.tops:
            if (self.root / top / path).exists():
                return self.root / top / path
        raise self.missing(self.root / self.tops[0] / path)

    def check_count(self, part: str, there: int, where: Path) -> None:
        """ValueError if the release has another number of examples of this part."""
        wanted = self.counts.get(part)
        if wanted is not None and there != wanted:
            raise ValueError(
                f"{type(self).__name__} has {wanted} examples of {part}, but {there} are in {where}: the download is "
                f"incomplete or another edition; get it by: {self.source}"
            )


class HeldOutBenchmark(TextBenchmark):
    """A benchmark without a validation part: a share of its training part, as many of each class, becomes one.

    Args:
        root: folder in which the archive was unpacked, or the archive's own folder.
        val_share: of the training part that validates, the same examples in all runs; between 0 and 1.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    def __init__(self, root: str, val_share: float = 0.2, **common: Any) -> None:
        super().__init__(root, **common)
        if not 0 < val_share < 1:
            raise ValueError(f"val_share must be between 0 and 1, not {val_share}")
        self.val_share = val_share

    def keep(self, examples: Examples, part: Part) -> Examples:
        """The examples of the training part that train or validate.

        Raises:
            ValueError: if a class has too few for both.
        """
        label = torch.tensor(examples.label, dtype=torch.int64)
        number = torch.bincount(label, minlength=self.num_classes)
        size = max(round(self.val_share * len(label)), self.num_classes)
        rarest = int(number.argmin())
        if math.ceil(size / self.num_classes) >= int(number[rarest]):
            raise ValueError(
                f"{type(self).__name__}: of {size} examples to validate, as many of each class, none would be left of "
                f"'{self.class_names[rarest]}', which has {int(number[rarest])}; make val_share smaller"
            )
        return examples.select(hold_out(label, size)[part == "val"].tolist())


# ---------------------------------------------------------------------- single texts


class SST(TextBenchmark):
    """Stanford Sentiment Treebank (Socher et al., EMNLP 2013): sentences of film reviews, negative 0 or positive 1.

    Whole sentences alone, without the neutral ones: 6,920 / 872 / 1,821 of the release's 8,544 / 1,101 / 2,210, as Jain
    and Wallace take them. They drop sentences of five words or fewer, too, in the test as well; here all are kept.

    Args:
        root: folder with ``trees/{train,dev,test}.txt``, or the folder ``trees`` itself.
        fine: five classes, very negative to very positive, neutral sentences among them.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "trees/{train,dev,test}.txt, one tree in brackets a line"
    source = "curl -LO https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip && unzip trainDevTestTrees_PTB.zip"
    tops = ("trees", ".")
    counts = {"train": 8544, "val": 1101, "test": 2210}

    def __init__(self, root: str, fine: bool = False, **common: Any) -> None:
        super().__init__(root, **common)
        self.fine = fine
        five = ["very negative", "negative", "neutral", "positive", "very positive"]
        self.class_names = five if fine else ["negative", "positive"]
        self.num_classes, self.domain_names = len(self.class_names), ["sst"]

    def read(self, part: Part) -> Examples:
        file = self.place("dev.txt" if part == "val" else f"{part}.txt")
        trees = []
        for number, line in lines_of(file):
            try:
                trees.append(parse_tree(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
        self.check_count(part, len(trees), file)
        kept = trees if self.fine else [tree for tree in trees if tree.label != 2]
        label = [tree.label if self.fine else int(tree.label > 2) for tree in kept]
        return Examples([" ".join(tree.words()) for tree in kept], label)


class IMDB(HeldOutBenchmark):
    """IMDB film reviews (Maas et al., ACL 2011): 25,000 to train and 25,000 to test on, negative 0 or positive 1.

    Line breaks in HTML become blanks. The code of Attention AT reads the copy of Keras, keeps reviews of fewer than 400
    words and tests on a fifth of those; here all are read (long ones are cut by ``max_tokens``) and all are tested on.

    Args:
        root: folder with ``aclImdb/{train,test}/{pos,neg}/*.txt``, or the folder ``aclImdb`` itself.
        val_share: of the training part that validates, the same reviews in all runs.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "aclImdb/{train,test}/{neg,pos}/*.txt"
    source = "curl -LO https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz && tar -xzf aclImdb_v1.tar.gz"
    tops = ("aclImdb", ".")
    counts = {"train/neg": 12_500, "train/pos": 12_500, "test/neg": 12_500, "test/pos": 12_500}

    def __init__(self, root: str, val_share: float = 0.2, **common: Any) -> None:
        super().__init__(root, val_share, **common)
        self.class_names, self.num_classes, self.domain_names = ["negative", "positive"], 2, ["imdb"]

    def read(self, part: Part) -> Examples:
        below = "test" if part == "test" else "train"
        text: list[str] = []
        label: list[int] = []
        for number, name in enumerate(("neg", "pos")):
            folder = self.place(f"{below}/{name}")
            files = sorted(folder.glob("*.txt"), key=in_number_order)
            self.check_count(f"{below}/{name}", len(files), folder)
            found = read_all(files, text_of, f"reading {below}/{name}")
            text += [" ".join(re.sub(r"<br\s*/?>", " ", review).split()) for review in found]
            label += [number] * len(found)
        examples = Examples(text, label)
        return examples if part == "test" else self.keep(examples, part)


#: Messages of each group, to train and to test on, in the edition sorted by date (11,314 and 7,532).
GROUPS: Mapping[str, tuple[int, int]] = {
    "alt.atheism": (480, 319),
    "comp.graphics": (584, 389),
    "comp.os.ms-windows.misc": (591, 394),
    "comp.sys.ibm.pc.hardware": (590, 392),
    "comp.sys.mac.hardware": (578, 385),
    "comp.windows.x": (593, 395),
    "misc.forsale": (585, 390),
    "rec.autos": (594, 396),
    "rec.motorcycles": (598, 398),
    "rec.sport.baseball": (597, 397),
    "rec.sport.hockey": (600, 399),
    "sci.crypt": (595, 396),
    "sci.electronics": (591, 393),
    "sci.med": (594, 396),
    "sci.space": (593, 394),
    "soc.religion.christian": (599, 398),
    "talk.politics.guns": (546, 364),
    "talk.politics.mideast": (564, 376),
    "talk.politics.misc": (465, 310),
    "talk.religion.misc": (377, 251),
}


class Newsgroups(HeldOutBenchmark):
    """20 Newsgroups, sorted by date (qwone.com/~jason/20Newsgroups): baseball 0 against hockey 1.

    Headers, signatures and quotes are taken out by scikit-learn's rules. Trained on the release's earlier messages and
    tested on its later ones. The code of Attention AT, after Jain and Wallace, mixes both and draws a fifth to test on:
    threads are then in both, so accuracies published so are not to be compared with these.

    Args:
        root: folder with ``20news-bydate-{train,test}/<group>/*``.
        groups: the classes, in this order; ``rec.sport.baseball`` and ``rec.sport.hockey`` if omitted.
        val_share: of the training part that validates, the same messages in all runs.
        min_words: shorter messages are left out (of all parts, and those of no word always); 7 as published, where
            marks between words count. There, messages of 500 and more are left out, too: here they are cut.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "20news-bydate-{train,test}/<group>/<number>"
    source = "curl -LO http://qwone.com/~jason/20Newsgroups/20news-bydate.tar.gz && tar -xzf 20news-bydate.tar.gz"
    counts = {
        f"{part}/{group}": size
        for group, both in GROUPS.items()
        for part, size in zip(("train", "test"), both, strict=True)
    }

    def __init__(
        self,
        root: str,
        groups: Sequence[str] | None = None,
        val_share: float = 0.2,
        min_words: int = 7,
        **common: Any,
    ) -> None:
        super().__init__(root, val_share, **common)
        self.class_names = ["rec.sport.baseball", "rec.sport.hockey"] if groups is None else list(groups)
        choose("group", self.class_names, list(GROUPS))
        if len(self.class_names) < 2:
            raise ValueError(f"name two groups or more to tell apart, not {self.class_names[0]} alone")
        if min_words < 0:
            raise ValueError(f"min_words must not be negative, but is {min_words}")
        self.min_words = min_words
        self.num_classes, self.domain_names = len(self.class_names), ["newsgroups"]

    def read(self, part: Part) -> Examples:
        below = "test" if part == "test" else "train"
        text: list[str] = []
        label: list[int] = []
        for number, group in enumerate(self.class_names):
            folder = self.place(f"20news-bydate-{below}/{group}")
            files = sorted((file for file in folder.iterdir() if file.name.isdigit()), key=in_number_order)
            self.check_count(f"{below}/{group}", len(files), folder)
            messages = [strip_mail(text_of(file, "latin-1")) for file in files]
            long = [message for message in messages if count_words(message) >= max(self.min_words, 1)]
            text += long
            label += [number] * len(long)
        examples = Examples(text, label)
        return examples if part == "test" else self.keep(examples, part)


AG_CLASSES = ("World", "Sports", "Business", "Sci/Tech")


class AGNews(HeldOutBenchmark):
    r"""AG News (Zhang et al., NeurIPS 2015): World 0 against Business 1, 60,000 to train and 3,800 to test on.

    The text is the description alone, without the title, as Jain and Wallace and the code of Attention AT have it. Line
    breaks, which the release writes as ``\``, become blanks.

    Args:
        root: folder with ``ag_news_csv/{train,test}.csv``, or with the two files.
        classes: of ``World``, ``Sports``, ``Business`` and ``Sci/Tech``, in this order; World and Business if omitted.
        val_share: of the training part that validates, the same articles in all runs.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = 'ag_news_csv/{train,test}.csv, lines "class 1 to 4","title","description"'
    source = "curl -LO https://s3.amazonaws.com/fast-ai-nlp/ag_news_csv.tgz && tar -xzf ag_news_csv.tgz"
    tops = ("ag_news_csv", ".")
    counts = {"train": 120_000, "test": 7600}

    def __init__(self, root: str, classes: Sequence[str] | None = None, val_share: float = 0.15, **common: Any) -> None:
        super().__init__(root, val_share, **common)
        self.class_names = ["World", "Business"] if classes is None else list(classes)
        chosen = choose("class", self.class_names, AG_CLASSES)
        if len(chosen) < 2:
            raise ValueError(f"name two classes or more to tell apart, not {self.class_names[0]} alone")
        self._number = {str(official + 1): place for place, official in enumerate(chosen)}
        self.num_classes, self.domain_names = len(chosen), ["agnews"]

    def read(self, part: Part) -> Examples:
        below = "test" if part == "test" else "train"
        file = self.place(f"{below}.csv")
        text: list[str] = []
        label: list[int] = []
        rows = 0
        with file.open(encoding="utf-8", newline="") as stream:
            table = csv.reader(stream, strict=True)
            try:
                for row in table:
                    rows += 1
                    if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
                        raise ValueError(f'expected "class 1 to 4","title","description", not {row!r}'[:200])
                    if row[0] in self._number:
                        text.append(" ".join(row[2].replace("\\", " ").split()))
                        label.append(self._number[row[0]])
            except (csv.Error, ValueError) as error:  # text that isn't UTF-8 is a ValueError, too
                raise ValueError(f"{file}, line {max(table.line_num, 1)}: {error}") from None
        self.check_count(below, rows, file)
        examples = Examples(text, label)
        return examples if part == "test" else self.keep(examples, part)


# ---------------------------------------------------------------------- questions

BABI_TASKS = {1: "single-supporting-fact", 2: "two-supporting-facts", 3: "three-supporting-facts"}


class BAbI(HeldOutBenchmark):
    """Tasks 1 to 3 of bAbI (Weston et al., arXiv 1502.05698): who or what is where, after one, two or three facts.

    ``text`` is the story up to the question, ``query`` the question, and the classes are the answers of the training
    part (with Jain and Wallace, all its words are). Validation is held out by whole stories: the published code draws
    questions, so that it validates on stories that it trains on.

    Args:
        root: folder with ``tasks_1-20_v1-2``, or that folder itself.
        task: 1, 2 or 3.
        edition: ``en-10k``: 10,000 questions to train on; ``en``: 1,000.
        val_share: of the training stories that validate, the same ones in all runs.
        max_tokens: longer stories are cut; what a question asks for stands at the end of long ones.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "tasks_1-20_v1-2/<edition>/qa<task>_<name>_{train,test}.txt"
    source = (
        "curl -LO https://s3.amazonaws.com/text-datasets/babi_tasks_1-20_v1-2.tar.gz && "
        "tar -xzf babi_tasks_1-20_v1-2.tar.gz"
    )
    tops = ("tasks_1-20_v1-2", ".")
    counts = {"en-10k/train": 10_000, "en-10k/test": 1000, "en/train": 1000, "en/test": 1000}
    pairs = True

    def __init__(
        self,
        root: str,
        task: Literal[1, 2, 3] = 1,
        edition: Literal["en-10k", "en"] = "en-10k",
        val_share: float = 0.15,
        max_tokens: int = 2500,
        **common: Any,
    ) -> None:
        super().__init__(root, val_share, max_tokens=max_tokens, **common)
        if task not in BABI_TASKS:
            raise ValueError(f"task must be 1, 2 or 3, not {task}")
        if edition not in ("en-10k", "en"):
            raise ValueError(f"edition must be en-10k or en, not '{edition}'")
        self.task, self.edition = task, edition
        self.class_names = sorted({question.answer for question in self._questions("train")})
        self.num_classes, self.domain_names = len(self.class_names), [f"babi {task}"]

    def _file(self, below: str) -> Path:
        return self.place(f"{self.edition}/qa{self.task}_{BABI_TASKS[self.task]}_{below}.txt")

    def _questions(self, below: str) -> list[Question]:
        file = self._file(below)
        lines = list(lines_of(file))
        try:
            found = parse_babi(lines)
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from None
        self.check_count(f"{self.edition}/{below}", len(found), file)
        return found

    def read(self, part: Part) -> Examples:
        found = self._questions("test" if part == "test" else "train")
        if part != "test":
            stories = found[-1].number + 1 if found else 0
            size = max(round(self.val_share * stories), 1)
            if size >= stories:
                raise ValueError(
                    f"{size} of {stories} stories held out to validate leave none to train on: make val_share smaller "
                    f"than {self.val_share}"
                )
            order = torch.randperm(stories, generator=torch.Generator().manual_seed(0)).tolist()
            held = set(order[:size])
            found = [question for question in found if (question.number in held) == (part == "val")]
        number = {name: i for i, name in enumerate(self.class_names)}
        unknown = [question.answer for question in found if question.answer not in number]
        if unknown:
            raise ValueError(f"{self._file('test')}: '{unknown[0]}' answers no question of the training part")
        return Examples(
            [question.story for question in found],
            [number[question.answer] for question in found],
            [question.question for question in found],
        )


class CNN(TextBenchmark):
    """Questions about CNN's news (Hermann et al., NeurIPS 2015): which entity fills the gap in a sentence on a story.

    Entities are written as numbers that mean something within one story only. The classes are these numbers, 0 to 595:
    the largest in the release, by the list of labels that comes with the code of Attention AT. Those that occur in the
    story are the candidates, as in both codes; the answer is always among them (Chen et al., arXiv 1606.02858).
    ``@entity12`` is written ``entityonetwo`` and ``@placeholder`` ``placeholder``, so that each stays one word.

    The 387,420 files are read by 16 threads, each once for every part, and nothing is written beside them: what the
    operating system keeps of them makes the next reading fast (a minute on two cores, by 20,000 files of that size).
    The training part takes about 3 GB of memory.

    Args:
        root: folder with ``cnn/questions/{training,validation,test}/*.question``, or one of the two upper folders.
        max_tokens: longer stories are cut; they have 760 words on average.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "cnn/questions/{training,validation,test}/*.question"
    source = "the CNN questions of https://cs.nyu.edu/~kcho/DMQA/, then tar -xzf cnn.tgz"
    tops = ("cnn/questions", "questions", ".")
    counts = {"train": 380_298, "val": 3924, "test": 3198}
    pairs = True

    def __init__(self, root: str, max_tokens: int = 2000, **common: Any) -> None:
        super().__init__(root, max_tokens=max_tokens, **common)
        self.num_classes, self.domain_names = 596, ["cnn"]
        self.class_names = [spell_entity(number) for number in range(self.num_classes)]

    def read_given(self) -> Examples:
        """As the files of the release: entities are written @entity12, and those of a story may be answered."""
        found = super().read_given()
        assert found.query is not None  # of pairs
        allowed = [sorted({int(number) for number in _ENTITY.findall(text)}) for text in found.text]
        for place, numbers in enumerate(allowed, 1):
            if not numbers or numbers[-1] >= self.num_classes:
                raise ValueError(f"{self.given}, line {place}: a story needs entities, @entity0 to @entity595")
        text, query = ([spelled(each) for each in part] for part in (found.text, found.query))
        return found._replace(text=text, query=query, candidates=allowed)

    def _read(self, file: Path) -> Cloze:
        content = text_of(file)
        try:
            found = parse_cloze(content)
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from None
        if found.candidates[-1] >= self.num_classes:
            raise ValueError(
                f"{file}: entity{found.candidates[-1]}, but the release has none above {self.num_classes - 1}"
            )
        return found

    def read(self, part: Part) -> Examples:
        folder = self.place({"train": "training", "val": "validation", "test": "test"}[part])
        files = sorted(folder.glob("*.question"))
        self.check_count(part, len(files), folder)
        found = read_all(files, self._read, f"reading questions of {part}")
        return Examples(
            [each.story for each in found],
            [each.answer for each in found],
            [each.question for each in found],
            candidates=[each.candidates for each in found],
        )


# ---------------------------------------------------------------------- pairs of sentences

RELATIONS = ("entailment", "neutral", "contradiction")


def read_pairs(file: Path) -> Examples:
    """Premises (``text``), hypotheses (``query``) and what these are to those, of lines of JSON.

    Pairs on which the annotators didn't agree (``gold_label`` "-") are left out.

    Raises:
        ValueError: for another line; names it.
    """
    text: list[str] = []
    query: list[str] = []
    label: list[int] = []
    for number, line in lines_of(file):
        try:
            pair = json.loads(line)
            relation, premise, hypothesis = (pair[key] for key in ("gold_label", "sentence1", "sentence2"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{file}, line {number}: expected JSON with gold_label, sentence1 and sentence2, not '{line[:80]}'"
            ) from None
        if relation == "-":
            continue
        if relation not in RELATIONS or not isinstance(premise, str) or not isinstance(hypothesis, str):
            raise ValueError(
                f"{file}, line {number}: gold_label is '{relation}', not one of {', '.join(RELATIONS)} or -"
            )
        text.append(premise)
        query.append(hypothesis)
        label.append(RELATIONS.index(relation))
    return Examples(text, label, query)


class SNLI(TextBenchmark):
    """Stanford Natural Language Inference (Bowman et al., EMNLP 2015): entailment, neutral or contradiction.

    ``text`` is the premise, over which attention runs, ``query`` the hypothesis, as in both codes. Pairs without a gold
    label are left out: 549,367 / 9,842 / 9,824 of 550,152 / 10,000 / 10,000 remain.

    Args:
        root: folder with ``snli_1.0/snli_1.0_{train,dev,test}.jsonl``, or the folder ``snli_1.0`` itself.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "snli_1.0/snli_1.0_{train,dev,test}.jsonl"
    source = "curl -LO https://nlp.stanford.edu/projects/snli/snli_1.0.zip && unzip snli_1.0.zip"
    tops = ("snli_1.0", ".")
    counts = {"train": 549_367, "val": 9842, "test": 9824}
    pairs = True

    def __init__(self, root: str, **common: Any) -> None:
        super().__init__(root, **common)
        self.class_names, self.num_classes, self.domain_names = list(RELATIONS), len(RELATIONS), ["snli"]

    def read(self, part: Part) -> Examples:
        file = self.place(f"snli_1.0_{'dev' if part == 'val' else part}.jsonl")
        examples = read_pairs(file)
        self.check_count(part, len(examples.text), file)
        return examples


class MultiNLI(HeldOutBenchmark):
    """MultiNLI (Williams et al., NAACL 2018): entailment, neutral or contradiction, in ten genres.

    ``text`` is the premise, ``query`` the hypothesis. The labels of its test part aren't public: its two development
    parts test, the one of training's genres (domain ``matched``, 9,815) and the one of others (``mismatched``, 9,832),
    and a share of the 392,702 training pairs validates, as in the code of Attention AT.

    Args:
        root: folder with ``multinli_1.0/multinli_1.0_{train,dev_matched,dev_mismatched}.jsonl``, or the inner folder.
        val_share: of the training part that validates, the same pairs in all runs.

    Other arguments: see :class:`datamodules.text.TextDataModule`.
    """

    layout = "multinli_1.0/multinli_1.0_{train,dev_matched,dev_mismatched}.jsonl"
    source = "curl -LO https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip && unzip multinli_1.0.zip"
    tops = ("multinli_1.0", ".")
    counts = {"train": 392_702, "dev_matched": 9815, "dev_mismatched": 9832}
    pairs = True

    def __init__(self, root: str, val_share: float = 0.2, **common: Any) -> None:
        super().__init__(root, val_share, **common)
        self.class_names, self.num_classes = list(RELATIONS), len(RELATIONS)
        self.domain_names = ["matched", "mismatched"]

    def _pairs(self, name: str) -> Examples:
        file = self.place(f"multinli_1.0_{name}.jsonl")
        examples = read_pairs(file)
        self.check_count(name, len(examples.text), file)
        return examples

    def read(self, part: Part) -> Examples:
        if part != "test":
            return self.keep(self._pairs("train"), part)
        matched, mismatched = self._pairs("dev_matched"), self._pairs("dev_mismatched")
        return Examples(
            matched.text + mismatched.text,
            matched.label + mismatched.label,
            [*(matched.query or ()), *(mismatched.query or ())],
            [0] * len(matched.text) + [1] * len(mismatched.text),
        )
