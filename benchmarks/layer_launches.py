"""Launches of one decoder layer on a card that need not be there, forth and back, by what they are.

    python benchmarks/layer_launches.py
    python benchmarks/layer_launches.py --tokens 4096 --output /tmp/layer_launches.json

The layer is the one that trains: NF4, an adapter on every linear, bf16, our kernels for all that
has one, at the shape of Llama-3.1-8B. Its tensors are without memory (torch's FakeTensorMode), so
nothing is computed, and every operation that would start a kernel counts as one: those of torch but
for views and empty tensors, and launches of Triton kernels. Products are counted once, although
cuBLAS may split one in two. Columns: the forward pass; the second run with the backward pass; and
what the first micro-batch of a step adds to both. That is not only casts: later ones add to
gradients that are there.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _common import commit, write_record
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from triton.runtime.jit import JITFunction

from lowmem_dpo.linears import lora, nf4
from lowmem_dpo.linears.lora import (
    AdapterSpec,
    add_lora,
    casts_kept,
    dropout_live,
    linear_layers,
    wrap_linears,
)
from lowmem_dpo.model import attention, layer, surgery
from lowmem_dpo.model.families import FAMILIES
from lowmem_dpo_kernels import tree_attention
from lowmem_dpo_kernels.rotary import rotary

# type, hidden, intermediate, query heads, key heads, head size
SHAPES = {
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 8, 128),
    "qwen3-8b": ("qwen3", 4096, 12288, 32, 8, 128),
    "gemma-2-9b": ("gemma2", 3584, 14336, 16, 8, 256),
    "phi-4": ("phi3", 5120, 17920, 40, 10, 128),
    "olmo-2-7b": ("olmo2", 4096, 11008, 32, 32, 128),
    "tiny": ("llama", 128, 256, 4, 2, 32),
}
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count one operation of torch."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        makes_nothing = name in NO_LAUNCH or "empty" in name
        if func.namespace == "aten" and not (func.is_view or makes_nothing):
            self.found[name] += 2 if name in TWO_LAUNCHES else 1
        if any(value.alias_info and value.alias_info.is_write for value in func._schema.returns):
            # Nothing is to be written, and torch does not know all of these without a card.
            outs = [kwargs[name] for name in kwargs if name.startswith(("out", "grad_input"))]
            return outs[0] if outs else args[0]
        return func(*args, **kwargs)


def quantise(layers: nn.Module) -> None:
    """Give every linear a weight in NF4, of no particular numbers."""
    for module in linear_layers(layers).values():
        out, width = module.weight.shape
        blocks = out * width // nf4.BLOCK
        del module.weight
        module.weight = nf4.Nf4Weight(
            torch.empty(out * width // 2, dtype=torch.uint8),
            torch.empty(blocks, dtype=torch.uint8),
            torch.empty(-(-blocks // nf4.BLOCK2)),
            torch.empty(()),
            (out, width),
        )


def make_layer(shape: str, dropout: float, tile_rows: int) -> tuple[nn.Module, PreTrainedModel]:
    """One decoder layer, prepared as for training, and the model it is from."""
    model_type, hidden, inner, heads, key_heads, head_size = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wrap_linears(model.model.layers, "model.layers")
    model.requires_grad_(False).eval()
    quantise(model.model.layers)
    adapter = AdapterSpec(16, 32.0, dropout, "all", rank_stabilised=False)
    add_lora(model, adapter, seed=0)
    family = FAMILIES[model_type]
    surgery.replace_norms(model.model, family)
    model.set_attn_implementation(attention.TREE_ATTENTION)
    return layer.DecoderLayer(
        model.model.layers[0],
        family,
        residual_multiplier=1.0,
        inputs_on_host=False,
        has_dropout=False,
        mlp_kernels=(torch.device("cpu"), torch.bfloat16),
        tile_rows=tile_rows,
    ), model


@contextmanager
def pretended_card() -> Iterator[Launches]:
    """Inside, tensors of a card have no memory, kernels passed their trials, launches count."""
    counter = Launches()

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        counter.found[kernel.fn.__name__] += 1

    kernels = sys.modules[tree_attention.__module__]
    replaced: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", run),
        (kernels, "_capability", lambda device: (8, 6)),
        (kernels, "tree_attention_path", lambda *_: "triton"),
        (attention, "_kernel_path", lambda *_: "triton"),
        (attention, "rotation", lambda *_: rotary),
        (lora, "joins_products", lambda *_: True),
        (layer, "joins_products", lambda *_: True),
        (layer, "_kernels_agree", lambda *_: True),
        (surgery, "norm_implementation", lambda *_: "triton"),
        (nf4, "_has_kernel", lambda *_: True),
        (nf4, "dynamic_code", lambda device: torch.empty(256, device=device)),
        (nf4, "nf4_levels", lambda device: torch.empty(16, device=device)),
    ]
    attention._plan.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for where, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(where, name, stand_in))
        yield counter
    attention._plan.cache_clear()


@dataclasses.dataclass
class Counts:
    """Launches by name."""

    forward: Counter[str]
    backward: Counter[str]
    first: Counter[str]  # of the first micro-batch of a step, beyond those of a later one


def count(
    shape: str, num_tokens: int, *, dropout: float = 0.0, tile_rows: int = layer.TILE_ROWS
) -> Counts:
    """Launches of one layer for one micro-batch of one tree."""
    with pretended_card() as counter, counter:
        module, model = make_layer(shape, dropout, tile_rows)
        trunk, chosen = num_tokens // 2, num_tokens // 4
        positions = torch.arange(num_tokens)[None]
        hidden = torch.empty(1, num_tokens, model.config.hidden_size).bfloat16()
        arguments = {
            "position_embeddings": model.model.rotary_emb(hidden, positions),
            "attention_mask": None,
            "tree_layout": ((0, trunk, chosen, num_tokens - trunk - chosen),),
        }
        passes = []
        with casts_kept(model), dropout_live(model):
            for _ in range(2):
                counter.found.clear()
                y = module(hidden.detach().requires_grad_(), **arguments)
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
