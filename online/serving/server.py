"""`tiltopt serve`: one page on this machine over all runs of a folder, which follows them while they go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tiltopt.errors import ConfigError, TiltoptError
from tiltopt.online import web
from tiltopt.online.optimizer import Optimizer
from tiltopt.online.places import at_address, place_of
from tiltopt.online.rating.server import routes as rating_routes
from tiltopt.online.rating.session import PairRating, Rating, Session
from tiltopt.online.report import comparison_page, evaluation_page, run_page
from tiltopt.online.report.page import render
from tiltopt.online.report.pages import PER_ROUND
from tiltopt.online.report.record import RunRecord
from tiltopt.online.serving.runs import Runs, compared, rateable

EVERY_S = 1.5
"""Seconds between two looks at the files of a run."""

ROOM = "tiltopt.online.serving"
REPORT = "report"
"""Name of the first tab of a run."""


def tabs(key: str, record: RunRecord) -> tuple[tuple[str, str], ...]:
    """Name and address of each page of a run: its report, and where a person answers, rating and refining."""
    base = f"/runs/{key}/"
    if not rateable(record):
        return ((REPORT, base),)
    pairs = dict(record.settings.get("model", {})).get("name") == "pairwise"
    return (REPORT, base), ("pairs" if pairs else "rate", f"{base}rate/"), ("refine", f"{base}rate/#refine")


class Sessions:
    """The runs that are open for rating, each opened when its page is first visited.

    Args:
        door: who is let in.
        opening: opens a run's folder for writing.
    """

    def __init__(self, door: web.Door, opening: Callable[[Path], Optimizer] = Optimizer.open) -> None:
        self.door, self._opening = door, opening
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Session, ASGIApp]] = {}
        self._pulses = contextlib.ExitStack()

    def app(self, key: str, runs: Runs) -> ASGIApp:
        """The rating page of a run.

        Raises:
            ConfigError: no such run, or one that no person answers. StoreError: another process writes it.
        """
        with self._lock:
            if key not in self._open:
                place, seen = runs.place(key), runs.seen(key)
                if place is None or seen.record is None or not rateable(seen.record):
                    raise ConfigError("the answers of this run do not come from a person; it is read-only here.")
                optimizer = self._opening(place)
                session = PairRating(optimizer) if optimizer.settings.pairwise else Rating(optimizer)
                routes = rating_routes(session, self.door, tabs(key, seen.record))
                self._pulses.enter_context(session.pulse)
                self._open[key] = session, Starlette(routes=routes)
            return self._open[key][1]

    def close(self) -> list[Path]:
        """Write what each run leaves behind and give it free; returns the reports."""
        reports = []
        self._pulses.close()
        for session, _ in self._open.values():
            session.join()
            session.finish()
            folder = session.optimizer.folder
            session.optimizer.close()
            reports += [folder / "report.html"] if (folder / "report.html").exists() else []
        self._open.clear()
        return reports


def make_app(runs: Runs, token: str, sessions: Sessions | None = None) -> Starlette:
    """The pages.

    `GET /` all runs, `GET /runs/{key}/` the report of one as it is now, `GET /compare?runs=KEY&runs=KEY` several over
    each other, `GET /events?run=KEY` (server-sent events: a stamp whenever the run, or without `run` any of them, has
    changed), and below `/runs/{key}/rate/` the rating page of a run that a person answers, which alone writes.

    Args:
        runs: what is served.
        token: what the visitor must know.
        sessions: runs open for rating.
    """
    door = sessions.door if sessions is not None else web.Door(token, "tiltopt serve")
    sessions = sessions or Sessions(door)

    def shown(template: str, values: Mapping[str, Any], stamp: str, events: str, room: str = ROOM) -> Response:
        live = {"nonce": door.nonce, "stamp": stamp, "events": events, "tabs": (), "here": ""}
        return door.page(render({**live, **values}, template, room))

    async def listing(request: Request) -> Response:
        def answer() -> Response:
            stamp = runs.stamp()
            values = {"title": "Runs", "lead": str(runs.folder.resolve()), "folder": runs.folder.name}
            return shown("runs.html.j2", values | {"runs": runs.rows()}, stamp, "/events")

        return await run_in_threadpool(answer)

    async def report(request: Request) -> Response:
        key = request.path_params["key"]

        def answer() -> Response:
            stamp = runs.stamp(key)
            record = runs.seen(key).record
            if record is None:
                raise ConfigError(runs.seen(key).trouble)
            kind, template = (evaluation_page, "evaluation") if record.evaluation else (run_page, "report")
            values = kind.context(record, PER_ROUND) | {"tabs": tabs(key, record), "here": REPORT}
            return shown(f"{template}.html.j2", values, stamp, f"/events?run={key}")

        return await _told(answer)

    async def compare(request: Request) -> Response:
        keys = request.query_params.getlist("runs")

        def answer() -> Response:
            stamp = runs.stamp()
            values = comparison_page.context(compared(runs, keys)) | {"here": "comparison"}
            return shown("comparison.html.j2", values, stamp, "/events")

        return await _told(answer)

    async def events(request: Request) -> Response:
        key = request.query_params.get("run")
        return StreamingResponse(changes(lambda: runs.stamp(key)), media_type="text/event-stream")

    async def rate(scope: Scope, receive: Receive, send: Send) -> None:
        key = scope["path_params"]["key"]
        try:
            app = await run_in_threadpool(sessions.app, key, runs)
        except TiltoptError as error:
            app = web.with_headers(door.page(_sorry(error), 409))
        await app(scope, receive, send)

    async def without_slash(request: Request) -> Response:
        return RedirectResponse(f"{request.url.path}/", 307)

    return web.application(
        [
            Route("/", door.entry(listing)),
            Route("/runs/{key}/", door.known(report)),
            Route("/runs/{key}", door.known(without_slash)),
            Route("/compare", door.known(compare)),
            Route("/events", door.known(events)),
            Mount("/runs/{key}/rate", app=_behind(door, rate)),
        ]
    )


def _behind(door: web.Door, app: ASGIApp) -> ASGIApp:
    """The application for visitors with the cookie: a run is not opened for anybody else."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        async def inner(request: Request) -> Response:
            return PlainTextResponse("")

        refusal = await door.known(inner)(Request(scope))
        await (app if refusal.status_code == 200 else refusal)(scope, receive, send)

    return checked


