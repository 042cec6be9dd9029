"""The whole examination: facts, then what they mean for a bundle."""

from __future__ import annotations

from pathlib import Path

from gog_edge.doctor.box import Box, look_at_box
from gog_edge.doctor.finding import Report
from gog_edge.doctor.hardware import judge_box, judge_gpus, judge_libraries
from gog_edge.doctor.needs import judge_bundle
from gog_edge.engines.manifest import ORT
from gog_edge.engines.registry import CPU_SEARCH, EngineChoice


def examine(
    folder: Path, engine: str | None = None, engines: Path | None = None, *, search: str = CPU_SEARCH,
    box: Box | None = None,
) -> Report:
    """What this box has and the bundle in `folder` needs, read for `engine`, or for the best that works here.

    `engines`: a folder of built engines in the place of the bundle's own. `search`: what its packs are to be
    searched with. `box`: facts that were gathered before. Never fails on a strange box: what cannot be looked at is a
    finding. Raises InputError as `EngineChoice` does.
    """
    choice = EngineChoice(engine or ORT, engines, search)
    box = box or look_at_box()
    findings = [*judge_box(box), *judge_gpus(box, search), *judge_libraries(box, search),
                *judge_bundle(folder, box, choice, search)]  # fmt: skip
    return Report.of(str(folder), findings, engine, search)
