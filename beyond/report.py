"""Results -> figures/results.jsonl -> the tables and figures of README.md and beyond/README.md.

    python -m beyond.report add results/*.json         # takes the rows of those files in
    python -m beyond.report                            # prints every table and every figure
    python -m beyond.report write                      # puts them into the two READMEs

results.jsonl has one line per row that a README quotes, with all that tells where it comes from:
model and hash of its weights, text and hash of its tokens, how the codec was fitted, command,
commit, machine. Rows of two models, of two texts, or of two dense losses never stand under one
name: `add` refuses them and says why. In a README, a table stands between <!-- table: NAME --> and
<!-- end -->, and a figure in a sentence before <!--=NAME-->. A test compares all of them with what
is printed here. Spreads: ± over seeds is a standard deviation; ± of one run is a standard error,
paired over windows.
"""
import argparse
import functools
import itertools
import json
import pathlib
import re
import statistics

import evaluate
import plots
import sta
from beyond.claims import CLAIMS, SEARCHED
from support.files import ROOT, explain, run_main, write_atomic
from support.results import check_pattern
from support.tasks import mean_stderr

FILE = ROOT / "figures" / "results.jsonl"
READMES = (ROOT / "README.md", ROOT / "beyond" / "README.md")
PROVENANCE = ("model", "text", "text_sha256", "tokens", "seq_len", "dtype", "command", "commit",
              "device", "torch", "transformers", "date")
METHODS = ("dual", "searched", "layer SAE", "grouped", "rotated", "transform", "additive")
QWEN, SMOLLM2 = "DIR/qwen2.5-coder-1.5b-instruct", "DIR/smollm2-135m-instruct"
MODELS = {"tiny": "tiny", "qwen": QWEN, "smollm2": SMOLLM2}
OTHERS = {QWEN: "Qwen2.5-Coder-1.5B", SMOLLM2: "SmolLM2-135M"}

# ------------------------------------------------------------------ taking results in
def shortened(row):
    """A row of evaluate.py, as results.jsonl keeps it."""
    tasks = {name: {**task, "right": "".join(str(int(x)) for x in task["right"])}
             for name, task in row["tasks"].items()}
    return {"kind": "row", **row, "window_ce": [round(x, 4) for x in row["window_ce"]],
            "by_layer": None, "tasks": tasks, "dense_ce": row["ce"] - row["delta_ce"]}

def lines_of(result, folder, experiment=None):
    """What a result file holds -> [line of results.jsonl]; `folder` is written as DIR. Of an
    experiment, only the row of the dual budget is kept, under the experiment's name."""
    about = {name: result.get(name) for name in PROVENANCE}
    about["model_sha256"] = result["model_sha256"]
    about["sink"] = result.get("config", {}).get("sink", 1)
    if "rows" in result:
        new_lines = [shortened(row) for row in result["rows"]]
    else:
        about["settings"] = result.get("settings")
        new_lines = [{"kind": "claim", "name": claim["claim"], **claim}
                     for claim in result.get("claims", [])]
        new_lines += [{"kind": kind, "name": kind, kind: result[kind], **(
            {"example": result["example"]} if kind == "check" else {})}
            for kind in ("stream", "check", "caches", "table", "peers") if kind in result]
        if not new_lines:
            raise ValueError("neither rows nor claims")
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
    def same(*names):
        return all(old[name] == new[name] for name in names)

    if same("model") and not same("model_sha256"):
        raise sta.UsageError(f"two models are named {new['model']}: their weights differ")
    if same("model", "text", "tokens", "seq_len") and not same("text_sha256"):
        raise sta.UsageError(f"two texts are named {new['text']}: hash {old['text_sha256']} there, "
                             f"{new['text_sha256']} here")
    if same("model", "text_sha256", "seq_len", "dtype", "kind") and "dense_ce" in new and (
            abs(old["dense_ce"] - new["dense_ce"]) > 2e-4):
        raise sta.UsageError(f"{new['model']} on {new['text']}: the dense loss is "
                             f"{old['dense_ce']:.5f} there, {new['dense_ce']:.5f} here")

