"""What one rank finds wrong before the ranks meet."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

from .. import Context, barrier
from ..errors import Error


@contextmanager
def told_to_all(context: Context) -> Iterator[None]:
    """An exception that is raised inside, every rank raises where they meet next, this one here.

    One that is no expar.Error stays what it is on this rank; the others raise Internal. For what is not collective
    itself and comes before something that is, of this context. The communicator stays usable.
    """
    try:
        yield
    except Exception as error:
        try:
            barrier(context.declining(error))
        except Error as told:
            if not isinstance(error, Error):
                raise error
            # The barrier only stands in for what the others are at.
            raise type(told)(told.message, told.rank, told.peer) from error
