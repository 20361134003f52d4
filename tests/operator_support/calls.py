"""Random calls of torch's operators: arguments that fit, and the same with something wrong.

``python -m operator_support.calls SEED CALLS NAME...`` makes them, and writes each name before its calls: where the
process dies, the last name says which operator ended it. What an operator raises is of no interest.
"""

import operator
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.lowering.file_guards import guard
from srigl_fx.lowering.file_operators import GUARDED

_MEMORY = 3 << 30  # bytes that calls may take beside what torch itself does
_SIZES = (0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 8, 17)
_WHOLE = (-(2**63), -(2**31), -100, -7, -3, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 8, 100, 2**31, 2**40, 2**63 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-5, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
_DTYPES = (
    *(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_WORDS = [
    *("none", "floor", "trunc", "tanh", "constant", "reflect", "replicate", "circular", "ij", "xy", "same", "valid"),
    *("sum", "amax", "mean", "prod", "fro", "nuc", "left", "right", "ij,jk->ik", "...i,i->...", ""),
]


class Calls:
    """Random arguments; the same for the same seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dims = [1, 2, 3, 4]
        self.dtype = torch.float32

    def start(self) -> None:
        """Draw what the tensors of one call have in common."""
        self.dims = self.random.choices(_SIZES, k=3)
        self.dtype = self.random.choice(_DTYPES)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, high: int = 0) -> Tensor:
        """A tensor of this shape, of numbers below ``high`` where that is given."""
        if high > 0:
            return torch.randint(0, high, shape, generator=self.torch).to(dtype)
        if dtype.is_floating_point or dtype.is_complex:
            drawn = torch.randn(*shape, generator=self.torch, dtype=torch.float32)
            if self.random.random() < 0.1 and drawn.numel():
                drawn.view(-1)[self.random.randrange(drawn.numel())] = self.random.choice(_FLOATS)
            return drawn.to(dtype)
        if dtype is torch.bool:
            return torch.rand(*shape, generator=self.torch) < 0.5
        drawn = torch.randint(-3, 9, shape, generator=self.torch)
        if self.random.random() < 0.3 and drawn.numel():
            limits = torch.iinfo(dtype)
            drawn.view(-1)[self.random.randrange(drawn.numel())] = self.random.choice((limits.min, limits.max, -1, 0))
        return drawn.to(dtype)

    def any_tensor(self) -> Tensor:
        shape = [self.random.choice(self.dims) for _ in range(self.random.choice((0, 1, 1, 2, 2, 3, 3, 4, 5)))]
        dtype = self.dtype if self.random.random() < 0.8 else self.random.choice(_DTYPES)
        return self._strided(self.tensor(*shape, dtype=dtype))

    def _strided(self, t: Tensor) -> Tensor:
        kind = self.random.random()
        if kind < 0.1 and t.dim() > 1:
            return t.transpose(0, -1)
        if kind < 0.2 and t.dim():
            return torch.cat([t, t], -1)[..., ::2]
        if kind < 0.25 and t.dim() and t.shape[0]:
            return t[:1].expand_as(t)
        return t

    def whole(self) -> int:
        return self.random.choice(_WHOLE)

    def value(self, kind: str, name: str) -> Any:
        """A value for an argument of this type (as a schema writes it) and name."""
        if name == "dtype":
            return self.random.choice((None, *_DTYPES))
        if name in ("layout", "device", "pin_memory", "memory_format"):
            return None
        if kind.startswith("Optional["):
            return None if self.random.random() < 0.3 else self.value(kind[9:-1], name)
        if kind.startswith("List["):
            return [self.value(kind[5:-1], name) for _ in range(self.random.choice((0, 1, 1, 2, 2, 3, 3, 4)))]
        if kind == "Tensor":
            return self.any_tensor()
        if kind == "number":
            return self.random.choice((self.whole(), self.random.choice(_FLOATS), True))
        if kind in ("int", "SymInt"):
            return self.whole()
        if kind == "float":
            return self.random.choice(_FLOATS)
        if kind == "bool":
            return self.random.random() < 0.5
        if kind == "str":
            return self.random.choice(_WORDS)
        raise NotImplementedError(f"{name}: {kind}")

    def changed(self, value: Any, kind: str, name: str) -> Any:
        """Something near ``value``, or something else."""
        chance = self.random.random()
        if isinstance(value, Tensor) and chance < 0.85:
            if chance < 0.2:
                return value.to(self.random.choice(_DTYPES))
            if chance < 0.3 and not value.is_floating_point() and value.numel():
                value = value.clone()
                value.view(-1)[self.random.randrange(value.numel())] = self.random.choice((-1, 100, -(2**31), 2**31))
                return value
            if value.dim() and chance < 0.6:
                axis = self.random.randrange(value.dim())
                kept = self.random.choice((0, 1, max(0, value.shape[axis] - 1)))
                return value.narrow(axis, 0, min(kept, value.shape[axis]))
            if value.dim() and chance < 0.7:
                return torch.cat([value, value], self.random.randrange(value.dim()))
            if chance < 0.75:
                return value[None]
            return value[0] if value.dim() and value.shape[0] else self._strided(value)
        if isinstance(value, list) and chance < 0.8:
            value = list(value)
            if value and chance < 0.3:
                value.pop(self.random.randrange(len(value)))
            elif value and chance < 0.7:
                place = self.random.randrange(len(value))
                inner = kind.removeprefix("Optional[").removeprefix("List[").rstrip("]")
                value[place] = self.changed(value[place], inner, name)
            else:
                value += value[:1]
            return value
        if isinstance(value, int) and not isinstance(value, bool) and chance < 0.6:
            return value + self.random.choice((-2, -1, 1, 2))
        return self.value(kind, name)


Arguments = tuple[list[Any], dict[str, Any]]


def call(calls: Calls, name: str) -> Arguments:
    """Arguments for the operator: random ones, or ones that fit with none, one or two of them changed."""
    calls.start()
    schema = overload(name)._schema
    fitting = FITTING.get(name.partition(".")[0])
    if fitting is None or calls.random.random() < 0.1:
        values = [calls.value(str(argument.type), argument.name) for argument in schema.arguments]
    else:
        made = fitting(calls, len(schema.arguments))
        given = list(made[: len(schema.arguments)])
        values = given + [argument.default_value for argument in schema.arguments[len(given) :]]
        for _ in range(calls.random.choice((0, 1, 1, 1, 2, 2, 3))):
            place = calls.random.randrange(len(values))
            argument = schema.arguments[place]
            values[place] = calls.changed(values[place], str(argument.type), argument.name)
    positional = [value for value, argument in zip(values, schema.arguments, strict=True) if not argument.kwarg_only]
    named = {
        argument.name: value
        for value, argument in zip(values, schema.arguments, strict=True)
        if argument.kwarg_only and value is not None
    }
    return positional, named


def as_in_a_file(name: str) -> Callable[..., Any]:
    """The operator as a graph from a file calls it, where tensors are results of other nodes."""
    if f"aten.{name}" not in GUARDED:
        run: Callable[..., Any] = overload(name)
        return run

    def guarded(*given: Any, **named: Any) -> Any:
        graph, tensors = fx.Graph(), []

        def node_for(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                return graph.placeholder(f"x{len(tensors)}")
            return [node_for(item) for item in value] if isinstance(value, list) else value

        arguments = tuple(map(node_for, given)), {key: node_for(value) for key, value in named.items()}
        result = graph.call_function(overload(name), *arguments)
        several = len(overload(name)._schema.returns) > 1
        graph.output(graph.call_function(operator.getitem, (result, 0)) if several else result)
        guard(graph, lambda attribute: tensors[int(attribute)])
        return fx.GraphModule({}, graph)(*tensors)

    return guarded


def overload(name: str) -> Any:
    """An operator of aten by its name and overload."""
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), which)


def _convolution(rank: int, transposed: bool, whole: bool = False) -> Callable[[Calls, int], list[Any]]:
    def make(c: Calls, _: int) -> list[Any]:
        groups = c.random.choice((1, 1, 2))
        inner, outer, taps = (
            groups * c.random.choice((1, 2, 3)),
            groups * c.random.choice((1, 2)),
            c.random.randint(1, 3),
        )
        x = c.tensor(c.random.choice((0, 1, 2)), inner, *[c.random.randint(3, 7) for _ in range(rank)])
        flip = transposed if not whole else c.random.random() < 0.5
        shape = (inner, outer // groups) if flip else (outer, inner // groups)
        w, b = c.tensor(*shape, *[taps] * rank), c.random.choice((None, c.tensor(outer)))
        steps = [c.random.choice((1, 1, 2)) for _ in range(rank)]
        if whole:
            return [x, w, b, steps, [1] * rank, [1] * rank, flip, [0] * rank, groups]
        if transposed:
            return [x, w, b, steps, [1] * rank, [0] * rank, groups, [1] * rank]
        return [x, w, b, steps, [1] * rank, [1] * rank, groups]

    return make


def _pooling(rank: int, adaptive: bool) -> Callable[[Calls, int], list[Any]]:
    def make(c: Calls, _: int) -> list[Any]:
        lead = c.random.choice(((2,), (1, 3), (0, 2)))
        x = c.tensor(*lead, *[c.random.randint(3, 9) for _ in range(rank)])
        if adaptive:
            return [x, [c.random.randint(1, 4) for _ in range(rank)]]
        taps = c.random.randint(1, 3)
        return [x, [taps] * rank, [c.random.randint(1, 2)] * rank, [taps // 2] * rank]

    return make


def _recurrent(gates: int, cell: bool) -> Callable[[Calls, int], list[Any]]:
    def make(c: Calls, _: int) -> list[Any]:
        layers, both = c.random.choice(((1, False), (2, False), (1, True), (2, True)))
        size, hidden, batch, steps = 3, 4, c.random.choice((1, 2)), c.random.choice((1, 3))
        if cell:
            state: Any = c.tensor(batch, hidden)
            weights = [c.tensor(gates * hidden, n) for n in (size, hidden)] + [c.tensor(gates * hidden) for _ in "ih"]
            return [c.tensor(batch, size), [state, state.clone()] if gates == 4 else state, *weights]
        ways, weights = 2 if both else 1, []
        for layer in range(layers):
            for _ in range(ways):
                width = size if layer == 0 else hidden * ways
                weights += [c.tensor(gates * hidden, width), c.tensor(gates * hidden, hidden)]
                weights += [c.tensor(gates * hidden), c.tensor(gates * hidden)]
        state = c.tensor(layers * ways, batch, hidden)
        x = c.tensor(batch, steps, size)
        return [x, [state, state.clone()] if gates == 4 else state, weights, True, layers, 0.0, False, both, True]

    return make


def _resize(rank: int) -> Callable[[Calls, int], list[Any]]:
    def make(c: Calls, count: int) -> list[Any]:
        x, size = c.tensor(2, 3, *[c.random.randint(1, 6) for _ in range(rank)]), [c.random.randint(1, 8)] * rank
        corners = [] if count == 3 or count == 2 + rank else [c.random.random() < 0.5]
        return [x, size, *corners]

    return make


def _index(*shape: int) -> Callable[[Calls], Tensor]:
    return lambda c: c.tensor(*shape, dtype=torch.int64, high=3)


def _padding(rank: int) -> Callable[[Calls, int], list[Any]]:
    return lambda c, _: [c.tensor(2, 2, *[5] * rank), [c.random.randint(-1, 3) for _ in range(2 * rank)]]


def _norm(c: Calls, _: int) -> list[Any]:
    return [
        c.tensor(2, 4, 3),
        c.tensor(4),
        c.tensor(4),
        c.tensor(4),
        c.tensor(4).abs(),
        c.random.random() < 0.3,
        0.1,
        1e-5,
        False,
    ]


def _attention(c: Calls, _: int) -> list[Any]:
    heads, length, size = c.random.choice((1, 4)), c.random.randint(1, 5), c.random.choice((2, 8))
    q, k, v = (c.tensor(2, heads, length, size) for _ in "qkv")
    mask = c.random.choice((None, c.tensor(length, length), c.tensor(2, 1, length, length, dtype=torch.bool)))
    return [q, k, v, mask, 0.0, mask is None and c.random.random() < 0.5]


def _bags(c: Calls, _: int) -> list[Any]:
    count, bags, last = c.random.randint(0, 6), c.random.randint(1, 4), c.random.random() < 0.4
    starts = sorted(c.random.randint(0, count) for _ in range(bags - 1))
    offsets = torch.tensor([0, *starts, *([count] if last else [])])
    indices, weighted = c.tensor(count, dtype=torch.int64, high=5), c.random.random() < 0.3
    kinds = torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16
    table = c.tensor(5, c.random.choice((1, 4, 16)), dtype=c.random.choice(kinds))
    each = c.tensor(count).to(table.dtype) if weighted else None
    padding = c.random.choice((None, 0, 4, -1))
    return [table, indices, offsets, False, 0 if weighted else c.random.randint(0, 2), False, each, last, padding]


# Arguments that fit, for operators that random ones hardly ever get past the first check of.
FITTING: dict[str, Callable[[Calls, int], list[Any]]] = {
    **{f"conv{rank}d": _convolution(rank, False) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _convolution(rank, True) for rank in (1, 2, 3)},
    "convolution": lambda c, n: _convolution(c.random.randint(1, 3), False, whole=True)(c, n),
    **{f"{kind}_pool{rank}d": _pooling(rank, False) for rank in (1, 2, 3) for kind in ("avg", "max")},
    **{f"max_pool{rank}d_with_indices": _pooling(rank, False) for rank in (2, 3)},
    **{f"adaptive_{kind}_pool{rank}d": _pooling(rank, True) for rank in (1, 2, 3) for kind in ("avg", "max")},
    **{name: _recurrent(gates, False) for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))},
    **{f"{name}_cell": _recurrent(g, True) for name, g in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1))},
    **{f"upsample_{kind}1d": _resize(1) for kind in ("nearest", "linear")},
    **{f"upsample_{kind}2d": _resize(2) for kind in ("nearest", "bilinear", "bicubic")},
    **{f"upsample_{kind}3d": _resize(3) for kind in ("nearest", "trilinear")},
    **{f"{kind}_pad{rank}d": _padding(rank) for rank in (1, 2, 3) for kind in ("reflection", "replication")},
    "pad": lambda c, _: [c.tensor(2, 2, 5, 5), [1, 1, 2, 0][: c.random.choice((2, 4))], c.random.choice(_WORDS[4:8])],
    "constant_pad_nd": lambda c, _: [c.tensor(2, 3), [1, 1, -1, 2]],
    "batch_norm": _norm,
    "instance_norm": _norm,
    "group_norm": lambda c, _: [c.tensor(2, 4, 3), 2, c.tensor(4), c.tensor(4)],
    "native_group_norm": lambda c, _: [c.tensor(2, 4, 3), c.tensor(4), c.tensor(4), 2, 4, 3, 2, 1e-5],
    "layer_norm": lambda c, _: [c.tensor(2, 3, 4), [3, 4], c.tensor(3, 4), c.tensor(3, 4)],
    "native_layer_norm": lambda c, _: [c.tensor(2, 3, 4), [3, 4], c.tensor(3, 4), c.tensor(3, 4), 1e-5],
    "rms_norm": lambda c, _: [c.tensor(2, 3, 4), [4], c.tensor(4)],
    "linear": lambda c, _: [c.tensor(2, 3, 4), c.tensor(5, 4), c.random.choice((None, c.tensor(5)))],
    "bilinear": lambda c, _: [c.tensor(2, 3), c.tensor(2, 4), c.tensor(5, 3, 4), c.tensor(5)],
    "addmm": lambda c, _: [c.tensor(2, 4), c.tensor(2, 3), c.tensor(3, 4)],
    "addmv": lambda c, _: [c.tensor(2), c.tensor(2, 3), c.tensor(3)],
    "addbmm": lambda c, _: [c.tensor(3, 5), c.tensor(2, 3, 4), c.tensor(2, 4, 5)],
    "baddbmm": lambda c, _: [c.tensor(2, 3, 5), c.tensor(2, 3, 4), c.tensor(2, 4, 5)],
    "bmm": lambda c, _: [c.tensor(2, 3, 4), c.tensor(2, 4, 5)],
    "mm": lambda c, _: [c.tensor(3, 4), c.tensor(4, 5)],
    "mv": lambda c, _: [c.tensor(3, 4), c.tensor(4)],
    "matmul": lambda c, _: [c.tensor(2, 3, 4), c.tensor(4, 5)],
    "dot": lambda c, _: [c.tensor(5), c.tensor(5)],
    "outer": lambda c, _: [c.tensor(3), c.tensor(5)],
    "tensordot": lambda c, _: [c.tensor(2, 3, 4), c.tensor(3, 4, 5), [1, 2], [0, 1]],
    "einsum": lambda c, _: [c.random.choice(_WORDS[-3:]), [c.tensor(3, 4), c.tensor(4, 5)]],
    "embedding": lambda c, _: [c.tensor(5, 4), c.tensor(2, 3, dtype=torch.int64, high=5), c.random.choice((-1, 0))],
    "embedding_bag": _bags,
    "scaled_dot_product_attention": _attention,
    "grid_sampler": lambda c, _: [
        c.tensor(2, 3, 4, 5),
        c.tensor(2, 3, 3, 2),
        c.random.randint(0, 2),
        c.random.randint(0, 2),
        True,
    ],
    "grid_sampler_2d": lambda c, _: [
        c.tensor(2, 3, 4, 5),
        c.tensor(2, 3, 3, 2),
        c.random.randint(0, 2),
        c.random.randint(0, 2),
        True,
    ],
    "affine_grid_generator": lambda c, _: [c.tensor(2, 2, 3), [2, 3, 4, 5], True],
    "im2col": lambda c, _: [c.tensor(2, 3, 6, 6), [2, 2], [1, 1], [0, 0], [2, 2]],
    "col2im": lambda c, _: [c.tensor(2, 12, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2]],
    "gather": lambda c, _: [c.tensor(3, 4), c.random.randint(0, 1), _index(3, 3)(c)],
    "take_along_dim": lambda c, _: [c.tensor(3, 4), _index(3, 2)(c), 1],
    "index_select": lambda c, _: [c.tensor(3, 4), 0, _index(5)(c)],
    "index": lambda c, _: [
        c.tensor(3, 4, 3),
        c.random.choice(([_index(2)(c)], [None, _index(2, 2)(c)], [_index(2)(c)] * 2)),
    ],
    "index_put": lambda c, _: [c.tensor(3, 4), [_index(2)(c)], c.tensor(2, 4), c.random.random() < 0.5],
    "index_add": lambda c, _: [c.tensor(3, 4), 0, _index(2)(c), c.tensor(2, 4)],
    "index_copy": lambda c, _: [c.tensor(3, 4), 0, _index(2)(c), c.tensor(2, 4)],
    "scatter": lambda c, _: [c.tensor(3, 4), 0, _index(2, 4)(c), c.tensor(2, 4)],
    "scatter_add": lambda c, _: [c.tensor(3, 4), 0, _index(2, 4)(c), c.tensor(2, 4)],
    "scatter_reduce": lambda c, _: [
        c.tensor(3, 4),
        0,
        _index(2, 4)(c),
        c.tensor(2, 4),
        c.random.choice(("sum", "amax", "prod")),
    ],
    "masked_select": lambda c, _: [c.tensor(3, 4), c.tensor(3, 4, dtype=torch.bool)],
    "masked_scatter": lambda c, _: [
        c.tensor(3, 4),
        c.tensor(3, 4, dtype=torch.bool),
        c.tensor(c.random.randint(0, 14)),
    ],
    "masked_fill": lambda c, _: [c.tensor(3, 4), c.tensor(3, 4, dtype=torch.bool), 1.0],
    "where": lambda c, _: [c.tensor(3, 4, dtype=torch.bool), c.tensor(3, 4), c.tensor(4)],
    "searchsorted": lambda c, _: [c.tensor(3, 4).sort(-1).values, c.tensor(3, 2)],
    "bucketize": lambda c, _: [c.tensor(3, 4), c.tensor(5).sort().values],
    "select_scatter": lambda c, _: [c.tensor(3, 4), c.tensor(4), 0, 1],
    "slice_scatter": lambda c, _: [c.tensor(5, 4), c.tensor(2, 4), 0, 1, 3],
    "diagonal": lambda c, _: [c.tensor(3, 4, 5), c.random.randint(-4, 4), 0, 2],
    "unfold": lambda c, _: [c.tensor(3, 7), 1, 3, 2],
    "channel_shuffle": lambda c, _: [c.tensor(2, 4, 3, 3), 2],
    "pixel_shuffle": lambda c, _: [c.tensor(2, 8, 3, 3), 2],
    "pixel_unshuffle": lambda c, _: [c.tensor(2, 2, 4, 4), 2],
    "topk": lambda c, _: [c.tensor(3, 5), 2],
    "sort": lambda c, _: [c.tensor(3, 5)],
    "repeat_interleave": lambda c, _: [c.tensor(4, 3), c.tensor(4, dtype=torch.int64, high=4), 0],
    "narrow": lambda c, _: [c.tensor(4, 3), 0, 1, 2],
    "reshape": lambda c, _: [c.tensor(4, 3), [2, 6]],
    "view": lambda c, _: [c.tensor(4, 3), [2, 6]],
    "permute": lambda c, _: [c.tensor(4, 3, 2), [2, 0, 1]],
    "split_with_sizes": lambda c, _: [c.tensor(5, 3), [2, 3], 0],
    "cat": lambda c, _: [[c.tensor(2, 3), c.tensor(4, 3)], 0],
    "stack": lambda c, _: [[c.tensor(2, 3), c.tensor(2, 3)], 0],
    "concat": lambda c, _: [[c.tensor(2, 3), c.tensor(4, 3)], 0],
    "histc": lambda c, _: [c.tensor(20), c.random.randint(1, 9), -1, 2],
    "bincount": lambda c, _: [c.tensor(8, dtype=torch.int64, high=6), c.tensor(8), 4],
    "one_hot": lambda c, _: [c.tensor(8, dtype=torch.int64, high=6), 6],
    "native_dropout": lambda c, _: [c.tensor(3, 4), 0.5, c.random.random() < 0.5],
    "dropout": lambda c, _: [c.tensor(3, 4), 0.5, c.random.random() < 0.5],
    "feature_dropout": lambda c, _: [c.tensor(3, 4, 2), 0.5, c.random.random() < 0.5],
    "cosine_similarity": lambda c, _: [c.tensor(3, 4), c.tensor(3, 4)],
}


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(seed: str, count: int, names: list[str]) -> None:
    """Make ``count`` random calls of each operator."""
    torch.set_num_threads(1)
    _limit_memory()
    for name in names:
        print(name, flush=True)
        calls = Calls(f"{seed} {name}")
        run = as_in_a_file(name)
        done = 0
        for _ in range(count):
            try:
                given, named = call(calls, name)
                with torch.no_grad():
                    made = run(*given, **named)
                # Whatever came out must be there to be read.
                for tensor in made if isinstance(made, tuple | list) else [made]:
                    if isinstance(tensor, Tensor) and 0 < tensor.numel() < 1 << 20:
                        tensor.clone().view(-1)[-1].item()
                done += 1
            except Exception:
                continue
        if "-v" in sys.argv:
            print("   ", done, "of", count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [name for name in sys.argv[3:] if name != "-v"])
