"""What rehearsals of large models say, and how long they take: `python benchmarks/rehearsals.py`.

Nothing here is measured on a card: bytes and seconds of a step are rehearsed, for cards that need
not be here; only the time that a rehearsal takes is measured. Pairs are half prompt, half
completion; a step is two micro-batches of one pair.
"""

import argparse
import time

from _common import ROOT, commit

from lowmem_dpo.machine.card_table import find_card
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.packs.packing import CARD_TOKEN_MULTIPLE, round_up_tokens
from lowmem_dpo.settings.configs import TrainConfig
from lowmem_dpo.steps.rehearsed import StepSettings, TreeShape, rehearse, tree_of_shape
from lowmem_dpo.training.policy import adapter_spec
from lowmem_dpo.weights.folders import load_config

CONFIGS = ROOT / "benchmarks" / "configs"
GIB = 2**30


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="llama-3.1-8b,llama-3.1-70b")
    parser.add_argument("--cards", default="RTX 3060,RTX 3090,H100")
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--optim", default="adamw_8bit")
    words = parser.parse_args()
    config = TrainConfig(optim=words.optim)
    settings = StepSettings(config, adapter_spec(config, None), config, config)
    print(f"rehearsed, not measured; commit {commit()}")
    print(
        f"{'model':15}{'card':16}{'length':>7}{'N':>7}{'allocated':>11}{'reserved':>10}"
        f"{'host':>7}{'a step, s':>16}{'rehearsed in, s':>17}"
    )
    for name in words.models.split(","):
        model = load_config(str(CONFIGS / name))
        for card in map(find_card, words.cards.split(",")):
            for length in map(int, words.lengths.split(",")):
                shape = TreeShape(length // 2, length - length // 2, length - length // 2)
                tree = tree_of_shape(shape)
                pack_tokens = round_up_tokens(tree.num_tokens, CARD_TOKEN_MULTIPLE)
                begun = time.perf_counter()
                found = rehearse(
                    model, card, settings, Levers(), [[tree]] * 2, pack_tokens=pack_tokens
                )
                seconds = time.perf_counter() - begun
                low, high = found.seconds
                print(
                    f"{name:15}{card.name:16}{length:7}{pack_tokens:7}"
                    f"{found.peak_allocated_bytes / GIB:11.2f}"
                    f"{found.peak_reserved_bytes / GIB:10.2f}{found.host_bytes / GIB:7.2f}"
                    f"{f'{low:.1f} to {high:.1f}':>16}{seconds:17.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
