"""Does a larger dictionary, or more text, close the gap to dense? A curve, for one layer at a time.

    python -m beyond.scaling                                              # tiny, a small grid
    python -m beyond.scaling --model DIR --text T --test-text V --layer 12,25
    python -m beyond.scaling --model DIR --test-text V --layer 0,3,6,9 --add-up    # SAEs of --saes

A point is a size and a number of tokens: 1024:300000. SAEs of that many latents are trained on that
many tokens, otherwise as in train_sae.py; then, at the dual budget and on other text: fvu, and the
rise of the model's loss with this one layer coded, by the SAE's own encoder and, with the same
dictionary, by beyond/pursuit.py. After every point results/<model>-scaling.json and a picture; what
the file has is not measured again.

Unit "layer": one SAE of the keys and values of all heads, beyond/layer_sae.py, of the same bytes.
Peak learning rates: of RATES the one with the least fvu on rows of the first layer held out from
the text, in runs on the fewest tokens of the grid.
--add-up: how well the rises of single layers, summed, tell the rise with all of them coded.
Non-goal: all layers at a larger size, which train_sae.py and beyond/layer_sae.py do.
"""
import argparse
import importlib
import json
import math
import pathlib

import torch
from tqdm import tqdm

import evaluate
import plots
import sta
import train_sae

BUDGET, BATCH, HELD_TOKENS = sta.Budget(), 1024, 8192  # rows a step; for choosing the rate
RATES = (0.002, 0.004, 0.008)

# ------------------------------------------------------------------ training
def beside(name):
    """The module beyond/<name>.py, or None: this file works without it."""
    there = (sta.HERE / "beyond" / f"{name}.py").exists()
    return importlib.import_module(f"beyond.{name}") if there else None

def sites_of(keys, values, unit):
    """Keys and values (tokens, H, D) -> {name: (rows (tokens, rows a token, D or P), atoms, the
    rows' units)}."""
    if unit == "head":
        return {kind: (x, atoms, None) for kind, x, atoms in zip(sta.KINDS, (keys, values), BUDGET)}
    layer_sae = beside("layer_sae")
    x = layer_sae.side_by_side(keys, values)  # (tokens, P)
    spread = layer_sae.spread_of(x)
    return {"layer": ((x / spread)[:, None], keys.shape[1] * sum(BUDGET), spread)}

