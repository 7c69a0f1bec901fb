"""transformers' Trainer, extended for long contexts.

Loggers, schedulers, data order, DDP and FSDP stay Trainer's. What is added: memory counters reset each step and
cached blocks released between phases; evaluation through a function the caller gives, on the same memory path as
training; a non-finite loss or gradient stops the run before the optimizer sees it; checkpoints of `checkpoint.py`
in place of pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments

from longlora_cli.beacon.loading import save_trained
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.config import TrainConfig
from longlora_cli.data.chunk_cost import chunk_costs
from longlora_cli.data.long_documents import LongDocuments
from longlora_cli.errors import NumericError
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import AdapterRecord
from longlora_cli.parallel.mesh import Mesh
from longlora_cli.training import checkpoint
from longlora_cli.training.calibrator import BatchCalibrator
from longlora_cli.training.meter import StepMeter, release_memory
from longlora_cli.training.objective import BeaconObjective
from longlora_cli.training.step_sampler import StepSampler
from longlora_cli.training.window_sampler import WindowSampler

Evaluator = Callable[[], dict[str, float]]
_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def training_arguments(config: TrainConfig, loaded: LoadedModel, mesh: Mesh) -> TrainingArguments:
    """Trainer's arguments for our settings; everything not named here is Trainer's default."""
    on_cpu = loaded.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=_OPTIMIZERS[config.optimizer],
        seed=config.seed,
        data_seed=config.seed,
        bf16=loaded.dtype == "bf16",
        fp16=loaded.dtype == "fp16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and mesh.world > 1 else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would log 0.0 in place of a NaN
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """Train an adapter on chunks.

    Args:
        config: The settings.
        loaded: Model with its adapter attached.
        data: A map dataset of chunks that tells its chunks' `document_lengths` and its `cost`.
        collate: Chunks -> batch with `input_ids`, `labels`, `position_ids`, `document_lengths`.
        record: Written beside each saved adapter.
        mesh: The processes.
        meter: Counts tokens, FLOPs and memory.
        evaluator: Returns metrics of the model as it is; None without evaluation data.
        calibrator: Corrects the memory plans by what batches take; None leaves them as they are.
        beacons: How beacons are trained; None without.
    """

    def __init__(
        self,
        config: TrainConfig,
        loaded: LoadedModel,
        data: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        record: AdapterRecord,
        mesh: Mesh,
        meter: StepMeter,
        evaluator: Evaluator | None = None,
        calibrator: BatchCalibrator | None = None,
        beacons: BeaconSettings | None = None,
    ) -> None:
        called: nn.Module = loaded.model
        if beacons is not None:
            called = BeaconObjective(
                loaded,
                beacons,
                seed=config.seed,
                step=lambda: int(self.state.global_step),
                tile_tokens=config.loss_tile,
            )
        super().__init__(
            model=called,
            args=training_arguments(config, loaded, mesh),
            train_dataset=data,
            eval_dataset=data
            if evaluator
            else None,  # only tells Trainer that there is something to evaluate
            data_collator=collate,
        )
        # The loss divides by the step's label count over micro-batches and processes, not by Trainer.
        self.model_accepts_loss_kwargs = True
        self.loaded, self.record, self.mesh, self.meter = loaded, record, mesh, meter
        self.evaluator, self.calibrator = evaluator, calibrator
        self.run_folder, self.keep = config.out, config.keep_checkpoints
        self._loss_is_finite = True
        self._last_loss = 0.0
        self.saved_step = -1
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler | WindowSampler:
        """Random steps; within a step chunks of similar cost side by side, so that processes wait less."""
        data = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        step_chunks = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.mesh.world

        def epoch() -> int:
            # At the start of a pass `state.epoch` is its whole number, and a part more when a run goes on within it.
            return int((self.state.epoch or 0.0) + 1e-6)

        if isinstance(data, LongDocuments):
            return WindowSampler(data.windows, args.seed, step_chunks, epoch)
        costs = chunk_costs([data.document_lengths(index) for index in range(len(data))], data.cost)
        return StepSampler(costs, args.seed, step_chunks, epoch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward, counted; peaks are reset at the first of a step."""
        if self.accelerator.gradient_state.sync_gradients or self.meter.tokens == 0:
            self.meter.begin_step()
        self.meter.count(inputs["document_lengths"])
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch.clamp(min=1)  # a step of masked labels only has loss 0
        with self.calibrator.batch(inputs["document_lengths"]) if self.calibrator else nullcontext():
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            self._last_loss = float(loss)
        self._loss_is_finite &= math.isfinite(self._last_loss)
        self.meter.end_step()
        if self.calibrator and (news := self.calibrator.news()):
            self.log(news)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # Under fp16 an infinite gradient is the scaler's business: it skips the step and lowers its scale.
        bad_gradient = self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm))
        if self.mesh.any(bad_gradient or not self._loss_is_finite, self.loaded.device):
            what = "loss" if not self._loss_is_finite else "gradient"
            raise NumericError(
                f"step {self.state.global_step + 1}: the {what} is not finite (loss {self._last_loss})",
                rule="The weights were not changed by this step.",
                hint="Lower --learning-rate, or use --dtype bf16 or fp32; the newest checkpoint is whole.",
            )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics of the model now, with its training mode put back and memory released on both sides."""
        if self.evaluator is None:
            return {}
        if self._evaluated[0] == self.state.global_step:  # the last step's, asked for again at the end
            return self._evaluated[1]
        release_memory(self.loaded.device)
        self.loaded.model.eval()
        try:
            with torch.no_grad(), self.autocast_smart_context_manager():
                metrics = {f"eval_{name}": value for name, value in self.evaluator().items()}
        finally:
            self.loaded.model.train()
            release_memory(self.loaded.device)
        self.log(metrics)
        self.meter.restart()
        self._evaluated = (self.state.global_step, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps cost to each training line."""
        if "loss" in logs and "grad_norm" in logs:
            logs |= self.meter.report(self.mesh.world)
        super().log(logs, start_time)

    # Checkpoints. Trainer asks for these in this order when it saves and when it resumes.

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "random": self.mesh.gather(checkpoint.random_state()),
        }
        step = int(self.state.global_step)
        if self.mesh.is_main and step != self.saved_step:
            target = checkpoint.folder_of(self.run_folder, step)
            checkpoint.write(target, state, self._write_model, {"step": step})
            checkpoint.remove_old(self.run_folder, self.keep)
        self.saved_step = step
        self.mesh.barrier()
        self.meter.restart()

    def _write_model(self, staging: Path) -> None:
        save_trained(self.loaded, self.record, staging)
        self._note_callbacks()
        self.state.save_to_json(str(staging / "trainer_state.json"))

    def _note_callbacks(self) -> None:
        """Let Trainer's own stateful callbacks write what they need into its state, as its saving would."""
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        state = checkpoint.read_state(Path(checkpoint_path))
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        """Done in `_load_optimizer_and_scheduler`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter was loaded from the checkpoint when the model was made."""

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is None:
            return
        states = checkpoint.read_state(Path(checkpoint_path))["random"]
        checkpoint.set_random_state(checkpoint.own_random_state(states, self.mesh.rank))


def resumed_step(folder: Path) -> tuple[int, int]:
    """Step and total steps of a checkpoint."""
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    return int(state.global_step), int(state.max_steps)
