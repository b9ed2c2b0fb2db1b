"""Where students' cells run: `python child.py FD`, a process that does what the judge asks through one socket.

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
if "MINIMOE_SANDBOX" in os.environ:  # processes, counted in this sandbox alone
    LIMITS[resource.RLIMIT_NPROC] = 64


def find(name: str) -> Callable[..., Any]:
    """The function of a name that the cells have defined."""
    if name not in shell.user_ns:
        raise NameError(f"name {name!r} is not defined")
    if not callable(shell.user_ns[name]):
        raise TypeError(f"{name} is no function but a {type(shell.user_ns[name]).__name__}")
    return shell.user_ns[name]


def serve(asked: dict[str, Any]) -> None:
    """Run a cell as IPython does, or get ready for a check."""
    peer.begin()
    sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w")  # whatever cells have done to them
    if asked["k"] == "check":
        torch.manual_seed(0)  # as a check does where it runs beside the answer
        return
    done = shell.run_cell(asked["source"])
    error = done.error_before_exec or done.error_in_exec
    if error is not None:
        raise error


if __name__ == "__main__":
    for what, most in LIMITS.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: end with who started this
    torch.set_num_threads(1)
    shell: Any = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.showtraceback = shell.showsyntaxerror = lambda *_, **__: None  # the judge tells of errors
    shell.enable_gui = lambda *_: None  # '%matplotlib inline' asks for one
    peer = Peer(socket.socket(fileno=int(sys.argv[1])), find, serve, BaseException)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    try:
        peer.send({"k": "ready"})
        while True:
            peer.answer(*peer.receive())
    except Lost:
        os._exit(0)
