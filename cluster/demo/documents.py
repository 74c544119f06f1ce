"""The texts that the demo reads, with their titles and questions, from the installed package.

They are package data, so the demo runs the same from a checkout, a wheel and within a Ray actor.
"""

from dataclasses import dataclass
from importlib import resources

import yaml


@dataclass(frozen=True, slots=True)
class Document:
    """A text that several people ask questions about."""

    name: str
    title: str
    text: str
    questions: tuple[str, ...]


def read_text(file_name: str) -> str:
    """The text of one file of `texts/`."""
    return (resources.files("cluster.demo") / "texts" / file_name).read_text(encoding="utf-8")


def load_documents() -> tuple[Document, ...]:
    """Every document that has questions, in the order of `documents.yaml`."""
    return tuple(
        Document(name, entry["title"], read_text(f"{name}.txt"), tuple(entry["questions"]))
        for name, entry in yaml.safe_load(read_text("documents.yaml")).items()
    )
