"""Whether what a graph makes of a weight can be masked: one value for each stored value, in the same place.

Owns the rules and the look at the values of a transform; it must not know where the graph came from, nor
what is done with the answer.

Rules:
    1. A transform is of the weight alone, element by element, or with statistics (a mean, a norm) of the weight.
       Parameters as large as a dimension of the weight may scale or shift it. Its axes may change places on the way, if
       they are back in the end.
    2. A transform that mixes the values of one neuron leaves a neuron of zeros as it is, unless it gives that neuron
       values all the same.

With w for the stored weight, an effective weight e can be masked where e[i] stands for w[i]::

    e[i] = f(w[i])            element by element (tanh, a scale, a fake quantisation)
    e[i] = f(w[i], s(w))      with statistics of w: e[i] = (w[i] - mean(w)) / std(w)

Rule 1 gives each node of the graph one of three roles, beginning with the weight, which is the "value":

    a. What no value and no statistic goes into is "other", and so is a size.
    b. Reshapes, squeezes and indices keep the role of what they are applied to. A value must stay whole, and in the
       order of the weight's axes; where its elements are cut or laid out anew, e[i] is no longer at w[i].
    c. Element by element, a value makes a value, and statistics alone a statistic; both together make a value with
       statistics, which is not element by element any more.
    d. What changes axes is tried out; its values are in place again where the axes are those of the weight in the end.
    e. A reduction makes a statistic.
    f. Normalisations and softmax make a value with statistics.
    g. A child module is looked into, in both modes.
    h. Anything else (a sort, a product, a flip) puts values in other places, or mixes them.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from srigl_fx.nn import regenerated
from srigl_fx.nn.effective import Masking, masked
from srigl_fx.nn.regenerated import RegenerationError
from srigl_fx.passes.operators import operator_named
from srigl_fx.passes.sites.contractions import name_of, operands
from srigl_fx.passes.sites.weight_layout import Layout

_ELEMENTWISE = frozenset({"pointwise", "copies"})
_SIZES = frozenset({"measures", "creates"})


class UnfitError(Exception):
    """A transform that cannot be masked; the message is the reason."""


class CompanionError(Exception):
    """The parameter is no weight, but scales or shifts one."""


def attribute(module: nn.Module, target: str) -> object:
    """What a ``get_attr`` target is.

    Example:
        >>> attribute(nn.Linear(3, 2), "weight").shape
        torch.Size([2, 3])
    """
    value: object = module
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def is_elementwise(module: nn.Module, source: fx.Node, end: fx.Node, weight: Tensor, name: str = "") -> bool:
    """Rule 1: whether ``end`` is made of ``source`` element by element; else it is made with statistics of it.

    Args:
        module: The module whose graph it is.
        source: The node that has the weight's values.
        end: The node that is used in their place.
        weight: The stored weight.
        name: The module's FQN, for the reasons.

    Raises:
        UnfitError: It is made in another way.
        CompanionError: The parameter is no weight.

    Example:
        >>> graph = regenerated.trace(nn.Softmax(1), training=False)
        >>> source, end, _ = graph.nodes
        >>> is_elementwise(nn.Softmax(1), source, end, torch.ones(3, 2))
        False
    """
    roles: dict[fx.Node, str] = {source: "value"}  # value, statistic, size or other
    usual = tuple(range(weight.dim()))
    axes: dict[fx.Node, tuple[int, ...]] = {source: usual}  # of a value: which of the weight's each one is
    elementwise = True
    needed = regenerated.ancestors(end)
    for node in source.graph.nodes:
        if node not in needed or node is source:
            continue
        met = {roles[each] for each in node.all_input_nodes if each in roles}
        if node.op == "placeholder":  # a mask of what changes with every batch could not be drawn
            raise UnfitError("its effective value depends on the data")
        if node.op == "get_attr":
            _check_companion(node, attribute(module, str(node.target)), weight, name)
            roles[node] = "other"
            continue
        operation = "module" if node.op == "call_module" else _name(node)
        if operation == "getattr":
            operation = str(node.args[1])
        row = operator_named(operation)
        values = [each for each in node.all_input_nodes if roles.get(each) == "value"]
        if values:
            axes[node] = axes[values[0]]
            if any(axes[each] != axes[node] for each in values):
                raise UnfitError(f"{operation} combines values of different places")
        if not met & {"value", "statistic"} or row.does in _SIZES:  # a
            roles[node] = "other"
        elif row.family in {"reshape", "one"} or operation == "getitem":  # b
            if operation == "getitem" and "value" in met:
                raise UnfitError("it is cut in pieces")
            if axes.get(node, usual) != usual:  # in another order, whatever axes there are then
                raise UnfitError(f"{operation} does not keep each value in its place")
            roles[node] = "value" if "value" in met else "statistic"
        elif row.does in _ELEMENTWISE or row.family == "quantize":  # c
            roles[node] = "value" if "value" in met else "statistic"
            elementwise &= not {"value", "statistic"} <= met
        elif row.family == "axes":  # d
            roles[node] = "value" if values else "statistic"
            if values:
                axes[node] = _turned(node, axes[node], operation)
        elif row.does == "reduces":  # e
            roles[node] = "statistic"
        elif row.does == "normalises" or row.family == "softmax":  # f
            roles[node], elementwise = "value", False
        elif operation == "module":  # g
            if axes.get(node, usual) != usual:
                raise UnfitError(f"the child {node.target!r} takes it turned")
            elementwise &= _module_is_elementwise(module, node, weight, _joined(name, str(node.target)))
            roles[node] = "value"
        else:  # h
            raise UnfitError(f"{operation} does not keep each value in its place")
    if roles[end] != "value":
        raise UnfitError("what is used is not of its shape")
    if axes[end] != usual:
        raise UnfitError("its axes change places, which does not keep each value in its place")
    return elementwise


def _turned(node: fx.Node, axes: tuple[int, ...], operation: str) -> tuple[int, ...]:
    """The axes behind an operation that puts them in another order: it is tried on axes that differ in size."""
    sizes = tuple(range(2, 2 + len(axes)))  # none is 1, which an operation might squeeze away
    args = [torch.empty(sizes) if isinstance(each, fx.Node) else each for each in node.args]
    call = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    assert callable(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of it, the model hears from it
        try:
            found = call(*args, **node.kwargs)
        except Exception as error:  # arguments that are computed, or another number of axes
            raise UnfitError(f"{operation} does not keep each value in its place") from error
    if sorted(found.shape) != list(sizes):
        raise UnfitError(f"{operation} does not keep each value in its place")
    return tuple(axes[sizes.index(size)] for size in found.shape)


def _module_is_elementwise(module: nn.Module, node: fx.Node, weight: Tensor, name: str) -> bool:
    child = module.get_submodule(str(node.target))
    if any(cls.__name__ == "FakeQuantizeBase" for cls in type(child).__mro__):
        return True  # its scale, which it observes, has no gradient, and zero is always one of its values
    if len(node.args) != 1 or node.kwargs:
        raise UnfitError(f"the child {node.target!r} does not take it alone")
    elementwise = True
    for training in (False, True):
        try:
            graph = regenerated.trace(child, training=training, exact=False, like=weight)
        except RegenerationError as error:
            raise UnfitError(f"the child {node.target!r} cannot be looked into: {error}") from error
        (source,) = [each for each in graph.nodes if each.op == "placeholder"]
        ends = graph.output_node().all_input_nodes
        if len(ends) != 1:
            raise UnfitError(f"the child {node.target!r} gives several values")
        elementwise &= is_elementwise(child, source, ends[0], weight, name)
    return elementwise


def _joined(name: str, target: str) -> str:
    return f"{name}.{target}" if name else target


def _check_companion(node: fx.Node, value: object, weight: Tensor, name: str) -> None:
    """Refuse another parameter that is more than a scale or a shift along one dimension."""
    if isinstance(value, nn.Parameter) and value.numel() > max(weight.shape):
        fqn = _joined(name, str(node.target))
        if weight.numel() <= max(value.shape):  # seen from the other one, this is the scale
            contracted = any(operands(name_of(user.target), user.args, user.kwargs) for user in node.users)
            raise CompanionError(
                f"it is data, which the weight {fqn!r} multiplies"
                if contracted
                else f"it scales or shifts the weight {fqn!r}"
            )
        raise UnfitError(f"it is made of two weights, the other one is {fqn!r}: masking one leaves the other whole")


@torch.no_grad()
def _values(transform: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        try:
            return transform(value)
        except Exception as error:  # user code; in a mode it may never have run in
            raise UnfitError(f"it could not be computed ({type(error).__name__}: {error})") from error


def check_values(transform: Callable[[Tensor], Tensor], weight: Tensor) -> None:
    """Require that the transform of ``weight`` has its shape.

    Raises:
        UnfitError: It has not, or the transform fails.

    Example:
        >>> check_values(torch.tanh, torch.ones(3, 2))
    """
    values = _values(transform, weight.detach())
    if not isinstance(values, Tensor) or values.shape != weight.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UnfitError(f"what is used is not of its shape but {found}")


def zero_dims(
    transform: Callable[[Tensor], Tensor], weight: Tensor, layout: Layout, *, elementwise: bool
) -> tuple[int, ...]:
    """Rule 2: the dimensions over which a neuron of zeros is looked for, or none.

    Raises:
        UnfitError: The transform of a neuron of zeros is not finite, and nothing can be done about it.

    Example:
        >>> layout = Layout.usual("linear", (3, 2))
        >>> zero_dims(lambda w: w / w.norm(dim=1, keepdim=True), torch.randn(3, 2), layout, elementwise=False)
        (1,)
        >>> zero_dims(lambda w: w.softmax(1), torch.randn(3, 2), layout, elementwise=False)
        ()
    """
    if elementwise:  # f(0) is masked where it stands; nothing of a neuron's zeros reaches other places
        return ()
    without = weight.detach().clone()
    dims = layout.input_axes if layout.view == tuple(weight.shape) else ()
    neuron = tuple(slice(None) if dim in dims else 0 for dim in range(weight.dim()))
    if not dims:
        raise UnfitError("its neurons do not lie along its dimensions")
    # A neuron of zeros on trial: what does the transform make of it?
    without[neuron] = 0.0
    there = _values(transform, without)[neuron]
    if bool(there.isfinite().all()) and bool(there.any()):  # it gets values all the same, as from a softmax
        return ()
    # It stays zero, or it is divided by its own length. Then the values behind are replaced, but 0 * inf in the
    # backward pass would still reach the weight: the gradient says, for a neuron gone and for an input gone.
    first_input = tuple(0 if dim == dims[0] else slice(None) for dim in range(weight.dim()))
    masking = Masking(elementwise=False, zero_dims=dims)
    for zeros in (neuron, first_input):
        pruned = weight.detach().clone()
        pruned[zeros] = 0.0
        pruned.requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            effective = masked(pruned, pruned != 0, transform, masking, dense_gradient=True)
            (gradient,) = torch.autograd.grad(effective.sum(), pruned)
        if not bool(gradient.isfinite().all()):
            raise UnfitError("it divides by zero where inputs are pruned")
    return dims
