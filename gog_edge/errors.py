"""The one error tree.

    GogEdgeError
    ├── InputError            what the caller gave: the request is refused, nothing else is lost
    │   ├── PictureError      not a picture, truncated, too large
    │   ├── QuestionError     empty, too long, not text
    │   ├── RequestError      a request body of another shape than the route takes
    │   ├── TooLarge          more bytes than are read
    │   └── NotFound          a sample, pack or image that is not here
    ├── ArtifactError         what lies on disk: a bundle, a pack, an encoder, a policy, a trace
    │   ├── BundleError
    │   ├── PackError
    │   ├── SourceError       a snapshot that cannot be read: truncated, corrupt, of no known kind
    │   └── CheckpointError   a checkpoint that cannot be exported
    ├── BackendError          an engine or provider that was asked for and is not to be had
    │   ├── OutOfDeviceMemory the GPU has not the memory that was asked for
    │   └── DeviceLost        the GPU is gone for this process, with all that lay on it
    ├── NotEnoughMemory       a bundle that the free memory cannot hold: refused before it is loaded
    ├── DialectError          a dialect file that cannot be used
    │   └── MalformedAction   the policy's text holds no action: a step in the trace, corrected once
    ├── Busy                  all workers are taken and the line behind them is full
    └── BudgetExceeded        turns, tokens or milliseconds are spent and no answer could be forced

Every message says what was wrong, with which value, and what to do.
"""


class GogEdgeError(Exception):
    """Root of all errors that this package raises on purpose."""


class InputError(GogEdgeError):
    """The caller's input is refused."""


class PictureError(InputError):
    """The bytes given are no picture that can be looked at."""


class QuestionError(InputError):
    """The question given cannot be asked."""


class RequestError(InputError):
    """The request's body is not of the shape that the route takes."""


class TooLarge(InputError):
    """More bytes than are read into memory."""


class NotFound(InputError):
    """What was named is not here."""


class ArtifactError(GogEdgeError):
    """A file or folder on disk is missing, altered, or of another kind."""


class BundleError(ArtifactError):
    """A bundle cannot be opened."""


class PackError(ArtifactError):
    """A pack cannot be opened or does not belong to this encoder."""


class SourceError(ArtifactError):
    """A snapshot that a pack is to be built from cannot be read."""


class CheckpointError(ArtifactError):
    """A checkpoint cannot be exported."""


class BackendError(GogEdgeError):
    """A backend that was asked for cannot be obtained; there is no silent fall-back."""


class OutOfDeviceMemory(BackendError):
    """The GPU's memory is taken; what was there before still is."""


class DeviceLost(BackendError):
    """The GPU answers no call of this process any more; nothing mends that but a new process."""


class NotEnoughMemory(GogEdgeError):
    """What is to be loaded is more than the free memory."""


class DialectError(GogEdgeError):
    """A dialect file is not usable."""


class MalformedAction(DialectError):
    """The policy's text holds no action that can be carried out."""


class Busy(GogEdgeError):
    """All workers are taken and the line behind them is full."""


class BudgetExceeded(GogEdgeError):
    """The budget of a question is spent."""
