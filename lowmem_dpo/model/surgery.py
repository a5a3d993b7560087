"""What is done to a loaded model before it is run: one operation, whose steps have an order.

The head changes before its kernels are tried, adapters are put on the linears while these are where
transformers has them, and norms are replaced before the layers that hold them are taken apart. The
RMS norms that take the place of transformers' own, to keep less for the backward pass, are here
too.
"""

import functools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_dpo.linears.lora import AdapterSpec, add_lora
from lowmem_dpo.linears.nf4 import Nf4Weight
from lowmem_dpo.machine.trial import check_error, once_a_device, passes_trial, value_and_gradients
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.weight_slots import WeightSlots
from lowmem_dpo.model.attention import TREE_ATTENTION, TREE_ATTENTION_BY_TORCH
from lowmem_dpo.model.embedding import HostEmbedding
from lowmem_dpo.model.families import Family
from lowmem_dpo.model.head import HeadQuantization, head_to_host, quantize_head
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import DecoderLayer, stay
from lowmem_dpo.model.scoring import with_tried_head_kernels
from lowmem_dpo.settings.groups import KERNELS
from lowmem_dpo_kernels import NormKind, rms_norm, twins
from lowmem_dpo_kernels.triton_support import runs_triton


def prepare_model(
    model: LanguageModel,
    adapter: AdapterSpec | None = None,
    levers: Levers | None = None,
    *,
    seed: int = 0,
    head_quantization: HeadQuantization = "none",
    head_kernel: str = "auto",
    kernels: Collection[str] = KERNELS,
) -> LanguageModel:
    """Give a loaded model its adapter, and everything that lets it be trained in little memory.

    Args:
        model: As it was loaded; its network is changed in place.
        adapter: What kind of adapter it gets; None for none.
        levers: Places in memory; by default all is on the device, and the layers run again. The
            layers' weights on the host need a model in NF4, the embedding there one of its own.
        seed: Of the adapter's A matrices.
        head_quantization: none or int8.
        head_kernel: Implementation of `token_logps`; torch takes its place where it is wrong.
        kernels: Names of those that may be used on a card, if they pass their trials.

    Returns:
        The model as it is then.

    Raises:
        ValueError: If a target names no layer, the head cannot be quantised, or a layer has a part
            that is not known.
    """
    levers = levers or Levers()
    if head_quantization == "int8":
        model = quantize_head(model)
    if levers.head_on_host:
        model = head_to_host(model)
    if levers.embedding_on_host:
        model.backbone.set_input_embeddings(
            HostEmbedding(model.backbone.get_input_embeddings(), model.device)
        )
        model = _with_storage(model, "embedding", ", in host memory")
    if levers.num_slots is not None:
        model = _with_slots(model, levers.num_slots)
    if adapter is not None:
        add_lora(model.network, adapter, seed)
    head_kernel = head_kernel if "head" in kernels else "torch"
    if "nf4" not in kernels:
        for weight in model.network.modules():
            if isinstance(weight, Nf4Weight):
                weight.may_use_kernel = False
    model = with_tried_head_kernels(replace(model, head_implementation=head_kernel))
    replace_norms(model.backbone, model.family, may_use_kernel="norms" in kernels)
    may_use_mlp = "mlp" in kernels and model.dtype != torch.float64 and runs_triton(model.device)
    has_dropout = adapter is not None and adapter.dropout > 0
    keeps = levers.keeps(len(model.layers))
    for i, layer in enumerate(model.layers):
        model.layers[i] = DecoderLayer(
            layer,
            model.family,
            residual_multiplier=model.family.residual_multiplier(model.config),
            inputs_on_host=levers.inputs_on_host,
            has_dropout=has_dropout,
            mlp_kernels=(model.device, model.dtype) if may_use_mlp else None,
            keeps=keeps[i],
            hold=stay if model.slots is None else functools.partial(model.slots.hold, i),
        )
    by_kernel = "attention" in kernels
    model.backbone.set_attn_implementation(TREE_ATTENTION if by_kernel else TREE_ATTENTION_BY_TORCH)
    return model


