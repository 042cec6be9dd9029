"""`gog-edge bundle`: create bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gog_edge.cli.common import App, print_errors
from gog_edge.errors import InputError

if TYPE_CHECKING:
    from gog_edge.config import RemoteConfig

app = App(name="bundle", no_args_is_help=True, help="Create bundles, which `gog-edge serve` serves.")


@app.callback()
def _group() -> None:
    """Create bundles, which `gog-edge serve` serves."""


@app.command()
def init(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the bundle; it may exist.")],
    encoder: Annotated[Path, typer.Option(help="Encoder folder, from `gog-edge export clip`.")],
    pack: Annotated[list[Path], typer.Option(help="Pack folder, from `gog-edge pack build`; may be repeated.")],
    policy: Annotated[Path | None, typer.Option(help="Policy folder, from `gog-edge export policy`.")] = None,
    policy_url: Annotated[str | None, typer.Option(help="Instead of --policy: base URL of an OpenAI-compatible server "
                                                   "that runs it, for example http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[str | None, typer.Option(help="With --policy-url: name of the model on that server.")] = None,
    dialect: Annotated[str | None, typer.Option(help="With --policy-url: name or .toml file of the dialect that the "
                                                "model uses.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: that of OUT.")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="Text encoder folder, from `gog-edge export text`, that "
                                                      "packs were built with.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Folder of sample pictures with a samples.json.")] = None,
    link: Annotated[bool, typer.Option("--link/--copy", help="Hard links instead of copies of parts outside OUT; only "
                                       "within one file system.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.toml and copied parts.")] = False,
) -> None:
    """Create a bundle from its parts: check that they belong together, copy them into OUT and write bundle.toml.

    Parts that are already inside OUT are used where they are.
    """
    with print_errors():
        from gog_edge.bundle_init import BundleParts, init_bundle
        from gog_edge.planner import plan_memory

        parts = BundleParts(_policy(policy, policy_url, model, dialect), encoder, tuple(pack), samples, text_encoder)
        bundle = init_bundle(out, parts, name=name, link=link, force=force)
        plan = plan_memory(bundle)
    typer.echo(f"bundle '{bundle.name}' needs up to {plan}")
    typer.echo(f"serve it: gog-edge serve --bundle {out}")


def _policy(folder: Path | None, url: str | None, model: str | None, dialect: str | None) -> Path | RemoteConfig:
    from gog_edge.config import RemoteConfig

    if (folder is None) == (url is None):
        raise InputError("give either --policy, or --policy-url with --model and --dialect")
    if url is None and (model or dialect):
        raise InputError("--model and --dialect require --policy-url, the server that runs the model")
    if folder is not None:
        return folder
    if not model or not dialect:
        raise InputError("--policy-url requires --model and --dialect")
    return RemoteConfig.from_table({"url": url, "model": model, "dialect": dialect}, where="--policy-url")
