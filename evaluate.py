"""The model beside its reconstruction: perplexity, zero-shot accuracy, fidelity, bytes, verdicts.

    python evaluate.py                                    # the newest SAEs: minutes for tiny
    python evaluate.py --baselines quant,pca,omp          # what else the same bytes could buy
    python evaluate.py --claims                           # verdicts on the paper's P1 to P6
    python evaluate.py --cache                            # through the cache that stores codes
    python evaluate.py --generate "The President"         # what it writes, dense and compressed
    python evaluate.py --atoms                            # what the atoms stand for, and P8
    python evaluate.py --model yi-6b --seq-len 2048 --tasks piqa,arc_easy

Perplexity is the GPTQ convention: one tokenizer call on the whole text, disjoint windows of
--seq-len tokens, the tail dropped, mean loss over each window's seq_len - 1 targets. Zero-shot
formats and scores are those of lm-evaluation-harness 0.4.13. Writes results/<model>.json:
    model, saes, layers, n_layers, tokens, windows, seq_len, sink, config, command, commit, ...
    rows    one a variant: name, k_key, k_val (null: no atoms), perplexity, ce; against dense, over
            the same windows: delta_ce, its paired delta_ce_stderr (nats a token), ratio of
            perplexities and its bootstrap ratio_ci95; bytes_per_token of the whole model's cache
            and bytes_share of bf16, for a coded token (bytes_share_with_sink: at seq_len tokens);
            (cache: measured, with its exact tokens, and a column cache: bytes, break-even, ...);
            fvu_key, fvu_val, cos_key, cos_val (means over the layers in by_layer), tokens,
            tasks   {name: {acc, acc_norm, acc_stderr, acc_norm_stderr, n, truncated, delta_acc,
                    delta_acc_stderr (paired with dense), ppl (lambada_openai), loglik on demand}}
    curves  {layer: {key: [points], value: [points], elbow_key, elbow_val}} as sta.BudgetCurve
    claims  [{claim, statement, figure, stderr, text, verdict, rule, rows}]; with them rows dual and
            l1 have attention {layer: {qk_error, attention_kl}}, and the file attention_map
    training [the run-*.json of train_sae.py]
--atoms writes results/<model>-atoms.json for plots.py, and -hierarchy.json: check, hierarchy.
Variants: dense, keys, values, dual; uniform and reverse (k_key > k_val) of the same total;
allocated: by layer as train_sae.py --budget saved it (k_key, k_val are means); with --cache one
more, allocated's budgets if there are any, else dual's, chunk by chunk through sta.compress; with
--baselines quant2..4, pca, omp, l1; with --claims dual at other budgets, and lower, the next k
atoms in place of the k strongest. Fidelity is measured on the dense model's rows without the
sinks: curves over all tokens, the rows' columns, and the curves of pursuit, over the first 4,096.
Non-goals: lm-eval's word perplexity, few-shot prompts.
"""
import argparse
import collections
import contextlib
import datetime
import functools
import json
import math
import pathlib
import platform
import re
import subprocess
import sys
import time
import types
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import sta

