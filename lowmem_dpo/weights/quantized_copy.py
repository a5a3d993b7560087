"""The quantised model on disk, so that a base is quantised once and not at every start.

    CACHE/models/IDENTITY/
      model.safetensors       the weights, in bitsandbytes' checkpoint format
      digests.json            SHA-256 of each tensor
      config.json, ...        those of the source, for other programs

The copy is written while the source is loaded, a tensor at a time: all sizes are known in advance,
so the header comes first and each tensor goes to its place. What is not quantised keeps the
source's numbers, whatever the run computes in. The folder gets its name when it is whole, and every
tensor is held against its digest when it is read; so nothing is flushed to the disk by force. A
copy that cannot be written or read costs a line and the time to quantise, never the run.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lowmem_dpo.files import lock_file, recover, unlock_file
from lowmem_dpo.weights.bitsandbytes_files import Layout, nf4_config
from lowmem_dpo.weights.folders import GENERATION_CONFIG_FILE, read_json
from lowmem_dpo.weights.safetensors_files import (
    DTYPE_NAMES,
    WEIGHTS_FILE,
    StoredTensor,
    read_header,
)

COPIES_FOLDER = "models"
TENSOR_DIGESTS_FILE = "digests.json"

_RESERVE_BYTES = 2**30  # left free for what the run itself writes


def copy_folder(cache_dir: Path, identity: str) -> Path:
    """Where the quantised copy of a base is, or will be."""
    return cache_dir / COPIES_FOLDER / identity


def read_copy(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a quantised copy, each with the digest it is held against.

    Raises:
        ValueError: If the copy is damaged.
    """
    digests = read_json(folder / TENSOR_DIGESTS_FILE)
    tensors = read_header(folder / WEIGHTS_FILE)
    if digests.keys() != tensors.keys():
        raise ValueError(f"{folder / TENSOR_DIGESTS_FILE} does not belong to the weights beside it")
    return {name: replace(t, digest=str(digests[name])) for name, t in tensors.items()}


def copy_bytes(folder: Path) -> int:
    """Bytes that a quantised copy takes on disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


def remove_copy(folder: Path) -> None:
    """Delete a quantised copy, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


class CopyWriter:
    """A quantised copy in the making; where that fails it says why, and takes no more.

    One process at a time writes copies: the others do without.

    Args:
        folder: Of the copy, from `copy_folder`.
        layout: Type and shape of each tensor to come, by name.

    Attributes:
        note: Why there will be no copy; None while there may be one.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.note: str | None = None
        self._part = folder.with_name(f".{folder.name}.part")
        self._places: dict[str, tuple[int, int]] = {}
        self._digests: dict[str, str] = {}
        self._file: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None
        try:
            self._open(layout)
        except OSError as error:
            self._give_up(error)

    def _open(self, layout: Layout) -> None:
        copies = self.folder.parent
        copies.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(copies / ".lock")
        if self._lock is None:
            self.note = f"no quantised copy is made: another run is writing to {copies}"
            return
        if self.folder.exists():  # another run made it meanwhile
            return
        recover(copies, "")  # nobody else is writing: we hold the lock
        header, self._places = _lay_out(layout)
        needed = max(sum(place) for place in self._places.values()) + _RESERVE_BYTES
        free = shutil.disk_usage(copies).free
        if free < needed:
            self.note = (
                f"no quantised copy is made: {copies} has {free / 2**30:.1f} GiB free, "
                f"{needed / 2**30:.1f} GiB are needed"
            )
            return
        self._part.mkdir()
        self._file = (self._part / WEIGHTS_FILE).open("wb")
        self._file.write(header)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write some of the tensors.

        Args:
            tensors: By name, on any device, of the layout's type and size.
        """
        for name, tensor in tensors.items():
            if self._file is not None:
                flat = tensor.detach().cpu().reshape(-1).view(torch.uint8)
                try:
                    self._write(self._file, name, memoryview(flat.numpy()))  # type: ignore[arg-type]
                except OSError as error:
                    self._give_up(error)

    def _write(self, file: IO[bytes], name: str, data: memoryview) -> None:
        start, nbytes = self._places[name]
        assert data.nbytes == nbytes, name
        self._digests[name] = hashlib.sha256(data).hexdigest()
        file.seek(start)
        file.write(data)

    def finish(self, source: Path) -> bool:
        """Give the copy its name, once every tensor was added.

        Args:
            source: Folder of the source, whose configs are copied.

        Returns:
            Whether this made a copy.
        """
        if self._file is None:
            return False
        assert self._digests.keys() == self._places.keys()
        try:
            self._file.close()
            _write_json(self._part / "config.json", nf4_config(read_json(source / "config.json")))
            if (source / GENERATION_CONFIG_FILE).is_file():
                shutil.copyfile(
                    source / GENERATION_CONFIG_FILE, self._part / GENERATION_CONFIG_FILE
                )
            _write_json(self._part / TENSOR_DIGESTS_FILE, self._digests)
            os.replace(self._part, self.folder)
        except OSError as error:
            self._give_up(error)
        return self.note is None

    def close(self) -> None:
        """Drop what was not finished and let other processes write."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what was buffered may not fit on the disk
                self._file.close()
            self._file = None
            shutil.rmtree(self._part, ignore_errors=True)
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def _give_up(self, error: OSError) -> None:
        self.note = (
            f"no quantised copy is made: cannot write to {self.folder.parent}: {error.strerror}"
        )
        self.close()


def _lay_out(layout: Layout) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file, and start and size of each tensor in the file.

    Wide types come first and the header is a multiple of 8 bytes, so that all are aligned.
    """
    entries, places, end = {}, {}, 0
    for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
        dtype, shape = layout[name]
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        places[name] = (start, end - start)
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    first = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: (first + start, size) for name, (start, size) in places.items()}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
