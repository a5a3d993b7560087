"""Small models in NF4 whose parts are in any place, and what tests of places do with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_dpo.linears.lora import (
    AdapterSpec,
    LoraLinear,
    dropout_live,
    linear_layers,
    lora_parameters,
    wrap_linears,
)
from lowmem_dpo.linears.nf4 import quantize_nf4
from lowmem_dpo.memory.levers import Levers
from lowmem_dpo.memory.weight_slots import Lanes
from lowmem_dpo.model.language_model import LanguageModel, StorageRow
from lowmem_dpo.model.scoring import score
from lowmem_dpo.model.surgery import prepare_model
from lowmem_dpo.packs.packing import pack_trees
from tests.packs.folding import fold
from tests.tiny import FAMILIES, tiny_model

NUM_LAYERS = 5
PACK_TOKENS = 64
TREES = [
    fold(1, (*range(30, 50),), (*range(50, 60),), (*range(60, 75),), 12, 12),
    fold(2, (*range(31, 40),), (70,), (*range(60, 66),), 5, 5),
    fold(3, (*range(40, 58),), (*range(61, 70),), (*range(30, 50),), 9, 9),
]


def poison_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slot held before is gone when the next upload begins."""

    def upload(lanes, slot, blob):
        slot.fill_(0xFF)
        slot.copy_(blob)

    monkeypatch.setattr(Lanes, "upload", upload)


def nf4_model(
    family: str,
    levers: Levers,
    *,
    dropout: float = 0.0,
    on_quantised: Callable[[LoraLinear], Any] = lambda linear: None,
    **how: Any,
) -> LanguageModel:
    """A model of five small layers with a live adapter.

    Args:
        family: Of `tests.tiny`.
        levers: Places in memory.
        dropout: Of the adapter.
        on_quantised: Given each linear layer once its weight is in NF4.
        **how: For `prepare_model`.
    """
    changes: dict[str, Any] = {"num_hidden_layers": NUM_LAYERS}
    if types := FAMILIES[family].get("layer_types"):
        changes["layer_types"] = (types * 3)[:NUM_LAYERS]
    network = tiny_model(family, **changes).requires_grad_(False)
    wrap_linears(network.model.layers, "model.layers")
    for linear in linear_layers(network).values():
        weight = quantize_nf4(linear.weight)
        del linear.weight
        linear.weight = weight
        on_quantised(linear)
    rows = [StorageRow("mlp linears", 3, "nf4", 0), StorageRow("embedding", 1, "float32", 0)]
    spec = AdapterSpec(3, 6.0, dropout, "all", rank_stabilised=False)
    model = prepare_model(LanguageModel.of(network, "tiny", rows), spec, levers, **how)
    torch.manual_seed(1)
    for name, parameter in lora_parameters(model.network).items():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: LanguageModel) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and gradients of micro-batches, with one without gradient before and after each."""
    torch.manual_seed(2)
    logps = []
    for pack in pack_trees(TREES, PACK_TOKENS):
        with torch.no_grad():
            logps.append(score(model, pack))
        with dropout_live(model.network):
            live = score(model, pack)
            (live * torch.linspace(-1, 1, len(live))).sum().backward()
        logps.append(live.detach())
        with torch.no_grad():
            logps.append(score(model, pack))
    return logps, [p.grad for p in lora_parameters(model.network).values()]
