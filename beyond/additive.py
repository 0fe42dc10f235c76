"""Additive codes: the keys and values of a layer as a sum of atoms, one byte an atom.

    python -m beyond.calibrate && python -m beyond.additive  # tiny: saes/tiny/additive/
    python -m beyond.additive --model DIR --text T           # any model; a file a layer
    python evaluate.py --rows additive,rivals                # with SAEs or without

A token's keys and values of all heads, side by side, are one vector x of P = 2 H D numbers: all are
linear images of one hidden state. Along the axes W of the layer, y = (x - mean) W, in blocks of 16,

    y_hat = C_1[b_1] + ... + C_S[b_S]     b_j one byte, C_j 256 atoms

A sparse code whose coefficients are all one: their bytes buy more atoms instead [residual
quantisation, arXiv 2410.15704; for KV caches CommVQ, arXiv 2506.18879]. Axes: principal ones in the
metric of the loss (beyond/calibrate.py), where an error counts in nats, in every layer. Atoms:
residual k-means. Bytes: by greed, where one lowers held-out error most. Of blocks of 8 to 64 axes,
16 are as good as 32 at half the memory, others worse. Coding: beam search. Non-goals: fine-tuning,
an entropy coder.
"""
import argparse
import collections
import hashlib
import json
import math
import pathlib

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta
import train_sae

N_ATOMS, BLOCK, BEAM, ROUNDS = 256, 16, 4, 6
SHARES = (0.0625, 0.09375, 0.125, 0.1875, 0.25)  # of bf16, of the rows

# ------------------------------------------------------------------ axes
def side_by_side(keys, values):
    """Keys and values (..., H, D) -> x (..., P), float32."""
    return torch.cat([keys.flatten(-2), values.flatten(-2)], -1).float()

def principal_axes(x, metric):
    """Rows x (N, P) -> mean (P,), W (P, P), W^-1: y = (x - mean) W has uncorrelated numbers,
    strongest first, and the metric's lengths."""
    mean, root = x.mean(0), torch.linalg.cholesky(metric.double())
    centred = ((x - mean) @ root.float()).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return mean, (root @ axes).float(), (axes.T @ root.inverse()).float()

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
    half = atoms.square().sum(-1) / 2
    return torch.cat([number(tag(torch.addmm(-half, part, atoms.T)).amax(-1))
                      for part in x.split(2048)])

def tag(gain):
    """gain (N, 256), overwritten: the atom's number is in the lowest eight bits, which changes a
    float32 by less than 1 in 2^15. Then `number(x.amax(-1))` is argmax, in a tenth of its time."""
    gain.view(torch.int32).bitwise_and_(-N_ATOMS).bitwise_or_(
        torch.arange(N_ATOMS, dtype=torch.int32, device=gain.device))
    return gain

def number(tagged):
    return tagged.view(torch.int32).long() & (N_ATOMS - 1)

def beam_search(y, atoms, beam=BEAM):
    """Rows y (N, d), atoms (S, 256, d) -> codes (N, S), uint8, and what is left of y (N, d).
    Keeps the `beam` best sums so far; of each, its two best atoms go on to the next stage."""
    left = y[:, None]  # (N, C, d) of C candidates
    cost = left.square().sum(-1) / 2  # (N, C)
    picks, parents = [], []
    for stage in atoms:
        n, C, d = left.shape
        # by how much an atom c lowers the cost: c y - c c / 2
        gain = tag(torch.addmm(-stage.square().sum(-1) / 2, left.flatten(0, 1), stage.T))
        first = gain.amax(-1)  # (N C,), of (N C, 256)
        second = gain.scatter_(1, number(first)[:, None], -1e30).amax(-1)
        best = torch.cat([first.view(n, C), second.view(n, C)], 1)  # (N, 2 C)
        cost, place = (cost.repeat(1, 2) - best).topk(min(beam, 2 * C), largest=False)
        picks.append(number(best.gather(1, place)))
        parents.append(place % C)
        left = left.gather(1, parents[-1][..., None].expand(-1, -1, d)) - stage[picks[-1]]
    at, codes = torch.zeros(len(y), 1, dtype=torch.long, device=y.device), []  # the best sum
    for pick, parent in zip(reversed(picks), reversed(parents)):
        codes.append(pick.gather(1, at).to(torch.uint8))
        at = parent.gather(1, at)
    return torch.cat(codes[::-1], 1), left[:, 0]

