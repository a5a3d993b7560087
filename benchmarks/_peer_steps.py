"""The step of TRL with PEFT and bitsandbytes, on tensors without memory, under our follower.

What runs is theirs: transformers' model with its gradient checkpointing, PEFT's layers around
bitsandbytes' `Linear4bit`, TRL's collator, its `DPOTrainer._compute_loss` with all the metrics it
takes, its fused head with that head's own loop over slices, bitsandbytes' 8-bit AdamW. What cannot
run on tensors without memory has the smallest stand-in, and where one is not the same, it is to the
peer's advantage:

- a trainer is made without `__init__` (which tokenises and loads), with an accelerator that gathers
  nothing; accelerate's autocast is left out, since every weight is in bf16 already;
- `Params4bit` is a plain parameter with its attributes: a subclass of tensors cannot be fake;
- `gemm_4bit` is what bitsandbytes does on a card above 512 rows, operation by operation: absmax,
  dense weight, product. Below, its fused kernel saves the dense weight; no shape here is below;
- attention is torch's flash kernel, causal, without the padding's mask, which would take the
  efficient kernel, repeated keys and a mask;
- what is picked by a mask has the length that the mask says, which a fake mask cannot say;
- launches of TRL's two Triton kernels are noted with their tensors, as ours are, and its product
  with an fp32 sum as a product of 16 bits;
- gradients are there when a micro-batch begins, as in all but the first of a step.
"""

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import bitsandbytes
import torch
from _rehearsals import TreeShape, followed, trace_of_peer
from _train_step_trl import bitsandbytes_linear
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from trl import DPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from lowmem_dpo.linears.lora import LoraLinear
from lowmem_dpo.machine.card_table import Card
from lowmem_dpo.memory.extension import Trace
from lowmem_dpo.memory.fake_card import CARD, FakeCard
from lowmem_dpo.memory.rehearsal import Totals, totals_of
from lowmem_dpo.memory.trace import Follower, Work
from lowmem_dpo.weights.loading import unfilled_model

RANK = 16
DTYPE = torch.bfloat16
ATTENTION = "sdpa_on_a_rehearsed_card"
_aten = torch.ops.aten


class PickingCard(FakeCard):
    """A rehearsed card on which it is known how many numbers a mask picks.

    Attributes:
        picked: How many, by the number of the mask's elements.
    """

    picked: dict[int, int]

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        """Answer for what is picked by a mask; leave the rest."""
        if func is _aten.masked_select.default:
            picked = self.picked[args[1].numel()]
            return super().dispatch(_aten.new_empty.default, types, (args[0], [picked]), {})
        if func is _aten.index.Tensor and args[1][0].dtype == torch.bool:
            mask = args[1][0]
            size = [self.picked[mask.numel()], *args[0].shape[mask.ndim :]]
            return super().dispatch(_aten.new_empty.default, types, (args[0], size), {})
        return super().dispatch(func, types, args, kwargs)


