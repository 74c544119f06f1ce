"""Who asks what, when: the same for every run with the same seed.

Comparing three set-ups is fair only when each serves the same conversations. So the traffic is
decided beforehand by a pure function of a seed; how fast a client goes on is up to the set-up, for
a client sends its next question when it has the answer to the one before.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.demo.documents import Document


@dataclass(frozen=True, slots=True)
class Conversation:
    """One client's questions about one document; each turn sends all that was said before."""

    conversation_id: str
    document: Document
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientScript:
    """What one client does: its conversations, one after the other."""

    name: str
    conversations: tuple[Conversation, ...]


def plan_traffic(
    documents: Sequence[Document],
    seed: int,
    num_clients: int,
    conversations_per_client: int,
    turns_per_conversation: int,
) -> tuple[ClientScript, ...]:
    """One script for each client; the same arguments give the same scripts.

    Each client reads in an order of its own, no document twice before it has read all, and
    opens no conversation with a question that it has asked in the same conversation. Raises
    `ValueError` when there are no documents or a count is below 1.
    """
    counts = (len(documents), num_clients, conversations_per_client, turns_per_conversation)
    if min(counts) < 1:
        raise ValueError(f"traffic needs at least one of everything, but has {counts}")
    draw = random.Random(seed)
    return tuple(
        ClientScript(
            f"client-{client}",
            tuple(
                Conversation(
                    f"client-{client}.{number}",
                    document,
                    _questions(document, turns_per_conversation, draw),
                )
                for number, document in enumerate(
                    _reading_order(documents, conversations_per_client, draw)
                )
            ),
        )
        for client in range(num_clients)
    )


def _reading_order(
    documents: Sequence[Document], num_conversations: int, draw: random.Random
) -> list[Document]:
    order: list[Document] = []
    while len(order) < num_conversations:
        order.extend(draw.sample(list(documents), len(documents)))
    return order[:num_conversations]


def _questions(document: Document, num_turns: int, draw: random.Random) -> tuple[str, ...]:
    asked: list[str] = []
    while len(asked) < num_turns:
        asked.extend(draw.sample(document.questions, len(document.questions)))
    return tuple(asked[:num_turns])


def num_requests(scripts: Sequence[ClientScript]) -> int:
    """How many requests the scripts send in all."""
    return sum(len(talk.questions) for script in scripts for talk in script.conversations)
