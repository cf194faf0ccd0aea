"""CLIP's two towers with prompts as explicit arguments: of any CLIP of open_clip, and of the small one trained here.

The small one is an ``open_clip.CLIP``, too: a ViT over 16 tokens (a convolutional stem in place of the patches) and a
text transformer over words. It is a toy: it knows 1,400 emoji and their keywords, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import open_clip
    from open_clip.transformer import VisionTransformer, text_global_pool
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed: pip install 'perturbation-recipes[clip]'", name=error.name
    ) from error

#: The small CLIP that comes with the project.
EMOJI = Path(__file__).parents[2] / "datamodules" / "embedded" / "clip" / "emoji.safetensors"
#: Its channels' mean and standard deviation.
_MEAN, _STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

Tokenize = Callable[[Sequence[str]], Tensor]


class Loaded(NamedTuple):
    """A CLIP, what turns texts into its tokens (N, L), and how its images are normalised."""

    clip: Any
    tokenize: Tokenize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


# ---------------------------------------------------------------------- the small CLIP


class Words:
    """Whole words as tokens, ``<start> ... <end>`` padded to ``length``; ``<end>`` has the highest number.

    Args:
        vocabulary: the words it knows, in the order of their numbers; others become ``<unknown>``.
        length: of every row; longer texts are cut.
    """

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        names = ["<pad>", "<unknown>", "<start>", *vocabulary, "<end>"]
        self.vocabulary, self.length, self.size = list(vocabulary), length, len(names)
        number = {name: i for i, name in enumerate(names)}
        if len(number) != len(names):
            raise ValueError("a word stands twice in the vocabulary")
        self._tokenizer = Tokenizer(models.WordLevel(number, unk_token="<unknown>"))
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("’", "")])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("_", "removed"), pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
        )
        ends = [("<start>", number["<start>"]), ("<end>", number["<end>"])]
        self._tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=0, pad_token="<pad>")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([line.ids for line in self._tokenizer.encode_batch(list(texts))])


def stem(width: int) -> nn.Sequential:
    """Three strided convolutions in place of 8x8 patches: (B, 3, H, W) to (B, width, H / 8, W / 8).

    Group norm, since the tower is frozen later and must not learn from batches.
    """
    layers: list[nn.Module] = []
    channels = [3, width // 4, width // 2, width]
    for i, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        layers += [nn.Conv2d(before, after, 3, 1 if i == 0 else 2, 1, bias=False), nn.GroupNorm(8, after), nn.GELU()]
        layers += [nn.Conv2d(after, after, 3, 2, 1, bias=False)] if i == 0 else []
        layers += [nn.GroupNorm(8, after), nn.GELU()] if i == 0 else []
    return nn.Sequential(*layers)


def small(config: dict[str, Any]) -> Any:
    """An ``open_clip.CLIP`` with a convolutional stem; ``config``: embed_dim, vision_cfg, text_cfg."""
    clip = open_clip.CLIP(**config)
    clip.visual.conv1 = stem(config["vision_cfg"]["width"])
    return clip


def save_small(file: Path, clip: nn.Module, config: dict[str, Any], vocabulary: Sequence[str]) -> None:
    """Weights in half precision with what is needed to build the network again, as one safetensors file."""
    weights = {name: value.detach().half().contiguous().cpu() for name, value in clip.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, {"config": json.dumps(config), "vocabulary": json.dumps(list(vocabulary))})


def load_small(file: Path) -> Loaded:
    """What :func:`save_small` wrote.

    Raises:
        FileNotFoundError, ValueError: if it isn't there, or is something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: train it with python -m recipes.clip fit")
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            weights = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  # no mapping
        config, vocabulary = json.loads(about["config"]), json.loads(about["vocabulary"])
    except Exception as error:  # of safetensors' own kind, which it doesn't export
        raise ValueError(f"{file} is not a CLIP of recipes.clip: {' '.join(str(error).split())}") from error
    clip = small(config)
    clip.load_state_dict(weights)
    words = Words(vocabulary, config["text_cfg"]["context_length"])
    return Loaded(clip, words, _MEAN, _STD, config["vision_cfg"]["image_size"])


# ---------------------------------------------------------------------- any CLIP


