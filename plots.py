"""Pictures from the JSON files of evaluate.py; computes only means and medians over layers.

    python plots.py                                        # results/*.json -> figures/*.png
    python plots.py --results figures --out figures        # the README's own

For each model: <model>-budget.png, cosine and FVU against k with the elbows; <model>-bytes.png,
perplexity against bytes. Colours are Okabe and Ito's, which colour-blind readers can tell apart;
markers and dashes repeat the distinction in grey. Non-goals: styling options, interactive plots.
"""
import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")  # write files; no window, no display needed
import matplotlib.pyplot as plt

STYLE = {"key": ("#0072B2", "o", "-"), "value": ("#D55E00", "s", "--")}
VARIANTS = {"dense": ("black", "*"), "keys": ("#0072B2", "o"), "values": ("#D55E00", "s"),
            "dual": ("#009E73", "D"), "uniform": ("#CC79A7", "^"), "reverse": ("#CC79A7", "v"),
            "omp": ("#009E73", "P"), "quant2": ("#E69F00", "$2$"), "quant3": ("#E69F00", "$3$"),
            "quant4": ("#E69F00", "$4$"), "pca": ("#56B4E9", "X"), "l1": ("#56B4E9", "h")}


def budget_curve(result):
    """Two panels, cosine and FVU: a thin line a layer, a thick one for the mean over layers."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for panel, metric, label in zip(panels, ("cos", "fvu"), (
            "cosine similarity of x and x_hat", "FVU (share of variance unexplained)")):
        for kind, (colour, marker, dash) in STYLE.items():
            curves = [layer[kind] for layer in result["curves"].values()]
            ks = [point["k"] for point in curves[0]]
            for curve in curves:
                panel.plot(ks, [p[metric] for p in curve], color=colour, ls=dash, lw=0.7,
                           alpha=0.35)
            mean = [sum(curve[i][metric] for curve in curves) / len(curves) for i in range(len(ks))]
            panel.plot(ks, mean, color=colour, ls=dash, marker=marker, lw=2, label=f"{kind}s, mean")
            elbows = sorted(layer[f"elbow_{kind[:3]}"] for layer in result["curves"].values())
            at = elbows[len(elbows) // 2]
            panel.plot(at, mean[ks.index(at)], marker="o", ms=15, mfc="none", mec=colour, ls="",
                       mew=1.5, label=f"{kind}s: median elbow, k = {at}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ks, [str(k) for k in ks])
        panel.set_xlabel("budget k (atoms a vector)")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
    panels[0].axhline(0.8, color="grey", lw=1, ls=":")
    panels[0].annotate("paper: keys pass 0.8 at k = 8", (ks[-1], 0.8), xytext=(0, -12), ha="right",
                       textcoords="offset points", color="dimgrey", fontsize=8)
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{result['model']}: what k atoms keep of a key and of a value "
                    f"({len(result['curves'])} layers)")
    return figure


def bytes_picture(result):
    """Perplexity of every variant against its share of the bf16 cache's bytes; those with more
    than twice the dense perplexity are named below it."""
    figure, panel = plt.subplots(figsize=(7.6, 4.6), constrained_layout=True)
    dense = result["rows"][0]["perplexity"]
    off = [row for row in result["rows"] if row["perplexity"] > 2 * dense]
    for row in (row for row in result["rows"] if row not in off):
        colour, marker = VARIANTS.get(row["name"], ("#009E73", "x"))  # dual at other budgets
        share = 100 * row["bytes_share"]
        # one standard error of the paired difference to dense, carried over to perplexity
        error = row["perplexity"] * (row["delta_ce_stderr"] or 0)
        budget = "" if row["k_key"] is row["k_val"] is None else " ({}, {})".format(
            *("-" if row[k] is None else row[k] for k in ("k_key", "k_val")))
        panel.errorbar(share, row["perplexity"], yerr=error, color=colour, marker=marker, ms=9,
                       capsize=3, ls="", label=row["name"] + budget)
    panel.axhline(dense, color="grey", lw=1, ls=":")
    panel.set_xlim(0, 105)
    panel.set_xlabel("bytes of the KV cache, % of bf16" + ("" if not off else (
        "\n(off the scale: " + ", ".join(f"{r['name']} {r['perplexity']:.0f}" for r in off) + ")")))
    panel.set_ylabel(f"perplexity ({result['tokens']:,} tokens)")
    panel.set_title(f"{result['model']}: perplexity against bytes, "
                    f"{len(result['layers'])} of {result['n_layers']} layers", fontsize=11)
    panel.legend(title="variant (k_key, k_val)", fontsize=8, title_fontsize=8,
                 bbox_to_anchor=(1.01, 1), loc="upper left")
    panel.grid(alpha=0.25)
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures"))
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in args.results.glob("*.json")}
    results = {name: result for name, result in results.items() if "curves" in result}
    if not results:
        parser.exit(2, f"error: {args.results}: no results; first run: python train_sae.py && "
                       "python evaluate.py\n")
    args.out.mkdir(parents=True, exist_ok=True)
    for stem, result in results.items():
        result["model"] = pathlib.Path(result["model"]).name  # a folder's last part
        for name, draw in (("budget", budget_curve), ("bytes", bytes_picture)):
            figure = draw(result)
            target = args.out / f"{stem}-{name}.png"
            figure.savefig(target, dpi=130)
            plt.close(figure)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
