"""The load scenario's traffic: a function of its seed, and what it promises about order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.demo.documents import Document, load_documents, read_text
from cluster.demo.traffic import num_requests, plan_traffic

DOCUMENTS = tuple(
    Document(f"d{n}", f"Title {n}", f"Text {n}", tuple(f"q{n}.{i}" for i in range(3)))
    for n in range(4)
)
SIZES = st.integers(1, 9)


@given(st.integers(), SIZES, SIZES, SIZES)
def test_same_seed_gives_the_same_traffic(seed: int, clients: int, talks: int, turns: int) -> None:
    first = plan_traffic(DOCUMENTS, seed, clients, talks, turns)
    assert first == plan_traffic(DOCUMENTS, seed, clients, talks, turns)
    assert num_requests(first) == clients * talks * turns
    assert [script.name for script in first] == [f"client-{n}" for n in range(clients)]


@given(st.integers(), SIZES, SIZES)
def test_a_client_repeats_nothing_before_it_has_seen_all(seed: int, talks: int, turns: int) -> None:
    for script in plan_traffic(DOCUMENTS, seed, 2, talks, turns):
        order = [talk.document.name for talk in script.conversations]
        for start in range(0, len(order), len(DOCUMENTS)):
            lap = order[start : start + len(DOCUMENTS)]
            assert len(set(lap)) == len(lap)
        for talk in script.conversations:
            assert set(talk.questions) <= set(talk.document.questions)
            assert len(set(talk.questions[:3])) == min(3, turns)


def test_other_seeds_and_clients_behave_differently() -> None:
    one, other = (plan_traffic(DOCUMENTS, seed, 4, 4, 2) for seed in (1, 2))
    assert one != other
    assert len({tuple(talk.document.name for talk in s.conversations) for s in one}) > 1


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_traffic_is_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        plan_traffic(DOCUMENTS, 0, *counts)


def test_every_shipped_document_has_text_and_distinct_questions() -> None:
    documents = load_documents()
    assert len(documents) >= 6
    for document in documents:
        assert len(document.text.split()) > 350
        assert len(set(document.questions)) == len(document.questions) >= 2
    assert len({document.text for document in documents}) == len(documents)
    assert len(read_text("declaration.txt").split()) > 1300
