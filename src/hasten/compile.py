"""compile.py compiles what a model repeats: one graph for each class of block, sizes dynamic, in one piece.

What is compiled is a block's inner call; gates stand around it as eager hooks and are never seen by the compiler.
Graphs are counted. Past a limit, and where a compiler is missing or fails, blocks run as they are and a sentence says
so.
It knows modules and calls, neither families nor hosts.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import threading
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

INDUCTOR = "inductor"
Call = Callable[..., Any]

# Before 2.13 torch keeps its flags for all threads: of two that set one and put it back in turns the later would put
# back what the earlier had set.
ONE_AT_A_TIME: AbstractContextManager[Any] = nullcontext() if torch.__version__ >= "2.13" else threading.RLock()

# What compiling raises; torch's own limit of graphs for one class, 8, is none of its usual kinds.
FAILURES: tuple[type[Exception], ...] = (
    torch._dynamo.exc.TorchDynamoException,
    *(kind for kind in [getattr(torch._dynamo.exc, "FailOnRecompileLimitHit", None)] if kind is not None),
)


class PastLimit(Exception):
    """Raised by our back-end instead of compiling one graph too many."""


class Backend:
    """A back-end of torch.compile that counts what it compiles. Two of one name are equal, so that torch, which keys
    compiled code by back-end, finds what an earlier one of us compiled."""

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.graphs = 0
        self.seconds = 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Call:
        if 0 <= self.limit <= self.graphs:
            raise PastLimit
        begun = time.perf_counter()
        try:
            compiled: Call = torch._dynamo.lookup_backend(self.name)(graph, inputs, **options)
        finally:
            self.seconds += time.perf_counter() - begun
        self.graphs += 1  # not before: some passes give a graph up to have it traced anew
        return compiled


class Compiler:
    """Compiles calls of modules and keeps the account. limit: of graphs, -1 for any number; say: takes remarks.

    Raises ValueError for a back-end that torch does not know.
    """

    def __init__(
        self, *, backend: str = INDUCTOR, dynamic: bool | None = True, limit: int = 32, say: Callable[[str], None]
    ) -> None:
        known = [*backends(), *torch.compiler.list_backends(exclude_tags=())]
        if backend not in known:
            raise ValueError(
                f"compile.backend is {backend!r}: torch.compile here has {', '.join(dict.fromkeys(known))}."
            )
        reason = cannot_compile(backend)
        if reason is not None:
            say(reason)
        self.works = reason is None
        self._dynamic = dynamic
        self._say = say
        self._backend = Backend(backend, limit)
        self._full = False
        self._full_kinds: set[type] = set()  # torch compiles no more for them
        self._failed: set[type] = set()

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return self._backend.graphs

    @property
    def seconds(self) -> float:
        """How long the back-end took for them; tracing is not counted."""
        return self._backend.seconds

    def compile(self, module: nn.Module) -> Call:
        """What calling `module` does, compiled at its first call; modules of one class share their graphs."""
        if not self.works:
            return module._call_impl
        kind: Any = type(module)
        compiled = torch.compile(_call_of(kind), fullgraph=True, dynamic=self._dynamic, backend=self._backend)
        return functools.partial(self._run, compiled, module)

    def _run(self, compiled: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module) in self._failed:
            return module._call_impl(*args, **kwargs)
        args = tuple(_without_base(value) for value in args)
        kwargs = {name: _without_base(value) for name, value in kwargs.items()}
        if self._full or type(module) in self._full_kinds:
            # What is compiled already runs on; what would need a graph of its own runs as it is.
            with torch.compiler.set_stance("eager_on_recompile"):
                return compiled(module, *args, **kwargs)
        # Two sizes that happen to be equal (3072 tokens, 3072 channels) are not one size for ever. Set by hand: the
        # flags' own `patch` takes as long as a block's launches.
        flags: Any = torch.fx.experimental._config
        with ONE_AT_A_TIME:
            before, flags.use_duck_shape = flags.use_duck_shape, False
            try:
                return compiled(module, *args, **kwargs)
            except FAILURES as error:  # compiling failed; nothing was run yet
                self._give_up(type(module), error)
            finally:
                flags.use_duck_shape = before
        return module._call_impl(*args, **kwargs)

    def _give_up(self, kind: type, error: Exception) -> None:
        """Says why modules of that kind, or what would need more graphs, run uncompiled from now on."""
        if isinstance(getattr(error, "inner_exception", None), PastLimit):
            self._full = True
            self._say(
                f"{self.graphs} graphs are compiled, which is the limit: what would need more runs uncompiled; "
                "raise compile.limit if the shapes are meant to vary this much"
            )
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            self._failed.add(kind)
            self._say(f"torch.compile failed, {kind.__name__} runs uncompiled ({_first_line(error)})")
        else:
            self._full_kinds.add(kind)
            self._say(
                f"torch compiles no more graphs of {kind.__name__}, which differ from one another by more than their "
                "weights: those that have none yet run uncompiled"
            )


def _without_base(value: Any) -> Any:
    """A view as a tensor that is none, over the same memory, with the strides of its shape where it is dense.

    The compiler takes a view (an embedder's output) and a tensor of its own (the next block's) for two kinds of input,
    and at batch 1 the slice of a sequence, whose first stride nobody uses, for a third: a graph for each. A clone of
    such a slice keeps its strides.
    """
    if type(value) is not Tensor or value.requires_grad:
        return value
    slice_of_one = value.ndim > 1 and value.shape[0] == 1 and value.stride(0) != value.numel()
    if not value._is_view() and not slice_of_one:
        return value
    with torch.no_grad():
        strides = torch.empty(value.shape, device="meta").stride() if value.is_contiguous() else value.stride()
        return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, strides)


def cannot_compile(backend: str = INDUCTOR) -> str | None:
    """Why torch.compile cannot work here, in a sentence without its full stop, or None when it can."""
    if backend != INDUCTOR:
        return None
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs the package triton on this machine, the model is not compiled"
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return "torch.compile needs a C++ compiler on this machine, the model is not compiled"
    return None


def backends() -> list[str]:
    """torch.compile's back-ends on this machine, the usual one first."""
    return [INDUCTOR, *(name for name in torch.compiler.list_backends() if name != INDUCTOR)]


@functools.cache
def _call_of(kind: Any) -> Call:
    """`_call_impl` as a function of its own for each class.

    torch counts and limits compilations by code object (8 each): all modules share nn.Module's, so one class would
    use up another's.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(co_name=kind.__name__), call.__globals__, kind.__name__)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
