"""P8, hierarchical addressing: shallow layers are lexical, deep layers tell senses apart.

    python -m beyond.hierarchy                 # the newest SAEs: half a minute for tiny
    python -m beyond.hierarchy --model yi-6b --text my.txt

From the share of atoms that two occurrences have in common: *lexical*, of the same token (after
different ones) above different tokens; *ngram*, what the same token before adds; *sense*, what is
lost if a word is a verb once and a noun once, told by the word before it. Claimed: lexical and
ngram fall from the shallow to the deep third of the layers, sense grows. Writes
results/<model>-hierarchy.json. Standard errors are over pairs that share words: too small.
Not tested: P8's middle layers ("syntactic backbone").
"""
import argparse
import collections
import json
import math
import pathlib

import torch
from tqdm import tqdm

import evaluate
import sta
from evaluate import mean_stderr

MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}

@torch.no_grad()
def find_codes(model, saes, windows, ks):
    """{(layer, kind): idx (tokens, H, k)} of windows (n, T), at budgets ks {kind: k}."""
    codes = {key: [] for key in saes}
    for some in tqdm(windows.split(8), desc="codes", disable=None):
        rows = sta.harvest(model, some, {layer for layer, _ in saes}, sink=0)
        for (layer, kind), x in rows.items():
            idx = saes[layer, kind].encode(x.float(), ks[kind])[1]
            codes[layer, kind].append(idx.to(torch.int32).cpu())
    return {key: torch.cat(parts) for key, parts in codes.items()}

def equal_pairs(labels, generator, n=20_000):
    """n pairs (i, j) of places with equal labels (int tensor), drawn at random; (2, n)."""
    ordered, order = labels.sort()
    i = torch.randint(len(labels), (n,), generator=generator)
    low = torch.searchsorted(ordered, ordered[i])
    high = torch.searchsorted(ordered, ordered[i], right=True)
    j = low + (torch.rand(n, generator=generator) * (high - low)).long()
    return torch.stack([order[i], order[j]])

def find_senses(words):
    """-> (words with two senses, [1 where a token is one of them as a verb, 2 as a noun, else 0]).
    A verb stands after will, to, ..., a noun after the, our, ...; a word counts if it is five of
    each or more, one after a modal verb, whole, and not one of the 50 most common."""
    bare = [word.strip().lower() for word in words]
    before = [""] + bare[:-1]
    role = [1 if a in MODALS or a == "to" else 2 if a in NOUNS_AFTER else 0 for a in before]
    whole = [w.isalpha() and len(w) > 2 and raw[:1].isspace() and not after[:1].isalpha()
             for w, raw, after in zip(bare, words, [*words[1:], ""])]  # no part of a longer word
    counts = collections.Counter((w, r) for w, r, ok in zip(bare, role, whole) if ok)
    common = {w for w, _ in collections.Counter(bare).most_common(50)}  # function words
    verbs = {w for a, w in zip(before, bare) if a in MODALS}
    senses = {w for w in verbs if min(counts[w, 1], counts[w, 2]) >= 5} - common
    return senses, torch.tensor([r if ok and w in senses else 0
                                 for w, r, ok in zip(bare, role, whole)])

def draw_pairs(windows, words, generator):
    """{name: (2, n) places} of pairs of occurrences, and the words with two senses. other:
    different tokens, the null; lexical: the same token after different ones; ngram: the same after
    the same; sense: a word in one sense; two: in both. Never of one window."""
    ids, window = windows.flatten(), torch.arange(windows.numel()) // windows.shape[1]
    before, bare = ids.roll(1), [word.strip().lower() for word in words]
    senses, role = find_senses(words)
    numbers = {w: i for i, w in enumerate(sorted(senses))}
    places = (role > 0).nonzero().squeeze(1)
    label = torch.tensor([numbers[bare[i]] for i in places.tolist()], dtype=torch.long)
    any_pair = torch.randint(len(ids), (2, 20_000), generator=generator)
    same = equal_pairs(ids, generator)
    both = equal_pairs(ids * (ids.max() + 1) + before, generator)
    word = places[equal_pairs(label, generator)] if len(places) else any_pair[:, :0]

    def apart(p):
        return (window[p[0]] != window[p[1]]) & (before[p[0]] != before[p[1]])

    one_sense = role[word[0]] == role[word[1]]
    pairs = {"other": any_pair[:, (ids[any_pair[0]] != ids[any_pair[1]]) & apart(any_pair)],
             "lexical": same[:, apart(same)], "ngram": both[:, window[both[0]] != window[both[1]]],
             "sense": word[:, apart(word) & one_sense], "two": word[:, apart(word) & ~one_sense]}
    return {name: p for name, p in pairs.items() if p.shape[1] > 1}, sorted(senses)

