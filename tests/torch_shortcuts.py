"""What torch does again at each export although nothing has changed, done once in a process.

Owns the shortcuts, which leave what torch does as it is, and save the tests a quarter of their time. They are taken for
the torch that the tests are pinned to, whose code they know, and for no other.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """A block in which the shortcuts are taken."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.__version__.startswith("2.13."):
            _translations(patch)
            _operators(patch)
            _decompositions(patch)
        yield


def _translations(patch: pytest.MonkeyPatch) -> None:
    """torch.onnx parses its 500 translations at each export, which takes longer than all else that it does."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    made: Callable[..., Any] = functools.cache(registry.from_torchlib)

    def copied(*args: Any, **kwargs: Any) -> Any:
        found = copy.copy(made(*args, **kwargs))
        found.functions = {name: list(known) for name, known in found.functions.items()}  # an export adds to them
        return found

    patch.setattr(registry, "from_torchlib", staticmethod(copied))


def _operators(patch: pytest.MonkeyPatch) -> None:
    """For each namespace of operators, some thousand are asked for by name, to bring them into being."""
    from torch._export import utils

    patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))


def _decompositions(patch: pytest.MonkeyPatch) -> None:
    """``run_decompositions`` gives some thousand operators twenty kernels each, and takes them away at its end.

    The kernels of an operator are remembered with those that it had before, and are given again where it has these.
    """
    from torch._subclasses import fake_impls
    from torch.export import exported_program

    override, fakes = exported_program._override_composite_implicit_decomp, fake_impls.op_implementations_dict
    remembered: dict[Any, tuple[Mapping[Any, Any], Mapping[Any, Any], Any]] = {}

    def key(op: Any, kernel: Any) -> Any:
        """Names what an operator is given: its own decomposition is a new partial each time, of the same code."""
        return op, kernel.func.__code__ if isinstance(kernel, functools.partial) else kernel

    @contextlib.contextmanager
    def overridden(wanted: Mapping[Any, Any]) -> Iterator[None]:
        known, new = {}, {}
        for op, kernel in wanted.items():
            found = remembered.get(key(op, kernel))
            if found and found[0] == op.py_kernels and op not in fakes:
                known[op] = found
            else:
                new[op] = kernel
        before: dict[Any, Mapping[Any, Any]] = {op: dict(op.py_kernels) for op in new.keys() - fakes.keys()}
        with override(new):
            for op, own in before.items():
                remembered[key(op, new[op])] = own, dict(op.py_kernels), fakes.get(op)
            try:
                for op, (_, overriding, fake) in known.items():
                    op.py_kernels.update(overriding)
                    op._dispatch_cache.clear()
                    fakes[op] = fake
                yield
            finally:
                for op, (own, _, _) in known.items():
                    op.py_kernels.clear()
                    op.py_kernels.update(own)
                    op._dispatch_cache.clear()
                    fakes.pop(op, None)

    patch.setattr(exported_program, "_override_composite_implicit_decomp", overridden)
