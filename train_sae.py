"""Train a key SAE and a value SAE for each chosen layer, all in one pass over the text.

    python train_sae.py                              # tiny, all layers: minutes on 2 cores
    python train_sae.py --model yi-6b --layer 12     # needs the hub, and a GPU to be quick
    torchrun --nproc_per_node=2 train_sae.py         # each process takes half of every batch

Writes saes/<model>/layer<i>.<key|value>/ in the layout of SAELens, and run-<layers>.json with the
training curves. An unfinished run lives in unfinished.safetensors; --resume takes it up again, to
the same bits on a CPU. Sources: Gao et al. 2024 (arXiv 2406.04093); the order inside the loop,
dictionary_learning. Non-goal: tuning the model itself.
"""
import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import time
from typing import Callable, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import sta

CHECKPOINT_SECONDS, LOG_STEPS = 10, 50
BUFFER_TOKENS = 32_768  # whose rows are shuffled together, as neighbours in a text are alike
# not in paper: the steps' budgets in turn, in multiples of k, so that one SAE serves k/2 to 2k
BUDGET_CYCLE = (1, 0.5, 1, 2)

def parse_args(argv=None, description=__doc__):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--model", default="tiny", help=f"{', '.join(sta.MODELS)}, a hub id or a folder")
    add("--layer", default="all", help="all, 12, 0-7 or 3,9 (default all)")
    add("--text", help="UTF-8 file, or hub data set (default: tiny's own, else WikiText-103)")
    # how much
    add("--tokens", type=int, help="to train on; a shorter text is read again (default 200,000 "
                                   "for tiny, else 10 million)")
    add("--seq-len", type=int, help="tokens per window (default 512, or the model's limit)")
    add("--batch-rows", type=int, default=1024,
        help="rows per step; a token gives one for each kv head (default 1024)")
    # the SAEs
    add("--n-latents", type=int, help="atoms in each dictionary (default 512 for tiny, else 1024)")
    add("--k-key", type=int, default=8, help="atoms per key (default 8)")
    add("--k-val", type=int, default=16, help="atoms per value (default 16)")
    add("--lr", type=float, default=0.005, help="Adam's peak rate (default 0.005)")
    add("--seed", type=int, default=0)
    # where
    add("--device", help="cpu, cuda, or auto: over all GPUs, by accelerate (default: cuda if any)")
    add("--dtype", help="of the model (default float32 on cpu, bfloat16 on cuda)",
        choices=["float32", "bfloat16", "float16"])
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    add("--resume", action="store_true", help="take up the unfinished run in --out")
    args = parser.parse_args(argv)
    tokens, n_latents = (200_000, 512) if args.model == "tiny" else (10_000_000, 1024)
    args.tokens = tokens if args.tokens is None else args.tokens
    args.n_latents = n_latents if args.n_latents is None else args.n_latents
    if not (0 < args.lr < math.inf and 0 <= args.seed < 1 << 40):
        raise sta.UsageError(f"--lr {args.lr}, --seed {args.seed}: want a rate above 0, and a seed "
                             "of 0 or more")
    for name, most in (("tokens", 1 << 40), ("batch_rows", 1 << 30), ("n_latents", 1 << 15),
                       ("k_key", args.n_latents), ("k_val", args.n_latents)):
        if not 1 <= getattr(args, name) <= most:
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: want 1 to "
                                 f"{most:,}" + " = --n-latents" * (name[0] == "k"))
    return args

