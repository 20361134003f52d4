"""A run leaves a model's buffers and attributes as they were, however it writes them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from srigl_fx.nn.model_state import restored


class Keeper(nn.Module):
    """A module with state of every kind, and a forward that is given."""

    def __init__(self, write: Callable[["Keeper", Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.h: Tensor
        self.register_buffer("h", torch.ones(1, 4))
        self.register_buffer("local", torch.tensor([float("nan")]), persistent=False)
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
        self.register_buffer("empty", None)
        self.plain = torch.zeros(1, 4)
        self.calls = 0
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return x


def replaced_entry(m: Keeper, x: Tensor) -> None:
    m._buffers["h"] = x


def assigned_data(m: Keeper, x: Tensor) -> None:
    m.h.data = x.clone()


def sliced(m: Keeper, x: Tensor) -> None:
    m.h[:, 1:3] = 0


BUFFER_WRITES: tuple[Callable[[Keeper, Tensor], object], ...] = (
    lambda m, x: m.h.copy_(x),
    lambda m, x: m.h.add_(1),
    lambda m, x: m.h.lerp_(x, 0.5),
    lambda m, x: m.h.index_put_((torch.tensor([0]),), x[0]),
    lambda m, x: setattr(m, "h", x),
    lambda m, x: m.register_buffer("h", x, persistent=False),
    lambda m, x: m.h.data.copy_(x),
    lambda m, x: m.h.detach().numpy().fill(7),
    replaced_entry,
    assigned_data,
    sliced,
)
OTHER_WRITES: tuple[Callable[[Keeper, Tensor], object], ...] = (
    lambda m, x: setattr(m, "calls", m.calls + 1),
    lambda m, x: setattr(m, "cache", x),
    lambda m, x: setattr(m, "plain", x),
    lambda m, x: m.plain.add_(1),
)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("write", [*BUFFER_WRITES, *OTHER_WRITES])
def test_everything_is_given_back(write: Callable[[Keeper, Tensor], object], copied: bool) -> None:
    model = Keeper(write)
    tensors, values = dict(model.named_buffers()), copy.deepcopy(dict(model.named_buffers()))
    names, plain, persistent = set(vars(model)), model.plain, set(model.state_dict())
    with restored(model, copied=copied) as state:
        model(torch.full((1, 4), 3.0))
        assert list(state.written()) == (["h"] if write in BUFFER_WRITES else [])
        assert bool(state.changed_attributes()) == (write in OTHER_WRITES)
    assert all(now is tensors[name] for name, now in model.named_buffers())
    assert all(torch.equal(now.nan_to_num(), values[name].nan_to_num()) for name, now in model.named_buffers())
    assert set(vars(model)) == names
    assert set(model.state_dict()) == persistent
    assert model.plain is plain
    assert torch.equal(plain, torch.zeros(1, 4))
    assert model.calls == 0
    assert model.cache is None


def test_an_error_gives_everything_back_too() -> None:
    def fail(m: Keeper, x: Tensor) -> None:
        m.h.zero_()
        m.calls = 5
        raise RuntimeError("half-way")

    model = Keeper(fail)
    with pytest.raises(RuntimeError, match="half-way"), restored(model):
        model(torch.ones(1, 4))
    assert torch.equal(model.h, torch.ones(1, 4))
    assert model.calls == 0


def test_a_write_of_another_type_or_size_is_told() -> None:
    model = Keeper(lambda m, x: setattr(m, "h", torch.zeros(2, 4, dtype=torch.float64)))
    with restored(model) as state:
        model(torch.ones(1, 4))
        assert state.written() == {"h": "float32 (1, 4) to float64 (2, 4)"}
