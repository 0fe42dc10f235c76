"""What atoms stand for: a page to browse, and a blind check by rule.

    python -m beyond.atoms                     # the newest SAEs: two minutes for tiny
    python -m beyond.atoms --model FOLDER --layer 14 --sentence "The capital of France is Paris"

The page, results/<model>-atoms.html, is one file without network, made from atoms.html. Of each
atom it shows the strongest tokens of a text, each a different word; tokens drawn at random from all
for which the atom fires; and how its coefficients are distributed. Of a value atom, the tokens that
it makes likelier and less likely, through W_O, the last norm's weights and the unembedding; of a
key atom, the words whose queries have the largest product with it, before RoPE. These two are those
of the kv head in which the atom fires most. A sentence stands above; a click shows a token's code.

The check: ten tokens are *describable* if eight of them share the token, the token before, or a
shape of it (digits, punctuation, a capital, the last three letters). It is made of each live atom's
ten strongest tokens, and of ten drawn at random from all for which it fires. Two rivals fire for as
many tokens as an average atom: random directions, and directions through the mean of one frequent
token's vectors, which find that token and need no SAE.
Writes the check, and the code of the sentence's last token, to results/<model>-atoms.json.
Non-goal: naming atoms by a language model.
"""
import collections
import functools
import json
import pathlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta
from beyond import LOOK, begin_look, capture_queries, parse_args
from support.files import ROOT, run_main, write_atomic
from support.text import encode_text

N_RIVALS = 200  # directions of each kind to compare atoms with
N_KEPT, N_SHOWN = 200, 6  # tokens per atom: kept of each kind, shown on the page

def words_of(tokenizer, windows):
    """The text of each token, with the space before it, which some tokenizers drop when the token
    stands first."""
    first = encode_text(tokenizer, ":", special=False)[-1:]
    n = len(tokenizer.decode(first))
    text = {i: tokenizer.decode([*first, i])[n:] for i in windows.unique().tolist()}
    return [text[i] for i in windows.flatten().tolist()]

# ------------------------------------------------------------------ what is seen of a latent
class Kept:
    """For each of M latents, the tokens of a stream that come first in some order, strongest or
    random, and their z; where z = 0 there is none."""

    def __init__(self, n_latents):
        self.order, self.z = torch.zeros(2, n_latents, N_KEPT)
        self.token = torch.zeros(n_latents, N_KEPT).long()

    def update(self, order, z, first):
        """order (M, T), above 0 where a latent fires; z (M, T). The stream's tokens are numbered,
        and `first` is the number of the first of these."""
        order, places = order.topk(min(N_KEPT, order.shape[1]))
        joined = torch.cat([self.order, order], 1)
        z = torch.cat([self.z, z.gather(1, places)], 1)
        token = torch.cat([self.token, first + places], 1)
        self.order, places = joined.topk(N_KEPT)
        self.z, self.token = z.gather(1, places), token.gather(1, places)

class Seen:
    """What is kept of M latents: the strongest tokens, some at random, and how many there were."""

    def __init__(self, n_latents, generator):
        self.strongest, self.sample = Kept(n_latents), Kept(n_latents)
        self.n_fired, self.generator = torch.zeros(n_latents).long(), generator

    def update(self, z, first):
        """z (T, M) of T tokens."""
        z = z.T.cpu()  # (M, T)
        at_random = 1 - torch.rand(z.shape, generator=self.generator)  # in (0, 1]
        self.n_fired += (z > 0).sum(1)
        self.strongest.update(z, z, first)
        self.sample.update(at_random * (z > 0), z, first)

class Directions:
    """A rival of atoms: R unit directions (R, D), each of which fires for a given share of
    tokens, those with the largest products."""

    def __init__(self, directions, generator):
        self.directions, self.threshold = directions, None
        self.seen = Seen(len(directions), generator)

    def update(self, x, live, share, first):
        """x (T, H, D), centred, of which `live` (T,) may fire. The first call finds the thresholds
        at which a share of them does."""
        products = (x @ self.directions.to(x.device).T).amax(1)  # (T, R): the strongest head's
        if self.threshold is None:
            self.threshold = products[live].quantile(1 - share, dim=0)  # (R,)
        self.seen.update(F.relu(products - self.threshold) * live[:, None], first)

