"""Chat formats under LLaMA-Factory's names, as far as an ollama Modelfile needs them.

Source: the formats that `data/template.py` of LLaMA-Factory 0.9.5 registers, and those of 0.9.4 that it dropped, with
placeholders written as ollama does: rawmerge/chat_templates.json, made by scripts/make_chat_templates.py. Templates
that name tokens by number are left out; LLaMA-Factory makes no Modelfile of them either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

#: Stand for the text of the tokenizer's tokens, or for nothing where it has none.
BOS: Final = "{bos}"
EOS: Final = "{eos}"
CONTENT: Final = "{{ .Content }}"
SYSTEM: Final = "{{ .System }}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """How a conversation is written for a model.

    Attributes:
        user: a user's message, up to where the assistant's begins.
        assistant: the assistant's message.
        system: the system message.
        prefix: what stands before all.
        default_system: the system message where none is given.
        stops: words at which the model stops, besides the tokenizer's end token.
        replaces_eos: whether the first of them takes that token's place.
    """

    user: str = CONTENT
    assistant: str = CONTENT + EOS
    system: str = SYSTEM
    prefix: str = ""
    default_system: str = ""
    stops: tuple[str, ...] = ()
    replaces_eos: bool = False


@cache
def chat_templates() -> Mapping[str, ChatTemplate]:
    """Return each template by LLaMA-Factory's name for it."""
    table = json.loads(Path(__file__).parent.with_name("chat_templates.json").read_bytes())
    return {name: _template(**parts) for name, parts in table.items()}


def _template(*, stops: list[str] | None = None, **parts: Any) -> ChatTemplate:
    return ChatTemplate(stops=tuple(stops or ()), **parts)
