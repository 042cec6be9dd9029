"""Helpers for the tests of all sources."""

from __future__ import annotations

import pickle
from collections import Counter

from gog_edge.indexing.sources.base import ArticleRecord, ImageRecord, RedirectRecord, Skipped


class Read:
    """All records of a source, by kind."""

    def __init__(self, source):
        self.chunks = list(source.chunks())
        self.records = [record for chunk in self.chunks for record in source.parse(chunk)]
        self.articles = {article.identity: article for article in self.of(ArticleRecord)}
        self.images = self.of(ImageRecord)
        self.redirects = {redirect.name: redirect.article for redirect in self.of(RedirectRecord)}
        self.skipped = Counter(skipped.reason for skipped in self.of(Skipped))

    def of(self, kind):
        return [record for record in self.records if type(record) is kind]

    def images_of(self, key):
        return [image for image in self.images if key in image.articles]


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
    return read
