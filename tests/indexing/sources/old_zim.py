"""Writes ZIM files of version 5, as Kiwix did until 2021: with namespaces, and with what libzim's writer refuses.

Format: https://wiki.openzim.org/wiki/ZIM_file_format.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

_REDIRECT, _NO_PAGE = 0xFFFF, 0xFFFFFFFF


def write_old_zim(path: Path, entries, redirects=(), *, checksum=True) -> Path:
    """Write entries (path, title, content, media type) and redirects (path, title, path of the target).

    A path begins with its namespace: "A/Berlin". Redirects may form a loop. Without a checksum the header is that of
    the first versions, which is shorter.
    """
    items = sorted([(*entry, None) for entry in entries] + [(name, title, b"", "", target)
                   for name, title, target in redirects], key=lambda item: item[0].encode())  # fmt: skip
    numbers = {item[0]: number for number, item in enumerate(items)}
    kinds = list(dict.fromkeys(item[3] for item in items if item[4] is None))
    blobs = [item[2] for item in items if item[4] is None]
    dirents, blob = [], 0
    for name, title, _, kind, target in items:
        names = name[2:].encode() + b"\0" + title.encode() + b"\0"
        if target is None:
            head = struct.pack("<HBcIII", kinds.index(kind), 0, name[:1].encode(), 0, 0, blob)
            blob += 1
        else:
            head = struct.pack("<HBcII", _REDIRECT, 0, name[:1].encode(), 0, numbers[target])
        dirents.append(head + names)
    size = 80 if checksum else 72
    types = b"".join(kind.encode() + b"\0" for kind in kinds) + b"\0"
    paths_at = size + len(types)
    titles_at = paths_at + 8 * len(items)
    dirents_at = titles_at + 4 * len(items)
    starts = [dirents_at + sum(map(len, dirents[:number])) for number in range(len(items))]
    clusters_at = dirents_at + sum(map(len, dirents))
    cluster_at = clusters_at + 8
    offsets = [4 * (len(blobs) + 1) + sum(map(len, blobs[:number])) for number in range(len(blobs) + 1)]
    cluster = b"\x01" + struct.pack(f"<{len(offsets)}I", *offsets) + b"".join(blobs)  # 1: not compressed
    titles = sorted(range(len(items)), key=lambda number: (items[number][0][:1], (items[number][1] or
                                                           items[number][0][2:]).encode()))  # fmt: skip
    header = struct.pack("<4sHH16sIIQQQQII", b"ZIM\x04", 5, 0, bytes(range(16)), len(items), 1, paths_at, titles_at,
                         clusters_at, size, _NO_PAGE, _NO_PAGE)  # fmt: skip
    header += struct.pack("<Q", cluster_at + len(cluster)) if checksum else b""
    data = header + types + struct.pack(f"<{len(items)}Q", *starts) + struct.pack(f"<{len(items)}I", *titles)
    data += b"".join(dirents) + struct.pack("<Q", cluster_at) + cluster
    path.write_bytes(data + (hashlib.md5(data, usedforsecurity=False).digest() if checksum else b""))
    return path


def metadata(**values: bytes):
    """Return entries of metadata."""
    return [(f"M/{name}", "", value, "text/plain") for name, value in values.items()]
