"""Keys, tenants and limits over HTTP: who may come in, and whose blocks a request may meet."""

import os
import re
import time

import httpx
import openai
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.endpoint import keys as keys_module
from cluster.endpoint.access import Access
from cluster.endpoint.keys import (
    KeyRing,
    KeysDocument,
    KeysFile,
    hash_key,
    new_key,
    parse_keys,
    read_keys,
    with_quotas,
)
from cluster.endpoint.limits import TenantBooks
from cluster.endpoint.refusals import RateLimitedError, UnauthorizedError
from cluster.endpoint.tenants import EVERYBODY, Tenant
from shared_cache.errors import ConfigError
from shared_cache.hashing import ReuseScope, block_hashes
from shared_cache.upkeep.whole_store import WholeStore
from tests.endpoint.conftest import BLOCK, HOST, serving

DOCUMENT_TEXT = "The quick brown fox jumps over the lazy dog; it sleeps on. " * 3
NAMES = ("red", "blue", "green", "teal", "few", "boss")


def make_document() -> tuple[KeysDocument, dict[str, str]]:
    """Tenants alone, in a group and with limits; one key each, that of `boss` an admin's."""
    made = {name: new_key() for name in NAMES}
    document = {
        "groups": {
            "library": {"salt": "salt-of-library", "host_bytes": "1MiB", "store_bytes": "3MiB"}
        },
        "tenants": {
            "red": {"salt": "salt-of-red", "host_bytes": "2MiB", "store_bytes": "4MiB"},
            "blue": {"salt": "salt-of-blue"},
            "green": {"salt": "salt-of-green", "group": "library"},
            "teal": {"salt": "salt-of-teal", "group": "library"},
            "few": {"salt": "salt-of-few", "requests_per_minute": 2, "max_concurrent": 2},
            "boss": {"salt": "salt-of-boss"},
        },
        "keys": [
            {"id": key_id, "tenant": name, "sha256": digest, "admin": name == "boss"}
            for name, (_, key_id, digest) in made.items()
        ],
    }
    return KeysDocument.model_validate(document), {name: key for name, (key, *_) in made.items()}


@pytest.fixture(scope="module")
def keyed(model_path, tmp_path_factory):
    document, secrets = make_document()
    store = str(tmp_path_factory.mktemp("store"))
    with serving(model_path, document, cache={"store": store, "host": HOST}) as served:
        served.secrets, served.store = secrets, store
        with httpx.Client(base_url=served.url, timeout=60) as served.http:
            yield served


def ask(served, name: str, prompt: str = DOCUMENT_TEXT, **body) -> int:
    """Prompt tokens that were cached for this tenant."""
    headers = {"Authorization": f"Bearer {served.secrets[name]}"}
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 2, **body}
    answer = served.http.post("/v1/completions", json=asked, headers=headers)
    assert answer.status_code == 200, answer.text
    served.flush()
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_tenants_hit_their_own_blocks_and_never_each_others(keyed):
    for name in ("red", "blue"):
        assert ask(keyed, name) == 0, "nobody of this tenant has asked"
    for name in ("red", "blue"):
        assert all(ask(keyed, name) > 0 for _ in range(3)), "on both replicas, through the store"


def test_a_group_shares_and_a_salt_of_the_client_narrows(keyed):
    text = "Shared: " + DOCUMENT_TEXT
    assert ask(keyed, "green", text) == 0
    assert ask(keyed, "teal", text) > 0
    assert ask(keyed, "red", text) == 0
    assert ask(keyed, "green", text, cache_salt="mine") == 0
    assert ask(keyed, "teal", text, cache_salt="mine") == 0, "not even with the same salt"
    assert ask(keyed, "red", text, cache_salt="salt-of-green") == 0
    assert ask(keyed, "red", text, cache_salt="group:salt-of-library") == 0
    assert ask(keyed, "green", text, cache_salt="mine") > 0


@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Bearer x", "Basic abc", "Bearer kvc-000000000000-x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_no_key_and_wrong_keys_are_401(keyed, sent, path):
    headers = {} if sent is None else {"Authorization": sent}
    answer = keyed.http.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_every_route_with_a_body_wants_a_key(keyed):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert keyed.http.post(path, content=b"{").status_code == 401


def test_health_needs_no_key(keyed):
    assert keyed.http.get("/health").status_code == 200
    assert keyed.http.get("/ready").status_code == 200


def test_openais_client_knows_the_error(keyed):
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="not known"),
    ):
        client.models.list()


def test_a_rate_limit_tells_when_to_come_again(keyed):
    headers = {"Authorization": f"Bearer {keyed.secrets['few']}"}
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    answers = [keyed.http.post("/v1/completions", json=asked, headers=headers) for _ in range(3)]
    assert [one.status_code for one in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert ask(keyed, "red") >= 0, "others are not held up"


def test_limits_of_one_tenant():
    tenant = Tenant("slow", "s", requests_per_minute=6, max_concurrent=2)
    books = TenantBooks()
    books.enter(tenant, 1.0, 0.0)
    books.enter(tenant, 1.0, 0.0)
    with pytest.raises(RateLimitedError, match="2 choices running"):
        books.enter(tenant, 1.0, 0.0)
    for _ in range(4):
        books.leave()
        books.enter(tenant, 1.0, 0.0)
    books.leave()
    with pytest.raises(RateLimitedError, match="6 a minute") as caught:
        books.enter(tenant, 1.0, 5.0)
    assert caught.value.retry_after_s == pytest.approx(5.0)
    books.enter(tenant, 1.0, 10.0)


def test_two_ingresses_share_a_limit():
    tenant = Tenant("t", "s", requests_per_minute=60, max_concurrent=10)
    books = TenantBooks()
    for _ in range(5):
        books.enter(tenant, 0.5, 0.0)
    with pytest.raises(RateLimitedError, match="max_concurrent: 10"):
        books.enter(tenant, 0.5, 0.0)
    for _ in range(25):
        books.leave()
        books.enter(tenant, 0.5, 0.0)
    books.leave()
    with pytest.raises(RateLimitedError, match="30 a minute here"):
        books.enter(tenant, 0.5, 0.0)


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9))
def test_two_tenants_have_no_scope_in_common(one: str, other: str):
    red, blue = Tenant("red", "tenant:red"), Tenant("blue", "tenant:blue", "group:g")
    scopes = [tenant.scope(salt) for tenant in (red, blue) for salt in (None, one, other)]
    mine, theirs = set(scopes[:3]), set(scopes[3:])
    assert not mine & theirs
    assert len(mine) == 2 + (one != other)
    assert {scope.tenant for scope in mine} == {ReuseScope("tenant:red").tenant}, "one pays"
    assert EVERYBODY.scope(None) == ReuseScope()


