"""What is asked of the Hub, and what is said when it does not give it. No network: its client is replaced."""

import fnmatch
import logging
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from nibble.errors import CheckpointError
from nibble.quant.hub import download


def hub_error(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://hub/x")
    return kind("Server said no\nand more", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.RepositoryNotFoundError, 404), "neither on this machine nor on the Hub"),
        (hub_error(errors.GatedRepoError, 403), "is a gated model"),
        (hub_error(errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
        (hub_error(errors.HfHubHTTPError, 500), "cannot be fetched from the Hub: Server said no"),
        (errors.LocalEntryNotFoundError("offline"), "Hub cannot be reached"),
        (ConnectionError("[Errno -2] Name or service not known"), "cannot be fetched from the Hub"),
    ],
)
def test_each_failure_has_its_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        download("owner/name", "v9")
    assert "\n" not in str(caught.value) and "owner/name" in str(caught.value)


def test_what_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def fetch(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return "/folder"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert download("owner/name", "v1") == Path("/folder")
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")

    def is_fetched(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in asked["allow_patterns"]) and not any(
            fnmatch.fnmatch(file, p) for p in asked["ignore_patterns"]
        )

    wanted = ("model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "merges.txt",
              "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE.txt")  # fmt: skip
    others = ("pytorch_model.bin", "onnx/model.safetensors", "original/params.json", "model.pt",
              "consolidated.safetensors", "original/tokenizer.model", "README.md")  # fmt: skip
    assert all(map(is_fetched, wanted)) and not any(map(is_fetched, others))


def test_the_http_client_does_not_log_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
        logger.setLevel(logging.NOTSET)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "/folder")
    download("owner/name")
    assert not any(logger.isEnabledFor(logging.INFO) for logger in loggers)
    loggers[0].setLevel(logging.DEBUG)  # somebody wants to see them
    download("owner/name")
    assert loggers[0].isEnabledFor(logging.INFO)
