"""Sparse training in the Trainer of Hugging Face transformers: a small BERT, saved, stopped and resumed.

Needs the extra ``[transformers]``; downloads nothing. Run it with ``.venv/bin/python examples/train_transformers.py``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import srigl_fx as sx
from srigl_fx.integrations.transformers import SRigLCallback


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the class says whether the first one comes again."""
    ids = torch.randint(2, 12, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[1:] == row[0]).any().long()} for row in ids]


def build(folder: Path) -> tuple[Any, SRigLCallback]:
    """The model, its masks, and an ordinary Trainer with one callback more."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    model = sx.sparsify(BertForSequenceClassification(config), sparsity=0.8)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        save_steps=30,
        logging_steps=20,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = SRigLCallback(update_every=5)
    return Trainer(model=model, args=arguments, train_dataset=sentences(512), callbacks=[callback]), callback


def main(folder: Path) -> bool:
    """Train once through, and once from the checkpoint in the middle; say whether both gave the same model."""
    trainer, callback = build(folder)
    trainer.train()
    print(sx.summary(trainer.model))
    resumed, _ = build(folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-30"))
    states = trainer.model.state_dict(), resumed.model.state_dict()
    same = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert callback.metrics is not None
    print(callback.metrics.postfix(), "resumed: the same model" if same else "resumed: another model")
    return same


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
