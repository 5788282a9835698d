"""Asks the installed transformers what LLaMA-Factory would save of a base, in a process of its own.

That process reads the base's config and is told names, dtypes and shapes; no weight and no code of the base gets there,
and the hub is switched off in it. What it answers is kept for as long as this process lives.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from rawmerge.dtypes import DTYPES
from rawmerge.errors import MissingFileError, PlanError, Problem, quote
from rawmerge.formats.config_text import CONFIG_NAME
from rawmerge.inputs.base_checkpoint import BaseCheckpoint
from rawmerge.inputs.comparison import same_bytes
from rawmerge.saved_model import meta_model
from rawmerge.saved_model.saved_layout import SavedLayout, SavedTensor

#: What the process needs, beside torch.
_PACKAGES: Final = ("transformers", "accelerate")
_EXCEPTION: Final = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")
_INSTALL: Final = "pip install accelerate 'transformers>=5', which rawmerge's extra llamafactory names"
#: A large model takes seconds; a config that asks for a billion layers must not take for ever.
_TIMEOUT_S: Final = 900
#: DeepSeek-V3's 45,395 tensors take 0.6; huge layers of a small config, or many that no field names, far more.
_MEMORY_GIB: Final = 4
_OUT_OF_MEMORY: Final = re.compile(r"\bMemoryError\b|bad_alloc|[Cc]an(not|'t) allocate memory")
_CODES: Final = {dtype.torch_name: code for code, dtype in DTYPES.items() if dtype.torch_name} | {"bool": "BOOL"}
_TORCH_NAMES: Final = {code: name for name, code in _CODES.items()}
#: Each thread of a library has a stack, which counts as memory taken.
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_SURROUNDINGS: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **_ONE_THREAD}


def saved_layout(base: BaseCheckpoint, dtype: str, max_shard_size: int) -> SavedLayout:
    """Return what LLaMA-Factory would save of a base, before an adapter changes values.

    Args:
        base: the base, a directory with a config.
        dtype: torch name of the dtype that all float tensors are cast to at last; empty for the config's.
        max_shard_size: most bytes of a shard.

    Raises:
        PlanError: transformers is not installed, does not know the model, finds other shapes in the checkpoint than
            the config says, or would not save it.
        MissingFileError: there is no config.
    """
    _check_base(base)
    shown = [(name, _TORCH_NAMES[at.dtype], at.shape) for name, at in base.tensors.items()]
    request = {"folder": str(base.root), "tensors": shown, "dtype": dtype, "max_shard_size": max_shard_size}
    request["most_memory"] = _MEMORY_GIB * 2**30
    answer = json.loads(_answer(json.dumps(request), base.config.text))
    if unlike := list(_unlike_problems(answer)):
        raise PlanError(*unlike)
    return _layout(answer, answer["tied" if _are_tied(base, answer["pairs"]) else "untied"])


def _check_base(base: BaseCheckpoint) -> None:
    if not base.is_directory or not base.config.text:
        raise MissingFileError(Problem(CONFIG_NAME, "it beside the weights, to know the model's class", "none"))
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        expected = "the packages that tell what LLaMA-Factory would save"
        raise PlanError(Problem("--like llamafactory", expected, f"no {' and no '.join(missing)}", _INSTALL))
    problems = []
    if base.config.fields.get("quantization_config"):
        hint = "LLaMA-Factory exports no quantised model; merge into the one that it was made from"
        problems.append(Problem("quantization_config", "a base that is not quantised", "one that is", hint))
    problems += (
        Problem(name, "a dtype that torch has under the same name", at.dtype, "leave --like llamafactory out")
        for name, at in base.tensors.items()
        if at.dtype not in _TORCH_NAMES
    )
    floats = {at.dtype for at in base.tensors.values() if DTYPES[at.dtype].is_mergeable}
    if not base.config.stated_dtype and len(floats) > 1:
        problems.append(Problem(CONFIG_NAME, "the dtype in which the model is loaded", "none", "state it, as dtype"))
    if problems:
        raise PlanError(*problems)


def _unlike_problems(answer: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield which shapes are not the model's, those of all layers at once."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, stored, own in answer.get("unlike", ()):
        groups.setdefault((re.sub(r"\d+", "*", name), str(stored), str(own)), []).append(name)
    for (folded, stored, own), names in groups.items():
        expected = f"{own}, which {CONFIG_NAME} gives {answer['class']} of transformers {answer['version']}"
        found = stored if len(names) == 1 else f"{stored}, in {len(names)} tensors"
        hint = f"is {CONFIG_NAME} that of these weights?"
        yield Problem(names[0] if len(names) == 1 else folded, expected, found, hint)


def _are_tied(base: BaseCheckpoint, pairs: list[list[str]]) -> bool:
    """Whether embeddings that the config ties, and that are stored one by one, have the same values.

    Raises:
        PlanError: some have, and others have not.
    """
    equal = {(one, other) for one, other in pairs if _are_equal(base, one, other)}
    if equal and len(equal) < len(pairs):
        found = "some with equal and some with other values"
        raise PlanError(Problem("tie_word_embeddings", "tied tensors of one kind", found))
    return bool(equal)


def _are_equal(base: BaseCheckpoint, *names: str) -> bool:
    one, other = (base.tensors.get(name) for name in names)
    if one is None or other is None:
        return False
    return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(one, other)


@lru_cache(maxsize=4)
def _answer(request: str, config_text: str) -> str:  # noqa: ARG001  # the config is read again, from the folder
    """Run the program, and return its answer.

    Raises:
        PlanError: it could not give one.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(request)
        # -P: no module of the folder beside the program is taken for a library's
        command = [sys.executable, "-P", str(Path(meta_model.__file__)), str(asked), str(answer)]
        surroundings = {**os.environ, **_SURROUNDINGS}
        try:
            done = subprocess.run(
                command, cwd=folder, env=surroundings, capture_output=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _refusal(f"no answer in {_TIMEOUT_S} s") from error
        if done.returncode or not answer.exists():
            raise _refusal(_reason(done.stderr.decode(errors="replace"), done.returncode))
        return answer.read_text()


def _reason(log: str, code: int) -> str:
    """Return why the program gave no answer, from what it wrote and its exit code."""
    if _OUT_OF_MEMORY.search(log):
        return f"one that takes more than {_MEMORY_GIB} GiB to build the model's shapes"
    return _error_line(log) or f"exit code {code}"


def _error_line(text: str) -> str:
    """Return the line that names the last exception in what Python writes of one, quoted; empty for none."""
    lines = [line for line in text.splitlines() if _EXCEPTION.match(line)]
    return quote(lines[-1]) if lines else ""


def _refusal(found: str) -> PlanError:
    expected = "a model that the installed transformers loads and saves by its own code"
    return PlanError(Problem(CONFIG_NAME, expected, found, "leave --like llamafactory (--as-llamafactory) out"))


def _layout(answer: Mapping[str, Any], saved: Mapping[str, Any]) -> SavedLayout:
    return SavedLayout(
        class_name=answer["class"],
        version=answer["version"],
        loaded_dtype=answer["loaded"],
        shards=tuple((file, tuple(_tensor(*at) for at in tensors)) for file, tensors in saved["shards"]),
        index_text=saved["index"],
    )


def _tensor(name: str, dtype: str, shape: list[int], held_dtype: str) -> SavedTensor:
    return SavedTensor(name, _CODES.get(dtype, dtype), tuple(shape), _CODES.get(held_dtype, held_dtype))