def add(paths, folder, file=FILE, experiment=None, only=""):
    """Take the rows of result files into results.jsonl, each in the place of an older one."""
    lines = {key_of(line): line for line in read(file)} if file.exists() else {}
    for path in paths:
        with explain(f"{path}: no result of a model by this version; leave it out"):
            new_lines = lines_of(json.loads(path.read_text()), folder, experiment)
        for new in new_lines:
            if re.search(only, new["name"]):
                for old in lines.values():
                    check_together(old, new)
                lines[key_of(new)] = new
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines.values())
    write_atomic(file, text)
    print(f"{file}: {len(lines)} lines, {len(text):,} bytes")

def read(file=FILE):
    with explain(f"{file}: corrupt"):
        return [json.loads(line) for line in file.read_text().splitlines()]

# ------------------------------------------------------------------ which lines, and how they look
def pick(lines, **wanted):
    """The lines whose columns have the values wanted."""
    return [line for line in lines if all(line.get(name) == x for name, x in wanted.items())]

def longest(rows):
    """Of the rows, those on the longest part of each text, in the shortest windows."""
    extents = {}
    for row in rows:
        extents.setdefault(row["text"], []).append((row["tokens"], -row["seq_len"]))
    return [row for row in rows
            if (row["tokens"], -row["seq_len"]) == max(extents[row["text"]])]

def on_text(rows, text="valid"):
    """Of the rows, those on a text; valid is of the kind that the codes were fitted to."""
    return [row for row in rows if pathlib.Path(row["text"]).stem == text]

def compared(lines, model):
    """Rows of the methods that are compared by bytes, by rising bytes, on the longest part of each
    text; not those of the dual budget's SAEs at budgets that they were not trained for."""
    rows = [row for row in longest(pick(lines, kind="row", model=model))
            if row["method"] in METHODS and not row["name"].startswith("dual ")]
    return sorted(rows, key=lambda row: row["bytes_share"])

def seed_of(line):
    settings = line["settings"] or {}
    return settings.get("seed", settings.get("calibration", {}).get("seed"))

def spread(values, digits=3):
    """Numbers of several seeds -> "mean ± standard deviation"; of one, the number; of none, ""."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")

def ratio(lines, digits=3, text="valid", **wanted):
    """The ratio to the dense model's perplexity of the rows wanted, over seeds."""
    rows = longest(on_text(pick(lines, **wanted), text))
    return spread([row["ratio"] for row in rows], digits)

def percent(share):
    return f"{100 * share:.3g} %"

def markdown(heading, rows):
    return ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]

def table(corner, cells):
    """{(row, column): text} -> a table whose rows and columns stand in the order of its cells."""
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells)) if cells else ([], [])
    return markdown([corner, *columns],
                    [[row, *(cells.get((row, column), "") for column in columns)] for row in rows])

# ------------------------------------------------------------------ the tables of README.md
QUICK_START = ["dense", "means", "keys", "values", "dual", "uniform", "reverse", "searched"]

def quick_start(lines):
    """What the README's quick start prints for tiny, seed 0."""
    rows = [row for row in longest(pick(lines, kind="row", model="tiny"))
            if row["name"] in QUICK_START and seed_of(row) in (None, 0)]
    rows.sort(key=lambda row: QUICK_START.index(row["name"]))
    return ["```", evaluate.HEADER.format(name="row", width=8),
            *(evaluate.format_row(row, 8) for row in rows), "```"]

