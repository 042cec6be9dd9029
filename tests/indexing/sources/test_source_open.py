"""Detection of the format of a snapshot, and parsing in other processes."""

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

from gog_edge.errors import InputError, SourceError
from gog_edge.indexing.sources.open import KINDS, detect_kind, open_source


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A small snapshot of every kind, by kind."""
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
def test_every_kind_is_detected_and_read_by_other_processes(paths, pool, kind, tmp_path):
    assert detect_kind(paths[kind]) == kind
    source = open_source(paths[kind], images=paths["folder"])
    assert source.snapshot().sha256
    source.prepare(tmp_path)
    here = Read(source)
    there = [record for part in pool.map(parse_all, [source] * len(here.chunks), here.chunks) for record in part]
    assert there == here.records and (len(here.articles) >= 30 or kind == "folder")


def test_the_kind_is_detected_from_the_content(paths, tmp_path):
    for kind in ("zim", "encyclopedic-vqa", "wiki6m", "mediawiki"):
        copy = tmp_path / kind
        copy.write_bytes(paths[kind].read_bytes())
        assert detect_kind(copy) == kind
    assert detect_kind(next(paths["wit"].iterdir())) == "wit"
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"wikidata_id": "Q1", "wikipedia_title": "A", "wikipedia_content": "x" * 10**6}))
    assert detect_kind(long) == "wiki6m"


def test_options_are_passed_to_the_source(paths):
    assert open_source(paths["wit"], language="de", licence="L").language == "de"
    assert open_source(paths["folder"], licence="L").snapshot().licence == "L"
    assert open_source(paths["zim"], kind="zim", licence="L").snapshot().licence == "L"


@pytest.mark.parametrize("data", [b"", b"%PDF-1.7", gzip.compress(b"text"), b"a,b\n1,2\n", b"{}", b"PK\x03\x04"])
def test_unsupported_files_are_refused(tmp_path, data):
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.bin"):
        open_source(path)


def test_unsupported_kinds_and_missing_paths_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"zim: a Kiwix[\s\S]*folder: a folder of pictures"):
        detect_kind(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        open_source(tmp_path / "none")
    with pytest.raises(SourceError, match="must be one of zim, .*, got 'epub'"):
        open_source(tmp_path, kind="epub")


def test_columns_of_a_snapshot_without_tables_are_refused(paths):
    with pytest.raises(InputError, match="of the kind 'zim'; leave out --column"):
        open_source(paths["zim"], columns=["file=Name"])
    with pytest.raises(InputError, match="of the kind 'zim'; leave out --encoding"):
        open_source(paths["zim"], encoding="cp1251")
    for name in ("klingon", "base64", "a\0b"):
        with pytest.raises(InputError, match="is unknown; give one such as cp1251"):
            open_source(paths["folder"], encoding=name)
