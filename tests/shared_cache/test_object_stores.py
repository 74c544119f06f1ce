"""Buckets through obstore and through s3fs: one contract on moto, and faults that moto cannot make.

No request goes to a real service; gs:// and az:// are opened only (`test_object_options`).
"""

import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from shared_cache.errors import (
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
)
from shared_cache.media import medium, object_medium, retries
from shared_cache.media.medium import Medium
from shared_cache.media.object_medium import BucketMedium
from shared_cache.media.opening import open_medium
from shared_cache.stores.fs_store import FsBlockStore, open_store
from shared_cache.stores.store import BlockStore
from tests.shared_cache.fakes import BLOCK_BYTES, NAMESPACE, WAIT_S, chain_of, payload_of, run_of
from tests.shared_cache.scripted_s3 import (
    BUCKET,
    Answer,
    Cut,
    HangUp,
    Request,
    ScriptedS3,
    running_scripted_s3,
)
from tests.shared_cache.store_contract import BlockStoreContract, payloads_of, read_all

URL = f"s3://{BUCKET}/some/folder"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DEFAULT_POLICY", retries.RetryPolicy(first_pause_s=0.0))


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of moto's S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto_url(moto: str) -> str:
    """A folder in an empty bucket of its own."""
    name = f"bucket-{uuid.uuid4().hex}"
    with urllib.request.urlopen(urllib.request.Request(f"{moto}/{name}", method="PUT")):
        return f"s3://{name}/folder"


def moto_options(moto: str, client: str) -> dict[str, Any]:
    return {"client": client, "endpoint_url": moto, "key": "k", "secret": "s"}


class TestObstoreOnMoto(BlockStoreContract):
    @pytest.fixture
    def store(self, moto: str, moto_url: str) -> BlockStore:
        return open_store(moto_url, NAMESPACE, moto_options(moto, "obstore"))


class TestS3fsOnMoto(BlockStoreContract):
    @pytest.fixture
    def store(self, moto: str, moto_url: str) -> BlockStore:
        return open_store(moto_url, NAMESPACE, moto_options(moto, "fsspec"))


@pytest.mark.parametrize("clients", [("obstore", "fsspec"), ("fsspec", "obstore")])
def test_both_clients_see_the_same_store(
    clients: tuple[str, str], moto: str, moto_url: str
) -> None:
    writer, reader = (open_store(moto_url, NAMESPACE, moto_options(moto, c)) for c in clients)
    chain = chain_of(6)
    assert reader.match(chain.hashes) == 0
    assert writer.write(run_of(chain)) == 6
    assert read_all(reader, chain.hashes) == payloads_of(chain.hashes)
    assert reader.write(run_of(chain)) == 0
    assert [entry.name for entry in reader.entries()] == [entry.name for entry in writer.entries()]


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_a_bucket_that_is_missing_is_an_error_with_the_fix(moto: str, client: str) -> None:
    with pytest.raises(StoreUnavailableError, match="does not exist: create it"):
        open_store("s3://nobody-made-it/x", NAMESPACE, moto_options(moto, client))


@pytest.mark.parametrize("client", ["obstore", "fsspec"])
def test_an_object_is_created_once(moto: str, moto_url: str, client: str) -> None:
    folder, _ = open_medium(moto_url, moto_options(moto, client), "v1")
    assert folder.publish("a", [memoryview(b"first")])
    assert not folder.publish("a", [memoryview(b"second")])
    assert content(folder, "a") == b"first"
    assert folder.publish("a", [memoryview(b"third")], replace=True)
    assert content(folder, "a") == b"third"


def content(folder: Medium, name: str, num_bytes: int = 100) -> bytes:
    with folder.open(name) as reader:
        return reader.read(0, num_bytes)


@pytest.fixture
def server() -> Iterator[ScriptedS3]:
    with running_scripted_s3() as running:
        yield running


@pytest.fixture
def store(server: ScriptedS3) -> FsBlockStore:
    return open_store(URL, NAMESPACE, server.options)


@pytest.fixture
def folder(server: ScriptedS3) -> BucketMedium:
    opened, _ = open_medium(URL, server.options, "v1", timeout_s=WAIT_S)
    assert isinstance(opened, BucketMedium)
    return opened


