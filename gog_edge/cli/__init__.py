"""The `gog-edge` command. A command imports what it needs when it runs, so that --help stays fast."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gog_edge.cli import bundle, doctor, export, pack
from gog_edge.cli.common import (
    App,
    BundleOption,
    EngineOption,
    EnginesOption,
    SearchOption,
    ThreadsOption,
    print_errors,
)
from gog_edge.engines.manifest import ORT
from gog_edge.engines.registry import CPU_SEARCH
from gog_edge.errors import InputError

if TYPE_CHECKING:
    from gog_edge.agent.events import AnswerRecord, Workflow
    from gog_edge.runtime import Runtime

app = App(name="gog-edge", no_args_is_help=True,
          help="Answer questions about pictures on a machine that is never online.")

app.add_typer(bundle.app)
app.add_typer(export.app)
app.add_typer(pack.app)
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _root() -> None:
    """Answer questions about pictures on a machine that is never online."""


@app.command()
def serve(
    bundle: BundleOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other "
                                        "machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.")] = 8080,
    threads: ThreadsOption = 0,
    traces: Annotated[Path | None, typer.Option(help="Folder for the traces of the last 1,000 questions.")] = None,
    engine: EngineOption = ORT,
    engines: EnginesOption = None,
    search: SearchOption = CPU_SEARCH,
) -> None:
    """Serve a bundle over HTTP, with the kiosk page at /."""
    from gog_edge.config import ServeConfig
    from gog_edge.engines.registry import EngineChoice
    from gog_edge.serve.server import serve as run

    with print_errors():
        config = ServeConfig(host=host, port=port, threads=threads, traces=traces)
        run(_folder(bundle), config, EngineChoice(engine, engines, search))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture file: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000.")],
    question: Annotated[str, typer.Argument(help="The question about the picture.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    bundle: BundleOption = None,
    workflow: Annotated[str, typer.Option(help="gog: all actions; full_image: search with the whole picture; "
                                         "direct: no search.")] = "gog",
    trace: Annotated[Path | None, typer.Option(help="Write the trace of the episode to this file.")] = None,
    threads: ThreadsOption = 0,
    engine: EngineOption = ORT,
    engines: EnginesOption = None,
    search: SearchOption = CPU_SEARCH,
) -> None:
    """Ask one question about a picture."""
    from gog_edge.config import ServeConfig
    from gog_edge.engines.registry import EngineChoice
    from gog_edge.runtime import open_runtime

    with print_errors():
        chosen, choice = _workflow(workflow), EngineChoice(engine, engines, search)
        data = image.read_bytes()
        cores = ServeConfig(threads=threads).cores
        with closing(open_runtime(_folder(bundle), threads=cores, choice=choice)) as runtime:
            record = _answer(runtime, data, question, chosen, trace, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(record.to_json(), ensure_ascii=False))


@app.command()
def probe(
    checkpoint: Annotated[Path, typer.Argument(help="An exported policy folder.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures; default: the atlas's samples.")] = None,
    dialect: Annotated[list[str] | None, typer.Option(help="Name or file of a dialect to try; may be repeated. "
                                                      "Default: all of the package.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Store the dialect in the policy's folder.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a turn; thinking models need more.")] = 512,
    threads: ThreadsOption = 0,
) -> None:
    """Find the dialect and box frame of an exported policy; exit code 1 if none fits."""
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.cli.render_episode import ProbePrinter
    from gog_edge.config import ServeConfig
    from gog_edge.policy.probe import candidates_for, check_exported, probe_folder, read_cases, write_dialect

    with print_errors():
        check_exported(checkpoint)
        named = [Path(one) if one.endswith(".toml") else one for one in dialect or ()]
        candidates = candidates_for(checkpoint, named)
        cases = read_cases(pictures or DEFAULT_BUNDLE / "samples")
        show = ProbePrinter()
        with show.waiting(len(cases), len(candidates)) as tried:
            report = probe_folder(checkpoint, cases, candidates, threads=ServeConfig(threads=threads).cores,
                                  max_tokens=tokens, on_finding=tried)
        written = write_dialect(checkpoint, report.best) if write and report.best else None
        show(report, written)
    if report.best is None:
        raise typer.Exit(1)


def _answer(runtime: Runtime, data: bytes, question: str, workflow: Workflow, trace: Path | None, *,
            quiet: bool) -> AnswerRecord:
    """Return the answer; unless `quiet`, print every event as it happens."""
    from gog_edge.agent.trace import TraceWriter
    from gog_edge.cli.render_episode import EpisodePrinter

    on_event = (lambda _: None) if quiet else EpisodePrinter()
    return runtime.answer(data, question, on_event, workflow=workflow, trace=TraceWriter(trace) if trace else None)


def _workflow(name: str) -> Workflow:
    from gog_edge.agent.events import Workflow

    try:
        return Workflow(name)
    except ValueError:
        raise InputError(f"unknown workflow '{name}'; it must be one of {', '.join(Workflow)}") from None


def _folder(bundle: Path | None) -> Path:
    from gog_edge.bundle import DEFAULT_BUNDLE

    return bundle or DEFAULT_BUNDLE
