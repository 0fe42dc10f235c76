"""What the README says, executably, in the order of sta.py; then the scripts, on tiny.

    python -m pytest -q          # CPU, offline

Each check compares with something independent: a Python loop, float64, numpy, Hugging Face's own
cache or loss, an uninterrupted run. Non-goals: speed (README has the commands), model quality;
model types, text, files, tasks and bad input (support/test_support.py).
"""
import json
import math
import os
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
import torch
import transformers

import evaluate
import sta
import train_sae
from support.files import ROOT, load_sae, run_main

# ---------------------------------------------------------------- what several tests share
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

def recorder(lives):
    """A codec that loses nothing, and appends to lives which tokens were live."""
    return across(lambda keys, values, live: lives.append(live.int().tolist()) or (keys, values))

def small_saes(model, n_latents=64):
    heads, dim = sta.kv_shape(model.get_decoder().config)
    return {key: small_sae(dim, n_latents, seed, heads=heads)
            for seed, key in enumerate(sta.kv_sites(model))}

def dual(saes, *budget):
    return {layer: sta.DualBudget(saes[layer, "key"], saes[layer, "value"], sta.Budget(*budget))
            for layer, kind in saes if kind == "key"}

def tokens_of(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))

def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))

def script(module, *argv):
    """Run a script's main in this process, on the CPU; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        try:
            run_main(lambda: module.main(list(map(str, argv))))
        except SystemExit as stop:
            return stop.code
    return 0

def assert_one_line(printed, message):
    assert printed.count("\n") == 1 and re.search(f"^error: .*{message}", printed), printed

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
    torch.testing.assert_close(through(sae, x, 0), sae.b_dec.expand(24, 2, 16))  # heads' means

@pytest.mark.parametrize("k", [-1, 41])
def test_budget_out_of_range(k):
    with pytest.raises(sta.UsageError, match=f"k = {k}: want 0 to n_latents = 40"):
        small_sae().encode(vectors_of(2), k)

def test_silent_latents_are_lifted_until_they_fire():
    sae, x = small_sae(k=2), vectors_of(50)
    with torch.no_grad():
        sae.b_enc[:20] = -100.0  # these never fire, though at k = 40 they are chosen, with z = 0
    before = sae.b_enc.detach().clone()
    for _ in range(7):  # 700 vectors; the limit is 16 * 40
        sae.loss(x)
    fires = torch.zeros(40, dtype=torch.bool)
    fires[sae.encode(x, 4)[1].unique()] = True  # among the four strongest, of the loss
    assert (sae.since_fired[fires] == 0).all() and (sae.since_fired[~fires] == 700).all()
    sae.lift_silent(0.5)
    torch.testing.assert_close(sae.b_enc - before, torch.where(fires, 0, 0.5))
    for _ in range(220):
        sae.lift_silent(0.5)
    sae.loss(x)
    assert not fires[:20].any() and (sae.since_fired[:20] == 0).any()

def test_a_step_leaves_latents_that_did_not_fire_where_they_were():
    sae, x = small_sae(k=2), vectors_of(50)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    train_sae.train_step({"": sae}, optimizer, {"": x})
    with torch.no_grad():
        sae.b_enc[:20] -= 100.0  # these fire no more, though Adam remembers where they were going
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    train_sae.train_step({"": sae}, optimizer, {"": x})
    assert (sae.since_fired[:20] > 0).all()
    for latents_last in (lambda p: p["W_enc"], lambda p: p["b_enc"], lambda p: p["W_dec"].T):
        moved = (latents_last(dict(sae.named_parameters())) - latents_last(before)).abs() > 1e-6
        assert not moved[..., sae.since_fired > 0].any() and moved[..., sae.since_fired == 0].any()

def test_atoms_stay_unit_and_training_reduces_the_error():
    sae, x = small_sae(k=4), vectors_of(256)
    before = sae.loss(x).item()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(60):
        train_sae.train_step({"": sae}, optimizer, {"": x})
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40), atol=1e-6, rtol=0)
    assert sae.loss(x).item() < 0.8 * before

# ---------------------------------------------------------------- 2. fidelity and the elbow
def test_fidelity_equals_numpy():
    """FVU is within heads: the difference of their means is no variance."""
    x, x_hat = vectors_of(32), vectors_of(32, seed=3)
    a, b = x.numpy().astype(float), x_hat.numpy().astype(float)
    norm_a, norm_b = np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=2)
    within = sum(((a[:, h] - a[:, h].mean(0)) ** 2).sum() for h in range(2))
    expected = {"fvu": ((a - b) ** 2).sum() / within,
                "cos": ((a * b).sum(2) / norm_a / norm_b).mean(),
                "cos_centred": np.mean([np.dot(u, v) / np.linalg.norm(u) / np.linalg.norm(v)
                                        for u, v in zip((a - a.mean(0)).reshape(-1, 16),
                                                        (b - a.mean(0)).reshape(-1, 16))])}
    found = sta.fidelity(x.view(4, 8, 2, 16), x_hat.view(4, 8, 2, 16))
    assert found == pytest.approx(expected, abs=1e-9)

def test_curve_and_elbow():
    sae, x = small_sae(), vectors_of(100)
    points = sta.budget_curve(sae, x, [0, 1, 64])  # and k = 8, 2k; of 64, there are only 40
    assert [p["k"] for p in points] == [0, 1, 8, 16, 40]
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
    for n in (1, 7, 31):
        assert math.isnan(sta.elbow([*kinked[:n], {"k": n, "fvu": math.nan}, *kinked[n + 1:]], 31))

# ---------------------------------------------------------------- 3. the dual budget
def test_dual_budget_stores_fp16_and_int16_and_decodes_to_that():
    saes, k, v = [small_sae(seed=s) for s in (1, 2)], vectors_of(15), vectors_of(15, seed=1)
    codec = sta.DualBudget(*saes, sta.Budget(3, 5))
    stored = codec.encode(k.view(5, 3, 2, 16), v.view(5, 3, 2, 16))  # (B, T, H, D)
    assert [x.shape for x in stored] == [(5, 3, 6), (5, 3, 6), (5, 3, 10), (5, 3, 10)]
    assert sum(x.nbytes for x in stored) == 15 * 2 * 4 * (3 + 5)  # METHOD: 4 k bytes per vector
    for x, sae, n, found in zip((k, v), saes, (3, 5), codec.decode(stored)):
        z, idx = sae.encode(x, n)
        expected = sae.decode(z.half().float(), idx)
        torch.testing.assert_close(found, expected.view(5, 3, 2, 16), atol=1e-6, rtol=1e-6)

def test_a_dictionary_that_int16_cannot_index():
    saes = [sta.TopKSAE(1, 4, 1 << 15 | late, 2) for late in (0, 1)]
    x = torch.zeros(3, 1, 4)
    assert len(sta.DualBudget(saes[0], saes[0]).encode(x, x)) == 4
    for pair in (saes, saes[::-1]):
        with pytest.raises(sta.UsageError, match="n_latents = 32769: an int16 index names at most"):
            sta.DualBudget(*pair, sta.Budget(1, 1)).encode(x, x)

# ---------------------------------------------------------------- 4. in the model
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_neox", "phi3"]

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

def test_codecs_get_which_tokens_are_live():
    """Neither sinks nor padding on either side; with a cache, the new tokens' part."""
    model, lives = small_model("llama"), []
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with sta.reconstruct(model, {0: recorder(lives)}):
        cache = model(tokens_of(2, 6), attention_mask=mask).past_key_values
        model(tokens_of(2, 1), attention_mask=torch.cat([mask, torch.ones(2, 1).long()], 1),
              past_key_values=cache)
        model(tokens_of(2, 1), past_key_values=cache)
    assert lives == [[[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]], [[1], [1]], [[1], [1]]]