def object_key(server: ScriptedS3) -> str:
    (key,) = (key for key in server.objects if key.endswith(".arrow"))
    return key


def failing(
    num_times: int, answer: Answer | Cut, method: str = ""
) -> Callable[[Request], Answer | Cut | None]:
    """A script that gives `answer` to the first `num_times` requests (with `method`)."""
    left = [answer] * num_times

    def script(request: Request) -> Answer | Cut | None:
        return left.pop() if left and method in ("", request.method) else None

    return script


class TestRequests:
    def test_a_match_is_one_small_ranged_request(
        self, server: ScriptedS3, store: FsBlockStore
    ) -> None:
        store.write(run_of(chain_of(50)))
        fresh = open_store(URL, NAMESPACE, server.options)
        server.requests.clear()
        assert fresh.match(chain_of(50).hashes) == 50
        assert [(r.method, r.range) for r in server.requests] == [("GET", "bytes=0-16383")]

    def test_payloads_come_in_several_requests_at_once(
        self, server: ScriptedS3, folder: BucketMedium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(medium, "BATCH_BYTES", 3000)
        monkeypatch.setattr(object_medium, "PIECE_BYTES", 700)
        data = bytes(range(256)) * 40
        folder.publish("a", [memoryview(data)])
        together = threading.Barrier(3)
        server.requests.clear()
        server.script = lambda request: together.wait(WAIT_S) and None
        buffers = [bytearray(999) for _ in range(9)]
        with folder.open("a") as reader:
            assert reader.fill(5, [memoryview(buffer) for buffer in buffers]) == 9 * 999
        assert b"".join(buffers) == data[5 : 5 + 9 * 999]
        assert len(server.requests) == 3

    def test_no_more_are_in_flight_than_allowed(
        self, server: ScriptedS3, folder: BucketMedium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(medium, "BATCH_BYTES", 10)
        folder.publish("a", [memoryview(bytes(1000))])
        running, most, lock = 0, 0, threading.Lock()

        def script(request: Request) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.002)
            with lock:
                running -= 1

        server.script = script
        with folder.open("a") as reader:
            assert reader.fill(0, [memoryview(bytearray(1000))]) == 1000
        assert 1 < most <= object_medium.MAX_REQUESTS

    def test_a_read_ends_where_the_object_ends(
        self, folder: BucketMedium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(medium, "BATCH_BYTES", 100)
        folder.publish("a", [memoryview(bytes(range(250)))])
        buffer = bytearray(600)
        with folder.open("a") as reader:
            assert reader.fill(20, [memoryview(buffer)]) == 230
            assert reader.fill(250, [memoryview(buffer)]) == 0
            assert reader.read(240, 50) == bytes(range(240, 250))
        assert bytes(buffer[:230]) == bytes(range(20, 250))

    def test_an_upload_is_one_request_of_the_parts_as_they_are(
        self, server: ScriptedS3, folder: BucketMedium
    ) -> None:
        server.requests.clear()
        parts = [
            memoryview(b"ab"),
            memoryview(bytearray(9 << 20)),
            memoryview(b""),
            memoryview(b"c"),
        ]
        assert folder.publish("a", parts)
        assert server.objects["some/folder/v1/a"] == b"ab" + bytes(9 << 20) + b"c"
        assert len(server.requests) == 1


class TestPassingFaults:
    @pytest.mark.parametrize(
        "answer",
        [Answer(503, "SlowDown"), Answer(500), Answer(429), Answer(400, "RequestTimeout")],
        ids=lambda answer: f"{answer.status}{answer.code}",
    )
    def test_each_operation_is_tried_again_and_counted(
        self, server: ScriptedS3, folder: BucketMedium, answer: Answer
    ) -> None:
        server.script = failing(2, answer)
        assert folder.publish("a", [memoryview(b"abc")])
        server.script = failing(2, answer)
        assert content(folder, "a") == b"abc"
        server.script = failing(2, answer)
        assert [item[:2] for item in folder.list()] == [("a", 3)]
        server.script = failing(2, answer)
        folder.remove("a")
        assert folder.num_retries == 8
        assert not server.objects

    def test_a_store_that_stays_busy_is_given_up(
        self, server: ScriptedS3, store: FsBlockStore
    ) -> None:
        server.script = lambda request: Answer(503, "SlowDown")
        server.requests.clear()
        with pytest.raises(StoreUnavailableError, match="503"):
            store.match(chain_of(1).hashes)
        assert len(server.requests) == retries.DEFAULT_POLICY.max_tries

    def test_a_body_that_was_cut_is_gone_on_with(
        self, server: ScriptedS3, folder: BucketMedium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_medium, "PIECE_BYTES", 100)
        data = bytes(range(256)) * 400
        folder.publish("a", [memoryview(data)])
        server.requests.clear()
        server.script = failing(1, Cut())
        assert content(folder, "a", len(data)) == data
        first, second = (request.range for request in server.requests)
        assert first == f"bytes=0-{len(data) - 1}"
        assert second is not None
        assert 0 < int(second.removeprefix("bytes=").partition("-")[0]) <= len(data) // 2

    def test_bodies_that_are_always_cut_are_an_error(
        self, server: ScriptedS3, store: FsBlockStore
    ) -> None:
        store.write(run_of(chain_of(3)))
        server.script = lambda request: Cut()
        with pytest.raises(StoreUnavailableError):
            read_all(store, chain_of(3).hashes)

    def test_a_server_that_goes_in_mid_run(self, server: ScriptedS3, store: FsBlockStore) -> None:
        chain = chain_of(3)
        store.write(run_of(chain))
        server.script = lambda request: HangUp()
        for operation in (
            lambda: read_all(store, chain.hashes),
            lambda: store.write(run_of(chain_of(2, first_token=90))),
            lambda: list(store.entries()),
            lambda: store.delete(f"ab/ab{'0' * 62}.arrow"),
        ):
            with pytest.raises(StoreUnavailableError, match="check the address"):
                operation()
        server.script = lambda request: None
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)


class TestDeadline:
    def test_a_server_that_hangs_costs_the_timeout_and_writes_nothing_later(
        self, server: ScriptedS3
    ) -> None:
        folder, _ = open_medium(URL, server.options, "v1", timeout_s=0.3)
        folder.publish("a", [memoryview(b"x" * 1000)])
        answered, may_answer = threading.Event(), threading.Event()

        def script(request: Request) -> None:
            assert may_answer.wait(WAIT_S)
            answered.set()

        server.script = script
        buffer, start_s = bytearray(1000), time.monotonic()
        with folder.open("a") as reader, pytest.raises(TimeoutError, match="no answer within"):
            reader.fill(0, [memoryview(buffer)])
        assert 0.3 <= time.monotonic() - start_s < 3.0
        may_answer.set()
        assert answered.wait(WAIT_S)
        server.script = lambda request: None
        assert content(folder, "a") == b"x" * 100  # by now a late answer would be here
        assert bytes(buffer) == bytes(1000)

    def test_it_becomes_a_store_that_is_unavailable(self, server: ScriptedS3) -> None:
        store = open_store(URL, NAMESPACE, server.options, timeout_s=0.3)
        release = threading.Event()
        server.script = lambda request: release.wait(WAIT_S) and None
        with pytest.raises(StoreUnavailableError, match="no answer within"):
            store.write(run_of(chain_of(2)))
        release.set()


class TestRefusals:
    def test_wrong_credentials(self, server: ScriptedS3) -> None:
        server.script = lambda request: Answer(403, "InvalidAccessKeyId")
        with pytest.raises(StoreError, match="check the credentials"):
            open_store(URL, NAMESPACE, server.options)
        assert len(server.requests) == 2  # a write and a read, neither of them twice

    def test_credentials_that_may_only_read(self, server: ScriptedS3, store: FsBlockStore) -> None:
        chain = chain_of(3)
        store.write(run_of(chain))
        server.script = lambda r: Answer(403, "AccessDenied") if r.method == "PUT" else None
        reader = open_store(URL, NAMESPACE, server.options)
        assert reader.read_only
        assert read_all(reader, chain.hashes) == payloads_of(chain.hashes)
        with pytest.raises(StoreReadOnlyError):
            reader.write(run_of(chain_of(2, first_token=90)))

    @pytest.mark.parametrize("status", [301, 400])
    def test_a_wrong_region_is_not_tried_again(self, server: ScriptedS3, status: int) -> None:
        server.script = lambda request: Answer(status, "AuthorizationHeaderMalformed")
        with pytest.raises(StoreUnavailableError, match="check the address"):
            open_store(URL, NAMESPACE, server.options)
        assert len(server.requests) == 1

    @pytest.mark.parametrize(
        "answer", [Answer(507, "XMinioStorageFull"), Answer(403, "QuotaExceeded")]
    )
    def test_a_full_store(self, server: ScriptedS3, store: FsBlockStore, answer: Answer) -> None:
        server.script = lambda request: answer if request.method == "PUT" else None
        with pytest.raises(StoreFullError, match="no room left"):
            store.write(run_of(chain_of(2)))
        assert store.match(chain_of(2).hashes) == 0

    def test_a_store_that_cannot_be_read(self, server: ScriptedS3, store: FsBlockStore) -> None:
        server.script = lambda request: Answer(501, "NotImplemented")
        with pytest.raises(StoreError, match="use another store"):
            store.match(chain_of(1).hashes)

    def test_a_conflict_ends_the_write_instead_of_repeating_it(
        self, server: ScriptedS3, store: FsBlockStore
    ) -> None:
        server.script = lambda r: Answer(409, "OperationAborted") if r.method == "PUT" else None
        with pytest.raises(StoreUnavailableError, match="another writer"):
            store.write(run_of(chain_of(2)))

    def test_a_store_that_cannot_create_only_if_absent(
        self, server: ScriptedS3, folder: BucketMedium
    ) -> None:
        server.script = lambda r: Answer(501, "NotImplemented") if r.is_conditional else None
        for value in (b"first", b"second"):
            assert folder.publish("a", [memoryview(value)])
        assert content(folder, "a") == b"second"
        assert [r.is_conditional for r in server.requests if r.method == "PUT"] == [
            True,
            False,
            False,
        ]


class TestDamage:
    def test_a_flipped_byte_is_a_miss_and_makes_room(
        self, server: ScriptedS3, store: FsBlockStore
    ) -> None:
        chain = chain_of(4)
        store.write(run_of(chain))
        key = object_key(server)
        data = bytearray(server.objects[key])
        data[4096 + BLOCK_BYTES + 5] ^= 4
        server.objects[key] = bytes(data)
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:1])
        assert store.faults.corrupt == 1
        assert key not in server.objects
        assert store.write(run_of(chain)) == 4
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)

    @pytest.mark.parametrize("num_bytes", [0, 100, 4096, 4096 + BLOCK_BYTES + 7])
    def test_an_object_that_was_cut_off(self, server: ScriptedS3, num_bytes: int) -> None:
        chain = chain_of(4)
        open_store(URL, NAMESPACE, server.options).write(run_of(chain))
        key = object_key(server)
        server.objects[key] = server.objects[key][:num_bytes]
        store = open_store(URL, NAMESPACE, server.options)
        num_good = max(0, num_bytes - 4096) // BLOCK_BYTES
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes[:num_good])
        assert store.faults.corrupt == 1
        assert store.write(run_of(chain)) == 4


def test_of_two_writers_of_one_block_at_the_same_moment_one_is_stored(
    server: ScriptedS3,
) -> None:
    chain = chain_of(3)
    stores = [open_store(URL, NAMESPACE, server.options) for _ in range(2)]
    together = threading.Barrier(2)

    def script(request: Request) -> None:
        if request.method == "PUT":
            together.wait(WAIT_S)

    server.script = script
    written: list[int] = []
    threads = [
        threading.Thread(target=lambda s=s: written.append(s.write(run_of(chain)))) for s in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [0, 3]
    for store in stores:
        assert read_all(store, chain.hashes) == payloads_of(chain.hashes)
    assert payload_of(chain.hashes[0]) in server.objects[object_key(server)]
