"""`tiltopt serve`: a list of runs, reports that follow, several over each other, rating; and who is kept out."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from tests.fakes.browser import FLAGS, needs_chromium
from tests.fakes.engine import CONFIG, FakeEngine
from tests.fakes.run import NASTY, make_run
from tiltopt.errors import ConfigError
from tiltopt.online import web
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.report.record import load_run
from tiltopt.online.serving.runs import Runs, planned_queries
from tiltopt.online.serving.server import Sessions, changes, make_app
from tiltopt.online.store import files

TOKEN = "a-long-token"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished runs, one of them deeper, and one that waits for a person."""
    make_run(tmp_path / "first")
    make_run(tmp_path / "deep" / "second")
    with Optimizer.create(tmp_path / "rated", CONFIG, engine=FakeEngine()) as opt:
        opt.ask(3)
    (tmp_path / "no run").mkdir()
    return tmp_path


def browser(folder: Path) -> TestClient:
    door = web.Door(TOKEN, "tiltopt serve")
    sessions = Sessions(door, lambda place: Optimizer.open(place, engine=FakeEngine()))
    client = TestClient(make_app(Runs(folder), TOKEN, sessions), base_url="http://127.0.0.1")
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


def key_of(folder: Path, name: str) -> str:
    return {place: key for key, place in Runs(folder).places().items()}[folder / name]


def test_every_run_is_listed_with_state_budget_best_and_lift(folder: Path) -> None:
    rows = {row["name"]: row for row in Runs(folder).rows()}
    assert set(rows) == {"first", "deep/second", "rated"}
    first = rows["first"]
    assert (first["state"], first["budget"]) == ("complete", "46 of 48")
    assert first["gain"].startswith("+")
    assert float(first["gain"]) == pytest.approx(float(first["last"].replace("−", "-")) + 3, abs=0.1), "prior: -3"
    record = load_run(folder / "first")
    assert float(first["lift"]) == round(record.rounds[-1]["mass_lift"], 1) > 10
    assert rows["rated"]["lift"] == "–", "nothing is answered"
    assert (rows["rated"]["state"], rows["rated"]["rated"]) == ("stopped, 3 waiting", True)
    assert not first["rated"], "it is answered from Python"
    page = browser(folder).get("/")
    for name in rows:
        assert f">{name}</a>" in page.text
    assert "<th>mass lift</th>" in page.text
    assert f"<td>{first['lift']}</td>" in page.text
    nonce = page.text.partition('<script nonce="')[2].partition('"')[0]
    assert nonce
    assert f"'nonce-{nonce}'" in page.headers["content-security-policy"]


def test_budgets_bound_what_is_planned() -> None:
    settings: dict[str, Any] = {"rounds": 2, "batch_size": 3, "initial_batch_size": 5}
    assert planned_queries(settings) == 11
    assert planned_queries(settings | {"reward": {"max_queries": 7}}) == 7
    assert planned_queries({}) == 0
    evaluated = {"initial_batch_size": 60, "batch_size": 5, "rounds": 2}
    evaluated |= {"evaluate": {"surrogate": "run", "seeds": 3, "seen": "demo_animals"}}
    assert planned_queries(evaluated) == 3 * 30


def test_a_report_shows_the_run_as_it_is_now(folder: Path) -> None:
    client, key = browser(folder), key_of(folder, "rated")
    before = client.get(f"/runs/{key}/").text
    assert "No query is answered yet" in before
    base = f"/runs/{key}/"
    assert before.count('aria-current="page"') == 1
    for tab, address in (("report", base), ("rate", f"{base}rate/"), ("refine", f"{base}rate/#refine")):
        assert f'<a href="{address}"' in before, tab
    assert "rate/" not in client.get(f"/runs/{key_of(folder, 'first')}/").text, "its answers come from Python"
    with Optimizer.open(folder / "rated", engine=FakeEngine()) as opt:
        stamp = Runs(folder).stamp(key)
        opt.tell(1, 0.125)
        assert Runs(folder).stamp(key) != stamp
        after = client.get(f"/runs/{key}/").text
        assert "0.125" in after
        assert f'data-events="/events?run={key}"' in after
    assert NASTY not in client.get(f"/runs/{key_of(folder, 'first')}/").text
    assert client.get("/runs/nothing/").status_code == 404


def test_several_runs_lie_over_each_other(folder: Path) -> None:
    client = browser(folder)
    keys = [key_of(folder, name) for name in ("first", "deep/second")]
    page = client.get("/compare", params={"runs": keys})
    assert page.status_code == 200
    assert "2 runs that maximise" in page.text
    alone = client.get("/compare", params={"runs": keys[:1] * 2})
    assert (alone.status_code, "two or more runs" in alone.text) == (404, True)


def test_a_damaged_run_hides_no_other(folder: Path) -> None:
    (folder / "first" / "queries.sqlite").write_bytes(b"not a database")
    rows = {row["name"]: row for row in Runs(folder).rows()}
    assert rows["first"]["state"] == "not readable"
    assert rows["deep/second"]["state"] == "complete"
    assert browser(folder).get("/").status_code == 200


def test_a_run_is_read_again_only_when_it_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiltopt.online.serving import runs as module

    seen: list[Path] = []
    load = module.load_run
    monkeypatch.setattr(module, "load_run", lambda place: (seen.append(place), load(place))[1])
    runs, key = Runs(folder), key_of(folder, "first")
    assert runs.seen(key) is runs.seen(key)
    assert len(seen) == 1
    (folder / "first" / "summary.json").write_text("{}")
    runs.seen(key)
    assert len(seen) == 2


