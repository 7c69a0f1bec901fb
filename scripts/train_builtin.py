"""Make the embedded model: a Llama of 2M parameters that reads 512 tokens, with its own tokenizer.

    python scripts/train_builtin.py tokenizer BOOKS_DIR WORK_DIR     # byte-level BPE of 2,048 tokens with ChatML
    python scripts/train_builtin.py data      BOOKS_DIR WORK_DIR     # token ids of books and retrieval chats
    python scripts/train_builtin.py train     WORK_DIR OUT_DIR       # a few minutes on one GPU

BOOKS_DIR holds plain-text books. The embedded book is held out: `HELD_OUT` is never trained on. Chats are the ones of
`longlora prepare --synthetic`; in training their digits are permuted at random per chat and use, so that no value can
be learnt by heart.
"""

from __future__ import annotations

import json
import random
import sys
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np

HELD_OUT = "the-adventures-of-sherlock-holmes"
LENGTH = 512
VOCABULARY = 2048
CHATS = 48_000
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS, BATCH, PEAK_RATE, WARMUP, WEIGHT_DECAY = 9_000, 256, 3e-3, 300, 0.1
CHAT_SHARE = 0.5  # of the rows of a batch; the rest are windows of books


def books_of(folder: Path) -> list[Path]:
    """The books trained on, in name order."""
    return [path for path in sorted(folder.glob("*.txt")) if path.stem != HELD_OUT]


def make_tokenizer(books: Path, work: Path) -> None:
    """Train the BPE on every book but the held-out one; digits stay single tokens so that numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in books_of(books)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(work / "tokenizer")


def make_chats(job: tuple[Path, Path, int, int]) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of chats `first` to `last`, one rendering each: lengths only need to stay below `LENGTH`.

    The wordings are those of `longlora prepare --synthetic`; the filler is cut by characters rather than fitted to a
    token count, which is 20 times faster.
    """
    from longlora_cli.data.chat_template import render_chat
    from longlora_cli.data.haystack import Haystack
    from longlora_cli.models.tokenizer import load_tokenizer

    books, work, first, last = job
    tokenizer = load_tokenizer(work / "tokenizer")
    haystack = Haystack([path.read_text(encoding="utf-8") for path in books_of(books)])
    rows = []
    for index in range(first, last):
        rng = random.Random(f"builtin:{index}")
        facts = rng.choice((1, 2, 3, 4, 6, 8))
        filler_characters = int(rng.uniform(0, 1600))
        while True:
            rendered = render_chat(tokenizer, draw_chat(rng, haystack, facts, filler_characters))
            if len(rendered.ids) <= LENGTH:
                break
            filler_characters = int(filler_characters * 0.8)
        rows.append((rendered.ids, rendered.labels))
    return rows


def draw_chat(rng: random.Random, haystack, facts: int, filler_characters: int) -> list[dict[str, str]]:
    """Facts between sentences of a book, then up to four of them asked."""
    from longlora_cli.data.wordings import draw_keys, draw_value, templates

    pieces, characters = [], 0
    for sentence in haystack.sentences(rng):
        if characters >= filler_characters:
            break
        pieces.append(sentence.text)
        characters += len(sentence.text)
    turns, taken = [], " ".join(pieces)
    for key in draw_keys(rng, facts, "train"):
        template, value = draw_value(rng, rng.choice(templates("train")), "train", taken)
        taken += value
        turns.append((template.question.format(key=key), value))
        pieces.insert(rng.randint(0, len(pieces)), template.sentence.format(key=key, value=value))
    messages: list[dict[str, str]] = []
    for number, (question, value) in enumerate(rng.sample(turns, min(facts, 4))):
        content = question if number else " ".join(pieces) + "\n\n" + question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": value}]
    return messages


