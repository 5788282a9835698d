"""What rawmerge reads from a base's `config.json`, and the edits that keep it true after a merge.

Source: transformers 5.24 `configuration_utils.py` (`dtype`, once `torch_dtype`; nested configs carry their own).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rawmerge.errors import CheckpointError, Problem, quote
from rawmerge.formats.config_text import insert_values, replace_values
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_MEND: Final = "mend it, or take the file anew from where the model came from"
_PLAIN_DTYPES: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_MAX_SHOWN: Final = 80
TIE_KEY: Final = "tie_word_embeddings"
#: Lfm2's checkpoints call it `tie_embedding`, and that name wins.
_TIE_KEYS: Final = (TIE_KEY, "tie_embedding")
#: Keys of nested configs that describe the text model, or a part of it; other nested configs see or hear.
#: Source: transformers 5.24 `PreTrainedConfig.get_text_config`, and names that custom code uses.
TEXT_KEYS: Final = frozenset(
    """
    decoder decoder_config encoder generator language_config language_model llm_config text_config text_encoder
    text_model thinker_config vlm_config
    """.split()  # noqa: SIM905  # a list would take a line for each
)

#: Families whose Linear layers are transformers' Conv1D, stored (in, out): model_type -> last part of module path.
CONV1D_MODULES: Final = {
    model_type: frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
    for model_type in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
}
#: Families whose config class in transformers 5.24 has tie_word_embeddings true where the file does not say.
TIED_BY_DEFAULT: Final = frozenset(
    """
    albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
    blip_text_model bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text
    convbert cpmant csm ctrl d_fine dab-detr data2vec-text deberta deberta-v2 deepseek_vl deepseek_vl_hybrid
    deformable_detr deimv2 diffusion_gemma diffusion_gemma_text distilbert electra ernie ernie4_5 ernie4_5_moe
    ernie4_5_vl_moe ernie4_5_vl_moe_text esm falcon falcon_mamba flaubert flava florence2 fnet fun_asr_nano
    funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text
    gemma4_unified gemma4_unified_assistant gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese granite_docling granite_docling_text granite_speech granite_speech5_ctc
    granite_speech_plus granite_swa grounding-dino gte hunyuan_vl hunyuan_vl_text hyperclovax_vision_v2 ibert
    internvl janus jetmoe jina_embeddings_v3 kimi_k25 kosmos-2 kosmos-2.5 kosmos_2_5_text_model
    kosmos_2_text_model lara_mini layoutlm led lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr longformer longt5 luke
    lxmert m2m_100 mamba marian mbart megatron-bert mimi mimi_decoder mimi_encoder minicpm3 minicpm_ocr mistral3
    mm-grounding-dino mobilebert modernbert modernbert-decoder moonshine moss_transcribe_diarize mpnet mpt mra
    mt5 mvp neomme nllb-moe nomic_bert nystromformer openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text
    paligemma pe_audio_video pegasus pegasus_x plbart pop2piano pp_chart2table pp_doclayout_v3 pp_doclayout_v4
    prophetnet qwen2_5_omni_text qwen3_asr qwen3_vl_moe_text recurrent_gemma roberta roberta-prelayernorm
    roc_bert roformer rt_detr_v2 sam sam_hq seamless_m4t seamless_m4t_v2 shieldgemma2 smollm3 speech_to_text
    speecht5 squeezebert starcoder2 switch_transformers t5 t5_gemma_module t5gemma t5gemma2 t5gemma2_decoder
    t5gemma2_encoder t5gemma2_text tapas trocr udop umt5 vaultgemma vilt visual_bert voxtral_realtime whisper
    xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905  # a list would take a line for each
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base's `config.json`.

    Attributes:
        text: the file as it stands, an empty string where the base has none.
        fields: the parsed object.
    """

    text: str
    fields: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """The `model_type` field, an empty string where it is missing."""
        value = self.fields.get("model_type")
        return value if isinstance(value, str) else ""

    @property
    def architectures(self) -> tuple[str, ...]:
        """The class names in `architectures`, empty where the field is missing."""
        value = self.fields.get("architectures")
        return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()

    @property
    def ties_embeddings(self) -> bool:
        """Whether loaders use the input embedding as output projection when the file has no lm_head.

        Source: transformers 5.24, whose vision-language configs take the tie over from their text config.
        """
        stated = [is_tied for _, is_tied in _stated_ties(self.fields, ())]
        return any(stated) if stated else any(_ties_unsaid(fields) for _, fields in self.text_sides())

    def text_sides(self) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
        """Yield this config and the nested ones that describe text, outer ones first: path of keys, and fields."""
        yield from _text_sides(self.fields, ())

    @property
    def stated_dtype(self) -> str:
        """The torch name of the dtype that loaders take for `auto`, an empty string where none is stated.

        Some vision-language configs state it in the text config only.

        Source: transformers 5.24 `PreTrainedConfig.__post_init__` (`dtype` wins).
        """
        stated = (fields.get(key) for _, fields in self.text_sides() for key in DTYPE_KEYS)
        return next((value.removeprefix("torch.") for value in stated if isinstance(value, str)), "")

    @property
    def odd_dtype(self) -> str:
        """What stands in place of a dtype's name, as JSON; an empty string for nothing."""
        stated = (fields.get(key) for _, fields in self.text_sides() for key in DTYPE_KEYS)
        found = next((value for value in stated if value is not None), None)
        return "" if found is None else quote(json.dumps(found)[:_MAX_SHOWN])

    @property
    def model_types(self) -> frozenset[str]:
        """The `model_type` of this config and of those nested in it, such as an encoder's and a decoder's."""
        return frozenset(_model_types(self.fields))

    @property
    def is_of_transformers(self) -> bool:
        """Whether the model is built from transformers' own classes, as far as the config tells."""
        return bool(self.model_type) and "auto_map" not in self.fields

    def is_conv1d(self, module_name: str) -> bool:
        """Whether a module of this last name is a Conv1D, stored (in, out), in a family that has some."""
        return any(module_name in CONV1D_MODULES.get(model_type, ()) for model_type in self.model_types)


