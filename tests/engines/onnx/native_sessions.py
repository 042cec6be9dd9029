"""Sessions with one native operator each, for the tests of the operators."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from gog_edge.engines.onnx import native
from gog_edge.engines.onnx.native import DOMAIN, VARIANTS
from gog_edge.engines.onnx.native.variants import processor_flags, supported_variants

COMPILED = [variant for variant in supported_variants(processor_flags()) if (native.FOLDER / variant.file).is_file()]

requires_library = pytest.mark.skipif(not COMPILED, reason=f"no library: {native.unavailable_reason()}")
each_variant = pytest.mark.parametrize("variant", COMPILED or VARIANTS[:1], ids=lambda variant: variant.name)


def operator_session(variant, kind, inputs, outputs, *, threads=2, **attributes):
    """A graph with one operator; inputs and outputs map names to (type, shape), in the operator's order."""
    node = helper.make_node(kind, list(inputs), list(outputs), domain=DOMAIN, **attributes)
    declared = [[helper.make_tensor_value_info(name, *form) for name, form in some.items()]
                for some in (inputs, outputs)]  # fmt: skip
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_model(helper.make_graph([node], kind, *declared), opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.FOLDER / variant.file))
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_concurrently(functions):
    """Call functions in four threads and return their results."""
    with ThreadPoolExecutor(4) as threads:
        return [done.result() for done in [threads.submit(function) for function in functions]]


def relative_error(actual, expected):
    """The root mean square of the difference, relative to that of `expected`."""
    return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())
