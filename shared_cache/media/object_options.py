"""From a URL and options as people have them for fsspec to what obstore is opened with.

Who changes from s3fs, gcsfs or adlfs keeps the configuration: their common options are translated,
and obstore's own (`aws_...`, `google_...`, `azure_...`, `client_options`) are passed on. Failure
prevented: an option that is silently dropped, such as the one that names the right endpoint.
Imports nothing of obstore. gs:// and az:// are tested as far as opening a bucket goes: no request
was ever made to the real services.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from shared_cache.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ObjectStoreSpec:
    """What one bucket is opened with; `root` is the folder in it, without slashes at its ends."""

    service: str
    bucket: str
    root: str
    config: Mapping[str, Any]
    client_options: Mapping[str, Any]


_Rename = Callable[[Any], dict[str, Any]]


def _as(name: str) -> _Rename:
    return lambda value: {name: value}


def _gcs_token(value: Any) -> dict[str, Any]:
    """gcsfs' `token`: a file of a service account, its content, or a word."""
    if isinstance(value, Mapping):
        return {"google_service_account_key": json.dumps(dict(value))}
    if value == "anon":
        return {"google_skip_signature": True}
    return {} if value in ("google_default", "cloud") else {"google_service_account": value}


_S3: dict[str, _Rename] = {
    "key": _as("aws_access_key_id"),
    "secret": _as("aws_secret_access_key"),
    "token": _as("aws_session_token"),
    "anon": _as("aws_skip_signature"),
    "endpoint_url": _as("aws_endpoint"),
    "region": _as("aws_region"),
    "requester_pays": _as("aws_request_payer"),
    "client_kwargs.region_name": _as("aws_region"),
    "client_kwargs.endpoint_url": _as("aws_endpoint"),
    "client_kwargs.aws_access_key_id": _as("aws_access_key_id"),
    "client_kwargs.aws_secret_access_key": _as("aws_secret_access_key"),
    "client_kwargs.aws_session_token": _as("aws_session_token"),
    "s3_additional_kwargs.ServerSideEncryption": _as("aws_server_side_encryption"),
    "s3_additional_kwargs.SSEKMSKeyId": _as("aws_sse_kms_key_id"),
}
_GCS: dict[str, _Rename] = {
    "token": _gcs_token,
    "endpoint_url": _as("google_base_url"),
}
_AZURE: dict[str, _Rename] = {
    "account_name": _as("azure_storage_account_name"),
    "account_key": _as("azure_storage_account_key"),
    "sas_token": _as("azure_storage_sas_key"),
    "tenant_id": _as("azure_storage_tenant_id"),
    "client_id": _as("azure_storage_client_id"),
    "client_secret": _as("azure_storage_client_secret"),
    "anon": _as("azure_skip_signature"),
}


@dataclass(frozen=True, slots=True)
class _Service:
    name: str
    own_prefix: str
    renames: Mapping[str, _Rename]
    defaults: Mapping[str, Any]


_S3_SERVICE = _Service("s3", "aws_", _S3, {"aws_unsigned_payload": True})
"""Payloads are not hashed for the signature: TLS and the blocks' own checksums cover them."""

_GCS_SERVICE = _Service("gcs", "google_", _GCS, {})
_AZURE_SERVICE = _Service("azure", "azure_", _AZURE, {})

SERVICES = {
    **dict.fromkeys(("s3", "s3a"), _S3_SERVICE),
    **dict.fromkeys(("gs", "gcs"), _GCS_SERVICE),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZURE_SERVICE),
}
"""The protocols that obstore takes instead of fsspec's own back ends."""

_URL = re.compile(r"(?P<protocol>\w+)://(?P<bucket>[^/]+)(?:/(?P<root>.*))?")
_AZURE_HOST = re.compile(
    r"(?P<container>[^@]+)@(?P<account>[^.]+)\.(?:dfs|blob)\.core\.windows\.net"
)


def parse(url: str, options: Mapping[str, Any], timeout_s: float) -> ObjectStoreSpec:
    """How to open the bucket of `url`; raises `ConfigError` for an unknown option or a bad URL."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"store {url!r} names no bucket: write protocol://bucket/folder")
    service, bucket = SERVICES[match["protocol"]], match["bucket"]
    config = dict(service.defaults)
    if host := _AZURE_HOST.fullmatch(bucket):
        bucket = host["container"]
        config["azure_storage_account_name"] = host["account"]
    given = {key: value for key, value in options.items() if value is not None}
    client_options = _client_options(url, given.pop("client_options", {}), timeout_s)
    for key, value in _flat(given).items():
        config.update(_translated(service, key, value, url))
    root = "/".join(part for part in (match["root"] or "").split("/") if part)
    return ObjectStoreSpec(service.name, bucket, root, config, client_options)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """`client_kwargs` and the like as `client_kwargs.name`."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if key.endswith("_kwargs") and isinstance(value, Mapping):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _translated(service: _Service, key: str, value: Any, url: str) -> dict[str, Any]:
    if key in service.renames:
        return service.renames[key](value)
    if key.startswith(service.own_prefix):
        return {key: value}
    raise ConfigError(
        f"store {url}: unknown option {key!r}; known are {', '.join(sorted(service.renames))}, "
        f"obstore's own ({service.own_prefix}..., client_options), and `client: fsspec` to use "
        "fsspec's own back end with its own options"
    )


def _client_options(url: str, given: Any, timeout_s: float) -> dict[str, Any]:
    """obstore's settings for HTTP; what is given wins. An endpoint may be http:// if it says so."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"store {url}: client_options must be a mapping, such as {{proxy_url: x}}"
        )
    return {
        "allow_http": True,
        "timeout": timedelta(seconds=timeout_s),
        "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_S, timeout_s)),
        **given,
    }
