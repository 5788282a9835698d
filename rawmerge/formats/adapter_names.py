"""The grammar of tensor names in a PEFT adapter file.

A name is `base_model.model.` + the module's path in the trained model + what the tensor is for that module. PEFT
takes the adapter's own name ("default") out when it saves.

Source: PEFT 0.21.2 `utils/save_and_load.py` `get_peft_model_state_dict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PREFIX: Final = "base_model.model."

#: Endings of the tensors of a LoRA pair: ending -> (role, parameter of the module that the pair changes).
PAIR_ENDINGS: Final = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_embedding_a",
    ".lora_embedding_B": "lora_embedding_b",
}
#: Ending of an embedding that PEFT stores whole beside its LoRA pair (`save_embedding_layers`).
STORED_BASE_ENDING: Final = ".base_layer.weight"

#: Parts of names that belong to a kind of adapter, or a part of LoRA, that this version does not merge.
FOREIGN_PARTS: Final = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "token_adapter": "trained token rows",
    "base_layer": "a pair on a nested module, or a trained bias",
    "modules_to_save": "a saved module under the name it has in memory, as when the vocabulary was resized",
    "lora_A": "a LoRA tensor with a name PEFT does not save",
    "lora_B": "a LoRA tensor with a name PEFT does not save, or a LoRA bias",
    "lora_embedding_A": "a LoRA tensor with a name PEFT does not save",
    "lora_embedding_B": "a LoRA tensor with a name PEFT does not save",
}


@dataclass(frozen=True, slots=True)
class AdapterTensorName:
    """A parsed name.

    Attributes:
        text: the name as the file has it.
        role: `lora_a`, `lora_b`, `lora_embedding_a`, `lora_embedding_b`; `stored` for a whole tensor that
            replaces the base's; `foreign` for a name that this version does not follow.
        module_path: path of the module in the trained model; for `stored` without the parameter's name.
        parameter: the module's parameter that the tensor is about, `weight` for pairs.
    """

    text: str
    role: str
    module_path: str
    parameter: str

    @property
    def target(self) -> str:
        """Name of the trained model's tensor that this one changes."""
        return f"{self.module_path}.{self.parameter}" if self.module_path else self.parameter


def parse_adapter_name(text: str) -> AdapterTensorName:
    """Return what `text` says; a name outside the grammar gets the role `foreign`.

    Example:
        >>> parse_adapter_name("base_model.model.h.0.attn.lora_A.weight").module_path
        'h.0.attn'
    """
    if not text.startswith(PREFIX):
        return AdapterTensorName(text, "foreign", text, "")
    path = text.removeprefix(PREFIX)
    for ending, role in PAIR_ENDINGS.items():
        if path.endswith(ending):
            return AdapterTensorName(text, role, path.removesuffix(ending), "weight")
    if path.endswith(STORED_BASE_ENDING):
        return AdapterTensorName(text, "stored", path.removesuffix(STORED_BASE_ENDING), "weight")
    if set(path.split(".")) & set(FOREIGN_PARTS):
        return AdapterTensorName(text, "foreign", path, "")
    module_path, _, parameter = path.rpartition(".")
    return AdapterTensorName(text, "stored", module_path, parameter)


def describe_foreign(text: str) -> str:
    """Say what a foreign name looks like."""
    if not text.startswith(PREFIX):
        return f"a name without {PREFIX!r}"
    parts = text.split(".")
    return next((what for part, what in FOREIGN_PARTS.items() if part in parts), "an unknown name")