def train(x, k, n_latents, lr, tokens, step_tokens, seed):
    """Rows x (N, rows a token, D) -> a TopKSAE trained as by train_sae.py, on `tokens` of them,
    step_tokens a step; from the beginning again, in another order, where N are fewer."""
    x, sparse = x[:tokens], beside("sparse")  # the same gradients in half the time
    generator = torch.Generator().manual_seed(seed)
    sae = (sparse.SparseSAE if sparse else sta.TopKSAE)(x.shape[2], n_latents, k, generator)
    sae.centre(x[:32_768].flatten(0, 1).float())
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    x, batch = x.flatten(0, 1), step_tokens * x.shape[1]  # (N, D)
    n_steps, left = max(1, tokens // step_tokens), torch.empty(0, dtype=torch.long)
    for step in tqdm(range(n_steps), desc=f"{n_latents} latents", leave=False, disable=None):
        if len(left) < batch:
            left = torch.randperm(len(x), generator=generator)
        chosen, left = left[:batch], left[batch:]
        factor = train_sae.BUDGET_CYCLE[step % len(train_sae.BUDGET_CYCLE)]
        sae.loss(x[chosen].float(), min(max(1, round(factor * k)), n_latents)).backward()
        optimizer.param_groups[0]["lr"] = train_sae.learning_rate(lr, step, n_steps)
        train_sae.update({"": sae}, optimizer, len(chosen))
    return sae.requires_grad_(False)

def choose_rate(x, k, n_latents, tokens, step_tokens, seed):
    """The peak learning rate of RATES with the least fvu on the last HELD_TOKENS of x."""
    held, found = x[-HELD_TOKENS:].flatten(0, 1).float(), {}
    for lr in RATES:
        sae = train(x[:-HELD_TOKENS], k, n_latents, lr, tokens, step_tokens, seed)
        found[lr] = sta.fidelity(held, sae.decode(*sae.encode(held, k)))["fvu"]
    print(f"{n_latents} latents: " + ", ".join(f"lr {lr:g} fvu {x:.4f}" for lr, x in found.items()))
    return min(found, key=found.get)

# ------------------------------------------------------------------ measuring
def measure(model, row, windows, dense, kept, sink=1):
    """A Row -> the columns of evaluate.py's table."""
    with evaluate.through_hooks(model, row.codecs, sink) as forward:
        losses = evaluate.window_losses(forward, windows, model, row.name)
    return {**evaluate.compare(losses, dense),
            **evaluate.fidelity_and_bytes(row, kept, model.get_decoder().config)}

def rows_of(model, tokenizer, saes, layer):
    """What is measured of the SAEs {name: SAE} of one layer: [Row]."""
    if "layer" in saes:
        codec = beside("layer_sae").LayerBudget(
            saes["layer"], saes["layer"].k, sta.kv_shape(model.get_decoder().config))
        return [evaluate.Row("one pass", {layer: codec})]
    saes, pursuit = {(layer, kind): sae for kind, sae in saes.items()}, beside("pursuit")
    rows = [evaluate.Row("one pass", evaluate.dual_codecs(saes, *BUDGET))]
    asked = argparse.Namespace(**BUDGET._asdict())
    return rows + (pursuit.rows(model, tokenizer, saes, asked, rows) if pursuit else [])

def draw(result):
    """fvu and rise against latents times tokens; a colour an encoder and unit, a panel a layer."""
    layers = sorted({point["layer"] for point in result["points"]})
    figure, panels = plots.plt.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False,
                                        figsize=(1.5 + 4.5 * len(layers), 8), layout="constrained")
    styles = dict(zip(sorted({(p["unit"], p["encoder"]) for p in result["points"]}),
                      plots.OTHERS))
    for column, layer in zip(panels.T, layers):
        for (unit, encoder), (colour, marker, _) in styles.items():
            some = [p for p in result["points"]
                    if (p["layer"], p["unit"], p["encoder"]) == (layer, unit, encoder)]
            size = [p["n_latents"] * p["tokens"] for p in some]
            fvu = [(p["fvu_key"] + p["fvu_val"]) / 2 for p in some]
            column[0].plot(size, fvu, color=colour, marker=marker, ls="",
                           label=f"{encoder}, SAE of a {unit}")
            column[1].errorbar(size, [p["delta_ce"] for p in some], color=colour, marker=marker,
                               ls="", yerr=[1.96 * (p["delta_ce_stderr"] or 0) for p in some])
            for p, x, y in zip(some, size, fvu):
                if (unit, encoder) == min(styles):  # the others have the same points
                    above = p["tokens"] == min(q["tokens"] for q in some)
                    column[0].annotate(f"{p['n_latents']:,}\n{p['tokens'] / 1e6:g}M", (x, y),
                                       (0, 6 if above else -24), textcoords="offset points",
                                       fontsize=7, ha="center")
        column[0].set_title(f"layer {layer}", fontsize=10)
        column[1].axhline(result["target"], color="grey", ls=":",
                          label="of each layer: all within 2 % of dense")
        column[1].set(xscale="log", xlabel="latents x tokens")
        column[1].tick_params(which="minor", labelbottom=False)
        for panel in column:
            panel.grid(alpha=0.25, which="both")
    panels[0, 0].set_ylabel("FVU, mean of keys and values")
    panels[1, 0].set_ylabel("rise in loss, this layer alone coded (nats)")
    panels[0, 0].set_ylim(0, 1.3 * panels[0, 0].get_ylim()[1])  # room for the legends
    panels[1, 0].set_ylim(top=1.2 * panels[1, 0].get_ylim()[1])
    for panel in panels[:, 0]:
        panel.legend(fontsize=8)
    figure.suptitle(f"{pathlib.Path(result['model']).name}: larger dictionaries, more text")
    return figure

