"""The error tree.

    GogEdgeError
    ├── InputError            the caller's input: the request is refused, nothing else is affected
    │   ├── PictureError      not a picture, truncated, too large
    │   ├── QuestionError     empty, too long, not text
    │   ├── RequestError      a request body that does not match the schema of the route
    │   ├── TooLarge          more bytes than are accepted
    │   └── NotFound          a sample, pack or image that does not exist
    ├── ArtifactError         a file or folder on disk: a bundle, a pack, an encoder, a policy, a trace
    │   ├── BundleError
    │   ├── PackError
    │   ├── SourceError       a snapshot that cannot be read: truncated, corrupt, of an unknown format
    │   └── CheckpointError   a checkpoint that cannot be exported
    ├── BackendError          an engine or provider that was requested and is not available
    │   ├── OutOfDeviceMemory an allocation on the GPU failed
    │   └── DeviceLost        the GPU is unusable for the rest of this process
    ├── NotEnoughMemory       a bundle needs more memory than is free: refused before it is loaded
    ├── DialectError          a dialect file that cannot be used
    │   └── MalformedAction   the text of the policy contains no valid action; corrected once, then forced to answer
    ├── Busy                  all workers are busy and the queue is full
    └── BudgetExceeded        turns, tokens or milliseconds are used up, or the context is full

Every message says what was wrong, with which value, and what to do.
"""


class GogEdgeError(Exception):
    """Root of all errors that this package raises on purpose."""


class InputError(GogEdgeError):
    """The input of the caller is refused."""


class PictureError(InputError):
    """The bytes cannot be decoded as a picture, or exceed its limits."""

    def __init__(self, message: str, *, beyond_limits: bool = False) -> None:
        """Create the error; `beyond_limits`: the picture is larger than is accepted, and may be intact."""
        super().__init__(message)
        self.beyond_limits = beyond_limits


class QuestionError(InputError):
    """The question is empty, too long or not text."""


class RequestError(InputError):
    """The body of a request does not match the schema of the route."""


class TooLarge(InputError):
    """The input has more bytes or pixels than are accepted."""


class NotFound(InputError):
    """The named sample, pack or image does not exist."""


class ArtifactError(GogEdgeError):
    """A file or folder on disk is missing, altered, or of another kind."""


class BundleError(ArtifactError):
    """A bundle cannot be opened."""


class PackError(ArtifactError):
    """A pack cannot be opened, or was built with another encoder."""


class SourceError(ArtifactError):
    """A snapshot cannot be read."""


class CheckpointError(ArtifactError):
    """A checkpoint cannot be exported."""


class BackendError(GogEdgeError):
    """A requested backend is not available. There is no silent fall-back."""


class OutOfDeviceMemory(BackendError):
    """An allocation on the GPU failed; earlier allocations are intact."""


class DeviceLost(BackendError):
    """The GPU is unusable for the rest of this process; only a new process can use it."""


class NotEnoughMemory(GogEdgeError):
    """A bundle needs more memory than is free."""


class DialectError(GogEdgeError):
    """A dialect file cannot be used."""


class MalformedAction(DialectError):
    """The text of the policy contains no action that can be executed."""


class Busy(GogEdgeError):
    """All workers are busy and the queue is full."""


class BudgetExceeded(GogEdgeError):
    """The budget of a question, or the context of its session, is used up."""
