"""What a text classifier attends to, as a page of HTML, and the figure of :mod:`callbacks.explanations`."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from callbacks.perturbation import device_of
from callbacks.report import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Mapping[str, Tensor]
#: The background's colour, a blue that is told from light and dark by all eyes, and its opacity at the strongest: so
#: that black words on white and white words on black stay readable.
COLOUR, OPACITY = "0, 114, 178", 0.6
#: Of lines, told apart also without colours (Okabe and Ito), each with its marker.
LINES = (("#0072b2", "o"), ("#d55e00", "s"), ("#767676", "^"))

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.7 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       background: Canvas; color: CanvasText; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0; }
article { border-top: 1px solid GrayText; padding: 1rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
.side > p { margin: .3rem 0; overflow-wrap: anywhere; }
.word { border-radius: .2em; padding: .1em .15em; }
.note { font-size: .85rem; opacity: .85; }
"""


class Heat(NamedTuple):
    """What one network made of a text: attention of each word (adds to 1), its answer and how sure it was of it."""

    attention: list[float]
    predicted: str
    confidence: float


class Shown(NamedTuple):
    """A text, its query if it has one, its class, and what the network and perhaps another one made of it."""

    place: int
    words: list[str]
    query: list[str]
    label: str
    heat: Heat
    beside: Heat | None = None


# ---------------------------------------------------------------------- what a network attends to


