"""What the library uses of PyTorch without a promise is listed, is there, and behaves as it is used.

Checked on PyTorch 2.13.0 and 2.14.1. A private name that is used and not listed in
``srigl_fx.compatibility`` fails here, and so does one that is listed and not used any more. Names that end in the same
word as one of the library's own are not told apart from it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from srigl_fx import compatibility
from srigl_fx.compatibility import LATE, PRIVATE, holder
from srigl_fx.passes.operators import OPERATORS

LISTED = {name for names in (*PRIVATE.values(), *LATE.values()) for name in names}
LISTED |= {part for where in (*PRIVATE, *LATE) for part in where.split(".") if part.startswith("_")}
OF_PYTHON = {"_getframe"}  # documented, in sys
OURS = "_srigl_fx"  # begins the names of attributes that the library itself gives to modules


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_" and not name.startswith(OURS)


def _trees(checkout: Path) -> Iterator[tuple[str, ast.Module]]:
    for folder in ("srigl_fx", "passes", "runtime"):
        for path in sorted((checkout / folder).rglob("*.py")):  # does not follow the two links in srigl_fx/
            yield str(path.relative_to(checkout)), ast.parse(path.read_text(encoding="utf-8"))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _used(tree: ast.AST) -> Iterator[str]:
    """Every private name that a file takes from somewhere else, by import, attribute or ``getattr``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("srigl_fx"):
            yield from (*node.module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr", "setattr", "delattr"}:
            yield from (str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant))


@pytest.mark.long
def test_every_private_name_is_listed(checkout: Path) -> None:
    trees = dict(_trees(checkout))
    own = {name for tree in trees.values() for name in _defined(tree)}
    wrong = {
        f"{path}: {name}"
        for path, tree in trees.items()
        for name in _used(tree)
        if _private(name) and name not in LISTED | OF_PYTHON | own
    }
    assert not wrong, "find a public way, or list it in srigl_fx/compatibility.py and try it here"


@pytest.mark.long
def test_every_listed_name_is_used(checkout: Path) -> None:
    used = {name for path, tree in _trees(checkout) if "compatibility" not in path for name in _used(tree)}
    used |= {match for path, _ in _trees(checkout) for match in re.findall(r"pytree\.(\w+)", _text(checkout, path))}
    used |= OPERATORS.keys()
    assert not {name for names in (*PRIVATE.values(), *LATE.values()) for name in names} - used


def _text(checkout: Path, path: str) -> str:
    return (checkout / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in PRIVATE.items() for name in names])
def test_each_name_is_there(where: str, name: str) -> None:
    assert hasattr(holder(where), name)


def test_a_weight_norm_is_a_direction_times_a_length() -> None:
    v, g = torch.randn(3, 4), torch.rand(3, 1)
    weight_norm: Any = torch._weight_norm
    torch.testing.assert_close(weight_norm(v, g, 0), v * g / v.norm(dim=1, keepdim=True))


def test_a_storage_counts_its_users_and_has_one_address() -> None:
    count: Any = torch._C._storage_Use_Count
    x = torch.zeros(4)
    storage: Any = x.untyped_storage()
    assert storage._cdata == x[1:].untyped_storage()._cdata != torch.zeros(4).untyped_storage()._cdata
    alone = count(storage._cdata)
    view = x.detach()
    assert count(storage._cdata) == alone + 1
    del view
    assert count(storage._cdata) == alone


def test_hooks_of_a_tensor_that_was_swapped_come_back_when_their_dicts_are_assigned() -> None:
    calls = []
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.register_hook(lambda _: calls.append("early"))  # type: ignore[no-untyped-call]
    p.register_post_accumulate_grad_hook(lambda _: calls.append("late"))  # type: ignore[no-untyped-call]
    torch.utils.swap_tensors(p, q)  # type: ignore[no-untyped-call]
    p._backward_hooks, p._post_accumulate_grad_hooks = p._backward_hooks, p._post_accumulate_grad_hooks
    p.sum().backward()
    assert calls == ["early", "late"]


def test_a_tensor_counts_its_writes() -> None:
    x = torch.zeros(4)
    before = x._version
    x[1:].add_(1)
    assert x._version == x.detach()._version == before + 1


