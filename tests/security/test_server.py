"""The local server answers its own page and nothing else (promises W1 to W3, W5)."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import sys
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from rarefy.errors import BadInput, Damaged
from rarefy.ui import make_app, serve, write_report
from rarefy.ui.export import module_order
from rarefy.ui.server import check_address

sys.path.insert(0, str(Path(__file__).parents[1] / "ui"))
from sample import sample_report  # noqa: E402

REPORT = sample_report(3)
TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def run(tmp_path):
    write_report(tmp_path / "run", copy.deepcopy(REPORT))
    (tmp_path / "run" / "secret.txt").write_text("canary")
    (tmp_path / "secret.txt").write_text("canary")
    return tmp_path / "run"


@pytest.fixture
def client(run):
    return TestClient(make_app(run), base_url="http://127.0.0.1:8765")


def test_serves_the_page(client):
    assert "<main" in client.get("/").text
    assert client.get("/report.json").json() == REPORT
    for name in module_order():
        assert client.get(f"/static/{name}").headers["content-type"].startswith("text/javascript")


def test_policy_on_every_answer(client):
    for path in ("/", "/report.json", "/static/main.js", "/nothing"):
        headers = client.get(path).headers
        assert (
            headers["content-security-policy"].startswith("default-src 'self'")
            and headers["x-content-type-options"] == "nosniff"
        )
        assert not [h for h in headers if h.startswith("access-control")]
    assert "<script>" not in client.get("/").text and "style=" not in client.get("/").text


TRAVERSAL = [
    "/../secret.txt",
    "/..%2fsecret.txt",
    "/%2e%2e/secret.txt",
    "/%2e%2e%2fsecret.txt",
    "//etc/passwd",
    "/static/../../secret.txt",
    "/static/..%2f..%2fschema.py",
    "/static/%2e%2e/schema.py",
    "/secret.txt",
    "/static/",
    "/static",
    "/static//etc/passwd",
    "/..\\secret.txt",
    "/%5c..%5csecret.txt",
    "/report.json/",
    "/report.json/..",
    "/report.json%00.html",
    "/static/main.js%00",
    "/static/index.html",
    "/.git/config",
    "/%252e%252e/secret.txt",
    "/\u2025/secret.txt",
    "/file:///etc/passwd",
    "/run/report.json",
]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A real server on a free port: a client library would tidy the paths before they are sent."""
    folder = tmp_path_factory.mktemp("live")
    write_report(folder / "run", copy.deepcopy(REPORT))
    (folder / "secret.txt").write_text("canary")
    ready = threading.Event()
    address: list[str] = []
    threading.Thread(
        target=serve,
        args=(folder / "run", 0),
        kwargs={"on_ready": lambda a: (address.append(a), ready.set())},
        daemon=True,
    ).start()
    assert ready.wait(10)
    return address[0].removeprefix("http://").rstrip("/")


@pytest.mark.parametrize("path", TRAVERSAL)
def test_traversal_is_404(live, path):
    with contextlib.closing(http.client.HTTPConnection(live, timeout=10)) as connection:
        connection.putrequest("GET", path if path.isascii() else "/%E2%80%A5/secret.txt", skip_host=True)
        connection.putheader("Host", live)
        connection.endheaders()
        reply = connection.getresponse()
        body = reply.read()
    assert reply.status == 404 and b"canary" not in body and b"root:" not in body


def test_live_server_is_on_this_machine_only(live):
    assert live.startswith("127.0.0.1:")
    with contextlib.closing(http.client.HTTPConnection(live, timeout=10)) as connection:
        connection.request("GET", "/report.json")
        assert json.loads(connection.getresponse().read()) == REPORT


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "127.0.0.1:80:80",
        "",
        "0.0.0.0",
        "[::1",
        "127.0.0.1/x",
    ],
)
def test_other_hosts_are_refused(client, host):
    assert client.get("/report.json", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "LOCALHOST:8765", "[::1]:8765"])
def test_own_hosts_pass(client, host):
    assert client.get("/report.json", headers={"host": host}).status_code == 200


def test_reads_only_and_own_origin_only(client):
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert client.request(method, "/report.json").status_code == 405
    assert client.get("/report.json", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/report.json", headers={"origin": "null"}).status_code == 403
    for site, mode, status in (
        ("cross-site", "no-cors", 403), ("same-site", "no-cors", 403), ("same-site", "cors", 403),
        ("same-origin", "cors", 200), ("none", "navigate", 200), ("cross-site", "navigate", 200),
    ):
        got = client.get("/report.json", headers={"sec-fetch-site": site, "sec-fetch-mode": mode})
        assert (got.status_code, got.headers["cross-origin-resource-policy"]) == (status, "same-origin"), (site, mode)
    assert client.get("/report.json", headers={"origin": "http://127.0.0.1:8765"}).status_code == 200
    assert client.head("/").status_code == 200


def test_token(run):
    with TestClient(make_app(run, token=TOKEN), base_url="http://127.0.0.1", follow_redirects=False) as client:
        for path in ("/", "/report.json", "/static/main.js", "/?token=wrong", "/?token=", "/?token=%ff%00"):
            assert client.get(path).status_code == 401
        assert client.get("/report.json", headers={"authorization": "Bearer " + TOKEN}).status_code == 200
        first = client.get("/?token=" + TOKEN)
        assert first.status_code == 303 and first.headers["location"] == "/" and TOKEN not in first.headers["location"]
        cookie = first.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/report.json").status_code == 200


def test_token_redirect_stays_here(run):
    client = TestClient(make_app(run, token=TOKEN), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.get("//evil.example/?token=" + TOKEN).headers["location"] == "/"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_open_address_needs_a_token(host):
    for token in ("", "short"):
        with pytest.raises(BadInput, match="token"):
            check_address(host, token)
    check_address(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host):
    assert "127.0.0.1" in check_address(host, "")


def test_report_linked_from_elsewhere_is_not_served(tmp_path):
    (tmp_path / "out").mkdir()
    write_report(tmp_path / "out", copy.deepcopy(REPORT))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").symlink_to(tmp_path / "out" / "report.json")
    with pytest.raises(BadInput, match="leads out"):
        make_app(tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    write_report(tmp_path / "run", copy.deepcopy(REPORT))
    client = TestClient(make_app(tmp_path / "run"), base_url="http://localhost")
    assert client.get("/report.json").status_code == 200
    (tmp_path / "run" / "report.json").unlink()
    assert client.get("/report.json").status_code == 422
    write_report(tmp_path / "out", {**copy.deepcopy(REPORT), "title": "another length"})
    (tmp_path / "run" / "report.json").symlink_to(tmp_path / "out" / "report.json")
    reply = client.get("/report.json")
    assert reply.status_code == 422 and "leads out" in reply.json()["error"]


def test_damaged_report_is_said_and_a_new_one_is_read(run, client):
    with pytest.raises(Damaged, match="report.json"):
        (run / "report.json").write_text('{"schema": 1')
        make_app(run)
    assert client.get("/report.json").status_code == 422
    write_report(run, {**copy.deepcopy(REPORT), "title": "again"})
    assert client.get("/report.json").json()["title"] == "again"


def test_no_report_no_server(tmp_path):
    with pytest.raises(BadInput, match=r"no report\.json"):
        serve(tmp_path, port=0)
    with pytest.raises(BadInput, match="port=70000"):
        serve(tmp_path, port=70000)
