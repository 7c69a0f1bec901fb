"""What windows cost, by integers alone: rows of keys that are held, and the highest position in use."""

from __future__ import annotations

from longlora_cli.beacon.settings import BeaconSettings


def held_rows(settings: BeaconSettings, ratio: int, tokens: int) -> int:
    """Rows of keys that a session holds of a text of so many tokens, all windows at one ratio.

    Closed windows leave their beacons, the first one its sink too; of the open window every row is held.
    """
    closed = (tokens - settings.window) // settings.hop + 1 if tokens >= settings.window else 0
    left = tokens - closed * settings.hop
    kept = settings.hop // ratio if ratio else settings.hop
    beacons = left // ratio if ratio and settings.position == "interleave" else 0
    return (settings.sink if closed and ratio else 0) + closed * kept + left + beacons


def trained_positions(settings: BeaconSettings, windows: int) -> int:
    """Most positions that a training document of so many windows takes up, at the smallest of the ratios.

    Its last window has no beacons. One window may keep all of its tokens, where ratio 0 is mixed in.
    """
    beacons = settings.hop // min(ratio for ratio in settings.ratios if ratio)
    whole = settings.hop - beacons if 0 in settings.ratios and settings.ratio_mix != "instance-random" else 0
    return settings.sink + whole + (windows - 1) * beacons + settings.window
