"""Under ``expar launch``, an exception that ends a rank is told to the launcher, which names the first cause of all."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from ._native import report_error

_shown = sys.excepthook


def _tell(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    _shown(kind, value, trace)
    if isinstance(value, Exception):
        report_error(value)


if "EXPAR_REPORT_FD" in os.environ:
    sys.excepthook = _tell
