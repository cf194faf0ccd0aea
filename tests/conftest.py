"""Tests run side by side with others: one thread each, and nothing goes to anyone's W&B account."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"

import torch  # noqa: E402  # after the number of threads is set

torch.set_num_threads(1)
