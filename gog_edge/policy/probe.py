"""Find the dialect of an exported policy: generate turns in each dialect, count which parse and where boxes fall."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gog_edge.bundle import SAMPLES_FILE, read_samples
from gog_edge.errors import ArtifactError, BudgetExceeded, CheckpointError, InputError
from gog_edge.files import describe_files, write_json
from gog_edge.picture import SUFFIXES, Picture, decode_picture
from gog_edge.policy.base import Policy
from gog_edge.policy.decoding import SamplingParams
from gog_edge.policy.dialect.actions import BOX_FRAMES, ActionKind, BoxFrame, Corners, ShownImage, ShownImages
from gog_edge.policy.dialect.dialect import Dialect
from gog_edge.policy.dialect.loader import DIALECT_FILE, copy_dialect, load_dialect, shipped
from gog_edge.policy.dialect.tool_calls import ToolCallSyntax
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import MANIFEST, read_manifest
from gog_edge.policy.model import PolicyModel
from gog_edge.types import Size, Utterance

MIN_SHARE = 0.8  # more than this share of the turns must parse, and of the boxes be inside their image
MIN_MARKED = 0.25  # of the turns must use the dialect's delimiters: any text parses as a plain answer
TOLERANCE = 1.02  # boxes may extend beyond their image by this factor
MAX_TOKENS = 512  # of one turn; policies that think may need more
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
    own: bool = False  # the dialect of the policy folder


@dataclass(frozen=True, slots=True)
class DialectFinding:
    """The turns that a policy generated in one dialect."""

    candidate: Candidate
    turns: int = 0
    plain: int = 0  # answers without delimiters, which are no evidence for or against a dialect
    kinds: Mapping[ActionKind, int] = field(default_factory=dict)  # delimited actions that parsed
    boxes: tuple[tuple[Corners, ShownImage], ...] = ()  # as written, with the image that they refer to
    example: str = ""  # a turn that did not parse, else the first
    failure: str = ""  # why the dialect could not be tried

    @property
    def parsed(self) -> int:
        """Return the number of turns with a delimited action."""
        return sum(self.kinds.values())

    @property
    def share(self) -> float:
        """Return the share of turns that parsed, plain answers excluded."""
        counted = self.turns - self.plain
        return self.parsed / counted if counted else 0.0

    def inside(self, frame: BoxFrame) -> float:
        """Return the share of boxes that are inside their image when they are read in a coordinate frame."""
        return _share(_is_inside(corners, image, frame) for corners, image in self.boxes)

    @property
    def over_1000(self) -> float:
        """Return the share of boxes with a number above 1000."""
        return _share(max(corners) > 1000 for corners, _ in self.boxes)

    @property
    def over_resized(self) -> float:
        """Return the share of boxes outside the image as the policy sees it."""
        return _share(not _is_within(corners, image.extent("resized_px")) for corners, image in self.boxes)

    @property
    def below_1(self) -> float:
        """Return the share of boxes whose numbers are all at most 1."""
        return _share(max(corners) <= 1 for corners, _ in self.boxes)

    @property
    def box_frame(self) -> BoxFrame | None:
        """Return the coordinate frame of the boxes: that of the dialect, or the best one if the dialect is assumed."""
        dialect = self.candidate.dialect
        if not self.boxes or self.inside(dialect.box_frame) > MIN_SHARE:
            return dialect.box_frame
        best = max(BOX_FRAMES, key=self.inside)
        return best if dialect.assumed and self.inside(best) > MIN_SHARE else None

    @property
    def rejection(self) -> str:
        """Return why the dialect is rejected; "" if it fits."""
        if self.failure:
            return self.failure
        if self.share <= MIN_SHARE:
            return f"{self.share:.0%} of the turns parse"
        if self.parsed < MIN_MARKED * self.turns:
            return f"{self.parsed} of {self.turns} turns use its delimiters"
        if self.box_frame is None:
            return f"{self.inside(self.candidate.dialect.box_frame):.0%} of the boxes fit its frame"
        return ""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The findings of all dialects, in the order tried."""

    findings: tuple[DialectFinding, ...]

    @property
    def best(self) -> DialectFinding | None:
        """Return the finding with most parsed turns; ties go to the policy's own dialect, then to published ones."""
        fitting = [finding for finding in self.findings if not finding.rejection]
        order = {id(finding): _rank(finding) for finding in fitting}
        return max(fitting, key=lambda finding: order[id(finding)]) if fitting else None


def probe_folder(
    folder: Path, cases: Sequence[Case], candidates: Sequence[Candidate], *, threads: int | None = None,
    max_tokens: int = MAX_TOKENS, on_finding: Callable[[DialectFinding], None] | None = None,
) -> ProbeReport:
    """Probe an exported policy with greedy sampling and without a grammar.

    Raises:
        ArtifactError: the folder is not a valid policy folder.
        BackendError: the policy cannot run on this machine.
    """
    check_exported(folder)
    model = PolicyModel.open(folder, threads=threads)

    def open_policy(dialect: Dialect) -> LocalPolicy:
        return LocalPolicy(model, dialect, SamplingParams(), grammar=False)  # with a grammar every turn would parse

    found = []
    for finding in probe(cases, candidates, policy_of=open_policy, resized=model.vision.resized,
                         max_tokens=max_tokens):
        found.append(finding)
        if on_finding is not None:
            on_finding(finding)
    return ProbeReport(tuple(found))


