"""Results -> figures/results.jsonl -> the tables and figures of README.md and beyond/README.md.

    python -m beyond.report add results/*.json         # takes the rows of those files in
    python -m beyond.report                            # prints every table and every figure
    python -m beyond.report write                      # puts them into the two READMEs

results.jsonl has one line per row that a README quotes, with all that tells where it comes from:
model and fingerprint, text and hash of its tokens, how the codec was fitted, command, commit,
machine. Rows of two models, of two texts, or of two dense losses are never brought together: `add`
says why not. In a README, a table stands between <!-- table: NAME --> and <!-- end -->, and a
figure in a sentence before <!--=NAME-->; a test compares all of them with what is printed here.
Spreads: ± over seeds is a standard deviation; ± of one run a standard error, paired over windows.
"""
import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import statistics

import torch

import evaluate
import plots
import sta
from beyond.claims import CLAIMS
from support.files import ROOT, explain, run_main, write_atomic
from support.results import check_pattern
from support.tasks import mean_stderr

FILE = ROOT / "figures" / "results.jsonl"
READMES = (ROOT / "README.md", ROOT / "beyond" / "README.md")
PROVENANCE = ("model", "text", "text_sha256", "tokens", "seq_len", "dtype", "command", "commit",
              "device", "torch", "transformers", "date")
METHODS = ("dual", "searched", "layer SAE", "grouped", "rotated", "transform", "additive")

# ------------------------------------------------------------------ taking results in
def fingerprint(marks):
    """The 16 sums of `model_marks`, each parameter's divided by their length, added up."""
    sums = [torch.tensor(row) for mark in marks.values() for row in mark["sums"]]
    total = sum(row / row.norm().clamp_min(1e-12) for row in sums)
    return [round(x, 4) for x in total.tolist()]

def lines_of(result, folder, experiment=None):
    """What a result file holds -> [line of results.jsonl]; `folder` is written as DIR. Of an
    experiment, only the row of the dual budget is kept, under the experiment's name."""
    about = {name: result.get(name) for name in PROVENANCE}
    about["fingerprint"] = fingerprint(result["marks"])
    about["sink"] = result.get("config", {}).get("sink", 1)
    if "claims" in result:
        new_lines = [{"kind": "claim", "name": claim["claim"], **claim, "settings": result[
            "settings"]} for claim in result["claims"]]
        new_lines.append({"kind": "stream", "name": "stream", "stream": result["stream"],
                          "settings": result["settings"]})
    elif "rows" in result:
        new_lines = [{"kind": "row", **row, "window_ce": [round(x, 4) for x in row["window_ce"]],
                  "by_layer": None, "tasks": {name: {**task, "right": "".join(
                      str(int(x)) for x in task["right"])} for name, task in row["tasks"].items()}}
                 for row in result["rows"]]
    else:
        kinds = [kind for kind in ("check", "caches", "table", "peers") if kind in result]
        if not kinds:
            raise ValueError("neither rows nor claims")
        kind = kinds[0]
        columns = {name: result[name] for name in (kind, "example", "sentence") if name in result}
        new_lines = [{"kind": kind, "name": kind, **columns, "settings": result.get("settings")}]
    if experiment:
        new_lines = [{**line, "kind": "experiment", "name": experiment} for line in new_lines
                     if line["name"] == "dual"]
    text = json.dumps([{**about, **line} for line in new_lines])
    return json.loads(text.replace(folder.rstrip("/") + "/", "DIR/") if folder else text)

def key_of(line):
    """What tells lines apart: of two with one key, the later replaces the earlier."""
    return json.dumps([line.get(name) for name in (
        "kind", "name", "model", "text_sha256", "seq_len", "sink", "dtype", "k_key", "k_val",
        "settings")], sort_keys=True)

