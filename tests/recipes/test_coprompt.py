"""CoPrompt and its family: exact values, what is trained and what isn't, what is computed how often."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes._cli import CONFIGS, run
from recipes.clip import towers
from recipes.coprompt import CoPrompt, consistency_loss
from recipes.coprompt import bank as banks
from recipes.coprompt.module import TECHNIQUES, harmonic_mean
from tests.laws import cells

MODEL = "recipes.coprompt.module.CoPrompt"
TRAINED = [t for t in TECHNIQUES if not t.startswith("zero_shot")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(**more: Any) -> CoPrompt:
    found = cells.recipe("coprompt", **more)
    assert isinstance(found, CoPrompt)
    return found


def untouched() -> Any:
    """The frozen CLIP, loaded once more; frozen, too, since torch's attention computes in another order if it isn't."""
    return towers.load(cells.small_clip()).clip.eval().requires_grad_(False)


def batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    image, view = (torch.rand(size, 3, cells.SIDE, cells.SIDE, generator=g) for _ in range(2))
    label = torch.arange(size) % 2
    return {"image": image, "view": view, "label": label, "domain": torch.zeros_like(label)}


def fitted(module: CoPrompt, *callbacks: Any, **options: Any) -> Any:
    trainer = cells.trainer(*callbacks, **options)
    trainer.fit(module, datamodule=cells.data("coprompt"))
    return trainer


# ---------------------------------------------------------------------- values


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dim=st.integers(2, 9),
    scale=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)
def test_consistency_is_what_the_paper_says(shape: list[int], dim: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, dim, generator=g) for _ in range(2))
    rows = list(zip((scale * a).view(-1, dim).tolist(), b.view(-1, dim).tolist(), strict=True))
    cosines, squares = [], []
    for x, y in rows:
        nx, ny = (math.sqrt(sum(v * v for v in z)) for z in (x, y))
        cosines.append(sum(p * q for p, q in zip(x, y, strict=True)) / (nx * ny))
        squares += [(p / nx - q / ny) ** 2 for p, q in zip(x, y, strict=True)]
    assert float(consistency_loss(scale * a, b)) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)
    found = float(consistency_loss(scale * a, b, "mse"))
    assert found == pytest.approx(sum(squares) / len(squares), abs=1e-5)
    assert found == pytest.approx(2 / dim * float(consistency_loss(a, b)), abs=1e-5), "mse is 2 / D of the cosine's"
    assert float(consistency_loss(a, a)) == pytest.approx(0, abs=1e-6)


def test_consistency_has_a_gradient_to_the_student_alone() -> None:
    a, b = (torch.randn(3, 5, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    loss = consistency_loss(a, b)
    loss.backward()
    assert loss.dtype == torch.float32 and a.grad is not None and b.grad is None
    with pytest.raises(ValueError, match="cosine or mse, not 'l1'"):
        consistency_loss(a, b, "l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        consistency_loss(a, b[:2])


@given(b=st.floats(0, 1), n=st.floats(0, 1))
def test_harmonic_mean(b: float, n: float) -> None:
    found = float(harmonic_mean(torch.tensor(b), torch.tensor(n)))
    assert found == pytest.approx(2 / (1 / b + 1 / n) if b > 1e-6 and n > 1e-6 else 0, abs=1e-5)


def nothing(**more: Any) -> CoPrompt:
    return make(depth=0, adapter_image=0.0, adapter_text=0.0, lam=0.0, **more)


@torch.no_grad()
def test_without_prompts_and_adapters_the_logits_are_open_clips() -> None:
    module, clip, image = nothing().eval(), untouched(), batch()["image"]
    tokens = module.tokenize([f"a photo of a {name}." for name in module.class_names])
    wanted, _ = clip.get_logits((image - 0.5) / 0.5, tokens)
    assert torch.equal(module(image), wanted)
    zero_shot = make(technique="zero_shot").eval()
    assert torch.equal(zero_shot(image), wanted)


def own_clip(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """A random open_clip model with its own tokenizer, towers of odd widths and different depths."""
    torch.manual_seed(3)
    vision = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 16, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    clip = open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=text, quick_gelu=True, **more)
    kept = copy.deepcopy(clip).eval().requires_grad_(False)
    words = open_clip.SimpleTokenizer(context_length=16)
    loaded = towers.Loaded(clip, words, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 32)
    monkeypatch.setattr(towers, "load", lambda name, pretrained=None: loaded._replace(clip=copy.deepcopy(clip)))
    return kept, words


@torch.no_grad()
def test_so_are_those_of_any_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, words = own_clip(monkeypatch, init_logit_bias=-3.0)
    module, image = nothing(ctx_init="a photo of a").eval(), batch()["image"]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    wanted, _ = clip.get_logits((image - mean) / std, words([f"a photo of a {c}." for c in ("red", "green", "blue")]))
    assert torch.equal(module(image), wanted)


@pytest.mark.parametrize(("n_ctx", "prefix"), [(2, "a photo of a"), (4, "a photo of a"), (6, "X X X X X X")])
def test_prompts_begin_as_the_words(n_ctx: int, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, words = own_clip(monkeypatch)
    module = make(technique="coop", n_ctx=n_ctx, ctx_init="a photo of a", depth=1).eval()
    if n_ctx <= 4:
        tokens = words(["a photo of a"])[0, 1 : 1 + n_ctx]
        assert torch.equal(module.prompts.ctx, clip.token_embedding.weight[tokens])  # type: ignore[union-attr]
    else:
        assert 0.01 < float(module.prompts.ctx.detach().std()) < 0.03  # type: ignore[union-attr]
    tokens = words([f"{prefix} {c}." for c in ("red", "green", "blue")])
    assert torch.equal(module.prompted, tokens)
    if n_ctx <= 4:  # so before it learns anything, it is the zero-shot CLIP
        wanted = F.normalize(clip.encode_text(tokens), dim=-1)
        torch.testing.assert_close(module.class_features(), wanted, rtol=1e-4, atol=1e-5)


def through(tower: Any, x: Tensor, deep: list[Tensor], first: int, mask: Tensor | None) -> Tensor:
    """Blocks of a transformer, prompts put in by hand."""
    for j, block in enumerate(tower.resblocks):
        if 1 <= j <= len(deep):
            x = x.clone()
            x[:, first : first + len(deep[j - 1])] = deep[j - 1]
        x = block(x, attn_mask=mask)
    return x


def test_the_student_is_the_papers() -> None:
    """Sections 3.1 and 3.2 by hand: prompts of the text tower, their projections in the image tower, adapters."""
    module, clip, image = make().eval(), untouched(), batch()["image"]
    p = dict(module.named_parameters())
    with torch.no_grad():
        tokens = module.tokenize([f"red green {c}." for c in module.class_names])
        x = clip.token_embedding(tokens)
        x[:, 1:3] = p["prompts.ctx"]
        deep = [p["prompts.deep.0"], p["prompts.deep.1"]]
        x = through(clip.transformer, x + clip.positional_embedding, deep[:1], 1, clip.attn_mask)
        z = clip.ln_final(x)[torch.arange(3), tokens.argmax(-1)] @ clip.text_projection
        adapted = F.relu(F.relu(z @ p["adapter_text.down.weight"].T) @ p["adapter_text.up.weight"].T)
        text = 0.8 * z + 0.2 * adapted
        text = text / text.norm(dim=-1, keepdim=True)
        visual = clip.visual
        patches = visual.conv1((image - 0.5) / 0.5).flatten(2).transpose(1, 2)
        cls = visual.class_embedding.expand(len(image), 1, -1)
        x = torch.cat([cls, patches], 1) + visual.positional_embedding

        def projected(name: str, prompt: Tensor) -> Tensor:
            return prompt @ p[f"{name}.weight"].T + p[f"{name}.bias"]

        ctx = projected("prompts.proj", p["prompts.ctx"])
        x = visual.ln_pre(torch.cat([x, ctx.expand(len(image), -1, -1)], 1))
        images = [projected(f"prompts.deep_proj.{j}", prompt) for j, prompt in enumerate(deep)]
        x = through(visual.transformer, x, images, x.shape[1] - 2, None)
        z = visual.ln_post(x[:, 0]) @ visual.proj
        adapted = F.relu(F.relu(z @ p["adapter_image.down.weight"].T) @ p["adapter_image.up.weight"].T)
        features = 0.9 * z + 0.1 * adapted
        features = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(module.class_features(), text, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.image_features(image), features, rtol=1e-4, atol=1e-5)
    wanted = clip.logit_scale.exp() * features @ text.T
    torch.testing.assert_close(module(image), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distill", ["cosine", "mse"])
def test_the_loss_is_the_papers(distill: str) -> None:
    """Cross-entropy among base classes and lam times both distances, to the other view and to one sentence."""
    module, clip, given = make(lam=3.0, distill=distill), untouched(), batch()
    loss = float(module.loss(given).detach())
    image, text = module.image_features(given["image"]), module.class_features()[:2]
    ce = F.cross_entropy(clip.logit_scale.exp() * image @ text.T, given["label"])
    taught = F.normalize(clip.encode_image((given["view"] - 0.5) / 0.5), dim=-1)
    found = []
    for s in range(2):
        lines = [cells.RECIPES["coprompt"]["class_sentences"][c][s] for c in ("red", "green")]
        bank = F.normalize(clip.encode_text(module.tokenize(lines)), dim=-1)
        if distill == "cosine":
            apart = 2 - F.cosine_similarity(image, taught).mean() - F.cosine_similarity(text, bank).mean()
        else:
            apart = F.mse_loss(image, taught) + F.mse_loss(text, bank)
        found.append(float((ce + 3 * apart).detach()))
    assert found[module._sentence()] == pytest.approx(loss, rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


@torch.no_grad()
def test_promptsrc_has_its_three_terms() -> None:
    module, clip, given = make(technique="promptsrc"), untouched(), batch()
    terms = {name: float(value) for name, value in module.terms(given).items()}
    image, text = module.image_features(given["image"]), module.class_features()[:2]
    taught = F.normalize(clip.encode_image((given["image"] - 0.5) / 0.5), dim=-1)
    lines = cells.RECIPES["coprompt"]["class_sentences"]
    mean = [F.normalize(clip.encode_text(module.tokenize(lines[c])), dim=-1).mean(0) for c in ("red", "green")]
    ensemble = F.normalize(torch.stack(mean), dim=-1)
    scale = clip.logit_scale.exp()
    p, q = (scale * image @ text.T).log_softmax(-1), (scale * taught @ ensemble.T).log_softmax(-1)
    wanted = {
        "ce": float(F.cross_entropy(scale * image @ text.T, given["label"])),
        "image": 10 * float((image - taught).abs().mean()),
        "text": 25 * float((text - ensemble).abs().mean()),
        "logits": float((q.exp() * (q - p)).mean()),
    }
    assert terms == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_cocoop_has_a_context_for_each_image() -> None:
    module, given = make(technique="cocoop").eval(), batch()
    logits, net = module(given["image"]), module.prompts.meta_net  # type: ignore[union-attr]
    for i, feature in enumerate(module.image_features(given["image"])):
        ctx = module.prompts.ctx + net[2](net[0](feature).relu())  # type: ignore[union-attr,index,operator]
        text = F.normalize(towers.encode_text(module.clip, module.prompted, ctx), dim=-1)
        torch.testing.assert_close(logits[i], module.clip.logit_scale.exp() * text @ feature, rtol=1e-3, atol=1e-4)


def test_the_ensemble_is_the_mean_of_the_sentences() -> None:
    module, clip = make(technique="zero_shot_ensemble"), untouched()
    lines = cells.RECIPES["coprompt"]["class_sentences"]
    mean = [F.normalize(clip.encode_text(module.tokenize(lines[c])), dim=-1).mean(0) for c in module.class_names]
    torch.testing.assert_close(module.class_features(), F.normalize(torch.stack(mean), dim=-1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- what is trained, and what isn't


@pytest.mark.parametrize("technique", TRAINED)
def test_all_that_is_learned_moves_and_nothing_else(technique: str) -> None:
    module = make(technique=technique)
    learned = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    assert learned and not any(n.startswith(("clip.", "teacher.")) for n in learned)
    module.train()
    module.loss(batch()).backward()
    unused = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, "plain DDP would stop"
    module.zero_grad()
    fitted(module, max_epochs=2)
    still = [n for n, p in module.named_parameters() if n in learned and torch.equal(p, learned[n])]
    assert [n for n in still if not n.startswith("adapter")] == []  # an adapter's ReLUs may all be off
    frozen = {n: v for n, v in untouched().state_dict().items()}
    assert all(torch.equal(v, frozen[n]) for n, v in module.clip.state_dict().items())
    assert all(torch.equal(v, frozen[f"visual.{n}"]) for n, v in module.teacher.state_dict().items())


@pytest.mark.parametrize("name", [t for t in sorted(cells.techniques()) if ("coprompt", t) not in cells.APART])
def test_no_technique_moves_the_frozen_clip(name: str) -> None:
    module = make()
    fitted(module, cells.technique(cells.techniques()[name], "coprompt"))
    assert towers.fingerprint(module.clip) == towers.fingerprint(untouched())
    assert towers.fingerprint(module.teacher) == towers.fingerprint(untouched().visual)


def test_the_teacher_takes_no_memory_and_sees_no_technique() -> None:
    module = make()
    shared = {p.data_ptr() for p in module.clip.parameters()}
    assert all(p.data_ptr() in shared for p in module.teacher.parameters())
    module.double()
    assert all(a is b for a, b in zip(module.teacher.parameters(), module.clip.visual.parameters(), strict=True))
    module.float()
    seen = []
    module.backbone.transformer.resblocks[0].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index,union-attr]
    assert not module.teacher_features(batch()["view"]).requires_grad and not seen
    module.image_features(batch()["image"])
    assert seen
    module.train()
    assert not module.clip.training and not module.teacher.training and module.training


def test_a_checkpoint_holds_what_is_learned(tmp_path: Path) -> None:
    module = make()
    trainer = fitted(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
    named = [n for group in saved["optimizer_states"][0]["param_groups"] for n in group["parameters"]]
    assert not any(n.startswith(("clip.", "teacher.")) for n in named)
    other = make(class_names=("blue", "red"), class_texts=(), class_sentences=None, domain_names=(), domain_classes=())
    other.load_state_dict(saved["state_dict"])  # strictly, for other classes
    other.set_classes(["red", "green", "blue"])
    assert torch.equal(other.eval()(batch()["image"]), module.eval()(batch()["image"]))
    with pytest.raises(RuntimeError, match="prompts.ctx"):
        make().load_state_dict({n: v for n, v in saved["state_dict"].items() if n != "prompts.ctx"})


def test_a_checkpoint_of_another_clip_is_refused(tmp_path: Path) -> None:
    trainer = fitted(make())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = make()
    with torch.no_grad():
        module.clip.visual.proj[0, 0] += 1
    with pytest.raises(ValueError, match="another CLIP"):
        file = tmp_path / "a.ckpt"
        cells.trainer().test(module, datamodule=cells.data("coprompt"), ckpt_path=file, weights_only=True)


# ---------------------------------------------------------------------- classes


def test_classes_are_swapped() -> None:
    module = make().eval()
    before = module(batch()["image"])
    module.set_classes(["blue", "red"])
    after = module(batch()["image"])
    torch.testing.assert_close(after, before[:, [2, 0]], rtol=1e-4, atol=1e-4)
    assert module.domain_names == ["all"] and module.domain_classes == [[0, 1]]
    with pytest.raises(ValueError, match="'red' is there twice"):
        module.set_classes(["red", "red"])
    with pytest.raises(ValueError, match="place {} for the class"):
        module.set_classes(["red", "blue"], template="a photo")
    with pytest.raises(ValueError, match="same number of sentences"):
        module.set_classes(["red", "blue"], sentences={"red": ["a"], "blue": ["a", "b"]})
    assert torch.equal(module(batch()["image"]), after), "what was refused changed nothing"


def test_each_domain_is_told_apart_among_its_own_classes() -> None:
    module = make(domain_classes=((0, 1), (1, 2))).eval()
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert module._among(logits, torch.tensor([0, 1])).argmax(-1).tolist() == [0, 2]


def test_base_novel_and_their_harmonic_mean_are_logged() -> None:
    module = make()
    trainer = cells.trainer()
    (found,) = trainer.test(module, datamodule=cells.data("coprompt"), verbose=False)
    images = cells.data("coprompt")
    images.setup("test")
    part = images.part("test")
    given = part.__getitems__(range_draws(len(part)))
    logits = make().eval()(given["image"])
    logits[given["domain"] == 0, 2] = -1e9
    logits[given["domain"] == 1, :2] = -1e9
    right = (logits.argmax(-1) == given["label"]).float()
    base, novel = (float(right[given["domain"] == d].mean()) for d in (0, 1))
    hm = 2 * base * novel / (base + novel)
    assert found == pytest.approx({"test/acc_base": base, "test/acc_novel": novel, "test/hm": hm})
    wrong = set(given["label"][right == 0].tolist())
    assert set(module.mistakes) == wrong


def range_draws(size: int) -> list[Any]:
    from datamodules.sampling import Draw

    return [Draw(0, i) for i in range(size)]


# ---------------------------------------------------------------------- what is computed how often


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts of each pass of the text tower."""
    calls: list[int] = []
    original = towers.encode_text

    def counting(clip: Any, tokens: Tensor, *args: Any) -> Tensor:
        calls.append(len(tokens))
        return original(clip, tokens, *args)

    monkeypatch.setattr(towers, "encode_text", counting)
    return calls


