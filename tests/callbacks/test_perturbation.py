"""The contract: when a technique is active, what it draws, in which order it perturbs and restores, and its errors."""

from __future__ import annotations

import contextlib
import hashlib
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks.perturbation import SITES, Batch, Perturbation, batch_size, clip_groups, fold_seed, parameter_groups
from tests.callbacks.small import Learned, Net, Notes, images, trainer

# ---------------------------------------------------------------------- schedule


def steps_of(batches: int = 4, schedule: dict[str, Any] | None = None, **options: Any) -> list[tuple[int, int]]:
    """(epoch, batch) of the steps in which a technique with this schedule perturbed."""
    technique = Notes(**(schedule or {}))
    trainer(technique, **options).fit(Net(), images(batches))
    return technique.steps


def test_always_unless_said_otherwise() -> None:
    assert steps_of(max_epochs=2) == [(e, b) for e in range(2) for b in range(4)]


def test_start_epoch() -> None:
    assert steps_of(schedule={"start_epoch": 2}, max_epochs=4) == [(e, b) for e in (2, 3) for b in range(4)]


def test_every_n_steps_counts_optimizer_steps_over_epochs() -> None:
    # 4 steps an epoch: of steps 0..11 the multiples of 3
    assert steps_of(schedule={"every_n_steps": 3}, max_epochs=3) == [(0, 0), (0, 3), (1, 2), (2, 1)]


def test_every_n_steps_takes_all_micro_batches_of_a_step() -> None:
    found = steps_of(8, {"every_n_steps": 2}, accumulate_grad_batches=2)
    assert found == [(0, 0), (0, 1), (0, 4), (0, 5)]  # optimizer steps 0 and 2 of 0..3


def test_probability() -> None:
    assert steps_of(schedule={"probability": 0.0}) == []
    found = steps_of(200, {"probability": 0.3, "seed": 1})
    assert 60 - 4 * math.sqrt(42) < len(found) < 60 + 4 * math.sqrt(42)  # binomial, variance 200 * .3 * .7
    assert found == steps_of(200, {"probability": 0.3, "seed": 1})
    assert found != steps_of(200, {"probability": 0.3, "seed": 2})


def test_probability_is_decided_alike_on_all_ranks() -> None:
    first, second = Notes(probability=0.5, seed=3), Notes(probability=0.5, seed=3)
    second._rank = 1
    answers = []
    for technique in (first, second):
        runner = trainer(technique)
        answers.append([])
        for batch in range(64):
            technique._step = (0, batch)
            answers[-1].append(technique.active(runner))
    assert answers[0] == answers[1]
    assert 10 < sum(answers[0]) < 54


# ---------------------------------------------------------------------- draws


def placed(rank: int = 0, world: int = 1, step: tuple[int, int] = (0, 0), **settings: Any) -> Notes:
    technique = Notes(**{"seed": 1, **settings})
    technique._rank, technique._world, technique._step = rank, world, step
    return technique


def draw(technique: Perturbation, purpose: str = "noise", **options: Any) -> list[float]:
    return torch.rand(4, generator=technique.generator(purpose, **options)).tolist()


def test_draws_depend_on_seed_name_epoch_batch_purpose_and_rank_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    here = draw(placed())
    torch.manual_seed(2)  # the global stream has no part in it
    assert draw(placed()) == here
    others = [
        draw(placed(seed=2)),
        draw(placed(name="other")),
        draw(placed(step=(1, 0))),
        draw(placed(step=(0, 1))),
        draw(placed(), "angle"),
        draw(placed(rank=1)),
    ]
    assert len({tuple(row) for row in [here, *others]}) == 7


def test_shared_draws_are_alike_on_all_ranks() -> None:
    assert draw(placed(rank=0), shared=True) == draw(placed(rank=1), shared=True)
    assert draw(placed(rank=0), shared=True) != draw(placed(rank=0))


