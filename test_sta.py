"""What the README says, executably.

    python -m pytest -q          # CPU, offline
    python test_sta.py           # which model types of transformers work: a minute

Each check compares with something independent: a Python loop, float64, numpy, Hugging Face's own
cache or loss, an uninterrupted run. Non-goals: speed (README has the commands), model quality.
"""
import collections
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import evaluate
import plots
import sta
import support.text
import train_sae
from support.files import (ROOT, load_sae, load_saes, model_marks, run_main, same_marks, save_sae,
                           write_atomic)
from support.models import check_sites, load_model
from support.tasks import Question, TASKS, encode_pair, load_task, loglikelihoods, score_task
from support.text import encode_text, read_text, token_windows, tokenize

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_neox", "phi3"]
TYPES = FAMILIES + [  # of the 77 that `python test_sta.py` finds to work
    "afmoe", "apertus", "bloom", "cohere", "exaone4", "gemma2", "glm4", "gpt_oss", "granite",
    "hy_v3", "lfm2", "minimax_m2", "mixtral", "nemotron", "olmo3", "olmoe", "opt", "persimmon",
    "phimoe", "qwen2_moe", "qwen3_moe", "smollm3", "stablelm", "starcoder2"]

def rows_of(n, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) * 3 + 1

def vectors_of(n, heads=2, dim=16, seed=0):
    """(n, H, D): as a layer's keys of n tokens, whose heads have other means."""
    return rows_of(n * heads, dim, seed).view(n, heads, dim) + torch.arange(heads)[:, None]

def small_sae(dim=16, n_latents=40, seed=0, k=8, heads=2, kind=sta.TopKSAE):
    sae = kind(heads, dim, n_latents, k, torch.Generator().manual_seed(seed))
    sae.centre(vectors_of(250, heads, dim))
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return sae

def through(sae, x, k):
    return sae.decode(*sae.encode(x, k))

def small_model(family, kv_heads=2, **options):
    """Random weights; a default of the type is replaced only where its config knows the name."""
    known = transformers.AutoConfig.for_model(family)
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 16,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "rotary_dim": 8,
        "shared_expert_intermediate_size": 32, "word_embed_proj_dim": 64, "ffn_dim": 96, **options}
    config = transformers.AutoConfig.for_model(
        family, **{name: size for name, size in sizes.items() if hasattr(known, name)})
    torch.manual_seed(0)
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in whole.parameters()) < 3e7, "cannot be built small"
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

def across(roundtrip):
    """A codec that looks across tokens, of a function (keys, values, live)."""
    return types.SimpleNamespace(roundtrip=roundtrip)

def told_live(told):
    """A codec that loses nothing, and notes which tokens were live."""
    return across(lambda keys, values, live: told.append(live.int().tolist()) or (keys, values))

def small_saes(model, n_latents=64):
    heads, dim = sta.kv_shape(model.get_decoder().config)
    return {key: small_sae(dim, n_latents, seed, heads=heads)
            for seed, key in enumerate(sta.kv_sites(model))}

def dual(saes, *budget):
    return {layer: sta.DualBudget(saes[layer, "key"], saes[layer, "value"], sta.Budget(*budget))
            for layer, kind in saes if kind == "key"}

def tokens_of(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))

def script(module, *argv):
    """Run a script's main in this process; returns its exit status."""
    try:
        run_main(lambda: module.main(list(map(str, argv))))
    except SystemExit as stop:
        return stop.code
    return 0

# ---------------------------------------------------------------- 1. the Top-K SAE
def test_code_is_that_of_a_python_loop():
    sae, x = small_sae().double(), vectors_of(4).double()
    z, idx = sae.encode(x, 5)
    x_hat = sae.decode(z, idx)
    for n in range(4):  # a token
        for h in range(2):  # a head
            inside = [(x[n, h, d] - sae.b_dec[h, d]) / sae.scale for d in range(16)]
            acts = [max(0.0, sum(inside[d] * sae.W_enc[d, m] for d in range(16)).item()
                        + sae.b_enc[m].item()) for m in range(40)]
            best = sorted(range(40), key=lambda m: -acts[m])[:5]
            assert idx[n, h].tolist() == best
            assert z[n, h].tolist() == pytest.approx([acts[m] for m in best], abs=1e-12)
            expected = sae.scale * sum(acts[m] * sae.W_dec[m] for m in best) + sae.b_dec[h]
            torch.testing.assert_close(x_hat[n, h], expected, atol=1e-10, rtol=0)

def test_each_head_is_centred_by_itself():
    x = vectors_of(300, heads=3)
    sae = sta.TopKSAE(3, 16, 40, 8)
    sae.centre(x)
    inside = ((x - sae.b_dec) / sae.scale).numpy()
    assert np.abs(inside.mean(0)).max() < 1e-5 and np.mean(inside ** 2) == pytest.approx(1)

def test_code_at_a_smaller_budget_is_a_prefix_and_shapes_are_free():
    sae, x = small_sae(), vectors_of(24)
    z, idx = sae.encode(x, 9)
    assert torch.equal(sae.encode(x, 4)[0], z[..., :4]) and (z.diff(dim=-1) <= 0).all()
    again = through(sae, x.view(2, 3, 4, 2, 16), 9)
    torch.testing.assert_close(again.view(24, 2, 16), sae.decode(z, idx))
    torch.testing.assert_close(sae.decode(z[..., :0], idx[..., :0]), sae.b_dec.expand(24, 2, 16))

@pytest.mark.parametrize("k", [0, -1, 41])
@pytest.mark.parametrize("kind", [sta.TopKSAE, sta.FastSAE])
def test_budget_out_of_range(k, kind):
    with pytest.raises(sta.UsageError, match=f"k = {k}: want 1 to n_latents = 40"):
        small_sae(kind=kind).encode(vectors_of(2), k)

@pytest.mark.parametrize("k", [1, 4, 40])
def test_loss_and_gradients_equal_a_dense_float64_autoencoder(k):
    sae, x = small_sae(k=k).double(), vectors_of(30).double()
    loss = sae.loss(x)
    loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    inside = (x - sae.b_dec) / sae.scale
    acts = torch.relu(inside @ sae.W_enc + sae.b_enc)
    ranks = acts.argsort(dim=-1, descending=True).argsort(dim=-1)
    expected = sum(weight * ((inside - (acts * (ranks < n)) @ sae.W_dec) ** 2).mean()
                   for n, weight in ((k, 1), (2 * k, 1 / 8)))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-10, rtol=0, msg=name)

@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_fast_sae_is_the_plain_one(k):
    plain, x = small_sae(k=k).double(), vectors_of(30).double()
    fast = small_sae(k=k, kind=sta.FastSAE).double()
    for sae in (plain, fast):
        sae.loss(x).backward()
    for found, expected in zip(fast.encode(x, k), plain.encode(x, k)):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(through(fast, x, k), through(plain, x, k))
    torch.testing.assert_close(through(fast, x[None], k)[0], through(plain, x, k))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(dict(fast.named_parameters())[name].grad, p.grad, atol=1e-10,
                                   rtol=0, msg=name)
    z, idx = fast.encode(x, k)
    torch.testing.assert_close(fast.decode(z[..., :0], idx[..., :0]), fast.b_dec.expand(30, 2, 16))

