"""Decode text files: UTF-8, UTF-16 and UTF-32 with or without a byte order mark, Windows-1252, or a given encoding."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from gog_edge.errors import SourceError

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
         (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))  # UTF-32 begins like UTF-16
_SAMPLE = 2**16  # bytes
_MIN_ZEROS = 0.02  # share of zero bytes in UTF-16: spaces, commas and line ends at least
# What programs on Windows write under these names: a few characters more.
_EXTENDED = {"shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949", "big5": "cp950"}
_ADVICE = "if letters are wrong, save it as UTF-8 or give --encoding"
_ESCAPES = (0xDC80, 0xDCFF)  # of `surrogateescape`


@dataclass(frozen=True)
class DecodedText:
    """A text without NUL characters, and remarks that complete a sentence such as "table 'a.csv' ..."."""

    text: str
    notices: tuple[str, ...] = ()


def is_encoding(name: str) -> bool:
    """Return whether Python has a codec of this name that decodes bytes to text."""
    try:
        b"a".decode(codecs.lookup(name).name, "replace")
    except (LookupError, ValueError):
        return False
    return True


def decode_text(data: bytes, encoding: str = "", *, what: str = "the text", truncated: bool = False) -> DecodedText:
    """Decode a text file. Without an `encoding`, bytes that are invalid in UTF-8 are taken as Windows-1252.

    Args:
        data: the file.
        encoding: name of a codec, for a file that is not in UTF-8 and has no byte order mark; empty: it is unknown.
        what: the file in the message of an error.
        truncated: only the beginning of the file was read, so that the last character may be incomplete.

    Raises:
        SourceError: the file cannot be decoded as `encoding`.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return _without_nul(_decode_wide(data[len(mark) :], name) if name != "utf-8" else
                                _decode_utf8(data[len(mark) :], truncated))
    if encoding and (data.isascii() or not _is_utf8(data, truncated)):
        return _without_nul(_decode_as(data, encoding, what, truncated))
    wide = _utf16_without_mark(data)
    return _without_nul(_decode_wide(data, wide) if wide else _decode_utf8(data, truncated))


def _is_utf8(data: bytes, truncated: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=not truncated)
    except UnicodeDecodeError:
        return False
    return True


def _decode_as(data: bytes, encoding: str, what: str, truncated: bool) -> DecodedText:
    name = codecs.lookup(encoding).name
    failure: ValueError | None = None
    for codec in dict.fromkeys((name, _EXTENDED.get(name, name))):
        try:
            return DecodedText(codecs.getincrementaldecoder(codec)().decode(data, final=not truncated))
        except ValueError as exc:
            failure = failure or exc
    raise SourceError(f"{what} cannot be decoded as {encoding} ({failure}); save it as UTF-8, or give its --encoding")


def _decode_utf8(data: bytes, truncated: bool) -> DecodedText:
    try:
        return DecodedText(codecs.getincrementaldecoder("utf-8")().decode(data, final=not truncated))
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    low, high = _ESCAPES
    invalid = sum(low <= ord(char) <= high for char in text)
    valid = sum(ord(char) > 0x7F for char in text) - invalid
    if invalid > valid:
        return DecodedText(_windows_1252(data), (f"is not in UTF-8 and was read as Windows-1252; {_ADVICE}",))
    repaired = "".join(_windows_1252(bytes([ord(char) - 0xDC00])) if low <= ord(char) <= high else char
                       for char in text)
    return DecodedText(repaired, (f"has {invalid} bytes that are not UTF-8; they were read as Windows-1252; "
                                  f"{_ADVICE}",))


def _windows_1252(data: bytes) -> str:
    """Decode Windows-1252; its five undefined bytes are decoded as Latin-1."""
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in data)


def _decode_wide(data: bytes, name: str) -> DecodedText:
    text = data.decode(name, "replace")
    damaged = text.count("\N{REPLACEMENT CHARACTER}") - data.count("\N{REPLACEMENT CHARACTER}".encode(name))
    return DecodedText(text, (f"has characters that are not valid in {name.upper()}",) if damaged > 0 else ())


def _utf16_without_mark(data: bytes) -> str | None:
    """Return the byte order of UTF-16 without a byte order mark, or None for any other text.

    Zero bytes stand on one side of UTF-16, and the decoded text has the line ends and separators of a table.
    """
    sample = data[:_SAMPLE]
    sample = sample[: len(sample) // 2 * 2]
    zeros = sample[0::2].count(0), sample[1::2].count(0)
    if sum(zeros) < _MIN_ZEROS * len(sample) or min(zeros) > max(zeros) // 10:
        return None
    name = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    text = sample.decode(name, "replace")
    ascii_share = sum(char < "\x80" for char in text) / max(1, len(text))
    looks_right = any(char in text for char in "\r\n\t,; ") and text.count("\N{REPLACEMENT CHARACTER}") <= 1
    return name if looks_right and ascii_share >= _MIN_ZEROS else None


def _without_nul(decoded: DecodedText) -> DecodedText:
    count = decoded.text.count("\0")
    if not count:
        return decoded
    return DecodedText(decoded.text.replace("\0", ""), (*decoded.notices, f"has {count} NUL characters, which were "
                                                        "left out"))
