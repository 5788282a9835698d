"""The special tokens of a tokenizer, as its files tell them: their texts, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rawmerge.formats.strict_json import parse_json_object
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.output.side_files import MAX_TOKENIZER_CONFIG_BYTES, TOKENIZER_CONFIG, SideFile

_TOKENS_MAP: Final = "special_tokens_map.json"
_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a chat template needs of a tokenizer.

    Attributes:
        bos: text of the token that begins a text, empty where there is none.
        eos: text of the token that ends one, empty where there is none.
        ids: text of an added token to its number, of those that the files tell.
    """

    bos: str
    eos: str
    ids: Mapping[str, int]


def read_special_tokens(files: Iterable[SideFile]) -> SpecialTokens | None:
    """Return a tokenizer's special tokens, None where it has no config.

    Args:
        files: the output's side files.

    Raises:
        StrictJsonError: a file is no strict JSON; MissingFileError, RefusedError: it cannot be read, or is too large.

    Source: transformers 5.24 `tokenization_utils_base.py` (`from_pretrained`).
    """
    paths = {file.name: Path(file.path) for file in files}
    if TOKENIZER_CONFIG not in paths:
        return None
    config = _fields(paths[TOKENIZER_CONFIG])
    older = _fields(paths[_TOKENS_MAP]) if _TOKENS_MAP in paths else {}
    ids = dict(_ids_of_config(config))
    if _TOKENIZER in paths and not ids:
        ids = dict(_ids_of_tokenizer(_fields(paths[_TOKENIZER])))
    bos, eos = (_text(config.get(name)) or _text(older.get(name)) for name in ("bos_token", "eos_token"))
    return SpecialTokens(bos, eos, ids)


def _fields(path: Path) -> Mapping[str, Any]:
    return parse_json_object(read_small_file(path, MAX_TOKENIZER_CONFIG_BYTES), allows_infinity=True)


def _text(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _ids_of_config(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    tokens = config.get("added_tokens_decoder")
    for number, token in tokens.items() if isinstance(tokens, dict) else ():
        if number.isdecimal() and len(number) < 10 and (text := _text(token)):
            yield text, int(number)


def _ids_of_tokenizer(tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    tokens = tokenizer.get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        number = token.get("id") if isinstance(token, dict) else None
        if type(number) is int and (text := _text(token)):
            yield text, number