def test_latents_that_stay_idle_are_lifted_until_they_fire():
    sae, x = small_sae(k=2), vectors_of(50)
    with torch.no_grad():
        sae.b_enc[:20] = -100.0  # these never fire, though at k = 40 they are chosen, with z = 0
    before = sae.b_enc.detach().clone()
    for _ in range(7):  # 700 vectors; the limit is 16 * 40
        sae.loss(x)
    fires = torch.zeros(40, dtype=torch.bool)
    fires[sae.encode(x, 2)[1].unique()] = True  # not those among the four strongest, of the loss
    assert (sae.idle[fires] == 0).all() and (sae.idle[~fires] == 700).all()
    sae.lift_idle(0.5)
    torch.testing.assert_close(sae.b_enc - before, torch.where(fires, 0, 0.5))
    for _ in range(220):
        sae.lift_idle(0.5)
    sae.loss(x)
    assert not fires[:20].any() and (sae.idle[:20] == 0).any()

def test_a_step_leaves_latents_that_did_not_fire_where_they_were():
    sae, x = small_sae(k=2), vectors_of(50)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    train_sae.train_step({"": sae}, optimizer, {"": x})
    with torch.no_grad():
        sae.b_enc[:20] -= 100.0  # these fire no more, though Adam remembers where they were going
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    train_sae.train_step({"": sae}, optimizer, {"": x})
    assert (sae.idle[:20] > 0).all()
    for latents_last in (lambda p: p["W_enc"], lambda p: p["b_enc"], lambda p: p["W_dec"].T):
        moved = (latents_last(dict(sae.named_parameters())) - latents_last(before)).abs() > 1e-6
        assert not moved[..., sae.idle > 0].any() and moved[..., sae.idle == 0].any()

def test_atoms_stay_unit_and_training_reduces_the_error():
    sae, x = small_sae(k=4), vectors_of(256)
    before = sae.loss(x).item()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(60):
        train_sae.train_step({"": sae}, optimizer, {"": x})
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40), atol=1e-6, rtol=0)
    assert sae.loss(x).item() < 0.8 * before

# ---------------------------------------------------------------- 2-4. hooks, elbow, budgets
def test_fidelity_equals_numpy():
    """FVU is within heads: the difference of their means is no variance."""
    x, x_hat = vectors_of(32), vectors_of(32, seed=3)
    a, b = x.numpy().astype(float), x_hat.numpy().astype(float)
    norm_a, norm_b = np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=2)
    within = sum(((a[:, h] - a[:, h].mean(0)) ** 2).sum() for h in range(2))
    expected = {"fvu": ((a - b) ** 2).sum() / within,
                "cos": ((a * b).sum(2) / norm_a / norm_b).mean(),
                "rel_norm": (norm_b / norm_a).mean()}
    found = sta.fidelity(x.view(4, 8, 2, 16), x_hat.view(4, 8, 2, 16))
    assert found == pytest.approx(expected, abs=1e-9)

def test_curve_and_elbow():
    sae, x = small_sae(), vectors_of(100)
    points = sta.budget_curve(sae, x, [8, 0, 1, 40, 64])  # 64 is over n_latents: left out
    assert [p["k"] for p in points] == [0, 1, 8, 40]
    mean_alone = sta.fidelity(x, sae.b_dec.expand_as(x))
    assert points[0] == pytest.approx({"k": 0, **mean_alone, "dead": 1})
    z, idx = sae.encode(x, 8)
    codes = zip(z.flatten().tolist(), idx.flatten().tolist())
    fired = {latent for strength, latent in codes if strength > 0}
    expected = {"k": 8, **sta.fidelity(x, sae.decode(z, idx)), "dead": 1 - len(fired) / 40}
    assert points[2] == pytest.approx(expected)
    kinked = [{"k": k, "fvu": max(0.1, 1 - 0.1 * k) - 0.0001 * k} for k in range(33)]
    kinked[0]["fvu"] = 9  # k = 0 is no end of the chord
    kinked[32]["fvu"] = 5  # nor is what lies beyond the budgets trained for
    assert sta.elbow(kinked, 31) == 9
    assert sta.elbow([{"k": 0, "fvu": 1}, {"k": 1, "fvu": 0.2}], 2) == 1

def check_type(model):
    """Captured keys and values are those of Hugging Face's cache; what a codec returns is what
    attention gets, keys and values apart, for as many tokens as heads, too; a codec sees both."""
    check_sites(model)
    H, D = sta.kv_shape(model.get_decoder().config)
    for T in (H, 12):
        ids = tokens_of(2, T)

        def run(codecs, sink=0):
            with sta.reconstruct(model, codecs, sink):
                output = model(ids, use_cache=True)
            cache = output["cache" if "cache" in output else "past_key_values"]
            return output.logits, cache.layers[1]

        with sta.capture(model, [0, 1]) as vectors:
            logits, cached = run({})
        keys, values = vectors[1, "key"], vectors[1, "value"]  # (B, T, H, D)
        assert keys.shape == (2, T, H, D)
        torch.testing.assert_close(values, cached.values.transpose(1, 2))
        turned = cached.keys.transpose(1, 2)  # by RoPE; YaRN stretches all keys alike
        turned = turned * (keys.norm() / turned.norm())
        torch.testing.assert_close(keys[:, 0], turned[:, 0])  # position 0 by no angle
        torch.testing.assert_close(keys.norm(dim=-1), turned.norm(dim=-1))
        told = []
        same, _ = run({1: across(lambda *seen: told.append(seen) or seen[:2])})
        torch.testing.assert_close(same, logits, atol=0, rtol=0)
        torch.testing.assert_close(told[0][:2], (keys, values))
        no_keys, zero = run({1: across(lambda keys, values, live: (0 * keys, values))})
        assert T == 1 or not torch.equal(no_keys[:, 1:], logits[:, 1:])  # already at prefill
        assert zero.keys.abs().max() == 0 and torch.equal(zero.values, cached.values)
        no_values, zero = run({1: across(lambda keys, values, live: (keys, 0 * values))})
        assert (no_values - logits).abs().max() > 1e-5
        assert zero.values.abs().max() == 0 and torch.equal(zero.keys, cached.keys)
        nothing = across(lambda keys, values, live: (0 * keys, 0 * values))
        last, _ = run({0: nothing}, sink=T - 1)  # all but the last token are sinks
        torch.testing.assert_close(last[:, :-1], logits[:, :-1], atol=1e-5, rtol=0)
        assert (last - logits)[:, -1].abs().max() > 1e-5

@pytest.mark.parametrize("family,kv_heads", [*((f, 2) for f in TYPES), ("llama", 1), ("llama", 4),
                                             ("qwen3", 1), ("gemma3_text", 1), ("phi3", 4)])
def test_type(family, kv_heads):
    check_type(small_model(family, kv_heads))