def one_key(lines):
    """The code of a sentence's last key, as beyond/atoms.py has it."""
    def quoted(texts):
        words = [text.strip() for text in texts]
        return " ".join(f"`{word}`" for word in words if word.isprintable() and word
                        and "`" not in word and "|" not in word)

    atoms = [atom for line in pick(lines, kind="check", model=QWEN)[-1:]
             for atom in line["example"]["27.key"]]
    return markdown(
        ["atom", "coefficient", "fires on", "strongest tokens", "any tokens, at random",
         "words whose queries seek it most"],
        [[str(atom["atom"]), f"{atom['z']:.2f}", f"{100 * atom['fired']:.1f} %",
          *(quoted(atom[name]) for name in ("strongest", "sample", "queries"))] for atom in atoms])

def engineer(lines):
    """The dual budget beside what sees a whole layer, at half of its bytes."""
    cells = {}
    for model, label in {"tiny": "tiny", **OTHERS}.items():
        rows = on_text(compared(lines, model))
        dual_share = pick(rows, name="dual")[0]["bytes_share"]
        for method, part in (("dual", 1), ("searched", 1), ("transform", 1 / 2),
                             ("additive", 1 / 2)):
            allowed = [row for row in pick(rows, method=method)
                       if row["bytes_share"] <= 1.02 * part * dual_share]
            share = max([row["bytes_share"] for row in allowed], default=0)
            nearest = [row for row in allowed if row["bytes_share"] > 0.98 * share]
            cells[method, label] = f"{ratio(nearest)} at {percent(share)}" if nearest else ""
    return table("code", cells)

EXPERIMENTS = [  # what a reader may change, how, and the row that shows what happens
    ("code the first token, too", "`python evaluate.py --sink 0`", "sink 0"),
    ("swap the budgets: 16 atoms per key, 8 per value", "the row `reverse`", "reverse"),
    ("code one layer", "`python evaluate.py --layer 3`", "layer 3 alone"),
    ("one atom per vector", "`python evaluate.py --k-key 1 --k-val 1`", "k 1"),
    ("a dictionary of 64 atoms", "`python train_sae.py --n-latents 64 --out small && python "
     "evaluate.py --saes small`", "64 latents"),
    ("search for the atoms", "`python evaluate.py --rows variants`, the row `searched`",
     "searched")]

def experiments(lines):
    """Experiments on tiny, all on the same text."""
    return markdown(["change", "how", "perplexity, ratio to dense"], [
        [change, command, ratio(lines, model="tiny", name=name)]
        for change, command, name in EXPERIMENTS])

def verdict_of(claims):
    """One claim on one model, a line per seed -> "no, no, holds: 0.001 ± 0.000"."""
    short = {"holds in part": "in part", "does not hold here": "no"}
    words = sorted((short.get(line["verdict"], line["verdict"]) for line in claims), reverse=True)
    words = words[:1] if len(set(words)) == 1 else words
    return f"{', '.join(words)}: {spread([line['figure'] for line in claims])}"

def verdicts(lines):
    """P1 to P8: the figure of each model, over its seeds, and the verdict."""
    lines, rows = pick(lines, kind="claim"), []
    models = list(dict.fromkeys(line["model"] for line in lines))
    for claim, (statement, figure, _) in CLAIMS.items():
        cells = []
        for model in models:
            both = [pick(lines, claim=claim + ending, model=model) for ending in ("", SEARCHED)]
            cells.append("; searched ".join(verdict_of(claims) for claims in both if claims))
        rows.append([claim, f"{statement} (*{figure}*)", *cells])
    return markdown(["", "claim (*and its figure*)",
                     *(pathlib.Path(model).name for model in models)], rows)

# ------------------------------------------------------------------ those of beyond/README.md
def by_share(lines, model):
    """Ratio to dense perplexity by method and share of bf16, "/" between texts."""
    rows, first, groups = compared(lines, model), 0, {}
    texts = sorted({pathlib.Path(row["text"]).stem for row in rows}, reverse=True)
    for row in rows:
        if row["bytes_share"] > 1.02 * first:  # those within 2 % share a column
            first = row["bytes_share"]
        groups.setdefault(percent(first), []).append(row)
    cells = {}
    for method, column in itertools.product(METHODS, groups):
        by_text = [ratio(groups[column], text=text, method=method) for text in texts]
        if pick(rows, method=method):
            cells[method, column] = " / ".join(x or "-" for x in by_text) if any(by_text) else ""
    return table(" / ".join(texts), cells)