BATCH_TOKENS = 4096
BASELINES = ("quant", "pca", "omp", "l1")
P5_ONLY = ("dual/", "dual*", "lower")  # rows of --claims for which no task is run


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
    add("--tasks", help=f"of {', '.join(TASKS)}, or paths of .jsonl files with context, choices, "
                        "label (default for tiny tiny/cloze.jsonl, else none)")
    add("--task-dir", type=pathlib.Path, help="folder of <task>.jsonl with the hub's columns "
                                              "(default: the hub)")
    add("--baselines", default="", help=f"of {','.join(BASELINES)} (default none)")
    add("--cache", action="store_true", help="one more row: chunk by chunk through sta.compress")
    add("--generate", metavar="PROMPT", help="only write on, dense and compressed, greedily")
    add("--atoms", action="store_true", help="only look at what each atom stands for, and test P8")
    add("--variants", help="rows to compute beside dense, such as dual,quant2 (default all)")
    add("--claims", action="store_true", help="run what P1 to P6 need and print six verdicts; "
                                              "trains L1 SAEs if there are none")
    # how much
    add("--seq-len", type=int, help="tokens a window (default 2048, or the model's limit)")
    add("--max-tokens", type=int, help="tokens to score (default 32,768; --atoms: 131,072)")
    add("--chunk", type=int, default=128, help="tokens a step of --cache (default 128)")
    add("--recent", type=int, default=128,
        help="newest tokens that --cache and --generate keep exact (default 128)")
    add("--new-tokens", type=int, default=100, help="of --generate (default 100)")
    add("--limit", type=int, help="rows of each task (default all)")
    # budgets
    add("--k-key", type=int, default=8, help="atoms a key (default 8)")
    add("--k-val", type=int, default=16, help="atoms a value (default 16)")
    add("--coef-bits", type=int, default=16, choices=range(3, 17), metavar="BITS",
        help="bits a coefficient; below 16 packed with its index into 16, and an fp16 step a "
             "vector (default 16)")
    add("--sink", type=int, default=1, help="first tokens of a window kept exact (default 1)")
    # where
    add("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    add("--device", help="cpu, cuda, or auto: the model over all GPUs, by accelerate (default: "
                         "cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the model (default float32 on cpu, bfloat16 on cuda)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="compiled encode and decode (default: on cuda; on cpu in blocks; --no-compile: as "
             "they are defined)")
    add("--log-samples", action="store_true", help="write each choice's log-likelihood, too")
    add("--out", type=pathlib.Path, default=pathlib.Path("results"), help="(default results)")
    args = parser.parse_args(argv)
    if args.max_tokens is None:
        args.max_tokens = 131_072 if args.atoms else 32_768
    for name, least in (("k_key", 1), ("k_val", 1), ("sink", 0), ("recent", 0), ("chunk", 1),
                        ("new_tokens", 1), ("max_tokens", 2), ("limit", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at "
                                 f"least {least}")
    args.baselines = [name for name in args.baselines.split(",") if name]
    for name in set(args.baselines) - set(BASELINES):
        raise sta.UsageError(f"--baselines {name}: want some of {','.join(BASELINES)}")
    if args.claims and args.variants:
        raise sta.UsageError("--variants with --claims: the verdicts need every row; drop one")
    if args.claims and "l1" not in args.baselines:
        args.baselines.append("l1")
    return args


def find_saes(root, model_name):
    """(folder of one model's SAEs, the model's name): the newest, unless a model is named."""
    command = "python train_sae.py" + (f" --model {model_name}" if model_name else "") + (
        f" --out {root}" if str(root) != "saes" else "")
    if any(root.glob("layer*.key")):
        folders = [root]
    else:
        folders = [root / sta.slug(model_name)] if model_name else root.glob("*")
        folders = [folder / stage for folder in folders
                   for stage in ("", "pursuit", "kl", "pursuit/kl")]
    found = [path for folder in folders for path in folder.glob("layer*.key/cfg.json")]
    if not found:
        raise sta.UsageError(f"{root}: no SAEs{' of ' + model_name if model_name else ''}; first "
                             f"run: {command}")
    newest = max(found, key=lambda path: path.stat().st_mtime).parent
    return newest.parent, model_name or sta.load_sae(newest)[1]["model"]


# ------------------------------------------------------------------ perplexity

def token_windows(text, tokenizer, seq_len, max_tokens):
    """Text -> (n_windows, seq_len) token ids, by the GPTQ convention."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    n = min(len(ids), max(max_tokens, seq_len)) // seq_len
    if n == 0:
        raise sta.UsageError(f"text of {len(ids)} tokens: too short for one window of {seq_len}; "
                             "give more text or a smaller --seq-len")
    return ids[:n * seq_len].view(n, seq_len)


def forward(model, ids, mask=None, cache=None, chunk=0):
    """ids (B, T) -> logits (B, T, V), at once, or chunk by chunk through a cache."""
    if cache is None:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache.reset()
    return torch.cat([model(input_ids=ids[:, i:i + chunk], past_key_values=cache,
                            attention_mask=None if mask is None else mask[:, :i + chunk]).logits
                      for i in range(0, ids.shape[1], chunk)], 1)


@torch.no_grad()
def window_losses(model, windows, name, after_batch=lambda number: None, **through):
    """Mean cross entropy (nats) over the T - 1 targets of each window: (n_windows,) float64."""
    losses = []
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
    for number, batch in enumerate(tqdm(batches, desc=name, leave=False, disable=None)):
        logits = forward(model, batch.to(model.device), **through)  # (B, T, V)
        for row, ids in zip(logits, batch.to(logits.device)):
            losses.append(F.cross_entropy(row[:-1].float(), ids[1:]).double())
        after_batch(number)
    return torch.stack(losses).cpu()


# ------------------------------------------------------------------ zero-shot, as lm-eval has it

def wikihow(text):
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def arc(row):
    return (f"Question: {row['question']}\nAnswer:", row["choices"]["text"],
            row["choices"]["label"].index(row["answerKey"]))


def winogrande(row):  # the options are in the contexts; what follows them is scored
    before, after = row["sentence"].split("_", 1)
    contexts = [before + row["option1"], before + row["option2"]]
    return contexts, [after.strip()] * 2, int(row["answer"]) - 1


def lambada(row):
    *words, last = row["text"].split(" ")
    return " ".join(words), [last], 0


# name: (data set, config, split, row -> (context, or one a choice; choices; label))
TASKS = {
    "piqa": ("baber/piqa", None, "validation", lambda row: (
        f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])),
    "hellaswag": ("Rowan/hellaswag", None, "validation", lambda row: (
        wikihow(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
        [wikihow(ending) for ending in row["endings"]], row["label"])),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "boolq": ("aps/super_glue", "boolq", "validation", lambda row: (
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])),
    "openbookqa": ("allenai/openbookqa", "main", "test", lambda row: (
        row["question_stem"], row["choices"]["text"],
        row["choices"]["label"].index(row["answerKey"].strip()))),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", lambada)}


class Task(NamedTuple):
    """One task, tokenised. A request is (context ids, continuation ids), one a choice."""
    name: str
    requests: list
    lengths: list  # a row: characters of each choice
    labels: list
    truncated: int  # requests whose context loses tokens on the left


def task_rows(spec, task_dir, limit):
    """(where, row) of a .jsonl file, of task_dir/<task>.jsonl, or of the hub's data set."""
    if spec.endswith(".jsonl") or task_dir:
        path = pathlib.Path(spec) if spec.endswith(".jsonl") else task_dir / f"{spec}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise sta.UsageError(f"--tasks {spec}: cannot read {path} ({error})") from None
        for number, line in [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:limit]:
            try:
                yield f"{path} line {number}", json.loads(line)
            except ValueError:
                raise sta.UsageError(f"{path} line {number}: not JSON") from None
        return
    try:
        from datasets import load_dataset  # optional: pip install datasets
        source, config, split, _ = TASKS[spec]
        rows = load_dataset(source, config, split=split)
    except Exception as error:  # of many kinds: no package, no connection, no such data set
        raise sta.UsageError(f"--tasks {spec}: the hub's rows cannot be had; give --task-dir "
                             f"({type(error).__name__}: {error})") from None
    for i, row in enumerate(rows):
        if limit and i == limit:
            return
        yield f"{spec} row {i}", row


def encode_pair(tokenizer, context, continuation):
    """(context ids, continuation ids): trailing spaces go to the continuation, whose ids are what
    the whole has after the context's; an empty context is BOS, else EOS."""
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    if not bare:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [start], tokenizer(continuation, add_special_tokens=False)["input_ids"]
    ids = tokenizer(bare)["input_ids"]
    return ids, tokenizer(bare + continuation)["input_ids"][len(ids):]


def load_task(spec, args, tokenizer, limit_tokens):
    """--tasks entry -> Task. Raises UsageError naming the file and line of a bad row."""
    if not spec.endswith(".jsonl") and spec not in TASKS:
        raise sta.UsageError(f"--tasks {spec}: want path.jsonl or one of {', '.join(TASKS)}")
    build = TASKS[spec][3] if spec in TASKS else lambda row: (
        row["context"], row["choices"], row["label"])
    task = Task(pathlib.Path(spec).stem, [], [], [], 0)
    for where, row in task_rows(spec, args.task_dir, args.limit):
        try:
            contexts, choices, label = build(row)
            label = int(label)
        except KeyError as error:
            raise sta.UsageError(f"{where}: no column {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise sta.UsageError(f"{where}: not a row of {task.name} ({error})") from None
        if not 0 <= label < len(choices):
            raise sta.UsageError(f"{where}: label {label}, but the {len(choices)} choices are "
                                 f"numbered from 0")
        for i, choice in enumerate(choices):
            context = contexts if isinstance(contexts, str) else contexts[i]
            pair = encode_pair(tokenizer, context, " " + choice)
            if not choice.strip() or not pair[1]:
                raise sta.UsageError(f"{where}: choice {i} ({choice!r}) tokenises to nothing")
            if len(pair[1]) > limit_tokens:
                raise sta.UsageError(f"{where}: choice {i} has {len(pair[1])} tokens, the model "
                                     f"takes {limit_tokens}")
            task.requests.append(pair)
        task.lengths.append([len(choice) for choice in choices])
        task.labels.append(label)
    if not task.labels:
        raise sta.UsageError(f"--tasks {spec}: no rows")
    cut = sum(len(context) + len(rest) > limit_tokens + 1 for context, rest in task.requests)
    if cut:
        print(f"{task.name}: {cut} of {len(task.requests)} contexts are longer than the model's "
              f"{limit_tokens} tokens; their left end is left out")
    return task._replace(truncated=cut)


@torch.no_grad()
def loglikelihoods(model, requests, limit_tokens, name, **through):
    """[(sum of log p over the continuation, whether it is the greedy one)] of each request."""
    inputs, found = {}, [None] * len(requests)  # one forward pass for each distinct input
    for i, (context, rest) in enumerate(requests):
        inputs.setdefault(tuple((context + rest)[-limit_tokens - 1:-1]), []).append(i)
    order = sorted(inputs, key=len, reverse=True)
    with tqdm(total=len(order), desc=name, leave=False, disable=None) as bar:
        while order:
            n = max(1, BATCH_TOKENS // len(order[0]))
            if through:  # padding would push tokens out of the recent ones
                n = min(n, sum(len(row) == len(order[0]) for row in order))
            batch, order = order[:n], order[n:]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # (B, T)
            mask = torch.zeros_like(ids)
            for b, row in enumerate(batch):
                ids[b, :len(row)], mask[b, :len(row)] = torch.tensor(row), 1  # padded on the right
            logits = forward(model, ids.to(model.device), mask.to(model.device), **through)
            for b, row in enumerate(batch):
                for i in inputs[row]:
                    rest = torch.tensor(requests[i][1], device=logits.device)
                    at = logits[b, len(row) - len(rest):len(row)].float()
                    at = at.log_softmax(-1)  # (len(rest), V)
                    total = at.gather(-1, rest[:, None]).double().sum()
                    found[i] = total.item(), bool((at.argmax(-1) == rest).all())
            bar.update(n)
    return found


def mean_stderr(values):
    """(mean, sample standard deviation / sqrt(n)) of numbers or booleans; None for one alone."""
    x = torch.as_tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


def score_task(task, found):
    """-> {acc: [bool a row], acc_norm: [...] or None}. One choice: right if it is the greedy one;
    else acc takes the largest log-likelihood and acc_norm the largest per character."""
    acc, norm, start = [], [], 0
    for lengths, label in zip(task.lengths, task.labels):
        part = found[start:start + len(lengths)]
        start += len(lengths)
        best = lambda weights: max(range(len(part)), key=lambda i: part[i][0] / weights[i]) == label
        acc.append(part[0][1] if len(part) == 1 else best([1] * len(part)))
        norm.append(best(lengths))
    return {"acc": acc, "acc_norm": None if max(map(len, task.lengths)) == 1 else norm}


def task_columns(task, found, dense, log_samples):
    """A row's tasks entry: scores, and their paired difference to dense's."""
    column = {"n": len(task.labels), "truncated": task.truncated}
    right, base = score_task(task, found), score_task(task, dense)
    for metric, hits in right.items():
        column[metric], column[f"{metric}_stderr"] = mean_stderr(hits) if hits else (None, None)
    delta = [float(a) - b for a, b in zip(right["acc"], base["acc"])]
    column["delta_acc"], column["delta_acc_stderr"] = mean_stderr(delta)
    if right["acc_norm"] is None:
        column["ppl"] = math.exp(-sum(total for total, _ in found) / len(found))
    return column | ({"loglik": [total for total, _ in found]} if log_samples else {})


# ------------------------------------------------------------------ what the same bytes could buy

def quantise(x, live, kind, bits, group=32):
    """KIVI [arXiv 2402.02750]: each group of 32 to 2**bits even steps between its extremes, kept as
    fp16 minimum and step. Keys: 32 tokens of one channel; values: 32 channels of one token. x
    (B, T, H, D); keys are those before RoPE, kinder to it than KIVI's own [arXiv 2401.18079]."""
    rows = x.transpose(1, 3) if kind == "key" else x  # (B, D, H, T): groups along the last axis
    real = live[:, None, None] if kind == "key" else live[..., None, None]
    fill = -rows.shape[-1] % group
    cut = lambda other: F.pad(torch.where(real, rows, other), (0, fill), value=other).unflatten(
        -1, (-1, group))  # (..., groups, 32)
    low = cut(math.inf).amin(-1, keepdim=True).half().float()
    step = ((cut(-math.inf).amax(-1, keepdim=True) - low) / (2 ** bits - 1)).half().float()
    levels = ((cut(0.0) - low) / step.clamp_min(1e-6)).round().clamp(0, 2 ** bits - 1)
    rows = (levels * step + low).flatten(-2)[..., :rows.shape[-1]]
    return rows.transpose(1, 3) if kind == "key" else rows


def omp(x, live, sae, k):
    """Codes by orthogonal matching pursuit over the dictionary of a one-pass SAE."""
    return sae.decode(*sae.pursue(x, k))


@torch.no_grad()
def fit_pca(model, layers, windows, sink):
    """{(layer, kind): (mean (D,), basis (D, D), strongest column first)} of the rows of a text."""
    sums = {}
    with sta.capture(model, layers) as rows:
        for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
            model.get_decoder()(batch.to(model.device), use_cache=False)
            for key, x in rows.items():
                x = x[:, sink:].flatten(0, 2).double()  # (N, D)
                old = sums.get(key, (0, 0, 0))
                sums[key] = old[0] + len(x), old[1] + x.sum(0), old[2] + x.T @ x
    fits = {}
    for key, (n, total, square) in sums.items():
        mean = total / n
        basis = torch.linalg.eigh(square / n - mean.outer(mean)).eigenvectors.flip(-1)
        fits[key] = mean.float(), basis.float()
    return fits


def low_rank(x, live, fit, rank):
    mean, basis = fit[0], fit[1][:, :rank]
    return (x - mean) @ basis @ basis.T + mean


def lower(x, live, sae, k):
    """P5's control: the k atoms after the k strongest."""
    z, idx = sae.encode(x, min(2 * k, sae.n_latents))
    return sae.decode(z[..., k:], idx[..., k:])


class Variant(NamedTuple):
    """One row: the codecs of sta.reconstruct, and one layer's bytes for a coded token. cached: the
    budgets of sta.compress, which is used instead."""
    name: str
    budget: sta.Budget
    codecs: dict
    layer_bytes: float
    cached: dict | sta.Budget | None = None


def variants(args, model, saes, allocated, pca, l1):
    """Every Variant that the arguments ask for, dense first."""
    heads, dim = sta.kv_shape(model.get_decoder().config)
    n_latents = max(sae.n_latents for sae in saes.values())
    most = min(dim // 2 if sae.pursuit else sae.n_latents for sae in saes.values())
    k, v, total = args.k_key, args.k_val, args.k_key + args.k_val
    budgets = {"dense": (None, None), "keys": (k, None), "values": (None, v), "dual": (k, v),
               "uniform": (total // 2, total - total // 2), "reverse": (v, k)}
    if args.claims:
        budgets |= {f"dual/{s}": (k // s, v // s) for s in (8, 4, 2) if min(k, v) >= s}
        budgets |= {f"dual*{s}": (k * s, v * s) for s in (2, 4) if max(k, v) * s <= most}
    size = lambda budget, bits=16: sta.bytes_per_token(budget, heads, dim, n_latents, bits)
    made = [Variant(name, sta.Budget(*b), sta.dual(saes, sta.Budget(*b), args.coef_bits),
                    size(b, args.coef_bits)) for name, b in budgets.items()]
    own, none = dict(zip(sta.KINDS, (k, v))), sta.Budget(None, None)
    if allocated:  # {layer: Budget}
        mean = lambda numbers: sum(numbers) / len(allocated)
        made.append(Variant("allocated", sta.Budget(*map(mean, zip(*allocated.values()))),
                            sta.dual(saes, allocated, args.coef_bits),
                            mean([size(b, args.coef_bits) for b in allocated.values()])))
    if args.cache:
        base = made[-1] if allocated else made[list(budgets).index("dual")]
        made.append(base._replace(name="cache", cached=allocated or base.budget))
    if args.claims:
        made.append(Variant("lower", sta.Budget(k, v), {
            key: functools.partial(lower, sae=sae, k=own[key[1]]) for key, sae in saes.items()},
            size((k, v))))
    if "quant" in args.baselines:
        made += [Variant(f"quant{bits}", none, {
            key: functools.partial(quantise, kind=key[1], bits=bits) for key in saes},
            2 * heads * (dim * bits / 8 + 4 * math.ceil(dim / 32))) for bits in (2, 3, 4)]
    if pca:  # as many bytes as dual: a coefficient is fp16
        rank = {kind: min(dim, size(sta.Budget(j, 0)) // (2 * heads)) for kind, j in own.items()}
        made.append(Variant("pca", none, {
            key: functools.partial(low_rank, fit=fit, rank=rank[key[1]])
            for key, fit in pca.items()}, 2 * heads * sum(rank.values())))
    if "omp" in args.baselines:
        made.append(Variant("omp", sta.Budget(k, v), {
            key: functools.partial(omp, sae=sae, k=own[key[1]]) for key, sae in saes.items()},
            size((k, v))))
    if l1:  # ({(layer, kind): TopKSAE}, {(layer, kind): mean number of active latents})
        made.append(Variant("l1", none, {
            key: lambda x, live, sae=sae: sae.relu_code(x) for key, sae in l1[0].items()},
            size((1, 0)) * sum(l1[1].values()) / len({layer for layer, _ in saes})))
    return made


# ------------------------------------------------------------------ rows of the table

def dense_pass(model, saes, windows, tried, sink):
    """(window losses of the untouched model, {variant's name: {(layer, kind): Fidelity}},
    {(layer, kind): BudgetCurve}), on its rows; Fidelity on the first batch only."""
    curves = {key: sta.BudgetCurve(sae) for key, sae in saes.items()}
    fits = {v.name: {key: sta.Fidelity() for key in v.codecs} for v in tried}
    with sta.capture(model, {layer for layer, _ in saes}) as rows:
        def measure(number):
            for key, x in rows.items():
                x = x[:, sink:].float()  # (B, T - sink, H, D)
                if number == 0 or not saes[key].pursuit:  # pursuit is slow
                    curves[key].update(x.flatten(0, 2))
                for v in tried if number == 0 else ():
                    if key in v.codecs:
                        x_hat = v.codecs[key](x, torch.ones_like(x[..., 0, 0], dtype=torch.bool))
                        fits[v.name][key].update(x.flatten(0, 2), x_hat.flatten(0, 2))
        losses = window_losses(model, windows, "dense", measure)
    if not losses.isfinite().all():
        raise sta.UsageError("the model's own loss is not finite; use --dtype float32 or bfloat16")
    return losses, fits, curves


def fidelity(fits, layers):
    """Columns fvu_*, cos_*, rel_norm_* of a row: each layer under by_layer, and their means."""
    exact = {"fvu": 0.0, "cos": 1.0, "rel_norm": 1.0}
    point = lambda key: fits[key].result() if key in fits else exact
    by_layer = {layer: {f"{name}_{kind[:3]}": point((layer, kind))[name]
                        for name in exact for kind in sta.KINDS} for layer in layers}
    return {column: sum(row[column] for row in by_layer.values()) / len(by_layer)
            for column in by_layer[layers[0]]} | {"by_layer": by_layer}


def memory(variant, n_coded, model, seq_len, sink):
    """Columns bytes_*: the cache of the whole model, layers without SAEs dense."""
    config = model.get_decoder().config
    dense = 4 * math.prod(sta.kv_shape(config))  # bf16, K and V
    total = n_coded * variant.layer_bytes + (config.num_hidden_layers - n_coded) * dense
    share = total / (config.num_hidden_layers * dense)
    return {"bytes_per_token": round(total), "bytes_share": share,
            "bytes_share_with_sink": share + (1 - share) * min(1, sink / seq_len)}


def cached_bytes(cache, model, saes, variant, windows):
    """Columns bytes_* measured on a cache that holds the last batch of windows, and more."""
    config = model.get_decoder().config
    slots = cache.layers[min(saes)[0]].kept["all positions"].numel()
    dense = 4 * math.prod(sta.kv_shape(config)) * config.num_hidden_layers
    n_coded = len({layer for layer, _ in saes})
    kept = dense * model.dtype.itemsize / 2 / config.num_hidden_layers  # a layer that stays dense
    coded = n_coded * variant.layer_bytes + (config.num_hidden_layers - n_coded) * kept
    stored = cache.nbytes() / slots
    dictionaries = sum(getattr(sae, name).nbytes for sae in saes.values() for name in (
        "W_dec", "b_dec", *(["metric"] if sae.pursuit else ["W_enc", "b_enc"])))
    once = (stored - coded) * windows.shape[1] + dictionaries  # does not grow with the context
    even = once / (dense - coded) if coded < dense else None
    print(f"cache: {cache.nbytes():,} bytes for {slots:,} tokens in windows of {windows.shape[1]}; "
          f"dictionaries {dictionaries:,}; "
          + (f"smaller than bf16 from {even:,.0f} tokens on" if even else
             f"never smaller than bf16, as {config.num_hidden_layers - n_coded} layers stay in "
             f"{str(model.dtype)[6:]}"))
    return {"bytes_per_token": round(stored), "bytes_share": stored / dense,
            "bytes_share_with_sink": stored / dense,
            "cache": {"bytes": cache.nbytes(), "tokens": slots, "dictionary_bytes": dictionaries,
                      "break_even_tokens": even}}


def compare(losses, dense, seed):
    """Columns of a row that come from window losses, paired with dense's over windows."""
    delta, generator = losses - dense, torch.Generator().manual_seed(seed)
    mean, stderr = mean_stderr(delta)
    drawn = torch.randint(len(delta), (4000, len(delta)), generator=generator)
    bounds = delta[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).exp()
    return {"perplexity": math.exp(losses.mean()), "ce": losses.mean().item(), "delta_ce": mean,
            "delta_ce_stderr": stderr, "ratio": math.exp(mean), "ratio_ci95": bounds.tolist()}


def print_row(row):
    k = ["-" if row[name] is None else f"{row[name]:.3g}" for name in ("k_key", "k_val")]
    error = "" if row["delta_ce_stderr"] is None else f" ±{row['delta_ce_stderr']:.4f}"
    print(f"{row['name']:9}{k[0]:>5} {k[1]:>5} {row['perplexity']:11.3f} {row['delta_ce']:+8.4f}"
          f"{error:8} {row['bytes_per_token']:9,} {100 * row['bytes_share']:6.2f}% "
          f"{row['fvu_key']:6.3f} {row['fvu_val']:6.3f} {row['cos_key']:6.3f} "
          f"{row['cos_val']:6.3f}", flush=True)


def print_tasks(rows):
    spell = lambda x, error, sign="": "      -      " if x is None else (
        f"{100 * x:{sign}6.2f} ±{100 * (error or 0):5.2f}")
    for task, base in rows[0]["tasks"].items():
        print(f"{task}, {base['n']} rows: per cent right ± standard error, and change from dense "
              "± its paired standard error")
        for row in rows:
            if task not in row["tasks"]:
                continue
            t = row["tasks"][task]
            print(f"  {row['name']:8} acc {spell(t['acc'], t['acc_stderr'])}   acc_norm "
                  f"{spell(t['acc_norm'], t['acc_norm_stderr'])}   change "
                  f"{spell(t['delta_acc'], t['delta_acc_stderr'], '+')}"
                  + (f"   ppl {t['ppl']:.2f}" if "ppl" in t else ""))


# ------------------------------------------------------------------ looking inside

@torch.no_grad()
def attention_change(model, tokenizer, codecs, windows, sink):
    """What replaced keys do to attention, one layer at a time -> ({layer: {qk_error,
    attention_kl}}, the map of the head that changes most: layer, head, tokens, dense, coded).

    qk_error: standard deviation over keys of the error of q.k, in units of q.k's own; attention_kl:
    nats from the dense weights of a query. Means over the queries of windows (B, T)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    ids, columns, worst = windows.to(model.device), {}, (-1,)
    look = lambda: model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    seen = torch.ones(*ids.shape[1:], ids.shape[1], device=ids.device).tril()  # (T, T)
    mean = lambda x: (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
    variance = lambda x: mean((x - mean(x)).square()).sum()
    dense = look()
    for layer, kind in sorted(key for key in codecs if key[1] == "key"):
        with sta.reconstruct(model, {(layer, kind): codecs[layer, kind]}, sink):
            maps = dense[layer].float(), look()[layer].float()  # (B, query heads, T, T) each
        # of a query, q.k but for a number
        logs = [x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in maps]
        kl = (maps[0] * (logs[0] - logs[1])).sum(-1).mean((0, 2))  # (query heads,)
        columns[layer] = {"attention_kl": kl.mean().item(), "qk_error": (
            variance(logs[1] - logs[0]) / variance(logs[0])).sqrt().item()}
        worst = max(worst, (kl.max().item(), layer, kl.argmax().item(),
                            [x[0, kl.argmax(), :40, :40].cpu() for x in maps]), key=lambda w: w[0])
    model.set_attn_implementation(before)
    return columns, {"layer": worst[1], "head": worst[2], "tokens": [
        tokenizer.decode(i) for i in windows[0, :40]], "dense": worst[3][0].tolist(),
        "coded": worst[3][1].tolist()}


class Strongest:
    """For each of M latents the ten tokens of a stream where it is strongest, and how often it
    fires."""

    def __init__(self, n_latents):
        self.z, self.token = torch.zeros(n_latents, 10), torch.zeros(n_latents, 10).long()
        self.fired = torch.zeros(n_latents).long()

    def update(self, z, first):
        """z (M, T): each latent at each of T tokens, of which the first has the number `first`."""
        self.fired += (z > 0).sum(1).cpu()
        top = z.topk(min(10, z.shape[1]))
        self.z, kept = torch.cat([self.z, top.values.cpu()], 1).topk(10)
        self.token = torch.cat([self.token, first + top.indices.cpu()], 1).gather(1, kept)


def describable(tokens):
    """Whether at least 8 of an atom's ten strongest [(previous token, token)] share the token, the
    token before, or a shape of it: digits, punctuation, a capital, the same last three letters."""
    bare = [(a.strip().lower(), b.strip()) for a, b in tokens]
    shapes = [[b.lower() for _, b in bare], [a for a, _ in bare], [b[-3:] for _, b in bare]]
    most = max(collections.Counter(shape).most_common(1)[0][1] for shape in shapes)
    kinds = [str.isdigit, lambda b: bool(b) and not any(map(str.isalnum, b)),
             lambda b: b[:1].isupper()]
    return max(most, *(sum(map(kind, (b for _, b in bare))) for kind in kinds)) >= 8


@torch.no_grad()
def look_inside(model, tokenizer, saes, windows, args):
    """--atoms -> (page: what plots.py makes atoms.html of, check: {layer.kind: the share of
    describable atoms, and of random directions}, codes {(layer, kind): idx (tokens, H, k)})."""
    ks = dict(zip(sta.KINDS, (args.k_key, args.k_val)))
    length, generator = windows.shape[1], torch.Generator().manual_seed(args.seed)
    n_random, found, codes, page = 100, {}, {}, {}
    lines = F.normalize(torch.randn(n_random, len(next(iter(saes.values())).b_dec),
                                    generator=generator), dim=-1)
    with sta.capture(model, {layer for layer, _ in saes}) as rows:
        for number, batch in enumerate(tqdm(windows.split(8), desc="atoms", disable=None)):
            model.get_decoder()(batch.to(model.device), use_cache=False)
            for key, x in rows.items():
                sae, x = saes[key], x.float().flatten(0, 1)  # (tokens, H, D)
                z, idx = sae.encode(x, ks[key[1]])
                first = torch.arange(len(x), device=x.device) % length == 0
                z[first] = 0  # a window's first token is kept exact
                dense = z.new_zeros(sae.n_latents * len(x))
                at = idx * len(x) + torch.arange(len(x), device=x.device)[:, None, None]
                dense.scatter_reduce_(0, at.flatten(), z.abs().flatten(), "amax")
                along = (x / sae.scale - sae.b_dec) @ lines.T.to(x.device)  # (tokens, H, random)
                along[first] = 0
                atoms, random = found.setdefault(key, (Strongest(sae.n_latents),
                                                       Strongest(n_random)))
                atoms.update(dense.view(sae.n_latents, -1), number * 8 * length)
                random.update(along.amax(1).T, number * 8 * length)
                codes.setdefault(key, []).append(idx.to(torch.int32).cpu())
                if number == 0:
                    page[f"{key[0]}.{key[1]}"] = {"sentence": [
                        [[[m, round(v, 3)] for m, v in zip(*head)] for head in zip(*token)]
                        for token in zip(idx[1:49].tolist(), z[1:49].tolist())]}
    words, check = [tokenizer.decode(i) for i in windows.flatten()], {}

    def share(of, some):
        return sum(describable([(words[i - 1], words[i]) for i in of.token[m].tolist()])
                   for m in some) / max(1, len(some))

    for key, (atoms, random) in found.items():
        live = (atoms.z[:, -1] > 0).nonzero().squeeze(1)
        some = live[torch.randperm(len(live), generator=generator)[:20]]
        name = f"{key[0]}.{key[1]}"
        check[name] = {"atoms_20": share(atoms, some.tolist()), "atoms_live": share(
            atoms, live.tolist()), "random": share(random, range(n_random)), "live": len(live)}
        page[name] |= {"fired": (atoms.fired / len(words)).tolist(), "contexts": [
            [[i, round(v, 3)] for i, v in zip(*pair) if v > 0]
            for pair in zip(atoms.token.tolist(), atoms.z.tolist())]}
    return ({"words": words, "sites": page}, check,
            {key: torch.cat(parts) for key, parts in codes.items()})


MODALS = {"will", "would", "must", "can", "should", "may", "could", "shall"}
NOUNS_AFTER = {"the", "a", "an", "this", "our", "its", "their", "his", "my"}


def equal_pairs(labels, generator, n=20_000):
    """n pairs (i, j) of places with equal labels (int tensor), drawn at random; (2, n)."""
    sort, order = labels.sort()
    i = torch.randint(len(labels), (n,), generator=generator)
    low, high = torch.searchsorted(sort, sort[i]), torch.searchsorted(sort, sort[i], right=True)
    j = low + (torch.rand(n, generator=generator) * (high - low)).long()
    return torch.stack([order[i], order[j]])


def hierarchy(codes, windows, words, seed):
    """P8, from the codes of a text's tokens: {kind: {name: [[mean, standard error] by layer]}}, the
    words with two senses, and the verdict.

    The share of atoms that two occurrences have in common, for pairs of: other, different tokens
    (the null); lexical, the same token after different ones; ngram, the same after the same;
    senses are told by rule: a word is a verb after will, to, ..., and a noun after the, our, ...
    (five of each or more, one after a modal verb, not one of the 50 most common);
    sense: pairs of one, two: pairs of both; the token before differs in either."""
    ids, generator = windows.flatten(), torch.Generator().manual_seed(seed)
    before, window = ids.roll(1), torch.arange(len(ids)) // windows.shape[1]
    bare = [word.strip().lower() for word in words]
    role = torch.tensor([0] + [1 if a in MODALS or a == "to" else 2 if a in NOUNS_AFTER else 0
                               for a in bare[:-1]])
    whole = [w.isalpha() and len(w) > 2 and raw[:1].isspace() and not after[:1].isalpha()
             for w, raw, after in zip(bare, words, [*words[1:], ""])]  # no part of a longer word
    counts = collections.Counter((w, r) for w, r, is_whole in zip(bare, role.tolist(), whole)
                                 if is_whole)
    common = {w for w, _ in collections.Counter(bare).most_common(50)}  # function words
    verbs = {w for a, w in zip(bare, bare[1:]) if a in MODALS}  # "to" alone goes before nouns, too
    senses = {w for w in verbs if min(counts[w, 1], counts[w, 2]) >= 5} - common
    known = torch.tensor([w in senses for w in bare]) & (role > 0) & torch.tensor(whole)
    places = known.nonzero().squeeze(1)
    any_pair = torch.randint(len(ids), (2, 20_000), generator=generator)
    same, both = equal_pairs(ids, generator), equal_pairs(ids * (ids.max() + 1) + before, generator)
    word = places[equal_pairs(ids[places], generator)] if len(places) else any_pair[:, :0]
    apart = lambda p: (window[p[0]] != window[p[1]]) & (before[p[0]] != before[p[1]])
    pairs = {"other": any_pair[:, (ids[any_pair[0]] != ids[any_pair[1]]) & apart(any_pair)],
             "lexical": same[:, apart(same)], "ngram": both[:, window[both[0]] != window[both[1]]],
             "sense": word[:, apart(word) & (role[word[0]] == role[word[1]])],
             "two": word[:, apart(word) & (role[word[0]] != role[word[1]])]}
    pairs = {name: p for name, p in pairs.items() if p.shape[1] > 1}
    layers, table, thirds = sorted({layer for layer, _ in codes}), {}, {}
    for kind in sta.KINDS:
        for name, (a, b) in pairs.items():
            common = torch.stack([(codes[layer, kind][a][..., None] == codes[layer, kind][b][
                ..., None, :]).any(-1).double().mean((1, 2)) for layer in layers])  # (L, pairs)
            table.setdefault(kind, {})[name] = [mean_stderr(x) for x in common]
            third = max(1, len(layers) // 3)
            for where, part in (("shallow", common[:third]), ("deep", common[-third:])):
                thirds[kind, name, where] = mean_stderr(part.mean(0))
    gap = lambda kind, a, b, where: (
        thirds[kind, a, where][0] - thirds[kind, b, where][0],
        math.hypot(*(thirds[kind, name, where][1] or 0 for name in (a, b))))
    verdicts = {}
    for kind in sta.KINDS:
        gaps = {name: [gap(kind, *of, where) for where in ("shallow", "deep")] for name, of in (
            ("lexical", ("lexical", "other")), ("ngram", ("ngram", "lexical")),
            ("sense", ("sense", "two"))) if pairs.keys() >= set(of)}
        clear = lambda more, less: more[0] - less[0] > 2 * math.hypot(more[1], less[1])
        verdicts[kind] = {"gaps": gaps} | {  # senses are claimed to part in deep layers
            name: clear(*(two[::-1] if name == "sense" else two)) for name, two in gaps.items()}
    return {"layers": layers, "overlap": table, "words": sorted(senses), "verdicts": verdicts,
            "pairs": {name: p.shape[1] for name, p in pairs.items()}}


def tell_inside(check, deep):
    """Print what `look_inside` and `hierarchy` found."""
    for name, row in check.items():
        print(f"atoms {name}: describable {100 * row['atoms_20']:.0f} % of 20 live ones at random, "
              f"{100 * row['atoms_live']:.0f} % of all {row['live']}; "
              f"{100 * row['random']:.0f} % of random directions")
    if deep:
        print(f"{len(deep['words'])} words with two senses by rule: {' '.join(deep['words'])}"
              + ("" if deep["words"] else "none; a longer text may have some (--max-tokens)"))
    for kind, verdict in (deep or {"verdicts": {}})["verdicts"].items():
        said = [f"{name} {a[0]:+.3f} ±{a[1]:.3f} shallow, {b[0]:+.3f} ±{b[1]:.3f} deep: "
                f"{'as claimed' if verdict[name] else 'not as claimed'}"
                for name, (a, b) in verdict["gaps"].items()]
        held = sum(verdict[name] for name in verdict["gaps"])
        print(f"P8 {spell_verdict(held == 3, held)} for {kind}s: " + "; ".join(said))


# ------------------------------------------------------------------ the paper's claims

def load_l1(folder, name, model, layers):
    """({(layer, kind): SAE}, {same keys: active latents on average}) of P1's rival from the
    subfolder l1; if there is none, train_sae.py makes it as it made those of `folder`."""
    while folder.name in ("kl", "pursuit"):
        folder = folder.parent
    settings = sta.load_sae(folder / f"layer{layers[0]}.key")[1]["settings"]
    if not (folder / "l1").exists():
        command = ["train_sae.py", "--sparsity", "l1", "--model", name, "--out", str(folder.parent),
                   "--layer", ",".join(map(str, layers))]
        for option in ("tokens", "seq_len", "buffer_tokens", "batch_rows", "n_latents", "k_key",
                       "k_val", "lr", "seed", "dtype", "text"):
            if settings[option] != "default":
                command += ["--" + option.replace("_", "-"), str(settings[option])]
        print("no L1 SAEs yet; running python", *command)
        subprocess.run([sys.executable, str(sta.HERE / command[0]), *command[1:]])
    saes, about = sta.load_saes(folder / "l1", model, layers)
    return saes, {key: metadata["held_out"]["l0"] for key, metadata in about.items()}


def spell_verdict(holds, partly):
    return "holds" if holds else "holds in part" if partly else "does not hold here"


def judge(rows, losses, curves):
    """Verdicts on P1 to P6 -> [{claim, statement, figure, stderr, text, verdict, rule, rows}].

    `clear` is two standard errors. Those over layers say how layers vary, not how runs would."""
    row, claims = {r["name"]: r for r in rows}, []
    at = lambda kind, k, metric: torch.tensor([
        next(p[metric] for p in layer[kind] if p["k"] == k) for layer in curves.values()])
    longer = mean_stderr([a["rel_norm_key"] - b["rel_norm_key"] for a, b in zip(
        row["dual"]["by_layer"].values(), row["l1"]["by_layer"].values())])
    worse = lambda a, b: mean_stderr(losses[a] - losses[b])  # (nats a token, standard error)
    clear = lambda pair: pair[0] > 2 * (pair[1] or 0)
    spell = lambda pair: f"{pair[0]:+.4f} ±{pair[1] or 0:.4f}"
    budget = lambda name: f"({row[name]['k_key']}, {row[name]['k_val']})"

    def say(statement, pair, text, holds, partly, rule, names):
        claims.append({"claim": f"P{len(claims) + 1}", "statement": statement, "figure": pair[0],
                       "stderr": pair[1], "text": text, "rule": rule,
                       "verdict": spell_verdict(holds, partly),
                       "rows": names})

    l1 = worse("l1", "dual")
    qk = [mean_stderr([c["qk_error"] for c in row[name]["attention"].values()])[0]
          for name in ("dual", "l1")]
    say("an L1 penalty shrinks magnitudes, a Top-K budget does not", longer,
        f"|x_hat|/|x| of keys {row['dual']['rel_norm_key']:.3f} by Top-K, "
        f"{row['l1']['rel_norm_key']:.3f} by L1 at as many atoms on average; error of q.k "
        f"{qk[0]:.3f} and {qk[1]:.3f} of its spread; L1 is {spell(l1)} nats worse",
        clear(longer) and clear(l1), clear(longer) or clear(l1),
        "Top-K's keys are clearly longer (over layers) and L1's loss clearly higher; in part: one "
        "of the two", ["dual", "l1"])
    cos = at("key", 8, "cos")
    say("8 atoms recover over 80 % of a key's direction", mean_stderr(cos),
        f"cosine {cos.mean():.3f}, lowest layer {cos.min():.3f}", (cos >= 0.8).all(),
        cos.mean() >= 0.8, "at least 0.8 in every layer; in part: in the mean over layers",
        ["curves"])
    key, value = at("key", 8, "fvu"), at("value", 8, "fvu")
    say("values need more atoms than keys", mean_stderr(value - key),
        f"FVU at 8 atoms: values {value.mean():.3f}, keys {key.mean():.3f}; values higher in "
        f"{(value > key).sum()} of {len(key)} layers", (value > key).all(),
        clear(mean_stderr(value - key)), "higher for values in every layer; in part: clearly in "
        "the mean", ["curves"])
    uniform, reverse = worse("uniform", "dual"), worse("reverse", "dual")
    say("fewer atoms for keys than for values is the better split", uniform,
        f"against {budget('dual')}, {budget('uniform')} is {spell(uniform)} nats worse and "
        f"{budget('reverse')} {spell(reverse)}", clear(uniform) and clear(reverse),
        clear(uniform) or clear(reverse), "both others are clearly worse; in part: one of them",
        ["dual", "uniform", "reverse"])
    scale = sorted((n for n in row if re.match(r"dual\b", n)), key=lambda n: row[n]["k_key"])
    best = min(scale, key=lambda name: row[name]["ce"])
    gain = worse("dense", best)
    helps = any(clear(worse(b, a)) for i, a in enumerate(scale) for b in scale[i + 1:])
    say("dropping lower-ranked atoms removes noise and improves perplexity", gain, "perplexity "
        + ", ".join(f"{row[n]['perplexity']:.2f} at {budget(n)}" for n in scale)
        + f"; dense {row['dense']['perplexity']:.2f}; the next {budget('dual')} atoms instead of "
        f"the strongest {row['lower']['perplexity']:.0f}", clear(gain), helps, "some budget is "
        "clearly better than dense; in part: than a larger budget of the same SAEs",
        scale + ["lower", "dense"])
    low, high = row["dual"]["ratio_ci95"]
    tasks = row["dual"]["tasks"]
    lost = any(clear((-x["delta_acc"], x["delta_acc_stderr"])) for x in tasks.values())
    change = [f"{name} {100 * x['delta_acc']:+.1f} ±{100 * (x['delta_acc_stderr'] or 0):.1f}"
              for name, x in tasks.items()] or ["not measured (--tasks)"]
    say("perplexity and zero-shot accuracy are comparable to dense",
        (row["dual"]["ratio"], (high - low) / 3.92), f"perplexity x {row['dual']['ratio']:.3f} "
        f"(95 %: {low:.3f} to {high:.3f}); accuracy, points: {', '.join(change)}",
        high <= 1.02 and bool(tasks) and not lost, high <= 1.1 and not lost, "at most 2 % more "
        "perplexity (upper bound), tasks measured, none clearly lower; in part: at most 10 %, none "
        "clearly lower", ["dense", "dual"])
    return claims


# ------------------------------------------------------------------ the run

def write_inside(model, tokenizer, saes, windows, name, device, args):
    """--atoms: look inside, print what is found, and write it."""
    page, check, codes = look_inside(model, tokenizer, saes, windows, args)
    layers = sorted({layer for layer, _ in saes})
    deep = hierarchy(codes, windows, page["words"], args.seed) if len(layers) > 2 else None
    if deep is None:
        print("P8 is not tested: that takes three layers or more")
    tell_inside(check, deep)
    about = {"model": name, "tokens": windows.numel(), "k_key": args.k_key, "k_val": args.k_val,
             **provenance(device)}
    for stem, content in (("atoms", page), ("hierarchy", {"check": check, "hierarchy": deep})):
        path = args.out / f"{sta.slug(name)}-{stem}.json"
        sta.write_atomic(path, json.dumps({**about, **content}) + "\n")
        print(f"wrote {path}")


def score(model, saes, tried, windows, tasks, limit_tokens, args):
    """Print the tables -> (rows, {name: window losses}, curves of the JSON)."""
    print("variant  k_key k_val  perplexity  delta CE         bytes/tok  share  fvu_K  fvu_V"
          "  cos_K  cos_V")
    dense, fits, measured = dense_pass(model, saes, windows, tried, args.sink)
    layers = sorted({layer for layer, _ in saes})
    rows, losses, dense_found = [], {"dense": dense}, {}
    for variant in tried:
        with (sta.reconstruct(model, variant.codecs, args.sink) if variant.cached is None else
              sta.compress(model, saes, variant.cached, args.sink, args.recent,
                           args.coef_bits)) as cache:
            through = {} if cache is None else {"cache": cache, "chunk": args.chunk}
            if variant.name != "dense":
                losses[variant.name] = window_losses(model, windows, variant.name, **through)
            measured_bytes = cached_bytes(cache, model, saes, variant, windows) if through else {}
            found = {task.name: loglikelihoods(model, task.requests, limit_tokens,
                                               f"{variant.name} {task.name}", **through)
                     for task in tasks if not variant.name.startswith(P5_ONLY)}
        dense_found = dense_found or found
        rows.append({"name": variant.name, **variant.budget._asdict()}
                    | compare(losses[variant.name], dense, args.seed)
                    | memory(variant, len(layers), model, args.seq_len, args.sink)
                    | measured_bytes | fidelity(fits[variant.name], layers)
                    | {"tokens": windows.numel(), "tasks": {
                        task.name: task_columns(task, found[task.name], dense_found[task.name],
                                                args.log_samples)
                        for task in tasks if task.name in found}})
        print_row(rows[-1])
    print_tasks(rows)
    curves = {layer: {kind: measured[layer, kind].result() for kind in sta.KINDS}
              for layer in layers}
    for kind in sta.KINDS:
        elbows = [sta.elbow(curves[layer][kind]) for layer in layers]
        counts = ", ".join(f"k = {k} in {elbows.count(k)}" for k in sorted(set(elbows)))
        print(f"elbow of the {kind} curves (k up to {curves[layers[0]][kind][-1]['k']}), layers: "
              f"{counts}")
        for layer, k in zip(layers, elbows):
            curves[layer][f"elbow_{kind[:3]}"] = k
    return rows, losses, curves


@torch.no_grad()
def write_on(model, tokenizer, saes, budget, args):
    """--generate: the prompt continued greedily, dense and through the cache, with its cost."""
    inputs = tokenizer(args.generate, return_tensors="pt").to(model.device)
    for name in ("dense", "codes"):
        at = []  # times: at the start, then at each new token
        clock = types.SimpleNamespace(put=lambda ids: at.append(time.time()), end=lambda: None)
        with (contextlib.nullcontext(transformers.DynamicCache(config=model.config))
              if name == "dense" else sta.compress(model, saes, budget, args.sink, args.recent,
                                                   args.coef_bits)) as cache:
            ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=args.new_tokens,
                                 do_sample=False, streamer=clock)[0, inputs.input_ids.shape[1]:]
        print(f"{name}: {inputs.input_ids.shape[1]:,} tokens in {at[1] - at[0]:.1f} s, then "
              f"{1000 * (at[-1] - at[1]) / max(1, len(ids) - 1):.1f} ms a token; cache "
              f"{sta.cache_bytes(cache):,} bytes\n  {args.generate[-200:]}"
              f"{tokenizer.decode(ids, skip_special_tokens=True)}")
    if inputs.input_ids.shape[1] + len(ids) <= args.recent:
        print(f"nothing was coded: no token is {args.recent} old; see --recent")


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
    model, tokenizer, layers = sta.load_model(name, device, dtype, args.layer or "all",
                                              spread=args.device == "auto")
    config = model.get_decoder().config
    saes, about = sta.load_saes(folder, model, layers if args.layer else None)
    layers, trained = sorted({layer for layer, _ in saes}), about[min(about)]["settings"]
    most = min(sae.n_latents for sae in saes.values())
    for k, flag in ((args.k_key, "--k-key"), (args.k_val, "--k-val")):
        if k > most:
            raise sta.UsageError(f"{flag} {k}: larger than the SAEs' n_latents = {most}")
    if args.compile is not False:
        sta.speed_up(saes, args.compile or device.type == "cuda")
    allocated = sta.load_budgets(folder, layers)
    if args.generate is not None:
        budget = allocated or sta.Budget(args.k_key, args.k_val)
        write_on(model, tokenizer, saes, budget, args)
        return
    args.seq_len = sta.window_length(model, args.seq_len, 2048)
    text = sta.read_text(args.text, "valid", name)
    windows = token_windows(text, tokenizer, args.seq_len, args.max_tokens)
    if args.atoms:
        write_inside(model, tokenizer, saes, windows, name, device, args)
        return
    limit_tokens = getattr(config, "max_position_embeddings", 2048)
    specs = args.tasks or (str(sta.HERE / "tiny" / "cloze.jsonl") if name == "tiny" else "")
    tasks = [load_task(spec, args, tokenizer, limit_tokens) for spec in specs.split(",") if spec]
    pca = l1 = None
    if "pca" in args.baselines:
        learned = None if trained["text"] in ("default", "self") else trained["text"]
        learned = sta.read_text(learned, "train", name, max_chars=1 << 20)
        pca = fit_pca(model, layers, token_windows(learned, tokenizer, args.seq_len, 32_768),
                      args.sink)
    if "l1" in args.baselines:
        l1 = load_l1(folder, name, model, layers)
    tried = variants(args, model, saes, allocated, pca, l1)
    if args.variants:
        chosen = {"dense", *args.variants.split(",")}
        for unknown in chosen - {v.name for v in tried}:
            raise sta.UsageError(f"--variants {unknown}: want some of "
                                 f"{', '.join(v.name for v in tried)} (others by --baselines)")
        tried = [v for v in tried if v.name in chosen]
    print(f"{name} with the SAEs of {folder}: {len(layers)} of {config.num_hidden_layers} layers "
          f"reconstructed, {windows.numel():,} tokens in windows of {args.seq_len}")

    rows, losses, curves = score(model, saes, tried, windows, tasks, limit_tokens, args)
    claims, attention_map = [], None
    if args.claims:
        some = windows[:max(1, 512 // args.seq_len), :512]
        for variant, row in zip(tried, rows):
            if variant.name in ("l1", "dual"):
                row["attention"], drawn = attention_change(model, tokenizer, variant.codecs, some,
                                                           args.sink)
                attention_map = drawn if variant.name == "dual" else attention_map
        claims = judge(rows, losses, curves)
    for c in claims:
        print(f"{c['claim']} {c['verdict']}: {c['statement']}: {c['text']}\n   rule: {c['rule']}")
    path = args.out / f"{sta.slug(name)}.json"
    settings = {n: str(v) if isinstance(v, pathlib.Path) else v for n, v in vars(args).items()}
    sta.write_atomic(path, json.dumps(
        {"model": name, "saes": str(folder), "layers": layers,
         "n_layers": config.num_hidden_layers, "tokens": windows.numel(),
         "windows": len(windows), "seq_len": args.seq_len, "sink": args.sink, "config": settings,
         "sae_settings": trained, **provenance(device), "rows": rows,
         "curves": curves, "claims": claims, "attention_map": attention_map,
         "training": [json.loads(path.read_text()) for path in sorted(folder.glob("run-*.json"))]},
        indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sta.run(main)