def learn_layer(x, metric, n_stages, seed):
    """Rows x (N, P) of one layer -> its tensors: mean (P,), W, inverse (P, P); of each block
    atoms.<i> (S, 256, 16) and left.<i> (S + 1,), the error of held-out rows after 0 to S stages.
    n_stages in all, one at a time for the block whose last one helped most. Raises UsageError at
    fewer than 32 rows an atom."""
    if len(x) < 32 * N_ATOMS:
        raise sta.UsageError(f"--tokens: {len(x):,} rows, too few for {N_ATOMS} atoms; want "
                             f"{32 * N_ATOMS:,} or more")
    mean, W, inverse = principal_axes(x, metric)
    left = list(((x - mean) @ W).split(BLOCK, 1))  # of each block what is not coded yet
    generator, n_held = torch.Generator().manual_seed(seed), len(x) // 10
    atoms = [[] for _ in left]
    errors = [[part[:n_held].square().sum(-1).mean()] for part in left]
    gains = [curve[0].item() for curve in errors]  # nothing helps more than that
    for _ in range(n_stages):
        i = gains.index(max(gains))
        stage = k_means(left[i][n_held:], generator)
        left[i] = left[i] - stage[nearest(left[i], stage)]
        atoms[i].append(stage)
        errors[i].append(left[i][:n_held].square().sum(-1).mean())
        gains[i] = (errors[i][-2] - errors[i][-1]).item()
    found = {"mean": mean, "W": W, "inverse": inverse}
    for i in (i for i, stages in enumerate(atoms) if stages):
        found |= {f"atoms.{i}": torch.stack(atoms[i]), f"left.{i}": torch.stack(errors[i])}
    return found

# ------------------------------------------------------------------ the codec
class Additive:
    """A codec of one layer: of what `learn_layer` returned, `stages` {block: bytes} are used."""

    def __init__(self, learned, stages, shape):
        """shape: (n_kv_heads, head_dim)."""
        self.atoms = {i: learned[f"atoms.{i}"][:n] for i, n in sorted(stages.items()) if n}
        n_axes = BLOCK * (1 + max(self.atoms, default=0))  # the axes Q in use
        self.mean, self.W, self.inverse = (
            learned["mean"], learned["W"][:, :n_axes], learned["inverse"][:n_axes])
        self.shape, self.kept = shape, [self.mean, self.W, self.inverse, *self.atoms.values()]

    def encode(self, keys, values):
        """Keys before RoPE and values (..., H, D) -> one tensor of bytes (..., sum of stages)."""
        x = side_by_side(keys, values)  # (..., P)
        y = (x.flatten(0, -2) - self.mean) @ self.W  # (N, Q)
        codes = [torch.cat([beam_search(part, atoms)[0]
                            for part in y[:, BLOCK * i:BLOCK * (i + 1)].split(2048)])
                 for i, atoms in self.atoms.items()]
        return (torch.cat(codes, 1).view(*x.shape[:-1], -1),)

    def decode(self, stored):
        codes = stored[0].flatten(0, -2).int()  # (N, sum of stages)
        y, at = self.mean.new_zeros(len(codes), self.W.shape[1]), 0
        for i, atoms in self.atoms.items():
            first = N_ATOMS * torch.arange(len(atoms), device=codes.device, dtype=torch.int32)
            y[:, BLOCK * i:BLOCK * (i + 1)] = F.embedding_bag(
                codes[:, at:at + len(atoms)] + first, atoms.flatten(0, 1), mode="sum")
            at += len(atoms)
        x = y @ self.inverse + self.mean  # (N, P)
        return x.view(*stored[0].shape[:-1], 2, *self.shape).unbind(-3)

def share_out(curves, n_bytes):
    """{(layer, block): errors after 0, 1, ... stages} -> {(layer, block): stages}, n_bytes in all,
    by greed. Raises UsageError if fewer stages were learned."""
    gains = [(gain, place) for place, left in curves.items()
             for gain in (-left.diff()).cummin(0).values.tolist()]
    if n_bytes > len(gains):
        raise sta.UsageError(f"{n_bytes:,} bytes, but only {len(gains):,} stages were learned; "
                             "learn more: python -m beyond.additive --most")
    return collections.Counter(place for _, place in sorted(gains, reverse=True)[:n_bytes])

