"""The model beside its reconstruction: perplexity, fidelity and bytes of every budget.

    python evaluate.py                                   # the newest SAEs: about a minute for tiny
    python evaluate.py --model yi-6b --seq-len 2048      # those of saes/yi-6b

Perplexity is the GPTQ convention: one tokenizer call on the whole text, disjoint windows of
--seq-len tokens, the tail dropped, mean loss over each window's seq_len - 1 targets. Writes
results/<model>.json:
    model, saes, layers, n_layers, tokens, windows, seq_len, sink, config, command, commit, ...
    rows    one a variant: name (dense, keys, values, dual, uniform), k_key, k_val (null: dense),
            perplexity, ce, delta_ce and its paired standard error over windows (nats a token),
            bytes_per_token of the whole model's cache and bytes_share of bf16, for a coded token
            (bytes_share_with_sink: at seq_len tokens, exact sinks included), fvu_key, fvu_val,
            cos_key, cos_val (means over the reconstructed layers; by_layer: each), tokens
    curves  {layer: {key: [points], value: [points], elbow_key, elbow_val}} as sta.BudgetCurve
Fidelity is measured on the dense model's rows, without the sinks. Non-goals: lm-eval's word
perplexity, speed of decoding (nothing is stored compressed here; see README, limits).
"""
import argparse
import datetime
import json
import math
import pathlib
import platform
import subprocess
import sys

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import sta


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--model", help="short name, hub id or folder (default: the newest SAEs' model)")
    add("--saes", type=pathlib.Path, default=pathlib.Path("saes"),
        help="folder of train_sae.py --out, or of one model's SAEs (default saes)")
    add("--layer", default=None, help="layers to reconstruct: 12, 0-7, 3,9 (default all trained)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-2 test)")
    # how much
    add("--seq-len", type=int, help="tokens a window (default 2048, or the model's limit)")
    add("--max-tokens", type=int, default=32_768, help="tokens to score (default 32,768)")
    # budgets
    add("--k-key", type=int, default=8, help="atoms a key (default 8)")
    add("--k-val", type=int, default=16, help="atoms a value (default 16)")
    add("--sink", type=int, default=1, help="first tokens of a window kept exact (default 1)")
    # where
    add("--seed", type=int, default=0, help="recorded; nothing here is random yet")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the model (default float32 on cpu, bfloat16 on cuda)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="compiled encode and decode (default: on cuda)")
    add("--out", type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")
    args = parser.parse_args(argv)
    for name, least in (("k_key", 1), ("k_val", 1), ("sink", 0), ("max_tokens", 2)):
        if getattr(args, name) < least:
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at "
                                 f"least {least}")
    return args


def find_saes(root, model_name):
    """(folder of one model's SAEs, the model's name): the newest, unless a model is named."""
    command = "python train_sae.py" + (f" --model {model_name}" if model_name else "") + (
        f" --out {root}" if str(root) != "saes" else "")
    if any(root.glob("layer*.key")):
        folders = [root]
    else:
        folders = [root / sta.slug(model_name)] if model_name else root.glob("*")
    found = [path for folder in folders for path in folder.glob("layer*.key/cfg.json")]
    if not found:
        raise sta.UsageError(f"{root}: no SAEs{' of ' + model_name if model_name else ''}; first "
                             f"run: {command}")
    newest = max(found, key=lambda path: path.stat().st_mtime).parent
    return newest.parent, model_name or sta.load_sae(newest)[1]["model"]


