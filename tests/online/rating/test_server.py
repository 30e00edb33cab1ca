"""A person at the page: rates, undoes, reloads, opens a second tab, draws the next round; every answer is stored."""

import asyncio
import html
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import uvicorn
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.fakes.engine import CONFIG, FakeEngine
from tiltopt import cli
from tiltopt.errors import ConfigError, StoreError
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.rating.server import make_app, serve
from tiltopt.online.rating.session import Rating, Scale
from tiltopt.online.web import listen

TOKEN = "a-long-token"


@pytest.fixture
def rating(tmp_path):
    """A run with round 0, five pictures, asked."""
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        optimizer.ask(5)
        yield Rating(optimizer)


def tab(rating: Rating) -> TestClient:
    """A browser that opened the printed address."""
    client = TestClient(make_app(rating, TOKEN), base_url="http://127.0.0.1")
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


def told(client: TestClient, path: str, **body) -> dict:
    return client.post(path, json=body).json()


def test_a_batch_is_rated_one_by_one_and_each_answer_is_stored_at_once(rating):
    client = tab(rating)
    for number in range(1, 6):
        state = client.get("/state").json()
        assert (state["query"]["id"], state["waiting"], state["asked"]) == (number, 6 - number, 5)
        assert client.get(f"/image/{number}").headers["content-type"] == "image/png"
        after = told(client, "/rate", id=number, value=number - 1)
        stored = rating.optimizer.queries()
        assert stored.loc[number - 1, ["state", "value"]].tolist() == ["answered", number - 1.0]
        assert after["answered"] == number
    assert after["query"] is None
    assert after["complete"] is False


def test_undo_takes_back_the_newest_answer_step_by_step(rating):
    client = tab(rating)
    assert client.get("/state").json()["undo"] is None
    told(client, "/rate", id=1, value=3)
    told(client, "/rate", id=2, value=4)
    state = told(client, "/undo")
    assert (state["query"]["id"], state["undo"], state["answered"]) == (2, 1, 1)
    assert told(client, "/undo")["query"]["id"] == 1
    refused = client.post("/undo", json={})
    assert refused.status_code == 409
    assert "no answer of this round" in refused.json()["error"]
    assert told(client, "/rate", id=1, value=9)["undo"] == 1
    assert rating.optimizer.queries()["value"].iloc[0] == 9.0


def test_more_like_this_one_is_drawn_and_shown(rating):
    client = tab(rating)
    for number in range(1, 5):
        told(client, "/rate", id=number, value=number)
    assert [query["id"] for query in client.get("/best").json()] == [4, 3, 2, 1]
    state = told(client, "/refine", id=5)
    assert state["drawing"]
    rating.join(60)
    frame = rating.optimizer.queries()
    assert (frame["operator"].tolist()[5:], frame["parents"].tolist()[5:]) == (["restart"] * 2, ["5"] * 2)
    assert client.get("/state").json()["waiting"] == 3, "what was asked before still waits"
    told(client, "/skip", id=6)
    refused = client.post("/refine", json={"id": 6})
    assert (refused.status_code, "given up" in refused.json()["error"]) == (409, True)


def test_two_tabs_cannot_answer_twice_and_the_second_is_shown_where_things_stand(rating):
    one, two = tab(rating), tab(rating)
    assert one.get("/state").json()["query"] == two.get("/state").json()["query"]
    told(one, "/rate", id=1, value=7)
    late = two.post("/rate", json={"id": 1, "value": 2})
    assert late.status_code == 409
    assert "query 1 is answered" in late.json()["error"]
    assert late.json()["state"]["query"]["id"] == 2
    assert rating.optimizer.queries()["value"].iloc[0] == 7.0


def paged(name: str) -> dict:
    return {"headers": {"X-Tiltopt-Page": name}}


def test_two_pages_at_once_are_shown_different_queries_and_take_back_their_own_answers(rating):
    client = tab(rating)

    def shown(page):
        return client.get("/state", **paged(page)).json()["query"]["id"]

    def rate(page, number):
        return client.post("/rate", json={"id": number, "value": 5}, **paged(page)).json()

    assert [shown("a"), shown("b"), shown("a"), shown("b")] == [1, 2, 1, 2]
    assert rate("a", 1)["query"]["id"] == 3
    assert shown("b") == 2, "what a page shows does not change under the person's eyes"
    assert (rate("b", 2)["query"]["id"], rate("b", 4)["query"]["id"]) == (4, 5)
    assert client.get("/state", **paged("a")).json()["undo"] == 1
    assert client.post("/undo", json={}, **paged("a")).json()["query"]["id"] == 1
    assert client.post("/undo", json={}, **paged("a")).status_code == 409, "the rest was answered by the other page"
    assert client.post("/undo", json={}, **paged("b")).json()["undo"] == 2


