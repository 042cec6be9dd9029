"""Every word of a page finds it, in every script, however it is typed.

Words are found by the categories of Unicode, not by our tokenizer. The pages are sentences in 45 scripts and groups of
languages (`tests/data/search/pages.json`).
"""

import json
import re
import unicodedata
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from listed_source import ListedSource
from loopback import serving
from playback import PlaybackPolicy

from gog_edge.config import Limits
from gog_edge.indexing.build import build_pack
from gog_edge.indexing.sources.base import ArticleRecord
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.registry import PackRegistry
from gog_edge.retrieval.retriever import MAX_K, Retriever, RetrieverConfig
from gog_edge.runtime import Runtime
from gog_edge.serve.app import create_app
from gog_edge.types import TextQuery

PAGES = json.loads((Path(__file__).parents[1] / "data" / "search" / "pages.json").read_text(encoding="utf-8"))
WITHOUT_BLANKS = ("Korean", "Japanese", "Chinese", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Burmese", "Javanese",
                  "Balinese")  # fmt: skip
LETTERS = ("Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "No")
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "scripts"
    groups = tuple((ArticleRecord(page["title"], (("", page["text"]),), "CC0"),) for page in PAGES)
    build_pack(ListedSource(groups, 20), folder, name="scripts", encoder=None, workers=1)
    return folder


@pytest.fixture(scope="module")
def find(folder, tiny_encoder):
    """Return a function that searches texts and returns the titles of each result."""
    with closing(Pack.open(folder, None)) as pack:
        retriever = Retriever(tiny_encoder, [pack], RetrieverConfig(top_k=MAX_K))
        yield lambda texts: [{title for one in result.evidence for title in one.titles}
                             for result in retriever.search([TextQuery(text, text) for text in texts])]


def is_letter(char):
    return unicodedata.category(char)[0] in "LNM"


def words_of(text):
    """Return the words between blanks, and between all characters but letters, marks, digits and format characters."""
    rough = [word.strip("".join(char for char in word if not is_letter(char))) for word in text.split()]
    fine = re.findall(r"\S+", "".join(char if is_letter(char) or unicodedata.category(char) == "Cf" else " "
                                      for char in text))  # fmt: skip
    return [word for word in dict.fromkeys((*rough, *fine)) if any(map(is_letter, word))]


def parts_of(text):
    """Return every character and every pair, quadruple and run of a text without blanks, and its other words."""
    letters = "".join(char if is_letter(char) else " " for char in text if unicodedata.category(char) != "Cf")
    parts = (run[start : start + length] for run in letters.split() for length in (1, 2, 4, len(run))
             for start in range(len(run) - length + 1))  # fmt: skip
    others = re.findall(r"[0-9A-Za-z]+", unicodedata.normalize("NFKC", letters))
    return [*others, *dict.fromkeys(part for part in parts if any(unicodedata.category(char) == "Lo" for char in part))]


def typed(word):
    """Return other ways to type a word. (Capitals have the iota subscript of ancient Greek on the line.)"""
    if "\u0345" in unicodedata.normalize("NFD", word):
        return [word, word.lower()]
    return dict.fromkeys([word, word.upper(), word.lower(), *(unicodedata.normalize(form, word) for form in
                          ("NFC", "NFD", "NFKC", "NFKD")), word.translate(FULL_WIDTH)])  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page["script"])
def test_every_word_of_a_page_finds_it(find, page):
    text = f"{page['title']} {page['text']}"
    words = parts_of(text) if page["script"] in WITHOUT_BLANKS else words_of(text)
    queries = [form for word in words for form in typed(word)]
    # A mark alone is no word: nobody types it, and folded text may not have it.
    queries = [query for query in queries if any(unicodedata.category(char) in LETTERS for char in query)]
    missing = [query for query, titles in zip(queries, find(queries), strict=True) if page["title"] not in titles]
    assert not missing, f"{len(missing)} of {len(queries)}: {missing[:20]}"


