"""Objects that were not what they should be: each is a miss, and must not be a silent one."""

import logging
from dataclasses import dataclass

from shared_cache.errors import StoreError
from shared_cache.faults import FaultLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreFaults:
    """How often an object was not what it should be; every one of them was a miss."""

    corrupt: int
    foreign: int
    vanished: int


class FaultCounts:
    """Counts and, seldom, logs the faults of one store; thread-safe."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._logs = {fault: FaultLog(logger) for fault in StoreFaults.__slots__}

    @property
    def counts(self) -> StoreFaults:
        """Counts since the store was opened."""
        return StoreFaults(**{fault: log.num_faults for fault, log in self._logs.items()})

    def count(self, fault: str, name: str, why: object) -> None:
        """Note what is wrong with an object; one that cannot be removed is met again and again."""
        self._logs[fault].record(f"{fault} object {name} in {self._url}, a miss", StoreError(why))
