"""Verdicts on the paper's claims P1 to P8 (as README.md numbers them), each printed with its rule.

    python -m beyond.claims                       # tiny: ten minutes, with the SAEs of the controls

Runs evaluate.py with --rows variants,claims. The rows added here are single layers, for P6, and the
dual budget with half and twice its atoms, for P5. The controls of P1, P3 and P4 are SAEs of
beyond/variants.py. For tiny they are trained if they are missing; for other models, a claim without
its control gets no verdict. Writes evaluate.py's <model>.json and <model>-claims.json. *Clear*
means more than two standard errors. An error over layers says how layers vary, not how runs would.

P8 says that shallow layers are lexical and that deep layers tell senses apart. It is judged by the
share of atoms that two occurrences have in common. *Lexical* is this share for the same token
after different ones, minus that of different tokens. *Ngram* is how much it grows if the token
before is the same, too. *Sense* is how much it shrinks if a word is a verb once and a noun once.
From the shallow to the deep third of the layers, lexical and ngram should fall, and sense should
grow: on the same pairs in all thirds, with errors by a bootstrap over words.
"""
import collections
import json
import math
import statistics
import sys

import torch
from tqdm import tqdm

import evaluate
import sta
import train_sae
from beyond import begin_look, parse_args
from beyond.atoms import words_of
from beyond.variants import VARIANTS, beside, search, settings_of
from support.files import load_sae, run_main, write_atomic
from support.models import context_length
from support.tasks import mean_stderr

SEARCHED = ", searched"  # ends the names of rows and claims whose atoms are found by search

# ------------------------------------------------------------------ the rows
# An L1 penalty takes longer: at the SAEs' own settings it leaves twice as much variance.
FACTORS = {"splits": {}, "l1": {"tokens": 3, "lr": 4}}

