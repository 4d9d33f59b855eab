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


def checksums(folder: Path) -> dict[str, list[int]]:
    """Returns path → [bytes, CRC-32] of each file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum(path) for path in files}


def write_manifest(arrays: Path, metrics: Mapping[str, float], interval: Mapping[str, Any]) -> None:
    """Writes the manifest into the folder of the arrays, whose files are complete.

    Args:
      arrays: the temporary folder, which Orbax then renames to `default`.
      metrics: the checkpoint's metrics.
      interval: see `Checkpoints.save`.
    """
    files = {f"{ARRAYS}/{name}": each for name, each in checksums(arrays).items()}
    sealed = {"interval": dict(interval), "metrics": dict(metrics), "files": files}
    manifest = {"sealed": sealed, "crc32": zlib.crc32(json.dumps(sealed).encode())}
    (arrays / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what `write_manifest` wrote: `interval`, `metrics` and `files`.

    Raises:
      DamageError: the manifest is missing or damaged.
    """
    name = MANIFEST if (folder / MANIFEST).exists() else f"{ARRAYS}/{MANIFEST}"  # 0.1: top level
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
        sealed = manifest["sealed"]
        intact = manifest["crc32"] == zlib.crc32(json.dumps(sealed).encode())
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{name}: {type(error).__name__}") from error
    if not intact:
        raise DamageError(f"{name} has changed")
    return sealed


def verify(folder: Path) -> None:
    """Raises a DamageError unless every file is as it was written."""
    manifest, present, metrics = read_manifest(folder), checksums(folder), read_metrics(folder)
    if json.dumps(manifest.get("metrics", metrics)) != json.dumps(metrics):  # NaN ≠ NaN
        raise DamageError("metrics/metrics has changed")
    for name, written in manifest["files"].items():
        if name not in present:
            raise DamageError(f"{name} is missing")
        if present[name] != written:
            raise DamageError(f"{name} has changed")


def read_metrics(folder: Path) -> dict[str, float]:
    """Returns the metrics saved with a checkpoint.

    Raises:
      DamageError: they cannot be read.
    """
    try:
        metrics = json.loads((folder / "metrics" / "metrics").read_text(encoding="utf-8"))
        dict.items(metrics)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamageError(f"metrics/metrics: {type(error).__name__}") from error
    return metrics
