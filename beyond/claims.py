"""Verdicts on the paper's claims P1 to P8 (as README.md numbers them), each beside its control.

    python -m beyond.claims                       # tiny: ten minutes, with the SAEs of the controls
    python -m beyond.claims --rows variants,rivals,additive    # and whatever else is fitted
    python -m beyond.report write                 # judges again, over seeds, from results.jsonl

Runs evaluate.py with --rows and claims, measures what else a verdict needs, and writes
evaluate.py's <model>.json and <model>-claims.json. The controls of P1, P3 and P4 are SAEs of
beyond/variants.py. For tiny they are trained if they are missing; for other models, a part without
its rows gets no verdict.

A part of a claim *holds* if the 95% interval of its figure lies beyond the threshold, and its
control does not do as well; it is *undecided* if the interval contains the threshold; else *no*.
The interval is over seeds of the SAEs where there are three, and over blocks of text, layers,
questions or words, by Student's t. With fewer seeds it leaves out how trainings vary: it is then
taken as 2.5 times as wide for a figure that compares SAEs with SAEs.
"""
import itertools
import json
import math
import re
import statistics
import sys

import numpy
import torch

import evaluate
import sta
import train_sae
from beyond import begin_look, parse_args
from beyond.atoms import measure_attention
from beyond.meaning import measure_depth
from beyond.variants import SEARCHED, VARIANTS, beside, search, searched, settings_of
from support.files import load_sae, run_main, write_atomic
from support.tasks import margin, mean_margin

# ------------------------------------------------------------------ the rows
# An L1 penalty takes longer: at the SAEs' own settings it leaves twice as much variance.
FACTORS = {"splits": {}, "twin": {}, "l1": {"tokens": 3, "lr": 4}}
# Rows of which attention is measured
ATTENTION_ROWS = "dual", "searched", "stretched", "l1", "untrained twin", "layer SAE, searched"

def train_controls(variant, folder, model_name, layers):
    """Train a variant's SAEs beside a folder's, with their settings times FACTORS, if missing."""
    there = beside(folder, variant)
    if all(list(there.glob(f"layer{layer}.value*")) for layer in layers):
        return
    settings = load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    settings |= {name: factor * settings[name] for name, factor in FACTORS[variant].items()}
    computed = "layers", "text_sha256", "model_sha256", "commit"  # no options
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()
               if name not in computed and value != "default"]
    train_sae.main(["--model", model_name, "--out", str(there.parent), "--layer",
                    ",".join(map(str, layers)), *options], VARIANTS[variant])

class Turned:
    """A codec with the error of another one, turned at random: as much is taken out, but not what
    the other drops. If dropping weak atoms removes noise, this must not help."""

    def __init__(self, codec, shape):
        """shape: (n_kv_heads, head_dim)."""
        turn = torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(0))
        self.codec, self.turn = codec, torch.linalg.qr(turn).Q
        self.bytes_per_token = 4 * math.prod(shape)  # it stores what bf16 does

    def roundtrip(self, keys, values, live):
        decoded = sta.roundtrip(self.codec, keys, values, live)
        return [x + (x_hat - x) @ self.turn.to(x.device)
                for x, x_hat in zip((keys, values), decoded)]