def load(name: str, pretrained: str | None = None) -> Loaded:
    """A CLIP with ViT towers.

    Args:
        name: ``emoji`` (the small one that comes with the project), a ``.safetensors`` file that ``recipes.clip``
            wrote, or a model of open_clip (``ViT-B-16``, ``hf-hub:...``, ``local-dir:...``).
        pretrained: open_clip's name of the weights (``openai``), or a file of them; None: random, or the schema's.

    Raises:
        ValueError: for a name that open_clip doesn't know, weights that can't be had, towers without ViT.
    """
    if name == "emoji" or name.endswith(".safetensors"):
        return load_small(EMOJI if name == "emoji" else Path(name).expanduser())
    if ":" not in name and name not in open_clip.list_models():
        near = [m for m in open_clip.list_models() if m.lower()[:5] == name.lower()[:5]][:5]
        raise ValueError(f"open_clip has no model '{name}'" + (f"; near it: {', '.join(near)}" if near else ""))
    known = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and pretrained not in known and not Path(pretrained).expanduser().exists():
        raise ValueError(f"open_clip has no weights '{pretrained}' of {name}; there are: {', '.join(known) or 'none'}")
    try:
        clip = open_clip.create_model(name, pretrained=pretrained)
        tokenize = open_clip.get_tokenizer(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} needs the package {error.name}: pip install {error.name}") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} ({pretrained}) can't be loaded: {' '.join(str(error).split())[:200]}; fetching weights needs a "
            "network, or give a file of them"
        ) from error
    size = clip.visual.image_size
    mean, std = (tuple(getattr(clip.visual, key)) for key in ("image_mean", "image_std"))
    return Loaded(clip, tokenize, mean, std, size if isinstance(size, int) else size[0])


def check(clip: Any) -> None:
    """Whether prompts can be put into both towers.

    Raises:
        ValueError: saying what stands in the way.
    """
    visual, text = clip.visual, text_tower(clip)
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise ValueError(f"prompts need a ViT without attention pooling as image tower, not {type(visual).__name__}")
    if not hasattr(text, "token_embedding") or getattr(text, "cls_emb", None) is not None:
        raise ValueError(f"prompts need open_clip's own text tower without a class token, not {type(text).__name__}")
    if text.attn_mask is None or _pooling(text)[0] not in ("argmax", "eos"):
        raise ValueError("prompts need a causal text tower that is read at the end of the text")


def text_tower(clip: Any) -> Any:
    """Where the text tower's parts are: in the CLIP itself, or in its ``text``."""
    return clip.text if hasattr(clip, "text") else clip


def _pooling(text: Any) -> tuple[str, int | None]:
    kind = getattr(text, "text_pool_type", None) or text.pool_type
    return kind, getattr(text, "text_eos_id", getattr(text, "eos_id", None))


def _blocks(tower: Any, x: Tensor, place: slice, deep: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Through all blocks of a transformer; before block j the tokens at ``place`` are replaced by ``deep[j - 1]``.

    Args:
        x: (B, L, D).
        deep: each (M, D), or (B, M, D).
    """
    if not tower.batch_first:
        raise ValueError("this open_clip lays tokens out as (L, B, D): install open_clip_torch 3 or newer")
    for j, block in enumerate(tower.resblocks):
        if 0 < j <= len(deep):
            prompt = deep[j - 1].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, : place.start], prompt, x[:, place.stop :]], 1)
        if tower.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
    return x


def encode_image(clip: Any, image: Tensor, ctx: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
    """Image features (B, D), not normalised.

    Args:
        image: (B, 3, H, W), normalised.
        ctx: (M, width) tokens behind those of the patches, without a position.
        deep: those that take their place before block 1, 2, ...
    """
    visual = clip.visual
    if ctx is None:
        return clip.encode_image(image)
    x = visual._embeds(image)
    length = x.shape[1]
    x = torch.cat([x, visual.ln_pre(ctx).to(x.dtype).expand(len(x), -1, -1)], 1)
    x = _blocks(visual.transformer, x, slice(length, x.shape[1]), deep, None)
    pooled, _ = visual._pool(x[:, :length])
    return pooled if visual.proj is None else pooled @ visual.proj


def encode_text(clip: Any, tokens: Tensor, ctx: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
    """Text features (N, D), not normalised.

    Positions behind the end of the longest text are left out: the tower is causal, so nothing looks at them.

    Args:
        tokens: (N, L) numbers, of which positions 1 to M are placeholders where there is ``ctx``.
        ctx: (M, width), or (N, M, width), in place of the embeddings there.
        deep: those that take their place before block 1, 2, ...
    """
    if ctx is None:
        return clip.encode_text(tokens)
    text = text_tower(clip)
    kind, eos = _pooling(text)
    end = tokens.argmax(-1) if kind == "argmax" else tokens.eq(eos or 0).int().argmax(-1)
    tokens = tokens[:, : int(end.max()) + 1]
    place = slice(1, 1 + ctx.shape[-2])
    x = text.token_embedding(tokens)
    x = torch.cat([x[:, :1], ctx.to(x.dtype).expand(len(x), -1, -1), x[:, place.stop :]], 1)
    x = x + text.positional_embedding[: x.shape[1]].to(x.dtype)
    x = _blocks(text.transformer, x, place, deep, text.attn_mask[: x.shape[1], : x.shape[1]])
    x = text_global_pool(text.ln_final(x), tokens, kind, eos_token_id=eos)
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(x)
    return x if text.text_projection is None else x @ text.text_projection


def fingerprint(*modules: nn.Module) -> str:
    """A hash of all weights, to tell one frozen CLIP from another."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
