"""One-line errors; writing so that nothing is lost; SAEs and unfinished runs on disk.

An SAE is a folder in the layout of SAELens, with what tells its model apart in cfg.json. Nothing is
pickled. Non-goal: files of SAELens itself, which have one mean for all heads.
"""
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import tempfile

import safetensors.torch
import torch
from torch import nn

import sta
from sta import UsageError

ROOT = pathlib.Path(__file__).resolve().parent.parent  # the project's folder

# ------------------------------------------------------------------ errors, and writing
def run_main(main):
    """Run a script's main: bad input, or a full disk, ends in one line and exit status 2, Ctrl-C in
    130; a reader of its output that went away, as `| head` does, in 141."""
    nowhere = open(os.devnull, "w", encoding="utf-8")  # in place of what `>&-` has closed
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # logs; terminals without ±
    try:
        if sys.version_info < (3, 11):
            raise UsageError(f"Python {platform.python_version()}: want 3.11 or newer")
        main()
    except (UsageError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, OSError):
            os.dup2(nowhere.fileno(), 1)  # else Python complains once more at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        message = str(error) or "interrupted; the last checkpoint, if any, is kept"
        print("error:", " ".join(message.split())[:500], file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)

@contextlib.contextmanager
def explain(message):
    """Whatever goes wrong inside becomes a UsageError: the message, then the cause."""
    try:
        yield
    except (UsageError, BrokenPipeError):
        raise
    except Exception as error:
        raise UsageError(f"{message} ({type(error).__name__}: {error})") from None

def write_atomic(path, data):
    """Write bytes or str under a temporary name of its own, then rename: the file is the old or the
    new, even if two processes write it."""
    path = pathlib.Path(path)
    with explain(f"cannot write {path}; nothing was replaced"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = pathlib.Path(folder) / path.name
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)

def check_out(out):
    """Raises UsageError now, rather than after hours, if nothing can be written in --out."""
    with explain(f"--out {out}: cannot write there"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()

# ------------------------------------------------------------------ hashes
def sha256(data):
    """The first 12 digits of the hash of bytes, or of a tensor's."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:12]

def kv_tensors(model, layer):
    """The parameters and buffers of the modules that make a layer's keys and values."""
    sites = sta.kv_sites(model)
    modules = [module for kind in sta.KINDS for module in sites[layer, kind].values()]
    return [x for module in modules for x in (*module.parameters(), *module.buffers())]

def device_of(model, layer):
    return kv_tensors(model, layer)[0].device

@torch.no_grad()
def model_hash(model, layers):
    """What tells models apart: a hash of all `kv_tensors` of the layers, floats in bfloat16. So a
    model is the same in float32 and bfloat16; in float16, which rounds otherwise, another."""
    tensors = [x.bfloat16() if x.is_floating_point() else x
               for layer in layers for x in kv_tensors(model, layer)]
    return sha256(torch.cat([x.cpu().flatten().view(torch.uint8) for x in tensors]))

# ------------------------------------------------------------------ SAEs
def save_sae(folder, sae, metadata):
    """cfg.json and sae_weights.safetensors in the layout of SAELens 6, for vectors less the mean of
    their head, which head_offsets.safetensors holds. The scale is folded into b_enc: ReLU is
    homogeneous, so z in units of x and s = 1 give the same function."""
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc * sae.scale, "W_dec": sae.W_dec,
               "b_dec": torch.zeros_like(sae.b_dec[0])}
    cfg = {"architecture": "topk", "d_in": sae.b_dec.shape[1], "d_sae": sae.n_latents,
           "k": sae.k, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.0", **metadata}}
    for name, tensors in (("head_offsets", {"head_offsets": sae.b_dec}), ("sae_weights", weights)):
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_atomic(folder / f"{name}.safetensors", safetensors.torch.save(tensors))
    write_atomic(folder / "cfg.json", json.dumps(cfg, indent=1) + "\n")  # last: now it is whole

def load_sae(folder):
    """(TopKSAE, metadata) from a folder that `save_sae` wrote."""
    with explain(f"{folder}: missing, truncated or corrupt, or of an older version; train again"):
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes())
        offsets = safetensors.torch.load((folder / "head_offsets.safetensors").read_bytes())
        weights["b_dec"] = offsets["head_offsets"]
        sae = sta.TopKSAE(*weights["b_dec"].shape, cfg["d_sae"], cfg["k"])
        sae.load_state_dict({**dict(sae.named_buffers()), **weights})
        range(1, cfg["d_sae"] + 1).index(cfg["k"])  # raises ValueError at another k
        metadata = cfg["metadata"]
        metadata["model"], metadata["settings"]["dtype"], metadata["model_sha256"]  # must be there
        sae.largest_z = metadata["largest_z"]  # in training, of held-out vectors
        return sae.requires_grad_(False), metadata

