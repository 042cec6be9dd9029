"""Mutations of text formats by line, cell, tag and byte: tables, XML, templates, and damage that any file may have."""

from __future__ import annotations

import re
from random import Random

LONG = 200_000  # characters
_TAG = re.compile(rb"</?([A-Za-z]+)[^>]*>")
_MARKS = (b"{{", b"}}", b"[[", b"]]", b"{|", b"|}", b"'''", b"<ref>", b"</ref>", b"<!--", b"=", b"{{{", b"<nowiki>",
          b"__NOTOC__", b"-{", b"}-", b"[http://", b"&#0;", b"&#xD800;", b"&amp;#xD800;", b"&lol;", b"|", b":", b"#",
          b"{{convert|", b"{{formatnum:", b"{{#if:", b"<math>", b"\t", b"\x0b", b"\xe2\x80\xa8")  # fmt: skip
_JINJA = (
    b"{{ 1/0 }}",
    b"{{ messages.x.y.z }}",
    b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    b"{{ 'a' * 10**10 }}",
    b"{{ range(10**9) | list }}",
    b"{% include 'x' %}",
    b"{{ [].__class__ }}",
    b"{% if %}",
    b"{{ messages | tojson }}",
    b"{{ 2**(2**40) }}",
    b"{{ messages[10**30] }}",
    b"{{ 'a'.format(1) }}",
    b"{% set x = messages.append(1) %}",
    b"{{ raise_exception('no') }}",
    b"{{ strftime_now('%Y') }}",
    b"{%- endfor %}",
    b"{{ ''.join(messages) }}",
    b"{{ messages|length|list }}",
    b"{{ '%d' % 'a' }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    b"{{ messages[0]['role'] + 1 }}",
    b"{{ '\\ud800' }}",
    b"{% generation %}",
)


def mutate_bytes(rng: Random, data: bytes, *, comment: bytes = b"") -> bytes:
    """Return a file with damage that any text file may have."""
    place, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 4, 64))
    lines = data.splitlines(keepends=True) or [b""]
    line = rng.randrange(len(lines))
    whole = (b"", b" \n", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"\0" * 64, b"[" * 100_000, b"{" * 100_000)
    changes = (
        lambda: data[:place],
        lambda: data[place:],
        lambda: data[:place] + bytes(rng.randrange(256) for _ in range(size)) + data[place + size :],
        lambda: data[:place] + data[place + size :],
        lambda: (
            data[:place]
            + rng.choice((b"\0", b"\xff", b"\xed\xa0\x80", b"\x1b", b"\r", b",", b'"', b"]", b"}", b"\\"))
            + data[place:]
        ),
        lambda: b"".join(lines[:line] + lines[line + 1 :]),
        lambda: b"".join([*lines[:line], lines[line], *lines[line:]]),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "utf-7"))),
        lambda: data + rng.choice((data, b"\0", b"}", b"garbage", comment + b"\n", b"\n" * 1_000)),
        lambda: data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\xe2\x80\xa8"))),
        lambda: rng.choice(whole),
    )
    return rng.choice(changes)()


def mutate_table(rng: Random, data: bytes) -> bytes:
    """Return a CSV or TSV file with cells, columns, quotes or lines changed."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    delimiter = b"\t" if b"\t" in data.partition(b"\n")[0] else b","
    rows = [line.split(delimiter) for line in data.splitlines()]
    row = rows[rng.randrange(len(rows))] if rng.random() < 0.7 else rows[0]
    cell = rng.randrange(len(row))
    cells = (
        b"",
        b'"',
        b'""',
        b'"open',
        b"a" * LONG,
        b"x\0y",
        b"\xff",
        b"../../etc/passwd",
        b"/dev/zero",
        b"a" * 5_000,
        b"nan",
        b"\xed\xa0\x80",
        b"\xe2\x80\xa8",
        b'"two\nlines"',
        b"a\rb",
        b"=1+1",
        b"-1",
        b"1e999",
        row[cell] * 2,
        b"*?[",
        b".",
        b"\\\\server\\x",
        row[cell].upper(),
        b'a"b"c',
        b"\xc3",
        b"e\xcc\x81",
        b"[1, 2]",
        b"{",
        b";",
        b"<b>",
    )
    change = rng.randrange(10)
    if change < 4:
        row[cell] = rng.choice(cells)
    elif change == 4:
        del row[cell]
    elif change == 5:
        row.insert(cell, rng.choice((row[cell], b"", *cells[:3])))
    elif change == 6:
        for one in rows:  # a column lost or doubled
            place = cell % len(one)
            one[place : place + 1] = rng.choice(([], [one[place], one[place]]))
    elif change == 7:
        rows.insert(rng.randrange(len(rows) + 1), rng.choice(([], [b""], row, [b"x"] * 10_000)))
    elif change == 8:
        rng.shuffle(rows)
    else:
        delimiter = rng.choice((b";", b"|", b"\t", b",", b", ", b" ", b"\0"))
    return rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(delimiter.join(one) for one in rows) + b"\n"


def mutate_xml(rng: Random, data: bytes) -> bytes:
    """Return an XML file with tags lost, doubled, renamed or nested, or with hostile wikitext and entities."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    tags = list(_TAG.finditer(data))
    tag = rng.choice(tags)
    start, end = tag.span()
    name = tag[1]
    count = rng.choice((1, 3, 500, 20_000))
    bomb = b'<!DOCTYPE x [<!ENTITY a "%s"><!ENTITY b "%s">]>' % (b"ha" * 50, b"&a;" * 1_000)
    changes = (
        lambda: data[:start] + data[end:],
        lambda: data[:end] + tag[0] + data[end:],
        lambda: (
            data[:start] + tag[0].replace(name, rng.choice((b"x", name.upper(), b"page", b"text", b"a:b"))) + data[end:]
        ),
        lambda: data[:start] + tag[0].rstrip(b">").rstrip(b"/") + b' a="1" a="2">' + data[end:],
        lambda: (
            data[:start]
            + re.sub(rb'"[^"]*"', rng.choice((b'""', b'"nan"', b'"' + b"9" * 400 + b'"', b"x")), tag[0])
            + data[end:]
        ),
        lambda: data[:end] + rng.choice(_MARKS) * count + data[end:],
        lambda: data[:end] + b"".join(rng.choice(_MARKS) for _ in range(min(count, 300))) + data[end:],
        lambda: data[:end] + b"<a>" * count + data[end:],
        lambda: data[:end] + b"<a>" * count + b"</a>" * count + data[end:],
        lambda: bomb + data[:end] + b"&b;" + data[end:],
        lambda: data[:end] + b"<![CDATA[" + data[end:],
        lambda: data[:end] + b"x" * LONG + data[end:],
    )
    return rng.choice(changes)()


def mutate_template(rng: Random, data: bytes) -> bytes:
    """Return a Jinja template with statements lost, doubled or added."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    place = rng.randrange(len(data) + 1)
    change = rng.randrange(4)
    if change == 0:
        words = data.split(b" ")
        del words[rng.randrange(len(words))]
        return b" ".join(words)
    if change == 1:
        return data.replace(*rng.choice(((b"role", b"rule"), (b"content", b"contents"), (b"==", b"!="), (b"for", b"if"),
                                         (b"is string", b"is number"), (b"messages", b"message"))))  # fmt: skip
    return (rng.choice(_JINJA) + data) if change == 2 else data[:place] + rng.choice(_JINJA) + data[place:]
