"""The probe: the atlas policy speaks atlas, random weights speak nothing, and boxes tell their frame."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.cli import app
from gog_edge.errors import ArtifactError, BundleError, CheckpointError, DialectError, InputError
from gog_edge.picture import Picture
from gog_edge.policy.dialect.loader import load_dialect, shipped
from gog_edge.policy.local import LocalPolicy
from gog_edge.policy.manifest import read_manifest
from gog_edge.policy.probe import (
    Candidate,
    Case,
    Report,
    candidates_for,
    check_exported,
    probe,
    probe_folder,
    read_cases,
    write_dialect,
)
from gog_edge.policy.scripted import ScriptedPolicy
from gog_edge.types import Size

ATLAS = DEFAULT_BUNDLE / "policy"
SAMPLES = DEFAULT_BUNDLE / "samples"
SEEN = Size(1400, 1120)  # as scripted policies see a picture
QWEN = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s], "img_idx": 0}}</tool_call>'


@pytest.fixture(scope="module")
def cases():
    return read_cases(SAMPLES)[::3]


@pytest.fixture
def atlas(tmp_path):
    return shutil.copytree(ATLAS, tmp_path / "policy")


def run(*words):
    return CliRunner().invoke(app, ["probe", *map(str, words)])


def played(texts, *names, **changes):
    """The report of a policy that says one text for each picture, in whatever dialect."""
    cases = [Case(Picture(np.full((80, 100, 3), n, np.uint8)), "Which?") for n in range(len(texts))]
    said = {case.picture.sha256: text for case, text in zip(cases, texts, strict=True)}

    class Parrot(ScriptedPolicy):
        def begin(self, picture, question):
            self.texts = (said[picture.sha256],)
            return super().begin(picture, question)

    candidates = [Candidate(name, dataclasses.replace(load_dialect(name), **changes)) for name in names]
    findings = probe(cases, candidates, policy_of=lambda dialect: Parrot((), dialect), resized=lambda size: SEEN)
    return Report(tuple(findings))


# --- real policies ----------------------------------------------------------------------------


def test_the_atlas_policy_speaks_atlas(cases):
    report = probe_folder(ATLAS, cases, candidates_for(ATLAS), threads=1, max_tokens=96)
    best = report.best
    assert best is not None and best.candidate.dialect.name == "atlas" and best.candidate.own
    assert best.share > 0.8 and best.box_frame == "resized_px" and best.boxes and best.over_resized == 0
    others = {finding.candidate.dialect.name: finding for finding in report.findings}
    assert others.keys() == set(shipped())
    assert all(others[name].against for name in ("deepeyes", "mmsearch_r1", "qwen_agent", "sensenova_mars"))


def test_random_weights_speak_no_dialect(policies, cases):
    told = []
    report = probe_folder(policies[True], cases[:2], candidates_for(policies[True]), threads=1, max_tokens=24,
                          on_finding=told.append)
    assert report.best is None and tuple(told) == report.findings
    assert all(finding.against for finding in report.findings)


def test_a_prompt_that_does_not_fit_is_no_dialect(policies, cases, tmp_path):
    path = tmp_path / "long.toml"
    text = (ATLAS / "dialect.toml").read_text()
    path.write_text(text.replace('"Look, search, answer."', '"' + "Look. " * 2000 + '"'))
    (finding,) = probe_folder(policies[True], cases[:1], candidates_for(policies[True], [path]), threads=1).findings
    assert "does not fit" in finding.against


# --- what is counted --------------------------------------------------------------------------


def test_kinds_are_counted_and_one_that_failed_is_shown():
    texts = ["<answer>a</answer>", "<text_search>b</text_search>", "<img_search>[1,2,30,40]</img_search>", "hm",
             "<img_search><img></img_search>"]
    (finding,) = played(texts, "gog").findings
    assert finding.kinds == {"answer": 1, "text_search": 1, "gaze_search": 1, "image_search": 1}
    assert (finding.parsed, finding.turns, finding.plain, finding.example) == (4, 5, 0, "hm")
    assert finding.against == "80% parses"  # more than that is asked for
    assert played([*texts, texts[0]], "gog").best is not None


@pytest.mark.parametrize(
    ("boxes", "frame"),
    [
        (["0, 0, 1390, 1100", "10, 10, 200, 300"], "resized_px"),
        (["10, 10, 100, 90", "10, 10, 80, 60"], "resized_px"),  # fits more than one: the dialect's own
        (["0.1, 0, 0.5, 0.7", "0, 0, 1, 1"], "rel1"),
        (["10, 10, 1800, 200", "10, 10, 1800, 300"], None),
        (["-10, -20, 100, 200", "-1, 0, 5, 5"], None),
    ],
)
def test_boxes_tell_their_frame_where_the_dialect_only_assumes_one(boxes, frame):
    texts = [f"<img_search>[{box}]</img_search>" for box in boxes]
    (finding,) = played(texts, "gog").findings
    assert finding.box_frame == frame and (finding.against == "") == (frame is not None)
    (sure,) = played(texts, "gog", assumed=False).findings
    assert sure.box_frame == (frame if frame == "resized_px" else None)


def test_boxes_of_a_thousandth_leave_a_small_picture(monkeypatch):
    monkeypatch.setitem(globals(), "SEEN", Size(504, 252))
    texts = [f"<img_search>[{n}, 100, {n + 400}, 990]</img_search>" for n in range(500, 600, 20)]
    (finding,) = played(texts, "gog").findings
    assert finding.box_frame == "rel1000"
    assert (finding.over_resized, finding.over_1000, finding.below_1) == (1, 0, 0)


def test_plain_answers_prove_nothing():
    assert played(["I see a flag."] * 8, "qwen_agent").best is None
    calls = [QWEN % "1, 2, 300, 400"] * 2
    (finding,) = played([*calls, *["A flag."] * 6], "qwen_agent").findings
    assert (finding.plain, finding.parsed, finding.against) == (6, 2, "")
    (finding,) = played([*calls, *["A flag."] * 7], "qwen_agent").findings
    assert finding.against == "2 of 9 turns use its marks"


def test_the_dialect_that_parses_most_is_chosen_then_the_surer_one():
    texts = [QWEN % "1, 2, 300, 400", "<answer>a</answer>"]
    assert played(texts, *shipped()).best.candidate.dialect.name == "deepeyes"  # it has both, and no plain answers
    answers = ["<answer>a</answer>"] * 3
    best = played(answers, "gog", "mmsearch_r1").best
    assert best.candidate.dialect.name == "mmsearch_r1"  # gog is only assumed
    assert played([], "gog").best is None


# --- pictures, candidates ---------------------------------------------------------------------


def test_samples_have_their_questions_and_a_plain_folder_general_ones(tmp_path):
    listing = json.loads((SAMPLES / "samples.json").read_text())
    assert len(read_cases(SAMPLES)) == sum(len(entry["questions"]) for entry in listing)
    Image.new("RGB", (40, 30)).save(tmp_path / "b.PNG")
    Image.new("RGB", (50, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    cases = read_cases(tmp_path)
    assert [case.picture.size.width for case in cases] == [50, 50, 40, 40]
    assert len({case.question for case in cases}) == 2


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_a_folder_without_pictures_is_refused(tmp_path, make):
    make(tmp_path / "pictures")
    with pytest.raises(InputError, match="holds no pictures"):
        read_cases(tmp_path / "pictures")


def test_bad_pictures_and_listings_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError):
        read_cases(tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(BundleError, match=r"samples\.json"):
        read_cases(tmp_path)


def test_candidates(tmp_path):
    names = [candidate.dialect.name for candidate in candidates_for(ATLAS)]
    assert names[0] == "atlas" and sorted(names) == list(shipped())
    one, two = candidates_for(ATLAS, ["gog", ATLAS / "dialect.toml"])
    assert (one.own, two.own) == (False, True)
    with pytest.raises(DialectError, match="latin"):
        candidates_for(ATLAS, ["latin"])


def test_what_is_no_policy_folder_is_told_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="no policy folder"):
        check_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"export it first \(python -m export.export_policy"):
        check_exported(tmp_path)


# --- writing ----------------------------------------------------------------------------------


def test_the_dialect_found_is_written_and_the_policy_opens_with_it(atlas):
    texts = ["<img_search>[0.1, 0, 0.5, 0.7]</img_search>"] * 3
    (finding,) = played(texts, "gog").findings
    before = read_manifest(atlas)
    write_dialect(atlas, finding)
    manifest = read_manifest(atlas, full=True)
    dialect = LocalPolicy.open(atlas, 1).dialect
    assert (dialect.name, dialect.box_frame, manifest.box_frame) == ("gog", "rel1", "rel1")
    assert [entry.path for entry in manifest.files] == [entry.path for entry in before.files]
    changed = [new.path for old, new in zip(before.files, manifest.files, strict=True) if old != new]
    assert changed == ["dialect.toml"]
    assert dataclasses.replace(manifest, files=(), box_frame="") == dataclasses.replace(before, files=(), box_frame="")


def test_prompts_beside_a_dialect_are_written_with_it(atlas, tmp_path):
    text = (ATLAS / "dialect.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('system = "Look, search, answer."', 'system_file = "mine.txt"'))
    (tmp_path / "mine.txt").write_text("Look.")
    candidate = Candidate(tmp_path / "mine.toml", load_dialect(tmp_path / "mine.toml"))
    (finding,) = played(["<answer>a</answer>"], "atlas").findings
    write_dialect(atlas, dataclasses.replace(finding, candidate=candidate))
    assert "mine.txt" in [entry.path for entry in read_manifest(atlas, full=True).files]
    assert LocalPolicy.open(atlas, 1).dialect.system_prompt == "Look."


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """One sample picture with its questions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    entry = json.loads((SAMPLES / "samples.json").read_text())[0]
    shutil.copy(SAMPLES / entry["picture"], folder)
    (folder / "samples.json").write_text(json.dumps([entry]))
    return folder


