"""mergekit's `model+lora` references, alone or as the one model of its YAML file, as an export job.

Source: mergekit `common.py` (`ModelReference.parse`, `ModelPath`) and `config.py`: each side may have `@revision`;
`dtype` names the output's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rawmerge.dtypes import OUTPUT_DTYPES
from rawmerge.errors import Problem, RefusedError
from rawmerge.exporting.export_job import ExportJob
from rawmerge.exporting.typed_keys import TypedKeys

TOOL: Final = "mergekit"
MARKS: Final = frozenset({"merge_method", "models", "slices"})
OUTPUT_KEY: Final = "export_dir"
_PLUS: Final = "+"
_METHODS: Final = (None, "passthrough", "linear")


def mergekit_job(document: Mapping[str, Any]) -> ExportJob:
    """Return the job of a mergekit file that names one model with a LoRA, and `export_dir` for the output.

    Args:
        document: the file's table, overrides applied.

    Raises:
        RefusedError: with what makes it a merge of several models, or is missing or wrong.
    """
    keys = TypedKeys(document)
    reference = _reference(keys)
    dtype = keys.value("out_dtype") or keys.value("dtype")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        keys.refuse("out_dtype" if keys.value("out_dtype") else "dtype", f"one of {', '.join(OUTPUT_DTYPES)}")
    output = keys.required(
        OUTPUT_KEY, "the folder to make", "mergekit takes it from its command line: export_dir=merged/"
    )
    keys.raise_problems()
    return reference_job(reference, output, dtype if isinstance(dtype, str) else None)


def reference_job(reference: str, output: str, dtype: str | None = None) -> ExportJob:
    """Return the job of one reference such as `org/base+org/lora@revision`.

    Args:
        reference: base and adapter, each a path or hub id.
        output: the folder to make.
        dtype: see `ExportJob`.

    Raises:
        RefusedError: it is not two names joined by one `+`.
    """
    base, _, adapter = reference.partition(_PLUS)
    if not base or not adapter or _PLUS in adapter:
        raise RefusedError(Problem(reference, "base+adapter, such as org/base+org/lora@revision", "another reference"))
    return ExportJob(tool=TOOL, base=base, adapters=(adapter,), output=output, dtype=dtype)


def _reference(keys: TypedKeys) -> str:
    """Return the one reference of a file, an empty text after a refusal."""
    hint = "rawmerge adds adapters to their base; it does not mix models: use mergekit for that"
    if keys.value("merge_method") not in _METHODS:
        keys.refuse("merge_method", "passthrough or linear, with one model", hint)
    key = "models" if keys.value("models") is not None else "slices"
    entries = keys.value(key)
    entry = entries[0] if isinstance(entries, list) and len(entries) == 1 else None
    reference = entry.get("model") if isinstance(entry, dict) else None
    weight = _weight(entry)
    if not isinstance(reference, str) or _PLUS not in reference or "\0" in reference or weight not in (None, 1):
        keys.refuse(key, "one model, written base+adapter, with its whole weight", hint)
        return ""
    return reference


def _weight(entry: Any) -> Any:
    parameters = entry.get("parameters") if isinstance(entry, dict) else None
    return parameters.get("weight") if isinstance(parameters, dict) else parameters