def check_together(old, new):
    """Raises UsageError where two lines cannot stand in one file."""
    if old["model"] != new["model"]:
        return
    a, b = torch.tensor(old["fingerprint"]), torch.tensor(new["fingerprint"])
    if a.shape != b.shape or (a - b).norm() > 0.02 * a.norm():
        raise sta.UsageError(f"two models are named {new['model']}: their weights differ")
    same_text = all(old[name] == new[name] for name in ("text", "tokens", "seq_len"))
    if same_text and old["text_sha256"] != new["text_sha256"]:
        raise sta.UsageError(f"two texts are named {new['text']}: hash {old['text_sha256']} there, "
                             f"{new['text_sha256']} here")
    same = all(old[name] == new[name] for name in ("text_sha256", "seq_len", "dtype", "kind"))
    if same and new["kind"] == "row" and abs(old["dense_ce"] - new["dense_ce"]) > 2e-4:
        raise sta.UsageError(f"{new['model']} on {new['text']}: the dense loss is "
                             f"{old['dense_ce']:.5f} there, {new['dense_ce']:.5f} here")

def add(paths, folder, file=None, experiment=None, only=""):
    """Take the rows of result files into results.jsonl, each in the place of an older one."""
    file = file or FILE
    lines = {key_of(line): line for line in read(file)} if file.exists() else {}
    for path in paths:
        with explain(f"{path}: no result of a model by this version; leave it out"):
            new = lines_of(json.loads(path.read_text()), folder, experiment)
        new = [line for line in new if re.search(only, line["name"])]
        for line in new:
            if line["kind"] in ("row", "experiment"):
                line["dense_ce"] = line["ce"] - line["delta_ce"]
            for old in lines.values():
                check_together(old, line)
            lines[key_of(line)] = line
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines.values())
    write_atomic(file, text)
    print(f"{file}: {len(lines)} lines, {len(text):,} bytes")

def read(file=None):
    with explain(f"{file or FILE}: corrupt"):
        return [json.loads(line) for line in (file or FILE).read_text().splitlines()]

# ------------------------------------------------------------------ the tables
def pick(lines, **wanted):
    """The lines whose columns have the values wanted."""
    return [line for line in lines if all(line.get(name) == x for name, x in wanted.items())]

def seed_of(line):
    settings = line["settings"] or {}
    return settings.get("seed", settings.get("calibration", {}).get("seed"))

def spread(values, digits=3):
    """Numbers of several seeds -> "mean ± standard deviation"; of one, the number; of none, ""."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

def markdown(header, rows):
    return ["| " + " | ".join(header) + " |", "|---" * len(header) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]

QUICK_START = ["dense", "keys", "values", "dual", "uniform", "reverse", "searched"]

def quick_start(lines):
    """What the README's quick start prints for tiny, seed 0."""
    rows = [row for row in longest(pick(lines, kind="row", model="tiny"))
            if row["name"] in QUICK_START and seed_of(row) in (None, 0)]
    rows.sort(key=lambda row: QUICK_START.index(row["name"]))
    return ["```", evaluate.HEADER.format(name="row", width=8),
            *(evaluate.format_row(row, 8) for row in rows), "```"]

def verdicts(lines):
    """P1 to P8: the figure of each model, over its seeds, and the verdict."""
    claims = pick(lines, kind="claim")
    models = list(dict.fromkeys(line["model"] for line in claims))

    def cell(claim, model):
        of_model = pick(claims, claim=claim, model=model)
        if not of_model:
            return ""
        words = [{"holds in part": "in part", "does not hold here": "no"}.get(word, word)
                 for word in (line["verdict"] for line in of_model)]
        words = words[:1] if len(set(words)) == 1 else sorted(words, reverse=True)
        return f"{', '.join(words)}: {spread([line['figure'] for line in of_model])}"

    rows = []
    for claim, (statement, figure, _) in CLAIMS.items():
        if claim.endswith(SEARCHED):  # stands in the row of its one pass
            continue
        cells = [cell(claim, model) for model in models]
        if claim + SEARCHED in CLAIMS:
            cells = [one_pass and f"{one_pass}; searched {cell(claim + SEARCHED, model)}"
                     for one_pass, model in zip(cells, models)]
        rows.append([claim, f"{statement} (*{figure}*)", *cells])
    return markdown(["", "claim (*and its figure*)",
                     *(pathlib.Path(model).name for model in models)], rows)

