"""Cases that run in Triton's interpreter, which a process takes or leaves when it starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def assert_passes_in_the_interpreter(cases: Path) -> None:
    """Run a file of tests in a process of its own; every one must pass, and none be skipped."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
