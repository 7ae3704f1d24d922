"""sparse.py finds, keeps and reads the settings of block-sparse attention: thresholds for each head of each block.

The search takes q, k, v of real calls and asks how few blocks of keys a head may attend to before its result is off by
more than l1, and which of those may be skipped for their small weight before it is off by more than pv_l1. All heads of
a block are searched in one batch. Files have the original ComfyUI-Lightning's keys, such as
`double_blocks.3.spargeattn.cdfthreshd`, a tensor (heads,) each.
Source of the rule and of the thresholds' meaning: SpargeAttn (Zhang et al., 2025).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.attention_backends import compact

BLOCK = 128
NAMES = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
PART = "spargeattn"

# How alike a block's rows must be for their mean to speak for them: -1 lets every mean speak.
ALIKE = (-1.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
# Below this share of skipped blocks a head is dense: choosing costs more than it spares (the original's limit).
LEAST = 0.1
PV_MOST = 50.0


@dataclass(frozen=True)
class Heads:
    """One block's settings, (H,) each. sparse: bool; keep, alike, skip_below: float32."""

    sparse: Tensor
    keep: Tensor
    alike: Tensor
    skip_below: Tensor

    def joined(self, other: Heads) -> Heads:
        """The denser of both, head by head: what was right for one call stays right."""
        both = (torch.maximum(getattr(self, n), getattr(other, n)) for n in ("keep", "alike", "skip_below"))
        return _dense_where(~(self.sparse & other.sparse), *both)

    def to(self, device: torch.device) -> Heads:
        """The same on another device."""
        return Heads(*(t.to(device) for t in (self.sparse, self.keep, self.alike, self.skip_below)))


# q, k, v, then the settings: softmax(q k^T) v over what they leave, and the share of blocks of keys skipped, (H,).
Sparse = Callable[[Tensor, Tensor, Tensor, Heads, int], tuple[Tensor, Tensor]]


def check_limits(l1: float, pv_l1: float) -> None:
    """Raises ValueError unless 0 < l1 < pv_l1 < 1."""
    if not 0.0 < l1 < 1.0 or not 0.0 < pv_l1 < 1.0:
        raise ValueError(
            f"l1 is {l1:g} and pv_l1 is {pv_l1:g}: numbers between 0 and 1 are expected, such as .06, .065."
        )
    if pv_l1 <= l1:
        raise ValueError(f"pv_l1 is {pv_l1:g} and l1 is {l1:g}: pv_l1 must be above l1, such as {l1 + 0.005:g}.")


def tune_heads(
    q: Tensor, k: Tensor, v: Tensor, *, l1: float = 0.06, pv_l1: float = 0.065, text_rows: int = 0,
    attend: Sparse | None = None, stopped: Callable[[], None] = lambda: None,
) -> tuple[Heads, Tensor]:  # fmt: skip
    """The sparsest settings that keep every head within l1 and pv_l1 on one call, and the share skipped, (H,).

    q, k, v: (B, H, N, D). stopped: asked between trials; it may raise to interrupt. Raises ValueError on the limits.
    """
    check_limits(l1, pv_l1)
    attend = attend or best_attend(q)
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    size = exact.abs().sum((0, 2, 3))
    heads, device = q.shape[1], q.device

    def full(value: float) -> Tensor:
        return torch.full((heads,), value, device=device)

    def trial(keep: Tensor, alike: Tensor, skip_below: Tensor) -> tuple[Tensor, Tensor]:
        stopped()
        given = Heads(torch.ones(heads, dtype=torch.bool, device=device), keep, alike, skip_below)
        out, skipped = attend(q, k, v, given, text_rows)
        return (out.float() - exact).abs().sum((0, 2, 3)) / size, skipped

    keep, alike, best, never = full(1.0), full(1.0), full(0.0), full(math.inf)
    for wanted in ALIKE:
        low, high, spared = full(0.0), full(1.0), full(0.0)
        for _ in range(10):  # to 0.001, as the original
            middle = (low + high) / 2
            error, skipped = trial(middle, full(wanted), never)
            fits = error < l1
            high, low = torch.where(fits, middle, high), torch.where(fits, low, middle)
            spared = torch.where(fits, skipped, spared)
        better = spared > best
        keep, alike = torch.where(better, high, keep), torch.where(better, full(wanted), alike)
        best = torch.where(better, spared, best)
        if wanted > 0.0 and not bool((spared > LEAST).any()):
            break
    low, high = full(0.0), full(PV_MOST)
    for _ in range(9):  # to 0.1
        middle = (low + high) / 2
        fits = trial(keep, alike, middle)[0] < pv_l1
        high, low = torch.where(fits, middle, high), torch.where(fits, low, middle)
    found = _dense_where(best <= LEAST, keep, alike, high)
    return found, torch.where(found.sparse, best, 0.0)


