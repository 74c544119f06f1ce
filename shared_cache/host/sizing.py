"""How much of a machine's memory the host tier takes where nobody says how much.

A fixed figure is wrong on every machine but one. This one follows from what never changes while a
machine (or container) runs, so all processes of it come to the same, and the arena fits.
"""

import os
from contextlib import suppress
from pathlib import Path

from shared_cache.config import HostConfig
from shared_cache.host.folder import MEMORY_FOLDER

GIB = 1 << 30
SHARE_OF_MEMORY, SHARE_OF_FOLDER = 4, 2
LEAST_BYTES = GIB
"""Where not even this fits, opening the arena says what is missing."""

LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def fitting_bytes(memory_bytes: int, folder_bytes: int) -> int:
    """A quarter of the memory, at most half of its file system, in whole GiB and at least one."""
    most = min(memory_bytes // SHARE_OF_MEMORY, folder_bytes // SHARE_OF_FOLDER)
    return max(LEAST_BYTES, most // GIB * GIB)


def sized_for_this_machine(config: HostConfig) -> HostConfig:
    """`config`, with a size that fits this machine unless it names one or is of one process."""
    if "bytes" in config.model_fields_set or config.scope == "process":
        return config
    num_bytes = fitting_bytes(_memory_bytes(), _folder_bytes(config))
    return HostConfig.model_validate({**config.model_dump(exclude_unset=True), "bytes": num_bytes})


def _memory_bytes() -> int:
    """What this machine has, or what its container may use if that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in LIMIT_FILES:
        with suppress(OSError, ValueError):  # not in a container, or "max": no limit
            limits.append(int(Path(file).read_text(encoding="ascii")))
    return min(limits)


def _folder_bytes(config: HostConfig) -> int:
    """The size of the file system that the arena will lie on."""
    folder = Path(config.folder) if config.folder else MEMORY_FOLDER
    nearest = next(place for place in (folder, *folder.parents, Path("/")) if place.is_dir())
    found = os.statvfs(nearest)
    return found.f_frsize * found.f_blocks
