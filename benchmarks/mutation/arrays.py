"""Mutations of binary formats: safetensors, .npy, FAISS, SQLite and ONNX files, in their headers above all."""

from __future__ import annotations

import json
import re
import struct
from random import Random
from typing import Any

from benchmarks.mutation.trees import Pairs, Raw, mutate_json, to_json

_NUMBERS = (0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_SIZES = ("<B", "<H", "<I", "<Q")
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "float32", "", "Q4", "F4")
_HEAD = 512  # bytes at the beginning of a file with most of its structure


def mutate_binary(rng: Random, data: bytes) -> bytes:
    """Return a file with numbers overwritten, parts lost or doubled; the beginning is changed as often as the rest."""
    place = rng.randrange(min(_HEAD, len(data)) if rng.random() < 0.5 else len(data))
    change = rng.randrange(6)
    if change == 0:
        return data[:place]
    if change == 1:
        return data[:place] + data[place + rng.choice((1, 8, 64, 4096)) :]
    if change == 2:
        return data[:place] + data[place : place + 64] + data[place:]
    if change == 3:
        return data[:place] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 16)))) + data[place + 16 :]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4))):
        size = rng.choice(_SIZES)
        number = struct.pack(size, rng.choice(_NUMBERS) % 256 ** struct.calcsize(size))
        changed[place : place + len(number)] = number
        place = rng.randrange(len(data))
    return bytes(changed[: len(data)])


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Return a safetensors file with another header: offsets, dtypes, shapes, names, its length; or cut."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    change = rng.randrange(10)
    if change == 0:
        return mutate_binary(rng, data)
    if change == 1:
        return struct.pack("<Q", rng.choice((*_NUMBERS, size - 1, size + 1, len(data), 100_000_001)) % 2**64) + data[8:]
    if change == 2:
        return data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + b"\0" * rng.choice((1, 4096))
    changed = mutate_json(rng, header) if change < 5 else _mutate_tensors(rng, header)
    return struct.pack("<Q", len(changed)) + changed + body


def _mutate_tensors(rng: Random, header: bytes) -> bytes:
    tree = json.loads(header, object_pairs_hook=Pairs)
    places = [number for number, (name, _) in enumerate(tree) if name != "__metadata__"]
    place = rng.choice(places)
    name, fields = tree[place]
    values: dict[str, Any] = dict(fields)
    shape, (start, end) = list(values["shape"]), values["data_offsets"]
    change = rng.randrange(9)
    if change == 0:
        values["dtype"] = rng.choice(_DTYPES)
    elif change == 1:
        values["shape"] = rng.choice(
            (
                [],
                [0],
                [0, *shape],
                [-1, *shape],
                [*shape, 1],
                shape[::-1],
                [2**40, 2**40],
                [1] * 200,
                [2**63, 0],
                [1.5],
                ["4"],
                shape[:-1],
                [*shape[:-1], shape[-1] * 2 if shape else 2],
            )
        )
    elif change == 2:
        values["data_offsets"] = rng.choice(
            (
                [end, start],
                [-4, end],
                [start, end + 4],
                [start + 2, end],
                [2**60, 2**61],
                [start],
                [start, end, end],
                [0, end],
                [start, start],
                Raw(f"[{start}, 1e999]"),
            )
        )
    elif change == 3:
        del tree[place]
        return to_json(tree).encode()
    elif change == 4:
        tree.insert(place, (name, fields))
    elif change == 5:
        name = rng.choice(
            (name + ".x", "x." + name, name.upper(), "", name.replace("weight", "bias"), name.replace("0", "9"))
        )
    elif change == 6:
        tree.insert(
            0,
            ("__metadata__", rng.choice((None, [], {"format": 1}, Pairs([("format", "tf")]), Pairs([("a", Pairs())])))),
        )
        return to_json(tree).encode()
    elif change == 7:
        tree.append(("extra", Pairs([("dtype", "F32"), ("shape", [1]), ("data_offsets", [end, end + 4])])))
    else:
        other = rng.choice(places)
        tree[place], tree[other] = (name, tree[other][1]), (tree[other][0], fields)
        return to_json(tree).encode()
    tree[place] = (name, Pairs(values.items()))
    return to_json(tree).encode()


def mutate_npy(rng: Random, data: bytes) -> bytes:
    """Return a NumPy file with another header: dtype, order, shape, version, length; or cut."""
    size = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + size].decode(), data[10 + size :]
    change = rng.randrange(8)
    if change == 0:
        return mutate_binary(rng, data)
    if change == 1:
        return data[: rng.choice((0, 5, 6, 8, 9, 10, 40, len(data) // 2, len(data) - 1))]
    if change == 2:
        version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00", b"\x00\x00"))
        return data[:6] + version + data[8:]
    if change == 3:
        return data[:8] + struct.pack("<H", rng.choice((0, 1, size - 1, size + 1, 65535))) + data[10:]
    if change == 4:
        dtype = rng.choice(
            ("<f4", "<f2", "<f8", ">f2", ">i8", "<i8", "<i4", "|u1", "|O", "|S4", "<U4", "<c8", "|b1", "|V8", "", "x")
        )
        header = re.sub(r"'descr': '[^']*'", f"'descr': {dtype!r}", header)
    elif change == 5:
        shapes = (
            "()",
            "(0,)",
            "(0, 0)",
            "(-1, 4)",
            f"({2**40}, {2**40})",
            "(1,)",
            "(2**40,)",
            "[3]",
            "(1.5,)",
            "('a',)",
            f"({2**70},)",
            "(True, 4)",
            "(1, 2, 3)",
            "None",
            "((1, 2),)",
            "(4096, 192",
            "(1e3,)",
        )
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': {rng.choice(shapes)}", header)
    elif change == 6:
        header = header.replace("False", rng.choice(("True", "1", "None", "'F'")))
    else:
        header = rng.choice(
            (
                "{}",
                "",
                "[" * 1_000,
                "{'descr': '<f2'}",
                "__import__('os')",
                header[:-20],
                "'" * 200,
                "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
                "(" * 9_000,
                "-" * 9_000,
            )
        )
    text = header.encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + body