@pytest.mark.parametrize("family,message", [
    ("gpt2", "0 of its modules, for 2 layers, make keys and values"),
    ("deepseek_v3", "0 of its modules"),  # multi-latent attention
    ("mamba", "0 of its modules"),  # state space
    ("llama4_text", "layer 0: attention reads other keys than are seen"),  # a norm after RoPE
    ("hunyuan_v1_dense", "its keys are seen only after RoPE")])
def test_type_that_is_refused(family, message):
    with pytest.raises(sta.UsageError, match=f"model type '{family}' is not supported.*{message}"):
        check_sites(small_model(family))

def test_a_model_that_goes_on_in_place():
    """OLMo may clip keys and values after the projections: what codecs return must arrive."""
    model = small_model("olmo", clip_qkv=0.1)
    with pytest.raises(sta.UsageError, match="layer 0: attention reads other keys than are seen"):
        check_sites(model)
    check_sites(small_model("olmo"))

@pytest.mark.parametrize("context", [
    lambda model: sta.capture(model, [0]),
    lambda model: sta.reconstruct(model, {0: across(lambda keys, values, live: (-keys, -values))})])
def test_hooks_are_gone_after_an_exception(context):
    model, ids = small_model("llama"), tokens_of(1, 5)
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError):
        with context(model):
            model(ids)
            1 / 0
    assert torch.equal(model(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_absent_layer():
    with pytest.raises(sta.UsageError, match="layer 5: the model has layers 0 to 1"):
        with sta.reconstruct(small_model("llama"), {5: told_live([])}):
            pass

def test_hooks_that_never_fire_raise():
    """Of a model that was compiled, and run, before; and of one that was not called at all."""
    model, ids, codecs = small_model("llama"), tokens_of(1, 5), {1: told_live([])}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids)
        for context in (sta.reconstruct(model, codecs), sta.capture(model, [1])):
            with pytest.raises(sta.UsageError, match="the model was not called, or compiled"):
                with context:
                    compiled(ids)
        model.model.layers[1].forward = torch.compile(model.model.layers[1].forward,
                                                      backend="eager")
        model(ids)
        with pytest.raises(sta.UsageError, match="layer 1: keys or values went by unseen"):
            with sta.reconstruct(model, codecs):
                model(ids)
    with sta.reconstruct(model, {}):
        pass  # nothing to see

@pytest.mark.parametrize("family", FAMILIES)
def test_generate_sees_the_reconstruction(family):
    """Greedy generate, left-padded, equals choosing from full forward passes without a cache."""
    model = small_model(family, 4)
    codecs = dual(small_saes(model), 4, 6)
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

def test_codecs_are_told_which_tokens_are_live():
    """Neither sinks nor padding on either side; with a cache, the new tokens' part."""
    model, told = small_model("llama"), []
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with sta.reconstruct(model, {0: told_live(told)}):
        cache = model(tokens_of(2, 6), attention_mask=mask).past_key_values
        model(tokens_of(2, 1), attention_mask=torch.cat([mask, torch.ones(2, 1).long()], 1),
              past_key_values=cache)
        model(tokens_of(2, 1), past_key_values=cache)
    assert told == [[[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]], [[1], [1]], [[1], [1]]]

def mask_forms():
    """Padding, four tokens on the first row's left and two on the second's right, as a caller may
    say it."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 7:] = 0
    sees = mask.bool()[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril()  # (B, 1, T, T)
    added = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return {"2D": mask, "2D bool": mask.bool(), "2D float": mask.float(), "4D bool": sees,
            "4D added": added, "4D minus infinity": torch.zeros(sees.shape).masked_fill(
                ~sees, -math.inf), "by layer type": {"full_attention": sees},
            "heads": sees.expand(2, 4, 9, 9)}

@pytest.mark.parametrize("form", mask_forms())
def test_padding_is_found_in_any_form_of_mask(form):
    model, ids, mask, told = small_model("llama"), tokens_of(2, 9), mask_forms()[form], []
    expected = [[0] * 5 + [1] * 4, [0] + [1] * 6 + [0] * 2]
    with sta.reconstruct(model, {0: told_live(told)}):
        if form == "by layer type":
            live = sta.live_tokens({"input_ids": ids, "attention_mask": mask}, 1)
            told.append(live.int().tolist())
            model(ids)
        else:
            model(ids, attention_mask=mask)
            model.model(ids, mask)  # by place
            assert told.pop() == expected
    assert told[0] == expected

@pytest.mark.parametrize("mask", [torch.ones(2, 9, 9), torch.ones(9), torch.ones(2, 3), "mask",
                                  torch.zeros(2, 9).log(), torch.ones(2, 1, 9, 9).long()])
def test_a_mask_that_cannot_be_read(mask):
    with pytest.raises(sta.UsageError, match="attention_mask: want 1 and 0 of .batch, tokens"):
        sta.live_tokens({"input_ids": tokens_of(2, 9), "attention_mask": mask}, 1)

def test_generate_tells_the_same_with_any_cache():
    """A static cache brings a 4D mask, and a length that its first update changes under way."""
    model, ids, both = small_model("llama"), tokens_of(2, 9), []
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()  # four of padding
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cache in ({}, {"cache_implementation": "static"}):
        told = {0: [], 1: []}
        codecs = {layer: across(lambda keys, values, live, told=told[layer]: told.append(
            live.tolist()) or (keys * 0.9, values)) for layer in told}
        with sta.reconstruct(model, codecs, sink=7):  # the first row's seventh comes in decode
            text = model.generate(ids, attention_mask=mask, **greedy, **cache)
        both.append((text.tolist(), told))
        assert told[0] == told[1] and told[0][0] == [[False] * 9, [False] * 7 + [True] * 2]
        assert [live[0][0] for live in told[0][1:]] == [False, False, True]
    assert both[0] == both[1]

def test_packed_texts_have_a_sink_each():
    model, told, positions = small_model("llama"), [], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with sta.reconstruct(model, {0: told_live(told)}, sink=2):
        model(tokens_of(1, 7), position_ids=positions)
    assert told == [[[0, 0, 1, 1, 0, 0, 1]]]

def test_dual_budget_stores_fp16_and_int16_and_decodes_to_that():
    saes, k, v = [small_sae(seed=s) for s in (1, 2)], vectors_of(15), vectors_of(15, seed=1)
    codec = sta.DualBudget(*saes, sta.Budget(3, 5))
    stored = codec.encode(k.view(5, 3, 2, 16), v.view(5, 3, 2, 16))  # (B, T, H, D)
    assert [x.shape for x in stored] == [(5, 3, 6), (5, 3, 6), (5, 3, 10), (5, 3, 10)]
    assert sum(x.nbytes for x in stored) == 15 * 2 * 4 * (3 + 5)  # METHOD: 4 k bytes a vector
    for x, sae, n, found in zip((k, v), saes, (3, 5), codec.decode(stored)):
        z, idx = sae.encode(x, n)
        expected = sae.decode(z.half().float(), idx)
        torch.testing.assert_close(found, expected.view(5, 3, 2, 16), atol=1e-6, rtol=1e-6)

# ---------------------------------------------------------------- 5. the fast path
def check_fuse(device):
    """Values, over layers, budgets and numbers of rows; few graphs serve them all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for budget in ((8, 16), (3, 5)):
        saes = [small_sae(seed=seed, kind=sta.FastSAE).to(device) for seed in range(24)]
        codecs = {layer: sta.DualBudget(saes[layer], saes[12 + layer], sta.Budget(*budget))
                  for layer in range(12)}
        own = {12: across(lambda keys, values, live: (keys, values))}
        fused = sta.fuse({**codecs, **own})
        assert fused[12] is own[12]
        for layer, codec in codecs.items():
            for n in (6, 7, 40):
                x = [vectors_of(n, seed=s)[None].to(device) for s in (0, 1)]
                expected = codec.decode(codec.encode(*x))
                for found, x_hat in zip(fused[layer].roundtrip(*x, None), expected):
                    torch.testing.assert_close(found, x_hat, atol=0.02, rtol=0)  # fp16
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # of 72 calls

def test_compiled_path_equals_eager():
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(3))
    except Exception as error:
        pytest.skip(f"no compiler for torch.compile here: {type(error).__name__}")
    check_fuse("cpu")

