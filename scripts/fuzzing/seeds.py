"""The inputs that a campaign begins with, made offline; adapters of all kinds where PEFT is installed."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fuzzing import checkpoints

#: Settings that a kind's config needs to be made for the tiny Llama.
_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "ADALORA": {"total_step": 9},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"r": 0, "oft_block_size": 8},
    "ROAD": {"group_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 3], "target_modules": None},
    "UNILORA": {"theta_d_length": 20},
    "VBLORA": {"num_vectors": 9, "vector_length": 8},
    "WAVEFT": {"n_frequency": 8},
    "FOURIERFT": {"n_frequency": 8},
}


def lora_config(saved: list[str] | None = None, **fields: Any) -> bytes:
    """Return a plain LoRA's adapter_config.json."""
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 5,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": saved,
        "base_model_name_or_path": "org/base",
        **fields,
    }
    return json.dumps(config).encode()


def embedding_shapes() -> checkpoints.Shapes:
    """Return a LoRA with an input embedding stored whole: it unties one that is tied."""
    rows, columns = checkpoints.ROWS + 1, checkpoints.HIDDEN
    return {
        **checkpoints.lora_shapes(),
        "base_model.model.model.embed_tokens.weight": ["BF16", [rows, columns]],
        "base_model.model.lm_head.weight": ["BF16", [rows, columns]],
    }


def headers(folder: Path) -> list[bytes]:
    """Return headers and whole files."""
    checkpoints.write_shard(folder / "seed", {"a": ["F32", [2, 3]], "b": ["U8", []], "c": ["BF16", [0, 4]]})
    whole = (folder / "seed").read_bytes()
    (folder / "seed").unlink()
    start = 8 + int.from_bytes(whole[:8], "little")
    entry = {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}
    sub_byte = json.dumps({"__metadata__": {"format": "pt"}, "\u00e9\n": entry})
    return [whole, whole[8:start], sub_byte.encode(), b"{}", b'{"__metadata__":null}  ']


def indexes(folder: Path) -> list[bytes]:
    """Return indexes: the tied base's own, and ones that lead elsewhere."""
    own = (folder / "tied" / "model.safetensors.index.json").read_bytes()
    names = ("link", "zero", "none", "folder", "pipe", "../secret")
    return [own, *(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}).encode() for name in names)]


def configs(_: Path) -> list[bytes]:
    """Return configs of flat and nested models, with ties and dtypes at several depths."""
    text = {**checkpoints.CONFIG, "torch_dtype": "float32", "_name_or_path": "org/base"}
    nested = {"model_type": "llava", "text_config": text, "vision_config": {"dtype": "float16", "model_type": "clip"}}
    deep = {"decoder": {"decoder": {"text_config": {"model_type": "gemma", "tie_word_embeddings": None}}}}
    labels = {"num_labels": 2, "id2label": {"0": "a"}, "label2id": {"a": 0}, "time_step_limit": [0, float("inf")]}
    packed = {"model_type": "gpt2", "quantization_config": {"dtype": "int4"}}
    found: tuple[Any, ...] = (text, nested, deep, {**text, **labels}, {}, packed)
    return [json.dumps(config).encode() for config in found]


def adapter_configs(_: Path) -> list[bytes]:
    """Return configs of a LoRA with each field that is followed, of MLX, and of every kind of PEFT."""
    variants: list[dict[str, Any]] = [
        {"rank_pattern": {"q_proj": 3, r"layers\.1.*": 3}, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 2.5}},
        {"use_rslora": True, "use_dora": True, "lora_bias": True, "fan_in_fan_out": True, "task_type": "SEQ_CLS"},
        {"layer_replication": [[0, 2], [0, 2]], "target_parameters": ["mlp.down_proj.weight"]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}, "ensure_weight_tying": True, "revision": "main"},
        {"modules_to_save": ["lm_head"], "peft_version": "0.19.0"},
        {"target_modules": r".*\.(q|down)_proj", "exclude_modules": ["k_proj"], "bias": "all"},
        {"layers_to_transform": [0], "layers_pattern": "layers", "init_lora_weights": "pissa"},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "b"}, "lora_B_layout": "rank_major"},
    ]
    mlx = {"fine_tune_type": "dora", "lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["a"]}, "num_layers": 2}
    others = [mlx | {"model": "a/b-4bit"}, *filter(None, (item["config"] for item in map(json.loads, adapters(_))))]
    return [
        lora_config(),
        *(lora_config(**fields) for fields in variants),
        *(json.dumps(one).encode() for one in others),
    ]


def adapters(_: Path) -> list[bytes]:
    """Return adapters as config and shapes: LoRA, kohya, MLX, and what PEFT makes of every kind."""
    config, shapes = json.loads(lora_config(["lm_head"])), dict(checkpoints.lora_shapes())
    whole = shapes | {"base_model.model.lm_head.weight": ["F32", [checkpoints.ROWS, checkpoints.HIDDEN]]}
    down, up = ["F32", [3, 16]], ["F32", [16, 3]]
    path = "model.layers.0.self_attn.q_proj"
    flat = f"lora_unet_{path.replace('.', '_')}"
    kohya = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": ["F32", []]}
    mlx = {f"{path}.lora_a": up, f"{path}.lora_b": down}
    mlx_config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0}, "num_layers": 2}
    documents = [
        {"config": config, "tensors": whole},
        {"config": {**config, "layer_replication": [[0, 2], [1, 2]]}, "tensors": shapes},
        {"config": None, "tensors": kohya},
        {"config": mlx_config, "tensors": mlx},
        *_adapters_of_peft(),
    ]
    return [json.dumps(document).encode() for document in documents]


