"""Tables as spreadsheet programs and museums write them: each row is read or returned as a fault."""

import codecs
import csv
import io
import json

import pytest

from gog_edge.errors import SourceError
from gog_edge.indexing.sources.folder import tables
from gog_edge.indexing.sources.folder.tables import read_table

ROWS = [("file", "title", "text"), ("a.jpg", "Vase, blue; old", "He said \"yes\".\nTwice."), ("b.jpg", "Café|β", "Été")]


def read(tmp_path, content, name="list.csv", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, name, **options)


def cells(table):
    return [dict(row.cells) for row in table.rows]


def as_csv(delimiter, terminator, rows=ROWS):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=terminator).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("terminator", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
     ("utf-16-le", b""), ("utf-16-be", b""), ("utf-32-le", codecs.BOM_UTF32_LE), ("cp1252", b"")],
)  # fmt: skip
def test_delimiters_line_ends_and_encodings(tmp_path, delimiter, terminator, encoding, mark):
    rows = [tuple(cell.replace("β", "b") for cell in row) for row in ROWS] if encoding == "cp1252" else ROWS
    table = read(tmp_path, mark + as_csv(delimiter, terminator, rows).encode(encoding))
    assert table.columns == rows[0] and not table.faults and not table.problem
    assert [tuple(row.values()) for row in cells(table)] == rows[1:]
    assert any("Windows-1252" in notice for notice in table.notices) == (encoding == "cp1252")