def rules(lines):
    return markdown(["claim", "holds if; and in part if"],
                    [[claim, rule] for claim, (_, _, rule) in CLAIMS.items()
                     if not claim.endswith(SEARCHED)])

def one_layer(lines, model):
    """Ratio to dense perplexity with one layer coded, and the change of the residual stream."""
    rows = [row for row in pick(lines, kind="row", model=model) if row["method"] in (
        "one layer", "one layer, searched")]
    layers = sorted({int(row["name"].split()[1].rstrip(",")) for row in rows})
    table = [[label, *(spread([row["ratio"] for row in pick(
        rows, name=f"layer {layer} alone{ending}")], 4) for layer in layers)]
        for label, ending in (("one pass", ""), ("searched", SEARCHED))]
    streams = [line["stream"] for line in pick(lines, kind="stream", model=model)]
    if streams:
        table.append(["change of the residual stream, one pass", *(
            spread([stream[str(layer)] for stream in streams]) for layer in layers)])
    return markdown(["layer", *map(str, layers)], table)

# What a reader may change, how, and the rows that show what happens.
EXPERIMENTS = [
    ("code the first token, too", "`python evaluate.py --sink 0`",
     {"kind": "experiment", "name": "sink 0"}),
    ("swap the budgets: 16 atoms per key, 8 per value", "the row `reverse`",
     {"kind": "row", "name": "reverse"}),
    ("code one layer", "`python evaluate.py --layer 3`", {"kind": "row", "name": "layer 3 alone"}),
    ("one atom per vector", "`python evaluate.py --k-key 1 --k-val 1`",
     {"kind": "experiment", "name": "k 1"}),
    ("a dictionary of 64 atoms", "`python train_sae.py --n-latents 64 --out small && python "
     "evaluate.py --saes small`", {"kind": "experiment", "name": "64 latents"}),
    ("search for the atoms", "`python evaluate.py --rows variants`, the row `searched`",
     {"kind": "row", "name": "searched"})]

def experiments(lines):
    """Experiments on tiny: ratio to dense perplexity, all on the same text."""
    rows = []
    for change, command, wanted in EXPERIMENTS:
        ratios = [row["ratio"] for row in longest(pick(lines, model="tiny", **wanted))]
        rows.append([change, command, spread(ratios)])
    return markdown(["change", "how", "perplexity, ratio to dense"], rows)

def longest(rows):
    """Of the rows, those on the longest part of each text, in the shortest windows."""
    most = {}
    for row in rows:
        extent = row["tokens"], -row["seq_len"]
        most[row["text"]] = max(extent, most.get(row["text"], extent))
    return [row for row in rows if (row["tokens"], -row["seq_len"]) == most[row["text"]]]

def on_text(rows, text="valid"):
    """Of the rows, those on a text; valid is of the kind that the codes were fitted to."""
    return [row for row in rows if pathlib.Path(row["text"]).stem == text]

def compared(lines, model):
    """Rows of the methods that are compared by bytes, on the longest part of each text; not those
    of the dual budget's SAEs at budgets that they were not trained for."""
    return [row for row in longest(pick(lines, kind="row", model=model))
            if row["method"] in METHODS and not row["name"].startswith("dual ")]

def by_share(lines, model):
    """Ratio to dense perplexity by method and share of bf16, "/" between texts."""
    rows = compared(lines, model)
    texts = sorted({row["text"] for row in rows}, reverse=True)
    shares, table = [], []
    for share in sorted({row["bytes_share"] for row in rows}):  # those within 2 % share a column
        shares += [share] * (not shares or share > 1.02 * shares[-1])
    for method in (method for method in METHODS if pick(rows, method=method)):
        cells = []
        for share in shares:
            here = [[row["ratio"] for row in pick(rows, method=method, text=text)
                     if share <= row["bytes_share"] <= 1.02 * share] for text in texts]
            cells.append(" / ".join(spread(x) if x else "-" for x in here) if any(here) else "")
        table.append([method, *cells])
    header = " / ".join(pathlib.Path(text).stem for text in texts)
    return markdown([header, *(f"{100 * share:.3g} %" for share in shares)], table)

