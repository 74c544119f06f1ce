"""Which codec the next object is written with; `auto` goes by how fast the medium takes bytes.

One core compresses at about `WORTH_BELOW_BYTES_PER_S`. A faster medium would wait for the codec, a
slower one is spared a third of the bytes. Failure prevented: judging a medium by one upload. What
counts is the bytes of all uploads at the same time, over several megabytes, and the middle one of
the last measurements. A slow medium is measured again now and then, with plain objects, so that
compressing, which takes cores from copying, does not spoil the result.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from shared_cache.stores.compression import (
    PLAIN,
    SHUFFLE_ZSTD,
    CodecName,
    CodecSetting,
    can_compress,
)

WORTH_BELOW_BYTES_PER_S = 0.6e9

SAMPLE_BYTES = 16 << 20
NUM_SAMPLES = 3

REMEASURE_S = 60.0
"""A slow medium is measured again when the last measurement is older."""


@dataclass(slots=True)
class Published:
    """What one upload brought; nothing if it failed or was not needed."""

    num_bytes: int = 0


class CodecChoice:
    """The codec of one store; thread-safe."""

    def __init__(
        self,
        setting: CodecSetting,
        sample_bytes: int = SAMPLE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed: CodecName | None = None
        if setting != "auto":
            self._fixed = setting
        elif not can_compress():
            self._fixed = PLAIN
        self._sample_bytes = sample_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._speeds: deque[float] = deque(maxlen=NUM_SAMPLES)
        self._measured_s = 0.0
        self._is_measuring = True
        self._num_running = self._num_bytes = 0
        self._busy_s = self._since_s = 0.0

    def choose(self) -> CodecName:
        """The codec to encode the next object with."""
        if self._fixed is not None:
            return self._fixed
        with self._lock:
            now_s = self._clock()
            if not self._is_measuring and now_s - self._measured_s >= REMEASURE_S:
                self._is_measuring = True
                self._begin_sample(now_s)
            return PLAIN if self._is_measuring else SHUFFLE_ZSTD

    @contextmanager
    def publishing(self) -> Iterator[Published]:
        """Meter an upload; its bytes are to be noted in what is yielded."""
        done = Published()
        with self._lock:
            if not self._num_running:
                self._since_s = self._clock()
            self._num_running += 1
        try:
            yield done
        finally:
            with self._lock:
                self._ended(done.num_bytes, self._clock())

    def _ended(self, num_bytes: int, now_s: float) -> None:
        self._num_running -= 1
        self._num_bytes += num_bytes
        self._busy_s += now_s - self._since_s
        self._since_s = now_s
        if self._is_measuring and self._num_bytes >= self._sample_bytes and self._busy_s > 0:
            self._speeds.append(self._num_bytes / self._busy_s)
            self._measured_s = now_s
            is_known = len(self._speeds) == NUM_SAMPLES
            self._is_measuring = not (is_known and median(self._speeds) < WORTH_BELOW_BYTES_PER_S)
            self._begin_sample(now_s)

    def _begin_sample(self, now_s: float) -> None:
        self._num_bytes, self._busy_s, self._since_s = 0, 0.0, now_s
