"""Tests of beyond/, a section per file. They share test_sta.py's small models and its short run.

    python -m pytest -q
"""
import argparse
import itertools
import json
import math
import os
import re
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import numpy as np
import pytest
import torch

import evaluate
import plots
import sta
import train_sae
from beyond import (additive, atoms, benchmark, cache, calibrate, capture_queries, claims, meaning,
                    report, rivals, s3, variants)
from test_sta import (FAMILIES, SHORT, across, assert_one_line, dual, evaluated, read_json,
                      rows_of, script, small_model, small_sae, small_saes, through, tokens_of,
                      trained, vectors_of)
from support.files import ROOT, load_sae, load_saes, save_sae, write_atomic
from support.models import load_model
from support.text import read_text, token_windows

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values")  # its name before 5.24

# ---------------------------------------------------------------- cache.py
CACHED = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])

class Exact:
    """A codec that loses nothing; it has no SAE, nor atoms."""
    def encode(self, keys, values):
        return (torch.cat([keys, values], -1).flatten(-2),)

    def decode(self, stored):
        return stored[0].unflatten(-1, (-1, 32)).chunk(2, -1)

EXACT = {0: Exact(), 1: Exact()}

def padded(batch=3, length=9):
    ids, mask = tokens_of(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row, n in enumerate((0, 4, 2)):
        ids[row, :n], mask[row, :n] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}

def generate_with_and_without(model, sink, recent, n_new, **how):
    """Asserts that a cache that loses nothing leads to the same tokens; returns it."""
    how = {"do_sample": False, "max_new_tokens": n_new, "eos_token_id": None, "pad_token_id": 0,
           **how}
    torch.manual_seed(0)
    dense = model.generate(**padded(), **how)
    torch.manual_seed(0)
    with cache.compress(model, EXACT, sink, recent) as kept:
        assert model.generate(**padded(), past_key_values=kept, **how).tolist() == dense.tolist()
    return kept

@CACHED
@pytest.mark.parametrize("recent", [3, 300])
def test_cache_that_loses_nothing_generates_the_same(family, recent):
    model = small_model(family, max_position_embeddings=256)
    kept = generate_with_and_without(model, 4, recent, 200)
    assert kept.get_seq_length() == 208 and len(kept.layers) == 2

@CACHED
def test_cache_with_eager_attention_a_sliding_window_and_bf16(family):
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    model = small_model(family, max_position_embeddings=256,
                        **({} if family == "llama" else window))
    model.set_attn_implementation("eager")
    generate_with_and_without(model, 2, 3, 60)
    with cache.compress(model.bfloat16(), EXACT, 2, 3) as kept:
        model.generate(**padded(), past_key_values=kept, max_new_tokens=9, pad_token_id=0)
    assert kept.layers[0].exact[0].dtype == torch.bfloat16

@pytest.mark.parametrize("how", [{"num_beams": 4}, {"do_sample": True, "top_k": 0},
                                 {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_and_sampling(how):
    model = small_model("llama", max_position_embeddings=128)
    generate_with_and_without(model, 2, 5, 40, **how)

@CACHED
def test_cache_computes_what_the_hooks_do(family):
    """recent = 0: token by token, in chunks or at once, and however much is kept decoded, these are
    the logits of `reconstruct`."""
    model, inputs = small_model(family), padded(length=20)
    ids, mask = inputs.values()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    codecs, saes = dual(small_saes(model), 4, 6), small_saes(model)
    for sae in saes.values():
        sae.largest_z = 4.0
    row, = variants.packed_rows(saes, ["dual"], [evaluate.Row("dual", codecs)])
    codecs = {0: codecs[0], 1: row.codecs[1]}  # one layer's in words
    with sta.reconstruct(model, codecs, sink=1):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for step, keep in ((1, 0), (7, 0), (20, 0), (1, 5), (1, 100), (7, 9), (7, 100)):
        with cache.compress(model, codecs, 1, 0, keep) as kept:
            logits = torch.cat([model(ids[:, i:i + step], attention_mask=mask[:, :i + step],
                                      position_ids=positions[:, i:i + step],
                                      past_key_values=kept).logits
                                for i in range(0, 20, step)], 1)
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)

def test_recent_is_a_sliding_window():
    """A token is exact while fewer than `recent` are newer; bytes are those of both kinds."""
    model, ids = small_model("llama"), tokens_of(1, 12)
    codecs = dual(small_saes(model), 2, 3)
    with cache.compress(model, codecs, sink=1, recent=4) as kept:
        for i in range(12):
            model(ids[:, i:i + 1], past_key_values=kept)
            assert kept.layers[1].exact[0].shape[1] == min(4, i + 1)
            assert kept.layers[1].n_codes() == max(0, i + 1 - 4)
    coded, exact = 2 * 4 * (2 + 3), 2 * 2 * 16 * 4  # of two heads: atoms; K and V in float32
    positions = 12 * (4 + 1)  # and whether it is a sink, once
    assert cache.cache_bytes(kept) == 2 * (8 * coded + (4 + 1) * exact) + positions
    with sta.capture(model, [0]) as vectors, cache.compress(model, codecs, 1, 4) as at_once:
        model(ids, past_key_values=at_once)
    layer = at_once.layers[0]
    torch.testing.assert_close(layer.exact[1], vectors[0, "value"][:, -4:])
    z, _ = codecs[0].value_sae.encode(vectors[0, "value"][:, :8], 3)
    torch.testing.assert_close(layer.codes[2], z.half().flatten(-2))

@pytest.mark.parametrize("keep", [0, 7, 1000])
def test_reorder_crop_and_growth_at_random(keep):
    """recent = 0: after any of them the logits are those of a new cache that read what is left."""
    model, generator = small_model("llama", max_position_embeddings=256), np.random.default_rng(0)
    codecs, ids = dual(small_saes(model), 3, 5), tokens_of(3, 1)
    with cache.compress(model, codecs, 1, 0, keep) as kept:
        model(ids, past_key_values=kept)
        for turn in range(30):
            what = generator.integers(3)
            if what == 0:
                rows = torch.tensor(generator.integers(0, 3, 3))
                kept.reorder_cache(rows)
                ids = ids[rows]
            elif what == 1 and ids.shape[1] > 6:
                n = int(generator.integers(1, 5))
                kept.crop(-n)
                ids = ids[:, :-n]
            new = tokens_of(3, int(generator.integers(1, 6)), seed=turn)
            ids = torch.cat([ids, new], 1)
            logits = model(new, past_key_values=kept).logits
            assert kept.get_seq_length() == ids.shape[1]
            assert kept.layers[0].slots[0].shape == (3, ids.shape[1])
        n_bytes = cache.cache_bytes(kept)
        kept.reset()
        assert cache.cache_bytes(kept) == 0 and kept.get_seq_length() == 0
        expected = model(ids, past_key_values=kept).logits
        torch.testing.assert_close(logits, expected[:, -logits.shape[1]:], atol=1e-4, rtol=0)
        assert cache.cache_bytes(kept) == n_bytes

@pytest.mark.parametrize("keep,decoded", [(0, [36, 37, 38]), (20, [36, 17, 38]),
                                          (100, [36, 1, 38])])
def test_what_is_kept_decoded_is_not_decoded_again_and_can_be_given_back(keep, decoded):
    class Counting(Exact):
        def decode(self, stored):
            counts.append(stored[0].shape[1])
            return super().decode(stored)

    model, counts = small_model("llama"), []
    with cache.compress(model, {0: Counting()}, sink=1, recent=4, keep=keep) as kept:
        model(tokens_of(1, 40), past_key_values=kept)
        model(tokens_of(1, 1), past_key_values=kept)
        before = cache.cache_bytes(kept)
        kept.forget_decoded()
        assert before - cache.cache_bytes(kept) == 2 * 2 * 16 * 4 * min(keep, 37)  # K and V
        model(tokens_of(1, 1), past_key_values=kept)
        assert counts == decoded and cache.cache_bytes(kept) >= before

def test_cache_refuses_what_it_would_get_wrong():
    model = small_model("llama")
    for other, codecs, message in (
            (small_model("phi3"), EXACT, "cache of codes takes llama, .* this is phi3"),
            (model, {5: Exact()}, "layer 5: the model has layers 0 to 1")):
        with pytest.raises(sta.UsageError, match=message), cache.compress(other, codecs):
            pass
    with pytest.raises(sta.UsageError, match="cache of codes takes llama"):  # before any row
        cache.rows(small_model("gpt_neox"), None, {}, None, [])
    with cache.compress(model, EXACT) as kept:
        with pytest.raises(sta.UsageError, match="give the model .*=the cache"):
            model(tokens_of(1, 3))
    with pytest.raises(sta.UsageError, match="only inside `with compress"):
        model(tokens_of(1, 3), past_key_values=kept)
    with cache.compress(model, EXACT) as kept:
        model(tokens_of(1, 3), past_key_values=kept)
        with pytest.raises(ValueError, match=r"crop\(2\): want minus the number of tokens"):
            kept.crop(2)
        with pytest.raises(sta.UsageError, match="one text per row; these are packed"):
            model(tokens_of(1, 3), past_key_values=kept, position_ids=torch.tensor([[0, 1, 2]]))

def test_row_through_the_cache(trained, tmp_path, monkeypatch):
    """recent = 0: the losses and accuracies of the hooks; bytes are those of what is kept."""
    monkeypatch.setattr(cache, "through_cache", lambda model, row, sink, old=cache.through_cache:
                        old(model, row, sink, recent=0, chunk=100))
    assert script(evaluate, "--saes", trained, "--max-tokens", 512, "--limit", 8, "--rows", "cache",
                  "--out", tmp_path) == 0
    rows = {r["name"]: r for r in read_json(tmp_path / "tiny.json")["rows"]}
    assert rows["cache"]["ce"] == pytest.approx(rows["dual"]["ce"], abs=1e-4)
    assert rows["cache"]["tasks"]["cloze"]["acc"] == rows["dual"]["tasks"]["cloze"]["acc"]
    a_token = 5 + 2 * 2 * 96 + 4 * 2 * 2 * 128 * 4  # position; two coded layers; four in float32
    sinks = 2 * 2 * 2 * 128 * 4 / 256  # K and V in two layers, for each window of 256
    assert rows["cache"]["bytes_per_token"] == a_token + sinks
    assert rows["cache"]["break_even_tokens"] is None  # float32 layers are larger than bf16

def test_token_times_and_bytes(trained, tmp_path, capsys):
    argv = ["--saes", trained, "--contexts", "40,150", "--out", tmp_path]
    assert script(cache, *argv) == 0
    costs = read_json(tmp_path / "tiny-cache.json")["caches"]
    assert [(x["name"], x["context"], x["keep"]) for x in costs] == [
        (name, context, keep) for context in (40, 150)
        for name, keep in (("dense", False), ("dual", False), ("dual", True))]
    assert all(0 < x["token_ms"] < 1000 for x in costs)
    dense, codes, both = [x["bytes"] for x in costs[3:]]
    assert codes < dense < both
    capsys.readouterr()
    for bad, message in ((["--recent", "-1"], "--recent -1: want 0 or more"),
                         (["--saes", "nowhere"], "nowhere: no SAEs of any model; first run")):
        assert script(cache, *argv, *bad) == 2
        assert_one_line(capsys.readouterr().err, message)

# ---------------------------------------------------------------- calibrate.py
@pytest.fixture(scope="session")
def calibrated(tmp_path_factory):
    """A folder with the calibration of tiny."""
    out = tmp_path_factory.mktemp("calibrated")
    assert script(calibrate, "--tokens", 8704, "--out", out) == 0
    return out

@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3"])
def test_gradients_are_those_of_the_loss(family):
    """g of the last token alone, as the others are sinks: differences of the loss itself."""
    model, ids = small_model(family), tokens_of(1, 6)
    drawn = calibrate.draw(model(ids).logits[0], torch.Generator().manual_seed(0))
    H, D = sta.kv_shape(model.config)

    def loss(step):
        change = across(lambda *x_and_live: tuple(
            x + x_and_live[2][..., None, None] * part.view(H, D)
            for x, part in zip(x_and_live, step.chunk(2))))
        with sta.reconstruct(model, {1: change}, sink=5):
            logits = model(ids).logits[0].double()
        return torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").item()

    g = torch.tensor([(loss(step) - loss(-step)) / 0.1 for step in 0.05 * torch.eye(2 * H * D)])
    mean, _, G = calibrate.statistics(model, ids, [0, 1], 5)[1]
    torch.testing.assert_close(G.float(), g.outer(g), rtol=0.02,
                               atol=2e-3 * g.square().max().item())
    rows = sta.harvest(model, ids, [1], 5)
    torch.testing.assert_close(mean.float(), torch.cat(
        [rows[1, kind].flatten() for kind in sta.KINDS]), atol=1e-5, rtol=0)

class Quantised(torch.nn.Module):
    """A layer whose output autograd protects: a view made in a Function, as that of bitsandbytes'
    8 bits, or for a leaf that wants a gradient, as that of its 4 bits."""
    def __init__(self, linear, leaf):
        super().__init__()
        self.linear, self.leaf = linear, leaf

    def forward(self, x):
        if not x.requires_grad and self.leaf:
            return self.linear(x).detach().requires_grad_()
        return self.Multiply.apply(x, self.linear.weight)

    class Multiply(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return (x.flatten(0, -2) @ weight.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, g):
            return g @ ctx.saved_tensors[0], None

@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_through_quantised_layers(leaf):
    model, ids = small_model("llama"), tokens_of(2, 9)
    expected = calibrate.statistics(model, ids, [0, 1])
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name), leaf))
    for layer, parts in calibrate.statistics(model, ids, [0, 1]).items():
        torch.testing.assert_close(parts, expected[layer], atol=1e-5, rtol=1e-3)
    model.lm_head.forward = lambda x: x.detach() @ model.lm_head.weight.T
    with pytest.raises(sta.UsageError, match="no gradient passes through this model's layers"):
        calibrate.statistics(model, ids, [0])

