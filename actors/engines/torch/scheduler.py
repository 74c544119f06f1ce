"""What the next forward pass computes, and for whom.

A request is admitted only when slots for its prompt and all its output are certain
(TensorRT-LLM's GUARANTEED_NO_EVICT), so nothing that runs is ever thrown out and recomputed.
Decoding comes first in a turn, then as much prefill as the token budget holds. A waiting request
whose next block is being computed right now waits for that block instead of computing it again.
Pure: sequences in, turns out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from actors.engines.torch.scheduled import Scheduled, Turn
from actors.engines.torch.sequence import Sequence
from actors.engines.torch.slots import SlotPool
from shared_cache.hashing import BlockHash


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one turn; `max_num_tokens` is at least `max_batch_size`.

    `max_draft_len` is for one sequence, `max_turn_drafts` for all of them: a pass verifies drafts
    nearly for free only while it is bound by reading the weights. With `separate_tail` what could
    not have come from the cache of a prompt is computed in a turn of its own, as it is when the
    rest did: so a hit computes what a miss does, to the last bit.
    """

    max_batch_size: int
    max_num_tokens: int
    block_reuse: bool = True
    max_draft_len: int = 0
    max_turn_drafts: int = 16
    separate_tail: bool = False


class Scheduler:
    """Waiting and running sequences over one pool.

    A turn may be decided before the tokens of the one before it are known: a sequence then has one
    unknown token, which counts like any other but for its content.
    At admission `load` is asked how many whole blocks of prompt tokens, beyond those on the device,
    a connector will load, and then `allocated` is told that the prompt has its slots. Neither may
    raise.
    """

    def __init__(
        self,
        pool: SlotPool,
        limits: Limits,
        load: Callable[[Sequence], int] = lambda sequence: 0,
        allocated: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_reused_blocks = 0
        self.num_missed_blocks = 0
        self._load = load
        self._allocated = allocated
        self._fresh: list[int] = []
        self._loaded: list[int] = []
        self._parked: list[Sequence] = []
        self._arrived: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose `max_total_tokens` fit the empty pool, else `ValueError`."""
        if sequence.num_blocks(sequence.max_total_tokens) > self.pool.num_slots:
            raise ValueError(f"{sequence.max_total_tokens} tokens never fit this pool")
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> list[int]:
        """Forget a sequence, finished or not; its slots, which the caller has to release."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        slots, sequence.slots = sequence.slots, []
        return slots

    def decide(self) -> Turn:
        """The next turn; its items are empty when nothing can run."""
        self._fresh, self._loaded, self._parked, self._arrived = [], [], [], []
        decoding = [s for s in self.running if s.is_decoding]
        items = self._decodes([s for s in decoding if s.num_tokens < s.max_total_tokens])
        budget = self.limits.max_num_tokens - sum(item.num_fed for item in items)
        for sequence in [s for s in self.running if not s.is_decoding and not s.is_loading]:
            budget -= self._start(sequence, budget, items)
        for sequence in self._admissible():
            if budget <= 0:
                break
            self._admit(sequence)
            budget -= self._start(sequence, budget, items)
        return Turn(
            tuple(items),
            tuple(self._fresh),
            tuple(self._loaded),
            parked=tuple(self._parked),
            arrived=tuple(self._arrived),
            ending=tuple(s for s in decoding if _has_untold_block(s)),
        )

    def launched(self, item: Scheduled) -> None:
        """The pass that computes `item` was put on the device; what it chooses is not known."""
        item.sequence.num_launched = item.end
        item.sequence.num_unknown += item.samples

    def arrived(self, sequence: Sequence) -> None:
        """What only was to be loaded is on the device: its blocks become reusable."""
        self._publish(sequence)

    def advance(self, item: Scheduled, new_tokens: list[int]) -> None:
        """Record what a turn did: KV computed, tokens verified; full blocks become reusable.

        After `launched`, turn by turn in their order.
        """
        sequence = item.sequence
        sequence.num_computed = item.end
        sequence.num_unknown -= item.samples
        if new_tokens:
            sequence.append(new_tokens)
            sequence.num_computed += len(new_tokens) - 1
            sequence.num_launched = max(sequence.num_launched, sequence.num_computed)
        if self.limits.block_reuse:
            self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // sequence.chain.tokens_per_block
        for index in range(sequence.num_published_blocks, num_full):
            self.pool.publish(sequence.slots[index], sequence.chain.hashes[index])
        sequence.num_published_blocks = max(sequence.num_published_blocks, num_full)

    def _decodes(self, decoding: list[Sequence]) -> list[Scheduled]:
        limits, items = self.limits, []
        if not decoding:
            return []
        spare = min(limits.max_turn_drafts, (limits.max_num_tokens - len(decoding)) // 2)
        share = min(limits.max_draft_len, spare // len(decoding))
        for sequence in decoding:
            # A turn puts out one token more than it has drafts.
            room = sequence.max_total_tokens - sequence.num_tokens - 1
            drafts = sequence.lookup.draft(min(share, room)) if sequence.lookup else []
            item = Scheduled(sequence, sequence.num_launched, 1, True, tuple(drafts))
            self._grow(sequence, item.start + item.num_fed)
            items.append(item)
        return items

    def _start(self, sequence: Sequence, budget: int, items: list[Scheduled]) -> int:
        """What one that does not decode needs in this turn; tokens that are computed for that."""
        if sequence.is_loading:
            self._parked.append(sequence)
        elif sequence.loads_only:
            self._arrived.append(sequence)
        else:
            return self._prefill(sequence, budget, items)
        return 0

    def _prefill(self, sequence: Sequence, budget: int, items: list[Scheduled]) -> int:
        """Schedule the next prompt tokens, whole blocks if possible; how many."""
        if budget <= 0:
            return 0
        start = sequence.num_launched
        end = start + min(sequence.num_unlaunched, budget)
        tail = sequence.num_reusable_blocks * sequence.chain.tokens_per_block
        if self.limits.separate_tail and start < tail < end:
            end = tail
        is_last = end == len(sequence.tokens)
        if not is_last:
            aligned = end - end % sequence.chain.tokens_per_block
            end = aligned if aligned > start else end
        items.append(Scheduled(sequence, start, end - start, is_last))
        return end - start

    def _admissible(self) -> Iterator[Sequence]:
        """Waiting sequences that may start now, in order; none overtakes one that lacks room.

        But for those that only load: their requests are not ready, and others may be.
        """
        being_computed = set[BlockHash]()
        for sequence in self.running:
            # What is loaded counts, too, until the turn after it has published it.
            start = sequence.num_published_blocks * sequence.chain.tokens_per_block
            being_computed.update(self._next_hashes(sequence, start))
        for sequence in tuple(self.waiting):
            if len(self.running) >= self.limits.max_batch_size:
                return
            num_matched = self._match(sequence)
            upcoming = self._next_hashes(sequence, num_matched * sequence.chain.tokens_per_block)
            if upcoming and upcoming[0] in being_computed:
                continue
            if not self._fits(sequence, num_matched):
                if sequence.loads_only:
                    continue
                return
            being_computed.update(upcoming)
            yield sequence

    def _next_hashes(self, sequence: Sequence, num_here: int) -> list[BlockHash]:
        """Hashes of the reusable prompt blocks behind the first `num_here` tokens."""
        if not self.limits.block_reuse:
            return []
        start = num_here // sequence.chain.tokens_per_block
        return sequence.chain.hashes[start : sequence.num_reusable_blocks]

    def _match(self, sequence: Sequence) -> int:
        if not self.limits.block_reuse:
            return 0
        return self.pool.match(sequence.chain.hashes[: sequence.num_reusable_blocks])

    def _fits(self, sequence: Sequence, num_matched: int) -> bool:
        """True when slots for all of `sequence` remain after those promised to running ones."""
        promised = sum(s.num_blocks(s.max_total_tokens) - len(s.slots) for s in self.running)
        idle = self.pool.num_idle(sequence.chain.hashes[:num_matched])
        needed = sequence.num_blocks(sequence.max_total_tokens) - num_matched
        return needed <= self.pool.num_available - idle - promised

    def _admit(self, sequence: Sequence) -> None:
        """Start a sequence: match, ask the connector, allocate; in TensorRT-LLM's order."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        num_matched = self._match(sequence)
        block = sequence.chain.tokens_per_block
        sequence.slots = self.pool.acquire(sequence.chain.hashes[:num_matched])
        sequence.num_published_blocks = num_matched
        sequence.num_device_tokens = num_matched * block
        sequence.num_loaded_tokens = self._load(sequence) if self.limits.block_reuse else 0
        loaded_slots = self.pool.allocate(sequence.num_loaded_tokens // block)
        sequence.slots += loaded_slots
        self._loaded += loaded_slots
        sequence.num_computed = sequence.num_device_tokens + sequence.num_loaded_tokens
        sequence.num_launched = sequence.num_computed
        if not sequence.loads_only:
            self._grow(sequence, sequence.num_prompt_tokens)
        self._allocated(sequence)
        if sequence.loads_only:
            return
        self.num_reused_blocks += sequence.num_computed // block
        self.num_missed_blocks += (sequence.num_prompt_tokens - sequence.num_computed) // block

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        missing = sequence.num_blocks(num_tokens) - len(sequence.slots)
        if missing > 0:
            slots = self.pool.allocate(missing)
            sequence.slots += slots
            self._fresh += slots


def _has_untold_block(sequence: Sequence) -> bool:
    """Of a sequence that decodes: whether its last pass completed a block by an unknown token."""
    num_known = len(sequence.tokens)
    return (
        sequence.num_tokens == sequence.max_total_tokens
        and num_known > sequence.num_prompt_tokens
        and num_known % sequence.chain.tokens_per_block == 0
    )
