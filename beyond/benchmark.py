"""How long a training step, a code and a cached token take, and how that grows.

    python -m beyond.benchmark                  # two minutes on 2 cores; random weights and rows

Medians of actions that take turns, the first three rounds left out. step: forward, backward, Adam,
unit atoms, as train_sae.py makes it; compiled: the loss as one graph of torch.compile. codes:
encode and decode, as sta.py defines them and through sta.fuse. If beyond/cache.py is there, a token
through its cache, layers of SmolLM2's shape. Writes results/benchmark.json and growth.png.
Non-goal: peers; their training steps are compared by hand, see ../README.md.
"""
import argparse
import contextlib
import ctypes
import datetime
import importlib
import json
import pathlib
import platform
import re
import time

import torch
import transformers

import plots
import sta
import train_sae

SHAPES = {"tiny": (128, 512, 16, 1024), "SmolLM2": (64, 1024, 16, 1024),
          "Yi-6B": (128, 1024, 16, 2048), "large": (512, 4096, 32, 2048)}  # D, M, k, rows

def timed(actions, device, n=20):
    """{name: median ms} of callables, run in turn."""
    ms = {name: [] for name in actions}
    for i in range(n + 3):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:
                ms[name].append(1000 * (time.perf_counter() - began))
    return {name: sorted(times)[n // 2] for name, times in ms.items()}

def peak_bytes(action, device):
    """Memory that an action takes at most, beyond what is held before it; None if not known."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before

    def read(name):
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(re.search(name + r":\s+(\d+)", status)[1])

    try:  # Linux: give back what is free, and forget the peak so far
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        action()
        return read("VmHWM") - before
    except OSError:
        return None

def time_steps(shape, device, compiled=True):
    """One row of the benchmark: training steps and codes at (D, M, k, rows) on random rows."""
    D, M, k, n_rows = shape
    generator = torch.Generator().manual_seed(0)
    sae = sta.TopKSAE(D, M, k, generator).to(device)
    x = torch.randn(n_rows, D, generator=generator).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(loss):
        loss(x, k).backward()
        train_sae.update({"": sae}, optimizer, 0)

    codec = sta.DualBudget(sae, sae, sta.Budget(k, k))
    half = x[:n_rows // 2, None]  # as keys and as values (N, 1, D): n_rows vectors in all
    steps = {"eager": lambda: step(sae.loss)}
    codes = {"eager": lambda: codec.decode(codec.encode(half, half))}
    if compiled:
        graph = torch.compile(sae.loss)
        steps["compiled"] = lambda: step(graph)
        fused = sta.fuse({"": codec})[""]
        if fused is not codec:
            codes["compiled"] = lambda: fused.roundtrip(half, half, None)
    with torch.no_grad():
        ms = timed({"matmul": lambda: torch.addmm(sae.b_enc, x, sae.W_enc), **codes}, device)
    return {"D": D, "M": M, "k": k, "rows": n_rows, "matmul_ms": ms.pop("matmul"), "code_ms": ms,
            "step_ms": timed(steps, device), "peak_bytes": peak_bytes(steps["eager"], device)}

@torch.no_grad()
def time_cache(cache_module, n_layers, context, device):
    """ms for one new token after `context` others, and bytes, dense and as codes (8, 16): layers of
    SmolLM2's shape, random weights."""
    config = transformers.LlamaConfig(
        num_hidden_layers=n_layers, hidden_size=576, intermediate_size=1536, vocab_size=512,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2 * context)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device).eval()
    sae = {kind: sta.TopKSAE(64, 1024, 16).to(device) for kind in sta.KINDS}
    codecs = dict.fromkeys(range(n_layers), sta.DualBudget(sae["key"], sae["value"]))
    ids, row = torch.randint(512, (1, context), device=device), {"layers": n_layers,
                                                                 "context": context}
    for name in ("dense", "codes"):
        with (cache_module.compress(model, codecs) if name == "codes" else
              contextlib.nullcontext(transformers.DynamicCache(config=config))) as cache:
            for part in ids.split(512, 1):
                model(part, **{cache_module.ARGUMENT: cache}, logits_to_keep=1)
            row[f"{name}_bytes"] = cache_module.cache_bytes(cache)
            row[f"{name}_ms"] = timed({"": lambda: model(
                ids[:, :1], **{cache_module.ARGUMENT: cache})}, device, 10)[""]
    return row

def draw_growth(bench):
    """How a training step grows with the dictionary, and a decoded token with the context."""
    figure, panels = plots.plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    key, value = plots.KIND_STYLE.values()
    for panel, name, label in ((panels[0], "M", "latents M (D 128, k 16)"),
                               (panels[1], "k", "budget k (D 128, M 1024)")):
        rows = bench["growth"][name]
        panel.plot([r[name] for r in rows], [r["rows"] / r["step_ms"]["eager"] / 1000
                                             for r in rows], color=key[0], marker=key[1])
        panel.set_xlabel(label)
        panel.set_ylabel("training, million rows a second")
    for panel, name, label in ((panels[2], "context", "tokens in the cache (4 layers)"),
                               (panels[3], "layers", "layers (2,048 tokens in the cache)")):
        rows, more = bench["growth"].get(name, []), panel.twinx()
        for path, (colour, marker, dash) in (("codes", key), ("dense", value)):
            at = [r[name] for r in rows]
            panel.plot(at, [r[f"{path}_ms"] for r in rows], color=colour, marker=marker, ls=dash,
                       label=f"{path}, ms")
            more.plot(at, [r[f"{path}_bytes"] / 1e6 for r in rows], color=colour, marker=marker,
                      mfc="none", ls=":", label=f"{path}, MB")
        more.set_yscale("log", base=2)
        more.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(label)
        panel.set_ylabel("ms for one new token")
        more.set_ylabel("cache, MB (dotted)")
        panel.legend(fontsize=8)
    for panel in panels:
        ticks = panel.lines[0].get_xdata()
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    figure.suptitle(f"the shape of growth, on {bench['device']}")
    return figure

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if any)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    args = parser.parse_args(argv)
    sta.check_out(args.out)
    device = torch.device(sta.pick_device(args.device)[0])
    table = {}
    print("ms, medians      D    M  k  rows  matmul | step: eager compiled | codes: eager compiled "
          "| million rows/s, peak MB of a step")
    for name, shape in SHAPES.items():
        row = table[name] = time_steps(shape, device)
        ms = [f"{row[what].get(path, float('nan')):8.1f}" for what in ("step_ms", "code_ms")
              for path in ("eager", "compiled")]
        print(f"{name:12}{shape[0]:6}{shape[1]:5}{shape[2]:3}{shape[3]:6}{row['matmul_ms']:8.1f} |"
              f"{ms[0]:>12}{ms[1]} |{ms[2]:>14}{ms[3]} |"
              f"{shape[3] / row['step_ms']['eager'] / 1000:8.2f} "
              f"{(row['peak_bytes'] or 0) / 1e6:8.0f}")
    growth = {"M": [time_steps((128, m, 16, 1024), device, False) for m in (512, 1024, 2048, 4096)],
              "k": [time_steps((128, 1024, k, 1024), device, False) for k in (4, 8, 16, 32, 64)]}
    if (sta.HERE / "beyond" / "cache.py").exists():
        cache = importlib.import_module("beyond.cache")  # by name: this file works without it
        growth["context"] = [time_cache(cache, 4, n, device) for n in (512, 1024, 2048, 4096)]
        growth["layers"] = [time_cache(cache, n, 2048, device) for n in (1, 2, 4, 8)]
    else:
        print("no timings of the cache: beyond/cache.py is not there")
    for row in growth.get("context", []) + growth.get("layers", []):
        print("a token after {context:5} in {layers} layers: dense {dense_ms:6.1f} ms, "
              "{dense_bytes:11,} bytes; codes {codes_ms:6.1f} ms, {codes_bytes:11,} bytes".format(
                  **row))
    content = {"device": f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)",
               "torch": torch.__version__, "command": "python -m beyond.benchmark",
               "date": datetime.date.today().isoformat(), "shapes": table, "growth": growth}
    sta.write_atomic(args.out / "benchmark.json", json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.out / 'benchmark.json'}")
    plots.save(draw_growth(content), args.out / "growth.png")

if __name__ == "__main__":
    sta.run(main)
