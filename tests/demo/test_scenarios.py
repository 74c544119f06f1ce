"""The scenarios' parts without a cluster: set-ups, clocks, conversations, and honest verdicts."""

import dataclasses
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from pydantic import ValidationError

from actors.config import EngineConfig, ModelSource
from actors.dispatch import RoutedChunk
from actors.engine import GenerationRequest, Receipt, TokenChunk
from cluster.config import ClusterConfig
from cluster.demo.__main__ import parse_arguments
from cluster.demo.asking import ask
from cluster.demo.chaos import KillOnce
from cluster.demo.conversations import hold_conversations
from cluster.demo.documents import Document
from cluster.demo.load import LoadResult, ModeFigures, _rule_setups
from cluster.demo.ngram import NGramResult, PromptFigures
from cluster.demo.offload import OffloadFigures, OffloadResult
from cluster.demo.rules import print_rules
from cluster.demo.scenario import Demo, Options, greedy
from cluster.demo.setups import fresh_cache, kv_cache_bytes, roomy_pool, setup
from cluster.demo.share import ShareResult
from cluster.demo.sizes import fitted_sizes
from cluster.demo.traffic import plan_traffic
from shared_cache.config import CacheConfig, HostConfig
from shared_cache.errors import ReplicaUnavailableError

CONFIG = ClusterConfig(
    model="tiny",
    replicas=3,
    engine=EngineConfig(dtype="bfloat16", max_batch_size=5),
    cache=CacheConfig(store="file:///demo", host=HostConfig(bytes=1000), staging_deadline_s=9.0),
)


class FakeAsks:
    """Answers every request with its own prompt, a token a chunk; `fails` names lost requests."""

    def __init__(self, fails: frozenset[str] = frozenset()) -> None:
        self.fails = fails
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RoutedChunk, None]:
        self.requests.append(request)
        if request.request_id in self.fails:
            raise ReplicaUnavailableError("all are gone")
        num_tokens = len(request.prompt_token_ids)
        receipt = Receipt(num_tokens, 0, 0, 0, num_tokens)
        yield RoutedChunk(TokenChunk((), "", receipt=receipt), "r0")
        yield RoutedChunk(TokenChunk((1,), "one "), "r0")
        yield RoutedChunk(TokenChunk((2, 3), "two", num_accepted=1), "r1", num_failovers=1)
        yield RoutedChunk(TokenChunk((), "", finish_reason="length"), "r1", num_failovers=1)


class WordPrompts:
    """Conversations as tuples of word lengths; what was said can be read back from `said`."""

    def __init__(self) -> None:
        self.said: list[list[str]] = []

    def chat(self, messages) -> tuple[int, ...]:
        self.said.append([message["content"] for message in messages])
        return tuple(len(word) for message in messages for word in message["content"].split())

    def cut(self, text: str, num_tokens: int) -> str:
        return " ".join(text.split()[:num_tokens])


def demo_with(prompts: WordPrompts) -> Demo:
    sizes = fitted_sizes(2048, 16)
    load = dataclasses.replace(sizes.load, document_tokens=2)
    return Demo(
        config=CONFIG,
        model=ModelSource(name="m", path="", revision=""),
        prompts=prompts,
        sizes=dataclasses.replace(sizes, load=load),
        screen=None,
        report_dir=Path(),
        options=None,
        serve=None,
    )


async def test_an_answer_is_timed_and_put_together() -> None:
    seen: list[str] = []
    answer = await ask(FakeAsks(), greedy("r", (1, 2, 3), 8), lambda chunk: seen.append(chunk.text))
    assert (answer.text, answer.token_ids) == ("one two", (1, 2, 3))
    assert seen == ["", "one ", "two", ""]
    assert answer.receipt.computed == 3
    assert (answer.num_accepted, answer.num_failovers, answer.replica_id) == (1, 1, "r1")
    assert 0 < answer.ttft_s <= answer.total_s
    assert answer.tokens_per_s == 3 / answer.total_s


