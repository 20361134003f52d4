"""Models of transformers, made from small configurations; nothing is downloaded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Entry, Inputs

_VOCABULARY = 97


def _model(name: str, configuration: str, **settings: Any) -> nn.Module:
    import transformers

    model: nn.Module = getattr(transformers, name)(getattr(transformers, configuration)(**settings))
    return model


def _detr() -> nn.Module:
    import transformers

    configuration: Any = transformers.ResNetConfig
    backbone = configuration(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    return _model(
        "DetrForObjectDetection",
        "DetrConfig",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
    )


def _words(batch: int, length: int = 8) -> Tensor:
    return torch.randint(5, _VOCABULARY, (batch, length))


def _text(batch: int) -> Inputs:
    return (), {"input_ids": _words(batch), "attention_mask": torch.ones(batch, 8, dtype=torch.long)}


def _text_pair(batch: int) -> Inputs:
    args, named = _text(batch)
    return args, {**named, "decoder_input_ids": _words(batch, 5)}


def _words_alone(batch: int) -> Inputs:
    return (), {"input_ids": _words(batch)}


def _pictures(size: int) -> Callable[[int], Inputs]:
    return lambda batch: ((), {"pixel_values": torch.randn(batch, 3, size, size)})


def _spectrogram(batch: int) -> Inputs:
    return (), {"input_features": torch.randn(batch, 8, 40), "decoder_input_ids": _words(batch, 5)}


def _sound(batch: int) -> Inputs:
    return (), {"input_values": torch.randn(batch, 800)}


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_ENCODER = {**_SIZES, "vocab_size": _VOCABULARY, "max_position_embeddings": 32}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_ENCODER, **_SPECIAL, "use_cache": False, "num_key_value_heads": 2}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

_MODELS: list[tuple[str, str, str, dict[str, Any], Callable[[int], Inputs]]] = [
    ("hf_bert", "BertForSequenceClassification", "BertConfig", _ENCODER, _text),
    ("hf_bert_mlm_tied", "BertForMaskedLM", "BertConfig", _ENCODER, _text),
    (
        "hf_distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": _VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 32,
        },
        _text,
    ),
    (
        "hf_gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": _VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _text,
    ),
    ("hf_llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, _text),
    ("hf_gemma", "GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}, _text),
    (
        "hf_bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
        _text,
    ),
    ("hf_mixtral", "MixtralForCausalLM", "MixtralConfig", {**_DECODER, **_EXPERTS}, _text),
    (
        "hf_mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            "vocab_size": _VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "use_cache": False,
            "use_mambapy": False,
        },
        _words_alone,
    ),
    (
        "hf_t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": _VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        _text_pair,
    ),
    ("hf_vit", "ViTForImageClassification", "ViTConfig", {**_SIZES, "image_size": 32, "patch_size": 8}, _pictures(32)),
    (
        "hf_convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
        _pictures(32),
    ),
    (
        "hf_resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1]},
        _pictures(32),
    ),
    (
        "hf_segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        _pictures(64),
    ),
    (
        "hf_whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": _VOCABULARY,
            "num_mel_bins": 8,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 20,
            "max_target_positions": 16,
            "use_cache": False,
            **_SPECIAL,
            "decoder_start_token_id": 3,
        },
        _spectrogram,
    ),
    (
        "hf_wav2vec2",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 2, 2),
            "conv_kernel": (10, 3, 3),
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        _sound,
    ),
]

ENTRIES = [
    *(
        Entry(
            name,
            "transformers",
            partial(_model, model, configuration, **settings),
            inputs,
            # Two experts without weights tie, and torch and ONNX Runtime break ties differently.
            never_ablated=("*.mlp.gate",) if name == "hf_mixtral" else (),
        )
        for name, model, configuration, settings, inputs in _MODELS
    ),
    Entry("hf_detr", "transformers", _detr, _pictures(64)),
]
