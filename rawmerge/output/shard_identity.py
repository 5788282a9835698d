"""By what a shard is known to be the one that an earlier merge made: its steps, and all that decides their bytes.

The base is not read for it: hashing takes longer than merging. Its files are known by their status, the adapter's
tensors by their content, since a training run writes a whole new adapter in which few tensors may have changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rawmerge._version import __version__
from rawmerge.inputs.file_status import TICK_NS, FileStatus, file_status
from rawmerge.inputs.tensor_source import OpenFiles, TensorSource
from rawmerge.merge_plan import MergePlan, ShardPlan
from rawmerge.run_options import RunOptions
from rawmerge.versions import installed_version

#: What libraries of arithmetic read, and may give other bits for.
_ARITHMETIC: Final = ("ATEN_", "BLIS_", "CUBLAS_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "OPENBLAS_", "TORCH_")


class ShardIdentities:
    """The identities of a plan's shards, for inputs as they were when this was made; made before they are read."""

    def __init__(self, plan: MergePlan, options: RunOptions) -> None:
        """Look at the inputs.

        Raises:
            OSError: one cannot be found.
        """
        self._plan = plan
        self._adapter_paths = {file.path for file in plan.adapter_files}
        self._made = time.time_ns()
        inputs = (*plan.base_files, *plan.adapter_files)
        self._statuses = {file.path: file_status(file.path) for file in inputs}
        self._inputs: dict[str, set[str]] = {}
        self._all: dict[str, str] = {}
        self._digests: dict[TensorSource, str] = {}
        self._options = options
        self._lock = threading.Lock()
        torch = sys.modules.get("torch")
        self._threads: int = torch.get_num_threads() if torch else 0  # before a merge changes it

    def prepare(self) -> None:
        """Find all identities now, so that asking for them takes no time; as `of_all`."""
        self.of_all()

    def of_all(self) -> dict[str, str]:
        """Return shard name to identity, a SHA-256; the adapter's tensors are read once.

        Raises:
            InputChangedError: the adapter is shorter than planned; OSError: it cannot be read.
        """
        with self._lock:  # who notes the first finished shard may come before whoever prepares
            if not self._all:
                surroundings = [*_surroundings(self._plan, self._options), self._threads]
                with OpenFiles() as files:
                    self._all = {shard.name: self._of(shard, surroundings, files) for shard in self._plan.shards}
            return self._all

    def changed_files(self) -> set[str]:
        """Return the inputs that are no longer as they were when this was made, as far as files tell.

        A file written so short a time before that a later write might have left its times alone counts as changed.
        """
        return set(filter(self._has_changed, self._statuses))

    def is_sure(self, name: str) -> bool:
        """Whether all files that a shard is made from are as they were, once its identity has been asked for."""
        return not any(map(self._has_changed, self.inputs_of(name)))

    def inputs_of(self, name: str) -> set[str]:
        """Return the files that a shard is made from, once its identity has been asked for."""
        return self._inputs[name]

    def _has_changed(self, path: str) -> bool:
        status = self._statuses[path]
        return self._made < status.changed_ns + TICK_NS or _status_or_none(path) != status

    def _of(self, shard: ShardPlan, surroundings: list[Any], files: OpenFiles) -> str:
        inputs = self._inputs[shard.name] = set()
        facts = [surroundings, self._facts(shard, files, inputs)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _facts(self, value: Any, files: OpenFiles, inputs: set[str]) -> Any:
        """Return a part of a plan as JSON, in which every tensor stands for its content, and folders don't count."""
        if isinstance(value, TensorSource):
            inputs.add(value.path)
            return [value.dtype, value.shape, self._content(value, files)]
        if dataclasses.is_dataclass(value):
            fields = (getattr(value, field.name) for field in dataclasses.fields(value))
            return [type(value).__name__, *(self._facts(field, files, inputs) for field in fields)]
        if isinstance(value, tuple):
            return [self._facts(item, files, inputs) for item in value]
        if isinstance(value, Mapping):
            return {key: self._facts(item, files, inputs) for key, item in value.items()}
        return value

    def _content(self, source: TensorSource, files: OpenFiles) -> Any:
        if source.path not in self._adapter_paths:
            return [source.offset, self._statuses[source.path]]
        if source not in self._digests:  # some kinds use one tensor for all layers
            digest = hashlib.sha256()
            for chunk in files.chunks(source):
                digest.update(chunk)
            self._digests[source] = digest.hexdigest()
        return self._digests[source]


def _status_or_none(path: str) -> FileStatus | None:
    try:
        return file_status(path)
    except OSError:
        return None


def _surroundings(plan: MergePlan, options: RunOptions) -> list[Any]:
    """Return all but the shard and its inputs that may decide its bits, and more rather than less."""
    return [
        [
            __version__,
            installed_version("torch"),
            installed_version("numpy"),
            platform.python_version(),
            _code_digest(),
        ],
        dataclasses.asdict(dataclasses.replace(plan.options, card=True)),  # no shard depends on the card
        options.device,
        sorted(options.without),  # who switches a mechanism off does not trust what it made
        [platform.node(), platform.machine(), len(_processors())],
        {name: value for name, value in os.environ.items() if name.startswith(_ARITHMETIC)},
    ]


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _code_digest() -> str:
    """Return a digest of the package's files by status: who works on rawmerge changes it without a new version."""
    root = Path(__file__).parent.parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    statuses = [[str(path), file_status(path)[2:4]] for path in files]
    return hashlib.sha256(json.dumps(statuses).encode()).hexdigest()
