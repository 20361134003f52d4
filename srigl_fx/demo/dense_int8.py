"""Dense ONNX models in eight bits, by ONNX Runtime's own tools: what a sparse model has to beat.

Owns how these tools are called at their best; the benchmarks ask it, too. It must not know what the models compute.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from srigl_fx.runtime.cpu.kernels.isa import ARCHITECTURE, ARM, host_target

Feeds = Mapping[str, NDArray[Any]]


def _sums_are_whole() -> bool:
    """Whether no sum of ONNX Runtime's own kernels is cut off on this processor, whatever bytes it is made of."""
    return ARCHITECTURE == ARM or "vnni" in host_target()


def dynamic_int8(model: bytes, *, signed_weights: bool | None = None) -> bytes:
    """A model whose matrix products take weights of eight bits, and round their inputs to as many at each call.

    Signed weights are faster, and the usual choice on Arm and with VNNI. Elsewhere some of their sums are cut
    off, by an eighth of the largest output in a small layer, those of unsigned ones nowhere.

    Args:
        model: The bytes of an ONNX file.
        signed_weights: Or unsigned ones; None for what suits this processor.
    """
    if signed_weights is None:
        signed_weights = _sums_are_whole()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kind = QuantType.QInt8 if signed_weights else QuantType.QUInt8
    return _rewritten(model, lambda given, made: quantize_dynamic(given, made, weight_type=kind))


def static_int8(model: bytes, feeds: Feeds) -> bytes:
    """A model with pairs of QuantizeLinear and DequantizeLinear, whose scales are those of one batch (QDQ).

    On an x86-64 without VNNI weights have seven bits, as ONNX Runtime's guide says: sums would be cut off.

    Args:
        model: The bytes of an ONNX file.
        feeds: The batch, by the model's inputs.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneBatch(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([dict(feeds)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    return _rewritten(
        model,
        lambda given, made: quantize_static(
            given,
            made,
            OneBatch(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=not _sums_are_whole(),
        ),
    )


def _rewritten(model: bytes, rewrite: Callable[[str, str], object]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="srigl_fx_int8_") as folder:
        given, prepared, made = (Path(folder, name) for name in ("given.onnx", "prepared.onnx", "made.onnx"))
        given.write_bytes(model)
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # What ONNX Runtime asks for first: shapes are inferred, and what can be fused is.
        quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
        _forget_shapes_of_constants(prepared)
        rewrite(str(prepared), str(made))
        return made.read_bytes()


def _forget_shapes_of_constants(path: Path) -> None:
    """Take away what a file says of its constants' shapes beside the constants themselves, as PyTorch's exporter does.

    The tools transpose the weight of a Gemm and leave that as it was; then they refuse their own model.
    """
    import onnx

    model = onnx.load(path)
    constants = {tensor.name for tensor in model.graph.initializer}
    left = [entry for entry in model.graph.value_info if entry.name not in constants]
    if len(left) < len(model.graph.value_info):
        del model.graph.value_info[:]
        model.graph.value_info.extend(left)
        onnx.save(model, path)
