"""Results -> figures/results.jsonl -> the tables and figures of README.md and beyond/README.md.

    python -m beyond.report add results/*.json         # takes the rows of those files in
    python -m beyond.report write                      # puts tables and figures into the READMEs

results.jsonl has one line per row that a README quotes, and where it comes from. Rows of two
models, texts, dense losses or fits never stand under one name: `add` refuses them and says why. A
row names its model by the path that was typed: DIR is a folder, or a link, that figures/assets.py
filled. In a README, a table stands between <!-- table: NAME --> and <!-- end -->, and a figure
before <!--=QUERY-->. A test compares all of them with what is made here.
"""
import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import statistics

import evaluate
import plots
import sta
from beyond import pick, spread, table
from beyond.atoms import draw_attention
from beyond.benchmark import table_of_peers
from beyond.cache import table_of_costs
from beyond.claims import (ATTENTION_ROWS, CLAIMS, Rows, accuracy_lost, excess, interval, judge,
                           layers_alone, median, nats_lost, seed_of)
from beyond.meaning import mean_auroc, share_alike, table_of_aurocs, table_of_seeds
from beyond.s3 import table_of_recall
from beyond.variants import SEARCHED
from support.files import ROOT, explain, run_main, write_atomic

FILE = ROOT / "figures" / "results.jsonl"
READMES = (ROOT / "README.md", ROOT / "beyond" / "README.md")
PROVENANCE = ("model", "model_sha256", "context", "text", "text_sha256", "tokens", "seq_len",
              "dtype", "settings", "command", "commit", "device", "torch", "transformers", "date")
BY_LAYER = ("fvu_key", "fvu_val", "cos_centred_key")  # what verdicts need
OF_EXPERIMENTS = r"(dual|searched|packed|stretched( per \w+)?)$"  # names of rows
METHODS = ("dual", "stretched", "searched", "layer SAE", "grouped", "rotated", "transform",
           "additive")
TEXTS = ("valid", "prose", "code")  # the first is of the kind that the codes were fitted to
QWEN, SMOLLM2 = "DIR/qwen2.5-coder-1.5b-instruct", "DIR/smollm2-135m-instruct"
MODELS = {"tiny": "tiny", "smollm2": SMOLLM2, "qwen": QWEN}
OTHERS = {SMOLLM2: "SmolLM2-135M", QWEN: "Qwen2.5-Coder-1.5B"}
LABELS = {OTHERS.get(model, model): model for model in MODELS.values()}

# ------------------------------------------------------------------ taking results in
def lines_of(result, experiment=None):
    """What a result file holds -> [line of results.jsonl]. The rows of an experiment are not of
    kind "row", so that no table takes them for the others."""
    about = {name: result.get(name) for name in PROVENANCE}
    about["sink"] = result.get("config", {}).get("sink", 1)
    new_lines = [{"kind": "row", **row, "window_ce": of_windows(row, experiment),
                  "by_layer": of_layers(row), "dense_ce": row["ce"] - row["delta_ce"],
                  "tasks": {name: {**task, "right": None} for name, task in row["tasks"].items()}}
                 for row in result.get("rows", [])]
    if "measured" in result:
        new_lines.append({"kind": "measured", "name": "measured", **short(result["measured"], 4)})
    new_lines += [{"kind": kind, "name": kind, kind: short(result[kind], 4)}
                  for kind in ("look", "meaning", "caches", "peers", "retrieval") if kind in result]
    if "example" in result:  # of the last layer
        new_lines[-1]["example"] = list(result["example"].values())[-1]
    if not new_lines or any(math.isnan(line.get("ce", 0)) for line in new_lines):
        raise ValueError("nothing that a README shows, or a row whose loss is nan")
    if experiment:
        new_lines = [{**line, "kind": "experiment", "experiment": experiment}
                     for line in new_lines if re.match(OF_EXPERIMENTS, line["name"])]
    return [{**about, **line} for line in new_lines]

def of_windows(row, experiment):
    """A row's losses by window, of those rows that are compared with others than dense."""
    if experiment or " alone" in row["name"]:
        return []
    return [round(x, 4) for x in row["window_ce"]]

