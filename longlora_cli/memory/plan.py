"""What a training step keeps, where, and what that costs: the nouns of the memory planner. No torch.

Four things of a decoder layer are worth keeping between its forward and its backward pass: its input x, its attention
output O with the log-sum-exp, its rotated q/k/v, and its gate and up outputs. Each waits on the GPU, on the host or on
disk, or is computed again. A layer whose input is computed again belongs to the group of the layer before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Place = Literal["gpu", "host", "disk", "recompute"]
KINDS: tuple[Literal["input", "attention", "qkv", "gate_up"], ...] = ("input", "attention", "qkv", "gate_up")
LSE_BYTES = 4  # log-sum-exp is float32, one a head
# Pinned memory through which looked-up rows of an embedding on the host reach the GPU: two halves of 4,096 rows of an
# 8B model. Larger ones are no faster; a power of two, because torch's pinned allocator would round it up to one.
STAGING_BYTES = 2**26
# Matrices of all layers that the engine may hold ready, adapters beside them, instead of copying them together for each
# pass. SmolLM2-135M's take 236 MB; its step at 32,768 tokens was bound by the launches of those copies.
HELD_BYTES = 2**29
_COLUMN_ALIGNMENT = 64


@dataclass(frozen=True)
class LayerPlan:
    """Where the activations of one layer wait between its forward and its backward pass.

    Args:
        input: x `[tokens, width]`; `recompute` puts the layer into the group of the layer before.
        attention: O `[tokens, heads, head_dim]` and log-sum-exp.
        qkv: q, k and v after RoPE.
        gate_up: Outputs of the gate and up projections.
    """

    input: Place
    attention: Place
    qkv: Place
    gate_up: Place

    def place(self, kind: str) -> Place:
        """Where `kind`, one of `KINDS`, waits."""
        found: Place = getattr(self, kind)
        return found


@dataclass(frozen=True)
class Prediction:
    """What a plan is computed to take.

    Args:
        peak_gpu_bytes: Most GPU memory at any moment of a step, the CUDA context and static parts included.
        host_bytes: Most host memory in which activations wait at any moment; an embedding there comes on top.
        disk_bytes: The same for disk.
        seconds: One step, forward and backward, copies that computation does not hide included.
        hardware_flops: FLOPs of the step as run.
        model_flops: FLOPs of the step without recomputation: the numerator of MFU.
    """

    peak_gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: float
    hardware_flops: float
    model_flops: float


@dataclass(frozen=True)
class MemoryPlan:
    """How a step of `tokens` tokens runs.

    Args:
        tokens: Tokens of the step, batch times length.
        layers: One `LayerPlan` a layer.
        inner_input: Where the inputs of a group's layers wait while the group is recomputed and run backward. The
            group's last layer is not among them: its input and O go into its backward pass at once.
        inner_attention: The same for O and log-sum-exp.
        tile_tokens: Tokens of an MLP or projection tile.
        loss_tile: Rows of logits held at once.
        kv_heads_per_call: Key-value heads in one attention call; 0 is all.
        shifted_group: Tokens of an S2-Attn group; 0 is full attention.
        predicted: What it takes.
        embedding_on_host: The input embedding waits on the host and is looked up there (`host_embedding.py`).
    """

    tokens: int
    layers: tuple[LayerPlan, ...]
    inner_input: Place
    inner_attention: Place
    tile_tokens: int
    loss_tile: int
    kv_heads_per_call: int
    shifted_group: int
    predicted: Prediction
    embedding_on_host: bool = False

    def groups(self) -> list[range]:
        """Layers that share one kept input, in order; together they are all layers."""
        starts = [i for i, layer in enumerate(self.layers) if layer.input != "recompute"]
        ends = [*starts[1:], len(self.layers)]
        return [range(start, end) for start, end in zip(starts, ends, strict=True)]

    def kept(self, kind: str, place: Place) -> int:
        """Layers whose `kind`, one of `KINDS`, waits at `place`."""
        return sum(layer.place(kind) == place for layer in self.layers)


_ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stack_width(inputs: int, rank: int) -> int:
    """Columns of a matrix with its adapter's beside it; these are padded so that rows stay aligned for tensor cores."""
    return inputs + -(-rank // _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder and its adapter.

    Args:
        layers: Decoder layers.
        width: Hidden size.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of a head.
        intermediate: Width of the MLP.
        vocabulary: Rows of the output embedding.
        element_bytes: Bytes of an activation's number: 2 for bf16, 4 for float32.
        weight_bytes: Frozen weights as the GPU holds them, embeddings and head included.
        trainable: Trained parameters.
        lora_rank: Rank of the adapter; 0 is none.
        lora_targets: Linears that have an adapter, by their names in the Llama family.
        optimizer_bytes_per_parameter: State of the optimizer: 8 for Adam in float32, 2 in 8 bits, 0 when the state
            is on the host.
        mlp_matrices: 3 for a gated MLP, 2 without gate.
        embedding_bytes: The part of `weight_bytes` that is an input embedding which can wait on the host; 0 when it is
            trained, tied to the head, or more than a table.
        quantized: The layers' matrices are NF4 or int8, so that they are made anew for each pass over a layer.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    element_bytes: int
    weight_bytes: int
    trainable: int
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = field(default=_ALL_LINEARS)
    optimizer_bytes_per_parameter: float = 8.0
    mlp_matrices: int = 3
    embedding_bytes: int = 0
    quantized: bool = False

    @property
    def held_bytes(self) -> int:
        """Copies of all layers' matrices, adapters beside them, that the engine holds over steps; 0 for none."""
        if self.quantized:
            return 0
        sizes = self.linears
        ranks = {name: self.lora_rank if name in self.lora_targets else 0 for name in sizes}
        stacks = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
        elements = 0
        for names in stacks:
            own = [name for name in names if name in sizes]
            inputs = sizes[own[0]][0]
            rank = sum(ranks[name] for name in own)
            outputs = sum(sizes[name][1] for name in own)
            elements += outputs * stack_width(inputs, rank) + rank * inputs
        total = self.layers * elements * self.element_bytes
        return total if total <= HELD_BYTES else 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {
            "q_proj": (self.width, q),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (q, self.width),
            "gate_proj": (self.width, self.intermediate),
            "up_proj": (self.width, self.intermediate),
            "down_proj": (self.intermediate, self.width),
        }
        if self.mlp_matrices < 3:
            del found["gate_proj"]
        return found

    def without_embedding(self) -> ModelShape:
        """As the GPU holds it while the input embedding waits on the host."""
        return replace(self, weight_bytes=self.weight_bytes - self.embedding_bytes, embedding_bytes=0)

    def kept_bytes(self, kind: str) -> int:
        """Bytes per token that `kind`, one of `KINDS`, of one layer takes."""
        if kind == "input":
            return self.width * self.element_bytes
        if kind == "attention":
            return self.heads * (self.head_dim * self.element_bytes + LSE_BYTES)
        if kind == "qkv":
            return (self.heads + 2 * self.kv_heads) * self.head_dim * self.element_bytes
        return (self.mlp_matrices - 1) * self.intermediate * self.element_bytes
