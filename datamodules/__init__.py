"""One LightningDataModule per benchmark family; the embedded data beside them."""

from datamodules.digits import Digits
from datamodules.emoji import EmojiDomains, EmojiRetrieval

__all__ = ["Digits", "EmojiDomains", "EmojiRetrieval"]
