"""Every key that LLaMA-Factory's merge file may have, and what becomes of it here.

Source: LLaMA-Factory's `hparams/` of 2025 and 2026 (ModelArguments, DataArguments, FinetuningArguments,
GeneratingArguments, which `export` parses), and transformers 5.24 `Seq2SeqTrainingArguments`, which it does not, but
which files that were also trained with hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: Keys that decide the merge.
USED: Final = (
    "model_name_or_path",
    "adapter_name_or_path",
    "adapter_folder",
    "model_revision",
    "finetuning_type",
    "stage",
    "template",
    "default_system",
    "infer_dtype",
    "export_dir",
    "export_size",
    "export_device",
    "export_legacy_format",
    "cache_dir",
    "add_tokens",
    "add_special_tokens",
    "new_special_tokens_config",
    "resize_vocab",
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A key that would make another output than rawmerge can, unless it has one of its idle values.

    Attributes:
        idle: values that ask for nothing.
        expected: what it must be.
        hint: the way forward.
    """

    idle: tuple[object, ...]
    expected: str
    hint: str


_QUANTISED: Final = "leave it out: an adapter is merged into the 16-bit base; quantise the merged model afterwards"
_LOADER: Final = "leave it out: LLaMA-Factory could not merge with it either, and rawmerge needs no such loader"
REFUSED: Final = {
    "quantization_bit": Refusal((), "no quantisation while merging", _QUANTISED),
    "export_quantization_bit": Refusal((), "no quantisation while merging", _QUANTISED),
    "quant_config": Refusal((), "no quantisation while merging", _QUANTISED),
    "export_hub_model_id": Refusal(
        (), "no upload: rawmerge never sends anything", "leave it out, and run `hf upload ID export_dir` afterwards"
    ),
    "use_unsloth": Refusal((False,), "false", _LOADER),
    "use_kt": Refusal((False,), "false", _LOADER),
    "train_from_scratch": Refusal((False,), "false", "leave it out: it would merge into random weights"),
    "rope_scaling": Refusal((), "none", "leave it out, and edit rope_scaling in the output's config.json"),
    "mixture_of_depths": Refusal((), "none", "leave it out: it changes the model's structure"),
}


@dataclass(frozen=True, slots=True)
class IdleKeys:
    """Keys that change nothing in a merge by rawmerge.

    Attributes:
        reason: why, at the end of "these keys are ignored: ".
        names: the keys.
    """

    reason: str
    names: frozenset[str]


def _idle(reason: str, names: str) -> IdleKeys:
    return IdleKeys(reason, frozenset(names.split()))


