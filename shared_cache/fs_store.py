"""The shared tier on any medium: runs of blocks as objects, found without an index server.

    <root>/v2/<namespace fingerprint>/<2 hex digits>/<hash of the first block>.arrow

An object holds one run of blocks (see `codec`) under the hash of its first block, so a prefix is
found by walking its chain, without an index server: look up the first block, read the head found
there, go on behind the blocks that it has in common. Heads are remembered, so inner blocks of seen
runs are found too (`refresh` and `learn` find more). Misses are never remembered, because another
replica may write at any moment. Failure prevented: a damaged, foreign or vanished object, and every
mood of a remote file system, becomes a shorter match or one clear `StoreError`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

from shared_cache.codec import RunHead, encode
from shared_cache.compression import PLAIN, CodecName, check_codec
from shared_cache.errors import (
    ConfigError,
    CorruptBlockError,
    ForeignBlockError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from shared_cache.faults import FaultLog
from shared_cache.hashing import BlockHash
from shared_cache.io_errors import reading, writing
from shared_cache.known_runs import KnownRuns, Place
from shared_cache.media import open_medium
from shared_cache.medium import ListedObject, Medium
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.parallel import run_all
from shared_cache.retries import DEFAULT_TIMEOUT_S
from shared_cache.run_objects import is_object_name, object_name, read_blocks, read_head
from shared_cache.store import BlockRun, BlockStore, StoredRun

logger = logging.getLogger(__name__)

MAX_OBJECT_BYTES = 64 << 20
"""Longer runs become several objects, which are written at the same time."""

REFRESH_OBJECTS = 20_000
"""Most heads that one refresh reads, the last used first: minutes, with an object store."""

_REFRESH_AT_ONCE = 64

MAX_READ_FAULTS = 8
"""After so many faults in one read the rest is a miss: somebody is rewriting what is read."""


@dataclass(frozen=True, slots=True)
class StoreFaults:
    """How often an object was not what it should be; every one of them was a miss."""

    corrupt: int
    foreign: int
    vanished: int


def open_store(
    url: str,
    namespace: Namespace,
    options: Mapping[str, Any] | None = None,
    *,
    codec: CodecName = PLAIN,
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
            _try_to_write(medium, namespace)
    except StoreFullError as error:
        logger.warning("%s; reading goes on", error)
    except StoreReadOnlyError as error:
        with reading(url):
            _check_readable(medium, root, url, error)
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
        codec: CodecName = PLAIN,
    ) -> None:
        super().__init__(namespace)
        self.read_only = read_only
        self.url = url
        self._codec = codec
        self._medium = medium
        self._known = KnownRuns()
        self._faults = {fault: FaultLog(logger) for fault in StoreFaults.__slots__}

    @property
    def faults(self) -> StoreFaults:
        """Counts since this store was opened."""
        return StoreFaults(**{fault: log.num_faults for fault, log in self._faults.items()})

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """See `BlockStore.match`."""
        num_found = 0
        with reading(self.url):
            while num_found < len(hashes) and (place := self._find(hashes[num_found])):
                num_found += place.num_common(hashes[num_found:])
        return num_found

    def read_into(
        self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]
    ) -> tuple[int, ...]:
        """See `BlockStore.read_into`. An object with a bad block is removed: it blocks a good one.

        Before that head and block are read once more, because it may have been replaced meanwhile.
        """
        self.check_buffers(hashes, buffers, writable=True)
        checksums: list[int] = []
        num_faults, suspect = 0, None
        with reading(self.url):
            while (done := len(checksums)) < len(hashes) and (place := self._find(hashes[done])):
                wanted = hashes[done : done + place.num_common(hashes[done:])]
                good = read_blocks(
                    self._medium, place, wanted, buffers[done:], note_use=not self.read_only
                )
                checksums.extend(good)
                if len(good) == len(wanted):
                    continue
                num_faults += 1
                head = self._probe(place.name)
                if head is not None and head == place.head == suspect:
                    self._discard(place.name, CorruptBlockError(f"block {wanted[len(good)].hex()}"))
                    break
                if num_faults == MAX_READ_FAULTS:
                    break
                suspect = head
        return tuple(checksums)

    def write(self, run: BlockRun) -> int:
        """See `BlockStore.write`. What lies behind the first missing block is written again."""
        self.check_buffers(run.hashes, run.payloads)
        if self.read_only:
            raise StoreReadOnlyError(f"{self.url} was opened read-only: it could not be written to")
        max_blocks = max(1, MAX_OBJECT_BYTES // self.namespace.layout.block_bytes)
        written: set[BlockHash] = set()
        start, replace = self.match(run.hashes), False
        while start < len(run.hashes):
            parts = run.tail(start).split(max_blocks)
            jobs = [partial(self._publish, part, replace and part is parts[0]) for part in parts]
            with writing(self.url):
                are_published = run_all(jobs)
            for part in compress(parts, are_published):
                written.update(part.hashes)
            start += len(parts[0].hashes) if are_published[0] else 0
            # Where somebody had a name already: keep that if readable, write what it lacks.
            num_found = self.match(run.hashes[start:])
            start, replace = start + num_found, not (are_published[0] or num_found)
        return len(written)

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`; remembers every head on the way."""
        for item in self._list():
            with reading(self.url):
                head = self._probe(item.name)
            if head is not None:
                yield StoredRun(item.name, head.parent, head.hashes, item.num_bytes, item.used_s)

    def refresh(self) -> int:
        """See `BlockStore.refresh`; what was used last is looked up first, while there is room."""
        listed = sorted(self._list(), key=lambda item: -item.used_s)[:REFRESH_OBJECTS]
        names = [item.name for item in listed if not self._known.knows(item.name)]
        for first in range(0, len(names), _REFRESH_AT_ONCE):
            if self._known.is_full:
                break
            with reading(self.url):
                run_all(
                    partial(self._probe, name) for name in names[first : first + _REFRESH_AT_ONCE]
                )
        return self._known.num_blocks

    def learn(self, first_hash: BlockHash, hashes: Sequence[BlockHash]) -> None:
        """See `BlockStore.learn`."""
        self._known.hear(object_name(first_hash), hashes)

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`; `ValueError` for a name that no object can have."""
        if not is_object_name(name):
            raise ValueError(f"{name!r} does not name a stored object; take names from entries()")
        with writing(self.url):
            self._medium.recycle(name)
        self._known.forget(name)

    def _list(self) -> list[ListedObject]:
        with reading(self.url):
            return [item for item in self._medium.list() if is_object_name(item.name)]

    def _publish(self, run: BlockRun, replace: bool) -> bool:
        """Write `run` as one object; False when there is one of that name and not to `replace`."""
        encoded = encode(self.namespace, run, self._codec)
        name = object_name(run.hashes[0])
        is_published = self._medium.publish(name, encoded.parts, replace=replace)
        if is_published:
            self._known.add(name, encoded.index)
        return is_published

    def _find(self, block_hash: BlockHash) -> Place | None:
        place = self._known.find(block_hash)
        if place is None and (rumour := self._known.rumour(block_hash)):
            self._probe(rumour, expected=False)
            place = self._known.find(block_hash)
        if place is None:
            name = object_name(block_hash)
            head = self._probe(name, expected=False)
            place = Place(name, head, 0) if head else None
        return place

    def _probe(self, name: str, *, expected: bool = True) -> RunHead | None:
        """Read the head of an object afresh and remember it; None, and forgotten, if it is bad."""
        try:
            head = read_head(self._medium, name, self.namespace)
        except FileNotFoundError:
            if expected:
                self._count("vanished", name, "it is gone")
        except ForeignBlockError as error:
            self._count("foreign", name, error)
        except CorruptBlockError as error:
            self._discard(name, error)
        else:
            self._known.add(name, head)
            return head
        self._known.forget(name)
        return None

    def _discard(self, name: str, error: CorruptBlockError) -> None:
        """Forget a damaged object and, where that is allowed, make its name free again."""
        self._known.forget(name)
        self._count("corrupt", name, error)
        if not self.read_only:
            try:
                with writing(self.url):
                    self._medium.remove(name)
            except StoreError as failure:
                logger.warning("could not remove the damaged object %s: %s", name, failure)

    def _count(self, fault: str, name: str, why: object) -> None:
        # Where it cannot be removed a bad object is met again and again: seldom logged.
        self._faults[fault].record(f"{fault} object {name} in {self.url}, a miss", StoreError(why))


def _try_to_write(medium: Medium, namespace: Namespace) -> None:
    """Leave a description of the namespace beside its objects; raises where that is impossible."""
    try:
        medium.prepare()
        medium.publish("namespace.json", [memoryview(namespace.to_json().encode() + b"\n")])
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"the store needs a folder, but a file is in its way: {error}") from error


def _check_readable(medium: Medium, root: str, url: str, error: StoreReadOnlyError) -> None:
    try:
        medium.check_readable(root)
    except FileNotFoundError:
        raise StoreReadOnlyError(
            f"{url} does not exist and may not be created: create it, or choose another store"
        ) from error
