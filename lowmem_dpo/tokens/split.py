"""Hold pairs out for evaluation, by prompt: no prompt is on both sides."""

import random
from collections.abc import Sequence

from lowmem_dpo.tokens.trees import Tree


def split_by_prompt(
    pairs: Sequence[Tree], fraction: float, seed: int
) -> tuple[list[Tree], list[Tree]]:
    """Draw prompts at random until their pairs are the wanted share of all pairs.

    Args:
        pairs: Tokenised pairs.
        fraction: Share to hold out, in [0, 1).
        seed: Of the draw.

    Returns:
        The pairs to train on and the pairs held out, each in the given order.

    Raises:
        ValueError: If one of the two sides would be empty.
    """
    if fraction == 0:
        return list(pairs), []
    groups: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.prompt_key, []).append(i)
    prompts = list(groups)
    random.Random(seed).shuffle(prompts)
    held_out: set[int] = set()
    for prompt in prompts:
        if len(held_out) >= fraction * len(pairs):
            break
        held_out.update(groups[prompt])
    if not held_out or len(held_out) == len(pairs):
        raise ValueError(
            f"eval_fraction {fraction} of {len(pairs)} pairs with {len(prompts)} distinct prompts "
            "leaves one side empty; give eval_data instead, or change the fraction"
        )
    train = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return train, [pairs[i] for i in sorted(held_out)]
