"""The shared tier on any fsspec URL; the only module that imports fsspec.

    <root>/v1/<namespace fingerprint>/<2 hex digits>/<hash of the first block>.arrow

An object holds one run of blocks (see `codec`) under the hash of its first block, so a prefix is
found by walking its chain, without an index server: look up the first block, read the head found
there, go on behind the blocks that it has in common. Misses are never remembered, because another
replica may write at any moment. Failure prevented: a damaged, foreign or vanished object, and every
mood of a remote file system, becomes a shorter match or one clear `StoreError`.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared_cache import codec
from shared_cache.codec import RunHead
from shared_cache.errors import (
    ConfigError,
    CorruptBlockError,
    ForeignBlockError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)
from shared_cache.faults import FaultLog
from shared_cache.fsspec_media import ObjectMedium, RenamingMedium
from shared_cache.hashing import BlockHash
from shared_cache.io_errors import reading, writing
from shared_cache.known_runs import KnownRuns, Place
from shared_cache.local_medium import LocalMedium
from shared_cache.medium import Medium
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.run_objects import is_object_name, object_name, read_blocks, read_head
from shared_cache.store import BlockRun, BlockStore, StoredRun

logger = logging.getLogger(__name__)

OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "memory"}
)
"""Protocols whose uploads become visible whole, so that no rename is needed (nor cheap)."""

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""Which extra of this package brings the back end of a protocol."""

MAX_OBJECT_BYTES = 64 << 20
"""Longer runs become several objects: an upload to an object store joins one in memory."""

MAX_READ_FAULTS = 8
"""After so many faults in one read the rest is a miss: somebody is rewriting what is read."""


@dataclass(frozen=True, slots=True)
class StoreFaults:
    """How often an object was not what it should be; every one of them was a miss."""

    corrupt: int
    foreign: int
    vanished: int


def open_store(
    url: str, namespace: Namespace, options: Mapping[str, Any] | None = None
) -> "FsBlockStore":
    """The store at `url`, which is created if need be; `options` go to fsspec's file system.

    A store that may only be read opens with `read_only` set. Raises `ConfigError` for a URL, back
    end or option that is wrong, `StoreError` for a store that cannot be used now.
    """
    fs, root = _file_system(url, options or {})
    medium = _medium(fs, f"{root}/v{FORMAT_VERSION}/{namespace.fingerprint}")
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
    return FsBlockStore(medium, namespace, url, read_only)


class FsBlockStore(BlockStore):
    """Blocks of one namespace in a folder of objects; made by `open_store`."""

    def __init__(self, medium: Medium, namespace: Namespace, url: str, read_only: bool) -> None:
        super().__init__(namespace)
        self.read_only = read_only
        self.url = url
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

    def read_into(self, hashes: Sequence[BlockHash], buffers: Sequence[memoryview]) -> int:
        """See `BlockStore.read_into`. An object with a bad block is removed: it blocks a good one.

        Before that head and block are read once more, because it may have been replaced meanwhile.
        """
        self.check_buffers(hashes, buffers, writable=True)
        done, num_faults, suspect = 0, 0, None
        with reading(self.url):
            while done < len(hashes) and (place := self._find(hashes[done])):
                wanted = hashes[done : done + place.num_common(hashes[done:])]
                num_good = read_blocks(self._medium, place, wanted, buffers[done:])
                done += num_good
                if num_good == len(wanted):
                    continue
                num_faults += 1
                head = self._probe(place.name)
                if head is not None and head == place.head == suspect:
                    self._discard(place.name, CorruptBlockError(f"block {wanted[num_good].hex()}"))
                    break
                if num_faults == MAX_READ_FAULTS:
                    break
                suspect = head
        return done

    def write(self, run: BlockRun) -> int:
        """See `BlockStore.write`. What lies behind the first missing block is written again."""
        self.check_buffers(run.hashes, run.payloads)
        if self.read_only:
            raise StoreReadOnlyError(f"{self.url} was opened read-only: it could not be written to")
        start, num_written, replace = self.match(run.hashes), 0, False
        while start < len(run.hashes):
            encoded = codec.encode(self.namespace, self._one_object(run.tail(start)))
            name = object_name(run.hashes[start])
            with writing(self.url):
                is_published = self._medium.publish(name, encoded.parts, replace=replace)
            if is_published:
                self._known.add(name, encoded.index)
                num_written += len(encoded.payloads)
                start += len(encoded.payloads)
            # Else somebody has this name already: keep that if readable, write what it lacks.
            num_found = self.match(run.hashes[start:])
            start, replace = start + num_found, not (is_published or num_found)
        return num_written

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`; remembers every head on the way."""
        with reading(self.url):
            listed = [item for item in self._medium.list() if is_object_name(item[0])]
        for name, num_bytes in listed:
            with reading(self.url):
                head = self._probe(name)
            if head is not None:
                yield StoredRun(name, head.parent, head.hashes, num_bytes)

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`; `ValueError` for a name that no object can have."""
        if not is_object_name(name):
            raise ValueError(f"{name!r} does not name a stored object; take names from entries()")
        with writing(self.url):
            self._medium.remove(name)
        self._known.forget(name)

    def _one_object(self, run: BlockRun) -> BlockRun:
        """The leading blocks of `run` that go into one object."""
        num_blocks = max(1, MAX_OBJECT_BYTES // self.namespace.layout.block_bytes)
        return BlockRun(run.parent, run.hashes[:num_blocks], run.payloads[:num_blocks])

    def _find(self, block_hash: BlockHash) -> Place | None:
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


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it."""
    protocol = re.match(r"(\w+)(?=::|://)", url)
    name = protocol.group() if protocol else "file"
    try:
        if not url.strip():
            raise ValueError("it is empty")
        with reading(url):
            fs, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        extra = f"pip install 'kvcommons[{EXTRAS[name]}]'" if name in EXTRAS else str(error)
        raise ConfigError(
            f"store {url}: no back end for {name}:// is installed: {extra}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"store {url!r}: {error}; give a URL that fsspec knows (file:///path, s3://bucket/dir) "
            f"and options that its file system takes (given: {sorted(options)})"
        ) from error
    return fs, root.rstrip("/")


def _medium(fs: Any, folder: str) -> Medium:
    """The way to publish on `fs`."""
    if type(fs) is LocalFileSystem and hasattr(os, "preadv"):
        return LocalMedium(folder)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return ObjectMedium(fs, folder) if protocols & OBJECT_STORES else RenamingMedium(fs, folder)


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
