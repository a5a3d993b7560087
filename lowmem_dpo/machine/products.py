"""Products of half operands that add up in fp32, on cards that have them.

Layers of one input are one function where these are right: gradients of adapters are added to what
is there by the product that makes them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lowmem_dpo.machine.trial import check_error, once_a_device, passes_trial
from lowmem_dpo_kernels.token_logps_pass import pass_numerics


def add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling * left^T right to a total [R, C], fp32; left is [N, R], right [N, C]."""
    options: Any = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    torch.addmm(total, left.T, right, alpha=scaling, out=total, **options)


@once_a_device
def joins_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers of one input are one function here: on cards, after a trial.

    Args:
        device: Where they compute.
        dtype: In what they compute.
    """
    is_fit = device.type == "cuda" and dtype != torch.float64
    if not is_fit or pass_numerics(device, dtype)[2] != dtype:
        return False
    trial = functools.partial(_try_products, device, dtype)
    products = "products that add up in fp32"
    return passes_trial(trial, "head", products, device, "each product by itself")


def _try_products(device: torch.device, dtype: torch.dtype) -> None:
    """Add products to a total, from columns of a tensor, and overwrite the columns by another."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 128, 48, generator=generator).to(device, dtype)
    total, part = torch.zeros(16, 48, device=device), left[:, 16:32]
    for _ in range(2):
        add_product(total, part, right, 0.5)
    check_error(total, part.float().T @ right.float(), 1e-3, "a sum of products")
    part.fill_(torch.nan).addmm_(right, total.T.to(dtype), beta=0, alpha=0.5)
    check_error(part, 0.5 * right.float() @ total.T, 0.02, "a product in columns")
