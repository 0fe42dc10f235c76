"""Pictures from the JSON files of evaluate.py; computes only means over layers, and their elbow.

    python plots.py                                        # results/*.json -> results/*.png
    python plots.py --results other/results --out pictures

For each model <model>-overview.png: unexplained variance against k; keys against values, by layer;
perplexity. Most colours are Okabe and Ito's, which colour-blind readers can tell apart; methods of
one colour differ in markers or dashes. beyond/report.py calls draw_curves for other formats.
Non-goals: styling options, several models in one picture.
"""
import argparse
import io
import json
import math
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")  # write files; no window, no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

import sta
from support.files import check_out, explain, run_main, write_atomic

# method: (its name in legends, colour, marker, dash), in all pictures
STYLE = {
    "keys": ("keys", "#0072B2", "o", "-"), "values": ("values", "#D55E00", "s", "-"),
    "dual": ("dual (the paper's)", "#009E73", "D", "-"),
    "uniform": ("uniform", "#CC79A7", "^", "-"),
    "reverse": ("reverse", "#CC79A7", "v", "-"),
    "searched": ("dual, searched", "#E69F00", "X", "-"),
    "stretched": ("dual, stretched", "#0072B2", "d", "--"),
    "layer SAE": ("one SAE per layer", "#882255", "p", "-."),
    "l1": ("L1", "#56B4E9", "h", "--"), "grouped": ("grouped", "black", "P", "-."),
    "rotated": ("rotated", "dimgrey", "<", "--"), "transform": ("transform", "#56B4E9", ">", ":"),
    "additive": ("additive", "#D55E00", "*", ":")}

