"""Do atoms mean something? Three checks, each beside what needs no trained dictionary.

    python -m beyond.variants --what twin            # tiny: saes/twin/tiny/, a minute
    python -m beyond.meaning --other saes/seed1      # the newest SAEs, and those of another seed

The untrained twin of an SAE has random atoms, and an encoder that was trained for them: its codes
are as sparse, and know the text, but its atoms do not [arXiv 2602.14111].

words   For a dozen concepts (months, countries, ...) the atom that tells their words from other
        tokens best is chosen by half of the words, in half of the text; and is tested on the other
        words, in the other half. Figure: AUROC, the chance that such a word has the larger
        coefficient; where both have none, half a chance. Rivals: the twin's atoms, the numbers
        of the vector, random directions, and the difference of the two means.
seeds   How alike an atom is to the nearest atom of SAEs from another seed. Atoms are split into a
        stable and an unstable half, by firings: which half carries more of attention's logits, and
        which costs more if its atoms are dropped?
depth   Claim P8: shallow layers are lexical, deep layers tell senses apart. Measured is the share
        of atoms that two occurrences have in common. *Lexical* is this share for the same token
        after different ones, minus that of different tokens. *Ngram* is how much it grows if the
        token before is the same, too. *Sense* is how much it shrinks if a word is a verb once and a
        noun once. From the shallow to the deep third of the layers, lexical and ngram should fall,
        and sense should grow: on the same pairs in all thirds, with errors by a bootstrap over
        words, and more than with a random dictionary. Layer 0 is left out: its keys depend on the
        token alone.
"""
import collections
import itertools
import json
import pathlib
import re
import statistics

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta
from beyond import LOOK, begin_look, parse_args, pick, spread, table
from beyond.atoms import by_atom, read_attention, read_codes, take_apart, words_of
from beyond.variants import beside
from support.files import load_saes, run_main, write_atomic
from support.results import find_saes
from support.tasks import mean_margin

CONCEPTS = {name: words.split() for name, words in {
    "countries": "England France Spain Mexico Germany Russia China Japan Cuba Canada Italy Brazil "
                 "Turkey Austria Egypt India Portugal Greece Chile Peru Korea Vietnam Iraq Iran",
    "states": "Texas California Virginia Florida Maine Ohio Louisiana Georgia Pennsylvania Kansas "
              "Massachusetts Missouri Illinois Tennessee Kentucky Alabama Oregon Alaska Maryland",
    "months": "January February March April May June July August September October November "
              "December",
    "numbers": "one two three four five six seven eight nine ten twelve twenty thirty forty fifty "
               "hundred thousand million billion",
    "names": "John William James George Thomas Henry Charles Robert Edward Andrew Richard Joseph "
             "David Samuel Benjamin Franklin Paul Peter Daniel Michael",
    "pronouns": "he she it they we you him her them us me himself themselves itself",
    "peoples": "American British French Spanish Mexican German Russian Chinese Japanese Indian "
               "English Italian Canadian European African Cuban Turkish Dutch",
    "times": "day days week weeks month months year years hour hours century decade decades",
    "money": "dollars cents dollar gold silver currency coin notes bonds revenue taxes debt loan",
    "modals": "will would shall should can could may might must",
    "places": "in on at by with from under over between through upon against within among",
    "kin": "father mother son daughter brother sister wife husband children child family parents",
    "parties": "President Congress Senate Court House Secretary Governor Department Treasury "
               "Commission Committee Government"}.items()}
MANY, N_OTHERS = 20, 4000  # occurrences of a word that count, at most; tokens of other words
N_PAIRS, N_BOOTSTRAP = 20_000, 200
MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}
GAPS = {"lexical": ("lexical", "other", 1),  # {gap: (pairs, pairs that share less,
        "ngram": ("ngram", "lexical", 1),    # 1 if the gap should fall with depth, -1 if grow)}
        "sense": ("sense", "two", -1)}

# ------------------------------------------------------------------ other words
def find_words(words, concept):
    """Tokens' texts, a list of words -> (tokens,): 1 + a word's place in the list where the token
    ends that word, else 0."""
    text, ends = "".join(words), torch.tensor([len(word) for word in words]).cumsum(0)
    label = torch.zeros(len(words)).long()
    for match in re.finditer(rf"\b(?:{'|'.join(concept)})\b", text):
        label[torch.searchsorted(ends, match.end())] = 1 + concept.index(match[0])
    return label

