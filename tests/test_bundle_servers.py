"""[[packs]] with `milvus`: the pack's texts and pictures lie in the bundle, its vectors on a server."""

import shutil

import pytest
from little_world import flag, write_little_pack
from tiny_encoder import write_tiny_encoder

from gog_edge.bundle import open_bundle
from gog_edge.config import MilvusConfig
from gog_edge.errors import BackendError, BundleError
from gog_edge.indexing.distribution.milvus_loading import load_export
from gog_edge.indexing.distribution.parquet_export import export_parquet
from gog_edge.planner import plan_memory
from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.retrieval.vectors.milvus import MilvusConnection
from gog_edge.runtime import pack_opener
from gog_edge.types import ImageQuery

TOML = """
schema = 1
name = "harbour"

[policy]
url = "http://10.0.0.2:8000/v1"
model = "gog-7b"
dialect = "gog"

[encoder]
path = "encoder"

[[packs]]
path = "packs/little"
milvus = "http://10.0.0.5:19530"
key_env = "MILVUS_KEY"
timeout_s = 2
"""


@pytest.fixture
def box(tmp_path):
    """A bundle whose pack came without vectors, and the pack as it was built."""
    encoder = Encoder.open(write_tiny_encoder(tmp_path / "box" / "encoder"), threads=1)
    write_little_pack(tmp_path / "whole", encoder)
    without = shutil.ignore_patterns("vectors", "index")
    shutil.copytree(tmp_path / "whole", tmp_path / "box" / "packs" / "little", ignore=without)
    (tmp_path / "box" / "bundle.toml").write_text(TOML)
    return tmp_path / "box", tmp_path / "whole"


def test_a_pack_may_be_searched_by_another(box):
    folder, whole = box
    bundle = open_bundle(folder)
    assert bundle.packs == (folder / "packs/little",)
    assert bundle.servers == {folder / "packs/little": MilvusConfig("http://10.0.0.5:19530", "MILVUS_KEY", 2.0)}
    bundle.verify(full=True)
    assert plan_memory(bundle).index == sum(path.stat().st_size for path in bundle.encoder.iterdir())
    (folder / "bundle.toml").write_text(TOML[: TOML.index("milvus")])
    with pytest.raises(BundleError, match="little: '(index|vectors)/.*' is missing"):
        open_bundle(folder).verify()
    next((folder / "packs/little/store").iterdir()).unlink()
    (folder / "bundle.toml").write_text(TOML)
    with pytest.raises(BundleError, match="little: 'store/000001.sqlite' is missing"):
        open_bundle(folder).verify()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"http://10.0.0.5:19530"', '"10.0.0.5:19530"', r"must be http:// or https://.*, got '10.0.0.5:19530'"),
        ('"http://10.0.0.5:19530"', '"http://root:Milvus@10.0.0.5"', "without user and query"),
        ('"http://10.0.0.5:19530"', '"file:///data/m.db"', "'milvus' must be .*, got 'file:"),
        ('"http://10.0.0.5:19530"', "19530", "'milvus' must be a string, got 19530"),
        ('"MILVUS_KEY"', "7", "'key_env' must be a string, got 7"),
        ("timeout_s = 2", "timeout_s = 0", "'timeout_s' must be greater than 0, got 0"),
        ("timeout_s = 2", "timeout_s = true", "'timeout_s' must be a finite number, got True"),
        ("timeout_s = 2", "retries = 2", r"unknown key 'retries'; known keys are path, milvus, key_env"),
        ('path = "packs/little"\n', "", r"requires the key 'path'"),
        ('milvus = "http://10.0.0.5:19530"\n', "", r"'key_env' requires 'milvus'"),
        ('milvus = "http://10.0.0.5:19530"\nkey_env = "MILVUS_KEY"\n', "", r"'timeout_s' requires 'milvus'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(box, old, new, words):
    assert old in TOML
    (box[0] / "bundle.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(BundleError, match=words):
        open_bundle(box[0])


def test_the_default_timeout_is_that_of_the_configuration(box):
    (box[0] / "bundle.toml").write_text(TOML.replace("timeout_s = 2", ""))
    (config,) = open_bundle(box[0]).servers.values()
    assert config == MilvusConfig("http://10.0.0.5:19530", "MILVUS_KEY")


def test_the_bundles_packs_are_opened_with_their_server(box):
    from milvus_lite.server_manager import server_manager_instance

    folder, whole = box
    (folder / "bundle.toml").write_text(TOML.replace("http://10.0.0.5:19530", "m.db").replace('key_env = "MILVUS_KEY"',
                                                                                             ""))
    bundle = open_bundle(folder)
    config = bundle.servers[bundle.packs[0]]
    assert config.uri == str(folder / "m.db")
    server = MilvusConnection.open(config)
    export_parquet(whole, folder / "export")
    load_export(folder / "export", server)
    packs = PackRegistry(bundle.packs, Encoder.open(bundle.encoder, threads=1), pack_opener(bundle))
    with packs.lease() as retriever:
        (result,) = retriever.search([ImageQuery(flag("Norway"))])
    assert result.evidence[0].titles == ("Norway", "Svalbard") and result.evidence[0].image.caption == "Flag of Norway"
    packs.close()
    server.close()
    server_manager_instance.release_server(config.uri)


def test_a_server_that_is_away_is_named(box):
    (box[0] / "bundle.toml").write_text(TOML.replace("10.0.0.5:19530", "127.0.0.1:9").replace(
        'key_env = "MILVUS_KEY"', ""))  # fmt: skip
    with pytest.raises(BackendError, match="the Milvus server at http://127.0.0.1:9 is not available"):
        pack_opener(open_bundle(box[0]))


def test_a_bundle_without_servers_opens_packs_as_ever(box):
    folder, whole = box
    (folder / "bundle.toml").write_text(TOML[: TOML.index("milvus")])
    shutil.rmtree(folder / "packs/little")
    shutil.copytree(whole, folder / "packs/little")
    bundle = open_bundle(folder)
    assert bundle.servers == {}
    packs = PackRegistry(bundle.packs, Encoder.open(bundle.encoder, threads=1), pack_opener(bundle))
    assert [state.generation for state in packs.states()] == [1]
    packs.close()
