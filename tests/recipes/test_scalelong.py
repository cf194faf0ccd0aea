"""Diffusion: noise levels, losses, samplers and U-ViT against formulas written out here; runs through the command."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from torch import Tensor

from callbacks.long_skip import LongSkipScaling
from recipes._cli import CONFIGS, run
from recipes.scalelong import Diffusion
from recipes.scalelong import sampling as s
from recipes.scalelong.module import LevelLoss
from recipes.scalelong.uvit import Attention, UViT, time_embedding
from tests.laws import cells

MODEL = "recipes.scalelong.module.Diffusion"


def make(**more: Any) -> Diffusion:
    module = cells.recipe("scalelong", **more)
    assert isinstance(module, Diffusion)
    return module


def drawn(size: int = 3, side: int = 32, channels: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(3)
    image, noise = torch.rand(size, channels, side, side), torch.randn(size, channels, side, side)
    return {"image": image, "noise": noise, "time": torch.rand(size), "index": torch.arange(size)}


# ---------------------------------------------------------------------- noise levels


@given(st.floats(1e-4, 1.0))
def test_time_and_sigma_of_the_vp_sde(t: float) -> None:
    """Against a sum of beta over [0, t]."""
    steps = 20_000
    beta = [0.1 + (20 - 0.1) * t * (i + 0.5) / steps for i in range(steps)]
    alpha_bar = math.exp(-math.fsum(beta) * t / steps)
    time = torch.tensor(t, dtype=torch.float64)
    assert float(s.vp_alpha_bar(time)) == pytest.approx(alpha_bar, rel=1e-6)
    assert float(s.vp_sigma(time)) == pytest.approx(math.sqrt((1 - alpha_bar) / alpha_bar), rel=1e-5)
    assert float(s.vp_time(s.vp_sigma(time))) == pytest.approx(t, rel=1e-6)


@pytest.mark.parametrize("objective", ["ddpm", "edm"])
def test_the_table_of_levels_is_what_diffusers_makes_of_the_betas(objective: Any) -> None:
    table = s.levels(objective)
    assert len(table) == 1000 and bool((table.diff() > 0).all())
    alpha_bar = torch.cumprod(1 - s.betas(objective), 0)
    assert torch.allclose(((1 - alpha_bar) / alpha_bar).sqrt(), table, rtol=1e-6)
    if objective == "edm":
        assert table[[0, -1]].tolist() == pytest.approx([0.002, 80.0])
        middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7
        assert float((table[499] + table[500]) / 2) == pytest.approx(middle, rel=1e-3)
    else:
        assert float(table[-1]) == pytest.approx(math.sqrt(math.exp(10.05) - 1), rel=1e-6)


@given(st.floats(0.002, 80.0))
def test_preconditioning(sigma: float) -> None:
    """Inputs and targets have variance one (Karras et al., appendix B.6)."""
    c_skip, c_out, c_in, c_noise = (float(c) for c in s.preconditioning(torch.tensor(sigma, dtype=torch.float64), 0.5))
    assert c_in**2 * (0.25 + sigma**2) == pytest.approx(1)
    assert ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2 == pytest.approx(1)
    assert c_noise == pytest.approx(math.log(sigma) / 4)
    assert c_skip == pytest.approx(0.25 / (0.25 + sigma**2))


@given(st.integers(0, 10_000), st.integers(50, 400))
def test_times_of_validation_are_spread_evenly(first: int, count: int) -> None:
    level = s.golden(torch.arange(first, first + count))
    assert bool(((level > 0) & (level < 1)).all())
    counts = torch.bincount((level * 10).long().clamp(0, 9), minlength=10)
    assert float((counts - count / 10).abs().max()) <= 3  # chance alone would be off by 3 sqrt(count / 10)


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_of_noise_prediction_example_by_example(min_snr: float | None) -> None:
    module, batch = make(min_snr=min_snr).requires_grad_(False), drawn()
    found, level = module.losses(batch)
    for i in range(3):
        t = 1e-5 + (1 - 1e-5) * float(batch["time"][i])
        a = math.exp(-(0.1 * t + 19.9 * t * t / 2))
        x = 2 * batch["image"][i] - 1
        state = math.sqrt(a) * x + math.sqrt(1 - a) * batch["noise"][i]
        output = module.backbone(state[None], torch.tensor([999 * t]))[0].detach()
        wanted = float((output - batch["noise"][i]).square().mean())
        if min_snr is not None:
            snr = a / (1 - a)
            wanted *= min(snr, min_snr) / snr
        assert float(found[i]) == pytest.approx(wanted, rel=2e-4)
    assert torch.equal(level, batch["time"]) and torch.equal(module.loss(batch), found.mean())


@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_the_loss_of_edm_example_by_example(min_snr: float | None) -> None:
    """The weighted error of the denoised image, as the paper has it; ours is computed at the network's output."""
    module, batch = make(objective="edm", min_snr=min_snr).requires_grad_(False), drawn()
    found, _ = module.losses(batch)
    normal = torch.distributions.Normal(0.0, 1.0)
    for i in range(3):
        sigma = math.exp(-1.2 + 1.2 * float(normal.icdf(batch["time"][i])))
        x = 2 * batch["image"][i] - 1
        noisy = x + sigma * batch["noise"][i]
        total = sigma**2 + 0.25
        output = module.backbone((noisy / math.sqrt(total))[None], torch.tensor([1000 * math.log(sigma) / 4]))[
            0
        ].detach()
        denoised = 0.25 / total * noisy + sigma * 0.5 / math.sqrt(total) * output
        weight = total / (sigma * 0.5) ** 2
        weight = weight if min_snr is None else min(weight, min_snr)
        assert float(found[i]) == pytest.approx(weight * float((denoised - x).square().mean()), rel=1e-3)


