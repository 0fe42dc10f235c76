"""Train a key SAE and a value SAE for each chosen layer, all in one pass over the text.

    python train_sae.py                              # tiny, all layers: minutes on 2 cores
    python train_sae.py --model yi-6b --layer 12     # needs the hub, and a GPU to be quick
    python train_sae.py --objective kl               # then: all of them together on predictions
    python train_sae.py --budget bytes=18.75%        # then: k by layer, for evaluate.py
    torchrun --nproc_per_node=2 train_sae.py         # the same weights, by two processes
    python train_sae.py --benchmark                  # how long a step takes, and how that grows

Writes saes/<model>/layer<i>.<key|value>/ in the layout of SAELens, and run-<layers>.json with the
training curves. An unfinished run lives in unfinished.safetensors; --resume takes it up again, to
the same bits on a CPU. Sources: Top-K SAEs and AuxK, Gao et al. 2024 (arXiv 2406.04093); the
order inside the loop, dictionary_learning. Non-goal: tuning the model itself.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import sta

CHECKPOINT_SECONDS, LOG_STEPS, KL_LOG_STEPS = 10, 50, 50
METRIC_TOKENS = 8192  # of training text, on which gradients of the loss are taken
# not in paper: budgets of the steps in turn, in multiples of k. topk then serves k/2 to 2k at no
# cost; kl costs its own k more, as codes there specialise to the budgets they see
SCALES = {"topk": (1, 0.5, 1, 2), "pursuit": (1,), "l1": (1,), "kl": (1, 1, 0.75, 1, 1, 1.5)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--model", default="tiny",
        help=f"{', '.join(sta.MODELS)}, a hub id or a folder (default tiny)")
    add("--layer", default="all", help="all, 12, 0-7 or 3,9 (default all)")
    add("--text", help="UTF-8 file, hub data set as owner/name[:config[:split]], or self: sampled "
                       "from the model (default: tiny's own, else WikiText-103)")
    add("--objective", choices=["reconstruction", "kl"], default="reconstruction",
        help="kl: take the SAEs on disk and train all of them together on the KL divergence of the "
             "model's predictions from its dense ones; written to a subfolder kl")
    # how much
    add("--tokens", type=int, help="tokens to train on; a shorter text is read again (default "
                                   "500,000 for tiny, else 10 million; kl: 200,000, 2 million)")
    add("--seq-len", type=int, help="tokens a window (default 512, or the model's limit)")
    add("--buffer-tokens", type=int, default=32_768,
        help="tokens whose rows are shuffled together (default 32,768)")
    add("--batch-rows", type=int, default=2048,
        help="rows a step; a token gives one for each kv head (default 2048)")
    add("--batch-tokens", type=int, default=2048, help="tokens a step of kl (default 2048)")
    add("--part-tokens", type=int, default=2048,
        help="kl: tokens in memory at once; gradients are summed over a batch (default 2048)")
    add("--checkpoint", action="store_true", help="kl: recompute activations in backward, to save "
                                                  "memory")
    # the SAEs
    add("--n-latents", type=int, help="atoms in each dictionary (default 512 for tiny, else 1024)")
    add("--k-key", type=int, default=8, help="atoms a key (default 8)")
    add("--k-val", type=int, default=16, help="atoms a value (default 16)")
    add("--sparsity", choices=["topk", "pursuit", "l1"], default="topk",
        help="pursuit: codes by orthogonal matching pursuit; l1: the rival of claim P1, penalised "
             "until k latents are active on average; both go to a subfolder of that name "
             "(default topk)")
    add("--metric", choices=["plain", "loss"], default="loss",
        help="what pursuit makes small: the error itself, or that which the model's loss feels "
             "(default loss)")
    add("--coef-bits", type=int, default=16, choices=range(3, 17), metavar="BITS",
        help="kl, --budget: bits a coefficient, rounded in training, too (default 16)")
    add("--budget", help="k by layer and kind, saved beside the SAEs for --objective kl and "
                         "evaluate.py: elbow, or bytes=B, where B a token (or B%% of bf16) lower "
                         "the loss most (default: none saved)")
    add("--lr", type=float,
        help="Adam's peak rate (default 0.004; pursuit: 0.01; kl: 0.001)")
    add("--seed", type=int, default=0)
    # where
    add("--device", help="cpu, cuda, or auto: the model over all GPUs, by accelerate (default: "
                         "cuda if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the model (default float32 on cpu, bfloat16 on cuda)")
    add("--out", type=pathlib.Path, help="(default saes; --benchmark: results)")
    add("--resume", action="store_true", help="take up the unfinished run in --out")
    add("--benchmark", action="store_true", help="only time steps, codes and the cache on random "
                                                 "weights; writes benchmark.json")
    args = parser.parse_args(argv)
    tokens, n_latents = (500_000, 512) if args.model == "tiny" else (10_000_000, 1024)
    if args.objective == "kl":
        tokens = 200_000 if args.model == "tiny" else 2_000_000
    if args.lr is None:
        args.lr = 1e-3 if args.objective == "kl" else 1e-2 if args.sparsity == "pursuit" else 4e-3
    args.out = args.out or pathlib.Path("results" if args.benchmark else "saes")
    args.metric = args.metric if args.sparsity == "pursuit" else "plain"
    args.tokens = tokens if args.tokens is None else args.tokens
    args.n_latents = n_latents if args.n_latents is None else args.n_latents
    if not re.fullmatch(r"elbow|bytes=\d+(\.\d*)?%?", args.budget or "elbow"):
        raise sta.UsageError(f"--budget {args.budget}: want elbow, bytes=1152 or bytes=18.75%")
    if args.budget and args.sparsity == "l1":
        raise sta.UsageError(f"--budget {args.budget}: codes of l1 have no k; use topk, pursuit")
    for name in ("tokens", "seq_len", "buffer_tokens", "batch_rows", "batch_tokens", "part_tokens",
                 "n_latents", "k_key", "k_val"):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            raise sta.UsageError(f"{flag} {value}: must be at least 1")
        if name.startswith("k_") and value > args.n_latents:
            raise sta.UsageError(f"{flag} {value}: larger than --n-latents {args.n_latents}")
    return args


# ------------------------------------------------------------------ text -> rows

def token_windows(text, tokenizer, seq_len, n_tokens):
    """Text -> token ids (n_windows, seq_len), about n_tokens; each window begins with the special
    tokens (BOS) that this tokenizer puts before a text. Raises UsageError if short of two."""
    prefix, ids = tokenizer("")["input_ids"], []
    for i in range(0, len(text), 1 << 20):  # in blocks: on one long string some are very slow
        block = text[i:i + (1 << 20)]
        ids += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= n_tokens:
            break
    body = seq_len - len(prefix)
    n = min(len(ids), max(n_tokens, 2 * body)) // max(1, body)
    if n < 2 or body < 2:
        raise sta.UsageError(f"text of {len(ids)} tokens: too short for two windows of {seq_len} "
                             "(training, held out); give more text or another --seq-len")
    windows = torch.tensor(ids[:n * body]).view(n, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(n, -1), windows], 1)


@torch.no_grad()
def sample_windows(model, tokenizer, seq_len, n_tokens, seed):
    """As `token_windows`, of text that the model writes, sampled after a BOS (else EOS)."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.cat([model.generate(
            torch.full((64, 1), start, device=model.device), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, min_new_tokens=seq_len - 1, max_new_tokens=seq_len - 1).cpu()
            for _ in tqdm(range(-(-n_tokens // (64 * seq_len))), desc="text", disable=None)])


def schedule(windows, n_tokens, buffer_tokens, seed):
    """(held-out windows, one index tensor into `windows` for each buffer of rows).

    The order is drawn once from the seed, so that any buffer mixes windows from all the text and
    a resumed run finds the same ones; a text shorter than n_tokens is read again, reshuffled."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(windows), generator=generator)
    n_held = min(-(-8192 // windows.shape[1]), -(-len(windows) // 10))  # 8,192 tokens or a tenth
    held, seen = drawn[:n_held], drawn[n_held:]
    n = max(1, n_tokens // windows.shape[1])
    epochs = [seen[torch.randperm(len(seen), generator=generator)]
              for _ in range(-(-n // len(seen)))]
    return windows[held], torch.cat(epochs)[:n].split(max(1, buffer_tokens // windows.shape[1]))


def own_rows(batch, window_rows, rank, n_ranks):
    """Of row numbers `batch` of a buffer, whose windows of window_rows rows the processes hold in
    turn: this one's (places in the batch, numbers among the rows that it holds)."""
    places = (batch // window_rows % n_ranks == rank).nonzero().squeeze(1)
    mine = batch[places]
    return places, mine // window_rows // n_ranks * window_rows + mine % window_rows


@torch.no_grad()
def harvest(model, layers, windows):
    """{(layer, kind): rows (N, D)} of every token but each window's first, the attention sink.

    Raises UsageError at a value that is not finite."""
    parts = {}
    with sta.capture(model, layers) as captured:
        for batch in windows.split(max(1, 4096 // windows.shape[1])):
            model.get_decoder()(batch.to(model.device), use_cache=False)
            for key, x in captured.items():
                parts.setdefault(key, []).append(x[:, 1:].flatten(0, 2))  # (B*(T-1)*H, D)
    rows = {key: torch.cat(x) for key, x in parts.items()}
    for (layer, kind), x in rows.items():
        if not x.isfinite().all():
            raise sta.UsageError(f"layer {layer}: a {kind} is not finite in {str(x.dtype)[6:]}; "
                                 "use --dtype float32 or bfloat16")
    return rows


# ------------------------------------------------------------------ state on disk

def save_state(path, saes, optimizer, progress):
    """All that resuming needs, in one safetensors file, so that it is replaced as one."""
    from safetensors.torch import save
    tensors = {f"sae/{layer}/{kind}/{name}": t for (layer, kind), sae in saes.items()
               for name, t in sae.state_dict().items()}
    tensors |= {f"adam/{i}/{name}": t for i, state in optimizer.state_dict()["state"].items()
                for name, t in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sta.write_atomic(path, save(tensors, metadata={"progress": json.dumps(progress)}))


def load_state(path, saes, optimizer, settings):
    """Inverse of `save_state`; returns progress, that of a new run if there is no file. Raises
    UsageError if corrupt or of other settings."""
    from safetensors import SafetensorError, safe_open
    if not path.exists():
        return {"buffer": 0, "step": 0, "settings": settings, "log": []}
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise sta.UsageError(f"{path}: corrupt; delete it and train again") from None
    for name, value in settings.items():
        if progress["settings"].get(name) != value:
            raise sta.UsageError(f"{path} was begun with {name} = {progress['settings'].get(name)}"
                                 f", not {value}; resume with that, or choose another --out")
    for (layer, kind), sae in saes.items():
        sae.load_state_dict({n: tensors[f"sae/{layer}/{kind}/{n}"] for n in sae.state_dict()})
    moments = {}
    for name in tensors:
        if name.startswith("adam/"):
            _, i, field = name.split("/")
            moments.setdefault(int(i), {})[field] = tensors[name]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return progress


def check_folder(folder, layers, settings, resume):
    """True if this very run is finished there. Raises UsageError rather than overwrite."""
    if (folder / "unfinished.safetensors").exists():
        if resume:
            return False
        raise sta.UsageError(f"{folder} holds an unfinished run: add --resume, choose another "
                             "--out, or delete unfinished.safetensors")
    paths = [folder / f"layer{layer}.{kind}" for layer in layers for kind in sta.KINDS]
    done = [path for path in paths if (path / "cfg.json").exists()]
    if done and all(sta.load_sae(path)[1]["settings"] == settings for path in done):
        return len(done) == len(paths)
    if done:
        raise sta.UsageError(f"{done[0]} is there, trained with other settings; choose another "
                             "--out, or delete it")
    return False


# ------------------------------------------------------------------ the loop

def budget_cycle(k, args):
    """The budgets that SAEs with own budget k meet in turn."""
    scales = SCALES["kl" if args.objective == "kl" else args.sparsity]
    return [min(max(1, round(scale * k)), args.n_latents) for scale in scales]


def learning_rate(peak, step, n_steps):
    """Linear warm-up over 5 % of the steps, linear decay over the last 30 %."""
    return peak * min(1, (step + 1) / (0.05 * n_steps + 1), (n_steps - step) / (0.3 * n_steps))


@torch.no_grad()
def update(saes, optimizer):
    """What follows backward: gradients summed over all processes, the part along each atom taken
    out, the optimiser's step, and only then unit atoms again."""
    if dist.is_initialized():
        gradients = [p.grad for sae in saes.values() for p in sae.parameters()
                     if p.grad is not None]
        for gradient, total in zip(gradients, sta.add_up(*gradients)):
            gradient.copy_(total)
    for sae in saes.values():
        sae.project_gradient()
    optimizer.step()
    optimizer.zero_grad()
    for sae in saes.values():
        sae.renormalise()


def train(model, windows, layers, settings, args, folder, rank, n_ranks):
    """-> ({(layer, kind): TopKSAE}, held-out rows by the same keys, log of the curves).

    Each of n_ranks processes holds a share of a buffer's windows; a batch is the same whatever
    their number, and each takes the rows of it that it holds."""
    n_heads, head_dim = sta.kv_shape(model.get_decoder().config)
    own = {"key": args.k_key, "value": args.k_val}
    cycle = {kind: budget_cycle(k, args) for kind, k in own.items()}
    generator = torch.Generator().manual_seed(args.seed)
    saes = {(layer, kind): sta.TopKSAE(head_dim, args.n_latents, generator)
            for layer in layers for kind in sta.KINDS}
    for key, device in sta.site_devices(model, layers).items():
        saes[key].to(device).pursuit = args.sparsity == "pursuit"
    optimizer = torch.optim.Adam([p for sae in saes.values() for p in sae.parameters()],
                                 lr=args.lr, fused=True)
    held_out, buffers = schedule(windows, args.tokens, args.buffer_tokens, args.seed)
    held_rows = harvest(model, layers, held_out) if rank == 0 else None
    window_rows = (windows.shape[1] - 1) * n_heads
    steps = [max(1, len(buffer) * window_rows // args.batch_rows) for buffer in buffers]  # in each
    dead_window = 20 * args.n_latents  # rows; at k = 8, 160 times the mean time between uses

    state = folder / "unfinished.safetensors"
    progress = load_state(state, saes, optimizer, settings)
    if args.resume:
        print(f"resuming at step {progress['step']}/{sum(steps)}")
    step, saved, logged = progress["step"], time.time(), (progress["step"], time.time())
    errors, counted = torch.zeros(2, device=model.device), 0  # since the last log line
    bar = tqdm(total=sum(steps), initial=step, unit="step", disable=True if rank else None)
    autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16,
                                 enabled=model.device.type == "cuda" and args.sparsity == "topk")
    for b in range(progress["buffer"], len(buffers)):
        share = buffers[b][rank::n_ranks]
        rows = harvest(model, layers, windows[share if len(share) else buffers[b][:1]])
        if b == 0:
            for key, sae in saes.items():
                sae.centre(rows[key].float())
            if args.metric == "loss":  # of pursuit alone
                some = windows[buffers[0]][:-(-METRIC_TOKENS // windows.shape[1])]
                for key, g in sta.loss_gradients(model, some, layers, args.seed).items():
                    saes[key].set_metric(g.flatten(0, 2))
                if not args.budget:  # what lies above is not needed any more
                    del model.get_decoder().layers[layers[-1] + 1:]
        shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + b)
        shuffled = torch.randperm(len(buffers[b]) * window_rows, generator=shuffle)
        for batch in shuffled.to(model.device).split(args.batch_rows)[:steps[b]]:
            places, mine = own_rows(batch, window_rows, rank, n_ranks)
            for (layer, kind), sae in saes.items():
                x = rows[layer, kind]
                x = x[mine.to(x.device)].float()  # (batch_rows, D), fewer in one of many processes
                k = cycle[kind][step % len(cycle[kind])]
                with autocast():
                    if args.sparsity == "topk":
                        loss, error = sae.loss(x, k, own[kind], dead_window, len(batch), places)
                    else:
                        train_step = sae.l1_loss if args.sparsity == "l1" else sae.pursuit_loss
                        loss, error = train_step(x, k, len(batch))
                loss.backward()
                if step % 2 == 0:  # then k is the SAE's own
                    errors[sta.KINDS.index(kind)] += error.to(errors.device) / len(layers)
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, sum(steps))
            update(saes, optimizer)
            counted, step = counted + (step % 2 == 0), step + 1
            bar.update()
            if counted and (step % LOG_STEPS == 0 or step == sum(steps)):
                n, seconds = step - logged[0], time.time() - logged[1]
                key, value = (sta.add_up(errors)[0] / counted).tolist()
                dead = [(s.idle > dead_window).float().mean().item() for s in saes.values()]
                entry = {"step": step, "fvu_key": key, "fvu_val": value,
                         "dead": sum(dead) / len(dead), "lr": optimizer.param_groups[0]["lr"]}
                progress["log"].append(entry)
                bar.write(f"step {step}/{sum(steps)} | fvu_K {key:.3f} | fvu_V {value:.3f} | "
                          f"dead {100 * entry['dead']:.1f}% | lr {entry['lr']:.1e} | "
                          f"{1000 * seconds / n:.0f} ms | "
                          f"{n * args.batch_rows * len(saes) / seconds / 1e6:.2f}M rows/s")
                errors.zero_()
                counted, logged = 0, (step, time.time())
        if not all(p.isfinite().all() for sae in saes.values() for p in sae.parameters()):
            raise sta.UsageError(f"step {step}: an SAE is no longer finite; start again with a "
                                 f"--lr below {args.lr:g}")
        if rank == 0 and (time.time() - saved > CHECKPOINT_SECONDS or b == len(buffers) - 1):
            save_state(state, saes, optimizer, {**progress, "buffer": b + 1, "step": step})
            saved = time.time()
    bar.close()
    return saes, held_rows, progress["log"]


def divergence(model, codecs, windows, part_tokens, ranks=(0, 1), train=False):
    """(KL(dense || coded) of next-token distributions, cross entropy of the coded model) in nats a
    token, means over windows taken part by part; after backward on the former if train. Of several
    processes each takes its share, and what it returns are its parts of the means."""
    sums, mine = torch.zeros(2), windows[ranks[0]::ranks[1]]
    weight = 1 / len(windows) if len(mine) else 0.0  # without a share, one window for nothing
    mine = mine if len(mine) else windows[:1]
    for part in mine.split(max(1, part_tokens // windows.shape[1])):
        part, share = part.to(model.device), len(part) * weight
        with torch.no_grad():
            dense = model(part, use_cache=False).logits.float().log_softmax(-1)  # (B, T, V)
        with sta.reconstruct(model, codecs), torch.set_grad_enabled(train):
            coded = model(part, use_cache=False).logits.float().log_softmax(-1)
            kl = share * F.kl_div(coded, dense, log_target=True, reduction="none").sum(-1).mean()
            if train:
                kl.backward()  # in here: recomputed activations need the hooks, too
        ce = share * F.nll_loss(coded[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        sums += torch.stack([kl, ce]).detach().cpu()
    return sums.tolist()


def choose_budgets(model, saes, windows, args):
    """{layer: Budget} by --budget, measured on windows of training text; printed."""
    layers = sorted({layer for layer, _ in saes})
    heads, dim = sta.kv_shape(model.get_decoder().config)
    size = lambda k: heads * sta.vector_bytes(k, dim, args.n_latents, args.coef_bits)
    dense, ks, rows = 2 * len(layers) * size(None), {}, harvest(model, layers, windows)
    if args.budget == "elbow":
        for key, sae in saes.items():
            curve = sta.BudgetCurve(sae)
            curve.update(rows[key].float())
            ks[key] = sta.elbow(curve.result())
    else:
        limit = float(args.budget[6:].rstrip("%")) * (dense / 100 if "%" in args.budget else 1)
        gradients = sta.loss_gradients(model, windows, layers, args.seed)
        costs = {key: sta.code_costs(sae, rows[key].float(), gradients[key][:, 1:].flatten(0, 2),
                                     args.coef_bits) for key, sae in saes.items()}
        ks = sta.allocate(costs, size, limit)
    total = sum(map(size, ks.values()))
    print(f"--budget {args.budget}: {total:,} bytes a token, {100 * total / dense:.2f}% of bf16")
    for kind in sta.KINDS:
        print(f"  atoms a {kind}, by layer: {' '.join(str(ks[layer, kind]) for layer in layers)}")
    return {layer: sta.Budget(ks[layer, "key"], ks[layer, "value"]) for layer in layers}


def train_kl(model, windows, saes, budgets, settings, args, folder, rank, n_ranks):
    """All SAEs together, the model frozen, at budgets {layer: Budget} -> (held-out rows by
    (layer, kind), log)."""
    for sae in saes.values():
        sae.requires_grad_(True)
        if not sae.pursuit:
            sae.encode = functools.partial(sta.sparse_encode, sae)
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # or transformers ignores it; the supported types have no dropout by default
    optimizer = torch.optim.Adam([p for sae in saes.values() for p in sae.parameters()], lr=args.lr,
                                 fused=True)
    held_out, batches = schedule(windows, args.tokens, args.batch_tokens, args.seed)
    codecs = [sta.dual(saes, {layer: sta.Budget(*(budget_cycle(k, args)[i] for k in budget))
                              for layer, budget in budgets.items()}, args.coef_bits)
              for i in range(len(SCALES["kl"]))]  # the first: own k
    state = folder / "unfinished.safetensors"
    progress = load_state(state, saes, optimizer, settings)
    if args.resume:
        print(f"resuming at step {progress['step']}/{len(batches)}")
    saved = began = time.time()
    bar = tqdm(total=len(batches), initial=progress["step"], unit="step",
               disable=True if rank else None)
    for step in range(progress["step"], len(batches) + 1):
        if step % KL_LOG_STEPS == 0 or step == len(batches):
            kl, ce = divergence(model, codecs[0], held_out, args.part_tokens)
            progress["log"].append({"step": step, "held_out_kl": kl, "held_out_ce": ce})
            bar.write(f"step {step}/{len(batches)} | held-out KL {kl:.4f} | perplexity "
                      f"{math.exp(ce):.3f} | {time.time() - began:.0f} s")
        if step == len(batches):
            break
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, len(batches))
        divergence(model, codecs[step % len(codecs)], windows[batches[step]], args.part_tokens,
                   (rank, n_ranks), train=True)
        update(saes, optimizer)
        bar.update()
        if rank == 0 and time.time() - saved > CHECKPOINT_SECONDS:
            save_state(state, saes, optimizer, {**progress, "step": step + 1})
            saved = time.time()
    bar.close()
    for sae in saes.values():
        sae.requires_grad_(False)
        vars(sae).pop("encode", None)
    return harvest(model.eval(), sorted({layer for layer, _ in saes}), held_out), progress["log"]


def save_trained(folder, model, saes, held_rows, budgets, settings, args):
    """Print the held-out fidelity of each SAE at its budget, and save it with that."""
    mark = sta.fingerprint(model)
    n_rows = len(next(iter(held_rows.values())))
    print(f"held out ({n_rows:,} rows each; dead: fired by none of them)")
    print("            cos_K  fvu_K dead_K  L0_K |  cos_V  fvu_V dead_V  L0_V")
    for layer, budget in budgets.items():
        line = []
        for kind, k in zip(sta.KINDS, budget):
            sae = saes[layer, kind]
            curve = sta.BudgetCurve(sae, [sae.n_latents if args.sparsity == "l1" else k])
            curve.update(held_rows[layer, kind].float())
            point = curve.result()[0]
            line.append(f"  {point['cos']:.3f}  {point['fvu']:.3f} {100 * point['dead']:5.1f}% "
                        f"{point['l0']:5.1f}")
            sta.save_sae(folder / f"layer{layer}.{kind}", sae, {
                "model": args.model, "fingerprint": mark, "layer": layer, "kind": kind, "k": k,
                "k_trained": sorted(set(budget_cycle(k, args))), "held_out": point,
                "sparsity": args.sparsity, "settings": settings})
        print(f"layer {layer:3} {' |'.join(line)}")
    print(f"wrote {len(saes)} SAEs to {folder}; next: python evaluate.py"
          + (f" --model {args.model} --text ANOTHER" if args.text else ""))


# ------------------------------------------------------------------ --benchmark

SHAPES = {"tiny": (128, 512, 16, 2048), "SmolLM2": (64, 1024, 16, 2048),
          "Yi-6B": (128, 1024, 16, 4096), "large": (512, 4096, 32, 2048)}  # D, M, k, rows


def timed(actions, device, n=20):
    """{name: median ms} of callables, run in turn; the first three rounds are left out."""
    ms = {name: [] for name in actions}
    for i in range(n + 3):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                ms[name].append(1000 * (time.perf_counter() - began))
    return {name: sorted(times)[n // 2] for name, times in ms.items()}


def peak_bytes(action, device):
    """Memory that an action takes at most, beyond what is held before it; None if not known."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    read = lambda name: 1024 * int(re.search(name + r":\s+(\d+)", pathlib.Path(
        "/proc/self/status").read_text())[1])
    try:  # Linux: give back what is free, and forget the peak so far
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        action()
        return read("VmHWM") - before
    except OSError:
        return None


def time_steps(shape, device, compiled=True):
    """One row of the benchmark: training steps and codes at (D, M, k, rows) on random rows."""
    D, M, k, rows = shape
    generator = torch.Generator().manual_seed(0)
    sae = sta.TopKSAE(D, M, generator).to(device)
    x = torch.randn(rows, D, generator=generator).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def definition(sae, x):
        return (x - sta.TopKSAE.decode(sae, *sta.TopKSAE.encode(sae, x, k))).square().sum(-1).mean()

    def step(loss):
        loss.backward()
        update({0: sae}, optimizer)

    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        steps = {"eager": lambda: step(definition(sae, x)),
                 "sparse": lambda: step(sae.loss(x, k, k, 10**9)[0])}
        codes = {"eager": lambda: sae(x, k),
                 "fast": lambda: sae.decode(*sta.fast_encode(sae, x, k))}
        if compiled:
            whole = torch.compile(definition, fullgraph=True)
            code = torch.compile(sta.TopKSAE.forward, fullgraph=True)
            steps["compiled"] = lambda: step(whole(sae, x))
            codes["compiled"] = lambda: code(sae, x, k)
        matmul = lambda: torch.addmm(sae.b_enc, x, sae.W_enc)
        with torch.no_grad():
            plain = timed({"matmul": matmul, **codes}, device)
        ms = timed(steps, device)
        peaks = {name: peak_bytes(action, device) for name, action in steps.items()}
    return {"D": D, "M": M, "k": k, "rows": rows, "matmul_ms": plain.pop("matmul"), "step_ms": ms,
            "code_ms": plain, "peak_bytes": peaks, "rows_per_s": 1000 * rows / ms["sparse"]}


@torch.no_grad()
def time_cache(n_layers, context, device):
    """ms for one new token after `context` others, and bytes, dense and as codes (8, 16): layers of
    SmolLM2's shape, random weights."""
    import transformers
    config = transformers.LlamaConfig(
        num_hidden_layers=n_layers, hidden_size=576, intermediate_size=1536, vocab_size=512,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2 * context)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device).eval()
    saes = {(i, kind): sta.TopKSAE(64, 1024).to(device) for i in range(n_layers)
            for kind in sta.KINDS}
    sta.speed_up(saes, compiled=False)
    ids = torch.randint(512, (1, context), device=device)
    row = {"layers": n_layers, "context": context}
    for name in ("dense", "codes"):
        with (sta.compress(model, saes, sta.Budget(8, 16)) if name == "codes" else
              contextlib.nullcontext(transformers.DynamicCache(config=config))) as cache:
            for part in ids.split(512, 1):
                model(part, past_key_values=cache, logits_to_keep=1)
            row[f"{name}_bytes"] = sta.cache_bytes(cache)
            row[f"{name}_ms"] = timed({"": lambda: model(ids[:, :1], past_key_values=cache)},
                                      device, 10)[""]
    return row


def benchmark(device, args):
    """--benchmark: print and write what a step takes, by shape and by path, and how it grows."""
    about = {"device": f"{device} ({torch.get_num_threads()} threads)", "torch": torch.__version__,
             "command": " ".join(["python train_sae.py", *sys.argv[1:]]),
             "date": time.strftime("%Y-%m-%d")}
    print("ms, medians            D    M  k  rows  matmul | step: eager sparse compiled | codes: "
          "eager   fast compiled |  rows/s  peak MB eager sparse")
    table = {}
    for name, shape in SHAPES.items():
        row = table[name] = time_steps(shape, device)
        peaks = [f"{(row['peak_bytes'][n] or 0) / 1e6:5.0f}" for n in ("eager", "sparse")]
        print(f"{name:18}{shape[0]:6}{shape[1]:5}{shape[2]:3}{shape[3]:6}{row['matmul_ms']:8.1f} |"
              + "".join(f"{row['step_ms'][n]:9.1f}" for n in ("eager", "sparse", "compiled")) + " |"
              + "".join(f"{row['code_ms'][n]:9.1f}" for n in ("eager", "fast", "compiled"))
              + f" | {row['rows_per_s']:9,.0f}  {' '.join(peaks)}")
    growth = {"M": [time_steps((128, m, 16, 2048), device, False) for m in (512, 1024, 2048, 4096,
                                                                            8192)],
              "k": [time_steps((128, 1024, k, 2048), device, False) for k in (4, 8, 16, 32, 64)],
              "context": [time_cache(4, n, device) for n in (512, 1024, 2048, 4096, 8192)],
              "layers": [time_cache(n, 2048, device) for n in (1, 2, 4, 8)]}
    for row in growth["context"] + growth["layers"]:
        print("a token after {context:5} in {layers} layers: dense {dense_ms:6.1f} ms, "
              "{dense_bytes:11,} bytes; codes {codes_ms:6.1f} ms, {codes_bytes:11,} bytes".format(
                  **row))
    path = args.out / "benchmark.json"
    content = {**about, "shapes": table, "growth": growth}
    sta.write_atomic(path, json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def join_ranks():
    """(number of this process, number of all): those that torchrun started, joined; else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    dist.init_process_group()  # nccl between GPUs, else gloo

    def stop(*_):  # torchrun ends the others where one has died
        raise sta.UsageError("another process of this run is gone; run it again with --resume")

    signal.signal(signal.SIGTERM, stop)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # one of them reports
    return dist.get_rank(), dist.get_world_size()


def main():
    args = parse_args()
    rank, n_ranks = join_ranks()
    device, dtype = sta.pick_device(args.device, args.dtype)
    if args.benchmark:
        return benchmark(device, args)
    if n_ranks > 1 and (args.device == "auto" or args.text == "self"):
        raise sta.UsageError(f"{n_ranks} processes with --device auto or --text self: use one")
    kl, by_model = args.objective == "kl", args.text == "self"
    predicts = kl or by_model or args.budget or args.metric == "loss"  # else the last layers rest
    model, tokenizer, layers = sta.load_model(args.model, device, dtype, args.layer,
                                              last_only=not predicts,
                                              spread=args.device == "auto")
    args.seq_len = sta.window_length(model, args.seq_len, 512)
    if by_model:
        windows = sample_windows(model, tokenizer, args.seq_len, args.tokens, args.seed)
    else:
        text = sta.read_text(args.text, "train", args.model, max_chars=8 * args.tokens)
        windows = token_windows(text, tokenizer, args.seq_len, args.tokens)
    base = args.out / sta.slug(args.model) / ("" if args.sparsity == "topk" else args.sparsity)
    folder = base / "kl" if kl else base
    if kl and not any(base.glob("layer*.key")):
        raise sta.UsageError(f"{base}: no SAEs to start from; first run the same command without "
                             "--objective kl")
    saved = sta.load_budgets(base, layers) if kl else None
    budgets = saved or {layer: sta.Budget(args.k_key, args.k_val) for layer in layers}
    settings = {name: getattr(args, name) for name in (
        "tokens", "seq_len", "buffer_tokens", "batch_rows", "n_latents", "k_key", "k_val", "lr",
        "sparsity", "metric", "objective", "batch_tokens", "coef_bits", "seed")}
    settings |= {"layers": layers, "dtype": str(dtype)[6:], "text": args.text or "default",
                 "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12],
                 "budgets": [list(budget) for budget in budgets.values()]}
    trained = check_folder(folder, layers, settings, args.resume)
    if not trained:
        run = folder / f"run-{args.layer}.json"
        about = {"model": args.model, "settings": settings}
        if rank == 0:
            sta.write_atomic(run, json.dumps({**about, "log": []}))
        print(f"{args.model}: K and V of {len(layers)} layers, {windows.numel():,} tokens of text, "
              f"training on {args.tokens:,} in windows of {args.seq_len}"
              + (f", {n_ranks} processes" if n_ranks > 1 else ""))
        if kl:
            saes, _ = sta.load_saes(base, model, layers)
            held_rows, log = train_kl(model, windows, saes, budgets, settings, args, folder, rank,
                                      n_ranks)
        else:
            saes, held_rows, log = train(model, windows, layers, settings, args, folder, rank,
                                         n_ranks)
    if rank:
        return
    if not trained:
        save_trained(folder, model, saes, held_rows, budgets, settings, args)
        sta.write_atomic(run, json.dumps({**about, "log": log}))
        (folder / "unfinished.safetensors").unlink(missing_ok=True)
    elif not args.budget:
        print(f"{folder}: trained already with these settings; nothing to do")
    if args.budget:
        saes, _ = sta.load_saes(folder, model, layers)
        held_out, _ = schedule(windows, args.tokens, args.buffer_tokens, args.seed)
        budgets = choose_budgets(model, saes, held_out, args)
    if args.budget or saved:
        sta.write_atomic(folder / "budget.json", json.dumps(
            {"rule": args.budget, "coef_bits": args.coef_bits, "k": budgets}) + "\n")


if __name__ == "__main__":
    sta.run(main)
