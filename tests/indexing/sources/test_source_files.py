"""Compressed files that are read in order, and images that are found in a folder by their address."""

import bz2
import gzip
import hashlib
import os
import zipfile

import pytest
from zim_world import picture

from gog_edge.errors import SourceError
from gog_edge.indexing.sources import files
from gog_edge.indexing.sources.base import Skipped, wikipedia_text_licence
from gog_edge.indexing.sources.files import CompressedFile, group_into_chunks, snapshot_date, snapshot_of_file
from gog_edge.indexing.sources.images import IMAGE_MISSING, NO_IMAGE_FOLDER, ImageFolder

LINES = b"".join(b"line %d of a file\n" % number for number in range(50_000))


def compressed(path, data=LINES):
    """Write a file that is compressed as its suffix says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("readme.txt", "smaller than the other member")
            archive.writestr("data", data)
        return path
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".bz2", ".zip"])
def test_every_compression_yields_the_same_lines(tmp_path, suffix):
    with CompressedFile(compressed(tmp_path / f"a{suffix}")) as file:
        assert b"".join(file.lines()) == LINES
        assert 0 < file.position <= file.size


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_archives_of_several_streams_are_read_to_the_end(tmp_path, pack):
    path = tmp_path / "a"
    path.write_bytes(pack(b"one\n") + pack(b"two\n"))
    with CompressedFile(path) as file:
        assert list(file.lines()) == [b"one\n", b"two\n"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zip"])
def test_damage_is_reported_with_its_position_after_the_data_before_it(tmp_path, suffix):
    path = compressed(tmp_path / f"a{suffix}", os.urandom(4 * 2**20).hex().encode())
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 5000] = bytes(5000)
    path.write_bytes(data)
    read = 0
    damaged = pytest.raises(SourceError, match=r"a\.\w+' is .* damaged before byte \d+ of \d+")
    with CompressedFile(path) as file, damaged:
        while block := file.read(2**16):
            read += len(block)
    assert read > 2**20


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_a_truncated_archive_yields_the_chunks_before_its_end(tmp_path, suffix):
    whole = compressed(tmp_path / f"whole{suffix}", os.urandom(2**21).hex(" ", 32).replace(" ", "\n").encode())
    part = tmp_path / f"part{suffix}"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with CompressedFile(whole) as file:
        expected = [chunk.content for chunk in group_into_chunks(file.lines(), file, 0, len)]
    found = []
    with CompressedFile(part) as file, pytest.raises(SourceError, match="truncated"):
        found.extend(chunk.content for chunk in group_into_chunks(file.lines(), file, 0, len))
    assert len(found) > len(expected) // 3 and found == expected[: len(found)]


def test_long_lines_are_truncated(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_PIECE_BYTES", 100)
    path = compressed(tmp_path / "a", b"one\n" + b"x" * 950 + b"\ntwo\n" + b"y" * 100 + b"\nthree")
    with CompressedFile(path) as file:
        assert list(file.lines()) == [b"one\n", b"x" * 100, b"two\n", b"y" * 100, b"three"]


def test_chunks_are_bounded_by_pieces_and_by_bytes(tmp_path):
    with CompressedFile(compressed(tmp_path / "a")) as file:
        chunks = list(group_into_chunks(file.lines(), file, 0, len))
    assert {len(chunk.content) for chunk in chunks[:-1]} == {files.CHUNK_PIECES}
    assert sum(chunk.size for chunk in chunks) == len(LINES)
    with CompressedFile(tmp_path / "a") as file:
        large = list(group_into_chunks((b"x" * 2**20 for _ in range(9)), file, 0, len))
    assert [len(chunk.content) for chunk in large] == [4, 4, 1]


def test_a_snapshot_has_the_date_and_hash_of_its_file(tmp_path):
    path = compressed(tmp_path / "enwiki-20240901-pages-articles.xml.bz2")
    snapshot = snapshot_of_file(path, "L")
    assert (snapshot.name, snapshot.date, snapshot.licence) == (path.name, "2024-09-01", "L")
    assert snapshot.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    named = tmp_path / "wikipedia_en_all_maxi_2026-08.zim"
    assert snapshot_date(named) == "2026-08"
    plain = compressed(tmp_path / "kb12345678901.json")
    os.utime(plain, (0, 86_400 * 365))
    assert snapshot_date(plain) == "1971-01-01"
    with pytest.raises(SourceError, match="does not exist"):
        snapshot_of_file(tmp_path / "none", "L")


def test_the_licence_of_wikipedia_depends_on_the_date():
    assert [wikipedia_text_licence(date) for date in ("2023-06-06", "2023-06-07", "2024", "2026-08")] == [
        "CC BY-SA 3.0", "CC BY-SA 4.0", "CC BY-SA 4.0", "CC BY-SA 4.0"]


ADDRESS = "https://upload.wikimedia.org/wikipedia/commons/a/ab/Caf%C3%A9_de_Flore.jpg"
DIGESTS = [hashlib.new(name, ADDRESS.encode()).hexdigest() for name in ("md5", "sha1", "sha256")]


NAMES = ["Café_de_Flore.jpg", "Caf%C3%A9_de_Flore.jpg", "{0}/{1}/Café_de_Flore.jpg",
         *(digest + suffix for digest in DIGESTS for suffix in (".jpg", ".png", ""))]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_found_under_every_supported_name(tmp_path, name):
    digits = hashlib.md5("Café_de_Flore.jpg".encode()).hexdigest()
    path = tmp_path / name.format(digits[0], digits[:2])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(1))
    assert ImageFolder(tmp_path).thumbnail(ADDRESS) == picture(1)


def test_missing_images_are_skipped(tmp_path):
    assert ImageFolder(tmp_path).thumbnail(ADDRESS) == Skipped(IMAGE_MISSING, ADDRESS)
    assert ImageFolder(None).thumbnail(ADDRESS) == Skipped(NO_IMAGE_FOLDER, ADDRESS)
    with pytest.raises(SourceError, match="folder of images .* does not exist"):
        ImageFolder(tmp_path / "none").check()


@pytest.mark.parametrize(
    "address", ["", "/", "x/..", "x/%2e%2e%2fsecret.png", "a\0b", "http://[", "n" * 5000, "\ud800", "x/%ff"]
)
def test_no_address_leads_out_of_the_folder(tmp_path, address):
    inside = tmp_path / "images"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    assert ImageFolder(inside).thumbnail(address).reason == IMAGE_MISSING
