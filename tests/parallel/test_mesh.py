"""One process: every method is the identity. Two gloo processes: sums, flags and errors reach both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import Server

from longlora_cli.errors import SettingsError
from longlora_cli.parallel.mesh import Mesh


def test_with_one_process_every_method_is_the_identity() -> None:
    mesh = Mesh.start(torch.device("cpu"))
    value = torch.tensor([1.0, 2.0])
    assert mesh == Mesh(0, 1)
    assert mesh.is_main
    assert mesh.sum(value) is value
    assert mesh.gather("x") == ["x"]
    assert mesh.any(True, torch.device("cpu"))
    assert not mesh.any(False, torch.device("cpu"))
    assert mesh.from_main(lambda: 3) == 3


def test_with_one_process_an_error_passes_through() -> None:
    def fail() -> None:
        raise SettingsError("no")

    with pytest.raises(SettingsError, match="no"):
        Mesh().from_main(fail)


TWO = """
import sys, torch
from pathlib import Path
from longlora_cli.errors import SettingsError
from longlora_cli.parallel.mesh import Mesh
cpu = torch.device("cpu")
mesh = Mesh.start(cpu)
mine = torch.tensor([float(mesh.rank + 1)])
lines = [
    mesh.sum(mine).item(), mine.item(), mesh.any(mesh.rank == 1, cpu), mesh.any(False, cpu),
    mesh.gather(mesh.rank), mesh.from_main(lambda: f"from {mesh.rank}"), mesh.is_main,
]
def fail():
    raise SettingsError(f"told by {mesh.rank}")
try:
    mesh.from_main(fail)
except SettingsError as error:
    lines.append(error.message)
mesh.barrier()
mesh.stop()
(Path(sys.argv[1]) / f"rank{mesh.rank}").write_text(repr(lines))
"""


def test_two_processes_share_sums_flags_results_and_errors(tmp_path: Path, server: Server) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    _, err = (child := server.start(tmp_path, script=script, processes=2)).communicate()
    assert child.returncode == 0, err
    shared = "True, False, [0, 1], 'from 0'"
    assert (tmp_path / "rank0").read_text() == f"[3.0, 1.0, {shared}, True, 'told by 0']"
    assert (tmp_path / "rank1").read_text() == f"[3.0, 2.0, {shared}, False, 'told by 0']"
