"""API keys and whose they are: one document, in which no key can be read.

A key is `kvc-<id>-<secret>`; the document holds the id and the SHA-256 of the whole key. The secret
has 256 random bits, so a slow hash, which passwords need, would add nothing but time. An id that
nobody has takes as long as a wrong secret.
"""

import hashlib
import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, model_validator

from cluster.config import ClusterConfig
from cluster.endpoint.refusals import UnauthorizedError
from cluster.endpoint.tenants import Tenant
from shared_cache.config import Settings
from shared_cache.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_PREFIX = "kvc"
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
Salt = Field(min_length=8, max_length=128, pattern=r"^[\x20-\x7e]+$")


class GroupSettings(Settings):
    """Tenants that share their blocks."""

    salt: str = Salt
    host_bytes: ByteSize | None = Field(None, gt=0)
    store_bytes: ByteSize | None = Field(None, gt=0)


class TenantSettings(Settings):
    """One tenant; see docs/endpoint.md."""

    salt: str = Salt
    group: str | None = Field(None, pattern=NAME)
    host_bytes: ByteSize | None = Field(None, gt=0)
    store_bytes: ByteSize | None = Field(None, gt=0)
    requests_per_minute: float | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, ge=1)


class KeySettings(Settings):
    """One key: its id, its owner and the hash of the whole key."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    tenant: str = Field(pattern=NAME)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    admin: bool = False


class KeysDocument(Settings):
    """The whole file: groups, tenants and keys."""

    groups: dict[str, GroupSettings] = Field(default_factory=dict)
    tenants: dict[str, TenantSettings]
    keys: tuple[KeySettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> "KeysDocument":
        unknown = {key.tenant for key in self.keys} - self.tenants.keys()
        if unknown:
            raise ValueError(f"keys of tenants that are not listed: {', '.join(sorted(unknown))}")
        groups = {one.group for one in self.tenants.values() if one.group is not None}
        if groups - self.groups.keys():
            missing = ", ".join(sorted(groups - self.groups.keys()))
            raise ValueError(f"groups that are not listed: {missing}")
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same id")
        salts = [one.salt for one in self.tenants.values()]
        if len(set(salts)) < len(salts):
            raise ValueError("two tenants have the same salt; put them into one group instead")
        salts = [one.salt for one in self.groups.values()]
        if len(set(salts)) < len(salts):
            raise ValueError("two groups have the same salt; make one group of them instead")
        return self


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    tenant: Tenant
    is_admin: bool = False


class KeyRing:
    """All keys of one document, ready to be looked up."""

    def __init__(self, document: KeysDocument) -> None:
        self._tenants = {name: _tenant(document, name) for name in document.tenants}
        self._keys = {key.id: key for key in document.keys}
        self._groups = document.groups

    def caller(self, key: str) -> Caller:
        """Whose key this is; raises `UnauthorizedError`, in the same time whatever is wrong."""
        digest = hash_key(key)
        known = self._keys.get(_id_of(key))
        expected = known.sha256 if known is not None else _NOBODYS
        if not hmac.compare_digest(digest, expected) or known is None:
            raise UnauthorizedError(
                "this API key is not known; check it, or ask for one where this server is run"
            )
        return Caller(self._tenants[known.tenant], known.admin)

    def tenant(self, name: str) -> Tenant | None:
        """The tenant of that name."""
        return self._tenants.get(name)

    def quotas(self, size: Literal["host_bytes", "store_bytes"]) -> dict[str, ByteSize]:
        """Bytes by cache salt: of each machine's host memory, or of the shared tier."""
        limits = {str(one.salt): getattr(one, size) for one in self._tenants.values()}
        limits |= {group_salt(one): getattr(one, size) for one in self._groups.values()}
        return {salt: ByteSize(limit) for salt, limit in limits.items() if limit is not None}


def new_key() -> tuple[str, str, str]:
    """A new key, its id and its hash; the key is shown once and kept nowhere."""
    key_id = secrets.token_hex(6)
    key = f"{KEY_PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
    return key, key_id, hash_key(key)


def hash_key(key: str) -> str:
    """What is kept of a key: the hexadecimal SHA-256 of all of it."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def group_salt(group: GroupSettings) -> str:
    """The cache salt of a group."""
    return f"group:{group.salt}"


def parse_keys(text: str, where: str) -> KeysDocument:
    """The document in `text`; `ConfigError` names what is wrong, never a key or a hash."""
    try:
        return KeysDocument.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {getattr(error, 'problem', None)}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'document'}: {one['msg']}"
            for one in error.errors(include_input=False, include_url=False)
        )
        raise ConfigError(
            f"{where} is not as it should be: {wrong}. `kvcommons keys create --tenant NAME` "
            "writes an entry"
        ) from None


def read_keys(path: str | None, environment: str) -> KeysDocument | None:
    """The document in the file `path`, else in the environment variable; None without both."""
    if path is not None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"serve.keys_file {path} cannot be read ({error}); "
                f"`kvcommons keys create --file {path} --tenant NAME` makes one"
            ) from error
        return parse_keys(text, path)
    text = os.environ.get(environment, "")
    return parse_keys(text, f"the environment variable {environment}") if text.strip() else None


class KeysFile:
    """The document as it is now: the file is read, and again when it has changed.

    `document` serves while the file cannot be used; it may be an old one, of when this was set up.
    """

    def __init__(self, path: str | None, document: KeysDocument | None) -> None:
        self.document = document
        self._path = None if path is None else Path(path).expanduser()
        self._seen: tuple[int, int] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look whether the file has changed. One that cannot be used now changes nothing."""
        stamp = self._stamp()
        if stamp is None or stamp == self._seen:
            return
        self._seen = stamp
        try:
            self.document = read_keys(str(self._path), "")
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)

    @property
    def version(self) -> str:
        """Names the content: a restarted process gives the same document the same version."""
        text = "" if self.document is None else self.document.model_dump_json()
        return hashlib.sha256(text.encode()).hexdigest()

    def _stamp(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def with_quotas(config: ClusterConfig, document: KeysDocument | None) -> ClusterConfig:
    """The configuration with the tenants' quotas; it had none of these salts."""
    if document is None or config.cache is None:
        return config
    ring, cache = KeyRing(document), config.cache
    host_quotas = {**cache.host.quotas, **ring.quotas("host_bytes")}
    changed: dict[str, Any] = {"host": cache.host.model_copy(update={"quotas": host_quotas})}
    if cache.all_tiers:
        *near, shared = cache.all_tiers
        store_quotas = {**shared.quotas, **ring.quotas("store_bytes")}
        shared = shared.model_copy(update={"quotas": store_quotas})
        changed |= {"store": None, "tiers": (*near, shared)}
    return config.model_copy(update={"cache": cache.model_copy(update=changed)})


def _tenant(document: KeysDocument, name: str) -> Tenant:
    settings = document.tenants[name]
    group = document.groups[settings.group] if settings.group is not None else None
    return Tenant(
        name=name,
        salt=f"tenant:{settings.salt}",
        group_salt=group_salt(group) if group is not None else None,
        host_bytes=settings.host_bytes,
        store_bytes=settings.store_bytes,
        requests_per_minute=settings.requests_per_minute,
        max_concurrent=settings.max_concurrent,
    )


def _id_of(key: str) -> str:
    prefix, _, rest = key.partition("-")
    return rest.partition("-")[0] if prefix == KEY_PREFIX else ""


_NOBODYS = hash_key("")
