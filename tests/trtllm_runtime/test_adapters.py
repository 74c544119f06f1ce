"""The classes that a user names in TensorRT-LLM's configuration, under the double's executor.

Found and constructed as upstream does it, on base classes made from the recorded table of its
signatures; then driven as its executor drives them.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from shared_cache.connector import process
from tests.shared_cache.fakes import WAIT_S
from tests.shared_cache.trtllm_doubles import LLAMA, TABLE, NewArgs, OldArgs, make_args, save_model
from tests.shared_cache.trtllm_sides import configure, construct
from tests.shared_cache.trtllm_sides import installed as installed
from tests.trtllm_runtime.executor import Executor
from tests.trtllm_runtime.oracle import LAYOUT
from tests.trtllm_runtime.requests import Request
from tests.trtllm_runtime.rules import SIZE, Rules

PROMPT = tuple(range(9 * SIZE + 3))
SMALL = {
    **LLAMA,
    "hidden_size": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": LAYOUT.num_kv_heads,
    "num_hidden_layers": LAYOUT.num_layers,
    "head_dim": LAYOUT.head_dim,
    "torch_dtype": "float32",
}


@pytest.fixture
def engine(
    installed: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Rules], Executor]:
    monkeypatch.setenv("KVCOMMONS_CACHE_DIR", str(tmp_path / "user"))
    settings = "match_wait_s: 5\nhost: {scope: process, bytes: 4MiB}\ncost: {gate: false}"
    configure(tmp_path, monkeypatch, settings)
    model = save_model(tmp_path / "model", SMALL)

    def start(release: str, rules: Rules) -> Executor:
        kind = OldArgs if release == "1.2" else NewArgs
        llm_args = make_args(kind, model=model, tokens_per_block=SIZE)
        scheduler, worker = construct(installed(release), llm_args)
        return Executor(scheduler, [worker], rules)

    return start


def stop() -> None:
    """As the interpreter's exit does it, with time to write."""
    while (cache := process.current_cache()) is not None:
        assert cache.flush(WAIT_S)
        process.leave_current(WAIT_S)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("release", TABLE)
def test_a_second_engine_loads_what_the_first_has_stored(
    release: str, overlap: bool, engine: Callable[[str, Rules], Executor]
) -> None:
    rules = Rules(overlap=overlap, is_later=release != "1.2")
    first, again = Request(1, PROMPT, 9), Request(1, PROMPT, 9)
    for request in (first, again):
        executor = engine(release, rules)
        foreign = Request(2, PROMPT, 3, cache_salt="another tenant")
        executor.submit(request)
        executor.run()
        if request is first:
            executor.blocks.evict_all()
            executor.submit(foreign)
            executor.run()
            assert foreign.num_promised_tokens == 0
        stop()
    assert (first.num_promised_tokens, again.num_promised_tokens) == (0, 9 * SIZE)
    assert again.generated == first.generated


def test_every_callback_of_every_release_is_there(
    engine: Callable[[str, Rules], Executor],
) -> None:
    for release in TABLE:
        executor = engine(release, Rules(is_later=release != "1.2"))
        for side, methods in (
            (executor.manager.scheduler, TABLE[release]["KvCacheConnectorScheduler"]),
            (executor.manager.ranks[0].worker, TABLE[release]["KvCacheConnectorWorker"]),
        ):
            assert all(callable(getattr(side, name)) for name in methods)
        stop()
