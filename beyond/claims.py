"""Verdicts on the paper's claims P1 to P8 (as README.md numbers them), each printed with its rule.

    python -m beyond.claims                       # tiny: three minutes, with the SAEs of P1's rival

Runs evaluate.py with --rows variants,claims: the dual budget at an eighth to four times its atoms,
for P5, and autoencoders with an L1 penalty (beyond/variants.py) for P1, which are trained first if
they are not there. Then it measures what coded keys do to attention and which atoms occurrences
share (beyond/atoms.py), prints the verdicts, and writes <model>-claims.json and -shrinkage.png
beside evaluate.py's <model>.json. *Clear* means two standard errors; those over layers say how
layers vary, not how runs would.
"""
import json
import sys

import torch

import evaluate
import plots
import sta
import train_sae
from beyond import begin_look, parse_args
from beyond.atoms import hierarchy, print_hierarchy, read_codes, words_of
from beyond.variants import VARIANTS, ReluCode, beside
from evaluate import mean_stderr

# ------------------------------------------------------------------ the rows
def train_l1(folder, model_name, layers):
    """The folder of the L1 SAEs beside that of the Top-K SAEs; those of the layers are trained with
    the same settings if one is not there."""
    settings = sta.load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    l1 = beside(folder, "l1")
    if not all((l1 / f"layer{layer}.value").exists() for layer in layers):
        argv = ["--model", model_name, "--out", str(l1.parent), "--layer",
                ",".join(map(str, layers))]
        computed = "layers", "processes", "text_sha256", "model_sha256"  # no options
        for option, value in settings.items():
            if option not in computed and value != "default":
                argv += ["--" + option.replace("_", "-"), str(value)]
        train_sae.main(argv, VARIANTS["l1"]())
    return l1

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    new_rows, most = [], min((sae.n_latents for sae in saes.values()), default=0)
    for scale in (1 / 8, 1 / 4, 1 / 2, 2, 4):
        budget = int(scale * args.k_key), int(scale * args.k_val)
        if min(budget) >= 1 and max(budget) <= most:
            codecs = evaluate.dual_codecs(saes, *budget)
            new_rows.append(evaluate.Row("dual {},{}".format(*budget), codecs, budget,
                                         method="dual", with_tasks=False))
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

# ------------------------------------------------------------------ verdicts
def clear(mean, stderr):
    """More than two standard errors above zero; without a standard error nothing is clear."""
    return stderr is not None and mean > 2 * stderr

def spell(mean, stderr):
    return f"{mean:+.4f} ±{float('nan') if stderr is None else stderr:.4f}"

def worse(row, a, b):
    """(nats per token by which row a is worse than row b, its paired standard error)."""
    return mean_stderr([x - y for x, y in zip(row[a]["window_ce"], row[b]["window_ce"])])

def verdict(claim, statement, estimate, measured, holds, partly, rule):
    """estimate: (figure, its standard error); measured: the figures in words."""
    word = "holds" if holds else "holds in part" if partly else "does not hold here"
    print(f"{claim} {word}: {statement}: {measured}\n   rule: {rule}")
    return {"claim": claim, "statement": statement, "figure": estimate[0], "stderr": estimate[1],
            "measured": measured, "verdict": word, "rule": rule}

