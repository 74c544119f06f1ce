"""The contract of the connector interface on a real TensorRT-LLM: what we read, is it so?

Run with `-s`: the diary of every test is printed, whether it passes or not. What is only printed is
an open question, what is asserted is what the connector relies on.
"""

import asyncio
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from actors.engines.trtllm.api import load_api
from actors.engines.trtllm.arguments import llm_arguments
from actors.engines.trtllm.build import IN_PROCESS
from actors.engines.trtllm.trial import common_part, trial_prompt
from shared_cache.config import CacheConfig
from shared_cache.connector import process

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

RECORDER = "tests.gpu_trtllm.recorder"
SIZE = 32
MANY = 10_000
CHUNKS_TIMEOUT_S = 60.0

Start = Callable[..., Any]


@pytest.fixture
def start(
    config: ReplicaConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Starts an `LLM` with the recording connector and a store of the test's own."""
    from tests.gpu_trtllm import recorder

    settings = tmp_path / "cache.yaml"
    settings.write_text(
        f"store: file://{tmp_path}/store\nhost: {{scope: process, bytes: 2GiB}}\n"
        f"revision: {config.model.revision}\nmatch_wait_s: 2.0\n"
    )
    monkeypatch.setenv("TLLM_SHARED_CACHE_CONFIG", str(settings))
    monkeypatch.setenv(IN_PROCESS, "1")
    running: list[Any] = []

    def start(**changes: Any) -> Any:
        recorder.DIARY.clear()
        api = load_api()
        shared = config.model_copy(update={"cache": CacheConfig()})
        arguments = llm_arguments(shared, api)
        arguments["kv_connector_config"] = api.connector_config(
            connector_module=RECORDER,
            connector_scheduler_class="RecordingScheduler",
            connector_worker_class="RecordingWorker",
        )
        running.append(api.llm(**{**arguments, **changes}))
        return running[-1]

    yield start
    for llm in running:
        llm.shutdown()
    while process.current_cache() is not None:
        process.leave_current()
    print(*recorder.DIARY, sep="\n")


def ask(llm: Any, tokens: tuple[int, ...], num_output: int = 4) -> Any:
    params = load_api().sampling_params(
        max_tokens=num_output, end_id=-1, pad_id=0, top_k=1, detokenize=False
    )
    return llm.generate({"prompt_token_ids": list(tokens)}, params, use_tqdm=False)


def test_the_order_of_calls_for_one_request(start: Start) -> None:
    from tests.gpu_trtllm.recorder import methods

    llm = start()
    assert methods().count("register") == 1
    before = len(methods())
    ask(llm, trial_prompt(4 * SIZE + 1))
    calls = [one for one in methods()[before:] if one != "poll" and "layer" not in one]
    assert calls[:5] == ["match", "alloc", "build", "load", "save"]
    assert calls.count("match") == calls.count("alloc") == 1


def test_a_prompt_that_is_loaded(start: Start) -> None:
    from tests.gpu_trtllm.recorder import DIARY

    tokens = trial_prompt(8 * SIZE + 1)
    first = start()
    cold = ask(first, tokens)
    cache = process.current_cache()
    assert cache is not None
    assert cache.flush(60.0)
    first.shutdown()
    second = start()
    warm = ask(second, tokens)
    (match,) = [entry for entry in DIARY if entry.method == "match"]
    assert f"answer ({8 * SIZE}, False)" in match.told
    print("cached_tokens after a connector hit:", getattr(warm, "cached_tokens", None))
    print("cold", cold.outputs[0].token_ids, "warm", warm.outputs[0].token_ids)


def test_a_prompt_in_chunks(start: Start) -> None:
    from tests.gpu_trtllm.recorder import DIARY

    llm = start(max_num_tokens=4 * SIZE)
    ask(llm, trial_prompt(10 * SIZE + 1))
    builds = [entry.told for entry in DIARY if entry.method == "build"]
    assert len(builds) >= 3


async def test_an_abort(start: Start) -> None:
    """Does an aborted request get `request_finished`? State must go either way."""
    from tests.gpu_trtllm.recorder import methods

    llm = start()
    params = load_api().sampling_params(max_tokens=500, end_id=-1, pad_id=0, top_k=1)
    result = llm.generate_async(
        {"prompt_token_ids": list(trial_prompt(2 * SIZE + 1))}, params, streaming=True
    )
    await anext(aiter(result))
    result.abort()
    async for _ in result:
        pass
    print("request_finished after an abort:", methods().count("finished"))
    again = llm.generate_async(
        {"prompt_token_ids": list(trial_prompt(SIZE + 1))},
        replace(params, max_tokens=2),
        streaming=True,
    )
    async for _ in again:
        pass
    assert again.finished


async def test_chunked_prefill_then_a_cancel_then_the_same_prompt(
    start: Start, tmp_path: Path
) -> None:
    """Upstream keeps the blocks of a cancelled prompt reusable, also those not computed yet.

    Printed: how much of the prompt was computed, and what the match of its repetition is told that
    the device has. Asserted: the repetition is answered as by an engine that computes all of it.
    """
    from tests.gpu_trtllm.recorder import DIARY, methods

    tokens = trial_prompt(64 * SIZE + 1)
    chunked = start(max_num_tokens=4 * SIZE)
    params = load_api().sampling_params(max_tokens=8, end_id=-1, pad_id=0, top_k=1)
    cancelled = chunked.generate_async({"prompt_token_ids": list(tokens)}, params, streaming=True)
    until_s = time.monotonic() + CHUNKS_TIMEOUT_S
    while methods().count("build") < 2 and time.monotonic() < until_s:
        await asyncio.sleep(0.001)
    cancelled.abort()
    async for _ in cancelled:
        pass
    print("chunks before the cancel:", methods().count("build"), "of 17")
    again = await asyncio.to_thread(ask, chunked, tokens, 8)
    print([entry.told for entry in DIARY if entry.method == "match"])
    chunked.shutdown()
    while process.current_cache() is not None:
        process.leave_current()
    shutil.rmtree(tmp_path / "store")  # the other engine loads nothing
    fresh = await asyncio.to_thread(ask, start(), tokens, 8)
    same = common_part(again.outputs[0].token_ids, fresh.outputs[0].token_ids)
    assert same >= 0.75, (again.outputs[0].token_ids, fresh.outputs[0].token_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_beam_width": 2},
        {"enable_attention_dp": True},
        {"pipeline_parallel_size": 2},
    ],
    ids=str,
)
def test_what_cannot_go_with_a_connector_is_refused(start: Start, changes: Any) -> None:
    with pytest.raises(Exception, match=r"(?i)connector|cache|not supported|parallel|beam"):
        start(**changes)


def test_memory_over_many_short_requests(start: Start) -> None:
    """Upstream keeps what it told the connector of every request; how much is that?"""
    llm = start()
    ask(llm, trial_prompt(SIZE), 1)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(MANY if os.environ.get("KVCOMMONS_TRTLLM_LONG") else 200):
        ask(llm, (index % 20_000 + 1000, *trial_prompt(SIZE)), 1)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    print(f"{grown_kib} KiB more")


def test_layer_hooks_and_cuda_graphs(start: Start) -> None:
    """Do hooks fire in decode turns while graphs are on? Nothing of ours depends on it."""
    from tests.gpu_trtllm.recorder import methods

    ask(start(), trial_prompt(2 * SIZE + 1), 8)
    print("layer hooks with graphs:", methods().count("before layer"))
