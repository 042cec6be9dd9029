"""Nothing reaches the network: not by us, and not by what we load."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WATCH = """
import socket, sys, time
from gog_edge.bundle import DEFAULT_BUNDLE
from gog_edge.retrieval.encoder import Encoder
import numpy as np
encoder = Encoder.open(DEFAULT_BUNDLE / "encoder", threads=1)
encoder.embed_images([np.zeros((32, 32, 3), np.uint8)])
time.sleep(float(sys.argv[1]))
"""
UPLOAD_S = 14  # ONNX Runtime's telemetry speaks about ten seconds after a session was opened


@pytest.mark.skipif(not Path("/proc/net/udp").exists(), reason="looks at Linux's table of sockets")
def test_a_process_that_embeds_opens_no_socket(tmp_path):
    """Watched from outside, for as long as telemetry takes to wake: no descriptor of it is a socket."""
    process = subprocess.Popen([sys.executable, "-c", WATCH, str(UPLOAD_S)])
    sockets = set()
    while process.poll() is None:
        for descriptor in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:"):
                sockets.add(target)
        time.sleep(0.002)
    assert process.returncode == 0
    assert not sockets


def test_telemetry_is_off_before_the_runtime_is_loaded():
    code = "import gog_edge.engines.onnx.session, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"})
    assert done.stdout == "1\n"