# ------------------------------------------------------------------ files, rows
def read(folder, model, layer):
    """(tensors, settings) of a layer in saes/<model>/additive or .../calibration."""
    path = folder / f"layer{layer}.safetensors"
    with sta.explain(f"{path}: missing or corrupt; delete it and run python -m "
                     f"beyond.{'additive' if folder.name == 'additive' else 'calibrate'}"):
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            marks = json.loads(file.metadata()["marks"])
            settings = json.loads(file.metadata()["settings"])
    if not sta.same_marks(marks, sta.model_marks(model, [layer])):
        raise sta.UsageError(f"{path}: of another model; choose another --saes or --out")
    return tensors, settings

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    config, learned, curves, found = model.get_decoder().config, {}, {}, []
    shape, folder = sta.kv_shape(config), evaluate.find_fitted(args.saes, args.model)[0]
    folder = folder / "additive"
    for layer in evaluate.coded_layers(model, saes, args):
        tensors, settings = read(folder, model, layer)
        learned[layer] = {key: x.to(model.device) for key, x in tensors.items()}
        curves |= {(layer, int(key[5:])): x for key, x in tensors.items() if key[:5] == "left."}
    for share in (share for share in SHARES if share <= settings["most"]):
        stages = share_out(curves, round(share * len(learned) * 4 * math.prod(shape)))
        codecs = {layer: Additive(tensors, {i: stages[layer, i] for of, i in curves if of == layer},
                                  shape) for layer, tensors in learned.items()}
        once = sum(x.nbytes for codec in codecs.values() for x in codec.kept)
        found.append(evaluate.Row(f"additive {100 * share:g}", codecs, once_bytes=once,
                                  method="additive"))
    return found

# ------------------------------------------------------------------ the run
@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="short name, hub id or folder (default tiny)")
    add("--layer", default="all", help="layers: all, 12, 0-7, 3,9 (default all)")
    add("--text", help="UTF-8 file or hub data set (default: tiny's own, else WikiText-103)")
    add("--tokens", type=int, help="of it (default 122,880; tiny: 20,480)")
    add("--seq-len", type=int, help="tokens a window (default 512, or the model's limit)")
    add("--most", type=float, default=0.25, help="largest share of bf16 to learn for (default .25)")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or auto (default: cuda if any)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the model")
    add("--out", type=pathlib.Path, default=pathlib.Path("saes"), help="(default saes)")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (20_480 if args.model == "tiny" else 122_880)
    sta.check_out(args.out)
    model, tokenizer, layers = sta.load_model(
        args.model, *sta.pick_device(args.device, args.dtype), args.layer)
    pieces = sta.read_text(args.text, "train", args.model)
    windows = sta.token_windows(pieces, tokenizer, model, args.seq_len, 512, args.tokens)
    n_stages = int(1.25 * args.most * 4 * math.prod(sta.kv_shape(model.get_decoder().config)))
    folder = args.out / sta.slug(args.model) / "additive"
    calibration = {layer: read(folder.with_name("calibration"), model, layer) for layer in layers}
    settings = {"tokens": windows.numel(), "seed": args.seed, "most": args.most,
                "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12],
                "calibration": calibration[layers[0]][1]}
    path = {layer: folder / f"layer{layer}.safetensors" for layer in layers}
    todo = [layer for layer in layers if not path[layer].exists()]
    for layer in set(layers) - set(todo):
        train_sae.expect_same(path[layer], read(folder, model, layer)[1], settings)
    print(f"{args.model}: {len(todo)} of {len(layers)} layers to learn, {windows.numel():,} tokens")
    rows = sta.harvest(model, windows, todo) if todo else {}
    for layer in tqdm(todo, desc="layers", disable=None):
        x = side_by_side(rows.pop((layer, "key")), rows.pop((layer, "value")))
        metric = calibration[layer][0]["metric"].to(x.device)
        learned = learn_layer(x, metric, n_stages, args.seed)
        sta.write_atomic(path[layer], safetensors.torch.save(
            {name: tensor.cpu() for name, tensor in learned.items()},
            {"marks": json.dumps(sta.model_marks(model, [layer])),
             "settings": json.dumps(settings)}))
    print(f"{folder} is complete; next: python evaluate.py --rows additive --model {args.model}")

if __name__ == "__main__":
    sta.run(main)
