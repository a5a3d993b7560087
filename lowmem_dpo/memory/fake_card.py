"""Tensors without memory on a card that need not be present.

torch's FakeTensorMode gives tensors a shape, a type and a device, and no memory: operations on them
cost what their Python costs, so a step of a 70B model runs on a laptop. It was made for compilers,
which never run a backward pass on tensors of a device that torch was built without. Three answers
make that possible, on every machine alike, so that a rehearsal leaves a real card alone:

- torch's C++ asks a tensor for its device to find the device's streams. To that question the card's
  tensors answer `meta`, which has none; Python sees `cuda`. What C++ then makes on `meta` is made
  on the card.
- What is read on the host is not there. A check gets the answer that nothing is wrong, a number
  is 0.
- Pinned memory is memory of the host.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CARD = torch.device("cuda", 0)
"""The device of a rehearsed card."""

_META = torch.device("meta")
_aten = torch.ops.aten


def fake_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, has_flash: bool) -> Tensor:
    """Causal attention by the kernel that torch would choose on a card, as it does not here.

    Args:
        q: [1, H, Q, E] on the card.
        k: [1, K, S, E].
        v: [1, K, S, E].
        scaling: Factor on the scores.
        has_flash: Which kernel that is.
    """
    if has_flash:
        flash = _aten._scaled_dot_product_flash_attention
        return flash(q, k, v, 0.0, True, scale=scaling)[0]
    efficient = _aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, None, True, 0.0, True, scale=scaling)[0]


class FakeCard(FakeTensorMode):
    """Inside, tensors have no memory, and those on `CARD` need no card."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # as in `trace.Follower`

    @property
    def avoid_device_init(self) -> bool:
        """Where there is a card, it is not asked for a context."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Every operation comes here."""
        return self.dispatch(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        """Answer what FakeTensorMode answers for compilers only; leave it the rest."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            inside = args[0].fake_mode.in_kernel_invocation
            return _META if inside or args[0].fake_device.type == "cuda" else args[0].fake_device
        if func is _aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func is _aten._pin_memory.default:
            return _aten.clone.default(args[0])
        device = kwargs.get("device")
        if device is not None and device.type == "meta":
            kwargs = {**kwargs, "device": CARD}
        if func is _aten._to_copy.default and device == CARD == args[0].fake_device:
            dtype = kwargs.get("dtype")
            if dtype is None or dtype == args[0].dtype:  # it is there: C++ does not know
                return super().dispatch(_aten.alias.default, types, args, {})
        return super().dispatch(func, types, args, kwargs)
