"""The Python interface to what the verbs do: `Trainer(config).fit("pairs.jsonl")`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lowmem_dpo.console import warn
from lowmem_dpo.model.generation import generate_text, position_warning
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.groups import SamplingSettings
from lowmem_dpo.tokens.encoding import render_prompt
from lowmem_dpo.training.fit import StepCallback, TrainResult, fit, precompute
from lowmem_dpo.training.policy import Policy, load_policy
from lowmem_dpo.weights.folders import ADAPTER_CONFIG_FILE


class Trainer:
    """Direct Preference Optimization of one model under one config.

    Args:
        config: The settings; `data` may be left to `fit`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.callbacks: list[StepCallback] = []
        self.policy: Policy | None = None

    def add_step_callback(self, function: StepCallback) -> StepCallback:
        """Call `function` after every step with its `step` and `metrics`; usable as a decorator."""
        self.callbacks.append(function)
        return function

    def precompute(self, data: str | Path | None = None) -> int:
        """Bring the reference cache up to date and stop.

        Returns:
            How many pairs were scored.

        Raises:
            OSError: If the cache could not take them all.
        """
        return precompute(self._with_data(data))

    def fit(
        self, prompts: str | Path | None = None, *, data_format: str = "preferences"
    ) -> TrainResult:
        """Train on preference pairs.

        Args:
            prompts: The file of pairs; by default the config's `data`.
            data_format: What the file holds; "preferences" (prompt, chosen, rejected).

        Raises:
            ValueError: If a setting or the data is wrong; nothing has been overwritten then.
            RunStopped: If a check failed on the way.
        """
        if data_format != "preferences":
            raise ValueError(f"data_format must be preferences, got {data_format!r}")
        result = fit(self._with_data(prompts), self.callbacks)
        self.policy = result.policy
        return result

    def load_checkpoint(self, directory: str | Path) -> "Trainer":
        """Load the base and an adapter (best/, adapter/ or a checkpoint), for `generate`.

        Args:
            directory: A PEFT adapter folder. Without `model` in the config, its base is taken.

        Returns:
            The trainer itself.
        """
        # An adapter names its base; so does the adapter that the config's model may be.
        model = self.config.model or str(directory)
        if (Path(model) / ADAPTER_CONFIG_FILE).is_file():
            model = str(directory)
        settings = replace(self.config, model=model)
        self.policy = load_policy(settings, memory=settings, init_adapter=str(directory))
        return self

    def generate(self, prompt: str, **sampling: Any) -> str:
        """The policy's answer to one prompt.

        Args:
            prompt: Plain text; wrapped as a user turn where there is a chat template.
            **sampling: Of max_new_tokens, temperature, top_p, top_k and seed.

        Raises:
            ValueError: If neither `fit` nor `load_checkpoint` came before, or a setting is wrong.
        """
        if self.policy is None:
            raise ValueError("nothing to generate with yet; call fit or load_checkpoint first")
        known = [f.name for f in fields(SamplingSettings)]
        if unknown := sampling.keys() - known:
            raise ValueError(f"generate has no setting {min(unknown)}; known: {', '.join(known)}")
        settings = SamplingSettings(**sampling)
        ids = render_prompt(self.policy.tokenizer, prompt, self.config)
        if line := position_warning([ids], self.policy.model.config, settings):
            warn(line)
        return generate_text(self.policy.model, self.policy.tokenizer, [ids], settings)[0]

    def _with_data(self, data: str | Path | None) -> TrainConfig:
        return self.config if data is None else replace(self.config, data=str(data))
