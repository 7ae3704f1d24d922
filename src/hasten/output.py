"""Files that are there whole or not at all: checked before the work, written beside, then moved into place.

It knows paths and bytes, never pictures or models.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def check_writable(path: Path, *, suffix: str | None = None) -> None:
    """Returns when a file can be written at `path`; folders that are missing are made later, by write_files.

    Raises ValueError for a wrong suffix or a folder in the file's place, OSError where none can be written.
    """
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"the output file {path} does not end in {suffix}: give a name such as {path.stem}{suffix}.")
    if path.is_dir():
        example = path / f"picture{suffix or ''}"
        raise ValueError(f"the output file {path} is a folder: name a file in it, such as {example}.")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Returns when files can be written in `folder`, or in the nearest folder above that exists.

    Raises OSError otherwise. A file is really made there and removed again: permission bits alone do not tell
    about full disks, read-only mounts or the super-user.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OSError(f"the output folder {folder} cannot be made: {existing} is a file; choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"the output folder {folder} cannot be written ({reason}): choose another folder.") from None


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Writes every file whole, or none: each beside its place first, and all are moved when all are written.

    Missing folders are made. Raises OSError with one sentence; what stood there before is then still there.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            written[path] = _write_beside(path, content)
        for path in list(written):
            written[path].replace(path)
            del written[path]
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from None
    finally:
        for left_over in written.values():
            left_over.unlink(missing_ok=True)


def _write_beside(path: Path, content: bytes) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp gives 0600; a picture gets what an ordinary new file would get.
        beside.chmod(0o666 & ~_umask())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside


def _umask() -> int:
    """This process's umask; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
