"""`kvcommons keys`: a key is printed once, and what is written opens the door to it."""

import io
import stat

import pytest

from cluster.cli import main
from cluster.endpoint.keys import KeyRing, read_keys
from cluster.endpoint.refusals import UnauthorizedError


@pytest.fixture
def keys(tmp_path, capsys):
    path = tmp_path / "keys.yaml"

    def run(command: str, *options: str) -> tuple[int, str, str]:
        status = main(["keys", command, "--file", str(path), *options])
        return (status, *capsys.readouterr())

    run.path = path
    return run


def test_a_key_that_was_made_is_known(keys):
    _, red, _ = keys("create", "--tenant", "red")
    _, blue, _ = keys("create", "--tenant", "blue", "--group", "library", "--admin")
    _, again, _ = keys("create", "--tenant", "red")
    ring = KeyRing(read_keys(str(keys.path), ""))
    callers = [ring.caller(key.strip()) for key in (red, blue, again)]
    assert [one.tenant.name for one in callers] == ["red", "blue", "red"]
    assert [one.is_admin for one in callers] == [False, True, False]
    assert callers[0].tenant == callers[2].tenant
    assert callers[1].tenant.group_salt is not None
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    assert red.strip().rpartition("-")[2] not in keys.path.read_text()


def test_a_key_that_was_revoked_is_not(keys):
    _, red, _ = keys("create", "--tenant", "red")
    keys("create", "--tenant", "blue")
    key_id = red.split("-")[1]
    assert keys("list")[1].splitlines()[0] == f"{key_id}  red"
    assert keys("revoke", "--id", key_id)[0] == 0
    with pytest.raises(UnauthorizedError):
        KeyRing(read_keys(str(keys.path), "")).caller(red.strip())


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("revoke", ["--id", "000000000000"], "no key with the id"),
        ("create", ["--tenant", "red", "--group", "other"], "is in the group 'library'"),
        ("create", ["--tenant", "bad name"], "tenant"),
    ],
)
def test_mistakes_are_one_line(keys, command, options, text):
    keys("create", "--tenant", "red", "--group", "library")
    before = keys.path.read_text()
    status, _, error = keys(command, *options)
    assert status == 1
    assert text in error
    assert keys.path.read_text() == before


def test_the_last_key_stays(keys):
    _, red, _ = keys("create", "--tenant", "red")
    status, _, error = keys("revoke", "--id", red.split("-")[1])
    assert (status, "last key" in error) == (1, True)


def test_the_hash_of_a_key(keys, monkeypatch, capsys):
    _, red, _ = keys("create", "--tenant", "red")
    monkeypatch.setattr("sys.stdin", io.StringIO(red))
    assert main(["keys", "hash"]) == 0
    assert capsys.readouterr().out.strip() in keys.path.read_text()
