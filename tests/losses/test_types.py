import pytest
import torch

from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import PairLogps
from lowmem_dpo.losses.types import unusual_values
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.settings.fields import parse_config, to_yaml

MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmod"}, "loss_type must be one of sigmoid, .*; did you mean sigmoid?"),
        ({"loss_type": "mpo"}, "did you mean [sigmoid, bco_pair, sft] with loss_weights"),
        ({"loss_type": "cDPO"}, "did you mean sigmoid with label_smoothing?"),
        ({"loss_type": ["sigmoid", "tdpo2x"]}, "got tdpo2x"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", ["sft"]]}, "got ['sft']"),
        ({"loss_type": "ipo,ipo"}, "loss_type names ipo twice"),
        ({"loss_weights": [1.0]}, "loss_weights=[1.0] has no effect with one loss"),
        ({**MPO, "loss_weights": [1.0, 2.0]}, "loss_weights has 2 values for 3 losses"),
        ({**MPO, "loss_weights": [1, 1, -0.1]}, "loss_weights must be numbers > 0, got -0.1"),
        ({**MPO, "loss_weights": [1, 1, True]}, "loss_weights must be numbers > 0, got True"),
        ({**MPO, "loss_weights": [1, float("nan"), 1]}, "must be numbers > 0, got nan"),
        ({**MPO, "loss_weights": [1, 0, 1]}, "must be numbers > 0, got 0; leave a loss"),
        ({"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 0.5)"),
        ({"loss_type": "discopop", "discopop_tau": 0}, "discopop_tau must be > 0, got 0.0"),
        ({"loss_type": "simpo", "simpo_gamma": -1}, "simpo_gamma must be >= 0"),
        ({"rpo_alpha": -1}, "rpo_alpha must be >= 0"),
        ({"ld_alpha": 1.1}, "ld_alpha must be in [0, 1], got 1.1"),
        ({"ld_alpha": -0.1}, "ld_alpha must be in [0, 1]"),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1},
            "not 1, which is f_divergence_type reverse_kl",
        ),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.1},
            "f_alpha_divergence_coef must be in [0, 2]",
        ),
        ({"f_alpha_divergence_coef": 0.3}, "no effect with f_divergence_type=reverse_kl"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl"),
        ({"loss_type": "exo_pair"}, "exo_pair needs label_smoothing > 0, usually 0.001"),
        ({"loss_type": "simpo", "reference_free": True}, "reference_free=True has no effect"),
        ({"loss_type": "orpo", "reference": "accept"}, "reference accept has no effect"),
        ({"reference_free": True, "reference": "accept"}, "no effect with reference_free"),
        (
            {"loss_type": "orpo", "rpo_alpha": 1.0},
            "rpo_alpha=1.0 has no effect with loss_type=orpo",
        ),
        ({"loss_type": "sft", "beta": 0.2}, "beta=0.2 has no effect with loss_type=sft"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "ld_alpha=0.5 has no effect"),
        ({"loss_type": "ipo", "simpo_gamma": 0.6}, "simpo_gamma=0.6 has no effect"),
        ({"loss_type": "ipo", "discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
        ({"loss_type": "ipo,hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type=forward"),
        (
            {**MPO, "f_divergence_type": "forward_kl"},
            "f_divergence_type=forward_kl has no meaning for bco_pair",
        ),
        ({"reference_free": True, "f_divergence_type": "js_divergence"}, "leave one out"),
        ({"loss_type": "simpo,sigmoid"}, "loss_type simpo does not go with sigmoid"),
        ({"loss_type": "orpo,sft"}, "loss_type orpo does not go with sft"),
        ({**MPO, "rpo_alpha": 1.0}, "rpo_alpha=1 goes with one loss"),
        ({"loss_type": "aot", "batch_size": 1}, "raise batch_size, or use sigmoid"),
    ],
    ids=str,
)
def test_check_loss_settings_refuses_in_one_line(settings, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings)
    head, _, tail = message.partition(".*")
    assert head in str(error.value) and tail in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        MPO,
        {**MPO, "loss_weights": [1, 2, 0.5], "ld_alpha": 0.0},
        {"loss_type": "sigmoid", "rpo_alpha": 1.0, "label_smoothing": 0.1, "ld_alpha": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.0, "rpo_alpha": 0.1},
        {"loss_type": ["simpo", "sft"], "beta": 2.0},
        {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
        {"loss_type": "exo_pair", "label_smoothing": 0.001},
    ],
    ids=str,
)
def test_check_loss_settings_takes_what_has_meaning_and_yaml_keeps_it(settings, tmp_path):
    config = TrainConfig(**settings)
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert TrainConfig.from_yaml(path) == config


@pytest.mark.parametrize("text", ["[sigmoid, bco_pair, sft]", "sigmoid,bco_pair,sft"])
@pytest.mark.parametrize("weights", ["[0.8, 0.2, 1]", "0.8,0.2,1.0"])
def test_losses_are_read_from_flags_with_and_without_brackets(text, weights):
    config = parse_config(TrainConfig, ["--loss_type", text, "--loss_weights", weights])
    assert config == TrainConfig(**MPO)


def test_losses_are_read_from_yaml_text_and_lists(tmp_path):
    path = tmp_path / "run.yaml"
    for text in ("sigmoid, bco_pair, sft", "[sigmoid, bco_pair, sft]"):
        path.write_text(f"loss_type: {text}\nloss_weights: [0.8, 0.2, 1]\n", encoding="utf-8")
        assert TrainConfig.from_yaml(path) == TrainConfig(**MPO)


def test_a_list_of_one_loss_is_that_loss():
    assert TrainConfig(loss_type=["ipo"]) == TrainConfig(loss_type="ipo")


def objective(**settings):
    return Objective.of(TrainConfig(**settings))


def test_terms_count_rpo_alpha_as_a_weight_of_sft():
    assert objective(**MPO).terms == (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))
    assert objective(rpo_alpha=0.5).terms == (("sigmoid", 1.0), ("sft", 0.5))
    assert objective(rpo_alpha=0.5).nll_weight == 0.5
    assert objective().nll_weight == 0


