"""Output heads that are not one dense tensor on the device: quantised, or kept in host memory.

The head is often the largest tensor of a model: 1 GiB in bf16 for 128,256 x 4,096. It is read once
a pass, slice by slice, so a slice can be made dense, or brought from the host, when its turn comes.

A quantised head is another model than the one it was made from. Policy and reference share it, so
training on it is as exact as with any other base; its log-probs are not those of the bf16 head.
int8 keeps a scale a row, its absmax / 127. A head on the host is the same head: the same bits.

Shapes: D hidden, V vocabulary, S slice width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem_dpo.model.language_model import LanguageModel
from lowmem_dpo_kernels.triton_support import is_rehearsing

HeadQuantization = Literal["none", "int8"]
Place = Literal["auto", "device", "host"]

CHUNK_ROWS = 8192  # the width of a slice on CUDA
INT8_VERSION = 1
"""Raised whenever the same head would be stored as other bytes."""


class SlicedHead(nn.Module):
    """A frozen head that hands out slices; what `token_logps` takes for a weight.

    Args:
        shape: (V, D).
        dtype: Of the slices.
        device: Of the slices.
        bias: [V], or None.
    """

    bias: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, device
        self.register_buffer("bias", bias)

    def split(self, width: int) -> Iterator[Tensor]:
        """All rows in order, `width` at a time: [S, D]."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]; for sampling."""
        parts = [F.linear(hidden, part) for part in self.split(CHUNK_ROWS)]
        logits = torch.cat(parts, -1)
        return logits if self.bias is None else logits + self.bias


class Int8Head(SlicedHead):
    """Eight bits a number and an fp32 scale a row: weight[v] = codes[v] * scales[v].

    Args:
        weight: [V, D], floating point.
        bias: [V], or None.

    Raises:
        ValueError: If the weight is not finite.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), weight.dtype, weight.device, bias)
        self.register_buffer("codes", torch.empty_like(weight, dtype=torch.int8))
        self.register_buffer("scales", weight.new_empty(len(weight), dtype=torch.float32))
        for start in range(0, len(weight), CHUNK_ROWS):
            part = weight[start : start + CHUNK_ROWS].float()
            scales = part.abs().amax(1) / 127
            if not scales.isfinite().all():
                half = weight.dtype == torch.float16
                raise ValueError(
                    "the head holds NaN or infinite numbers; the checkpoint is damaged"
                    f"{', or beyond float16: take dtype float32' if half else ''}"
                )
            self.scales[start : start + len(part)] = scales
            scales = torch.where(scales > 0, scales, 1.0)[:, None]  # a row of zeros stays zeros
            self.codes[start : start + len(part)] = (part / scales).round_().to(torch.int8)

    def split(self, width: int) -> Iterator[Tensor]:
        """All rows in order, `width` at a time: [S, D], rounded once from fp32, in one buffer."""
        buffer = torch.empty_like(self.codes[:width], dtype=self.dtype)
        for codes, scales in zip(self.codes.split(width), self.scales.split(width), strict=True):
            yield torch.mul(codes, scales[:, None], out=buffer[: len(codes)])


class HostHead(SlicedHead):
    """A dense head in pinned host memory: the next slice travels while this one is used.

    Args:
        weight: [V, D].
        bias: [V] on the device, or None.
        device: Where the slices are wanted.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), weight.dtype, device, bias)
        host = weight.detach().cpu()
        # No buffer: a model that is moved to a device must not take it along.
        self.host = host.pin_memory() if device.type == "cuda" else host

    def split(self, width: int) -> Iterator[Tensor]:
        """All rows in order, `width` at a time: [S, D], in two buffers by turns."""
        parts = self.host.split(width)
        if self.device.type != "cuda":
            yield from parts
            return
        buffers = [torch.empty_like(parts[0], device=self.device) for _ in range(2)]
        if is_rehearsing():  # without streams: what is taken and copied is the same
            yield from (buffers[i % 2][: len(part)].copy_(part) for i, part in enumerate(parts))
            return
        uploaded, used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        compute, uploads = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        uploads.wait_stream(compute)  # the buffers' memory may still serve earlier work

        def upload(i: int) -> None:
            with torch.cuda.stream(uploads):
                if i >= 2:
                    uploads.wait_event(used[i % 2])
                buffers[i % 2][: len(parts[i])].copy_(parts[i], non_blocking=True)
                uploaded[i % 2].record(uploads)

        try:
            upload(0)
            for i, part in enumerate(parts):
                if i + 1 < len(parts):
                    upload(i + 1)
                compute.wait_event(uploaded[i % 2])
                yield buffers[i % 2][: len(part)]
                used[i % 2].record(compute)
        finally:  # nothing may be written to the buffers once they are given back
            compute.wait_stream(uploads)


def quantize_head(model: LanguageModel) -> LanguageModel:
    """Replace the head of a loaded model by one in int8.

    Args:
        model: Its head is dense and its own, not the embedding; its network is changed in place.

    Returns:
        The model with the head, the storage and the identity that it has now.

    Raises:
        ValueError: If the head cannot be quantised.
    """
    dense = model.network.lm_head
    try:
        head = Int8Head(dense.weight, dense.bias)
    except ValueError as error:
        raise ValueError(f"lm_head: {error}") from None
    identity = f"{model.identity}\nhead int8 {INT8_VERSION}"
    model = replace(model, identity=hashlib.sha256(identity.encode()).hexdigest())
    return _with_head(model, head, "int8, a scale a row", sum(b.nbytes for b in head.buffers()))


def head_to_host(model: LanguageModel) -> LanguageModel:
    """Move the dense head of a loaded model to pinned host memory; its numbers stay what they are.

    Args:
        model: Its head is dense and its own, not the embedding; its network is changed in place.
    """
    head = HostHead(model.network.lm_head.weight, model.network.lm_head.bias, model.device)
    text = f"{str(head.dtype).removeprefix('torch.')}, in host memory"
    return _with_head(model, head, text, head.host.nbytes)


def _with_head(model: LanguageModel, head: SlicedHead, text: str, nbytes: int) -> LanguageModel:
    """Put another head into a model, and another line for it into the storage table."""
    model.network.lm_head = head
    rows = [
        replace(row, format=text, nbytes=nbytes) if row.kind == "head" else row
        for row in model.storage
    ]
    return replace(model, head_weight=head, head_bias=head.bias, storage=rows)


def check_tied_head(
    quantization: HeadQuantization, place: Place, embedding: Place = "device"
) -> None:
    """Refuse settings that do not fit a head which is the embedding.

    Args:
        quantization: The setting head_quantization.
        place: The setting head_weight.
        embedding: The setting embedding_weight.

    Raises:
        ValueError: Naming the setting to leave out.
    """
    for setting, wanted in (
        (f"head_quantization {quantization}", quantization != "none"),
        (f"head_weight {place}", place == "host"),
        (f"embedding_weight {embedding}", embedding == "host"),
    ):
        if wanted:
            raise ValueError(
                f"{setting} cannot be: this model's head is its embedding, which is looked up in "
                f"dense form on the device; leave {setting.split()[0]} out"
            )
