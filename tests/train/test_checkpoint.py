import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_support import SmallNet, batches, mlp, train

from srigl_fx import finalize, sparsify
from srigl_fx.errors import CheckpointError
from srigl_fx.masks import named_masks, verify
from srigl_fx.train import GMP, SRigL, Static
from srigl_fx.train.checkpoint import load, save
from srigl_fx.train.checkpoint_file import _digest, read, write

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]

Run = dict[str, Any]


def _run(seed: int = 0, sparsity: float = 0.75, steps: int = 0, **options: Any) -> Run:
    torch.manual_seed(seed)
    model = mlp(sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, **{"total_steps": 60, "update_every": 5, "grad_samples": 3, **options})
    train(model, optimizer, batches(steps, seed=seed))
    return {"model": model, "optimizer": optimizer, "trainer": trainer}


def _bits(value: Any) -> Any:
    """Nested values in which tensors are replaced by their bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0)
        return str(value.dtype), tuple(value.shape), raw.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_bits(item) for item in value)
    return value


def _everything(run: Run) -> Any:
    trainer = {"trainer": run["trainer"].state_dict(include_gradients=True)} if "trainer" in run else {}
    optimizer = {"optimizer": run["optimizer"].state_dict()} if "optimizer" in run else {}
    return _bits({"model": dict(run["model"].state_dict()), **optimizer, **trainer})


def test_a_checkpoint_restores_everything(tmp_path: Path) -> None:
    run, other = _run(steps=8), _run(seed=1, steps=3)
    extra = {
        "epoch": 3,
        "rng": torch.get_rng_state(),
        "best": float("inf"),
        "seen": Counter([2, 2]),
        "by": {7: (1, None)},
    }
    save(tmp_path / "last", **run, extra=extra, include_gradients=True)
    loaded = load(tmp_path / "last", **other)
    assert _everything(run) == _everything(other)
    assert _bits(loaded) == _bits(extra)
    assert type(loaded["seen"]) is Counter
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_other_readers_find_the_weights(tmp_path: Path) -> None:
    run = _run(steps=1)
    save(tmp_path / "last", **run)
    found = load_file(tmp_path / "last")
    for name, value in run["model"].state_dict().items():
        assert torch.equal(found[f"model.{name}"], value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 4)], ids=str)
def test_every_tensor_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    write(tmp_path / "file", {"x": tensor})
    assert _bits(read(tmp_path / "file")) == _bits({"x": tensor})


def test_shared_strided_and_conjugate_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    z = torch.randn(3, dtype=torch.complex64)
    value: dict[str, Any] = {
        "a": base,
        "same": base,
        "part": base[1:3],
        "t": base.t(),
        "conj": z.conj(),
        "z": z,
        "a_": torch.ones(1),
    }
    value["nested"] = {"a.b": torch.ones(2)}
    value["nested.a"] = {"b": torch.zeros(2)}
    write(tmp_path / "file", value)
    assert len(load_file(tmp_path / "file")) == len(value) - 1  # "same" is stored once
    found = read(tmp_path / "file")
    assert _bits(found) == _bits({name: v.resolve_conj() if isinstance(v, Tensor) else v for name, v in value.items()})
    found["a"].zero_()
    assert torch.equal(found["same"], base)


def test_tied_weights(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        return sparsify(model, sparsity=0.5)

    a, b = build(0), build(1)
    save(tmp_path / "file", model=a)
    load(tmp_path / "file", model=b)
    assert _bits(dict(a.state_dict())) == _bits(dict(b.state_dict()))
    assert b.get_parameter("0.weight") is b.get_parameter("2.weight")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@pytest.mark.long
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(), VALUES, max_size=3))
def test_plain_values_come_back_with_their_types(tmp_path: Path, value: dict[str, Any]) -> None:
    write(tmp_path / "file", value)
    assert repr(read(tmp_path / "file")) == repr(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"extra.x is a object"),
        (np.ones(2), r"extra.x is a ndarray"),
        ({(1, 2): 3}, r"extra.x has the key \(1, 2\)"),
        (torch.ones(2, device="meta"), r"extra.x is a Tensor .*meta"),
        (torch.ones(2).to_sparse(), r"extra.x is a Tensor .*sparse"),
        (torch.ones(2, dtype=torch.complex128), r"extra.x is of torch.complex128"),
    ],
)
def test_what_a_file_cannot_hold_is_named(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "last").write_bytes(b"before")
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "last", model=mlp(), extra={"x": value})
    assert (tmp_path / "last").read_bytes() == b"before"


@pytest.mark.parametrize("extra", [3, 0, "text", [("epoch", 3)], (), True])
def test_extra_has_names(tmp_path: Path, extra: Any) -> None:
    with pytest.raises(CheckpointError, match=f"extra is a {type(extra).__name__}, but must be a dict"):
        save(tmp_path / "last", model=mlp(), extra=extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [None, {}, {"a": None, "b": [1, "x", {"c": (True, 2.5)}]}])
def test_extra_comes_back(tmp_path: Path, extra: Any) -> None:
    save(tmp_path / "last", model=mlp(), extra=extra)
    assert load(tmp_path / "last", model=mlp()) == (extra or {})


def test_saving_into_a_missing_folder_or_a_folder_is_an_error(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "none" / "last", f"there is no folder '{tmp_path}/none'"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(CheckpointError, match=f"^'{path}' cannot be written: {why}; give the path of a file"):
            save(path, model=mlp())
    assert not list(tmp_path.iterdir())
    for nameless in (".", ""):
        with pytest.raises(CheckpointError, match=rf"'{nameless}' cannot be written: it is a folder"):
            save(nameless, model=mlp())
    with pytest.raises(CheckpointError, match="pass trainer="):
        save(tmp_path / "last", model=mlp(), include_gradients=True)


def test_a_checkpoint_does_not_take_the_place_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe' cannot be written: it is a device, a pipe or a socket"):
        save(tmp_path / "pipe", model=mlp())
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_a_checkpoint_as_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "last", model=mlp())
    finally:
        os.umask(before)
    assert (tmp_path / "last").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "last"
    save(path, **_run(steps=9), extra={"epoch": 1}, include_gradients=True)
    return path.read_bytes()


@pytest.fixture(scope="module")
def target() -> tuple[Run, Any]:
    run = _run(seed=5, steps=4)
    return run, _everything(run)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_changes_nothing(
    tmp_path: Path, saved: bytes, target: tuple[Run, Any], data: st.DataObject
) -> None:
    run, before = target
    header = int.from_bytes(saved[:8], "little") + 8
    offset = data.draw(st.integers(0, header) | st.integers(0, len(saved) - 1), "offset")
    how = data.draw(st.sampled_from(["flip", "truncate", "insert", "zero"]))
    damaged = bytearray(saved)
    if how == "flip":
        damaged[offset] ^= 1 << data.draw(st.integers(0, 7), "bit")
    elif how == "truncate":
        del damaged[offset:]
    elif how == "insert":
        damaged[offset:offset] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        damaged[offset : offset + 64] = bytes(len(damaged[offset : offset + 64]))
    (tmp_path / "damaged").write_bytes(damaged)
    if bytes(damaged) == saved:
        return
    with pytest.raises(CheckpointError):
        load(tmp_path / "damaged", **run)
    assert _everything(run) == before


def _tampered(path: Path, change: Any) -> None:
    """Rewrite a checkpoint after ``change`` to its contents, with a checksum that is right."""
    contents = read(path)
    change(contents)
    write(path, contents)


def _set(*keys: Any, to: Any) -> Any:
    def change(contents: Any) -> None:
        for key in keys[:-1]:
            contents = contents[key]
        contents[keys[-1]] = to(contents[keys[-1]]) if callable(to) else to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", "0.weight", to=lambda w: w[:5]), r"0\.weight is torch.float32 \(5, 24\) there, but"),
        (_set("model", "0.weight", to=lambda w: w.double()), r"0\.weight is torch.float64"),
        (_set("model", "0.weight_mask", to=lambda m: m.int()), r"0\.weight_mask is torch.int32"),
        (_set("model", "0.weight_mask", to=torch.ones_like), r"mask of 0\.weight there cannot be right"),
        (_set("model", "0.weight", to="text"), r"0\.weight is a str there"),
        (_set("model", "other", to=torch.ones(2)), "this one lacks other"),
        (lambda c: c["model"].pop("2.bias"), r"it lacks 2\.bias"),
        (_set("model", to=[]), "not what they should be"),
        (_set("extra", to=3), "not what they should be"),
        (_set("layout", "0.weight", "budgets", to=[1]), "saved with .*budgets"),
        (_set("layout", "0.weight", to=None), "not what they should be"),
        (lambda c: c.pop("layout"), "damaged .*layout"),
        (_set("optimizer", to=None), "without an optimizer"),
        (_set("optimizer", "class", to="SGD"), "saved with SGD"),
        (
            _set("optimizer", "state", 0, "exp_avg", to=torch.ones(3)),
            r"'exp_avg' of parameter 0 of AdamW has shape \(3,\)",
        ),
        (_set("optimizer", "state", 0, "step", to=torch.ones(3)), r"'step' of parameter 0"),
        (_set("optimizer", "state", 77, to={}), "not of its parameters"),
        (_set("optimizer", "state", to=[]), "damaged"),
        (_set("optimizer", "param_groups", 0, "lr", to="x"), "option lr of AdamW"),
        (_set("optimizer", "param_groups", 0, "betas", to=(0.9,)), "option betas of AdamW"),
        (_set("optimizer", "param_groups", 0, "params", to=lambda p: [0] * len(p)), "not of its parameters"),
        (_set("optimizer", "param_groups", 0, "params", to=[0]), "groups of"),
        (lambda c: c["optimizer"]["param_groups"][0].pop("lr"), "damaged: the option lr of AdamW is missing"),
        (_set("optimizer", "param_groups", 0, "lr", to=None), "option lr of AdamW is None there"),
        (_set("optimizer", "param_groups", 0, "lr", to=-1.0), "does not step with the options there .*learning rate"),
        (_set("optimizer", "param_groups", 0, "betas", to=(0.9, None)), "option betas of AdamW"),
        (_set("optimizer", "param_groups", 0, "amsgrad", to=True), "'max_exp_avg_sq' of parameter 0 .* is missing"),
        (lambda c: c["optimizer"]["state"][2].pop("exp_avg"), "'exp_avg' of parameter 2 of AdamW, which .* is missing"),
        (lambda c: c["optimizer"]["state"][1].pop("step"), "'step' of parameter 1 of AdamW, which .* is missing"),
        (_set("optimizer", "state", 0, "exp_avg", to=None), "'exp_avg' of parameter 0 of AdamW is a NoneType there"),
        (_set("optimizer", "state", 0, "step", to="3"), "'step' of parameter 0 of AdamW is a str there"),
        (_set("optimizer", "state", 0, "step", to=torch.tensor(-5.0)), "'step' of parameter 0 of AdamW is -5 there"),
        (_set("optimizer", "state", 1, "step", to=torch.tensor(2.5)), "'step' of parameter 1 of AdamW is 2.5 there"),
        (_set("optimizer", "state", 2, "step", to=float("inf")), "'step' of parameter 2 of AdamW is inf there"),
        (_set("optimizer", "state", 2, "step", to=float("nan")), "'step' of parameter 2 of AdamW is nan there"),
        (_set("optimizer", "param_groups", 0, "foreach", to="yes"), "option foreach of AdamW is 'yes' there"),
        (_set("optimizer", "param_groups", 0, "fused", to=1), "option fused of AdamW is 1 there"),
        (_set("trainer", to=None), "without a trainer"),
        (_set("trainer", to=[]), "a trainer's state is a dict"),
        (_set("trainer", "steps", to=-1), "damaged at steps"),
        (_set("trainer", "captured", to=(("0.weight", "total", 3),)), "damaged at captured"),
        (
            _set("trainer", "captured", to=(("0.weight", "total", torch.ones(2)),)),
            r"fit no parameter .*0\.weight \(total\)",
        ),
        (_set("trainer", "gradients", to=(("0.bias", torch.ones(32).double()),)), r"fit no parameter .*0\.bias"),
        (_set("trainer", "method", to="Static"), "no state of SRigL"),
    ],
)
def test_a_tampered_file_changes_nothing(
    tmp_path: Path, saved: bytes, target: tuple[Run, Any], change: Any, message: str
) -> None:
    run, before = target
    (tmp_path / "last").write_bytes(saved)
    _tampered(tmp_path / "last", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "last", **run)
    assert _everything(run) == before


OTHERS: dict[str, Any] = {
    "Muon": lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "RMSprop centered": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, momentum=0.9),
}


@pytest.mark.parametrize("name", OTHERS)
def test_state_without_what_the_next_step_needs_changes_nothing(tmp_path: Path, name: str) -> None:
    model = mlp()
    optimizer = OTHERS[name](list(model.parameters()))
    run: Run = {"model": model, "optimizer": optimizer, "trainer": Static(model, optimizer)}
    train(model, optimizer, batches(3))
    save(tmp_path / "last", **run, include_gradients=True)
    load(tmp_path / "last", **run)
    before = _everything(run)
    keys = list(read(tmp_path / "last")["optimizer"]["state"][0])
    for key in keys if len(keys) > 1 else []:  # without any, a parameter is a new one
        save(tmp_path / "bad", **run)
        _tampered(tmp_path / "bad", lambda c, key=key: c["optimizer"]["state"][0].pop(key))
        with pytest.raises(CheckpointError, match=f"'{key}' of parameter 0 .* needs, is missing"):
            load(tmp_path / "bad", **run)
        assert _everything(run) == before
    _tampered(tmp_path / "last", lambda c: c["optimizer"]["state"].pop(0))
    if name == "Adagrad":  # its state begins with the optimizer, not with a step
        with pytest.raises(CheckpointError, match="'step' of parameter 0"):
            load(tmp_path / "last", **run)
    else:
        load(tmp_path / "last", **run)
        train(model, optimizer, batches(1))


def test_foreign_files(tmp_path: Path) -> None:
    run = _run()
    before = _everything(run)
    torch.save(run["model"].state_dict(), tmp_path / "torch")
    save_file({"model.0.weight": torch.ones(2)}, tmp_path / "plain")
    save_file({"x": torch.ones(2)}, tmp_path / "newer", {"srigl_fx.checkpoint": "2"})
    save_file({"x": torch.ones(2)}, tmp_path / "deep", {"srigl_fx.checkpoint": "1", "srigl_fx.tree": "[" * 10**5})
    (tmp_path / "empty").touch()
    for name, message in [
        ("torch", "damaged or no checkpoint"),
        ("plain", "no checkpoint of srigl_fx"),
        ("newer", "version 2, but this srigl_fx reads 1"),
        ("deep", "damaged"),
        ("empty", "damaged"),
        ("missing", "there is no checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name, **run)
    assert _everything(run) == before


def test_a_hostile_tree(tmp_path: Path) -> None:
    write(tmp_path / "good", {"x": torch.ones(2)})
    good = load_file(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for tree in ('{"x": {"tensor": "y"}}', '{"x": {"pickle": "y"}}', '{"x": {"dict": [[1, 2], [1, 3]]}}', "{}", "[]"):
        metadata = {**header["__metadata__"], "srigl_fx.tree": tree}
        save_file(good, tmp_path / "bad", {**metadata, "srigl_fx.sha256": _digest(tree, good)})
        with pytest.raises(CheckpointError, match="damaged"):
            read(tmp_path / "bad")


def test_another_sparsity_structure_or_class(tmp_path: Path) -> None:
    save(tmp_path / "last", **_run(steps=3))
    other = _run(sparsity=0.5)
    before = _everything(other)
    with pytest.raises(CheckpointError, match=r"last does not fit: 0\.weight: saved with .*build the model as"):
        load(tmp_path / "last", **other)
    assert _everything(other) == before
    unstructured = mlp(structure="unstructured")
    with pytest.raises(CheckpointError, match=r"last does not fit: .*unstructured"):
        load(tmp_path / "last", model=unstructured)
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="saved with AdamW, but the optimizer is SGD"):
        load(tmp_path / "last", model=model, optimizer=sgd)
    with pytest.raises(CheckpointError, match=r"last does not fit: this is no state of Static .* but of SRigL"):
        load(tmp_path / "last", model=model, trainer=Static(model, sgd))


@pytest.mark.parametrize(
    ("classes", "rules", "message"),
    [
        (10, {"2": None}, r"only one of the two masks 2\.weight: build the model as"),
        (11, None, r"2\.weight: saved with .*\[10, 256\].*, but the model has .*\[11, 256\].*: build the model as"),
    ],
)
def test_another_model(tmp_path: Path, classes: int, rules: Any, message: str) -> None:
    def build(classes: int, rules: Any) -> Run:
        network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, classes))
        model = sparsify(network, sparsity=0.8, rules=rules)
        optimizer = torch.optim.AdamW(model.parameters())
        return {"model": model, "optimizer": optimizer, "trainer": SRigL(model, optimizer, total_steps=1000)}

    save(tmp_path / "last", **build(10, None))
    other = build(classes, rules)
    before = _everything(other)
    with pytest.raises(CheckpointError, match=rf"last does not fit: .*{message}"):
        load(tmp_path / "last", **other)
    assert _everything(other) == before


def test_dense_into_sparse_and_sparse_into_dense(tmp_path: Path) -> None:
    def dense() -> nn.Module:
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    source, run = dense(), _run(steps=6)
    save(tmp_path / "dense", model=source)
    masks = {name: mask.clone() for name, mask in named_masks(run["model"])}
    load(tmp_path / "dense", model=run["model"])
    for name, mask in named_masks(run["model"]):
        assert torch.equal(mask, masks[name])
        assert torch.equal(run["model"].get_parameter(name), source.get_parameter(name) * mask)
    verify(run["model"], run["optimizer"])

    save(tmp_path / "sparse", **run)
    into = dense()
    before = _bits(dict(into.state_dict()))
    with pytest.raises(CheckpointError, match="this one is dense: sparsify it first"):
        load(tmp_path / "sparse", model=into)
    assert _bits(dict(into.state_dict())) == before
    assert load(tmp_path / "sparse", model=sparsify(into, sparsity=0.75, distribution="uniform")) == {}
    assert torch.equal(finalize(into).get_parameter("0.weight"), run["model"].get_parameter("0.weight"))


def test_through_wrappers(tmp_path: Path) -> None:
    run = _run(steps=4)
    save(tmp_path / "last", model=run["model"])
    compiled = torch.compile(mlp(), backend="eager")
    assert isinstance(compiled, nn.Module)
    for target in (compiled, nn.ModuleDict({"module": mlp()})):
        load(tmp_path / "last", model=target)
        save(tmp_path / "again", model=target)
        assert _bits(read(tmp_path / "again")["model"]) == _bits(dict(run["model"].state_dict()))


def test_masks_on_their_way_down(tmp_path: Path) -> None:
    """GMP saves masks over budget: its own resume takes them, and so does a model alone."""

    def build(seed: int) -> Run:
        torch.manual_seed(seed)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {
            "model": model,
            "optimizer": optimizer,
            "trainer": GMP(model, optimizer, total_steps=40, update_every=5),
        }

    run, other = build(0), build(1)
    train(run["model"], run["optimizer"], batches(12))
    save(tmp_path / "last", **run, include_gradients=True)
    load(tmp_path / "last", **other)
    assert _everything(run) == _everything(other)
    load(tmp_path / "last", model=mlp())


def test_batch_norm_attention_and_groups(tmp_path: Path) -> None:
    def build(seed: int) -> Run:
        torch.manual_seed(seed)
        model = sparsify(SmallNet(), sparsity=0.5)
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
        groups.append({"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0})  # type: ignore[dict-item]
        optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.01), betas=(0.8, 0.9))
        return {"model": model, "optimizer": optimizer, "trainer": Static(model, optimizer)}

    run, other = build(0), build(1)
    train(run["model"], run["optimizer"], batches(3, (4, 3, 4, 4)))
    save(tmp_path / "last", **run, include_gradients=True)
    load(tmp_path / "last", **other)
    assert _everything(run) == _everything(other)
    assert other["optimizer"].param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(other["optimizer"].param_groups[0]["lr"], Tensor)


KILLED = """
import sys, torch
from torch import nn
from srigl_fx import sparsify
from srigl_fx.train.checkpoint import save
torch.set_num_threads(1)
model = sparsify(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), sparsity=0.5)
step = int(sys.argv[2])
while True:
    step += 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(step)
            if name + "_mask" in model.state_dict():
                parameter.mul_(model.get_buffer(name + "_mask"))
    save(sys.argv[1], model=model, extra={"step": step})
    print(step, flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    path, script, seen = tmp_path / "last", tmp_path / "script.py", 0
    script.write_text(KILLED)
    rng = random.Random(0)
    for _ in range(10):
        child = subprocess.Popen([sys.executable, script, path, str(seen)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert int(child.stdout.readline()) == seen + 1
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        finished = [seen + 1, *(int(line) for line in child.stdout.read().split("\n")[:-1])][-1]
        child.wait()
        child.stdout.close()
        contents = read(path)
        step = contents["extra"]["step"]
        assert step in (finished, finished + 1)
        for name, value in contents["model"].items():
            if value.dtype != torch.bool:
                assert set(value.unique().tolist()) <= {0.0, float(step)}, name
        seen = step
    assert seen > 10


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_example_ends_with_the_same_weights_after_a_crash(checkout: Path, tmp_path: Path, threads: int) -> None:
    def run(name: str, *more: str) -> "subprocess.CompletedProcess[str]":
        script = str(checkout / "examples" / "checkpointing.py")
        command = [sys.executable, script, str(tmp_path / name), "--steps", "80", "--every", "15"]
        # Sums are rounded as the number of threads has it: all runs have the same.
        return subprocess.run([*command, "--threads", str(threads), *more], capture_output=True, text=True)

    assert run("killed", "--kill-at", "50").returncode == -signal.SIGKILL
    assert read(tmp_path / "killed")["trainer"]["threads"] == threads
    resumed, whole = run("killed"), run("whole")
    assert resumed.stderr == whole.stderr == ""
    first, *rest = resumed.stdout.splitlines()
    assert first == "resumed at step 45"
    assert "fingerprint" in rest[0]
    assert rest == whole.stdout.splitlines()
