"""Tiny configs of the model families that people train adapters for, and which of their modules an adapter targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from torch import nn

from tests.parity import tiny_models as tiny

transformers = pytest.importorskip("transformers")

CAUSAL, SEQ2SEQ, ENCODER = tiny.CAUSAL, "AutoModelForSeq2SeqLM", "AutoModel"
MASKED, IMAGES, VLM = "AutoModelForMaskedLM", "AutoModelForImageClassification", "AutoModelForImageTextToText"
MULTIMODAL = "AutoModelForMultimodalLM"

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Key and value heads are narrower than query heads, where the family allows it.
_DECODER = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, **_TOKENS}
_GROUPED = {**_DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GATED_DELTA: dict[str, Any] = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
_GATED_DELTA |= {"linear_value_head_dim": 12, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}
_GATED_DELTA |= {"shared_expert_intermediate_size": 40, "layer_types": ["linear_attention", "full_attention"]}
_HEADS = {"num_attention_heads": 4, "num_hidden_layers": 1}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
_TOWER_SIZES = {**_TOWER, "image_size": 16, "patch_size": 8}
_CLIP_TOWER = {"model_type": "clip_vision_model", **_TOWER_SIZES}
_SIGLIP_TOWER = {"model_type": "siglip_vision_model", **_TOWER_SIZES, "vision_use_head": False}
_PIXTRAL_TOWER = {"model_type": "pixtral", **_TOWER_SIZES, "head_dim": 16}
_IMAGE = {"image_token_index": 90, "image_token_id": 90, "video_token_id": 91, "audio_token_id": 92}
_M_ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}


class Family(NamedTuple):
    """A transformers auto class, what makes the config, and endings of the linear modules that PEFT does not take."""

    auto: str
    config: Callable[[], Any]
    unfit: tuple[str, ...] = ()


def _of(auto: str, config_class: str, *parts: dict[str, Any], **fields: Any) -> Family:
    """Return the family whose config has the fields of all parts."""
    merged = {name: value for part in (*parts, fields) for name, value in part.items()}
    return Family(auto, lambda: getattr(transformers, config_class)(**merged))


def _text(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_GROUPED, **fields}


def _decoders() -> dict[str, Family]:
    untied, tied = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
    local = {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12}
    return {
        "llama": _of(CAUSAL, "LlamaConfig", _GROUPED, untied),
        "llama-tied": _of(CAUSAL, "LlamaConfig", _GROUPED, tied),
        "llama-biases": _of(CAUSAL, "LlamaConfig", _GROUPED, untied, attention_bias=True, mlp_bias=True),
        "mistral": _of(CAUSAL, "MistralConfig", _GROUPED, sliding_window=None),
        "qwen2": _of(CAUSAL, "Qwen2Config", _GROUPED, untied),
        "qwen2-tied": _of(CAUSAL, "Qwen2Config", _GROUPED, tied),
        "qwen3": _of(CAUSAL, "Qwen3Config", _GROUPED, untied, head_dim=16),
        "gemma": _of(CAUSAL, "GemmaConfig", _GROUPED, head_dim=12),
        "gemma2": _of(CAUSAL, "Gemma2Config", _GROUPED, local),
        "gemma3-text": _of(CAUSAL, "Gemma3TextConfig", _GROUPED, local),
        "phi": _of(CAUSAL, "PhiConfig", _GROUPED),
        "phi3": _of(CAUSAL, "Phi3Config", _GROUPED),
        "gpt2": _of(CAUSAL, "GPT2Config", _TOKENS, vocab_size=96, n_positions=32, n_embd=48, n_layer=2, n_head=4),
        "gpt-neox": _of(CAUSAL, "GPTNeoXConfig", _DECODER, _HEADS),
        "gptj": _of(CAUSAL, "GPTJConfig", _TOKENS, untied, vocab_size=96, n_embd=48, n_layer=1, n_head=4, rotary_dim=4),
        "opt": Family(CAUSAL, tiny.opt),
        "bloom": Family(CAUSAL, tiny.bloom),
        "falcon": _of(CAUSAL, "FalconConfig", _DECODER, _HEADS),
        "mpt": _of(CAUSAL, "MptConfig", vocab_size=96, d_model=48, n_heads=4, n_layers=1, max_seq_len=32),
        "starcoder2": _of(CAUSAL, "Starcoder2Config", _GROUPED),
        "stablelm": _of(CAUSAL, "StableLmConfig", _GROUPED, use_qkv_bias=True),
        "cohere": _of(CAUSAL, "CohereConfig", _GROUPED),
        "olmo2": _of(CAUSAL, "Olmo2Config", _GROUPED),
        "exaone": _of(CAUSAL, "ExaoneConfig", _GROUPED),
        "sarvam-moe": _of(CAUSAL, "SarvamMoEConfig", _GROUPED, num_hidden_layers=1, head_dim=12),
        "lara-mini": _of(CAUSAL, "LaraMiniConfig", _GROUPED, _GATED_DELTA, head_dim=12),
        # PEFT refuses out_proj, which Mamba's kernels read past the adapter
        "mamba": _of(CAUSAL, "MambaConfig", _TOKENS, vocab_size=96, hidden_size=32, num_hidden_layers=1)._replace(
            unfit=("out_proj",)
        ),
    }


def _encoders_and_sequence_models() -> dict[str, Family]:
    bart = {"d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_layers": 1, "decoder_layers": 1}
    bart |= {"vocab_size": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **_TOKENS}
    bert = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 32, **_HEADS}
    audio = {**_TOWER, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    audio |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return {
        "t5": Family(SEQ2SEQ, tiny.t5),
        "bart": _of(SEQ2SEQ, "BartConfig", bart, max_position_embeddings=32, decoder_start_token_id=2),
        "whisper": _of(
            "AutoModelForSpeechSeq2Seq",
            "WhisperConfig",
            {**bart, "max_source_positions": 16, "max_target_positions": 16},
            num_mel_bins=8,
            decoder_start_token_id=2,
        ),
        "bert": _of(MASKED, "BertConfig", bert),
        "roberta": _of(MASKED, "RobertaConfig", bert),
        "deberta-v2": _of(MASKED, "DebertaV2Config", bert, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "distilbert": _of(MASKED, "DistilBertConfig", vocab_size=96, dim=48, hidden_dim=80, n_layers=1, n_heads=4),
        "electra": _of(MASKED, "ElectraConfig", bert, embedding_size=24),
        "albert": _of(MASKED, "AlbertConfig", bert, embedding_size=24),
        # PEFT takes a targeted lm_head for an embedding, and fails to find the input embedding beside it
        "wav2vec2": _of("AutoModelForCTC", "Wav2Vec2Config", audio)._replace(unfit=("lm_head",)),
        "hubert": _of("AutoModelForCTC", "HubertConfig", audio)._replace(unfit=("lm_head",)),
    }


def _vision_models() -> dict[str, Family]:
    staged: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
    pyramid: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    pyramid |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return {
        "vit": _of(IMAGES, "ViTConfig", _TOWER_SIZES, num_labels=3),
        "deit": _of(IMAGES, "DeiTConfig", _TOWER_SIZES, num_labels=3, architectures=["DeiTForImageClassification"]),
        "dinov2": _of(IMAGES, "Dinov2Config", _TOWER_SIZES, num_labels=3),
        "dinov2-swiglu": _of(IMAGES, "Dinov2Config", _TOWER_SIZES, num_labels=3, use_swiglu_ffn=True),
        "swin": _of(IMAGES, "SwinConfig", staged, window_size=4, num_labels=3),
        "beit": _of(IMAGES, "BeitConfig", _TOWER_SIZES, num_labels=3),
        "segformer": _of(IMAGES, "SegformerConfig", pyramid, num_labels=3),
        "clip": Family(ENCODER, tiny.clip),
        "siglip": _of(
            ENCODER,
            "SiglipConfig",
            text_config={**_TOWER, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 32},
            vision_config=_TOWER_SIZES,
        ),
    }


def _image_text_models() -> dict[str, Family]:
    llama, qwen2 = _text("llama", tie_word_embeddings=False), _text("qwen2", tie_word_embeddings=False)
    llava = {**_IMAGE, "text_config": llama, "vision_config": _CLIP_TOWER, "tie_word_embeddings": False}
    llava |= {"vision_feature_layer": -1}
    anyres = {**llava, "image_grid_pinpoints": [[16, 32]]}
    gemma = _text("gemma", head_dim=12)
    gemma3 = _text("gemma3_text", head_dim=12, sliding_window=16)
    idefics = {**_IMAGE, "text_config": llama, "vision_config": _TOWER_SIZES, "scale_factor": 2}
    idefics |= {"tie_word_embeddings": False}
    mllama_text = _text("mllama_text_model", cross_attention_layers=[1], tie_word_embeddings=False)
    mllama_text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    mllama_vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "attention_heads": 2,
        "num_hidden_layers": 2,
    }
    mllama_vision |= {"num_global_layers": 1, "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [0]}
    mllama_vision |= {"vision_output_dim": 64, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]]}
    pix2struct = {"hidden_size": 48, "d_kv": 12, "d_ff": 80}
    return {
        "llava": _of(VLM, "LlavaConfig", llava),
        "llava-next": _of(VLM, "LlavaNextConfig", anyres),
        "llava-onevision": _of(
            VLM, "LlavaOnevisionConfig", {**anyres, "text_config": qwen2, "vision_config": _SIGLIP_TOWER}
        ),
        "paligemma": _of(
            VLM, "PaliGemmaConfig", _IMAGE, text_config=gemma, vision_config=_SIGLIP_TOWER, projection_dim=48
        ),
        "mistral3": _of(
            VLM,
            "Mistral3Config",
            {**llava, "text_config": _text("mistral", head_dim=12), "vision_config": _PIXTRAL_TOWER},
        ),
        "gemma3": _of(
            VLM, "Gemma3Config", text_config=gemma3, vision_config=_SIGLIP_TOWER, mm_tokens_per_image=4, **_IMAGE
        ),
        "idefics3": _of(VLM, "Idefics3Config", idefics),
        "smolvlm": _of(VLM, "SmolVLMConfig", idefics),
        "internvl": _of(
            VLM,
            "InternVLConfig",
            {**_IMAGE, "text_config": qwen2, "tie_word_embeddings": False},
            vision_config={**_TOWER, "image_size": [16, 16], "patch_size": [8, 8]},
        ),
        "pix2struct": _of(
            VLM,
            "Pix2StructConfig",
            text_config={**pix2struct, "vocab_size": 96, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0},
            vision_config={**pix2struct, **_HEADS, "patch_embed_hidden_size": 48, "seq_len": 16},
        ),
        "mllama": _of(VLM, "MllamaConfig", _IMAGE, text_config=mllama_text, vision_config=mllama_vision),
        "blip2": _of(
            VLM,
            "Blip2Config",
            vision_config=_TOWER_SIZES,
            qformer_config={**_TOWER, "encoder_hidden_size": 32, "vocab_size": 64},
            text_config={"model_type": "opt", **tiny.opt().to_dict()},
            num_query_tokens=4,
            image_token_index=90,
        ),
    }


def _grid_models() -> dict[str, Family]:
    """Qwen's, whose vision tower takes images of any size, and its audio models."""
    text = _text("", rope_parameters=_M_ROPE, tie_word_embeddings=False)
    del text["model_type"]
    tower = {"depth": 1, "hidden_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48}
    qwen2_5_tower = {**tower, "intermediate_size": 64, "fullatt_block_indexes": [0], "window_size": 16}
    qwen3_tower = {**tower, "intermediate_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    audio = {"d_model": 32, "encoder_ffn_dim": 48, "encoder_layers": 1, "encoder_attention_heads": 2}
    audio |= {"num_mel_bins": 8, "max_source_positions": 16}
    return {
        "qwen2-vl": _of(
            VLM, "Qwen2VLConfig", vision_config={**tower, "embed_dim": 32, "mlp_ratio": 2}, text_config=text
        ),
        "qwen2.5-vl": _of(VLM, "Qwen2_5_VLConfig", vision_config=qwen2_5_tower, text_config=text),
        "qwen3-vl": _of(VLM, "Qwen3VLConfig", vision_config=qwen3_tower, text_config=text | {"head_dim": 12}, **_IMAGE),
        "qwen2.5-omni-thinker": _of(
            MULTIMODAL,
            "Qwen2_5OmniThinkerConfig",
            text_config=text,
            vision_config=qwen2_5_tower,
            audio_config={**audio, "output_dim": 48, "n_window": 4},
        ),
        "qwen2-audio": _of(
            MULTIMODAL, "Qwen2AudioConfig", text_config=_text("qwen2", tie_word_embeddings=False), audio_config=audio
        ),
    }


FAMILIES = {
    **_decoders(),
    **_encoders_and_sequence_models(),
    **_vision_models(),
    **_image_text_models(),
    **_grid_models(),
}


def linear_modules(model: nn.Module, unfit: tuple[str, ...] = ()) -> list[str]:
    """Return the full names of the linear layers, transposed ones included, but for tied output embeddings.

    Those inside torch's own attention are left out: PEFT targets that as a whole.
    """
    attention = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    conv1d = transformers.pytorch_utils.Conv1D
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, conv1d))
        and name.rpartition(".")[0] not in attention
        and id(module.weight) not in embeddings
        and not name.endswith(unfit or ("\0",))
    ]
