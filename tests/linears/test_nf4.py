import hashlib
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from lowmem_dpo.linears import nf4
from lowmem_dpo.linears.nf4 import Nf4Weight, quantize_nf4

ROOT = Path(__file__).parents[2]
SHAPES = [(64, 128), (96, 80), (33, 20), (7, 10), (3, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight: Nf4Weight) -> torch.Tensor:
    """The layout's definition, one step at a time."""
    numel = weight.shape[0] * weight.shape[1]
    levels = bnb.get_4bit_type("nf4", device="cpu")
    indices = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).flatten().long()
    code = bnb.create_dynamic_map()
    scale = code[weight.absmax.long()]
    scale = scale * weight.absmax2.repeat_interleave(256)[: len(scale)] + weight.offset
    return (levels[indices] * scale.repeat_interleave(64)[:numel]).view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_nf4_packs_the_codes_of_bitsandbytes(shape, dtype):
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.packed, packed.view(-1))
    # The offset is summed in another precision; the rest follows from it.
    torch.testing.assert_close(ours.offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.absmax2, state.state2.absmax, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(64, 128), (128, 256), (3, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_bitsandbytes_given_its_state(shape, dtype):
    weight = random_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = Nf4Weight(packed.view(-1), state.absmax, state.state2.absmax, state.offset, shape)
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(packed, state))


def test_dequantize_by_bitsandbytes_from_our_state_is_equal():
    ours = quantize_nf4(random_weight((64, 128)))
    second = bnb.QuantState(
        absmax=ours.absmax2, code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32
    )
    state = bnb.QuantState(
        absmax=ours.absmax,
        shape=torch.Size(ours.shape),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        offset=ours.offset,
        state2=second,
    )
    theirs = bnb.dequantize_4bit(ours.packed.view(-1, 1), state)
    assert torch.equal(ours.dequantize(torch.float32), theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_follows_the_layout_even_where_blocks_straddle_rows(shape):
    ours = quantize_nf4(random_weight(shape))
    assert torch.equal(ours.dequantize(torch.float32), by_hand(ours))
    assert torch.equal(ours.dequantize(torch.float64), by_hand(ours).double())


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_near_the_weight(shape):
    weight = random_weight(shape)
    error = quantize_nf4(weight).dequantize(torch.float32) - weight
    assert error.pow(2).mean().sqrt() < 0.15
    assert error.abs().max() < 0.6


@pytest.mark.parametrize(
    "device, chunk", [("cpu", "_CHUNK"), pytest.param("cuda", "_CARD_CHUNK", marks=pytest.mark.gpu)]
)
def test_quantize_nf4_does_not_depend_on_its_chunks(device, chunk, monkeypatch):
    weight = random_weight((130, 36)).to(device)
    whole = quantize_nf4(weight)
    monkeypatch.setattr(nf4, chunk, 192)
    pieces = quantize_nf4(weight)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, getattr(pieces, name)), name


@pytest.mark.slow
def test_quantize_nf4_does_not_depend_on_the_number_of_threads():
    weight = random_weight((2048, 4096))  # enough blocks for torch to split their sum
    before = torch.get_num_threads()
    digests = set()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            ours = quantize_nf4(weight)
            content = b"".join(buffer.numpy().tobytes() for buffer in ours.buffers())
            digests.add(hashlib.sha256(content).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_quantize_nf4_takes_a_transposed_view_and_zero_blocks():
    weight = random_weight((128, 64)).T
    assert torch.equal(quantize_nf4(weight).packed, quantize_nf4(weight.contiguous()).packed)
    zeros = torch.zeros(64, 64)
    assert torch.equal(quantize_nf4(zeros).dequantize(torch.float32), zeros)


def test_nbytes_is_4_127_bits_a_number():
    weight = quantize_nf4(random_weight((512, 1024)))
    assert weight.nbytes * 8 / (512 * 1024) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4, 4), (0, 4)])
def test_quantize_nf4_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"NF4 needs a matrix.*quantization none"):
        quantize_nf4(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_nf4_refuses_what_is_not_finite(value):
    weight = random_weight((8, 64))
    weight[3, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(weight)


@pytest.mark.parametrize("fault", ["", "two levels", "one level", "no kernel image"])
def test_a_kernel_that_differs_from_bitsandbytes_fails_its_trial(fault, monkeypatch, capsys):
    def kernel(weight, dtype):
        if fault == "no kernel image":
            raise RuntimeError(fault)
        levels = "two levels" if weight.absmax2 is not None else "one level"
        return weight._dequantize_by_bitsandbytes(dtype) + (2.0**-20 if levels == fault else 0)

    monkeypatch.setattr(Nf4Weight, "_dequantize_by_kernel", kernel)
    agree = [nf4._kernel_agrees(torch.device("cpu"), torch.float32, b) for b in (True, False)]
    wrong = {"": [True, True], "two levels": [False, True], "one level": [True, False]}
    assert agree == wrong.get(fault, [False, False])
    said = capsys.readouterr().out
    assert ("bitsandbytes is used" in said) == bool(fault)
    assert fault in said


@pytest.mark.parametrize("agrees", [False, True])
def test_a_kernel_is_used_on_a_card_if_it_passes_its_trial(agrees, monkeypatch):
    asked = []
    monkeypatch.setattr(nf4, "runs_triton", lambda device: True)
    monkeypatch.setattr(nf4, "_kernel_agrees", lambda *case: asked.append(case) or agrees)
    nf4._has_kernel.cache_clear()
    case = torch.device("cuda"), torch.bfloat16, True
    found = [nf4._has_kernel(*case) for _ in range(2)]
    nf4._has_kernel.cache_clear()
    assert found == [agrees, agrees]
    assert asked == [case]


def test_nf4_is_imported_without_bitsandbytes():
    code = """
import sys
sys.modules["bitsandbytes"] = None
from lowmem_dpo.linears.lora import LoraLinear
from lowmem_dpo.linears.nf4 import BLOCK, Nf4Weight
"""
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
