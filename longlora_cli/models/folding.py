"""An adapter folded into the weights of a loaded model, with the bits that `longlora merge` writes.

PEFT computes `x @ W.T + scale * (x @ A.T) @ B.T`, a merged model `x @ (W + scale * B @ A).T`. In 16 bits these round
differently, and a few answers of a long grid change (SmolLM2-135M in bf16 at 16K: 0.98 and 0.96 of 48 right). Here the
rows are summed in float64 by the code that merging uses and rounded once, to the dtype that the base's file has; then
they are cast to the model's dtype as transformers casts a loaded tensor. So a run and the folder that `longlora merge
RUN` writes are equal bit for bit in whatever dtype both are loaded. Where they are not:

- `merge --dtype` other than the base's rounds float64 to that dtype at once. A base stored in float32 and loaded in
  bf16 is rounded twice here, which differs in the last place where the float32 form is the middle of two neighbours;
  one stored in bf16 and merged into float32 keeps digits that a loaded run does not have.
- An adapter trained on NF4 or int8 stays beside such weights, and `merge` adds it to the dequantized ones. With
  `--quantization none` it is folded into the original weights, as `merge --base-weights original` does.
- PiSSA's residual comes from a float32 singular value decomposition, whose last bits may depend on the number of
  threads and on the machine. In one setting it repeats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from longlora_cli.errors import IncompatibleError, NumericError
from longlora_cli.models.adapter_tensors import Adapter, open_adapter, stays_tied, trained_dtype
from longlora_cli.models.layout import Layout, open_base
from longlora_cli.models.source import AdapterRecord
from longlora_cli.models.tensors import StoredRows, TensorFolder, blocks, matrix_shape, round_once


def fold(model: Any, base: Path, adapter: Path, record: AdapterRecord | None) -> bool:
    """Change the weights of an unquantized causal LM in place into those of base and adapter together.

    Args:
        model: What transformers loaded from `base`, on any device, in any floating dtype.
        base: The base's folder; its stored tensors are what is added to.
        adapter: LoRA, rsLoRA, DoRA or PiSSA, with trained norms, embeddings and heads.
        record: What lay beside the adapter.

    Returns:
        False when the adapter has no exact merge. Then nothing was changed, and there is no merged folder that could
        answer otherwise.

    Raises:
        NumericError: A sum is too large for a base stored in float16.
    """
    try:
        _, layout, files = open_base(base)
        opened = open_adapter(adapter, layout, files)
    except IncompatibleError:
        return False
    tied = stays_tied(layout, opened)
    if layout.tied and not tied:
        _untie(model)
    for name in opened.changed:
        if not (tied and name == layout.head):  # it is the embedding, whose turn comes too
            _fold_tensor(model.get_parameter(name), name, opened, layout, files, record)
    return True


@torch.no_grad()
def _fold_tensor(
    parameter: nn.Parameter,
    name: str,
    adapter: Adapter,
    layout: Layout,
    files: TensorFolder,
    record: AdapterRecord | None,
) -> None:
    stored = layout.stored(files, name)
    source = adapter.rows(name, StoredRows(stored), trained_dtype(record, stored))
    target = parameter.view(matrix_shape(stored.shape))
    for first, last in blocks(matrix_shape(stored.shape)):
        block = round_once(source.rows(first, last), stored.dtype)
        if stored.dtype == torch.float16 and not block.isfinite().all():
            raise NumericError(
                f"{name} with its adapter has values that float16 cannot hold (above 65,504)",
                hint="Merge with --dtype bf16 or fp32, and use the merged folder.",
            )
        target[first:last].copy_(block)


def _untie(model: Any) -> None:
    """Give the head a tensor of its own: one of the two was trained without the other."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = False
