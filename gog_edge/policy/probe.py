"""Which dialect a checkpoint speaks: it is let to speak in each, and what parses and where boxes fall is counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gog_edge.bundle import LISTING, read_samples
from gog_edge.errors import ArtifactError, BudgetExceeded, CheckpointError, InputError
from gog_edge.files import describe_files, write_json
from gog_edge.picture import Picture, decode_picture
from gog_edge.policy.base import Policy
from gog_edge.policy.decoding import Sampling
from gog_edge.policy.dialect.actions import FRAMES, BoxFrame, Corners, Frame, Kind, ToolCalls, View
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import copy_dialect, load_dialect, shipped
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import DIALECT, MANIFEST, read_manifest
from gog_edge.policy.model import PolicyModel
from gog_edge.types import Size, Utterance

ENOUGH = 0.8  # more than this share must parse, and fall inside
MARKED = 0.25  # at least this share must use the dialect's marks: any text at all is a plain answer
SLACK = 1.02  # of a frame: a box may end a little outside
MAX_TOKENS = 512  # of one turn; a thinking model may need more
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
QUESTIONS = ("What is the thing on the left, and what is known of it?", "What is the smallest thing that has a name?")


@dataclass(frozen=True, slots=True)
class Case:
    """One question about a picture."""

    picture: Picture
    question: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A dialect to try."""

    source: str | Path  # as `load_dialect` takes it
    dialect: Dialect
    own: bool = False  # the one that lies beside the checkpoint


@dataclass(frozen=True, slots=True)
class Finding:
    """What a checkpoint said in one dialect."""

    candidate: Candidate
    turns: int = 0
    plain: int = 0  # answers without any mark: they speak for no dialect, and against none
    kinds: Mapping[Kind, int] = field(default_factory=dict)  # marked actions that parsed
    boxes: tuple[tuple[Corners, View], ...] = ()  # as written, and on which image
    example: str = ""  # a turn that did not parse, else the first
    failure: str = ""  # why it could not be tried

    @property
    def parsed(self) -> int:
        """Turns that held a marked action."""
        return sum(self.kinds.values())

    @property
    def share(self) -> float:
        """Of the turns that are no plain answers, how many parsed."""
        asked = self.turns - self.plain
        return self.parsed / asked if asked else 0.0

    def inside(self, frame: BoxFrame) -> float:
        """Share of boxes that lie on their image when their numbers are read in this frame."""
        return _share(_lies_on(corners, view, frame) for corners, view in self.boxes)

    @property
    def over_1000(self) -> float:
        """Share of boxes with a number above 1000."""
        return _share(max(corners) > 1000 for corners, _ in self.boxes)

    @property
    def over_resized(self) -> float:
        """Share of boxes that leave the image as the policy sees it."""
        return _share(not _within(corners, view.extent("resized_px")) for corners, view in self.boxes)

    @property
    def below_1(self) -> float:
        """Share of boxes whose numbers are all 1 at the most."""
        return _share(max(corners) <= 1 for corners, _ in self.boxes)

    @property
    def box_frame(self) -> BoxFrame | None:
        """The frame that boxes fall into: the dialect's own, or another where the dialect is only assumed."""
        dialect = self.candidate.dialect
        if not self.boxes or self.inside(dialect.box_frame) > ENOUGH:
            return dialect.box_frame
        best = max(FRAMES, key=self.inside)
        return best if dialect.assumed and self.inside(best) > ENOUGH else None

    @property
    def against(self) -> str:
        """Why the dialect is not the checkpoint's; "" when it is."""
        if self.failure:
            return self.failure
        if self.share <= ENOUGH:
            return f"{self.share:.0%} parses"
        if self.parsed < MARKED * self.turns:
            return f"{self.parsed} of {self.turns} turns use its marks"
        if self.box_frame is None:
            return f"{self.inside(self.candidate.dialect.box_frame):.0%} of the boxes fit its frame"
        return ""


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, in the order tried."""

    findings: tuple[Finding, ...]

    @property
    def best(self) -> Finding | None:
        """The dialect that parses most; the checkpoint's own, or one that is not assumed, where several do."""
        fitting = [finding for finding in self.findings if not finding.against]
        order = {id(finding): _rank(finding) for finding in fitting}
        return max(fitting, key=lambda finding: order[id(finding)]) if fitting else None


def probe_folder(folder: Path, cases: Sequence[Case], candidates: Sequence[Candidate], *, threads: int | None = None,
                 max_tokens: int = MAX_TOKENS, on_finding: Callable[[Finding], None] | None = None) -> Report:
    """Let an exported policy speak in each dialect, greedily and freely. Raises ArtifactError or BackendError."""
    check_exported(folder)
    model = PolicyModel.open(folder, threads=threads)

    def freely(dialect: Dialect) -> LocalPolicy:
        return LocalPolicy(model, dialect, Sampling(), grammar=False)  # held to a grammar, anything parses

    found = []
    for finding in probe(cases, candidates, policy_of=freely, resized=model.vision.resized, max_tokens=max_tokens):
        found.append(finding)
        if on_finding is not None:
            on_finding(finding)
    return Report(tuple(found))


