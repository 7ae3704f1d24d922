"""Linear layers over rows that were normed, modulated or cast by rows.py: several layers with one input as one matrix
product, text's and image's layers side by side, 16 or 8 bits.

Weights that lie one behind the other in memory (`lay_together`) are multiplied as one matrix: FLUX.1's query, key and
value layers are 3.3 waves of tiles each on an H200's 132 multiprocessors and pay for 4, together they are 9.8. Whether
they do lie so is looked up at each call, inside the operation: weights may be moved or replaced (offloading, LoRA),
then they are multiplied one by one, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.operation import operation

FP8 = torch.float8_e4m3fn


def linear_rows(
    rows: Tensor,
    split: int,
    text: Sequence[tuple[Tensor, ...]],
    image: Sequence[tuple[Tensor, ...]],
    *,
    gelu: bool = False,
) -> Tensor:
    """Rows (R, K) through layers side by side: (R, sum of widths), the first `split` rows through text's.

    text, image: weights (O, K) and biases (O) of each stream's layers; without text's, split is 0. gelu: in its tanh
    form, taken of the result.
    """
    out: Tensor = torch.ops.hasten.linear_rows(rows, split, *_lists(text, 2), *_lists(image, 2), gelu)
    return out


def linear_rows_8(
    rows: Tensor,
    scales: Tensor,
    split: int,
    text: Sequence[tuple[Tensor, ...]],
    image: Sequence[tuple[Tensor, ...]],
    dtype: torch.dtype,
) -> Tensor:
    """linear_rows in 8 bits: rows and weights are float8 or int8, each row and each output with its own scale.

    scales (R, 1) float32; text, image: weights (O, K), their scales (O) float32, biases (O). The result is of `dtype`.
    """
    out: Tensor = torch.ops.hasten.linear_rows_8(
        rows,
        scales,
        split,
        *_lists(text, 3),
        *_lists(image, 3),
        dtype,
    )
    return out


def linear_beside(before: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[before, hidden] @ weight.T + bias without ever laying the two side by side; (R, C) and (R, M) give (R, O)."""
    out: Tensor = torch.ops.hasten.linear_beside(before, hidden, weight, bias)
    return out


def lay_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, equal but for their first size, one behind the other in one piece of memory."""
    return list(torch.cat(list(tensors)).split([t.shape[0] for t in tensors]))


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, without a copy, or None when they do not lie one behind the other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.storage_offset() != end or tensor.untyped_storage().data_ptr() != storage:
            return None
        if not tensor.is_contiguous():
            return None
        end += tensor.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


def _lists(layers: Sequence[tuple[Tensor, ...]], count: int) -> list[list[Tensor]]:
    """All weights, all scales where there are any, all biases."""
    return [[layer[i] for layer in layers] for i in range(count)]


def _grouped(*lists: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The layers as one where all their tensors lie together, one by one where they do not."""
    whole = [together(tensors) for tensors in lists]
    if all(tensor is not None for tensor in whole):
        return [tuple(tensor for tensor in whole if tensor is not None)]
    return list(zip(*lists, strict=True))


def _parts(rows: int, split: int, text: Sequence[Tensor], image: Sequence[Tensor]) -> list[tuple[int, int, bool]]:
    """Begin, end and whether it is text of each stream's rows; streams without rows are left out."""
    both = [(0, split, True), (split, rows, False)] if text else [(0, rows, False)]
    return [(begin, end, is_text) for begin, end, is_text in both if end > begin]


def _linear_rows_shapes(
    rows: Tensor,
    split: int,
    text: list[Tensor],
    text_bias: list[Tensor],
    image: list[Tensor],
    image_bias: list[Tensor],
    gelu: bool,
) -> Tensor:
    return rows.new_empty((rows.shape[0], sum(w.shape[0] for w in image)))


@operation("linear_rows", shapes=_linear_rows_shapes)
def _linear_rows(
    rows: Tensor,
    split: int,
    text: list[Tensor],
    text_bias: list[Tensor],
    image: list[Tensor],
    image_bias: list[Tensor],
    gelu: bool,
) -> Tensor:
    out = rows.new_empty((rows.shape[0], sum(w.shape[0] for w in image)))
    for begin, end, is_text in _parts(rows.shape[0], split, text, image):
        given, at = rows[begin:end], 0
        for weight, bias in _grouped(text, text_bias) if is_text else _grouped(image, image_bias):
            width = weight.shape[0]
            target = out[begin:end, at : at + width]
            if gelu:
                _linear_gelu(given, weight, bias, target)
            else:
                torch.addmm(bias, given, weight.t(), out=target)
            at += width
    return out


def _linear_gelu(rows: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    """gelu(rows @ weight.T + bias) into `target`; on a GPU gelu is the matrix product's own last step."""
    if rows.is_cuda and target.is_contiguous():
        torch.ops.aten._addmm_activation.out(bias, rows, weight.t(), use_gelu=True, out=target)
        return
    summed = torch.addmm(bias, rows, weight.t())
    target.copy_(torch.nn.functional.gelu(summed, approximate="tanh"))


def _linear_beside_shapes(before: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]))


@operation("linear_beside", shapes=_linear_beside_shapes)
def _linear_beside(before: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = before.shape[1]
    out = torch.addmm(bias, before, weight[:, :width].t())
    return out.addmm_(hidden, weight[:, width:].t())


def _linear_rows_8_shapes(
    rows: Tensor,
    scales: Tensor,
    split: int,
    text: list[Tensor],
    text_scales: list[Tensor],
    text_bias: list[Tensor],
    image: list[Tensor],
    image_scales: list[Tensor],
    image_bias: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty((rows.shape[0], sum(w.shape[0] for w in image)), dtype=dtype)


@operation("linear_rows_8", shapes=_linear_rows_8_shapes)
def _linear_rows_8(
    rows: Tensor,
    scales: Tensor,
    split: int,
    text: list[Tensor],
    text_scales: list[Tensor],
    text_bias: list[Tensor],
    image: list[Tensor],
    image_scales: list[Tensor],
    image_bias: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    out = rows.new_empty((rows.shape[0], sum(w.shape[0] for w in image)), dtype=dtype)
    for begin, end, is_text in _parts(rows.shape[0], split, text, image):
        lists = (text, text_scales, text_bias) if is_text else (image, image_scales, image_bias)
        at = 0
        for weight, weight_scales, bias in _grouped(*lists):
            width = weight.shape[0]
            _multiply_8(
                rows[begin:end], scales[begin:end], weight, weight_scales, bias, out[begin:end, at : at + width]
            )
            at += width
    return out


def _multiply_8(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor, out: Tensor) -> None:
    """rows @ weight.T, rescaled, with the bias, into `out` (a slice of columns where layers lie apart)."""
    if weight.dtype == FP8 and rows.is_cuda and _whole_sixteens(weight):
        given = (rows, weight.t(), scales, weight_scales[None, :], bias.to(torch.bfloat16), None, torch.bfloat16, True)
        if out.is_contiguous() and out.dtype == torch.bfloat16:
            torch.ops.aten._scaled_mm.out(*given, out=out)
        else:  # row-wise scales come out in bfloat16 only
            out.copy_(torch._scaled_mm(*given))
        return
    if weight.dtype == torch.int8 and rows.shape[0] > 16 and _whole_sixteens(weight):
        product = torch._int_mm(rows, weight.t()).float()
    else:
        product = rows.float() @ weight.float().t()
    out.copy_(product * scales * weight_scales + bias.float())


def _whole_sixteens(weight: Tensor) -> bool:
    """Whether the matrix units take both sizes: multiples of 16."""
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
