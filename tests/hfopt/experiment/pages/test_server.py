"""The server answers its own page alone, about runs below its root alone, and writes nothing."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hfopt
from hfopt.experiment.pages import contents
from hfopt.experiment.pages.server import Server
from hfopt.experiment.store.reader import read_run


def write(folder: Path, losses: list[float]) -> None:
    with hfopt.Run(folder, {"lr": 0.1}) as run:
        for step, loss in enumerate(losses):
            run.log(step, loss=loss, products=3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    root = tmp_path / "root"
    write(root / "group" / "one", [3.0, 2.0])
    write(tmp_path / "outside", [1.0])
    with Server(root) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    kind = answer.headers.get("Content-Type", "")
    return answer.status, json.loads(body) if "json" in kind and body else body, answer.headers


def test_the_list_and_a_run(server: Server) -> None:
    status, found, _ = ask(server, "/api/runs")
    assert status == 200
    assert [(run["id"], run["step"], run["loss"], run["state"]) for run in found["runs"]] == [
        ("group/one", 2, 2.0, "finished")
    ]
    status, run, _ = ask(server, "/api/run?name=group/one")
    assert status == 200
    assert run == json.loads(json.dumps(contents.contents(read_run(server.root / "group" / "one"), "group/one")))
    assert run["settings"]["settings.lr"] == 0.1
    status, page, headers = ask(server, "/")
    assert status == 200
    assert b"uPlot" in page
    assert "connect-src &#x27;self&#x27;" in page.decode()
    assert headers["X-Frame-Options"] == "DENY"


def test_rows_behind_the_last_one(server: Server) -> None:
    run = read_run(server.root / "group" / "one")
    finished = [float(value) for value in run.steps["finished"]]
    status, rows, _ = ask(server, f"/api/rows?name=group/one&after=0&finished={finished[0]!r}")
    assert status == 200
    assert not rows["again"]
    assert rows["columns"]["step"] == contents.packed(run.steps["step"][1:], "f8")
    assert rows["columns"]["products"] == contents.packed([3.0], "f8")  # of all rows before it
    assert ask(server, f"/api/rows?name=group/one&after=0&finished={finished[1]!r}")[1]["again"]
    assert ask(server, "/api/rows?name=group/one&after=9&finished=0")[1]["again"]
    assert ask(server, "/api/rows?name=group/one&after=x&finished=0")[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
    ids=str,
)
def test_pages_from_elsewhere_are_refused(server: Server, headers: dict[str, str]) -> None:
    given = {name: value.format(port=server.server_port) for name, value in headers.items()}
    for path in ("/", "/api/runs", "/api/run?name=group/one"):
        status, found, answered = ask(server, path, **given)
        assert status == 403
        assert set(found) == {"error"}
        assert not [name for name in answered if name.lower().startswith("access-control")]


def test_its_own_page_is_answered(server: Server) -> None:
    port = server.server_port
    for headers in (
        {"Host": f"localhost:{port}"},
        {"Origin": f"http://127.0.0.1:{port}"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
    ):
        status, _, answered = ask(server, "/api/runs", **headers)
        assert status == 200
        assert not [name for name in answered if name.lower().startswith("access-control")]


def test_it_only_reads(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert ask(server, "/api/run?name=group/one", method)[0] == 501
    status, body, headers = ask(server, "/api/runs", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    "name", ["../outside", "group/../../outside", "{outside}", "link", "inner", "nothing", "", "a%00b", "group"]
)
def test_nothing_outside_the_root_is_read(server: Server, tmp_path: Path, name: str) -> None:
    (server.root / "link").symlink_to(tmp_path / "outside")
    inner = server.root / "inner"
    write(inner, [5.0])
    (inner / "run.h5").unlink()
    (inner / "run.h5").symlink_to(tmp_path / "outside" / "run.h5")
    status, found, _ = ask(server, f"/api/run?name={name.format(outside=tmp_path / 'outside')}")
    assert status == 404
    assert set(found) == {"error"}
    assert [run["id"] for run in ask(server, "/api/runs")[1]["runs"]] == ["group/one"]


def test_links_within_the_root_are_followed(server: Server) -> None:
    (server.root / "link").symlink_to(server.root / "group" / "one")
    assert ask(server, "/api/run?name=link")[0] == 200


def test_a_damaged_run_is_said(server: Server) -> None:
    write(server.root / "bad", [1.0])
    (server.root / "bad" / "run.h5").write_bytes(b"nothing")
    found = {run["id"]: run for run in ask(server, "/api/runs")[1]["runs"]}
    assert found["bad"]["state"] == "damaged"
    assert "run.h5" in found["bad"]["said"]
    assert found["group/one"]["state"] == "finished"
    status, said, _ = ask(server, "/api/run?name=bad")
    assert status == 500
    assert "run.h5" in said["error"]


def test_a_port_that_is_taken(server: Server) -> None:
    with pytest.raises(OSError, match=f"port {server.server_port} cannot be used .*--port"):
        Server(server.root, server.server_port)
