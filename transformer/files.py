"""Files that are whole or not there, and whether one is as it was written."""

import os
import socket
import tempfile
import zlib
from pathlib import Path


def home() -> Path:
    """The user's home folder; a temporary one for a user who has none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"home-{os.getuid()}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = unfinished(path)
    fresh.write_bytes(content)
    fresh.replace(path)


def unfinished(path: Path) -> Path:
    """A name beside `path` that no other process has, on this host or on one that shares a disk."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def checksum(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]
