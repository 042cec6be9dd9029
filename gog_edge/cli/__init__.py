"""The `gog-edge` command. What a command needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gog_edge.cli import doctor, pack
from gog_edge.cli.common import BundleOption, EngineOption, EnginesOption, SearchOption, ThreadsOption, errors_shown
from gog_edge.engines.manifest import ORT
from gog_edge.engines.registry import CPU_SEARCH
from gog_edge.errors import GogEdgeError, InputError

if TYPE_CHECKING:
    from gog_edge.agent.events import AnswerRecord, Workflow
    from gog_edge.runtime import Runtime

app = typer.Typer(name="gog-edge", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Answers questions about pictures on a box that is never online.")

app.add_typer(pack.app)
app.command()(doctor.doctor)


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _root() -> None:
    """Answers questions about pictures on a box that is never online."""


@app.command()
def serve(
    bundle: BundleOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    threads: ThreadsOption = 0,
    traces: Annotated[Path | None, typer.Option(help="Folder that gets a trace of each question.")] = None,
    engine: EngineOption = ORT,
    engines: EnginesOption = None,
    search: SearchOption = CPU_SEARCH,
) -> None:
    """Serve a bundle to browsers and programs."""
    from gog_edge.config import ServeConfig
    from gog_edge.engines.registry import EngineChoice
    from gog_edge.serve.server import serve as run

    with errors_shown():
        config = ServeConfig(host=host, port=port, threads=threads, traces=traces)
        run(_folder(bundle), config, EngineChoice(engine, engines, search))


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture: JPEG, PNG, WebP, GIF, BMP or TIFF.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    bundle: BundleOption = None,
    workflow: Annotated[str, typer.Option(help="gog, full_image or direct.")] = "gog",
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

    with errors_shown():
        chosen, choice = _workflow(workflow), EngineChoice(engine, engines, search)
        data = _read(image)
        cores = ServeConfig(threads=threads).cores
        with closing(open_runtime(_folder(bundle), threads=cores, choice=choice)) as runtime:
            record = _answer(runtime, data, question, chosen, trace, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(record.to_json(), ensure_ascii=False))


@app.command()
def probe(
    checkpoint: Annotated[Path, typer.Argument(help="An exported policy folder.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures to ask about; the atlas's samples.")] = None,
    dialect: Annotated[list[str] | None, typer.Option(help="Name or file of a dialect to try; may be repeated. "
                                                      "All that ship when left out.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the dialect found beside the checkpoint.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Longest turn; thinking models need more.")] = 512,
    threads: ThreadsOption = 0,
) -> None:
    """Find out which dialect a policy speaks; exit code 1 when it is none."""
    from gog_edge.bundle import DEFAULT_BUNDLE
    from gog_edge.cli.render_episode import ShowProbe
    from gog_edge.config import ServeConfig
    from gog_edge.policy.probe import candidates_for, check_exported, probe_folder, read_cases, write_dialect

    with errors_shown():
        check_exported(checkpoint)
        named = [Path(one) if one.endswith(".toml") else one for one in dialect or ()]
        candidates = candidates_for(checkpoint, named)
        cases = read_cases(pictures or DEFAULT_BUNDLE / "samples")
        show = ShowProbe()
        with show.waiting(len(cases), len(candidates)) as tried:
            report = probe_folder(checkpoint, cases, candidates, threads=ServeConfig(threads=threads).cores,
                                  max_tokens=tokens, on_finding=tried)
        written = write_dialect(checkpoint, report.best) if write and report.best else None
        show(report, written)
    if report.best is None:
        raise typer.Exit(1)


def _answer(runtime: Runtime, data: bytes, question: str, workflow: Workflow, trace: Path | None, *,
            quiet: bool) -> AnswerRecord:
    """The answer; unless `quiet`, every event is shown as it comes."""
    from gog_edge.agent.events import Answered
    from gog_edge.agent.trace import TraceWriter
    from gog_edge.cli.render_episode import Show

    show = None if quiet else Show()
    for event in runtime.ask(data, question, workflow=workflow, trace=TraceWriter(trace)):
        if show is not None:
            show(event)
        if isinstance(event, Answered):
            return event.record
    raise GogEdgeError("the episode ended without an answer; ask again with --trace FILE and look at the file")


def _workflow(name: str) -> Workflow:
    from gog_edge.agent.events import Workflow

    try:
        return Workflow(name)
    except ValueError:
        raise InputError(f"there is no workflow '{name}'; known are {', '.join(Workflow)}") from None


def _read(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as exc:
        raise InputError(f"'{image}' cannot be read ({exc.strerror}); name a picture file") from exc


def _folder(bundle: Path | None) -> Path:
    from gog_edge.bundle import DEFAULT_BUNDLE

    return bundle or DEFAULT_BUNDLE
