"""STA-Attention: the key-value cache of a language model in semantic atoms. The method, in order.

Source: "Unlocking the Address Book: Dissecting the Sparse Semantic Structure of LLM Key-Value
Caches via Sparse Autoencoders", arXiv 2512.10547; the SAE's formulas are in arXiv 2601.17702.

    x      = one head's key (before RoPE) or value                                    (D,)
    z, idx = the k largest of ReLU((x/s - b_dec) W_enc + b_enc), and their places:
             the code of x                                                            (k,)
    x_hat  = s (sum_j z_j W_dec[idx_j] + b_dec)                                       (D,)
    loss   = |x - x_hat|^2 / s^2 + AuxK/32, with s^2 = mean |x - mean(x)|^2
    dual budget: a key becomes its k_key = 8 strongest atoms, a value its k_val = 16

Legend: B batch, T tokens, H kv heads, D head dim, N rows (B*T*H), M latents (atoms), k budget
Use:    with reconstruct(model, {layer: DualBudget(key_sae, value_sae)}): model.generate(...)
Sections: 1 the Top-K SAE, 2 where keys and values live, 3 the budget curve and its elbow,
          4 the dual budget, 5 the fast path, 6 models, text, files. Read 1-4; 5 and 6 serve them.
What the paper's text leaves open is marked `not in paper`. Non-goal: training the model itself.
"""
import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import warnings
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("key", "value")

class UsageError(Exception):
    """Bad input: one line that names the value, the limit and the likely fix."""

