"""Objects in S3, Google Cloud Storage or Azure, at the speed of the link; the only door to obstore.

Many ranged downloads are in flight at once, and their bytes go from the network's buffers into the
caller's, with one copy. obstore was measured against s3fs on the same server and bytes: about twice
its speed for downloads and three times for uploads, which join no parts. Failure prevented: a
request that never ends, or that still writes into a buffer after its caller has given up. All
requests run on one event loop; when a deadline ends them they are over before the caller goes on.
"""

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import obstore
from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, S3Store

from shared_cache.errors import ConfigError
from shared_cache.media.io_errors import of_object_store
from shared_cache.media.medium import ListedObject, Medium, Reader, advance, batches
from shared_cache.media.object_options import ObjectStoreSpec
from shared_cache.media.retries import Retries

PIECE_BYTES = 512 << 10
"""Least bytes that are handed on at once while an answer arrives; its last piece may be less."""

MAX_REQUESTS = 16
"""Downloads in flight for one medium; the others wait their turn."""

STEP_BYTES = 64 << 20
"""One `fill` is best asked for so much: several requests in flight hide the latency of each."""

Request = Callable[[], Awaitable[Any]]
"""Makes one try of a request, on the event loop."""

_STORES: dict[str, Any] = {"s3": S3Store, "gcs": GCSStore, "azure": AzureStore}
_NO_BULK_DELETE = {"aws_disable_bulk_delete": True}


def open_bucket(spec: ObjectStoreSpec) -> Any:
    """obstore's store for a bucket; it is not asked anything yet. Raises `ConfigError`."""
    try:
        if spec.service == "s3":
            with suppress(UnknownConfigurationKeyError):  # older ones delete one by one anyway
                return _open(spec, _NO_BULK_DELETE)
        return _open(spec, {})
    except (BaseError, TypeError, ValueError) as error:
        text = str(error).partition("\n\nDebug source")[0]
        raise ConfigError(
            f"the bucket {spec.bucket!r} cannot be opened with these options: {text}"
        ) from error


def _open(spec: ObjectStoreSpec, more: dict[str, Any]) -> Any:
    return _STORES[spec.service](
        spec.bucket,
        config={**more, **spec.config},
        client_options=dict(spec.client_options),
        retry_config={"max_retries": 0},  # `Retries` does that, and counts
    )


class BucketMedium(Medium):
    """A folder in a bucket; `folder` has no slash at its ends."""

    def __init__(self, bucket: Any, folder: str, retries: Retries) -> None:
        super().__init__(folder)
        self._bucket = bucket
        self._retries = retries
        self._turns = asyncio.Semaphore(MAX_REQUESTS)
        self._can_create = True

    @property
    def num_retries(self) -> int:
        """See `Medium.num_retries`."""
        return self._retries.num_retries

    def prepare(self) -> None:
        """Buckets have no folders."""

    def check_readable(self, root: str) -> None:
        """See `Medium.check_readable`; an empty folder is as good as a full one."""
        try:
            with self.open("namespace.json") as reader:
                reader.read(0, 1)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise

    def open(self, name: str) -> AbstractContextManager[Reader]:
        """See `Medium.open`; nothing is held, and what is missing shows when it is read."""
        return nullcontext(_BucketReader(self, self.path(name)))

    def publish(self, name: str, parts: Sequence[memoryview], *, replace: bool = False) -> bool:
        """See `Medium.publish`. One request whatever the size, and no copy of the parts here."""
        buffers = [part.cast("B") for part in parts]
        try:
            self._run(lambda: self._put(self.path(name), buffers, replace))
        except FileExistsError as error:
            if replace:
                raise ConnectionError(f"another writer is replacing {name} just now") from error
            return False
        return True

    def list(self, *, tidies: bool = False) -> Iterator[ListedObject]:
        """See `Medium.list`; a bucket has nothing to tidy up."""
        found = self._run(lambda: obstore.list(self._bucket, self.folder).collect_async())
        for meta in found:
            name, used_s = meta["path"][len(self.folder) + 1 :], meta["last_modified"].timestamp()
            yield ListedObject(name, meta["size"], used_s)

    def remove(self, name: str) -> None:
        """See `Medium.remove`."""
        with suppress(FileNotFoundError):
            self._run(lambda: obstore.delete_async(self._bucket, self.path(name)))

    def fetch(self, key: str, parts: "Sequence[_Part]") -> None:
        """Fill all `parts` from the object `key`; a later try asks only for what is missing yet."""
        self._run(lambda: self._fetch(key, parts))

    def _run(self, request: Request) -> Any:
        return self._retries.run(lambda timeout_s: _run_on_loop(request, timeout_s))

    async def _put(self, key: str, parts: Sequence[memoryview], replace: bool) -> None:
        if self._can_create and not replace:
            try:
                await self._put_as("create", key, parts)
            except (BaseError, NotImplementedError) as error:
                if not isinstance(of_object_store(error), NotImplementedError):
                    raise
                self._can_create = False
            else:
                return
        await self._put_as("overwrite", key, parts)

    async def _put_as(self, mode: Any, key: str, parts: Sequence[memoryview]) -> None:
        await obstore.put_async(self._bucket, key, iter(parts), use_multipart=False, mode=mode)

    async def _fetch(self, key: str, parts: "Sequence[_Part]") -> None:
        missing = [self._fetch_part(key, part) for part in parts if part.rest]
        results = await asyncio.gather(*missing, return_exceptions=True)
        for error in filter(None, results):
            raise error

    async def _fetch_part(self, key: str, part: "_Part") -> None:
        async with self._turns:
            try:
                answer = await obstore.get_async(
                    self._bucket, key, options={"range": (part.position, part.end)}
                )
            except BaseError as error:
                if getattr(of_object_store(error), "errno", None) != errno.EINVAL:
                    raise
                part.rest = []  # the object ends before this part
                return
            async for piece in answer.stream(min_chunk_size=PIECE_BYTES):
                part.take(memoryview(piece))
        if part.position < answer.range[1]:
            raise ConnectionError(f"the answer for {key} was cut short at byte {part.position}")
        part.rest = []


