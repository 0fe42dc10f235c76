"""What the one-pass encoder loses: codes by pursuit over the SAE's own dictionary, as a row.

    python evaluate.py --rows pursuit

Orthogonal matching pursuit [for KV caches: Lexico, arXiv 2412.08890]: k times the atom most in line
with what is left, then least squares over all chosen. Same dictionary, bytes, atoms and decoder as
the dual budget; the difference is the encoder's. It takes k matmuls instead of one. Verdict
(SmolLM2, SAEs of `beyond.sparse --tokens 1000000 --n-latents 4096 --lr 0.004`): 1.118 of dense
perplexity where one pass has 1.431, on other prose 1.222 and 2.150.
"""
import argparse

import torch
import torch.nn.functional as F

import evaluate
import sta

@torch.no_grad()
def pursue(sae, x, k):
    """TopKSAE.encode by orthogonal matching pursuit: x (..., D) -> z (..., k), signed, and idx."""
    target = (x / sae.scale - sae.b_dec).flatten(0, -2)  # (N, D)
    n_rows = max(1, 2**21 // sae.n_latents)  # whose products with all atoms stay in cache
    codes = [pick_atoms(rows, sae.W_dec, k) for rows in target.split(n_rows)]
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

    def encode(self, keys, values):
        z_key, idx_key = pursue(self.key_sae, keys, self.budget.k_key)  # (..., H, k_key)
        z_val, idx_val = pursue(self.value_sae, values, self.budget.k_val)
        return (z_key.flatten(-2).half(), idx_key.flatten(-2).short(),
                z_val.flatten(-2).half(), idx_val.flatten(-2).short())

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: [Row]."""
    if not saes:
        raise sta.UsageError("--rows pursuit: needs SAEs; first run: python train_sae.py")
    codecs = {layer: Pursuit(codec.key_sae, codec.value_sae, codec.budget) for layer, codec in
              evaluate.dual_codecs(saes, args.k_key, args.k_val).items()}
    return [evaluate.Row("pursuit", codecs, (args.k_key, args.k_val), with_tasks=False,
                         once_bytes=evaluate.dictionary_bytes(saes, *sta.KINDS))]

def main(argv=None):
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    raise sta.UsageError("this file adds a row to a table; run: python evaluate.py --rows pursuit")

if __name__ == "__main__":
    sta.run(main)