def test_live_tokens_are_the_same_with_any_cache():
    """A static cache brings a 4D mask, and a length that its first update changes under way."""
    model, ids, both = small_model("llama"), tokens_of(2, 9), []
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()  # four of padding
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cache in ({}, {"cache_implementation": "static"}):
        lives = {0: [], 1: []}
        codecs = {layer: across(lambda keys, values, live, lives=lives[layer]: lives.append(
            live.tolist()) or (keys * 0.9, values)) for layer in lives}
        with sta.reconstruct(model, codecs, sink=7):  # the first row's seventh comes in decode
            text = model.generate(ids, attention_mask=mask, **greedy, **cache)
        both.append((text.tolist(), lives))
        assert lives[0] == lives[1] and lives[0][0] == [[False] * 9, [False] * 7 + [True] * 2]
        assert [live[0][0] for live in lives[0][1:]] == [False, False, True]
    assert both[0] == both[1]

def test_packed_texts_have_a_sink_each():
    model, lives, positions = small_model("llama"), [], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with sta.reconstruct(model, {0: recorder(lives)}, sink=2):
        model(tokens_of(1, 7), position_ids=positions)
    assert lives == [[[0, 0, 1, 1, 0, 0, 1]]]

def test_a_window_narrower_than_the_sinks():
    lives = []
    window = torch.ones(7, 7).tril().triu(-1).bool()[None, None]  # each token sees itself and one
    for mask in (window, {"sliding_attention": window, "full_attention": None}):
        arguments = {"input_ids": tokens_of(1, 7), "attention_mask": mask,
                     "position_ids": torch.arange(7)[None]}
        lives.append(sta.live_tokens(arguments, 4).int().tolist())
    assert lives == [[[0, 0, 0, 0, 1, 1, 1]]] * 2

