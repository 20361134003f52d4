"""Make the drafted weights sparse: the one training pass that writes to the model.

Owns the insertion and its undoing; it must not know how the masks came about.

Rules:
    1. The mask becomes a bool buffer ``<weight name>_mask`` beside the weight, on the first owner of a tied weight.
    2. The parameter keeps its identity; its values become those of the draft, zero off the mask.
    3. The owner's class is swapped for its mask-managed subclass; names, attributes and forward stay.
    4. In a GraphModule, each node that uses a mask-managed weight by function becomes a ``call_module`` node of a
       :class:`~srigl_fx.nn.contraction.MaskedContraction`, which owns no parameter: the weight stays a ``get_attr``
       operand, and the mask is another. Uses of one weight through one function share the module.
    5. Every found weight, dense ones too, leaves its record on its owner.
    6. Where a forward transforms a mask-managed weight, or a parametrisation does, what it makes of the weight is
       masked too (:mod:`srigl_fx.nn.effective`).
    7. The model itself notes which of its weights have masks (:mod:`srigl_fx.masks.completeness`), and looks at a
       state_dict as a whole before any of it is loaded.
    8. Every record carries what the call asked for, so that the recipe rides with the masks.
"""

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from srigl_fx.errors import SparsifyError
from srigl_fx.masks import invariants
from srigl_fx.masks.completeness import note_masked
from srigl_fx.masks.records import MASK_SUFFIX, WeightRecord, all_records, records_on, set_records
from srigl_fx.nn import weight_norm
from srigl_fx.nn.contraction import MaskedContraction
from srigl_fx.nn.effective import Transform, attach_transforms, mixin_for
from srigl_fx.nn.following import holder_of
from srigl_fx.nn.sparse_module import attach_holder, attach_masks, check_loading, make_plain
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.draft import Draft


class InsertMasks(Pass[Draft]):
    """Write masks, values, records and classes to the model (rules 1-8 of the module)."""

    def requires(self, subject: Draft) -> None:
        """No name may be taken; checked before anything is written."""
        for fqn, record in subject.records.items():
            owner = subject.model.get_submodule(record.site.owner)
            if record.sparse and hasattr(owner, record.site.attr + MASK_SUFFIX):
                raise SparsifyError(
                    f"{record.site.owner or 'the model'} already has an attribute {record.site.attr + MASK_SUFFIX!r}, "
                    f"where the mask of {fqn!r} belongs; rename it, or leave the weight dense with the rule None"
                )

    @torch.no_grad()
    def run(self, subject: Draft) -> PassResult[Draft]:
        """Write the draft to the model; whatever fails on the way is undone."""
        model = subject.model
        # Rule 8.
        subject.records = {fqn: replace(record, asked=subject.asked) for fqn, record in subject.records.items()}
        keepers = _by_keeper(model, subject.records)
        readers = _by_reader(subject)
        former: dict[str, Tensor] = {}
        try:
            for fqn, values in subject.values.items():  # rule 2: written into, so that optimizers still hold it
                former[fqn] = model.get_parameter(fqn).detach().clone()
                model.get_parameter(fqn).copy_(values)
            for keeper, names in keepers.items():  # rules 1, 3 and 5
                prefix = f"{keeper}." if keeper else ""
                masks = {fqn.removeprefix(prefix): subject.masks[fqn] for fqn in names if fqn in subject.masks}
                records = {fqn.removeprefix(prefix): subject.records[fqn] for fqn in names}
                module = model.get_submodule(keeper)
                attach_masks(module, masks, records, mixin_for(module))
                if masks and isinstance(module, ParametrizationList):
                    holder, attr = holder_of(keeper)
                    attach_holder(model.get_submodule(holder), attr, module)
            for reader, found in readers.items():  # rule 6
                attach_transforms(model.get_submodule(reader), tuple(found))
            if isinstance(model, fx.GraphModule):  # rule 4
                _rewrite_graph(model, subject.records)
            # Rule 7.
            check_loading(model)
            note_masked(model, subject.records.values())
            invariants.verify(model)
        except Exception as error:  # a user's class may refuse a buffer, another class or a write in any way it likes
            _undo(model, subject.records, [*readers, *keepers], former)
            at = next(reversed(former), "the model")
            raise SparsifyError(
                f"the masks could not be inserted ({type(error).__name__}: {error}), at {at!r} or after it; leave what "
                "refuses them dense with the rule None. The model is as it was"
            ) from error
        return PassResult(subject=subject, changed=True)