def test_without_a_compiler_a_warning_says_so(monkeypatch):
    def refuse(f, **options):
        def call(*args):
            raise RuntimeError("no compiler")
        return call
    monkeypatch.setattr(torch, "compile", refuse)
    codecs = {0: sta.DualBudget(small_sae(), small_sae())}
    with pytest.warns(UserWarning, match="nothing is compiled .RuntimeError"):
        assert sta.fuse(codecs) is codecs

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_path_equals_eager_on_cuda():
    check_fuse("cuda")

# ---------------------------------------------------------------- 6. files
METADATA = {"model": "small", "marks": {}, "settings": {}}

def test_saved_sae_is_the_same_function(tmp_path):
    sae, x, folder = small_sae(), vectors_of(50), tmp_path / "layer0.key"
    save_sae(folder, sae, METADATA)
    loaded, metadata = load_sae(folder)
    torch.testing.assert_close(through(loaded, x, 8), through(sae, x, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode(x, 8)[0], sae.encode(x, 8)[0] * sae.scale)  # folded
    assert loaded.scale == 1 and loaded.k == 8 and {k: metadata[k] for k in METADATA} == METADATA
    (folder / "head_offsets.safetensors").unlink()  # as SAEs of one mean for all heads were saved
    with pytest.raises(sta.UsageError, match="or of an older version; train again"):
        load_sae(folder)

def test_saved_sae_is_one_of_saelens(tmp_path):
    """Its formula, on vectors less the mean of their head: pip install sae-lens==6.54.0 to try."""
    lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae, x = small_sae(), vectors_of(50)
    save_sae(tmp_path, sae, METADATA)
    other = lens.SAE.load_from_disk(tmp_path)
    inside = x - safetensors.torch.load_file(tmp_path / "head_offsets.safetensors")["head_offsets"]
    z, idx = sae.encode(x, 8)
    expected = torch.zeros(50, 2, 40).scatter(-1, idx, z * sae.scale)
    torch.testing.assert_close(other.encode(inside), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other(inside) + sae.b_dec, sae.decode(z, idx), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize("spoil", [
    lambda data: data[:len(data) // 2], lambda data: b"\xff" * 64, lambda data: b""])
def test_corrupt_weights(tmp_path, spoil):
    save_sae(tmp_path / "layer0.key", small_sae(), METADATA)
    weights = tmp_path / "layer0.key" / "sae_weights.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    with pytest.raises(sta.UsageError, match="layer0.key: missing, truncated or corrupt"):
        load_sae(tmp_path / "layer0.key")

def test_saes_of_another_model_or_shape(tmp_path):
    model = small_model("llama")
    for key, sae in small_saes(model).items():
        metadata = {**METADATA, "marks": model_marks(model, [key[0]])}
        save_sae(tmp_path / f"layer{key[0]}.{key[1]}", sae, metadata)
    (tmp_path / "layer_old.key").mkdir()  # somebody's own
    assert set(load_saes(tmp_path, model)[0]) == set(sta.kv_sites(model))
    with pytest.raises(sta.UsageError, match="SAEs of small, not of this model"):
        load_saes(tmp_path, small_model("qwen2", vocab_size=64))
    save_sae(tmp_path / "layer0.key", small_sae(24), METADATA)
    with pytest.raises(sta.UsageError, match="not of this model"):
        load_saes(tmp_path, model)

def test_marks_forgive_rounding_but_no_change():
    model = small_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.normal_()
    marks = model_marks(model, [0, 1])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = small_model("qwen2")
        rounded.load_state_dict(model.state_dict())
        assert same_marks(model_marks(rounded.to(dtype), [1]), marks)
    assert not same_marks(model_marks(model, [0]), model_marks(model, [1]))  # none
    shuffled = {"0": marks["1"], "1": marks["0"]}
    assert not same_marks(shuffled, marks)
    for change in (lambda a: a.k_proj.weight.neg_(), lambda a: a.v_proj.weight.mul_(1.02),
                   lambda a: a.k_proj.bias[3].add_(0.5), lambda a: a.v_proj.weight[5].neg_(),
                   lambda a: a.v_proj.weight[2, 3].add_(0.01),
                   lambda a: a.v_proj.weight.mul_(1 + 0.003 * torch.randn(32, 64))):
        other = small_model("qwen2")
        other.load_state_dict(model.state_dict())
        change(other.model.layers[1].self_attn)
        assert not same_marks(model_marks(other, [0, 1]), marks)
        assert not same_marks(model_marks(other.bfloat16(), [0, 1]), marks)
        assert same_marks(model_marks(other, [0]), marks)

def test_failed_write_loses_nothing(tmp_path):
    write_atomic(tmp_path / "file", "old")
    (tmp_path / ".file.tmp").mkdir()  # in the way of the new file
    with pytest.raises(sta.UsageError, match="cannot write .*; nothing was replaced"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"

def test_windows_are_the_text_cut_once(monkeypatch):
    """In pieces, the tokens are those of one call: special tokens stand at the beginning only; the
    tail is dropped. No more is read and tokenised than they need."""
    model, tokenizer, _ = load_model("tiny")
    text, read = "".join(read_text(None, "valid", "tiny")), []
    ids = torch.tensor(tokenizer(text).input_ids)
    for size in (2000, 65_536):
        monkeypatch.setattr(support.text, "PIECE", size)
        windows = token_windows(read_text(None, "valid", "tiny"), tokenizer, model, 100,
                                    2048, 1 << 40)
        assert torch.equal(windows.flatten(), ids[:len(ids) // 100 * 100])
    pieces = (read.append(piece) or piece for piece in read_text(None, "valid", "tiny"))
    assert token_windows(pieces, tokenizer, model, None, 2048, 1, least=2).shape == (2, 256)
    assert len("".join(read)) == 65_536 < len(text) / 5

TEXTS = {"prose": "The year 1862, it's said, was cold;\n\n  they'd gone.\tHm... " * 200,
         "code": "def f(x):\n    return [1234567 * x]  # ünï 你好世界 \r\n\n\n" * 200,
         "one line": "no line breaks at all, only 12 words and a few more " * 300,
         "no space": "".join(chr(0x4E00 + i * i % 997) for i in range(9000)),
         "rules": ("=" * 70 + "\n" + " " * 40 + "x\n") * 100,
         "runs": ("word " + " " * 900 + "x = 1;\n") * 20}

@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "sentencepiece"])
def test_tokens_in_pieces_are_those_of_one_call(text, kind, monkeypatch):
    """With the three ways in which tokenizers cut text: GPT-2's, Llama 3's and Llama 2's."""
    monkeypatch.setattr(support.text, "PIECE", 3000)
    tokenizer, text = make_tokenizer(kind), TEXTS[text]
    pieces = (text[i:i + 777] for i in range(0, len(text), 777))
    assert tokenize(pieces, tokenizer, 1 << 40).tolist() == tokenizer(text).input_ids

@functools.cache
def make_tokenizer(kind, template="<s> $A"):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, \
        processors, trainers
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token="<unk>"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "llama3":
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
            r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"), words])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                     normalizers.Replace(" ", "▁")])
        alphabet, words = [], pre_tokenizers.Split("▁", "merged_with_next")  # for the trainer only
    tokenizer.pre_tokenizer = words
    tokenizer.train_from_iterator([*TEXTS.values(), *read_text(None, "valid", "tiny")],
                                  trainers.BpeTrainer(vocab_size=1500, special_tokens=[
                                      "<s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))],
                                      initial_alphabet=alphabet, show_progress=False))
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("<unk>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

def test_special_tokens_stand_before_a_text_only():
    """Also with a tokenizer that would append EOS, and so end each piece and context with it."""
    tokenizer = make_tokenizer("gpt2", "<s> $A <unk>")
    tokenizer.eos_token = "<unk>"
    ids = encode_text(tokenizer, "The year")
    assert ids[0] == 0 and tokenizer.eos_token_id not in ids
    assert encode_pair(tokenizer, "The", " year")[0] + encode_pair(
        tokenizer, "The", " year")[1] == ids

def test_a_text_that_begins_with_bos_has_one():
    tokenizer = make_tokenizer("gpt2")
    assert encode_text(tokenizer, "<s>The year")[:2] == encode_text(tokenizer, "The year")[:2]
    assert encode_pair(tokenizer, "<s>The year", " 1862")[0][:2][1] != 0  # lm-eval 0.4.13
    assert tokenize(["<s>The year"], tokenizer, 9)[1] != 0

def test_documents_of_the_hub(monkeypatch):
    rows = [{"text": f"document {i}", "id": i} for i in range(6)]
    hub = types.SimpleNamespace(load_dataset=lambda name, config, split, streaming: rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    text = "".join(read_text("owner/name", "train", "tiny"))
    assert text == "".join(f"document {i}\n\n" for i in range(6))
    rows[:] = [{"prose": "a", "id": 1}]
    assert list(read_text("owner/name:c:train:prose", "train", "tiny")) == ["a\n\n"]
    for column in ("", ":c:train:id"):
        with pytest.raises(sta.UsageError, match="no text in column '.*' of prose, id; want own"):
            list(read_text(f"owner/name{column}", "train", "tiny"))
    hub.load_dataset = None
    with pytest.raises(sta.UsageError, match="owner/name: no file, and as a data set it cannot be"):
        list(read_text("owner/name", "train", "tiny"))

# ---------------------------------------------------------------- the scripts, on tiny
SHORT = ["--tokens", 16_384, "--n-latents", 64, "--batch-tokens", 256, "--layer", "1-2"]

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short run over two layers of tiny, uninterrupted."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sae, "BUFFER_TOKENS", 2048)
        assert script(train_sae, *SHORT, "--out", out) == 0
    assert not (out / "tiny" / "unfinished.safetensors").exists()
    norms = load_sae(out / "tiny" / "layer1.key")[0].W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(64), atol=1e-5, rtol=0)
    assert json.loads((out / "tiny" / "run-1-2.json").read_text())["log"][-1]["fvu"]["key"] < 0.8
    return out

def test_second_run_overwrites_nothing(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}
    assert script(train_sae, *SHORT, "--out", trained) == 0
    assert "trained already" in capsys.readouterr().out
    assert script(train_sae, *SHORT, "--seed", 1, "--out", trained) == 2
    assert "trained with seed = 0, not 1" in capsys.readouterr().err
    other_layer = [*SHORT[:-1], "4", "--n-latents", 32, "--out", trained]
    assert script(train_sae, *other_layer) == 2  # one folder, one kind of SAEs
    assert "trained with n_latents = 64, not 32" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*.safetensors")}

def model_folder(folder, seed):
    """A small random Llama with tiny's tokenizer, as users save their own."""
    model = small_model("llama", vocab_size=2048)
    torch.manual_seed(seed)
    for p in model.parameters():
        p.normal_(0, 0.05)
    model.save_pretrained(folder)
    load_model("tiny")[1].save_pretrained(folder)
    return folder

def test_models_of_one_folder_name_are_told_apart(tmp_path, capsys, monkeypatch):
    a, b = (model_folder(tmp_path / name / "checkpoint-100", seed)
            for seed, name in enumerate("ab"))
    train = ["--tokens", 2048, "--n-latents", 16, "--k-key", 2, "--k-val", 4, "--out", tmp_path,
             "--text", ROOT / "tiny" / "train.txt"]
    results = ["--saes", tmp_path, "--k-key", 2, "--k-val", 4, "--max-tokens", 256, "--out",
               tmp_path / "results", "--text", ROOT / "tiny" / "valid.txt"]
    with monkeypatch.context() as patch:  # a stop before anything is saved
        patch.setattr(train_sae, "save_trained", lambda *args: (_ for _ in ()).throw(
            KeyboardInterrupt))
        assert script(train_sae, "--model", a, *train) == 130
    assert script(train_sae, "--model", b, *train, "--resume") == 2
    assert "was trained with model_sha256 = " in capsys.readouterr().err
    assert script(train_sae, "--model", a, *train, "--resume") == 0
    assert script(train_sae, "--model", b, *train) == 2
    assert "was trained with model_sha256 = " in capsys.readouterr().err
    assert script(evaluate, "--model", b, *results) == 2
    assert "not of this model" in capsys.readouterr().err
    for dtype in ("float16", "float32"):
        assert script(evaluate, "--model", a, *results, "--dtype", dtype) == 0
    shutil.rmtree(tmp_path / "checkpoint-100")
    assert script(train_sae, "--model", b, *train) == 0
    capsys.readouterr()
    assert script(evaluate, "--model", b, *results) == 2
    assert_one_line(capsys.readouterr().err, "checkpoint-100.json: of another model of that name")

def test_a_stop_between_the_last_sae_and_the_log_can_be_resumed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sae, "BUFFER_TOKENS", 2048)
    def stop(path, data, write=write_atomic):
        if path.name.startswith("run-"):
            raise KeyboardInterrupt
        write(path, data)
    with monkeypatch.context() as patch:
        patch.setattr(train_sae, "write_atomic", stop)
        assert script(train_sae, *SHORT, "--out", tmp_path) == 130
    assert script(train_sae, *SHORT, "--out", tmp_path) == 2
    assert script(train_sae, *SHORT, "--out", tmp_path, "--resume") == 0
    for path in filter(pathlib.Path.is_file, trained.rglob("*")):
        assert path.read_bytes() == (tmp_path / path.relative_to(trained)).read_bytes(), path
    assert not (tmp_path / "tiny" / "unfinished.safetensors").exists()

def run_script(patch, *argv):
    """train_sae.py in a process of its own, after the statement `patch`."""
    code = f"import train_sae, support.files; train_sae.BUFFER_TOKENS = 2048; {patch}; " \
           "run_main(train_sae.main)"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_killed_run_resumes_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_sae, "BUFFER_TOKENS", 2048)
    run = run_script("train_sae.CHECKPOINT_SECONDS = 0", *SHORT, "--out", tmp_path)
    state = tmp_path / "tiny" / "unfinished.safetensors"
    while not state.exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert state.exists() and not (tmp_path / "tiny" / "layer2.value").exists()
    assert script(train_sae, *SHORT, "--out", tmp_path) == 2
    assert "unfinished run: add --resume" in capsys.readouterr().err
    assert script(train_sae, *SHORT, "--lr", 1, "--out", tmp_path, "--resume") == 2
    assert "trained with lr = 0.01, not 1.0" in capsys.readouterr().err
    assert script(train_sae, *SHORT, "--out", tmp_path, "--resume") == 0
    assert "resuming at step" in capsys.readouterr().out
    for path in trained.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / path.relative_to(trained)).read_bytes(), path
    (tmp_path / "new" / "tiny").mkdir(parents=True)
    shutil.copy(trained / "tiny" / "layer1.key" / "sae_weights.safetensors",
                tmp_path / "new" / "tiny" / "unfinished.safetensors")
    assert script(train_sae, *SHORT, "--out", tmp_path / "new", "--resume") == 2
    assert "unfinished.safetensors: corrupt; delete it" in capsys.readouterr().err

def test_the_readmes_repl_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """With SAEs of the quick start's settings: shapes are equal, figures close."""
    assert script(train_sae, "--layer", "2", "--out", tmp_path / "saes") == 0
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code, {})
    numbers = re.compile(r"\d+\.?\d*")
    printed = capsys.readouterr().out.splitlines()
    promised = [line.split("#")[1] for line in code.splitlines() if line.startswith("print")]
    assert len(promised) == 4 and printed[4].startswith("The President of the United")
    for there, here in zip(promised, printed):
        there, here = numbers.findall(there), numbers.findall(here)
        assert [x for x in here if "." not in x] == [x for x in there if "." not in x]
        figures = [float(x) for x in there if "." in x]
        close = 0.6 if len(figures) == 8 else 0.02  # coefficients differ from seed to seed
        assert [float(x) for x in here if "." in x] == pytest.approx(figures, rel=close)

@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert script(evaluate, "--saes", trained, "--max-tokens", 2048, "--limit", 20,
                  "--out", out) == 0
    return out

def test_an_interrupted_evaluation_is_taken_up(trained, evaluated, tmp_path, monkeypatch, capsys):
    whole, scored = json.loads((evaluated / "tiny.json").read_text()), []
    (tmp_path / "tiny.json").write_text(json.dumps({**whole, "rows": whole["rows"][:3]}))
    window_losses = evaluate.window_losses

    def note(forward, windows, model, name):
        scored.append(name)
        return window_losses(forward, windows, model, name)

    monkeypatch.setattr(evaluate, "window_losses", note)
    argv = ("--saes", trained, "--max-tokens", 2048, "--limit", 20, "--out", tmp_path, "--resume")
    assert script(evaluate, *argv) == 0
    assert scored == ["dual", "uniform", "reverse"]
    again = json.loads((tmp_path / "tiny.json").read_text())
    for before, after in zip(whole["rows"], again["rows"]):
        assert after["delta_ce"] == pytest.approx(before["delta_ce"], abs=1e-6)
        assert after["tasks"] == before["tasks"] and after["by_layer"] == before["by_layer"]
    capsys.readouterr()
    assert script(evaluate, *argv, "--k-key", 4) == 2
    assert_one_line(capsys.readouterr().err, "--resume cannot take it up.*k_key is 8 there, 4 here")
    again["training"][0]["log"].pop()
    (tmp_path / "tiny.json").write_text(json.dumps(again))
    assert script(evaluate, *argv) == 2
    assert_one_line(capsys.readouterr().err, "the SAEs have been trained anew since")

def test_evaluation_table(evaluated):
    result = json.loads((evaluated / "tiny.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "keys", "values", "dual", "uniform", "reverse"]
    assert result["layers"] == [1, 2] and result["n_layers"] == 6 and result["tokens"] == 2048
    dual, dense = rows["dual"], rows["dense"]
    assert [(rows[name]["k_key"], rows[name]["k_val"]) for name in (
        "dense", "dual", "uniform", "reverse")] == [(None, None), (8, 16), (12, 12), (16, 8)]
    assert dense["bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    assert dual["bytes_share"] == pytest.approx((4 + 2 * 0.1875) / 6)
    assert len({round(row["perplexity"], 6) for row in rows.values()}) == 6
    assert dual["delta_ce"] == pytest.approx(math.log(dual["perplexity"] / dense["perplexity"]))
    assert dual["fvu_key"] == rows["keys"]["fvu_key"] == pytest.approx(
        np.mean([layer["fvu_key"] for layer in dual["by_layer"].values()]))
    assert rows["keys"]["fvu_val"] == 0 and rows["keys"]["cos_val"] == pytest.approx(1)
    assert rows["keys"]["bytes_share"] == pytest.approx((4 + 2 * (0.125 + 1) / 2) / 6)
    assert rows["values"]["bytes_share"] == pytest.approx((4 + 2 * (0.25 + 1) / 2) / 6)
    assert dual["once_bytes"] == 4 * (2 * 64 * 128 + 64 + 2 * 128) * 4  # of four SAEs, float32
    saved = dense["bytes_per_token"] - dual["bytes_per_token"]
    assert np.mean(dual["window_ce"]) == pytest.approx(dual["ce"], abs=1e-6)
    assert dual["break_even_tokens"] == round(dual["once_bytes"] / saved)

def test_perplexity_is_that_of_hugging_face(evaluated):
    """The dense row against transformers' own labels= loss on windows cut here."""
    rows = json.loads((evaluated / "tiny.json").read_text())["rows"]
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny").float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny")
    text = (ROOT / "tiny" / "valid.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in ids[:, :2048].split(256, dim=1)]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)

def test_an_interrupted_evaluation_keeps_its_rows(trained, evaluated, tmp_path, monkeypatch):
    """And those of the complete one before it."""
    shutil.copy(evaluated / "tiny.json", tmp_path)
    def stop(forward, windows, model, name, losses=evaluate.window_losses):
        if name == "values":
            raise KeyboardInterrupt
        return losses(forward, windows, model, name)
    monkeypatch.setattr(evaluate, "window_losses", stop)
    monkeypatch.setenv("PATH", "")  # and where there is no git
    assert script(evaluate, "--saes", trained / "tiny", "--max-tokens", 512, "--limit", 2, "--out",
                  tmp_path) == 130
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["dense", "keys"] and result["commit"] is None
    assert len(json.loads((tmp_path / "tiny.json.previous").read_text())["rows"]) == 6
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 0

def test_a_loss_too_large_for_exp(tmp_path):
    dense = torch.ones(4, dtype=torch.float64)
    row = evaluate.compare(dense * 1000, dense)
    assert row["perplexity"] == row["ratio"] == row["ratio_ci95"][1] == math.inf
    assert json.loads(json.dumps(row)) == row

def test_plots(evaluated, tmp_path, capsys):
    assert script(plots, "--results", evaluated, "--out", tmp_path) == 0
    image = plots.plt.imread(tmp_path / "tiny-overview.png")
    assert image.shape[1] > 600 and image[..., :3].std() > 0.05  # something is drawn
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "no results; first run: python train_sae.py")
    result = json.loads((evaluated / "tiny.json").read_text())
    result["rows"][3] |= {"ratio": math.inf, "ratio_ci95": [math.inf, math.inf]}
    for curves in result["curves"].values():  # of an SAE with six latents
        for kind in sta.KINDS:
            curves[kind] = [point for point in curves[kind] if point["k"] < 8]
            curves[f"k_{kind}"], curves[f"elbow_{kind}"] = 6, 2
    (tmp_path / "tiny.json").write_text(json.dumps(result))
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 0
    capsys.readouterr()
    (tmp_path / "tiny.json").write_text(json.dumps({**result, "rows": [{}]}))
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "tiny.json: not a result of evaluate.py")
    (tmp_path / "tiny.json").write_text("{")
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "tiny.json: not a result of evaluate.py")

# ---------------------------------------------------------------- zero-shot
ARC = {"question": "Why?", "choices": {"text": ["a", "bc"], "label": ["1", "2"]}, "answerKey": "2"}
FORMATS = {  # a hub row and what lm-eval 0.4.13 makes of it: contexts, choices, label
    "piqa": ({"goal": "tea", "sol1": "hot", "sol2": "cold", "label": 1},
             "Question: tea\nAnswer:", ["hot", "cold"], 1),
    "hellaswag": ({"activity_label": "Tea", "ctx_a": "He boils [x] it.", "ctx_b": "the Cup",
                   "endings": ["is [step] full.", " [title] Rest"], "label": "1"},
                  "Tea: He boils it. The cup", ["is full.", " Rest"], "1"),
    "arc_easy": (ARC, "Question: Why?\nAnswer:", ["a", "bc"], 1),
    "winogrande": ({"sentence": "Ann thanked Bea as _ was kind.", "option1": "Ann",
                    "option2": "Bea", "answer": "2"},
                   ["Ann thanked Bea as Ann", "Ann thanked Bea as Bea"], ["was kind."] * 2, 1),
    "boolq": ({"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
              "Ice is cold.\nQuestion: is ice cold?\nAnswer:", ["no", "yes"], 1),
    "openbookqa": ({**ARC, "question_stem": "A cat", "answerKey": " 1"}, "A cat", ["a", "bc"], 0)}

@pytest.mark.parametrize("task", FORMATS)
def test_format(task):
    row, *expected = FORMATS[task]
    assert list(TASKS[task][3](row)) == expected

def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)

def test_loglikelihoods_are_those_of_one_request_at_a_time(tmp_path, capsys):
    """Against Hugging Face on each request alone; with cut contexts, spaces, an empty context."""
    model, tokenizer, _ = load_model("tiny")
    rows = [json.loads(line) for line in open(ROOT / "tiny" / "cloze.jsonl")][:6]
    rows[0]["context"] += "  "
    rows[1]["context"] = ""
    rows[2]["context"] = " ".join(row["context"] for row in rows) * 2  # over 256 tokens
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    task = load_task(path, None, None, tokenizer, 256)
    assert "4 contexts cut on the left, to the model's 256 tokens" in capsys.readouterr().out
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
            expected.append(log_p[range(n - 1, len(whole) - 1), whole[n:]].sum().item())
    totals = loglikelihoods(lambda ids: model(ids).logits, task, model, "test")
    assert totals == pytest.approx(expected, abs=2e-4)

def test_scores():
    task = [Question([None] * 2, lengths, label)
            for lengths, label in (([2, 5], 0), ([2, 9], 1), ([1, 1], 1))]
    dense = score_task(task, [-1.0, -2.0] * 3, None)
    assert dense["right"] == [True, False, False] and dense["delta_acc"] == 0
    row = score_task(task, [-3.0, -9.0, -3.0, -9.0, -1.0, -2.0], dense)
    assert row["acc"] == pytest.approx(1 / 3)  # only the first row's sum is largest at its label
    assert row["acc_norm"] == pytest.approx(2 / 3)  # per character -1.5 beats -1.8, -1 beats -1.5
    assert row["acc_stderr"] == pytest.approx(np.std([1, 0, 0], ddof=1) / np.sqrt(3))
    assert row["delta_acc"] == 0 and row["delta_acc_stderr"] == 0 and row["n"] == 3

def test_paired_comparison():
    dense, noise = rows_of(200, 1)[:, 0].double(), rows_of(200, 1, seed=1)[:, 0].double()
    row = evaluate.compare(dense + 0.01 * noise, dense)
    stderr = 0.01 * noise.numpy().std(ddof=1) / np.sqrt(200)
    assert row["delta_ce_stderr"] == pytest.approx(stderr)
    assert np.log(row["ratio_ci95"]) == pytest.approx(
        [row["delta_ce"] - 1.96 * stderr, row["delta_ce"] + 1.96 * stderr])

# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("argv,message", [
    (["--model", "gpt5"], "--model gpt5: want a folder, one of tiny, yi-6b"),
    (["--model", "no-one/nothing"], "--model no-one/nothing: .* or a hub id that is reachable"),
    (["--layer", "6"], "--layer 6: .* layers 0 to 5"),
    (["--layer", "two"], "--layer two: want all, 12, 0-7 or 3,9"),
    (["--k-key", "0"], "--k-key 0: want 1 to 512 = --n-latents"),
    (["--n-latents", "40000"], "--n-latents 40000: want 1 to 32,768"),
    (["--tokens", "0"], "--tokens 0: want 1 to"),
    (["--lr", "nan"], "--lr nan, --seed 0: want a rate above 0"),
    (["--seed", "-1"], "--seed -1: want .* a seed of 0 or more"),
    (["--layer", "1-2-3"], "--layer 1-2-3: want all, 12, 0-7 or 3,9"),
    (["--layer", "0-999999999999"], "--layer 0-999999999999: .* layers 0 to 5"),
    (["--text", "absent.txt"], "--text absent.txt: no UTF-8 file"),
    (["--text", "{tmp}/empty.txt"], "text of 2 tokens: too short for 2 windows"),
    (["--text", "{tmp}/latin1.txt"], "latin1.txt: no UTF-8 file"),
    (["--text", "{tmp}/short.txt"], "too short"),
    (["--text", "no-one/nothing"], "--text no-one/nothing"),
    (["--device", "cuda:7"], "--device cuda:7: not on this machine"),
    (["--seq-len", "257"], "--seq-len 257: want 2 to the model's limit of 256"),
    (["--out", "{tmp}/short.txt/below"], "cannot write"),
    (["--out", "/proc/x"], "--out /proc/x: cannot write there"),
    (["--model", "{tmp}/code"], "--model .*/code: want a folder, .* without code of its own"),
])
def test_bad_training_input(argv, message, tmp_path, capsys):
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_bytes(b"too little")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(json.dumps(
        {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}))
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    assert script(train_sae, "--tokens", 1000, "--out", tmp_path / "out", *argv) == 2
    assert_one_line(capsys.readouterr().err, message)

@pytest.mark.parametrize("argv,message", [
    (["--saes", "{tmp}"], "no SAEs of any model; first run: python train_sae.py"),
    (["--saes", "{tmp}", "--model", "yi-6b"], "first run: python train_sae.py --model yi-6b"),
    (["--k-val", "65"], "--k-val 65: want 1 to n_latents = 64"),
    (["--k-key", "0"], "--k-key 0: want 1 to n_latents = 64"),
    (["--layer", "5"], "no SAEs of layer 5, but of"),
    (["--text", "{tmp}/short.txt"], "too short for 1 windows of 256"),
    (["--tasks", "mmlu"], "--tasks mmlu: want path.jsonl or one of piqa, hellaswag"),
    (["--tasks", "piqa", "--task-dir", "{tmp}"], "cannot read .*piqa.jsonl"),
    (["--tasks", "boolq", "--task-dir", "{tmp}"], "boolq.jsonl line 2: .* .KeyError: 'question'"),
    (["--tasks", "{tmp}/label.jsonl"], "label.jsonl line 1: .* label 2, but 2 choices"),
    (["--tasks", "{tmp}/nothing.jsonl"], "nothing.jsonl line 1: .* choice 1 is blank"),
    (["--tasks", "{tmp}/long.jsonl"], "long.jsonl line 1: .* choice 0 is .* over 256 tokens"),
    (["--tasks", "{tmp}/short.txt.jsonl"], "short.txt.jsonl line 1: not JSON"),
    (["--tasks", "openbookqa", "--task-dir", "{tmp}"], "line 1: not a row of openbookqa"),
    (["--limit", "0"], "--limit 0: want 1 or more"),
    (["--tasks", "{tmp}/label.jsonl,{tmp}/../label.jsonl"], "--tasks: 2 of them are named label"),
    (["--rows", "int8"], "--rows int8: there is no beyond/int8.py"),
    (["--rows", "../sta"], "--rows ../sta: there is no beyond/../sta.py"),
    (["--rows", "benchmark"], "--rows benchmark: beyond/benchmark.py is a script, and adds no"),
    (["--only", "("], "--only .: no regular expression"),
    (["--sink", "256"], "--sink 256: want fewer than a window's 256"),
    (["--out", "/proc/x"], "--out /proc/x: cannot write there"),
    (["--out", "{tmp}/older"], "tiny.json: no result of this version; delete it or choose another"),
])
def test_bad_evaluation_input(argv, message, trained, tmp_path, capsys):
    for name in ("short.txt", "short.txt.jsonl"):
        (tmp_path / name).write_bytes(b"too little")
    good = {"passage": "p", "question": "q", "label": 1}
    write_jsonl(tmp_path / "boolq.jsonl", [good, {"passage": "p", "label": 1}])
    write_jsonl(tmp_path / "openbookqa.jsonl", [{**ARC, "question_stem": "s", "answerKey": "E"}])
    for name, choices in (("label", ["a", "b"]), ("nothing", ["a", ""]), ("long", ["a " * 300])):
        label = 2 if name == "label" else 0
        (tmp_path / "older").mkdir(exist_ok=True)
        (tmp_path / "older" / "tiny.json").write_text('{"rows": []}')
        write_jsonl(tmp_path / f"{name}.jsonl", [
            {"context": "c", "choices": choices, "label": label}])
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    assert script(evaluate, "--saes", trained, "--out", tmp_path, *argv) == 2
    assert_one_line(capsys.readouterr().err, message)

def test_a_token_across_the_join_is_named(tmp_path):
    """A word-level tokenizer that splits nowhere: context and choice are one unknown word."""
    from tokenizers import Tokenizer, models
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
        models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    path = write_jsonl(tmp_path / "t.jsonl", [{"context": "c", "choices": ["a", "b"], "label": 0}])
    with pytest.raises(sta.UsageError, match="choice 0 has no token of its own: one spans"):
        load_task(path, None, None, tokenizer, 256)

def test_any_terminal():
    """One that knows ASCII only; a reader that goes away, as `| head -1` does."""
    def start(statement):
        return subprocess.Popen(
            [sys.executable, "-c", f"import sta; run_main(lambda: {statement})"], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    ascii, plain, inside = map(start, (
        "print('±')", "[print('line') for _ in range(100_000)]",
        "[files.explain('x').__enter__() or print('line') for _ in range(100_000)]"))
    assert ascii.communicate() == ("?\n", "")
    for run in (plain, inside):
        assert run.stdout.readline() == "line\n"
        run.stdout.close()
        assert run.wait() == 141 and run.stderr.read() == ""

def assert_one_line(printed, message):
    assert printed.count("\n") == 1 and re.search(f"^error: .*{message}", printed), printed

def test_training_that_diverges(tmp_path, capsys):
    assert script(train_sae, *SHORT, "--lr", "1e38", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "an SAE is no longer finite; start again with a --lr")
    assert not list(tmp_path.rglob("*.safetensors"))

def test_harvest_keeps_the_order_and_wants_finite_numbers():
    model, ids = small_model("llama"), tokens_of(70, 64)  # more tokens than a batch's 4,096
    alone = torch.cat([sta.harvest(model, window[None], [1])[1, "value"] for window in ids])
    torch.testing.assert_close(sta.harvest(model, ids, [1])[1, "value"], alone)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(sta.UsageError, match="layer 1: a value is not finite; use --dtype"):
        sta.harvest(model, ids, [0, 1])

if __name__ == "__main__":
    transformers.logging.set_verbosity(50)
    verdicts = collections.Counter()
    for name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            check = functools.partial(check_type, small_model(name))
        except Exception as error:  # each type has rules of its own
            verdict, reason = "not built", f"{type(error).__name__}: {error}"
        else:
            try:
                verdict, reason = "works", check() or ""
            except Exception as error:
                verdict, reason = "refused", error
                verdict = "refused" if isinstance(error, sta.UsageError) else "FAILS"
        verdicts[verdict] += 1
        print(f"{name:26} {verdict:9}", " ".join(str(reason).split())[:100])
    print(dict(verdicts))
