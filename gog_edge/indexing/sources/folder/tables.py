"""Read tables of pictures, CSV or JSON as exported: encoding, delimiter and header are detected.

A row that cannot be read is returned as a fault, so that every row of the file is accounted for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gog_edge.indexing.sources.folder.columns import FIELDS, find_roles
from gog_edge.indexing.sources.folder.decoding import decode_text
from gog_edge.indexing.sources.text import clean_line

CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv", ".tab"), (".json", ".jsonl", ".ndjson", ".geojson")
MAX_TABLE_BYTES = 512 * 2**20
MAX_CELL = 4 * 2**20  # characters, as much as a text file beside a picture
MAX_COLUMNS = 1000
MAX_PREAMBLE = 10  # lines before the header
MAX_MALFORMED = 200  # rows whose quotation marks are repaired one by one; later ones are read line by line
_WRAPPERS = ("properties", "attributes", "fields", "_source")
SAMPLE_ROWS = 40  # by which the delimiter is chosen
DELIMITERS = ",;\t|"
MORE_CELLS, NO_OBJECT, NO_JSON = ("row has more cells than the header", "entry of the table is not an object",
                                  "line of the table is not JSON")
_LARGE_CELLS = 4 * MAX_CELL  # characters of a cell in quotation marks whose end is looked for
BROKEN_QUOTES, BEFORE_HEADER = "quotation marks of the row are malformed", "line before the header of the table"


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells that are not blank, by column."""

    table: str
    number: int  # of its first line in a CSV file, of the object in a JSON file; from 1
    cells: Mapping[str, str]

    @property
    def place(self) -> str:
        """Return where the row is, for reports."""
        return f"{self.table}, row {self.number}"


@dataclass(frozen=True)
class Table:
    """A table with its rows. Every row of the file is in `rows` or in `faults`."""

    path: str  # below the folder
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()  # (reason, row)
    notices: tuple[str, ...] = ()
    problem: str = ""  # why the table has no rows


@dataclass
class _Reading:
    """What was found so far in one table."""

    path: str
    rows: list[Row] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, number: int, cells: Mapping[str, str]) -> None:
        self.rows.append(Row(self.path, number, {name: value for name, value in cells.items() if value.strip()}))

    def fault(self, reason: str, number: int, content: object) -> None:
        self.faults.append((reason, f"{self.path}, row {number}: {clean_line(str(content)[:80])}"))

    def table(self, columns: Sequence[str], problem: str = "") -> Table:
        return Table(self.path, tuple(columns), tuple(self.rows), tuple(self.faults), tuple(self.notices), problem)


def read_table(path: Path, name: str, assigned: Mapping[str, str] | None = None, encoding: str = "") -> Table:
    """Read a table.

    Args:
        path: the file.
        name: its path in reports.
        assigned: columns that the user gives, by field.
        encoding: see `decode_text`.

    Raises:
        SourceError: the table cannot be decoded as `encoding`.
    """
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            return Table(name, problem=f"is larger than {MAX_TABLE_BYTES // 2**20} MiB; split it")
        decoded = decode_text(path.read_bytes(), encoding, what=f"table '{name}'")
    except OSError as exc:
        return Table(name, problem=f"cannot be read ({exc.strerror or exc})")
    reading = _Reading(name, notices=[f"table '{name}' {notice}" for notice in decoded.notices])
    if not decoded.text.strip():
        return reading.table((), "is empty")
    if path.suffix.lower() in JSON_SUFFIXES:
        return _read_json(decoded.text, reading)
    return _read_csv(decoded.text, reading, assigned)


# --- CSV ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    line: int  # from 1
    cells: list[str]
    malformed: bool = False
    shortened: bool = False  # a cell had more than MAX_CELL characters

    @property
    def blank(self) -> bool:
        return not any(cell.strip() for cell in self.cells)


def _read_csv(text: str, reading: _Reading, assigned: Mapping[str, str] | None) -> Table:
    # io.StringIO splits at CR, LF and CRLF only; str.splitlines would split at U+2028, U+0085 and others too.
    lines = list(io.StringIO(text, newline=""))
    delimiters = DELIMITERS
    if lines[0].lower().startswith("sep=") and len(lines[0].strip()) == 5:  # written by spreadsheet programs
        delimiters, lines[0] = lines[0][4], "\n"
    headers = {delimiter: _find_header(lines, delimiter, assigned) for delimiter in delimiters}
    delimiter = max(headers, key=lambda one: _score(lines, one, headers[one], assigned))
    header = headers[delimiter]
    records = _records(lines, delimiter)
    columns: list[str] = []
    for record in records:
        if record.line < header and not record.blank:
            reading.fault(BEFORE_HEADER, record.line, delimiter.join(record.cells))
        elif record.line >= header and not record.blank:
            if len(record.cells) > MAX_COLUMNS:
                return Table(reading.path, notices=tuple(reading.notices),
                             problem=f"has more than {MAX_COLUMNS} columns")
            columns = _distinct(record.cells, reading)
            break
    _read_rows(records, columns, reading, delimiter)
    return reading.table(columns, "" if reading.rows or reading.faults else "has a header and no rows")


