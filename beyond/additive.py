"""Additive codes: the keys and values of a layer as a sum of atoms, at one byte per atom.

    python -m beyond.calibrate && python -m beyond.additive  # tiny: saes/tiny/additive/
    python -m beyond.additive --model DIR                    # any model that is calibrated
    python evaluate.py --rows additive,rivals                # with SAEs or without

The keys and values of all heads of a token, side by side, are one vector x of P = 2 H D numbers, as
all are linear images of one hidden state. Along the principal axes W of the layer, y = (x - mean) W
is cut into blocks of 16 numbers, and each block is coded as

    y_hat = C_1[b_1] + ... + C_S[b_S]     b_j: one byte, which names one of the 256 atoms in C_j

So this is a sparse code whose coefficients are all one; the bytes that coefficients would take buy
more atoms instead [residual quantisation, arXiv 2410.15704; for KV caches CommVQ, arXiv
2506.18879]. The axes are those of the metric in which an error counts in nats
(beyond/calibrate.py). The atoms of a stage come from k-means on what the stages before it leave.
Each byte goes to the block, in any layer, where the next atom lowers the error on held-out rows
most. Coding is a beam search. Blocks of 32 do as well at twice the memory, others worse. Non-goals:
fine-tuning, an entropy coder.
"""
import collections
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import sta
from beyond import coded_layers, fitted_folder, parse_args
from beyond.calibrate import (EightBits, apart, keep_settings, open_calibrated, principal_axes,
                              read_fitted, read_settings, side_by_side, write_fitted)
from support.files import run_main

N_ATOMS, BLOCK, BEAM, ROUNDS = 256, 16, 4, 6
SHARES = (0.0625, 0.09375, 0.125, 0.1875, 0.25)  # of bf16's bytes per token: a row for each

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
    """For a fast argmax: `number(tag(gain).amax(-1))` takes a tenth of its time. The lowest eight
    bits of gain (N, 256), which is overwritten, become each atom's number; that changes a float32
    by less than 1 in 2^15."""
    gain.view(torch.int32).bitwise_and_(-N_ATOMS).bitwise_or_(
        torch.arange(N_ATOMS, dtype=torch.int32, device=gain.device))
    return gain

def number(tagged):
    return tagged.view(torch.int32).long() & (N_ATOMS - 1)

def beam_search(y, atoms, beam=BEAM):
    """Rows y (N, d), atoms (S, 256, d) -> codes (N, S), uint8, and what is left of y (N, d). Keeps
    the `beam` best sums after each stage; of each, the two best atoms go on to the next."""
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

def learn_layer(x, fitted, n_stages, seed):
    """Rows x (N, P) of one layer, its mean, covariance and metric -> the tensors of its code: mean
    (P,), W and inverse (P, P); for each block i that is coded, atoms.<i> (S, 256, 16) and left.<i>
    (S + 1,), the error of held-out rows after 0 to S stages. The n_stages are learned one by one,
    each for the block whose latest stage lowered the error most. Raises UsageError at fewer than 32
    rows per atom."""
    if len(x) < 32 * N_ATOMS:
        raise sta.UsageError(f"a calibration of {len(x):,} tokens: too few for {N_ATOMS} atoms; "
                             f"delete it, and run python -m beyond.calibrate --tokens "
                             f"{40 * N_ATOMS} or more")
    mean, (_, W, inverse) = fitted["mean"], principal_axes(fitted["covariance"], fitted["metric"])
    left = list(((x - mean) @ W.float()).split(BLOCK, 1))  # of each block, what is not coded yet
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
    learned = {"mean": mean.float(), "W": W.float(), "inverse": inverse.float()}
    for i, stages in enumerate(atoms):
        if stages:
            learned |= {f"atoms.{i}": torch.stack(stages), f"left.{i}": torch.stack(errors[i])}
    return learned

