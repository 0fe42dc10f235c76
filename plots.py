"""Pictures from the JSON files of evaluate.py; computes only means and medians over layers.

    python plots.py                                        # results/*.json -> results/*.png
    python plots.py --results other/results --out pictures

For each model <model>-overview.png, -budget, -asymmetry, -bytes, -training. Colours are Okabe and
Ito's, which colour-blind readers can tell apart; markers and dashes tell them apart in grey.
Non-goals: styling options, several models in one picture.
"""
import argparse
import itertools
import json
import math
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")  # write files; no window, no display needed
import matplotlib.pyplot as plt

import sta

KIND_STYLE = {"key": ("#0072B2", "o", "-"), "value": ("#D55E00", "s", "--")}
METHOD_STYLE = {"dual": ("#009E73", "D", "-"), "keys": ("#0072B2", "o", "-"),
                "values": ("#D55E00", "s", "-"), "uniform": ("#CC79A7", "^", "-"),
                "reverse": ("#CC79A7", "v", "-")}
OTHERS = [("#E69F00", "X", "--"), ("black", "P", "-."), ("#56B4E9", "h", ":"),
          ("#0072B2", "<", "--"), ("#D55E00", ">", "-."), ("#882255", "p", ":")]

# ------------------------------------------------------------------ one panel each
def draw_budget(panel, result, metric, label):
    """A metric against k: shallow, middle and deep thirds of the layers, light to dark; the elbow
    of the median layer on the mean over layers."""
    layers = list(result["curves"].values())
    third = max(1, len(layers) // 3)
    bands = {"shallow": layers[:third], "middle": layers[third:-third], "deep": layers[-third:]}
    for kind, (colour, marker, dash) in KIND_STYLE.items():
        ks = [point["k"] for point in layers[0][kind]]

        def mean(chosen):
            return [statistics.mean(layer[kind][i][metric] for layer in chosen)
                    for i in range(len(ks))]

        for (name, band), alpha in zip(bands.items(), (0.3, 0.6, 1)):
            if band:
                panel.plot(ks, mean(band), color=colour, ls=dash, marker=marker, ms=4, alpha=alpha,
                           label=f"{kind}s, {name} layers")
        at = statistics.median_high(layer[f"elbow_{kind}"] for layer in layers)
        panel.plot(at, mean(layers)[ks.index(at)], marker="o", ms=15, mfc="none", mec=colour, ls="",
                   mew=1.5, label=f"elbow of {kind}s, k = {at}")
    panel.set_xscale("symlog", base=2, linthresh=1)  # k = 0, too: the head's mean alone
    panel.set_xticks(ks, [str(k) for k in ks])
    panel.set_xlabel("budget k (atoms per vector; 0: the head's mean)")
    panel.set_ylabel(label)
    panel.legend(fontsize=7, loc="lower right" if metric == "cos" else "upper right")
    if metric == "cos":
        panel.axhline(0.8, color="grey", lw=1, ls=":")
        panel.annotate("paper: keys pass 0.8 at k = 8", (ks[-1], 0.8), xytext=(0, -12), ha="right",
                       textcoords="offset points", color="dimgrey", fontsize=8)

def draw_by_layer(panel, lines, label):
    """{name: (colour, marker, dash, {layer: value})} against the layer."""
    for name, (colour, marker, dash, values) in lines.items():
        panel.plot([int(layer) for layer in values], list(values.values()), color=colour,
                   marker=marker, ls=dash, label=name)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("layer")
    panel.set_ylabel(label)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)

def at_eight(curve):
    """The point of a budget curve at 8 atoms, or at the most below that were measured."""
    return max((point for point in curve if point["k"] <= 8), key=lambda point: point["k"])

def draw_asymmetry(panel, result):
    lines = {}
    for kind, style in KIND_STYLE.items():
        points = {layer: at_eight(curves[kind]) for layer, curves in result["curves"].items()}
        lines[f"{kind}s"] = (*style, {layer: point["fvu"] for layer, point in points.items()})
    k = points[next(iter(points))]["k"]
    draw_by_layer(panel, lines, f"FVU at {k} atoms (variance left within heads)")

