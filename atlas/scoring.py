"""How episodes about atlas questions are scored."""

from __future__ import annotations

from dataclasses import dataclass

from atlas.testset import AskedScene
from gog_edge.agent.citations import plain
from gog_edge.agent.events import AnswerRecord
from gog_edge.types import Size


@dataclass(frozen=True, slots=True)
class Score:
    """One episode."""

    right: bool
    refused: bool  # said that it is not in the snapshot
    gaze_ious: tuple[float, ...]  # of each gaze with the flag it should have looked at; empty where none is asked
    strict_ious: tuple[float, ...]  # of each gaze with the asked flag, first looks of "beside" questions included
    cited: bool  # a passage that carries the answer was cited
    actions: tuple[str, ...]
    ms: float


def score(item: AskedScene, record: AnswerRecord, size: Size, not_found: str) -> Score:
    """Exact match after normalisation with any accepted answer; for what is in no pack, saying so.

    Args:
        size: of the picture that was asked about, pixels.
        not_found: the dialect's words for "not in the snapshot".
    """
    said = plain(record.answer)
    refused = plain(not_found) in said
    accepted = {plain(answer) for answer in item.question.answers}
    strict = _ious(item, record, size, strict=True)
    return Score(
        right=refused if item.question.kind == "invented" else said in accepted,
        refused=refused,
        gaze_ious=_ious(item, record, size, strict=False),
        strict_ious=strict,
        cited=any(said and f" {said} " in f" {plain(citation.passage.text)} " for citation in record.citations),
        actions=tuple(step.action for step in record.steps),
        ms=record.timings_ms["total"],
    )


def _ious(item: AskedScene, record: AnswerRecord, size: Size, *, strict: bool) -> tuple[float, ...]:
    """IoU of each gaze with its target.

    The target is the asked flag. A question about "the other flag" does not tell which of the two that is before one
    was looked at: there the first gaze may be at either, unless `strict`.
    """
    asked = item.question.asked
    if asked is None:
        return ()
    gazes = [step.box for step in record.steps if step.action == "gaze_search" and step.box is not None]
    found = []
    for index, box in enumerate(gazes):
        open_choice = item.question.relation == "other" and index == 0 and not strict
        targets = range(len(item.scene.placed)) if open_choice else [asked]
        found.append(max(box.iou(item.scene.box(target, size)) for target in targets))
    return tuple(found)
