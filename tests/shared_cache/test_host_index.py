"""Every order of events of several processes, against a plain model of what must hold."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shared_cache.eviction import PolicyName, make_policy
from shared_cache.hashing import BlockHash, ReuseScope
from shared_cache.host.index import Grant, HostIndex, IndexRules
from shared_cache.host.interface import NewRun
from tests.shared_cache.arena_fakes import FakeJournal, Used, make_index
from tests.shared_cache.fakes import FakeClock, chain_of

EXTENT_UNITS = 5
NUM_EXTENTS = 3
BLOCK_UNITS = (1, 2)
"""Slot sizes of the two namespaces; the second one wastes the end of every extent."""

TENANTS = [ReuseScope(), ReuseScope(cache_salt="limited"), ReuseScope(cache_salt="other")]
LIMITED = TENANTS[1].tenant
QUOTA_BYTES = 3 * 4096
CHAINS = [chain_of(6, 1000 * (i // 3), TENANTS[i % 3]) for i in range(6)]
HOLDERS = (1, 2, 3)

holders = st.sampled_from(HOLDERS)
namespaces = st.sampled_from(range(len(BLOCK_UNITS)))
chains = st.sampled_from(range(len(CHAINS)))


@dataclass
class Process:
    """What one process believes it has."""

    namespaces: set[int] = field(default_factory=set)
    reserved: dict[int, int] = field(default_factory=dict)
    leases: Counter[int] = field(default_factory=Counter)
    to_store: set[tuple[int, BlockHash]] = field(default_factory=set)


class HostIndexMachine(RuleBasedStateMachine):
    """Processes that come, go, write, read, pin and die, on an owner that dies as well."""

    index: HostIndex
    journal: FakeJournal
    rules: IndexRules

    @initialize(
        policy=st.sampled_from(["lru", "s3fifo", "priority"]),
        admission=st.sampled_from(["always", "second_use", "never"]),
    )
    def start(self, policy: PolicyName, admission: str) -> None:
        self.clock = FakeClock()
        self.rules = IndexRules(
            lambda clock: make_policy(policy, clock),
            {LIMITED: QUOTA_BYTES},
            admission,  # type: ignore[arg-type]
        )
        self.journal = FakeJournal(EXTENT_UNITS, on_freed=self.on_freed)
        self.processes: dict[int, Process] = {}
        self.block_in: dict[int, tuple[int, BlockHash]] = {}
        self.pins: dict[tuple[int, BlockHash], float] = {}
        self.frozen: set[int] = set()
        self.orphaned_in: set[int] = set()
        self.drops_allowed = False
        self.open_index()
        for holder, namespace in ((1, 0), (2, 0), (2, 1), (3, 1)):
            self.attach(holder, namespace)

    def open_index(self) -> None:
        self.index = make_index(self.rules, self.journal, self.clock, NUM_EXTENTS)
        for number, units in enumerate(BLOCK_UNITS):
            assert self.index.open_namespace(f"n{number}", units * 4096) == number

    def on_freed(self, slot: int, used: Used) -> None:
        """Nothing that somebody needs may go; a parent goes only with its whole extent."""
        name = (used.namespace, used.record.block_hash)
        assert not any(process.leases[slot] for process in self.processes.values())
        assert slot not in self.frozen
        assert self.drops_allowed or self.pins.get(name, 0.0) <= self.clock.now_s
        is_parent = any(
            (other.namespace, other.record.parent) == name for other in self.journal.used.values()
        )
        if is_parent and not self.drops_allowed:
            self.orphaned_in.add(slot // EXTENT_UNITS)
        for process in self.processes.values():
            process.to_store.discard(name)

    # What processes do

    @rule(holder=holders, namespace=namespaces)
    def attach(self, holder: int, namespace: int) -> None:
        self.index.attach(holder, namespace)
        self.processes.setdefault(holder, Process()).namespaces.add(namespace)

    @rule(holder=holders)
    def die(self, holder: int) -> None:
        before = set(self.journal.used)
        self.processes.pop(holder, None)
        self.index.detach(holder)
        assert set(self.journal.used) == before

    def any_user(self, data: st.DataObject) -> tuple[int, int, Process]:
        users = [(h, n, p) for h, p in self.processes.items() for n in sorted(p.namespaces)]
        return data.draw(st.sampled_from(users))

    def is_used(self) -> bool:
        return bool(self.processes)

    def note(self, holder: int, namespace: int, names: list[BlockHash], grant: Grant) -> None:
        """A lease was given: it is on the right blocks."""
        process = self.processes[holder]
        for slot, name in zip(grant.slots, names, strict=False):
            assert self.block_at(slot) == (namespace, name)
            process.leases[slot] += 1
        offered = {(namespace, names[position]) for position in grant.to_store}
        assert not any(offered & process.to_store for process in self.processes.values())
        assert self.rules.admission != "never" or not offered
        for position in grant.to_store:
            assert not self.journal.used[grant.slots[position]].record.is_stored
        process.to_store |= offered

    def block_at(self, slot: int) -> tuple[int, BlockHash]:
        used = self.journal.used[slot]
        return used.namespace, used.record.block_hash

    def num_evictable(self, namespace: int) -> int:
        """Free slots, and blocks that nobody keeps and that no kept block needs."""
        mine = {s: u.record for s, u in self.journal.used.items() if u.namespace == namespace}
        kept = {s for s in mine if s in self.frozen or self.is_pinned(namespace, mine[s])}
        kept |= {s for p in self.processes.values() for s in p.leases if p.leases[s]} & set(mine)
        needed = {mine[s].parent for s in kept}
        while more := {s for s in mine if mine[s].block_hash in needed} - kept:
            kept |= more
            needed |= {mine[s].parent for s in more}
        extents = [e for e, (owner, _) in self.journal.extents.items() if owner == namespace]
        slots = {slot for extent in extents for slot in self.journal.slots_of(extent)}
        return len(slots - self.journal.taken) + len(mine) - len(kept)

    def extents_of(self, namespace: int) -> set[int]:
        return {e for e, (owner, _) in self.journal.extents.items() if owner == namespace}

    def is_pinned(self, namespace: int, record: object) -> bool:
        name = (namespace, record.block_hash)  # type: ignore[attr-defined]
        return self.pins.get(name, 0.0) > self.clock.now_s

    @precondition(is_used)
    @rule(data=st.data(), num_slots=st.integers(0, 12))
    def reserve(self, data: st.DataObject, num_slots: int) -> None:
        holder, namespace, process = self.any_user(data)
        num_evictable, before = self.num_evictable(namespace), self.extents_of(namespace)
        slots = self.index.reserve(holder, namespace, num_slots)
        new = self.extents_of(namespace) - before
        assert len(new) <= 1
        assert len(slots) <= num_slots
        if new:  # then nothing is evicted for the rest
            assert slots
        else:
            assert len(slots) >= min(num_slots, num_evictable)
        process.reserved.update(dict.fromkeys(slots, namespace))

    @precondition(is_used)
    @rule(data=st.data(), chain=chains, length=st.integers(0, 6))
    def claim(self, data: st.DataObject, chain: int, length: int) -> None:
        holder, namespace, process = self.any_user(data)
        hashes = CHAINS[chain].hashes[:length]
        coming = [h for h in hashes if self.index.is_coming(namespace, h)]
        claim = self.index.claim(holder, namespace, hashes)
        self.note(holder, namespace, hashes, claim.grant)
        num_here = len(claim.grant.slots)
        claimed = hashes[num_here : num_here + len(claim.slots)]
        assert not set(claimed) & set(coming)
        assert all(self.index.is_coming(namespace, block_hash) for block_hash in claimed)
        behind = hashes[num_here + len(claim.slots) :]
        assert claim.is_coming == bool(behind and behind[0] in {*coming, *claimed})
        process.reserved.update(dict.fromkeys(claim.slots, namespace))

    @precondition(is_used)
    @rule(data=st.data(), chain=chains, start=st.integers(0, 5), is_stored=st.booleans())
    def commit(self, data: st.DataObject, chain: int, start: int, is_stored: bool) -> None:
        holder, namespace, process = self.any_user(data)
        mine = [slot for slot, owner in process.reserved.items() if owner == namespace]
        hashes = CHAINS[chain].hashes[start : start + data.draw(st.integers(0, len(mine)))]
        self.publish(holder, namespace, mine[: len(hashes)], chain, start, is_stored)

    @precondition(is_used)
    @rule(data=st.data(), chain=chains, start=st.integers(0, 3), keeps=st.booleans())
    def save(self, data: st.DataObject, chain: int, start: int, keeps: bool) -> None:
        """What an engine does all day: bring a run, and read it for a while or not at all."""
        holder, namespace, process = self.any_user(data)
        hashes = CHAINS[chain].hashes[start : start + data.draw(st.integers(1, 4))]
        slots = self.index.reserve(holder, namespace, len(hashes))
        process.reserved.update(dict.fromkeys(slots, namespace))
        grant = self.publish(holder, namespace, slots, chain, start, False)
        if not keeps:
            self.index.release(holder, grant.slots)
            process.leases.subtract(grant.slots)

    def publish(
        self,
        holder: int,
        namespace: int,
        slots: Sequence[int],
        chain: int,
        start: int,
        is_stored: bool,
    ) -> Grant:
        hashes = CHAINS[chain].hashes[start : start + len(slots)]
        tenant, parent = TENANTS[chain % len(TENANTS)].tenant, CHAINS[chain].parent_of(start)
        run = NewRun(parent, tuple(hashes), tenant, is_stored, tuple(range(len(slots))))
        here = {self.block_at(slot): slot for slot in self.journal.used}
        for slot in slots:
            del self.processes[holder].reserved[slot]
        grant = self.index.commit(holder, namespace, slots, run)
        if tenant != LIMITED:
            assert len(grant.slots) == len(hashes)
        for block_hash, given, held in zip(hashes, slots, grant.slots, strict=False):
            assert held in (given, here.get((namespace, block_hash)))
            self.block_in[held] = (namespace, block_hash)
        self.note(holder, namespace, hashes, grant)
        return grant

    @precondition(is_used)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        holder, _, process = self.any_user(data)
        slots = sorted(process.reserved)[: data.draw(st.integers(0, len(process.reserved)))]
        self.index.cancel(holder, slots)
        for slot in slots:
            del process.reserved[slot]

    @precondition(is_used)
    @rule(data=st.data(), chain=chains, first=st.integers(0, 6), length=st.integers(0, 6))
    def lease(self, data: st.DataObject, chain: int, first: int, length: int) -> None:
        holder, namespace, _ = self.any_user(data)
        hashes = CHAINS[chain].hashes[:length]
        here = {self.block_at(slot) for slot in self.journal.used}
        grant = self.index.lease(holder, namespace, hashes, first)
        self.note(holder, namespace, hashes[first:], grant)
        beyond = hashes[first + len(grant.slots) :]
        assert not beyond or (namespace, beyond[0]) not in here

    @precondition(is_used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder, _, process = self.any_user(data)
        slots = sorted(process.leases.elements())
        if data.draw(st.booleans()):
            slots = data.draw(st.permutations(slots))[: data.draw(st.integers(0, len(slots)))]
        self.index.release(holder, [*slots, 999])
        process.leases.subtract(slots)

    @precondition(is_used)
    @rule(data=st.data(), is_stored=st.booleans())
    def stored(self, data: st.DataObject, is_stored: bool) -> None:
        holder, namespace, process = self.any_user(data)
        names = sorted(name for owner, name in process.to_store if owner == namespace)
        self.index.stored(holder, namespace, names, is_stored)
        process.to_store -= {(namespace, name) for name in names}
        for used in self.journal.used.values():
            if is_stored and used.namespace == namespace and used.record.block_hash in names:
                assert used.record.is_stored

    @rule(namespace=namespaces, chain=chains, length=st.integers(0, 6), ttl_s=st.integers(1, 90))
    def pin(self, namespace: int, chain: int, length: int, ttl_s: int) -> None:
        hashes = CHAINS[chain].hashes[:length]
        num_pinned = self.index.pin(namespace, hashes, ttl_s)
        here = {self.block_at(slot) for slot in self.journal.used}
        for position, block_hash in enumerate(hashes):
            if (namespace, block_hash) not in here:
                assert num_pinned == position
                break
            name = (namespace, block_hash)
            self.pins[name] = max(self.pins.get(name, 0.0), self.clock.now_s + ttl_s)

    @rule(namespace=namespaces, chain=chains, start=st.integers(0, 5))
    def drop(self, namespace: int, chain: int, start: int) -> None:
        hashes = CHAINS[chain].hashes[start : start + 2]
        num_before = len(self.journal.used)
        self.drops_allowed = True
        num_dropped = self.index.drop(namespace, hashes)
        self.drops_allowed = False
        assert num_before - len(self.journal.used) == num_dropped

    @rule(seconds=st.sampled_from([0.5, 2.0, 61.0]), has_memory=st.booleans())
    def pass_time(self, seconds: float, has_memory: bool) -> None:
        self.clock.now_s += seconds
        self.journal.has_memory = has_memory

    # What becomes of the owner

    @rule(survivors=st.sets(holders))
    def restart(self, survivors: set[int]) -> None:
        """The owner dies, perhaps some processes too; the next owner reads what was written."""
        for holder in [h for h in self.processes if h not in survivors]:
            for slot in self.processes.pop(holder).reserved:
                del self.journal.reserved_by[slot]
        self.open_index()
        self.journal.replay(self.index)
        self.frozen = set(self.journal.used)
        self.pins.clear()
        for holder, process in self.processes.items():
            process.to_store.clear()
            for namespace in process.namespaces:
                self.index.attach(holder, namespace)
                mine = [s for s in process.leases.elements() if self.block_at(s)[0] == namespace]
                assert self.index.adopt_lease(holder, namespace, [*mine, 999]) == tuple(mine)

    @rule()
    def thaw(self) -> None:
        self.frozen.clear()
        self.index.thaw()

    # What always holds

    @invariant()
    def slots_add_up(self) -> None:
        for namespace in range(len(BLOCK_UNITS)):
            stats = self.index.stats(namespace)
            used = [s for s, u in self.journal.used.items() if u.namespace == namespace]
            reserved = [p.reserved for p in self.processes.values()]
            leased = {s for p in self.processes.values() for s in p.leases if p.leases[s]}
            assert stats.free_slots + stats.used_slots + stats.reserved_slots == stats.num_slots
            assert stats.used_slots == len(used)
            assert stats.reserved_slots == sum(list(r.values()).count(namespace) for r in reserved)
            assert stats.leased_slots == len(leased & set(used))

    @invariant()
    def what_is_held_stays(self) -> None:
        for holder, process in self.processes.items():
            for slot in process.reserved:
                assert self.journal.reserved_by[slot] == holder
            for slot in (s for s in process.leases if process.leases[s]):
                assert self.block_at(slot) == self.block_in[slot]
        assert self.frozen <= set(self.journal.used)
        here = {self.block_at(slot) for slot in self.journal.used}
        assert len(here) == len(self.journal.used)

    @invariant()
    def quotas_hold(self) -> None:
        used = [u for u in self.journal.used.values() if u.record.tenant == LIMITED]
        assert sum(BLOCK_UNITS[u.namespace] * 4096 for u in used) <= QUOTA_BYTES

    @invariant()
    def parents_went_only_with_their_extents(self) -> None:
        assert self.orphaned_in <= self.journal.given_back
        self.orphaned_in.clear()
        self.journal.given_back.clear()


HostIndexMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None
)
TestHostIndex = HostIndexMachine.TestCase