def flash_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """What `sdpa` comes to on a card: q [B, H, S, E], k and v [B, K, S, E]."""
    flash = _aten._scaled_dot_product_flash_attention
    out = flash(q, k, v, 0.0, True, scale=options.get("scaling"))[0]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, flash_attention)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def unfused_gemm_4bit(
    a: Tensor,
    b: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """`_dequant_linear_fallback` of bitsandbytes' backend for CUDA, with its own operations."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise.default(
            absmax_8bit, absmax, absmax_code, 256, torch.float32
        )
        absmax = absmax + absmax_offset
    weight = ops.dequantize_4bit.default(b, absmax, blocksize, quant_type, shape, a.dtype)
    return nn.functional.linear(a, weight, bias)


class NotedKernel:
    """A Triton kernel whose launches a follower notes."""

    def __init__(self, name: str, follower: Follower) -> None:
        self.note = functools.partial(follower.note_launch, name)

    def __getitem__(self, grid: object) -> Any:
        """The kernel on a grid."""
        return lambda *arguments, **_: self.note([a for a in arguments if torch.is_tensor(a)], 0.0)


@contextmanager
def stand_ins(follower: Follower) -> Iterator[None]:
    """Inside, what has no fake implementation has one that `follower` sees."""

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        follower.note_launch("addmm", [a, b, total], 2.0 * total.numel() * a.shape[-1])

    with contextlib.ExitStack() as stack:
        for name in ("_forward_kernel", "_backward_kernel"):
            kernel = NotedKernel(name, follower)
            stack.enter_context(patch.object(chunked_logprob, name, kernel))
        stack.enter_context(patch.object(chunked_logprob, "_addmm_fp32", add_product))
        gemm = SimpleNamespace(default=unfused_gemm_4bit)
        stack.enter_context(patch.object(torch.ops.bitsandbytes, "gemm_4bit", gemm))
        yield


class PeerStep(NamedTuple):
    """What a micro-batch of a peer is, and how it is taken.

    Attributes:
        pairs: Of the micro-batch, padded to the longest of its sequences.
        with_reference: Whether the reference is scored in the step, adapters off.
    """

    pairs: tuple[TreeShape, ...]
    with_reference: bool = False


@dataclass(frozen=True)
class PeerModel:
    """A model as `DPOTrainer` has it behind the first micro-batch: gradients and moments are there.

    Attributes:
        mode: The card that it is on.
        model: PEFT's.
        layers: Its decoder layers.
        parameters: Of the adapter.
        optimizer: Theirs.
    """

    mode: PickingCard
    model: Any
    layers: Any
    parameters: list[nn.Parameter]
    optimizer: Any


def peer_model(config: PretrainedConfig) -> PeerModel:
    """The model of a config, which stays as it is."""
    mode, config = PickingCard(), copy.deepcopy(config)
    network = unfilled_model(config, quantization="nf4", dtype=DTYPE, device=CARD, mode=mode)
    with mode:
        model = with_adapter(network.network)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = bitsandbytes.optim.AdamW(parameters, lr=5e-6, optim_bits=8)
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    return PeerModel(mode, model, network.layers, parameters, optimizer)


def trace_peer(config: PretrainedConfig, step: PeerStep) -> Trace:
    """A micro-batch and the update behind it, as `rehearse` does it for ours."""
    return trace_of_peer(config, lambda few: follow_peer(peer_model(few), step)[0])


def shortest(config: PretrainedConfig) -> list[PeerModel]:
    """Models of one layer and of two."""
    found = []
    for num_layers in (1, 2):
        few = copy.deepcopy(config)
        few.num_hidden_layers = num_layers
        found.append(peer_model(few))
    return found


def peer_work(models: list[PeerModel], step: PeerStep) -> list[tuple[list[Work], list[Work]]]:
    """What a micro-batch computes and what the update does, with one layer and with two."""
    found = []
    for model in models:
        follower, place = follow_peer(model, step)
        found.append((follower.work[:place], follower.work[place:]))
    return found


def totals_of_peer(
    num_layers: int, card: Card, work: list[tuple[list[Work], list[Work]]]
) -> tuple[Totals, Totals]:
    """Of a micro-batch and of the update, of all layers, on a card."""
    micro_batch, update = (
        totals_of(
            [*((each, 2 - num_layers) for each in one), *((each, num_layers - 1) for each in two)],
            card,
        )
        for one, two in zip(*work, strict=True)
    )
    return micro_batch, update


def follow_peer(peer: PeerModel, step: PeerStep) -> tuple[Follower, int]:
    """Take a micro-batch and the update.

    Returns:
        What followed it, and where in its work the update begins.
    """
    follower, optimizer = Follower(CARD.type, {}), peer.optimizer
    trainer = trainer_of(peer.model, precomputed=not step.with_reference)
    layers: Any = SimpleNamespace(layers=peer.layers, network=peer.model, device=CARD)
    _note_residents(follower, peer)
    with peer.mode, stand_ins(follower), followed(follower, layers):
        follower.enter_section("data")
        inputs = batch_of(step, peer.mode)
        loss = trainer.compute_loss(peer.model, inputs)
        follower.enter_section("head back")
        (loss / 16).backward()
        del loss, inputs
        place = len(follower.work)
        follower.enter_section("update")
        torch.nn.utils.clip_grad_norm_(peer.parameters, 1.0)
        with torch.no_grad():
            for index, parameter in enumerate(peer.parameters):
                optimizer.update_step(optimizer.param_groups[0], parameter, 0, index)
    return follower, place


def with_adapter(network: Any) -> nn.Module:
    """Bitsandbytes' layers in place of ours, PEFT's around them, as `DPOTrainer` leaves a model."""
    with contextlib.ExitStack() as stack:
        for place in (bitsandbytes.nn, bitsandbytes.nn.modules):
            stack.enter_context(patch.object(place, "Params4bit", _plain_parameter))
        for path, module in list(network.named_modules()):
            if isinstance(module, LoraLinear):
                parent, _, name = path.rpartition(".")
                linear = bitsandbytes_linear(module.weight, module.bias, DTYPE)
                setattr(network.get_submodule(parent), name, linear)
    network.is_loaded_in_4bit = True
    network.config._attn_implementation = ATTENTION
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.set_default_dtype(DTYPE)  # what TRL casts adapters of a quantised model to
    try:
        # Made where they belong: a module of fake tensors cannot be moved.
        with torch.device(CARD), patch.object(nn.Module, "to", lambda module, *_, **__: module):
            model = get_peft_model(network, lora, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    model.enable_input_require_grads()
    network.gradient_checkpointing_enable()
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model.get_base_model(), outputs=names)
    return model.train()


def _plain_parameter(packed: Tensor, *, module: nn.Module, **attributes: Any) -> nn.Parameter:
    weight = nn.Parameter(packed, requires_grad=False)
    for name, value in (attributes | {"compress_statistics": True}).items():
        setattr(weight, name, value)
    return weight


def trainer_of(model: nn.Module, *, precomputed: bool) -> DPOTrainer:
    """What `_compute_loss` reads of a trainer, and no more."""
    same = staticmethod(lambda value: value).__func__
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.model, trainer.ref_model = model, None
    trainer.accelerator = SimpleNamespace(
        device=CARD, gather=same, gather_for_metrics=same, unwrap_model=same
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, max_length=None)
    trainer.precompute_ref_logps = precomputed
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.loss_types, trainer.loss_weights, trainer.beta = ["sigmoid"], [1.0], 0.1
    trainer.ld_alpha, trainer.label_smoothing = None, 0.0
    trainer.f_divergence_type = "reverse_kl"
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trainer


def batch_of(step: PeerStep, mode: PickingCard) -> dict[str, Tensor]:
    """A micro-batch as TRL's collator pads it, on the card."""
    examples: list[dict[str, Any]] = [
        {"prompt_ids": [0] * p, "chosen_ids": [1] * c, "rejected_ids": [2] * r}
        | ({} if step.with_reference else {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0})
        for p, c, r in step.pairs
    ]
    batch = DataCollatorForPreference(pad_token_id=0).torch_call(examples)
    num_masked = batch["input_ids"][:, 1:].numel()
    num_completion = sum(pair.chosen + pair.rejected for pair in step.pairs)
    mode.picked = {num_masked: num_completion, num_masked // 2: num_completion // 2}
    return {name: tensor.to(CARD) for name, tensor in batch.items()}


def _note_residents(follower: Follower, peer: PeerModel) -> None:
    """What is there before a step: weights and their scales, adapter, gradients, moments."""
    layers = {id(module): i for i, layer in enumerate(peer.layers) for module in layer.modules()}
    adapter: list[tuple[nn.Parameter, int | None]] = []
    for module in peer.model.modules():
        place = layers.get(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.requires_grad:
                adapter.append((tensor, place))
                continue
            follower.note_resident(tensor, "weights", place)
            if state := getattr(tensor, "quant_state", None):
                parts = (state.absmax, state.code, state.offset, state.state2.absmax)
                for part in (*parts, state.state2.code):
                    follower.note_resident(part, "weights", place)
    for component in ("adapter", "gradients", "optimizer state"):
        for parameter, place in adapter:
            held: list[Any] = list(peer.optimizer.state[parameter].values())
            held = {"adapter": [parameter], "gradients": [parameter.grad]}.get(component, held)
            for tensor in held:
                if isinstance(tensor, Tensor):
                    follower.note_resident(tensor, component, place)
