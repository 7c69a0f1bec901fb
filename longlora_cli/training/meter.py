"""What a step cost: tokens per second, FLOPs with attention counted, peak GPU and host memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field

import torch

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.models.loading import ModelFacts

# Dense bf16 TFLOP/s as the makers state them, for MFU; unknown chips get no MFU.
_PEAK_TFLOPS = {
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40": 181.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def training_flops(facts: ModelFacts, linear_parameters: int, document_lengths: list[int]) -> float:
    """FLOPs one adapter step needs for these documents, recomputation not counted.

    A frozen linear layer costs 2 FLOPs per parameter and token forward and 2 backward (no weight gradient); causal
    attention costs 2 * 2 * length^2 / 2 per head and width forward and 2.5 times that backward.
    """
    tokens = sum(document_lengths)
    squares = sum(length * length for length in document_lengths)
    attention = 3.5 * 2 * squares * facts.heads * facts.head_dim * facts.layers
    return 4.0 * linear_parameters * tokens + attention


def beacon_flops(facts: ModelFacts, linear_parameters: int, tokens: int, settings: BeaconSettings) -> float:
    """FLOPs that a step over a document needs when it is read in windows, the ratios taken as equally frequent.

    As `training_flops`, but beacons are rows too, and a window's rows see the memory before it and each other. The
    gradients of beacon weights and what a checkpointed window computes again are not counted.
    """
    share = sum(1 / ratio if ratio else 0.0 for ratio in settings.ratios) / len(settings.ratios)
    kept = sum(1 / ratio if ratio else 1.0 for ratio in settings.ratios) / len(settings.ratios)
    rows, pairs, memory, left = 0.0, 0.0, 0.0, tokens
    while left > 0:
        fed = min(settings.window, left)
        own = fed * (1 + share) if left > settings.window else fed  # the last window has no beacons
        rows += own
        pairs += own * memory + own * own / 2
        memory += settings.hop * kept
        left -= settings.hop if left > settings.window else left
    return 4.0 * linear_parameters * rows + 3.5 * 4 * pairs * facts.heads * facts.head_dim * facts.layers


@dataclass
class StepMeter:
    """Counts over the steps since the last log line.

    Args:
        facts: Sizes of the model.
        linear_parameters: Parameters of its linear layers, the head included.
        device: Whose memory is watched.
        beacons: How documents are read in windows; None where they are read whole.
    """

    facts: ModelFacts
    linear_parameters: int
    device: torch.device
    beacons: BeaconSettings | None = None
    tokens: int = 0
    flops: float = 0.0
    _since: float = field(default_factory=time.perf_counter)
    _peak_bytes: int = 0

    def begin_step(self) -> None:
        """Reset the peak counter, so that a report is about its own steps."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def count(self, document_lengths: list[list[int]]) -> None:
        """Add a micro-batch."""
        for row in document_lengths:
            if self.beacons is not None:  # behind its document a row has padding, which is not read
                self.tokens += row[0]
                self.flops += beacon_flops(self.facts, self.linear_parameters, row[0], self.beacons)
                continue
            self.tokens += sum(row)
            self.flops += training_flops(self.facts, self.linear_parameters, row)

    def end_step(self) -> None:
        """Keep the highest peak of the steps in this report."""
        if self.device.type == "cuda":
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))

    def report(self, world: int) -> dict[str, float]:
        """Figures since the last report; tokens and FLOPs of all processes, taking them to be alike."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._since
        row = {
            "tokens_per_second": round(world * self.tokens / seconds, 1),
            "tflops": round(self.flops / seconds / 1e12, 3),
            "seconds": round(seconds, 4),
            "peak_host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        }
        if self.device.type == "cuda":
            row["peak_gpu_gib"] = round(self._peak_bytes / 2**30, 3)
            name = torch.cuda.get_device_name(self.device)
            peak = next((v for k, v in _PEAK_TFLOPS.items() if k in name), None)
            if peak:
                row["mfu"] = round(row["tflops"] / peak, 4)
        self.restart()
        return row

    def restart(self) -> None:
        """Begin a new report now; time spent in evaluation or saving is left out."""
        self.tokens, self.flops, self._peak_bytes, self._since = 0, 0.0, 0, time.perf_counter()


def release_memory(device: torch.device) -> None:
    """Give cached GPU blocks back between phases (load, train, evaluate, save)."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
