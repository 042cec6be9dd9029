"""Structural mutations of SQLite files: values of other types, lost tables and columns, views without an end."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from random import Random
from tempfile import NamedTemporaryFile

from benchmarks.mutation.arrays import mutate_binary

_VALUES = (
    "NULL",
    "-1",
    "0",
    "1",
    "9223372036854775807",
    "1.5",
    "9e999",
    "''",
    "'text'",
    "x'ff00'",
    "CAST(x'ff' AS TEXT)",
    "'[1,'",
    "'{}'",
    "'a' || char(0) || 'b'",
    "char(27) || '[2J'",
    "hex(zeroblob(500000))",
    "zeroblob(100)",
)


def mutate_sqlite(rng: Random, data: bytes) -> bytes:
    """Return a database with one change by SQL, or with overwritten bytes."""
    if rng.random() < 0.3:
        return mutate_binary(rng, data)
    with NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(data)
        file.flush()
        with closing(sqlite3.connect(file.name, isolation_level=None)) as connection, suppress(sqlite3.Error):
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.execute("PRAGMA foreign_keys = OFF")
            _change(rng, connection)
        file.seek(0)
        return file.read()


def _change(rng: Random, connection: sqlite3.Connection) -> None:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    table = rng.choice([name for (name,) in names])
    columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    column = rng.choice(columns)
    change = rng.randrange(10)
    if change < 4:
        where = rng.choice(("", "", " WHERE rowid % 7 = 0", " WHERE rowid = 1"))
        connection.execute(f'UPDATE "{table}" SET "{column}" = {rng.choice(_VALUES)}{where}')
    elif change == 4:
        connection.execute(f'DROP TABLE "{table}"')
    elif change == 5:
        connection.execute(f'DELETE FROM "{table}"' + rng.choice(("", " WHERE rowid % 2 = 0", " WHERE rowid = 1")))
    elif change == 6:
        connection.execute(f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "x{column}"')
    elif change == 7:
        connection.execute(f"PRAGMA user_version = {rng.choice((0, 1, 99, -5))}")
        connection.execute(f"PRAGMA application_id = {rng.choice((0, 7))}")
    elif change == 8:  # a view that never ends in place of the table
        connection.execute(f'DROP TABLE "{table}"')
        values = ", ".join(f'x AS "{name}"' for name in columns)
        connection.execute(f'CREATE VIEW "{table}" AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) '
                           f"SELECT {values} FROM r")  # fmt: skip
    else:
        connection.execute(f'CREATE TABLE "{table}_new" AS SELECT * FROM "{table}"')  # without keys and types
        connection.execute(f'DROP TABLE "{table}"')
        connection.execute(f'ALTER TABLE "{table}_new" RENAME TO "{table}"')
