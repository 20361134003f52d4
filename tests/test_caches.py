"""Objects that hold tensors among inputs and outputs: caches of Hugging Face transformers, and classes of one's own."""

import copy
import inspect
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.errors import ExportError, LoweringError
from srigl_fx.lowering.lowered import LoweredModule

IDS = torch.tensor([[3, 7], [1, 60]])
# What transformers 5.24 calls "cache" is "past_key_values" in those before it.
RENAMED = "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if RENAMED else "past_key_values"
SHAPE: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def sparse(model: nn.Module) -> nn.Module:
    made: nn.Module = sx.sparsify(model, sparsity=0.5).eval()
    return made


def filled(positions: int = 5) -> Any:
    """A cache as a decoder fills it: two layers of two heads with eight channels."""
    generator = torch.Generator().manual_seed(0)
    cache = transformers.DynamicCache()
    for layer in range(2):
        keys, values = torch.randn(2, 2, 2, positions, 8, generator=generator)
        cache.update(keys, values, layer)
    return cache


def tensors(cache: Any) -> list[Tensor]:
    return [*(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]


@pytest.mark.parametrize(
    ("make", "use_cache"),
    [
        pytest.param(llama, True, marks=pytest.mark.long),
        pytest.param(gpt2, False, marks=pytest.mark.long),
    ],
)
def test_a_decoder_that_is_given_a_cache_is_one_graph(make: Any, use_cache: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, cache = sparse(make()), filled()
    before = copy.deepcopy(tensors(cache))
    inputs = ((IDS,), {CACHE: cache, "use_cache": use_cache})
    lowered = sx.lower(model, inputs, min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    assert lowered.report.capture == "torch.export, dynamic batch"
    assert not lowered.report.undone
    # The file of a model, and of one that is lowered already, which is not captured again.
    report = sx.export_onnx(model if use_cache else lowered, tmp_path / "model.onnx", inputs, min_speedup=0)
    assert cache.get_seq_length() == 5
    assert all(torch.equal(one, other) for one, other in zip(tensors(cache), before, strict=True))

    with torch.no_grad():
        rows = torch.tensor([1, 0, 1])
        given = transformers.DynamicCache()
        for layer in cache.layers:
            given.update(-layer.keys[rows], layer.values[rows] / 2, len(given.layers))
        wanted = model(IDS[rows], use_cache=use_cache, **{CACHE: copy.deepcopy(given)})
        got = lowered(IDS[rows], use_cache=use_cache, **{CACHE: copy.deepcopy(given)})
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    names = [f"{CACHE}_{kind}_cache_{layer}" for kind in ("key", "value") for layer in range(2)]
    assert list(report.inputs) == ["input_ids", *names]
    session = sx.runtime.load(tmp_path / "model.onnx")
    feeds = {"input_ids": IDS[rows].numpy(), **{n: x.numpy() for n, x in zip(names, tensors(given), strict=True)}}
    logits, *served = session.run(None, feeds)
    np.testing.assert_allclose(logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert [one.name for one in session.get_outputs()][1:] == [f"{name}_out" for name in names[: len(served)]]
    assert (wanted.get(CACHE) is None) <= (not use_cache)
    if wanted.get(CACHE) is not None:  # some return what they are given though they were told not to use it
        assert got[CACHE].get_seq_length() == 7
        for one, other, file in zip(tensors(wanted[CACHE]), tensors(got[CACHE]), served, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(file, one, rtol=1e-4, atol=1e-5)
    else:
        assert got.get(CACHE) is None
        assert served == []


@pytest.mark.long
def test_a_decoder_that_makes_a_cache_is_one_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparse(llama())
    lowered = sx.lower(model, ((IDS,), {"use_cache": True}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    with torch.no_grad():
        wanted, got = model(IDS.flip(0), use_cache=True), lowered(IDS.flip(0), use_cache=True)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    report = sx.export_onnx(lowered, tmp_path / "model.onnx", ((IDS,), {"use_cache": True}))
    assert list(report.outputs)[:2] == ["logits", f"{CACHE}_key_cache_0"]
    served = sx.runtime.load(tmp_path / "model.onnx").run(None, {"input_ids": IDS.flip(0).numpy()})
    for one, other, file in zip(tensors(wanted[CACHE]), tensors(got[CACHE]), served[1:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file, one, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_file_takes_and_returns_the_tensors_of_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, cache = sparse(llama()), filled()
    lowered = sx.lower(model, ((IDS,), {CACHE: cache}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    lowered.save(tmp_path / "model.srigl")
    parts = {"key_cache": tensors(cache)[:2], "value_cache": tensors(cache)[2:]}
    with torch.no_grad():
        wanted = model(IDS, **{CACHE: copy.deepcopy(cache)})
        got = sx.load_lowered(tmp_path / "model.srigl")(IDS, **{CACHE: parts})
    torch.testing.assert_close(got["logits"], wanted.logits, rtol=1e-4, atol=1e-5)
    returned = [*got[CACHE]["key_cache"], *got[CACHE]["value_cache"]]
    for one, other in zip(tensors(wanted[CACHE]), returned, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    name = f"{CACHE} key_cache 0"
    with pytest.raises(LoweringError, match=rf"\({name}\) is float32 \(2, 2, 6, 8\), but .* \(any, 2, 5, 8\): lower"):
        lowered(IDS, **{CACHE: filled(6)})
    with pytest.raises(LoweringError, match=f"{CACHE} holds 0, and the graph was captured for 4"):
        lowered(IDS, **{CACHE: transformers.DynamicCache()})


@pytest.mark.long
def test_a_file_takes_a_cache_in_the_place_of_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, cache = sparse(llama()), filled()
    before = copy.deepcopy(tensors(cache))
    sx.lower(model, ((IDS,), {CACHE: cache}), min_speedup=0).save(tmp_path / "model.srigl")
    loaded = sx.load_lowered(tmp_path / "model.srigl")
    parts: dict[str, Any] = {"key_cache": before[:2], "value_cache": before[2:]}
    with torch.no_grad():
        wanted, got = loaded(IDS, **{CACHE: parts}), loaded(IDS, **{CACHE: cache})
        torch.testing.assert_close(got["logits"], model(IDS, **{CACHE: copy.deepcopy(cache)}).logits)
    assert torch.equal(got["logits"], wanted["logits"])
    assert all(map(torch.equal, got[CACHE]["key_cache"], wanted[CACHE]["key_cache"]))
    assert cache.get_seq_length() == 5
    assert all(map(torch.equal, tensors(cache), before))
    sx.export_onnx(loaded, tmp_path / "model.onnx", ((IDS,), {CACHE: cache}))
    feeds = {f"{CACHE}_{kind}_{layer}": parts[kind][layer].numpy() for kind in parts for layer in range(2)}
    logits = sx.runtime.load(tmp_path / "model.onnx").run(["logits"], {"input_ids": IDS.numpy(), **feeds})[0]
    np.testing.assert_allclose(logits, wanted["logits"], rtol=1e-4, atol=1e-5)
    with pytest.raises(LoweringError, match=f"{CACHE} is a DynamicCache that holds 0, and .* captured for 4"):
        loaded(IDS, **{CACHE: transformers.DynamicCache()})
    with pytest.raises(LoweringError, match=f"{CACHE} is a Tensor, and the graph takes a dict with the keys"):
        loaded(IDS, **{CACHE: before[0]})


FRESH = """
import sys, torch, transformers, srigl_fx
path, name = sys.argv[1:]
cache = transformers.DynamicCache()
for layer in range(2):
    cache.update(torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 8), layer)
assert type(cache) not in torch.utils._pytree.SUPPORTED_NODES
print(float(srigl_fx.load_lowered(path)(torch.tensor([[3, 7], [1, 60]]), **{name: cache})["logits"].abs().sum()))
"""


@pytest.mark.long
def test_a_file_takes_a_cache_in_a_process_that_knew_of_none(tmp_path: Path, checkout: Path) -> None:
    torch.manual_seed(0)
    model = sparse(llama())
    sx.lower(model, ((IDS,), {CACHE: filled()}), min_speedup=0).save(tmp_path / "model.srigl")
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.ones(2, 2, 5, 8), torch.ones(2, 2, 5, 8), layer)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "model.srigl"), CACHE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=checkout)
    assert done.returncode == 0, done.stderr[-500:]
    with torch.no_grad():
        wanted = model(IDS, **{CACHE: cache}).logits.abs().sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)


def windowed() -> nn.Module:
    """Sees four positions; the weights are large, so that it matters which."""
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": 1, "num_key_value_heads": 4, "intermediate_size": 16}
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(**shape, sliding_window=4, initializer_range=0.5)
    )
    return sparse(model)


def stepped(model: nn.Module, cache: Any, steps: int) -> Any:
    with torch.no_grad():
        for step in range(steps):
            model(IDS[:, :1] + step, **{CACHE: cache})
    return cache


def static(model: Any) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=16)


@pytest.mark.long
@pytest.mark.parametrize("make", [lambda model: transformers.DynamicCache(config=model.config), static])
def test_positions_that_a_window_counts_in_numbers_are_in_no_graph(make: Any, tmp_path: Path) -> None:
    model: Any = windowed()
    inputs = ((IDS[:, :1],), {CACHE: stepped(model, make(model), 7)})
    lowered = sx.lower(model, inputs, min_speedup=0)
    assert not isinstance(lowered, LoweredModule)
    assert "counts its positions in a number" in str(lowered.report)
    for steps in (3, 5, 9):
        cache = stepped(model, make(model), steps)
        with torch.no_grad():
            wanted = model(IDS[:, 1:], **{CACHE: copy.deepcopy(cache)}).logits
            torch.testing.assert_close(lowered(IDS[:, 1:], **{CACHE: cache}).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError, match=r"SlidingWindowLayer\) counts its positions .*DynamicCache\(\) that is made"):
        sx.export_onnx(model, tmp_path / "model.onnx", inputs, min_speedup=0)
    full = stepped(model, transformers.DynamicCache(), 7)
    lowered = sx.lower(model, ((IDS[:, :1],), {CACHE: full}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    with torch.no_grad():
        wanted = model(IDS[:, 1:], **{CACHE: stepped(model, transformers.DynamicCache(config=model.config), 7)}).logits
        torch.testing.assert_close(lowered(IDS[:, 1:], **{CACHE: full}).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_file_refuses_a_cache_whose_positions_no_tensor_tells(tmp_path: Path) -> None:
    model: Any = windowed()
    short = stepped(model, transformers.DynamicCache(), 3)
    lowered = sx.lower(model, ((IDS[:, :1],), {CACHE: short}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    lowered.save(tmp_path / "model.srigl")
    moved = stepped(model, transformers.DynamicCache(config=model.config), 9)  # has three, too
    with pytest.raises(LoweringError, match=f"{CACHE} is a DynamicCache whose layer 0 .* counts its positions"):
        sx.load_lowered(tmp_path / "model.srigl")(IDS[:, 1:], **{CACHE: moved})
    with pytest.raises(LoweringError, match=rf"{CACHE} is a DynamicCache made with 4, .* for one with None: lower"):
        lowered(IDS[:, 1:], **{CACHE: moved})


@pytest.mark.long
def test_a_static_cache_of_another_batch_is_refused_and_taken_by_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparse(llama())
    lowered = sx.lower(model, ((IDS[:, :1],), {CACHE: stepped(model, static(model), 4)}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    cache = static(model)
    with torch.no_grad():
        for step in range(6):
            model(IDS[[1, 0, 1], :1] + step, **{CACHE: cache})
    with pytest.raises(LoweringError, match=f"{CACHE} is a StaticCache made with batch_size 3, .* batch_size 2: lower"):
        lowered(IDS[[1, 0, 1], 1:], **{CACHE: cache})
    with pytest.raises(LoweringError, match=f"{CACHE} is a DynamicCache, and .* captured for a StaticCache: give it"):
        lowered(IDS[:, 1:], **{CACHE: filled()})
    lowered.save(tmp_path / "model.srigl")
    written = copy.deepcopy(cache)  # a static cache is written in place, by the model as well
    with torch.no_grad():
        got = sx.load_lowered(tmp_path / "model.srigl")(IDS[[1, 0, 1], 1:], **{CACHE: written})
        wanted = model(IDS[[1, 0, 1], 1:], **{CACHE: cache}).logits
    torch.testing.assert_close(got["logits"], wanted, rtol=1e-4, atol=1e-5)
    assert written.get_seq_length() == cache.get_seq_length() == 7
    torch.testing.assert_close(tensors(written), tensors(cache), rtol=1e-4, atol=1e-5)


def t5() -> nn.Module:
    shape: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 2,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, vocab_size=64))


def bart() -> nn.Module:
    sizes: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**sizes, **heads, vocab_size=64, d_model=16, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config)


def encoded(model: nn.Module, source: Tensor, target: Tensor) -> tuple[Tensor, Any]:
    """What the encoder makes of the source, and the cache after the target."""
    with torch.no_grad():
        output = model(input_ids=source, decoder_input_ids=target, use_cache=True)
    return output.encoder_last_hidden_state, output.past_key_values


def both(cache: Any) -> list[Tensor]:
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return [part for layer in layers for part in (layer.keys, layer.values)]


@pytest.mark.long
@pytest.mark.parametrize("make", [bart, t5])
def test_a_decoder_with_an_encoder_takes_both_caches(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, source = sparse(make()), torch.tensor([[3, 7, 9], [1, 60, 5]])
    hidden, cache = encoded(model, source, IDS)
    before = copy.deepcopy(both(cache))
    told: dict[str, Any] = {
        "encoder_outputs": (hidden,),
        "decoder_input_ids": IDS[:, :1],
        "past_key_values": cache,
        "use_cache": True,
    }
    lowered = sx.lower(model, ((), told), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    assert lowered.report.capture == "torch.export, dynamic batch"
    report = sx.export_onnx(lowered, tmp_path / "model.onnx", ((), told))
    assert all(map(torch.equal, both(cache), before))
    assert cache.is_updated == {0: True, 1: True}
    names = [f"past_key_values_{place}" for place in range(8)]
    assert list(report.inputs) == ["encoder_outputs_0", "decoder_input_ids", *names]

    rows = torch.tensor([1, 0, 1])
    hidden, cache = encoded(model, source[rows].flip(1), IDS[rows])
    told |= {"encoder_outputs": (hidden,), "decoder_input_ids": IDS[rows, 1:]}
    lowered.save(tmp_path / "model.srigl")
    with torch.no_grad():
        wanted = model(**{**told, "past_key_values": copy.deepcopy(cache)})
        got = lowered(**{**told, "past_key_values": cache})
        from_file = sx.load_lowered(tmp_path / "model.srigl")(**{**told, "past_key_values": cache})
    assert got.past_key_values.get_seq_length() == 3
    given = [hidden, IDS[rows, 1:], *both(cache)]
    feeds = {name: value.numpy() for name, value in zip(report.inputs, given, strict=True)}
    session = sx.runtime.load(tmp_path / "model.onnx")
    served = session.run(["logits", *(f"{name}_out" for name in names)], feeds)
    for one in (
        [got.logits, *both(got.past_key_values)],
        [from_file["logits"], *from_file["past_key_values"]],
        map(torch.from_numpy, served),
    ):
        for value, right in zip(one, [wanted.logits, *both(wanted.past_key_values)], strict=True):
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    cache.is_updated[1] = False  # as reset does, which keeps the sizes
    with pytest.raises(LoweringError, match="is a EncoderDecoderCache made with is_updated "):
        lowered(**{**told, "past_key_values": cache})
    with pytest.raises(LoweringError, match="whose layer 1 is full and marked as one that is to be filled"):
        sx.load_lowered(tmp_path / "model.srigl")(**{**told, "past_key_values": cache})


@pytest.mark.long
def test_a_static_cache_serves_every_length() -> None:
    torch.manual_seed(0)
    model = sparse(llama())
    lowered = sx.lower(model, ((IDS[:, :1],), {CACHE: stepped(model, static(model), 4)}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    for steps in (2, 6):
        cache = stepped(model, static(model), steps)
        with torch.no_grad():
            wanted = model(IDS[:, 1:], **{CACHE: copy.deepcopy(cache)}).logits
            torch.testing.assert_close(lowered(IDS[:, 1:], **{CACHE: cache}).logits, wanted, rtol=1e-4, atol=1e-5)


@dataclass
class Window:
    """What a user's streaming layer saw last: made of tensors, and of nothing that they are not."""

    seen: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        self.size = self.seen.shape[1]


pytree.register_pytree_node(Window, lambda one: ([one.seen, one.weight], None), lambda parts, _: Window(*parts))


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor, window: Window) -> tuple[Tensor, Window]:
        seen = torch.cat([window.seen, x], 1)
        window.seen = seen[:, -window.size :]
        y: Tensor = self.fc(seen.mean(1)) * window.weight
        return y, window


@pytest.mark.long
def test_classes_that_are_registered_are_taken_and_returned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparse(Windowed())
    x, window = torch.randn(2, 1, 6), Window(torch.randn(2, 3, 6), torch.tensor(2.0))
    before = window.seen
    lowered = sx.lower(model, (x, window), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    assert lowered.report.capture == "torch.export, dynamic batch"
    report = sx.export_onnx(model, tmp_path / "model.onnx", (x, window), min_speedup=0)
    assert window.seen is before
    assert report.inputs == {"x": ("batch", 1, 6), "window_0": ("batch", 3, 6), "window_1": ()}
    other = Window(torch.randn(3, 3, 6), torch.tensor(-1.0))
    with torch.no_grad():
        wanted, after = model(-x[[0, 1, 1]], copy.deepcopy(other))
        got, window = lowered(-x[[0, 1, 1]], other)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(window.seen, after.seen)
    session = sx.runtime.load(tmp_path / "model.onnx")
    served = session.run(
        None, {"x": -x[[0, 1, 1]].numpy(), "window_0": other.seen.numpy(), "window_1": other.weight.numpy()}
    )
    np.testing.assert_allclose(served[0], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(served[1], after.seen)


@pytest.mark.slow
def test_a_file_says_what_it_takes_in_the_place_of_ones_own_class(tmp_path: Path) -> None:
    x, window = torch.randn(2, 1, 6), Window(torch.randn(2, 3, 6), torch.tensor(2.0))
    lowered = sx.lower(sparse(Windowed()), (x, window), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    with pytest.raises(LoweringError, match="window is a list, and the graph was captured for a Window: give it one"):
        lowered(x, [window.seen, window.weight])
    lowered.save(tmp_path / "model.srigl")
    loaded = sx.load_lowered(tmp_path / "model.srigl")
    with pytest.raises(LoweringError, match="window is a Window, and the graph takes a list of 2: give it that"):
        loaded(x, window)
    with torch.no_grad():
        assert torch.equal(loaded(x, [window.seen, window.weight])[0], lowered(x, window)[0])


class Tree(nn.Module):
    """Takes a dict, in it a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, parts: dict[str, Any]) -> Tensor:
        wide, narrow = parts["wide"], parts["narrow"]
        y: Tensor = self.fc(wide) * narrow[0] - narrow[1]
        return y


@pytest.mark.slow
def test_plain_containers_are_taken_in_any_order_and_kind() -> None:
    model = sparse(Tree())
    example: dict[str, Any] = {"wide": torch.randn(2, 6), "narrow": [torch.randn(2, 1), torch.randn(2, 8)]}
    lowered = sx.lower(model, (example,), min_speedup=0)
    wanted = model(example)
    for given in (
        dict(reversed(example.items())),
        OrderedDict(example),
        {**example, "narrow": tuple(example["narrow"])},
    ):
        torch.testing.assert_close(lowered(given), wanted)
    with pytest.raises(LoweringError, match=r"parts has the keys \['wide'\], and .* captured for \['wide', 'narrow'\]"):
        lowered({"wide": example["wide"]})
    with pytest.raises(LoweringError, match="parts narrow holds 1, and the graph was captured for 2: lower"):
        lowered({**example, "narrow": example["narrow"][:1]})
    with pytest.raises(LoweringError, match="parts wide is a list, and the graph was captured for one tensor"):
        lowered({**example, "wide": [example["wide"]]})
    with pytest.raises(LoweringError, match=r"\(parts narrow 1\) is float32 \(2, 7\), but .* float32 \(any, 8\)"):
        lowered({"narrow": [example["narrow"][0], torch.ones(2, 7)], "wide": example["wide"]})
