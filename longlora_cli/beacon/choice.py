"""From the flags of a training to the settings that the core reads."""

from __future__ import annotations

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import SettingsError
from longlora_cli.sections_beacon import BeaconSection


def settings_of(section: BeaconSection) -> BeaconSettings | None:
    """What a training was asked for; None where it has no beacons.

    Raises:
        SettingsError: A combination that only the core knows cannot work.
    """
    if not section.trains_beacons:
        return None
    settings = BeaconSettings(
        window=section.beacon_window,
        stride=section.beacon_stride,
        ratios=section.ratios,
        ratio_mix=section.beacon_ratio_mix,
        attention=section.beacon_attention,
        position=section.beacon_position,
        attend_prev=section.beacon_attend_prev,
        projections=tuple(section.beacon_param),
        sink=section.beacon_sink,
        embed_init=section.beacon_embed_init,
        parallel=section.beacon_parallel_window,
    )
    try:
        settings.validate()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return settings


def evaluated(section: BeaconSection, settings: BeaconSettings) -> BeaconSettings:
    """The same with the one ratio of evaluations during training: the largest, if none was asked for."""
    asked = section.eval_beacon_ratio
    return settings.with_ratios(max(settings.ratios) if asked is None else asked)
