"""Where students' cells run: a process of its own that does what the judge asks through one socket.

python child.py FD

Started by book/sandbox.py, in a sandbox where there is one. Neither checks nor hidden tests are here.
"""

import ctypes
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
from wire import Lost, Peer

LIMITS = {
    resource.RLIMIT_DATA: 4 << 30,  # bytes of memory
    resource.RLIMIT_FSIZE: 100 << 20,  # bytes of one file
    resource.RLIMIT_NOFILE: 256,
    resource.RLIMIT_CORE: 0,
}


class Cells:
    """Runs cells as IPython does, and finds the functions that they define."""

    def __init__(self) -> None:
        config = Config({"HistoryManager": {"enabled": False}})
        self.shell: Any = InteractiveShell.instance(config=config)
        self.shell.showtraceback = self.shell.showsyntaxerror = lambda *_, **__: (
            None
        )  # the judge tells of errors

    def find(self, name: str) -> Callable[..., Any]:
        """What stands under a name."""
        if name not in self.shell.user_ns:
            raise NameError(f"name {name!r} is not defined")
        found = self.shell.user_ns[name]
        if not callable(found):
            raise TypeError(f"{name} is no function but a {type(found).__name__}")
        return found

    def serve(self, asked: dict[str, Any]) -> None:
        """Run a cell, or get ready for a check."""
        peer.begin()
        # whatever the cells before have done to them
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w")
        if asked["k"] == "check":
            torch.manual_seed(0)  # as a check does where it runs beside the answer
            return
        done = self.shell.run_cell(asked["source"])
        error = done.error_before_exec or done.error_in_exec
        if error is not None:
            raise error


def limit() -> None:
    """Bound what this process may use, and let it end with the process that started it."""
    for what, most in LIMITS.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if os.environ.get("MINIMOE_SANDBOX"):  # counted in this sandbox alone
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


if __name__ == "__main__":
    limit()
    torch.set_num_threads(1)
    cells = Cells()
    peer = Peer(socket.socket(fileno=int(sys.argv[1])), cells.find, cells.serve, BaseException)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    try:
        peer.send({"k": "ready"})
        while True:
            peer.answer(*peer.receive())
    except Lost:
        os._exit(0)
