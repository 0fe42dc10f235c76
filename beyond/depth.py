"""Do atoms of shallow layers follow the word, and those of deep layers its sense? (Claim P8)

    python -m beyond.depth                        # the newest SAEs: a minute for tiny

The paper says that shallow layers are lexical and that deep layers tell senses apart. Measured is
the share of atoms that two occurrences have in common. *Lexical* is this share for the same token
after different ones, minus that of different tokens. *Ngram* is how much it grows if the token
before is the same, too. *Sense* is how much it shrinks if a word is a verb once and a noun once.
From the shallow to the deep third of the layers, lexical and ngram should fall, and sense should
grow: on the same pairs in all thirds, with errors by a bootstrap over words, and more than with a
random dictionary. Layer 0 is left out: its keys depend on the token alone.
"""
import collections
import itertools

import torch
from tqdm import tqdm

import sta
from beyond import LOOK, begin_look, parse_args
from beyond.atoms import words_of
from support.files import run_main

N_PAIRS, N_BOOTSTRAP = 20_000, 200
MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}
GAPS = {"lexical": ("lexical", "other", 1),  # {gap: (pairs, pairs that share less,
        "ngram": ("ngram", "lexical", 1),    # 1 if the gap should fall with depth, -1 if grow)}
        "sense": ("sense", "two", -1)}

def random_twin(sae):
    """An SAE of the same size, means and scale, whose atoms were never trained."""
    twin = sta.TopKSAE(*sae.b_dec.shape, sae.n_latents, sae.k, torch.Generator().manual_seed(0))
    twin.b_dec, twin.scale = sae.b_dec, sae.scale
    return twin.requires_grad_(False).to(sae.W_dec.device)

def read_codes(model, saes, windows, ks):
    """Windows (n, T), budgets {kind: k} -> {name: {(layer, kind): (tokens, H, k or D)}}: the atoms'
    and a random dictionary's idx, -1 where z = 0; the vectors less the head's mean, as units."""
    kept = {name: {site: [] for site in saes} for name in ("atoms", "random", "vectors")}
    twins, layers = {site: random_twin(sae) for site, sae in saes.items()}, {i for i, _ in saes}
    for batch in tqdm(windows.split(8), desc="codes", disable=None):
        for (layer, kind), x in sta.harvest(model, batch, layers, sink=0).items():
            x, site = x.float(), (layer, kind)
            for name, sae in (("atoms", saes[site]), ("random", twins[site])):
                z, idx = sae.encode(x, ks[kind])  # (tokens, H, k)
                kept[name][site].append(idx.masked_fill(z <= 0, -1).short().cpu())
            unit = torch.nn.functional.normalize(x - saes[site].b_dec, dim=-1)
            kept["vectors"][site].append(unit.half().cpu())
    return {name: {site: torch.cat(parts) for site, parts in by_site.items()}
            for name, by_site in kept.items()}

def find_senses(words):
    """-> (words with two senses, (tokens,): the number of such a word where it is a verb, minus it
    where it is a noun, else 0). A verb stands after will, to, ..., a noun after the, our, ... . A
    word counts if it is five of each or more, one of them after a modal verb, whole, and not one of
    the 50 most common."""
    bare = [word.strip().lower() for word in words]
    before = ["", *bare[:-1]]
    role = [1 if a in MODALS or a == "to" else -1 if a in NOUNS_AFTER else 0 for a in before]
    whole = [w.isalpha() and len(w) > 2 and raw[:1].isspace() and not after[:1].isalpha()
             for w, raw, after in zip(bare, words, [*words[1:], ""])]  # no part of a longer word
    counts = collections.Counter((w, r) for w, r, ok in zip(bare, role, whole) if ok)
    common = {w for w, _ in collections.Counter(bare).most_common(50)}  # function words
    verbs = {w for a, w in zip(before, bare) if a in MODALS}
    senses = sorted(w for w in verbs - common if min(counts[w, 1], counts[w, -1]) >= 5)
    numbers = {w: i for i, w in enumerate(senses, 1)}
    return senses, torch.tensor([numbers.get(w, 0) * r * ok
                                 for w, r, ok in zip(bare, role, whole)])

def equal_pairs(labels, places, generator):
    """N_PAIRS pairs of the places whose labels are equal, drawn at random: (2, N_PAIRS)."""
    if not len(places):
        return places.new_zeros(2, 0)
    ordered, order = labels[places].sort()
    i = torch.randint(len(places), (N_PAIRS,), generator=generator)
    low = torch.searchsorted(ordered, ordered[i])
    high = torch.searchsorted(ordered, ordered[i], right=True)
    j = low + (torch.rand(N_PAIRS, generator=generator) * (high - low)).long()
    return places[torch.stack([order[i], order[j]])]