# ------------------------------------------------------------------ the codec
class Additive:
    """A codec of one layer: of what `learn_layer` returned, `stages` {block: bytes} are used. Its
    tables are kept in 8 bits per number."""

    def __init__(self, learned, stages, shape):
        """shape: (n_kv_heads, head_dim)."""
        self.atoms = {i: EightBits(learned[f"atoms.{i}"][:n])  # (S, 256, 16)
                      for i, n in sorted(stages.items()) if n}
        n_axes = BLOCK * (1 + max(self.atoms, default=0))  # the axes Q in use
        self.mean, self.shape = learned["mean"], shape
        self.axes = EightBits(learned["W"][:, :n_axes].T)  # (Q, P)
        self.inverse = EightBits(learned["inverse"][:n_axes])  # (Q, P)
        self.nbytes = sum(
            x.nbytes for x in (self.mean, self.axes, self.inverse, *self.atoms.values()))

    def encode(self, keys, values):
        """Keys before RoPE and values (..., H, D) -> one tensor of bytes (..., sum of stages)."""
        x = side_by_side(keys, values)  # (..., P)
        y = (x.flatten(0, -2) - self.mean) @ self.axes.read().T  # (N, Q)
        codes = [y.new_empty(len(y), 0, dtype=torch.uint8)]  # all there is where no byte is given
        for i, table in self.atoms.items():
            atoms, parts = table.read(), y[:, BLOCK * i:BLOCK * (i + 1)].split(2048)
            codes.append(torch.cat([beam_search(part, atoms)[0] for part in parts]))
        return (torch.cat(codes, 1).view(*x.shape[:-1], -1),)

    def decode(self, stored):
        codes = stored[0].flatten(0, -2).int()  # (N, sum of stages)
        inverse, at = self.inverse.read(), 0
        y = inverse.new_zeros(len(codes), len(inverse))
        for i, table in self.atoms.items():
            atoms = table.read()
            first = N_ATOMS * torch.arange(len(atoms), device=codes.device, dtype=torch.int32)
            y[:, BLOCK * i:BLOCK * (i + 1)] = F.embedding_bag(
                codes[:, at:at + len(atoms)] + first, atoms.flatten(0, 1), mode="sum")
            at += len(atoms)
        x = y @ inverse + self.mean  # (N, P)
        return apart(x.view(*stored[0].shape[:-1], -1), self.shape)

def share_out(curves, n_bytes):
    """{(layer, block): errors after 0, 1, ... stages} -> {(layer, block): stages}, n_bytes in all,
    by greed. Raises UsageError if fewer stages were learned."""
    gains = [(gain, place) for place, left in curves.items()
             for gain in (-left.diff()).cummin(0).values.tolist()]
    if n_bytes > len(gains):
        raise sta.UsageError(f"{n_bytes:,} bytes, but only {len(gains):,} stages were learned; "
                             "learn more: python -m beyond.additive --most")
    return collections.Counter(place for _, place in sorted(gains, reverse=True)[:n_bytes])

# ------------------------------------------------------------------ the rows, and the run
def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row], at those of SHARES for which enough was learned."""
    shape, learned, curves, new_rows = sta.kv_shape(model.get_decoder().config), {}, {}, []
    folder = fitted_folder(args.saes, args.model) / "additive"
    for layer in coded_layers(model, saes, args):
        learned[layer] = read_fitted(folder, model, layer)
        curves |= {(layer, int(name[5:])): left.cpu() for name, left in learned[layer].items()
                   if name.startswith("left.")}
    settings, n_learned = read_settings(folder), sum(len(left) - 1 for left in curves.values())
    for share in SHARES:
        n_bytes = int(share * 4 * math.prod(shape) * len(learned))
        if n_bytes > n_learned:
            print(f"additive {100 * share:g}: left out; for more: python -m beyond.additive --most")
            continue
        stages = share_out(curves, n_bytes)
        codecs = {layer: Additive(tensors, {block: n for (at, block), n in stages.items()
                                            if at == layer}, shape)
                  for layer, tensors in learned.items()}
        once = sum(codec.nbytes for codec in codecs.values())
        new_rows.append(evaluate.Row(f"additive {100 * share:g}", codecs, once_bytes=once,
                                     method="additive", settings=settings))
    return new_rows

@torch.no_grad()
def main(argv=None):
    args = parse_args(__doc__, argv, "model saes layer seed device dtype", most=dict(
        type=float, default=0.25, help="largest share of bf16 to learn for (default 0.25)"))
    if not 0 < args.most <= 1:
        raise sta.UsageError(f"--most {args.most}: want a share above 0, at most 1")
    run = open_calibrated(args)
    folder = run.folder / "additive"
    keep_settings(folder, {
        "calibration": run.settings, "seed": args.seed, "most": args.most, "n_atoms": N_ATOMS,
        "block": BLOCK, "beam": BEAM, "rounds": ROUNDS})
    n_stages = int(1.25 * args.most * 4 * math.prod(sta.kv_shape(run.model.get_decoder().config)))
    todo = [layer for layer in run.fitted if not (folder / f"layer{layer}.safetensors").exists()]
    print(f"{run.name}: {len(todo)} of {len(run.fitted)} layers to learn, "
          f"{run.windows.numel():,} tokens")
    vectors = sta.harvest(run.model, run.windows, todo) if todo else {}
    for layer in tqdm(todo, desc="layers", disable=None):
        x = side_by_side(vectors.pop((layer, "key")), vectors.pop((layer, "value")))
        write_fitted(folder, run.model, layer,
                     learn_layer(x, run.fitted[layer], n_stages, args.seed))
    print(f"{folder} is complete")

if __name__ == "__main__":
    run_main(main)
