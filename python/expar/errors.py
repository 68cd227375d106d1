"""What expar raises: one class for each code of ``expar::Error``, which is also the built-in exception of its kind.

Every rank of a job raises the same error for the same root cause.
"""

from __future__ import annotations


class Error(Exception):
    """What went wrong, on which rank, while doing what, and because of whom.

    code      : "bad_argument", "mismatch", "timeout", ...
    rank      : where the cause arose; -1 when it belongs to no rank
    peer      : the rank that is late or lost; -1 when nobody else is to blame
    operation : "dispatch", "plan", ...; empty outside an operation
    message   : the sentence alone; ``str(error)`` adds rank and operation in front
    """

    code = "internal"

    def __init__(self, message: str, rank: int = -1, peer: int = -1, operation: str = "") -> None:
        where = (f"rank {rank}: " if rank >= 0 else "") + (f"{operation}: " if operation else "")
        super().__init__(where + message)
        self.message = message
        self.rank = rank
        self.peer = peer
        self.operation = operation

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.rank, self.peer, self.operation)

    def __str__(self) -> str:  # OSError has one of its own
        return str(self.args[0])


class BadArgument(Error, ValueError):
    """A value that can never be right. Found before bytes move, it leaves the communicator usable."""

    code = "bad_argument"


class Mismatch(Error, ValueError):
    """Ranks disagree on what they are doing. Likewise."""

    code = "mismatch"


class Timeout(Error, TimeoutError):
    """A rank did not arrive within the limit; the communicator is dead."""

    code = "timeout"


class PeerLost(Error, ConnectionError):
    """A rank died; the communicator is dead."""

    code = "peer_lost"


class Unsupported(Error, NotImplementedError):
    """Not in this build, or not on this machine."""

    code = "unsupported"


class IoError(Error, OSError):
    """The operating system refused a file, a socket or a mapping."""

    code = "io"


class NoMemory(Error, MemoryError):
    """Memory ran out."""

    code = "no_memory"


class Internal(Error, RuntimeError):
    """A promise of the library was broken, or a rank failed with an exception of its own."""

    code = "internal"


BY_CODE = {kind.code: kind for kind in (BadArgument, Mismatch, Timeout, PeerLost, Unsupported, IoError, NoMemory, Internal)}
