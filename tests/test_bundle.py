"""A bundle opens when everything it names is there; otherwise the message names the file and the key."""

import json
import subprocess
import sys

import pytest

from gog_edge.bundle import DEFAULT_BUNDLE, open_bundle
from gog_edge.config import Limits, RemoteConfig
from gog_edge.errors import BundleError
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
    assert bundle.limits == Limits(turns=4, deadline_ms=5000, picture_pixels=1000)
    assert [sample.title for sample in bundle.samples] == ["At the quay"]
    assert bundle.samples[0].picture.read_bytes() == b"picture"
    bundle.verify(full=True)


REMOTE = TOML.replace('path = "policy"', """url = "http://10.0.0.2:8000/v1"
model = "gog-7b"
dialect = "gog"
""")


def test_a_policy_may_be_another_servers(folder):
    (folder / "bundle.toml").write_text(REMOTE.replace('"gog"\n', '"gog"\ncontinues = "vllm"\nread_s = 20\n'))
    bundle = open_bundle(folder)
    assert bundle.policy == RemoteConfig("http://10.0.0.2:8000/v1", "gog-7b", "gog", continues="vllm", read_s=20)
    assert [manifest.parent.name for manifest in bundle.manifests] == ["encoder", "ships"]
    bundle.verify()


def test_the_dialect_of_a_remote_policy_may_be_a_file_of_the_bundle(folder):
    (folder / "bundle.toml").write_text(REMOTE.replace('"gog"', '"spoken.toml"'))
    with pytest.raises(BundleError, match=r"'dialect' = 'spoken.toml' does not exist"):
        open_bundle(folder)
    (folder / "spoken.toml").write_text("")
    assert open_bundle(folder).policy.dialect == folder / "spoken.toml"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"http://10.0.0.2:8000/v1"', '"10.0.0.2:8000"', "'url' must be http.*, got '10.0.0.2:8000'"),
        ('"http://10.0.0.2:8000/v1"', '"file:///etc"', "'url' must be http.*, got 'file"),
        ('"http://10.0.0.2:8000/v1"', '"http://me:key@host/v1"', "without user and query"),
        ('"http://10.0.0.2:8000/v1"', '"http://host/v1?key=1"', "without user and query"),
        ('"http://10.0.0.2:8000/v1"', '"http://host:99999/v1"', "'url'"),
        ('"http://10.0.0.2:8000/v1"', '"http://[::1/v1"', "'url'"),
        ('"http://10.0.0.2:8000/v1"', "8000", "'url' must be a string, got 8000"),
        ('model = "gog-7b"', "", "requires the key 'model'"),
        ('model = "gog-7b"', 'model = ""', "'model' must be a non-empty string"),
        ('dialect = "gog"', "", "requires the key 'dialect'"),
        ('dialect = "gog"', 'dialect = "../gog.toml"', "outside its own folder"),
        ('dialect = "gog"', 'dialect = "gog"\npath = "policy"', "unknown key 'path'; known keys are url"),
        ('dialect = "gog"', 'dialect = "gog"\ncontinues = "always"', "must be one of 'vllm', .*, got 'always'"),
        ('dialect = "gog"', 'dialect = "gog"\npicture = "gif"', "'picture' must be one of .*, got 'gif'"),
        ('dialect = "gog"', 'dialect = "gog"\nfactor = 0', "'factor' must be at least 1, got 0"),
        ('dialect = "gog"', 'dialect = "gog"\nmax_pixels = 3000', "'max_pixels' must be at least .* 3136, got 3000"),
        ('dialect = "gog"', 'dialect = "gog"\nretries = true', "'retries' must be an integer, got True"),
        ('dialect = "gog"', 'dialect = "gog"\nretries = -1', "'retries' must be at least 0, got -1"),
        ('dialect = "gog"', 'dialect = "gog"\nread_s = 0', "'read_s' must be greater than 0, got 0"),
        ('dialect = "gog"', 'dialect = "gog"\nread_s = inf', "'read_s' must be a finite number, got inf"),
        ('dialect = "gog"', 'dialect = "gog"\ntemperature = -0.1', "'temperature' must be at least 0, got -0.1"),
        ('dialect = "gog"', 'dialect = "gog"\ntop_p = 0', "'top_p' must be greater than 0, got 0"),
        ('dialect = "gog"', 'dialect = "gog"\noptions = 3', "'options' must be a table, got 3"),
        ('dialect = "gog"', 'dialect = "gog"\noptions = { messages = 1 }', "must not set messages"),
        ('dialect = "gog"', 'dialect = "gog"\noptions = { day = 2026-01-01 }', "must contain JSON values only"),
    ],
)
def test_what_is_wrong_with_a_remote_policy_is_named(folder, old, new, words):
    assert old in REMOTE
    (folder / "bundle.toml").write_text(REMOTE.replace(old, new, 1))
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(folder)
    assert "bundle.toml" in str(caught.value)


