"""What a person sees: steps, streamed text with accepted drafts in colour, tables, progress.

All printing of the demo goes through here, so that on a terminal it is coloured and moving, and in
a pipe or a CI log it is plain lines that can be searched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from actors.engine import TokenChunk

DRAFT_COLOURS = ("green", "cyan", "magenta", "yellow", "blue")
"""Used in turn, so that the end of one accepted draft and the start of the next can be told."""


class Screen:
    """The demo's output; `console` decides about colour and width."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._num_drafts = 0

    def _say(self, text: str, style: str = "") -> None:
        """A line; wrapped between words on a terminal, left whole in a pipe."""
        self._console.print(Text(text, style=style), soft_wrap=not self._console.is_terminal)

    def scenario(self, name: str, what: str) -> None:
        """The heading of one scenario and what it shows, in a sentence or two."""
        self._console.print()
        self._console.print(Rule(Text(name, style="bold cyan")))
        self._say(what, "dim")
        self._console.print()

    def step(self, number: int, what: str) -> None:
        """A numbered step, such as `[1] Creating first LLM instance...`."""
        self._say(f"[{number}] {what}", "bold")

    def detail(self, what: str, style: str = "") -> None:
        """An indented line below a step."""
        self._say(f"    {what}", style)

    def line(self) -> None:
        """An empty line."""
        self._console.print()

    def note(self, what: str) -> None:
        """A line that explains."""
        self._say(what, "dim")

    def verdict(self, good: bool, what: str) -> None:
        """`✓ SUCCESS: ...` in green or `✗ FAILED: ...` in red."""
        text, style = (f"✓ SUCCESS: {what}", "green") if good else (f"✗ FAILED: {what}", "red")
        self._say(text, f"bold {style}")

    def chunk(self, chunk: TokenChunk) -> None:
        """Stream one chunk's text: in colour when drafts were accepted, else plain."""
        style = ""
        if chunk.num_accepted:
            style = f"bold {DRAFT_COLOURS[self._num_drafts % len(DRAFT_COLOURS)]}"
            self._num_drafts += 1
        self._console.print(Text(chunk.text, style=style), end="", soft_wrap=True)

    def end_of_text(self) -> None:
        """Finish what `chunk` streamed."""
        self._console.print("\n")

    def statistics(self, total_s: float, tokens_per_s: float, num_tokens: int) -> None:
        """The closing figures of one streamed answer."""
        self._console.print(Text("Performance Statistics:", style="bold"))
        self._console.print(f"Total time: {total_s:.2f} seconds")
        self._console.print(f"Tokens per second: {tokens_per_s:.2f} tokens/sec")
        self._console.print(f"Total tokens generated: {num_tokens}")
        self._console.print()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table whose first column is words and whose others are figures."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            collapse_padding=True,
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)

    def panel(self, title: str, lines: Sequence[str]) -> None:
        """A framed text of several paragraphs."""
        self._console.print(Panel(Text("\n".join(lines)), title=title, border_style="cyan"))

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar of `total` steps; gives the function that moves it on by one.

        Without a terminal it is one line at the end.
        """
        bar = Progress(
            TextColumn("    {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=False,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        if not self._console.is_terminal:
            self.detail(f"{what}: {total} done")