def test_without_a_seed_the_run_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert draw(placed(seed=None)) == draw(placed(seed=17))
    monkeypatch.setenv("PL_GLOBAL_SEED", "18")
    assert draw(placed(seed=None)) != draw(placed(seed=17))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert draw(placed(seed=None)) == draw(placed(seed=0))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_draws_for_examples_are_dealt_out_as_the_examples_are(kind: str) -> None:
    whole = getattr(placed(), kind)("noise", 6, 2)
    parts = [getattr(placed(rank=r, world=2), kind)("noise", 3, 2) for r in range(2)]
    assert whole.shape == (6, 2)
    # the example in row i of rank r is row 2 i + r of the batch of one process
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_normal_and_uniform_have_their_distributions() -> None:
    normal, uniform = placed().normal("a", 20_000), placed().uniform("a", 20_000)
    assert abs(normal.mean().item()) < 4 / math.sqrt(20_000)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert 0 <= uniform.min() and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 20_000))


def test_fold_seed_is_the_same_everywhere_and_tells_keys_apart() -> None:
    digest = hashlib.blake2b(b"0/mix_style/noise/3/14", digest_size=8).digest()
    assert fold_seed(0, "mix_style", "noise", 3, 14) == sum(b << 8 * i for i, b in enumerate(digest)) >> 1
    seeds = {fold_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------- order


class Data(Notes):
    site = "data"


class Weights(Notes):
    site = "weights"


class Features(Notes):
    site = "features"


def test_perturbed_by_site_then_list_and_restored_in_reverse() -> None:
    notes: list[Any] = []
    order = ["data", "notes", "zz", "features", "weights"]  # of one site: as in the list
    techniques = [Weights(notes), Notes(notes), Features(notes), Notes(notes, name="zz"), Data(notes)]
    trainer(*techniques, limit_train_batches=1).fit(Net(), images())
    assert notes == [("perturb", n) for n in order] + [("restore", n) for n in order[::-1]]


def test_sites_are_in_the_documented_order() -> None:
    assert SITES == ("data", "input", "features", "attention", "skips", "weights")


class AddToWeights(Perturbation):
    """Copies the weights, adds, and copies back: two of them are restored rightly only last in, first out."""

    site = "weights"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        self.saved = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)

    def restore(self, module: LightningModule) -> None:
        with torch.no_grad():
            for parameter, saved in zip(module.parameters(), self.saved, strict=True):
                parameter.copy_(saved)


def test_two_weight_perturbations_leave_the_plain_update_of_the_doubly_perturbed_gradient() -> None:
    perturbed, plain = Net(), Net()
    for net in (perturbed, plain):
        net.backbone[2].p = 0.0
        net.optimizer = "sgd"
    batch = next(iter(images()))
    with torch.no_grad():
        start = [p.clone() for p in plain.parameters()]
        for parameter in plain.parameters():
            parameter.add_(1.0).add_(1.0)
    gradients = torch.autograd.grad(plain.loss(batch), list(plain.parameters()))
    trainer(AddToWeights(), AddToWeights(name="second"), limit_train_batches=1).fit(perturbed, images())
    for parameter, before, gradient in zip(perturbed.parameters(), start, gradients, strict=True):
        wanted = before - 0.05 * (gradient + 0.01 * before)  # lr 0.1 times 0.5 of the schedule, weight decay 0.01
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- steps that don't go as planned


