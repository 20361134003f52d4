"""Models of timm, small."""

from functools import partial
from typing import Any

from torch import nn

from zoo.entry import Entry, images


def _named(name: str, **settings: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **settings)
    return model


def _mixer() -> nn.Module:
    import timm

    model: nn.Module = timm.models.mlp_mixer.MlpMixer(
        num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=24
    )
    return model


_MODELS: list[tuple[str, int, dict[str, Any]]] = [
    ("resnet10t", 64, {}),
    ("efficientnet_lite0", 64, {}),
    ("mobilenetv4_conv_small_035", 64, {}),
    ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}),
    ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
    (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 24, "drop_path_rate": 0.1},
    ),
    ("poolformer_s12", 64, {}),
    ("ghostnet_050", 64, {}),
    ("repvgg_a0", 64, {}),
    ("beit_base_patch16_224", 64, {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2}),
    ("dla34", 64, {}),
    ("mambaout_femto", 64, {"depths": (1, 1, 1, 1)}),
    ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ("regnety_002", 64, {}),
]

ENTRIES = [
    *(
        Entry(f"timm_{name}", "timm", partial(_named, name, **settings), images(size))
        for name, size, settings in _MODELS
    ),
    Entry("timm_mixer", "timm", _mixer, images(32)),
]
