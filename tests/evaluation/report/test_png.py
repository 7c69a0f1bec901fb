from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from longlora_cli.evaluation.grid import score_grid
from longlora_cli.evaluation.report.png import save_heatmap, save_position_curve


def grid(right):
    return score_grid(
        [
            {
                "length": length,
                "depth": depth,
                "sample": 0,
                "prediction": "7" if right(length, depth) else "8",
                "references": ["7"],
                "finish": "eos",
            }
            for length in (512, 1024)
            for depth in (0.0, 0.5, 1.0)
        ]
    )[0]


def curve(perplexities, band=True):
    buckets = [
        {"from": low, "to": high, "n": 10, "perplexity": p, "ci95": [p - 1, p + 1] if band else None}
        for (low, high), p in zip([(0, 128), (128, 256)], perplexities, strict=True)
    ]
    return {"by_position": buckets, "curve_windows": 2, "curve_source": "full windows"}


def test_a_heatmap_shows_right_and_wrong_cells_in_the_colours_of_its_scale(tmp_path):
    save_heatmap(tmp_path / "a.png", grid(lambda length, depth: depth < 1), title="needle, m")
    pixels = (imread(tmp_path / "a.png")[:, :, :3] * 255).round().astype(int)
    counts = [int((np.abs(pixels - colour).max(2) <= 2).sum()) for colour in ([254, 232, 56], [0, 34, 78])]
    # cividis' two ends: four cells of six are right, two are wrong.
    assert counts[0] == pytest.approx(2 * counts[1], rel=0.2)
    assert counts[1] > 1000


@pytest.mark.parametrize("band", [True, False])
def test_equal_results_are_equal_files_and_others_are_not(tmp_path, band):
    for name, values in {"a": [9.0, 5.0], "b": [9.0, 5.0], "c": [9.0, 6.0]}.items():
        save_position_curve(tmp_path / f"{name}.png", curve(values, band), title="ppl, m")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert a.startswith(b"\x89PNG")
