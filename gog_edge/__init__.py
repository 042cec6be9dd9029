"""Glance-or-Gaze: answer questions about pictures offline, from a local snapshot of Wikipedia."""

import os

__version__ = "0.1.0"

# Set before ONNX Runtime is loaded: version 1.31 sends telemetry otherwise. Its own `disable_telemetry_events` takes
# effect too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
