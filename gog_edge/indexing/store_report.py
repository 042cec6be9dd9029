"""Writes what became of the items of a snapshot into a segment; `SegmentReader.report` reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlite_utils import Database

from gog_edge.indexing.sources.base import Notice, Present, SharedFile, Skipped, Used
from gog_edge.indexing.sources.text import clean_line

MAX_EXAMPLES = 20  # stored per reason for skipping
MAX_EXAMPLE = 300  # characters
MAX_NOTICES = 1000  # stored; the others are counted in a row with an empty text
_COUNT_ITEMS = (
    "INSERT INTO items VALUES (?, ?, ?) ON CONFLICT (kind) DO UPDATE SET present = present + excluded.present, "
    "used = used + excluded.used"
)
_COUNT_SKIPPED = (
    "INSERT INTO skipped VALUES (?, ?, ?, ?) ON CONFLICT (reason, kind) DO UPDATE SET count = count + excluded.count, "
    "examples = excluded.examples"
)
# The rank of a file: 0 if an article shows it, 1 if one refers to it, 2 if none is known.
_ADD_FILE = (
    "INSERT INTO build_files VALUES (?, ?, ?, ?) ON CONFLICT (kind, item) DO UPDATE SET rank = excluded.rank, "
    "reason = excluded.reason WHERE excluded.rank < rank"
)
_ADD_NOTICE = (
    "INSERT INTO notices SELECT CASE WHEN stored < :most THEN :text ELSE '' END, "
    "CASE WHEN stored < :most THEN stored ELSE 1 END FROM (SELECT count(*) AS stored FROM notices WHERE text <> '') "
    "WHERE NOT EXISTS (SELECT 1 FROM notices WHERE text = :text) "
    "ON CONFLICT (text) DO UPDATE SET number = number + 1"
)


class ReportWriter:
    """Counts items that are present, used and skipped, in the transactions of the segment's writer."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def write(self, record: Present | Used | Skipped | SharedFile | Notice) -> None:
        """Count the items of a record, or store a notice."""
        match record:
            case Present():
                self._db.execute(_COUNT_ITEMS, (record.kind, record.count, 0))
            case Used():
                self._db.execute(_COUNT_ITEMS, (record.kind, 0, record.count))
            case Skipped():
                self.skip_all(record.reason, record.kind, record.count, [record.item])
            case SharedFile():
                rank = 2 if not record.article else 1 if record.reason else 0
                self._db.execute(_ADD_FILE, (record.kind, record.item, rank, record.reason))
            case Notice():
                self._db.execute(_ADD_NOTICE, {"text": clean_line(record.text), "most": MAX_NOTICES})

    def skip_all(self, reason: str, kind: str, count: int, items: Sequence[str]) -> None:
        """Count skipped items, of which some are given as examples."""
        if not count:
            return
        sql = "SELECT examples FROM skipped WHERE reason = ? AND kind = ?"
        known = self._db.execute(sql, [reason, kind]).fetchone()
        examples = json.loads(known[0]) if known else []
        examples += [clean_line(item)[:MAX_EXAMPLE] for item in items[: max(0, MAX_EXAMPLES - len(examples))]]
        self._db.execute(_COUNT_SKIPPED, (reason, kind, count, json.dumps(examples, ensure_ascii=False)))

    def count_files(self) -> None:
        """Count the files that articles share, when all articles are written."""
        sql = "SELECT kind, reason, count(*) FROM build_files GROUP BY kind, reason"
        for kind, reason, count in self._db.execute(sql).fetchall():
            if not reason:
                self.write(Used(kind, "", count=count))
                continue
            sql = f"SELECT item FROM build_files WHERE kind = ? AND reason = ? LIMIT {MAX_EXAMPLES}"
            self.skip_all(reason, kind, count, [row[0] for row in self._db.execute(sql, [kind, reason])])

    def reasons(self) -> str:
        """Return the reasons for skipping with their counts, the most frequent first."""
        rows = self._db.execute("SELECT reason, sum(count) FROM skipped GROUP BY reason ORDER BY sum(count) DESC")
        return ", ".join(f"{reason}: {count}" for reason, count in rows)
