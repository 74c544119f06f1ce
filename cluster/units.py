"""Sizes and times as people write and read them on a command line."""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from shared_cache.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = TypeAdapter(ByteSize)


def parse_bytes(text: str) -> int:
    """The number of bytes that `100GiB`, `2.5 GB` or `4096` means; `ConfigError` for others."""
    try:
        num_bytes = int(_BYTES.validate_python(text))
    except ValidationError:
        num_bytes = 0
    if num_bytes <= 0:
        raise ConfigError(f"{text!r} is no size; write 100GiB, 500MB or a number of bytes")
    return num_bytes


def parse_duration_s(text: str) -> float:
    """The seconds that `7d`, `1.5h`, `30m` or `90s` means; `ConfigError` for others."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigError(f"{text!r} is no length of time; write 7d, 12h, 30m or 90s")
    return seconds


def show_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest fitting binary unit, such as `1.4GiB`."""
    return ByteSize(num_bytes).human_readable()


def show_age(used_s: float | None, now_s: float) -> str:
    """How long ago `used_s` was, in one unit; `-` for no time, `in the future` for one."""
    if not used_s:
        return "-"
    age_s = now_s - used_s
    if age_s < -1:
        return "in the future"
    for unit in ("w", "d", "h", "m"):
        if age_s >= 2 * _SECONDS[unit]:
            return f"{age_s / _SECONDS[unit]:.0f}{unit} ago"
    return f"{max(0.0, age_s):.0f}s ago"
