"""The command `gog-edge serve` as a module: `python -m gog_edge.serve --port 8080`."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of the process, or with others. Exits as `gog-edge serve` does."""
    from gog_edge.cli import serve  # not above: the commands are a layer above the server
    from gog_edge.cli.common import App

    app = App()
    app.command()(serve)
    app(arguments, prog_name="python -m gog_edge.serve")


if __name__ == "__main__":
    main()