def test_drawn_tokens_follow_the_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = calibrate.draw(p.log().expand(20_000, -1), torch.Generator().manual_seed(0))
    assert (drawn.bincount(minlength=4) / 20_000).tolist() == pytest.approx(p.tolist(), abs=0.02)

def test_calibration_is_of_the_text(calibrated, capsys):
    """Mean and covariance against numpy; the metric is a fixed mix that has an inverse."""
    model, _, _ = load_model("tiny")
    folder = calibrated / "tiny" / "calibration"
    windows = calibrate.safetensors.torch.load_file(folder / "windows.safetensors")["ids"]
    rows = sta.harvest(model, windows, [4])
    x = np.concatenate([rows[4, kind].flatten(1).double().numpy() for kind in sta.KINDS], 1)
    fitted = {name: tensor.double().numpy() for name, tensor in calibrate.read_fitted(
        folder, model, 4).items()}
    assert fitted["mean"] == pytest.approx(x.mean(0), abs=1e-5)
    assert fitted["covariance"] == pytest.approx(np.cov(x.T, ddof=0), abs=1e-3)
    G = torch.tensor([[4.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 8, 1], [0, 0, 1, 0]]).double()
    expected = 0.45 * G + 0.05 * torch.tensor([3.0, 3, 4, 4]).double().diag()
    torch.testing.assert_close(calibrate.metric(G), expected)
    assert np.linalg.eigvalsh(fitted["metric"]).min() > 0
    assert script(calibrate, "--tokens", 4096, "--out", calibrated) == 2
    assert_one_line(capsys.readouterr().err, "calibration was trained with text_sha256 = ")

def test_covariance_of_a_small_spread_about_a_large_mean(monkeypatch):
    """In float32 x^2 would lose a spread of one about a mean of ten thousand."""
    model, ids = small_model("llama"), tokens_of(6, 40)
    plain = calibrate.statistics(model, ids, [1])[1][1]
    monkeypatch.setattr(calibrate, "side_by_side", lambda keys, values: 1e4 + torch.cat(
        [keys.flatten(-2), values.flatten(-2)], -1))
    shifted = calibrate.statistics(model, ids, [1])[1][1]
    torch.testing.assert_close(shifted, plain, atol=1e-3 * plain.max().item(), rtol=0.05)

