"""Text benchmarks on small trees of the official layouts: what is read, and what is said where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import text_benchmarks as benchmarks
from datamodules.text import Examples, words_of
from datamodules.text_benchmarks import (
    BABI_TASKS,
    CNN,
    GROUPS,
    IMDB,
    SNLI,
    SST,
    AGNews,
    BAbI,
    Cloze,
    MultiNLI,
    Newsgroups,
    Question,
    TextBenchmark,
    Tree,
    parse_babi,
    parse_cloze,
    parse_tree,
    read_all,
    spell_entity,
    strip_mail,
)

EVERY = [
    c for c in vars(benchmarks).values() if isinstance(c, type) and issubclass(c, TextBenchmark) and "layout" in vars(c)
]
PARTS: tuple[Any, ...] = ("train", "val", "test")


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees below are smaller than the releases."""
    for each in EVERY:
        monkeypatch.setattr(each, "counts", {})


small = pytest.mark.usefixtures("uncounted")


def write(file: Path, content: str, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode(encoding))
    return file


def said(error: type[Exception], what: Callable[[], Any]) -> str:
    """What is said when this is done: one line."""
    with pytest.raises(error) as found:
        what()
    assert type(found.value) is error and "\n" not in str(found.value)
    return str(found.value)


def test_there_are_eight() -> None:
    assert set(EVERY) == {SST, IMDB, Newsgroups, AGNews, BAbI, CNN, SNLI, MultiNLI}


# ---------------------------------------------------------------------- where files are, and how many


NEEDED = {
    SST: "trees/train.txt",
    IMDB: "aclImdb/train/neg",
    Newsgroups: "20news-bydate-train/rec.sport.baseball",
    AGNews: "ag_news_csv/train.csv",
    CNN: "cnn/questions/training",
    SNLI: "snli_1.0/snli_1.0_train.jsonl",
    MultiNLI: "multinli_1.0/multinli_1.0_train.jsonl",
}


@pytest.mark.parametrize("cls", NEEDED, ids=lambda c: c.__name__)
def test_what_is_missing_is_named(cls: Any, tmp_path: Path) -> None:
    line = said(FileNotFoundError, lambda: cls(str(tmp_path)).read("train"))
    assert line.startswith(f"{tmp_path / NEEDED[cls]} is not there: {cls.__name__} expects ")
    assert (
        cls.layout in line
        and line.endswith(f"get it by: {cls.source}")
        and "https://" in line.replace("http:", "https:")
    )


def test_babi_says_what_is_missing_when_it_is_made(tmp_path: Path) -> None:
    line = said(FileNotFoundError, lambda: BAbI(str(tmp_path), task=2))
    assert line.startswith(
        f"{tmp_path}/tasks_1-20_v1-2/en-10k/qa2_two-supporting-facts_train.txt is not there: BAbI expects"
    )


def test_counts_are_those_of_the_releases() -> None:
    assert SST.counts == {"train": 8544, "val": 1101, "test": 2210}
    assert IMDB.counts == dict.fromkeys(("train/neg", "train/pos", "test/neg", "test/pos"), 12500)
    assert AGNews.counts == {"train": 120000, "test": 7600}
    assert CNN.counts == {"train": 380298, "val": 3924, "test": 3198}
    assert SNLI.counts == {"train": 549367, "val": 9842, "test": 9824}
    assert MultiNLI.counts == {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832}
    assert BAbI.counts == {"en-10k/train": 10000, "en-10k/test": 1000, "en/train": 1000, "en/test": 1000}
    assert len(GROUPS) == 20 and sorted(GROUPS) == list(GROUPS)
    assert [sum(size[i] for size in GROUPS.values()) for i in (0, 1)] == [11314, 7532]
    assert Newsgroups.counts["train/rec.sport.hockey"] == 600 and Newsgroups.counts["test/rec.sport.baseball"] == 397


def test_another_count_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path)
    line = said(ValueError, lambda: SST(str(tmp_path)).read("val"))
    assert line.startswith(
        f"SST has 1101 examples of val, but 2 are in {tmp_path}/trees/dev.txt: the download is incompl"
    )
    for make in (imdb, mails, news, cnn, snli, mnli, babi):
        make(tmp_path)
    for cls in (IMDB, Newsgroups, AGNews, CNN, SNLI, MultiNLI):
        line = said(ValueError, lambda cls=cls: cls(str(tmp_path)).read("test"))  # type: ignore[misc]
        assert line.startswith(f"{cls.__name__} has ") and line.endswith(cls.source)
    assert said(ValueError, lambda: BAbI(str(tmp_path))).startswith("BAbI has 10000 examples of en-10k/train, but ")


