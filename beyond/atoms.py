"""What atoms stand for, and how that changes with depth: a page to browse, a check by rule, P8.

    python -m beyond.atoms                     # the newest SAEs: a minute for tiny
    python -m beyond.atoms --model yi-6b --layer 12 --text my.txt

1. Each atom's ten strongest tokens of a text, with how often it fires: results/<model>-atoms.html,
   one page without network, made from atoms.html. Where beyond/additive.py has learned codes of the
   model, also their first stage, whose 256 atoms stand for keys and values of all heads at once.
2. An atom is *describable* if at least 8 of its ten strongest tokens share the token, the token
   before, or a shape of it (digits, punctuation, a capital, the last three letters). That is
   counted for 20 random live atoms, for all of them, and for random directions.
3. The paper's P8, hierarchical addressing: shallow layers are lexical, deep layers tell senses
   apart. From the share of atoms that two occurrences have in common: *lexical* is that of the same
   token (after different ones) minus that of different tokens; *ngram* is how much the same token
   before adds to it; *sense* is how much less two occurrences of a word have in common if it is a
   verb once and a noun once, by the word before it. Claimed: from the shallow to the deep third
   of the layers, lexical and ngram fall, and sense grows. Both thirds are measured on the same
   pairs; errors are those of a bootstrap over words.
Writes 2 and 3 to results/<model>-atoms.json. Non-goal: naming atoms by a language model.
"""
import collections
import json
import pathlib

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta
from beyond import LOOK, begin_look, parse_args
from beyond.calibrate import read_fitted, side_by_side

N_RANDOM = 100  # directions to compare atoms with
N_PAIRS, N_BOOTSTRAP = 20_000, 200
MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}

# ------------------------------------------------------------------ the page, and the check
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
        self.z, places = torch.cat([self.z, top.values.cpu()], 1).topk(10)
        self.token = torch.cat([self.token, first + top.indices.cpu()], 1).gather(1, places)

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
    vectors x (..., P), keys and values of all heads; z: half the error that an atom removes."""
    def __init__(self, learned):
        self.n_latents, self.scale, self.b_dec = 256, 1, learned["mean"][None]  # (1, P)
        self.atoms = learned["atoms.0"][0]  # (256, d)
        self.W = learned["W"][:, :self.atoms.shape[1]]

    def encode(self, x, k):
        y = (x - self.b_dec) @ self.W
        return (y @ self.atoms.T - self.atoms.square().sum(-1) / 2).topk(k)

@torch.no_grad()
def read_codes(model, saes, windows, ks, seed=0):
    """Windows (n, T), budgets ks {kind: k} -> for each (layer, kind): idx (tokens, H, k), with -1
    where z = 0; the Strongest of atoms and of random directions; the first tokens' codes."""
    length, generator = windows.shape[1], torch.Generator().manual_seed(seed)
    codes, strongest, sentences = {site: [] for site in saes}, {}, {}
    directions = {dim: F.normalize(torch.randn(N_RANDOM, dim, generator=generator), dim=-1)
             for dim in sorted({sae.b_dec.shape[1] for sae in saes.values()})}
    for start in tqdm(range(0, len(windows), 8), desc="codes", disable=None):
        batch = windows[start:start + 8]
        vectors = sta.harvest(model, batch, {layer for layer, _ in saes}, sink=0)
        for layer, kind in saes:
            if kind == "stage1":
                both = side_by_side(vectors[layer, "key"], vectors[layer, "value"])
                vectors[layer, kind] = both[:, None]  # (tokens, 1, P)
        for (layer, kind), x in vectors.items():
            sae, x = saes[layer, kind], x.float()  # (tokens, H, D)
            z, idx = sae.encode(x, ks[kind])  # (tokens, H, k)
            codes[layer, kind].append(idx.masked_fill(z <= 0, -1).to(torch.int16).cpu())
            sink = torch.arange(len(x), device=x.device) % length == 0
            z[sink] = 0  # a window's first token is kept exact
            dense = z.new_zeros(len(x), sae.n_latents).scatter_reduce_(
                1, idx.flatten(1), z.flatten(1), "amax")  # the strongest head's
            projections = (x - sae.b_dec) / sae.scale @ directions[x.shape[-1]].to(x.device).T
            projections[sink] = 0  # (tokens, H, N_RANDOM)
            atoms, random = strongest.setdefault((layer, kind), (Strongest(sae.n_latents),
                                                                 Strongest(N_RANDOM)))
            atoms.update(dense.T, start * length)
            random.update(projections.amax(1).T, start * length)
            if start == 0:  # [[(atom, z) of a head] of a token]
                sentences[layer, kind] = [
                    [[[m, round(v, 3)] for m, v in zip(*head)] for head in zip(*token)]
                    for token in zip(idx[1:49].tolist(), z[1:49].tolist())]
    return {site: torch.cat(parts) for site, parts in codes.items()}, strongest, sentences

