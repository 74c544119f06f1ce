"""Blocks, and whose blocks make room for whose.

With one ranking for all, a tenant that reads a large corpus once pushes out everybody else's
documents. A tenant with a quota has a ranking of its own and, once it has used up its quota, makes
room by its own blocks alone.

There may be a million blocks, and a lease touches hundreds of them within microseconds: so each is
a plain object with slots, and what is counted is counted in place.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from shared_cache.eviction import MAX_REFUSED, EvictionPolicy
from shared_cache.hashing import BlockHash
from shared_cache.host.terms import BlockRecord

NEVER_CHECKED = 1 << 62
"""A turn that never comes: the block is not to be looked up in the shared tier."""

SEARCH_PAUSE_S = 0.1
"""How long a group is not searched again after a long search found only blocks that are kept."""


class Block:
    """One block in the arena.

    `num_holders` have it leased, `num_children` are the blocks right behind it that are here.
    `bringer` is the holder that committed it (None: unknown after a restart). `last_use` is the
    turn of the index in which it was asked for last, `offered_at_use` what that was when it was
    next to go and could not, for its children. `is_stored` says that the shared tier has it;
    `uses_to_store` at which use from now on it is offered for storing there (0: at none, as it is
    stored, being stored, or not wanted). `stored_turn` is the turn in which the shared tier was
    last known to have it (`NEVER_CHECKED`: it has not, or that is being looked up).
    """

    __slots__ = (
        "block_hash",
        "bringer",
        "group",
        "is_frozen",
        "is_stored",
        "last_use",
        "num_children",
        "num_holders",
        "offered_at_use",
        "parent",
        "pinned_until_s",
        "slot",
        "stored_turn",
        "uses_to_store",
    )

    def __init__(self, record: BlockRecord, slot: int, group: "Group", bringer: int | None) -> None:
        self.block_hash = record.block_hash
        self.parent = record.parent
        self.is_stored = record.is_stored
        self.slot = slot
        self.group = group
        self.bringer = bringer
        self.num_holders = 0
        self.num_children = 0
        self.last_use = 0
        self.offered_at_use = -1
        self.pinned_until_s = 0.0
        self.uses_to_store = 0
        self.stored_turn = NEVER_CHECKED
        self.is_frozen = False

    def is_kept(self, now_s: float) -> bool:
        """Whether somebody reads it or may come back to read it."""
        return self.num_holders > 0 or self.is_frozen or self.pinned_until_s > now_s


class Quota:
    """What one tenant uses of what it may use, over all namespaces."""

    __slots__ = ("groups", "limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.groups: list[Group] = []

    def make_room(self, num_bytes: int, now_s: float, spared: Collection[Block] = ()) -> None:
        """Evict this tenant's blocks, but not `spared`, until `num_bytes` more are allowed."""

        def num_missing(group: Group) -> int:
            return -((self.limit_bytes - self.used_bytes - num_bytes) // group.block_bytes)

        evict_coldest(self.groups, num_missing, now_s, spared)


class Group:
    """Blocks of one namespace that are ranked together: those of one tenant, or of all others.

    `coldness` is when the block that went last had been used last (at first the turn in which the
    group began): what goes next was hardly used before that.
    """

    __slots__ = (
        "_blocks",
        "_next_search_s",
        "_next_to_go",
        "_num_kept",
        "_num_refused",
        "_remove",
        "block_bytes",
        "coldness",
        "num_evicted",
        "num_frozen",
        "num_leased",
        "policy",
        "quota",
    )

    def __init__(
        self,
        policy: EvictionPolicy,
        blocks: Mapping[BlockHash, Block],
        remove: Callable[[Block], None],
        block_bytes: int,
        quota: Quota | None,
        turn: int,
    ) -> None:
        """Rank some of `blocks`, all of `block_bytes`, by `policy`; `remove` makes one go."""
        self.policy = policy
        self.block_bytes = block_bytes
        self.quota = quota
        self.coldness = turn
        self.num_evicted = 0
        self.num_frozen = 0
        self.num_leased = 0
        self._blocks = blocks
        self._remove = remove
        self._next_to_go: Block | None = None
        self._next_search_s = float("-inf")
        self._num_refused = self._num_kept = 0  # in this search
        if quota is not None:
            quota.groups.append(self)

    def evict(self, num_blocks: int, now_s: float, spared: Collection[Block] = ()) -> int:
        """Drop up to `num_blocks` of the blocks that may go, but not `spared`; how many went.

        A policy meets a prompt's first blocks before its last ones if they came one by one. It gets
        them refused then, and offers them late again; but they are what was to go next. So when a
        block goes, its parent follows at once if it has been offered before, and not used since.

        Going through a large arena for nothing would hold up everybody. So a search is bounded, the
        next one goes on behind it, and it pauses when nearly all it met is kept by somebody.
        """
        num_kept = max(self.num_leased, self.num_frozen)
        if len(self.policy) <= num_kept or now_s < self._next_search_s:
            return 0
        self._num_refused = self._num_kept = 0
        try_evict = partial(self._try_evict, now_s, spared)
        num_evicted = 0
        while (
            num_evicted < num_blocks
            and self._num_refused < MAX_REFUSED
            and (self._evict_next(try_evict) or self.policy.evict(1, try_evict))
        ):
            num_evicted += 1
        self.num_evicted += num_evicted
        if not num_evicted and self._num_kept >= MAX_REFUSED // 2:
            self._next_search_s = now_s + SEARCH_PAUSE_S
        return num_evicted

    def _evict_next(self, try_evict: Callable[[BlockHash], bool]) -> bool:
        block, self._next_to_go = self._next_to_go, None
        if (
            block is None
            or self._blocks.get(block.block_hash) is not block
            or block.offered_at_use != block.last_use
            or not try_evict(block.block_hash)
        ):
            return False
        self.policy.removed(block.block_hash)
        return True

    def _try_evict(self, now_s: float, spared: Collection[Block], name: BlockHash) -> bool:
        block = self._blocks[name]
        if block.is_kept(now_s) or block in spared:
            self._num_kept += 1
            self._num_refused += 1
            return False
        if block.num_children:
            self._num_refused += 1
            block.offered_at_use = block.last_use
            return False
        self.coldness = block.last_use
        self._remove(block)
        parent = self._blocks.get(block.parent)
        is_next = parent is not None and parent.group is self
        self._next_to_go = parent if is_next else None
        return True


def evict_coldest(
    groups: Iterable[Group],
    num_missing: Callable[[Group], int],
    now_s: float,
    spared: Collection[Block] = (),
) -> None:
    """Evict until no block is missing or none may go; the group with the coldest blocks gives.

    `num_missing` is how many blocks of the size of a group are missing still. A policy shows a
    victim only by evicting it, so how cold a group is follows from what it gave last.
    """
    givers = list(groups)
    while givers:
        group = min(givers, key=lambda group: group.coldness)
        missing = num_missing(group)
        if missing <= 0:
            return
        batch = -(-missing // len(givers))
        if group.evict(batch, now_s, spared) < batch:
            givers.remove(group)
