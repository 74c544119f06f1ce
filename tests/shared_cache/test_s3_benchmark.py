"""The comparison with s3fs runs, and reads back what both sides wrote."""

import shutil

import pytest

from benchmarks.rivals.s3_clients import compare


@pytest.mark.parametrize("at_once", [1, 3])
def test_both_sides_store_the_same_blocks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)  # the server that is always there
    found = compare(1 << 16, num_blocks=4, num_rounds=2, at_once=at_once)
    assert found.server_kind == "aiohttp"
    assert found.num_bytes == 4 << 16
    assert len(found.rounds) == 2
    for direction in ("put", "get"):
        assert all(ratio > 0 for ratio in found.ratios(direction))
