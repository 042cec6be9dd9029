"""Text storage and search: SQLite segments, FTS5 queries and BM25 over several segments."""
