"""Models of torchvision, small."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, Inputs, images


def _named(name: str, **settings: Any) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(weights=None, **settings)
    return model


def _densenet() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)
    return model


def _vit() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10, dropout=0.1)
    return model


def _swin() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, stochastic_depth_prob=0.1
    )
    return model


def _flattened() -> nn.Module:
    import torchvision

    return nn.Sequential(
        torchvision.models.vgg.make_layers([8, "M", 16, "M"]),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(144, 20),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(20, 10),
    )


def _segmentation() -> nn.Module:
    import torchvision

    make = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    model: nn.Module = make(weights=None, weights_backbone=None, num_classes=4)
    return model


def _video() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.video.r3d_18(weights=None, num_classes=10)
    return model


def _flow() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.optical_flow.raft_small(weights=None)
    return model


def _bright_pictures(batch: int) -> Inputs:
    """For a model without normalisation, which shrinks its inputs until the biases hide them."""
    return (100 * torch.randn(batch, 3, 64, 64),), {}


def _detector(name: str, **settings: Any) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models.detection, name)(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, **settings
    )
    return model


def _retinanet() -> nn.Module:
    """On a feature pyramid over ResNet-18, whose blocks are fewer than those of ResNet-50."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model: nn.Module = RetinaNet(backbone, num_classes=3, min_size=64, max_size=64)
    return model


def _pictures(batch: int) -> list[Tensor]:
    return [torch.rand(3, 64, 64) for _ in range(batch)]


def _pictures_with_targets(batch: int) -> Inputs:
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0], [10.0, 20.0, 60.0, 60.0]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 64, 64, dtype=torch.uint8),
    }
    return (_pictures(batch), [target] * batch), {}


_FEW_BOXES = {
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 8,
    "box_detections_per_img": 5,
    "box_score_thresh": 0.0,
}
_CLASSIFIERS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")

ENTRIES = [
    *(Entry(f"tv_{name}", "torchvision", partial(_named, name, num_classes=10), images(64)) for name in _CLASSIFIERS),
    Entry("tv_squeezenet1_1", "torchvision", partial(_named, "squeezenet1_1", num_classes=10), _bright_pictures),
    Entry("tv_densenet", "torchvision", _densenet, images(64)),
    Entry("tv_vit", "torchvision", _vit, images(32)),
    Entry("tv_swin", "torchvision", _swin, images(32)),
    Entry(  # its auxiliary head needs larger pictures in training mode
        "tv_inception_v3",
        "torchvision",
        partial(_named, "inception_v3", init_weights=False, num_classes=10),
        images(80),
        train=False,
    ),
    Entry("tv_alexnetish_flatten", "torchvision", _flattened, images(32)),
    Entry("tv_deeplabv3_mnv3", "torchvision", _segmentation, images(64)),
    Entry("tv_r3d_18", "torchvision", _video, lambda batch: ((torch.randn(batch, 3, 4, 32, 32),), {})),
    Entry(
        "tv_raft_small",
        "torchvision",
        _flow,
        lambda batch: (
            (torch.randn(batch, 3, 128, 128), torch.randn(batch, 3, 128, 128)),
            {"num_flow_updates": 2},
        ),
    ),
    Entry(
        "tv_maskrcnn",
        "torchvision",
        partial(_detector, "maskrcnn_resnet50_fpn", **_FEW_BOXES),
        lambda batch: ((_pictures(batch),), {}),
        train_inputs=_pictures_with_targets,
        static=True,
    ),
    Entry(
        "tv_retinanet",
        "torchvision",
        _retinanet,
        lambda batch: ((_pictures(batch),), {}),
        train_inputs=_pictures_with_targets,
        static=True,
    ),
]
