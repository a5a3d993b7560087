"""An embedding in host memory: of its V rows a micro-batch reads N, and those travel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """Looks up token ids on the host and brings the rows to the device; the same bits.

    Args:
        embedding: That of transformers; its weight [V, D] is moved to the host.
        device: Where the rows are wanted.
    """

    scale: Tensor | None

    def __init__(self, embedding: nn.Module, device: torch.device) -> None:
        super().__init__()
        # No buffer: a model that is moved to a device must not take it along.
        self.host = embedding.get_parameter("weight").detach().cpu()
        self.device = device
        self.register_buffer("scale", getattr(embedding, "embed_scale", None))  # Gemma's

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., D] on the device of ids [...], which are best on the host."""
        ids = ids.cpu()
        if self.device.type == "cuda":  # gathered in pinned memory, so that nobody waits
            shape = (*ids.shape, self.host.shape[1])
            pinned = torch.empty(shape, dtype=self.host.dtype, pin_memory=True)
            torch.index_select(self.host, 0, ids.flatten(), out=pinned.flatten(0, -2))
            rows = pinned.to(self.device, non_blocking=True)
        else:
            rows = F.embedding(ids, self.host)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)
