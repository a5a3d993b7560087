"""The quantised model on disk, so that a base is quantised once and not at every start.

    CACHE/models/IDENTITY/
      model-00001-of-...      the weights, in bitsandbytes' checkpoint format: a file for each
                              decoder layer, and one for each tensor outside of them
      model.safetensors.index.json   which tensor is in which file
      digests.json            SHA-256 of each tensor
      config.json, ...        those of the source, for other programs

The copy is written while the source is loaded: a layer goes to its file when its last tensor was
quantised. Until then its tensors are those of the model itself, so that they take no memory of
their own. What is not quantised keeps the source's numbers, whatever the run computes in. The
folder gets its name when it is whole, and every tensor is held against its digest when it is read;
so nothing is flushed to the disk by force. A copy that cannot be written or read costs a line and
the time to quantise, never the run. Copies of earlier releases are one file, model.safetensors.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowmem_dpo.files import lock_file, recover, unlock_file
from lowmem_dpo.weights.bitsandbytes_files import nf4_config
from lowmem_dpo.weights.folders import GENERATION_CONFIG_FILE, read_json
from lowmem_dpo.weights.safetensors_files import (
    INDEX_FILE,
    StoredTensor,
    read_headers,
    weight_files,
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
    tensors = read_headers(weight_files(folder))
    if digests.keys() != tensors.keys():
        raise ValueError(f"{folder / TENSOR_DIGESTS_FILE} does not belong to the weights beside it")
    return {name: replace(t, digest=str(digests[name])) for name, t in tensors.items()}


def copy_bytes(folder: Path) -> int:
    """Bytes that a quantised copy takes on disk."""
    return sum(path.stat().st_size for path in folder.iterdir())


def remove_copy(folder: Path) -> None:
    """Delete a quantised copy, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


def _layer_of(name: str) -> str:
    """The decoder layer that a weight belongs to, or the weight itself where there is none."""
    match = re.match(r"model\.layers\.\d+\b", name)
    return match[0] if match else name


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


class CopyWriter:
    """A quantised copy in the making; where that fails it says why, and takes no more.

    One process at a time writes copies: the others do without.

    Args:
        folder: Of the copy, from `copy_folder`.
        names: Of all the weights to come, as the model calls them.
        num_bytes: About what they will take.

    Attributes:
        note: Why there will be no copy; None while there may be one.
    """

    def __init__(self, folder: Path, names: Iterable[str], num_bytes: int) -> None:
        self.folder = folder
        self.note: str | None = None
        self._part = folder.with_name(f".{folder.name}.part")
        self._is_open = False
        self._missing = Counter(map(_layer_of, names))  # weights that a file waits for
        files = enumerate(self._missing, start=1)
        end = f"of-{len(self._missing):05}.safetensors"
        self._files = {layer: f"model-{number:05}-{end}" for number, layer in files}
        self._waiting: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._missing}
        self._places: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._lock: IO[bytes] | None = None
        try:
            self._open(num_bytes + _RESERVE_BYTES)
        except OSError as error:
            self._give_up(error)

    def _open(self, needed_bytes: int) -> None:
        copies = self.folder.parent
        copies.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(copies / ".lock")
        if self._lock is None:
            self.note = f"no quantised copy is made: another run is writing to {copies}"
            return
        if self.folder.exists():  # another run made it meanwhile
            return
        recover(copies, "")  # nobody else is writing: we hold the lock
        free_bytes = shutil.disk_usage(copies).free
        if free_bytes < needed_bytes:
            self.note = (
                f"no quantised copy is made: {copies} has {free_bytes / 2**30:.1f} GiB free, "
                f"{needed_bytes / 2**30:.1f} GiB are needed"
            )
            return
        self._part.mkdir()
        self._is_open = True

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a weight, and write its layer if that is whole now.

        Args:
            name: Of the weight in the model.
            tensors: What is stored of it, by full name, on any device; they must not change before
                the last weight of their layer was added.
        """
        if not self._is_open:
            return
        layer = _layer_of(name)
        self._waiting[layer] |= tensors
        self._missing[layer] -= 1
        if not self._missing[layer]:
            try:
                self._write(self._files[layer], self._waiting.pop(layer))
            except (OSError, SafetensorError) as error:
                self._give_up(error)

    def _write(self, file: str, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            flat = tensor.reshape(-1).view(torch.uint8)
            self._digests[name] = hashlib.sha256(flat.numpy()).hexdigest()  # type: ignore[arg-type]
            self._places[name] = file
        save_file(tensors, self._part / file, {"format": "pt"})

    def finish(self, source: Path) -> bool:
        """Give the copy its name, once every tensor was added.

        Args:
            source: Folder of the source, whose configs are copied.

        Returns:
            Whether this made a copy.
        """
        if not self._is_open:
            return False
        assert not self._waiting, "a weight was not added"
        try:
            _write_json(self._part / INDEX_FILE, {"metadata": {}, "weight_map": self._places})
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
        if self._is_open:
            self._is_open = False
            self._waiting.clear()
            shutil.rmtree(self._part, ignore_errors=True)
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def _give_up(self, error: OSError | SafetensorError) -> None:
        reason = error.strerror if isinstance(error, OSError) else error
        self.note = f"no quantised copy is made: cannot write to {self.folder.parent}: {reason}"
        self.close()
