"""What atoms stand for: a page to browse, and a blind check.

    python -m beyond.atoms                     # the newest SAEs: half a minute for tiny
    python -m beyond.atoms --model yi-6b --layer 12 --text my.txt

1. Each atom's ten strongest tokens of a text, with how often it fires: results/<model>-atoms.html,
   one page without network, made from atoms.html. Where beyond/additive.py has learned codes of the
   model, also their first stage, whose 256 atoms stand for keys and values of all heads at once.
2. An atom is *describable* if at least 8 of its ten strongest share the token, the token before, or
   a shape of it (digits, punctuation, a capital, the last three letters). For 20 random live atoms,
   for all of them, and for random directions: results/<model>-atoms.json.
Non-goal: naming atoms by a language model.
"""
import argparse
import collections
import json
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta

N_RANDOM = 100  # directions to compare atoms with

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

class FirstStage:
    """The first stage of a layer's additive code (beyond/additive.py) as an SAE of 256 latents, of
    rows x (..., P), keys and values of all heads; z is the error that the atom removes."""
    def __init__(self, path, device):
        learned = safetensors.torch.load_file(path, device=str(device))
        self.n_latents, self.scale, self.b_dec = 256, 1, learned["mean"]
        self.atoms = learned["atoms.0"][0]  # (256, d)
        self.W = learned["W"][:, :self.atoms.shape[1]]

    def encode(self, x, k):
        y = (x - self.b_dec) @ self.W
        return (y @ self.atoms.T - self.atoms.square().sum(-1) / 2).topk(k)

@torch.no_grad()
def look_inside(model, tokenizer, saes, windows, ks, seed=0):
    """-> (page: what atoms.html shows, check: {layer.kind: shares of describable atoms}) of windows
    (n, T), at budgets ks {kind: k}."""
    n, length = windows.shape
    generator, found, page, check = torch.Generator().manual_seed(seed), {}, {}, {}
    lines = {n: F.normalize(torch.randn(N_RANDOM, n, generator=generator), dim=-1)
             for n in sorted({len(sae.b_dec) for sae in saes.values()})}
    for start in tqdm(range(0, n, 8), desc="atoms", disable=None):
        rows = sta.harvest(model, windows[start:start + 8], {layer for layer, _ in saes}, sink=0)
        for layer in [layer for layer, kind in saes if kind == "stage1"]:
            rows[layer, "stage1"] = torch.cat([rows[layer, kind].flatten(1) for kind in sta.KINDS],
                                              1)[:, None]  # (tokens, 1, P)
        for (layer, kind), x in rows.items():
            sae, x = saes[layer, kind], x.float()  # (tokens, H, D)
            z, idx = sae.encode(x, ks[kind])  # (tokens, H, k)
            sink = torch.arange(len(x), device=x.device) % length == 0
            z[sink] = 0  # a window's first token is kept exact
            dense = z.new_zeros(len(x), sae.n_latents).scatter_reduce_(
                1, idx.flatten(1), z.flatten(1), "amax")  # the strongest head's
            line = lines[x.shape[-1]].to(x.device)
            along = (x / sae.scale - sae.b_dec) @ line.T  # (tokens, H, N_RANDOM)
            along[sink] = 0
            atoms, random = found.setdefault((layer, kind), (Strongest(sae.n_latents),
                                                             Strongest(N_RANDOM)))
            atoms.update(dense.T, start * length)
            random.update(along.amax(1).T, start * length)
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
    return {"words": words, "sites": page}, check

# ------------------------------------------------------------------ the run
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
    out = evaluate.result_path(args.out, name, about, "-atoms")
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 2048, args.max_tokens)
    ks = {"key": args.k_key, "value": args.k_val, "stage1": 1}
    for layer in sorted({layer for layer, _ in saes}):
        if (path := folder / "additive" / f"layer{layer}.safetensors").exists():
            saes[layer, "stage1"] = FirstStage(path, model.device)
    page, check = look_inside(model, tokenizer, saes, windows, ks)
    for site, row in check.items():
        print(f"atoms {site}: describable {100 * row['atoms_20']:.0f} % of 20 live ones at random, "
              f"{100 * row['atoms_live']:.0f} % of all {row['live']}; "
              f"{100 * row['random']:.0f} % of random directions")
    about = {"model": pathlib.Path(name).name, "tokens": windows.numel(), "k_key": args.k_key,
             "k_val": args.k_val, **about}
    data = json.dumps({**about, **page}, ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # so that no tag of the page begins in it
    template = (sta.HERE / "beyond" / "atoms.html").read_text(encoding="utf-8")
    for path, content in ((out.with_suffix(".html"), template.replace("DATA", data)),
                          (out, json.dumps({**about, "check": check}) + "\n")):
        sta.write_atomic(path, content)
        print(f"wrote {path}")

if __name__ == "__main__":
    sta.run(main)