def describe(strongest, sentences, words, seed=0):
    """-> (page: what atoms.html shows, check: {layer.kind: shares of describable atoms})."""
    generator, page, check = torch.Generator().manual_seed(seed), {}, {}

    def share(best, atoms):
        verdicts = [describable([(words[i - 1], words[i]) for i in best.token[m].tolist()])
                    for m in atoms]
        return sum(verdicts) / max(1, len(verdicts))

    for (layer, kind), (atoms, random) in strongest.items():
        live = (atoms.z[:, -1] > 0).nonzero().squeeze(1)  # at least ten tokens
        sample, site = live[torch.randperm(len(live), generator=generator)[:20]], f"{layer}.{kind}"
        check[site] = {"atoms_20": share(atoms, sample.tolist()), "atoms_live": share(
            atoms, live.tolist()), "random": share(random, range(N_RANDOM)), "live": len(live)}
        page[site] = {
            "sentence": sentences[layer, kind], "fired": (atoms.fired / len(words)).tolist(),
            "contexts": [[[i, round(v, 3)] for i, v in zip(*pair) if v > 0]
                         for pair in zip(atoms.token.tolist(), atoms.z.tolist())]}
    return {"words": words, "sites": page}, check

# ------------------------------------------------------------------ P8
def words_of(tokenizer, windows):
    """The text of each token, with a space before it, which some tokenizers drop at a beginning."""
    first = sta.encode(tokenizer, ":", special=False)[-1:]
    n = len(tokenizer.decode(first))
    text = {i: tokenizer.decode([*first, i])[n:] for i in windows.unique().tolist()}
    return [text[i] for i in windows.flatten().tolist()]

def equal_pairs(labels, generator, n=N_PAIRS):
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
    the same; sense: the same word in one sense; two: once as a verb and once as a noun. Never of
    one window, nor of a window's first token, before which the model sees none."""
    ids, window = windows.flatten(), torch.arange(windows.numel()) // windows.shape[1]
    inside = torch.arange(windows.numel()) % windows.shape[1] > 0
    before, bare = ids.roll(1), [word.strip().lower() for word in words]
    senses, role = find_senses(words)
    role = role * inside
    numbers = {w: i for i, w in enumerate(sorted(senses))}
    places = (role > 0).nonzero().squeeze(1)
    label = torch.tensor([numbers[bare[i]] for i in places.tolist()], dtype=torch.long)
    any_pair = torch.randint(len(ids), (2, N_PAIRS), generator=generator)
    same = equal_pairs(ids, generator)
    both = equal_pairs(ids * (ids.max() + 1) + before, generator)
    word = places[equal_pairs(label, generator)] if len(places) else any_pair[:, :0]

    def in_two_windows(p):
        return (window[p[0]] != window[p[1]]) & inside[p[0]] & inside[p[1]]

    def apart(p):
        return in_two_windows(p) & (before[p[0]] != before[p[1]])

    one_sense = role[word[0]] == role[word[1]]
    pairs = {"other": any_pair[:, (ids[any_pair[0]] != ids[any_pair[1]]) & apart(any_pair)],
             "lexical": same[:, apart(same)], "ngram": both[:, in_two_windows(both)],
             "sense": word[:, apart(word) & one_sense], "two": word[:, apart(word) & ~one_sense]}
    return {name: p for name, p in pairs.items() if p.shape[1] > 1}, sorted(senses)

def bootstrap(values, words, generator):
    """{name: numbers (n,)}, {name: the word (n,) that each belongs to} -> {name: (N_BOOTSTRAP,)}:
    means of samples of the words, drawn with replacement, the same for all names."""
    n_words, means = 1 + max(int(w.max()) for w in words.values()), {}
    drawn = torch.randint(n_words, (N_BOOTSTRAP, n_words), generator=generator)
    weights = torch.zeros(N_BOOTSTRAP, n_words).scatter_add_(1, drawn, torch.ones(drawn.shape))
    for name, x in values.items():
        total = torch.zeros(n_words).index_add_(0, words[name], x.float())
        n = torch.zeros(n_words).index_add_(0, words[name], torch.ones(len(x)))
        means[name] = (weights @ total) / (weights @ n).clamp_min(1)
    return means

