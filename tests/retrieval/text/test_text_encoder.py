"""The runtime of a sentence encoder: prefixes, cutting, batches, pooling, and folders that cannot be used."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_text_encoder import DIM, MAX_TOKENS, SPECIAL, WORDS, table, write_tiny_text_encoder

from gog_edge.errors import ArtifactError
from gog_edge.files import read_json, write_json
from gog_edge.retrieval.text.encoder import (
    MAX_BATCH,
    MAX_BATCH_TOKENS,
    TextEncoder,
    batches_by_length,
    passage_text,
    pool,
)

IDS = {word: row for row, word in enumerate(SPECIAL + WORDS)}


def mean_of(*words, seed=0):
    pooled = table(seed)[[IDS[word] for word in ("[CLS]", *words, "[SEP]")]].mean(axis=0)
    return pooled / np.linalg.norm(pooled)


def altered(folder, **changes):
    manifest = read_json(folder / "manifest.json", what="test")
    for key, value in changes.items():
        home = manifest["text"] if key in manifest["text"] else manifest
        home[key] = value
    write_json(folder / "manifest.json", manifest)
    return folder


def test_mean_pooling_leaves_padding_out(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path))
    vectors = encoder.embed_passages(["France", "the capital of Spain", "money"])
    assert vectors.dtype == np.float32 and vectors.shape == (3, DIM)
    wanted = [mean_of("france"), mean_of("the", "capital", "of", "spain"), mean_of("money")]
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)


def test_cls_pooling_takes_the_first_token(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path, pooling="cls"))
    first = table()[IDS["[CLS]"]]
    np.testing.assert_allclose(encoder.embed_queries(["France"])[0], first / np.linalg.norm(first), atol=1e-6)


def test_queries_and_passages_have_their_own_prefix(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path, prefixes=("query: ", "passage: ")))
    np.testing.assert_allclose(encoder.embed_queries(["money"])[0], mean_of("query", ":", "money"), atol=1e-6)
    np.testing.assert_allclose(encoder.embed_passages(["money"])[0], mean_of("passage", ":", "money"), atol=1e-6)


def test_long_texts_are_cut(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path))
    words = ["france"] * (MAX_TOKENS - 2)
    np.testing.assert_allclose(encoder.embed_passages(["France " * 500])[0], mean_of(*words), atol=1e-6)


def test_what_a_text_gets_does_not_depend_on_the_others_or_their_order(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(0, 20)))) for _ in range(3 * MAX_BATCH)]
    together = encoder.embed_passages(texts)
    np.testing.assert_allclose(together, np.concatenate([encoder.embed_passages([text]) for text in texts]), atol=1e-6)
    np.testing.assert_allclose(encoder.embed_passages(texts[::-1]), together[::-1], atol=1e-6)


def test_nothing_gives_nothing(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path))
    assert encoder.embed_queries([]).shape == (0, DIM) and encoder.dim == DIM
    assert np.isclose(np.linalg.norm(encoder.embed_queries([""])[0]), 1.0)


def test_several_threads_embed_at_once(tmp_path):
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path), threads=1)
    texts = ["money of france", "people in spain", "capital"] * 40
    wanted = encoder.embed_passages(texts)
    with ThreadPoolExecutor(8) as pool_:
        for found in pool_.map(lambda _: encoder.embed_passages(texts), range(16)):
            np.testing.assert_array_equal(found, wanted)


def test_token_types_are_fed_where_the_graph_takes_them(tmp_path):
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    encoder = TextEncoder.open(write_tiny_text_encoder(tmp_path, inputs=inputs))
    np.testing.assert_allclose(encoder.embed_queries(["money"])[0], mean_of("money"), atol=1e-6)


def test_batches_hold_every_text_once_and_keep_to_their_bounds():
    lengths = np.random.default_rng(1).integers(1, 600, 500).tolist() + [5 * MAX_BATCH_TOKENS]
    batches = list(batches_by_length(lengths))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[place] for place in batch)
        assert len(batch) <= MAX_BATCH and (padded <= MAX_BATCH_TOKENS or len(batch) == 1)


def test_pooling_a_row_without_tokens_gives_zeros():
    assert not pool(np.ones((1, 3, 2), np.float32), np.zeros((1, 3), np.int64), "mean").any()


def test_a_passage_is_title_section_and_text():
    assert passage_text("France", "Capital city", "It is Paris.") == "France\nCapital city\nIt is Paris."
    assert passage_text("France", "", "It is Paris.") == "France\nIt is Paris."


@pytest.mark.parametrize(("changes", "said"), [
    ({"kind": "encoder"}, "got 'encoder' and 1"),
    ({"schema": 99}, "got 'text_encoder' and 99"),
    ({"pooling": "max"}, "'pooling' must be one of 'mean', 'cls', got 'max'"),
    ({"normalize": False}, "'normalize' must be True, got False"),
    ({"max_tokens": 1}, "'max_tokens' must be at least 4, got 1"),
    ({"inputs": ["pixels"]}, "got 'pixels'"),
    ({"dim": "many"}, "invalid manifest"),
    ({"files": [{"path": "model.onnx", "size": 1, "sha256": ""}]}, "1; copy or build it again"),
    ({"files": [{"path": "gone.onnx", "size": 1, "sha256": ""}]}, "'gone.onnx' is missing"),
])  # fmt: skip
def test_unusable_folders_are_refused_with_the_reason(tmp_path, changes, said):
    folder = altered(write_tiny_text_encoder(tmp_path), **changes)
    with pytest.raises(ArtifactError) as refused:
        TextEncoder.open(folder)
    assert said in str(refused.value)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="manifest.json"):
        TextEncoder.open(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    folder = write_tiny_text_encoder(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    altered(folder, files=[])
    with pytest.raises(ArtifactError, match="cannot read .* as a tokenizer"):
        TextEncoder.open(folder)


def test_a_graph_of_another_dimension_is_refused_when_it_runs(tmp_path):
    encoder = TextEncoder.open(altered(write_tiny_text_encoder(tmp_path), dim=DIM + 1))
    with pytest.raises(ArtifactError, match="the graph must return"):
        encoder.embed_queries(["money"])


def test_the_runtime_imports_no_torch():
    code = "import sys, gog_edge.retrieval.text.encoder; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert not {"torch", "transformers", "optimum", "onnx"} & set(loaded.split())
