"""Being here puts this folder on the path: tests of all folders may import its helper modules."""

import signal

# What a shell starts in the background ignores Ctrl+C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
