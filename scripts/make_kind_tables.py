#!/usr/bin/env python3
"""Write README.md's tables of adapter kinds from the registry.

`python scripts/make_kind_tables.py` rewrites them between their marks; with `--check` it exits 1 if they differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rawmerge.formats.adapter_fields import REFUSED_FIELDS, REFUSED_INITS
from rawmerge.methods import ADAPTER_KINDS
from rawmerge.methods.refused import REFUSED_KINDS

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- kinds: made by scripts/make_kind_tables.py -->", "<!-- end of kinds -->"


def kind_tables() -> str:
    """Return both tables: what is merged, and what is refused with the reason."""
    rows = [row for kind in ADAPTER_KINDS.values() for row in kind.rows()]
    merged = [(row.title, row.config, row.modules, row.formula, row.bits) for row in rows]
    refused = [
        *((f"`{kind}`", reason) for kind, reason in sorted(REFUSED_KINDS.items())),
        *((f"LoRA with `init_lora_weights` `{init}…`", reason) for init, reason in sorted(REFUSED_INITS.items())),
        *((f"LoRA with `{name}`", reason) for name, reason in sorted(REFUSED_FIELDS.items())),
    ]
    head = ("kind", "config", "on", "merge", "bits of PEFT")
    return "\n\n".join([START, _table(head, merged), _table(("refused", "why"), refused), END])


def with_tables(text: str) -> str:
    """Return the README's text with today's tables."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + kind_tables() + after


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


def main() -> int:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables differ")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    if arguments.check:
        return int(with_tables(text) != text)
    README.write_text(with_tables(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
