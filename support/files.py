"""One-line errors; writing so that nothing is lost; SAEs and unfinished runs on disk."""
import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile

import safetensors.torch
import torch
from torch import nn

import sta
from sta import UsageError

ROOT = pathlib.Path(__file__).resolve().parent.parent  # the project's folder

def run_main(main):
    """Run a script's main: bad input ends in one line and exit status 2, Ctrl-C in 130; a reader of
    its output that went away, as `| head` does, in 141."""
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # logs; terminals without ±
    try:
        main()
    except (UsageError, KeyboardInterrupt) as error:
        message = str(error) or "interrupted; the last checkpoint, if any, is kept"
        print("error:", " ".join(message.split())[:500], file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains once more at its end
        sys.exit(141)

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
    """Write bytes or str under a temporary name, then rename: the file is the old or the new."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with explain(f"cannot write {path}; nothing was replaced"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)

def check_out(out):
    """Raises UsageError now, rather than after hours, if nothing can be written in --out."""
    with explain(f"--out {out}: cannot write there"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()

def sha256(data):
    """The first 12 digits of the hash of bytes, or of token ids."""
    data = data.numpy().tobytes() if isinstance(data, torch.Tensor) else data
    return hashlib.sha256(data).hexdigest()[:12]

@torch.no_grad()
def model_marks(model, layers):
    """What tells models apart -> {str(layer): {dtype, sums}}: of each parameter that makes the
    layer's keys or values, rounded to bfloat16, 16 parts; of each, the sum of w_i cos(i)."""
    sites, marks = sta.kv_sites(model), {}
    for layer in layers:
        modules = dict.fromkeys(module for kind in sta.KINDS for module in sites[layer, kind][0])
        parameters = [p.cpu().bfloat16().double().flatten()
                      for module in modules for p in module.parameters()]
        sums = [[float(f"{part.sum():.6g}") for part in (
            p * torch.arange(len(p)).double().cos()).tensor_split(16)] for p in parameters]
        marks[str(layer)] = {"dtype": str(next(iter(modules)).weight.dtype), "sums": sums}
    return marks

def same_marks(a, b):
    """Whether two marks are of one model, in the layers that both hold: equal, or nearly so if one
    of them was loaded in float16, from which rounding to bfloat16 now and then goes another way."""
    for layer in a.keys() & b.keys():
        x, y = (torch.tensor(mark[layer]["sums"], dtype=torch.float64) for mark in (a, b))
        dtypes = {a[layer]["dtype"], b[layer]["dtype"]}
        tolerance = 0.004 if len(dtypes) == 2 and "torch.float16" in dtypes else 1e-5
        if x.shape != y.shape or not ((x - y).norm(dim=1) <= tolerance * x.norm(dim=1)).all():
            return False
    return not a.keys().isdisjoint(b)

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
        cfg = json.loads((folder / "cfg.json").read_text())
        weights = safetensors.torch.load((folder / "sae_weights.safetensors").read_bytes())
        offsets = safetensors.torch.load((folder / "head_offsets.safetensors").read_bytes())
        weights["b_dec"] = offsets["head_offsets"]
        sae = sta.FastSAE(*weights["b_dec"].shape, cfg["d_sae"], cfg["k"])
        sae.load_state_dict({**dict(sae.named_buffers()), **weights})
        return sae.requires_grad_(False), cfg["metadata"]

def load_saes(folder, model, layers=None, names=sta.KINDS):
    """({(layer, name): TopKSAE}, each on the device of its layer; the metadata of one of them).
    Raises UsageError if one is absent, corrupt, or of another model."""
    folder, saes, sites = pathlib.Path(folder), {}, sta.kv_sites(model)
    found = [re.fullmatch(rf"layer(\d+)\.{names[0]}", path.name) for path in folder.glob("layer*")]
    there = sorted(int(match[1]) for match in found if match)
    for layer in layers or there or [0]:
        if layer not in there or (layer, "key") not in sites:
            raise UsageError(f"{folder}: no SAEs of layer {layer}, but of {there}")
        marks = model_marks(model, [layer])
        for name in names:
            sae, metadata = load_sae(folder / f"layer{layer}.{name}")
            if not same_marks(metadata.get("marks", {}), marks):
                raise UsageError(f"{folder}: SAEs of {metadata.get('model')}, not of this model")
            saes[layer, name] = sae.to(sites[layer, "key"][0][0].weight.device)
    return saes, metadata

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
        return {"buffers": 0, "step": 0, "settings": settings, "log": []}
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
    of different settings."""
    unfinished = (folder / "unfinished.safetensors").exists()
    if unfinished and not resume:
        raise UsageError(f"{folder} holds an unfinished run: add --resume, choose another "
                             "--out, or delete unfinished.safetensors")
    paths = [folder / f"layer{layer}.{name}" for layer, name in sites]
    done = [path for path in paths if (path / "cfg.json").exists()]
    general = {name: x for name, x in settings.items() if name not in ("layers", "model_sha256")}
    for path in sorted(folder.glob("layer*.*/cfg.json")):
        there = load_sae(path.parent)[1].get("settings", {})
        expect_same(path.parent, there, settings if path.parent in done else general)
    return len(done) == len(paths) and not unfinished
