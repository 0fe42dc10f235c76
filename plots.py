"""Pictures from the JSON files of evaluate.py and train_sae.py --benchmark; computes only means and
medians over layers.

    python plots.py                                        # results/*.json -> figures/
    python plots.py --results figures --out figures        # the README's own

For each model: <model>-overview.png, -budget, -asymmetry, -bytes, -training, and after evaluate.py
--claims -shrinkage and -attention; growth.png from benchmark.json; atoms.html, one page without
network, from <model>-atoms.json. What has no input yet is named, with the command that makes it.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes repeat
the distinction in grey. Non-goals: styling options, several models in one picture.
"""
import argparse
import json
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")  # write files; no window, no display needed
import matplotlib.pyplot as plt

STYLE = {"key": ("#0072B2", "o", "-"), "value": ("#D55E00", "s", "--")}
VARIANTS = {"dense": ("black", "*"), "keys": ("#0072B2", "o"), "values": ("#D55E00", "s"),
            "dual": ("#009E73", "D"), "uniform": ("#CC79A7", "^"), "reverse": ("#CC79A7", "v"),
            "omp": ("#009E73", "P"), "quant2": ("#E69F00", "$2$"), "quant3": ("#E69F00", "$3$"),
            "quant4": ("#E69F00", "$4$"), "pca": ("#56B4E9", "X"), "l1": ("#56B4E9", "h"),
            "allocated": ("#009E73", "p"), "cache": ("#009E73", "s")}


# ------------------------------------------------------------------ one panel each

def draw_budget(panel, result, metric, label):
    """A metric against k: shallow, middle and deep thirds of the layers, light to dark; the elbow
    of the median layer on the mean over layers."""
    layers = list(result["curves"].values())
    third = max(1, len(layers) // 3)
    bands = {"shallow": layers[:third], "middle": layers[third:-third], "deep": layers[-third:]}
    for kind, (colour, marker, dash) in STYLE.items():
        ks = [point["k"] for point in layers[0][kind]]
        mean = lambda some: [statistics.mean(layer[kind][i][metric] for layer in some)
                             for i in range(len(ks))]
        for (name, some), alpha in zip(bands.items(), (0.3, 0.6, 1)):
            if some:
                panel.plot(ks, mean(some), color=colour, ls=dash, marker=marker, ms=4, alpha=alpha,
                           label=f"{kind}s, {name}")
        at = statistics.median_high(layer[f"elbow_{kind[:3]}"] for layer in layers)
        panel.plot(at, mean(layers)[ks.index(at)], marker="o", ms=15, mfc="none", mec=colour, ls="",
                   mew=1.5, label=f"elbow of {kind}s, k = {at}")
    panel.set_xscale("log", base=2)
    panel.set_xticks(ks, [str(k) for k in ks])
    panel.set_xlabel("budget k (atoms a vector)")
    panel.set_ylabel(label)
    panel.grid(alpha=0.25)
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
    if len(values) < 10:
        panel.set_xticks([int(layer) for layer in values])
    panel.set_xlabel("layer")
    panel.set_ylabel(label)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)


def draw_asymmetry(panel, result):
    draw_by_layer(panel, {f"{kind}s": (*style, {
        layer: next(p["fvu"] for p in curves[kind] if p["k"] == 8)
        for layer, curves in result["curves"].items()}) for kind, style in STYLE.items()},
        "FVU at 8 atoms (share of variance unexplained)")
    panel.set_ylim(bottom=0)


def draw_bytes(panel, result):
    """Perplexity of every variant against its share of the bf16 cache's bytes; those with more
    than twice the dense perplexity are named below it."""
    dense = result["rows"][0]["perplexity"]
    off = [row for row in result["rows"] if row["perplexity"] > 2 * dense]
    for row in (row for row in result["rows"] if row not in off):
        written = "$" + row["name"].removeprefix("dual") + "$"  # dual at other budgets: /2, *2
        colour, marker = VARIANTS.get(row["name"], ("#009E73", written))
        # one standard error of the paired difference to dense, carried over to perplexity
        error = row["perplexity"] * (row["delta_ce_stderr"] or 0)
        budget = "" if row["k_key"] is row["k_val"] is None else " ({}, {})".format(
            *("-" if row[k] is None else f"{row[k]:.3g}" for k in ("k_key", "k_val")))
        panel.errorbar(100 * row["bytes_share"], row["perplexity"], yerr=error, color=colour,
                       marker=marker, ms=9, capsize=3, ls="", label=row["name"] + budget)
    panel.axhline(dense, color="grey", lw=1, ls=":")
    least = min(100 * row["bytes_share"] for row in result["rows"])
    most = max(100 * row["bytes_share"] for row in result["rows"])
    panel.set_xlim(0 if least < 60 else least - 1, 1.01 * most + 1)  # the latter: few layers coded
    panel.set_xlabel("bytes of the KV cache, % of bf16" + ("" if not off else (
        "\n(off the scale: " + ", ".join(f"{r['name']} {r['perplexity']:.0f}" for r in off) + ")")))
    panel.set_ylabel(f"perplexity ({result['tokens']:,} tokens)")
    panel.legend(title="variant (k_key, k_val)", fontsize=8, title_fontsize=8,
                 bbox_to_anchor=(1.01, 1), loc="upper left")
    panel.grid(alpha=0.25)


