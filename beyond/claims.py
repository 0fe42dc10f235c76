"""Verdicts on the paper's claims P1 to P6 (our numbering: ../README.md), each by a stated rule.

    python -m beyond.claims                       # options are those of evaluate.py

Runs evaluate.py with more rows (--rows claims): the dual budget at an eighth to four times its
atoms, for P5, and P1's rival: ReLU autoencoders with an L1 penalty, steered until as many latents
are active on average as the SAE has atoms; trained first, to saes/l1/, if they are not there. Then
measures what coded keys do to attention, prints the verdicts, writes <model>-claims.json,
-shrinkage.png and -attention.png beside evaluate.py's <model>.json. clear: two standard errors;
those over layers say how layers vary, not how runs would. P6 is judged at the SAEs' own size, which
hardly matters: beyond/scaling.py. Non-goals: P7 (a table), P8 (hierarchy).
"""
import json
import sys

import torch
import torch.nn.functional as F

import evaluate
import plots
import sta
import train_sae
from evaluate import mean_stderr

# ------------------------------------------------------------------ the rival of P1
class L1SAE(sta.TopKSAE):
    """A ReLU autoencoder whose L1 weight follows the number of active latents until that is k."""
    def __init__(self, head_dim, n_latents, k, generator=None):
        super().__init__(head_dim, n_latents, k, generator)
        self.register_buffer("l1_weight", torch.tensor(0.05))

    def loss(self, x, k):
        """As TopKSAE.loss; k is not used, but the SAE's own."""
        target = x / self.scale
        z = F.relu((target - self.b_dec) @ self.W_enc + self.b_enc)  # (N, M)
        error = (target - z @ self.W_dec - self.b_dec).square().sum(-1).mean()
        with torch.no_grad():
            active = (z > 0).sum(-1).float().mean()
            self.l1_weight *= (active / self.k).clamp(0.1, 10) ** 0.03
            self.fired[(z > 0).any(0)] = 1
        return error + self.l1_weight * z.sum(-1).mean()

