"""The cache of reference log-probs: per-token fp32 numbers on disk, keyed by what they depend on.

Layout, below the cache folder:

    reference/<identity>/manifest.json          what the numbers were computed from
    reference/<identity>/<sha256>.safetensors   a shard: keys, lengths, log-probs, numerics
    fingerprint

The identity covers the base's files, the quantisation, the starting adapter and the scoring
options; a pair's key covers its token ids and scored positions. So an edited data file costs the
changed pairs only, and another beta, loss, learning rate or seed costs nothing. Shards are written
one by one under a temporary name and renamed when whole: a killed pass goes on where it stopped. A
shard's name is the digest of its content, so a damaged one is found when it is read, and two runs
never write the same name with different content: any number of them may share a cache.

Beside the key stands the fingerprint: everything else that can move a log-prob's last bits (device,
versions, dtype, micro-batch size). Numbers of the same fingerprint are reproduced exactly.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from lowmem_dpo.console import warn
from lowmem_dpo.files import replace_file

REFERENCE_FOLDER = "reference"
MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 2  # of shards and pair keys
STALE_SECONDS = 3600.0  # no shard takes that long to write: what is older, a kill has left
Fingerprint = dict[str, Any]


@dataclass
class CachedLogps:
    """Reference numbers found for the pairs of a run.

    Attributes:
        same: Pair key to its token log-probs, scored under this run's fingerprint.
        other: The same for pairs known only under another fingerprint.
        other_fingerprint: One such fingerprint, to say what differs.
    """

    same: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    other_fingerprint: Fingerprint | None = None


class ReferenceCache:
    """The shards of one reference.

    They are read when it is made; a damaged one is said, set aside and counts as absent.

    Args:
        cache_dir: The cache folder.
        identity: Everything that the numbers depend on but the pair; JSON values.
        source: The base's folder or id, for those who read the manifest.

    Attributes:
        digest: Of the identity.
        directory: Where the shards are.
        shards: Of each, its fingerprint, and pair keys to token log-probs.
    """

    def __init__(self, cache_dir: Path, identity: Mapping[str, Any], source: str = "") -> None:
        text = json.dumps([SCHEMA_VERSION, identity], sort_keys=True)
        self.identity, self.source = dict(identity), source
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.directory = cache_dir / REFERENCE_FOLDER / self.digest[:32]
        with contextlib.suppress(OSError):  # when it was used last
            os.utime(self.directory / MANIFEST_FILE)
        paths = sorted(self.directory.glob("*.safetensors"))
        contents = [content for path in paths if (content := _read_whole(path)) is not None]
        self.shards = [_parse_shard(content) for content in contents]

    def read(self, keys: Sequence[str], fingerprint: Fingerprint) -> CachedLogps:
        """Find the given pairs.

        Args:
            keys: Digests of the pairs' token trees.
            fingerprint: Of this run.
        """
        wanted, found = set(keys), CachedLogps()
        for shard_fingerprint, logps in self.shards:
            fits = shard_fingerprint == fingerprint
            known = {key: logps[key] for key in logps.keys() & wanted}
            (found.same if fits else found.other).update(known)
            if known and not fits:
                found.other_fingerprint = shard_fingerprint
        for key in found.same.keys() & found.other.keys():
            del found.other[key]
        return found

    def pack_tokens(self, keys: Sequence[str], fingerprint: Fingerprint) -> int | None:
        """The micro-batch size under which most of these pairs were scored, all else being equal.

        Args:
            keys: Digests of the pairs' token trees.
            fingerprint: Of this run; its `pack_tokens` is ignored.
        """
        wanted, votes = set(keys), dict[int, int]()
        for shard_fingerprint, logps in self.shards:
            if {**shard_fingerprint, "pack_tokens": 0} == {**fingerprint, "pack_tokens": 0}:
                size = shard_fingerprint["pack_tokens"]
                votes[size] = votes.get(size, 0) + len(logps.keys() & wanted)
        best = max(votes, key=lambda size: (votes[size], size), default=None)
        return best if best is not None and votes[best] else None

    def write(self, logps: Mapping[str, Tensor], fingerprint: Fingerprint) -> None:
        """Write one shard, for the next run.

        Args:
            logps: Pair key to its token log-probs, [T] fp32 on the CPU.
            fingerprint: Of this run.

        Raises:
            OSError: If it cannot be written; what was written before is whole.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for part in self.directory.glob(".*.part"):
            with contextlib.suppress(OSError):  # another run was faster, or may delete here alone
                if time.time() - part.stat().st_mtime > STALE_SECONDS:
                    part.unlink()
        manifest = self.directory / MANIFEST_FILE
        if not manifest.exists():
            record = {"schema_version": SCHEMA_VERSION, "identity": self.identity}
            record |= {"source": self.source} if self.source else {}
            replace_file(manifest, json.dumps(record, indent=2, allow_nan=False).encode())
        keys = sorted(logps)
        tensors = {
            "keys": torch.frombuffer(bytearray.fromhex("".join(keys)), dtype=torch.uint8),
            "lengths": torch.tensor([len(logps[key]) for key in keys]),
            "logps": torch.cat([logps[key] for key in keys]),
        }
        metadata = {"fingerprint": json.dumps(fingerprint, sort_keys=True)}
        content = save(tensors, metadata)
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        replace_file(self.directory / name, content)


def _read_whole(path: Path) -> bytes | None:
    """A shard's content; None, and set aside, if it is not what was written."""
    try:
        content = path.read_bytes()
        if _is_whole(content, path):
            return content
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        # Another run may have set it aside and written it again since it was read here.
        if _is_whole(content := aside.read_bytes(), path):
            aside.replace(path)
            return content
        warn(f"{path} is damaged and set aside; its pairs are scored again")
    except FileNotFoundError:  # another run has just set it aside
        pass
    except OSError as error:  # unreadable, or in a folder that cannot be written
        warn(f"{path} is left out: {error.strerror}; its pairs are scored again")
    return None


def _is_whole(content: bytes, path: Path) -> bool:
    return hashlib.sha256(content).hexdigest() == path.stem


def read_fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint of a shard by its header alone; None if that cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = file.read(min(header_bytes, path.stat().st_size))
        return dict(json.loads(json.loads(header)["__metadata__"]["fingerprint"]))
    return None


def _parse_shard(content: bytes) -> tuple[Fingerprint, dict[str, Tensor]]:
    header_bytes = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
    tensors = load(content)
    keys = tensors["keys"].numpy().tobytes().hex()
    logps = tensors["logps"].split(tensors["lengths"].tolist())
    names = (keys[i : i + 64] for i in range(0, len(keys), 64))
    return json.loads(metadata["fingerprint"]), dict(zip(names, logps, strict=True))


def fingerprint_difference(old: Fingerprint, new: Fingerprint) -> str:
    """What differs between two fingerprints, for a message: `torch 2.11 -> 2.13, dtype ...`."""
    names = sorted(old.keys() | new.keys())
    changed = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)
