"""One LightningDataModule per benchmark family; the embedded data beside them."""

from datamodules.captions import EmojiCaptions
from datamodules.cifar import CIFAR10, CIFAR100, SVHN
from datamodules.corruptions import CIFAR10C, CIFAR100C, ImageNetC
from datamodules.digits import Digits
from datamodules.domains import PACS, VLCS, DigitsDG, DomainNet, MiniDomainNet, OfficeHome
from datamodules.emoji import EmojiDomains, EmojiRetrieval
from datamodules.fashion import FashionMNIST
from datamodules.imagenet import ImageNet, TinyImageNet
from datamodules.retrieval import MSMT17, Market1501

__all__ = [
    "CIFAR10",
    "CIFAR10C",
    "CIFAR100",
    "CIFAR100C",
    "MSMT17",
    "PACS",
    "SVHN",
    "VLCS",
    "Digits",
    "DigitsDG",
    "DomainNet",
    "EmojiCaptions",
    "EmojiDomains",
    "EmojiRetrieval",
    "FashionMNIST",
    "ImageNet",
    "ImageNetC",
    "Market1501",
    "MiniDomainNet",
    "OfficeHome",
    "TinyImageNet",
]
