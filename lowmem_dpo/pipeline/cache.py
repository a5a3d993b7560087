"""`cache`: what lies in the cache folder, for whom, how large; and the removal of what is no use.

Only what has the place and the name of something of ours is ever removed, and nothing that a run
holds (`files.in_use`). A run that looks for what was removed makes it again.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_dpo.console import say, size, warn
from lowmem_dpo.files import cache_folder, is_held, is_in_use, remove_folder
from lowmem_dpo.linears.nf4 import QUANTISER_VERSION
from lowmem_dpo.reference.cache import (
    REFERENCE_FOLDER,
    SCHEMA_VERSION,
    STALE_SECONDS,
    read_fingerprint,
)
from lowmem_dpo.settings.configs import CacheConfig
from lowmem_dpo.tokens.cache import DAMAGE, PAIRS_FOLDER, code_digest, read_reports
from lowmem_dpo.weights.quantized_copy import COPIES_FOLDER, MANIFEST_FILE, read_manifest
from lowmem_dpo.weights.safetensors_files import DIGESTS_FILE, weight_files
from lowmem_dpo_kernels import NUMERICS_VERSION

_FOLDERS = (COPIES_FOLDER, REFERENCE_FOLDER, PAIRS_FOLDER)
_SECONDS_A_DAY = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """Something in the cache: its kind, and the base it belongs to, where that is known.

    Attributes:
        path: What is removed, file or folder.
        used: When it was used last, in seconds since 1970.
        useless: Why no run will read it again; None if one may.
    """

    kind: str
    owner: str
    path: Path
    used: float
    nbytes: int
    useless: str | None

    def __str__(self) -> str:
        """One line."""
        day = time.strftime("%Y-%m-%d", time.localtime(self.used))
        why = f" ({self.useless})" if self.useless else ""
        return f"{day}  {size(self.nbytes):>8}  {self.kind}: {self.owner}{why}"


def cache(config: CacheConfig) -> None:
    """List the cache, or remove what of it is no use.

    Raises:
        ValueError: If there is no such folder to look into, or something cannot be removed.
    """
    root = cache_folder(config.cache_dir)
    if root.exists() and not root.is_dir():
        raise ValueError(f"cache_dir {root} is a file; give the folder of caches")
    for folder in (root, *(root / name for name in _FOLDERS)):
        try:
            with suppress(FileNotFoundError):
                os.listdir(folder)
        except OSError as error:
            warn(f"{folder} is left out: {error.strerror}")
    entries = sorted(_entries(root), key=lambda entry: (entry.kind, -entry.used))
    if config.unused_days is not None:
        oldest = time.time() - config.unused_days * _SECONDS_A_DAY
        why = f"not used for {config.unused_days} days"
        entries = [e if e.useless or e.used > oldest else replace(e, useless=why) for e in entries]
    useless = [entry for entry in entries if entry.useless]
    if config.prune:
        _remove(root, useless)
        return
    say(f"cache {root}")
    for entry in entries:
        say(f"  {entry}")
    say(f"total: {_total(entries)}")
    if useless:
        say(f"of no use: {_total(useless)}; --prune removes that")


def _total(entries: list[Entry]) -> str:
    noun = "entry" if len(entries) == 1 else "entries"
    return f"{size(sum(entry.nbytes for entry in entries))} in {len(entries)} {noun}"


def _remove(root: Path, entries: list[Entry]) -> None:
    """Remove entries, a line each."""
    removed, failed = [], []
    for entry in entries:
        if any(is_in_use(path) for path in (entry.path, entry.path.parent)):
            say(f"kept, a run is using it: {entry}")
            continue
        try:
            with suppress(FileNotFoundError):  # somebody else was faster
                remove_folder(entry.path) if entry.path.is_dir() else entry.path.unlink()
        except OSError as error:
            failed.append(f"{entry.path}: {error.strerror}")
            continue
        removed.append(entry)
        say(f"removed: {entry}")
    say(f"freed {_total(removed)} of {root}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(entries)} cannot be removed: {failed[0]}")


def _entries(root: Path) -> Iterator[Entry]:
    """Everything in a cache folder that is ours."""
    copies = list(_copies(root / COPIES_FOLDER))
    owners = {identity: entry.owner for identity, entry in copies if identity}
    yield from (entry for _, entry in copies)
    for folder in _found(root / REFERENCE_FOLDER, "[0-9a-f]{32}"):
        yield from _reference(folder, owners)
    for path in _found(root / PAIRS_FOLDER, r"[0-9a-f]{32}\.npz"):
        try:
            reports = read_reports(path)
            useless = None if reports["code"] == code_digest() else "of an earlier release"
            yield _entry("encoded pairs", reports["source"], path, useless)
        except DAMAGE:
            yield _entry("encoded pairs", path.name, path, "damaged")
    for path in _found(root, re.escape(DIGESTS_FILE)):
        yield _entry("digests", f"{len(_read_json(path))} files", path)
    yield from _leftovers(root)


def _found(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder under such names; nothing where one may not look."""
    with suppress(OSError):
        paths = (path for path in sorted(folder.iterdir()) if not path.is_symlink())
        return [path for path in paths if re.fullmatch(pattern, path.name)]
    return []


