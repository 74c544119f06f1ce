"""Work that is waited for as long as its client does, and no longer than a request may take."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from cluster.endpoint.refusals import ClientGoneError, TimedOutError

T = TypeVar("T")


async def waited_for(
    work: Coroutine[Any, Any, T], receive: Receive, timeout_s: float | None = None
) -> T:
    """Its result; it is cancelled, and `ClientGoneError` or `TimedOutError` raised, if none comes.

    A server need not cancel a request whose client leaves; it tells so through `receive`, of which
    the body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError("the client has left")
        raise TimedOutError(f"not done within serve.request_timeout_s = {timeout_s:g} s")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
