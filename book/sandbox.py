"""Processes for students' code: in a bubblewrap sandbox where one starts, else bounded, watched and ended alone.

In the sandbox there are the interpreter, its libraries and an empty folder: no course, no gradebook, no network, and no
process but the submission's own. Whether that works a trial start says: bubblewrap may be installed and forbidden.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

import IPython
import psutil
import safetensors
import torch

from book.sandboxed.wire import Lost, Peer

HERE = Path(__file__).resolve().parent / "sandboxed"
INSIDE = "/child"  # where HERE is in the sandbox
START = 120.0  # seconds that a start may take
AHEAD = 2  # processes that get ready, each on a core of its own
TMP, SHM = 200 << 20, 64 << 20  # bytes of /tmp and of /dev/shm
NOBODY = "65534"
OPEN = (
    "without a sandbox: students' code can read and change your files, the gradebook and the solutions among them, and "
    "use the network. Install bubblewrap, or mark on a machine that holds nothing else"
)


def libraries() -> list[str]:
    """The folders that hold the interpreter and what cells may import, outermost first."""
    packages = (torch, IPython, safetensors, psutil)
    found = {Path(str(module.__file__)).parents[1] for module in packages}
    found |= {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
    return sorted({str(path) for path in found} | {str(path.resolve()) for path in found})


def environment(home: str, here: str) -> dict[str, str]:
    """The environment of students' code: nothing of the marker's but where libraries are."""
    packages = os.pathsep.join(p for p in libraries() if Path(p).name.endswith("-packages"))
    return {
        "HOME": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": here + os.pathsep + packages,
        "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


def bubble() -> list[str]:
    """The command that makes a sandbox, up to the command that runs in it."""
    root = os.geteuid() == 0
    command = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    command += [
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    command += ["--cap-drop", "ALL"]
    if root:  # a user id of its own has to be taken inside, where every folder can be entered
        for right in ("SETUID", "SETGID", "SETPCAP"):
            command += ["--cap-add", f"CAP_{right}"]
    else:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/usr", "/usr"]
    for name in (
        "/bin",
        "/sbin",
        "/lib",
        "/lib32",
        "/lib64",
        "/etc/ld.so.cache",
        "/etc/alternatives",
    ):
        path = Path(name)
        if path.is_symlink():
            command += ["--symlink", os.readlink(path), name]
        elif path.exists():
            command += ["--ro-bind", name, name]
    for name in libraries():
        for parent in reversed(Path(name).parents[:-1]):  # which may be private outside
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", name, name]
    command += ["--ro-bind", str(HERE), INSIDE]
    command += [
        "--size",
        str(TMP),
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
        "--perms",
        "0777",
        "--dir",
        "/tmp/home",
    ]
    command += ["--size", str(SHM), "--perms", "1777", "--tmpfs", "/dev/shm"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp/home"]
    for name, value in (environment("/tmp/home", INSIDE) | {"MINIMOE_SANDBOX": "1"}).items():
        command += ["--setenv", name, value]
    if root:
        command += [
            "setpriv",
            f"--reuid={NOBODY}",
            f"--regid={NOBODY}",
            "--clear-groups",
            "--no-new-privs",
        ]
        command += ["--inh-caps=-all", "--bounding-set=-all"]
    return command


class Child:
    """A process for one submission; `peer` speaks with it once it is `ready`."""

    def __init__(self, boxed: bool) -> None:
        mine, its = socket.socketpair()
        self.folder = None if boxed else tempfile.mkdtemp(prefix="minimoe-")
        place = INSIDE if boxed else str(HERE)
        run = [sys.executable, f"{place}/child.py", str(its.fileno())]
        self.process = subprocess.Popen(
            [*bubble(), *run] if boxed else run,
            cwd=self.folder,
            env=None if self.folder is None else environment(self.folder, place),
            pass_fds=[its.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        its.close()
        self.peer = Peer(mine)
        self.started = False

    def ready(self) -> Peer:
        """Wait for the process to have started.

        Raises:
            Lost: it has not; the message says why.
        """
        if self.started:
            return self.peer
        self.peer.begin(START)
        assert self.process.stderr is not None
        try:
            self.peer.receive()
        except Lost as lost:
            self.process.kill()
            said = self.process.stderr.read().decode(errors="replace").strip().split("\n")[-1]
            raise type(lost)(said or str(lost)) from None
        finally:
            self.process.stderr.close()
        self.started = True
        return self.peer


class Sandboxes:
    """Starts processes for students' code, two ahead, and leaves nothing of them. A context manager.

    Args:
        boxed: True for a sandbox or nothing, False for none, None for one if it can be had.

    Raises:
        ValueError: there is no sandbox, and it has to be one.
    """

    def __init__(self, boxed: bool | None = None) -> None:
        self.why = "switched off"
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come here, not to init
        self.others = {p.pid for p in psutil.Process().children()}
        self.spares: list[Child] = []
        self.boxed = boxed is not False and self.trial()
        if boxed and not self.boxed:
            raise ValueError(f"no sandbox could be started: {self.why}")

    def trial(self) -> bool:
        """Whether a sandbox starts; `why` not, if it does not."""
        if shutil.which("bwrap") is None:
            self.why = "bubblewrap is not installed"
            return False
        child = Child(boxed=True)
        try:
            child.ready()
        except Lost as lost:
            self.why = str(lost)
            self.end(child)
            return False
        self.spares.append(child)
        return True

    def start(self) -> Child:
        """A process that has run nothing yet.

        Raises:
            RuntimeError: it does not start.
        """
        child = self.spares.pop(0) if self.spares else Child(self.boxed)
        try:
            child.ready()
        except Lost as lost:
            self.end(child)
            raise RuntimeError(f"no process for students' code could be started: {lost}") from None
        # the next ones get ready meanwhile, which takes longer than most notebooks; outside a sandbox they would
        # be within reach
        while self.boxed and len(self.spares) < AHEAD:
            self.spares.append(Child(boxed=True))
        return child

    def end(self, child: Child) -> None:
        """End a process and all that it has started, and take its folder away."""
        child.peer.stream.close()
        child.process.kill()
        child.process.wait()
        keep = self.others | {spare.process.pid for spare in self.spares}
        me = psutil.Process()
        # whatever has lost its parent is a child of this process now, and so are its children once it is dead
        left: list[psutil.Process] = []
        for _ in range(100):
            left = [p for p in me.children() if p.pid not in keep]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            if not left:
                break
            psutil.wait_procs(left, timeout=1)
        if left:
            print(f"marking: what a submission left cannot be ended: {left}", file=sys.stderr)
        if child.folder:
            shutil.rmtree(child.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        while self.spares:
            self.end(self.spares.pop())