def make_data(books: Path, work: Path) -> None:
    """Write `data.npz`: uint16 ids of the books end to end, and chats padded to `LENGTH` with their label masks."""
    from longlora_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(work / "tokenizer")
    texts = [path.read_text(encoding="utf-8") for path in books_of(books)]
    backend = tokenizer.backend_tokenizer
    pieces = [part for text in texts for part in text.split("\n\n")]
    encoded = backend.encode_batch_fast([piece + "\n\n" for piece in pieces], add_special_tokens=False)
    book_ids = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded if e.ids])
    size = 500
    jobs = [(books, work, first, min(first + size, CHATS)) for first in range(0, CHATS, size)]
    chat_ids = np.zeros((CHATS, LENGTH), dtype=np.uint16)
    learnt = np.zeros((CHATS, LENGTH), dtype=bool)
    with Pool(2) as pool:
        row = 0
        for rows in pool.imap(make_chats, jobs):
            for ids, labels in rows:
                chat_ids[row, : len(ids)] = ids
                learnt[row, : len(ids)] = np.array(labels) != -100
                row += 1
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    np.savez_compressed(
        work / "data.npz",
        books=book_ids,
        chats=chat_ids,
        learnt=np.packbits(learnt, axis=1),
        digits=np.array(digits),
    )
    sys.stdout.write(f"{len(book_ids):,} book tokens, {CHATS:,} chats, {learnt.sum():,} answer tokens\n")


def make_model():
    """A fresh model: 4 layers of width 192, 6 heads over 2 key-value heads, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


def batches(data: dict, device, seed: int):
    """Endless batches of ids and labels `[BATCH, LENGTH]`: windows of books, and chats with permuted digits."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    books = torch.from_numpy(data["books"].astype(np.int32)).to(device)
    chats = torch.from_numpy(data["chats"].astype(np.int32)).to(device)
    learnt = torch.from_numpy(np.unpackbits(data["learnt"], axis=1).astype(bool)).to(device)
    digits = torch.from_numpy(data["digits"]).to(device)
    chat_rows = int(BATCH * CHAT_SHARE)
    span = torch.arange(LENGTH, device=device)
    while True:
        starts = torch.randint(
            0, len(books) - LENGTH, (BATCH - chat_rows,), generator=generator, device=device
        )
        windows = books[starts[:, None] + span].long()
        picked = torch.randint(0, len(chats), (chat_rows,), generator=generator, device=device)
        table = torch.arange(VOCABULARY, device=device).repeat(chat_rows, 1)
        shuffled = torch.rand(chat_rows, 10, generator=generator, device=device).argsort(1)
        table[:, digits] = digits[shuffled]
        ids = table.gather(1, chats[picked].long())
        # Text around the facts is learnt too, at no extra cost; padding is not.
        labels = torch.where(ids.ne(0), ids, -100)
        weights = torch.where(learnt[picked], 1.0, 0.1)
        yield (
            torch.cat([windows, ids]),
            torch.cat([windows, labels]),
            torch.cat([torch.full_like(windows, 1.0, dtype=torch.float32), weights]),
        )


def train(work: Path, out: Path) -> None:
    """Train, save bf16 weights and `record.json`."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = dict(np.load(work / "data.npz"))
    torch.manual_seed(0)
    model = make_model().to(device)
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=device.type == "cuda")

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / WARMUP)
        return warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * step / STEPS)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    compiled = torch.compile(model) if device.type == "cuda" else model
    begin, lines = time.time(), []
    for step, (ids, labels, weights) in zip(range(STEPS), batches(data, device, seed=0), strict=False):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = compiled(input_ids=ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1), reduction="none"
        )
        kept = weights[:, 1:].reshape(-1) * labels[:, 1:].reshape(-1).ne(-100)
        loss = (losses * kept).sum() / kept.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == STEPS - 1:
            chat_rows = int(BATCH * CHAT_SHARE)
            table = losses.view(BATCH, LENGTH - 1)
            answers = weights[-chat_rows:, 1:] == 1.0
            line = {
                "step": step,
                "books": round(float(table[:-chat_rows].mean()), 4),
                "answers": round(float(table[-chat_rows:][answers].mean()), 4),
                "seconds": round(time.time() - begin, 1),
            }
            lines.append(line)
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "record.json").write_text(
        json.dumps(
            {"steps": STEPS, "batch": BATCH, "length": LENGTH, "peak_rate": PEAK_RATE, "losses": lines},
            indent=1,
        )
    )


def main() -> None:
    """Run one step of the making."""
    verb, first, second = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    second.mkdir(parents=True, exist_ok=True)
    {"tokenizer": make_tokenizer, "data": make_data, "train": train}[verb](first, second)


if __name__ == "__main__":
    main()
