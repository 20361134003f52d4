"""The torch operators: right against the oracle, strict about their operands, at home in torch's tool chain."""

import shutil
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import operands, random_condensed
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime import ops, reference, validation  # noqa: F401 - ops registers the operators

linear = torch.ops.srigl_fx.condensed_linear
conv2d = torch.ops.srigl_fx.condensed_conv
CONV = {"weight_shape": [6, 2, 3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}


def conv_arguments(**changes: Any) -> tuple[Any, ...]:
    return tuple({**CONV, **changes}.values())


@pytest.mark.parametrize("ablated", [0, 5, 19, 20])
@pytest.mark.parametrize("k", [1, 7, 33])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (3,), (23,), (24,), (130,), (2, 0), (2, 5), (2, 3, 11)])
def test_linear_matches_the_oracle(leading: tuple[int, ...], k: int, ablated: int) -> None:
    weight = random_condensed(20, 33, k, ablated)
    x = torch.randn(*leading, 33)
    y = linear(x, *operands(weight), 33)
    expected = reference.condensed_linear(x.numpy(), weight.values, weight.indices, weight.active, weight.bias)
    assert y.shape == (*leading, 20)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=2e-6)
    dead = np.setdiff1d(np.arange(20), weight.rows)
    np.testing.assert_array_equal(y.numpy()[..., dead], expected[..., dead])


@pytest.mark.parametrize("batch", [2, 40])
def test_linear_with_wide_indices(batch: int) -> None:
    weight = random_condensed(4, 70000, 50)
    assert weight.indices.dtype == np.int32
    x = torch.randn(batch, 70000)
    expected = reference.condensed_linear(x.numpy(), weight.values, weight.indices, weight.active, weight.bias)
    np.testing.assert_allclose(linear(x, *operands(weight), 70000).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 40])
def test_linear_of_strided_operands(batch: int) -> None:
    weight = random_condensed(8, 12, 5, 2)
    values, indices, active, bias = operands(weight)
    x = torch.randn(12, batch).t()
    gaps = torch.stack((values, values), -1)[..., 0]
    assert not x.is_contiguous()
    assert not gaps.is_contiguous()
    torch.testing.assert_close(
        linear(x, gaps, indices, active, bias, 12), linear(x.contiguous(), values, indices, active, bias, 12)
    )


def test_nan_and_infinity_reach_only_the_neurons_that_read_them() -> None:
    weight = random_condensed(16, 10, 3)
    for special in (float("nan"), float("inf")):
        x = torch.randn(1, 10)
        x[0, 4] = special
        touched = torch.from_numpy(weight.to_dense()[1][:, 4])
        assert torch.equal(~linear(x, *operands(weight), 10)[0].isfinite(), touched)


@pytest.mark.parametrize("ablated", [0, 2, 6])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((3, 2), (4, 0), (2, 3)), ((1, 2), (5, 5), (1, 2))],
)
def test_conv_matches_the_oracle(
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    batch: int,
    ablated: int,
) -> None:
    weight = random_condensed(6, 2 * 3 * 2, 4, ablated)
    x = torch.randn(batch, 2 * groups, 9, 8)
    y = conv2d(x, *operands(weight), [6, 2, 3, 2], stride, padding, dilation, groups)
    expected = reference.condensed_conv(
        x.numpy(),
        weight.values,
        weight.indices,
        weight.active,
        weight.bias,
        weight_shape=(6, 2, 3, 2),
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=groups,
    )
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=2e-6)


def test_conv_of_channels_last_input() -> None:
    weight = random_condensed(6, 18, 5)
    x = torch.randn(2, 4, 7, 7)
    y = conv2d(x.to(memory_format=torch.channels_last), *operands(weight), *conv_arguments())
    torch.testing.assert_close(y, conv2d(x, *operands(weight), *conv_arguments()))


