"""Removal is exact where 30 % of the hidden neurons are ablated, wherever they are: groups and heads lose other ones.

tests/test_zoo.py has every third neuron of every model ablated. Here are the models by hand, each of which holds a kind
of structure, and one of a library for each kind that these lack.
"""

import pytest
import torch
from lowering_support import randomise
from passes_support import relative_error
from torch import nn
from zoo import ZOO, coverage

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.pipelines import LOWERING

QUICK = {"nasty_ckpt", "nasty_fused_qkv"}
OF_LIBRARIES = ("hf_llama", "hf_vit", "hf_resnet", "hf_bert_mlm_tied", "timm_mixer", "tv_alexnetish_flatten")
# Of what is not one graph, each region is lowered by itself: tests/test_zoo.py.
ONE_GRAPH = [name for name, row in coverage.read().items() if row.capture.startswith("torch.export")]
MODELS = [name for name in ONE_GRAPH if ZOO[name].family == "by hand" or name in OF_LIBRARIES]


def with_dead_neurons(name: str) -> nn.Module:
    """The model with random masks of half the weights, of which all hidden layers lose 30 % of their rows."""
    model = sx.sparsify(randomise(ZOO[name].make().eval()), sparsity=0.5)
    generator = torch.Generator().manual_seed(0)
    for handle in sparse_weights(model)[:-1]:
        matrix = handle.record.site.to_matrix(handle.mask).clone()
        rows = matrix.shape[0]
        matrix[torch.randperm(rows, generator=generator)[: int(0.3 * rows)]] = False
        with torch.no_grad():
            handle.mask.copy_(handle.record.site.from_matrix(matrix))
            handle.weight.mul_(handle.mask)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore")  # of the libraries that the models come from
def test_removal_is_exact(name: str) -> None:
    model = with_dead_neurons(name)
    program = capture(model, ZOO[name].inputs(2))
    dense = relative_error(model, program)
    result = run(LOWERING, program)
    assert not any(note.undone for note in result.notes)
    program = result.subject
    assert relative_error(model, program) <= max(1e-5, 2 * dense)
    if program.dynamic:
        assert relative_error(model, program, 3) <= 1e-5
    assert program.removals is not None
    assert program.removals.parameters[1] <= program.removals.parameters[0]
