"""Towers written from their blocks: every variant of open_clip's transformers, in fp32 and int8."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from little_world import flag, write_little_pack
from tiny_clip import TEXT, VISION, write_tiny_clip

from gog_edge.errors import CheckpointError
from gog_edge.exporting.clip.checkpoint import load_clip
from gog_edge.exporting.clip.export import export_clip
from gog_edge.files import verify_files
from gog_edge.retrieval.encoder import MIN_COMPATIBLE_COSINE, Encoder
from gog_edge.retrieval.pack import Pack

IMAGE_TOWERS = {
    "plain": {},
    "mean of oblong pictures": {"pool_type": "avg", "image_size": [32, 48], "patch_size": [8, 16]},
    "one layer, scaled, normalized after pooling": {"layers": 1, "ls_init_value": 0.3, "final_ln_after_pool": True},
    "other norms and activation": {
        "no_ln_pre": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "patch_dropout": 0.5
    },
}  # fmt: skip
TEXT_TOWERS = {
    "end token": ({"pool_type": "eos", "eos_id": 49407}, False),
    "first token, unmasked": ({"pool_type": "first", "no_causal_mask": True}, True),
    "last token, scaled": ({"pool_type": "last", "ls_init_value": 0.3}, False),
    "unmasked, with a bias": ({"pool_type": "last", "no_causal_mask": True, "proj_bias": True}, True),
    "no projection": ({"proj_type": "none", "width": 24}, True),
}
OTHERS = {
    "ModifiedResNet": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16},
    "pools by attention": VISION | {"attentional_pool": True, "attn_pooler_heads": 2},
    "do not fill": VISION | {"image_size": 36},
    "CustomResidualAttentionBlock": VISION | {"block_type": "custom", "scale_attn": True},
}
TEXTS = ["the flag of France", "", "Ünïcode & <b>tags</b>", "long " * 50]


def check(model, folder):
    """Compare the runtime's vectors with the model's, for several batch sizes."""
    encoder = Encoder.open(folder, threads=1)
    size = encoder.spec.size
    pixels = torch.randn(3, 3, size.height, size.width, generator=torch.Generator().manual_seed(1))
    import open_clip

    with torch.inference_mode():
        images = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.embed_pixels(pixels.numpy()), images, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_texts(TEXTS), texts, atol=1e-5)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(encoder.embed_texts([text])[0], texts[row], atol=1e-5)


@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_image_towers(tmp_path, kind):
    model = write_tiny_clip(tmp_path / "model", VISION | IMAGE_TOWERS[kind])
    manifest = export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out")
    assert manifest["lowering"] == {"image": "blocks", "text": "blocks"}
    check(model, tmp_path / "out")


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_text_towers(tmp_path, kind):
    fields, custom = TEXT_TOWERS[kind]
    model = write_tiny_clip(tmp_path / "model", text=TEXT | fields, custom=custom, quick_gelu=custom)
    manifest = export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out")
    assert manifest["lowering"] == {"image": "blocks", "text": "blocks"}
    check(model, tmp_path / "out")


@pytest.mark.parametrize("reason", OTHERS)
def test_other_towers_are_refused_in_int8(tmp_path, reason):
    write_tiny_clip(tmp_path / "model", OTHERS[reason])
    with pytest.raises(CheckpointError, match=f"{reason}.*export it in fp32"):
        export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out", precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_towers_are_written_by_torch(tmp_path):
    model = write_tiny_clip(tmp_path / "model", OTHERS["pools by attention"])
    manifest = export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out")
    assert manifest["lowering"] == {"image": "torch.onnx", "text": "blocks"}
    assert b"site-packages" not in (tmp_path / "out" / "image.onnx").read_bytes()  # paths of this machine
    check(model, tmp_path / "out")


def test_models_that_torch_cannot_export_are_refused(tmp_path):
    narrow = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    write_tiny_clip(tmp_path / "model", narrow, custom=True)
    with pytest.raises(CheckpointError, match=r"image.onnx: torch.onnx failed \(Input height \(64\) doesn't match"):
        export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_text_towers_are_refused_in_int8(tmp_path):
    write_tiny_clip(tmp_path / "model", text=TEXT | {"embed_cls": True}, custom=True)
    with pytest.raises(CheckpointError, match="its text tower has a class token"):
        export_clip(load_clip(str(tmp_path / "model")), tmp_path / "out", precision="int8")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model exported in both precisions: the folder of both, and their manifests by precision."""
    root = tmp_path_factory.mktemp("both")
    write_tiny_clip(root / "model", VISION | {"width": 128, "head_width": 32}, TEXT | {"width": 64})
    checkpoint = load_clip(str(root / "model"))
    manifests = {name: export_clip(checkpoint, root / name, precision=name) for name in ("fp32", "int8")}
    return root, manifests


