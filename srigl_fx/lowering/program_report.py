"""The report on a program that the passes have lowered.

Owns what is said of each weight. It must not know the steps of ``lower``.
"""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from srigl_fx.lowering.report import LayerReport, LoweringReport
from srigl_fx.masks.records import WeightRecord, all_records
from srigl_fx.passes.base import Note
from srigl_fx.passes.program import Program, Times
from srigl_fx.passes.sizes import leaf_names


def report_on(program: Program, notes: tuple[Note, ...]) -> LoweringReport:
    """What became of each weight of a program, with these notes of its passes."""
    layers = []
    asked = set(program.value_dtypes.values()) or {program.value_dtype}
    for layer in program.layers:
        weight = layer.weight.weight
        mask = layer.weight.record.site.to_matrix(layer.weight.mask)
        counts = mask.sum(1)
        fan_ins = set(counts[counts > 0].tolist())
        layers.append(
            LayerReport(
                fqn=layer.weight.fqn,
                shape=tuple(weight.shape),
                neurons=mask.shape[0],
                active=int((counts > 0).sum()),
                fan_in=fan_ins.pop() if len(fan_ins) == 1 else 0,
                kept=int(counts.sum()),
                decision=layer.decision,
                reason=layer.reason,
                bytes_before=weight.nbytes,
                bytes_after=layer.bytes_after,
                seconds=_plain(layer.times),
                estimates=_plain(layer.estimates),
                value_dtype=_name(layer.value_dtype),
                snr=layer.snr,
                calibrated=layer.calibrated and layer.value_dtype is torch.int8,
            )
        )
    return LoweringReport(
        layers=tuple(layers),
        others=tuple(
            _unmasked(fqn, owner, record) for fqn, owner, record in all_records(program.model) if not record.sparse
        ),
        capture=program.how,
        dynamic_batch=program.dynamic,
        free_sizes=program.sizes.told(pytree.tree_leaves((program.args, program.kwargs)), _leaf_names(program)),
        fixed_sizes=program.sizes.fixed,
        tried_sizes=tuple(dict(values) for values in program.sizes.tried),
        notes=notes,
        removals=() if program.removals is None else (program.removals,),
        value_dtype=_name(*asked) if len(asked) == 1 else "mixed",
    )


def _leaf_names(program: Program) -> list[str]:
    """What the inputs of the graph are called."""
    names = program.module.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    return leaf_names(names, (program.args, program.kwargs))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(times: Times) -> dict[int, dict[str, float]]:
    return {batch: {str(form): seconds for form, seconds in forms.items()} for batch, forms in times.items()}


def _unmasked(fqn: str, owner: nn.Module, record: WeightRecord) -> LayerReport:
    weight = getattr(owner, record.site.attr)
    neurons, fan_in = record.site.matrix_shape
    return LayerReport(
        fqn=fqn,
        shape=tuple(weight.shape),
        neurons=neurons,
        active=neurons,
        fan_in=fan_in,
        kept=weight.numel(),
        decision="dense",
        reason=record.reason,
        bytes_before=weight.nbytes,
        bytes_after=weight.nbytes,
    )
