"""Names of other trainers' settings that need no function: another name, no effect, or one value.

A name stands in one table: `RENAMED`, `NO_EFFECT` (accepted and said), `FIXED` (accepted with the
values that hold here anyway), or `CONVERTED` of `conversions`. They come from TRL's
DPOConfig, ModelConfig and ScriptArguments, PEFT's LoraConfig, Unsloth's notebooks,
alignment-handbook, LLaMA-Factory, axolotl and ms-swift.
"""

from typing import Any

_RENAMED = {
    "model": "model_name_or_path model_name model_path base_model",
    "data": "dataset_path train_file",
    "eval_data": "validation_file val_dataset",
    "init_adapter": "adapter_name_or_path adapters lora_model_dir",
    "lora_r": "r",
    "lora_target_modules": "target_modules lora_target",
    "use_rslora": "peft_use_rslora",
    "seed": "random_state",
    "dtype": "torch_dtype bnb_4bit_compute_dtype",
    "max_length": "max_seq_length cutoff_len sequence_len",
    "system_prompt": "system default_system",
    "eval_fraction": "val_size val_set_size split_dataset_ratio",
    "max_steps": "num_steps",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "lr_scheduler_type": "lr_scheduler",
    "keep_checkpoints": "save_total_limit",
    "beta": "pref_beta rl_beta dpo_beta",
    "loss_type": "pref_loss dpo_loss_type",
    "loss_weights": "dpo_loss_weights",
    "rpo_alpha": "pref_ftx cpo_alpha",
    "label_smoothing": "dpo_label_smoothing",
}
RENAMED = {theirs: ours for ours, names in _RENAMED.items() for theirs in names.split()}

_NO_EFFECT = {
    "layers run again in the backward pass as keep_activations says": """
        gradient_checkpointing use_gradient_checkpointing gradient_checkpointing_kwargs
        activation_checkpointing activation_checkpointing_kwargs
    """,
    "layers' inputs wait where layer_inputs says": "activation_offloading",
    "how a step is split is the plan's business": """
        per_device_eval_batch_size eval_batch_size precompute_ref_batch_size auto_find_batch_size
        eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
        torch_empty_cache_steps
    """,
    "pairs are always packed as trees": """
        padding_free dpo_padding_free group_by_length train_sampling_strategy length_column_name
        sample_packing eval_sample_packing pad_to_sequence_len pad_to_multiple_of pad_token
        padding_value label_pad_token_id neat_packing
    """,
    "the reference is always computed once and cached": "precompute_ref_log_probs",
    "the reference stays what it was at the start": "ref_model_mixup_alpha ref_model_sync_steps",
    "the logits are never formed here": """
        use_liger_kernel use_liger_loss enable_liger_kernel liger_kernel_config use_logits_to_keep
        dpo_use_logits_to_keep
    """,
    "trees have an attention of their own": """
        attn_implementation attn_impl flash_attn flash_attention use_flash_attention_2
        xformers_attention sdp_attention eager_attention
    """,
    "the kernels are this program's own": """
        plugins liger_rms_norm liger_rope liger_glu_activation lora_mlp_kernel lora_qkv_kernel
        lora_o_kernel lora_on_cpu
    """,
    "pairs are read by one process": """
        dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order preprocessing_batch_size
        accelerator_config
    """,
    "one process uses one GPU": """
        local_rank ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
        ddp_find_unused_parameters average_tokens_across_devices log_on_each_node save_on_each_node
        ignore_bias_buffers
    """,
    "the cache notices by itself what changed": """
        overwrite_cache load_from_cache_file dataset_prepared_path
    """,
    "columns that are not read are named": """
        remove_unused_columns no_remove_unused_columns label_names
    """,
    "the first step is always checked and recorded": "logging_first_step",
    "plots are always drawn": "plot_loss",
    "best/ holds the best, adapter/ the last": "load_best_model_at_end",
    "there is an evaluation where eval_data or eval_fraction is set": "do_eval",
    "a run says and records the same always; report_to adds trackers": """
        log_level log_level_replica logging_dir logging_nan_inf_filter disable_tqdm run_name project
        include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics debug
        trackio_space_id trackio_bucket_id trackio_static_space_id eval_table_size
        eval_table_max_new_tokens eval_max_new_tokens compute_accuracy prediction_loss_only
        use_wandb wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model
        use_swanlab swanlab_project swanlab_run_name
    """,
    "a run's folder is never overwritten; resume auto goes on in it": "overwrite_output_dir",
    "a checkpoint always holds all that resuming needs": """
        save_only_model save_safetensors add_version create_checkpoint_symlink
        enable_jit_checkpoint restore_callback_states_from_checkpoint ignore_data_skip
    """,
    "nothing is sent anywhere": """
        hub_model_id hub_strategy hub_private_repo hub_token hub_always_push hub_revision
        hub_model_revision use_hf hf_use_auth_token
    """,
    "code that comes with a model is never run": "trust_remote_code",
    "how weights are read and products computed follows from dtype and quantization": """
        low_cpu_mem_usage device_map use_cache qalora_group_size runtime_config
        auto_mapping inference_mode bnb_4bit_quant_storage use_bnb_nested_quant
        lora_dtype quant_method quantization_method bf16_full_eval fp16_full_eval tf32 strict
        torch_compile torch_compile_backend torch_compile_mode use_fast_tokenizer
    """,
    "the model's folder says what it is": "model_type tokenizer_type",
    "one seed decides all that is drawn": "data_seed full_determinism",
    "answers are scored, all of them and nothing else": """
        train_on_inputs train_on_prompt mask_history
    """,
}
NO_EFFECT = {name: why for why, names in _NO_EFFECT.items() for name in names.split()}

