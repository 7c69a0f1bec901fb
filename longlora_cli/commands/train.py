"""`longlora train`: base model + prepared data -> a run."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.beacon.loading import save_trained
from longlora_cli.commands.train_beacons import describe_beacons, plan_beacons
from longlora_cli.commands.train_plan import PlannedTraining, describe, load_trained, plan_training
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console, show_log
from longlora_cli.data.collate import collate
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.errors import DataError, Interrupted, LongLoRAError, NumericError, SettingsError, Terminated
from longlora_cli.evaluation.during_training import check_eval_data, make_evaluator
from longlora_cli.models.loading import LoadedModel, choose_device
from longlora_cli.models.source import ModelSource, adapter_sha256, base_folder, fingerprint, resolve
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256
from longlora_cli.options import write_recipe
from longlora_cli.parallel.mesh import Mesh
from longlora_cli.sections import AdapterSection
from longlora_cli.storage import atomic_folder, folder_lock, is_artifact, sha256_of
from longlora_cli.training import checkpoint
from longlora_cli.training.calibrator import BatchCalibrator
from longlora_cli.training.callbacks import LogLines, StopSignals
from longlora_cli.training.engine import start_engine
from longlora_cli.training.meter import StepMeter
from longlora_cli.training.run import Run
from longlora_cli.training.trainer import LongContextTrainer, resumed_step


def run(config: TrainConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Train, or resume the run in `--out`; returns what it reached.

    Raises:
        SettingsError, DataError, NotFoundError, IncompatibleError, IntegrityError: Before any work.
        NumericError: A loss or gradient is not finite.
        Interrupted, Terminated: Asked to stop; the state was saved.
    """
    # Chunks of many lengths fragment torch's fixed blocks; these grow and shrink. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = choose_device(config.device)
    if config.optimizer.startswith("paged") and device.type == "cpu":
        raise SettingsError(
            f"--optimizer {config.optimizer} has no effect on a CPU: there is no GPU memory to page out of",
            hint="Use --optimizer adamw_8bit.",
        )
    check_eval_data(config)
    if config.probe and not dry_run:
        raise SettingsError("--probe has no effect without --dry-run", hint="Add --dry-run, or leave it out.")
    mesh = Mesh.start(device)
    try:
        prepared = _open_data(config.data)
        source = resolve(config.model)
        _refuse_second_adapter(config, source)
        tokenizer = load_tokenizer(source.adapter or source.base, config.chat_template)
        prepared.require_tokenizer(tokenizer, config.chat_template)
        if config.trains_beacons:
            planned = plan_beacons(config, prepared, source, mesh, console)
        else:
            planned = plan_training(config, prepared, source, device, mesh)
        context_length = planned.context_length
        facts: dict[str, Any] = {
            "data": [sha256_of(path / "manifest.json") for path in config.data],
            "base": fingerprint(base_folder(source.base)),
            "chat_template": f"{config.chat_template} {template_sha256(tokenizer)}",
        }
        if source.adapter is not None:
            facts["adapter"] = adapter_sha256(source.adapter)
        if config.max_length == "auto":
            facts["context_length"] = context_length
        if planned.cut_chunks:
            console.print(
                f"the longest context that fits is {context_length:,} tokens; {planned.cut_chunks} of "
                f"{len(prepared)} chunks are longer and are cut there"
            )
        if dry_run and planned.beacons is not None:
            return describe_beacons(config, planned, source, mesh, console)
        if dry_run:
            return describe(config, planned, console)
        mesh.from_main(lambda: Run.refuse_strangers(config.out))
        with ExitStack() as stack:
            mesh.from_main(lambda: stack.enter_context(folder_lock(config.out)) or True)
            run_folder = mesh.from_main(lambda: Run.open(config, write_recipe("train", config), facts))
            if mesh.from_main(run_folder.is_finished):
                console.print(f"{config.out} is finished; nothing to do.")
                return {"run": str(config.out), "finished": True, **run_folder.state()["result"]}
            return _train(config, console, mesh, run_folder, planned)
    finally:
        mesh.stop()


def _refuse_second_adapter(config: TrainConfig, source: ModelSource) -> None:
    """Training goes on with an adapter that `--model` brings, so settings of a fresh one would be ignored."""
    if source.beacons is not None and not config.trains_beacons:
        raise SettingsError(
            f"{config.model} has beacons, and this would train without them",
            hint="Say how they are trained on, such as --beacon-ratio 2,4,8, or train on its base.",
        )
    fresh = [name for name in ("beacon_param", "beacon_embed_init") if config.given(name)]
    if source.beacons is not None and fresh:
        raise SettingsError(
            f"--{fresh[0].replace('_', '-')} has no effect: {config.model} has beacons, which are trained on",
            hint="Leave it out.",
        )
    given = [name for name in AdapterSection.model_fields if config.given(name)]
    if source.low_rank is not None and given:
        raise SettingsError(
            f"--{given[0].replace('_', '-')} has no effect: {config.model} has an adapter, which is trained on",
            hint="Leave it out, or merge the adapter first and train a new one on the merged model.",
        )


def _open_data(folders: list[Path]) -> ChunkDataset:
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder", hint="Make it with longlora prepare.")
        if not is_artifact(folder, "dataset"):
            raise DataError(
                f"{folder} is not prepared data, or not whole",
                rule="Prepared data has a manifest of kind dataset.",
                hint="Make it with longlora prepare.",
            )
    return ChunkDataset.open_all(folders)


