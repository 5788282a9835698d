"""How inputs are changed: JSON by its values, pickles by their opcodes, everything else by libFuzzer."""

from __future__ import annotations

import copy
import json
import pickletools
import random
from collections.abc import Callable, Iterable
from typing import Any, Final

import atheris  # type: ignore[import-untyped]

Mutator = Callable[[bytes, int, int], bytes]

ODD: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2, 8, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "\0", "\n\x1b[2J", "\u202e", "\ud800", "é", "../x", "/etc/passwd", "CON", "a" * 300, ".", "a.b", ".." * 50),
    *("(a+)+$", "[", "(", "*", ".*" * 5, "[" * 2000, "a|" * 500, "x{99999}", r"(?P<a>.)(?P=a)", "(?i)a", "^$"),
    *("a" + "-4bit" * 30 + "!", ".*x" * 4, "a." * 200),
    *([], {}, [0], [[0, 1]], [0, 4], {"a": 1}, [None], ["a"], [[[[[[]]]]]], [0] * 70, {"": ""}, {"0": 1}),
)


def json_mutator(words: Iterable[str]) -> Mutator:
    """Return a mutator of JSON texts, or of lines of them, that knows these words."""
    known = sorted(set(words))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.25:
            return bytes(atheris.Mutate(data, max_size))
        lines = data.split(b"\n") if rng.random() < 0.5 else [data]
        place = rng.randrange(len(lines))
        try:
            document = json.loads(lines[place])
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                document = _changed(document, rng, known)
            lines[place] = _dumped(document, rng)
        except (ValueError, RecursionError):  # no JSON, or too deep to be copied; an error here ends the process
            return bytes(atheris.Mutate(data, max_size))
        return b"\n".join(lines)[:max_size]

    return mutate


#: Opcodes without an argument: marks, tuples, tables, names from the stack, memos, calls.
PLAIN_OPCODES: Final = (
    *(b"(", b"t", b"\x85", b"\x86", b"\x87", b"0", b"2", b"]", b"}", b"N", b"R", b"Q", b"u", b"s", b"e", b"a", b"b"),
    *(b"\x93", b"\x94", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x97", b"\x95" + bytes(8), b"\x95" + b"\xff" * 8),
)


def pickle_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a pickle opcode by opcode; anything else byte by byte."""
    rng = random.Random(seed)
    if rng.random() < 0.3 or not data.startswith(b"\x80"):
        return bytes(atheris.Mutate(data, max_size))
    try:
        ends = [place for _, _, place in pickletools.genops(data)]
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError):
        return bytes(atheris.Mutate(data, max_size))
    operations = [data[start:end] for start, end in zip(ends, [*ends[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change_operations(operations, rng)
    return b"".join(operations)[:max_size]


def _change_operations(operations: list[bytes], rng: random.Random) -> None:
    place, other = (rng.randrange(max(len(operations), 1)) for _ in range(2))
    taken = operations[min(place, other) : max(place, other) + 1]
    odd = (b"K\0", b"K\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f")
    match rng.randrange(5):
        case 0 if len(operations) > 1:
            del operations[place]
        case 1:
            operations[place:place] = taken[:20]
        case 2:
            operations[place : place + 1] = [rng.choice(odd)]
        case 3:
            operations[place : place + 1] = taken[:1]
        case _:
            operations.insert(place, rng.choice(PLAIN_OPCODES))


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))  # what is put into a document is changed there


def _slots(document: Any) -> list[tuple[Any, Any]]:
    """Return every place of a value: its container and key or index."""
    found: list[tuple[Any, Any]] = []
    level = [document]
    while level and len(found) < 20_000:
        here = level.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in items:
            found.append((here, key))
            level.append(value)
    return found


def _changed(document: Any, rng: random.Random, words: list[str]) -> Any:
    slots = _slots(document)
    if not slots or rng.random() < 0.01:
        return _odd(rng)
    container, key = rng.choice(slots)
    other, place = rng.choice(slots)
    copied = copy.deepcopy(other[place])
    value = rng.choice((copied, _odd(rng)))
    match rng.randrange(7):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, value)
        case 1:
            container[_text(key, rng, words)] = value
        case 2 if isinstance(container, dict):
            container[rng.choice(words or [""])] = value
        case 3 | 4:
            container[key] = value
        case _:
            container[key] = _nearby(container[key], rng, words)
    return document


def _nearby(value: Any, rng: random.Random, words: list[str]) -> Any:
    if isinstance(value, str):
        return _text(value, rng, words)
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)))
    return [value] if rng.random() < 0.5 else _odd(rng)


def _text(text: str, rng: random.Random, words: list[str]) -> str:
    odd = rng.choice([word for word in ODD if isinstance(word, str)])
    place = rng.randrange(len(text) + 1)
    parts = text.split(".")
    word = rng.choice(words or [""])
    return rng.choice((text[:place] + odd + text[place:], text[:place], f"{text}.{word}", ".".join(parts[1:]), word))


def _dumped(document: Any, rng: random.Random) -> bytes:
    separators = rng.choice((None, (",", ":")))
    text = json.dumps(document, ensure_ascii=rng.random() < 0.7, separators=separators)
    if rng.random() < 0.02 and text.startswith("{") and len(text) > 2:  # every member twice
        text = f"{text[:-1]},{text[1:]}"
    return text.encode(errors="surrogatepass")
