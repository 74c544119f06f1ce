"""How long a decoding step takes, by batch size, on contexts of about 1,000 tokens.

python -m benchmarks.gpu.decode --json FILE
"""

import asyncio
import statistics
from itertools import pairwise

from actors.config import ReplicaConfig
from actors.replica import EngineReplica
from benchmarks.gpu.workbench import (
    arguments,
    ask,
    engine_config,
    percentile,
    random_prompt,
    replica_config,
    report,
    scratch,
    shape,
    write_model,
)

BATCHES = (1, 8, 16, 32, 64)


async def step_times(replica: EngineReplica, batch: int, context: int, steps: int) -> list[float]:
    """Seconds between the tokens of one request while all `batch` requests decode."""
    wanted = shape()
    prompts = [random_prompt(context, 1000 * batch + i, wanted) for i in range(batch)]
    # The later a request starts, the fewer tokens it has when the first one ends: all get the
    # same number, and only the time in which all of them decode counts.
    answers = await asyncio.gather(
        *[ask(replica, prompt, steps, f"{batch}-{i}") for i, prompt in enumerate(prompts)]
    )
    start_s = max(answer.arrivals_s[0] for answer in answers)
    end_s = min(answer.arrivals_s[-1] for answer in answers)
    within = [at for at in answers[0].arrivals_s if start_s < at <= end_s]
    return [after - before for before, after in pairwise(within)]


async def measure(config: ReplicaConfig, context: int, steps: int) -> dict[str, dict[str, float]]:
    replica = EngineReplica(config)
    found = {}
    try:
        await replica.ready()
        await step_times(replica, 1, context, 16)
        for batch in BATCHES:
            seconds = await step_times(replica, batch, context, steps)
            found[str(batch)] = {
                "median_ms": statistics.median(seconds) * 1000,
                "p99_ms": percentile(seconds, 99) * 1000,
                "steps": len(seconds),
            }
            print(batch, found[str(batch)])
    finally:
        await replica.close()
    return found


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    pool_tokens = max(BATCHES) * (options.context + options.steps + 64)
    with scratch() as folder:
        source = write_model(folder, shape())
        config = replica_config("decode", source, engine_config(shape(), pool_tokens), None)
        found = asyncio.run(measure(config, options.context, options.steps))
    report({"decode": found, "context": options.context}, options.json)


if __name__ == "__main__":
    main()
