"""Who may ask: keys, hosts, origins; and what a browser is told of the chat page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from servers import NAME, Answer, Server, ask, exchange, started
from starlette.types import Message, Receive, Scope, Send

from gemmary.cli import main
from gemmary.errors import GemmaryError
from gemmary.serve.grammar import Grammars
from gemmary.serve.guards import Guards
from gemmary.serve.metrics import Metrics
from gemmary.serve.protocol import Completions, parse
from gemmary.serve.settings import Settings, api_keys, bytes_of
from gemmary.text import Tokenizer

ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def locked(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants a key, and lets one origin in."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# the team's\nfirst-key\n\nsecond-key\n")
    with started(served, "--api-key-file", str(keys), "--allow-origin", ORIGIN, key="third-key") as running:
        yield running


def get(server: Server, path: str, headers: str = "", method: str = "GET") -> Answer:
    return exchange(server, f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n")


def test_a_wrong_key_is_401_on_every_route_but_health_and_static(locked: Server) -> None:
    for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics", "/v1/nothing", "/docs"):
        for header in (
            "",
            "authorization: Bearer wrong\r\n",
            "authorization: Basic first-key\r\n",
            "authorization: Bearer \xfc\r\n",
        ):
            answer = get(locked, path, header)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json["error"]["code"] == "invalid_api_key"
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert get(locked, path, "content-type: application/json\r\ncontent-length: 0\r\n", "POST").status == 401
    for path in ("/health", "/", "/favicon.ico"):
        assert get(locked, path).status in (200, 204)


def test_every_key_opens_and_names_its_client(locked: Server) -> None:
    for i, key in enumerate(("third-key", "first-key", "second-key")):
        answer = get(locked, "/v1/models", f"authorization: Bearer {key}\r\n")
        assert answer.status == 200
        id = answer.headers["x-request-id"]
        assert [line["client"] for line in locked.events("request") if line["id"] == id] in ([], [f"key {i + 1}"])
    assert locked.client().models.list().data[0].id == NAME
    with (
        openai.OpenAI(base_url=f"{locked.address}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="key is wrong"),
    ):
        client.models.list()


def test_other_origins_are_closed_out(server: Server, locked: Server) -> None:
    preflight = "origin: {}\r\naccess-control-request-method: POST\r\naccess-control-request-headers: content-type\r\n"
    for origin in (ORIGIN, "https://evil.example", "null"):
        answer = get(server, "/v1/chat/completions", preflight.format(origin), "OPTIONS")
        assert answer.status == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "access-control-allow-origin" not in get(server, "/v1/models", f"origin: {origin}\r\n").headers


def test_one_origin_is_let_in_and_never_with_credentials(locked: Server) -> None:
    preflight = "origin: {}\r\naccess-control-request-method: POST\r\n"
    answer = get(locked, "/v1/chat/completions", preflight.format(ORIGIN), "OPTIONS")
    assert answer.status == 204
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert (
        get(locked, "/v1/models", f"origin: {ORIGIN}\r\nauthorization: Bearer first-key\r\n").headers["vary"]
        == "Origin"
    )
    other = get(locked, "/v1/models", "origin: https://evil.example\r\nauthorization: Bearer first-key\r\n")
    for headers in (answer.headers, other.headers):
        assert "access-control-allow-credentials" not in headers
        assert headers.get("access-control-allow-origin") != "*"
    assert "access-control-allow-origin" not in other.headers
    assert get(locked, "/v1/models", preflight.format("https://evil.example"), "OPTIONS").status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", ""]
)
def test_other_names_for_this_machine_are_refused(server: Server, host: str) -> None:
    answer = exchange(server, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n")
    assert answer.status == 403
    assert "loopback" in answer.message


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"])
def test_its_own_names_are_not(server: Server, host: str) -> None:
    assert exchange(server, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n").status == 200


def test_the_page_may_run_its_own_script_and_nothing_else(server: Server) -> None:
    answer = get(server, "/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (
        policy["default-src"] == policy["img-src"] == policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
    )
    assert policy["connect-src"] == "'self'"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_every_answer_says_how_it_may_be_used(server: Server) -> None:
    for answer in (
        get(server, "/"),
        get(server, "/health"),
        ask(server),
        ask(server, stream=True),
        get(server, "/none"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert len(answer.headers["x-request-id"]) == 32
        assert "server" not in answer.headers


def test_an_address_that_others_reach_needs_a_key() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org", ""):
        with pytest.raises(GemmaryError, match=r"other machines: give --api-key-file or GEMMARY_API_KEY"):
            Settings("m", "m", host=host)
        assert Settings("m", "m", host=host, keys=("k",)).keys
    for host in ("127.0.0.1", "127.5.0.1", "::1", "localhost"):
        assert Settings("m", "m", host=host).loopback


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"port": 70000}, {"slots": 0}, {"queue": 0}, {"grace": -1.0}, {"name": ""}, {"allow_origin": "*"}):
        with pytest.raises(GemmaryError, match=next(iter(wrong)).replace("_", ".")):
            Settings(**{"model": "m", "name": "m", **wrong})
    for origin in ("https://a.example/", "a.example", "https://*", "null"):
        with pytest.raises(GemmaryError, match="not one origin"):
            Settings("m", "m", allow_origin=origin)
    assert [bytes_of(text) for text in ("8GiB", "1.5kB", "100", "2 MiB")] == [8 << 30, 1500, 100, 2 << 20]
    for text in ("8G", "", "-1", "many"):
        with pytest.raises(GemmaryError, match="is no size"):
            bytes_of(text)
    file = tmp_path / "keys"
    with pytest.raises(GemmaryError, match="cannot be read"):
        api_keys(file, {})
    file.write_text("# none\n")
    with pytest.raises(GemmaryError, match="has no API key"):
        api_keys(file, {})
    file.write_text("a key\n")
    with pytest.raises(GemmaryError, match="without spaces"):
        api_keys(file, {})
    assert api_keys(None, {"GEMMARY_API_KEY": "a b a"}) == ("a", "b")


def test_what_nobody_foresaw_is_500_without_a_word_of_code(capsys: pytest.CaptureFixture[str]) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("a secret prompt")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    settings = Settings("m", "m")
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "raw_path": b"/health",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(Guards(broken, settings, Metrics(lambda: None))(scope, receive, send))
    assert sent[0]["status"] == 500
    answer = Answer(500, {}, sent[1]["body"])
    assert answer.message == "this is a fault of the server's; its log says more"
    line = json.loads(capsys.readouterr().err)
    assert line["status"] == 500
    assert line["error"].startswith("KeyError < ")
    assert "test_server_access.py" in line["error"]
    assert "secret" not in str(line) + answer.text


def test_a_missing_extra_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "gemmary.serve.run", None)
    with pytest.raises(SystemExit):
        main(["serve", "sample"])
    assert "pip install 'gemmary[serve]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "llguidance", None)
    ask_ = parse(Completions, b'{"model": "m", "prompt": "a", "regex": "a"}')
    with pytest.raises(GemmaryError, match=r"pip install 'gemmary\[grammar\]'"):
        Grammars(tiny, tiny.size).matcher(ask_)


def test_mistakes_at_the_door_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, server: Server) -> None:
    said = []
    for arguments in (["--host", "0.0.0.0"], ["--memory", "much"], ["--port", str(server.port)]):
        with pytest.raises(SystemExit) as exit_:
            main(["serve", str(tmp_path), *arguments])
        assert exit_.value.code == 2
        said.append(capsys.readouterr().err)
    assert "other machines" in said[0]
    assert "is no size" in said[1]
    assert "Address already in use; choose another with --port" in said[2]
    assert all(text.startswith("error: ") and text.count("\n") == 1 for text in said)
