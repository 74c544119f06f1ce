"""10,000 random steps: whatever may happen, in any order, and never a wrong byte or an exception.

The oracle: a loaded byte is right, or the tokens were never promised. Every byte that a forward
pass reads is compared; in the end so is every block in host memory and store.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from shared_cache.connector.scheduler import MatchRule
from tests.trtllm_runtime.replica import STAGED_HERE, Setup
from tests.trtllm_runtime.rules import Rules
from tests.trtllm_runtime.site import Mood
from tests.trtllm_runtime.world import (
    LORA_IDS,
    NUM_STEMS,
    PICTURES,
    SALTS,
    STEM_TOKENS,
    UNHASHED,
    World,
)

WHICH = st.integers(0, 1)
WAIT_S = 0.05
"""How long a match waits at most; only a store that hangs makes it wait so long."""

setups = st.builds(
    Setup,
    rules=st.builds(
        Rules,
        num_blocks=st.sampled_from([16, 24, 48]),
        max_batch_size=st.sampled_from([2, 4]),
        max_num_tokens=st.sampled_from([12, 24, 200]),
        enable_chunked_prefill=st.just(True),
        overlap=st.booleans(),
        finish_rule=st.sampled_from(["P1", "P2"]),
        lags=st.booleans(),
        partial_reuse=st.booleans(),
        cuda_graphs=st.booleans(),
        newest_first=st.booleans(),
    ),
    match=st.sampled_from([STAGED_HERE, MatchRule(staged_ahead=False, wait_s=WAIT_S)]),
    num_slots=st.sampled_from([8, 24, 64]),
    deadline_s=st.just(WAIT_S),
    saves_per_turn=st.sampled_from([None, 0, 1]),
    is_squeezed=st.sampled_from([False, False, True]),
)


class Happenings(RuleBasedStateMachine):
    """Two replicas on one store, at one or two ranks each."""

    seen: ClassVar[Counter[str]] = Counter()
    world: World | None = None

    @initialize(setups=st.lists(setups, min_size=2, max_size=2), is_later=st.booleans())
    def start(self, setups: list[Setup], is_later: bool) -> None:
        later = [replace(one, rules=replace(one.rules, is_later=is_later)) for one in setups]
        self.world = World(later, self.tp_size)

    tp_size = 1

    @rule(
        replica=WHICH,
        cut=st.integers(1, STEM_TOKENS),
        tail=st.integers(0, 5),
        num_new=st.integers(1, 9),
        stem=st.integers(0, NUM_STEMS - 1),
        scope=st.tuples(
            *(st.integers(0, len(of) - 1) for of in (SALTS, LORA_IDS, PICTURES, UNHASHED))
        ),
        staged=st.booleans(),
        stops=st.booleans(),
    )
    def submit(
        self,
        replica: int,
        cut: int,
        tail: int,
        num_new: int,
        stem: int,
        scope: tuple[int, int, int, int],
        staged: bool,
        stops: bool,
    ) -> None:
        salt, lora, picture, unhashed = scope
        self._here.submit(
            replica,
            cut,
            tail,
            num_new,
            stem=stem,
            salt=salt,
            lora=lora,
            picture=picture,
            unhashed=unhashed,
            staged=staged,
            stops=stops,
        )

    @rule(replica=WHICH, cut=st.integers(20, STEM_TOKENS), num_turns=st.integers(1, 9))
    def serve_a_common_prefix(self, replica: int, cut: int, num_turns: int) -> None:
        self._here.submit(replica, cut)
        self._here.turns(replica, num_turns)

    @rule(replica=WHICH, which=st.integers(0, 50), num_new=st.integers(1, 6))
    def follow_up(self, replica: int, which: int, num_new: int) -> None:
        self._here.follow_up(replica, which, num_new)

    @rule(replica=WHICH, num_turns=st.integers(1, 6), is_patient=st.booleans())
    def turns(self, replica: int, num_turns: int, is_patient: bool) -> None:
        self._here.turns(replica, num_turns, is_patient=is_patient)

    @rule(replica=WHICH)
    def run_dry(self, replica: int) -> None:
        self._here.turns(replica, 1000)

    @rule(replica=WHICH, which=st.integers(0, 7))
    def cancel(self, replica: int, which: int) -> None:
        self._here.cancel(replica, which)

    @rule(replica=WHICH, stem=st.integers(0, NUM_STEMS - 1))
    def leave_amid_prefill(self, replica: int, stem: int) -> None:
        self._here.leave_amid_prefill(replica, stem)

    @rule(replica=WHICH, num_tokens=st.integers(1, 9))
    def submit_dummy(self, replica: int, num_tokens: int) -> None:
        self._here.submit_dummy(replica, num_tokens)

    @rule(replica=WHICH)
    def evict_device(self, replica: int) -> None:
        self._here.evict_device(replica)

    @rule(replica=WHICH)
    def evict_host(self, replica: int) -> None:
        self._here.evict_host(replica)

    @rule(mood=st.sampled_from(Mood))
    def change_weather(self, mood: Mood) -> None:
        self._here.change_weather(mood)

    @rule(
        replica=WHICH, what=st.sampled_from(["restart", "fail", "lose"]), chance=st.integers(0, 4)
    )
    def disaster(self, replica: int, what: str, chance: int) -> None:
        if chance == 0:
            {
                "restart": lambda: self._here.restart(replica),
                "fail": lambda: self._here.fail_pass(replica),
                "lose": self._here.lose_stored_blocks,
            }[what]()

    @invariant()
    def count(self) -> None:
        if self.world is not None:
            type(self).seen["steps"] += 1

    def teardown(self) -> None:
        if self.world is not None:
            self.world.close()
            type(self).seen.update(self.world.seen)

    @property
    def _here(self) -> World:
        assert self.world is not None
        return self.world


class HappeningsOnTwoRanks(Happenings):
    seen: ClassVar[Counter[str]] = Counter()
    tp_size = 2


EXAMPLES = settings(
    max_examples=20,
    stateful_step_count=100,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # making an example smaller takes longer than a test may
    suppress_health_check=list(HealthCheck),
)


def run(machine: type[Happenings], num_steps: int) -> None:
    """Examples until there were so many steps; then see that something happened in them.

    A run in which nothing is loaded or nothing goes wrong would prove nothing.
    """
    seen = machine.seen
    while seen["steps"] < num_steps:
        # Threads take their time, so the same beginning need not end the same: that is no failure.
        with suppress(FlakyStrategyDefinition):
            run_state_machine_as_test(machine, settings=EXAMPLES)
    assert seen["loaded tokens"] > num_steps // 10, seen
    needed = ("restarts", "cancelled", "failed passes", "poisoned passes")
    for what in (*needed, *(f"weather {m.name}" for m in Mood)):
        assert seen[what] > 0, seen


def test_random_steps_on_one_rank() -> None:
    run(Happenings, 6_000)


def test_random_steps_on_two_ranks() -> None:
    run(HappeningsOnTwoRanks, 4_000)