# ------------------------------------------------------------------ one picture each

def budget(result):
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    draw_budget(panels[0], result, "cos", "cosine similarity of x and x_hat")
    draw_budget(panels[1], result, "fvu", "FVU (share of variance unexplained)")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{result['model']}: a few atoms keep most of a key; a value takes more")
    return figure


def asymmetry(result):
    figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
    draw_asymmetry(panel, result)
    panel.set_title(f"{result['model']}: values lose more than keys at one budget", fontsize=11)
    return figure


def pareto(result):
    figure, panel = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    draw_bytes(panel, result)
    panel.set_title(f"{result['model']}: perplexity against bytes, {len(result['layers'])} of "
                    f"{result['n_layers']} layers coded", fontsize=11)
    return figure


def overview(result):
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    draw_budget(panels[0], result, "cos", "cosine similarity of x and x_hat")
    panels[0].legend(fontsize=7, loc="lower right")
    draw_asymmetry(panels[1], result)
    draw_bytes(panels[2], result)
    titles = ("a few atoms keep a vector's direction", "keys need fewer than values",
              "what the model loses for the bytes")
    for panel, title in zip(panels, titles):
        panel.set_title(title, fontsize=11)
    figure.suptitle(f"{result['model']}: K and V as a few semantic atoms")
    return figure


def training(result):
    """FVU and dead latents of each run of train_sae.py, or the held-out KL."""
    runs = [run["log"] for run in result.get("training", []) if run["log"]]
    if not runs:
        return "a log of train_sae.py beside the SAEs; train and evaluate again"
    fields = [("fvu_key", "key"), ("fvu_val", "value")] if "fvu_key" in runs[0][0] else [
        ("held_out_kl", "key")]
    figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for field, kind in fields:
        colour, marker, dash = STYLE[kind]
        for log in runs:
            panel.plot([e["step"] for e in log], [e[field] for e in log], color=colour, ls=dash,
                       marker=marker, ms=3, label=f"{kind}s" if len(fields) > 1 else "all SAEs")
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("FVU of training rows, at each kind's budget" if len(fields) > 1 else
                     "held-out KL from dense (nats a token)")
    panel.grid(alpha=0.25, which="both")
    panel.legend(fontsize=8)
    panel.set_title(f"{result['model']}: training, mean over layers", fontsize=11)
    return figure


def shrinkage(result):
    rows = {row["name"]: row for row in result["rows"] if row.get("attention")}
    if "l1" not in rows:
        return "the row l1; run python evaluate.py --claims"
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    style = {"Top-K": ("dual", ("#009E73", "D", "-")), "L1": ("l1", ("#56B4E9", "h", "--"))}
    draw_by_layer(panels[0], {label: (*look, {layer: v["rel_norm_key"] for layer, v in rows[name][
        "by_layer"].items()}) for label, (name, look) in style.items()}, "|x_hat| / |x| of keys")
    panels[0].axhline(1, color="grey", lw=1, ls=":")
    draw_by_layer(panels[1], {label: (*look, {layer: v["qk_error"] for layer, v in rows[name][
        "attention"].items()}) for label, (name, look) in style.items()},
        "error of q·k, in standard deviations of q·k")
    panels[1].set_ylim(bottom=0)
    figure.suptitle(f"{result['model']}: an L1 penalty shortens keys; a Top-K budget hardly does")
    return figure


