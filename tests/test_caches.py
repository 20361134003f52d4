"""Objects that hold tensors among inputs and outputs: caches of Hugging Face transformers, and classes of one's own."""

import copy
import inspect
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
from srigl_fx.lowered import LoweredModule

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
        (llama, True),
        pytest.param(llama, False, marks=pytest.mark.slow),
        pytest.param(gpt2, True, marks=pytest.mark.slow),
        pytest.param(gpt2, False, marks=pytest.mark.slow),
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
    report = sx.export_onnx(model, tmp_path / "model.onnx", inputs, min_speedup=0)
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
