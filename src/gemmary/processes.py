"""Several processes as one run: joined before any device is touched, telling and waiting for one another, and ending together.

All that is said here goes through JAX's coordination service, which process 0 keeps: no device takes part, so that a thread beside the
loop may use it. Where there is one process, nothing waits and nobody is asked.

JAX ends a process by an abort where another is lost. Here the processes are told to be recoverable instead, a thread calls the roll
once a second, and whoever finds one missing says so in a line and ends with exit code 75.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax.experimental.multihost_utils import process_allgather

from gemmary.errors import GemmaryError

__all__ = [
    "EXIT_CODE",
    "Lost",
    "agreed",
    "count",
    "exchange",
    "from_first",
    "gathered",
    "index",
    "is_first",
    "joined",
    "last_words",
    "note",
    "noted",
]

EXIT_CODE = 75
"""Of a process that ends because it hangs, or another one is lost: a temporary failure (EX_TEMPFAIL of sysexits.h), to be started again."""

_PATIENT = 7 * 24 * 3600.0  # seconds: what one process prepares, the others wait for
_JOIN, _LOOK, _END = 120.0, 1.0, 5.0
_rounds: Counter[str] = Counter()
_words: list[Callable[[], str]] = []
_over = threading.Event()
_speaking = threading.Lock()


class Lost(GemmaryError):
    """Another process did not answer. Whoever meets it leaves the last word to the roll call, which knows which one."""


def count() -> int:
    """Of processes."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def index() -> int:
    """This process's place among them, from 0."""
    return distributed.global_state.process_id


def is_first() -> bool:
    """Of several, process 0 writes what there is one of; one alone is the first."""
    return index() == 0


def exchange(name: str, said: str = "", *, seconds: float = _PATIENT) -> list[str]:
    """What every process says, in their order; returns when all have spoken.

    All call it alike, and for one name from one thread. Raises Lost where one does not within `seconds`.
    """
    if count() == 1:
        return [said]
    client: Any = distributed.global_state.client
    _rounds[name] += 1
    here = f"{name}/{_rounds[name]}"
    try:
        client.key_value_set(f"{here}/{index()}", said)
        client.wait_at_barrier(here, int(seconds * 1000))
        found = dict(client.key_value_dir_get(here))
        with suppress(Exception):  # all are past the round before
            client.key_value_delete(f"{name}/{_rounds[name] - 1}/{index()}")
    except Exception as error:  # of many kinds; the service is gone, or somebody is
        raise Lost(f"another process does not answer ({_first_line(error)})") from None
    return [found[f"{here}/{i}"] for i in range(count())]


def from_first(name: str, work: Callable[[], Any]) -> Any:
    """What process 0's work gives, as plain data, for all of them; the others wait as long as it takes.

    Raises GemmaryError in all where the work does in process 0.
    """
    return agreed(name, work if is_first() else lambda: None)[0]


def agreed(name: str, work: Callable[[], Any], *, seconds: float = _PATIENT) -> list[Any]:
    """What each process's work gives, as plain data. Where one's raises, the others raise GemmaryError with its words."""
    if count() == 1:
        return [work()]
    failed: Exception | None = None
    try:
        told = {"value": work()}
    except Lost:
        raise
    except Exception as error:
        failed, told = error, {"error": _first_line(error)}
    answers = [json.loads(one) for one in exchange(name, json.dumps(told), seconds=seconds)]
    if failed is not None:
        raise failed
    for i, answer in enumerate(answers):
        if "error" in answer:
            raise GemmaryError(f"process {i}: {answer['error']}" if i else answer["error"])
    return [answer["value"] for answer in answers]


def note(name: str) -> None:
    """For any process to find with `noted`; nobody waits."""
    client: Any = distributed.global_state.client
    client.key_value_set(f"{name}/noted", "", allow_overwrite=True)


def noted(name: str) -> bool:
    """Whether some process has noted this."""
    client: Any = distributed.global_state.client
    return bool(client.key_value_dir_get(name))


def gathered(data: bytes) -> list[bytes]:
    """Every process's bytes, in their order, through the devices: for what is too much for `exchange`."""
    if count() == 1:
        return [data]
    sizes = process_allgather(np.array([len(data)], np.int32)).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = process_allgather(padded).reshape(count(), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]


@contextmanager
def last_words(words: Callable[[], str]) -> Iterator[None]:
    """Meanwhile, what to do is said by `words` where another process is lost."""
    _words.append(words)
    yield  # and where it ends in an error, they stay: the loss may be known only later
    _words.remove(words)