def load_saes(folder, model, layers=None, names=sta.KINDS):
    """({(layer, name): TopKSAE}, each on the device of its layer; the metadata of one of them).
    Raises UsageError if one is absent, corrupt, or of another model."""
    folder, saes = pathlib.Path(folder), {}
    matches = [re.fullmatch(rf"layer(\d+)\.{names[0]}", path.name) for path in folder.glob("*")]
    trained = sorted(int(match[1]) for match in matches if match)
    n_layers = model.get_decoder().config.num_hidden_layers
    for layer in layers or trained or [0]:
        if layer not in trained or layer >= n_layers:
            raise UsageError(f"{folder}: no SAEs of layer {layer}, but of {trained}")
        here = model_hash(model, [layer])
        for name in names:
            sae, metadata = load_sae(folder / f"layer{layer}.{name}")
            if metadata["model_sha256"] != here:
                raise UsageError(
                    f"{folder}: SAEs of {metadata['model']} in {metadata['settings']['dtype']}, "
                    f"not of this model in {model.dtype}; float16 goes with float16 only (--dtype)")
            saes[layer, name] = sae.to(device_of(model, layer))
    return saes, metadata

# ------------------------------------------------------------------ unfinished runs
def save_state(path, saes, optimizer, progress):
    """All that resuming needs, in one file, so that it is replaced as one."""
    tensors = {f"sae.{name}": x for name, x in nn.ModuleList(saes.values()).state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": x for name, x in moments.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_atomic(path, safetensors.torch.save(tensors, {"progress": json.dumps(progress)}))

def load_state(path, saes, optimizer, settings):
    """Inverse of `save_state`; returns progress, that of a new run if there is no file. Raises
    UsageError if it is corrupt or of other settings."""
    if not path.exists():
        return {"n_buffers": 0, "step": 0, "settings": settings, "log": []}
    with explain(f"{path}: corrupt; delete it and train again"):
        with safetensors.safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        expect_same(path, progress["settings"], settings)
        nn.ModuleList(saes.values()).load_state_dict(
            {name[4:]: x for name, x in tensors.items() if name.startswith("sae.")})
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"param_groups": groups, "state": {
            i: {name: tensors[f"adam.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for i in groups[0]["params"]}})
    return progress

def expect_same(path, then, now):
    """Raises UsageError if the settings of what is there differ from those of this run."""
    for name, value in now.items():
        if then.get(name) != value:
            raise UsageError(f"{path} was trained with {name} = {then.get(name)}, not {value}; "
                             "choose that, or another folder, or delete it")

def check_folder(folder, sites, settings, resume):
    """True if this very run is finished there. Raises UsageError rather than overwrite, or mix SAEs
    of different settings. sites: the (layer, name) of each SAE."""
    unfinished = (folder / "unfinished.safetensors").exists()
    if unfinished and not resume:
        raise UsageError(f"{folder} holds an unfinished run: add --resume, choose another --out, "
                         "or delete unfinished.safetensors")
    paths = [folder / f"layer{layer}.{name}" for layer, name in sites]
    done = [path for path in paths if (path / "cfg.json").exists()]
    general = {name: x for name, x in settings.items() if name not in ("layers", "model_sha256")}
    for path in sorted(folder.glob("layer*.*/cfg.json")):
        there = load_sae(path.parent)[1]["settings"]
        expect_same(path.parent, there, settings if path.parent in done else general)
    return len(done) == len(paths) and not unfinished
