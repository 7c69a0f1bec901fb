"""An evaluation says how long it will take, and `--max-hours` leaves lengths out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.commands import eval as command
from longlora_cli.commands import eval_pace
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import Interrupted, SettingsError
from longlora_cli.evaluation.estimate import Pace
from longlora_cli.evaluation.generation import question_key
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.plan import EvalPlan, make_plan
from longlora_cli.evaluation.readings import readings
from longlora_cli.evaluation.remaining import finished_of
from longlora_cli.models.loading import ModelFacts
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.options import resolve
from longlora_cli.parallel.mesh import Mesh

FACTS = ModelFacts(layers=2, width=8, heads=2, kv_heads=2, head_dim=4, vocabulary=10)


def config_of(model: Path, out: Path, **more: Any) -> EvalConfig:
    given: dict[str, Any] = {"haystack": [Path("noise")], "depths": 2, "samples": 1} | more
    return EvalConfig(beyond=True, model=str(model), out=out, **given)


def plan_of(config: EvalConfig) -> EvalPlan:
    return make_plan(config, load_tokenizer(config.model))


def test_each_task_has_a_reading_for_each_of_its_questions(tiny_model_folder: Path, tmp_path: Path) -> None:
    tasks = ["passkey", "lines"]
    plan = plan_of(config_of(tiny_model_folder, tmp_path / "o", tasks=tasks, lengths=[400, 600], samples=3))
    found = readings(plan, [400, 600])
    assert {task: len(work) for task, work in found.items()} == {task: plan.grid_count() for task in tasks}


def test_no_prompt_is_longer_than_what_is_counted_for_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(config_of(tiny_model_folder, tmp_path / "o", tasks=["passkey"], lengths=[400]))
    counted = readings(plan, [400])["passkey"]
    questions = list(plan.grid_questions("passkey"))
    shared = 0
    while questions[0].prompt[shared] == questions[1].prompt[shared]:
        shared += 1
    assert [len(q.prompt) <= r.tokens for q, r in zip(questions, counted, strict=True)] == [True, True]
    assert counted[1].reused <= shared  # the second is counted as if less of it were in the cache than is


def run(config: EvalConfig) -> dict[str, Any]:
    return command.run(config, Console(json_mode=True), dry_run=False)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 tokens take 0.4 hours a question, 600 tokens 0.6."""
    pace = Pace(FACTS, 500_000, 1e6 / 3.6, 0.0)
    monkeypatch.setattr(eval_pace, "measure_pace", lambda *_: pace)


@pytest.mark.usefixtures("slow")
def test_the_longest_length_is_left_out_and_results_say_so(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[400, 600], max_hours=1.0)
    found = run(config)
    assert found["dropped_lengths"] == [600]
    assert [part["length"] for part in found["tasks"]["lines"]["lengths"]] == [400]


@pytest.mark.usefixtures("slow")
def test_what_fits_is_measured_whole(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[400, 600], max_hours=3.0)
    assert "dropped_lengths" not in run(config)


@pytest.mark.usefixtures("slow")
def test_one_length_that_takes_too_long_is_refused_before_anything_is_asked(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[400], max_hours=0.1)
    with pytest.raises(SettingsError, match=r"about 4[0-9] min are needed"):
        run(config)
    assert not list(tmp_path.iterdir())


def test_the_pace_of_a_real_model_says_the_time_of_its_own_prompts_to_a_factor_of_four(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[2000], samples=4)
    from longlora_cli.models.loading import load_model

    plan = plan_of(config)
    loaded = load_model(config, config, context_length=plan.longest)
    told = eval_pace.measure_pace(loaded, plan).seconds(readings(plan, config.lengths)["lines"])
    taken = run(config)["tasks"]["lines"]["seconds"]
    assert taken / 4 < told < taken * 4


