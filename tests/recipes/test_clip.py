"""The small CLIP and CLIP's towers with prompts: against open_clip itself and plain readings of the formulas."""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor

from datamodules.captions import EmojiCaptions
from datamodules.emoji import CLASSES
from recipes._cli import run
from recipes.clip import towers
from recipes.clip.module import contrastive_loss

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 48, "heads": 4, "layers": 3},
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
#: Texts of 4, 6 and 9 tokens; 39 is the end.
TOKENS = torch.tensor(
    [
        [38, 5, 6, 39, 0, 0, 0, 0, 0, 0, 0, 0],
        [38, 5, 6, 9, 3, 39, 0, 0, 0, 0, 0, 0],
        [38, 7, 7, 7, 12, 4, 30, 31, 39, 0, 0, 0],
    ]
)


def tiny(kind: str) -> Any:
    torch.manual_seed(3)
    clip = {
        "clip": lambda: open_clip.CLIP(**CONFIG),
        "quick": lambda: open_clip.CLIP(**CONFIG, quick_gelu=True),
        "custom": lambda: open_clip.CustomTextCLIP(**CONFIG),
        "small": lambda: towers.small(CONFIG),
        "average": lambda: open_clip.CLIP(**{**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "pool_type": "avg"}}),
    }[kind]()
    with torch.no_grad():  # no zeros: what is forgotten would not show
        for parameter in clip.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return clip.eval()


every = pytest.mark.parametrize("kind", ["clip", "quick", "custom", "small", "average"])


@every
@torch.no_grad()
def test_without_prompts_the_towers_are_open_clips_own(kind: str) -> None:
    clip = tiny(kind)
    towers.check(clip)
    assert torch.equal(towers.encode_image(clip, IMAGES), clip.encode_image(IMAGES))
    assert torch.equal(towers.encode_text(clip, TOKENS), clip.encode_text(TOKENS))


@every
@torch.no_grad()
def test_words_own_embeddings_as_prompts_change_nothing(kind: str) -> None:
    clip = tiny(kind)
    ctx = towers.text_tower(clip).token_embedding(TOKENS[:, 1:3])
    found = towers.encode_text(clip, TOKENS, ctx)
    torch.testing.assert_close(found, clip.encode_text(TOKENS), rtol=1e-5, atol=1e-6)


