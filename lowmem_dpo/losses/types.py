"""What there is to know of every loss before anything is computed: one record each.

From these records come the checks of the loss settings (`checks`), whether a reference is needed,
and the table in docs/losses.md. The functions of the same names are in the other files of this
room; this file and `checks` are apart from them because settings are read, and help is shown,
without torch.
"""

from dataclasses import dataclass
from typing import Any

# Settings that some losses read and others do not.
_ALL = {"beta", "rpo_alpha"}
_REFERENCE = _ALL | {"ld_alpha", "reference_free"}
_SCORES = _REFERENCE | {"f_divergence_type"}
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


def loss_names(config: Any) -> list[str]:
    """The losses of a config, as a list however many there are."""
    loss_type = config.loss_type
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def loss_terms(config: Any) -> list[tuple[str, float]]:
    """The losses of a config and their weights; rpo_alpha counts as the weight of sft."""
    names = loss_names(config)
    terms = list(zip(names, config.loss_weights or [1.0] * len(names), strict=True))
    return [*terms, ("sft", config.rpo_alpha)] if config.rpo_alpha else terms


def needs_reference(config: Any) -> bool:
    """Whether a run has a reference: some loss compares with one, and it is not left out."""
    return not config.reference_free and compares_with_reference(config)


def compares_with_reference(config: Any) -> bool:
    """Whether some loss is one of log-ratios, be it to a uniform reference."""
    return any(LOSS_TYPES[name].needs_reference for name in loss_names(config))


def couples_pairs(config: Any) -> bool:
    """Whether some loss is one of the whole optimizer step."""
    return any(LOSS_TYPES[name].couples_pairs for name in loss_names(config))


def span(bounds: tuple[float, float]) -> str:
    """Two bounds in words."""
    return f"{bounds[0]:g} to {bounds[1]:g}"
