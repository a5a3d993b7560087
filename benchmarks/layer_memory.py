"""Memory inside one decoder layer: what is alive when most is, by what made it.

A layer's input waits for the backward pass and nothing else, so the peak of a step is the inside of
one layer while it runs again and is differentiated. Here that one layer runs as in training, dense,
with an adapter on every linear, over one causal sequence, and every tensor is followed from its
making to its end: transformers' layer under torch's checkpointing (plain), ours with transformers'
norms (halves), and ours (halves + norms). The tokens are few: bytes a token are the slope between
two lengths, which takes what does not grow (a dequantised weight, gradients of adapters) out of
them. A tile of the MLP is such a constant too, and small enough to be one here.

    python benchmarks/layer_memory.py
    python benchmarks/layer_memory.py --shape gemma-2-9b --causes
    python benchmarks/layer_memory.py --rounds 5 --scale 4

On a CPU all of it is exact but for what PyTorch's operations allocate inside themselves, and the
shape is divided by `--scale` (bytes are scaled up again). On CUDA the peak is the allocator's.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from _common import StepClock, commit, device_name
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from lowmem_dpo.linears import lora
from lowmem_dpo.linears.lora import AdapterSpec, add_lora, wrap_linears
from lowmem_dpo.model import layer as layers
from lowmem_dpo.model.families import FAMILIES
from lowmem_dpo.model.layer import TILE_ROWS, DecoderLayer
from lowmem_dpo.model.surgery import replace_norms
from lowmem_dpo_kernels import rms_norm

SMALL_TILE_ROWS = 64
ONE_SEQUENCE = "layer_memory"
VARIANTS = ("plain", "halves", "halves + norms")

# type, hidden, intermediate, query heads, key heads, head size
SHAPES = {
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 8, 128),
    "qwen3-8b": ("qwen3", 4096, 12288, 32, 8, 128),
    "gemma-2-9b": ("gemma2", 3584, 14336, 16, 8, 256),
    "phi-4": ("phi3", 5120, 17920, 40, 10, 128),
    "olmo-2-7b": ("olmo2", 4096, 11008, 32, 32, 128),
}


def make_layer(options: argparse.Namespace, variant: str) -> tuple[nn.Module, PreTrainedModel]:
    """One decoder layer with its adapter, and the model it is from."""
    model_type, hidden, inner, heads, key_heads, head_size = SHAPES[options.shape]
    scale = options.scale
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=hidden // scale,
        intermediate_size=inner // scale,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_size // scale,
        pad_token_id=None,
        eos_token_id=None,
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=options.dtype)
    wrap_linears(model.model.layers, "model.layers")
    model.requires_grad_(False).eval()
    adapter = AdapterSpec(max(1, 16 // scale), 16, 0.0, "all", rank_stabilised=False)
    add_lora(model, adapter, seed=0)
    model.set_attn_implementation(ONE_SEQUENCE)
    layer, family = model.model.layers[0], FAMILIES[config.model_type]
    if variant == "plain":
        return layer, model
    if variant == "halves + norms":
        replace_norms(layer, family)
    halves = DecoderLayer(
        layer,
        family,
        residual_multiplier=1.0,
        inputs_on_host=False,
        has_dropout=False,
        tile_rows=options.tile_rows,
    )
    return halves, model


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **rest: Any) -> Any:
    """Causal attention that keeps q, k, v, its output and a number a row, as the kernels do."""
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=rest["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(ONE_SEQUENCE, attend)
AttentionMaskInterface.register(ONE_SEQUENCE, lambda *args, **kwargs: None)


class LiveTensors(TorchDispatchMode):
    """Follows what operations make, until it is freed.

    Args:
        layer: What runs. Its own tensors are left out.

    Attributes:
        peak: Most bytes alive at a time.
        at_peak: These bytes by what made them: a module, or a node of the backward pass.
        where: What ran at that moment.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.peak, self.where = 0, ""
        self.at_peak: Counter[str] = Counter()
        self.inside: list[str] = []
        self.live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        for tensor in [*layer.parameters(), *layer.buffers()]:
            self.add(tensor, "", 0)
        for name, module in layer.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
                module.register_forward_hook(lambda *_: self.inside.pop() and None)

    def add(self, tensor: Tensor, cause: str, nbytes: int | None = None) -> None:
        """Follow a tensor's memory, unless it is followed already."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self.live:
            nbytes = storage.nbytes() if nbytes is None else nbytes
            self.live[reference.cdata] = (reference, nbytes, cause)

    def cause(self) -> str:
        """Where the computation is."""
        if self.inside:
            return self.inside[-1]
        node = torch._C._current_autograd_node()
        return "layer" if node is None else f"gradients: {node.name()}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and look at what is alive after it."""
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.add(tensor, self.cause())
        alive = sum(nbytes for _, nbytes, _ in self.live.values())
        if alive > self.peak:
            self.peak, self.where = alive, self.cause()
            self.at_peak = Counter()
            for _, nbytes, cause in self.live.values():
                self.at_peak[cause] += nbytes
        return result


def join_layers() -> None:
    """Let layers of one input be one function as on a card; in fp32, a CPU has them too."""
    for module in (lora, layers):
        module.joins_products = lambda device, dtype: True  # type: ignore[attr-defined]


def shrink_blocks() -> None:
    """Blocks of rows as small, beside these tokens, as they are beside those of a real pack."""
    sys.modules[rms_norm.__module__]._BLOCK_NUMBERS = 1  # type: ignore[attr-defined]