def token_windows(text, tokenizer, seq_len, max_tokens):
    """Text -> (n_windows, seq_len) token ids, by the GPTQ convention."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    n = min(len(ids), max(max_tokens, seq_len)) // seq_len
    if n == 0:
        raise sta.UsageError(f"text of {len(ids)} tokens: too short for one window of {seq_len}; "
                             "give more text or a smaller --seq-len")
    return ids[:n * seq_len].view(n, seq_len)


@torch.no_grad()
def window_losses(model, windows, name, after_batch=lambda: None):
    """Mean cross entropy (nats) over the T - 1 targets of each window: (n_windows,) float64."""
    losses = []
    batches = windows.split(max(1, 4096 // windows.shape[1]))
    for batch in tqdm(batches, desc=name, leave=False, disable=None):
        logits = model(input_ids=batch.to(model.device), use_cache=False).logits  # (B, T, V)
        for row, ids in zip(logits, batch.to(logits.device)):
            losses.append(F.cross_entropy(row[:-1].float(), ids[1:]).double())
        after_batch()
    return torch.stack(losses).cpu()


def dense_pass(model, saes, windows, ks, sink):
    """(window losses of the untouched model, {(layer, kind): budget curve} on its rows)."""
    curves = {key: sta.BudgetCurve(sae, ks) for key, sae in saes.items()}
    with sta.capture(model, {layer for layer, _ in saes}) as rows:
        def measure():
            for key, curve in curves.items():
                curve.update(rows[key][:, sink:].float().flatten(0, 2))  # (B*(T-sink)*H, D)
        losses = window_losses(model, windows, "dense", measure)
    if not losses.isfinite().all():
        raise sta.UsageError("the model's own loss is not finite; use --dtype float32 or bfloat16")
    return losses, {key: curve.result() for key, curve in curves.items()}


def fidelity(curves, budget):
    """Columns fvu_*, cos_* of a row: means over layers, and each layer under by_layer."""
    by_layer = {}
    for (layer, kind), curve in curves.items():
        k = budget[sta.KINDS.index(kind)]
        exact = {"fvu": 0.0, "cos": 1.0, "rel_norm": 1.0, "l0": None, "dead": None}
        point = exact if k is None else next(p for p in curve if p["k"] == k)
        by_layer.setdefault(layer, {}).update(
            {f"{name}_{kind[:3]}": point[name] for name in exact})
    mean = lambda column: sum(row[column] for row in by_layer.values()) / len(by_layer)
    return {c: mean(c) for c in ("fvu_key", "fvu_val", "cos_key", "cos_val")} | {
        "by_layer": by_layer}


def memory(budget, model, saes, seq_len, sink):
    """Columns bytes_*: the cache of the whole model, layers without SAEs dense."""
    config = model.get_decoder().config
    heads, dim = sta.kv_shape(config)
    coded, n_layers = len({layer for layer, _ in saes}), config.num_hidden_layers
    n_latents = max(sae.n_latents for sae in saes.values())
    dense = sta.bytes_per_token(sta.Budget(None, None), heads, dim, n_latents)
    code = sta.bytes_per_token(budget, heads, dim, n_latents)
    total = coded * code + (n_layers - coded) * dense
    share = total / (n_layers * dense)
    return {"bytes_per_token": total, "bytes_share": share,
            "bytes_share_with_sink": share + (1 - share) * min(1, sink / seq_len)}


def compare(name, budget, losses, dense):
    """Columns of a row that come from window losses; the standard error is paired over windows."""
    delta = losses - dense
    stderr = (delta.std() / math.sqrt(len(delta))).item() if len(delta) > 1 else None
    return {"name": name, "k_key": budget.k_key, "k_val": budget.k_val,
            "perplexity": math.exp(losses.mean()), "ce": losses.mean().item(),
            "delta_ce": delta.mean().item(), "delta_ce_stderr": stderr}


def print_row(row):
    k = [str(row[name] or "-") for name in ("k_key", "k_val")]
    error = "" if row["delta_ce_stderr"] is None else f" ±{row['delta_ce_stderr']:.4f}"
    print(f"{row['name']:8} {k[0]:>5} {k[1]:>5} {row['perplexity']:11.3f} {row['delta_ce']:+8.4f}"
          f"{error:8} {row['bytes_per_token']:9,} {100 * row['bytes_share']:6.2f}% "
          f"{row['fvu_key']:6.3f} {row['fvu_val']:6.3f} {row['cos_key']:6.3f} "
          f"{row['cos_val']:6.3f}", flush=True)


def provenance(device):
    """What a reader needs to run it again."""
    commit = subprocess.run(["git", "-C", str(sta.HERE), "rev-parse", "HEAD"], text=True,
                            capture_output=True).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"command": "python evaluate.py " + " ".join(sys.argv[1:]), "commit": commit or None,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "device": f"{device} ({name}, {torch.get_num_threads()} threads)",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)}
            | {"python": platform.python_version()}}


def main():
    args = parse_args()
    folder, name = find_saes(args.saes, args.model)
    device, dtype = sta.pick_device(args.device, args.dtype)
    model, tokenizer, layers = sta.load_model(name, device, dtype, args.layer or "all")
    config = model.get_decoder().config
    saes, metadata = sta.load_saes(folder, model, layers if args.layer else None)
    layers = sorted({layer for layer, _ in saes})
    for k, flag in ((args.k_key, "--k-key"), (args.k_val, "--k-val")):
        most = min(sae.n_latents for sae in saes.values())
        if k > most:
            raise sta.UsageError(f"{flag} {k}: larger than the SAEs' n_latents = {most}")
    if args.compile or (args.compile is None and device.type == "cuda"):
        sta.speed_up(saes)
    limit = getattr(config, "max_position_embeddings", 2048)
    args.seq_len = args.seq_len or min(2048, limit)
    if not 2 <= args.seq_len <= limit:
        raise sta.UsageError(f"--seq-len {args.seq_len}: want 2 to the model's limit of {limit}")
    text = sta.read_text(args.text, "valid", name)
    windows = token_windows(text, tokenizer, args.seq_len, args.max_tokens)
    print(f"{name} with the SAEs of {folder}: {len(layers)} of {config.num_hidden_layers} layers "
          f"reconstructed, {windows.numel():,} tokens in windows of {args.seq_len}")

    total = args.k_key + args.k_val
    variants = {"dense": sta.Budget(None, None), "keys": sta.Budget(args.k_key, None),
                "values": sta.Budget(None, args.k_val), "dual": sta.Budget(args.k_key, args.k_val),
                "uniform": sta.Budget(total // 2, total - total // 2)}
    ks = [*sta.CURVE_KS, *(k for budget in variants.values() for k in budget if k)]
    print("variant  k_key k_val  perplexity  delta CE         bytes/tok  share  fvu_K  fvu_V"
          "  cos_K  cos_V")
    dense, curves = dense_pass(model, saes, windows, ks, args.sink)
    rows = []
    for variant, budget in variants.items():
        losses = dense
        if variant != "dense":
            with sta.reconstruct(model, sta.dual(saes, budget), args.sink):
                losses = window_losses(model, windows, variant)
        rows.append(compare(variant, budget, losses, dense) | {"tokens": windows.numel()}
                    | memory(budget, model, saes, args.seq_len, args.sink)
                    | fidelity(curves, budget))
        print_row(rows[-1])
    report = {layer: {kind: curves[layer, kind] for kind in sta.KINDS} for layer in layers}
    for kind in sta.KINDS:
        for layer in layers:
            grid = [point for point in curves[layer, kind] if point["k"] in sta.CURVE_KS]
            report[layer][f"elbow_{kind[:3]}"] = sta.elbow(grid)
        elbows = [report[layer][f"elbow_{kind[:3]}"] for layer in layers]
        counts = ", ".join(f"k = {k} in {elbows.count(k)}" for k in sorted(set(elbows)))
        print(f"elbow of the {kind} curves (k up to {sta.CURVE_KS[-1]}), layers: {counts}")
    path = args.out / f"{sta.slug(name)}.json"
    settings = {n: str(v) if isinstance(v, pathlib.Path) else v for n, v in vars(args).items()}
    sta.write_atomic(path, json.dumps(
        {"model": name, "saes": str(folder), "layers": layers,
         "n_layers": config.num_hidden_layers, "tokens": windows.numel(),
         "windows": len(windows), "seq_len": args.seq_len, "sink": args.sink, "config": settings,
         "sae_settings": metadata["settings"], **provenance(device), "rows": rows,
         "curves": report}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sta.run(main)
