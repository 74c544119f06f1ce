"""The records of an arena in memory: written by its owner, read by the next one.

header | namespaces | extent table | one record per slot, those of an extent together
"""

import mmap
from collections.abc import Iterator

from shared_cache.hashing import BlockHash
from shared_cache.host.extents import SLOT_ALIGNMENT_BYTES
from shared_cache.host.record_format import (
    FIRST_NAMESPACE_OFFSET,
    FREE,
    MAX_NAMESPACES,
    NAMESPACE_BYTES,
    RECORD_BYTES,
    STORED,
    STORED_OFFSET,
    Geometry,
    ReservedRecord,
    SlotRecord,
    UsedRecord,
    decode_extent,
    decode_namespace,
    decode_record,
    encode_extent,
    encode_namespace,
    peek_block,
)


class Records:
    """What lies in which slot. Slots must be those of an assigned extent."""

    def __init__(self, memory: mmap.mmap, geometry: Geometry) -> None:
        """Raises `DamagedRecordsError` for an extent table that no owner wrote."""
        self._memory = memory
        self._geometry = geometry
        table = geometry.extent_table_offset
        self._words = memoryview(memory)[table : table + 8 * geometry.num_extents].cast("Q")
        entries = [decode_extent(word) for word in self._words]
        self._slot_units = [entry[1] if entry else 1 for entry in entries]
        self._extent_units = geometry.extent_units
        self._first_offset = geometry.first_record_offset

    def namespaces(self) -> list[tuple[str, int]]:
        """Fingerprint and block bytes of the namespaces, by number.

        Ends before one that was not written to its end.
        """
        found: list[tuple[str, int]] = []
        while len(found) < MAX_NAMESPACES:
            start = FIRST_NAMESPACE_OFFSET + len(found) * NAMESPACE_BYTES
            entry = decode_namespace(self._memory[start : start + NAMESPACE_BYTES])
            if entry is None:
                break
            found.append(entry)
        return found

    def set_namespace(self, number: int, fingerprint: str, block_bytes: int) -> None:
        """Note a namespace; raises `ValueError` when there is no room for it."""
        if number >= MAX_NAMESPACES:
            raise ValueError(f"an arena has room for {MAX_NAMESPACES} namespaces")
        raw = encode_namespace(fingerprint, block_bytes)
        start = FIRST_NAMESPACE_OFFSET + number * NAMESPACE_BYTES
        self._memory[start : start + len(raw)] = raw

    def forget_namespace(self, number: int) -> None:
        """Take back what `set_namespace` noted."""
        start = FIRST_NAMESPACE_OFFSET + number * NAMESPACE_BYTES
        self._memory[start : start + NAMESPACE_BYTES] = bytes(NAMESPACE_BYTES)

    def extents(self) -> list[tuple[int, int] | None]:
        """Namespace and slot bytes of each extent; None for those that are nobody's."""
        entries = [decode_extent(word) for word in self._words]
        return [(entry[0], entry[1] * SLOT_ALIGNMENT_BYTES) if entry else None for entry in entries]

    def set_extent(self, extent: int, namespace: int, slot_bytes: int) -> None:
        """Note whose an extent is (`slot_bytes` 0: nobody's); its slots are free then."""
        slot_units = slot_bytes // SLOT_ALIGNMENT_BYTES
        if slot_units:
            start, end = self.span_of(extent, slot_units)
            self._memory[start:end] = bytes(end - start)
        self._slot_units[extent] = slot_units or 1
        self._words[extent] = encode_extent(namespace, slot_units) if slot_units else 0

    def span_of(self, extent: int, slot_units: int) -> tuple[int, int]:
        """Where the records of an extent with slots of `slot_units` begin and end."""
        units = self._geometry.extent_units
        start = self._geometry.record_offset(extent * units, slot_units)
        return start, start + units // slot_units * RECORD_BYTES

    def slots_of(self, extent: int) -> Iterator[int]:
        """The slots of an extent."""
        units, slot_units = self._geometry.extent_units, self._slot_units[extent]
        first = extent * units
        return iter(range(first, first + units // slot_units * slot_units, slot_units))

    def is_slot(self, slot: int) -> bool:
        """Whether a slot of an assigned extent begins here."""
        extent, inside = divmod(slot, self._geometry.extent_units)
        if not 0 <= extent < self._geometry.num_extents or not self._words[extent]:
            return False
        slot_units = self._slot_units[extent]
        return inside % slot_units == 0 and inside + slot_units <= self._geometry.extent_units

    def read(self, slot: int) -> SlotRecord | None:
        """What is known of a slot; None: it holds nothing."""
        start = self.offset(slot)
        return decode_record(self._memory[start : start + RECORD_BYTES], slot)

    def write(self, slot: int, record: UsedRecord | ReservedRecord) -> None:
        """Replace the record of a slot; `ValueError` for what has no room in one."""
        raw = record.encode(slot)
        start = self.offset(slot)
        self._memory[start : start + len(raw)] = raw

    def set_stored(self, slot: int) -> None:
        """The shared tier has the block of `slot`."""
        self._memory[self.offset(slot) + STORED_OFFSET] = STORED

    def set_free(self, slot: int) -> None:
        """`slot` holds nothing."""
        start = self.offset(slot)
        self._memory[start : start + RECORD_BYTES] = FREE

    def block_in(self, slot: int) -> tuple[int, BlockHash] | None:
        """Namespace and name of the block in a slot whose record is known to be whole."""
        start = self.offset(slot)
        return peek_block(self._memory[start : start + RECORD_BYTES])

    def offset(self, slot: int) -> int:
        """Where the record of a slot lies: `Geometry.record_offset`, without its arithmetic."""
        extent, inside = divmod(slot, self._extent_units)
        index = extent * self._extent_units + inside // self._slot_units[extent]
        return self._first_offset + index * RECORD_BYTES
