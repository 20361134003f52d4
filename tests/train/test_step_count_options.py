"""Steps counted for each weight under what torch's optimizers can be asked for: implementations, graphs, captures."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from train_support import batches, loss_of, mlp, train
from train_support.cohorts import Cohorts, both, follow, rmsprop

from srigl_fx import verify
from srigl_fx.errors import TrainerError
from srigl_fx.train import SRigL
from srigl_fx.train.first_steps import known_names

KNOWN = known_names().split(", ")


def _kind(name: str) -> Any:
    return getattr(torch.optim, name)


def _that_have(option: str) -> list[str]:
    return [name for name in KNOWN if option in inspect.signature(_kind(name)).parameters]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for option in ({"foreach": True}, {"foreach": False}, {"fused": True})
        for name in _that_have(next(iter(option)))
    ],
    ids=str,
)
def test_every_implementation(name: str, option: dict[str, bool]) -> None:
    options = {**option, **({"lr_decay": 0.1} if name == "Adagrad" else {}), "lr": 0.003}
    make, make_young = rmsprop(**options) if name == "RMSprop" else both(_kind(name), **options)
    model = mlp()
    optimizer = make(model.parameters())
    SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    assert follow(model, optimizer, Cohorts(model, make, make_young), batches(14)) > 60
    verify(model, optimizer)


def test_an_option_is_nobodys_that_torch_does_not_offer() -> None:
    """A new implementation of an optimizer is to be tried here."""
    seen = {"foreach", "fused", "capturable", "differentiable"}
    switches = {
        option
        for name in KNOWN
        for option, parameter in inspect.signature(_kind(name)).parameters.items()
        if isinstance(parameter.default, bool) or parameter.default is None
    }
    methods = {"amsgrad", "maximize", "decoupled_weight_decay", "centered", "nesterov", "weight_decay"}
    assert switches - methods == seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("name", _that_have("capturable"))
def test_capturable_in_a_compiled_step(name: str) -> None:
    """On a CPU, torch takes steps that are made for CUDA graphs where they are compiled; they count on the device."""
    models = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = _kind(name)(model.parameters(), lr=0.003, capturable=capturable)
        SRigL(model, optimizer, total_steps=60, update_every=3, step_count="weight")
        step = torch.compile(optimizer.step, backend="eager") if capturable else optimizer.step
        for x in batches(14):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            step()
        verify(model, optimizer)
        assert all(state["step"] == 14 for state in optimizer.state.values())
        models.append(model)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        # RAdam's rectification is computed in float32 then, and in Python's numbers else.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 if name == "RAdam" else 2e-6)


@pytest.mark.parametrize("name", _that_have("capturable"))
def test_capturable_that_torch_refuses_leaves_everything_as_it_was(name: str) -> None:
    model = mlp()
    optimizer = _kind(name)(model.parameters(), lr=0.003)
    trainer = SRigL(model, optimizer, total_steps=60, update_every=3, step_count="weight")
    train(model, optimizer, batches(7))
    before = _seen(model, trainer)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(AssertionError, match="capturable=True"):
        train(model, optimizer, batches(1))
    after = _seen(model, trainer)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert trainer.steps == 7
    optimizer.param_groups[0]["capturable"] = False
    train(model, optimizer, batches(5), check=lambda: verify(model, optimizer))


def _seen(model: torch.nn.Module, trainer: Any) -> list[Tensor]:
    young = [tensor for row in trainer.state_dict()["step_counts"] for tensor in row[1:]]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *young)]


@pytest.mark.parametrize("name", _that_have("differentiable"))
def test_steps_to_be_differentiated_are_refused(name: str) -> None:
    model = mlp()
    hooks = [len(parameter._backward_hooks or ()) for parameter in model.parameters()]
    groups = [{"params": [model[0].weight]}, {"params": [*model.parameters()][1:], "differentiable": True}]
    for parameters, weight in ((model.parameters(), "0.weight"), (groups, "2.weight")):
        optimizer: Optimizer = _kind(name)(parameters, **({"differentiable": True} if weight == "0.weight" else {}))
        with pytest.raises(
            TrainerError, match=rf'"weight" moves .*{name}\(differentiable=True\).* of its steps of {weight}'
        ):
            SRigL(model, optimizer, total_steps=60, step_count="weight")
    assert hooks == [len(parameter._backward_hooks or ()) for parameter in model.parameters()]
    SRigL(model, _kind(name)(model.parameters()), total_steps=60, step_count="weight")  # nothing was left behind
