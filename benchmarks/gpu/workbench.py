"""What the GPU benchmarks share: a model of Llama-3.1-8B's shape, and replicas in processes.

The weights are random and seeded, made on the device: speed does not depend on them. Without a GPU
the same scripts run a tiny shape, which shows that they run and nothing else.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from actors.config import CudaGraphConfig, EngineConfig, KvCacheConfig, ModelSource, ReplicaConfig
from actors.engine import GenerationRequest, Receipt, SamplingParams
from actors.replica import EngineReplica
from benchmarks.provenance import provenance
from cluster.demo.report import write_json
from shared_cache.cache_stats import CacheStats
from shared_cache.config import CacheConfig

TOKENS_PER_BLOCK = 32
GPU = "cuda"
START_S = 300.0


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, and the lengths that are measured with it."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_num_tokens: int


LLAMA_8B = Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256, 8192)
TINY = Shape("tiny", 64, 128, 2, 4, 2, 16, 512, 256)


def shape() -> Shape:
    """Of what this machine can measure."""
    return LLAMA_8B if torch.cuda.is_available() else TINY


def device() -> str:
    return GPU if torch.cuda.is_available() else "cpu"


def write_model(folder: Path, wanted: Shape) -> ModelSource:
    """Configuration and a byte-level tokenizer; no weights (`load_format: dummy`)."""
    config = LlamaConfig(
        hidden_size=wanted.hidden_size,
        intermediate_size=wanted.intermediate_size,
        num_hidden_layers=wanted.num_hidden_layers,
        num_attention_heads=wanted.num_attention_heads,
        num_key_value_heads=wanted.num_key_value_heads,
        head_dim=wanted.head_dim,
        vocab_size=wanted.vocab_size,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(("<pad>", "<bos>", "<eos>", *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.save_pretrained(folder)
    return ModelSource(name=wanted.name, path=str(folder), revision="dummy")


def engine_config(wanted: Shape, pool_tokens: int, **changes: Any) -> EngineConfig:
    """An engine of dummy weights on this machine's device."""
    settings = {
        "device": device(),
        "load_format": "dummy",
        "max_batch_size": 64,
        "max_num_tokens": wanted.max_num_tokens,
        "cuda_graph_config": CudaGraphConfig(max_num_tokens=256),
        "kv_cache_config": KvCacheConfig(tokens_per_block=TOKENS_PER_BLOCK, max_tokens=pool_tokens),
    }
    return EngineConfig.model_validate({**settings, **changes})


def random_prompt(num_tokens: int, seed: int, wanted: Shape) -> tuple[int, ...]:
    """Tokens that no other seed has in this order."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(3, wanted.vocab_size, num_tokens).tolist())


@dataclass(frozen=True)
class Answer:
    """One request: seconds to its first token, when each later chunk came, and what it was."""

    first_s: float
    arrivals_s: tuple[float, ...]
    tokens: tuple[int, ...]
    receipt: Receipt


async def ask(replica: EngineReplica, prompt: Sequence[int], num_tokens: int, name: str) -> Answer:
    """Stage, compute and stream, as a caller in the same process sees it."""
    sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    request = GenerationRequest(name, tuple(prompt), sampling)
    start_s, arrivals, tokens, receipt = time.perf_counter(), [], [], None
    async for chunk in replica.generate(request):
        arrivals.append(time.perf_counter())
        tokens += chunk.token_ids
        receipt = receipt or chunk.receipt
    assert receipt is not None
    return Answer(arrivals[0] - start_s, tuple(arrivals), tuple(tokens), receipt)


class ReplicaProcess:
    """A replica in a process of its own, as Ray would have it, asked one thing at a time."""

    def __init__(self, config: ReplicaConfig, gpu: int | None = None) -> None:
        """`gpu` is the only device that it sees; None: all."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, theirs, gpu), daemon=True)
        self._process.start()

    def wait(self) -> None:
        """Until the engine is built."""
        self._result(START_S)

    def ask(self, prompt: Sequence[int], num_tokens: int = 1) -> Answer:
        self._connection.send(("ask", prompt, num_tokens))
        answer: Answer = self._result(START_S)
        return answer

    def begin_clients(self, prompts: Sequence[Sequence[int]], at_once: int, tokens: int) -> None:
        """Ask `prompts` in order, so many at once; `end_clients` brings the answers."""
        self._connection.send(("clients", prompts, at_once, tokens))

    def end_clients(self) -> list[Answer]:
        answers: list[Answer] = self._result(START_S)
        return answers

    def flush(self) -> None:
        """Until everything saved is in the host tier and the stores."""
        self._connection.send(("flush",))
        if not self._result(START_S):
            raise SystemExit("saves were not written in time")

    def cache_stats(self) -> CacheStats:
        """What its cache has counted."""
        self._connection.send(("stats",))
        stats: CacheStats = self._result(START_S)
        return stats

    def close(self) -> None:
        self._connection.send(("close",))
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _result(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise SystemExit("a replica does not answer")
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _serve(config: ReplicaConfig, connection: Connection, gpu: int | None) -> None:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    asyncio.run(_serve_all(config, connection))


async def _serve_all(config: ReplicaConfig, connection: Connection) -> None:
    replica = EngineReplica(config)
    try:
        await replica.ready()
        connection.send("ready")
        while True:
            what, *arguments = await asyncio.to_thread(connection.recv)
            if what == "close":
                return
            connection.send(await _done(replica, what, arguments))
    except Exception as error:
        connection.send(error)
    finally:
        await replica.close()


async def _clients(
    replica: EngineReplica, prompts: Sequence[Sequence[int]], at_once: int, num_tokens: int
) -> list[Answer]:
    left = iter(enumerate(prompts))
    answers: list[Answer] = []

    async def client() -> None:
        for index, prompt in left:
            answers.append(await ask(replica, prompt, num_tokens, f"client-{index}"))

    await asyncio.gather(*[client() for _ in range(at_once)])
    return answers


async def _done(replica: EngineReplica, what: str, arguments: list[Any]) -> Any:
    if what == "ask":
        return await ask(replica, *arguments, "benchmark")
    if what == "clients":
        return await _clients(replica, *arguments)
    if what == "flush":
        return await replica.flush(240.0)
    stats = await replica.stats()
    assert stats.cache is not None
    return stats.cache


@contextmanager
def scratch(root: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kvcommons-gpu-", dir=root) as name:
        yield Path(name)


def replica_config(
    name: str, source: ModelSource, engine: EngineConfig, cache: CacheConfig | None
) -> ReplicaConfig:
    return ReplicaConfig(name=name, model=source, engine=engine, cache=cache)


def median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1000, 2)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def report(figures: dict[str, Any], path: Path | None) -> None:
    """Write what was found, and on what."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu (dry run)"
    if path is not None:
        write_json({**figures, "device": name, "shape": shape().name, **provenance()}, path)
