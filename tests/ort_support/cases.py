"""The cases that every host, instruction set and linker must get right."""

from pathlib import Path

import numpy as np

from ort_support.models import Array, Node, conv, linear

# Name -> the node and the shapes of x to run it with.
CASES: dict[str, tuple[Node, tuple[tuple[int, ...], ...]]] = {
    "linear": (linear(), ((1, 10), (7, 10), (24, 10), (70, 10), (0, 10))),
    "linear_int32": (linear(index_type="int32"), ((1, 10), (130, 10))),
    "linear_3d": (linear(x_rank=3), ((2, 3, 10), (0, 3, 10), (5, 13, 10))),
    "linear_1d": (linear(x_rank=1), ((10,),)),
    "linear_full": (linear(k=10, n_active=6), ((3, 10), (64, 10))),
    "linear_all_ablated": (linear(k=0, n_active=0), ((3, 10), (64, 10))),
    "linear_fan_in_0": (linear(k=0), ((3, 10), (64, 10))),
    "linear_no_sample": (linear(x_rank=3), ((3, 0, 10),)),
    "conv2d_no_sample": (conv(), ((0, 4, 5, 6),)),
    "linear_wide": (linear(n=300, in_features=768, k=77, n_active=280), ((1, 768), (20, 768), (100, 768))),
    "linear_wide_int32": (
        linear(n=300, in_features=768, k=77, n_active=280, index_type="int32"),
        ((1, 768), (100, 768)),
    ),
    # Some other node of its operator permutes; a fallback that swapped rows and columns here would have 10 of each.
    "linear_permuted_elsewhere": (
        linear().with_attributes(x_perm=[0, 1], y_perm=[0, 1]).replace(used=("x_perm", "y_perm")),
        ((10, 10), (7, 10), (0, 10)),
    ),
    "conv1d": (conv(kernel=(3,), strides=[2], pads=[1, 0], dilations=[2]), ((2, 4, 9), (0, 4, 9))),
    "conv2d": (conv(), ((1, 4, 5, 6),)),
    "conv2d_grouped": (
        conv(strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2], group=2),
        ((2, 4, 9, 8), (0, 4, 9, 8)),
    ),
    "conv2d_depthwise": (conv(n=4, group=4, k=2, pads=[1, 1, 1, 1]), ((2, 4, 5, 6),)),
    "conv2d_int32": (conv(pads=[2, 2, 0, 1], strides=[3, 2], index_type="int32"), ((2, 4, 9, 8),)),
    "conv2d_full": (conv(k=24, n_active=6, pads=[1, 1, 1, 1]), ((1, 4, 5, 6),)),
    "conv2d_all_ablated": (conv(k=0, n_active=0), ((2, 4, 5, 6),)),
    "conv2d_wide": (conv(n=40, channels=32, kernel=(3, 3), k=30, n_active=37, pads=[1] * 4), ((3, 32, 17, 19),)),
    "conv2d_1x1_padded": (conv(kernel=(1, 1), k=2, pads=[1, 1, 1, 1]), ((1, 4, 3, 3),)),
    "conv3d": (conv(kernel=(3, 2, 2), pads=[1, 0, 1, 2, 1, 0], strides=[1, 2, 1]), ((2, 4, 5, 6, 7),)),
}
_GIVEN = {  # samples of normal numbers, of which a few are out of reach
    f"{name}_int8_given": (CASES[name][0].rounding_with(scale, offset), CASES[name][1])
    for name, scale, offset in (
        ("linear", 2 / 127, 128),
        ("linear_3d", 2 / 255, 0),
        ("linear_wide", 3 / 127, 128),
        ("conv1d", 2 / 255, 0),
        ("conv2d_grouped", 2 / 127, 128),
        ("conv2d_wide", 3 / 127, 128),
    )
}
CASES |= {f"{name}_int8": (node.of_eight_bits(), shapes) for name, (node, shapes) in CASES.items()} | _GIVEN


def sample(name: str, shape: tuple[int, ...]) -> Array:
    """A reproducible input."""
    return np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)


def tolerance(node: Node) -> float:
    """What float32 sums of this node's length may be off by."""
    k = max(1, int(node.weights["values"].shape[-1]))
    return 2e-6 * k


def write_cases(folder: Path) -> list[str]:
    """Write each case's model with its largest input and expected output, as ``serve.py`` reads them."""
    for name, (node, shapes) in CASES.items():
        x = sample(name, max(shapes, key=np.prod))
        (folder / f"{name}.onnx").write_bytes(node.model().SerializeToString())
        np.savez(folder / f"{name}.npz", x=x, expected=node.expected(x))
    bad = linear()
    indices = bad.weights["indices"].copy()
    indices[0, -1] = 10
    (folder / "bad_index.onnx").write_bytes(bad.with_weights(indices=indices).model().SerializeToString())
    return list(CASES)
