"""Which output projections transformers ties to input embeddings where they are not plainly called `lm_head`.

Source: transformers 5.24, `_tied_weights_keys` of the classes named here; a parity test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rawmerge.matching.disk_names import DiskNames


@dataclass(frozen=True, slots=True)
class TiedOutput:
    """How some classes tie.

    Attributes:
        input_end: end of the input embedding's path in memory.
        output: path of the output projection in memory.
        bias: path of the bias that the projection's is tied to, an empty string where it has its own or none.
        classes: names of the classes.
    """

    input_end: str
    output: str
    bias: str
    classes: frozenset[str]


def _of(input_end: str, output: str, bias: str, classes: str) -> TiedOutput:
    return TiedOutput(input_end, output, bias, frozenset(classes.split()))


_WORDS: Final = "embeddings.word_embeddings"
TIED_OUTPUTS: Final = (
    _of(
        _WORDS,
        "cls.predictions.decoder",
        "cls.predictions.bias",
        "BertForMaskedLM BertForPreTraining BertLMHeadModel BigBirdForCausalLM BigBirdForMaskedLM DebertaForMaskedLM "
        "DebertaV2ForMaskedLM ErnieForCausalLM ErnieForMaskedLM ErnieForPreTraining LayoutLMForMaskedLM "
        "MegatronBertForCausalLM MegatronBertForMaskedLM NomicBertForMaskedLM NystromformerForMaskedLM "
        "RoFormerForCausalLM RoFormerForMaskedLM SqueezeBertForMaskedLM",
    ),
    _of(
        _WORDS,
        "lm_head.decoder",
        "lm_head.bias",
        "CamembertForCausalLM CamembertForMaskedLM LongformerForMaskedLM MPNetForMaskedLM RobertaForCausalLM "
        "RobertaForMaskedLM RobertaPreLayerNormForMaskedLM XLMRobertaForCausalLM XLMRobertaForMaskedLM",
    ),
    _of(_WORDS, "predictions.decoder", "predictions.bias", "AlbertForMaskedLM AlbertForPreTraining"),
    _of(_WORDS, "generator_lm_head", "", "ConvBertForMaskedLM ElectraForCausalLM ElectraForMaskedLM"),
    _of(_WORDS, "vocab_projector", "", "DistilBertForMaskedLM"),
    _of("embeddings.tok_embeddings", "decoder", "", "ModernBertDecoderForCausalLM ModernBertForMaskedLM"),
    _of("backbone.embeddings", "lm_head", "", "FalconMambaForCausalLM Mamba2ForCausalLM MambaForCausalLM"),
    _of(
        "model.decoder.embed_tokens",
        "proj_out",
        "",
        "MoonshineForConditionalGeneration WhisperForConditionalGeneration",
    ),
)


@dataclass(frozen=True, slots=True)
class KnownTie:
    """A tie of a base, by names on disk.

    Attributes:
        input: the input embedding.
        output: the output projection's weight, on disk or as it gets written; `canonical_output` in memory.
        biases: name to write and name of the tensor to take it from, of biases that the disk holds on one side only.
    """

    input: str
    output: str
    canonical_output: str
    biases: tuple[tuple[str, str], ...]


def known_tie(architectures: Iterable[str], names: DiskNames) -> KnownTie | None:
    """Return the tie of a base of one of the classes, None where it is none or its embedding cannot be told."""
    classes = frozenset(architectures)
    tied = next((tied for tied in TIED_OUTPUTS if classes & tied.classes), None)
    if tied is None:
        return None
    end = f".{tied.input_end}.weight"
    inputs = [name for name in names.tensors if f".{names.family.canonical(name)}".endswith(end)]
    if len(inputs) != 1:
        return None
    output = f"{tied.output}.weight"
    return KnownTie(inputs[0], _on_disk(output, names) or output, output, tuple(_biases(tied, names)))


def _biases(tied: TiedOutput, names: DiskNames) -> Iterable[tuple[str, str]]:
    source, own = _on_disk(tied.bias, names), f"{tied.output}.bias"
    if source and not _on_disk(own, names):
        yield own, source


def _on_disk(canonical: str, names: DiskNames) -> str:
    """Return what a tensor is called on disk, an empty string where the disk lacks it."""
    places = names.places.get(canonical, []) if canonical else []
    return places[0].name if len(places) == 1 and places[0].is_whole else ""