def test_what_a_page_showed_is_free_again_when_the_page_is_gone(rating, monkeypatch):
    client = tab(rating)
    first = client.get("/state", **paged("a")).json()["query"]["id"]
    monkeypatch.setattr("tiltopt.online.rating.session.PATIENCE", 0.0)
    assert client.get("/state", **paged("b")).json()["query"]["id"] == first


def test_more_pages_than_queries_share_the_last(rating):
    client = tab(rating)
    shown = [client.get("/state", **paged(str(i))).json()["query"]["id"] for i in range(6)]
    assert shown[:5] == [1, 2, 3, 4, 5]
    assert shown[5] in shown[:5]


def test_a_reload_or_another_server_goes_on_where_it_was(rating):
    told(tab(rating), "/rate", id=1, value=7)
    state = tab(Rating(rating.optimizer)).get("/state").json()
    assert (state["query"]["id"], state["undo"]) == (2, 1)


def test_skipped_pictures_teach_nothing_and_a_skip_can_be_undone(rating):
    client = tab(rating)
    state = told(client, "/skip", id=1)
    assert (state["query"]["id"], state["undo"], state["asked"] - state["waiting"]) == (2, 1, 1)
    row = rating.optimizer.queries().iloc[0]
    assert (row["state"], row["error"]) == ("abandoned", "skipped by the rater")
    assert told(client, "/undo")["query"]["id"] == 1
    row = rating.optimizer.queries().iloc[0]
    assert (row["state"], row["error"]) == ("asked", None)
    rating.optimizer.abandon(2, "the sample was lost")
    assert client.get("/state").json()["undo"] is None, "what nobody skipped is not undone here"


@pytest.mark.parametrize("value", [None, "7", -1, 9.5, True, [3], {}])
def test_what_is_not_on_the_scale_is_refused(rating, value):
    reply = tab(rating).post("/rate", json={"id": 1, "value": value})
    assert reply.status_code == 409
    assert "expected a number from 0 to 9" in reply.json()["error"]
    assert rating.optimizer.queries()["state"].tolist() == ["asked"] * 5


@pytest.mark.parametrize("id", [None, 99, "1", True])
def test_unknown_queries_are_refused(rating, id):
    reply = tab(rating).post("/rate", json={"id": id, "value": 3})
    assert reply.status_code == 409
    assert "unknown query" in reply.json()["error"]


def test_the_next_round_is_drawn_when_this_one_is_rated_and_the_run_ends_with_a_report(rating):
    client = tab(rating)
    early = client.post("/next", json={})
    assert early.status_code == 409
    assert "still wait for an answer" in early.json()["error"]
    state = client.get("/state").json()
    for round_ in range(3):
        while state["query"] is not None:
            state = told(client, "/rate", id=state["query"]["id"], value=(3 * state["query"]["id"]) % 10)
        assert state["complete"] is (round_ == 2)
        if round_ < 2:
            told(client, "/next")
            rating.join(60)
            state = client.get("/state").json()
            assert state["trouble"] == ""
            assert (state["round"], state["waiting"], state["undo"]) == (round_ + 1, 3, None)
    assert client.post("/next", json={}).status_code == 409
    rating.finish()
    folder = rating.optimizer.folder
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["queries"] for row in summary["rounds"]] == [5, 8, 11]
    assert summary["complete"] is True
    assert (folder / "report.html").exists()
    assert sorted(p.parent.name for p in folder.glob("round_*/summary.json")) == ["round_000", "round_001", "round_002"]


def test_an_answer_changed_after_the_checkpoint_reaches_the_summary(rating):
    for number in range(1, 6):
        rating.rate(number, 1)
    rating.finish()
    rating.undo()
    rating.rate(5, 9)
    rating.finish()
    summary = json.loads((rating.optimizer.folder / "round_000" / "summary.json").read_text())
    assert summary["best"] == 9.0


def test_a_round_that_cannot_be_drawn_is_told_and_can_be_tried_again(rating, monkeypatch):
    for number in range(1, 6):
        rating.rate(number, number)

    def broken(*_):
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(rating.optimizer, "ask", broken)
        rating.draw()
        rating.join(30)
        assert "could not be drawn: disk full" in rating.state()["trouble"]
    rating.draw()
    rating.join(60)
    assert rating.state()["trouble"] == ""
    assert rating.state()["waiting"] == 3


