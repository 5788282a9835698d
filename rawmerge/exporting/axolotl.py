"""axolotl's training file, as the export job of its `merge-lora`.

Source: axolotl `cli/merge_lora.py` and `cli/utils/lora_merge.py`: the adapter is `lora_model_dir`, else `output_dir`;
the output is `merged` in `output_dir`; each tensor keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from rawmerge.exporting.export_job import ExportJob
from rawmerge.exporting.typed_keys import TypedKeys

TOOL: Final = "axolotl"
MARK: Final = "base_model"
_MERGED: Final = "merged"
#: The output as `rawmerge export` has it for every tool; axolotl has no key of its own for it.
_OUTPUT: Final = "export_dir"
_USED: Final = frozenset({MARK, "lora_model_dir", "output_dir", "adapter"})


def axolotl_job(document: Mapping[str, Any], overridden: Collection[str] = ()) -> ExportJob:
    """Return the job that an axolotl file describes.

    Args:
        document: the file's table, overrides applied.
        overridden: keys that the command line gave; `export_dir` is the output then.

    Raises:
        RefusedError: with every key that is missing, wrong, or asks for what rawmerge does not do.
    """
    keys = TypedKeys(document)
    base, folder = keys.required(MARK, "the base: a folder or org/name"), keys.text("output_dir")
    adapter = keys.text("lora_model_dir") or folder
    for name in sorted(set(overridden) - _USED - {_OUTPUT}):
        keys.refuse(
            name, f"one of {', '.join(sorted(_USED | {_OUTPUT}))} on the command line", "the others are axolotl's"
        )
    if not folder and not keys.text(_OUTPUT):
        keys.refuse("output_dir", "the folder whose `merged` is made", "add `output_dir: out/`")
    kind = keys.value("adapter")
    if kind not in (None, "lora", "qlora"):
        keys.refuse("adapter", "lora or qlora", "axolotl's merge-lora takes no other either")
    keys.raise_problems()
    notes = ["axolotl takes the base's tokenizer; here the adapter's files win, so that added tokens are kept"]
    if kind == "qlora":
        notes.append("adapter qlora: merged into the base as stored; axolotl would round the base through 4 bits first")
    if others := [name for name in keys.names if name not in _USED | {_OUTPUT}]:
        notes.append(f"other keys ({len(others)}) are ignored, for they concern training")
    output = keys.text(_OUTPUT) or f"{folder.rstrip('/') or folder}/{_MERGED}"
    return ExportJob(tool=TOOL, base=base, adapters=(adapter,), output=output, tokenizer="adapter", notes=tuple(notes))
