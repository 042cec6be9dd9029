"""ZIM files with 3,000 generated articles, and damaged ones."""

import io
import re
import sys
import time

import pytest
from PIL import Image
from reading import Read, check_contract
from zim_world import ARTICLES, FOREIGN, WIKIPEDIA, articles, drawing, picture, write_world, write_zim

from gog_edge.errors import BackendError, SourceError
from gog_edge.indexing.sources.zim import CHUNK_ENTRIES, ZimSource


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("zim") / "wikipedia_en_made_2026-08.zim")


@pytest.fixture(scope="module")
def world(path):
    return check_contract(ZimSource(path))


def small(folder):
    return write_zim(folder / "small.zim", articles(40))


def test_articles_are_read_with_their_sections(world):
    assert len(world.articles) == ARTICLES + len(FOREIGN) + 5
    assert len(world.articles) / (len(world.chunks) * CHUNK_ENTRIES) > 0.5
    place = world.articles["A0003"]
    assert place.title == "Place 3"
    assert list(dict.fromkeys(section for section, _ in place.paragraphs)) == [
        "", "History", "Geography", "Geography / Early years"]
    assert ("", "Place 3\nPlace 3 seen from afar\nHeight: 3 m\nFounded: 903") in place.paragraphs
    text = "\n".join(text for _, text in place.paragraphs)
    for noise in ("[edit]", "[1]", "A book", "For others", "issued from", "Subtitle", "a · b"):
        assert noise not in text


def test_captions_of_both_figure_formats_are_read(world):
    newer, older = world.images_of("A0001"), world.images_of("A0002")
    assert [image.caption for image in newer] == ["Place 1 in winter", "The Place 1 today"]
    assert [image.caption for image in older] == ["Place 2 in winter", "The Place 2 today"]
    assert [image.lead for image in newer] == [True, False]


def test_the_image_of_an_infobox_is_the_lead(world):
    first, *_ = world.images_of("A0003")
    assert first.lead and first.caption == "Place 3 seen from afar"


def test_images_can_be_served(world):
    for image in world.images[:50]:
        shown = Image.open(io.BytesIO(image.data))
        assert shown.format in ("WEBP", "PNG", "JPEG") and max(shown.size) <= 320


def test_redirects_lead_to_articles_only(world):
    assert world.redirects["Site 3"] == "A0003"
    assert len(world.redirects) == len(range(0, ARTICLES, 3))


@pytest.mark.parametrize(("title", "caption"), FOREIGN.items())
def test_other_scripts_are_kept(world, title, caption):
    assert world.articles[title].paragraphs == (("", f"{title}: {caption}。"),)
    assert [image.caption for image in world.images_of(title)] == [caption]


def test_unusable_content_is_skipped(world):
    assert world.skipped == {
        "image does not decode": 1, "image is not in the snapshot": 2, "image is an icon": 1,
        "image is smaller than an icon": 1, "article has no text": 1, "article was not downloaded": 1,
        "redirect to a file that is not an article": 1}
    assert [image.caption for image in world.images_of("Odd_inline")] == ["Inside"]
    assert world.articles["Odd_gallery"].paragraphs == (("", "Only a picture"),)


def test_the_snapshot_is_described_by_the_metadata(path):
    source = ZimSource(path)
    snapshot = source.snapshot()
    assert (snapshot.name, snapshot.date, snapshot.licence) == ("wikipedia_en_made", "2026-08-15", "CC BY-SA 4.0")
    assert len(snapshot.uuid) == 36 and snapshot.sha256.startswith("md5:")
    assert source.metadata()["Flavour"] == "maxi" and "text/html" in source.metadata()["Counter"]
    source.verify()


