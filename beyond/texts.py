"""One model's codes on several kinds of text: a picture, a panel a text, and a table of all.

    python -m beyond.texts figures/{,layer-sae/}{in-domain,other-prose}/M.json --out figures/M-texts

Codes that are fitted on one kind of text may not carry over to another, so both stand side by side.
The files are evaluate.py's, of one model; those of one text count as one. The picture is that of
plots.py: the rise in perplexity against per cent of bf16, with 95 % intervals. The table, in
Markdown: a row a method, a column a share of bf16 in whole per cent, cut; a cell has the ratio to
dense perplexity on each text.
Non-goal: statistics across seeds.
"""
import argparse
import json
import pathlib

import plots
import sta

def name_of(result):
    return pathlib.Path(result["config"]["text"] or "its own text").stem

def merge(results):
    """Results on the same text become one, with the rows of all."""
    found = {}
    for result in results:
        first = found.setdefault((name_of(result), result["tokens"]), result)
        if first is not result:
            first["rows"] += result["rows"][1:]  # without another dense
    return list(found.values())

def draw(results):
    """A figure, a panel a result, on one scale."""
    figure, panels = plots.plt.subplots(1, len(results), sharey=True, squeeze=False,
                                        figsize=(2 + 4.5 * len(results), 4.5), layout="constrained")
    for panel, result in zip(panels[0], results):
        plots.draw_bytes(panel, result)
        panel.set_title(f"{name_of(result)}, {result['tokens']:,} tokens", fontsize=10)
        panel.grid(alpha=0.25, which="both")
    for panel in panels[0][:-1]:
        panel.get_legend().remove()
    figure.suptitle(f"{pathlib.Path(results[0]['model']).name}: the price of bytes", fontsize=12)
    return figure

def table(results):
    """Lines of Markdown."""
    cells = {}  # {method: {share in whole per cent, cut: [ratio on each text]}}
    for i, result in enumerate(results):
        for row in result["rows"][1:]:
            method, share = cells.setdefault(row["method"], {}), int(100 * row["bytes_share"])
            method.setdefault(share, ["-"] * len(results))[i] = f"{row['ratio']:.3f}"
    shares = sorted({share for method in cells.values() for share in method})
    lines = ["| " + " / ".join(map(name_of, results)) + " | "
             + " | ".join(f"{share} %" for share in shares) + " |",
             "|---" * (1 + len(shares)) + "|"]
    for method, found in cells.items():
        lines.append(f"| {method} | " + " | ".join(
            " / ".join(found.get(share, [])) for share in shares) + " |")
    return lines

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="evaluate.py's JSON files")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/texts"),
                        help="of the picture, without .png (default results/texts)")
    args = parser.parse_args(argv)
    results = []
    for path in args.results:
        with sta.explain(f"{path}: not a result of evaluate.py"):
            results.append(json.loads(path.read_text()))
            results[-1]["rows"][0]["ratio"]
    models = sorted({result["model"] for result in results})
    if len(models) > 1:
        raise sta.UsageError(f"results of {len(models)} models: {', '.join(models)}; want one")
    results = merge(results)
    print("\n".join(table(results)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plots.save(draw(results), args.out.with_name(args.out.name + ".png"))

if __name__ == "__main__":
    sta.run(main)