# ------------------------------------------------------------------ 1. the Top-K SAE
class TopKSAE(nn.Module):
    """Top-K sparse autoencoder of one layer's keys or values, shared by the layer's kv heads.
    W_enc (D, M), b_enc (M,), W_dec (M, D) whose unit rows are the atoms, b_dec (D,). Buffers:
    scale (), the s above; fired (M,), 1 where a latent fired in this step: with z > 0 and among
    the strongest k, the SAE's own budget; idle (M,), the rows since it last did. All float32."""

    def __init__(self, head_dim, n_latents, k, generator=None):
        super().__init__()
        self.n_latents, self.k = n_latents, k
        atoms = F.normalize(torch.randn(n_latents, head_dim, generator=generator), dim=-1)
        self.W_dec = nn.Parameter(atoms)
        self.W_enc = nn.Parameter(atoms.T.contiguous())  # tied at first, else latents die [Gao]
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(head_dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("fired", torch.zeros(n_latents))
        self.register_buffer("idle", torch.zeros(n_latents))

    @torch.no_grad()
    def centre(self, x):
        """Set b_dec and scale so that rows x (N, D) have mean 0 and mean square norm 1 inside."""
        mean = x.mean(0)  # (D,)
        self.scale.copy_((x - mean).square().sum(-1).mean().sqrt().clamp_min(1e-8))
        self.b_dec.copy_(mean / self.scale)

    def encode(self, x, k):
        """x (..., D) -> its code: z (..., k) >= 0, strongest first, and idx (..., k).
        The first j columns are the code at budget j. Raises UsageError unless 1 <= k <= M."""
        if not 1 <= k <= self.n_latents:
            raise UsageError(f"k = {k}: want 1 to n_latents = {self.n_latents}")
        # (x/s - b_dec) W_enc + b_enc, multiplied out: b_dec then needs no matmul in backward
        pre = x / self.scale @ self.W_enc + (self.b_enc - self.b_dec @ self.W_enc)  # (..., M)
        z, idx = pre.topk(k, dim=-1)
        return F.relu(z), idx

    def decode(self, z, idx):
        """z, idx (..., k) -> x_hat (..., D): a sum of k atoms, never of all M latents."""
        atoms = F.embedding_bag(idx.flatten(0, -2), self.W_dec, mode="sum",
                                per_sample_weights=z.flatten(0, -2))  # (N, D)
        return (self.scale * (atoms + self.b_dec)).view(*idx.shape[:-1], len(self.b_dec))

    def loss(self, x, k):
        """The loss of rows x (N, D) at budget k, mean over rows; notes which latents fired."""
        z, idx = self.encode(x, k)
        self.fired[idx[:, :self.k][z[:, :self.k] > 0]] = 1
        residual = (x - self.decode(z, idx)) / self.scale  # (N, D)
        return residual.square().sum(-1).mean() + self.auxk(x, residual.detach()) / 32

    def dead(self):
        """Latents (n_dead,) idle for more than 8 M rows. not in paper: the window."""
        return (self.idle > 8 * self.n_latents).nonzero().squeeze(-1)

    def auxk(self, x, residual):
        """AuxK [Gao 2024, 2.3]: dead latents, at most D/2, rebuild the residual (N, D) of rows
        x (N, D), without b_dec, in units of its variance; so they get a gradient. not in paper:
        the first dead ones, not the strongest of each row."""
        dead = self.dead()[:x.shape[1] // 2]
        if len(dead) == 0:
            return 0.0
        pre = (x / self.scale - self.b_dec) @ self.W_enc[:, dead] + self.b_enc[dead].detach()
        error = residual - F.relu(pre) @ self.W_dec[dead]
        return error.square().sum() / (residual - residual.mean(0)).square().sum()

    @torch.no_grad()
    def project_gradient(self):
        """After backward: remove the part of W_dec's gradient that would change atoms' lengths."""
        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)  # (M, 1)
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def renormalise(self):
        """After the optimiser's step: unit atoms again."""
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def revive_dead(self, n_rows):
        """After a step of n_rows rows: count who was idle, and lift the dead a little.
        not in paper: AuxK would drive b_enc of dead latents so low that ReLU cuts their gradient
        for good; so AuxK does not train it, and it is raised here until they fire again."""
        self.idle = torch.where(self.fired > 0, 0, self.idle + n_rows)
        self.fired.zero_()
        self.b_enc[self.dead()] += 1e-3

# ------------------------------------------------------------------ 2. where keys and values live
def kv_shape(config):
    """(n_kv_heads, head_dim) of a Hugging Face text config."""
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return getattr(config, "num_key_value_heads", None) or n_heads, head_dim

def kv_sites(model):
    """{(layer, kind): (module, view)} of a Hugging Face decoder: view(the module's output) is that
    layer's keys or values (B, T, H, D), in the output's own memory, before RoPE reads them; keys
    after any k_norm. not in paper, which says "projections": RoPE would turn one semantic key into
    one copy a position. Raises UsageError for other model types; Yi is of type llama."""
    config = model.get_decoder().config
    H, D = kv_shape(config)
    n_query = config.num_attention_heads * D

    def split(y): return y.view(*y.shape[:2], H, D)  # of (B, T, H*D) or (B, T, H, D)
    def heads_first(y): return y.transpose(1, 2)  # of (B, H, T, D)
    def neox_key(y): return y.unflatten(-1, (H, 3, D))[..., 1, :]  # each head's query, key, value
    def neox_value(y): return y.unflatten(-1, (H, 3, D))[..., 2, :]
    def phi_key(y): return split(y[..., n_query:n_query + H * D])  # all queries, keys, values
    def phi_value(y): return split(y[..., n_query + H * D:])

    plain = ("k_proj", split), ("v_proj", split)
    normed = ("k_norm", split), ("v_proj", split)
    families = {
        "llama": plain, "mistral": plain, "qwen2": plain, "qwen3": normed, "olmo2": normed,
        "gemma3_text": (("k_norm", heads_first), ("v_proj", split)),
        "gpt_neox": (("query_key_value", neox_key), ("query_key_value", neox_value)),
        "phi3": (("qkv_proj", phi_key), ("qkv_proj", phi_value))}
    if config.model_type not in families:
        raise UsageError(f"model type {config.model_type!r} is not supported; supported types: "
                         f"{', '.join(families)} (add yours to kv_sites in sta.py)")
    attention = "attention" if config.model_type == "gpt_neox" else "self_attn"
    return {(i, kind): (getattr(getattr(layer, attention), name), view)
            for i, layer in enumerate(model.get_decoder().layers)
            for kind, (name, view) in zip(KINDS, families[config.model_type])}

@contextlib.contextmanager
def watch(model, layers, see):
    """Inside, see(layer, kind, x) is called with the keys and the values x (B, T, H, D) of each of
    the layers as soon as they are there. The hooks are removed on every way out."""
    with contextlib.ExitStack() as hooks:
        for (layer, kind), (module, view) in kv_sites(model).items():
            def hook(module, args, y, layer=layer, kind=kind, view=view):
                see(layer, kind, view(y))
            if layer in layers:
                hooks.callback(module.register_forward_hook(hook).remove)
        yield

@contextlib.contextmanager
def capture(model, layers):
    """`with capture(model, layers) as rows: model(ids)` sets rows[layer, kind] to (B, T, H, D)."""
    rows = {}
    with watch(model, layers, lambda layer, kind, x: rows.update({(layer, kind): x.detach()})):
        yield rows

@torch.no_grad()
def harvest(model, windows, layers, sink=1):
    """{(layer, kind): (tokens, H, D)} of windows (n, T) of token ids, each without its first
    `sink` tokens. Raises UsageError at a value that is not finite."""
    rows = {}  # each made whole at once: pieces, joined at the end, would take twice the memory
    with capture(model, layers) as captured:
        for batch in torch.arange(len(windows)).split(max(1, 4096 // windows.shape[1])):
            model.get_decoder()(input_ids=windows[batch].to(model.device), use_cache=False)
            for key, x in captured.items():  # (B, T, H, D)
                if key not in rows:
                    rows[key] = x.new_empty(len(windows), *x[0, sink:].shape)
                rows[key][batch] = x[:, sink:]
    for (layer, kind), x in rows.items():
        if not x.isfinite().all():
            raise UsageError(f"layer {layer}: a {kind} is not finite; use --dtype float32")
    return {key: x.flatten(0, 1) for key, x in rows.items()}

# ------------------------------------------------------------------ 3. the budget curve
@torch.no_grad()
def fidelity(x, x_hat):
    """Rows x, x_hat (..., D) -> {fvu, cos, rel_norm}, in float64.

    fvu = sum |x - x_hat|^2 / sum |x - mean(x)|^2 over all rows; cos, the cosine of x and x_hat
    (uncentred), and rel_norm = |x_hat| / |x| are means over rows."""
    x, x_hat = x.flatten(0, -2).double(), x_hat.flatten(0, -2).double()  # (N, D)
    spread = (x - x.mean(0)).square().sum().clamp_min(1e-12)
    return {"fvu": ((x - x_hat).square().sum() / spread).item(),
            "cos": F.cosine_similarity(x, x_hat, dim=-1, eps=1e-12).mean().item(),
            "rel_norm": (x_hat.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)).mean().item()}

@torch.no_grad()
def budget_curve(sae, x, ks=(1, 2, 4, 8, 16, 32, 64)):
    """[{k, fvu, cos, rel_norm, dead}] of rows x (N, D) by rising k; one encode serves all of them.
    dead: here the share of latents that no row fired."""
    ks = sorted(k for k in ks if k <= sae.n_latents)
    z, idx = sae.encode(x, ks[-1])  # (N, ks[-1])
    curve = []
    for k in ks:
        n_fired = len(idx[:, :k][z[:, :k] > 0].unique())
        curve.append({"k": k, **fidelity(x, sae.decode(z[:, :k], idx[:, :k])),
                      "dead": 1 - n_fired / sae.n_latents})
    return curve

def elbow(curve):
    """The semantic elbow: the k whose cosine lies furthest above the chord of the curve.
    Both axes scaled to [0, 1], k linear [Kneedle, Satopaa 2011]: it depends on the largest k
    measured, so state that. not in paper: the readable text gives no rule for its elbow."""
    first, last = curve[0], curve[-1]
    rise, run = max(last["cos"] - first["cos"], 1e-12), max(last["k"] - first["k"], 1)
    heights = [(p["cos"] - first["cos"]) / rise - (p["k"] - first["k"]) / run for p in curve]
    return curve[heights.index(max(heights))]["k"]

# ------------------------------------------------------------------ 4. the dual budget
class Budget(NamedTuple):
    """Atoms per key, atoms per value."""
    k_key: int = 8
    k_val: int = 16

class DualBudget:
    """The paper's codec of one layer: each key becomes its k_key strongest atoms, each value its
    k_val. A codec says what a layer keeps of a token: encode returns it, decode undoes that."""

    def __init__(self, key_sae, value_sae, budget=Budget()):
        self.key_sae, self.value_sae, self.budget = key_sae, value_sae, budget

    def encode(self, k, v):
        """Keys before RoPE and values, (..., H, D) each -> the tensors (..., n) to be stored: fp16
        coefficients and int16 indices of the keys, then of the values; n = H times the budget."""
        z_key, idx_key = self.key_sae.encode(k, self.budget.k_key)  # (..., H, k_key)
        z_val, idx_val = self.value_sae.encode(v, self.budget.k_val)  # (..., H, k_val)
        return (z_key.flatten(-2).half(), idx_key.flatten(-2).short(),
                z_val.flatten(-2).half(), idx_val.flatten(-2).short())

    def decode(self, stored):
        """What encode returned -> keys, values (..., H, D), float32."""
        z_key, idx_key = (x.unflatten(-1, (-1, self.budget.k_key)) for x in stored[:2])
        z_val, idx_val = (x.unflatten(-1, (-1, self.budget.k_val)) for x in stored[2:])
        return (self.key_sae.decode(z_key.float(), idx_key.int()),
                self.value_sae.decode(z_val.float(), idx_val.int()))

@contextlib.contextmanager
def reconstruct(model, codecs, sink=1):
    """Inside, `model` computes with decoded keys and values, in prefill and decode alike; its own
    cache then holds those, not codes (beyond/cache.py). codecs: {layer: codec, or a function
    (k, v, live) -> (k_hat, v_hat)}, of float32 (B, T, H, D). The first `sink` tokens of a sequence
    stay exact (not in paper: their norms are extreme, arXiv 2309.17453); live (B, T) is False there
    and at padding: a function across tokens must skip those. Raises UsageError: no such layer."""
    call, waiting, n_layers = {}, {}, model.get_decoder().config.num_hidden_layers
    for layer in codecs.keys() - set(range(n_layers)):
        raise UsageError(f"layer {layer}: the model has layers 0 to {n_layers - 1}")

    def note_call(decoder, args, kwargs):
        mask = kwargs.get("attention_mask")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # before 5.24
        call["mask"] = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        call["past"] = 0 if cache is None else cache.get_seq_length()
        waiting.clear()

    def find_live(k):
        real = call["mask"]  # (B, past + T)
        if real is None:
            real = torch.ones(len(k), call["past"] + k.shape[1])
        return ((real.cumsum(-1) > sink) & real.bool())[:, -k.shape[1]:].to(k.device)  # (B, T)

    def replace(layer, kind, x):
        waiting[layer, kind] = x  # (B, T, H, D)
        if not all((layer, kind) in waiting for kind in KINDS):
            return  # which of the two comes first depends on the family
        k, v = (waiting.pop((layer, kind)) for kind in KINDS)
        codec, live = codecs[layer], find_live(k)
        if callable(codec):
            k_hat, v_hat = codec(k.float(), v.float(), live)
        else:
            k_hat, v_hat = codec.decode(codec.encode(k.float(), v.float()))
        for x, x_hat in ((k, k_hat), (v, v_hat)):
            # x is a view of the projection's output: attention goes on with what is written here
            x.copy_(torch.where(live[..., None, None], x_hat.to(x.dtype), x))

    handle = model.get_decoder().register_forward_pre_hook(note_call, with_kwargs=True)
    try:
        with watch(model, codecs, replace):
            yield
    finally:
        handle.remove()

# ------------------------------------------------------------------ 5. the fast path
def fuse(codecs):
    """{layer: codec} -> {layer: function} for `reconstruct`: encode and decode in one compiled
    graph, shared by all layers, for CUDA. Warns, and returns the codecs, if nothing compiles."""
    try:  # on the device that is there
        torch.compile(torch.sin)(torch.zeros(1).to("cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, no support
        warnings.warn(f"nothing is compiled ({type(error).__name__}); computing step by step")
        return codecs
    roundtrip = torch.compile(lambda codec, k, v: codec.decode(codec.encode(k, v)),
                              fullgraph=True, dynamic=True)
    def fused(codec): return lambda k, v, live: roundtrip(codec, k, v)
    return {layer: codec if callable(codec) else fused(codec) for layer, codec in codecs.items()}

# ------------------------------------------------------------------ 6. models, text, files
HERE = pathlib.Path(__file__).resolve().parent
MODELS = {"tiny": str(HERE / "tiny"), "yi-6b": "01-ai/Yi-6B",
          "mistral-7b": "mistralai/Mistral-7B-v0.1", "llama-2-7b": "meta-llama/Llama-2-7b-hf",
          "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-32b": "Qwen/Qwen2.5-32B",
          "smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}
WIKITEXT = {"train": "Salesforce/wikitext:wikitext-103-raw-v1:train",
            "valid": "Salesforce/wikitext:wikitext-2-raw-v1:test"}

def run(main):
    """Run a script's main: bad input ends in one line and exit status 2, Ctrl-C in 130."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    try:
        main()
    except (UsageError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted; the last checkpoint, if any, is kept"
        print("error:", " ".join(message.split())[:500], file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 130)

@contextlib.contextmanager
def explain(message):
    """Whatever goes wrong inside becomes a UsageError: the message, then the cause."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{message} ({type(error).__name__}: {error})") from None

def pick_device(device=None, dtype=None):
    """--device and --dtype -> ("cpu", "cuda:0" or "auto", torch.dtype), printed with the reason.
    Under torchrun a process has a GPU of its own."""
    best = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("cpu" if best == "cpu" else r"cpu|auto|cuda(:\d+)?", device or best):
        raise UsageError(f"--device {device}: not on this machine; leave it out to use {best}")
    found = best if device in (None, "cuda") else device
    dtype = dtype or ("float32" if found == "cpu" else "bfloat16")
    print(f"device {found} ({'asked for' if device else 'the best that was found'}); model in "
          f"{dtype}, SAEs in float32")
    return found, getattr(torch, dtype)

def parse_layers(spec, n_layers):
    """'all', '12', '0-7' or '3,9' -> sorted layer numbers, each below n_layers."""
    with explain(f"--layer {spec}: want all, 12, 0-7 or 3,9; the model has layers 0 to "
                 f"{n_layers - 1}"):
        parts = [part.split("-") for part in spec.replace("all", f"0-{n_layers - 1}").split(",")]
        layers = sorted({i for part in parts for i in range(int(part[0]), int(part[-1]) + 1)})
        if not layers or layers[-1] >= n_layers:
            raise ValueError("no such layers")
        return layers

def slug(name):
    """The name that SAEs and results of a model are filed under."""
    return name if name in MODELS else pathlib.Path(name).resolve().name.lower()

def load_model(name, device="cpu", dtype=torch.float32, layers="all", no_deeper=False):
    """--model, `pick_device`, --layer -> (model in eval mode, tokenizer, layer numbers).
    name: a key of MODELS, a hub id or a folder; no_deeper: load no layer above the last chosen."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()  # else a table of the layers left out on purpose
    logging.disable_progress_bar()
    source = MODELS.get(name, name)
    with explain(f"--model {name}: want a folder, one of {', '.join(MODELS)}, or a hub id that is "
                 "reachable and not gated"):
        config = AutoConfig.from_pretrained(source)
        text = config.get_text_config()
        layers = parse_layers(layers, text.num_hidden_layers)
        if no_deeper:
            text.num_hidden_layers = layers[-1] + 1
            text.layer_types = (getattr(text, "layer_types", None) or [])[:layers[-1] + 1] or None
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True,
            device_map="auto" if device == "auto" else None)  # auto needs the package accelerate
    if info["missing_keys"]:
        raise UsageError(f"--model {name}: its files lack {sorted(info['missing_keys'])[0]}")
    model = model if device == "auto" else model.to(device)
    return model.eval().requires_grad_(False), tokenizer, layers

def read_text(spec, split, model_name, max_chars=1 << 30):
    """--text -> str: a UTF-8 file, or a hub data set owner/name[:config[:split]], its documents
    joined by blank lines. None: tiny's own text, else WikiText; split is "train" or "valid"."""
    if spec is None:
        spec = str(HERE / "tiny" / f"{split}.txt") if model_name == "tiny" else WIKITEXT[split]
    name, config, part = (spec.split(":") + [None, None])[:3]
    text = ""
    with explain(f"--text {spec}: no UTF-8 file, and not to be had as a data set owner/name"):
        like_a_file = re.search(r"\.[a-z]\w*$", name) or not re.fullmatch(r"[\w-]+/[\w.-]+", name)
        if os.path.isfile(spec) or like_a_file:
            text = open(spec, encoding="utf-8").read(max_chars)
        else:
            from datasets import load_dataset  # optional: pip install datasets
            for row in load_dataset(name, config, split=part or "train", streaming=True):
                text += row["text"] + "\n\n"
                if len(text) > max_chars:
                    break
    return text

def token_windows(text, tokenizer, model, seq_len, default, max_tokens, least=1):
    """Text -> token ids (n, seq_len): disjoint windows, the tail dropped, of about max_tokens, but
    at least `least` of them. Special tokens stand at the beginning of the text only: the GPTQ
    convention for perplexity. seq_len None: `default`, or the model's limit. Raises UsageError."""
    limit = getattr(model.get_decoder().config, "max_position_embeddings", default)
    seq_len = min(default, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UsageError(f"--seq-len {seq_len}: want 2 to the model's limit of {limit}")
    ids = tokenizer(text, verbose=False).input_ids
    n = min(len(ids), max(max_tokens, least * seq_len)) // seq_len
    if n < least:
        raise UsageError(f"text of {len(ids)} tokens: too short for {least} windows of {seq_len}; "
                         "give more text or a smaller --seq-len")
    return torch.tensor(ids[:n * seq_len]).view(n, seq_len)

def write_atomic(path, data):
    """Write bytes or str under a temporary name, then rename: the file is the old or the new."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with explain(f"cannot write {path}; nothing was replaced"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)

def fingerprint(model):
    """A hash of the first value projection: tells models of one shape apart."""
    weight = kv_sites(model)[0, "value"][0].weight.bfloat16().cpu().view(torch.int16)
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:12]

def save_sae(folder, sae, metadata):
    """cfg.json and sae_weights.safetensors in the layout of SAELens 6. The scale is folded into
    the biases: ReLU is homogeneous, so z in units of x and s = 1 give the same function."""
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc * sae.scale,
               "W_dec": sae.W_dec, "b_dec": sae.b_dec * sae.scale}
    cfg = {"architecture": "topk", "d_in": len(sae.b_dec), "d_sae": sae.n_latents,
           "k": sae.k, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.0", **metadata}}
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    write_atomic(folder / "sae_weights.safetensors", safetensors.torch.save(weights))
    write_atomic(folder / "cfg.json", json.dumps(cfg, indent=1) + "\n")  # last: now it is whole

def load_sae(folder):
    """(TopKSAE, metadata) from a folder that `save_sae` wrote."""
    with explain(f"{folder}: missing, truncated or corrupt; train it again"):
        cfg = json.loads((folder / "cfg.json").read_text())
        sae = TopKSAE(cfg["d_in"], cfg["d_sae"], cfg["k"])
        weights = safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes())
        sae.load_state_dict({**dict(sae.named_buffers()), **weights})
    return sae.requires_grad_(False), cfg["metadata"]

def load_saes(folder, model, layers=None):
    """({(layer, kind): TopKSAE}, each where the model has its layer; the metadata of one of them).
    Raises UsageError if one is absent, corrupt, or of another model."""
    folder, mark, saes, sites = pathlib.Path(folder), fingerprint(model), {}, kv_sites(model)
    found = sorted(int(path.name[5:-4]) for path in folder.glob("layer*.key"))
    for layer in layers or found or [0]:
        if layer not in found:
            raise UsageError(f"{folder}: no SAEs of layer {layer}, but of {found}")
        for kind in KINDS:
            sae, metadata = load_sae(folder / f"layer{layer}.{kind}")
            if metadata.get("fingerprint") != mark:
                raise UsageError(f"{folder}: SAEs of {metadata.get('model')}, not of this model")
            saes[layer, kind] = sae.to(sites[layer, kind][0].weight.device)
    return saes, metadata
