"""The page on which people rate pairs without knowing whose answer is whose: `gemmary compare --human`.

What is sent holds a pair's texts under an opaque key, in an order of the rater's own, and counts. Which answer is A's stays here; so do
the names of models, the prompts' ids and what others said.
"""

from __future__ import annotations

import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from gemmary.evaluate.judge import EMPTY
from gemmary.evaluate.pairs import Pair
from gemmary.evaluate.ratings import Ratings
from gemmary.serve.connection import Connection, listening
from gemmary.serve.guards import Guards, body_of, refused
from gemmary.serve.metrics import Metrics
from gemmary.serve.pages import page_headers, page_of
from gemmary.serve.protocol import LIMITS, ApiError
from gemmary.serve.settings import Settings, api_keys

__all__ = ["RateServer", "rating"]

_BODY = 4096
_WORTH = {"first": 1.0, "tie": 0.5, "second": 0.0}


class _Rater(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rater: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60, pattern=r"^[^\x00-\x1f]+$")
    ]


class _Rating(_Rater):
    pair: Annotated[str, StringConstraints(max_length=64)]
    choice: Literal["first", "second", "tie", "skip"]


def rating(pairs: Sequence[Pair], ratings: Ratings, settings: Settings) -> ASGIApp:
    """The page and its routes as an ASGI application, behind the guards that `gemmary serve` has. Pairs of equal answers are not shown."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    shown = {pair.key: pair for pair in pairs if not pair.equal}
    page = page_of("rate.html")
    headers = page_headers(page)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return refused(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return refused(ApiError(error.status_code, "there is no such route here", code="unknown_route"))

    @app.get("/")
    async def rate_page() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @app.post("/next")
    async def next_(request: Request) -> Response:
        ask = _Rater.model_validate_json(await body_of(request, _BODY))
        return JSONResponse(_view(shown, ratings, ask.rater))

    @app.post("/rate")
    async def rate(request: Request) -> Response:
        ask = _Rating.model_validate_json(await body_of(request, _BODY))
        if ask.pair not in shown:
            raise ApiError(404, "there is no such pair here: reload the page", "pair")
        worth = _WORTH.get(ask.choice)
        if worth is not None and ratings.first(ask.rater, ask.pair) == "b":
            worth = 1 - worth
        ratings.rate(ask.rater, ask.pair, worth)
        return JSONResponse(_view(shown, ratings, ask.rater))

    @app.post("/undo")
    async def undo(request: Request) -> Response:
        ask = _Rater.model_validate_json(await body_of(request, _BODY))
        ratings.undo(ask.rater, shown)  # in the rater's order it is the next one again
        return JSONResponse(_view(shown, ratings, ask.rater))

    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: ValidationError) -> Response:
        first = error.errors()[0]
        return refused(ApiError(400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"))

    return Guards(app, settings, Metrics(lambda: None))


def _view(shown: dict[str, Pair], ratings: Ratings, rater: str) -> dict[str, Any]:
    """The next pair for this rater; counts alone where all are seen."""
    seen = ratings.seen(rater)
    left = [key for key in ratings.order(rater, shown) if key not in seen]
    counts = {"done": len(shown) - len(left), "total": len(shown)}
    if not left:
        return counts
    key, pair = left[0], shown[left[0]]
    a, b = ([text.strip() or EMPTY for text in texts] for texts in pair.texts)
    first, second = (a, b) if ratings.first(rater, key) == "a" else (b, a)
    turns = [
        {"asked": [dict(message) for message in asked], "first": one, "second": other}
        for asked, one, other in zip(pair.question.turns, first, second, strict=True)
    ]
    return {**counts, "pair": key, "turns": turns}


class RateServer(uvicorn.Server):
    """Serves the page until SIGINT or SIGTERM. `address` is what raters open; it carries a key where other machines can reach it.

    Raises GemmaryError where the address cannot be had.
    """

    def __init__(self, pairs: Sequence[Pair], ratings: Ratings, host: str = "127.0.0.1", port: int = 8001) -> None:
        keys = api_keys(None) or (secrets.token_urlsafe(16),)
        settings = Settings(model="", name="ratings", host=host, port=port, keys=keys)
        if settings.loopback:
            keys, settings = (), replace(settings, keys=())
        self._socket, address = listening(host, port)
        self.address = f"{address}/{f'#{keys[0]}' if keys else ''}"
        super().__init__(
            uvicorn.Config(
                rating(pairs, ratings, settings), http=Connection, loop="asyncio", ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, proxy_headers=False, h11_max_incomplete_event_size=LIMITS.headers,
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip

    def run_until_closed(self, say: Callable[[str], None]) -> None:
        """Blocks."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # requests that go wrong are in our own log
        say(f"rate the pairs at {self.address} ; Ctrl-C ends, and nothing is lost")
        self.run(sockets=[self._socket])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal ends it in the ordinary way: the tally comes then."""
        self.should_exit = True

    def close(self) -> None:
        """As a signal does."""
        self.handle_exit(signal.SIGTERM, None)
