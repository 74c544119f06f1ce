"""Every error that kvcommons raises on purpose, in one tree.

The cache never raises into an engine's step: there, any of these becomes a shorter match, which is
a recompute. They reach a person at start-up, from a command, or as the answer to a bad request.

    KvcommonsError
    ├── ConfigError              a setting is wrong; the text says how to mend it
    ├── ModelError               a model cannot be found, verified or run
    ├── RequestError             this request cannot be served as it is (an HTTP 400)
    │   └── PromptTooLongError       prompt and output do not fit what an engine can hold
    ├── ReplicaUnavailableError  no replica can serve now (an HTTP 503)
    │   ├── ReplicaRefusedError      a replica does not take requests now, and did not take this one
    │   └── ReplicaBusyError         a replica has as many as it takes; it lives, try another one
    ├── StoreError               a store could not do what was asked
    │   ├── StoreUnavailableError    unreachable, timed out
    │   ├── StoreReadOnlyError       may be read, cannot be written
    │   └── StoreFullError           no room left
    ├── HostMemoryGoneError      leased host memory that this process cannot map any more
    └── BlockFormatError         stored bytes are not what they should be; treated as a miss
        ├── ForeignBlockError        another format version or namespace
        └── CorruptBlockError        cut short, or the checksum does not match
"""


class KvcommonsError(Exception):
    """Any error that kvcommons raises on purpose."""


class ConfigError(KvcommonsError):
    """A setting is wrong or unknown; the text names it and says how to mend it."""


class ModelError(KvcommonsError):
    """A model cannot be found, verified or run by this engine."""


class RequestError(KvcommonsError):
    """This request cannot be served as it is, now or later."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room for output in the model's or the pool's length."""


class ReplicaUnavailableError(KvcommonsError):
    """No replica can serve this request now; it may be sent again later."""


class ReplicaRefusedError(ReplicaUnavailableError):
    """A replica that takes none, or cannot be reached, did not get this request: it is no cause."""


class ReplicaBusyError(ReplicaUnavailableError):
    """A replica has as many requests as it takes; it is well, and takes more when some end."""


class StoreError(KvcommonsError):
    """A store could not do what was asked; nothing that was stored before is lost."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached, or did not answer in time."""


class StoreReadOnlyError(StoreError):
    """The store may be read but not written."""


class StoreFullError(StoreError):
    """The store has no room left."""


class HostMemoryGoneError(KvcommonsError):
    """Blocks were leased in host memory that this process cannot reach: the arena was replaced."""


class BlockFormatError(KvcommonsError):
    """Stored bytes are not what their name says; callers treat this as a miss."""


class ForeignBlockError(BlockFormatError):
    """The object was written by another format version or for another namespace."""


class CorruptBlockError(BlockFormatError):
    """The object is cut short, or a checksum does not match."""
