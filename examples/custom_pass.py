"""A graph pass of your own, between those of ``lower``: it folds ``linear(x) * number`` into the weight and the bias.

A pass takes a captured program, rewrites its graph, and says what it did not do and why. Weights stay masked: the
pass enters the scaled tensor in ``program.masked``. ``verify="each pass"`` compares the program with the model after
every pass, so that a mistake is reported with the name of the pass that made it.

Run ``python examples/custom_pass.py``.
"""

import torch
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.passes import Note, Pass, PassResult
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import MaskedTensor, Program, arguments, new_buffer, tensor_at

aten = torch.ops.aten


class FoldScale(Pass[Program]):
    """Fold the multiplication of a linear layer's output by a number into the layer.

    1. ``linear(x, w, b) * c`` becomes ``linear(x, c w, c b)``; the mask of the weight stays.
    2. A linear layer whose output is used otherwise too is left, with a note.
    """

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        module, graph = subject.module, subject.module.graph
        notes, changed = [], False
        for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
            linear, scale = node.args
            if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
                continue  # a number may stand on the left
            if not isinstance(scale, int | float):
                continue
            if len(linear.users) > 1:
                notes.append(Note(where=linear.name, reason="its output is used unscaled too"))
                continue
            given = arguments(linear)
            with graph.inserting_before(linear):
                for position, name in ((1, "weight"), (2, "bias")):
                    source = given[name]
                    if source is None:
                        continue
                    scaled = new_buffer(module, f"{source.target}_scaled", scale * tensor_at(module, source.target))
                    if masked := subject.masked.get(str(source.target)):
                        subject.masked[str(scaled.target)] = MaskedTensor(fqn=masked.fqn, mask=masked.mask)
                    linear.update_arg(position, scaled)
            node.replace_all_uses_with(linear)
            graph.erase_node(node)
            notes.append(Note(where=linear.name, reason=f"scaled by {scale}"))
            changed = True
        graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
        return PassResult(subject=subject, changed=changed, notes=tuple(notes))

    def ensures(self, subject: Program) -> None:
        """The graph is well-formed."""
        subject.module.graph.lint()


class Scaled(nn.Module):
    """A model that scales what its hidden layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(256, 512)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.hidden(x) * 0.125))
        return out


def main() -> None:
    torch.manual_seed(0)
    model = sx.sparsify(Scaled(), sparsity=0.9).eval()
    x = torch.randn(4, 256)
    lowered = sx.lower(model, (x,), min_speedup=0, verify="each pass", passes=(*LOWERING, FoldScale()))
    print(lowered.report)
    assert isinstance(lowered, fx.GraphModule)
    print([str(node.target) for node in lowered.graph.nodes if node.op == "call_function"])
    with torch.no_grad():
        print("largest difference:", f"{(lowered(x) - model(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()
