"""The grammar of tensor names in a PEFT adapter file.

A name is `base_model.model.` + the module's path in the trained model + what the tensor is for that module. PEFT
takes the adapter's own name ("default") out when it saves. Trainers that write their own files leave it in, leave
out the prefix, or leave in the segments of what they wrapped the model in; such names mean the same.

Source: PEFT 0.21.2 `utils/save_and_load.py` `get_peft_model_state_dict`, `tuners/tuners_utils.py`
`_remove_adapter_name_from_state_dict_key`, and `utils/other.py` (`ModulesToSaveWrapper`, `TrainableTokensWrapper`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, NamedTuple

from rawmerge.formats.name_grammar import PLAIN_LORA, Grammar, read_own

PREFIX: Final = "base_model.model."
#: Segments that torch.compile, FSDP and activation checkpointing add, anywhere in a path.
WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Segment that DistributedDataParallel and DataParallel add; a common name, so it is theirs at the very front only.
DATA_PARALLEL: Final = "module"
#: The name that PEFT gives an adapter unless told another.
DEFAULT_NAMES: Final = frozenset({"default"})

#: PEFT's part -> what the name may end in -> (role, parameter of the module that the tensor changes).
PARTS: Final = {
    "lora_A": {"weight": ("lora_a", "weight")},
    "lora_B": {"weight": ("lora_b", "weight"), "bias": ("lora_b_bias", "bias")},
    "lora_embedding_A": {"": ("lora_embedding_a", "weight")},
    "lora_embedding_B": {"": ("lora_embedding_b", "weight")},
    "trainable_tokens_delta": {"": ("token_rows", "weight")},
}
#: Roles of the two halves of a LoRA pair.
PAIR_ROLES: Final = frozenset({"lora_a", "lora_b", "lora_embedding_a", "lora_embedding_b"})
_LORA_ROLES: Final = PAIR_ROLES | {"lora_b_bias"}

#: Segments that PEFT puts between a module and its parameters.
_CONTAINERS: Final = {
    "modules_to_save": "a saved module with adapters of its own",
    "original_module": "a saved module with adapters of its own",
    "token_adapter": "a part of a token adapter that PEFT does not save",
    "base_layer": "a tensor inside a module that is itself targeted, as in nn.MultiheadAttention",
}
#: Segments of LoRA's variants, and of files that were not gathered.
_VARIANTS: Final = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_E": "a tensor of AdaLoRA",
    "lora_ranknum": "a tensor of AdaLoRA",
    "lora_diag": "a KaSA diagonal",
    "lora_velora_embed": "a VeLoRA projection",
    "lora_monteclora_sampler": "a MonteCLoRA sampler",
    "_flat_param": "a flat parameter of FSDP, whose shards were not gathered",
}
#: What stands between an nn.MultiheadAttention that is targeted and the pair on its output projection.
_INNER: Final = ["base_layer", "out_proj"]
_MISNAMED: Final = "a LoRA tensor with a name PEFT does not save"
#: How the tensors of PEFT's other kinds begin; longer than PEFT's own prefix where that is a common word.
_OTHER_KINDS: Final = re.compile(
    r"(adamss|beft|boft|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lily|ln_tuning|lokr|oft|osf"
    r"|peanut|poly_lora|psoft|pvera|randlora|shira|supertuning|tinylora|trainable_tokens|unilora|vblora|vera|waveft)_"
    r"|miss_block|poly_router|road_(alpha|theta)|shadow_(alpha|down|up)"
)


@dataclass(frozen=True, slots=True)
class AdapterTensorName:
    """A parsed name.

    Attributes:
        text: the name as the file has it.
        role: `lora_a`, `lora_b`, `lora_embedding_a`, `lora_embedding_b`, halves of a pair; `lora_b_bias`, that pair's
            bias; a role of the kind's own grammar; `token_rows`, trained rows of an embedding; `stored`, a whole tensor
            that replaces the base's; `stored_base`, the same for a module that PEFT wraps; `saved_copy`, a tensor of a
            module in `modules_to_save` under the name it has in memory; `original_copy`, that module's tensor before
            training; `foreign`, a name that this version does not follow.
        module_path: path of the module in the trained model, without prefix, wrappers and PEFT's own segments.
        parameter: the module's parameter that the tensor is about; of a `saved_copy` it may lie deeper (dots).
        depth: how many `.base_layer` stood between the module and its pair: PEFT nests the pairs of
            `target_parameters` on one module, the first parameter innermost.
        adapter_name: the adapter's own name, where it was left in; else empty.
        wrappers: segments taken out that are neither the model's nor PEFT's: first `module`, then in file order.
        is_inner: whether the module lies inside one that is itself targeted: the out_proj of an nn.MultiheadAttention.
    """

    text: str
    role: str
    module_path: str
    parameter: str
    depth: int = 0
    adapter_name: str = ""
    wrappers: tuple[str, ...] = ()
    is_inner: bool = False

    @property
    def target(self) -> str:
        """Name of the trained model's tensor that this one changes; of nested pairs, of the module's `weight`."""
        return f"{self.module_path}.{self.parameter}" if self.module_path else self.parameter


class _Reading(NamedTuple):
    role: str
    module: list[str]
    parameter: str
    depth: int = 0
    adapter_name: str = ""
    is_inner: bool = False


def parse_adapter_name(
    text: str, known_names: frozenset[str] = DEFAULT_NAMES, grammar: Grammar = PLAIN_LORA
) -> AdapterTensorName:
    """Return what `text` says; a name outside the grammar gets the role `foreign`.

    Args:
        text: the name.
        grammar: how the adapter's kind names its own tensors.
        known_names: what counts as an adapter's own name behind `modules_to_save`, where a submodule's name may
            stand as well; elsewhere the grammar tells them apart.

    Example:
        >>> parse_adapter_name("base_model.model.h.0.attn.lora_A.default.weight").module_path
        'h.0.attn'
    """
    wrappers, segments = _unwrap(text)
    reading = _read(segments, known_names, grammar) or _Reading("foreign", segments, "")
    role, module, parameter, depth, adapter_name, is_inner = reading
    return AdapterTensorName(text, role, ".".join(module), parameter, depth, adapter_name, wrappers, is_inner)


def parse_adapter_names(texts: Iterable[str], grammar: Grammar = PLAIN_LORA) -> list[AdapterTensorName]:
    """Return what each name of one file says, read with the adapter names that the file's other names show."""
    names = [parse_adapter_name(text, grammar=grammar) for text in texts]
    known = DEFAULT_NAMES | adapter_names(names)
    return [parse_adapter_name(name.text, known, grammar) if name.role == "saved_copy" else name for name in names]


