"""What else the same bytes could buy: rows for evaluate.py.

    python evaluate.py --rows rivals

grouped   KIVI [arXiv 2402.02750] at 2, 3 and 4 bits, group 32: each group of 32 numbers to even
          steps between its extremes, kept as fp16 minimum and step; keys in groups of 32 tokens of
          one channel, values of 32 channels of one token. Its keys are those before RoPE, which is
          kinder to it than KIVI's own [arXiv 2401.18079]. Simulated: rounded, then computed with.
pca       the strongest principal axes of training rows, one basis a layer and kind, with as many
          fp16 coefficients as the bytes of the dual budget allow.
pursuit   the SAE's own dictionary, but codes by orthogonal matching pursuit [arXiv 2412.08890]: k
          times the atom most in line with what is left, then least squares over all chosen. At the
          same bytes and atoms it shows what the one-pass encoder loses; it takes k matmuls.
Nothing is fitted on the text that is scored. Non-goal: packed storage of the quantiser.
"""
import argparse
import functools
import math

import torch
import torch.nn.functional as F

import evaluate
import sta

FIT_TOKENS = 32_768

def quantise(x, live, kind, bits, group=32):
    """x (B, T, H, D) as KIVI keeps it; live (B, T) is False for what no group may see: sinks and
    padding."""
    rows = x.transpose(1, 3) if kind == "key" else x  # (B, D, H, T): groups along the last axis
    real = live[:, None, None] if kind == "key" else live[..., None, None]
    fill = -rows.shape[-1] % group

    def cut(other):  # (..., groups, group), with `other` where nothing is
        padded = F.pad(torch.where(real, rows, other), (0, fill), value=other)
        return padded.unflatten(-1, (-1, group))

    low = cut(math.inf).amin(-1, keepdim=True).half().float()
    high = cut(-math.inf).amax(-1, keepdim=True)
    step = ((high - low) / (2 ** bits - 1)).half().float()
    levels = ((cut(0.0) - low) / step.clamp_min(1e-6)).round().clamp(0, 2 ** bits - 1)
    rows = (levels * step + low).flatten(-2)[..., :rows.shape[-1]]
    return rows.transpose(1, 3) if kind == "key" else rows

def grouped(k, v, live, bits):
    """A function for sta.reconstruct."""
    return quantise(k, live, "key", bits), quantise(v, live, "value", bits)

def grouped_bytes(n_kv_heads, head_dim, bits, group=32):
    """Bytes a token of one layer: the levels, and an fp16 minimum and step a group."""
    return 2 * n_kv_heads * (head_dim * bits / 8 + 4 * math.ceil(head_dim / group))

class Axes:
    """A codec of one layer: coefficients along the strongest principal axes, in fp16."""

    def __init__(self, rows, ranks):
        """rows: keys, values (tokens, H, D) of a text; ranks: how many axes for each."""
        self.mean, self.axes = [], []  # (D,), (D, rank) for keys and for values
        for x, rank in zip(rows, ranks):
            x = x.flatten(0, 1).double()  # (N, D)
            square = (x - x.mean(0)).T @ (x - x.mean(0))
            self.mean.append(x.mean(0).float())
            self.axes.append(torch.linalg.eigh(square).eigenvectors.flip(-1)[:, :rank].float())

    def encode(self, k, v):
        return tuple(((x - mean) @ axes).half().flatten(-2)  # (..., H*rank)
                     for x, mean, axes in zip((k, v), self.mean, self.axes))

    def decode(self, stored):
        return tuple(z.float().unflatten(-1, (-1, axes.shape[1])) @ axes.T + mean
                     for z, mean, axes in zip(stored, self.mean, self.axes))

