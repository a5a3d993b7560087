"""Safetensors files: what is in them, one tensor at a time, and what they are worth (digests).

A file is 8 bytes of header length, a JSON header that says each tensor's dtype, shape and place,
and the numbers. Tensors are read with plain reads into memory of their own: a file kept open
through the safetensors library stays mapped, and every page that was touched counts as memory of
this process until it is closed.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import contextlib
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem_dpo.files import replace_file

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGESTS_FILE = "digests.json"
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
_PIECE_BYTES = 2**24
_MAX_HEADER_BYTES = 100_000_000
_DIGEST = re.compile("[0-9a-f]{64}")
_TICK_NS = 2 * 10**9  # of the coarsest clock, that of FAT


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        dtype: Of the numbers.
        shape: Of the tensor.
        offset: Its first byte.
        nbytes: Its bytes.
        digest: SHA-256 that its bytes must have, in hex; None where it is not known.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: str | None = None

    def read(self, buffer: Tensor | None = None) -> Tensor:
        """The tensor, on the CPU.

        Args:
            buffer: uint8, at least `nbytes` long: the tensor lies in it until the next one is read.
                Without one, the tensor gets memory of its own.

        Raises:
            ValueError: If the file ends too early, or the digest is another one.
        """
        if buffer is None:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        data = buffer[: self.nbytes]
        content = rest = memoryview(data.numpy())  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while rest:
                count = file.readinto(rest)  # which may hand out less than was asked for
                if not count:
                    raise _damaged(self.path, "it ends inside a tensor")
                rest = rest[count:]
        if self.digest is not None and hashlib.sha256(content).hexdigest() != self.digest:
            raise _damaged(self.path, "a tensor's digest is not the recorded one")
        return data.view(self.dtype).view(self.shape)

    def content_digest(self) -> str:
        """SHA-256 of its bytes, in hex; they are read a piece at a time.

        Raises:
            ValueError: If the file ends too early.
        """
        digest, left = hashlib.sha256(), self.nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise _damaged(self.path, "it ends inside a tensor")
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, in the order they lie in.

    Raises:
        ValueError: If the file is missing, damaged, or stores numbers of another kind.
    """
    tensors: dict[str, StoredTensor] = {}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, "its header does not fit in it")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ValueError(
                    f"{path} stores numbers as {entry['dtype']}; only {', '.join(_DTYPES)} can be "
                    "loaded"
                )
            shape = tuple(int(length) for length in entry["shape"])
            start, end = entry["data_offsets"]
            nbytes = math.prod(shape) * dtype.itemsize
            if start < 0 or min(shape, default=0) < 0 or end - start != nbytes:
                raise _damaged(path, "its header contradicts itself")
            tensors[name] = StoredTensor(path, dtype, shape, 8 + header_bytes + start, nbytes)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        raise _damaged(path, "its header cannot be read") from None
    if any(tensor.offset + tensor.nbytes > size for tensor in tensors.values()):
        raise _damaged(path, f"it is cut off after {size} bytes")
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset))


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); download or copy it again")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order; shards may lack their index.

    Raises:
        ValueError: If there is none, or one that the index or a shard's name tells of is missing.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds pickled weights (.bin), which can run code; convert them "
                " with transformers: from_pretrained(FOLDER), then save_pretrained(NEW_FOLDER)"
            )
        counts = {match[1] for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
        if len(counts) != 1:
            there = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
            beside = f"; there is {there}, in another layout than transformers'" if there else ""
            raise ValueError(
                f"{folder} holds no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}{beside}"
            )
        (count,) = counts
        names = {f"model-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1)}
    else:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, AttributeError, KeyError, TypeError):
            raise _damaged(index, "it is no index of weights") from None
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)} of its {len(names)} shards; download it again"
        )
    return [folder / name for name in sorted(names)]


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files, by name, in the order they lie in.

    Raises:
        ValueError: If a file is damaged or a tensor is there twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        header = read_header(path)
        twice = tensors.keys() & header.keys()
        if twice:
            raise ValueError(
                f"{min(twice)} is stored twice: in {path} and {tensors[min(twice)].path}"
            )
        tensors |= header
    return tensors


@dataclass(frozen=True)
class HashedFile:
    """A file and what it held when it was hashed; `hash_file` makes it.

    Attributes:
        path: The file.
        digest: SHA-256 of its content, in hex.
        stamp: What the system said of it before it was read.
        is_settled: Whether any change since then shows in the stamp.
    """

    path: Path
    digest: str
    stamp: list[int]
    is_settled: bool

    def is_unchanged(self) -> bool:
        """Whether it holds the same now; it is read again only where its stamp leaves that open."""
        return (self.is_settled and _stamp(self.path) == self.stamp) or (
            file_digest(self.path) == self.digest
        )


def hash_file(path: Path, cache_dir: Path | None = None) -> HashedFile:
    """Hash a file.

    Args:
        path: The file.
        cache_dir: Where to remember it, so that gigabytes are read once; a file with the same
            stamp counts as the same. None remembers nothing.
    """
    stamp, begun_ns = _stamp(path), time.time_ns()
    key = str(path.resolve())
    memory = cache_dir / DIGESTS_FILE if cache_dir else None
    known = _read_digests(memory)
    if key in known and known[key][:-1] == stamp:
        return HashedFile(path, known[key][-1], stamp, is_settled=True)
    digest = file_digest(path)
    # A change soon after the last one may leave the stamp as it is: clocks of file systems tick.
    is_settled = begun_ns - max(stamp[1:3]) > _TICK_NS
    if memory and is_settled:
        # Read again: another process may have added to it meanwhile. What is lost is redone.
        entries = _read_digests(memory) | {key: [*stamp, digest]}
        with contextlib.suppress(OSError):  # a full disk, a folder that cannot be written
            memory.parent.mkdir(parents=True, exist_ok=True)
            replace_file(memory, json.dumps(entries, indent=0).encode())
    return HashedFile(path, digest, stamp, is_settled)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    """What differs once a file was changed or replaced, beginning with its size and its times."""
    stat = path.stat()
    # Another one after a change, even at equal size and mtime: no tool sets ctime back. (Windows
    # gives the time of creation in its place.)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _read_digests(path: Path | None) -> dict[str, list]:
    """What is remembered; what of it is missing or damaged is left out: it can be redone."""
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if isinstance(entries, dict):
            lists = {key: entry for key, entry in entries.items() if isinstance(entry, list)}
            return {key: v for key, v in lists.items() if v and _DIGEST.fullmatch(str(v[-1]))}
    return {}
