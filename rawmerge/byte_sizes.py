"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?b)?", re.IGNORECASE | re.ASCII)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LARGER: Final = ("kB", "MB", "GB", "TB")
_WHOLE: Final = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def parse_bytes(text: str) -> int:
    """Return the bytes that `text` names, rounded down.

    As in GNU's tools, `M` and `MiB` are 2**20 and `MB` is 10**6; the case of letters does not matter. A number alone is
    no size: whoever leaves the unit out mostly means megabytes.

    Raises:
        ValueError: it names no positive size, or no unit.

    Example:
        >>> parse_bytes("512M"), parse_bytes("2GiB"), parse_bytes("1.5 GB"), parse_bytes("1000B")
        (536870912, 2147483648, 1500000000, 1000)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size such as 512MiB, 2GiB or 3GB, not {text!r}")
    number, letter, ending = match.groups()
    if not letter and not ending:
        raise ValueError(f"expected a size with its unit, such as 512MiB, not {text!r}")
    unit = 1000 if letter and (ending or "").lower() == "b" else 1024
    whole, _, part = number.partition(".")
    count = int(whole + part) * int(unit ** _POWERS[letter.lower()]) // int(10 ** len(part))
    if count < 1:
        raise ValueError(f"expected a size of at least one byte, not {text!r}")
    return count


def byte_limit(name: str, size: int | str | None) -> int:
    """Return a limit that a program gave, in bytes; 0 where it gave none.

    Args:
        name: of the argument, for messages.
        size: bytes, or a text as in `parse_bytes`.

    Raises:
        ValueError: it is no positive size.

    Example:
        >>> byte_limit("max_shard_size", "5GB"), byte_limit("max_shard_size", None)
        (5000000000, 0)
    """
    if size is None:
        return 0
    try:
        count = parse_bytes(size) if isinstance(size, str) else size
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a size of at least one byte, or None, not {size!r}")
    return count


def size_text(count: int) -> str:
    """Return a size as `parse_bytes` takes it back, in the largest unit of which it is a whole number.

    Example:
        >>> size_text(2_000_000_000), size_text(512 * 2**20), size_text(1001)
        ('2GB', '512MiB', '1001B')
    """
    name, unit = next(((name, unit) for name, unit in _WHOLE.items() if count % unit == 0), ("B", 1))
    return f"{count // unit}{name}"


def format_bytes(count: int) -> str:
    """Return a size as people read it, in decimal units.

    Example:
        >>> format_bytes(3_500_000_000)
        '3.50 GB'
    """
    size, unit = float(count), "B"
    for larger in _LARGER:
        if round(size, 2) < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"