@pytest.mark.parametrize("task", ["lines", "passkey", "niah_single_1"])
def test_a_dry_run_makes_nothing_and_counts_to_five_per_cent(
    task: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=[task], lengths=[600, 900], samples=3)
    plan = plan_of(config)
    ask = plan.grid_questions if task == "passkey" else plan.sample_questions
    exact = [len(question.prompt) for question in ask(task)]

    def made(*_: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr("longlora_cli.evaluation.tasks.registry.make_sample", made)
    monkeypatch.setattr("longlora_cli.evaluation.tasks.passkey.passkey_questions", made)
    counts = plan.counts()[task]
    assert counts["samples"] == len(exact)
    assert counts["tokens"] == pytest.approx(sum(exact), rel=0.05)
    assert counts["longest"] >= max(exact)


class OtherProcess(Mesh):
    """The second of two; the first has decided."""

    def from_main(self, work: Any) -> Any:
        return {"lines": 1.0}, [600]


def test_the_first_process_decides_for_all(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("measured by a process that does not decide")

    monkeypatch.setattr(eval_pace, "measure_pace", measured)
    plan = plan_of(
        config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[400, 600], max_hours=1.0)
    )
    loaded: Any = None  # it is not looked at
    told, dropped = eval_pace.paced(loaded, plan, OtherProcess(1, 2), Console(json_mode=True))
    assert (told.config.lengths, dropped) == ([400], [600])


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("control", ["none", "no-context"])
def test_a_resumed_evaluation_is_said_to_take_the_time_of_the_rest(
    tiny_model_folder: Path, tmp_path: Path, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["ppl", "lines", "passkey"]
    more: dict[str, Any] = {
        "lengths": [400, 600],
        "max_hours": 100.0,
        "data": [tmp_path / "b.txt"],
        "window": 64,
    }
    (tmp_path / "b.txt").write_text("The old river was slow. They walked over the bridge. " * 40)
    more |= {"max_tokens": 300, "max_new_tokens": 4, "control": control, "batch_size": 1}
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=tasks, **more)
    answer, asked, told = command.SessionAnswerer.answer, [], []

    def dies(self: Any, *arguments: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(1)
        return answer(self, *arguments)

    say = eval_pace._say
    monkeypatch.setattr(
        eval_pace, "_say", lambda plan, seconds, *_: told.append(seconds) or say(plan, seconds, *_)
    )
    with monkeypatch.context() as patch:
        patch.setattr(command.SessionAnswerer, "answer", dies)
        with pytest.raises(Interrupted):
            run(config)
    run(config)
    first, second = told
    assert first["lines"] > 0
    assert second["ppl"] == 0, "its losses are kept"
    # Lines are asked by length: of 400, 400, 600 and 600 tokens the last one is left, and all of its controls.
    plan = plan_of(config)
    left = readings(plan, [400, 600])["lines"][3:]
    pace = eval_pace.measure_pace(None, plan)  # type: ignore[arg-type]
    assert second["lines"] == pytest.approx(pace.seconds(left))
    assert second["passkey"] == first["passkey"]


@pytest.mark.usefixtures("slow")
def test_what_another_model_or_other_settings_have_finished_is_not_taken_off(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    plan = plan_of(config_of(tiny_model_folder, tmp_path / "o", tasks=["lines"], lengths=[400]))
    question = next(iter(plan.sample_questions("lines")))
    journal = Journal()
    assert finished_of(plan, journal, "model") is None
    journal.add({"key": question_key(question, 16, "model"), "task": "lines"})
    mine, other = finished_of(plan, journal, "model"), finished_of(plan, journal, "another")
    assert mine is not None
    assert other is not None
    assert (mine.questions, other.questions) == ({"lines": 1}, {})


@pytest.mark.parametrize("other", [{"make": True, "tasks": "lines"}, {"rope": "yarn"}])
def test_beyond_is_refused_where_no_length_would_be(other: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"--beyond .*has no effect here"):
        resolve("eval", {"out": "o", "beyond": True, **other})


def rope_config(folder: Path, out: Path, **more: Any) -> EvalConfig:
    given: dict[str, Any] = {"haystack": [Path("noise")], "depths": 2, "samples": 1, "tasks": ["lines"]}
    return EvalConfig(model=str(folder), out=out, rope="linear", lengths=[600], **given, **more)


def test_a_rope_factor_that_does_not_reach_the_lengths_is_refused_before_a_model_is_loaded(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(
        SettingsError, match=r"600 tokens would be read, --rope-factor 2 takes .* from 128 to 256"
    ):
        run(rope_config(tiny_model_folder, tmp_path / "o", rope_factor=2))
    for more in ({"rope_factor": 4.7}, {"rope_factor": 2, "beyond": True}, {}):
        plan = plan_of(rope_config(tiny_model_folder, tmp_path / "o", **more))
        assert plan.longest == 600


def test_lengths_beyond_a_rope_factor_are_an_audit_when_they_are_asked_for(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    found = run(rope_config(tiny_model_folder, tmp_path / "o", rope_factor=2, beyond=True))
    told = {one["name"]: one for one in found["audits"]}["Positions (RoPE)"]
    assert (told["ok"], told["value"]["made for"]) == (False, 256)


def test_tasks_stay_in_the_order_asked_for_in_results_and_report(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    asked = ["sort", "lines", "icl_many", "count"]
    config = config_of(tiny_model_folder, tmp_path / "o", tasks=asked, lengths=[900])
    assert list(run(config)["tasks"]) == asked
    stored = json.loads((tmp_path / "o" / "results.json").read_text())
    assert list(stored["tasks"]) == asked
    page = (tmp_path / "o" / "report.html").read_text()
    places = [page.index(f'data-task="{task}"') for task in asked]
    assert places == sorted(places)