def plan_buffers(n_windows, seq_len, n_tokens, n_ranks, seed):
    """Window numbers -> (those held out, [those of each buffer of rows]), in the order of training.
    Drawn once from the seed, so that a buffer mixes windows from all the text and a resumed run
    finds the same ones; a text shorter than n_tokens is read again, in another order. The number
    of windows in a buffer is a multiple of n_ranks, so that processes make equally many steps."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n_windows, generator=generator)
    n_held = min(1 + 8192 // seq_len, 1 + n_windows // 10)  # 8,192 tokens, or a tenth
    held_out, seen = drawn[:n_held], drawn[n_held:]
    n, order = max(n_ranks, n_tokens // seq_len // n_ranks * n_ranks), seen
    while len(order) < n:
        order = torch.cat([order, seen[torch.randperm(len(seen), generator=generator)]])
    in_buffer = max(n_ranks, BUFFER_TOKENS // seq_len // n_ranks * n_ranks)
    return held_out, order[:n].split(in_buffer)

# ------------------------------------------------------------------ the loop
def learning_rate(peak, step, n_steps):
    """Linear warm-up over 5 % of the steps, linear decay over the last 30 %."""
    return peak * min(1, (step + 1) / (0.05 * n_steps + 1), (n_steps - step) / (0.3 * n_steps))

def train_step(saes, optimizer, batches, factor=1, n_ranks=1):
    """One step of every SAE on its rows, {name: (N, D)}, at `factor` times its budget k; with
    several processes each has 1 / n_ranks of the rows."""
    for name, sae in saes.items():
        k = min(max(1, round(factor * sae.k)), sae.n_latents)
        (sae.loss(batches[name], k) / n_ranks).backward()
    if n_ranks > 1:
        add_up([p.grad for sae in saes.values() for p in sae.parameters()]
               + [sae.fired for sae in saes.values()])
    for sae in saes.values():
        sae.project_gradient()  # before the step: no part of it changes the atoms' lengths
    optimizer.step()
    optimizer.zero_grad()
    for name, sae in saes.items():
        sae.renormalise()  # after the step, which leaves the unit sphere all the same
        sae.revive_dead(n_ranks * len(batches[name]))

class PerHead(NamedTuple):
    """What the SAEs of a layer are of: here one of keys and one of values, shared by the heads.
    beyond/variants.py has others."""
    make_sae: Callable = sta.TopKSAE  # (dim, n_latents, k, generator) -> a TopKSAE
    next_step: str = "python evaluate.py --saes {folder}"  # for the user

    def budgets(self, args, shape):
        """{name: (dim, k)} of a layer's SAEs; shape: (n_kv_heads, head_dim)."""
        return {"key": (shape[1], args.k_key), "value": (shape[1], args.k_val)}

    def rows(self, layer, keys, values):
        """Keys and values (tokens, H, D) of a layer -> {name: rows (N, D)} of its SAEs."""
        return {"key": keys.flatten(0, 1), "value": values.flatten(0, 1)}

    def finish(self, layer, sae):
        """The SAE as it is saved: of keys and values as the model has them."""
        return sae

def read_rows(model, windows, layers, variant):
    """Windows (n, T) -> {(layer, name): rows (N, D)} for the SAEs."""
    vectors, rows = sta.harvest(model, windows, layers), {}
    for layer in layers:
        named = variant.rows(layer, *(vectors.pop((layer, kind)) for kind in sta.KINDS))
        rows |= {(layer, name): x for name, x in named.items()}
    return rows

