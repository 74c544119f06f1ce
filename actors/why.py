"""Why a request computed what could have been loaded: the verdict, in words. Pure.

Staging knows why it ended; what it cannot know is why nobody had a block. That follows from what
the replicas remember of the block, and from what else lies in the store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.request_log import RequestTrace
from shared_cache.fates import BlockState, Fate

WHY = {
    "complete": "everything was reused that can be: whole blocks, all but the last token",
    "not_stored": "nobody had computed this prefix before, as far as the replicas remember",
    "evicted": "the block was stored and is not there any more: evicted or deleted",
    "evicted_from_host": "the block was in memory only, and had to make room for others",
    "dropped_save": "the block was computed, but not saved: the save was dropped under pressure or "
    "refused by the store",
    "other_namespace": "the block is stored in another namespace, which this engine cannot read",
    "cost_gate": "computing the block was predicted to be sooner than loading it",
    "deadline": "the block did not arrive within cache.staging_deadline_s",
    "no_turn": "cache.staging_deadline_s passed while other requests were fetching",
    "unreadable": "the store named the block but gave no good one: corrupt, gone, or a fault",
    "no_room": "host memory was full of blocks in use",
    "tier_in_trouble": "no tier was asked after its earlier faults",
    "not_asked": "no tier could be asked: none is configured, or all are in trouble",
    "host_tier_away": "the owner of the machine's memory did not answer in time",
    "engine": "the engine did not take what was staged for it",
}
"""What each reason means."""


@dataclass(frozen=True, slots=True)
class KnownBlock:
    """What one replica knows of the first block that was not reused.

    `earlier` is an earlier request that had it there. Equal names in another `namespace` (its
    fingerprint) are other blocks.
    """

    replica: str
    namespace: str
    state: BlockState
    earlier: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which block broke a request's chain, and why; `details` are for a person."""

    reason: str
    broken_block: int | None
    details: tuple[str, ...]

    @property
    def text(self) -> str:
        """The reason in a sentence."""
        return WHY[self.reason]


def verdict(
    trace: RequestTrace, known: Sequence[KnownBlock], elsewhere: Sequence[str] = ()
) -> Verdict:
    """Why the first block that was computed was not loaded.

    `known` is what all replicas know of it now; `elsewhere` names the namespaces that hold it.
    """
    if trace.is_complete:
        return Verdict("complete", None, ())
    details = tuple(_told(one) for one in known if one.earlier or one.state.fate)
    reason = _reason(trace, known, elsewhere)
    if reason == "other_namespace":
        details += tuple(elsewhere)
    if reason == "unreadable":
        details += tuple(_faults(one) for one in known if one.replica == trace.replica)
    return Verdict(reason, trace.num_cached, details)


def _reason(trace: RequestTrace, known: Sequence[KnownBlock], elsewhere: Sequence[str]) -> str:
    if trace.num_cached < trace.staged:
        return "engine"
    if trace.missed not in (None, "not_stored"):
        return str(trace.missed)
    known = [one for one in known if one.namespace == trace.namespace]
    kinds = {fate.kind for one in known if (fate := _before(trace, one)) is not None}
    was_here = any(one.earlier is not None for one in known)
    if "dropped" in kinds or (was_here and not kinds):
        return "dropped_save"
    if "stored" in kinds:
        return "evicted"
    if "published" in kinds:
        return "evicted_from_host"
    return "other_namespace" if elsewhere else "not_stored"


def _before(trace: RequestTrace, one: KnownBlock) -> Fate | None:
    """What had become of the block at that replica before the request, which may have stored it."""
    if one.replica == trace.replica:
        return trace.fate
    fate = one.state.fate
    return fate if fate is not None and fate.at_s < trace.at_s else None


def _faults(one: KnownBlock) -> str:
    found = one.state.faults
    counts = f"{found.corrupt} corrupt, {found.foreign} foreign, {found.vanished} vanished"
    return f"at {one.replica}: {counts} objects so far"


def _told(one: KnownBlock) -> str:
    words = {
        "published": "put into memory",
        "stored": "stored",
        "dropped": "dropped on its way to the store",
    }
    fate = one.state.fate
    then = words[fate.kind] if fate is not None else "of unknown fate"
    when = f", had by request {one.earlier}" if one.earlier else ""
    return f"at {one.replica}: {then}{when}"
