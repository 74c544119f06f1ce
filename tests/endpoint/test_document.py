"""Every route does what the served OpenAPI document says, whatever is sent to it."""

import warnings

import pytest
from hypothesis import HealthCheck, given, seed, settings
from openai.types.chat import ChatCompletion

with warnings.catch_warnings():  # it uses what others have deprecated
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

from tests.endpoint.conftest import Served

NUM_EXAMPLES = 12
MAX_TOKENS = 8
MAX_CHOICES = 4
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


QUICK = settings(
    max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def _limit(body: dict) -> None:
    """Keep a long answer short: this test asks for its form. What is invalid stays as it is."""
    named = {"max_tokens", "max_completion_tokens"} & body.keys()
    for name in named or {"max_tokens"}:
        wanted = body.get(name)
        if wanted is None or (isinstance(wanted, int) and wanted > MAX_TOKENS):
            body[name] = MAX_TOKENS
    for name in {"n", "best_of"} & body.keys():
        if isinstance(body[name], int):
            body[name] = min(body[name], MAX_CHOICES)


# Threads of the server, which runs in this process, use `random` while Hypothesis draws a case.
@pytest.mark.filterwarnings("ignore:Do not use the .random. module")
def test_no_request_is_a_server_error(served: Served):
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [one.ok() for one in document.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @seed(7)
        @QUICK
        @given(operation.as_strategy())
        def conforms(case):
            if isinstance(case.body, dict) and case.path.endswith("/completions"):
                _limit(case.body)
            case.call_and_validate(checks=list(CHECKS), timeout=60)

        conforms()


def test_the_document_has_the_bodies_and_the_answers(http):
    document = http.get("/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = document["components"]["schemas"][body.rpartition("/")[2]]["properties"]
    assert {"messages", "n", "tools", "logprobs", "stream_options"} <= fields.keys()
    answer = chat["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert answer.endswith(ChatCompletion.__name__)
    assert {"400", "401", "404", "413", "429", "503", "504"} <= chat["responses"].keys()