def test_what_observes_a_call_is_told_of() -> None:
    core: Any = torch._C

    def seen() -> list[bool]:
        modes = core._len_torch_dispatch_stack(), core._len_torch_function_stack()
        state = core._functorch.peek_interpreter_stack(), core._get_tracing_state()
        return [
            *(count > 0 for count in modes),
            *(one is not None for one in state),
            core._autograd._profiler_enabled(),
        ]

    assert not any(seen())
    with FakeTensorMode():
        assert seen() == [True, False, False, False, False]
    with torch.device("cpu"):
        assert seen() == [False, True, False, False, False]
    inside: list[list[bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        inside.append(seen())
        return 2 * x

    torch.func.vmap(look)(torch.zeros(2))
    assert inside.pop() == [False, False, True, False, False]
    jit: Any = torch.jit
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        jit.trace(look, torch.zeros(2), check_trace=False)
    assert inside.pop() == [False, False, False, True, False]
    with torch.profiler.profile():
        assert seen() == [False, False, False, False, True]


def test_operators_and_their_schemas() -> None:
    add: Any = torch.ops.aten.add
    assert isinstance(add, torch._ops.OpOverloadPacket)
    assert isinstance(add.Tensor, torch._ops.OpOverload)
    assert (add.Tensor.__name__, add.Tensor.overloadpacket.__name__, add.Tensor.namespace) == (
        "add.Tensor",
        "add",
        "aten",
    )
    assert [argument.name for argument in add.Tensor._schema.arguments] == ["self", "other", "alpha"]
    assert [argument.kwarg_only for argument in add.Tensor._schema.arguments] == [False, False, True]
    assert not add.Tensor._schema.is_mutable
    assert torch.ops.aten.add_.Tensor._schema.is_mutable
    assert add.Tensor._schema.name == "aten::add"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_assert_async.default", "self"),
        ("_assert_async.msg", "self, assert_msg"),
        ("_assert_scalar.default", "self, assert_msg"),
        ("_assert_tensor_metadata.default", "a, size, stride, dtype, device, layout"),
        (
            "_native_batch_norm_legit_functional.default",
            "input, weight, bias, running_mean, running_var, training, momentum, eps",
        ),
        (
            "_native_batch_norm_legit_no_training.default",
            "input, weight, bias, running_mean, running_var, momentum, eps",
        ),
        ("_softmax.default", "self, dim, half_to_float"),
        ("_to_copy.default", "self, dtype, layout, device, pin_memory, non_blocking, memory_format"),
        ("_unsafe_view.default", "self, size"),
    ],
)
def test_private_operators_take_these_arguments(name: str, arguments: str) -> None:
    packet, _, overload = name.partition(".")
    schema: Any = getattr(getattr(torch.ops.aten, packet), overload)._schema
    assert ", ".join(argument.name for argument in schema.arguments) == arguments


def test_trees_are_taken_apart_and_put_together() -> None:
    tree = holder("torch.utils._pytree")
    value = {"b": (1, [2, None]), "a": 3}
    leaves, spec = tree.tree_flatten(value)
    assert leaves == tree.tree_leaves(value) == [1, 2, None, 3]
    assert isinstance(spec, tree.TreeSpec)
    assert spec == tree.tree_structure(value)
    assert tree.tree_unflatten(leaves, spec) == value
    assert tree.tree_map(str, (1, [2])) == ("1", ["2"])
    assert tree.tree_map_only(int, str, (1, None)) == ("1", None)
    assert (spec.num_leaves, spec.is_leaf(), spec.type, list(spec.context)) == (4, False, dict, ["b", "a"])
    assert [child.num_leaves for child in spec.children()] == [3, 1]
    paths, _ = tree.tree_flatten_with_path(value)
    assert [str(path[0].key) for path, _ in paths] == ["b", "b", "b", "a"]


def test_modules_hold_their_parts_in_dicts() -> None:
    module: Any = nn.BatchNorm1d(2)
    assert list(module._parameters) == ["weight", "bias"]
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert nn.Sequential(module)._modules == {"0": module}
    module.register_buffer("own", None, persistent=False)
    assert module._non_persistent_buffers_set == {"own"}
    handles = module.register_forward_hook(print), module.register_forward_pre_hook(print)
    assert [list(hooks.values()) for hooks in (module._forward_hooks, module._forward_pre_hooks)] == [[print], [print]]
    taking = module.register_forward_pre_hook(print, with_kwargs=True)
    assert list(module._forward_pre_hooks_with_kwargs.values()) == [True]
    for handle in (*handles, taking):
        handle.remove()
    module.register_load_state_dict_pre_hook(print)
    assert [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()] == [print]
    assert module.state_dict()._metadata[""] == {"version": 2}


