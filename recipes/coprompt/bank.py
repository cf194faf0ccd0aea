"""The teacher's features of sentences about the classes: computed once, kept on disk by the hash of their content."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.latents import cache_folder

log = logging.getLogger(__name__)
#: Sentences that are encoded at a time.
CHUNK = 256
#: From so many on it is announced.
MANY = 1024


@torch.no_grad()
def encode(clip: Any, tokens: Tensor) -> Tensor:
    """Features (N, D) of length 1, float32, of texts (N, L), by the CLIP as it is."""
    device = clip.logit_scale.device
    chunks: Sequence[Tensor] = tokens.split(CHUNK)
    if len(tokens) >= MANY:
        log.info("encoding %d sentences about the classes", len(tokens))
    shown = track(chunks, "sentences", transient=True, disable=len(tokens) < MANY or not sys.stdout.isatty())
    with torch.autocast(device.type, enabled=False):
        found = [F.normalize(clip.encode_text(chunk.to(device)).float(), dim=-1) for chunk in shown]
    return torch.cat(found)


def encode_once(clip: Any, tokens: Tensor, weights: str) -> Tensor:
    """The same as :func:`encode`, taken from the disk where it was computed before.

    Args:
        weights: fingerprint of the CLIP.
    """
    # The precision, too: features in half precision are others.
    content = f"{weights}/{tuple(tokens.shape)}/{clip.logit_scale.dtype}".encode() + tokens.numpy().tobytes()
    file = cache_folder() / "sentences" / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors"
    if file.is_file():
        try:
            return load_file(file)["features"].to(clip.logit_scale.device)
        except Exception as error:  # of safetensors' own kind: cut off, or not ours
            log.warning("%s can't be read (%s): computed again", file, " ".join(str(error).split()))
    features = encode(clip, tokens)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            save_file({"features": features.cpu()}, part.name)
        Path(part.name).replace(file)  # whole or not at all, whoever else writes it
    except OSError as error:
        log.warning("%s can't be kept (%s): the next run computes it again", file, error)
    return features
