"""The grammar of adapter tensor names, against names that PEFT writes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rawmerge.formats.adapter_names import (
    PAIR_ROLES,
    PREFIX,
    WRAPPERS,
    AdapterTensorName,
    adapter_names,
    describe_foreign,
    find_duplicates,
    parse_adapter_name,
    parse_adapter_names,
)
from tests.strategies import SETTINGS, module_paths, texts

STORED, STORED_BASE, FOREIGN = "stored", "stored_base", "foreign"
ROLES = {*PAIR_ROLES, "lora_b_bias", "token_rows", STORED, STORED_BASE, "saved_copy", "original_copy", FOREIGN}
MISNAMED = "a LoRA tensor with a name PEFT does not save"
OTHER_KIND = "a tensor of another kind of PEFT adapter"
NESTED = "a tensor inside a module that is itself targeted, as in nn.MultiheadAttention"

#: Ending behind a module -> (role, parameter, depth).
ENDINGS = {
    "lora_A.weight": ("lora_a", "weight", 0),
    "lora_B.weight": ("lora_b", "weight", 0),
    "lora_B.bias": ("lora_b_bias", "bias", 0),
    "base_layer.lora_A.weight": ("lora_a", "weight", 1),
    "base_layer.base_layer.lora_B.weight": ("lora_b", "weight", 2),
    "lora_embedding_A": ("lora_embedding_a", "weight", 0),
    "lora_embedding_B": ("lora_embedding_b", "weight", 0),
    "token_adapter.trainable_tokens_delta": ("token_rows", "weight", 0),
    "weight": (STORED, "weight", 0),
    "bias": (STORED, "bias", 0),
    "base_layer.weight": (STORED_BASE, "weight", 0),
    "base_layer.bias": (STORED_BASE, "bias", 0),
    "base_layer.base_layer.bias": (STORED_BASE, "bias", 0),
    "token_adapter.base_layer.weight": (STORED_BASE, "weight", 0),
    "modules_to_save.weight": ("saved_copy", "weight", 0),
    "modules_to_save.dense.weight": ("saved_copy", "dense.weight", 0),
    "original_module.weight": ("original_copy", "weight", 0),
    "original_module.dense.bias": ("original_copy", "dense.bias", 0),
}
#: The same with `{}` where a file keeps the adapter's own name.
NAMED_ENDINGS = {
    "lora_A{}.weight": ("lora_a", "weight", 0),
    "lora_B{}.weight": ("lora_b", "weight", 0),
    "lora_B{}.bias": ("lora_b_bias", "bias", 0),
    "base_layer.lora_B{}.weight": ("lora_b", "weight", 1),
    "lora_embedding_A{}": ("lora_embedding_a", "weight", 0),
    "lora_embedding_B{}": ("lora_embedding_b", "weight", 0),
    "token_adapter.trainable_tokens_delta{}": ("token_rows", "weight", 0),
    "modules_to_save{}.weight": ("saved_copy", "weight", 0),
    "modules_to_save{}.dense.weight": ("saved_copy", "dense.weight", 0),
}


def toy_model() -> Any:
    nn = pytest.importorskip("torch.nn")
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(2, 3, 3)])
    parts = {"embed_tokens": nn.Embedding(8, 4), "layers": layers, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}
    return nn.ModuleDict(parts)


def experts_model() -> Any:
    torch = pytest.importorskip("torch")
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 4, 6))
    experts.down_proj = torch.nn.Parameter(torch.zeros(3, 6, 4))
    experts.router = torch.nn.Linear(4, 4)
    attention = torch.nn.MultiheadAttention(4, 2)
    return torch.nn.ModuleDict({"experts": experts, "attention": attention, "q": torch.nn.Linear(4, 4)})


def tiny_llama(*, ties: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=12, tie_word_embeddings=ties)
    return transformers.LlamaForCausalLM(config)


def names_from_peft(model: Any = None, *, saves_embeddings: bool = False, name: str = "default", **fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, **{"target_modules": ["0", "1"], **fields})
    wrapped = peft.get_peft_model(toy_model() if model is None else model, config, adapter_name=name)
    return list(peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=saves_embeddings))


def roles_and_targets(names: list[str]) -> set[tuple[str, str]]:
    return {(name.role, name.target) for name in parse_adapter_names(names)}


def meaning(name: AdapterTensorName) -> tuple[str, str, str, int]:
    return name.role, name.module_path, name.parameter, name.depth


@pytest.mark.parametrize(
    ("name", "role", "module_path", "target"),
    [
        ("h.0.q.lora_A.weight", "lora_a", "h.0.q", "h.0.q.weight"),
        ("h.0.q.lora_B.weight", "lora_b", "h.0.q", "h.0.q.weight"),
        ("h.0.q.lora_B.bias", "lora_b_bias", "h.0.q", "h.0.q.bias"),
        ("wte.lora_embedding_A", "lora_embedding_a", "wte", "wte.weight"),
        ("wte.lora_embedding_B", "lora_embedding_b", "wte", "wte.weight"),
        ("wte.token_adapter.trainable_tokens_delta", "token_rows", "wte", "wte.weight"),
        ("embed_tokens.base_layer.weight", STORED_BASE, "embed_tokens", "embed_tokens.weight"),
        ("embed_tokens.token_adapter.base_layer.weight", STORED_BASE, "embed_tokens", "embed_tokens.weight"),
        ("h.0.q.base_layer.bias", STORED_BASE, "h.0.q", "h.0.q.bias"),
        ("experts.base_layer.base_layer.router.bias", STORED_BASE, "experts.router", "experts.router.bias"),
        ("mha.base_layer.out_proj.base_layer.bias", STORED_BASE, "mha.out_proj", "mha.out_proj.bias"),
        ("score.weight", STORED, "score", "score.weight"),
        ("classifier.dense.bias", STORED, "classifier.dense", "classifier.dense.bias"),
        ("bn.running_mean", STORED, "bn", "bn.running_mean"),
        ("pooler", STORED, "", "pooler"),
        ("score.modules_to_save.weight", "saved_copy", "score", "score.weight"),
        ("score.modules_to_save.dense.bias", "saved_copy", "score", "score.dense.bias"),
        ("score.original_module.dense.bias", "original_copy", "score", "score.dense.bias"),
    ],
)
def test_a_name_says_what_the_tensor_is_for(name: str, role: str, module_path: str, target: str) -> None:
    for text in (PREFIX + name, name):
        found = parse_adapter_name(text)
        assert (found.role, found.module_path, found.target) == (role, module_path, target)
        assert (found.text, found.adapter_name, found.wrappers, found.depth) == (text, "", (), 0)


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("mlp.experts.lora_A.weight", 0),
        ("mlp.experts.base_layer.lora_A.weight", 1),
        ("mlp.experts.base_layer.base_layer.lora_B.default.weight", 2),
        ("mlp.experts.base_layer._fsdp_wrapped_module.base_layer.lora_B.bias", 2),
    ],
)
def test_the_pairs_of_several_parameters_are_told_by_their_depth(name: str, depth: int) -> None:
    found = parse_adapter_name(PREFIX + name)
    assert (found.module_path, found.depth) == ("mlp.experts", depth)


@pytest.mark.parametrize(
    ("name", "adapter_name", "target"),
    [
        ("h.q.lora_A.default.weight", "default", "h.q.weight"),
        ("h.q.lora_A.my_run.weight", "my_run", "h.q.weight"),
        ("h.q.lora_A.default.default.weight", "default", "h.q.weight"),
        ("h.q.lora_B.my_run.bias", "my_run", "h.q.bias"),
        ("h.q.lora_B.bias.bias.bias", None, ""),
        ("wte.lora_embedding_A.default", "default", "wte.weight"),
        ("wte.lora_embedding_B.1", "1", "wte.weight"),
        ("wte.token_adapter.trainable_tokens_delta.default", "default", "wte.weight"),
        ("score.modules_to_save.default.weight", "default", "score.weight"),
        ("score.modules_to_save.default.default.weight", "default", "score.weight"),
        ("score.modules_to_save.default.dense.weight", "default", "score.dense.weight"),
        ("score.modules_to_save.my_run.weight", "", "score.my_run.weight"),
        ("score.modules_to_save.default", "", "score.default"),
        ("h.q.lora_A.a.b.weight", None, ""),
        ("h.q.lora_A.a.a.a.weight", None, ""),
    ],
)
def test_an_adapter_s_own_name_may_stand_in_the_name(name: str, adapter_name: str | None, target: str) -> None:
    found = parse_adapter_name(PREFIX + name)
    assert (found.role == FOREIGN) == (adapter_name is None)
    assert adapter_name is None or (found.adapter_name, found.target) == (adapter_name, target)


def test_behind_modules_to_save_the_file_s_other_names_tell_the_adapter_s_from_a_module_s() -> None:
    saved = "score.modules_to_save.my_run.weight"
    beside, alone = parse_adapter_names([saved, "h.q.lora_A.my_run.weight"]), parse_adapter_names([saved])
    assert (beside[0].adapter_name, beside[0].target) == ("my_run", "score.weight")
    assert (alone[0].adapter_name, alone[0].target) == ("", "score.my_run.weight")
    assert [name.text for name in beside] == [saved, "h.q.lora_A.my_run.weight"]


@pytest.mark.parametrize(
    ("text", "module_path", "wrappers"),
    [
        ("base_model.model.model.h.q", "model.h.q", ()),
        ("model.h.q", "model.h.q", ()),
        ("base_model.model.base_model.model.h.q", "h.q", ()),
        ("base_model.h.q", "base_model.h.q", ()),
        ("model.base_model.model.h.q", "model.base_model.model.h.q", ()),
        ("_orig_mod.base_model.model.model.h.q", "model.h.q", ("_orig_mod",)),
        ("module.base_model.model.model.h.q", "model.h.q", ("module",)),
        ("base_model.model._orig_mod.model.h.q", "model.h.q", ("_orig_mod",)),
        ("base_model.model._orig_mod.base_model.model.h.q", "h.q", ("_orig_mod",)),
        ("base_model._fsdp_wrapped_module.model.h.q", "h.q", ("_fsdp_wrapped_module",)),
        ("_orig_mod.module.base_model.model.h.q", "h.q", ("module", "_orig_mod")),
        ("module.module._orig_mod.h.q", "h.q", ("module", "module", "_orig_mod")),
        (
            "_fsdp_wrapped_module.base_model.model.h._checkpoint_wrapped_module._fsdp_wrapped_module.q",
            "h.q",
            ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
        ),
        ("base_model.model.module.h.q", "module.h.q", ()),
        ("base_model.model.h.module.q", "h.module.q", ()),
        ("base_models.model.h.q", "base_models.model.h.q", ()),
    ],
)
def test_prefix_and_wrappers_are_no_part_of_the_path(text: str, module_path: str, wrappers: tuple[str, ...]) -> None:
    for ending in ("lora_A.weight", "weight", "_orig_mod.weight"):
        found = parse_adapter_name(f"{text}.{ending}")
        assert found.module_path == module_path
        assert found.wrappers == wrappers + ("_orig_mod",) * (ending == "_orig_mod.weight")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("base_model.vera_A", OTHER_KIND),
        (f"{PREFIX}h.q.vera_lambda_b", OTHER_KIND),
        (f"{PREFIX}h.q.hada_w1_a", OTHER_KIND),
        (f"{PREFIX}h.q.oft_R.default.weight", OTHER_KIND),
        ("", "a name with an empty part"),
        (PREFIX, "a name with an empty part"),
        ("base_model.model", "a name with an empty part"),
        ("_orig_mod", "a name with an empty part"),
        (f"{PREFIX}h..q.weight", "a name with an empty part"),
        (f"{PREFIX}h.q.lora_A..weight", "a name with an empty part"),
        (f"{PREFIX}h.q.lora_magnitude_vector", "a DoRA magnitude"),
        (f"{PREFIX}h.q.lora_magnitude_vector.weight", "a DoRA magnitude"),
        (f"{PREFIX}h.q.lora_magnitude_vector.default.weight", "a DoRA magnitude"),
        (f"{PREFIX}h.q.lora_E", "a tensor of AdaLoRA"),
        (f"{PREFIX}h.q.lora_diag.default", "a KaSA diagonal"),
        (f"{PREFIX}h._flat_param", "a flat parameter of FSDP, whose shards were not gathered"),
        (f"{PREFIX}wte.trainable_tokens_delta", "trained token rows of a kind of their own, not LoRA's"),
        (f"{PREFIX}wte.token_adapter.trainable_tokens_original", "a part of a token adapter that PEFT does not save"),
        (f"{PREFIX}attn.base_layer.k_proj.lora_A.weight", NESTED),
        (f"{PREFIX}attn.base_layer.out_proj.base_layer.lora_A.weight", NESTED),
        (f"{PREFIX}attn.base_layer.out_proj.lora_embedding_A.weight", NESTED),
        (f"{PREFIX}base_layer.out_proj.lora_A.weight", NESTED),
        (f"{PREFIX}base_layer.lora_A.weight", NESTED),
        (f"{PREFIX}h.q.base_layer", NESTED),
        (f"{PREFIX}base_layer.weight", NESTED),
        (f"{PREFIX}score.modules_to_save", "a saved module with adapters of its own"),
        (f"{PREFIX}modules_to_save.weight", "a saved module with adapters of its own"),
        (f"{PREFIX}score.modules_to_save.default.lora_A.default.weight", "a saved module with adapters of its own"),
        (f"{PREFIX}score.original_module.base_layer.weight", "a saved module with adapters of its own"),
        (f"{PREFIX}h.q.lora_A", MISNAMED),
        (f"{PREFIX}h.q.lora_A.bias", MISNAMED),
        (f"{PREFIX}h.q.lora_A.default", MISNAMED),
        (f"{PREFIX}lora_A.weight", MISNAMED),
        (f"{PREFIX}h.lora_A.q.lora_A.weight", MISNAMED),
        (f"{PREFIX}q.lora_embedding_B.weight", MISNAMED),
        (f"{PREFIX}q.lora_something_new.weight", MISNAMED),
    ],
)
def test_a_name_outside_the_grammar_is_foreign_and_described(text: str, what: str) -> None:
    found = parse_adapter_name(text)
    assert (found.role, found.text, found.depth, found.adapter_name) == (FOREIGN, text, 0, "")
    assert describe_foreign(text) == what


def test_a_name_that_is_not_foreign_has_no_description_of_its_own() -> None:
    assert describe_foreign(f"{PREFIX}score.weight") == "an unknown name"


@pytest.mark.parametrize("name", ["my_lora_A.base_layers.weight", "road_sign.weight", "poly_norm.weight", "often.bias"])
def test_parts_of_names_count_as_whole_segments_only(name: str) -> None:
    assert parse_adapter_name(PREFIX + name).role == STORED


def test_a_pair_may_be_on_a_module_whose_name_looks_like_another_kind_s() -> None:
    assert parse_adapter_name(f"{PREFIX}h.lora_proj.oft_in.lora_A.weight").module_path == "h.lora_proj.oft_in"


@pytest.mark.parametrize(
    ("names", "duplicates"),
    [
        (["q.lora_A.weight", "q.lora_B.weight", "v.lora_A.weight"], []),
        (["q.lora_A.weight", "q.lora_A.default.weight"], [(0, 1)]),
        (["q.lora_A.weight", "_orig_mod.q.lora_A.weight", PREFIX + "q.lora_A.weight"], [(0, 1), (0, 2)]),
        (["q.lora_A.a.weight", "q.lora_A.b.weight"], [(0, 1)]),
        (["q.lora_A.weight", "q.base_layer.lora_A.weight", "q.lora_B.weight", "q.lora_B.bias"], []),
        (["e.weight", "e.base_layer.weight"], [(0, 1)]),
        (["e.weight", "e.modules_to_save.weight", "e.original_module.weight"], []),
        (["e.modules_to_save.default.weight", "e.modules_to_save.weight"], [(0, 1)]),
        (["q.lora_E", "_orig_mod.q.lora_E", "q.lora_A", "q.lora_A"], []),
    ],
)
def test_names_that_mean_the_same_are_found(names: list[str], duplicates: list[tuple[int, int]]) -> None:
    expected = [(names[first], names[other]) for first, other in duplicates]
    assert find_duplicates(parse_adapter_names(names)) == expected


def test_the_adapters_of_a_file_are_found() -> None:
    names = ["q.lora_A.a.weight", "q.lora_B.weight", "e.lora_embedding_A.b", "e.weight", "h.lora_A.x.y.weight"]
    assert adapter_names(parse_adapter_names(names)) == {"a", "b"}
    assert adapter_names([]) == set()


def fronts() -> st.SearchStrategy[str]:
    """Draw what trainers put before a path, in any order that nests."""
    wrappers = st.sampled_from(sorted(WRAPPERS))
    outer = st.lists(wrappers | st.just("module"), max_size=3)
    inner = st.lists(wrappers | st.just(PREFIX[:-1]), max_size=4)
    return st.builds(lambda first, then: "".join(f"{part}." for part in [*first, *then]), outer, inner)


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, str, tuple[str, str, str, int]]:
    """Draw a name with wrappers and the adapter's name in it, that adapter's name, and what it means."""
    ending, (role, parameter, depth) = draw(st.sampled_from(list({**ENDINGS, **NAMED_ENDINGS}.items())))
    adapter_name = draw(st.sampled_from(["", ".default", ".default.default"])) if "{}" in ending else ""
    path = draw(module_paths())
    inside = [part for part in f"{path}.{ending.format(adapter_name)}".split(".") if part]
    for _ in range(draw(st.integers(0, 2))):
        inside.insert(draw(st.integers(0, len(inside) - 1)), draw(st.sampled_from(sorted(WRAPPERS))))
    text = draw(fronts()) + ".".join(inside)
    return text, adapter_name[1:].partition(".")[0], (role, path, parameter, depth)


@SETTINGS
@given(spellings())
def test_however_a_name_is_spelt_it_means_the_same(spelling: tuple[str, str, tuple[str, str, str, int]]) -> None:
    text, adapter_name, expected = spelling
    found = parse_adapter_name(text)
    assert (meaning(found), found.adapter_name) == (expected, adapter_name)
    assert set(found.wrappers) <= WRAPPERS | {"module"}


@SETTINGS
@given(module_paths(), st.sampled_from(sorted(NAMED_ENDINGS)), texts())
def test_an_adapter_may_have_any_name_without_a_dot(path: str, ending: str, adapter_name: str) -> None:
    if "modules_to_save" in ending or set(adapter_name) & {".", "\ud800"} or adapter_name in {"", "weight", "bias"}:
        return
    found = parse_adapter_name(f"{PREFIX}{path}.{ending.format('.' + adapter_name)}")
    assert (meaning(found)[0], found.adapter_name) == (NAMED_ENDINGS[ending][0], adapter_name)


@SETTINGS
@given(texts(), texts())
def test_any_text_at_all_gets_a_role(text: str, module: str) -> None:
    for name in (text, PREFIX + text, f"{PREFIX}{module}.{text}"):
        found = parse_adapter_name(name)
        assert found.role in ROLES
        assert found.text == name
        assert describe_foreign(name)


@pytest.mark.parity
def test_the_names_that_peft_saves_lead_to_the_model_s_own_parameters() -> None:
    names = names_from_peft(target_modules=["0", "1", "embed_tokens"], modules_to_save=["head", "norm"])
    found = [parse_adapter_name(name) for name in names]
    assert {name.target for name in found} == {*dict(toy_model().named_parameters())} - {
        "layers.0.bias",
        "layers.1.bias",
    }
    assert {name.role for name in found} == {STORED, *PAIR_ROLES}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"bias": "lora_only"}, {(STORED_BASE, "layers.0.bias"), (STORED_BASE, "layers.1.bias")}),
        (
            {"bias": "all"},
            {
                (STORED_BASE, "layers.0.bias"),
                (STORED_BASE, "layers.1.bias"),
                (STORED, "norm.bias"),
                (STORED, "head.bias"),
            },
        ),
        ({"lora_bias": True}, {("lora_b_bias", "layers.0.bias"), ("lora_b_bias", "layers.1.bias")}),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, {("token_rows", "embed_tokens.weight")}),
    ],
    ids=lambda value: str(sorted(value))[:30],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias in lora_B for a broken factor
def test_tensors_beside_the_pairs_are_told_apart(fields: dict[str, Any], expected: set[tuple[str, str]]) -> None:
    extra = set(names_from_peft(**fields)) - set(names_from_peft())
    assert roles_and_targets(sorted(extra)) == expected


@pytest.mark.parity
def test_a_dora_magnitude_is_foreign() -> None:
    extra = set(names_from_peft(use_dora=True)) - set(names_from_peft())
    assert {describe_foreign(name) for name in extra} == {"a DoRA magnitude"}
    assert {parse_adapter_name(name).role for name in extra} == {FOREIGN}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("fields", "ties", "expected"),
    [
        (
            {"modules_to_save": ["embed_tokens"]},
            False,
            {
                (STORED, "model.embed_tokens.weight"),
                ("saved_copy", "model.embed_tokens.weight"),
                ("original_copy", "model.embed_tokens.weight"),
                (STORED, "lm_head.weight"),
            },
        ),
        (
            {"trainable_token_indices": [1, 2]},
            False,
            {
                ("token_rows", "model.embed_tokens.weight"),
                (STORED_BASE, "model.embed_tokens.weight"),
                (STORED, "lm_head.weight"),
            },
        ),
        (
            {"trainable_token_indices": [1, 2]},
            True,
            {
                ("token_rows", "model.embed_tokens.weight"),
                (STORED_BASE, "model.embed_tokens.weight"),
                ("token_rows", "lm_head.weight"),
                (STORED_BASE, "lm_head.weight"),
            },
        ),
        (
            {"target_modules": ["embed_tokens", "lm_head"]},
            False,
            {
                ("lora_embedding_a", "model.embed_tokens.weight"),
                ("lora_embedding_b", "model.embed_tokens.weight"),
                (STORED_BASE, "model.embed_tokens.weight"),
                ("lora_a", "lm_head.weight"),
                ("lora_b", "lm_head.weight"),
                (STORED_BASE, "lm_head.weight"),
            },
        ),
    ],
    ids=["saved", "rows", "rows-tied", "targeted"],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers 5.23
def test_what_peft_saves_of_resized_embeddings_is_told_apart(
    fields: dict[str, Any], ties: bool, expected: set[tuple[str, str]]
) -> None:
    names = names_from_peft(tiny_llama(ties=ties), saves_embeddings=True, **{"target_modules": ["q_proj"], **fields})
    found = {place for place in roles_and_targets(names) if "q_proj" not in place[1]}
    assert found == expected


@pytest.mark.parity
def test_peft_s_nested_pairs_have_their_depth() -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    found = parse_adapter_names(names_from_peft(experts_model(), target_modules=["q"], target_parameters=parameters))
    assert {(name.role, name.module_path, name.depth) for name in found} == {
        (role, path, depth)
        for path, depth in [("experts", 0), ("experts", 1), ("q", 0)]
        for role in ("lora_a", "lora_b")
    }


@pytest.mark.parity
def test_peft_s_pair_inside_an_attention_is_told_apart() -> None:
    found = parse_adapter_names(names_from_peft(experts_model(), target_modules=["attention"], bias="lora_only"))
    assert {(name.role, name.target, name.is_inner) for name in found} == {
        ("lora_a", "attention.weight", False),
        ("lora_b", "attention.weight", False),
        ("lora_a", "attention.out_proj.weight", True),
        ("lora_b", "attention.out_proj.weight", True),
        (STORED_BASE, "attention.out_proj.bias", False),
    }


@pytest.mark.parity
def test_peft_leaves_its_name_in_the_bias_of_a_deep_saved_module() -> None:
    names = names_from_peft(experts_model(), modules_to_save=["experts"], target_modules=["q"], bias="all")
    copies = [name for name in parse_adapter_names(names) if name.role == "saved_copy"]
    assert [(name.target, name.adapter_name) for name in copies] == [("experts.router.bias", "default")]
    assert f"{PREFIX}experts.modules_to_save.default.router.bias" in names


@pytest.mark.parity
@pytest.mark.parametrize("name", ["default", "my_run", "1"])
def test_a_raw_state_dict_of_a_peft_model_means_what_the_saved_file_does(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1", "embed_tokens"], modules_to_save=["head"])
    model = peft.get_peft_model(toy_model(), config, adapter_name=name)
    raw = {meaning(found) for found in parse_adapter_names(model.state_dict()) if found.role in PAIR_ROLES}
    file = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    saved = {meaning(found) for found in parse_adapter_names(file)}
    assert raw == {found for found in saved if found[0] in PAIR_ROLES}
    found = parse_adapter_names(model.state_dict())
    assert adapter_names(found) == {name}
    assert {entry.target for entry in found if entry.role == "saved_copy"} == {"head.weight", "head.bias"}


@pytest.mark.parity
def test_the_tensors_of_every_other_kind_are_foreign() -> None:
    mapping = pytest.importorskip("peft.mapping")
    layers = {
        name
        for kind, tuner in mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if (layer := getattr(tuner, "tuner_layer_cls", None)) and kind not in {"LORA", "ADALORA", "POLY"}
        for name in layer.adapter_layer_names
    }
    assert len(layers) > 40
    stored = {name for name in layers if parse_adapter_name(f"{PREFIX}h.q.{name}").role != FOREIGN}
    assert {name for name in stored if not name.endswith("_dropout")} == set()  # dropouts have no tensors