def draw_words(label, generator):
    """What `find_words` returned -> [(tokens with words, tokens without)] to choose by, and to test
    on: other words, in the other half of the text. None if either has too few."""
    n_words, half = int(label.max()), len(label) // 2
    order = 1 + torch.randperm(n_words, generator=generator)
    drawn = []
    for words, first in ((order[::2], 0), (order[1::2], half)):
        part, with_word = label[first:first + half], []
        for word in words.tolist():
            places = (part == word).nonzero()[:, 0]
            with_word.append(places[torch.randperm(len(places), generator=generator)[:MANY]])
        others = (part == 0).nonzero()[:, 0]
        others = others[torch.randperm(len(others), generator=generator)[:N_OTHERS]]
        if sum(map(len, with_word)) < 10 or sum(len(places) > 0 for places in with_word) < 3:
            return None
        drawn.append((first + torch.cat(with_word), first + others))
    return drawn

def auroc(with_word, others):
    """Scores (P, F) and (N, F) of F features -> (F,): the chance that one of the first is larger
    than one of the second, ties counting half."""
    ordered, wanted = others.T.contiguous().sort().values, with_word.T.contiguous()
    below, up_to = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return (below + up_to).float().mean(1) / (2 * len(others))

def scores_of(x, sae, twin, k, towards, directions):
    """Vectors x (n, H, D), SAE, twin and budget; towards (H * D,), the difference of means;
    directions (D, R) -> {name: scores (n, F)}, of an SAE in the head where they are largest."""
    inside = (x - sae.b_dec) / sae.scale
    return {"atoms": by_atom(*sae.encode(x, k), sae.n_latents).T,
            "untrained twin": by_atom(*twin.encode(x, k), twin.n_latents).T,
            "numbers of the vector": torch.cat([inside, -inside], -1).flatten(1),
            "random directions": (inside @ directions).amax(1),
            "difference of means": (x.flatten(1) @ towards)[:, None]}

def word_aurocs(x, sae, twin, k, drawn, generator):
    """Vectors x (tokens, H, D), what `draw_words` returned -> {name: AUROC, on the words tested on,
    of what is best on those chosen by}."""
    (a, b), _ = drawn
    towards = (x[a].mean(0) - x[b].mean(0)).flatten()
    directions = torch.randn(x.shape[2], sae.n_latents, generator=generator).to(x.device)
    (train, train_others), (test, test_others) = (
        [scores_of(x[i], sae, twin, k, towards, directions) for i in both] for both in drawn)
    aurocs = {}
    for name in train:
        best = auroc(train[name], train_others[name]).argmax()
        aurocs[name] = auroc(test[name][:, [best]], test_others[name][:, [best]]).item()
    return aurocs

def measure_words(run, twins, ks):
    """-> {"layer.kind": {concept: {name: AUROC}}}."""
    words, generator = words_of(run.tokenizer, run.windows), torch.Generator().manual_seed(0)
    drawn = {}
    for name, concept in CONCEPTS.items():
        label = find_words(words, concept)
        label[::run.windows.shape[1]] = -1  # first tokens are like no others
        drawn[name] = draw_words(label, generator)
    measured = {}
    for layer in tqdm(run.layers, desc="words", disable=None):
        for site, x in sta.harvest(run.model, run.windows, [layer], sink=0).items():
            measured[f"{layer}.{site[1]}"] = {
                name: word_aurocs(x.float(), run.saes[site], twins[site], ks[site[1]], both,
                                  generator) for name, both in drawn.items() if both}
    return measured

# ------------------------------------------------------------------ other seeds
def likeness(atoms, others):
    """Unit atoms (M, D) of two dictionaries -> (M,): each one's largest cosine with the others."""
    return (atoms @ others.T).amax(1)

def stable_half(likeness, fired):
    """(M,) likeness and number of firings -> (M,) bool: the atoms that are most alike to another
    seed's, up to half of all firings."""
    order = likeness.argsort(descending=True)
    first = fired[order].cumsum(0) <= fired.sum() / 2
    return torch.zeros_like(first).scatter_(0, order, first)

