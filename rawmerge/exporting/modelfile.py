"""The `Modelfile` with which ollama loads an exported model, as LLaMA-Factory writes it.

Source: LLaMA-Factory `data/template.py` (`get_ollama_modelfile`, `fix_special_tokens`, `get_stop_token_ids`).
"""

from __future__ import annotations

from typing import Final

from rawmerge.exporting.chat_templates import BOS, EOS, ChatTemplate
from rawmerge.exporting.tokenizer_tokens import SpecialTokens

MODELFILE: Final = "Modelfile"
#: What a tokenizer without an end token gets.
_USUAL_EOS: Final = "<|endoftext|>"


def modelfile_text(template: ChatTemplate, tokens: SpecialTokens, default_system: str | None = None) -> str:
    """Return the file's text.

    Args:
        template: how a conversation is written.
        tokens: of the tokenizer that lies beside the model.
        default_system: the system message, None for the template's own.
    """
    eos = template.stops[0] if template.replaces_eos else tokens.eos or _USUAL_EOS
    system = template.default_system if default_system is None else default_system
    conversation = (
        f"{template.prefix}{{{{ if .System }}}}{template.system}{{{{ end }}}}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{template.user}'
        f'{{{{ else if eq .Role "assistant" }}}}{template.assistant}{{{{ end }}}}{{{{ end }}}}'
    )
    pieces = [
        "# ollama modelfile, as llamafactory writes it\n\nFROM .\n\n",
        f'TEMPLATE """{conversation.replace(BOS, tokens.bos).replace(EOS, eos)}"""\n\n',
        f'SYSTEM """{system}"""\n\n' if system else "",
        *(f'PARAMETER stop "{stop}"\n' for stop in _stops(eos, template.stops, tokens)),
        "PARAMETER num_ctx 4096\n",
    ]
    return "".join(pieces)


def _stops(eos: str, stops: tuple[str, ...], tokens: SpecialTokens) -> list[str]:
    """Return each text at which the model stops, in the order in which LLaMA-Factory's set of numbers gives them."""
    words = list(dict.fromkeys([eos, *stops]))
    if not all(word in tokens.ids for word in words):
        return words
    names = {tokens.ids[word]: word for word in words}
    numbers: set[int] = set()
    for word in words:  # one by one, for the order of a set is that of its making
        numbers.add(tokens.ids[word])
    return [names[number] for number in numbers]
