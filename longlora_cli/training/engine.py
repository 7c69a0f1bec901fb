"""From settings to a running memory engine: which path, which plan, and how to take it off again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longlora_cli.config import TrainConfig
from longlora_cli.errors import IncompatibleError, ResourceError, SettingsError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.attention_kernels import expected_kernel
from longlora_cli.memory.calibration import Calibration
from longlora_cli.memory.engine import fused_fault, use_engine
from longlora_cli.memory.generic import use_generic_engine
from longlora_cli.memory.host_embedding import use_host_embedding
from longlora_cli.memory.loss import use_tiled_loss
from longlora_cli.memory.machine import CONTEXT_BYTES, Machine
from longlora_cli.memory.plan import STAGING_BYTES, MemoryPlan, ModelShape
from longlora_cli.memory.roomy import roomy_context, roomy_plan
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import ModelSource

_log = logging.getLogger("longlora")
# Bytes of one weight: NF4 with doubly quantized scales is 4.127 bits, measured; int8 has one scale a row.
_QUANTIZED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}
_OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 0.0,
}  # paged state leaves when needed
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_shape(
    model_config: Any,
    settings: TrainConfig,
    quantization: str,
    element_bytes: int,
    *,
    embedding_can_move: bool = False,
) -> ModelShape:
    """Sizes the planner needs, from a transformers config and what is trained.

    Args:
        model_config: The decoder's config.
        settings: Adapter and optimizer.
        quantization: `none`, `nf4` or `int8`.
        element_bytes: Bytes of an activation's number.
        embedding_can_move: The input embedding may wait on the host; `embedding_fault` knows.
    """
    heads = model_config.num_attention_heads
    wanted = settings.lora_targets
    shape = ModelShape(
        layers=model_config.num_hidden_layers,
        width=model_config.hidden_size,
        heads=heads,
        kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
        intermediate=getattr(model_config, "intermediate_size", None) or 4 * model_config.hidden_size,
        vocabulary=model_config.vocab_size,
        element_bytes=element_bytes,
        weight_bytes=0,
        trainable=0,
        lora_rank=settings.lora_rank,
        lora_targets=_LINEARS if wanted == ["all"] else tuple(n for n in _LINEARS if n in wanted),
        optimizer_bytes_per_parameter=_OPTIMIZER_BYTES[settings.optimizer],
        quantized=quantization != "none",
    )
    matrices = sum(inputs * outputs for inputs, outputs in shape.linears.values())
    norms = (2 * shape.layers + 1) * shape.width
    tables = 1 if model_config.tie_word_embeddings else 2
    embeddings = tables * shape.vocabulary * shape.width
    frozen = _QUANTIZED_BYTES.get(quantization, element_bytes) * shape.layers * matrices
    ranks = sum(sum(size) for name, size in shape.linears.items() if name in shape.lora_targets)
    trained = {"none": 0, "norms": norms, "all": norms + embeddings}[settings.also_train]
    return replace(
        shape,
        weight_bytes=int(frozen + element_bytes * (norms + embeddings)),
        trainable=shape.layers * settings.lora_rank * ranks + trained,
        embedding_bytes=element_bytes * shape.vocabulary * shape.width if embedding_can_move else 0,
    )


def embedding_fault(
    model_config: Any, settings: TrainConfig, path: str, device: torch.device, source: ModelSource
) -> str | None:
    """Why a plan of this training cannot put the input embedding on the host, from configs alone; None when it can.

    Args:
        model_config: The decoder's config.
        settings: What is trained.
        path: `fused`, `generic` or `none`; the fused path's families all look rows up in a plain table.
        device: Where the model computes.
        source: The model; an adapter that comes with it may train its embedding.

    Raises:
        SettingsError: The user asked for it all the same.
    """
    fault = None
    if device.type != "cuda":
        fault = "on a CPU all weights are in host memory already"
    elif path != "fused":
        fault = "it belongs to the fused path"
    elif model_config.tie_word_embeddings:
        fault = "the model's input embedding is also its output matrix, which the GPU needs"
    elif settings.also_train == "all":
        fault = "--also-train all trains the input embedding"
    elif source.adapter is not None and _trains_embedding(source.adapter):
        fault = f"the adapter in {source.adapter} trains the input embedding"
    if fault is not None and settings.fixed_plan().get("embedding") == "host":
        raise SettingsError(
            f"--plan embedding=host has no effect here: {fault}",
            rule="A frozen table of its own can be looked up on the host instead of the GPU.",
            hint="Leave it out.",
        )
    return fault


def _trains_embedding(adapter: Path) -> bool:
    """Whether an adapter folder holds anything of the fused families' `embed_tokens`."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    targets = config.get("target_modules") or []
    names = [*(config.get("modules_to_save") or []), *([targets] if isinstance(targets, str) else targets)]
    return bool(config.get("trainable_token_indices")) or any("embed_tokens" in name for name in names)


