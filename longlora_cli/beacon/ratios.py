"""Which ratio a window is compressed with: drawn from a generator that the caller owns, once for each window."""

from __future__ import annotations

from random import Random
from typing import Any

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import capacity, closings


class RatioSource:
    """The ratios of the windows of one sequence, or of a batch whose rows share them.

    Args:
        settings: Ratios and how they are mixed.
        generator: Draws for the random mixes; needed with more than one ratio, never touched with one.
        limit: Positions the model can use; needed by `adapt-N`.
        training: Ratio 0 is drawn at most once, and only where another full window follows, because a window of raw
            memory trains no beacon.
        tokens: Length of a training sequence.

    Raises:
        ValueError: A random mix without a generator, `adapt-N` without a limit, or training with ratio 0 alone.
    """

    def __init__(
        self,
        settings: BeaconSettings,
        *,
        generator: Random | None = None,
        limit: int | None = None,
        training: bool = False,
        tokens: int = 0,
    ) -> None:
        self._settings, self._generator, self._limit = settings, generator, limit
        self._drawn: list[int] = []
        self._fixed: int | None = settings.ratios[0] if len(settings.ratios) == 1 else None
        self._compressed = closings(tokens, settings) if training else None
        if self._fixed is None:
            if settings.reserve is not None and limit is None:
                raise ValueError(f"beacon ratio mix {settings.ratio_mix} needs the model's length")
            if settings.ratio_mix.endswith("random") and generator is None:
                raise ValueError(f"beacon ratio mix {settings.ratio_mix} needs a generator")
        if training and not any(settings.ratios):
            raise ValueError("beacon ratio 0 alone trains no beacon")

    @property
    def generator(self) -> Random | None:
        """What it draws from."""
        return self._generator

    def expect(self, tokens: int) -> None:
        """Say how many tokens the sequence has with those that wait now; `adapt-N` chooses at the first time."""
        reserve = self._settings.reserve
        if self._fixed is None and reserve is not None and self._limit is not None:
            settings = self._settings
            if self._compressed is not None:  # a window of raw memory trains no beacon
                settings = settings.with_ratios(*(ratio for ratio in settings.ratios if ratio))
            self._fixed = adapted(tokens + reserve, settings, self._limit)

    def of_window(self, number: int) -> int:
        """The ratio of the window with this number, counted from 0; the same whenever it is asked."""
        if self._fixed is not None:
            return self._fixed
        while len(self._drawn) <= number:
            self._drawn.append(self._draw(len(self._drawn)))
        return self._drawn[number]

    def _draw(self, number: int) -> int:
        settings, count = self._settings, len(self._settings.ratios)
        in_turn = [settings.ratios[(number + offset) % count] for offset in range(count)]
        allowed = [ratio for ratio in in_turn if ratio or self._zero_allowed(number)]
        if settings.ratio_mix == "sequence":
            return allowed[0]
        if settings.ratio_mix == "instance-random" and self._drawn:
            return self._drawn[0]
        assert self._generator is not None  # checked when it was made
        return self._generator.choice(sorted(allowed))

    def _zero_allowed(self, number: int) -> bool:
        if self._compressed is None:
            return True
        mixed = self._settings.ratio_mix != "instance-random"
        return mixed and 0 not in self._drawn and number + 1 < self._compressed

    def fork(self) -> RatioSource:
        """A source that goes on as this one will, without sharing its generator."""
        twin = object.__new__(RatioSource)
        twin.__dict__.update(self.__dict__)
        twin._drawn = list(self._drawn)
        if self._generator is not None:
            twin._generator = Random()
            twin._generator.setstate(self._generator.getstate())
        return twin

    def to_json(self) -> dict[str, Any]:
        """All that decides the ratios to come."""
        state = self._generator.getstate() if self._generator is not None else None
        generator = None if state is None else [state[0], list(state[1]), state[2]]
        return {"drawn": self._drawn, "fixed": self._fixed, "limit": self._limit, "generator": generator}

    @classmethod
    def from_json(cls, content: dict[str, Any], settings: BeaconSettings) -> RatioSource:
        """The inverse of `to_json`; the generator is a new one in the same state."""
        generator = None
        if content["generator"] is not None:
            version, state, gauss = content["generator"]
            generator = Random()
            generator.setstate((version, tuple(state), gauss))
        source = cls(settings, generator=generator, limit=content["limit"])
        source._drawn, source._fixed = list(content["drawn"]), content["fixed"]
        return source


def adapted(tokens: int, settings: BeaconSettings, limit: int) -> int:
    """The ratio with the smallest capacity that holds so many tokens, else the one with the largest capacity."""
    room = sorted((capacity(ratio, settings, limit), ratio) for ratio in settings.ratios)
    return next((ratio for size, ratio in room if size >= tokens), room[-1][1])