async def test_chaos_kills_once_in_the_middle_of_a_later_answer() -> None:
    asks, killed = FakeAsks(), []
    chaos = KillOnce(asks, killed.append, after_requests=1)
    await ask(chaos, greedy("first", (1,), 8))
    assert killed == []
    at_kill: list[list[str]] = []
    await ask(chaos, greedy("second", (1,), 8), lambda chunk: at_kill.append(list(killed)))
    assert at_kill == [[], ["r0"], ["r0"], ["r0"]]
    await ask(chaos, greedy("third", (1,), 8))
    assert killed == ["r0"]
    assert chaos.killed == "r0"


async def test_every_turn_sends_what_was_said_before() -> None:
    document = Document("d", "t", "long text here", ("why?", "when?"))
    prompts, answered = WordPrompts(), []
    scripts = plan_traffic([document], 0, 1, 1, 2)
    answers = await hold_conversations(
        demo_with(prompts), FakeAsks(), scripts, lambda: answered.append(1)
    )
    first, second = scripts[0].conversations[0].questions
    assert prompts.said == [
        [f"long text\n\n{first}"],
        [f"long text\n\n{first}", "one two", second],
    ]
    assert list(answers) == ["client-0.0.0", "client-0.0.1"]
    assert len(answered) == 2


async def test_a_lost_request_is_missed_and_the_others_go_on() -> None:
    document = Document("d", "t", "text", ("why?", "when?"))
    scripts = plan_traffic([document], 0, 2, 2, 2)
    asks = FakeAsks(frozenset({"client-0.0.0"}))
    answers = await hold_conversations(demo_with(WordPrompts()), asks, scripts, lambda: None)
    lost = {"client-0.0.0", "client-0.0.1"}
    everything = {f"client-{c}.{n}.{t}" for c in range(2) for n in range(2) for t in range(2)}
    assert set(answers) == everything - lost


def test_a_setup_changes_only_what_it_names() -> None:
    changed = setup(CONFIG, "x", 1, engine={"kv_cache_config": {"max_tokens": 64}}, cache=None)
    assert changed.engine.kv_cache_config.max_tokens == 64
    assert changed.engine.max_batch_size == 5
    assert changed.engine.kv_cache_config.tokens_per_block == 32
    assert changed.cache is None
    assert changed.replicas == 1
    assert changed.name != setup(CONFIG, "x", 1).name
    assert setup(CONFIG, "x", 2).cache == CONFIG.cache


def test_a_setup_is_validated_like_a_file() -> None:
    with pytest.raises(ValidationError, match="no_such"):
        setup(CONFIG, "x", 1, engine={"no_such": 1})


def test_the_demo_never_writes_to_the_users_store(tmp_path: Path) -> None:
    cache = fresh_cache(CONFIG, tmp_path, reserve_bytes=5000)
    assert cache.store == f"file://{tmp_path}"
    assert cache.host.bytes == 5000
    assert cache.save_queue_bytes == CacheConfig().save_queue_bytes
    assert cache.staging_deadline_s == 9.0


def test_a_pool_is_made_large_enough_and_never_smaller() -> None:
    assert roomy_pool(CONFIG, 10)["max_tokens"] == CONFIG.engine.kv_cache_config.pool_tokens
    assert roomy_pool(CONFIG, 20_000)["max_tokens"] >= 20_000


@pytest.mark.parametrize(("extra", "values"), [({}, 8 * 2), ({"head_dim": 32}, 32 * 2)])
def test_bytes_of_a_token(tmp_path: Path, extra: dict[str, int], values: int) -> None:
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "num_hidden_layers": 3, **extra}))
    model = ModelSource(name="m", path=str(tmp_path), revision="")
    assert kv_cache_bytes(model, EngineConfig(dtype="float16"), 10) == 10 * 3 * 2 * values * 2