def machine_for(settings: TrainConfig, device: torch.device, processes: int, element_bytes: int) -> Machine:
    """Memory and rates of this machine, within the user's limits; the processes on it share the host.

    Raises:
        SettingsError: A limit on a GPU that is not used, or a disk folder that is not there.
    """
    if settings.gpu_memory is not None and device.type != "cuda":
        raise SettingsError("--gpu-memory has no effect on a CPU", hint="Use --host-memory.")
    if settings.disk_offload is not None and not settings.disk_offload.is_dir():
        raise SettingsError(
            f"--disk-offload {settings.disk_offload} is not a folder",
            hint="Make it, on a fast disk, or name another.",
        )
    machine = Machine.detect(
        device,
        gpu_limit_bytes=settings.gpu_memory,
        host_limit_bytes=settings.host_memory,
        disk=settings.disk_offload,
        element_bytes=element_bytes,
        attention=expected_kernel(settings.attention, device),
    )
    if settings.gpu_memory is not None:
        # The limit is the card's, so what CUDA takes beside torch's allocator is part of it.
        total = torch.cuda.get_device_properties(device).total_memory
        share = max(settings.gpu_memory - CONTEXT_BYTES, 0) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    return replace(
        machine,
        host_bytes=machine.host_bytes // processes,
        disk_bytes=machine.disk_bytes // processes,
    )


def outline_fault(model_config: Any, settings: TrainConfig, quantization: str) -> str | None:
    """`fused_fault` of a model that is not loaded yet, from its config and the adapter it will get."""
    from transformers import AutoModelForCausalLM

    if quantization == "int8":
        return "it has Linear8bitLt layers"
    if settings.adapter == "dora":
        return "it has LoRA variants such as DoRA"
    if settings.lora_dropout > 0:
        return "it has LoRA dropout"
    with torch.device("meta"):
        return fused_fault(AutoModelForCausalLM.from_config(model_config), adapted=False)


