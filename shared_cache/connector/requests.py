"""One request as the connector has to know it: what was promised to it, and how far it is saved.

The engine tells of a request turn by turn, in differences. What makes no sense is an error here, so
that no block is ever named by the tokens of another request. It touches no bytes and no engine.
"""

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shared_cache.connector.save_runs import SaveRun
from shared_cache.hashing import BlockHashChain
from shared_cache.staged import StagedPrefix


class ReportedRequest(Protocol):
    """What the engine tells of one request in one turn (`RequestData`)."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request was matched by: its tokens, their chain, and who pays for its blocks."""

    tokens: Sequence[int]
    chain: BlockHashChain
    tenant: bytes = b""


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """Leased blocks, from the first one on, and the device blocks that they are promised to."""

    lease: StagedPrefix
    device_blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ground:
    """A request whose prompt another one's device prefix goes into, and when it was seen last.

    `is_launched`: only as far as that turn's forward pass computes it, should the pass go well.
    """

    request_id: int
    seen_turn: int
    is_launched: bool


@dataclass(slots=True)
class TrackedRequest:
    """What the device had of one request, what we promised beyond it, and how far it is saved.

    `prompt` is kept until the first report, which has to repeat it. `lease` covers the promised
    blocks, first slot first, until the turn that loads them; `allocated` are the device blocks they
    go to. While `is_loading` these are on their way, ahead of any report. Blocks before `next_save`
    are saved, or need not be; those from there to `num_valid` wait for it; unless `is_saved` is
    False, as token ids do not say what they hold. Blocks before `num_valid` hold their KV after the
    pass of turn `seen_turn`, those before `num_proven` did so before it. `rests_on` are the
    requests whose blocks the device's prefix may be.
    """

    prompt: Prompt | None
    chain: BlockHashChain
    tenant: bytes
    num_prompt_tokens: int
    num_device_tokens: int
    num_promised_tokens: int
    lease: StagedPrefix | None
    next_save: int
    num_valid: int
    num_proven: int
    seen_turn: int
    seen_s: float
    allocated: Sequence[int] = ()
    is_loading: bool = False
    is_reported: bool = False
    is_saved: bool = True
    rests_on: Sequence["Ground"] = ()
    block_ids: list[int] = field(default_factory=list)

    @classmethod
    def matched(
        cls,
        prompt: Prompt,
        num_device_tokens: int,
        lease: StagedPrefix,
        seen_turn: int,
        seen_s: float,
    ) -> "TrackedRequest":
        """A request of which the device and `lease` have a prefix; see `RequestLedger.matched`.

        It has no lease where nothing is promised; then `lease` stays the caller's.
        """
        chain = prompt.chain
        size = chain.tokens_per_block
        host_end = num_device_tokens // size + lease.num_blocks
        promised = _num_promised(chain, num_device_tokens, host_end)
        num_valid = (num_device_tokens + promised) // size
        return cls(
            prompt=prompt,
            chain=chain,
            tenant=prompt.tenant,
            num_prompt_tokens=chain.num_tokens,
            num_device_tokens=num_device_tokens,
            num_promised_tokens=promised,
            lease=lease if promised else None,
            # An unaligned device match leaves a block whose head was reused and whose tail is
            # computed now. It is valid as a whole after this pass and saved: a hole would orphan
            # what follows.
            next_save=max(num_valid, host_end),
            num_valid=num_valid,
            num_proven=num_valid,
            seen_turn=seen_turn,
            seen_s=seen_s,
        )

    @property
    def num_unsaved(self) -> int:
        """Blocks that could be saved and are not."""
        return max(0, self.num_valid - self.next_save) if self.is_saved else 0

    @property
    def num_prompt_blocks(self) -> int:
        """Full blocks of the prompt."""
        return self.num_prompt_tokens // self.chain.tokens_per_block

    def uncomputed_from(self, proven_turns: Container[int]) -> int | None:
        """The first prompt block that an engine may keep though it was not computed, if any.

        `proven_turns` are those whose forward pass went well. What follows the prompt is kept only
        as far as it was computed.
        """
        start = self.num_valid if self.seen_turn in proven_turns else self.num_proven
        if self.lease is not None or self.is_loading:  # nothing was loaded, or not all
            start = self.num_device_tokens // self.chain.tokens_per_block
        return (
            start if start < (self.num_prompt_tokens - 1) // self.chain.tokens_per_block else None
        )

    def planned_load(
        self, lease: StagedPrefix, report: ReportedRequest, *, is_new: bool
    ) -> PlannedLoad:
        """What `lease` was promised for, given the first report; the lease is the caller's now.

        Raises `ValueError` when it is not known which device blocks that is, or the report is not
        about the prompt that it was promised to.
        """
        if is_new:
            self.check_prompt(report)
        known = (self.allocated, report.new_block_ids if is_new else ())
        return self._planned(report.request_id, lease, known)

    def planned_ahead(self, request_id: int, lease: StagedPrefix) -> PlannedLoad:
        """The same before any report, of the blocks that were allocated."""
        load = self._planned(request_id, lease, (self.allocated,))
        self.is_loading = True
        return load

    def _planned(
        self, request_id: int, lease: StagedPrefix, known: Sequence[Sequence[int]]
    ) -> PlannedLoad:
        size = self.chain.tokens_per_block
        num_loaded_tokens = self.num_device_tokens + self.num_promised_tokens
        blocks = range(self.num_device_tokens // size, num_loaded_tokens // size)
        block_ids = next((ids for ids in known if len(ids) >= blocks.stop), None)
        if block_ids is None:
            raise ValueError(
                f"request {request_id}: {blocks.stop} blocks of prefix are promised, the engine "
                f"allocated {max(map(len, known))}"
            )
        self.lease, self.allocated = None, ()
        return PlannedLoad(lease, block_ids[blocks.start : blocks.stop])

    def note(self, report: ReportedRequest, *, is_new: bool) -> None:
        """Take over what one turn's report says.

        Raises `ValueError` when it is not about the prompt that was matched: another request has
        come by the id, and its blocks must not be named by that prompt.
        """
        self.check_prompt(report)
        self.is_reported = True
        self.block_ids += report.new_block_ids
        num_known_tokens = self.chain.num_tokens if is_new else 0
        self.chain.extend(report.new_tokens[num_known_tokens:])
        num_valid_tokens = self._num_valid_before(report, is_new) + report.num_scheduled_tokens
        num_valid_blocks = num_valid_tokens // self.chain.tokens_per_block
        num_valid = min(num_valid_blocks, len(self.chain.hashes), len(self.block_ids))
        self.num_proven = self.num_valid
        self.num_valid = max(self.num_valid, num_valid)

    def check_prompt(self, report: ReportedRequest) -> None:
        """Raise `ValueError` unless the first report repeats the prompt; later ones may not."""
        prompt, self.prompt = self.prompt, None
        if prompt is None:
            return
        if list(report.new_tokens[: len(prompt.tokens)]) != list(prompt.tokens):
            raise ValueError(
                f"request {report.request_id} is reported with other tokens than it was matched by"
            )

    def take_save(self, stop: int) -> SaveRun | None:
        """The blocks before `stop` that are not saved yet; from now on they count as saved."""
        start = self.next_save
        if stop <= start or not self.is_saved:
            return None
        self.next_save = stop
        return SaveRun(
            parent=self.chain.parent_of(start),
            packed_hashes=b"".join(self.chain.hashes[start:stop]),
            packed_blocks=array("I", self.block_ids[start:stop]).tobytes(),
            tenant=self.tenant,
            first=start,
        )

    def _num_valid_before(self, report: ReportedRequest, is_new: bool) -> int:
        """Tokens whose KV is valid before this turn's forward pass.

        The first report's `computed_position` leaves out what we load, so our own figures count.
        """
        if is_new:
            return self.num_device_tokens + self.num_promised_tokens
        return report.computed_position


def _num_promised(chain: BlockHashChain, num_device_tokens: int, host_end: int) -> int:
    """Tokens of whole blocks before `host_end`, behind whole ones, that leave one to compute."""
    size = chain.tokens_per_block
    if num_device_tokens % size:
        return 0
    most = min(host_end, (chain.num_tokens - 1) // size) * size
    return max(0, most - num_device_tokens)
