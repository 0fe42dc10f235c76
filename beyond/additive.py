"""Additive codes: the keys and values of a layer as a sum of atoms, one byte an atom.

    python -m beyond.additive                                # tiny: saes/tiny/additive/
    python -m beyond.additive --model DIR --text T           # any model; a file a layer
    python evaluate.py --rows additive,rivals                # with SAEs or without

A token's keys and values of all heads, side by side, are one vector x of P = 2 H D numbers: all are
linear images of one hidden state. Along the axes W of the layer, y = (x - mean) W, in blocks of 32,

    y_hat = C_1[b_1] + ... + C_S[b_S]     b_j one byte, C_j 256 atoms

A sparse code whose coefficients are all one: the bytes of coefficients buy more atoms instead. Also
known as residual quantisation [arXiv 2410.15704; for KV caches CommVQ, arXiv 2506.18879].
Axes:   principal ones in the metric of the loss: an error counts half by its square along gradients
        of the model's own loss, half plainly; so y is in the same nats in every layer.
Atoms:  residual k-means, stage by stage.
Bytes:  by greed over all layers and blocks, each where it lowers the error of held-out rows most.
Coding: beam search, `BEAM` candidates a block.
Non-goals: fine-tuning on the loss; an entropy coder.
"""
import argparse
import hashlib
import json
import math
import pathlib
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta

N_ATOMS, BLOCK, BEAM, ROUNDS = 256, 32, 4, 6
GRADIENT_TOKENS = 20_480  # of the text, for the metric
SHARES = (0.0625, 0.09375, 0.125, 0.1875, 0.25)  # of bf16, of the rows

# ------------------------------------------------------------------ axes
def loss_metric(model, windows, layers, sink, seed=0):
    """{layer: A (P, P)}: an error e of x costs about e^T A e nats, half by G = E[g g^T] and half
    plainly, each kind in its mean cost; g is the gradient to x of the loss at targets drawn from
    the model's own predictions."""
    sites, generator, outputs = sta.kv_sites(model), torch.Generator().manual_seed(seed), {}

    def keep(module, args, y): outputs[module] = y
    hooks = [sites[key][0].register_forward_hook(keep) for key in sites if key[0] in layers]
    G, n = dict.fromkeys(layers, 0), 0
    for ids in tqdm(windows, desc="gradients", disable=None):
        with torch.enable_grad():
            x = model.get_input_embeddings()(ids[None].to(model.device)).requires_grad_()
            logits = model(inputs_embeds=x, use_cache=False).logits[0].float()  # (T, V)
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            grads = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()))))
        for layer in layers:
            g = side_by_side(*(view(grads[module])[0, sink:] for module, view in (
                sites[layer, kind] for kind in sta.KINDS)))  # (T - sink, P)
            G[layer] = G[layer] + g.T @ g
        n += len(g)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        cost = G[layer].diagonal() / n
        plain = torch.cat([part.mean().expand_as(part) for part in cost.chunk(2)])
        G[layer] = (G[layer] / n + plain.diag()) / 4
    return G

def side_by_side(k, v):
    """Keys and values (..., H, D) -> x (..., P), float32."""
    return torch.cat([k.flatten(-2), v.flatten(-2)], -1).float()

def principal_axes(x, metric):
    """Rows x (N, P) -> mean (P,), variances (P,), W (P, P), W^-1: y = (x - mean) W has uncorrelated
    numbers of these variances, strongest first, and the metric's lengths."""
    mean, root = x.mean(0), torch.linalg.cholesky(metric.double())
    centred = ((x - mean) @ root.float()).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    axes = axes.flip(1)
    return mean, variances.flip(0), (root @ axes).float(), (axes.T @ root.inverse()).float()