SHARE = ShareResult(2000, 0, 62, 6.0, 0.2, True)
OFFLOAD = OffloadResult(
    OffloadFigures(0, 60, 0.0, (1.0,) * 4), OffloadFigures(30, 30, 0.5, (1.0,) * 4), True
)
EDIT = PromptFigures(20.0, 50.0, 100, 180, True)
MODE = ModeFigures(1.2, 1.0, 1.5, 2.0, 5.0, 100, {}, 0, 10, 0, 9.0)
LOAD = LoadResult(
    {"none": MODE, "local": MODE, "shared": dataclasses.replace(MODE, prefill_tokens_computed=40)},
    num_lost=0,
    identical_output=True,
    chaos=True,
    killed="demo-replica-1",
    chart="load.png",
)


@pytest.mark.parametrize("good", [SHARE, OFFLOAD, NGramResult({"edit": EDIT}), LOAD])
def test_a_good_result_has_no_failures_and_a_summary(good) -> None:
    assert good.failures() == []
    assert len(good.summary()) > 60


def changed(result, **fields):
    return dataclasses.replace(result, **fields)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (changed(SHARE, matched_blocks_first=1), "first replica"),
        (changed(SHARE, matched_blocks_second=0), "second replica"),
        (changed(SHARE, identical_output=False), "differ"),
        (changed(OFFLOAD, disabled=OFFLOAD.enabled), "without offloading"),
        (changed(OFFLOAD, enabled=OFFLOAD.disabled), "with offloading"),
        (changed(OFFLOAD, identical_output=False), "changed an output"),
        (NGramResult({"edit": changed(EDIT, accepted_drafts=0)}), "no draft"),
        (NGramResult({"edit": EDIT, "s": changed(EDIT, identical_output=False)}), "the s prompt"),
        (changed(LOAD, num_lost=2), "2 requests"),
        (changed(LOAD, identical_output=False), "changed an output"),
        (changed(LOAD, killed=None), "to kill"),
        (changed(LOAD, modes=dict.fromkeys(LOAD.modes, MODE)), "sharing computed 100"),
    ],
)
def test_every_broken_expectation_is_named(bad, named: str) -> None:
    (failure,) = bad.failures()
    assert named in failure


def test_without_chaos_a_near_tie_that_flips_is_reported_but_no_failure() -> None:
    result = changed(LOAD, chaos=False, killed=None, identical_output=False)
    assert result.failures() == []
    assert result.as_json()["identical_output"] is False
    assert result.as_json()["shared"]["prefill_tokens_computed"] == 40


def test_routing_rules_are_named_in_a_list_and_an_unknown_one_is_refused(capsys) -> None:
    assert parse_arguments([]).router == ()
    named = parse_arguments(["--router", "least_cost,round_robin,least_cost"]).router
    assert named == ("least_cost", "round_robin")
    with pytest.raises(SystemExit):
        parse_arguments(["--router", "least_cost,fastest"])
    assert "unknown: fastest" in capsys.readouterr().err


def test_compared_rules_are_in_the_report_and_beside_each_other_in_the_table() -> None:
    rules = {
        "least_cost": {"alone": MODE, "shared": MODE},
        "random": {"alone": changed(MODE, prefill_tokens_computed=77), "shared": MODE},
    }
    report = changed(LOAD, rules=rules).as_json()
    assert report["rules"]["random"]["alone"]["prefill_tokens_computed"] == 77
    tables = []

    class TableScreen:
        def table(self, title, columns, rows) -> None:
            tables.append(rows)

    print_rules(TableScreen(), rules)
    assert [row[:3] for row in tables[0]] == [
        ("least_cost", "alone", "100"),
        ("random", "alone", "77"),
        ("least_cost", "shared cache", "100"),
        ("random", "shared cache", "100"),
    ]


def test_a_single_rule_is_not_compared_with_anything() -> None:
    demo = dataclasses.replace(demo_with(WordPrompts()), options=Options(routers=("random",)))
    assert _rule_setups(demo, Path("store")) == {}