def draw_bytes(panel, result):
    """The rise of perplexity against the bytes, a curve a method, with 95 % intervals."""
    others, methods = itertools.cycle(OTHERS), {}
    for row in result["rows"]:
        if 1 < row["ratio"] < math.inf and row["bytes_share"] < 1:  # what a log axis can show
            methods.setdefault(row["method"], []).append(row)
    for method, rows in methods.items():
        colour, marker, dash = METHOD_STYLE.get(method) or next(others)
        rows = sorted(rows, key=lambda row: row["bytes_share"])
        rise = [100 * (row["ratio"] - 1) for row in rows]
        low = [100 * max(0, row["ratio"] - max(row["ratio_ci95"][0], 1.0001)) for row in rows]
        high = [100 * (row["ratio_ci95"][1] - row["ratio"]) for row in rows]
        panel.errorbar([100 * row["bytes_share"] for row in rows], rise, yerr=(low, high),
                       color=colour, marker=marker, ls=dash, ms=7, capsize=3, label=method)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g} %")
    panel.set_xlim(left=0)
    panel.set_xlabel("bytes of the KV cache, % of bf16")
    panel.set_ylabel(f"rise in perplexity ({result['tokens']:,} tokens)")
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the panel

def draw_training(panel, result):
    for run in result["training"]:
        for kind, (colour, marker, dash) in KIND_STYLE.items():
            panel.plot([entry["step"] for entry in run["log"]],
                       [entry["fvu"][kind] for entry in run["log"]], color=colour, ls=dash,
                       marker=marker, ms=3, label=f"{kind}s")
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("FVU of held-out vectors, mean over layers")
    panel.legend(fontsize=8)

# ------------------------------------------------------------------ one picture each
def draw_all(result):
    """{name: figure} of one result."""
    def cos(panel, result): draw_budget(panel, result, "cos", "cosine similarity of x and x_hat")
    def fvu(panel, result): draw_budget(panel, result, "fvu", "FVU (variance left within heads)")
    wanted, figures = {"bytes": ("the price of bytes", [draw_bytes])}, {}
    if result["curves"]:
        wanted["budget"] = "what k atoms keep of a vector", [cos, fvu]
        wanted["asymmetry"] = "keys against values", [draw_asymmetry]
        wanted["overview"] = "keys and values in atoms", [cos, draw_asymmetry, draw_bytes]
    if result["training"]:
        wanted["training"] = "training", [draw_training]
    for name, (title, draws) in wanted.items():
        figures[name], panels = plt.subplots(1, len(draws), squeeze=False, layout="constrained",
                                             figsize=(1.5 + 4.5 * len(draws), 4.5))
        for panel, draw in zip(panels[0], draws):
            draw(panel, result)
            panel.grid(alpha=0.25, which="both")
        figures[name].suptitle(f"{pathlib.Path(result['model']).name}: {title}", fontsize=12)
    return figures

def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--results", "--out"):
        parser.add_argument(option, type=pathlib.Path, default="results", help="(default results)")
    args = parser.parse_args(argv)
    results = {}
    for path in sorted(args.results.glob("*.json")):
        with sta.explain(f"{path}: not a result of evaluate.py; run that again"):
            content = json.loads(path.read_text())
            if "rows" in content:
                results[path.stem] = content
    if not results:
        raise sta.UsageError(f"{args.results}: no results; first run: python train_sae.py && "
                             "python evaluate.py")
    sta.check_out(args.out)
    for stem, result in results.items():
        with sta.explain(f"{args.results / stem}.json: not a result of evaluate.py; run it again"):
            figures = draw_all(result)
        for name, figure in figures.items():
            save(figure, args.out / f"{stem}-{name}.png")

if __name__ == "__main__":
    sta.run(main)
