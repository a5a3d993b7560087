"""The cards that people own: what they hold and how fast they are, by the names people use.

Rates are those of dense products (never of sparse ones) in bfloat16, on Turing in float16, with
sums in fp32: on GeForce cards half of what is reached with sums in float16. They and the bandwidths
are nominal, so bounds. Memory is that of the card, on those with ECC what is left beside it.

Source: NVIDIA's white papers of Turing (WP-09183-001), Ampere GA102, Ada and RTX Blackwell, its
product pages of GeForce cards (cores, boost clock: a GeForce card's rate is four times cores and
clock, on Turing eight times tensor cores' share), data sheets of T4, L4, A10, A100, H100 and H200.
Laptop cards at the upper end of their clocks. Links are PCIe, 0.985 GB/s a lane in generation 3.
"""

import difflib
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card, which need not be present.

    Attributes:
        name: As people call it.
        capability: Its compute capability.
        memory_bytes: All of its memory.
        flops: Floating-point operations per second of dense 16-bit products.
        memory_bandwidth: Bytes per second to and from its memory.
        link_bandwidth: Bytes per second from the host, one way.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16; others compute in float16."""
        return self.capability >= (8, 0)


_GEN3, _GEN4, _GEN5 = 15.8, 31.5, 63.0  # 16 lanes, GB/s

# name, capability, GiB, TFLOP/s, GB/s of memory, GB/s of the link
_ROWS: tuple[tuple[str, tuple[int, int], float, float, float, float], ...] = (
    ("RTX 2060", (7, 5), 6, 25.8, 336, _GEN3),
    ("RTX 2070", (7, 5), 8, 29.9, 448, _GEN3),
    ("RTX 2080", (7, 5), 8, 40.3, 448, _GEN3),
    ("RTX 2080 Ti", (7, 5), 11, 53.8, 616, _GEN3),
    ("RTX 3050 Laptop 4 GB", (8, 6), 4, 12.3, 192, _GEN4 / 2),
    ("RTX 3050 8 GB", (8, 6), 8, 18.2, 224, _GEN4 / 2),
    ("RTX 3060 12 GB", (8, 6), 12, 25.5, 360, _GEN4),
    ("RTX 3060 Laptop 6 GB", (8, 6), 6, 26.1, 336, _GEN4 / 2),
    ("RTX 3060 Ti", (8, 6), 8, 32.4, 448, _GEN4),
    ("RTX 3070", (8, 6), 8, 40.6, 448, _GEN4),
    ("RTX 3080 10 GB", (8, 6), 10, 59.5, 760, _GEN4),
    ("RTX 3080 12 GB", (8, 6), 12, 61.3, 912, _GEN4),
    ("RTX 3080 Ti", (8, 6), 12, 68.2, 912, _GEN4),
    ("RTX 3090", (8, 6), 24, 71.2, 936, _GEN4),
    ("RTX 4050 Laptop 6 GB", (8, 9), 6, 24.3, 192, _GEN4 / 2),
    ("RTX 4060", (8, 9), 8, 30.2, 272, _GEN4 / 2),
    ("RTX 4060 Ti 8 GB", (8, 9), 8, 44.1, 288, _GEN4 / 2),
    ("RTX 4060 Ti 16 GB", (8, 9), 16, 44.1, 288, _GEN4 / 2),
    ("RTX 4070", (8, 9), 12, 58.3, 504, _GEN4),
    ("RTX 4070 Laptop 8 GB", (8, 9), 8, 40.0, 256, _GEN4 / 2),
    ("RTX 4070 Ti Super", (8, 9), 16, 88.2, 672, _GEN4),
    ("RTX 4070 Ti", (8, 9), 12, 80.2, 504, _GEN4),
    ("RTX 4080", (8, 9), 16, 97.5, 717, _GEN4),
    ("RTX 4090", (8, 9), 24, 165.2, 1008, _GEN4),
    ("RTX 4090 Laptop 16 GB", (8, 9), 16, 79.3, 576, _GEN4),
    ("RTX 5060 Ti 16 GB", (12, 0), 16, 47.4, 448, _GEN5 / 2),
    ("RTX 5070", (12, 0), 12, 61.7, 672, _GEN5),
    ("RTX 5070 Ti", (12, 0), 16, 87.9, 896, _GEN5),
    ("RTX 5080", (12, 0), 16, 112.6, 960, _GEN5),
    ("RTX 5090", (12, 0), 32, 209.5, 1792, _GEN5),
    ("T4", (7, 5), 15, 65, 320, _GEN3),
    ("L4", (8, 9), 22.5, 121, 300, _GEN4),
    ("A10", (8, 6), 22.5, 125, 600, _GEN4),
    ("A100 40 GB", (8, 0), 40, 312, 1555, _GEN4),
    ("A100 80 GB", (8, 0), 80, 312, 2039, _GEN4),
    ("H100 80 GB", (9, 0), 80, 989, 3350, _GEN5),
    ("H200", (9, 0), 140, 989, 4800, _GEN5),
)

CARDS = tuple(
    Card(name, capability, int(gib * GIB), tflops * 1e12, memory * 1e9, link * 1e9)
    for name, capability, gib, tflops, memory, link in _ROWS
)

# What says nothing of which card it is.
_NOISE = re.compile(r"nvidia|geforce|rtx|gtx|tesla|gpu|graphics|card|hbm\w*|sxm\d?|pcie|gddr\w*")


def find_card(name: str) -> Card:
    """The card of a name such as 3060, RTX 3060, rtx3060 12gb or NVIDIA GeForce RTX 3060.

    Args:
        name: A laptop's has the word laptop in it; the memory tells cards of one name apart.

    Raises:
        ValueError: If no card, or more than one, has that name; with near names.
    """
    words, gigabytes = _parts(name)
    alike = [card for card in CARDS if _parts(card.name)[0] == words]
    if not alike and gigabytes is not None:  # nobody says laptop where no other has that memory
        alike = [card for card in CARDS if _parts(card.name)[0] == words | {"laptop"}]
    elif gigabytes is not None and gigabytes not in map(_gigabytes, alike):
        in_laptops = [c for c in CARDS if _parts(c.name)[0] == words | {"laptop"}]
        alike = [c for c in in_laptops if _gigabytes(c) == gigabytes]
    fitting = [c for c in alike if gigabytes is None or _gigabytes(c) == gigabytes]
    if len(fitting) == 1:
        return fitting[0]
    if len(alike) > 1:
        names = " or ".join(card.name for card in alike)
        raise ValueError(f"card {name!r} may be {names}; say which")
    names = ", ".join(_near_names(name))
    raise ValueError(f"card {name!r} is not known; near names: {names}")


def _parts(name: str) -> tuple[frozenset[str], int | None]:
    """The words that tell a card, and its gigabytes if they are named."""
    text = name.lower().replace("mobile", " laptop ").replace("max-q", " laptop ")
    memory = re.search(r"(\d+)\s*gi?b?\b", text)
    if memory:
        text = text[: memory.start()] + " " + text[memory.end() :]
    text = re.sub(r"(\d)(?=ti|super|laptop)|(ti)(?=super)", r"\g<0> ", _NOISE.sub(" ", text))
    return frozenset(re.findall(r"[a-z0-9]+", text)), int(memory[1]) if memory else None


def _gigabytes(card: Card) -> int:
    """What is printed on its box."""
    named = _parts(card.name)[1]
    on_box = {"T4": 16, "L4": 24, "A10": 24, "H200": 141}
    return named or on_box.get(card.name, round(card.memory_bytes / GIB))


def _near_names(name: str) -> list[str]:
    """Names that are spelt alike; else cards of every size."""
    wanted = " ".join(sorted(_parts(name)[0]))
    spelt = {card.name: " ".join(sorted(_parts(card.name)[0])) for card in CARDS}
    matcher = difflib.SequenceMatcher(b=wanted)
    likeness = {}
    for full_name, words in spelt.items():
        matcher.set_seq1(words)
        likeness[full_name] = matcher.ratio()
    near = sorted((n for n in likeness if likeness[n] >= 0.5), key=lambda n: -likeness[n])
    return near[:5] or ["RTX 3060 12 GB", "RTX 3090", "RTX 4060", "RTX 4090", "RTX 5090"]