@small
def test_the_inner_folder_serves_as_root(tmp_path: Path) -> None:
    for make in (tree, imdb, news, cnn, snli, mnli, babi):
        make(tmp_path)
    for cls, inner in {
        SST: "trees",
        IMDB: "aclImdb",
        AGNews: "ag_news_csv",
        CNN: "cnn/questions",
        SNLI: "snli_1.0",
        MultiNLI: "multinli_1.0",
        BAbI: "tasks_1-20_v1-2",
    }.items():
        make_one: Any = cls
        assert make_one(str(tmp_path / inner)).read("test") == make_one(str(tmp_path)).read("test")
    assert CNN(str(tmp_path / "cnn")).read("test") == CNN(str(tmp_path)).read("test")


@small
@pytest.mark.parametrize("cls", [IMDB, Newsgroups, AGNews, MultiNLI], ids=lambda c: c.__name__)
def test_validation_is_held_out_of_training_once_for_all(cls: Any, tmp_path: Path) -> None:
    {IMDB: imdb, Newsgroups: mails, AGNews: news, MultiNLI: mnli}[cls](tmp_path, each=20)
    data = cls(str(tmp_path), val_share=0.25)
    train, val, test = (data.read(part) for part in PARTS)
    classes = data.num_classes
    assert (
        len(val.text) == 5 * classes
        and len(train.text) == 15 * classes
        and len(set(train.text + val.text)) == 20 * classes
    )
    assert [val.label.count(i) for i in range(classes)] == [5] * classes
    assert not set(test.text) & set(train.text + val.text)
    again = cls(str(tmp_path), val_share=0.25)
    assert [again.read(part) for part in PARTS] == [train, val, test]
    assert cls(str(tmp_path), val_share=0.01).read("val").label in ([0, 1], [0, 2, 1])  # never without a class


@small
@pytest.mark.parametrize("cls", [IMDB, Newsgroups, AGNews, BAbI, MultiNLI], ids=lambda c: c.__name__)
def test_shares_out_of_range(cls: Any, tmp_path: Path) -> None:
    for make in (imdb, mails, news, mnli, babi):
        make(tmp_path)
    for share in (0.0, 1.0, -0.1, 2.0):
        assert said(ValueError, lambda s=share: cls(str(tmp_path), val_share=s)) == (  # type: ignore[misc]
            f"val_share must be between 0 and 1, not {share}"
        )
    line = said(ValueError, lambda: cls(str(tmp_path), val_share=0.99).read("train"))
    assert "make val_share smaller" in line


