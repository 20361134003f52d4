"""Models in what stands around them: every verb takes the model inside, or says which attribute to pass."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.train.flops import layer_costs

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
}


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.mark.long
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_verb_takes_a_wrapped_model(name: str, tmp_path: Path) -> None:
    wrapped = WRAPPERS[name](sx.sparsify(layers(), sparsity=0.5))
    optimizer = SGD(wrapped.parameters(), lr=0.1)
    trainer = sx.SRigL(wrapped, optimizer, update_every=2, total_steps=8)
    for _ in range(4):
        optimizer.zero_grad()
        torch.autograd.backward(wrapped(X).square().mean())
        optimizer.step()
    assert trainer.last_update == 4
    wrapped.eval()
    sx.verify(wrapped)
    assert len(sx.summary(wrapped).rows) == 2
    assert [cost.products for cost in layer_costs(wrapped, (X,)).values()] == [192, 48]
    with torch.no_grad():
        expected = wrapped(X)
    lowered = sx.lower(wrapped, (X,), min_speedup=0)
    assert lowered.report.capture == "torch.export, dynamic batch"
    assert [layer.fqn for layer in lowered.report.layers] == ["0.weight", "2.weight"]
    torch.testing.assert_close(lowered(X), expected, rtol=1e-4, atol=1e-5)
    report = sx.export_onnx(wrapped, tmp_path / "model.onnx", (X,), min_speedup=0)
    assert report.inputs == {"input": ("batch", 16)}
    trainer.detach()
    assert sx.finalize(wrapped) is wrapped
    torch.testing.assert_close(wrapped(X), expected)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_sparsified_inside_or_refused_with_the_attribute(name: str) -> None:
    wrapped = WRAPPERS[name](layers())
    if "DDP" in name:
        with pytest.raises(SparsifyError, match=r"sparsify its \.module"):
            sx.sparsify(wrapped, sparsity=0.5)
        assert not list(sx.masks.named_masks(wrapped))
    else:
        assert sx.sparsify(wrapped, sparsity=0.5) is wrapped
        assert len(list(sx.masks.named_masks(wrapped))) == 2


@pytest.mark.parametrize("name", ["compile", "DataParallel"])
def test_rules_have_the_names_of_the_model_inside(name: str) -> None:
    wrapped = WRAPPERS[name](layers())
    sx.sparsify(wrapped, sparsity=0.5, rules={"2": None})
    assert [site.rpartition("0.")[2] for site, _ in sx.masks.named_masks(wrapped)] == ["weight"]