class Without(sta.DualBudget):
    """The dual budget without some atoms: dropped (M,) bool of keys, the same of values."""

    def __init__(self, codec, *dropped):
        super().__init__(codec.key_sae, codec.value_sae, codec.budget)
        self.dropped = dropped

    def encode(self, keys, values):
        z_key, idx_key, z_val, idx_val = super().encode(keys, values)
        return (z_key.masked_fill(self.dropped[0][idx_key.long()], 0), idx_key,
                z_val.masked_fill(self.dropped[1][idx_val.long()], 0), idx_val)

def share_of_logits(model, layer, sae, stable, k, queries, keys):
    """Of what all atoms add to a layer's logits, taken without sign, the share of the stable ones
    (M,). queries and keys as `read_attention` returns them."""
    idx, _, parts, _ = take_apart(model, layer, sae, k, queries, keys)  # (B, n, T, T, k)
    size = parts.abs() * torch.ones(parts.shape[2:4], device=parts.device).tril()[..., None]
    of_head = stable[idx].transpose(1, 2)  # (B, H, T, k)
    of_query = of_head.repeat_interleave(size.shape[1] // of_head.shape[1], 1)[:, :, None]
    return ((size * of_query).sum() / size.sum()).item()

@torch.no_grad()
def measure_seeds(run, others, args):
    """-> {"layer.kind": {median: of each atom's likeness to the nearest one of others, the SAEs of
    another seed; random: the same for a random dictionary; alike: share above 0.7; and, of keys,
    logits: share_of_logits}}, {"stable", "unstable": (nats by which the dual budget without those
    atoms is worse than with them, its standard error, half its 95% interval)}."""
    ks, generator = {"key": args.k_key, "value": args.k_val}, torch.Generator().manual_seed(0)
    stable, measured = {}, {}
    for site, (z, idx) in read_codes(run.model, run.saes, run.windows[:32], ks).items():
        sae = run.saes[site]
        alike = likeness(sae.W_dec, others[site].W_dec)
        random = F.normalize(torch.randn(sae.W_dec.shape, generator=generator), dim=-1)
        fired = idx[z > 0].int().bincount(minlength=sae.n_latents)
        stable[site] = stable_half(alike.cpu(), fired).to(alike.device)
        measured[f"{site[0]}.{site[1]}"] = {
            "median": alike.median().item(), "alike": (alike > 0.7).float().mean().item(),
            "random": likeness(sae.W_dec, random.to(alike.device)).median().item()}
    ids = run.windows[:8, :128]
    for layer, (queries, keys, _) in read_attention(run.model, run.layers, ids).items():
        measured[f"{layer}.key"]["logits"] = share_of_logits(
            run.model, layer, run.saes[layer, "key"], stable[layer, "key"], args.k_key, queries,
            keys)
    dual, losses = evaluate.dual_codecs(run.saes, args.k_key, args.k_val), {}
    for name, sign in (("dual", None), ("stable", True), ("unstable", False)):
        codecs = dual if sign is None else {layer: Without(codec, *(
            stable[layer, kind] == sign for kind in sta.KINDS)) for layer, codec in dual.items()}
        with evaluate.through_hooks(run.model, codecs, args.sink) as forward:
            losses[name] = evaluate.window_losses(forward, run.windows[:32], run.model, name)[0]
    return measured, {name: evaluate.mean_excess(losses[name], losses["dual"])
                      for name in ("stable", "unstable")}

# ------------------------------------------------------------------ depth
def random_twin(sae):
    """An SAE of the same size, means and scale, whose atoms were never trained."""
    twin = sta.TopKSAE(*sae.b_dec.shape, sae.n_latents, sae.k, torch.Generator().manual_seed(0))
    twin.b_dec, twin.scale = sae.b_dec, sae.scale
    return twin.requires_grad_(False).to(sae.W_dec.device)

def read_twins(model, saes, windows, ks):
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
    being those of `read_twins`."""
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
    kept = read_twins(run.model, saes, run.windows, ks)
    return hierarchy(kept, run.windows, words_of(run.tokenizer, run.windows))

def print_meaning(words, seeds, without):
    for site, by_concept in words.items():
        names = next(iter(by_concept.values()))
        print(f"{site:9} AUROC on other words:", ", ".join(
            f"{name} {statistics.mean(x[name] for x in by_concept.values()):.3f}"
            for name in names))
    for site, columns in seeds.items():
        print(f"{site:9} likeness to another seed:",
              ", ".join(f"{name} {x:.3f}" for name, x in columns.items()))
    for name, (nats, _, half) in without.items():
        print(f"dual without its {name} atoms: {nats:+.4f} ± {half:.4f} nats")

# ------------------------------------------------------------------ tables
CONTENDERS = {"atoms": "atoms", "untrained twin": "atoms of the untrained twin",
              "numbers of the vector": "single coordinates of the vector",
              "random directions": "as many random directions as atoms",
              "difference of means": "difference of means"}

def aurocs(lines, model, name):
    """{concept: AUROC on other words, a mean over a model's layers and kinds}."""
    by_concept = {}
    for line in pick(lines, kind="meaning", model=model):
        for concept, x in itertools.chain(*(x.items() for x in line["meaning"]["words"].values())):
            by_concept.setdefault(concept, []).append(x[name])
    return {concept: statistics.mean(values) for concept, values in by_concept.items()}

def mean_auroc(lines, model, name):
    found = aurocs(lines, model, name)
    return f"{statistics.mean(found.values()):.2f}" if found else ""

def table_of_aurocs(lines, models):
    """AUROC on other words, means over a model's layers, kinds and concepts; and by how much that
    of atoms is better, ± half its 95% interval over concepts."""
    cells = {}
    for (heading, model), (name, row) in itertools.product(models.items(), CONTENDERS.items()):
        atoms, found = aurocs(lines, model, "atoms"), aurocs(lines, model, name)
        if found:
            cells[row, heading] = spread([statistics.mean(found.values())])
            if name != "atoms":
                cells[row, f"{heading}: atoms better by"] = "{:+.3f} ± {:.3f}".format(
                    *mean_margin([atoms[concept] - found[concept] for concept in found]))
    return table("AUROC (0.5: chance, 1: perfect)", cells)

def table_of_seeds(lines, models):
    """How alike atoms are to those of another seed, means over a model's layers, and what they
    carry."""
    cells = {}
    for heading, model in models.items():
        for line in pick(lines, kind="meaning", model=model)[-1:]:
            seeds, without = line["meaning"]["seeds"], line["meaning"]["without"]
            if not seeds:  # measured without --other
                continue
            for kind in sta.KINDS:
                median, random = (statistics.mean(x[name] for site, x in seeds.items()
                                                  if site.endswith(kind))
                                  for name in ("median", "random"))
                cells[f"nearest cosine, {kind}s (random atoms)", heading] = (
                    f"{median:.2f} ({random:.2f})")
            share = statistics.mean(x["logits"] for x in seeds.values() if "logits" in x)
            cells["stable half's share of key atoms' logits", heading] = f"{share:.2f}"
            for name, label in (("stable", "stable half"), ("unstable", "other half")):
                nats, _, half = without[name]
                cells[f"cost of dropping the {label}, nats", heading] = f"{nats:.3f} ± {half:.3f}"
    return table("", cells)

def share_alike(lines, model):
    """The share of atoms, in %, that are much like one of another seed."""
    values = [columns["alike"] for line in pick(lines, kind="meaning", model=model)
              for columns in line["meaning"]["seeds"].values()]
    return f"{100 * statistics.mean(values):.0f}" if values else ""

def main(argv=None):
    args = parse_args(__doc__, argv, LOOK + " sink", other=dict(
        type=pathlib.Path, help="SAEs of another seed, for the second check"))
    run = begin_look(args, "-meaning")
    ks = {"key": args.k_key, "value": args.k_val}
    folder = beside(run.folder, "twin")
    if not folder.exists():
        raise sta.UsageError(f"{folder}: no untrained twins; first run: python -m beyond.variants "
                             "--what twin")
    twins, _ = load_saes(folder, run.model, run.layers)
    with torch.no_grad():
        words, seeds, without = measure_words(run, twins, ks), {}, {}
    if args.other:
        folder, _ = find_saes(args.other, run.name)
        seeds, without = measure_seeds(run, load_saes(folder, run.model, run.layers)[0], args)
    print_meaning(words, seeds, without)
    write_atomic(run.path, json.dumps({**run.about, "meaning": {
        "words": words, "seeds": seeds, "without": without}}) + "\n")
    print(f"wrote {run.path}")

if __name__ == "__main__":
    run_main(main)
