"""The model beside its reconstruction: perplexity, zero-shot accuracy, fidelity, bytes.

    python evaluate.py                                    # the newest SAEs: a minute for tiny
    python evaluate.py --rows rivals,cache                # with rows of beyond/rivals.py, cache.py
    python evaluate.py --model yi-6b --seq-len 2048 --tasks piqa,arc_easy

Perplexity is the GPTQ convention: the text in disjoint windows of --seq-len tokens, the tail
dropped, mean loss over each window's seq_len - 1 targets. Zero-shot formats and scores are those of
lm-evaluation-harness 0.4.13. Fidelity: on the dense model's keys and values, of the first windows.
Writes results/<model>.json: what was run; the rows, each with its own commit and date (--resume
keeps those), and the columns that `compare`, `next_tokens`, `fidelity_and_bytes` and `score_task`
name; the SAEs' budget curves and elbows. While it is running, <model>.json.unfinished has the rows
so far.
Non-goals: word perplexity, few-shot prompts, other tasks: lm-eval itself runs in sta.reconstruct.
"""
import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import pathlib
import re
import time
from typing import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sta
from support.files import ROOT, explain, run_main, sha256, write_atomic
from support.models import context_length
from support.results import check_pattern, finished_rows, inputs_hash, load_run
from support.tasks import (BATCH_TOKENS, TASKS, load_tasks, loglikelihoods, margin, mean_stderr,
                           score_task)
from support.text import read_text, text_name, token_windows

FIDELITY_TOKENS = BATCH_TOKENS  # 4,096: one call of the model
BLOCK = 8  # windows

def parse_args(argv=None, description=__doc__):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--model", help="short name, hub id or folder (default: the newest SAEs' model)")
    add("--saes", type=pathlib.Path, default="saes", help="folder of SAEs (default saes)")
    add("--layer", help="layers to reconstruct: 12, 0-7, 3,9 (default all trained)")
    add("--rows", default="", help="files of beyond/ that add rows, such as rivals,cache; with "
                                   "--model, these need no SAEs")
    add("--only", default="", help="keep dense and the rows whose names match this pattern")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-2 test)")
    add("--tasks", help=f"of {', '.join(TASKS)}, or .jsonl files with context, choices, label "
                        "(default: tiny's own, else none)")
    add("--task-dir", type=pathlib.Path, help="<task>.jsonl with the hub's columns (else the hub)")
    # how much
    add("--seq-len", type=int, help="tokens per window (default 2048, or the model's limit)")
    add("--max-tokens", type=int, default=32_768, help="tokens to score (default 32,768)")
    add("--limit", type=int, help="rows of each task (default all)")
    add("--k-key", type=int, help="atoms per key (default: what the SAEs were trained for)")
    add("--k-val", type=int, help="atoms per value (default: the same)")
    add("--sink", type=int, default=1, help="first tokens of a window kept exact (default 1)")
    # where
    add("--device", help="cpu, cuda, or auto: over all GPUs, by accelerate (default: cuda if any)")
    add("--dtype", help="of the model (default float32 on cpu, bfloat16 on cuda)",
        choices=["float32", "bfloat16", "float16"])
    add("--out", type=pathlib.Path, default="results",
        help="folder whose <model>.json is replaced (default results)")
    add("--resume", action="store_true",
        help="take from --out, of the rows wanted, those whose inputs were the same")
    args = parser.parse_args(argv)
    for name, least in (("sink", 0), ("max_tokens", 2), ("limit", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: want {least} "
                                 "or more")
    check_pattern(args.only)
    return args

# ------------------------------------------------------------------ the rows of the table
@dataclasses.dataclass
class Row:
    """One row of the table, a way to keep the cache. A file of beyond/ adds rows by a function
    rows(model, tokenizer, saes, args, rows_so_far) -> [Row]."""
    name: str
    codecs: dict  # {layer: codec}
    budget: tuple = (None, None)  # atoms per key and per value, where that means something
    once_bytes: int = 0  # kept once, whatever the number of tokens: dictionaries
    method: str | None = None  # the curve to which it belongs in pictures; default: the name
    settings: dict | None = None  # how the codec was fitted; --resume compares them
    with_tasks: bool = True
    make_forward: Callable | None = None  # (model) in place of through_hooks
    bytes_per_token: float | None = None  # of the whole model, if make_forward has measured them

class OneKind:
    """A codec's keys alone (kind "key"), or its values: the other kind stays as it is. It states
    its bytes_per_token, of one layer, as all codecs do that have a roundtrip of their own."""

    def __init__(self, kind, codec, bytes_per_token):
        self.kind, self.codec, self.bytes_per_token = kind, codec, bytes_per_token

    def roundtrip(self, keys, values, live):
        keys_hat, values_hat = sta.roundtrip(self.codec, keys, values, live)
        return (keys_hat, values) if self.kind == "key" else (keys, values_hat)

def dictionary_bytes(saes, *kinds):
    """Bytes of what is kept once: the SAEs' weights and the heads' means."""
    return sum(x.nbytes for (_, kind), sae in saes.items() if kind in kinds
               for x in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))

