import pytest
import torch

from lowmem_dpo_kernels.token_logps import check_head_inputs, check_indices


def head_inputs():
    return {
        "hidden": torch.zeros(4, 3),
        "rows": torch.tensor([0, 3]),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([4, -100]),
        "bias": torch.zeros(5),
    }


def test_check_head_inputs_accepts_what_fits():
    check_head_inputs(**head_inputs())
    check_head_inputs(**head_inputs() | {"bias": None})
    nothing = torch.empty(0, dtype=torch.int64)
    check_head_inputs(**head_inputs() | {"rows": nothing, "targets": nothing})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("hidden", torch.zeros(4, 3, dtype=torch.int64), "hidden must be floating point"),
        ("hidden", torch.zeros(2, 2, 3), r"hidden must be \[N, D\].*got \[2, 2, 3\]"),
        ("weight", torch.zeros(3, 5), r"weight must have shape \[3, 3\], got \[3, 5\]"),
        ("weight", torch.zeros(1, 3), "V at least 2"),
        ("weight", torch.zeros(5, 3).half(), "weight must be torch.float32, got torch.float16"),
        ("weight", torch.zeros(5, 3, device="meta"), "weight must be on hidden's device cpu"),
        ("weight", torch.zeros(5, 3, requires_grad=True), "weight must be frozen"),
        ("bias", torch.zeros(4), r"bias must have shape \[5\], got \[4\]"),
        ("bias", torch.zeros(5, requires_grad=True), "bias must be frozen"),
        ("rows", torch.tensor([0]), r"rows must have shape \[2\], got \[1\]"),
        ("rows", torch.tensor([0, 1], dtype=torch.int32), "rows must be torch.int64"),
        ("targets", torch.zeros(2), "targets must be torch.int64"),
        ("targets", torch.tensor([[4, 0]]), r"targets must have shape \[2\], got \[1, 2\]"),
    ],
)
def test_check_head_inputs_refuses_what_does_not_fit(name, value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_head_inputs(**head_inputs() | {name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("rows", torch.tensor([0, 4]), r"rows must be in \[0, 4\), got 0 to 4"),
        ("rows", torch.tensor([-1, 0]), r"rows must be in \[0, 4\), got -1 to 0"),
        ("targets", torch.tensor([5, 0]), r"targets must be in \[0, 5\), got 0 to 5"),
        ("targets", torch.tensor([-1, 0]), r"targets must be in \[0, 5\), got -1 to 0"),
    ],
)
def test_check_indices_refuses_what_is_not_there(name, value, message):
    indices = {"rows": torch.tensor([0, 3]), "targets": torch.tensor([4, -100])}
    check_indices(**indices, num_rows=4, vocabulary=5)
    with pytest.raises(ValueError, match=message) as error:
        check_indices(**indices | {name: value}, num_rows=4, vocabulary=5)
    assert "\n" not in str(error.value)


def test_check_head_inputs_lets_a_trainable_head_be_read_without_gradient():
    with torch.no_grad():
        check_head_inputs(**head_inputs() | {"weight": torch.zeros(5, 3, requires_grad=True)})
