"""Weights used by functions: kinds, axes and blocks of every spelling, against what each output really depends on."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sites_support import Functional, assert_blocks_tile, assert_rows_are_neurons, discover, train_some
from torch import Tensor, fx, nn

import srigl_fx as sx

Use = Callable[[Tensor, Tensor], Tensor]

# (use, shape of the weight, shape of the data, kind, number of blocks)
USES: list[tuple[Use, tuple[int, ...], tuple[int, ...], str, int]] = [
    (lambda x, w: F.linear(x, w), (5, 3), (2, 3), "linear", 1),
    (lambda x, w: w @ x, (5, 3), (3, 2), "linear", 1),
    (lambda x, w: torch.mv(w, x), (5, 3), (3,), "linear", 1),
    (lambda x, w: torch.addmm(torch.ones(5), x, w.T), (5, 3), (2, 3), "linear", 1),
    (lambda x, w: torch.inner(x, w), (5, 3), (2, 3), "linear", 1),
    (lambda x, w: x @ w, (3, 5), (2, 3), "linear_in_out", 1),
    (lambda x, w: F.linear(x, 0.5 * w), (5, 3), (2, 3), "linear", 1),
    (lambda x, w: F.linear(x, w * torch.arange(1.0, 4.0)), (5, 3), (2, 3), "linear", 1),
    (lambda x, w: F.linear(x, w.view(5, 3)), (5, 1, 3), (2, 3), "einsum", 1),
    (lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], 1), (6, 3), (2, 3), "linear", 1),
    (lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(x, w[4:])], 1), (6, 3), (2, 3), "linear", 1),
    (lambda x, w: F.linear(x[:, :2], w[:, :2]) + F.linear(x[:, 2:], w[:, 2:]), (5, 6), (2, 6), "linear", 1),
    (lambda x, w: F.conv1d(x, w, padding=0), (4, 3, 2), (1, 3, 4), "conv1d", 1),
    (lambda x, w: F.conv1d(x, w.unsqueeze(-1)), (4, 3), (1, 3, 5), "linear", 1),
    (lambda x, w: F.conv2d(x, w[:, :, None, None]), (4, 3), (1, 3, 2, 2), "linear", 1),
    (lambda x, w: F.conv_transpose1d(x, w), (3, 4, 1), (1, 3, 2), "conv_transpose1d", 1),
    (lambda x, w: torch.einsum("bi,oi->bo", x, w), (5, 3), (2, 3), "einsum", 1),
    (lambda x, w: torch.einsum("...i,hio->...ho", x, w), (2, 3, 4), (2, 3), "einsum", 1),
    (lambda x, w: torch.einsum("bhd,hdo->bo", x, w), (2, 3, 4), (2, 2, 3), "einsum", 1),
    (lambda x, w: torch.einsum("bhd,hdo->bho", x, w), (2, 3, 4), (2, 2, 3), "stack", 2),
    (lambda x, w: torch.einsum("bi,oi", x, w), (5, 3), (2, 3), "einsum", 1),
    (lambda x, w: torch.einsum("bhd,hd->bh", x, w), (4, 3), (2, 4, 3), "einsum", 1),
    (lambda x, w: torch.tensordot(x, w, dims=1), (3, 4, 2), (2, 3), "einsum", 1),
    (lambda x, w: torch.tensordot(x, w, dims=([1, 2], [2, 0])), (3, 4, 2), (2, 2, 3), "einsum", 1),
    (lambda x, w: torch.bmm(x, w), (3, 4, 5), (3, 2, 4), "stack", 3),
    (lambda x, w: torch.bmm(x, w.transpose(1, 2)), (3, 5, 4), (3, 2, 4), "stack", 3),
    (lambda x, w: torch.baddbmm(torch.ones(1), x, w), (3, 4, 5), (3, 2, 4), "stack", 3),
    (lambda x, w: x @ w, (3, 4, 5), (3, 2, 4), "stack", 3),
    (lambda x, w: w @ x, (3, 5, 4), (3, 4, 2), "stack", 3),
    (lambda x, w: torch.stack([F.linear(x, w[e]) for e in range(3)]), (3, 5, 4), (2, 4), "stack", 3),
    (lambda x, w: torch.stack([x @ one for one in w.unbind(0)]), (3, 4, 5), (2, 4), "stack", 3),
    (lambda x, w: torch.stack([x @ w.view(3, 4, 5)[e] for e in range(3)]), (12, 5), (2, 4), "stack", 3),
    (lambda x, w: torch.stack([F.linear(x, w.view(3, 4, 5)[e]) for e in range(3)]), (12, 5), (2, 5), "stack", 3),
    (lambda x, w: torch.stack([F.linear(x, w[..., e]) for e in range(2)]), (4, 3, 2), (2, 3), "stack", 2),
    (lambda x, w: torch.bmm(x, w[torch.tensor([2, 0, 1])]), (3, 4, 5), (3, 2, 4), "stack", 3),
    (lambda x, w: torch.bmm(x, w.index_select(0, torch.tensor([2, 0, 1]))), (3, 4, 5), (3, 2, 4), "stack", 3),
]


@pytest.mark.parametrize("by_run", [False, True], ids=["graph", "run"])
@pytest.mark.parametrize(("use", "shape", "data", "kind", "blocks"), USES)
def test_every_spelling_of_a_contraction(
    use: Use, shape: tuple[int, ...], data: tuple[int, ...], kind: str, blocks: int, by_run: bool
) -> None:
    x = torch.randn(data)

    def hidden(x: Tensor, w: Tensor) -> Tensor:
        assert isinstance(x, Tensor)  # torch.fx stops here
        return use(x, w)

    model = Functional(hidden if by_run else use, shape)
    finding = discover(model, (x,) if by_run else None)["w"]
    assert (finding.reason, finding.site.kind, len(finding.site.blocks)) == ("", kind, blocks)
    assert_blocks_tile(finding.site)
    assert torch.equal(finding.site.from_matrix(finding.site.to_matrix(model.w.detach())), model.w)
    assert_rows_are_neurons(finding.site, model.w, use(x, model.w))


@pytest.mark.parametrize(
    ("use", "reason", "reached"),
    [
        (lambda x, w: F.linear(w, torch.ones(4, 16)), "not a contraction weight", True),
        (lambda x, w: F.linear(w.expand(2, -1, -1), torch.ones(4, 16)) + 1, "not a contraction weight", True),
        (lambda x, w: (x + w) @ torch.ones(16, 2), "not a contraction weight", True),
        (lambda x, w: x @ (w.t() @ w), "multiplied with another parameter", False),
        (lambda x, w: x * w[torch.tensor([0, 1])], "not a contraction weight", True),
        (lambda x, w: x @ w[torch.tensor([[0, 1], [1, 2]])].transpose(-1, -2), "looked up by index", True),
        (lambda x, w: torch.outer(x[0], w[0]), "not a contraction weight", True),
        (lambda x, w: F.bilinear(x, x, w[None, :, :4]), "contracts two inputs", True),
        (lambda x, w: F.linear(x, torch.diagonal(w)[None]), "transformed", False),
    ],
)
def test_what_is_no_weight_or_cannot_be_followed(use: Use, reason: str, reached: bool) -> None:
    finding = discover(Functional(use))["w"]
    assert reason in finding.reason
    assert finding.reached is reached


def test_attention_by_function_is_known_by_its_operands() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.randn(24, 8))
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = F.multi_head_attention_forward(
                x, x, x, 8, 2, self.packed, None, None, None, False, 0.0, self.out.weight, self.out.bias
            )
            return y

    site = discover(Pool())["packed"].site
    assert (site.kind, [block.name for block in site.blocks]) == ("attention_in", ["q", "k", "v"])
    assert not any(block.ablatable for block in site.blocks)
    assert train_some(Pool(), torch.randn(3, 2, 8)) == ["packed", "out.weight"]


def test_weights_that_are_concatenated_are_each_one() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList([torch.randn(5, 8), torch.randn(3, 8)])
            self.experts = nn.ParameterDict({name: torch.randn(8, 4) for name in "ab"})

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, torch.cat(list(self.parts)))
            return torch.matmul(y, torch.stack([self.experts["a"], self.experts["b"]]))

    found = discover(Fused())
    assert {name: (f.site.kind, f.reason) for name, f in found.items()} == {
        "parts.0": ("linear", ""),
        "parts.1": ("linear", ""),
        "experts.a": ("linear_in_out", ""),
        "experts.b": ("linear_in_out", ""),
    }
    assert len(train_some(Fused(), torch.randn(6, 8))) == 4


def test_a_modulated_convolution_needs_a_run() -> None:
    class Modulated(nn.Module):
        """One kernel for each sample, as one grouped convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4, 3, 3))
            self.style = nn.Linear(5, 4)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            batch = x.shape[0]
            w = self.w.unsqueeze(0) * self.style(z)[:, None, :, None, None]
            y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, *self.w.shape[1:]), groups=batch)
            return y.reshape(batch, -1, *y.shape[2:])

    inputs = (torch.randn(2, 4, 5, 5), torch.randn(2, 5))
    site = discover(Modulated(), inputs)["w"].site
    assert (site.kind, site.neuron_axes, site.input_axes) == ("conv2d", (0,), (1, 2, 3))
    assert train_some(Modulated(), *inputs, example_inputs=inputs) == ["w", "style.weight"]