class OnAxes:
    """A codec of keys: their mean, and what lies along k random axes, the rival of k atoms."""

    def __init__(self, sae, k):
        x = torch.randn(sae.b_dec.shape[1], k, generator=torch.Generator().manual_seed(0))
        self.mean, self.axes = sae.b_dec, torch.linalg.qr(x).Q.to(sae.b_dec.device)  # (D, k)

    def roundtrip(self, keys, values, live):
        return self.mean + (keys - self.mean) @ self.axes @ self.axes.T, values

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row], for P5 and P6."""
    if not saes:
        raise sta.UsageError("--rows claims: needs SAEs; first run: python train_sae.py")
    k_key, k_val = args.k_key, args.k_val
    dual = evaluate.dual_codecs(saes, k_key, k_val)
    shape = sta.kv_shape(model.get_decoder().config)
    most = min(sae.n_latents for sae in saes.values())
    settings, once_bytes = settings_of(before), evaluate.dictionary_bytes(saes, *sta.KINDS)
    by_search = {"settings": searched(settings), "with_tasks": False}
    new_rows = [evaluate.Row("errors turned", {layer: Turned(codec, shape)
                                               for layer, codec in search(dual).items()},
                             method="turned", **by_search)]
    for budget in ((k_key // 2, k_val // 2), (2 * k_key, 2 * k_val)):
        if min(budget) >= 1 and max(budget) <= most:
            new_rows.append(evaluate.Row(
                "searched {},{}".format(*budget), search(evaluate.dual_codecs(saes, *budget)),
                budget, once_bytes, method="searched, other budgets", **by_search))
    for layer in list(dual)[::1 if len(dual) <= 12 else 3]:
        one_pass = {layer: dual[layer]}
        both = dual[layer].key_sae, dual[layer].value_sae
        means = {layer: sta.DualBudget(*both, sta.Budget(0, 0))}
        for ending, codecs in (("", one_pass), (SEARCHED, search(one_pass)), (", means", means)):
            once = sum(sae.b_dec.nbytes for sae in both) if codecs is means else (
                once_bytes // len(dual))
            new_rows.append(evaluate.Row(
                f"layer {layer} alone{ending}", codecs, codecs[layer].budget, once,
                method=f"one layer{ending}", with_tasks=False,
                settings=searched(settings) if ending == SEARCHED else settings))
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

# ------------------------------------------------------------------ verdicts
# claim: (what the paper says; the figure and what is wanted of it; the control)
CLAIMS = {
    "P1": ("an L1 penalty shrinks magnitudes; a Top-K budget does not",
           "slope of coded on exact logits with Top-K less that with L1, at equal FVU: above 0",
           "the same difference, with untrained atoms in place of L1: less"),
    "P2": ("8 atoms recover over 80% of a key's direction",
           "cosine of key and code, both less the head's mean, mean over layers: above 0.8",
           "plain cosine of the head's mean alone: below the code's own"),
    "P3": ("values need more atoms than keys",
           "FVU of values less that of keys, SAEs trained for the same k, smallest over three "
           "values of k: above 0", "the same by searched codes: above 0"),
    "P4": ("fewer atoms for keys than for values is the better split",
           "nats by which SAEs trained for equal k are worse: above 0",
           "nats lost with more atoms for keys: above 0"),
    "P5": ("dropping weak atoms removes noise and improves perplexity",
           "nats by which the best of k/2, k and 2k searched atoms, chosen on one half of the "
           "text, beats dense on the other: above 0",
           "an equal error in a random direction: gains less"),
    "P6": ("perplexity and accuracy are comparable to the dense model's",
           "nats lost: below ln 1.01 for a layer alone, ln 1.02 for all; accuracy lost: below 0.02",
           "the head's mean alone: outside these limits"),
    "P7": ("significantly less memory", "share of bf16's bytes: below a half",
           "8 bits per number take a half"),
    "P8": ("atoms of shallow layers follow the word, those of deep layers its sense",
           "change from shallow to deep in the direction claimed: above 0 and above the control",
           "the same by a random dictionary")}

def interval(values, halves, trained=True):
    """(mean, half its 95% interval) of a figure by seed, and half its interval within each run:
    inf, of a single window, layer or question, decides nothing. trained: it compares SAEs with
    SAEs, so with fewer than three seeds, of which the spread is unknown, it must be clearer."""
    within = statistics.mean(halves)
    if len(values) < 3:
        return statistics.mean(values), (2.5 if trained else 1) * within
    between = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), math.hypot(within, margin(between, len(values)))

def verdict(claim, part, estimates, threshold, control, above=True, trained=True, n=""):
    """estimates: [(figure, half its 95% interval)] by seed; control: (its figure, whether it does
    as well), or None if it was not run: then there is a verdict only if that is *no*."""
    figure, half = interval(*zip(*estimates), trained)
    beyond = [(figure + side * half > threshold) == above for side in (-1, 1)]
    word = "holds" if all(beyond) else "undecided" if any(beyond) else "no"
    if control is None and word != "no":
        return None
    control, does_as_well = control or (None, False)
    word = "no" if does_as_well and word == "holds" else word
    return {"claim": claim, "part": part, "verdict": word, "figure": figure, "half": half,
            "threshold": threshold, "control": control, "seeds": len(estimates), "n": n}

def seed_of(line):
    settings = line["settings"] or {}
    return settings.get("seed", settings.get("calibration", {}).get("seed"))

def over_layers(a, column_a, b, column_b):
    """(mean over layers of a column of row a less one of row b, half its 95% interval)."""
    pairs = zip(a["by_layer"].values(), b["by_layer"].values())
    return mean_margin([x[column_a] - y[column_b] for x, y in pairs])

class Rows:
    """The rows of a model by name, one per seed. Raises UsageError at a row whose loss is nan."""

    def __init__(self, lines):
        self.by_name = {}
        for line in lines:
            if math.isnan(sum(line["window_ce"])):
                raise sta.UsageError(f"row {line['name']}: its loss is nan, of which no verdict is "
                                     "made")
            self.by_name.setdefault(line["name"], []).append(line)

    def together(self, *names):
        """Tuples of the rows of these names that are of one seed; dense has none."""
        choices = itertools.product(*(self.by_name.get(name, []) for name in names))
        return [rows for rows in choices if len({seed_of(row) for row in rows} - {None}) <= 1]

    def mean(self, column, *names):
        """Mean over seeds of column(rows of these names)."""
        return statistics.mean(column(*rows) for rows in self.together(*names))

def excess(a, b, windows=slice(None)):
    """(nats by which row a is worse than b on some windows, half its 95% interval)."""
    mean, _, half = evaluate.mean_excess(a["window_ce"][windows], b["window_ce"][windows])
    return mean, half

def flattened(by_row, name):
    """[slope of as many Top-K atoms as have the row's FVU, less the row's slope] by layer, between
    numbers of atoms on a straight line. by_row: what `measure_attention` returned."""
    gaps = []
    for layer, row in by_row[name].items():
        points = sorted((columns[layer]["fvu"], columns[layer]["slope"])
                        for other, columns in by_row.items() if other.startswith("k = "))
        gaps.append(float(numpy.interp(row["fvu"], *zip(*points))) - row["slope"])
    return gaps

def judge_shrinkage(attention):
    """attention: what `measure_attention` returned, by seed."""
    attention = [by_row for by_row in attention if "l1" in by_row and "untrained twin" in by_row]
    if attention:
        control = statistics.mean(itertools.chain(*(flattened(by_row, "untrained twin")
                                                    for by_row in attention)))
        estimates = [mean_margin(flattened(by_row, "l1")) for by_row in attention]
        figure = statistics.mean(x for x, _ in estimates)
        yield verdict("P1", "", estimates, 0, (control, control >= figure))

def judge_direction(rows):
    duals = rows.together("dual", "means")
    if duals:
        cos, of_mean = (statistics.mean(pair[i]["cos_key"] for pair in duals) for i in (0, 1))
        by_seed = [[layer["cos_centred_key"] for layer in dual["by_layer"].values()]
                   for dual, _ in duals]
        yield verdict("P2", "", [mean_margin(cosines) for cosines in by_seed], 0.8,
                      (of_mean, of_mean >= cos), trained=False, n=f"plain cosine {cos:.3f}")

def smallest_gap(rows, ending):
    """[(FVU of values less that of keys, half its interval)] by seed, at the number of atoms at
    which the mean is smallest."""
    names = [name + ending for name in ("dual", "uniform, trained for it",
                                        "reverse, trained for it")]
    if ending:
        names[0] = "searched"
    gaps = []
    for of_keys, of_values in zip(names, reversed(names)):
        gaps.append([over_layers(values, "fvu_val", keys, "fvu_key")
                     for keys, values in rows.together(of_keys, of_values)])
    return min(gaps, key=lambda gap: statistics.mean(x for x, _ in gap)) if all(gaps) else []

def judge_asymmetry(rows):
    one_pass, by_search = (smallest_gap(rows, ending) for ending in ("", SEARCHED))
    if one_pass and by_search:
        control = statistics.mean(gap for gap, _ in by_search)
        yield verdict("P3", "", one_pass, 0, (control, control <= 0))

def judge_split(rows):
    names = "dual", "uniform, trained for it", "reverse, trained for it"
    estimates = [excess(uniform, dual) for dual, uniform, _ in rows.together(*names)]
    if estimates:
        swapped = rows.mean(lambda dual, _, reverse: excess(reverse, dual)[0], *names)
        yield verdict("P4", "", estimates, 0, (swapped, swapped <= 0))

def judge_noise(rows):
    budgets = [name for name in rows.by_name if re.fullmatch(r"searched( \d+,\d+)?", name)]
    together, estimates = rows.together("dense", "errors turned", *budgets), []
    for dense, _, *candidates in together:
        half, gains = len(dense["window_ce"]) // 2, []
        if half == 0:  # a single window
            return
        for choose, test in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
            best = min(candidates, key=lambda row: statistics.mean(row["window_ce"][choose]))
            gains.append(excess(dense, best, test))
        gain, halves = statistics.mean(gain for gain, _ in gains), [half for _, half in gains]
        estimates.append((gain, math.hypot(*halves) / 2))
    if estimates:
        turned = rows.mean(lambda dense, turned: excess(dense, turned)[0], "dense", "errors turned")
        gain = statistics.mean(gain for gain, _ in estimates)
        yield verdict("P5", "", estimates, 0, (turned, turned >= gain), trained=False)

def layers_alone(lines):
    """{layer: rows} of the rows that code one layer by one pass, cheapest first."""
    alone = {}
    for row in lines:
        if match := re.fullmatch(r"layer (\d+) alone", row["name"]):
            alone.setdefault(int(match[1]), []).append(row)
    return dict(sorted(alone.items(), key=lambda item: statistics.mean(
        row["delta_ce"] for row in item[1])))

def median(ranked):
    """The middle one of a sorted list, the lower one of two."""
    return ranked[(len(ranked) - 1) // 2]

def nats_lost(rows):
    """[(nats by which a row is worse than dense, half its 95% interval)]."""
    return [(row["delta_ce"], math.log(row["ratio_ci95"][1] / row["ratio"])) for row in rows]

def accuracy_lost(score):
    """A row's columns of a task -> (loss of accuracy from dense, half its 95% interval)."""
    return -score["delta_acc"], margin(score["delta_acc_stderr"], score["n"])