def probe(cases: Sequence[Case], candidates: Sequence[Candidate], *, policy_of: Callable[[Dialect], Policy],
          resized: Callable[[Size], Size], max_tokens: int = MAX_TOKENS) -> Iterator[DialectFinding]:
    """Yield one finding for each candidate; `resized` maps a picture's size to that the policy sees."""
    for candidate in candidates:
        try:
            policy = policy_of(candidate.dialect)
            turns = [_first_turn(policy, case, max_tokens) for case in cases]
        except BudgetExceeded:
            yield DialectFinding(candidate, failure="its prompt does not fit the context")
        else:
            images = [ShownImages(case.picture.size, resized(case.picture.size)).picture for case in cases]
            yield _finding(candidate, turns, images)


def check_exported(folder: Path) -> None:
    """Raise an error with the remedy unless `folder` is a policy folder.

    Raises:
        CheckpointError: it is a checkpoint, which must be exported first.
        ArtifactError: it is something else.
    """
    if (folder / MANIFEST).is_file():
        return
    if (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is a checkpoint; export it first (gog-edge export policy "
                              f"{folder} OUT) and probe the exported policy")
    raise ArtifactError(f"'{folder}' is not a policy folder: it has no {MANIFEST}; name a folder that `gog-edge "
                        "export policy` wrote")


def candidates_for(folder: Path, named: Iterable[str | Path] = ()) -> tuple[Candidate, ...]:
    """Return the named dialects, by default that of the policy folder and all dialects of the package.

    Raises:
        DialectError: a dialect does not exist or cannot be used.
    """
    chosen = tuple(Candidate(source, load_dialect(source)) for source in named)
    if chosen:
        return tuple(dataclasses.replace(one, own=_is_own(one.dialect, folder)) for one in chosen)
    own = Candidate(folder / DIALECT_FILE, load_dialect(folder / DIALECT_FILE), own=True)
    others = (Candidate(name, load_dialect(name)) for name in shipped() if name != own.dialect.name)
    return own, *others


def read_cases(folder: Path) -> tuple[Case, ...]:
    """Return the samples of a bundle's samples folder, or general questions about each picture of another folder.

    Raises:
        InputError: the folder has no pictures, or one cannot be decoded.
        BundleError: the list of samples is not valid.
    """
    if (folder / SAMPLES_FILE).is_file():
        asked = [(sample.picture, sample.questions) for sample in read_samples(folder)]
    else:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        asked = [(path, QUESTIONS) for path in paths if path.suffix.lower() in SUFFIXES]
    if not asked:
        raise InputError(f"'{folder}' contains no pictures; name a folder with {', '.join(SUFFIXES)} files")
    pictures = [(decode_picture(path.read_bytes()), questions) for path, questions in asked]
    return tuple(Case(picture, question) for picture, questions in pictures for question in questions)


def write_dialect(folder: Path, finding: DialectFinding) -> Dialect:
    """Write a finding's dialect to the policy folder and update the manifest's hashes and box frame."""
    manifest = read_manifest(folder)
    dialect, written = copy_dialect(finding.candidate.source, folder, finding.box_frame)
    unchanged = [entry for entry in manifest.files if entry.path not in written]
    files = sorted([*unchanged, *describe_files(folder, written)], key=lambda entry: entry.path)
    changed = dataclasses.replace(manifest, box_frame=dialect.box_frame, files=tuple(files))
    write_json(folder / MANIFEST, changed.to_json())
    return dialect


def _first_turn(policy: Policy, case: Case, max_tokens: int) -> Utterance:
    conversation = policy.begin(case.picture, case.question)
    try:
        return conversation.generate(max_tokens=max_tokens, deadline=None)
    finally:
        conversation.close()


def _finding(candidate: Candidate, turns: Sequence[Utterance], images: Sequence[ShownImage]) -> DialectFinding:
    syntax = candidate.dialect.syntax
    kinds: Counter[ActionKind] = Counter()
    boxes, failed, plain = [], [], 0
    for turn, image in zip(turns, images, strict=True):
        if turn.action is None:
            failed.append(turn.text)
            continue
        raw = candidate.dialect.parse_raw(turn.text)
        if raw.kind == "answer" and isinstance(syntax, ToolCallSyntax) and syntax.answer is None:
            plain += 1
            continue
        kinds[raw.kind] += 1
        if raw.corners is not None:
            boxes.append((raw.corners, image))
    example = next(iter([*failed, *(turn.text for turn in turns)]), "")
    return DialectFinding(candidate, len(turns), plain, dict(kinds), tuple(boxes), example)


def _is_own(dialect: Dialect, folder: Path) -> bool:
    return (folder / DIALECT_FILE).is_file() and load_dialect(folder / DIALECT_FILE).name == dialect.name


def _rank(finding: DialectFinding) -> tuple[int, bool, bool, int]:
    candidate = finding.candidate
    return finding.parsed, candidate.own, not candidate.dialect.assumed, len(finding.boxes)


def _is_inside(corners: Corners, image: ShownImage, frame: BoxFrame) -> bool:
    """Return whether a box is inside its image; boxes with no number above 1 are fractions, never pixels."""
    return _is_within(corners, image.extent(frame)) and (frame == "rel1" or max(corners) > 1)


def _is_within(corners: Corners, extent: tuple[float, float]) -> bool:
    x0, y0, x1, y1 = corners
    width, height = extent[0] * TOLERANCE, extent[1] * TOLERANCE
    return min(corners) >= 0 and max(x0, x1) <= width and max(y0, y1) <= height


def _share(values: Iterable[bool]) -> float:
    """Return the share of true values; 0 without any."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
