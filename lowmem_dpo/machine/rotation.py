"""What rotates queries and keys by the angles of their tokens: the kernel, where it may.

Shapes: N tokens, H heads, E head size.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_dpo.machine.trial import once_a_device, passes_trial, value_and_gradients
from lowmem_dpo_kernels import twins
from lowmem_dpo_kernels.triton_support import runs_triton


@once_a_device
def rotation(
    device: torch.device, dtype: torch.dtype, head_size: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`rotary` of x [N, H, E], cos and sin [N, E]: Triton's, or PyTorch's with the same bits.

    Args:
        device: Where it computes.
        dtype: In what it computes.
        head_size: E, which is compiled in.
    """
    if not runs_triton(device):
        return twins.rotary
    trial = functools.partial(_try_rotation, device, dtype, head_size)
    if not passes_trial(trial, "attention", "the rotation's kernel", device, "PyTorch"):
        return twins.rotary
    from lowmem_dpo_kernels.rotary import rotary  # imports triton

    return rotary


def _try_rotation(device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Compare values and gradients with the twin's."""
    from lowmem_dpo_kernels.rotary import rotary  # imports triton

    generator = torch.Generator().manual_seed(0)
    x, upstream, *tables = torch.randn(4, 70, 3, head_size, generator=generator).to(device, dtype)
    cos, sin = (table[:, 0, : head_size // 2].repeat(1, 2) for table in tables)
    results = [value_and_gradients(f, [x], upstream, cos, sin) for f in (rotary, twins.rotary)]
    if not all(map(torch.equal, *results)):
        raise ValueError(f"other numbers than PyTorch's at head size {head_size}")
