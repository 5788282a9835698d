"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """Return the bytes that `text` names, rounded down.

    As in GNU's tools, `M` and `MiB` are 2**20 and `MB` is 10**6; the case of letters does not matter.

    Raises:
        ValueError: it names no positive size.

    Example:
        >>> parse_bytes("512M"), parse_bytes("2GiB"), parse_bytes("1.5 GB"), parse_bytes("1000")
        (536870912, 2147483648, 1500000000, 1000)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size such as 512M, 2GiB or 3GB, not {text!r}")
    number, letter, ending = match.groups()
    unit = 1000 if letter and (ending or "").lower() == "b" else 1024
    count = int(float(number) * unit ** _POWERS[letter.lower()]) if "." in number else int(number)
    if "." not in number:
        count *= unit ** _POWERS[letter.lower()]
    if count < 1:
        raise ValueError(f"expected a size of at least one byte, not {text!r}")
    return count