def train_controls(variant, folder, model_name, layers):
    """Train a variant's SAEs beside a folder's, with their settings times FACTORS, if missing."""
    there = beside(folder, variant)
    if all(list(there.glob(f"layer{layer}.value*")) for layer in layers):
        return
    settings = load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    settings |= {name: factor * settings[name] for name, factor in FACTORS[variant].items()}
    computed = "layers", "text_sha256", "model_sha256"  # no options
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()
               if name not in computed and value != "default"]
    train_sae.main(["--model", model_name, "--out", str(there.parent), "--layer",
                    ",".join(map(str, layers)), *options], VARIANTS[variant]())

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    dual = evaluate.dual_codecs(saes, args.k_key, args.k_val)
    most = min((sae.n_latents for sae in saes.values()), default=0)
    once_bytes = evaluate.dictionary_bytes(saes, *sta.KINDS)
    common = {"settings": settings_of(before), "with_tasks": False}
    new_rows = []
    for method, scale in (("dual", 1 / 2), ("dual", 2), ("searched", 2)):
        budget = int(scale * args.k_key), int(scale * args.k_val)
        if min(budget) >= 1 and max(budget) <= most:
            codecs = evaluate.dual_codecs(saes, *budget)
            codecs = search(codecs) if method == "searched" else codecs
            new_rows.append(evaluate.Row("{} {},{}".format(method, *budget), codecs, budget,
                                         once_bytes, method=method, **common))
    for layer in list(dual)[::1 if len(dual) <= 12 else 3]:
        one_pass = {layer: dual[layer]}
        for ending, codecs in (("", one_pass), (SEARCHED, search(one_pass))):
            new_rows.append(evaluate.Row(
                f"layer {layer} alone{ending}", codecs, dual[layer].budget,
                once_bytes // len(dual), method=f"one layer{ending}", **common))
    return new_rows

@torch.no_grad()
def stream_change(model, codecs, windows, sink):
    """How coding one layer changes the residual stream after it -> {layer: change / spread}, as
    norms over tokens, less the exact ones."""
    def streams():  # of each layer (tokens, width): its output; of the last, after the final norm
        states = model.get_decoder()(input_ids=windows.to(model.device), use_cache=False,
                                     output_hidden_states=True).hidden_states[1:]
        return [x[:, sink:].flatten(0, 1).float() for x in states]

    dense, changes = streams(), {}
    for layer, codec in codecs.items():
        with sta.reconstruct(model, {layer: codec}, sink):
            change = streams()[layer] - dense[layer]
        spread = dense[layer] - dense[layer].mean(0)
        changes[str(layer)] = (change.norm() / spread.norm()).item()
    return changes

# ------------------------------------------------------------------ P8: atoms in common
N_PAIRS, N_BOOTSTRAP = 20_000, 200
MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}
GAPS = {"lexical": ("lexical", "other", 1),  # {gap: (pairs, pairs that share less,
        "ngram": ("ngram", "lexical", 1),    # 1 if the gap should fall with depth, -1 if grow)}
        "sense": ("sense", "two", -1)}

def read_codes(model, saes, windows, ks):
    """Windows (n, T), budgets {kind: k} -> {(layer, kind): idx (tokens, H, k)}, -1 where z = 0."""
    codes, layers = {site: [] for site in saes}, {layer for layer, _ in saes}
    for batch in tqdm(windows.split(8), desc="codes", disable=None):
        for (layer, kind), x in sta.harvest(model, batch, layers, sink=0).items():
            z, idx = saes[layer, kind].encode(x.float(), ks[kind])  # (tokens, H, k)
            codes[layer, kind].append(idx.masked_fill(z <= 0, -1).short().cpu())
    return {site: torch.cat(parts) for site, parts in codes.items()}

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

def shared_atoms(codes, kind, layers, i, j):
    """Places i and j (n,) -> (n,): the share of the one's atoms that the other's code has as well,
    mean over heads and layers."""
    shares = []
    for layer in layers:
        a, b = codes[layer, kind][i], codes[layer, kind][j]  # (n, H, k)
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

def hierarchy(codes, windows, words, seed=0):
    """P8, of three layers or more -> {layers, words, pairs, kinds: {kind: {gap: {shallow, middle,
    deep: means; change, above 0 if as claimed; stderr; holds}}}}."""
    layers = sorted({layer for layer, _ in codes})
    n = len(layers) // 3
    thirds = {"shallow": layers[:n], "middle": layers[n:-n], "deep": layers[-n:]}
    generator = torch.Generator().manual_seed(seed)
    pairs, senses = draw_pairs(windows, words, generator)
    labels = torch.unique(windows.flatten(), return_inverse=True)[1]
    of_word, kinds = {name: labels[i] for name, (i, _) in pairs.items()}, {}
    for kind in sta.KINDS:
        shares = {third: {name: shared_atoms(codes, kind, some, *pair)
                          for name, pair in pairs.items()} for third, some in thirds.items()}
        fall = {name: shares["shallow"][name] - shares["deep"][name] for name in pairs}
        samples, kinds[kind] = bootstrap(fall, of_word, generator), {}
        for gap, (a, b, sign) in GAPS.items():
            if a in pairs and b in pairs:
                change = sign * (fall[a].mean() - fall[b].mean()).item()
                stderr = (samples[a] - samples[b]).std().item()
                kinds[kind][gap] = {
                    "change": change, "stderr": stderr, "holds": clear(change, stderr),
                    **{third: (x[a].mean() - x[b].mean()).item() for third, x in shares.items()}}
    return {"layers": layers, "words": senses, "kinds": kinds,
            "pairs": {name: p.shape[1] for name, p in pairs.items()}}

# ------------------------------------------------------------------ verdicts
# What is claimed; what the figure in the tables is; when the claim holds, and when in part.
CLAIMS = {
    "P1": ("an L1 penalty shrinks magnitudes, a Top-K budget does not",
           "length of a key by Top-K minus that by L1, as a share of its own",
           "Top-K's keys are clearly longer (over layers) and L1's loss is clearly higher; in "
           "part: one of them"),
    "P2": ("8 atoms recover over 80 % of a key's direction",
           "cosine of a key and its reconstruction",
           "a cosine of at least 0.8 in every layer; in part: in the mean over layers; nearly "
           "free: the head's mean alone has as much"),
    "P3": ("values need more atoms than keys",
           "FVU of values minus that of keys, by SAEs trained for 12 atoms",
           "the FVU of values is clearly higher (over layers) at each of three budgets, of SAEs "
           "trained for it; in part: at some budget"),
    "P4": ("fewer atoms for keys than for values is the better split",
           "nats by which 12 and 12 atoms are worse",
           "equal atoms for both, and more for keys, are both clearly worse, each by SAEs trained "
           "for it; in part: the second is, and equal atoms are not clearly better"),
    "P5": ("dropping weak atoms removes noise and improves perplexity, in all layers",
           "nats by which the best of k/2, k and 2k beats dense, on half of the text",
           "the best of k/2, k and 2k on half of the windows is clearly better than dense on the "
           "other half; in part: it is clearly better there than 2k"),
    "P5 one layer": ("the same in one layer", "nats by which the best beats dense",
                     "the best layer on half of the windows clearly beats dense on the other"),
    "P6 one layer": ("one layer coded: perplexity is comparable to the dense model's",
                     "ratio to dense perplexity, of the median layer",
                     "each measured layer alone costs at most 1 %; in part: the median one"),
    "P6 all layers": ("all layers coded: perplexity and accuracy are comparable to dense",
                      "ratio to dense perplexity",
                      "at most 2 % more perplexity (upper bound), tasks measured, none clearly "
                      "lower; in part: at most 10 %, none clearly lower"),
    "P7": ("significantly less memory", "share of bf16's bytes per token",
           "less than half of bf16's bytes per token, and with the dictionaries fewer bytes within "
           "one context of the model; in part: the first"),
    "P8": ("atoms of shallow layers follow the word, those of deep layers its sense",
           "share of atoms that keys of one word have in common, less that of keys of different "
           "words; shallow minus deep",
           "lexical and ngram clearly fall, sense clearly grows, for keys and values; in part: "
           "some of them do")}
CHOOSE, TEST = slice(0, None, 2), slice(1, None, 2)  # every other window

def clear(mean, stderr):
    """More than two standard errors above zero; without a standard error nothing is clear."""
    return stderr is not None and mean > 2 * stderr

def grade(holds, partly=False):
    return "holds" if holds else "holds in part" if partly else "does not hold here"

def spell(figure):
    """A number, (a mean, its standard error) or a text -> text."""
    if isinstance(figure, tuple):
        return "{:+.4f} ±{:.4f}".format(*(math.nan if x is None else x for x in figure))
    return figure if isinstance(figure, str) else f"{figure:.4g}"

def verdict(claim, estimate, word, measured):
    """Prints and returns it. estimate: (figure, its standard error); measured: {name: figure}."""
    statement, _, rule = CLAIMS[claim.removesuffix(SEARCHED)]
    measured = "; ".join(f"{name} {spell(figure)}" for name, figure in measured.items())
    print(f"{claim} {word}: {statement}: {measured}\n   rule: {rule}")
    return {"claim": claim, "figure": estimate[0], "stderr": estimate[1], "verdict": word,
            "measured": measured}

def worse(a, b, windows=slice(None)):
    """(nats per token by which row a is worse than b, its standard error), paired over windows."""
    return mean_stderr([x - y for x, y in zip(a["window_ce"][windows], b["window_ce"][windows])])

def over_layers(a, column_a, b, column_b):
    """(mean over layers of a column of row a less one of row b, its standard error)."""
    pairs = zip(a["by_layer"].values(), b["by_layer"].values())
    return mean_stderr([x[column_a] - y[column_b] for x, y in pairs])

def judge_shrinkage(dual, l1):
    longer, excess = over_layers(dual, "rel_norm_key", l1, "rel_norm_key"), worse(l1, dual)
    word = grade(clear(*longer) and clear(*excess), clear(*longer) or clear(*excess))
    return verdict("P1", longer, word, {
        "|x_hat|/|x| of keys by Top-K": dual["rel_norm_key"], "by L1": l1["rel_norm_key"],
        "nats by which L1 is worse": excess})

def judge_direction(curves):
    """P2 from {layer: curves}."""
    at = {k: [point for layer in curves.values() for point in layer["key"] if point["k"] == k]
          for k in (0, 8)}
    cos, cos_of_mean = ([point["cos"] for point in at[k]] for k in (8, 0))
    word = grade(min(cos) >= 0.8, statistics.mean(cos) >= 0.8)
    if word == "holds" and statistics.mean(cos_of_mean) >= 0.8:
        word = "holds, nearly free"
    return verdict("P2", mean_stderr(cos), word, {
        "cosine": statistics.mean(cos), "of the lowest layer": min(cos),
        "by the head's mean alone": statistics.mean(cos_of_mean),
        "FVU of 8 atoms": statistics.mean(point["fvu"] for point in at[8])})

def judge_asymmetry(splits):
    """P3 from [(row whose keys, row whose values are of SAEs trained for one number of atoms)]."""
    gaps = {of_keys["k_key"]: over_layers(of_values, "fvu_val", of_keys, "fvu_key")
            for of_keys, of_values in splits}
    higher = [clear(*gap) for gap in gaps.values()]
    return verdict("P3", list(gaps.values())[1], grade(all(higher), any(higher)), {
        f"FVU of values less that of keys at {k} atoms": gap for k, gap in gaps.items()})

def judge_split(dual, uniform, reverse):
    """P4 from rows, each of SAEs trained for its split."""
    equal, swapped = worse(uniform, dual), worse(reverse, dual)
    equal_is_better = clear(-equal[0], equal[1])
    word = grade(clear(*equal) and clear(*swapped), clear(*swapped) and not equal_is_better)
    return verdict("P4", equal, word, {"nats by which uniform is worse than dual": equal,
                                       "by which reverse is": swapped})

def judge_noise(claim, dense, candidates):
    """P5 from dense and rows: by rising budget, or each of one layer alone."""
    best = min(candidates, key=lambda row: statistics.mean(row["window_ce"][CHOOSE]))
    most, gain = candidates[-1], worse(dense, best, TEST)
    partly = claim == "P5" and best is not most and clear(*worse(most, best, TEST))
    return verdict(claim, gain, grade(clear(*gain), partly), {
        "best": best["name"], "of": ", ".join(row["name"] for row in candidates),
        "nats by which dense is worse": gain})

def judge_parity_alone(claim, alone):
    """P6 from rows of one layer alone."""
    ratios = {row["name"]: row["ratio"] for row in alone}
    worst, median = max(ratios, key=ratios.get), statistics.median(ratios.values())
    return verdict(claim, (median, None), grade(ratios[worst] <= 1.01, median <= 1.01), {
        "ratio to dense perplexity in the median layer": median,
        f"in the worst of {len(ratios)}, {worst},": ratios[worst]})

def judge_parity(claim, row):
    """P6 from a row of all layers."""
    (low, high), tasks = row["ratio_ci95"], row["tasks"]
    lower = any(clear(-x["delta_acc"], x["delta_acc_stderr"]) for x in tasks.values())
    word = grade(high <= 1.02 and tasks and not lower, high <= 1.1 and not lower)
    return verdict(claim, (row["ratio"], (high - low) / 3.92), word, {
        "ratio to dense perplexity": f"{row['ratio']:.3f} (95 %: {low:.3f} to {high:.3f})",
        **{f"change of accuracy in {name}": (x["delta_acc"], x["delta_acc_stderr"])
           for name, x in tasks.items()}})

def judge_memory(dual, context):
    """P7 from a row and the model's context in tokens."""
    share, pays = dual["bytes_share"], dual["break_even_tokens"]
    return verdict("P7", (share, None), grade(share < 0.5 and pays and pays <= context,
                                              share < 0.5), {
        "share of bf16's bytes per token": share, "bytes of dictionaries": dual["once_bytes"],
        "smaller with them from": f"{pays or 'no number of'} tokens on",
        "the model's context is": context})

def judge_depth(depth):
    """P8 from what `hierarchy` returned."""
    gaps = {f"{name} of {kind}s": gap for kind, by_name in depth["kinds"].items()
            for name, gap in by_name.items()}
    holds = [gap["holds"] for gap in gaps.values()]
    complete = len(gaps) == 6  # else the text has no word with two senses
    lexical = depth["kinds"]["key"]["lexical"]
    return verdict("P8", (lexical["change"], lexical["stderr"]),
                   grade(complete and all(holds), any(holds)), {
        "words with two senses:": " ".join(depth["words"]) or "none (--max-tokens)",
        **{f"{name} changes as claimed by": (gap["change"], gap["stderr"])
           for name, gap in gaps.items()}})

def judge(result, measured):
    """[Verdict] from what evaluate.py wrote and what `measure` returned. A claim whose rows are not
    there is left out."""
    rows, by_method, verdicts = {}, {}, []
    for row in result["rows"]:
        if math.isnan(sum(row["window_ce"])):
            raise sta.UsageError(f"row {row['name']}: its loss is nan, of which no verdict is made")
        rows[row["name"]] = row
        by_method.setdefault(row["method"], []).append(row)
    dense, dual = rows["dense"], rows["dual"]
    if "l1" in rows:
        verdicts.append(judge_shrinkage(dual, rows["l1"]))
    verdicts.append(judge_direction(result["curves"]))
    if "uniform, trained for it" in rows:
        uniform, reverse = rows["uniform, trained for it"], rows["reverse, trained for it"]
        verdicts.append(judge_asymmetry([(dual, reverse), (uniform, uniform), (reverse, dual)]))
        verdicts.append(judge_split(dual, uniform, reverse))
    by_budget = sorted(by_method["dual"], key=lambda row: row["k_key"])
    verdicts.append(judge_noise("P5", dense, by_budget))
    if "one layer" in by_method:
        verdicts.append(judge_noise("P5 one layer", dense, by_method["one layer"]))
    for ending, row in (("", dual), (SEARCHED, rows["searched"])):
        alone = by_method.get(f"one layer{ending}")
        if alone:
            verdicts.append(judge_parity_alone(f"P6 one layer{ending}", alone))
        verdicts.append(judge_parity(f"P6 all layers{ending}", row))
    verdicts.append(judge_memory(dual, measured["context"]))
    return verdicts + ([judge_depth(measured["depth"])] if measured["depth"] else [])

# ------------------------------------------------------------------ the run
def measure(run, args):
    """What the verdicts and tables need beside the rows: the residual stream by dual; which atoms
    occurrences share, by depth; the model's context."""
    ks = {"key": args.k_key, "value": args.k_val}
    windows = run.windows[:max(1, 512 // run.windows.shape[1]), :512]
    codecs, depth = evaluate.dual_codecs(run.saes, args.k_key, args.k_val), None
    if len(run.layers) >= 3:
        codes = read_codes(run.model, run.saes, run.windows, ks)
        depth = hierarchy(codes, run.windows, words_of(run.tokenizer, run.windows))
    return {"stream": stream_change(run.model, codecs, windows, args.sink), "depth": depth,
            "context": context_length(run.model)}

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(
        __doc__, argv, "model saes layer text seq-len k-key k-val sink device dtype out",
        max_tokens=dict(type=int, default=32_768, help="tokens to score (default 32,768)"),
        resume=dict(action="store_true", help="as for evaluate.py"),
        **{name: dict(help="as for evaluate.py") for name in ("tasks", "task_dir", "limit")})
    n_scored, args.max_tokens = args.max_tokens, 4 * args.max_tokens  # P8 reads more text
    run = begin_look(args, "-claims")
    if run.name == "tiny":
        for variant in FACTORS:
            train_controls(variant, run.folder, run.name, run.layers)
    path = evaluate.main([*argv, "--max-tokens", str(n_scored), "--rows", "variants,claims"])
    result, measured = json.loads(path.read_text(encoding="utf-8")), measure(run, args)
    about = {name: result[name] for name in ("text", "text_sha256", "tokens", "seq_len", "dtype")}
    verdicts = judge(result, measured)
    for claim in verdicts:
        if claim["claim"] == "P8":
            claim.update({name: run.about[name] for name in ("tokens", "text_sha256")})
    write_atomic(run.path,
                 json.dumps({**run.about, **about, "claims": verdicts, **measured}) + "\n")
    print(f"wrote {run.path}")

if __name__ == "__main__":
    run_main(main)
