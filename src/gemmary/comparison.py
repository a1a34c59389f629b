"""The verb `gemmary compare`: two models side by side on somebody's prompts, by a judge, by people, or by both."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemmary.checkpoints import open_model
from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma

if TYPE_CHECKING:
    from gemmary.comparison_results import Results
    from gemmary.evaluate.pairs import Pair, Party
    from gemmary.evaluate.questions import Question
    from gemmary.evaluate.speakers import Draw, Speaker

__all__ = ["add_compare"]

_JUDGE_TOKENS = 2048
_RATINGS = "ratings.sqlite"
_OPENAI = "https://api.openai.com/"
Load = Callable[..., Gemma]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

Who = Annotated[str, typer.Argument(help="A model as gemmary opens it, or an endpoint: http://host:port/v1#name.")]
Prompts = Annotated[Path, typer.Option(help="JSON lines: MT-Bench questions, prompts, or conversations.")]
Judge = Annotated[str | None, typer.Option(help="Who decides: an endpoint or a model. Without one, you do.")]
Human = Annotated[bool, typer.Option("--human", help="Serve a page on which people rate the pairs blindly.")]
Rubric = Annotated[Path | None, typer.Option(help="What the judge should look at; a text file.")]
Constitution = Annotated[Path | None, typer.Option(help="What a good answer keeps to; a text file.")]
Out = Annotated[Path | None, typer.Option(help="The folder of all results; by default out/compare and a name.")]
Export = Annotated[Path | None, typer.Option(help="Write the pairs as preferences for `gemmary reward`, JSON lines.")]
Turns = Annotated[int | None, typer.Option(help="Of each question ask at most so many turns.")]
MaxNew = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="Of answers; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same tokens.")]
AtOnce = Annotated[int, typer.Option(help="Answers and verdicts asked for at the same time.")]
Host = Annotated[str, typer.Option(help="Where the page listens; other than loopback with a key in its address.")]
Port = Annotated[int, typer.Option(help="Of the page; 0 lets the system choose.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default what suits the device.")]
Hub = Annotated[bool, typer.Option("--hub", help="Allow fetching models from the Hugging Face hub.")]


@dataclass(frozen=True)
class _Asked:
    """What the command line says."""

    a: str
    b: str
    prompts: Path
    judge: str | None
    human: bool
    out: Path
    export: Path | None
    rubric: Path | None
    constitution: Path | None
    at_once: int
    host: str
    port: int


def add_compare(app: typer.Typer, load: Load, progress: Progress) -> None:
    """Register the verb. `load` opens a model, `progress` shows a bar with a title."""

    @app.command("compare")
    def compare_(
        a: Who, b: Who, prompts: Prompts, judge: Judge = None, human: Human = False, rubric: Rubric = None,
        constitution: Constitution = None, out: Out = None, export: Export = None, turns: Turns = None, max_new_tokens: MaxNew = 1024,
        temperature: Temperature = 0.0, top_p: TopP = 1.0, seed: Seed = 0, at_once: AtOnce = 8, host: Host = "127.0.0.1",
        port: Port = 8001, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False, dtype: Dtype = None,
        hub: Hub = False,
    ) -> None:  # fmt: skip
        """Compare the answers of two models to the same prompts; the same command goes on where it was stopped."""
        from gemmary.evaluate.questions import questions
        from gemmary.evaluate.speakers import Draw
        from gemmary.infer.sampling import Sampling

        where = out or Path("out") / "compare" / "-".join(map(_name_of, (a, b, prompts.name.split(".")[0])))
        asked = _Asked(
            a, b, prompts, judge, human or judge is None, where, export, rubric, constitution, at_once, host, port
        )
        _check(asked, hub)
        Sampling(temperature, top_p=top_p, seed=seed)  # refuses what is out of bounds
        if max_new_tokens < 1 or at_once < 1:
            raise GemmaryError("--max-new-tokens and --at-once must be at least 1")
        some = questions(prompts, turns)
        draw = Draw(temperature, top_p, seed, max_new_tokens)
        parties = {
            name: _party(who, name, at_once, lambda who: load(who, dtype, hub), dtype)
            for name, who in (("a", a), ("b", b), ("judge", judge)) if who is not None
        }  # fmt: skip
        results = _compared(asked, some, draw, parties, progress)
        if as_json:
            print(json.dumps(results.found))
        else:
            results.show()


def _check(asked: _Asked, hub: bool) -> None:
    """What can be wrong before anything is asked."""
    from gemmary.evaluate.speakers import is_endpoint

    try:
        import matplotlib  # noqa: F401

        if any(map(is_endpoint, (asked.a, asked.b, asked.judge or ""))):
            import openai  # noqa: F401
        if asked.human:
            import gemmary.serve.rate  # noqa: F401
    except ImportError as error:
        extras = "data,evaluate,serve" if asked.human else "data,evaluate"
        raise GemmaryError(f"this needs an extra ({error}): pip install 'gemmary[{extras}]'") from None
    if asked.export is not None and asked.export.absolute() == asked.prompts.absolute():
        raise GemmaryError("--export would overwrite the prompts: name another file")
    if asked.judge is None and (asked.rubric or asked.constitution):
        raise GemmaryError("--rubric and --constitution are for a judge: give --judge too")
    for who in {asked.a, asked.b, asked.judge}:
        if who is not None and not is_endpoint(who):
            with open_model(who, hub=hub):  # B's name is not found wrong when A has answered for an hour
                pass


def _name_of(who: str) -> str:
    """A model's or an endpoint's name, as part of a folder's."""
    name = who.rpartition("#")[2] if "://" in who else Path(who).name
    return re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "model"


