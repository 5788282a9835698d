"""Small checkpoints written without rawmerge and without torch: a header of JSON, and bytes that are no tensor's."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

Shapes = Mapping[str, Any]

WIDTHS: Final = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
#: Sparse files are no larger than this, whatever a header says.
MAX_BYTES: Final = 2**40
#: Bytes of small tensors: 0.7 as a float of any width, so that no scalar is zero.
_FILL: Final = b"\x3f"
HIDDEN: Final = 16
WIDE: Final = 24
ROWS: Final = 32
CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "vocab_size": ROWS,
}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of transformers' Llama of `CONFIG`."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    layers = {f"model.layers.{n}.{name}.weight": shape for n in (0, 1) for name, shape in layer.items()}
    ends = {"model.embed_tokens": (ROWS, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (ROWS, HIDDEN)}
    return layers | {f"{name}.weight": shape for name, shape in ends.items()}


def write_shard(path: Path, tensors: Shapes) -> None:
    """Write a safetensors file of tensors given as [dtype, shape]; whatever else they are goes into the header."""
    document, position = {}, 0
    for name, entry in tensors.items():
        size = _size(entry)
        document[name] = _described(entry, position, position + size)
        position += size
    text = json.dumps(document).encode(errors="surrogatepass")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + _FILL * min(position, 65536))
        file.truncate(8 + len(text) + min(position, MAX_BYTES))


def write_base(folder: Path, tie: bool = False) -> Path:
    """Write a tiny Llama of two shards, with index and config; with its output embedding tied or not."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: ["BF16", shape] for name, shape in llama_shapes().items() if not (tie and name == "lm_head.weight")}
    names = sorted(shapes)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        write_shard(folder / file, {name: shapes[name] for name in held})
    weight_map = {name: file for file, held in halves.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tie}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def lora_shapes(rank: int = 3) -> dict[str, list[Any]]:
    """Return a LoRA's tensors on a square and an oblong weight of the tiny Llama."""
    shapes = llama_shapes()
    found: dict[str, list[Any]] = {}
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows, columns = shapes[f"{module}.weight"]
        found[f"base_model.model.{module}.lora_A.weight"] = ["F32", [rank, columns]]
        found[f"base_model.model.{module}.lora_B.weight"] = ["F32", [rows, rank]]
    return found


def archive(pickled: bytes, storages: Mapping[str, bytes]) -> bytes:
    """Return what torch.save makes around a pickle and its storages."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            file.writestr(f"archive/data/{key}", content)
        file.writestr("archive/version", "3\n")
    return whole.getvalue()


def write_links(folder: Path) -> None:
    """Put beside the shards what an index must not lead to: a link out of the folder, a pipe, a folder, a device."""
    (folder.parent / "secret.safetensors").write_bytes(b"not yours")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "none.safetensors").symlink_to(folder / "nothing")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")


def _size(entry: Any) -> int:
    try:
        dtype, shape, *_ = entry
        size = prod(shape) * WIDTHS[dtype] if all(type(number) is int for number in shape) else 0
    except (TypeError, ValueError, LookupError):
        return 0
    return size if 0 <= size < 2**70 else 0


def _described(entry: Any, start: int, end: int) -> Any:
    if not isinstance(entry, list | tuple) or len(entry) < 2:
        return entry
    return {"dtype": entry[0], "shape": entry[1], "data_offsets": [start, end]}