@torch.no_grad()
def pursue(sae, x, k):
    """TopKSAE.encode by orthogonal matching pursuit: x (..., D) -> z (..., k), signed, and idx."""
    target = (x / sae.scale - sae.b_dec).flatten(0, -2)  # (N, D)
    codes = [pick_atoms(rows, sae.W_dec, k) for rows in target.split(2048)]  # stays in cache
    z, idx = (torch.cat(parts).view(*x.shape[:-1], k) for parts in zip(*codes))
    return z, idx

def pick_atoms(target, atoms, k):
    """target (N, D), unit atoms (M, D) -> coefficients (N, k) of the chosen atoms idx (N, k)."""
    rest, picks = target, []
    span = target.new_empty(len(target), k, target.shape[1])  # the chosen, made orthonormal
    for j in range(k):
        picks.append((rest @ atoms.T).abs_().max(-1).indices)
        atom, known = atoms[picks[-1]], span[:, :j]  # (N, D), (N, j, D)
        atom = atom - ((known @ atom[..., None]).mT @ known)[:, 0]
        span[:, j] = F.normalize(atom, dim=-1)
        rest = rest - (rest * span[:, j]).sum(-1, keepdim=True) * span[:, j]
    idx = torch.stack(picks, -1)
    chosen = atoms[idx]  # (N, k, D)
    gram = chosen @ chosen.mT + 1e-6 * torch.eye(k, device=target.device)
    return torch.linalg.solve(gram, chosen @ target[..., None])[..., 0], idx

class Pursuit(sta.DualBudget):
    """The dual budget with pursued codes; decoding is the same."""

    def encode(self, k, v):
        z_key, idx_key = pursue(self.key_sae, k, self.budget.k_key)  # (..., H, k_key)
        z_val, idx_val = pursue(self.value_sae, v, self.budget.k_val)
        return (z_key.flatten(-2).half(), idx_key.flatten(-2).short(),
                z_val.flatten(-2).half(), idx_val.flatten(-2).short())

def training_windows(model, tokenizer, args):
    """Windows of the text that the SAEs were trained on."""
    folder, name = evaluate.find_saes(args.saes, args.model)
    spec = sta.load_sae(next(folder.glob("layer*.key")))[1]["settings"]["text"]
    text = sta.read_text(None if spec == "default" else spec, "train", name, 8 * FIT_TOKENS)
    return sta.token_windows(text, tokenizer, model, args.seq_len, 2048, FIT_TOKENS)

def rows(model, tokenizer, saes, args):
    """For evaluate.py: [Row]."""
    config = model.get_decoder().config
    shape, layers = sta.kv_shape(config), sorted({layer for layer, _ in saes})
    coded = layers or range(config.num_hidden_layers)
    found = [evaluate.Row(f"grouped {bits} bits",
                          dict.fromkeys(coded, functools.partial(grouped, bits=bits)),
                          layer_bytes=grouped_bytes(*shape, bits), method="grouped",
                          with_tasks=False)
             for bits in (2, 3, 4)]
    if not saes:
        return found
    budget = sta.Budget(args.k_key, args.k_val)
    kept = sta.harvest(model, training_windows(model, tokenizer, args), layers, args.sink)
    ranks = [min(shape[1], 2 * k) for k in budget]  # a coefficient takes half an atom's bytes
    axes = {layer: Axes([kept[layer, kind] for kind in sta.KINDS], ranks) for layer in layers}
    pursuit = {layer: Pursuit(saes[layer, "key"], saes[layer, "value"], budget)
               for layer in layers}
    size = sum(x.nbytes for codec in axes.values() for x in (*codec.mean, *codec.axes))
    atoms = sum(sae.W_dec.nbytes + sae.b_dec.nbytes for sae in saes.values())
    return [*found, evaluate.Row("pca", axes, once_bytes=size, with_tasks=False),
            evaluate.Row("pursuit", pursuit, tuple(budget), once_bytes=atoms,
                                   with_tasks=False)]

def main(argv=None):
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    raise sta.UsageError("this file adds rows to a table; run: python evaluate.py --rows rivals")

if __name__ == "__main__":
    sta.run(main)
