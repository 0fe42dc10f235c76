"""STA-Attention: key-value caches as sparse codes over semantic atoms. The method, in order.

Source: "Unlocking the Address Book: Dissecting the Sparse Semantic Structure of LLM Key-Value
Caches via Sparse Autoencoders", arXiv 2512.10547; the SAE's formulas are in arXiv 2601.17702.

    x     = one head's key (before RoPE, after any k_norm) or value                   (D,)
    z     = the k largest entries of ReLU((x/s - b_dec) W_enc + b_enc), and           (k,)
    idx   = their places in the dictionary: (z, idx) is the code of x                 (k,)
    x_hat = s (sum_j z_j W_dec[idx_j] + b_dec)                                        (D,)
    loss  = |x - x_hat|^2 / s^2 + AuxK/32, with s^2 = mean |x - mean(x)|^2
    dual budget: each key becomes its k_key strongest atoms, each value its k_val
    pursuit (not in paper): the same dictionary, atoms chosen one by one for what is left of x

Legend: B batch, T tokens, H kv heads, D head dim, N rows (B*T*H), M latents, k budget
Use:    with reconstruct(model, dual(saes, Budget(8, 16))): model.generate(...)
Sections: 1 the Top-K SAE, 2 where K and V live, 3 the budget curve and its elbow, 4 the dual
budget, 5 the compressed cache, 6 the fast path, 7 models, text, files. Read 1-4. Choices that the
paper's readable text leaves open say `not in paper`. Non-goal: training the language model.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import warnings
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

KINDS = ("key", "value")
ROTARY = ("llama", "mistral", "qwen2", "qwen3")  # the families of the compressed cache


class UsageError(Exception):
    """Bad input: one line that names the value, the limit and the likely fix."""


# ------------------------------------------------------------------ 1. the Top-K SAE

class TopKSAE(nn.Module):
    """Top-K sparse autoencoder for one layer's keys or values, shared by its kv heads.

    W_enc (D, M), b_enc (M,), W_dec (M, D) with unit rows, b_dec (D,); buffers: scale (), the s
    above, idle (M,), rows seen since each latent last fired, and metric (D, D), in which pursuit
    measures lengths. Everything in float32."""

    def __init__(self, head_dim, n_latents, generator=None):
        super().__init__()
        atoms = F.normalize(torch.randn(n_latents, head_dim, generator=generator), dim=-1)
        self.W_dec = nn.Parameter(atoms)
        self.W_enc = nn.Parameter(atoms.T.contiguous())  # tied, else latents die [Gao 2024]
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(head_dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("metric", torch.eye(head_dim))
        self.register_buffer("l1_weight", torch.tensor(0.05))  # used by l1_loss alone
        self.n_latents = n_latents
        self.pursuit = False  # True: encode by `pursue`

    @torch.no_grad()
    def centre(self, x):
        """Set b_dec and scale from rows x (N, D): inside, mean 0 and mean square norm 1."""
        n, total = add_up(x.new_tensor(len(x)), x.sum(0))
        spread, = add_up((x - total / n).square().sum())
        self.scale.copy_((spread / n).sqrt().clamp_min(1e-8))
        self.b_dec.copy_(total / n / self.scale)

    def encode(self, x, k):
        """x (..., D) -> z (..., k) >= 0 and idx (..., k), strongest first; in units of scale.

        The first j columns are the code at budget j. Raises UsageError unless 1 <= k <= M."""
        self.check(k)
        if self.pursuit:
            return self.pursue(x, k)
        z, idx = self.preactivations(x).topk(k, dim=-1)
        return F.relu(z), idx

    def check(self, k):
        if not 1 <= k <= self.n_latents:
            raise UsageError(f"k = {k}: a budget lies between 1 and n_latents = {self.n_latents}")

    def preactivations(self, x):
        return (x / self.scale - self.b_dec) @ self.W_enc + self.b_enc  # (..., M)

    def pursue(self, x, k):
        """encode by orthogonal matching pursuit: x (..., D) -> z (..., k), signed, idx (..., k).

        k times the atom most in line with what is left, then least squares over all chosen; slower
        than one matmul and much closer [arXiv 2412.08890]. Gradients flow through z, not idx."""
        target = self.to_metric(x).flatten(0, -2).detach()  # (N, D)
        atoms = F.normalize(self.W_dec @ self.metric, dim=-1).detach()  # (M, D)
        idx = torch.cat([self._pick(rows, atoms, k) for rows in target.split(2048)])  # in cache
        idx = idx.view(*x.shape[:-1], k)
        return self.least_squares(x, idx), idx

    def to_metric(self, x):
        return (x / self.scale - self.b_dec) @ self.metric  # (..., D)

    def least_squares(self, x, idx):
        """x (..., D), atoms idx (..., k) -> their best coefficients z (..., k), in the metric."""
        atoms = (self.W_dec @ self.metric)[idx]  # (..., k, D)
        gram = atoms @ atoms.mT + 1e-6 * torch.eye(idx.shape[-1], device=x.device)
        return torch.linalg.solve(gram, atoms @ self.to_metric(x)[..., None])[..., 0]

    def shorten(self, x, z, idx, k):
        """The code of x at a smaller budget k, from its code z, idx at a larger one."""
        idx = idx[..., :k]
        return (self.least_squares(x, idx) if self.pursuit else z[..., :k]), idx

    @torch.no_grad()
    def _pick(self, rest, atoms, k):
        span, picks = rest.new_empty(len(rest), k, rest.shape[-1]), []  # orthonormal (N, k, D)
        for j in range(k):
            picks.append((rest @ atoms.T).abs_().max(-1).indices)
            atom, known = atoms[picks[-1]], span[:, :j]
            atom = atom - ((known @ atom[..., None]).mT @ known)[:, 0]  # Gram-Schmidt
            span[:, j] = F.normalize(atom, dim=-1)
            rest = rest - (rest * span[:, j]).sum(-1, keepdim=True) * span[:, j]
        return torch.stack(picks, -1)

    def decode(self, z, idx):
        """z, idx (..., k) -> x_hat (..., D): a sum of k rows of W_dec, never a dense latent."""
        return _sum_atoms(z * self.scale, idx, self.W_dec) + self.b_dec * self.scale

    def forward(self, x, k):
        return self.decode(*self.encode(x, k))

    def loss(self, x, k, k_own, dead_window, rows=None, places=None):
        """Rows x (N, D) and this step's budget k -> (loss, error |x - x_hat|^2 / s^2 at k).

        Of several processes, x are the rows at `places` (N,) in a batch of `rows`, and their losses
        add up to that of the batch. A latent fires where it is chosen among the k_own strongest
        and above zero; those idle for more than dead_window rows are dead and learn by AuxK."""
        rows = rows or len(x)
        places = torch.arange(len(x), device=x.device) if places is None else places.to(x.device)
        target = x / self.scale
        z, idx, x_hat = sparse_forward(self, target, k)
        residual = target - x_hat  # (N, D)
        error = residual.square().sum() / rows
        self.fire(idx[:, :k_own][z[:, :k_own] > 0], rows)
        some = places % 4 == 0  # enough for AuxK, which costs more than the rest otherwise
        aux = self.auxk(target[some], residual[some].detach(), self.idle > dead_window)
        return error + aux / 32, error.detach()

    @torch.no_grad()
    def fire(self, idx, rows):
        """Note the latents idx that fired, in a batch of `rows`."""
        fired, = add_up(torch.zeros_like(self.b_enc).index_fill_(0, idx.flatten(), 1))
        self.idle.add_(rows).masked_fill_(fired > 0, 0)

    def pursuit_loss(self, x, k, rows=None):
        """Rows x (N, D) -> (loss, error in the metric) of codes by pursuit. At the least-squares z
        the error's gradient to the atoms is the one that holds z fixed, so z is."""
        rows = rows or len(x)
        with torch.no_grad():
            z, idx = self.pursue(x, k)
        self.fire(idx, rows)
        left = self.to_metric(x) - _sum_atoms(z, idx, self.W_dec) @ self.metric  # (N, D)
        error = left.square().sum() / rows
        return error, error.detach()

    @torch.no_grad()
    def set_metric(self, g):
        """From the loss's gradients g (N, D) to the rows: |error|^2 in the metric is half the plain
        one and half that along the gradients, (g . error)^2 in units of its mean.

        not in paper. It spares what attention feels: queries for keys, RoPE's slow pairs, W_o."""
        feels, axes = torch.linalg.eigh(g.T.double() @ g.double())  # (D,), (D, D)
        lengths = (feels / feels.mean() + 1).div(2).sqrt()
        self.metric.copy_((axes * lengths) @ axes.T)

    def l1_loss(self, x, k, rows=None, gain=0.03):
        """P1's rival, a ReLU autoencoder: rows x (N, D) -> (loss, error) with an L1 penalty whose
        weight follows the mean number of positive latents until that is k. Exact autograd."""
        rows = rows or len(x)
        z = F.relu(self.preactivations(x))  # (N, M)
        error = (x / self.scale - z @ self.W_dec - self.b_dec).square().sum() / rows
        with torch.no_grad():
            active, = add_up((z > 0).sum().float())
            self.l1_weight *= (active / rows / k).clamp(0.1, 10) ** gain
        self.fire((z > 0).any(0).nonzero(), rows)
        return error + self.l1_weight * z.sum() / rows, error.detach()

    def relu_code(self, x):
        """x (..., D) -> x_hat from every positive latent: the code of an SAE trained by l1_loss."""
        return (F.relu(self.preactivations(x)) @ self.W_dec + self.b_dec) * self.scale

    def auxk(self, target, residual, dead):
        """AuxK [Gao 2024, 2.3]: the best dead latents of x/s rebuild residual (N, D), in units of
        its variance and without bias, which gives them a gradient. Zero if nothing is dead.

        not in paper: their b_enc is raised, not learned; AuxK alone drives it so low that ReLU cuts
        the gradient for good (tiny's layer-2 keys: 30 % dead, under 1 % so)."""
        k_aux = min(residual.shape[-1] // 2, int(dead.sum()))
        if k_aux == 0:
            return residual.new_zeros(())
        with torch.no_grad():
            self.b_enc[dead] += 1e-3
        pre = (target - self.b_dec) @ self.W_enc[:, dead] + self.b_enc[dead].detach()
        z, chosen = pre.topk(k_aux, dim=-1)  # (N, k_aux), among the dead
        guess = _sum_atoms(F.relu(z), dead.nonzero().squeeze(-1)[chosen], self.W_dec)
        n, total, square = add_up(z.new_tensor(len(z)), residual.sum(0), residual.square().sum())
        spread = square - total.square().sum() / n  # n times the variance
        return (residual - guess).square().sum() / spread.clamp_min(1e-12)

    @torch.no_grad()
    def project_gradient(self):
        """Remove the part of W_dec's gradient along each atom: lengths are not learned."""
        along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)[:, None]  # (M, 1)
        self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def renormalise(self):
        """Unit atoms again, after the optimiser's step."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _sum_atoms(z, idx, atoms):
    """sum_j z_j atoms[idx_j]: z, idx (..., k), atoms (M, D) -> (..., D)."""
    z, flat = z.to(atoms.dtype).flatten(0, -2), idx.flatten(0, -2)  # (N, k)
    x = F.embedding_bag(flat, atoms, per_sample_weights=z, mode="sum")  # (N, D)
    return x.view(*idx.shape[:-1], atoms.shape[-1])


class Fidelity:
    """How well rows are reconstructed, streamed; sums in float64."""

    def __init__(self, n_latents=0):
        self.x_sum, self.sums = 0, 0
        self.fired = torch.zeros(n_latents, dtype=torch.bool)

    @torch.no_grad()
    def update(self, x, x_hat, z=None, idx=None):
        """x, x_hat (N, D), and the code z, idx (N, k) if there is one."""
        total = functools.partial(torch.sum, dtype=torch.float64)
        square, square_hat = x.square().sum(-1), x_hat.square().sum(-1)  # (N,)
        ratio = (square_hat / square.clamp_min(1e-24)).sqrt()
        cos = (x * x_hat).sum(-1) / (square * square_hat).sqrt().clamp_min(1e-24)
        active = torch.zeros(()) if z is None else z != 0
        self.x_sum = self.x_sum + total(x, 0)
        self.sums = self.sums + torch.stack([
            total(torch.ones_like(square)), total(square), total((x - x_hat).square()), total(cos),
            total(ratio), total(active)]).cpu()
        if z is not None:
            self.fired[idx[active].cpu()] = True

    def result(self):
        """fvu = sum |x - x_hat|^2 / sum |x - mean|^2 over all rows; cos (uncentred), rel_norm =
        |x_hat| / |x| and l0 (atoms above 0) are means; dead: share of latents no row fired."""
        n, square, error, cos, ratio, active = self.sums.tolist()
        spread = square - self.x_sum.square().sum().item() / n
        return {"fvu": error / max(spread, 1e-12), "cos": cos / n, "rel_norm": ratio / n,
                "l0": active / n, "dead": 1 - self.fired.double().mean().item(), "rows": int(n)}


# ------------------------------------------------------------------ 2. where K and V live

def kv_shape(config):
    """(n_kv_heads, head_dim) of a Hugging Face text config."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, dim


