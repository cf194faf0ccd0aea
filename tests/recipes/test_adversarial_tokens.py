"""The objectives that the recipe takes from techniques (free, FreeLB), SMART on a ViT's tokens, and low precision."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.embeddings import FreeLB
from callbacks.free import FreeAdversary
from callbacks.overfitting import CatastrophicOverfitting
from callbacks.robustness import RobustAccuracy
from recipes.adversarial_training import AdversarialTrainer
from recipes.classifier import Classifier
from tests.laws import cells, laws

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(objective: str, eps: float = 0.05, **more: Any) -> AdversarialTrainer:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"backbone_args": VIT, "num_classes": 3, "image_size": 32, "lr": 0.05, **more}
    return AdversarialTrainer("vit_tiny_patch16_224", objective=objective, eps=eps, **settings)  # type: ignore[arg-type]


def a_batch() -> dict[str, Any]:
    return next(iter(cells.data("adversarial_training", batch_size=6).train_dataloader()))


def weights_after(module: Any, *techniques: Any, **options: Any) -> dict[str, Tensor]:
    cells.trainer(*techniques, **options).fit(module, datamodule=cells.data("adversarial_training"))
    return cells.weights(module)


def test_free_is_the_technique_on_plain_training() -> None:
    common: dict[str, Any] = {"num_classes": 3, "image_size": 32, "lr": 0.05}
    torch.manual_seed(1)
    own = weights_after(AdversarialTrainer("cnn4", objective="free", eps=0.1, replays=2, **common))
    torch.manual_seed(1)
    other = weights_after(Classifier("cnn4", **common), FreeAdversary(0.1, 2))
    assert not cells.differing(own, other)


def test_freelb_is_the_technique_on_plain_training() -> None:
    own = weights_after(vit("freelb", 0.6, alpha=0.2, steps=3))
    torch.manual_seed(1)
    plain = Classifier("vit_tiny_patch16_224", 3, image_size=32, backbone_args=VIT, lr=0.05)
    other = weights_after(plain, FreeLB("patch_embed", 3, 0.2, mag=0.6, eps=0.6, norm="linf"))
    assert not cells.differing(own, other)
    assert cells.differing(own, weights_after(vit("freelb", 0.0, alpha=0.0, steps=3)))


def test_smart_finds_a_direction_that_matters() -> None:
    """The found perturbation of the tokens is in its box and moves the output more than noise of the same size."""
    module, batch = vit("smart", 0.1, steps=2), a_batch()
    delta = module.craft(batch)
    assert delta.shape == (6, 16, 16) and float(delta.abs().max()) <= 0.1 + 1e-7
    assert (delta.abs().amax(-1) > 0.099).all(), "every token goes all the way"

    def moved(by: Tensor) -> float:
        handle = module.backbone.patch_embed.register_forward_hook(lambda *a: a[2] + by)
        with torch.no_grad():
            p, q = clean.log_softmax(-1), module(batch["image"]).log_softmax(-1)
        handle.remove()
        return float((p.exp() * (p - q)).sum())

    module.eval()
    with torch.no_grad():
        clean = module(batch["image"])
    noise = max(moved(0.1 * torch.randn_like(delta).sign()) for _ in range(5))
    assert moved(delta) > 2 * noise > 0


def test_smarts_loss_is_its_formula_and_leaves_the_layer_alone() -> None:
    module, batch = vit("smart", 0.1, beta=3.0), a_batch()
    module.eval()
    batch["adversarial"] = module.craft(batch)
    loss = module.loss(batch)
    z = module(batch["image"])
    handle = module.backbone.patch_embed.register_forward_hook(lambda *a: a[2] + batch["adversarial"])
    z2 = module(batch["image"])
    handle.remove()
    p, q = z.softmax(-1), z2.softmax(-1)
    apart = ((p.detach() * (p.detach().log() - q.log())) + q.detach() * (q.detach().log() - p.log())).sum(-1).mean()
    wanted = F.cross_entropy(z, batch["label"]) + 3.0 * apart
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(each, module.backbone.head.weight)[0] for each in (loss, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["smart", "freelb"])
def test_they_need_tokens_and_have_no_radius_of_pixels(objective: str) -> None:
    module = cells.recipe("adversarial_training", objective=objective, eps=0.1)
    with pytest.raises(ValueError, match="ResNet has no token embedding; name a layer"):
        cells.trainer().fit(module, datamodule=cells.data("adversarial_training"))
    module = vit(objective)
    assert "holds" not in module.eval().predict_step(a_batch(), 0)
    with pytest.raises(ValueError, match="RobustAccuracy needs eps"):
        cells.trainer(RobustAccuracy()).fit(module, datamodule=cells.data("adversarial_training"))


@pytest.mark.parametrize("objective", ["free", "freelb", "smart"])
def test_they_resume_and_run_in_bf16(objective: str, tmp_path: Any) -> None:
    settings = {"replays": 2} if objective == "free" else {}
    whole = vit(objective, 0.1, **settings)
    cells.trainer(max_epochs=2).fit(whole, datamodule=cells.data("adversarial_training"))
    half = vit(objective, 0.1, **settings)
    with contextlib.suppress(KeyError):
        stop = laws.Kill(tmp_path / "there.ckpt", 4)
        cells.trainer(stop, max_epochs=2).fit(half, datamodule=cells.data("adversarial_training"))
    again = vit(objective, 0.1, **settings)
    cells.trainer(max_epochs=2).fit(
        again, datamodule=cells.data("adversarial_training"), ckpt_path=tmp_path / "there.ckpt", weights_only=True
    )
    low = vit(objective, 0.1, **settings)
    weights_after(low, precision="bf16-mixed")
    assert all(p.isfinite().all() for p in low.parameters())
    assert not cells.differing(cells.weights(again), cells.weights(whole))


def test_the_watch_comes_with_fast_once() -> None:
    for given in ([], [CatastrophicOverfitting(stop=True)]):
        module = cells.recipe("adversarial_training", objective="fast", eps=0.05, norm="linf", steps=None)
        runner = cells.trainer(*given)
        runner.fit(module, datamodule=cells.data("adversarial_training"))
        watches = [c for c in runner.callbacks if isinstance(c, CatastrophicOverfitting)]  # type: ignore[attr-defined]
        assert len(watches) == 1 and (not given or watches[0] is given[0])
        assert "train/pgd_acc" in runner.callback_metrics


@pytest.mark.parametrize("objective", ["standard", "trades", "smart"])
def test_low_precision_crafts_what_float32_crafts(objective: str) -> None:
    """In fp16 exactly (crafting leaves it), in bf16 nearly: most entries go the same way."""
    module, batch = vit(objective, 0.1, steps=1), a_batch()
    wanted = module.craft(batch)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(module.craft(batch), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module.craft(batch)
    assert found.dtype == torch.float32
    centre = 0 if objective == "smart" else batch["image"]
    moved = (wanted - centre).abs() > 0.01
    assert (((found - centre).sign() == (wanted - centre).sign())[moved]).float().mean() > 0.85
