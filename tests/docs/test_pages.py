"""The documentation says what the code does: generated pages, links that lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])


def test_the_configuration_page_is_that_of_the_settings_classes():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "docs/make_configuration.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), (
        "docs/configuration.md is behind; run `python docs/make_configuration.py`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_the_trees_exist(page):
    """A `folder/file.py` in backticks is a promise."""
    named = re.findall(
        r"`((?:shared_cache|actors|cluster|configs|docs|tests)/[\w/.-]+)`", page.read_text()
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
