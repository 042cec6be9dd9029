"""Builds the FTS5 index of a segment: the folded words of titles, section titles and paragraphs.

The table is contentless (https://sqlite.org/fts5.html#contentless_tables): `tokens.index_text` folds each text, and
FTS5 separates the words by its built-in tokenizer `ascii`, which takes every character beyond ASCII for a part of a
word. No view, trigger or function of ours is needed to read it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from sqlite_utils import Database

from gog_edge.retrieval.text.tokens import index_text, ngram_prefixes, tokenize

COMMON_PARAGRAPHS = 256  # terms of at least so many paragraphs have a stored count: counting them takes long
SAMPLED_PARAGRAPHS = 2_000  # by which the language is told
MAX_CACHED_TITLES = 4_096
HASH_BYTES = 64 << 20  # that FTS5 collects before it writes; the default of 1 MiB leaves many small parts to merge
REPORT_ROWS = 10_000  # paragraphs between two calls of `on_rows`
OnRows = Callable[[int], None]  # called with the number of indexed paragraphs

_WORDS = (
    "CREATE VIRTUAL TABLE words USING fts5(title, section, text, content='', tokenize='{tokenizer}')"
)
_PASSAGES = (
    "SELECT p.id, a.title, s.title, p.text FROM paragraphs p JOIN articles a ON a.id = p.article "
    "JOIN sections s ON s.id = p.section ORDER BY p.id"
)
_SAMPLE = "SELECT text FROM paragraphs WHERE id IN (SELECT value FROM json_each(?))"
_FREQUENT_WORDS = (
    "the of and to is was for that with by from are it as in",
    # German, French, Spanish, Italian, Portuguese, Dutch, Scandinavian, Polish, Czech, Turkish, Finnish, Hungarian,
    # Romanian, Vietnamese, Indonesian, Tagalog, Swahili; folded, and without those that are English words
    "der das und ist von mit dem den ein eine auf fur nicht wurde le les des et est une du dans par qui el los las del "
    "que y en por con il di che della un gli nel da dos uma em nao het een van niet op te och att det som ar av pa til "
    "og er na sie jest w z oraz je se v ve bir bu ile ja oli az es egy hogy si este din cu la va cua cac mot yang dan "
    "dengan pada ang ng mga ya wa kwa",
)
_ENGLISH, _OTHERS = (frozenset(words.split()) for words in _FREQUENT_WORDS)


def create_word_index(db: Database, *, stems: bool | None = None, on_rows: OnRows | None = None) -> None:
    """Create the tables `words` and `common` from all paragraphs. Call it in a transaction.

    Args:
        db: a segment with its rows.
        stems: whether words have their English endings removed; None: if the texts are English, as far as can be told.
        on_rows: called with the number of paragraphs indexed so far.
    """
    stems = is_english(_sample(db)) if stems is None else stems
    db.execute(_WORDS.format(tokenizer="porter ascii" if stems else "ascii"))
    for option, value in (("rank", "bm25(0.5, 1.0, 1.0)"), ("hashsize", HASH_BYTES)):
        db.execute("INSERT INTO words(words, rank) VALUES (?, ?)", [option, value])
    prefixes: Counter[str] = Counter()
    db.conn.executemany("INSERT INTO words(rowid, title, section, text) VALUES (?, ?, ?, ?)",
                        _folded_rows(db, prefixes, on_rows))
    db.execute("INSERT INTO words(words) VALUES ('optimize')")
    db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'row')")
    db.execute("CREATE TABLE common (term TEXT PRIMARY KEY, paragraphs INTEGER NOT NULL) WITHOUT ROWID")
    db.execute("INSERT INTO common SELECT term, doc FROM temp.vocabulary WHERE doc >= ?", [COMMON_PARAGRAPHS])
    db.execute("DROP TABLE temp.vocabulary")
    db.conn.executemany("INSERT OR REPLACE INTO common VALUES (?, ?)",
                        ((part, count) for part, count in prefixes.items() if count >= COMMON_PARAGRAPHS))


def _folded_rows(db: Database, prefixes: Counter[str], on_rows: OnRows | None) -> Iterator[tuple[int, str, str, str]]:
    """Yield the rows of `words`, and count the paragraphs that contain a part shorter than an n-gram."""
    fold_title = lru_cache(MAX_CACHED_TITLES)(index_text)
    for done, (paragraph, title, section, text) in enumerate(db.execute(_PASSAGES), 1):
        row = paragraph, fold_title(title), fold_title(section), index_text(text)
        prefixes.update(ngram_prefixes(" ".join(row[1:])))
        yield row
        if on_rows is not None and done % REPORT_ROWS == 0:
            on_rows(done)


def _sample(db: Database) -> Iterator[str]:
    """Yield the texts of paragraphs that are spread over the segment."""
    first, last = db.execute("SELECT coalesce(min(id), 1), coalesce(max(id), 0) FROM paragraphs").fetchone()
    step = max(1, (last - first) // SAMPLED_PARAGRAPHS)
    ids = json.dumps(list(range(first, last + 1, step)))
    yield from (text for (text,) in db.execute(_SAMPLE, [ids]))


def is_english(texts: Iterable[str]) -> bool:
    """Return whether texts have more frequent words of English than of other languages in Latin script, or neither.

    Only English has endings that can be removed without taking different words for the same.
    """
    counts = Counter(word for text in texts for word in tokenize(text))
    english, others = (sum(counts[word] for word in words) for words in (_ENGLISH, _OTHERS))
    return english >= others
