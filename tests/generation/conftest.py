"""Tiny loaded models of every kind that a session must work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.weights import attach
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.sections import AdapterSection, ModelSection
from longlora_cli.storage import atomic_folder

LENGTH = 1024


def load(folder: Path, **section: object) -> LoadedModel:
    return load_model(ModelSection(model=str(folder), **({"dtype": "fp32", "device": "cpu"} | section)))


@pytest.fixture(scope="session")
def count_tokens() -> Callable[[LoadedModel], AbstractContextManager[list[int]]]:
    """A context that collects the number of tokens of each forward."""

    @contextmanager
    def counting(loaded: LoadedModel) -> Iterator[list[int]]:
        counts: list[int] = []
        embedding = loaded.causal_lm.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, out: counts.append(args[0].shape[1]))
        try:
            yield counts
        finally:
            hook.remove()

    return counting


@pytest.fixture(scope="session")
def make_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path
) -> Callable[..., Path]:
    """Saves a tiny model of 1,024 tokens with other settings."""
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))

    def make(name: str, **changes: object) -> Path:
        settings = {"max_position_embeddings": LENGTH} | changes
        folder: Path = root.make_tiny_model(tmp_path_factory.mktemp(name), tiny_tokenizer_folder, **settings)
        return folder

    return make


@pytest.fixture(scope="session")
def make_loaded(
    make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], LoadedModel]:
    """Loaded models by kind, each made once: tied, untied, sliding, adapter, nf4, dynamic, beacons."""
    known: dict[str, LoadedModel] = {}

    def adapted() -> LoadedModel:
        base = load(make_folder("base"))
        base.model = adapters.attach(base.model, AdapterSection(lora_rank=4), quantization="none")
        torch.manual_seed(1)
        for name, parameter in base.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        target = tmp_path_factory.mktemp("adapter") / "adapter"
        with atomic_folder(target, "adapter") as staging:
            adapters.save(base.model, base.tokenizer, base.record(LENGTH), staging)
        return load(target)

    def with_beacons() -> LoadedModel:
        loaded = load(make_folder("beacons"))
        settings = BeaconSettings(window=32, ratios=(4,), sink=1)
        beacons = attach(loaded.causal_lm, settings, eos_token_id=2, bos_token_id=1)
        torch.manual_seed(2)
        for parameter in beacons.parameters():  # beacons that differ from what they began as
            parameter.data += 0.02 * torch.randn_like(parameter)
        loaded.beacons = settings
        return loaded

    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    makers: dict[str, Callable[[], LoadedModel]] = {
        "tied": lambda: load(make_folder("tied")),
        "untied": lambda: load(make_folder("untied", tie_word_embeddings=False)),
        "sliding": lambda: load(
            make_folder(
                "sliding", family="qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
            )
        ),
        "adapter": adapted,
        "beacons": with_beacons,
        "bf16": lambda: load(make_folder("bf16"), dtype="bf16"),
        "nf4": lambda: load(make_folder("nf4"), quantization="nf4"),
        "dynamic": lambda: load(make_folder("dynamic", max_position_embeddings=32, rope_parameters=dynamic)),
    }

    def make(kind: str) -> LoadedModel:
        if kind not in known:
            known[kind] = makers[kind]()
        return known[kind]

    return make


@pytest.fixture(scope="session")
def tiny(make_loaded: Callable[[str], LoadedModel]) -> LoadedModel:
    return make_loaded("tied")