@pytest.mark.parametrize("objective", ["ddpm", "edm"])
def test_what_sampling_takes_for_the_noise_is_what_training_predicts(objective: Any) -> None:
    """The predicted noise of a state at level sigma, against the loss' own output at that level."""
    module, sigma = make(objective=objective), 1.7
    x, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    state = (x + sigma * noise) / math.sqrt(1 + sigma**2)
    found = module.predict_noise(state, torch.tensor(sigma))
    if objective == "ddpm":
        wanted = module.backbone(state, torch.full((2,), 999 * float(s.vp_time(torch.tensor(sigma).double()))))
    else:
        c_skip, c_out, c_in, c_noise = (float(c) for c in s.preconditioning(torch.tensor(sigma).double(), 0.5))
        noisy = x + sigma * noise
        output = module.backbone(c_in * noisy, torch.full((2,), 1000 * c_noise))
        wanted = (noisy - (c_skip * noisy + c_out * output)) / sigma
    assert torch.allclose(found, wanted, atol=1e-4)


def test_noise_and_time_depend_on_seed_epoch_and_example_alone() -> None:
    """Whatever stands beside an example in its batch."""
    module = make(label_dropout=0.5, conditional=True)
    cells.trainer(max_epochs=1, limit_train_batches=0).fit(module, datamodule=cells.data("scalelong"))
    batch = {"image": torch.rand(6, 3, 32, 32), "index": torch.tensor([5, 3, 8, 0, 2, 9])}
    module.trainer.training = True
    whole = module.on_after_batch_transfer(batch, 0)
    part = module.on_after_batch_transfer({k: v[[4, 1]] for k, v in batch.items()}, 0)
    for name in ("noise", "time", "keep"):
        assert torch.equal(whole[name][[4, 1]], part[name])
    assert len(set(whole["time"].tolist())) == 6
    module.trainer.validating = True
    fixed = module.on_after_batch_transfer(batch, 0)
    assert not torch.equal(fixed["noise"], whole["noise"]) and "keep" not in fixed
    assert torch.equal(fixed["time"], s.golden(batch["index"]))
    with pytest.raises(ValueError, match=r"the batch needs 'index' \(B,\)"):
        module.on_after_batch_transfer({"image": batch["image"]}, 0)


def test_losses_by_level() -> None:
    metric = LevelLoss()
    metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.05, 0.07, 0.99]))
    metric.update(torch.tensor([6.0]), torch.tensor([0.95]))
    mean, by_level = metric.compute()
    assert float(mean) == 3.0 and by_level[[0, 9]].tolist() == [1.5, 4.5] and bool(by_level[1:9].isnan().all())


