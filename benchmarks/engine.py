"""The embedded engine against plain transformers: same weights, threads and lengths.

Each case runs both sides in turn, several times, and keeps the best time of each, so that another
process on the machine disturbs one run and not the comparison.

    python -m benchmarks.engine --model smollm2-135m --json report/engine.json
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from actors.config import EngineConfig, ModelSource, NGramConfig, ReplicaConfig
from actors.engine import GenerationRequest, SamplingParams
from actors.engines.torch.build import build_torch_engine
from actors.engines.torch.engine import TorchEngine
from benchmarks.provenance import provenance
from cluster.demo.documents import read_text
from cluster.demo.ngram import EDIT, EDIT_START
from cluster.demo.prompts import Prompts as DemoPrompts
from cluster.demo.report import write_json
from cluster.models import resolve_model


@dataclass(frozen=True)
class Figure:
    """One line of the table: `ratio` is ours over `baseline`, of tokens per second."""

    case: str
    ours_tokens_per_s: float
    baseline: str
    baseline_tokens_per_s: float
    target_ratio: float

    @property
    def ratio(self) -> float:
        return self.ours_tokens_per_s / self.baseline_tokens_per_s


@dataclass(frozen=True)
class Timed:
    """When the tokens of one answer came out, in seconds, and how many at a time."""

    started_s: float
    arrivals: tuple[tuple[float, int], ...]
    token_ids: tuple[int, ...]

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.started_s

    @property
    def decode_tokens_per_s(self) -> float:
        (start, first), (end, _) = self.arrivals[0], self.arrivals[-1]
        return (len(self.token_ids) - first) / (end - start)


async def answer(engine: TorchEngine, prompt: tuple[int, ...], num_tokens: int) -> Timed:
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    request = GenerationRequest("benchmark", prompt, sampling)
    started, arrivals, tokens = time.perf_counter(), [], []
    async for chunk in engine.generate(request):
        arrivals.append((time.perf_counter(), len(chunk.token_ids)))
        tokens += chunk.token_ids
    return Timed(started, tuple(arrivals), tuple(tokens))


async def answers(engine: TorchEngine, prompts: list[tuple[int, ...]], num_tokens: int) -> float:
    """Tokens per second of all requests together while every one of them decodes."""
    timed = await asyncio.gather(*[answer(engine, prompt, num_tokens) for prompt in prompts])
    start = max(t.arrivals[0][0] for t in timed)
    end = min(t.arrivals[-1][0] for t in timed)
    tokens = sum(n for t in timed for at, n in t.arrivals if start < at <= end)
    return tokens / (end - start)


class Arrivals(BaseStreamer):
    """Notes when `generate` puts out a token; its first call brings the prompt."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[tuple[float, int]] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.tokens += value.reshape(-1).tolist()
            self.times.append((time.perf_counter(), value.numel()))
        self._is_prompt = False

    def end(self) -> None:
        pass


class Plain:
    """Plain transformers generate, greedy, in a process of its own.

    In one process the two sides would slow each other down: each has a team of OpenMP threads.
    """

    def __init__(self, source: ModelSource, dtype: str, num_threads: int) -> None:
        self._process = ProcessPoolExecutor(
            1, get_context("spawn"), load_plain, (source.path, dtype, num_threads)
        )

    def answer(self, prompt: tuple[int, ...], num_tokens: int) -> Timed:
        return self._process.submit(generate_plain, prompt, num_tokens).result()

    def close(self) -> None:
        self._process.shutdown()


PLAIN: list[Any] = []
"""The network of the process that runs plain transformers."""


def load_plain(path: str, dtype: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    PLAIN.append(network.eval())


def generate_plain(prompt: tuple[int, ...], num_tokens: int) -> Timed:
    inputs, arrivals = torch.tensor([prompt]), Arrivals()
    started = time.perf_counter()
    with torch.inference_mode():
        PLAIN[0].generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            streamer=arrivals,
        )
    return Timed(started, tuple(arrivals.times), tuple(arrivals.tokens))


