"""Opening: what is wrong with the store is said at start, with the fix in the text."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from shared_cache.config import CacheConfig, HostConfig
from shared_cache.errors import ConfigError, StoreUnavailableError
from shared_cache.namespace import Namespace
from shared_cache.opening import open_cache
from shared_cache.stores.fs_store import FsBlockStore, open_store
from shared_cache.stores.store import BlockStore
from tests.shared_cache.fakes import (
    NAMESPACE,
    WAIT_S,
    ScriptedStore,
    chain_of,
    payload_of,
    run_of,
    save_blocks,
)

HOST = {"scope": "process", "bytes": "1MiB"}


@pytest.fixture
def opened_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., BlockStore]], None]:
    """Replaces the module that opens stores by one whose `open_store` is the given function."""

    def replace(open_store: Callable[..., BlockStore]) -> None:
        module = ModuleType("shared_cache.stores.fs_store")
        module.open_store = open_store  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shared_cache.stores.fs_store", module)

    return replace


def test_the_store_gets_the_url_the_namespace_and_its_options(opened_with) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def open_store(url: str, namespace: Namespace, *args: object, **settings: object) -> BlockStore:
        calls.append((url, namespace, args, settings))
        return ScriptedStore()

    opened_with(open_store)
    tier = {"url": "s3://bucket", "options": {"key": 1}, "codec": "shuffle-zstd", "timeout_s": 7}
    cache = open_cache(CacheConfig(tiers=[tier], host=HOST), NAMESPACE)
    settings = {"codec": "shuffle-zstd", "spare_bytes": 0, "timeout_s": 7}
    assert calls == [("s3://bucket", NAMESPACE, ({"key": 1},), settings)]
    assert cache.stats().host.num_slots == 256
    cache.close()


def test_two_replicas_share_blocks_through_a_folder(tmp_path: Path) -> None:
    config = CacheConfig(store=f"file://{tmp_path}/cache", host=HOST)
    writer, reader = open_cache(config, NAMESPACE), open_cache(config, NAMESPACE)
    chain = chain_of(20)
    save_blocks(writer, chain, 0, 20)
    assert writer.flush(WAIT_S)
    staged = reader.stage(chain.hashes, WAIT_S)
    assert staged.fetched == frozenset(range(20))
    for slot, block_hash in zip(staged.lease.slots, chain.hashes, strict=True):
        assert bytes(reader.host.buffer(slot)) == payload_of(block_hash)
    writer.close()
    reader.close()


def test_no_store_means_no_shared_tier() -> None:
    cache = open_cache(CacheConfig(host=HOST), NAMESPACE)
    assert cache.stage(chain_of(3).hashes).num_blocks == 0
    cache.close()


def test_a_store_that_hangs_at_start_is_an_error_that_says_so(opened_with) -> None:  # type: ignore[no-untyped-def]
    release = threading.Event()
    opened_with(lambda *_, **__: release.wait() and ScriptedStore())
    config = CacheConfig(tiers=[{"url": "s3://far", "timeout_s": 0.05}], host=HOST)
    with pytest.raises(
        ConfigError, match=r"cache\.tiers\[0\]\.url s3://far did not answer within 0\.05 s"
    ):
        open_cache(config, NAMESPACE)
    release.set()


def test_a_store_that_cannot_be_reached_is_an_error_that_says_how_to_do_without(  # type: ignore[no-untyped-def]
    opened_with,
) -> None:
    def open_store(*_: object, **__: object) -> BlockStore:
        raise StoreUnavailableError("connection refused")

    opened_with(open_store)
    with pytest.raises(ConfigError, match=r"connection refused.*cache\.store to null"):
        open_cache(CacheConfig(store="s3://b", host=HOST), NAMESPACE)


@pytest.mark.parametrize(
    "given", [{"name": "a"}, {"folder": "/dev/shm/a"}, {"start_owner": False}, {"reserve_ahead": 3}]
)
def test_what_only_an_arena_has_is_refused_without_one(given: dict[str, object]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"scope: process has no arena.*{name}.*scope: node"):
        HostConfig.model_validate({"scope": "process", **given})
    HostConfig.model_validate({"scope": "node", **given})
    assert HostConfig.model_validate(HostConfig(scope="process").model_dump()).scope == "process"


def test_inner_blocks_of_what_others_stored_are_found_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(threading.enumerate())
    monkeypatch.setattr("shared_cache.stores.refreshing.FIRST_WITHIN_S", 0.0)
    is_done, url, chain = threading.Event(), f"file://{tmp_path}/s", chain_of(6)
    open_store(url, NAMESPACE).write(run_of(chain))
    refresh = FsBlockStore.refresh

    def refreshed(store: FsBlockStore) -> int:
        num_blocks = refresh(store)
        is_done.set()
        return num_blocks

    monkeypatch.setattr(FsBlockStore, "refresh", refreshed)
    cache = open_cache(CacheConfig(store=url, host=HOST), NAMESPACE)
    assert is_done.wait(10)
    assert cache._tiers.tiers[0].num_stored(chain.hashes[3:], 0) == 3
    cache.close()
    left = set(threading.enumerate()) - others
    assert not [t for t in left if t.name == "kvcommons-refresh"]


def test_a_read_only_store_is_used_with_a_warning(  # type: ignore[no-untyped-def]
    opened_with, caplog: pytest.LogCaptureFixture
) -> None:
    store = ScriptedStore()
    store.read_only = True
    opened_with(lambda *_, **__: store)
    with caplog.at_level(logging.WARNING):
        open_cache(CacheConfig(store="s3://b", host=HOST), NAMESPACE).close()
    assert "may only be read" in caplog.text


def test_a_host_tier_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.host\.bytes"):
        open_cache(CacheConfig(host={"scope": "process", "bytes": 100}), NAMESPACE)


def test_the_first_tier_is_closed_when_the_second_one_cannot_be_opened(opened_with) -> None:  # type: ignore[no-untyped-def]
    first = ScriptedStore()

    def open_store(url: str, *_: object, **__: object) -> BlockStore:
        if url == "s3://far":
            raise StoreUnavailableError("no route")
        return first

    opened_with(open_store)
    config = CacheConfig(tiers=[{"url": "file:///near"}, {"url": "s3://far"}], host=HOST)
    with pytest.raises(ConfigError, match=r"cache\.tiers\[1\]\.url s3://far.*remove this tier"):
        open_cache(config, NAMESPACE)
    assert first.is_closed


def test_the_tiers_are_closed_when_there_is_no_host_tier(opened_with) -> None:  # type: ignore[no-untyped-def]
    store = ScriptedStore()
    opened_with(lambda *_, **__: store)
    with pytest.raises(ConfigError, match=r"cache\.host\.bytes"):
        open_cache(CacheConfig(store="s3://b", host={"scope": "process", "bytes": 9}), NAMESPACE)
    assert store.is_closed


@pytest.mark.parametrize(
    ("admission", "is_read_only", "after_save", "after_use"),
    [
        ("always", False, 4, 4),
        ("worth", False, 4, 4),
        ("second_use", False, 0, 4),
        ("never", False, 0, 0),
        ("always", True, 0, 0),
    ],
)
def test_the_shared_tier_gets_what_its_admission_says(  # type: ignore[no-untyped-def]
    opened_with, admission: str, is_read_only: bool, after_save: int, after_use: int
) -> None:
    store, chain = ScriptedStore(), chain_of(4)
    store.read_only = is_read_only
    opened_with(lambda *_, **__: store)
    tier = {"url": "s3://b", "admission": admission}
    cache = open_cache(CacheConfig(tiers=[tier], host=HOST), NAMESPACE)
    save_blocks(cache, chain, 0, 4)
    assert cache.flush(WAIT_S)
    assert store.match(chain.hashes) == after_save
    cache.release(cache.stage(chain.hashes))
    assert cache.flush(WAIT_S)
    assert store.match(chain.hashes) == after_use
    assert cache.stats().host.leased_slots == 0
    cache.close()


def test_a_cache_without_tiers_loads_no_file_systems() -> None:
    script = """
import sys
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.opening import open_cache
from tests.shared_cache.fakes import NAMESPACE
open_cache(CacheConfig(host={"scope": "process", "bytes": "1MiB"}), NAMESPACE).close()
assert not {"fsspec", "obstore", "pyarrow"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("admission", "is_read_only", "expected"),
    [
        ("always", False, "always"),
        ("worth", False, "always"),
        ("second_use", False, "second_use"),
        ("never", False, "never"),
        ("always", True, "never"),
    ],
)
def test_one_rule_says_which_blocks_are_named_for_the_shared_tier(
    admission: str, is_read_only: bool, expected: str
) -> None:
    config = CacheConfig(tiers=[{"url": "memory://x", "admission": admission}])
    assert config.store_admission(is_read_only=is_read_only) == expected
    assert CacheConfig().store_admission() == "never"