def attention(result):
    found = result.get("attention_map")
    if not found:
        return "attention maps; run python evaluate.py --claims"
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    gap = [[b - a for a, b in zip(*rows)] for rows in zip(found["dense"], found["coded"])]
    most = max(abs(x) for row in gap for x in row)
    words = [word.strip() or "␣" for word in found["tokens"]]
    for panel, (title, image) in zip(panels, (("dense", found["dense"]), (
            "keys from their atoms", found["coded"]), ("difference", gap))):
        limits = {"cmap": "PuOr", "vmin": -most, "vmax": most} if image is gap else {
            "cmap": "Greys", "vmin": 0, "vmax": 1}
        shown = panel.imshow(image, **limits)
        figure.colorbar(shown, ax=panel, shrink=0.75, label="attention weight")
        panel.set_title(title, fontsize=11)
        panel.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
        panel.set_yticks(range(len(words)), words, fontsize=6)
        panel.set_xlabel("key")
    panels[0].set_ylabel("query")
    figure.suptitle(f"{result['model']}: attention of the head that coded keys change most, layer "
                    f"{found['layer']}, head {found['head']}")
    return figure


def growth(bench):
    """How a training step grows with the dictionary, and a decoded token with the context."""
    figure, panels = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    for panel, name, label in ((panels[0], "M", "latents M (D 128, k 16)"),
                               (panels[1], "k", "budget k (D 128, M 1024)")):
        for path, (colour, marker, dash) in zip(("sparse", "eager"), STYLE.values()):
            rows = bench["growth"][name]
            panel.plot([r[name] for r in rows],
                       [r["rows"] / r["step_ms"][path] / 1000 for r in rows], color=colour,
                       marker=marker, ls=dash, label=f"{path} gradients")
        panel.set_xlabel(label)
        panel.set_ylabel("training, million rows a second")
    for panel, name, label in ((panels[2], "context", "tokens in the cache (4 layers)"),
                               (panels[3], "layers", "layers (2,048 tokens in the cache)")):
        rows, more = bench["growth"][name], panel.twinx()
        for path, (colour, marker, dash) in zip(("codes", "dense"), STYLE.values()):
            at = [r[name] for r in rows]
            panel.plot(at, [r[f"{path}_ms"] for r in rows], color=colour, marker=marker, ls=dash,
                       label=f"{path}, ms")
            more.plot(at, [r[f"{path}_bytes"] / 1e6 for r in rows], color=colour, marker=marker,
                      mfc="none", ls=":", label=f"{path}, MB")
        more.set_yscale("log", base=2)
        more.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(label)
        panel.set_ylabel("ms for one new token")
        more.set_ylabel("cache, MB (dotted)")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
        ticks = panel.lines[0].get_xdata()
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    figure.suptitle(f"the shape of growth, on {bench['device']}")
    return figure


# ------------------------------------------------------------------ the page of atoms

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Semantic atoms</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70em; padding: 1em;
       color: #222; background: #fff }
