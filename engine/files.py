"""Writes files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` when the block ends, on the disk; if the block fails, nothing is left.

    A file that is there is replaced. Raises `OSError` if it cannot be written.
    """
    check_target(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_target(path: Path) -> None:
    """Raise `OSError` if a file cannot be written there, as far as can be told before.

    Long work whose result goes to a file begins with this.
    """
    if path.exists() and not path.is_file():  # else a device or a folder would be replaced
        raise OSError(errno.EINVAL, "is there and is no file; give another name", str(path))
    if not path.parent.is_dir():
        raise OSError(errno.ENOENT, f"there is no folder {path.parent}; make it first", str(path))
    if not os.access(path.parent, os.W_OK):
        raise OSError(errno.EACCES, f"the folder {path.parent.resolve()} is not yours to write to", str(path))
