"""The probe: it finds the dialect of the atlas policy, none for random weights, and the coordinate frame of boxes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scripted_policy import ScriptedPolicy
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
    ProbeReport,
    candidates_for,
    check_exported,
    probe,
    probe_folder,
    read_cases,
    write_dialect,
)
from gog_edge.types import Size

ATLAS = DEFAULT_BUNDLE / "policy"
SAMPLES = DEFAULT_BUNDLE / "samples"
SEEN = Size(1400, 1120)  # size of the picture as scripted policies see it
QWEN = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [%s], "img_idx": 0}}</tool_call>'


@pytest.fixture(scope="module")
def cases():
    return read_cases(SAMPLES)[::3]


@pytest.fixture
def atlas(tmp_path):
    return shutil.copytree(ATLAS, tmp_path / "policy")


def run(*words):
    return CliRunner().invoke(app, ["probe", *map(str, words)])


def probe_texts(texts, *names, **changes):
    """Return the report for a policy that generates one text per picture, in every dialect."""
    cases = [Case(Picture(np.full((80, 100, 3), n, np.uint8)), "Which?") for n in range(len(texts))]
    text_of = {case.picture.sha256: text for case, text in zip(cases, texts, strict=True)}

    class FixedTexts(ScriptedPolicy):
        def begin(self, picture, question):
            self.texts = (text_of[picture.sha256],)
            return super().begin(picture, question)

    candidates = [Candidate(name, dataclasses.replace(load_dialect(name), **changes)) for name in names]
    findings = probe(cases, candidates, policy_of=lambda dialect: FixedTexts((), dialect), resized=lambda size: SEEN)
    return ProbeReport(tuple(findings))


# --- real policies ----------------------------------------------------------------------------


def test_the_dialect_of_the_atlas_policy_is_found(cases):
    report = probe_folder(ATLAS, cases, candidates_for(ATLAS), threads=1, max_tokens=96)
    best = report.best
    assert best is not None and best.candidate.dialect.name == "atlas" and best.candidate.own
    assert best.share > 0.8 and best.box_frame == "resized_px" and best.boxes and best.over_resized == 0
    others = {finding.candidate.dialect.name: finding for finding in report.findings}
    assert others.keys() == set(shipped())
    assert all(others[name].rejection for name in ("deepeyes", "mmsearch_r1", "qwen_agent", "sensenova_mars"))


def test_random_weights_have_no_dialect(policies, cases):
    reported = []
    report = probe_folder(policies[True], cases[:2], candidates_for(policies[True]), threads=1, max_tokens=24,
                          on_finding=reported.append)
    assert report.best is None and tuple(reported) == report.findings
    assert all(finding.rejection for finding in report.findings)


def test_a_prompt_longer_than_the_context_is_rejected(policies, cases, tmp_path):
    path = tmp_path / "long.toml"
    text = (ATLAS / "dialect.toml").read_text()
    path.write_text(text.replace('"Look, search, answer."', '"' + "Look. " * 2000 + '"'))
    (finding,) = probe_folder(policies[True], cases[:1], candidates_for(policies[True], [path]), threads=1).findings
    assert "does not fit" in finding.rejection


# --- counts --------------------------------------------------------------------------


def test_actions_are_counted_by_kind_with_a_malformed_example():
    texts = ["<answer>a</answer>", "<text_search>b</text_search>", "<img_search>[1,2,30,40]</img_search>", "hm",
             "<img_search><img></img_search>"]
    (finding,) = probe_texts(texts, "gog").findings
    assert finding.kinds == {"answer": 1, "text_search": 1, "gaze_search": 1, "image_search": 1}
    assert (finding.parsed, finding.turns, finding.plain, finding.example) == (4, 5, 0, "hm")
    assert finding.rejection == "80% of the turns parse"  # more than that is required
    assert probe_texts([*texts, texts[0]], "gog").best is not None


@pytest.mark.parametrize(
    ("boxes", "frame"),
    [
        (["0, 0, 1390, 1100", "10, 10, 200, 300"], "resized_px"),
        (["10, 10, 100, 90", "10, 10, 80, 60"], "resized_px"),  # several frames fit: that of the dialect
        (["0.1, 0, 0.5, 0.7", "0, 0, 1, 1"], "rel1"),
        (["10, 10, 1800, 200", "10, 10, 1800, 300"], None),
        (["-10, -20, 100, 200", "-1, 0, 5, 5"], None),
    ],
)
def test_the_frame_of_an_assumed_dialect_is_found_from_its_boxes(boxes, frame):
    texts = [f"<img_search>[{box}]</img_search>" for box in boxes]
    (finding,) = probe_texts(texts, "gog").findings
    assert finding.box_frame == frame and (finding.rejection == "") == (frame is not None)
    (published,) = probe_texts(texts, "gog", assumed=False).findings
    assert published.box_frame == (frame if frame == "resized_px" else None)


def test_boxes_in_thousandths_are_outside_a_small_picture(monkeypatch):
    monkeypatch.setitem(globals(), "SEEN", Size(504, 252))
    texts = [f"<img_search>[{n}, 100, {n + 400}, 990]</img_search>" for n in range(500, 600, 20)]
    (finding,) = probe_texts(texts, "gog").findings
    assert finding.box_frame == "rel1000"
    assert (finding.over_resized, finding.over_1000, finding.below_1) == (1, 0, 0)


def test_plain_answers_are_no_evidence():
    assert probe_texts(["I see a flag."] * 8, "qwen_agent").best is None
    calls = [QWEN % "1, 2, 300, 400"] * 2
    (finding,) = probe_texts([*calls, *["A flag."] * 6], "qwen_agent").findings
    assert (finding.plain, finding.parsed, finding.rejection) == (6, 2, "")
    (finding,) = probe_texts([*calls, *["A flag."] * 7], "qwen_agent").findings
    assert finding.rejection == "2 of 9 turns use its delimiters"


def test_the_dialect_with_most_parsed_turns_is_best_then_the_published_one():
    texts = [QWEN % "1, 2, 300, 400", "<answer>a</answer>"]
    assert probe_texts(texts, *shipped()).best.candidate.dialect.name == "deepeyes"  # both kinds, no plain answers
    answers = ["<answer>a</answer>"] * 3
    best = probe_texts(answers, "gog", "mmsearch_r1").best
    assert best.candidate.dialect.name == "mmsearch_r1"  # gog is only assumed
    assert probe_texts([], "gog").best is None


# --- pictures, candidates ---------------------------------------------------------------------


def test_samples_have_their_own_questions_and_other_pictures_general_ones(tmp_path):
    listing = json.loads((SAMPLES / "samples.json").read_text())
    assert len(read_cases(SAMPLES)) == sum(len(entry["questions"]) for entry in listing)
    Image.new("RGB", (40, 30)).save(tmp_path / "b.PNG")
    Image.new("RGB", (50, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    cases = read_cases(tmp_path)
    assert [case.picture.size.width for case in cases] == [50, 50, 40, 40]
    assert len({case.question for case in cases}) == 2


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_a_folder_without_pictures_is_rejected(tmp_path, make):
    make(tmp_path / "pictures")
    with pytest.raises(InputError, match="contains no pictures"):
        read_cases(tmp_path / "pictures")


def test_invalid_pictures_and_sample_lists_are_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError):
        read_cases(tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(BundleError, match=r"samples\.json"):
        read_cases(tmp_path)


def test_candidates_are_the_named_dialects_or_all(tmp_path):
    names = [candidate.dialect.name for candidate in candidates_for(ATLAS)]
    assert names[0] == "atlas" and sorted(names) == list(shipped())
    one, two = candidates_for(ATLAS, ["gog", ATLAS / "dialect.toml"])
    assert (one.own, two.own) == (False, True)
    with pytest.raises(DialectError, match="latin"):
        candidates_for(ATLAS, ["latin"])


def test_other_folders_are_rejected_with_the_remedy(tmp_path):
    with pytest.raises(ArtifactError, match="is not a policy folder"):
        check_exported(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"export it first \(gog-edge export policy"):
        check_exported(tmp_path)


# --- writing ----------------------------------------------------------------------------------


def test_the_dialect_found_is_written_to_the_policy_folder(atlas):
    texts = ["<img_search>[0.1, 0, 0.5, 0.7]</img_search>"] * 3
    (finding,) = probe_texts(texts, "gog").findings
    before = read_manifest(atlas)
    write_dialect(atlas, finding)
    manifest = read_manifest(atlas, full=True)
    dialect = LocalPolicy.open(atlas, 1).dialect
    assert (dialect.name, dialect.box_frame, manifest.box_frame) == ("gog", "rel1", "rel1")
    assert [entry.path for entry in manifest.files] == [entry.path for entry in before.files]
    changed = [new.path for old, new in zip(before.files, manifest.files, strict=True) if old != new]
    assert changed == ["dialect.toml"]
    assert dataclasses.replace(manifest, files=(), box_frame="") == dataclasses.replace(before, files=(), box_frame="")


def test_prompt_files_are_written_with_the_dialect(atlas, tmp_path):
    text = (ATLAS / "dialect.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace('system = "Look, search, answer."', 'system_file = "mine.txt"'))
    (tmp_path / "mine.txt").write_text("Look.")
    candidate = Candidate(tmp_path / "mine.toml", load_dialect(tmp_path / "mine.toml"))
    (finding,) = probe_texts(["<answer>a</answer>"], "atlas").findings
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


def test_the_command_reports_and_writes_the_dialect(atlas, pictures):
    before = (atlas / "dialect.toml").read_bytes()
    shutil.copy(ATLAS.parents[2] / "policy" / "dialect" / "gog.toml", atlas / "dialect.toml")  # the wrong one
    assert run(atlas, "--pictures", pictures).exit_code == 1  # its hash differs from the manifest
    (atlas / "dialect.toml").write_bytes(before)
    done = run(atlas, "--pictures", pictures, "--dialect", "atlas", "--dialect", "mmsearch_r1", "--write",
               "--threads", "1", "--tokens", "96")
    assert done.exit_code == 0, done.output
    assert "The dialect is atlas, boxes in resized_px" in done.stdout and "Written" in done.stdout
    assert (atlas / "dialect.toml").read_bytes() == before
    read_manifest(atlas, full=True)


def test_the_command_fails_if_no_dialect_fits(atlas, pictures):
    manifest = (atlas / "manifest.json").read_bytes()
    done = run(atlas, "--pictures", pictures, "--dialect", "qwen_agent", "--write", "--threads", "1", "--tokens", "64")
    assert done.exit_code == 1, done.output
    assert "No dialect fits" in done.stdout and "the policy wrote, for example" in done.stdout
    assert (atlas / "manifest.json").read_bytes() == manifest


def test_errors_of_the_command_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for words, code, message in (
        ((tmp_path / "none",), 1, "is not a policy folder"),
        ((tmp_path,), 1, "export it first"),
        ((ATLAS, "--dialect", "latin"), 1, "unknown dialect 'latin'"),
        ((ATLAS, "--dialect", "latin.toml"), 1, "cannot be read"),
        ((ATLAS, "--pictures", tmp_path), 2, "contains no pictures"),
    ):
        done = run(*words)
        assert done.exit_code == code, done.output
        assert message in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
