"""Settings files as users of other trainers have them, after those' public documentation."""

# Alignment-handbook's QLoRA recipe: half precision to load, bf16 to compute, a mixer of one set.
HANDBOOK = """
model_name_or_path: org/sft-qlora
torch_dtype: float16
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
dataset_mixer: {org/preferences: 1.0}
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_model_id: my-dpo
learning_rate: 5.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: paged_adamw_32bit
output_dir: data/my-dpo
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
save_strategy: steps
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""
# TRL: `trl dpo --config`; warmup_steps below 1 is a share, as transformers 5 has it.
TRL = """
model_name_or_path: org/model
dtype: float32
bf16: true
dataset_name: org/preferences
dataset_train_split: train
dataset_test_split: test
eval_strategy: steps
eval_steps: 50
do_eval: true
learning_rate: 5.0e-7
max_steps: 1000
num_train_epochs: 3
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
warmup_steps: 0.1
save_steps: 200
ddp_timeout: 1800
overwrite_output_dir: true
trust_remote_code: false
dataset_num_proc: 4
output_dir: out
report_to: none
"""
LLAMA_FACTORY = """
model_name_or_path: org/model
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: data/preferences.json
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
AXOLOTL = """
base_model: org/model
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
rl: dpo
rl_beta: 0.2
chat_template: tokenizer_default
datasets:
  - {path: pairs.jsonl, ds_type: json, split: train, type: chat_template.default}
dataset_prepared_path: prepared
val_set_size: 0.05
output_dir: ./outputs
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: false
lora_r: 64
lora_alpha: 32
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project:
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.000005
train_on_inputs: false
bf16: auto
fp16:
tf32: false
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 1
saves_per_epoch: 1
debug:
deepspeed:
fsdp:
special_tokens: {pad_token: <|end_of_text|>}
"""
# Unsloth's notebook: two seeds, and a length for the model beside one for the trainer.
UNSLOTH = """
model_name: org/model-bnb-4bit
max_seq_length: 4096
dtype: null
load_in_4bit: true
r: 64
target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
lora_alpha: 64
lora_dropout: 0
bias: none
use_gradient_checkpointing: unsloth
random_state: 3407
use_rslora: false
loftq_config: null
ref_model: null
data_files: pairs.jsonl
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
warmup_ratio: 0.1
num_train_epochs: 3
learning_rate: 5.0e-6
fp16: false
bf16: true
logging_steps: 1
optim: adamw_8bit
weight_decay: 0.0
lr_scheduler_type: linear
seed: 42
output_dir: outputs
report_to: none
beta: 0.1
max_length: 1024
max_prompt_length: 512
"""
SWIFT = """
rlhf_type: dpo
model: org/model
train_type: lora
dataset: [org/preferences#500]
split_dataset_ratio: 0.01
torch_dtype: bfloat16
num_train_epochs: 1
per_device_train_batch_size: 1
per_device_eval_batch_size: 1
learning_rate: 1e-4
lora_rank: 8
target_modules: all-linear
gradient_accumulation_steps: 16
eval_steps: 50
save_steps: 50
save_total_limit: 2
logging_steps: 5
max_length: 2048
output_dir: output
warmup_ratio: 0.05
dataset_num_proc: 4
attn_impl: flash_attn
rpo_alpha: 0.1
"""
RECIPES = {
    "handbook": HANDBOOK,
    "trl": TRL,
    "llama_factory": LLAMA_FACTORY,
    "axolotl": AXOLOTL,
    "unsloth": UNSLOTH,
    "swift": SWIFT,
}
MEANT = {
    "handbook": {"model": "org/sft-qlora", "data": "org/preferences", "optim": "adamw"}
    | {"dataset_train_split": "train_prefs", "dataset_test_split": "test_prefs"}
    | {"eval_data": "org/preferences", "dtype": "bfloat16", "quantization": "nf4"}
    | {"truncate_prompt": True, "batch_size": 16, "save_steps": 100, "keep_checkpoints": 1},
    "trl": {"data": "org/preferences", "eval_data": "org/preferences", "dtype": "bfloat16"}
    | {"dataset_test_split": "test", "warmup_ratio": 0.1, "warmup_steps": None, "max_steps": 1000}
    | {"save_strategy": "steps", "save_steps": 200, "batch_size": 16, "eval_steps": 50},
    "llama_factory": {"lora_r": 8, "lora_alpha": 16.0, "data": "data/preferences.json"}
    | {"max_samples": 1000, "save_strategy": "steps", "save_steps": 500, "max_length": 2048}
    | {"chat_template": "auto", "lora_target_modules": "all", "beta": 0.1, "batch_size": 8},
    "axolotl": {"data": "pairs.jsonl", "dataset_train_split": None, "eval_fraction": 0.05}
    | {"lora_r": 64, "lora_alpha": 32.0, "quantization": "nf4", "optim": "adamw_8bit"}
    | {"warmup_steps": 10, "batch_size": 8, "beta": 0.2, "dtype": "auto", "max_length": 2048}
    | {"save_strategy": "epoch", "eval_steps": None, "chat_template": "auto"},
    "unsloth": {"seed": 42, "max_length": 1024, "truncate_prompt": True, "dtype": "bfloat16"}
    | {"lora_r": 64, "lora_alpha": 64.0, "optim": "adamw_8bit", "lr_scheduler_type": "linear"},
    "swift": {"data": "org/preferences", "max_samples": 500, "lora_alpha": 32.0, "lora_r": 8}
    | {"eval_fraction": 0.01, "eval_steps": 50, "dtype": "bfloat16", "learning_rate": 1e-4}
    | {"rpo_alpha": 0.1, "lora_target_modules": "all", "save_strategy": "steps"},
}
