"""Weights that stay in files on the disk, and are read from there each time they are needed.

A file is opened once, when its content was judged, and stays open. So what somebody deletes, or
replaces by another file of its name, is still read as it was; what is written to or cut off in
place is noticed when it is read next. Reads are plain ones into memory that the reader has: a file
that is mapped counts as memory of this process, page by page as it is touched.
"""

import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_dpo.stopping import RunStopped

_HAS_PREADV = hasattr(os, "preadv")  # Windows has none


class WeightFile:
    """A file that is held open, for reading at any place by any thread.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._stamp = self._stamp_now()
        self._place = threading.Lock()  # where one reads from the file's one place

    def read_into(self, target: memoryview, start: int) -> None:
        """Fill memory with the file's bytes.

        Args:
            target: Writable bytes.
            start: The first byte's place in the file.

        Raises:
            RunStopped: If the file is not what it was when it was opened.
            OSError: If the system cannot read it; names the file.
        """
        try:
            while target:
                count = self._read_some(target, start)
                if not count:
                    break
                target, start = target[count:], start + count
            is_changed = bool(target) or self._stamp_now() != self._stamp
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if is_changed:
            raise RunStopped(
                f"{self.path} was changed or cut off while the run reads layers from it; run again "
                "with --resume auto once nothing writes there: a quantised copy is made anew"
            )

    def _read_some(self, target: memoryview, start: int) -> int:
        if _HAS_PREADV:
            return os.preadv(self._file.fileno(), [target], start)
        with self._place:
            self._file.seek(start)
            return self._file.readinto(target)

    def _stamp_now(self) -> tuple[int, int]:
        """What differs once it was written to; a file that only lost its name has it still."""
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class FileRange:
    """Where a tensor lies in a file.

    Attributes:
        file: The file; None in a rehearsal, which reads nothing.
        start: Its first byte.
        dtype: Of its numbers.
        shape: Of the tensor.
    """

    file: WeightFile | None
    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class LayerOnDisk:
    """The bytes of a layer as they are to lie in a slot, each tensor's in its file.

    Attributes:
        nbytes: Of all, gaps between the tensors included.
        ranges: Of each tensor its first byte in the slot, and where it is read from.
    """

    nbytes: int
    ranges: tuple[tuple[int, FileRange], ...]

    def __len__(self) -> int:
        """As of a blob in memory: its bytes."""
        return self.nbytes

    def read_into(self, target: memoryview, first: int = 0) -> None:
        """Read a part of the layer; what lies between the tensors is left as it is.

        Args:
            target: Memory for that part.
            first: Its first byte in the slot.

        Raises:
            RunStopped: As for `WeightFile.read_into`.
            OSError: Likewise.
        """
        last = first + len(target)
        for start, where in self.ranges:
            begin, end = max(start, first), min(start + where.nbytes, last)
            if begin < end:
                assert where.file is not None, "a rehearsal reads nothing"
                part = target[begin - first : end - first]
                where.file.read_into(part, where.start + begin - start)
