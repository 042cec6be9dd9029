"""Helpers for the tests of all sources."""

from __future__ import annotations

import pickle
from collections import Counter

from gog_edge.indexing.sources.base import (
    ArticleRecord,
    ImageRecord,
    Notice,
    Present,
    RedirectRecord,
    SharedFile,
    Skipped,
    Used,
)


class Read:
    """All records of a source, by kind; `skipped` counts by reason, `present` and `used` by kind of item."""

    def __init__(self, source):
        self.chunks = list(source.chunks())
        self.records = [record for chunk in self.chunks for record in source.parse(chunk)]
        self.articles = {article.identity: article for article in self.of(ArticleRecord)}
        self.images = self.of(ImageRecord)
        self.redirects = {redirect.name: redirect.article for redirect in self.of(RedirectRecord)}
        self.skipped = self.count(Skipped, "reason")
        self.present, self.used = self.count(Present, "kind"), self.count(Used, "kind")
        self.notices = [notice.text for notice in self.of(Notice)]

    def of(self, kind):
        return [record for record in self.records if type(record) is kind]

    def count(self, kind, field):
        counter = Counter()
        for record in self.of(kind):
            counter[getattr(record, field)] += record.count
        return counter

    def images_of(self, key):
        return [image for image in self.images if key in image.articles]

    def files(self):
        """Return what becomes of each file that articles share, by path: "" if it is used, or the reason."""
        own = {record.item: record.reason for record in self.of(SharedFile) if not record.article}
        shown = {record.item: record.reason for record in reversed(self.of(SharedFile)) if record.article}
        used = {record.item: "" for record in self.of(SharedFile) if record.article and not record.reason}
        assert {*shown} <= {*own}, "a file that is not an item"
        return own | shown | used

    def check_balance(self):
        """Check that every item that is present is used or skipped."""
        used, skipped = self.used.copy(), self.count(Skipped, "kind")
        for redirect in self.of(RedirectRecord):
            (used if redirect.article in self.articles else skipped)[redirect.kind] += 1
        kinds = {record.item: record.kind for record in self.of(SharedFile)}
        for path, reason in self.files().items():
            (skipped if reason else used)[kinds[path]] += 1
        for kind in {*self.present, *used, *skipped} - {""}:
            assert self.present[kind] == used[kind] + skipped[kind], kind


def check_contract(source):
    """Check the protocol of a source: numbered chunks, the same in every call, from any start, in pickled copies."""
    read = Read(source)
    assert [chunk.number for chunk in read.chunks] == list(range(len(read.chunks)))
    assert all(chunk.size >= 0 for chunk in read.chunks)  # 0: several chunks were decompressed from one block
    assert sum(chunk.size for chunk in read.chunks) == source.size
    copy = pickle.loads(pickle.dumps(source))
    for start in {1, len(read.chunks) // 2, len(read.chunks)}:
        assert list(copy.chunks(start)) == read.chunks[start:]
    seen = set()
    for record in read.records:
        if isinstance(record, ArticleRecord):
            assert record.title and record.paragraphs and all(text.strip() for _, text in record.paragraphs)
            seen.add(record.identity)
        if isinstance(record, ImageRecord):
            assert set(record.articles) <= seen, "an image before its article"
    assert [record for chunk in copy.chunks() for record in copy.parse(chunk)] == read.records
    read.check_balance()
    return read
