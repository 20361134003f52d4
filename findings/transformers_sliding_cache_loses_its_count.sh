#!/usr/bin/env bash
# transformers: a DynamicCache with a sliding window that goes through a pytree forgets how many tokens it has seen.
#
# Expected: flattening a cache and building it again gives the same cache, as torch.export and everything else that uses
# pytrees counts on once `register_dynamic_cache_export_support` has registered it; so the next token gets the position
# that follows.
# Seen: a layer with a sliding window flattens into its keys and values, of which it keeps window - 1, and the window's
# size. Its count (`cumulative_length`) is not among them; the rebuilt layer counts the tokens that are left. Once a
# text is longer than the window, `get_seq_length()` is window - 1, and the next token is rotated to that position, beside
# keys that were rotated to later ones: other logits, without an error. Without a window nothing is lost.
#
# Versions: transformers 5.24.0, torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     no window: 8 tokens seen, 8 when built again; the next logits are the same
#     window 4: 8 tokens seen, 3 when built again; the next logits are others
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import sys

import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.integrations.executorch import register_dynamic_cache_export_support

register_dynamic_cache_export_support()
seen = []
for name, window in (("no window", None), ("window 4", 4)):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.5,
    )
    model = MistralForCausalLM(config).eval()
    text = torch.randint(50, (1, 9))
    with torch.no_grad():
        expected = model(text).logits[:, -1]
        cache = DynamicCache(config=config)
        model(text[:, :8], past_key_values=cache)
        again = pytree.tree_map(torch.clone, cache)
        counts = cache.get_seq_length(), again.get_seq_length()
        right, got = (model(text[:, 8:], past_key_values=one).logits[:, -1] for one in (cache, again))
    assert torch.allclose(right, expected, atol=1e-5)
    same = torch.allclose(got, expected, atol=1e-5)
    seen.append((*counts, same))
    print(
        f"{name}: {counts[0]} tokens seen, {counts[1]} when built again; "
        f"the next logits are {'the same' if same else 'others'}"
    )
as_described = seen == [(8, 8, True), (8, 3, False)]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
