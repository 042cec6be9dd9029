"""Bring together what tables and text files say about each picture of a folder, and account for every row."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from gog_edge.indexing.sources.base import Skipped
from gog_edge.indexing.sources.folder.columns import (
    Roles,
    field_value,
    find_roles,
    joined_values,
    plain_name,
    without_markup,
)
from gog_edge.indexing.sources.folder.decoding import decode_text
from gog_edge.indexing.sources.folder.listing import FILE, PICTURE_SUFFIXES, TABLE_ROW, Listing, shown_name
from gog_edge.indexing.sources.folder.matching import AMBIGUOUS, MISSING, NO_NAME, NO_PICTURE, FileNames, Match
from gog_edge.indexing.sources.folder.tables import JSON_SUFFIXES, Row, Table, read_table
from gog_edge.indexing.sources.text import MAX_CHARACTERS, MAX_TITLE, clean_line, clean_lines
from gog_edge.retrieval.text.tokens import name_key

MAX_TEXT_BYTES = 4 * 2**20  # of a text file
MAX_SUGGESTIONS = 20  # rows for which the nearest file name is looked up, as many as a report shows
MAX_CONFLICTS = 20  # pictures whose contradicting rows are named, and rows of each
MAX_COMPARED = 100  # groups of a picture's rows that a further row may join
MAX_COLUMNS_NAMED = 40  # in a notice
SAMPLE_ROWS = 2000  # by which a column of file names is recognised
UNUSED_PICTURE = "row of a picture that is not used"
NO_COLUMN, NO_MATCH, NO_OWNER = ("table has no column that names a picture", "table names no picture of the folder",
                                 "text belongs to no picture")
_TRUE = ("true", "yes", "1", "t", "y", "ja", "oui", "si")
_PUBLIC_DOMAIN = ("is public domain", "public domain", "ispublicdomain")


@dataclass(frozen=True)
class Description:
    """What is known of a picture; blank where nothing is."""

    title: str = ""
    caption: str = ""
    text: str = ""
    licence: str = ""
    attribution: str = ""

    def contradicts(self, other: Description) -> bool:
        """Return whether both state a title, caption, licence or attribution, and not the same."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("title", "caption", "licence", "attribution"))
        return any(one and two and one != two for one, two in pairs)

    def merged(self, other: Description) -> Description:
        """Return both; the texts one after the other, except one that is repeated."""
        repeated = f"\n{other.text}\n" in f"\n{self.text}\n"
        return Description(
            self.title or other.title, self.caption or other.caption,
            self.text if repeated else "\n".join(text for text in (self.text, other.text) if text),
            self.licence or other.licence, self.attribution or other.attribution)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A picture with its articles, and where they are from."""

    key: str
    articles: tuple[Description, ...]  # at least one; with title and caption
    rows: tuple[str, ...] = ()  # places of the rows that are accounted for with this picture
    texts: tuple[str, ...] = ()  # text files, likewise


@dataclass(frozen=True)
class Catalogue:
    """The pictures of a folder with their descriptions, and everything that belongs to none of them."""

    entries: Mapping[str, Entry]  # by file name
    rows: int  # of all tables, faulty ones included
    skipped: tuple[Skipped, ...]
    used_tables: tuple[str, ...]
    notices: tuple[str, ...]
    columns: tuple[str, ...]  # of all tables

    def has_column(self, name: str) -> bool:
        """Return whether a table has a column of this name."""
        return plain_name(name) in {plain_name(column) for column in self.columns}


def read_catalogue(root: Path, listing: Listing, assigned: Mapping[str, str], encoding: str = "") -> Catalogue:
    """Read all tables and texts of a folder.

    Args:
        root: the folder.
        listing: its files.
        assigned: names of columns by field that the user gives.
        encoding: see `decode_text`.

    Raises:
        SourceError: a table or text cannot be decoded as `encoding`.
    """
    return _Reader(root, listing, assigned, encoding).read()


@dataclass
class _Reader:
    root: Path
    listing: Listing
    assigned: Mapping[str, str]
    encoding: str
    rows: dict[str, list[tuple[Row, Description]]] = field(default_factory=dict)  # by picture
    owned: dict[str, list[str]] = field(default_factory=dict)  # places of rows by the first picture that they name
    skipped: list[Skipped] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    unused: dict[str, dict[str, None]] = field(default_factory=dict)  # columns by table
    suggestions: int = 0
    files: dict[str, str] = field(init=False)  # paths of the pictures by their names as text
    names: FileNames = field(init=False)  # of the pictures
    others: FileNames = field(init=False)  # of the files that are skipped

    def __post_init__(self) -> None:
        self.files = {shown_name(name): name for name in self.listing.pictures}
        self.names = FileNames(self.files, PICTURE_SUFFIXES)
        self.others = FileNames([one.item for one in self.listing.skipped], frozenset())

    def read(self) -> Catalogue:
        tables = [read_table(self.root / name, shown_name(name), self.assigned, self.encoding)
                  for name in self.listing.tables]
        for table in tables:
            self._read_table(table)
        self.notices += [f"{owner}: these columns are not used: {_listed(tuple(columns))}"
                         for owner, columns in self.unused.items()]
        texts = self._texts_of_pictures()
        entries: dict[str, Entry] = {}
        conflicts: list[str] = []
        keys = _distinct_keys(self.listing.pictures)
        for name in self.listing.pictures:
            entries[name] = self._entry(name, keys[name], texts.get(name, ()), conflicts)
        self._account_for_texts(entries, texts)
        if conflicts:
            more = f" and {len(conflicts) - MAX_CONFLICTS} more" if len(conflicts) > MAX_CONFLICTS else ""
            self.notices.append("rows that contradict each other became articles of their own for these pictures: "
                                f"{'; '.join(conflicts[:MAX_CONFLICTS])}{more}")
        return Catalogue(
            entries, sum(len(table.rows) + len(table.faults) for table in tables), tuple(self.skipped),
            tuple(self.used), tuple(dict.fromkeys(self.notices)),
            tuple(dict.fromkeys(column for table in tables for column in table.columns)))  # fmt: skip

    # --- tables -------------------------------------------------------------------------------

    def _read_table(self, table: Table) -> None:
        self.notices += table.notices
        self.skipped += [Skipped(reason, row, TABLE_ROW) for reason, row in table.faults]
        if table.problem:
            self.notices.append(f"table '{table.path}' is not used: it {table.problem}")
            self.skipped.append(Skipped(f"table {table.problem.partition(' (')[0]}", table.path, FILE))
            return
        roles = self._roles(table)
        if roles is None:
            seen = _listed(table.columns)
            self.notices.append(f"table '{table.path}' is not used: no column names a picture. Its columns are {seen}; "
                                "rename one to 'file', or give --column file=NAME")
            self.skipped.append(Skipped(NO_COLUMN, table.path, FILE))
            self.skipped += [Skipped(NO_COLUMN, row.place, TABLE_ROW) for row in table.rows]
            return
        if roles.unused:
            is_object = table.path.lower().endswith(JSON_SUFFIXES) and len(table.rows) == 1
            owner = "JSON objects" if is_object else f"table '{table.path}'"  # there may be one file for each picture
            self.unused.setdefault(owner, {}).update(dict.fromkeys(roles.unused))
        matched = sum(self._read_row(row, roles) for row in table.rows)
        if matched:
            self.used.append(table.path)
        else:
            self.notices.append(f"table '{table.path}' is not used: none of its rows names a picture of the folder")
            self.skipped.append(Skipped(NO_MATCH, table.path, FILE))

    def _roles(self, table: Table) -> Roles | None:
        """Return the roles of the columns; a column whose cells name pictures is found under any name."""
        roles = find_roles(table.columns, self.assigned)
        base = _folder_of(table.path)
        if "file" in self.assigned and roles.columns["file"]:
            return roles
        if roles.naming and any(self._find(row, roles, base).files for row in table.rows):
            return roles
        if self._own_picture(table.path) and len(table.rows) == 1:
            return roles  # an object beside its picture
        best = max(table.columns, key=lambda column: self._named_share(table, column, base), default="")
        if best and self._named_share(table, best, base) >= 0.5:
            if self.names.find(best, base).files:
                self.notices.append(f"table '{table.path}' has no header: its first line names a picture; add a line "
                                    "such as file,title,text")
            else:
                self.notices.append(f"table '{table.path}': the column '{best}' is taken as the file name, because "
                                    "its cells name pictures of the folder")
            return roles.with_file(best)
        return roles if roles.columns["file"] or roles.columns["address"] else None

    def _named_share(self, table: Table, column: str, base: str) -> float:
        cells = [row.cells[column] for row in table.rows[:SAMPLE_ROWS] if column in row.cells]
        return sum(bool(self.names.find(cell, base).files) for cell in cells) / len(cells) if cells else 0.0

    def _find(self, row: Row, roles: Roles, base: str) -> Match:
        """Return the pictures of a row: by the columns of file names, then of addresses, then of numbers."""
        failed: list[Match] = []
        finders = (("file", lambda cell: self.names.find(cell, base)), ("address", self.names.find_address),
                   ("number", self.names.find_number))
        for one, find in finders:
            for column in roles.columns[one]:  # type: ignore[index]
                if column in row.cells:
                    match = find(row.cells[column])
                    if match.files:
                        return match
                    failed.append(match)
        own = self._own_picture(row.table) if row.number == 1 else ()
        if own:
            return Match(own)
        return failed[0] if failed else Match((), NO_NAME)

    def _own_picture(self, table: str) -> tuple[str, ...]:
        """Return the picture of the same name as a JSON file: `vase.jpg` for `vase.json` or `vase.jpg.json`."""
        if not table.lower().endswith(JSON_SUFFIXES):
            return ()
        match = self.names.find(str(PurePosixPath(table).with_suffix("")))
        return match.files if len(match.files) == 1 else ()

    def _read_row(self, row: Row, roles: Roles) -> bool:
        match = self._find(row, roles, _folder_of(row.table))
        if not match.files:
            cell = field_value(row.cells, roles.columns["file"])
            other = self.others.find(cell, _folder_of(row.table)).files if match.reason == MISSING else ()
            reason, item = (UNUSED_PICTURE, other[0]) if other else (match.reason, self._explain(row, roles, match))
            self.skipped.append(Skipped(reason, f"{row.place}: {item}", TABLE_ROW))
            return False
        described = _describe(row, roles)
        for name in match.files:
            self.rows.setdefault(self.files[name], []).append((row, described))
        self.owned.setdefault(self.files[match.files[0]], []).append(row.place)
        return True

    def _explain(self, row: Row, roles: Roles, match: Match) -> str:
        cell = field_value(row.cells, roles.naming)
        shown = f"'{clean_line(cell)[:100]}'"
        if match.reason == AMBIGUOUS:
            return f"{shown} may be {', '.join(repr(name) for name in match.near[:5])}"
        if match.reason in (MISSING, NO_PICTURE) and self.suggestions < MAX_SUGGESTIONS:
            self.suggestions += 1
            near = self.names.nearest(cell)
            return f"{shown}; the nearest file is '{near}'" if near else shown
        return shown if cell else "; ".join(row.cells.values())[:100]

    # --- text files ---------------------------------------------------------------------------

    def _texts_of_pictures(self) -> dict[str, tuple[str, ...]]:
        """Return the text files of each picture: `vase.txt` or `vase.jpg.txt` for `vase.jpg`."""
        files = {shown_name(name): name for name in self.listing.texts}
        known = FileNames(files, frozenset())
        found: dict[str, list[str]] = {}
        for name in self.listing.pictures:
            shown = PurePosixPath(shown_name(name))
            for wanted in (str(shown.with_suffix("")), str(shown)):
                for suffix in (".txt", ".md"):
                    found.setdefault(name, []).extend(files[text] for text in known.find_path(f"{wanted}{suffix}"))
        return {name: tuple(dict.fromkeys(texts)) for name, texts in found.items() if texts}

    def _account_for_texts(self, entries: dict[str, Entry], texts: Mapping[str, Sequence[str]]) -> None:
        """Count each text file once: with the first picture that it belongs to, else as skipped."""
        taken: set[str] = set()
        for name, own in texts.items():
            fresh = [text for text in own if text not in taken]
            taken.update(fresh)
            entries[name] = replace(entries[name], texts=tuple(shown_name(text) for text in fresh))
        self.skipped += [Skipped(NO_OWNER, shown_name(text), FILE) for text in self.listing.texts
                         if text not in taken]

    def _read_text(self, name: str) -> str:
        try:
            with (self.root / name).open("rb") as stream:
                data = stream.read(MAX_TEXT_BYTES + 1)
        except OSError as exc:
            self.notices.append(f"text '{shown_name(name)}' cannot be read ({exc.strerror or exc})")
            return ""
        truncated = len(data) > MAX_TEXT_BYTES
        decoded = decode_text(data[:MAX_TEXT_BYTES], self.encoding, what=f"text '{shown_name(name)}'",
                              truncated=truncated)
        self.notices += [f"text '{shown_name(name)}' {notice}" for notice in decoded.notices]
        if truncated:
            self.notices.append(f"text '{shown_name(name)}' is longer than {MAX_TEXT_BYTES // 2**20} MiB; the rest was "
                                "left out")
        return decoded.text.strip()

    # --- entries ------------------------------------------------------------------------------

    def _entry(self, name: str, key: str, texts: Sequence[str], conflicts: list[str]) -> Entry:
        groups, places = _grouped(self.rows.get(name, ()))
        if len(groups) > 1:
            more = f" and {len(places) - MAX_CONFLICTS} more" if len(places) > MAX_CONFLICTS else ""
            conflicts.append(f"{key} ({', '.join(places[:MAX_CONFLICTS])}{more})")
        groups = groups or [Description()]
        for text in texts:
            groups[0] = _with_text(groups[0], self._read_text(text))
        articles = tuple(_completed(group, key) for group in groups)
        return Entry(key, articles, tuple(self.owned.get(name, ())))


def _grouped(rows: Sequence[tuple[Row, Description]]) -> tuple[list[Description], list[str]]:
    """Merge the rows of a picture that do not contradict each other; return them with the places of their first rows.

    A placeholder may be named by every row of a table, so that a row is compared with the first groups only.
    """
    groups: list[Description] = []
    places: list[str] = []
    known: dict[Description, int] = {}  # groups of earlier rows, by what contradicts
    for row, described in rows:
        stated = replace(described, text="")
        at = known.get(stated)
        if at is None:
            at = next((n for n, group in enumerate(groups[:MAX_COMPARED]) if not group.contradicts(described)), None)
        if at is None:
            at = len(groups)
            groups.append(described)
            places.append(row.place)
        else:
            groups[at] = groups[at].merged(described)
        known[stated] = at
    return groups, places


def _describe(row: Row, roles: Roles) -> Description:
    columns = roles.columns
    title, caption, licence, attribution = (without_markup(text) for text in (
        field_value(row.cells, columns["title"]), field_value(row.cells, columns["caption"]),
        field_value(row.cells, columns["licence"]) or _public_domain(row.cells),
        joined_values(row.cells, columns["attribution"], "; ")))  # fmt: skip
    text = without_markup(joined_values(row.cells, columns["text"], "\n")).strip()
    details = ". ".join(f"{_label(column)}: {clean_line(without_markup(row.cells[column])).rstrip('.')}"
                        for column in columns["detail"] if column in row.cells)
    text = "\n".join(part for part in (text, f"{details}." if details else "") if part)
    title, caption = clean_line(title), clean_line(caption)
    long = [one for one, limit in ((title, MAX_TITLE), (caption, MAX_CHARACTERS)) if len(one) > limit]
    text = "\n".join([*long, text]).strip()
    return Description(_shortened(title, MAX_TITLE), _shortened(caption, MAX_CHARACTERS), text, clean_line(licence),
                       clean_line(attribution))


def _shortened(line: str, limit: int) -> str:
    return line if len(line) <= limit else f"{line[: limit - 1].rpartition(' ')[0] or line[: limit - 1]}…"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_COLUMNS_NAMED} more" if len(names) > MAX_COLUMNS_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:MAX_COLUMNS_NAMED]) + more


def _label(column: str) -> str:
    """Return a column name as the beginning of a sentence: `artistDisplayName` -> `Artist display name`."""
    plain = column if " " in column.strip() or not column.isascii() else plain_name(column.rpartition(".")[2] or column)
    return clean_line(plain[:1].upper() + plain[1:])


def _public_domain(cells: Mapping[str, str]) -> str:
    flags = (value.strip().lower() for column, value in cells.items() if plain_name(column) in _PUBLIC_DOMAIN)
    return "public domain" if any(flag in _TRUE for flag in flags) else ""


def _with_text(known: Description, text: str) -> Description:
    """Add a text file, whose first line is the title."""
    title, _, rest = text.partition("\n")
    title = clean_line(title.lstrip("# "))
    if not known.title or known.title == title:
        return known.merged(Description(title=title, text=clean_lines(rest)))
    return known.merged(Description(text=clean_lines(f"{title}\n{rest}")))


def _completed(known: Description, key: str) -> Description:
    """Return a description with a title that can be found, and a caption."""
    title = known.title if name_key(known.title) else _title_from_name(key)
    return replace(known, title=title, caption=known.caption or known.title or title)


def _title_from_name(key: str) -> str:
    """Return a title for a file name: `blue_vase-2.jpg` -> `blue vase-2`."""
    path = PurePosixPath(key)
    candidates = (clean_line(path.stem.replace("_", " ")), path.name, key)
    return next((title for title in candidates if name_key(title)), f"picture {clean_line(key)}")


def _distinct_keys(names: Sequence[str]) -> dict[str, str]:
    """Return the key of each picture: its path as text, which no other picture has."""
    taken: set[str] = set()
    keys: dict[str, str] = {}
    for name in names:
        shown = unicodedata.normalize("NFC", clean_line(shown_name(name))) or "picture"
        key, number = shown, 1
        while key in taken:
            number += 1
            key = f"{shown} ({number})"
        taken.add(key)
        keys[name] = key
    return keys


def _folder_of(path: str) -> str:
    parent = PurePosixPath(path).parent.as_posix()
    return "" if parent == "." else parent