def test_files_are_read_in_their_order_and_an_error_comes_through(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", str(i)) for i in range(620)]
    assert read_all(files, lambda file: int(file.read_text()), "reading") == list(range(620))
    files[600].write_text("six hundred")
    with pytest.raises(ValueError, match="six hundred"):
        read_all(files, lambda file: int(file.read_text()), "reading")


# ---------------------------------------------------------------------- SST


def tree(root: Path) -> None:
    write(
        root / "trees" / "train.txt",
        "(3 (2 It) (4 (4 (2 's) (4 (3 great) (2 fun))) (2 .)))\n"
        "(2 (2 So) (2 so))\n"
        "\n"
        "(0 (1 (2 -LRB-) (1 (0 awful) (2 -RRB-))) (2 (2 ``) (2 action\\/drama)))\n"
        "(1 (2 Caf\u00e9s) (1 (1 close) (2 -lrb-)))\n"
        "(4 Wow)\n",
    )
    write(root / "trees" / "dev.txt", "(4 (3 Fine) (2 !))\n(0 Bad)\n")
    write(root / "trees" / "test.txt", "(2 Well)\n(1 (1 Not) (2 well))\n")


@small
def test_sst(tmp_path: Path) -> None:
    tree(tmp_path)
    data = SST(str(tmp_path))
    assert data.class_names == ["negative", "positive"] and data.num_classes == 2 and data.domain_names == ["sst"]
    assert not data.pairs
    text = ["It 's great fun .", '( awful ) " action/drama', "Caf\u00e9s close (", "Wow"]
    assert data.read("train") == Examples(text, [1, 0, 0, 1])
    assert data.read("val") == Examples(["Fine !", "Bad"], [1, 0])
    assert data.read("test") == Examples(["Not well"], [0])
    fine = SST(str(tmp_path), fine=True)
    assert fine.class_names == ["very negative", "negative", "neutral", "positive", "very positive"]
    assert fine.num_classes == 5
    assert fine.read("train") == Examples([text[0], "So so", *text[1:]], [3, 2, 0, 1, 4])


def test_parse_tree() -> None:
    assert parse_tree(" (3 (2 A)\t(4 joy))") == Tree(3, (Tree(2, (), "A"), Tree(4, (), "joy")))
    assert parse_tree("(0 '')").words() == ['"']
    assert parse_tree("(1 (1 -RCB-) (1 5\\*5))").words() == ["}", "5*5"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "there is no tree"),
        ("(3 (2 A) (4 joy)", "brackets that aren't closed: 1"),
        ("(3 A) (2 B)", "'(' stands behind the tree's end"),
        ("(3 A))", "')' stands behind the tree's end"),
        ("A (3 B)", "'A' stands outside of all brackets"),
        (")", "')' stands outside of all brackets"),
        ("(5 A)", "a bracket must be followed by a label 0 to 4, not '5'"),
        ("(A)", "a bracket must be followed by a label 0 to 4, not 'A'"),
        ("(3 (", "a bracket must be followed by a label 0 to 4, not ''"),
        ("(3 A B)", "a node must hold one word or other nodes, not 0 nodes and ['A', 'B']"),
        ("(3 A (2 B))", "a node must hold one word or other nodes, not 1 nodes and ['A']"),
        ("(3 (2 B) A)", "a node must hold one word or other nodes, not 1 nodes and ['A']"),
        ("(3)", "a node must hold one word or other nodes, not 0 nodes and []"),
    ],
)
def test_what_is_no_tree(line: str, reason: str, tmp_path: Path) -> None:
    assert said(ValueError, lambda: parse_tree(line)) == reason
    if line:
        file = write(tmp_path / "trees" / "test.txt", f"(1 Fine)\n\n{line}\n")
        assert said(ValueError, lambda: SST(str(tmp_path)).read("test")) == f"{file}, line 3: {reason}"


BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-", '"': "''"}


def in_brackets(node: Tree) -> str:
    """A tree as the Penn Treebank writes it."""
    if node.word is None:
        return f"({node.label} {' '.join(map(in_brackets, node.children))})"
    return (
        f"({node.label} {BRACKETS.get(node.word, node.word.replace('/', chr(92) + '/').replace('*', chr(92) + '*'))})"
    )


