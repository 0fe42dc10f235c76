"""Short names, devices, loading, and the check that attention reads what the hooks see.

Any causal language model that transformers loads without code of its own, if its layers make keys
and values per head (`python -m support.test_support` tries all types). Non-goal: encoders.
"""
import logging
import pathlib

import torch

import sta
from sta import UsageError
from support.files import ROOT, explain, kv_tensors

MODELS = {"tiny": str(ROOT / "tiny"), "yi-6b": "01-ai/Yi-6B",
          "mistral-7b": "mistralai/Mistral-7B-v0.1", "llama-2-7b": "meta-llama/Llama-2-7b-hf",
          "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B", "qwen2.5-32b": "Qwen/Qwen2.5-32B",
          "smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}

def slug(name):
    """The name that SAEs and results of a model are filed under."""
    return name if name in MODELS else pathlib.Path(name).resolve().name.lower()

def pick_device(device=None, dtype=None):
    """--device and --dtype -> ("cpu", "cuda:0" or "auto", torch.dtype), printed with the reason."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    best = (gpus or ["cpu"])[0]
    if (device or best) not in ["cpu", *gpus, *(["cuda", "auto"] if gpus else [])]:
        raise UsageError(f"--device {device}: not on this machine; leave it out to use {best}")
    picked = best if device in (None, "", "cuda") else device
    dtype = dtype or ("float32" if picked == "cpu" else "bfloat16")
    print(f"device {picked} ({'asked for' if device else 'the best that was found'}); model in "
          f"{dtype}, SAEs in float32")
    return picked, getattr(torch, dtype)

def context_length(model, default=2048):
    """The number of tokens that a model can read; `default` if its config has no limit (BLOOM)."""
    return getattr(model.get_decoder().config, "max_position_embeddings", None) or default

def parse_layers(spec, n_layers):
    """'all', '12', '0-7' or '3,9' -> sorted layer numbers, each below n_layers."""
    with explain(f"--layer {spec}: want all, 12, 0-7 or 3,9; the model has layers 0 to "
                 f"{n_layers - 1}"):
        parts = [part.split("-") for part in spec.replace("all", f"0-{n_layers - 1}").split(",")]
        ends = [(int(part[0]), int(part[-1])) for part in parts]
        if max(map(len, parts)) > 2 or not all(first <= last < n_layers for first, last in ends):
            raise ValueError("no such layers")
        return sorted({layer for first, last in ends for layer in range(first, last + 1)})

def load_model(name, device="cpu", dtype=torch.float32, layers="all", no_deeper=False):
    """--model, `pick_device`, --layer -> (model in eval mode, tokenizer, layer numbers).
    name: a key of MODELS, a hub id or a folder; no_deeper: load no layer above the last chosen."""
    import transformers
    transformers.logging.set_verbosity_error()  # else a table of the layers left out on purpose
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try
    source = MODELS.get(name, name)
    with explain(f"--model {name}: want a folder, one of {', '.join(MODELS)}, or a hub id that is "
                 "reachable and not gated, without code of its own"):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        text = config.get_text_config()
        layers = parse_layers(layers, text.num_hidden_layers)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    n_layers = layers[-1] + 1 if no_deeper else text.num_hidden_layers
    with explain(f"--model {name}: cannot be loaded" + "; try --layer all" * no_deeper):
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:n_layers]
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False,
            device_map="auto" if device == "auto" else None)  # auto needs the package accelerate
        if info["missing_keys"]:
            raise ValueError(f"its files lack {sorted(info['missing_keys'])[0]}")
    if any(p.is_meta for p in model.parameters()):
        raise UsageError(f"--model {name}: its layers do not fit into memory; choose a smaller one")
    model = (model if device == "auto" else model.to(device)).eval().requires_grad_(False)
    check_sites(model)
    tokenizer.n_known = model.get_input_embeddings().num_embeddings  # for support/text.py
    return model, tokenizer, layers

@torch.no_grad()
def check_sites(model):
    """Raises UsageError unless attention reads what `sta.watch` sees, and that before RoPE. Random
    keys and values are written there; vectors of the same lengths must then stand in the cache."""
    written, token = {}, torch.full((1, 5), 7, device=model.device)  # the same, five times
    generator = torch.Generator().manual_seed(0)

    def overwrite(layer, keys, values, has_rope):  # (1, 5, H, D)
        moved = (keys - keys[:, :1]).abs().max() > 0.1 * keys.abs().max()
        if layer == 0 and moved and has_rope:
            raise ValueError("its keys are seen only after RoPE")
        growing = torch.arange(1, 6)[:, None, None]  # lengths that a norm would make alike
        for kind, x in zip(sta.KINDS, (keys, values)):
            random = growing * torch.randn(x.shape, generator=generator)
            written[layer, kind] = x.copy_(random).float().clone()

    with explain(f"model type {model.config.model_type!r} is not supported"):
        decoder = model.get_decoder()
        has_rope = any("rotary" in name for name, _ in decoder.named_modules())
        layers = range(decoder.config.num_hidden_layers)
        with sta.watch(model, layers, overwrite, lambda arguments: has_rope):
            output = decoder(input_ids=token, use_cache=True)
        # transformers before 5.24 calls it past_key_values
        cache = output["cache" if "cache" in output else "past_key_values"]
        for (layer, kind), x in written.items():
            kept = getattr(cache.layers[layer], f"{kind}s").transpose(1, 2).float()  # (B, T, H, D)
            ratio = kept.norm(dim=-1) / x.norm(dim=-1)  # RoPE may stretch all keys alike
            if not kv_tensors(model, layer):
                raise ValueError("its projections hold no tensors by which to know the model")
            if kept.shape != x.shape or (ratio / ratio.mean() - 1).abs().max() > 0.02:
                raise ValueError(f"layer {layer}: attention reads other {kind}s than are seen")
