from pathlib import Path

import pytest
import torch

from lowmem_dpo.linears.lora import linear_layers, lora_parameters
from lowmem_dpo.losses.functions import LOSSES
from lowmem_dpo.losses.pairs import LossParameters, PairLogps
from lowmem_dpo.model.scoring import other_attention, score, score_plain
from lowmem_dpo.packs.packing import pack_trees, sequence_logps
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens.trees import TokenPair, build_tree
from tests.policies import policy_for
from tests.tiny import FAMILIES, save_tiny_model

REFERENCE = (-30.0, -31.5)  # any numbers do: they only shift the margins


def token_pairs(seed: int = 0) -> list[TokenPair]:
    """Pairs of every shape: shared completion starts, an empty branch, starts that differ."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return tuple(torch.randint(4, 200, (length,), generator=generator).tolist())

    prompt, other, opening = ids(7), ids(20), ids(3)
    return [
        TokenPair(1, prompt + (201, *ids(6)), prompt + (202, *ids(9)), 7, 7),
        TokenPair(2, other + opening + (201, *ids(4)), other + opening + (202, *ids(2)), 20, 20),
        TokenPair(3, prompt + opening, prompt + opening + ids(5), 7, 7),
        TokenPair(4, other + (203, *ids(5)), other + (204, *ids(3)), 20, 18),
    ]


def packed_loss(policy, trees, num_tokens):
    total = 0.0
    for pack in pack_trees(trees, num_tokens):
        chosen, rejected = sequence_logps(score(policy.model, pack), pack)
        ones = torch.ones_like(chosen)
        logps = PairLogps(chosen, rejected, ones * REFERENCE[0], ones * REFERENCE[1], ones, ones)
        loss = LOSSES["sigmoid"](logps, LossParameters(0.1)).sum() / len(trees)
        loss.backward()
        total += loss.item()
    return total


def plain_loss(policy, pairs):
    """Two sequences a pair, the model's own logits and eager attention, ordinary autograd."""
    total = 0.0
    model = policy.model.network
    with other_attention(policy.model, "eager"):
        for pair in pairs:
            sums = []
            for ids, start in (
                (pair.chosen_ids, pair.chosen_start),
                (pair.rejected_ids, pair.rejected_start),
            ):
                embeddings = model.get_input_embeddings()(torch.tensor(ids)[None])
                logits = model(inputs_embeds=embeddings.requires_grad_(), use_cache=False).logits[0]
                logps = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
                sums.append(logps[start - 1 :].sum())
            h = (sums[0] - REFERENCE[0]) - (sums[1] - REFERENCE[1])
            loss = -torch.nn.functional.logsigmoid(0.1 * h) / len(pairs)
            loss.backward()
            total += loss.item()
    return total


def take_gradients(policy):
    gradients = {}
    for name, parameter in lora_parameters(policy.model.network).items():
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


@pytest.fixture(params=FAMILIES)
def policy(request, tmp_path: Path):
    extra = {"attention_bias": True} if request.param == "llama" else {}
    directory = save_tiny_model(tmp_path / "model", request.param, **extra)
    config = TrainConfig(model=str(directory), quantization="nf4", lora_r=4, max_length=128)
    policy = policy_for(config)
    torch.manual_seed(3)
    for name, parameter in lora_parameters(policy.model.network).items():
        if name.endswith("lora_b"):  # or lora_a would have no gradient to compare
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


@pytest.mark.parametrize("num_tokens", [64, 192])
def test_score_of_packed_trees_equals_plain_sequences_in_loss_and_every_gradient(
    policy, num_tokens
):
    pairs = token_pairs()
    loss = packed_loss(policy, [build_tree(pair) for pair in pairs], num_tokens)
    gradients = take_gradients(policy)
    wanted_loss = plain_loss(policy, pairs)
    wanted = take_gradients(policy)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys() and len(gradients) == 2 * len(
        linear_layers(policy.model.network)
    )
    for name, gradient in gradients.items():
        assert wanted[name].norm() > 0, name
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error < 2e-5, (name, error)


def test_score_plain_gives_the_log_probs_of_the_models_own_logits(policy):
    ids = token_pairs()[1].chosen_ids
    with other_attention(policy.model, "eager"), torch.no_grad():
        logits = policy.model.network(torch.tensor(ids)[None], use_cache=False).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    torch.testing.assert_close(score_plain(policy.model, ids), wanted, rtol=1e-5, atol=1e-5)


def test_score_gives_the_same_bits_with_and_without_gradient_in_any_order(policy):
    trees = [build_tree(pair) for pair in token_pairs()]
    by_row = {}
    for order, gradient in ((trees, True), (trees, False), (trees[::-1], False)):
        with torch.set_grad_enabled(gradient):
            for pack in pack_trees(order, 192):
                logps = score(policy.model, pack).detach()
                runs = logps.split([sum(counts) for counts in pack.counts])
                for tree, run in zip(pack.trees, runs, strict=True):
                    assert torch.equal(by_row.setdefault(tree.row, run), run)
    assert len(by_row) == 4