def adapter_names(names: Iterable[AdapterTensorName]) -> set[str]:
    """Return the adapters' own names found in tensor names; more than one is a file of several adapters."""
    return {name.adapter_name for name in names} - {""}


def find_duplicates(names: Iterable[AdapterTensorName]) -> list[tuple[str, str]]:
    """Return pairs of names in the file that mean the same, as with and without the adapter's name.

    `stored` and `stored_base` mean the same here: both replace the tensor. Foreign names mean nothing.
    """
    seen: dict[tuple[str, str, int], str] = {}
    duplicates = []
    for name in names:
        role = "stored" if name.role == "stored_base" else name.role
        first = seen.setdefault((role, name.target, name.depth), name.text)
        if first != name.text and role != "foreign":
            duplicates.append((first, name.text))
    return duplicates


def describe_foreign(text: str) -> str:
    """Say what a foreign name looks like."""
    _, segments = _unwrap(text)
    if not all(segments):
        return "a name with an empty part"
    described = (what for part, what in {**_VARIANTS, **_CONTAINERS}.items() if part in segments)
    return next(described, "") or next(filter(None, map(_describe_segment, segments)), "an unknown name")


def _describe_segment(segment: str) -> str:
    if segment == "trainable_tokens_delta":
        return "trained token rows of a kind of their own, not LoRA's"
    if segment.startswith("lora_"):
        return _MISNAMED
    return "a tensor of another kind of PEFT adapter" if _OTHER_KINDS.match(segment) else ""


