"""How much memory there is, and whether a model's weights go into it."""

from __future__ import annotations

from math import prod
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from sasa_export.models import Source

CGROUP = Path("/sys/fs/cgroup")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATES = 1.2  # times the weights, which leaves space for what runs through them


def available_memory() -> int:
    """Bytes that a process may still take: the machine's, or those of the container that it runs in."""
    free = int(psutil.virtual_memory().available)
    try:
        most, used = int((CGROUP / "memory.max").read_text()), int((CGROUP / "memory.current").read_text())
        files = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, most - used + int(files["inactive_file"]) + int(files["active_file"]))
    except (OSError, ValueError, KeyError):  # no limit, or none that is told in this way
        return free


def fits(source: Source, dtype: str, device: str) -> bool:
    """Do the weights, in this type, and what runs through them go into one device's free memory?"""
    import torch

    needed = STATES * BYTES[dtype] * sum(prod(shape) for shard in source.shards for shape in shard.shapes)
    free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else available_memory()
    return needed <= free
