"""The demonstration in Ray on this machine's GPUs: offloading, and conversations by routing rule.

The scenario `offload` as it is, with a model of Llama-3.1-8B's shape; then conversations about long
documents: one replica, and as many as asked for, by routing rule, each replica with as many
clients, all over one shared cache that begins empty. Replicas may share a GPU. Without one a tiny
model runs on the CPU.

    python -m benchmarks.gpu.cluster_load --replicas 2 --gpus-per-replica 0.5 --json FILE
"""

import asyncio
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.config import ModelSource
from benchmarks.gpu.ttft import GIB
from benchmarks.gpu.workbench import (
    TINY,
    TOKENS_PER_BLOCK,
    arguments,
    engine_config,
    report,
    scratch,
    shape,
    write_model,
)
from cluster.config import ClusterConfig
from cluster.demo.console import Screen
from cluster.demo.conversations import hold_conversations
from cluster.demo.documents import Document, load_documents
from cluster.demo.load import blocks_from_peers, figures_of
from cluster.demo.offload import run_offload
from cluster.demo.prompts import Prompts
from cluster.demo.runtime import ray_session, serve
from cluster.demo.scenario import Demo, Options
from cluster.demo.setups import setup
from cluster.demo.sizes import LoadSizes, Sizes, fitted_sizes
from cluster.demo.traffic import num_requests, plan_traffic

NUM_DOCUMENTS = 8
TURNS = 2
TOKENS_PER_WARM_UP = 64


def documents(num_tokens: int) -> list[Document]:
    """Texts of at least so many bytes, this model's tokens; no two begin alike."""
    known = load_documents()
    found = []
    for number in range(NUM_DOCUMENTS):
        order = [*known[number % len(known) :], *known[: number % len(known)]]
        text = f"Number {number}. " + " ".join(one.text for one in order)
        copies = -(-num_tokens // len(text.encode()))
        found.append(replace(order[0], name=f"document-{number}", text=" ".join([text] * copies)))
    return found


def sizes(options: Any) -> Sizes:
    """The demonstration's, with traffic of the asked size."""
    load = LoadSizes(
        num_documents=NUM_DOCUMENTS,
        document_tokens=options.document,
        num_clients=options.clients,
        conversations_per_client=options.conversations,
        turns_per_conversation=TURNS,
        output_tokens=options.answer,
        pool_requests=options.pool_requests,
    )
    return replace(fitted_sizes(2 * options.document + 2048, TOKENS_PER_BLOCK), load=load)


def base_config(options: Any, model: ModelSource, store: Path) -> ClusterConfig:
    wanted = shape()
    is_dry = wanted == TINY
    pool_tokens = sizes(options).load.pool_tokens(TOKENS_PER_BLOCK)
    engine = engine_config(wanted, pool_tokens, max_batch_size=max(8, 2 * options.clients))
    return ClusterConfig.model_validate(
        {
            "name": "gpu",
            "model": model.path,
            "num_cpus_per_replica": 0.5 if is_dry else 2,
            "num_gpus_per_replica": 0 if is_dry else options.gpus_per_replica,
            "engine": engine.model_dump(),
            "cache": {
                "store": f"file://{store}",
                "host": {"bytes": 1 << 27 if is_dry else options.arena_gib * GIB, "populate": True},
                "save_queue_bytes": 1 << 26 if is_dry else 8 * GIB,
                "cost": {"gate": not is_dry},
            },
        }
    )


async def conversations(demo: Demo, config: ClusterConfig) -> dict[str, Any]:
    """Requests a second, times to first token, and where the prompts' tokens came from."""
    load = demo.sizes.load
    clients = config.replicas * load.num_clients
    scripts = plan_traffic(
        documents(load.document_tokens),
        demo.options.seed,
        clients,
        load.conversations_per_client,
        load.turns_per_conversation,
    )
    first = plan_traffic(documents(TOKENS_PER_WARM_UP), 1, clients, 1, 1)
    small = replace(
        demo, sizes=replace(demo.sizes, load=replace(load, document_tokens=TOKENS_PER_WARM_UP))
    )
    async with demo.serve(config) as serving:
        await hold_conversations(small, serving.dispatcher, first, lambda: None)
        started_s = time.perf_counter()
        answers = await hold_conversations(demo, serving.dispatcher, scripts, lambda: None)
        wall_s = time.perf_counter() - started_s
        figures = figures_of(list(answers.values()), wall_s, await blocks_from_peers(serving))
    if len(answers) < num_requests(scripts):
        raise SystemExit(f"{num_requests(scripts) - len(answers)} requests were lost")
    found = {**asdict(figures), "requests_per_s": len(answers) / wall_s}
    return {**found, "replicas": config.replicas, "clients": clients}


async def measure(options: Any, demo: Demo, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not options.no_offload:
        found["offload"] = (await run_offload(demo)).as_json()
    runs = [("one replica", 1, options.rules[0])]
    many = options.replicas
    runs += [(f"{many} replicas, {rule}", many, rule) for rule in options.rules]
    for number, (name, replicas, rule) in enumerate(runs):
        cache, router = {"store": f"file://{folder / str(number)}"}, {"policy": rule}
        config = setup(demo.config, f"load-{number}", replicas, cache=cache, router=router)
        found.setdefault("load", {})[name] = one = await conversations(demo, config)
        shown = ("requests_per_s", "ttft_p50_s", "ttft_p90_s", "tokens_from")
        print(name, {key: one[key] for key in shown}, flush=True)
    one, *others = found["load"].values()
    found["requests_ratio"] = others[0]["requests_per_s"] / one["requests_per_s"]
    found["ttft_p90_ratio"] = others[0]["ttft_p90_s"] / one["ttft_p90_s"]
    return found


def main() -> None:
    """Measure, print, and write the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus-per-replica", type=float, default=1.0)
    parser.add_argument("--rules", nargs="+", default=["least_cost", "round_robin"])
    parser.add_argument("--document", type=int, default=8192, help="tokens of a document")
    parser.add_argument("--clients", type=int, default=8, help="clients of each replica")
    parser.add_argument("--conversations", type=int, default=4, help="of each client")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--pool-requests", type=float, default=12.0, help="that a pool holds")
    parser.add_argument("--arena-gib", type=int, default=24)
    parser.add_argument("--store", type=Path, help="folder for the store (default: temporary)")
    parser.add_argument("--no-offload", action="store_true", help="conversations alone")
    options = parser.parse_args()
    with scratch() as folder, scratch(options.store) as store, ray_session() as which_ray:
        print(which_ray)
        model = write_model(folder, shape())
        demo = Demo(
            config=base_config(options, model, store),
            model=model,
            prompts=Prompts.of_model(model),
            sizes=sizes(options),
            screen=Screen(),
            report_dir=folder,
            options=Options(),
            serve=partial(serve, model=model),
        )
        found = asyncio.run(measure(options, demo, store))
    print({name: found[name] for name in ("requests_ratio", "ttft_p90_ratio")})
    report({**found, "gpus_per_replica": options.gpus_per_replica}, options.json)


if __name__ == "__main__":
    main()
