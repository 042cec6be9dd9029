"""Fixtures of an encoder, a pack and a retriever, made once per session. Tests must not modify them."""

from __future__ import annotations

import pytest
from little_world import write_little_pack
from tiny_encoder import write_tiny_encoder

from gog_edge.retrieval.encoder import Encoder
from gog_edge.retrieval.pack import Pack
from gog_edge.retrieval.retriever import Retriever


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory):
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny_encoder(tiny_encoder_folder):
    return Encoder.open(tiny_encoder_folder, threads=1)


@pytest.fixture(scope="session")
def little_pack_folder(tmp_path_factory, tiny_encoder):
    folder = tmp_path_factory.mktemp("packs") / "little"
    write_little_pack(folder, tiny_encoder)
    return folder


@pytest.fixture(scope="session")
def little_pack(little_pack_folder, tiny_encoder):
    pack = Pack.open(little_pack_folder, tiny_encoder)
    yield pack
    pack.close()


@pytest.fixture(scope="session")
def retriever(tiny_encoder, little_pack):
    return Retriever(tiny_encoder, [little_pack])