def hierarchy(codes, windows, words, seed=0):
    """P8 -> {layers, overlap: {kind: {name of pairs: [[mean, standard error] by layer]}}, words,
    pairs, verdicts: {kind: {gaps: {gap: [(shallow), (deep)]}, lexical, ngram, sense: bool}}}."""
    layers = sorted({layer for layer, _ in codes})
    pairs, senses = draw_pairs(windows, words, torch.Generator().manual_seed(seed))
    third, table, verdicts = max(1, len(layers) // 3), {}, {}
    for kind in sta.KINDS:
        table[kind], ends = {}, {}
        for name, (a, b) in pairs.items():
            shared = torch.stack([(codes[layer, kind][a][..., None] == codes[layer, kind][b][
                ..., None, :]).any(-1).double().mean((1, 2)) for layer in layers])  # (L, pairs)
            table[kind][name] = [mean_stderr(x) for x in shared]
            ends[name] = [mean_stderr(part.mean(0)) for part in (shared[:third], shared[-third:])]
        gaps = {gap: [(x[0] - y[0], math.hypot(x[1], y[1])) for x, y in zip(ends[a], ends[b])]
                for gap, a, b in (("lexical", "lexical", "other"), ("ngram", "ngram", "lexical"),
                                  ("sense", "sense", "two")) if a in ends and b in ends}
        verdicts[kind] = {"gaps": gaps}
        for gap, (shallow, deep) in gaps.items():
            fall = (deep[0] - shallow[0]) * (1 if gap == "sense" else -1)  # as claimed: positive
            verdicts[kind][gap] = fall > 2 * math.hypot(shallow[1], deep[1])
    return {"layers": layers, "overlap": table, "words": senses, "verdicts": verdicts,
            "pairs": {name: p.shape[1] for name, p in pairs.items()}}

# ------------------------------------------------------------------ the run
def tell(found):
    """Print what `hierarchy` found."""
    print(f"{len(found['words'])} words with two senses by rule: "
          f"{' '.join(found['words']) or 'none; a longer text may have some (--max-tokens)'}")
    for kind, verdict in found["verdicts"].items():
        said = [f"{name} {a[0]:+.3f} ±{a[1]:.3f} shallow, {b[0]:+.3f} ±{b[1]:.3f} deep: "
                f"{'as claimed' if verdict[name] else 'not as claimed'}"
                for name, (a, b) in verdict["gaps"].items()]
        held = sum(verdict[name] for name in verdict["gaps"])
        print("P8", "holds" if held == 3 else "holds in part" if held else "does not hold here",
              f"for {kind}s: " + "; ".join(said))

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="short name, hub id or folder (default: the newest SAEs' model)")
    add("--saes", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    add("--layer", help="12, 0-7 or 3,9 (default all trained)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-2 test)")
    add("--seq-len", type=int, help="tokens a window (default 2048, or the model's limit)")
    add("--max-tokens", type=int, default=131_072, help="(default 131,072)")
    add("--k-key", type=int, default=8, help="atoms a key (default 8)")
    add("--k-val", type=int, default=16, help="atoms a value (default 16)")
    add("--device", help="cpu, cuda or auto (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")
    args = parser.parse_args(argv)
    folder, has_saes, name = evaluate.find_fitted(args.saes, args.model)
    if not has_saes:
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    model, tokenizer, layers = sta.load_model(name, *sta.pick_device(args.device, args.dtype),
                                              args.layer or "all")
    saes, _ = sta.load_saes(folder, model, layers if args.layer else None)
    pieces, about = sta.read_text(args.text, "valid", name), evaluate.provenance(model)
    out = evaluate.result_path(args.out, name, about, "-hierarchy")
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 2048, args.max_tokens)
    ks = {"key": args.k_key, "value": args.k_val}
    if len({layer for layer, _ in saes}) < 3:
        raise sta.UsageError("P8 takes the SAEs of three layers or more")
    codes = find_codes(model, saes, windows, ks)
    words = [tokenizer.decode(i) for i in windows.flatten()]
    found = hierarchy(codes, windows, words)
    tell(found)
    sta.write_atomic(out, json.dumps({
        "model": pathlib.Path(name).name, "tokens": windows.numel(), "k_key": args.k_key,
        "k_val": args.k_val, **about, "hierarchy": found}) + "\n")
    print(f"wrote {out}")

if __name__ == "__main__":
    sta.run(main)
