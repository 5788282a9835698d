"""What a user typed as BASE or ADAPTER as local files: a path stays one, `org/name[@revision]` is fetched.

The only user of huggingface_hub (0.30 or later), which is imported when a hub id is met and never for a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rawmerge.errors import HubError, MissingFileError, Problem, quote
from rawmerge.formats import adapter_config, config_text
from rawmerge.formats.shard_names import PICKLE_NAME
from rawmerge.formats.weight_map import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PICKLE_INDEX_NAME,
    PICKLE_SUFFIX,
    SHARD_SUFFIX,
    parse_weight_map,
)
from rawmerge.inputs import adapter
from rawmerge.inputs.base_checkpoint import SINGLE_NAME
from rawmerge.inputs.tensor_source import read_small_file
from rawmerge.output.side_files import is_beside_adapter, left_out_reason

DEFAULT_REVISION: Final = "main"
SIDE_FILES_AT_ONCE: Final = 8
MAX_LISTED: Final = 10

# A revision may hold slashes after `refs/` only: anything else with two slashes is meant as a path.
_HUB_ID: Final = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*|refs(/\w[\w.-]*)+))?", re.ASCII)
#: Where a base's weights begin: an index or one file, of safetensors before pickles.
_ENTRIES: Final = (INDEX_NAME, SINGLE_NAME, PICKLE_INDEX_NAME, PICKLE_NAME)
_FILE_SUFFIXES: Final = (SHARD_SUFFIX, ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_LOGIN_HINT: Final = "log in with `hf auth login` or set HF_TOKEN"
_OFFLINE_HINT: Final = "unset HF_HUB_OFFLINE to fetch it, or name a local directory"
_NETWORK_HINT: Final = "check the network; HF_HUB_OFFLINE=1 uses what is cached; or name a local directory"


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """Local files, and the repo they came from.

    Attributes:
        path: a local directory or file.
        repo_id: `org/name`, an empty string for a local path.
        revision: the full commit hash, an empty string for a local path.
    """

    path: Path
    repo_id: str = ""
    revision: str = ""

    @property
    def pinned(self) -> str:
        """`org/name@commit`, an empty string for a local path."""
        return f"{self.repo_id}@{self.revision}" if self.repo_id else ""


@dataclass(frozen=True, slots=True)
class _Repo:
    """One commit of a repo: every fetch names the commit, so files of two commits never meet.

    Attributes:
        typed: the hub id as the user typed it.
        repo_id: `org/name`.
        revision: the branch, tag or hash that was asked for.
        commit: the full hash that it stands for.
        byte_counts: file name to size, None if unknown; offline, the files in the cache.
        is_offline: whether only the cache may be used.
    """

    typed: str
    repo_id: str
    revision: str
    commit: str
    byte_counts: Mapping[str, int | None]
    is_offline: bool


def resolve_base(spec: str | os.PathLike[str]) -> ResolvedSource:
    """Return the base's local files; of a repo, the shards its index names and the side files are fetched.

    Pickles are fetched where the repo has no safetensors.

    Raises:
        MissingFileError: a local path does not exist.
        HubError: the repo cannot be fetched, or holds no base.
        CheckpointError: the repo's index is malformed or names files outside the repo.
    """
    return _resolve(spec, _fetch_base)


def resolve_adapter(spec: str | os.PathLike[str]) -> ResolvedSource:
    """Return the adapter's local files; of a repo, the config, the tensor file and the tokenizer are fetched.

    A pickle is fetched where there is no safetensors file beside it. Of a repo that is one file, that is fetched.

    Raises:
        MissingFileError: a local path does not exist.
        HubError: the repo cannot be fetched, or holds no adapter.
    """
    return _resolve(spec, _fetch_adapter)


def resolve_either(spec: str | os.PathLike[str]) -> ResolvedSource:
    """Return the local files of an adapter, where the repo holds one, else of a base.

    Raises:
        RefusedError: as `resolve_base` and `resolve_adapter`.
    """
    return _resolve(spec, lambda repo: (_fetch_adapter if _is_adapter(repo) else _fetch_base)(repo))


def _is_adapter(repo: _Repo) -> bool:
    return adapter_config.CONFIG_NAME in repo.byte_counts or bool(_bare_adapter(repo))


def _resolve(spec: str | os.PathLike[str], fetch: Callable[[_Repo], Path]) -> ResolvedSource:
    path = _expand_home(Path(spec))
    hub_id = _HUB_ID.fullmatch(spec) if isinstance(spec, str) and not os.path.lexists(path) else None
    if hub_id is None or hub_id["repo_id"].endswith(_FILE_SUFFIXES):
        return ResolvedSource(_check_exists(path, os.fspath(spec)))
    repo = _open_repo(hub_id[0], hub_id["repo_id"], hub_id["revision"] or DEFAULT_REVISION)
    return ResolvedSource(fetch(repo), repo.repo_id, repo.commit)


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # `~name` of no known user: then it is a plain name, and most likely missing
        return path


def _check_exists(path: Path, typed: str) -> Path:
    try:
        if not typed:  # Path("") would be the working directory
            raise FileNotFoundError("an empty name")
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found = getattr(error, "strerror", None) or str(error)
        hint = "check the path; a hub id looks like org/name or org/name@revision"
        raise MissingFileError(Problem(typed, "an existing directory or file", found.lower(), hint)) from error
    return path


def _open_repo(typed: str, repo_id: str, revision: str) -> _Repo:
    from huggingface_hub import constants

    with _translated(typed, f"revision {revision} of a repo on the hub (no local path has this name)"):
        list_files = _list_cache if constants.HF_HUB_OFFLINE else _list_hub
        commit, byte_counts = list_files(repo_id, revision)
    if not commit:
        expected = f"revision {revision} in the hub's cache, as HF_HUB_OFFLINE is set"
        raise HubError(Problem(typed, expected, "nothing cached of it", _OFFLINE_HINT))
    return _Repo(typed, repo_id, revision, commit, byte_counts, constants.HF_HUB_OFFLINE)


def _list_hub(repo_id: str, revision: str) -> tuple[str, dict[str, int | None]]:
    from huggingface_hub import HfApi

    reply = HfApi(library_name="rawmerge").model_info(repo_id, revision=revision, files_metadata=True)
    return reply.sha or "", {file.rfilename: file.size for file in reply.siblings or ()}


def _list_cache(repo_id: str, revision: str) -> tuple[str, dict[str, int | None]]:
    # snapshot_download would do this, but it refuses a snapshot that lacks files which are of no use here
    from huggingface_hub import try_to_load_from_cache

    for name in (config_text.CONFIG_NAME, *_ENTRIES, adapter_config.CONFIG_NAME):
        cached = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(cached, str):
            root = Path(cached).parent
            files = [path for path in root.rglob("*") if path.is_file()]
            return root.name, {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    return "", {}


def _fetch_adapter(repo: _Repo) -> Path:
    if bare := _bare_adapter(repo):
        return _record_revision(repo, bare) / bare
    known = (adapter.WEIGHTS_NAME, adapter.PICKLE_NAME, adapter.MLX_NAME)
    weights = next((name for name in known if name in repo.byte_counts), adapter.WEIGHTS_NAME)
    _require(repo, (adapter_config.CONFIG_NAME, weights), "name the repo of a PEFT adapter")
    root = _record_revision(repo, adapter_config.CONFIG_NAME)
    # a plan says where the adapter's tokenizer differs from the base's, and its card what licence the adapter's states
    for name in (*filter(is_beside_adapter, repo.byte_counts), weights):
        _download(repo, name)
    return root


def _bare_adapter(repo: _Repo) -> str:
    """Return the one safetensors file of a repo without any config, as kohya's scripts make them; else nothing."""
    names = [name for name in repo.byte_counts if name.endswith(SHARD_SUFFIX)]
    is_other = {adapter_config.CONFIG_NAME, config_text.CONFIG_NAME, SINGLE_NAME, INDEX_NAME} & repo.byte_counts.keys()
    return names[0] if len(names) == 1 and "/" not in names[0] and not is_other else ""