def dual_codecs(saes, k_key, k_val):
    """{(layer, kind): SAE} -> {layer: the paper's codec}."""
    return {layer: sta.DualBudget(saes[layer, "key"], saes[layer, "value"],
                                  sta.Budget(k_key, k_val))
            for layer in sorted({layer for layer, _ in saes})}

def splits(k_key, k_val):
    """{name: (atoms per key, atoms per value)}: the dual budget, and others of the same total."""
    half = (k_key + k_val) // 2
    return {"dual": (k_key, k_val), "uniform": (half, k_key + k_val - half),
            "reverse": (k_val, k_key)}

def paper_rows(saes, shape, k_key, k_val, settings=None):
    """{(layer, kind): SAE}, (n_kv_heads, head_dim), atoms per key and value -> [Row]: the dense
    model, the paper's dual budget and its controls: means (no atom: each vector becomes its head's
    mean); keys, values (only these coded); uniform and reverse (k_key > k_val) of the same total.
    Tasks are slow, so only dense, means and dual are scored on them."""
    if not saes:
        return [Row("dense", {})]
    most = min(sae.n_latents for sae in saes.values())
    for option, k in (("--k-key", k_key), ("--k-val", k_val)):
        if not 1 <= k <= most:
            raise sta.UsageError(f"{option} {k}: want 1 to n_latents = {most}")
    means = sum(sae.b_dec.nbytes for sae in saes.values())
    rows = [Row("dense", {}), Row("means", dual_codecs(saes, 0, 0), (0, 0), means,
                                  settings=settings)]
    dual, (H, D) = dual_codecs(saes, k_key, k_val), shape
    for kind, k, budget in (("key", k_key, (k_key, None)), ("value", k_val, (None, k_val))):
        size = H * (k * (2 + 2) + D * 2)  # fp16 z and int16 idx; the other kind in bf16
        codecs = {layer: OneKind(kind, codec, size) for layer, codec in dual.items()}
        rows.append(Row(f"{kind}s", codecs, budget, dictionary_bytes(saes, kind),
                        settings=settings, with_tasks=False))
    once_bytes = dictionary_bytes(saes, *sta.KINDS)
    for name, budget in splits(k_key, k_val).items():
        rows.append(Row(name, dual_codecs(saes, *budget), budget, once_bytes, settings=settings,
                        with_tasks=name == "dual"))
    return rows

def more_rows(rows, model, tokenizer, saes, args):
    """[Row], and those that the files of beyond/ named by --rows add to them."""
    rows = list(rows)
    for name in filter(None, args.rows.split(",")):
        if not (name.isidentifier() and (ROOT / "beyond" / f"{name}.py").exists()):
            raise sta.UsageError(f"--rows {name}: there is no beyond/{name}.py")
        with explain(f"--rows {name}: a package is missing"):
            module = importlib.import_module(f"beyond.{name}")
        if not hasattr(module, "rows"):
            raise sta.UsageError(f"--rows {name}: beyond/{name}.py is a script, and adds no rows")
        rows += module.rows(model, tokenizer, saes, args, rows)
    return rows

# ------------------------------------------------------------------ perplexity
@contextlib.contextmanager
def through_hooks(model, codecs, sink):
    """`with through_hooks(...) as forward`: ids (B, T) -> logits (B, T, V) with coded layers."""
    if model.device.type == "cuda":
        codecs = sta.fuse(codecs)
    with sta.reconstruct(model, codecs, sink):
        yield lambda ids: model(input_ids=ids, use_cache=False).logits

@torch.no_grad()
def window_losses(forward, windows, model, name):
    """-> (mean cross entropy in nats over the T - 1 targets of each window (n_windows,), float64;
    the logits of the first batch (B, T, V))."""
    losses, first_logits = [], None
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    for batch in tqdm(batches, desc=name, leave=False, disable=None):
        logits = forward(batch.to(model.device))  # (B, T, V)
        first_logits = logits if first_logits is None else first_logits
        for of_window, ids in zip(logits, batch.to(logits.device)):  # (T, V), (T,)
            losses.append(F.cross_entropy(of_window[:-1].float(), ids[1:]).double())
    return torch.stack(losses).cpu(), first_logits

