"""Calls between the judge and a student's process, by a socket: JSON frames and safetensors, never pickle.

Either end calls functions of the other with tensors, numbers, texts, tuples, lists, dicts and functions; gradients flow
back through such a call. The judge trusts nothing that arrives: sizes, depth and time are bounded, and what does not
fit is `Nonsense`. This file runs in both processes, so it imports nothing of the course.
"""

from __future__ import annotations

import json
import socket
import struct
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

HEAD, BODY = 1_000_000, 64_000_000  # bytes of a frame's parts
ALL = 500_000_000  # bytes of all that one cell may send
DEPTH, TENSORS, WORDS = 20, 1000, 3000  # nesting, tensors of a frame, characters of a message
SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "list": list, "dict": dict}
Frame = tuple[dict[str, Any], list[Tensor]]


class Lost(BaseException):
    """The other end cannot be spoken with any more. Not an Exception: no check must take it for an answer's own."""

    name = "KernelDied"


class Late(Lost):
    """It took too long."""

    name = "TimeLimit"


class Nonsense(Lost):
    """What it sent is no frame, or no answer to what was asked."""

    name = "BadFrame"


class Remote(Exception):
    """An error that was raised at the other end; `trace` are the lines that led to it there."""

    def __init__(self, name: str, text: str, trace: str) -> None:
        super().__init__(text)
        self.name, self.trace = name, trace


# Errors that checks catch by their kind: an untouched task, and an answer that refuses what it is given.
KINDS = {e.__name__: type(e.__name__, (Remote, e), {}) for e in (NotImplementedError, ValueError)}


@contextmanager
def distrust() -> Generator[None]:
    """Whatever goes wrong while a frame is taken apart is the fault of who sent it."""
    try:
        yield
    except Exception as error:
        raise Nonsense(f"what came is no answer: {error!r}"[:WORDS]) from None


def plain(t: Tensor) -> Tensor:
    """The numbers of a tensor, without its graph and whatever else may hang on it."""
    return Tensor.detach(t).as_subclass(Tensor).cpu().contiguous().clone()


