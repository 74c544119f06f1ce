"""Reading TensorRT-LLM's settings without knowing which version wrote them.

A field that another version lacks is not an error, and an enumeration is a text in one version and
a member in the next. Pure.
"""

import re
from typing import Any


def read(settings: Any, path: str, default: Any = None) -> Any:
    """The value at `path` (`kv_cache_config.dtype`); `default` where a part is missing or None."""
    value = settings
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if value is None:
            return default
    return value


def text(value: Any) -> str | None:
    """A setting's value as text: that of an enumeration's member, too; None for None."""
    if value is None:
        return None
    member_value = getattr(value, "value", value)
    return member_value if isinstance(member_value, str) else str(getattr(value, "name", value))


def release_of(version: str) -> str:
    """`major.minor` of a release such as `1.2.1`; of what is none (`1.3.0rc14`) the whole text.

    Candidates of one release are months apart, and kernels and layouts change between them.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*", version)
    return f"{found[1]}.{found[2]}" if found else version
