"""Shared fixtures. This file also puts its folder on the import path, so that tests can import the helper modules."""

import signal

pytest_plugins = ("tiny_policy", "little_fixtures", "toy_bundle", "tensorrt_fixtures")

# A shell starts background processes with SIGINT ignored, which the processes started by tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
