"""Several replicas of a model behind Ray Serve: the API of `gemmary serve`, on one machine or on a cluster.

    pip install '.[serve,grammar,ray-serve]'
    python examples/ray_serve.py MODEL --replicas 2 --cpus 4 [--address auto]

Each replica is a process that holds the model whole, with slots and a queue of its own, and answers by the application that
`gemmary serve` runs. Serve's proxy, one, on the cluster's head node, gives a request to the replica that has fewer of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import ray
from ray import serve
from starlette.types import ASGIApp

from gemmary.errors import GemmaryError
from gemmary.serve.app import Service, application
from gemmary.serve.settings import Settings, api_keys, bytes_of

NAME = "gemmary"
SPARE = 64  # requests over slots and queue that a replica takes, to refuse them itself, or because they make no answer
# By default the proxy fills the replicas of its own node first, and believes for ten seconds what it knows of a queue.
EVENLY = {"RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0", "RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "0.1"}


@serve.ingress()
class Replica:
    """One model, ready when it is made."""

    def __init__(self, settings: Settings) -> None:
        self.service = Service(settings)
        self.service.load()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return application(self.service)

    def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if not self.service.alive():
            raise RuntimeError("the thread that makes answers has ended")

    def __del__(self) -> None:
        self.service.close()  # by now Serve has let finish what ran


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends at once."""
    options, settings = arguments()
    ray.init(address=options.address, runtime_env={"env_vars": EVENLY})
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
        serve.run(deployment(options, settings), name=NAME, route_prefix="/")
        wait(f"{options.replicas} replicas of {settings.name} answer at http://{settings.host}:{settings.port}")
        serve.delete(NAME, _blocking=False)  # before the proxy goes: running answers come through it
        while NAME in serve.status().applications:
            time.sleep(0.2)
    finally:
        serve.shutdown()
        ray.shutdown()


def wait(said: str) -> None:
    """Say so, and come back with the first signal."""
    came = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        came.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print(said, flush=True)
    came.wait()


def deployment(options: argparse.Namespace, settings: Settings) -> serve.Application:
    """What Serve is to run. XLA makes as many threads as NPROC says."""
    return serve.deployment(
        Replica,
        num_replicas=options.replicas,
        ray_actor_options={
            "num_cpus": options.cpus,
            "runtime_env": {"env_vars": {"NPROC": str(options.cpus)}},
        },
        max_ongoing_requests=settings.slots + settings.queue + SPARE,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.grace,
        logging_config={"enable_access_log": False},  # there is a line for each request already
    ).bind(settings)


def arguments() -> tuple[argparse.Namespace, Settings]:
    """The command line; mistakes in it end the program."""
    parser = argparse.ArgumentParser(description="Several replicas of a model behind Ray Serve.")
    parser.add_argument("model", help="a directory, a file or 'sample', at the same place on every node")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="cores of each replica")
    parser.add_argument("--address", default="local", help="a cluster: auto, or HOST:PORT; by default one of its own")
    parser.add_argument(
        "--host", default="127.0.0.1", help="where the proxy listens; other than loopback only with a key"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--slots", type=int, default=8, help="answers that a replica makes at once")
    parser.add_argument("--queue", type=int, default=128, help="answers that may wait for one of its slots")
    parser.add_argument("--memory", help="of a replica, for its answers' caches, such as 4GiB")
    parser.add_argument("--api-key-file", type=Path, help="keys, one a line; also GEMMARY_API_KEY")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds that answers may take to finish at the end")
    parser.add_argument("--name", help="what clients call the model")
    options = parser.parse_args()
    try:
        settings = Settings(
            model=options.model if options.model == "sample" else os.path.abspath(options.model),
            name=options.name or Path(options.model).resolve().name,
            host=options.host,
            port=options.port,
            slots=options.slots,
            queue=options.queue,
            memory=None if options.memory is None else bytes_of(options.memory),
            keys=api_keys(options.api_key_file),
            grace=options.grace,
        )
    except GemmaryError as error:
        parser.error(str(error))
    return options, settings


if __name__ == "__main__":
    main()
