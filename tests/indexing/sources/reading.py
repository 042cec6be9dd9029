"""What tests of all sources do with one."""

from __future__ import annotations

import pickle
from collections import Counter

from gog_edge.indexing.sources.base import ArticleDraft, ImageDraft, RedirectDraft, Skipped


class Read:
    """All items of a source, by kind."""

    def __init__(self, source):
        self.chunks = list(source.chunks())
        self.items = [item for chunk in self.chunks for item in source.parse(chunk)]
        self.articles = {item.identity: item for item in self.of(ArticleDraft)}
        self.images = self.of(ImageDraft)
        self.redirects = {item.name: item.article for item in self.of(RedirectDraft)}
        self.skipped = Counter(item.reason for item in self.of(Skipped))

    def of(self, kind):
        return [item for item in self.items if type(item) is kind]

    def images_of(self, key):
        return [image for image in self.images if key in image.articles]


def check_contract(source):
    """What the protocol promises of every source: numbered chunks, the same each time, from any start, by any copy."""
    read = Read(source)
    assert [chunk.number for chunk in read.chunks] == list(range(len(read.chunks)))
    assert all(chunk.size >= 0 for chunk in read.chunks)  # of packed files, many come with one read
    assert sum(chunk.size for chunk in read.chunks) == source.size
    copy = pickle.loads(pickle.dumps(source))
    for start in {1, len(read.chunks) // 2, len(read.chunks)}:
        assert list(copy.chunks(start)) == read.chunks[start:]
    seen = set()
    for item in read.items:
        if isinstance(item, ArticleDraft):
            assert item.title and item.paragraphs and all(text.strip() for _, text in item.paragraphs)
            seen.add(item.identity)
        if isinstance(item, ImageDraft):
            assert set(item.articles) <= seen, "an image before its article"
    assert [item for chunk in copy.chunks() for item in copy.parse(chunk)] == read.items
    return read