@dataclasses.dataclass
class Peak:
    """Most bytes alive, and on a CPU by what made them."""

    total: int
    causes: Counter[str] = dataclasses.field(default_factory=Counter)
    where: str = ""


class Pass:
    """A layer with what it is run on.

    Args:
        options: Shape, dtype and device.
        variant: One of `VARIANTS`.
        num_tokens: N.
    """

    def __init__(self, options: argparse.Namespace, variant: str, num_tokens: int) -> None:
        torch.manual_seed(0)
        self.layer, model = make_layer(options, variant)
        self.is_plain = variant == "plain"
        shape = (1, num_tokens, model.config.hidden_size)
        self.hidden = torch.randn(shape, dtype=options.dtype, device=options.device)
        self.hidden.requires_grad_()
        self.upstream = torch.randn_like(self.hidden)
        positions = torch.arange(num_tokens, device=options.device)[None]
        self.arguments = {
            "position_embeddings": model.model.rotary_emb(self.hidden, positions),
            "position_ids": positions,
            "attention_mask": None,
        }
        if not self.is_plain:
            self.arguments["tree_layout"] = ((0, num_tokens, 0, 0),)

    def run(self) -> None:
        """Forth and back; the output is gone by then, as in training, its gradient is there."""
        if self.is_plain:
            layer = functools.partial(self.layer, **self.arguments)
            y = checkpoint(layer, self.hidden, use_reentrant=True)
        else:
            y = self.layer(self.hidden, **self.arguments)
        edge = get_gradient_edge(y)
        del y
        torch.autograd.backward(edge, self.upstream.clone())

    def peak(self) -> Peak:
        """Most bytes alive, beyond the layer's own and its input."""
        device = self.hidden.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.run()
            return Peak(torch.cuda.max_memory_allocated(device) - before)
        live = LiveTensors(self.layer)
        rotary = self.arguments["position_embeddings"]
        for tensor in (self.hidden, self.upstream, *rotary, self.arguments["position_ids"]):
            live.add(tensor, "", 0)
        with live:
            self.run()
        return Peak(live.peak, live.at_peak, live.where)

    def gradients(self) -> list[Tensor]:
        """Of the input and of every adapter matrix, after one run."""
        self.run()
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        return [t.grad for t in (self.hidden, *parameters) if t.grad is not None]


def check(options: argparse.Namespace) -> None:
    """Stop if gradients differ by more than rounding: no figure of a wrong result."""
    exact = argparse.Namespace(**vars(options) | {"dtype": torch.float32})
    plain, *ours = (Pass(exact, variant, 100).gradients() for variant in VARIANTS)
    for gradients in ours:
        for got, want in zip(gradients, plain, strict=True):
            if not (got - want).norm() <= 1e-4 * want.norm():
                raise SystemExit("the halves change the gradients; not measured")


def kilobytes_per_token(options: argparse.Namespace, variant: str) -> dict[str, float]:
    """The peak's slope between N and 2 N tokens, by cause, at the shape's true size."""
    short, long = (Pass(options, variant, n * options.tokens).peak() for n in (1, 2))
    factor = options.scale / options.tokens / 1000
    causes = {c: (long.causes[c] - short.causes[c]) * factor for c in long.causes}
    return {f"peak, in {long.where}": (long.total - short.total) * factor} | {
        cause: value for cause, value in sorted(causes.items(), key=lambda i: -i[1]) if value > 0.05
    }


def times(options: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of each variant's runs, in rounds of one run each; the first is left out."""
    passes = [Pass(options, variant, options.time_tokens) for variant in VARIANTS]
    clock = StepClock(options.device)
    for _ in range(options.rounds + 1):
        for each in passes:
            clock.start()
            each.run()
            clock.stop()
    return [clock.steps_ms[len(passes) + i :: len(passes)] for i in range(len(passes))]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scale", type=int, default=16, help="divides hidden and MLP sizes")
    parser.add_argument("--tokens", type=int, default=256, help="of the shorter run for memory")
    parser.add_argument("--time_tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=0, help="measure times, so many of each")
    parser.add_argument(
        "--one_tile", action="store_true", help="memory of packs no longer than a tile"
    )
    parser.add_argument("--joined", action="store_true", help="layers as on a card, in fp32")
    parser.add_argument("--causes", action="store_true", help="what the peak is made of")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    options.tile_rows = TILE_ROWS
    if options.joined:
        options.dtype = torch.float32
        join_layers()
    return options


def main() -> None:
    """Print the table."""
    options = parse()
    check(options)
    print(f"{options.shape} on {device_name(options.device)}, commit {commit()}")
    if options.rounds:
        found = times(options)
        print(f"{'layer':<22} {'ms':>9} {'over plain':>10}")
        for variant, ms in zip(VARIANTS, found, strict=True):
            ratio = statistics.median(a / b for a, b in zip(ms, found[0], strict=True))
            print(f"{variant:<22} {statistics.median(ms):>9.1f} {ratio:>10.3f}")
        return
    shrink_blocks()
    options.tile_rows = 2 * options.tokens if options.one_tile else SMALL_TILE_ROWS
    print(f"{'layer':<22} {'kB a token':>10}")
    for variant in VARIANTS:
        (where, peak), *causes = kilobytes_per_token(options, variant).items()
        print(f"{variant:<22} {peak:>10.1f}  {where}")
        for name, value in causes if options.causes else ():
            print(f"{'':<22} {value:>10.1f}  {name}")


if __name__ == "__main__":
    main()
