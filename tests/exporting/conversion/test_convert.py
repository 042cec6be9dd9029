"""Converted graphs compute the same as their originals, on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from tiny_clip import write_tiny_clip

from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.engines.onnx.decoder import OrtDecoder
from gog_edge.engines.onnx.session import OrtGraph
from gog_edge.errors import CheckpointError
from gog_edge.exporting.conversion.convert import KINDS, convert_graph
from gog_edge.exporting.graph import FLOAT, FLOAT16, GraphBuilder
from gog_edge.policy.manifest import TextSpec, WeightQuantization, read_manifest
from gog_edge.policy.vision import VisionEncoder

CONTEXT = 64
STEPS = ((20, 1), (1, 1), (7, 5), (1, 1))  # (tokens, rows of logits)
# Operators of opset 21 or older that TensorRT before 10.15 parses.
DECOMPOSED = {"Add", "ArgMax", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Equal", "Expand", "Gather",
         "Gelu", "Gemm", "Identity", "LayerNormalization", "Less", "LessOrEqual", "LpNormalization", "MatMul", "Mul",
         "Range", "Reciprocal", "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Split",
         "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}  # fmt: skip


@pytest.fixture(scope="module")
def exported(policies, qwen3_policy, checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Policy folders by name."""
    from gog_edge.exporting.policy.export import export_policy

    folder = tmp_path_factory.mktemp("int4") / "policy"
    export_policy(checkpoints[True], folder, precision="int4", block=32, context=1024, parity=False)
    return {"tied": policies[True], "untied": policies[False], "qwen3": qwen3_policy, "int4": folder}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("name", ["tied", "untied", "qwen3", "int4"])
def test_decoders_compute_the_same_logits(exported, name, kind, tmp_path):
    folder = exported[name]
    convert_graph(folder / "decoder.onnx", tmp_path / "decoder.onnx", kind, context=CONTEXT)
    converted, spec = _ConvertedDecoder(tmp_path / "decoder.onnx", kind), read_manifest(folder).text
    decoder = OrtDecoder(folder / "decoder.onnx", capacity=CONTEXT, threads=1)
    rng, cache, past = np.random.default_rng(0), decoder.new_cache(), 0
    for tokens, keep in STEPS:
        embeds, cos, sin, features = _made(rng, spec, tokens)
        want = decoder.step(cache, embeds, cos, sin, past, deepstack=features if spec.deepstack else None, keep=keep)
        got = converted.step(embeds, cos, sin, past, features, keep)
        assert got.shape == want.shape and got.dtype == np.float32
        # In int4 the original quantizes activations to 8 bits too; the converted graph does not.
        assert np.abs(got - want).max() < (0.1 if name == "int4" else 0.01) * np.abs(want).max()
        past += tokens


@pytest.mark.parametrize("name", ["tied", "qwen3", "int4"])
def test_vision_towers_compute_the_same_tokens(exported, name, kind, tmp_path):
    folder = exported[name]
    manifest = read_manifest(folder)
    convert_graph(folder / "vision.onnx", tmp_path / "vision.onnx", kind)
    pixels = np.random.default_rng(1).integers(0, 256, (150, 230, 3), dtype=np.uint8)
    before, after = (
        VisionEncoder(OrtGraph(path / "vision.onnx", threads=1), manifest.vision).encode(pixels)
        for path in (folder, tmp_path)
    )
    assert _least_cosine(before.embeds, after.embeds) > (0.99 if name == "int4" else 0.9999)
    if manifest.vision.deepstack:
        assert _least_cosine(before.deepstack, after.deepstack) > 0.9999


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("quick", [False, True])
def test_encoder_towers_compute_the_same_embeddings(precision, quick, kind, tmp_path):
    from gog_edge.exporting.clip.checkpoint import load_clip
    from gog_edge.exporting.clip.export import export_clip

    write_tiny_clip(tmp_path / "checkpoint", quick_gelu=quick)
    export_clip(load_clip(str(tmp_path / "checkpoint")), tmp_path / "encoder", precision=precision)
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 400, (3, 16))
    tokens[:, 5], tokens[0, 11] = 49_000, 49_100  # the largest id ends a text
    for name, given in (("image", rng.standard_normal((3, 3, 32, 32)).astype(np.float32)), ("text", tokens)):
        assert _agreement(tmp_path / "encoder" / f"{name}.onnx", kind, tmp_path, given) > 0.999


@pytest.mark.parametrize("name", ["image", "text"])
def test_graphs_written_by_torch_are_converted_too(name, kind, tmp_path):
    rng = np.random.default_rng(3)
    image = rng.standard_normal((2, 3, 96, 96)).astype(np.float32)
    given = image if name == "image" else rng.integers(1, 300, (2, 32))
    assert _agreement(DEFAULT_BUNDLE / "encoder" / f"{name}.onnx", kind, tmp_path, given) > 0.9999


