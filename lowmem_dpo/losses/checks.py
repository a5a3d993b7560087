"""The checks of the loss settings, from the records of `types`.

A loss, a bound or a combination without meaning is refused; a value outside published use is said.
"""

import difflib
from typing import Any

from lowmem_dpo.checks import check, check_unused, split_list
from lowmem_dpo.losses.types import (
    LOSS_TYPES,
    loss_names,
    span,
)

# What other trainers and papers call them.
_ALSO_KNOWN_AS = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid with label_smoothing",
    "rpo": "sigmoid with rpo_alpha",
    "mpo": "[sigmoid, bco_pair, sft] with loss_weights [0.8, 0.2, 1.0]",
    "ld_dpo": "sigmoid with ld_alpha",
    "rso": "hinge",
    "nll": "sft",
}


def check_loss_settings(config: Any) -> None:
    """Bring loss_type and loss_weights into shape and check all settings of the losses.

    Raises:
        ValueError: For an unknown loss, a value out of bounds, a setting that no chosen loss reads,
            or losses that have no meaning together.
    """
    _read_names(config)
    _check_weights(config)
    check(config, "beta", config.beta > 0, "must be > 0")
    check(config, "label_smoothing", 0 <= config.label_smoothing < 0.5, "must be in [0, 0.5)")
    check(config, "discopop_tau", config.discopop_tau > 0, "must be > 0")
    for name in ("simpo_gamma", "rpo_alpha"):
        check(config, name, getattr(config, name) >= 0, "must be >= 0")
    ld_alpha = config.ld_alpha
    check(config, "ld_alpha", ld_alpha is None or 0 <= ld_alpha <= 1, "must be in [0, 1]")
    order = config.f_alpha_divergence_coef
    rule = "must be in [0, 2] and not 1, which is f_divergence_type reverse_kl"
    check(config, "f_alpha_divergence_coef", 0 <= order <= 2 and order != 1, rule)
    _check_read(config)
    _check_combinations(config)


def unusual_values(config: Any, learning_rate: float) -> list[str]:
    """A line for beta and one for the learning rate where they are not what is usual."""
    names = loss_names(config)
    lines = []
    for name in names:
        usual = LOSS_TYPES[name].usual_beta
        if usual and not usual[0] <= config.beta <= usual[1]:
            lines.append(f"beta {config.beta:g} is outside {span(usual)}, usual for {name}")
            break
    rates = [LOSS_TYPES[n].usual_learning_rate for n in names if n != "sft" or len(names) == 1]
    usual = min(low for low, _ in rates), max(high for _, high in rates)
    if not usual[0] <= learning_rate <= usual[1]:
        lines.append(
            f"learning_rate {learning_rate:g} is outside {span(usual)}, usual for "
            f"{' and '.join(names)} with LoRA on models of billions of parameters"
        )
    if "robust" in names and not config.label_smoothing:
        lines.append("loss_type robust with label_smoothing 0 is sigmoid; set label_smoothing")
    return lines


def _read_names(config: Any) -> None:
    """Turn "sigmoid,sft" into a list, a list of one into its name; refuse unknown names."""
    value = config.loss_type
    value = split_list(value) if isinstance(value, str) else value
    if not value:
        raise ValueError("loss_type is empty; name a loss, usually sigmoid")
    for name in value:
        if not isinstance(name, str) or name not in LOSS_TYPES:
            known = ", ".join(LOSS_TYPES)
            raise ValueError(f"loss_type must be one of {known}, got {name}{_nearest(str(name))}")
        if value.count(name) > 1:
            raise ValueError(f"loss_type names {name} twice; name it once, with loss_weights")
    object.__setattr__(config, "loss_type", value[0] if len(value) == 1 else list(value))


def _nearest(name: str) -> str:
    """A hint at the loss that was meant, if there is one."""
    name = name.lower().replace("-", "_")
    near = difflib.get_close_matches(name, LOSS_TYPES, n=1, cutoff=0.8)
    meant = _ALSO_KNOWN_AS.get(name) or next(iter(near), None)
    return f"; did you mean {meant}?" if meant else ""


def _check_weights(config: Any) -> None:
    """Hold loss_weights against the losses; whole numbers become floats."""
    weights, names = config.loss_weights, loss_names(config)
    if weights is None:
        return
    if len(names) == 1:
        raise ValueError(
            f"loss_weights={weights} has no effect with one loss; leave it out, or name several "
            "in loss_type"
        )
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights has {len(weights)} values for {len(names)} losses "
            f"({', '.join(names)}); give one for each"
        )
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 < weight < float("inf")):
            raise ValueError(
                f"loss_weights must be numbers > 0, got {weight!r}; leave a loss that should not "
                "count out of loss_type"
            )
    object.__setattr__(config, "loss_weights", [float(weight) for weight in weights])


def _check_read(config: Any) -> None:
    """Refuse a setting that was changed although no chosen loss reads it."""
    reads = set().union(*(LOSS_TYPES[name].reads for name in loss_names(config)))
    known = set().union(*(loss.reads for loss in LOSS_TYPES.values()))
    check_unused(config, "loss_type", *sorted(known - reads))
    if config.f_divergence_type != "alpha_divergence":
        check_unused(config, "f_divergence_type", "f_alpha_divergence_coef")


def _check_combinations(config: Any) -> None:
    """Refuse what has no meaning together."""
    names = loss_names(config)
    alone = [name for name in ("simpo", "orpo") if name in names]
    if alone and len(names) > 1 and set(names) != {"simpo", "sft"}:
        raise ValueError(
            f"loss_type {alone[0]} does not go with {', '.join(n for n in names if n != alone[0])}:"
            " only simpo goes with another, sft; choose one"
        )
    if config.rpo_alpha and len(names) > 1:
        raise ValueError(
            f"rpo_alpha={config.rpo_alpha:g} goes with one loss; with several, name sft in "
            "loss_type and its weight in loss_weights"
        )
    if "exo_pair" in names and not config.label_smoothing:
        raise ValueError("loss_type exo_pair needs label_smoothing > 0, usually 0.001; set it")
    sided = [n for n in names if n != "sft" and "f_divergence_type" not in LOSS_TYPES[n].reads]
    if sided and config.f_divergence_type != "reverse_kl":  # only in margins does log Z cancel
        raise ValueError(
            f"f_divergence_type={config.f_divergence_type} has no meaning for {', '.join(sided)}, "
            "which reads more than a pair's margin; use reverse_kl"
        )
    if config.reference_free and config.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"f_divergence_type={config.f_divergence_type} measures the distance to a reference, "
            "and reference_free leaves it out; leave one out"
        )