def rewards_are_of_log_ratios(objective):
    two, one, half = torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([0.5])
    logps = PairLogps(two, two, one, one, half, half)  # sums, the reference's, lengths
    chosen, rejected = objective.rewards(logps)
    beta = objective.parameters.beta
    assert chosen == rejected and chosen.item() in (pytest.approx(-beta), pytest.approx(-4 * beta))
    return chosen.item() == pytest.approx(-beta)


def test_needs_reference_unless_no_loss_compares_with_one():
    assert objective().needs_reference and objective(**MPO).needs_reference
    assert rewards_are_of_log_ratios(objective())
    for name in ("simpo", "orpo", "sft"):
        assert not objective(loss_type=name).needs_reference
        assert not rewards_are_of_log_ratios(objective(loss_type=name))
    uniform = objective(reference_free=True)
    assert not uniform.needs_reference and rewards_are_of_log_ratios(uniform)


def test_couples_pairs_if_one_of_several_losses_does():
    assert objective(loss_type=["sigmoid", "aot"]).couples_pairs
    assert not objective(**MPO).couples_pairs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 2.0}, ["beta 2 is outside 0.01 to 0.5, usual for sigmoid"]),
        ({"learning_rate": 1e-3}, ["learning_rate 0.001 is outside 1e-06 to 5e-05", "sigmoid"]),
        ({"learning_rate": 1e-8}, ["learning_rate 1e-08 is outside 1e-06 to 5e-05"]),
        ({"loss_type": "simpo"}, ["beta 0.1 is outside 1 to 10, usual for simpo"]),
        ({"loss_type": "sppo_hard"}, ["beta 0.1 is outside 0.0005 to 0.01, usual for sppo_hard"]),
        ({**MPO, "learning_rate": 2e-4}, ["usual for sigmoid and bco_pair and sft with LoRA"]),
        ({"loss_type": "robust"}, ["robust with label_smoothing 0 is sigmoid"]),
    ],
    ids=str,
)
def test_unusual_values_are_said_in_one_line_with_the_range(settings, words):
    config = TrainConfig(**settings)
    lines = unusual_values(config, config.learning_rate)
    assert len(lines) == 1 and all(word in lines[0] for word in words)


def test_unusual_values_are_none_at_the_defaults_and_in_the_range():
    assert unusual_values(TrainConfig(), 5e-6) == unusual_values(TrainConfig(**MPO), 5e-6) == []
    assert unusual_values(TrainConfig(loss_type="simpo", beta=2.5), 1e-5) == []
    assert unusual_values(TrainConfig(loss_type="sft"), 2e-4) == []