def _train(
    config: TrainConfig,
    console: Console,
    mesh: Mesh,
    run_folder: Run,
    planned: PlannedTraining,
) -> dict[str, Any]:
    context_length = planned.context_length
    newest, faults = mesh.from_main(lambda: checkpoint.newest(config.out))
    for fault in faults:
        console.warn(fault)
    loaded = load_trained(config, newest, context_length, planned.beacons)
    record = loaded.record(context_length)
    step, total = resumed_step(newest) if newest else (0, 0)
    if newest and mesh.is_main:
        run_folder.rewind_metrics(step)
        console.print(f"resuming {config.out} at step {step} of {total}")
    try:
        if newest and step >= total:  # the adapter is all that is missing; Trainer would take one step more
            result: dict[str, Any] = {"steps": step}
        else:
            with show_log(console) if mesh.is_main else nullcontext():
                result = _run_on_engine(config, console, mesh, run_folder, planned, loaded, record, newest)
    except LongLoRAError as error:
        if mesh.is_main:
            resumable = not isinstance(error, NumericError)
            status = "stopped" if isinstance(error, Interrupted | Terminated) else "failed"
            at = max(checkpoint.steps_of(config.out), default=0)
            run_folder.note(
                status=status, step=at, reason=error.message, exit_code=error.exit_code, resumable=resumable
            )
        raise
    if mesh.is_main:
        result |= {
            "context_length": context_length,
            "rope": loaded.rope.to_json(),
            "trainable": _trainable(loaded),
        }
        # The note first: a run without an adapter resumes, but one with an adapter is never looked at again.
        run_folder.note(status="finished", step=result["steps"], exit_code=0, result=result)
        with atomic_folder(run_folder.adapter, "adapter", {"step": result["steps"]}) as staging:
            save_trained(loaded, record, staging)
        what = "adapter is" if loaded.beacons is None else "beacons are"
        console.print(f"trained {result['steps']} steps; the {what} in {run_folder.adapter}")
    mesh.barrier()
    return {"run": str(config.out), "finished": True, **result}


def _run_on_engine(
    config: TrainConfig,
    console: Console,
    mesh: Mesh,
    run_folder: Run,
    planned: PlannedTraining,
    loaded: LoadedModel,
    record: Any,
    newest: Path | None,
) -> dict[str, Any]:
    """Train with the memory engine, or with beacons without one."""
    if planned.planner is None:
        return _run_trainer(config, console, mesh, run_folder, planned, loaded, record, newest, None)
    engine = start_engine(loaded, planned.planner, planned.longest_batch)
    calibrator = BatchCalibrator.of(engine, planned.planner, loaded.device)
    try:
        return _run_trainer(config, console, mesh, run_folder, planned, loaded, record, newest, calibrator)
    finally:
        engine.close()


def _trainable(loaded: LoadedModel) -> int:
    return sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)


def _linear_parameters(loaded: LoadedModel) -> int:
    linear = [m for m in loaded.causal_lm.modules() if hasattr(m, "in_features") and not hasattr(m, "lora_A")]
    return sum(m.in_features * m.out_features for m in linear)


def _run_trainer(
    config: TrainConfig,
    console: Console,
    mesh: Mesh,
    run_folder: Run,
    planned: PlannedTraining,
    loaded: LoadedModel,
    record: Any,
    newest: Path | None,
    calibrator: BatchCalibrator | None,
) -> dict[str, Any]:
    pad = loaded.tokenizer.pad_token_id
    pad_id = pad if pad is not None else loaded.tokenizer.eos_token_id or 0
    meter = StepMeter(loaded.facts, _linear_parameters(loaded), loaded.device, beacons=loaded.beacons)
    evaluator = make_evaluator(config, loaded, mesh) if config.eval_data is not None else None
    trainer = LongContextTrainer(
        config,
        loaded,
        planned.data,
        partial(collate, pad_id=pad_id),
        record,
        mesh,
        meter,
        evaluator,
        calibrator,
        loaded.beacons,
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    rows: list[dict[str, Any]] = []

    def receive(row: dict[str, Any]) -> None:
        run_folder.log(row)
        rows.append(row)
        if line := _line(row):
            console.print(line)

    with StopSignals(mesh, loaded.device) as signals, console.progress("training", config.steps) as advance:
        trainer.add_callback(LogLines(receive, advance))
        trainer.add_callback(signals)
        if mesh.is_main:
            run_folder.note(status="running", step=int(newest.name[5:]) if newest else 0)
        outcome = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if signals.received == signal.SIGINT:
        raise Interrupted(
            f"stopped at step {outcome.global_step}, which was saved", hint="The same command resumes."
        )
    if signals.received is not None:
        raise Terminated(
            f"stopped at step {outcome.global_step}, which was saved", hint="The same command resumes."
        )
    final = trainer.evaluate() if evaluator else {}
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"steps": int(outcome.global_step), "last_loss": losses[-1] if losses else None, **final}


def _line(row: dict[str, Any]) -> str:
    """A log row as one line for people; empty for rows that repeat what was shown."""
    if any(name.startswith("eval_") for name in row):
        parts = [f"{n.removeprefix('eval_')} {v:.4g}" for n, v in row.items() if n.startswith("eval_")]
        return f"step {row['step']}: evaluation: " + ", ".join(parts)
    if "tokens_per_second" not in row:
        return ""
    memory = f"GPU {row['peak_gpu_gib']:.1f} GiB, " if "peak_gpu_gib" in row else ""
    return (
        f"step {row['step']}: loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['tflops']:.1f} TFLOP/s, {memory}host {row['peak_host_gib']:.1f} GiB"
    )
