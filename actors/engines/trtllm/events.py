"""TensorRT-LLM's KV cache events -> what its pool holds, in our own block hashes. Pure.

Its block hashes are its own, so blocks are known here by their tokens: a `stored` event brings them
and names its parent, and a chain that begins at a root is hashed as every chain of ours. Two things
are not in the events and are concluded here: the salt of a root, from the requests that were sent
with such a first block, and what was lost when numbers are missing, from the gap.

What it prevents: a replica that believes in blocks which are gone, and computes what it could have
loaded. So in doubt a block is not believed: the price is that it is staged although it is there.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.engine import CacheChanges
from shared_cache.faults import FaultLog
from shared_cache.hashing import DEFAULT_SCOPE, BlockHash, ReuseScope, next_hash

logger = logging.getLogger(__name__)

DEVICE_LEVEL = 0
_ANY_SCOPE = DEFAULT_SCOPE.root_hash()
MAX_CHANGES = 1 << 16
"""Changes that are kept for somebody to take them; with more, all is told anew."""

MAX_ROOTS = 1 << 16
"""First blocks whose scopes are remembered, those used last."""


@dataclass(slots=True)
class _Block:
    name: BlockHash
    level: int


class Roots:
    """The scope of a first block: that of the only requests that can have brought it.

    The engine's hash of a first block differs between scopes, and is the same whenever it is made.
    So a scope whose hash is known is not meant by another hash of the same tokens.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._scopes: OrderedDict[BlockHash, dict[ReuseScope, int | None]] = OrderedDict()

    def expect(self, tokens: Sequence[int], scope: ReuseScope) -> None:
        """A request with this prompt is on its way."""
        if len(tokens) < self._tokens_per_block:
            return
        scopes = self._scopes.setdefault(self._key(tokens), {})
        scopes.setdefault(scope, None)
        self._scopes.move_to_end(self._key(tokens))
        if len(self._scopes) > MAX_ROOTS:
            self._scopes.popitem(last=False)

    def scope_of(self, tokens: Sequence[int], engine_hash: int) -> ReuseScope | None:
        """The scope of this first block; None when several can be meant, or none is known."""
        scopes = self._scopes.get(self._key(tokens), {})
        known = [scope for scope, known_hash in scopes.items() if known_hash == engine_hash]
        open_ones = known or [scope for scope, known_hash in scopes.items() if known_hash is None]
        if len(open_ones) != 1:
            return None
        scopes[open_ones[0]] = engine_hash
        return open_ones[0]

    def _key(self, tokens: Sequence[int]) -> BlockHash:
        return next_hash(_ANY_SCOPE, tokens[: self._tokens_per_block])