@contextmanager
def hooked(layer: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """A hook on a layer's output, inside."""
    handle = layer.register_forward_hook(hook)
    try:
        # a compiled graph wouldn't know of the hook
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def attended(module: Callable[[Any], Tensor], batch: Batch, weights: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and attention (B, T), what the layer ``weights`` gives; without gradients.

    Raises:
        ValueError: if the layer isn't called, or gives no (B, T).
    """
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(weights, lambda layer, args, output: seen.append(output)):
        logits = module(batch)
    expect(seen, batch["tokens"].shape, "attention")
    return logits, seen[0]


def expect(seen: Sequence[Tensor], shape: Sequence[int], what: str) -> None:
    """ValueError unless a layer was called once and gave this shape, in which -1 is any size."""
    if len(seen) != 1:
        raise ValueError(f"Explanations needs a layer of {what} that is called once, not {len(seen)} times: name it")
    found = tuple(seen[0].shape) if isinstance(seen[0], Tensor) else ()
    if len(found) != len(shape) or any(s not in (-1, f) for s, f in zip(shape, found, strict=True)):
        words = ", ".join("D" if size == -1 else str(size) for size in shape)
        raise ValueError(f"Explanations needs {what} of shape ({words}), but the layer gives {found}: name another")


def heats(module: nn.Module, batch: Batch, weights: nn.Module) -> list[Heat]:
    """What a network makes of each text of a batch, by its layer of attention."""
    logits, attention = attended(module, batch, weights)
    sure, predicted = logits.float().softmax(1).max(1)
    rows = zip(attention.tolist(), batch["attention_mask"].sum(1), predicted.tolist(), sure.tolist(), strict=True)
    return [Heat(a[: int(n)], class_name(module, p), s) for a, n, p, s in rows]


def class_name(module: nn.Module, label: int) -> str:
    names = list(getattr(module, "class_names", None) or [])
    return str(names[label]) if 0 <= label < len(names) else str(label)


def words_of(module: nn.Module, tokens: Tensor, trainer: Trainer | None = None, index: int = -1) -> list[str]:
    """A text's words as the data have them, else as the vocabulary has them, else their numbers."""
    given = getattr(getattr(trainer, "datamodule", None), "words", None)
    if callable(given):
        (words,) = given("test", [index])
        if len(words) >= len(tokens):  # the text may have been cut for the network
            return [str(word) for word in words[: len(tokens)]]
    known = list(getattr(module, "vocabulary", None) or [])
    return [str(known[i]) if i < len(known) else str(i) for i in tokens.tolist()]


def opened(file: Path, module: LightningModule) -> LightningModule:
    """The network of a checkpoint, where ``module`` is, and of its class, vocabulary and classes."""
    name = type(module).__name__
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}: 'beside' takes one of {name}, or leave it out")
    try:
        with isolate_rng():  # a network is drawn before it is filled
            other = type(module).load_from_checkpoint(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from KeyError to its own
        first = (str(error).strip().splitlines() or [""])[0][:160]
        raise ValueError(f"{file} can't be opened as {name} ({type(error).__name__}: {first})") from error
    for attribute in ("vocabulary", "class_names"):
        if list(getattr(other, attribute, None) or []) != list(getattr(module, attribute, None) or []):
            raise ValueError(
                f"{file} has another {attribute} than this run: 'beside' takes one trained on the same data"
            )
    return other.to(device_of(module)).eval()


# ---------------------------------------------------------------------- the page and the figure


def strengths(attention: Sequence[float]) -> list[float]:
    """Each word's attention over that of the text's most attended word, in [0, 1]."""
    most = max(attention, default=0.0)
    return [value / most if most > 0 else 0.0 for value in attention]


def _word(word: str, attention: float, strength: float) -> str:
    back = f"rgba({COLOUR}, {OPACITY * strength:.3f})"
    return f'<span class="word" style="background: {back}" title="{attention:.4f}">{html.escape(word)}</span>'


def _side(name: str, words: Sequence[str], heat: Heat, label: str) -> str:
    right = "✓ right" if heat.predicted == label else "✗ wrong"
    answer = f"<b>{html.escape(heat.predicted)}</b> ({heat.confidence:.2f}), {right}"
    rows = zip(words, heat.attention, strengths(heat.attention), strict=True)
    marked = [_word(word, attention, strength) for word, attention, strength in rows]
    return f'<div class="side"><p class="note">{html.escape(name)}: {answer}</p><p>{" ".join(marked)}</p></div>'


def page(shown: Sequence[Shown], beside: str | None = None) -> str:
    """A page of HTML that needs nothing else: texts with each word on a background as strong as its attention.

    Args:
        shown: the texts.
        beside: what the other network is called, where there is one.
    """
    steps = " ".join(_word(f"{share:.0%}", share, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    parts = []
    for text in shown:
        sides = [_side("this network", text.words, text.heat, text.label)]
        if text.beside is not None:
            sides.append(_side(beside or "the other network", text.words, text.beside, text.label))
        query = f'<p class="note">query: {html.escape(" ".join(text.query))}</p>' if text.query else ""
        title = f"<h2>text {text.place}, of class {html.escape(text.label)}</h2>"
        parts.append(f'<article>{title}{query}<div class="sides">{"".join(sides)}</div></article>')
    other = f" Beside it stands what {html.escape(beside)} attends to and answers." if beside else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>attention</title><style>{_STYLE}</style>'
        f"</head>\n<body><h1>What the network attends to</h1>\n<p>The more of its attention the network gives to a"
        " word, the stronger the colour behind it. Each text is scaled by its most attended word, so colours can't be"
        " compared between texts; the share itself shows when the pointer rests on a word. Above the words stands the"
        " class that the network answers, with its probability. That a word is attended to doesn't prove that the"
        f" answer hangs on it: explanations.png, in the same folder, compares the two.{other}</p>\n"
        f"<p>Attention, of that of the most attended word: {steps}</p>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def draw_explanations(
    tau: Sequence[float], curves: Mapping[str, Sequence[tuple[float, float]]], examples: int
) -> Figure:
    """Kendall's tau over the texts, accuracy and divergence under adversarial attention, and accuracy under erasure.

    Args:
        tau: of the texts that have one.
        curves: points (x, value) of ``attention_acc`` and ``attention_js`` by the adversary's size, and of
            ``erasure_attention``, ``erasure_gradient`` and ``erasure_random`` by the share of words that are gone.
        examples: number of texts.
    """
    figure = new_figure(12.6, 3.6)
    left, middle, right = figure.subplots(1, 3)
    left.hist(tau, bins=[i / 10 - 1 for i in range(21)], color=LINES[0][0], edgecolor="white", linewidth=0.5)
    if tau:
        mean = math.fsum(tau) / len(tau)
        left.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"mean {mean:.3f}")
        left.legend(frameon=False, fontsize=8)
    left.set_xlabel("Kendall's tau of attention and importance")
    left.set_ylabel("texts")
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.set_title(f"do they rank the words alike? ({len(tau)} of {examples} texts)", fontsize=10)

    def lines(axis: Any, names: Mapping[str, str], factor: float = 1.0) -> None:
        for (name, words), (colour, marker) in zip(names.items(), LINES, strict=False):
            x, y = zip(*curves[name], strict=True)
            axis.plot([factor * value for value in x], y, marker=marker, color=colour, markersize=4, label=words)

    lines(middle, {"attention_acc": "accuracy", "attention_js": "Jensen-Shannon divergence (at most 0.69)"})
    middle.set_ylabel("accuracy; divergence in nats")
    middle.set_xlabel("size of the adversarial attention (l2, of scores)")
    middle.set_title("how well does attention stand an adversary?", fontsize=10)
    named = {"erasure_attention": "most attended", "erasure_gradient": "most important", "erasure_random": "random"}
    lines(right, named, 100)
    right.set_xlabel("words deleted, %")
    right.set_ylabel("accuracy")
    right.set_title("does the answer hang on those words?", fontsize=10)
    for axis, place in ((middle, "best"), (right, "lower left")):
        axis.set_ylim(-0.02, 1.02)
        axis.legend(frameon=False, fontsize=8, loc=place)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
