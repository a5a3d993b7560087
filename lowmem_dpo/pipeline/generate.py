"""`generate`: prompts through the base and an adapter, side by side."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from lowmem_dpo.console import console, say, warn
from lowmem_dpo.data.prompts import read_prompts
from lowmem_dpo.linears.lora import adapters_disabled
from lowmem_dpo.model.generation import check_prompts, generate_text, position_warning
from lowmem_dpo.settings.configs import GenerateConfig
from lowmem_dpo.tokens.encoding import render_prompts
from lowmem_dpo.tokens.rendering import build_renderer
from lowmem_dpo.training.policy import load_policy, read_source
from lowmem_dpo.weights.size import ModelSize


def generate(config: GenerateConfig) -> None:
    """Print answers to one prompt, or to a file of them.

    Raises:
        ValueError: If no model or no prompt is given, or the file cannot be read.
    """
    if config.prompt is None and config.prompts is None:
        raise ValueError("no prompt given; set --prompt TEXT or --prompts FILE")
    prompts = read_prompts(config.prompts) if config.prompts else [str(config.prompt)]
    if (model := config.model or config.adapter) is None:
        raise ValueError(
            "no model given; set --model to a folder or a Hugging Face id, or --adapter"
        )
    config = replace(config, model=model)
    source = read_source(config, init_adapter=config.adapter, adapter_setting="adapter")
    rendered = render_prompts(source.tokenizer, prompts, config)
    if build_renderer(source.tokenizer, config, prompts).is_rendered:
        say("the prompts are already rendered and get no chat template; rendered no gives them one")
    check_prompts(rendered, source.config, config)
    if line := position_warning(rendered, source.config, config):
        warn(line)
    if config.compare and source.init_adapter is None:
        say("no adapter given, so there is nothing to compare: the base answers alone")
    size = ModelSize.of(source.config)
    if source.device.type == "cpu" and size.is_large_for_a_cpu:
        say(f"{size.total / 1e9:.1f}B parameters on a CPU: an answer takes minutes")

    policy = load_policy(config, source=source)
    network = policy.model.network
    answers: dict[str, Callable[[], AbstractContextManager[None]]]
    answers = {"adapter" if policy.init_adapter else "base": nullcontext}
    if policy.init_adapter and config.compare:
        answers = {"base": lambda: adapters_disabled(network), **answers}
    for prompt, ids in zip(prompts, rendered, strict=True):
        say(f"\nprompt: {prompt}")
        for title, adapter_or_not in answers.items():
            console.print(f"[bold]{title}:[/bold]")
            with adapter_or_not():
                generate_text(policy.model, policy.tokenizer, [ids], config, stream=True)
