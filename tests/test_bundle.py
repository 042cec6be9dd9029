"""A bundle opens when everything it names is there; otherwise the message names the file and the key."""

import json

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import Budget, Limits
from gog_edge.errors import BundleError, QuestionError
from gog_edge.files import describe_files, write_json

TOML = """
schema = 1
name = "harbour"

[policy]
path = "policy"

[encoder]
path = "encoder"

[[packs]]
path = "packs/ships"

[limits]
turns = 4
deadline_ms = 5000
picture_pixels = 1000

[samples]
path = "samples"
"""


@pytest.fixture
def folder(tmp_path):
    for part, manifest in [("policy", "manifest"), ("encoder", "manifest"), ("packs/ships", "MANIFEST")]:
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "weights.bin").write_bytes(part.encode())
        entries = [entry.to_json() for entry in describe_files(tmp_path / part, ["weights.bin"])]
        write_json(tmp_path / part / f"{manifest}.json", {"schema": 1, "files": entries})
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "quay.jpg").write_bytes(b"picture")
    samples = [{"picture": "quay.jpg", "title": "At the quay", "questions": ["Whose flag is on the left?"]}]
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(samples))
    (tmp_path / "bundle.toml").write_text(TOML)
    return tmp_path


def test_a_bundle_names_its_parts_and_limits(folder):
    bundle = open_bundle(folder)
    assert bundle.name == "harbour"
    assert (bundle.policy, bundle.encoder) == (folder / "policy", folder / "encoder")
    assert bundle.packs == (folder / "packs/ships",)
    assert bundle.limits.budget == Budget(turns=4, deadline_ms=5000)
    assert bundle.limits.picture.max_pixels == 1000
    assert bundle.limits.question_chars == Limits().question_chars
    assert [sample.title for sample in bundle.samples] == ["At the quay"]
    assert bundle.samples[0].picture.read_bytes() == b"picture"
    bundle.verify(full=True)


def test_limits_and_samples_may_be_left_out(folder):
    (folder / "bundle.toml").write_text(TOML[: TOML.index("[limits]")])
    bundle = open_bundle(folder)
    assert bundle.limits == Limits()
    assert bundle.samples == ()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("schema = 1", "schema = 2", "schema = 2"),
        ("schema = 1", "", "schema = None"),
        ('name = "harbour"', "", "'name' is missing"),
        ('name = "harbour"', "name = 3", "'name'.* 3"),
        ('name = "harbour"', 'name = "h"\ncolour = "red"', "unknown key 'colour'"),
        ("[policy]\npath", "[policy]\nfile", r"unknown key \[policy\] 'file'"),
        ('[policy]\npath = "policy"', "", r"\[policy\] is missing"),
        ('path = "policy"', 'path = "elsewhere"', "'elsewhere' is no folder"),
        ('path = "policy"', 'path = "../.."', "outside the bundle"),
        ('path = "policy"', 'path = "samples"', "there is no .*manifest.json"),
        ('[[packs]]\npath = "packs/ships"', "", r"\[\[packs\]\] is missing"),
        ('path = "packs/ships"', 'path = "packs/trains"', "packs/trains"),
        ("turns = 4", "turn = 4", r"unknown key 'turn' in \[limits\]; known are turns,"),
        ("turns = 4", "turns = 0", "turns = 0 is no positive whole number"),
        ("turns = 4", "turns = true", "turns = True"),
        ("turns = 4", 'turns = "4"', "turns = '4'"),
        ("schema = 1", "schema = ", "not TOML"),
    ],
)
def test_what_is_wrong_is_named(folder, old, new, words):
    assert old in TOML
    (folder / "bundle.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(folder)
    assert "bundle.toml" in str(caught.value)


def test_a_folder_without_bundle_toml(tmp_path):
    with pytest.raises(BundleError, match="there is no .*bundle.toml"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="there is no .*bundle.toml"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ("{}", "no list"),
        ("[", "cannot be read"),
        ('["quay.jpg"]', "no table"),
        ('[{"picture": "gone.jpg", "title": "t", "questions": []}]', "gone.jpg"),
        ('[{"picture": "quay.jpg", "questions": []}]', "'title' is missing"),
        ('[{"picture": "quay.jpg", "title": "t", "questions": "why"}]', "'questions' of 'quay.jpg'"),
    ],
)
def test_wrong_samples_are_named(folder, samples, words):
    (folder / "samples" / "samples.json").write_text(samples)
    with pytest.raises(BundleError, match=words):
        open_bundle(folder)


def test_verify_finds_what_is_altered_missing_or_unlisted(folder):
    bundle = open_bundle(folder)
    (folder / "encoder" / "weights.bin").write_bytes(b"encodeR")
    with pytest.raises(BundleError, match="harbour.*encoder.*altered"):
        bundle.verify()
    (folder / "encoder" / "weights.bin").unlink()
    with pytest.raises(BundleError, match="missing"):
        bundle.verify(full=False)
    write_json(folder / "encoder" / "manifest.json", {"schema": 1})
    with pytest.raises(BundleError, match="no list 'files'"):
        bundle.verify()


def test_the_default_bundle_is_whole():
    open_bundle(DEFAULT_BUNDLE).verify(full=True)


@pytest.mark.parametrize(
    ("question", "words"),
    [("", "empty"), (" \n\t ", "empty"), ("x" * 2001, "2001 characters"), ("a\x00b", "x00"), ("\ud800", "ud800")],
)
def test_what_is_no_question(question, words):
    with pytest.raises(QuestionError, match=words):
        Limits().check_question(question)


def test_a_question_is_kept_as_asked():
    assert Limits().check_question("  Wessen Fahne? 旗は? <|im_end|>\n") == "Wessen Fahne? 旗は? <|im_end|>"
