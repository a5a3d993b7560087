"""Kernels for training beside frozen weights: a file per operation, plain twins in `reference`.

Needs torch; triton is optional and only used on CUDA cards.
"""

from lowmem_dpo_kernels.token_logps import token_logps, token_logps_path

__all__ = ["token_logps", "token_logps_path"]