def _party(who: str, name: str, at_once: int, load: Callable[[str], Gemma], dtype: str | None) -> Party:
    """How A, B or the judge is asked. A model of the same name that has changed on the disk is another one."""
    from gemmary.evaluate.pairs import Party
    from gemmary.evaluate.speakers import Endpoint, Local, is_endpoint

    variable = f"GEMMARY_KEY_{name.upper()}"
    key = os.environ.get(variable) or (os.environ.get("OPENAI_API_KEY") if who.startswith(_OPENAI) else None)

    def endpoint() -> Speaker:
        return Endpoint(who, key, variable, warn=lambda line: print(line, file=sys.stderr))

    def local() -> Speaker:
        gemma = load(who)
        return Local(gemma.engine, gemma.tokenizer, at_once)

    if is_endpoint(who):
        return Party(who, endpoint)
    files = [path.stat() for path in (Path(who), *Path(who).rglob("*")) if path.is_file()]
    stamp = f"{max(one.st_mtime_ns for one in files)}/{sum(one.st_size for one in files)}" if files else ""
    return Party(f"{who} {dtype} {stamp}", local)


@contextmanager
def _saying_what_is_kept(out: Path) -> Iterator[None]:
    try:
        yield
    except GemmaryError as error:
        raise GemmaryError(
            f"{error}; what was answered and judged is kept in {out}: the same command goes on from there"
        ) from None


def _compared(
    asked: _Asked, some: Sequence[Question], draw: Draw, parties: Mapping[str, Party], progress: Progress
) -> Results:
    """Answers, verdicts, ratings, and the files of results."""
    from gemmary.comparison_results import Results
    from gemmary.evaluate.judge import rules
    from gemmary.evaluate.pairs import Pair, answered, judged, recorded
    from gemmary.evaluate.speakers import Draw

    by = rules(asked.rubric, asked.constitution)
    verdicts = None
    with recorded(asked.out) as (answers, lines):
        sides = []
        for side in ("a", "b"):
            with progress(f"{side.upper()} answers") as bar, _saying_what_is_kept(asked.out):
                sides.append(answered(answers, side, parties[side], some, draw, asked.at_once, bar))
        pairs = [Pair(*one) for one in zip(some, *sides, strict=True)]
        if asked.judge is not None:
            how = Draw(seed=draw.seed, max_new_tokens=_JUDGE_TOKENS)
            with progress("judging") as bar, _saying_what_is_kept(asked.out):
                verdicts = judged(lines, parties["judge"], pairs, by, how, asked.at_once, bar)
        names = {"a": asked.a, "b": asked.b, "prompts": str(asked.prompts), "judge": asked.judge}
        about = names | {"folder": str(asked.out)}
        results = Results(about, pairs, verdicts, _ratings(asked.out, pairs))
        said = results.write(asked.out, asked.export)  # before people come, who may take days
        if asked.human:
            _serve(asked, pairs)
            results = Results(about, pairs, verdicts, _ratings(asked.out, pairs))
            said = results.write(asked.out, asked.export)
    if said:
        print(said, file=sys.stderr)
    return results


def _ratings(out: Path, pairs: Sequence[Pair]) -> list[dict[str, float]]:
    """Of each pair, what people gave to A so far; empty where nobody was asked."""
    from gemmary.evaluate.ratings import Ratings

    if not (out / _RATINGS).exists():
        return []
    with closing(Ratings(out / _RATINGS)) as ratings:
        every = ratings.by_pair()
    return [every.get(pair.key, {}) for pair in pairs]


def _serve(asked: _Asked, pairs: Sequence[Pair]) -> None:
    """The page, until a signal comes."""
    from gemmary.evaluate.ratings import Ratings
    from gemmary.serve.rate import RateServer

    with closing(Ratings(asked.out / _RATINGS)) as ratings:
        server = RateServer(pairs, ratings, asked.host, asked.port)
        server.run_until_closed(lambda line: print(line, file=sys.stderr, flush=True))
