"""Recurrent layers in a trace: their operators stay whole, and so may take sequences of any length.

Owns what torch computes for the shapes of their results meanwhile. It must not know who traces, nor what for.

A graph holds ``lstm`` and ``gru`` as one operator each. To find the shape of what they return, torch runs them step by
step all the same, and as many steps as the example has become a constant of the graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensor

aten = torch.ops.aten

RECURRENT: tuple[Any, ...] = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd, DispatchKey.Meta)


@contextmanager
def whole_recurrences() -> Iterator[None]:
    """Meanwhile, results of recurrent operators on fake tensors are told by their shapes; no two threads at once.

    Example:
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> layer = torch.nn.GRU(3, 4)
        >>> with whole_recurrences(), FakeTensorMode(allow_non_fake_inputs=True):
        ...     layer(torch.ones(5, 2, 3))[0].shape
        torch.Size([5, 2, 4])
    """
    kernels = [dict(operator.py_kernels) for operator in RECURRENT]
    tables = [decomposition_table.get(operator) for operator in RECURRENT]
    try:
        for operator in RECURRENT:
            for key in _KEYS:
                if key in operator.py_kernels:
                    operator.py_kernels[key] = _by_shape(operator.py_kernels[key])
            # The way of a size with a symbol, in those of torch's modes that come after the dispatcher.
            decomposition_table[operator] = _by_shape(operator.decompose)
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, kernel, table in zip(RECURRENT, kernels, tables, strict=True):
            operator.py_kernels.clear()
            operator.py_kernels.update(kernel)
            decomposition_table.pop(operator, None)
            if table is not None:
                decomposition_table[operator] = table
            operator._dispatch_cache.clear()


def _by_shape(step_by_step: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that tells shapes alone where there are no numbers; with numbers it computes."""

    def kernel(
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(x, FakeTensor):
            return step_by_step(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        outputs = x.new_empty((x.shape[0], x.shape[1], states[0].shape[-1] * (2 if bidirectional else 1)))
        return (outputs, *(state.new_empty(state.shape) for state in states))

    return kernel
