"""The shared tier on any medium: runs of blocks as objects, found without an index server.

    <root>/v2/<namespace fingerprint>/<2 hex digits>/<hash of the first block>.arrow

An object holds one run of blocks (see `codec`) under the hash of its first block, so a prefix is
found by walking its chain, without an index server: look up the first block, read the head found
there, go on behind the blocks that it has in common. Heads are remembered, so that inner blocks of
seen runs are found too: `refresh` reads those of all objects by listing, now and then, and what
this process writes and looks up is added and taken away as it happens. What others have written
since is found by its first block at once; misses are never remembered. What others have deleted is
noticed when it is read, written again, or listed. Failure prevented: a damaged, foreign or vanished
object, and every mood of a remote file system, becomes a shorter match or one clear `StoreError`.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

from shared_cache.errors import CorruptBlockError, StoreFullError, StoreReadOnlyError
from shared_cache.hashing import BlockHash
from shared_cache.media.io_errors import reading, writing
from shared_cache.media.medium import ListedObject, Medium
from shared_cache.media.opening import open_medium
from shared_cache.media.retries import DEFAULT_TIMEOUT_S
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.parallel import run_all
from shared_cache.stores.codec import encode
from shared_cache.stores.codec_choice import CodecChoice
from shared_cache.stores.compression import PLAIN, CodecSetting, check_codec
from shared_cache.stores.finding import RunFinder
from shared_cache.stores.refreshing import Refresher
from shared_cache.stores.run_objects import (
    Part,
    is_object_name,
    object_name,
    read_blocks,
    read_outside,
)
from shared_cache.stores.store import BlockRun, BlockStore, StoredRun
from shared_cache.stores.store_access import check_readable, try_to_write
from shared_cache.stores.store_faults import StoreFaults

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 64 << 20
"""Longer runs become several objects, which are written at the same time."""

REFRESH_OBJECTS = 20_000
"""Most heads that one refresh reads, the last used first: minutes, with an object store."""

_HEADS_AT_ONCE = 64

_REFRESH_PAUSE_S = 0.01
"""Refreshing rests as often: those who compute or read in this process go first."""

MIN_BYTES_OUTSIDE = 4 << 20
"""Fewer are copied sooner than another process is asked."""

MAX_READ_FAULTS = 8
"""After so many faults in one read the rest is a miss: somebody is rewriting what is read."""


def open_store(
    url: str,
    namespace: Namespace,
    options: Mapping[str, Any] | None = None,
    *,
    codec: CodecSetting = PLAIN,
    spare_bytes: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> "FsBlockStore":
    """The store at `url`, which is created if need be; `options` go to fsspec's file system.

    `codec` is for what is written; every codec is read. `spare_bytes`: see `spare_bytes_of`. A
    store that may only be read opens with `read_only` set. Raises `ConfigError` for a URL, back
    end or option that is wrong, `StoreError` for a store that cannot be used now.
    """
    check_codec(codec)
    suffix = f"v{FORMAT_VERSION}/{namespace.fingerprint}"
    medium, root = open_medium(
        url, options or {}, suffix, spare_bytes=spare_bytes, timeout_s=timeout_s
    )
    read_only = False
    try:
        with writing(url):
            try_to_write(medium, namespace)
    except StoreFullError as error:
        logger.warning("%s; reading goes on", error)
    except StoreReadOnlyError as error:
        with reading(url):
            check_readable(medium, root, url, error)
        read_only = True
    return FsBlockStore(medium, namespace, url, read_only, codec)


class FsBlockStore(BlockStore):
    """Blocks of one namespace in a folder of objects; made by `open_store`."""

    def __init__(
        self,
        medium: Medium,
        namespace: Namespace,
        url: str,
        read_only: bool,
        codec: CodecSetting = PLAIN,
    ) -> None:
        super().__init__(namespace)
        self.read_only = read_only
        self.read_bytes = medium.read_bytes
        self.url = url
        self._codec = CodecChoice(codec)
        self._medium = medium
        self._runs = RunFinder(medium, namespace, url, read_only)
        self._closing = threading.Event()
        self._refresher = Refresher(self.refresh)

    @property
    def faults(self) -> StoreFaults:
        """Counts since this store was opened."""
        return self._runs.faults.counts

    @property
    def num_retries(self) -> int:
        """See `BlockStore.num_retries`."""
        return self._medium.num_retries

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """See `BlockStore.match`."""
        return self._runs.match(hashes)

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """See `BlockStore.read_into`. An object with a bad block is removed: it blocks a good one.

        Before that head and block are read once more, because it may have been replaced meanwhile.
        """
        self.check_buffers(hashes, buffers, writable=True)
        num_faults, suspect = 0, None
        with reading(self.url):
            checksums = list(self._read_outside(hashes, buffers))
            while (done := len(checksums)) < len(hashes) and (
                place := self._runs.find(hashes[done])
            ):
                wanted = hashes[done : done + place.num_common(hashes[done:])]
                good = read_blocks(
                    self._medium, place, wanted, buffers[done:], note_use=not self.read_only
                )
                checksums.extend(good)
                if len(good) == len(wanted):
                    done += len(good)
                    checksums += self._read_outside(hashes[done:], buffers[done:])
                    continue
                num_faults += 1
                head = self._runs.probe(place.name)
                if head is not None and head == place.head == suspect:
                    self._runs.discard(
                        place.name, CorruptBlockError(f"block {wanted[len(good)].hex()}")
                    )
                    break
                if num_faults == MAX_READ_FAULTS:
                    break
                suspect = head
        return tuple(checksums)

    def write(self, run: BlockRun) -> int:
        """See `BlockStore.write`. What lies behind the first missing block is written again.

        What is remembered is not believed here, as another process may have deleted it: who is told
        that a block is stored does not ask again for long.
        """
        self.check_buffers(run.hashes, run.payloads)
        if self.read_only:
            raise StoreReadOnlyError(f"{self.url} was opened read-only: it could not be written to")
        max_blocks = max(1, MAX_OBJECT_BYTES // self.namespace.layout.block_bytes)
        written: set[BlockHash] = set()
        checked: set[str] = set()
        start, replace = self._runs.match(run.hashes, checked), False
        while start < len(run.hashes):
            parts = run.tail(start).split(max_blocks)
            jobs = [partial(self._publish, part, replace and part is parts[0]) for part in parts]
            with writing(self.url):
                are_published = run_all(jobs)
            for part in compress(parts, are_published):
                written.update(part.hashes)
                checked.add(object_name(part.hashes[0]))
            start += len(parts[0].hashes) if are_published[0] else 0
            # Where somebody had a name already: keep that if readable, write what it lacks.
            num_found = self._runs.match(run.hashes[start:], checked)
            start, replace = start + num_found, not (are_published[0] or num_found)
        return len(written)

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`; remembers every head on the way."""
        listed = self._list()
        for first in range(0, len(listed), _HEADS_AT_ONCE):
            items = listed[first : first + _HEADS_AT_ONCE]
            with reading(self.url):
                heads = run_all(partial(self._runs.probe, item.name) for item in items)
            for (name, num_bytes, used_s), head in zip(items, heads, strict=True):
                if head is not None:
                    yield StoredRun(name, head.parent, head.hashes, num_bytes, used_s, head.tenant)

    def refresh(self) -> int:
        """See `BlockStore.refresh`; what was used last is looked up first, while there is room.

        A store with more heads than can be remembered is not even listed once they fill that room.
        """
        known = self._runs.known.names()
        if not self._runs.known.is_full:
            listed = sorted(self._list(), key=lambda item: -item.used_s)
            for name in known.difference(item.name for item in listed):
                self._runs.known.forget(name)
            self._look_up([item.name for item in listed[:REFRESH_OBJECTS]])
        return self._runs.known.num_blocks

    def refresh_in_background(self) -> None:
        """See `BlockStore.refresh_in_background`."""
        self._refresher.start()

    def close(self) -> None:
        """See `BlockStore.close`."""
        self._closing.set()
        self._refresher.close()

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`; `ValueError` for a name that no object can have."""
        if not is_object_name(name):
            raise ValueError(f"{name!r} does not name a stored object; take names from entries()")
        with writing(self.url):
            self._medium.recycle(name)
        self._runs.known.forget(name)

    def forget(self, hashes: Sequence[BlockHash]) -> int:
        """See `BlockStore.forget`; lists nothing: blocks are found as `match` finds them."""
        self._runs.match(hashes)
        names: set[str] = set()
        find = self._runs.find
        for block_hash in hashes:
            while (place := find(block_hash, set())) is not None and place.name not in names:
                self.delete(place.name)
                names.add(place.name)
        return len(names)

    def _read_outside(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """The checksums of the leading blocks that another process could bring."""
        if sum(buffer.nbytes for buffer in buffers) < MIN_BYTES_OUTSIDE:
            return ()

        def parts() -> Iterator[Part]:
            start = 0
            while start < len(hashes) and (place := self._runs.known.find(hashes[start])):
                end = start + place.num_common(hashes[start:])
                yield place, hashes[start:end], buffers[start:end]
                start = end

        return read_outside(self._medium, parts(), note_use=not self.read_only)

    def _list(self) -> list[ListedObject]:
        with reading(self.url):
            return [item for item in self._medium.list() if is_object_name(item.name)]

    def _look_up(self, names: Sequence[str]) -> None:
        """Read the heads that are not remembered yet, one by one, while there is room for them."""
        known = self._runs.known.names()
        for num_read, name in enumerate(name for name in names if name not in known):
            pause_s = 0.0 if num_read % _HEADS_AT_ONCE else _REFRESH_PAUSE_S
            if self._runs.known.is_full or self._closing.wait(pause_s):
                return
            with reading(self.url):
                self._runs.probe(name)

    def _publish(self, run: BlockRun, replace: bool) -> bool:
        """Write `run` as one object; False when there is one of that name and not to `replace`."""
        encoded = encode(self.namespace, run, self._codec.choose())
        name, parts = object_name(run.hashes[0]), encoded.parts
        with self._codec.publishing() as done:
            is_published = self._medium.publish(name, parts, replace=replace)
            done.num_bytes = sum(part.nbytes for part in parts) if is_published else 0
        if is_published:
            self._runs.known.add(name, encoded.index)
        return is_published
