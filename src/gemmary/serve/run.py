"""The process: the port opens first, the model loads beside it, and a signal ends both without breaking an answer off."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from types import FrameType

import uvicorn

from gemmary.errors import GemmaryError
from gemmary.serve.app import Service, application
from gemmary.serve.connection import Connection, listening
from gemmary.serve.guards import log
from gemmary.serve.protocol import LIMITS
from gemmary.serve.settings import Settings

__all__ = ["Server", "serve"]

_MOST_FILES = 65536
_LAST_SECONDS = 5  # for the last bytes of answers, once the batcher has ended


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises GemmaryError where the address cannot be had or the model cannot be loaded."""
    Server(settings).run_until_closed()


class Server(uvicorn.Server):
    """A server of one model. `address` is where it listens, also where port 0 left the choice to the system."""

    def __init__(self, settings: Settings) -> None:
        self.service = Service(settings)
        self._failure: GemmaryError | None = None
        self._closer: threading.Thread | None = None
        self._socket, self.address = listening(settings.host, settings.port)
        config = uvicorn.Config(
            application(self.service),
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # else any client could say that it is another
            h11_max_incomplete_event_size=LIMITS.headers,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        super().__init__(config)

    def run_until_closed(self) -> None:
        """Blocks. Raises GemmaryError where the model could not be loaded."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # requests that go wrong are in our own log
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # and so are clients that left while they were written to
        _allow_many_files()
        log("listening", address=self.address)
        loader = threading.Thread(target=self._load, daemon=True)
        loader.start()
        self.run(sockets=[self._socket])
        if self._closer is not None:
            self._closer.join()
        if self._failure is not None:
            raise self._failure
        log("closed")
        if loader.is_alive():  # XLA aborts a process that ends in the ordinary way while it compiles
            os._exit(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: take nothing new, finish what runs, then end. A second one ends at once."""
        if self._closer is not None:
            self.should_exit = self.force_exit = True
            return
        self._closer = threading.Thread(target=self._close, args=(signal.Signals(sig).name,), daemon=True)
        self._closer.start()

    def close(self) -> None:
        """As a signal does."""
        self.handle_exit(signal.SIGTERM, None)

    def _load(self) -> None:
        try:
            self.service.load()
        except GemmaryError as error:
            self._failure = error
            self.should_exit = True
        except BaseException as error:
            self._failure = GemmaryError(f"{self.service.settings.model} could not be loaded: {type(error).__name__}")
            self.should_exit = True
            raise

    def _close(self, why: str) -> None:
        """While the batcher ends what runs, the port stays open: who comes now is told so."""
        log("closing", why=why, grace=self.service.settings.grace)
        self.service.close()
        self.should_exit = True


def _allow_many_files() -> None:
    """Each connection is a file; the usual limit of 1024 is soft."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
