import pytest
import torch

from lowmem_dpo.machine import products


@pytest.fixture(autouse=True)
def nothing_remembered():
    products.joins_products.cache_clear()
    yield
    products.joins_products.cache_clear()


def test_add_product_adds_to_a_total_in_place():
    torch.manual_seed(0)
    left, right, total = torch.randn(7, 3), torch.randn(7, 5), torch.randn(3, 5)
    wanted = total + 0.5 * left.T @ right
    products.add_product(total, left, right, 0.5)
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("passed", [True, False])
def test_joins_products_on_cards_alone_where_the_products_passed_their_trial(passed, monkeypatch):
    monkeypatch.setattr(products, "passes_trial", lambda trial, *rest: passed)
    assert not products.joins_products(torch.device("cpu"), torch.float32)
    assert not products.joins_products(torch.device("cuda"), torch.float64)
    assert products.joins_products(torch.device("cuda"), torch.float32) == passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 6)])
def test_joins_products_of_half_operands_where_the_card_has_them(dtype, capability, monkeypatch):
    monkeypatch.setattr(products, "passes_trial", lambda trial, *rest: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_them = capability >= {torch.float16: (7, 0), torch.bfloat16: (8, 0)}[dtype]
    assert products.joins_products(torch.device("cuda"), dtype) == has_them


def test_trial_takes_right_products():
    products._try_products(torch.device("cpu"), torch.float32)


def add_nothing(total, left, right, scaling):
    pass


def overwrite(total, left, right, scaling):
    total.copy_(scaling * left.T @ right)


@pytest.mark.parametrize("wrong", [add_nothing, overwrite])
def test_trial_refuses_wrong_products(wrong, monkeypatch):
    monkeypatch.setattr(products, "add_product", wrong)
    with pytest.raises(ValueError, match="a sum of products"):
        products._try_products(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_a_card_pass_their_trial(dtype):
    products._try_products(torch.device("cuda"), dtype)
