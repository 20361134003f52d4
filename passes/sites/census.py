"""What one forward pass over example inputs shows of a model's weights.

Owns the runs that discovery makes: which operations read each weight, which weights feed the outputs, and the shapes of
lazy modules. It must not know how the findings are weighed. The model is run in evaluation mode and left as it was.

Rules:
    1. Every function of torch that a forward calls is seen with its operands, also where torch.fx cannot follow: what
       it does with weights is read by the rules of :mod:`srigl_fx.passes.sites.weight_uses`.
    2. A weight feeds an output if no other weight stands on the way: autograd's graph is followed from each output back
       to the first contraction on every path.
"""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from srigl_fx.errors import SparsifyError
from srigl_fx.nn.model_state import copies, restored
from srigl_fx.passes.example_inputs import normalise_inputs
from srigl_fx.passes.sites.contractions import name_of
from srigl_fx.passes.sites.weight_uses import Data, Derived, ParameterUse, Value, Views, after, initial
from srigl_fx.passes.sites.weight_views import WeightView
from srigl_fx.passes.tracing import plain_attention


def uses_on(model: nn.Module, example_inputs: Any) -> dict[int, list[ParameterUse]]:
    """Every use of the model's weights in one forward pass, by the Parameter's id; one that is not used is missing.

    Raises:
        SparsifyError: If the model does not run on the example inputs.
        CaptureError: If they are neither a tuple nor (args, kwargs).

    Example:
        >>> layer = nn.Linear(4, 6)
        >>> [use.layout.kind for use in uses_on(layer, (torch.ones(1, 4),))[id(layer.weight)]]
        ['linear']
    """
    recorder = _Recorder(model)
    with evaluating(model), torch.no_grad(), plain_attention(), recorder:
        run_on(model, example_inputs)
    return recorder.found


def initialise_lazy(model: nn.Module, example_inputs: Any) -> None:
    """Give the lazy modules of ``model`` their shapes by one forward pass; nothing happens where there is none.

    Raises:
        SparsifyError: If the model does not run on the example inputs.
        CaptureError: If they are neither a tuple nor (args, kwargs).

    Example:
        >>> layer = nn.LazyLinear(6)
        >>> initialise_lazy(layer, (torch.ones(1, 4),))
        >>> layer
        Linear(in_features=4, out_features=6, bias=True)
    """
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.no_grad(), restored(model):
                run_on(model, example_inputs)
        finally:
            for module, mode in training.items():
                module.training = mode


class _Recorder(TorchFunctionMode):
    """Sees every function of torch and follows what becomes of weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[int, list[ParameterUse]] = {}
        self.values: Any = WeakIdKeyDictionary()  # by identity; a value is forgotten with its tensor
        for parameter in model.parameters():
            self.values[parameter] = initial(parameter)
        for buffer in model.buffers():
            self.values[buffer] = initial(buffer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note what it does with weights."""
        result = func(*args, **(kwargs or {}))
        name = name_of(func)
        met: list[Tensor] = []

        def value_of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            met.append(leaf)
            value = self.values.get(leaf)
            return Data(leaf.dim()) if value is None else value

        seen_args, seen_kwargs = _mapped((args, kwargs or {}), value_of)
        # Rule 1; what met no weight is data without being noted down.
        if any(isinstance(self.values.get(tensor), Views | Derived) for tensor in met):
            self._keep(result, after(name, func, seen_args, seen_kwargs, self._report))
        return result

    def _report(self, source: int, use: ParameterUse) -> None:
        uses = self.found.setdefault(source, [])
        if use not in uses:
            uses.append(use)

    def _keep(self, result: Any, value: Any) -> None:
        if isinstance(result, tuple | list):
            parts = value if isinstance(value, list) else [value] * len(result)
            for each, part in zip(result, parts, strict=False):
                self._keep(each, part)
        elif isinstance(result, Tensor) and not isinstance(result, nn.Parameter):
            if isinstance(value, Views) and len(value.views) == 1:
                value = _fitted(value, tuple(result.shape))
            self.values[result] = value


def _fitted(value: Views, shape: tuple[int, ...]) -> Value:
    """The weight with the shape that it really has: scaling it may have repeated it."""
    view = value.views[0]
    if len(view.shape) == len(shape) and all(own in (1, real) for own, real in zip(view.shape, shape, strict=True)):
        return value  # where it has size 1, rows were picked by index or the whole was repeated
    repeated = view.through(torch.broadcast_to, shape)
    return Views((repeated,)) if isinstance(repeated, WeightView) else Derived(value.sources, alone=False)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return function(value)


def run_on(model: nn.Module, inputs: Any, what: str = "the example inputs") -> Any:
    """What the model makes of copies of these inputs; the random state is as before.

    Args:
        model: In the mode that it is to run in.
        inputs: A tuple of arguments, or (args, kwargs).
        what: The inputs, in words, for the error.

    Raises:
        SparsifyError: If the model does not run on them.
        CaptureError: If they are neither a tuple nor (args, kwargs).

    Example:
        >>> run_on(nn.Identity(), (torch.ones(2),))
        tensor([1., 1.])
    """
    args, kwargs = copies(normalise_inputs(inputs))
    with torch.random.fork_rng(devices=[]):
        try:
            return model(*args, **kwargs)
        except Exception as error:  # user code: whatever it raises, the inputs do not fit
            raise SparsifyError(
                f"{type(model).__name__} does not run on {what} ({type(error).__name__}: {error}); pass what its "
                "forward takes, as a tuple or as (args, kwargs)"
            ) from error


def weights_feeding_outputs(model: nn.Module, example_inputs: Any, weights: set[int]) -> set[int]:
    """The ids of those ``weights`` (ids of Parameters) that no other of them stands behind on a path to an output.

    Raises:
        SparsifyError: If the model does not run on the example inputs.
        CaptureError: If they are neither a tuple nor (args, kwargs).
    """
    with evaluating(model, weights), torch.enable_grad():
        outputs = run_on(model, example_inputs)
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
        if read & weights:  # rule 2: what lies behind this contraction does not feed the output any more
            found |= read & weights
        else:
            stack.extend(inputs)
    return found


def _parameter_behind(node: Any) -> Tensor | None:
    """The leaf that ``node`` reads, if there is nothing but single-input operations in between."""
    while not hasattr(node, "variable"):  # autograd ends in AccumulateGrad nodes, which name their leaf
        inputs = [following for following, _ in node.next_functions if following is not None]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    variable: Tensor = node.variable
    return variable


@contextmanager
def evaluating(model: nn.Module, weights: Set[int] = frozenset()) -> Iterator[None]:
    """Evaluation mode, with every one of ``weights`` recording gradients; buffers are given back as they were.

    Args:
        model: The model.
        weights: Ids of Parameters.

    Example:
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    training = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if id(p) in weights and not p.requires_grad]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with restored(model, copied=False):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in training.items():
            module.training = mode
