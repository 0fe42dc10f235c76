"""Training with a sparse gradient: the same SAEs, and a step that needs one large matmul, not two.

    python -m beyond.sparse --model yi-6b --layer 12      # options are those of train_sae.py

Plain autograd multiplies the rows with a gradient (N, M) that is zero but for k entries a row. Here
each latent's gradient is the sum of the rows that chose it, times their weights. Equal to plain
autograd up to the order of summation (tested). Against it a step takes, on 2 cores (`python -m
beyond.benchmark`), about as long at tiny's shape and two thirds of the time at (D, M, k) = (512,
4096, 32). Non-goal: the decoder, whose embedding_bag has a sparse gradient already.
"""
import torch
import torch.nn.functional as F

import sta
import train_sae

class TopKOfMatmul(torch.autograd.Function):
    """The k largest of x W + b, for rows x (N, D), with a gradient to W that costs no matmul."""
    @staticmethod
    def forward(ctx, x, W, b, k):
        z, idx = torch.addmm(b, x, W).topk(k, dim=-1)  # (N, k)
        ctx.save_for_backward(x, idx)
        ctx.mark_non_differentiable(idx)
        ctx.n_latents = len(b)
        return z, idx

    @staticmethod
    def backward(ctx, dz, _):
        x, idx = ctx.saved_tensors
        order = idx.flatten().argsort(stable=True)  # the N*k picks, by latent
        counts = idx.flatten().bincount(minlength=ctx.n_latents)  # (M,)
        dz = dz.flatten()[order]
        first = counts.cumsum(0) - counts  # of each latent's picks
        dW = F.embedding_bag(order // idx.shape[1], x, first, mode="sum", per_sample_weights=dz)
        db = dz.new_zeros(ctx.n_latents).index_add_(0, idx.flatten()[order], dz)
        return None, dW.T, db, None

class SparseSAE(sta.TopKSAE):
    """A TopKSAE whose encode has the sparse gradient, for rows x (N, D) that need none."""

    def encode(self, x, k):
        if not torch.is_grad_enabled() or x.dim() != 2:
            return super().encode(x, k)
        bias = self.b_enc - self.b_dec @ self.W_enc
        z, idx = TopKOfMatmul.apply(x / self.scale, self.W_enc, bias, k)
        return F.relu(z), idx

def main(argv=None):
    train_sae.main(argv, train_sae.PerHead(SparseSAE), __doc__)

if __name__ == "__main__":
    sta.run(main)