# ---------------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    ("sampler", "steps", "objective"),
    [
        ("ddim", 200, "ddpm"),
        ("dpm++", 60, "ddpm"),
        ("heun", 60, "ddpm"),
        ("euler_maruyama", 400, "ddpm"),
        ("ddim", 200, "edm"),
        ("dpm++", 60, "edm"),
        ("heun", 40, "edm"),
    ],
)
def test_samplers_find_a_normal_distribution(sampler: Any, steps: int, objective: Any) -> None:
    """For images normal (mean, deviation) the best prediction of the noise is known in closed form."""
    mean, deviation, n = 0.3, 0.4, 4000

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        scale = (1 + sigma**2).sqrt()
        noisy = x * scale
        return sigma * (noisy - mean) / (deviation**2 + sigma**2)

    start = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    found = s.sample(predict, start, sampler, steps, objective, generators)
    assert float(found.mean()) == pytest.approx(mean, abs=0.03)
    assert float(found.std()) == pytest.approx(deviation, abs=0.03)
    if sampler != "euler_maruyama":  # noise is carried along monotonically, to the same quantiles
        wanted = mean + deviation * start
        assert float((found - wanted).abs().mean()) < 0.02


@given(st.floats(0.002, 150), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_is_left_of_a_state_is_an_image(sigma: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(3, 1, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    noise[0] = (math.sqrt(1 + sigma**2) * x[0] - 0.5) / sigma  # this one's image is 0.5 everywhere
    found = s.clip_denoised(noise, x, torch.tensor(sigma, dtype=torch.float64))
    image = math.sqrt(1 + sigma**2) * x - sigma * found
    wanted = (math.sqrt(1 + sigma**2) * x - sigma * noise).clamp(-1, 1)
    assert torch.allclose(image, wanted, atol=1e-9)
    assert torch.allclose(found[0], noise[0], atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_images_are_clipped_on_the_way_if_asked(clip: bool) -> None:
    module, asked = make(clip_denoised=clip, sample_steps=5), []

    def predict_noise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x, float(sigma)))
        return 0.9 * x

    module.predict_noise = predict_noise  # type: ignore[assignment, method-assign]
    module.generate(torch.arange(3), seed=1)
    (before, level), (x, sigma) = asked[:2]
    implied = (math.sqrt(1 + level**2) - 0.9 * level) * before
    assert implied.abs().max() > 1  # there was something to clip
    # dpm++ takes its first step by the first order: towards the image that it was told
    a, b = 1 / math.sqrt(1 + level**2), 1 / math.sqrt(1 + sigma**2)
    image = implied.clamp(-1, 1) if clip else implied
    kept = sigma * b / (level * a)
    assert torch.allclose(x, kept * before + (b - kept * a) * image, atol=1e-4)


def test_samplers_that_do_not_fit_are_one_line() -> None:
    for arguments, said in (
        (("plms", 5, "ddpm"), "sampler must be ddim"),
        (("euler_maruyama", 5, "edm"), "euler_maruyama is of the VP-SDE"),
        (("ddim", 0, "ddpm"), "at least one step"),
    ):
        with pytest.raises(ValueError, match=said):
            s.scheduler(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "heun", "euler_maruyama"])
def test_an_image_depends_on_seed_and_number_alone(sampler: Any) -> None:
    module = make(sampler=sampler, sample_steps=4)
    whole = module.generate(torch.arange(6))
    assert whole.shape == (6, 3, 32, 32) and float(whole.min()) >= 0 and float(whole.max()) <= 1
    parts = torch.cat([module.generate(torch.tensor([i])) for i in (4, 1)])
    assert torch.allclose(whole[[4, 1]], parts, atol=1e-4)
    assert torch.equal(module.generate(torch.arange(6)), whole)
    assert not torch.allclose(module.generate(torch.arange(6), seed=1), whole, atol=1e-2)
    assert module.training  # as it was


def test_guidance_leads_away_from_no_condition() -> None:
    """One step of DDIM from the same start: given + w (given - free)."""
    module = make(conditional=True, label_dropout=0.1, guidance=2.0, sampler="ddim", sample_steps=1)
    torch.nn.init.normal_(module.backbone.label_embed.weight)
    found, index = module.generate(torch.arange(4)), torch.arange(4)
    start = torch.stack([torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(s_)) for s_ in _starts(4)])
    sigma = s.levels("ddpm")[-1].float()
    given = module.predict_noise(start, sigma, label=index % cells.CLASSES)
    free = module.predict_noise(start, sigma, label=torch.full((4,), cells.CLASSES))
    noise = given + 2 * (given - free)
    image = start * (1 + sigma**2).sqrt() - sigma * noise
    assert torch.allclose(found, ((image + 1) / 2).clamp(0, 1), atol=2e-3)


