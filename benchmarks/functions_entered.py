"""How much of the house a run walks through from the command line to its first update.

    python benchmarks/functions_entered.py [--list]

Runs `lowmem_dpo train` on a tiny model in NF4 on the CPU, and notes every function of `lowmem_dpo`
and `lowmem_dpo_kernels` that is entered, in any thread, until an optimizer's `step` is called.
Counted are functions and methods, each once however often it is entered, and the files that they
stand in. Not counted: the bodies of modules and classes, lambdas, comprehensions, and the methods
that `dataclass` writes, which stand in no file. A file of which only names are imported is none.
"""

import argparse
import inspect
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "kernels")]  # at the end: PYTHONPATH may name another checkout
NESTED = {"<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


class FirstUpdate(Exception):
    """Raised in place of the first update."""


def functions_entered(words: list[str]) -> list[CodeType]:
    """Run a command line until its first update.

    Returns:
        The functions of both packages that were entered.

    Raises:
        RuntimeError: If the run ends before its first update.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("lowmem_dpo"):
            entered.add(frame.f_code)

    def end(*arguments: Any) -> None:
        sys.setprofile(None)  # what cleans up after the run is not on the way to the update
        raise FirstUpdate

    hook = register_optimizer_step_pre_hook(end)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        from lowmem_dpo.cli import main

        code = main(words)
    except FirstUpdate:
        return [code for code in entered if is_function(code)]
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        hook.remove()
    raise RuntimeError(f"the run ended before its first update, with exit code {code}")


def is_function(code: CodeType) -> bool:
    """Whether it is a function written in a file, not a body, a lambda or a comprehension."""
    has_own_locals = bool(code.co_flags & inspect.CO_OPTIMIZED)
    return has_own_locals and code.co_name not in NESTED and Path(code.co_filename).is_file()


def prepare(folder: Path) -> list[str]:
    """A tiny model and a few pairs; returns the words that train on them."""
    from tests.tiny import save_tiny_model

    draw = random.Random(0)
    texts = ("".join(draw.choices("abcdefgh ", k=draw.randint(5, 25))) for _ in range(24))
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts, strict=False)) for _ in range(8)]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = save_tiny_model(folder / "model")
    text = f"""train --model {model} --data {data} --output_dir {folder / "out"}
        --cache_dir {folder / "cache"} --device cpu --quantization nf4 --batch_size 4"""
    return text.split()


def main() -> int:
    """Print the numbers, and with --list the functions by file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the functions by file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        entered = functions_entered(prepare(Path(folder)))
    by_file = Counter(code.co_filename for code in entered)
    for file, count in sorted(by_file.items()) if options.list else ():
        names = sorted(code.co_qualname for code in entered if code.co_filename == file)
        print(f"{count:4} {'/'.join(Path(file).parts[-3:])}: {', '.join(names)}")
    print(
        f"from the command line to the first update: {len(by_file)} files, {len(entered)} functions"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
