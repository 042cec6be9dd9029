"""`gog-edge export`: convert checkpoints to what the package runs. The commands need the extra `export`.

`python -m export.*` of a checkout runs the same functions under their older names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gog_edge.cli.common import App, print_errors
from gog_edge.engines.manifest import BUILT_ENGINES, ENGINES, ENGINES_FOLDER, ORT, build_command

if TYPE_CHECKING:
    from gog_edge.exporting.conversion.convert import Kind
    from gog_edge.exporting.policy.parity import ParityReport

app = App(name="export", no_args_is_help=True,
                  help="Convert checkpoints to graphs and engines. Needs the extra `export`.")

KIND_ALIASES = {"half": "fp16"}  # of graph conversions: names of older versions

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; an earlier export there is "
                                             "replaced.")]
NoParityOption = Annotated[bool, typer.Option("--no-parity", help="Skip the parity check; the manifest says so.")]
ContextOption = Annotated[int | None, typer.Option(help="Capacity of the KV cache in tokens; default: the policy's "
                                                   "limit.")]


@app.command()
def policy(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json, safetensors and tokenizer.json.")],
    out: OutArgument,
    engine: Annotated[str, typer.Option(help=f"What the policy will run on: {', '.join(ENGINES)}. Engines other than "
                                        f"{ORT} are built by `gog-edge export engines`.")] = ORT,
    precision: Annotated[str, typer.Option(help="Data type of the weights: fp32, fp16 or int4. The CPU computes "
                                           "in fp32 from fp16 weights, too.")] = "fp32",
    block: Annotated[int, typer.Option(help="int4: number of weights that share a scale.")] = 128,
    cpu_layout: Annotated[str | None, typer.Option(help="int4: second layout of the weights for the CPU: native (for "
                                                   "the package's operators, x86-64), prefill (for long prompts on "
                                                   "ONNX Runtime's operators) or none. Default: native where it "
                                                   "runs, else prefill; none for other engines than "
                                                   f"{ORT}.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder of LoRA weights to merge.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the policy; default: that of the checkpoint's "
                                             "folder.")] = None,
    context: Annotated[int | None, typer.Option(help="Maximum tokens of a conversation; default: 4096, or what the "
                                                "checkpoint was trained for if that is less.")] = None,
    dialect: Annotated[str | None, typer.Option(help="File or name of a dialect; default: the checkpoint's, else "
                                                "'gog'.")] = None,
    no_parity: NoParityOption = False,
) -> None:
    """Export a Qwen2.5-VL or Qwen3-VL checkpoint to a policy folder and compare it with transformers.

    The folder contains graphs, the embedding table, the tokenizer, the chat format and a manifest with parity figures.
    The last line of the output is a JSON object.
    """
    started = time.monotonic()
    with print_errors():
        from gog_edge.cli.render_export import show_files, track_layers
        from gog_edge.exporting.policy.export import CPU_LAYOUTS, NO_LAYOUT, PRECISIONS, check_cpu_layout, export_policy

        _require("--engine", engine, ENGINES)
        _require("--precision", precision, PRECISIONS)
        _require("--cpu-layout", cpu_layout, CPU_LAYOUTS)
        check_cpu_layout(cpu_layout, precision, engine)
        manifest = export_policy(
            checkpoint,
            out,
            adapter=adapter,
            precision=precision,
            block=block,
            cpu_layout=cpu_layout if engine == ORT else NO_LAYOUT,
            name=name,
            context=context,
            dialect=Path(dialect) if dialect and Path(dialect).is_file() else dialect,
            parity=not no_parity,
            progress=track_layers,
            notice=lambda note: typer.echo(f"note: {note}", err=True),
        )
    show_files(f"{manifest.name} -> {out}", manifest.files)
    if engine != ORT:
        typer.echo(f"put it into a bundle, then build its engines: {build_command('BUNDLE', engine)}")
    seconds = round(time.monotonic() - started, 2)
    typer.echo(json.dumps({"out": str(out), "seconds": seconds, "parity": manifest.parity}))


@app.command()
def clip(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder with open_clip_config.json and weights, or the "
                                         "name of a configuration that open_clip ships.")],
    out: OutArgument,
    weights: Annotated[Path | None, typer.Option(help="Local weights, a safetensors file; required with a "
                                                 "name.")] = None,
    tag: Annotated[str | None, typer.Option(help="open_clip's tag of these weights, which selects their preprocessing "
                                            "and activation.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or int8 for ViT models: about three times as fast, a quarter "
                                           "of the bytes.")] = "fp32",
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures for the parity check; default: the atlas's "
                                                  "samples.")] = None,
) -> None:
    """Export an open_clip model to an encoder folder and compare it with PyTorch. Nothing is downloaded.

    The vectors of an int8 export have a cosine of at least 0.99 to PyTorch's, so that packs built in either precision
    can be searched with the other. The last line of the output is a JSON object.
    """
    started = time.monotonic()
    with print_errors():
        from gog_edge.cli.render_export import show_encoder
        from gog_edge.exporting.clip.checkpoint import load_clip
        from gog_edge.exporting.clip.export import PRECISIONS, export_clip
        from gog_edge.exporting.clip.parity import SAMPLES

        _require("--precision", precision, list(PRECISIONS))
        checkpoint = load_clip(model, weights=weights, tag=tag)
        manifest = export_clip(checkpoint, out, precision=precision, pictures=pictures or SAMPLES)
    show_encoder(manifest, out)
    keys = ("name", "dim", "precision", "weights_sha256", "preprocessing_sha256", "parity")
    seconds = round(time.monotonic() - started, 1)
    typer.echo(json.dumps({key: manifest[key] for key in keys} | {"seconds": seconds}))


@app.command()
def text(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a sentence encoder as transformers or "
                                          "sentence-transformers saves it, such as E5, BGE or MiniLM.")],
    out: OutArgument,
    name: Annotated[str | None, typer.Option(help="Name of the encoder; default: that of MODEL.")] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; default: as the folder defines.")] = None,
    query_prefix: Annotated[str | None, typer.Option(help="Text before each query; default: as the folder "
                                                     "defines.")] = None,
    passage_prefix: Annotated[str | None, typer.Option(help="Text before each passage; default: as the folder "
                                                       "defines.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of a text; longer ones are truncated. "
                                                   "Default: as the folder defines.")] = None,
) -> None:
    """Export a sentence encoder through optimum and compare it with PyTorch. Nothing is downloaded.

    Needs the extra `text` in an environment of its own. The last line of the output is a JSON object.
    """
    started = time.monotonic()
    with print_errors(extra="text"):
        if find_spec("optimum") is None:  # first, since it is missing where only the extra `export` is installed
            raise ModuleNotFoundError("No module named 'optimum'", name="optimum")
        from gog_edge.cli.render_export import show_encoder
        from gog_edge.exporting.text.checkpoint import TextOptions
        from gog_edge.exporting.text.encoder import export_text_encoder

        options = TextOptions(name, pooling, query_prefix, passage_prefix, max_tokens)
        manifest = export_text_encoder(model, out, options)
    show_encoder(manifest, out)
    keys = ("name", "dim", "model_type", "text", "weights_sha256", "preprocessing_sha256", "parity")
    seconds = round(time.monotonic() - started, 1)
    typer.echo(json.dumps({key: manifest[key] for key in keys} | {"seconds": seconds}))


@app.command()
def engines(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder with bundle.toml.")],
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(BUILT_ENGINES)}.")],
    sm: Annotated[str | None, typer.Option(help="tensorrt-rtx: compute capabilities, for example 86,89,120; "
                                           "default: all that it supports.")] = None,
    out: Annotated[Path | None, typer.Option(help=f"Folder to write; default: BUNDLE/{ENGINES_FOLDER}/ENGINE. Earlier "
                                             "engines there are replaced.")] = None,
    context: ContextOption = None,
    no_parity: NoParityOption = False,
) -> None:
    """Build the engines of a bundle for GPUs.

    TensorRT for RTX builds on any machine, with or without a GPU, for all GPUs that --sm names; TensorRT builds on the
    device, for its own GPU. The last line of the output is a JSON object.
    """
    sms = _parse_sms(sm)
    with print_errors():
        from gog_edge.bundle import open_bundle
        from gog_edge.cli.render_export import show_engines, show_steps
        from gog_edge.engines.manifest import default_engine_folder
        from gog_edge.exporting.engines.builder import build_engines
        from gog_edge.exporting.engines.plan import peak_mib

        folder = out or default_engine_folder(bundle, engine)
        with show_steps() as on_step:
            report = build_engines(open_bundle(bundle), folder, engine=engine, sms=sms, context=context,
                                   parity=not no_parity, on_step=on_step)  # fmt: skip
    show_engines(report, folder)
    built = report.engines
    typer.echo(json.dumps({
        "out": str(folder), "engine": built.engine, "version": built.version, "context": built.context,
        "graphs": report.graphs(), "parity": built.parity,
        "peak_mib": max(peak_mib(), *(cost.peak_mib for cost in report.costs.values())),
    }))  # fmt: skip


@app.command()
def check(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Policy folder; with --engine-graphs a bundle.")],
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint that the policy was exported from.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="The PEFT folder that was merged into it.")] = None,
    episodes: Annotated[int, typer.Option(help="Number of random conversations.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random conversations.")] = 0,
    engine_graphs: Annotated[str | None, typer.Option(help="Compare the graphs that engines are built from with the "
                                                      "bundle's own: standard (TensorRT for RTX, TensorRT from "
                                                      "10.15 on), decomposed (older TensorRT) or fp16 "
                                                      "(ort-cuda).")] = None,
    context: ContextOption = None,
) -> None:
    """Compare an exported policy with its checkpoint in transformers; exit code 1 if a limit is exceeded.

    With --engine-graphs, compare converted graphs with those of a bundle instead, for engines that were built with
    --no-parity. This needs no GPU, since converted graphs do not depend on the machine. The last line of the output is
    a JSON object.
    """
    if (checkpoint is None) == (engine_graphs is None):
        raise typer.BadParameter("give either --checkpoint or --engine-graphs")
    if checkpoint is not None:
        check_parity(out, checkpoint, adapter, episodes, seed)
    elif engine_graphs is not None:
        check_conversion(out, engine_graphs, context)


def check_parity(
    policy: Annotated[Path, typer.Argument(help="Policy folder.")],
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint that it was exported from.")],
    adapter: Annotated[Path | None, typer.Option(help="The PEFT folder that was merged into it.")] = None,
    episodes: Annotated[int, typer.Option(help="Number of random conversations.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the random conversations.")] = 0,
) -> None:
    """Compare an exported policy with its checkpoint in transformers; exit code 1 if a limit is exceeded."""
    with print_errors():
        from gog_edge.cli.render_export import show_parity
        from gog_edge.engines.onnx.native import unavailable_reason
        from gog_edge.errors import CheckpointError
        from gog_edge.exporting.policy.checkpoint import Checkpoint
        from gog_edge.exporting.policy.parity import measure_parity, random_episodes
        from gog_edge.policy.model import PolicyModel

        model = PolicyModel.open(policy)
        opened = Checkpoint.open(checkpoint, adapter)
        if opened.sha256 != model.manifest.source_sha256:
            raise CheckpointError(f"'{policy}' was not exported from the present content of '{checkpoint}'; give the "
                                  "checkpoint (and --adapter) that it was exported from, or export it again")
        conversations, has_native = random_episodes(model, episodes, seed=seed), model.manifest.has_native
        del model  # the memory may have room for one model only
        report: ParityReport = measure_parity(policy, opened, conversations)
    if has_native and report.native is None:
        typer.echo(f"not compared: the graphs for the native operators, which are not available here: "
                   f"{unavailable_reason()}", err=True)
    show_parity(report, f"{policy} against {checkpoint}")
    if not report.passed:
        raise typer.Exit(1)


def check_conversion(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder with bundle.toml.")],
    kind: Annotated[str, typer.Option(help="standard: TensorRT for RTX, TensorRT from 10.15 on; decomposed: older "
                                      "TensorRT; fp16: ort-cuda.")],
    context: ContextOption = None,
) -> None:
    """Compare a bundle's graphs, converted as engines are built from them, with its own; nothing is built."""
    with print_errors():
        from gog_edge.bundle import open_bundle
        from gog_edge.exporting.conversion.convert import KINDS
        from gog_edge.exporting.conversion.parity import check_converted
        from gog_edge.exporting.engines.builder import measure_conversion

        kind = KIND_ALIASES.get(kind, kind)
        _require("the kind of engine graphs", kind, KINDS)
        report = measure_conversion(open_bundle(bundle), cast("Kind", kind), context)
        typer.echo(json.dumps(report))
        check_converted(report)


@app.command("random-checkpoint")
def random_checkpoint(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    like: Annotated[str, typer.Option(help="Shape of a released model: qwen2.5-vl-3b or -7b, qwen3-vl-2b, -4b or "
                                      "-8b.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a checkpoint with the shape of a released model and random weights, to measure export, load and speed.

    Its tokenizer has Qwen's special tokens at their true ids, and as many others with synthetic merges. The last line
    of the output is a JSON object.
    """
    started = time.monotonic()
    with print_errors():
        from rich.progress import track

        from gog_edge.exporting.policy.random_checkpoint import shape_of, write_random_checkpoint

        size = write_random_checkpoint(shape_of(like), out, seed=seed,
                                       progress=lambda items: track(list(items), "writing"))  # fmt: skip
    typer.echo(json.dumps({"out": str(out), "bytes": size, "seconds": round(time.monotonic() - started, 1)}))


def _require(option: str, value: str | None, choices: Sequence[str]) -> None:
    """Raise a usage error if the value of an option is given and not one of `choices`."""
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{option} must be one of {', '.join(choices)}, got '{value}'")


def _parse_sms(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"--sm must be a list of compute capabilities such as 86,89,120, got '{text}'"
        ) from None