def test_the_command_tells_and_writes(atlas, pictures):
    before = (atlas / "dialect.toml").read_bytes()
    shutil.copy(ATLAS.parents[2] / "policy" / "dialect" / "gog.toml", atlas / "dialect.toml")  # the wrong one
    assert run(atlas, "--pictures", pictures).exit_code == 2  # its hash is not the manifest's
    (atlas / "dialect.toml").write_bytes(before)
    done = run(atlas, "--pictures", pictures, "--dialect", "atlas", "--dialect", "mmsearch_r1", "--write",
               "--threads", "1", "--tokens", "96")
    assert done.exit_code == 0, done.output
    assert "It speaks atlas, boxes in resized_px" in done.stdout and "Written" in done.stdout
    assert (atlas / "dialect.toml").read_bytes() == before
    read_manifest(atlas, full=True)


def test_the_command_refuses_where_nothing_fits(atlas, pictures):
    manifest = (atlas / "manifest.json").read_bytes()
    done = run(atlas, "--pictures", pictures, "--dialect", "qwen_agent", "--write", "--threads", "1", "--tokens", "64")
    assert done.exit_code == 1, done.output
    assert "No dialect fits" in done.stdout and "it said, for example" in done.stdout
    assert (atlas / "manifest.json").read_bytes() == manifest


def test_the_command_s_errors_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for words, said in (
        ((tmp_path / "none",), "no policy folder"),
        ((tmp_path,), "export it first"),
        ((ATLAS, "--dialect", "latin"), "no dialect is named 'latin'"),
        ((ATLAS, "--dialect", "latin.toml"), "cannot be read"),
        ((ATLAS, "--pictures", tmp_path), "holds no pictures"),
    ):
        done = run(*words)
        assert done.exit_code == 2, done.output
        assert said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
