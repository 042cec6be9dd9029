"""Glance-or-Gaze on a box that is never online."""

import os

__version__ = "0.1.0"

# The one thing done at import: ONNX Runtime 1.31 sends telemetry unless this is set before it is loaded, and nothing
# here may reach the network. Its own `disable_telemetry_events` comes too late.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