def draw_pairs(windows, words, generator):
    """-> ({name: (2, n) places} of pairs of occurrences, the words with two senses). other:
    different tokens; lexical: the same token after different ones; ngram: the same after the same;
    sense: the same word in one sense; two: once as a verb and once as a noun. Never of one window,
    and never a window's first token, before which the model sees none."""
    ids, places = windows.flatten(), torch.arange(windows.numel())
    before, window, inside = ids.roll(1), places // windows.shape[1], places % windows.shape[1] > 0
    senses, sense = find_senses(words)
    sense = sense * inside
    drawn = {"other": torch.randint(len(ids), (2, N_PAIRS), generator=generator),
             "lexical": equal_pairs(ids, places, generator),
             "ngram": equal_pairs(ids * (ids.max() + 1) + before, places, generator),
             "sense": equal_pairs(sense.abs(), sense.nonzero().squeeze(1), generator)}
    drawn["two"] = drawn["sense"]
    pairs = {}
    for name, (i, j) in drawn.items():
        usable = (window[i] != window[j]) & inside[i] & inside[j]
        if name != "ngram":
            usable &= before[i] != before[j]
        if name == "other":
            usable &= ids[i] != ids[j]
        if name in ("sense", "two"):
            usable &= (sense[i] == sense[j]) == (name == "sense")
        if usable.sum() > 1:
            pairs[name] = drawn[name][:, usable]
    return pairs, senses

def alike(codes, kind, layers, i, j):
    """Places i and j (n,) -> (n,): the share of the one's atoms that the other's code has as well,
    or, of vectors, their cosine; mean over heads and layers."""
    shares = []
    for layer in layers:
        a, b = codes[layer, kind][i], codes[layer, kind][j]  # (n, H, k or D)
        if a.is_floating_point():
            shares.append((a.float() * b.float()).sum(-1).mean(1))
        else:
            in_both = (a[..., None] == b[..., None, :]).any(-1) & (a >= 0)
            shares.append(in_both.float().mean((1, 2)))
    return torch.stack(shares).mean(0)

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

def hierarchy(kept, windows, words, seed=0):
    """P8, of three layers or more -> {layers, words, pairs, changes: {name: {gap of kind: [change
    from the shallow to the deep third, above 0 if as claimed; its standard error]}}}, the names
    being those of `read_codes`."""
    layers = sorted({layer for layer, _ in kept["atoms"]})
    n = len(layers) // 3
    generator = torch.Generator().manual_seed(seed)
    pairs, senses = draw_pairs(windows, words, generator)
    labels = torch.unique(windows.flatten(), return_inverse=True)[1]
    of_word, changes = {name: labels[i] for name, (i, _) in pairs.items()}, {}
    for (name, codes), kind in itertools.product(kept.items(), sta.KINDS):
        fall = {pair: alike(codes, kind, layers[:n], *places)
                - alike(codes, kind, layers[-n:], *places) for pair, places in pairs.items()}
        samples = bootstrap(fall, of_word, generator)
        for gap, (a, b, sign) in GAPS.items():
            if a in pairs and b in pairs:
                changes.setdefault(name, {})[f"{gap} of {kind}s"] = [
                    sign * (fall[a].mean() - fall[b].mean()).item(),
                    (samples[a] - samples[b]).std().item()]
    return {"layers": layers, "words": senses, "changes": changes,
            "pairs": {name: places.shape[1] for name, places in pairs.items()}}

def measure_depth(run, ks):
    """What `hierarchy` returns, of a run's SAEs at budgets {kind: k}; None with fewer than three
    layers beside layer 0."""
    saes = {site: sae for site, sae in run.saes.items() if site[0] > 0}
    if len(saes) < 3 * len(sta.KINDS):
        return None
    kept = read_codes(run.model, saes, run.windows, ks)
    return hierarchy(kept, run.windows, words_of(run.tokenizer, run.windows))

def main(argv=None):
    args = parse_args(__doc__, argv, LOOK)
    run = begin_look(args, "-depth")
    depth = measure_depth(run, {"key": args.k_key, "value": args.k_val})
    if depth is None:
        raise sta.UsageError(f"{run.folder}: SAEs of layers {run.layers}; want three besides 0")
    print("words with two senses:", " ".join(depth["words"]) or "none (--max-tokens)")
    for name, changes in depth["changes"].items():
        print(f"{name}:", ", ".join(f"{gap} {change:+.3f} ±{stderr:.3f}"
                                    for gap, (change, stderr) in changes.items()))

if __name__ == "__main__":
    run_main(main)
