"""One model's whole way: discovery, sparse training, lowering, ONNX, ONNX Runtime; and what came of it.

Owns the steps and their checks; what comes out is a row of the coverage table. Whatever fails raises.
"""

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from lowering_support import randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.comparison import relative_error
from srigl_fx.errors import CaptureError, ExportError
from srigl_fx.lowering.lowered import LoweringReport
from srigl_fx.masks.records import all_records, sparse_weights
from srigl_fx.train.protect import protected_weights
from zoo.coverage import Row
from zoo.entry import Entry, Inputs

SPARSITY = 0.5
CAPTURED, OTHER = 2, 3  # batch sizes: the one of the example inputs, and another one
TOLERANCE = 1e-4
SENSITIVE = 0.01  # how much other inputs must change the outputs


def travel(entry: Entry, folder: Path) -> Row:
    """Take the model of ``entry`` all the way; files are written to ``folder``."""
    torch.manual_seed(0)
    model = sx.sparsify(randomise(entry.make()), sparsity=SPARSITY, distribution="uniform")
    train(model, entry)
    calibrate(model, entry)
    ablated = ablate(model, entry.never_ablated)
    model.eval()
    example = entry.inputs(CAPTURED)
    if not entry.static:  # a detector may find nothing; its parts are compared one by one as well
        check_sensitive(model, example, entry.inputs(CAPTURED))
    lowered = sx.lower(model, example, min_speedup=0)
    other = example if entry.static else entry.inputs(OTHER)
    if lowered.report.dynamic_batch or lowered_regions(lowered):
        check_same(run(model, other), run(lowered, other))
    onnx = export(model, lowered, entry, example, other, folder)
    report: LoweringReport = lowered.report
    records = [record for _, _, record in all_records(model)]
    return Row(
        model=entry.name,
        family=entry.family,
        weights=len(records),
        sparse=sum(record.sparse for record in records),
        dense=count(record.reason for record in records if not record.sparse),
        gradients="train" if entry.train else "eval",
        capture=report.capture,
        regions=len(lowered_regions(lowered)) or 1,
        condensed=sum(layer.decision == "condensed" for layer in report.layers),
        not_condensed=count(layer.reason for layer in report.layers if layer.decision != "condensed"),
        ablated=ablated,
        removed=sum(weight.rows_removed for graph in report.removals for weight in graph.weights),
        onnx=onnx,
    )


