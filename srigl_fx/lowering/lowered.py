"""What lowering returns: a graph module that checks its inputs, knows its report and can be saved.

Owns :class:`LoweredModule`. It must not know how a model is lowered.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import PythonCode, _PyTreeCodeGen

import srigl_fx.runtime.ops  # noqa: F401 - the operators that lowered graphs call
from srigl_fx.files import replacing
from srigl_fx.lowering import file as graph_file
from srigl_fx.lowering.direct import DirectProgram, unobserved
from srigl_fx.lowering.inputs import check_inputs, is_description, with_names
from srigl_fx.lowering.report import LayerReport as LayerReport
from srigl_fx.lowering.report import LoweringReport as LoweringReport
from srigl_fx.lowering.report import format_speedups as format_speedups
from srigl_fx.recipe_parts import from_plain, only, to_plain
from srigl_fx.recipes import Recipe

_STATE = "srigl_fx"


class _CodeGen(_PyTreeCodeGen):
    """Never changes, so copies of a graph share it: copying the trees of inputs and outputs warns in torch itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CodeGen":
        return self


class LoweredModule(fx.GraphModule):
    """A lowered model: an ordinary ``torch.fx.GraphModule`` whose sparse layers are condensed operators.

    It keeps its class and report through ``copy.deepcopy`` and pickle, and may be called from several threads.
    """

    def __init__(
        self, root: torch.nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "LoweredModule"
    ) -> None:
        super().__init__(root, graph, class_name)

    def recompile(self) -> PythonCode:
        """Make ``forward`` anew from the graph: call this after changing that, before the next call."""
        code = super().recompile()
        kind: Any = type(self)  # each graph module has a class of its own
        kind.forward = _checked(kind.forward)
        return code

    @classmethod
    def build(
        cls,
        module: fx.GraphModule,
        report: LoweringReport,
        inputs: list[dict[str, Any] | None],
        recipes: Mapping[str, Recipe] | None = None,
    ) -> "LoweredModule":
        """Wrap a lowered graph.

        Args:
            module: The graph and its tensors.
            report: What was done.
            inputs: For each flat input its "dtype" and "shape", its "value" if it is a constant of the graph, or None
                where it may be anything. A free size is None, or its name where others may have the same, or a sum of
                names (:class:`~srigl_fx.passes.sizes.Size`). With "any_rank", only the last size matters. "limits" has
                the smallest and the largest number of names that have such, "conditions", of any input, what else is
                required of names (:class:`~srigl_fx.passes.sizes.Condition`).
            recipes: Those of the model's parts; by default those that ``module`` has, where it is lowered already.
        """
        module.graph.set_codegen(_CodeGen(module.graph._codegen.pytree_info))  # type: ignore[attr-defined]
        lowered = cls(module, module.graph)
        lowered.eval()
        if recipes is None:
            recipes = module.recipes if isinstance(module, LoweredModule) else {}
        lowered.meta[_STATE] = {"report": report, "inputs": inputs, "recipes": dict(recipes)}
        return lowered

    def __repr__(self) -> str:
        return f"LoweredModule({self.report.outline})" if _STATE in self.meta else super().__repr__()

    @property
    def report(self) -> LoweringReport:
        """What was lowered, what was not, and why; ``str()`` is a table."""
        report = self.meta[_STATE]["report"]
        assert isinstance(report, LoweringReport)
        return report

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the model that was lowered; None where it had none, or parts of it have their own.

        Example:
            >>> import srigl_fx as sx
            >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)), sparsity=0.75)
            >>> sx.lower(model.eval(), (torch.ones(1, 16),), min_speedup=0).recipe == sx.recipe(model)
            True
        """
        return only(self.recipes)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the model's parts, as :func:`srigl_fx.recipes.recipes_of` gives them."""
        recipes: dict[str, Recipe] = self.meta[_STATE].get("recipes", {})
        return recipes

    @property
    def inputs(self) -> list[dict[str, Any] | None]:
        """What the graph was captured for, by flat input: see :meth:`build`."""
        inputs: list[dict[str, Any] | None] = self.meta[_STATE]["inputs"]
        return inputs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one file: safetensors, with the graph as JSON in its header. No pickle, no code.

        The file appears whole or not at all. Output types other than tuples, lists, dicts and tensors are stored as the
        plain container they are made of. So are those of inputs: what takes and returns a ``DynamicCache`` takes and
        returns, from a file, a dict of lists, ``{"key_cache": [...], "value_cache": [...]}``.

        Raises:
            LoweringError: The graph calls something that such a file cannot hold.
        """
        with replacing(path) as part:
            part.write_bytes(self._bytes())

    def _bytes(self) -> bytes:
        extra = {"report": self.report.as_dict(), "inputs": self.meta[_STATE]["inputs"]}
        if self.recipes:
            extra["recipes"] = to_plain(self.recipes)
        return graph_file.dump(self, extra)

    @staticmethod
    def from_bytes(data: bytes, origin: str = "the data") -> "LoweredModule":
        """The module that :meth:`save` wrote.

        Raises:
            FormatError: The data is damaged, or holds anything but a lowered graph.
        """
        return graph_file.guarded(origin, lambda: _build(*graph_file.load(data)))

    def __reduce__(self) -> tuple[Any, ...]:
        return LoweredModule.from_bytes, (self._bytes(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        for spec in (self._in_spec, self._out_spec):
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)

    def _deepcopy_init(self) -> Callable[..., None]:
        return LoweredModule.__init__


def _build(module: fx.GraphModule, extra: dict[str, Any]) -> LoweredModule:
    inputs = with_names(extra["inputs"])
    placeholders = sum(node.op == "placeholder" for node in module.graph.nodes)
    if len(inputs) != placeholders or not all(item is None or is_description(item) for item in inputs):
        raise ValueError("the inputs described are not those of the graph")
    report, recipes = LoweringReport.from_dict(extra["report"]), from_plain(extra.get("recipes"))
    return LoweredModule.build(module, report, inputs, recipes)


def _checked(graph_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a graph that refuses inputs which it was not made for, and takes the short way where it can."""
    program: DirectProgram | None = None

    @functools.wraps(graph_forward)
    def forward(self: LoweredModule, *args: Any, **kwargs: Any) -> Any:
        nonlocal program
        # What traces a graph sees to its sizes itself, or gives what is no tensor.
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if traced or any(isinstance(one, fx.Proxy) for one in (*args, *kwargs.values())):
            return graph_forward(self, *args, **kwargs)
        if unobserved():
            if program is None or program.described is not self.inputs:
                program = DirectProgram(self, self.inputs)
            result = program(self, args, kwargs)
            if result is not None:
                return result[0]
        args, kwargs = check_inputs(self, self.inputs, args, kwargs)
        return graph_forward(self, *args, **kwargs)

    return forward
