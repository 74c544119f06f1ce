"""The host tier's size where nobody says one: it fits, and all processes come to the same."""

from pathlib import Path

import pytest

from shared_cache.config import HostConfig
from shared_cache.host import sizing
from shared_cache.host.sizing import GIB, fitting_bytes, sized_for_this_machine


@pytest.mark.parametrize(
    ("memory_gib", "folder_gib", "expected_gib"),
    [(1024, 512, 256), (1024, 64, 32), (62.7, 31.3, 15), (8, 0.0625, 1), (2, 1, 1)],
)
def test_a_quarter_of_the_memory_and_half_of_its_file_system_at_most(
    memory_gib: float, folder_gib: float, expected_gib: int
) -> None:
    assert fitting_bytes(int(memory_gib * GIB), int(folder_gib * GIB)) == expected_gib * GIB


def test_a_size_that_is_given_stays() -> None:
    config = HostConfig(bytes="3GiB")
    assert sized_for_this_machine(config) is config


def test_memory_of_one_process_keeps_its_default() -> None:
    config = HostConfig(scope="process")
    assert sized_for_this_machine(config) is config


def test_only_the_size_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(sizing, "LIMIT_FILES", (str(limit), str(tmp_path / "none")))
    monkeypatch.setattr(sizing.os, "sysconf", {"SC_PHYS_PAGES": 1 << 24, "SC_PAGE_SIZE": 4096}.get)
    monkeypatch.setattr(sizing, "_folder_bytes", lambda config: 1 << 60)
    config = HostConfig(name="mine", eviction="s3fifo", quotas={"a": 5})
    limit.write_text("max\n")
    assert sized_for_this_machine(config) == HostConfig(
        name="mine", eviction="s3fifo", quotas={"a": 5}, bytes=16 * GIB
    )
    limit.write_text(f"{20 * GIB}\n")
    assert sized_for_this_machine(config).bytes == 5 * GIB, "what the container may use"


def test_the_folder_s_file_system_counts_before_the_folder_is_there(tmp_path: Path) -> None:
    there = sizing._folder_bytes(HostConfig(folder=str(tmp_path)))
    assert sizing._folder_bytes(HostConfig(folder=str(tmp_path / "not/yet"))) == there > 0
