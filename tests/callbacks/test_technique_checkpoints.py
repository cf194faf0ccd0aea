"""Checkpoints open with and without the techniques they were trained with; the optimizer's state follows the names."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.exact_resume import ExactResume
from callbacks.perturbation import match_optimizer_groups, parameter_groups
from tests.callbacks.small import Learned, Net, Notes, images, trainer


def fit(net: Net, *techniques: Any, epochs: int, ckpt: Path | None = None) -> Any:
    runner = trainer(ExactResume(), *techniques, max_epochs=epochs)
    runner.fit(net, images(), ckpt_path=ckpt, weights_only=True)
    return runner


def saved(folder: Path, *techniques: Any, optimizer: str = "sgd", epochs: int = 1) -> tuple[Path, dict[str, Any]]:
    file = folder / "a.ckpt"
    fit(Net(optimizer), *techniques, epochs=epochs).save_checkpoint(file)
    return file, torch.load(file, weights_only=True)


def state_by_name(net: Net, runner: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each parameter, by the parameter's name."""
    optimizer = runner.optimizers[0]
    return {n: copy.deepcopy(dict(optimizer.state[p])) for n, p in net.named_parameters() if p in optimizer.state}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["b"]),
        (["b"], []),
        (["a", "b"], ["b"]),
        (["b"], ["a", "b", "c"]),
        (["a", "b"], ["b", "c"]),
        (["b"], ["b"]),
    ],
)
def test_resumes_with_other_techniques(before: list[str], after: list[str], optimizer: str, tmp_path: Path) -> None:
    """No further epoch is trained, so what is compared is what was loaded."""
    first = Net(optimizer)
    runner = fit(first, *(Learned(name=n) for n in before), epochs=1)
    file = tmp_path / "a.ckpt"
    runner.save_checkpoint(file)
    second = Net(optimizer)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    resumed = fit(second, *(Learned(name=n) for n in after), epochs=1, ckpt=file)
    old, new = first.state_dict(), second.state_dict()
    kept = [n for n in new if n in old]
    assert len(kept) == len(Net().state_dict()) + len(set(before) & set(after))
    assert all(torch.equal(old[n], new[n]) for n in kept)
    fresh = {f"perturbations.{n}.offset" for n in set(after) - set(before)}
    assert new.keys() - old.keys() == fresh
    assert all(new[n].item() == 0.5 for n in fresh)
    was, now = state_by_name(first, runner), state_by_name(second, resumed)
    assert now.keys() == set(kept) & was.keys()
    for name, state in now.items():
        assert state.keys() == was[name].keys()
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(was[name][k])) for k in state)
    groups = resumed.optimizers[0].param_groups
    assert [g["name"] for g in groups] == ["model", *(f"perturbations.{n}" for n in sorted(after))]
    held = {g["name"]: g for g in runner.optimizers[0].param_groups}["model"]
    assert [g["lr"] for g in groups] == [held["lr"]] * len(groups)
    assert [g["weight_decay"] for g in groups] == [0.01] + [0.0] * len(after)


@pytest.mark.parametrize(("before", "after"), [([], ["a"]), (["a"], []), (["a"], ["b"])])
def test_training_goes_on(before: list[str], after: list[str], tmp_path: Path) -> None:
    """With schedulers of several kinds: after every epoch the rate is that of a run that never changed."""
    file, _ = saved(tmp_path, *(Learned(name=n) for n in before))
    plain, net = Net(), Net()
    whole = fit(plain, epochs=4)
    resumed = fit(net, *(Learned(name=n) for n in after), epochs=4, ckpt=file)
    rate = whole.optimizers[0].param_groups[0]["lr"]
    assert [g["lr"] for g in resumed.optimizers[0].param_groups] == [rate] * (1 + len(after))
    assert resumed.current_epoch == 4
    for name in after:
        assert net.state_dict()[f"perturbations.{name}.offset"].item() != 0.5


def test_resumed_with_the_same_techniques_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    file, _ = saved(tmp_path, Learned(name="a"), Learned(name="b"), epochs=2)
    whole, net = Net(), Net()
    fit(whole, Learned(name="a"), Learned(name="b"), epochs=3)
    fit(net, Learned(name="a"), Learned(name="b"), epochs=3, ckpt=file)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))