@pytest.mark.parametrize(
    ("metadata", "given", "expected"),
    [
        (WIKIPEDIA | {"License": "CC-BY-4.0"}, "mine", "CC-BY-4.0"),
        (WIKIPEDIA | {"Date": "2023-05-01"}, None, "CC BY-SA 3.0"),
        ({"Title": "A museum", "Date": "2026-01-01"}, "mine", "mine"),
        ({"Title": "A museum", "Date": "2026-01-01"}, None, "unknown"),
    ],
)
def test_the_licence_comes_from_the_metadata_or_the_user(tmp_path, metadata, given, expected):
    entries = [("A", "Here", '<p>Text.</p><img src="i.png">', "text/html"),
               ("i.png", "", picture(1, "PNG"), "image/png")]
    source = ZimSource(write_zim(tmp_path / "a.zim", entries, metadata=metadata), licence=given)
    assert source.snapshot().licence == expected
    read = Read(source)
    assert {article.licence for article in read.articles.values()} == {expected}
    assert [image.licence for image in read.images] == ["unknown"]  # ZIM files do not contain the licences of images


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    whole = small(tmp_path).read_bytes()
    part = tmp_path / "part.zim"
    part.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match=r"part\.zim.*truncated"):
        ZimSource(part).snapshot()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        ZimSource(tmp_path / "none.zim").snapshot()


def test_a_damaged_cluster_affects_its_own_entries_only(tmp_path):
    path = write_zim(tmp_path / "damaged.zim", articles(40), cluster=2**15)
    data = bytearray(path.read_bytes())
    frames = [found.start() for found in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)]  # where zstd begins
    assert len(frames) >= 5
    middle = (frames[1] + frames[2]) // 2
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    source = ZimSource(path)
    source.snapshot()  # libzim checks the structure only
    read = Read(source)
    assert read.skipped["entry cannot be read"] >= 1
    assert len(read.articles) > 20 and len(read.articles) + read.skipped["entry cannot be read"] == 40 + len(FOREIGN)
    with pytest.raises(SourceError, match="checksum"):
        source.verify()


def test_the_checksum_detects_a_flipped_byte(tmp_path):
    path = small(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="corrupt"):
        ZimSource(path).verify()
    Read(ZimSource(path))  # reading goes on after it


def test_oversized_articles_are_skipped(tmp_path):
    path = write_zim(tmp_path / "large.zim", [("A", "Small", "<p>x</p>", "text/html"),
                                              ("B", "Large", "<p>x</p>" * 1_200_000, "text/html")])
    read = Read(ZimSource(path))
    assert set(read.articles) == {"A"} and read.skipped == {"article is too large": 1}


def test_excessively_nested_articles_are_skipped_quickly(tmp_path):
    path = write_zim(tmp_path / "deep.zim", [("A", "Flat", "<div>x</div>" * 20_000, "text/html"),
                                             ("B", "Deep", "<div>" * 200_000, "text/html")])
    began = time.monotonic()
    read = Read(ZimSource(path))
    assert set(read.articles) == {"A"} and read.skipped == {"article is nested too deeply": 1}
    assert time.monotonic() - began < 2


def test_chains_of_redirects_are_followed(tmp_path):
    path = write_zim(tmp_path / "chain.zim", [("A", "Here", "<p>Text.</p>", "text/html")],
                     [("R1", "Once", "A"), ("R2", "Twice", "R1")])
    assert Read(ZimSource(path)).redirects == {"Once": "A", "Twice": "A"}


def test_image_paths_are_resolved_like_in_a_browser(tmp_path):
    shown = '<p>Text.</p><img src="../I/a%20b%3F.png?x=1" alt="One"><img data-src="./c.svg" src="" alt="Two">'
    path = write_zim(tmp_path / "paths.zim", [("deep/A", "Here", shown, "text/html"),
                                              ("I/a b?.png", "", picture(1, "PNG"), "image/png"),
                                              ("deep/c.svg", "", drawing(2), "image/svg+xml")])
    read = Read(ZimSource(path))
    assert [image.caption for image in read.images] == ["One", "Two"] and not read.skipped


def test_without_libzim_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "libzim.reader", None)
    path = tmp_path / "a.zim"
    path.write_bytes(b"ZIM\x04")
    with pytest.raises(BackendError, match=r"gog_edge\[zim\]"):
        ZimSource(path).snapshot()
