"""Texts as a condition: the hidden states of a frozen CLIP text model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Texts:
    """The hidden states of texts in a frozen CLIP text model of Hugging Face; no part of the module or its checkpoints.

    Args:
        folder: with the model and its tokenizer.

    Raises:
        ValueError: without transformers, or if there is no such model.
    """

    def __init__(self, folder: str) -> None:
        try:
            from transformers import AutoTokenizer, CLIPTextModel
        except ImportError:
            raise ValueError('texts need transformers: pip install -e ".[diffusion]"') from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = CLIPTextModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no CLIP text model with its tokenizer ({' '.join(str(error).split())[:150]}): "
                "fetch openai/clip-vit-large-patch14 from huggingface.co"
            ) from None
        self.width, self.length = self.model.config.hidden_size, self.model.config.max_position_embeddings
        self.nothing = self([""], torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(N, tokens, width), float32."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        self.model.to(device)
        with torch.autocast(device.type, enabled=False):
            found = self.model(tokens.input_ids.to(device)).last_hidden_state
        self.nothing = self.nothing.to(device) if hasattr(self, "nothing") else found
        return found
