"""The double's KV pool: blocks by what they hold, kept until others need the room, told by events.

Its block hashes are its own and differ between salts, as TensorRT-LLM's do, so that nothing of ours
can lean on them.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any


class Pool:
    """`num_blocks` on the device, the rest, up to `num_host_blocks`, on the host."""

    def __init__(
        self, tokens_per_block: int, num_blocks: int, num_host_blocks: int, event_buffer: int
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks
        self.device: OrderedDict[int, None] = OrderedDict()
        self.host: OrderedDict[int, None] = OrderedDict()
        self.events: list[Any] = []
        self.reused = self.missed = self.allocated = 0
        self._has_events = event_buffer > 0
        self._num_events = 0
        self._emit("created", num_blocks_per_cache_level=[num_blocks, num_host_blocks])

    def begin(self, prompt: Sequence[int], salt: str | None) -> int:
        """Take a prompt in; how many of its tokens were there."""
        own = self.hashes(prompt, salt)[: (len(prompt) - 1) // self.tokens_per_block]
        found = 0
        while found < len(own) and (own[found] in self.device or own[found] in self.host):
            found += 1
        self.reused += found
        self.missed += len(own) - found
        self._keep(prompt, salt)
        return found * self.tokens_per_block

    def end(self, tokens: Sequence[int], salt: str | None) -> None:
        """Keep what a request has left."""
        self._keep(tokens, salt)

    def hashes(self, tokens: Sequence[int], salt: str | None) -> list[int]:
        """The double's names of the full blocks."""
        parent, found = str(salt), []
        size = self.tokens_per_block
        for start in range(0, len(tokens) - size + 1, size):
            block = list(tokens[start : start + size])
            digest = hashlib.blake2b(f"{parent}:{block}".encode(), digest_size=8).digest()
            found.append(int.from_bytes(digest, "big"))
            parent = str(found[-1])
        return found

    def stats(self) -> dict[str, Any]:
        """`kvCacheStats`."""
        used = len(self.device)
        return {
            "maxNumBlocks": self.num_blocks,
            "freeNumBlocks": self.num_blocks - used,
            "usedNumBlocks": used,
            "tokensPerBlock": self.tokens_per_block,
            "allocTotalBlocks": self.allocated,
            "allocNewBlocks": self.allocated,
            "reusedBlocks": self.reused,
            "missedBlocks": self.missed,
            "cacheHitRate": self.reused / max(1, self.reused + self.missed),
        }

    def _keep(self, tokens: Sequence[int], salt: str | None) -> None:
        own, size = self.hashes(tokens, salt), self.tokens_per_block
        new = [one for one in own if one not in self.device]
        for one in own:
            if one in self.host:
                del self.host[one]
                self._move(one, 1, 0)
            self.device[one] = None
            self.device.move_to_end(one)
        self.allocated += len(new)
        if new:
            self._tell_stored(own, new, tokens, size)
        while len(self.device) > self.num_blocks:
            self._evict(next(iter(self.device)))

    def _tell_stored(
        self, own: list[int], new: list[int], tokens: Sequence[int], size: int
    ) -> None:
        first = own.index(new[0])
        blocks = [
            {
                "type": "stored_block",
                "block_hash": one,
                "tokens": _unique(tokens[(first + i) * size : (first + i + 1) * size]),
                "cache_level": 0,
                "priority": 35,
            }
            for i, one in enumerate(own[first:])
        ]
        rest = tokens[len(own) * size :]
        if rest:
            blocks.append({"block_hash": 7, "tokens": _unique(rest), "cache_level": 0})
        self._emit("stored", parent_hash=own[first - 1] if first else None, blocks=blocks)

    def _evict(self, one: int) -> None:
        del self.device[one]
        if not self.num_host_blocks:
            self._emit("removed", block_hashes=[one])
            return
        self.host[one] = None
        self._move(one, 0, 1)
        while len(self.host) > self.num_host_blocks:
            self._emit("removed", block_hashes=[self.host.popitem(last=False)[0]])

    def _move(self, one: int, old: int, new: int) -> None:
        level = {"type": "event_diff", "new_value": new, "old_value": old}
        self._emit("updated", block_hash=one, cache_level=level, priority=None)

    def _emit(self, kind: str, **data: Any) -> None:
        if self._has_events:
            event = {"event_id": self._num_events, "data": {"type": kind, **data}, "window_size": 1}
            self.events.append(event)
            self._num_events += 1


def _unique(tokens: Sequence[int]) -> list[dict[str, Any]]:
    return [{"type": "unique_token", "token_id": one, "token_extra_id": 0} for one in tokens]
