"""What atoms stand for, and the paper's claim P8: a page to browse, and two measurements.

    python -m beyond.atoms                     # the newest SAEs: half a minute for tiny
    python -m beyond.atoms --model yi-6b --layer 12 --text my.txt

1. Each atom's ten strongest tokens of a text, with how often it fires: results/<model>-atoms.html,
   one page without network, made from atoms.html.
2. A blind check: an atom is *describable* if at least 8 of its ten strongest share the token, the
   token before, or a shape of it (digits, punctuation, a capital, the last three letters). For 20
   random live atoms, for all of them, and for random directions.
3. P8, hierarchical addressing (shallow layers lexical, deep layers tell senses apart), from the
   share of atoms that two occurrences have in common: *lexical*, of the same token (after
   different ones) above different tokens; *ngram*, what the same token before adds; *sense*, what
   is lost if a word is a verb once and a noun once, told by the word before it. Claimed: lexical
   and ngram fall from the shallow to the deep third of the layers, sense grows.
Writes results/<model>-hierarchy.json. Standard errors are over pairs that share words: too small.
Not tested: P8's middle layers ("syntactic backbone"). Non-goal: naming atoms by a language model.
"""
import argparse
import collections
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta
from evaluate import mean_stderr

MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}
N_RANDOM = 100  # directions to compare atoms with

# ------------------------------------------------------------------ 1, 2: contexts, and the check
class Strongest:
    """For each of M latents the ten tokens of a stream where it is strongest, and how often it
    fires."""

    def __init__(self, n_latents):
        self.z, self.token = torch.zeros(n_latents, 10), torch.zeros(n_latents, 10).long()
        self.fired = torch.zeros(n_latents).long()

    def update(self, z, first):
        """z (M, T): each latent at each of T tokens, of which the first has the number `first`."""
        self.fired += (z > 0).sum(1).cpu()
        top = z.topk(min(10, z.shape[1]))
        self.z, kept = torch.cat([self.z, top.values.cpu()], 1).topk(10)
        self.token = torch.cat([self.token, first + top.indices.cpu()], 1).gather(1, kept)

def describable(tokens):
    """Whether an atom's ten strongest [(previous token, token)] meet the rule above."""
    bare = [(a.strip().lower(), b.strip()) for a, b in tokens]
    shared = [[b.lower() for _, b in bare], [a for a, _ in bare], [b[-3:] for _, b in bare]]
    most = [collections.Counter(shape).most_common(1)[0][1] for shape in shared]
    most.append(sum(b.isdigit() for _, b in bare))
    most.append(sum(bool(b) and not any(map(str.isalnum, b)) for _, b in bare))  # punctuation
    most.append(sum(b[:1].isupper() for _, b in bare))
    return max(most) >= 8

