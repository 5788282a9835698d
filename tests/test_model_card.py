"""The output's model card, read back with PyYAML and with huggingface_hub's own reader, which knows nothing of ours."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import rawmerge
from rawmerge.cli import cli
from rawmerge.formats.card_metadata import CardMetadata, Licence, parse_card_metadata
from rawmerge.formats.front_matter import format_front_matter, parse_front_matter
from rawmerge.merge_plan import MergePlan
from rawmerge.output.model_card import CardAdapter, CardSource, card_text
from tests.builders import folder_bytes, lora_pair, random_tensor, write_adapter

Paths = tuple[Path, Path]
BASE_CARD = """---
license: llama3.1
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags: [theirs]
base_model: org/older
extra_gated_prompt: sign here
---
# A base
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_card(folder: Path, **fields: Any) -> None:
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n# {folder.name}\n")


def set_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def card_of(plan: MergePlan) -> str:
    [text] = [file.text for file in plan.written_files if file.name == "README.md"]
    return text


def metadata_of(text: str) -> dict[str, Any]:
    """Return a card's metadata as the hub's client reads it, which must be what PyYAML reads."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    stated = yaml.safe_load(re.split(r"^---$", text, flags=re.MULTILINE)[1])
    assert found == stated
    return found


def planned(paths: Paths, **options: Any) -> dict[str, Any]:
    return metadata_of(card_of(rawmerge.plan_merge(*paths, **options)))


def test_a_card_without_any_other_says_what_is_known_and_no_more(tiny: Paths) -> None:
    expected = {"library_name": "transformers", "tags": ["merge", "rawmerge", "lora"]}
    assert planned(tiny) == expected
    assert "No card of the base states a licence" in card_of(rawmerge.plan_merge(*tiny))


def test_the_base_s_card_is_inherited_where_the_hub_reads_it(tiny: Paths) -> None:
    base, adapter = tiny
    (base / "README.md").write_text(BASE_CARD)
    (base / "LICENSE").write_text("terms")
    put_card(adapter, language="de", pipeline_tag="summarization", license="llama3.1")
    found = planned(tiny)
    assert found["license"] == "llama3.1"
    assert found["license_link"] == "LICENSE"
    assert found["language"] == ["en", "no"]  # Norwegian, which YAML 1.1 takes for false
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["merge", "rawmerge", "lora"]
    assert not {"base_model", "license_name", "extra_gated_prompt"} & found.keys()


def test_a_link_to_a_file_that_the_output_lacks_is_left_out(tiny: Paths) -> None:
    (tiny[0] / "README.md").write_text(BASE_CARD)
    assert "license_link" not in planned(tiny)


def test_language_and_task_come_from_the_adapter_where_the_base_has_none(tiny: Paths) -> None:
    put_card(tiny[1], language="de", pipeline_tag="summarization", library_name="peft")
    found = planned(tiny)
    assert (found["language"], found["pipeline_tag"]) == (["de"], "summarization")
    assert found["library_name"] == "transformers"


def test_a_licence_of_its_own_is_inherited_with_name_and_link(tiny: Paths) -> None:
    own = {"license": "other", "license_name": "acme-1.0", "license_link": "https://example.org/acme"}
    put_card(tiny[0], **own)
    put_card(tiny[1], license="other")  # says nothing: no contradiction
    found = planned(tiny)
    assert own.items() <= found.items()
    assert "states `acme-1.0` ([terms](<https://example.org/acme>))." in card_of(rawmerge.plan_merge(*tiny))


def test_two_licences_are_both_told_and_neither_is_claimed_alone(tiny: Paths) -> None:
    put_card(tiny[0], license="llama3.1", license_link="https://example.org/llama")
    put_card(tiny[1], license="cc-by-nc-4.0")
    plan = rawmerge.plan_merge(*tiny)
    found, text = metadata_of(card_of(plan)), card_of(plan)
    assert (found["license"], found["license_name"]) == ("other", "llama3.1-and-cc-by-nc-4.0")
    assert "license_link" not in found
    assert "The base's card states `llama3.1`" in text
    assert "The card of the adapter `adapter` states `cc-by-nc-4.0`." in text
    assert any("'llama3.1', 'cc-by-nc-4.0'" in note for note in plan.notes)


def test_an_adapter_s_licence_is_never_stated_for_the_base(tiny: Paths) -> None:
    put_card(tiny[1], license="mit")
    plan = rawmerge.plan_merge(*tiny)
    assert "license" not in metadata_of(card_of(plan))
    assert "states `mit`" in card_of(plan)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("---\nlicense: [\n---\n", "no front matter that can be read"),
        (b"---\nlicense: mit\n---\n\xff", "no front matter that can be read"),
        ("---\n" + "[" * 5000 + "\n---\n", "no front matter that can be read"),
        ("---\nlicense: !!python/object/apply:os.getcwd []\nlanguage: de\n---\n", ""),
        ("---\nlicense: [mit, gpl]\nlanguage: de\n---\n", "license not taken over"),
        ("---\nlicense: '<script>'\n---\n", "license not taken over"),
        ("---\nlicense:\n---\n", ""),
        ("---\nlanguage: {license: de}\n---\n", ""),
        ("---\n[license, mit, language, de]\n---\n", ""),
        ("no front matter", ""),
        ("", ""),
        ("\ufeff---\nlanguage: de\n---\n", ""),
        ("---\nx: " + "y" * 2**21 + "\nlicense: mit\n---\n", "no front matter that can be read"),
        ("---\nlicense_link: ../../LICENSE\n---\n", "license_link not taken over"),
        ("---\nlicense_link: a/../../LICENSE\n---\n", "license_link not taken over"),
        ('---\nlicense_name: "a\\nb"\n---\n', "license_name not taken over"),
        (f"---\nlicense_name: {'n' * 101}\n---\n", "license_name not taken over"),
    ],
)
def test_a_broken_card_is_no_error_and_is_kept(tiny: Paths, text: str | bytes, note: str) -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    (tiny[0] / "README.md").write_bytes(raw)
    plan = rawmerge.plan_merge(*tiny)
    found = metadata_of(card_of(plan))
    assert not {"license", "license_name", "license_link"} & found.keys()
    assert found.get("language") == (["de"] if b"de\n" in raw else None)
    assert [bool(note) and note in one for one in plan.notes if "README" in one] == [True] * bool(note)
    assert [Path(file.path).read_bytes() for file in plan.side_files if file.name == "README_base.md"] == [raw]


def test_the_base_s_card_is_kept_byte_for_byte_beside_the_merge_s(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    raw = BASE_CARD.encode() + b"\r\n\xe2\x82\xac no newline"
    (base / "README.md").write_bytes(raw)
    rawmerge.merge_adapter(base, adapter, tmp_path / "out")
    rawmerge.merge_adapter(base, adapter, tmp_path / "plain", card=False)
    out, plain = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "plain")
    assert out["README_base.md"] == raw == plain["README.md"]
    assert out.keys() - plain.keys() == {"README_base.md"}
    assert b"[README_base.md](README_base.md)" in out["README.md"]
    names = plain.keys() - {"README.md", "rawmerge.json"}
    assert {name: out[name] for name in names} == {name: plain[name] for name in names}


def test_a_merge_of_a_merge_keeps_every_card(tiny: Paths, tmp_path: Path) -> None:
    base, adapter = tiny
    (base / "README.md").write_text(BASE_CARD)
    set_config(adapter, base_model_name_or_path="org/base")
    second = write_adapter(tmp_path / "second", lora_pair("model.layers.0.q_proj", 12, 8, seed=5))
    set_config(second, base_model_name_or_path="org/base")
    rawmerge.merge_adapter(base, adapter, tmp_path / "one")
    rawmerge.merge_adapter(tmp_path / "one", second, tmp_path / "two")
    one, two = folder_bytes(tmp_path / "one"), folder_bytes(tmp_path / "two")
    assert two["README_base.md"] == one["README_base.md"] == BASE_CARD.encode()
    assert two["README_base_2.md"] == one["README.md"]
    assert metadata_of(one["README.md"].decode())["base_model"] == "org/base"
    assert "base_model" not in metadata_of(two["README.md"].decode())  # it is no longer what the name stands for


def test_files_that_some_file_systems_take_for_one_are_both_kept(tiny: Paths, tmp_path: Path) -> None:
    (tiny[0] / "README.md").write_text("upper")
    (tiny[0] / "readme.md").write_text("lower")
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    out = folder_bytes(tmp_path / "out")
    kept = {name: raw for name, raw in out.items() if name.lower().startswith("readme_base")}
    assert kept == {"README_base.md": b"upper", "README_base_2.md": b"lower"}
    assert "readme.md" not in out


def test_a_folder_of_that_name_leaves_no_room_for_a_card(tiny: Paths, tmp_path: Path) -> None:
    (tiny[0] / "README.md").mkdir()
    (tiny[0] / "README.md" / "part.md").write_text("x")
    summary = rawmerge.merge_adapter(*tiny, tmp_path / "out")
    assert (tmp_path / "out" / "README.md" / "part.md").read_text() == "x"
    assert any("no card is written" in note for note in summary.notes)


def test_a_single_file_gets_no_card(tiny: Paths, tmp_path: Path) -> None:
    one = tiny[0] / "model-00001-of-00002.safetensors"
    single = tmp_path / "single.safetensors"
    single.write_bytes(one.read_bytes())
    adapter = write_adapter(tmp_path / "first", lora_pair("model.layers.0.q_proj", 12, 8))
    rawmerge.merge_adapter(single, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").glob("README*"))


def test_names_of_the_hub_s_cache_are_hub_ids_with_commits(tmp_path: Path, tiny: Paths) -> None:
    base, adapter = tiny
    places = []
    for folder, repo in ((base, "models--org--base"), (adapter, "models--me--lo.ra")):
        place = tmp_path / repo / "snapshots" / COMMIT
        place.parent.mkdir(parents=True)
        folder.rename(place)
        places.append(place)
    text = card_of(rawmerge.plan_merge(*places))
    assert metadata_of(text)["base_model"] == ["org/base", "me/lo.ra"]
    assert metadata_of(text)["base_model_relation"] == "merge"
    assert f"rawmerge merge org/base@{COMMIT} me/lo.ra@{COMMIT} --output merged" in text
    assert "[`org/base`](https://huggingface.co/org/base) at commit" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/base", "org/base"),
        ("models/base", None),
        ("/home/someone/base", None),
        ("../base", None),
        ("org/base-bnb-4bit", None),
        ("org/base\n- injected/model", None),
        ("", None),
    ],
)
def test_the_name_that_the_adapter_gives_the_base_is_told_if_it_is_a_hub_id(
    tiny: Paths, name: str, expected: str | None
) -> None:
    set_config(tiny[1], base_model_name_or_path=name)
    text = card_of(rawmerge.plan_merge(*tiny))
    assert metadata_of(text).get("base_model") == expected
    assert "someone" not in text
    assert "injected" not in text


def test_a_config_of_another_model_contradicts_the_adapter(tiny: Paths) -> None:
    config = json.loads((tiny[0] / "config.json").read_text())
    (tiny[0] / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/another"}))
    set_config(tiny[1], base_model_name_or_path="org/base")
    assert "base_model" not in planned(tiny, force=True)


def test_a_base_that_is_taken_by_force_is_not_called_what_the_adapter_says(tiny: Paths, tmp_path: Path) -> None:
    rows = {"base_model.model.model.embed_tokens.weight": random_tensor((20, 8), seed=9)}
    pair = lora_pair("model.layers.0.q_proj", 12, 8)
    for name, tensors, expected in (("one", pair | rows, None), ("two", pair, "org/base")):
        adapter = write_adapter(tmp_path / name, tensors, base_model_name_or_path="org/base")
        assert planned((tiny[0], adapter), force=True).get("base_model") == expected


def test_the_card_is_the_same_wherever_the_inputs_lie(tmp_path: Path, tiny: Paths) -> None:
    first = card_of(rawmerge.plan_merge(*tiny))
    moved = tmp_path / "home" / "someone"
    moved.mkdir(parents=True)
    for folder in tiny:
        folder.rename(moved / folder.name)
    assert card_of(rawmerge.plan_merge(moved / "base", moved / "adapter")) == first
    assert str(tmp_path) not in first
    assert "someone" not in first


def test_the_command_makes_the_same_output(tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"dtype": "float16", "compute_dtype": "float64", "max_shard_size": "500B"}
    rawmerge.merge_adapter("base", "adapter:0.5", "out", force=True, **options)  # type: ignore[arg-type]
    text = (tmp_path / "out" / "README.md").read_text()
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("rawmerge ")]
    assert [command[0] for command in commands] == ["merge", "verify"]
    assert CliRunner().invoke(cli, commands[0]).exit_code == 0
    made, again = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "merged")
    assert {name for name in made if made[name] != again.get(name)} == {"rawmerge.json"}  # which tells `force`
    monkeypatch.chdir(tmp_path / "out")
    local = [{"base": "../base", "adapter:0.5": "../adapter:0.5"}.get(word, word) for word in commands[1]]
    assert CliRunner().invoke(cli, local).exit_code == 0


def test_rounding_is_told_as_it_was_done(tiny: Paths) -> None:
    said = "as PEFT's `merge_and_unload()` does"
    assert said in card_of(rawmerge.plan_merge(*tiny))
    for options in ({"compute_dtype": "float64"}, {"dtype": "float16"}):
        text = card_of(rawmerge.plan_merge(*tiny, **options))  # type: ignore[arg-type]
        assert said not in text
        assert f"in {options.get('compute_dtype', 'float32')} and rounded to the stored dtype" in text
    [sums] = [line for line in card_of(rawmerge.plan_merge(*tiny)).splitlines() if line.startswith("Of 4 tensors")]
    assert sums == "Of 4 tensors 2 are updated, 2 are the base's, byte for byte."


def test_facts_of_the_adapter_are_told(tiny: Paths) -> None:
    set_config(tiny[1], target_modules=["q_proj", "k|<b>"], use_rslora=True)
    text = card_of(rawmerge.plan_merge(tiny[0], f"{tiny[1]}:0.25"))
    assert "LoRA (rsLoRA scaling), rank 4, on `k|<b>`, `q_proj`; weight 0.25" in text


def test_several_adapters_are_all_named(tiny: Paths, tmp_path: Path) -> None:
    put_card(tiny[0], license="mit")
    second = write_adapter(tmp_path / "second", lora_pair("model.layers.0.q_proj", 12, 8, rank=2, seed=5), r=2)
    put_card(second, license="apache-2.0")
    put_card(tiny[1], license="gpl-3.0")
    text = card_of(rawmerge.plan_merge(tiny[0], [tiny[1], str(second) + ":0.5"], order="once"))
    assert metadata_of(text)["license_name"] == "mit-and-gpl-3.0-and-apache-2.0"
    assert "rawmerge merge base adapter second:0.5 --output merged --order once" in text
    assert "- Adapter: `second`; LoRA, rank 2" in text
    assert "What the adapters add is summed." in text
    assert "as PEFT's" not in text
    text = card_of(rawmerge.plan_merge(tiny[0], [tiny[1], second]))
    assert "The adapters are merged one after the other." in text
    assert "as PEFT's" in text


def test_adapters_of_two_bases_do_not_name_one(tiny: Paths, tmp_path: Path) -> None:
    set_config(tiny[1], base_model_name_or_path="org/base")
    pair = lora_pair("model.layers.0.q_proj", 12, 8, seed=5)
    second = write_adapter(tmp_path / "second", pair, base_model_name_or_path="another/base")
    assert "base_model" not in metadata_of(card_of(rawmerge.plan_merge(tiny[0], [tiny[1], second])))
    set_config(second, base_model_name_or_path="org/base")
    assert metadata_of(card_of(rawmerge.plan_merge(tiny[0], [tiny[1], second])))["base_model"] == "org/base"


def test_a_file_among_others_is_named_itself_and_has_no_card(tiny: Paths, tmp_path: Path) -> None:
    put_card(tmp_path, license="mit", language="de")
    name = "lora_te_model_layers_0_q_proj"
    tensors = {f"{name}.lora_down.weight": random_tensor((4, 8)), f"{name}.lora_up.weight": random_tensor((12, 4))}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "style.safetensors")
    text = card_of(rawmerge.plan_merge(tiny[0], tmp_path / "style.safetensors"))
    assert metadata_of(text) == {"library_name": "transformers", "tags": ["merge", "rawmerge", "kohya"]}
    assert "- Adapter: `style.safetensors`; kohya and LyCORIS, rank 4\n" in text
    assert "Bits of kohya and LyCORIS: equal to sd-scripts' float32 merge." in text
    assert "as PEFT's" not in text


def test_a_card_that_was_edited_is_a_note_and_no_finding(tiny: Paths, tmp_path: Path) -> None:
    (tiny[0] / "README.md").write_text(BASE_CARD)
    out = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, out)
    clean = rawmerge.verify_merge(out, *tiny)
    assert (clean.findings, clean.notes) == ((), ())
    (out / "README.md").write_text("mine")
    edited = rawmerge.verify_merge(out, *tiny)
    assert edited.findings == ()
    assert [note.partition(" ")[0] for note in edited.notes] == ["README.md"]
    (out / "README.md").unlink()
    assert (rawmerge.verify_merge(out, *tiny).findings, len(edited.notes)) == ((), 1)
    (out / "README_base.md").write_text("mine")
    assert [problem.subject for problem in rawmerge.verify_merge(out, *tiny).findings] == ["README_base.md"]


def test_an_output_without_a_card_is_verified_as_one(tiny: Paths, tmp_path: Path) -> None:
    (tiny[0] / "README.md").write_text(BASE_CARD)
    out = tmp_path / "out"
    rawmerge.merge_adapter(*tiny, out, card=False)
    assert json.loads((out / "rawmerge.json").read_text())["options"]["card"] is False
    verified = rawmerge.verify_merge(out, *tiny)
    assert (verified.findings, verified.notes) == ((), ())
    (out / "README.md").write_text("mine")
    assert rawmerge.verify_merge(out, *tiny).findings == ()


def test_a_card_that_is_written_wrongly_is_not_published(
    tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rawmerge.output.staging_directory import StagingDirectory

    write = StagingDirectory.write_text

    def flip(self: StagingDirectory, name: str, text: str) -> None:
        write(self, name, "flipped" if name == "README.md" else text)

    monkeypatch.setattr(StagingDirectory, "write_text", flip)
    with pytest.raises(rawmerge.VerificationError, match=r"README\.md"):
        rawmerge.merge_adapter(*tiny, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_no_card_on_the_command_line(tiny: Paths, tmp_path: Path) -> None:
    command = ["merge", *map(str, tiny), "-o", str(tmp_path / "out"), "--no-card"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    assert not (tmp_path / "out" / "README.md").exists()
    shown = CliRunner().invoke(cli, ["plan", *map(str, tiny)]).stdout
    assert re.search(r"^written .*README\.md", shown, re.MULTILINE)


def test_shards_are_reused_whether_there_is_a_card_or_not(tiny: Paths, tmp_path: Path) -> None:
    import time

    time.sleep(0.1)  # inputs that were changed just now are not trusted
    rawmerge.merge_adapter(*tiny, tmp_path / "out")
    again = rawmerge.merge_adapter(*tiny, tmp_path / "out", overwrite=True, card=False)
    assert again.reused == 2


TEXT = st.text(max_size=40) | st.text("`<>|[]()*_\\\n\r#-:'\"{}&!%@", max_size=30)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)")


@settings(max_examples=300)
@given(TEXT, TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3))
def test_names_of_strangers_stay_names(base: str, adapter: str, licence: str, other: str, targets: list[str]) -> None:
    """Whatever folders, modules and licences are called, the front matter keeps its fields and the text its lines."""
    empty = MergePlanStub.plan()
    source = CardSource(base, metadata=CardMetadata(Licence("other", licence if licence.isprintable() else "x")))
    one = CardAdapter(
        CardSource(adapter, metadata=CardMetadata(Licence("other", other if other.isprintable() else "y"))),
        "LoRA",
        targets=tuple(targets),
        replaced=tuple(targets),
    )
    text = card_text(empty, source, [one], [])
    plain = card_text(empty, CardSource("b"), [CardAdapter(CardSource("a"), "LoRA")], [])
    assert metadata_of(text).keys() <= metadata_of(plain).keys() | {"license", "license_name"}
    body = text.split("\n---\n", 1)[1]
    outside = "\n".join(SPAN.sub("", line) for line in body.splitlines() if not line.startswith(("rawmerge ", "```")))
    assert not set("<>*|`") & set(outside.replace("\\n", ""))
    assert [line for line in outside.splitlines() if line.startswith("#")] == [
        line if line.startswith("##") else "#  with " for line in plain.splitlines() if re.match("#+ ", line)
    ]


class MergePlanStub:
    """A plan of no tensor, made once."""

    @staticmethod
    def plan() -> MergePlan:
        from rawmerge.merge_options import MergeOptions

        return MergePlan(MergeOptions(), "", "", (), "", (), (), (), (), (), ())


@settings(max_examples=300)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), st.text(min_size=1).filter(str.isprintable)))
def test_front_matter_is_read_back_by_pyyaml(fields: dict[str, str]) -> None:
    fields = {f"x{name}": value for name, value in fields.items()}
    listed = {name: [value, "no", "1.0"] for name, value in fields.items()}
    for given_fields in (fields, listed):
        raw = format_front_matter(given_fields)
        assert yaml.safe_load(raw.removeprefix("---\n").removesuffix("---\n")) == (given_fields or None)
        expected = {name: value if isinstance(value, str) else tuple(value) for name, value in given_fields.items()}
        assert parse_front_matter(raw.encode() + b"# text\n") == expected


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text("-abc:[]{}&*!|>'\"#%@ \n\t", max_size=120).map(lambda text: text.encode()))
def test_any_bytes_are_read_or_are_a_value_error(raw: bytes) -> None:
    for content in (raw, b"---\n" + raw + b"\n---\n"):
        try:
            found = parse_card_metadata(content)
        except ValueError:
            continue
        assert found.licence.name.isprintable()
        assert re.fullmatch(r"[\w.+-]*", found.licence.identifier + found.pipeline_tag)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["license", "language", "pipeline_tag", "a", "b"]),
        st.text(max_size=8) | st.lists(st.text(max_size=5), max_size=3),
    )
)
def test_what_pyyaml_wrote_is_read_as_pyyaml_reads_it(fields: dict[str, Any]) -> None:
    raw = f"---\n{yaml.safe_dump(fields)}---\n"
    expected = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    assert parse_front_matter(raw.encode()) == expected


def test_a_card_s_flags_do_not_reach_the_plan_of_others(tiny: Paths) -> None:
    plan = rawmerge.plan_merge(*tiny)
    plain = rawmerge.plan_merge(*tiny, card=False)
    files = tuple(file for file in plan.written_files if file.name != "README.md")
    assert replace(plan, options=plain.options, written_files=files) == plain
    assert rawmerge.parse_plan(rawmerge.format_plan(plan)) == plan
