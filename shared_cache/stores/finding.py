"""Where a block is stored: what is remembered of runs, else a look at the object itself.

What is remembered may be gone, and what is found may be damaged or foreign. Both are noticed here,
counted, and forgotten, so that a bad object is met once and does not stand in a good one's way.
"""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial

from shared_cache.errors import CorruptBlockError, ForeignBlockError, StoreError
from shared_cache.hashing import BlockHash
from shared_cache.media.io_errors import reading, writing
from shared_cache.media.medium import Medium
from shared_cache.namespace import Namespace
from shared_cache.parallel import ask_all
from shared_cache.stores.codec import RunHead
from shared_cache.stores.known_runs import KnownRuns, Place
from shared_cache.stores.run_objects import object_name, read_head
from shared_cache.stores.store_faults import FaultCounts

logger = logging.getLogger(__name__)

MIN_AHEAD = 2
MAX_AHEAD = 16
"""Heads that are read at a time, should the objects behind the last one be as long as that."""

AT_ONCE_S = 0.001
"""A store that needed no longer for the last head is asked by one thread: several would wait for
the interpreter's lock and not for the store."""


class RunFinder:
    """Finds the runs of one store, and remembers them in `known`. Thread-safe."""

    def __init__(self, medium: Medium, namespace: Namespace, url: str, read_only: bool) -> None:
        """With `read_only`, damaged objects are left where they are."""
        self.known = KnownRuns()
        self.faults = FaultCounts(url)
        self._medium = medium
        self._namespace = namespace
        self._url = url
        self._read_only = read_only
        self._probed_s = math.inf

    def match(self, hashes: Sequence[BlockHash], checked: set[str] | None = None) -> int:
        """How many leading blocks are stored; `checked` as in `find`."""
        num_found, num_ahead = 0, MIN_AHEAD
        missing: set[BlockHash] = set()  # no object begins with these
        with reading(self._url):
            while num_found < len(hashes):
                block_hash = hashes[num_found]
                if block_hash in missing and self.known.find(block_hash) is None:
                    break
                place = self.find(block_hash, checked)
                if place is None:
                    break
                num_common = place.num_common(hashes[num_found:])
                num_found += num_common
                if place.row + num_common == len(place.head.hashes):
                    following = hashes[num_found :: len(place.head.hashes)][:num_ahead]
                    heads = self._look_ahead(following, checked)
                    missing.update(one for one, head in heads.items() if head is None)
                    if heads:
                        num_ahead = min(2 * num_ahead, MAX_AHEAD) if all(heads.values()) else 0
        return num_found

    def find(self, block_hash: BlockHash, checked: set[str] | None = None) -> Place | None:
        """Where a block lies. With `checked` only objects named there are believed without a look.

        Those that were looked at are added.
        """
        place = self.known.find(block_hash)
        if place is not None and checked is not None and place.name not in checked:
            checked.add(place.name)
            self.probe(place.name, expected=False)
            return self.find(block_hash, checked)
        if place is None:
            name = object_name(block_hash)
            head = self.probe(name, expected=False)
            place = Place(name, head, 0) if head else None
            if checked is not None:
                checked.add(name)
        return place

    def _look_ahead(
        self, firsts: Sequence[BlockHash], checked: set[str] | None
    ) -> dict[BlockHash, RunHead | None]:
        """The heads of objects that follow, if need be side by side; none when the next is known.

        A long prefix is stored as many objects, and each says only where the next one begins: one
        after the other that is a store's latency times their number. Most are equally long, so
        `firsts` are where they begin then. Where one is not, this is not tried again.
        """
        unknown = [one for one in firsts if self.known.find(one) is None]
        if len(unknown) < MIN_AHEAD or unknown[0] != firsts[0]:
            return {}
        names = list(map(object_name, unknown))
        if checked is not None:
            checked.update(names)
        probes = [partial(self.probe, name, expected=False) for name in names]
        heads: list[RunHead | None] = []
        while len(heads) < len(probes) and self._probed_s < AT_ONCE_S:
            heads.append(probes[len(heads)]())
        heads += ask_all(probes[len(heads) :])
        return dict(zip(unknown, heads, strict=True))

    def probe(self, name: str, *, expected: bool = True) -> RunHead | None:
        """Read the head of an object afresh and remember it; None, and forgotten, if it is bad."""
        began_s = time.monotonic()
        try:
            head = read_head(self._medium, name, self._namespace)
        except FileNotFoundError:
            self._probed_s = time.monotonic() - began_s
            if expected:
                self.faults.count("vanished", name, "it is gone")
        except ForeignBlockError as error:
            self.faults.count("foreign", name, error)
        except CorruptBlockError as error:
            self.discard(name, error)
        else:
            self._probed_s = time.monotonic() - began_s
            self.known.add(name, head)
            return head
        self.known.forget(name)
        return None

    def discard(self, name: str, error: CorruptBlockError) -> None:
        """Forget a damaged object and, where that is allowed, make its name free again."""
        self.known.forget(name)
        self.faults.count("corrupt", name, error)
        if not self._read_only:
            try:
                with writing(self._url):
                    self._medium.remove(name)
            except StoreError as failure:
                logger.warning("could not remove the damaged object %s: %s", name, failure)
