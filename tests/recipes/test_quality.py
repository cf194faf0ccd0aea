"""Each metric against its definition, written out; batches, ranks and random states change nothing; the features."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datamodules import MNIST
from recipes.classifier import Classifier
from recipes.scalelong import quality
from recipes.scalelong.quality import DigitFeatures, InceptionFeatures, SampleQuality, precision_recall
from tests.processes import ranks

NAMES = ("FID", "KID", "precision", "recall")


class Pixels(nn.Module):
    """The mean of each row of pixels, in [0, 1]: features that are plain to see."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 3)) / 255


def draw(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    """uint8 (count, 1, 6, 5)."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.linspace(10, 60, 6).view(1, 1, 6, 1)
    return (128 + shift + strength * torch.randn(count, 1, 6, 5, generator=generator)).clamp(0, 255).byte()


def measured(real: Tensor, fake: Tensor, features: nn.Module | None = None, batch: int = 50, **options: Any) -> Any:
    metrics = SampleQuality(Pixels() if features is None else features, **options)
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(batch):
            metrics.update(part, is_real)
    return {name: value.item() for name, value in metrics.compute().items()}


# ---------------------------------------------------------------------- against their definitions


def test_fid_is_the_distance_of_two_gaussians() -> None:
    real, fake = draw(300), draw(200, 8, seed=1)
    a, b = (Pixels()(images).double().numpy() for images in (real, fake))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert measured(real, fake)["FID"] == pytest.approx(expected, rel=1e-5)


def test_kid_is_the_unbiased_squared_mmd() -> None:
    """All images in each draw, so there is nothing random in it."""
    real, fake = draw(120), draw(120, 8, seed=1)
    a, b = (Pixels()(images).double().numpy() for images in (real, fake))

    def kernel(x: Any, y: Any) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n = len(a)
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i in range(n) for j in range(n) if i != j)
    expected = within / (n * (n - 1)) - 2 * sum(kernel(x, y) for x in a for y in b) / n**2
    assert expected > 1e-4
    assert measured(real, fake)["KID"] == pytest.approx(expected, rel=1e-5)


def test_kid_of_subsets_is_about_that_of_all_images() -> None:
    real, fake = draw(400), draw(300, 20, seed=1)
    whole = measured(real[:300], fake)["KID"]
    assert measured(real, fake, subset_size=40)["KID"] == pytest.approx(whole, rel=0.1)
    assert measured(real, fake)["KID"] == pytest.approx(whole, rel=0.05), "of no more images than there are"


def brute(real: Any, fake: Any, k: int) -> tuple[float, float]:
    """Equations 1 and 2 of arXiv 1904.06991, in loops; squared distances of small integers are exact."""

    def covered(points: Any, centres: Any) -> float:
        found = 0
        for p in points:
            for i, c in enumerate(centres):
                others = sorted(((c - o) ** 2).sum() for j, o in enumerate(centres) if j != i)
                if ((p - c) ** 2).sum() <= others[k - 1]:
                    found += 1
                    break
        return found / len(points)

    return covered(fake, real), covered(real, fake)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 14),
    m=st.integers(5, 14),
    d=st.integers(1, 4),
    k=st.integers(1, 4),
    reach=st.integers(1, 6),
    shift=st.integers(0, 3),
    chunk=st.sampled_from([1, 20, 2**24]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_precision_and_recall_are_the_papers(
    n: int, m: int, d: int, k: int, reach: int, shift: int, chunk: int, dtype: torch.dtype, seed: int
) -> None:
    """Features on a grid, so that many distances are equal and many points lie on a radius."""
    rng = np.random.default_rng(seed)
    real, fake = rng.integers(0, reach + 1, (n, d)), rng.integers(0, reach + 1, (m, d)) + shift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "CHUNK", chunk)
        precision, recall = precision_recall(torch.tensor(real, dtype=dtype), torch.tensor(fake, dtype=dtype), k)
    assert precision.dtype == recall.dtype == torch.float32
    assert (precision.item(), recall.item()) == pytest.approx(brute(real, fake, k), abs=1e-6)


def cloud(count: int, *centre: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(centre), generator=generator) + torch.tensor(centre)


def test_precision_and_recall_say_what_they_are_for() -> None:
    a, b = cloud(100, 0, 0), cloud(100, 50, 0, seed=1)
    assert [x.item() for x in precision_recall(a, a)] == [1, 1]
    assert [x.item() for x in precision_recall(a, b)] == [0, 0]
    dropped = precision_recall(torch.cat((a, b)), a[torch.randperm(100)])  # one mode of two, and of that the same
    assert [x.item() for x in dropped] == [1, 0.5]
    fresh = precision_recall(torch.cat((a, b)), cloud(100, 0, 0, seed=2))
    assert fresh[0] > 0.85 and 0.4 < fresh[1] <= 0.5
    invented = precision_recall(a, torch.cat((a, b)))  # a mode that isn't there
    assert [x.item() for x in invented] == [0.5, 1]


def test_copies_of_one_image_cover_nothing_else() -> None:
    """Their radius is 0: the nearest other is the same point."""
    a = cloud(30, 0, 0, 0)
    precision, recall = precision_recall(a, a[:1].expand(10, 3))
    assert precision == 1 and recall.item() == pytest.approx(1 / 30)


def test_far_from_zero_distances_are_as_exact() -> None:
    """Where distances by matrix products are off by more than they are."""
    a, b = cloud(60, 2000, 2000, 2000), cloud(50, 2001, 2000, 2000, seed=1)
    expected = brute(a.double().numpy(), b.double().numpy(), 3)
    assert [x.item() for x in precision_recall(a, b)] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------- what must not matter


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """uint8 (N, 1, 28, 28): digits that the features weren't trained on."""
    images = MNIST().part("test").images
    assert isinstance(images, Tensor)
    return images[:1000]


def test_the_size_of_batches_does_not_matter(digits: Tensor) -> None:
    real, fake = digits[:120], noisy(digits[120:300], 0.1)
    whole = measured(real, fake, DigitFeatures(), batch=300, subset_size=50)
    for batch in (1, 17):
        assert measured(real, fake, DigitFeatures(), batch, subset_size=50) == pytest.approx(whole, rel=1e-4)


def test_neither_order_nor_random_state_matter_and_the_state_stays() -> None:
    real, fake, features = draw(150), draw(140, 8, seed=1), Pixels()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = measured(real, fake, features, subset_size=30)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again = measured(real[torch.randperm(150)], fake[torch.randperm(140)], features, subset_size=30)
    assert again == pytest.approx(first, rel=1e-6)
    other = measured(real, fake, features, subset_size=30, seed=1)
    assert other["KID"] != first["KID"] and other["FID"] == first["FID"]


@pytest.mark.filterwarnings("ignore:.*before the ``update``")
def test_reset_forgets_the_fakes_or_all() -> None:
    real, good, bad = draw(60), draw(50, seed=1), draw(50, 40, seed=2)
    metrics = SampleQuality(Pixels())
    metrics.update(real, True)
    metrics.update(bad, False)
    worse = metrics.compute()
    assert worse == metrics.compute(), "asked twice, the same"
    metrics.reset(real=False)
    metrics.update(good, False)
    assert {name: value.item() for name, value in metrics.compute().items()} == measured(real, good)
    metrics.update(bad, False)
    assert metrics.compute()["FID"] == pytest.approx(measured(real, torch.cat((good, bad)))["FID"], rel=1e-5)
    metrics.reset()
    with pytest.raises(ValueError, match=r"^0 real and 0 generated images"):
        metrics.compute()


def test_nothing_of_it_is_in_a_checkpoint_or_trained_or_said(recwarn: pytest.WarningsRecorder) -> None:
    module = nn.ModuleDict({"quality": SampleQuality(DigitFeatures())})
    assert not module.state_dict() and not list(module.parameters())
    images = torch.randint(256, (20, 1, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        before = DigitFeatures()(images)
    module.train().bfloat16()
    assert torch.equal(module["quality"].features(images), before), "trained or cast with the rest"
    with torch.inference_mode():
        module["quality"].update(images, True)
        module["quality"].update(images, False)
    found = module["quality"].compute()
    assert found["FID (digit features)"].item() == pytest.approx(0, abs=1e-3)
    assert [str(warning.message) for warning in recwarn if "Inception" in str(warning.message)] == []


RANK = f"""
import pathlib, sys, torch
from torch import Tensor, nn
from recipes.scalelong.quality import SampleQuality

{inspect.getsource(Pixels)}
{inspect.getsource(draw)}

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
metrics = SampleQuality(Pixels(), subset_size=30)
for i, images in enumerate(draw(90).split(25)):  # all real ones on rank 0
    if rank == 0:
        metrics.update(images, True)
for i, images in enumerate(draw(80, 8, seed=1).split(15)):  # 6 batches, 4 and 2
    if (i % 3 == 2) == rank:
        metrics.update(images, False)
first = metrics.compute()
metrics.reset(real=False)
metrics.update(draw(40, seed=2)[rank::2], False)
torch.save([first, metrics.compute()], pathlib.Path(sys.argv[1]) / f"{{rank}}.pt")
"""


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    """Ranks with different numbers of images and batches, one of them without any real one."""
    ends = ranks([sys.executable, "-c", RANK, str(tmp_path)], 2, tmp_path, 100)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    real = draw(90)
    expected = [measured(real, draw(80, 8, seed=1), subset_size=30), measured(real, draw(40, seed=2), subset_size=30)]
    for rank in "01":
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, alone in zip(found, expected, strict=True):
            assert {name: value.item() for name, value in one.items()} == pytest.approx(alone, rel=1e-6)


# ---------------------------------------------------------------------- features of digits


def noisy(images: Tensor, level: float, seed: int = 0) -> Tensor:
    """With Gaussian noise of this deviation, as a part of 255."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + 255 * level * noise).clamp(0, 255).byte()


def blurred(images: Tensor, size: int) -> Tensor:
    """Scaled down to this size and up again."""
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bilinear")


def test_digit_features_tell_digits_from_noise(digits: Tensor) -> None:
    half = len(digits) // 2
    same = measured(digits[:half], digits[half:], DigitFeatures())
    random = torch.randint(256, (half, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = measured(digits[:half], random, DigitFeatures())
    assert list(same) == [f"{name} (digit features)" for name in NAMES]
    fid, kid, precision, recall = same.values()
    assert fid * 100 < noise["FID (digit features)"]
    assert abs(kid) * 100 < noise["KID (digit features)"]
    assert precision > 0.8 and recall > 0.8
    assert noise["precision (digit features)"] < 0.05 and noise["recall (digit features)"] < 0.05


@pytest.mark.parametrize("kind", ["noise", "blur", "digits left out"])
def test_the_more_is_wrong_the_larger_the_distances(digits: Tensor, kind: str) -> None:
    half = len(digits) // 2
    real, fake = digits[:half], digits[half:]
    if kind == "noise":
        levels = [noisy(fake, level) for level in (0, 0.1, 0.2, 0.4, 0.8)]
    elif kind == "blur":
        levels = [blurred(fake, size) for size in (28, 14, 10, 7, 4)]
    else:
        label = MNIST().part("test").entries["label"][half:1000]
        levels = [fake[label < kept] for kept in (10, 8, 5, 2)]
    found = [measured(real, images, DigitFeatures(), suffix="") for images in levels]
    for name in ("FID", "KID"):
        values = [one[name] for one in found]
        assert all(b > a for a, b in zip(values, values[1:], strict=False)), (name, values)
    if kind == "digits left out":
        recall = [one["recall"] for one in found]
        assert all(b < a for a, b in zip(recall, recall[1:], strict=False)), recall
        assert min(one["precision"] for one in found) > 0.8


def test_digit_features_are_of_a_classifier_that_knows_digits(digits: Tensor) -> None:
    features, label = DigitFeatures(), MNIST().part("test").entries["label"][:1000]
    network: Any = features.network()
    with torch.no_grad():
        right = (network.fc(features(digits)).argmax(1) == label).float().mean()
    assert right > 0.97
    assert features(digits[:3]).shape == (3, features.num_features)
    assert features(digits[:3]).dtype == torch.float32
    assert quality.DIGITS.stat().st_size < 2**20


def test_digit_features_of_colour_and_of_other_sizes(digits: Tensor) -> None:
    features = DigitFeatures()
    grey = features(digits[:50])
    torch.testing.assert_close(features(digits[:50].expand(-1, 3, -1, -1)), grey, rtol=1e-4, atol=1e-4)
    red = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    red[:, 0] = 200
    torch.testing.assert_close(features.prepare(red), torch.full((1, 1, 28, 28), (0.299 * 200 / 255 - 0.5) / 0.25))
    twice = digits[:50].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (features(twice) - grey).norm() < 0.2 * grey.norm()


# ---------------------------------------------------------------------- writing them


def checkpoint(file: Path, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    model = Classifier("cnn4", image_size=28, **{"in_chans": 1, "backbone_args": {"width": 8}, **settings})
    with torch.no_grad():
        for name, buffer in model.backbone.named_buffers():
            if "running_mean" in name:
                buffer.uniform_(-0.2, 0.2)
            elif "running_var" in name:
                buffer.uniform_(0.1, 0.3)
    torch.save({"state_dict": model.state_dict(), "epoch": 1, "hyper_parameters": dict(model.hparams)}, file)
    return model.eval()


def test_what_is_written_is_read(tmp_path: Path, digits: Tensor) -> None:
    model = checkpoint(tmp_path / "a.ckpt")
    files = [tmp_path / "deeper" / f"{i}.safetensors" for i in range(2)]
    for file in files:
        assert quality.main([str(tmp_path / "a.ckpt"), str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes(), "the checksum is of one file"
    features = DigitFeatures(str(files[0]))
    assert features.num_features == 16
    image = (digits[:20].float() / 255 - model.mean) / model.std
    with torch.no_grad():
        expected = model.backbone.forward_head(model.backbone.forward_features(image), pre_logits=True)
    assert expected.std() > 0.05
    torch.testing.assert_close(features(digits[:20]), expected, rtol=5e-3, atol=2e-3)


def test_other_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "colour.ckpt", in_chans=3)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name, said in (("colour", "grey images"), ("other", "cnn4"), ("text", "cnn4"), ("none", "there is no file")):
        assert quality.main([str(tmp_path / f"{name}.ckpt"), str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what a user may get wrong


def test_one_line_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = SampleQuality(Pixels())
    few.update(draw(40), True)
    few.update(draw(4), False)
    with pytest.raises(ValueError, match="^40 real and 4 generated images are too few.*5 of each$"):
        few.compute()
    few.update(draw(1), False)
    few.compute()
    for images in (torch.rand(2, 1, 28, 28), draw(2)[0], draw(2).expand(-1, 2, -1, -1)):
        with pytest.raises(ValueError, match="images must be uint8"):
            DigitFeatures()(images)
    for settings_ in ({"k": 0}, {"subset_size": 1}, {"subsets": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            SampleQuality(Pixels(), **settings_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="features must be"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
    (tmp_path / "text.safetensors").write_text("none")
    with pytest.raises(ValueError, match="has no digit features"):
        DigitFeatures(str(tmp_path / "text.safetensors"))
    monkeypatch.setattr(quality, "DIGITS", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors: train it with python -m recipes.classifier fit"):
        DigitFeatures()


def test_inceptions_weights_are_looked_for_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    images = draw(2)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network\nhere")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics = SampleQuality(InceptionFeatures())
    assert metrics.names == list(NAMES) and metrics.num_features == 2048
    with pytest.raises(
        FileNotFoundError, match=r"can't be fetched \(no network here\): wget -P .*checkpoints https://"
    ):
        metrics.update(images, True)
    with pytest.raises(FileNotFoundError, match="there is no file .*none.pth: .* wget https://github.com/toshas"):
        InceptionFeatures(str(tmp_path / "none.pth"))(images)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("none")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match="doesn't hold Inception's weights") as caught:
            InceptionFeatures(str(tmp_path / f"{name}.pth"))(images)
        assert "\n" not in str(caught.value)


def test_inceptions_features_are_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights; a grey image is one of three equal channels."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path / "checkpoints" / quality.INCEPTION.rpartition("/")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        random = quality.NoTrainInceptionV3("inception-v3-compat", ["2048"])
    file.parent.mkdir()
    torch.save(random.state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    features = InceptionFeatures()
    found = features(images)
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    close: dict[str, float] = {"rtol": 1e-3, "atol": 0}  # untrained, they are tiny
    assert found.std() > 0
    torch.testing.assert_close(found, random(images), **close)
    shutil.rmtree(file.parent)  # it isn't read a second time
    torch.testing.assert_close(features(images[:, :1]), random(images[:, :1].repeat(1, 3, 1, 1)), **close)
