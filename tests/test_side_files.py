"""What stands beside the weights: copied or left out, for folders as they are found in the wild."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.errors import AdapterError, MissingFileError
from rawmerge.output import side_files
from rawmerge.output.side_files import (
    MAX_NESTED_WEIGHT_BYTES,
    SideFile,
    differing_tokenizer_files,
    left_out_reason,
    list_side_files,
    list_tokenizer_files,
    override_side_files,
)
from tests.strategies import SETTINGS

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]
folders = st.sampled_from(["original", "docs", ".git", "2_Dense", "checkpoint-1", "__pycache__"])
SECOND_SET = "a second set of weights"
TOUCHED_NOT = "weights that the merge does not touch, or a pickle"


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def copied(root: Path, *own_names: str) -> set[str]:
    return {file.name for file in list_side_files(root, own_names)[0]}


def left_out(root: Path, *own_names: str) -> dict[str, str]:
    return {item.name: item.reason for item in list_side_files(root, own_names)[1]}


def test_a_llama_keeps_its_tokenizer_and_licence_and_loses_its_second_weights(tmp_path: Path) -> None:
    kept = [*TOKENIZER, "LICENSE", "USE_POLICY.md", "README.md", ".gitattributes", "generation_config.json"]
    own = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    make(tmp_path, *kept, *own, "original/params.json", "original/consolidated.00.pth", "original/tokenizer.model")
    assert copied(tmp_path, *own) == set(kept)
    assert left_out(tmp_path, *own) == {"original/": SECOND_SET}


def test_a_mistral_keeps_its_params_and_loses_its_consolidated_file(tmp_path: Path) -> None:
    make(tmp_path, "params.json", "tekken.json", "consolidated.safetensors", "consolidated.safetensors.index.json")
    assert copied(tmp_path) == {"params.json", "tekken.json"}
    assert set(left_out(tmp_path).values()) == {TOUCHED_NOT}


def test_a_sentence_transformer_keeps_its_modules_and_their_small_weights(tmp_path: Path) -> None:
    kept = ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"]
    weights = ["2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"]
    make(tmp_path, *kept, *weights, "model.safetensors", "onnx/model.onnx", "openvino/openvino_model.bin")
    assert copied(tmp_path, "model.safetensors") == {*kept, *weights}
    assert left_out(tmp_path, "model.safetensors") == {"onnx/": SECOND_SET, "openvino/": SECOND_SET}


def test_remote_code_and_its_folders_are_kept_as_files(tmp_path: Path) -> None:
    kept = ["modeling_own.py", "configuration_own.py", "kernels/attention.py", "chat_templates/tool.jinja"]
    make(tmp_path, *kept, "kernels/__pycache__/attention.pyc", "__pycache__/modeling_own.pyc")
    assert copied(tmp_path) == set(kept)
    assert left_out(tmp_path) == dict.fromkeys(["__pycache__/", "kernels/__pycache__/"], "compiled Python")


def test_hidden_folders_stay_behind_and_hidden_files_come_along(tmp_path: Path) -> None:
    make(tmp_path, ".gitattributes", ".git/HEAD", ".cache/huggingface/x.lock", "docs/.git/HEAD")
    assert copied(tmp_path) == {".gitattributes"}
    assert left_out(tmp_path) == dict.fromkeys([".cache/", ".git/", "docs/.git/"], "a hidden folder")


@pytest.mark.parametrize("folder", ["checkpoint-500", "global_step1000", "global_step-7", "runs/checkpoint-1"])
def test_checkpoints_of_the_training_stay_behind(tmp_path: Path, folder: str) -> None:
    make(tmp_path, f"{folder}/config.json", f"{folder}/model.safetensors")
    assert copied(tmp_path) == set()
    assert left_out(tmp_path) == {f"{folder}/": "a checkpoint of its training"}


@pytest.mark.parametrize("folder", ["checkpoint", "checkpoint-best", "my-checkpoint-5", "original_code", "onnx_docs"])
def test_folders_of_like_names_are_kept(tmp_path: Path, folder: str) -> None:
    make(tmp_path, f"{folder}/notes.txt")
    assert copied(tmp_path) == {f"{folder}/notes.txt"}


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "model.fp16.safetensors",
        "model.safetensors.index.fp32.safetensors",
        "variant.safetensors.index.json",
        "llama-7b.Q4_K_M.gguf",
        "ggml-model-q4_0.bin",
        "tf_model.h5",
        "tf_model.h5.index.json",
        "flax_model.msgpack",
        "flax_model.msgpack.index.json",
        "rust_model.ot",
        "openvino_model.bin",
        "model.onnx",
        "model.onnx_data",
        "MODEL.ONNX",
        "consolidated.00.pth",
        "scheduler.pt",
        "optimizer.bin",
        "training_args.bin",
        "last.ckpt",
    ],
)
def test_other_weights_and_pickles_at_the_top_stay_behind(name: str) -> None:
    assert left_out_reason(name, 10) == TOUCHED_NOT


@pytest.mark.parametrize(
    "name",
    [
        *TOKENIZER,
        "tokenizer.model",
        "spiece.model",
        "model.py",
        "model_card.md",
        "vocab.bin",
        "my.bin.json",
        "a.index.json",
    ],
)
def test_other_files_are_side_files_whatever_their_size(name: str) -> None:
    assert left_out_reason(name, 10) == left_out_reason(name, 10**12) == left_out_reason(f"sub/{name}", 10**12) == ""


@pytest.mark.parametrize("folder", ["", "default/"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_files_of_an_adapter_stay_behind(folder: str, name: str) -> None:
    assert left_out_reason(folder + name, 10) == "an adapter's file; loaders would apply it again"


@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "vision/head.pt"])
def test_weights_in_a_folder_are_kept_up_to_the_size_of_a_layer(name: str) -> None:
    assert left_out_reason(name, MAX_NESTED_WEIGHT_BYTES) == ""
    assert left_out_reason(name, MAX_NESTED_WEIGHT_BYTES + 1) == SECOND_SET


@pytest.mark.parametrize("name", ["small/model.gguf", "small/model.GGML"])
def test_a_quantised_twin_is_no_layer_however_small(name: str) -> None:
    assert left_out_reason(name, 10) == SECOND_SET


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("original/deep/params.json", SECOND_SET),
        ("a/b/onnx/tokenizer.json", SECOND_SET),
        ("a/.git/config", "a hidden folder"),
        ("../secret.json", "a hidden folder"),
        ("a/checkpoint-3/tokenizer.json", "a checkpoint of its training"),
    ],
)
def test_a_file_of_a_folder_that_stays_behind_stays_with_it(name: str, reason: str) -> None:
    assert left_out_reason(name, 10) == reason


def test_names_that_the_merge_writes_itself_are_neither_copied_nor_left_out(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "model.safetensors", "sub/config.json")
    assert copied(tmp_path, "config.json", "model.safetensors") == {"sub/config.json"}
    assert left_out(tmp_path, "config.json", "model.safetensors") == {}


def test_each_file_has_its_path_and_size_and_both_lists_are_sorted(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/c.txt", "a.txt", "z.gguf", "y.gguf")
    files, left = list_side_files(tmp_path, ())
    assert [file.name for file in files] == ["a.txt", "a/c.txt", "b.txt"]
    assert [(Path(file.path).read_text(), file.byte_count) for file in files] == [
        (file.name, len(file.name)) for file in files
    ]
    assert [item.name for item in left] == ["y.gguf", "z.gguf"]


def test_a_link_to_a_file_is_copied_as_the_file(tmp_path: Path) -> None:
    make(tmp_path, "blobs/0123", "snapshot/tokenizer.json")
    (tmp_path / "snapshot" / "LICENSE").symlink_to("../blobs/0123")
    [licence, _] = list_side_files(tmp_path / "snapshot", ())[0]
    assert (licence.name, licence.byte_count) == ("LICENSE", len("blobs/0123"))


def test_a_link_is_judged_by_its_own_name_not_its_target_s(tmp_path: Path) -> None:
    make(tmp_path, "blobs/0123", "snapshot/tokenizer.json")
    (tmp_path / "snapshot" / "pytorch_model.bin").symlink_to("../blobs/0123")
    assert left_out(tmp_path / "snapshot") == {"pytorch_model.bin": TOUCHED_NOT}


@pytest.mark.parametrize("target", ["missing", "loop", "folder", "/", ".."])
def test_a_link_to_anything_but_a_file_stays_behind(tmp_path: Path, target: str) -> None:
    make(tmp_path, "folder/a.txt")
    (tmp_path / "loop").symlink_to(target)
    assert copied(tmp_path) == {"folder/a.txt"}
    assert left_out(tmp_path) == {"loop": "no regular file, or a link to a folder or to nothing"}


def test_a_named_pipe_stays_behind_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert left_out(tmp_path) == {"pipe.json": "no regular file, or a link to a folder or to nothing"}


@SETTINGS
@given(
    st.lists(folders, max_size=3),
    st.sampled_from(["a.txt", "pytorch_model.bin", "x.gguf", ".env", "adapter_config.json"]),
)
def test_a_walk_and_a_listing_by_name_agree(tmp_path: Path, parents: list[str], name: str) -> None:
    root = Path(mkdtemp(dir=tmp_path))
    path = "/".join([*parents, name])
    make(root, path)
    assert copied(root) == (set() if left_out_reason(path, len(path)) else {path})
    assert bool(copied(root)) != bool(left_out(root))


# An adapter's tokenizer

TEMPLATES = ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"]
VOCABULARIES = [
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "qwen.tiktoken",
    "tekken.json",
]


def write(root: Path, **files: str) -> Path:
    """Write files; a `__` in a name stands for its dot."""
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    return root


def overridden(base: Path, adapter: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of each side file of the output, and what is left out."""
    kept, gone = override_side_files(list_side_files(base, ())[0], list_tokenizer_files(adapter))
    assert [file.name for file in kept] == sorted(file.name for file in kept)
    return {file.name: Path(file.path).read_text() for file in kept}, {item.name: item.reason for item in gone}


