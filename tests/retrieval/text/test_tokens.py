"""Folding and tokens of texts and queries, against Unicode, FTS5 and the published expectations of Lucene."""

import re
import sqlite3
import unicodedata
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.retrieval.text.tokens import (
    MAX_QUERY_UNITS,
    MAX_TERMS,
    fold,
    fts5_all,
    fts5_any,
    index_text,
    is_prefix,
    join_units,
    name_key,
    name_spans,
    replace_spans,
    search_terms,
    split_units,
    tokenize,
)

HOSTILE = [
    '"', '""', "a AND", "NEAR(a b, 3)", "a*", "^a", "-a", "title:a", "{a b}:c", "a\x00b", "'; DROP TABLE words; --",
    "🇪🇸🏴‍☠️", "a" * 10_000, "x y " * 2_500, "(" * 10_000, "\ud800", "é́́́", "日本 の 旗", "AND OR NOT", "\\", "%", "",
    "\x01a\x02b", "é\x01é\x02é", "日" * 10_000, "ก" * 10_000, "ก", "กา", "국", "é'é\"é·éʼé", "\u200c" * 9, "٣'٣",
]  # fmt: skip
# Letters, marks, signs inside of words, and what normalisation changes, of many scripts.
CHARACTERS = st.one_of(
    st.characters(),
    st.sampled_from("aZ09 '\"-_.’ʼʻ`´·\u200c\u200d\u00ad\u200béßİıſﬁ²₂½™№Åøçπς́̈ӓйё́אשׁ׳״ִﭏعةىیکٱـَّﻻ٣۴կեւև՞ქᲥअक़़्ँ१ৎ"),
    st.sampled_from("กาน้ำํเ๒ລຳກ្កមា၁င်ြ日本々〆ー放がカﾞｶ゙ドﾄｰ一⼀㎢①㈱𠮷한국ᄒㅎ가각ᆨ\U0001f1ea\u0345ᾳᾠ\U000e0100\ufe0f"),
)
TEXTS = st.text(CHARACTERS, max_size=30)


