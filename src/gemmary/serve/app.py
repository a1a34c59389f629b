"""The routes. Each reads what is asked, has it answered, and gives the answer its HTTP form."""

from __future__ import annotations

import functools
import sys
import time
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from gemmary.gemma import Gemma, load
from gemmary.infer.batching import Batcher
from gemmary.infer.drafting import Drafts, Guessers, LookUps
from gemmary.model.pages import page_bytes
from gemmary.serve.asking import prepare
from gemmary.serve.completions import Run
from gemmary.serve.grammar import Grammars
from gemmary.serve.guards import FAULT, Guards, body_of, log, refused
from gemmary.serve.metrics import Metrics
from gemmary.serve.pages import page_headers, page_of
from gemmary.serve.protocol import LIMITS, ApiError, Chat, Completions, parse
from gemmary.serve.settings import Settings

__all__ = ["Service", "application"]

_Ask = TypeVar("_Ask", Chat, Completions)
_SWITCH_SECONDS = 0.001  # how long the batcher's thread may keep Python from the connections'


class Service:
    """A model that is loading, ready, or closing: what the routes share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.gemma: Gemma | None = None
        self.batcher: Batcher | None = None
        self.grammars: Grammars | None = None
        self.closing = False
        self.metrics = Metrics(lambda: self.batcher.stats() if self.batcher else None)

    def load(self) -> None:
        """Load and compile; from its end on requests are answered. Raises GemmaryError for a model that cannot be had."""
        settings = self.settings
        sys.setswitchinterval(_SWITCH_SECONDS)
        gemma = load(settings.model, dtype=settings.dtype, hub=settings.hub)
        guessers, memory = self._guessers(gemma)
        batcher = Batcher(gemma.engine, slots=settings.slots, queue=settings.queue, memory=memory, guessers=guessers)
        batcher.warm_up(lambda done, total: log("compiling", done=done, of=total))
        self.grammars = Grammars(gemma.tokenizer, gemma.config.vocab_size)
        self.gemma, self.batcher = gemma, batcher
        log("ready", model=settings.name)

    def _guessers(self, gemma: Gemma) -> tuple[Guessers | None, int | None]:
        """What guesses, and the memory that it leaves to the model: a draft's cache takes as many tokens as the model's."""
        settings, memory = self.settings, self.settings.memory
        if settings.draft is None:
            return (LookUps() if settings.look_up else None), memory
        draft = load(settings.draft, dtype=settings.dtype, hub=settings.hub)
        gemma.check_draft(draft)
        if memory is None:
            return Drafts(draft.engine, settings.slots), None
        own, its = (page_bytes(model.config, model.engine.dtype) * model.config.num_layers for model in (gemma, draft))
        share = memory * its // (own + its)
        return Drafts(draft.engine, settings.slots, share), memory - share

    def close(self) -> None:
        """Take nothing new, and wait for what runs, for as long as the settings allow."""
        self.closing = True
        if self.batcher is not None:
            self.batcher.close(self.settings.grace)

    def alive(self) -> bool:
        """Whether the thread that makes answers still runs."""
        return self.batcher is not None and self.batcher.alive

    def state(self) -> str:
        """loading, ready, closing or, where the thread that makes answers has ended of itself, failed."""
        if self.closing or self.batcher is None:
            return "closing" if self.closing else "loading"
        return "ready" if self.batcher.alive else "failed"

    def model(self, name: str) -> dict[str, object]:
        """What /v1/models says of it. Raises ApiError, status 404, for any other name."""
        if name != self.settings.name:
            message = f"there is no model {name[:80]!r} here: this server has {self.settings.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return {"id": self.settings.name, "object": "model", "created": self.created, "owned_by": "gemmary"}


def application(service: Service) -> ASGIApp:
    """The server as an ASGI application, guards and all."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=499))  # for the log alone
    app.add_exception_handler(
        Exception, lambda request, error: refused(FAULT)
    )  # raised again then, for the guards to log
    _add_answers(app, service)
    _add_facts(app, service)
    return Guards(app, service.settings, service.metrics)


def _add_answers(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, kind: type[_Ask]) -> Response:
        ask = parse(kind, await body_of(request, LIMITS.body))
        service.model(ask.model)
        gemma, batcher, grammars = service.gemma, service.batcher, service.grammars
        if service.closing or gemma is None or batcher is None or grammars is None:
            message = f"the server is {service.state()}: try again later"
            raise ApiError(503, message, code=service.state(), headers={"retry-after": "5"})
        note, most = request.state.note, service.settings.queue
        start = functools.partial(prepare, gemma, grammars, ask, note.client, most=most, longest=batcher.longest)
        run = Run(gemma, ask, service.settings.name, note, service.metrics)
        await run.begin(start, batcher.submit, request.receive)
        return await run.response() if ask.stream else JSONResponse(await run.whole())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, Chat)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, Completions)

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise ApiError(400, "this server makes no embeddings: its models generate text", code="unsupported_route")


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [service.model(service.settings.name)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        return service.model(name)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": service.state()}, 200 if service.state() == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    page = page_of("chat.html")
    headers = page_headers(page)

    @app.get("/")
    async def chat_page() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)


def _no_route(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path[:80]!r} here", 405: f"{request.method[:16]} is not allowed here"}
    message = what.get(error.status_code, str(error.detail))
    return refused(ApiError(error.status_code, message, code="unknown_route", headers=error.headers or {}))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refused(error)