class Boom(Callback):
    """Fails in a hook of choice."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_: Any) -> None:
        raise RuntimeError("boom")


@pytest.mark.parametrize("hook", ["on_before_backward", "on_after_backward", "on_before_optimizer_step"])
def test_restored_where_the_step_fails(hook: str) -> None:
    net, notes = Net(), []  # type: ignore[var-annotated]
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        trainer(AddToWeights(), Notes(notes), AddToWeights(name="second"), Boom(hook)).fit(net, images())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert notes == [("perturb", "notes"), ("restore", "notes")]


class FailsHalfway(AddToWeights):
    def perturb(self, module: LightningModule, batch: Batch) -> None:
        super().perturb(module, batch)
        raise RuntimeError("boom")


def test_restored_where_perturbing_fails_halfway() -> None:
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        trainer(FailsHalfway()).fit(net, images())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


class FailsToRestore(Notes):
    def restore(self, module: LightningModule) -> None:
        raise RuntimeError("boom")


def test_the_others_are_restored_where_one_fails_to() -> None:
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="boom"):
        trainer(AddToWeights(), FailsToRestore()).fit(net, images())
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


class Hooks(Perturbation):
    """Hangs a hook on the network."""

    site = "features"

    def attach(self, module: LightningModule) -> None:
        self.handle = module.backbone[0].register_forward_hook(lambda *_: None)  # type: ignore[index,union-attr]

    def detach(self, module: LightningModule) -> None:
        self.handle.remove()

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_off_after_the_fit(fails: bool) -> None:
    net = Net()
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            trainer(Hooks(), Hooks(name="second"), Boom("on_before_backward")).fit(net, images())
    else:
        trainer(Hooks(), Hooks(name="second")).fit(net, images())
    assert not net.backbone[0]._forward_hooks


def test_restored_where_a_step_has_no_backward_pass() -> None:
    notes: list[Any] = []
    net = Net()
    net.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    trainer(Notes(notes), limit_train_batches=2).fit(net, images())
    assert notes == [("perturb", "notes"), ("restore", "notes")] * 2


def test_restored_where_the_module_skips_the_rest_of_the_epoch() -> None:
    notes: list[Any] = []
    net = Net()
    net.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 1 else None  # type: ignore[method-assign]
    trainer(Notes(notes), max_epochs=2).fit(net, images())
    assert notes == [("perturb", "notes"), ("restore", "notes")] * 4  # two batches of each epoch


def test_the_batch_of_the_next_epoch_is_clean() -> None:
    seen = []

    class Shift(Perturbation):
        def perturb(self, module: LightningModule, batch: Batch) -> None:
            seen.append(batch["image"].clone())
            batch["image"] = batch["image"] + 100

    class TheSameDict:
        batch = next(iter(images()))

        def __iter__(self) -> Any:
            return iter([self.batch])

    trainer(Shift(), max_epochs=2).fit(Net(), TheSameDict())
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_batch_gets_its_entries_back(fails: bool) -> None:
    batch = next(iter(images()))
    image, label = batch["image"], batch["label"]
    seen = []

    class Rewrites(Perturbation):
        def perturb(self, module: LightningModule, batch: Batch) -> None:
            batch["clean"] = batch["image"]
            batch["image"] = batch["image"] + 1

    class Looks(Callback):
        held: Any = None

        def on_train_batch_start(self, trainer: Any, module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.held = batch

        def on_before_backward(self, trainer: Any, module: LightningModule, loss: torch.Tensor) -> None:
            seen.append(dict(self.held))

    looks, more = Looks(), [Boom("on_after_backward")] if fails else []
    with pytest.raises(RuntimeError, match="boom") if fails else contextlib.nullcontext():
        trainer(Rewrites(), looks, *more, limit_train_batches=1).fit(Net(), images())
    assert torch.equal(seen[0]["image"], image + 1) and torch.equal(seen[0]["clean"], image)
    assert looks.held.keys() == {"image", "label"}
    assert torch.equal(looks.held["image"], image) and torch.equal(looks.held["label"], label)


# ---------------------------------------------------------------------- settings and errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, not 0"),
        ({"start_epoch": -1}, "start_epoch must not be negative, but is -1"),
        ({"probability": 1.5}, "probability must lie in [0, 1], not 1.5"),
        ({"probability": float("nan")}, "probability must lie in [0, 1], not nan"),
        ({"name": "my technique"}, "name must be letters, digits and '_', not 'my technique'"),
        ({"name": "a.b"}, "name must be letters, digits and '_', not 'a.b'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Notes(**settings)
    assert str(error.value) == message


def test_wrong_site() -> None:
    class Elsewhere(Notes):
        site = "elsewhere"

    with pytest.raises(ValueError, match="Elsewhere.site must be one of data, input, .* not 'elsewhere'"):
        Elsewhere()


def test_names_are_the_class_in_snake_case() -> None:
    def name(word: str) -> str:
        return type(word, (Notes,), {})().name

    assert [name(w) for w in ("MixStyle", "DSU", "EFDMix", "AdvStyle", "SAM2")] == [
        "mix_style", "dsu", "efd_mix", "adv_style", "sam2"
    ]  # fmt: skip
    assert Notes(name="other").name == "other"
    assert Notes().state_key != Notes(name="other").state_key


def test_two_of_one_name() -> None:
    with pytest.raises(ValueError, match="two techniques are named 'notes': give one of them another name"):
        trainer(Notes(), Notes()).fit(Net(), images())
    with pytest.raises(ValueError, match="two techniques are named 'data'"):
        trainer(Notes(name="data"), Data()).fit(Net(), images())


def test_batches_must_be_dicts() -> None:
    pairs = DataLoader(TensorDataset(torch.zeros(2, 1, 4, 4), torch.zeros(2).long()))
    with pytest.raises(ValueError, match="Notes needs batches that are dicts, not list"):
        trainer(Notes()).fit(Net(), pairs)


def test_perturb_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match=r"Perturbation must define perturb\(module, batch\)"):
        Perturbation().perturb(Net(), {})


def test_batch_size() -> None:
    assert batch_size({"name": ["a"], "image": torch.zeros(3, 2), "label": torch.zeros(3)}) == 3
    with pytest.raises(ValueError, match=r"the batch holds no tensor \(entries: name, id\)"):
        batch_size({"name": ["a"], "id": 3})


# ---------------------------------------------------------------------- groups of the optimizer


def test_parameter_groups() -> None:
    net = Net()
    for technique in (Learned(name="b"), Learned(name="a")):
        technique.attach(net)
    groups = parameter_groups(net, lr=0.3, weight_decay=0.2)
    assert [g["name"] for g in groups] == ["model", "perturbations.a", "perturbations.b"]
    assert [g["weight_decay"] for g in groups] == [0.2, 0.0, 0.0]
    assert [g["lr"] for g in groups] == [0.3] * 3
    assert [len(g["params"]) for g in groups] == [6, 1, 1]
    names = dict(net.named_parameters())
    for group in groups:
        assert [names[n] is p for n, p in zip(group["parameters"], group["params"], strict=True)] == [True] * len(
            group["params"]
        )
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert [g["name"] for g in parameter_groups(Net())] == ["model"]


def grouped(*gradients: list[float]) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(len(g)))]} for g in gradients]
    for group, gradient in zip(groups, gradients, strict=True):
        group["params"][0].grad = torch.tensor(gradient)
    return torch.optim.SGD(groups, 0.1)


def gradients(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    return [group["params"][0].grad.tolist() for group in optimizer.param_groups]


def test_clip_groups() -> None:
    # norms 5 and 100: each is scaled by its own
    optimizer = grouped([3.0, 4.0], [60.0, 80.0])
    clip_groups(optimizer, 1.0, "norm")
    assert gradients(optimizer) == [pytest.approx([0.6, 0.8]), pytest.approx([0.6, 0.8])]
    optimizer = grouped([3.0, 4.0], [0.3, 0.4])
    clip_groups(optimizer, 1.0)
    assert gradients(optimizer) == [pytest.approx([0.6, 0.8]), pytest.approx([0.3, 0.4])]  # below: as it is
    optimizer = grouped([3.0, -4.0], [0.3, 0.4])
    clip_groups(optimizer, 1.0, "value")
    assert gradients(optimizer) == [[1.0, -1.0], pytest.approx([0.3, 0.4])]
    for nothing in (None, 0.0):
        optimizer = grouped([3.0, 4.0])
        clip_groups(optimizer, nothing)
        assert gradients(optimizer) == [[3.0, 4.0]]