def _undo(model: nn.Module, records: dict[str, WeightRecord], written: list[str], former: dict[str, Tensor]) -> None:
    """Take back what was written to the model so far."""
    if isinstance(model, fx.GraphModule):
        restore_graph(model)
    # Whatever of this was not done yet is passed over: it failed at any of the steps.
    for record in records.values():
        owner = model.get_submodule(record.site.owner)
        if record.sparse:
            owner._buffers.pop(record.site.attr + MASK_SUFFIX, None)
    for fqn, values in former.items():
        with contextlib.suppress(RuntimeError):  # the one that could not be written
            model.get_parameter(fqn).copy_(values)
    for name in written:
        module = model.get_submodule(name)
        weight_norm.guard(module, False, set(records_on(module)))
        if records_on(module):
            set_records(module, {})
    note_masked(model, ())
    for module in model.modules():
        make_plain(module)


def _by_reader(subject: Draft) -> dict[str, list[Transform]]:
    """The transforms of the weights that become sparse, by the module whose forward it is."""
    readers: dict[str, list[Transform]] = {}
    for finding in subject.findings:
        for transform in finding.transforms if subject.records[finding.site.fqn].sparse else ():
            readers.setdefault(transform.reader, []).append(transform)
    return readers


def _by_keeper(model: nn.Module, records: dict[str, WeightRecord]) -> dict[str, list[str]]:
    """Which module keeps the record of which weights: the owner, or the GraphModule above a bare container."""
    keepers: dict[str, list[str]] = {}
    for fqn, record in records.items():
        owner = model.get_submodule(record.site.owner)
        # What holds the weights of a traced model is a plain nn.Module that nobody calls: there is no class to swap.
        bare = isinstance(model, fx.GraphModule) and type(owner).forward is nn.Module.forward
        keepers.setdefault("" if bare else record.site.owner, []).append(fqn)
    return keepers


def _rewrite_graph(model: fx.GraphModule, records: dict[str, WeightRecord]) -> None:
    """Replace functional uses by mask-managed modules, and name the new nodes in the records."""
    nodes = {node.name: node for node in model.graph.nodes}
    for name, _, record in list(all_records(model)):
        if not record.sparse:
            continue
        for use in records[name].site.nodes:
            if nodes[use].op != "call_module":  # one that reads two masked weights has been replaced for the first
                nodes[use] = _to_module(model, nodes[use], name)
        names = tuple(nodes[use].name for use in records[name].site.nodes)
        keeper, key = _keeper_of(model, name)
        set_records(keeper, {**records_on(keeper), key: replace(record, site=replace(record.site, nodes=names))})
    model.graph.lint()
    model.recompile()


def _keeper_of(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    owner, _, attr = fqn.rpartition(".")
    module = model.get_submodule(owner)
    return (module, attr) if attr in records_on(module) else (model, fqn)


def _to_module(model: fx.GraphModule, node: fx.Node, fqn: str) -> fx.Node:
    with model.graph.inserting_before(node):
        # A call_function node could not be told from any other: a module has a name, and restore_graph finds it.
        mask = model.graph.get_attr(fqn + MASK_SUFFIX)
        new = model.graph.call_module(_contraction(model, node.target, fqn), node.args, {**node.kwargs, "mask": mask})
    _replace(model, node, new)
    return new


def _contraction(model: fx.GraphModule, function: Any, fqn: str) -> str:
    """The name of the child that calls ``function`` on this weight; one child serves all such nodes."""
    for name, child in model.named_children():
        if isinstance(child, MaskedContraction) and (child.function, child.weight_name) == (function, fqn):
            return name
    name = f"masked_{fqn.replace('.', '_')}"
    while hasattr(model, name):
        name += "_"
    model.add_submodule(name, MaskedContraction(function, fqn))
    return name


def _replace(model: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    model.graph.erase_node(old)


def restore_graph(model: fx.GraphModule) -> None:
    """Undo rule 4: every mask-managed ``call_module`` node calls its function again."""
    contractions = {name: child for name, child in model.named_children() if isinstance(child, MaskedContraction)}
    for node in list(model.graph.nodes):
        if node.op == "call_module" and node.target in contractions:
            function = contractions[node.target].function
            op = "call_method" if isinstance(function, str) else "call_function"
            kwargs = {name: value for name, value in node.kwargs.items() if name != "mask"}
            mask = node.kwargs["mask"]
            with model.graph.inserting_after(node):
                new = model.graph.create_node(op, function, node.args, kwargs)
            _replace(model, node, new)
            if not mask.users:  # torch.fx erases no node that is still read
                model.graph.erase_node(mask)
    for name in contractions:
        delattr(model, name)
    model.recompile()
