"""Does what an atom stands for change with the layer's depth? The paper's P8.

    python -m beyond.depth                     # the newest SAEs: a minute for tiny

P8, hierarchical addressing: shallow layers are lexical, deep layers tell senses apart. From the
share of atoms that two occurrences have in common: *lexical* is that of the same token (after
different ones) minus that of different tokens; *ngram* is how much the same token before adds to
it; *sense* is how much less two occurrences of a word have in common if it is a verb once and a
noun once, by the word before it. Claimed: from the shallow to the deep third of the layers, lexical
and ngram fall, and sense grows. Both thirds are measured on the same pairs; errors are those of a
bootstrap over words. Writes results/<model>-depth.json; beyond/claims.py gives the verdict.
"""
import collections
import json

import torch
from tqdm import tqdm

import sta
from beyond import LOOK, begin_look, parse_args
from support.files import run_main, write_atomic
from support.text import encode_text

N_PAIRS, N_BOOTSTRAP = 20_000, 200
MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}

def read_codes(model, saes, windows, ks):
    """Windows (n, T), budgets {kind: k} -> {(layer, kind): idx (tokens, H, k)}, -1 where z = 0."""
    codes = {site: [] for site in saes}
    for batch in tqdm(windows.split(8), desc="codes", disable=None):
        vectors = sta.harvest(model, batch, {layer for layer, _ in saes}, sink=0)
        for (layer, kind), x in vectors.items():
            z, idx = saes[layer, kind].encode(x.float(), ks[kind])  # (tokens, H, k)
            codes[layer, kind].append(idx.masked_fill(z <= 0, -1).to(torch.int16).cpu())
    return {site: torch.cat(parts) for site, parts in codes.items()}

def words_of(tokenizer, windows):
    """The text of each token, with a space before it, which some tokenizers drop at a beginning."""
    first = encode_text(tokenizer, ":", special=False)[-1:]
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

def main(argv=None):
    args = parse_args(__doc__, argv, LOOK)
    run = begin_look(args, "-depth")
    if len(run.layers) < 3:
        raise sta.UsageError(f"{len(run.layers)} layers: P8 compares thirds of three or more")
    codes = read_codes(run.model, run.saes, run.windows, {"key": args.k_key, "value": args.k_val})
    result = hierarchy(codes, run.windows, words_of(run.tokenizer, run.windows))
    print_hierarchy(result)
    write_atomic(run.path, json.dumps({**run.about, "hierarchy": result}) + "\n")
    print(f"wrote {run.path}")

if __name__ == "__main__":
    run_main(main)
