"""Pictures from untrusted sources, decoded to upright 8-bit sRGB pixels."""

from gog_edge.picture.decode import (
    DECODED_PIXELS,
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    NAMES,
    RESULT_BYTES,
    SUFFIXES,
    Picture,
    decode_picture,
    decoding_bytes,
    resize,
)
from gog_edge.picture.headers import MEDIA_TYPES, media_type
from gog_edge.picture.optional import OPTIONAL

__all__ = ["DECODED_PIXELS", "FORMATS", "MAX_BYTES", "MAX_PIXELS", "MEDIA_TYPES", "NAMES", "OPTIONAL", "RESULT_BYTES",
           "SUFFIXES", "Picture", "decode_picture", "decoding_bytes", "media_type", "resize"]
