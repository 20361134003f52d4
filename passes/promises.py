"""What a pass of a user's own promises of the graph it was given, whatever it does.

Owns the check of these promises. It must not know any pass.

1. Each new operator node has its value in ``meta["val"]``: the passes behind it read shapes and types there.
2. Tensors that the graph shares with the model, and masks, are not written to. They are compared, element by element,
   with copies made before, and get back what was in them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx


@contextmanager
def kept(module: fx.GraphModule, masks: Iterable[Tensor] = ()) -> Iterator[Callable[[fx.GraphModule], None]]:
    """Watch over a pass on ``module`` that runs inside; what is given is to be called with the module it made.

    Args:
        module: What the pass gets.
        masks: More tensors that are not to be written to, besides those of the module.

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

    named = [*module.named_parameters(), *module.named_buffers(), *(("a mask", mask) for mask in masks)]
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(named)}  # the first name of each
    saved = [(name, tensor, tensor.detach().clone()) for name, tensor in tensors.values()]
    try:
        yield check
    finally:
        written = [(name, tensor, old) for name, tensor, old in saved if not _same(tensor.detach(), old)]
        for _, tensor, old in written:
            tensor.data.copy_(old)
    if written:  # rule 2
        raise ValueError(
            f"it wrote to {', '.join(name for name, _, _ in written)}, which is the model's own: put a new tensor in "
            "its place (new_buffer)"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same content; NaNs are alike."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())
