"""Start the owner of a node's arena without Ray: `python -m shared_cache.host --bytes 8GiB`."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from shared_cache.config import HostConfig
from shared_cache.errors import KvcommonsError
from shared_cache.host.owner import ArenaOwner, OwnerIsRunningError, rules_of
from shared_cache.host.starting import EXIT_FAILED, EXIT_RUNNING, parse_quotas


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until idle; the exit code."""
    options = _parser().parse_args(argv)
    return _run_detached(options) if options.detach else _run(options, lambda: None)


def _run(options: argparse.Namespace, on_started: Callable[[], None]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s"
    )
    try:
        asyncio.run(_serve(_make_owner(options), on_started))
    except OwnerIsRunningError as error:
        print(error, file=sys.stderr)
        return EXIT_RUNNING
    except (KvcommonsError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return 0


async def _serve(owner: ArenaOwner, on_started: Callable[[], None]) -> None:
    await owner.start()
    on_started()
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[None]] = set()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stopping.add(loop.create_task(owner.stop())))
    await owner.wait_stopped()


def _run_detached(options: argparse.Namespace) -> int:
    """Go on in the background; return in the foreground once it serves, or has failed."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read(1)
        return told[0] if told else EXIT_FAILED
    os.close(reading)
    os.setsid()
    try:
        code = _run(options, lambda: _tell(writing, 0))
        _tell(writing, code)
    finally:
        os.close(writing)
    return code


def _tell(pipe: int, code: int) -> None:
    with suppress(BrokenPipeError):  # told before, and nobody reads any more
        os.write(pipe, bytes((code,)))


def _parser() -> argparse.ArgumentParser:
    defaults = HostConfig()
    parser = argparse.ArgumentParser(prog="python -m shared_cache.host", description=__doc__)
    add = parser.add_argument
    add("--name", default=defaults.name, help="name of the arena (cache.host.name)")
    add("--bytes", default=str(int(defaults.bytes)), help="its size, such as 8GiB")
    add("--folder", help="folder on a memory file system (cache.host.folder)")
    add(
        "--eviction", default=defaults.eviction, help="which blocks go first: lru, s3fifo, priority"
    )
    add(
        "--admission",
        choices=("always", "second_use", "never"),
        default="always",
        help="which blocks processes are asked to write to the shared tier",
    )
    add(
        "--quota",
        action="append",
        default=[],
        metavar="TENANT=BYTES",
        help="most memory for one tenant (16 hexadecimal digits, see ReuseScope.tenant)",
    )
    add("--populate", action="store_true", help="take all memory at start (cache.host.populate)")
    add("--exit-when-idle-s", type=float, help="stop after so many seconds without a process")
    add("--detach", action="store_true", help="go on in the background once it serves")
    return parser


def _make_owner(options: argparse.Namespace) -> ArenaOwner:
    names = ("name", "bytes", "folder", "eviction", "populate")
    fields = {name: getattr(options, name) for name in names}
    config = HostConfig(**fields)
    rules = replace(rules_of(config, options.admission), quotas=parse_quotas(options.quota))
    return ArenaOwner(config, rules, options.exit_when_idle_s)


if __name__ == "__main__":
    sys.exit(main())
