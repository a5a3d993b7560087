"""What a step does with memory, followed storage by storage, on real tensors and on fake ones.

A `Follower` sees every operation of torch while it is entered, in forward and backward passes
alike. A storage that an operation returns for the first time is born; a weak reference tells when
it dies. Of every birth it is known what for (its component: by the function of this program that is
running, or as its owner says later) and by what (the operation, and the function that called it).
Each operation's floating-point operations and bytes are noted beside.

Births, deaths and work are kept in sections, each of a phase of the step and, where there is one,
of a decoder layer: `extension` repeats those of a layer.

Not seen is what an operation takes and gives back within itself, in the C++ of torch or cuBLAS.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
# These give memory and do nothing else.
_NO_WORK = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.lift_fresh,
    _aten.detach,
}
# Place of the first factor among a product's arguments.
_FIRST_FACTOR = {
    _aten.mm: 0,
    _aten.bmm: 0,
    _aten.addmm: 1,
    _aten.addmm_: 1,
    _aten.baddbmm: 1,
    _aten.baddbmm_: 1,
}
_OURS = ("lowmem_dpo", "transformers.models")


class Key(NamedTuple):
    """A storage's name: the section that it was born in, and its number there."""

    phase: str
    layer: int | None
    number: int


@dataclass
class Storage:
    """One storage.

    Attributes:
        key: Its name.
        nbytes: Its size.
        on_card: Whether it is on the device that computes; the host otherwise.
        component: What it is for.
        maker: What made it.
        layer: The decoder layer it belongs to, or None.
    """

    key: Key
    nbytes: int
    on_card: bool
    component: str
    maker: str
    layer: int | None


class Event(NamedTuple):
    """A birth or a death."""

    storage: Storage
    is_birth: bool


class Work(NamedTuple):
    """What one launch, or one copy between host and card, does."""

    flops: float  # of products
    nbytes: int  # read and written on the card
    link_bytes: int  # between host and card
    is_half: bool  # whether a product's operands have 16 bits


@dataclass
class Section:
    """What happened in one phase, of one layer if `layer` is not None, and what was computed."""

    phase: str
    layer: int | None
    events: list[Event] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


