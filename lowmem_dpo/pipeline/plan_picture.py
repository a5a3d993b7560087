"""What holds the memory of a planned step, drawn as two stacked bars: of card and host."""

from pathlib import Path

from lowmem_dpo.files import replace_file
from lowmem_dpo.memory.rehearsal import CONTEXT_BYTES, Rehearsal

GIB = 2**30
SMALL_SHARE = 0.01


def check_place(path: Path) -> None:
    """Refuse, before minutes of rehearsals, a place where no picture can be.

    Raises:
        ValueError: If it is no file, or in no folder.
    """
    is_other = path.exists() and not path.is_file()  # a device would be replaced, too
    if is_other or not path.parent.is_dir():
        what = "is no file" if is_other else f"is in no folder: there is no {path.parent}"
        raise ValueError(f"picture {path} {what}; name a PNG file in a folder that is there")


def draw_memory(found: Rehearsal, room_bytes: int, path: Path) -> None:
    """Draw the bytes at the peak by what they are for.

    Args:
        found: A rehearsed step.
        room_bytes: What torch may reserve of the card.
        path: A PNG, which is replaced.

    Raises:
        OSError: If it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gaps = found.peak_reserved_bytes - sum(found.components.values())
    here = found.components | {"gaps of the allocator": gaps, "CUDA's context": CONTEXT_BYTES}
    bars = {"card": here, "host": found.host_components}
    names = sorted(
        here.keys() | found.host_components.keys(),
        key=lambda name: -sum(bar.get(name, 0) for bar in bars.values()),
    )
    total = sum(sum(bar.values()) for bar in bars.values())
    large = [n for n in names if sum(bar.get(n, 0) for bar in bars.values()) > SMALL_SHARE * total]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = dict.fromkeys(bars, 0.0)
    for i, name in enumerate([*large, "other"]):
        parts = large[i : i + 1] or [other for other in names if other not in large]
        widths = [sum(bar.get(part, 0) for part in parts) / GIB for bar in bars.values()]
        axes.barh(
            list(bars), widths, left=list(left.values()), color=colormaps["tab20"](i), label=name
        )
        left = {bar: left[bar] + width for bar, width in zip(bars, widths, strict=True)}
    limit = (room_bytes + CONTEXT_BYTES) / GIB
    axes.axvline(limit, color="black", linestyle="--", label="room on the card")
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the peak (rehearsed)", title=found.card.name)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))
