"""Makes one kind's adapter with PEFT, and PEFT's merge of it: `python -m benchmarks.kind_adapters NAME BASE DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import peft
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.check_kind import EXPECTED_FILE
from benchmarks.kind_cases import KIND_CASES, TARGETS, KindCase

#: Of the weights that PEFT's merge gives, those that are kept to compare with.
CHECKED_ENDS: Final = (".0.self_attn.q_proj.weight", ".0.self_attn.k_proj.weight", ".0.mlp.down_proj.weight")


def make_config(case: KindCase) -> Any:
    """Return PEFT's config for `case`."""
    fields = dict(case.fields)
    if case.variant:
        name, config = case.variant
        fields[name] = getattr(peft.tuners.lora.config, config)()
    return getattr(peft, case.config)(target_modules=list(TARGETS), **fields)


def load(base: Path) -> Any:
    """Load the base in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True).eval()


def save_adapter(case: KindCase, base: Path, directory: Path) -> None:
    """Save an adapter as PEFT initialises it, its trained values moved by noise."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load(base), make_config(case))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((case.spread * noise).to(parameter.dtype))
    model.save_pretrained(directory)


def save_expected(base: Path, adapter: Path) -> None:
    """Save some weights of PEFT's merge beside the adapter."""
    merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    weights = {
        name: parameter.detach().contiguous()
        for name, parameter in merged.named_parameters()
        if name.endswith(CHECKED_ENDS)
    }
    save_file(weights, adapter / EXPECTED_FILE)


def make_adapter(case: KindCase, base: Path, directory: Path) -> None:
    """Make `directory`, complete once it is there."""
    # Without a GPU, PEFT would try to compile its extension for every layer.
    boft_layer.get_fbd_cuda = lambda: None
    partial = directory.with_name(directory.name + ".partial")
    save_adapter(case, base, partial)
    save_expected(base, partial)
    partial.rename(directory)


if __name__ == "__main__":
    chosen = next(case for case in KIND_CASES if case.name == sys.argv[1])
    make_adapter(chosen, Path(sys.argv[2]), Path(sys.argv[3]))