def test_another_technique_changes_nothing_for_the_network(tmp_path: Path) -> None:
    """A technique that perturbs nothing is added at resume: the run is that of the network alone."""
    file, _ = saved(tmp_path, Learned(name="a", start_epoch=9), epochs=2)
    whole, net = Net(), Net()
    fit(whole, epochs=3)
    fit(net, Notes(), Learned(name="b", start_epoch=9), epochs=3, ckpt=file)
    alone = {n: p for n, p in net.named_parameters() if not n.startswith("perturbations.")}
    assert all(torch.equal(p, alone[n]) for n, p in whole.named_parameters())


def test_what_is_put_aside_and_what_starts_fresh_is_said_in_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, checkpoint = saved(tmp_path, Learned(name="a"), Learned(name="b"))
    net = Net()
    Learned(name="c").attach(net)
    with caplog.at_level(logging.INFO, "callbacks.perturbation"):
        net.load_state_dict(checkpoint["state_dict"])
    said = [r.getMessage() for r in caplog.records if r.name == "callbacks.perturbation"]
    assert said == [
        "perturbations.a, perturbations.b of the checkpoint put aside: not part of this run",
        "perturbations.c of the checkpoint starts fresh: not in the checkpoint",
    ]
    assert "perturbations.a.offset" in checkpoint["state_dict"], "the caller's dict was changed"


def test_a_missing_weight_of_the_network_is_still_an_error(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path, Learned())
    del checkpoint["state_dict"]["backbone.0.weight"]
    with pytest.raises(RuntimeError, match="backbone.0.weight"):
        Net().load_state_dict(checkpoint["state_dict"])


def test_loads_without_any_technique(tmp_path: Path) -> None:
    file, checkpoint = saved(tmp_path, Learned())
    net = Net.load_from_checkpoint(file, weights_only=True)
    assert torch.equal(net.backbone[0].weight, checkpoint["state_dict"]["backbone.0.weight"])


def matched(checkpoint: dict[str, Any], net: Net) -> dict[str, Any]:
    checkpoint = copy.deepcopy(checkpoint)
    match_optimizer_groups(net, checkpoint)
    return checkpoint


def test_matching_twice_is_matching_once(tmp_path: Path) -> None:
    """Every technique's hook does it."""
    _, checkpoint = saved(tmp_path, Learned(name="a"))
    net = Net()
    Learned(name="b").attach(net)
    once = matched(checkpoint, net)
    assert str(matched(once, net)) == str(once)
    assert str(once) != str(checkpoint)


def test_the_state_follows_the_name_not_the_place(tmp_path: Path) -> None:
    """The technique has other parameters than it had: those that are new start fresh."""
    _, checkpoint = saved(tmp_path, Learned(name="a"))
    momentum = checkpoint["optimizer_states"][0]["state"][6]["momentum_buffer"]
    net = Net()
    Learned(name="a").attach(net)
    own = net.perturbations["a"]  # type: ignore[index]
    offset = own.pop("offset")  # type: ignore[operator,union-attr]
    own["extra"] = torch.nn.Parameter(torch.zeros(3))  # type: ignore[index,operator]
    own["offset"] = offset  # type: ignore[index,operator]
    (state,) = matched(checkpoint, net)["optimizer_states"]
    assert [g["params"] for g in state["param_groups"]] == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert 6 not in state["state"] and torch.equal(state["state"][7]["momentum_buffer"], momentum)
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.1), momentum=0.9)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[net.perturbations["a"]["offset"]]["momentum_buffer"], momentum)  # type: ignore[index]


def test_groups_that_a_recipe_split_stay_as_they_are(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    (state,) = checkpoint["optimizer_states"]
    (model,) = state["param_groups"]
    split = [{**model, "params": [0, 1]}, {**model, "name": "head", "lr": 0.7, "params": [2, 3, 4, 5]}]
    state["param_groups"] = copy.deepcopy(split)
    checkpoint["lr_schedulers"] = [{"base_lrs": [1.0, 2.0], "milestones": [3, 4], "_last_lr": [5.0, 6.0]}]
    net = Net()
    Learned(name="a").attach(net)
    found = matched(checkpoint, net)
    groups = found["optimizer_states"][0]["param_groups"]
    assert groups[:2] == split
    assert (groups[2]["name"], groups[2]["params"], groups[2]["lr"]) == ("perturbations.a", [6], model["lr"])
    assert found["lr_schedulers"] == [{"base_lrs": [1.0, 2.0, 1.0], "milestones": [3, 4], "_last_lr": [5.0, 6.0, 5.0]}]


def test_optimizers_that_were_not_made_from_parameter_groups_are_left_alone() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net.loss(next(iter(images()))).backward()
    optimizer.step()
    Learned(name="a").attach(net)
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    assert str(matched(checkpoint, net)) == str(checkpoint)
    assert matched({}, net) == {}
