"""Train the small model and tokenizer that are bundled with the quickstart.

The corpus is made fresh from the skills of `make_quickstart_data.py`, with other problems and other phrasings than
the bundled pool and validation tasks; seven tenths are chat, the rest is plain text. The last lines printed are the
held-out loss in nats per supervised token, and the unigram entropy of the same tokens.

Run `python scripts/train_quickstart_model.py` from the repository root; it takes a few minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from make_quickstart_data import SEED, SKILLS, generate, make_files

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "src" / "iprox" / "quickstart" / "model"
WARM_UP_STEPS = 100
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are supervised


def corpus(split: str, per_skill: int, seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """Return `per_skill` fresh examples of every skill, in random order."""
    rows = [row for name in SKILLS for row in itertools.islice(generate(name, split, seed=seed, seen=seen), per_skill)]
    random.Random(f"{seed} {split} order").shuffle(rows)
    return rows


def plain_text(row: dict[str, Any]) -> str:
    """Return an example as plain text, without roles."""
    return "\n".join(message["content"] for message in row["messages"])


def train_tokenizer(rows: list[dict[str, Any]], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that keeps digits apart, trained on the rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((plain_text(row) for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode_chat(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[Encoded]:
    """Return the rows as chat, supervised on the tokens that the chat template marks."""
    out = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    return [(ids, [bool(m) for m in mask]) for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)]


def encode_plain(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[Encoded]:
    """Return the rows as plain text, supervised on every token."""
    texts = tokenizer([plain_text(row) + END_OF_TEXT for row in rows])["input_ids"]
    return [(ids, [True] * len(ids)) for ids in texts]


def batches(encoded: list[Encoded], batch_tokens: int, seed: int) -> list[list[Encoded]]:
    """Return batches of similar length with at most `batch_tokens` tokens (padding included), in random order."""
    rng = random.Random(seed)
    order = sorted(encoded, key=lambda pair: (len(pair[0]), rng.random()))
    out: list[list[Encoded]] = [[]]
    for pair in order:
        if out[-1] and (len(out[-1]) + 1) * len(pair[0]) > batch_tokens:
            out.append([])
        out[-1].append(pair)
    rng.shuffle(out)
    return out


def summed_loss(model: Qwen3ForCausalLM, batch: list[Encoded]) -> tuple[torch.Tensor, int]:
    """Return the cross-entropy summed over the supervised tokens of a batch, and their number."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, (tokens, mask) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(tokens).masked_fill(~torch.tensor(mask), -100)
    # Padding is on the right and attention causal, so no attention mask is needed. Logits only where supervised.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[wanted])
    loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="sum")
    return loss, int(wanted.sum())


@torch.no_grad()
def mean_loss(model: Qwen3ForCausalLM, encoded: list[Encoded]) -> float:
    """Return the loss in nats per supervised token."""
    results = [summed_loss(model, batch) for batch in batches(encoded, 8192, 0)]
    return sum(float(loss) for loss, _ in results) / sum(count for _, count in results)


def unigram_entropy(encoded: list[Encoded]) -> float:
    """Return the entropy, in nats, of the distribution of the supervised tokens: the loss of the best unigram model."""
    tokens = Counter(t for ids, mask in encoded for t, m in zip(ids[1:], mask[1:], strict=True) if m)
    total = sum(tokens.values())
    return -sum(n / total * math.log(n / total) for n in tokens.values())


def train(model: Qwen3ForCausalLM, encoded: list[Encoded], args: argparse.Namespace) -> None:
    """Train in place: AdamW, linear warm-up, cosine decay to a twentieth."""
    todo = batches(encoded, args.batch_tokens, args.seed)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    started, recent = time.monotonic(), []
    for step, batch in enumerate(todo):
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / len(todo))) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * cosine
        loss, count = summed_loss(model, batch)
        mean = loss / count
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(mean.item())
        if (step + 1) % 200 == 0 or step + 1 == len(todo):
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{len(todo)}  loss {np.mean(recent):.3f}  {seconds:.0f} s", flush=True)
            recent.clear()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model (bfloat16 safetensors) and tokenizer (compact JSON) beside `folder`, then put them in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    path = temporary / "tokenizer.json"
    compact = json.dumps(json.loads(path.read_text("utf-8")), ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact + "\n", encoding="utf-8")
    temporary.chmod(0o755)  # mkdtemp and save_pretrained make them private
    for file in temporary.iterdir():
        file.chmod(0o644)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def main() -> None:
    """Make the corpus, train the tokenizer and the model, save both, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--per-skill", type=int, default=4000, help="corpus examples of each skill")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=1536)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    _, seen = make_files(args.seed)  # the corpus shares no problem with the bundled files
    held_out_rows = corpus("held_out", 40, args.seed, seen)
    rows = corpus("corpus", args.per_skill, args.seed, seen)
    tokenizer = train_tokenizer(rows, args.vocabulary)
    cut = len(rows) * 7 // 10
    encoded = encode_chat(tokenizer, rows[:cut]) + encode_plain(tokenizer, rows[cut:])
    held_out = encode_chat(tokenizer, held_out_rows)

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(rows)} examples, {sum(len(i) for i, _ in encoded):,} tokens")
    started = time.monotonic()
    train(model, encoded, args)
    seconds = time.monotonic() - started
    save(model, tokenizer, args.output)
    model.float()
    print(f"training took {seconds:.0f} s")
    print(f"held-out loss {mean_loss(model, held_out):.3f} nats per supervised token (bfloat16 weights)")
    print(f"unigram entropy of the same tokens {unigram_entropy(held_out):.3f} nats")


if __name__ == "__main__":
    main()