@pytest.mark.parametrize("mask", [torch.ones(2, 9, 9), torch.ones(9), torch.ones(2, 3),
                                  torch.ones(2, 1, 9, 9)])  # 4D without position_ids
def test_a_mask_that_cannot_be_read(mask):
    with pytest.raises(sta.UsageError, match="attention_mask .* want .batch, tokens., or"):
        sta.live_tokens({"input_ids": tokens_of(2, 9), "attention_mask": mask}, 1)

def test_harvest_keeps_the_order_and_wants_finite_numbers():
    model, ids = small_model("llama"), tokens_of(70, 64)  # more tokens than a batch's 4,096
    alone = torch.cat([sta.harvest(model, window[None], [1])[1, "value"] for window in ids])
    torch.testing.assert_close(sta.harvest(model, ids, [1])[1, "value"], alone)
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(sta.UsageError, match="layer 1: a value is not finite; use --dtype"):
        sta.harvest(model, ids, [0, 1])

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

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_captured_is_what_the_model_computes_with(family, grad):
    """Decoded keys beside decoded values: in either order, and in `harvest`, which captures."""
    model, ids = small_model(family), tokens_of(2, 9)
    codecs = {1: across(lambda keys, values, live: (0 * keys + 2, 0 * values + 3))}
    with torch.set_grad_enabled(grad):
        with sta.capture(model, [1]) as before, sta.reconstruct(model, codecs, 0), \
                sta.capture(model, [1]) as after:
            cache = model(ids, use_cache=True).past_key_values.layers[1]
            both = sta.harvest(model, ids, [1])
    for vectors in (before, after, both):
        assert (vectors[1, "key"] == 2).all() and (vectors[1, "value"] == 3).all()
    assert (cache.values == 3).all()

def test_absent_layer():
    with pytest.raises(sta.UsageError, match="layer 5: the model has layers 0 to 1"):
        with sta.reconstruct(small_model("llama"), {5: recorder([])}):
            pass

def test_hooks_that_never_fire_raise():
    """Of a model that was compiled, and run, before; and of one that was not called at all."""
    model, ids, codecs = small_model("llama"), tokens_of(1, 5), {1: recorder([])}
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
        with pytest.raises(sta.UsageError, match="layer 1: keys or values were not captured"):
            with sta.reconstruct(model, codecs):
                model(ids)
    with sta.reconstruct(model, {}):
        pass  # nothing to see

