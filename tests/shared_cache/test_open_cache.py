"""Opening: what is wrong with the store is said at start, with the fix in the text."""

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from shared_cache.config import CacheConfig
from shared_cache.errors import ConfigError, StoreUnavailableError
from shared_cache.namespace import Namespace
from shared_cache.staging import open_cache
from shared_cache.store import BlockStore
from tests.shared_cache.fakes import NAMESPACE, WAIT_S, ScriptedStore, chain_of, payload_of


@pytest.fixture
def opened_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., BlockStore]], None]:
    """Replaces the module that opens stores by one whose `open_store` is the given function."""

    def replace(open_store: Callable[..., BlockStore]) -> None:
        module = ModuleType("shared_cache.fs_store")
        module.open_store = open_store  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shared_cache.fs_store", module)

    return replace


def test_the_store_gets_the_url_the_namespace_and_its_options(opened_with) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def open_store(url: str, namespace: Namespace, options: dict[str, object]) -> BlockStore:
        calls.append((url, namespace, options))
        return ScriptedStore()

    opened_with(open_store)
    config = CacheConfig(store="s3://bucket", store_options={"key": 1}, host_bytes="1MiB")
    cache = open_cache(config, NAMESPACE)
    assert calls == [("s3://bucket", NAMESPACE, {"key": 1})]
    assert cache.stats().host.num_slots == 256
    cache.close()


def test_two_replicas_share_blocks_through_a_folder(tmp_path: Path) -> None:
    config = CacheConfig(store=f"file://{tmp_path}/cache", host_bytes="1MiB")
    writer, reader = open_cache(config, NAMESPACE), open_cache(config, NAMESPACE)
    chain = chain_of(20)
    slots = writer.reserve(20)
    for slot, block_hash in zip(slots, chain.hashes, strict=True):
        writer.host.buffer(slot)[:] = payload_of(block_hash)
    writer.save(slots, chain.parent_of(0), chain.hashes)
    assert writer.flush(WAIT_S)
    staged = reader.stage(chain.hashes, WAIT_S)
    assert staged.fetched == frozenset(range(20))
    for slot, block_hash in zip(staged.lease.slots, chain.hashes, strict=True):
        assert bytes(reader.host.buffer(slot)) == payload_of(block_hash)
    writer.close()
    reader.close()


def test_no_store_means_no_shared_tier() -> None:
    cache = open_cache(CacheConfig(host_bytes="1MiB"), NAMESPACE)
    assert cache.stage(chain_of(3).hashes).num_blocks == 0
    cache.close()


def test_a_store_that_hangs_at_start_is_an_error_that_says_so(opened_with) -> None:  # type: ignore[no-untyped-def]
    release = threading.Event()
    opened_with(lambda *_: release.wait() and ScriptedStore())
    config = CacheConfig(store="s3://far", store_timeout_s=0.05, host_bytes="1MiB")
    with pytest.raises(ConfigError, match=r"s3://far did not answer within 0\.05 s"):
        open_cache(config, NAMESPACE)
    release.set()


def test_a_store_that_cannot_be_reached_is_an_error_that_says_how_to_do_without(  # type: ignore[no-untyped-def]
    opened_with,
) -> None:
    def open_store(*_: object) -> BlockStore:
        raise StoreUnavailableError("connection refused")

    opened_with(open_store)
    with pytest.raises(ConfigError, match=r"connection refused.*cache\.store to null"):
        open_cache(CacheConfig(store="s3://b", host_bytes="1MiB"), NAMESPACE)


def test_a_read_only_store_is_used_with_a_warning(  # type: ignore[no-untyped-def]
    opened_with, caplog: pytest.LogCaptureFixture
) -> None:
    store = ScriptedStore()
    store.read_only = True
    opened_with(lambda *_: store)
    with caplog.at_level(logging.WARNING):
        open_cache(CacheConfig(store="s3://b", host_bytes="1MiB"), NAMESPACE).close()
    assert "may only be read" in caplog.text


def test_a_host_tier_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.host_bytes"):
        open_cache(CacheConfig(host_bytes=100), NAMESPACE)
