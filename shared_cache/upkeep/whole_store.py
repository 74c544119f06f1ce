"""A whole store: all namespaces that lie in it, other models' and other versions' too.

A `BlockStore` is one namespace as a replica sees it, and most of what fills a disk belongs to
models that nobody runs any more. Looking at a store changes nothing in it: no folder is made, and
damaged objects stay for `verify` to find, where a replica would clear them away in passing.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from shared_cache.hashing import BlockHash
from shared_cache.media.io_errors import reading, writing
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.medium import Medium
from shared_cache.media.opening import open_medium
from shared_cache.namespace import FORMAT_VERSION, Namespace
from shared_cache.stores.fs_store import FsBlockStore
from shared_cache.stores.run_objects import is_object_name
from shared_cache.stores.store import StoredRun
from shared_cache.upkeep.verifying import CheckedObject, verify_objects

_NO_HASH = BlockHash(b"")

DESCRIPTION = "namespace.json"
MAX_DESCRIPTION_BYTES = 1 << 16


def folder_of(namespace: Namespace) -> str:
    """Where a namespace lies below the root of a store."""
    return f"v{FORMAT_VERSION}/{namespace.fingerprint}"


@dataclass(frozen=True, slots=True)
class FoundNamespace:
    """A namespace's folder in a store, `v<format version>/<fingerprint>`, and its objects.

    `namespace` is None for one that this program cannot read. `used_first_s` is the earliest time
    of an object, None where no time is told.
    """

    folder: str
    namespace: Namespace | None
    num_objects: int
    num_bytes: int
    used_first_s: float | None

    @property
    def fingerprint(self) -> str:
        """The namespace's fingerprint, by the folder's name."""
        return self.folder.rpartition("/")[2]

    @property
    def is_newer(self) -> bool:
        """Whether it is of a version of the format that is newer than this program."""
        return int(self.folder[1:].partition("/")[0]) > FORMAT_VERSION


class Deletable(Protocol):
    """What clean-up needs to know of a namespace, as `BlockStore` has it."""

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`."""

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`."""

    def close(self) -> None:
        """See `BlockStore.close`."""


class UnreadableStore:
    """Objects whose heads are of an older format, or of nobody knows what: runs without blocks."""

    def __init__(self, medium: Medium, url: str) -> None:
        self._medium = medium
        self._url = url

    def entries(self) -> Iterator[StoredRun]:
        """See `BlockStore.entries`; nobody needs these runs, and they need nobody."""
        with reading(self._url):
            for item in self._medium.list():
                if is_object_name(item.name):
                    yield StoredRun(item.name, _NO_HASH, (), item.num_bytes, item.used_s)

    def delete(self, name: str) -> None:
        """See `BlockStore.delete`."""
        with writing(self._url):
            self._medium.remove(name)

    def close(self) -> None:
        """Holds nothing."""


@dataclass(frozen=True, slots=True)
class WholeStore:
    """The store at `url`; `options` go to its file system."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def find(self, *, tidies: bool = False) -> list[FoundNamespace]:
        """All namespaces, by folder, from a listing that opens no object; none if no such store.

        Changes nothing, or, if it `tidies`, removes what dead writers left (see `Medium.list`).
        Raises `ConfigError` for a wrong URL, `StoreError` for a store in trouble.
        """
        found: list[FoundNamespace] = []
        for version in range(1, FORMAT_VERSION + 2):
            medium, _ = open_medium(self.url, self.options, f"v{version}")
            with reading(self.url):
                found.extend(_namespaces(medium, version, tidies))
        return sorted(found, key=lambda one: one.folder)

    def open(self, namespace: Namespace) -> FsBlockStore:
        """A namespace that was found, for looking at it and deleting from it."""
        return FsBlockStore(self._medium(namespace), namespace, self.url, read_only=True)

    def verify(self, namespace: Namespace) -> Iterator[CheckedObject]:
        """Every object of a namespace after all of it was read; changes nothing."""
        with reading(self.url):
            yield from verify_objects(self._medium(namespace), namespace)

    def remove(self, namespace: Namespace) -> None:
        """Delete a namespace with all that lies in its folder, bad objects and description too."""
        medium = self._medium(namespace)
        with reading(self.url):
            names = [item.name for item in medium.list()]
        with writing(self.url):
            for name in names:
                medium.remove(name)
        if isinstance(medium, LocalMedium):
            shutil.rmtree(medium.folder, ignore_errors=True)  # what is empty, or kept for reuse
            with suppress(OSError):  # other namespaces lie beside it
                os.rmdir(os.path.dirname(medium.folder))

    def local_folder(self, namespace: Namespace) -> str | None:
        """Where a namespace lies on this machine's disks; None elsewhere."""
        medium = self._medium(namespace)
        return medium.folder if isinstance(medium, LocalMedium) else None

    def deletable(self, found: Iterable[FoundNamespace]) -> dict[str, Deletable]:
        """Those of the namespaces that this program may delete from, by folder.

        What a newer program has written is its own care.
        """
        stores: dict[str, Deletable] = {}
        for one in found:
            if one.namespace is not None:
                stores[one.folder] = self.open(one.namespace)
            elif not one.is_newer:
                medium, _ = open_medium(self.url, self.options, one.folder)
                stores[one.folder] = UnreadableStore(medium, self.url)
        return stores

    def _medium(self, namespace: Namespace) -> Medium:
        medium, _ = open_medium(self.url, self.options, folder_of(namespace))
        return medium


@dataclass(slots=True)
class _Tally:
    num_objects: int = 0
    num_bytes: int = 0
    used_first_s: float | None = None
    has_description: bool = False


def _namespaces(medium: Medium, version: int, tidies: bool) -> Iterator[FoundNamespace]:
    tallies: dict[str, _Tally] = {}
    for item in medium.list(tidies=tidies):
        fingerprint, _, name = item.name.partition("/")
        tally = tallies.setdefault(fingerprint, _Tally())
        if name == DESCRIPTION:
            tally.has_description = True
        elif is_object_name(name):
            tally.num_objects += 1
            tally.num_bytes += item.num_bytes
            if item.used_s > 0:
                tally.used_first_s = min(item.used_s, tally.used_first_s or item.used_s)
    for fingerprint, tally in tallies.items():
        namespace = _describe(medium, version, fingerprint) if tally.has_description else None
        yield FoundNamespace(
            f"v{version}/{fingerprint}",
            namespace,
            tally.num_objects,
            tally.num_bytes,
            tally.used_first_s,
        )


def _describe(medium: Medium, version: int, fingerprint: str) -> Namespace | None:
    """The namespace of a folder, if its description is one of ours and fits the folder's name."""
    try:
        with medium.open(f"{fingerprint}/{DESCRIPTION}") as reader:
            text = reader.read(0, MAX_DESCRIPTION_BYTES)
        namespace = Namespace.from_json(text.decode())
    except (FileNotFoundError, ValueError):
        return None
    is_ours = version == FORMAT_VERSION and namespace.fingerprint == fingerprint
    return namespace if is_ours else None
