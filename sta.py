"""STA-Attention: a language model's key-value cache as semantic atoms. The method, in order.

Source: "Unlocking the Address Book: Dissecting the Sparse Semantic Structure of LLM Key-Value
Caches via Sparse Autoencoders", arXiv 2512.10547; the SAE's formulas are in arXiv 2601.17702.

    x      = the key (before RoPE) or value of head h at one token                    (D,)
    z, idx = the k largest of ReLU(((x - b_dec[h]) / s) W_enc + b_enc), and their indices:
             the code of x                                                            (k,)
    x_hat  = s sum_j z_j W_dec[idx_j] + b_dec[h]                                      (D,)
    b_dec[h] = the mean of head h;  s^2 = the mean of (x - b_dec[h])^2 over vectors and coordinates
    loss   = e_k + e_2k / 8, a mean over vectors; e_k = |x - x_hat|^2 / (s^2 D) at budget k
    dual budget: a key becomes its k_key = 8 strongest atoms, a value its k_val = 16, stored as
             fp16 coefficients z and int16 indices idx

Keys are coded before RoPE, which turns a key by its position: after it, one meaning would be a
different vector at each position, and would need different atoms. (not in paper, which only says
"projections".)

Legend: B batch, T tokens, H kv heads, D head dim, M latents (atoms), N vectors, k budget
Use:    with reconstruct(model, {layer: DualBudget(key_sae, value_sae)}): model.generate(...)
Sections: 1 the Top-K SAE, 2 fidelity and the elbow, 3 the dual budget, 4 in the model; the hooks
          below it, 5 the fast path. You can stop after `reconstruct`: the rest is plumbing.
What the paper's text leaves open is marked `not in paper`; [Gao] is Gao et al. 2024, "Scaling and
evaluating sparse autoencoders", arXiv 2406.04093. Non-goals: training the model itself; loading
models, text and files (support/).
"""
import contextlib
import functools
import inspect
import types
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("key", "value")

class UsageError(ValueError):
    """Bad input: one line that names the value, the limit and the likely fix."""

