"""Training of weights that are transformed before they are used: captured gradients, revival, whole runs."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import srigl_fx as sx
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.train.engine import MaskEngine

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def standardise(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.dim()))
    return (w - w.mean(dims, keepdim=True)) / w.std(dims, keepdim=True)


class WSConv(nn.Conv2d):
    """Weight standardisation as written by hand: without an eps."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, standardise(self.weight) * 0.1, self.bias)
        return y


class WSLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, standardise(self.weight) * 0.2, self.bias)


class TanhParametrisation(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.tanh(w)


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(24, 32)),
        nn.ReLU(),
        nn.utils.weight_norm(nn.Linear(32, 32)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Linear(32, 32)),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def standardised() -> nn.Module:
    tanh = parametrize.register_parametrization(nn.Linear(32, 32), "weight", TanhParametrisation())
    return nn.Sequential(
        nn.Unflatten(1, (6, 2, 2)),
        WSConv(6, 16, 2, padding=1),
        nn.ReLU(),
        WSConv(16, 8, 2, bias=False),
        nn.Flatten(),
        WSLinear(32, 32),
        nn.ReLU(),
        tanh,
        nn.ReLU(),
        nn.Linear(32, 4),
    )


MODELS = {"weight-normed": weight_normed, "standardised": standardised}


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    target = torch.stack([x[:, :6].sum(1), x[:, 6:12].sum(1), x[:, 0], x[:, 1]], dim=1).tanh()
    return F.mse_loss(model(x), target)