def test_int8_encoders_are_small_and_their_vectors_compatible(both):
    root, manifests = both
    sizes = {name: (root / name / "image.onnx").stat().st_size for name in manifests}
    assert sizes["int8"] < 0.45 * sizes["fp32"]  # in so small a tower, the graph is a large part
    for tower in ("image", "text"):
        parity = manifests["int8"]["parity"][tower]
        assert MIN_COMPATIBLE_COSINE <= parity["min_cosine"] < 1 and parity["tried"] >= 6
        assert manifests["fp32"]["parity"][tower]["max_abs"] < 1e-5
    assert manifests["int8"]["parity"]["limits"] == {"min_cosine": MIN_COMPATIBLE_COSINE}
    assert manifests["int8"]["parity"]["image"]["tried"] > 70  # noise, and seven pictures with nine crops each
    verify_files(root / "int8", manifests["int8"]["files"], what="encoder", full=True)


def test_single_vectors_equal_those_of_a_batch(both):
    encoder = Encoder.open(both[0] / "int8", threads=1)
    pixels = encoder.preprocess([flag("France"), flag("Spain"), flag("Chad")] * 7)
    together = encoder.embed_pixels(pixels)
    alone = np.concatenate([encoder.embed_pixels(pixels[row : row + 1]) for row in range(len(pixels))])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    with ThreadPoolExecutor(2) as threads:
        for vectors in threads.map(encoder.embed_pixels, [pixels] * 4):
            np.testing.assert_array_equal(vectors, together)


@pytest.mark.parametrize(("built", "asked"), [("int8", "fp32"), ("fp32", "int8")])
def test_a_pack_built_in_one_precision_is_searched_in_the_other(both, tmp_path, built, asked):
    builder, box = (Encoder.open(both[0] / name, threads=1) for name in (built, asked))
    assert builder.fingerprint == box.fingerprint
    write_little_pack(tmp_path / "pack", builder)
    pack = Pack.open(tmp_path / "pack", box)  # runs the golden query
    pack.close()


def test_inaccurate_int8_vectors_are_refused_and_the_previous_export_is_kept(tmp_path, both):
    def outlier(model):
        for block in model.visual.transformer.resblocks:
            block.ln_1.weight.data[3] = 3000.0  # in 8 bits, a row's other values become zero
            block.attn.in_proj_weight.data[:, 3] *= 1e-3

    write_tiny_clip(tmp_path / "model", change=outlier)
    checkpoint = load_clip(str(tmp_path / "model"))
    export_clip(checkpoint, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"smallest cosine of \d+ .* is 0\.\d+, less than 0\.99.*fp32"):
        export_clip(checkpoint, tmp_path / "out", precision="int8")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    Encoder.open(tmp_path / "out", threads=1)


def test_only_encoders_are_replaced(tmp_path, both):
    checkpoint = load_clip(str(both[0] / "model"))
    (tmp_path / "letters.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "letters.txt"):
        with pytest.raises(CheckpointError, match="is not a folder of kind 'encoder'"):
            export_clip(checkpoint, path)
    assert (tmp_path / "letters.txt").read_text() == "dear"
    with pytest.raises(CheckpointError, match="unknown precision 'int4' of an encoder; available: fp32, int8"):
        export_clip(checkpoint, tmp_path / "out", precision="int4")