# ------------------------------------------------------------------ 1. the Top-K SAE
class TopKSAE(nn.Module):
    """Top-K sparse autoencoder of one layer's keys or values, shared by the layer's kv heads.
    All tensors are float32:
        W_enc (D, M), b_enc (M,), W_dec (M, D)   are trained; the unit rows of W_dec are the atoms
        b_dec (H, D), scale ()                   are measured by `centre`: heads' means, the s above
        since_fired (M,)                         counts the vectors since a latent last fired
    Files hold b_enc times s, so a loaded SAE has scale 1, and its z are in the units of x.
    not in paper: a mean per head, and not trained. The difference between heads can be most of a
    key; with one mean for all, atoms would be spent on it, and many latents would never fire."""

    def __init__(self, n_heads, head_dim, n_latents, k, generator=None):
        super().__init__()
        self.n_latents, self.k = n_latents, k
        atoms = F.normalize(torch.randn(n_latents, head_dim, generator=generator), dim=-1)
        self.W_dec = nn.Parameter(atoms)
        # tied at first, else latents die [Gao]; but half as long: atoms are not orthogonal, so at
        # full length each would claim a part of x that its neighbours claim as well
        self.W_enc = nn.Parameter(atoms.T.contiguous() / 2)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.register_buffer("b_dec", torch.zeros(n_heads, head_dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("since_fired", torch.zeros(n_latents))

    @torch.no_grad()
    def centre(self, x):
        """Set b_dec and scale to those of vectors x (tokens, H, D), float32."""
        self.b_dec.copy_(x.mean(0))
        self.scale.copy_((x - self.b_dec).square().mean().sqrt().clamp_min(1e-8))

    def encode(self, x, k):
        """x (..., H, D) -> its code: z (..., H, k) >= 0, strongest first, and idx (..., H, k).
        The first j columns are the code at budget j. Raises UsageError unless 0 <= k <= M."""
        if not 0 <= k <= self.n_latents:
            raise UsageError(f"k = {k}: want 0 to n_latents = {self.n_latents}")
        normalised = (x - self.b_dec) / self.scale  # (..., H, D)
        # = (normalised @ W_enc + b_enc).topk(k), but faster to train (section 5)
        z, idx = top_k_of_matmul(normalised, self.W_enc, self.b_enc, k)
        return F.relu(z), idx

    def decode(self, z, idx):
        """z, idx (..., H, k) -> x_hat (..., H, D): k atoms, or at k = 0 none, and the mean."""
        # = (z[..., None] * W_dec[idx]).sum(-2), without copying atoms (section 5)
        return self.scale * sum_of_rows(z, idx, self.W_dec) + self.b_dec

    def loss(self, x):
        """The loss of vectors x (tokens, H, D): the share of variance left at budget k and, so that
        one SAE serves other budgets too, an eighth of that at 2k [Multi-TopK, Gao]. Side effect:
        counts in `since_fired`. A latent fires if it has z > 0 among a vector's 2k strongest. (With
        the k strongest instead, the error at k was the same, but at 2k 1 to 24% larger.)"""
        z, idx = self.encode(x, min(2 * self.k, self.n_latents))  # (tokens, H, 2k)
        error = (x - self.decode(z[..., :self.k], idx[..., :self.k])) / self.scale
        error_2k = (x - self.decode(z, idx)) / self.scale
        self.count_fired(idx[z > 0], x[..., 0].numel())
        return error.square().mean() + error_2k.square().mean() / 8

    def count_fired(self, latents, n_vectors):
        """Advance the counters of all latents by n_vectors; reset those of latents that fired."""
        self.since_fired += n_vectors
        self.since_fired[latents] = 0

    @torch.no_grad()
    def renormalise(self):
        """Call after each step of the optimiser: makes the atoms unit vectors again."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def lift_silent(self, amount):
        """Call after each step: raises the bias of latents that none of the last 16 * n_latents
        vectors fired, until they fire, and so learn, again. (An average latent fires up to 32 * k
        times in as many vectors.) not in paper. [Gao] adds a loss, AuxK, instead."""
        self.b_enc[self.since_fired > 16 * self.n_latents] += amount

# ------------------------------------------------------------------ 2. fidelity and the elbow
@torch.no_grad()
def fidelity(x, x_hat):
    """Vectors x, x_hat (..., H, D) -> {fvu, cos, cos_centred}, computed in float64.

    fvu = sum |x - x_hat|^2 / sum |x - mean_h|^2 over all vectors, mean_h the mean of the vector's
    head: variance unexplained within heads. Means over vectors: cos, the cosine of x and x_hat;
    cos_centred, that of x - mean_h and x_hat - mean_h."""
    x, x_hat = (y.reshape(-1, *y.shape[-2:]).double() for y in (x, x_hat))  # (tokens, H, D)
    mean = x.mean(0)
    variance = (x - mean).square().sum().clamp_min(1e-12)
    cosine = functools.partial(F.cosine_similarity, dim=-1, eps=1e-12)
    return {"fvu": ((x - x_hat).square().sum() / variance).item(),
            "cos": cosine(x, x_hat).mean().item(),
            "cos_centred": cosine(x - mean, x_hat - mean).mean().item()}

@torch.no_grad()
def budget_curve(sae, x, ks=(0, 1, 2, 4, 8, 16, 32, 64)):
    """[{k, fvu, cos, cos_centred, dead}] of vectors x (tokens, H, D) by rising k: of ks, sae.k and
    2 sae.k, but n_latents at most. One encode serves all of them. k = 0: the head's mean alone,
    without an atom. dead: the share of latents that none of these vectors fired."""
    ks = sorted({min(k, sae.n_latents) for k in (*ks, sae.k, 2 * sae.k)})
    z, idx = sae.encode(x, ks[-1])  # (tokens, H, ks[-1])
    curve = []
    for k in ks:
        n_fired = len(idx[..., :k][z[..., :k] > 0].unique())
        curve.append({"k": k, **fidelity(x, sae.decode(z[..., :k], idx[..., :k])),
                      "dead": 1 - n_fired / sae.n_latents})
    return curve

def elbow(curve, most):
    """The semantic elbow: the k from 1 to `most` whose FVU lies furthest below the chord between
    the curve's ends there. Both axes scaled to [0, 1], k linear [Kneedle, Satopaa 2011]: it depends
    on `most`, so state that. nan if any FVU is nan. not in paper: its public text has no rule."""
    curve = [point for point in curve if 1 <= point["k"] <= most]
    first, last = curve[0], curve[-1]
    fall, k_range = max(first["fvu"] - last["fvu"], 1e-12), max(last["k"] - first["k"], 1)
    depths = [(first["fvu"] - p["fvu"]) / fall - (p["k"] - first["k"]) / k_range for p in curve]
    if torch.tensor(depths).isnan().any():
        return torch.nan
    return curve[depths.index(max(depths))]["k"]

# ------------------------------------------------------------------ 3. the dual budget
class Budget(NamedTuple):
    """Atoms per key, atoms per value."""
    k_key: int = 8
    k_val: int = 16

class DualBudget:
    """The paper's codec of one layer: each key becomes its k_key strongest atoms, each value its
    k_val. A codec says what a layer keeps of a token: encode returns it, and decode rebuilds the
    keys and values from it, up to the code's error."""

    def __init__(self, key_sae, value_sae, budget=Budget()):
        self.key_sae, self.value_sae, self.budget = key_sae, value_sae, budget

    def encode(self, keys, values):
        """Keys before RoPE and values, (..., H, D) each -> the tensors (..., n) to be stored: fp16
        coefficients and int16 indices of the keys, then of the values; n = H times the budget."""
        return (*pack(*self.key_sae.encode(keys, self.budget.k_key), self.key_sae.n_latents),
                *pack(*self.value_sae.encode(values, self.budget.k_val), self.value_sae.n_latents))

    def decode(self, stored):
        """What encode returned -> keys, values (..., H, D), float32."""
        H = len(self.key_sae.b_dec)
        z_key, idx_key = (x.unflatten(-1, (H, self.budget.k_key)) for x in stored[:2])
        z_val, idx_val = (x.unflatten(-1, (H, self.budget.k_val)) for x in stored[2:])
        return (self.key_sae.decode(z_key.float(), idx_key.int()),
                self.value_sae.decode(z_val.float(), idx_val.int()))

def pack(z, idx, n_latents):
    """A code (..., H, k) as it is stored: fp16 and int16, (..., H * k) each."""
    if n_latents > 1 << 15:
        raise UsageError(f"n_latents = {n_latents}: an int16 index names at most 32,768")
    return z.flatten(-2).half(), idx.flatten(-2).short()

def roundtrip(codec, keys, values, live):
    """What a codec makes of keys and values (B, T, H, D): decode(encode(.)), unless the codec has a
    `roundtrip` of its own, as quantisers that look across tokens do (beyond/rivals.py). It ignores
    the tokens that are not live (B, T). In generation a call brings a single token."""
    if hasattr(codec, "roundtrip"):
        return codec.roundtrip(keys, values, live)
    return codec.decode(codec.encode(keys, values))

# ------------------------------------------------------------------ 4. in the model
@contextlib.contextmanager
def reconstruct(model, codecs, sink=1):
    """Inside, `model` computes with decoded keys and values, in prefill and in generation; its own
    cache then holds those, not codes (beyond/cache.py). codecs: {layer: codec}, given float32.
    The first `sink` tokens of a text stay exact (not in paper: their norms are extreme, arXiv
    2309.17453). Raises UsageError as `watch` and `live_tokens` do. The order of events:

        the decoder is called          which of the new tokens are live?
        a layer's k_proj, v_proj       as soon as both are there, `replace` codes and decodes them,
                                       and overwrites the projections' outputs where tokens are live
        RoPE, cache, attention         read what was written; then comes the next layer's k_proj"""

    def replace(layer, keys, values, live):  # (B, T, H, D) twice, (B, T)
        live = live.to(keys.device)
        # keys and values are views of the modules' outputs: what is written here, the model reads
        decoded = roundtrip(codecs[layer], keys.float(), values.float(), live)
        for x, x_hat in zip((keys, values), decoded):
            x.copy_(torch.where(live[..., None, None], x_hat.to(x.dtype), x))

    with watch(model, codecs, replace, lambda arguments: live_tokens(arguments, sink), writes=True):
        yield

@contextlib.contextmanager
def capture(model, layers):
    """`with capture(model, layers) as vectors: model(ids)` sets vectors[layer, kind] to the keys or
    values of the call, (B, T, H, D). With `reconstruct`, in either order, these are decoded."""
    vectors = {}

    def keep(layer, keys, values, _):
        for kind, x in zip(KINDS, (keys, values)):
            vectors[layer, kind] = x.detach().clone()  # some models change it in place

    with watch(model, layers, keep):
        yield vectors

@torch.no_grad()
def harvest(model, windows, layers, sink=1):
    """{(layer, kind): (tokens, H, D)} of windows (n, T) of token ids, each without its first
    `sink` tokens. Raises UsageError at a value that is not finite."""
    vectors = {}  # allocated whole at once: joining batches would need twice the memory
    with capture(model, layers) as captured:
        for batch in torch.arange(len(windows)).split(max(1, 4096 // windows.shape[1])):
            model.get_decoder()(input_ids=windows[batch].to(model.device), use_cache=False)
            for site, x in captured.items():  # (B, T, H, D)
                if site not in vectors:
                    vectors[site] = x.new_empty(len(windows), *x[0, sink:].shape)
                vectors[site][batch] = x[:, sink:]
    for (layer, kind), x in vectors.items():
        if not x.isfinite().all():
            raise UsageError(f"layer {layer}: a {kind} is not finite; use --dtype float32")
    return {site: x.flatten(0, 1) for site, x in vectors.items()}

# ------------------------------------------------------------------ the hooks (safe to skip)
@contextlib.contextmanager
def watch(model, layers, on_vectors, on_call=lambda arguments: None, writes=False):
    """Inside, each call of the decoder first calls on_call({argument: value}), which returns a
    context; then, once per layer, on_vectors(layer, keys, values, context), as soon as both are
    there. They are views (B, T, H, D), writable if `writes`. A watch that writes comes before those
    that read. Raises UsageError if there is no such layer, if a call skipped the keys or values of
    one, or if there was no call; both happen to compiled models."""
    decoder, sites = model.get_decoder(), kv_sites(model)
    wanted = {(layer, kind) for layer in layers for kind in KINDS}
    absent = wanted - sites.keys()
    if absent:
        raise UsageError(f"layer {min(absent)[0]}: the model has layers 0 to {max(sites)[0]}")
    state = types.SimpleNamespace(  # vectors: {kind: keys or values} of the layer that is computed
        n_calls=0, missing=set(), vectors={}, context=None)

    def before_call(decoder, args, kwargs):
        bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs)
        state.n_calls, state.missing, state.vectors = state.n_calls + 1, set(wanted), {}
        state.context = on_call({**bound.arguments, **bound.kwargs})

    def after_module(layer, kind, name):
        def hook(module, args, output):
            if (layer, kind) not in state.missing:
                return  # outside a call of the decoder, or captured already in this one
            state.missing.remove((layer, kind))
            if writes and (output._is_view() or output.is_leaf and output.requires_grad):
                output = output.clone()  # autograd forbids writing there; 4-bit layers make such
            state.vectors[kind] = per_head(decoder.config, name, kind, args[0], output)
            if len(state.vectors) == 2:  # which of them comes first depends on the type of model
                keys, values = state.vectors.pop("key"), state.vectors.pop("value")
                on_vectors(layer, keys, values, state.context)
            return output
        return hook

    def after_call(decoder, args, output):
        if state.missing:
            raise UsageError(f"layer {min(state.missing)[0]}: keys or values were not captured; "
                             "the model is compiled, or the layer is not self-attention")

    with contextlib.ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(before_call, with_kwargs=True).remove)
        for layer, kind in sorted(wanted):
            name, module = list(sites[layer, kind].items())[-1]
            hook = after_module(layer, kind, name)
            hooks.callback(module.register_forward_hook(hook, prepend=writes).remove)
        hooks.callback(decoder.register_forward_hook(after_call).remove)
        yield
    if wanted and state.n_calls == 0:
        raise UsageError("the model was not called, or compiled and called before; do not compile")

def live_tokens(arguments, sink):
    """The tokens of a call of the decoder that a codec may touch, (B, T) bool: not padding, which
    attention_mask shows, nor sinks, whose position is below `sink`. In packed texts, position_ids
    begin again; without position_ids, positions count the mask's ones. Raises UsageError at a mask
    that is neither (B, tokens) nor what `generate` makes for a static cache."""
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    cache = arguments.get("cache", arguments.get("past_key_values"))
    past = 0 if cache is None else int(cache.get_seq_length())  # int: static caches count in place
    B, T = tokens.shape[:2]
    position, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if isinstance(mask, dict):  # by type of layer
        mask = next(iter(mask.values()))
    if mask is None:
        mask = torch.ones(B, past + T)
    if mask.dim() == 2 and mask.shape[1] >= past + T:
        real = mask.bool()[:, past:past + T]
        if position is None:
            position = mask.bool().cumsum(-1)[:, past:past + T] - 1
    elif mask.dim() == 4 and position is not None:  # (B, 1, T, slots of the cache)
        attends = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > -1e4
        # Padding is what does not even attend to itself. Token t lies in slot past + t, or, in a
        # sliding window that is full, in one of the last T.
        real = attends.diagonal(min(past, attends.shape[2] - T), 1, 2)  # (B, T)
    else:
        raise UsageError(f"attention_mask {list(mask.shape)} for {past} + {T} tokens: want (batch, "
                         "tokens), or (batch, 1, tokens, slots) beside position_ids")
    return (real & (position.to(real.device) >= sink)).expand(B, T).to(tokens.device)

# The modules that make a key or a value: a projection, and a norm after it where there is one.
PARTS = {"key": ("query_key_value", "qkv_proj", "k_proj", "k_norm", "k_layernorm", "key_layernorm"),
         "value": ("query_key_value", "qkv_proj", "v_proj", "v_norm"),
         "query": ("query_key_value", "qkv_proj", "q_proj", "q_norm", "q_layernorm",
                   "query_layernorm")}

def kv_sites(model, kinds=KINDS):
    """{(layer, kind): {name: module}} of a Hugging Face decoder of any type: the modules, found by
    the names in PARTS, of which the last one's output is the layer's keys or values before RoPE.
    Raises UsageError where layers lack them."""
    decoder = model.get_decoder()
    by_layer = []
    for module in decoder.modules():
        children = dict(module.named_children())
        parts = {kind: {name: children[name] for name in PARTS[kind] if name in children}
                 for kind in kinds}
        if all(parts.values()):
            by_layer.append(parts)
    if len(by_layer) != decoder.config.num_hidden_layers:
        raise UsageError(
            f"model type {decoder.config.model_type!r} is not supported: {len(by_layer)} of its "
            f"modules, for {decoder.config.num_hidden_layers} layers, make keys and values")
    return {(layer, kind): parts[kind] for layer, parts in enumerate(by_layer) for kind in kinds}

def kv_shape(config):
    """(n_kv_heads, head_dim) of a Hugging Face text config."""
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return getattr(config, "num_key_value_heads", None) or n_heads, head_dim

def per_head(config, name, kind, x, y):
    """The keys, values or queries in the output y of the module called name, of which x is the
    input: a view (B, T, H, D), writable in place."""
    n_queries, (n_kv_heads, D) = config.num_attention_heads, kv_shape(config)
    H = n_queries if kind == "query" else n_kv_heads
    if name == "query_key_value":  # GPT-NeoX: each head's query, key, value
        return y.unflatten(-1, (H, 3, D))[..., ("query", "key", "value").index(kind), :]
    if name == "qkv_proj":  # Phi-3: the queries of all heads, all keys, all values
        first = {"query": 0, "key": n_queries, "value": n_queries + n_kv_heads}[kind] * D
        return y[..., first:first + H * D].unflatten(-1, (H, D))
    if y.dim() == 3:  # (B, T, H*D)
        return y.unflatten(-1, (H, D))
    # A norm's output is (B, T, H, D) or (B, H, T, D). With as many tokens as heads, only strides
    # tell: in x, a view of the projection's output, a token's heads lie side by side in memory.
    heads_first = y.shape[1] == H and (y.shape[2] != H or x.stride(1) < x.stride(2))
    return y.transpose(1, 2) if heads_first else y

# ------------------------------------------------------------------ 5. the fast path
def top_k_of_matmul(x, W, b, k):
    """(x @ W + b).topk(k), the same in values and gradients (tested), for x (..., D), W (D, M).
    Autograd's own gradient of W would be the matmul of x^T with a matrix (N, M) of which all but k
    entries per row are zero. Here each latent adds up the rows of x that chose it."""
    z, idx = TopKOfMatmul.apply(x.flatten(0, -2), W, b, k)  # (N, k)
    return z.view(*x.shape[:-1], k), idx.view(*x.shape[:-1], k)

class TopKOfMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, b, k):
        z, idx = torch.addmm(b, x, W).topk(k)
        ctx.save_for_backward(x, W, idx)
        ctx.mark_non_differentiable(idx)
        return z, idx

    @staticmethod
    def backward(ctx, dz, _):
        x, W, idx = ctx.saved_tensors
        k, M = idx.shape[1], W.shape[1]
        dx = dW = db = None
        if ctx.needs_input_grad[0]:  # not to train an SAE, but through codes to what is below
            dx = F.embedding_bag(idx, W.T.contiguous(), mode="sum", per_sample_weights=dz)  # (N, D)
        if ctx.needs_input_grad[1]:
            order = idx.flatten().argsort(stable=True)  # the N*k choices, sorted by latent
            counts = idx.flatten().bincount(minlength=M)
            first = counts.cumsum(0) - counts  # (M,): where a latent's choices begin
            dW = F.embedding_bag(order // k, x, first, mode="sum",
                                 per_sample_weights=dz.flatten()[order]).T
        if ctx.needs_input_grad[2]:
            db = dz.new_zeros(M).index_add_(0, idx.flatten(), dz.flatten())
        return dx, dW, db, None

def sum_of_rows(z, idx, W):
    """(z[..., None] * W[idx]).sum(-2), for z, idx (..., k), W (M, D), without copying rows of W."""
    *shape, k = idx.shape
    starts = torch.arange(idx.shape[:-1].numel(), device=idx.device, dtype=idx.dtype) * k
    sums = F.embedding_bag(idx.flatten(), W, starts, mode="sum",
                           per_sample_weights=z.flatten())  # (N, D)
    return sums.view(*shape, W.shape[1])

def fuse(codecs):
    """{layer: codec} -> the same with the dual budget's encode and decode in one compiled graph,
    shared by all layers, for CUDA. Warns, and returns the codecs, if nothing compiles here."""
    try:
        torch.compile(torch.sin)(torch.zeros(1).to("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, no support
        warnings.warn(f"nothing is compiled ({type(error).__name__}); computing step by step")
        return codecs

    @torch.compile(fullgraph=True, dynamic=True)
    @torch.no_grad()
    def compiled(codec, keys, values, live):
        return codec.decode(codec.encode(keys, values))

    fused = {layer: types.SimpleNamespace(roundtrip=functools.partial(compiled, codec))
             for layer, codec in codecs.items() if type(codec) is DualBudget}
    return {**codecs, **fused}
