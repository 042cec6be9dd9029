"""Do engines of the released models' true shapes build on a machine without a GPU: how long, in how much memory?

    python -m benchmarks.bench_engines --shapes qwen2.5-vl-7b,qwen3-vl-8b --work DIR

For each shape: a checkpoint of random weights, exported in int4 (kept in --work and used again; the checkpoint goes),
and TensorRT for RTX's engines of it for several GPUs in one, beside the atlas's small encoder. Building runs in
processes of its own, whose memory is watched. A machine card, a table, last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.building.memory import peak_mib
from benchmarks.machine import machine_card
from gog_edge.bundle import DEFAULT_BUNDLE, FILE
from gog_edge.engines.built import TENSORRT_RTX, BuiltEngines, MANIFEST
from gog_edge.errors import BackendError
from gog_edge.exporting.policy_export import export_policy
from gog_edge.exporting.random_checkpoint import shape_of, write_random_checkpoint
from gog_edge.files import read_json, write_json
from gog_edge.policy.manifest import MANIFEST as POLICY_MANIFEST

BUNDLE = 'schema = 1\nname = "{name}"\npolicy = {{ path = "policy" }}\nencoder = {{ path = "encoder" }}\npacks = []\n'


@dataclass(frozen=True, slots=True)
class Figures:
    """What building one graph took."""