def _read_rows(records: Iterator[_Record], columns: Sequence[str], reading: _Reading, delimiter: str) -> None:
    short = repaired = shortened = 0
    for record in records:
        if record.blank:
            continue
        cells = record.cells
        if any(cell.strip() for cell in cells[len(columns) :]):
            # Which of the cells was split is unknown: the following ones, the licence among them, would be wrong.
            reading.fault(BROKEN_QUOTES if record.malformed else MORE_CELLS, record.line, delimiter.join(cells))
            continue
        short += len(cells) < len(columns)
        repaired += record.malformed
        shortened += record.shortened
        reading.add(record.line, dict(zip(columns, cells, strict=False)))
    if short:
        reading.notices.append(f"table '{reading.path}': {short} rows have fewer cells than the header; the missing "
                               "cells were taken as blank")
    if repaired:
        reading.notices.append(f"table '{reading.path}': {repaired} rows have quotation marks that are not closed or "
                               "not doubled; these rows were read up to the end of their line")
    if shortened:
        reading.notices.append(f"table '{reading.path}': {shortened} rows have a cell of more than {MAX_CELL:,} "
                               "characters, which is the limit; the rest of the cell was left out")


def _records(lines: Sequence[str], delimiter: str) -> Iterator[_Record]:
    """Yield the records. Where quotation marks are malformed, one line is read alone, and the next begins a record.

    So an unclosed quotation mark does not swallow the rest of the table.
    """
    at, malformed = 0, 0
    while at < len(lines):
        if malformed < MAX_MALFORMED:
            csv.field_size_limit(MAX_CELL)
            start, first = at, at
            reader = csv.reader((lines[number] for number in range(start, len(lines))), delimiter=delimiter,
                                skipinitialspace=True, strict=True)
            try:
                for cells in reader:
                    yield _Record(first + 1, cells)
                    first = start + reader.line_num
                return
            except csv.Error:
                at, malformed = first, malformed + 1
            if large := _read_large(lines, at, delimiter):
                record, at = large
                yield record
                continue
        yield _read_line(lines[at], at + 1, delimiter)
        at += 1


def _read_large(lines: Sequence[str], at: int, delimiter: str) -> tuple[_Record, int] | None:
    """Return a record with a cell above the limit and where the next one begins; None if it is malformed."""
    csv.field_size_limit(_LARGE_CELLS)
    reader = csv.reader((lines[number] for number in range(at, len(lines))), delimiter=delimiter,
                        skipinitialspace=True, strict=True)
    try:
        return _shortened(at + 1, next(reader, [])), at + reader.line_num
    except csv.Error:
        return None


def _read_line(line: str, number: int, delimiter: str) -> _Record:
    """Return the record of a line that is read alone."""
    csv.field_size_limit(len(line) + 1)
    for strict in (True, False):
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=strict), [])
            return _shortened(number, cells, malformed=not strict)
        except csv.Error:
            continue
    return _shortened(number, line.rstrip("\r\n").split(delimiter), malformed=True)


def _shortened(number: int, cells: Sequence[str], *, malformed: bool = False) -> _Record:
    """Return a record whose cells have at most MAX_CELL characters."""
    return _Record(number, [cell[:MAX_CELL] for cell in cells], malformed, any(len(cell) > MAX_CELL for cell in cells))


def _find_header(lines: Sequence[str], delimiter: str, assigned: Mapping[str, str] | None) -> int:
    """Return the line of the header: the first one that names a column for the picture, else the first one."""
    first = 0
    for number, record in enumerate(_records(lines[: 4 * MAX_PREAMBLE], delimiter)):
        if number >= MAX_PREAMBLE:
            break
        if record.blank:
            continue
        first = first or record.line
        known, naming = _known_columns(record.cells, assigned)
        if naming and known >= min(2, len(record.cells)):
            return record.line
    return first or 1


def _score(lines: Sequence[str], delimiter: str, header: int, assigned: Mapping[str, str] | None) -> tuple[float, ...]:
    """Return how well a delimiter fits: columns that are known, rows of the header's length, number of columns."""
    sample: list[_Record] = []
    for record in _records(lines[header - 1 : header - 1 + 20 * SAMPLE_ROWS], delimiter):
        if not record.blank:
            sample.append(record)
        if len(sample) > SAMPLE_ROWS:
            break
    if not sample:
        return (0.0, 0.0, 0.0)
    width = len(sample[0].cells)
    known, naming = _known_columns(sample[0].cells, assigned)
    regular = sum(len(record.cells) == width for record in sample) / len(sample)
    return (known + 2 * naming, regular if width > 1 else 0.0, width)


def _known_columns(cells: Sequence[str], assigned: Mapping[str, str] | None) -> tuple[int, bool]:
    """Return how many columns are known by their names, and whether one of them names the picture."""
    roles = find_roles([cell.strip() for cell in cells], assigned)
    return len({name for one in FIELDS for name in roles.columns[one]}), bool(roles.naming)