def test_a_text_of_which_the_model_writes_a_share(tmp_path, capsys):
    model, tokenizer, _ = load_model("tiny")
    text = token_windows(read_text(None, "train", "tiny"), tokenizer, model, 64, 256, 640)
    torch.manual_seed(0)
    windows, chosen = calibrate.continued(model, text, 0.3)
    assert chosen.nonzero()[:, 0].tolist() == [1, 5, 8]
    torch.testing.assert_close(windows[~chosen], text[~chosen])
    torch.testing.assert_close(windows[:, :32], text[:, :32])
    assert not any(torch.equal(a, b) for a, b in zip(windows[chosen], text[chosen]))
    assert windows.max() < tokenizer.n_known
    run = ["--tokens", 640, "--seq-len", 64, "--own", 0.3, "--write"]
    for name in ("a.txt", "b.txt"):
        assert script(calibrate, *run, tmp_path / name) == 0
    assert "640 tokens in 10 pieces, of which the model continued 3" in capsys.readouterr().out
    written = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert written == (tmp_path / "b.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(text[0]) + "\n\n" + tokenizer.decode(windows[1]) in written
    for bad, message in (([*run, tmp_path, "--own", 1.5], "--own 1.5: want a share"),
                         (["--own", 0.5], "--own 0.5: want .*, and --write"),
                         ([*run, tmp_path / "c", "--seq-len", 32], "--seq-len 32: want more than"),
                         (["--seed", 2 ** 70], "--seed 11805.*: want 0 or more, up to 1,099,"),
                         (["--tokens", 1], "--tokens 1: want 2 or more")):
        assert script(calibrate, *bad) == 2
        assert_one_line(capsys.readouterr().err, message)

# ---------------------------------------------------------------- rivals.py
@pytest.mark.parametrize("bits", [2, 4])
def test_quantise_against_a_loop(bits):
    x = rows_of(2 * 70 * 3, 64).view(2, 70, 3, 64) * torch.logspace(-1, 1, 64)
    live = torch.ones(2, 70, dtype=torch.bool)
    live[:, 0] = live[1, 50:] = False  # a sink; padding
    quantised = {kind: rivals.quantise(x, live, kind, bits, 32) for kind in sta.KINDS}
    for b, t, h, d in [(0, 5, 0, 0), (0, 69, 2, 63), (1, 1, 1, 40), (1, 49, 2, 7)]:
        start = t - t % 32
        tokens = [s for s in range(start, min(70, start + 32)) if live[b, s]]
        groups = {"key": x[b, tokens, h, d],
                  "value": x[b, t, h, d - d % 32:d - d % 32 + 32]}
        for kind, group in groups.items():
            low = np.float32(np.float16(group.min().item()))
            step = np.float32(np.float16((group.max().item() - low) / (2 ** bits - 1)))
            level = min(max(round(float((x[b, t, h, d] - low) / step)), 0), 2 ** bits - 1)
            assert quantised[kind][b, t, h, d].item() == pytest.approx(low + level * step, abs=1e-4)
    other = torch.where(live[..., None, None], x, 1e6 * x)  # what is not live must not matter
    torch.testing.assert_close(rivals.quantise(other, live, "key", bits, 32)[live],
                               quantised["key"][live])
    codec = rivals.Grouped((3, 64), 2, 32)
    assert codec.bytes_per_token == 0.1875 * 2 * 3 * 64 * 2  # 3 bits per number
    one, live = x[:, 5:6], live[:, 5:6]  # a token alone: a group without spread
    torch.testing.assert_close(codec.roundtrip(one, one, live)[0], one, atol=0.01, rtol=1e-3)

def test_levels_are_lloyd_and_maxs_and_come_back_from_packed_bytes():
    """Against the published distortions [Max 1960] and a loop over numbers."""
    for bits, published in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        assert rivals.lloyd_max(bits)[1] == pytest.approx(published, rel=1e-3)
    bits, y = torch.tensor([0, 1, 3, 8, 5, 2]), rows_of(200, 6).view(40, 5, 6) / 3
    levels = rivals.Levels(bits)
    packed = levels.encode(y)
    assert packed.shape == (40, 5, 3) and packed.dtype == torch.uint8  # 19 bits
    y_hat = levels.decode(packed)
    for i, b in enumerate(bits.tolist()):
        table = rivals.lloyd_max(b)[0].numpy() if b else np.zeros(1)
        nearest = table[np.abs(y[..., i, None].numpy() - table).argmin(-1)]
        assert y_hat[..., i].numpy() == pytest.approx(nearest, abs=1e-6)

def test_rotated_against_numpy():
    k, v = rows_of(12).view(2, 3, 2, 16), rows_of(12, seed=1).view(2, 3, 2, 16)
    codec = rivals.Rotated(torch.ones(64), (2, 16), 3)
    stored = codec.encode(k, v)
    assert [(x.shape, x.dtype) for x in stored] == [
        ((2, 3, 4), torch.float16), ((2, 3, 4 * 6), torch.uint8)]
    turn, table = codec.turn.numpy(), rivals.lloyd_max(3)[0].numpy()
    assert turn @ turn.T == pytest.approx(np.eye(16), abs=1e-5)
    for x, x_hat in zip((k, v), codec.decode(stored)):
        x = x.numpy() - 1
        norm = np.float16(np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        y = x @ turn / norm * 4
        nearest = table[np.abs(y[..., None] - table).argmin(-1)]
        assert x_hat.numpy() == pytest.approx(nearest / 4 * norm @ turn.T + 1, abs=1e-4)

def test_transform_spends_bits_as_a_loop_would_and_leaves_what_it_says():
    variances = torch.tensor([[9.0, 1, 0.1], [4, 0.5, 1e-4]]).double()
    left = [1.0] + [rivals.lloyd_max(b)[1] for b in range(1, 9)]
    bits = [[0, 0, 0], [0, 0, 0]]
    for _ in range(11):  # the best bit, again and again
        _, a, b = max((variances[a, b].item() * (left[bits[a][b]] - left[bits[a][b] + 1]), a, b)
                      for a in range(2) for b in range(3))
        bits[a][b] += 1
    assert rivals.allocate(variances, 11).tolist() == bits
    x = rows_of(4000, 32).double() @ rows_of(32, 32, seed=1).double()
    x = x - x.mean(0)
    G = rows_of(32, 32, seed=2).double()
    metric, covariance = (G @ G.T + torch.eye(32)) / 4, x.T @ x / len(x)
    variances, W, inverse = calibrate.principal_axes(covariance, metric)
    y, e = x @ W, rows_of(5, 32, seed=3).double()
    torch.testing.assert_close(y.T @ y / len(x) / variances.sum(), variances.diag()
                               / variances.sum(), atol=1e-9, rtol=0)
    torch.testing.assert_close((e @ W).square().sum(-1), (e @ metric * e).sum(-1))
    torch.testing.assert_close(W @ inverse, torch.eye(32).double(), atol=1e-8, rtol=0)
    bits = rivals.allocate(variances, 96)
    codec = rivals.Transform((2, 8), torch.zeros(32), variances, W, inverse, bits)
    k, v = x.float().view(-1, 2, 2, 8).unbind(1)
    stored = codec.encode(k, v)
    assert stored[0].shape == (4000, 12) and stored[0].dtype == torch.uint8
    error = torch.stack(codec.decode(stored), 1).view(-1, 32).double() - x
    cost = ((error @ metric) * error).sum(-1).mean().item()
    expected = sum(variance * left[b] for variance, b in zip(variances.tolist(), bits.tolist()))
    assert cost == pytest.approx(expected, rel=0.15)  # these rows are only nearly Gaussian

def test_every_rival_has_its_row(calibrated, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rivals, "SHARES", (0.125, 0.25))
    run = ["--model", "tiny", "--saes", calibrated, "--max-tokens", 512, "--limit", 4, "--rows",
           "rivals", "--out", tmp_path]
    assert script(evaluate, *run) == 0
    result = read_json(tmp_path / "tiny.json")
    rows = {row["name"]: row for row in result["rows"]}
    steps = [f"transform 9.375{step}" for step in rivals.STEPS[:-1]]
    assert list(rows)[6:] == [*steps, "transform 12.5", "transform 25"] and result["curves"] == {}
    for name in steps:
        assert rows[name]["bytes_share"] == pytest.approx(0.09375, rel=0.01)
    assert rows[steps[0]]["fvu_val"] > 1.5 * rows[steps[1]]["fvu_val"]  # heads have much in common
    assert rows[steps[2]]["ce"] < rows[steps[1]]["ce"] < rows[steps[0]]["ce"]
    for name, share in (("grouped 2 bits", 0.1875), ("rotated 2 bits", 0.125 + 2 / 256),
                        ("transform 12.5", 0.125), ("transform 25", 0.25)):
        assert rows[name]["bytes_share"] == pytest.approx(share, rel=0.01), name
        assert rows[name]["settings"]["tokens"] == 8704
    assert rows["transform 12.5"]["ce"] < rows["rotated 2 bits"]["ce"]
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 0
    shutil.copytree(calibrated, tmp_path / "joint")
    assert script(rivals, "--model", "tiny", "--saes", tmp_path / "joint") == 0
    run[3] = tmp_path / "joint"
    assert script(evaluate, *run, "--only", "two passes") == 0
    _, *joint = read_json(tmp_path / "tiny.json")["rows"]
    assert [row["name"] for row in joint[-2:]] == ["joint 6.25, two passes",
                                                   "transform 6.25, two passes"]
    for row, other in zip(joint[::2], joint[1::2]):
        assert row["bytes_share"] == pytest.approx(other["bytes_share"], rel=0.05)
        assert row["kl"] < other["kl"] and row["once_bytes"] > other["once_bytes"]
    path = tmp_path / "joint" / "tiny" / "calibration" / "settings.json"  # calibrated anew
    write_atomic(path, json.dumps({**read_json(path), "tokens": 99}))
    assert script(evaluate, *run, "--only", "two passes") == 2
    assert_one_line(capsys.readouterr().err, "joint was trained with calibration = ")
    run[3] = calibrated / "tiny"  # the model's folder does, too; --layer says what is coded
    assert script(evaluate, *run, "--layer", 3, "--only", "rotated 2") == 0
    result = read_json(tmp_path / "tiny.json")
    assert list(result["rows"][1]["by_layer"]) == ["3"] and result["layers"] == [3]
    run[3] = tmp_path
    assert script(evaluate, *run) == 2
    assert_one_line(capsys.readouterr().err, "layer0.safetensors: missing .*beyond.calibrate")
    path = shutil.copytree(calibrated / "tiny", tmp_path / "tiny") / "calibration" / "layer3"
    path = path.with_suffix(".safetensors")
    write_atomic(path, calibrate.safetensors.torch.save(
        calibrate.safetensors.torch.load(path.read_bytes()), {"model_sha256": ""}))
    assert script(evaluate, *run) == 2
    assert_one_line(capsys.readouterr().err, "layer3.safetensors: of another model")

# ---------------------------------------------------------------- variants.py
def test_axes_across_layers(monkeypatch):
    """Enough bits bring back every layer's keys and values; fewer, most of them, where the layers
    have nearly the same; and the model computes with what comes back."""
    model, windows, (H, D) = small_model("llama"), tokens_of(40, 33), (2, 16)
    fitted = {layer: {"mean": mean.float(), "covariance": covariance.float(),
                      "metric": calibrate.metric(G).float()} for layer, (mean, covariance, G)
              in calibrate.statistics(model, windows, [0, 1]).items()}

    def learn(share):
        monkeypatch.setattr(rivals, "JOINT_SHARES", (share,))
        variances, axes = rivals.learn_joint_axes(model, windows, fitted)
        learned = {layer: {"axes": axes[layer], "variances": variances} for layer in axes}
        return rivals.joint_codec(fitted, learned, (H, D), share)

    x = sta.harvest(model, windows[:4], [0, 1], sink=0)
    keys, values = (torch.cat([x[layer, kind] for layer in (0, 1)], 1).view(4, 33, 2 * H, D)
                    for kind in sta.KINDS)
    codec = learn(0.5)
    for exact, decoded in zip((keys, values), codec.decode(codec.encode(keys, values))):
        for a, b in zip(exact.chunk(2, 2), decoded.chunk(2, 2)):  # of each layer
            assert sta.fidelity(a[:, 1:], b[:, 1:])["fvu"] < 1e-3
    stored, = learn(0.125).encode(keys, values)
    assert stored.shape == (4, 33, 2 * 2 * H * D * 2 // 8)  # an eighth of bf16's

    def code(keys, values):  # without the second layer's values
        return keys, torch.cat([values[:, :, :H], 0 * values[:, :, H:]], 2)

    only_zeros = {1: evaluate.OneKind("value", Given(torch.zeros_like), 0)}
    with sta.reconstruct(model, only_zeros, sink=1), torch.no_grad():
        expected = model(windows[:4]).logits
    with torch.no_grad(), rivals.two_passes(model, [0, 1], code, sink=1) as forward:
        torch.testing.assert_close(forward(windows[:4]), expected)

class Given:
    """A codec that makes of a vector what a function does."""
    def __init__(self, function):
        self.function = function

    def roundtrip(self, keys, values, live):
        return self.function(keys), self.function(values)

def coefficients_of(target, atoms):
    """Of least squares, without negative ones; then each, in turn, is given its best value."""
    z = np.maximum(np.linalg.lstsq(atoms.T, target)[0], 0)
    for j in range(len(z)):
        z[j] = 0
        z[j] = max(0, (target - z @ atoms) @ atoms[j] / (atoms[j] @ atoms[j]))
    return z

def test_search_against_least_squares():
    sae, x = small_sae().double(), vectors_of(5).double()
    atoms, (z, idx) = sae.W_dec.detach().numpy(), variants.pursue(sae, x, 4)
    targets = ((x - sae.b_dec) / sae.scale).detach().flatten(0, 1).numpy()
    for target, first, coefficients, chosen in zip(targets, sae.encode(x, 4)[1].flatten(0, 1),
                                                   z.flatten(0, 1), idx.flatten(0, 1)):
        picks = first.numpy()
        for _ in range(variants.ROUNDS):
            best = coefficients_of(target, atoms[picks])
            gain = atoms @ (target - best @ atoms[picks])
            gain[picks] += best
            picks = np.argsort(-gain)[:4]
        assert chosen.tolist() == picks.tolist()
        best = coefficients_of(target, atoms[picks])
        assert coefficients.tolist() == pytest.approx(best, abs=1e-4)
        assert coefficients.min() >= 0
    codec = variants.Searched(small_sae(), small_sae(), sta.Budget(4, 4))
    keys_hat, _ = codec.decode(codec.encode(x.float(), x.float()))
    torch.testing.assert_close(keys_hat, sae.decode(z, idx).float(), atol=0.01, rtol=0)

def test_atoms_that_are_nearly_alike_do_not_overflow():
    sae, x = small_sae(), 1e5 * vectors_of(50)
    with torch.no_grad():
        sae.scale.fill_(1)
        sae.W_dec[20:] = sae.W_dec[:20] + 1e-5 * torch.randn(20, 16)
        sae.renormalise()
    stored = variants.Searched(sae, sae, sta.Budget(16, 16)).encode(x, x)
    assert all(part.isfinite().all() for part in stored)

@pytest.fixture(scope="session")
def all_variants(trained, tmp_path_factory):
    """The short run's folder, with a stretch, and with the other variants beside it."""
    out = shutil.copytree(trained, tmp_path_factory.mktemp("variants") / "saes")
    assert script(calibrate, "--tokens", 4096, "--layer", "1-2", "--out", out) == 0
    for what in ("layer", "metric", "splits", "twin", "l1"):
        assert script(variants, "--what", what, *SHORT, "--out", out) == 0
    assert script(variants, "--what", "stretch", "--saes", out) == 0
    (out / "tiny" / "stretch" / "stopped early").mkdir()  # has no factors, and no row
    return out

def test_rows_of_the_variants(all_variants, tmp_path, capsys):
    assert script(evaluate, "--saes", all_variants, "--model", "tiny", "--max-tokens", 512,
                  "--limit", 4, "--rows", "variants", "--out", tmp_path) == 0
    result = read_json(tmp_path / "tiny.json")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[7:] == ["searched", *(
        f"layer SAE{name}{ending}"
        for name in ("", ", searched", ", metric", ", metric, searched",
                     ", metric, shared, searched") for ending in ("", ", packed")), *(
        f"{name}, trained for it{ending}" for name in ("uniform", "reverse")
        for ending in ("", variants.SEARCHED)), "untrained twin", "l1", "stretched", "packed",
        "searched, packed", "stretched, packed"]
    assert rows["searched"]["settings"]["rounds"] == variants.ROUNDS
    assert rows["searched"]["fvu_val"] < rows["dual"]["fvu_val"]
    assert rows["searched"]["bytes_per_token"] == rows["dual"]["bytes_per_token"] == rows[
        "layer SAE"]["bytes_per_token"] == 4 * 1024 + 2 * 192
    for name in ("packed", "searched, packed", "stretched, packed", "layer SAE, packed",
                 "layer SAE, metric, shared, searched, packed"):
        assert rows[name]["bytes_per_token"] == 4 * 1024 + 2 * 96, name
        assert abs(rows[name]["ce"] - rows[name.replace(", packed", "").replace(
            "packed", "dual")]["ce"]) < 0.02, name
    for name in ("fvu_key", "fvu_val"):
        assert rows["layer SAE, searched"][name] < rows["layer SAE"][name] < rows["dual"][name]
    assert {rows[name]["settings"]["n_latents"] for name in ("l1", "layer SAE")} == {64}
    assert rows["stretched"]["settings"]["stretch"]["text"] == "tiny/train.txt"
    run = ["--saes", all_variants, "--model", "tiny"]
    assert script(evaluate, *run, "--k-key", 4, "--rows", "variants", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, r"stretch/dual was trained with budget = .8, 16")
    assert script(variants, "--what", "stretch", *run, "--row", "dull") == 2
    assert_one_line(capsys.readouterr().err, "--row dull: want one of means, keys, values, dual")
    assert script(variants, "--what", "stretch", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "a stretch is written beside its SAEs, in --saes")
    assert script(evaluate, "--model", "tiny", "--saes", tmp_path, "--rows", "variants") == 2
    assert_one_line(capsys.readouterr().err, "--rows variants: needs SAEs")
    assert script(variants, *SHORT, "--k-val", 40, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "--n-latents 64: want 96 = n_kv_heads")
    assert script(variants, *SHORT, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "layer1.safetensors: missing .*beyond.calibrate")

def test_a_variant_that_lacks_a_layer_has_no_row(all_variants, tmp_path, capsys):
    saes = shutil.copytree(all_variants, tmp_path / "saes")
    shutil.rmtree(saes / "twin" / "tiny" / "layer2.key")
    assert script(evaluate, "--saes", saes, "--model", "tiny", "--max-tokens", 512, "--tasks", "",
                  "--rows", "variants", "--only", "twin", "--out", tmp_path) == 0
    assert "twin/tiny: not of all 2 layers, so it has no rows" in capsys.readouterr().out
    row, = read_json(tmp_path / "tiny.json")["rows"]
    assert row["name"] == "dense" and row["tasks"] == {}

@pytest.mark.parametrize("in_metric", [False, True])
def test_one_sae_per_layer(in_metric, tmp_path):
    """It sees lengths as the metric has them, or keys and values in units of their spread; what it
    decodes comes back from there; and atoms go to the layers where they help."""
    model, (keys, values) = small_model("llama"), torch.randn(2, 400, 2, 16)
    keys, values = 5 * keys, 0.1 * values
    flat, root = calibrate.side_by_side(keys, values), torch.randn(64, 64)
    fitted = {"mean": flat.mean(0), "covariance": flat.T.cov(correction=0),
              "metric": root @ root.T + torch.eye(64)}
    for layer in (0, 1):
        calibrate.write_fitted(tmp_path / "m" / "calibration", model, layer, fitted)
    variant = variants.PerLayer(in_metric)
    args = argparse.Namespace(out=tmp_path / "layer", model="m", k_key=8, k_val=16, n_latents=80)
    saes = {(layer, "layer"): variant.make_saes(model, layer, args, torch.Generator())["layer"]
            for layer in (0, 1)}
    sae, y = saes[0, "layer"], variant.vectors(0, keys, values)["layer"][:, 0]  # (400, P)
    errors = torch.randn(10, 64)
    lengths = (errors @ variant.spaces[0][1]).square().sum(-1)
    expected = ((errors @ fitted["metric"]) * errors).sum(-1) if in_metric else (
        errors[:, :32].square().sum(-1) / flat[:, :32].var(0, correction=0).mean()
        + errors[:, 32:].square().sum(-1) / flat[:, 32:].var(0, correction=0).mean())
    torch.testing.assert_close(lengths, expected, rtol=1e-3, atol=1e-3)
    for encode in (sta.TopKSAE.encode, variants.pursue):
        codec = variants.LayerBudget(sae, 48, (2, 16), variant.spaces[0], encode)
        stored = codec.encode(keys, values)
        assert sum(part[0].nbytes for part in stored) == 48 * 4
        decoded = calibrate.side_by_side(*codec.decode(stored)) - flat.mean(0)
        expected = sae.decode(*encode(sae, y[:, None], 48))[:, 0]
        torch.testing.assert_close(decoded @ variant.spaces[0][1], expected, atol=0.05, rtol=0.01)
    vectors = {(layer, kind): x for layer in (0, 1) for kind, x in zip(sta.KINDS, (keys, values))}
    vectors[1, "key"], vectors[1, "value"] = (fitted["mean"].view(2, 2, 16)[i].expand(400, 2, 16)
                                              for i in (0, 1))
    assert variants.share_atoms(saes, variant.spaces, vectors, 20) == {0: 16, 1: 4}

def test_words_of_sixteen_bits():
    """Against a loop: the nearest of 63 levels, eight octaves; and bytes come back bit by bit."""
    sae, other, x = small_sae(), small_sae(seed=1), vectors_of(50).view(10, 5, 2, 16)
    sae.largest_z, other.largest_z = 2.0, 9.0
    plain = sta.DualBudget(sae, other, sta.Budget(4, 8))
    codec, stored = variants.Packed(plain, sae, other), plain.encode(x, x)
    words = codec.encode(x, x)
    assert [part.shape[-1] for part in words] == [8, 16] and words[0].dtype == torch.int16
    levels = [0.0] + [2.0 * 2 ** ((level - 63) * 8 / 63) for level in range(1, 64)]
    for z, idx, word in zip(stored[0].flatten().tolist(), stored[1].flatten().tolist(),
                            words[0].flatten().tolist()):
        index, level = divmod(word & 0xFFFF, 64)
        nearest = round(63 + math.log2(z / 2) * 63 / 8) if z > 0 else 0
        assert index == idx and level == min(63, max(0, nearest))
        assert z > 2 or z < levels[1] or levels[level] == pytest.approx(z, rel=0.046)
    assert max(idx.max() for idx in stored[1::2]) > 30
    every = torch.arange(-1 << 15, 1 << 15).short()
    every = every[(every.int() & 63 > 0) | (every.int() >> 6 == 3)]
    z, idx = variants.from_words(every, 0.37)
    assert idx.min() == 0 and idx.max() == 1023 and z.max() == pytest.approx(0.37)
    assert torch.equal(variants.to_words(z, idx, 0.37), every)
    with pytest.raises(sta.UsageError, match="n_latents = 1025: 10 bits name at most 1,024"):
        many = small_sae(n_latents=1025)
        many.largest_z = 1.0
        variants.Packed(plain, many)

@pytest.mark.parametrize("kind", sta.KINDS)
def test_grouped_codes_are_finite_where_a_group_has_no_live_token(kind):
    """Nobody reads them there, but nan would reach the gradient of a stretch."""
    x, live = torch.randn(1, 4, 2, 32), torch.arange(4)[None] > 0
    assert rivals.quantise(x, live, kind, 2, 32).isfinite().all()

def test_a_stretch_finds_what_was_shrunk(trained, tmp_path):
    """A codec that keeps 0.8 of each key and 0.7 of each value, about the mean, is stretched
    back."""
    model, tokenizer, layers = load_model("tiny")
    windows = token_windows(read_text(None, "train", "tiny"), tokenizer, model, 256, 512, 16_384)
    vectors = sta.harvest(model, windows[:16], layers)
    def shrink(layer):
        means = [vectors[layer, kind].mean(0) for kind in sta.KINDS]
        codec = across(lambda keys, values, live: (
            means[0] + 0.8 * (keys - means[0]), means[1] + 0.7 * (values - means[1])))
        codec.bytes_per_token = 7
        return codec
    codecs = {layer: shrink(layer) for layer in layers[1:]}
    learned = calibrate.learn_stretch(model, codecs, windows)
    for layer, x in learned.items():
        assert x["means"][1] == pytest.approx(vectors[layer, "value"].mean(0), abs=1e-4)
        assert x["factors"][1].tolist() == pytest.approx([1 / 0.7] * 2, abs=0.2)
    for per, n in (("model", 1), ("layer", 10), ("head", 20), ("mean", 20)):
        some = calibrate.learn_stretch(model, codecs, windows[:4], per=per)
        factors = torch.stack([x["factors"] for x in some.values()])
        assert len(factors.unique()) == n
        assert (some[3]["means"][1] - sta.harvest(model, windows[:4], [3])[3, "value"].mean(0)
                ).abs().max().lt(1e-4) == (per != "mean")

def test_l1_finds_its_budget_and_its_loss_is_that_of_the_formula():
    sae, x = small_sae(k=4, kind=variants.L1SAE), vectors_of(256)
    inside = (x - sae.b_dec) / sae.scale
    z = torch.relu(inside @ sae.W_enc + sae.b_enc)
    expected = ((inside - z @ sae.W_dec) ** 2).mean() + 0.05 * z.sum(-1).mean() / 16
    sae.k = (z > 0).sum(-1).float().mean()  # then the weight stays
    torch.testing.assert_close(sae.loss(x), expected)
    sae.k, optimizer = 4, torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(300):
        train_sae.train_step({"": sae}, optimizer, {"": x})
    codec, x = variants.ReluCode(sae.requires_grad_(False), sae), x.view(64, 4, 2, 16)
    stored = codec.encode(x, x)
    assert 3 < len(stored[0]) / 512 < 5 and stored[2].sum() == len(stored[0]) == len(stored[1])
    z = torch.relu((x - sae.b_dec) / sae.scale @ sae.W_enc + sae.b_enc)
    expected = z @ sae.W_dec * sae.scale + sae.b_dec
    torch.testing.assert_close(codec.decode(stored)[1], expected, atol=0.01, rtol=0)

@pytest.mark.parametrize("make_codec", [
    lambda sae: variants.LayerBudget(sae, 2, (1, 4), (torch.zeros(8), torch.eye(8))),
    lambda sae: variants.ReluCode(sae, sae),
    lambda sae: variants.Searched(sae, sae, sta.Budget(1, 1))])
def test_dictionaries_that_int16_cannot_index(make_codec):
    x = torch.zeros(3, 1, 4)
    for n_latents in (1 << 15, 40_000):
        layer_sae = sta.TopKSAE(1, 8, n_latents, 2)
        codec = make_codec(sta.TopKSAE(1, 4, n_latents, 2))
        if isinstance(codec, variants.LayerBudget):
            codec.sae = layer_sae
        if n_latents == 1 << 15:
            codec.encode(x, x)
            continue
        with pytest.raises(sta.UsageError, match="n_latents = 40000: an int16 index names at most"):
            codec.encode(x, x)

# ---------------------------------------------------------------- claims.py
@pytest.fixture(scope="session")
def judged(all_variants, tmp_path_factory):
    """Everything at once, on the short run and its L1 SAEs."""
    out = tmp_path_factory.mktemp("judged")
    assert script(claims, "--saes", all_variants / "tiny", "--max-tokens", 1024, "--limit", 8,
                  "--out", out) == 0
    return out

def test_verdicts_follow_from_the_rows(judged, capsys):
    """Also from results.jsonl alone."""
    result, measured = (read_json(judged / name) for name in ("tiny.json", "tiny-claims.json"))
    rows = {r["name"]: r for r in result["rows"]}
    assert {"searched 4,8", "searched 16,32", "l1", "uniform, trained for it, searched",
            "layer 1 alone", "layer 2 alone, means", "errors turned"} < set(rows)
    one = rows["layer 1 alone"]
    assert list(one["by_layer"]) == ["1"] and one["delta_ce"] < rows["dual"]["delta_ce"]
    for column in ("fvu_key", "fvu_val"):  # as large as those of the search, but they cost more
        assert rows["errors turned"][column] == pytest.approx(rows["searched"][column], rel=0.01)
    assert rows["errors turned"]["ce"] > rows["searched"]["ce"]
    lines = [line for name in ("tiny.json", "tiny-claims.json")
             for line in report.lines_of(read_json(judged / name))]
    verdicts = {f"{x['claim']} {x['part']}".strip(): x for x in claims.judge(lines)}
    assert verdicts["P2"]["figure"] == pytest.approx(np.mean(
        [layer["cos_centred_key"] for layer in rows["dual"]["by_layer"].values()]), abs=1e-5)
    assert verdicts["P4"]["figure"] == pytest.approx(
        rows["uniform, trained for it"]["delta_ce"] - rows["dual"]["delta_ce"], abs=1e-4)
    for part, name in (("median layer", "layer 1 alone"), ("worst layer", "layer 2 alone")):
        costs = sorted(rows[f"layer {i} alone"]["delta_ce"] for i in (1, 2))
        assert verdicts[f"P6 {part} alone"]["figure"] in costs
    assert verdicts["P6 all layers, searched"]["figure"] == rows["searched"]["delta_ce"]
    assert verdicts["P6 cloze, one pass"]["n"] == "8 questions"
    assert verdicts["P7 full context"]["figure"] == pytest.approx(
        rows["dual"]["bytes_share"] + rows["dual"]["once_bytes"] / 256 / 6144)
    assert not any(name.startswith("P8") for name in verdicts)  # two layers
    assert verdicts.keys() == {f"{x['claim']} {x['part']}".strip() for x in claims.judge(
        [*({"kind": "row", "context": 256, **row} for row in result["rows"]),
         {"kind": "measured", **measured["measured"]}])}
    without = [line for line in lines if not line["name"].endswith("alone, means")]
    without.append({**rows["dual"], "kind": "row", "tasks": {}})  # as if of another seed
    without[-1]["settings"] = {**rows["dual"]["settings"], "seed": 1}
    without.append({**rows["means"], **{x: without[-1][x] for x in ("kind", "settings", "tasks")}})
    judged_then = {f"{x['claim']} {x['part']}".strip() for x in claims.judge(without)}
    assert judged_then == {name for name in verdicts if " layer alone" not in name}  # no control

def test_controls_that_are_missing_are_trained_beside_the_others(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "saes") / "tiny"
    for variant, n in (("splits", 8), ("splits", 8), ("l1", 4)):  # the second time they are there
        claims.train_controls(variant, folder, "tiny", [1, 2])
        saes = list((tmp_path / "saes" / variant / "tiny").glob("layer*.*"))
        assert len(saes) == n
    settings = load_sae(folder.parent / "l1" / "tiny" / "layer1.key")[1]["settings"]
    assert settings["tokens"] == 3 * 16_384 and settings["lr"] == pytest.approx(0.04)

def made_up_row(name, ce, method=None, fvu=(0.1, 0.3), cos=0.9, **more):
    """A line of results.jsonl, of forty windows and two layers; its interval is narrow."""
    columns = {"fvu_key": fvu[0], "fvu_val": fvu[1], "cos_centred_key": cos}
    return {"kind": "row", "name": name, "method": method or name, "delta_ce": ce - 3,
            "ratio": 1.0, "ratio_ci95": [0.998, 1.002],
            "settings": None if name == "dense" else {"seed": 0},
            "window_ce": [ce + (i * i % 7) / 10 for i in range(40)], "cos_key": cos,
            "tasks": {"cloze": {"n": 100, "delta_acc": 0.0, "delta_acc_stderr": 0.005}},
            "by_layer": {"0": columns, "1": {x: 1.01 * y for x, y in columns.items()}},
            "bytes_share": 0.2, "bytes_per_token": 200, "once_bytes": 1000, "context": 256, **more}

def lines_where_all_holds():
    """What evaluate.py and claims.measure would have to find for every claim to hold."""
    lost = {"cloze": {"n": 100, "delta_acc": -0.3, "delta_acc_stderr": 0.01}}
    lines = [made_up_row("dense", 3.0, bytes_per_token=1000, bytes_share=1.0),
             made_up_row("dual", 2.99), made_up_row("searched", 2.97),
             made_up_row("l1", 3.1), made_up_row("searched 16,32", 2.98),
             made_up_row("errors turned", 3.1), made_up_row("means", 5.0, cos=0.5, tasks=lost)]
    for ending in ("", ", searched"):
        lines += [made_up_row(f"uniform, trained for it{ending}", 3.05),
                  made_up_row(f"reverse, trained for it{ending}", 3.2),
                  made_up_row(f"layer 1 alone{ending}", 2.99)]
    lines.append(made_up_row("layer 1 alone, means", 3.5))
    gaps = {f"{gap} of {kind}s": [0.4, 0.01] for gap in meaning.GAPS for kind in sta.KINDS}
    weak = {gap: [0.1, 0.01] for gap in gaps}
    slopes = {"k = 0": (1.0, 0.4), "k = 4": (0.2, 0.8), "l1": (0.2, 0.5),
              "untrained twin": (0.6, 0.6)}
    attention = {name: {layer: {"fvu": fvu, "slope": slope + 0.01 * int(layer)} for layer in "0123"}
                 for name, (fvu, slope) in slopes.items()}
    return [*lines, {"kind": "measured", "settings": {"seed": 0},
                     "attention": attention, "depth": {
                         "changes": {"atoms": gaps, "random": weak, "vectors": weak}}}]

def of(name, **columns):
    """A change of a line's columns; nats are added to all windows."""
    def change(lines):
        line = next(x for x in lines if x.get("name") == name)
        nats = columns.get("nats", 0)
        line.update({"window_ce": [x + nats for x in line["window_ce"]],
                     "delta_ce": line["delta_ce"] + nats})
        for column, value in columns.items():
            for layer in line["by_layer"].values():
                layer.update({column: value} if column in layer else {})
            line.update({column: value})
    return change

def of_slope(name, slope):
    def change(lines):
        for layer in lines[-1]["attention"][name].values():
            layer["slope"] = slope
    return change

def of_depth(name, change):
    new = {"sense of keys": [change, 0.01]}
    return lambda lines: lines[-1]["depth"]["changes"][name].update(new)

TASK = {"cloze": {"n": 100, "delta_acc": -0.1, "delta_acc_stderr": 0.01}}
NO_LOSS = {"cloze": {**TASK["cloze"], "delta_acc": 0.0}}
ACROSS = [  # a part, an input moved across its threshold, a control that wins
    ("P1", of_slope("l1", 0.9), of_slope("untrained twin", 0.1)),
    ("P2", of("dual", cos_centred_key=0.7), of("means", cos_key=0.95)),
    ("P3", of("reverse, trained for it", fvu_val=0.05),
     of("uniform, trained for it, searched", fvu_val=0.05)),
    ("P4", of("uniform, trained for it", nats=-0.2), of("reverse, trained for it", nats=-0.5)),
    ("P5", of("dense", nats=-0.2), of("errors turned", nats=-0.5)),
    ("P6 median layer alone", of("layer 1 alone", nats=0.1),
     of("layer 1 alone, means", nats=-0.5)),
    ("P6 worst layer alone", of("layer 1 alone", nats=0.1), of("layer 1 alone, means", nats=-0.5)),
    ("P6 all layers, one pass", of("dual", nats=0.1), of("means", nats=-2)),
    ("P6 all layers, searched", of("searched", nats=0.1), of("means", nats=-2)),
    ("P6 cloze, one pass", of("dual", tasks=TASK), of("means", tasks=NO_LOSS)),
    ("P7 4,096 tokens", of("dual", once_bytes=4_000_000), of("dual", bytes_share=0.6)),
    ("P8 sense of keys", of_depth("atoms", -0.2), of_depth("random", 0.5))]

def words_of_verdicts(lines):
    return {f"{x['claim']} {x['part']}".strip(): x["verdict"] for x in claims.judge(lines)}

@pytest.mark.parametrize("part,cross,win", ACROSS, ids=[part for part, *_ in ACROSS])
def test_a_verdict_can_come_out_otherwise(part, cross, win):
    """Where all claims hold: an input across its threshold, or a control that wins, makes it no."""
    words = words_of_verdicts(lines_where_all_holds())
    assert set(words.values()) == {"holds"} and {x[0].split()[0] for x in ACROSS} == set(
        claims.CLAIMS)
    for change in (cross, win):
        lines = lines_where_all_holds()
        change(lines)
        assert words_of_verdicts(lines)[part] == "no"

def test_without_its_control_a_claim_can_only_fail():
    lines = [line for line in lines_where_all_holds() if "means" not in line.get("name", "")]
    assert not any(part.startswith("P6") for part in words_of_verdicts(lines))
    lines[1]["delta_ce"] = 0.1  # of dual
    verdicts = {f"{x['claim']} {x['part']}": x for x in claims.judge(lines)}
    assert verdicts["P6 all layers, one pass"]["verdict"] == "no"
    assert verdicts["P6 all layers, one pass"]["control"] is None

def test_intervals():
    """By numpy and a table of Student's t; a figure that compares trainings needs more of one."""
    values, halves = [0.1, 0.2, 0.4], [0.01, 0.02, 0.03]
    mean, half = claims.interval(values, halves)
    assert mean == pytest.approx(np.mean(values)) and half == pytest.approx(
        np.hypot(0.02, 4.303 * np.std(values, ddof=1) / np.sqrt(3)), rel=1e-3)
    assert claims.interval([0.1], [0.01]) == (0.1, 0.025)
    assert claims.interval([0.1], [0.01], trained=False) == (0.1, 0.01)
    for n, t in ((2, 12.706), (4, 3.182), (11, 2.228), (16, 2.131), (30, 2.045), (300, 1.968)):
        assert claims.margin(1.0, n) == pytest.approx(t, rel=0.005)
    row = {"ratio": 1.1, "ratio_ci95": [1.0, 1.21], "delta_ce": 0.1}
    assert claims.nats_lost([row]) == [(0.1, pytest.approx(math.log(1.1)))]
    lines = lines_where_all_holds()
    uniform = next(x for x in lines if x["name"] == "uniform, trained for it")
    noise = rows_of(5, 1)[:, 0].repeat_interleave(8)  # of blocks of eight windows
    uniform["window_ce"] = [x + 0.05 * y.item() for x, y in zip(uniform["window_ce"], noise)]
    assert words_of_verdicts(lines)["P4"] == "undecided"
    x, y = (torch.tensor(uniform["window_ce"]), torch.tensor(lines[1]["window_ce"]))
    blocks = (x - y).view(5, 8).mean(1).numpy()
    stderr = blocks.std(ddof=1) / np.sqrt(5)
    assert evaluate.mean_excess(x, y) == pytest.approx(
        ((x - y).mean().item(), stderr, 2.78 * stderr), abs=1e-6)
    few = (x - y)[:10].view(5, 2).mean(1).numpy()  # of ten windows, pairs
    assert evaluate.mean_excess(x[:10], y[:10])[1] == pytest.approx(few.std(ddof=1) / np.sqrt(5))

def test_what_a_single_measurement_leaves_undecided():
    """One window, one question or one layer has no error: nothing is decided by it."""
    lines = lines_where_all_holds()
    for row in lines[:-1]:
        row |= {"ratio_ci95": [0.0, math.inf], "window_ce": row["window_ce"][:1],
                "by_layer": {"0": row["by_layer"]["0"]},
                "tasks": {"cloze": {**row["tasks"]["cloze"], "delta_acc_stderr": math.inf}}}
    for by_layer in lines[-1]["attention"].values():
        for layer in "123":
            del by_layer[layer]
    words = words_of_verdicts(lines)
    assert "P5" not in words and "P4" in words
    for part, word in words.items():
        assert word == ("holds" if part[:2] in ("P7", "P8") else "undecided"), part

def test_verdicts_refuse_what_they_cannot_judge(trained, evaluated, tmp_path, capsys):
    lines = lines_where_all_holds()
    lines[3]["window_ce"][1] = math.nan
    with pytest.raises(sta.UsageError, match="row l1: its loss is nan, of which no verdict"):
        claims.judge(lines)
    assert claims.judge([]) == []  # nor without their rows
    assert script(claims, "--saes", tmp_path, "--model", "tiny", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "no SAEs of .*; first run")
    assert script(claims, "--saes", trained, "--measure-only", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "tiny.json: no rows to judge; leave out --measure")
    assert script(claims, "--saes", trained, "--only", "dual") == 2  # it takes all rows
    capsys.readouterr()
    for row in ("claims", "variants"):
        argv = "--model", "tiny", "--saes", tmp_path, "--rows", row, "--out", tmp_path
        assert script(evaluate, *argv) == 2
        assert_one_line(capsys.readouterr().err, f"--rows {row}: needs SAEs")

def test_the_change_of_the_stream_is_that_of_the_layers_output():
    """By a hook on the layer's own module."""
    model, ids, outputs = small_model("llama"), tokens_of(2, 9), []
    codec = sta.DualBudget(*(small_saes(model)[1, kind] for kind in sta.KINDS), sta.Budget(1, 1))
    hook = model.model.layers[0].register_forward_hook(lambda m, a, y: outputs.append(
        (y[0] if isinstance(y, tuple) else y)[:, 1:].reshape(16, -1)))
    with torch.no_grad():
        model(ids)
        with sta.reconstruct(model, {0: codec}):
            model(ids)
    hook.remove()
    expected = (outputs[1] - outputs[0]).norm() / (outputs[0] - outputs[0].mean(0)).norm()
    assert claims.stream_change(model, {0: codec}, ids, 1) == {"0": pytest.approx(expected.item())}

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
    noise, none = torch.randint(900, 1000, flat.shape, generator=generator), 0 * flat - 1
    codes, twins = {}, {}
    for kind in sta.KINDS:
        codes[1, kind] = code(flat, 100 + flat, 200 + flat.roll(1))
        codes[2, kind] = code(flat, noise, none)  # -1: z = 0, which no two tokens share
        codes[3, kind] = code(flat, noise, 300 + 2 * flat + verb)
        twins |= {(layer, kind): code(flat, flat + 100) for layer in (1, 2, 3)}
    words, vectors = [vocabulary[i] for i in flat], {site: torch.nn.functional.one_hot(
        flat, 62)[:, None].half() for site in codes}
    kept = {"atoms": codes, "random": twins, "vectors": vectors}
    result = meaning.hierarchy(kept, ids, words, seed=0)
    assert result["words"] == ["run", "walk", "work"] and result["layers"] == [1, 2, 3]
    changes = result["changes"]["atoms"]
    for name, expected in (("lexical", 2 / 3 - 0.6), ("ngram", 1 / 3 - 0.07), ("sense", 1 / 3)):
        assert changes[f"{name} of keys"][0] == pytest.approx(expected, abs=0.04), name
        assert changes[f"{name} of keys"][0] > 2 * changes[f"{name} of keys"][1]
        for other in ("random", "vectors"):  # the same in all layers
            assert result["changes"][other][f"{name} of values"][0] == 0
    few = meaning.hierarchy(kept, ids, ["x"] * len(words), 0)  # no word with two senses
    assert few["words"] == [] and set(few["changes"]["atoms"]) == {
        f"{gap} of {kind}s" for gap in ("lexical", "ngram") for kind in sta.KINDS}
    turned = {(4 - i, kind): x for (i, kind), x in codes.items()}
    turned = meaning.hierarchy({**kept, "atoms": turned}, ids, words, 0)["changes"]["atoms"]
    assert all(change < 0 for change, _ in turned.values())

def test_errors_are_those_of_words_not_of_pairs():
    """Each word's pairs all say the same: a hundred copies are worth one, as numpy has it."""
    of_each = rows_of(30, 1)[:, 0]
    x, words = of_each.repeat_interleave(100), torch.arange(30).repeat_interleave(100)
    means = meaning.bootstrap({"a": x}, {"a": words}, torch.Generator().manual_seed(0))["a"]
    assert means.std().item() == pytest.approx(of_each.std().item() / 30 ** 0.5, rel=0.2)

def test_codes_for_p8(trained):
    model, tokenizer, _ = load_model("tiny")
    saes, _ = load_saes(trained / "tiny", model)
    windows = token_windows(read_text(None, "valid", "tiny"), tokenizer, model, 64, 0, 640)
    kept = meaning.read_twins(model, saes, windows, {"key": 3, "value": 60})
    with sta.capture(model, [1]) as rows:
        model(windows[9:])
    for kind, k in (("key", 3), ("value", 60)):
        x, sae = rows[1, kind][0], saes[1, kind]
        z, idx = sae.encode(x, k)
        assert torch.equal(kept["atoms"][1, kind][-64:], idx.masked_fill(z <= 0, -1).short())
        i, j = torch.tensor([3, 70]), torch.tensor([100, 9])
        unit = torch.nn.functional.normalize(torch.cat([
            sta.harvest(model, windows, [1], sink=0)[1, kind] - sae.b_dec]), dim=-1)
        torch.testing.assert_close(meaning.alike(kept["vectors"], kind, [1], i, j),
                                   (unit[i] * unit[j]).sum(-1).mean(1), atol=2e-3, rtol=0)
        twin = meaning.random_twin(sae)
        assert not torch.equal(twin.encode(x, k)[1], idx)
    assert (kept["atoms"][1, "value"] == -1).any()  # of sixty, not all are positive

# ---------------------------------------------------------------- atoms.py
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_parts_of_a_logit_add_up_to_it(family):
    """By the model's own attention: differences of logits are those of the logs of its weights."""
    model, ids = small_model(family), tokens_of(2, 9)
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)  # so that attention is not flat
    sae = small_saes(model)[1, "key"]
    queries, keys, _ = atoms.read_attention(model, [1], ids)[1]
    idx, mean, parts, missed = atoms.take_apart(model, 1, sae, 5, queries, keys)
    assert idx.shape == (2, 9, 2, 5) and parts.shape == (2, 4, 9, 9, 5)
    added = (mean + parts.sum(-1) + missed)[:, :, -1]  # of the last query
    model.set_attn_implementation("eager")
    logs = model.get_decoder()(input_ids=ids, output_attentions=True).attentions[1][:, :, -1].log()
    assert logs.std() > 0.1
    torch.testing.assert_close(added - added[..., :1], logs - logs[..., :1], atol=1e-4, rtol=0)
    one = atoms.logits(model, 1, queries, sae.scale * sae.encode(keys, 5)[0][..., 2, None]
                       * sae.W_dec[idx[..., 2]])
    torch.testing.assert_close(parts[..., 2], one)

@pytest.mark.parametrize("family", ["cohere", "gpt_neox"])
def test_attention_of_another_kind_is_not_taken_apart(family):
    """Cohere turns other pairs of numbers; GPT-NeoX turns only some."""
    model = small_model(family)
    for p in model.parameters():
        p.mul_(4 if p.dim() > 1 else 1)
    with pytest.raises(sta.UsageError, match="no softmax of q.k after Llama's RoPE, and not"):
        atoms.read_attention(model, [0], tokens_of(2, 9))

class Shrunk:
    """A codec of keys that halves their distance to a mean."""
    def __init__(self, mean):
        self.mean = mean

    def roundtrip(self, keys, values, live):
        return self.mean + 0.5 * (keys - self.mean), values

def test_what_attention_keeps():
    """Of exact keys all; of keys shrunk to half, half of the slope, and so a quarter is missed."""
    model, ids = small_model("llama"), tokens_of(3, 12)
    rows = {"exact": {1: Exact()}, "half": {1: Shrunk(torch.zeros(2, 16))}}
    measured = atoms.measure_attention(model, rows, [1], ids)
    assert measured["exact"][1] == pytest.approx({"r2": 1, "slope": 1, "fvu": 0}, abs=1e-5)
    assert measured["half"][1] == pytest.approx(
        {"r2": 0.75, "slope": 0.5, "fvu": measured["half"][1]["fvu"]}, abs=1e-5)
    x = torch.tensor([[[[0., 0, 0], [0, 0, 0], [9, 1, 3]]]])  # the first token is left out
    coded = torch.tensor([[[[0., 0, 0], [0, 0, 0], [-5, 1, 2]]]])
    assert atoms.compare_logits(x, coded, 1) == pytest.approx({"r2": 0.75, "slope": 0.5})

def test_the_head_that_looks_furthest():
    """Neither the first token nor one of the last four counts; nor a query before the last."""
    weights = {3: torch.zeros(2, 9, 9), 7: torch.zeros(2, 9, 9)}
    weights[3][0, -1] = torch.tensor([.5, 0, 0, 0, .3, .1, 0, .1, 0])
    weights[3][1, 5, 2] = 1
    weights[7][1, -1] = torch.tensor([.1, .4, 0, 0, 0, .2, .2, .1, 0])
    weights[7][0, -1, 5] = .9
    assert atoms.furthest_look(weights) == (7, 1)
    assert atoms.furthest_look({0: torch.ones(2, 5, 5)}) is None  # too short

def test_coefficients_by_atom():
    z = torch.tensor([[[2., 1], [3, 0]], [[0, 0], [5, 4]]])  # two tokens, two heads, two atoms each
    idx = torch.tensor([[[0, 2], [0, 3]], [[1, 2], [2, 1]]])
    assert atoms.by_atom(z, idx, 4).tolist() == [[3, 0], [0, 4], [1, 5], [0, 0]]
    assert atoms.strongest_head(z, idx, 4).tolist()[1:3] == [1, 0]

def test_what_a_value_atom_promotes_is_what_its_head_adds_to_the_logits():
    """By the model's own modules: the difference that the atom makes to W_O's output."""
    model = small_model("llama")
    config, attention = model.config, model.model.layers[1].self_attn
    D, group = sta.kv_shape(config)[1], config.num_attention_heads // config.num_key_value_heads
    atom, head = rows_of(1, D), 1
    read = torch.zeros(config.num_attention_heads, D)
    read[head * group:(head + 1) * group] = atom
    with torch.no_grad():
        logits = model.lm_head(attention.o_proj(read.flatten()) * model.model.norm.weight)
    most, least = atoms.promoted(model, 1, atom, torch.tensor([head]))
    assert most[0].tolist() == logits.argsort(descending=True)[:atoms.N_SHOWN].tolist()
    assert least[0].tolist() == logits.argsort()[:atoms.N_SHOWN].tolist()
    assert atoms.promoted(small_model("gpt_neox"), 1, atom, torch.tensor([head])) is None

def test_words_whose_queries_read_a_key_atom():
    ids = torch.tensor([5, 5, 5, 8, 8, 8, 9])  # 9 occurs once, and does not count
    queries = torch.zeros(7, 2, 4)
    queries[:3, 1], queries[3:6, 1, 0], queries[6] = torch.tensor([1., 2, 3, 4]), 7, 99
    found = atoms.readers(queries, ids, torch.eye(4)[[0, 3]], torch.tensor([1, 1]))
    assert found.tolist() == [[8, 5], [5, 8]]

@pytest.mark.parametrize("family", [*FAMILIES, "exaone4", "olmoe", "persimmon", "cohere"])
def test_queries_are_those_of_the_model(family, monkeypatch):
    """Those that attention gets: the same at position 0, of the same length elsewhere, by RoPE."""
    model, seen, attend = small_model(family), [], torch.nn.functional.scaled_dot_product_attention
    def spy(q, *args, **kwargs):
        seen.append(q.transpose(1, 2))  # (B, T, heads, D)
        return attend(q, *args, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for T in (4, 9):  # as many tokens as heads, or not
        seen.clear()
        with capture_queries(model, [1]) as queries, torch.no_grad():
            model(tokens_of(2, T))
        scale = queries[1].norm() / seen[1].norm()  # some types scale all queries
        torch.testing.assert_close(queries[1][:, 0], scale * seen[1][:, 0])
        torch.testing.assert_close(queries[1].norm(dim=-1), scale * seen[1].norm(dim=-1))

def test_queries_that_are_not_found():
    model = small_model("llama")
    model.model.layers[1].self_attn.query = model.model.layers[1].self_attn.q_proj
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(sta.UsageError, match="1 of its modules, for 2 layers"):
        with capture_queries(model, [0]):
            pass

def test_atoms_and_their_page(trained, tmp_path, monkeypatch):
    """Its strongest contexts against codes computed here; corpus text cannot end the data."""
    argv = ["--saes", trained, "--max-tokens", 2048, "--out", tmp_path]
    assert script(atoms, *argv, "--sentence", "The President of the United") == 0

    def read():
        html = (tmp_path / "tiny-atoms.html").read_text(encoding="utf-8")
        assert html.count("</script>") == 2 and "://" not in html.split('id="data">')[0]
        return json.loads(html.split('id="data">')[1].split("</script>")[0])

    page, (model, tokenizer, _) = read(), load_model("tiny")
    saes, _ = load_saes(trained / "tiny", model)
    ids = torch.tensor(tokenizer("".join(read_text(None, "valid", "tiny"))).input_ids[:2048])
    with sta.capture(model, [2]) as rows, torch.no_grad():
        model(ids.view(8, 256))
    z, idx = (x.flatten(0, 1) for x in saes[2, "key"].encode(rows[2, "key"], 8))  # (2048, H, 8)
    best, words = {}, [tokenizer.decode(i) for i in ids]
    for place, head, rank in (idx == 5).nonzero().tolist():
        if place % 256 and z[place, head, rank] > 0:
            best[place] = max(z[place, head, rank].item(), best.get(place, 0))
    by_word, site = {}, page["sites"]["2.key"]
    for i, value in sorted(best.items(), key=lambda item: -item[1]):
        by_word.setdefault(words[i].strip().lower(), (i, value))
    expected = list(by_word.values())[:6]
    n = atoms.BEFORE
    shown = [(i, zs[n] / 100) for i, *zs in site["strongest"][5]]
    assert [i for i, _ in shown] == [i for i, _ in expected]
    assert [v for _, v in shown] == pytest.approx([v for _, v in expected], abs=0.01)
    assert site["fired"][5] == pytest.approx(len(best) / 2048, abs=1e-5)
    for i, *zs in site["sample"][5]:  # also of the tokens around
        assert i in best and len(zs) == n + 1 + atoms.AFTER
        assert [v / 100 for v in zs] == pytest.approx(
            [best.get(j, 0) for j in range(i - n, i + atoms.AFTER + 1)], abs=0.01)
    assert sum(site["bars"][5]) == len(best)
    assert page["words"][:2048] == words
    assert page["sentence"] == ["The", " President", " of", " the", " United"]
    result = read_json(tmp_path / "tiny-atoms.json")
    looks = site["looks"]  # of a head, a query, a token: weight, mean, missed, atoms
    assert len(looks) == 4 and [len(of_query) for of_query in looks[0]] == [1, 2, 3, 4, 5]
    assert len(looks[0][0][0]) == 3 + 8
    assert sum(token[0] for token in looks[3][4]) == pytest.approx(1000, abs=3)
    assert result["look"] is None  # five tokens: none is neither the first nor near
    assert not (tmp_path / "tiny-atoms.png").exists()
    with sta.capture(model, [1]) as rows, torch.no_grad():
        model(tokenizer("The President of the United", return_tensors="pt").input_ids)
    z, idx = (x[0, -1, 0].tolist() for x in saes[1, "key"].encode(rows[1, "key"], 8))
    assert [row["atom"] for row in result["example"]["1.key"]] == idx
    assert [row["z"] for row in result["example"]["1.key"]] == pytest.approx(z, abs=0.01)
    end = "</script><script>alert(1)</script>"
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: end * len(ids))
    assert script(atoms, *argv) == 0
    assert read()["words"][3] == end and (tmp_path / "tiny-atoms.png").exists()

# ---------------------------------------------------------------- meaning.py: words and seeds
def test_words_of_a_concept_are_found_where_they_end():
    words = ["In", " New", " Mex", "ico", ",", " May", "be", " in", " May", "."]
    assert meaning.find_words(words, ["May", "Mexico"]).tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 1, 0]

def test_words_chosen_by_are_not_those_tested_on():
    label = torch.zeros(4000).long()
    label[::7] = 1 + torch.arange(len(label[::7])) % 9
    label[5] = -1
    (chosen, others), (tested, _) = meaning.draw_words(label, torch.Generator().manual_seed(0))
    assert not set(label[chosen].tolist()) & set(label[tested].tolist())
    assert chosen.max() < 2000 <= tested.min() and (label[others] == 0).all()
    counts = label[chosen].bincount()
    assert counts.max() == meaning.MANY and len(counts[counts > 0]) >= 4
    assert meaning.draw_words(label * (label < 6), torch.Generator()) is None  # two words in a half

def test_auroc_is_the_chance_that_a_pair_is_in_order():
    a, b = rows_of(7, 3), rows_of(11, 3, seed=1)
    a[2, 0], b[:3, 0] = 0, 0  # ties
    pairs = ((a[:, None] > b) + 0.5 * (a[:, None] == b)).flatten(0, 1)
    torch.testing.assert_close(meaning.auroc(a, b), pairs.mean(0))

def test_an_atom_for_a_concept_is_found_and_a_twin_has_none():
    """Vectors of a concept's words hold one atom of the SAE: it is chosen, and serves other words;
    so does the difference of means, and nothing else."""
    sae, twin = (small_sae(16, 32, seed, heads=2).requires_grad_(False) for seed in (0, 1))
    x = 0.3 * vectors_of(600, heads=2, dim=16)
    drawn = [(torch.arange(40), torch.arange(100, 300)),
             (torch.arange(40, 80), torch.arange(300, 500))]
    x[:80] += 5 * sae.W_dec[3]
    aurocs = meaning.word_aurocs(x, sae, twin, 4, drawn, torch.Generator().manual_seed(0))
    assert aurocs["atoms"] > 0.95 and aurocs["difference of means"] > 0.95
    assert aurocs["untrained twin"] < 0.9
    x[40:80] -= 5 * sae.W_dec[3]  # in other words it is not there
    assert meaning.word_aurocs(x, sae, twin, 4, drawn, torch.Generator())["atoms"] < 0.7

def test_stable_atoms_and_the_budget_without_them():
    alike, fired = torch.tensor([.9, .1, .8, .5]), torch.tensor([10, 20, 15, 15])
    assert meaning.stable_half(alike, fired).tolist() == [True, False, True, False]
    sae = small_sae(16, 32, heads=2)
    x = vectors_of(9, heads=2, dim=16)
    codec = sta.DualBudget(sae, sae, sta.Budget(4, 8))
    none, every = torch.zeros(32).bool(), torch.ones(32).bool()
    kept = meaning.Without(codec, none, every)
    keys, values = kept.decode(kept.encode(x, x))
    torch.testing.assert_close(keys, codec.decode(codec.encode(x, x))[0])
    torch.testing.assert_close(values, sae.b_dec.expand_as(values))
    torch.testing.assert_close(meaning.likeness(sae.W_dec, sae.W_dec), torch.ones(32))

def test_a_twin_keeps_its_random_atoms_and_meaning_is_measured_beside_it(
        trained, all_variants, tmp_path, capsys):
    assert script(meaning, "--saes", trained, "--max-tokens", 512) == 2
    assert "no untrained twins; first run" in capsys.readouterr().err
    twin, metadata = load_sae(all_variants / "twin" / "tiny" / "layer1.key")
    sae, other_metadata = load_sae(all_variants / "tiny" / "layer1.key")
    products = twin.W_dec @ twin.W_dec.T - torch.eye(len(twin.W_dec))
    assert products.std() == pytest.approx(128 ** -0.5, rel=0.05)  # as of random directions
    assert metadata["held_out"]["fvu"] > 1.5 * other_metadata["held_out"]["fvu"]
    assert not torch.allclose(twin.W_enc, sae.W_enc)
    assert script(meaning, "--saes", all_variants / "tiny", "--other", trained,
                  "--max-tokens", 8192, "--out", tmp_path) == 0
    result = read_json(tmp_path / "tiny-meaning.json")["meaning"]
    assert {len(x) for by_concept in result["words"].values() for x in by_concept.values()} == {5}
    assert result["seeds"]["1.key"]["median"] == pytest.approx(1, abs=1e-5)
    assert 0 < result["seeds"]["1.key"]["logits"] < 1
    assert result["without"]["stable"][0] > 0

# ---------------------------------------------------------------- benchmark.py
def test_ours_beside_peers_of_which_none_is_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", [(16, 32, 4, 64)])
    monkeypatch.setattr(benchmark, "LEARNING_RATES", [1e-5, 1e-2])
    for package in ("sparsify", "sae_lens", "dictionary_learning"):
        monkeypatch.setitem(sys.modules, package, None)
    options = ("--layer", 2, "--tokens", 8192, "--n-latents", 32, "--batch", 128, "--out", tmp_path)
    assert script(benchmark, *options, "--steps", 100) == 0
    assert "SAELens: skipped (" in capsys.readouterr().out
    result = read_json(tmp_path / "tiny-peers.json")
    for by_name in result["peers"]["sites"].values():
        assert list(by_name) == ["ours", "ours, k and 2k"]
        for trainer in by_name.values():
            assert trainer["lr"] == 1e-2 and len(trainer["fvu"]) == 3
            assert max(trainer["fvu"]) < 0.7 < min(1, trainer["by_rate"]["1e-05"])
            assert len(trainer["dead"]) == 3 and 0 <= max(trainer["dead"]) < 0.5
    assert benchmark.table_of_peers(report.lines_of(result))[0] == "|  | ours | ours, k and 2k |"
    monkeypatch.setattr(benchmark, "compare_at", None)  # not called: both sites are there
    assert script(benchmark, *options, "--steps", 100, "--resume") == 0
    assert read_json(tmp_path / "tiny-peers.json")["peers"]["sites"] == result["peers"]["sites"]
    assert script(benchmark, *options, "--steps", 99, "--resume") == 2
    assert "steps = 100, not 99" in capsys.readouterr().err

def test_a_rate_that_ends_in_nan_is_not_the_best(monkeypatch):
    monkeypatch.setattr(benchmark, "LEARNING_RATES", [1e38, 1e-2])
    args = argparse.Namespace(n_latents=32, batch=64, steps=2)
    parts = [rows_of(128)] * 3
    result = benchmark.compare_at("", {"ours": benchmark.Ours}, parts, 4, args)["ours"]
    assert math.isnan(result["by_rate"][1e38]) and result["lr"] == 1e-2

# ---------------------------------------------------------------- additive.py
def learned_layer(n=9000):
    """A layer of two heads of sixteen, P = 64, learned from rows of a few directions."""
    x = rows_of(n, 20) @ rows_of(20, 64, seed=1) + rows_of(n, 64, seed=2) / 10
    fitted = {"mean": x.mean(0), "covariance": x.T.cov(correction=0), "metric": torch.eye(64)}
    return x, additive.learn_layer(x, fitted, 10, seed=0)

def test_beam_search_is_a_search_over_all_sums_where_it_can_be():
    """One candidate: greedy. More: hardly ever is a sum of two stages nearer."""
    y, atoms = rows_of(30, 8), rows_of(512, 8, seed=1).view(2, 256, 8)
    atoms[1] *= 0.3
    greedy, greedy_left = additive.beam_search(y, atoms, 1)
    for n, x in enumerate(y):
        first = (atoms[0] - x).square().sum(-1).argmin()
        second = (atoms[1] - (x - atoms[0][first])).square().sum(-1).argmin()
        assert greedy[n].tolist() == [first, second]
    codes, left = additive.beam_search(y, atoms, 4)
    total = sum(stage[codes[:, j].long()] for j, stage in enumerate(atoms))
    torch.testing.assert_close(left, y - total)
    sums = (atoms[0][:, None] + atoms[1]).flatten(0, 1)  # of all pairs
    best, error = torch.cdist(y, sums).amin(1).square(), left.square().sum(-1)
    assert (error <= greedy_left.square().sum(-1) + 1e-4).all()
    assert (error < best + 1e-3).float().mean() > 0.9

def test_k_means_finds_clusters_and_fills_empty_atoms():
    x = 4 * rows_of(256, 8).repeat(40, 1) + rows_of(40 * 256, 8, seed=1) / 10
    atoms = additive.k_means(x, torch.Generator().manual_seed(0))
    assert len(set(additive.nearest(x, atoms).tolist())) > 200
    distances = (x - atoms[additive.nearest(x, atoms)]).norm(dim=1)
    torch.testing.assert_close(distances, torch.cdist(x.double(), atoms.double()).amin(1).float(),
                               atol=0, rtol=0.03)  # numbers live in the lowest bits

def test_additive_code_of_a_layer():
    x, learned = learned_layer()
    stages = {i: min(4, len(learned[f"atoms.{i}"])) for i in range(4) if f"atoms.{i}" in learned}
    codec = additive.Additive(learned, stages, (2, 16))
    k, v = x[:300].view(3, 100, 2, 2, 16).unbind(2)
    stored = codec.encode(k, v)
    assert stored[0].shape == (3, 100, sum(stages.values())) and stored[0].dtype == torch.uint8
    y, at = torch.zeros(300, len(codec.inverse.read())), 0
    for i, n in stages.items():  # a loop over bytes
        for j in range(n):
            atom = codec.atoms[i].read()[j][stored[0].flatten(0, 1)[:, at].long()]
            y[:, additive.BLOCK * i:additive.BLOCK * (i + 1)] += atom
            at += 1
    expected = y @ codec.inverse.read() + codec.mean
    k_hat, v_hat = codec.decode(stored)
    torch.testing.assert_close(torch.stack([k_hat, v_hat], 2).view(300, 64), expected, atol=1e-3,
                               rtol=1e-4)
    spread = (x[:300] - x.mean(0)).square().sum()
    assert (expected - x[:300]).square().sum() / spread < 0.5
    for i in stages:
        assert (learned[f"left.{i}"].diff() < 0).float().mean() > 0.8  # held-out rows

def test_tables_in_eight_bits():
    """A byte per number, and two for each row; the error is half a step, 1 / 254 of the largest."""
    x = rows_of(5, 64) * torch.tensor([[1e-6], [1.0], [50], [1e5], [0]])
    table = calibrate.EightBits(x)
    assert table.nbytes == 5 * (64 + 2)
    assert ((table.read() - x).abs() <= x.abs().amax(-1, keepdim=True) / 250).all()
    _, learned = learned_layer()
    codec = additive.Additive(learned, {0: 4}, (2, 16))
    in_float32 = 4 * (64 + 2 * 16 * 64 + 4 * 256 * 16)
    assert codec.nbytes < in_float32 / 3

def test_bytes_go_where_they_help_most(capsys):
    curves = {(0, 0): torch.tensor([9.0, 3, 1]), (0, 1): torch.tensor([1.0, 0.5]),
              (3, 0): torch.tensor([5, 4.8])}
    assert additive.share_out(curves, 3) == {(0, 0): 2, (0, 1): 1}
    assert additive.share_out(curves, 4) == {(0, 0): 2, (0, 1): 1, (3, 0): 1}
    with pytest.raises(sta.UsageError, match="5 bytes, but only 4 stages were learned"):
        additive.share_out(curves, 5)

def test_additive_from_text_to_rows(calibrated, tmp_path, capsys, monkeypatch):
    shutil.copytree(calibrated / "tiny", tmp_path / "tiny")
    monkeypatch.setattr(additive, "ROUNDS", 2)
    argv = ["--saes", tmp_path, "--most", 0.07, "--model", "tiny"]
    assert script(additive, *argv) == 0
    files = sorted((tmp_path / "tiny" / "additive").glob("layer*"))
    files.pop().unlink()  # as if it had been interrupted before layer 5
    before = {path: path.stat().st_mtime_ns for path in files}
    capsys.readouterr()
    assert script(additive, *argv) == 0  # resumes: layer 5 alone
    assert "1 of 6 layers to learn" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in files}
    assert script(additive, *argv, "--seed", 1) == 2
    assert_one_line(capsys.readouterr().err, "additive was trained with seed = 0, not 1")
    monkeypatch.setattr(additive, "SHARES", (0.03125, 0.0625, 0.9))  # learned up to 0.07
    run = ["--model", "tiny", "--saes", tmp_path, "--max-tokens", 512, "--limit", 4, "--rows",
           "additive", "--out", tmp_path]
    assert script(evaluate, *run) == 0
    assert "additive 90: left out" in capsys.readouterr().out
    rows = {row["name"]: row for row in read_json(tmp_path / "tiny.json")["rows"]}
    assert list(rows) == ["dense", "additive 3.125", "additive 6.25"]
    for share in (0.03125, 0.0625):
        assert rows[f"additive {100 * share:g}"]["bytes_share"] == share
    assert rows["additive 6.25"]["settings"]["most"] == 0.07
    assert rows["additive 6.25"]["ce"] < rows["dense"]["ce"] + 0.02
    files[2].write_bytes(files[2].read_bytes()[:1000])
    assert script(evaluate, *run) == 2
    assert_one_line(capsys.readouterr().err, "layer2.safetensors: missing or corrupt")
    (tmp_path / "tiny" / "calibration" / "layer3.safetensors").unlink()
    assert script(additive, *argv) == 2
    assert_one_line(capsys.readouterr().err, "layer3.safetensors: missing .*beyond.calibrate")
    with pytest.raises(sta.UsageError, match="a calibration of 99 tokens: too few for 256 atoms"):
        additive.learn_layer(torch.zeros(99, 64), {}, 10, seed=0)