async def _told(answer: Callable[[], Response]) -> Response:
    """The page, or a page that says why there is none."""
    try:
        return await run_in_threadpool(answer)
    except TiltoptError as error:
        return PlainTextResponse(str(error), 404)


def _sorry(error: TiltoptError) -> str:
    return f'<!doctype html><title>Read-only</title><p>{escape(str(error))}</p><p><a href="/">all runs</a></p>'


async def changes(stamp: Callable[[], str], every_s: float = EVERY_S) -> AsyncIterator[str]:
    """Server-sent events: the stamp at once, and again whenever it has changed; between them comments, so that a line
    that is dead is noticed."""
    told = None
    while True:
        now = await run_in_threadpool(stamp)
        yield f"data: {json.dumps(now)}\n\n" if now != told else ": waiting\n\n"
        told = now
        await asyncio.sleep(every_s)


def _say(text: str) -> None:
    print(text, flush=True)


def serve(folder: str | Path, port: int = 0, say: Callable[[str], None] = _say) -> None:
    """Serves the runs of a folder until it is interrupted.

    Args:
        folder: holds runs, or is one.
        port: to listen on; 0 for any free one.
        say: told the address, token included.

    Raises:
        ConfigError: no such folder, or the port is taken.
    """
    place = place_of(folder)
    if at_address(place):
        raise ConfigError(f"expected a folder of this machine to watch, got {place}; see `tiltopt report {place}`.")
    runs, token = Runs(place), secrets.token_urlsafe(24)
    server = web.listen(port)
    sessions = Sessions(web.Door(token, "tiltopt serve"))
    address = f"http://127.0.0.1:{server.getsockname()[1]}/?token={token}"
    say(f"{len(runs.places())} runs of {folder} at {address}   (Ctrl+C ends)")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            web.run(make_app(runs, token, sessions), server)
    finally:
        server.close()
        for report in sessions.close():
            say(f"report: {report}")
