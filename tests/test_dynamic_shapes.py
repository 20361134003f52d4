"""Models whose sizes vary: one graph, one saved file and one ONNX file for all of them, with the real libraries."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.errors import ExportError, LoweringError
from srigl_fx.lowering.lowered import LoweredModule


def sparse(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with new values, biases that are not zero among them, and masks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    made: nn.Module = sx.sparsify(model, sparsity=0.5).eval()
    return made


def lowered(model: nn.Module, inputs: Any, shapes: Any, **options: Any) -> LoweredModule:
    made = sx.lower(model, inputs, dynamic_shapes=shapes, min_speedup=0, **options)
    assert isinstance(made, LoweredModule)
    return made


def tensors(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def check_same(model: Any, other: Any, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        for one, two in zip(tensors(model(*args, **kwargs)), tensors(other(*args, **kwargs)), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def sessions(path: Path) -> Iterator[onnxruntime.InferenceSession]:
    """The file with the operator library, and on a stock ONNX Runtime."""
    yield sx.runtime.load(path)
    yield onnxruntime.InferenceSession(str(path))


def check_file(path: Path, model: Any, *args: Tensor, **kwargs: Tensor) -> None:
    """The file gives what the model gives, with the library and without."""
    with torch.no_grad():
        expected = tensors(model(*args, **kwargs))
    for session in sessions(path):
        names = [entry.name for entry in session.get_inputs()]
        feeds = dict(zip(names, (one.numpy() for one in (*args, *kwargs.values())), strict=True))
        for one, served in zip(expected, session.run(None, feeds), strict=True):
            np.testing.assert_allclose(served, one.numpy(), rtol=1e-4, atol=1e-5)


TOKENS = {0: "batch", 1: "tokens"}


class Encoder(nn.Module):
    """A sentence encoder as MiniLM is one: tokens, one layer of attention, a mean over those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(32, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = self.layer(x, src_key_padding_mask=mask == 0)
        weights = mask[..., None].to(x.dtype)
        return nn.functional.normalize((x * weights).sum(1) / weights.sum(1))


def sentences(samples: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(samples, length, dtype=torch.long)
    mask[-1, (length + 1) // 2 :] = 0
    return torch.randint(0, 50, (samples, length)), mask


@pytest.mark.long
@pytest.mark.parametrize("shapes", ["auto", {"ids": TOKENS, "mask": TOKENS}], ids=["auto", "names"])
def test_an_encoder_takes_every_length(shapes: Any, tmp_path: Path) -> None:
    model = sparse(Encoder())
    made = lowered(model, sentences(2, 6), shapes)
    length = "ids_1" if shapes == "auto" else "tokens"
    assert [one["shape"] for one in made.inputs if one] == [["batch", length], ["batch", length]]
    (batch, tokens) = made.report.free_sizes
    assert (batch.name, batch.tried, tokens.name, tokens.most) == ("batch", (1, 3), length, 32)
    assert tokens.axes == ("ids axis 1", "mask axis 1")
    assert f"{length} is free: ids axis 1, mask axis 1; 1 to 32, tried at 1, 6, 7" in str(made.report)
    made.save(tmp_path / "encoder.safetensors")
    again = sx.load_lowered(tmp_path / "encoder.safetensors")
    assert again.report == made.report
    report = sx.export_onnx(again, tmp_path / "encoder.onnx", sentences(2, 6))
    assert report.inputs == {"ids": ("batch", length), "mask": ("batch", length)}
    assert report.outputs == {"output": ("batch", 16)}
    assert f"{length} is free" in str(report)
    for samples, count in ((1, 1), (2, 32), (5, 17)):
        ids, mask = sentences(samples, count)
        check_same(model, made, ids, mask)
        check_same(model, again, ids, mask)
        check_file(tmp_path / "encoder.onnx", model, ids, mask)
    with pytest.raises(LoweringError, match=f"input 1 of the lowered module has {length} 5 and input 0 has 4"):
        made(sentences(2, 4)[0], sentences(2, 5)[1])


@pytest.mark.long
def test_bert_takes_every_length_in_one_file(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = sparse(transformers.BertModel(config))
    ids, mask = sentences(2, 6)
    inputs = {"input_ids": ids, "attention_mask": mask}
    shapes = {"input_ids": TOKENS, "attention_mask": TOKENS}
    report = sx.export_onnx(model, tmp_path / "bert.onnx", ((), inputs), dynamic_shapes=shapes, min_speedup=0)
    assert report.outputs["last_hidden_state"] == ("batch", "tokens", 32)
    assert report.lowering is not None
    assert [(one.name, one.most) for one in report.lowering.free_sizes] == [("batch", None), ("tokens", 64)]
    for samples, length in ((1, 1), (3, 2), (2, 17), (1, 64)):
        ids, mask = sentences(samples, length)
        check_file(tmp_path / "bert.onnx", model, input_ids=ids, attention_mask=mask)


@pytest.mark.long
def test_clip_takes_different_numbers_of_images_and_texts(tmp_path: Path) -> None:
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    image = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    heads = {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **heads, "max_position_embeddings": 8, "eos_token_id": 49},
        vision_config={**image, **heads},
        projection_dim=12,
    )
    model = sparse(transformers.CLIPModel(config))

    def inputs(images: int, texts: int, length: int = 5) -> dict[str, Tensor]:
        ids = torch.randint(0, 49, (texts, length))
        ids[:, -1] = 49
        return {"input_ids": ids, "pixel_values": torch.randn(images, 3, 8, 8), "attention_mask": torch.ones_like(ids)}

    words = {0: "texts", 1: "tokens"}
    shapes = {"input_ids": words, "attention_mask": words, "pixel_values": {0: "images"}}
    path = tmp_path / "clip.onnx"
    report = sx.export_onnx(model, path, ((), inputs(2, 3)), dynamic_shapes=shapes, min_speedup=0)
    assert report.inputs["pixel_values"] == ("images", 3, 8, 8)
    assert (report.outputs["logits_per_image"], report.outputs["text_embeds"]) == (("images", "texts"), ("texts", 12))
    for images, texts, length in ((1, 4, 5), (5, 1, 8)):
        given = inputs(images, texts, length)
        with torch.no_grad():
            expected = model(**given)
        for session in sessions(path):
            served = session.run(["logits_per_image"], {name: one.numpy() for name, one in given.items()})[0]
            np.testing.assert_allclose(served, expected.logits_per_image.numpy(), rtol=1e-4, atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn: Any = kind(6, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, Any]:
        y, last = self.rnn(x, state if len(state) > 1 else state[0])
        return self.out(y), last


@pytest.mark.long
@pytest.mark.parametrize(("kind", "states"), [(nn.GRU, 1), (nn.LSTM, 2)], ids=["gru", "lstm"])
def test_recurrent_layers_take_any_batch_and_length_of_a_state_that_is_given(
    kind: type[nn.Module], states: int, tmp_path: Path
) -> None:
    model = sparse(Recurrent(kind))

    def inputs(samples: int, length: int) -> tuple[Tensor, ...]:
        return torch.randn(samples, length, 6), *(torch.randn(1, samples, 8) for _ in range(states))

    shapes = ({0: "batch", 1: "length"}, *({1: "batch"},) * states)
    made = lowered(model, inputs(2, 5), shapes)
    report = sx.export_onnx(made, tmp_path / "rnn.onnx", inputs(2, 5))
    assert list(report.inputs.values()) == [("batch", "length", 6), *[(1, "batch", 8)] * states]
    assert next(iter(report.outputs.values())) == ("batch", "length", 4)
    for samples, length in ((1, 1), (3, 9)):
        check_same(model, made, *inputs(samples, length))
        check_file(tmp_path / "rnn.onnx", model, *inputs(samples, length))


@pytest.mark.long
@pytest.mark.parametrize("shapes", ["auto", "names"])
def test_a_decoder_step_whose_cache_grows(shapes: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = sparse(transformers.LlamaForCausalLM(config))
    name = "cache" if "cache" in transformers.LlamaForCausalLM.forward.__code__.co_varnames else "past_key_values"

    def cache(samples: int, past: int) -> Any:
        made = transformers.DynamicCache()
        made.update(torch.randn(samples, 2, past, 8), torch.randn(samples, 2, past, 8), 0)
        return made

    def inputs(samples: int, past: int, tokens: int = 2) -> dict[str, Any]:
        mask = torch.ones(samples, past + tokens, dtype=torch.long)
        ids = torch.randint(0, 64, (samples, tokens))
        return {"input_ids": ids, "attention_mask": mask, name: cache(samples, past)}

    asked: Any = "auto"
    if shapes == "names":
        asked = {
            "input_ids": TOKENS,
            "attention_mask": {0: "batch", 1: "past + tokens"},
            name: {0: "batch", 2: "past"},
        }
    path = tmp_path / "decoder.onnx"
    report = sx.export_onnx(model, path, ((), inputs(2, 5)), dynamic_shapes=asked, min_speedup=0)
    keys = next(one for one in report.inputs if "key" in one)
    if shapes == "names":
        assert report.inputs["attention_mask"] == ("batch", "past + tokens")
        assert report.inputs[keys] == ("batch", 2, "past", 8)
    assert isinstance(report.inputs[keys][2], str)
    assert isinstance(report.outputs[keys + "_out"][2], str)
    # What one step returns, the next is given: three steps in a row, as the model makes them.
    for session in sessions(path):
        state = cache(3, 4)
        feeds = {
            one: layer.numpy()
            for one, layer in zip(
                [one for one in report.inputs if one.startswith(name)],
                [state.layers[0].keys, state.layers[0].values],
                strict=True,
            )
        }
        for step in range(3):
            ids = torch.randint(0, 64, (3, 2))
            mask = torch.ones(3, 4 + 2 * (step + 1), dtype=torch.long)
            with torch.no_grad():
                expected = model(input_ids=ids, attention_mask=mask, **{name: state})
            given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **feeds}
            served = dict(zip(report.outputs, session.run(None, given), strict=True))
            np.testing.assert_allclose(served["logits"], expected.logits.numpy(), rtol=1e-4, atol=1e-5)
            feeds = {one: served[one + "_out"] for one in feeds}
            assert next(iter(feeds.values())).shape[2] == 4 + 2 * (step + 1)


class UNet(nn.Module):
    """Two scales: an image whose sides are no multiples of two does not fit together again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(20, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.a(x))
        inner = torch.relu(self.b(nn.functional.max_pool2d(first, 2)))
        y: Tensor = self.c(torch.cat([first, nn.functional.interpolate(inner, scale_factor=2.0)], 1))
        return y


@pytest.mark.long
def test_a_u_net_takes_images_of_several_sizes(tmp_path: Path) -> None:
    model = sparse(UNet())
    report = sx.export_onnx(
        model, tmp_path / "unet.onnx", (torch.randn(2, 3, 8, 12),), dynamic_shapes="auto", min_speedup=0
    )
    assert all(isinstance(report.inputs["x"][axis], str) for axis in (0, 2, 3))
    assert report.inputs["x"][1] == 3
    for size in ((1, 3, 8, 8), (2, 3, 16, 4), (3, 3, 4, 20)):
        check_file(tmp_path / "unet.onnx", model, torch.randn(size))


class Sage(nn.Module):
    """GraphSAGE: a mean over neighbours, added up by the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        total = torch.zeros_like(nodes).index_add(0, target, nodes[source])
        count = torch.zeros(nodes.shape[0], 1).index_add(0, target, torch.ones(edges.shape[1], 1))
        y: Tensor = self.own(nodes) + self.near(total / count.clamp(min=1))
        return y


@pytest.mark.long
def test_a_graph_may_have_any_number_of_edges(tmp_path: Path) -> None:
    model = sparse(Sage())

    def graph(nodes: int, edges: int) -> tuple[Tensor, Tensor]:
        return torch.randn(nodes, 6), torch.randint(0, 3, (2, edges))

    made = lowered(model, graph(5, 7), "auto")
    assert [one["shape"] for one in made.inputs if one] == [["batch", 6], [2, "edges_1"]]
    sx.export_onnx(made, tmp_path / "sage.onnx", graph(5, 7))
    for nodes, edges in ((3, 1), (9, 20)):
        check_same(model, made, *graph(nodes, edges))
        check_file(tmp_path / "sage.onnx", model, *graph(nodes, edges))


class Prompts(nn.Module):
    """Prompts that look at an image, as in SAM's mask decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer, x in ((self.q, prompts), (self.k, image), (self.v, image))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.long
def test_attention_takes_any_number_of_prompts(tmp_path: Path) -> None:
    model = sparse(Prompts())
    shapes = {"image": {0: "batch"}, "prompts": {0: "batch", 1: "prompts"}}
    made = lowered(model, (torch.randn(2, 9, 8), torch.randn(2, 3, 8)), shapes)
    report = sx.export_onnx(made, tmp_path / "sam.onnx", (torch.randn(2, 9, 8), torch.randn(2, 3, 8)))
    assert report.inputs == {"image": ("batch", 9, 8), "prompts": ("batch", "prompts", 8)}
    for samples, prompts in ((1, 1), (3, 12)):
        given = torch.randn(samples, 9, 8), torch.randn(samples, prompts, 8)
        check_same(model, made, *given)
        check_file(tmp_path / "sam.onnx", model, *given)


class Steps(nn.Module):
    """Sizes of every kind: one that is free, one that a mask shares, one of a weight, one that decides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        y = self.fc(x) * mask[..., None]
        out: Tensor = y + 1 if table.shape[0] == 3 else y - table.shape[0]
        return out


def steps() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 5, 6), torch.rand(2, 5), torch.ones(3, 7)


@pytest.mark.long
def test_auto_says_what_is_free_what_is_tied_and_which_line_fixes_the_rest() -> None:
    made = lowered(sparse(Steps()), steps(), "auto")
    assert [(one.name, one.axes) for one in made.report.free_sizes] == [
        ("batch", ("x axis 0", "mask axis 0")),
        ("x_1", ("x axis 1", "mask axis 1")),
        ("table_1", ("table axis 1",)),
    ]
    fixed = {one.axis: one for one in made.report.fixed_sizes}
    assert set(fixed) == {"x axis 2", "table axis 0"}
    assert fixed["x axis 2"].size == 6
    assert "test_dynamic_shapes.py, line" in fixed["x axis 2"].reason
    assert "y = self.fc(x) * mask" in fixed["x axis 2"].reason
    assert "x axis 2 is 6: " in str(made.report)
    assert type(made.report).from_dict(made.report.as_dict()) == made.report


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown input": ({"y": {0: "b"}}, "names the input 'y', and the example inputs are x, mask, table"),
    "an axis out of range": ({"x": {3: "b"}}, r"names axis 3 of the input 'x', which has 3 \(2, 5, 6\)"),
    "too few inputs": (({0: "b"},), "lists 1 inputs, and the example inputs are 3"),
    "too few axes": ({"mask": ["b"]}, "lists 1 axes of the input 'mask', which has 2"),
    "no structure": ({"x": 5}, "says 5 of the input 'x', which is a tensor"),
    "another word": ("all", "dynamic_shapes is 'all'"),
    "no name": ({"x": {0: "a b"}}, "calls axis 0 of the input 'x' 'a b'"),
    "no size": ({"x": {0: 1.5}}, "says 1.5 of axis 0 of the input 'x'"),
    "a number": ({"x": {0: 3}}, "fixes axis 0 of the input 'x' at 3, and the example has 2"),
    "a range": ({"x": {1: Dim("t", max=4)}}, "axis 1 of the input 'x' is 5 in the example, which the range of"),
    "one name": ({"x": {0: "a", 1: "a"}}, "'x' and axis 1 of the input 'x' 'a', and in the example they are 2 and 5"),
    "two names": ({"x": {0: "a"}, "mask": {0: "b"}}, "axis 0 of the input 'mask' was to be b, and the model ties it"),
    "a weight's": ({"x": {2: "wide"}}, r"axis 2 of the input 'x' was to be free, .* ties it to 6: test_dynamic_shapes"),
    "a mask's": ({"x": {1: "t"}}, "axis 1 of the input 'x' was to be free, and the model ties it to 5"),
    "a decision": ({"table": {0: "rows"}}, r"axis 0 of the input 'table'.* was to be free"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_by_input_and_axis(case: str) -> None:
    shapes, words = WRONG[case]
    model = sparse(Steps())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LoweringError, match=words):
        sx.lower(model, steps(), dynamic_shapes=shapes, min_speedup=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Decides(nn.Module):
    """No graph: which way it goes depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y if bool(y.sum() > 0) else -y


@pytest.mark.long
def test_sizes_of_a_model_that_is_not_one_graph() -> None:
    model, x = sparse(Decides()), torch.randn(2, 6)
    with pytest.raises(LoweringError, match=r"Decides is not one graph, with whatever sizes.*return y if bool"):
        sx.lower(model, (x,), dynamic_shapes={"x": {0: "rows"}}, min_speedup=0)
    made = sx.lower(model, (x,), dynamic_shapes="auto", min_speedup=0)
    assert not isinstance(made, LoweredModule)
    assert list(made.regions) == ["fc"]


@pytest.mark.slow
def test_sizes_of_what_is_lowered_are_its_own(tmp_path: Path) -> None:
    model = sparse(nn.Sequential(nn.Linear(6, 4)))
    x = torch.randn(2, 6)
    made = lowered(model, (x,), None)
    with pytest.raises(ExportError, match="give dynamic_shapes to lower"):
        sx.export_onnx(made, tmp_path / "m.onnx", (x,), dynamic_shapes="auto")
    with pytest.raises(ExportError, match="leave dynamic_batch out"):
        sx.export_onnx(model, tmp_path / "m.onnx", (x,), dynamic_shapes="auto", dynamic_batch=False)
    assert not list(tmp_path.iterdir())
