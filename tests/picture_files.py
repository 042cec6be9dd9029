"""Picture files written byte by byte from the specifications of their formats, and colours computed from theirs."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

D50 = np.array([0.9642, 1.0, 0.8249])
XYZ_D50_TO_SRGB = np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540],
                            [0.0719453, -0.2289914, 1.4052427]])  # Bradford-adapted, as Lindbloom gives it  # fmt: skip


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# --- PNG (ISO/IEC 15948) --------------------------------------------------------------------------


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, depth, colour, row, *, before=(), palette=b"", transparent=None, after=()):
    """A PNG whose rows are all `row` (packed samples); `before` and `after` the pixels are (name, body) of chunks."""
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(b"\0" + row) for _ in range(height)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *before]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [] if transparent is None else [(b"tRNS", transparent)]
    chunks += [(b"IDAT", pixels), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)


def flat_png(width, height, depth, colour, pixel, **parts):
    """A PNG of one colour; `pixel` is its samples, of at least 8 bits."""
    return png(width, height, depth, colour, pixel * width, **parts)


# --- TIFF 6.0 -------------------------------------------------------------------------------------

KINDS = {"u": 1, "i": 2, "f": 3}


def tiff(samples, photometric, *, order="<", extra=None, tile=None, separate=False, predictor=1, deflate=False,
         fields=(), pages=1):
    """A TIFF file of samples [height, width, samples].

    Args:
        samples: their dtype gives bits and sample format.
        photometric: PhotometricInterpretation.
        order: byte order.
        extra: ExtraSamples, of the last sample.
        tile: width and height of tiles; None for one strip.
        separate: each sample is a plane of its own.
        predictor: 1, 2 or 3.
        deflate: compress with Deflate.
        fields: further (tag, type, count, value).
        pages: the same picture several times.
    """
    height, width, count = samples.shape
    planes = [samples[:, :, n : n + 1] for n in range(count)] if separate else [samples]
    across, down = tile or (width, height)
    blocks = []
    for plane in planes:
        padded = np.pad(plane, ((0, -height % down), (0, -width % across), (0, 0)))
        for top in range(0, height, down):
            for left in range(0, width, across):
                block = _predicted(padded[top : top + down, left : left + across], predictor, order)
                blocks.append(zlib.compress(block) if deflate else block)
    body, offsets = b"", []
    for block in blocks:
        offsets.append(8 + len(body))
        body += block + b"\0" * (len(block) % 2)
    bits, kind = samples.dtype.itemsize * 8, KINDS[samples.dtype.kind]
    entries = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [8 if deflate else 1]),
               262: (3, [photometric]), 277: (3, [count]), 284: (3, [2 if separate else 1]), 339: (3, [kind] * count)}
    if predictor > 1:
        entries[317] = (3, [predictor])
    if extra is not None:
        entries[338] = (3, [extra])
    sizes = [len(block) for block in blocks]
    if tile:
        entries |= {322: (4, [across]), 323: (4, [down]), 324: (4, offsets), 325: (4, sizes)}
    else:
        entries |= {273: (4, offsets), 278: (4, [height]), 279: (4, sizes)}
    entries |= {tag: (kind, values) for tag, kind, values in fields}
    return _tiff_file(body, entries, order, pages)


def _tiff_file(body, entries, order, pages):
    start = 8 + len(body)
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start) + body
    for page in range(pages):
        values, table = b"", struct.pack(order + "H", len(entries))
        after = len(file) + 2 + 12 * len(entries) + 4
        for tag, (kind, numbers) in sorted(entries.items()):
            packed = struct.pack(f"{order}{len(numbers)}{ {1: 'B', 3: 'H', 4: 'I', 7: 'B'}[kind]}", *numbers)
            table += struct.pack(order + "HHI", tag, kind, len(numbers))
            table += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", after + len(values))
            values += packed + b"\0" * (len(packed) % 2) if len(packed) > 4 else b""
        following = after + len(values) if page + 1 < pages else 0
        file += table + struct.pack(order + "I", following) + values
    return file


def _predicted(block, predictor, order):
    """The bytes of a strip or tile: differences to the sample on the left, or those of bytes (Technical Note 3)."""
    if predictor == 2:
        whole = block.view(f"u{block.dtype.itemsize}")
        block = np.concatenate([whole[:, :1], whole[:, 1:] - whole[:, :-1]], axis=1)
    if predictor == 3:
        rows, width, count = block.shape
        size = block.dtype.itemsize
        big = block.astype(block.dtype.newbyteorder(">")).reshape(rows, -1).view(np.uint8)
        planes = big.reshape(rows, width * count, size).swapaxes(1, 2).reshape(rows, -1)
        return np.concatenate([planes[:, :count], planes[:, count:] - planes[:, :-count]], axis=1).tobytes()
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


# --- BMP ------------------------------------------------------------------------------------------


def bmp(pixel, bits, masks, *, header=108, compression=3, width=4, height=4):
    """A bitmap of one colour with bit masks: in the header, or after one of 40 bytes."""
    row = pixel * width
    row += b"\0" * (-len(row) % 4)
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(row) * abs(height), 0, 0, 0, 0)
    head += struct.pack(f"<{len(masks)}I", *masks)
    head = head.ljust(max(header, len(head)), b"\0")
    start = 14 + len(head)
    return b"BM" + struct.pack("<IHHI", start + len(row) * abs(height), 0, 0, start) + head + row * abs(height)


# --- ICC (ICC.1:2001-04) --------------------------------------------------------------------------


def icc_profile(space, tags, *, kind=b"mntr", pcs=b"XYZ "):
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"\0" * 4, 0x02100000, kind, space, pcs, b"\0" * 12,
                       b"acsp").ljust(68, b"\0") + xyz_tag(D50)[8:]  # fmt: skip
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz_tag(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def gamma_tag(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256)) + b"\0\0"


def matrix_icc(columns, exponent):
    """A profile of matrix and gamma; the columns are XYZ (D50) of red, green and blue, as public profiles hold them."""
    tags = {b"wtpt": xyz_tag(D50)} | {name: xyz_tag(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"),
                                                                                     columns, strict=True)}
    return icc_profile(b"RGB ", tags | {name: gamma_tag(exponent) for name in (b"rTRC", b"gTRC", b"bTRC")})


ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # gamma 2.19921875
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71187, 0.0), (0.03134, 0.00009, 0.82491))  # gamma 1.8


# --- colours --------------------------------------------------------------------------------------


def srgb_of_linear(light):
    light = np.clip(light, 0, 1)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(int)


def srgb_of_xyz(xyz):
    """sRGB of XYZ relative to D50."""
    return srgb_of_linear(XYZ_D50_TO_SRGB @ np.asarray(xyz))


def srgb_of_matrix(columns, exponent, colour):
    """sRGB of an 8-bit colour in the space of a `matrix_icc`."""
    return srgb_of_xyz(np.array(columns).T @ (np.array(colour) / 255) ** exponent)


def srgb_of_lab(lightness, a, b):
    """sRGB of CIELAB (D50)."""
    y = (lightness + 16) / 116
    parts = np.array([y + a / 500, y, y - b / 200])
    return srgb_of_xyz(D50 * np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)))


def photo(width=96, height=64):
    """Colours that change in every direction, without noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + y / 14), np.cos(x / 13 - y / 7), np.sin(x / 5) * np.cos(y / 11)]
    return Image.fromarray(np.rint(127 + 110 * np.stack(waves, axis=-1)).astype(np.uint8))
