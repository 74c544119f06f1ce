"""Scheduling with numbers alone: any order of arrivals, turns, endings."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.engines.torch.ngram import PromptLookup
from actors.engines.torch.scheduled import Scheduled, Turn, verified
from actors.engines.torch.scheduler import Limits, Scheduler
from actors.engines.torch.sequence import Sequence
from actors.engines.torch.slots import SlotPool
from shared_cache.hashing import BlockHashChain

BLOCK = 4
LIMITS = Limits(max_batch_size=3, max_num_tokens=10, max_draft_len=3, max_turn_drafts=5)


def sequence(
    prompt: list[int], num_new: int = 4, request_id: int = 1, *, drafts: bool = True
) -> Sequence:
    return Sequence(
        request_id=request_id,
        tokens=list(prompt),
        chain=BlockHashChain(BLOCK, tokens=prompt),
        max_total_tokens=len(prompt) + num_new,
        lookup=PromptLookup(2, prompt) if drafts else None,
    )


def scheduler(num_slots: int = 16, limits: Limits = LIMITS, **hooks: object) -> Scheduler:
    return Scheduler(SlotPool(num_slots), limits, **hooks)


def play(scheduler: Scheduler, token: int = 9) -> Turn:
    """One turn in which the model chooses `token` everywhere."""
    turn = scheduler.decide()
    for item in turn.items:
        scheduler.launched(item)
        chosen = [token] * (1 + len(item.drafts)) if item.samples else []
        new = verified(item.drafts, chosen)
        room = item.sequence.max_total_tokens - len(item.sequence.tokens)
        scheduler.advance(item, new[:room])
        if len(item.sequence.tokens) == item.sequence.max_total_tokens:
            scheduler.pool.release(scheduler.drop(item.sequence))
    return turn


def fed(turn: Turn) -> list[tuple[int, int, int]]:
    """(request, start, tokens) of each item."""
    return [(i.sequence.request_id, i.start, i.num_tokens) for i in turn.items]


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests over a small alphabet, so that prefixes and drafts really are shared.

    `ahead`: each turn is decided before it is known what the one before it chose.
    """

    ahead = False

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SlotPool(12), LIMITS, load=self.load)
        self.sequences: dict[int, Sequence] = {}
        self.loadable = 0
        self.running: tuple[Scheduled, ...] = ()
        self.told: dict[int, int] = {}

    def load(self, sequence: Sequence) -> int:
        on_device = sequence.num_device_tokens // BLOCK
        return min(self.loadable, sequence.num_reusable_blocks - on_device) * BLOCK

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=30), num_new=st.integers(1, 9))
    def add(self, prompt: list[int], num_new: int) -> None:
        new = sequence(prompt, num_new, len(self.sequences) + 1, drafts=not self.ahead)
        self.sequences[new.request_id] = new
        self.scheduler.add(new)

    @rule(blocks=st.integers(0, 3))
    def connector_has(self, blocks: int) -> None:
        self.loadable = blocks

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        turn = self.scheduler.decide()
        assert turn.items or self.running, "requests wait, nothing keeps them from running"
        assert sum(item.num_fed for item in turn.items) <= LIMITS.max_num_tokens
        assert len({item.sequence for item in turn.items}) == len(turn.items)
        for item in turn.items:
            self.check(item)
            self.scheduler.launched(item)
        for ending in turn.ending:
            assert self.told[ending.request_id] <= ending.num_launched
            self.told[ending.request_id] = ending.num_launched
        done, self.running = (self.running, turn.items) if self.ahead else (turn.items, ())
        for item in done:
            if item.sequence in self.scheduler.running:  # it may have been aborted meanwhile
                self.advance(item, data)

    def check(self, item: Scheduled) -> None:
        current = item.sequence
        assert item.num_tokens >= 1
        assert item.start == current.num_launched
        assert item.end <= current.num_tokens
        assert item.end < current.max_total_tokens
        assert current.num_unknown <= self.ahead
        known = item.end - current.num_unknown
        self.told[current.request_id] = max(known, self.told.get(current.request_id, 0))
        assert item.start + item.num_fed < current.max_total_tokens or not item.drafts
        assert item.start + item.num_fed <= len(current.slots) * BLOCK
        assert item.samples or item.end % BLOCK == 0 or item.num_tokens < BLOCK

    def advance(self, item: Scheduled, data: st.DataObject) -> None:
        new: list[int] = []
        if item.samples:
            size = 1 + len(item.drafts)
            draw = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
            new = verified(item.drafts, draw)
        self.scheduler.advance(item, new)
        current = item.sequence
        if len(current.tokens) >= current.max_total_tokens:
            blocks = (current.num_computed // BLOCK, self.told[current.request_id] // BLOCK)
            self.end(current)
            assert blocks[0] == blocks[1] or not self.ahead, "a connector never heard of a block"

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.active())))

    def end(self, ended: Sequence) -> None:
        self.scheduler.pool.release(self.scheduler.drop(ended))

    def active(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @invariant()
    def slots_are_those_of_running_requests(self) -> None:
        running = self.scheduler.running
        used = {slot for s in running for slot in s.slots}
        assert self.scheduler.pool.num_referenced == len(used)
        assert not any(s.slots for s in self.scheduler.waiting)
        assert len(running) <= LIMITS.max_batch_size

    @invariant()
    def slots_are_shared_only_between_equal_prefixes(self) -> None:
        owner: dict[int, tuple[int, ...]] = {}
        for current in self.scheduler.running:
            for index, slot in enumerate(current.slots):
                prefix = tuple(current.tokens[: (index + 1) * BLOCK])
                assert owner.setdefault(slot, prefix) == prefix

    @invariant()
    def every_running_request_can_finish(self) -> None:
        wanted = [s.num_blocks(s.max_total_tokens) - len(s.slots) for s in self.scheduler.running]
        assert sum(wanted) <= self.scheduler.pool.num_available

    @invariant()
    def only_what_is_verified_counts_as_computed(self) -> None:
        for current in self.scheduler.running:
            assert current.num_computed < len(current.tokens)
            assert current.num_published_blocks * BLOCK <= current.num_computed
            assert current.chain.num_tokens == len(current.tokens)
            assert current.num_unlaunched == 1 or not current.is_decoding


class AheadMachine(SchedulerMachine):
    ahead = True


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
SchedulerMachine.TestCase.settings = AheadMachine.TestCase.settings = SETTINGS
TestScheduler = SchedulerMachine.TestCase
TestSchedulerAhead = AheadMachine.TestCase


def test_prefill_goes_in_chunks_that_end_with_a_block() -> None:
    subject = scheduler()
    subject.add(sequence(list(range(21))))
    assert [fed(play(subject)) for _ in range(4)] == [
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(1, 16, 5)],
        [(1, 21, 1)],
    ]