def _distinct(cells: Sequence[str], reading: _Reading) -> list[str]:
    """Return the names of the columns; a repeated name, and a missing one, gets the number of its column."""
    columns: dict[str, None] = {}
    for number, cell in enumerate(cells, 1):
        name = " ".join(cell.split())
        if name and name in columns:
            reading.notices.append(f"table '{reading.path}' has more than one column '{name}'; all of them are read")
        while not name or name in columns:
            name = f"{name} ({number})".strip()
        columns[name] = None
    return list(columns)


# --- JSON ---------------------------------------------------------------------------------------


def _read_json(text: str, reading: _Reading) -> Table:
    try:
        entries = list(enumerate(_entries(json.loads(text)), 1))
    except (ValueError, RecursionError) as exc:
        entries = _json_lines(text, reading)
        if not any(isinstance(entry, dict) for _, entry in entries) or len(reading.faults) > len(entries):
            reading.faults.clear()
            return reading.table((), f"is not JSON ({exc})")
    columns: dict[str, None] = {}
    for number, entry in entries:
        if not isinstance(entry, dict):
            reading.fault(NO_OBJECT, number, entry)
            continue
        cells = {clean_line(name): _joined(values) for name, values in _flatten(_unwrapped(entry)).items()}
        columns |= dict.fromkeys(cells)
        if len(columns) > MAX_COLUMNS:
            return Table(reading.path, notices=tuple(reading.notices), problem=f"has more than {MAX_COLUMNS} columns")
        reading.add(number, cells)
    return reading.table(list(columns), "" if reading.rows or reading.faults else "contains no objects")


def _joined(values: Sequence[str]) -> str:
    """Join the texts of an array: names in one line, paragraphs in lines of their own."""
    long = any("\n" in value or len(value) > 100 for value in values)
    return ("\n" if long else "; ").join(dict.fromkeys(values))


def _json_lines(text: str, reading: _Reading) -> list[tuple[int, Any]]:
    """Return (line, value) of a file of JSON lines; lines that are not JSON become faults."""
    entries: list[tuple[int, Any]] = []
    for number, line in enumerate(io.StringIO(text, newline=""), 1):
        if line.strip():
            try:
                entries.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                reading.fault(NO_JSON, number, line)
    return entries


def _entries(value: Any) -> list[Any]:
    """Return the objects of a JSON file: an array, the longest array within an object, objects by file name, or one."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    lists = [one for one in _lists(value, depth=2) if 2 * sum(isinstance(entry, dict) for entry in one) > len(one)]
    if lists and not _is_object(value):
        return max(lists, key=len)
    named = all("." in name for name in value) and value
    if named and all(isinstance(one, dict) for one in value.values()):
        return [{"file": name, **one} for name, one in value.items()]
    if named and all(isinstance(one, str) for one in value.values()):
        return [{"file": name, "text": one} for name, one in value.items()]
    titled = [one for one in value.values() if isinstance(one, dict) and find_roles(list(one)).columns["title"]]
    if len(value) > 1 and len(titled) == len(value):
        return [{"id": name, **one} for name, one in value.items()]
    return [value]


def _unwrapped(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an object with the values that GeoJSON, JSON:API and search engines store in an object within it."""
    for name in _WRAPPERS:
        inner = entry.get(name)
        if isinstance(inner, dict) and not find_roles(list(entry)).columns["title"]:
            outer = {key: value for key, value in entry.items() if key not in (name, "type")}
            return {**outer, **inner}
    return entry


def _is_object(value: Mapping[str, Any]) -> bool:
    """Return whether a JSON object describes one thing itself, and is not a list with a header."""
    roles = find_roles([name for name, one in value.items() if isinstance(one, str | int) and one != ""])
    return bool(roles.columns["title"] and roles.naming)


def _lists(value: Mapping[str, Any], depth: int) -> Iterator[list[Any]]:
    for one in value.values():
        if isinstance(one, list):
            yield one
        elif isinstance(one, dict) and depth > 1:
            yield from _lists(one, depth - 1)


def _flatten(value: Any, path: str = "", depth: int = 8) -> dict[str, list[str]]:
    """Return the texts of a JSON value by the path of their keys; entries of arrays share a path."""
    if isinstance(value, Mapping) and depth:
        found: dict[str, list[str]] = {}
        for name, one in value.items():
            for where, texts in _flatten(one, f"{path}.{name}" if path else str(name), depth - 1).items():
                found.setdefault(where, []).extend(texts)
        return found
    if isinstance(value, list) and depth:
        found = {}
        for one in value:
            for where, texts in _flatten(one, path, depth - 1).items():
                found.setdefault(where, []).extend(texts)
        return found
    if value is None or isinstance(value, Mapping | list):
        return {}
    text = value if isinstance(value, str) else json.dumps(value)
    return {path: [text]} if text.strip() else {}