class PoolEvents:
    """What one engine's pool holds, by its events. Not thread-safe, but for `num_on_device`."""

    def __init__(self, tokens_per_block: int) -> None:
        self.num_malformed = self.num_unplaced = self.num_gaps = 0
        self.max_num_blocks = 0
        self._tokens_per_block = tokens_per_block
        self._roots = Roots(tokens_per_block)
        self._blocks: dict[int, _Block] = {}
        self._levels: dict[BlockHash, int] = {}
        self._last_id: int | None = None
        self._faults = FaultLog(logger)
        self._changed: set[BlockHash] = set()
        self._is_cleared = False

    def expect(self, tokens: Sequence[int], scope: ReuseScope = DEFAULT_SCOPE) -> None:
        """A request is on its way: blocks that begin as its prompt are of its scope."""
        self._roots.expect(tokens, scope)

    def num_on_device(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are on the device, as far as is known; from any thread."""
        levels = self._levels
        for index, one in enumerate(hashes):
            if levels.get(one) != DEVICE_LEVEL:
                return index
        return len(hashes)

    def take(self, event: Any) -> None:
        """Note one event; one that is none is counted and logged, and not raised.

        Older versions put events into lists, by attention window.
        """
        if isinstance(event, list):
            for one in event:
                self.take(one)
            return
        try:
            self._take(event)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            self.num_malformed += 1
            self._faults.record(f"a KV cache event that cannot be read ({event!r:.200})", error)

    def take_changes(self) -> CacheChanges:
        """What has changed since the last call."""
        changed, self._changed = self._changed, set()
        is_cleared, self._is_cleared = self._is_cleared, False
        levels = {one: self._levels.get(one) for one in changed}
        return CacheChanges(
            stored=tuple(one for one, level in levels.items() if level == DEVICE_LEVEL),
            offloaded=tuple(one for one, level in levels.items() if level),
            removed=() if is_cleared else tuple(o for o, level in levels.items() if level is None),
            is_cleared=is_cleared,
        )

    def _take(self, event: Mapping[str, Any]) -> None:
        data = event["data"]
        kind = data["type"]
        self._count(int(event["event_id"]))
        if kind == "stored":
            self._store(data["parent_hash"], data["blocks"])
        elif kind == "removed":
            self._remove(data["block_hashes"])
        elif kind == "updated":
            self._update(data)
        elif kind == "created":
            self._create(data)
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _count(self, event_id: int) -> None:
        """Numbers run without gaps; where some are missing, removals may be among the lost."""
        if self._last_id is not None and event_id > self._last_id + 1:
            self.num_gaps += 1
            self._faults.record(
                f"{event_id - self._last_id - 1} KV cache events are lost: what the device holds "
                "is learned anew; raise event_buffer_max_size in engine.llm_args.kv_cache_config"
            )
            self._clear()
        self._last_id = event_id

    def _create(self, data: Mapping[str, Any]) -> None:
        self._clear()
        levels = list(data["num_blocks_per_cache_level"])
        self.max_num_blocks = int(levels[0]) if levels else 0

    def _clear(self) -> None:
        self._blocks.clear()
        self._levels = {}
        self._changed, self._is_cleared = set(), True

    def _store(self, parent_hash: int | None, blocks: Iterable[Mapping[str, Any]]) -> None:
        parent = parent_hash or None  # 0 is a root too
        for block in blocks:
            tokens = [token["token_id"] for token in block["tokens"]]
            is_text = not any(token.get("token_extra_id") for token in block["tokens"])
            if len(tokens) != self._tokens_per_block or not is_text:
                break  # the last, unfinished one; or pictures, which tokens do not tell apart
            own_hash = int(block["block_hash"])
            if not self._place(own_hash, parent, tokens, int(block.get("cache_level") or 0)):
                self.num_unplaced += 1
                break
            parent = own_hash
        self._bound_changes()

    def _place(self, own_hash: int, parent: int | None, tokens: list[int], level: int) -> bool:
        before = self._before(own_hash, parent, tokens)
        if before is None:
            return False
        name = next_hash(before, tokens)
        self._blocks[own_hash] = _Block(name, level)
        self._levels[name] = level
        self._changed.add(name)
        return True

    def _before(self, own_hash: int, parent: int | None, tokens: list[int]) -> BlockHash | None:
        """What comes before a block in its chain; None when that is not known."""
        if parent is not None:
            block = self._blocks.get(parent)
            return None if block is None else block.name
        scope = self._roots.scope_of(tokens, own_hash)
        return None if scope is None else scope.root_hash()

    def _remove(self, own_hashes: Iterable[int]) -> None:
        for own_hash in own_hashes:
            block = self._blocks.pop(int(own_hash), None)
            if block is not None:  # else an unfinished one, or one that could not be placed
                self._levels.pop(block.name, None)
                self._changed.add(block.name)
        self._bound_changes()

    def _bound_changes(self) -> None:
        """Nobody need take the changes; then they must not pile up."""
        if len(self._changed) > MAX_CHANGES + len(self._levels):
            self._changed, self._is_cleared = set(self._levels), True

    def _update(self, data: Mapping[str, Any]) -> None:
        block = self._blocks.get(int(data["block_hash"]))
        change = data.get("cache_level")
        if block is not None and change is not None:
            block.level = self._levels[block.name] = int(change["new_value"])
            self._changed.add(block.name)
