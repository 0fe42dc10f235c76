"""How long a training step, a code and a cached token take, and how that grows.

    python -m beyond.benchmark                  # a minute on 2 cores; random weights and rows

Median times; the actions that are compared alternate, and the first three rounds are discarded.
step: forward, backward, Adam, unit atoms, as train_sae.py makes it. codes: encode and decode, as
sta.py defines them and through sta.fuse. cache: a further token through beyond/cache.py and
through a dense cache, in four layers of SmolLM2's shape. Writes results/benchmark.json.
Non-goal: quality.
"""
import contextlib
import functools
import json
import platform
import time

import torch
import transformers

import sta
import train_sae
from beyond import parse_args
from beyond.cache import ARGUMENT, cache_bytes, compress

SHAPES = {"tiny": (128, 512, 16, 1024), "SmolLM2": (64, 1024, 16, 1024),
          "Yi-6B": (128, 1024, 16, 2048), "large": (512, 4096, 32, 2048)}  # D, M, k, rows
CONTEXTS = (512, 1024, 2048, 4096)

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

def time_shape(shape, device):
    """One row of the benchmark: a training step and codes at (D, M, k, rows) on random rows."""
    D, M, k, n_rows = shape
    generator = torch.Generator().manual_seed(0)
    sae = sta.TopKSAE(D, M, k, generator).to(device)
    x = torch.randn(n_rows, D, generator=generator).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(): train_sae.train_step({"": sae}, optimizer, {"": x})

    codec = sta.DualBudget(sae, sae, sta.Budget(k, k))
    x_half = x[:n_rows // 2, None, None]  # keys, and values: (N, 1, 1, D)
    codecs = {"eager": codec, "compiled": sta.fuse({"": codec})[""]}
    codes = {name: functools.partial(sta.roundtrip, codec, x_half, x_half, None)
             for name, codec in codecs.items()}
    with torch.no_grad():
        ms = timed({"matmul": lambda: torch.addmm(sae.b_enc, x, sae.W_enc), **codes}, device)
    return {"D": D, "M": M, "k": k, "rows": n_rows, "matmul_ms": ms.pop("matmul"), "code_ms": ms,
            "step_ms": timed({"": step}, device)[""]}

@torch.no_grad()
def time_cache(n_layers, context, device):
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
    dense = contextlib.nullcontext(transformers.DynamicCache(config=config))
    for name, context_manager in (("dense", dense), ("codes", compress(model, codecs))):
        with context_manager as cache:
            for part in ids.split(512, 1):
                model(part, **{ARGUMENT: cache}, logits_to_keep=1)
            row[f"{name}_bytes"] = cache_bytes(cache)
            row[f"{name}_ms"] = timed({"": lambda: model(ids[:, :1], **{ARGUMENT: cache})},
                                      device, 10)[""]
    return row

def main(argv=None):
    args = parse_args(__doc__, argv, "device out")
    sta.check_out(args.out)
    device, shapes, contexts = torch.device(sta.pick_device(args.device)[0]), {}, []
    print("ms, medians      D    M  k  rows  matmul    step  code: eager  compiled  million rows/s")
    for name, shape in SHAPES.items():
        row = shapes[name] = time_shape(shape, device)
        print(f"{name:12}{shape[0]:6}{shape[1]:5}{shape[2]:3}{shape[3]:6}{row['matmul_ms']:8.1f}"
              f"{row['step_ms']:8.1f}{row['code_ms']['eager']:13.1f}"
              f"{row['code_ms']['compiled']:10.1f}"
              f"{shape[3] / row['step_ms'] / 1000:16.2f}")
    for context in CONTEXTS:
        contexts.append(time_cache(4, context, device))
        print("a token after {context:5}: dense {dense_ms:6.1f} ms, {dense_bytes:11,} bytes; codes "
              "{codes_ms:6.1f} ms, {codes_bytes:11,} bytes".format(**contexts[-1]))
    result = {"device": f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)",
              "torch": torch.__version__, "command": "python -m beyond.benchmark",
              "date": time.ctime(), "shapes": shapes, "contexts": contexts}
    sta.write_atomic(args.out / "benchmark.json", json.dumps(result) + "\n")
    print(f"wrote {args.out / 'benchmark.json'}")

if __name__ == "__main__":
    sta.run(main)