def train(model: nn.Module, entry: Entry) -> None:
    """Three steps of SRigL with one topology update; the masks must move, and the gradients stay on them."""
    model.train(entry.train)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trainer = sx.SRigL(model, optimizer, total_steps=20, update_every=2)
    before = {name: mask.clone() for name, mask in sx.masks.named_masks(model)}
    for _ in range(3):
        args, kwargs = (entry.train_inputs if entry.train and entry.train_inputs else entry.inputs)(4)
        optimizer.zero_grad()
        floats = [leaf for leaf in tensors(model(*args, **kwargs)) if leaf.is_floating_point() and leaf.numel()]
        torch.stack([leaf.square().mean() for leaf in floats]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert trainer.last_update == 2
    assert any(not torch.equal(mask, before[name]) for name, mask in sx.masks.named_masks(model))
    trainer.detach()
    sx.verify(model)


def calibrate(model: nn.Module, entry: Entry) -> None:
    """Give batch normalisations the statistics of a batch: with random ones a deep model ignores its inputs."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    run(model, entry.inputs(16))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def check_sensitive(model: nn.Module, one: Inputs, another: Inputs) -> None:
    """The outputs depend on the inputs: else a comparison of outputs would see nothing but the last biases."""
    pairs = zip(tensors(run(model, one)), tensors(run(model, another)), strict=True)
    floats = [(first, second) for first, second in pairs if first.is_floating_point()]
    differ = [first.shape != second.shape or relative_error(first, second) > SENSITIVE for first, second in floats]
    assert any(differ), "the outputs hardly depend on the inputs"


@torch.no_grad()
def ablate(model: nn.Module, never: tuple[str, ...]) -> int:
    """Ablate every third neuron of every layer whose neurons may be; return how many that are.

    The others take over the budget, with random new weights, as an update of SRigL would leave them.
    """
    protected = set(protected_weights(model, "output"))
    ablated = 0
    for handle in sparse_weights(model):
        if handle.fqn in protected or any(
            fnmatchcase(handle.fqn.removesuffix(".weight"), pattern) for pattern in never
        ):
            continue
        site = handle.record.site
        weight, mask = site.to_matrix(handle.weight).clone(), site.to_matrix(handle.mask).clone()
        for block, budget in zip(site.blocks, handle.record.budgets, strict=True):
            rows = slice(block.start, block.stop)
            dead = torch.arange(0, block.rows, 3)[: block.rows + (-budget // mask.shape[1])]
            if block.ablatable and block.rows > 3 and len(dead):
                fan_in = budget // (block.rows - len(dead))
                kept = (mask[rows] + torch.rand_like(weight[rows])).topk(fan_in).indices
                new = torch.zeros_like(mask[rows]).scatter_(1, kept, True)
                new[dead] = False
                grown = new & ~mask[rows]
                weight[rows][grown] = 0.1 * torch.randn(int(grown.sum()))
                mask[rows] = new
                ablated += len(dead)
        handle.weight.copy_(site.from_matrix(weight))
        handle.mask.copy_(site.from_matrix(mask))
    sx.masks.apply(model)
    sx.verify(model)
    return ablated


def export(model: nn.Module, lowered: Any, entry: Entry, example: Inputs, other: Inputs, folder: Path) -> str:
    """Write the lowered model, or each of its regions, and run the files with and without the operator library."""
    regions = lowered_regions(lowered)
    if not regions:
        path = folder / "model.onnx"
        report = sx.export_onnx(lowered, path, example, min_speedup=0)
        inputs = other if report.dynamic_batch else example
        expected = tensors(run(model, inputs))
        for session in (sx.runtime.load(path), stock(path)):
            check_same(expected, serve(session, inputs))
        return "whole" if report.dynamic_batch else "whole, static batch"
    failed = []
    for name, region in regions.items():
        try:
            sx.export_onnx(region, folder / f"{name}.onnx", lowered.region_inputs[name], min_speedup=0)
        except (ExportError, CaptureError) as error:
            failed.append(f"{name}: {error}")
    return f"{len(regions) - len(failed)} of {len(regions)} regions" + "".join(f"; {text}" for text in failed)


def lowered_regions(lowered: nn.Module) -> dict[str, Any]:
    """The regions of a model that is not one graph; empty where it is."""
    return dict(getattr(lowered, "regions", None) or {})


def stock(path: Path) -> Any:
    """A session of ONNX Runtime without the operator library."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def serve(session: Any, inputs: Inputs) -> list[Tensor]:
    """What an ONNX Runtime session gives for ``inputs``."""
    names = [item.name for item in session.get_inputs()]
    given = dict(zip(names, (tensor.numpy() for tensor in tensors(inputs)), strict=True))
    return [torch.from_numpy(array) for array in session.run(None, given)]


def run(model: nn.Module, inputs: Inputs) -> Any:
    """What the model gives for ``inputs``."""
    args, kwargs = inputs
    with torch.no_grad():
        return model(*args, **kwargs)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and output classes."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def check_same(expected: Any, got: Any) -> None:
    """The same tensors, each within the tolerance of its largest value."""
    wanted, given = tensors(expected), tensors(got)
    assert len(wanted) == len(given)
    for position, (one, another) in enumerate(zip(wanted, given, strict=True)):
        error = relative_error(one, another)
        assert error <= TOLERANCE, f"output {position} is off by {error:.1e}"


def count(reasons: Any) -> str:
    """Reasons and how often each was given."""
    return " | ".join(f"{times} x {reason}" for reason, times in Counter(reasons).most_common())
