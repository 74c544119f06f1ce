"""The host tier that `kvcommons cache bench` measures: an arena of its own, with its own owner.

The running arena is left alone: measuring in it would push out what replicas use. The owner is a
process of its own as it always is, and ends with the measurement.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

from shared_cache.config import HostConfig
from shared_cache.host.folder import open_folder
from shared_cache.host.interface import HostTier
from shared_cache.host.local import LocalHostTier
from shared_cache.host.node import open_node_tier
from shared_cache.namespace import Namespace

STOP_TIMEOUT_S = 10.0
RESERVE_AHEAD = 16


@contextmanager
def bench_host(namespace: Namespace, num_bytes: int) -> Iterator[HostTier]:
    """A host tier that holds `num_bytes` of blocks and some more, for the length of the block.

    It is memory of this process alone where the memory file system has no room for an arena.
    """
    block_bytes = namespace.layout.block_bytes
    arena_bytes = num_bytes + max(num_bytes // 2, 4 * RESERVE_AHEAD * block_bytes)
    config = HostConfig(
        name=f"bench-{os.getpid()}-{secrets.token_hex(4)}",
        bytes=arena_bytes,
        start_owner=False,
        reserve_ahead=RESERVE_AHEAD,
    )
    paths = open_folder(config)
    if shutil.disk_usage(paths.folder).free < 2 * arena_bytes:
        with closing(LocalHostTier(arena_bytes, block_bytes)) as host:
            yield host
        return
    arguments = [f"--name={config.name}", f"--bytes={arena_bytes}", f"--folder={paths.folder}"]
    command = [sys.executable, "-m", "shared_cache.host", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as owner:
        try:
            with closing(open_node_tier(config, namespace.fingerprint, block_bytes)) as host:
                yield host
        finally:
            owner.terminate()
            owner.wait(STOP_TIMEOUT_S)