_OFF = (False, None)
_NONE: tuple[Any, ...] = (None, [], {}, "")
_LORA = ("lora", "LORA")
_REFERENCE = "the reference is the policy at the start of the run"
_FIXED: list[tuple[str, tuple[Any, ...], str]] = [
    # What is trained.
    ("bias", ("none", None), "only bias none is supported"),
    ("lora_bias", ("none", *_OFF), "only bias none is supported"),
    ("task_type lora_task_type", ("CAUSAL_LM", None), "only causal language models are supported"),
    ("peft_type", (*_LORA, None), "only LoRA is supported"),
    ("finetuning_type train_type tuner_type sft_type", _LORA, "only LoRA is supported"),
    ("use_peft", (True,), "full fine-tuning is not supported, an adapter is trained"),
    ("full_finetuning", _OFF, "full fine-tuning is not supported"),
    (
        "modules_to_save lora_modules_to_save additional_target trainable_token_indices "
        "unfrozen_parameters",
        _NONE,
        "only LoRA matrices are trained",
    ),
    ("lora_target_parameters target_parameters", _NONE, "only linear layers get an adapter"),
    ("lora_target_linear", (True,), "set lora_target_modules; by default it is every linear layer"),
    ("lora_fan_in_fan_out fan_in_fan_out", _OFF, "the linear layers are not transposed"),
    ("use_dora peft_use_dora", _OFF, "DoRA is not supported"),
    ("init_lora_weights init_weights", (True, None, "true"), "A is drawn uniformly, B is zero"),
    ("loftq_config", _NONE, "LoftQ is not supported"),
    (
        "pissa_init use_qalora use_bdlora use_llama_pro create_new_adapter",
        _OFF,
        "only plain LoRA is trained",
    ),
    (
        "loraplus_lr_ratio lorap_lr_ratio eva_config corda_config lora_ga_config velora_config "
        "arrow_config kasa_config monteclora_config megatron_config layer_replication "
        "alora_invocation_tokens rank_pattern alpha_pattern",
        _NONE,
        "only plain LoRA is trained",
    ),
    (
        "layers_to_transform peft_layers_to_transform layers_pattern exclude_modules",
        _NONE,
        "the layers with an adapter are those of lora_target_modules; name parts of their paths",
    ),
    # The loss and its reference.
    ("stage", ("dpo",), "this is a DPO trainer"),
    ("rlhf_type", ("dpo",), "this is a DPO trainer; another loss is set by loss_type"),
    ("use_weighting dpo_use_weighting", _OFF, "WPO's weights are not supported"),
    ("dpo_norm_loss", _OFF, "set loss_type sigmoid_norm"),
    ("pref_bco_weight", (0, None), "set loss_type [sigmoid, bco_pair] and loss_weights"),
    ("kl_coef", (), "beta is the weight of the KL term; set beta"),
    ("label_smoothing_factor", (0, None), "that is for other losses; set label_smoothing"),
    ("router_aux_loss_coef", (None, 0), "mixtures of experts are not supported"),
    ("neftune_noise_alpha", (None, 0), "noise on the embeddings is not supported"),
    ("disable_dropout", (True, None), "the base's own dropout is always off; set lora_dropout"),
    ("ref_model ref_adapters ref_model_adapters ref_adapter_name", _NONE, _REFERENCE),
    ("reference_model ref_model_path reference_model_path", _NONE, _REFERENCE),
    ("ref_model_quantization_bit", _NONE, _REFERENCE),
    ("force_use_ref_model rl_adapter_ref_model", _OFF, _REFERENCE),
    ("model_adapter_name", _NONE, "a run trains one adapter"),
    ("sync_ref_model", _OFF, "the reference stays what it was at the start"),
    # The model.
    ("load_in_8bit", _OFF, "the base is stored in 4 bits or 16; set quantization"),
    ("bnb_4bit_quant_type quantization_type", ("nf4", None), "4-bit storage is nf4"),
    (
        "bnb_4bit_use_double_quant double_quantization",
        (True, None),
        "nf4 is always doubly quantised here",
    ),
    (
        "quantization_bit quant_bits",
        (4, None),
        "4-bit storage is nf4; set quantization none for 16",
    ),
    (
        "model_revision revision",
        ("main", None),
        "the newest is read; give a folder of another",
    ),
    ("model_init_kwargs", _NONE, "set dtype and quantization"),
    ("pure_bf16", _OFF, "the adapter is trained in float32; set dtype"),
    ("tokenizer tokenizer_name tokenizer_path", _NONE, "the tokenizer is in the model's folder"),
    ("resize_vocab", _OFF, "the embedding stays as it is"),
    ("rope_scaling", _NONE, "positions are those of the model's config.json"),
    ("is_encoder_decoder freeze_vit", _OFF, "only language models are supported"),
    ("use_unsloth", _OFF, "the kernels are this program's own"),
    # The machine.
    ("deepspeed fsdp fsdp_config parallelism_config", _NONE, "one process uses one GPU"),
    ("use_cpu", _OFF, "set device cpu"),
    # The data.
    ("streaming dataset_streaming", _OFF, "the pairs are read as a whole"),
    ("dataloader_drop_last", _OFF, "no pair is left out"),
    ("truncation_mode", ("keep_start", None), "completions are cut at their end"),
    ("truncation_strategy", ("right", None), "completions are cut at their end"),
    (
        "excess_length_strategy sequence_len_overflow_handling",
        ("truncate", None),
        "completions are cut at their end",
    ),
    ("max_completion_length max_target_length", _NONE, "completions are cut at max_length"),
    # The run.
    ("do_train", (True,), "train trains"),
    (
        "do_predict predict_with_generate generate_during_eval",
        _OFF,
        "use generate with the finished adapter",
    ),
    ("optim_args optim_target_modules", _NONE, "the optimizers are those of optim"),
    ("use_galore use_badam use_apollo use_adam_mini use_muon", _OFF, "set optim"),
    (
        "lr_scheduler_kwargs cosine_min_lr_ratio",
        _NONE,
        "the schedules have no settings of their own",
    ),
    ("logging_strategy", ("steps", None), "metrics are written by steps; set logging_steps"),
    ("eval_on_start", _OFF, "the first evaluation is after eval_steps or an epoch"),
    ("eval_delay", (0, None), "the first evaluation is after eval_steps or an epoch"),
    ("include_for_metrics", _NONE, "the metrics are those of docs/guide.md"),
    ("batch_eval_metrics", _OFF, "the metrics are those of docs/guide.md"),
    ("metric_for_best_model", ("eval_loss", "loss", None), "best/ is chosen by eval_loss"),
    ("greater_is_better", _OFF, "best/ is chosen by the lowest eval_loss"),
    ("push_to_hub", _OFF, "nothing is sent anywhere; leave it out, and upload adapter/ in the end"),
]
# Value(s) that say what happens here anyway; every other value is refused, with the reason.
FIXED = {name: (values, why) for names, values, why in _FIXED for name in names.split()}