IDLE: Final = (
    _idle(
        "they concern training",
        """
    additional_target apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale apollo_scale_front
    apollo_scale_type apollo_target apollo_update_interval badam_mask_mode badam_mode badam_start_block
    badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose compute_accuracy create_new_adapter
    disable_gradient_checkpointing disable_shuffling dpo_label_smoothing early_stopping_steps enable_liger_kernel
    freeze_extra_modules freeze_language_model freeze_multi_modal_projector freeze_trainable_layers
    freeze_trainable_modules freeze_vision_tower galore_layerwise galore_proj_type galore_rank galore_scale
    galore_target galore_update_interval include_effective_tokens_per_second kto_chosen_weight kto_rejected_weight
    ld_alpha lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding loraplus_lr_ratio module_dropout
    moe_aux_loss_coef oft_block_size oft_rank oft_target pissa_convert pissa_init pissa_iter plot_loss
    ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards pref_bco_weight pref_beta pref_ftx
    pref_loss pure_bf16 ref_model ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
    reward_model_quantization_bit reward_model_type shift_attn simpo_gamma upcast_layernorm upcast_lmhead_output
    use_adam_mini use_apollo use_asft_loss use_badam use_dft_loss use_dora use_eaft_loss use_galore use_llama_pro
    use_mca use_muon use_reentrant_gc use_rslora use_swanlab use_unsloth_gc use_v1_kernels swanlab_api_key
    swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name
    swanlab_workspace fp8 fp8_backend fp8_enable_fsdp_float8_all_gather init_special_tokens print_param_status
    activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon accelerator_config
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval data_seed
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval
    do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches
    eval_on_start eval_steps eval_strategy eval_use_gather_object evaluation_strategy fp16 fp16_full_eval fsdp
    fsdp_config full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better group_by_length hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
    label_smoothing_factor learning_rate length_column_name liger_kernel_config load_best_model_at_end local_rank
    log_level log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter
    logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
    metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir
    overwrite_output_dir parallelism_config per_device_eval_batch_size per_device_train_batch_size
    predict_with_generate prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
    save_safetensors save_steps save_strategy save_total_limit seed skip_memory_metrics sortish_sampler tf32
    torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id
    trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu use_liger_kernel
    warmup_ratio warmup_steps weight_decay kernel_config dist_config optim_config lr_scheduler_config
    micro_batch_size global_batch_size batching_strategy batching_workers enable_activation_checkpointing
    """,
    ),
    _idle(
        "they concern data",
        """
    buffer_size cutoff_len dataset dataset_dir eval_dataset eval_num_beams eval_on_each_dataset
    ignore_pad_token_for_loss interleave_probs mask_history max_samples media_dir mix_strategy neat_packing
    overwrite_cache packing preprocessing_batch_size preprocessing_num_workers streaming tokenized_path
    train_on_prompt val_size train_dataset
    """,
    ),
    _idle(
        "they concern generation",
        """
    do_sample generation_config generation_max_length generation_num_beams length_penalty max_length max_new_tokens
    num_beams repetition_penalty skip_special_tokens temperature top_k top_p infer_backend use_kv_cache vllm_config
    vllm_enforce_eager vllm_gpu_util vllm_max_lora_rank vllm_maxlen sglang_config sglang_lora_backend sglang_maxlen
    sglang_mem_fraction sglang_tp_size kt_force_think kt_maxlen kt_mode kt_optimize_rule kt_use_cuda_graph cpu_infer
    chunk_size mode sample_backend
    """,
    ),
    _idle(
        "no model is loaded, and no code of it is run: Python files are copied as they are",
        """
    flash_attn init_config low_cpu_mem_usage model_class offload_folder split_special_tokens trust_remote_code
    use_fast_tokenizer
    """,
    ),
    _idle(
        "nothing is quantised",
        """
    double_quantization quantization_device_map quantization_method quantization_type export_quantization_dataset
    export_quantization_maxlen export_quantization_nsamples
    """,
    ),
    _idle(
        "the base's processor files are copied as they are",
        """
    audio_sampling_rate crop_to_patches image_do_pan_and_scan image_max_pixels image_min_pixels use_audio_in_video
    video_fps video_max_pixels video_maxlen video_min_pixels
    """,
    ),
    _idle(
        "the tokenizer's chat template is taken as it is",
        "enable_thinking preserve_thinking tool_format",
    ),
    _idle(
        "tokens are read from HF_TOKEN or the login of `hf auth login`, and other hubs are not asked",
        "hf_hub_token ms_hub_token om_hub_token",
    ),
)
#: Every key that is known.
KNOWN: Final = frozenset({*USED, *REFUSED, *(name for group in IDLE for name in group.names)})


def idle_notes(names: Iterable[str]) -> list[str]:
    """Return a sentence for each group of keys that change nothing, of those that are set."""
    given = set(names)
    found = ((group.reason, sorted(group.names & given)) for group in IDLE)
    return [f"{', '.join(keys)}: ignored, for {_of(reason, len(keys))}" for reason, keys in found if keys]


def _of(reason: str, count: int) -> str:
    return reason.replace("they concern", "it concerns") if count == 1 else reason


def nearest(name: str, known: Iterable[str] = KNOWN) -> str:
    """Return the known name that looks most like this one, an empty text where none does."""
    return next(iter(difflib.get_close_matches(name, sorted(known), 1)), "")