@torch.no_grad()
def look_inside(model, tokenizer, saes, windows, ks, seed=0):
    """-> (page: what atoms.html shows, check: {layer.kind: shares of describable atoms}, codes
    {(layer, kind): idx (tokens, H, k)}) of windows (n, T), at budgets ks {kind: k}."""
    n, length = windows.shape
    generator, found, codes, page, check = torch.Generator().manual_seed(seed), {}, {}, {}, {}
    lines = F.normalize(torch.randn(N_RANDOM, len(next(iter(saes.values())).b_dec),
                                    generator=generator), dim=-1)
    for start in tqdm(range(0, n, 8), desc="atoms", disable=None):
        rows = sta.harvest(model, windows[start:start + 8], {layer for layer, _ in saes}, sink=0)
        for (layer, kind), x in rows.items():
            sae, x = saes[layer, kind], x.float()  # (tokens, H, D)
            z, idx = sae.encode(x, ks[kind])  # (tokens, H, k)
            sink = torch.arange(len(x), device=x.device) % length == 0
            z[sink] = 0  # a window's first token is kept exact
            dense = z.new_zeros(len(x), sae.n_latents).scatter_reduce_(
                1, idx.flatten(1), z.flatten(1), "amax")  # the strongest head's
            along = (x / sae.scale - sae.b_dec) @ lines.T.to(x.device)  # (tokens, H, N_RANDOM)
            along[sink] = 0
            atoms, random = found.setdefault((layer, kind), (Strongest(sae.n_latents),
                                                             Strongest(N_RANDOM)))
            atoms.update(dense.T, start * length)
            random.update(along.amax(1).T, start * length)
            codes.setdefault((layer, kind), []).append(idx.to(torch.int32).cpu())
            if start == 0:  # a sentence: [[(atom, z) of a head] of a token]
                page[f"{layer}.{kind}"] = {"sentence": [
                    [[[m, round(v, 3)] for m, v in zip(*head)] for head in zip(*token)]
                    for token in zip(idx[1:49].tolist(), z[1:49].tolist())]}
    words = [tokenizer.decode(i) for i in windows.flatten()]

    def share(strongest, some):
        told = [describable([(words[i - 1], words[i]) for i in strongest.token[m].tolist()])
                for m in some]
        return sum(told) / max(1, len(told))

    for (layer, kind), (atoms, random) in found.items():
        live = (atoms.z[:, -1] > 0).nonzero().squeeze(1)  # at least ten tokens
        some = live[torch.randperm(len(live), generator=generator)[:20]]
        name = f"{layer}.{kind}"
        check[name] = {"atoms_20": share(atoms, some.tolist()), "atoms_live": share(
            atoms, live.tolist()), "random": share(random, range(N_RANDOM)), "live": len(live)}
        page[name] |= {"fired": (atoms.fired / len(words)).tolist(), "contexts": [
            [[i, round(v, 3)] for i, v in zip(*pair) if v > 0]
            for pair in zip(atoms.token.tolist(), atoms.z.tolist())]}
    codes = {key: torch.cat(parts) for key, parts in codes.items()}
    return {"words": words, "sites": page}, check, codes

# ------------------------------------------------------------------ 3: P8
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

    By rule: a word is a verb after will, to, ..., and a noun after the, our, ...; it counts if it
    is five of each or more, one after a modal verb ("to" goes before nouns, too), whole, and not
    one of the 50 most common."""
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
    pairs, senses = draw_pairs(windows, words, torch.Generator().manual_seed(seed))
    layers = sorted({layer for layer, _ in codes})
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
def tell(check, deep):
    """Print what `look_inside` and `hierarchy` found."""
    for name, row in check.items():
        print(f"atoms {name}: describable {100 * row['atoms_20']:.0f} % of 20 live ones at random, "
              f"{100 * row['atoms_live']:.0f} % of all {row['live']}; "
              f"{100 * row['random']:.0f} % of random directions")
    if deep is None:
        return print("P8 is not tested: that takes three layers or more")
    print(f"{len(deep['words'])} words with two senses by rule: "
          f"{' '.join(deep['words']) or 'none; a longer text may have some (--max-tokens)'}")
    for kind, verdict in deep["verdicts"].items():
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
    folder, name = evaluate.find_saes(args.saes, args.model)
    if folder is None:
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    text = sta.read_text(args.text, "valid", name)
    model, tokenizer, layers = sta.load_model(name, *sta.pick_device(args.device, args.dtype),
                                              args.layer or "all")
    saes, _ = sta.load_saes(folder, model, layers if args.layer else None)
    windows = sta.token_windows(text, tokenizer, model, args.seq_len, 2048, args.max_tokens)
    ks = dict(zip(sta.KINDS, (args.k_key, args.k_val)))
    page, check, codes = look_inside(model, tokenizer, saes, windows, ks)
    enough = len({layer for layer, _ in saes}) > 2
    deep = hierarchy(codes, windows, page["words"]) if enough else None
    tell(check, deep)
    about = {"model": pathlib.Path(name).name, "tokens": windows.numel(), "k_key": args.k_key,
             "k_val": args.k_val, **evaluate.provenance(model)}
    data = json.dumps({**about, **page}, ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # so that no tag of the page begins in it
    template = (sta.HERE / "beyond" / "atoms.html").read_text(encoding="utf-8")
    for end, content in (("atoms.html", template.replace("DATA", data)), (
            "hierarchy.json", json.dumps({**about, "check": check, "hierarchy": deep}) + "\n")):
        path = args.out / f"{sta.slug(name)}-{end}"
        sta.write_atomic(path, content)
        print(f"wrote {path}")

if __name__ == "__main__":
    sta.run(main)