def _entry(
    kind: str, owner: str, path: Path, useless: str | None = None, files: list[Path] | None = None
) -> Entry:
    """An entry with its size, and the time that its manifest, or the newest of its files, shows."""
    if files is None:
        files = list(path.rglob("*")) if path.is_dir() else [path]
    stats = {}
    for file in files:
        with suppress(OSError):  # it is gone by now
            stats[file] = file.stat()
    times = [stat.st_mtime for file, stat in stats.items() if file.name == MANIFEST_FILE]
    times = times or [stat.st_mtime for stat in stats.values()]
    nbytes = sum(stat.st_size for file, stat in stats.items() if file.is_file())
    return Entry(kind, owner, path, max(times, default=0.0), nbytes, useless)


def _copies(folder: Path) -> Iterator[tuple[str | None, Entry]]:
    """Quantised copies, each with its base's identity where that is known."""
    found: list[tuple[str | None, Entry]] = []
    useless: str | None
    newest: dict[str, float] = {}
    for path in _found(folder, "[0-9a-f]{32}-[0-9a-f]{32}|[0-9a-f]{64}"):
        try:
            manifest = read_manifest(path)
            weight_files(path)
        except (OSError, ValueError):
            is_older = not (path / MANIFEST_FILE).exists() and "-" not in path.name
            useless = "of an earlier release" if is_older else "damaged"
            found.append((None, _entry("quantised copy", path.name, path, useless)))
            continue
        source = manifest["source"]
        if manifest.get("quantiser") != QUANTISER_VERSION:
            useless = "of an earlier release"
        elif Path(source).is_absolute() and not (Path(source) / "config.json").exists():
            useless = "its base is gone"
        else:
            useless = None
        entry = _entry("quantised copy", source, path, useless)
        found.append((manifest["identity"], entry))
        if not useless:
            newest[source] = max(entry.used, newest.get(source, 0.0))
    for identity, entry in found:
        is_current = entry.useless or entry.used == newest[entry.owner]
        yield identity, entry if is_current else replace(entry, useless="its base has changed")


def _reference(folder: Path, owners: dict[str, str]) -> Iterator[Entry]:
    """A reference: its shards that can be read, and by themselves those that cannot."""
    manifest = folder / MANIFEST_FILE
    record = _read_json(manifest)
    identity = record.get("identity")
    base = str(identity.get("base")) if isinstance(identity, dict) else "unknown"
    owner = record.get("source") or owners.get(base) or f"a base of identity {base[:12]}"
    shards = _found(folder, r"[0-9a-f]{64}\.(safetensors|damaged)")
    faults = {path: _fault_of_shard(path) for path in shards}
    if record.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        faults = dict.fromkeys(shards, "of an earlier release")
    good = [path for path, fault in faults.items() if not fault]
    why = None if good else next(iter(faults.values()), "empty")
    yield _entry("reference", owner, folder, why, [*(good or shards), manifest])
    for path, fault in faults.items() if good else ():
        if fault:
            yield _entry("reference", owner, path, fault)


def _fault_of_shard(path: Path) -> str | None:
    """Why a shard is not read any more, as far as its header tells."""
    fingerprint = read_fingerprint(path) if path.suffix == ".safetensors" else None
    if fingerprint is None:
        return "damaged"
    return None if fingerprint.get("kernels") == NUMERICS_VERSION else "of an earlier release"


def _leftovers(root: Path) -> Iterator[Entry]:
    """What a kill left half done; not what somebody may still be writing."""
    for folder in (root, *_found(root, "|".join(_FOLDERS))):
        deeper = _found(folder, "[0-9a-f]{32}") if folder.name == REFERENCE_FOLDER else []
        for path in (p for each in (folder, *deeper) for p in _found(each, r"\..*\.(part|old)")):
            entry = _entry("leftover", f"{path.parent.name}/{path.name}", path, "left by a kill")
            is_old = time.time() - entry.used > STALE_SECONDS
            if is_old and not (folder.name == COPIES_FOLDER and is_held(folder / ".lock")):
                yield entry


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
