import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_record(output: Path) -> dict[str, Any]:
    """A run's run.json."""
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Of a process that imports these packages."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    return {**os.environ, "PYTHONPATH": paths}