@pytest.mark.parametrize("kind", ["standard", "decomposed"])
@pytest.mark.parametrize("name", ["tied", "qwen3"])
def test_fp16_rounding_is_small_in_the_reference_evaluator(exported, name, kind, tmp_path):
    # ONNX Runtime's CPU provider removes casts to fp16 and back; the reference evaluator computes in fp16.
    folder, rng = exported[name], np.random.default_rng(4)
    convert_graph(folder / "decoder.onnx", tmp_path / "decoder.onnx", kind, context=CONTEXT)
    converted = _ConvertedDecoder(ReferenceEvaluator(str(tmp_path / "decoder.onnx")), kind)
    spec = read_manifest(folder).text
    decoder = OrtDecoder(folder / "decoder.onnx", capacity=CONTEXT, threads=1)
    cache, past = decoder.new_cache(), 0
    for tokens, keep in STEPS:
        embeds, cos, sin, features = _made(rng, spec, tokens)
        want = decoder.step(cache, embeds, cos, sin, past, deepstack=features if spec.deepstack else None, keep=keep)
        assert np.abs(converted.step(embeds, cos, sin, past, features, keep) - want).max() < 0.01 * np.abs(want).max()
        past += tokens


@pytest.mark.parametrize("weight_format", ["fp32", "fp16", WeightQuantization(7, None)])
def test_matmuls_with_results_beyond_the_fp16_range_are_correct(weight_format, tmp_path):
    rng = np.random.default_rng(5)
    graph = GraphBuilder("large", tmp_path / "large.onnx", weight_format)
    first, second = (rng.uniform(0.5, 1, shape).astype(np.float32) for shape in ((64, 64), (32, 64)))
    inner = graph.linear(graph.input("value", FLOAT, ["n", 64]), first, name="up")
    graph.output(graph.linear(graph.op("Mul", inner, inner), second, name="down"), "result", FLOAT, ["n", 32])
    graph.save()
    convert_graph(tmp_path / "large.onnx", tmp_path / "converted.onnx", "standard")
    given = {"value": rng.uniform(1, 3, (2, 64)).astype(np.float32)}
    want = ((given["value"] @ first.T) ** 2) @ second.T
    got = ReferenceEvaluator(str(tmp_path / "converted.onnx")).run(None, given)[0]
    assert want.max() > 2**18 and np.abs(got / want - 1).max() < 0.02


def test_graphs_use_only_operators_of_their_runtimes(exported, tmp_path):
    for kind in KINDS:
        convert_graph(exported["int4"] / "decoder.onnx", tmp_path / f"{kind}.onnx", kind, context=CONTEXT)
    standard, decomposed, fp16 = (onnx.load(str(tmp_path / f"{kind}.onnx")) for kind in KINDS)
    for model, opset in ((standard, 24), (decomposed, 21)):
        onnx.checker.check_model(model)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", opset)]
    layers = read_manifest(exported["int4"]).text.layers
    assert _count(standard, "TensorScatter") == 2 * layers and _count(standard, "Attention") == layers
    assert {node.op_type for node in decomposed.graph.node} <= DECOMPOSED
    assert _count(fp16, "GroupQueryAttention") == layers and _count(fp16, "MatMulNBits") > 0
    # ONNX Runtime would run these on the CPU, with copies from and to the GPU.
    assert not {node.op_type for node in fp16.graph.node} & {"Neg", "Slice", "Shape", "Range"}
    for model in (standard, decomposed, fp16):
        kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        assert all(kinds[name] == FLOAT16 for name in kinds if name.startswith("past_"))
        assert kinds["inputs_embeds"] == FLOAT


def test_int4_weights_stay_int4(exported, tmp_path):
    convert_graph(exported["int4"] / "decoder.onnx", tmp_path / "decoder.onnx", "standard", context=CONTEXT)
    weights = onnx.load(str(tmp_path / "decoder.onnx")).graph.initializer
    small = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.INT4]
    assert small and all(2 * len(tensor.raw_data) == np.prod(tensor.dims) for tensor in small)


def test_no_shape_of_a_converted_text_tower_depends_on_the_text(tmp_path):
    from gog_edge.exporting.clip.checkpoint import load_clip
    from gog_edge.exporting.clip.export import export_clip

    write_tiny_clip(tmp_path / "checkpoint")
    export_clip(load_clip(str(tmp_path / "checkpoint")), tmp_path / "encoder")
    convert_graph(tmp_path / "encoder" / "text.onnx", tmp_path / "text.onnx", "standard")
    assert _count(onnx.load(str(tmp_path / "text.onnx")), "ReduceMax") == 0


