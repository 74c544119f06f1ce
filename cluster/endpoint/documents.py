"""What the OpenAPI document says of bodies that the routes read by themselves.

They are parsed in one pass, from the bytes, after the key was checked: FastAPI does not see them.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"
_bodies: list[type[BaseModel]] = []


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "the request cannot be served as it is"),
        (401, "no API key, or one that is not known"),
        (404, "another model is served"),
        (413, "the body is too long"),
        (429, "a limit is reached; see Retry-After"),
        (503, "no replica can serve now; see Retry-After"),
        (504, "the request took longer than it may"),
    )
}


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for a route that reads such a body."""
    _bodies.append(kind)
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def describe_bodies(api: FastAPI) -> None:
    """Add the schemas of these bodies to the app's document."""
    made = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = made()
            _, schemas = models_json_schema(
                [(kind, "validation") for kind in _bodies], ref_template=_REFERENCE
            )
            components = document.setdefault("components", {}).setdefault("schemas", {})
            components.update(schemas.get("$defs", {}))
        return api.openapi_schema or {}

    api.openapi = openapi  # type: ignore[method-assign]