def _fetch_base(repo: _Repo) -> Path:
    entry = next((name for name in _ENTRIES if name in repo.byte_counts), SINGLE_NAME)
    is_adapter = adapter_config.CONFIG_NAME in repo.byte_counts
    hint = f"{'this is an adapter; ' * is_adapter}name the repo of a base with weights as safetensors or {PICKLE_NAME}"
    _require(repo, [entry], hint)
    has_config = config_text.CONFIG_NAME in repo.byte_counts
    root = _record_revision(repo, config_text.CONFIG_NAME if has_config else entry)
    shards = _read_shard_names(repo, entry) if entry in {INDEX_NAME, PICKLE_INDEX_NAME} else (entry,)
    _require(repo, shards, "the index names it; the upload may be incomplete")
    # Side files come first, so that a cache with all shards has them too: an offline run relies on it.
    with ThreadPoolExecutor(SIDE_FILES_AT_ONCE) as pool:
        side_files = (name for name, size in repo.byte_counts.items() if not left_out_reason(name, size or 0))
        list(pool.map(lambda name: _download(repo, name), side_files))
    # Shards come one by one: a single download fills the line, and in the main thread Ctrl-C stops it.
    for name in shards:
        _download(repo, name)
    return root


def _read_shard_names(repo: _Repo, index: str) -> tuple[str, ...]:
    raw = read_small_file(_download(repo, index), MAX_INDEX_BYTES)
    suffix = SHARD_SUFFIX if index == INDEX_NAME else PICKLE_SUFFIX
    return parse_weight_map(raw, f"{repo.typed}: {index}", suffix).shard_names


