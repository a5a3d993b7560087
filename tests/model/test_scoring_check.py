import pytest
import torch

from lowmem_dpo.model import scoring
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.scoring import check_head_kernels, check_packing, with_tried_head_kernels
from lowmem_dpo.packs.packing import pack_trees
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.tokens.trees import build_tree
from tests.model.test_scoring import token_pairs
from tests.policies import policy_for
from tests.tiny import FAMILIES, save_tiny_model


def make_policy(directory, family="llama", **settings):
    model = save_tiny_model(directory / "model", family)
    return policy_for(TrainConfig(model=str(model), device="cpu", max_length=128, **settings))


def wrong_head(monkeypatch, fault):
    """Let the head's kernels go wrong for every caller alike."""
    right = scoring.token_logps

    def token_logps(hidden, *arguments, **settings):
        if settings["implementation"] == "torch":
            return right(hidden, *arguments, **settings)
        if fault == "crash":
            raise RuntimeError("no kernel image")
        if fault == "memory":
            raise torch.OutOfMemoryError("full")
        if fault == "gradients":
            hidden = 0.95 * hidden + 0.05 * hidden.detach()
        logps = right(hidden, *arguments, **settings)
        return logps * (1.1 if fault == "values" else 1.0)

    monkeypatch.setattr(scoring, "token_logps", token_logps)


def packed(pairs):
    trees = [build_tree(pair) for pair in pairs]
    (pack,) = pack_trees(trees, 128)
    return pack, [ids for t in pack.trees for ids in (t.chosen_ids, t.rejected_ids)]


@pytest.mark.parametrize("family", FAMILIES)
def test_check_head_kernels_passes_every_family(tmp_path, family):
    check_head_kernels(make_policy(tmp_path, family).model)


def test_check_head_kernels_passes_a_quantised_head(tmp_path):
    check_head_kernels(make_policy(tmp_path, head_quantization="int8").model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_head_kernels_passes_half_numbers_and_a_bias(tmp_path, dtype):
    model = make_policy(tmp_path).model
    head = model.network.lm_head.to(dtype)
    with torch.no_grad():
        head.weight[7] = 0  # as the rows that only pad a vocabulary
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(head.weight)).to(dtype), False)
    check_head_kernels(LanguageModel.of(model.network, "half"))


@pytest.mark.parametrize(
    "fault, message",
    [
        ("values", "packed and plain sequences differ"),
        ("gradients", "the output head's gradients: relative error 5.0e-02"),
    ],
)
def test_check_packing_sees_a_head_that_is_wrong_for_all(tmp_path, monkeypatch, fault, message):
    policy = make_policy(tmp_path)
    pack, sequences = packed(token_pairs()[:2])
    assert check_packing(policy.model, pack, sequences) < 1e-4
    wrong_head(monkeypatch, fault)
    with pytest.raises(ValueError, match=f"self-check failed: {message}"):
        check_packing(policy.model, pack, sequences)


@pytest.mark.parametrize("fault", ["", "values", "gradients", "crash"])
def test_the_head_takes_torchs_products_where_the_kernels_are_wrong(
    tmp_path, monkeypatch, capsys, fault
):
    model = make_policy(tmp_path).model
    monkeypatch.setattr(scoring, "token_logps_path", lambda *_: "triton, blocks of 1 rows")
    wrong_head(monkeypatch, fault)
    assert with_tried_head_kernels(model).head_implementation == ("torch" if fault else "auto")
    assert ("the output head's triton kernels failed" in capsys.readouterr().out) == bool(fault)


def test_with_tried_head_kernels_takes_no_other_path_because_a_card_is_full(tmp_path, monkeypatch):
    model = make_policy(tmp_path).model
    monkeypatch.setattr(scoring, "token_logps_path", lambda *_: "triton, blocks of 1 rows")
    wrong_head(monkeypatch, "memory")
    with pytest.raises(torch.OutOfMemoryError):
        with_tried_head_kernels(model)
