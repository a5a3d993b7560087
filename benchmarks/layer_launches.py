"""Launches of one decoder layer on a card that need not be there, forth and back, by what they are.

    python benchmarks/layer_launches.py
    python benchmarks/layer_launches.py --tokens 4096 --output /tmp/layer_launches.json

The layer is the one that trains: NF4, an adapter on every linear, bf16, our kernels for all that
has one, at the shape of Llama-3.1-8B. It is rehearsed (`lowmem_dpo.memory.fake_card`), so nothing
is computed, and every operation that would start a kernel counts as one: those of torch but for
views and empty tensors, and launches of Triton kernels. Products are counted once, although
cuBLAS may split one in two. Columns: the forward pass; the second run with the backward pass; and
what the first micro-batch of a step adds to both. That is not only casts: later ones add to
gradients that are there, and find attention's tables, which all layers share.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import layer_memory
import torch
from _common import commit, write_record
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from lowmem_dpo.linears.lora import AdapterSpec, casts_kept, dropout_live
from lowmem_dpo.linears.nf4 import dynamic_code, nf4_levels
from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.memory.trace import storage_id
from lowmem_dpo.model.layer import TILE_ROWS, DecoderLayer
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.weights.loading import unfilled_model
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing

SHAPES = layer_memory.SHAPES | {"tiny": ("llama", 128, 256, 4, 2, 32)}
CAPABILITY = (8, 6)
NO_LAUNCH = {"detach", "alias", "_unsafe_view", "lift_fresh"}
TWO_LAUNCHES = {"slice_backward", "select_backward"}  # zeros, and a copy into them


class Launches(TorchDispatchMode):
    """Counts what would start a kernel.

    Attributes:
        found: Launches by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note_launch(self, kernel: str, *_: Any) -> None:
        """Count one Triton kernel."""
        self.found[kernel] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operation of torch."""
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        makes_nothing = name in NO_LAUNCH or "empty" in name
        if name == "_to_copy":  # to where it is: in a rehearsal torch's C++ does not know
            makes_nothing = storage_id(result) == storage_id(args[0])
        if func.namespace == "aten" and not (func.is_view or makes_nothing):
            self.found[name] += 2 if name in TWO_LAUNCHES else 1
        return result


@dataclasses.dataclass
class Counts:
    """Launches by name."""

    forward: Counter[str]
    backward: Counter[str]
    first: Counter[str]  # of the first micro-batch of a step, beyond those of a later one


def count(
    shape: str, num_tokens: int, *, dropout: float = 0.0, tile_rows: int = TILE_ROWS
) -> Counts:
    """Launches of one layer for one micro-batch of one tree."""
    model_type, hidden_size, inner, heads, key_heads, head_size = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size,
        pad_token_id=None,
        eos_token_id=None,
    )
    counter, mode = Launches(), FakeCard()
    with rehearsing(RehearsedCard(CAPABILITY, counter.note_launch)):
        dtype = torch.bfloat16
        model = unfilled_model(config, quantization="nf4", dtype=dtype, device=CARD, mode=mode)
        with mode, counter:
            dynamic_code(CARD), nf4_levels(CARD)  # made once for all layers
            adapter = AdapterSpec(16, 32.0, dropout, "all", rank_stabilised=False)
            model = prepare_model(model, adapter)
            layer = model.layers[0]
            assert isinstance(layer, DecoderLayer)
            layer.token_wise.tile_rows = tile_rows
            trunk, chosen = num_tokens // 2, num_tokens // 4
            hidden = torch.empty(1, num_tokens, hidden_size, dtype=dtype, device=CARD)
            positions = torch.arange(num_tokens, device=CARD)[None]
            arguments = {
                "position_embeddings": model.backbone.rotary_emb(hidden, positions),
                "attention_mask": None,
                "tree_layout": ((0, trunk, chosen, num_tokens - trunk - chosen),),
            }
            passes = []
            with casts_kept(model.network), dropout_live(model.network):
                for _ in range(2):
                    counter.found.clear()
                    y = layer(hidden.detach().requires_grad_(), **arguments)
                    passes.append(counter.found.copy())
                    counter.found.clear()
                    torch.autograd.backward(y, torch.empty_like(y))
                    passes.append(counter.found.copy())
    first = passes[0] + passes[1] - passes[2] - passes[3]
    return Counts(passes[2], passes[3], first)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=2048, help="of the micro-batch")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    counts = count(options.shape, options.tokens, dropout=options.dropout)
    columns = [counts.forward, counts.backward, counts.first]
    print(f"{options.shape}, {options.tokens} tokens, commit {commit()}")
    print(f"{'launch':<28} {'forward':>8} {'backward':>8} {'first':>8}")
    for name in sorted(set().union(*columns)):
        print(f"{name:<28}" + "".join(f" {column[name]:>8}" for column in columns))
    print(f"{'sum':<28}" + "".join(f" {column.total():>8}" for column in columns))
    if options.output:
        settings = {"shape": options.shape, "tokens": options.tokens, "dropout": options.dropout}
        results = [dict(sorted(column.items())) for column in columns]
        names = ("forward", "backward", "first")
        rows = [
            {"pass": name, "launches": sum(result.values()), "by_name": result}
            for name, result in zip(names, results, strict=True)
        ]
        write_record(options.output, "layer_launches", torch.device("cpu"), settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
