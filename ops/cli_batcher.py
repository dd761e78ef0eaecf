"""`runbooks batcher`: the micro-batcher, in this process."""

from typing import Annotated

import typer

DEFAULT_PORT = 8235


def batcher(
    host: Annotated[
        str, typer.Option(help="Address to listen on; the internal network's, for it asks nobody for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = DEFAULT_PORT,
) -> None:
    """Answer the chatbot's requests over HTTP with as few calls to Bedrock as their latency allows; SIGTERM drains."""
    from workers.batcher import run

    raise typer.Exit(run(host, port))