def test_other_codes_through_the_cache():
    """recent = 0, the same sinks: the logits of the hooks; bytes are those stated to 1%."""
    model, tokenizer, _ = load_model("tiny")
    windows = token_windows(read_text(None, "train", "tiny"), tokenizer, model, 256, 0, 10_240)
    vectors, shape, fitted = sta.harvest(model, windows, [1, 2]), sta.kv_shape(model.config), {}
    for layer in (1, 2):
        x = calibrate.side_by_side(vectors[layer, "key"], vectors[layer, "value"])
        fitted[layer] = {"mean": x.mean(0), "covariance": x.T.cov(correction=0),
                         "metric": torch.eye(x.shape[1])}
        if layer == 1:
            learned = additive.learn_layer(x, fitted[1], 24, seed=0)
    stages = {int(name[6:]): len(atoms) for name, atoms in learned.items() if name[:5] == "atoms"}
    axes = calibrate.principal_axes(fitted[2]["covariance"], fitted[2]["metric"])
    codecs = {1: additive.Additive(learned, stages, shape),
              2: rivals.Transform(shape, fitted[2]["mean"], *axes, rivals.allocate(axes[0], 200))}
    ids, row = windows[:2], evaluate.Row("both", codecs)
    with sta.reconstruct(model, codecs, sink=1):
        expected = model(ids).logits
    with cache.through_cache(model, row, sink=1, recent=0, chunk=100) as forward:
        torch.testing.assert_close(forward(ids), expected, atol=1e-4, rtol=0)
    dense = 4 * 4 * 2 * shape[0] * shape[1]  # four layers in float32
    exact = 2 * 4 * 2 * shape[0] * shape[1] / 256 + 5  # sinks of two layers; a position
    assert row.bytes_per_token - dense - exact == pytest.approx(24 + 200 / 8, rel=0.01)

