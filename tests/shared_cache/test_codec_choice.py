"""Compressing while the store is slower than a core, and no longer."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared_cache.media.local_medium import LocalMedium
from shared_cache.stores import codec_choice
from shared_cache.stores.codec_choice import REMEASURE_S, CodecChoice
from shared_cache.stores.compression import PLAIN, SHUFFLE_ZSTD
from shared_cache.stores.fs_store import open_store
from tests.shared_cache.fakes import NAMESPACE, FakeClock, chain_of, run_of
from tests.shared_cache.store_contract import payloads_of, read_all

MIB = 1 << 20


class Link:
    """A medium that takes `bytes_per_s`."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.choice = CodecChoice("auto", MIB, self.clock)
        self.bytes_per_s = 5e9

    def upload(self, num_bytes: int = MIB) -> str:
        codec = self.choice.choose()
        with self.choice.publishing() as done:
            self.clock.now_s += num_bytes / self.bytes_per_s
            done.num_bytes = num_bytes
        return codec

    def uploads(self, count: int) -> set[str]:
        return {self.upload() for _ in range(count)}


@pytest.fixture
def link() -> Link:
    return Link()


def test_a_fast_medium_is_spared_the_codec(link: Link) -> None:
    assert link.uploads(50) == {PLAIN}


def test_a_slow_medium_gets_compressed_blocks_once_that_is_certain(link: Link) -> None:
    link.bytes_per_s = 1e8
    assert [link.upload() for _ in range(5)] == [PLAIN, PLAIN, PLAIN, SHUFFLE_ZSTD, SHUFFLE_ZSTD]


def test_one_slow_upload_changes_nothing(link: Link) -> None:
    for _ in range(5):
        link.uploads(3)
        link.bytes_per_s = 1e7
        link.upload()
        link.bytes_per_s = 5e9
        assert link.uploads(3) == {PLAIN}


def test_it_is_measured_again_now_and_then(link: Link) -> None:
    link.bytes_per_s = 1e8
    link.uploads(4)
    link.bytes_per_s = 5e9
    codecs = []
    for _ in range(3):
        link.clock.now_s += REMEASURE_S
        codecs.append([link.upload() for _ in range(2)])
    assert codecs == [[PLAIN, SHUFFLE_ZSTD], [PLAIN, PLAIN], [PLAIN, PLAIN]]


def test_uploads_at_the_same_time_are_measured_together(link: Link) -> None:
    """Four streams of 0.3 GB/s each are a medium of 1.2 GB/s."""
    for _ in range(5):
        assert link.choice.choose() == PLAIN
        calls = [link.choice.publishing() for _ in range(4)]
        uploads = [call.__enter__() for call in calls]
        link.clock.now_s += MIB / 0.3e9
        for call, done in zip(calls, uploads, strict=True):
            done.num_bytes = MIB
            call.__exit__(None, None, None)


def test_an_upload_that_brings_nothing_counts_as_time_without_bytes(link: Link) -> None:
    for _ in range(3):
        with link.choice.publishing():
            link.clock.now_s += 1.0
        link.upload()
    assert link.upload() == SHUFFLE_ZSTD


def test_a_codec_that_is_set_stays(link: Link) -> None:
    link.bytes_per_s = 1e6
    for setting in (PLAIN, SHUFFLE_ZSTD):
        link.choice = CodecChoice(setting, MIB, link.clock)
        assert link.uploads(5) == {setting}


def test_a_store_compresses_for_a_slow_medium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, publish, lock = FakeClock(), LocalMedium.publish, threading.Lock()

    def slow(
        medium: LocalMedium, name: str, parts: Sequence[memoryview], *, replace: bool = False
    ) -> bool:
        with lock:
            clock.now_s += sum(part.nbytes for part in parts) / 1e8
        return publish(medium, name, parts, replace=replace)

    store = open_store(f"file://{tmp_path}", NAMESPACE, codec="auto")
    monkeypatch.setattr(store, "_codec", CodecChoice("auto", 1, clock))
    monkeypatch.setattr(LocalMedium, "publish", slow)
    monkeypatch.setattr(codec_choice.time, "monotonic", clock)
    chains = [chain_of(4, first_token=100 * number) for number in range(5)]
    for chain in chains:
        store.write(run_of(chain))
    codecs = []
    for chain in chains:
        (path,) = tmp_path.rglob(f"{chain.hashes[0].hex()}.arrow")
        codecs.append(SHUFFLE_ZSTD if b"shuffle-zstd" in path.read_bytes() else PLAIN)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert codecs == [PLAIN, PLAIN, PLAIN, SHUFFLE_ZSTD, SHUFFLE_ZSTD]
