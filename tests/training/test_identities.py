"""What must hold for any model and any data, checked on the loop itself.

An optimizer step is taken with plain SGD at learning rate 1 and no clipping, so the adapter's
change is the gradient that the loop computed, whatever way it took. The runs start from an adapter
whose B is not zero, or A would have no gradient; their reference is then that adapter.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_dpo.linears.lora import LoraLinear, lora_layers, lora_parameters
from lowmem_dpo.losses.functions import LOSSES
from lowmem_dpo.losses.pairs import LossParameters, PairLogps
from lowmem_dpo.model.scoring import score
from lowmem_dpo.packs.packing import pack_trees, scored_tokens, sequence_logps
from lowmem_dpo.records.checkpoints import TrainingState
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.gradients import PER_PAIR, Metrics
from lowmem_dpo.tokens.trees import TokenPair, Tree, build_tree
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training import fit
from lowmem_dpo.training.loop import evaluate, train_steps
from lowmem_dpo.training.run import Run
from lowmem_dpo.weights.adapters import save_adapter
from tests.conftest import random_pairs
from tests.policies import policy_for
from tests.tiny import tiny_model
from tests.training.conftest import read_metrics, read_record, write_rows

pytestmark = pytest.mark.usefixtures("without_plots")

Row = dict[str, str]
Gradients = dict[str, Tensor]
ONE_PACK = 1024  # tokens: the pairs of a step fit together
SMALL_PACKS = 128  # one or two pairs each
EVEN_AT_ZERO = ("sigmoid", "ipo", "hinge", "apo_zero")  # pull both answers equally hard there
MPO = ["sigmoid", "bco_pair", "sft"]


def config_for(model: Path, output: Path, **settings: Any) -> TrainConfig:
    defaults = {
        "quantization": "none",
        "dtype": "float32",
        "device": "cpu",
        "lora_r": 4,
        "lora_alpha": 8.0,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "shuffle": False,
        "save_strategy": "no",
    }
    return TrainConfig(model=str(model), output_dir=str(output), **(defaults | settings))


@pytest.fixture
def adapter(llama_dir: Path, tmp_path: Path) -> Path:
    """An adapter that changes the model and whose every matrix gets a gradient."""
    policy = policy_for(config_for(llama_dir, tmp_path))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(policy.model.network).items():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    save_adapter(
        tmp_path / "start", policy.model.network, base_model=policy.base, settings=policy.adapter
    )
    return tmp_path / "start"


@pytest.fixture
def prepare(llama_dir: Path, adapter: Path, tmp_path: Path) -> Callable[..., Run]:
    """Make a run ready for its first step on the given rows, by default all in one batch."""

    def prepared(rows: list[Row], **settings: Any) -> Run:
        data = write_rows(tmp_path / "pairs.jsonl", rows)
        settings = {"batch_size": len(rows), "init_adapter": str(adapter)} | settings
        return fit.prepare(config_for(llama_dir, tmp_path / "out", data=str(data), **settings))

    return prepared


def take_steps(run: Run, *, first_step: int = 0, learning_rate: float = 1.0) -> list[Metrics]:
    """Run the loop from a step to the end; from step 1 on, there is no check of step zero."""
    optimizer = torch.optim.SGD(lora_parameters(run.policy.model.network).values(), learning_rate)
    state = TrainingState(
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        step=first_step,
    )
    return [result.metrics for result in train_steps(run, state, max_grad_norm=0.0)]


def step_gradients(run: Run, **options: Any) -> Gradients:
    """The gradient of a run of one step: what SGD at learning rate 1 took away."""
    parameters = lora_parameters(run.policy.model.network)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert len(take_steps(run, **options)) == 1
    gradients = {name: before[name] - parameters[name].detach() for name in before}
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    return gradients


def assert_close(gradients: Gradients, wanted: Gradients, tolerance: float = 1e-5) -> None:
    """Every matrix agrees to `tolerance` of its norm."""
    assert gradients.keys() == wanted.keys() and len(gradients) == 2 * 7 * 2
    for name, gradient in gradients.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < tolerance, (name, error.item())


def swapped(rows: list[Row]) -> list[Row]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def sequence_gradients(layers: dict[str, LoraLinear], tree: Tree) -> Gradients:
    """Gradient of log pi(y_w) - log pi(y_l): transformers' model, merged weights, cross-entropy.

    With W' = W + s B A, dB = s dW' A^T and dA = s B^T dW'.
    """
    model = tiny_model("llama").requires_grad_(True)
    weights = {name: model.get_submodule(name).weight for name in layers}
    with torch.no_grad():
        for name, layer in layers.items():
            weights[name] += layer.scaling * layer.lora_b @ layer.lora_a
    total = torch.zeros(())
    for sign, sequence, start in (
        (1, tree.chosen_ids, tree.chosen_start),
        (-1, tree.rejected_ids, tree.rejected_start),
    ):
        ids = torch.tensor(list(sequence))
        logits = model(input_ids=ids[None]).logits[0]
        total -= sign * F.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum")
    total.backward()
    gradients = {}
    for name, layer in layers.items():
        gradients[f"{name}.lora_a"] = layer.scaling * layer.lora_b.detach().T @ weights[name].grad
        gradients[f"{name}.lora_b"] = layer.scaling * weights[name].grad @ layer.lora_a.detach().T
    return gradients


def test_gradient_at_zero_margin_is_half_beta_times_that_of_cross_entropy(prepare):
    beta = 0.3
    run = prepare(random_pairs(5), beta=beta)
    layers = lora_layers(run.policy.model.network)
    pairs = [sequence_gradients(layers, tree) for tree in run.pairs.train]
    wanted = {name: -beta / 2 * sum(pair[name] for pair in pairs) / len(pairs) for name in pairs[0]}
    assert_close(step_gradients(run), wanted)


@pytest.mark.parametrize("loss_type", [*EVEN_AT_ZERO, "aot", "aot_unpaired", "orpo", MPO], ids=str)
def test_gradient_of_many_packs_is_that_of_one(prepare, loss_type):
    settings = {"loss_type": loss_type, "beta": 0.5, "max_steps": 2}
    if loss_type in ("aot", MPO):
        settings["ld_alpha"] = 0.5
    many = prepare(random_pairs(9), pack_tokens=SMALL_PACKS, **settings)
    one = prepare(random_pairs(9), pack_tokens=ONE_PACK, **settings)
    assert len(pack_trees(one.pairs.train, one.pack_tokens)) == 1
    assert len(pack_trees(many.pairs.train, many.pack_tokens)) >= 4
    for run in (many, one):  # away from zero margin, where all pairs would pull equally hard
        assert take_steps(run, learning_rate=0.003)[-1]["rewards/margins"] > 0.01
    assert_close(step_gradients(many, first_step=1), step_gradients(one, first_step=1), 1e-4)


def test_fit_in_many_packs_logs_what_it_logs_in_one(llama_dir, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", random_pairs(22))
    runs = []
    for pack_tokens in (SMALL_PACKS, ONE_PACK):
        config = config_for(
            llama_dir,
            tmp_path / f"out{pack_tokens}",
            pack_tokens=pack_tokens,
            batch_size=6,
            num_train_epochs=2.0,
            optim="adamw",
            learning_rate=5e-3,
            max_grad_norm=1.0,
            shuffle=True,
        )
        runs.append(read_metrics(Trainer(config).fit(data).output_dir))
    assert len(runs[0]) == len(runs[1]) == 8
    for many, one in zip(*runs, strict=True):
        for name in (*PER_PAIR, "grad_norm", "num_tokens"):
            assert many[name] == pytest.approx(one[name], rel=1e-5, abs=2e-5), (one["step"], name)
    assert runs[0][-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize("loss_type", EVEN_AT_ZERO)
def test_gradient_of_swapped_answers_at_zero_margin_is_the_negative(prepare, loss_type):
    rows = random_pairs(5)
    gradients = step_gradients(prepare(rows, loss_type=loss_type))
    negative = step_gradients(prepare(swapped(rows), loss_type=loss_type))
    assert_close({name: -gradient for name, gradient in negative.items()}, gradients)


def test_rewards_of_swapped_answers_change_sides(prepare, tmp_path):
    rows = random_pairs(6)
    metrics = []
    for held_out in (rows, swapped(rows)):
        eval_data = write_rows(tmp_path / "eval.jsonl", held_out)
        run = prepare(rows, eval_data=str(eval_data))
        take_steps(run, learning_rate=0.05)
        metrics.append(evaluate(run, run.pairs.evaluation))
    straight, swap = metrics
    assert straight["eval_rewards/margins"] > 0.1
    for name, twin, sign in (
        ("rewards/chosen", "rewards/rejected", 1),
        ("rewards/rejected", "rewards/chosen", 1),
        ("logps/chosen", "logps/rejected", 1),
        ("rewards/margins", "rewards/margins", -1),
    ):
        assert swap[f"eval_{name}"] == pytest.approx(sign * straight[f"eval_{twin}"], abs=2e-5)
    assert swap["eval_rewards/accuracies"] == 1 - straight["eval_rewards/accuracies"]


@pytest.mark.parametrize("loss_type", EVEN_AT_ZERO)
def test_gradient_of_identical_answers_is_exactly_zero(prepare, loss_type):
    run = prepare(random_pairs(3))
    ids = tuple(range(4, 30))
    pack = pack_trees([build_tree(TokenPair(1, ids, ids, 9, 9))], 64)[0]
    chosen, rejected = sequence_logps(score(run.policy.model, pack), pack)
    tokens, reference = torch.full((1,), 17.0), chosen.detach() - 3.0
    logps = PairLogps(chosen, rejected, reference, reference, tokens, tokens)
    LOSSES[loss_type](logps, LossParameters(0.1)).sum().backward()
    for name, parameter in lora_parameters(run.policy.model.network).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("loss_type", "per_token"), [("sigmoid", False), ("hinge", False), ("ipo", True)]
)
def test_step_does_not_feel_a_constant_on_both_reference_sums(prepare, loss_type, per_token):
    beta, constant = 0.2, 4.0
    outcomes = []
    for shift in (0.0, constant):
        run = prepare(random_pairs(6), loss_type=loss_type, beta=beta, max_steps=2)
        shift_reference(run, shift, per_token)
        gradients = step_gradients(run, first_step=1)
        outcomes.append((gradients, take_steps(run, first_step=1, learning_rate=0.0)[0]))
    (plain_gradients, plain), (shifted_gradients, shifted) = outcomes
    assert_close(shifted_gradients, plain_gradients, 1e-4)
    assert shifted["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    trees = run.pairs.train
    if not per_token:  # IPO compares averages: the sums move apart with the lengths
        for side in ("chosen", "rejected"):
            moved = shifted[f"rewards/{side}"] - plain[f"rewards/{side}"]
            assert moved == pytest.approx(-beta * constant, abs=1e-4)
    assert {min(scored_tokens(tree).num_shared, 1) for tree in trees} == {0, 1}


def shift_reference(run: Run, constant: float, per_token: bool) -> None:
    """Add a constant to the reference sums of both answers of a pair, or to every token."""
    assert run.reference is not None
    for tree in run.pairs.train:
        logps, counts = run.reference.logps[tree.digest], scored_tokens(tree)
        if per_token:
            logps += constant
        elif counts.num_shared:  # counts in both sums
            logps[0] += constant
        else:
            logps[0] += constant
            logps[counts.num_chosen] += constant


def test_logps_are_the_same_bits_beside_padding_and_beside_other_trees(prepare):
    run = prepare(random_pairs(8), pack_tokens=512)
    together = run.reference
    assert together is not None and len(pack_trees(run.pairs.train, 512)) < 4
    for tree in run.pairs.train:
        with torch.no_grad():
            alone = score(run.policy.model, pack_trees([tree], 512)[0])
        assert torch.equal(alone, together.logps[tree.digest])


def test_step_does_not_feel_more_padding(prepare):
    rows = random_pairs(8)
    tight, loose = prepare(rows, pack_tokens=512), prepare(rows, pack_tokens=1536)
    for tree in tight.pairs.train:
        key = tree.digest
        assert torch.allclose(tight.reference.logps[key], loose.reference.logps[key], atol=2e-6)
    assert_close(step_gradients(tight), step_gradients(loose))


def test_short_last_batch_is_divided_by_its_own_pairs(prepare):
    rows = random_pairs(7)
    first, last = take_steps(prepare(rows, batch_size=5), learning_rate=0.0)
    for metrics, batch in ((first, rows[:5]), (last, rows[5:])):
        alone = step_gradients(prepare(batch))
        norm = torch.stack([gradient.norm() for gradient in alone.values()]).norm().item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)


def lognormal_pairs(num_pairs: int, seed: int = 0) -> list[Row]:
    """Answers and prompts whose lengths spread as in chat data: 20 to 1500 tokens in all."""
    rng = random.Random(seed)

    def text(median: float) -> str:
        length = round(min(max(rng.lognormvariate(math.log(median), 1.0), 8), 740))
        return "".join(rng.choice("abcdefgh ") for _ in range(length))

    return [
        {"prompt": text(60), "chosen": f"y{text(120)}", "rejected": f"n{text(100)}"}
        for _ in range(num_pairs)
    ]


def test_fit_accounts_for_every_pair_of_a_realistic_length_spread(llama_dir, tmp_path):
    max_length, template_tokens = 256, 3  # <|user|> PROMPT <|end|><|assistant|>
    rows = lognormal_pairs(60)
    rows[3]["chosen"] = " "
    rows[8]["chosen"] = rows[8]["rejected"]
    prompts = [len(row["prompt"]) + template_tokens for row in rows]
    sound = [i for i in range(60) if i not in (3, 8)]
    kept = [i for i in sound if prompts[i] < max_length]
    lengths = [prompts[i] + len(rows[i][side]) + 1 for i in kept for side in ("chosen", "rejected")]
    assert min(lengths) < 60 and max(lengths) > 700

    config = config_for(
        llama_dir,
        tmp_path / "out",
        max_length=max_length,
        batch_size=math.ceil(len(kept) / 2),
        optim="adamw",
        learning_rate=1e-3,
    )
    result = Trainer(config).fit(write_rows(tmp_path / "pairs.jsonl", rows))
    facts = read_record(result.output_dir)["data"]
    assert facts["num_pairs"] == 60 and facts["num_kept"] == len(kept)
    assert facts["num_dropped"] == {
        "empty": 1,
        "identical": 1,
        "prompt only after cutting": len(sound) - len(kept),
    }
    assert len(sound) - len(kept) > 0
    assert facts["num_truncated"] == sum(length > max_length for length in lengths)
    steps = read_metrics(result.output_dir)
    assert len(steps) == 2 and all(math.isfinite(value) for s in steps for value in s.values())
    assert steps[-1]["num_tokens"] == sum(min(length, max_length) for length in lengths)


def test_fit_with_dropout_trains_and_is_repeated_by_its_seed(llama_dir, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", random_pairs(12))
    settings = {"batch_size": 4, "optim": "adamw", "learning_rate": 1e-2}
    runs = []
    for number, dropout in enumerate((0.5, 0.5, 0.0)):
        torch.manual_seed(number)  # what came before a run must not matter
        config = config_for(
            llama_dir, tmp_path / f"out{number}", lora_dropout=dropout, pack_tokens=512, **settings
        )
        output = Trainer(config).fit(data).output_dir
        assert (read_record(output)["step_zero"] is None) == (dropout > 0)
        runs.append(
            [{n: step[n] for n in (*PER_PAIR, "grad_norm")} for step in read_metrics(output)]
        )
    dropped, again, plain = runs
    assert dropped == again
    assert dropped[0]["loss"] == plain[0]["loss"]  # B is zero: nothing to drop yet
    assert abs(dropped[2]["loss"] - plain[2]["loss"]) > 1e-3
    assert dropped[2]["rewards/margins"] != 0.0
