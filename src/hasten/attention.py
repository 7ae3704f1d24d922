"""attention.py answers which attention a model's calls take: asked for, fits, its numbers tested, the fastest of them.

A back-end is tested against float32 the first time a device, dtype, head size and kind of length meets it; one that
fails, or refuses, gives way to the next that was asked for and in the end to torch's own, and the reason is kept for
the report. It knows no model and no host: exactness in some steps or blocks is a flag that hosts set from outside
compiled code.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.attention_backends import (
    BACKENDS,
    DENSE,
    SPARSE,
    Ask,
    Backend,
    Verdict,
    compact,
    sol,
    sparse,
    sparse_fused,
)
from hasten.attention_keys import Kept, attend_kept
from hasten.kernels.streams import Streams
from hasten.marks import Itself, Numbers

# In the order of wishes; what cannot be used gives way to the next.
CHAINS = {
    "auto": DENSE,
    # The original node's wish: 8 bits, by its package or by our kernels, whichever is faster here.
    "sage8": ("sage", "kitchen", "int8_fp8", "int8"),
}
CHOICES = ("auto", *BACKENDS)
FUSED = tuple(name for name, backend in BACKENDS.items() if backend.fused is not None)

# Longest test: attention's errors do not grow with N, but the time of a float32 reference does.
TEST_ROWS = 1024

_LIVE: weakref.WeakValueDictionary[int, Attention] = weakref.WeakValueDictionary()


class Attention:
    """One model's attention. exact: while it is set, calls take torch's own; said: why anything gave way."""

    def __init__(
        self,
        wanted: str = "auto",
        *,
        error: float = 0.06,
        keep: float = 0.5,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """wanted: one of CHOICES or CHAINS; error: the largest relative L1 that `auto` may cost.

        Raises ValueError on an unknown name.
        """
        if wanted not in BACKENDS and wanted not in CHAINS:
            raise ValueError(f"attention {wanted!r} is not known: known are {', '.join(CHOICES)}.")
        self.wanted, self.error, self.say = wanted, error, say
        self.exact = self.always_exact = False
        # Of block-sparse kernels alone: the share of blocks that is kept, and how many leading tokens are text.
        self.keep, self.text_rows = keep, 0
        # The picture's tokens, rows and columns, where the host knows them: blocks are then patches of it.
        self.grid: tuple[int, int] | None = None
        # Or, for each head, what was tuned, see sparse.Heads: keep, alike and skip_below.
        self.heads: Numbers | None = None
        # Which keys count, where a host leaves out what a mask would mask.
        self.kept: Kept | None = None
        self.used: dict[str, int] = {}
        self._chosen: dict[Ask, Backend] = {}
        # A tensor, for a graph would be compiled for each plain number: for every `with` and, tuned, for every block.
        with torch.inference_mode(False):
            self.number = torch.tensor(id(self), device="cpu")
        _LIVE[id(self)] = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, all (B, H, N, D); a step of a graph for torch.compile, whatever is chosen."""
        return attend_numbered(self.number, q, k, v)

    def state(self, ask: Ask) -> tuple[Hashable, ...]:
        """What the launches of such calls depend on beside their tensors: equal states, equal launches, of whichever.

        It chooses as the call would, and says why something gave way, though the call itself may never be made. It
        holds what is read besides: settings of each head, the order of rows.
        """
        names = self.names(ask)
        kept = None if self.kept is None else tuple(n if isinstance(n, int) else Itself(n) for n in self.kept)
        order = compact(ask.rows, self.text_rows, self.grid, ask.device) if "sparse" in names else None
        return names, self.keep, self.text_rows, self.grid, Itself(order), self.heads, kept

    def names(self, ask: Ask) -> tuple[str, ...]:
        """The back-ends that such calls go to at this step, one for each length that the kept keys have."""
        if self.exact:
            return ("sdpa",)
        if self.kept is None:  # a FLUX's block at every step: no copies of what was asked
            return (self.choose(ask).name,)
        lengths = sorted({n if isinstance(n, int) else len(n) for n in self.kept})
        return tuple(self.choose(replace(ask, keys=keys)).name for keys in lengths)

    @property
    def line(self) -> str:
        """What was used, for the report: `attention int8_fp8`; several by how often."""
        names = sorted(self.used, key=lambda name: -self.used[name])
        return "attention " + ", ".join(names or [self.wanted])

    def choose(self, ask: Ask) -> Backend:
        """The back-end for such calls; the first time it may test and measure."""
        found = self._chosen.get(ask)
        if found is None:
            found = self._chosen[ask] = self._choose(ask)
        return found

    def fits(self, ask: Ask) -> bool:
        """Whether something that was asked for takes such calls, rather than torch's own in its stead."""
        return self.choose(ask).name in CHAINS.get(self.wanted, (self.wanted,))

    def _choose(self, ask: Ask) -> Backend:
        names = CHAINS.get(self.wanted, (self.wanted,))
        fit = []
        for name in names:
            verdict = judge(BACKENDS[name], ask, self.error if len(names) > 1 else None)
            if verdict.ok:
                fit.append(BACKENDS[name])
            elif len(names) == 1:
                self.say(f"attention {name} gave way to torch's own: {verdict.reason}")
        if not fit:
            if len(names) > 1 and self.wanted != "auto":
                self.say(f"no 8-bit attention can be used here ({verdict.reason}): torch's own is")
            return BACKENDS["sdpa"]
        return fit[0] if len(fit) == 1 else fastest(fit, ask)

    def fuses(self, ask: Ask) -> bool:
        """Whether such calls go to a kernel that norms and rotates on its way."""
        return not self.exact and self.choose(ask).fused is not None

    def attend_fused(self, streams: Streams) -> Tensor | None:
        """A call from before norm and rotation on, (B, N, H, D); None where what is chosen starts behind them."""
        q, rows = streams.q, streams.rows
        ask = Ask(q.device, q.dtype, q.shape[1], q.shape[3], rows, rows)
        backend = BACKENDS["sdpa"] if self.exact else self.choose(ask)
        fused = backend.fused
        if fused is None:
            return None
        if backend.name == "sparse":
            fused = sparse_fused(self.keep, self.text_rows, heads=self._heads_at(q.device), grid=self.grid)
        try:
            out = fused(streams, q.dtype)
        except Exception as error:  # kernels have no common class for their refusals
            self._give_way(backend, ask, error)
            return None
        self.used[backend.name] = self.used.get(backend.name, 0) + 1
        return out

    def _heads_at(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.heads is None:
            return None
        keep, alike, skip_below = self.heads.at(device)
        return keep, alike, skip_below

    def _give_way(self, backend: Backend, ask: Ask, error: Exception) -> None:
        self._chosen[ask] = BACKENDS["sdpa"]
        self.say(f"attention {backend.name} gave way to torch's own: {_first(error)}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The call itself, outside of any graph."""
        return self._attend(q, k, v) if self.kept is None else attend_kept(self._attend, q, k, v, self.kept)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        backend = BACKENDS["sdpa"] if self.exact else self.choose(Ask.of(q, k))
        attend = backend.attend
        if backend.name == "sparse":
            attend = sparse(self.keep, self.text_rows, heads=self._heads_at(q.device), grid=self.grid)
        elif backend.name == "sol":
            attend = sol(self.keep, self.text_rows)
        try:
            out = attend(q, k, v)
        except Exception as error:  # kernels have no common class for their refusals
            if backend.name == "sdpa" or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
                raise
            self._give_way(backend, Ask.of(q, k), error)
            backend = BACKENDS["sdpa"]
            out = backend.attend(q, k, v)
        self.used[backend.name] = self.used.get(backend.name, 0) + 1
        return out


def live(number: Tensor) -> Attention | None:
    """The attention of that number, while a model has it."""
    return _LIVE.get(int(number))


def attend_numbered(number: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the attention of that number makes of a call: one graph for whichever it is."""
    out: Tensor = torch.ops.hasten.attention(q, k, v, number)
    return out.transpose(1, 2)


@torch.library.custom_op("hasten::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    chooser = live(number)
    out = scaled_dot_product_attention(q, k, v) if chooser is None else chooser.attend(q, k, v)
    return out.to(q.dtype).transpose(1, 2).contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def judge(backend: Backend, ask: Ask, error: float | None = None) -> Verdict:
    """Whether `backend` takes such calls and its numbers are right; error: a tighter bound than its own."""
    verdict = backend.supports(ask)
    if not verdict.ok:
        return verdict
    if error is not None and backend.error >= SPARSE:
        return Verdict(False, "leaves a part of the sum out")
    found = _tested(backend, ask.device, ask.dtype, ask.head_dim, _test_rows(ask.rows))
    if isinstance(found, str):
        return Verdict(False, found)
    bound = backend.error if error is None else min(error, backend.error)
    if math.isnan(found):
        return Verdict(False, "its self-test gives numbers that are not finite")
    if found > bound:
        return Verdict(False, f"its self-test is off by {found:.3g}, more than {bound:.3g}")
    return verdict


def self_test(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, rows: int) -> float:
    """Mean error over mean size against float32 on noise with outlying keys; NaN where the result is not finite.

    A back-end that leaves a part of the sum out is judged by whether its result is finite alone, and gives 0. In
    float16, scores and sums beyond its range are tried too: a kernel that keeps either in 16 bits gives infinity.
    """
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 2, rows, head_dim), generator=noise).to(device, dtype) for _ in range(3))
    k[..., head_dim // 3] += 9.0
    k[..., head_dim // 2] -= 6.0
    found = backend.attend(q, k, v)
    if found.shape != q.shape or not bool(torch.isfinite(found).all()):
        return float("nan")
    if dtype == torch.float16:
        for given in ((q * 40.0, k * 40.0, v), (q * 0.01, k, v + 200.0)):
            if not bool(torch.isfinite(backend.attend(*given)).all()):
                return float("nan")
    if backend.error >= SPARSE:
        return 0.0
    weights = torch.softmax(q.float() @ k.float().mT * head_dim**-0.5, -1)
    exact = weights @ v.float()
    return float((found.float() - exact).abs().sum() / exact.abs().sum())


@functools.lru_cache(maxsize=256)
def _tested(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, rows: int
) -> float | str:  # fmt: skip
    try:
        return self_test(backend, device, dtype, head_dim, rows)
    except Exception as error:  # kernels have no common class for their refusals
        return _first(error)


def _test_rows(rows: int) -> int:
    """A length like `rows`, no longer than TEST_ROWS: whether the last block of 128 is whole stays as it is."""
    return rows if rows <= TEST_ROWS else TEST_ROWS - 128 + rows % 128


def _first(error: Exception) -> str:
    return (f"{error}".strip().splitlines() or [type(error).__name__])[0][:200]


def fastest(backends: Sequence[Backend], ask: Ask) -> Backend:
    """The fastest of those that fit, measured once for such calls on this machine and remembered in a small file."""
    names = sorted(backend.name for backend in backends)
    key = " ".join(map(str, (_device_name(ask.device), torch.__version__, *shape_class(ask), *names)))
    known = _remembered()
    if known.get(key) not in names:
        times = {backend.name: _milliseconds(backend, ask) for backend in backends}
        known[key] = min(times, key=lambda name: times[name])
        _remember(known)
    return BACKENDS[known[key]]


def shape_class(ask: Ask) -> tuple[str, int, int, int]:
    """Calls that one measurement speaks for: dtype, heads, head size, and the length up to the next power of two."""
    return str(ask.dtype).removeprefix("torch."), ask.heads, ask.head_dim, 1 << (ask.rows - 1).bit_length()


def cache_file() -> Path:
    """Where measured choices are kept; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten" / "attention.json"


def _milliseconds(backend: Backend, ask: Ask) -> float:
    """The best of a few calls at the full size; infinite where it fails there."""
    made = functools.partial(torch.randn, device=ask.device, dtype=ask.dtype)
    q, k, v = (made((1, ask.heads, rows, ask.head_dim)) for rows in (ask.rows, ask.keys, ask.keys))
    best = float("inf")
    try:
        for _ in range(6):
            _wait(ask.device)
            started = time.perf_counter()
            for _ in range(3):
                backend.attend(q, k, v)
            _wait(ask.device)
            best = min(best, (time.perf_counter() - started) * 1000.0 / 3)
    except Exception:  # kernels have no common class for their refusals
        return float("inf")
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    """Written whole or not at all; a folder that cannot be written costs a measurement in the next process."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
            json.dump(known, new, indent=1, sort_keys=True)
        Path(new.name).replace(file)
    except OSError:
        return
