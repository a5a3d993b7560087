import pytest
import torch

from lowmem_dpo.machine.trial import check_error, passes_trial

CPU = torch.device("cpu")


def test_passes_trial_says_once_why_kernels_are_not_used(capsys):
    def crash():
        raise RuntimeError("no kernel image\nfor this card")

    assert passes_trial(lambda: None, "the kernels", CPU, "PyTorch")
    assert not capsys.readouterr().out
    assert not passes_trial(crash, "the kernels", CPU, "PyTorch")
    assert capsys.readouterr().out == (
        "warning: the kernels failed their trial on cpu (no kernel image for this card); PyTorch "
        "is used, please report it\n"
    )


def test_passes_trial_does_not_take_a_full_card_for_a_fault(capsys):
    def greedy():
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        passes_trial(greedy, "the kernels", CPU, "PyTorch")
    assert not capsys.readouterr().out


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