def hierarchy(codes, windows, words, seed=0):
    """P8 -> {layers, words, pairs, kinds: {kind: {gap: {shallow, middle, deep: means; change, as
    claimed if above 0; stderr; holds: change above two of them}}}}."""
    layers = sorted({layer for layer, _ in codes})
    generator = torch.Generator().manual_seed(seed)
    pairs, senses = draw_pairs(windows, words, generator)
    labels = torch.unique(windows.flatten(), return_inverse=True)[1]
    of_word, third = {name: labels[p[0]] for name, p in pairs.items()}, max(1, len(layers) // 3)
    thirds, kinds = {"shallow": layers[:third], "middle": layers[third:-third],
                     "deep": layers[-third:]}, {}
    for kind in sta.KINDS:
        shared = {}  # {third: {pairs: share of atoms in common (n,)}}
        for name, (a, b) in pairs.items():
            for part, part_layers in thirds.items():
                both = [(codes[layer, kind][a][..., None] == codes[layer, kind][b][..., None, :])
                        & (codes[layer, kind][a][..., None] >= 0) for layer in part_layers]
                shares = [x.any(-1).float().mean((1, 2)) for x in both]
                if shares:
                    shared.setdefault(part, {})[name] = torch.stack(shares).mean(0)
        fall = {name: x - shared["deep"][name] for name, x in shared["shallow"].items()}
        samples, kinds[kind] = bootstrap(fall, of_word, generator), {}
        for gap, a, b, sign in (("lexical", "lexical", "other", 1),
                                ("ngram", "ngram", "lexical", 1), ("sense", "sense", "two", -1)):
            if a in pairs and b in pairs:
                change = sign * (fall[a].mean() - fall[b].mean()).item()
                stderr = (samples[a] - samples[b]).std().item()
                kinds[kind][gap] = {"change": change, "stderr": stderr,
                                    "holds": change > 2 * stderr,
                                    **{part: (x[a].mean() - x[b].mean()).item()
                                       for part, x in shared.items()}}
    return {"layers": layers, "words": senses, "kinds": kinds,
            "pairs": {name: p.shape[1] for name, p in pairs.items()}}

def print_hierarchy(result):
    print(f"{len(result['words'])} words with two senses by rule: "
          f"{' '.join(result['words']) or 'none; a longer text may have some (--max-tokens)'}")
    for kind, gaps in result["kinds"].items():
        n = sum(gap["holds"] for gap in gaps.values())
        print("P8", "holds" if n == 3 else "holds in part" if n else "does not hold here",
              f"for {kind}s: " + "; ".join(
                  f"{name} {gap['shallow']:+.3f} shallow, {gap['deep']:+.3f} deep, change as "
                  f"claimed {gap['change']:+.3f} ±{gap['stderr']:.3f}"
                  for name, gap in gaps.items()))

# ------------------------------------------------------------------ the run
def main(argv=None):
    args = parse_args(__doc__, argv, LOOK)
    run = begin_look(args, "-atoms")
    ks, saes = {"key": args.k_key, "value": args.k_val, "stage1": 1}, dict(run.saes)
    for layer in run.layers:
        if (run.folder / "additive" / f"layer{layer}.safetensors").exists():
            learned = read_fitted(run.folder / "additive", run.model, layer)
            if "atoms.0" in learned:
                saes[layer, "stage1"] = FirstStage(learned)
    codes, strongest, sentences = read_codes(run.model, saes, run.windows, ks)
    words = words_of(run.tokenizer, run.windows)
    page, check = describe(strongest, sentences, words)
    for site, row in check.items():
        print(f"atoms {site}: describable {100 * row['atoms_20']:.0f} % of 20 live ones at random, "
              f"{100 * row['atoms_live']:.0f} % of all {row['live']}; "
              f"{100 * row['random']:.0f} % of random directions")
    result = {**run.about, "k_key": args.k_key, "k_val": args.k_val, "check": check}
    if len(run.layers) >= 3:
        result["hierarchy"] = hierarchy(codes, run.windows, words)
        print_hierarchy(result["hierarchy"])
    about = {"model": pathlib.Path(run.name).name, **{name: result[name] for name in (
        "tokens", "k_key", "k_val")}}
    data = json.dumps({**about, **page}, ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # so that no tag of the page begins in it
    template = (sta.HERE / "beyond" / "atoms.html").read_text(encoding="utf-8")
    for path, content in ((run.path.with_suffix(".html"), template.replace("DATA", data)),
                          (run.path, json.dumps(result) + "\n")):
        sta.write_atomic(path, content)
        print(f"wrote {path}")

if __name__ == "__main__":
    sta.run(main)
