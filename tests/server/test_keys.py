"""API keys: what is taken for one, from where, and that a server that was meant to be locked is never open."""

import hashlib
from pathlib import Path

import pytest

from nibble import cli
from nibble.errors import UserError
from nibble.server import keys
from nibble.server.auth import AuthMiddleware
from nibble.tools.serve_command import _api_keys


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def borne(known: tuple[keys.ApiKey, ...], *headers: bytes) -> str | None:
    """The name of whom a request with these Authorization headers is from."""

    async def app(*_: object) -> None: ...

    scope = {"headers": [(b"authorization", header) for header in headers]}
    tenant = AuthMiddleware(app, known).tenant(scope)
    return tenant and tenant.name


def test_a_file_names_whoever_bears_its_keys(tmp_path: Path) -> None:
    text = "# staff\nalice:sk-1:2\n\n  bob : b-key  \n  # bare:\nbare-key\n"
    known = keys.from_file(written(tmp_path, text), keys.given(["flag"], "--api-key"))
    assert [key.name for key in known] == ["key-1", "alice", "bob", "key-4"]
    assert borne(known, b"Bearer sk-1:2") == "alice"
    assert borne(known, b"bearer b-key") == "bob"
    assert borne(known, b"Bearer bare-key") == "key-4" and borne(known, b"Bearer flag") == "key-1"
    for header in (b"Bearer alice", b"Bearer sk-1", b"Bearer ", b"Bearer", b"Basic flag", b"flag"):
        assert borne(known, header) is None, header
    assert borne(known, b"Bearer flag", b"Bearer flag") is None
    assert all(key.digest == hashlib.sha256(text).digest() for key, text in [(known[0], b"flag")])
    assert "flag" not in repr(known) and "b-key" not in repr(known)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no key"),
        ("# only\n#comments:x\n\n", "holds no key"),
        ("alice:\n", "line 1: the API key is empty"),
        ("a:1\nb:secret secret\n", "line 2: .* no spaces"),
        ("a:s\u00e9cret\n", "visible ASCII"),
        ("a b:secret\n", "name is made of"),
        (":secret\n", "line 1"),
        ("a:secret\nb:secret\n", "line 2: .* that of 'a'"),
        ("a:secret\na:other\n", "line 2: .* that of 'a'"),
        (b"a:\xff\xfe\n", "not UTF-8"),
        (b"x" * (keys.MAX_FILE_BYTES + 1), "larger than"),
    ],
)
def test_a_bad_file_is_said_without_its_keys(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        keys.from_file(written(tmp_path, text))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o440, True), (0o604, False),
                                            (0o602, False), (0o620, False)])  # fmt: skip
def test_a_file_that_others_can_read_or_change_is_refused(
    tmp_path: Path, mode: int, fine: bool
) -> None:
    path = written(tmp_path, "a:secret", mode)
    if fine:
        assert [key.name for key in keys.from_file(path)] == ["a"]
    else:
        with pytest.raises(UserError, match="chmod 600"):
            keys.from_file(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            keys.from_file(str(path))


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (("--api-key", ""), None),
        (("--api-key", "good", "--api-key", ""), None),
        (("--api-key", "a b"), None),
        (("--api-key", "twice", "--api-key", "twice"), None),
        ((), ""),
        ((), "a b"),
        ((), " "),
    ],
)
def test_a_key_that_is_none_ends_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    environment: str | None,
) -> None:
    monkeypatch.delenv("NIBBLE_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("NIBBLE_API_KEY", environment)
    assert cli.main(["serve", "/no/such/model", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("--api-key" in said or "NIBBLE_API_KEY" in said)
    assert "twice" not in said


def test_the_environment_counts_where_no_flag_gives_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIBBLE_API_KEY", "mine")
    assert borne(_api_keys([], None), b"Bearer mine") == "key-1"
    assert borne(_api_keys(["flag"], None), b"Bearer mine") is None
    file = written(tmp_path, "a:one")
    assert borne(_api_keys([], file), b"Bearer mine") is None
    both = _api_keys(["flag"], file)
    assert (borne(both, b"Bearer one"), borne(both, b"Bearer flag")) == ("a", "key-1")
    monkeypatch.delenv("NIBBLE_API_KEY")
    assert _api_keys([], None) == ()