def _with_slots(model: LanguageModel, num_slots: int) -> LanguageModel:
    """The NF4 weights of decoder layers in host memory or on the disk, a few where they compute.

    Before adapters are added, which go where the weights are.
    """
    layers = [[m for m in layer.modules() if isinstance(m, Nf4Weight)] for layer in model.layers]
    slots = WeightSlots(layers, model.device, num_slots)
    is_on_disk = any(weight.on_disk for weights in layers for weight in weights)
    where = "on the disk, {} layers at a time in memory"
    if not is_on_disk:
        where = "in host memory, {} layers at a time on the device"
    where = ", " + where.format(len(slots.slots))
    return replace(_with_storage(model, "linears", where), slots=slots)


def _with_storage(model: LanguageModel, kind: str, where: str) -> LanguageModel:
    """Say in the storage table where the tensors of a kind are."""
    rows = [
        replace(row, format=row.format + where) if kind in row.kind else row
        for row in model.storage
    ]
    return replace(model, storage=rows)


def replace_norms(backbone: nn.Module, family: Family, *, may_use_kernel: bool = True) -> int:
    """Replace every RMS norm of a model, in place.

    Args:
        backbone: Frozen.
        family: Names the class of its norms; a norm of another class stays as it is.
        may_use_kernel: Let a Triton kernel compute them on a card, if it is right there.

    Returns:
        How many.
    """
    if family.rms_norm is None:
        return 0
    record = family.rms_norm
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == record.class_name
    ]
    for parent, name, norm in found:
        eps: Any = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight: Any = norm.weight
        kind = NormKind(eps, record.offset, record.rounds_first)
        setattr(parent, name, FusedRmsNorm(weight, kind, may_use_kernel=may_use_kernel))
    return len(found)


class FusedRmsNorm(nn.Module):
    """An RMS norm with a frozen weight; see `lowmem_dpo_kernels.rms_norm`.

    Args:
        weight: [D], frozen.
        kind: How the family normalises.
        may_use_kernel: As for `replace_norms`.
    """

    def __init__(
        self, weight: nn.Parameter, kind: NormKind, *, may_use_kernel: bool = True
    ) -> None:
        super().__init__()
        what = weight.device, weight.dtype, len(weight), kind
        self.implementation = norm_implementation(*what) if may_use_kernel else "torch"
        self.weight = weight
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of [..., D]."""
        return rms_norm(x, self.weight, self.kind, implementation=self.implementation)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.kind.eps}"


def norm_path(backbone: nn.Module) -> str:
    """What a prepared model's norms run by; another path differs in the last bits."""
    norms = [module for module in backbone.modules() if isinstance(module, FusedRmsNorm)]
    return ", ".join(sorted({norm.implementation for norm in norms})) or "torch"


@once_a_device
def norm_implementation(
    device: torch.device, dtype: torch.dtype, width: int, kind: NormKind
) -> str:
    """Triton on cards where its kernels can be compiled and are right, torch elsewhere.

    Args:
        device: Where the norm computes.
        dtype: In what it computes.
        width: D.
        kind: How it normalises.
    """
    if dtype == torch.float64 or not runs_triton(device):
        return "torch"
    trial = functools.partial(_try_norm_kernels, device, dtype, width, kind)
    passed = passes_trial(trial, "norms", "the norms' kernels", device, "PyTorch")
    return "triton" if passed else "torch"


def _try_norm_kernels(device: torch.device, dtype: torch.dtype, width: int, kind: NormKind) -> None:
    """Compare values and gradients with the twin in float64.

    Width and kind are compiled in, so they are the model's own.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 70, width, generator=generator).to(device, dtype)
    weight = torch.randn(width, generator=generator).to(device, dtype)
    kernel = functools.partial(rms_norm, implementation="triton")
    found = value_and_gradients(kernel, [x], grad, weight, kind)
    exact = ([x.double()], grad.double(), weight.double(), kind)
    expected = value_and_gradients(twins.rms_norm, *exact)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want, what in zip(found, expected, ("value", "gradient"), strict=True):
        check_error(got, want, limit, f"{what} at {width}")
