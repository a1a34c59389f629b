"""The verb `gemmary serve`. What serves is imported when it is called: it needs an extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gemmary.errors import GemmaryError
from gemmary.serve.settings import Settings, api_keys, bytes_of

__all__ = ["add_serve"]


def add_serve(app: typer.Typer, prepare: Callable[[], None]) -> None:
    """Register the verb; `prepare` is called before a model is loaded."""

    @app.command("serve")
    def serve_(
        model: Annotated[str, typer.Argument(help="A directory, a file, 'sample', or with --hub a hub id.")],
        host: Annotated[str, typer.Option(help="Where to listen; other than loopback only with a key.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8000,
        slots: Annotated[int, typer.Option(help="Answers made at once.")] = 8,
        queue: Annotated[
            int, typer.Option(help="Answers that may wait for a slot; more are told to come again.")
        ] = 128,
        memory: Annotated[
            str | None, typer.Option(help="For the answers' caches, such as 8GiB; by default what suits the machine.")
        ] = None,
        api_key_file: Annotated[
            Path | None, typer.Option(help="Keys that clients must have, one a line; also GEMMARY_API_KEY.")
        ] = None,
        allow_origin: Annotated[str | None, typer.Option(help="An origin whose pages may use the server.")] = None,
        grace: Annotated[float, typer.Option(help="Seconds that answers may take to finish after a signal.")] = 30.0,
        name: Annotated[
            str | None, typer.Option(help="What clients call the model; by default its file's name.")
        ] = None,
        dtype: Annotated[
            str | None, typer.Option(help="float32 or bfloat16; by default what suits the device.")
        ] = None,
        hub: Annotated[bool, typer.Option("--hub", help="Allow fetching MODEL from the Hugging Face hub.")] = False,
        look_up: Annotated[bool, typer.Option("--look-up", help="Guess what followed the last tokens before.")] = False,
        draft: Annotated[str | None, typer.Option(help="A smaller model of the same tokenizer, to guess with.")] = None,
    ) -> None:
        """Serve a model through OpenAI's API, with a chat page at /."""
        settings = Settings(
            model=model,
            name=name or Path(model).resolve().name,
            host=host,
            port=port,
            slots=slots,
            queue=queue,
            memory=None if memory is None else bytes_of(memory),
            keys=api_keys(api_key_file),
            allow_origin=allow_origin,
            grace=grace,
            dtype=dtype,
            hub=hub,
            look_up=look_up,
            draft=draft,
        )
        try:
            from gemmary.serve.run import serve
        except ImportError as error:
            raise GemmaryError(f"serving needs an extra ({error}): pip install 'gemmary[serve]'") from None
        prepare()
        serve(settings)