@every
def test_prompts_stand_where_the_paper_has_them(kind: str) -> None:
    """Against open_clip's own forward pass with hooks that replace the tokens."""
    clip, g = tiny(kind), torch.Generator().manual_seed(1)
    text, vision = towers.text_tower(clip), clip.visual
    ctx, deep = torch.randn(2, 48, generator=g), [torch.randn(2, 48, generator=g)]
    seen, deeper = torch.randn(2, 32, generator=g), [torch.randn(2, 32, generator=g) for _ in range(2)]
    handles = [
        text.token_embedding.register_forward_hook(
            lambda m, a, out: torch.cat([out[:, :1], ctx.expand(3, -1, -1), out[:, 3:]], 1)
        ),
        text.transformer.resblocks[1].register_forward_pre_hook(
            lambda m, a: (torch.cat([a[0][:, :1], deep[0].expand(3, -1, -1), a[0][:, 3:]], 1), *a[1:])
        ),
    ]
    with torch.no_grad():
        wanted = clip.encode_text(TOKENS)
    for handle in handles:
        handle.remove()
    found = towers.encode_text(clip, TOKENS, ctx, deep)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, towers.encode_text(clip, TOKENS, ctx), atol=1e-3)

    def replaced(j: int) -> Any:
        return lambda m, a: (torch.cat([a[0][:, :17], deeper[j].expand(3, -1, -1)], 1), *a[1:])

    handles = [
        vision.ln_pre.register_forward_pre_hook(lambda m, a: (torch.cat([a[0], seen.expand(3, -1, -1)], 1),)),
        vision.transformer.resblocks[1].register_forward_pre_hook(replaced(0)),
        vision.transformer.resblocks[2].register_forward_pre_hook(replaced(1)),
        vision.ln_post.register_forward_pre_hook(lambda m, a: (a[0][:, :17],)),  # prompts aren't pooled
    ]
    with torch.no_grad():
        wanted = clip.encode_image(IMAGES)
    for handle in handles:
        handle.remove()
    found = towers.encode_image(clip, IMAGES, seen, deeper)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_prompts_get_gradients_and_checkpointing_changes_none(size: int, depth: int, each: bool) -> None:
    clip, g = tiny("clip").requires_grad_(False), torch.Generator().manual_seed(size)
    shape = (3, size, 48) if each else (size, 48)
    ctx = torch.randn(shape, generator=g, requires_grad=True)
    deep = [torch.randn(size, 48, generator=g, requires_grad=True) for _ in range(depth)]
    seen = [torch.randn(size, 32, generator=g, requires_grad=True) for _ in range(depth + 1)]
    found = []
    for saving in (False, True):
        clip.set_grad_checkpointing(saving)
        out = towers.encode_text(clip, TOKENS, ctx, deep) * towers.encode_image(clip, IMAGES, seen[0], seen[1:])
        found.append(torch.autograd.grad(out.square().sum(), [ctx, *deep, *seen]))
    for plain, saved in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {"attentional_pool": True}}, "attention pooling"),
        ({"vision_cfg": {"layers": (1, 1, 1, 1), "width": 8}}, "not ModifiedResNet"),
        ({"text_cfg": {"no_causal_mask": True}}, "causal"),
        ({"text_cfg": {"pool_type": "last"}}, "causal"),
        ({"text_cfg": {"embed_cls": True}}, "class token"),
    ],
)
def test_towers_without_a_place_for_prompts_say_so(change: dict[str, Any], words: str) -> None:
    config = {k: {**v, **change.get(k, {})} if isinstance(v, dict) else v for k, v in CONFIG.items()}
    with pytest.raises(ValueError, match=words):
        towers.check(open_clip.CustomTextCLIP(**config))


# ---------------------------------------------------------------------- words and files


def test_words_are_tokens() -> None:
    tokenize = towers.Words(["red", "green", "2nd"], 6)
    assert tokenize.size == 7
    rows = tokenize(["Red, GREEN!", "red_green", "", "mauve 2nd", "red " * 9])
    assert rows.tolist() == [
        [2, 3, 4, 6, 0, 0],
        [2, 3, 4, 6, 0, 0],
        [2, 6, 0, 0, 0, 0],
        [2, 1, 5, 6, 0, 0],
        [2, 3, 3, 3, 3, 6],
    ]
    assert (rows.argmax(1) == (rows == 6).int().argmax(1)).all()
    with pytest.raises(ValueError, match="twice"):
        towers.Words(["red", "red"], 6)


def test_a_saved_clip_is_the_same_but_for_half_precision(tmp_path: Path) -> None:
    vocabulary = [f"w{i}" for i in range(36)]
    clip = tiny("small").half().float()
    towers.save_small(tmp_path / "a" / "clip.safetensors", clip, CONFIG, vocabulary)
    loaded = towers.load(str(tmp_path / "a" / "clip.safetensors"))
    assert loaded.image_size == 32 and towers.fingerprint(loaded.clip) == towers.fingerprint(clip)
    assert loaded.tokenize(["w3 w35"]).tolist() == [[2, 6, 38, 39, *[0] * 8]]
    assert torch.equal(loaded.clip.eval().encode_text(TOKENS), clip.encode_text(TOKENS))
    clip.logit_scale.data += 1
    assert towers.fingerprint(loaded.clip) != towers.fingerprint(clip)


def test_bad_names_and_files_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="recipes.clip fit"):
        towers.load(str(broken))
    broken.write_bytes(b"no")
    with pytest.raises(ValueError, match="x.safetensors is not a CLIP"):
        towers.load(str(broken))
    with pytest.raises(ValueError, match="no model 'ViT-B-61'; near it: ViT-B"):
        towers.load("ViT-B-61")
    with pytest.raises(ValueError, match="no weights 'opeani' of ViT-B-32; there are: .*openai"):
        towers.load("ViT-B-32", "opeani")