def paired(lines):
    """Nats per token by which transform is worse than additive codes, by share, with the standard
    error over windows: on each model and text, of one seed."""
    def run_of(row):
        return row["text_sha256"], row["seq_len"], row["dtype"], seed_of(row)

    cells = {}
    for model, label in OTHERS.items():
        rows = compared(lines, model)
        for a, b in itertools.product(pick(rows, method="additive"),
                                      pick(rows, method="transform")):
            if run_of(a) == run_of(b) and abs(a["bytes_share"] - b["bytes_share"]) < 0.002:
                gap = mean_stderr([y - x for x, y in zip(a["window_ce"], b["window_ce"])])
                row = f"{label}, {pathlib.Path(a['text']).stem}"
                cells[row, percent(a["bytes_share"])] = "{:+.4f} ± {:.4f}".format(*gap)
    return table("transform worse than additive, nats", cells)

def windows(lines):
    """Ratio to the dense model's perplexity in windows of the same length, at (8, 16) atoms."""
    cells = {}
    for model, name, length in itertools.product(OTHERS, ("dual", "searched"), (512, 2048)):
        cells[f"{OTHERS[model]}, {name}", f"{length:,}"] = ratio(
            lines, model=model, name=name, k_key=8, k_val=16, seq_len=length)
    return table("windows of", cells)

def tasks(lines):
    """Change in accuracy from dense, in points, with its paired standard error; of a row that was
    scored more than once, the last time."""
    rows = [row for model in OTHERS for row in pick(lines, kind="row", model=model)
            if row["tasks"] and row["name"] != "dense"]
    cells = {}
    for row in rows:
        label = f"{OTHERS[row['model']]}, {row['name']}"
        cells[label, "share"] = percent(row["bytes_share"])
        for name, task in row["tasks"].items():
            cells[label, name] = (
                f"{100 * task['delta_acc']:+.1f} ± {100 * task['delta_acc_stderr']:.1f}")
    return table("change of accuracy, points", cells)

def token_times(lines):
    """Of beyond/cache.py --contexts: ms for a further token, and the bytes of the cache."""
    return table("cache", {
        (cost["name"] + ", kept decoded" * cost["keep"], f"{cost['context']:,}"):
        f"{cost['token_ms']:.0f} ms, {cost['bytes'] / 1e6:.1f} MB"
        for line in pick(lines, kind="caches", model=SMOLLM2) for cost in line["caches"]})

def one_layer(lines, model):
    """Ratio to dense perplexity with one layer coded, and the change of the residual stream."""
    rows, streams = (pick(lines, kind=kind, model=model) for kind in ("row", "stream"))
    names = {row["name"] for row in pick(rows, method="one layer")}
    cells = {}
    for layer in sorted(int(name.split()[1]) for name in names):
        for label, ending in (("one pass", ""), ("searched", SEARCHED)):
            cells[label, str(layer)] = ratio(rows, 4, name=f"layer {layer} alone{ending}")
        cells["change of the residual stream, one pass", str(layer)] = spread(
            [line["stream"][str(layer)] for line in streams])
    return table("layer", cells)

def describable(lines):
    """Which share of directions the blind rule of beyond/atoms.py describes."""
    cells = {}
    for line in pick(lines, kind="check"):
        for site in line["check"]:
            layer = site.split(".")[0]
            row = f"{pathlib.Path(line['model']).name}, {layer}"
            for column, heading in (("strongest", "ten strongest"), ("range", "ten at random")):
                for name in ("atoms", "token means", "random"):
                    cells[row, f"{name}, {heading}"] = " / ".join(
                        f"{line['check'][f'{layer}.{kind}'][name][column]:.2f}"
                        for kind in sta.KINDS)
    return table("model, layer; key / value", cells)

