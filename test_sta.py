"""What the README says, executably: python -m pytest -q (CPU, offline, under two minutes).

Each check compares with something independent: a Python loop, float64, numpy, Hugging Face's own
cache or loss, an uninterrupted run. Non-goals: speed (README has the commands), model quality.
"""
import copy
import functools
import itertools
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import numpy as np
import pytest
import torch
import transformers

import evaluate
import plots
import sta
import train_sae

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_neox", "phi3"]


def rows_of(n, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) * 3 + 1


def small_sae(dim=16, n_latents=40, seed=0):
    sae = sta.TopKSAE(dim, n_latents, torch.Generator().manual_seed(seed))
    sae.centre(rows_of(500, dim))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return sae


def small_model(family, kv_heads=2, vocab_size=128, max_position_embeddings=64, **options):
    config = transformers.AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=max_position_embeddings, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
        **({} if family == "gpt_neox" else {"num_key_value_heads": kv_heads}),
        **({"head_dim": 16} if family in ("qwen3", "gemma3_text") else {}), **options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def small_saes(model, n_latents=64):
    heads, dim = sta.kv_shape(model.get_decoder().config)
    return {key: small_sae(dim, n_latents, seed) for seed, key in enumerate(sta.kv_sites(model))}


def tokens_of(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def script(module, monkeypatch, *argv):
    """Run a script's main in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
    try:
        sta.run(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


# ---------------------------------------------------------------- 1. the Top-K SAE

def test_code_is_that_of_a_python_loop():
    sae, x = small_sae().double(), rows_of(7).double()
    z, idx = sae.encode(x, 5)
    x_hat = sae.decode(z, idx)
    for n in range(len(x)):
        acts = [max(0.0, sum((x[n, d] / sae.scale - sae.b_dec[d]) * sae.W_enc[d, m]
                             for d in range(16)).item() + sae.b_enc[m].item()) for m in range(40)]
        best = sorted(range(40), key=lambda m: -acts[m])[:5]
        assert idx[n].tolist() == best
        assert z[n].tolist() == pytest.approx([acts[m] for m in best], abs=1e-12)
        expected = sae.scale * (sum(acts[m] * sae.W_dec[m] for m in best) + sae.b_dec)
        torch.testing.assert_close(x_hat[n], expected, atol=1e-10, rtol=0)


def test_code_at_a_smaller_budget_is_a_prefix_and_shapes_are_free():
    sae, x = small_sae(), rows_of(24)
    z, idx = sae.encode(x, 9)
    assert torch.equal(sae.encode(x, 4)[0], z[:, :4]) and (z.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(sae(x.view(2, 3, 4, 16), 9).view(24, 16), sae.decode(z, idx))


def test_all_latents_is_the_dense_autoencoder():
    sae, x = small_sae().double(), rows_of(20).double()
    dense = torch.relu((x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc)  # (N, M)
    torch.testing.assert_close(sae(x, 40), (dense @ sae.W_dec + sae.b_dec) * sae.scale)


@pytest.mark.parametrize("k", [0, -1, 41])
def test_budget_out_of_range(k):
    with pytest.raises(sta.UsageError, match=f"k = {k}: .* n_latents = 40"):
        small_sae().encode(rows_of(2), k)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_gradients_equal_a_dense_float64_autoencoder(k):
    sae, x = small_sae().double(), rows_of(30).double()
    sae.loss(x, k, k, dead_window=10**9)[0].backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    target = x / sae.scale
    acts = torch.relu((target - sae.b_dec) @ sae.W_enc + sae.b_enc)
    keep = acts >= acts.sort(dim=-1, descending=True).values[:, k - 1:k]
    ((target - (acts * keep) @ sae.W_dec - sae.b_dec) ** 2).sum(-1).mean().backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-10, rtol=0, msg=name)


def test_auxk_reaches_the_encoder_of_dead_latents_only():
    sae, x = small_sae(), rows_of(50)
    dead, before = torch.arange(40) >= 30, sae.b_enc.detach().clone()
    sae.auxk(x / sae.scale, rows_of(50, seed=1), dead).backward()
    assert sae.W_enc.grad[:, dead].abs().sum() > 0 and sae.W_dec.grad[dead].abs().sum() > 0
    assert sae.W_enc.grad[:, ~dead].abs().sum() == 0 and sae.W_dec.grad[~dead].abs().sum() == 0
    assert sae.b_enc.grad is None and (sae.b_enc[dead] > before[dead]).all()  # raised instead


def test_idle_counts_rows_since_a_latent_was_above_zero():
    sae, x = small_sae(), rows_of(50)
    with torch.no_grad():
        sae.b_enc[:20] = -100.0  # these may be chosen at k = 40, with z = 0: not fired
    sae.loss(x, 40, 40, 10**9)
    assert (sae.idle[:20] == 50).all() and (sae.idle[20:] == 0).all()
    sae.loss(x, 40, 1, 10**9)  # of forty chosen, only the strongest counts
    strongest = sae.encode(x, 1)[1].unique()
    assert (sae.idle[strongest] == 0).all() and (sae.idle == 0).sum() == len(strongest)


def test_atoms_stay_unit_and_training_reduces_the_error():
    sae, x, errors = small_sae(), rows_of(512), []
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(60):
        loss, error = sae.loss(x, 4, 4, 10**9)
        loss.backward()
        sae.project_gradient()
        assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6
        optimizer.step()
        optimizer.zero_grad()
        sae.renormalise()
        errors.append(error.item())
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40), atol=1e-6, rtol=0)
    assert errors[-1] < 0.8 * errors[0]


def test_fidelity_equals_numpy_however_it_is_streamed():
    x, x_hat = rows_of(64).double(), rows_of(64, seed=3).double()
    z, idx = torch.relu(rows_of(64, 4, seed=5) - 1), torch.arange(256).view(64, 4) % 7
    fidelity = sta.Fidelity(n_latents=10)
    for part in torch.arange(64).split(24):
        fidelity.update(x[part], x_hat[part], z[part], idx[part])
    a, b = x.numpy().astype(float), x_hat.numpy().astype(float)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    fired = np.unique(idx.numpy()[z.numpy() > 0])
    expected = {"fvu": ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum(),
                "cos": ((a * b).sum(1) / norm_a / norm_b).mean(),
                "rel_norm": (norm_b / norm_a).mean(),
                "l0": (z.numpy() > 0).sum(1).mean(), "dead": 1 - len(fired) / 10, "rows": 64}
    assert fidelity.result() == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- 2-4. hooks, elbow, budgets

@pytest.mark.parametrize("family,kv_heads", [(f, h) for f in FAMILIES for h in (1, 2, 4)
                                             if (f, h) not in (("gpt_neox", 1), ("gpt_neox", 2))])
def test_family(family, kv_heads):
    """Captured K and V are those of Hugging Face's cache; identity changes nothing, zero does."""
    model, ids = small_model(family, kv_heads), tokens_of(2, 12)
    cache = transformers.DynamicCache(config=model.config)
    with sta.capture(model) as rows:
        logits = model(ids, past_key_values=cache).logits
    for layer in range(2):
        keys, values = rows[layer, "key"], rows[layer, "value"]  # (B, T, H, D)
        cached = cache.layers[layer].keys.transpose(1, 2)  # after RoPE
        assert keys.shape == (2, 12, kv_heads, 16)
        torch.testing.assert_close(values, cache.layers[layer].values.transpose(1, 2))
        torch.testing.assert_close(keys[:, 0], cached[:, 0])  # RoPE turns position 0 by no angle
        torch.testing.assert_close(keys.norm(dim=-1), cached.norm(dim=-1))
    same, zero = {key: lambda x, live: x for key in rows}, lambda x, live: torch.zeros_like(x)
    with sta.reconstruct(model, same, sink=0):
        torch.testing.assert_close(model(ids).logits, logits, atol=0, rtol=0)
    for kind in sta.KINDS:
        with sta.reconstruct(model, {(1, kind): zero}, sink=0):
            assert (model(ids).logits - logits)[:, 1:].abs().max() > 1e-3  # already at prefill
    with sta.reconstruct(model, {key: zero for key in rows}, sink=11):  # all but the last token
        last = model(ids).logits - logits
    assert last[:, :-1].abs().max() == 0 and last[:, -1].abs().max() > 1e-4


@pytest.mark.parametrize("context", [
    sta.capture, lambda model: sta.reconstruct(model, {(0, "key"): lambda x, live: -x})])
def test_hooks_are_gone_after_an_exception(context):
    model, ids = small_model("llama"), tokens_of(1, 5)
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError):
        with context(model):
            model(ids)
            1 / 0
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_unsupported_family_and_absent_layer():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(sta.UsageError, match="'gpt2' is not supported; supported types: llama"):
        sta.kv_sites(gpt2)
    with pytest.raises(sta.UsageError, match="layer 5: the model has layers 0 to 1"):
        with sta.reconstruct(small_model("llama"), {(5, "key"): torch.sin}):
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_sees_the_reconstruction(family):
    """Greedy generate, left-padded, equals choosing from full forward passes without a cache."""
    model = small_model(family, 4)
    codecs = sta.dual(small_saes(model), sta.Budget(4, 6))
    ids, mask = tokens_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    with sta.reconstruct(model, codecs, sink=2):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        for row, start in ((0, 0), (1, 4)):
            text = ids[row:row + 1, start:]
            for _ in range(6):
                text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
            assert output[row, start:].tolist() == text[0].tolist()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False,
                           eos_token_id=None, pad_token_id=0)
    assert not torch.equal(plain, output)


