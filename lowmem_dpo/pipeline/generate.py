"""`generate`: prompts through the base and an adapter, side by side."""

from contextlib import nullcontext
from pathlib import Path

from lowmem_dpo.console import console, say, warn
from lowmem_dpo.data.encoding import render_prompt
from lowmem_dpo.data.reading import is_single_file
from lowmem_dpo.data.rows import Row, read_rows, read_text_lines
from lowmem_dpo.model.generation import check_prompts, generate_text, position_warning
from lowmem_dpo.model.lora import adapters_disabled
from lowmem_dpo.settings.configs import GenerateConfig, TrainConfig
from lowmem_dpo.training.policy import Policy, load_policy, read_source
from lowmem_dpo.weights.size import ModelSize


def generate(config: GenerateConfig) -> None:
    """Print answers to one prompt, or to a file of them.

    Raises:
        ValueError: If no model or no prompt is given, or the file cannot be read.
    """
    prompts = [config.prompt] if config.prompt is not None else read_prompts(config.prompts)
    model = config.model or config.adapter
    if model is None:
        raise ValueError(
            "no model given; set --model to a folder or a Hugging Face id, or --adapter"
        )
    settings = TrainConfig(
        model=model,
        init_adapter=config.adapter,
        max_length=1,  # lengths are checked below, against the prompts
        quantization=config.quantization,
        head_quantization=config.head_quantization,
        quantized_copy=config.quantized_copy,
        dtype=config.dtype,
        device=config.device,
        cache_dir=config.cache_dir,
        seed=config.seed,
    )
    source = read_source(settings, adapter_setting="adapter")
    template = config
    rendered = [render_prompt(source.tokenizer, prompt, template) for prompt in prompts]
    check_prompts(rendered, source.model_config, config)
    if line := position_warning(rendered, source.model_config, config):
        warn(line)
    if config.compare and source.init_adapter is None:
        say("no adapter given, so there is nothing to compare: the base answers alone")
    size = ModelSize.of(source.model_config)
    if source.device.type == "cpu" and size.is_large_for_a_cpu:
        say(f"{size.total / 1e9:.1f}B parameters on a CPU: an answer takes minutes")
    policy = load_policy(settings, source)
    for prompt, ids in zip(prompts, rendered, strict=True):
        say(f"\nprompt: {prompt}")
        if policy.init_adapter and config.compare:
            _answer(policy, config, ids, "base", adapter=False)
        _answer(policy, config, ids, "adapter" if policy.init_adapter else "base", adapter=True)


def _answer(
    policy: Policy, config: GenerateConfig, ids: list[int], title: str, *, adapter: bool
) -> None:
    """Stream one answer under its title."""
    console.print(f"[bold]{title}:[/bold]")
    model = policy.model.network
    with nullcontext() if adapter else adapters_disabled(model):
        generate_text(policy.model, policy.tokenizer, [ids], config, stream=True)


def read_prompts(path: str | None) -> list[str]:
    """Prompts from a file: `prompt` of each row, or one a line in files that hold no rows.

    Raises:
        ValueError: If there is no file, or it holds no prompts.
    """
    if path is None:
        raise ValueError("no prompt given; set --prompt TEXT or --prompts FILE")
    if is_single_file(path):
        prompts = [_prompt_of(row) for row in read_rows(Path(path))]
    else:
        try:
            prompts = [_text_of(row) for row in read_text_lines(Path(path))]
        except OSError as error:
            raise ValueError(
                f"cannot read the prompts in {path}: {error.strerror}; give a file of prompts"
            ) from None
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def _text_of(row: Row) -> str:
    if row.fault:
        raise ValueError(f"{row.place}: {row.fault}")
    return row.value


def _prompt_of(row: Row) -> str:
    prompt = row.value.get("prompt") if isinstance(row.value, dict) else None
    if row.fault or not isinstance(prompt, str) or not prompt.strip():
        fault = row.fault or "every row must be an object with text in `prompt`"
        raise ValueError(f"{row.place}: {fault}")
    return prompt
