"""What a pass of a user's own promises of the graph it was given, whatever it does.

Owns the check of these promises. It must not know any pass.

1. Each new operator node has its value in ``meta["val"]``: the passes behind it read shapes and types there.
2. Tensors that the graph shares with the model, and masks, stay as they are: their content, compared element by element
   with a copy made before, the memory, shape and dtype of their ``.data``, ``requires_grad``, and ``.grad``. What a
   pass changed of these is given back.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx


@contextmanager
def kept(
    module: fx.GraphModule, masks: Iterable[tuple[str, Tensor]] = ()
) -> Iterator[Callable[[fx.GraphModule], None]]:
    """Watch over a pass on ``module`` that runs inside; what is given is to be called with the module it made.

    Args:
        module: What the pass gets.
        masks: More tensors that are not to be written to, besides those of the module, each behind its weight's name.

    Raises:
        ValueError: A promise is not kept, and nothing else was raised; what was written is taken back in each case.

    Example:
        >>> module = fx.symbolic_trace(torch.nn.Linear(2, 2))
        >>> with kept(module) as check:
        ...     module.graph.lint()
        ...     check(module)
        >>> with kept(module):
        ...     module.bias.data.fill_(3.0)
        Traceback (most recent call last):
        ...
        ValueError: it wrote to bias, which is the model's own: put a new tensor in its place (new_buffer)
    """
    before = {node.name for node in module.graph.nodes}

    def check(after: fx.GraphModule) -> None:
        nodes = (node for node in after.graph.nodes if node.op == "call_function" and node.name not in before)
        if bare := [f"{node.name} ({node.target})" for node in nodes if "val" not in node.meta]:  # rule 1
            raise ValueError(
                f'it made {", ".join(bare)} without a value: new nodes get meta["val"], a fake tensor of their shape '
                "and dtype"
            )

    named = [
        *module.named_parameters(),
        *module.named_buffers(),
        *((f"the mask of {weight}", mask) for weight, mask in masks),
    ]
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(named)}  # the first name of each
    saved = [_Saved.of(name, tensor) for name, tensor in tensors.values()]
    try:
        yield check
    finally:
        # A weight has a mask for each form that the graph has of it.
        written = list(dict.fromkeys(name for one in saved for name in one.changes()))
        if written:
            for one in saved:
                one.restore()
    if written:  # rule 2
        raise ValueError(
            f"it wrote to {', '.join(written)}, which is the model's own: put a new tensor in its place (new_buffer)"
        )


@dataclass(frozen=True)
class _Saved:
    """A tensor as it was before a pass.

    Attributes:
        name: What an error calls it.
        tensor: The tensor itself.
        data: What its ``.data`` was: the same memory, with the shape and dtype of that time.
        values: A copy of what was in that memory.
        requires_grad: Whether it required a gradient.
        grad: Its gradient, None where it had none.
    """

    name: str
    tensor: Tensor
    data: Tensor
    values: Tensor
    requires_grad: bool
    grad: "_Saved | None"

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "_Saved":
        grad = _grad(tensor)
        return cls(
            name=name,
            tensor=tensor,
            data=tensor.data,
            values=tensor.detach().clone(),
            requires_grad=tensor.requires_grad,
            grad=None if grad is None else cls.of(f"{name}.grad", grad),
        )

    def changes(self) -> list[str]:
        """The names of what is not as it was."""
        found = [] if self._holds() else [self.name]
        if self.tensor.requires_grad is not self.requires_grad:
            found.append(f"{self.name}.requires_grad")
        before = None if self.grad is None else self.grad.tensor
        if _grad(self.tensor) is not before:
            found.append(f"{self.name}.grad")
        elif self.grad is not None:
            found += self.grad.changes()
        return found

    def restore(self) -> None:
        if not self._holds():
            self.data.copy_(self.values)
            self.tensor.data = self.data
        if self.tensor.requires_grad is not self.requires_grad:
            self.tensor.detach_().requires_grad_(self.requires_grad)  # what was computed in place is no leaf
        if self.grad is not None:
            self.grad.restore()
        if _grad(self.tensor) is not (grad := None if self.grad is None else self.grad.tensor):
            self.tensor.grad = grad

    def _holds(self) -> bool:
        """Whether the memory is the same, and so is what is in it."""
        now = self.tensor.detach()
        if any(getattr(now, kind) != getattr(self.data, kind) for kind in ("dtype", "layout", "device")):
            return False
        pairs = zip(_parts(now), _parts(self.data), _parts(self.values), strict=True)
        return all(one.is_set_to(held) and _same(one, value) for one, held, value in pairs)


def _grad(tensor: Tensor) -> Tensor | None:
    return tensor.grad if tensor.is_leaf else None


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the elements: indices and values of a sparse gradient, as an embedding's may be."""
    return [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same content; NaNs are alike."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())
