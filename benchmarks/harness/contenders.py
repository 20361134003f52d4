"""Who computes a layer: each contender as a function of no arguments, over the same weights and the same input.

Owns how each peer is called at its best, and our operators. It must not know how times are taken. A contender that
cannot run, or whose output is wrong, gets its reason in the table in place of a time.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from harness.cells import (
    CSR_SCIPY,
    CSR_TORCH,
    DENSE_INT8,
    GATHER,
    GATHER_EAGER,
    OPENVINO_DENSE,
    OPENVINO_INT8,
    ORT_DENSE,
    ORT_INT8,
    OURS_BF16,
    OURS_INT8,
    OURS_ORT,
    OURS_ORT_BF16,
    OURS_ORT_INT8,
    OURS_TORCH,
    OURS_TORCH_BF16,
    OURS_TORCH_INT8,
    TORCH_DENSE,
)
from harness.layers import Array, Layer, condensed_onnx, dense_onnx, dense_weight, in_eight_bits
from harness.openvino_calls import NotAvailableError, openvino_call
from harness.timing import fastest
from srigl_fx.demo.dense_int8 import dynamic_int8, static_int8
from srigl_fx.errors import SriglError
from srigl_fx.runtime import register
from srigl_fx.runtime.format import CondensedWeight

Call = Callable[[], Any]

TOLERANCE = 1e-4  # of the largest output; sums are taken in another order, and DeepSparse's are fp32 too
BF16_TOLERANCE = 1e-2
INT8_TOLERANCE = 5e-2
GATHER_LIMIT = 1e10  # gathered elements: beyond, the formulation takes more than ten seconds a call
EAGER_LIMIT = 2e8  # the same, where all that is gathered is held in memory


def ort_session(model: bytes | str, threads: int, *, library: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if library:
        register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class LayerContenders:
    """The contenders of one layer at one sparsity; what does not depend on the batch is made once.

    Args:
        layer: What is computed.
        weight: Its weights.
        wanted: The names of the contenders.
        threads: Of each contender.
    """

    def __init__(self, layer: Layer, weight: CondensedWeight, wanted: tuple[str, ...], threads: int) -> None:
        self.layer, self.weight, self.wanted, self.threads = layer, weight, wanted, threads
        self.dense = torch.from_numpy(dense_weight(weight, layer))
        self.bias = torch.from_numpy(weight.bias)
        self.operands = [torch.from_numpy(getattr(weight, name)) for name in ("values", "indices", "active", "bias")]
        self.rounded = in_eight_bits(weight)
        # Made here, as what is made in inference mode is packed anew at each call.
        self.scales, self.bytes = torch.from_numpy(self.rounded.scales), torch.from_numpy(self.rounded.values)
        self.dense_model = dense_onnx(layer, weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self._csr = self.dense.to_sparse_csr() if CSR_TORCH in wanted else None
        self._sessions: dict[str, Any] = {}

    def calls(self, x: Array, only: str | None = None) -> tuple[dict[str, Call], dict[str, str]]:
        """The contenders of this process, or one, for the input ``x``, and why those that are missing are."""
        made: dict[str, Call] = {}
        missing: dict[str, str] = {}
        makers: Mapping[str, Callable[[Array], Call]] = {
            TORCH_DENSE: self._torch_dense,
            ORT_DENSE: self._ort_dense,
            OPENVINO_DENSE: lambda x: openvino_call(self.dense_model, {"x": x}, self.threads),
            ORT_INT8: self._ort_int8,
            OPENVINO_INT8: lambda x: openvino_call(static_int8(self.dense_model, {"x": x}), {"x": x}, self.threads),
            OURS_TORCH: self._ours_torch,
            OURS_ORT: self._ours_ort,
            OURS_TORCH_INT8: self._ours_torch_int8,
            OURS_ORT_INT8: self._ours_ort_int8,
            OURS_TORCH_BF16: self._ours_torch_bf16,
            OURS_ORT_BF16: self._ours_ort_bf16,
            CSR_TORCH: self._csr_torch,
            CSR_SCIPY: self._csr_scipy,
            GATHER: self._gather_compiled,
            GATHER_EAGER: self._gather_eager,
        }
        reference = self.expected(x)
        for name in self.wanted:
            if name in makers and only in (None, name):
                try:
                    call = makers[name](x)
                    problem = difference(call(), reference, tolerance_of(name))
                except NotAvailableError as error:
                    missing[name] = str(error)
                    continue
                if problem:
                    missing[name] = f"wrong: {problem}"
                else:
                    made[name] = call
        return made, missing

    def expected(self, x: Array) -> Tensor:
        """The right output."""
        output: Tensor = self._torch_dense(x)()
        return output

    def _torch_dense(self, x: Array) -> Call:
        layer, tensor = self.layer, torch.from_numpy(x)
        if layer.kernel:
            return lambda: functional.conv2d(tensor, self.dense, self.bias, layer.stride, layer.padding)
        return lambda: functional.linear(tensor, self.dense, self.bias)

    def _ort_dense(self, x: Array) -> Call:
        return self._session_call(ORT_DENSE, x, lambda: ort_session(self.dense_model, self.threads))

    def _session_call(self, name: str, x: Array, make: Callable[[], Any]) -> Call:
        if name not in self._sessions:
            self._sessions[name] = make()
        session, feeds = self._sessions[name], {"x": x}
        return lambda: session.run(None, feeds)[0]

    def _ours_torch(self, x: Array) -> Call:
        return self._condensed(torch.from_numpy(x), self.operands)

    def _ort_int8(self, x: Array) -> Call:
        """As ONNX Runtime's guide says: linear layers with dynamic scales, convolutions with static ones."""
        if not self.layer.kernel:
            return self._session_call(ORT_INT8, x, lambda: ort_session(dynamic_int8(self.dense_model), self.threads))
        session, feeds = ort_session(static_int8(self.dense_model, {"x": x}), self.threads), {"x": x}
        return lambda: session.run(None, feeds)[0]

    def _ours_torch_int8(self, x: Array) -> Call:
        return self._condensed(torch.from_numpy(x), [self.bytes, *self.operands[1:]], scales=self.scales)

    def _ours_ort_int8(self, x: Array) -> Call:
        model = condensed_onnx(self.layer, self.rounded)
        return self._session_call(OURS_ORT_INT8, x, lambda: ort_session(model, self.threads, library=True))

    def _condensed(self, x: Tensor, operands: list[Tensor], **settings: Tensor) -> Call:
        layer = self.layer
        if layer.kernel:
            geometry = list(layer.weight_shape), [layer.stride] * 2, [layer.padding] * 2, [1, 1], 1
            conv = torch.ops.srigl_fx.condensed_conv.default
            return lambda: conv(x, *operands, *geometry, **settings)
        linear, inputs = torch.ops.srigl_fx.condensed_linear.default, layer.inputs
        return lambda: linear(x, *operands, inputs, **settings)

    def _ours_ort(self, x: Array) -> Call:
        make = lambda: ort_session(condensed_onnx(self.layer, self.weight), self.threads, library=True)  # noqa: E731
        return self._session_call(OURS_ORT, x, make)

    def _ours_torch_bf16(self, x: Array) -> Call:
        values, *rest = self.operands
        call = self._condensed(torch.from_numpy(x), [values.bfloat16(), *rest])
        try:
            call()
        except SriglError as error:
            raise NotAvailableError(f"not available: {error}") from error
        return call

    def _ours_ort_bf16(self, x: Array) -> Call:
        def make() -> Any:
            try:
                return ort_session(condensed_onnx(self.layer, self.weight, bf16=True), self.threads, library=True)
            except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
                raise NotAvailableError(f"not available: {error}") from error

        return self._session_call(OURS_ORT_BF16, x, make)

    def _csr_torch(self, x: Array) -> Call:
        csr, bias, tensor = self._csr, self.bias, torch.from_numpy(x)
        assert csr is not None
        if len(x) == 1:
            vector = tensor[0]
            return lambda: (csr @ vector + bias)[None]
        column, feature_major = bias[:, None], tensor.t().contiguous()
        ways = {
            "weight @ x.T": lambda: torch.addmm(column, csr, tensor.t()).t(),
            "weight @ x, features first": lambda: torch.addmm(column, csr, feature_major).t(),
        }
        return fastest(ways)[1]

    def _csr_scipy(self, x: Array) -> Call:
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise NotAvailableError("not available: pip install scipy") from error
        csr, bias = csr_array(self.dense.numpy()), self.weight.bias
        transposed, feature_major = csr.T.tocsr(), np.ascontiguousarray(x.T)
        if len(x) == 1:
            return lambda: (csr @ x[0] + bias)[None]
        ways = {
            "weight @ x.T": lambda: (csr @ x.T).T + bias,
            "weight @ x, features first": lambda: (csr @ feature_major + bias[:, None]).T,
            "x @ weight.T": lambda: x @ transposed + bias,
        }
        return fastest(ways)[1]

    def _gathered(self, x: Array) -> tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], tuple[Tensor, ...]]:
        elements = len(x) * self.weight.values.size
        if elements > GATHER_LIMIT:
            raise NotAvailableError(f"not run: {elements / 1e9:.1f}e9 gathered elements a call")
        values, indices = self.operands[:2]
        return _gather, (torch.from_numpy(x), indices.to(torch.int64), values, self.bias)

    def _gather_compiled(self, x: Array) -> Call:
        function, operands = self._gathered(x)
        if not has_compiler():
            raise NotAvailableError("not available: torch.compile finds no C++ compiler; install one or set CXX")
        torch.compiler.reset()
        compiled = torch.compile(function, dynamic=False)
        return lambda: compiled(*operands)

    def _gather_eager(self, x: Array) -> Call:
        function, operands = self._gathered(x)
        if len(x) * self.weight.values.size > EAGER_LIMIT:
            raise NotAvailableError("not run: what it gathers takes gigabytes")
        return lambda: function(*operands)


def has_compiler() -> bool:
    """Whether torch.compile can make code for the CPU here."""
    return any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))


def tolerance_of(contender: str) -> float:
    """Of the largest output."""
    if contender in (*DENSE_INT8, *OURS_INT8):
        return INT8_TOLERANCE
    return BF16_TOLERANCE if contender in OURS_BF16 else TOLERANCE


def _gather(x: Tensor, indices: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return (x[:, indices] * values).sum(-1) + bias


def difference(output: Any, reference: Tensor, tolerance: float) -> str:
    """What is wrong with an output, or "" where it agrees with the reference."""
    found = torch.as_tensor(np.ascontiguousarray(output) if isinstance(output, np.ndarray) else output)
    if found.shape != reference.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(reference.shape)}"
    error = float((found - reference).abs().max() / reference.abs().max())
    return "" if error <= tolerance else f"relative error {error:.1e}"
