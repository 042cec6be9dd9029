import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from little_world import BLUE, GREEN, RED, bars, flag
from PIL import Image

from gog_edge.errors import ArtifactError, BackendError
from gog_edge.retrieval.encoder import Encoder, ImageSpec, preprocess
from gog_edge.types import Size


def spec(resize, fill=0):
    return ImageSpec(Size(8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), Image.Resampling.BICUBIC, resize, fill)


def test_vectors_have_unit_length_and_one_batch_equals_single_runs(tiny_encoder):
    pictures = [flag("France"), flag("Spain"), bars(RED, width=7, height=90)]
    batch = tiny_encoder.embed_images(pictures)
    assert batch.shape == (3, tiny_encoder.dim) and batch.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1, atol=1e-6)
    single = np.concatenate([tiny_encoder.embed_images([picture]) for picture in pictures])
    np.testing.assert_allclose(batch, single, atol=1e-6)


def test_batches_may_be_preprocessed_in_other_threads(tiny_encoder):
    pictures = [flag(name) for name in ("France", "Spain", "Chad", "Italy")] * 10
    with ThreadPoolExecutor(2) as threads:
        batches = list(threads.map(tiny_encoder.preprocess, (pictures[:20], pictures[20:], [])))
        parts = list(threads.map(tiny_encoder.embed_pixels, batches))
    assert [batch.shape for batch in batches] == [(20, 3, 16, 16), (20, 3, 16, 16), (0, 3, 16, 16)]
    assert batches[0].dtype == np.float32 and batches[0].flags.c_contiguous
    np.testing.assert_array_equal(np.concatenate(parts), tiny_encoder.embed_images(pictures))
    single = tiny_encoder.embed_pixels(batches[0][3:4])
    np.testing.assert_allclose(parts[0][3:4], single, atol=1e-6)


def test_texts_are_padded_and_truncated_at_the_context_length(tiny_encoder):
    short, long = tiny_encoder.embed_texts(["red", "red " + "red " * 50])
    assert short @ long > 0.999


def test_words_are_near_pictures_of_their_colour(tiny_encoder):
    words = tiny_encoder.embed_texts(["red", "blue"])
    pictures = tiny_encoder.embed_images([bars((255, 0, 0)), bars((0, 0, 255))])
    assert (words @ pictures.T).argmax(axis=1).tolist() == [0, 1]


def test_no_input_gives_no_vectors(tiny_encoder):
    assert tiny_encoder.embed_images([]).shape == (0, tiny_encoder.dim)
    assert tiny_encoder.embed_texts([]).shape == (0, tiny_encoder.dim)


def test_squash_uses_the_whole_picture_shortest_its_middle_and_longest_pads():
    wide = bars(RED, GREEN, BLUE, width=90, height=10)
    squashed = preprocess(wide, spec("squash"))
    assert squashed.shape == (3, 8, 8) and squashed.dtype == np.float32
    assert squashed[0, 4, 0] > 0.3 and squashed[2, 4, 7] > 0.1
    middle = preprocess(wide, spec("shortest"))
    assert (middle[1] > -0.1).all() and (middle[0] < -0.9).all()
    padded = preprocess(wide, spec("longest", fill=255))
    assert (np.delete(padded, 3, axis=1) == 1).all() and padded[2, 3, 0] < 0  # one row remains, above the middle


def test_normalised_values_are_as_computed_by_hand():
    grey = np.full((4, 4, 3), 51, dtype=np.uint8)
    # 51 / 255 = 0.2: (0.2 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (0.2 - 0.3) / 2
    one = ImageSpec(Size(4, 4), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), Image.Resampling.BILINEAR, "squash")
    np.testing.assert_allclose(preprocess(grey, one)[:, 0, 0], [0.2, 0.0, -0.05], atol=1e-6)


def test_a_view_of_a_picture_may_be_embedded(tiny_encoder):
    picture = flag("France")
    crop = picture[5:30, ::2]
    np.testing.assert_allclose(tiny_encoder.embed_images([crop]), tiny_encoder.embed_images([crop.copy()]))


@pytest.fixture
def broken(tiny_encoder_folder, tmp_path):
    return shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")


def rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_missing_file_is_named(broken):
    (broken / "text.onnx").unlink()
    with pytest.raises(ArtifactError, match="text.onnx"):
        Encoder.open(broken)


def test_an_altered_file_is_named(broken):
    data = bytearray((broken / "image.onnx").read_bytes())
    data[-1] ^= 1
    (broken / "image.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match="image.onnx.*altered"):
        Encoder.open(broken)


IMAGE = {"width": 16, "height": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
         "resize": "squash"}  # fmt: skip


@pytest.mark.parametrize("changes", [
    {"kind": "policy"}, {"schema": 2}, {"image": {}}, {"text": None}, {"files": 3}, {"files": [3]}, {"files": {}},
    {"files": [{"path": ["text.onnx"], "size": 1, "sha256": ""}]},
    {"files": [{"path": "x" * 300, "size": 1, "sha256": ""}]},
    {"dim": 0}, {"dim": "24"}, {"dim": 2**40}, {"dim": 24.0}, {"name": 3},
    {"text": {"context_length": -1, "pad_id": 0}},
    {"text": {"context_length": 8, "pad_id": 2**40}}, {"image": IMAGE | {"std": [0.5, 0, 0.5]}},
    {"image": IMAGE | {"mean": [0.5] * 2}}, {"image": IMAGE | {"mean": "0.5"}}, {"image": IMAGE | {"width": 10**9}},
    {"image": IMAGE | {"interpolation": "magic"}}, {"image": IMAGE | {"fill": 256}},
    {"image": IMAGE | {"colour": "red"}},
])  # fmt: skip
def test_an_invalid_manifest_is_refused(broken, changes):
    rewrite(broken, **changes)
    with pytest.raises(ArtifactError, match="export it again|do not use this encoder"):
        Encoder.open(broken)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="right folder"):
        Encoder.open(tmp_path)


def test_a_wrong_dimension_is_detected_at_the_first_embedding(broken):
    rewrite(broken, dim=99)
    with pytest.raises(ArtifactError, match="99"):
        Encoder.open(broken).embed_images([flag("France")])


@pytest.mark.parametrize("image, text", [({"width": 32}, {}), ({"height": 8}, {}), ({}, {"context_length": 9})])
def test_a_frame_or_a_context_of_another_size_than_the_graph_has_is_refused(broken, image, text):
    rewrite(broken, image=IMAGE | image, text={"context_length": 8, "pad_id": 0} | text)
    encoder = Encoder.open(broken)
    with pytest.raises(ArtifactError, match="onnx' cannot be run .*; export the model again"):
        encoder.embed_images([flag("France")])
        encoder.embed_texts(["red"])


def test_vectors_that_are_not_finite_are_refused(broken):
    rewrite(broken, image=IMAGE | {"std": [1e-40] * 3, "mean": [0.1] * 3})
    with np.errstate(all="ignore"), pytest.raises(ArtifactError, match="a vector is not finite; export or copy it"):
        Encoder.open(broken).embed_images([flag("France")])


def test_an_unavailable_provider_is_an_error(tiny_encoder_folder):
    with pytest.raises(BackendError, match="NoSuchProvider"):
        Encoder.open(tiny_encoder_folder, providers=["NoSuchProvider"])