def test_many_threads_answer_each_query_once(rating):
    outcomes = []

    def answer(value):
        for number in range(1, 6):
            try:
                rating.rate(number, value)
                outcomes.append(number)
            except StoreError:
                pass

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("path", ["/", "/state", "/image/1", "/?token=wrong", "/?token="])
def test_without_the_token_nothing_is_shown(rating, path):
    reply = TestClient(make_app(rating, TOKEN), base_url="http://127.0.0.1").get(path)
    assert reply.status_code == 403
    assert "prompt" not in reply.text


@pytest.mark.parametrize("path", ["/rate", "/skip", "/undo", "/next"])
def test_without_the_token_nothing_is_changed(rating, path):
    client = TestClient(make_app(rating, TOKEN), base_url="http://127.0.0.1")
    assert client.post(path, json={"id": 1, "value": 3}).status_code == 403
    assert rating.optimizer.queries()["state"].tolist() == ["asked"] * 5


def test_other_sites_cannot_reach_it(rating):
    client = tab(rating)
    assert client.get("/state", headers={"host": "evil.example"}).status_code == 400
    form = client.post("/rate", content="id=1&value=3", headers={"content-type": "application/x-www-form-urlencoded"})
    assert form.status_code == 415
    assert client.post("/rate", content="[1]", headers={"content-type": "application/json"}).status_code == 400
    assert client.post("/rate", content="{", headers={"content-type": "application/json"}).status_code == 400
    cookie = TestClient(make_app(rating, TOKEN), base_url="http://127.0.0.1").get(
        f"/?token={TOKEN}", follow_redirects=False
    )
    assert cookie.headers["location"] == "/"
    assert "HttpOnly" in cookie.headers["set-cookie"]
    assert "SameSite=strict" in cookie.headers["set-cookie"]


