"""What a model's tensors are called, which are linear layers, and whether its embeddings are tied.

Read from the architecture, built on torch's meta device: no memory, about a second for 8B parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.models.tensors import StoredTensor, TensorFolder, open_folder, same_values


@dataclass(frozen=True)
class Layout:
    """Names in an architecture.

    Args:
        parameters: Tensor name -> shape; a tied head is listed too.
        linear: Weights of the linear layers but the output head: what bitsandbytes quantizes.
        adaptable: Names of modules that a low-rank adapter can sit on.
        modules: Names of all modules that own a tensor.
        embedding: Input embedding's tensor.
        head: Output head's tensor, if there is one.
        tied: The head is the embedding.
    """

    parameters: dict[str, tuple[int, ...]]
    linear: frozenset[str]
    adaptable: frozenset[str]
    modules: frozenset[str]
    embedding: str
    head: str | None
    tied: bool

    @property
    def size(self) -> int:
        """Parameters, a tied head counted once."""
        total = 0
        for name, shape in self.parameters.items():
            if not (self.tied and name == self.head):
                total += torch.Size(shape).numel()
        return total

    def stored(self, files: TensorFolder, name: str) -> StoredTensor:
        """A tensor on disk, or for a tied head the embedding."""
        return files.tensors[self.embedding if self.tied and name == self.head else name]


def open_base(folder: Path) -> tuple[Any, Layout, TensorFolder]:
    """The config of a model folder, its layout as its tensors have it, and those tensors' headers.

    Raises:
        NotFoundError, IntegrityError, SecurityError: From `open_folder`.
        IncompatibleError: Its weights are stored quantized.
    """
    config, layout = layout_of(folder)
    files = open_folder(folder)
    if layout.tied and layout.head in files.tensors:
        # transformers trusts the tensors: a stored head that differs from the embedding is not tied to it.
        same = same_values(files.tensors[layout.head], files.tensors[layout.embedding])
        layout = replace(layout, tied=same)
    return config, layout, files


def layout_of(folder: Path) -> tuple[Any, Layout]:
    """The transformers config of a model folder and the layout of its architecture.

    Raises:
        IncompatibleError: Its weights are stored quantized.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise IncompatibleError(
            f"{folder} stores quantized weights",
            rule="Merging adds to plain weights, in float64, and rounds once.",
            hint="Give the unquantized model.",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in modules.items()}
    head_name = names.get(id(head))
    linear = {n for n, m in modules.items() if isinstance(m, nn.Linear)}
    tensors = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    return config, Layout(
        parameters=tensors,
        linear=frozenset(f"{n}.weight" for n in linear if n != head_name),
        adaptable=frozenset(linear | {names[id(embedding)]}),
        modules=frozenset(n.rsplit(".", 1)[0] for n in tensors),
        embedding=f"{names[id(embedding)]}.weight",
        head=f"{head_name}.weight" if head_name is not None else None,
        tied=bool(config.get_text_config().tie_word_embeddings) and head_name is not None,
    )
