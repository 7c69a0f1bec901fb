"""A model, an adapter, an optimizer and the memory engine around them, ready for timed steps; see `step.py`."""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from random_model import llama8b_config, quantized_in_memory

from longlora_cli.errors import ResourceError
from longlora_cli.memory.attention import attention_name
from longlora_cli.memory.attention_kernels import choose_kernel, expected_kernel
from longlora_cli.memory.plan import MemoryPlan, ModelShape
from longlora_cli.models import adapter as adapters
from longlora_cli.sections import AdapterSection

GIB = 2**30
RANDOM = "random"  # in place of a folder: the 8B shape, built in memory
RANK = 32
WARM_UP_TOKENS = 8_192
# From here on a step takes minutes, so that one is timed and a short one warms up.
ONE_STEP_TOKENS = 256 * 1024


@dataclass
class Rig:
    """A model ready for steps.

    Args:
        causal_lm: Called with `input_ids` and `labels`; gives a loss.
        optimizer: Of its trained parameters.
        device: Where it computes.
        stack: Whose layers run: `longlora`, or `hf`, transformers' own with checkpoints.
        shape: Sizes for the planner.
        machine: Memory and rates; a smaller one makes smaller plans.
        arena: Host memory of the engine.
        plan: Options of `make_plan`.
        undo: Gives the model its own layers back.
        kernel: Attention backend of the engine.
        embedding: `gpu` or `host`, where the input embedding is now.
        put_back: Brings it back to the GPU.
    """

    causal_lm: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    stack: str
    shape: ModelShape
    machine: Any = None
    arena: Any = None
    plan: dict[str, Any] = field(default_factory=dict)
    undo: Callable[[], None] = field(default=lambda: None)
    kernel: str = "auto"

    def kernel_name(self, tokens: int) -> str:
        """Which attention the engine takes for one document of so many tokens."""
        if self.stack == "hf":
            return "sdpa"
        return choose_kernel(self.kernel, self.device, torch.bfloat16, self.shape.head_dim, tokens).name

    embedding: str = "gpu"
    put_back: Callable[[], None] = field(default=lambda: None)

    def plan_for(self, tokens: int) -> MemoryPlan:
        """The plan of this many tokens on the machine as it is now, with the embedding where it is now."""
        return self._plan(tokens, self.plan["explicit"] | {"embedding": self.embedding})

    def settle(self, tokens: int) -> None:
        """Move the embedding where the plan of this many tokens wants it; it stays there for shorter steps.

        Raises:
            ResourceError: No plan fits.
        """
        from longlora_cli.memory.host_embedding import use_host_embedding

        wanted = "host" if self._plan(tokens, self.plan["explicit"]).embedding_on_host else "gpu"
        if wanted == self.embedding:
            return
        if wanted == "host":
            self.put_back = use_host_embedding(self.causal_lm)
            release(self.device)
        else:
            self.put_back()
        self.embedding = wanted

    def _plan(self, tokens: int, explicit: dict[str, Any]) -> MemoryPlan:
        return _plan(self.shape, tokens, self.machine, self.plan["shifted_group"], _frozen(explicit))

    def longest(self) -> int:
        """Most tokens for which there is a plan."""
        from longlora_cli.memory.roomy import roomy_context

        return roomy_context(self.shape, self.machine, **self.plan)

    def step(self, tokens: int) -> float:
        """Forward, backward, update on random ids; the loss in nats."""
        ids = torch.randint(3, min(49_000, self.shape.vocabulary), (1, tokens), device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.stack == "hf"):
            loss = self.causal_lm(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _frozen(explicit: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(explicit.items()))


@functools.cache
def _plan(
    shape: ModelShape, tokens: int, machine: Any, shifted_group: int, explicit: tuple[tuple[str, Any], ...]
) -> MemoryPlan:
    from longlora_cli.memory.roomy import roomy_plan

    return roomy_plan(shape, tokens, machine, shifted_group=shifted_group, explicit=dict(explicit))


@dataclass(frozen=True)
class Measured:
    """One length: seconds are the fastest step's, bytes the most at any moment of the timed steps.

    `host_bytes` are the activations', `embedding_bytes` those of an input embedding that is on the host too.
    """

    tokens: int
    seconds: float
    peak_bytes: int
    reserved_bytes: int
    host_bytes: int
    loss: float
    plan: MemoryPlan | None
    kernel: str
    embedding_bytes: int = 0
    retries: int = 0  # times the allocator had to give blocks back to find room: each waits for the GPU


def load_base(options: argparse.Namespace, device: torch.device, *, stack: str, quantized: bool) -> Any:
    """The base model without adapter, cut to `--layers`; frozen numbers are bf16 or NF4."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    in_memory = str(options.model) == RANDOM
    config = llama8b_config(0) if in_memory else AutoConfig.from_pretrained(options.model)
    if options.layers:
        config.num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    quantizer = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    attention = "sdpa" if stack == "hf" else attention_name("auto", device)
    if in_memory:
        model = quantized_in_memory(config, device, attention, quantizer)
        model.config.use_cache = False
        return model
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        config=config,
        dtype=torch.bfloat16,
        attn_implementation=attention,
        quantization_config=quantizer if quantized else None,
        device_map={"": device},
    )
    model.config.use_cache = False
    return model


def with_adapter(model: Any, *, quantized: bool) -> Any:
    """The PEFT model: LoRA of rank 32, alpha 32, on the seven linear layers, in float32."""
    torch.manual_seed(0)
    section = AdapterSection(lora_rank=RANK, lora_alpha=RANK)
    wrapped = adapters.attach(model, section, quantization="nf4" if quantized else "none")
    wrapped.train()
    return wrapped


def shape_of(wrapped: Any, device: torch.device, *, quantized: bool) -> ModelShape:
    """Sizes for the planner, of a model that is loaded and alone on its device."""
    config = wrapped.config
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    held = sum(p.numel() * p.element_size() for p in wrapped.parameters())
    if device.type == "cuda":  # with the quantizer's own tables
        held = torch.cuda.memory_allocated(device)
    return ModelShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        element_bytes=2,
        weight_bytes=held - 4 * trainable,
        trainable=trainable,
        lora_rank=RANK,
        # Paged state leaves the GPU when it must; SmolLM2's is torch's.
        optimizer_bytes_per_parameter=0.0 if quantized else 8.0,
        embedding_bytes=_movable_bytes(wrapped, device),
        quantized=quantized,
    )


def _movable_bytes(wrapped: Any, device: torch.device) -> int:
    """Bytes of an input embedding that may wait on the host."""
    from longlora_cli.memory.host_embedding import host_embedding_fault

    if device.type == "cpu" or host_embedding_fault(wrapped):
        return 0
    return int(wrapped.get_input_embeddings().weight.nbytes)


def build(options: argparse.Namespace, stack: str, device: torch.device) -> Rig:
    """A model with its adapter, optimizer, and, for `longlora`, planner, arena and engine."""
    quantized = options.model_kind == "llama8b"
    wrapped = with_adapter(load_base(options, device, stack=stack, quantized=quantized), quantized=quantized)
    causal_lm = wrapped.get_base_model()
    rig = Rig(
        causal_lm,
        _optimizer(wrapped, device, quantized),
        device,
        stack,
        shape_of(wrapped, device, quantized=quantized),
    )
    if stack == "hf":
        causal_lm.enable_input_require_grads()
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return rig
    from longlora_cli.memory.arena import HostArena
    from longlora_cli.memory.engine import use_engine
    from longlora_cli.memory.machine import Machine

    limit = int(options.cap_gb * 1e9) if options.cap_gb else None
    attention = expected_kernel(options.kernel, device)
    rig.machine = Machine.detect(device, gpu_limit_bytes=limit, attention=attention)
    rig.arena = HostArena(device, rig.machine.host_bytes_for_activations)
    rig.kernel = options.kernel
    rig.plan = {"shifted_group": options.s2_group, "explicit": options.plan}
    rig.undo = use_engine(causal_lm, rig.plan_for, arena=rig.arena, kernel=options.kernel)
    return rig


def _optimizer(wrapped: Any, device: torch.device, quantized: bool) -> torch.optim.Optimizer:
    """The peers' 8-bit optimizer for the 8B shape; torch's fused one for SmolLM2, in both stacks.

    bitsandbytes' waits for the GPU after each of its 420 tensors: 37 ms of a step of 400.
    """
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    if device.type == "cpu" or not quantized:
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-4)


def cap_memory(limit_bytes: int, device: torch.device) -> None:
    """Let torch allocate what a card of `limit_bytes` would leave beside CUDA's own memory."""
    from longlora_cli.memory.machine import CONTEXT_BYTES

    torch.ones(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    outside = max(total - free - torch.cuda.memory_reserved(device), CONTEXT_BYTES)
    torch.cuda.set_per_process_memory_fraction((limit_bytes - outside) / total, device)


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _retries(device: torch.device) -> int:
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return int(stats.get("num_alloc_retries", 0))


def measure(rig: Rig, tokens: int, steps: int | None, *, short_warm_up: bool = False) -> Measured:
    """Time steps of one length, after one of that length or, from 256K on or if asked for, of 8K.

    Raises:
        torch.OutOfMemoryError, ResourceError: It does not fit.
    """
    long = short_warm_up or tokens >= ONE_STEP_TOKENS
    plan = None
    if rig.stack == "longlora":
        rig.settle(tokens)
        plan = rig.plan_for(tokens)
    if plan is not None and plan.predicted.host_bytes:
        rig.arena.reserve(plan.predicted.host_bytes)  # registering takes 0.6 s/GiB, once in a training
    rig.step(min(tokens, WARM_UP_TOKENS) if long else tokens)
    release(rig.device)
    if rig.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rig.device)
    if rig.arena is not None:
        rig.arena.peak_bytes = rig.arena.used_bytes
    seconds, loss, retries = [], 0.0, _retries(rig.device)
    for _ in range(steps or (1 if long else 3)):
        _wait(rig.device)
        begin = time.perf_counter()
        loss = rig.step(tokens)
        _wait(rig.device)
        seconds.append(time.perf_counter() - begin)
    gpu = rig.device.type == "cuda"
    return Measured(
        tokens=tokens,
        seconds=min(seconds),
        peak_bytes=torch.cuda.max_memory_allocated(rig.device) if gpu else 0,
        reserved_bytes=torch.cuda.max_memory_reserved(rig.device) if gpu else 0,
        host_bytes=rig.arena.peak_bytes if rig.arena is not None else 0,
        loss=loss,
        plan=plan,
        kernel=rig.kernel_name(tokens),
        embedding_bytes=rig.shape.embedding_bytes if rig.embedding == "host" else 0,
        retries=_retries(rig.device) - retries,
    )


def measure_or_none(
    rig: Rig, tokens: int, steps: int | None, *, short_warm_up: bool = False
) -> Measured | None:
    """`measure`, or None, with a line said, when it does not fit; the rig can go on."""
    try:
        return measure(rig, tokens, steps, short_warm_up=short_warm_up)
    except (torch.OutOfMemoryError, ResourceError) as error:
        say(f"{rig.stack:9} {tokens:>9,}  does not fit: {str(error).splitlines()[0]}")
    rig.optimizer.zero_grad(set_to_none=True)
    release(rig.device)
    return None


def longest(rig: Rig, steps: int | None) -> Measured | None:
    """The longest context that runs: the plan's longest, and while that fails, that of 3 % less GPU memory.

    Less memory and not only fewer tokens: for fewer tokens the planner would keep more, and fill the same memory.
    """
    for _ in range(12):
        tokens = rig.longest()
        found = measure_or_none(rig, tokens, steps, short_warm_up=True)
        if found is not None:
            return found
        rig.machine = replace(rig.machine, gpu_bytes=int(rig.machine.gpu_bytes * 0.97))
    return None


def say(line: str) -> None:
    """Print at once: a run can be cut off."""
    print(line, flush=True)