@dataclass
class Planner:
    """Plans for batches of one training.

    Args:
        settings: What the user fixed.
        shape: The model.
        machine: The memory there is, and the rates that are assumed.
        documents: Lengths of the documents in the longest batch.
        embedding: `gpu` or `host`, where the input embedding is in this training; None: each plan chooses.
        made: Plans made so far, by tokens.
        calibration: What measured batches have corrected.
    """

    settings: TrainConfig
    shape: ModelShape
    machine: Machine
    documents: tuple[int, ...] = ()
    embedding: str | None = None
    made: dict[int, MemoryPlan] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)

    def recalibrate(self, calibration: Calibration) -> None:
        """Make plans with these corrections from now on; call it between two batches."""
        self.calibration = calibration
        self.made.clear()

    def plan(self, tokens: int) -> MemoryPlan:
        """The plan for a batch of this many tokens in all.

        Shorter batches than the longest get the plan of the next of eight sizes an octave: a plan fits whatever is
        shorter, and making one takes seconds for a model of many layers.

        Raises:
            ResourceError: It does not fit.
        """
        longest = sum(self.documents)
        if tokens > longest:
            return self._make(tokens, None)
        step = max(1, 2 ** (tokens.bit_length() - 1) // 8)
        rounded = min(-(-tokens // step) * step, longest)
        return self._make(rounded, self.documents if rounded == longest else None)

    def decide(self, tokens: int) -> MemoryPlan:
        """Settle where the input embedding is in a training whose largest batch has this many tokens.

        That batch's plan says it; all others are made with it there from now on, for it does not move between steps.

        Returns:
            The plan of that batch.

        Raises:
            ResourceError: The batch does not fit.
        """
        plan = self.plan(tokens)
        self.embedding = "host" if plan.embedding_on_host else "gpu"
        self.made = {plan.tokens: plan}
        return plan

    def longest(self) -> int:
        """Tokens of the longest batch that fits."""
        return roomy_context(self.shape, self.machine, **self._same)

    @property
    def _same(self) -> dict[str, Any]:
        explicit = self.settings.fixed_plan()
        if self.settings.given("loss_tile"):
            explicit["loss_tile"] = self.settings.loss_tile
        if self.embedding is not None:
            explicit["embedding"] = self.embedding
        return {"shifted_group": self.settings.s2_group or 0, "explicit": explicit}

    def _make(self, tokens: int, documents: Sequence[int] | None) -> MemoryPlan:
        if tokens not in self.made:
            machine = self.calibration.machine(self.machine)
            try:
                made = roomy_plan(self.shape, tokens, machine, documents=documents, **self._same)
            except ResourceError:
                if not self.calibration.left_gpu_bytes:
                    raise
                # A batch that has been running so far goes on, in all the memory there is.
                machine = replace(self.calibration, left_gpu_bytes=0).machine(self.machine)
                made = roomy_plan(self.shape, tokens, machine, documents=documents, **self._same)
            self.made[tokens] = made
        return self.made[tokens]


@dataclass
class RunningEngine:
    """An engine on a model.

    Args:
        path: `fused`, `generic` or `none`.
        plan_for: Its plans; None without an engine.
        arena: Its memory outside the GPU, if it has any.
        take_off: Gives the model its own code back.
    """

    path: str
    plan_for: Callable[[int], MemoryPlan] | None
    arena: HostArena | None
    take_off: Callable[[], None]

    def close(self) -> None:
        """Take the engine off and give host memory and disk back."""
        self.take_off()
        if self.arena is not None:
            self.arena.close()


# Parts of a plan that only the fused path can follow.
_FUSED_ONLY = ("keep_attention", "keep_qkv", "keep_gate_up", "kv_heads_per_call", "embedding")


def choose_path(settings: TrainConfig, fault: str | None) -> str:
    """`fused`, `generic` or `none` for a model with this `fused_fault`.

    Raises:
        IncompatibleError: The fused path or S2-Attn was asked for, and the model cannot have it.
        SettingsError: A part of the plan that would have no effect on the path.
    """
    path = _path(settings, fault)
    inert = [key for key in settings.fixed_plan() if key in _FUSED_ONLY]
    if path == "generic" and inert:
        raise SettingsError(
            f"--plan {inert[0]}=... has no effect here: it belongs to the fused path",
            rule=f"This model takes the generic one{f': {fault}' if fault else ''}.",
            hint="Leave it out; group, offload and tile_tokens work on every path.",
        )
    return path


def _path(settings: TrainConfig, fault: str | None) -> str:
    asked = settings.engine
    if fault is None:
        return "fused" if asked == "auto" else asked
    if asked == "fused" or settings.s2_group:
        what = "--engine fused" if asked == "fused" else "--s2-group"
        raise IncompatibleError(
            f"{what} cannot train this model: {fault}",
            rule="The fused path computes Llama, Mistral, Qwen2 and Qwen3 layers with LoRA itself.",
            hint="Use --engine generic." if asked == "fused" else "Leave --s2-group out.",
        )
    return "generic" if asked == "auto" else asked


def start_engine(loaded: LoadedModel, planner: Planner, longest_tokens: int) -> RunningEngine:
    """Put the engine on a loaded model with its adapter.

    Args:
        loaded: The model in training.
        planner: Its plans.
        longest_tokens: Tokens of the largest batch, whose plan must fit.

    Raises:
        ResourceError: No plan fits; nothing was changed.
        IncompatibleError: From `choose_path`.
    """
    settings, model = planner.settings, loaded.causal_lm
    fault = fused_fault(model)
    path = choose_path(settings, fault)
    _log.info("engine: %s%s", path, f" ({fault})" if fault and path == "generic" else "")
    if path == "none":
        return RunningEngine(path, None, None, use_tiled_loss(model, settings.loss_tile))
    longest, plan_for = planner.decide(longest_tokens), planner.plan
    moved = planner.shape.embedding_bytes + STAGING_BYTES if longest.embedding_on_host else 0
    arena = HostArena(
        loaded.device,
        planner.machine.host_bytes - moved,
        disk=settings.disk_offload,
        disk_bytes=longest.predicted.disk_bytes,
    )
    # The file has its size now; plans of shorter batches and later ones must do with it.
    planner.machine = replace(planner.machine, disk_bytes=longest.predicted.disk_bytes)
    if path == "fused":
        return RunningEngine(path, plan_for, arena, _use_fused(loaded, planner, longest, arena))
    undo_loss = use_tiled_loss(model, longest.loss_tile)
    undo_layers = use_generic_engine(model, longest, arena)

    def undo() -> None:
        undo_layers()
        undo_loss()

    return RunningEngine(path, plan_for, arena, undo)


def _use_fused(
    loaded: LoadedModel, planner: Planner, longest: MemoryPlan, arena: HostArena
) -> Callable[[], None]:
    """Put the fused path on, with the input embedding where the longest batch's plan wants it; returns the undo."""
    put_back: Callable[[], None] = lambda: None  # noqa: E731
    if longest.embedding_on_host:
        put_back = use_host_embedding(loaded.model)
        size = loaded.causal_lm.get_input_embeddings().weight.nbytes / 2**30
        _log.info("engine: the input embedding (%.2f GiB) waits on the host", size)
    undo_engine = use_engine(loaded.causal_lm, planner.plan, arena=arena, kernel=planner.settings.attention)

    def undo() -> None:
        undo_engine()
        try:
            put_back()
        except (
            torch.OutOfMemoryError
        ):  # optimizer and gradients may be in its place; the adapter is yet to be saved
            _log.info("the input embedding stays on the host: the GPU has no room for it")

    return undo