h1 { font-size: 1.3em } h2 { font-size: 1em; margin: 0 } p { margin: .4em 0 }
label { margin-right: 1em; white-space: nowrap }
select, input, button { font: inherit; max-width: 100% }
.atom { border-top: 1px solid #ccc; padding: .6em 0 }
.line { overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85em }
mark { background: #f0c040; color: #000 } small { color: #555 }
#sentence button { border: 1px solid #ccc; background: #fff; padding: 0 .2em; margin: 1px;
                   font: .85em ui-monospace, monospace; cursor: pointer }
#sentence button[aria-pressed=true] { background: #f0c040 }
.code { border: 1px solid #0072B2; background: #fff; color: #0072B2; margin: 2px; cursor: pointer }
</style></head><body><h1></h1>
<p>Each atom is one row of a dictionary, shared by the layer's heads. Below it are the tokens of the
text for which it is strongest, with what stands around them. Atoms have no names: judge for
yourself.</p>
<p><label>layer and kind <select id="site"></select></label>
<label>text in a context <input id="find" type="search" size="18"></label>
<label>order <select id="order"><option value="fired">most often first</option>
<option value="number">by number</option></select></label></p>
<h2>A sentence: click a token to see its code</h2><p id="sentence"></p><div id="code"></div>
<h2 id="count"></h2><div id="atoms"></div><button id="more">more atoms</button>
<script type="application/json" id="data">DATA</script><script>
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const make = (tag, text, ...inner) => { const e = document.createElement(tag);
  if (text) e.textContent = text; e.append(...inner); return e };
const words = data.words, shown = w => w.replace(/\\n/g, "\\u23ce");
document.querySelector("h1").textContent = "Semantic atoms of " + data.model + ": " +
  data.k_key + " a key, " + data.k_val + " a value, " + data.tokens.toLocaleString("en") +
  " tokens of text";
let list = [], upTo = 0, chosen = null;
const site = () => data.sites[$("site").value];
const around = (from, to) => words.slice(Math.max(0, from), to).map(shown).join("");
function context([i, z]) {
  const line = make("div"); line.className = "line";
  line.append(make("small", z.toFixed(2) + "  "), around(i - 10, i), make("mark", shown(words[i])),
              around(i + 1, i + 7));
  return line }
function atom(m) {
  const e = make("div", "", make("h2", "atom " + m), make("small", "fires for " +
    (100 * site().fired[m]).toFixed(2) + " % of tokens"), ...site().contexts[m].map(context));
  e.className = "atom"; return e }
function more() {
  $("atoms").append(...list.slice(upTo, upTo += 30).map(atom));
  $("more").hidden = upTo >= list.length }
function search() {
  const s = site(), text = $("find").value.toLowerCase();
  list = s.contexts.map((_, m) => m).filter(m => s.contexts[m].length && (!text ||
    s.contexts[m].some(([i]) => around(i - 10, i + 7).toLowerCase().includes(text))));
  if ($("order").value == "fired") list.sort((a, b) => s.fired[b] - s.fired[a]);
  $("count").textContent = list.length + " atoms"; $("atoms").replaceChildren(); upTo = 0; more() }
function code() {
  $("sentence").querySelectorAll("button").forEach((b, i) => b.ariaPressed = i === chosen);
  $("code").replaceChildren(...(chosen === null ? [] : site().sentence[chosen].map((head, h) => {
    const line = make("p", "", make("small", "head " + h + ": "));
    for (const [m, z] of head.filter(([, z]) => z)) {
      const b = make("button", m + " · " + z.toFixed(2)); b.className = "code";
      b.onclick = () => { list = [m]; upTo = 0; $("count").textContent = "atom " + m;
        $("atoms").replaceChildren(); more(); $("count").scrollIntoView() };
      line.append(b) }
    return line }))) }
for (const name of Object.keys(data.sites)) $("site").append(make("option", name));
site().sentence.forEach((_, i) => { const b = make("button", shown(words[i + 1]) || "\\u2423");
  b.onclick = () => { chosen = i; code() }; $("sentence").append(b) });
$("site").onchange = () => { search(); code() };
$("find").oninput = search; $("order").onchange = search;
$("more").onclick = more; search(); code();
</script></body></html>
"""


def atoms_page(atoms):
    """One HTML file; the data as JSON in which no tag can begin, put into the page as text."""
    return PAGE.replace("DATA", json.dumps(atoms, ensure_ascii=False).replace("<", "\\u003c"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures"))
    args = parser.parse_args()
    paths = sorted(args.results.glob("*.json"))
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    results = {stem: content for stem, content in found.items() if "curves" in content}
    pages = {stem: content for stem, content in found.items() if "sites" in content}
    if not results and not pages and "benchmark" not in found:
        parser.exit(2, f"error: {args.results}: no results; first run: python train_sae.py && "
                       "python evaluate.py\n")
    args.out.mkdir(parents=True, exist_ok=True)
    draws = {"overview": overview, "budget": budget, "asymmetry": asymmetry, "bytes": pareto,
             "training": training, "shrinkage": shrinkage, "attention": attention}
    pictures = [(f"{stem}-{name}", draw, result) for stem, result in results.items()
                for name, draw in draws.items()]
    if "benchmark" in found:
        pictures.append(("growth", growth, found["benchmark"]))
    else:
        print("no growth.png: it needs python train_sae.py --benchmark")
    for name, draw, content in pictures:
        content["model"] = pathlib.Path(content.get("model", "")).name  # a folder's last part
        figure = draw(content)
        if isinstance(figure, str):
            print(f"no {name}.png: it needs {figure}")
            continue
        figure.savefig(args.out / f"{name}.png", dpi=110)
        plt.close(figure)
        print(f"wrote {args.out / name}.png")
    for stem, atoms in pages.items():
        target = args.out / ("atoms.html" if len(pages) == 1 else f"{stem}.html")
        target.write_text(atoms_page(atoms), encoding="utf-8")
        print(f"wrote {target}")
    if not pages:
        print("no atoms.html: it needs python evaluate.py --atoms")


if __name__ == "__main__":
    main()
