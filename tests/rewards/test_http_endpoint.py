"""The `http` reward against a local server that misbehaves in every way."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import sys
import tracemalloc
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fakes.server import bomb, floods, half, hangs_up, redirects, says, serve, slow
from tiltopt.errors import ConfigError, RewardError
from tiltopt.online.runner import CallPolicy, Runner
from tiltopt.rewards import BlackBox, Retry, make_reward, validate
from tiltopt.rewards.http_endpoint import HttpOptions, HttpReward, request_ids
from tiltopt.rewards.remote import REPLY_BYTES, RemoteError, retry_after, unpacked

TOKEN = "sesame-4711"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("LAB_TOKEN", TOKEN)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def pictures(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (5, 4 + i, 3), dtype=np.uint8)) for i in range(n)]


def width(item):
    data = base64.b64decode(item["image"]["base64"])
    return Image.open(io.BytesIO(data)).size[0]


def good(handler, seen):
    """Scores an image by its width, answering in reverse order."""
    answers = [{"id": item["id"], "value": float(width(item))} for item in seen.body["items"]]
    handler.send(200, json.dumps({"answers": answers[::-1]}))


def reward(server, **options):
    return make_reward("http", url=f"{server.url}/score", **({"batch_size": 4} | options))


def run(server, n=2, retries=2, **options):
    """What a runner makes of it: answers by id, seconds slept."""
    now, answers = [0.0], {}
    runner = Runner(
        reward(server, **options),
        CallPolicy(retries=retries),
        clock=lambda: now[0],
        sleep=lambda s: now.__setitem__(0, now[0] + s),
    )
    runner.run([(i, image, f"p{i}") for i, image in enumerate(pictures(n))], answers.__setitem__)
    return answers, now[0]


def test_request_and_reply_follow_the_schema():
    images = pictures(3)
    with serve(good) as server:
        box = reward(server, token_env="LAB_TOKEN", unit="mm")
        answers = box(images, ["a", "b", "a"])
    assert isinstance(box, BlackBox)
    assert (box.name, box.unit, box.batch_size) == ("http", "mm", 4)
    assert [answer.value for answer in answers] == [4.0, 5.0, 6.0]
    (request,) = server.requests
    assert request.path == "/score"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.body["version"] == 1
    assert [item["prompt"] for item in request.body["items"]] == ["a", "b", "a"]
    assert [item["id"] for item in request.body["items"]] == request_ids(images, ["a", "b", "a"])
    data = base64.b64decode(request.body["items"][2]["image"]["base64"])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(images[2]))


def test_no_token_no_header():
    with serve(good) as server:
        reward(server)(pictures(1), [""])
    assert "authorization" not in server.requests[0].headers


def test_ids_are_of_the_content_and_unique():
    first, second = pictures(2)
    a, b, c, d = request_ids([first, second, first, first], ["x", "x", "x", "y"])
    assert len({a, b, c, d}) == 4
    assert c == f"{a}-2"
    assert request_ids([first], ["x"]) == [a]


@pytest.mark.parametrize(
    "trouble",
    [
        says(500, "oops"),
        says(502, ""),
        says(429, "slow down"),
        half,
        hangs_up,
        says(200, "<html>"),
        says(200, "[1, 2]"),
        says(200, '{"answers": {"a": 1}}'),
        says(200, '{"answers": [{"id": "of another image", "value": 1.0}]}'),
        says(200, '{"answers": [{"value": 1.0}]}'),
    ],
)
def test_trouble_that_passes_is_retried(trouble):
    with serve(trouble, good) as server:
        answers, slept = run(server)
    assert {i: answer.value for i, answer in answers.items()} == {0: 4.0, 1: 5.0}
    assert len(server.requests) == 2
    assert slept > 0


@pytest.mark.parametrize(
    ("trouble", "text"), [(says(500, "oops"), "HTTP 500: oops"), (half, "Error"), (slow, "Timeout")]
)
def test_trouble_that_stays_fails_the_query_and_says_why(trouble, text):
    with serve(trouble) as server:
        answers, _ = run(server, n=1, retries=1, request_timeout_s=0.1)
    assert answers[0].failed
    assert text in answers[0].error
    assert "2 tries" in answers[0].error
    assert len(server.requests) == 2


def test_retry_after_is_honoured():
    with serve(says(429, "busy", {"Retry-After": "33"}), good) as server:
        answers, slept = run(server)
    assert not answers[0].failed
    assert slept == pytest.approx(33.0)
    with serve(says(503, "", {"Retry-After": "7"})) as server, pytest.raises(Retry) as caught:
        reward(server)(pictures(1), [""])
    assert caught.value.after_s == 7.0


def test_retry_after_in_all_its_forms():
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after": "1e9"}) == 3600.0
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert retry_after({"retry-after": later}) == pytest.approx(100, abs=5)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_an_endpoint_that_cannot_be_used_ends_the_run(status):
    with serve(says(status, f"you said {TOKEN}", {"Location": "http://127.0.0.1:9/"})) as server:
        with pytest.raises(RewardError, match=f"HTTP {status}.*token_env") as caught:
            run(server, token_env="LAB_TOKEN")
        assert len(server.requests) == 1
    assert TOKEN not in str(caught.value)


def test_one_refused_image_does_not_fail_the_others():
    def picky(handler, seen):
        if any(width(item) == 5 for item in seen.body["items"]):
            handler.send(422, "too wide")
        else:
            good(handler, seen)

    with serve(picky) as server:
        answers, _ = run(server, n=3, retries=1)
    assert (answers[0].value, answers[2].value) == (4.0, 6.0)
    assert answers[1].error == "HTTP 422: too wide"


def test_entries_are_read_one_by_one():
    entries = [
        {"value": 1.5, "sem": 0.25},
        {"value": None, "error": "plate broken"},
        {"value": "high"},
        {"value": True},
        {"value": 2.0, "sem": "small"},
        None,
    ]

    def mixed(handler, seen):
        ids = [item["id"] for item in seen.body["items"]]
        answers = [{"id": i, **entry} for i, entry in zip(ids, entries, strict=True) if entry is not None]
        handler.send(200, json.dumps({"answers": answers}))

    with serve(mixed) as server:
        answers, _ = run(server, n=6, batch_size=6)
    assert len(server.requests) == 1
    assert (answers[0].value, answers[0].sem) == (1.5, 0.25)
    assert answers[0].raw["value"] == 1.5
    assert answers[1].error == "plate broken"
    assert "'high'" in answers[2].error
    assert "True" in answers[3].error
    assert (answers[4].value, answers[4].sem) == (2.0, None)
    assert "no answer for this image" in answers[5].error


def test_a_server_that_is_not_there():
    with serve(good) as server:
        url = server.url
    with pytest.raises(RemoteError, match="ConnectError"):
        make_reward("http", url=url)(pictures(1), [""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`reward.url`: expected str, got nothing"),
        ({"url": "lab.example.org/score"}, "address like https"),
        ({"url": "https://me:pw@lab.example.org"}, "must not hold a user name or password"),
        ({"url": "http://x", "token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE, which is not set"),
        ({"url": "http://x", "token_env": "sk-12345"}, "not the secret itself"),
        ({"url": "http://x", "request_timeout_s": 0}, "request_timeout_s"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate("http", options)
    assert "sk-12345" not in str(caught.value)
    assert ":pw@" not in str(caught.value)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(RewardError, match=r"pip install 'tiltopt\[server\]'"):
        make_reward("http", url="http://x")


@pytest.mark.parametrize("flood", [floods, bomb(256), bomb(64, "deflate")])
def test_an_endless_reply_is_left_unread_and_costs_little_memory(flood):
    with serve(flood) as server:
        box = reward(server)
        tracemalloc.start()
        try:
            with pytest.raises(RemoteError, match="longer than 8 MB"):
                box(pictures(1), [""])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert server.sent < 64 * 2**20  # what fits into sockets on its way here
    assert peak < 4 * REPLY_BYTES


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_pictures_do_not_follow_a_redirect(status):
    with serve(good) as elsewhere, serve(redirects(f"{elsewhere.url}/score", status)) as server:
        with pytest.raises(RewardError, match=f"HTTP {status}"):
            reward(server, token_env="LAB_TOKEN")(pictures(1), [""])
        assert elsewhere.requests == []


def test_replies_may_be_packed():
    def packed(handler, seen):
        answers = [{"id": item["id"], "value": float(width(item))} for item in seen.body["items"]]
        content = gzip.compress(json.dumps({"answers": answers}).encode())
        handler.send(200, content, {"Content-Encoding": "gzip"})

    with serve(packed) as server:
        assert [answer.value for answer in reward(server)(pictures(2), ["", ""])] == [4.0, 5.0]
    assert server.requests[0].headers["accept-encoding"] == "gzip"


def test_unpacking_ends_at_the_limit_to_the_byte():
    text = bytes(range(256)) * 4
    for encoding, data in (("identity", text), ("gzip", gzip.compress(text)), ("deflate", zlib.compress(text))):
        for size in (1, 7, 10**6):
            chunks = [data[i : i + size] for i in range(0, len(data), size)]
            assert b"".join(unpacked(chunks, encoding, limit=1024)) == text
            with pytest.raises(RemoteError, match="longer than"):
                list(unpacked(chunks, encoding, limit=1023))
    with pytest.raises(RemoteError, match="not gzip"):
        list(unpacked([b"plain text"], "gzip"))
    with pytest.raises(RemoteError, match="gzip or not at all, got 'br'"):
        list(unpacked([b"?"], "br"))


def test_the_example_server_speaks_the_schema():
    testclient = pytest.importorskip("starlette.testclient")
    path = Path(__file__).parents[2] / "examples" / "http_reward.py"
    spec = importlib.util.spec_from_file_location("example_http_reward", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    box = HttpReward(HttpOptions(url="http://testserver/score"), client=testclient.TestClient(example.app))
    values = [answer.value for answer in box([Image.new("RGB", (4, 4), (9, 9, 9)), Image.new("RGB", (4, 4))], ["", ""])]
    assert values == [9.0, 0.0]


def test_the_example_of_an_own_reward():
    path = Path(__file__).parents[2] / "examples" / "own_reward.py"
    box = make_reward(f"{path}:greenness")
    assert box([Image.new("RGB", (4, 4), (0, 50, 50)), Image.new("RGB", (4, 4))], ["", ""]) == [50.0, 0.0]
