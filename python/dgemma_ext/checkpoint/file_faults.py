"""What is wrong with a file that cannot be read, in words that say what to do."""

from __future__ import annotations

from pathlib import Path

from dgemma_ext.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_file(file: Path) -> bytes:
    """All bytes of a small file; raises CheckpointError where it is missing, cannot be read or is a pointer."""
    check_link(file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    check_pointer(file, raw)
    return raw


def unreadable(file: Path, error: OSError) -> CheckpointError:
    """The error for a file that the operating system refuses."""
    return CheckpointError(f"cannot be read: {error.strerror or error}", file=file)


def check_link(file: Path) -> None:
    """Raises CheckpointError for a link to nothing: the hub's cache links its files to blobs."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"is a link to {file.readlink()}, which is missing (a download that did not finish, or a cache that was "
            "cleaned): download the checkpoint again",
            file=file,
        )


def check_pointer(file: Path, start: bytes) -> None:
    """Raises CheckpointError where a file's first bytes are those of a git-lfs pointer."""
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            "is a git-lfs pointer in place of the file: run `git lfs pull` in its repository, or load by the hub id",
            file=file,
        )