def engineer(lines):
    """The dual budget beside what sees a whole layer, at half of its bytes."""
    table = []
    for method in ("dual", "searched", "transform", "additive"):
        cells = []
        for model in ("tiny", *OTHERS):
            rows = on_text(compared(lines, model))
            most = pick(rows, name="dual")[0]["bytes_share"]
            limit = most if method in ("dual", "searched") else most / 2
            rows = [row for row in pick(rows, method=method) if row["bytes_share"] <= 1.02 * limit]
            share = max([row["bytes_share"] for row in rows], default=0)
            ratios = [row["ratio"] for row in rows if row["bytes_share"] > 0.98 * share]
            cells.append(f"{spread(ratios)} at {100 * share:.3g} %" if ratios else "")
        table.append([method, *cells])
    return markdown(["code", "tiny", *OTHERS.values()], table)

def paired(lines, a="additive", b="transform"):
    """Nats per token by which method b is worse than a, by share, with the standard error over
    windows: on each model and text, of one seed."""
    found, names = {}, ("text_sha256", "seq_len", "dtype")
    for model in OTHERS:
        rows = compared(lines, model)
        for one in pick(rows, method=a):
            for other in pick(rows, method=b, **{name: one[name] for name in names}):
                if seed_of(one) == seed_of(other) and abs(
                        one["bytes_share"] - other["bytes_share"]) < 0.002:
                    gaps = [y - x for x, y in zip(one["window_ce"], other["window_ce"])]
                    cells = found.setdefault((model, one["text"], seed_of(one)), {})
                    cells[round(100 * one["bytes_share"], 2)] = "{:+.4f} ± {:.4f}".format(
                        *mean_stderr(gaps))
    shares = sorted({share for cells in found.values() for share in cells})
    return markdown([f"{b} worse than {a}, nats", *(f"{share:.3g} %" for share in shares)], [
        [f"{OTHERS[model]}, {pathlib.Path(text).stem}", *(cells.get(share, "") for share in shares)]
        for (model, text, _), cells in found.items()])

def by_window(lines):
    """Ratio to the dense model's perplexity in windows of the same length, at (8, 16) atoms."""
    table = []
    for model, name in itertools.product(OTHERS, ("dual", "searched")):
        rows_of_name = pick(lines, kind="row", model=model, name=name, k_key=8, k_val=16)
        rows = [on_text(longest(pick(rows_of_name, seq_len=length))) for length in (512, 2048)]
        table.append([f"{OTHERS[model]}, {name}",
                      *(spread([row["ratio"] for row in some]) for some in rows)])
    return markdown(["windows of", "512", "2,048"], table)

def tasks(lines):
    """Change in accuracy from dense, in points, with its paired standard error; of a row that was
    scored more than once, the last time."""
    rows = {(model, row["name"]): row for model in OTHERS
            for row in pick(lines, kind="row", model=model)
            if row["tasks"] and row["name"] != "dense"}.values()
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))

    def cell(task):
        return f"{100 * task['delta_acc']:+.1f} ± {100 * task['delta_acc_stderr']:.1f}"

    return markdown(["change of accuracy, points", "share", *names], [
        [f"{OTHERS[row['model']]}, {row['name']}", f"{100 * row['bytes_share']:.3g} %",
         *(cell(row["tasks"][name]) if name in row["tasks"] else "" for name in names)]
        for row in rows])

def peers(lines):
    """FVU of held-out vectors by site and library, then ms per step by shape."""
    found = pick(lines, kind="peers")
    if not found:
        return []
    result = found[-1]["peers"]
    names = list(next(iter(result["sites"].values())))
    fvu = [[f"FVU, {site}", *(spread(by_name[name]["fvu"], 4) for name in names)]
           for site, by_name in result["sites"].items()]
    ms = [[f"ms per step, {shape}", *(f"{by_name[name]:.1f}" for name in names)]
          for shape, by_name in result["times"].items()]
    return markdown(["", *names], fvu + ms)

