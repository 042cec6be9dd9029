"""Wikitext as a reader sees it: markup, links, lists, and the sentences that are left out."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gog_edge.indexing.sources.mediawiki import parse_wikitext
from gog_edge.indexing.sources.mediawiki.site import Site, redirect_target
from gog_edge.indexing.sources.text import MAX_CHARACTERS


def shown(wikitext, language="en", **fields):
    return "\n\n".join(text for _, text in parse_wikitext(wikitext, Site(language, **fields), "Title"))


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("[[A|b]]s and [[:Category:C]]", "bs and Category:C"),
        ("[https://x.example Site] [https://x.example]", "Site"),
        ("a<br>b", "a\nb"), ("<nowiki>[[x]]</nowiki>", "[[x]]"), ("x<sup>2</sup> &amp; &eacute;", "x² & é"),
        ("# one\n## two", "one\ntwo"), ("__NOTOC__ a", "a"),
        ("{| \n| open table\nText.", "Text."), ("[[Image:A.jpg|thumb|x [[y]] z]]a", "a"), ("'''''a''''' ''b''", "a b"),
        ("Москва {{lang|ru|x}} 東京", "Москва x 東京"), ("<div class='x'>\nin <span>it</span></div>", "in it"),
        ("a {{{arg|b}}} c", "a b c"), ("a<!-- b -->c", "ac"), ("a\n<!-- b -->\nc", "a\nc"),
        ("a<!-- never closed", "a"),
        ("10<sup>6</sup> m, H<sub>2</sub>O, 10<sub>2</sub>, 19<sup>th</sup>", "10⁶ m, H2O, 10₂, 19th"),
        ("<ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby>を", "漢字(かんじ)を"),
        ("a <s>b</s> <ins>c</ins>", "a c"),
        ("<span style='display:none'>x</span>a", "a"), ("<poem>\na\nb\n</poem>", "a\nb"),
        ("[[#Part|p]] [[#Part]]", "p Part"),
        ("a<ref name=x>{{cite|[[b]]}}</ref><ref name=x />.", "a."), ("a <ref>b</ref>, c", "a, c"),
        ("[[wikt:word]] and [[s:Text|a text]]", "word and a text"), ("<pre>\n {{x}} [[y]]\n</pre>", "{{x}} [[y]]"),
        ("x <code>f(a)</code> main() {{!}} y", "x f(a) main() | y"),
        ("<noinclude>a</noinclude><includeonly>b</includeonly>", "a"),
        ("<syntaxhighlight lang=c>\nint a;\n</syntaxhighlight>\nText.", "Text."),
        ("Use <syntaxhighlight lang=c inline>if (a) { b[[1]]; }</syntaxhighlight> here.",
        "Use if (a) { b[[1]]; } here."),
        ("<gallery>\nA.jpg|c\n</gallery>\nText.\n<timeline>\nx\n</timeline>", "Text."),
        ("&#91;[x]&#93; &lt;ref>", "[[x]] <ref>"),
        ("l'''Iliade'' d'Homère", "l'Iliade d'Homère"), ("''''a'''", "'a"), ("'''a''' b''c''", "a bc"),
    ],
)  # fmt: skip
def test_markup_becomes_the_visible_text(wikitext, text):
    assert shown(wikitext) == text


# --- links, namespaces and switches -----------------------------------------------------------


@pytest.mark.parametrize(
    "link",
    [
        "[[Datei:A.jpg|mini|x]]", "[[Fichier:A.svg|vignette|x]]", "[[Archivo:A.png|thumb|x]]", "[[Файл:А.jpg|мини|x]]",
        "[[ファイル:A.jpg|サムネイル|x]]", "[[画像:A.jpg|x]]", "[[檔案:A.jpg|縮圖|x]]", "[[文件:A.jpg|x]]",
        "[[ملف:أ.jpg|تصغير|x]]",
        "[[صورة:أ.jpg|x]]", "[[קובץ:א.jpg|ממוזער|x]]", "[[תמונה:א.jpg|x]]", "[[파일:가.jpg|섬네일|x]]",
        "[[그림:가.jpg|x]]",
        "[[चित्र:क.jpg|अंगूठाकार|x]]", "[[Tập tin:A.jpg|nhỏ|x]]", "[[Nieznane:A.JPG|thumb|x [[y]]]]",
        "[[file : A.jpg|x]]",
        "[[Kategorie:A]]", "[[Категория:А|Б]]", "[[カテゴリ:あ]]", "[[분류:가]]", "[[تصنيف:أ]]", "[[קטגוריה:א]]",
        "[[de:See]]", "[[zh-min-nan:Ô͘]]", "[[simple:Lake]]", "[[be-tarask:Возера]]", "[[ DE : See]]",
    ],
)  # fmt: skip
def test_links_that_display_nothing_are_dropped(link):
    assert shown(f"Before {link} after.") == "Before after." and shown(f"Text.\n\n{link}") == "Text."


@pytest.mark.parametrize(
    ("link", "text"),
    [("[[:de:See]]", "de:See"), ("[[:de:See|Lake]]", "Lake"), ("[[:File:A.jpg]]", "File:A.jpg"),
    ("[[:Category:C|c]]", "c"),
     ("[[Re: Zero]]", "Re: Zero"), ("[[Star Trek: Picard]]", "Star Trek: Picard"), ("[[en:Lake]]", "en:Lake")],
)  # fmt: skip
def test_links_that_display_a_text_are_kept(link, text):
    assert shown(f"See {link}.") == f"See {text}."


@pytest.mark.parametrize(
    "switch",
    [
        "__NOTOC__", "__notoc__", "__KEIN_INHALTSVERZEICHNIS__", "__SIN_TDC__", "__БЕЗ_ОГЛАВЛЕНИЯ__",
        "__目次非表示__", "＿＿目次非表示＿＿",
        "__विषय_सूची_हीन__", "__بی\u200cبخش__", "__לללא_תוכן__", "__ไม่มีสารบัญ__", "__İÇİNDEKİLERYOK__", "__NOCC___",
    ],
)  # fmt: skip
def test_behaviour_switches_are_dropped_in_any_language(switch):
    assert shown(f"{switch} A lake.\n\n{switch}") == "A lake."


def test_names_between_underscores_that_are_text_are_kept():
    text = "The method __init__ and the macro __FILE__ stay."
    assert shown(text) == text


# --- tables, lists, boxes ---------------------------------------------------------------------


def test_tables_and_boxes_stay_out_of_prose():
    text = """{{Infobox river
| name = Elbe
| length = {{convert|1094|km|mi}}
}}'''Elbe''' is a river.
{| class="wikitable"
! Head !! b
|-
| 1 || 2
|}
It flows north.
{{Navbox|x}}
! not a table

