"""What a person sees while a model is prepared; nothing at all when nobody looks.

An actor or a CI job has no terminal: there the same steps are log lines, and no control
characters end up in a log file.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)

POLL_S = 0.2


class Preparation:
    """A progress display for the steps of preparing one model; a context manager."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        self._name = name
        console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[size]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Preparation":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show `what` as running until the block ends."""
        logger.info("%s: %s", self._name, what)
        task = self._progress.add_task(f"{self._name}: {what}", total=None, size="")
        yield
        self._progress.update(task, total=1, completed=1)

    @contextmanager
    def bytes_arriving(self, what: str, folder: Path, total_bytes: int) -> Iterator[None]:
        """Show `what` with the bytes of the files below `folder` as they grow."""
        logger.info("%s: %s (%.0f MB)", self._name, what, total_bytes / 1e6)
        task = self._progress.add_task(f"{self._name}: {what}", total=total_bytes, size="")
        done = threading.Event()

        def show(num_bytes: int) -> None:
            size = f"{num_bytes / 1e6:.0f}/{total_bytes / 1e6:.0f} MB"
            self._progress.update(task, completed=num_bytes, size=size)

        def watch() -> None:
            while not done.wait(POLL_S):
                show(min(total_bytes, _bytes_below(folder)))

        watcher = threading.Thread(target=watch, name="model-download", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        show(total_bytes)


def _bytes_below(folder: Path) -> int:
    return sum(_bytes_of(file) for file in folder.rglob("*"))


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip renamed it between listing and looking
        return 0
