"""JSON responses, encoded by msgspec: some ten times sooner than by the standard library."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response

_encode = msgspec.json.Encoder().encode


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response with this body."""
    return Response(_encode(body), status, headers, media_type="application/json")