def peers(lines):
    """FVU of held-out vectors by site and library, then ms per step by shape."""
    cells = {}
    for line in pick(lines, kind="peers")[-1:]:
        for site, by_name in line["peers"]["sites"].items():
            cells |= {(f"FVU, {site}", name): spread(x["fvu"], 4) for name, x in by_name.items()}
        for shape, by_name in line["peers"]["times"].items():
            cells |= {(f"ms per step, {shape}", name): f"{ms:.1f}" for name, ms in by_name.items()}
    return table("", cells)

def rules(lines):
    return markdown(["claim", "holds if; and in part if"],
                    [[claim, rule] for claim, (_, _, rule) in CLAIMS.items()])

TABLES = {"quick start": quick_start, "experiments": experiments, "engineer": engineer,
          "verdicts": verdicts, "rules": rules, "token times": token_times, "peers": peers,
          "describable": describable, "one key": one_key, "paired": paired, "tasks": tasks,
          "windows": windows,
          **{f"{short} {name}": functools.partial(table_of, model=model)
             for short, model in MODELS.items()
             for name, table_of in (("by share", by_share), ("one layer", one_layer))}}

# ------------------------------------------------------------------ figures in sentences, a picture
FIGURES = {
    "tiny one layer": lambda lines: "{:.3f}".format(statistics.mean(
        line["figure"] for line in pick(lines, claim="P6 one layer", model="tiny"))),
    "tiny break even": lambda lines: "{:,}".format(
        pick(lines, model="tiny", name="dual")[0]["break_even_tokens"]),
    **{f"{short} {name}": functools.partial(ratio, model=MODELS[short], name=name)
       for short in ("tiny", "qwen") for name in ("dual", "searched")},
    **{f"qwen {text} {name}": functools.partial(ratio, model=QWEN, name=name, text=text,
                                                digits=digits)
       for text in ("prose", "code") for name, digits in (
           ("dual", 1), ("keys", 1), ("values", 1), ("searched", 1), ("additive 18.75", 3))}}

def curves_by_bytes(lines, model):
    """For plots.draw_bytes: {method: [(share of bf16, rise of perplexity)]}, both in %, means over
    seeds, on the kind of text that the codes were fitted to."""
    rises = {}
    for row in on_text(compared(lines, model)):
        by_share = rises.setdefault(row["method"], {})
        by_share.setdefault(round(100 * row["bytes_share"], 1), []).append(100 * row["ratio"] - 100)
    return {method: [(share, statistics.mean(x)) for share, x in rises[method].items()]
            for method in METHODS if method in rises}

# ------------------------------------------------------------------ the READMEs
def filled(text, lines):
    """A README's text with its tables and figures made anew. Raises UsageError: unknown name."""
    def made(functions, name, marker):
        if name not in functions:
            raise sta.UsageError(f"{marker}: want one of {', '.join(functions)}")
        return functions[name](lines)

    def table_between(match):
        marker = f"<!-- table: {match[1]} -->"
        return "\n".join([marker, *made(TABLES, match[1], marker), "<!-- end -->"])

    def figure_before(match):
        marker = f"<!--={match[1]}-->"
        return (made(FIGURES, match[1], marker) or "nan") + marker

    text = re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", table_between, text, flags=re.S)
    return re.sub(r"(?:[\d.,]+|nan)(?: ± [\d.]+)?<!--=(.*?)-->", figure_before, text)

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
        name = pathlib.Path(SMOLLM2).name
        figure = plots.draw_bytes(curves_by_bytes(lines, SMOLLM2), OTHERS[SMOLLM2])
        return plots.save(figure, FILE.with_name(f"{name}-bytes.png"))
    for name, make in TABLES.items():
        print(f"{name}\n" + "\n".join(make(lines)) + "\n")
    for name, make in FIGURES.items():
        print(f"{name}: {make(lines)}")

if __name__ == "__main__":
    run_main(main)
