"""The quantised model on disk, so that a base is quantised once and not at every start.

    CACHE/models/IDENTITY-SEAL/
      model.layers.0.safetensors, ...   the weights, in bitsandbytes' checkpoint format: a file
                              for each decoder layer, and one for each tensor outside of them
      model.safetensors.index.json   which tensor is in which file
      manifest.json           the base's name and whole identity, SHA-256 of each tensor
      config.json, ...        those of the source, for other programs

The copy is written while the source is loaded: a layer goes to its file when its last tensor was
quantised. Until then its tensors are those of the model itself, so that they take no memory of
their own. What is not quantised keeps the source's numbers, whatever the run computes in. The
folder gets its name when it is whole. The name holds the manifest's digest (SEAL), the manifest
the tensors', and each is held against it when it is read: what was edited, or copied here from
another base, is not believed, and nothing is flushed to the disk by force. A copy that cannot be
written or read costs a line and the time to quantise, never the run.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lowmem_dpo.files import lock_file, recover, unlock_file
from lowmem_dpo.linears.nf4 import QUANTISER_VERSION
from lowmem_dpo.weights.bitsandbytes_files import nf4_config
from lowmem_dpo.weights.folders import GENERATION_CONFIG_FILE, absolute, read_json
from lowmem_dpo.weights.safetensors_files import (
    INDEX_FILE,
    StoredTensor,
    read_headers,
    weight_files,
)

COPIES_FOLDER = "models"
MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1

_PREFIX_LENGTH = 32  # of identity and seal in a name, which Windows wants short
_RESERVE_BYTES = 2**30  # left free for what the run itself writes


def find_copies(copies: Path, identity: str) -> list[Path]:
    """The folders that may be copies of a base; those of earlier releases bear no seal.

    Args:
        copies: The cache's folder of copies.
        identity: Of the base.
    """
    if not os.path.isdir(copies):  # Path.is_dir raises where one may not look
        return []
    return sorted(copies.glob(f"{identity[:_PREFIX_LENGTH]}*"))


def read_copy(folder: Path, identity: str) -> dict[str, StoredTensor]:
    """The tensors of a quantised copy, each with the digest it is held against.

    Args:
        folder: Of the copy.
        identity: Of the base that it should be a copy of.

    Raises:
        ValueError: If the copy is damaged, was changed, or is of another base.
    """
    manifest, tensors = read_manifest(folder), read_headers(weight_files(folder))
    digests = manifest["tensors"]
    if manifest["identity"] != identity or digests.keys() != tensors.keys():
        raise ValueError(f"{folder / MANIFEST_FILE} does not belong to the weights beside it")
    with suppress(OSError):  # when it was used last
        os.utime(folder / MANIFEST_FILE)
    return {name: replace(t, digest=str(digests[name])) for name, t in tensors.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a copy's manifest says.

    Raises:
        ValueError: If it is not what was written, as the folder's name tells.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    if folder.name != _sealed_name(str(manifest.get("identity")), path.read_bytes()):
        raise ValueError(f"{path} is not what was written there")
    return manifest


def _sealed_name(identity: str, manifest: bytes) -> str:
    seal = hashlib.sha256(manifest).hexdigest()
    return f"{identity[:_PREFIX_LENGTH]}-{seal[:_PREFIX_LENGTH]}"


def remove_copy(folder: Path) -> None:
    """Delete a quantised copy, as far as that can be done."""
    shutil.rmtree(folder, ignore_errors=True)


class CopyWriter:
    """A quantised copy in the making; where that fails it says why, and takes no more.

    One process at a time writes copies: the others do without.

    Args:
        copies: The cache's folder of copies.
        identity: Of the base.
        names: Of all the weights to come, as the model calls them.
        num_bytes: About what they will take.

    Attributes:
        note: Why there will be no copy; None while there may be one.
        num_bytes: Of what was written.
    """

    def __init__(self, copies: Path, identity: str, names: Iterable[str], num_bytes: int) -> None:
        self._is_open = False
        self.note: str | None = None
        self.num_bytes = 0
        self._digests: dict[str, str] = {}
        self._files_of_tensors: dict[str, str] = {}
        self._lock: IO[bytes] | None = None
        self._copies, self._identity = copies, identity
        self._part = copies / f".{identity[:_PREFIX_LENGTH]}.part"
        self._files: dict[str, str] = {}
        for name in names:
            layer = re.match(r"model\.layers\.\d+\b", name)
            self._files[name] = f"{layer[0] if layer else name}.safetensors"
        self._missing = Counter(self._files.values())  # weights that a file waits for
        self._waiting: dict[str, dict[str, Tensor]] = {file: {} for file in self._missing}
        needed_bytes = num_bytes + _RESERVE_BYTES
        try:
            copies.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(copies / ".lock")
            if self._lock is None:
                self.note = f"no quantised copy is made: another run is writing to {copies}"
            elif not find_copies(copies, identity):  # or else another run made it meanwhile
                recover(copies, "")  # nobody else is writing: we hold the lock
                free_bytes = shutil.disk_usage(copies).free
                if free_bytes < needed_bytes:
                    self.note = (
                        f"no quantised copy is made: {copies} has {free_bytes / 2**30:.1f} GiB "
                        f"free, {needed_bytes / 2**30:.1f} GiB are needed"
                    )
                else:
                    self._part.mkdir()
                    self._is_open = True
        except OSError as error:
            self._give_up(error)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a weight, and write its layer if that is whole now.

        Args:
            name: Of the weight in the model.
            tensors: What is stored of it, by full name, on any device; they must not change before
                the last weight of their layer was added.
        """
        if not self._is_open:
            return
        file = self._files[name]
        self._waiting[file] |= tensors
        self._missing[file] -= 1
        if self._missing[file]:
            return
        whole = {key: tensor.detach().cpu() for key, tensor in self._waiting.pop(file).items()}
        for key, tensor in whole.items():
            flat = tensor.reshape(-1).view(torch.uint8)
            self._digests[key] = hashlib.sha256(flat.numpy().data).hexdigest()
            self._files_of_tensors[key] = file
            self.num_bytes += tensor.nbytes
        try:
            save_file(whole, self._part / file, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            self._give_up(error)

    def finish(self, source: str, source_folder: Path) -> Path | None:
        """Give the copy its name, once every tensor was added.

        Args:
            source: The base's folder or id, for those who read the manifest.
            source_folder: Where its configs are, which are copied.

        Returns:
            The copy's folder; None if this made none.
        """
        if not self._is_open:
            return None
        assert not self._waiting, "a weight was not added"
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "source": absolute(source),
            "identity": self._identity,
            "quantiser": QUANTISER_VERSION,
            "tensors": self._digests,
        }
        contents: dict[str, Any] = {
            INDEX_FILE: {"metadata": {}, "weight_map": self._files_of_tensors},
            MANIFEST_FILE: manifest,
        }
        generation = source_folder / GENERATION_CONFIG_FILE
        try:
            contents["config.json"] = nf4_config(read_json(source_folder / "config.json"))
            texts = {file: json.dumps(content, indent=1) for file, content in contents.items()}
            for file, text in texts.items():
                (self._part / file).write_bytes(text.encode())
            if generation.is_file():
                shutil.copyfile(generation, self._part / GENERATION_CONFIG_FILE)
            name = _sealed_name(self._identity, texts[MANIFEST_FILE].encode())
            os.replace(self._part, self._copies / name)
            return self._copies / name
        except OSError as error:
            self._give_up(error)
            return None

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
        self.note = f"no quantised copy is made: cannot write to {self._copies}: {reason}"
        self.close()