def judge_codes(row, curves, attention):
    """P1 to P3 from {name: row}, curves, {row: {layer: columns of attention_change}}."""
    norm_gap = mean_stderr([a["rel_norm_key"] - b["rel_norm_key"] for a, b in zip(
        row["dual"]["by_layer"].values(), row["l1"]["by_layer"].values())])
    l1_excess = worse(row, "l1", "dual")
    qk = {name: mean_stderr([x["qk_error"] for x in attention[name].values()])[0]
          for name in ("dual", "l1")}
    key, value, cos = (torch.tensor([plots.at_eight(layer[kind])[metric]
                                     for layer in curves.values()])
                       for kind, metric in (("key", "fvu"), ("value", "fvu"), ("key", "cos")))
    return [
        verdict("P1", "an L1 penalty shrinks magnitudes, a Top-K budget does not", norm_gap,
                f"|x_hat|/|x| of keys {row['dual']['rel_norm_key']:.3f} by Top-K, "
                f"{row['l1']['rel_norm_key']:.3f} by L1 at as many atoms on average; error of q.k "
                f"{qk['dual']:.3f} and {qk['l1']:.3f} of its spread; L1 is {spell(*l1_excess)} "
                "nats worse", clear(*norm_gap) and clear(*l1_excess),
                clear(*norm_gap) or clear(*l1_excess),
                "Top-K's keys are clearly longer (over layers) and L1's loss is clearly higher; in "
                "part: one of them"),
        verdict("P2", "8 atoms recover over 80 % of a key's direction", mean_stderr(cos),
                f"cosine {cos.mean():.3f}, lowest layer {cos.min():.3f}", (cos >= 0.8).all(),
                cos.mean() >= 0.8, "at least 0.8 in every layer; in part: in the mean"),
        verdict("P3", "values need more atoms than keys", mean_stderr(value - key),
                f"FVU at 8 atoms: values {value.mean():.3f}, keys {key.mean():.3f}; values higher "
                f"in {(value > key).sum()} of {len(key)} layers", (value > key).all(),
                clear(*mean_stderr(value - key)), "higher for values in every layer; in part: "
                "clearly in the mean")]

def judge_losses(row):
    """P4 to P7 from {name: row}."""
    uniform, reverse = worse(row, "uniform", "dual"), worse(row, "reverse", "dual")
    budgets = sorted((name for name in row if row[name]["method"] == "dual"),
                     key=lambda name: row[name]["k_key"])
    gain = worse(row, "dense", min(budgets, key=lambda name: row[name]["ce"]))
    helps = any(clear(*worse(row, b, a)) for i, a in enumerate(budgets) for b in budgets[i + 1:])
    (low, high), ratio = row["dual"]["ratio_ci95"], row["dual"]["ratio"]
    tasks, share = row["dual"]["tasks"], row["dual"]["bytes_share"]
    some_task_lower = any(clear(-x["delta_acc"], x["delta_acc_stderr"]) for x in tasks.values())
    change = [f"{name} {100 * x['delta_acc']:+.1f} ±{100 * (x['delta_acc_stderr'] or 0):.1f}"
              for name, x in tasks.items()] or ["not measured (--tasks)"]
    return [
        verdict("P4", "fewer atoms for keys than for values is the better split", uniform,
                f"against dual, uniform is {spell(*uniform)} nats worse and reverse "
                f"{spell(*reverse)}", clear(*uniform) and clear(*reverse),
                clear(*reverse) and not clear(-uniform[0], uniform[1]), "both are clearly worse; "
                "in part: reverse is, and uniform is not clearly better"),
        verdict("P5", "dropping lower-ranked atoms removes noise and improves perplexity", gain,
                ", ".join(f"{name} {row[name]['perplexity']:.2f}" for name in ("dense", *budgets)),
                clear(*gain), helps, "some budget is clearly better than dense; in part: than a "
                "larger budget of the same SAEs"),
        verdict("P6", "perplexity and zero-shot accuracy are comparable to dense",
                (ratio, (high - low) / 3.92), f"perplexity x {ratio:.3f} (95 %: {low:.3f} to "
                f"{high:.3f}); accuracy, points: {', '.join(change)}",
                high <= 1.02 and tasks and not some_task_lower,
                high <= 1.1 and not some_task_lower, "at most 2 % more "
                "perplexity (upper bound), tasks measured, none clearly lower; in part: at most "
                "10 %, none clearly lower"),
        verdict("P7", "significantly less memory", (share, None), f"{100 * share:.4g} % of bf16, "
                f"and {row['dual']['once_bytes']:,} bytes of dictionaries, once: smaller from "
                f"{row['dual']['break_even_tokens'] or 'no number of'} tokens on", share < 0.5,
                share < 1, "less than half of bf16's bytes per token; in part: fewer bytes")]

