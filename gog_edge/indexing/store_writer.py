"""Writes one segment of a pack's store; `gog_edge.retrieval.text.segment` reads it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gog_edge.errors import PackError
from gog_edge.files import full_disk_said
from gog_edge.indexing.sources.base import ArticleDraft, ImageDraft, RedirectDraft, Skipped
from gog_edge.retrieval.manifest import Counts, Segment, Span
from gog_edge.retrieval.text.segment import STORE_SCHEMA, SegmentReader
from gog_edge.retrieval.text.words import name_key

MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}  # by first bytes
COMMON_PARAGRAPHS = 256  # words of at least so many paragraphs are counted beforehand: counting them takes a while
EXAMPLES = 20  # of each reason for skipping, kept by name
BETWEEN_PARAGRAPHS = 2  # characters: the empty line between two paragraphs of an article's text

TABLES = """
CREATE TABLE licences (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE articles (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, title TEXT NOT NULL, licence INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, digest BLOB NOT NULL
);
CREATE TABLE sections (id INTEGER PRIMARY KEY, title TEXT NOT NULL UNIQUE);
CREATE TABLE paragraphs (
    id INTEGER PRIMARY KEY, article INTEGER NOT NULL, section INTEGER NOT NULL, start INTEGER NOT NULL,
    text TEXT NOT NULL
);
CREATE TABLE names (
    key TEXT NOT NULL, article INTEGER NOT NULL, redirect INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (key, redirect, article)
) WITHOUT ROWID;
CREATE TABLE images (
    id INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, media_type TEXT NOT NULL, licence INTEGER NOT NULL,
    attribution TEXT NOT NULL, lead INTEGER NOT NULL
);
CREATE TABLE pixels (image INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE links (
    image INTEGER NOT NULL, article INTEGER NOT NULL, position INTEGER NOT NULL, caption TEXT NOT NULL,
    known INTEGER NOT NULL, PRIMARY KEY (image, article)
) WITHOUT ROWID;
CREATE TABLE skipped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL, examples TEXT NOT NULL);
CREATE TABLE build_chunks (number INTEGER PRIMARY KEY);
CREATE TABLE build_redirects (key TEXT NOT NULL, name TEXT NOT NULL, article TEXT NOT NULL);
CREATE TABLE kept (key TEXT PRIMARY KEY, article INTEGER NOT NULL) WITHOUT ROWID;
"""
# The word index holds no text of its own: it can be rebuilt from this view at any time.
WORD_INDEX = f"""
DROP TABLE IF EXISTS words;
DROP VIEW IF EXISTS passages;
DROP TABLE IF EXISTS common;
DROP TABLE IF EXISTS counted;
CREATE INDEX IF NOT EXISTS links_by_article ON links(article, image);
CREATE VIEW passages AS SELECT p.id AS id, a.title AS title, s.title AS section, p.text AS text
    FROM paragraphs p JOIN articles a ON a.id = p.article JOIN sections s ON s.id = p.section;
CREATE VIRTUAL TABLE words USING fts5(
    title, section, text, content='passages', content_rowid='id', tokenize='porter unicode61 remove_diacritics 2'
);
INSERT INTO words(words, rank) VALUES ('rank', 'bm25(0.5, 1.0, 1.0)');
INSERT INTO words(words) VALUES ('rebuild');
INSERT INTO words(words) VALUES ('optimize');
CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab('main', 'words', 'row');
CREATE TABLE common (term TEXT PRIMARY KEY, paragraphs INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO common SELECT term, doc FROM temp.vocabulary WHERE doc >= {COMMON_PARAGRAPHS};
DROP TABLE temp.vocabulary;
CREATE TABLE counted AS SELECT (SELECT count(*) FROM articles) AS articles,
    (SELECT count(*) FROM paragraphs) AS paragraphs, (SELECT count(*) FROM images) AS images;
"""
_TAKEN = "SELECT (SELECT count(*) FROM articles WHERE key = ?) + (SELECT count(*) FROM kept WHERE key = ?)"
_FINISHED = f"DROP TABLE build_chunks; DROP TABLE build_redirects; PRAGMA user_version = {STORE_SCHEMA};"
_RESOLVE = (
    "INSERT OR IGNORE INTO names (key, article, redirect, name) SELECT r.key, a.id, 1, r.name FROM build_redirects r "
    "JOIN articles a ON a.key = r.article WHERE NOT EXISTS "
    "(SELECT 1 FROM names n WHERE n.key = r.key AND n.article = a.id)"
)
_OLDER = "SELECT r.key, s.article, r.name FROM build_redirects r JOIN kept s ON s.key = r.article"
_UNRESOLVED = (
    "FROM build_redirects r WHERE NOT EXISTS (SELECT 1 FROM articles a WHERE a.key = r.article) "
    "AND NOT EXISTS (SELECT 1 FROM kept s WHERE s.key = r.article)"
)


@dataclass(frozen=True, slots=True)
class Start:
    """The first ids that a segment gives out: those after all others of the pack."""

    article: int = 1
    paragraph: int = 1
    image: int = 1

    @classmethod
    def after(cls, segment: Segment) -> Start:
        """Those after a pack's last segment."""
        return cls(segment.articles.last + 1, segment.paragraphs.last + 1, segment.images.last + 1)


class DraftRefused(PackError):
    """A draft that cannot be written; nothing of it was."""

    def __init__(self, reason: str, what: str, advice: str) -> None:
        super().__init__(f"{reason}: {what!r}; {advice}")
        self.skipped = Skipped(reason, what)


class StoreWriter:
    """Writes one segment. The same drafts in the same order give the same rows.

    What was written between two `chunk`s is there after a crash, or none of it. `earlier` are the pack's other
    segments: what they hold already is not written again, and what changed is named in `replaced`.
    """

    def __init__(self, path: Path, *, start: Start | None = None, earlier: Sequence[SegmentReader] = (),
                 gone: frozenset[int] = frozenset()) -> None:
        """Open a new file, or one that was begun. `gone`: articles of `earlier` that are no longer there."""
        self._path, self._start, self._earlier, self._gone = path, start or Start(), tuple(earlier), gone
        self._sql = sqlite3.connect(path)
        with full_disk_said(path, PackError):
            if not self._value("SELECT count(*) FROM sqlite_master"):
                self._sql.executescript("PRAGMA journal_mode = WAL; BEGIN;" + TABLES + "COMMIT;")
        self._sql.execute("PRAGMA synchronous = NORMAL")
        self._article = self._next("articles", self._start.article)
        self._paragraph = self._next("paragraphs", self._start.paragraph)
        self._image = self._next("images", self._start.image)

    @property
    def counts(self) -> Counts:
        """Rows written so far."""
        return Counts(self._article - self._start.article, self._paragraph - self._start.paragraph,
                      self._image - self._start.image)

    @property
    def chunks(self) -> int:
        """How many chunks are written."""
        return int(self._value("SELECT count(*) FROM build_chunks"))

    @property
    def finished(self) -> bool:
        """Whether all was written and only the last steps of `finish` are left: nothing more can be added."""
        return self._value("PRAGMA user_version") == STORE_SCHEMA

    @contextmanager
    def chunk(self, number: int) -> Iterator[None]:
        """Write a chunk: all of it is kept at the end, or nothing."""
        at = self._article, self._paragraph, self._image
        with full_disk_said(self._path, PackError):
            try:
                yield
                self._sql.execute("INSERT INTO build_chunks VALUES (?)", [number])
                self._sql.commit()
            except BaseException:
                self._sql.rollback()
                self._article, self._paragraph, self._image = at
                raise

    # --- articles -----------------------------------------------------------------------------

    def add_article(self, draft: ArticleDraft, images: Sequence[ImageDraft] = ()) -> int:
        """Write an article and return its id, or the id it has already where nothing changed.

        `images` are those that stand in it: an article whose images changed is written anew.

        Raises:
            DraftRefused: its title has no word, or its key is already there.
        """
        if not name_key(draft.title):
            raise DraftRefused("title without any word", draft.title or draft.key, "name it or leave it out")
        if self._value(_TAKEN, draft.identity, draft.identity):
            raise DraftRefused("two articles of one key", draft.identity, "merge them or make one a redirect")
        digest = _digest(draft, images)
        same = self._unchanged(draft.identity, digest)
        if same is not None:
            return same
        article, first = self._article, self._paragraph
        last = first + len(draft.paragraphs) - 1
        row = (article, draft.identity, draft.title, self._licence(draft.licence), first, last, digest)
        self._sql.execute("INSERT INTO articles VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self._article += 1
        self._add_paragraphs(article, draft.paragraphs)
        self._add_names(article, draft)
        return article

    def add_redirect(self, draft: RedirectDraft) -> None:
        """Write another name of an article that is there or is still to come; one without any word is left out."""
        if name_key(draft.name):
            self._sql.execute("INSERT INTO build_redirects VALUES (?, ?, ?)",
                              (name_key(draft.name), draft.name, draft.article))

    def _unchanged(self, key: str, digest: bytes) -> int | None:
        """The id of an article that an earlier segment holds just so."""
        for reader in reversed(self._earlier):
            article, known = reader.known([key]).get(key, (0, b""))
            if article and article not in self._gone:
                if known == digest:
                    self._sql.execute("INSERT OR IGNORE INTO kept VALUES (?, ?)", [key, article])
                    return article
                return None
        return None

    def _add_paragraphs(self, article: int, paragraphs: Iterable[tuple[str, str]]) -> None:
        start, rows = 0, []
        for section, text in paragraphs:
            rows.append((self._paragraph, article, self._named("sections", "title", section), start, text))
            self._paragraph += 1
            start += len(text) + BETWEEN_PARAGRAPHS
        self._sql.executemany("INSERT INTO paragraphs VALUES (?, ?, ?, ?, ?)", rows)

    def _add_names(self, article: int, draft: ArticleDraft) -> None:
        names = {name_key(draft.title): (0, draft.title)}
        for name in draft.redirects:
            if name_key(name):
                names.setdefault(name_key(name), (1, name))
        rows = ((key, article, redirect, name) for key, (redirect, name) in names.items())
        self._sql.executemany("INSERT INTO names VALUES (?, ?, ?, ?)", rows)

    # --- images -------------------------------------------------------------------------------

    def add_image(self, draft: ImageDraft) -> int:
        """Write an image and return its id; the same file given before is the same image, its articles are joined.

        Raises:
            DraftRefused: it belongs to no article, to one that is not there (yet), or is no PNG, JPEG or WebP.
        """
        owners = [self._owner(key) for key in draft.articles]
        missing = [key for key, owner in zip(draft.articles, owners, strict=True) if owner is None]
        if missing or not draft.articles:
            raise DraftRefused("image of no article", ", ".join(missing) or draft.caption, "add the article first")
        kind = media_type(draft.data)
        digest = hashlib.sha256(draft.data).digest()
        image = self._image_with(digest)
        if image is None:
            image = self._image
            row = (image, digest, kind, self._licence(draft.licence), draft.attribution, int(draft.lead))
            self._sql.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", row)
            self._sql.execute("INSERT INTO pixels VALUES (?, ?)", (image, draft.data))
            self._image += 1
        self._link(image, [owner for owner in owners if owner is not None], draft.caption)
        return image

    def _owner(self, key: str) -> int | None:
        found = self._sql.execute("SELECT id FROM articles WHERE key = ?", [key]).fetchone()
        if found:
            return int(found[0])
        for reader in reversed(self._earlier):
            article = reader.known([key]).get(key, (0, b""))[0]
            if article and article not in self._gone:
                return article
        return None

    def _image_with(self, digest: bytes) -> int | None:
        found = self._sql.execute("SELECT id FROM images WHERE sha256 = ?", [digest]).fetchone()
        if found:
            return int(found[0])
        return next((image for reader in self._earlier if (image := reader.image_with(digest)) is not None), None)

    def _link(self, image: int, articles: Sequence[int], caption: str) -> None:
        taken = int(self._value("SELECT count(*) FROM links WHERE image = ?", image))
        said = self._said_of(image)
        rows = [(image, article, taken + n, caption, int((caption or self._title(article)) in said))
                for n, article in enumerate(articles)
                if article >= self._start.article]  # those of earlier segments are unchanged: they have their links
        self._sql.executemany("INSERT OR IGNORE INTO links VALUES (?, ?, ?, ?, ?)", rows)

    def _said_of(self, image: int) -> set[str]:
        """What earlier segments embedded as captions of an image."""
        if image >= self._start.image:
            return set()
        links = [link for reader in self._earlier for link in reader.links_of([image])]
        titles: dict[int, str] = {}
        for reader in self._earlier:
            titles |= reader.titles(link.article for link in links if not link.caption)
        return {link.caption or titles.get(link.article, "") for link in links}

    def _title(self, article: int) -> str:
        return str(self._sql.execute("SELECT title FROM articles WHERE id = ?", [article]).fetchone()[0])

    # --- the end ------------------------------------------------------------------------------

    def skip(self, skipped: Skipped) -> None:
        """Count something that does not come in."""
        row = self._sql.execute("SELECT examples FROM skipped WHERE reason = ?", [skipped.reason]).fetchone()
        examples = json.loads(row[0]) if row else []
        if len(examples) < EXAMPLES:
            examples.append(skipped.what[:300])
        self._sql.execute("INSERT INTO skipped VALUES (?, 1, ?) ON CONFLICT (reason) DO UPDATE SET count = count + 1, "
                          "examples = excluded.examples", (skipped.reason, json.dumps(examples, ensure_ascii=False)))

    def skipped_reasons(self) -> str:
        """What was skipped so far, in words."""
        rows = self._sql.execute("SELECT reason, count FROM skipped ORDER BY count DESC")
        return ", ".join(f"{reason}: {count}" for reason, count in rows)

    def finish(self, store: str) -> Segment:
        """Build the word index and close the file; `store` is what the manifest will call it."""
        with full_disk_said(self._path, PackError):
            self._sql.commit()
            if not self.finished:
                self._resolve_redirects()
                # A write-ahead log would hold the whole word index once more beside the file.
                self._sql.execute("PRAGMA journal_mode = DELETE")
                self._sql.executescript("BEGIN;" + WORD_INDEX + _FINISHED + "COMMIT;")
            self._compact()
        counts = self.counts
        self._sql.close()
        return Segment(
            store,
            Span(self._start.article, self._article - 1),
            Span(self._start.paragraph, self._paragraph - 1),
            Span(self._start.image, self._image - 1),
            counts,
        )

    def close(self) -> None:
        """Stop here; what was written in whole chunks stays."""
        self._sql.close()

    def _resolve_redirects(self) -> None:
        self._sql.execute(_RESOLVE)
        new = [(key, article, name) for key, article, name in self._sql.execute(_OLDER)
               if all(hit.article != article for reader in self._earlier for hit in reader.named([key]))]
        self._sql.executemany("INSERT OR IGNORE INTO names (key, article, redirect, name) VALUES (?, ?, 1, ?)", new)
        (lost,) = self._sql.execute(f"SELECT count(*) {_UNRESOLVED}").fetchone()
        if lost:
            names = [row[0] for row in self._sql.execute(f"SELECT r.name {_UNRESOLVED} LIMIT {EXAMPLES}")]
            self._sql.execute("INSERT OR REPLACE INTO skipped VALUES ('redirect to no article', ?, ?)",
                              (lost, json.dumps(names, ensure_ascii=False)))
        self._sql.commit()

    def _compact(self) -> None:
        """One file without a journal beside it; rewritten only where a good part of it is free."""
        pages, free = (int(self._value(f"PRAGMA {name}")) for name in ("page_count", "freelist_count"))
        self._sql.execute("PRAGMA journal_mode = DELETE")
        if free > pages // 10:
            self._sql.execute("VACUUM")

    # --- small parts --------------------------------------------------------------------------

    def _licence(self, name: str) -> int:
        return self._named("licences", "name", name)

    def _named(self, table: str, column: str, text: str) -> int:
        """The id of a text that stands many times."""
        found = self._sql.execute(f"SELECT id FROM {table} WHERE {column} = ?", [text]).fetchone()
        if found:
            return int(found[0])
        return int(self._sql.execute(f"INSERT INTO {table} ({column}) VALUES (?)", [text]).lastrowid or 0)

    def _next(self, table: str, least: int) -> int:
        return max(least, int(self._value(f"SELECT coalesce(max(id), 0) + 1 FROM {table}")))

    def _value(self, sql: str, *values: object) -> int:
        return int(self._sql.execute(sql, values).fetchone()[0])


def media_type(data: bytes) -> str:
    """Media type of an image file by its first bytes; DraftRefused for what a browser may not show."""
    for start, kind in MEDIA_TYPES.items():
        if data.startswith(start):
            return kind
    raise DraftRefused("image of another kind", repr(data[:4]), "store PNG, JPEG or WebP")


def _digest(draft: ArticleDraft, images: Sequence[ImageDraft]) -> bytes:
    """What tells an article from an earlier version of it: sha256 over all that is written of it."""
    own = [draft.title, draft.paragraphs, draft.licence, draft.redirects]
    shown = [(hashlib.sha256(image.data).hexdigest(), image.caption, image.licence, image.attribution)
             for image in images]
    return hashlib.sha256(json.dumps([own, shown], ensure_ascii=False).encode()).digest()

