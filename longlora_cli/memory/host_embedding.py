"""A frozen input embedding in host memory: rows are looked up there, and only these go to the GPU.

An 8B model in NF4 takes 5.31 GiB of a GPU, and 0.98 of them are a bf16 table of which a step reads as many rows as it
has tokens. On the host it costs a gather by the CPU and a copy of `[tokens, width]`: 1.4 ms a thousand tokens by the
plan's rates.

`use_host_embedding` changes one module instance, never a class. The weight stays the parameter it was, under its name,
so state dicts, optimizers and adapters see nothing but another device. Every call of the module goes this way: the
engine's, the model's own with a cache, and what hooks see. The table is ordinary memory of exactly its size, because
the CPU reads it; only the buffer between gather and copy is pinned. (torch's pinned allocator would round the table up
to a power of two: 1.04 GiB of a 152,064 x 3,584 one to 2 GiB.) The plain twin is `nn.Embedding.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.plan import STAGING_BYTES

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def host_embedding_fault(model: Any) -> str | None:
    """Why a model's input embedding cannot wait on the host; None when it can.

    Args:
        model: A transformers causal LM, with or without PEFT around it.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return "its input embedding is trained, or more than a table of rows"
    weight = embedding.weight
    if weight.requires_grad:
        return "its input embedding is trained"
    if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        return "its input embedding does more than look rows up"
    if {"forward", "_apply"} & vars(embedding).keys():
        return "other code has changed its input embedding"
    if sum(p is weight for m in model.modules() for p in m.parameters(recurse=False)) > 1:
        return "its input embedding is also its output matrix"
    return None


def use_host_embedding(model: Any, *, staging_bytes: int = STAGING_BYTES) -> Callable[[], None]:
    """Move a model's input embedding to host memory and look rows up there.

    Results are what they were, bit for bit. `model.to(device)` afterwards leaves the table on the host and follows
    changes of its dtype; DDP is told to leave it alone, which it may: all processes load the same frozen table.

    Args:
        model: A transformers causal LM, with or without PEFT around it; the outermost module, as it will be wrapped.
        staging_bytes: Pinned memory (on a CPU, ordinary memory) between gather and copy. It is used in two halves, so
            that one is filled while the other is copied.

    Returns:
        A function that moves the table back, bit for bit, and undoes all else; a second call does nothing. Without the
        memory for it, it raises `torch.OutOfMemoryError` and leaves the table in use on the host.

    Raises:
        IncompatibleError: `host_embedding_fault` has something to say about the model.
    """
    if fault := host_embedding_fault(model):
        raise IncompatibleError(
            f"the input embedding cannot wait on the host: {fault}",
            hint="Leave --plan embedding=host out, or give embedding=gpu.",
        )
    embedding = model.get_input_embeddings()
    weight, device = embedding.weight, embedding.weight.device
    rows = _HostRows(weight, staging_bytes, pinned=device.type == "cuda")

    def forward(input: Tensor) -> Tensor:
        return rows.look_up(input)

    def apply(change: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What `to`, `half`, `cuda` and others call on each module. A probe tells which dtype they are after.
        dtype = change(torch.empty(0, dtype=weight.dtype)).dtype
        if dtype != weight.dtype:
            weight.data = weight.data.to(dtype)
            rows.stage()
        return embedding

    weight.data = weight.data.cpu()
    embedding.forward, embedding._apply = forward, apply
    ignored = getattr(model, _IGNORED_BY_DDP, None)
    names = [name for name, parameter in model.named_parameters() if parameter is weight]
    setattr(model, _IGNORED_BY_DDP, [*(ignored or ()), *names])

    def undo() -> None:
        if vars(embedding).get("forward") is not forward:
            return
        weight.data = weight.data.to(device)
        del embedding.forward, embedding._apply
        if ignored is None:
            delattr(model, _IGNORED_BY_DDP)
        else:
            setattr(model, _IGNORED_BY_DDP, ignored)

    return undo


class _HostRows:
    """Rows of a table on the host, on their way to where they are asked for.

    Args:
        weight: The table `[rows, width]`; its data may be exchanged, with a call of `stage`.
        staging_bytes: Of both halves of the buffer together; a half holds at least one row.
        pinned: Whether a GPU copies from the buffer.
    """

    def __init__(self, weight: nn.Parameter, staging_bytes: int, *, pinned: bool) -> None:
        self._weight, self._staging_bytes, self._pinned = weight, staging_bytes, pinned
        self.stage()

    def stage(self) -> None:
        """Make the buffer for rows of the table's dtype."""
        width = self._weight.shape[1]
        each = max(1, self._staging_bytes // 2 // (width * self._weight.element_size()))
        self._halves = torch.empty(2, each, width, dtype=self._weight.dtype, pin_memory=self._pinned)
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @torch.no_grad()
    def look_up(self, ids: Tensor) -> Tensor:
        """Rows `[..., width]` of ids `[...]`, on the ids' device.

        Raises:
            IndexError: An id that the table does not have.
        """
        width = self._weight.shape[1]
        found = torch.empty(ids.numel(), width, dtype=self._weight.dtype, device=ids.device)
        wanted = ids.reshape(-1).cpu()  # waits for the GPU; ids are known before a step, so for nothing else
        each = self._halves.shape[1]
        for part, target in zip(wanted.split(each), found.split(each), strict=True):
            self._copy(part, target)
        return found.view(*ids.shape, width)

    def _copy(self, ids: Tensor, target: Tensor) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        if (before := self._copied[turn]) is not None:
            before.synchronize()  # the half is still being read
        half = self._halves[turn, : len(ids)]
        torch.index_select(self._weight.detach(), 0, ids, out=half)
        target.copy_(half, non_blocking=True)
        if target.is_cuda:
            self._copied[turn] = torch.cuda.current_stream(target.device).record_event()