def _dense_where(dense: Tensor, keep: Tensor, alike: Tensor, skip_below: Tensor) -> Heads:
    return Heads(
        ~dense, torch.where(dense, 1.0, keep), torch.where(dense, 1.0, alike), torch.where(dense, PV_MOST, skip_below)
    )


def best_attend(q: Tensor) -> Sparse:
    """Our kernel where it can be used for such calls, else the same rule in torch."""
    from hasten.attention import judge
    from hasten.attention_backends import BACKENDS, Ask

    return by_kernel if judge(BACKENDS["sparse"], Ask.of(q, q)).ok else by_torch


def by_kernel(q: Tensor, k: Tensor, v: Tensor, heads: Heads, text_rows: int) -> tuple[Tensor, Tensor]:
    """One trial with our kernel, its rounding included."""
    from hasten.kernels.attention8 import attend_chosen
    from hasten.kernels.chosen import choose
    from hasten.kernels.eight import prepare

    eight = prepare(q, k, v, means=True)
    chosen = choose(eight, keep=heads.keep, alike=heads.alike, topk=False, text_rows=text_rows)
    skip_below = None if bool(torch.isinf(heads.skip_below).all()) else heads.skip_below
    out = attend_chosen(eight, v, q.dtype, chosen=chosen, skip_below=skip_below)
    blocks = chosen.count.shape[1]
    kept = chosen.count.view(q.shape[0], q.shape[1], blocks).float().mean((0, 2)) / blocks
    return out.transpose(1, 2), 1.0 - kept


def by_torch(q: Tensor, k: Tensor, v: Tensor, heads: Heads, text_rows: int) -> tuple[Tensor, Tensor]:
    """One trial in torch, in float32 and N x N numbers: for CPUs and tests."""
    rows, scale = q.shape[2], q.shape[-1] ** -0.5
    taken = blocks_taken(q, k, heads, text_rows)
    mask = taken.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :rows, :rows]
    score = (q.float() @ k.float().mT * scale).masked_fill(~mask, -math.inf)
    if not bool(torch.isinf(heads.skip_below).all()):
        # As the kernel has it: a block whose best score lies below the best so far by more, for 64 rows together.
        padded = torch.nn.functional.pad(score, (0, -rows % BLOCK, 0, -rows % 64), value=-math.inf)
        best = padded.unflatten(3, (-1, BLOCK)).amax(4) * math.log2(math.e)
        so_far = torch.cummax(torch.nn.functional.pad(best, (1, 0), value=-1e30)[..., :-1], 3).values
        above = (best - so_far).nan_to_num(-math.inf).unflatten(2, (-1, 64)).amax(3)
        stays = above + heads.skip_below[None, :, None, None] > 0.0
        stays = stays.repeat_interleave(64, 2).repeat_interleave(BLOCK, 3)[:, :, :rows, :rows]
        score = score.masked_fill(~stays, -math.inf)
    return torch.softmax(score, -1) @ v.float(), 1.0 - taken.float().mean((0, 2, 3))


def blocks_taken(q: Tensor, k: Tensor, heads: Heads, text_rows: int) -> Tensor:
    """Which blocks of keys each block of queries attends to, (B, H, blocks, blocks): the kernel's rule in torch."""
    (q_mean, q_alike), (k_mean, k_alike) = _means(q), _means(k)
    alike = heads.alike[None, :, None]
    spoken = k_alike > alike
    score = (q_mean @ k_mean.mT * q.shape[-1] ** -0.5).masked_fill(~spoken[:, :, None], -math.inf)
    share = torch.softmax(score, -1).nan_to_num(0.0)
    order = share.argsort(-1, descending=True)
    within = share.gather(-1, order).cumsum(-1) <= heads.keep[None, :, None, None] + 1e-6
    within[..., 0] = True
    taken = torch.zeros_like(within).scatter(-1, order, within)
    always = (text_rows + BLOCK - 1) // BLOCK
    taken = taken | ~spoken[:, :, None] | (q_alike <= alike)[..., None]
    taken[:, :, :always] = True
    taken[:, :, :, :always] = True
    return taken


