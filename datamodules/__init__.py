"""One LightningDataModule per benchmark family; the embedded data beside them."""

from datamodules.digits import Digits
from datamodules.domains import PACS, VLCS, DigitsDG, DomainNet, MiniDomainNet, OfficeHome
from datamodules.emoji import EmojiDomains, EmojiRetrieval
from datamodules.retrieval import MSMT17, Market1501

__all__ = [
    "MSMT17",
    "PACS",
    "VLCS",
    "Digits",
    "DigitsDG",
    "DomainNet",
    "EmojiDomains",
    "EmojiRetrieval",
    "Market1501",
    "MiniDomainNet",
    "OfficeHome",
]
