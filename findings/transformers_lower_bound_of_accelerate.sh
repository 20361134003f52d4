#!/usr/bin/env bash
# transformers' Trainer with the oldest accelerate that transformers says it accepts.
#
# Expected: transformers 5.24 asks for accelerate>=1.1.0, in its extras and in its own check when a Trainer is made; a
# training of two steps runs with accelerate 1.1.0.
# Seen: the Trainer is made, both checks content, and `train()` ends in a TypeError, because `unwrap_model` of accelerate
# takes `keep_torch_compile` from release 1.3.0 on. With 1.3.0 the same training runs.
#
# Versions: transformers 5.24.0, accelerate 1.1.0 and 1.3.0, torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     accelerate 1.1.0: TypeError, keep_torch_compile named: True
#     (a line with the times of the training)
#     accelerate 1.3.0: 2 steps
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.1.0 numpy==2.4.6
cd "$work"
cat > train.py <<'PYTHON'
import sys

import accelerate
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

model = BertForSequenceClassification(
    BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
)
data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(0)} for _ in range(4)]
arguments = TrainingArguments("out", max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
try:
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    seen = f"{trainer.state.global_step} steps"
except Exception as error:
    seen = f"{type(error).__name__}, keep_torch_compile named: {'keep_torch_compile' in str(error)}"
print(f"accelerate {accelerate.__version__}: {seen}")
sys.exit(seen != sys.argv[1])
PYTHON
"$work/venv/bin/python" -W ignore train.py "TypeError, keep_torch_compile named: True" 2> errors || { cat errors; exit 1; }
"$work/venv/bin/pip" install --quiet accelerate==1.3.0
"$work/venv/bin/python" -W ignore train.py "2 steps" 2> errors || { cat errors; exit 1; }
