"""The routes of OpenAI's API, and `/tokenize` and `/detokenize`, which other servers have too."""

from fastapi import APIRouter, Request, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from cluster.endpoint import replies
from cluster.endpoint.access import CallerDependency
from cluster.endpoint.choices import Batches
from cluster.endpoint.documents import ERRORS, body_of
from cluster.endpoint.errors import unknown_model
from cluster.endpoint.keys import Caller
from cluster.endpoint.logprobs import Logprobs
from cluster.endpoint.replies import Reply
from cluster.endpoint.requests import (
    COMPLETION_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from cluster.endpoint.responses import json_response
from cluster.endpoint.service import Asked, Endpoint
from cluster.endpoint.streaming import Collector, Shape, collect, event_stream

router = APIRouter()


@router.get("/v1/models", responses=ERRORS)
async def models(request: Request, _: CallerDependency) -> Response:
    """The one model that is served."""
    endpoint = _endpoint(request)
    return json_response(
        replies.models(endpoint.model, endpoint.created, endpoint.max_total_tokens)
    )


@router.get("/v1/models/{name:path}", responses={200: {"model": Model}, **ERRORS})
async def model(request: Request, name: str, _: CallerDependency) -> Response:
    """That model, or 404."""
    endpoint = _endpoint(request)
    if (refused := _other_model(endpoint, name)) is not None:
        return refused
    return json_response(replies.model(name, endpoint.created, endpoint.max_total_tokens))


@router.post(
    "/v1/completions",
    responses={200: {"model": Completion}, **ERRORS},
    openapi_extra=body_of(CompletionRequest),
)
async def completions(request: Request, who: CallerDependency) -> Response:
    """Continue one or several prompts."""
    endpoint = _endpoint(request)
    body = CompletionRequest.model_validate_json(await request.body())
    if (refused := _other_model(endpoint, body.model)) is not None:
        return refused
    reply = Reply.new("cmpl", endpoint.model, body.n)

    async def prepare() -> Asked:
        prompts = [await endpoint.tokenising.prompt(prompt) for prompt in body.prompts]
        return _asked(body, who, reply, prompts, body.max_tokens or COMPLETION_MAX_TOKENS)

    num_choices = len(body.prompts) * body.n
    logprobs = Logprobs(endpoint.encoder.token_bytes).completion
    collector = Collector(num_choices, None if body.num_logprobs is None else logprobs)
    usage = reply.completion_usage if body.includes_usage else None
    shape = Shape(reply.completion_chunk, usage) if body.stream else None
    batches = endpoint.batches(who.tenant, num_choices, prepare)
    return await _answer(request, batches, reply, collector, shape)


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletion}, **ERRORS},
    openapi_extra=body_of(ChatRequest),
)
async def chat(request: Request, who: CallerDependency) -> Response:
    """Answer a conversation."""
    endpoint = _endpoint(request)
    body = ChatRequest.model_validate_json(await request.body())
    if (refused := _other_model(endpoint, body.model)) is not None:
        return refused
    reply = Reply.new("chatcmpl", endpoint.model, body.n)

    async def prepare() -> Asked:
        messages = [message.for_template() for message in body.messages]
        prompt = await endpoint.tokenising.chat(messages, body.template_tools)
        limit = body.limit or endpoint.config.default_max_tokens
        return _asked(body, who, reply, [prompt], limit)

    logprobs = Logprobs(endpoint.encoder.token_bytes).chat
    collector = Collector(body.n, None if body.num_logprobs is None else logprobs)
    usage = reply.chat_usage if body.includes_usage else None
    shape = Shape(reply.chat_chunk, usage, reply.chat_start) if body.stream else None
    batches = endpoint.batches(who.tenant, body.n, prepare)
    return await _answer(request, batches, reply, collector, shape)


@router.post("/tokenize", responses=ERRORS, openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request, who: CallerDependency) -> Response:
    """The tokens that a prompt or a conversation becomes."""
    endpoint = _endpoint(request)
    body = TokenizeRequest.model_validate_json(await request.body())
    if (refused := _other_model(endpoint, body.model)) is not None:
        return refused
    tokenising = endpoint.tokenising
    with endpoint.access.entered(who.tenant):
        if body.prompt is not None:
            tokens = await tokenising.prompt(body.prompt, body.add_special_tokens, must_fit=False)
        else:
            messages = [message.for_template() for message in body.messages]
            tools = [dict(tool) for tool in body.tools]
            tokens = await tokenising.chat(
                messages, tools, body.add_generation_prompt, must_fit=False
            )
    limit = endpoint.max_total_tokens
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})


@router.post("/detokenize", responses=ERRORS, openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request, who: CallerDependency) -> Response:
    """The text of tokens."""
    endpoint = _endpoint(request)
    body = DetokenizeRequest.model_validate_json(await request.body())
    if (refused := _other_model(endpoint, body.model)) is not None:
        return refused
    with endpoint.access.entered(who.tenant):
        return json_response({"prompt": await endpoint.tokenising.text_of(body.tokens)})


def _other_model(endpoint: Endpoint, name: str | None) -> Response | None:
    """404 for a model that is not served; None for the one that is, and where none is named."""
    if name is None or name == endpoint.model:
        return None
    return json_response(unknown_model(name, endpoint.model), 404)


def _asked(
    body: CompletionRequest | ChatRequest,
    who: Caller,
    reply: Reply,
    prompts: list[tuple[int, ...]],
    max_tokens: int,
) -> Asked:
    """The request as engines get it, in the scope of the caller's tenant."""
    sampling, scope = body.sampling(max_tokens), who.tenant.scope(body.cache_salt)
    return Asked(reply.response_id, prompts, sampling, scope, body.n)


async def _answer(
    request: Request,
    batches: Batches,
    reply: Reply,
    collector: Collector,
    shape: Shape | None,
) -> Response:
    """The response: a stream of that shape, or all at once."""
    if shape is not None:
        timeout_s = _endpoint(request).config.request_timeout_s
        headers, receive = reply.receipt_header, request.receive
        return await event_stream(batches, collector, shape, headers, receive, timeout_s)
    choices = await collect(batches, collector, request.receive)
    body = reply.chat(choices) if reply.is_chat else reply.completion(choices)
    return json_response(body, headers=reply.receipt_header(choices))


def _endpoint(request: Request) -> Endpoint:
    endpoint: Endpoint = request.app.state.endpoint
    return endpoint
