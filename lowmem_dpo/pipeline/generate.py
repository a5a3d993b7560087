"""`generate`: prompts through the base and an adapter, side by side."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from lowmem_dpo.console import console, say, say_if_slow, size, speed, warn
from lowmem_dpo.data.prompts import read_prompts
from lowmem_dpo.linears.lora import adapters_disabled
from lowmem_dpo.machine.card_here import card_of, free_bytes
from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.model.generation import check_prompts, generate_text, position_warning
from lowmem_dpo.settings.configs import GenerateConfig
from lowmem_dpo.settings.groups import AdapterSettings
from lowmem_dpo.steps.rehearsed_generation import GenerationPlan, choose_generation_levers
from lowmem_dpo.tokens.encoding import render_prompts
from lowmem_dpo.tokens.rendering import build_renderer
from lowmem_dpo.training.memory_plan import warn_not_rehearsed
from lowmem_dpo.training.policy import (
    Policy,
    Source,
    adapter_spec,
    load_policy,
    read_source,
    stored_config,
)
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
    source = read_source(config, config, init_adapter=config.adapter, adapter_setting="adapter")
    rendered = render_prompts(source.tokenizer, prompts, config)
    if build_renderer(source.tokenizer, config, prompts).is_rendered:
        say("the prompts are already rendered and get no chat template; rendered no gives them one")
    check_prompts(rendered, source.config, config)
    if line := position_warning(rendered, source.config, config):
        warn(line)
    if config.compare and source.init_adapter is None:
        say("no adapter given, so there is nothing to compare: the base answers alone")
    model_size = ModelSize.of(source.config)
    if source.device.type == "cpu" and model_size.is_large_for_a_cpu:
        say(f"{model_size.total / 1e9:.1f}B parameters on a CPU: an answer takes minutes")

    plan = None
    if source.device.type == "cuda":
        card, free = card_of(source.device), free_bytes(source.device)
        try:
            plan = plan_answers(config, source, card, free, max(map(len, rendered)))
        except ValueError:
            raise
        except Exception as error:  # as in training
            warn_not_rehearsed("the answer", error)
    policy = load_policy(config, memory=config, levers=plan.levers if plan else None, source=source)
    if plan:
        torch.cuda.empty_cache()  # what loading took
        torch.cuda.reset_peak_memory_stats(source.device)
    for prompt, ids in zip(prompts, rendered, strict=True):
        say(f"\nprompt: {prompt}")
        _answer(policy, ids, config)
    if plan:
        planned = plan.reserved_bytes
        measured = torch.cuda.max_memory_reserved(source.device)
        say(f"\nmemory of the card at the peak: {size(planned)} planned, {size(measured)} measured")


def plan_answers(
    config: GenerateConfig, source: Source, card: Card, free: int, prompt_tokens: int
) -> GenerationPlan:
    """Decide what stays where, and say it in a line.

    Args:
        config: Settings.
        source: The model.
        card: Where it answers.
        free: What torch may reserve of it, in bytes.
        prompt_tokens: Of the longest prompt.

    Raises:
        ValueError: If nothing fits.
    """
    model, start = stored_config(source.base, source.config), source.init_adapter
    adapter = adapter_spec(AdapterSettings(), start, warns=False) if start else None
    with say_if_slow("planning what stays on the card"):
        plan = choose_generation_levers(
            model, card, free, config, config, adapter, config, prompt_tokens=prompt_tokens
        )
    levers = plan.levers
    on_host = [("embedding", levers.embedding_on_host), ("head", levers.head_on_host)]
    parts = [name for name, is_there in on_host if is_there]
    if levers.num_slots is not None:
        parts.append(
            f"the layers, {levers.num_slots} of {model.num_hidden_layers} at a time on the card"
        )
    slow, fast = (speed(1 / seconds) for seconds in reversed(plan.token.seconds))
    say(
        f"plan: {size(plan.reserved_bytes)} of {card.name} at the peak, in host "
        f"memory: {', '.join(parts) or 'nothing'}; {slow} to {fast} tokens a second"
    )
    return plan


def _answer(policy: Policy, ids: list[int], config: GenerateConfig) -> None:
    """Print the answers to one prompt."""
    network = policy.model.network
    answers: dict[str, Callable[[], AbstractContextManager[None]]]
    answers = {"adapter" if policy.init_adapter else "base": nullcontext}
    if policy.init_adapter and config.compare:
        answers = {"base": lambda: adapters_disabled(network), **answers}
    for title, adapter_or_not in answers.items():
        console.print(f"[bold]{title}:[/bold]")
        with adapter_or_not():
            generate_text(policy.model, policy.tokenizer, [ids], config, stream=True)
    if policy.model.device.type == "cuda":
        torch.cuda.empty_cache()  # a prompt of another length would not fit into what is left