def probe(cases: Sequence[Case], candidates: Sequence[Candidate], *, policy_of: Callable[[Dialect], Policy],
          resized: Callable[[Size], Size], max_tokens: int = MAX_TOKENS) -> Iterator[Finding]:
    """One finding for each candidate. `resized`: the size in which the policy sees a picture."""
    for candidate in candidates:
        try:
            policy = policy_of(candidate.dialect)
            turns = [_first_turn(policy, case, max_tokens) for case in cases]
        except BudgetExceeded:
            yield Finding(candidate, failure="its prompt does not fit the context")
        else:
            views = [Frame(case.picture.size, resized(case.picture.size)).whole for case in cases]
            yield _finding(candidate, turns, views)


def check_exported(folder: Path) -> None:
    """CheckpointError or ArtifactError, saying what to do, for what is no policy folder."""
    if (folder / MANIFEST).is_file():
        return
    if (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is a checkpoint; export it first (python -m export.export_policy "
                              f"{folder} OUT) and probe what was exported")
    raise ArtifactError(f"'{folder}' is no policy folder, it has no {MANIFEST}; name one that export_policy wrote")


def candidates_for(folder: Path, named: Iterable[str | Path] = ()) -> tuple[Candidate, ...]:
    """The dialects named, else the checkpoint's own and all that ship. Raises DialectError."""
    chosen = tuple(Candidate(source, load_dialect(source)) for source in named)
    if chosen:
        return tuple(dataclasses.replace(one, own=_is_own(one.dialect, folder)) for one in chosen)
    own = Candidate(folder / DIALECT, load_dialect(folder / DIALECT), own=True)
    others = (Candidate(name, load_dialect(name)) for name in shipped() if name != own.dialect.name)
    return own, *others


def read_cases(folder: Path) -> tuple[Case, ...]:
    """The samples of a bundle's samples folder, else general questions about each picture in a folder.

    Raises InputError or BundleError.
    """
    if (folder / LISTING).is_file():
        asked = [(sample.picture, sample.questions) for sample in read_samples(folder)]
    else:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        asked = [(path, QUESTIONS) for path in paths if path.suffix.lower() in PICTURES]
    if not asked:
        raise InputError(f"'{folder}' holds no pictures; name a folder of {', '.join(PICTURES)} files")
    pictures = [(decode_picture(path.read_bytes()), questions) for path, questions in asked]
    return tuple(Case(picture, question) for picture, questions in pictures for question in questions)


def write_dialect(folder: Path, finding: Finding) -> Dialect:
    """Put the dialect found into the policy folder, and its hash and frame into the manifest."""
    manifest = read_manifest(folder)
    dialect, written = copy_dialect(finding.candidate.source, folder, finding.box_frame)
    kept = [entry for entry in manifest.files if entry.path not in written]
    files = sorted([*kept, *describe_files(folder, written)], key=lambda entry: entry.path)
    changed = dataclasses.replace(manifest, box_frame=dialect.box_frame, files=tuple(files))
    write_json(folder / MANIFEST, changed.to_json())
    return dialect


def _first_turn(policy: Policy, case: Case, max_tokens: int) -> Utterance:
    conversation = policy.begin(case.picture, case.question)
    try:
        return conversation.generate(max_tokens=max_tokens, deadline=None)
    finally:
        conversation.close()


def _finding(candidate: Candidate, turns: Sequence[Utterance], views: Sequence[View]) -> Finding:
    syntax = candidate.dialect.syntax
    kinds: Counter[Kind] = Counter()
    boxes, failed, plain = [], [], 0
    for turn, view in zip(turns, views, strict=True):
        if turn.action is None:
            failed.append(turn.text)
            continue
        said = candidate.dialect.read(turn.text)
        if said.kind == "answer" and isinstance(syntax, ToolCalls) and syntax.answer is None:
            plain += 1
            continue
        kinds[said.kind] += 1
        if said.corners is not None:
            boxes.append((said.corners, view))
    example = next(iter([*failed, *(turn.text for turn in turns)]), "")
    return Finding(candidate, len(turns), plain, dict(kinds), tuple(boxes), example)


def _is_own(dialect: Dialect, folder: Path) -> bool:
    return (folder / DIALECT).is_file() and load_dialect(folder / DIALECT).name == dialect.name


def _rank(finding: Finding) -> tuple[int, bool, bool, int]:
    candidate = finding.candidate
    return finding.parsed, candidate.own, not candidate.dialect.assumed, len(finding.boxes)


def _lies_on(corners: Corners, view: View, frame: BoxFrame) -> bool:
    """Numbers of 1 at the most are shares of a side, never pixels."""
    return _within(corners, view.extent(frame)) and (frame == "rel1" or max(corners) > 1)


def _within(corners: Corners, extent: tuple[float, float]) -> bool:
    x0, y0, x1, y1 = corners
    width, height = extent[0] * SLACK, extent[1] * SLACK
    return min(corners) >= 0 and max(x0, x1) <= width and max(y0, y1) <= height


def _share(holds: Iterable[bool]) -> float:
    """Share of true ones; 0 of none."""
    each = list(holds)
    return sum(each) / len(each) if each else 0.0
