"""Options as people have them for fsspec open the same bucket through obstore, or are refused.

Buckets are opened with made-up credentials; no request is made to a real service.
"""

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shared_cache.errors import ConfigError
from shared_cache.media.fsspec_media import ObjectMedium
from shared_cache.media.io_errors import RequestRefusedError, of_object_store
from shared_cache.media.object_medium import BucketMedium, open_bucket
from shared_cache.media.object_options import parse
from shared_cache.media.opening import open_medium

TIMEOUT_S = 7.0


def config_of(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What obstore says it was opened with."""
    bucket = open_bucket(parse(url, options, TIMEOUT_S))
    return {key: str(value) for key, value in dict(bucket.config).items()}


S3FS_OPTIONS: list[tuple[dict[str, Any], dict[str, str]]] = [
    (
        {"key": "me", "secret": "hush", "token": "t"},
        {
            "access_key_id": "me",
            "secret_access_key": "hush",
            "session_token": "t",
        },
    ),
    ({"endpoint_url": "http://localhost:9000"}, {"endpoint": "http://localhost:9000"}),
    ({"anon": True}, {"skip_signature": "True"}),
    ({"region": "eu-west-1"}, {"region": "eu-west-1"}),
    (
        {"client_kwargs": {"region_name": "eu-west-1", "endpoint_url": "http://h:1"}},
        {"region": "eu-west-1", "endpoint": "http://h:1"},
    ),
    (
        {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}},
        {"server_side_encryption": "AES256"},
    ),
    ({"aws_virtual_hosted_style_request": True}, {"virtual_hosted_style_request": "True"}),
    ({"key": None, "endpoint_url": None}, {}),
]


@pytest.mark.parametrize(("options", "expected"), S3FS_OPTIONS)
def test_s3fs_options(options: dict[str, Any], expected: dict[str, str]) -> None:
    config = config_of("s3://bucket/some/folder/", options)
    assert {key: config[key].lower() for key in expected} == {
        key: value.lower() for key, value in expected.items()
    }
    assert config["unsigned_payload"].lower() == "true"


def test_what_is_given_wins_over_what_is_usual() -> None:
    options = {
        "aws_unsigned_payload": False,
        "client_options": {"allow_http": False, "connect_timeout": "1s"},
    }
    spec = parse("s3a://bucket", options, TIMEOUT_S)
    assert spec.config["aws_unsigned_payload"] is False
    assert spec.client_options == {
        "allow_http": False,
        "timeout": timedelta(seconds=TIMEOUT_S),
        "connect_timeout": "1s",
    }
    assert open_bucket(spec) is not None


@pytest.mark.parametrize(
    ("url", "bucket", "root"),
    [
        ("s3://b", "b", ""),
        ("s3://b/", "b", ""),
        ("s3://b/x//y/", "b", "x/y"),
        ("gs://b/x", "b", "x"),
        ("az://container/x", "container", "x"),
        ("abfss://container@account.dfs.core.windows.net/x", "container", "x"),
    ],
)
def test_urls(url: str, bucket: str, root: str) -> None:
    spec = parse(url, {}, TIMEOUT_S)
    assert (spec.bucket, spec.root) == (bucket, root)


@pytest.mark.parametrize(("root", "folder"), [("", "v1/x"), ("/a/b/", "a/b/v1/x")])
def test_the_folder_of_a_namespace(root: str, folder: str) -> None:
    medium, _ = open_medium(f"s3://bucket{root}", {"anon": True}, "v1/x")
    assert isinstance(medium, BucketMedium)
    assert medium.path("a") == f"{folder}/a"


def test_google(tmp_path: Path) -> None:
    account = {
        "private_key": "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
        "private_key_id": "1",
        "client_email": "a@b.invalid",
        "disable_oauth": True,
        "gcs_base_url": "http://localhost:1",
    }
    file = tmp_path / "account.json"
    file.write_text(json.dumps(account))
    for token in (str(file), account):
        assert open_bucket(parse("gs://bucket/x", {"token": token}, TIMEOUT_S)) is not None
    config = config_of("gcs://bucket/x", {"token": "anon", "endpoint_url": "http://h:1"})
    assert config["skip_signature"].lower() == "true"
    assert config["base_url"] == "http://h:1"
    assert not parse("gs://bucket", {"token": "google_default"}, TIMEOUT_S).config


def test_azure() -> None:
    options = {"account_name": "account", "account_key": "aHVzaA=="}
    config = config_of("az://container/x", options)
    assert config["account_name"] == "account"
    assert config["account_key"] == "aHVzaA=="
    url = "abfss://container@account.dfs.core.windows.net/x"
    config = config_of(url, {"tenant_id": "t", "client_id": "c", "client_secret": "s"})
    assert config["account_name"] == "account"
    assert config["client_secret"] == "s"
    assert config_of(url, {"anon": True})["skip_signature"].lower() == "true"


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"endpiont_url": "x"}, "'endpiont_url'"),
            ({"client_kwargs": {"verify": False}}, "'client_kwargs.verify'"),
            ({"profile": "work"}, "'profile'"),
            ({"google_service_account": "x"}, "'google_service_account'"),
        ],
    )
    def test_an_unknown_option_is_answered_with_the_known(
        self, options: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ConfigError, match="client: fsspec") as caught:
            open_medium("s3://bucket/x", {"secret": "hush", **options}, "v1")
        assert name in str(caught.value)
        assert "endpoint_url, key, region" in str(caught.value)
        assert "hush" not in str(caught.value)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"aws_nosuch": "x"}, "aws_nosuch"),
            ({"anon": "perhaps"}, "perhaps"),
            ({"client_options": {"nosuch": 1}}, "nosuch"),
            ({"client_options": "fast"}, "must be a mapping"),
            ({"client": "boto3"}, "obstore, fsspec"),
        ],
    )
    def test_what_obstore_refuses(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            open_medium("s3://bucket/x", options, "v1")

    @pytest.mark.parametrize("url", ["s3://", "s3:///folder", "s3::x"])
    def test_a_url_without_a_bucket(self, url: str) -> None:
        with pytest.raises(ConfigError, match="names no bucket"):
            open_medium(url, {}, "v1")

    def test_obstore_for_what_it_cannot_do(self) -> None:
        with pytest.raises(ConfigError, match="remove `client`"):
            open_medium("memory://x", {"client": "obstore"}, "v1")


class TestWithoutObstore:
    @pytest.fixture(autouse=True)
    def _missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "obstore", None)
        monkeypatch.delitem(sys.modules, "shared_cache.media.object_medium")

    def test_s3fs_is_used(self) -> None:
        medium, root = open_medium("s3://bucket/x", {"anon": True}, "v1")
        assert isinstance(medium, ObjectMedium)
        assert root == "bucket/x"

    def test_asking_for_it_by_name_says_what_to_install(self) -> None:
        with pytest.raises(ConfigError, match=r"pip install 'kvcommons\[s3\]'"):
            open_medium("s3://bucket/x", {"client": "obstore"}, "v1")


def test_missing_credentials_are_called_that() -> None:
    from obstore.exceptions import GenericError

    error = of_object_store(
        GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 5s")
    )
    assert isinstance(error, RequestRefusedError)
    assert "AWS_ACCESS_KEY_ID" in str(error)
