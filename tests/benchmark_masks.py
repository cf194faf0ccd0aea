"""What pre-training under noise masks costs: a part of ``tests.benchmarks``, which says how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule

from callbacks.noise_mask import NoiseMask

#: Settings of rows; the published policy has a ResNet-10t on the whole image and 64 cells a side.
_PUBLISHED: dict[str, Any] = {"extractor": "resnet10t", "width": 512, "grid": 64, "blur_kernel": 13, "blur_sigma": 6.0}
ROWS: dict[str, dict[str, Any]] = {
    "small policy, image reduced to a quarter": {},
    "published policy, image reduced to a quarter": {**_PUBLISHED, "reduce": 4},
    "published policy, image reduced to a half": {**_PUBLISHED, "reduce": 2},
    "published policy, whole image": {**_PUBLISHED, "reduce": 1},
    "fixed Beta, no policy": {"kind": "beta"},
    "fine-tuning (no mask any more)": {"start_epoch": 1},
}


def mask_table(
    pairs: Callable[..., list[tuple[float, float]]],
    classifier: Callable[[], LightningModule],
    shown: Callable[[list[float]], str],
) -> None:
    """Prints a row for each setting.

    Args:
        pairs: times of the trainer's steps and of the bare loop's between them, of a module, its twin and techniques.
        classifier: makes a network, the same each time.
        shown: a list of ratios as text.
    """
    print("\n| pre-training step over the plain step | time |\n| -- | -- |")
    for label, options in {"no technique": None, **ROWS}.items():
        techniques: list[Callback] = [] if options is None else [NoiseMask(**options)]
        found = pairs(classifier(), classifier(), techniques)
        print(f"| {label} | {shown([own / bare for own, bare in found])} |", flush=True)