@pytest.mark.parametrize("letters", ["Ελληνικά", "Русский", "日本語", "العربية", "한국어", "ไทย"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark_in_other_scripts(tmp_path, letters, encoding):
    table = read(tmp_path, f"file,text\na.jpg,{letters * 40}\n".encode(encoding))
    assert cells(table) == [{"file": "a.jpg", "text": letters * 40}]


LETTERS = {"cp1251": "Синяя ваза", "shift_jis": "青い花瓶", "gb18030": "蓝色花瓶", "euc_kr": "파란 꽃병",
           "iso8859-7": "Μπλε βάζο", "cp1250": "Modrá váza šťěř", "mac_roman": "Été bleu",
           "iso2022_jp": "青い花瓶"}  # fmt: skip


@pytest.mark.parametrize("encoding", LETTERS)
def test_a_given_encoding_is_used_where_a_table_is_not_in_utf8(tmp_path, encoding):
    content = f"file,title\na.jpg,{LETTERS[encoding]}\n"
    for data in (content.encode(encoding), content.encode(), codecs.BOM_UTF16_LE + content.encode("utf-16-le")):
        table = read(tmp_path, data, encoding=encoding)
        assert cells(table) == [{"file": "a.jpg", "title": LETTERS[encoding]}] and not table.notices


def test_characters_that_windows_adds_to_an_encoding_are_read(tmp_path):
    table = read(tmp_path, "file,title\na.jpg,花瓶①\n".encode("cp932"), encoding="Shift_JIS")
    assert cells(table) == [{"file": "a.jpg", "title": "花瓶①"}]


def test_a_table_that_does_not_fit_the_given_encoding_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"table 'list\.csv' cannot be decoded as euc_kr .*--encoding"):
        read(tmp_path, "file,title\na.jpg,Синяя ваза ё\n".encode("cp1251"), encoding="euc_kr")
    (notice,) = read(tmp_path, "file,title\na.jpg,Синяя ваза\n".encode("cp1251")).notices
    assert notice.endswith("if letters are wrong, save it as UTF-8 or give --encoding")


@pytest.mark.parametrize("quote", ['"', ""])
@pytest.mark.parametrize("line", ["word ", "word\n"])
def test_the_rest_of_a_cell_above_the_limit_is_left_out(tmp_path, quote, line):
    long = (line if quote else "word ") * 900_000  # 4.5 million characters
    table = read(tmp_path, f"file,text,title\na.jpg,{quote}{long}{quote},Vase\nb.jpg,short,Bowl\n")
    assert [(row.number, row.cells["title"]) for row in table.rows] == [(2, "Vase"), (3 + long.count("\n"), "Bowl")]
    assert table.rows[0].cells["text"] == long[: 4 * 2**20] and not table.faults
    (notice,) = table.notices
    assert "1 rows have a cell of more than 4,194,304 characters" in notice and "quotation" not in notice


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_rows_end_at_cr_and_lf_only(tmp_path, separator):
    table = read(tmp_path, f"file,text,licence\na.jpg,First{separator}second,CC0\nb.jpg,Other,CC0\n")
    assert cells(table)[0] == {"file": "a.jpg", "text": f"First{separator}second", "licence": "CC0"}
    assert len(table.rows) == 2 and not table.faults


def test_long_cells_are_read_and_longer_ones_are_faults(tmp_path, monkeypatch):
    long = "word " * 600_000  # 3 MB; the limit of the csv module is 131,072
    table = read(tmp_path, f"file,text\na.jpg,\"{long}\"\nb.jpg,short\n")
    assert table.rows[0].cells["text"] == long and table.rows[1].cells["text"] == "short"
    monkeypatch.setattr(tables, "MAX_CELL", 100)
    table = read(tmp_path, f"file,text,x\na.jpg,\"{'y' * 200},{'z' * 200}\"\nb.jpg,short\n")
    assert [row.cells["file"] for row in table.rows if "text" in row.cells][-1] == "b.jpg"


def test_rows_with_more_cells_than_the_header_are_faults(tmp_path):
    """A text with an unquoted comma shifts the licence: the row must not be cited with it."""
    table = read(tmp_path, "file,text,licence\na.jpg,Blue, old,CC0\nb.jpg,Red,CC0,,\nc.jpg,Green\n")
    assert cells(table) == [{"file": "b.jpg", "text": "Red", "licence": "CC0"}, {"file": "c.jpg", "text": "Green"}]
    assert table.faults == (("row has more cells than the header", "list.csv, row 2: a.jpg,Blue,old,CC0"),)
    assert any("1 rows have fewer cells" in notice for notice in table.notices)


@pytest.mark.parametrize("quoted", ['"Foo', '"Foo"bar', '"He said "hi" to me"', '"Foo""'])
def test_malformed_quotes_end_with_their_line(tmp_path, quoted):
    rows = "".join(f'{name}.jpg,"Title {name}"\n' for name in "bcdef")
    table = read(tmp_path, f"file,title\na.jpg,{quoted}\n{rows}")
    assert [row.cells["file"] for row in table.rows] == [f"{name}.jpg" for name in "abcdef"]
    assert table.rows[1].cells["title"] == "Title b"
    assert any("quotation marks" in notice for notice in table.notices)


def test_many_malformed_quotes_are_read_in_linear_time(tmp_path):
    rows = "".join(f'{number}.jpg,"open {number}\n' for number in range(20_000))
    table = read(tmp_path, f"file,title\n{rows}")
    assert len(table.rows) == 20_000
    assert any("20000 rows have quotation marks" in notice for notice in table.notices)


def test_nul_bytes_are_left_out(tmp_path):
    table = read(tmp_path, b"file,title\na.jpg,Bl\0ue\nb.jpg,Red\n")
    assert cells(table)[0]["title"] == "Blue"
    assert table.notices == ("table 'list.csv' has 1 NUL characters, which were left out",)


def test_single_bytes_that_are_not_utf8_do_not_spoil_the_rest(tmp_path):
    text = "file,title\na.jpg,Größe\nb.jpg,Früher\nc.jpg,".encode() + b"Stra\xdfe\n"
    table = read(tmp_path, text)
    assert [row["title"] for row in cells(table)] == ["Größe", "Früher", "Straße"]
    assert "1 bytes that are not UTF-8" in table.notices[0]


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "is empty"), (b"\xef\xbb\xbf\n \n", "is empty"), (b"file,title\n", "has a header and no rows"),
    (b"a," * 2000, "has more than 1000 columns"),
])  # fmt: skip
def test_tables_without_rows_say_so(tmp_path, content, problem):
    table = read(tmp_path, content)
    assert table.problem == problem and not table.rows and not table.faults


def test_repeated_and_missing_column_names_are_kept_apart(tmp_path):
    table = read(tmp_path, "file,text,text,,text (3)\na.jpg,one,two,three,four\n")
    assert len(set(table.columns)) == 5 and len(table.rows[0].cells) == 5
    assert any("more than one column 'text'" in notice for notice in table.notices)


def test_lines_before_the_header_are_faults(tmp_path):
    table = read(tmp_path, "sep=;\nCatalogue of the museum;;\n\nDatei;Titel;Lizenz\na.jpg;Vase;CC0\n")
    assert table.columns == ("Datei", "Titel", "Lizenz")
    assert cells(table) == [{"Datei": "a.jpg", "Titel": "Vase", "Lizenz": "CC0"}]
    assert [reason for reason, _ in table.faults] == ["line before the header of the table"]


