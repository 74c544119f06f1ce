"""The door to fsspec: from a URL to the medium that reads and publishes there.

Local disks are used by system calls, the big object stores through obstore where it is installed,
and everything else through fsspec's own back ends.

Failure prevented: a wrong URL, option or missing back end that shows itself in the night. Here it
is a `ConfigError` at start, with the fix in its text.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared_cache.errors import ConfigError
from shared_cache.media.fsspec_media import ObjectMedium, RenamingMedium
from shared_cache.media.io_errors import reading
from shared_cache.media.local_medium import LocalMedium
from shared_cache.media.medium import Medium
from shared_cache.media.object_options import SERVICES, parse
from shared_cache.media.retries import DEFAULT_TIMEOUT_S, Retries

OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "memory"}
)
"""Protocols whose uploads become visible whole, so that no rename is needed (nor cheap)."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""Which extra of this package brings the back end of a protocol."""

CLIENTS = ("obstore", "fsspec")
"""What the option `client` may say: who talks to an object store. The first is the default."""


def open_medium(
    url: str,
    options: Mapping[str, Any],
    folder_suffix: str,
    *,
    spare_bytes: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> tuple[Medium, str]:
    """The medium for the folder `folder_suffix` below `url`, and the path that `url` itself names.

    `spare_bytes`: deleted local files are kept for reuse up to so many bytes; others never.
    `timeout_s`: an operation is tried again within it, and through obstore it ends then; of local
    disks neither is true. Raises `ConfigError` for a URL, back end or option that is wrong.
    """
    protocol, rest = _protocol(url), dict(options)
    client = _client(url, protocol, rest.pop("client", None))
    if client != "fsspec" and protocol in SERVICES:
        if opened := _bucket(url, rest, folder_suffix, timeout_s):
            return opened
        if client == "obstore":
            extra = f"pip install 'kvcommons[{EXTRAS[protocol]}]'"
            raise ConfigError(f"store {url}: obstore is not installed: {extra}")
    fs, root = _file_system(url, protocol, rest)
    folder = f"{root}/{folder_suffix}"
    if type(fs) is LocalFileSystem and hasattr(os, "preadv"):
        return LocalMedium(folder, spare_bytes), root
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    medium = ObjectMedium if protocols & OBJECT_STORES else RenamingMedium
    return medium(fs, folder, Retries(timeout_s)), root


def _protocol(url: str) -> str:
    """What stands before `://`, or before `::` where fsspec is to chain file systems."""
    found = re.match(r"(\w+)(?=::|://)", url)
    return found.group() if found else "file"


def _client(url: str, protocol: str, client: str | None) -> str | None:
    """The option `client`, checked; None: obstore if it is there."""
    if client not in (None, *CLIENTS):
        raise ConfigError(f"store {url}: client is {client!r}; write one of {', '.join(CLIENTS)}")
    if client == "obstore" and protocol not in SERVICES:
        raise ConfigError(f"store {url}: obstore does not take {protocol}://; remove `client`")
    return client


def _bucket(
    url: str, options: Mapping[str, Any], folder_suffix: str, timeout_s: float
) -> tuple[Medium, str] | None:
    """The medium for a bucket through obstore; None where that is not installed."""
    try:
        from shared_cache.media.object_medium import BucketMedium, open_bucket
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        return None
    spec = parse(url, options, timeout_s)
    folder = f"{spec.root}/{folder_suffix}".lstrip("/")
    return BucketMedium(open_bucket(spec), folder, Retries(timeout_s)), spec.root


def _file_system(url: str, protocol: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it."""
    try:
        if not url.strip():
            raise ValueError("it is empty")
        with reading(url):
            fs, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        known = protocol in EXTRAS
        extra = f"pip install 'kvcommons[{EXTRAS[protocol]}]'" if known else str(error)
        raise ConfigError(
            f"store {url}: no back end for {protocol}:// is installed: {extra}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"store {url!r}: {error}; give a URL that fsspec knows (file:///path, s3://bucket/dir) "
            f"and options that its file system takes (given: {sorted(options)})"
        ) from error
    return fs, root.rstrip("/")