def kv_sites(model):
    """{(layer, kind): (module, view)} of a Hugging Face decoder: view(the module's output) is the
    keys or values as (B, T, H, D). Keys before RoPE, after any k_norm. Yi is llama, too.

    not in paper, which says "projections": RoPE would turn one semantic key into one copy a
    position. Raises UsageError for other model types."""
    decoder = model.get_decoder()
    config = decoder.config
    heads, dim = kv_shape(config)
    n_query = config.num_attention_heads * dim
    flat = lambda y: y.unflatten(-1, (heads, dim))  # (B, T, H*D) -> (B, T, H, D)
    in_head = lambda i, y: y.unflatten(-1, (heads, 3, dim))[..., i + 1, :]  # q, k, v a head
    after_q = lambda i, y: y[..., n_query:].unflatten(-1, (2, heads, dim))[..., i, :, :]  # q|k|v
    fused = lambda name, part: {kind: (name, functools.partial(part, i))
                                for i, kind in enumerate(KINDS)}
    plain = {"key": ("k_proj", flat), "value": ("v_proj", flat)}
    families = {
        "llama": plain, "mistral": plain, "qwen2": plain,
        "qwen3": {**plain, "key": ("k_norm", lambda y: y)},  # sees (B, T, H, D)
        "gemma3_text": {**plain, "key": ("k_norm", lambda y: y.transpose(1, 2))},  # (B, H, T, D)
        "olmo2": {**plain, "key": ("k_norm", flat)},
        "gpt_neox": fused("query_key_value", in_head), "phi3": fused("qkv_proj", after_q)}
    if config.model_type not in families:
        raise UsageError(f"model type {config.model_type!r} is not supported; supported types: "
                         f"{', '.join(families)} (add yours to kv_sites in sta.py)")
    attention = "attention" if config.model_type == "gpt_neox" else "self_attn"
    return {(i, kind): (getattr(getattr(layer, attention), name), view)
            for i, layer in enumerate(decoder.layers)
            for kind, (name, view) in families[config.model_type].items()}


