"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gog_edge.engines.built import ENGINES
from gog_edge.engines.choice import SEARCHES

BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Folder of a bundle; the atlas when left out.")]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Cores to use; 0 for all.")]
EngineOption = Annotated[str, typer.Option("--engine", help=f"What runs the graphs: {', '.join(ENGINES)}.")]
EnginesOption = Annotated[Path | None, typer.Option("--engines", help="Folder of built engines; engines/ENGINE in the "
                                                    "bundle when left out.")]
SearchOption = Annotated[str, typer.Option("--search", help=f"What searches the packs: {', '.join(SEARCHES)}.")]