def token_times(lines):
    """Of beyond/cache.py --contexts: ms for a further token, and the bytes of the cache."""
    costs = [cost for line in pick(lines, kind="caches", model=SMOLLM2)
             for cost in line["caches"]]
    contexts, table = sorted({cost["context"] for cost in costs}), []
    for name, keep in dict.fromkeys((cost["name"], cost["keep"]) for cost in costs):
        cells = {cost["context"]: f"{cost['token_ms']:.0f} ms, {cost['bytes'] / 1e6:.1f} MB"
                 for cost in pick(costs, name=name, keep=keep)}
        table.append([name + ", kept decoded" * keep, *map(cells.get, contexts)])
    return markdown(["cache", *(f"{context:,}" for context in contexts)], table)

def describable(lines):
    """Which share of directions the blind rule of beyond/atoms.py describes."""
    names, rows = ("atoms", "token means", "random"), []
    for line in pick(lines, kind="check"):
        for layer in dict.fromkeys(site.split(".")[0] for site in line["check"]):
            key, value = (line["check"][f"{layer}.{kind}"] for kind in sta.KINDS)
            rows.append([f"{pathlib.Path(line['model']).name}, {layer}", *(
                f"{key[name][column]:.2f} / {value[name][column]:.2f}"
                for column in ("strongest", "range") for name in names)])
    return markdown(["model, layer; key / value", *(f"{name}, {column}" for column in (
        "ten strongest", "ten at random") for name in names)], rows)

def one_key(lines):
    """The code of a sentence's last key, as beyond/atoms.py has it."""
    line = pick(lines, kind="check", model=QWEN)[-1:]
    if not line:
        return []
    def quoted(texts):
        words = [text.strip() for text in texts]
        return " ".join(f"`{word}`" for word in words if word.isprintable() and word
                        and "`" not in word and "|" not in word)
    example = line[0]["example"]["27.key"]
    return markdown(
        ["atom", "coefficient", "fires on", "strongest tokens", "any tokens, at random",
         "words whose queries seek it most"],
        [[str(row["atom"]), f"{row['z']:.2f}", f"{100 * row['fired']:.1f} %",
          *(quoted(row[name]) for name in ("strongest", "sample", "queries"))]
         for row in example])

QWEN = "DIR/qwen2.5-coder-1.5b-instruct"
SEARCHED = ", searched"  # ends the names of claims on searched codes
SMOLLM2 = "DIR/smollm2-135m-instruct"
OTHERS = {QWEN: "Qwen2.5-Coder-1.5B", SMOLLM2: "SmolLM2-135M"}
TABLES = {"quick start": quick_start, "experiments": experiments, "engineer": engineer,
          "verdicts": verdicts, "rules": rules, "token times": token_times, "peers": peers,
          "describable": describable, "one key": one_key, "paired": paired, "tasks": tasks,
          "windows": by_window,
          **{f"{short} {name}": functools.partial(table, model=model)
             for short, model in (("tiny", "tiny"), ("qwen", QWEN), ("smollm2", SMOLLM2))
             for name, table in (("by share", by_share), ("one layer", one_layer))}}

def ratio(model, name, text="valid", digits=3):
    """Of a sentence's figure: a row's ratio to dense perplexity on a text."""
    return lambda lines: spread([row["ratio"] for row in on_text(longest(
        pick(lines, kind="row", model=model, name=name)), text)] or [math.nan], digits)

def tiny_one_layer(lines):
    some = pick(lines, kind="claim", claim="P6 one layer", model="tiny")
    return f"{statistics.mean(line['figure'] for line in some):.3f}"

def tiny_break_even(lines):
    return f"{pick(lines, kind='row', model='tiny', name='dual')[0]['break_even_tokens']:,}"

