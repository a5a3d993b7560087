"""Every loss, its gradient and its rewards against TRL's own code on random log-probs, in fp32.

TRL's trainers compute the loss inside a method that also runs the model; here it runs a stand-in
that returns given log-probs. TRL pads chosen and rejected to a batch; ours are packed as trees.
"""

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.packs.packing import Pack, pack_trees
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.gradients import PairStats, pair_logps
from lowmem_dpo.tokens.trees import TokenPair, build_tree

trl = pytest.importorskip("trl", reason="needs TRL to compare with")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

NUM_PAIRS, PROMPT = 6, 4
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
Sides = list[list[list[int]]]


def random_pack(generator: torch.Generator, equal_chosen: bool) -> tuple[Pack, Sides]:
    """Trees with trunks that reach into the completions, and where each completion's tokens lie."""

    def length() -> int:
        return int(torch.randint(1, 12, (), generator=generator))

    trees = []
    for row in range(NUM_PAIRS):
        shared, own = [9] * (row % 3), 5 if equal_chosen else length()
        own -= len(shared) if equal_chosen else 0
        chosen = (*range(PROMPT), *shared, *[10] * own)
        rejected = (*range(PROMPT), *shared, *[11] * length())
        trees.append(build_tree(TokenPair(row, chosen, rejected, PROMPT, PROMPT)))
    pack = pack_trees(trees, 512)[0]
    chosen_tokens, rejected_tokens, start = [], [], 0
    for both, chosen, rejected in pack.counts:
        shared = list(range(start, start + both))
        middle = start + both + chosen
        chosen_tokens.append(shared + list(range(start + both, middle)))
        rejected_tokens.append(shared + list(range(middle, middle + rejected)))
        start = middle + rejected
    return pack, [chosen_tokens, rejected_tokens]