def _require(repo: _Repo, names: Iterable[str], hint: str) -> None:
    """Refuse a repo, or offline a cache, that lacks one of `names`."""
    place = "in the hub's cache, as HF_HUB_OFFLINE is set" if repo.is_offline else f"in commit {repo.commit[:12]}"
    listed = sorted(repo.byte_counts)
    found = ", ".join(map(quote, listed[:MAX_LISTED])) or "no file"
    found += f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
    problems = [
        Problem(repo.typed, f"{name} {place}", found, _OFFLINE_HINT if repo.is_offline else hint)
        for name in names
        if name not in repo.byte_counts
    ]
    if problems:
        raise HubError(*problems)


def _record_revision(repo: _Repo, name: str) -> Path:
    """Fetch a first file by the revision, not the commit; return the snapshot's directory.

    This makes the hub's cache note which commit the revision is; without it an offline run finds nothing.
    """
    root = _download(repo, name, repo.commit if repo.is_offline else repo.revision).parent
    if root.name != repo.commit:
        # the branch moved between two requests, or the hub failed and an old snapshot stood in
        found, hint = f"commit {root.name}", "the repo changed just now, or the connection failed; run again"
        raise HubError(Problem(repo.typed, f"commit {repo.commit}", found, hint))
    return root


def _download(repo: _Repo, name: str, revision: str = "") -> Path:
    from huggingface_hub import hf_hub_download

    with _translated(repo.typed, f"to fetch {quote(name)}"):
        return Path(hf_hub_download(repo.repo_id, name, revision=revision or repo.commit, library_name="rawmerge"))


@contextmanager
def _translated(typed: str, expected: str) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and its downloader raise into HubError."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # requests, httpx or httpx2, as the hub's version has it: the client's own root error is the first base
    client_error: type[BaseException] = HfHubHTTPError.__bases__[0]
    try:
        yield
    # ValueError: a reply that is no JSON, an id or file name the hub refuses; RuntimeError: hf_xet
    except (OSError, ValueError, RuntimeError, EntryNotFoundError, client_error) as error:
        found, hint = _explain(error)
        raise HubError(Problem(typed, expected, found, hint)) from error


def _explain(error: BaseException) -> tuple[str, str]:
    """Return (what was found, what the user can do)."""
    from huggingface_hub import errors

    known: tuple[tuple[type[BaseException], str, str], ...] = (
        (errors.GatedRepoError, "a gated repo without access to it", f"ask for access on its page, then {_LOGIN_HINT}"),
        (errors.RepositoryNotFoundError, "no such repo, or a private one", f"check the name; or {_LOGIN_HINT}"),
        (errors.RevisionNotFoundError, "no such revision", "check what follows the @: a branch, tag or commit"),
        (errors.HFValidationError, "a name that the hub does not allow", "a hub id looks like org/name@revision"),
        (errors.OfflineModeIsEnabled, "nothing cached, and HF_HUB_OFFLINE is set", _OFFLINE_HINT),
    )
    for kind, found, hint in known:
        if isinstance(error, kind):
            return found, hint
    # huggingface_hub wraps a failed connection in an error that says only "not found locally"
    cause = error.__cause__ or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {quote(lines[0]) if lines else 'no message'}", _NETWORK_HINT
