"""Encoded pairs on disk, so that a large file is read and tokenised once and not at every start.

    CACHE/pairs/KEY.npz     KEY is the digest of all that makes token ids of the rows

An entry is an archive of NumPy arrays: token ids, tree after tree, some thousand trees an array; a
table of lengths and places; the prompts' keys; the reports as JSON. The archive's checksums tell a
damaged entry, which counts as absent. Entries appear whole under their name; any number of runs may
share them.
"""

import hashlib
import json
import os
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lowmem_dpo.console import warn
from lowmem_dpo.files import replace_file
from lowmem_dpo.tokens.trees import ID_TYPE, Tree, tree_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS_FOLDER = "pairs"
CHUNK_TREES = 4096
KEY_DIGITS = 32  # of a prompt's key
# What reading a damaged entry raises, or another file under its name.
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
# Rooms whose code makes token ids of rows.
ROOMS = ("data", "tokens")


def entry_path(
    cache_dir: Path, tokenizer: "PreTrainedTokenizerBase", what: dict[str, Any]
) -> Path | None:
    """Where the pairs of a source are kept.

    Args:
        cache_dir: The cache folder.
        tokenizer: The model's tokenizer.
        what: All else that the token ids depend on; JSON values.

    Returns:
        A path; None for tokenizers written in Python, whose content nothing tells.
    """
    if not tokenizer.is_fast:
        return None
    tokens = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    tokens.append(getattr(tokenizer, "split_special_tokens", False))
    text = json.dumps([what, tokens, code_digest()], sort_keys=True, default=str)
    return cache_dir / PAIRS_FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def code_digest() -> str:
    """SHA-256 (hex) of the code that makes token ids of rows."""
    files = sorted(p for room in ROOMS for p in (Path(__file__).parents[1] / room).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def read_reports(path: Path) -> dict[str, Any]:
    """What an entry says of itself, its trees left out.

    Raises:
        DAMAGE: It is damaged.
    """
    with np.load(path, allow_pickle=False) as archive:
        reports: dict[str, Any] = json.loads(archive["reports"].tobytes())
        return reports


def read_entry(path: Path) -> tuple[list[Tree], dict[str, Any]] | None:
    """The trees of an entry and its reports; None if there is none, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            reports = json.loads(archive["reports"].tobytes())
            trees = list(_trees(archive))
        with suppress(OSError):  # when it was used last
            os.utime(path)
        return trees, reports
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged"
        warn(f"{path} is left out: {reason}; the pairs are encoded again")
        return None


def write_entry(path: Path, trees: Sequence[Tree], reports: dict[str, Any]) -> None:
    """Keep trees for the next run.

    Args:
        path: Of the entry.
        trees: At least one.
        reports: What became of the rows; JSON values.

    Raises:
        OSError: If it cannot be written; an entry that was there before is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in _arrays(trees, reports):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, content, allow_pickle=False)

    replace_file(path, write)


def _arrays(
    trees: Sequence[Tree], reports: dict[str, Any]
) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
    """Yield what an entry consists of, by name."""
    yield "reports", np.frombuffer(json.dumps(reports).encode(), dtype=np.uint8)
    fields = ("row", "trunk_len", "chosen_len", "rejected_len", "chosen_start", "rejected_start")
    table = np.array([[getattr(tree, name) for name in fields] for tree in trees], dtype=np.int64)
    yield "table", table
    keys = "".join(tree.prompt_key.zfill(KEY_DIGITS) for tree in trees)
    yield "prompt_keys", np.frombuffer(bytes.fromhex(keys), dtype=np.uint8)
    for first in range(0, len(trees), CHUNK_TREES):
        ids = b"".join(tree.ids.tobytes() for tree in trees[first : first + CHUNK_TREES])
        yield f"ids_{first // CHUNK_TREES}", np.frombuffer(ids, dtype=np.int32)


def _trees(archive: Any) -> Iterator[Tree]:
    """Yield the trees of an entry."""
    keys, table = archive["prompt_keys"].tobytes().hex(), archive["table"].tolist()
    rows = enumerate(table)
    for number in range(ceil(len(table) / CHUNK_TREES)):
        content, place = memoryview(archive[f"ids_{number}"].tobytes()), 0
        for i, (row, *lengths, chosen_start, rejected_start) in islice(rows, CHUNK_TREES):
            end = place + 4 * sum(lengths)
            ids = array(ID_TYPE, bytes(content[place:end]))
            key = keys[i * KEY_DIGITS : (i + 1) * KEY_DIGITS]
            yield tree_of(row, ids, tuple(lengths), (chosen_start, rejected_start), key)
            place = end
