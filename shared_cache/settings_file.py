"""Settings from a YAML file: whatever is wrong in it is said before anything starts.

It prevents the misspelt option that is dropped in silence: an unknown key, a key given twice or a
value of the wrong type is an error that names the file, the key's path and what is allowed there.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from shared_cache.config import CacheConfig
from shared_cache.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def read_settings(path: Path, kind: type[S], example: str) -> S:
    """The settings of class `kind` in the YAML file; `ConfigError` says what is wrong, and the fix.

    `example` is a line that such a file could hold.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(_missing_file(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings such as `{example}`")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(one, kind)}" for one in error.errors())
        raise ConfigError(f"{path}:\n{problems}") from error


def expand_store_url(url: str) -> str:
    """`url` with `$VAR`, `${VAR}` and `~` replaced, and a local path made absolute.

    The only place where paths of stores are expanded. Raises `ValueError` for a variable that is
    not set, or empty, and for a URL that names no place: it would become the working directory.
    """
    expanded = re.sub(r"\$(?:\{([^}]*)\}|(\w+))", lambda found: _variable(found, url), url)
    scheme, separator, path = expanded.strip().rpartition("://")
    if not path:
        raise ValueError(
            f"{url!r} names no place; give a folder (file:///data/kvcommons) or a bucket "
            "(s3://bucket/kvcommons), or null for no shared tier"
        )
    if separator and scheme != "file":
        return expanded.strip()
    return "file://" + os.path.abspath(os.path.expanduser(path))


def shareable_url(url: str) -> str:
    """`url` expanded; raises `ValueError` for one that each replica would have for itself."""
    expanded = expand_store_url(url)
    if "memory" in re.split("::|://", expanded)[:-1]:
        raise ValueError(
            f"{expanded} is memory of each process alone, so the replicas would share nothing; "
            "take file:// and a folder, or set store to null for no shared tier"
        )
    return expanded


def with_expanded_urls(cache: CacheConfig) -> CacheConfig:
    """`cache` with the addresses of its tiers expanded; raises `ValueError` as `shareable_url`."""
    tiers = tuple(tier.model_copy(update={"url": shareable_url(tier.url)}) for tier in cache.tiers)
    store = None if cache.store is None else shareable_url(cache.store)
    return cache.model_copy(update={"store": store, "tiers": tiers})


def _variable(found: re.Match[str], url: str) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name) if name else None
    if not value:
        state = "not set" if value is None else "empty"
        raise ValueError(f"the environment variable {name} in {url!r} is {state}; set it")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings may not give a key twice, where plain YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _missing_file(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{path} cannot be read: {error.strerror}"
    beside = sorted(one.name for one in path.parent.glob("*.yaml"))
    hint = f"; beside it are {', '.join(beside)}" if beside else ""
    return f"there is no file {path}{hint}"


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: the key's path, what is wrong, what is allowed."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location) or "the settings together"
    if error["type"] != "extra_forbidden":
        given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
        text = str(error["msg"]).removeprefix("Value error, ")
        return f"{where}: {text}{given if len(given) < 100 else ''}"
    allowed = _allowed(location[:-1], kind)
    close = difflib.get_close_matches(location[-1], allowed, n=1)
    guess = f"; did you mean `{close[0]}`?" if close else ";"
    return f"{where}: no such setting{guess} allowed here: {', '.join(allowed)}"


def _allowed(location: list[str], kind: type[BaseModel]) -> list[str]:
    """The names of the settings in the section of `kind` at `location`."""
    section = kind
    for part in location:
        if part.isdigit():  # a place in a list
            continue
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(section.model_fields)