def test_hooks_after_a_step_can_be_put_in_front() -> None:
    parameter, calls = nn.Parameter(torch.ones(1)), []
    optimizer: Any = torch.optim.SGD([parameter])
    optimizer.register_step_post_hook(lambda *_: calls.append("first"))
    late = optimizer.register_step_post_hook(lambda *_: calls.append("late"))
    optimizer._optimizer_step_post_hooks.move_to_end(late.id, last=False)
    optimizer.step()
    assert calls == ["late", "first"]


def test_a_pruning_hook_names_its_tensor() -> None:
    assert holder("a pruning hook")._tensor_name == "weight"


def test_forward_mode_is_seen() -> None:
    from torch.autograd import forward_ad

    levels: Any = forward_ad
    assert levels._current_level == -1
    with forward_ad.dual_level():
        assert levels._current_level == 0


def test_parametrisations_are_known_by_class() -> None:
    classes = holder("torch.nn.utils.parametrizations")
    for wrap, cls in (("weight_norm", "_WeightNorm"), ("spectral_norm", "_SpectralNorm")):
        layer = getattr(nn.utils.parametrizations, wrap)(nn.Linear(3, 2))
        assert type(layer.parametrizations.weight[0]) is getattr(classes, cls)


def test_norms_over_a_batch_have_one_base() -> None:
    base = holder("torch.nn.modules.batchnorm")._NormBase
    assert all(issubclass(cls, base) for cls in (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d))
    assert not any(issubclass(cls, base) for cls in (nn.GroupNorm, nn.LayerNorm))


def test_fake_tensors_have_shapes_alone() -> None:
    fake = holder("torch._subclasses")
    with fake.FakeTensorMode():
        made = torch.zeros(2, 3)
    assert isinstance(made, fake.FakeTensor)
    assert made.shape == (2, 3)


def test_dispatch_is_seen() -> None:
    seen: list[Any] = []
    base: Any = holder("torch.utils._python_dispatch").TorchDispatchMode

    class Mode(base):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add(1)
    assert torch.ops.aten.add.Tensor in seen


def test_a_captured_module_knows_its_inputs_and_outputs() -> None:
    module: Any = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)).module()
    code = module.graph._codegen
    assert isinstance(code, holder("torch.fx.graph")._PyTreeCodeGen)
    assert isinstance(code.pytree_info, holder("torch.fx.graph")._PyTreeInfo)
    assert code.pytree_info.orig_args == ["input"]
    assert module._in_spec == code.pytree_info.in_spec
    assert module._out_spec == code.pytree_info.out_spec


def _on_torch_2_99(tmp_path: Path, before: str) -> "subprocess.CompletedProcess[str]":
    """Run a program where the installed PyTorch says that it is 2.99.1."""
    info = tmp_path / "torch-2.99.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.1\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + before
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


WORKS = """
import torch.nn as nn, srigl_fx as sx
model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
sx.sparsify(model, sparsity=0.5)
print("works")
sx.sparsify(model, sparcity=0.5)
"""


@pytest.mark.long
def test_an_unknown_torch_works_and_its_errors_carry_a_note(tmp_path: Path) -> None:
    done = _on_torch_2_99(tmp_path, WORKS)
    assert done.stdout == "works\n"
    assert done.stderr.splitlines()[-2].startswith("TypeError: sparsify() got an unexpected keyword argument")
    assert done.stderr.splitlines()[-1] == f"PyTorch 2.99.1 was not tested. {compatibility.known_good()}"


@pytest.mark.long
def test_an_unknown_torch_that_lacks_a_name_is_refused_in_one_line(tmp_path: Path) -> None:
    done = _on_torch_2_99(tmp_path, "import torch; del torch._weight_norm\n" + WORKS)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "srigl_fx.errors.VersionError: PyTorch 2.99.1 lacks what srigl_fx needs (torch: _weight_norm). "
        "srigl_fx is known to work with PyTorch 2.13 to 2.14: pip install 'torch>=2.13,<2.15'"
    )


def test_the_range_is_that_of_the_requirement(checkout: Path) -> None:
    oldest = ".".join(map(str, compatibility.OLDEST))
    assert f'"torch>={oldest}"' in _text(checkout, "pyproject.toml")


def test_an_installed_release_of_the_range_costs_nothing() -> None:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return compatibility.noted(function)

    assert compatibility.untested(torch.__version__) or call(len) is len
