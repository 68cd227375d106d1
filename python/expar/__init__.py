"""Expert-parallel Mixture-of-Experts: the C++ library's API, under the same names, on any framework's arrays.

Arrays are exchanged by DLPack, without copies: NumPy's, PyTorch's, or any other's on the CPU, dense and row-major. What
returns memory of the library returns views of it: ``np.asarray(view)`` or ``torch.from_dlpack(view)``.

A first program::

    import numpy as np
    import expar

    def rank_main(communicator):
        context = expar.Context(communicator)
        x = np.ones((4, 8), np.float32)
        ids = np.array([[0], [1], [2], [3]], np.int32)
        plan = expar.make_plan(context, ids, experts=4)
        inbox = expar.dispatch(context, x, None, plan, layout="expert_major")
        y = expar.make_outbox(context, inbox, width=8)
        np.asarray(y.rows)[:] = 2 * np.asarray(inbox.packed)
        out = np.empty_like(x)
        expar.combine(context, plan, y, expar.unweighted, out)

    expar.run_threads(2, rank_main)

Ranks that are processes take ``expar.init()`` in place of run_threads; for PyTorch see ``expar.torch``.

Left to C++ are ``operation.h``, ``transport.h``, ``pool.h`` and the table of kernels, which are for authors of
collectives, transports and backends.
"""

from . import uncaught as _uncaught
from ._native import *  # noqa: F401,F403
from ._native import __version__ as __version__
from ._native import unweighted as unweighted
from .errors import BadArgument as BadArgument
from .errors import Error as Error
from .errors import Internal as Internal
from .errors import IoError as IoError
from .errors import Mismatch as Mismatch
from .errors import NoMemory as NoMemory
from .errors import PeerLost as PeerLost
from .errors import Timeout as Timeout
from .errors import Unsupported as Unsupported
from .traces import write_trace as write_trace

__all__ = [name for name in dir() if not name.startswith("_")]