def of_layers(row):
    """A row's figures by layer, of those rows that a verdict takes them from."""
    if row["name"] in ("dual", "searched", "l1") or "trained for it" in row["name"]:
        return {layer: {name: round(columns[name], 5) for name in BY_LAYER}
                for layer, columns in row["by_layer"].items()}
    return None

def fit_of(settings):
    """What decides a fit, but its seed: settings without that and without the commit."""
    if not isinstance(settings, dict):
        return settings
    return {name: fit_of(x) for name, x in settings.items() if name not in ("seed", "commit")}

def key_of(line):
    """What tells lines apart: of two with one key, the later replaces the earlier."""
    names = ("kind", "experiment", "name", "model", "text_sha256", "seq_len", "sink", "dtype")
    return json.dumps([*(line.get(name) for name in names), seed_of(line)])

def check_together(old, new):
    """Raises UsageError where two lines cannot stand in one file."""
    def same(*names):
        return all(old.get(name) == new.get(name) for name in names)

    if same("model") and not same("model_sha256"):
        raise sta.UsageError(f"two models are named {new['model']}: their weights differ")
    if same("model", "text", "tokens", "seq_len") and not same("text_sha256"):
        raise sta.UsageError(f"two texts are named {new['text']}: hash {old['text_sha256']} there, "
                             f"{new['text_sha256']} here")
    if same("model", "kind", "name") and new["kind"] in ("row", "measured"):
        if not same("k_key", "k_val"):
            raise sta.UsageError(f"{new['model']}, {new['name']}: with {old['k_key']} + "
                                 f"{old['k_val']} atoms there, {new['k_key']} + {new['k_val']} "
                                 "here; add it as an --experiment")
        if key_of(old) == key_of(new) and new.get("tasks", {}).keys() < old.get("tasks", {}).keys():
            raise sta.UsageError(f"{new['model']}, {new['name']}: has no more the tasks "
                                 f"{', '.join(old['tasks'])}; run it with them, too")
        a, b = fit_of(old["settings"]), fit_of(new["settings"])
        for name in (a.keys() | b.keys()) if a and b else ():
            if a.get(name) != b.get(name):
                raise sta.UsageError(f"{new['model']}, {new['name']}: two fits, whose {name} is "
                                     f"{a.get(name)} there, {b.get(name)} here; delete one's lines")
    if same("model", "text_sha256", "seq_len", "dtype", "kind") and "dense_ce" in new and (
            abs(old["dense_ce"] - new["dense_ce"]) > 2e-4):
        raise sta.UsageError(f"{new['model']} on {new['text']}: the dense loss is "
                             f"{old['dense_ce']:.5f} there, {new['dense_ce']:.5f} here")

def add(paths, file=FILE, experiment=None):
    """Take the rows of result files into results.jsonl, each in the place of an older one."""
    lines = {key_of(line): line for line in read(file)} if file.exists() else {}
    for path in paths:
        with explain(f"{path}: no result of a model by this version; leave it out"):
            new_lines = lines_of(json.loads(path.read_text(encoding="utf-8")), experiment)
        for new in new_lines:
            for old in lines.values():
                check_together(old, new)
            lines[key_of(new)] = new
    text = "".join(json.dumps(short(line), separators=(",", ":")) + "\n"
                   for line in lines.values())
    write_atomic(file, text)
    print(f"{file}: {len(lines)} lines, {len(text):,} bytes")

