"""Train a key SAE and a value SAE for each chosen layer, all in one pass over the text.

    python train_sae.py                              # tiny, all layers: minutes on 2 cores
    python train_sae.py --model yi-6b --layer 12     # needs the hub, and a GPU to be quick

Writes saes/<model>/layer<i>.<key|value>/ in the layout of SAELens, and run-<layers>.json with the
training curves. An unfinished run lives in unfinished.safetensors; --resume continues it, to the
same bits on a CPU. Source of the recipe: [Gao] = Gao et al. 2024, arXiv 2406.04093.
Non-goals: tuning the model itself; several processes (several GPUs: --device auto).
"""
import argparse
import json
import math
import pathlib
import time

import torch
from torch import nn
from tqdm import tqdm

import sta
from support.files import (check_folder, check_out, device_of, load_state, model_hash, run_main,
                           save_sae, save_state, sha256, write_atomic)
from support.models import MODELS, load_model, pick_device, slug
from support.results import commit
from support.text import read_text, token_windows

# The recipe; --lr and --batch-tokens belong to it.
BETAS = (0.9, 0.99)  # of Adam; its default of 0.999 gives the same error, within the spread
WARM_UP, DECAY = 0.05, 0.3  # shares of the steps in which the rate rises, and in which it falls
LIFT = 10  # the biases of silent latents rise by 10 learning rates per step: 60 steps to firing
BUFFER_TOKENS = 32_768  # shuffled together, because neighbouring tokens are similar

CHECKPOINT_SECONDS, LOG_STEPS = 10, 50
DEAD_VECTORS = 1_000_000  # a latent that none of so many vectors fired is logged as dead

def parse_args(argv=None, description=__doc__):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--model", default="tiny", help=f"{', '.join(MODELS)}, a hub id or a folder")
    add("--layer", default="all", help="all, 12, 0-7 or 3,9 (default all)")
    add("--text", help="UTF-8 file, or hub data set (default: tiny's own, else WikiText-103)")
    # how much
    add("--tokens", type=int, help="to train on, and to read; about 8,000 of these are held out, "
                                   "and others read again (default 131,072 for tiny, else "
                                   "1,000,000)")
    add("--seq-len", type=int, help="tokens per window (default 512, or the model's limit)")
    add("--batch-tokens", type=int, default=512,
        help="tokens per step; each gives a vector for each kv head (default 512)")
    # the SAEs
    add("--n-latents", type=int, help="atoms in each dictionary (default 512 for tiny, else 1024)")
    add("--k-key", type=int, default=8, help="atoms per key (default 8)")
    add("--k-val", type=int, default=16, help="atoms per value (default 16)")
    add("--lr", type=float, help="Adam's peak rate; the fewer steps, the higher (default 0.01 for "
                                 "tiny, else 0.003)")
    add("--seed", type=int, default=0)
    # where
    add("--device", help="cpu, cuda, or auto: over all GPUs, by accelerate (default: cuda if any)")
    add("--dtype", help="of the model (default float32 on cpu, bfloat16 on cuda)",
        choices=["float32", "bfloat16", "float16"])
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    add("--resume", action="store_true", help="continue the unfinished run in --out")
    args = parser.parse_args(argv)
    defaults = {"tokens": 1_000_000, "n_latents": 1024, "lr": 0.003}
    if args.model == "tiny":
        defaults = {"tokens": 131_072, "n_latents": 512, "lr": 0.01}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (0 < args.lr < math.inf and 0 <= args.seed < 1 << 40):
        raise sta.UsageError(f"--lr {args.lr}, --seed {args.seed}: want a finite rate above 0, and "
                             "a seed of 0 to 2^40")
    for name, most in (("tokens", 1 << 40), ("batch_tokens", BUFFER_TOKENS), ("n_latents", 1 << 15),
                       ("k_key", args.n_latents), ("k_val", args.n_latents)):
        if not 1 <= getattr(args, name) <= most:
            limit = f"{most:,} = --n-latents" if name in ("k_key", "k_val") else f"{most:,}"
            raise sta.UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: want 1 to "
                                 f"{limit}")
    return args

# ------------------------------------------------------------------ what is trained, on what
class KeysAndValues:
    """The SAEs of a layer, here one for its keys and one for its values, and the vectors that they
    are trained on. beyond/variants.py has others."""
    sae_class = sta.TopKSAE

    def make_saes(self, model, layer, args, generator):
        """-> {name: SAE}."""
        shape = sta.kv_shape(model.get_decoder().config)
        return {"key": self.sae_class(*shape, args.n_latents, args.k_key, generator),
                "value": self.sae_class(*shape, args.n_latents, args.k_val, generator)}

    def vectors(self, layer, keys, values):
        """Keys and values of a layer (tokens, H, D) -> {name: vectors (tokens, n_heads, dim)}."""
        return {"key": keys, "value": values}

