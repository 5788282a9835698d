"""The same merge through PEFT: load the model, load the adapter, merge, save. `... BASE ADAPTER OUTPUT`."""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge_with_peft(base: str, adapter: str, output: str) -> None:
    """Merge as PEFT's documentation shows it, with its defaults."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)


if __name__ == "__main__":
    merge_with_peft(*sys.argv[1:])
