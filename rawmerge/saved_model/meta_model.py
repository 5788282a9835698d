"""A program of its own: what LLaMA-Factory's export would save of a checkpoint, from transformers' own code.

The model is loaded and saved by the installed transformers, but on torch's `meta` device, where tensors have shapes and
dtypes and no values: so no weight is read, and the answer is that of the very code that LLaMA-Factory calls. It is run
by `rawmerge.saved_model.layout_request`, in a process that has the hub switched off, for importing transformers takes
memory and changes how torch computes. No code of the checkpoint is run.

Source: LLaMA-Factory `model/loader.py` (`load_model`: which class, and `torch_dtype` "auto") and `train/tuner.py`
(`export_model`: the cast and `save_pretrained`); transformers 5.24 `modeling_utils.py`.

Run as `python meta_model.py REQUEST ANSWER`, two files of JSON; see `_answer`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: How many layers a config states, in all of transformers' words; more than tensors would only be built in vain.
_LAYERS = re.compile(r"(\w+_)?layers|n_layer|(\w+_)?depths?")
#: From which layer on attention slides: 28 or 80 where nobody says, however few layers there are.
_NO_COUNTS = ("max_window_layers",)
#: Models of which LLaMA-Factory keeps a part only.
_THINKERS = ("qwen2_5_omni", "qwen3_omni_moe")


def main() -> None:
    """Answer the request in the first file with the second."""
    asked, answer = map(Path, sys.argv[1:3])
    request = json.loads(asked.read_text())
    _limit_memory(request["most_memory"])
    answer.write_text(json.dumps(_answer(request)))


def _limit_memory(most: int) -> None:
    """Let this process fail when it takes more than so many bytes, where the system can be told so."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what would be saved.

    Args:
        request: `folder` with the config, the checkpoint's `tensors` as [name, torch dtype, shape], the `dtype` that
            all are cast to at last, empty for the config's, and `max_shard_size` in bytes; `main` looks at
            `most_memory`, in bytes, too.

    Returns:
        `class`, `version` of transformers, `loaded` dtype, and `untied`: the `shards`, with [name, torch dtype, shape,
        torch dtype before the cast] of each tensor, and the `index`. `pairs` are names that the config ties and the
        checkpoint has both of: `untied` keeps them apart, as transformers does where their values differ, and `tied` is
        the same without the first of each. Where shapes do not fit there is only `unlike` beside class, version and
        dtype: [name in the model, the checkpoint's shape, the model's].
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(request["folder"], local_files_only=True, trust_remote_code=False)
    tensors = request["tensors"]
    _check_layers(config.to_dict(), len(tensors))
    model, unlike = _loaded(config, tensors)
    loaded = str(model.config.dtype)
    given = {"class": type(model).__name__, "version": transformers.__version__, "loaded": _plain(loaded)}
    if unlike:
        return {**given, "unlike": unlike}
    saved = _saved(model, request)
    pairs = list(_tied_apart(model, saved["places"]))
    answer = {**given, "pairs": pairs, "untied": _finished(model, saved, request)}
    if pairs:
        left_out = {target for target, _ in pairs}
        model, _ = _loaded(config, [at for at in tensors if at[0] not in left_out])
        answer["tied"] = _finished(model, _saved(model, request), request)
    return answer


def _check_layers(fields: Mapping[str, Any], most: int) -> None:
    """Refuse a config, nested ones included, that asks for more layers than there are tensors."""
    for name, value in fields.items():
        if isinstance(value, dict):
            _check_layers(value, most)
        if not _LAYERS.fullmatch(str(name)) or name in _NO_COUNTS:  # labels are named by numbers
            continue
        is_list = isinstance(value, list) and "depth" in name  # one of layers has their numbers, not how many
        count = sum(at for at in value if type(at) is int) if is_list else value
        if type(count) is int and count > most:
            raise ValueError(f"config.json states {name} {value}, and the checkpoint has {most} tensors")


def _finished(model: Any, held: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Cast a model as a whole, and return what is saved of it, with the dtype that each tensor had before."""
    import torch

    dtype = getattr(torch, request["dtype"] or _plain(str(model.config.dtype)))
    model.config.dtype = dtype
    saved = _saved(model.to(dtype), request)
    before = {name: held_dtype for _, tensors in held["shards"] for name, held_dtype, _ in tensors}
    shards = [[file, [[*at, before.get(at[0], "")] for at in tensors]] for file, tensors in saved["shards"]]
    return {"shards": shards, "index": saved["index"]}


def _loaded(config: Any, tensors: Iterable[Any]) -> tuple[Any, list[Any]]:
    """Return the model as `from_pretrained` makes it of tensors without values, and whose shapes do not fit."""
    import torch

    empty = {name: torch.empty(shape, dtype=getattr(torch, code), device="meta") for name, code, shape in tensors}
    device_map, attention = {"": "meta"}, "eager"  # one that needs no other package
    model, found = _model_class(config).from_pretrained(
        None,
        config=config,
        state_dict=empty,
        dtype="auto",
        device_map=device_map,
        attn_implementation=attention,
        ignore_mismatched_sizes=True,  # else it fails, and only its log tells which
        output_loading_info=True,
    )
    unlike = sorted([name, list(stored), list(own)] for name, stored, own in found["mismatched_keys"])
    return (model.thinker if model.config.model_type in _THINKERS else model), unlike


def _model_class(config: Any) -> Any:
    """Return the class that LLaMA-Factory loads a model of this config with."""
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    tried = ("ImageTextToText", "Seq2SeqLM", "TextToWaveform", "CausalLM")
    for mapping in (getattr(transformers, f"AutoModelFor{name}")._model_mapping for name in tried):
        if type(config) in mapping:
            return _get_model_class(config, mapping)
    raise ValueError(f"transformers has no class for text of the model type {config.model_type!r}")


def _saved(model: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Save a model without its values; return each shard's [name, torch dtype, shape], and the index's text."""
    from transformers import modeling_utils

    shards: list[list[Any]] = []
    places: dict[str, int] = {}

    def take(tensors: Mapping[str, Any], path: str, metadata: Mapping[str, str]) -> None:
        if dict(metadata) != {"format": "pt"}:
            raise ValueError(f"transformers would write the metadata {dict(metadata)}")
        listed = [[name, _plain(str(at.dtype)), list(at.shape)] for name, at in tensors.items()]
        shards.append([Path(path).name, listed])
        places.update({name: _storage(at) for name, at in tensors.items()})

    _tell_storages_apart()
    modeling_utils.safe_save_file = take
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=request["max_shard_size"])
        index = Path(folder) / "model.safetensors.index.json"
        return {"shards": shards, "index": index.read_text() if index.exists() else "", "places": places}


def _tell_storages_apart() -> None:
    """Let tensors that are views of one be seen as such: on the `meta` device the hub's library does not look."""
    from huggingface_hub.serialization import _torch

    _torch.get_torch_storage_id = lambda tensor: (tensor.device, _storage(tensor), tensor.untyped_storage().nbytes())


def _storage(tensor: Any) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _tied_apart(model: Any, places: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (target, source), as they are saved, of parameters that the config ties and that were loaded one by one."""
    names = {place: name for name, place in places.items()}
    for pair in model.all_tied_weights_keys.items():
        target, source = (_storage(model.get_parameter_or_buffer(name)) for name in pair)
        if target != source and target in names and source in names:
            yield names[target], names[source]


def _plain(dtype: str) -> str:
    return dtype.removeprefix("torch.")


if __name__ == "__main__":
    main()