class Follower(TorchDispatchMode):
    """Follows all storages and operations while it is entered.

    Args:
        device_type: cuda or cpu, of the device that computes.
        places: Components by the code of functions; the innermost that is running counts.

    Attributes:
        sections: What happened, in order.
    """

    def __init__(self, device_type: str, places: Mapping[CodeType, str]) -> None:
        super().__init__()
        self.device_type = device_type
        self.places = places
        self.sections: list[Section] = []
        self._is_over = False
        self._alive: dict[int, tuple[Storage, Any]] = {}
        self._born: Counter[tuple[str, int | None]] = Counter()
        self.enter_section("start")

    # Whether torch.compile must leave this alone; asking it costs time on every operation.
    _should_skip_dynamo = classmethod(lambda cls: False)

    @property
    def work(self) -> list[Work]:
        """What was computed, launch by launch."""
        return [each for section in self.sections for each in section.work]

    def enter_section(self, phase: str, layer: int | None = None) -> None:
        """What follows is of another phase, or of another decoder layer."""
        self.sections.append(Section(phase, layer))

    def note_resident(
        self, tensor: Tensor, component: str, layer: int | None, *, is_pinned: bool = False
    ) -> None:
        """Note a tensor that is there already; `layer` is the decoder layer it belongs to."""
        number = tensor.untyped_storage()._cdata
        if number not in self._alive:
            self._note_birth(tensor, component, "loading", layer, is_pinned=is_pinned)

    def __exit__(self, *raised: Any) -> None:
        """What dies from now on is of no interest."""
        super().__exit__(*raised)
        self._is_over = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it did."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result
        results = result if isinstance(result, tuple | list) else (result,)
        inputs = list(_tensors((*args, *kwargs.values())))
        outputs = [each for each in results if isinstance(each, Tensor)]
        sources = args[0] if args and isinstance(args[0], list) else []
        is_by_item = isinstance(result, list | tuple) and len(sources) == len(results)
        num_new = 0
        for i, output in enumerate(outputs):
            if output.untyped_storage()._cdata not in self._alive:
                num_new += 1
                component, caller = self._look_up(sys._getframe(1))
                maker = f"{func.overloadpacket.__name__} in {caller}"
                layer = self.sections[-1].layer
                if layer is None:  # of a list, for each of another list
                    layer = self._common_layer([sources[i]] if is_by_item else inputs)
                is_pinned = bool(kwargs.get("pin_memory")) or func is _aten._pin_memory.default
                self._note_birth(output, component, maker, layer, is_pinned=is_pinned)
        if func.overloadpacket not in _NO_WORK and (num_new or func._schema.is_mutable):
            self._note_work(func, args, kwargs, result, inputs, outputs)
        return result

    def note_launch(self, kernel: str, tensors: Sequence[Tensor], flops: float) -> None:
        """Note a Triton kernel, which reads or writes each of its tensors once."""
        distinct = {id(each): each for each in tensors}.values()
        is_half = tensors[0].element_size() == 2
        self.sections[-1].work.append(Work(flops, sum(map(_nbytes, distinct)), 0, is_half))

    def note_storage(self, nbytes: int, component: str, maker: str) -> None:
        """Note memory of the card that no tensor of ours holds, and that stays."""
        section = self.sections[-1]
        key = self._name(section.phase, section.layer)
        storage = Storage(key, nbytes, True, component, maker, section.layer)
        section.events.append(Event(storage, is_birth=True))

    def say_what_for(self, tensors: Iterable[Tensor], component: str) -> None:
        """Tell what the storages of some tensors are for."""
        for tensor in tensors:
            if known := self._alive.get(storage_id(tensor)):
                known[0].component = component

    def _common_layer(self, tensors: Sequence[Tensor]) -> int | None:
        """The layer that all of them belong to; None if they do not agree."""
        known = [self._alive.get(storage_id(each)) for each in tensors]
        layers = {each[0].layer for each in known if each is not None}
        return layers.pop() if len(layers) == 1 else None

    def _name(self, phase: str, layer: int | None) -> Key:
        number = self._born[phase, layer]
        self._born[phase, layer] += 1
        return Key(phase, layer, number)

    def _note_birth(
        self, tensor: Tensor, component: str, maker: str, layer: int | None, *, is_pinned: bool
    ) -> None:
        held = tensor.untyped_storage()
        number, section, nbytes = held._cdata, self.sections[-1], held.nbytes()
        if is_pinned:  # torch takes a power of two
            nbytes = 1 << max(0, nbytes - 1).bit_length()
        storage = Storage(
            key=self._name(section.phase, layer),
            nbytes=nbytes,
            on_card=tensor.device.type == self.device_type,
            component=component,
            maker=maker,
            layer=layer,
        )

        def die(_: Any) -> None:
            del self._alive[number]
            if not self._is_over:
                self.sections[-1].events.append(Event(storage, is_birth=False))

        self._alive[number] = storage, weakref.ref(held, die)
        section.events.append(Event(storage, is_birth=True))

    def _look_up(self, frame: FrameType | None) -> tuple[str, str]:
        """The component that the functions now running belong to, and the innermost of ours."""
        caller = ""
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if not caller and name.startswith(_OURS) and name != __name__:
                caller = f"{name.rpartition('.')[2]}: {frame.f_code.co_qualname}"
            if component := self.places.get(frame.f_code):
                return component, caller
            frame = frame.f_back
        return "other", caller or "torch"

    def _note_work(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        result: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        first = _FIRST_FACTOR.get(func.overloadpacket)
        flops = 0.0
        if first is not None:
            flops = 2.0 * outputs[0].numel() * args[first].shape[-1]
        elif count := flop_registry.get(func.overloadpacket):
            flops = float(count(*args, **kwargs, out_val=result))
        on_card, link_bytes, nbytes = False, 0, 0
        for tensor in {id(each): each for each in (*inputs, *outputs)}.values():
            if tensor.device.type == self.device_type:
                on_card = True
                nbytes += _nbytes(tensor)
        if on_card and any(each.device.type != self.device_type for each in (*inputs, *outputs)):
            link_bytes = max(map(_nbytes, outputs), default=0)
        if on_card:
            factor = inputs[:1] if first is None else [args[first]]
            is_half = bool(factor) and factor[0].element_size() == 2
            self.sections[-1].work.append(Work(flops, nbytes, link_bytes, is_half))


def storage_id(tensor: Tensor) -> int:
    """What tells a storage from others that are alive."""
    return tensor.untyped_storage()._cdata


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (each for each in value if isinstance(each, Tensor))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