def _unwrap(text: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the wrappers' segments, and the others without PEFT's prefix."""
    segments = text.split(".")
    wrappers = [segment for segment in segments if segment in WRAPPERS]
    rest = [segment for segment in segments if segment not in WRAPPERS]
    parallel = list(takewhile(DATA_PARALLEL.__eq__, rest))
    rest = rest[len(parallel) :]
    prefix = PREFIX.split(".")[:-1]
    while rest[: len(prefix)] == prefix:
        rest = rest[len(prefix) :]
    return (*parallel, *wrappers), rest or [""]


def _read(segments: list[str], known_names: frozenset[str], grammar: Grammar) -> _Reading | None:
    if not all(segments):  # torch has no empty module names
        return None
    if (reading := _read_own(segments, grammar)) or grammar.is_foreign:
        return reading
    if grammar.has_pairs and any(segment in PARTS for segment in segments):
        return _read_part(segments)
    if "modules_to_save" in segments or "original_module" in segments:
        return _read_copy(segments, known_names)
    return _read_whole(segments)


def _read_own(segments: list[str], grammar: Grammar) -> _Reading | None:
    """Read a name of the kind's own grammar, the adapter's name left in or not."""
    found = read_own(segments, grammar)
    if found is None or (not grammar.is_foreign and any(map(_is_of_peft, found.module))):
        return None
    return _Reading(found.role, found.module, found.parameter, 0, found.adapter_name)


def _read_part(segments: list[str]) -> _Reading | None:
    """Read `<module>[.base_layer…].<part>[.<adapter's name>][.weight]`, an attention's out_proj as a module, too."""
    place = max(index for index, segment in enumerate(segments) if segment in PARTS)
    module, part, tail = segments[:place], segments[place], segments[place + 1 :]
    ending = tail.pop() if tail and tail[-1] in {"weight", "bias"} else ""
    role, parameter = PARTS[part].get(ending, ("", ""))
    is_name = len(tail) <= 2 and len(set(tail)) <= 1 and not set(tail) & {"weight", "bias"}  # some write it twice
    depth = 0
    if role == "token_rows" and module[-1:] == ["token_adapter"]:
        module = module[:-1]
    elif role in _LORA_ROLES:
        depth = len(list(takewhile("base_layer".__eq__, reversed(module))))
        module = module[: len(module) - depth]
    else:
        return None
    is_inner = role in _LORA_ROLES and not depth and len(module) > 2 and module[-2:] == _INNER
    if is_inner:
        module = [*module[:-2], module[-1]]
    # a path that still holds a segment of PEFT's own is no path of the trained model
    if not (is_name and module) or set(module) & (_CONTAINERS.keys() | PARTS.keys()):
        return None
    return _Reading(role, module, parameter, depth, tail[0] if tail else "", is_inner)


def _read_copy(segments: list[str], known_names: frozenset[str]) -> _Reading | None:
    """Read `<module>.modules_to_save[.<adapter's name>].<param>` or `<module>.original_module.<param>`."""
    place = next(index for index, segment in enumerate(segments) if segment in {"modules_to_save", "original_module"})
    module, container, tail = segments[:place], segments[place], segments[place + 1 :]
    role, adapter_name = "original_copy", ""
    if container == "modules_to_save":
        role = "saved_copy"
        while len(tail) > 1 and tail[0] in known_names and adapter_name in {"", tail[0]}:
            adapter_name, tail = tail[0], tail[1:]
    if not (module and tail) or any(map(_is_of_peft, [*module, *tail])):
        return None
    return _Reading(role, module, ".".join(tail), 0, adapter_name)


def _read_whole(segments: list[str]) -> _Reading | None:
    """Read `<module>.<param>` or `<module>[.token_adapter].base_layer.<param>`, a module inside `<module>` too."""
    path = [
        segment
        for segment, following in zip(segments, [*segments[1:], ""], strict=True)
        if segment != "base_layer" and (segment, following) != ("token_adapter", "base_layer")
    ]
    is_wrapped = len(path) < len(segments)
    if any(map(_is_of_peft, path)) or (is_wrapped and (len(path) < 2 or segments[-1] == "base_layer")):
        return None
    return _Reading("stored_base" if is_wrapped else "stored", path[:-1], path[-1])


def _is_of_peft(segment: str) -> bool:
    is_named = segment in _CONTAINERS or segment in _VARIANTS
    return is_named or segment.startswith("lora_") or bool(_OTHER_KINDS.match(segment))
