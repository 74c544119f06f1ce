"""Write docs/configuration.md from the settings classes, so that the page cannot fall behind.

Run `python docs/make_configuration.py`; a test fails while the page and the classes differ.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config import ClusterConfig
from shared_cache.config import CacheConfig
from shared_cache.connector.trtllm_config import ConnectorConfig

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

One YAML file describes a cluster; `configs/` holds one for each situation. Sizes are numbers of
bytes or text such as `512MiB`. An unknown key, a key given twice or a value of the wrong type is an
error that names the key and what is allowed there; nothing is started then.

This page is written by `python docs/make_configuration.py` from the settings classes.
"""


CONNECTOR = """
# The connector under plain TensorRT-LLM

The YAML file that `TLLM_SHARED_CACHE_CONFIG` names ([trtllm-serve.md](trtllm-serve.md)) holds the
settings of `cache` above, at its top level (`store`, `tiers`, `host`, ...), and these. There
`host.bytes` is by default a quarter of the machine's memory, at most half of what the memory file
system holds, in whole GiB, and `save_queue_bytes` a quarter of that.
"""


def sections(
    model: type[BaseModel], path: str = "", known: type[BaseModel] = BaseModel
) -> Iterator[str]:
    """One table for `model` without the settings of `known`, then those of the sections in it."""
    title = f"`{path}`" if path else "Top level"
    first_line = (model.__doc__ or "").strip().splitlines()[0]
    yield f"\n## {title}\n\n{first_line}\n"
    yield "| setting | type | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if name in known.model_fields:
            continue
        section = _section(field.annotation)
        if section is not None:
            inner_path = f"{path}.{name}" if path else name
            inner.append((inner_path + "[]" * _is_list(field.annotation), section))
        yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field)} |"
    for inner_path, section in inner:
        yield from sections(section, inner_path)


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if _is_list(annotation):
        return "list of sections"
    if _section(annotation) is not None:
        if type(None) in get_args(annotation):
            return "section or null"
        short = [one for one in get_args(annotation) if _section(one) is None]
        return " or ".join([*map(_type, short), "section"])
    if type(None) in get_args(annotation):
        return f"{_type(get_args(annotation)[0])} or null"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if annotation is ByteSize:
        return "size"
    origin = get_origin(annotation) or annotation
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        origin.__name__, origin.__name__
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, ByteSize):
        return f"`{value.human_readable()}`"
    if value in ((), {}):
        return "empty"
    return "" if value is PydanticUndefined else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(constraint, attribute)}"
        for constraint in field.metadata
        for attribute, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"))
        if getattr(constraint, attribute, None) is not None
    ]
    return "; ".join(filter(None, [field.description or "", ", ".join(bounds)]))


def page() -> str:
    """The whole page."""
    cluster = "\n".join(sections(ClusterConfig))
    connector = "\n".join(sections(ConnectorConfig, known=CacheConfig))
    return f"{INTRODUCTION}{cluster}\n{CONNECTOR}{connector}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