class Prompts:
    """Random prompts, each a new one, so that nothing is reused."""

    def __init__(self, vocab_size: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._vocab_size = vocab_size

    def next(self, num_tokens: int) -> tuple[int, ...]:
        ids = torch.randint(100, self._vocab_size, (num_tokens,), generator=self._generator)
        return tuple(ids.tolist())


def best_of(repeat: int, run: Callable[[], tuple[float, ...]]) -> list[float]:
    """The largest figure of each column over `repeat` runs, after one that is not counted."""
    run()
    return [max(column) for column in zip(*[run() for _ in range(repeat)], strict=True)]


def measure_single(
    engine: TorchEngine, plain: Plain, prompts: Prompts, length: int, repeat: int, new_tokens: int
) -> list[Figure]:
    """Prefill and decode of one request at a time."""

    def run() -> tuple[float, ...]:
        prompt = prompts.next(length)
        ours = asyncio.run(answer(engine, prompt, new_tokens))
        theirs = plain.answer(prompt, new_tokens)
        if ours.token_ids != theirs.token_ids:
            raise SystemExit("the engine's output is not that of transformers")
        return (
            length / ours.first_s,
            length / theirs.first_s,
            ours.decode_tokens_per_s,
            theirs.decode_tokens_per_s,
        )

    prefill, plain_prefill, decode, plain_decode = best_of(repeat, run)
    name = "transformers"
    return [
        Figure(f"prefill of {length} tokens", prefill, name, plain_prefill, 0.9),
        Figure(f"decode after {length} tokens", decode, name, plain_decode, 0.9),
    ]


def measure_batch(engine: TorchEngine, prompts: Prompts, repeat: int, new_tokens: int) -> Figure:
    def run() -> tuple[float, ...]:
        one = asyncio.run(answers(engine, [prompts.next(200)], new_tokens))
        many = [prompts.next(200) for _ in range(8)]
        return asyncio.run(answers(engine, many, new_tokens)), one

    eight, one = best_of(repeat, run)
    return Figure("decode of 8 requests", eight, "decode of 1 request", one, 2.5)


def measure_edit(engine: TorchEngine, repeat: int, new_tokens: int) -> Timed:
    """The fastest answer to the code edit of the demo's `ngram` scenario."""
    question = EDIT.format(text=read_text("length.py.txt"))
    chat = DemoPrompts(engine.tokenizer).chat([{"role": "user", "content": question}], EDIT_START)
    prompt = tuple(chat)
    answers = [asyncio.run(answer(engine, prompt, new_tokens)) for _ in range(1 + repeat)]
    return max(answers[1:], key=lambda timed: timed.decode_tokens_per_s)


def measure_ngram(plain: Timed, drafted: Timed) -> Figure:
    if drafted.token_ids != plain.token_ids:
        raise SystemExit("n-gram drafts changed the output")
    ours, baseline = drafted.decode_tokens_per_s, plain.decode_tokens_per_s
    return Figure("n-gram on a code edit", ours, "the same without drafts", baseline, 1.5)


def build(source: ModelSource, args: argparse.Namespace, ngram: NGramConfig | None) -> TorchEngine:
    engine = EngineConfig(dtype=args.dtype, torch_threads=args.threads, speculative_config=ngram)
    return build_torch_engine(ReplicaConfig(name="benchmark", model=source, engine=engine))


def measure(args: argparse.Namespace) -> list[Figure]:
    source = resolve_model(args.model)
    repeat, new_tokens = args.repeat, args.new_tokens
    engine = build(source, args, None)
    prompts = Prompts(len(engine.tokenizer))
    plain = Plain(source, args.dtype, args.threads)
    short = measure_single(engine, plain, prompts, 200, repeat, new_tokens)
    long = measure_single(engine, plain, prompts, 2000, repeat, new_tokens)
    plain.close()
    batch = measure_batch(engine, prompts, repeat, new_tokens)
    edit = measure_edit(engine, repeat, 3 * new_tokens)
    engine.close()
    drafting = build(source, args, NGramConfig())
    ngram = measure_ngram(edit, measure_edit(drafting, repeat, 3 * new_tokens))
    drafting.close()
    return [*short, *long, batch, ngram]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub id")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeat", type=int, default=3, help="runs per case")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    figures = measure(args)
    print(f"{'case':28} {'ours':>9} {'baseline':>9} {'ratio':>6} {'target':>6}   tokens/s")
    for f in figures:
        verdict = "" if f.ratio >= f.target_ratio else "  MISSED"
        print(
            f"{f.case:28} {f.ours_tokens_per_s:9.1f} {f.baseline_tokens_per_s:9.1f} "
            f"{f.ratio:6.2f} {f.target_ratio:6.1f}   against {f.baseline}{verdict}"
        )
    if args.json:
        write_json(report(args, figures), args.json)


def report(args: argparse.Namespace, figures: list[Figure]) -> dict[str, Any]:
    """The figures with what one has to know to make them again."""
    return {
        **provenance(),
        "options": {"model": args.model, "dtype": args.dtype, "threads": args.threads},
        "figures": [asdict(f) | {"ratio": f.ratio} for f in figures],
    }


if __name__ == "__main__":
    main()