@pytest.mark.parametrize(
    ("position", "operand", "message"),
    [
        (0, torch.ones(2, 5), r"x must be \(..., 6\)"),
        (0, torch.tensor(1.0), r"x must be \(..., 6\)"),
        (0, torch.ones(2, 6).double(), "x must be float32"),
        (0, torch.ones(2, 6).bfloat16(), "autocast"),
        (1, torch.ones(4, 3), "n_active"),
        (1, torch.ones(4, 2).double(), "must be float32"),
        (2, torch.zeros(4, 2, dtype=torch.int64), "uint16 or int32"),
        (2, torch.tensor([[0, 6]] * 4, dtype=torch.int32), "index of 6"),
        (2, torch.tensor([[-2, 1]] * 4, dtype=torch.int32), "index of -2"),
        (2, torch.tensor([[0, 65535]] * 4, dtype=torch.int32).to(torch.uint16), "index of 65535"),
        (3, torch.tensor([0, 1, 2, 5], dtype=torch.int32), "active row of 5"),
        (3, torch.tensor([0, 1, 2], dtype=torch.int32), "n_active"),
        (3, torch.tensor([0, 1, 1, 2], dtype=torch.int32), "not ascending"),
        (4, torch.ones(5, 1), "n_active"),
        (4, torch.ones(5).half(), "must be float32"),
    ],
)
def test_linear_refuses(position: int, operand: Tensor, message: str) -> None:
    arguments = [torch.ones(2, 6), *operands(random_condensed(5, 6, 2, 1))]
    linear(*arguments, 6)
    arguments[position] = operand
    with pytest.raises(FormatError, match=message):
        linear(*arguments, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_shape": [6, 2, 9]}, "must be"),
        ({"weight_shape": [6, 2, 0, 3]}, "must be"),
        ({"weight_shape": [6, 2, 2, 3]}, "index of"),
        ({"weight_shape": [7, 2, 3, 3]}, "needs"),
        ({"stride": [0, 1]}, "at least 1"),
        ({"stride": [1]}, "2 numbers"),
        ({"padding": [-1, 0]}, "at least 0"),
        ({"dilation": [4, 4]}, "leave no output of"),
        ({"groups": 1}, "needs 2"),
        ({"groups": 0}, "at least 1"),
    ],
)
def test_conv_refuses(changes: dict[str, Any], message: str) -> None:
    weight = random_condensed(6, 18, 15)
    x = torch.randn(1, 4, 5, 5)
    conv2d(x, *operands(weight), *conv_arguments())
    with pytest.raises(FormatError, match=message):
        conv2d(x, *operands(weight), *conv_arguments(**changes))


@pytest.mark.parametrize("position", range(6))
def test_operands_on_different_devices_are_refused(position: int) -> None:
    parts = [torch.randn(2, 5), *operands(random_condensed(4, 5, 2)), torch.randn(2, 4)]
    parts[position] = parts[position].to("meta")
    x, values, indices, active, bias, residual = parts
    with pytest.raises(FormatError, match="condensed_linear: operands are on different devices, cpu and meta; move"):
        linear(x, values, indices, active, bias, 5, residual)
    if position < 4:
        with pytest.raises(FormatError, match="condensed_linear_gradients: operands are on different devices"):
            torch.ops.srigl_fx.condensed_linear_gradients(residual, x, values, indices, active, True, True)
    parts = [torch.randn(1, 4, 5, 5), *operands(random_condensed(6, 18, 2)), torch.randn(1, 6, 5, 5)]
    parts[position] = parts[position].to("meta")
    with pytest.raises(FormatError, match="condensed_conv: operands are on different devices, cpu and meta; move"):
        conv2d(*parts[:5], *conv_arguments(), parts[5])


def test_indices_are_checked_again_once_they_change() -> None:
    values, _, active, bias = operands(random_condensed(4, 6, 2))
    indices = torch.tensor([[0, 5]] * 4, dtype=torch.int32)
    x = torch.randn(1, 6)
    linear(x, values, indices, active, bias, 6)
    with pytest.raises(FormatError, match=r"index of 5 is not in 0\.\.4"):
        linear(x[:, :5], values, indices, active, bias, 5)
    indices[0, 1] = 6
    with pytest.raises(FormatError, match="index of 6"):
        linear(x, values, indices, active, bias, 6)
    indices[0, 1] = 4
    linear(x, values, indices, active, bias, 6)
    indices.data = torch.tensor([[0, 99]] * 4, dtype=torch.int32)
    with pytest.raises(FormatError, match="index of 99"):
        linear(x, values, indices, active, bias, 6)
    active[3] = 7
    indices.data = torch.tensor([[0, 1]] * 4, dtype=torch.int32)
    with pytest.raises(FormatError, match="active row of 7"):
        linear(x, values, indices, active, bias, 6)


def test_inference_tensors_are_checked_every_time() -> None:
    with torch.inference_mode():
        indices = torch.tensor([[0, 5]] * 4, dtype=torch.int32)
        values, _, active, bias = operands(random_condensed(4, 6, 2))
        linear(torch.ones(1, 6), values, indices, active, bias, 6)
        indices[1, 1] = 8
        with pytest.raises(FormatError, match="index of 8"):
            linear(torch.ones(1, 6), values, indices, active, bias, 6)


