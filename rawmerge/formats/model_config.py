"""What rawmerge reads from a base's `config.json`, and the edits that keep it true after a merge.

Source: transformers 5.23 `configuration_utils.py` (`dtype`, once `torch_dtype`; nested configs carry their own).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rawmerge.errors import CheckpointError, Problem
from rawmerge.formats.config_text import insert_value, replace_values
from rawmerge.formats.strict_json import StrictJsonError, parse_json_object

DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_PLAIN_DTYPES: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
TIE_KEY: Final = "tie_word_embeddings"

#: Families whose Linear layers are transformers' Conv1D, stored (in, out): model_type -> last part of module path.
CONV1D_MODULES: Final = {
    model_type: frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
    for model_type in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
}
#: Families whose config class ties lm_head to the input embedding unless the file says otherwise.
TIED_BY_DEFAULT: Final = frozenset(
    """
    bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere
    cohere2 cohere2_moe cohere_compass_text cpmant ctrl data2vec-text electra ernie ernie4_5 ernie4_5_moe falcon
    falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text
    gemma4_unified gemma4_unified_assistant gemma4_unified_text got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox_japanese granite_swa jetmoe lfm2 lfm2_moe lfm3 mamba marian mbart megatron-bert minicpm3
    modernbert-decoder moss_transcribe_diarize mpt mvp openai-gpt opt pegasus plbart prophetnet recurrent_gemma
    roberta roberta-prelayernorm roc_bert roformer smollm3 starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod youtu zamba zamba2 zaya
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
        """Whether loaders use the input embedding as output projection when the file has no lm_head."""
        stated = self.fields.get(TIE_KEY)
        return stated if isinstance(stated, bool) else self.model_type in TIED_BY_DEFAULT

    def is_conv1d(self, module_path: str) -> bool | None:
        """Whether the module is a Conv1D, stored (in, out); None where the family is not known to have any."""
        names = CONV1D_MODULES.get(self.model_type)
        return None if names is None else module_path.rpartition(".")[2] in names


def parse_model_config(raw: bytes, path: str) -> ModelConfig:
    """Return the config.

    Raises:
        CheckpointError: not strict JSON.
    """
    try:
        # transformers below 5 wrote infinite fields, such as Mamba2's time_step_limit, as Infinity
        fields = parse_json_object(raw, allows_infinity=True)
    except StrictJsonError as error:
        raise CheckpointError(Problem(path, "a config of strict JSON", str(error))) from error
    return ModelConfig(raw.decode(), fields)


def with_dtype(config: ModelConfig, torch_name: str) -> str:
    """Return the text with each plain float dtype that it states, nested ones too, set to `torch_name`."""
    return replace_values(config.text, dict.fromkeys(_dtype_paths(config.fields, ()), torch_name))


def with_untied_embeddings(config: ModelConfig, text: str) -> str:
    """Return `text`, an edited config of this base, with `tie_word_embeddings` false wherever it was true."""
    paths = [(TIE_KEY,), *((key, TIE_KEY) for key, value in config.fields.items() if isinstance(value, dict))]
    edited = replace_values(text, dict.fromkeys(paths, False))
    return edited if TIE_KEY in config.fields else insert_value(edited, TIE_KEY, False)


def _dtype_paths(fields: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in fields.items():
        if key in DTYPE_KEYS and isinstance(value, str) and value in _PLAIN_DTYPES:
            yield (*path, key)
        elif isinstance(value, dict) and key != "quantization_config":
            yield from _dtype_paths(value, (*path, key))