def _means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each block's mean row, and the mean cosine between any two of its rows."""
    rows = x.shape[2]
    counts = torch.full((-(-rows // BLOCK),), float(BLOCK), device=x.device)
    counts[-1] = rows - BLOCK * (len(counts) - 1)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -rows % BLOCK)).unflatten(2, (-1, BLOCK))
    unit = torch.nn.functional.normalize(padded, dim=-1, eps=1e-12).sum(3) / counts[:, None]
    return padded.sum(3) / counts[:, None], (unit * unit).sum(-1)


def save_settings(settings: Mapping[str, Heads], file: Path, *, notes: Mapping[str, str] | None = None) -> None:
    """Writes the settings, whole or not at all. notes: what else the header keeps. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    for block, heads in settings.items():
        values = (heads.sparse, heads.keep, heads.alike, torch.zeros_like(heads.keep), heads.skip_below)
        for name, value in zip(NAMES, values, strict=True):
            tensors[f"{block}.{PART}.{name}"] = value.detach().cpu().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder) / file.name
        save_file(tensors, new, metadata={"format": "pt", **(notes or {})})
        new.replace(file)


def load_settings(file: Path, blocks: Sequence[str] | None = None, heads: int | None = None) -> dict[str, Heads]:
    """The settings of each block that the file has, by names such as `double_blocks.3`.

    blocks, heads: the model's own, where known. Raises ValueError in one sentence for a file that is damaged, is none
    of block-sparse attention, or belongs to another model; FileNotFoundError where there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: check the path, or make one with `hasten tune-attention`.")
    try:
        with safe_open(file, "pt") as opened:
            found, strange = _settings_in(opened, blocks)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from None
    lacking = [f"{block}.{PART}.{name}" for block, has in found.items() for name in NAMES[:3] if name not in has]
    if not found or strange or lacking:
        words = [f"{len(strange)} keys do not match, such as {strange[0]}"] if strange else []
        words += [f"{len(lacking)} are missing, such as {lacking[0]}"] if lacking else []
        raise ValueError(f"{file} does not fit this model: {'; '.join(words) or 'it holds no settings'}.")
    return {block: _heads_of(file, block, values, heads) for block, values in found.items()}


def _settings_in(opened: Any, blocks: Sequence[str] | None) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """An open file's settings by block and name, and its other keys, which are not read: it may be a whole model."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key in opened.keys():  # noqa: SIM118 - not a dict
        block, _, rest = key.partition(f".{PART}.")
        # diffusers-like names of other packs lead with the block too: the exact name decides, never a part of it.
        if rest not in NAMES or (blocks is not None and block not in blocks):
            strange.append(key)
        else:
            found.setdefault(block, {})[rest] = opened.get_tensor(key)
    return found, strange


def _heads_of(file: Path, block: str, values: Mapping[str, Tensor], heads: int | None) -> Heads:
    counts = {value.numel() for value in values.values()}
    if len(counts) != 1 or (heads is not None and counts != {heads}):
        expected = "one number for each head" if heads is None else f"{heads} heads"
        raise ValueError(f"{file} does not fit this model: {block} has {min(counts)} heads, {expected} are expected.")
    sparse = values["is_sparse"].flatten().bool()
    keep, alike = (values[name].flatten().float() for name in ("cdfthreshd", "simthreshd1"))
    skip_below = values["pvthreshd"].flatten().float() if "pvthreshd" in values else torch.full_like(keep, PV_MOST)
    if not all(bool(torch.isfinite(t).all()) for t in (keep, alike, skip_below)):
        raise ValueError(f"{file} is damaged: {block} has numbers that are not finite.")
    return _dense_where(~sparse, keep, alike, skip_below)


def notes_of(file: Path) -> dict[str, str]:
    """What the file's header keeps beside the settings; empty where nothing can be read."""
    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError):
        return {}