class ReluCode:
    """A codec of one layer: every positive latent, however many; SAEs trained as L1SAE."""
    def __init__(self, key_sae, value_sae):
        self.saes = key_sae, value_sae

    def encode(self, keys, values):
        """-> for keys, then values: coefficients fp16 (n,), indices int16 (n,), how many of them
        each vector has, int16 (..., H)."""
        stored = []
        for x, sae in zip((keys, values), self.saes):
            z = (x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc  # (..., H, M)
            stored += [z[z > 0].half(), (z > 0).nonzero()[:, -1].short(), (z > 0).sum(-1).short()]
        return tuple(stored)

    def decode(self, stored):
        both = []
        for (z, idx, counts), sae in zip((stored[:3], stored[3:]), self.saes):
            ends = counts.flatten().long().cumsum(0)
            x = F.embedding_bag(idx.long(), sae.W_dec, ends - counts.flatten(), mode="sum",
                                per_sample_weights=z.float())
            both.append((sae.scale * (x + sae.b_dec)).view(*counts.shape, -1))
        return tuple(both)

def train_l1(folder, model_name, layers):
    """The folder of the L1 SAEs beside that of the Top-K SAEs; those of the layers are trained if
    one is not there."""
    settings = sta.load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    root = folder.parent / "l1"
    if not all((root / sta.slug(model_name) / f"layer{i}.key").exists() for i in layers):
        argv = ["--model", model_name, "--out", str(root), "--layer", ",".join(map(str, layers))]
        computed = "layers", "processes", "text_sha256", "model_sha256"  # no options
        for option, value in settings.items():
            if option not in computed and value != "default":
                argv += ["--" + option.replace("_", "-"), str(value)]
        train_sae.main(argv, L1SAE)
    return root / sta.slug(model_name)

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    layers, found = sorted({layer for layer, _ in saes}), []
    for scale in (1 / 8, 1 / 4, 1 / 2, 2, 4):
        budget = int(scale * args.k_key), int(scale * args.k_val)
        if min(budget) >= 1 and max(budget) <= min(sae.n_latents for sae in saes.values()):
            codecs = evaluate.dual_codecs(saes, *budget)
            found.append(evaluate.Row("dual {},{}".format(*budget), codecs, budget, method="dual",
                                      with_tasks=False))
    if not saes:
        raise sta.UsageError("--rows claims: needs SAEs; first run: python train_sae.py")
    folder, _, name = evaluate.find_fitted(args.saes, args.model)
    l1, _ = sta.load_saes(train_l1(folder, name, layers), model, layers)
    codecs = {layer: ReluCode(l1[layer, "key"], l1[layer, "value"]) for layer in layers}
    return [*found, evaluate.Row("l1", codecs)]

# ------------------------------------------------------------------ attention
@torch.no_grad()
def attention_change(model, tokenizer, codecs, windows, sink):
    """What coded keys do to attention, one layer at a time -> ({layer: {qk_error, attention_kl}},
    the map of the head that changes most). qk_error: standard deviation over keys of the error of
    q.k, in units of q.k's own; attention_kl: nats from the dense weights; means over queries."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    ids, columns, most = windows.to(model.device), {}, -1.0
    seen = torch.ones(ids.shape[1], ids.shape[1], device=ids.device).tril()  # (T, T)

    def look():
        return model(input_ids=ids, output_attentions=True, use_cache=False).attentions

    def variance(x):  # (B, query heads, T, T), of each query over the keys that it sees, summed
        mean = (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
        return ((x - mean).square() * seen / seen.sum(-1, keepdim=True)).sum()

    dense = look()
    for layer, codec in codecs.items():
        with sta.reconstruct(model, {layer: evaluate.OneKind("key", codec)}, sink):
            maps = dense[layer].float(), look()[layer].float()  # (B, query heads, T, T)
        # the logarithm of a weight is q.k, up to a number that all keys of a query share
        logs = [x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in maps]
        kl = (maps[0] * (logs[0] - logs[1])).sum(-1).mean((0, 2))  # (query heads,)
        columns[layer] = {"attention_kl": kl.mean().item(), "qk_error": (
            variance(logs[1] - logs[0]) / variance(logs[0])).sqrt().item()}
        if kl.max() > most:
            most, head = kl.max().item(), kl.argmax().item()
            before, after = (x[0, head, :40, :40] for x in maps)
            drawn = {"layer": layer, "head": head, "dense": before.tolist(), "change": (
                after - before).tolist(), "tokens": [tokenizer.decode(i) for i in windows[0, :40]]}
    model.set_attn_implementation(usual)
    return columns, drawn

# ------------------------------------------------------------------ verdicts
def clear(pair): return pair[0] > 2 * (pair[1] or 0)
def spell(pair): return f"{pair[0]:+.4f} ±{pair[1] or 0:.4f}"

def worse(row, a, b):
    """(nats a token by which row a is worse than row b, its paired standard error)."""
    return mean_stderr([x - y for x, y in zip(row[a]["window_ce"], row[b]["window_ce"])])

def say(number, statement, pair, text, holds, partly, rule, rows):
    verdict = "holds" if holds else "holds in part" if partly else "does not hold here"
    print(f"P{number} {verdict}: {statement}: {text}\n   rule: {rule}")
    return {"claim": f"P{number}", "statement": statement, "figure": pair[0], "stderr": pair[1],
            "text": text, "verdict": verdict, "rule": rule, "rows": rows}

def judge_codes(row, curves, attention):
    """P1 to P3 from {name: row}, curves, {row: {layer: columns of attention_change}}."""
    longer = mean_stderr([a["rel_norm_key"] - b["rel_norm_key"] for a, b in zip(
        row["dual"]["by_layer"].values(), row["l1"]["by_layer"].values())])
    lost = worse(row, "l1", "dual")
    qk = {name: mean_stderr([x["qk_error"] for x in attention[name].values()])[0]
          for name in ("dual", "l1")}
    key, value, cos = (torch.tensor([plots.at_eight(layer[kind])[metric]
                                     for layer in curves.values()])
                       for kind, metric in (("key", "fvu"), ("value", "fvu"), ("key", "cos")))
    return [
        say(1, "an L1 penalty shrinks magnitudes, a Top-K budget does not", longer,
            f"|x_hat|/|x| of keys {row['dual']['rel_norm_key']:.3f} by Top-K, "
            f"{row['l1']['rel_norm_key']:.3f} by L1 at as many atoms on average; error of q.k "
            f"{qk['dual']:.3f} and {qk['l1']:.3f} of its spread; L1 is {spell(lost)} nats worse",
            clear(longer) and clear(lost), clear(longer) or clear(lost), "Top-K's keys are clearly "
            "longer (over layers), L1's loss clearly higher; in part: one of them", ["dual", "l1"]),
        say(2, "8 atoms recover over 80 % of a key's direction", mean_stderr(cos),
            f"cosine {cos.mean():.3f}, lowest layer {cos.min():.3f}", (cos >= 0.8).all(),
            cos.mean() >= 0.8, "at least 0.8 in every layer; in part: in the mean", ["curves"]),
        say(3, "values need more atoms than keys", mean_stderr(value - key),
            f"FVU at 8 atoms: values {value.mean():.3f}, keys {key.mean():.3f}; values higher in "
            f"{(value > key).sum()} of {len(key)} layers", (value > key).all(),
            clear(mean_stderr(value - key)), "higher for values in every layer; in part: clearly "
            "in the mean", ["curves"])]

def judge_losses(row):
    """P4 to P6 from {name: row}."""
    uniform, reverse = worse(row, "uniform", "dual"), worse(row, "reverse", "dual")
    scale = sorted((name for name in row if row[name]["method"] == "dual"),
                   key=lambda name: row[name]["k_key"])
    gain = worse(row, "dense", min(scale, key=lambda name: row[name]["ce"]))
    helps = any(clear(worse(row, b, a)) for i, a in enumerate(scale) for b in scale[i + 1:])
    (low, high), ratio = row["dual"]["ratio_ci95"], row["dual"]["ratio"]
    tasks = row["dual"]["tasks"]
    lost = any(clear((-x["delta_acc"], x["delta_acc_stderr"])) for x in tasks.values())
    change = [f"{name} {100 * x['delta_acc']:+.1f} ±{100 * (x['delta_acc_stderr'] or 0):.1f}"
              for name, x in tasks.items()] or ["not measured (--tasks)"]
    return [
        say(4, "fewer atoms for keys than for values is the better split", uniform,
            f"against dual, uniform is {spell(uniform)} nats worse and reverse {spell(reverse)}",
            clear(uniform) and clear(reverse), clear(uniform) or clear(reverse),
            "both are clearly worse; in part: one of them", ["dual", "uniform", "reverse"]),
        say(5, "dropping lower-ranked atoms removes noise and improves perplexity", gain,
            ", ".join(f"{name} {row[name]['perplexity']:.2f}" for name in ("dense", *scale)),
            clear(gain), helps, "some budget is clearly better than dense; in part: than a larger "
            "budget of the same SAEs", [*scale, "dense"]),
        say(6, "perplexity and zero-shot accuracy are comparable to dense",
            (ratio, (high - low) / 3.92), f"perplexity x {ratio:.3f} (95 %: {low:.3f} to "
            f"{high:.3f}); accuracy, points: {', '.join(change)}",
            high <= 1.02 and tasks and not lost, high <= 1.1 and not lost, "at most 2 % more "
            "perplexity (upper bound), tasks measured, none clearly lower; in part: at most 10 %, "
            "none clearly lower", ["dense", "dual"])]

# ------------------------------------------------------------------ pictures, and the run
def draw_shrinkage(result, attention):
    figure, panels = plots.plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    by_layer, norms, errors = {row["name"]: row["by_layer"] for row in result["rows"]}, {}, {}
    for row, look in (("dual", ("#009E73", "D", "-")), ("l1", ("#56B4E9", "h", "--"))):
        norms[row] = *look, {layer: x["rel_norm_key"] for layer, x in by_layer[row].items()}
        errors[row] = *look, {layer: x["qk_error"] for layer, x in attention[row].items()}
    plots.draw_by_layer(panels[0], norms, "|x_hat| / |x| of keys")
    plots.draw_by_layer(panels[1], errors, "error of q·k, in standard deviations of q·k")
    figure.suptitle(f"{result['model']}: keys under a Top-K budget (dual) and an L1 penalty (l1)")
    return figure

def draw_attention(result, found):
    figure, panels = plots.plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    most = max(abs(x) for row in found["change"] for x in row)
    words = [word.strip() or "␣" for word in found["tokens"]]
    for panel, name, colours, low, high in ((panels[0], "dense", "Greys", 0, 1),
                                            (panels[1], "change", "PuOr", -most, most)):
        shown = panel.imshow(found[name], cmap=colours, vmin=low, vmax=high)
        figure.colorbar(shown, ax=panel, shrink=0.75, label=f"attention weight, {name}")
        panel.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
        panel.set_yticks(range(len(words)), words, fontsize=6)
        panel.set_xlabel("key")
    panels[0].set_ylabel("query")
    figure.suptitle(f"{result['model']}: attention of the head that coded keys change most, layer "
                    f"{found['layer']}, head {found['head']}")
    return figure

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = evaluate.parse_args(argv, __doc__)
    if args.only:
        raise sta.UsageError(f"--only {args.only}: the verdicts take all rows; leave it out")
    if not evaluate.find_fitted(args.saes, args.model)[1]:
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    path = evaluate.main([*argv, "--rows", ",".join(filter(None, [args.rows, "claims"]))])
    result = json.loads(path.read_text())
    folder, _, name = evaluate.find_fitted(args.saes, args.model)
    model, tokenizer, _ = sta.load_model(name, *sta.pick_device(args.device, args.dtype))
    windows = sta.token_windows(sta.read_text(args.text, "valid", name), tokenizer, model,
                                args.seq_len, 2048, 512)[:, :512]
    attention, layers = {}, result["layers"]
    for row, where in (("l1", train_l1(folder, name, layers)), ("dual", folder)):
        saes, _ = sta.load_saes(where, model, layers)
        codecs = evaluate.dual_codecs(saes, args.k_key, args.k_val)
        if row == "l1":
            codecs = {layer: ReluCode(saes[layer, "key"], saes[layer, "value"]) for layer in layers}
        attention[row], drawn = attention_change(model, tokenizer, codecs, windows, args.sink)
    by_name = {row["name"]: row for row in result["rows"]}
    claims = judge_codes(by_name, result["curves"], attention) + judge_losses(by_name)
    out = path.with_name(f"{path.stem}-claims.json")
    sta.write_atomic(out, json.dumps(
        {"model": name, "result": str(path), **evaluate.provenance(model), "claims": claims,
         "attention": attention, "attention_map": drawn}, indent=1) + "\n")
    print(f"wrote {out}")
    plots.save(draw_shrinkage(result, attention), path.with_name(f"{path.stem}-shrinkage.png"))
    plots.save(draw_attention(result, drawn), path.with_name(f"{path.stem}-attention.png"))

if __name__ == "__main__":
    sta.run(main)