@pytest.mark.parametrize(("use", "shape", "data"), [(use[0], use[1], use[2]) for use in USES[::3]])
def test_a_sparse_update_on_every_kind(use: Use, shape: tuple[int, ...], data: tuple[int, ...]) -> None:
    named = "view" in use.__code__.co_names  # the use names its sizes
    larger = shape if named else tuple(4 * size if size > 2 else size for size in shape)
    try:
        out = use(torch.randn(data if named else tuple(4 * s if s > 2 else s for s in data)), torch.randn(larger))
    except RuntimeError:
        larger, out = shape, use(torch.randn(data), torch.randn(shape))
    assert out.isfinite().all()
    model = Functional(use, larger)
    x = torch.randn(tuple(4 * size if size > 2 else size for size in data) if larger != shape else data)
    assert train_some(model, x, sparsity=0.4) == ["w"]


@pytest.mark.parametrize(("use", "shape", "data"), [(use[0], use[1], use[2]) for use in USES[1::3]])
def test_a_graph_module_runs_with_its_masks_and_is_restored(
    use: Use, shape: tuple[int, ...], data: tuple[int, ...]
) -> None:
    graph, x = fx.symbolic_trace(Functional(use, shape)), torch.randn(data)
    nodes = [node.name for node in graph.graph.nodes]
    sx.sparsify(graph, sparsity=0.3)
    expected = use(x, graph.w)  # type: ignore[arg-type]
    assert torch.equal(graph(x), expected)
    sx.masks.verify(graph)
    sx.finalize(graph)
    assert torch.equal(graph(x), expected)
    assert len(list(graph.graph.nodes)) == len(nodes)


def test_a_graph_node_that_reads_two_masked_weights_is_replaced_once() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.randn(24, 8))
            self.out = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y, _ = F.multi_head_attention_forward(
                x, x, x, 8, 2, self.packed, None, None, None, False, 0.0, self.out, None
            )
            return y

    graph, x = fx.symbolic_trace(Pool()), torch.randn(3, 2, 8)
    sx.sparsify(graph, sparsity=0.5)
    assert [name for name, _ in sx.masks.named_masks(graph)] == ["packed", "out"]
    sparse = graph(x)
    sx.finalize(graph)
    assert torch.equal(graph(x), sparse)