words = st.sampled_from([*BRACKETS, "and/or", "5*5", "n't", "-", "0", "caf\u00e9", "don't"]) | st.text(
    st.characters(whitelist_categories=("L", "N")), min_size=1, max_size=6
)
trees = st.recursive(
    st.builds(lambda label, word: Tree(label, (), word), st.integers(0, 4), words),
    lambda below: st.builds(
        lambda label, nodes: Tree(label, tuple(nodes)), st.integers(0, 4), st.lists(below, min_size=1, max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_a_tree_that_is_written_is_read_again(node: Tree) -> None:
    line = in_brackets(node)
    assert parse_tree(line) == node
    assert parse_tree(line.replace("(", " ( ").replace(")", " )  ")) == node
    assert parse_tree(line).words() == leaves(node)


def leaves(node: Tree) -> list[str]:
    found, left = [], [node]
    while left:
        here = left.pop()
        left += reversed(here.children)
        found += [here.word] if here.word is not None else []
    return found


def test_a_file_of_another_encoding(tmp_path: Path) -> None:
    file = write(tmp_path / "trees" / "test.txt", "(1 Caf\u00e9)\n", "latin-1")
    assert said(ValueError, lambda: SST(str(tmp_path)).read("test")).startswith(
        f"{file} isn't UTF-8 text behind line 0 ("
    )


# ---------------------------------------------------------------------- IMDB


def imdb(root: Path, each: int = 4) -> None:
    for below in ("train", "test"):
        for name in ("neg", "pos"):
            for i in range(each):
                content = f"A {name} film,<br /><br />number {i}\n of {below}.<br>"
                write(root / "aclImdb" / below / name / f"{i + 7}_{i % 10}.txt", content)
    write(root / "aclImdb" / "train" / "unsup" / "0_0.txt", "not labelled")
    write(root / "aclImdb" / "train" / "urls_pos.txt", "http://")


@small
def test_imdb(tmp_path: Path) -> None:
    imdb(tmp_path, 5)
    data = IMDB(str(tmp_path))
    assert data.class_names == ["negative", "positive"] and data.num_classes == 2 and data.domain_names == ["imdb"]
    # files 7 to 11: in the order of their numbers, not of their letters
    text = [f"A {name} film, number {i} of test." for name in ("neg", "pos") for i in range(5)]
    assert data.read("test") == Examples(text, [0] * 5 + [1] * 5)
    train, val = data.read("train"), data.read("val")
    assert len(val.text) == 2 and train.label == [0] * 4 + [1] * 4 and val.label == [0, 1]
    assert all("train" in text and "<" not in text for text in train.text + val.text)
    (tmp_path / "aclImdb/test/pos/9_2.txt").write_bytes(b"caf\xe9")
    line = said(ValueError, lambda: data.read("test"))
    assert line.startswith(f"{tmp_path}/aclImdb/test/pos/9_2.txt isn't UTF-8 text (") and line.endswith(
        "fetch it again"
    )


# ---------------------------------------------------------------------- 20 Newsgroups


def message(body: str) -> str:
    return (
        "From: a@b.c (A Fan)\nSubject: Re: game\nLines: 9\n\nIn article <1@b.c> x@y.z writes:\n> quoted line\n\n"
        f"{body}\n\n--\nA Fan, somewhere\n"
    )


def mails(root: Path, each: int = 4) -> None:
    for below in ("train", "test"):
        for group in ("rec.sport.baseball", "rec.sport.hockey", "sci.space"):
            for i in range(each):
                body = f"This is the {group} message {i} of {below}, caf\u00e9."
                file = root / f"20news-bydate-{below}" / group / str(i + 98)
                write(file, message(body), "latin-1")


@small
def test_newsgroups(tmp_path: Path) -> None:
    mails(tmp_path)
    folder = tmp_path / "20news-bydate-test" / "rec.sport.hockey"
    write(folder / "200", message("Go Leafs!"))
    write(folder / "201", message("This has just six words, or?"))  # eight with its two marks
    write(folder / "202", message(""))
    write(folder / "readme.txt", message("This is long enough, but it is no message."))
    data = Newsgroups(str(tmp_path))
    assert data.class_names == ["rec.sport.baseball", "rec.sport.hockey"] and data.num_classes == 2
    assert data.domain_names == ["newsgroups"]

    def bodies(group: str) -> list[str]:
        return [f"This is the {group} message {i} of test, caf\u00e9." for i in range(4)]

    six = "This has just six words, or?"
    text = [*bodies("rec.sport.baseball"), *bodies("rec.sport.hockey"), six]
    assert data.read("test") == Examples(text, [0] * 4 + [1] * 5)
    assert Newsgroups(str(tmp_path), min_words=9).read("test").label == [0] * 4 + [1] * 4
    assert Newsgroups(str(tmp_path), min_words=8).read("test").label == [0] * 4 + [1] * 5
    assert Newsgroups(str(tmp_path), min_words=0).read("test").text[8:] == ["Go Leafs!", six]  # never an empty text
    assert len(data.read("val").text) == 2 and len(data.read("train").text) == 6
    other = Newsgroups(str(tmp_path), groups=["sci.space", "rec.sport.hockey", "rec.sport.baseball"])
    assert other.num_classes == 3 and other.class_names[0] == "sci.space"
    read = other.read("test")
    assert read.label == [0] * 4 + [1] * 5 + [2] * 4 and read.text[:4] == bodies("sci.space")


def test_strip_mail() -> None:
    assert strip_mail(message("One\n  two.\n\nThree.")) == "One two. Three."
    assert strip_mail("no header here") == ""


@small
def test_wrong_groups(tmp_path: Path) -> None:
    line = said(ValueError, lambda: Newsgroups(str(tmp_path), groups=["rec.sport.cricket", "sci.med"]))
    assert line.startswith("there is no group 'rec.sport.cricket'; there are: alt.atheism, comp.graphics, ")
    assert said(ValueError, lambda: Newsgroups(str(tmp_path), groups=["sci.med"])) == (
        "name two groups or more to tell apart, not sci.med alone"
    )
    assert "each group once" in said(ValueError, lambda: Newsgroups(str(tmp_path), groups=["sci.med", "sci.med"]))
    assert (
        said(ValueError, lambda: Newsgroups(str(tmp_path), min_words=-1)) == "min_words must not be negative, but is -1"
    )
    mails(tmp_path)
    line = said(ValueError, lambda: Newsgroups(str(tmp_path), min_words=99).read("val"))
    assert line == (
        "Newsgroups: of 2 examples to validate, as many of each class, none would be left of 'rec.sport.baseball', "
        "which has 0; make val_share smaller"
    )


# ---------------------------------------------------------------------- AG News


def news(root: Path, each: int = 4) -> None:
    for below in ("train", "test"):
        rows = [
            f'"{number}","Title {number}","Reuters - The ""{number}"" story {i},\\of {below}."'
            for i in range(each)
            for number in (3, 1, 4, 2)
        ]
        write(root / "ag_news_csv" / f"{below}.csv", "\n".join(rows) + "\n")


@small
def test_agnews(tmp_path: Path) -> None:
    news(tmp_path, 2)
    data = AGNews(str(tmp_path))
    assert data.class_names == ["World", "Business"] and data.num_classes == 2 and data.domain_names == ["agnews"]

    def text(number: int, i: int) -> str:
        return f'Reuters - The "{number}" story {i}, of test.'

    assert data.read("test") == Examples([text(n, i) for i in (0, 1) for n in (3, 1)], [1, 0, 1, 0])
    every = AGNews(str(tmp_path), classes=["World", "Sports", "Business", "Sci/Tech"]).read("test")
    assert every == Examples([text(n, i) for i in (0, 1) for n in (3, 1, 4, 2)], [2, 0, 3, 1] * 2)
    other = AGNews(str(tmp_path), classes=["Sci/Tech", "Sports"])
    assert other.read("test") == Examples([text(n, i) for i in (0, 1) for n in (4, 2)], [0, 1] * 2)
    assert len(data.read("train").text) == 2 == len(data.read("val").text)


@small
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('"5","a","b"', "expected \"class 1 to 4\",\"title\",\"description\", not ['5', 'a', 'b']"),
        ('"1","a"', 'expected "class 1 to 4","title","description", not [\'1\', \'a\']'),
        ("", 'expected "class 1 to 4","title","description", not []'),
        ('"1","a","b"c', "',' expected after '\"'"),
        ('"1","a","b', "unexpected end of data"),
    ],
)
def test_a_malformed_row(row: str, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "test.csv", f'"1","a","b"\n{row}\n')
    line = said(ValueError, lambda: AGNews(str(tmp_path)).read("test"))
    assert line == f"{file}, line 2: {reason}"


@small
def test_wrong_classes(tmp_path: Path) -> None:
    line = said(ValueError, lambda: AGNews(str(tmp_path), classes=["World", "Weather"]))
    assert line == "there is no class 'Weather'; there are: World, Sports, Business, Sci/Tech"
    assert said(ValueError, lambda: AGNews(str(tmp_path), classes=["World"])) == (
        "name two classes or more to tell apart, not World alone"
    )
    file = write(tmp_path / "train.csv", '"1","a","caf\u00e9"\n', "latin-1")
    assert said(ValueError, lambda: AGNews(str(tmp_path)).read("train")).startswith(f"{file}, line 1: 'utf-8' codec")


# ---------------------------------------------------------------------- bAbI

PLACES = ("kitchen", "garden", "office", "bathroom")


def story(i: int) -> str:
    """Two facts, a question, a fact and a question."""
    here, there = PLACES[i % 4], PLACES[(i + 1) % 4]
    return (
        f"1 Mary{i} moved to the {here}.\n2 John{i} went to the {there}.\n3 Where is Mary{i}? \t{here}\t1\n"
        f"4 Mary{i} went back to the {there}.\n5 Where is Mary{i}? \t{there}\t4\n"
    )


def babi(root: Path, stories: int = 8) -> None:
    for edition in ("en-10k", "en"):
        for task, name in BABI_TASKS.items():
            for part, first in (("train", 0), ("test", 100)):
                content = "".join(story(first + 10 * task + i) for i in range(stories))
                write(root / "tasks_1-20_v1-2" / edition / f"qa{task}_{name}_{part}.txt", content)


@small
def test_babi(tmp_path: Path) -> None:
    babi(tmp_path, 1)
    babi_train = tmp_path / "tasks_1-20_v1-2/en-10k/qa1_single-supporting-fact_train.txt"
    write(babi_train, "".join(story(i) for i in range(20)))
    data = BAbI(str(tmp_path))
    assert data.class_names == sorted(PLACES) and data.num_classes == 4 and data.domain_names == ["babi 1"]
    assert data.pairs
    first = "Mary110 moved to the office. John110 went to the bathroom."
    whole = f"{first} Mary110 went back to the bathroom."
    assert data.read("test") == Examples([first, whole], [3, 0], ["Where is Mary110?"] * 2)
    for task in (2, 3):
        other = BAbI(str(tmp_path), task=task, val_share=0.5)
        assert said(ValueError, lambda other=other: other.read("train")) == (  # type: ignore[misc]
            "1 of 1 stories held out to validate leave none to train on: make val_share smaller than 0.5"
        )
        assert other.read("test").query == [f"Where is Mary{100 + 10 * task}?"] * 2
    assert BAbI(str(tmp_path), edition="en").read("test").query == ["Where is Mary110?"] * 2


@small
def test_a_story_trains_or_validates(tmp_path: Path) -> None:
    babi(tmp_path, 20)
    data = BAbI(str(tmp_path), val_share=0.3)
    train, val = data.read("train"), data.read("val")
    names = {part: [text.split()[0] for text in examples.text] for part, examples in (("train", train), ("val", val))}
    assert len(val.text) == 12 and len(train.text) == 28
    assert not set(names["train"]) & set(names["val"])
    assert all(names[part].count(name) == 2 for part in names for name in names[part])
    assert (BAbI(str(tmp_path), val_share=0.3).read("train"), data.read("val")) == (train, val)
    assert len({name in names["val"] for name in (f"Mary{i}" for i in range(10, 16))}) == 2  # drawn, not the first ones


def test_parse_babi() -> None:
    lines = (story(0) + "1 A.\n2 Q?\tyes,no\t1\n").splitlines()
    assert parse_babi(enumerate(lines, 1)) == [
        Question("Mary0 moved to the kitchen. John0 went to the garden.", "Where is Mary0?", "kitchen", 0),
        Question(
            "Mary0 moved to the kitchen. John0 went to the garden. Mary0 went back to the garden.",
            "Where is Mary0?",
            "garden",
            0,
        ),
        Question("A.", "Q?", "yes,no", 1),
    ]


@small
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1 A.\nB.\n", "line 2: expected a number and a sentence, not 'B.'"),
        ("1 A.\n2\n", "line 2: expected a number and a sentence, not '2'"),
        ("1 A.\n3 B.\n", "line 2: 3 doesn't follow 1; a story's lines count from 1"),
        ("2 A.\n", "line 1: 2 doesn't follow 0; a story's lines count from 1"),
        ("1 A.\n\n2 Q?\t\t1\n", "line 3: expected a question, a tab and its answer behind a story, not '2 Q?\t\t1'"),
        ("1 Q?\tyes\t1\n", "line 1: expected a question, a tab and its answer behind a story, not '1 Q?\tyes\t1'"),
        (
            "1 A.\n2 B.\n1 Q?\tyes\n",
            "line 3: expected a question, a tab and its answer behind a story, not '1 Q?\tyes'",
        ),
    ],
)
def test_malformed_stories(content: str, reason: str, tmp_path: Path) -> None:
    babi(tmp_path)
    file = write(tmp_path / "tasks_1-20_v1-2/en/qa1_single-supporting-fact_train.txt", content)
    assert said(ValueError, lambda: BAbI(str(tmp_path), edition="en")) == f"{file}, {reason}"