!!! neither"""
    assert shown(text) == "Elbe is a river.\n\nIt flows north.\n! not a table\n\n!!! neither"


def test_unclosed_boxes_and_tables_do_not_leak():
    assert shown("{Infobox river|name=Elbe|mouth=[[Sea]]}\nElbe is a river.") == "Elbe is a river."
    assert shown("{{Infobox river\n| name = Elbe\n| mouth = [[Sea]]\n'''Elbe''' is a river.") == "Elbe is a river."
    assert shown("{|\n! a\n| b\n\nProse.\n! c") == "Prose.\n! c"


def test_lists_are_paragraphs_of_their_own():
    assert shown("Its towns are:\n* A\n* B {{unknown|x}}\n* C\nMore prose.") == "Its towns are:\n\nA\nC\n\nMore prose."
    assert shown("; term : definition\n: more\n\n:* deep") == "term: definition\nmore\n\ndeep"
    assert shown("<ul><li>a</li><li>b</li></ul>") == "a\nb"


def test_a_line_in_italics_at_the_top_refers_to_other_pages():
    assert shown(":''This is about the river. For the lake, see [[Lake]].''\nA river.") == "A river."
    assert shown("A river.\n:''A quotation.''") == "A river.\n\nA quotation."


# --- sentences that lack something ------------------------------------------------------------


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("It is {{unknown|12}} long. It is deep.", "It is deep."),
        ("It is deep. It is {{unknown|12}} long.", "It is deep."),
        ("{{unknown}} is a town. It is old. See {{x}}.", "It is old."), ("Only {{unknown}}", ""),
        ("The area is <math>\\pi r^2</math>. It is round.", "It is round."),
        ("For <math>n = 3</math> it holds.", "For n = 3 it holds."),
        ("Dr. {{unknown}} came. The U.S. {{unknown}} left. They went home.", "They went home."),
        ("He met Gen. {{unknown}} there. They talked.", "They talked."),
        ("On 5. {{x}} it ended. All left.", "All left."),
        ("长{{unknown|1}}米。很深。", "很深。"), ("यह {{x}} है। वह बड़ा है।", "वह बड़ा है।"),
        ("طوله {{x}} كم. هو عميق؟ نعم.", "هو عميق؟ نعم."),
        ("It is {{unknown}} long.\n\nIt is deep.", "It is deep."),
        ("A [[b|{{unknown}}]] town. It is old.", "It is old."),
        ("It ended{{unknown}}. \"They {{x}} won.\" All left.", "All left."),
        ("It is {{{1}}} long. Still deep.", "Still deep."),
        ("It is {{lang|fr|open. Second here. Third here.", ""), ("He wrote [[broken. It sold well.", "It sold well."),
        ("It rose<ref>unclosed. It fell soon.", "It fell soon."),
        ("Hear [[Media:a.ogg|its sound]]. It is old.", "It is old."),
    ],
)  # fmt: skip
def test_an_incomplete_sentence_is_left_out(wikitext, text):
    assert shown(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("A town.{{citation needed|date=May 2020}} It is old{{sfn|Smith|2000}}, they say {{cn}}.",
        "A town. It is old, they say."),
        ("A town.{{mystery note|x}} It is old.", "A town. It is old."),
        ("{{Unknown box}}\nA town.\n{{Unknown stub}}", "A town."),
        ("A town, and\n{{unknown}}\nthe sea. It is old.", "It is old."),
        ("{{Use dmy dates}}{{short description|Town}}\n{{About|x}}\nA town. {{anchor|y}}It is old.",
        "A town. It is old."),
        ("A {{coord|1|2|display=title}} town {{Infobox x}}here.", "A town here."),
        ("A [[File:X.jpg|thumb]] town.", "A town."),
        ("{{DEFAULTSORT:x}}{{DISPLAYTITLE:''y''}}A town.", "A town."),
        ("Une ville{{ref-en}}. {{ancre|x}}Elle.", "Une ville. Elle."),
    ],
)  # fmt: skip
def test_what_is_invisible_leaves_no_hole(wikitext, text):
    assert shown(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Wien''' ({{IPA-de|viːn}}) is.", "Wien is."),
        ("'''Wien''' ({{IPAc-en|x}}; born 1950) is.", "Wien (born 1950) is."),
        ("A (pronounced {{IPA|x}}, {{lang-fr|Bé}}) is.", "A (French: Bé) is."),
        ("A ({{lang-fr|Bé}}, {{IPA|x}}) is.", "A (French: Bé) is."),
        ("A ({{lang|ru|Бе}}, ''Be'' {{IPA-ru|b}}, 5 km) is.", "A (Бе, Be, 5 km) is."),
        ("A （{{IPA|x}}、1950年）だ。", "A （1950年）だ。"),
        ("A ([[Media:a.ogg|listen]]) is. B", "A is. B"), ("A (b, [[media:A.oga|hear]]) is.", "A (b) is."),
        ("A, {{IPA|x}}, is. B", "A, is. B"), ("It is pronounced {{IPA|x}}. It is old.", "It is old."),
        ("A (b{{cn}}) c ( {{cn}} ) d", "A (b) c d"), ("f() and g(x) stay.", "f() and g(x) stay."),
    ],
)  # fmt: skip
def test_parentheses_are_cleaned_of_what_is_dropped(wikitext, text):
    assert shown(wikitext) == text


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("{{#if:a|yes|no}} {{#if:|yes|no}} {{#ifeq:a|a|same|other}}", "yes no same"),
        ("{{lc:ABC}}{{uc:d}}{{ucfirst:ef}}", "abcDEf"),
        ("{{PAGENAME}} of {{CURRENTYEAR}}", "Title of 2026"), ("{{formatnum:1234567.89}}", "1,234,567.89"),
        ("{{formatnum:1,234|R}}", "1234"), ("A {{#expr:1+1}} b.", ""), ("A {{#invoke:m|f}} b.", ""),
        ("A {{#switch:a|b=c}} b.", ""),
        ("A{{#tag:ref|note}} b.", "A b."), ("{{subst:snd}}x", "– x"), ("{{Template:nowrap|a b}}", "a b"),
    ],
)  # fmt: skip
def test_parser_functions(wikitext, text):
    assert shown(wikitext, date="2026-06-01") == text


PIECES = st.sampled_from(
    ["{{", "}}", "[[", "]]", "|", "{|", "|}", "''", "'''", "== a ==\n", "===", "<ref>", "</ref>", "<!--", "-->", "\n",
     "* ", "<nowiki>", "</nowiki>", "File:", "[http://x ", "]", "<br>", "<b>", "</b>", "&amp;", "&#xD800;", "&#0;",
     "&nosuch;", "{{{", "}}}", "<table>", "<td>", "=", ":", "__TOC__", "-{", "}-", "zh-hans:", ";", "{{convert|",
     "km|mi",
     "{{lang|fr|", "{{birth date|", "1/0", "{{frac|", "{{val|", "<math>", "</math>", "(", ")", "\x01", "&#1;", "。",
     ". A"]
)  # fmt: skip


@pytest.mark.parametrize("text", [
    "<!---->" * 50 + "[[A]]", "#x[[A]]" + "<!---->" * 50 + "text", "<ref " + '"a' * 50 + "<", "(" + "a<ref/>" * 20_000,
    "a" + "<ref/>" * 20_000,
])  # fmt: skip
def test_repeated_markup_takes_linear_time(text):
    began = time.monotonic()
    redirect_target(text)
    list(parse_wikitext(text))
    assert time.monotonic() - began < 5  # with backtracking: from minutes to years


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES | st.text(max_size=15), max_size=40), st.sampled_from(["en", "de", "zh", "sr", "xx"]))
def test_any_wikitext_is_parsed(pieces, language):
    for section, text in parse_wikitext("".join(pieces), Site(language)):
        assert text and text == text.strip() and len(text) <= MAX_CHARACTERS
        assert not any("\x0e" <= character <= "\x1b" for character in section + text)
        (section + text).encode()
