"""Scenario `ngram`: text that repeats its context is written several tokens at a time.

The engine looks up what followed the last few tokens earlier in the context, proposes it, and
verifies the whole proposal in one forward pass. No draft model, and the same output.
"""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.demo.asking import Answer, ask
from cluster.demo.documents import read_text
from cluster.demo.scenario import Demo, Serving, greedy
from cluster.demo.setups import roomy_pool, setup

EDIT = (
    "Here is a Python file:\n\n```python\n{text}```\n\nRename the class `Length` to `Distance` and "
    "write the whole file again."
)
EDIT_START = "Here is the whole file with this change:\n\n```python\n"
SUMMARY = "Summarise the following article. Quote its most important sentences.\n\n{text}"
SUMMARY_START = 'The most important sentences of the article are:\n\n1. "'


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt; the answer is begun for the model, so that a small one stays with the task."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """One prompt, without and with drafts; `accepted_drafts` counts tokens."""

    plain_tokens_per_s: float
    ngram_tokens_per_s: float
    accepted_drafts: int
    generated_tokens: int
    identical_output: bool


@dataclass(frozen=True, slots=True)
class NGramResult:
    """Both prompts by name."""

    prompts: dict[str, PromptFigures]

    def as_json(self) -> dict[str, Any]:
        """The figures of the editing prompt with the issue's names, and all under `prompts`."""
        figures = asdict(self.prompts["edit"])
        return {**figures, "prompts": {name: asdict(one) for name, one in self.prompts.items()}}

    def summary(self) -> str:
        """The outcome in words for somebody new to all this."""
        edit = self.prompts["edit"]
        return (
            "Text that repeats its context can be guessed and checked several tokens at a time: "
            f"editing a file went at {edit.ngram_tokens_per_s:.1f} tokens/s instead of "
            f"{edit.plain_tokens_per_s:.1f}, with the same output."
        )

    def failures(self) -> list[str]:
        """The expectations that were not met."""
        found = [
            f"drafts changed the output of the {name} prompt"
            for name, one in self.prompts.items()
            if not one.identical_output
        ]
        if not self.prompts["edit"].accepted_drafts:
            found.append("no draft was accepted on the editing prompt")
        return found


async def run_ngram(demo: Demo) -> NGramResult:
    """Run the scenario; streams what the engines write."""
    options = demo.options
    demo.screen.scenario(
        "ngram: speculative decoding by looking up the context",
        f"Window {options.ngram_window}, {options.ngram_candidates} candidates. Coloured text: "
        "several tokens accepted at once. Plain text: one token, one forward pass. The answers' "
        "first words are given, so that a small model stays with its task; tokens per second "
        "count the whole request, reading the prompt included.",
    )
    tasks = _tasks(demo)
    drafts = {
        "decoding_type": "NGram",
        "max_draft_len": options.ngram_candidates,
        "max_matching_ngram_size": options.ngram_window,
    }
    plain = await _run(demo, tasks, "plain decoding", None)
    ngram = await _run(demo, tasks, "n-gram drafts", drafts)
    result = NGramResult(
        {task.name: _figures(plain[task.name], ngram[task.name]) for task in tasks}
    )
    _print_result(demo, result)
    return result


def _tasks(demo: Demo) -> list[Task]:
    sizes = demo.sizes
    return [
        _task(demo, "edit", "length.py.txt", (EDIT, EDIT_START), sizes.edit_output_tokens),
        _task(
            demo, "summary", "article.txt", (SUMMARY, SUMMARY_START), sizes.summary_output_tokens
        ),
    ]


def _task(demo: Demo, name: str, file: str, words: tuple[str, str], max_tokens: int) -> Task:
    question, answer_start = words
    prompt = demo.prompts.about(
        read_text(file),
        lambda text: demo.prompts.chat(
            [{"role": "user", "content": question.format(text=text)}], answer_start
        ),
        demo.sizes.max_tokens - max_tokens,
    )
    return Task(name, prompt, max_tokens)


async def _run(
    demo: Demo, tasks: list[Task], mode: str, drafts: dict[str, Any] | None
) -> dict[str, Answer]:
    longest = max(len(task.prompt) + task.max_tokens for task in tasks)
    pool = roomy_pool(demo.config, longest)
    engine = {"speculative_config": drafts, "kv_cache_config": pool}
    config = setup(demo.config, "ngram", 1, cache=None, engine=engine)
    async with demo.serve(config) as serving:
        return {task.name: await _stream(demo, serving, task, mode) for task in tasks}


async def _stream(demo: Demo, serving: Serving, task: Task, mode: str) -> Answer:
    screen = demo.screen
    screen.note(f"{task.name} prompt, {mode}:")
    answer = await ask(
        serving.dispatcher, greedy(task.name, task.prompt, task.max_tokens), screen.chunk
    )
    screen.end_of_text()
    screen.statistics(answer.total_s, answer.tokens_per_s, len(answer.token_ids))
    return answer


def _figures(plain: Answer, ngram: Answer) -> PromptFigures:
    return PromptFigures(
        plain_tokens_per_s=plain.tokens_per_s,
        ngram_tokens_per_s=ngram.tokens_per_s,
        accepted_drafts=ngram.num_accepted,
        generated_tokens=len(ngram.token_ids),
        identical_output=plain.token_ids == ngram.token_ids and plain.text == ngram.text,
    )


def _print_result(demo: Demo, result: NGramResult) -> None:
    rows = [
        (
            name,
            f"{one.plain_tokens_per_s:.1f}",
            f"{one.ngram_tokens_per_s:.1f}",
            f"{one.ngram_tokens_per_s / one.plain_tokens_per_s:.2f}x",
            f"{one.accepted_drafts} of {one.generated_tokens}",
        )
        for name, one in result.prompts.items()
    ]
    columns = ("Prompt", "plain tokens/s", "n-gram tokens/s", "speed-up", "accepted draft tokens")
    demo.screen.table("Decoding without and with n-gram drafts", columns, rows)
    good = not result.failures()
    demo.screen.verdict(
        good, "Same text, fewer forward passes" if good else "; ".join(result.failures())
    )