def judge_parity_alone(rows):
    alone = layers_alone(itertools.chain(*rows.by_name.values()))
    ranked = list(alone)
    for part, layer in (("median", median(ranked)), ("worst", ranked[-1])) if ranked else ():
        means = rows.by_name.get(f"layer {layer} alone, means", [])
        yield judge_loss(f"{part} layer alone", nats_lost(alone[layer]), math.log(1.01), [
            row["delta_ce"] for row in means], f"layer {layer}, of {len(ranked)} coded")

def judge_loss(part, losses, threshold, controls, n=""):
    """Part of P6. losses: [(nats or accuracy lost, half its 95% interval)] by seed; controls: those
    lost with the head's mean alone."""
    control = None
    if controls:
        lost = statistics.mean(controls)
        control = lost, lost < threshold
    return verdict("P6", part, losses, threshold, control, above=False, trained=False, n=n)

def judge_parity(rows):
    means = rows.by_name.get("means", [])
    for name, method in (("dual", "one pass"), ("searched", "searched")):
        coded = rows.by_name.get(name, [])
        if coded:
            yield judge_loss(f"all layers, {method}", nats_lost(coded), math.log(1.02),
                             [row["delta_ce"] for row in means])
        for task in dict.fromkeys(task for row in coded for task in row["tasks"]):
            scores, controls = ([row["tasks"][task] for row in some if task in row["tasks"]]
                                for some in (coded, means))
            yield judge_loss(f"{task}, {method}", list(map(accuracy_lost, scores)), 0.02,
                             [-score["delta_acc"] for score in controls],
                             f"{scores[0]['n']} questions")

