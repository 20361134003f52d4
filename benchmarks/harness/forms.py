"""A trained network in the forms that its weights can be stored in, each as a function of its inputs.

Owns how ONNX Runtime is asked for dense int8 and for ours, and what is kept of a lowering report. It must not know the
networks, or what their outputs mean.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.demo.dense_int8 import dynamic_int8, static_int8
from srigl_fx.lowering.report import LoweringReport
from srigl_fx.passes.check_rounding import CheckRounding
from srigl_fx.passes.pipelines import CONDENSING, LOWERING
from srigl_fx.runtime import register

Outputs = Callable[..., Tensor]
# The ratio in dB of a weight that was to be int8, None where there is none; "int8", the same with the inputs' scale
# given, or what it is instead; why.
Layers = dict[str, tuple[float | None, str, str]]
GIVEN = "int8, given scale"

LOWERED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
GIVEN_SCALES, CAREFUL, IN_ORT, DENSE_INT8 = "int8_given", "int8_careful", "int8_ort", "dense_int8"
CAREFUL_SNR = 36.0  # in dB: what a layer must have in int8 to be so in the careful form
TITLES = {
    **{name: name for name in LOWERED},
    GIVEN_SCALES: "int8, given scales",
    CAREFUL: f"int8, layers below {CAREFUL_SNR:g} dB in float32",
    IN_ORT: "int8, in ONNX Runtime",
    DENSE_INT8: "dense int8 of ONNX Runtime",
}

_CAREFULLY = tuple(
    CheckRounding(CAREFUL_SNR) if isinstance(step, CheckRounding) else step for step in (*LOWERING, *CONDENSING)
)


def form(
    name: str,
    model: nn.Module,
    args: tuple[Tensor, ...],
    *,
    calibration: Sequence[tuple[Tensor, ...]] = (),
    convolutional: bool = False,
) -> tuple[Outputs, LoweringReport | None]:
    """A network in one form, and what lowering says of it, if it was lowered.

    Args:
        name: One of :data:`TITLES`.
        model: With masks, in eval mode.
        args: Example inputs, whose leading size is free.
        calibration: Inputs that the scales are taken from where these are given.
        convolutional: Whether dense int8 has static scales, from the examples, as ONNX Runtime's guide says.
    """
    if name == DENSE_INT8:
        return _dense_int8(model, args, convolutional=convolutional), None
    # Nothing is verified: the caller compares outputs, of more inputs than these.
    lowered = sx.lower(
        model,
        args,
        min_speedup=0,
        verify=False,
        value_dtype=LOWERED.get(name, torch.int8),
        calibration=calibration if name == GIVEN_SCALES else None,
        passes=_CAREFULLY if name == CAREFUL else LOWERING,
    )
    if name != IN_ORT:
        return lowered, lowered.report
    with tempfile.TemporaryDirectory(prefix="srigl_fx_forms_") as folder:
        file = Path(folder, "model.onnx")
        sx.export_onnx(lowered, file, args, verify=False, min_speedup=0)
        options = onnxruntime.SessionOptions()
        register(options)
        return _in_ort(file.read_bytes(), options), lowered.report


def _dense_int8(model: nn.Module, args: tuple[Tensor, ...], *, convolutional: bool) -> Outputs:
    """The weights with their zeros, exported by PyTorch, then quantised by ONNX Runtime.

    Sums are those of a processor with instructions for bytes (VNNI), on any: without them ONNX Runtime's sums of
    unsigned times signed bytes are cut off at 16 bits. So weights of matrix products are unsigned, and convolutions
    of rounded numbers are computed as the file says, in float32.
    """
    sizes = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    proto = program.model_proto
    del proto.graph.value_info[:]  # shapes of weights, which preparing the file for quantisation transposes
    dense = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    if not convolutional:
        return _in_ort(dynamic_int8(dense, signed_weights=False), options)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feeds = {port.name: one.numpy() for port, one in zip(proto.graph.input, args, strict=True)}
    return _in_ort(static_int8(dense, feeds), options)


def _in_ort(model: bytes, options: onnxruntime.SessionOptions) -> Outputs:
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]

    def outputs(*inputs: Tensor) -> Tensor:
        feeds = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return outputs


def layers(lowering: LoweringReport) -> Layers:
    """What became of each weight, those without masks included."""
    return {
        layer.fqn: (
            None if layer.snr is None else round(layer.snr, 2),
            GIVEN if layer.calibrated else layer.value_dtype if layer.decision == "condensed" else "dense",
            layer.reason,
        )
        for layer in (*lowering.layers, *lowering.others)
    }


def bytes_share(lowering: LoweringReport | None) -> float:
    """Bytes that the masked layers take, of those that they take densely in float32; nan where nothing was lowered."""
    return float("nan") if lowering is None else round(lowering.bytes_after / lowering.bytes_before, 5)