def test_budget_by_layer_and_dense_kinds():
    saes = small_saes(small_model("llama"))
    codecs = sta.dual(saes, {0: sta.Budget(2, None), 1: sta.Budget(None, 5)}, coef_bits=32)
    assert set(codecs) == {(0, "key"), (1, "value")}
    x = rows_of(6)
    assert torch.equal(codecs[1, "value"](x, None), saes[1, "value"](x, 5))


def test_codecs_are_told_which_tokens_are_live():
    """Neither sinks nor padding on either side; with a cache, the new tokens' part."""
    model, told = small_model("llama"), []
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    codec = {(0, "key"): lambda x, live: told.append(live.int().tolist()) or x}
    with sta.reconstruct(model, codec, sink=1):
        cache = model(tokens_of(2, 6), attention_mask=mask).past_key_values
        model(tokens_of(2, 1), attention_mask=torch.cat([mask, torch.ones(2, 1).long()], 1),
              past_key_values=cache)
    assert told == [[[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]], [[1], [1]]]


def test_curve_and_elbow():
    sae, x = small_sae(), rows_of(100)
    curve = sta.BudgetCurve(sae, [8, 1, 40, 64])  # 64 is over n_latents: left out
    curve.update(x[:30])
    curve.update(x[30:])
    points = curve.result()
    assert [p["k"] for p in points] == [1, 8, 40]
    whole = sta.Fidelity()
    whole.update(x, sae(x, 8))
    assert points[1]["fvu"] == pytest.approx(whole.result()["fvu"])
    kinked = [{"k": k, "cos": min(0.9, 0.1 * k) + 0.0001 * k} for k in range(1, 33)]
    assert sta.elbow(kinked) == 9
    assert sta.elbow([{"k": 1, "cos": 0.9}]) == 1


def test_bytes():
    dense, budget = sta.Budget(None, None), sta.Budget(8, 16)
    assert sta.bytes_per_token(dense, 1, 128, 1024) == 512
    assert sta.bytes_per_token(budget, 1, 128, 1024) == 96  # METHOD: 18.75 % of 512
    assert sta.bytes_per_token(sta.Budget(8, None), 4, 64, 1024) == 4 * (32 + 128)
    assert sta.bytes_per_token(budget, 1, 128, 70_000) == 144  # wider indices
    # packed: 10 bits of index and 6 of coefficient, and a step a vector: 3 bits a value at D = 64
    assert sta.bytes_per_token(sta.Budget(9, 13), 3, 64, 1024, coef_bits=6) == 3 * 48
    assert sta.bytes_per_token(sta.Budget(3, None), 1, 64, 512, coef_bits=7) == 2 + 6 + 128


@pytest.mark.parametrize("bits", [3, 6])
def test_rounded_coefficients_against_a_loop(bits):
    z = (rows_of(20, 7) - 3).requires_grad_()
    rounded = sta.round_coefficients(z, bits)
    for row, found in zip(z.tolist(), rounded.tolist()):
        step = float(np.float16(max(map(abs, row)) / (2 ** (bits - 1) - 1)))
        assert found == pytest.approx([round(value / step) * step for value in row], abs=1e-5)
    rounded.sum().backward()
    assert (z.grad == 1).all() and torch.equal(sta.round_coefficients(z, 16), z.half().float())


@pytest.mark.parametrize("metric", ["plain", "loss"])
def test_gradient_of_pursuit_is_that_through_least_squares(metric):
    sae, x = small_sae().double(), rows_of(20).double()
    if metric == "loss":
        sae.set_metric(rows_of(50, seed=2).double())
    loss, error = sae.pursuit_loss(x, 4)
    loss.backward()
    atoms = sae.W_dec.detach().clone().requires_grad_()
    _, idx = sae.pursue(x, 4)
    target = (x / sae.scale - sae.b_dec).detach() @ sae.metric
    chosen = (atoms @ sae.metric)[idx].mT  # (N, D, k)
    z = torch.linalg.pinv(chosen) @ target[..., None]
    expected = (target[..., None] - chosen @ z).square().sum((1, 2)).mean()
    expected.backward()
    torch.testing.assert_close(error, expected.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sae.W_dec.grad, atoms.grad, atol=1e-5, rtol=1e-4)


def test_metric_is_half_plain_and_half_along_the_gradients():
    sae, g, error = small_sae().double(), rows_of(50, seed=2).double(), rows_of(9, seed=3).double()
    sae.set_metric(g)
    along = (error @ g.T).square().mean(1) / (g.square().sum(1).mean() / 16)
    torch.testing.assert_close((error @ sae.metric).square().sum(1),
                               (error.square().sum(1) + along) / 2)


def test_loss_gradients_against_finite_differences():
    model, windows = small_model("qwen2"), tokens_of(3, 10)
    found = sta.loss_gradients(model, windows, [0, 1], seed=4)
    logits = model(windows).logits.flatten(0, 1)
    drawn = logits.softmax(-1).multinomial(
        1, generator=torch.Generator().manual_seed(4)).squeeze(-1)
    for key, g in found.items():
        assert g.shape == (3, 10, 2, 16) and g[:, 0].abs().max() == 0  # the sink stays exact
        way, losses = g.clone() / g.norm(), []
        for eps in (0.02, -0.02):
            with sta.reconstruct(model, {key: lambda x, live: x + eps * way}):
                logits = model(windows).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"))
        slope = (losses[0] - losses[1]).item() / 0.04
        assert slope == pytest.approx(g.norm().item(), rel=0.02), key


@pytest.mark.parametrize("pursuit", [False, True])
def test_costs_of_codes(pursuit):
    sae, x, g = small_sae(), rows_of(30), rows_of(30, seed=1)
    sae.pursuit = pursuit
    costs = sta.code_costs(sae, x, g, coef_bits=32)
    assert list(costs) == list(range(1, 9))  # half of head_dim
    for k in (1, 5, 8):
        expected = ((sae(x, k) - x) * g).sum(-1).square().mean() / 2
        assert costs[k] == pytest.approx(expected.item(), rel=1e-3)


def test_allocation_is_the_best_of_all():
    """Greed is optimal where costs are convex; here against every combination."""
    weights = {"a": 4.0, "b": 1.0, "c": 0.3}
    costs = {site: {k: w / k for k in range(1, 6)} for site, w in weights.items()}
    size = lambda k: 2 + 3 * k
    for limit in (15, 20, 31, 60):
        found = sta.allocate(costs, size, limit)
        every = [ks for ks in itertools.product(range(1, 6), repeat=3)
                 if sum(map(size, ks)) <= limit]
        best = min(sum(costs[s][k] for s, k in zip(weights, ks)) for ks in every)
        assert sum(costs[s][k] for s, k in found.items()) == pytest.approx(best), limit
    with pytest.raises(sta.UsageError, match="bytes=14: want 15 or more"):
        sta.allocate(costs, size, 14)


# ---------------------------------------------------------------- 5. the compressed cache

CACHED = ["llama", "mistral", "qwen2", "qwen3"]


def exact_saes(model):
    """SAEs of 2 D latents that lose nothing at k = 2 D: the positive and the negative axes."""
    heads, dim = sta.kv_shape(model.config)
    sae = sta.TopKSAE(dim, 2 * dim)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(dim), -torch.eye(dim)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return dict.fromkeys(sta.kv_sites(model), sae.requires_grad_(False))