def test_sta_needs_no_other_file_of_ours(tmp_path):
    """An SAE, a codec and `reconstruct` in a folder that holds sta.py alone."""
    shutil.copy(ROOT / "sta.py", tmp_path)
    program = """
import torch, transformers, sta
config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(12)[None]
vectors = sta.harvest(model, ids, [1])
key_sae, value_sae = (sta.TopKSAE(2, 8, 16, k=4) for _ in sta.KINDS)
for kind, sae in zip(sta.KINDS, (key_sae, value_sae)):
    sae.centre(vectors[1, kind])
codec = sta.DualBudget(key_sae, value_sae, sta.Budget(2, 4))
with torch.no_grad(), sta.reconstruct(model, {1: codec}):
    print(model(ids).logits.shape)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, encoding="utf-8",
                            capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.stdout.endswith("[1, 12, 99])\n"), result.stderr

# ---------------------------------------------------------------- 5. the fast path
@pytest.mark.parametrize("k,learned", [(1, "xWb"), (5, "xWb"), (40, "xWb"), (5, "b"), (5, "x")])
def test_top_k_of_matmul_is_what_its_docstring_says(k, learned):
    """Values and gradients of the plain expression, in float64, to x as well."""
    results = []
    for function in (sta.top_k_of_matmul, lambda x, W, b, k: (x @ W + b).topk(k)):
        x, W, b = vectors_of(30).double(), rows_of(16, 40).double(), rows_of(1, 40)[0].double()
        for name, tensor in zip("xWb", (x, W, b)):
            tensor.requires_grad_(name in learned)
        z, idx = function(x, W, b, k)
        (z * rows_of(60, k, seed=1).view(30, 2, k)).sum().backward()
        results.append([x for x in (z, idx, x.grad, W.grad, b.grad) if x is not None])
    assert len(results[0]) == len(results[1]) == 2 + len(learned)
    for fast, plain in zip(*results):
        torch.testing.assert_close(fast, plain, atol=1e-9, rtol=0)

def check_fuse(device):
    """Values, over layers, budgets and numbers of rows; few graphs serve them all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for budget in ((8, 16), (3, 5)):
        saes = [small_sae(seed=seed).to(device) for seed in range(24)]
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

# ---------------------------------------------------------------- the scripts, on tiny
SHORT = ["--tokens", 16_384, "--n-latents", 64, "--batch-tokens", 256, "--layer", "1-2"]

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short run over two layers of tiny, uninterrupted; made once for all files of tests."""
    out = tmp_path_factory.getbasetemp() / "trained"
    if out.exists():
        return out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sae, "BUFFER_TOKENS", 2048)
        assert script(train_sae, *SHORT, "--out", out) == 0
    assert not (out / "tiny" / "unfinished.safetensors").exists()
    norms = load_sae(out / "tiny" / "layer1.key")[0].W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(64), atol=1e-5, rtol=0)
    assert read_json(out / "tiny" / "run-1-2.json")["log"][-1]["fvu"]["key"] < 0.8
    return out

def run_script(statement, *argv):
    """train_sae.py in a process of its own, after a statement."""
    code = f"import train_sae; train_sae.BUFFER_TOKENS = 2048; {statement}; " \
           "train_sae.run_main(train_sae.main)"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})

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

@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory):
    """The short run's results; made once for all files of tests."""
    out = tmp_path_factory.getbasetemp() / "evaluated"
    if not out.exists():
        assert script(evaluate, "--saes", trained, "--max-tokens", 2048, "--limit", 20,
                      "--out", out) == 0
    return out