def test_decoding_comes_first_and_prefill_takes_the_rest() -> None:
    subject = scheduler()
    subject.add(sequence([1, 2, 3]))
    play(subject)
    subject.add(sequence(list(range(20)), request_id=2))
    assert fed(play(subject)) == [(1, 3, 1), (2, 0, 8)]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    subject = scheduler(num_slots=32)
    prompt = list(range(17))
    subject.add(sequence(prompt))
    subject.add(sequence(prompt, request_id=2))
    subject.add(sequence([7, 7, 7], request_id=3))  # nobody computes this one: it need not wait
    assert fed(play(subject)) == [(1, 0, 8), (3, 0, 2)]
    turns = [play(subject) for _ in range(3)]
    second = [item for turn in turns for item in fed(turn) if item[0] == 2]
    assert second[0] == (2, 16, 1)
    assert subject.num_reused_blocks == 4


def test_the_wait_ends_when_the_other_one_is_aborted() -> None:
    subject = scheduler()
    first = sequence(list(range(17)))
    subject.add(first)
    subject.add(sequence(list(range(17)), request_id=2))
    play(subject)
    subject.pool.release(subject.drop(first))
    assert fed(play(subject)) == [(2, 8, 9)]


def test_without_block_reuse_nothing_is_matched_loaded_or_waited_for() -> None:
    limits = Limits(max_batch_size=4, max_num_tokens=40, block_reuse=False)
    subject = scheduler(limits=limits, load=lambda sequence: pytest.fail("asked"))
    for request_id in (1, 2):
        subject.add(sequence(list(range(9)), request_id=request_id))
    assert fed(play(subject)) == [(1, 0, 9), (2, 0, 9)]
    assert subject.num_reused_blocks == 0


def test_a_request_that_finds_no_room_waits_and_is_not_overtaken() -> None:
    subject = scheduler(num_slots=5)
    subject.add(sequence(list(range(12)), num_new=4))
    subject.add(sequence(list(range(50, 58)), num_new=2, request_id=2))
    subject.add(sequence([90], num_new=1, request_id=3))
    admitted = []
    while subject.running or subject.waiting:
        admitted += [item.sequence.request_id for item in play(subject).items]
    assert sorted(set(admitted), key=admitted.index) == [1, 2, 3]


def test_drafts_share_what_a_turn_verifies_cheaply() -> None:
    subject = scheduler(num_slots=32)
    for request_id in (1, 2):
        subject.add(sequence([9, 9, request_id, 9, 9], num_new=20, request_id=request_id))
    play(subject)
    drafts = [len(item.drafts) for item in play(subject).items]
    assert drafts == [2, 2]  # five for both


def test_the_admission_hooks_are_called_in_order_with_slots_for_the_prompt() -> None:
    calls: list[tuple[str, int, int]] = []

    def load(admitted: Sequence) -> int:
        calls.append(("load", admitted.num_device_tokens, len(admitted.slots)))
        return BLOCK

    def allocated(admitted: Sequence) -> None:
        calls.append(("allocated", admitted.num_computed, len(admitted.slots)))

    subject = scheduler(load=load, allocated=allocated)
    subject.add(sequence(list(range(10))))
    assert fed(play(subject)) == [(1, 4, 6)]
    assert calls == [("load", 0, 0), ("allocated", 4, 3)]
    assert (subject.num_reused_blocks, subject.num_missed_blocks) == (1, 1)


@pytest.mark.parametrize(
    ("drafts", "chosen", "certain"),
    [
        ((), [5], [5]),
        ((1, 2), [1, 2, 3], [1, 2, 3]),
        ((1, 2), [1, 9, 3], [1, 9]),
        ((1, 2), [9, 2, 3], [9]),
        ((1, 2), [9], [9]),
    ],
)
def test_drafts_count_up_to_the_first_wrong_one(
    drafts: tuple[int, ...], chosen: list[int], certain: list[int]
) -> None:
    assert verified(drafts, chosen) == certain


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="never fit"):
        scheduler(num_slots=2).add(sequence(list(range(12))))


def test_what_only_loads_keeps_nobody_waiting_for_room() -> None:
    """Its request still waits for a tier, the ones behind it are ready."""
    subject = scheduler(num_slots=12)
    subject.add(sequence([1, 2, 3], num_new=33))
    play(subject)
    ahead, ready = sequence(list(range(17)), 0, 2), sequence([4, 5, 6], 1, 3)
    ahead.loads_only = True
    subject.add(ahead)
    subject.add(ready)
    assert [request_id for request_id, _, _ in fed(play(subject))] == [1, 3]
    assert list(subject.waiting) == [ahead]