def test_values_that_are_named_like_columns_are_not_the_header(tmp_path):
    table = read(tmp_path, "Object ID,Title,Classification\n1,Portrait,Photo\n2,Name,Image\n")
    assert table.columns == ("Object ID", "Title", "Classification") and len(table.rows) == 2


def test_blank_rows_are_no_rows(tmp_path):
    table = read(tmp_path, "file,title\n\n,,\na.jpg,Vase\n   \n")
    assert len(table.rows) == 1 and not table.faults


def test_spaces_after_the_delimiter_are_allowed_before_quotes(tmp_path):
    table = read(tmp_path, 'file, title, licence\na.jpg, "Vase, blue", CC0\n')
    assert cells(table) == [{"file": "a.jpg", "title": "Vase, blue", "licence": "CC0"}]


# --- JSON ---------------------------------------------------------------------------------------

OBJECTS = [{"file": "a.jpg", "title": "Vase", "n": 3, "none": None, "tags": ["x", "y"]}, {"file": "b.jpg",
                                                                                          "title": "Cup"}]
EXPECTED = [{"file": "a.jpg", "title": "Vase", "n": "3", "tags": "x; y"}, {"file": "b.jpg", "title": "Cup"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS),
        json.dumps({"info": {"total": 2}, "data": OBJECTS}),
        json.dumps({"response": {"items": OBJECTS, "facets": [1, 2, 3]}}),
        "\n".join(json.dumps(one) for one in OBJECTS),
        "\r\n\r\n".join(json.dumps(one) for one in OBJECTS) + "\r\n",
        json.dumps({one["file"]: {key: value for key, value in one.items() if key != "file"} for one in OBJECTS}),
    ],
    ids=["array", "wrapped", "nested", "lines", "lines-crlf", "by-name"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_forms_of_json(tmp_path, text, encoding):
    table = read(tmp_path, text.encode(encoding), "list.json")
    assert cells(table) == EXPECTED and not table.faults


def test_nested_objects_become_columns(tmp_path):
    value = [{"images": {"web": {"url": "u", "filename": "a.jpg"}}, "creators": [{"name": "Ann"}, {"name": "Bob"}]}]
    table = read(tmp_path, json.dumps(value), "list.json")
    assert cells(table) == [{"images.web.url": "u", "images.web.filename": "a.jpg", "creators.name": "Ann; Bob"}]


@pytest.mark.parametrize(
    "entry",
    [{"type": "Feature", "properties": {"image": "a.jpg", "name": "Well"}, "geometry": None},
     {"type": "photo", "attributes": {"image": "a.jpg", "name": "Well"}},
     {"fields": {"image": "a.jpg", "name": "Well"}}, {"_source": {"image": "a.jpg", "name": "Well"}}],
    ids=["GeoJSON", "JSON:API", "fields", "search engine"],
)  # fmt: skip
def test_values_within_an_object_are_those_of_the_picture(tmp_path, entry):
    assert cells(read(tmp_path, json.dumps([entry]), "list.json")) == [{"image": "a.jpg", "name": "Well"}]
    titled = {"title": "Map", "properties": {"name": "x"}}
    assert cells(read(tmp_path, json.dumps([titled]), "list.json")) == [{"title": "Map", "properties.name": "x"}]


def test_json_by_file_name_with_texts(tmp_path):
    table = read(tmp_path, json.dumps({"a.jpg": "One.", "b.png": "Two."}), "captions.json")
    assert cells(table) == [{"file": "a.jpg", "text": "One."}, {"file": "b.png", "text": "Two."}]


def test_entries_that_are_not_objects_and_broken_lines_are_faults(tmp_path):
    table = read(tmp_path, json.dumps([*OBJECTS, 7, None, "x"]), "list.json")
    assert len(table.rows) == 2 and len(table.faults) == 3
    lines = "\n".join([json.dumps(OBJECTS[0]), "{broken", json.dumps(OBJECTS[1])])
    table = read(tmp_path, lines, "list.jsonl")
    assert cells(table) == EXPECTED
    assert table.faults == (("line of the table is not JSON", "list.jsonl, row 2: {broken"),)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '[{"a":', "file,title\na.jpg,x", "1" * 5000, '{"a": ' * 5000])
def test_files_that_are_not_json_say_so(tmp_path, text):
    table = read(tmp_path, text, "list.json")
    assert not table.rows and (table.problem.startswith("is not JSON") or table.faults)
