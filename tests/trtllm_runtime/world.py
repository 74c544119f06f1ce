"""Replicas that share stores, and all that can happen to them: one method for each.

Whoever drives it need not check anything: a wrong byte, an exception in a callback, a block that is
held by nobody or a lease that nobody ends fails by itself.
"""

from collections import Counter
from contextlib import suppress
from itertools import count

from tests.shared_cache.fakes import await_published
from tests.trtllm_runtime.replica import Replica, Setup
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.site import Mood, Site

SALTS = (None, "tenant-a", "tenant-b")
LORA_IDS = (None, 0, 1)
PICTURES = (None, None, ((1, 2),), ((3, 4),))
MEDIA_AT, MEDIA_TOKEN = 9, 40_000
UNHASHED = (None, None, (MEDIA_AT, "cat"), (MEDIA_AT, "dog"))
"""Media of which no C++ attribute tells. Their place is taken by a token that no text has."""
NUM_STEMS, STEM_TOKENS = 4, 44


class World:
    """Some replicas on one site; `seen` counts what came to pass."""

    def __init__(self, setups: list[Setup], tp_size: int = 1) -> None:
        self.site = Site(tp_size, is_later=setups[0].rules.is_later)
        self.replicas = [Replica(self.site, setup) for setup in setups]
        self.seen: Counter[str] = Counter()
        self._ids = count(1)
        self._requests: list[Request] = []

    def submit(
        self,
        replica: int,
        cut: int,
        tail: int = 0,
        num_new: int = 1,
        *,
        stem: int = 0,
        salt: int = 0,
        lora: int = 0,
        picture: int = 0,
        unhashed: int = 0,
        staged: bool = False,
        stops: bool = False,
    ) -> Request | None:
        """A prompt that begins like others and may end on its own; None if it is refused."""
        tokens = [1000 * stem + index for index in range(cut)] + [7 + tail] * tail
        media = UNHASHED[unhashed % len(UNHASHED)] if cut > MEDIA_AT else None
        if media is not None:
            tokens[MEDIA_AT] = MEDIA_TOKEN
        request = Request(
            next(self._ids),
            tuple(tokens),
            num_new,
            cache_salt=SALTS[salt % len(SALTS)],
            lora_task_id=LORA_IDS[lora % len(LORA_IDS)],
            multimodal_hashes=PICTURES[picture % len(PICTURES)],
            unhashed_media=media,
        )
        if stops:
            self._stop_early(request, num_new // 2)
        one = self.replicas[replica]
        with suppress(ValueError):
            (one.submit_staged if staged else one.submit)(request)
            self._requests.append(request)
            return request
        return None

    def follow_up(self, replica: int, which: int, num_new: int) -> None:
        """The next turn of a conversation: an earlier prompt, its answer, and more."""
        if not self._requests:
            return
        earlier = self._requests[which % len(self._requests)]
        tokens = (*earlier.tokens[:STEM_TOKENS], 3, 4, 5)
        request = Request(
            next(self._ids),
            tokens,
            num_new,
            cache_salt=earlier.cache_salt,
            unhashed_media=earlier.unhashed_media,
        )
        with suppress(ValueError):
            self.replicas[replica].submit(request)

    def leave_amid_prefill(self, replica: int, stem: int) -> None:
        """Somebody goes before a long prompt is computed; the next one finds what that left."""
        request = self.submit(replica, STEM_TOKENS - 3, stem=stem)
        self.turns(replica, 1)
        if request is not None and not request.is_finished:
            self.replicas[replica].executor.cancel(request.request_id)
        self.turns(replica, 2)
        self.submit(replica, STEM_TOKENS, 5, stem=stem)

    def submit_dummy(self, replica: int, num_tokens: int) -> None:
        """A request of the runtime's own, for warm-up or padding; no match is asked for it."""
        dummy = Request(2**40 + next(self._ids), (1,) * num_tokens, 2, is_dummy=True)
        self.replicas[replica].executor.submit(dummy)

    def cancel(self, replica: int, which: int) -> None:
        """Somebody goes away."""
        active = self.replicas[replica].executor.active
        if active:
            self.seen["cancelled"] += 1
            self.replicas[replica].executor.cancel(active[which % len(active)].request_id)

    def turns(self, replica: int, num_turns: int, *, is_patient: bool = True) -> None:
        """Let a loop run; a patient one waits each time until its saves are published."""
        one = self.replicas[replica]
        for _ in range(num_turns):
            before = len(one.executor.manager.log)
            if not one.step():
                break
            self.seen["turns"] += 1
            self.seen["poisoned passes"] += one.executor.num_poisoned_passes
            one.executor.num_poisoned_passes = 0
            for name, answer in one.executor.manager.log[before:]:
                if name == "get_num_new_matched_tokens":
                    self.seen["matches"] += 1
                    self.seen["loaded tokens"] += answer[0]
            if is_patient and not one.setup.rules.lags:
                for cache in one.caches:
                    await_published(cache)
        self.check()

    def fail_pass(self, replica: int) -> None:
        """The next forward pass raises."""
        self.replicas[replica].executor.fails_next_pass = True
        self.seen["failed passes"] += 1

    def evict_device(self, replica: int) -> None:
        """The device forgets all blocks that nobody uses."""
        self.replicas[replica].executor.blocks.evict_all()

    def evict_host(self, replica: int) -> None:
        """Something else needs all of the host tier for a moment."""
        self.replicas[replica].squeeze_host()

    def change_weather(self, mood: Mood) -> None:
        """The store of all gets another mood; a fine one is tried again at once."""
        self.site.weather.change(mood)
        self.site.clock.now_s += 3600.0
        self.seen[f"weather {mood.name}"] += 1

    def lose_stored_blocks(self) -> None:
        """Every other stored block is gone."""
        self.site.lose_blocks(keep_every=2)

    def restart(self, replica: int) -> None:
        """An engine goes down in the middle of everything, and a new one comes up."""
        self.site.weather.change(Mood.FINE)
        old = self.replicas[replica]
        old.close()
        self.replicas[replica] = Replica(self.site, old.setup)
        self.seen["restarts"] += 1

    def check(self) -> None:
        """What must hold at any time."""
        for replica in self.replicas:
            replica.check_books()

    def close(self) -> None:
        """Everything comes to its end, and every block that is left anywhere is right."""
        self.change_weather(Mood.FINE)
        for replica in self.replicas:
            replica.check_quiet()
            for request in replica.requests[-10:]:
                replica.num_in_host(request)
        self.site.check()
        for replica in self.replicas:
            replica.close()

    def _stop_early(self, request: Request, after: int) -> None:
        """Make a token of its answer its end."""
        rehearsal = Request(
            0,
            request.prompt,
            cache_salt=request.cache_salt,
            lora_task_id=request.lora_task_id,
            multimodal_hashes=request.multimodal_hashes,
            unhashed_media=request.unhashed_media,
        )
        for _ in range(after + 1):
            rehearsal.sample()
        request.end_token = rehearsal.tokens[-1]
