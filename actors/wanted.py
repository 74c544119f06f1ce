"""The prefix that one request could have loaded, and in the end, where its tokens came from."""

import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from actors.engine import Engine, GenerationRequest, Receipt
from shared_cache.hashing import BlockHash, ReuseScope, prompt_chain
from shared_cache.host.interface import HostLease
from shared_cache.prefix_cache import PrefixCache, StagedPrefix

NOTHING = StagedPrefix(HostLease(-1, ()))


@dataclass(frozen=True, slots=True)
class WantedPrefix:
    """The blocks of one request that may be loaded, and until when it waits for them.

    `own_hashes` are those in the request's own scope, `hashes` those under which they are stored,
    in `scope`.
    """

    engine: Engine
    cache: PrefixCache
    own_hashes: Sequence[BlockHash]
    hashes: Sequence[BlockHash]
    scope: ReuseScope
    until_s: float

    def lease(self) -> StagedPrefix:
        """What is here of it now, the device's blocks left out."""
        first = self.engine.num_device_blocks(self.own_hashes)
        return self.cache.lease(self.hashes, first, self.scope)

    def grown(self, staged: StagedPrefix) -> StagedPrefix:
        """`staged`, and what arrives in time of the rest."""
        return self.cache.grow(staged, self.hashes, max(0.0, self.until_s - time.monotonic()))

    def grown_to(self, start: int, end: int) -> StagedPrefix:
        """Blocks from `start` on when those before `end` have come, leased once more.

        There may be more of them. `grown` fetches them.
        """
        left_s = max(0.0, self.until_s - time.monotonic())
        return self.cache.lease_coming(self.hashes, start, end, self.scope, left_s)

    def lacks_something(self, staged: StagedPrefix) -> bool:
        """Whether more than `staged` could come from a tier."""
        return self.cache.can_fetch(self.hashes, staged.end)


def wanted_prefix(
    engine: Engine, cache: PrefixCache, request: GenerationRequest
) -> WantedPrefix | None:
    """The blocks that may be loaded, if any: whole ones, leaving a token to compute."""
    tokens, block = request.prompt_token_ids, engine.namespace.layout.tokens_per_block
    num_blocks = (len(tokens) - 1) // block
    if num_blocks < 1 or len(tokens) > engine.max_total_tokens:
        return None
    scope = engine.storage_scope(request.scope)
    own = hashes = prompt_chain(tokens, block, request.scope).hashes[:num_blocks]
    if scope != request.scope:
        hashes = prompt_chain(tokens, block, scope).hashes[:num_blocks]
    return WantedPrefix(engine, cache, own, hashes, scope, time.monotonic() + cache.deadline_s)


def with_tiers(receipt: Receipt, fetched: Set[int], ahead: range, tokens_per_block: int) -> Receipt:
    """The receipt with the engine's `host` split into what was in host memory and what came.

    `fetched` are the blocks that came from a tier. Those in `ahead` were loaded for this request
    before the engine saw it, which found them on the device.
    """
    on_device = receipt.device // tokens_per_block
    end = on_device + receipt.host // tokens_per_block
    num_ahead = max(0, min(ahead.stop, on_device) - ahead.start)
    loaded = {*range(ahead.start, ahead.start + num_ahead), *range(on_device, end)}
    device = receipt.device - num_ahead * tokens_per_block
    shared = len(fetched & loaded) * tokens_per_block
    return replace(
        receipt, device=device, host=receipt.device + receipt.host - device - shared, shared=shared
    )
