"""A calibration text that is broader than yours: between its windows stands what the model writes.

    python -m beyond.samples --model DIR --text train.txt --out mixed.txt
    python -m beyond.calibrate --model DIR --text mixed.txt

Codes that are fitted on one kind of text do not carry over to another. A model's own samples are of
all the kinds that it was trained on, without that data [LLM-QAT, arXiv 2305.17888, which also draws
the first token at random]. A trial on 8,192 tokens a text (SmolLM2, a layer's transform at 6.25 %
of bf16): fitted on 20,480 tokens of train.txt, 1.158 of dense perplexity on text of that kind and
1.636 on a novel; on 61,440 tokens, half of them samples, 1.198 and 1.401. Sampled at temperature 1
from the whole distribution; no sample ends early. Non-goal: choosing among samples.
"""
import argparse
import itertools
import pathlib

import torch
from tqdm import tqdm

import sta

BATCH = 64  # samples at once

@torch.no_grad()
def sample(model, tokenizer, n, length):
    """n samples -> token ids (n, length), by torch's global generator: an optional BOS, a token
    drawn from the whole vocabulary, and what the model makes of that."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    found = []
    for first in tqdm(ordinary[torch.randint(len(ordinary), (n,))].split(BATCH), desc="samples",
                      disable=None):
        ids = torch.cat([torch.tensor(start, dtype=torch.long).expand(len(first), -1),
                         first[:, None]], 1).to(model.device)  # (B, 1 or 2)
        n_new = length - ids.shape[1]
        found.append(model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=n_new,
            min_new_tokens=n_new, pad_token_id=0).cpu())
    return torch.cat(found)

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, default=122_880, help="to write, in all (default 122,880)")
    add("--own", type=float, default=1 / 3, help="share of the model's own (default 1/3)")
    add("--seq-len", type=int, help="tokens a window (default 512, or the model's limit)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or auto (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("mixed.txt"), help="(default mixed.txt)")
    args = parser.parse_args(argv)
    if not 0 < args.own <= 1:
        raise sta.UsageError(f"--own {args.own}: want a share above 0, at most 1")
    sta.check_out(args.out.parent)
    model, tokenizer, _ = sta.load_model(args.model, *sta.pick_device(args.device, args.dtype))
    n_text = round(args.tokens * (1 - args.own))
    pieces = sta.read_text(args.text, "train", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 512, n_text)
    length = windows.shape[1]
    n_own = max(1, round(args.tokens * args.own / length))
    windows = windows[:n_text // length]
    torch.manual_seed(args.seed)
    parts = sorted(itertools.chain(  # each kind spread evenly over the whole
        (((i + 0.5) / len(windows), ids) for i, ids in enumerate(windows)),
        (((i + 0.5) / n_own, ids) for i, ids in enumerate(
            sample(model, tokenizer, n_own, length)))), key=lambda part: part[0])
    sta.write_atomic(args.out, "\n\n".join(
        tokenizer.decode(ids, skip_special_tokens=True) for _, ids in parts))
    print(f"wrote {args.out}: {len(windows)} windows of text and {n_own} of the model's own, "
          f"{length} tokens each")

if __name__ == "__main__":
    sta.run(main)