def padded(logps: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """[2P, longest] log-probs as TRL lays them out, and the mask of the completions."""
    rows = [logps[tokens] for side in sides for tokens in side]
    masks = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(masks, batch_first=True)


class StandIn(torch.nn.Module):
    """A model that returns given log-probs."""

    is_gradient_checkpointing = False

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.eval()
        self.logps = logps

    def forward(self, **inputs: Any) -> Any:
        zeros = torch.zeros_like(self.logps).detach()
        return SimpleNamespace(
            log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def trl_loss(
    policy: Tensor, reference: Tensor, sides: Sides, config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of TRL's DPOTrainer, and what it logs."""
    logps, mask = padded(policy, sides)
    model = StandIn(logps)
    names = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    trainer = SimpleNamespace(
        model=model,
        ref_model=StandIn(padded(reference, sides)[0]),
        args=SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        loss_types=names,
        loss_weights=config.loss_weights or [1.0] * len(names),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **{
            name: getattr(config, name)
            for name in (
                "beta",
                "label_smoothing",
                "ld_alpha",
                "f_divergence_type",
                "f_alpha_divergence_coef",
            )
        },
    )
    completion_mask = torch.nn.functional.pad(mask, (1, 0))  # a prompt of one token
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


def our_loss(
    policy: Tensor, reference: Tensor | None, pack: Pack, config: TrainConfig
) -> tuple[Tensor, dict[str, float]]:
    """Our loss of a step in one pack, and what we log."""
    objective = Objective.of(config)
    of = None if reference is None else SimpleNamespace(of=lambda pack: reference)
    pairs = pair_logps(policy, pack, objective, of)
    losses, stats = objective.pair_losses(pairs), PairStats(objective)
    stats.add(pairs, losses)
    return losses.mean(), stats.summary()[0]


def random_logps(pack: Pack, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    policy = -4 * torch.rand(len(pack.rows), generator=generator)
    reference = policy + 0.7 * torch.randn(len(pack.rows), generator=generator)
    return policy.requires_grad_(), reference.clamp(max=0)


ALPHA = {"f_divergence_type": "alpha_divergence"}
CASES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid", **ALPHA},
    {"loss_type": "sigmoid", **ALPHA, "f_alpha_divergence_coef": 1.7},
    {"loss_type": "sigmoid", "ld_alpha": 0.5},
    {"loss_type": "sigmoid", "ld_alpha": 0.0},
    {"loss_type": "hinge", "beta": 0.5},
    {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "ld_alpha": 0.3, "f_divergence_type": "js_divergence"},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "exo_pair", "label_smoothing": 0.2, **ALPHA},
    {"loss_type": "nca_pair", "beta": 0.01},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "robust", "label_smoothing": 0.3, "f_divergence_type": "forward_kl"},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard", "beta": 0.001},
    {"loss_type": "aot"},
    {"loss_type": "aot", "label_smoothing": 0.2, "ld_alpha": 0.5},
    {"loss_type": "aot_unpaired", "label_smoothing": 0.2},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "discopop", "beta": 0.05},
    {"loss_type": "discopop", "discopop_tau": 0.5, "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid_norm", "beta": 5.0},
    {"loss_type": ["sigmoid", "aot", "nca_pair"], "loss_weights": [0.5, 2.0, 0.1]},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_equal_those_of_trl(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    pack, sides = random_pack(generator, equal_chosen=False)
    policy, reference = random_logps(pack, generator)
    config = TrainConfig(**settings)
    assert_equal(
        policy,
        our_loss(policy, reference, pack, config),
        trl_loss(policy, reference, sides, config),
    )


@pytest.mark.parametrize("settings", [{}, {"ld_alpha": 0.5}], ids=str)
def test_mpo_equals_that_of_trl_where_completions_have_one_length(settings):
    """With one length, the mean over tokens is the mean over pairs."""
    generator = torch.Generator().manual_seed(2)
    pack, sides = random_pack(generator, equal_chosen=True)
    policy, reference = random_logps(pack, generator)
    mpo = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    config = TrainConfig(**mpo, **settings)
    theirs = trl_loss(policy, reference, sides, config)
    assert_equal(policy, our_loss(policy, reference, pack, config), theirs)


def test_rpo_is_trls_sum_of_sigmoid_and_sft():
    generator = torch.Generator().manual_seed(3)
    pack, sides = random_pack(generator, equal_chosen=True)
    policy, reference = random_logps(pack, generator)
    theirs = TrainConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    ours = our_loss(policy, reference, pack, TrainConfig(rpo_alpha=0.3))
    assert_equal(policy, ours, trl_loss(policy, reference, sides, theirs))


def assert_equal(
    policy: Tensor, ours: tuple[Tensor, dict[str, float]], theirs: tuple[Tensor, dict[str, float]]
) -> None:
    """Loss, gradient and what is logged agree to 1e-5."""
    (loss, logged), (their_loss, their_logged) = ours, theirs
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-5)
    gradient, wanted = (torch.autograd.grad(value, policy)[0] for value in (loss, their_loss))
    assert wanted.any()
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    for name in (*REWARDS, "logps/chosen", "logps/rejected"):
        assert logged[name] == pytest.approx(their_logged[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_simpo_equals_that_of_trls_cpo_trainer(smoothing, weight):
    from trl.experimental.cpo import CPOTrainer

    config = TrainConfig(
        loss_type="simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=smoothing, rpo_alpha=weight
    )
    trainer = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=1.2, beta=2.0)
    trainer.label_smoothing, trainer.cpo_alpha = smoothing, weight
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    assert_reference_free_equal(config, trainer, CPOTrainer)


def test_orpo_equals_that_of_trls_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3)
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    logged = assert_reference_free_equal(
        TrainConfig(loss_type="orpo", beta=0.3), trainer, ORPOTrainer
    )
    assert {"log_odds_ratio", "log_odds_chosen"} <= logged


def assert_reference_free_equal(config: TrainConfig, trainer: Any, theirs: type) -> set[str]:
    """Loss, gradient and what is logged of `get_batch_loss_metrics`; logps are sums with us."""
    generator = torch.Generator().manual_seed(4)
    pack, sides = random_pack(generator, equal_chosen=False)
    policy, _ = random_logps(pack, generator)
    chosen, rejected = (torch.stack([policy[tokens].mean() for tokens in side]) for side in sides)
    logits = torch.zeros(1)
    forward = (chosen, rejected, logits, logits, -chosen.mean())
    trainer.concatenated_forward = lambda model, batch: forward
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.aux_loss_enabled = False
    their_loss, their_logged = theirs.get_batch_loss_metrics(trainer, None, {})
    loss, logged = our_loss(policy, None, pack, config)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5, abs=1e-5)
    gradient, wanted = (torch.autograd.grad(x, policy)[0] for x in (loss, their_loss))
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    for name in logged.keys() - {"loss", "logps/chosen", "logps/rejected"}:
        assert logged[name] == pytest.approx(float(their_logged[name]), rel=1e-5, abs=1e-5), name
    return set(logged)