def _starts(count: int) -> list[int]:
    from callbacks.perturbation import fold_seed, run_seed

    return [fold_seed(run_seed(), "sample", i) for i in range(count)]


# ---------------------------------------------------------------------- U-ViT


def test_u_vit_has_the_published_size() -> None:
    """U-ViT-S/2 on CIFAR-10: 44 M weights, counted from the paper's table of widths."""
    dim, depth, tokens = 512, 12, 1 + 256
    block = 3 * dim * dim + dim * dim + dim + 8 * dim * dim + 4 * dim + dim + 4 * dim
    wanted = (depth + 1) * block + depth // 2 * (2 * dim * dim + dim)
    wanted += 3 * 4 * dim + dim + tokens * dim + 2 * dim + dim * 12 + 12 + 3 * 3 * 9 + 3
    assert sum(p.numel() for p in UViT().parameters()) == wanted == 44_255_328


@given(
    st.sampled_from([1, 3, 4]), st.sampled_from([(8, 2), (12, 4), (6, 1)]), st.sampled_from([2, 4, 6]), st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_u_vit_gives_what_it_takes(channels: int, sides: tuple[int, int], depth: int, labels: bool) -> None:
    side, patch = sides
    network = UViT(side, channels, patch, 16, depth, 2, num_classes=5 * labels, context_dim=7 * (not labels))
    x, time = torch.randn(2, channels, side, side), torch.rand(2) * 999
    label, context = torch.tensor([0, 4]), torch.randn(2, 77, 7)
    output = network(x, time, label, context)
    assert output.shape == x.shape and network.num_prefix_tokens == (2 if labels else 78)
    other = network(x, time, torch.tensor([1, 4]), context.flip(0))
    assert bool((output[0] != other[0]).any()) and torch.equal(output[1], other[1]) is labels


def test_patches_lie_where_they_came_from() -> None:
    """With blocks that do nothing, embedding and head that copy, the network is the identity."""
    network = UViT(8, 2, 4, 32, 2, 2, final_conv=False)
    with torch.no_grad():
        for block in (*network.in_blocks, network.mid_block, *network.out_blocks):
            for layer in (block.attn.proj, block.mlp[2]):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        for block in network.out_blocks:
            block.skip_linear.weight.copy_(torch.cat([torch.eye(32), torch.zeros(32, 32)], 1))
        network.norm = torch.nn.Identity()  # type: ignore[assignment]
        network.pos_embed.zero_()
        # a pixel (channel, row, column) of a patch becomes one number of its token, and the head puts it back
        network.patch_embed.weight.copy_(torch.eye(32).view(32, 2, 4, 4))
        network.patch_embed.bias.zero_()
        place = torch.arange(32).view(2, 4, 4).permute(1, 2, 0).flatten()  # the head's order: row, column, channel
        network.head.weight.copy_(torch.eye(32)[place])
    x = torch.randn(3, 2, 8, 8)
    assert torch.allclose(network(x, torch.zeros(3)), x, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_attention_is_the_textbooks_in_the_precision_it_is_given(dtype: torch.dtype) -> None:
    layer = Attention(12, 3).to(dtype)
    x = torch.randn(2, 5, 12, dtype=dtype)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).unbind(2)
    heads = []
    for h in range(3):
        weights = (q[:, :, h] @ k[:, :, h].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[:, :, h])
    found = layer(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    assert torch.allclose(found, layer.proj(torch.cat(heads, -1)), atol=tolerance)


@given(st.integers(1, 20), st.floats(0, 1000))
def test_time_embedding(dim: int, time: float) -> None:
    found = time_embedding(torch.tensor([time], dtype=torch.float64), dim)[0].tolist()
    half = dim // 2
    angles = [time * 10_000 ** (-i / half) for i in range(half)]
    wanted = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("arguments", [{"patch_size": 3}, {"heads": 7}, {"depth": 5}, {"depth": 0}])
def test_sizes_that_do_not_divide(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="an image_size that patch_size divides"):
        UViT(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"objective": "flow"}, "objective must be ddpm or edm"),
        ({"network": "dit"}, "network must be uvit or unet"),
        ({"network_args": {"dims": 3}}, "network_args don't suit uvit: .*'dims'"),
        ({"label_dropout": 1.0}, "label_dropout must lie in"),
        ({"num_samples": 0}, "numbers of samples and steps must be at least 1"),
        ({"guidance": 1.0}, "guidance needs a condition that training hides"),
        ({"objective": "edm", "sampler": "euler_maruyama"}, "euler_maruyama is of the VP-SDE"),
        ({"text_encoder": "nowhere"}, "nowhere holds no CLIP text model"),
        ({"text_encoder": "x", "conditional": True}, "on labels or on texts, not on both"),
    ],
)
def test_settings_that_do_not_go_together(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- the averaged weights


class Watch(cells.ExactResume):
    """The weights as validation and its samples see them, and those of training."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.steps: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(pl_module.backbone.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(pl_module.backbone.head.weight.detach().clone())


def test_validation_uses_the_average_and_training_goes_on_from_its_own() -> None:
    module, watch = make(), Watch()
    first = module.backbone.head.weight.detach().clone()
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    trainer = cells.trainer(LongSkipScaling("ls"), average, watch, max_epochs=1)
    trainer.fit(module, datamodule=cells.data("scalelong"))
    mean = watch.steps[0]  # the first step's weights are what it starts with
    for weight in watch.steps[1:]:
        mean = 0.5 * mean + 0.5 * weight
    assert torch.allclose(watch.seen[0], mean, atol=1e-7) and not torch.equal(first, mean)
    assert torch.allclose(module.backbone.head.weight, mean, atol=1e-7)  # and so does what is tested afterwards


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_with_averages_resumes_exactly(stop: int, tmp_path: Path) -> None:
    from tests.laws.laws import Kill

    def callbacks() -> list[Any]:
        return [LongSkipScaling("ls"), EMAWeightAveraging(decay=0.8, use_buffers=False)]

    whole = make()
    cells.trainer(*callbacks(), max_epochs=3).fit(whole, datamodule=cells.data("scalelong"))
    file = tmp_path / "killed.ckpt"
    with pytest.raises(KeyError):
        killed = cells.trainer(*callbacks(), Kill(file, stop), max_epochs=3)
        killed.fit(make(), datamodule=cells.data("scalelong"))
    again = make()
    cells.trainer(*callbacks(), max_epochs=3).fit(
        again, datamodule=cells.data("scalelong"), ckpt_path=file, weights_only=True
    )
    assert not cells.differing(whole.state_dict(), again.state_dict())


# ---------------------------------------------------------------------- texts, latents


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP text model and tokenizer, as Hugging Face saves them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "red", "green", "blue"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=5, max_position_embeddings=6, eos_token_id=0, **sizes)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


class Captioned(cells.Captioned):
    """With captions in validation, too."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        val = self._sets["val"]
        assert isinstance(val.images, Tensor)
        self._sets["val"] = cells.CaptionedSet(val.images, val.entries)


def test_texts_are_a_condition(encoder: Path) -> None:
    options: dict[str, Any] = {"text_encoder": str(encoder), "label_dropout": 0.5, "guidance": 1.0}
    module = make(**options, prompts=("red", "green blue"))
    assert module.backbone.context_embed.in_features == 12 and module.backbone.num_prefix_tokens == 7
    state = module.state_dict()
    assert all(name.startswith("backbone.") for name in state)  # the frozen model is not in the checkpoint
    trainer = cells.trainer(max_epochs=2)
    trainer.fit(module, datamodule=Captioned())
    assert math.isfinite(float(trainer.callback_metrics["val/loss"]))
    samples = module.generate(torch.arange(4))
    module.hparams["prompts"] = ("red", "blue")
    other = module.generate(torch.arange(4))
    assert torch.equal(samples[[0, 2]], other[[0, 2]]) and not torch.equal(samples[1], other[1])
    with pytest.raises(ValueError, match="the batch needs 'text'"):
        cells.trainer(max_epochs=1).fit(make(**options), datamodule=cells.data("scalelong"))


def test_latents_are_trained_on_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    from datamodules import MNIST, Latents

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(in_channels=1, out_channels=1, **shape, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    data = Latents(MNIST(image_size=16, train_size=40, val_size=20, batch_size=8), str(tmp_path / "vae"))
    small: dict[str, Any] = {"network_args": {"patch_size": 2, "dim": 16, "depth": 2, "heads": 2}}
    module = make(
        image_size=data.image_size, in_chans=data.in_chans, vae=data.vae, test_samples=16, quality="digits", **small
    )
    trainer = cells.trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)  # FID is of decoded images
    assert math.isfinite(float(trainer.callback_metrics["test/FID (digit features)"]))
    image = module.generate(torch.arange(3))
    assert image.shape == (3, 1, 16, 16)
    latent = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        wanted = ((vae.eval().decode(latent / vae.config.scaling_factor).sample + 1) / 2).clamp(0, 1)
    assert torch.allclose(module._image(latent), wanted, atol=1e-5)


# ---------------------------------------------------------------------- through the command

TINY = ["--model.network_args", "{patch_size: 4, dim: 16, depth: 2, heads: 2}", "--model.network", "uvit"]
TINY += [
    "--data.train_size",
    "60",
    "--data.val_size",
    "20",
    "--data.batch_size",
    "20",
    "--model.sample_steps",
    "2",
    "--wandb",
    "off",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = ["--trainer.max_epochs", "2", "--model.test_samples", "30", "--model.val_samples", "20"]
    assert run(MODEL, "scalelong", ["fit", *TINY, *words, "--trainer.default_root_dir", str(folder)]) == 0
    (found,) = folder.glob("scalelong/*")
    return found


def rows(run_folder: Path) -> dict[str, list[str]]:
    with (run_folder / "metrics.csv").open() as opened:
        lines = list(csv.DictReader(opened))
    return {name: [line[name] for line in lines if line[name]] for name in lines[0]}


def test_a_run_has_its_numbers_and_pictures(trained: Path) -> None:
    plots = {f.name for f in (trained / "plots").iterdir()}
    assert plots >= {"inputs.png", "curves.png", "skips.png", "levels.png", "samples-0001.png", "samples-0002.png"}
    columns = rows(trained)
    for kind in ("FID", "KID", "precision", "recall"):
        assert len(columns[f"test/{kind} (digit features)"]) == 1
        assert len(columns[f"val/{kind} (digit features)"]) == 2
    assert len(columns["val/loss"]) == 2 and len(columns["skips/feature_1"]) == 1
    assert columns["skips/kappa_1"] == ["1.0"]
    with Image.open(trained / "plots" / "samples-0002.png") as grid:
        assert grid.size == (8 * 66 + 2, 8 * 66 + 2)  # 64 images of 16 pixels, four times as large


def test_samples_do_not_depend_on_the_batch(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = str(trained / "checkpoints" / "last.ckpt")
    found = []
    for batch, seed in ((7, 3), (20, 3), (20, 4)):
        words = ["predict", "--ckpt_path", last, "--model.num_samples", "20", "--seed_everything", str(seed)]
        words += ["--model.sample_batch_size", str(batch), "--wandb", "off"]
        capsys.readouterr()
        assert run(MODEL, "scalelong", [*words, "--trainer.default_root_dir", str(tmp_path / f"{batch}-{seed}")]) == 0
        said = capsys.readouterr()
        assert said.err == "" and "samples.npz" in said.out and "samples.png" in said.out
        (file,) = (tmp_path / f"{batch}-{seed}").rglob("samples.npz")
        with np.load(file) as arrays:
            assert arrays["image"].shape == (20, 16, 16, 1) and arrays["image"].dtype == np.uint8
            assert arrays["index"].tolist() == list(range(20)) and int(arrays["seed"]) == seed
            found.append(arrays["image"].astype(int))
        assert file.with_suffix(".png").is_file()
    assert np.abs(found[0] - found[1]).max() <= 1 and np.abs(found[1] - found[2]).max() > 50
    assert run(MODEL, "scalelong", ["predict", "--ckpt_path", last, "--images", str(tmp_path), "--wandb", "off"]) == 2
    assert "predicts nothing of images: leave --images out" in capsys.readouterr().err


def test_two_ranks_through_the_command(trained: Path, tmp_path: Path) -> None:
    """They sample what one process samples, and agree on the FID of all samples."""
    last = str(trained / "checkpoints" / "last.ckpt")
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--wandb", "off"]
    words = [sys.executable, "-m", "recipes.scalelong", "predict", "--ckpt_path", last, "--model.num_samples", "9"]
    for options, name in ((ranks, "two"), (["--wandb", "off"], "one")):
        where = ["--trainer.default_root_dir", str(tmp_path / name)]
        done = subprocess.run([*words, *options, *where], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    parts = [np.load(f) for f in sorted((tmp_path / "two").rglob("samples-*.npz"))]
    (whole,) = (np.load(f) for f in (tmp_path / "one").rglob("samples.npz"))
    index = np.concatenate([p["index"] for p in parts])
    image = np.concatenate([p["image"] for p in parts])[np.argsort(index)]
    assert sorted(index.tolist()) == list(range(9))
    assert np.abs(image.astype(int) - whole["image"].astype(int)).max() <= 1
    test = [w if w != "predict" else "test" for w in words[:-2]] + ["--model.test_samples", "31"]
    values = []
    for options in (ranks, ["--wandb", "off"]):
        where = ["--trainer.default_root_dir", str(tmp_path / f"test{len(values)}")]
        done = subprocess.run([*test, *options, *where], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if "FID (digit features)" in line)
        values.append(float(line.split()[-1]))
    assert values[0] == pytest.approx(values[1], rel=2e-2)


@pytest.mark.parametrize("mode", ["none", "sqrt2", "ls", "ls_unshared"])
def test_each_mode_by_one_word(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.callbacks.mode", mode, "--trainer.max_epochs", "1", "--model.test_samples", "0"]
    assert run(MODEL, "scalelong", ["fit", *TINY, *words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    (folder,) = tmp_path.glob("scalelong/*")
    kappa = float(rows(folder)["skips/kappa_1"][0])
    assert kappa == pytest.approx({"none": 1.0, "sqrt2": 0.5**0.5}.get(mode, 0.5), abs=0.2 if "ls" in mode else 1e-6)


def test_a_u_net_and_edm_through_the_command(tmp_path: Path) -> None:
    network = "{block_out_channels: [8, 8], norm_num_groups: 4, layers_per_block: 1, down_block_types: [DownBlock2D, "
    network += "DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}"
    words = [*TINY[4:], "--model.network", "unet", "--model.network_args", network, "--model.objective", "edm"]
    words += ["--model.sampler", "heun", "--trainer.max_epochs", "1", "--model.test_samples", "8"]
    assert run(MODEL, "scalelong", ["fit", *words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("scalelong/*")
    assert "skips/feature_4" in rows(folder)  # two blocks of the decoder with two connections each


def test_missing_inception_is_said_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.quality", "inception", "--model.inception", str(tmp_path / "none.pth")]
    assert run(MODEL, "scalelong", ["fit", *TINY, *words, "--trainer.default_root_dir", str(tmp_path)]) == 2
    assert "there is no file" in capsys.readouterr().err


PUBLISHED = {
    "cifar10": {"CIFAR10", "uvit"},
    "celeba64": {"CelebA", "uvit"},
    "imagenet64": {"ImageNet64", "uvit"},
    "imagenet256": {"Latents", "uvit"},
    "coco256": {"Latents", "uvit"},
    "cifar10_unet": {"CIFAR10", "unet"},
}


def test_each_benchmark_has_a_config() -> None:
    import yaml

    for name, wanted in PUBLISHED.items():
        content = yaml.safe_load((CONFIGS / "scalelong" / f"{name}.yaml").read_text())
        assert {content["data"]["class_path"], content["model"]["network"]} == wanted
        assert content["trainer"]["callbacks"][-1]["class_path"] == "LongSkipScaling"
        assert content["trainer"]["max_steps"] > 100_000
