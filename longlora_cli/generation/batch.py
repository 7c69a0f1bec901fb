"""Several prompts read and answered together: one pass over the weights gives a token of each.

Rows end together. What they all begin with is read once, as by a session, and held once (`memory.attention_prefix`);
behind it stands a gap in each row but the longest, which attention passes over (`memory.attention.Gap`), and positions
count tokens, not places. So each row's
numbers are those of the row alone, up to the order of sums. Rows that have ended leave once half of them have.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.generation.cache import cache_bytes, depends_on_length, new_cache
from longlora_cli.generation.prefill import next_logits
from longlora_cli.generation.requests import MOST_BEHIND_PREFIX, Request, shared_tokens
from longlora_cli.generation.session import Answer, Finish
from longlora_cli.generation.stopping import StopWatch
from longlora_cli.memory.attention import Gap
from longlora_cli.memory.attention_prefix import SharedPrefix
from longlora_cli.models.loading import LoadedModel

_FILLER = 0  # any token of the vocabulary: nothing sees what stands in a gap


@torch.no_grad()
def answer_together(
    loaded: LoadedModel, requests: Sequence[Request], *, stop_ids: Collection[int], prefill_chunk: int
) -> list[Answer]:
    """The likeliest answer to each prompt, as `Session.answer` gives it to each alone.

    Args:
        loaded: The model; its positions must not depend on the length.
        requests: At least one. Keys and values of all are those of `requests.held_tokens`.
        stop_ids: Tokens that end an answer.
        prefill_chunk: Most tokens run at one time, of all rows together.

    Returns:
        Answers in the order of the requests. `prefill_seconds` and `decode_seconds` are each row's equal part;
        `reused_tokens` are those that were read for the first row already, `kv_bytes` what the row alone would hold.

    Raises:
        ValueError: No request, an empty prompt, or positions that depend on the length.
        NumericError: See `prefill`.
    """
    if not requests or not all(request.ids for request in requests):
        raise ValueError("a prompt has at least one token")
    if depends_on_length(loaded):
        raise ValueError("positions that depend on the length are those of one prompt")
    started = time.perf_counter()
    batch = _Batch(loaded, [request.ids for request in requests], prefill_chunk)
    rows = [_Row(loaded.tokenizer, request, frozenset(stop_ids)) for request in requests]
    chosen = _likeliest(next_logits(loaded, batch.read()))
    read = time.perf_counter()
    active = list(range(len(rows)))  # the row of each of the batch's places
    while True:
        for place, token in zip(active, chosen, strict=True):
            rows[place].accept(token)
        still = [number for number, place in enumerate(active) if rows[place].finish is None]
        if not still:
            break
        if 2 * len(still) <= len(active):
            batch.keep(still)
            active, chosen = [active[n] for n in still], [chosen[n] for n in still]
        chosen = _likeliest(next_logits(loaded, batch.step(chosen)))
    ended = time.perf_counter()
    count = len(rows)
    return [
        Answer(
            ids=row.ids,
            text=loaded.tokenizer.decode(
                row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            finish=row.finish or "length",
            prompt_tokens=len(request.ids),
            reused_tokens=batch.shared if place else 0,
            prefill_seconds=(read - started) / count,
            decode_seconds=(ended - read) / count,
            kv_bytes=row.held_tokens(len(request.ids)) * batch.token_bytes,
        )
        for place, (row, request) in enumerate(zip(rows, requests, strict=True))
    ]


def _likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row of `[rows, vocabulary]`; the lowest id when several are equal, as `greedy`."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    equal = logits == logits.max(-1, keepdim=True).values
    chosen: list[int] = torch.where(equal, ids, ids.numel()).min(-1).values.tolist()
    return chosen


def has_window(loaded: LoadedModel) -> bool:
    """True when the model has a sliding window, which would pass over a text that is held once."""
    return getattr(loaded.causal_lm.config, "sliding_window", None) is not None


class _Batch:
    """Rows that end together, and the cache of their keys and values."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], prefill_chunk: int) -> None:
        self._loaded, self._chunk = loaded, prefill_chunk
        self.cache: Any = new_cache()
        self.shared = shared_tokens(prompts)
        self._prefix = list(prompts[0][: self.shared])
        self._rests = [list(prompt[self.shared :]) for prompt in prompts]
        self._longest = max(map(len, self._rests))
        self._pads = [self._longest - len(rest) for rest in self._rests]
        self._widths = torch.tensor(self._pads, device=loaded.device)
        self._done = 0  # places behind the prefix
        self._held: SharedPrefix | None = None

    def read(self) -> Tensor:
        """Run all prompts; the last hidden state of each, `[rows, width]`."""
        hidden = self._read_behind_prefix() if self.shared else self._read_by_rows()
        self._done = self._longest
        return hidden

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one more token of each row; as `read`."""
        ids = torch.tensor(tokens, device=self._loaded.device)[:, None]
        positions = self.shared + self._done - self._widths[:, None]
        self._done += 1
        return self._hidden(ids, positions, self.cache, **self._gap())

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token of one row."""
        rows, places = self.cache.layers[0].keys.shape[0], self.cache.layers[0].keys.shape[-2]
        return cache_bytes(self.cache) // (rows * places)

    def keep(self, places: Sequence[int]) -> None:
        """Forget all rows but these."""
        chosen = torch.tensor(places, device=self._loaded.device)
        self._pads = [self._pads[place] for place in places]
        self._widths = self._widths[chosen]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]

    def _is_held_once(self) -> bool:
        """Not where a window passes over the prefix, nor where so much is behind it that its scores are too many."""
        return not has_window(self._loaded) and self._longest <= MOST_BEHIND_PREFIX

    def _gap(self) -> dict[str, Any]:
        if self._held is not None:
            return {"prefix": self._held, "gap": Gap(0, self._widths)}
        return {"gap": Gap(self.shared, self._widths)} if any(self._pads) else {}

    def _read_behind_prefix(self) -> Tensor:
        """The prefix once, then what each row has behind it, all rows together."""
        self._read_row(self._prefix, self.cache)
        rows = len(self._rests)
        if self._is_held_once():
            self._held = SharedPrefix(tuple((layer.keys, layer.values) for layer in self.cache.layers))
            self.cache = new_cache()
        for layer in self.cache.layers:
            layer.keys = layer.keys.expand(rows, *layer.keys.shape[1:])
            layer.values = layer.values.expand(rows, *layer.values.shape[1:])
        ids, columns = self._filled(range(rows)), max(1, self._chunk // rows)
        for start in range(0, self._longest, columns):
            piece = ids[:, start : start + columns]
            places = torch.arange(start, start + piece.shape[1], device=ids.device)
            positions = self.shared + (places - self._widths[:, None]).clamp(min=0)
            hidden = self._hidden(piece, positions, self.cache, **self._gap())
        return hidden

    def _read_by_rows(self) -> Tensor:
        """As many whole rows at a time as a chunk holds; a row longer than half of one by itself, in chunks.

        So no prompt is read against a mask of tokens x tokens, which took twice the time of rows one by one.
        """
        several = max(1, self._chunk // self._longest)
        found = []
        for start in range(0, len(self._rests), several):
            rows = range(start, min(start + several, len(self._rests)))
            cache = new_cache()
            alone = len(rows) == 1
            last = self._read_row(self._rests[start], cache) if alone else self._read_rows(rows, cache)
            found.append((cache, last, self._pads[start] if alone else 0))
        self.cache = _stacked([(cache, pad) for cache, _, pad in found])
        return torch.cat([last for _, last, _ in found])

    def _read_row(self, ids: Sequence[int], cache: Any) -> Tensor:
        tokens = torch.tensor([list(ids)], device=self._loaded.device)
        for start in range(0, len(ids), self._chunk):
            piece = tokens[:, start : start + self._chunk]
            positions = torch.arange(start, start + piece.shape[1], device=tokens.device)[None]
            hidden = self._hidden(piece, positions, cache)
        return hidden

    def _read_rows(self, rows: range, cache: Any) -> Tensor:
        """Whole rows; padding is a document of its own."""
        places = torch.arange(self._longest, device=self._loaded.device)
        pads = [self._pads[row] for row in rows]
        positions = (places - self._widths[rows.start : rows.stop, None]).clamp(min=0)
        documents = [[n for n in (pad, self._longest - pad) if n] for pad in pads]
        options = {"document_lengths": documents} if any(pads) else {}
        return self._hidden(self._filled(rows), positions, cache, **options)

    def _filled(self, rows: range) -> Tensor:
        filled = [[_FILLER] * self._pads[row] + self._rests[row] for row in rows]
        return torch.tensor(filled, device=self._loaded.device)

    def _hidden(self, ids: Tensor, positions: Tensor, cache: Any, **options: Any) -> Tensor:
        out = self._loaded.hidden(
            ids, use_cache=True, past_key_values=cache, position_ids=positions, **options
        )
        hidden: Tensor = out.last_hidden_state[:, -1]
        return hidden


def _stacked(parts: Sequence[tuple[Any, int]]) -> Any:
    """One cache of the rows of all; each may lack so many places at its left, which are zeros then."""
    whole = parts[0][0]
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        for name in ("keys", "values"):
            tensors = [
                nn.functional.pad(getattr(layer, name), (0, 0, pad, 0)) if pad else getattr(layer, name)
                for layer, (_, pad) in zip(layers, parts, strict=True)
            ]
            setattr(layers[0], name, torch.cat(tensors) if len(tensors) > 1 else tensors[0])
    return whole


class _Row:
    """The answer of one row while it grows."""

    def __init__(self, tokenizer: Any, request: Request, stop_ids: frozenset[int]) -> None:
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._most = request.max_new_tokens
        self._stop_ids = stop_ids
        self._watch = StopWatch(tokenizer, request.stop) if request.stop else None

    def held_tokens(self, prompt_tokens: int) -> int:
        """Tokens in the cache of a session that had given this answer: the last one is run only before an end token."""
        return prompt_tokens + len(self.ids) - (self.finish != "eos")

    def accept(self, token: int) -> None:
        """Take the next token, unless the row has ended; see `session._Run.accept`."""
        if self.finish is not None:
            return
        if token in self._stop_ids:
            self.finish = "eos"
            return
        self.ids.append(token)
        if len(self.ids) == self._most:
            self.finish = "length"
        if self._watch is not None and self._watch.is_met(token):
            self.finish = "stop"
