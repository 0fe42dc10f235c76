"""Verdicts on the paper's claims P1 to P8 (as README.md numbers them), each printed with its rule.

    python -m beyond.claims                       # tiny: ten minutes, with the SAEs of the controls
    python -m beyond.claims --judge               # only judges again what results/ holds

Runs evaluate.py with --rows variants,claims: single layers, for P6; the dual budget at a half and
twice its atoms, for P5; the heads' means without atoms, for P2. Controls come from
beyond/variants.py: splits, SAEs trained for (12, 12) and (16, 8), for P3 and P4; l1, autoencoders
with an L1 penalty, for P1. For tiny they are trained if they are not there; for other models the
claims that need them are left out. Then it measures what coding does to attention and to the
residual stream, and which atoms occurrences share (beyond/depth.py), prints the verdicts, and
writes <model>-claims.json and -shrinkage.png beside evaluate.py's <model>.json. *Clear* means two
standard errors; those over layers say how layers vary, not how runs would.
"""
import json
import statistics
import sys

import torch

import evaluate
import plots
import sta
import train_sae
from beyond import begin_look, parse_args
from beyond.depth import hierarchy, print_hierarchy, read_codes, words_of
from beyond.variants import VARIANTS, ReluCode, beside, search, settings_of
from evaluate import mean_stderr
from support.files import explain, load_sae, load_saes, run_main, write_atomic
from support.models import slug

# ------------------------------------------------------------------ the rows
# An L1 penalty takes longer: at the SAEs' own settings it leaves twice as much variance.
FACTORS = {"splits": {}, "l1": {"tokens": 3, "lr": 4}}

def train_controls(what, folder, model_name, layers):
    """Train the variant `what` beside the SAEs of a folder, with their settings times FACTORS,
    unless it is there."""
    settings = load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    there = beside(folder, what)
    if not all(list(there.glob(f"layer{layer}.value*")) for layer in layers):
        argv = ["--model", model_name, "--out", str(there.parent), "--layer",
                ",".join(map(str, layers))]
        computed = "layers", "text_sha256", "model_sha256"  # no options
        for option, value in settings.items():
            if option not in computed and value != "default":
                value = value * FACTORS[what][option] if option in FACTORS[what] else value
                argv += ["--" + option.replace("_", "-"), str(value)]
        train_sae.main(argv, VARIANTS[what]())

