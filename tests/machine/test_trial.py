import errno
import functools

import pytest
import torch

from lowmem_dpo.machine.trial import (
    check_error,
    is_out_of_memory,
    once_a_device,
    passes_trial,
    value_and_gradients,
)
from lowmem_dpo.stopping import RunStopped
from lowmem_dpo_kernels.triton_support import RehearsedCard, rehearsing

CPU = torch.device("cpu")


def test_passes_trial_says_once_why_kernels_are_not_used(capsys):
    def crash():
        raise RuntimeError("no kernel image\nfor this card")

    assert passes_trial(lambda: None, "norms", "the kernels", CPU, "PyTorch")
    assert not capsys.readouterr().out
    assert not passes_trial(crash, "norms", "the kernels", CPU, "PyTorch")
    assert capsys.readouterr().out == (
        "warning: the kernels failed their trial on cpu (no kernel image for this card); PyTorch "
        "is used, please report it\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_passes_trial_does_not_take_a_full_card_for_a_fault(error, capsys):
    def greedy():
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        passes_trial(greedy, "norms", "the kernels", CPU, "PyTorch")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        *map(
            RuntimeError,
            (
                "CUDA error: out of memory",  # pinned memory, and what ran before
                "CUDA driver error: out of memory",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "Triton Error [CUDA]: out of memory",
                "CUDA_ERROR_OUT_OF_MEMORY",
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 8 bytes.",
                "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
                "unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)",
                "std::bad_alloc",
            ),
        ),
    ],
    ids=lambda error: str(error)[:40],
)
def test_is_out_of_memory_knows_the_words_of_device_and_host(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch: [8] and [9]"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
        RuntimeError("index 9 is out of bounds for dimension 0 with size 8"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_is_out_of_memory_takes_nothing_else_for_it(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("answers", [True, False])
def test_passes_trial_stops_where_the_card_does_not_come_through(answers, monkeypatch, capsys):
    """An illegal access is raised by every later call, so nothing takes the kernels' place."""

    def crash(device=None):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", (lambda device: None) if answers else crash)
    arguments = (crash, "norms", "the norms' kernels", torch.device("cuda"), "PyTorch")
    if answers:
        assert not passes_trial(*arguments)
        assert "PyTorch is used" in capsys.readouterr().out
        return
    with pytest.raises(RunStopped, match="without them, --kernels head,attention,nf4,mlp, and"):
        passes_trial(*arguments)


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.01, True), (1.03, False)])
def test_check_error_is_relative(factor, right):
    numbers = torch.linspace(-3, 100, 7)
    if right:
        check_error(factor * numbers, numbers, 0.02, "numbers")
        return
    with pytest.raises(ValueError, match=r"numbers: relative error 3\.0e-02"):
        check_error(factor * numbers, numbers, 0.02, "numbers")


def test_check_error_refuses_nan():
    with pytest.raises(ValueError, match="relative error nan"):
        check_error(torch.tensor([1.0, torch.nan]), torch.ones(2), 0.02, "numbers")


def test_value_and_gradients_leaves_its_arguments_as_they_were():
    class UsesUpItsGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, left, right, factor):
            ctx.save_for_backward(left, right)
            ctx.factor = factor
            return factor * left * right

        @staticmethod
        def backward(ctx, grad):
            left, right = ctx.saved_tensors
            grad_right = ctx.factor * left * grad
            return grad.mul_(ctx.factor * right), grad_right, None

    left, right, upstream = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([10.0])
    with torch.no_grad():
        found = value_and_gradients(UsesUpItsGradient.apply, (left, right), upstream, 5.0)
    assert [tensor.item() for tensor in found] == [30.0, 150.0, 100.0]
    assert upstream.item() == 10.0 and not left.requires_grad and not found[0].requires_grad


def test_in_a_rehearsal_every_trial_passes_without_being_run():
    def crash():
        raise RuntimeError("run")

    with rehearsing(RehearsedCard((8, 6), lambda *_: None)):
        assert passes_trial(crash, "norms", "the kernels", CPU, "PyTorch")


def test_once_a_device_forgets_what_a_rehearsal_found():
    calls = []

    @once_a_device
    def found(number):
        calls.append(number)
        return [number]

    assert found(1) is found(1)
    with rehearsing(RehearsedCard((8, 6), lambda *_: None)):
        there = found(1)
        assert found(1) is there
    assert found(1) is not there
    assert calls == [1, 1]
    found.cache_clear()
    assert found(1) == [1] and calls == [1, 1, 1]


def test_once_a_device_keeps_the_last_so_many():
    calls = []

    def found(number):
        calls.append(number)

    remembered = functools.partial(once_a_device, at_most=2)(found)
    for number in (1, 2, 2, 3, 3, 1):
        remembered(number)
    assert calls == [1, 2, 3, 1]