def test_a_remote_policy_needs_the_http_client(folder):
    (folder / "bundle.toml").write_text(REMOTE)
    code = """if True:
        import sys
        from pathlib import Path
        sys.modules["httpx"] = None
        from gog_edge.bundle import open_bundle
        from gog_edge.errors import BackendError
        from gog_edge.runtime import open_policy
        try:
            open_policy(open_bundle(Path(sys.argv[1])), threads=1)
        except BackendError as exc:
            print(exc)
    """
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert "'harbour' names a policy at http://10.0.0.2:8000/v1" in done.stdout
    assert "pip install 'gog_edge[remote]'" in done.stdout


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
        ('name = "harbour"', "", "requires the key 'name'"),
        ('name = "harbour"', "name = 3", "'name' must be a string, got 3"),
        ('name = "harbour"', 'name = "h"\ncolour = "red"', "unknown key 'colour'"),
        ("[policy]\npath", "[policy]\nfile", r"\[policy\] has an unknown key 'file'"),
        ('[policy]\npath = "policy"', "", r"requires the key 'policy'"),
        ('path = "policy"', 'path = "elsewhere"', "'elsewhere' is not a folder"),
        ('path = "policy"', 'path = "../.."', "outside its own folder"),
        ('path = "policy"', 'path = "a\\u0000b"', "contains a NUL character"),
        ('path = "policy"', 'path = "samples"', "manifest.json' does not exist"),
        ('[[packs]]\npath = "packs/ships"', "", r"requires the key 'packs'"),
        ('path = "packs/ships"', 'path = "packs/trains"', "packs/trains"),
        ("turns = 4", "turn = 4", r"\[limits\] has an unknown key 'turn'; known keys are turns,"),
        ("turns = 4", "turns = 0", "'turns' must be at least 1, got 0"),
        ("turns = 4", "turns = true", "'turns' must be an integer, got True"),
        ("turns = 4", 'turns = "4"', "'turns' must be an integer, got '4'"),
        ("schema = 1", "schema = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(folder, old, new, words):
    assert old in TOML
    (folder / "bundle.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(folder)
    assert "bundle.toml" in str(caught.value)


def test_a_folder_without_bundle_toml(tmp_path):
    with pytest.raises(BundleError, match="bundle.toml' does not exist"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="bundle.toml' does not exist"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ("{}", "must contain a JSON list, got a dict"),
        ("[", "is not JSON"),
        ('["quay.jpg"]', "must be a table"),
        ('[{"picture": "gone.jpg", "title": "t", "questions": []}]', "gone.jpg"),
        ('[{"picture": "quay.jpg", "questions": []}]', "requires the key 'title'"),
        ('[{"picture": "quay.jpg", "title": "t", "questions": "why"}]', "'questions' must be a list, got 'why'"),
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
    with pytest.raises(BundleError, match="must have a list 'files'"):
        bundle.verify()


def test_the_default_bundle_is_whole():
    open_bundle(DEFAULT_BUNDLE).verify(full=True)