def padded(batch=3, length=9):
    ids, mask = tokens_of(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row, n in enumerate((0, 4, 2)):
        ids[row, :n], mask[row, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("how", ["exact SAEs", "all exact"])
def test_cache_that_loses_nothing_generates_the_same(family, how):
    model = small_model(family, max_position_embeddings=256)
    greedy = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense = model.generate(**padded(), **greedy)
    saes, sizes = exact_saes(model), (4, 3) if how == "exact SAEs" else (4, 300)
    with sta.compress(model, saes, sta.Budget(32, 32), *sizes, coef_bits=32) as cache:
        found = model.generate(**padded(), past_key_values=cache, **greedy)
    assert found.tolist() == dense.tolist()
    assert cache.get_seq_length() == 208 and len(cache.layers) == 2


@pytest.mark.parametrize("family", CACHED)
def test_cache_with_eager_attention_a_sliding_window_and_bf16(family):
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    model = small_model(family, max_position_embeddings=256,
                        **({} if family == "llama" else window))
    model.set_attn_implementation("eager")
    greedy = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    dense, saes = model.generate(**padded(), **greedy), exact_saes(model)
    with sta.compress(model, saes, sta.Budget(32, 32), 2, 3, coef_bits=32) as cache:
        found = model.generate(**padded(), past_key_values=cache, **greedy)
    assert found.tolist() == dense.tolist()
    with sta.compress(model.bfloat16(), saes, sta.Budget(32, 32), 2, 3) as cache:
        model.generate(**padded(), past_key_values=cache, **greedy)
    assert cache.layers[0].kept["key exact"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("coef_bits", [16, 8])
def test_cache_computes_what_the_hooks_do(family, coef_bits):
    """recent = 0: token by token, in chunks or at once, the logits of `reconstruct`."""
    model, inputs = small_model(family), padded(length=20)
    ids, mask = inputs.values()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    saes, budget = small_saes(model), sta.Budget(4, 6)
    with sta.reconstruct(model, sta.dual(saes, budget, coef_bits), sink=1):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for step in (1, 7, 20):
        with sta.compress(model, saes, budget, 1, 0, coef_bits) as cache:
            found = torch.cat([model(ids[:, i:i + step], attention_mask=mask[:, :i + step],
                                     position_ids=positions[:, i:i + step],
                                     past_key_values=cache).logits
                               for i in range(0, 20, step)], 1)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_recent_is_a_sliding_window():
    """A token is exact while fewer than `recent` are newer: what is not coded must not matter."""
    model, ids = small_model("llama"), tokens_of(1, 12)
    saes = small_saes(model)
    with sta.compress(model, saes, sta.Budget(2, 3), sink=1, recent=4) as cache:
        for i in range(12):
            model(ids[:, i:i + 1], past_key_values=cache)
            kept = cache.layers[1].kept
            assert kept["key exact"].shape[2] == min(4, i + 1)
            assert kept["value code 0"].shape[2] == max(0, i + 1 - 4)
    with sta.capture(model) as rows, sta.compress(model, saes, sta.Budget(2, 3), 1, 4) as again:
        model(ids, past_key_values=again)
    layer = again.layers[0]
    torch.testing.assert_close(layer.kept["value exact"],
                               rows[0, "value"][:, -4:].transpose(1, 2))
    z, idx = saes[0, "value"].encode(rows[0, "value"][:, :8], 3)
    torch.testing.assert_close(layer.kept["value code 0"], z.half().transpose(1, 2))


def test_beam_search_and_sampling():
    model = small_model("llama", max_position_embeddings=128)
    saes = exact_saes(model)
    for how in ({"num_beams": 4, "do_sample": False}, {"do_sample": True, "top_k": 0},
                {"num_beams": 2, "num_return_sequences": 2, "do_sample": False}):
        how |= {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
        torch.manual_seed(0)
        dense = model.generate(**padded(), **how)
        torch.manual_seed(0)
        with sta.compress(model, saes, sta.Budget(32, 32), 2, 5, 32) as cache:
            found = model.generate(**padded(), past_key_values=cache, **how)
        assert found.tolist() == dense.tolist()


def test_reorder_crop_and_growth_at_random():
    """recent = 0: after any of them the logits are those of a new cache that read what is left."""
    model, generator = small_model("llama", max_position_embeddings=256), np.random.default_rng(0)
    saes, budget, ids = small_saes(model), sta.Budget(3, 5), tokens_of(3, 1)
    with sta.compress(model, saes, budget, 1, 0) as cache:
        model(ids, past_key_values=cache)
        for turn in range(30):
            what = generator.integers(3)
            if what == 0:
                rows = torch.tensor(generator.integers(0, 3, 3))
                cache.reorder_cache(rows)
                ids = ids[rows]
            elif what == 1 and ids.shape[1] > 6:
                n = int(generator.integers(1, 5))
                cache.crop(-n)
                ids = ids[:, :-n]
            new = tokens_of(3, int(generator.integers(1, 6)), seed=turn)
            ids = torch.cat([ids, new], 1)
            found = model(new, past_key_values=cache).logits
            assert cache.get_seq_length() == ids.shape[1]
            assert cache.layers[0].kept["all positions"].shape == (3, 1, ids.shape[1])
        used = cache.nbytes()
        cache.reset()
        assert cache.nbytes() == 0 and cache.get_seq_length() == 0
        expected = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, -found.shape[1]:], atol=1e-4, rtol=0)
        assert cache.nbytes() == used


@pytest.mark.parametrize("coef_bits", [16, 8])
def test_bytes_of_the_cache_are_those_of_the_formula(coef_bits):
    model = small_model("llama", max_position_embeddings=256)
    with sta.compress(model, small_saes(model), sta.Budget(3, 5), 4, 10, coef_bits) as cache:
        model(tokens_of(2, 200), past_key_values=cache)
    coded = sta.bytes_per_token(sta.Budget(3, 5), 2, 16, 64, coef_bits)
    exact = 2 * 2 * 16 * 4  # K and V of two heads in float32
    assert cache.nbytes() == 2 * (2 * (190 * coded + 14 * exact) + 200 * 4)  # and positions, once


def test_cache_refuses_what_it_would_get_wrong():
    with pytest.raises(sta.UsageError, match="compressed cache takes llama, .* this is phi3"):
        with sta.compress(small_model("phi3"), {}, sta.Budget()):
            pass
    model = small_model("llama")
    with sta.compress(model, small_saes(model), sta.Budget(2, 3)) as cache:
        with pytest.raises(sta.UsageError, match="give the model past_key_values=the cache"):
            model(tokens_of(1, 3))
    with pytest.raises(sta.UsageError, match="only inside `with compress"):
        model(tokens_of(1, 3), past_key_values=cache)
    with pytest.raises(sta.UsageError, match="coef_bits 11 and 64 latents do not pack into 16"):
        with sta.compress(model, small_saes(model), sta.Budget(2, 3), coef_bits=11):
            pass


# ---------------------------------------------------------------- 6. the fast path

@pytest.mark.parametrize("rows, n_latents, k", [(300, 64, 3), (300, 64, 4), (300, 64, 5),
                                                (1, 36, 36), (600, 33, 1), (0, 64, 3)])
@pytest.mark.parametrize("threads", [1, 3])
def test_top_k_is_torchs(rows, n_latents, k, threads):
    """Two rounds of eight groups or one, numpy's partition or torch's; no ties in these rows."""
    x, W, before = rows_of(rows), rows_of(n_latents, seed=1).T, torch.get_num_threads()
    torch.set_num_threads(threads)
    z, idx = sta.top_k(x, W, torch.ones(n_latents), k)
    torch.set_num_threads(before)
    expected = (x @ W + 1).topk(k)
    assert torch.equal(idx, expected.indices)
    torch.testing.assert_close(z, expected.values, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_sparse_gradients_are_right_by_gradcheck(k):
    x = rows_of(9, 4).double().requires_grad_()
    sae = small_sae(4, 20).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}

    def forward(x, *values):
        for name, value in zip(weights, values):
            setattr(sae, name, value)
        z, _, x_hat = sta.sparse_forward(sae, x, k)
        return z, x_hat

    for name in weights:
        delattr(sae, name)
    assert torch.autograd.gradcheck(forward, (x, *weights.values()))


def test_sparse_gradients_under_autocast_are_close():
    """As on CUDA: the encoder's matmul in bf16, all else in float32."""
    found = []
    for enabled in (False, True):
        sae = small_sae()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, error = sae.loss(rows_of(400), 6, 6, 10**9)
        loss.backward()
        found.append((error, *(p.grad for p in sae.parameters())))
        assert all(x.dtype == torch.float32 for x in found[-1])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.02, atol=0)
    for exact, rough in zip(*found):
        assert torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.99


def check_fast(device, compiled):
    """Values of encode and decode; graphs compiled by a sweep over SAEs, budgets and rows."""
    saes = {(0, kind): small_sae(seed=i).to(device) for i, kind in enumerate(sta.KINDS)}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sta.speed_up(saes, compiled)
    for sae, n, k in itertools.product(saes.values(), (50, 7, 400, 31), (8, 3, 40, 5)):
        x = rows_of(n).to(device)
        z, idx = sae.encode(x.view(1, n, 16), k)
        expected, places = sta.TopKSAE.encode(sae, x, k)
        torch.testing.assert_close(z[0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.decode(z, idx)[0],
                                   sta.TopKSAE.decode(sae, expected, places), atol=1e-5, rtol=1e-5)
    assert compiled == (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # of 64 calls
    with pytest.raises(sta.UsageError, match="k = 41"):
        saes[0, "key"].encode(rows_of(5).to(device), 41)


def test_compiled_path_equals_eager():
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    except Exception as error:
        pytest.skip(f"no compiler for torch.compile here: {type(error).__name__}")
    check_fast("cpu", compiled=True)


def test_blocked_path_equals_eager():
    check_fast("cpu", compiled=False)


def test_without_a_compiler_a_warning_says_so(monkeypatch):
    def refuse(f, **options):
        def call(*args):
            raise RuntimeError("no compiler")
        return call
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="nothing is compiled: RuntimeError"):
        sta.speed_up(saes := {0: small_sae()}, True)
    assert saes[0].encode(rows_of(5), 3)[0].shape == (5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_path_equals_eager_on_cuda():
    check_fast("cuda", compiled=True)


def test_benchmark_rows():
    """Plausible times and memory; the caches' bytes are those of the formulas."""
    row = train_sae.time_steps((16, 64, 4, 256), torch.device("cpu"), compiled=False)
    assert set(row["step_ms"]) == {"eager", "sparse"} and set(row["code_ms"]) == {"eager", "fast"}
    assert all(0 < ms < 1000 for ms in (row["matmul_ms"], *row["step_ms"].values()))
    assert row["rows_per_s"] == pytest.approx(256e3 / row["step_ms"]["sparse"])
    if pathlib.Path("/proc/self/clear_refs").exists():
        peak = train_sae.peak_bytes(lambda: torch.zeros(10_000_000).sum(), torch.device("cpu"))
        assert 4e7 * 0.9 < peak < 4e7 * 1.5
    row = train_sae.time_cache(2, 300, torch.device("cpu"))
    token = 2 * 3 * 64 * 4  # float32; K and V of three heads
    assert row["dense_bytes"] == 2 * 300 * token
    coded = sta.bytes_per_token(sta.Budget(8, 16), 3, 64, 1024)
    assert row["codes_bytes"] == 2 * ((300 - 128) * coded + (128 + 4) * token) + 4 * 300


# ---------------------------------------------------------------- 7. files

METADATA = {"k": 8, "model": "small", "fingerprint": "f", "settings": {}}


def test_saved_sae_is_the_same_function(tmp_path):
    sae, x = small_sae(), rows_of(50)
    sta.save_sae(tmp_path / "layer0.key", sae, METADATA)
    loaded, metadata = sta.load_sae(tmp_path / "layer0.key")
    torch.testing.assert_close(loaded(x, 8), sae(x, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode(x, 8)[0], sae.encode(x, 8)[0] * sae.scale)  # folded
    assert loaded.scale == 1 and {k: metadata[k] for k in METADATA} == METADATA


@pytest.mark.parametrize("spoil", [
    lambda data: data[:len(data) // 2], lambda data: b"\xff" * 64, lambda data: b""])
def test_corrupt_weights(tmp_path, spoil):
    sta.save_sae(tmp_path / "layer0.key", small_sae(), METADATA)
    weights = tmp_path / "layer0.key" / "sae_weights.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    with pytest.raises(sta.UsageError, match="layer0.key: missing, truncated or corrupt"):
        sta.load_sae(tmp_path / "layer0.key")


def test_saes_of_another_model_or_shape(tmp_path):
    model = small_model("llama")
    for key, sae in small_saes(model).items():
        metadata = {**METADATA, "fingerprint": sta.fingerprint(model)}
        sta.save_sae(tmp_path / f"layer{key[0]}.{key[1]}", sae, metadata)
    assert set(sta.load_saes(tmp_path, model)[0]) == set(sta.kv_sites(model))
    with pytest.raises(sta.UsageError, match="SAEs of small, not of this model"):
        sta.load_saes(tmp_path, small_model("qwen2", vocab_size=64))
    sta.save_sae(tmp_path / "layer0.key", small_sae(24), {**METADATA, "fingerprint": "f"})
    with pytest.raises(sta.UsageError, match="not of this model"):
        sta.load_saes(tmp_path, model)
    with pytest.raises(sta.UsageError, match="no SAEs of layer 7, but of"):
        sta.load_saes(tmp_path, model, [7])


def test_full_disk_loses_nothing(tmp_path):
    """A real write error, from a limit on the size of files, half-way through the new file."""
    path = tmp_path / "file"
    sta.write_atomic(path, "old")
    assert list(tmp_path.iterdir()) == [path]  # the temporary name is gone
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(sta.UsageError, match="cannot write .*; nothing was replaced"):
            sta.write_atomic(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- the scripts, on tiny

SHORT = ["--tokens", 16_384, "--n-latents", 64, "--buffer-tokens", 2048, "--layer", "1-2"]


@pytest.fixture(scope="module")
def tiny():
    return sta.load_model("tiny", torch.device("cpu"), torch.float32)[:2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run over two layers of tiny, uninterrupted."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        assert script(train_sae, patch, *SHORT, "--out", out) == 0
    assert not (out / "tiny" / "unfinished.safetensors").exists()
    norms = sta.load_sae(out / "tiny" / "layer1.key")[0].W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(64), atol=1e-5, rtol=0)
    assert json.loads((out / "tiny" / "run-1-2.json").read_text())["log"][-1]["fvu_key"] < 0.8
    return out


def test_second_run_overwrites_nothing(trained, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}
    assert script(train_sae, monkeypatch, *SHORT, "--out", trained) == 0
    assert "trained already" in capsys.readouterr().out
    assert script(train_sae, monkeypatch, *SHORT, "--seed", 1, "--out", trained) == 2
    assert "trained with other settings" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}


def test_killed_run_resumes_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    code = "import train_sae, sta; train_sae.CHECKPOINT_SECONDS = 0; sta.run(train_sae.main)"
    run = subprocess.Popen([sys.executable, "-c", code, *map(str, SHORT), "--out", tmp_path],
                           cwd=sta.HERE, stdout=subprocess.DEVNULL)
    state = tmp_path / "tiny" / "unfinished.safetensors"
    while not state.exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert state.exists() and not (tmp_path / "tiny" / "layer2.value").exists()
    assert script(train_sae, monkeypatch, *SHORT, "--out", tmp_path) == 2
    assert "unfinished run: add --resume" in capsys.readouterr().err
    assert script(train_sae, monkeypatch, *SHORT, "--lr", 1, "--out", tmp_path, "--resume") == 2
    assert "begun with lr = " in capsys.readouterr().err
    assert script(train_sae, monkeypatch, *SHORT, "--out", tmp_path, "--resume") == 0
    assert "resuming at step" in capsys.readouterr().out
    for path in trained.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.relative_to(trained)).read_bytes(), path


def train_in_float64(n_processes, *argv, patch="pass"):
    """train_sae.py in processes of its own, where a sum in another order leaves the same digits."""
    code = ("import sys, torch, train_sae, sta; torch.set_default_dtype(torch.float64); "
            "torch.Tensor.float = lambda x, f=torch.Tensor.float: x.double() if sys._getframe(1)"
            ".f_globals['__name__'] in ('sta', 'train_sae') else f(x); "
            f"{patch}; sta.run(train_sae.main)")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", sys.executable]
    return subprocess.run([sys.executable, *(command if n_processes == 2 else []), "-c", code,
                           *map(str, argv)], cwd=sta.HERE, capture_output=True, text=True)


def assert_same_weights(one, two):
    folders = [path.parent for path in sorted(one.glob("layer*/cfg.json"))]
    assert len(folders) == 4
    for folder in folders:
        for a, b in zip(sta.load_sae(folder)[0].state_dict().values(),
                        sta.load_sae(two / folder.name)[0].state_dict().values()):
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)


def test_two_processes_train_the_weights_of_one_also_after_a_kill(tmp_path):
    """The last buffer has one window, of which one process has no share."""
    argv = [*SHORT, "--tokens", 8 * 1024 + 300, "--out"]
    assert train_in_float64(1, *argv, tmp_path / "one").returncode == 0
    patch = ("import os, signal; train_sae.CHECKPOINT_SECONDS = 0; n = []; old = train_sae.harvest;"
             "train_sae.harvest = lambda *a: os.kill(os.getpid(), signal.SIGKILL) "
             "if n.append(a) or len(n) == 4 and os.environ['RANK'] == '1' else old(*a)")
    run = train_in_float64(2, *argv, tmp_path / "two", patch=patch)
    assert run.returncode != 0
    assert "error: another process of this run is gone; run it again with --resume" in run.stderr
    run = train_in_float64(2, *argv, tmp_path / "two", "--resume")
    assert run.returncode == 0 and "resuming at step" in run.stdout, run.stderr
    assert_same_weights(tmp_path / "one" / "tiny", tmp_path / "two" / "tiny")


def test_two_processes_train_kl_as_one(trained, tmp_path):
    """Seven windows in batches of three: of the last one, one process has no share."""
    for n, name in ((1, "one"), (2, "two")):
        shutil.copytree(trained / "tiny", tmp_path / name / "tiny")
        run = train_in_float64(n, "--objective", "kl", "--tokens", 1792, "--batch-tokens", 768,
                               "--layer", "1-2", "--n-latents", 64, "--out", tmp_path / name,
                               patch="sta.pick_device = lambda *a: (torch.device('cpu'), "
                                     "torch.float64)")
        assert run.returncode == 0, run.stderr
    assert_same_weights(tmp_path / "one" / "tiny" / "kl", tmp_path / "two" / "tiny" / "kl")


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        assert script(evaluate, patch, "--saes", trained, "--max-tokens", 2048, "--limit", 20,
                      "--out", out) == 0
    return out


def test_evaluation_table(evaluated):
    result = json.loads((evaluated / "tiny.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "keys", "values", "dual", "uniform", "reverse"]
    assert result["layers"] == [1, 2] and result["n_layers"] == 6 and result["tokens"] == 2048
    dual, dense = rows["dual"], rows["dense"]
    assert (dual["k_key"], dual["k_val"], dense["k_key"]) == (8, 16, None)
    assert (rows["uniform"]["k_key"], rows["uniform"]["k_val"]) == (12, 12)
    assert dense["bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    assert dual["bytes_share"] == pytest.approx((4 + 2 * 0.1875) / 6)
    assert dual["perplexity"] > rows["values"]["perplexity"] > dense["perplexity"]
    assert dual["delta_ce"] == pytest.approx(math.log(dual["perplexity"] / dense["perplexity"]))
    assert (rows["reverse"]["k_key"], rows["reverse"]["k_val"]) == (16, 8)
    assert dual["fvu_key"] == rows["keys"]["fvu_key"] == pytest.approx(
        np.mean([layer["fvu_key"] for layer in dual["by_layer"].values()]))
    assert rows["keys"]["fvu_val"] == 0 and rows["keys"]["cos_val"] == 1


def test_perplexity_is_that_of_hugging_face(evaluated):
    """The dense row against transformers' own labels= loss on windows cut here."""
    rows = json.loads((evaluated / "tiny.json").read_text())["rows"]
    model = transformers.AutoModelForCausalLM.from_pretrained(sta.HERE / "tiny").float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(sta.HERE / "tiny")
    text = (sta.HERE / "tiny" / "valid.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in ids[:, :2048].split(256, dim=1)]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_plots(evaluated, tmp_path, monkeypatch, capsys):
    assert script(plots, monkeypatch, "--results", evaluated, "--out", tmp_path) == 0
    for name in ("tiny-overview.png", "tiny-budget.png", "tiny-asymmetry.png", "tiny-bytes.png",
                 "tiny-training.png"):
        image = plots.plt.imread(tmp_path / name)
        assert image.shape[1] > 600 and image[..., :3].std() > 0.05  # something is drawn
    said = capsys.readouterr().out
    assert "no tiny-shrinkage.png: it needs the row l1; run python evaluate.py --claims" in said
    assert "no growth.png: it needs python train_sae.py --benchmark" in said
    assert script(plots, monkeypatch, "--results", tmp_path, "--out", tmp_path) == 2
    assert "python evaluate.py" in capsys.readouterr().err


def test_tiny_fits_and_beats_a_trigram_model():
    folder = sta.HERE / "tiny"
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= 12e6
    assert sum(p.stat().st_size for p in folder.glob("*.txt")) <= 2e6
    made = json.loads((folder / "make.json").read_text())
    assert made["perplexity"] < 0.8 * made["perplexity_trigram"]
    for line in (folder / "cloze.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert set(row) == {"context", "choices", "label"} and len(set(row["choices"])) == 4
        assert 0 <= row["label"] < 4


def test_sparse_gradient_of_kl_is_that_of_encode(tiny):
    windows, found = tokens_of(2, 24), []
    saes = {(2, kind): small_sae(128, 64, seed) for seed, kind in enumerate(sta.KINDS)}
    for _ in range(2):
        for sae in saes.values():
            sae.zero_grad()
        train_sae.divergence(tiny[0], sta.dual(saes, sta.Budget(4, 8)), windows, 48, train=True)
        found.append([p.grad.clone() for sae in saes.values() for p in sae.parameters()])
        for sae in saes.values():
            sae.encode = functools.partial(sta.sparse_encode, sae)  # for the second time
    for plain, sparse in zip(*found):
        assert plain.abs().max() > 0
        torch.testing.assert_close(sparse, plain, atol=1e-6, rtol=1e-4)


def test_divergence_and_its_gradient(tiny):
    """Against torch.distributions; part by part and with recomputation, the same gradient."""
    again = copy.deepcopy(tiny[0]).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    windows, grads = tokens_of(4, 24), []
    saes = {(2, kind): small_sae(128, 64, seed) for seed, kind in enumerate(sta.KINDS)}
    codecs = sta.dual(saes, sta.Budget(4, 8), coef_bits=6)
    for model, part in ((tiny[0], 96), (tiny[0], 24), (again, 96)):  # part: tokens in memory
        kl, ce = train_sae.divergence(model, codecs, windows, part, train=True)
        grads.append([p.grad.clone() for sae in saes.values() for p in sae.parameters()])
        for sae in saes.values():
            sae.zero_grad()
        with torch.no_grad():
            dense = torch.distributions.Categorical(logits=model(windows).logits)
            with sta.reconstruct(model, codecs):
                output = model(windows, labels=windows)
        coded = torch.distributions.Categorical(logits=output.logits)
        assert kl == pytest.approx(torch.distributions.kl_divergence(dense, coded).mean().item(),
                                   rel=1e-4)
        assert ce == pytest.approx(output.loss.item(), rel=1e-5)
    for whole, *others in zip(*grads):
        assert whole.abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, whole, atol=1e-5, rtol=1e-3)


def test_kl_stage(trained, tmp_path, monkeypatch, capsys):
    """It lowers the held-out divergence, resumes to the same bits, and evaluate.py finds it."""
    argv = ["--objective", "kl", "--tokens", 9 * 1024, "--batch-tokens", 1024, "--layer", "1-2",
            "--n-latents", 64]
    assert script(train_sae, monkeypatch, *argv, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, ".*no SAEs to start from")
    weights = {}
    for name, stop in (("whole", None), ("resumed", 7)):
        shutil.copytree(trained / "tiny", tmp_path / name / "tiny")
        with monkeypatch.context() as patch:
            patch.setattr(train_sae, "CHECKPOINT_SECONDS", 0)
            patch.setattr(train_sae, "KL_LOG_STEPS", 100)
            save, calls = train_sae.save_state, []

            def save_and_stop(*args):
                save(*args)
                calls.append(args)
                if len(calls) == stop:
                    raise KeyboardInterrupt
            patch.setattr(train_sae, "save_state", save_and_stop)
            assert script(train_sae, patch, *argv, "--out", tmp_path / name) == (130 if stop else 0)
        if stop:
            assert script(train_sae, monkeypatch, *argv, "--out", tmp_path / name, "--resume") == 0
        weights[name] = [p.read_bytes() for p in sorted((tmp_path / name / "tiny" / "kl").rglob(
            "*.safetensors"))]
    assert weights["whole"] == weights["resumed"] and len(weights["whole"]) == 4
    log = json.loads((tmp_path / "whole" / "tiny" / "kl" / "run-1-2.json").read_text())["log"]
    assert log[-1]["held_out_kl"] < 0.9 * log[0]["held_out_kl"]
    base = tmp_path / "whole" / "tiny"
    assert evaluate.find_saes(tmp_path / "whole", None) == (base / "kl", "tiny")  # the newest
    assert evaluate.find_saes(base, None) == (base, "tiny")  # the very folder that is named


def test_text_that_the_model_writes(tiny):
    """Plain sampling: its surprise, on average, is the entropy of the predictions."""
    model, tokenizer = tiny
    windows = train_sae.sample_windows(model, tokenizer, 32, 4096, seed=0)
    assert windows.shape == (128, 32) and (windows[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(windows, train_sae.sample_windows(model, tokenizer, 32, 4096, seed=0))
    assert not torch.equal(windows, train_sae.sample_windows(model, tokenizer, 32, 4096, seed=1))
    with torch.no_grad():
        predicted = torch.distributions.Categorical(logits=model(windows).logits[:, :-1])
    surprise, entropy = -predicted.log_prob(windows[:, 1:]), predicted.entropy()
    spread = (surprise - entropy).std().item() / math.sqrt(surprise.numel())
    assert surprise.mean().item() == pytest.approx(entropy.mean().item(), abs=4 * spread)


def test_budgets_by_layer(trained, tmp_path, monkeypatch, capsys):
    """Saved beside finished SAEs, which stay; the row of evaluate.py has their bytes."""
    shutil.copytree(trained / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("l1"))
    weights = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    train = [*SHORT, "--out", tmp_path, "--budget"]
    assert script(train_sae, monkeypatch, *train, "elbow") == 0
    budgets = sta.load_budgets(tmp_path / "tiny", [1, 2])
    assert set(budgets[1] + budgets[2]) <= set(sta.CURVE_KS)
    assert script(train_sae, monkeypatch, *train, "bytes=18.75%") == 0
    assert "384 bytes a token, 18.75% of bf16" in capsys.readouterr().out
    budgets = sta.load_budgets(tmp_path / "tiny", [1, 2])
    assert sum(budgets[1] + budgets[2]) == 48 and budgets[1] != budgets[2]
    assert weights == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    argv = ["--saes", tmp_path, "--max-tokens", 512, "--limit", 4, "--variants", "dual,allocated"]
    assert script(evaluate, monkeypatch, *argv, "--out", tmp_path) == 0
    dual, allocated = json.loads((tmp_path / "tiny.json").read_text())["rows"][1:]
    assert allocated["name"] == "allocated" and allocated["bytes_share"] == dual["bytes_share"]
    assert allocated["k_key"] == (budgets[1].k_key + budgets[2].k_key) / 2
    assert allocated["fvu_key"] != dual["fvu_key"]
    assert script(train_sae, monkeypatch, *train, "bytes=20") == 2
    assert_one_line(capsys.readouterr().err, "--budget bytes=20: want 32 or more")
    (tmp_path / "tiny" / "budget.json").write_text('{"k": {"1": [8, 16]}}')
    assert script(evaluate, monkeypatch, *argv, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "budget.json: corrupt, or without a layer")


def test_evaluation_through_the_cache(trained, tmp_path, monkeypatch, capsys):
    """recent = 0: the losses and log-likelihoods of the hooks; bytes are those of what is kept."""
    argv = ["--saes", trained, "--max-tokens", 512, "--limit", 8, "--variants", "dual,cache",
            "--cache", "--recent", 0, "--chunk", 100, "--log-samples", "--out", tmp_path]
    assert script(evaluate, monkeypatch, *argv) == 0
    dense, dual, cache = json.loads((tmp_path / "tiny.json").read_text())["rows"]
    assert cache["ce"] == pytest.approx(dual["ce"], abs=1e-4) and dual["ce"] > dense["ce"] + 1e-3
    assert cache["tasks"]["cloze"]["loglik"] == pytest.approx(
        dual["tasks"]["cloze"]["loglik"], abs=5e-3)
    a_token = 4 + 2 * 2 * 96 + 4 * 2 * 2 * 128 * 4  # position; two coded layers; four in float32
    assert cache["cache"]["bytes"] == 512 * a_token + 2 * 2 * 2 * 2 * 128 * 4  # sinks of two rows
    dictionaries = 4 * (2 * 64 * 128 + 64 + 128) * 4  # of four SAEs, float32
    assert cache["cache"]["dictionary_bytes"] == dictionaries
    assert "never smaller than bf16, as 4 layers stay in float32" in capsys.readouterr().out
    assert script(evaluate, monkeypatch, *argv, "--dtype", "bfloat16") == 0
    row = json.loads((tmp_path / "tiny.json").read_text())["rows"][-1]
    assert f"dictionaries {dictionaries:,}; smaller than bf16 from" in capsys.readouterr().out
    once = 256 * 4 + 2 * 2 * 2 * 128 * 2 + dictionaries  # positions and sinks of a window
    saved = 2 * (2 * 2 * 128 * 2 - 2 * 96)  # a token, in two layers
    assert row["cache"]["break_even_tokens"] == pytest.approx(once / saved)


def test_writing_on(trained, tiny, monkeypatch, capsys):
    model, tokenizer = tiny
    argv = ["--saes", trained, "--generate", "The President of", "--new-tokens", 12]
    assert script(evaluate, monkeypatch, *argv, "--recent", 2) == 0
    inputs = tokenizer("The President of", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0],
                            skip_special_tokens=True)
    printed = capsys.readouterr().out
    dense, codes = re.findall(r": . tokens in .* ms a token; cache ([0-9,]+) bytes", printed)
    assert text in printed
    assert int(codes.replace(",", "")) < int(dense.replace(",", ""))
    assert "nothing was coded" not in printed
    assert script(evaluate, monkeypatch, *argv) == 0
    assert "nothing was coded: no token is 128 old" in capsys.readouterr().out


# ---------------------------------------------------------------- zero-shot, baselines, verdicts

ARC = {"question": "Why?", "choices": {"text": ["a", "bc"], "label": ["1", "2"]}, "answerKey": "2"}
FORMATS = {  # a hub row and what lm-eval 0.4.13 makes of it: contexts, choices, label
    "piqa": ({"goal": "tea", "sol1": "hot", "sol2": "cold", "label": 1},
             "Question: tea\nAnswer:", ["hot", "cold"], 1),
    "hellaswag": ({"activity_label": "Tea", "ctx_a": "He boils [x] it.", "ctx_b": "the Cup",
                   "endings": ["is [step] full.", " [title] Rest"], "label": "1"},
                  "Tea: He boils it. The cup", ["is full.", " Rest"], "1"),
    "arc_easy": (ARC, "Question: Why?\nAnswer:", ["a", "bc"], 1),
    "arc_challenge": (ARC, "Question: Why?\nAnswer:", ["a", "bc"], 1),
    "winogrande": ({"sentence": "Ann thanked Bea as _ was kind.", "option1": "Ann",
                    "option2": "Bea", "answer": "2"},
                   ["Ann thanked Bea as Ann", "Ann thanked Bea as Bea"], ["was kind."] * 2, 1),
    "boolq": ({"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
              "Ice is cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
    "openbookqa": ({**ARC, "question_stem": "A cat", "answerKey": " 1"}, "A cat", ["a", "bc"], 0),
    "lambada_openai": ({"text": "he sat on the mat"}, "he sat on the", ["mat"], 0)}


@pytest.mark.parametrize("task", FORMATS)
def test_format(task):
    row, *expected = FORMATS[task]
    assert list(evaluate.TASKS[task][3](row)) == expected


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_loglikelihoods_are_those_of_one_request_at_a_time(tiny, tmp_path):
    """Against Hugging Face on each request alone; with cut contexts, spaces, an empty context."""
    model, tokenizer = tiny
    rows = [json.loads(line) for line in open(sta.HERE / "tiny" / "cloze.jsonl")][:6]
    rows[0]["context"] += "  "
    rows[1]["context"] = ""
    rows[2]["context"] = " ".join(row["context"] for row in rows) * 2  # over 256 tokens
    args = evaluate.parse_args([])
    task = evaluate.load_task(write_jsonl(tmp_path / "t.jsonl", rows), args, tokenizer, 256)
    assert task.truncated == 4 and len(task.requests) == 24 and task.name == "t"
    expected, bos = [], tokenizer.bos_token_id
    for row in rows:
        for choice in row["choices"]:
            whole = tokenizer(row["context"] + " " + choice).input_ids
            n = len(tokenizer(row["context"].rstrip()).input_ids)
            if not row["context"]:
                whole = [tokenizer.eos_token_id if bos is None else bos] + tokenizer(
                    " " + choice, add_special_tokens=False).input_ids
                n = 1
            whole, n = torch.tensor(whole[-257:]), max(0, n - max(0, len(whole) - 257))
            with torch.no_grad():
                log_p = model(whole[None, :-1]).logits[0].double().log_softmax(-1)
            picked = log_p[range(n - 1, len(whole) - 1), whole[n:]]
            best = log_p.argmax(-1)[n - 1:].tolist() == whole[n:].tolist()
            expected.append((picked.sum().item(), best))
    found = evaluate.loglikelihoods(model, task.requests, 256, "test")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=2e-4)


def test_scores():
    task = evaluate.Task("t", [None] * 6, [[2, 5], [2, 9], [1, 1]], [0, 1, 1], 0)
    found = [(-3.0, False), (-9.0, False), (-3.0, False), (-9.0, False), (-1.0, 0), (-2.0, 0)]
    base = [(-1.0, False), (-2.0, False)] * 3  # dense: right, wrong, wrong
    row = evaluate.task_columns(task, found, base, log_samples=True)
    assert row["acc"] == pytest.approx(1 / 3)  # only the first row's sum is largest at its label
    assert row["acc_norm"] == pytest.approx(2 / 3)  # per character -1.5 beats -1.8, -1 beats -1.5
    assert row["acc_stderr"] == pytest.approx(np.std([1, 0, 0], ddof=1) / np.sqrt(3))
    assert row["delta_acc"] == 0 and row["loglik"][1] == -9 and row["n"] == 3
    single = evaluate.Task("lambada_openai", [None] * 2, [[3], [3]], [0, 0], 0)
    row = evaluate.task_columns(single, [(-1.0, True), (-2.0, False)], [(0, True)] * 2, False)
    assert (row["acc"], row["acc_norm"], row["delta_acc"]) == (0.5, None, -0.5)
    assert row["ppl"] == pytest.approx(math.exp(1.5))


def test_paired_comparison():
    dense, noise = rows_of(200, 1)[:, 0].double(), rows_of(200, 1, seed=1)[:, 0].double()
    row = evaluate.compare(dense + 0.01 * noise, dense, seed=0)
    stderr = 0.01 * noise.numpy().std(ddof=1) / np.sqrt(200)
    assert row["delta_ce_stderr"] == pytest.approx(stderr)
    low, high = np.log(row["ratio_ci95"])
    assert (low + high) / 2 == pytest.approx(row["delta_ce"], abs=0.2 * stderr)
    assert (high - low) / 3.92 == pytest.approx(stderr, rel=0.1)  # a normal mean's interval


@pytest.mark.parametrize("bits", [2, 4])
def test_quantise_against_a_loop(bits):
    x = rows_of(2 * 70 * 3, 64).view(2, 70, 3, 64) * torch.logspace(-1, 1, 64)
    live = torch.ones(2, 70, dtype=torch.bool)
    live[:, 0] = live[1, 50:] = False  # a sink; padding
    found = {kind: evaluate.quantise(x, live, kind, bits) for kind in sta.KINDS}
    for b, t, h, d in [(0, 5, 0, 0), (0, 69, 2, 63), (1, 1, 1, 40), (1, 49, 2, 7)]:
        start = t - t % 32
        tokens = [s for s in range(start, min(70, start + 32)) if live[b, s]]
        groups = {"key": x[b, tokens, h, d],
                  "value": x[b, t, h, d - d % 32:d - d % 32 + 32]}
        for kind, group in groups.items():
            low = np.float32(np.float16(group.min().item()))
            step = np.float32(np.float16((group.max().item() - low) / (2 ** bits - 1)))
            level = min(max(round(float((x[b, t, h, d] - low) / step)), 0), 2 ** bits - 1)
            assert found[kind][b, t, h, d].item() == pytest.approx(low + level * step, abs=1e-4)
    other = torch.where(live[..., None, None], x, 1e6 * x)  # what is not live must not matter
    torch.testing.assert_close(evaluate.quantise(other, live, "key", bits)[live],
                               found["key"][live])


@pytest.mark.parametrize("metric", ["plain", "loss"])
def test_omp_against_least_squares(metric):
    sae, x = small_sae().double(), rows_of(5).double()
    if metric == "loss":
        sae.set_metric(rows_of(50, seed=2).double())
    root, atoms = sae.metric.numpy(), sae.W_dec.detach().numpy()
    found, measured = evaluate.omp(x[None], None, sae, 4)[0], atoms @ root
    unit = measured / np.linalg.norm(measured, axis=1, keepdims=True)
    for n, target in enumerate((x / sae.scale - sae.b_dec).detach().numpy()):
        chosen, rest = [], target @ root
        for _ in range(4):
            chosen.append(np.abs(unit @ rest).argmax())
            z = np.linalg.lstsq(measured[chosen].T, target @ root)[0]
            rest = target @ root - z @ measured[chosen]
        expected = (torch.tensor(z @ atoms[chosen]) + sae.b_dec) * sae.scale
        torch.testing.assert_close(found[n], expected, atol=1e-4, rtol=0)
        assert sae.pursue(x, 4)[1][n].tolist() == chosen


def test_pca_is_the_best_projection():
    model = small_model("llama")
    windows = tokens_of(40, 12)
    mean, basis = evaluate.fit_pca(model, [0, 1], windows, 1)[1, "value"]
    with sta.capture(model) as rows:
        model(windows)
    x = rows[1, "value"][:, 1:]  # (40, 11, H, D)
    centre = x.flatten(0, 2).numpy() - x.flatten(0, 2).numpy().mean(0)
    left = (np.linalg.svd(centre, compute_uv=False)[5:] ** 2).sum()
    error = (evaluate.low_rank(x, None, (mean, basis), 5) - x).square().sum().item()
    assert error == pytest.approx(left, rel=1e-3)


def test_lower_ranks_are_those_after_the_strongest():
    sae, x = small_sae(), rows_of(6)
    z, idx = sae.encode(x, 40)
    expected = sae.decode(z[:, 3:6], idx[:, 3:6])
    torch.testing.assert_close(evaluate.lower(x, None, sae, 3), expected)


def test_l1_finds_its_budget_and_its_gradient_is_that_of_the_formula():
    sae, x = small_sae(), rows_of(512)
    z = torch.relu((x / sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.relu_code(x), sae(x, 40))  # all positive latents
    target = x / sae.scale
    expected = (((target - z @ sae.W_dec - sae.b_dec) ** 2).sum(-1) + 0.05 * z.sum(-1)).mean()
    torch.testing.assert_close(sae.l1_loss(x, (z > 0).sum(-1).float().mean())[0], expected)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(300):
        sae.l1_loss(x, 4)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.renormalise()
    assert 3 < (sae.preactivations(x) > 0).sum(-1).float().mean() < 5


@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """Everything at once, on the short run; it has no L1 SAEs yet, so they are trained."""
    out = tmp_path_factory.mktemp("judged")
    with pytest.MonkeyPatch.context() as patch:
        assert script(evaluate, patch, "--saes", trained, "--max-tokens", 1024, "--limit", 8,
                      "--claims", "--baselines", "quant,pca,omp", "--out", out) == 0
    return json.loads((out / "tiny.json").read_text())


def test_every_baseline_has_its_row(judged):
    rows = {row["name"]: row for row in judged["rows"]}
    assert list(rows) == ["dense", "keys", "values", "dual", "uniform", "reverse", "dual/8",
                          "dual/4", "dual/2", "dual*2", "dual*4", "lower", "quant2", "quant3",
                          "quant4", "pca", "omp", "l1"]
    for name in ("dual", "quant2", "pca", "omp", "lower"):  # two of six layers at 18.75 %
        assert rows[name]["bytes_share"] == pytest.approx((4 + 2 * 0.1875) / 6), name
    active = [json.loads(path.read_text())["metadata"]["held_out"]["l0"] for path in
              pathlib.Path(judged["saes"], "l1").glob("*/cfg.json")]  # two layers, keys and values
    assert rows["l1"]["bytes_share"] == pytest.approx((4 + sum(active) * 4 / 512) / 6, rel=1e-3)
    assert rows["quant4"]["fvu_key"] < rows["quant3"]["fvu_key"] < rows["quant2"]["fvu_key"]
    assert rows["omp"]["fvu_val"] < rows["dual"]["fvu_val"] < rows["lower"]["fvu_val"]
    cloze = rows["dual"]["tasks"]["cloze"]
    assert cloze["n"] == 8 and cloze["delta_acc"] == pytest.approx(
        cloze["acc"] - rows["dense"]["tasks"]["cloze"]["acc"])
    assert rows["dense"]["ratio_ci95"] == [1, 1] and rows["dual"]["ratio_ci95"][0] > 1


def test_pictures_of_claims(judged, tmp_path, monkeypatch):
    (tmp_path / "tiny.json").write_text(json.dumps(judged))
    assert script(plots, monkeypatch, "--results", tmp_path, "--out", tmp_path) == 0
    for name in ("shrinkage", "attention"):
        image = plots.plt.imread(tmp_path / f"tiny-{name}.png")
        assert image.shape[1] > 600 and image[..., :3].std() > 0.05


def test_verdicts_follow_from_the_rows(judged):
    rows, claims = ({x[key]: x for x in judged[part]} for part, key in (
        ("rows", "name"), ("claims", "claim")))
    assert list(claims) == ["P1", "P2", "P3", "P4", "P5", "P6"]
    for claim in claims.values():
        assert claim["verdict"] in ("holds", "holds in part", "does not hold here")
        assert set(claim["rows"]) <= set(rows) | {"curves"} and claim["rule"]
    cos = [next(p["cos"] for p in layer["key"] if p["k"] == 8) for layer in
           judged["curves"].values()]
    assert claims["P2"]["figure"] == pytest.approx(np.mean(cos))
    assert claims["P4"]["figure"] == pytest.approx(
        rows["uniform"]["delta_ce"] - rows["dual"]["delta_ce"])
    assert claims["P6"]["figure"] == rows["dual"]["ratio"]
    assert claims["P5"]["figure"] == pytest.approx(-min(
        row["delta_ce"] for name, row in rows.items() if re.match(r"dual\b", name)))
    assert claims["P6"]["verdict"] == "does not hold here" or rows["dual"]["ratio"] < 1.1


# ---------------------------------------------------------------- looking inside

def test_attention_change_is_that_of_hugging_face_attention(tiny):
    """Against softmax weights and logits recomputed from q and k by hand, layer 2."""
    model, tokenizer = tiny
    windows, codecs = tokens_of(2, 24), {
        (2, "key"): lambda x, live: 0.8 * x + 0.3 * x.flip(-1), (2, "value"): lambda x, live: 0 * x}
    columns, drawn = evaluate.attention_change(model, tokenizer, codecs, windows, sink=1)
    layer, seen, logits = model.model.layers[2].self_attn, torch.ones(24, 24).tril().bool(), []

    def keep(module, args, kwargs):
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, k = (f(x).view(2, 24, -1, 128).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
        q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        logits.append((q @ k.repeat_interleave(2, 1).mT / 128 ** 0.5).double())  # (B, 4, T, T)

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(windows)
        with sta.reconstruct(model, {(2, "key"): codecs[2, "key"]}):
            model(windows)
    hook.remove()
    error = spread = kl = 0
    for b, h, t in itertools.product(range(2), range(4), range(24)):
        dense, coded = (x[b, h, t, :t + 1] for x in logits)
        error += (coded - dense).var(unbiased=False).item()
        spread += dense.var(unbiased=False).item()
        p, q = dense.log_softmax(-1), coded.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item() / (2 * 4 * 24)
    assert columns == {2: {"qk_error": pytest.approx((error / spread) ** 0.5, rel=1e-3),
                           "attention_kl": pytest.approx(kl, rel=1e-3)}}
    at = drawn["head"]
    torch.testing.assert_close(torch.tensor(drawn["dense"]), logits[0][0, at].masked_fill(
        ~seen, -math.inf).softmax(-1).float(), atol=1e-4, rtol=1e-3)
    assert drawn["layer"] == 2 and len(drawn["tokens"]) == len(drawn["coded"]) == 24
    assert model.config._attn_implementation == "sdpa"


def test_strongest_tokens_are_those_of_a_sort():
    z = torch.relu(rows_of(6, 50))  # six latents, fifty tokens
    found = evaluate.Strongest(6)
    for first in (0, 7, 30):
        found.update(z[:, first:{0: 7, 7: 30, 30: 50}[first]], first)
    assert torch.equal(found.token, z.argsort(descending=True)[:, :10])
    assert torch.equal(found.fired, (z > 0).sum(1))


@pytest.mark.parametrize("pairs,expected", [
    ([("a", f" w{i}") for i in range(8)] + [("b", "x"), ("c", "y")], True),  # the token before
    ([("a", f" w{i}") for i in range(7)] + [("b", "x"), ("c", "y"), ("d", "z")], False),
    ([(str(i), " Way"[:4 - i % 2]) for i in range(10)], True),  # a capital
    ([(str(i), str(i)) for i in range(8)] + [("", "of"), (".", "is")], True),  # digits
    ([(str(i), w) for i, w in enumerate("ab,cd;ef-gh")][:10], False)])
def test_describable_atoms(pairs, expected):
    assert evaluate.describable(pairs) == expected


def test_hierarchy_finds_what_was_put_in():
    """Shallow codes are the token's own; deep ones follow the token before, so they tell a noun
    from a verb; text of made-up words in forty windows."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = [" the", " a", " will", " to", " walk", " run", " work",
                  *(f" w{i}q" for i in range(55))]
    ids = torch.randint(7, len(vocabulary), (40, 200), generator=generator)
    ids[:, ::4] = torch.randint(0, 4, (40, 50), generator=generator)
    ids[:, 1::40] = torch.randint(4, 7, (40, 5), generator=generator)  # rarer than the others
    flat = ids.flatten()
    verb = ((flat.roll(1) == 2) | (flat.roll(1) == 3)).long()
    code = lambda *parts: torch.stack(parts, -1)[:, None]  # (tokens, one head, k)
    noise = torch.randint(900, 1000, flat.shape, generator=generator)
    codes = {}
    for kind in sta.KINDS:
        codes[0, kind] = code(flat, 100 + flat, 200 + flat.roll(1))
        codes[1, kind] = code(flat, noise, noise + 100)
        codes[2, kind] = code(flat, noise, 300 + 2 * flat + verb)
    words = [vocabulary[i] for i in flat]
    found = evaluate.hierarchy(codes, ids, words, seed=0)
    assert found["words"] == ["run", "walk", "work"]
    means = {name: [m for m, _ in rows] for name, rows in found["overlap"]["key"].items()}
    assert means["lexical"][:2] == pytest.approx([2 / 3, 1 / 3], abs=0.03)
    assert means["ngram"] == pytest.approx([1, 1 / 3, 2 / 3], abs=0.03)
    assert means["sense"] == pytest.approx([2 / 3, 1 / 3, 2 / 3], abs=0.03)
    assert means["two"] == pytest.approx([2 / 3, 1 / 3, 1 / 3], abs=0.03)
    assert max(means["other"]) < 0.02
    few = evaluate.hierarchy(codes, ids, ["x"] * len(words), 0)  # no word with two senses
    assert few["words"] == [] and set(few["verdicts"]["key"]["gaps"]) == {"lexical", "ngram"}
    turned = evaluate.hierarchy({(2 - i, kind): x for (i, kind), x in codes.items()}, ids, words, 0)
    for name in ("lexical", "ngram", "sense"):
        assert found["verdicts"]["key"][name] and not turned["verdicts"]["key"][name]


def test_atoms_and_their_page(trained, tmp_path, monkeypatch, capsys):
    """Its strongest contexts against codes computed here; corpus text cannot end the data."""
    assert script(evaluate, monkeypatch, "--saes", trained, "--atoms", "--max-tokens", 2048,
                  "--out", tmp_path) == 0
    page = json.loads((tmp_path / "tiny-atoms.json").read_text())
    saes, _ = sta.load_saes(trained / "tiny", tiny_model := sta.load_model(
        "tiny", torch.device("cpu"), torch.float32)[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(sta.HERE / "tiny")
    ids = torch.tensor(tokenizer(sta.read_text(None, "valid", "tiny")).input_ids[:2048])
    with sta.capture(tiny_model, [2]) as rows, torch.no_grad():
        tiny_model(ids.view(8, 256))
    z, idx = saes[2, "key"].encode(rows[2, "key"], 8)  # (8, 256, H, 8)
    strongest = [(v, t * 256 + s) for v, m, t, s in zip(
        z.flatten().tolist(), idx.flatten().tolist(),
        *(p.flatten().tolist() for p in torch.meshgrid(torch.arange(8), torch.arange(256),
                                                       torch.arange(16), indexing="ij")[:2]))
        if m == 5 and s > 0]
    best = {}
    for v, place in strongest:
        best[place] = max(v, best.get(place, 0))
    expected = sorted(best.items(), key=lambda item: -item[1])[:10]
    found = page["sites"]["2.key"]["contexts"][5]
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [v for _, v in found] == pytest.approx([v for _, v in expected], abs=1e-3)
    assert page["words"][:2048] == [tokenizer.decode(i) for i in ids]
    page["words"][3] = "</script><script>alert(1)</script>"
    (tmp_path / "tiny-atoms.json").write_text(json.dumps(page))
    assert script(plots, monkeypatch, "--results", tmp_path, "--out", tmp_path) == 0
    html = (tmp_path / "atoms.html").read_text()
    assert html.count("</script>") == 2 and "://" not in html.split('id="data">')[0]
    data = html.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["words"][3] == page["words"][3]


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv,message", [
    (["--model", "gpt5"], "--model gpt5: want a folder, a hub id"),
    (["--model", "no-one/nothing"], "--model no-one/nothing: cannot be loaded"),
    (["--layer", "6"], "--layer 6: .* layers 0 to 5"),
    (["--layer", "4-9"], "--layer 4-9"),
    (["--layer", "two"], "--layer two: want all, 12, 0-7 or 3,9"),
    (["--k-key", "0"], "--k-key 0: must be at least 1"),
    (["--k-val", "2000"], "--k-val 2000: larger than --n-latents 512"),
    (["--text", "absent.txt"], "--text absent.txt: no file"),
    (["--text", "{tmp}/empty.txt"], "empty.txt: empty"),
    (["--text", "{tmp}/latin1.txt"], "latin1.txt: not UTF-8"),
    (["--text", "{tmp}/short.txt"], "too short"),
    (["--text", "no-one/nothing"], "--text no-one/nothing"),
    (["--budget", "ten"], "--budget ten: want elbow, bytes=1152 or bytes=18.75%"),
    (["--budget", "elbow", "--sparsity", "l1"], "--budget elbow: codes of l1 have no k"),
    (["--device", "cuda:7"], "--device cuda:7: not on this machine"),
    (["--seq-len", "257"], "--seq-len 257: want 2 to the model's limit of 256"),
    (["--out", "{tmp}/short.txt/below"], "cannot write"),
])
def test_bad_training_input(argv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_bytes(b"too little")
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    assert script(train_sae, monkeypatch, "--tokens", 1000, "--out", tmp_path / "out", *argv) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize("argv,message", [
    (["--saes", "{tmp}"], "no SAEs; first run: python train_sae.py"),
    (["--saes", "{tmp}", "--model", "yi-6b"], "first run: python train_sae.py --model yi-6b"),
    (["--k-val", "65"], "--k-val 65: larger than the SAEs' n_latents = 64"),
    (["--k-key", "0"], "--k-key 0: must be at least 1"),
    (["--layer", "5"], "no SAEs of layer 5, but of"),
    (["--seq-len", "1"], "--seq-len 1: want 2 to the model's limit of 256"),
    (["--layer", "7"], "--layer 7: .* layers 0 to 5"),
    (["--text", "{tmp}/short.txt"], "too short for one window of 256"),
    (["--tasks", "mmlu"], "--tasks mmlu: want path.jsonl or one of piqa, hellaswag"),
    (["--tasks", "piqa", "--task-dir", "{tmp}"], "cannot read .*piqa.jsonl"),
    (["--tasks", "boolq", "--task-dir", "{tmp}"], "boolq.jsonl line 2: no column 'question'"),
    (["--tasks", "{tmp}/label.jsonl"], "label.jsonl line 1: label 2, but the 2 choices"),
    (["--tasks", "{tmp}/nothing.jsonl"], "nothing.jsonl line 1: choice 1 .* tokenises to nothing"),
    (["--tasks", "{tmp}/long.jsonl"], "long.jsonl line 1: choice 0 has .* the model takes 256"),
    (["--tasks", "{tmp}/short.txt.jsonl"], "short.txt.jsonl line 1: not JSON"),
    (["--tasks", "openbookqa", "--task-dir", "{tmp}"], "line 1: not a row of openbookqa"),
    (["--limit", "0"], "--limit 0: must be at least 1"),
    (["--baselines", "int8"], "--baselines int8: want some of quant,pca,omp,l1"),
    (["--variants", "dual,best"], "--variants best: want some of dense, keys"),
])
def test_bad_evaluation_input(argv, message, trained, tmp_path, monkeypatch, capsys):
    for name in ("short.txt", "short.txt.jsonl"):
        (tmp_path / name).write_bytes(b"too little")
    good = {"passage": "p", "question": "q", "label": 1}
    write_jsonl(tmp_path / "boolq.jsonl", [good, {"passage": "p", "label": 1}])
    write_jsonl(tmp_path / "openbookqa.jsonl", [{**ARC, "question_stem": "s", "answerKey": "E"}])
    for name, choices in (("label", ["a", "b"]), ("nothing", ["a", ""]), ("long", ["a " * 300])):
        label = 2 if name == "label" else 0
        write_jsonl(tmp_path / f"{name}.jsonl", [
            {"context": "c", "choices": choices, "label": label}])
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    assert script(evaluate, monkeypatch, "--saes", trained, "--out", tmp_path, *argv) == 2
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(printed, message):
    assert printed.count("\n") == 1 and re.search(f"^error: .*{message}", printed), printed


def test_training_that_diverges(tmp_path, monkeypatch, capsys):
    assert script(train_sae, monkeypatch, *SHORT, "--lr", "1e38", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "an SAE is no longer finite; start again with a --lr")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_activation_that_is_not_finite():
    model = small_model("llama")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(sta.UsageError, match="layer 1: a value is not finite in float32"):
        train_sae.harvest(model, [0, 1], tokens_of(2, 8))
