"""ScaleLong: image diffusion on networks with long skip connections (Huang et al., NeurIPS 2023, arXiv 2310.13545).

The recipe trains a U-ViT or a U-Net of diffusers to predict noise; what the paper adds, the scaling of the long skip
connections, is the technique :class:`callbacks.long_skip.LongSkipScaling`, which the recipe's configs hang on it. The
claim: with scaled connections training is steadier and reaches the same loss in fewer steps (about 1.5 times fewer).

Two objectives, each with its loss for one example:

* ``ddpm``: a state ``sqrt(a) x + sqrt(1 - a) noise`` of the VP-SDE at a uniform time t; the network is told 999 t and
  predicts the noise; the mean squared error over pixels (U-ViT's "LSimple").
* ``edm``: ``x + sigma noise``, log sigma normal (-1.2, 1.2), the preconditioned network, the loss of Karras et al.
  (arXiv 2206.00364, table 1). It is told 1000 c_noise, for its embedding's periods are made for thousandths.

Where the released code differs, or something isn't said:

* Noise and time of an example depend on (seed, epoch, index) alone, so two ranks train as one process does and runs
  resume exactly. Validation always uses the same noise, and times spread evenly; so its losses can be compared.
* ``min_snr`` caps the weight that the loss puts on the squared error *of the image* (arXiv 2303.09556, eq. 6): that is
  ``1 / sigma ** 2`` of noise prediction, ``1 / sigma ** 2 + 1 / sigma_data ** 2`` of EDM.
* Validation, samples and tests use the averaged weights where Lightning's ``EMAWeightAveraging`` is a callback.
* The image that a sampler predicts on its way is clipped to the range of images; U-ViT's release doesn't, nor do the
  configs of its protocol.
* FID is computed against the training images, as the literature does for CIFAR-10. With digits it uses the features of
  a small classifier of digits and is called so: nobody should take it for the FID of Inception's features.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from callbacks.perturbation import (
    accept_other_techniques,
    clip_groups,
    fill_rows,
    fold_seed,
    match_optimizer_groups,
    parameter_groups,
    run_seed,
)
from callbacks.report import tiled
from callbacks.sharded import is_sharded, shard
from datamodules.latents import load_autoencoder, read_config
from datamodules.sampling import Draw, EvalBatches
from recipes.scalelong.quality import DigitFeatures, InceptionFeatures, SampleQuality
from recipes.scalelong.sampling import (
    Objective,
    Sampler,
    clip_denoised,
    golden,
    preconditioning,
    sample,
    scheduler,
    vp_alpha_bar,
    vp_sigma,
    vp_time,
)
from recipes.scalelong.texts import Texts
from recipes.scalelong.unet import UNet
from recipes.scalelong.uvit import UViT

log = logging.getLogger(__name__)
#: EDM's mean and deviation of log sigma in training, and the deviation it takes images to have.
P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5
#: The smallest time of training: below it the noise is lost in float32.
T_MIN = 1e-5
#: Parts into which noise levels are divided where the loss is shown by level.
BINS = 10


class LevelLoss(Metric):
    """Sums of losses and numbers of examples by noise level, over all ranks."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, level: Tensor) -> None:
        """Losses (B,) of examples at levels (B,) in [0, 1)."""
        place = (level * BINS).long().clamp(0, BINS - 1)
        self.sums.index_add_(0, place, loss.to(self.sums))
        self.counts.index_add_(0, place, torch.ones_like(loss).to(self.counts))

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean over all examples, and that of each level (nan where there is none)."""
        return self.sums.sum() / self.counts.sum(), self.sums / self.counts


class Diffusion(LightningModule):
    """Image diffusion: training by noise prediction or EDM, sampling, FID.

    Args:
        network: ``uvit``, or ``unet``: diffusers' UNet2DModel.
        network_args: further arguments of :class:`recipes.scalelong.uvit.UViT` or of ``UNet2DModel``.
        image_size: from the data.
        in_chans: from the data.
        num_classes: from the data.
        class_names: from the data.
        vae: folder of a diffusers AutoencoderKL whose latents the images are; from the data (None: pixels).
        conditional: give the network the labels.
        text_encoder: folder of a Hugging Face CLIP text model with its tokenizer: a batch's ``text`` is a condition.
        label_dropout: part of the examples whose condition is hidden in training, for guidance.
        objective: ``ddpm`` or ``edm``.
        min_snr: gamma, the largest weight of an image's squared error; None: no limit.
        lr: of AdamW, reached after ``warmup_steps`` and kept.
        betas: of AdamW.
        weight_decay: of the network's weights.
        warmup_steps: linear warm-up.
        sampler: ``dpm++``, ``ddim``, ``heun``, or ``euler_maruyama`` (ddpm alone).
        sample_steps: of the sampler.
        clip_denoised: clip the images that the sampler predicts on its way to [-1, 1]; latents never are.
        guidance: w, of ``noise + w (noise - noise without condition)``; 0: none.
        num_samples: images of ``predict``; the first 64 at most are drawn after each validation, too.
        sample_batch_size: images that are generated at a time.
        prompts: texts of these images, in turn.
        val_samples: images generated for FID in each validation; 0: none.
        test_samples: images generated for FID in ``test``; 0: none.
        quality: whose features FID compares: of ``digits``, or ``inception``.
        inception: file of Inception's weights; fetched if omitted.

    A batch has ``image`` (B, C, H, W) in [0, 1], or latents, and ``index`` (B,); ``label`` (B,) or ``text`` where they
    are conditions.

    Raises:
        ValueError: for settings out of range or that don't go together.
    """

    monitor = ("val/loss", "min")
    backbone: Any

    def __init__(
        self,
        network: Literal["uvit", "unet"] = "uvit",
        network_args: dict[str, Any] | None = None,
        image_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        class_names: Sequence[str] = (),
        vae: str | None = None,
        conditional: bool = False,
        text_encoder: str | None = None,
        label_dropout: float = 0.0,
        objective: Objective = "ddpm",
        min_snr: float | None = None,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.99, 0.999),
        weight_decay: float = 0.03,
        warmup_steps: int = 2500,
        sampler: Sampler = "dpm++",
        sample_steps: int = 50,
        clip_denoised: bool = True,
        guidance: float = 0.0,
        num_samples: int = 64,
        sample_batch_size: int = 256,
        prompts: Sequence[str] = (),
        val_samples: int = 0,
        test_samples: int = 10_000,
        quality: Literal["digits", "inception"] = "inception",
        inception: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        accept_other_techniques(self)
        if objective not in ("ddpm", "edm"):
            raise ValueError(f"objective must be ddpm or edm, not '{objective}'")
        if not 0 <= label_dropout < 1 or (min_snr is not None and min_snr <= 0) or guidance < 0 or warmup_steps < 0:
            raise ValueError(
                "label_dropout must lie in [0, 1), min_snr be positive, guidance and warmup_steps not negative"
            )
        if min(num_samples, sample_steps, sample_batch_size) < 1 or min(val_samples, test_samples) < 0:
            raise ValueError(
                "numbers of samples and steps must be at least 1, val_samples and test_samples not negative"
            )
        if conditional and text_encoder:
            raise ValueError("images are conditioned on labels or on texts, not on both: leave conditional out")
        if guidance and not (label_dropout and (conditional or text_encoder)):
            raise ValueError("guidance needs a condition that training hides at times: conditional and label_dropout")
        if text_encoder and network != "uvit":
            raise ValueError("texts need the network uvit")
        scheduler(sampler, sample_steps, objective)  # says now what doesn't go together
        self.objective: Objective = objective
        self.sampler: Sampler = sampler
        self.shape = (in_chans, image_size, image_size)
        self.num_classes, self.class_names = num_classes, list(class_names) or [str(i) for i in range(num_classes)]
        self.text: Any = Texts(text_encoder) if text_encoder else None
        labels = num_classes + 1 if conditional else 0  # the last: no label
        options = dict(network_args or {})
        if network not in ("uvit", "unet"):
            raise ValueError(f"network must be uvit or unet, not '{network}'")
        if self.text is not None:
            options |= {"context_dim": self.text.width, "context_tokens": self.text.length}
        try:
            self.backbone = (UViT if network == "uvit" else UNet)(image_size, in_chans, num_classes=labels, **options)
        except TypeError as error:  # an argument that isn't one
            raise ValueError(f"network_args don't suit {network}: {error}") from error
        self.example_input_array = torch.zeros(2, *self.shape)
        self.val_loss, self.test_loss = LevelLoss(), LevelLoss()
        features = DigitFeatures() if quality == "digits" else InceptionFeatures(inception)
        self.quality = SampleQuality(features)
        self._decoder: list[Any] = []
        #: For the report: generated images (N, C, H, W) in [0, 1] of the last validation, and its loss by noise level.
        self.samples: Tensor | None = None
        self.level_loss: Tensor | None = None

    def setup(self, stage: str) -> None:
        h = self.hparams
        if stage == "fit" and (h["val_samples"] or h["test_samples"]) and not self._dry:
            self.quality.features.network()  # type: ignore[operator]  # what is missing is missed now, not at the end

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy`` the network's weights are sharded, block by block."""
        shard(self, self.backbone.blocks, [self.backbone])

    @property
    def _dry(self) -> bool:
        return bool(getattr(self.trainer, "fast_dev_run", False))

    # ------------------------------------------------------------------ the network

    def forward(
        self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """What the network makes of states (B, C, H, W), at times (B,) in thousandths, 500 if omitted."""
        if time is None:
            time = torch.full((len(x),), 500.0, device=x.device, dtype=x.dtype)
        if self.hparams["conditional"] and label is None:
            label = torch.full((len(x),), self.num_classes, device=x.device)
        if self.text is not None and context is None:
            context = self.text.nothing.expand(len(x), -1, -1)
        context = None if context is None else context.to(x.dtype)
        return self.backbone(x, time, label if self.hparams["conditional"] else None, context)

    def predict_noise(self, x: Tensor, sigma: Tensor, **condition: Tensor | None) -> Tensor:
        """The noise in states (B, C, H, W) that preserve variance, at the level sigma, a scalar."""
        if self.objective == "ddpm":
            time = (999 * vp_time(sigma.double())).to(x).expand(len(x))
            return self(x, time, **condition)
        c_skip, c_out, c_in, c_noise = (c.to(x) for c in preconditioning(sigma.double(), SIGMA_DATA))
        noisy = x * (1 + sigma.to(x) ** 2).sqrt()
        output = self(c_in * noisy, (1000 * c_noise).expand(len(x)), **condition)
        return (noisy - c_skip * noisy - c_out * output) / sigma.to(x)

    # ------------------------------------------------------------------ the loss

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of each example, and its noise level in [0, 1): both (B,).

        Of ``ddpm`` the level is the time, of ``edm`` the quantile of sigma.
        """
        x, noise, level = self._scaled(batch["image"]), batch["noise"], batch["time"]
        label = batch.get("label") if self.hparams["conditional"] else None
        context = batch.get("context")
        if "keep" in batch:
            if label is not None:
                label = torch.where(batch["keep"], label, self._nothing(label))
            if context is not None:
                context = torch.where(batch["keep"][:, None, None], context, self._nothing(context))
        column = (len(x), *[1] * (x.dim() - 1))
        if self.objective == "ddpm":
            time = T_MIN + (1 - T_MIN) * level
            alpha_bar, sigma = vp_alpha_bar(time).view(column), vp_sigma(time)
            state = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
            output, target = self(state.to(x.dtype), 999 * time, label, context), noise
            weight = 1 / sigma**2
        else:
            sigma = torch.exp(P_MEAN + P_STD * torch.special.ndtri(level.double())).to(level.dtype)
            scales = preconditioning(sigma, SIGMA_DATA)
            c_skip, c_out, c_in = (c.view(column) for c in scales[:3])
            state = x + sigma.view(column) * noise
            output = self((c_in * state).to(x.dtype), 1000 * scales[3], label, context)
            target = (x - c_skip * state) / c_out  # the loss' weight is 1 / c_out ** 2, so it cancels here
            weight = 1 / sigma**2 + 1 / SIGMA_DATA**2
        loss = (output.float() - target.float()).square().flatten(1).mean(1)
        if self.hparams["min_snr"] is not None:
            loss = loss * (self.hparams["min_snr"] / weight).clamp(max=1).to(loss)
        return loss, level

    def _scaled(self, image: Tensor) -> Tensor:
        return image if self.hparams["vae"] else 2 * image - 1

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch; no logging, no side effects."""
        return self.losses(batch)[0].mean()

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draws what the loss needs: noise, time, and which conditions are kept; by example, not by batch."""
        if not isinstance(batch, dict) or "image" not in batch or self.trainer.predicting:
            return batch
        if "index" not in batch:
            raise ValueError("noise is drawn by example: the batch needs 'index' (B,), as our DataModules have it")
        image, index, training = batch["image"], batch["index"], self.trainer.training
        place = ("train", self.trainer.current_epoch) if training else ("evaluate",)

        def rows(purpose: str, *shape: int, kind: Literal["uniform", "normal"]) -> Tensor:
            empty = torch.empty(len(image), *shape, dtype=torch.float32, device=image.device)
            seeds = (fold_seed(run_seed() if training else 0, "diffusion", purpose, *place, i) for i in index.tolist())
            return fill_rows(empty, seeds, kind).to(image.dtype)

        drawn: dict[str, Any] = {"noise": rows("noise", *image.shape[1:], kind="normal")}
        drawn["time"] = rows("time", kind="uniform") if training else golden(index).to(image)
        if training and self.hparams["label_dropout"]:
            drawn["keep"] = rows("keep", kind="uniform") >= self.hparams["label_dropout"]
        if self.text is not None:
            if "text" not in batch:
                raise ValueError("text_encoder is for data with captions: the batch needs 'text'")
            drawn["context"] = self.text(batch["text"], image.device)
        return {**batch, **drawn}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    # ------------------------------------------------------------------ validation and test

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_loss.update(*self.losses(batch))

    def on_validation_epoch_start(self) -> None:
        """Samples are drawn here, where the averaged weights are in place."""
        if self.trainer.sanity_checking:
            return
        h = self.hparams
        if h["val_samples"]:
            self._quality(h["val_samples"], "validation")
        self.samples = None
        # Of sharded weights every rank has to hand over its part.
        if (self.trainer.is_global_zero or is_sharded(self.parameters())) and not self._dry:
            self.samples = self.generate(torch.arange(min(h["num_samples"], 64))).cpu()

    def on_validation_epoch_end(self) -> None:
        mean, self.level_loss = self._loss_of(self.val_loss)
        self.log("val/loss", mean, prog_bar=True, sync_dist=True)
        if self.trainer.sanity_checking:
            self.samples = self.level_loss = None
        elif self.hparams["val_samples"]:
            for name, value in self.quality.compute().items():
                self.log(f"val/{name}", value, sync_dist=True)
            self.quality.reset(real=False)

    def _loss_of(self, metric: LevelLoss) -> tuple[Tensor, Tensor]:
        mean, by_level = metric.compute()
        metric.reset()
        return mean.float(), by_level.float().cpu()

    def on_test_epoch_start(self) -> None:
        if self.hparams["test_samples"]:
            self._quality(self.hparams["test_samples"], "test")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_loss.update(*self.losses(batch))

    def on_test_epoch_end(self) -> None:
        """The loss of the test images; FID, KID, precision and recall of samples against the training images."""
        self.log("test/loss", self._loss_of(self.test_loss)[0], sync_dist=True)
        if self.hparams["test_samples"]:
            for name, value in self.quality.compute().items():
                self.log(f"test/{name}", value, sync_dist=True)
            self.quality.reset(real=False)

    def _quality(self, count: int, what: str) -> None:
        """Generates images, and takes in their features and, once, those of the training images; each rank its part."""
        trainer = self.trainer
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError("FID compares with the training images: it needs a DataModule (or set the samples to 0)")
        if self._dry:
            count = min(count, 8)
        rank, world = trainer.global_rank, trainer.world_size
        if not self._has_real():
            images = getattr(data, "data", data).part("train")  # of latents: the images they are of
            index = torch.arange(rank, len(images) if not self._dry else 8 * world, world)
            for part in index.split(256):
                self.quality.update(_bytes(images.plain(part.tolist())["image"].to(self.device)), real=True)
        mine = torch.arange(rank, count, world)
        with self._progress(f"samples for {what}", len(mine)) as advance:
            for part in mine.split(self.hparams["sample_batch_size"]):
                self.quality.update(_bytes(self.generate(part)), real=False)
                advance(len(part))
            if is_sharded(self.parameters()):  # every rank has to hand over its part as often as any other asks
                size = self.hparams["sample_batch_size"]
                for _ in range(math.ceil(math.ceil(count / world) / size) - math.ceil(len(mine) / size)):
                    self.generate(torch.zeros(1, dtype=torch.int64))

    def _has_real(self) -> bool:
        return len(self.quality.gathered.real) > 0

    @contextlib.contextmanager
    def _progress(self, what: str, total: int) -> Any:
        shown = sys.stdout.isatty() and self.trainer.is_global_zero and total > 64
        with Progress(transient=True, disable=not shown) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.advance(task, n)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(self, index: Tensor, seed: int | None = None) -> Tensor:
        """The images of these numbers, (N,) int64, in one batch: (N, C, H, W) in [0, 1].

        Image i depends on the seed (of the run if None) and i alone; its class is i modulo the number of classes, its
        prompt likewise.
        """
        seed = run_seed() if seed is None else seed
        numbers = index.tolist()
        start = fill_rows(torch.empty(len(numbers), *self.shape), (fold_seed(seed, "sample", i) for i in numbers))
        generators = [torch.Generator().manual_seed(fold_seed(seed, "sampler", i)) for i in numbers]
        condition: dict[str, Tensor] = {}
        if self.hparams["conditional"]:
            condition["label"] = (index % self.num_classes).to(self.device)
        if self.text is not None:
            prompts = list(self.hparams["prompts"]) or [""]
            condition["context"] = self.text([prompts[i % len(prompts)] for i in numbers], self.device)
        w = self.hparams["guidance"]
        bounded = self.hparams["clip_denoised"] and not self.hparams["vae"]

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            if not w:
                return self.predict_noise(x, sigma, **condition)
            both = {k: torch.cat([v, self._nothing(v)]) for k, v in condition.items()}
            given, free = self.predict_noise(torch.cat([x, x]), sigma, **both).chunk(2)
            return given + w * (given - free)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            noise = guided(x.to(self.dtype), sigma).float()
            return clip_denoised(noise, x, sigma.to(x)) if bounded else noise

        training = self.training
        self.eval()
        try:
            plugin = getattr(self._trainer, "precision_plugin", None)
            with plugin.forward_context() if plugin is not None else contextlib.nullcontext():
                steps = self.hparams["sample_steps"]
                found = sample(predict, start.to(self.device), self.sampler, steps, self.objective, generators)
        finally:
            self.train(training)
        return self._image(found)

    def _nothing(self, condition: Tensor) -> Tensor:
        """What hides labels (B,), or the features of texts (B, tokens, width)."""
        if condition.dim() == 1:
            return torch.full_like(condition, self.num_classes)
        return self.text.nothing.to(condition).expand_as(condition)

    def _image(self, found: Tensor) -> Tensor:
        """States at the end of sampling as images in [0, 1]."""
        if not self.hparams["vae"]:
            return ((found + 1) / 2).clamp(0, 1)
        folder = Path(self.hparams["vae"])
        if not self._decoder:
            with torch.inference_mode(False):
                self._decoder.append(load_autoencoder(folder))
        decoder, scale = self._decoder[0].to(found.device), read_config(folder).scale
        with torch.autocast(found.device.type, enabled=False):
            parts = [decoder.decode(x / scale).sample for x in found.float().split(8)]
        return ((torch.cat(parts) + 1) / 2).clamp(0, 1)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The numbers of the images that ``predict`` generates, cut by rank."""
        count = self.hparams["num_samples"]
        size = self.hparams["sample_batch_size"]
        return DataLoader(_Numbers(count), batch_sampler=EvalBatches(count, size), collate_fn=lambda batch: batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        index = batch["index"]
        return {"index": index, "image": _bytes(self.generate(index))}

    def save_predictions(self, found: dict[str, Tensor], folder: Path, part: str) -> list[Path]:
        """Write ``samples<part>.npz`` (image (N, H, W, C) uint8, index, label, seed) and a grid as PNG.

        Args:
            found: what :meth:`predict_step` gave, of all batches.
            folder: of the run.
            part: of the names, where several ranks write.
        """
        from torchvision.io import write_png

        image, index = found["image"].cpu(), found["index"].cpu()
        label = index % self.num_classes if self.hparams["conditional"] else torch.full_like(index, -1)
        files = [folder / f"samples{part}.npz", folder / f"samples{part}.png"]
        pixels = image.permute(0, 2, 3, 1).numpy()
        seed = np.array(run_seed())
        np.savez_compressed(files[0], image=pixels, index=index.numpy(), label=label.numpy(), seed=seed)
        write_png(tiled(image / 255), str(files[1]))
        return files

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        h = self.hparams
        groups = parameter_groups(self, weight_decay=h["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=tuple(h["betas"]))
        warmup = h["warmup_steps"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / max(warmup, 1), 1.0))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(self, checkpoint)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)


def _bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


class _Numbers(Dataset[dict[str, Tensor]]):
    """The numbers from 0 to ``count``, as batches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        return {"index": torch.tensor([draw.position for draw in draws])}
