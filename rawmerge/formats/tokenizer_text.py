"""The one edit of a `tokenizer_config.json`: the side on which batches are padded. All other bytes stay."""

from __future__ import annotations

from typing import Final

from rawmerge.formats.config_text import insert_value, replace_values
from rawmerge.formats.strict_json import parse_json_object

PADDING_KEY: Final = "padding_side"


def with_left_padding(raw: bytes) -> bytes:
    """Return a tokenizer config that pads on the left, as generation wants it.

    Args:
        raw: the file's bytes.

    Raises:
        StrictJsonError: they are no strict JSON object.
    """
    fields = parse_json_object(raw, allows_infinity=True)
    if fields.get(PADDING_KEY) == "left":
        return raw
    text = raw.decode()
    if PADDING_KEY in fields:
        return replace_values(text, {(PADDING_KEY,): "left"}).encode()
    return insert_value(text, PADDING_KEY, "left").encode()