def parse_model_config(raw: bytes, path: str) -> ModelConfig:
    """Return the config.

    Raises:
        CheckpointError: not strict JSON.
    """
    try:
        # transformers below 5 wrote infinite fields, such as Mamba2's time_step_limit, as Infinity
        fields = parse_json_object(raw, allows_infinity=True)
    except StrictJsonError as error:
        raise CheckpointError(Problem(path, "a config of strict JSON", str(error), _MEND)) from error
    return ModelConfig(raw.decode(), fields)


def with_dtype(config: ModelConfig, torch_name: str) -> str:
    """Return the text with each plain float dtype that it states, nested ones too, set to `torch_name`."""
    return replace_values(config.text, dict.fromkeys(_dtype_paths(config.fields, ()), torch_name))


def with_untied_embeddings(config: ModelConfig, text: str) -> str:
    """Return `text`, an edited config of this base, in which no class of transformers finds a tie.

    `tie_word_embeddings` becomes false wherever it stands, is inserted at the top, for that is what most classes read,
    and in each nested text config whose family ties where the file does not say, for some take the tie from there.

    Source: transformers 5.24 `modeling_utils.py` (`get_expanded_tied_weights_keys`, which asks each sub-model's own
    config) and `models/llava/configuration_llava.py` (which takes the text config's tie over).
    """
    stated = [path for path, _ in _stated_ties(config.fields, ())]
    sides = dict(config.text_sides())
    null = [(*path, TIE_KEY) for path, fields in sides.items() if TIE_KEY in fields and fields[TIE_KEY] is None]
    unsaid = [path for path, fields in sides.items() if TIE_KEY not in fields and (not path or _ties_unsaid(fields))]
    return insert_values(
        replace_values(text, dict.fromkeys([*stated, *null], False)), TIE_KEY, dict.fromkeys(unsaid, False)
    )


def _stated_ties(fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield each `tie_word_embeddings` of this config and of those nested in it: its path, and its value."""
    for key, value in fields.items():
        if key in _TIE_KEYS and isinstance(value, bool):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from _stated_ties(value, (*path, key))


def _ties_unsaid(fields: Mapping[str, Any]) -> bool:
    """Whether this config's family ties its embeddings where its file does not say."""
    model_type = fields.get("model_type")
    return isinstance(model_type, str) and model_type in TIED_BY_DEFAULT


def _text_sides(
    fields: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    yield path, fields
    for key, value in fields.items():
        if key in TEXT_KEYS and isinstance(value, dict):
            yield from _text_sides(value, (*path, key))


def _model_types(fields: Mapping[str, Any]) -> Iterator[str]:
    for key, value in fields.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _model_types(value)


def _dtype_paths(fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in fields.items():
        if key in DTYPE_KEYS and isinstance(value, str) and value in _PLAIN_DTYPES:
            yield (*path, key)
        elif isinstance(value, dict) and key != "quantization_config":
            yield from _dtype_paths(value, (*path, key))
