"""The synthetic tasks by name: how each is made, what judges it, and whether its answer has a depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.data.haystack import Haystack
from longlora_cli.evaluation.tasks.passkey import depth_shares
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.babi import babi_long
from longlora_cli.evaluation.tasks.synthetic.code import code_debug, code_run
from longlora_cli.evaluation.tasks.synthetic.count import count, sort
from longlora_cli.evaluation.tasks.synthetic.cwe import cwe
from longlora_cli.evaluation.tasks.synthetic.fwe import fwe
from longlora_cli.evaluation.tasks.synthetic.graphwalk import graphwalk
from longlora_cli.evaluation.tasks.synthetic.icl import icl_many
from longlora_cli.evaluation.tasks.synthetic.kv import kv
from longlora_cli.evaluation.tasks.synthetic.latent import latent
from longlora_cli.evaluation.tasks.synthetic.lines import lines
from longlora_cli.evaluation.tasks.synthetic.mrcr import mrcr
from longlora_cli.evaluation.tasks.synthetic.niah import niah
from longlora_cli.evaluation.tasks.synthetic.qa import qa_needle
from longlora_cli.evaluation.tasks.synthetic.repeat import repeat
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.topic import topic
from longlora_cli.evaluation.tasks.synthetic.vt import vt
from longlora_cli.task_names import GROUPS


@dataclass(frozen=True)
class Task:
    """A synthetic task.

    Args:
        name: As `--tasks` knows it.
        make: The sample of a request.
        scorer: What judges it.
        max_new_tokens: Longest answer; tasks with long ones take at most a quarter of the length.
        has_depth: The answer stands at one place, so that lengths and depths make a heatmap.
    """

    name: str
    make: Callable[[Request], Sample]
    scorer: str
    max_new_tokens: int
    has_depth: bool = False

    @property
    def groups(self) -> list[str]:
        """The groups that it belongs to."""
        return [group for group, names in GROUPS.items() if self.name in names]


_SINGLE = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(Task(name, niah, "ruler.all", 128, has_depth=True) for name in _SINGLE),
        Task("niah_multivalue", niah, "ruler.all", 128),
        Task("niah_multiquery", niah, "ruler.all", 128),
        Task("vt", vt, "ruler.all", 30),
        Task("cwe", cwe, "ruler.all", 120),
        Task("fwe", fwe, "ruler.all", 50),
        Task("niah_latent", latent, "ruler.part", 32, has_depth=True),
        Task("topic", topic, "synthetic.contained", 50, has_depth=True),
        Task("lines", lines, "synthetic.number", 16, has_depth=True),
        Task("kv", kv, "infinitebench", 64, has_depth=True),
        Task("qa_needle", qa_needle, "synthetic.answer", 32),
        Task("babi_long", babi_long, "babilong", 20),
        Task("graphwalk", graphwalk, "graphwalks", 512),
        Task("mrcr", mrcr, "mrcr", 512),
        Task("icl_many", icl_many, "synthetic.answer", 8),
        Task("count", count, "synthetic.number", 32),
        Task("sort", sort, "synthetic.order", 32),
        Task("code_run", code_run, "infinitebench", 16),
        Task("code_debug", code_debug, "infinitebench@2024-08", 16, has_depth=True),
        Task("repeat", repeat, "synthetic.copy", 256, has_depth=True),
    )
}
"""All of them, in the order of `task_names.SYNTHETIC`."""


def requests(
    name: str,
    haystack: Haystack,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    seed: int,
) -> Iterator[Request]:
    """What is asked of a task: `depths * samples` samples of each length, shortest length first.

    Every task has as many, so that a group's mean weighs its tasks equally. Where the answer has a depth, samples go
    round the evenly spaced depths.
    """
    shares = depth_shares(depths)
    for length in sorted(set(lengths)):
        for sample in range(depths * samples):
            depth = shares[sample % depths] if TASKS[name].has_depth else None
            yield Request(name, tokenizer, haystack, length, sample, seed, depth)


def make_sample(request: Request) -> Sample:
    """The sample of a request.

    Raises:
        SettingsError: The length does not hold it.
        DataError: The haystack cannot be used for it.
    """
    return TASKS[request.task].make(request)