# ------------------------------------------------------------------ atoms
def k_means(x, generator):
    """Rows x (N, d) -> 256 atoms (256, d)."""
    atoms = x[torch.randperm(len(x), generator=generator)[:N_ATOMS]]
    for _ in range(ROUNDS):
        pick = nearest(x, atoms)
        counts = pick.bincount(minlength=N_ATOMS)
        atoms = torch.zeros_like(atoms).index_add_(0, pick, x) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        atoms[empty] = x[torch.randperm(len(x), generator=generator)[:len(empty)]]
    return atoms

def nearest(x, atoms):
    """The nearest atom (N,) of each row x (N, d)."""
    return (x @ atoms.T - atoms.square().sum(-1) / 2).argmax(-1)

def beam_search(y, atoms, beam):
    """Rows y (N, d), atoms (S, 256, d) -> codes (N, S), uint8, and what is left of y (N, d).

    Keeps the `beam` best sums so far; of each, its two best atoms go on to the next stage."""
    left = y[:, None]  # (N, candidates, d)
    codes = torch.zeros(len(y), 1, len(atoms), dtype=torch.uint8, device=y.device)
    for j, stage in enumerate(atoms):
        gain = left @ stage.T - stage.square().sum(-1) / 2  # (N, candidates, 256)
        first, pick = gain.max(-1, keepdim=True)
        if beam > 1:
            second, other = gain.scatter_(-1, pick, -torch.inf).max(-1, keepdim=True)
            first, pick = torch.cat([first, second], -1), torch.cat([pick, other], -1)
        cost = left.square().sum(-1, keepdim=True) / 2 - first  # (N, candidates, 2)
        n = min(beam, cost[0].numel())
        best = cost.flatten(1).topk(n, largest=False).indices  # (N, n)
        pick, parent = pick.flatten(1).gather(1, best), best // cost.shape[-1]
        left = left.gather(1, parent[..., None].expand(-1, -1, y.shape[1])) - stage[pick]
        codes = codes.gather(1, parent[..., None].expand(-1, -1, len(atoms)))
        codes[..., j] = pick.to(torch.uint8)
    return codes[:, 0], left[:, 0]

def learn_layer(x, metric, most_bytes, seed):
    """Rows x (N, P) of one layer -> its tensors: mean (P,), W (P, Q), inverse (Q, P); of each block
    atoms.<i> (S, 256, 32) and left.<i> (S + 1,), the error of held-out rows after 0 to S stages.

    Learns as many stages a block as Gaussians of these variances would want at most_bytes, and a
    quarter more. Raises UsageError at fewer rows than 32 an atom."""
    if len(x) < 32 * N_ATOMS:
        raise sta.UsageError(f"--tokens: {len(x):,} rows, too few for {N_ATOMS} atoms; want "
                             f"{32 * N_ATOMS:,} or more")
    mean, variances, W, inverse = principal_axes(x, metric)
    y, generator, found = (x - mean) @ W, torch.Generator().manual_seed(seed), {}
    n_held = len(x) // 10
    rate = 8 * most_bytes  # bits; the level that spends them, by halving
    level = variances.clamp_min(1e-12).log2().sort(descending=True).values
    spent = (level.cumsum(0) - level * torch.arange(1, len(level) + 1)) / 2
    water = level[(spent < rate).sum() - 1]
    bits = (variances.clamp_min(1e-12).log2() - water).clamp_min(0) / 2
    for i, block in enumerate(bits.split(BLOCK)):
        n_stages = int(1.25 * block.sum() / 8) + 2 if block.sum() > 0 else 0
        if n_stages == 0:
            break
        left = y[:, BLOCK * i:BLOCK * (i + 1)]
        held, atoms, errors = left[:n_held], [], [left[:n_held].square().sum(-1).mean()]
        left = left[n_held:]
        for _ in range(n_stages):
            atoms.append(k_means(left, generator))
            left = left - atoms[-1][nearest(left, atoms[-1])]
            held = held - atoms[-1][nearest(held, atoms[-1])]
            errors.append(held.square().sum(-1).mean())
        found |= {f"atoms.{i}": torch.stack(atoms), f"left.{i}": torch.stack(errors)}
    n = BLOCK * len(found) // 2
    return {"mean": mean, "W": W[:, :n].contiguous(), "inverse": inverse[:n].contiguous(), **found}