@small
def test_wrong_settings_of_babi_and_answers_never_seen(tmp_path: Path) -> None:
    babi(tmp_path)
    assert said(ValueError, lambda: BAbI(str(tmp_path), task=4)) == "task must be 1, 2 or 3, not 4"  # type: ignore[arg-type]
    assert said(ValueError, lambda: BAbI(str(tmp_path), edition="hn")) == (  # type: ignore[arg-type]
        "edition must be en-10k or en, not 'hn'"
    )
    file = write(tmp_path / "tasks_1-20_v1-2/en-10k/qa1_single-supporting-fact_test.txt", "1 A.\n2 Q?\tattic\t1\n")
    assert said(ValueError, lambda: BAbI(str(tmp_path)).read("test")) == (
        f"{file}: 'attic' answers no question of the training part"
    )


# ---------------------------------------------------------------------- CNN


def question(story: str, query: str, answer: str) -> str:
    return (
        f"http://web.archive.org/web/1id_/http://www.cnn.com/x.html\n\n{story}\n\n{query}\n\n{answer}\n\n"
        "@entity2:CNN\n@entity13:An: odd  Name\n@entity0:X\n"
    )


def cnn(root: Path) -> None:
    for folder, name in (("training", "a"), ("validation", "b"), ("test", "c")):
        for i in (1, 0):
            content = question(
                f'( @entity2 ) -- {name}{i} @entity13 said , " @entity2 \'s caf\u00e9 "',
                f"@placeholder of @entity0 {name}{i}",
                "@entity13",
            )
            write(root / "cnn" / "questions" / folder / f"{name}{i}.question", content)
        write(root / "cnn" / "questions" / folder / "list.txt", "not a question")


