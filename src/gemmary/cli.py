"""The door: `gemmary VERB …`. It parses, calls, prints; what it prints is made elsewhere.

Every mistake of a user's is one line on stderr and exit code 2. Answers go to stdout, all else to stderr, so that
`--json` can be piped. What only training needs is imported by the verbs that train: an answer need not wait for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import gemmary
from gemmary import kernels
from gemmary.audits import add_memorization
from gemmary.chat import converse
from gemmary.checkpoints import FORMATS, convert, open_model, quantize_model
from gemmary.comparison import add_compare
from gemmary.errors import GemmaryError
from gemmary.evaluations import add_evaluate
from gemmary.gemma import Gemma, load
from gemmary.infer.sampling import Sampling
from gemmary.inspect import Inspection, inspect_checkpoint, inspect_preset
from gemmary.lives import add_lives
from gemmary.plans import add_plan
from gemmary.presets import PRESETS, preset
from gemmary.serve.door import add_serve

__all__ = ["app", "main"]

app = typer.Typer(
    help="The complete Gemma system: one codebase for a model's whole life.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_err = Console(stderr=True)
_TABLE_WIDTH = 120  # so that names stay whole where output is piped; a narrower terminal wraps the lines

# typer has a click of its own in newer releases: this is the base of whichever errors it raises.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

Model = Annotated[str, typer.Argument(help="A directory, a file, 'sample', or with --hub a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Hub = Annotated[bool, typer.Option("--hub", help="Allow fetching MODEL from the Hugging Face hub.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default what suits the device.")]
MaxNew = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")]
Penalty = Annotated[float, typer.Option(help="Hold down tokens already there; 1 does nothing.")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same tokens.")]


@app.command("inspect")
def inspect_(model: Model, as_json: Json = False, hub: Hub = False) -> None:
    """Show a model's or preset's config and every tensor with shape, count and bytes."""
    if model in PRESETS and not Path(model).exists():
        found = inspect_preset(model, preset(model))
    else:
        try:
            with open_model(model, hub=hub) as checkpoint:
                found = inspect_checkpoint(model, checkpoint)
        except GemmaryError:
            if not Path(model).exists() and "/" not in model and model != "sample":
                preset(model)  # says which presets are near
            raise
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print_inspection(found)


@app.command("convert")
def convert_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model in any format we read.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Where to write: a directory, or a .gguf file.")],
    to: Annotated[str, typer.Option(help=" | ".join(FORMATS))],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default as stored.")] = None,
    gguf_type: Annotated[str | None, typer.Option(help="F32, BF16, Q8_0 or Q4_0 for the matrices of a GGUF.")] = None,
    hub: Hub = False,
) -> None:
    """Write a model in another format; there and back is bit-identical."""
    with open_model(source, hub=hub) as checkpoint, _progress("converting") as progress:
        convert(checkpoint, destination, to, dtype=dtype, gguf_type=gguf_type, on_progress=progress)
    _err.print(f"wrote {destination}", highlight=False)


@app.command("quantize")
def quantize_(
    model: Model,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    bits: Annotated[int, typer.Option(help="8 (per channel) or 4 (groups of 32).")] = 8,
    hub: Hub = False,
) -> None:
    """Write a model with 8- or 4-bit weights, as a native checkpoint."""
    with open_model(model, hub=hub) as checkpoint, _progress("quantizing") as progress:
        quantize_model(checkpoint, destination, bits, on_progress=progress)
    _err.print(f"wrote {destination}", highlight=False)


@app.command("generate")
def generate_(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads it from stdin.")],
    max_new_tokens: MaxNew = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    logprobs: Annotated[int, typer.Option(help="With --json, also this many likeliest tokens per step.")] = 0,
    look_up: Annotated[bool, typer.Option("--look-up", help="Guess what followed the last tokens before.")] = False,
    draft: Annotated[str | None, typer.Option(help="A smaller model of the same tokenizer, to guess with.")] = None,
    dtype: Dtype = None,
    as_json: Json = False,
    hub: Hub = False,
) -> None:
    """Continue a text. --look-up and --draft change how fast it comes, and not what comes."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    gemma = _load(model, dtype, hub)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop or []}
    options |= {"look_up": look_up, "draft": _load(draft, dtype, hub) if draft else None}
    if as_json:
        print(json.dumps(gemma.generate(text, top_logprobs=logprobs, **options).to_json()))
        return
    pieces = gemma.stream(text, **options)
    first = next(pieces)  # a mistake shows before anything is printed
    print(text, first.text, sep="", end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


@app.command("chat")
def chat_(
    model: Model,
    max_new_tokens: MaxNew = 1024,
    temperature: Temperature = 1.0,
    top_k: TopK = 64,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    hub: Hub = False,
) -> None:
    """Converse with a model. /reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    converse(_load(model, dtype, hub), sampling, max_new_tokens)


add_serve(app, lambda: _keep_compiled())  # defined below


add_lives(app, _err, lambda: _keep_compiled())


@app.command("report")
def report_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as out/nano.")],
    watts: Annotated[float, typer.Option(help="Of a busy core, for the estimate of energy.")] = 8.0,
    as_json: Json = False,
) -> None:
    """Write a run's report, RUN/report.html, and its model card, RUN/README.md."""
    from gemmary.report import report

    found = report(run, watts=watts)
    print(json.dumps(found) if as_json else f"{found['page']}\n{found['card']}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"gemmary {gemmary.__version__}, CPU kernels: {kernels.instructions() or 'none, plain XLA serves'}")
        raise typer.Exit


def _load(model: str, dtype: str | None, hub: bool) -> Gemma:
    _keep_compiled()
    with _progress(f"loading {model}") as progress:
        return load(model, dtype=dtype, hub=hub, on_progress=progress)


def _keep_compiled() -> None:
    """Compiled programs are kept between runs, where JAX_COMPILATION_CACHE_DIR says or in the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "gemmary" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where stderr is a terminal; it leaves no trace."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


add_evaluate(app, _load, _progress)
add_memorization(app, _load, _progress)
add_compare(app, _load, _progress)
add_plan(app, _progress, _err)


def _print_inspection(found: Inspection) -> None:
    out = Console()
    out.width = max(out.width, _TABLE_WIDTH)
    config = found.to_json()["config"]
    out.print(f"[bold]{found.model}[/] ({found.format}), Gemma {found.config.generation}", highlight=False)
    out.print("  ".join(f"{key}={value}" for key, value in config.items()), style="dim", highlight=False)
    table = Table("tensor", "shape", "count", "layers", "parameters", "dtype", "bytes", box=None, header_style="bold")
    for column in table.columns[2:5] + table.columns[6:]:
        column.justify = "right"
    for line in found.tensors:
        numbers = f"{line.count:,}", str(line.layers), f"{line.count * line.layers:,}"
        name = line.name.replace("{i}", "*")
        table.add_row(name, str(list(line.shape)), *numbers, line.dtype, f"{line.bytes:,}")
    out.print(table)
    counts = found.counts
    size = sum(line.bytes for line in found.tensors)
    out.print(
        f"embedding {counts.embedding:,} + non-embedding {counts.non_embedding:,} = {counts.total:,} parameters, "
        f"{size:,} bytes ({size / 2**30:.2f} GiB)",
        highlight=False,
    )
    published = found.published
    if published and published.non_embedding:
        embedding = f"{published.embedding:,} + " if published.embedding else ""
        kind = "published" if published.exact else "published, rounded"
        out.print(f"{kind}: {embedding}{published.non_embedding:,} ({published.source})", style="dim", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the console script's entry."""
    try:
        code = app(arguments, standalone_mode=False)
    except GemmaryError as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except _UsageError as error:
        _fail(error.format_message())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head`: not an error, and nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