def make_saes(model, layers, args, variant):
    """{(layer, name): SAE}, each on the device of its layer."""
    generator, saes = torch.Generator().manual_seed(args.seed), {}
    for layer in layers:
        for name, sae in variant.make_saes(model, layer, args, generator).items():
            saes[layer, name] = sae.to(device_of(model, layer))
    return saes

def read_vectors(model, windows, layers, variant):
    """Windows (n, T) -> {(layer, name): vectors (tokens, H, D)} for the SAEs."""
    harvested, vectors = sta.harvest(model, windows, layers), {}
    for layer in layers:
        keys, values = harvested.pop((layer, "key")), harvested.pop((layer, "value"))
        for name, x in variant.vectors(layer, keys, values).items():
            vectors[layer, name] = x
    return vectors

def plan_buffers(n_windows, seq_len, n_tokens, seed):
    """Window numbers -> (those held out, [those of each buffer]), in the order of training.
    Drawn once from the seed, so that a buffer mixes windows from all the text and a resumed run
    finds the same ones. The text is read again, in another order, until there are n_tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(n_windows, generator=generator)
    n_held = 1 + min(8192 // seq_len, n_windows // 10)  # about 8,192 tokens, or a tenth
    held_out, training = drawn[:n_held], drawn[n_held:]
    n_wanted, order = max(1, n_tokens // seq_len), training
    while len(order) < n_wanted:
        order = torch.cat([order, training[torch.randperm(len(training), generator=generator)]])
    return held_out, order[:n_wanted].split(max(1, BUFFER_TOKENS // seq_len))

# ------------------------------------------------------------------ the loop
def learning_rate(peak, step, n_steps):
    """Linear warm-up to the peak, then constant, then linear decay to zero."""
    warm_up, decay = WARM_UP * n_steps + 1, DECAY * n_steps
    return peak * min(1, (step + 1) / warm_up, (n_steps - step) / decay)

def train_step(saes, optimizer, batches):
    """One step of every SAE {site: SAE} on its vectors {site: (tokens, H, D)}. A site is a layer
    and a name, "key" or "value"."""
    for site, sae in saes.items():  # forward, loss, backward
        sae.loss(batches[site]).backward()
    with torch.no_grad():
        # latents that did not fire in this step stay where they are: Adam's momentum would move
        # them on, without a gradient, until they never fire again
        before = []
        for sae in saes.values():
            unfired = sae.since_fired.nonzero().squeeze(1)  # `loss` has reset the others to 0
            for part in (sae.W_enc.T, sae.b_enc, sae.W_dec):  # (M, ...)
                before.append((part, unfired, part[unfired]))
        optimizer.step()
        for part, unfired, values in before:
            part[unfired] = values
    optimizer.zero_grad()
    for sae in saes.values():  # after the step: unit atoms; latents that would die are lifted
        sae.renormalise()
        sae.lift_silent(LIFT * optimizer.param_groups[0]["lr"])

def train(model, saes, windows, args, folder, settings, variant):
    """Train saes {(layer, name): SAE} on windows (n, T) -> (the vectors {(layer, name): (tokens, H,
    D)} of windows that were held out, log of the training curves)."""
    layers, seq_len = settings["layers"], windows.shape[1]
    parameters = list(nn.ModuleList(saes.values()).parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=BETAS, fused=True)
    # where an interrupted run stopped, and the order in which the text is read
    path = folder / "unfinished.safetensors"
    progress = load_state(path, saes, optimizer, settings)
    step, saved_at = progress["step"], time.perf_counter()
    held_out, buffers = plan_buffers(len(windows), seq_len, args.tokens, args.seed)
    held_vectors = read_vectors(model, windows[held_out], layers, variant)
    n_tokens = [len(buffer) * (seq_len - 1) for buffer in buffers]  # without first tokens
    n_steps = [max(1, n // args.batch_tokens) for n in n_tokens]  # of each buffer
    all_steps = sum(n_steps)
    bar = tqdm(total=all_steps, initial=step, unit="step", disable=None)
    if step:
        bar.write(f"resuming at step {step}/{all_steps}")
    for b in range(progress["n_buffers"], len(buffers)):
        # fill a buffer: the keys and values of some windows
        vectors = read_vectors(model, windows[buffers[b]], layers, variant)
        if b == 0:
            for site, sae in saes.items():
                sae.centre(vectors[site].float())
        # shuffle its tokens, and make a step with each batch of them
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + b)
        order = torch.randperm(n_tokens[b], generator=generator)
        for batch in order.split(args.batch_tokens)[:n_steps[b]]:
            began = time.perf_counter()
            lr = optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, all_steps)
            batches = {site: x[batch.to(x.device)].float() for site, x in vectors.items()}
            train_step(saes, optimizer, batches)
            step += 1
            bar.update()
            if step % LOG_STEPS == 0 or step == all_steps:
                seconds = max(time.perf_counter() - began, 1e-9)  # a clock may be coarse
                entry = held_out_error(saes, held_vectors, step, step * args.batch_tokens)
                progress["log"].append(entry)
                bar.write(log_line(entry, all_steps, lr, seconds, batches))
        # after each buffer, keep what was learned
        if not all(p.isfinite().all() for p in parameters):
            raise sta.UsageError(f"step {step}: an SAE is no longer finite; start again with a "
                                 f"--lr below {args.lr:g}")
        if time.perf_counter() - saved_at > CHECKPOINT_SECONDS or b == len(buffers) - 1:
            save_state(path, saes, optimizer, {**progress, "n_buffers": b + 1, "step": step})
            saved_at = time.perf_counter()
    bar.close()
    return held_vectors, progress["log"]

@torch.no_grad()
def held_out_error(saes, held_vectors, step, n_tokens):
    """{step; fvu: {name: mean over layers}, on up to 1,024 held-out tokens; dead: the share of
    latents that fired for none of the last DEAD_VECTORS, or of all n_tokens so far, mean over
    SAEs}."""
    fvus, dead = {}, []
    for (layer, name), sae in saes.items():
        x = held_vectors[layer, name][:1024].float()
        x_hat = sae.decode(*sae.encode(x, sae.k))
        fvus.setdefault(name, []).append(sta.fidelity(x, x_hat)["fvu"])
        n_vectors = min(DEAD_VECTORS, n_tokens * len(sae.b_dec))
        dead.append((sae.since_fired >= n_vectors).float().mean().item())
    return {"step": step, "fvu": {name: sum(fvu) / len(fvu) for name, fvu in fvus.items()},
            "dead": sum(dead) / len(dead)}

def log_line(entry, n_steps, lr, seconds, batches):
    fvus = " | ".join(f"fvu {name} {fvu:.3f}" for name, fvu in entry["fvu"].items())
    n_vectors = sum(x.shape[:2].numel() for x in batches.values())
    return (f"step {entry['step']}/{n_steps} | {fvus} | dead {entry['dead']:.1%} | lr {lr:.1e} | "
            f"{1000 * seconds:.0f} ms | {n_vectors / seconds / 1e6:.2f}M vectors/s")

# ------------------------------------------------------------------ the run
def save_trained(folder, model, saes, held_vectors, settings, name_of_model):
    """Print the held-out fidelity of each SAE at its budget, and save it with that."""
    settings = {**settings, "commit": commit()}
    print(f"held out ({len(next(iter(held_vectors.values()))):,} tokens; dead: not fired at 2k)")
    for (layer, name), sae in saes.items():
        x = held_vectors[layer, name].float()
        curve = sta.budget_curve(sae, x, ks=())  # at k and 2k
        point = {**curve[0], "dead": curve[-1]["dead"]}
        largest_z = sae.encode(x, 1)[0].max() * sae.scale
        print(f"layer {layer:3} {name:5} cos {point['cos']:.3f}  fvu {point['fvu']:.3f}  dead "
              f"{100 * point['dead']:5.1f}%")
        save_sae(folder / f"layer{layer}.{name}", sae, {
            "model": name_of_model, "model_sha256": model_hash(model, [layer]), "layer": layer,
            "kind": name, "held_out": point, "largest_z": largest_z.item(),
            "settings": settings})

def main(argv=None, variant=KeysAndValues(), description=__doc__):
    args = parse_args(argv, description)
    check_out(args.out)
    device, dtype = pick_device(args.device, args.dtype)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32
    model, tokenizer, layers = load_model(args.model, device, dtype, args.layer, no_deeper=True)
    windows = token_windows(read_text(args.text, "train", args.model), tokenizer, model,
                            args.seq_len, 512, args.tokens, least=2)
    settings = {"model_sha256": model_hash(model, layers)}
    settings |= {name: getattr(args, name) for name in (
        "tokens", "batch_tokens", "n_latents", "k_key", "k_val", "lr", "seed")}
    settings |= {"seq_len": windows.shape[1], "layers": layers,
                 "dtype": str(dtype).removeprefix("torch."),
                 "text": args.text or "default", "text_sha256": sha256(windows)}
    folder = args.out / slug(args.model)
    saes = make_saes(model, layers, args, variant)
    if check_folder(folder, saes, settings, args.resume):
        return print(f"{folder}: trained already with these settings; nothing to do")
    print(f"{args.model}: K and V of {len(layers)} layers, {windows.numel():,} tokens of text, "
          f"training on {args.tokens:,} in windows of {windows.shape[1]}")
    held_vectors, log = train(model, saes, windows, args, folder, settings, variant)
    save_trained(folder, model, saes, held_vectors, settings, args.model)
    write_atomic(folder / f"run-{args.layer}.json", json.dumps(
        {"model": args.model, "settings": settings, "log": log}))
    (folder / "unfinished.safetensors").unlink(missing_ok=True)
    print(f"wrote {len(saes)} SAEs to {folder}")

if __name__ == "__main__":
    run_main(main)
