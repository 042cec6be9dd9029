"""Options that several commands have."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gog_edge.engines.manifest import ENGINES
from gog_edge.engines.registry import SEARCHES
from gog_edge.errors import GogEdgeError
from gog_edge.files import full_disk

BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Folder of a bundle; the atlas when left out.")]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Cores to use; 0 for all.")]
EngineOption = Annotated[str, typer.Option("--engine", help=f"What runs the graphs: {', '.join(ENGINES)}.")]
EnginesOption = Annotated[Path | None, typer.Option("--engines", help="Folder of built engines; engines/ENGINE in the "
                                                    "bundle when left out.")]
SearchOption = Annotated[str, typer.Option("--search", help=f"What searches the packs: {', '.join(SEARCHES)}.")]
_EXTRAS = {"faiss": "cpu", "onnxruntime": "cpu", "libzim": "zim", "pymilvus": "milvus", "pyarrow": "milvus",
           "ray": "ray"}  # what brings a module; what only builders need is in `index`

# What a command is ended by: refusals, what is not installed, and what the disk does.
FAILURES = (GogEdgeError, ModuleNotFoundError, OSError, sqlite3.OperationalError)


def explained(exc: BaseException) -> str:
    """What went wrong and what to do, of one of `FAILURES`."""
    if isinstance(exc, ModuleNotFoundError):
        module = (exc.name or "").split(".")[0]
        return f"{module} is not installed; pip install 'gog_edge[{_EXTRAS.get(module, 'index')}]'"
    if full_disk(exc):
        return f"the disk is full ({exc}); make room and run the same command again: it goes on where it stopped"
    if isinstance(exc, OSError):
        where = f"'{exc.filename}'" if exc.filename is not None else "a file"
        return f"{where} cannot be used ({exc.strerror or exc}); look whether it is there and whose it is"
    if isinstance(exc, sqlite3.Error):
        return f"a store cannot be read or written ({exc}); look at the disk and run the same command again"
    return str(exc)


@contextmanager
def errors_shown(code: int = 2, *, interrupted: str = "") -> Iterator[None]:
    """What goes wrong on purpose, what is not installed and what the disk refuses is one line on stderr.

    The exit code is `code`, or 2 for what is not installed. `interrupted` is said when the user stops the command.
    """
    try:
        yield
    except FAILURES as exc:
        typer.echo(f"gog-edge: {explained(exc)}", err=True)
        raise typer.Exit(2 if isinstance(exc, ModuleNotFoundError) else code) from exc
    except KeyboardInterrupt:
        typer.echo(f"gog-edge: stopped; {interrupted or 'nothing was changed'}", err=True)
        raise typer.Exit(130) from None
