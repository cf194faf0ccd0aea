"""One LightningDataModule per benchmark family; the embedded data beside them."""

from datamodules.captions import EmojiCaptions
from datamodules.celeba import CelebA
from datamodules.cifar import CIFAR10, CIFAR100, SVHN
from datamodules.clip_benchmarks import (
    DTD,
    SUN397,
    UCF101,
    Caltech101,
    EmojiFewShot,
    EuroSAT,
    FewShotImageNet,
    FGVCAircraft,
    Flowers102,
    Food101,
    ImageNetA,
    ImageNetR,
    ImageNetSketch,
    ImageNetV2,
    OxfordPets,
    StanfordCars,
)
from datamodules.coco import COCOCaptions
from datamodules.corruptions import CIFAR10C, CIFAR100C, ImageNetC
from datamodules.depleted import Depleted
from datamodules.digits import Digits
from datamodules.domains import PACS, VLCS, DigitsDG, DomainNet, MiniDomainNet, OfficeHome
from datamodules.emoji import EmojiDomains, EmojiRetrieval
from datamodules.fashion import FashionMNIST
from datamodules.folders import Folders
from datamodules.imagenet import ImageNet, ImageNet64, TinyImageNet
from datamodules.latents import Latents
from datamodules.medmnist import MedMNIST
from datamodules.mnist import MNIST
from datamodules.modalities import Modalities
from datamodules.parity import DigitsParity
from datamodules.radimagenet import RadImageNet
from datamodules.retrieval import MSMT17, Market1501
from datamodules.text import Mails, Tweets
from datamodules.text_benchmarks import CNN, IMDB, SNLI, SST, AGNews, BAbI, MultiNLI, Newsgroups

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CIFAR100C",
    "CIFAR10C",
    "COCOCaptions",
    "DTD",
    "MNIST",
    "MSMT17",
    "PACS",
    "SUN397",
    "SVHN",
    "UCF101",
    "VLCS",
    "Caltech101",
    "CelebA",
    "Depleted",
    "Digits",
    "DigitsDG",
    "DigitsParity",
    "DomainNet",
    "EmojiCaptions",
    "EmojiDomains",
    "EmojiFewShot",
    "EmojiRetrieval",
    "EuroSAT",
    "FGVCAircraft",
    "FashionMNIST",
    "FewShotImageNet",
    "Flowers102",
    "Folders",
    "Food101",
    "ImageNet",
    "ImageNet64",
    "ImageNetA",
    "ImageNetC",
    "ImageNetR",
    "ImageNetSketch",
    "ImageNetV2",
    "Latents",
    "Mails",
    "Market1501",
    "MedMNIST",
    "MiniDomainNet",
    "Modalities",
    "OfficeHome",
    "OxfordPets",
    "RadImageNet",
    "StanfordCars",
    "TinyImageNet",
    "Tweets",
    "CNN",
    "IMDB",
    "SNLI",
    "SST",
    "AGNews",
    "BAbI",
    "MultiNLI",
    "Newsgroups",
]