@contextlib.contextmanager
def capture(model, layers=None):
    """`with capture(model) as rows: model(ids)` puts (B, T, H, D) into rows[layer, kind].

    layers: those to capture, None for all. The hooks are removed on every way out."""
    rows = {}
    with contextlib.ExitStack() as hooks:
        for key, (module, view) in kv_sites(model).items():
            if layers is None or key[0] in layers:
                def store(module, args, y, key=key, view=view):
                    rows[key] = view(y).detach()
                hooks.callback(module.register_forward_hook(store).remove)
        yield rows


# ------------------------------------------------------------------ 3. the budget curve

CURVE_KS = (1, 2, 4, 8, 16, 32, 64)  # the grid on which elbows are found
COST_KS = (*range(1, 21), 24, 28, 32, 40, 48)  # that of budgets by bytes


class BudgetCurve:
    """Fidelity of one SAE at each budget of ks, streamed: one encode serves them all."""

    def __init__(self, sae, ks=CURVE_KS):
        self.sae = sae
        most = len(sae.b_dec) // 2 if sae.pursuit else sae.n_latents
        self.at = {k: Fidelity(sae.n_latents) for k in sorted(set(ks)) if k <= most}

    @torch.no_grad()
    def update(self, x):
        """x (N, D)."""
        for rows in x.split(8192):
            z, idx = self.sae.encode(rows, max(self.at))
            for k, fidelity in self.at.items():
                code = self.sae.shorten(rows, z, idx, k)
                fidelity.update(rows, self.sae.decode(*code), *code)

    def result(self):
        """[{k, and the keys of Fidelity.result}] by rising k."""
        return [{"k": k, **fidelity.result()} for k, fidelity in self.at.items()]


def elbow(curve):
    """The semantic elbow: the k whose cosine lies furthest above the chord of the curve.

    Both axes scaled to [0, 1], k linear [Kneedle, Satopaa 2011]: it depends on the largest k
    measured, so state that. not in paper: the readable text gives no rule for its elbow."""
    first, last = curve[0], curve[-1]
    rise, run = max(last["cos"] - first["cos"], 1e-12), max(last["k"] - first["k"], 1)
    height = lambda p: (p["cos"] - first["cos"]) / rise - (p["k"] - first["k"]) / run
    return max(curve, key=height)["k"]


