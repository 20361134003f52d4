"""Which weights feed the outputs, seen in one forward pass over example inputs.

Owns that question only. The answer comes from autograd's graph: from each output back to the first contraction on
every path. The model is run in evaluation mode and left as it was.
"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.errors import SparsifyError
from srigl_fx.passes.capture import normalise_inputs


def weights_feeding_outputs(model: nn.Module, example_inputs: Any, weights: set[int]) -> set[int]:
    """The ids of those ``weights`` (ids of Parameters) that no other of them stands behind on a path to an output.

    Raises:
        SparsifyError: If the model does not run on the example inputs.
        CaptureError: If they are neither a tuple nor (args, kwargs).
    """
    args, kwargs = normalise_inputs(example_inputs)
    with _evaluating(model, weights), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            outputs = model(*args, **kwargs)
        except Exception as error:  # user code: whatever it raises, the inputs do not fit
            raise SparsifyError(
                f"{type(model).__name__} does not run on the example inputs ({type(error).__name__}: {error}); pass "
                "what its forward takes, as a tuple or as (args, kwargs)"
            ) from error
    stack = [
        leaf.grad_fn for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None
    ]
    seen: set[Any] = set()
    found: set[int] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [following for following, _ in node.next_functions if following is not None]
        read = {id(parameter) for following in inputs if (parameter := _parameter_behind(following)) is not None}
        if read & weights:
            found |= read & weights
        else:
            stack.extend(inputs)
    return found


def _parameter_behind(node: Any) -> Tensor | None:
    """The leaf that ``node`` reads, if there is nothing but single-input operations in between."""
    while not hasattr(node, "variable"):
        inputs = [following for following, _ in node.next_functions if following is not None]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    variable: Tensor = node.variable
    return variable


@contextmanager
def _evaluating(model: nn.Module, weights: set[int]) -> Any:
    """Evaluation mode, with every one of ``weights`` recording gradients."""
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if id(p) in weights and not p.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in training.items():
            module.training = mode
