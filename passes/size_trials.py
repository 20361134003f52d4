"""A model and its graphs, run at other sizes of their inputs than the example's.

Owns these runs, each of which is made once, and what is said of a difference. It must not know which sizes are tried,
nor what follows from it.
"""

from typing import Any, Final

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Results, compare
from srigl_fx.passes.capture_checks import first_line, raised_by
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import At

ANOTHER: Final = " is another"  # and no error says so
DIFFERS: Final = "the forward decides by it: the graph does something else than the model"

_Shapes = tuple[Any, ...]  # of all leaves of the inputs: what these hold is the example's, repeated or cut to them


class Trials:
    """The runs of one model, and of the graph that was captured last.

    Example:
        >>> import torch
        >>> from srigl_fx.passes.capture import capture
        >>> model = nn.Linear(3, 2).eval()
        >>> program = capture(model, (torch.ones(2, 3),))
        >>> Trials(model).wrong(program, At.of({"batch": 5}))
        ''
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wanted: dict[_Shapes, list[Results] | str] = {}  # what the model gives, or its error
        self._module: fx.GraphModule | None = None
        self._found: dict[_Shapes, str] = {}  # how that graph differs

    def wrong(self, program: Program, at: At) -> str:
        """What is wrong with the model, or with its graph, at other sizes; "" where both do the same."""
        inputs = program.inputs_at(at)
        leaves = pytree.tree_leaves(inputs)
        shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)
        if shapes not in self._wanted:
            try:
                self._wanted[shapes] = [run.results for run in run_steps(self._model, *inputs)]
            except Exception as error:  # the model's own code: any type
                self._wanted[shapes] = raised_by(error) + first_line(error)
        wanted = self._wanted[shapes]
        if isinstance(wanted, str):
            return f"the model does not run at {at}: {wanted}"
        if self._module is not program.module:
            self._module, self._found = program.module, {}
        if shapes not in self._found:
            self._found[shapes] = _difference(program.module, inputs, wanted)
        difference = self._found[shapes]
        return f"{DIFFERS} at {at}: {difference}" if difference else ""


def _difference(module: fx.GraphModule, inputs: Inputs, wanted: list[Results]) -> str:
    """How the results of a graph differ from a model's; "" where they do not."""
    try:
        found = compare(
            [None],
            lambda _: wanted,
            lambda _, calls: [run.results for run in run_steps(module, *inputs, calls)],
        )
    except Exception as error:  # of any operator
        return first_line(error)
    return "" if found.wrong is None else f"{found.wrong.what}{ANOTHER}"