def judge_depth(result):
    """P8 from what beyond.atoms.hierarchy returned, of three layers or more."""
    print_hierarchy(result)
    gaps = [gap for kind in result["kinds"].values() for gap in kind.values()]
    complete = len(gaps) == 6  # else the text has no word with two senses
    lexical = result["kinds"]["key"]["lexical"]
    return [verdict("P8", "shallow layers are lexical, deep layers tell senses apart",
                    (lexical["change"], lexical["stderr"]), "lexical atoms of keys fall by "
                    f"{spell(lexical['change'], lexical['stderr'])}; "
                    f"{sum(g['holds'] for g in gaps)} of {len(gaps)} changes are as claimed",
                    complete and all(g["holds"] for g in gaps), any(g["holds"] for g in gaps),
                    "lexical and ngram clearly fall, sense clearly "
                    "grows, for keys and values; in part: some of them do")]

# ------------------------------------------------------------------ pictures, and the run
def draw_shrinkage(result, attention):
    figure, panels = plots.plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    by_layer, norms, errors = {row["name"]: row["by_layer"] for row in result["rows"]}, {}, {}
    for row, style in (("dual", ("#009E73", "D", "-")), ("l1", ("#56B4E9", "h", "--"))):
        norms[row] = *style, {layer: x["rel_norm_key"] for layer, x in by_layer[row].items()}
        errors[row] = *style, {layer: x["qk_error"] for layer, x in attention[row].items()}
    plots.draw_by_layer(panels[0], norms, "|x_hat| / |x| of keys")
    plots.draw_by_layer(panels[1], errors, "error of q·k, in standard deviations of q·k")
    figure.suptitle(f"{result['model']}: keys under a Top-K budget (dual) and an L1 penalty (l1)")
    return figure

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(
        __doc__, argv, "model saes layer text seq-len k-key k-val sink device dtype out",
        max_tokens=dict(type=int, default=32_768, help="tokens to score (default 32,768)"),
        tasks=dict(help="as for evaluate.py"), task_dir=dict(help="as for evaluate.py"),
        limit=dict(type=int, help="rows of each task (default all)"))
    n_scored, args.max_tokens = args.max_tokens, 131_072  # as many as beyond/atoms.py reads
    run = begin_look(args, "-claims")
    l1, _ = sta.load_saes(train_l1(run.folder, run.name, run.layers), run.model, run.layers)
    path = evaluate.main([*argv, "--max-tokens", str(n_scored), "--rows", "variants,claims"])
    result, attention = json.loads(path.read_text()), {}
    windows = run.windows[:max(1, 512 // run.windows.shape[1]), :512]
    dual = evaluate.dual_codecs(run.saes, args.k_key, args.k_val)
    relu = {layer: ReluCode(l1[layer, "key"], l1[layer, "value"]) for layer in run.layers}
    for row, codecs in (("l1", relu), ("dual", dual)):
        attention[row] = attention_change(run.model, codecs, windows, args.sink)
    by_name = {row["name"]: row for row in result["rows"]}
    claims = judge_codes(by_name, result["curves"], attention) + judge_losses(by_name)
    if len(run.layers) >= 3:
        codes, _, _ = read_codes(run.model, run.saes, run.windows, {
            "key": args.k_key, "value": args.k_val})
        depth = judge_depth(hierarchy(codes, run.windows, words_of(run.tokenizer, run.windows)))
        claims += [{**depth[0], **{name: run.about[name] for name in ("tokens", "text_sha256")}}]
    about = {name: result[name] for name in ("text", "text_sha256", "tokens", "seq_len", "dtype")}
    sta.write_atomic(run.path, json.dumps({**run.about, **about, "claims": claims,
                                           "attention": attention}) + "\n")
    print(f"wrote {run.path}")
    plots.save(draw_shrinkage(result, attention), path.with_name(f"{path.stem}-shrinkage.png"))

if __name__ == "__main__":
    sta.run(main)