# ------------------------------------------------------------------ the codec
class Additive:
    """A codec of one layer: `stages` bytes a block, of what `learn_layer` returned."""

    def __init__(self, learned, stages, shape):
        """stages: how many of each block's stages are used; shape: (n_kv_heads, head_dim)."""
        self.mean, self.shape, self.stages = learned["mean"], shape, stages
        self.atoms = [learned[f"atoms.{i}"][:n] for i, n in enumerate(stages)]
        self.W, self.inverse = learned["W"], learned["inverse"]  # (P, Q), (Q, P)

    def encode(self, k, v):
        """Keys before RoPE and values (..., H, D) -> one tensor of bytes (..., sum of stages)."""
        x = side_by_side(k, v)  # (..., P)
        y = (x.flatten(0, -2) - self.mean) @ self.W  # (N, Q)
        codes = [torch.cat([beam_search(part, atoms, BEAM)[0]
                            for part in y[:, BLOCK * i:BLOCK * (i + 1)].split(2048)])
                 for i, atoms in enumerate(self.atoms) if len(atoms)]
        return (torch.cat(codes, 1).view(*x.shape[:-1], -1),)

    def decode(self, stored):
        codes = stored[0].flatten(0, -2).int()  # (N, sum of stages)
        y = self.mean.new_zeros(len(codes), self.W.shape[1])
        used = [i for i, n in enumerate(self.stages) if n]
        for i, part in zip(used, codes.split([self.stages[i] for i in used], 1)):
            first = N_ATOMS * torch.arange(self.stages[i], device=part.device, dtype=torch.int32)
            y[:, BLOCK * i:BLOCK * (i + 1)] = F.embedding_bag(
                part + first, self.atoms[i].flatten(0, 1), mode="sum")
        x = y @ self.inverse + self.mean  # (N, P)
        return x.view(*stored[0].shape[:-1], 2, *self.shape).unbind(-3)

    def nbytes(self):
        """Of what is kept once."""
        return sum(x.nbytes for x in (self.mean, self.W, self.inverse, *self.atoms))

def share_out(curves, n_bytes):
    """{layer: [errors of a block after 0, 1, ... stages]} -> {layer: [stages a block]}, n_bytes in
    all, by greed. Raises UsageError if fewer stages were learned."""
    gains = {(layer, i, j): gain for layer, blocks in curves.items() for i, left in
             enumerate(blocks) for j, gain in enumerate((-left.diff()).cummin(0).values.tolist())}
    if n_bytes > len(gains):
        raise sta.UsageError(f"{n_bytes:,} bytes, but only {len(gains):,} stages were learned; "
                             "learn more (python -m beyond.additive --most)")
    best = sorted(gains, key=gains.get, reverse=True)[:n_bytes]
    stages = {layer: [0] * len(blocks) for layer, blocks in curves.items()}
    for layer, i, _ in best:
        stages[layer][i] += 1
    return stages

# ------------------------------------------------------------------ files, rows
def load(folder, model, layers):
    """{layer: what `learn_layer` returned} of a folder of this model. Raises UsageError."""
    found, sites = {}, sta.kv_sites(model)
    for layer in layers:
        path = folder / f"layer{layer}.safetensors"
        with sta.explain(f"{path}: missing, truncated or corrupt; run python -m beyond.additive"):
            with safetensors.safe_open(path, "pt") as file:
                mark = file.metadata()["fingerprint"]
                found[layer] = {name: file.get_tensor(name).to(sites[layer, "key"][0].weight.device)
                                for name in file.keys()}
        if mark != sta.fingerprint(model):
            raise sta.UsageError(f"{path}: of another model; choose another --saes")
    return found

