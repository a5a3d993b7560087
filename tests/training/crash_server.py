"""Runs the command line again and again in forks of one warm process, and kills it on request.

A request is a JSON line on standard input: `words` of the command line, and one of `at_event` (the
run kills itself before its n-th change to the file system) and `after_seconds`, both counted from
the first change to the reference cache. The answer is a JSON line: `status` (exit code, -9 for a
kill), and how many `events` and `seconds` there were.
"""

import json
import mmap
import os
import signal
import struct
import sys
import time
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork

import torch

from lowmem_dpo import cli
from lowmem_dpo.reference import fill
from lowmem_dpo.trainer import Trainer
from lowmem_dpo.training import fit

assert Trainer  # all that a run would import, so that a fork has it
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_changes(counter: mmap.mmap, at_event: int | None) -> None:
    """Count changes to the file system in shared memory; die before the given one."""
    events = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        is_change = event in CHANGES or (event == "open" and bool(arguments[2] & WRITING))
        if not is_change or not (events or "/reference/" in str(arguments[0])):
            return
        events += 1
        counter[:8] = struct.pack("q", events)
        if events == at_event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(words: list[str], counter: mmap.mmap, at_event: int | None, log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    fill.SECONDS_PER_SHARD = -1.0  # a shard every micro-batch
    fit.draw_plots = lambda *paths: []  # takes longer than training
    count_changes(counter, at_event)
    os._exit(cli.main(words))


def serve(request: dict[str, Any]) -> dict[str, Any]:
    counter = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        try:
            child(request["words"], counter, request.get("at_event"), request["log"])
        finally:
            os._exit(99)
    started, ended = None, (0, 0)
    while ended[0] == 0:
        now = time.perf_counter()
        if started is None and struct.unpack("q", counter[:8])[0]:
            started = now
        delay = request.get("after_seconds")
        if started is not None and delay is not None and now - started >= delay:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        else:
            time.sleep(0.001)
            ended = os.waitpid(pid, os.WNOHANG)
    return {
        "status": os.waitstatus_to_exitcode(ended[1]),
        "events": struct.unpack("q", counter[:8])[0],
        "seconds": 0.0 if started is None else time.perf_counter() - started,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
