"""What the training loop works on, and how its parts are checked, planned and scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem_dpo.console import say
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.selfcheck import check_packing, logp_tolerance
from lowmem_dpo.packs.packing import choose_pack_tokens, pack_trees, round_up_tokens
from lowmem_dpo.packs.trees import Tree
from lowmem_dpo.reference.cache import ReferenceCache
from lowmem_dpo.reference.fill import Reference, prepare_reference
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo.training.batches import Batches
from lowmem_dpo.training.pairs import Pairs
from lowmem_dpo.training.policy import Policy

# Activations of one layer at this size fit small cards; larger micro-batches gain little.
PACK_TOKENS_LIMIT = 4096


@dataclass(frozen=True)
class Run:
    """Everything the training loop works on.

    Attributes:
        policy: The model.
        pairs: The data.
        batches: Which pairs each step takes.
        objective: What is minimised.
        pack_tokens: Tokens per micro-batch.
        self_check_rms: Packed trees against plain sequences, nat rms per token.
        reference: Log-probs of the policy at the start; None in a reference-free run.
    """

    policy: Policy
    pairs: Pairs
    batches: Batches
    objective: Objective
    pack_tokens: int
    self_check_rms: float
    reference: Reference | None = None

    @property
    def has_step_zero(self) -> bool:
        """Whether policy and reference must agree at the first step."""
        adapter = self.policy.adapter
        return self.reference is not None and adapter is not None and adapter.dropout == 0


def self_check(policy: Policy, trees: Sequence[Tree]) -> float:
    """Compare two packed real trees with four plain sequences; see `model.selfcheck`.

    Returns:
        The difference, nat rms per token.

    Raises:
        RunStopped: If the model is not computed rightly.
    """
    branching = [t for t in trees if t.trunk and t.chosen and t.rejected] or list(trees)
    by_length = sorted(branching, key=lambda tree: tree.num_tokens)
    two = [by_length[0], by_length[-1]]  # faults that grow with position show in the longest
    pack = pack_trees(two, round_up_tokens(sum(tree.num_tokens for tree in two)))[0]
    sequences = [ids for t in pack.trees for ids in (t.trunk + t.chosen, t.trunk + t.rejected)]
    try:
        difference = check_packing(policy.model, pack, sequences, policy.model.dtype)
    except ValueError as error:
        raise RunStopped(str(error)) from None
    say(f"self-check: packed trees equal plain sequences within {difference:.1e} nat per token")
    return difference


def plan_pack_tokens(
    trees: Sequence[Tree],
    policy: Policy,
    cache: ReferenceCache,
    *,
    batch_size: int,
    seed: int,
    wanted: int | None = None,
) -> int:
    """Tokens per micro-batch: as wanted, else as the cached reference was scored, else by lengths.

    Raises:
        ValueError: If the longest pair does not fit.
    """
    longest = max(tree.num_tokens for tree in trees)
    if wanted is not None:
        if wanted < longest:
            raise ValueError(
                f"pack_tokens {wanted} is less than the longest pair ({longest} tokens); "
                "raise it, leave it out, or lower max_length"
            )
        return wanted
    cached = cache.pack_tokens([tree.digest for tree in trees], policy.fingerprint(0))
    if cached is not None and cached >= longest:
        return cached
    limit = max(PACK_TOKENS_LIMIT, round_up_tokens(longest))
    return choose_pack_tokens(trees, batch_size, limit=limit, seed=seed)


@torch.no_grad()
def score_reference(
    trees: Sequence[Tree],
    policy: Policy,
    cache: ReferenceCache,
    pack_tokens: int,
    *,
    accept_other: bool = False,
    seed: int = 0,
) -> Reference:
    """The log-probs of the policy as it stands, from the cache or scored now."""
    return prepare_reference(
        trees,
        lambda pack: score(policy.model, pack),
        cache,
        policy.fingerprint(pack_tokens),
        pack_tokens=pack_tokens,
        tolerance=logp_tolerance(policy.model.dtype),
        accept_other=accept_other,
        seed=seed,
    )
