"""The families of file-based tasks by name."""

from __future__ import annotations

from longlora_cli.evaluation.tasks.files.babilong import BABILONG
from longlora_cli.evaluation.tasks.files.family import Family
from longlora_cli.evaluation.tasks.files.infinitebench import INFINITEBENCH
from longlora_cli.evaluation.tasks.files.leval import LEVAL
from longlora_cli.evaluation.tasks.files.longbench import LONGBENCH, LONGBENCH_E
from longlora_cli.evaluation.tasks.files.longbench_v2 import LONGBENCH_V2, LONGBENCH_V2_COT
from longlora_cli.evaluation.tasks.files.longmemeval import LONGMEMEVAL
from longlora_cli.evaluation.tasks.files.meetings_and_chats import LONGCHAT, QMSUM
from longlora_cli.evaluation.tasks.files.multiple_choice import MULTIPLE_CHOICE, MULTIPLE_CHOICE_CLOZE
from longlora_cli.evaluation.tasks.files.ruler import RULER_FILES
from longlora_cli.evaluation.tasks.files.stories import SQUALITY
from longlora_cli.evaluation.tasks.files.walks_and_turns import GRAPHWALKS, MRCR_FILES

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LONGBENCH,
        LONGBENCH_E,
        LONGBENCH_V2,
        LONGBENCH_V2_COT,
        INFINITEBENCH,
        RULER_FILES,
        BABILONG,
        LONGMEMEVAL,
        GRAPHWALKS,
        MRCR_FILES,
        QMSUM,
        LONGCHAT,
        SQUALITY,
        LEVAL,
        MULTIPLE_CHOICE,
        MULTIPLE_CHOICE_CLOZE,
    )
}
"""All of them, in the order of `task_names.FILES`."""
