"""[text_encoder] of a bundle: its packs are searched by vectors of paragraphs too, and its memory is planned."""

import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
from little_world import SNAPSHOT, articles, images
from tiny_text_encoder import DIM, write_tiny_text_encoder
from toy_bundle import write_toy_bundle

from gog_edge.bundle import open_bundle
from gog_edge.config import MilvusConfig
from gog_edge.engines.registry import CPU_SEARCH, FAISS_GPU
from gog_edge.errors import BundleError, PackError
from gog_edge.indexing.generation import PackWriter
from gog_edge.planner import ID_BYTES, plan_memory
from gog_edge.retrieval.manifest import read_manifest
from gog_edge.retrieval.text.encoder import TextEncoder
from gog_edge.retrieval.vectors.gpu_index import vectors_bytes
from gog_edge.runtime import open_packs
from gog_edge.types import TextQuery

TABLE = '[text_encoder]\npath = "text_encoder"\n'


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_encoder):
    """A text encoder, and a little pack that was built with it."""
    root = tmp_path_factory.mktemp("parts")
    text_encoder = TextEncoder.open(write_tiny_text_encoder(root / "text_encoder"))
    with PackWriter(root / "pack", name="little", snapshot=SNAPSHOT, encoder=tiny_encoder,
                    text_encoder=text_encoder) as writer:
        writer.add(articles(), images())
        writer.commit()
    return root


@pytest.fixture
def bundle(tmp_path, parts, tiny_encoder_folder):
    """A bundle without the table [text_encoder]; the folder is there."""
    shutil.copytree(parts / "text_encoder", tmp_path / "toy" / "text_encoder")
    return write_toy_bundle(tmp_path / "toy", tiny_encoder_folder, parts / "pack")


def with_table(bundle):
    where = bundle.root / "bundle.toml"
    where.write_text(where.read_text() + TABLE)
    return open_bundle(bundle.root)


def channels(bundle):
    """The channels that find evidence for a paraphrase."""
    with closing(open_packs(bundle, threads=1)) as packs, packs.lease() as retriever:
        (result,) = retriever.search([TextQuery("inhabitants", "")])
        return {rank.channel for one in result.evidence for rank in one.ranks}


def test_the_packs_are_searched_with_the_text_encoder(bundle):
    assert "text_to_paragraph" not in channels(bundle)
    complete = with_table(bundle)
    assert complete.text_encoder == bundle.root / "text_encoder"
    complete.verify(full=True)
    assert "text_to_paragraph" in channels(complete)


def test_another_text_encoder_is_refused(bundle):
    shutil.rmtree(bundle.root / "text_encoder")
    write_tiny_text_encoder(bundle.root / "text_encoder", seed=1)
    with pytest.raises(PackError, match="was built with the text encoder 'tiny'"):
        open_packs(with_table(bundle), threads=1)


def test_a_missing_or_altered_text_encoder_is_reported(bundle):
    complete = with_table(bundle)
    graph = bundle.root / "text_encoder" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"text_encoder.*model\.onnx"):
        complete.verify()
    shutil.rmtree(bundle.root / "text_encoder")
    with pytest.raises(BundleError, match=r"\[text_encoder\] 'path' = 'text_encoder' is not a folder"):
        open_bundle(bundle.root)


def test_the_plan_counts_the_text_encoder_and_its_index(bundle):
    plain = plan_memory(bundle)
    full = plan_memory(with_table(bundle))
    paragraphs = read_manifest(bundle.root / "pack").paragraphs
    index = (bundle.root / "pack" / paragraphs.index.path).stat().st_size + 44 * ID_BYTES
    folder = sum(path.stat().st_size for path in (bundle.root / "text_encoder").iterdir())
    assert full.index - plain.index == index + folder and full.switch - plain.switch == index


def test_the_plan_counts_paragraphs_on_a_gpu(bundle):
    plain, full = (plan_memory(one, search=FAISS_GPU) for one in (bundle, with_table(bundle)))
    assert full.vectors - plain.vectors == 2 * vectors_bytes(44, DIM)  # a second time for a new generation
    assert plan_memory(bundle, search=CPU_SEARCH).vectors == 0


def test_vectors_of_paragraphs_stay_here_if_a_server_has_the_others(bundle):
    complete = with_table(bundle)
    served = replace(complete, servers={complete.packs[0]: MilvusConfig("http://10.0.0.5:19530", "", 1.0)})
    for path in (bundle.root / "pack").glob("vectors/*-images-*"):
        path.unlink()
    served.verify()
    next((bundle.root / "pack").glob("vectors/*-paragraphs-*.npy")).unlink()
    with pytest.raises(BundleError, match="paragraphs"):
        served.verify()


def test_without_the_table_no_text_encoder_is_imported(bundle):
    code = (f"import sys; from pathlib import Path; from gog_edge.runtime import open_runtime; "
            f"open_runtime(Path({str(bundle.root)!r}), threads=1); "
            "print([name for name in sys.modules if name.endswith('text.encoder')])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
