"""The clients of the load scenario at work: each asks, waits for the whole answer, asks on.

Every turn sends the whole conversation again, the model's own answers included, as chat clients
do; that is what makes a prefix grow, and a cache worth having.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

from cluster.demo.asking import Answer, Asks, ask
from cluster.demo.prompts import Message
from cluster.demo.scenario import Demo, greedy
from cluster.demo.traffic import ClientScript, Conversation
from shared_cache.errors import ReplicaUnavailableError

logger = logging.getLogger(__name__)


async def hold_conversations(
    demo: Demo, asks: Asks, scripts: Sequence[ClientScript], on_answer: Callable[[], None]
) -> dict[str, Answer]:
    """All clients at the same time; the answers by request id.

    The requests of a conversation that no replica could go on with are missing.
    """
    answers: dict[str, Answer] = {}
    # A long prompt takes milliseconds to tokenise: in the loop, all streams would wait for it.
    with ThreadPoolExecutor(1, "demo-tokenise") as tokenising:

        async def hold(script: ClientScript) -> None:
            for conversation in script.conversations:
                await _try_conversation(demo, asks, conversation, tokenising, answers, on_answer)

        await asyncio.gather(*map(hold, scripts))
    return answers


async def _try_conversation(
    demo: Demo,
    asks: Asks,
    conversation: Conversation,
    tokenising: Executor,
    answers: dict[str, Answer],
    on_answer: Callable[[], None],
) -> None:
    try:
        await _converse(demo, asks, conversation, tokenising, answers, on_answer)
    except ReplicaUnavailableError as error:
        logger.error("%s was lost: %s", conversation.conversation_id, error)


async def _converse(
    demo: Demo,
    asks: Asks,
    conversation: Conversation,
    tokenising: Executor,
    answers: dict[str, Answer],
    on_answer: Callable[[], None],
) -> None:
    sizes, aside = demo.sizes.load, asyncio.get_running_loop().run_in_executor
    document = conversation.document.text
    text = await aside(tokenising, demo.prompts.cut, document, sizes.document_tokens)
    messages: list[Message] = []
    for turn, question in enumerate(conversation.questions):
        asked = f"{text}\n\n{question}" if turn == 0 else question
        messages.append({"role": "user", "content": asked})
        request_id = f"{conversation.conversation_id}.{turn}"
        prompt = await aside(tokenising, demo.prompts.chat, tuple(messages))
        answer = await ask(asks, greedy(request_id, prompt, sizes.output_tokens))
        answers[request_id] = answer
        messages.append({"role": "assistant", "content": answer.text})
        on_answer()