class Peer:
    """One end of the socket."""

    def __init__(
        self,
        stream: socket.socket,
        find: Callable[[str], Callable[..., Any]] | None = None,  # what may be called, by name
        serve: Callable[[dict[str, Any]], None] | None = None,  # does what else is asked
        catches: type[BaseException] = Exception,  # which errors of a called function are sent on
    ) -> None:
        self.stream, self.find, self.serve, self.catches = stream, find, serve, catches
        self.depth = 0
        self.begin()

    def begin(self, seconds: float | None = None) -> None:
        """Forget what earlier calls have left; from now on there are so many seconds."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.received = 0
        self.functions: list[Callable[..., Any]] = []
        self.graphs: list[tuple[list[Tensor], list[Tensor]]] = []

    @contextmanager
    def in_time(self) -> Generator[None]:
        """A step on the socket, which lasts until the deadline at most."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        try:
            if left is not None and left <= 0:
                raise TimeoutError
            self.stream.settimeout(left)
            yield
        except TimeoutError:
            raise Late("the time is over") from None
        except OSError:
            raise Lost("the kernel died") from None

    def send(self, head: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Send one frame."""
        text = json.dumps(head).encode()
        body = save({str(i): t for i, t in enumerate(tensors)}) if tensors else b""
        if len(text) > HEAD or len(body) > BODY:
            raise ValueError(f"{len(text) + len(body)} bytes are too many to hand over")
        with self.in_time():
            self.stream.sendall(struct.pack("<QQ", len(text), len(body)) + text + body)

    def exactly(self, size: int) -> bytes:
        """So many bytes from the other end."""
        parts: list[bytes] = []
        while size:
            with self.in_time():
                parts.append(self.stream.recv(min(size, 1 << 20)))
            if not parts[-1]:
                raise Lost("the kernel died")
            size -= len(parts[-1])
        return b"".join(parts)

    def receive(self) -> Frame:
        """One frame of the other end."""
        head, body = struct.unpack("<QQ", self.exactly(16))
        self.received += head + body
        if head > HEAD or body > BODY or self.received > ALL:
            raise Nonsense(f"a frame of {head + body} bytes is too large")
        text, numbers = self.exactly(head), self.exactly(body)
        with distrust():
            frame: dict[str, Any] = dict(json.loads(text))
            found = load(numbers) if numbers else {}
            if len(found) > TENSORS:
                raise ValueError(f"{len(found)} tensors")
            return frame, [found[str(i)] for i in range(len(found))]

    def pack(self, value: Any, live: list[Tensor], depth: int = 0) -> dict[str, Any]:
        """A value as JSON; its tensors are added to `live`. Of what cannot cross, its kind alone does."""
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        if isinstance(value, Tensor):
            live.append(value)
            return {"t": len(live) - 1}
        value = value.item() if isinstance(value, np.generic) else value
        if value is None or isinstance(value, bool | int | float | str):
            return {"v": value}
        for kind, sequence in SEQUENCES.items():
            if isinstance(value, sequence):
                parts = value.items() if kind == "dict" else value
                return {kind: [self.pack(part, live, depth + 1) for part in parts]}
        if callable(value):
            self.functions.append(value)
            return {"f": len(self.functions) - 1}
        return {"o": type(value).__name__[:100]}

    def unpack(self, tree: dict[str, Any], tensors: Sequence[Tensor], depth: int = 0) -> Any:
        """The value that `pack` made `tree` of."""
        ((kind, told),) = tree.items()
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        if kind == "t":
            return tensors[told]
        if kind == "v" and (told is None or isinstance(told, bool | int | float | str)):
            return told
        if kind in SEQUENCES:
            return SEQUENCES[kind](self.unpack(part, tensors, depth + 1) for part in told)
        if kind == "f":
            return self.proxy(int(told))
        if kind == "o":
            return type(told if told.isidentifier() else "object", (), {})()
        raise ValueError(f"a value of the kind {kind!r}")

    def ask(self, head: dict[str, Any], tensors: Sequence[Tensor] = ()) -> Frame:
        """Send a request and wait for what comes of it; meanwhile answer what the other end asks.

        Raises `Remote` if it failed at the other end, and `Lost` if there is no answer.
        """
        self.send(head, tensors)
        while True:
            answer, numbers = self.receive()
            with distrust():
                kind = answer["k"]
                words = ("name", "text", "trace") if kind == "raised" else ()
                error = [str(answer[word])[:WORDS] for word in words]
            if error:
                raise KINDS.get(error[0], Remote)(*error)
            if kind == "done":
                return answer, numbers
            self.answer(answer, numbers)

    def proxy(self, what: str | int) -> Callable[..., Any]:
        """A function of the other end, as if it were here: of a name, or one that it has handed over."""

        def call(*args: Any, **kwargs: Any) -> Any:
            live: list[Tensor] = []
            packed = [self.pack(a, live) for a in args]
            named = {k: self.pack(v, live) for k, v in kwargs.items()}
            learn = [bool(t.requires_grad) for t in live]
            head = {"k": "call", "f": what, "a": packed, "kw": named, "g": learn}
            answer: dict[str, Any] = {}
            after: list[Tensor] = []

            class Call(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
                    told, tensors = self.ask(head, [plain(t) for t in inputs])
                    with distrust():
                        answer.update(told)
                        after.extend(tensors[: len(inputs)])
                        results = tensors[len(inputs) :]
                        fixed = [r for r, g in zip(results, told["g"], strict=True) if not g]
                    ctx.mark_non_differentiable(*fixed)
                    return tuple(results)

                @staticmethod
                def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
                    back = {"k": "back", "id": answer["id"]}
                    found = self.ask(back, [plain(g) for g in grads])[1]
                    with distrust():
                        if [g.shape for g in found] != [t.shape for t in live]:
                            raise ValueError("gradients of other shapes")
                    return tuple(found)

            results = Call.apply(*live)
            with distrust(), torch.no_grad():
                for here, there in zip(live, after, strict=True):
                    if here.shape != there.shape or here.dtype != there.dtype:
                        raise ValueError("an argument came back as another")
                    if not torch.equal(here, there):  # changed in place, as if it had happened here
                        here.copy_(there)
                return self.unpack(answer["v"], results)

        call.__name__ = call.__qualname__ = str(what)
        return call

    def answer(self, head: dict[str, Any], tensors: list[Tensor]) -> None:
        """Do what the other end asks, and send what comes of it."""
        self.depth += 1
        try:
            if self.depth > DEPTH:
                raise RecursionError("calls from one end to the other and back, without end")
            if head["k"] == "call":
                done, numbers = self.called(head, tensors)
            elif head["k"] == "back":
                done, numbers = {}, self.slopes(head["id"], tensors)
            else:
                assert self.serve is not None
                done, numbers = {}, []
                self.serve(head)
            self.send({"k": "done", **done}, numbers)
        except Lost:
            raise
        except self.catches as error:
            name = error.name if isinstance(error, Remote) else type(error).__name__
            trace = "".join(traceback.format_exception(error))[-WORDS:]
            self.send({"k": "raised", "name": name, "text": str(error)[:WORDS], "trace": trace})
        finally:
            self.depth -= 1

    def called(self, head: dict[str, Any], tensors: list[Tensor]) -> Frame:
        """Call one's own function, and keep what its gradients need."""
        what = head["f"]
        for t, g in zip(tensors, head["g"], strict=True):
            t.requires_grad_(g)
        with torch.enable_grad():
            given = [t.clone() if t.requires_grad else t for t in tensors]
            args = [self.unpack(tree, given) for tree in head["a"]]
            kwargs = {k: self.unpack(tree, given) for k, tree in head["kw"].items()}
            own = self.find(what) if self.find and isinstance(what, str) else self.functions[what]
            value = own(*args, **kwargs)
        live: list[Tensor] = []
        tree = self.pack(value, live)
        self.graphs.append((tensors, live))
        done = {"v": tree, "id": len(self.graphs) - 1, "g": [bool(t.requires_grad) for t in live]}
        return done, [plain(t) for t in (*given, *live)]

    def slopes(self, key: int, grads: list[Tensor]) -> list[Tensor]:
        """The gradients by the arguments of an earlier call, given those by its results."""
        leaves, results = self.graphs[key]
        pairs = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if r.requires_grad]
        ends, slopes = zip(*pairs, strict=True)
        starts = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(ends, starts, slopes, retain_graph=True, materialize_grads=True)
        rest = iter(found)
        return [plain(next(rest)) if t.requires_grad else torch.zeros_like(t) for t in leaves]
