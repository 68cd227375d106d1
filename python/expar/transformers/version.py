"""Which releases of transformers have the interface that this package stands on."""

from __future__ import annotations

OLDEST = (5, 0)


def check() -> None:
    """Raises ImportError (transformers is missing or older than OLDEST), with what to type."""
    wanted = ".".join(map(str, OLDEST))
    todo = f"pip install -U 'transformers>={wanted}'"
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"expar.transformers needs transformers {wanted} or newer: {todo}") from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"expar.transformers needs transformers {wanted} or newer, this is {__version__}: {todo}")
