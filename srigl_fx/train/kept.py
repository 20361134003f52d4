"""One masked weight as what it keeps: positions, values, and the optimizer's state of them.

Owns :class:`KeptWeight` and how dense tensors become kept ones and back. It must not know layers, trainers or when the
optimizer steps.

The tensor that the optimizer steps has room for the most weights that were ever kept. The number of kept weights
changes from one update to the next (ablation, gradual pruning), but a compiled step expects the very tensor objects,
and the shapes, that it was compiled with. Entries beyond the kept weights are zero and stay zero, as only optimizers
that work element by element step this tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srigl_fx.masks.records import SparseWeight
from srigl_fx.train.young import Condensed

if TYPE_CHECKING:
    from srigl_fx.runtime.cpu.training_products import Pattern

_ROOM = 16  # one part in so many is added where more are kept than there was room for
_WASTE = 2  # how many times as much as is needed is given back

State = dict[str, Any]


def _uses(tensor: Tensor) -> int:
    """How many hold the tensor's memory; some releases of PyTorch count the question itself, some do not."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_FREE = _uses(torch.empty(1))  # of memory that nobody else holds


@dataclass(eq=False)
class KeptWeight:
    """One masked weight, as what it keeps.

    Attributes:
        handle: Where weight and mask are found.
        linear: Whether its layer computes with it here.
        pattern: Its pattern, for those.
        positions: int64, where the kept values are in the flat parameter.
        stepped: The kept values, and zeros behind them, as a parameter that the optimizer steps.
        state: The optimizer's state of ``stepped``; empty while it is that of the dense parameter.
        fresh: What that state holds off the mask.
    """

    handle: SparseWeight
    linear: bool
    pattern: "Pattern | None" = None
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    stepped: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.empty(0)))
    state: State = field(default_factory=dict)
    fresh: Mapping[str, float] = field(default_factory=dict)
    _room: int = 0
    _last: State = field(default_factory=dict)
    _mask: Tensor | None = None
    _mask_version: int = -1
    _buffer: Tensor | None = None
    _buffer_version: int = -1

    @property
    def values(self) -> Tensor:
        """The kept values, (n,)."""
        return self.stepped.detach()[: len(self.positions)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the mask and the parameter, if somebody changed them."""
        weight, mask = self.handle.weight, self.handle.mask
        if mask is not self._mask or mask._version != self._mask_version:
            self._follow(mask)
        values = weight.detach().reshape(-1).index_select(0, self.positions)
        if self._room != len(self.stepped) or values.dtype != self.stepped.dtype:
            self.stepped = nn.Parameter(self._padded(values))
        elif not _same_bits(values, self.values):  # written only then: a backward may still need them
            self.values.copy_(values)

    def _follow(self, mask: Tensor) -> None:
        state = self._dense_state(mask.shape)
        if self.linear:
            from srigl_fx.runtime.cpu.training_products import Pattern

            site = self.handle.record.site
            rows, columns = site.matrix_shape
            self.pattern = Pattern.of_mask(site.to_matrix(mask))
            self.positions = self.pattern.positions
            if site.kind == "linear_in_out":
                self.positions = self.positions % columns * rows + self.positions // columns
        else:
            self.positions = mask.reshape(-1).nonzero().squeeze(1)
        self._make_room()
        self.state = self._kept_state(state, mask.shape)
        self._buffer = None
        self._mask, self._mask_version = mask, mask._version

    def _make_room(self) -> None:
        count = len(self.positions)
        if not count <= self._room <= _WASTE * count:
            self._room = count + (count // _ROOM if self._room else 0)
        if self._room == len(self.stepped):
            self.stepped.detach()[count:] = 0.0

    def _padded(self, kept: Tensor, fill: float = 0.0) -> Tensor:
        spare = self._room - len(kept)
        return nn.functional.pad(kept, (0, spare), value=fill) if spare else kept

    @torch.no_grad()
    def write_back(self) -> None:
        """Write the values into the parameter."""
        self.handle.weight.detach().view(-1).index_copy_(0, self.positions, self.values)

    def dense_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient of the values as one of the parameter, zero off the mask.

        It lies in memory that is written again at the next step, unless somebody still looks at it.
        """
        buffer = self._buffer
        in_use = buffer is None or _uses(buffer) > _FREE
        if buffer is None or in_use or buffer._version != self._buffer_version:
            buffer = torch.zeros(self._mask.shape if self._mask is not None else 0, dtype=gradient.dtype)
        buffer.view(-1).index_copy_(0, self.positions, gradient)
        self._buffer, self._buffer_version = buffer, buffer._version
        return buffer.detach()

    def is_kept(self, grad: Tensor) -> bool:
        """Whether ``grad`` is the last :meth:`dense_gradient`, unchanged."""
        buffer = self._buffer
        return buffer is not None and grad.data_ptr() == buffer.data_ptr() and grad._version == self._buffer_version

    def kept_gradient(self, grad: Tensor) -> Tensor:
        """The parameter's gradient at the kept values, as one of ``stepped``."""
        return self._padded(grad.reshape(-1).index_select(0, self.positions))

    def condensed(self) -> Condensed | None:
        """The optimizer's state, while it is kept here."""
        return Condensed(self.state, self.positions) if self.state else None

    def take_state(self, dense: State) -> None:
        """Take the optimizer's state of the parameter over."""
        self.state = self._kept_state(dense, self.handle.mask.shape)

    def give_state(self) -> State:
        """The optimizer's state of the parameter, which is then no longer kept here."""
        state, self.state = self._dense_state(self.handle.mask.shape), {}
        return state

    def _kept_state(self, dense: State, shape: torch.Size) -> State:
        return {name: self._keep(name, value) if _is_like(value, shape) else value for name, value in dense.items()}

    def _keep(self, name: str, value: Tensor) -> Tensor:
        kept = self._padded(value.reshape(-1).index_select(0, self.positions), self.fresh.get(name, 0.0))
        last = self._last.get(name)
        if isinstance(last, Tensor) and (last.shape, last.dtype) == (kept.shape, kept.dtype):
            return last.copy_(kept)
        return kept

    def _dense_state(self, shape: torch.Size) -> State:
        self._last = self.state or self._last
        return {
            name: value.new_full((shape.numel(),), self.fresh.get(name, 0.0))
            .index_copy_(0, self.positions, value[: len(self.positions)])
            .reshape(shape)
            if _is_like(value, self.stepped.shape)
            else value
            for name, value in self.state.items()
        }


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[one.element_size()]
    return torch.equal(one.view(integer), other.detach().view(integer))


def _is_like(value: object, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape
