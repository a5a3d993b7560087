"""Rehearsals that tests share: a step that was followed once serves all plans of its like."""

from typing import Any

import pytest

from lowmem_dpo.steps import planner

FOLLOWED: dict[Any, dict[Any, Any]] = {}


def follow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let planners share what they follow of the same model, card, settings and pairs."""
    rehearse = planner.rehearse

    def quickly(model, card, settings, levers, packs, *, followed, **how):
        trees = [[tree.digest for tree in pack] for pack in packs]
        step = (settings.model.quantization, settings.model.head_quantization, settings.model.dtype)
        step += (settings.adapter, settings.optimizer.optim, settings.loss.loss_type)
        alike = (model.to_json_string(), card.capability, step, settings.head_kernel)
        key = str((*alike, trees, how["pack_tokens"], how["trains"]))
        known = FOLLOWED.setdefault(key, {})
        return rehearse(model, card, settings, levers, packs, followed=known, **how)

    monkeypatch.setattr(planner, "rehearse", quickly)