def test_class_prompts_are_encoded_once_a_step_and_once_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    fitted(make(), limit_val_batches=0)
    assert calls == [2] * cells.STEPS, "base classes alone"
    calls.clear()
    data = cells.data("coprompt", size=40)
    cells.trainer().test(make(), datamodule=data, verbose=False)
    assert calls == [3]


def test_the_teacher_sees_a_view_once_while_a_technique_crafts() -> None:
    module, seen = make(), []
    module.teacher.register_forward_hook(lambda *_: seen.append(1))
    fitted(module, cells.technique(cells.techniques()["AdversarialInput"], "coprompt", steps=3), limit_val_batches=0)
    assert len(seen) == cells.STEPS


def test_sentences_are_encoded_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make()._sentences()
    (file,) = (cache / "perturbation-recipes").rglob("*.safetensors")
    assert first.shape == (2, 3, 32)
    with monkeypatch.context() as patched:
        patched.setattr(banks, "encode", lambda *_: pytest.fail("encoded again"))
        assert torch.equal(make()._sentences(), first)
    file.write_bytes(b"cut off")
    assert torch.equal(make()._sentences(), first), "a spoilt file is made again"
    other = {c: (f"{c} {c}", f"{c} blue") for c in ("red", "green", "blue")}
    assert not torch.equal(make(class_sentences=other)._sentences(), first)
    assert len(list(cache.rglob("*.safetensors"))) == 2 and not list(cache.rglob("*.part"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file, so no folder can be made below it
    assert torch.equal(make()._sentences(), first)


def test_the_sentence_is_a_function_of_seed_and_step() -> None:
    module = make()
    module._sentences()

    class At:
        global_step = 0

    module._trainer = At()  # type: ignore[assignment]
    drawn = []
    for step in range(200):
        At.global_step = step
        drawn.append(module._sentence())
    assert 70 < sum(drawn) < 130 and drawn[:8] != [drawn[0]] * 8
    At.global_step = 7
    assert module._sentence() == drawn[7]


# ---------------------------------------------------------------------- views, settings, errors


def test_batches_have_another_view_where_it_is_compared() -> None:
    module, data = make(), cells.data("coprompt")
    cells.trainer(limit_val_batches=0).fit(module, datamodule=data)
    given = next(iter(data.train_dataloader()))
    assert given["view"].shape == given["image"].shape and not torch.equal(given["view"], given["image"])
    data = cells.data("coprompt")
    cells.trainer(limit_val_batches=0).fit(make(technique="maple"), datamodule=data)
    assert "view" not in next(iter(data.train_dataloader()))
    without = {n: v for n, v in batch().items() if n != "view"}
    with pytest.raises(ValueError, match="another view: the batch needs 'view'"):
        module.loss(without)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"technique": "copromp"}, "technique must be one of zero_shot, .*coprompt, not 'copromp'"),
        ({"depth": 4}, "depth is 4, but the text tower has 2 blocks, the image tower 3"),
        ({"distill": "l1"}, "distill must be cosine or mse"),
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"adapter_image": 1.5}, r"adapter ratios in \[0, 1\]"),
        ({"clip": "no-such-model"}, "open_clip has no model 'no-such-model'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_zero_shot_has_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="zero_shot has nothing to train: use the verb test"):
        fitted(make(technique="zero_shot"))


def test_images_of_another_size_are_refused() -> None:
    data = cells.data("coprompt")
    data.image_size = 48
    with pytest.raises(ValueError, match="48 pixels high, but this CLIP takes 32: --data.image_size 32"):
        cells.trainer().test(make(), datamodule=data, verbose=False)


def test_the_learning_rate_is_constant_first_and_then_a_cosine() -> None:
    module = make(lr=0.01, warmup_epochs=1)
    seen: list[float] = []

    class Watch(cells.ExactResume):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = cells.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=cells.data("coprompt"))
    wanted = [1e-5, *(0.005 * (1 + math.cos(math.pi * e / 4)) for e in (0, 1, 2))]
    assert seen == pytest.approx(wanted)