@pytest.mark.parametrize(("text", "title"), [
    ("베를린", "베를린"), ("베를린에서", "베를린"), ("수도", "베를린"), ("Cafe", "Café society"),
    ("KÖLN", "Straßenbahn"),
    ("strassenbahn", "Straßenbahn"), ("Lodz", "Łódź"), ("Da Nang", "Đà Nẵng"), ("ostersoen", "Ærø"), ("AERO", "Ærø"),
    ("diyarbakir", "İstanbul"), ("ıstanbul", "İstanbul"), ("azerbaycanin", "Bakı"), ("dan adam", "Ɗan Adam"),
    ("пять", "Київ"), ("елка", "Йена"), ("замок", "Йена"), ("ωδη", "Ὅμηρος"), ("בראשית", "ירושלים"), ("צהל", "ירושלים"),
    ("محمدا", "برلين"), ("مدينه", "برلين"), ("الهدي", "برلين"), ("ان", "برلين"),
    ("میخواهد", "تهران"), ("كتاب", "تهران"),
    ("1234", "تهران"), ("خانه", "تهران"), ("बाजार", "दिल्ली"), ("हंसी", "दिल्ली"), ("123", "दिल्ली"), ("अग्निमीळे", "ऋग्वेद"),
    ("अवന്‍", None), ("ബെര്‍ലിനില്‍", "തിരുവനന്തപുരം"), ("കേരളത്തിന്‍റെ", "തിരുവനന്തപുരം"), ("コーヒー", "ドイツ"), ("タワ", "ドイツ"),
    ("吉野家", "博物館島"), ("一月", "博物館島"), ("891", "博物館島"), ("柏", "博物館島"),
    ("km2", "博物館島"),
    ("เมืองหลวง", "กรุงเทพมหานคร"), ("นํ้า", "กรุงเทพมหานคร"), ("2560", "กรุงเทพมหานคร"), ("ไท", "กรุงเทพมหานคร"),
    ("ຫນັງສື", "ວຽງຈັນ"), ("មនុស្ស", "ភ្នំពេញ"), ("ရန်ကုန်", "ရန်ကုန်"), ("საქართველო", "თბილისი"), ("ინჩუ", None),
    ("ինչու", "Երևան"), ("Երեվան", "Երևան"), ("Hawaii", "Hawaiʻi"), ("Oʼzbekiston", "Oʻzbekiston"),
    ("m2", "Café society"), ("h2o", "Café society"), ("first", "Café society"), ("cooperation", None), ("ᏣᎳᎩ", "ᏣᎳᎩ"),
])  # fmt: skip
def test_words_as_readers_type_them(find, text, title):
    (titles,) = find([text])
    assert (title in titles) if title else not titles


@pytest.mark.parametrize(("text", "title"), [
    ("иена", "Йена"), ("істі", "Київ"), ("іжак", "Київ"), ("гљиво", "Београд"), ("दल्ल", "दिल्ली"), ("ਸਹਿਰ", "ਅੰਮ੍ਰਿਤਸਰ"),
    ("சன்ன", "சென்னை"), ("カイズ", "ドイツ"), ("ハッバ", "ドイツ"), ("กริง", "กรุงเทพมหานคร"), ("لڑکی", "لاہور"),
])  # fmt: skip
def test_marks_that_readers_tell_apart_are_kept(find, text, title):
    (titles,) = find([text])
    assert title not in titles


def test_a_served_pack_finds_the_words(folder, tiny_encoder):
    """The words of the report, and some of each page, by `POST /v1/search`."""
    packs = PackRegistry([folder], tiny_encoder)
    runtime = Runtime("scripts", PlaybackPolicy(), packs, Limits(), ())
    asked = [("πρωτεύουσα", "Αθήνα"), ("Ελλάδας", "Αθήνα"), ("베를린은", "베를린"), ("первый", "Йена"),
             ("ألمانيا", "برلين"), ("柏林", "博物館島"), ("город", "Йена")]  # fmt: skip
    asked += [(page["title"], page["title"]) for page in PAGES]
    with closing(packs), serving(create_app(runtime)) as address, httpx.Client(base_url=address, timeout=60) as client:
        for text, title in asked:
            (result,) = client.post("/v1/search", json={"text": text}).json()["results"]
            found = [name for one in result["evidence"] for name in one["titles"]]
            assert title in found and result["found"] > 0, (text, found)
            (passage,) = (one["passages"][0] for one in result["evidence"] if title in one["titles"])
            assert passage["text"] == next(page["text"] for page in PAGES if page["title"] == title)
