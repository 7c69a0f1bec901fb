"""How long an evaluation will take, said before it begins; `--max-hours` shortens it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.estimate import PROBE_NEW_TOKENS, PROBE_TOKENS, Pace, pace_of
from longlora_cli.evaluation.journal import peek
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.readings import readings
from longlora_cli.evaluation.remaining import Finished, finished_of
from longlora_cli.generation.reader import Query
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import LoadedModel
from longlora_cli.parallel.mesh import Mesh

_HOUR = 3600.0
# A CPU is at its rate with this many, and reads them in seconds.
_CPU_TOKENS = 512
_WARM_UP_TOKENS = 64


def paced(
    loaded: LoadedModel, plan: EvalPlan, mesh: Mesh, console: Console, identity: Any = None
) -> tuple[EvalPlan, list[int]]:
    """Say how long the plan will take at most, and leave out lengths until it fits `--max-hours`.

    What a killed run has finished is not counted in what is said. It is in what has to fit, so that a resumed
    evaluation has the lengths of an uninterrupted one.

    The first process decides for all, so that their shares are of one evaluation.

    Args:
        loaded: Reads one prompt, to see how fast it is.
        plan: What is to be measured.
        mesh: The processes that share the work.
        console: Prints.
        identity: Of the model, as the keys of finished rows have it.

    Returns:
        The plan to follow, and the lengths that were left out, longest first.

    Raises:
        SettingsError: Even the shortest length takes too long.
    """
    seconds, dropped = mesh.from_main(lambda: _decide(measure_pace(loaded, plan), plan, mesh.world, identity))
    _say(plan, seconds, dropped, console)
    if not dropped:
        return plan, []
    kept = [length for length in plan.config.lengths if length not in dropped]
    return replace(plan, config=plan.config.model_copy(update={"lengths": kept})), dropped


def _decide(pace: Pace, plan: EvalPlan, processes: int, identity: Any) -> tuple[dict[str, float], list[int]]:
    """Seconds that are left by task, and the lengths to leave out."""
    config = plan.config
    lengths = sorted(set(config.lengths)) if plan.grids or plan.synthetic else []
    dropped: list[int] = []
    seconds = _seconds(pace, plan, lengths, processes)
    limit = config.max_hours and config.max_hours * _HOUR
    while limit is not None and sum(seconds.values()) > limit:
        if len(lengths) < 2:
            raise SettingsError(
                f"--max-hours {config.max_hours:g}: about {_time(sum(seconds.values()))} are needed",
                rule=_parts(seconds),
                hint="Ask for fewer tasks or --samples, or give more hours.",
            )
        dropped.append(lengths.pop())
        seconds = _seconds(pace, plan, lengths, processes)
    finished = finished_of(plan, peek(config.out), identity)
    return (seconds if finished is None else _seconds(pace, plan, lengths, processes, finished)), dropped


def measure_pace(loaded: LoadedModel, plan: EvalPlan) -> Pace:
    """Read one prompt of at most 4,096 tokens (512 on a CPU) and a few new tokens, after a short one that warms up."""
    tokens = min(PROBE_TOKENS if loaded.device.type == "cuda" else _CPU_TOKENS, plan.longest)
    session = Session(loaded, prefill_chunk=plan.config.prefill_chunk, past=plan.past)
    vocabulary = loaded.facts.vocabulary

    def say(count: int) -> Any:
        session.clear()
        ids = [(7919 * place) % vocabulary for place in range(count)]
        query = None if plan.past.retrieval is None else Query("what is the time?", 16)
        return session.answer(
            ids, max_new_tokens=PROBE_NEW_TOKENS, stop_ids=(), allow_beyond=True, query=query
        )

    say(min(tokens, _WARM_UP_TOKENS))
    return pace_of(loaded.facts, _linear_parameters(loaded), say(tokens))


def _linear_parameters(loaded: LoadedModel) -> int:
    """Those that every token of a prompt is multiplied with; the head sees one token a prompt."""
    head = loaded.causal_lm.get_output_embeddings()
    linears = [m for m in loaded.causal_lm.modules() if hasattr(m, "in_features") and m is not head]
    return sum(m.in_features * m.out_features for m in linears)


def _seconds(
    pace: Pace, plan: EvalPlan, lengths: list[int], processes: int, finished: Finished | None = None
) -> dict[str, float]:
    return {task: pace.seconds(work) / processes for task, work in readings(plan, lengths, finished).items()}


def _say(plan: EvalPlan, seconds: dict[str, float], dropped: list[int], console: Console) -> None:
    if dropped:
        console.warn(
            f"--max-hours {plan.config.max_hours:g}: left out {', '.join(f'{length:,}' for length in dropped)} tokens"
        )
    share = "" if plan.config.shard is None else " for all shares"
    name = "" if plan.config.preset is None else f"{plan.config.preset}: "
    console.print(f"{name}takes about {_time(sum(seconds.values()))} at most{share}: {_parts(seconds)}")


def _parts(seconds: dict[str, float]) -> str:
    """The tasks that take most of the time."""
    order = sorted(seconds, key=lambda task: -seconds[task])
    shown = [f"{task} {_time(seconds[task])}" for task in order[:3]]
    rest = sum(seconds[task] for task in order[3:])
    return ", ".join([*shown, *([f"{len(order) - 3} more {_time(rest)}"] if len(order) > 3 else [])])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / _HOUR:.1f} h"