def _adapters_of_peft() -> Iterator[dict[str, Any]]:
    try:
        import peft
        import transformers
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:  # the extra `parity`
        return
    config = transformers.LlamaConfig(**{**checkpoints.CONFIG, "architectures": None})
    for kind, make in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {"target_modules": ["q_proj", "down_proj"], **_SETTINGS.get(kind.value, {})}
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            try:
                peft.get_peft_model(transformers.LlamaForCausalLM(config), make(**fields)).save_pretrained(folder)
            except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, ImportError, KeyError):
                continue  # a prompt or a mixture, which has no target modules
            yield _description(Path(folder))


def _description(folder: Path) -> dict[str, Any]:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
    return {"config": json.loads((folder / "adapter_config.json").read_bytes()), "tensors": tensors}


def patterns(_: Path) -> list[bytes]:
    """Return patterns as people write them and as they must not, each with a line end and a path behind it."""
    found = (
        r".*\.(q|down)_proj",
        r"layers\.(1|10|2)\..*(self_attn|mlp)[^.]+",
        "(?:.*?(?:a|b).*?)|(?:\\ba[\\d]{1,}b)",
        "(a|aa)(a|ab)?a??b*",
        r"[\]a](?P<x>b)?(?P=x)(?=a)",
        "(?#[)(a)b]",
    )
    return [f"{pattern}\n{'layers.10.self_attn.q_proj' * 2}{'a' * 40}".encode() for pattern in found]


def pickles(_: Path) -> list[bytes]:
    """Return pickles of torch.save, of one and two storages, in all protocols, and a whole archive."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\x02K\x02\x86K\x02K\x01\x86" + hooks + b"tR"
    parameter = b"ctorch._utils\n_rebuild_parameter\n" + tensor + hooks + b"\x87R"
    byte = tensor.replace(b"FloatStorage", b"ByteStorage").replace(b"\x000X", b"\x001X").replace(b"K\x04t", b"K\x01t")
    one = b"\x80\x02}q\0X\x01\0\0\0aq\x01" + tensor + b"s."
    several = b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\0\0\0a" + tensor + b"X\x01\0\0\0b" + parameter
    state = b"u}X\x09\0\0\0_metadata}(X\x01\0\0\0aK\x01usb."
    small = byte.replace(b"K\x02K\x02\x86K\x02K\x01\x86", b"))")
    whole = checkpoints.archive(one, {"0": bytes(16)})
    older = [one, several + state, b"\x80\x02}X\x01\0\0\0a" + small + b"s.", whole, b"\x80\x02}."]
    return [*older, *_newer_pickles()]


def _newer_pickles() -> Iterator[bytes]:
    """Yield what torch.save makes in each protocol of tensors over storages of the sizes that the target has."""
    import torch

    storage, byte = torch.zeros(16, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    float8, wide = storage.view(torch.float8_e5m2), storage.view(torch.uint64)
    plain = torch.nn.Parameter(storage.view(torch.float32))
    states = {"a": float8[3:], "b": byte}, {"a": wide}, {"a": plain, "b": byte}
    for protocol in (2, 4, 5):
        for state in (*states, {"a": float8.view(torch.bits8)}):
            whole = io.BytesIO()
            torch.save(OrderedDict(state), whole, pickle_protocol=protocol)
            yield zipfile.ZipFile(whole).read("archive/data.pkl")


def plans(folder: Path) -> list[bytes]:
    """Return saved plans of this folder's checkpoints, whose place `/@` stands for."""
    from rawmerge.api import plan_merge
    from rawmerge.plan_json import format_plan

    found = [plan_merge(folder / "base", folder / "adapter", dtype=dtype) for dtype in (None, "float16")]
    return [format_plan(plan).replace(str(folder), "/@").encode() for plan in found]


def journals(folder: Path) -> list[bytes]:
    """Return a journal of a merge that was cut off, at its first line, and when all was done."""
    status = [1, 2, 3, 4, 5]
    plan = json.loads(plans(folder)[0])
    shard = plan["shards"][0]["name"]
    first = {
        "format": "rawmerge-journal-1",
        "means": {"rawmerge": "1"},
        "base": {"/@/base/a": status},
        "adapter": {"/@/adapter/a": "0" * 64},
        "plan": plan,
    }
    more = (
        {"prepared": True},
        {"finished": shard, "unchanged": ["a"], "changes": True},
        {"deleted": "/@/base/a", "after": shard},
        {"failed": "a"},
        {"complete": True},
    )
    lines = [json.dumps(line).encode() + b"\n" for line in (first, *more)]
    return [lines[0], b"".join(lines), b"".join(lines)[:-4], lines[1]]


def records(folder: Path) -> list[bytes]:
    """Return the record of a merge, and a stranger's."""
    from rawmerge.api import plan_merge
    from rawmerge.output.record import record_text

    own = record_text(plan_merge(folder / "base", folder / "adapter"), {"updated": 2, "kept": 19})
    return [own.encode(), b'{"adapters": [{"files": [{"sha256": "0"}]}], "history": [], "options": {"dtype": "x"}}']


def manifests(folder: Path) -> list[bytes]:
    """Return manifests: of files, escaped names, and names that lead elsewhere."""
    digest = b"0" * 64
    names = sorted(path.name.encode() for path in (folder / "base").iterdir())
    odd = (b"../secret.safetensors", b"/etc/passwd", b"a/../b", b"\\n", b"./a", b"\xff", b"tokenizer.json/")
    whole = b"".join(digest + b"  " + name + b"\n" for name in names)
    return [whole, b"\\" + digest + b" *a\\nb\\\\c\n", *(digest + b"  " + name for name in odd)]