@dataclass(slots=True)
class _Part:
    """A range of an object and where its bytes go: `rest`, from `position` on."""

    position: int
    rest: list[memoryview]
    num_filled: int = 0

    @property
    def end(self) -> int:
        return self.position + sum(view.nbytes for view in self.rest)

    def take(self, piece: memoryview) -> None:
        """Copy `piece` to where it belongs."""
        num_taken = 0
        for view in self.rest:
            taken = piece[num_taken : num_taken + view.nbytes]
            view[: taken.nbytes] = taken
            num_taken += taken.nbytes
            if taken.nbytes < view.nbytes:
                break
        self.rest = advance(self.rest, num_taken)
        self.position += num_taken
        self.num_filled += num_taken


class _BucketReader(Reader):
    """Ranged downloads of one object."""

    step_bytes = STEP_BYTES

    def __init__(self, medium: BucketMedium, key: str) -> None:
        self._medium = medium
        self._key = key

    def read(self, start: int, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        num_filled = self.fill(start, [memoryview(buffer)])
        return bytes(memoryview(buffer)[:num_filled])

    def fill(self, start: int, buffers: Sequence[memoryview]) -> int:
        parts: list[_Part] = []
        sizes: list[int] = []
        for batch in batches(buffers):
            parts.append(_Part(start + sum(sizes), batch))
            sizes.append(sum(view.nbytes for view in batch))
        self._medium.fetch(self._key, parts)
        num_filled = 0
        for part, size in zip(parts, sizes, strict=True):
            num_filled += part.num_filled
            if part.num_filled < size:
                break
        return num_filled


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, in a thread that lives as long as the process."""
    with _loop_lock:
        return _start_loop(os.getpid())


_loop_lock = threading.Lock()


@cache
def _start_loop(process_id: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kvcommons-objects", daemon=True).start()
    return loop


def _run_on_loop(request: Request, timeout_s: float) -> Any:
    """What the request answers; built-in exceptions, `TimeoutError` after `timeout_s`.

    When this returns, the request is over in any case: nothing writes into its buffers any more.
    """

    async def bounded() -> Any:
        return await asyncio.wait_for(request(), timeout_s)

    future = asyncio.run_coroutine_threadsafe(bounded(), _loop())
    try:
        return future.result()
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"no answer within {timeout_s:.3g} s") from error
    except Exception as error:
        translated = of_object_store(error)
        if translated is error:
            raise
        raise translated from error
    except BaseException:
        future.cancel()
        raise
