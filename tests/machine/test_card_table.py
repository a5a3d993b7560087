import pytest

from lowmem_dpo.machine.card_table import CARDS, GIB, find_card


@pytest.mark.parametrize(
    "name, expected",
    [
        ("3060", "RTX 3060 12 GB"),
        ("RTX 3060", "RTX 3060 12 GB"),
        ("rtx3060 12gb", "RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12 GB"),
        ("3060ti", "RTX 3060 Ti"),
        ("GeForce RTX 3060 Ti", "RTX 3060 Ti"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "RTX 3060 Laptop 6 GB"),
        ("3060 6 GB", "RTX 3060 Laptop 6 GB"),
        ("3050", "RTX 3050 8 GB"),
        ("3050 4GB", "RTX 3050 Laptop 4 GB"),
        ("RTX 3080 12GB", "RTX 3080 12 GB"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("RTX4070TiSuper", "RTX 4070 Ti Super"),
        ("4060 Ti 16G", "RTX 4060 Ti 16 GB"),
        ("rtx 4050 6gb", "RTX 4050 Laptop 6 GB"),
        ("2080Ti", "RTX 2080 Ti"),
        ("Tesla T4", "T4"),
        ("t4 16GB", "T4"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_find_card_takes_the_names_that_people_and_drivers_use(name, expected):
    assert find_card(name).name == expected


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card):
    assert find_card(card.name) == card
    assert find_card(f"NVIDIA GeForce {card.name.replace(' GB', 'GB')}") == card


@pytest.mark.parametrize(
    "name, message",
    [
        ("3080", "card '3080' may be RTX 3080 10 GB or RTX 3080 12 GB; say which"),
        ("A100", "card 'A100' may be A100 40 GB or A100 80 GB; say which"),
        ("4060 ti", "may be RTX 4060 Ti 8 GB or RTX 4060 Ti 16 GB"),
        ("3095", "card '3095' is not known; near names: .*RTX 3090"),
        ("RTX 3060 24GB", "card 'RTX 3060 24GB' is not known; near names: RTX 3060 12 GB"),
        ("4080 ti", "is not known; near names: RTX 2080 Ti, .*RTX 4070 Ti"),
        ("potato", "card 'potato' is not known; near names: RTX 3060 12 GB"),
        ("", "is not known"),
    ],
)
def test_find_card_names_cards_that_may_be_meant(name, message):
    with pytest.raises(ValueError, match=message) as error:
        find_card(name)
    assert "\n" not in str(error.value)


def test_figures_are_plausible():
    """A digit too many, or a sparse rate, would stand out."""
    for card in CARDS:
        assert 4 * GIB <= card.memory_bytes <= 144 * GIB
        assert 10 < card.flops / card.memory_bandwidth < 420  # operations a byte
        assert 7e9 < card.link_bandwidth < 65e9
        assert card.has_bfloat16 == (card.capability != (7, 5))
    assert len({card.name for card in CARDS}) == len(CARDS)