def token_means(x, ids, generator):
    """Directions (R, D) through the mean of one token's vectors in one head, less the head's mean:
    R of the tokens that occur ten times or more, at random. x (T, H, D), centred; ids (T,)."""
    frequent, counts = ids.unique(return_counts=True)
    frequent = frequent[counts >= 10]
    chosen = frequent[torch.randperm(len(frequent), generator=generator)[:N_RIVALS]].tolist()
    means = [x[ids == token, i % x.shape[1]].mean(0) for i, token in enumerate(chosen)]
    return F.normalize(torch.stack(means), dim=-1) if means else x.new_zeros(0, x.shape[2])

def find_rivals(x, ids, generator):
    """{name: Directions} for x (T, H, D), centred vectors of tokens ids (T,)."""
    random = F.normalize(torch.randn(N_RIVALS, x.shape[2], generator=generator), dim=-1)
    return {"random": Directions(random, generator),
            "token means": Directions(token_means(x, ids, generator), generator)}

@torch.no_grad()
def read_atoms(model, saes, windows, ks, seed=0):
    """Windows (n, T), budgets {kind: k} -> {(layer, kind): {name: Seen}} of atoms, random and token
    means; {(layer, kind): (H, M), for how many tokens an atom fires in a head}."""
    length, generator, seen, n_fired = windows.shape[1], torch.Generator().manual_seed(seed), {}, {}
    layers, rivals = sorted({layer for layer, _ in saes}), {}
    per_batch = max(1, 16_384 // length)
    for n, ids in enumerate(tqdm(windows.split(per_batch), desc="atoms", disable=None)):
        for (layer, kind), x in sta.harvest(model, ids, layers, sink=0).items():
            sae, first = saes[layer, kind], n * per_batch * length
            z, idx = sae.encode(x.float(), ks[kind])  # (tokens, H, k)
            inside = (x.float() - sae.b_dec) / sae.scale
            live = torch.arange(len(x), device=x.device) % length > 0  # first tokens are kept exact
            z = z * live[:, None, None]
            by_head = z.new_zeros(*x.shape[:2], sae.n_latents).scatter_(2, idx, z)
            fired = (by_head > 0).sum(0)  # (H, M)
            if n == 0:
                seen[layer, kind] = Seen(sae.n_latents, generator)
                n_fired[layer, kind] = torch.zeros_like(fired)
                rivals[layer, kind] = find_rivals(inside, ids.flatten(), generator)
            n_fired[layer, kind] += fired
            dense = by_head.amax(1)  # (tokens, M)
            seen[layer, kind].update(dense, first)
            ever = (dense > 0).any(0)
            share = (dense[:, ever] > 0).float().mean().item()  # of tokens, for the average atom
            for rival in rivals[layer, kind].values():
                rival.update(inside, live, share, first)
    return {site: {"atoms": seen[site], **{name: rival.seen for name, rival in some.items()}}
            for site, some in rivals.items()}, n_fired

# ------------------------------------------------------------------ the check
def describable(tokens):
    """Whether ten [(previous token, token)] meet the rule above."""
    bare = [(a.strip().lower(), b.strip()) for a, b in tokens]
    shared = [[b.lower() for _, b in bare], [a for a, _ in bare], [b[-3:] for _, b in bare]]
    most = [collections.Counter(shape).most_common(1)[0][1] for shape in shared]
    most.append(sum(b.isdigit() for _, b in bare))
    most.append(sum(bool(b) and not any(map(str.isalnum, b)) for _, b in bare))  # punctuation
    most.append(sum(b[:1].isupper() for _, b in bare))
    return max(most) >= 8

def check_site(seen, words):
    """{name: Seen} of a site -> {name: {n, strongest, range}}: of how many latents that fire for
    ten tokens or more, and which shares of them are describable."""
    rows = {}
    for name, latents in seen.items():
        live = (latents.n_fired >= 10).nonzero().squeeze(1).tolist()
        rows[name] = {"n": len(live)}
        for column, kept in (("strongest", latents.strongest), ("range", latents.sample)):
            verdicts = [describable([(words[i - 1], words[i]) for i in kept.token[m, :10].tolist()])
                        for m in live]
            rows[name][column] = sum(verdicts) / max(1, len(live))
    return rows

# ------------------------------------------------------------------ what writes, and what reads
@torch.no_grad()
def promoted(model, layer, atoms, heads):
    """What value atoms (M, D) of kv heads (M,) add to the logits, up to a factor, if all queries of
    the head read alike -> (ids (M, n) of the tokens that gain most, of those that lose most); None
    for a model without o_proj and a final norm of that name."""
    decoder = model.get_decoder()
    H, D = sta.kv_shape(decoder.config)
    try:
        W_O = decoder.layers[layer].self_attn.o_proj.weight.float()
        gain = decoder.norm.weight.float()
    except AttributeError:
        return None
    W_O = W_O.unflatten(1, (H, -1, D)).mean(2)  # (width, H, D)
    every = torch.arange(len(atoms), device=atoms.device)
    written = gain * torch.einsum("whd,md->hmw", W_O, atoms)[heads, every]  # (M, width)
    most, least = [], []
    for part in written.split(128):  # (128, width)
        logits = model.get_output_embeddings()(part.to(model.dtype)).float()  # (128, V)
        most.append(logits.topk(N_SHOWN).indices)
        least.append((-logits).topk(N_SHOWN).indices)
    return torch.cat(most), torch.cat(least)

@torch.no_grad()
def readers(queries, ids, atoms, heads):
    """Queries (tokens, H, D), the mean over each kv head's queries; ids (tokens,); key atoms (M, D)
    of kv heads (M,) -> token ids (M, n) whose mean query has the largest product with the atom, of
    those that occur three times or more."""
    known, label, counts = ids.unique(return_inverse=True, return_counts=True)
    sums = queries.new_zeros(len(known), *queries.shape[1:]).index_add_(0, label, queries)
    means = (sums / counts[:, None, None])[counts >= 3]  # (words, H, D)
    every = torch.arange(len(atoms), device=atoms.device)
    products = torch.einsum("whd,md->hmw", means, atoms)[heads, every]  # (M, words)
    return known[counts >= 3][products.topk(min(2 * N_SHOWN, len(means))).indices]

def different(items, text):
    """The first N_SHOWN items whose texts are different words."""
    chosen = {}
    for item in items:
        chosen.setdefault(text(item).strip().lower(), item)
    return list(chosen.values())[:N_SHOWN]

def find_readers(run, windows, n_fired):
    """{site: [[word]]}: what tokens key atoms are read by, and value atoms promote and suppress."""
    windows = windows.to(run.model.device)
    with capture_queries(run.model, run.layers) as queries:
        run.model.get_decoder()(input_ids=windows, use_cache=False)
    found = {}
    for (layer, kind), sae in run.saes.items():
        heads = n_fired[layer, kind].argmax(0)  # (M,): in which an atom fires most
        if kind == "key":
            H = len(sae.b_dec)
            mean = queries[layer].unflatten(2, (H, -1)).mean(3).flatten(0, 1).float()
            found[layer, kind] = {"queries": readers(mean, windows.flatten(), sae.W_dec, heads)}
        else:
            both = promoted(run.model, layer, sae.W_dec, heads)
            found[layer, kind] = dict(zip(("promoted", "suppressed"), both)) if both else {}
    decode = functools.lru_cache(None)(lambda i: run.tokenizer.decode([i]))

    def words(ids):
        return [decode(i) for i in different(ids, decode)]

    return {site: {name: [words(row) for row in ids.tolist()] for name, ids in lists.items()}
            for site, lists in found.items()}

# ------------------------------------------------------------------ the page
def pairs_of(kept, m):
    """[[token number, z]] of latent m's kept tokens, in their order."""
    pairs = zip(kept.token[m].tolist(), kept.z[m].tolist())
    return [[i, round(z, 2)] for i, z in pairs if z > 0]

def page_of_site(atoms, words):
    """What atoms.html shows of a site's atoms, a Seen."""
    page = {"fired": [round(n / len(words), 5) for n in atoms.n_fired.tolist()],
            "strongest": [], "sample": [], "bars": []}
    for m in range(len(atoms.n_fired)):
        strongest, sample = (pairs_of(kept, m) for kept in (atoms.strongest, atoms.sample))
        page["strongest"].append(different(strongest, lambda pair: words[pair[0]]))
        page["sample"].append(sorted(sample[:N_SHOWN], key=lambda pair: -pair[1]))
    for z in atoms.sample.z:  # up to N_KEPT at random of all: ten bars from 0 to the largest
        page["bars"].append(torch.histc(z[z > 0], 10, 0, z.max().item()).int().tolist())
    return page

@torch.no_grad()
def code_of(run, ids, ks):
    """{site: [[[atom, z] of a head] of a token]} of token ids (T,)."""
    codes = {}
    for (layer, kind), x in sta.harvest(run.model, ids[None], run.layers, sink=0).items():
        z, idx = run.saes[layer, kind].encode(x.float(), ks[kind])  # (T, H, k)
        codes[f"{layer}.{kind}"] = []
        for token in zip(idx.tolist(), z.tolist()):
            heads = [[[m, round(v, 2)] for m, v in zip(*head)] for head in zip(*token)]
            codes[f"{layer}.{kind}"].append(heads)
    return codes

def example(page, words, codes):
    """The key of the sentence's last token in each layer's first head: its atoms with their
    coefficients, and what the page shows of them."""
    rows = {}
    for site, shown in page.items():
        if site.endswith("key"):
            rows[site] = [{"atom": m, "z": z, "fired": shown["fired"][m],
                           "strongest": [words[i] for i, _ in shown["strongest"][m]],
                           "sample": [words[i] for i, _ in shown["sample"][m]],
                           "queries": shown["queries"][m]}
                          for m, z in codes[site][-1][0] if z > 0]
    return rows

def main(argv=None):
    args = parse_args(__doc__, argv, LOOK, sentence=dict(
        help="whose codes the page shows (default: the text's first 48 tokens)"))
    run = begin_look(args, "-atoms")
    ks = {"key": args.k_key, "value": args.k_val}
    seen, n_fired = read_atoms(run.model, run.saes, run.windows, ks)
    words = words_of(run.tokenizer, run.windows)
    readers_of = find_readers(run, run.windows[:max(1, 16_384 // run.windows.shape[1])], n_fired)
    sentence = run.windows[0, 1:49]
    if args.sentence:
        sentence = torch.tensor(encode_text(run.tokenizer, args.sentence))
    codes, page, check = code_of(run, sentence, ks), {}, {}
    print("share that the rule describes, by the ten strongest tokens / by ten at random:")
    for (layer, kind), latents in seen.items():
        site = f"{layer}.{kind}"
        check[site] = check_site(latents, words)
        page[site] = {**page_of_site(latents["atoms"], words), **readers_of.get((layer, kind), {}),
                      "sentence": codes[site]}
        print(f"{site:9}" + "".join(f"  {row['n']:5} {name} {row['strongest']:.2f} / "
                                    f"{row['range']:.2f}" for name, row in check[site].items()))
    about = {**run.about, "k_key": args.k_key, "k_val": args.k_val}
    said = words_of(run.tokenizer, sentence[None])
    data = {"model": pathlib.Path(run.name).name, "words": words, "sentence": said, "sites": page,
            **{name: about[name] for name in ("tokens", "k_key", "k_val")}}
    data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so that no tag of the page begins in it
    template = (ROOT / "beyond" / "atoms.html").read_text(encoding="utf-8")
    result = {**about, "check": check, "sentence": said, "example": example(page, words, codes)}
    for path, content in ((run.path.with_suffix(".html"), template.replace("DATA", data)),
                          (run.path, json.dumps(result) + "\n")):
        write_atomic(path, content)
        print(f"wrote {path}")

if __name__ == "__main__":
    run_main(main)