def loss_gradients(model, windows, layers, seed=0):
    """{(layer, kind): g (B, T, H, D)}, the gradient to every key and value of -log p(y) summed over
    windows (B, T), with y drawn from the model's own predictions.

    not in paper: what an error d of a vector costs. The mean of (g . d)^2 / 2, summed over a
    token's vectors, is the second-order rise of the KL from the dense model [Fisher information].
    """
    sites, parts = [(layer, kind) for layer in layers for kind in KINDS], []
    generator = torch.Generator(model.device).manual_seed(seed)
    for part in windows.split(max(1, 2048 // windows.shape[1])):
        added = {}

        def add_zero(x, live, key):
            added[key] = torch.zeros_like(x, requires_grad=True)
            return x + added[key]

        with reconstruct(model, {key: functools.partial(add_zero, key=key) for key in sites}):
            logits = model(part.to(model.device), use_cache=False).logits.flatten(0, 1).float()
        drawn = logits.detach().softmax(-1).multinomial(1, generator=generator).squeeze(-1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        parts.append({key: x.grad for key, x in added.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in sites}


@torch.no_grad()
def code_costs(sae, x, g, coef_bits=16):
    """{k: nats a row} of the codes of rows x (N, D), from the gradients g (N, D) of the loss."""
    most = min(len(sae.b_dec) // 2, sae.n_latents)
    costs = dict.fromkeys([k for k in COST_KS if k <= most], 0.0)
    for rows, gradients in zip(x.split(8192), g.split(8192)):
        code = sae.encode(rows, max(costs))
        for k in costs:
            z, idx = sae.shorten(rows, *code, k)
            error = sae.decode(round_coefficients(z, coef_bits), idx) - rows
            costs[k] += (gradients * error).sum(-1).square().sum().item() / (2 * len(x))
    return costs


def allocate(costs, size, limit):
    """Budgets by greed: {site: k}, of {site: {k: nats a token}}, size(k) bytes and a limit on their
    sum. The next bytes go where each lowers the loss most. Raises UsageError if none fit."""
    ks = {site: min(curve) for site, curve in costs.items()}
    left = limit - sum(map(size, ks.values()))
    if left < 0:
        raise UsageError(f"--budget bytes={limit:g}: want {limit - left:g} or more, one atom each")
    while True:
        steps = [((costs[site][k] - costs[site][j]) / (size(j) - size(k)), size(j) - size(k), site,
                  j) for site, k in ks.items() for j in costs[site] if j > k]
        steps = [step for step in steps if step[0] > 0 and step[1] <= left]
        if not steps:
            return ks
        _, more, site, j = max(steps)
        ks[site], left = j, left - more


# ------------------------------------------------------------------ 4. the dual budget

class Budget(NamedTuple):
    """Atoms a key and atoms a value; None leaves that kind dense."""
    k_key: int | None = 8
    k_val: int | None = 16


def coefficient_levels(z, bits):
    """z (..., k) -> whole numbers of steps (..., k), and the fp16 step (..., 1) that puts max|z| of
    a vector 2**(bits - 1) - 1 of them off zero."""
    step = (z.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half()
    return (z / step.float().clamp_min(1e-8)).round(), step


def round_coefficients(z, bits):
    """z (..., k) as it is stored: fp16, below 16 bits in steps, at 32 as it is. Gradient: z's."""
    if bits == 32:
        return z
    if bits == 16:
        return z + (z.half().float() - z).detach()
    levels, step = coefficient_levels(z, bits)
    return z + (levels * step.float() - z).detach()


def dual(saes, budget, coef_bits=16):
    """{(layer, kind): codec} for `reconstruct`: every row becomes the code of its k atoms.

    saes: {(layer, kind): TopKSAE}; budget: a Budget, or {layer: Budget}; coefficients as stored."""
    def codec(x, live, sae, k):
        z, idx = sae.encode(x, k)
        return sae.decode(round_coefficients(z, coef_bits), idx)

    ks = {(layer, kind): (budget[layer] if isinstance(budget, dict) else budget)[i]
          for layer, _ in saes for i, kind in enumerate(KINDS)}
    return {key: functools.partial(codec, sae=sae, k=ks[key])
            for key, sae in saes.items() if ks[key]}


def _call(args, kwargs):
    """Of a decoder's arguments: (ids, or something else, (B, T); mask; tokens in the cache)."""
    ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
    ids = kwargs["inputs_embeds"][..., 0] if ids is None else ids
    return ids, kwargs.get("attention_mask"), 0 if cache is None else cache.get_seq_length()


@contextlib.contextmanager
def reconstruct(model, codecs, sink=1):
    """Inside, `model` computes with replaced K and V: prefill, decode and generate alike.

    codecs: {(layer, kind): function (x (B, T, H, D) in float32, live (B, T)) -> x_hat}. The first
    `sink` real tokens of a sequence stay exact (not in paper; their norms are extreme, arXiv
    2309.17453); live is False there and at padding, which a codec that looks across tokens must
    not see. The hooks go on every way out. Raises UsageError for a layer not there."""
    sites, seen = kv_sites(model), {}
    for layer, _ in codecs.keys() - sites.keys():
        raise UsageError(f"layer {layer}: the model has layers 0 to {max(sites)[0]}")

    def find_live(module, args, kwargs):  # before the decoder runs; padding has no position
        ids, mask, past = _call(args, kwargs)
        if not (isinstance(mask, torch.Tensor) and mask.dim() == 2):  # else (B, past + T)
            mask = ids.new_ones(ids.shape[0], past + ids.shape[1])
        seen["live"] = (mask.long().cumsum(-1) > sink)[:, -ids.shape[1]:]  # (B, T)
        seen["live"] &= mask[:, -ids.shape[1]:].bool()

    def replace(module, args, y, codec, view):
        y = y.clone()
        x = view(y)  # (B, T, H, D), sharing y's memory
        live = seen["live"].to(x.device)
        x.copy_(torch.where(live[..., None, None], codec(x.float(), live).to(x.dtype), x))
        return y

    with contextlib.ExitStack() as hooks:
        handle = model.get_decoder().register_forward_pre_hook(find_live, with_kwargs=True)
        hooks.callback(handle.remove)
        for key, codec in codecs.items():
            module, view = sites[key]
            hook = functools.partial(replace, codec=codec, view=view)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def index_bits(n_latents, coef_bits=16):
    """Bits of an index. Raises UsageError if it and coef_bits below 16 do not pack into 16."""
    bits = (n_latents - 1).bit_length()
    if coef_bits < 16 and bits + coef_bits > 16:
        raise UsageError(f"coef_bits {coef_bits} and {n_latents} latents do not pack into 16 bits; "
                         f"want at most {16 - bits}, or 16")
    return bits


def vector_bytes(k, head_dim, n_latents, coef_bits=16):
    """Bytes of one vector. An atom: fp16 coefficient and int16 index (int32 above 65,536 latents);
    below 16 bits both in 16, and an fp16 step a vector. None: dense bf16."""
    index_bits(n_latents, coef_bits)
    if k is None:
        return 2 * head_dim
    if coef_bits < 16:
        return 2 + 2 * k
    return k * (coef_bits // 8 + (2 if n_latents <= 65536 else 4))


def bytes_per_token(budget, n_kv_heads, head_dim, n_latents, coef_bits=16):
    """Bytes one layer keeps of a coded token, K and V of all kv heads."""
    return n_kv_heads * sum(vector_bytes(k, head_dim, n_latents, coef_bits) for k in budget)


# ------------------------------------------------------------------ 5. the compressed cache

def rotate(x, cos, sin, out):
    """RoPE as the families of `compress` have it: x, out (B, H, T, D), cos and sin (B, T, D)."""
    (a, b), half = x.chunk(2, -1), x.shape[-1] // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]  # the second half is the same again
    out[..., :half] = torch.addcmul(a * cos, b, sin, value=-1)
    out[..., half:] = torch.addcmul(b * cos, a, sin)
    return out


def pack(z, idx, n_latents, coef_bits):
    """A code as it is stored: z in fp16 (32 bits: as it is) and idx in int16 (int32 above 65,536
    latents); below 16 an int16 an atom, coefficient above index, and the vector's fp16 step."""
    if coef_bits >= 16:
        return [z.half() if coef_bits == 16 else z,
                idx.int() if n_latents > 65536 else (idx - 32768).short()]
    levels, step = coefficient_levels(z, coef_bits)
    word = (levels.long() + 2 ** (coef_bits - 1)) << index_bits(n_latents)
    return [(word + idx - 32768).short(), step]


def unpack(code, n_latents, coef_bits):
    """Inverse of `pack` -> z, idx."""
    if coef_bits >= 16:
        return code[0].float(), code[1].int() if n_latents > 65536 else code[1].int() + 32768
    word, bits = code[0].int() + 32768, index_bits(n_latents)
    return ((word >> bits) - 2 ** (coef_bits - 1)) * code[1].float(), word & (2 ** bits - 1)


class CodedLayer(DynamicLayer):
    """One layer of STACache: its oldest tokens as codes, the newest exact, in `kept`, a dict of
    tensors (B, H, tokens, ...); sinks among the former are kept exact, too. The first of the layers
    holds the positions of all slots, (B, 1, slots), for the others."""

    def __init__(self, cache, saes, budget, coef_bits):
        super().__init__()
        self.cache, self.saes, self.budget, self.coef_bits = cache, saes, budget, coef_bits
        self.reset()

    def reset(self):
        self.is_initialized, self.kept = False, {}

    def get_seq_length(self):
        return sum(self.kept[name].shape[2] for name in ("key code 0", "key exact")
                   if self.is_initialized)

    def change(self, how):
        """Each stored tensor becomes how(tensor, its name)."""
        self.kept = {name: how(tensor, name) for name, tensor in self.kept.items()}

    def reorder_cache(self, beam_idx):
        self.change(lambda x, name: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.change(lambda x, name: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove):
        """Forget the newest -tokens_to_remove tokens: exact ones first, then codes."""
        if self.is_initialized:
            exact, total = self.kept["key exact"].shape[2], self.get_seq_length()
            left = {"exact": max(0, exact + tokens_to_remove), "sink": None,
                    "code": max(0, total - exact + min(0, exact + tokens_to_remove)),
                    "positions": max(0, total + tokens_to_remove)}
            self.change(lambda x, name: x[:, :, :left[name.split()[1]]].clone())

    def to_code(self, kind, x):
        """x (B, H, T, D) -> tensors (B, H, T, ...) to be stored."""
        k = self.budget[KINDS.index(kind)]
        return [x] if k is None else pack(*self.saes[kind].encode(x.float(), k),
                                          self.saes[kind].n_latents, self.coef_bits)

    def code(self, kind):
        """z, idx (B, H, T, k) of all that is coded, or [x] if that kind stays dense."""
        stored = [x for name, x in self.kept.items() if name.startswith(f"{kind} code")]
        if self.budget[KINDS.index(kind)] is None:
            return stored
        return unpack(stored, self.saes[kind].n_latents, self.coef_bits)

    def update(self, keys, values, *args, **kwargs):
        """New keys (after RoPE) and values (B, H, T, D) -> all of them, as attention sees them."""
        if self.cache.now is None:
            raise UsageError("this cache works only inside `with compress`")
        out, past = [], self.get_seq_length()
        cos, sin, first = (x.to(keys.device) for x in self.cache.now)  # (B, slots, D) twice, (B,)
        for kind, x in zip(KINDS, (keys, values)):
            if not self.is_initialized:
                self.kept[f"{kind} sink"] = x.new_zeros(*x.shape[:2], self.cache.sink, x.shape[3])
                self.kept[f"{kind} exact"] = x[:, :, :0]
                self.kept |= {f"{kind} code {i}": part
                              for i, part in enumerate(self.to_code(kind, x[:, :, :0]))}
            exact = torch.cat([self.kept[f"{kind} exact"], x], 2)
            start = past + x.shape[2] - exact.shape[2]  # the slots before are codes
            end = max(start, past + x.shape[2] - self.cache.recent)  # and will be
            leaving, exact = exact[:, :, :end - start], exact[:, :, end - start:].clone()
            self.kept[f"{kind} exact"] = exact
            if start < self.cache.last_sink:
                self._keep_sinks(kind, leaving, first - start)
            if end > start:
                if kind == "key":  # as it was before RoPE
                    c, s = cos[:, start:end].float(), sin[:, start:end].float()
                    leaving = rotate(leaving.float(), c, -s, leaving.new_empty(
                        leaving.shape, dtype=c.dtype))
                    leaving = (leaving / (c.square() + s.square())[:, None]).to(x.dtype)
                for i, part in enumerate(self.to_code(kind, leaving)):
                    name = f"{kind} code {i}"
                    self.kept[name] = torch.cat([self.kept[name], part], 2)
            code = self.code(kind)
            old = self.saes[kind].decode(*code) if len(code) == 2 else code[0]  # (B, H, end, D)
            out.append(x.new_empty(*x.shape[:2], past + x.shape[2], x.shape[3]))
            out[-1][:, :, end:] = exact
            if kind == "key":
                rotate(old, cos[:, :end], sin[:, :end], out[-1][:, :, :end])
            else:
                out[-1][:, :, :end] = old
            self._put_sinks(kind, out[-1][:, :, :end], first)
        self.is_initialized = True
        return out

    def _keep_sinks(self, kind, x, first):
        """Of x (B, H, T, D), keep those of the `sink` tokens from slot first (B,) on."""
        kept = self.kept[f"{kind} sink"]  # (B, H, S, D)
        at = first[:, None] + torch.arange(kept.shape[2], device=x.device)  # (B, S)
        there = ((at >= 0) & (at < x.shape[2]))[:, None, :, None]
        if x.shape[2] and kept.shape[2]:
            at = at.clamp(0, x.shape[2] - 1)[:, None, :, None].expand_as(kept)
            self.kept[f"{kind} sink"] = torch.where(there, x.gather(2, at), kept)

    def _put_sinks(self, kind, x, first):
        """Into x (B, H, T, D) the sinks, in place of their codes."""
        kept = self.kept[f"{kind} sink"]  # (B, H, S, D)
        end = min(x.shape[2], self.cache.last_sink)
        if end and kept.shape[2]:
            which = torch.arange(end, device=x.device) - first[:, None]  # (B, end)
            sink = ((which >= 0) & (which < kept.shape[2]))[:, None, :, None]
            at = which.clamp(0, kept.shape[2] - 1)[:, None, :, None]
            at = at.expand(*x.shape[:2], end, x.shape[3])
            x[:, :, :end] = torch.where(sink, kept.gather(2, at), x[:, :, :end])


def cache_bytes(cache):
    """Bytes of every tensor that a cache of transformers stores, codes or dense."""
    tensors = [x for layer in cache.layers for x in (
        layer.kept.values() if isinstance(layer, CodedLayer) else (layer.keys, layer.values))]
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


class STACache(Cache):
    """A cache of transformers that stores codes, made by `compress`."""

    def __init__(self, sink, recent):
        super().__init__(layers=[])
        self.sink, self.recent, self.now = sink, recent, None

    def nbytes(self):
        return cache_bytes(self)

    def reset(self):
        super().reset()
        self.layers[:] = [layer if isinstance(layer, CodedLayer) else DynamicLayer()
                          for layer in self.layers]  # transformers 5.17 only fills those with zeros


@contextlib.contextmanager
def compress(model, saes, budget, sink=4, recent=128, coef_bits=16):
    """`with compress(model, saes, budget) as cache: model.generate(..., past_key_values=cache)`.

    saes: {(layer, kind): TopKSAE}; budget: a Budget, or {layer: Budget}. Exact are the first `sink`
    real tokens of a sequence and its newest `recent`: a token is coded once it is `recent` old. A
    chunk of several tokens is first stored, then attended to, so its older ones are seen as codes
    by all of it. Layers without SAEs stay dense. Raises UsageError for families whose RoPE it
    cannot undo."""
    decoder = model.get_decoder()
    config, rope = decoder.config, getattr(decoder.config, "rope_parameters", None) or {}
    kind_of_rope = rope.get("rope_type", "default")
    if config.model_type not in ROTARY or kind_of_rope not in ("default", "linear", "llama3"):
        raise UsageError(f"the compressed cache takes {', '.join(ROTARY)} with plain RoPE; this is "
                         f"{config.model_type} with {kind_of_rope}")
    if not saes:
        raise UsageError("no SAEs to compress with")
    for sae in saes.values():
        index_bits(sae.n_latents, coef_bits)
    cache, begun = STACache(sink, recent), {}
    by_layer = budget if isinstance(budget, dict) else {layer: budget for layer, _ in saes}
    cache.layers += [
        CodedLayer(cache, {kind: saes[layer, kind] for kind in KINDS}, by_layer[layer], coef_bits)
        if (layer, "key") in saes else DynamicLayer() for layer in range(config.num_hidden_layers)]
    holder = cache.layers[min(saes)[0]]  # of the positions

    def begin(module, args, kwargs):  # of the decoder, before it runs
        if kwargs.get("past_key_values") is not cache:
            raise UsageError("inside compress, give the model past_key_values=the cache")
        ids, mask, past = _call(args, kwargs)
        slots = torch.arange(past + ids.shape[1], device=ids.device)
        begun["first"] = torch.zeros_like(ids[:, 0], dtype=torch.long)
        if isinstance(mask, torch.Tensor):
            if mask.dim() != 2:
                raise UsageError("the compressed cache takes a mask (batch, tokens)")
            begun["first"] = torch.where(mask.bool(), slots, len(slots)).amin(1)  # (B,)
        cache.last_sink = int(begun["first"].max()) + sink

    def turn(module, args, kwargs, output):  # of RoPE: the angles of all slots
        new = kwargs.get("position_ids", args[-1]).int().expand(len(begun["first"]), -1)
        old = holder.kept.get("all positions", new[:, None, :0])
        holder.kept["all positions"] = torch.cat([old.to(new.device), new[:, None]], 2)
        cache.now = *module.forward(args[0], holder.kept["all positions"][:, 0]), begun["first"]

    def end(module, args, output):
        cache.now = None

    hooks = [decoder.register_forward_pre_hook(begin, with_kwargs=True),
             decoder.rotary_emb.register_forward_hook(turn, with_kwargs=True),
             decoder.register_forward_hook(end)]
    try:
        yield cache
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------ 6. the fast path

@torch.no_grad()
def top_k(x, W, b, k):
    """The k largest of x W + b and their columns, by falling size: x (N, D), W (D, M) -> (N, k).

    On a CPU by blocks of rows, which stay in its cache, and in two rounds: the k largest of a row
    lie in those k of its M/8 groups whose maxima are largest. No gradient."""
    if x.is_cuda:
        return torch.addmm(b, x, W).topk(k)
    blocks, step = [], W.shape[1] // 8
    two_rounds = step >= 2 * k and W.shape[1] % 8 == 0
    for rows in x.split(256):
        pre = torch.addmm(b, rows, W).to(x.dtype)  # (n, M)
        if two_rounds:
            grouped = pre.view(len(rows), 8, step)  # a group: columns g, g + step, g + 2 step, ...
            group = _largest(grouped.amax(1), k)  # (n, k)
            pre = grouped.gather(2, group[:, None].expand(-1, 8, -1)).flatten(1)  # (n, 8k)
        at = _largest(pre, k)
        z, order = pre.gather(1, at).sort(descending=True)
        at = at.gather(1, order)  # (n, k)
        blocks.append((z, at // k * step + group.gather(1, at % k) if two_rounds else at))
    return tuple(torch.cat(parts) for parts in zip(*blocks))


def _largest(x, k):
    """Columns of the k largest of each row, in any order. numpy is faster, but has one thread."""
    if torch.get_num_threads() <= 2:
        return torch.from_numpy(numpy.argpartition(x.numpy(), -k)[:, -k:])
    return x.topk(k, sorted=False).indices


class SparseTopK(torch.autograd.Function):
    """encode for training: the same code, with gradients that touch the chosen latents only.

    x (N, D) in units of scale, b_dec (D,), W_enc (D, M), b_enc (M,), k -> z, idx (N, k), and for
    `_sum_rows` the picks N*k in order of their latents and where each latent's begin (M,)."""

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, b_enc, k):
        x = x - b_dec
        z, idx = top_k(x, W_enc, b_enc, k)
        z = F.relu(z).to(x.dtype)
        flat, counts = idx.flatten(), idx.flatten().bincount(minlength=len(b_enc))
        order, start = flat.argsort(stable=True), counts.cumsum(0) - counts
        ctx.save_for_backward(x, W_enc, z, idx, order, start)
        ctx.mark_non_differentiable(idx, order, start)
        return z, idx, order, start

    @staticmethod
    def backward(ctx, dz, *_):
        x, W_enc, z, idx, order, start = ctx.saved_tensors
        dz = dz * (z > 0)
        dW = _sum_rows(dz, x, order, start)  # (M, D)
        db = torch.zeros_like(dW[:, 0]).index_add_(0, idx.flatten(), dz.flatten())
        dx = _sum_atoms(dz, idx, W_enc.T.contiguous()) if ctx.needs_input_grad[0] else None
        return dx, -(W_enc @ db), dW.T, db, None


class SumAtoms(torch.autograd.Function):
    """_sum_atoms for training, with the sparse gradient to the atoms: z, idx (N, k), atoms (M, D),
    order, start as SparseTopK gives them -> (N, D)."""

    @staticmethod
    def forward(ctx, z, idx, atoms, order, start):
        with torch.enable_grad():  # embedding_bag's own gradient to z is fast
            ctx.z = z.detach().requires_grad_()
            ctx.y = _sum_atoms(ctx.z, idx, atoms.detach())
        ctx.save_for_backward(order, start)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, dy):
        dz, = torch.autograd.grad(ctx.y, ctx.z, dy, retain_graph=True)
        return dz, None, _sum_rows(ctx.z.detach(), dy.contiguous(), *ctx.saved_tensors), None, None


def _sum_rows(z, rows, order, start):
    """(M, D): for each latent the sum of the rows (N, D) that chose it, times their z (N, k). A bag
    of rows for each latent: decode, turned."""
    return F.embedding_bag(order // z.shape[1], rows, start, mode="sum",
                           per_sample_weights=z.flatten()[order])


def sparse_forward(sae, x, k):
    """Rows x (N, D) in units of scale -> z, idx (N, k), x_hat (N, D), with sparse gradients."""
    z, idx, *picks = SparseTopK.apply(x, sae.b_dec, sae.W_enc, sae.b_enc, k)
    return z, idx, SumAtoms.apply(z, idx, sae.W_dec, *picks) + sae.b_dec


def sparse_encode(sae, x, k):
    """TopKSAE.encode of one pass, with the gradients of SparseTopK."""
    rows = (x / sae.scale).flatten(0, -2)  # (N, D)
    z, idx, *_ = SparseTopK.apply(rows, sae.b_dec, sae.W_enc, sae.b_enc, k)
    return z.view(*x.shape[:-1], k), idx.view(*x.shape[:-1], k)


def fast_encode(sae, x, k):
    """TopKSAE.encode of one pass by `top_k`, without gradients."""
    sae.check(k)
    z, idx = top_k((x / sae.scale - sae.b_dec).flatten(0, -2), sae.W_enc, sae.b_enc, k)
    return F.relu(z).view(*x.shape[:-1], k), idx.view(*x.shape[:-1], k)


def speed_up(saes, compiled):
    """Give SAEs of one pass faster twins of encode and decode, with the same signatures and values:
    compiled as one graph each, shared by all SAEs of a shape; else `fast_encode`.

    Warns, and compiles nothing, where there is no compiler."""
    encode, decode = fast_encode, TopKSAE.decode
    if compiled:
        graph = torch.compile(TopKSAE.encode, fullgraph=True)

        def compiled_encode(sae, x, k):
            sae.check(k)  # a graph cannot raise it
            return graph(sae, x, k)

        try:
            torch.compile(lambda x: x + 1)(next(iter(saes.values())).b_dec)
            encode, decode = compiled_encode, torch.compile(decode, fullgraph=True)
        except Exception as error:  # of many kinds: no C++ compiler, no Triton, no support
            warnings.warn(f"nothing is compiled: {type(error).__name__}; computing step by step")
    for sae in (sae for sae in saes.values() if not sae.pursuit):
        sae.encode, sae.decode = functools.partial(encode, sae), functools.partial(decode, sae)


def add_up(*tensors):
    """The sums of tensors over all processes of torchrun, which all have to call it; themselves if
    there is one. Raises UsageError if another process is gone."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([x.flatten() for x in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise UsageError("another process of this run is gone; run it again with --resume "
                         f"({str(error).splitlines()[0]})") from None
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


# ------------------------------------------------------------------ 7. models, text, files

HERE = pathlib.Path(__file__).resolve().parent
MODELS = {"tiny": str(HERE / "tiny"), "yi-6b": "01-ai/Yi-6B",
          "mistral-7b": "mistralai/Mistral-7B-v0.1", "llama-2-7b": "meta-llama/Llama-2-7b-hf",
          "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-32b": "Qwen/Qwen2.5-32B",
          "smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}
WIKITEXT = {"train": "Salesforce/wikitext:wikitext-103-raw-v1",
            "valid": "Salesforce/wikitext:wikitext-2-raw-v1:test"}


def run(main):
    """Run a script's main: bad input ends in one line and exit status 2, Ctrl-C in 130."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    try:
        main()
    except UsageError as error:
        print("error:", " ".join(str(error).split())[:500], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint, if any, is kept", file=sys.stderr)
        sys.exit(130)


def site_devices(model, layers=None):
    """{(layer, kind): the torch.device that computes it}."""
    return {key: next(module.parameters()).device for key, (module, _) in kv_sites(model).items()
            if layers is None or key[0] in layers}


def pick_device(device, dtype):
    """(torch.device, torch.dtype) from --device and --dtype, printed with the reason. Under
    torchrun each process has a GPU of its own."""
    gpu = torch.cuda.is_available()
    best = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    if not re.fullmatch(r"cpu|auto" + r"|cuda(:\d+)?" * gpu, device or "auto"):
        raise UsageError(f"--device {device}: not on this machine; leave it out to use {best}")
    reason = "asked for" if device else "a GPU was found" if gpu else "no GPU was found"
    device = best if device in (None, "auto", "cuda") else device
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    print(f"device {device} ({reason}); model in {dtype}, SAEs in float32")
    return torch.device(device), getattr(torch, dtype)


def parse_layers(spec, n_layers):
    """'all', '12', '0-7' or '3,9' -> sorted layer numbers, each below n_layers."""
    try:
        parts = [part.split("-") for part in spec.replace("all", f"0-{n_layers - 1}").split(",")]
        layers = sorted({i for p in parts for i in range(int(p[0]), int(p[-1]) + 1)})
        if layers and layers[-1] < n_layers:
            return layers
    except ValueError:
        pass
    raise UsageError(f"--layer {spec}: want all, 12, 0-7 or 3,9; the model has layers 0 to "
                     f"{n_layers - 1}")


def slug(name):
    """The name that SAEs and results of a model are filed under."""
    return name if name in MODELS else pathlib.Path(name).resolve().name.lower()


def load_model(name, device, dtype, layers="all", last_only=False, spread=False):
    """--model and --layer -> (model in eval mode, tokenizer, layer numbers).

    name: a key of MODELS, a hub id or a folder. last_only: load no layer above the last chosen.
    spread: over all GPUs, by accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()  # else a table of the layers left out on purpose
    logging.disable_progress_bar()
    hub_id = re.fullmatch(r"[\w-][^/]*/[^/]+", name)
    if name not in MODELS and not os.path.isdir(name) and not hub_id:
        raise UsageError(f"--model {name}: want a folder, a hub id (owner/name) or one of "
                         f"{', '.join(MODELS)}")
    source = MODELS.get(name, name)
    try:
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config()
        layers = parse_layers(layers, text.num_hidden_layers)
        if last_only:
            text.num_hidden_layers = layers[-1] + 1
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:layers[-1] + 1]
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True,
            device_map="auto" if spread else None)
    except UsageError:
        raise
    except Exception as error:  # no hub, no such name, gated, or a corrupt file: many kinds
        raise UsageError(f"--model {name}: cannot be loaded; check the name, and that the hub is "
                         "reachable and the model not gated "
                         f"({type(error).__name__}: {error})") from None
    if info["missing_keys"]:
        raise UsageError(f"--model {name}: its files lack {sorted(info['missing_keys'])[0]}")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(f"--model {name}: does not fit on the GPUs together")
    return (model if spread else model.to(device)).eval().requires_grad_(False), tokenizer, layers


def window_length(model, seq_len, default):
    """--seq-len, or `default` if the model takes that many; raises UsageError over its limit."""
    limit = getattr(model.get_decoder().config, "max_position_embeddings", default)
    seq_len = min(default, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UsageError(f"--seq-len {seq_len}: want 2 to the model's limit of {limit}")
    return seq_len


def fingerprint(model):
    """A hash of the first value projection: tells models of one shape apart."""
    weight = kv_sites(model)[0, "value"][0].weight.bfloat16().cpu().view(torch.int16)
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:12]


def read_text(spec, split, model_name, max_chars=sys.maxsize):
    """--text -> str: a UTF-8 file, or a hub data set owner/name[:config[:split]] whose documents
    are joined by blank lines. None: tiny's own, else WikiText; split "train" or "valid"."""
    if spec is None:
        spec = str(HERE / "tiny" / f"{split}.txt") if model_name == "tiny" else WIKITEXT[split]
    text, problem = [], "empty"
    try:
        if os.path.isfile(spec):
            parts = open(spec, encoding="utf-8")
        else:
            from datasets import load_dataset  # optional: pip install datasets
            name, config, part = (spec.split(":") + [None, None])[:3]
            part = part or {"train": "train", "valid": "test"}[split]
            rows = load_dataset(name, config, split=part, streaming=True)
            parts = (row["text"] + "\n\n" for row in rows)
        for part in parts:
            text.append(part)
            max_chars -= len(part)
            if max_chars <= 0:
                break
    except UnicodeDecodeError as error:
        text, problem = [], f"not UTF-8 ({error.reason}); convert it"
    except Exception as error:  # of many kinds: no package, no connection, no such name or column
        problem = f"no file; as a data set it cannot be loaded ({type(error).__name__}: {error})"
        text = []
    text = "".join(text)
    if not text.strip():
        raise UsageError(f"--text {spec}: {problem}")
    return text


def write_atomic(path, data):
    """Write bytes or str under a temporary name, then rename: the file is the old or the new."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror}; nothing was replaced") from None


def save_sae(folder, sae, metadata):
    """cfg.json and sae_weights.safetensors in the layout of SAELens 6. The scale is folded into
    the biases: ReLU is homogeneous, so z in units of x and s = 1 give the same function."""
    from safetensors.torch import save
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc * sae.scale,
               "W_dec": sae.W_dec, "b_dec": sae.b_dec * sae.scale}
    if sae.pursuit:
        weights["metric"] = sae.metric
    names = {"l1": "standard", "pursuit": "orthogonal_matching_pursuit"}  # the latter is ours
    cfg = {"architecture": names.get(metadata.get("sparsity"), "topk"), "d_in": len(sae.b_dec),
           "d_sae": sae.n_latents, "k": metadata["k"], "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "normalize_activations": "none",
           "metadata": {"sae_lens_version": "6.54.0", **metadata}}
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    write_atomic(folder / "sae_weights.safetensors", save(weights))
    write_atomic(folder / "cfg.json", json.dumps(cfg, indent=1) + "\n")  # last: now it is whole


def load_sae(folder):
    """(TopKSAE, metadata) from a folder that `save_sae` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        sae = TopKSAE(cfg["d_in"], cfg["d_sae"])
        weights = load((folder / "sae_weights.safetensors").read_bytes())
        sae.load_state_dict({**dict(sae.named_buffers()), **weights})
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"{folder}: missing, truncated or corrupt; train it again "
                         f"({type(error).__name__}: {error})") from None
    sae.pursuit = cfg["metadata"].get("sparsity") == "pursuit"
    return sae.requires_grad_(False), cfg["metadata"]


def load_saes(folder, model, layers=None):
    """({(layer, kind): TopKSAE} on the model's device, {same keys: metadata}), folder/layer*.*.

    Raises UsageError if one is absent, corrupt, or of another model."""
    folder, mark = pathlib.Path(folder), fingerprint(model)
    found = {int(path.parent.name[5:].split(".")[0]) for path in folder.glob("layer*.*/cfg.json")}
    saes, about, devices = {}, {}, site_devices(model)
    for layer in sorted(found) if layers is None else layers:
        if layer not in found:
            raise UsageError(f"{folder}: no SAEs of layer {layer}, but of {sorted(found)}")
        for kind in KINDS:
            sae, metadata = load_sae(folder / f"layer{layer}.{kind}")
            if metadata.get("fingerprint") != mark:
                raise UsageError(f"{folder}: SAEs of {metadata.get('model')}, not of this model")
            saes[layer, kind], about[layer, kind] = sae.to(devices[layer, kind]), metadata
    if not saes:
        raise UsageError(f"{folder}: no SAEs here")
    return saes, about


def load_budgets(folder, layers):
    """{layer: Budget} that train_sae.py --budget wrote beside the SAEs; None if it wrote none."""
    path = pathlib.Path(folder) / "budget.json"
    try:
        found = json.loads(path.read_text())["k"]
        return {layer: Budget(*found[str(layer)]) for layer in layers}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: corrupt, or without a layer; make it again by train_sae.py "
                         f"--budget ({type(error).__name__}: {error})") from None