def test_evaluation_table(evaluated):
    result = read_json(evaluated / "tiny.json")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "means", "keys", "values", "dual", "uniform", "reverse"]
    assert result["layers"] == [1, 2] and result["n_layers"] == 6 and result["tokens"] == 2048
    dual, dense = rows["dual"], rows["dense"]
    assert [(rows[name]["k_key"], rows[name]["k_val"]) for name in (
        "dense", "dual", "uniform", "reverse")] == [(None, None), (8, 16), (12, 12), (16, 8)]
    assert dense["bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    assert dual["bytes_share"] == pytest.approx((4 + 2 * 0.1875) / 6)
    assert len({round(row["perplexity"], 6) for row in rows.values()}) == 7
    assert rows["means"]["bytes_share"] == pytest.approx(4 / 6)  # four layers are not coded
    assert rows["means"]["fvu_val"] == pytest.approx(1, abs=0.1)
    assert dual["delta_ce"] == pytest.approx(math.log(dual["perplexity"] / dense["perplexity"]))
    assert dual["fvu_key"] == rows["keys"]["fvu_key"] == pytest.approx(
        np.mean([layer["fvu_key"] for layer in dual["by_layer"].values()]))
    assert rows["keys"]["fvu_val"] == 0 and rows["keys"]["cos_val"] == pytest.approx(1)
    assert rows["keys"]["bytes_share"] == pytest.approx((4 + 2 * (0.125 + 1) / 2) / 6)
    assert rows["values"]["bytes_share"] == pytest.approx((4 + 2 * (0.25 + 1) / 2) / 6)
    assert dual["once_bytes"] == 4 * (2 * 64 * 128 + 64 + 2 * 128) * 4  # of four SAEs, float32
    saved = dense["bytes_per_token"] - dual["bytes_per_token"]
    assert np.mean(dual["window_ce"]) == pytest.approx(dual["ce"], abs=1e-6)
    assert dual["break_even_tokens"] == dual["once_bytes"] // saved

def test_perplexity_is_that_of_hugging_face(evaluated):
    """The dense row against transformers' own labels= loss on windows cut here."""
    rows = read_json(evaluated / "tiny.json")["rows"]
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny").float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny")
    text = (ROOT / "tiny" / "valid.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [model(input_ids=w, labels=w).loss.item() for w in ids[:, :2048].split(256, dim=1)]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)

def test_paired_comparison():
    dense, noise = rows_of(200, 1)[:, 0].double(), rows_of(200, 1, seed=1)[:, 0].double()
    row = evaluate.compare(dense + 0.01 * noise, dense)
    stderr = 0.01 * noise.view(25, 8).mean(1).numpy().std(ddof=1) / np.sqrt(25)  # blocks of eight
    assert row["delta_ce_stderr"] == pytest.approx(stderr)
    half = evaluate.margin(stderr, 25)  # 2.07 of them, by Student's t
    assert half == pytest.approx(2.064 * stderr, rel=0.005)
    assert np.log(row["ratio_ci95"]) == pytest.approx(
        [row["delta_ce"] - half, row["delta_ce"] + half])

def in_readme(words):
    """The block of Python in README.md that has these words."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    return next(block for block in blocks if words in block)

def test_the_readme_quotes_the_program():
    program = (ROOT / "sta.py").read_text(encoding="utf-8")
    quoted = in_readme("def encode(self, x, k)").splitlines()
    assert len(quoted) >= 8
    for line in filter(None, quoted):
        assert line.strip() in program

def test_your_own_codec_has_its_row(trained, tmp_path, monkeypatch, capsys):
    """The README's ten lines, as printed: a byte per number costs next to nothing."""
    shutil.copytree(trained, tmp_path / "saes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "mine.py"])
    exec(in_readme("class Int8").replace('"dual",', '"dual", "--max-tokens", "1024",'), {})
    dense, dual_row, own = read_json(tmp_path / "results" / "int8" / "tiny.json")["rows"]
    assert (dual_row["name"], own["name"]) == ("dual", "Int8")
    layers, (H, D) = 2, (2, 128)  # the others stay in bf16
    assert own["bytes_per_token"] == layers * 2 * H * (D + 2) + 4 * 4 * H * D
    assert abs(own["delta_ce"]) < 0.01 < dual_row["delta_ce"]

def test_the_readmes_repl_prints_what_it_says(tmp_path, monkeypatch, capsys):
    """With SAEs of the quick start's settings: shapes are equal, figures close."""
    assert script(train_sae, "--layer", "2", "--out", tmp_path / "saes") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(in_readme("import torch, sta"), {})
    numbers = re.compile(r"\d+\.?\d*")
    printed = capsys.readouterr().out.splitlines()
    promised = [line.split("#")[1] for line in in_readme("import torch, sta").splitlines()
                if line.startswith("print")]
    assert len(promised) == 4 and printed[4].startswith("The President of the United")
    for there, here in zip(promised, printed):
        there, here = numbers.findall(there), numbers.findall(here)
        assert [x for x in here if "." not in x] == [x for x in there if "." not in x]
        figures = [float(x) for x in there if "." in x]
        # coefficients differ from seed to seed
        close = {"rel": 0.6, "abs": 1} if len(figures) == 8 else {"rel": 0.02}
        assert [float(x) for x in here if "." in x] == pytest.approx(figures, **close)