def test_a_request_from_another_origin_changes_nothing(rating):
    """Cookies know no ports: a page of another server on this machine would send ours along."""
    client = tab(rating)
    for origin in ("https://evil.example", "http://127.0.0.1:8000", "null"):
        reply = client.post("/rate", json={"id": 1, "value": 3}, headers={"origin": origin})
        assert reply.status_code == 403
        assert rating.optimizer.queries()["state"].tolist() == ["asked"] * 5
    assert client.post("/rate", json={"id": 1, "value": 3}, headers={"origin": "http://127.0.0.1"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/state", "/image/1", "/image/99", "/rate"])
def test_every_reply_forbids_guessing_types_and_foreign_frames(rating, path):
    headers = (tab(rating).post(path, json={}) if path == "/rate" else tab(rating).get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    if path == "/":
        policy = headers["content-security-policy"]
        for rule in ("default-src 'none'", "frame-ancestors 'self'", "base-uri 'none'", "form-action 'none'"):
            assert rule in policy


def test_two_servers_do_not_share_a_cookie(rating):
    """A browser keeps one jar for all ports of this machine."""
    one, two = (TestClient(make_app(rating, token), base_url="http://127.0.0.1") for token in ("first", "second"))
    two.cookies = one.cookies
    assert one.get("/?token=first").status_code == 200
    assert two.get("/?token=second").status_code == 200
    assert one.get("/state").status_code == 200
    assert two.get("/state").status_code == 200


def test_the_address_is_told_when_it_can_be_visited(rating, monkeypatch):
    """Whoever is told the address and connects at once is not refused."""
    reached = []

    def say(text):
        if found := re.search(r"127\.0\.0\.1:(\d+)", text):
            with socket.create_connection(("127.0.0.1", int(found.group(1))), timeout=5):
                reached.append(text)

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    serve(rating, 0, say)
    assert len(reached) == 1


def test_the_server_listens_on_this_machine_alone_and_says_when_a_port_is_taken():
    first = listen(0)
    try:
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(ConfigError, match="expected a free port"):
            listen(port)
    finally:
        first.close()


def test_scale():
    assert Scale(1, 5).check(5) == 5.0
    with pytest.raises(StoreError, match="from 1 to 5"):
        Scale(1, 5).check(0)


def test_the_command_needs_a_run(tmp_path, capsys):
    assert cli.main(["rate", str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted_and_leaves_a_report(tmp_path):
    with Optimizer.create(tmp_path / "run", CONFIG, engine=FakeEngine()) as optimizer:
        optimizer.ask(5)
    command = [sys.executable, "-m", "tiltopt", "rate", str(tmp_path / "run"), "--high", "18"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline()).group(0)
        with httpx.Client(follow_redirects=True, timeout=30) as client:
            page = client.get(address)
            assert "HIGH = 18.0" in page.text
            base = address.split("/?")[0]
            assert client.post(f"{base}/rate", json={"id": 1, "value": 16}).json()["answered"] == 1
            assert httpx.get(f"{base}/state").status_code == 403
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"report: {tmp_path / 'run' / 'report.html'}" in rest
    with Optimizer.open(tmp_path / "run", read_only=True) as optimizer:
        assert optimizer.queries()["value"].iloc[0] == 16.0


AUTOPILOT = """<!doctype html><title>working</title><iframe id="f" src="/?token=TOKEN"></iframe><script>
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const frame = document.getElementById("f");
const page = () => frame.contentDocument;
const count = () => page().getElementById("count")?.textContent || "";
async function until(text) {
  for (let i = 0; i < 400; i++) { if (count().startsWith(text)) return; await wait(25); await fetch("/pause"); }
  throw new Error(`waited for "${text}", saw "${count()}"`);
}
function press(key) { page().dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})); }
async function go() {
  await until("0 of 5");
  press("7"); await until("1 of 5");
  press("2"); await until("2 of 5");
  press("u"); await until("1 of 5");
  frame.contentWindow.location.reload();
  await wait(200); await until("1 of 5");
  press("4"); await until("2 of 5");
  page().querySelectorAll("#scale button")[9].click(); await until("3 of 5");
  press("s"); await until("4 of 5");
  press("0"); await until("5 of 5");
  press("Enter"); await until("0 of 3");
  return "done";
}
go().catch((error) => "failed: " + error).then((text) => { document.title = text; });
</script>""".replace("TOKEN", TOKEN)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_real_browser_rates_undoes_reloads_and_draws_the_next_round(rating, tmp_path):
    async def autopilot(request):
        return HTMLResponse(AUTOPILOT)

    async def pause(request):  # the browser's clock is virtual and runs ahead of a round that is being drawn
        await asyncio.sleep(0.05)
        return PlainTextResponse("")

    server = listen(0)
    app = make_app(rating, TOKEN, extra=(Route("/autopilot", autopilot), Route("/pause", pause)))
    runner = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [server]}, daemon=True)
    thread.start()
    try:
        while not runner.started:
            time.sleep(0.02)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        command = ["chromium", *flags.split(), "--disable-component-update", "--disable-sync", "--timeout=20000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
        command += [f"http://127.0.0.1:{server.getsockname()[1]}/autopilot"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    finally:
        runner.should_exit = True
        thread.join(20)
    assert html.unescape(re.search("<title>(.*?)</title>", dom).group(1)) == "done"
    frame = rating.optimizer.queries()
    assert frame["value"].tolist()[:3] == [7.0, 4.0, 9.0]
    assert frame["state"].tolist() == [
        "answered",
        "answered",
        "answered",
        "abandoned",
        "answered",
        "asked",
        "asked",
        "asked",
    ]


def test_a_person_is_paid_for_within_the_budget_of_the_run(tmp_path):
    with Optimizer.create(tmp_path / "run", CONFIG | {"reward": {"max_queries": 3}}, engine=FakeEngine()) as optimizer:
        optimizer.ask(5)
        rating = Rating(optimizer)
        for number in (1, 2, 3):
            rating.rate(number, 5)
        for refused in (lambda: rating.rate(4, 5), lambda: [rating.skip(n) for n in (4, 5)] and rating.draw()):
            with pytest.raises(StoreError, match=r"`reward\.max_queries` = 3 of this run is used up"):
                refused()
        assert optimizer.store.counts()["answered"] == 3


def test_an_answer_that_was_taken_back_can_be_given_again_at_the_end_of_the_budget(tmp_path):
    with Optimizer.create(tmp_path / "run", CONFIG | {"reward": {"max_queries": 1}}, engine=FakeEngine()) as optimizer:
        optimizer.ask(5)
        rating = Rating(optimizer)
        rating.rate(1, 5)
        assert rating.undo() == 1
        rating.rate(1, 6)


def test_the_time_of_a_person_counts_in_the_budget_of_seconds(tmp_path):
    with Optimizer.create(
        tmp_path / "run", CONFIG | {"reward": {"max_seconds": 0.3}}, engine=FakeEngine()
    ) as optimizer:
        optimizer.ask(5)
        rating = Rating(optimizer)
        with rating.pulse:
            rating.rate(1, 5)
            time.sleep(0.4)
        assert 0.4 <= optimizer.store.spent().seconds < 2.0
        with pytest.raises(StoreError, match=r"`reward\.max_seconds` = 0.3"):
            rating.rate(2, 5)