@contextmanager
def joined(
    coordinator: str | None = None,
    process: int | None = None,
    processes: int | None = None,
    *,
    detect: bool = False,
    lost_after: int = 60,
) -> Iterator[None]:
    """Meanwhile this is one of several processes: as given, or (`detect`) as JAX finds of the cluster. Nothing given: alone.

    A process that gives no sign for `lost_after` seconds is lost; it ends the others. Raises GemmaryError for what does not fit
    together, and where the others cannot be reached within two minutes.
    """
    given = [coordinator, process, processes]
    if not detect and given == [None] * 3:
        yield
        return
    _check(coordinator, process, processes, detect, lost_after)
    _connect(coordinator, process, processes, lost_after)
    _over.clear()
    threading.Thread(target=_call_the_roll, name="roll call", daemon=True).start()
    try:
        yield
        exchange("end")
    except BaseException as error:
        _ended_by(error, lost_after)
        raise
    _leave()


def _check(coordinator: str | None, process: int | None, processes: int | None, detect: bool, lost_after: int) -> None:
    if lost_after < 5:
        raise GemmaryError(f"--lost-after is {lost_after}: a process that lives may be silent for 5 seconds")
    given = [coordinator, process, processes]
    if detect:
        if given != [None] * 3:
            raise GemmaryError("--distributed finds out by itself what --coordinator, --process-id and --processes say")
        return
    if coordinator is None or process is None or processes is None:
        raise GemmaryError("--coordinator, --process-id and --processes go together: give all three, or --distributed")
    if not 0 <= process < processes:
        raise GemmaryError(f"--process-id is {process}: of {processes} processes it is 0 to {processes - 1}")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise GemmaryError(f"--coordinator is {coordinator!r}: write HOST:PORT, such as 10.0.0.1:1234")


def _connect(coordinator: str | None, process: int | None, processes: int | None, lost_after: int) -> None:
    """Within this the client of the service is made with our word for the end; JAX's own would abort."""
    _keep_output()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # which takes SIGTERM for itself: see `Stopping`
    jax.config.update("jax_logging_level", "ERROR")
    made, word = _jax.get_distributed_runtime_client, "process 0"
    _end_in_words(lambda: _say_lost(word))

    def make(*arguments: Any, **options: Any) -> Any:
        return made(*arguments, missed_heartbeat_callback=lambda status: _say_lost(word), **options)

    setattr(_jax, "get_distributed_runtime_client", make)  # noqa: B010  (a module of C++ has no such types)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=int(_JOIN), heartbeat_timeout_seconds=lost_after
        )
    except Exception as error:
        jax.config.update("jax_logging_level", "CRITICAL")  # what it says of its own end is known
        with suppress(Exception):
            jax.distributed.shutdown()
        distributed.global_state.client = distributed.global_state.service = None
        if coordinator is None:
            raise GemmaryError(
                f"no cluster was found ({_first_line(error)}): give --coordinator, --process-id and --processes"
            ) from None
        raise GemmaryError(
            f"{processes} processes did not come together at {coordinator} within {_JOIN:.0f} s: are all started, with the same "
            "--coordinator (an address of process 0's machine) and the same --processes?"
        ) from None
    finally:
        setattr(_jax, "get_distributed_runtime_client", made)  # noqa: B010


def _call_the_roll() -> None:
    client: Any = distributed.global_state.client
    everyone = list(range(count()))
    while not _over.wait(_LOOK):
        try:
            missing = sorted(set(everyone) - set(client.get_live_nodes(everyone)))
        except Exception:  # without the service its client has the word
            return
        if missing and not _over.wait(2 * _LOOK):  # those that have come to the end may leave before us
            _say_lost(f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))}")


def _say_lost(who: str) -> None:
    """The last line of this process."""
    with _speaking:
        what = "its own message, if it left one, says why; start all again"
        with suppress(Exception):
            what = _words[-1]() if _words else what
        sys.stdout.flush()
        print(f"error: {who} of {count()} is lost: {what}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _ended_by(error: BaseException, lost_after: int) -> None:
    """Where all end alike, each says so itself. Where one is lost, the roll call says so, and this is the last of us."""
    try:
        exchange("end", seconds=_END)
    except Lost:
        if isinstance(error, Lost) or (isinstance(error, Exception) and not isinstance(error, GemmaryError)):
            time.sleep(lost_after + 2 * _END)
    else:
        _leave()
    _over.set()


def _leave() -> None:
    """All are here. The service goes last: to those that it leaves behind it would be lost."""
    _over.set()
    client: Any = distributed.global_state.client
    if is_first():
        with suppress(Exception):
            client.get_live_nodes(list(range(count())))  # returns when the others are gone
    with suppress(Exception):
        jax.distributed.shutdown()


def _keep_output() -> None:
    """What C++ prints (Gloo does, of its connections) goes to stderr: stdout is for answers."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w", encoding="utf-8", buffering=1)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


_terminated: Any = None  # kept as long as C++ may call it


def _end_in_words(words: Callable[[], None]) -> None:
    """Where C++ gives up, `words` are said first.

    jaxlib 0.10 cannot hand its status to the callback that it takes for a lost service, and terminates (std::bad_cast).
    """
    global _terminated
    kind = ctypes.CFUNCTYPE(None)
    with suppress(OSError, AttributeError):
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [kind]
        _terminated = kind(words)
        set_terminate(_terminated)