def test_a_document_holds_no_key_and_its_errors_tell_none(tmp_path):
    document, secrets = make_document()
    text = yaml.safe_dump(document.model_dump(mode="json"))
    assert not any(key.rpartition("-")[2] in text for key in secrets.values())
    assert parse_keys(text, "here") == document
    digest = document.keys[0].sha256
    for broken in (
        text.replace("salt-of-red", "salt-of-blue"),
        text.replace("library:", "archive: {salt: salt-of-library}\n  library:"),
        text.replace("tenant: red", "tenant: rad"),
        text.replace("group: library", "group: archive"),
        text.replace(digest, digest[:-1]),
        "keys: [",
        "",
    ):
        with pytest.raises(ConfigError, match=r"kvcommons keys create|YAML") as caught:
            parse_keys(broken, "here")
        assert digest[:-1] not in str(caught.value)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    document, _ = make_document()
    text = yaml.safe_dump(document.model_dump(mode="json"))
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    assert read_keys(str(path), "UNSET_VARIABLE") == document
    assert read_keys(None, "UNSET_VARIABLE") is None
    monkeypatch.setenv("SOME_KEYS", text)
    assert read_keys(None, "SOME_KEYS") == document
    with pytest.raises(ConfigError, match="kvcommons keys create"):
        read_keys(str(tmp_path / "none.yaml"), "UNSET_VARIABLE")


def test_a_key_that_is_taken_out_of_the_file_opens_nothing_any_more(tmp_path):
    document, secrets = make_document()
    path = tmp_path / "keys.yaml"
    kept = document.model_copy(update={"keys": document.keys[1:]})
    path.write_text(yaml.safe_dump(document.model_dump(mode="json")))
    file, access = KeysFile(str(path), document), Access(document)
    first = file.version
    path.write_text("keys: [")
    file.refresh()
    assert (file.version, file.document) == (first, document), "a broken file changes nothing"
    path.write_text(yaml.safe_dump(kept.model_dump(mode="json")))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1))
    file.refresh()
    assert file.version != first
    restarted = KeysFile(str(path), document)
    assert (restarted.document, restarted.version) == (kept, file.version), "not the bound one"
    access.update(file.document)
    with pytest.raises(UnauthorizedError):
        access.caller(secrets["red"])
    assert access.caller(secrets["blue"]).tenant.name == "blue"
    assert access.caller(secrets["boss"]).is_admin


def test_every_look_up_compares_in_constant_time(monkeypatch):
    document, secrets = make_document()
    compared = []
    monkeypatch.setattr(
        keys_module.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b
    )
    ring = KeyRing(document)
    ring.caller(secrets["red"])
    for wrong in ("", "x", "kvc-", "kvc-000000000000-y", secrets["red"] + "x", "ü\ud800"):
        with pytest.raises(UnauthorizedError):
            ring.caller(wrong)
    assert len(compared) == 7
    assert all(len(a) == len(b) == 64 for a, b in compared), "hashes, never keys"
    assert hash_key(secrets["red"]) == document.keys[0].sha256
    assert re.fullmatch(r"kvc-[0-9a-f]{12}-[\w-]{43}", secrets["red"])


def test_quotas_are_those_of_the_document():
    document, _ = make_document()
    config = ClusterConfig(model="m", cache={"store": "s3://b/c", "host": {"quotas": {"other": 5}}})
    cache = with_quotas(config, document).replica_cache
    assert cache.host.quotas == {
        "other": 5,
        "group:salt-of-library": 1 << 20,
        "tenant:salt-of-red": 2 << 20,
    }
    assert [one.url for one in cache.all_tiers] == ["s3://b/c"]
    assert cache.all_tiers[-1].quotas == {
        "group:salt-of-library": 3 << 20,
        "tenant:salt-of-red": 4 << 20,
    }
    assert with_quotas(config, None) is config


def test_what_is_stored_names_who_pays_for_it(keyed):
    text = "Paid for: " + DOCUMENT_TEXT
    ask(keyed, "red", text, cache_salt="mine")
    ask(keyed, "teal", text)
    whole = WholeStore(keyed.store)
    stored = [run for one in whole.find() for run in whole.open(one.namespace).entries()]
    payers = {tuple(run.hashes): run.tenant for run in stored}
    for scope, payer in (
        (ReuseScope("tenant:salt-of-red\x1fmine"), "tenant:salt-of-red"),
        (ReuseScope("group:salt-of-library"), "group:salt-of-library"),
    ):
        tokens = keyed.endpoint.encoder.text(text)
        first = block_hashes(tokens, BLOCK, scope)[0]
        assert {tenant for hashes, tenant in payers.items() if first in hashes} == {
            ReuseScope(payer).tenant
        }
