"""What there is to know of every loss before anything is computed: one record each.

From these records come the checks of the loss settings, whether a reference is needed, and the
table in docs/losses.md. The functions of the same names are in `functions`; this file is apart from
them because settings are read, and help is shown, without torch.
"""

# ruff: noqa: D102 - the properties of a protocol are documented where the settings are

import difflib
from dataclasses import dataclass
from typing import Protocol

# Settings that some losses read and others do not.
_ALL = {"beta", "rpo_alpha"}
_REFERENCE = _ALL | {"ld_alpha", "reference_free"}
_SCORES = _REFERENCE | {"f_divergence_type", "f_alpha_divergence_coef"}
_SMOOTHED = _REFERENCE | {"label_smoothing"}
_SMOOTHED_SCORES = _SCORES | {"label_smoothing"}


@dataclass(frozen=True)
class LossType:
    """What is known of one loss.

    Attributes:
        formula: The loss of a pair, in the notation of the docs.
        use: When to take it.
        reads: The optional settings that it uses.
        usual_beta: Lowest and highest beta in published use; None where it reads none.
        usual_learning_rate: The same of the learning rate, for LoRA (about ten times that of full
            fine-tuning).
        needs_reference: Whether it compares with a reference.
        couples_pairs: Whether a pair's loss depends on the other pairs of its step.
    """

    formula: str
    use: str
    reads: set[str]
    usual_beta: tuple[float, float] | None = (0.01, 0.5)
    usual_learning_rate: tuple[float, float] = (1e-6, 5e-5)
    needs_reference: bool = True
    couples_pairs: bool = False


LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(
        "-(1-e) log s(βh) - e log s(-βh)",
        "DPO, where to begin; cDPO with `label_smoothing` e",
        _SMOOTHED_SCORES,
    ),
    "robust": LossType(
        "[-(1-e) log s(βh) + e log s(-βh)] / (1-2e)",
        "labels flipped at a known rate `label_smoothing` e",
        _SMOOTHED_SCORES,
    ),
    "ipo": LossType(
        "(a/n - b/m - 1/(2β))^2",
        "margins that must not grow without end",
        _SCORES,
        usual_beta=(0.01, 1.0),
    ),
    "hinge": LossType(
        "max(0, 1 - βh)", "pairs should stop pulling once they are far enough apart", _SCORES
    ),
    "sigmoid_norm": LossType(
        "-log s(β(a/n - b/m))",
        "answers that grow longer under sigmoid (Tülu 3's choice)",
        _SCORES,
        usual_beta=(1.0, 10.0),
    ),
    "exo_pair": LossType(
        "KL([s(βh), s(-βh)] ‖ [1-e, e])",
        "reverse KL to the preference; `label_smoothing` e must be > 0, usually 0.001",
        _SMOOTHED_SCORES,
    ),
    "discopop": LossType(
        "(1-m)(-log s(βh)) + m exp(-βh), m = s(βh/τ)",
        "a loss found by search; τ is `discopop_tau`",
        _SCORES | {"discopop_tau"},
        usual_beta=(0.01, 0.1),
    ),
    "apo_zero": LossType(
        "1 - s(βa) + s(βb)", "chosen answers better than the model's own", _REFERENCE
    ),
    "apo_down": LossType(
        "s(βa) + 1 - s(βh)", "chosen answers worse than the model's own", _REFERENCE
    ),
    "nca_pair": LossType(
        "-log s(βa) - ½ log s(-βa) - ½ log s(-βb)",
        "the chosen answers should not lose likelihood",
        _REFERENCE,
        usual_beta=(0.001, 0.1),
    ),
    "bco_pair": LossType(
        "-log s(βa) - log s(-βb)", "good and bad judged by themselves; part of MPO", _REFERENCE
    ),
    "sppo_hard": LossType(
        "(a - 1/(2β))^2 + (b + 1/(2β))^2",
        "self-play rounds on the model's own samples",
        _REFERENCE,
        usual_beta=(0.0005, 0.01),
        usual_learning_rate=(1e-6, 2e-5),
    ),
    "aot": LossType(
        "-log s(βd), d = sorted(log π chosen/rejected) - sorted(log π_ref chosen/rejected)",
        "margins should be better as a distribution; sorts a whole step, an extra forward pass",
        _SMOOTHED,
        couples_pairs=True,
    ),
    "aot_unpaired": LossType(
        "-log s(βd), d = sorted(a) - sorted(b)",
        "the same, of chosen against rejected whatever their pairs",
        _SMOOTHED,
        couples_pairs=True,
    ),
    "simpo": LossType(
        "-log s(β(p/n - q/m) - γ)",
        "no reference; γ is `simpo_gamma`",
        _ALL | {"label_smoothing", "simpo_gamma"},
        usual_beta=(1.0, 10.0),
        usual_learning_rate=(1e-6, 2e-5),
        needs_reference=False,
    ),
    "orpo": LossType(
        "-p/n - β log s(o(p/n) - o(q/m)), o(x) = x - log(1-e^x)",
        "no reference; from a base model, supervised training and preferences in one",
        {"beta"},
        usual_beta=(0.05, 1.0),
        usual_learning_rate=(5e-6, 1e-4),
        needs_reference=False,
    ),
    "sft": LossType(
        "-p/n",
        "no reference; the likelihood of the chosen, mostly beside another loss",
        set(),
        usual_beta=None,
        usual_learning_rate=(1e-5, 5e-4),
        needs_reference=False,
    ),
}