# ---------------------------------------------------------------------- the recipe


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.integers(1, 9))
def test_the_loss_is_the_formula(size: int, seed: int, concepts: int) -> None:
    image, text = unit(size, 5, seed=seed), unit(size, 5, seed=seed + 1)
    concept = torch.randint(0, concepts, (size,), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(size):
            answers = [j for j in range(size) if concept[j] == concept[i]]
            scores = torch.stack([7.0 * (a[i] * b[j]).sum() for j in range(size)]).double()
            total += float(sum(scores.logsumexp(0) - scores[j] for j in answers)) / len(answers) / size / 2
    assert float(contrastive_loss(image, text, torch.tensor(7.0), concept)) == pytest.approx(total, rel=1e-5)


def test_of_different_concepts_it_is_open_clips_loss() -> None:
    image, text, scale = unit(6, 5, seed=1), unit(6, 5, seed=2), torch.tensor(9.0)
    torch.testing.assert_close(contrastive_loss(image, text, scale, torch.arange(6)), ClipLoss()(image, text, scale))


SMALL = [
    *("--model.width", "32", "--model.embed_dim", "32", "--model.layers", "2", "--model.text_width", "32"),
    *("--model.text_layers", "1", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"),
    *("--data.batch_size", "64", "--wandb", "off", "--trainer.log_every_n_steps", "1"),
]


def test_the_command_writes_a_clip_that_loads(tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path)]
    assert run("recipes.clip.module.Contrastive", "clip", ["fit", *SMALL, *root]) == 0
    (folder,) = (tmp_path / "clip").iterdir()
    loaded = towers.load(str(folder / "checkpoints" / "clip.safetensors"))
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in loaded.clip.state_dict().items():  # of the epoch that validated best
        torch.testing.assert_close(value, best[f"clip.{name}"], rtol=1e-3, atol=1e-5)
    assert loaded.image_size == 32 and loaded.tokenize(["a photo of a bird."]).shape == (1, 24)
    with (folder / "metrics.csv").open(newline="") as opened:
        values = {k: v for row in csv.DictReader(opened) for k, v in row.items() if v}
    assert {"train/loss", "val/acc", "test/acc", "test/acc_noto", "test/acc_fluent_mono"} <= values.keys()
    assert (folder / "plots" / "test.png").is_file()
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (50, 40), "red").save(images / "a.png")
    last = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--images", str(images)]
    assert run("recipes.clip.module.Contrastive", "clip", ["predict", *last, "--wandb", "off", *root]) == 0
    (table,) = tmp_path.glob("clip/*/predictions.csv")
    rows = list(csv.DictReader(table.open(newline="")))
    assert len(rows) == 1 and rows[0]["file"].endswith("a.png") and rows[0]["class"] in CLASSES


# ---------------------------------------------------------------------- the one that comes with the project


def test_the_embedded_clip_is_the_one_its_readme_speaks_of() -> None:
    folder = towers.EMOJI.parent
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert towers.EMOJI.stat().st_size < 4e6
    loaded = towers.load("emoji")
    data = EmojiCaptions()
    part = data.part("test")
    images = part.images.float() / 255
    tokens = loaded.tokenize([data.template.format(text) for text in data.class_texts])
    clip = loaded.clip.eval()
    with torch.no_grad():
        classes = clip.encode_text(tokens, normalize=True)
        predicted = (clip.encode_image((images - 0.5) / 0.5, normalize=True) @ classes.T).argmax(-1)
    right = (predicted == part.entries["label"]).float()
    styles = [float(right[part.entries["domain"] == i].mean()) for i in range(5)]
    told = re.search(r"mean of the five styles: (0\.\d+)", (folder / "README.md").read_text())
    assert told and float(told[1]) == pytest.approx(sum(styles) / 5, abs=5e-4)
    assert float(told[1]) >= 0.45