@small
def test_cnn(tmp_path: Path) -> None:
    cnn(tmp_path)
    data = CNN(str(tmp_path))
    assert data.num_classes == 596 and data.class_names[13] == "entityonethree" and len(data.class_names) == 596
    assert data.pairs and data.domain_names == ["cnn"]
    for part, name in zip(PARTS, "abc", strict=True):
        assert data.read(part) == Examples(
            [f'( entitytwo ) -- {name}{i} entityonethree said , " entitytwo \'s caf\u00e9 "' for i in (0, 1)],
            [13, 13],
            [f"placeholder of entityzero {name}{i}" for i in (0, 1)],
            candidates=[[2, 13]] * 2,
        )


def test_parse_cloze() -> None:
    content = question("@entity10 met @entity9 .", "@placeholder met", "@entity5")
    # the answer is a candidate, though it isn't in the story; without the list of names it is read as well
    assert parse_cloze(content) == Cloze("entityonezero met entitynine .", "placeholder met", 5, [5, 9, 10])
    assert parse_cloze(content.partition("\n\n@entity2:")[0]) == parse_cloze(content)
    assert parse_cloze(content.replace("@placeholder", "@ placeholder")) == parse_cloze(content)


def test_entities_stay_one_word_each_of_its_own() -> None:
    names = [spell_entity(number) for number in range(596)]
    assert names[305] == "entitythreezerofive" and len(set(names)) == 596
    assert all(words_of(name) == [name] for name in names)
    assert words_of("( entityonetwo ) 's placeholder") == ["(", "entityonetwo", ")", "'", "s", "placeholder"]