@pytest.mark.parametrize("technique", TRAINED)
def test_bf16_and_checkpointing_of_the_text_tower(technique: str) -> None:
    def losses(precision: Any = "32-true", **more: Any) -> list[float]:
        found: list[float] = []

        class Keep(cells.ExactResume):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
                found.append(float(outputs["loss"]))

        fitted(make(technique=technique, **more), Keep(), precision=precision)
        return found

    plain = losses()
    assert losses(checkpoint_text=True) == pytest.approx(plain, rel=1e-5)
    assert losses("bf16-mixed") == pytest.approx(plain, rel=0.1)


# ---------------------------------------------------------------------- the command


def test_what_is_typed_wins_over_the_datasets_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The released code merges its per-dataset settings last and so ignores what was typed."""
    file = str(CONFIGS / "coprompt" / "eurosat.yaml")
    assert run(MODEL, "coprompt", ["fit", "--config", file, "--model.lam", "2", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "lam: 2.0" in printed and "n_ctx: 2" in printed and "depth: 12" in printed


SETTINGS = {"Caltech101": (12, 4, 4), "OxfordPets": (12, 2, 0.1), "StanfordCars": (12, 4, 4), "Flowers102": (9, 4, 8),
            "Food101": (9, 4, 0.5), "FGVCAircraft": (9, 4, 2), "SUN397": (12, 4, 8), "DTD": (12, 2, 8),
            "EuroSAT": (12, 2, 0.1), "UCF101": (12, 4, 2), "FewShotImageNet": (12, 4, 8), "ImageNetV2": (12, 4, 8),
            "ImageNetSketch": (12, 4, 8), "ImageNetA": (12, 4, 8), "ImageNetR": (12, 4, 8)}  # fmt: skip


def test_each_benchmark_has_a_file_with_its_published_settings() -> None:
    import yaml

    found = {}
    for file in (CONFIGS / "coprompt").glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        if "root" in content.get("data", {}).get("init_args", {}):
            model = content["model"]
            found[content["data"]["class_path"]] = (model["depth"], model["n_ctx"], model["lam"])
            assert "Published" in file.read_text()
    assert found == SETTINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two epochs on embedded data."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["--trainer.max_epochs", "2", "--data.shots", "2", "--wandb", "off"]
    words += ["--trainer.default_root_dir", str(folder)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert run(MODEL, "coprompt", ["fit", *words]) == 0
    (found,) = folder.glob("coprompt/*")
    return found


def test_a_run_has_its_pictures_and_a_small_checkpoint(trained: Path) -> None:
    assert {f.name for f in (trained / "plots").iterdir()} >= {"inputs.png", "curves.png", "test.png", "mistakes.png"}
    assert (trained / "checkpoints" / "last.ckpt").stat().st_size < 1.5e6
    header = (trained / "metrics.csv").read_text().splitlines()[0]
    for name in ("test/hm", "test/acc_base", "test/acc_novel", "val/cos_text_novel", "val/cos_image_base"):
        assert name in header


def test_one_checkpoint_is_tested_on_all_classes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, folder = str(trained / "checkpoints" / "last.ckpt"), str(trained.parents[1])
    words = ["test", "--ckpt_path", last, "--data.protocol", "all", "--wandb", "off"]
    assert run(MODEL, "coprompt", [*words, "--trainer.default_root_dir", folder]) == 0
    assert "test/acc_all" in capsys.readouterr().out


def test_a_config_of_other_data_doesnt_reshape_what_was_learned(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("model: {clip: ViT-B-16, n_ctx: 2, depth: 1, lam: 0.5}\ndata: {init_args: {protocol: all}}\n")
    last, folder = str(trained / "checkpoints" / "last.ckpt"), str(trained.parents[1])
    words = ["test", "--ckpt_path", last, "--config", str(file), "--wandb", "off"]
    words += ["--trainer.default_root_dir", folder]
    assert run(MODEL, "coprompt", words) == 0
    assert "test/acc_all" in capsys.readouterr().out
    assert run(MODEL, "coprompt", [*words, "--print_config"]) == 0
    assert "depth: 3" in (said := capsys.readouterr().out) and "lam: 0.5" in said and "n_ctx: 4" in said
    assert run(MODEL, "coprompt", [*words, "--model.n_ctx", "2"]) == 2  # what is typed is above all
    assert "doesn't fit this model" in capsys.readouterr().err


def test_classes_are_ranked_for_a_folder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--classes", "dog,car"]
    assert run(MODEL, "coprompt", [*words, "--trainer.default_root_dir", str(trained.parents[1])]) == 2
    assert "give it with --images" in capsys.readouterr().err


def test_cocoops_evaluation_takes_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(technique="cocoop")
    image = torch.rand(5, 3, cells.SIDE, cells.SIDE)
    with torch.no_grad():
        whole = module(image)
        monkeypatch.setattr("recipes.coprompt.module._TEXTS", 4)
        assert torch.allclose(module(image), whole, atol=1e-5)


def test_classes_of_the_users_are_ranked(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.utils import save_image

    (tmp_path / "images").mkdir()
    for i in range(3):
        save_image(torch.rand(3, 40, 50), tmp_path / "images" / f"{i}.png")
    last = str(trained / "checkpoints" / "last.ckpt")
    words = ["predict", "--ckpt_path", last, "--images", str(tmp_path / "images"), "--wandb", "off"]
    words += ["--trainer.default_root_dir", str(tmp_path)]
    capsys.readouterr()
    assert run(MODEL, "coprompt", [*words, "--classes", "dog, smiling face,car"]) == 0
    assert capsys.readouterr().err == ""
    (file,) = tmp_path.rglob("ranking.csv")
    rows = [line.split(",") for line in file.read_text().splitlines()]
    assert rows[0] == ["file", "rank", "class", "confidence"] and len(rows) == 1 + 9
    for i in range(3):
        three = rows[1 + 3 * i : 4 + 3 * i]
        assert [r[1] for r in three] == ["1", "2", "3"] and {r[2] for r in three} == {"dog", "smiling face", "car"}
        shares = [float(r[3]) for r in three]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-3)
    capsys.readouterr()
    assert run(MODEL, "coprompt", [*words, "--classes", "dog"]) == 2
    assert "at least two names" in capsys.readouterr().err
    assert run("recipes.classifier.module.Classifier", "classifier", ["predict", "--classes", "a,b", *words[3:]]) == 2
    assert "knows the classes it was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "EuroSAT", "--data.root", "nowhere"], "error: nowhere is not there: EuroSAT expects 2750/<class>"),
        (["--data", "Digits"], "error: the model needs 'class_texts', and Digits has no such attribute"),
        (["--model.depth", "12"], "error: depth is 12, but the text tower has 3 blocks"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MODEL, "coprompt", ["fit", *words, "--trainer.default_root_dir", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(said) and all(line.startswith("hint: ") for line in lines[1:]), lines


def test_two_ranks_through_the_command(tmp_path: Path) -> None:
    """Both read one bank of sentences, and count all test images once."""
    words = [sys.executable, "-m", "recipes.coprompt", "fit", "--trainer.max_epochs", "1", "--data.shots", "2"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--wandb", "off"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr and "test/hm" in done.stdout


def test_sentences_of_the_users_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sentences.json"
    file.write_text(json.dumps({"bird": ["a bird"]}))
    words = ["fit", "--data.sentences", str(file), "--trainer.default_root_dir", str(tmp_path)]
    assert run(MODEL, "coprompt", words) == 2
    assert "has no sentences about aquatic, bug" in capsys.readouterr().err