def test_a_person_rates_from_the_same_page(folder: Path) -> None:
    client, key = browser(folder), key_of(folder, "rated")
    base = f"/runs/{key}/rate"
    page = client.get(f"{base}/")
    assert 'href="/">all runs' in page.text
    assert client.get(f"{base}/best").json() == []
    for tab, address in (("report", f"/runs/{key}/"), ("rate", f"{base}/"), ("refine", f"{base}/#refine")):
        assert f'<a href="{address}">{tab}</a>' in page.text
    state = client.get(f"{base}/state").json()
    assert state["query"]["id"] == 1
    assert client.get(f"{base}/image/1").headers["content-type"] == "image/png"
    after = client.post(f"{base}/rate", json={"id": 1, "value": 4}).json()
    assert (after["answered"], after["query"]["id"]) == (1, 2)
    assert "4" in client.get(f"/runs/{key}/").text
    assert {row["name"]: row["state"] for row in Runs(folder).rows()}["rated"] == "open here"
    foreign = client.post(f"{base}/rate", json={"id": 2, "value": 4}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403


def test_what_is_written_elsewhere_or_answered_by_others_is_only_shown(folder: Path) -> None:
    client, key = browser(folder), key_of(folder, "rated")
    with Optimizer.open(folder / "rated", engine=FakeEngine()):
        refused = client.get(f"/runs/{key}/rate/")
        assert (refused.status_code, "another process" in refused.text) == (409, True)
    other = client.get(f"/runs/{key_of(folder, 'first')}/rate/")
    assert (other.status_code, "read-only" in other.text) == (409, True)


@pytest.mark.parametrize(
    "path", ["/", "/runs/{key}/", "/runs/{key}/rate/", "/runs/{key}/rate/state", "/compare", "/events"]
)
def test_nobody_without_the_token_sees_anything(folder: Path, path: str) -> None:
    key = key_of(folder, "rated")
    app = make_app(Runs(folder), TOKEN)
    reply = TestClient(app, base_url="http://127.0.0.1").get(path.format(key=key))
    assert reply.status_code == 403
    assert "tiltopt serve" in reply.text
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert TestClient(app, base_url="http://evil.example").get(path.format(key=key)).status_code == 400
    with Optimizer.open(folder / "rated"):
        pass  # the rating page was not opened


def test_no_address_leads_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_run(tmp_path_factory.mktemp("elsewhere") / "secret")
    client = browser(folder)
    for name in ("..", "..%2f..", "%2e%2e/secret", "secret"):
        assert client.get(f"/runs/{name}/").status_code in (404, 200)
        assert "secret" not in client.get(f"/runs/{name}/").text.replace(f"'{name}'", "")


def test_events_tell_a_stamp_at_once_and_when_it_changes() -> None:
    stamps = iter(["a", "a", "b", "b", "c"])

    async def listen() -> list[str]:
        line = changes(lambda: next(stamps), every_s=0.0)
        return [await anext(line) for _ in range(5)]

    told = asyncio.run(listen())
    assert [text for text in told if text.startswith("data")] == ['data: "a"\n\n', 'data: "b"\n\n', 'data: "c"\n\n']


def test_a_server_tells_what_changes_and_ends_when_it_is_told(folder: Path) -> None:
    """The whole command: its address, its events while a run is told an answer, and its end."""
    command = [sys.executable, "-m", "tiltopt", "serve", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("3 runs of ")
            address = line.split(" at ")[1].split()[0]
            with httpx.Client(base_url=address.split("?")[0], follow_redirects=True, timeout=30) as client:
                client.get(address)
                with client.stream("GET", "/events") as events:
                    lines = (text for text in events.iter_lines() if text.startswith("data"))
                    first = next(lines)
                    with Optimizer.open(folder / "rated", engine=FakeEngine()) as opt:
                        opt.tell(1, 0.5)
                    assert next(lines) != first
        finally:
            server.send_signal(2)
            assert server.wait(30) == 0


@needs_chromium
def test_an_open_page_follows_its_runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A browser that shows the list fetches it again, by itself, when a run is told an answer."""

    class Counted(Runs):
        budgets: ClassVar[list[str]] = []

        def rows(self) -> list[dict[str, Any]]:
            rows = super().rows()
            self.budgets += [row["budget"] for row in rows if row["name"] == "rated"]
            return rows

    runs, socket = Counted(folder), web.listen(0)
    config = uvicorn.Config(make_app(runs, TOKEN), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[socket]))
    thread.start()
    address = f"http://127.0.0.1:{socket.getsockname()[1]}/?token={TOKEN}"
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    with subprocess.Popen(
        ["chromium", *FLAGS, profile, "--remote-debugging-port=0", address], stderr=subprocess.DEVNULL
    ) as browser:
        try:
            assert eventually(lambda: runs.budgets == ["0 of 11"])
            with Optimizer.open(folder / "rated", engine=FakeEngine()) as opt:
                opt.tell(1, 0.5)
            assert eventually(lambda: runs.budgets[-1] == "1 of 11")
        finally:
            browser.terminate()
            server.should_exit = True
            thread.join(30)


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def test_who_writes_a_run_is_told_without_taking_its_right(tmp_path: Path) -> None:
    assert files.writer(tmp_path) is None
    lock = files.WriterLock(tmp_path)
    assert files.writer(tmp_path) == os.getpid()
    lock.release()
    assert files.writer(tmp_path) is None, "the process lives, but has let go"
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            files.writer(tmp_path)

    (tmp_path / "writer.lock").write_text("999999999")
    looker = threading.Thread(target=look)
    looker.start()
    try:
        for _ in range(50):
            files.WriterLock(tmp_path).release()
            (tmp_path / "writer.lock").write_text("999999999")
    finally:
        stop.set()
        looker.join()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Runs(tmp_path / "nothing")