def test_an_adapter_s_tokenizer_is_its_tokenizer_files_and_templates(tmp_path: Path) -> None:
    expected = {*TOKENIZER, *TEMPLATES, *VOCABULARIES, "added_tokens.json"}
    others = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenization_qwen.py",
        "trainer_state.json",
    ]
    processors = ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "config.json"]
    deeper = [
        "checkpoint-5/tokenizer.json",
        "additional_chat_templates/notes.md",
        "additional_chat_templates/a/b.jinja",
    ]
    make(tmp_path, *expected, *others, *processors, *deeper)
    found = list_tokenizer_files(tmp_path)
    assert [file.name for file in found] == sorted(expected)
    assert [(Path(file.path).read_text(), file.byte_count) for file in found] == [
        (file.name, len(file.name)) for file in found
    ]


def test_an_adapter_may_have_no_tokenizer(tmp_path: Path) -> None:
    make(tmp_path, "adapter_config.json")
    assert list_tokenizer_files(tmp_path) == ()


def test_links_and_pipes_in_an_adapter_are_judged_as_in_a_base(tmp_path: Path) -> None:
    make(tmp_path, "blobs/0123")
    (tmp_path / "tokenizer.json").symlink_to("blobs/0123")
    (tmp_path / "vocab.json").symlink_to("missing")
    os.mkfifo(tmp_path / "merges.txt")
    (tmp_path / "spiece.model").mkdir()
    assert [file.name for file in list_tokenizer_files(tmp_path)] == ["tokenizer.json"]