# ---------------------------------------------------------------- s3.py
def test_index_and_scores_against_loops(monkeypatch):
    monkeypatch.setattr(s3, "CHUNK", 16)
    monkeypatch.setattr(s3, "OVERLAP", 4)
    model, ids, asked = small_model("llama"), tokens_of(1, 40)[0], tokens_of(1, 6)[0]
    saes = {layer: sae.requires_grad_(False) for (layer, kind), sae in small_saes(model).items()
            if kind == "key"}
    index, fired = s3.scan(model, saes, ids), [set() for _ in range(40)]
    for at in (0, 16, 32):
        with sta.capture(model, [1]) as rows:
            model(ids[None, max(0, at - 4):at + 16])
        z, idx = saes[1].encode(rows[1, "key"][0, min(at, 4):], saes[1].k)  # (T, H, k)
        for t, h, j in itertools.product(range(len(z)), range(2), range(saes[1].k)):
            if z[t, h, j] > 0:
                fired[at + t].add(64 * h + idx[t, h, j].item())
    start, positions, mean = index[1]
    for f in range(2 * 64):
        assert positions[start[f]:start[f + 1]].tolist() == [
            t for t in range(40) if f in fired[t]]
    q = s3.read(model, asked, [1])[1][1]
    block = model.model.layers[1]
    states = model(asked[None], output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(q, block.self_attn.q_proj(block.input_layernorm(states)).view(
        6, 2, 2, 16))
    expected = np.zeros(40)
    for t, h, g in itertools.product(range(6), range(2), range(2)):
        along, total = saes[1].W_dec @ (q[t, h, g] - mean[h, g]), np.zeros(40)
        for m in along.argsort(descending=True)[:saes[1].k].tolist():
            has = np.array([64 * h + m in latents for latents in fired])
            total += max(along[m].item(), 0) * math.log(40 / max(1, has.sum())) * has
        expected += total ** 2
    expected /= expected.mean()
    scores = s3.search(model, saes, index, asked, 40)["s3", 1]
    assert scores == pytest.approx(s3.of_spans(expected), rel=1e-3)
    with_bos = torch.cat([torch.tensor([1]), asked])
    q = s3.read(model, with_bos, [1])[1][1][1:]  # BOS is read, but its query is left out
    scores = s3.search(model, saes, index, with_bos, 40, special=[1])["s3", 1]
    monkeypatch.setattr(s3, "read", lambda *args: {1: [None, q, None]})
    assert scores == pytest.approx(s3.search(model, {1: saes[1]}, index, asked, 40)["s3", 1])

def test_spans_and_their_words():
    scores = s3.bm25([["a", "b"] * 8, ["b"] * 8, ["a", "b", "c", "b"] * 4], ["b", "e"])
    assert scores == pytest.approx([math.log(1 + 0.5 / 3.5) * 8 * 2.2 / 9.2] * 3)
    tokenizer = load_model("tiny")[1]
    text = "The Constitution, which we all revere, is the Constitution of the people. " * 4
    ids = torch.tensor(tokenizer(text).input_ids)
    assert s3.span_words(tokenizer, ids)[0].count("constitution") >= 2  # words, not pieces
    spans, places = s3.best_spans(np.array([3.0, 5, 4, 0, 2]), 70)
    assert list(spans) == [1, 2] and list(places) == list(range(32, 96))

@pytest.mark.parametrize("family", ["bloom", "gemma3_text", "gpt_neox"])
def test_other_types_of_model_are_read(family):
    """Without a limit of tokens in the config; with norms of queries; with fused projections."""
    model, (H, D) = small_model(family), sta.kv_shape(small_model(family).config)
    keys, queries, stream = s3.read(model, tokens_of(1, 60)[0], [1])[1]
    assert keys.shape == (60, H, D) and queries.shape == (60, H, 4 // H, D)
    assert stream.shape == (60, 64)
    if family == "bloom":
        assert [at for at, _ in s3.chunks(model, tokens_of(1, 600)[0], [1])] == [0, 512]

def test_no_chunk_is_longer_than_the_context(monkeypatch):
    model, lengths = small_model("llama"), []  # of 64 tokens
    monkeypatch.setattr(s3, "OVERLAP", 16)
    monkeypatch.setattr(s3, "read", lambda model, ids, layers: lengths.append(len(ids)) or {})
    assert [at for at, _ in s3.chunks(model, torch.zeros(130), [])] == [0, 48, 96]
    assert lengths == [48, 64, 50]

def test_retrieval_from_a_question(trained, tmp_path, capsys, monkeypatch):
    text = "".join(read_text(None, "valid", "tiny"))
    lines = [line for line in text.split("\n") if len(line) > 300]
    (tmp_path / "long.txt").write_text("\n".join(lines[:40]), encoding="utf-8")
    run = ["--saes", trained, "--text", tmp_path / "long.txt", "--question", lines[20][:200]]
    assert script(s3, *run, "--budget", 256) == 0
    out, tokenizer = capsys.readouterr().out, load_model("tiny")[1]
    place = len(tokenizer("\n".join(lines[:20])).input_ids)
    starts = [int(x.replace(",", "")) for x in re.findall(r"^  ([\d,]+): s3", out, re.M)]
    assert len(starts) == 8 and any(-32 < start - place < 48 for start in starts), (place, starts)
    assert "from the spans:" in out and "bytes per token" in out
    for more, message in (
            (["--question", ""], "--question: no words in it"),
            (["--budget", 9], "--budget 9, .* want 32 or"),
            (["--budget", 10 ** 6], "more text than that"),
            (["--saes", tmp_path], "no SAEs of .*; first run")):
        assert script(s3, *run, *more) == 2
        assert_one_line(capsys.readouterr().err, message)
    write_atomic(tmp_path / "boolq.jsonl", "\n".join(json.dumps(
        {"passage": line[:600], "question": line[:60], "label": 1}) for line in lines[:30]))
    assert script(s3, "--saes", trained, "--evaluate", "--task-dir", tmp_path, "--limit", 20,
                  "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "20 different passages, --limit or fewer; want 250")
    for name, value in (("N_CHOOSE", 8), ("N_TEST", 16), ("N_LAYERS", 1), ("PASSAGES", (4, 8))):
        monkeypatch.setattr(s3, name, value)
    assert script(s3, "--saes", trained, "--evaluate", "--task-dir", tmp_path, "--out",
                  tmp_path) == 0
    result = read_json(tmp_path / "tiny-s3.json")
    means = {row["what"]: row["mean"] for row in result["retrieval"] if row["passages"] == 8}
    *_, fused, chance, _, _, _ = s3.table_of_recall(report.lines_of(result))
    assert f"{100 * means['recall by fused']:.0f} ± " in fused and "| recall: chance |" in chance
    assert [len(x) for x in result["chosen"].values()] == [1] * 4
    assert means["recall by bm25"] > 2 * means["recall by chance"]
    assert 0 <= means["recall by s3"] < 1
    assert means["loss after the right passage"] < means["loss after nothing"]

# ---------------------------------------------------------------- report.py
@pytest.fixture
def results(judged, tmp_path):
    """results.jsonl of the short run and what verdicts need."""
    file = tmp_path / "results.jsonl"
    report.add([judged / "tiny.json", judged / "tiny-claims.json"], file)
    return file

def test_rows_are_taken_in_once(results, judged):
    lines, rows = report.read(results), read_json(judged / "tiny.json")["rows"]
    assert [line["name"] for line in lines] == [*(row["name"] for row in rows), "measured"]
    for line in lines:
        assert len(line["text_sha256"]) == 12 and line["command"].startswith("python ")
        assert line["model_sha256"] == lines[0]["model_sha256"]
        assert line["name"] == "dense" or line["settings"]["text_sha256"]
    before = results.read_text(encoding="utf-8")
    report.add([judged / "tiny.json"], results)
    assert results.read_text(encoding="utf-8") == before
    assert lines[3]["window_ce"] == pytest.approx(rows[3]["window_ce"], abs=5e-5)

@pytest.mark.parametrize("change,message", [
    ({"text_sha256": "0" * 12}, "two texts are named tiny/valid.txt: hash .* there, 0000"),
    ({"ce": 9.0}, "tiny on tiny/valid.txt: the dense loss is .* there, 9.00000 here"),
    ({"model_sha256": "0" * 12}, "two models are named tiny: their weights differ"),
    ({"k_key": 4}, "tiny, dual: with 8 . 16 atoms there, 4 . 16 here; add it as an --experiment"),
    ({"tasks": {}}, "tiny, dual: has no more the tasks cloze; run it with them, too"),
    ({"lr": 0.5}, "tiny, dual: two fits, whose lr is 0.01 there, 0.5 here; delete one's"),
    ({"rounds": 3}, "tiny, searched: two fits, whose rounds is 2 there, 3 here")])
def test_what_does_not_belong_together_is_refused(change, message, results, judged, tmp_path):
    result = read_json(judged / "tiny.json")
    rows = {row["name"]: row for row in result["rows"]}
    (rows["dense"] if "ce" in change else rows["dual"]["settings"] if "lr" in change else
     rows["searched"]["settings"] if "rounds" in change else
     rows["dual"] if change.keys() & {"k_key", "tasks"} else result).update(change)
    for row in result["rows"] if "model_sha256" in change else ():
        row.update(change)
    write_atomic(tmp_path / "other.json", json.dumps(result))
    with pytest.raises(sta.UsageError, match=message):
        report.add([tmp_path / "other.json"], results)

def test_tables_and_figures_follow_from_the_rows(results):
    lines = report.read(results)
    rows = {line["name"]: line for line in lines if line["kind"] == "row"}
    text = ("<!-- table: quick start -->\nSTALE\n<!-- end -->\n"
            "It rises by 9.9<!--=rise | tiny | dual-->%.\n"
            "<!-- table: verdicts -->\n<!-- end -->\n")
    made = report.filled(text, lines)
    figure = report.rise([rows["dual"]]) + "<!--"
    assert figure.startswith(f"{100 * (rows['dual']['ratio'] - 1):.1f} ± ")
    assert f"It rises by {figure}=rise | tiny | dual-->%." in made
    assert evaluate.format_row(rows["dual"], 16) in made and "STALE" not in made
    assert f"| P7a | {claims.CLAIMS['P7'][0]} | per token: under half of bf16 | no |\n" in made
    assert "| P7b |  | 4,096 tokens, with dictionaries: under half of bf16 | no |\n" in made
    assert report.filled(made, lines) == made
    broken = made.replace(figure, "0.1<!--")
    assert report.filled(broken, lines) == made != broken  # one digit is noticed
    three = [{**rows["dual"], "ratio": math.exp(nats), "delta_ce": nats,
              "ratio_ci95": [math.exp(nats)] * 2, "settings": {"seed": seed}}
             for seed, nats in enumerate((0.1, 0.2, 0.3))]
    ratio, half = np.mean(np.exp([0.1, 0.2, 0.3])), 4.30 * 0.1 / math.sqrt(3)  # Student's t
    expected = f"{100 * (ratio - 1):.1f} ± {100 * ratio * half:.1f}<!--=rise | tiny | dual-->"
    assert expected in report.filled("1<!--=rise | tiny | dual-->", three)

def test_a_rise_of_perplexity_is_a_percentage_or_a_factor():
    def row(ratio):
        return {"ratio": ratio, "ratio_ci95": [ratio / 1.02, ratio * 1.02],
                "delta_ce": math.log(ratio)}

    assert report.rise([row(1.1)]) == report.rise([row(1.1)] * 3) == "10.0 ± 2.2"
    assert report.rise([row(3.0)]) == "×3 (2.94 to 3.06)" and report.rise([]) == ""
    assert report.spread([2, 2, 2]) == "2.000"

def test_a_row_of_nan_is_not_taken_in(results, judged, tmp_path):
    result = read_json(judged / "tiny.json")
    result["rows"][-1]["ce"] = math.nan
    write_atomic(tmp_path / "nan.json", json.dumps(result))
    before = results.read_text(encoding="utf-8")
    with pytest.raises(sta.UsageError, match="nan.json: no result .* a row whose loss is nan"):
        report.add([tmp_path / "nan.json"], results)
    assert results.read_text(encoding="utf-8") == before

def test_each_step_of_the_ladder_is_compared_with_the_one_before():
    lines = [{"kind": "row", "model": "tiny", "name": name, "text": "tiny/valid.txt", "tokens": 24,
              "seq_len": 8, "settings": {"seed": seed}, "bytes_share": 0.09, "window_ce": ce,
              "ratio": 1.01, "ratio_ci95": [1.0, 1.02], "delta_ce": 0.01}
             for name, seed, ce in (("packed", 1, [1.0, 2.0, 3.0]), ("packed", 2, [2.0, 3.0, 4.0]),
                                    ("stretched, packed", 1, [0.9, 1.8, 2.7]),
                                    ("stretched, packed", 2, [1.9, 2.8, 3.7]),
                                    ("transform 9.375, per head", 1, [8.0, 8.0, 8.0]),
                                    ("transform 9.375", 1, [7.0, 7.5, 6.5]))]
    made = report.ladder(lines, {"tiny": "9.375"})
    assert [line.split("|")[-2].strip() for line in made[3:]] == [
        "+0.2000 ± 0.2483", "", "+1.0000 ± 1.2413"]  # 4.3 standard errors, of three windows
    assert "packed* | 1.0 ± 1.0" in made[2] and made[0].endswith("better by, nats |")

def test_layers_coded_alone_are_ranked_by_their_cost():
    """The median is over all layers; the first has a line of its own, whatever its rank."""
    lines = [{"kind": "row", "model": report.QWEN, "method": "one layer" + ending, "tokens": 24,
              "name": f"layer {layer} alone{ending}", "text": "valid.txt", "seq_len": 8,
              "ratio": ratio, "ratio_ci95": [ratio - 0.02, ratio + 0.02],
              "delta_ce": math.log(ratio)}
             for layer, ratio in ((0, 1.05), (3, 1.01), (6, 1.002), (9, 1.03))
             for ending in ("", report.SEARCHED)]
    made = report.one_layer(lines)
    assert [line.split("|")[1].strip() for line in made[2:]] == [
        "qwen, first: layer 0", "qwen, median: layer 3", "qwen, worst other: layer 9"]
    assert made[3].count("1.0 ± 2.0") == 2  # by one pass, and searched
    assert report.summary(lines)[2].endswith("|  |  |  |  | 1.0 ± 2.0 |")

def test_the_last_scores_are_shown():
    def row(delta_acc):
        task = {"n": 300, "delta_acc": delta_acc, "delta_acc_stderr": 0.01}
        return {"kind": "row", "model": report.QWEN, "name": "dual", "bytes_share": 0.1875,
                "tasks": {} if delta_acc is None else {"piqa": task}}

    lines = [row(-0.05), row(None), row(-0.06)]
    assert report.accuracies(lines)[2:] == ["| Qwen2.5-Coder-1.5B, dual | -6.0 ± 2.0 |"]

def test_an_experiment_stands_beside_the_rows(results, judged, tmp_path):
    """Another fit of the same row is refused as a row, and shown as an experiment; one that is
    named by its tokens is a point of the curve over the length of training."""
    result = read_json(judged / "tiny.json")
    for row in result["rows"]:
        if row["settings"]:
            row["settings"]["tokens"] = 99
            row["ratio"] = 3.0
    write_atomic(tmp_path / "short.json", json.dumps(result))
    before = report.read(results)
    with pytest.raises(sta.UsageError, match="two fits, whose tokens is .* there, 99 here"):
        report.add([tmp_path / "short.json"], results)
    for experiment in ("99 tokens", "other weather"):
        report.add([tmp_path / "short.json"], results, experiment)
    lines = report.read(results)
    assert lines[:len(before)] == before
    assert {line["name"] for line in lines[len(before):]} == {"dual", "searched", "stretched",
                                                              "packed"}
    short, default = (dict(report.curves_by_length(some, "tiny")["dual"])
                      for some in (lines, before))
    assert short == {99: pytest.approx(200), **default} and len(default) == 1
    heading, _, first, second = report.lengths(lines, "tiny")
    assert heading == "| tokens | dual, valid | searched, valid | stretched, valid |"
    assert first.startswith("| 99 | ×3 (") and second.startswith(f"| {max(short):,} | ")

def test_the_readmes_show_what_the_file_says():
    lines, shown = report.read(), ""
    for path in report.READMES:
        text = path.read_text(encoding="utf-8")
        assert report.filled(text, lines) == text, f"{path}: run python -m beyond.report write"
        shown += text
    for path in (ROOT / "figures").glob("*"):  # and every picture
        assert path.suffix in (".jsonl", ".png", ".py")
        assert path.suffix != ".png" or path.name in shown

# ---------------------------------------------------------------- all
IMPORTS = {"calibrate": set(), "rivals": {"calibrate"}, "additive": {"calibrate"},
           "variants": {"additive", "calibrate"}, "cache": set(), "atoms": set(),
           "meaning": {"atoms", "variants"},
           "claims": {"variants", "atoms", "meaning"}, "s3": set(), "benchmark": set(),
           "report": {"atoms", "benchmark", "cache", "claims", "meaning", "s3", "variants"}}

@pytest.mark.parametrize("name", IMPORTS)
def test_help_needs_nothing(name, capsys, monkeypatch):
    module = __import__(f"beyond.{name}", fromlist=["main"])
    monkeypatch.setattr(module, "load_model", None, raising=False)
    assert script(module, "-h") == 0
    assert "python" in capsys.readouterr().out

def test_imports_run_one_way():
    """The ground floor imports nothing of beyond/; within it, as IMPORTS has it."""
    for path in (*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) beyond", text, re.M), path
    assert {path.stem for path in (ROOT / "beyond").glob("*.py")} == {
        *IMPORTS, "__init__", "test_beyond"}
    for name, allowed in IMPORTS.items():
        text = (ROOT / "beyond" / f"{name}.py").read_text(encoding="utf-8")
        assert set(re.findall(r"^from beyond\.(\w+) import", text, re.M)) == allowed, name
        assert not re.search(r"^import beyond", text, re.M), name