class LossChoice(Protocol):
    """What this room reads of a `LossSettings`, which it cannot import: settings import it."""

    @property
    def loss_type(self) -> str | list[str]: ...
    @property
    def loss_weights(self) -> list[float] | None: ...
    @property
    def beta(self) -> float: ...
    @property
    def rpo_alpha(self) -> float: ...
    @property
    def ld_alpha(self) -> float | None: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def f_divergence_type(self) -> str: ...
    @property
    def f_alpha_divergence_coef(self) -> float: ...
    @property
    def reference_free(self) -> bool: ...


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


def losses_of(config: LossChoice) -> dict[str, LossType]:
    """The losses of a config by their names, in order, however many there are."""
    names = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    return {name: LOSS_TYPES[name] for name in names}


def check_loss_settings(config: LossChoice) -> list[str]:
    """Bring loss_type and loss_weights into shape and check the settings of the losses together.

    Returns:
        The settings that no chosen loss reads.

    Raises:
        ValueError: For an unknown loss, or what has no meaning together.
    """
    value = config.loss_type
    value = [value] if isinstance(value, str) else value
    if not value:
        raise ValueError("loss_type is empty; name a loss, usually sigmoid")
    for name in value:
        if not isinstance(name, str) or name not in LOSS_TYPES:
            known = ", ".join(LOSS_TYPES)
            raise ValueError(f"loss_type must be one of {known}, got {name}{_nearest(str(name))}")
        if value.count(name) > 1:
            raise ValueError(f"loss_type names {name} twice; name it once, with loss_weights")
    object.__setattr__(config, "loss_type", value[0] if len(value) == 1 else list(value))
    losses = losses_of(config)
    if config.loss_weights is not None:
        weights = _checked_weights(config.loss_weights, list(losses))
        object.__setattr__(config, "loss_weights", weights)
    if config.f_alpha_divergence_coef == 1:
        raise ValueError(
            "f_alpha_divergence_coef must be in [0, 2] and not 1, which is "
            "f_divergence_type reverse_kl, got 1; set that"
        )
    alone = [name for name in ("simpo", "orpo") if name in losses]
    if alone and len(losses) > 1 and set(losses) != {"simpo", "sft"}:
        raise ValueError(
            f"loss_type {alone[0]} does not go with {', '.join(n for n in losses if n != alone[0])}"
            ": only simpo goes with another, sft; choose one"
        )
    if config.rpo_alpha and len(losses) > 1:
        raise ValueError(
            f"rpo_alpha={config.rpo_alpha:g} goes with one loss; with several, name sft in "
            "loss_type and its weight in loss_weights"
        )
    if "exo_pair" in losses and not config.label_smoothing:
        raise ValueError("loss_type exo_pair needs label_smoothing > 0, usually 0.001; set it")
    if config.f_divergence_type != "reverse_kl":
        _check_divergence(config, losses)
    settings = set().union(*(loss.reads for loss in LOSS_TYPES.values()))
    return sorted(settings.difference(*(loss.reads for loss in losses.values())))


def _checked_weights(weights: list[float], names: list[str]) -> list[float]:
    """loss_weights held against the losses; whole numbers become floats."""
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
    return [float(weight) for weight in weights]


def _check_divergence(config: LossChoice, losses: dict[str, LossType]) -> None:
    """Refuse an f-divergence other than reverse_kl where it has no meaning."""
    # Only in margins does log Z cancel.
    sided = [n for n, loss in losses.items() if "f_divergence_type" not in loss.reads]
    if sided := [name for name in sided if name != "sft"]:
        raise ValueError(
            f"f_divergence_type={config.f_divergence_type} has no meaning for {', '.join(sided)}, "
            "which reads more than a pair's margin; use reverse_kl"
        )
    if config.reference_free:
        raise ValueError(
            f"f_divergence_type={config.f_divergence_type} measures the distance to a reference, "
            "and reference_free leaves it out; leave one out"
        )


def _nearest(name: str) -> str:
    """A hint at the loss that was meant, if there is one."""
    name = name.lower().replace("-", "_")
    near = difflib.get_close_matches(name, LOSS_TYPES, n=1, cutoff=0.8)
    meant = _ALSO_KNOWN_AS.get(name) or next(iter(near), None)
    return f"; did you mean {meant}?" if meant else ""


def unusual_values(config: LossChoice, learning_rate: float) -> list[str]:
    """A line for beta and one for the learning rate where they are not what is usual."""
    losses = losses_of(config)
    lines = []
    for name, loss in losses.items():
        usual = loss.usual_beta
        if usual and not usual[0] <= config.beta <= usual[1]:
            lines.append(f"beta {config.beta:g} is outside {span(usual)}, usual for {name}")
            break
    preference = [loss for name, loss in losses.items() if name != "sft" or len(losses) == 1]
    rates = [loss.usual_learning_rate for loss in preference]
    usual = min(low for low, _ in rates), max(high for _, high in rates)
    if not usual[0] <= learning_rate <= usual[1]:
        lines.append(
            f"learning_rate {learning_rate:g} is outside {span(usual)}, usual for "
            f"{' and '.join(losses)} with LoRA on models of billions of parameters"
        )
    if "robust" in losses and not config.label_smoothing:
        lines.append("loss_type robust with label_smoothing 0 is sigmoid; set label_smoothing")
    return lines


def span(bounds: tuple[float, float]) -> str:
    """Two bounds in words."""
    return f"{bounds[0]:g} to {bounds[1]:g}"
