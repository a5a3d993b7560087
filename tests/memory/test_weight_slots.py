"""Weights in slots: every layer reads its own bytes, and no schedule leaves an order to chance."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowmem_dpo.memory.lanes import COMPUTE, UPLOAD, Lanes, ReadingLanes
from lowmem_dpo.memory.weight_files import FileRange, WeightFile
from lowmem_dpo.memory.weight_slots import WeightSlots
from lowmem_dpo.stopping import RunStopped


class Weight(nn.Module):
    """Two buffers of one layer, of other sizes than their neighbours'."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.lease = layer, None
        self.register_buffer("packed", torch.full((100 + 7 * layer,), layer, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(float(layer)))
        self.register_buffer("absent", None)

    def read(self) -> set[float]:
        self.lease.check()
        return {self.scale.item(), *self.packed.tolist()}

    def leave_on_disk(self, folder):
        """Let a file of its own have the bytes, between others."""
        path = folder / f"{self.layer}-{id(self)}"
        with path.open("wb") as file:
            places = {}
            for name, buffer in list(self.named_buffers()):
                file.write(b"between")
                places[name] = file.tell(), buffer.dtype, buffer.shape
                file.write(buffer.view(-1).view(torch.uint8).numpy().tobytes())
                self._buffers[name] = None
        opened = WeightFile(path)
        self.on_disk = {name: FileRange(opened, *place) for name, place in places.items()}


class Conflict(Exception):
    """A read and a write of one memory, neither known to come first."""


class CheckedLanes(Lanes):
    """Lanes with a vector clock each: what one knows to be over on the other.

    Args:
        without: Number of a wait that is left out, as a fault would.
    """

    def __init__(self, without: int | None = None) -> None:
        self.clocks = {lane: {COMPUTE: 0, UPLOAD: 0} for lane in (COMPUTE, UPLOAD)}
        self.writes: dict[int, tuple[str, int]] = {}
        self.reads: dict[int, list[tuple[str, int]]] = {}
        self.num_waits, self.without = 0, without
        self._touch(COMPUTE)  # what the slots' memory served before

    def record(self, lane):
        return dict(self.clocks[lane])

    def wait(self, lane, event):
        self.num_waits += 1
        if self.num_waits - 1 != self.without:
            for other, time in event.items():
                self.clocks[lane][other] = max(self.clocks[lane][other], time)

    def _touch(self, lane):
        self.clocks[lane][lane] += 1
        return lane, self.clocks[lane][lane]

    def _check(self, lane, before):
        if self.clocks[lane][before[0]] < before[1]:
            raise Conflict(f"{lane} after {before}")

    def upload(self, slot, blob):
        place = slot.data_ptr()
        for before in [self.writes.get(place, (COMPUTE, 1)), *self.reads.pop(place, [])]:
            self._check(UPLOAD, before)
        self.writes[place] = self._touch(UPLOAD)
        slot.fill_(0xFF)
        slot.copy_(blob)

    def read(self, weight):
        place = weight.lease.slot.memory.data_ptr()
        self._check(COMPUTE, self.writes[place])
        self.reads.setdefault(place, []).append(self._touch(COMPUTE))


class Finishing(Lanes):
    """Lanes whose uploads are poison until somebody waits for them."""

    def __init__(self) -> None:
        self.pending: list = []

    def record(self, lane):
        return lane, len(self.pending)

    def wait(self, lane, event):
        if lane == COMPUTE:
            for slot, blob in self.pending[: event[1]]:
                slot.copy_(blob)
            self.pending[: event[1]] = [(torch.empty(0), torch.empty(0))] * event[1]

    def upload(self, slot, blob):
        slot.fill_(0xFF)
        self.pending.append((slot, blob))


def run(layers, slots, passes, lanes):
    """Hold the layers in the order of some passes; give how many uploads there were."""
    weights = [[Weight(i), Weight(i)] for i in range(layers)]
    stream = WeightSlots(weights, torch.device("cpu"), slots, lanes)
    for returns in passes:
        order = [*range(layers), *reversed(range(layers))] if returns else [*range(layers)]
        for i in order:
            with stream.hold(i, returns=returns):
                for weight in weights[i]:
                    assert weight.read() == {float(i)}
                    if isinstance(lanes, CheckedLanes):
                        lanes.read(weight)
    return stream


shapes = {
    "layers": st.integers(1, 9),
    "slots": st.integers(2, 5),
    "passes": st.lists(st.booleans(), min_size=1, max_size=4),
}


@given(**shapes)
def test_every_layer_reads_its_own_bytes(layers, slots, passes):
    run(layers, slots, passes, Finishing())


@given(**shapes)
def test_no_schedule_has_a_read_and_a_write_without_an_order(layers, slots, passes):
    run(layers, slots, passes, CheckedLanes())


@settings(max_examples=30)
@given(**shapes)
def test_any_wait_that_is_left_out_is_found(layers, slots, passes):
    lanes = CheckedLanes()
    run(layers, slots, passes, lanes)
    for number in range(lanes.num_waits):
        with pytest.raises(Conflict):
            run(layers, slots, passes, CheckedLanes(without=number))


@pytest.mark.parametrize(("layers", "slots"), [(12, 2), (12, 4), (3, 2), (2, 2), (2, 5), (1, 2)])
def test_layers_at_the_turn_stay_on_the_device(layers, slots):
    stream = run(layers, slots, [True], Lanes())
    kept = min(slots, layers)
    assert stream.num_uploads == layers + (layers - kept)
    assert run(layers, slots, [True] * 3, Lanes()).num_uploads <= layers + 5 * (layers - kept) + 4


def test_passes_that_do_not_turn_upload_the_next_layer_ahead():
    stream = run(6, 3, [False] * 4, Lanes())
    assert stream.num_uploads <= 6 + 3 * 5 + 1


def test_a_weight_is_not_read_outside_of_its_turn():
    weights = [[Weight(i)] for i in range(4)]
    stream = WeightSlots(weights, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="layer 0 is read outside of its turn"):
        weights[0][0].read()
    with stream.hold(0, returns=True):
        weights[0][0].read()
        with pytest.raises(RuntimeError, match="layer 1 is read outside of its turn"):
            weights[1][0].read()
    for i in (1, 2):
        with stream.hold(i, returns=True):
            pass
    with pytest.raises(RuntimeError, match="its slot holds layer 2"):
        weights[0][0].read()


def test_the_slot_is_free_again_after_an_error_inside():
    weights = [[Weight(i)] for i in range(3)]
    stream = WeightSlots(weights, torch.device("cpu"))
    for _ in range(5):
        with pytest.raises(MemoryError), stream.hold(1, returns=True):
            raise MemoryError
    with stream.hold(2, returns=True):
        assert weights[2][0].read() == {2.0}


class Failing(Finishing):
    """Lanes on which memory is out at one call, counted from 0: events and copies need some too."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.count, self.place = 0, place

    def call(self):
        self.count += 1
        if self.count - 1 == self.place:
            raise MemoryError

    def upload(self, slot, blob):
        super().upload(slot, blob)
        self.call()

    def record(self, lane):
        self.call()
        return super().record(lane)


@pytest.mark.parametrize("place", range(1, 22))
def test_a_pass_that_fails_anywhere_can_be_begun_again(place):
    weights = [[Weight(i)] for i in range(4)]
    lanes = Failing(place)
    stream = WeightSlots(weights, torch.device("cpu"), lanes=lanes)

    def run_once():
        for i in (0, 1, 2, 3, 3, 2, 1, 0):
            with stream.hold(i, returns=True):
                assert weights[i][0].read() == {float(i)}

    with pytest.raises(MemoryError):
        run_once()
        run_once()
    assert not any(slot.held for slot in stream.slots)
    run_once()


def test_memory_that_cannot_be_pinned_is_said_and_its_error_stays_with_nobody(monkeypatch, capsys):
    codes, given_back, latched = iter([0, 2]), [], []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            if code := next(codes):
                latched.append(code)
            return code

        def cudaHostUnregister(self, address):
            given_back.append(address)

    def launch(*_, **__):  # as torch's check of a launch
        if latched:
            raise RuntimeError(f"CUDA error {latched.pop()}")

    stream = WeightSlots([[Weight(i)] for i in range(3)], torch.device("cpu"))
    address = stream.blobs[0].data_ptr()
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "ones", launch)
    stream._pin(torch.device("cpu"))
    assert "cannot be pinned (CUDA error 2); uploads are slower" in capsys.readouterr().out
    assert not latched and not given_back
    del stream
    assert given_back == [address]


class Gated(ReadingLanes):
    """A reading thread that fills a slot when somebody waits for it, or after a while.

    Args:
        without: Number of a wait of computation that is left out, as a fault would.
    """

    def __init__(self, without=None) -> None:
        super().__init__()
        self.num_waits, self.without = 0, without
        self.gate = threading.Event()

    def record(self, lane):
        if lane == COMPUTE:
            return None
        return self.gate, super().record(lane)

    def wait(self, lane, event):
        if lane == COMPUTE:
            self.num_waits += 1
            if self.num_waits - 1 != self.without:
                event[0].set()
                super().wait(lane, event[1])

    def upload(self, slot, blob):
        slot.fill_(0xFF)
        self.gate = threading.Event()
        self._last = self._reader.submit(self._read_late, slot, blob, self.gate)

    def _read_late(self, slot, blob, gate):
        gate.wait(1)
        self._read(slot, blob)


def on_disk(tmp_path, layers, slots, lanes=None):
    """Layers in files, and the slots that they pass through."""
    weights = [[Weight(i), Weight(i)] for i in range(layers)]
    for layer in weights:
        for weight in layer:
            weight.leave_on_disk(tmp_path)
    return weights, WeightSlots(weights, torch.device("cpu"), slots, lanes)


def pass_through(weights, stream, passes=(True,)):
    for returns in passes:
        order = [*range(len(weights))]
        for i in [*order, *reversed(order)] if returns else order:
            with stream.hold(i, returns=returns):
                for weight in weights[i]:
                    assert weight.read() == {float(i)}


@pytest.mark.parametrize(("layers", "slots"), [(1, 2), (2, 2), (5, 2), (6, 3), (3, 5)])
@pytest.mark.parametrize("lanes", [Gated, None])
def test_layers_on_the_disk_read_their_own_bytes(tmp_path, layers, slots, lanes):
    weights, stream = on_disk(tmp_path, layers, slots, lanes and lanes())
    assert not any(isinstance(blob, torch.Tensor) for blob in stream.blobs)
    pass_through(weights, stream, [True, False, True])


def test_a_wait_for_the_reading_thread_that_is_left_out_is_found(tmp_path):
    lanes = Gated()
    pass_through(*on_disk(tmp_path, 4, 2, lanes))
    assert lanes.num_waits == 4 + 2
    for number in range(lanes.num_waits):
        with pytest.raises(AssertionError):
            pass_through(*on_disk(tmp_path, 4, 2, Gated(without=number)))


@pytest.mark.parametrize("failing", range(6))
def test_a_read_that_failed_is_done_again(tmp_path, failing):
    """A step that memory was out for is taken again: then the layer is read again."""

    class Failing(ReadingLanes):
        num_reads = 0

        def _read(self, slot, blob):
            self.num_reads += 1
            if self.num_reads == failing + 1:
                raise MemoryError
            super()._read(slot, blob)

    weights, stream = on_disk(tmp_path, 4, 2, Failing())
    with pytest.raises(MemoryError):
        pass_through(weights, stream)
    pass_through(weights, stream, [True, True])


def test_the_next_layer_is_read_while_the_present_one_computes(tmp_path):
    class Noting(ReadingLanes):
        def _read(self, slot, blob):
            super()._read(slot, blob)
            done.append(threading.current_thread())

    done = []
    weights, stream = on_disk(tmp_path, 3, 2, Noting())
    with stream.hold(0, returns=True):
        until = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < until:
            time.sleep(0.001)
        assert len(done) == 2  # layer 1 is there, and nobody waited for it
    (reader,) = set(done)
    assert reader is not threading.current_thread()
    del weights, stream
    reader.join(10)
    assert not reader.is_alive()


def test_what_the_reading_thread_meets_is_raised_where_it_is_waited_for(tmp_path):
    weights, stream = on_disk(tmp_path, 4, 2)
    path = weights[2][0].on_disk["packed"].file.path
    with path.open("r+b") as file:
        file.truncate(9)
    for i in (0, 1):
        with stream.hold(i, returns=True):
            pass
    for _ in range(2):  # and again, should anybody try
        with pytest.raises(RunStopped, match=f"{path} was changed"), stream.hold(2, returns=True):
            pytest.fail("the layer ran")
    assert not any(slot.held for slot in stream.slots)
    with stream.hold(1, returns=True):
        assert weights[1][0].read() == {1.0}


def test_sizes_are_those_of_the_blobs():
    stream = WeightSlots([[Weight(0)], [Weight(40)]], torch.device("cpu"))
    # 100 and 380 bytes and a float each, every tensor on 256 bytes
    assert [len(blob) for blob in stream.blobs] == [256 + 256, 512 + 256]
    assert [len(slot.memory) for slot in stream.slots] == [512 + 256] * 2