def test_a_context_is_required_for_decoders_only(exported, tmp_path):
    with pytest.raises(CheckpointError, match="is a decoder: 'context' must be at least 1 token, got 0"):
        convert_graph(exported["tied"] / "decoder.onnx", tmp_path / "decoder.onnx", "standard")
    with pytest.raises(CheckpointError, match="is not a decoder and has no KV cache: 'context' must be 0, got 64"):
        convert_graph(exported["tied"] / "vision.onnx", tmp_path / "vision.onnx", "standard", context=CONTEXT)


def test_unknown_operators_are_refused_by_name(tmp_path):
    graph = GraphBuilder("odd", tmp_path / "odd.onnx")
    value = graph.op("FusedGemm", graph.input("value", FLOAT, [2, 2]), graph.weight(np.eye(2, dtype=np.float32)),
                     domain="com.microsoft")  # fmt: skip
    graph.output(value, "result", FLOAT, [2, 2])
    graph.save()
    with pytest.raises(CheckpointError, match=r"com\.microsoft\.FusedGemm .* cannot be converted"):
        convert_graph(tmp_path / "odd.onnx", tmp_path / "converted.onnx", "standard")


def test_weights_beyond_the_fp16_range_are_refused(tmp_path):
    graph = GraphBuilder("large", tmp_path / "large.onnx")
    value = graph.linear(graph.input("value", FLOAT, [2, 2]), np.full((2, 2), 1e5, np.float32), name="huge")
    graph.output(value, "result", FLOAT, [2, 2])
    graph.save()
    with pytest.raises(CheckpointError, match=r"a weight of 'huge' is 1e\+05, more than fp16 can represent \(65,504\)"):
        convert_graph(tmp_path / "large.onnx", tmp_path / "converted.onnx", "standard")


def _made(rng: np.random.Generator, spec: TextSpec, tokens: int):
    """Return random embeddings, cosines and sines of angles, and deepstack features."""
    embeds = rng.standard_normal((tokens, spec.hidden)).astype(np.float32)
    angles = rng.standard_normal((tokens, spec.head_dim // 2)).astype(np.float32)
    features = rng.standard_normal((spec.deepstack, tokens, spec.hidden)).astype(np.float32)
    return embeds, np.cos(angles), np.sin(angles), features


class _ConvertedDecoder:
    """A converted decoder with its cache, updated as a runtime would."""

    def __init__(self, model: Path | ReferenceEvaluator, kind: str) -> None:
        self._kind = kind
        if isinstance(model, Path):
            self._session = _session(model)
            inputs = {each.name: each.shape for each in self._session.get_inputs()}
            self._outputs = [each.name for each in self._session.get_outputs()]
        else:
            self._session, self._outputs = model, model.output_names
            inputs = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in
                      model.proto_.graph.input}  # fmt: skip
        self._inputs = set(inputs)
        self._states = {name: np.zeros(inputs[name], np.float16) for name in inputs if name.startswith("past_")}
        self._tables = {name: np.zeros(inputs[name], np.float16) for name in ("cos", "sin") if kind == "fp16"}

    def step(self, embeds, cos, sin, past: int, deepstack, keep: int):
        end, names = past + len(embeds), self._outputs
        feeds = {"inputs_embeds": embeds[None], "deepstack": deepstack, **self._states,
                 "rows": np.arange(len(embeds) - keep, len(embeds))}  # fmt: skip
        if self._kind == "fp16":
            self._tables["cos"][past:end], self._tables["sin"][past:end] = cos, sin
            feeds |= self._tables | {"last": np.array([end - 1], np.int32), "total": np.array(end, np.int32)}
        else:
            feeds |= {"cos": cos[None], "sin": sin[None], "past": np.array([past])}
        given = {name: value for name, value in feeds.items() if name in self._inputs}
        results = dict(zip(names, self._session.run(names, given), strict=True))
        for name, state in self._states.items():
            if self._kind == "decomposed":
                state[:, :, past:end] = results[name.replace("past", "new")]
            else:
                self._states[name] = results[name.replace("past", "present")]
        return results["logits"]


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # With more optimizations, ONNX Runtime 1.31 returns zeros for fp16 matmuls with int4 weights, or crashes.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _agreement(source: Path, kind: str, folder: Path, given) -> float:
    convert_graph(source, folder / f"converted-{source.name}", kind)
    before, after = (_session(path) for path in (source, folder / f"converted-{source.name}"))
    name = before.get_inputs()[0].name
    return _least_cosine(before.run(None, {name: given})[0], after.run(None, {name: given})[0])


def _least_cosine(before, after) -> float:
    assert before.shape == after.shape
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    return float(((before * after).sum(axis=-1) / lengths).min())


def _count(model: onnx.ModelProto, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph.node)
