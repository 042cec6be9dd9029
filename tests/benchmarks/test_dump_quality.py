"""The detector of leftover markup and gaps, and a whole run over a small dump."""

import json

import pytest

from benchmarks.dump_quality import count_pages, main, problems

HEAD = ('<mediawiki xml:lang="en"><siteinfo><base>https://en.wikipedia.org/wiki/X</base><namespaces>'
        '<namespace key="0"/></namespaces></siteinfo>')  # fmt: skip
PAGE = ('<page><title>{}</title><ns>0</ns><id>1</id><revision><text xml:space="preserve">{}</text></revision>'
        "</page>")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The river is 5 km (3 mi) long, and old.", set()), ("rises at . It", {"space before a full stop or comma"}),
        ("Vienna ( ) is", {"empty parentheses"}), ("Vienna (; born 1950)", {"empty parentheses"}),
        ("call f() here", set()),
        ("a town of. It", {"dangling word"}), ("a {{convert|5}}", {"braces"}), ("see [[Lake", {"brackets"}),
        ("x,, y", {"stray comma"}),
        ("a<ref>b", {"tags"}), ("thumb|left|Text", {"file options"}), ("-{zh-hans:a}-", {"variants"}),
        ("__NOTOC__", {"switches"}),
        ("REDIRECT River", {"redirects"}), ("de:See", {"links to other languages"}), ("| a = b", {"table rows"}),
        ("a&nbsp;b", {"entities"}),
        ("the '''bold", {"quotes"}), ("called “ ” by", {"empty quotation"}),
        ("version .5 and 1 .NET, U.S. law", set()),
    ],
)  # fmt: skip
def test_problems_of_a_paragraph(text, kinds):
    assert {kind for _, kind, _ in problems(text)} == kinds


def test_a_dump_is_measured_and_earlier_results_are_kept(tmp_path, capsys):
    dump, out = tmp_path / "x.xml", tmp_path / "out.json"
    dump.write_text(HEAD + PAGE.format("A", "A river {{snd}} long.") + PAGE.format("B", "") + "</mediawiki>")
    out.write_text(json.dumps({"before": {"all": {}}}))
    assert main([str(dump), "--label", "after", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results == json.loads(capsys.readouterr().out.splitlines()[-1]) and results["before"] == {"all": {}}
    found = results["after"]["dumps"]["x.xml"]
    assert (found["pages"], found["articles"], found["skipped"]) == (2, 1, {"article has no text": 1})
    assert results["after"]["all"]["unaccounted"] == 0 and found["with_gaps"] == found["with_markup"] == 0


def test_pages_are_counted_to_the_place_of_the_damage(tmp_path):
    dump = tmp_path / "x.xml"
    dump.write_text(HEAD + PAGE.format("A", "x") + PAGE.format("B", "y") + "<page><title>")
    assert count_pages(dump) == 3
