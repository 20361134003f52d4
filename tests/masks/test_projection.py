import pytest
import torch
from torch import Tensor

from srigl_fx.masks.projection import Projection, keep_only


def _layouts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    image = torch.randn(7, 5, 3, 3)
    return {
        "matrix": torch.randn(37, 53),
        "one": torch.randn(1),
        "scalar": torch.randn(()),
        "empty": torch.randn(0, 4),
        "transposed": torch.randn(53, 37).t(),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "sliced": torch.randn(40, 60)[3:, ::2],
        "offset": torch.randn(40, 60)[5:],
    }


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("name", _layouts())
def test_equals_where(name: str, dtype: torch.dtype, again: bool) -> None:
    tensor = _layouts()[name].to(dtype)
    keep = torch.rand(tensor.shape) < 0.4
    if tensor.numel() > 8:
        tensor.copy_(torch.where(torch.rand(tensor.shape) < 0.1, torch.nan, tensor.float()).to(dtype))
    expected = torch.where(keep, tensor.float(), 0)
    strides = tensor.stride()
    if again:
        projection = Projection()
        projection(torch.ones(tensor.shape), keep)
        projection(tensor, keep)
    else:
        keep_only(tensor, keep)
    assert torch.equal(tensor.float().nan_to_num(7777), expected.nan_to_num(7777))
    assert not torch.signbit(tensor.float()[~keep]).any()
    assert tensor.stride() == strides


def test_a_projection_follows_its_mask() -> None:
    projection, mask = Projection(), torch.tensor([True, False, True])
    for kept in ([True, False, True], [False, True, True], [False, False, False]):
        mask.copy_(torch.tensor(kept))
        tensor = torch.full((3,), 5.0)
        projection(tensor, mask)
        assert (tensor == 5).tolist() == kept
    other = torch.full((3,), 5.0)
    projection(other, torch.tensor([False, True, False]))
    assert other.tolist() == [0, 5, 0]


def test_neighbours_of_a_slice_are_not_touched() -> None:
    for project in (keep_only, Projection()):
        whole = torch.ones(6, 10)
        project(whole[2:4], torch.zeros(2, 10, dtype=torch.bool))
        assert whole.sum(1).tolist() == [10, 10, 0, 0, 10, 10]
