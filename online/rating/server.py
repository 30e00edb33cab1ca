"""`tiltopt rate`: a page on this machine on which a person rates the images of a run."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from tiltopt.errors import TiltoptError
from tiltopt.online import web
from tiltopt.online.rating.session import PairRating, Rating, Session
from tiltopt.online.report.page import render
from tiltopt.online.store.files import image_path

PAGE = "x-tiltopt-page"
"""Header in which a page says which one it is, so that two pages that are open at once show different queries."""

Action = Callable[[dict[str, Any], str], object]


def make_app(session: Session, token: str, extra: tuple[BaseRoute, ...] = ()) -> Starlette:
    """The page and its interface, as an application of its own.

    Args:
        session: the run, and who rates it.
        token: what the visitor must know.
        extra: further routes, without a check of the token.
    """
    return web.application([*routes(session, web.Door(token, "tiltopt rate")), *extra])


def routes(session: Session, door: web.Door, tabs: Sequence[tuple[str, str]] = ()) -> list[BaseRoute]:
    """The page and its interface.

    `GET /` the page, `GET /state` what to show, `GET /best` the best answers so far, `GET /image/{id}` a picture, and,
    as JSON, `POST /rate` {id, value}, `POST /skip` {id}, `POST /undo`, `POST /next`, `POST /refine` {id}; each POST
    answers with the new state. What cannot be done is answered with 409 and the reason. For a `PairRating`:
    `POST /compare` {first, second, better}, `POST /choose` {shown, best}, `POST /skip` {shown}, and `POST /show` {of}:
    how many pictures the page wants at a time.

    Args:
        session: the run, and who rates it.
        door: who is let in.
        tabs: name and address of the pages that this one belongs to, itself and `#refine` of it included.
    """

    async def show(request: Request) -> Response:
        values: dict[str, Any] = {"nonce": door.nonce, "low": session.scale.low, "high": session.scale.high}
        values |= {"folder": session.optimizer.folder.name, "pairs": session.pairs, "tabs": tabs, "here": ""}
        return door.page(render(values, "rate.html.j2", "tiltopt.online.rating"))

    async def picture(request: Request) -> Response:
        path = image_path(session.optimizer.folder, request.path_params["id"])
        if not path.is_file():
            return PlainTextResponse("no such image", 404)
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    async def state(request: Request) -> Response:
        return JSONResponse(session.state(_page_of(request)))

    async def best(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(session.best))

    def change(action: Action) -> web.Handler:
        async def handler(request: Request) -> Response:
            body = await web.body_of(request)
            if isinstance(body, Response):
                return body
            page = _page_of(request)
            try:
                action(body, page)
            except TiltoptError as error:
                return JSONResponse({"error": str(error), "state": session.state(page)}, 409)
            return JSONResponse(session.state(page))

        return handler

    def post(path: str, action: Action) -> Route:
        return Route(path, door.known(change(action)), methods=["POST"])

    return [
        Route("/", door.entry(show)),
        Route("/state", door.known(state)),
        Route("/best", door.known(best)),
        Route("/image/{id:int}", door.known(picture)),
        *_answers(session, post),
        post("/undo", lambda body, page: session.undo(page)),
        post("/next", lambda body, page: session.draw()),
        post("/refine", lambda body, page: session.refine(body.get("id"))),
    ]


def _answers(session: Session, post: Callable[[str, Action], Route]) -> list[BaseRoute]:
    """The ways to answer: a number for an image, or a choice among two or more."""
    if isinstance(session, PairRating):

        def compare(body: dict[str, Any], page: str) -> None:
            session.compare(body.get("first"), body.get("second"), body.get("better"), page)

        def choose(body: dict[str, Any], page: str) -> None:
            session.choose(body.get("shown"), body.get("best"), page)

        return [
            post("/compare", compare),
            post("/choose", choose),
            post("/skip", lambda body, page: session.skip(body.get("shown"), page)),
            post("/show", lambda body, page: session.show(body.get("of"), page)),
        ]
    assert isinstance(session, Rating)
    return [
        post("/rate", lambda body, page: session.rate(body.get("id"), body.get("value"), page)),
        post("/skip", lambda body, page: session.skip(body.get("id"), page)),
    ]


def _page_of(request: Request) -> str:
    return request.headers.get(PAGE, "")[:64]


def _say(text: str) -> None:
    print(text, flush=True)


def serve(session: Session, port: int = 0, say: Callable[[str], None] = _say) -> None:
    """Serves the page until it is interrupted, then writes the summaries and the report.

    Args:
        session: the run, and who rates it.
        port: to listen on; 0 for any free one.
        say: told the address, token included.
    """
    token = secrets.token_urlsafe(24)
    server = web.listen(port)
    say(f"rate at http://127.0.0.1:{server.getsockname()[1]}/?token={token}   (Ctrl+C ends; every answer is stored)")
    try:
        with session.pulse, contextlib.suppress(KeyboardInterrupt):  # the usual end, which uvicorn hands on
            web.run(make_app(session, token), server)
    finally:
        server.close()
        session.join()
        session.finish()
        report = session.optimizer.folder / "report.html"
        if report.exists():
            say(f"report: {report}")
