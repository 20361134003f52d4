"""Embedding tables in 8 or 16 bits: how they are rounded, and files that hold them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.tables import rounded, rounded_reference, with_rounded_tables


class Reader(nn.Module):
    """Words and places are looked up; the head may be tied with the words."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(300, 32, padding_idx=0), nn.Embedding(20, 32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 300, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        found = self.words(words) + self.places(torch.arange(words.shape[1]))
        head: Tensor = self.head(torch.tanh(self.mix(found)))
        return head


WORDS = (torch.arange(21).reshape(3, 7) * 13 % 300,)


def reader(tied: bool = False) -> Any:
    return sx.sparsify(randomise(Reader(tied)), sparsity=0.75, rules={} if tied else {"head": None}).eval()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rows_are_rounded_as_the_reference_does(scale: float) -> None:
    table = scale * torch.randn(37, 13, generator=torch.Generator().manual_seed(0))
    table[3] = 0.0
    table[4, 5] = 1e-45
    table[5] = 1e-42  # no scale of its own: denormal
    table[6, 0] *= 1000
    values, scales = rounded(table)
    expected, wanted = rounded_reference(table.numpy())
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scales, wanted)
    assert ((values * scales - table).abs() <= scales * 0.5001).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, onnx.TensorProto.INT8),
        (torch.float16, onnx.TensorProto.FLOAT16),
        (torch.bfloat16, onnx.TensorProto.BFLOAT16),
    ],
)
def test_a_file_holds_small_tables_and_any_length(
    dtype: torch.dtype, stored: int, tmp_path: Path, library: Path
) -> None:
    model, path = reader(), tmp_path / "model.onnx"
    shapes = {"words": {0: "batch", 1: "length"}}
    report = sx.export_onnx(model, path, WORDS, min_speedup=0, embedding_dtype=dtype, dynamic_shapes=shapes)
    assert report.library_error is not None
    assert report.fallback_error is not None
    assert max(report.library_error, report.fallback_error) < 1e-5  # against the rounded tables
    words_in_file = [tensor for tensor in onnx.load(path).graph.initializer if "words" in tensor.name]
    assert [tensor.data_type for tensor in words_in_file if tensor.dims[1] > 1] == [stored]
    session = onnxruntime.InferenceSession(path)  # a stock one
    words = torch.arange(22).reshape(2, 11) * 7 % 300
    (found,) = session.run(None, {"words": words.numpy()})
    with torch.no_grad():
        snr = signal_to_noise(model(words), torch.from_numpy(found))
    assert 30 < snr < 80


def lowered(model: Any, **settings: Any) -> Any:
    return sx.lower(model, WORDS, min_speedup=0, **settings)


@pytest.mark.slow
def test_tables_that_something_else_reads_stay() -> None:
    # Of a fixed length: what is looked up for places is a constant.
    found = lowered(reader(tied=True), dynamic_shapes={"words": {0: "batch"}})
    assert len(found.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)) == 1
    rounded = with_rounded_tables(found, torch.int8, WORDS, {})
    assert [(note.where, note.reason) for note in rounded.report.notes if note.by == "embedding_dtype"] == [
        ("head.weight", "the embedding table stays in float32: something else than a lookup reads it too")
    ]
    assert torch.equal(rounded(*WORDS), found(*WORDS))


@torch.no_grad()
@pytest.mark.slow
def test_lower_rounds_tables_and_its_file_holds_them(tmp_path: Path) -> None:
    model = reader()
    plain, found = lowered(model), lowered(model, embedding_dtype=torch.int8)
    assert {note.where: note.reason for note in found.report.notes if note.by == "embedding_dtype"} == {
        "words.weight": "the embedding table is stored in int8, 10.55 KiB in place of 37.50 KiB",
        "places.weight": "the embedding table is stored in int8, 720 B in place of 2.50 KiB",
    }
    assert 30 < signal_to_noise(plain(*WORDS), found(*WORDS)) < 80
    found.save(tmp_path / "model.lowered")
    again = sx.load_lowered(tmp_path / "model.lowered")
    assert torch.equal(again(*WORDS), found(*WORDS))
    assert str(again.report) == str(found.report)
    tables = {name: buffer.dtype for name, buffer in again.named_buffers() if buffer.shape == (300, 32)}
    assert list(tables.values()) == [torch.int8]
    assert [name for name, one in again.named_parameters() if one.shape == (300, 32)] == ["head.weight"]


def test_a_model_of_parts_keeps_its_tables() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Reader()

        def forward(self, words: Tensor) -> Tensor:
            return self.inner(words) if float(words[0, 0].item()) < 1e9 else words

    model = sx.sparsify(randomise(Parts()), sparsity=0.75).eval()
    with pytest.raises(LoweringError, match="not one graph cannot have its embedding tables rounded"):
        lowered(model, embedding_dtype=torch.int8)


@torch.no_grad()
@pytest.mark.slow
def test_what_is_given_stays_and_what_cannot_be_rounded_is_named() -> None:
    model = reader()
    found = lowered(model)
    before = found(*WORDS)
    assert with_rounded_tables(found, torch.float32, WORDS, {}) is found
    after = with_rounded_tables(found, torch.int8, WORDS, {})
    assert torch.equal(found(*WORDS), before)
    assert 30 < signal_to_noise(before, after(*WORDS)) < 80
    with torch.no_grad():
        model.words.weight[5] = 1e6
    with pytest.raises(LoweringError, match=r"too large for torch\.float16"):
        with_rounded_tables(lowered(model), torch.float16, WORDS, {})
    with torch.no_grad():
        model.words.weight[5] = torch.nan
    with pytest.raises(LoweringError, match=r"words\.weight holds numbers that are not finite"):
        with_rounded_tables(found, torch.int8, WORDS, {})


@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, "int8", None])
def test_other_types_are_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="embedding_dtype must be one of"):
        sx.export_onnx(Reader(), tmp_path / "model.onnx", WORDS, embedding_dtype=dtype)
    with pytest.raises(LoweringError, match="embedding_dtype must be one of"):
        sx.lower(Reader(), WORDS, embedding_dtype=dtype)
