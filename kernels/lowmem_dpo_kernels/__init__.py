"""Kernels for training beside frozen weights: a file per operation, plain twins in `twins`.

Needs torch; triton is optional and only used on CUDA cards.
"""

from lowmem_dpo_kernels.rms_norm import NormKind, rms_norm
from lowmem_dpo_kernels.token_logps import token_logps, token_logps_path
from lowmem_dpo_kernels.tree_attention import tree_attention, tree_attention_path
from lowmem_dpo_kernels.tree_attention_plan import TreeLayout, TreePlan
from lowmem_dpo_kernels.triton_support import triton_problem

NUMERICS_VERSION = 3
"""Goes up when an operation's results change in any bit; numbers cached under another are stale."""

__all__ = [
    "NUMERICS_VERSION",
    "NormKind",
    "TreeLayout",
    "TreePlan",
    "rms_norm",
    "token_logps",
    "token_logps_path",
    "tree_attention",
    "tree_attention_path",
    "triton_problem",
]
