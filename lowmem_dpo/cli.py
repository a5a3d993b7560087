"""The command line: verbs, flags, YAML, exit codes.

Exit codes: 0 done; 2 the user's input or setting is wrong (one line: what, where, how to mend); 130
interrupted, after saving; 141, as in other programs, nobody reads the output of what only prints
(a verb that writes files goes on); 1 our own fault, or a check that stopped the run.
"""

import errno
import io
import logging
import os
import pkgutil
import sys
from dataclasses import dataclass
from typing import Any

from lowmem_dpo.settings.configs import (
    CacheConfig,
    DemoConfig,
    GenerateConfig,
    PlanConfig,
    TrainConfig,
)
from lowmem_dpo.settings.fields import Faults, Settings, parse_config, to_yaml
from lowmem_dpo.settings.help import full_help, short_help
from lowmem_dpo.version import __version__

USAGE = """\
usage: python -m lowmem_dpo VERB [--config FILE.yaml] [--name value ...]

verbs:
{verbs}

python -m lowmem_dpo VERB --help              what a verb needs first
python -m lowmem_dpo VERB --help_all          every setting of a verb
python -m lowmem_dpo VERB ... --print_config  the resolved settings as YAML
python -m lowmem_dpo --version
LOWMEM_DPO_DEBUG=1 in the environment         errors show where they came from
"""


# What helps where the system refuses to write any more.
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


@dataclass(frozen=True)
class Verb:
    """One thing that the program does.

    Attributes:
        summary: What it does, in a line of the usage text.
        config: Its settings.
        function: Does it with such settings. Imported when it is needed: `--help` loads no torch.
        first: The settings that its short help shows.
        only_prints: Whether what it prints is all that it does: it ends where nobody reads that.
    """

    summary: str
    config: type[Settings]
    function: str
    first: tuple[str, ...]
    only_prints: bool = False


VERBS = {
    "train": Verb(
        "train an adapter on preference pairs",
        TrainConfig,
        "lowmem_dpo.training.fit:fit",
        ("model", "data", "output_dir", "eval_fraction", "learning_rate", "beta")
        + ("num_train_epochs", "batch_size", "max_length", "resume"),
    ),
    "precompute": Verb(
        "compute and cache the reference log-probs, then stop",
        TrainConfig,
        "lowmem_dpo.training.fit:precompute",
        ("model", "data", "max_length", "init_adapter", "quantization", "dtype", "device")
        + ("cache_dir", "chat_template", "system_prompt"),
    ),
    "generate": Verb(
        "answer prompts with the base and an adapter, side by side",
        GenerateConfig,
        "lowmem_dpo.pipeline.generate:generate",
        ("model", "adapter", "prompt", "prompts", "compare", "max_new_tokens", "temperature")
        + ("seed", "system_prompt", "device"),
        only_prints=True,
    ),
    "plan": Verb(
        "say whether training fits on a card, which need not be here",
        PlanConfig,
        "lowmem_dpo.pipeline.plan:plan",
        ("model", "data", "card", "max_length", "batch_size", "memory_limit", "smallest")
        + ("all_cards", "picture", "json"),
        only_prints=True,
    ),
    "cache": Verb(
        "list what the cache holds, and remove what is of no use",
        CacheConfig,
        "lowmem_dpo.pipeline.cache:cache",
        ("cache_dir", "prune", "unused_days"),
    ),
    "demo": Verb(
        "a whole two-minute run on a small model made on the spot, offline",
        DemoConfig,
        "lowmem_dpo.demo.demo:demo",
        ("output_dir", "seed", "device"),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Words after the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # cp1252 and the like lack most letters
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _main(words)
        print(end="", flush=True)  # at Python's end a failure would be a traceback
        return code
    except KeyboardInterrupt:  # before the verb began
        print("lowmem_dpo: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        from lowmem_dpo.console import drop_output

        drop_output()
        if isinstance(error, BrokenPipeError):
            return 128 + 13  # what a shell makes of SIGPIPE
        return _fail(f"cannot write the output: {error.strerror}")


def _main(words: list[str]) -> int:
    """Do what the words say; `main` deals with what happens around it."""
    if words[:1] in (["-h"], ["--help"], ["help"]) and words[1:2] and words[1] in VERBS:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<13}{verb.summary}" for name, verb in VERBS.items())
        print(USAGE.format(verbs=verbs), end="")
        return 0 if words else 2
    if words[0] in ("--version", "version"):
        print(f"lowmem_dpo {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS:
        return _fail(f"unknown verb {name!r}; known: {', '.join(VERBS)}")
    verb = VERBS[name]
    if "--help_all" in rest or "--help-all" in rest:
        print(full_help(name, verb.summary, verb.config), end="")
        return 0
    if "--help" in rest or "-h" in rest:
        print(short_help(name, verb.summary, verb.config, verb.first), end="")
        return 0
    again = "run again with --resume auto" if name == "train" else "run again"
    spellings = [f"--print{hyphen}config{value}" for hyphen in "_-" for value in ("", "=true")]
    show = [word for word in rest if word in spellings]
    try:
        config = parse_config(verb.config, [word for word in rest if word not in show])
        if not show:
            return _run(verb, config, again)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and verb.only_prints:
            raise
        if os.environ.get("LOWMEM_DPO_DEBUG"):
            raise
        if isinstance(error, Faults):
            return max(map(_fail, error.faults))
        return _fail(_os_error(error, again) if isinstance(error, OSError) else str(error))
    print(to_yaml(config), end="")
    return 0


def _run(verb: Verb, config: Any, again: str) -> int:
    """Run a verb with quiet libraries; interrupts and failed checks end without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from transformers.utils.logging import disable_progress_bar

    from lowmem_dpo.console import console, note
    from lowmem_dpo.stopping import RunStopped, catch_signals

    disable_progress_bar()
    console.only_prints = verb.only_prints
    try:
        with catch_signals(requested=True):  # nothing to save yet: the first one stops at once
            result = pkgutil.resolve_name(verb.function)(config)
            return 1 if result is False else 0  # the demo says whether it learned
    except KeyboardInterrupt:
        note(f"interrupted; {again}")
        return 130
    except RunStopped as error:
        note(f"stopped: {error}")
        return 1
    except Exception as error:
        from lowmem_dpo.machine.trial import is_out_of_memory

        if os.environ.get("LOWMEM_DPO_DEBUG") or not is_out_of_memory(error):
            raise
        why = " ".join(str(error).split())[:200]
        help_ = "free some, see docs/dpo-in-practice.md for what needs less"
        note(f"stopped: out of memory{why and f' ({why})'}; {help_}, and {again}")
        return 1


def _os_error(error: OSError, again: str) -> str:
    """What the system refused, and to which file, where it says so, and what to do `again`."""
    if error.strerror is None:  # a library's own message
        return str(error)
    mend = _REMEDIES.get(error.errno or 0, "")
    action = "cannot write" if mend or error.errno == errno.EROFS else "cannot read or write"
    path = "" if error.filename is None else f" {error.filename}"
    mend = mend and f"; {mend} and {again}"
    return f"{action}{path}: {error.strerror}{mend}"


def _fail(message: str) -> int:
    from lowmem_dpo.console import note

    note(f"error: {' '.join(message.split())}")
    return 2
