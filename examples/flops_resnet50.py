"""FLOPs of ResNet-50 on ImageNet, dense and at the published sparsities, from shapes alone."""

from srigl_fx.masks.distributions import erk
from srigl_fx.train.flops import Formula, LayerCost, inference_flops, training_flops

IMAGES, EPOCHS = 1_281_167, 100
FORMULAS: tuple[Formula, ...] = ("srigl_table", "rigl_paper")


def resnet50() -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Weight shape, and output positions for an image of 224 x 224 pixels, of every layer."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    sides = {"conv1": 112}
    inputs, side = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"], sides[f"{name}.conv1"] = (width, inputs, 1, 1), side
            if block == 0 and stage > 1:
                side //= 2
            shapes[f"{name}.conv2"], sides[f"{name}.conv2"] = (width, width, 3, 3), side
            shapes[f"{name}.conv3"], sides[f"{name}.conv3"] = (4 * width, width, 1, 1), side
            if block == 0:
                shapes[f"{name}.downsample"], sides[f"{name}.downsample"] = (4 * width, inputs, 1, 1), side
            inputs = 4 * width
    shapes["fc"], sides["fc"] = (1000, inputs), 1
    return shapes, {name: length**2 for name, length in sides.items()}


def main() -> None:
    shapes, positions = resnet50()
    layers = {name: LayerCost.of(shape, positions[name]) for name, shape in shapes.items()}
    dense = inference_flops(layers)
    baseline = training_flops("dense", dense=dense, sparse=dense)
    print(f"{'':8} {'inference':>18} {'training, 4 f_S':>18} {'training, 2 f_S':>18}")
    print(f"{'sparsity':8} {'FLOPs':>10} {'ratio':>7} {'FLOPs':>10} {'ratio':>7} {'FLOPs':>10} {'ratio':>7}")
    for sparsity in (0.0, 0.75, 0.8, 0.9, 0.9375, 0.95, 0.99):
        sparse = inference_flops(layers, erk(shapes, sparsity))
        cells = [f"{sparse:10.3e} {sparse / dense:7.4f}"]
        for formula in FORMULAS:
            step = (
                training_flops("srigl", dense=dense, sparse=sparse, formula=formula, update_every=100)
                if sparsity
                else baseline
            )
            cells.append(f"{step * IMAGES * EPOCHS:10.3e} {step / baseline:7.4f}")
        print(f"{sparsity:8} {' '.join(cells)}")


if __name__ == "__main__":
    main()
