"""Files that are written completely or not at all, their checksums, and JSON without NaN."""

import json
import math
import os
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is never visible in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = temporary(path)
    fresh.write_bytes(content)
    fresh.replace(path)


def temporary(path: Path) -> Path:
    """Returns a path beside `path` that no other process uses, of any host."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def checksum(path: Path) -> list[int]:
    """Returns the size and the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON (RFC 8259), with null for NaN and infinities."""
    finite = json.loads(json.dumps(value, default=dict), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, allow_nan=False)


def nan_for_null(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of numbers that `to_json` wrote, with NaN for null."""
    return {name: math.nan if value is None else value for name, value in row.items()}