def test_the_check_keeps_nothing_alive() -> None:
    before = len(validation._checked)
    weight = operands(random_condensed(4, 6, 2))
    linear(torch.ones(1, 6), *weight, 6)
    assert len(validation._checked) == before + 1
    del weight
    assert len(validation._checked) == before


@pytest.mark.parametrize("batch", [1, 30])
def test_linear_gradients(batch: int) -> None:
    weight = random_condensed(7, 9, 3, 2)
    values, indices, active, bias = operands(weight)
    x = torch.randn(batch, 9, requires_grad=True)
    grad = torch.randn(batch, 7)
    got = torch.autograd.grad(
        linear(x, values.requires_grad_(), indices, active, bias.requires_grad_(), 9), (x, values, bias), grad
    )
    dense = torch.from_numpy(weight.to_dense()[0]).requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, dense, bias), grad)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1][active.long()].gather(1, indices.long()))
    torch.testing.assert_close(got[2], expected[2])


def test_conv_gradients() -> None:
    weight = random_condensed(6, 18, 5, 1)
    values, indices, active, bias = operands(weight)
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    y = conv2d(
        x,
        values.requires_grad_(),
        indices,
        active,
        bias.requires_grad_(),
        *conv_arguments(stride=[2, 1], padding=[0, 2]),
    )
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, values, bias), grad)
    dense = torch.from_numpy(weight.to_dense()[0]).reshape(6, 2, 3, 3).requires_grad_()
    expected = torch.autograd.grad(
        torch.nn.functional.conv2d(x, dense, bias, (2, 1), (0, 2), groups=2), (x, dense, bias), grad
    )
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1].reshape(6, 18)[active.long()].gather(1, indices.long()))
    torch.testing.assert_close(got[2], expected[2])


def test_only_the_wanted_gradients() -> None:
    weight = operands(random_condensed(7, 9, 3))
    bias = weight[3].requires_grad_()
    linear(torch.randn(2, 9), *weight, 9).sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((7,), 2.0))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, as it compares
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    values, indices, active, bias = operands(random_condensed(6, 18, 5, 1))
    values.requires_grad_(requires_grad)
    torch.library.opcheck(linear.default, (torch.randn(3, 18), values, indices, active, bias, 18))
    torch.library.opcheck(conv2d.default, (torch.randn(2, 4, 5, 5), values, indices, active, bias, *conv_arguments()))


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weights = {"conv": random_condensed(6, 18, 5, 1), "fc": random_condensed(5, 6, 3, 1)}
        for name, weight in weights.items():
            for i, tensor in enumerate(operands(weight)):
                self.register_buffer(f"{name}{i}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        conv = [self.get_buffer(f"conv{i}") for i in range(4)]
        fc = [self.get_buffer(f"fc{i}") for i in range(4)]
        y: Tensor = conv2d(x, *conv, *conv_arguments())
        out: Tensor = linear(y.relu().permute(0, 2, 3, 1), *fc, 6)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch(strict: bool) -> None:
    net = _Net()
    program = torch.export.export(
        net, (torch.randn(2, 4, 5, 5),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict
    )
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 5, 5)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"),
                pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit, as inductor imports it
            ],
        ),
    ],
)
def test_compile_fullgraph(backend: str) -> None:
    net = _Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 5, 30):
        x = torch.randn(batch, 4, 5, 5)
        torch.testing.assert_close(compiled(x), net(x))


def test_eight_threads_at_once() -> None:
    weight = random_condensed(64, 200, 20)
    tensors = operands(weight)
    inputs = [torch.randn(1 + 9 * i, 200) for i in range(8)]
    expected = [x @ torch.from_numpy(weight.to_dense()[0]).t() + tensors[3] for x in inputs]
    worst = [1.0] * 8
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        worst[i] = max(float((linear(inputs[i], *tensors, 200) - expected[i]).abs().max()) for _ in range(100))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-4


@pytest.mark.long
def test_importing_the_ops_leaves_numba_alone() -> None:
    code = "import sys, srigl_fx.runtime.ops; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("padding", "message"), [([2, 2], "less than stride or dilation"), ([-1, 0], "output_padding at least 0")]
)
def test_output_padding_that_pytorch_refuses(padding: list[int], message: str) -> None:
    values, indices, active, bias = (
        torch.randn(4, 2),
        torch.tensor([[0, 1]] * 4).to(torch.uint16),
        torch.arange(4),
        torch.zeros(4),
    )
    settings = [4, 3, 2, 2], [2, 2], [0, 0], [1, 1], 1, None, "none", True, padding
    with pytest.raises(FormatError, match=message):
        torch.ops.srigl_fx.condensed_conv(torch.randn(1, 3, 5, 5), values, indices, active.int(), bias, *settings)
