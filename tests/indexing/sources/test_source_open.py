"""What kind a path is; and every kind is parsed by other processes just so."""

import gzip
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import test_source_encyclopedic_vqa as evqa
import test_source_mediawiki as mediawiki
import test_source_wiki6m as wiki6m
import test_source_wit as wit
from reading import Read
from zim_world import picture, write_world

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.open import KINDS, kind_of, open_source


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A little of every kind, by kind."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "pictures").mkdir()
    (folder / "wit").mkdir()
    for number in range(3):
        (folder / "pictures" / f"Thing_{number}.png").write_bytes(picture(number, "PNG"))
    return {
        "zim": write_world(folder / "a.zim", 30),
        "wit": wit.write_rows(folder / "wit" / "wit_v1.train.tsv.gz", [wit.row(n, n) for n in range(30)]).parent,
        "encyclopedic-vqa": evqa.write_pages(folder / "kb.json", [evqa.page(n) for n in range(30)]),
        "wiki6m": wiki6m.write_lines(folder / "w.jsonl.gz", [wiki6m.line(n) for n in range(30)]),
        "mediawiki": mediawiki.write_dump(folder / "d.xml.bz2", [mediawiki.page(n) for n in range(30)]),
        "folder": folder / "pictures",
    }


def parse_all(source, chunk):
    return list(source.parse(chunk))


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_and_read_by_other_processes(paths, pool, kind, tmp_path):
    assert kind_of(paths[kind]) == kind
    source = open_source(paths[kind], images=paths["folder"])
    assert source.snapshot().sha256
    source.prepare(tmp_path)
    here = Read(source)
    there = [item for items in pool.map(parse_all, [source] * len(here.chunks), here.chunks) for item in items]
    assert there == here.items and (len(here.articles) >= 30 or kind == "folder")


def test_a_name_is_not_needed(paths, tmp_path):
    for kind in ("zim", "encyclopedic-vqa", "wiki6m", "mediawiki"):
        copy = tmp_path / kind
        copy.write_bytes(paths[kind].read_bytes())
        assert kind_of(copy) == kind
    assert kind_of(next(paths["wit"].iterdir())) == "wit"
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"wikidata_id": "Q1", "wikipedia_title": "A", "wikipedia_content": "x" * 10**6}))
    assert kind_of(long) == "wiki6m"


def test_options_reach_their_sources(paths):
    assert open_source(paths["wit"], language="de", licence="L").language == "de"
    assert open_source(paths["folder"], licence="L").snapshot().licence == "L"
    assert open_source(paths["zim"], kind="zim", licence="L").snapshot().licence == "L"


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", gzip.compress(b"text"), b"a,b\n1,2\n", b"{}", b"PK\x03\x04"])
def test_an_unknown_kind_is_refused_with_those_that_are_read(tmp_path, data):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.bin"):
        open_source(path)


def test_unknown_kinds_and_places_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"zim: a Kiwix[\s\S]*folder: a folder of pictures"):
        kind_of(tmp_path)
    with pytest.raises(SourceError, match="nothing at"):
        open_source(tmp_path / "none")
    with pytest.raises(SourceError, match="no kind of snapshot 'epub'; choose one of zim"):
        open_source(tmp_path, kind="epub")