class HeadMeans:
    """A codec of one layer that keeps nothing: each vector becomes the mean of its head."""

    def __init__(self, key_sae, value_sae):
        self.means = key_sae.b_dec, value_sae.b_dec  # (H, D) each

    def encode(self, keys, values):
        return (keys.new_empty(*keys.shape[:-2], 0),)

    def decode(self, stored):
        return tuple(mean.expand(*stored[0].shape[:-1], *mean.shape) for mean in self.means)

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    dual = evaluate.dual_codecs(saes, args.k_key, args.k_val)
    most = min((sae.n_latents for sae in saes.values()), default=0)
    once_bytes = evaluate.dictionary_bytes(saes, *sta.KINDS)
    means = {layer: HeadMeans(codec.key_sae, codec.value_sae) for layer, codec in dual.items()}
    common = {"settings": settings_of(before), "with_tasks": False}
    new_rows = [evaluate.Row("head means", means, (0, 0), **common)]
    for method, scale in (("dual", 1 / 2), ("dual", 2), ("searched", 2)):
        budget = int(scale * args.k_key), int(scale * args.k_val)
        if min(budget) >= 1 and max(budget) <= most:
            codecs = evaluate.dual_codecs(saes, *budget)
            codecs = search(codecs) if method == "searched" else codecs
            new_rows.append(evaluate.Row("{} {},{}".format(method, *budget), codecs, budget,
                                         once_bytes, method=method, **common))
    for layer in list(dual)[::1 if len(dual) <= 12 else 3]:
        one_pass = {layer: dual[layer]}
        for ending, codecs in (("", one_pass), (", searched", search(one_pass))):
            new_rows.append(evaluate.Row(
                f"layer {layer} alone{ending}", codecs, dual[layer].budget,
                once_bytes // len(dual), method=f"one layer{ending}", **common))
    return new_rows

# ------------------------------------------------------------------ attention
@torch.no_grad()
def attention_change(model, codecs, windows, sink):
    """What coded keys do to attention, one layer at a time -> {layer: {qk_error, attention_kl}}.
    qk_error: standard deviation over keys of the error of q.k, in units of q.k's own; attention_kl:
    nats from the dense weights. Variances are summed over queries; the divergence is their mean."""
    attention_before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    ids, columns = windows.to(model.device), {}
    seen = torch.ones(ids.shape[1], ids.shape[1], device=ids.device).tril()  # (T, T)

    def log_weights(layer):  # (B, query heads, T, T): q.k, up to a number that a query's keys share
        maps = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        return maps[layer].float().clamp_min(torch.finfo(torch.float32).tiny).log()

    def variance(x):  # (B, query heads, T, T), of each query over the keys that it sees, summed
        mean = (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
        return ((x - mean).square() * seen / seen.sum(-1, keepdim=True)).sum()

    for layer, codec in codecs.items():
        dense = log_weights(layer)
        with sta.reconstruct(model, {layer: evaluate.OneKind("key", codec)}, sink):
            coded = log_weights(layer)
        kl = (dense.exp() * (dense - coded)).sum(-1).mean()
        columns[layer] = {"attention_kl": kl.item(), "qk_error": (
            variance(coded - dense) / variance(dense)).sqrt().item()}
    model.set_attn_implementation(attention_before)
    return columns

@torch.no_grad()
def stream_change(model, codecs, windows, sink):
    """How coding one layer changes the residual stream after it -> {layer: change / spread}, both
    as norms over tokens, those kept exact left out."""
    def streams():  # what each layer leaves; the last one's, after the final norm
        return model.get_decoder()(input_ids=windows.to(model.device), use_cache=False,
                                   output_hidden_states=True).hidden_states[1:]

    dense, changes = streams(), {}
    for layer, codec in codecs.items():
        with sta.reconstruct(model, {layer: codec}, sink):
            coded = streams()[layer]
        before, after = (x[:, sink:].flatten(0, 1).float() for x in (dense[layer], coded))
        change, spread = (after - before).norm(), (before - before.mean(0)).norm()
        changes[str(layer)] = (change / spread).item()
    return changes

# ------------------------------------------------------------------ verdicts
def clear(mean, stderr):
    """More than two standard errors above zero; without a standard error nothing is clear."""
    return stderr is not None and mean > 2 * stderr

def spell(mean, stderr):
    return f"{mean:+.4f} ±{float('nan') if stderr is None else stderr:.4f}"

def worse(a, b, windows=slice(None)):
    """(nats per token by which row a is worse than row b, its standard error), paired over some
    of the windows."""
    pairs = zip(a["window_ce"][windows], b["window_ce"][windows])
    return mean_stderr([x - y for x, y in pairs])

CHOOSE, TEST = slice(0, None, 2), slice(1, None, 2)  # every other window

def chosen(candidates):
    """Of rows, the one with the lowest loss on the windows that choose."""
    return min(candidates, key=lambda row: statistics.mean(row["window_ce"][CHOOSE]))

# What is claimed; what the figure in the tables is; when the claim holds, and when in part.
ONE_LAYER = ("one layer coded: perplexity is comparable to the dense model's",
             "ratio to dense perplexity, of the median layer",
             "each measured layer alone raises perplexity by at most 1 %; in part: the median one "
             "does")
ALL_LAYERS = ("all layers coded: perplexity and accuracy are comparable to dense",
              "ratio to dense perplexity",
              "at most 2 % more perplexity (upper bound), tasks measured, none clearly lower; in "
              "part: at most 10 %, none clearly lower")
CLAIMS = {
    "P1": ("an L1 penalty shrinks magnitudes, a Top-K budget does not",
           "length of a key by Top-K minus that by L1, as a share of its own",
           "Top-K's keys are clearly longer (over layers) and L1's loss is clearly higher; in "
           "part: one of them"),
    "P2": ("8 atoms recover over 80 % of a key's direction",
           "cosine of a key and its reconstruction",
           "a cosine of at least 0.8 in every layer; in part: in the mean over layers; nearly "
           "free: the head's mean alone has as much, in the mean"),
    "P3": ("values need more atoms than keys",
           "FVU of values minus that of keys, by SAEs trained for 12 atoms",
           "at each of three budgets, of SAEs trained for it, clearly more variance within heads "
           "is left of values than of keys (over layers); in part: at some budget"),
    "P4": ("fewer atoms for keys than for values is the better split",
           "nats by which 12 and 12 atoms are worse",
           "equal atoms for both, and more for keys, are both clearly worse, each by SAEs trained "
           "for it; in part: the second is, and equal atoms are not clearly better"),
    "P5": ("dropping weak atoms removes noise and improves perplexity, in all layers",
           "nats by which the best of k/2, k and 2k beats dense, on half of the text",
           "of k/2, k and 2k, the best budget by half of the windows is clearly better than dense "
           "on the other half; in part: clearly better there than the largest of them"),
    "P5 one layer": ("the same in one layer", "nats by which the best beats dense",
                     "the layer that gains most on half of the windows is clearly better than "
                     "dense on the other half"),
    "P6 one layer": ONE_LAYER, "P6 one layer, searched": ONE_LAYER,
    "P6 all layers": ALL_LAYERS, "P6 all layers, searched": ALL_LAYERS,
    "P7": ("significantly less memory", "share of bf16's bytes per token",
           "less than half of bf16's bytes per token, and with the dictionaries fewer bytes within "
           "one context of the model; in part: the first"),
    "P8": ("atoms of shallow layers follow the word, those of deep layers its sense",
           "share of atoms that keys of one word have in common, less that of keys of different "
           "words; shallow minus deep",
           "lexical and ngram clearly fall, sense clearly grows, for keys and values; in part: "
           "some of them do")}

def verdict(claim, estimate, word, measured):
    """estimate: (figure, its standard error); measured: the figures in words."""
    statement, _, rule = CLAIMS[claim]
    print(f"{claim} {word}: {statement}: {measured}\n   rule: {rule}")
    return {"claim": claim, "figure": estimate[0], "stderr": estimate[1], "verdict": word,
            "measured": measured}

def grade(holds, partly=False):
    return "holds" if holds else "holds in part" if partly else "does not hold here"

def judge_shrinkage(dual, l1, attention):
    """P1 from two rows and {row: {layer: columns of attention_change}}."""
    norm_gap = mean_stderr([a["rel_norm_key"] - b["rel_norm_key"] for a, b in zip(
        dual["by_layer"].values(), l1["by_layer"].values())])
    excess = worse(l1, dual)
    qk = {name: mean_stderr([x["qk_error"] for x in attention[name].values()])[0]
          for name in ("dual", "l1")}
    word = grade(clear(*norm_gap) and clear(*excess), clear(*norm_gap) or clear(*excess))
    return verdict(
        "P1", norm_gap, word,
        f"|x_hat|/|x| of keys {dual['rel_norm_key']:.3f} by Top-K, {l1['rel_norm_key']:.3f} by L1 "
        f"at as many atoms on average; error of q.k {qk['dual']:.3f} and {qk['l1']:.3f} of its "
        f"spread; L1 is {spell(*excess)} nats worse")

def judge_direction(curves):
    """P2 from {layer: curves}."""
    at = {k: [point for layer in curves.values() for point in layer["key"] if point["k"] == k]
          for k in (0, 8)}
    cos, alone = ([point["cos"] for point in at[k]] for k in (8, 0))
    word = grade(min(cos) >= 0.8, statistics.mean(cos) >= 0.8)
    explained = 1 - statistics.mean(point["fvu"] for point in at[8])
    if word == "holds" and statistics.mean(alone) >= 0.8:
        word = "holds, nearly free"
    return verdict(
        "P2", mean_stderr(cos), word,
        f"cosine {statistics.mean(cos):.3f}, lowest layer {min(cos):.3f}; without an atom, by the "
        f"head's mean alone, {statistics.mean(alone):.3f}; 8 atoms explain {100 * explained:.0f} % "
        "of the variance within heads")

def judge_asymmetry(splits):
    """P3 from [(k, row whose keys, row whose values are of SAEs trained for k atoms)]."""
    gaps = {}
    for k, of_keys, of_values in splits:
        keys = [columns["fvu_key"] for columns in of_keys["by_layer"].values()]
        values = [columns["fvu_val"] for columns in of_values["by_layer"].values()]
        gaps[k] = mean_stderr([value - key for key, value in zip(keys, values)])
    higher = [clear(*gap) for gap in gaps.values()]
    return verdict(
        "P3", gaps[splits[1][0]], grade(all(higher), any(higher)),
        "FVU of values less that of keys, SAEs trained for these atoms: " + ", ".join(
            f"{spell(*gap)} at {k}" for k, gap in gaps.items()))

def judge_split(dual, uniform, reverse):
    """P4 from rows, each of SAEs trained for its split."""
    over = {"uniform": worse(uniform, dual), "reverse": worse(reverse, dual)}
    better = clear(-over["uniform"][0], over["uniform"][1])
    word = grade(clear(*over["uniform"]) and clear(*over["reverse"]),
                 clear(*over["reverse"]) and not better)
    return verdict(
        "P4", over["uniform"], word,
        f"against dual, uniform is {spell(*over['uniform'])} nats worse and reverse "
        f"{spell(*over['reverse'])}, each by SAEs trained for it")

def judge_noise(dense, by_budget, alone):
    """P5 from dense, rows by rising budget and rows of one layer alone: two verdicts."""
    best, most = chosen(by_budget), by_budget[-1]
    gain = worse(dense, best, TEST)
    helps = best is not most and clear(*worse(most, best, TEST))
    verdicts = [verdict(
        "P5", gain, grade(clear(*gain), helps),
        f"best of {', '.join(row['name'] for row in by_budget)}: {best['name']}, which gains "
        f"{spell(*gain)} nats on dense")]
    if alone:
        best = chosen(alone)
        gain = worse(dense, best, TEST)
        verdicts.append(verdict(
            "P5 one layer", gain, grade(clear(*gain)),
            f"best of {len(alone)} layers: {best['name']}, which gains {spell(*gain)} nats on "
            "dense"))
    return verdicts

def judge_parity_alone(alone, ending, stream):
    """P6 from rows of one layer alone, and what `stream_change` returned, or {}."""
    ratios = {row["name"]: row["ratio"] for row in alone}
    worst, median = max(ratios, key=ratios.get), statistics.median(ratios.values())
    within = [ratio <= 1.01 for ratio in ratios.values()]
    why = ""
    if stream and not ending:
        why = (f"; the error is {stream[worst.split()[1]]:.3f} of the residual stream's spread "
               f"there, {statistics.median(stream.values()):.3f} in the median layer")
    return verdict(
        f"P6 one layer{ending}", (median, None), grade(all(within), median <= 1.01),
        f"perplexity x {median:.4f} in the median layer, {ratios[worst]:.4f} in the worst "
        f"({worst}); {sum(within)} of {len(within)} layers within 1 %{why}")

def judge_parity(row, ending):
    """P6 from a row of all layers."""
    (low, high), tasks = row["ratio_ci95"], row["tasks"]
    lower = any(clear(-x["delta_acc"], x["delta_acc_stderr"]) for x in tasks.values())
    change = [f"{name} {100 * x['delta_acc']:+.1f} ±{100 * (x['delta_acc_stderr'] or 0):.1f}"
              for name, x in tasks.items()] or ["not measured (--tasks)"]
    word = grade(high <= 1.02 and tasks and not lower, high <= 1.1 and not lower)
    return verdict(
        f"P6 all layers{ending}", (row["ratio"], (high - low) / 3.92), word,
        f"perplexity x {row['ratio']:.3f} (95 %: {low:.3f} to {high:.3f}); accuracy, points: "
        f"{', '.join(change)}")

def judge_memory(dual, context):
    """P7 from a row and the model's context in tokens."""
    share, pays = dual["bytes_share"], dual["break_even_tokens"]
    return verdict(
        "P7", (share, None), grade(share < 0.5 and pays and pays <= context, share < 0.5),
        f"{100 * share:.4g} % of bf16's bytes per token, and {dual['once_bytes']:,} bytes of "
        f"dictionaries, once: smaller from {pays or 'no number of'} tokens on, of all sequences "
        f"together; the model's context is {context:,}")

def judge_depth(result):
    """P8 from what beyond.depth.hierarchy returned, of three layers or more."""
    print_hierarchy(result)
    gaps = [gap for kind in result["kinds"].values() for gap in kind.values()]
    complete = len(gaps) == 6  # else the text has no word with two senses
    holds = [gap["holds"] for gap in gaps]
    lexical = result["kinds"]["key"]["lexical"]
    return verdict(
        "P8", (lexical["change"], lexical["stderr"]), grade(complete and all(holds), any(holds)),
        f"lexical atoms of keys fall by {spell(lexical['change'], lexical['stderr'])} "
        f"({lexical['shallow']:.3f} in shallow layers, {lexical.get('middle', float('nan')):.3f} "
        f"in middle, {lexical['deep']:.3f} in deep ones); {sum(holds)} of {len(gaps)} changes are "
        "as claimed")

def judge(result, measured):
    """Verdicts from what evaluate.py wrote, and {attention, context, depth} of `measure`. A claim
    whose rows are not there is left out."""
    row = {row["name"]: row for row in result["rows"]}
    splits, verdicts = ("uniform, trained for it", "reverse, trained for it"), []
    if "l1" in row:
        verdicts.append(judge_shrinkage(row["dual"], row["l1"], measured["attention"]))
    verdicts.append(judge_direction(result["curves"]))
    if splits[0] in row:
        dual, uniform, reverse = (row[name] for name in ("dual", *splits))
        verdicts += [
            judge_asymmetry([(dual["k_key"], dual, reverse), (uniform["k_key"], uniform, uniform),
                             (reverse["k_key"], reverse, dual)]),
            judge_split(dual, uniform, reverse)]
    by_budget = sorted((x for x in row.values() if x["method"] == "dual"),
                       key=lambda x: x["k_key"])
    alone = {ending: [x for x in row.values() if x["method"] == f"one layer{ending}"]
             for ending in ("", ", searched")}
    verdicts += judge_noise(row["dense"], by_budget, alone[""])
    verdicts += [judge_parity_alone(rows, ending, measured.get("stream"))
                 for ending, rows in alone.items() if rows]
    verdicts += [judge_parity(row["dual"], ""), judge_parity(row["searched"], ", searched"),
                 judge_memory(row["dual"], measured["context"])]
    if measured["depth"]:
        verdicts.append(judge_depth(measured["depth"]))
    return verdicts

# ------------------------------------------------------------------ pictures, and the run
def draw_shrinkage(result, attention):
    figure, panels = plots.plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    by_layer, norms, errors = {row["name"]: row["by_layer"] for row in result["rows"]}, {}, {}
    for row in ("dual", "l1"):
        style = plots.STYLE[row]
        norms[style] = {layer: x["rel_norm_key"] for layer, x in by_layer[row].items()}
        errors[style] = {layer: x["qk_error"] for layer, x in attention[row].items()}
    plots.draw_by_layer(panels[0], norms, "|x_hat| / |x| of keys")
    plots.draw_by_layer(panels[1], errors, "error of q·k, in standard deviations of q·k")
    figure.suptitle(f"{result['model']}: keys under a Top-K budget and an L1 penalty")
    return figure

def measure(run, args, l1):
    """What the verdicts need beside the rows: the residual stream by dual; attention by dual and,
    if it is there, by the L1 SAEs of folder l1; the model's context; which atoms occurrences
    share, by depth."""
    windows = run.windows[:max(1, 512 // run.windows.shape[1]), :512]
    codecs, attention = {"dual": evaluate.dual_codecs(run.saes, args.k_key, args.k_val)}, {}
    if l1.exists():
        saes, _ = load_saes(l1, run.model, run.layers)
        codecs["l1"] = {layer: ReluCode(saes[layer, "key"], saes[layer, "value"])
                        for layer in run.layers}
        attention = {name: attention_change(run.model, some, windows, args.sink)
                     for name, some in codecs.items()}
    depth, config = None, run.model.get_decoder().config
    if len(run.layers) >= 3:
        ks = {"key": args.k_key, "value": args.k_val}
        codes = read_codes(run.model, run.saes, run.windows, ks)
        depth = hierarchy(codes, run.windows, words_of(run.tokenizer, run.windows))
    return {"stream": stream_change(run.model, codecs["dual"], windows, args.sink),
            "attention": attention, "depth": depth,
            "context": getattr(config, "max_position_embeddings", 2048)}

def judge_again(out, name):
    """Print the verdicts on a model's result files, as they are now."""
    with explain(f"{out}/{name}.json, {name}-claims.json: not both there; run without --judge"):
        result, measured = (json.loads((out / f"{name}{ending}.json").read_text())
                            for ending in ("", "-claims"))
        judge(result, measured)

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(
        __doc__, argv, "model saes layer text seq-len k-key k-val sink device dtype out",
        max_tokens=dict(type=int, default=32_768, help="tokens to score (default 32,768)"),
        tasks=dict(help="as for evaluate.py"), task_dir=dict(help="as for evaluate.py"),
        limit=dict(type=int, help="rows of each task (default all)"),
        resume=dict(action="store_true", help="as for evaluate.py"),
        judge=dict(action="store_true", help="only judge again what --out holds"))
    n_scored, args.max_tokens = args.max_tokens, 4 * args.max_tokens  # P8 reads more text
    if args.judge:
        return judge_again(args.out, slug(args.model or "tiny"))
    run = begin_look(args, "-claims")
    if run.name == "tiny":
        for what in FACTORS:
            train_controls(what, run.folder, run.name, run.layers)
    path = evaluate.main([*argv, "--max-tokens", str(n_scored), "--rows", "variants,claims"])
    result, measured = json.loads(path.read_text()), measure(run, args, beside(run.folder, "l1"))
    about = {name: result[name] for name in ("text", "text_sha256", "tokens", "seq_len", "dtype")}
    depth_about = {name: run.about[name] for name in ("tokens", "text_sha256")}
    claims = [{**claim, **(depth_about if claim["claim"] == "P8" else {})}
              for claim in judge(result, measured)]
    write_atomic(run.path, json.dumps({**run.about, **about, "claims": claims,
                                           **measured}) + "\n")
    print(f"wrote {run.path}")
    if measured["attention"]:
        figure = draw_shrinkage(result, measured["attention"])
        plots.save(figure, path.with_name(f"{path.stem}-shrinkage.png"))

if __name__ == "__main__":
    run_main(main)
