"""Every response is counted once, by the template of its route, whoever has made it."""

from collections import Counter

import httpx
import pytest

from cluster import http_metrics
from cluster.endpoint.keys import KeysDocument, new_key
from tests.endpoint.conftest import serving
from tests.fakes import FakeEngine

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2}


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often each route was answered with each status."""
    counted = Counter()

    class Counts:
        def __init__(self, routes) -> None:
            assert {COMPLETIONS, "/v1/models/{name}", "/v1/cache", "other"} <= set(routes)

        def add(self, route, status):
            counted[route, status] += 1

    monkeypatch.setattr(http_metrics, "ResponseCounter", Counts)
    return counted


@pytest.fixture
def keyed(counts, model_path):
    """An endpoint for one tenant that may send one request a minute; `http` has its key."""
    key, key_id, digest = new_key()
    document = KeysDocument(
        tenants={"a": {"salt": "salt of a", "requests_per_minute": 1}},
        keys=[{"id": key_id, "tenant": "a", "sha256": digest}],
    )
    limits = {"max_body_bytes": 2000, "max_places": 4}
    with (
        serving(model_path, document, lambda _: FakeEngine(turn_s=0.001), **limits) as served,
        httpx.Client(base_url=served.url, timeout=60) as served.http,
    ):
        served.http.headers["Authorization"] = f"Bearer {key}"
        yield served


def test_refusals_are_counted_as_the_answers_are(keyed, counts):
    http = keyed.http
    nobody = {"Authorization": "Bearer nobody"}
    assert http.post(COMPLETIONS, json=BODY, headers=nobody).status_code == 401
    assert http.post(COMPLETIONS, content=b"x" * 3000).status_code == 413
    assert http.post(COMPLETIONS, json={**BODY, "stream": True, "n": 2}).status_code == 200
    assert http.post(COMPLETIONS, json=BODY).status_code == 429
    assert http.get(COMPLETIONS).status_code == 405
    keyed.router.dead.update(keyed.replicas)
    assert http.get("/ready").status_code == 503
    expected = {(COMPLETIONS, status): 1 for status in (200, 401, 405, 413, 429)}
    assert counts == {**expected, ("/ready", 503): 1}


def test_paths_that_clients_make_up_are_no_routes(keyed, counts):
    for path in ("/nothing", "/x/y", "/v1/models/tiny", "/v1/models/other/one"):
        keyed.http.get(path)
    assert counts == {
        ("other", 404): 2,
        ("/v1/models/{name}", 200): 1,
        ("/v1/models/{name}", 404): 1,
    }


def test_what_fails_is_counted(keyed, counts, monkeypatch):
    monkeypatch.setattr(keyed.endpoint, "encoder", None)
    assert keyed.http.post(COMPLETIONS, json=BODY).status_code == 500
    assert counts == {(COMPLETIONS, 500): 1}
