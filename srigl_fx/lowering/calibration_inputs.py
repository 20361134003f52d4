"""What ``calibration`` holds: inputs of the model, each of the form of the example inputs.

Owns the checks of these inputs. It must not know what is found with them.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.errors import LoweringError
from srigl_fx.passes.example_inputs import Inputs, describe, several_inputs
from srigl_fx.passes.program import Program

Calibration = Iterable[Any]


def calibration_inputs(calibration: Calibration | None) -> tuple[Inputs, ...]:
    """The inputs as (args, kwargs), all of them: an iterable may give them only once.

    Args:
        calibration: Of tensors, each the model's one argument; of tuples or lists of arguments; or of (args, kwargs).

    Raises:
        LoweringError: It is no such iterable, or empty.

    Example:
        >>> import torch
        >>> calibration_inputs([torch.ones(2), ((), {"x": 3})])
        (((tensor([1., 1.]),), {}), ((), {'x': 3}))
    """
    if calibration is None:
        return ()
    return several_inputs(calibration, "calibration", LoweringError, hint=", or leave it out")


def check_calibration(program: Program, batches: Iterable[Inputs]) -> None:
    """Require that the captured graph takes each of the inputs.

    Raises:
        LoweringError: One differs from the example inputs in more than numbers and the batch, is empty, or holds a
            number that is not finite.
    """
    examples, expected = pytree.tree_flatten((program.args, program.kwargs))
    for i, (args, kwargs) in enumerate(batches):
        leaves, form = pytree.tree_flatten((args, kwargs))
        fits = form == expected and all(
            _fits(leaf, example, frozenset(axes))
            for leaf, example, axes in zip(leaves, examples, program.sizes.axes or ({},) * len(leaves), strict=True)
        )
        if not fits or not _agree(program, leaves):
            free = "any" if program.symbolic else "the same"
            sizes = (
                f"{', '.join(program.sizes.names)} of any size" if program.sizes.asked else f"with {free} batch size"
            )
            raise LoweringError(
                f"calibration input {i} is {describe(args, kwargs)}, and the graph takes what the example inputs are, "
                f"{describe(program.args, program.kwargs)}, {sizes}"
            )
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not leaf.numel():
                raise LoweringError(f"calibration input {i} is empty: {describe(args, kwargs)}")
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise LoweringError(f"calibration input {i} holds a number that is not finite; leave that input out")


def _agree(program: Program, leaves: list[Any]) -> bool:
    """Whether sizes that the graph ties to each other are as it ties them."""
    values = program.sizes.example(leaves)
    return all(
        leaf.shape[axis] == size.at(values)
        for leaf, axes in zip(leaves, program.sizes.axes, strict=False)
        for axis, size in axes.items()
    )


def _fits(leaf: Any, example: Any, free: frozenset[int]) -> bool:
    """Whether a graph that was captured with ``example`` takes ``leaf``, where these sizes are free."""
    if not isinstance(example, Tensor) or not isinstance(leaf, Tensor):
        return type(leaf) is type(example) and bool(leaf == example)
    same = leaf.dtype is example.dtype and leaf.dim() == example.dim()
    return same and all(axis in free or leaf.shape[axis] == size for axis, size in enumerate(example.shape))