def test_files_that_differ_are_named_whether_by_size_or_by_bytes(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json="one", vocab__json="same", merges__txt="abc", README__md="x")
    adapter = write(
        tmp_path / "adapter", tokenizer__json="other", vocab__json="same", merges__txt="abd", vocab__txt="new"
    )
    found = differing_tokenizer_files(list_side_files(base, ())[0], list_tokenizer_files(adapter))
    assert found == ("merges.txt", "tokenizer.json", "vocab.txt")


def test_a_file_that_went_away_is_reported(tmp_path: Path) -> None:
    gone = SideFile("tokenizer.json", str(tmp_path / "gone"), 3)
    make(tmp_path, "own")
    with pytest.raises(MissingFileError, match="gone"):
        differing_tokenizer_files([SideFile("tokenizer.json", str(tmp_path / "own"), 3)], [gone])
    with pytest.raises(MissingFileError, match="gone"):
        override_side_files([], [SideFile("tokenizer_config.json", str(tmp_path / "gone"), 3)])


def test_without_files_of_the_adapter_the_base_s_stay(tmp_path: Path) -> None:
    make(tmp_path / "base", *TOKENIZER, *TEMPLATES, "LICENSE")
    make(tmp_path / "adapter", "adapter_config.json")
    kept, gone = overridden(tmp_path / "base", tmp_path / "adapter")
    assert set(kept) == {*TOKENIZER, *TEMPLATES, "LICENSE"}
    assert gone == {}