def codecs_at(learned, share, shape):
    """{layer: Additive} that keep this share of bf16 in all."""
    curves = {layer: [x[f"left.{i}"] for i in range(sum(name[:4] == "left" for name in x))]
              for layer, x in learned.items()}
    n_bytes = round(share * len(learned) * 4 * shape[0] * shape[1])
    stages = share_out(curves, n_bytes)
    return {layer: Additive(x, stages[layer], shape) for layer, x in learned.items()}

def rows(model, tokenizer, saes, args):
    """For evaluate.py: [Row]."""
    config, name = model.get_decoder().config, evaluate.find_saes(args.saes, args.model)[1]
    layers = sorted({layer for layer, _ in saes}) or range(config.num_hidden_layers)
    learned = load(args.saes / sta.slug(name) / "additive", model, layers)
    found = []
    for share in SHARES:
        codecs = codecs_at(learned, share, sta.kv_shape(config))
        found.append(evaluate.Row(f"additive {100 * share:g}", codecs, method="additive",
                                  once_bytes=sum(codec.nbytes() for codec in codecs.values())))
    return found

# ------------------------------------------------------------------ the run
def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--layer", default="all", help="all, 12, 0-7 or 3,9 (default all)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, default=61_440, help="of it (default 61,440)")
    add("--seq-len", type=int, help="tokens a window (default 512, or the model's limit)")
    add("--most", type=float, default=0.25, help="largest share of bf16 to learn for (default .25)")
    add("--sink", type=int, default=1, help="first tokens of a window left out (default 1)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or auto (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    return parser.parse_args(argv)

@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, layers = sta.load_model(
        args.model, *sta.pick_device(args.device, args.dtype), args.layer)
    text = sta.read_text(args.text, "train", args.model, 8 * args.tokens)
    windows = sta.token_windows(text, tokenizer, model, args.seq_len, 512, args.tokens)
    P = 2 * math.prod(sta.kv_shape(model.get_decoder().config))
    folder = args.out / sta.slug(args.model) / "additive"
    settings = {"tokens": windows.numel(), "seed": args.seed, "sink": args.sink, "most": args.most,
                "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]}
    path = {layer: folder / f"layer{layer}.safetensors" for layer in layers}
    todo = [layer for layer in layers if not is_done(path[layer], settings)]
    print(f"{args.model}: {len(todo)} of {len(layers)} layers to learn, {windows.numel():,} tokens")
    if todo:
        few = windows[:max(1, GRADIENT_TOKENS // windows.shape[1])]
        metric, rows = loss_metric(model, few, todo, args.sink, args.seed), sta.harvest(
            model, windows, todo, args.sink)
    for layer in todo:
        began = time.time()
        x = side_by_side(rows.pop((layer, "key")), rows.pop((layer, "value")))
        learned = learn_layer(x, metric[layer], args.most * 2 * P, args.seed)
        left = sum(learned[name][-1].item() for name in learned if name[:4] == "left")
        whole = sum(learned[name][0].item() for name in learned if name[:4] == "left")
        tensors = {name: x.cpu() for name, x in learned.items()}
        sta.write_atomic(path[layer], safetensors.torch.save(tensors, {
            "fingerprint": sta.fingerprint(model), "settings": json.dumps(settings)}))
        print(f"layer {layer}: {sum(len(x) for name, x in learned.items() if name[:5] == 'atoms')} "
              f"stages leave {left / whole:.5f} of the loss's error, {time.time() - began:.0f} s")
    print(f"wrote {folder}; next: python evaluate.py --rows additive --model {args.model}")

def is_done(path, settings):
    """Whether a layer is learned with these settings. Raises UsageError at others."""
    if not path.exists():
        return False
    with sta.explain(f"{path}: truncated or corrupt; delete it"):
        with safetensors.safe_open(path, "pt") as file:
            then = json.loads(file.metadata()["settings"])
    if then != settings:
        raise sta.UsageError(f"{path} was learned with {then}; choose that, or another --out")
    return True

if __name__ == "__main__":
    sta.run(main)