# ------------------------------------------------------------------ one panel each
def draw_budget(panel, result):
    """FVU against k, means over layers, up to the largest budget that the SAEs were trained for;
    the elbow of each curve is circled."""
    layers = list(result["curves"].values())
    for kind in sta.KINDS:
        label, colour, marker, _ = STYLE[f"{kind}s"]
        curve = [{"k": points[0]["k"], "fvu": statistics.mean(point["fvu"] for point in points)}
                 for points in zip(*(layer[kind] for layer in layers))]
        most = 2 * layers[0][f"k_{kind}"]
        fvus = {p["k"]: p["fvu"] for p in curve if 1 <= p["k"] <= most}
        panel.plot(fvus.keys(), fvus.values(), color=colour, marker=marker, ms=4, label=label)
        at = sta.elbow(curve, most)
        panel.plot(at, fvus.get(at, math.nan), marker="o", ms=14, mfc="none", mec=colour, ls="",
                   label=f"elbow, k = {at}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("k, atoms per vector")
    panel.set_ylabel("variance left within heads (FVU)")
    panel.set_ylim(0, 1.05)
    panel.set_title("Unexplained variance")
    panel.legend()

def draw_asymmetry(panel, result):
    """FVU of keys and values by layer, both at k_key and both at k_val atoms."""
    some = next(iter(result["curves"].values()))
    for k in sorted({some["k_key"], some["k_value"]}):
        fill = "full" if k == some["k_key"] else "none"
        for kind in sta.KINDS:
            label, colour, marker, dash = STYLE[f"{kind}s"]
            points = [[p for p in curves[kind] if p["k"] <= k][-1]
                      for curves in result["curves"].values()]
            panel.plot([int(layer) for layer in result["curves"]], [p["fvu"] for p in points],
                       color=colour, marker=marker, ms=4, fillstyle=fill,
                       ls=dash if fill == "full" else "--", label=f"{label}, k = {points[-1]['k']}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("layer")
    panel.set_ylabel("variance left within heads (FVU)")
    panel.set_ylim(bottom=0)
    panel.set_title("Keys and values at equal k")
    panel.legend()

def draw_perplexity(panel, result):
    """Perplexity by keys, values, dual, searched, uniform and reverse, with 95% intervals."""
    ticks = []
    for row in result["rows"]:
        if row["name"] in ("keys", "values", "dual", "searched", "uniform", "reverse"):
            ratio, (low, high) = row["ratio"], row["ratio_ci95"]
            if math.isfinite(ratio):
                errors = [[100 * (ratio - low)], [100 * (high - ratio)]]  # inf, of one window
                panel.bar(len(ticks), 100 * (ratio - 1), color=STYLE[row["name"]][1], capsize=3,
                          yerr=errors if math.isfinite(high) else None)
            budget = ", ".join(str(row[k]) for k in ("k_key", "k_val") if row[k])
            ticks.append(f"{row['name']}: {budget if math.isfinite(ratio) else 'not finite'}")
    panel.set_xticks(range(len(ticks)), ticks, fontsize=8, rotation=35, ha="right")
    panel.axhline(0, color="black", lw=0.8)
    panel.set_xlabel("what is coded, and its atoms per vector")
    panel.set_ylabel("increase in perplexity, %")
    panel.set_title(f"{len(result['layers'])} of {result['n_layers']} layers coded")

# ------------------------------------------------------------------ the pictures
def draw_overview(result):
    """The figure of one result."""
    plt.rcParams.update({"font.size": 9, "legend.fontsize": 8, "axes.grid": True,
                         "grid.alpha": 0.25, "axes.axisbelow": True})
    figure, panels = plt.subplots(1, 3, layout="constrained", figsize=(9, 3.9))
    for panel, draw in zip(panels, (draw_budget, draw_asymmetry, draw_perplexity)):
        draw(panel, result)
    figure.suptitle(pathlib.Path(result["model"]).name, fontsize=10, parse_math=False)
    return figure

def draw_curves(curves, title, x_label, x_scale):
    """The increase in perplexity, in %, against something: {method: [(x, increase), ...]}. A point
    at or below dense is hollow, at the lower edge."""
    figure, panel = plt.subplots(figsize=(8, 4.5), layout="constrained")
    rises = [rise for points in curves.values() for _, rise in points if rise > 0.01]
    edge = min(rises, default=100) / 2
    panel.set_yscale("log")
    for method, points in curves.items():
        _, colour, marker, dash = STYLE[method]
        panel.plot([x for x, _ in points], [max(edge, rise) for _, rise in points],
                   color=colour, marker=marker, ls=dash)
        panel.plot([x for x, rise in points if rise < edge],
                   [edge for _, rise in points if rise < edge],
                   color=colour, marker=marker, mfc="white", ls="", zorder=3, clip_on=False)
    panel.set_ylim(bottom=edge)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}%")  # plain numbers, not powers of ten
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xscale(x_scale)
    panel.xaxis.set_major_formatter("{x:,.10g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    places = sorted({x for points in curves.values() for x, _ in points})
    if x_scale == "log":
        panel.set_xticks(places)
        panel.set_xlim(right=2 * max(places, default=1))  # with room for the labels
    else:
        panel.set_xlim(0, 1.2 * max(places, default=1))
    panel.set_xlabel(x_label)
    panel.set_ylabel("increase in perplexity")
    panel.set_title(title, parse_math=False)
    for method, points in curves.items():
        (x, rise), (label, colour, *_) = points[-1], STYLE[method]
        side, ha = (-6, "right") if len(points) == 1 else (6, "left")  # where no line begins
        panel.annotate(label, (x, max(edge, rise)), xytext=(side, 0), textcoords="offset points",
                       color=colour, va="center", ha=ha, fontsize=9)
    return figure

def save(figure, path):
    image = io.BytesIO()
    figure.savefig(image, dpi=130)
    plt.close(figure)
    write_atomic(path, image.getvalue())
    print(f"wrote {path}")

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--results", "--out"):
        parser.add_argument(option, type=pathlib.Path, default="results", help="(default results)")
    args = parser.parse_args(argv)
    results = {}
    for path in sorted(args.results.glob("*.json")):
        with explain(f"{path}: not a result of evaluate.py; run that again"):
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("rows"):
                results[path.stem] = content
    for path in args.results.glob("*.unfinished"):
        print(f"{path}: not complete, and not drawn; complete it with evaluate.py --resume")
    if not results:
        raise sta.UsageError(f"{args.results}: no results; first run: python train_sae.py && "
                             "python evaluate.py")
    check_out(args.out)
    for stem, result in results.items():
        if not result.get("curves"):
            print(f"{stem}: no SAEs, nothing to draw")
            continue
        with explain(f"{args.results / stem}.json: not a result of evaluate.py; run it again"):
            figure = draw_overview(result)
        save(figure, args.out / f"{stem}-overview.png")

if __name__ == "__main__":
    run_main(main)
