"""How a command ends that cannot go on: one line on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gog_edge.errors import GogEdgeError

_EXTRAS = {"faiss": "cpu", "onnxruntime": "cpu"}  # what brings a module; what only builders need is in `index`


@contextmanager
def errors_shown(code: int = 2, *, interrupted: str = "") -> Iterator[None]:
    """What goes wrong on purpose, and what is not installed, is one line on stderr and this exit code.

    `interrupted` is said when the user stops the command.
    """
    try:
        yield
    except GogEdgeError as exc:
        typer.echo(f"gog-edge: {exc}", err=True)
        raise typer.Exit(code) from exc
    except ModuleNotFoundError as exc:
        extra = _EXTRAS.get(exc.name or "", "index")
        typer.echo(f"gog-edge: {exc.name} is not installed; pip install 'gog_edge[{extra}]'", err=True)
        raise typer.Exit(2) from exc
    except KeyboardInterrupt:
        typer.echo(f"gog-edge: stopped; {interrupted or 'nothing was changed'}", err=True)
        raise typer.Exit(130) from None