@small
def test_a_batch_of_each_kind(tmp_path: Path) -> None:
    tree(tmp_path)
    babi(tmp_path, 20)
    cnn(tmp_path)
    single: Any = SST(str(tmp_path), min_count=1)
    batch = single.part("test").plain([0])
    assert [single.vocabulary[i] for i in batch["tokens"][0]] == ["<unk>", "<unk>"]  # "Not well", never trained on
    stories: Any = BAbI(str(tmp_path), min_count=1)
    batch = stories.part("train").plain([0, 1])
    assert batch["query"].shape == (2, 5) and "candidates" not in batch and stories.max_tokens == 2500
    assert [stories.vocabulary[i] for i in batch["tokens"][0][:6]] == ["mary", *"10 moved to the".split(), "office"]
    assert sum(stories.class_counts) == 34
    data: Any = CNN(str(tmp_path), min_count=1)
    batch = data.part("train").plain([0, 1])
    assert batch["candidates"].shape == (2, 596) and batch["candidates"].nonzero().tolist() == [
        [0, 2],
        [0, 13],
        [1, 2],
        [1, 13],
    ]
    assert bool(batch["candidates"].gather(1, batch["label"][:, None]).all()) and data.max_tokens == 2000
    assert "entityonethree" in data.vocabulary and "placeholder" in data.vocabulary


@small
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (question("S", "no gap", "@entity1"), "line 5: expected a question with @placeholder, not 'no gap'"),
        (question("S", "@placeholder", "Obama"), "line 7: expected an answer @entity<number>, not 'Obama'"),
        (question("S", "@placeholder", "@entity1 x"), "line 7: expected an answer @entity<number>, not '@entity1 x'"),
        ("url\nS\n\nQ", "line 2: expected a blank line between address, story, question and answer"),
        (
            "url\n\nS\n\n@placeholder\n\n@entity1\n@entity1:X\n",
            "line 8: expected a blank line between address, story, question and answer",
        ),
        ("", "line 5: expected a question with @placeholder, not ''"),
        (question("@entity596", "@placeholder", "@entity1"), "entity596, but the release has none above 595"),
    ],
)
def test_malformed_questions(content: str, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "test" / "q.question", content)
    line = said(ValueError, lambda: CNN(str(tmp_path)).read("test"))
    assert line in (f"{file}, {reason}", f"{file}: {reason}")