FIGURES = {"tiny dual": ratio("tiny", "dual"), "tiny searched": ratio("tiny", "searched"),
           "tiny one layer": tiny_one_layer, "tiny break even": tiny_break_even,
           "qwen dual": ratio(QWEN, "dual"), "qwen searched": ratio(QWEN, "searched"),
           **{f"qwen {text} {name}": ratio(QWEN, name, text, digits)
              for text in ("prose", "code") for name, digits in (
                  ("dual", 1), ("keys", 1), ("values", 1), ("searched", 1), ("additive 18.75", 3))}}

# ------------------------------------------------------------------ the picture
def draw_bytes(lines, model):
    """The rise of perplexity against the bytes, one curve per method, on the fitted kind of text,
    means over seeds. A point at or below dense is drawn at the edge, with an arrow."""
    figure, panel = plots.plt.subplots(figsize=(8, 4.5), layout="constrained")
    rows = on_text(compared(lines, model))
    floor = min([row["ratio"] - 1 for row in rows if row["ratio"] > 1.0001], default=1) / 2
    for method in (method for method in METHODS if pick(rows, method=method)):
        by_share = {}
        for row in pick(rows, method=method):
            by_share.setdefault(round(100 * row["bytes_share"], 1), []).append(row["ratio"] - 1)
        points = sorted((share, max(floor, statistics.mean(rises)))
                        for share, rises in by_share.items())
        label, colour, marker, dash = plots.STYLE[method]
        panel.plot(*zip(*((share, 100 * rise) for share, rise in points)), color=colour,
                   marker=marker, ls=dash, label=label)
        for share, rise in points:
            if rise == floor:
                panel.annotate("", (share, 100 * floor), xytext=(0, 16), textcoords="offset points",
                               arrowprops={"arrowstyle": "->", "color": colour})
    panel.set_yscale("log")
    plots.log_axis(panel.yaxis, " %")
    panel.set_xlim(left=0)
    panel.set_xlabel("bytes of the KV cache, % of bf16")
    panel.set_ylabel("perplexity above dense")
    panel.legend()
    return figure

# ------------------------------------------------------------------ the READMEs
def filled(text, lines):
    """A README's text with its tables and figures made anew. Raises UsageError: unknown name."""
    def table(match):
        if match[1] not in TABLES:
            raise sta.UsageError(f"<!-- table: {match[1]} -->: want one of {', '.join(TABLES)}")
        return "\n".join([f"<!-- table: {match[1]} -->", *TABLES[match[1]](lines), "<!-- end -->"])

    def figure(match):
        if match[2] not in FIGURES:
            raise sta.UsageError(f"<!--={match[2]}-->: want one of {', '.join(FIGURES)}")
        return f"{FIGURES[match[2]](lines)}<!--={match[2]}-->"

    text = re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", table, text, flags=re.S)
    return re.sub(r"([\d.,]+|nan)(?: ± [\d.]+)?<!--=(.*?)-->", figure, text)

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["add", "print", "write"], default="print")
    parser.add_argument("results", nargs="*", type=pathlib.Path, help="for add: JSON files")
    parser.add_argument("--dir", default="", help="for add: the folder to be written as DIR")
    parser.add_argument("--experiment", help="for add: keep the dual row only, under this name")
    parser.add_argument("--only", default="", help="for add: take what matches this pattern only")
    args = parser.parse_args(argv)
    check_pattern(args.only)
    if args.what == "add":
        return add(args.results, args.dir, experiment=args.experiment, only=args.only)
    lines = read()
    if args.what == "write":
        for path in READMES:
            write_atomic(path, filled(path.read_text(), lines))
        name = f"{pathlib.Path(SMOLLM2).name}-bytes.png"
        return plots.save(draw_bytes(lines, SMOLLM2), FILE.with_name(name))
    for name, table in TABLES.items():
        print(f"{name}\n" + "\n".join(table(lines)) + "\n")
    for name, figure in FIGURES.items():
        print(f"{name}: {figure(lines)}")

if __name__ == "__main__":
    run_main(main)