def mean_excess(losses, others):
    """(mean over windows of losses - others, its standard error, half its 95% interval).
    Neighbouring windows are alike, so errors are over means of BLOCK of them, or of fewer, where
    there would be less than four such means."""
    losses, others = (torch.as_tensor(x, dtype=torch.float64) for x in (losses, others))
    excess = losses - others
    size = min(BLOCK, max(1, len(excess) // 4))
    blocks = excess[:len(excess) // size * size].view(-1, size)
    stderr = mean_stderr(blocks.mean(1))[1]
    return excess.mean().item(), stderr, margin(stderr, len(blocks))

def compare(losses, dense_losses):
    """Columns of a row that come from window losses, paired with dense's."""
    mean, stderr, half = mean_excess(losses, dense_losses)
    ce = losses.mean().item()
    exponents = torch.tensor([ce, mean, mean - half, mean + half], dtype=torch.float64)
    perplexity, ratio, low, high = exponents.exp().tolist()  # infinite rather than an OverflowError
    return {"perplexity": perplexity, "ce": ce, "delta_ce": mean, "delta_ce_stderr": stderr,
            "ratio": ratio, "ratio_ci95": [low, high], "window_ce": losses.tolist()}

@torch.no_grad()
def next_tokens(logits, dense_logits):
    """How the distributions of the next token differ from the dense model's, by the logits (n, T,
    V) of both -> {kl: mean of KL(dense || row) in nats; kl_p99: its 99th percentile; same_top:
    share of tokens whose likeliest next token is the same}. Perplexity is an average over the
    tokens of the text; the percentile shows changes that are rare and large."""
    kl, same = [], []
    for of_window, exact in zip(logits, dense_logits):  # (T, V)
        log_p, log_q = (x.float().log_softmax(-1) for x in (exact, of_window))
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))  # (T,)
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
    kl = torch.cat(kl).double()
    return {"kl": kl.mean().item(), "kl_p99": kl.quantile(0.99).item(),
            "same_top": torch.cat(same).double().mean().item()}

# ------------------------------------------------------------------ fidelity and bytes
@torch.no_grad()
def measure_codec(codec, keys, values):
    """A codec on dense keys and values (B, T, H, D) -> (its bytes per token, {fvu_key, fvu_val,
    cos_key, cos_val, cos_centred_key, cos_centred_val})."""
    if hasattr(codec, "roundtrip"):
        live = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        keys_hat, values_hat = codec.roundtrip(keys, values, live)
        size = codec.bytes_per_token
    else:
        stored = codec.encode(keys, values)
        keys_hat, values_hat = codec.decode(stored)
        size = sum(x.nbytes for x in stored) / keys.shape[:2].numel()
    columns = {f"{name}_key": x for name, x in sta.fidelity(keys, keys_hat).items()}
    columns |= {f"{name}_val": x for name, x in sta.fidelity(values, values_hat).items()}
    return size, columns

def fidelity_and_bytes(row, vectors, config):
    """{bytes_per_token of the cache, in which layers that are not coded stay in bf16; bytes_share
    of bf16; once_bytes, kept whatever the number of tokens; break_even_tokens, beyond which it is
    smaller than bf16; fvu_key, fvu_val, cos_key, cos_val, means over by_layer} of a row. vectors:
    {(layer, kind): (B, T, H, D)}."""
    n_layers = config.num_hidden_layers
    dense_bytes = 4 * math.prod(sta.kv_shape(config))  # of a layer: keys and values in bf16
    total, by_layer = (n_layers - len(row.codecs)) * dense_bytes, {}
    for layer, codec in row.codecs.items():
        keys, values = (vectors[layer, kind].float() for kind in sta.KINDS)
        size, by_layer[layer] = measure_codec(codec, keys, values)
        total += size
    names = "fvu_key", "fvu_val", "cos_key", "cos_val"
    if by_layer:
        columns = {name: sum(layer[name] for layer in by_layer.values()) / len(by_layer)
                   for name in names}
    elif row.make_forward:  # it has no codecs to measure
        columns = dict.fromkeys(names, math.nan)
    else:  # the dense model
        columns = dict(zip(names, (0.0, 0.0, 1.0, 1.0)))
    if row.bytes_per_token is not None:
        total = row.bytes_per_token
    saved = n_layers * dense_bytes - total
    return {"bytes_per_token": total, "bytes_share": total / (n_layers * dense_bytes),
            "once_bytes": row.once_bytes,
            "break_even_tokens": int(row.once_bytes // saved) if saved > 0 else None,
            **columns, "by_layer": by_layer}

def find_curves(saes, vectors):
    """{layer: {key: curve, value: curve, k_key, k_value: trained for; elbow_key, elbow_value}}, of
    `sta.budget_curve`; the elbows are those of the budgets trained for, up to 2k."""
    curves = {}
    for (layer, kind), sae in saes.items():
        curve = sta.budget_curve(sae, vectors[layer, kind].flatten(0, 1).float())
        curves.setdefault(layer, {}).update({
            kind: curve, f"k_{kind}": sae.k, f"elbow_{kind}": sta.elbow(curve, 2 * sae.k)})
    return curves

# ------------------------------------------------------------------ the run
HEADER = ("{name:{width}} k_key k_val  perplexity  delta CE          bytes/tok  share  fvu_K  "
          "fvu_V  cos_K  cos_V")

def format_row(row, width):
    k = ["-" if row[name] is None else f"{row[name]:.4g}" for name in ("k_key", "k_val")]
    error = f" ±{row['delta_ce_stderr']:.4f}"
    return (f"{row['name']:{width}} {k[0]:>5} {k[1]:>5} {row['perplexity']:11.3f} "
            f"{row['delta_ce']:+8.4f}{error:8} {row['bytes_per_token']:9,.0f} "
            f"{100 * row['bytes_share']:6.2f}% {row['fvu_key']:6.3f} {row['fvu_val']:6.3f} "
            f"{row['cos_key']:6.3f} {row['cos_val']:6.3f}")

def print_elbows(curves):
    """How many layers have their elbow at which k."""
    for kind in sta.KINDS:
        elbows = [layer[f"elbow_{kind}"] for layer in curves.values()]
        counts = [f"k = {k} in {elbows.count(k)}" for k in sorted(set(elbows))]
        most = max(min(2 * layer[f"k_{kind}"], layer[kind][-1]["k"]) for layer in curves.values())
        print(f"elbow of the {kind} curves (k from 1 to {most}), layers: {', '.join(counts)}")

def print_dictionaries(rows):
    """The number of tokens beyond which each row's dictionaries pay off."""
    counts = [f"{row['name']} {row['break_even_tokens']:,}" for row in rows
              if row["break_even_tokens"]]
    if counts:
        print("smaller than bf16, dictionaries included, beyond how many tokens:",
              ", ".join(counts))

def print_next_tokens(rows, width):
    print("next token, against dense: mean KL in nats, its 99th percentile, same most likely token")
    for row in rows[1:]:
        print(f"  {row['name']:{width}} {row['kl']:9.4f} {row['kl_p99']:9.3f} "
              f"{100 * row['same_top']:7.2f}%")

def print_tasks(rows, width):
    for task in rows[0]["tasks"]:
        print(f"{task}, {rows[0]['tasks'][task]['n']} questions: accuracy in % ± standard error; "
              "change from dense ± its paired standard error")
        scored = [row for row in rows if row["tasks"]]
        for row in scored:
            x = row["tasks"][task]
            cells = [f"{name} {100 * x[name]:6.2f} ±{100 * x[name + '_stderr']:5.2f}"
                     for name in ("acc", "acc_norm", "delta_acc")]
            print(f"  {row['name']:{width}} {'   '.join(cells)}")

@torch.no_grad()
def run_dense(model, windows, layers, sink):
    """The dense model on the first windows (B, T) -> (its vectors {(layer, kind): (B, T, H, D)},
    its logits (B, T, V))."""
    part = windows[:max(1, FIDELITY_TOKENS // windows.shape[1])]
    vectors = {site: x.unflatten(0, (len(part), -1))
               for site, x in sta.harvest(model, part, layers, sink).items()}
    return vectors, model(input_ids=part.to(model.device), use_cache=False).logits

def score_row(row, dense_columns, model, windows, tasks, vectors, dense_logits, sink):
    """A row's columns in the JSON. dense_columns: those of the dense row, or None for itself;
    vectors, dense_logits: of `run_dense`."""
    if row.make_forward:
        patched = row.make_forward(model)
    else:
        patched = through_hooks(model, row.codecs, sink)
    with patched as forward:
        losses, logits = window_losses(forward, windows, model, row.name)
        differences = next_tokens(logits, dense_logits)
        totals = {name: loglikelihoods(forward, questions, model, row.name)
                  for name, questions in tasks.items() if row.with_tasks}
    dense_losses = dense_columns["window_ce"] if dense_columns else losses
    dense_tasks = dense_columns["tasks"] if dense_columns else {}
    scores = {name: score_task(tasks[name], totals[name], dense_tasks.get(name)) for name in totals}
    finite = [losses.isfinite().all(), *(math.isfinite(x["acc"]) for x in scores.values())]
    if dense_columns is None and not all(finite):
        raise sta.UsageError("the model's own loss is not finite; use --dtype float32 or bfloat16")
    return {"name": row.name, "method": row.method or row.name, "k_key": row.budget[0],
            "k_val": row.budget[1], "settings": row.settings, **compare(losses, dense_losses),
            **differences, "tasks": scores,
            **fidelity_and_bytes(row, vectors, model.get_decoder().config)}

def choose_rows(run, args):
    """[Row]: the paper's, those of --rows, and of these what --only keeps."""
    shape = sta.kv_shape(run.model.get_decoder().config)
    rows = paper_rows(run.saes, shape, args.k_key, args.k_val, run.settings)
    dense, *rows = more_rows(rows, run.model, run.tokenizer, run.saes, args)
    return [dense] + [row for row in rows if re.search(args.only, row.name)]

def read_input(run, args):
    """-> the windows (n, T) of --text, and --tasks {name: [Question]}."""
    windows = token_windows(read_text(args.text, "valid", run.name), run.tokenizer, run.model,
                            args.seq_len, 2048, args.max_tokens)
    if args.sink >= windows.shape[1]:
        raise sta.UsageError(f"--sink {args.sink}: want fewer than a window's {windows.shape[1]}")
    tasks = args.tasks
    if tasks is None:
        tasks = str(ROOT / "tiny" / "cloze.jsonl") if run.name == "tiny" else ""
    return windows, load_tasks(tasks, args.task_dir, args.limit, run.tokenizer,
                               context_length(run.model))

def main(argv=None, codec=None):
    """Evaluate as `argv` says, and your own codec, if any, in all layers that have SAEs, under the
    name of its class; returns the path of the JSON."""
    args = parse_args(argv)
    run = load_run(args, needs_saes=not args.rows)
    windows, tasks = read_input(run, args)
    rows = choose_rows(run, args)
    if codec:
        rows.append(Row(type(codec).__name__, dict.fromkeys(run.layers, codec)))
    n_layers = run.model.get_decoder().config.num_hidden_layers
    print(f"{run.name}{f' with the SAEs of {run.folder}' if run.saes else ''}: {len(run.layers)} "
          f"of {n_layers} layers reconstructed, {windows.numel():,} tokens in windows of "
          f"{windows.shape[1]}")
    result = {
        "model": run.name, "saes": run.folder, "layers": run.layers, "n_layers": n_layers,
        "tokens": windows.numel(), "windows": len(windows), "seq_len": windows.shape[1],
        "text": text_name(args.text, "valid", run.name), "text_sha256": sha256(windows),
        "context": context_length(run.model), "config": vars(args), **run.about, "rows": []}
    unfinished = run.path.with_name(f"{run.path.name}.unfinished")
    finished = finished_rows(run.path) | finished_rows(unfinished) if args.resume else {}
    width = max(8, *(len(row.name) for row in rows))
    print(HEADER.format(name="row", width=width))
    vectors, dense_logits = run_dense(run.model, windows, run.layers, args.sink)
    result["curves"] = find_curves(run.saes, vectors)
    weights = [x.sum(dtype=torch.float64).item() for x in run.model.parameters()]
    dense_columns = None
    for row in rows:
        inputs = inputs_hash(run.about, args, row, windows, repr(tasks), weights)
        columns = finished.get(row.name, {})
        if columns.get("inputs") != inputs:
            columns = score_row(row, dense_columns, run.model, windows, tasks, vectors,
                                dense_logits, args.sink)
            columns |= {"inputs": inputs, **run.about, "date": time.ctime()}
        dense_columns = dense_columns or columns  # the first row's
        result["rows"].append(columns)
        write_atomic(unfinished, json.dumps(result, indent=1, default=str) + "\n")
        print(format_row(columns, width), flush=True)
    unfinished.replace(run.path)
    print_next_tokens(result["rows"], width)
    print_dictionaries(result["rows"])
    print_tasks(result["rows"], width)
    if result["curves"]:
        print_elbows(result["curves"])
    print(f"wrote {run.path}")
    return run.path

if __name__ == "__main__":
    run_main(main)
