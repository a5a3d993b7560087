"""A step that runs out of memory is taken again, with layers that keep less.

Until the optimizer's step nothing but gradients has changed, so a step may begin anew from none of
them. First it is tried as it was, with the memory that the allocator held given back; then the
layers keep less, rung by rung. The tokens of a micro-batch and the heights of tiles stay, so the
log-probs keep their bits, and the cached reference its worth.
"""

from collections.abc import Sequence

import torch

from lowmem_dpo.console import warn
from lowmem_dpo.linears.lora import lora_parameters
from lowmem_dpo.losses.objective import Objective
from lowmem_dpo.machine.trial import is_out_of_memory
from lowmem_dpo.memory.levers import Keeps
from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo.model.layer import DecoderLayer
from lowmem_dpo.packs.packing import Pack
from lowmem_dpo.reference.fill import Reference
from lowmem_dpo.steps.gradients import PairStats, accumulate
from lowmem_dpo.stopping import RunStopped

LESS: dict[Keeps, Keeps] = {"all": "attention", "attention": "nothing"}


def accumulate_in_memory(
    model: LanguageModel,
    objective: Objective,
    reference: Reference | None,
    packs: Sequence[Pack],
    scaler: torch.amp.GradScaler,
    *,
    compares: bool = False,
) -> PairStats:
    """`gradients.accumulate` from no gradients, whatever memory that takes of what there is.

    Args:
        model: The policy; its layers may keep less from then on.
        objective: As for `accumulate`.
        reference: As for `accumulate`.
        packs: As for `accumulate`.
        scaler: As for `accumulate`.
        compares: As for `accumulate`.

    Raises:
        RunStopped: There is nothing left to do without.
    """
    on_card = model.device.type == "cuda"
    on_host_state = torch.get_rng_state()
    on_card_state = torch.cuda.get_rng_state(model.device) if on_card else None
    is_again = False
    while True:
        try:
            return accumulate(model, objective, reference, packs, scaler, compares=compares)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Here, where no traceback holds the step's tensors any more.
        for parameter in lora_parameters(model.network).values():
            parameter.grad = None
        torch.set_rng_state(on_host_state)
        if on_card_state is not None:
            torch.cuda.synchronize(model.device)
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(on_card_state, model.device)
        change = _keep_less(model) if is_again else "the same again"
        if change is None:
            raise RunStopped(
                "out of memory, and the layers keep nothing any more that they could do without: "
                "free some and run again with --resume auto, or begin anew with a lower max_length "
                "(docs/dpo-in-practice.md tells what else helps)"
            )
        warn(f"out of memory; the step is taken again: {change}")
        is_again = True


def _keep_less(model: LanguageModel) -> str | None:
    """Take the layers one rung down, and say which; None if they stand on the last."""
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    for more, less in LESS.items():
        if some := [layer for layer in layers if layer.keeps == more]:
            for layer in some:
                layer.keeps = less
            are_one = len(some) == 1
            which = "1 layer" if are_one else f"{len(some)} layers"
            return f"{which} that kept {more} {'keeps' if are_one else 'keep'} {less} from now on"
    some = [layer for layer in layers if not layer.inputs_on_host]
    if not some or model.device.type != "cuda":
        return None
    for layer in some:
        layer.inputs_on_host = True
    return "layer_inputs host from now on"