def short(x, digits=9):
    """The same with so many significant digits in each number, and none for nan, which JSON lacks;
    the READMEs show up to eight of a row's."""
    if isinstance(x, dict):
        return {name: short(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [short(value, digits) for value in x]
    if isinstance(x, float):
        return None if math.isnan(x) else float(f"{x:.{digits}g}")
    return x

def read(file=FILE):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

# ------------------------------------------------------------------ which lines, and how they look
def longest(rows):
    """Of the rows, those on the longest part of each text, in the shortest windows."""
    extents = {}
    for row in rows:
        extents.setdefault(row["text"], []).append((row["tokens"], -row["seq_len"]))
    return [row for row in rows
            if (row["tokens"], -row["seq_len"]) == max(extents[row["text"]])]

def stem(row):
    """The name of a row's text, one of TEXTS."""
    return pathlib.Path(row["text"]).stem

def on_text(lines, text="valid", **wanted):
    """The rows wanted, on the longest part of a text."""
    return [row for row in longest(pick(lines, **wanted)) if stem(row) == text]

def compared(lines, model, text="valid"):
    """The rows of a model on the longest part of a text, at budgets that were trained for."""
    return [row for row in on_text(lines, text, kind="row", model=model)
            if row["k_key"] in (None, (row["settings"] or {}).get("k_key"))]

def rise(rows):
    """The increase in perplexity, in %, a mean over seeds, ± half its 95% interval; from 100% on,
    the factor, and its interval."""
    if not rows:
        return ""
    ratio = statistics.mean(row["ratio"] for row in rows)
    _, half = interval(*zip(*nats_lost(rows)), trained=False)
    if ratio >= 2:
        return "×{:.3g} ({:.3g} to {:.3g})".format(
            ratio, ratio * math.exp(-half), ratio * math.exp(half))
    return f"{round(100 * (ratio - 1), 1) + 0:.1f} ± {100 * ratio * half:.1f}"  # no -0.0

def percent(share):
    return f"{100 * share:.3g}%" if share < 9.99 else f"{100 * share:,.0f}%"

# ------------------------------------------------------------------ the tables
QUICK_START = ["dense", "keys", "values", "dual", "reverse", "searched"]

def quick_start(lines):
    """Of what the README's quick start prints for tiny, seed 0, the rows that it explains."""
    rows = {row["name"]: row for row in longest(pick(lines, kind="row", model="tiny"))
            if seed_of(row) in (None, 0)}
    width = len("searched, packed")  # the longest name that is printed
    return ["```", evaluate.HEADER.format(name="row", width=width),
            *(evaluate.format_row(rows[name], width) for name in QUICK_START if name in rows),
            "```"]

def one_key(lines):
    """The code of a sentence's last key, as beyond/atoms.py has it."""
    def quoted(texts):
        words = [text.strip() for text in texts]
        return " ".join(f"`{word}`" for word in words if word.isprintable() and word
                        and "`" not in word and "|" not in word)

    cells = {}
    for line in pick(lines, kind="look", model=QWEN)[-1:]:
        for atom in line["example"][:4]:
            row = str(atom["atom"])
            cells[row, "coefficient"] = f"{atom['z']:.2f}"
            cells[row, "fires on"] = f"{100 * atom['fired']:.1f}% of tokens"
            cells[row, "strongest tokens"] = quoted(atom["strongest"])
            cells[row, "random examples"] = quoted(atom["sample"])
    return table("atom", cells)

def judged(lines):
    """{model: its verdicts, on the text of the kind that the codes were fitted to}."""
    return {model: judge(on_text(lines, kind="row", model=model)
                         + pick(lines, kind="measured", model=model))
            for model in MODELS.values() if pick(lines, kind="row", model=model)}

TESTED = {  # the lines of the table of verdicts: how a claim was tested, by which parts of it
    "P1": {"at equal error, Top-K flattens attention less than L1": ("",)},
    "P2": {"cosine above 0.8, without the head's mean": ("",)},
    "P3": {"at equal k, values have the larger error": ("",)},
    "P4": {"8 + 16 atoms do better than 12 + 12": ("",)},
    "P5": {"at least one number of atoms does better than no coding": ("",)},
    "P6": {"one layer (the median): perplexity within 1%": ("median layer alone",),
           "one layer (the worst): perplexity within 1%": ("worst layer alone",),
           "all layers: perplexity within 2%": ("all layers, one pass",),
           "all layers, searched: perplexity within 2%": ("all layers, searched",),
           "all layers: accuracy on piqa (tiny: cloze) within 2 points": (
               "cloze, one pass", "piqa, one pass")},
    "P7": {"per token: under half of bf16": ("per token",),
           "4,096 tokens, with dictionaries: under half of bf16": ("4,096 tokens",),
           "a full context, with dictionaries: under half of bf16": ("full context",)},
    "P8": {"six tests on the atoms that two tokens share: how many hold": ()}}

def verdicts(lines):
    """P1 to P8 in words, a line for each test."""
    cells, by_model = {}, judged(lines)
    for claim, tests in TESTED.items():
        for i, (test, shown) in enumerate(tests.items()):
            label = claim + "abcdef"[i] * (len(tests) > 1)
            cells[label, "the paper's claim"] = CLAIMS[claim][0] if i == 0 else ""
            cells[label, "how we tested it"] = test
            for model, parts in by_model.items():
                words = [x["verdict"] for x in parts
                         if x["claim"] == claim and (not shown or x["part"] in shown)]
                cells[label, OTHERS.get(model, model)] = (
                    "".join(words) if len(words) < 2 else
                    f"{words.count('holds')} of {len(words)}")
    return table("", cells)

def rises_alone(lines, model):
    """By how much perplexity rises with one layer coded by one pass, from the best layer to the
    worst."""
    alone = layers_alone(on_text(lines, kind="row", model=model))
    return [rise(rows) for rows in alone.values()] or [""]

SUMMARY = {"dual": "the paper's codes, all layers",
           "searched": "the same budget, atoms found by search",
           "rotated 3 bits": "*rotated* quantisation, 3 bits",
           "transform 9.375": "*transform* quantisation", "additive 9.375": "*additive* codes"}

def summary(lines):
    """For the first screen: how much perplexity rises, by model, and what the cache takes."""
    one_layer = "the paper's codes, one layer (the median)"
    cells = {(one_layer, heading): "" for heading in ("size", "dictionaries, MB (SmolLM2)")}
    for name, label in SUMMARY.items():
        cells[label, "size"], share = "", 0.0
        for row in on_text(lines, kind="row", model=QWEN, name=name):
            cells[label, "size"], share = percent(row["bytes_share"]), row["bytes_share"]
        for row in pick(lines, kind="row", model=SMOLLM2, name=name)[:1]:
            cells[label, "dictionaries, MB (SmolLM2)"] = f"{row['once_bytes'] / 1e6:.1f}"
            if abs(row["bytes_share"] - share) > 0.001:  # its heads are half as wide
                cells[label, "size"] += f" (SmolLM2: {percent(row['bytes_share'])})"
    for model in MODELS.values():
        rows, column = on_text(lines, kind="row", model=model), OTHERS.get(model, model)
        cells[one_layer, column] = median(rises_alone(lines, model))
        for name, label in SUMMARY.items():
            cells[label, column] = rise(pick(rows, name=name))
    return table("format", cells)

def verdict_inputs(lines):
    """What each part was judged from: figure ± half its interval; control; seeds, n; verdict. The
    first part of a claim has its rule. Letters are those of `verdicts`."""
    cells, explained = {}, set()
    letters = {(claim, part): "abcdef"[i] for claim, tests in TESTED.items() if len(tests) > 1
               for i, parts in enumerate(tests.values()) for part in parts}
    for model, parts in judged(lines).items():
        for x in parts:
            letter = letters.get((x["claim"], x["part"]), "")
            if len(TESTED[x["claim"]]) > 1 and not letter:
                continue
            row = f"{x['claim']}{letter} {x['part']}".strip()
            if x["claim"] not in explained:
                explained.add(x["claim"])
                _, cells[row, "measured: wanted"], cells[row, "control"] = CLAIMS[x["claim"]]
            half = f" ± {x['half']:.4f}" if x["half"] else ""  # bytes are exact
            seeds = f"{x['seeds']} seed{'s' * (x['seeds'] > 1)}" if half else ""
            n = ", ".join(filter(None, [seeds, x["n"]]))
            control = "no control" if x["control"] is None else f"control {x['control']:.4f}"
            cells[row, OTHERS.get(model, model)] = f"{x['verdict']}: " + "; ".join(filter(None, [
                f"{x['figure']:.4f}{half}", control, n]))
    return table("part", dict(sorted(cells.items(), key=lambda item: item[0][0][:3])))

FORMATS = ("packed", "layer SAE, packed", "dual", "searched", "grouped 2 bits", "grouped 3 bits",
           "rotated 2 bits", "rotated 3 bits", "transform 9.375", "transform 18.75",
           "additive 9.375", "additive 18.75")  # the ladder and the pictures have others, too

def formats(lines):
    """By format: bytes per token as a share of bf16's; and by model, the increase in perplexity on
    valid, and the number of tokens beyond which it takes less than bf16."""
    cells = {}
    for name in FORMATS:
        shares = [percent(row["bytes_share"]) for model in ("tiny", SMOLLM2)
                  for row in pick(compared(lines, model), name=name)[:1]]
        cells[name, "size (SmolLM2)"] = "{} ({})".format(*shares) if shares[1:] else ""
        for short, model in MODELS.items():
            rows = pick(compared(lines, model), name=name)
            cells[name, short] = rise(rows)
            if model != "tiny":  # whose context is 256 tokens
                cells[name, f"{short}: break-even"] = "".join(
                    f"{row['break_even_tokens']:,}" for row in rows[:1])
    return table("format", cells)

def other_texts(lines):
    """Increase in perplexity by format, model and text, other than valid."""
    cells = {}
    for name, (short, model), text in itertools.product(FORMATS[2:], MODELS.items(), TEXTS[1:]):
        rows = pick(compared(lines, model, text), name=name)
        if rows:
            cells[name, f"{short}: {text}"] = rise(rows)
    return table("format", cells)

def by_two_passes(lines):
    """Increase in perplexity of the rows scored by two passes, and the number of tokens beyond
    which they take less than bf16, by size, on SmolLM2."""
    cells = {}
    for row in sorted(on_text(lines, kind="row", model=SMOLLM2), key=lambda row: row["name"]):
        if row["name"].endswith(", two passes"):
            name, share = row["name"].removesuffix(", two passes").split()
            cells[f"{share}%", name] = rise([row])
            cells[f"{share}%", f"{name}: break-even"] = f"{row['break_even_tokens']:,}"
    return table("size", cells)

LADDERS = ({  # names of rows, of which each changes one thing; % stands for the share
    "packed": "*packed*", "stretched, packed": "stretched",
    "searched, packed": "searched, instead of stretched",
    "layer SAE, searched, packed": "one SAE per layer",
    "layer SAE, metric, searched, packed": "in the metric of the loss",
    "layer SAE, metric, shared, searched, packed": "bytes split between layers",
    "additive %": "additive: no coefficients"}, {
    "transform %, per head": "transform: axes of a head",
    "transform %, per layer": "transform: axes of a layer",
    "transform %, metric": "transform: in the metric of the loss",
    "transform %": "transform: bits split between layers"})

def ladder(lines, shares):
    """Increase in perplexity at each step, by model, and nats by which it is better than the step
    before, paired over windows and seeds, ± half its 95% interval over windows. shares: {model:
    what % stands for in the names of its rows}."""
    cells = {}
    for (model, share), steps in itertools.product(shares.items(), LADDERS):
        before, rows, column = [], on_text(lines, kind="row", model=model), OTHERS.get(model, model)
        for name, label in steps.items():
            here = pick(rows, name=name.replace("%", share))
            gains = [excess(a, b) for a, b in itertools.product(before, here)
                     if seed_of(a) == seed_of(b)]
            if here:
                before = here
                cells[label, column] = rise(here)
            if gains:
                cells[label, f"{column}: better by, nats"] = "{:+.4f} ± {:.4f}".format(
                    *map(statistics.mean, zip(*gains)))
    return table("step", cells)

def by_length(lines, model):
    """{(row, tokens of its SAEs' training): lines} by rising tokens, on the longest part of each
    text: the rows dual, searched and stretched, and those of experiments named "N tokens"."""
    found = longest([line for line in pick(lines, model=model)
                     if line["name"] in ("dual", "searched", "stretched")
                     and line.get("experiment", "tokens").endswith("tokens")])
    groups = {}
    for line in sorted(found, key=lambda line: line["settings"]["tokens"]):
        groups.setdefault((line["name"], line["settings"]["tokens"]), []).append(line)
    return groups

def lengths(lines, model):
    """Increase in perplexity by text and row, by the tokens of the SAEs' training."""
    cells = {}
    for (name, n_tokens), group in by_length(lines, model).items():
        for text in TEXTS:
            of_text = [line for line in group if stem(line) == text]
            if of_text:
                cells[f"{n_tokens:,}", f"{name}, {text}"] = rise(of_text)
    return table("tokens", dict(sorted(cells.items(), key=lambda item: item[0][1])))

def accuracies(lines):
    """Changes of accuracy from dense, in points, ± half their paired 95% intervals."""
    cells = {}
    for model, label in OTHERS.items():
        for row in pick(lines, kind="row", model=model):
            for task, score in row["tasks"].items():
                if row["name"] in ("dual", "searched", "additive 9.375", "additive 18.75"):
                    name = f"{label}, {row['name']}"
                    lost, half = accuracy_lost(score)
                    cells[name, task] = f"{-100 * lost:+.1f} ± {100 * half:.1f}"
    return table("change of accuracy, points", cells)

def one_layer(lines):
    """Increase in perplexity with one layer coded, of the first, the median, and the worst but for
    the first; and the change of the residual stream after it, as a share of its spread."""
    cells = {}
    for short, model in MODELS.items():
        alone = layers_alone(on_text(lines, kind="row", model=model))
        worst = [layer for layer in alone if layer > 0][-1:]
        streams = [line["stream"] for line in pick(lines, kind="measured", model=model)]
        for which, layer in (("first", 0), ("median", median(list(alone))),
                             ("worst other", *worst)) if worst else ():
            label = f"{short}, {which}: layer {layer}"
            searched = on_text(lines, kind="row", model=model,
                               name=f"layer {layer} alone{SEARCHED}")
            cells[label, "one pass"] = rise(alone[layer])
            cells[label, "searched"] = rise(searched)
            cells[label, "change of the residual stream"] = spread(
                [stream[str(layer)] for stream in streams])
    return table("model and layer", cells)

def attention(lines):
    """How well coded keys serve queries: means over layers and seeds, by model."""
    cells = {}
    for short, model in MODELS.items():
        measured = [line["attention"] for line in pick(lines, kind="measured", model=model)
                    if line["attention"]]
        for name in (*ATTENTION_ROWS, "random axes", "k = 0") if measured else ():
            for column, heading in ("r2", "r²"), ("slope", "slope"), ("fvu", "FVU of keys"):
                cells[name, f"{heading}, {short}"] = spread([statistics.mean(
                    layer[column] for layer in by_row[name].values())
                    for by_row in measured if name in by_row])
    return table("", cells)

TABLES = {"quick start": quick_start, "verdicts": verdicts, "verdict inputs": verdict_inputs,
          "peers": table_of_peers, "one key": one_key, "attention": attention,
          "meaning": functools.partial(table_of_aurocs, models=LABELS),
          "seeds": functools.partial(table_of_seeds, models=LABELS),
          "accuracies": accuracies, "recall": table_of_recall,
          "token times": functools.partial(table_of_costs, model=SMOLLM2),
          "summary": summary, "one layer": one_layer,
          "formats": formats, "other texts": other_texts, "two passes": by_two_passes,
          "ladder": functools.partial(ladder, shares={"tiny": "9.375", SMOLLM2: "18.75"}),
          "lengths": functools.partial(lengths, model=SMOLLM2)}

# ------------------------------------------------------------------ figures in sentences, a picture
def rows_named(lines, model, name, text="valid", experiment=None):
    which = {"experiment": experiment} if experiment else {"kind": "row"}
    return on_text(lines, text, model=model, name=name, **which)

def rise_of(lines, *named):
    return rise(rows_named(lines, *named))

def ratio_of(lines, *named):
    """The ratio to the dense model's perplexity, a mean over seeds."""
    ratios = [row["ratio"] for row in rows_named(lines, *named)]
    return f"{statistics.mean(ratios):#.3g}" if ratios else ""

def worst_layer(lines, model):
    return rises_alone(lines, model)[-1]

def overtakes(lines, model, name):
    """The tokens from which on a format takes less than rotated codes of 3 bits, dictionaries
    included."""
    row, rotated = (rows_named(lines, model, each)[0] for each in (name, "rotated 3 bits"))
    n_tokens = ((row["once_bytes"] - rotated["once_bytes"])
                / (rotated["bytes_per_token"] - row["bytes_per_token"]))
    return f"{float(f'{n_tokens:.2g}'):,.0f}"  # 27,705: "28,000"

def gain(lines, model, name):
    """Nats by which a row is better than the paper's code in 16-bit words, over seeds."""
    rows = Rows(on_text(lines, kind="row", model=model))
    return f"{rows.mean(lambda packed, row: excess(packed, row)[0], 'packed', name):.3f}"

FIGURES = {"rise": rise_of, "ratio": ratio_of, "worst layer": worst_layer, "overtakes": overtakes,
           "gain": gain, "alike": share_alike, "auroc": mean_auroc}

def figure(lines, query):
    """What a README has before <!--=QUERY-->: a name in FIGURES, a model and, where it is of rows,
    their name, their text and their experiment, if these are not `valid` and none."""
    name, model, *which = query.split(" | ")
    return FIGURES[name](lines, MODELS[model], *which)

def curves_by_bytes(lines, model):
    """{method: [(share of bf16, rise of perplexity)]}, both in %, means over seeds, on the kind of
    text that the codes were fitted to. Shares within 2% are one."""
    share, groups = 0, {method: {} for method in METHODS}
    for row in sorted(compared(lines, model), key=lambda row: row["bytes_share"]):
        if row["method"] in METHODS:
            share = row["bytes_share"] if row["bytes_share"] > 1.02 * share else share
            groups[row["method"]].setdefault(share, []).append(row)
    return {method: [(100 * share, mean_rise(rows)) for share, rows in by_share.items()]
            for method, by_share in groups.items() if by_share}

def curves_by_length(lines, model):
    """{row: [(tokens of its SAEs' training, rise of perplexity in %)]}, the same."""
    curves = {}
    for (name, n_tokens), group in by_length(lines, model).items():
        rows = [line for line in group if stem(line) == "valid"]
        if rows:
            curves.setdefault(name, []).append((n_tokens, mean_rise(rows)))
    return curves

def mean_rise(rows):
    return 100 * (statistics.mean(row["ratio"] for row in rows) - 1)

BYTES = "size per token, % of bf16 (dictionaries not counted)"
PICTURES = ((QWEN, "bytes", curves_by_bytes, BYTES, "linear"),
            (SMOLLM2, "bytes", curves_by_bytes, BYTES, "linear"),
            (SMOLLM2, "lengths", curves_by_length, "tokens on which the SAEs were trained", "log"))

# ------------------------------------------------------------------ the READMEs
def filled(text, lines):
    """A README's text with its tables and figures made anew."""
    def table_between(match):
        made = TABLES[match[1]](lines)
        return "\n".join([f"<!-- table: {match[1]} -->", *made, "<!-- end -->"])

    def figure_before(match):
        return f"{figure(lines, match[1]) or 'nan'}<!--={match[1]}-->"

    text = re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", table_between, text, flags=re.S)
    number = r"(?:[-+]?[\d.,]+|nan)(?: ± [\d.]+)?"
    return re.sub(number + r"<!--=(.*?)-->", figure_before, text)

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["add", "write"])
    parser.add_argument("results", nargs="*", type=pathlib.Path, help="for add: JSON files")
    parser.add_argument("--experiment", help="for add: what sets these rows apart from others")
    args = parser.parse_args(argv)
    if args.what == "add":
        return add(args.results, experiment=args.experiment)
    lines = read()
    for path in READMES:
        write_atomic(path, filled(path.read_text(encoding="utf-8"), lines))
    for line in pick(lines, kind="look"):
        name = pathlib.Path(line["model"]).name
        if line["look"]:
            figure = draw_attention(line["look"], OTHERS.get(line["model"], name))
            plots.save(figure, FILE.with_name(f"{name}-attention.png"))
    for model, name, curves_of, x_label, x_scale in PICTURES:
        figure = plots.draw_curves(curves_of(lines, model), OTHERS[model], x_label, x_scale)
        plots.save(figure, FILE.with_name(f"{pathlib.Path(model).name}-{name}.png"))

if __name__ == "__main__":
    run_main(main)