def engine_of(model: nn.Module) -> tuple[MaskEngine, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return MaskEngine(model, optimizer, lambda found: None), optimizer


@pytest.mark.parametrize("layer", [WSLinear(24, 32), parametrizations.weight_norm(nn.Linear(24, 32))])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_captured_gradient_is_dense_and_the_trained_one_masked(layer: nn.Module, micro_batches: int) -> None:
    model = sx.sparsify(nn.Sequential(copy.deepcopy(layer), nn.Linear(32, 4)), sparsity=0.5, rules={"1": None})
    (handle,) = sparse_weights(model)
    x = torch.randn(8, 24)

    def reference(weight: Tensor) -> Tensor:
        """The loss with the gradient of the effective weight dense; the effective weight is the masked one."""
        if isinstance(layer, WSLinear):
            effective = standardise(weight) * 0.2
            effective = effective - torch.where(handle.mask, 0.0, effective.detach())
        else:
            effective = (
                weight
                / weight.norm(dim=1, keepdim=True)
                * dict(model.named_parameters())["0.parametrizations.weight.original0"]
            )
        hidden = F.linear(x, effective, dict(model.named_parameters())["0.bias"])
        target = torch.stack([x[:, :6].sum(1), x[:, 6:12].sum(1), x[:, 0], x[:, 1]], dim=1).tanh()
        return F.mse_loss(model[1](hidden), target)

    weight = handle.weight.detach().clone().requires_grad_()
    (dense,) = torch.autograd.grad(reference(weight), weight)
    loss_of(model, x).backward()
    assert handle.weight.grad is not None
    true = handle.weight.grad * handle.mask
    model.zero_grad()
    engine, _ = engine_of(model)
    engine.window.capturing = True
    for _ in range(micro_batches):
        loss_of(model, x).backward()
    captured = engine.window.gradient(handle)
    assert captured is not None
    off = ~handle.mask
    torch.testing.assert_close(captured[off], micro_batches * dense[off], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(captured[handle.mask], micro_batches * true[handle.mask], rtol=1e-4, atol=1e-6)
    assert captured[off].ne(0).all()
    torch.testing.assert_close(handle.weight.grad, micro_batches * true, rtol=1e-4, atol=1e-6)
    engine.window.capturing = False
    engine.detach()
    assert not any(value is True for key, value in vars(handle.owner).items() if "dense_gradient" in key)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_a_whole_run_with_ablation(name: str, optimizer_class: type[torch.optim.SGD | torch.optim.AdamW]) -> None:
    torch.manual_seed(1)
    model = sx.sparsify(MODELS[name](), sparsity=0.75, distribution="uniform")
    before = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
    assert len(before) == {"weight-normed": 4, "standardised": 5}[name]
    optimizer = optimizer_class(model.parameters(), lr=0.3 if optimizer_class is torch.optim.SGD else 0.003)
    trainer = sx.SRigL(model, optimizer, total_steps=160, update_every=10, ablation=0.6)
    losses = []
    for _ in range(160):
        optimizer.zero_grad()
        loss = loss_of(model, torch.randn(64, 24))
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    sx.verify(model, optimizer)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    changed = [handle.fqn for handle in sparse_weights(model) if not torch.equal(handle.mask, before[handle.fqn])]
    assert changed == list(before)
    assert any(dead_rows(handle).any() for handle in sparse_weights(model))
    trainer.detach()
    x = torch.randn(4, 24)
    model.eval()
    lowered = sx.lower(model, (x,), min_speedup=0)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-4, atol=1e-5)


def dead_rows(handle: SparseWeight) -> Tensor:
    return handle.record.site.to_matrix(handle.mask).sum(1) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_dead_neuron_can_be_revived_and_learns(name: str) -> None:
    model = sx.sparsify(MODELS[name](), sparsity=0.5, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = MaskEngine(model, optimizer, lambda found: None)
    handle = sparse_weights(model)[0]
    alive = handle.mask.clone()
    site = handle.record.site
    dead = alive.clone()
    site.to_matrix(dead)[2] = False
    engine.set_mask(handle, dead)
    engine.window.capturing = True
    loss_of(model, torch.randn(64, 24)).backward()
    captured = engine.window.gradient(handle)
    assert captured is not None
    assert site.to_matrix(captured)[2].isfinite().all()
    optimizer.step()
    engine.window.capturing = False
    engine.window.drop()
    assert not site.to_matrix(handle.weight.detach())[2].any()
    engine.set_mask(handle, alive)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, torch.randn(64, 24)).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    row, mask = site.to_matrix(handle.weight.detach())[2], site.to_matrix(alive)[2]
    assert row[~mask].eq(0).all()
    assert row.isfinite().all()
    sx.verify(model, optimizer)


def test_ordinary_steps_compute_the_transform_once() -> None:
    calls: list[bool] = []

    class Counted(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(True)
            return w - w.mean(1, keepdim=True)

    layer = parametrize.register_parametrization(nn.Linear(24, 32), "weight", Counted())
    model = sx.sparsify(nn.Sequential(layer, nn.Linear(32, 4)), sparsity=0.5, rules={"1": None})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sx.SRigL(model, optimizer, total_steps=40, update_every=4)
    counts = []
    for _ in range(8):
        calls.clear()
        optimizer.zero_grad()
        loss_of(model, torch.randn(8, 24)).backward()
        counts.append(len(calls))
        optimizer.step()
    assert sorted(set(counts)) == [1, 2]
    assert counts.count(2) == 2


@pytest.mark.long
def test_a_compiled_model_captures_too() -> None:
    model = sx.sparsify(nn.Sequential(WSLinear(24, 32), nn.Linear(32, 4)), sparsity=0.5, rules={"1": None})
    (handle,) = sparse_weights(model)
    x = torch.randn(8, 24)
    engine, _ = engine_of(model)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        engine.window.capturing = False
        loss_of(run, x).backward()
        engine.window.capturing = True
        model.zero_grad()
        loss_of(run, x).backward()
        captured = engine.window.gradient(handle)
        assert captured is not None
        gradients.append(captured.clone())
        model.zero_grad()
        engine.window.drop()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert gradients[0][~handle.mask].ne(0).all()


def _nf_resnet() -> tuple[nn.Module, Tensor]:
    nfnet = pytest.importorskip("timm.models.nfnet")
    from dataclasses import replace

    config = replace(nfnet.model_cfgs["nf_resnet26"], depths=(1, 1), channels=(16, 32), stem_type="3x3", stem_chs=16)
    return nfnet.NormFreeNet(config, num_classes=5), torch.randn(4, 3, 16, 16)


def _nfnet_same_padding() -> tuple[nn.Module, Tensor]:
    conv = pytest.importorskip("timm.layers.std_conv")
    first = conv.ScaledStdConv2dSame(4, 16, 3, stride=2, padding="same")
    second = conv.StdConv2dSame(16, 16, 3, stride=2, padding="same", bias=True)
    return nn.Sequential(first, nn.SiLU(), second, nn.Flatten(), nn.Linear(64, 5)), torch.randn(4, 4, 7, 7)


class LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def _wav2vec2() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return LogitsOnly(transformers.Wav2Vec2ForCTC(config)), torch.randn(2, 400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "transformed"),
    [
        (_nf_resnet, "stages.0.0.conv2.weight"),
        (_nfnet_same_padding, "0.weight"),
        (_wav2vec2, "model.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    ],
)
def test_models_of_others(build: Callable[[], tuple[nn.Module, Tensor]], transformed: str) -> None:
    model, x = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    names = set(model.state_dict())
    sx.sparsify(model, sparsity=0.6)
    handles = {handle.fqn: handle for handle in sparse_weights(model)}
    assert transformed in handles
    assert set(model.state_dict()) - names == {handle.mask_fqn for handle in handles.values()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sx.SRigL(model, optimizer, total_steps=12, update_every=3)
    target, losses = torch.randn_like(model(x)), []
    mask = handles[transformed].mask.clone()
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    sx.verify(model, optimizer)
    assert losses[-1] < losses[0]
    assert not torch.equal(handles[transformed].mask, mask)