def test_an_adapter_s_files_win_and_the_rest_of_the_base_s_tokenizer_goes(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json="base", vocab__json="base", LICENSE="base", code__py="base")
    adapter = write(tmp_path / "adapter", tokenizer__json="adapter", tokenizer_config__json="{}")
    kept, gone = overridden(base, adapter)
    assert kept == {"LICENSE": "base", "code.py": "base", "tokenizer.json": "adapter", "tokenizer_config.json": "{}"}
    assert gone == {"vocab.json": "the adapter's tokenizer takes its place"}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_fast_tokenizer_of_the_base_does_not_hide_the_adapter_s(vocabulary: str, tmp_path: Path) -> None:
    make(tmp_path / "base", *TOKENIZER, "added_tokens.json", "generation_config.json")
    make(tmp_path / "adapter", vocabulary)
    kept, gone = overridden(tmp_path / "base", tmp_path / "adapter")
    assert set(kept) == {vocabulary, "generation_config.json"}
    assert set(gone) == {*TOKENIZER, "added_tokens.json"}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_settings_alone_leave_the_base_s_vocabulary_in_place(name: str, tmp_path: Path) -> None:
    make(tmp_path / "base", *TOKENIZER)
    write(tmp_path / "adapter", **{name: "{}"})
    kept, gone = overridden(tmp_path / "base", tmp_path / "adapter")
    assert set(kept) == {*TOKENIZER, name}
    assert (kept[name], gone) == ("{}", {})


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_of_the_adapter_takes_the_place_of_all_of_the_base_s(template: str, tmp_path: Path) -> None:
    make(tmp_path / "base", *TEMPLATES, "tokenizer.json")
    make(tmp_path / "adapter", template)
    kept, gone = overridden(tmp_path / "base", tmp_path / "adapter")
    assert set(kept) == {template, "tokenizer.json"}
    assert gone == dict.fromkeys(set(TEMPLATES) - {template}, "the adapter's chat template takes its place")


@pytest.mark.parametrize("template", ["{{ a }}", [{"name": "default", "template": "{{ a }}"}]], ids=str)
def test_a_template_in_the_adapter_s_config_does_so_too(template: Any, tmp_path: Path) -> None:
    make(tmp_path / "base", *TEMPLATES)
    write(tmp_path / "adapter", tokenizer_config__json=json.dumps({"chat_template": template}))
    kept, gone = overridden(tmp_path / "base", tmp_path / "adapter")
    assert set(kept) == {"tokenizer_config.json"}
    assert set(gone) == set(TEMPLATES)


@pytest.mark.parametrize("text", ["{}", '{"chat_template": null}', '{"chat_template": ""}'])
def test_a_config_without_a_template_leaves_the_base_s(text: str, tmp_path: Path) -> None:
    make(tmp_path / "base", *TEMPLATES)
    write(tmp_path / "adapter", tokenizer_config__json=text)
    assert set(overridden(tmp_path / "base", tmp_path / "adapter")[0]) == {*TEMPLATES, "tokenizer_config.json"}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_a_broken_config_of_the_adapter_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config__json=text)
    with pytest.raises(AdapterError, match=r"tokenizer_config\.json': expected a tokenizer config of strict JSON"):
        override_side_files([], list_tokenizer_files(tmp_path))


def test_a_huge_config_of_the_adapter_is_refused_unread(tmp_path: Path) -> None:
    huge = SideFile("tokenizer_config.json", str(tmp_path / "none"), side_files.MAX_TOKENIZER_CONFIG_BYTES + 1)
    with pytest.raises(AdapterError, match="at most 67108864 bytes, found 67108865 bytes"):
        override_side_files([], [huge])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["file", "config"])
def test_transformers_loads_the_adapter_s_tokens_and_template(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "output"
    for folder, words in ((base, ["a"]), (adapter, ["a", "b", "c"])):
        model = tokenizers.models.WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, "[UNK]")
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="[UNK]")
        fast.chat_template = f"template of the {folder.name}"
        fast.save_pretrained(folder)
    (base / "added_tokens.json").write_text('{"d": 2}')
    if form == "config":  # as transformers below 4.50 saved it
        fields = json.loads((adapter / "tokenizer_config.json").read_text())
        template = (adapter / "chat_template.jinja").read_text()
        (adapter / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": template}))
        (adapter / "chat_template.jinja").unlink()
    output.mkdir()
    for file in override_side_files(list_side_files(base, ())[0], list_tokenizer_files(adapter))[0]:
        shutil.copy(file.path, output / file.name)
    loaded = transformers.AutoTokenizer.from_pretrained(output)
    assert loaded.get_vocab() == {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    assert loaded.chat_template == "template of the adapter"
