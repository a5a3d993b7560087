"""Four-bit weights: NF4 with double quantisation, in bitsandbytes' layout.

A weight is cut, row by row, into blocks of 64 numbers. Each block keeps its largest magnitude
(absmax) and, for each number, the nearest of 16 levels that are even quantiles of a normal
distribution. The absmax are quantised themselves: their mean (offset) is taken off, and blocks of
256 of them keep one fp32 absmax and an 8-bit code each. That is 4.127 bits a number:

    weight[i] = level[packed[i]] * scale[i // 64]
    scale[j]  = code[absmax[j]] * absmax2[j // 256] + offset

The first number of a pair is in the high half of its byte. Levels, rounding and layout are those of
bitsandbytes, whose functions do the arithmetic; importing them takes seconds, so that waits until
they are needed. On CUDA with Triton, `lowmem_dpo_kernels.nf4` undoes both levels in one kernel, to
the same bits. Checkpoints may leave the second level out: then absmax are the scales, in fp32, and
it is 4.5 bits a number.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), sections 3 and 4.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowmem_dpo.machine.trial import once_a_device, passes_trial
from lowmem_dpo.memory.weight_files import FileRange, WeightFile
from lowmem_dpo.memory.weight_slots import Lease
from lowmem_dpo_kernels.triton_support import runs_triton
from lowmem_dpo_kernels.twins import NF4_BLOCK

QUANTISER_VERSION = 1
"""Raised whenever the same weight would be stored as other bytes."""

BLOCK, BLOCK2 = NF4_BLOCK, 256

# Numbers quantised at a time: bitsandbytes' temporaries are about 20 bytes a number on the CPU.
# Larger ones left the C allocator's heap full of holes, which count as memory of the process. On a
# card, where they are a byte and a half, launches take more time than the work unless it is long.
_CHUNK, _CARD_CHUNK = 2**16, 2**24


class Nf4Weight(nn.Module):
    """A frozen weight [out, in] in NF4.

    Args:
        packed: [out * in / 2] uint8, two levels a byte.
        absmax: [ceil(out * in / 64)] uint8, codes of the blocks' absmax; or fp32, the absmax
            themselves, where the second level is left out.
        absmax2: [ceil(len(absmax) / 256)] fp32, or None.
        offset: [] fp32, or None.
        shape: (out, in).
        code: [256] fp32, what absmax's codes stand for; None for bitsandbytes' present table.

    Attributes:
        nbytes: Bytes that the weight takes.
        may_use_kernel: Let a Triton kernel undo both levels on a card, if it is right there.
        lease: Of a weight that is on the device by turns; None of one that stays.
        on_disk: Of one that is read from its files in its turn, where they hold which buffer.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    code: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax2: Tensor | None,
        offset: Tensor | None,
        shape: tuple[int, int],
        code: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("absmax2", absmax2)
        self.register_buffer("offset", offset)
        self.register_buffer("code", code)
        self.shape = shape
        self.nbytes = sum(buffer.nbytes for buffer in self.buffers())
        self.may_use_kernel = True
        self.lease: Lease | None = None
        self.on_disk: dict[str, FileRange] = {}

    def leave_on_disk(self, places: Mapping[str, tuple[WeightFile | None, int]]) -> None:
        """Let go of buffers that are read in the weight's turn from now on.

        Args:
            places: Their files, and their first bytes there.
        """
        for name, (file, start) in places.items():
            buffer = self.get_buffer(name)
            self.on_disk[name] = FileRange(file, start, buffer.dtype, buffer.shape)
            self._buffers[name] = None

    @torch.no_grad()
    def scales(self) -> Tensor:
        """[ceil(out * in / 64)] fp32, a factor a block."""
        from bitsandbytes import functional

        if self.absmax2 is None or self.offset is None:
            return self.absmax
        code = dynamic_code(self.packed.device) if self.code is None else self.code
        scale = functional.dequantize_blockwise(
            self.absmax, absmax=self.absmax2, code=code, blocksize=BLOCK2
        )
        return scale.add_(self.offset)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a new dense tensor.

        Args:
            dtype: Of the result. The product is formed in fp32 and rounded once.

        Returns:
            [out, in], on the weight's device.

        Raises:
            RuntimeError: The weight is read outside of its turn.
        """
        if self.lease is not None:
            self.lease.check()
        exact = self.absmax if self.absmax2 is None else self.absmax2
        assert exact.dtype == torch.float32, "a cast of the model reached the scales of NF4"
        numel = self.shape[0] * self.shape[1]
        case = self.packed.device, dtype, self.absmax2 is not None
        if self.may_use_kernel and numel % 8 == 0 and _has_kernel(*case):
            return self._dequantize_by_kernel(dtype)
        return self._dequantize_by_bitsandbytes(dtype)

    def _dequantize_by_kernel(self, dtype: torch.dtype) -> Tensor:
        from lowmem_dpo_kernels import nf4  # imports triton

        out = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        code = dynamic_code(out.device) if self.code is None else self.code
        state = self.packed, self.absmax, self.absmax2, self.offset
        return nf4.nf4_dequantize(*state, code, nf4_levels(out.device), out)

    def _dequantize_by_bitsandbytes(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes  # noqa: F401  registers the operation

        numel = self.shape[0] * self.shape[1]
        # One block a row: bitsandbytes' CPU kernel misplaces the scales where blocks straddle rows.
        rows = (numel // BLOCK, BLOCK) if numel % BLOCK == 0 else (1, numel)
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        dense = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed.view(-1, 1), self.scales(), BLOCK, "nf4", rows, kernel_dtype
        )
        return dense.view(self.shape).to(dtype)

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        return f"{self.shape[0]}, {self.shape[1]}"


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> Nf4Weight:
    """Quantise a weight on its own device, with temporaries that do not grow with it.

    Args:
        weight: [out, in], floating point.

    Returns:
        The weight in NF4; its packed codes are those of `bitsandbytes.functional.quantize_4bit`,
        and all of it is the same whatever the number of threads.

    Raises:
        ValueError: If the weight is not a matrix, has an odd number of elements, or is not finite.
    """
    from bitsandbytes import functional

    if weight.ndim != 2 or weight.numel() % 2 or not weight.numel():
        raise ValueError(
            "NF4 needs a matrix with an even number of elements, "
            f"got shape {list(weight.shape)}; use quantization none"
        )
    flat = weight.reshape(-1)
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    step = _CHUNK if weight.device.type == "cpu" else _CARD_CHUNK
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        if chunk.dtype == torch.float64:
            chunk = chunk.float()
        finite &= chunk.isfinite().all()  # a maximum may pass over NaN
        codes, state = functional.quantize_4bit(chunk, blocksize=BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + codes.numel()] = codes.view(-1)
        absmax[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    if not finite:
        raise ValueError("the weight holds NaN or infinite numbers; the checkpoint is damaged")
    # Summed in float64, the order of the sum (threads, device) is lost in the rounding to fp32.
    offset = absmax.double().mean().float()
    absmax_codes, state = functional.quantize_blockwise(
        absmax - offset, code=dynamic_code(weight.device), blocksize=BLOCK2
    )
    return Nf4Weight(packed, absmax_codes, state.absmax, offset, (weight.shape[0], weight.shape[1]))


@once_a_device
def _has_kernel(device: torch.device, dtype: torch.dtype, is_double: bool) -> bool:
    """Whether a kernel of ours undoes one level here, or both, with the bits of bitsandbytes."""
    if dtype == torch.float64 or not runs_triton(device):
        return False
    return _kernel_agrees(device, dtype, is_double)


def _kernel_agrees(device: torch.device, dtype: torch.dtype, is_double: bool) -> bool:
    trial = functools.partial(_try_kernel, device, dtype, is_double)
    return passes_trial(trial, "nf4", "the NF4 kernels", device, "bitsandbytes")


def _try_kernel(device: torch.device, dtype: torch.dtype, is_double: bool) -> None:
    """Compare bits with bitsandbytes, from scales of two levels or of one.

    Wrong weights would be wrong in every later check alike, so unseen.
    """
    trial = torch.randn(160, 256, generator=torch.Generator().manual_seed(0)).to(device)
    weight = quantize_nf4(trial)  # of several blocks of the second level
    if not is_double:
        weight = Nf4Weight(weight.packed, weight.scales(), None, None, weight.shape)
    if not torch.equal(
        weight._dequantize_by_kernel(dtype), weight._dequantize_by_bitsandbytes(dtype)
    ):
        levels = "two levels" if is_double else "one level"
        raise ValueError(f"other numbers than bitsandbytes' from scales of {levels}")


@once_a_device
def nf4_levels(device: torch.device) -> Tensor:
    """The 16 levels: [16] fp32."""
    from bitsandbytes import functional

    return functional.get_4bit_type("nf4", device=str(device))


@once_a_device
def dynamic_code(device: torch.device) -> Tensor:
    """The 256 values of the second level's codes, signed and finest near zero: [256] fp32."""
    from bitsandbytes import functional

    return functional.create_dynamic_map().to(device)
