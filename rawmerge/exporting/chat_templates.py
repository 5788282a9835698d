"""Chat formats under LLaMA-Factory's names, as far as an ollama Modelfile needs them.

Source: the formats that `data/template.py` of LLaMA-Factory registers (of 2025), with its placeholders written as
ollama does. Templates that name tokens by number, and rarely used ones, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: Stand for the text of the tokenizer's tokens, or for nothing where it has none.
BOS: Final = "{bos}"
EOS: Final = "{eos}"
CONTENT: Final = "{{ .Content }}"
SYSTEM: Final = "{{ .System }}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """How a conversation is written for a model.

    Attributes:
        user: a user's message, up to where the assistant's begins.
        assistant: the assistant's message.
        system: the system message.
        prefix: what stands before all.
        default_system: the system message where none is given.
        stops: words at which the model stops, besides the tokenizer's end token.
        replaces_eos: whether the first of them takes that token's place.
    """

    user: str = CONTENT
    assistant: str = CONTENT + EOS
    system: str = SYSTEM
    prefix: str = ""
    default_system: str = ""
    stops: tuple[str, ...] = ()
    replaces_eos: bool = False


def _chatml(
    default_system: str = "", stops: tuple[str, ...] = ("<|im_end|>",), prefix: str = "", *, replaces_eos: bool = False
) -> ChatTemplate:
    return ChatTemplate(
        user=f"<|im_start|>user\n{CONTENT}<|im_end|>\n<|im_start|>assistant\n",
        assistant=f"{CONTENT}<|im_end|>\n",
        system=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n",
        prefix=prefix,
        default_system=default_system,
        stops=stops,
        replaces_eos=replaces_eos,
    )


def _gemma(stops: tuple[str, ...] = ("<end_of_turn>",), *, replaces_eos: bool = True) -> ChatTemplate:
    return ChatTemplate(
        user=f"<start_of_turn>user\n{CONTENT}<end_of_turn>\n<start_of_turn>model\n",
        assistant=f"{CONTENT}<end_of_turn>\n",
        system=f"{SYSTEM}\n\n",
        prefix=BOS,
        stops=stops,
        replaces_eos=replaces_eos,
    )


def _llama3(start: str, end: str, turn: str, message: str) -> ChatTemplate:
    return ChatTemplate(
        user=f"{start}user{end}\n\n{CONTENT}{turn}{start}assistant{end}\n\n",
        assistant=f"{CONTENT}{turn}",
        system=f"{start}system{end}\n\n{SYSTEM}{turn}",
        prefix=BOS,
        stops=(turn, message),
        replaces_eos=True,
    )


def _glm4(stops: tuple[str, ...] = ("<|user|>", "<|observation|>")) -> ChatTemplate:
    return ChatTemplate(
        user=f"<|user|>\n{CONTENT}<|assistant|>",
        assistant=f"\n{CONTENT}",
        system=f"<|system|>\n{SYSTEM}",
        prefix="[gMASK]<sop>",
        stops=stops,
    )


def _granite(default_system: str = "", stops: tuple[str, ...] = ()) -> ChatTemplate:
    role = "<|start_of_role|>{}<|end_of_role|>"
    return ChatTemplate(
        user=f"{role.format('user')}{CONTENT}<|end_of_text|>\n{role.format('assistant')}",
        assistant=f"{CONTENT}<|end_of_text|>\n",
        system=f"{role.format('system')}{SYSTEM}<|end_of_text|>\n",
        default_system=default_system,
        stops=stops,
    )


def _phi() -> ChatTemplate:
    return ChatTemplate(
        user=f"<|user|>\n{CONTENT}<|end|>\n<|assistant|>\n",
        assistant=f"{CONTENT}<|end|>\n",
        system=f"<|system|>\n{SYSTEM}<|end|>\n",
        stops=("<|end|>",),
        replaces_eos=True,
    )


_HELPFUL: Final = "You are a helpful assistant."
_QWEN: Final = _chatml(replaces_eos=True)
_QWEN_HELPFUL: Final = _chatml(_HELPFUL, replaces_eos=True)
_LLAMA2: Final = ChatTemplate(user=f"{BOS}[INST] {CONTENT} [/INST]", system=f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n")
_MINISTRAL: Final = ChatTemplate(user=f"[INST]{CONTENT}[/INST]", system=f"{SYSTEM}\n\n", prefix=BOS)
_DEEPSEEK3: Final = ChatTemplate(user=f"<｜User｜>{CONTENT}<｜Assistant｜>", prefix=BOS)  # noqa: RUF001

CHAT_TEMPLATES: Final[Mapping[str, ChatTemplate]] = {
    "alpaca": ChatTemplate(
        user=f"### Instruction:\n{CONTENT}\n\n### Response:\n",
        assistant=f"{CONTENT}{EOS}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "bailing": ChatTemplate(
        user=f"<role>HUMAN</role>{CONTENT}<role>ASSISTANT</role>",
        assistant=CONTENT,
        system=f"<role>SYSTEM</role>{SYSTEM}",
        stops=("<|endoftext|>",),
    ),
    "chatml": _chatml(stops=("<|im_end|>", "<|im_start|>"), replaces_eos=True),
    "cohere": ChatTemplate(
        user=f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{CONTENT}<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        system=f"<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{SYSTEM}<|END_OF_TURN_TOKEN|>",
        prefix=BOS,
    ),
    "cpm3": _chatml(prefix=BOS),
    "cpm4": _chatml(prefix=BOS),
    "deepseek": ChatTemplate(user=f"User: {CONTENT}\n\nAssistant:", system=f"{SYSTEM}\n\n", prefix=BOS),
    "deepseek3": _DEEPSEEK3,
    "deepseekr1": _DEEPSEEK3,
    "default": ChatTemplate(
        user=f"Human: {CONTENT}{EOS}\nAssistant:",
        assistant=f"{CONTENT}{EOS}\n",
        system=f"System: {SYSTEM}{EOS}\n",
    ),
    "empty": ChatTemplate(assistant=CONTENT),
    "exaone": ChatTemplate(
        user=f"[|user|]{CONTENT}\n[|assistant|]",
        assistant=f"{CONTENT}{EOS}\n",
        system=f"[|system|]{SYSTEM}[|endofturn|]\n",
    ),
    "falcon": ChatTemplate(user=f"User: {CONTENT}\nFalcon:", assistant=f"{CONTENT}\n"),
    "falcon_h1": _chatml(stops=("<|im_end|>", "<|end_of_text|>"), prefix=BOS),
    "fewshot": ChatTemplate(assistant=f"{CONTENT}\n\n"),
    "gemma": _gemma(),
    "gemma2": _gemma(("<eos>", "<end_of_turn>"), replaces_eos=False),
    "gemma3": _gemma(),
    "gemma3n": _gemma(),
    "glm4": _glm4(),
    "glm4_moe": _glm4(),
    "glm4v": _glm4(("<|user|>", "<|observation|>", "</answer>")),
    "glmz1": _glm4(),
    "gpt_oss": ChatTemplate(
        user=f"<|start|>user<|message|>{CONTENT}<|end|><|start|>assistant",
        assistant=f"{CONTENT}<|end|>",
        system=f"<|start|>system<|message|>{SYSTEM}<|end|>",
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
    ),
    "granite3": _granite(),
    "granite4": _granite(
        "You are Granite, developed by IBM. You are a helpful AI assistant.", stops=("<|end_of_text|>",)
    ),
    "intern_s1": _chatml(prefix=BOS),
    "llama2": _LLAMA2,
    "llama3": _llama3("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "llama4": _llama3("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    "llava_next_qwen": _QWEN_HELPFUL,
    "mimo": _QWEN_HELPFUL,
    "ministral": _MINISTRAL,
    "ministral3": _MINISTRAL,
    "mistral": ChatTemplate(
        user=f"[INST] {CONTENT}[/INST]", assistant=f" {CONTENT}{EOS}", system=f"{SYSTEM}\n\n", prefix=BOS
    ),
    "mistral_small": ChatTemplate(
        user=f"[INST]{CONTENT}[/INST]", system=f"[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT]", prefix=BOS
    ),
    "mllama": _llama3("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "olmo": ChatTemplate(user=f"<|user|>\n{CONTENT}<|assistant|>\n", prefix=EOS),
    "openchat": ChatTemplate(user=f"GPT4 Correct User: {CONTENT}{EOS}GPT4 Correct Assistant:", prefix=BOS),
    "opencoder": _chatml("You are OpenCoder, created by OpenCoder Team."),
    "phi": _phi(),
    "phi_small": _phi(),
    "phi4": ChatTemplate(
        user=f"<|im_start|>user<|im_sep|>{CONTENT}<|im_end|><|im_start|>assistant<|im_sep|>",
        assistant=f"{CONTENT}<|im_end|>",
        system=f"<|im_start|>system<|im_sep|>{SYSTEM}<|im_end|>",
        stops=("<|im_end|>",),
        replaces_eos=True,
    ),
    "pixtral": _MINISTRAL,
    "qwen": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", replaces_eos=True),
    "qwen2_audio": _QWEN_HELPFUL,
    "qwen2_omni": _QWEN_HELPFUL,
    "qwen2_vl": _QWEN_HELPFUL,
    "qwen3": _QWEN,
    "qwen3_nothink": _QWEN,
    "qwen3_omni": _QWEN,
    "qwen3_omni_nothink": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_nothink": _QWEN,
    "smollm": _chatml(),
    "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": ChatTemplate(
        user=f"### User:\n{CONTENT}\n\n### Assistant:\n", assistant=CONTENT, system=f"### System:\n{SYSTEM}\n\n"
    ),
    "starchat": ChatTemplate(
        user=f"<|user|>\n{CONTENT}<|end|>\n<|assistant|>",
        assistant=f"{CONTENT}<|end|>\n",
        system=f"<|system|>\n{SYSTEM}<|end|>\n",
        stops=("<|end|>",),
    ),
    "vicuna": ChatTemplate(
        user=f"USER: {CONTENT} ASSISTANT:",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "yi": _chatml(),
    "zephyr": ChatTemplate(
        user=f"<|user|>\n{CONTENT}{EOS}<|assistant|>\n",
        system=f"<|system|>\n{SYSTEM}{EOS}",
        default_system="You are Zephyr, a helpful assistant.",
    ),
}
