"""Tiny real parts: models, a tokenizer with a chat template, and no network."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from forked import Server
from tiny_models import make_tiny_model

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The secret code of the amber falcon is 48213. The river ran past the mill and the miller slept.",
    "It was the best of times, it was the worst of times, it was the age of wisdom and of foolishness.",
    "<user> What is the secret code of Amber Falcon? <assistant> 0123456789",
] * 20


def pytest_configure() -> None:
    """A shell starts a command in the background with Ctrl-C ignored, and so would be all that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of garbage collection.

    Training releases memory between its phases, and a full collection takes 0.3 s of a processor over the objects of
    7,000 tests and their imports; none of them is garbage.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 tokens with ChatML, saved as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A tied Llama of 2 layers; use `make_tiny_model` for other seeds, families and settings."""
    return make_tiny_model(tmp_path_factory.mktemp("llama"), tiny_tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_data_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """24 chunks of 96 tokens with a repeated half to learn; every third has two documents and masked labels."""
    import numpy as np

    from longlora_cli.data.chunk import Chunk
    from longlora_cli.data.dataset import ChunkDataset
    from longlora_cli.models.tokenizer import load_tokenizer, template_sha256, tokenizer_sha256

    tokenizer = load_tokenizer(tiny_model_folder)
    random = np.random.default_rng(0)
    chunks = []
    for number in range(24):
        ids = random.integers(3, 500, 96).astype(np.int32)
        ids[48:] = ids[:48]
        labels = ids.copy()
        labels[0] = -100
        lengths = [96]
        if number % 3 == 0:
            lengths = [40, 56]
            labels[:70] = -100
        chunks.append(Chunk(ids, labels, np.array(lengths, dtype=np.int32)))
    folder = tmp_path_factory.mktemp("data") / "chunks"
    hashes = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "template_sha256": template_sha256(tokenizer)}
    ChunkDataset.write(folder, chunks, {**hashes, "max_length": 96})
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts commands and scripts in processes that need not import anything first."""
    server = Server(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, for tests marked `real_model`; says so when it is missing."""
    name = os.environ.get("TEST_SMOLLM2")
    if not name:
        pytest.fail("this test needs the real model: set TEST_SMOLLM2 to a folder with SmolLM2-135M-Instruct")
    return Path(name)