# ---------------------------------------------------------------------- pairs of sentences


def pair(label: str, premise: str, hypothesis: str) -> str:
    row = {
        "annotator_labels": [label],
        "gold_label": label,
        "pairID": "1",
        "sentence1": premise,
        "sentence2": hypothesis,
    }
    return json.dumps(row) + "\n"


def snli(root: Path) -> None:
    for part in ("train", "dev", "test"):
        rows = [
            pair("neutral", f"A man\u2028of {part}.", "He waits."),
            pair("-", "Two dogs.", "Cats."),
            pair("entailment", "Two dogs run.", "Animals move."),
            pair("contradiction", "It rains.", "It's dry."),
        ]
        write(root / "snli_1.0" / f"snli_1.0_{part}.jsonl", "".join(rows))


def mnli(root: Path, each: int = 4) -> None:
    for part in ("train", "dev_matched", "dev_mismatched"):
        rows = [pair("-", "x", "y")]
        for i in range(each):
            rows += [
                pair(name, f"P {name} {i} {part}", f"H {name} {i}")
                for name in ("contradiction", "neutral", "entailment")
            ]
        write(root / "multinli_1.0" / f"multinli_1.0_{part}.jsonl", "".join(rows))


@small
def test_snli(tmp_path: Path) -> None:
    snli(tmp_path)
    data = SNLI(str(tmp_path))
    assert data.class_names == ["entailment", "neutral", "contradiction"] and data.num_classes == 3
    assert data.pairs and data.domain_names == ["snli"]
    for part, name in zip(PARTS, ("train", "dev", "test"), strict=True):
        assert data.read(part) == Examples(
            [f"A man\u2028of {name}.", "Two dogs run.", "It rains."],
            [1, 0, 2],
            ["He waits.", "Animals move.", "It's dry."],
        )


@small
def test_mnli(tmp_path: Path) -> None:
    mnli(tmp_path, 1)
    data = MultiNLI(str(tmp_path))
    assert data.class_names == ["entailment", "neutral", "contradiction"] and data.num_classes == 3
    assert data.pairs and data.domain_names == ["matched", "mismatched"]
    names = ("contradiction", "neutral", "entailment")
    assert data.read("test") == Examples(
        [f"P {name} 0 dev_{part}" for part in ("matched", "mismatched") for name in names],
        [2, 1, 0] * 2,
        [f"H {name} 0" for name in names] * 2,
        [0] * 3 + [1] * 3,
    )
    mnli(tmp_path, 10)
    train, val = data.read("train"), data.read("val")
    assert len(val.text) == 6 and len(train.text) == 24 and train.domain is None and train.query is not None
    assert all(q == p.replace("P ", "H ").removesuffix(" train") for p, q in zip(train.text, train.query, strict=True))
    label = {"entailment": 0, "neutral": 1, "contradiction": 2}
    assert train.label == [label[text.split()[1]] for text in train.text]


@small
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "expected JSON with gold_label, sentence1 and sentence2, not '{'"),
        ("[1]", "expected JSON with gold_label, sentence1 and sentence2, not '[1]'"),
        (
            '{"gold_label": "-", "sentence1": "a"}',
            'expected JSON with gold_label, sentence1 and sentence2, not \'{"gold_label": "-", "sentence1": "a"}\'',
        ),
        (pair("maybe", "a", "b"), "gold_label is 'maybe', not one of entailment, neutral, contradiction or -"),
    ],
)
def test_malformed_pairs(row: str, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "snli_1.0_dev.jsonl", pair("neutral", "a", "b") + row)
    assert said(ValueError, lambda: SNLI(str(tmp_path)).read("val")) == f"{file}, line 2: {reason}"


def test_cnns_own_questions_are_read_as_its_files(tmp_path: Path) -> None:
    data = CNN(root=str(tmp_path))
    data.predict_texts = tmp_path / "mine.txt"
    data.predict_texts.write_text("@entity12 met @entity3 .\twho met @ placeholder ?\n")
    found = data.read_given()
    assert found.text == ["entityonetwo met entitythree ."] and found.query == ["who met placeholder ?"]
    assert found.candidates == [[3, 12]] and found.label == [-1]
    data.predict_texts.write_text("nobody .\twho ?\n")
    with pytest.raises(ValueError, match="line 1: a story needs entities"):
        data.read_given()