class Tuning:
    """A search that goes on from call to call: joins what each block's calls allow, keeps a file, can be resumed.

    blocks: every block's name in order; of those this process searches the ones of its rank. done: how many calls of
    each block were searched.
    """

    def __init__(
        self, blocks: Sequence[str], file: Path, *, l1: float = 0.06, pv_l1: float = 0.065, calls: int = 6,
        rank: int = 0, world: int = 1, attend: Sparse | None = None,
    ) -> None:  # fmt: skip
        check_limits(l1, pv_l1)
        self.blocks, self.file, self.l1, self.pv_l1, self.calls = list(blocks), file, l1, pv_l1, calls
        self.mine = set(self.blocks[rank::world])
        self.settings: dict[str, Heads] = {}
        self.skipped: dict[str, list[float]] = {}
        self._attend, self._seen = attend, dict.fromkeys(self.blocks, 0)
        self._own = file if world == 1 else file.with_name(f"{file.stem}.rank{rank}of{world}{file.suffix}")
        self._notes = {"l1": repr(l1), "pv_l1": repr(pv_l1), "calls": str(calls)}
        kept = notes_of(self._own)
        self._before: dict[str, int] = {}
        if all(kept.get(key) == value for key, value in self._notes.items()) and "done" in kept:
            self.settings = load_settings(self._own, self.blocks)
            self._before = json.loads(kept["done"])
            self.skipped = json.loads(kept.get("skipped", "{}"))
        self.done = dict(self._before)

    @property
    def left(self) -> int:
        """How many calls this process has still to search."""
        return sum(max(0, self.calls - self.done.get(block, 0)) for block in self.mine)

    def see(
        self, block: str, q: Tensor, k: Tensor, v: Tensor, *, text_rows: int = 0, grid: tuple[int, int] | None = None
    ) -> None:  # fmt: skip
        """One call of `block` in a run: searched, unless it is another rank's or was searched before.

        grid: rows and columns of the picture's tokens; they are searched in the order in which they will be used.
        """
        if block not in self.mine:
            return
        self._seen[block] += 1
        if self._seen[block] <= self._before.get(block, 0) or self.done.get(block, 0) >= self.calls:
            return
        order = compact(q.shape[2], text_rows, grid, q.device)
        if order is not None:
            q, k, v = (t.index_select(2, order) for t in (q, k, v))
        heads, skipped = tune_heads(
            q, k, v, l1=self.l1, pv_l1=self.pv_l1, text_rows=text_rows, attend=self._attend
        )  # fmt: skip
        heads = heads.to(torch.device("cpu"))
        self.settings[block] = heads if block not in self.settings else self.settings[block].joined(heads)
        self.skipped.setdefault(block, []).append(float(skipped.mean()))
        self.done[block] = self.done.get(block, 0) + 1
        self.save()

    def save(self) -> None:
        """Keeps what was found so far."""
        notes = {**self._notes, "done": json.dumps(self.done), "skipped": json.dumps(self.skipped)}
        save_settings({b: self.settings[b] for b in self.blocks if b in self.settings}, self._own, notes=notes)

    def finish(self) -> str:
        """Joins every rank's part into the file, on rank 0, and says in one sentence what was found."""
        gathered: list[tuple[dict[str, Heads], dict[str, list[float]], dict[str, int]]] = [
            (self.settings, self.skipped, self.done)
        ]
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            parts: list[tuple[dict[str, Heads], dict[str, list[float]], dict[str, int]]] = [
                ({}, {}, {}) for _ in range(distributed.get_world_size())
            ]
            distributed.all_gather_object(parts, gathered[0])
            gathered = parts
        for settings, skipped, done in gathered:
            self.settings |= settings
            self.skipped |= skipped
            self.done |= done
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
            own, self._own = self._own, self.file
            self.save()
            self._own = own
        if self._own != self.file:
            self._own.unlink(missing_ok=True)
        return self.words()

    def words(self) -> str:
        """What the settings spare, or that dense attention is the better choice."""
        shares = [share for block in self.settings for share in self.skipped.get(block, [])]
        spared = sum(shares) / len(shares) if shares else 0.0
        heads = sum(int(h.sparse.sum()) for h in self.settings.values())
        of = sum(h.sparse.numel() for h in self.settings.values())
        if spared < LEAST:
            return (
                f"dense is faster here: within l1 {self.l1:g} only {100 * spared:.0f} % of the blocks can be left out"
            )
        return f"{100 * spared:.0f} % of the blocks are left out, in {heads} of {of} heads"