def train(model, windows, layers, args, folder, settings, variant=PerHead()):
    """-> ({(layer, name): SAE}, their held-out rows (N, D), log of the training curves)."""
    rank, n_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator, shape = torch.Generator().manual_seed(args.seed), sta.kv_shape(
        model.get_decoder().config)
    # one SAE for each layer and name, on the device of its layer; one optimizer for all
    sites, saes = sta.kv_sites(model), {}
    for layer in layers:
        for name, (dim, k) in variant.budgets(args, shape).items():
            sae = variant.make_sae(dim, args.n_latents, k, generator)
            saes[layer, name] = sae.to(sites[layer, "key"][0][0].weight.device)
    parameters = list(nn.ModuleList(saes.values()).parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.99), fused=True)
    # where an interrupted run stopped, and the order in which the text is read
    state = folder / "unfinished.safetensors"
    progress = load_state(state, saes, optimizer, settings)
    step, saved, seq_len = progress["step"], time.time(), windows.shape[1]
    held_out, buffers = plan_buffers(len(windows), seq_len, args.tokens, n_ranks, args.seed)
    held_rows = read_rows(model, windows[held_out], layers, variant)
    own_batch = max(1, args.batch_rows // n_ranks)  # vectors per step of each process
    n_vectors = [len(buffer) // n_ranks * (seq_len - 1) * shape[0] for buffer in buffers]
    steps = [max(1, n // own_batch) for n in n_vectors]
    bar = tqdm(total=sum(steps), initial=step, unit="step", disable=True if rank else None)
    if step:
        bar.write(f"resuming at step {step}/{sum(steps)}")
    for b in range(progress["buffers"], len(buffers)):
        # fill a buffer: the keys and values of some windows, shuffled
        rows = read_rows(model, windows[buffers[b][rank::n_ranks]], layers, variant)
        if b == 0:
            for key, sae in saes.items():
                sae.centre(rows[key].float())
                if n_ranks > 1:
                    dist.broadcast(sae.b_dec.data, 0)
                    dist.broadcast(sae.scale, 0)
        n_rows = len(next(iter(rows.values())))
        seed = 1_000_003 * args.seed + 1009 * rank + b
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
        # a step for each batch of it
        for batch in order.split(max(1, own_batch * n_rows // n_vectors[b]))[:steps[b]]:
            began = time.time()
            batches = {key: x[batch.to(x.device)].float() for key, x in rows.items()}
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, sum(steps))
            train_step(saes, optimizer, batches, BUDGET_CYCLE[step % len(BUDGET_CYCLE)], n_ranks)
            step += 1
            bar.update()
            if rank == 0 and (step % LOG_STEPS == 0 or step == sum(steps)):
                progress["log"].append({"step": step, **held_out_error(saes, held_rows)})
                bar.write(log_line(progress["log"][-1], sum(steps), time.time() - began, optimizer,
                                   len(saes) * len(batch) * n_ranks))
        # keep what was learned
        if not all(p.isfinite().all() for p in parameters):
            raise sta.UsageError(f"step {step}: an SAE is no longer finite; start again with a "
                                 f"--lr below {args.lr:g}")
        if rank == 0 and (time.time() - saved > CHECKPOINT_SECONDS or b == len(buffers) - 1):
            save_state(state, saes, optimizer, {**progress, "buffers": b + 1, "step": step})
            saved = time.time()
    bar.close()
    return saes, held_rows, progress["log"]

def log_line(entry, n_steps, seconds, optimizer, n_rows):
    fvus = " | ".join(f"fvu {name} {fvu:.3f}" for name, fvu in entry["fvu"].items())
    return (f"step {entry['step']}/{n_steps} | {fvus} | dead {entry['dead']:.1%} | lr "
            f"{optimizer.param_groups[0]['lr']:.1e} | {1000 * seconds:.0f} ms | "
            f"{n_rows / seconds / 1e6:.2f}M rows/s")

@torch.no_grad()
def held_out_error(saes, held_rows):
    """{fvu: {name: mean over layers}, dead: mean over the SAEs}, on 2,048 held-out rows of each."""
    fvus, dead = {}, []
    for (layer, name), sae in saes.items():
        x = held_rows[layer, name][:2048].float()
        x_hat = sae.decode(*sae.encode(x, sae.k))
        fvus.setdefault(name, []).append(sta.fidelity(x, x_hat)["fvu"])
        dead.append(len(sae.dead()) / sae.n_latents)
    return {"fvu": {name: sum(fvu) / len(fvu) for name, fvu in fvus.items()},
            "dead": sum(dead) / len(dead)}

# ------------------------------------------------------------------ several processes
def join_processes():
    """(number of this process, number of all) if torchrun started them, else (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    dist.init_process_group()  # nccl between GPUs, else gloo
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # one of them reports
    return dist.get_rank(), dist.get_world_size()

@torch.no_grad()
def add_up(tensors):
    """Each tensor becomes its sum over all processes."""
    flat = torch.cat([x.flatten() for x in tensors])
    with sta.explain("another process of this run is gone; run it again with --resume"):
        dist.all_reduce(flat)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(total.view_as(x))

# ------------------------------------------------------------------ state on disk
def save_state(path, saes, optimizer, progress):
    """All that resuming needs, in one file, so that it is replaced as one."""
    tensors = {f"sae.{name}": x for name, x in nn.ModuleList(saes.values()).state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": x for name, x in moments.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    sta.write_atomic(path, safetensors.torch.save(tensors, {"progress": json.dumps(progress)}))

def load_state(path, saes, optimizer, settings):
    """Inverse of `save_state`; returns progress, that of a new run if there is no file. Raises
    UsageError if it is corrupt or of other settings."""
    if not path.exists():
        return {"buffers": 0, "step": 0, "settings": settings, "log": []}
    with sta.explain(f"{path}: corrupt; delete it and train again"):
        with safetensors.safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        expect_same(path, progress["settings"], settings)
        nn.ModuleList(saes.values()).load_state_dict(
            {name[4:]: x for name, x in tensors.items() if name.startswith("sae.")})
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"param_groups": groups, "state": {
            i: {name: tensors[f"adam.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for i in groups[0]["params"]}})
    return progress

def expect_same(path, then, now):
    """Raises UsageError if the settings of what is there differ from those of this run."""
    for name, value in now.items():
        if then.get(name) != value:
            raise sta.UsageError(f"{path} was trained with {name} = {then.get(name)}, not {value}; "
                                 "choose that, or another folder, or delete it")

def check_folder(folder, sites, settings, resume):
    """True if this very run is finished there. Raises UsageError rather than overwrite, or mix SAEs
    of different settings."""
    unfinished = (folder / "unfinished.safetensors").exists()
    if unfinished and not resume:
        raise sta.UsageError(f"{folder} holds an unfinished run: add --resume, choose another "
                             "--out, or delete unfinished.safetensors")
    paths = [folder / f"layer{layer}.{name}" for layer, name in sites]
    done = [path for path in paths if (path / "cfg.json").exists()]
    general = {name: x for name, x in settings.items() if name not in ("layers", "model_sha256")}
    for path in sorted(folder.glob("layer*.*/cfg.json")):
        there = sta.load_sae(path.parent)[1].get("settings", {})
        expect_same(path.parent, there, settings if path.parent in done else general)
    return len(done) == len(paths) and not unfinished

def save_trained(folder, marks, saes, held_rows, settings, args, variant):
    """Print the held-out fidelity of each SAE at its budget, and save it with that."""
    print(f"held out ({len(next(iter(held_rows.values()))):,} rows each; dead: fired by none)")
    for (layer, name), sae in saes.items():
        point = sta.budget_curve(sae, held_rows[layer, name].float(), [sae.k])[0]
        print(f"layer {layer:3} {name:5} cos {point['cos']:.3f}  fvu {point['fvu']:.3f}  dead "
              f"{100 * point['dead']:5.1f}%")
        sta.save_sae(folder / f"layer{layer}.{name}", variant.finish(layer, sae), {
            "model": args.model, "marks": {str(layer): marks[str(layer)]}, "layer": layer,
            "kind": name, "held_out": point, "settings": settings})
    print(f"wrote {len(saes)} SAEs to {folder}; next: {variant.next_step.format(folder=folder)}"
          + (" --text HELD_OUT" if args.text else ""))

def main(argv=None, variant=PerHead(), description=__doc__):
    args = parse_args(argv, description)
    sta.check_out(args.out)
    rank, n_ranks = join_processes()
    device, dtype = sta.pick_device(args.device, args.dtype)
    if n_ranks > 1 and device == "auto":
        raise sta.UsageError("--device auto: with torchrun, each process has one GPU; leave it out")
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    model, tokenizer, layers = sta.load_model(args.model, device, dtype, args.layer,
                                              no_deeper=True)
    pieces = sta.read_text(args.text, "train", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 512, args.tokens, least=2)
    folder = args.out / sta.slug(args.model)
    marks = sta.model_marks(model, layers)
    settings = {"model_sha256": sta.sha256(json.dumps(marks).encode())}
    settings |= {name: getattr(args, name) for name in (
        "tokens", "batch_rows", "n_latents", "k_key", "k_val", "lr", "seed")}
    settings |= {"seq_len": windows.shape[1], "layers": layers, "dtype": str(dtype)[6:],  # torch.
                 "processes": n_ranks, "text": args.text or "default",
                 "text_sha256": sta.sha256(windows)}
    sites = itertools.product(layers, variant.budgets(args, (1, 1)))
    if check_folder(folder, sites, settings, args.resume):
        return print(f"{folder}: trained already with these settings; nothing to do")
    print(f"{args.model}: K and V of {len(layers)} layers, {windows.numel():,} tokens of text, "
          f"training on {args.tokens:,} in windows of {windows.shape[1]}")
    saes, held_rows, log = train(model, windows, layers, args, folder, settings, variant)
    if rank == 0:
        save_trained(folder, marks, saes, held_rows, settings, args, variant)
        sta.write_atomic(folder / f"run-{args.layer}.json", json.dumps(
            {"model": args.model, "settings": settings, "log": log}))
        (folder / "unfinished.safetensors").unlink(missing_ok=True)

if __name__ == "__main__":
    sta.run(main)
