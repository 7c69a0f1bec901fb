"""A training step walked tensor by tensor: the planner's twin, with nothing of its arithmetic in it.

Every tensor is put into and taken out of a ledger at the moment at which the fused engine does it, for one plan. Peaks
and FLOPs come from what happened.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from longlora_cli.memory.plan import MemoryPlan, ModelShape

CONTEXT_AND_WORKSPACE = 2**29 + 2**26
Name = tuple[str, int]


@dataclass
class Ledger:
    live: dict[str, dict[Name, float]] = field(default_factory=lambda: defaultdict(dict))
    peak: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def put(self, place: str, name: Name, size: float) -> None:
        assert name not in self.live[place], f"{name} is already on {place}"
        self.live[place][name] = size
        self.peak[place] = max(self.peak[place], sum(self.live[place].values()))

    def drop(self, place: str, name: Name) -> None:
        del self.live[place][name]

    def has(self, place: str, name: Name) -> bool:
        return name in self.live[place]


class Walk:
    """One step under one plan; `squares` is the sum of squared document lengths."""

    def __init__(self, plan: MemoryPlan, shape: ModelShape, squares: float) -> None:
        self.plan, self.shape, self.squares = plan, shape, squares
        self.ledger, self.flops = Ledger(), 0.0
        self.leaving: list[Name] = []  # on the GPU until the next layer has run
        s, n = shape, plan.tokens
        e, q, kv = s.element_bytes, s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.size = {
            "input": n * s.width * e,
            "attention": n * q * e + n * s.heads * 4,
            "qkv": n * (q + 2 * kv) * e,
            "gate_up": n * (2 if s.mlp_matrices == 3 else 1) * s.intermediate * e,
            "gradient": n * s.width * e,
            "dout": n * q * e,
        }
        tile, loss = min(plan.tile_tokens, n), min(plan.loss_tile, n)
        intermediates = (4 if s.mlp_matrices == 3 else 3) * s.intermediate
        self.size["tile"] = tile * (intermediates + 4 * s.width) * e
        self.size["projection"] = tile * 2 * s.width * e
        self.size["logits"] = loss * (s.vocabulary * 10 + 2 * s.width * e)
        per = plan.kv_heads_per_call
        if per in (0, s.kv_heads):
            self.size["ahead"] = 0
            self.size["behind"] = n * ((q + 2 * kv) * e + q * 4 + q * e / 2)
        else:
            part = per / s.kv_heads
            self.size["ahead"] = n * ((q + 2 * kv) + q) * e * part
            self.size["behind"] = n * ((q + 2 * kv) * 2 * e + q * 2 * e + q * 4 + q * e / 2) * part
        self.widths = {
            "q_proj": (s.width, q), "k_proj": (s.width, kv), "v_proj": (s.width, kv), "o_proj": (q, s.width),
            "gate_proj": (s.width, s.intermediate), "up_proj": (s.width, s.intermediate),
            "down_proj": (s.intermediate, s.width),
        }  # fmt: skip
        if s.mlp_matrices == 2:
            del self.widths["gate_proj"]

    def run(self) -> Walk:
        self._static()
        gpu = self.ledger
        gpu.put("gpu", ("input", 0), self.size["input"])
        for i in range(self.shape.layers):
            self._forward(i)
        self._pass("logits")
        self._left()
        self.flops += 2 * 2 * self.plan.tokens * self.shape.width * self.shape.vocabulary
        gpu.drop("gpu", ("input", self.shape.layers))
        gpu.put("gpu", ("gradient", 0), self.size["gradient"])
        groups = self.plan.groups()
        for number in range(len(groups) - 1, -1, -1):
            self._group(groups[number], groups[number - 1] if number else None)
        assert set(self.ledger.live["gpu"]) == {("static", 0), ("gradient", 0)}
        assert not self.ledger.live["host"]
        assert not self.ledger.live["disk"]
        return self

    def _static(self) -> None:
        s = self.shape
        total = s.weight_bytes - self.plan.embedding_on_host * s.embedding_bytes
        total += s.trainable * (4 + 4 + s.optimizer_bytes_per_parameter)
        total += s.held_bytes  # counted in test_held_matrices; else one layer's matrices at a time
        for name, (a, b) in self.widths.items() if not s.held_bytes else ():
            total += (a * b + (s.lora_rank * (a + b) if name in s.lora_targets else 0)) * s.element_bytes
        tables = self.plan.tokens * (s.head_dim // 2 * 2 * 4 + 3 * 8)
        self.ledger.put("gpu", ("static", 0), total + tables + CONTEXT_AND_WORKSPACE)

    def _count(self, names: tuple[str, ...], times: float = 1, adapters: float = 0) -> None:
        for name in names:
            if name in self.widths:
                a, b = self.widths[name]
                extra = self.shape.lora_rank * (a + b) if name in self.shape.lora_targets else 0
                self.flops += 2 * self.plan.tokens * (times * (a * b + extra) + adapters * extra)

    def _attention_flops(self, times: float) -> None:
        # q k^T and p v over half of the square
        self.flops += times * 2 * 2 * self.shape.heads * self.shape.head_dim * self.squares / 2

    def _pass(self, what: str) -> None:
        self.ledger.put("gpu", (what, -1), self.size[what])
        self.ledger.drop("gpu", (what, -1))

    def _keep(self, kind: str, i: int, place: str) -> None:
        """A tensor that is on the GPU goes where the plan wants it."""
        if place == "recompute":
            self.ledger.drop("gpu", (kind, i))
        elif place != "gpu":
            self.ledger.put(place, (kind, i), self.size[kind])
            self.leaving.append((kind, i))

    def _left(self) -> None:
        for name in self.leaving:
            self.ledger.drop("gpu", name)
        self.leaving.clear()

    def _project(self, i: int) -> None:
        self.ledger.put("gpu", ("qkv", i), self.size["qkv"])
        self._pass("projection")
        self._count(("q_proj", "k_proj", "v_proj"))

    def _attend(self, i: int) -> None:
        self.ledger.put("gpu", ("attention", i), self.size["attention"])
        self._pass("ahead")
        self._attention_flops(1)

    def _finish(self, i: int, *, keep_gate_up: bool) -> None:
        self.ledger.put("gpu", ("input", i + 1), self.size["input"])
        if keep_gate_up:
            self.ledger.put("gpu", ("gate_up", i), self.size["gate_up"])
        self._pass("tile")
        self._count(("o_proj", "gate_proj", "up_proj", "down_proj"))

    def _forward(self, i: int) -> None:
        plan = self.plan.layers[i]
        arriving, self.leaving = self.leaving, []
        group = next(g for g in self.plan.groups() if i in g)
        held = i > group.start + 1 and self.plan.layers[group.start].input != "gpu"
        if held:  # the call of the whole group has it as its argument
            self.ledger.put("gpu", ("held", i), self.size["input"])
        self._project(i)
        self._attend(i)
        if plan.qkv == "recompute":
            self.ledger.drop("gpu", ("qkv", i))
        self._finish(i, keep_gate_up=plan.gate_up != "recompute")
        for name in [*arriving, *([("held", i)] if held else [])]:
            self.ledger.drop("gpu", name)
        for kind in ("input", "attention"):
            self._keep(kind, i, plan.place(kind))
        for kind in ("qkv", "gate_up"):
            if plan.place(kind) != "recompute":
                self._keep(kind, i, plan.place(kind))

    def _where(self, name: Name) -> str:
        return next(place for place in ("host", "disk", "gpu") if self.ledger.has(place, name))

    def _fetch(self, name: Name) -> None:
        """On the GPU, whether it was there, is already back, or still waits elsewhere."""
        if not self.ledger.has("gpu", name):
            self.ledger.put("gpu", name, self.size[name[0]])
        for place in ("host", "disk"):
            if self.ledger.has(place, name):
                self.ledger.drop(place, name)

    def _prefetch(self, names: list[Name]) -> None:
        for name in names:
            if not self.ledger.has("gpu", name):
                self.ledger.put("gpu", name, self.size[name[0]])

    def _wanted(self, i: int, group: range, *, again: bool) -> list[Name]:
        """What a visit of layer i takes from where it was kept in forward."""
        plan = self.plan.layers[i]
        kinds = ["input"] if i == group.start else []
        if again:
            kinds += ["attention"] if plan.attention != "recompute" else ["qkv"]
        elif i == group[-1]:
            kinds += ["attention", "qkv", "gate_up"]
        else:
            kinds += ["qkv", "gate_up"] if plan.attention != "recompute" else ["gate_up"]
            kinds = [kind for kind in kinds if kind != "input"]
        return [(kind, i) for kind in kinds if plan.place(kind) != "recompute"]

    def _group(self, group: range, below: range | None) -> None:
        last = group[-1]
        for j in group[:-1]:
            self._again(j, group)
        for i in reversed(group):
            if i > group.start:
                inner = [("input", i - 1), ("attention", i - 1)]
                following = [*inner, *self._wanted(i - 1, group, again=False)]
            elif below is not None:
                following = self._wanted(below.start, below, again=len(below) > 1)
            else:
                following = []
            self._backward(i, group, following, fresh=i == last)

    def _again(self, j: int, group: range) -> None:
        plan = self.plan.layers[j]
        going, self.leaving = self.leaving, []
        for name in self._wanted(j, group, again=True):
            self._fetch(name)
        self._prefetch(self._wanted(j + 1, group, again=j + 1 < group[-1]))
        if plan.attention == "recompute":
            if plan.qkv == "recompute":
                self._project(j)
            self._attend(j)
            self.ledger.drop("gpu", ("qkv", j))
        self._finish(j, keep_gate_up=False)
        for name in going:
            self.ledger.drop("gpu", name)
        self._keep("input", j, self.plan.inner_input)
        self._keep("attention", j, self.plan.inner_attention)

    def _backward(self, i: int, group: range, following: list[Name], *, fresh: bool) -> None:
        plan = self.plan.layers[i]
        for name in self._wanted(i, group, again=False):
            self._fetch(name)
        if not fresh:
            self._fetch(("input", i))
            self._fetch(("attention", i))
        elif plan.attention == "recompute":
            if plan.qkv == "recompute":
                self._project(i)
            self._attend(i)
        self._left()
        self._prefetch(following)
        self.ledger.put("gpu", ("dout", i), self.size["dout"])
        self._pass("tile")
        self._count(("o_proj",))
        if plan.gate_up == "recompute":
            self._count(("gate_proj", "up_proj"))
        else:
            self.ledger.drop("gpu", ("gate_up", i))
        if not self.ledger.has("gpu", ("qkv", i)):
            self._project(i)
        self._pass("behind")
        self._attention_flops(2.5)
        self.ledger.drop("gpu", ("dout", i))
        self.ledger.drop("gpu", ("attention", i))
        self._pass("projection")
        self._count(tuple(self.widths), 1, adapters=1)
        self.ledger.drop("gpu", ("qkv", i))
        self.ledger.drop("gpu", ("input", i))
