"""Tokens per second on a code edit, with n-gram drafts and without, of a real small model.

python -m benchmarks.gpu.ngram --model FOLDER --json FILE
"""

import asyncio
import statistics
from typing import Any

from actors.config import EngineConfig, ModelSource, NGramConfig, ReplicaConfig
from actors.engines.torch.build import build_torch_engine
from benchmarks.engine import Timed, answer
from benchmarks.gpu.workbench import arguments, device, report
from cluster.demo.documents import read_text
from cluster.demo.ngram import EDIT, EDIT_START
from cluster.demo.prompts import Prompts
from cluster.models import resolve_model


def measure(source: ModelSource, ngram: NGramConfig | None, options: Any) -> list[Timed]:
    """The same edit some times over; the first answer warms up."""
    engine = build_torch_engine(
        ReplicaConfig(
            name="ngram",
            model=source,
            engine=EngineConfig(device=device(), speculative_config=ngram),
        )
    )
    try:
        question = EDIT.format(text=read_text("length.py.txt"))
        chat = Prompts(engine.tokenizer).chat([{"role": "user", "content": question}], EDIT_START)
        answers = [
            asyncio.run(answer(engine, tuple(chat), options.new_tokens))
            for _ in range(1 + options.rounds)
        ]
        if ngram is not None:
            stats = engine.stats()
            print(stats.accepted_draft_tokens, "of", stats.proposed_draft_tokens, "drafts")
        return answers[1:]
    finally:
        engine.close()


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    source = resolve_model(options.model)
    plain = measure(source, None, options)
    drafted = measure(source, NGramConfig(), options)
    speeds = [
        statistics.median(one.decode_tokens_per_s for one in timed) for timed in (plain, drafted)
    ]
    pairs = zip(plain[0].token_ids, drafted[0].token_ids, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(plain[0].token_ids))
    figures = {
        "plain_tokens_per_s": speeds[0],
        "ngram_tokens_per_s": speeds[1],
        "ngram_speedup": speeds[1] / speeds[0],
        "common_prefix_tokens": equal,
        "new_tokens": options.new_tokens,
        "model": source.name,
    }
    print(figures)
    report(figures, options.json)


if __name__ == "__main__":
    main()
