import pytest
import torch
import torch.nn.functional as F

from lowmem_dpo.model import head as head_module
from lowmem_dpo.model.head import (
    HostHead,
    Int8Head,
    check_tied_head,
    head_to_host,
    quantize_head,
)
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.weights.folders import load_config
from lowmem_dpo.weights.loading import load_model
from lowmem_dpo_kernels import token_logps
from lowmem_dpo_kernels.heads import SlicedWeight
from tests.tiny import save_tiny_model

HEADS = {
    "int8": Int8Head,
    "host": lambda weight, bias: HostHead(weight, bias, weight.device),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 2048)


def make_weight(vocabulary=2500, dim=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(vocabulary, dim, generator=generator)).to(dtype)


@pytest.fixture
def loaded(tmp_path) -> LanguageModel:
    source = str(save_tiny_model(tmp_path / "model"))
    return load_model(
        source,
        config=load_config(source),
        quantization="none",
        dtype=torch.float32,
        device="cpu",
    )


def test_int8_head_rounds_to_127_steps_a_row():
    weight = make_weight()
    weight[7] = 0.0
    weight[8] *= 1000
    head = Int8Head(weight, None)
    dense = torch.cat([part.clone() for part in head.split(1024)])
    half_step = weight.abs().amax(1, keepdim=True) / 254
    assert ((dense - weight).abs() <= half_step * 1.0001).all()
    assert torch.equal(dense[7], torch.zeros(40))
    assert head.codes.nbytes + head.scales.nbytes == 2500 * (40 + 4)


def test_host_head_hands_out_the_weight_itself():
    weight = make_weight(dtype=torch.bfloat16)
    head = HostHead(weight, None, torch.device("cpu"))
    assert torch.equal(torch.cat(list(head.split(512))), weight)
    assert not list(head.buffers())


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_score_as_the_dense_head_of_their_slices(kind, dtype):
    """To the bit, gradient and soft-cap included; rows of the head are caught in passing."""
    head = HEADS[kind](make_weight(dtype=dtype), None)
    assert isinstance(head, SlicedWeight)
    dense = torch.cat([part.clone() for part in head.split(2048)])
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(20, (300,), generator=generator)
    targets = torch.randint(2500, (300,), generator=generator)
    targets[::7] = -100
    results = []
    for weight in (head, dense):
        hidden = torch.randn(20, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
        hidden.requires_grad_()
        logps = token_logps(hidden, rows, weight, targets, logit_softcap=9.0)
        logps.square().sum().backward()
        results.append((logps.detach(), hidden.grad))
        assert torch.equal(
            token_logps(hidden.detach(), rows, weight, targets, logit_softcap=9.0), logps
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("kind", HEADS)
def test_heads_give_logits_for_sampling(kind):
    bias = torch.randn(2500, generator=torch.Generator().manual_seed(1))
    head = HEADS[kind](make_weight(), bias)
    hidden = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(2))
    dense = torch.cat([part.clone() for part in head.split(2048)])
    torch.testing.assert_close(head(hidden), F.linear(hidden, dense, bias))


def test_a_quantised_head_refuses_a_damaged_weight():
    weight = make_weight()
    weight[2300, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite numbers; the checkpoint is damaged$"):
        Int8Head(weight, None)
    weight[2300, 3] = 1e5
    Int8Head(weight, None)
    with pytest.raises(ValueError, match="damaged, or beyond float16: take dtype float32"):
        Int8Head(weight.half(), None)


def test_quantize_head_tells_storage_and_identity(loaded):
    weight = loaded.network.lm_head.weight
    int8 = quantize_head(loaded)
    head = int8.head_weight
    assert isinstance(head, Int8Head) and head is int8.network.lm_head
    (line,) = [row for row in int8.storage if row.kind == "head"]
    assert (line.count, line.format) == (1, "int8, a scale a row")
    assert line.nbytes == weight.numel() + 4 * len(weight)
    assert len({loaded.identity, int8.identity}) == 2


def test_head_to_host_changes_no_number_and_no_identity(loaded):
    weight = loaded.network.lm_head.weight
    moved = head_to_host(loaded)
    assert moved.head_weight is moved.network.lm_head
    assert moved.identity == loaded.identity
    assert torch.equal(next(moved.head_weight.split(4096)), weight)
    (line,) = [row for row in moved.storage if row.kind == "head"]
    assert (line.format, line.nbytes) == ("float32, in host memory", weight.nbytes)


@pytest.mark.parametrize(
    "quantization, place, setting",
    [("int8", "device", "head_quantization"), ("none", "host", "head_weight")],
)
def test_check_tied_head_refuses_what_the_embedding_cannot_be(quantization, place, setting):
    with pytest.raises(ValueError, match=rf"^{setting} .* leave {setting} out$"):
        check_tied_head(quantization, place)
    with pytest.raises(ValueError, match="embedding_weight host cannot be"):
        check_tied_head("none", "device", "host")
    check_tied_head("none", "device")


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [100, 8192, 30000])
def test_host_head_streams_the_weight_to_the_card(vocabulary):
    weight = make_weight(vocabulary, 512, torch.bfloat16)
    head = HostHead(weight, None, torch.device("cuda"))
    for _ in range(3):
        seen = []
        for part in head.split(2048):
            torch.cuda._sleep(10**6)  # work that still reads the slice when the next is asked for
            seen.append(part.clone())
        assert torch.equal(torch.cat(seen).cpu(), weight)


@pytest.mark.gpu
def test_host_head_hands_out_no_slice_before_it_has_come(monkeypatch):
    weight = make_weight(30000, 512, torch.bfloat16)
    head = HostHead(weight, None, torch.device("cuda"))
    copy = torch.Tensor.copy_

    def late(target, source, **settings):
        if target.is_cuda and not source.is_cuda:
            torch.cuda._sleep(10**7)  # on the stream that uploads
        return copy(target, source, **settings)

    monkeypatch.setattr(torch.Tensor, "copy_", late)
    seen = [part.clone() for part in head.split(2048)]
    assert torch.equal(torch.cat(seen).cpu(), weight)