def share_with_dictionaries(row, n_tokens):
    """Of bf16's bytes, for n_tokens, with what is kept once."""
    once = row["once_bytes"] / row["bytes_per_token"]  # in tokens
    return row["bytes_share"] * (1 + once / n_tokens)

def judge_memory(rows):
    for dual in rows.by_name.get("dual", [])[:1]:
        context = dual["context"]
        for part, share, n in (
                ("per token", dual["bytes_share"], ""),
                ("4,096 tokens", share_with_dictionaries(dual, 4096), ""),
                ("full context", share_with_dictionaries(dual, context), f"{context:,} tokens")):
            yield verdict("P7", part, [(share, 0.0)], 0.5, (0.5, share >= 0.5), above=False, n=n)

def judge_depth(depths):
    """depths: what `meaning.measure_depth` returned, by seed."""
    for gap in depths[0]["changes"]["atoms"] if depths else ():
        atoms, random, vectors = ([depth["changes"][name][gap] for depth in depths]
                                  for name in ("atoms", "random", "vectors"))
        estimates = [(change, 1.96 * error) for change, error in atoms]
        control, raw = (statistics.mean(x for x, _ in some) for some in (random, vectors))
        yield verdict("P8", gap, estimates, max(0, control), (control, False), trained=False,
                      n=f"raw cosine {raw:+.3f}")

