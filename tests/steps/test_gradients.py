from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowmem_dpo.linears.lora import lora_layers, lora_parameters
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.losses.pairs import PairLogps, join_pairs
from lowmem_dpo.losses.types import LOSS_TYPES
from lowmem_dpo.model.scoring import score
from lowmem_dpo.packs.packing import Pack, pack_trees
from lowmem_dpo.settings.groups import LossSettings
from lowmem_dpo.steps import gradients
from lowmem_dpo.steps.gradients import pair_logps
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training.loop import evaluate
from lowmem_dpo.training.run import Run
from tests.conftest import random_pairs
from tests.training.conftest import read_metrics, read_record, write_rows
from tests.training.test_identities import (
    ONE_PACK,
    SMALL_PACKS,
    adapter,  # noqa: F401 - prepare is made of it
    assert_close,
    config_for,
    prepare,  # noqa: F401 - a fixture
    step_gradients,
    take_steps,
)

pytestmark = pytest.mark.usefixtures("without_plots")


def summed(run: Run, pack: Pack) -> PairLogps:
    """The sums of a pack's pairs."""
    return pair_logps(score(run.policy.model, pack), pack, run.objective, run.reference)


def whole_step_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Autograd through the whole step at once, all packs in one graph."""
    packs = pack_trees(run.pairs.train, run.pack_tokens)
    pairs = join_pairs([summed(run, pack) for pack in packs])
    run.objective.pair_losses(pairs).mean().backward()
    parameters = lora_parameters(run.policy.model.network)
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
        {"loss_type": ["aot_unpaired", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5},
    ],
    ids=str,
)
def test_coupled_step_has_the_gradient_of_autograd_through_all_packs(prepare, settings):  # noqa: F811
    run = prepare(random_pairs(9), pack_tokens=SMALL_PACKS, beta=0.5, max_steps=2, **settings)
    assert len(pack_trees(run.pairs.train, run.pack_tokens)) >= 4
    take_steps(run, learning_rate=0.003)  # away from zero margin
    wanted = whole_step_gradients(run)
    assert_close(step_gradients(run, first_step=1), wanted, 1e-5)


def test_coupled_step_draws_the_dropout_of_its_first_pass_again(prepare, monkeypatch):  # noqa: F811
    run = prepare(
        random_pairs(6),
        pack_tokens=SMALL_PACKS,
        loss_type="aot",
        lora_dropout=0.5,
        learning_rate=1e-9,
    )
    passes: list[torch.Tensor] = []

    def recorded(*arguments: Any) -> Any:
        pairs = pair_logps(*arguments)
        passes.append(pairs.policy_chosen.detach())
        return pairs

    monkeypatch.setattr(gradients, "pair_logps", recorded)
    torch.manual_seed(0)
    take_steps(run, learning_rate=0.0)
    assert len(passes) % 2 == 0  # all packs without gradient, then all of them with
    first, second = (
        torch.cat(half) for half in (passes[: len(passes) // 2], passes[len(passes) // 2 :])
    )
    assert len(first) == 6 and torch.equal(first, second)
    assert not torch.equal(first, join_reference(run))


def join_reference(run: Run) -> torch.Tensor:
    """The chosen sums without dropout."""
    packs = pack_trees(run.pairs.train, run.pack_tokens)
    with torch.no_grad():
        blocks = [summed(run, pack) for pack in packs]
    return join_pairs(blocks).policy_chosen


def test_evaluate_sorts_all_held_out_pairs_whatever_the_packs(prepare, tmp_path):  # noqa: F811
    held_out = write_rows(tmp_path / "eval.jsonl", random_pairs(12, seed=7))
    losses = []
    for pack_tokens in (SMALL_PACKS, ONE_PACK):
        run = prepare(
            random_pairs(6),
            loss_type="aot_unpaired",
            pack_tokens=pack_tokens,
            eval_data=str(held_out),
        )
        take_steps(run, learning_rate=0.05)
        losses.append(evaluate(run, run.pairs.evaluation)["eval_loss"])
        alone = replace(run, objective=Objective.of(LossSettings()))
        assert losses[-1] != evaluate(alone, run.pairs.evaluation)["eval_loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pair_logps_weigh_the_tails_of_policy_and_reference():
    from lowmem_dpo.tokens.trees import TokenPair, build_tree

    # Prompt 0 1, both answers begin with 5: tail of the chosen are its last two tokens.
    pack = pack_trees([build_tree(TokenPair(1, (0, 1, 5, 6, 7, 8), (0, 1, 5, 9), 2, 2))], 64)[0]
    policy = -torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])  # 5 | 6 7 8 | 9
    reference = 10 * policy
    objective = Objective.of(LossSettings(ld_alpha=0.5))
    pairs = pair_logps(policy, pack, objective, SimpleNamespace(of=lambda pack: reference))
    assert pairs.policy_chosen.tolist() == [-(1 + 2 + 0.5 * (4 + 8))]
    assert pairs.policy_rejected.tolist() == [-(1 + 16)]
    assert pairs.reference_chosen.tolist() == [-90.0]
    assert pairs.reference_rejected.tolist() == [-170.0]
    assert pairs.nll.tolist() == [15 / 4]


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, ["sigmoid", "bco_pair", "sft"]], ids=str)
def test_fit_trains_with_every_loss_from_an_exact_step_zero(llama_dir, tmp_path, loss_type):
    config = config_for(
        llama_dir,
        tmp_path / "out",
        loss_type=loss_type,
        label_smoothing=1e-3 if loss_type == "exo_pair" else 0.0,
        beta=2.0 if loss_type == "simpo" else 0.1,
        batch_size=3,
        optim="adamw",
        learning_rate=1e-3,
        pack_tokens=SMALL_PACKS,
    )
    data = write_rows(tmp_path / "pairs.jsonl", random_pairs(6))
    output = Trainer(config).fit(data).output_dir
    steps, record = read_metrics(output), read_record(output)
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    if loss_type in ("simpo", "orpo", "sft"):
        assert record["step_zero"] is None and record["reference"] is None
    else:
        assert record["step_zero"]["exact"] and steps[0]["rewards/margins"] == 0.0
        assert steps[1]["rewards/margins"] != 0.0
        expected = record["step_zero"]["expected_loss"]
        assert record["step_zero"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert ("nll_loss" in steps[0]) == ("sft" in loss_type or loss_type == "orpo")
    if loss_type == ["sigmoid", "bco_pair", "sft"]:
        assert steps[0]["nll_loss"] > 0
        rest = steps[0]["loss"] - steps[0]["nll_loss"]
        assert rest == pytest.approx(record["step_zero"]["loss"], rel=1e-6)
    assert ("log_odds_ratio" in steps[0]) == (loss_type == "orpo")


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_casts_of_the_adapter_are_kept_for_a_step_and_no_longer(prepare, monkeypatch, loss_type):  # noqa: F811
    """Without any the steps are the same: none is of matrices that an update has changed."""
    found = []
    for keeps in (True, False):
        if not keeps:
            monkeypatch.setattr(gradients, "casts_kept", lambda model: nullcontext())
        settings = {"loss_type": loss_type, "dtype": "bfloat16", "max_steps": 3}
        run = prepare(random_pairs(6), pack_tokens=SMALL_PACKS, **settings)
        metrics = take_steps(run, learning_rate=0.01)
        assert all(layer.casts is None for layer in lora_layers(run.policy.model.network).values())
        parameters = lora_parameters(run.policy.model.network)
        found.append(([step["loss"] for step in metrics], parameters))
    assert len(found[0][0]) == 3 and found[0][0] == found[1][0]
    for name, parameter in found[0][1].items():
        assert torch.equal(parameter, found[1][1][name])