# ------------------------------------------------------------------ the run
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--layer", default="2", help="layers: 12,25 (default 2)")
    add("--unit", default="head,layer", help="what an SAE sees (default head,layer: both kinds)")
    add("--points", default="256:100000,512:100000,512:200000", help="latents:tokens, ...")
    add("--text", help="to train on (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, default=1_000_000, help="of it at most (default a million)")
    add("--test-text", help="to measure on (default: tiny's own, else WikiText-2 test)")
    add("--max-tokens", type=int, default=16_384, help="of it (default 16,384)")
    add("--add-up", action="store_true", help="instead: the layers' trained SAEs, one by one and "
                                              "all at once")
    add("--saes", type=pathlib.Path, default="saes", help="for --add-up (default saes)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu or cuda (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")
    args = parser.parse_args(argv)
    if not set(args.unit.split(",")) <= {"head", "layer"}:
        raise sta.UsageError(f"--unit {args.unit}: want head, layer or head,layer")
    if "layer" in args.unit and not beside("layer_sae"):
        raise sta.UsageError("--unit layer: needs beyond/layer_sae.py; want --unit head")
    with sta.explain(f"--points {args.points}: want latents:tokens, such as 1024:300000"):
        args.points = [tuple(map(int, point.split(":"))) for point in args.points.split(",")]
        if min(n for n, _ in args.points) < 2 * BUDGET.k_val:
            raise ValueError(f"latents: {2 * BUDGET.k_val} or more")
    return args

def add_up(model, saes, windows, dense, kept):
    """Rises in loss with single layers coded, and with all of them."""
    codecs = evaluate.dual_codecs(saes, *BUDGET)
    rows = [evaluate.Row(f"layer {layer}", {layer: codec}) for layer, codec in codecs.items()]
    *single, joint = (measure(model, row, windows, dense, kept)["delta_ce"]
                      for row in [*rows, evaluate.Row("all", codecs)])
    print(f"one by one: {sum(single):.4f} nats in all; together: {joint:.4f}")
    return {"layers": list(codecs), "single": single, "joint": joint}

def training_rows(args, layers, device):
    """{(layer, kind): (tokens, H, D)} of the text to train on."""
    model, tokenizer, _ = sta.load_model(args.model, *device, args.layer, no_deeper=True)
    pieces = sta.read_text(args.text, "train", args.model)
    return sta.harvest(model, sta.token_windows(pieces, tokenizer, model, None, 512, args.tokens,
                                                least=2 + 2 * HELD_TOKENS // 512), layers)

def train_points(args, rows, todo):
    """Yields ({layer, lr, ...}, {name: SAE}) of each (layer, unit, latents, tokens)."""
    rates, fewest = {}, min(tokens for _, tokens in args.points)
    for layer, unit, n_latents, tokens in todo:  # of all layers, the first chooses the rate
        keys, values = (rows[layer, kind] for kind in sta.KINDS)
        step_tokens, saes = max(1, BATCH // keys.shape[1]), {}
        for name, (x, atoms, spread) in sites_of(keys, values, unit).items():
            if (name, n_latents) not in rates:
                rates[name, n_latents] = choose_rate(
                    x, atoms, n_latents, fewest, step_tokens, args.seed)
            saes[name] = train(x[:-HELD_TOKENS], atoms, n_latents, rates[name, n_latents], tokens,
                               step_tokens, args.seed)
            if spread is not None:
                saes[name] = beside("layer_sae").for_rows(saes[name], spread)
        yield {"layer": layer, "unit": unit, "n_latents": n_latents, "tokens": tokens,
               "text": args.text, "text_tokens": len(keys) - HELD_TOKENS, "seed": args.seed,
               "lr": {name: rates[name, n_latents] for name in saes},
               "dead": {name: len(sae.dead()) / n_latents for name, sae in saes.items()}
               }, saes

def main(argv=None):
    args = parse_args(argv)
    device = sta.pick_device(args.device, args.dtype)
    model, tokenizer, layers = sta.load_model(args.model, *device, args.layer)
    about = evaluate.provenance(model)
    path = evaluate.result_path(args.out, args.model, about, "-scaling")
    result = {"model": args.model, "points": [], "sums": [],
              "target": math.log(1.02) / len(model.get_decoder().layers)}  # nats a layer
    if path.exists():
        with sta.explain(f"{path}: not a result of beyond.scaling; delete it"):
            result = json.loads(path.read_text())
    done = {tuple(p[x] for x in ("layer", "unit", "n_latents", "tokens", "seed"))
            for p in result["points"]}
    pieces = sta.read_text(args.test_text, "valid", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, None, 512, args.max_tokens)
    kept = {key: x[None] for key, x in sta.harvest(model, windows[:8], layers).items()}
    with evaluate.through_hooks(model, {}, 1) as forward:
        dense = evaluate.window_losses(forward, windows, model, "dense")

    def note(what, name):
        """Into the file, after every point."""
        result[name] = [*result[name], what]
        sta.write_atomic(path, json.dumps({**result, **about}, indent=1))

    if args.add_up:
        folder = evaluate.find_fitted(args.saes, args.model)[0]
        return note(add_up(model, sta.load_saes(folder, model, layers)[0], windows, dense, kept),
                    "sums")
    todo = [(layer, unit, *point)
            for point in args.points for unit in args.unit.split(",") for layer in layers
            if (layer, unit, *point, args.seed) not in done]
    rows = training_rows(args, layers, device) if todo else {}
    for point, saes in train_points(args, rows, todo):
        for row in rows_of(model, tokenizer, saes, point["layer"]):
            found = measure(model, row, windows, dense, kept)
            print(f"layer {point['layer']}, {point['unit']}, {point['n_latents']:,} latents, "
                  f"{point['tokens']:,} tokens, {row.name}: fvu_K {found['fvu_key']:.4f} fvu_V "
                  f"{found['fvu_val']:.4f} delta CE {found['delta_ce']:+.5f}", flush=True)
            note({**point, "encoder": row.name, "test_text": args.test_text, **found,
                  "command": about["command"]}, "points")
    plots.save(draw(result), path.with_suffix(".png"))

if __name__ == "__main__":
    sta.run(main)