def fts5_words(text):
    """Return the words that FTS5 finds in a text as it is indexed, without English endings removed."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE VIRTUAL TABLE t USING fts5(a, tokenize='ascii')")
        db.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, row)")
        db.execute("INSERT INTO t VALUES (?)", [index_text(text)])
        return {row[0] for row in db.execute("SELECT term FROM v")}


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_becomes_a_valid_fts5_expression(text):
    terms = search_terms(tokenize(text))
    assert len(terms) <= MAX_TERMS and sum(map(len, tokenize(text))) <= 10_000
    if terms:
        with closing(sqlite3.connect(":memory:")) as db:
            db.execute("CREATE VIRTUAL TABLE t USING fts5(a)")
            for expression in (fts5_any(terms), fts5_all(terms)):
                db.execute("SELECT * FROM t WHERE t MATCH ?", [expression]).fetchall()


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(TEXTS)
def test_folding_is_idempotent(text):
    assert fold(fold(text)) == fold(text)
    assert not re.search(r"^ |  | $", fold(text))


@settings(max_examples=600, deadline=None)
@given(TEXTS)
def test_all_terms_of_a_text_are_in_its_index_and_match_it(text):
    terms = search_terms(tokenize(text))
    words = fts5_words(text)
    for term in terms:
        assert any(word.startswith(term) for word in words) if is_prefix(term) else term in words, (term, words)
    if terms:
        with closing(sqlite3.connect(":memory:")) as db:
            db.execute("CREATE VIRTUAL TABLE t USING fts5(a, content='', tokenize='porter ascii')")
            db.execute("INSERT INTO t(rowid, a) VALUES (1, ?)", [index_text(text)])
            assert db.execute("SELECT rowid FROM t WHERE t MATCH ?", [fts5_all(terms)]).fetchall() == [(1,)]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), st.sampled_from(("NFC", "NFD")))
def test_canonically_equivalent_texts_have_the_same_words(text, form):
    assert fold(unicodedata.normalize(form, text)) == fold(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_units_are_the_words_of_a_query(text):
    words = tokenize(text)
    units = split_units(words)
    assert join_units(units) == " ".join(words) == name_key(text)
    if 0 < len(units) <= 8:
        assert (0, len(units)) in name_spans(units)[name_key(text)]
    assert replace_spans(units, {}, bool) == words


def test_every_character_folds_alike_alone_and_in_words():
    """All of Unicode but the ideographs and syllables that nothing is done to."""
    plain = {*range(0x3401, 0x9FFF), *range(0xAC01, 0xD7A3), *range(0x17000, 0x18D00), *range(0x20001, 0xE0000)}
    for code in (code for code in range(0xE0200) if code not in plain):
        for text in (chr(code), f"б{chr(code)}б"):
            folded, indexed = fold(text), index_text(text)
            words = re.split(r"[^0-9a-z\x80-\U0010ffff]+", indexed.lower() if text.isascii() else indexed)
            for term in search_terms(tokenize(text)):
                assert term in words or (is_prefix(term) and any(word.startswith(term) for word in words)), hex(code)
            assert fold(folded) == folded, hex(code)


# --- references -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "folded"), [
    # Lucene's TestArabicNormalizationFilter and TestPersianNormalizationFilter (Persian letters become Arabic ones)
    ("آجن", "اجن"), ("أحمد", "احمد"), ("إعاذ", "اعاذ"), ("بنى", "بني"), ("فاطمة", "فاطمه"), ("روبرـــت", "روبرت"),
    ("مَبنِيّ", "مبني"), ("علِي", "علي"), ("بُوات", "بوات"), ("بنتاً", "بنتا"), ("ولدٌ", "ولد"),
    ("ولدٍ", "ولد"), ("نلْسون", "نلسون"),
    ("های", "هاي"), ("کشاندن", "كشاندن"), ("كتابت", "كتابت"),
    # Lucene's TestASCIIFoldingFilter
    ("Des mot clés À LA CHAÎNE À Á Â Ã Ä Å Æ Ç È É Ê Ë Ì Í Î Ï Ĳ Ð Ñ Ò Ó Ô Õ Ö Ø Œ Þ Ù Ú Û Ü Ý Ÿ",
     "des mot cles a la chaine a a a a a a ae c e e e e i i i i ij d n o o o o o o oe th u u u u y y"),
    ("à á â ã ä å æ ç è é ê ë ì í î ï ĳ ð ñ ò ó ô õ ö ø œ ß þ ù ú û ü ý ÿ ﬁ ﬂ",
     "a a a a a a ae c e e e e i i i i ij d n o o o o o o oe ss th u u u u y y fi fl"),
    # Unicode's full case folding and NFKC
    ("ΟΔΥΣΣΕΎΣ Ὀδυσσεύς", "οδυσσευσ οδυσσευσ"), ("STRASSE Straße STRAẞE", "strasse strasse strasse"),
    ("Ｆｕｌｌ　ｗｉｄｔｈ", "full width"), ("ﾄﾞｲﾂ ｺｰﾋｰ", "ドイツ コーヒー"), ("ﻻ ﷲ", "لا الله"),
    ("𝔘𝔫𝔦 Ⅷ", "uni viii"), ("ᲡᲐᲥ", "საქ"),
    ("각 각 각", "각 각 각"), ("ĳ ǆ ŉ", "ij dz n"),
])  # fmt: skip
def test_folding(text, folded):
    assert fold(text) == folded


@pytest.mark.parametrize(("text", "terms"), [
    # Lucene's TestCJKAnalyzer
    ("一二三四五六七八九十", "一二 二三 三四 四五 五六 六七 七八 八九 九十"),
    ("一 二三四 五六七八九 十", "一 二三 三四 五六 六七 七八 八九 十"),
    ("あいうえおabcかきくけこ", "あい いう うえ えお abc かき きく くけ けこ"),
    ("あいうえおabんcかきくけ こ", "あい いう うえ えお ab ん c かき きく くけ こ"),
    ("一 روبرت موير", "一 روبرت موير"), ("ﾃｽﾄ", "テス スト"), ("ﾃﾞﾗ", "デラ"), ("한국어", "한국 국어"),
    ("𩬅艱鍟䇹愯瀛", "𩬅艱 艱鍟 鍟䇹 䇹愯 愯瀛"), ("Ｔｅｓｔ １２３４", "test 1234"),
    ("多くの学生が試験に落ちた。", "多く くの の学 学生 生が が試 試験 験に に落 落ち ちた"),
    # ours: alphabets without blanks
    ("ไทย2560", "ไทย 2560"), ("ประเทศไทย", "ประ ระเ ะเท เทศ ทศไ ศไท ไทย"), ("กา", "กา"),
])  # fmt: skip
def test_terms_of_scripts_without_blanks(text, terms):
    assert list(search_terms(tokenize(text))) == terms.split()


@pytest.mark.parametrize(("text", "indexed"), [
    ("п'ять", "п пять ять"), ("צה״ל", "צה צהל ל"), ("می‌خواهد", "مي ميخواهد خواهد"), ("ինչո՞ւ", "ինչո ինչու ւ"),
    ("Hawaiʻi", "hawai hawaii i"), ("col·legi é", "col collegi legi e"),
    ("ק\"מ²", "ק קמ מ קמ2 מ2 2"), ("km² é", "km km2 2 e"), ("10⁶ é", "10 6 e"),
    ("l’été", "l ete"), ("क्‍ष", "क्ष"), ("ＮＨＫ放送", "nhk 放送 送"), ("ไทย", "ไทย ทย ย"),
])  # fmt: skip
def test_words_of_the_index(text, indexed):
    assert index_text(text).split() == indexed.split()


def test_ascii_text_is_indexed_as_it_is():
    text = "It's the A-class, 3.5 km: \"x\"_y"
    assert index_text(text) is text
    assert fts5_words(text) == set(tokenize(text))


# --- queries and names ------------------------------------------------------------------------------


def test_name_keys_ignore_diacritics_case_and_punctuation():
    assert name_key("Côte d'Ivoire") == name_key("COTE D IVOIRE") == name_key("Co\u0302te d’Ivoire") == "cote d ivoire"
    assert name_key("NHK放送") == name_key("ｎｈｋ 放送") == "nhk 放送"
    assert name_key("?!") == ""


def test_stop_words_are_dropped_unless_there_are_no_others():
    assert search_terms(tokenize("What is the capital of Spain?")) == ("capital", "spain")
    assert search_terms(tokenize("The Who")) == ("the", "who")


def test_long_queries_are_cut():
    assert len("".join(tokenize("日" * 5_000))) == MAX_QUERY_UNITS
    assert len(tokenize("a " * 500)) == 96


def test_spans_list_every_position():
    spans = name_spans(split_units(["a", "b", "a"]))
    assert spans["a"] == [(0, 1), (2, 3)] and spans["a b a"] == [(0, 3)]


def test_names_are_recognised_inside_of_words_without_blanks():
    spans = name_spans(split_units(tokenize("NHK放送局は 国")))
    assert spans["放送"] == [(1, 3)] and spans["nhk 放送"] == [(0, 3)] and spans["国"] == [(5, 6)]
    assert "局" not in spans  # a single character of a word


@pytest.mark.parametrize(("text", "name", "known", "words"), [
    ("베를린은 어디", (0, 3), "", ["X", "어디"]), ("베를린은 어디", (0, 3), "린은", ["X", "어디", "린은"]),
    ("日本国憲法", (0, 2), "本国", ["X", "国憲法", "本国"]), ("米国の首都", (0, 2), "", ["X", "の首都"]),
    ("ประเทศไทย", (6, 9), "ศไท", ["ประเทศ", "X", "ศไท"]), ("capital of spain", (2, 3), "", ["capital", "of", "X"]),
])  # fmt: skip
def test_names_are_replaced(text, name, known, words):
    assert replace_spans(split_units(tokenize(text)), {name: ["X"]}, known.split().__contains__) == words
