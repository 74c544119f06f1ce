"""What the router knows of all caches, and how it came to know it. Pure.

Three sources: its own bookings, at once; what engines and host tiers tell, late; receipts, which
correct both. What is told must be told without gaps: after a lost message the router would go on
believing in blocks that are gone, so it asks for a snapshot then.
"""

from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.cache_changes import CacheTier, Cursor, TierChanges
from actors.routing.index import BlockIndex
from actors.routing.views import Match

SHARED_TIER = "shared tier"
LEARNT_AT_ONCE = 4096
"""Blocks that are learnt in one go: longer news would hold up decisions."""

MAX_MATCHES = 4096
TIERS: tuple[CacheTier, ...] = ("device", "host", "shared")

Source = tuple[str, CacheTier]
"""Who tells (a replica, or a machine) of which tier."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is believed of one prompt's blocks: in keys per holder, in tokens per replica."""

    depths: Mapping[str, int]
    matches: Mapping[str, Match]
    shared_tokens: int


NOTHING_FOUND = Found({}, {}, 0)


@dataclass(frozen=True, slots=True)
class _News:
    holder: str
    stored: "array[int]"
    removed: "array[int]"
    is_snapshot: bool


class CacheKnowledge:
    """Blocks of replicas' devices, of machines' and replicas' host memory, of the shared tier.

    A key stands for `tokens_per_key` tokens. With `is_sampled` (keys of every n-th block only),
    what is told of blocks that no prompt had is dropped: which are n-th ones is not known.
    """

    def __init__(self, index: BlockIndex, tokens_per_key: int, is_sampled: bool = False) -> None:
        self.index = index
        self.num_gaps = 0
        self.num_snapshots = 0
        self._tokens_per_key = tokens_per_key
        self._is_sampled = is_sampled
        self._machine_of: dict[str, str | None] = {}
        self._readers: dict[str, list[str]] = {}  # host memory -> replicas that load from it
        self._cursors: dict[Source, Cursor] = {}
        self._news: deque[_News] = deque()
        self._matches: dict[tuple[int, int], Match] = {}
        index.add_holder(SHARED_TIER)

    def add_replica(self, replica_id: str, machine: str | None) -> None:
        """A replica with an empty device, and the machine whose arena it uses, if any."""
        self.remove_replica(replica_id)
        self.remove_machine(replica_id)  # what it told before it was known was taken for one's
        self._machine_of[replica_id] = machine
        self.index.add_holder(replica_id)
        own = host_of(replica_id)
        self.index.add_holder(own)
        self._readers[own] = [replica_id]
        if machine is not None:
            self._readers.setdefault(machine_host(machine), []).append(replica_id)

    def remove_replica(self, replica_id: str) -> None:
        """Forget a replica and what it has; what its machine has stays. Unknown: no error."""
        if replica_id not in self._machine_of:
            return
        machine = self._machine_of.pop(replica_id)
        if machine is not None:
            self._readers[machine_host(machine)].remove(replica_id)
        del self._readers[host_of(replica_id)]
        for holder in (replica_id, host_of(replica_id)):
            self._forget(holder)
        for tier in ("device", "host"):
            self._cursors.pop((replica_id, tier), None)

    def remove_machine(self, machine: str) -> None:
        """Forget what a machine's host memory has; an unknown one is no error."""
        self._forget(machine_host(machine))
        for tier in ("host", "shared"):
            self._cursors.pop((machine, tier), None)

    def look_up(self, keys: Sequence[int]) -> Found:
        """What is believed of a prompt's blocks, first block first."""
        depths = self.index.match(keys)
        if not depths:
            return NOTHING_FOUND
        device: dict[str, int] = {}
        host: dict[str, int] = {}
        for holder, depth in depths.items():
            readers = self._readers.get(holder)
            if readers is None:
                device[holder] = depth
            else:
                host.update({one: depth for one in readers if host.get(one, 0) < depth})
        shared = device.pop(SHARED_TIER, 0)
        matches = {one: self._match(device.get(one, 0), host.get(one, 0)) for one in device | host}
        return Found(depths, matches, shared * self._tokens_per_key)

    def book(self, replica_id: str, keys: Sequence[int], found: Found) -> None:
        """These blocks will be on this replica's device: in flight counts as cached."""
        self.index.book(replica_id, keys, found.depths)

    def correct_shared(
        self, keys: Sequence[int], found: Found, cached_tokens: int, is_told: bool
    ) -> None:
        """A prompt found so many tokens in all caches: believe no more in the shared tier's rest.

        Unless `is_told` (machines tell what was stored), the prompt's blocks are in the shared
        tier soon; where it lacked some, it may not take these either, and the next prompt decides.
        """
        size = self._tokens_per_key
        believed = found.shared_tokens // size
        if cached_tokens < believed * size:
            self.index.remove(SHARED_TIER, keys[cached_tokens // size : believed])
        elif not is_told:
            self.index.add(SHARED_TIER, keys[believed:])

    def learn(self, source: str, changes: TierChanges) -> bool:
        """Believe what a replica or a machine tells; False if something before it is missing.

        Then nothing is changed, and its cursor is gone: it is to be asked for a snapshot.
        Nor is a device believed in before its replica is known, as after this router's restart.
        """
        key: Source = (source, changes.tier)
        if changes.tier == "device" and source not in self._machine_of:
            return False
        if not changes.continues(self._cursors.get(key)):
            self.num_gaps += 1
            self._cursors.pop(key, None)
            return False
        self._cursors[key] = changes.end
        holder = self._holder(source, changes.tier)
        if changes.is_snapshot:
            self.num_snapshots += 1
            if holder != SHARED_TIER:
                self._forget(holder)
                self.index.add_holder(holder)
        self._news.extend(_slices(holder, changes))
        return True

    def cursors(self, source: str) -> Mapping[CacheTier, Cursor]:
        """How far a source was read; of a tier that is not there it is to tell everything."""
        keys = ((source, tier) for tier in TIERS)
        return {key[1]: self._cursors[key] for key in keys if key in self._cursors}

    def work_off(self, max_blocks: int = LEARNT_AT_ONCE) -> bool:
        """Take in some of what was told; False when there is more."""
        while self._news and max_blocks > 0:
            news = self._news.popleft()
            max_blocks -= len(news.stored) + len(news.removed)
            self.index.remove(news.holder, news.removed)
            stored: Sequence[int] = news.stored
            if self._is_sampled and not news.is_snapshot:
                stored = [key for key in stored if key in self.index]
            self.index.add(news.holder, stored)
        return not self._news

    def _holder(self, source: str, tier: CacheTier) -> str:
        if tier == "shared":
            return SHARED_TIER
        if source in self._machine_of:
            return source if tier == "device" else host_of(source)
        self._readers.setdefault(machine_host(source), [])
        return machine_host(source)

    def _forget(self, holder: str) -> None:
        self.index.remove_holder(holder)
        self._news = deque(news for news in self._news if news.holder != holder)

    def _match(self, device: int, host: int) -> Match:
        """Few different ones exist at a time, and making one costs more than finding it."""
        match = self._matches.get((device, host))
        if match is None:
            if len(self._matches) > MAX_MATCHES:
                self._matches.clear()
            size = self._tokens_per_key
            match = Match(device * size, max(device, host) * size)
            self._matches[device, host] = match
        return match


def host_of(replica_id: str) -> str:
    """The holder that stands for host memory of one replica alone."""
    return f"host memory of {replica_id}"


def machine_host(machine: str) -> str:
    """The holder that stands for a machine's arena."""
    return f"arena of {machine}"


def _slices(holder: str, changes: TierChanges) -> Iterator[_News]:
    nothing, step = array("Q"), LEARNT_AT_ONCE
    for start in range(0, len(changes.removed), step):
        yield _News(holder, nothing, changes.removed[start : start + step], False)
    for start in range(0, len(changes.stored), step):
        yield _News(holder, changes.stored[start : start + step], nothing, changes.is_snapshot)
