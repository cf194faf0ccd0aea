"""diffusers' U-Net as a network of this recipe."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class UNet(nn.Module):
    """``diffusers.UNet2DModel`` with U-ViT's signature; arguments are the model's own."""

    def __init__(self, image_size: int, in_chans: int, num_classes: int, **options: Any) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise ValueError('network unet needs diffusers: pip install -e ".[diffusion]"') from None
        own = {"sample_size": image_size, "in_channels": in_chans, "out_channels": in_chans}
        unet: Any = UNet2DModel(**own, num_class_embeds=num_classes or None, **options)  # type: ignore[arg-type]
        self.unet, downs = unet, len(unet.down_blocks)
        #: For techniques on features: one layer of each resolution of the encoder.
        self.feature_info = [{"module": f"unet.down_blocks.{i}.resnets.0"} for i in range(downs)]

    @property
    def blocks(self) -> list[nn.Module]:
        """All of them, in the order of the forward pass."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.unet(x, time, class_labels=label).sample
