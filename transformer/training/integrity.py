"""The manifest of a checkpoint: sizes and checksums of its files, written when it is complete.

Orbax does not notice when a file changes after it was written.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.files import checksum

MANIFEST = "manifest.json"
ARRAYS = "default"  # the folder that Orbax writes a single pytree to


class DamageError(Exception):
    """A file of a checkpoint is missing or has changed. The message names it."""


def write_manifest(arrays: Path, metrics: Mapping[str, float], interval: Mapping[str, Any]) -> None:
    """Writes the manifest into the folder of the arrays, which Orbax then renames to `default`."""
    files = {f"{ARRAYS}/{name}": each for name, each in _checksums(arrays).items()}
    sealed = {"interval": dict(interval), "metrics": dict(metrics), "files": files}
    manifest = {"sealed": sealed, "crc32": zlib.crc32(json.dumps(sealed).encode())}
    (arrays / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote: `interval`, `metrics` and `files`."""
    name = MANIFEST if (folder / MANIFEST).exists() else f"{ARRAYS}/{MANIFEST}"  # 0.1: top level
    manifest = _read(folder, name)
    sealed = manifest.get("sealed")
    if manifest.get("crc32") != zlib.crc32(json.dumps(sealed).encode()):
        raise DamageError(f"{name} has changed")
    return sealed


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics that Orbax saved with a checkpoint."""
    return _read(folder, "metrics/metrics")


def verify(folder: Path) -> None:
    """Raises a DamageError unless every file is as it was written."""
    manifest, present, metrics = read_manifest(folder), _checksums(folder), read_metrics(folder)
    if json.dumps(manifest.get("metrics", metrics)) != json.dumps(metrics):  # NaN ≠ NaN
        raise DamageError("metrics/metrics has changed")
    for name, written in manifest["files"].items():
        if present.get(name) != written:
            raise DamageError(f"{name} {'has changed' if name in present else 'is missing'}")


def _read(folder: Path, name: str) -> Any:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        dict.items(content)  # a TypeError for other than an object
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamageError(f"{name}: {type(error).__name__}") from error
    return content


def _checksums(folder: Path) -> dict[str, list[int]]:  # path → [bytes, CRC-32] of each file
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum(path) for path in files}