def judge(lines):
    """[verdict] from the lines of results.jsonl that are of one model and one text: its rows, and
    what `measure` returned. A part whose rows are not there is left out."""
    rows = Rows([line for line in lines if line["kind"] == "row"])
    measured = [line for line in lines if line["kind"] == "measured"]
    depths = [line["depth"] for line in measured if line["depth"]]
    attention = [line["attention"] for line in measured if line.get("attention")]
    verdicts = [*judge_shrinkage(attention), *judge_direction(rows), *judge_asymmetry(rows),
                *judge_split(rows), *judge_noise(rows), *judge_parity_alone(rows),
                *judge_parity(rows)]
    verdicts += [*judge_memory(rows), *judge_depth(depths)]
    return [x for x in verdicts if x]

def print_verdict(x):
    part = x["part"] or CLAIMS[x["claim"]][0]
    control = "not run" if x["control"] is None else f"{x['control']:.4f}"
    print(f"{x['claim']} {part}: {x['verdict']}: {x['figure']:.4f} ± "
          f"{x['half']:.4f} against {x['threshold']:.4g}; control {control} {x['n']}")

# ------------------------------------------------------------------ the run
def attention_by_rows(run, args):
    """What `measure_attention` returns on 4,096 tokens, of ATTENTION_ROWS, of OnAxes, and of k
    atoms per key for several k; None if the model's attention cannot be taken apart."""
    ids = run.windows[:max(1, 4096 // run.windows.shape[1])]
    args.only = f"^({'|'.join(ATTENTION_ROWS)})$"
    _, *chosen = evaluate.choose_rows(run, args)  # without dense
    rows = {row.name: row.codecs for row in chosen}
    rows["random axes"] = {layer: OnAxes(run.saes[layer, "key"], args.k_key)
                           for layer in run.layers}
    for k in (0, 1, 2, 4, 8, 16):
        rows[f"k = {k}"] = evaluate.dual_codecs(run.saes, k, 0)
    try:
        return measure_attention(run.model, rows, run.layers, ids, args.sink)
    except sta.UsageError as error:
        print(f"no verdict on P1: {error}")

def measure(run, args):
    """What verdicts and tables need beside the rows: how well coded keys serve queries; the change
    of the residual stream by dual, on 512 tokens; which atoms occurrences share, by depth."""
    ks = {"key": args.k_key, "value": args.k_val}
    windows = run.windows[:max(1, 512 // run.windows.shape[1]), :512]
    codecs = evaluate.dual_codecs(run.saes, args.k_key, args.k_val)
    return {"attention": attention_by_rows(run, args),
            "stream": stream_change(run.model, codecs, windows, args.sink),
            "stream_tokens": windows.numel(), "depth": measure_depth(run, ks),
            "depth_tokens": run.windows.numel()}

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(
        __doc__, argv, "model saes layer text seq-len k-key k-val sink device dtype out",
        max_tokens=dict(type=int, default=32_768, help="tokens to score (default 32,768)"),
        rows=dict(default="variants", help="as for evaluate.py (default variants)"),
        measure_only=dict(action="store_true", help="leave the rows in --out as they are"),
        resume=dict(action="store_true", help="as for evaluate.py"),
        **{name: dict(help="as for evaluate.py") for name in ("tasks", "task_dir", "limit")})
    n_scored, args.max_tokens = args.max_tokens, 4 * args.max_tokens  # P8 reads more text
    run = begin_look(args, "-claims")
    path = run.path.with_name(run.path.name.replace("-claims", ""))
    if args.measure_only and not path.exists():
        raise sta.UsageError(f"{path}: no rows to judge; leave out --measure-only")
    if run.name == "tiny":
        for variant in FACTORS:
            train_controls(variant, run.folder, run.name, run.layers)
    if not args.measure_only:
        evaluate.main([*argv, "--max-tokens", str(n_scored), "--rows", f"{args.rows},claims"])
    result, measured = json.loads(path.read_text(encoding="utf-8")), measure(run, args)
    rows = [{"kind": "row", "context": result["context"], **row} for row in result["rows"]]
    for line in judge([*rows, {"kind": "measured", **measured}]):
        print_verdict(line)
    about = {name: result[name] for name in ("text", "text_sha256", "tokens", "seq_len", "dtype")}
    write_atomic(run.path, json.dumps({**run.about, **about, "measured": measured}) + "\n")
    print(f"wrote {run.path}")

if __name__ == "__main__":
    run_main(main)
