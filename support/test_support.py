"""Tests of support/: model types, text, files, tasks, and what bad input is told.

    python -m pytest -q support
    python -m support.test_support      # which model types of transformers work: a minute
"""
import ast
import collections
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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
from support import results
from support.files import ROOT, load_sae, load_saes, model_hash, save_sae, write_atomic
from support.models import check_sites, load_model, pick_device
from support.results import inputs_hash
from support.tasks import TASKS, Question, encode_pair, load_task, loglikelihoods, score_task
from support.text import encode_text, read_text, token_windows, tokenize
from test_sta import (FAMILIES, SHORT, across, assert_one_line, evaluated, read_json,
                      script, small_model, small_sae, small_saes, through, tokens_of, trained,
                      vectors_of)

# ---------------------------------------------------------------- models
TYPES = FAMILIES + [  # of the 77 that `python -m support.test_support` finds to work
    "afmoe", "apertus", "bloom", "cohere", "exaone4", "gemma2", "glm4", "gpt_oss", "granite",
    "hy_v3", "lfm2", "minimax_m2", "mixtral", "moshi", "nemotron", "olmo3", "olmoe", "opt",
    "persimmon", "phimoe", "qwen2_moe", "qwen3_moe", "smollm3", "stablelm", "starcoder2"]

def check_training(model):
    """Ten steps, and the SAEs come back from their files."""
    args = train_sae.parse_args("--tokens 640 --batch-tokens 63 --n-latents 32 --k-key 2 --k-val 4 "
                                "--layer 0-1 --lr 0.01".split())
    saes = train_sae.make_saes(model, [0, 1], args, train_sae.KeysAndValues())
    settings = {"layers": [0, 1], "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        run = args, pathlib.Path(folder), settings, train_sae.KeysAndValues()
        held_out, log = train_sae.train(model, saes, tokens_of(12, 64), *run)
        train_sae.save_trained(run[1], model, saes, held_out, settings, "small")
        assert log[-1]["step"] == 10 and load_saes(folder, model)[0].keys() == saes.keys()

def check_type(model):
    """Captured keys and values are those of Hugging Face's cache; what a codec returns is what
    attention gets, keys and values apart, for as many tokens as heads, too; a codec sees both. SAEs
    can be trained on them."""
    check_sites(model)
    check_training(model)
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
        calls = []
        same, _ = run({1: across(lambda *args: calls.append(args) or args[:2])})
        torch.testing.assert_close(same, logits, atol=0, rtol=0)
        torch.testing.assert_close(calls[0][:2], (keys, values))
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

def test_a_layer_without_self_attention_is_called_so():
    config = transformers.models.mllama.MllamaTextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0)
    with pytest.raises(sta.UsageError, match="layer 1: .* or the layer is not self-attention"):
        check_sites(transformers.MllamaForCausalLM(config).eval())

def test_a_model_is_loaded_up_to_a_layer_where_it_can_be(tmp_path):
    """A config without layer types, and a type whose last layer differs from the others."""
    for family in ("stablelm", "gpt_neox_japanese"):
        folder = model_folder(tmp_path / family, family=family)
        whole = load_model(folder)[0]
        assert len(whole.get_decoder().layers) == 2
        if family == "stablelm":
            assert len(load_model(folder, layers="0", no_deeper=True)[0].get_decoder().layers) == 1
    with pytest.raises(sta.UsageError, match="cannot be loaded; try --layer all .*files lack"):
        load_model(folder, layers="0", no_deeper=True)

def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:2", "cuda:-1", "cuda:01", "gpu", "cuda:99999999999"):
        with pytest.raises(sta.UsageError, match=f"--device {device}: not on this machine"):
            pick_device(device)
    assert pick_device("cuda:1") == ("cuda:1", torch.bfloat16) and pick_device()[0] == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device() == ("cpu", torch.float32)

def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    """Every text says so, not only --text."""
    model, tokenizer, _ = load_model(model_folder(tmp_path, vocab_size=100))
    row = {"context": "The", "choices": ["a", "b"], "label": 0}
    task = write_jsonl(tmp_path / "t.jsonl", [row])
    for read in (lambda: load_task(task, None, None, tokenizer, 64),
                 lambda: tokenize(["The year"], tokenizer, 9)):
        with pytest.raises(sta.UsageError, match="makes token .*, but the model has 100"):
            read()

# ---------------------------------------------------------------- text
def test_windows_are_the_text_cut_once():
    """Tokens of one call, special ones at the beginning only; the tail is dropped."""
    model, tokenizer, _ = load_model("tiny")
    ids = torch.tensor(tokenizer("".join(read_text(None, "valid", "tiny"))).input_ids)
    windows = token_windows(read_text(None, "valid", "tiny"), tokenizer, model, 100, 2048, 1 << 40)
    assert torch.equal(windows.flatten(), ids[:len(ids) // 100 * 100])
    pieces = read_text(None, "valid", "tiny")
    assert token_windows(pieces, tokenizer, model, None, 2048, 1, least=2).shape == (2, 256)

TEXTS = {"prose": "The year 1862, it's said, was cold;\n\n  they'd gone.\tHm... " * 200,
         "code": "def f(x):\n    return [1234567 * x]  # ünï 你好世界 \r\n\n\n" * 200,
         "one line": "no line breaks at all, only 12 words and a few more " * 300,
         "no space": "".join(chr(0x4E00 + i * i % 997) for i in range(9000)),
         "rules": ("=" * 70 + "\n" + " " * 40 + "x\n") * 100,
         "runs": ("word " + " " * 900 + "x = 1;\n") * 20}

@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "sentencepiece"])
def test_a_long_text_is_tokenised_in_parts(text, kind, monkeypatch):
    """All of it, with few tokens that differ from those of one call; of three ways in which
    tokenizers split text: GPT-2's, Llama 3's and Llama 2's. No more is read than is needed."""
    monkeypatch.setattr(support.text, "PIECE", 3000)
    tokenizer, text, read = make_tokenizer(kind), TEXTS[text], []
    pieces = [text[i:i + 777] for i in range(0, len(text), 777)]
    ids, whole = tokenize(pieces, tokenizer, 1 << 40).tolist(), tokenizer(text).input_ids
    n_seams = len(text) // 1500
    assert abs(len(ids) - len(whole)) <= 3 * n_seams and ids.count(0) == 1  # BOS
    assert ids[:20] == whole[:20]
    if kind != "sentencepiece":  # which adds a space before each part
        joined = ["".join(tokenizer.convert_ids_to_tokens(x)) for x in (ids, whole)]
        assert joined[0] == joined[1]
    first = tokenize((read.append(piece) or piece for piece in pieces), tokenizer, 20)
    assert first.tolist() == ids[:20] and len(read) == 4  # the first 3,000 characters

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

def test_a_byte_order_mark_is_no_text(tmp_path):
    row = {"context": "The", "choices": ["a", "b"], "label": 0}
    for mark in ("", "\ufeff"):
        (tmp_path / "t.txt").write_text(mark + "The year", encoding="utf-8")
        assert "".join(read_text(str(tmp_path / "t.txt"), "valid", "tiny")) == "The year"
        (tmp_path / "t.jsonl").write_text(mark + json.dumps(row), encoding="utf-8")
        assert len(load_task(str(tmp_path / "t.jsonl"), None, None, make_tokenizer("gpt2"), 9)) == 1

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

# ---------------------------------------------------------------- files
METADATA = {"model": "small", "model_sha256": "", "settings": {"dtype": "float32"},
            "largest_z": 3.5}

def test_saved_sae_is_the_same_function(tmp_path):
    sae, x, folder = small_sae(), vectors_of(50), tmp_path / "layer0.key"
    save_sae(folder, sae, METADATA)
    loaded, metadata = load_sae(folder)
    torch.testing.assert_close(through(loaded, x, 8), through(sae, x, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode(x, 8)[0], sae.encode(x, 8)[0] * sae.scale)  # folded
    assert loaded.scale == 1 and loaded.k == 8 and {k: metadata[k] for k in METADATA} == METADATA
    assert loaded.largest_z == 3.5
    save_sae(folder, sae, {"model": "small", "marks": {}})  # as told models apart before
    with pytest.raises(sta.UsageError, match="or of an older version; train again"):
        load_sae(folder)

@pytest.mark.parametrize("k", [0, -1, 41, 8.5, "8", None])
def test_an_sae_without_a_budget(tmp_path, k):
    save_sae(tmp_path, small_sae(), METADATA)
    cfg = read_json(tmp_path / "cfg.json")
    write_atomic(tmp_path / "cfg.json", json.dumps({**cfg, "k": k}))
    with pytest.raises(sta.UsageError, match="missing, truncated or corrupt"):
        load_sae(tmp_path)

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
        metadata = {**METADATA, "model_sha256": model_hash(model, [key[0]])}
        save_sae(tmp_path / f"layer{key[0]}.{key[1]}", sae, metadata)
    (tmp_path / "layer_old.key").mkdir()  # somebody's own
    assert set(load_saes(tmp_path, model)[0]) == set(sta.kv_sites(model))
    with pytest.raises(sta.UsageError, match="SAEs of small in float32, not of this model in"):
        load_saes(tmp_path, small_model("qwen2", vocab_size=64))
    save_sae(tmp_path / "layer0.key", small_sae(24), METADATA)
    with pytest.raises(sta.UsageError, match="not of this model"):
        load_saes(tmp_path, model)

@pytest.mark.parametrize("change", [
    lambda a: a.k_proj.weight.neg_(), lambda a: a.v_proj.weight.mul_(1.02),
    lambda a: a.k_proj.bias[3].add_(0.5), lambda a: a.v_proj.weight[5].neg_(),
    lambda a: a.v_proj.weight[2, 3].add_(0.01),
    lambda a: a.k_proj.register_buffer("packed", torch.ones(3))])
def test_the_hash_tells_models_apart_but_not_dtypes(change):
    model, other = small_model("qwen2"), small_model("qwen2")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.normal_()
    other.load_state_dict(model.state_dict())
    known = {layer: model_hash(model, [layer]) for layer in (0, 1)}
    assert known == {layer: model_hash(other.bfloat16(), [layer]) for layer in (0, 1)}
    assert known[0] != known[1] and model_hash(model, [0, 1]) not in known.values()
    other = small_model("qwen2")
    other.load_state_dict(model.state_dict())
    change(other.model.layers[1].self_attn)
    assert model_hash(other, [1]) != known[1] and model_hash(other, [0]) == known[0]

def test_failed_write_loses_nothing(tmp_path):
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(sta.UsageError, match="cannot write .*; nothing was replaced"):
        write_atomic(tmp_path / "file", "\ud800 is no character")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["file"]

def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """Each replaces it as a whole, though one begins and ends while the other is at it."""
    path, replace, there = tmp_path / "file", os.replace, []
    def meet(*names):
        monkeypatch.setattr(os, "replace", replace)
        write_atomic(path, "short")
        there.append(path.read_text(encoding="utf-8"))
        replace(*names)
    monkeypatch.setattr(os, "replace", meet)
    write_atomic(path, "a longer one")
    assert there == ["short"] and path.read_text(encoding="utf-8") == "a longer one"
    assert os.listdir(tmp_path) == ["file"]

class Packed(torch.nn.Module):
    """A projection as GPTQ or BitNet have it: integers in buffers, and no parameter."""
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("scales", linear.weight.abs().amax(1) / 127)
        self.register_buffer("qweight", (linear.weight / self.scales[:, None]).round().int())

    def forward(self, x):
        return x @ (self.qweight * self.scales[:, None]).T

def test_projections_without_a_weight():
    """They are told apart by whatever tensors they have, to the last bit; without any, refused."""
    model = small_model("llama")
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    check_type(model)
    packed, before = model.model.layers[1].self_attn.v_proj, model_hash(model, [1])
    packed.qweight += 1 << 20
    assert model_hash(model, [1]) != before
    large = model_hash(model, [1])
    packed.qweight[0, 0] ^= 1  # which bfloat16 would not see
    assert model_hash(model, [1]) != large
    for packed in (model.model.layers[1].self_attn.k_proj, model.model.layers[1].self_attn.v_proj):
        packed.forward = functools.partial(torch.matmul, other=packed(torch.eye(64)))
        del packed.qweight, packed.scales
    with pytest.raises(sta.UsageError, match="its projections hold no tensors by which to know"):
        check_sites(model)

def model_folder(folder, seed=0, family="llama", vocab_size=2048, **options):
    """A small random model with tiny's tokenizer, as users save their own."""
    model = small_model(family, vocab_size=vocab_size, **options)
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
    results = ["--saes", tmp_path, "--max-tokens", 256, "--out", tmp_path / "results", "--text",
               ROOT / "tiny" / "valid.txt"]
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
    assert script(evaluate, "--model", a, *results, "--dtype", "float16") == 2
    assert_one_line(capsys.readouterr().err, "SAEs of .* in float32, not of this model in "
                                             "torch.float16; float16 goes with float16 only")
    assert script(evaluate, "--model", a, *results, "--dtype", "bfloat16") == 0
    rows = {x["name"]: x for x in read_json(tmp_path / "results" / "checkpoint-100.json")["rows"]}
    assert (rows["dual"]["k_key"], rows["dual"]["k_val"]) == (2, 4)  # the SAEs' own budgets
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

def test_any_terminal():
    """One that knows ASCII only; a reader that goes away, as `| head -1` does."""
    def start(statement):
        return subprocess.Popen(
            [sys.executable, "-c",
             f"from support import files\nfiles.run_main(lambda: {statement})"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "ascii"})
    ascii, plain, inside = map(start, (
        "print('±')", "[print('line') for _ in range(100_000)]",
        "[files.explain('x').__enter__() or print('line') for _ in range(100_000)]"))
    assert ascii.communicate() == ("?\n", "")
    for run in (plain, inside):
        assert run.stdout.readline() == "line\n"
        run.stdout.close()
        assert run.wait() == 141 and run.stderr.read() == ""

SOURCES = [path for folder in ("", "support", "beyond", "tiny", "figures")
           for path in sorted((ROOT / folder).glob("*.py"))]

@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_any_machine(path):
    """Each file is Python 3.10's, so that this is told the version; imports nothing that Windows
    lacks; and reads and writes text as UTF-8, whatever the locale."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for name in node.names}
    assert not imported & {"resource", "fcntl", "pwd", "grp", "termios", "posix"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        text = function == "open" and not any("b" in ast.unparse(x) for x in call.args[1:])
        if text or function.endswith(("read_text", "write_text")) and "." in function:
            assert "utf-8" in named.get("encoding", ""), f"{path.name}:{call.lineno}"
        assert "text" not in named or function != "subprocess.run", f"{path.name}:{call.lineno}"

def test_other_versions_of_python(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert script(plots) == 2
    assert_one_line(capsys.readouterr().err, "Python .*: want 3.11 or newer")

@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed,status", [(">&-", 2), ("2>&-", 2), (">&- 2>&-", 2),
                                           ("> /dev/full", 2)])
def test_output_that_goes_nowhere(closed, status, tmp_path):
    program = "print('x'); raise files.UsageError('told')"
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable,
         f"from support import files\ndef main(): {program}\nfiles.run_main(main)"],
        cwd=ROOT, capture_output=True, env=buffered)
    assert result.returncode == status and b"Traceback" not in result.stderr
    assert result.stderr.count(b"\n") <= 1
    assert ("2>&-" in closed) == (result.stderr == b"")

def test_a_step_shorter_than_the_clocks_tick(tmp_path, monkeypatch):
    for clock in ("time", "perf_counter"):
        monkeypatch.setattr(train_sae.time, clock, lambda: 1.0)
    assert script(train_sae, *SHORT[:-1], "1", "--tokens", 2048, "--out", tmp_path) == 0

# ---------------------------------------------------------------- tasks
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
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)

def test_loglikelihoods_are_those_of_one_request_at_a_time(tmp_path, capsys):
    """Against Hugging Face on each request alone; with cut contexts, spaces, an empty context."""
    model, tokenizer, _ = load_model("tiny")
    rows = [json.loads(line) for line in open(ROOT / "tiny" / "cloze.jsonl", encoding="utf-8")][:6]
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

def test_an_empty_context_needs_a_token_to_begin_with(tmp_path):
    tokenizer = make_tokenizer.__wrapped__("gpt2")
    row = {"context": " ", "choices": ["a", "b"], "label": 0}
    path = write_jsonl(tmp_path / "t.jsonl", [row])
    assert load_task(path, None, None, tokenizer, 9)[0].requests[0][0] == [0]
    tokenizer.bos_token = None
    with pytest.raises(sta.UsageError, match="t.jsonl line 1: .* with neither BOS nor EOS"):
        load_task(path, None, None, tokenizer, 9)

@pytest.mark.parametrize("task,row", [
    ("t", {"context": "c", "choices": ["a", "b"], "label": 0.5}),
    ("t", {"context": "c", "choices": ["a", "b"], "label": "1.0"}),
    ("t", {"context": "c", "choices": ["a", "b"], "label": math.nan}),
    ("winogrande", {**FORMATS["winogrande"][0], "answer": 1.9}),
    ("boolq", {**FORMATS["boolq"][0], "label": None})])
def test_a_label_is_a_whole_number(task, row, tmp_path):
    path = write_jsonl(tmp_path / f"{task}.jsonl", [row])
    with pytest.raises(sta.UsageError, match=f"{task}.jsonl line 1: not a row of"):
        load_task(path if task == "t" else task, tmp_path, None, make_tokenizer("gpt2"), 99)

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

def test_a_token_across_the_join_is_named(tmp_path):
    """A word-level tokenizer that splits nowhere: context and choice are one unknown word."""
    from tokenizers import Tokenizer, models
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(
        models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    path = write_jsonl(tmp_path / "t.jsonl", [{"context": "c", "choices": ["a", "b"], "label": 0}])
    with pytest.raises(sta.UsageError, match=r"choices of \[0, 0\] tokens: want"):
        load_task(path, None, None, tokenizer, 256)

# ---------------------------------------------------------------- results
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

def test_training_that_diverges(tmp_path, capsys):
    assert script(train_sae, *SHORT, "--lr", "1e38", "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "an SAE is no longer finite; start again with a --lr")
    assert not list(tmp_path.rglob("*.safetensors"))

def test_a_loss_too_large_for_exp(tmp_path):
    dense = torch.ones(4, dtype=torch.float64)
    row = evaluate.compare(dense * 1000, dense)
    assert row["perplexity"] == row["ratio"] == row["ratio_ci95"][1] == math.inf
    assert json.loads(json.dumps(row)) == row

@pytest.fixture
def interrupted(monkeypatch):
    """A function that makes evaluate.py stop at the row of a name, and lists the rows it scored."""
    scored, stop_at, window_losses = [], [], evaluate.window_losses

    def record(forward, windows, model, name):
        if name in stop_at:
            raise KeyboardInterrupt
        scored.append(name)
        return window_losses(forward, windows, model, name)

    def run(*argv, stop=None):
        scored.clear()
        stop_at[:] = [stop]
        return script(evaluate, "--max-tokens", 512, "--limit", 2, *argv), list(scored)

    monkeypatch.setattr(evaluate, "window_losses", record)
    return run

def rows_at(path):
    return [row["name"] for row in read_json(path)["rows"]]

def test_interruptions_lose_nothing(trained, evaluated, tmp_path, interrupted, monkeypatch, capsys):
    """Neither the complete result nor what was computed since, however often one stops."""
    shutil.copy(evaluated / "tiny.json", tmp_path)
    monkeypatch.setenv("PATH", "")  # and where there is no git
    argv = "--saes", trained / "tiny", "--out", tmp_path
    for stop, names in (("values", ["dense", "means", "keys"]), ("keys", ["dense", "means"])):
        assert interrupted(*argv, stop=stop)[0] == 130
        assert len(rows_at(tmp_path / "tiny.json")) == 7
        unfinished = tmp_path / "tiny.json.unfinished"
        assert rows_at(unfinished) == names
    assert read_json(unfinished)["commit"] is None
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 0
    assert "tiny.json.unfinished: not complete, and not drawn" in capsys.readouterr().out
    assert interrupted(*argv, "--resume") == (0, ["keys", "values", "dual", "uniform", "reverse"])
    assert len(rows_at(tmp_path / "tiny.json")) == 7 and not unfinished.exists()
    assert interrupted(*argv, "--resume") == (0, [])

def test_rows_are_joined_only_if_they_belong_together(trained, tmp_path, interrupted):
    """Rows of other labels, another text or SAEs trained anew are computed again: the result is
    that of a fresh run."""
    saes, text = tmp_path / "saes", tmp_path / "text.txt"
    shutil.copytree(trained, saes)
    questions = [{"context": "The", "choices": ["year", "sea"], "label": i % 2} for i in range(2)]
    def write_input(labels=1, word="year"):
        write_jsonl(tmp_path / "t.jsonl", [{**row, "label": labels * row["label"]}
                                           for row in questions])
        text.write_text(f"The {word} was cold. " * 200, encoding="utf-8")
    def change_sae():
        sae, metadata = load_sae(saes / "tiny" / "layer1.key")
        sae.W_dec[3] *= -1
        save_sae(saes / "tiny" / "layer1.key", sae, metadata)
    write_input()
    argv = ["--saes", saes, "--out", tmp_path, "--text", text, "--tasks", tmp_path / "t.jsonl"]
    every = ["dense", "means", "keys", "values", "dual", "uniform", "reverse"]
    assert interrupted(*argv, stop="dual")[0] == 130
    for change, anew in ((lambda: write_input(labels=0), every), (change_sae, every[1:]),
                         (lambda: write_input(labels=0, word="sea"), every)):
        change()
        assert interrupted(*argv, "--resume") == (0, anew)
        joined = read_json(tmp_path / "tiny.json")["rows"]
        assert interrupted(*argv) == (0, every)
        for row, fresh in zip(joined, read_json(tmp_path / "tiny.json")["rows"]):
            assert {**row, "date": ""} == {**fresh, "date": ""}

def test_what_rows_are_made_from(tmp_path, monkeypatch):
    """The program's files, libraries, device, options and codecs; not the commit or the date."""
    about = {name: "x" for name in ("commit", "date", "command", "device", "dtype", "torch")}
    codecs = {0: sta.DualBudget(small_sae(), small_sae(seed=1))}
    row, args = evaluate.Row("dual", codecs), types.SimpleNamespace(k_key=8, only="", resume=False)
    windows = tokens_of(2, 8)
    def made(about=about, args=args, row=row, *others):
        return inputs_hash(about, args, row, *(others or [windows]))
    first = made()
    for same in ("commit", "date", "command"):
        assert made({**about, same: "y"}) == first
    assert made(args=types.SimpleNamespace(k_key=8, only="d", resume=True)) == first
    others = [made({**about, name: "y"}) for name in ("device", "dtype", "torch")]
    others += [made(args=types.SimpleNamespace(k_key=9, only="")),
               made(about, args, row, windows.view(4, 4)), made(about, args, row, windows + 1),
               made(about, args, evaluate.Row("dual", {})),
               made(about, args, evaluate.Row("dual", codecs, (8, 16))),
               made(about, args, evaluate.Row("dual", codecs, settings={"seed": 1}))]
    codecs[0].value_sae.b_enc.data[3] += 1
    first, others = made(), [first, *others]
    shutil.copytree(ROOT / "support", tmp_path / "support")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    def of_program():
        return made({**about, "program_sha256": results.program_hash()})
    others.append(of_program())
    with open(tmp_path / "support" / "test_support.py", "a", encoding="utf-8") as file:
        file.write("\n")
    assert of_program() == others[-1]
    with open(tmp_path / "support" / "tasks.py", "a", encoding="utf-8") as file:
        file.write("\n")
    others.append(of_program())
    assert len({first, *others}) == 1 + len(others)

def commit_all(folder):
    for words in (["init"], ["add", "-A"], ["commit", "-m", "all"]):
        subprocess.run(["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x", *words],
                       check=True, capture_output=True)

NEEDS_GIT = pytest.mark.skipif(not shutil.which("git"), reason="no git on this machine")

@NEEDS_GIT
def test_a_row_that_is_kept_keeps_its_commit_and_date(trained, tmp_path, interrupted, monkeypatch):
    """A commit that touches no file of the program costs nothing; one that does costs all rows."""
    ours = tmp_path / "ours"
    monkeypatch.setattr(results, "ROOT", ours)
    argv, commits = ["--saes", trained, "--out", tmp_path], []
    every = ["dense", "means", "keys", "values", "dual", "uniform", "reverse"]
    for file, stop, scored in (("program.py", "keys", every[:2]), ("notes.txt", None, every[2:]),
                               ("program.py", None, every)):
        write_atomic(ours / file, str(len(commits)))
        commit_all(ours)
        commits.append(results.commit())
        assert interrupted(*argv, "--resume", stop=stop)[1] == scored
        if stop:
            first = read_json(tmp_path / "tiny.json.unfinished")["rows"]
            continue
        rows = read_json(tmp_path / "tiny.json")["rows"]
        if file == "notes.txt":
            assert rows[:2] == first and {row["commit"] for row in first} == {commits[0]}
        assert all(row["commit"] == commits[-1] for row in rows if row["name"] in scored)

@NEEDS_GIT
def test_the_commit_is_our_own_and_says_what_changed(tmp_path, monkeypatch):
    ours, model = tmp_path / "around" / "ours", small_model("llama")
    ours.mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", ours)
    write_atomic(ours / "file", "1")
    for folder in (ours.parent, ours):
        assert results.provenance(model)["commit"] is None  # a copy, also inside another one
        commit_all(folder)
    clean = results.provenance(model)["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (ours / "new.py").write_text("1", encoding="utf-8")  # which git does not track
    assert results.provenance(model)["commit"] == f"{clean}-dirty"
    (ours / "new.py").unlink()
    (ours / "file").write_text("2", encoding="utf-8")
    assert results.provenance(model)["commit"] == f"{clean}-dirty"

def test_a_command_can_be_run_again(monkeypatch):
    words = ["python", "evaluate.py", "--out", "my results", "--model", "a$b'c"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert shlex.split(results.provenance(small_model("llama"))["command"]) == words

def test_nan_is_no_choice():
    """Of a row, accuracies with nan in them are nan; of the dense model, nan is an error."""
    model, tokenizer, _ = load_model("tiny")
    questions = [Question([((5, 6), (7,)), ((5, 6, 8), (9, 10))], [1, 2], 0)] * 3
    windows = tokens_of(2, 64)
    def broken(length):
        @contextlib.contextmanager
        def forward(model):
            yield lambda ids: model(ids).logits * (torch.nan if ids.shape[1] == length else 1)
        return evaluate.Row("broken", {}, make_forward=forward)
    with torch.no_grad():
        scored = windows, {"t": questions}, {}, model(windows).logits, 1
        dense = evaluate.score_row(evaluate.Row("dense", {}), None, model, *scored)
        for length in (2, 4):  # the first choice's tokens; the second's
            row = evaluate.score_row(broken(length), dense, model, *scored)
            for column in ("acc", "acc_norm", "delta_acc"):
                assert math.isfinite(dense["tasks"]["t"][column])
                assert math.isnan(row["tasks"]["t"][column]), (length, column)
            assert math.isfinite(row["perplexity"])
        for length in (2, 4, 64):
            with pytest.raises(sta.UsageError, match="the model's own loss is not finite"):
                evaluate.score_row(broken(length), None, model, *scored)

def test_next_tokens_are_compared_as_in_float64():
    model, windows = small_model("llama"), tokens_of(3, 20)
    codecs = {0: across(lambda keys, values, live: (keys / 2, -values))}
    with torch.no_grad():
        exact = model(windows).logits
        with sta.reconstruct(model, codecs):
            coded = model(windows).logits
    found = evaluate.next_tokens(coded, exact)
    p, q = (np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum(-1, keepdims=True)
            for x in (exact, coded))
    kl = (p * (np.log(p) - np.log(q))).sum(-1).flatten()
    assert found == pytest.approx({"kl": kl.mean(), "kl_p99": np.quantile(kl, 0.99),
                                   "same_top": (p.argmax(-1) == q.argmax(-1)).mean()}, abs=1e-6)
    assert 0 < found["kl"] < found["kl_p99"] and found["same_top"] < 1
    same = evaluate.next_tokens(exact, exact)
    assert same == {"kl": 0, "kl_p99": 0, "same_top": 1}

def test_plots(evaluated, tmp_path, capsys):
    assert script(plots, "--results", evaluated, "--out", tmp_path) == 0
    image = plots.plt.imread(tmp_path / "tiny-overview.png")
    assert image.shape[1] > 600 and image[..., :3].std() > 0.05  # something is drawn
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 2
    assert_one_line(capsys.readouterr().err, "no results; first run: python train_sae.py")
    result = read_json(evaluated / "tiny.json")
    result["rows"][4] |= {"ratio": math.inf, "ratio_ci95": [math.inf, math.inf]}
    for curves in result["curves"].values():  # of an SAE with six latents
        for kind in sta.KINDS:
            curves[kind] = [point for point in curves[kind] if point["k"] < 8]
            curves[f"k_{kind}"], curves[f"elbow_{kind}"] = 6, 2
            curves[kind][1]["fvu"] = math.nan if kind == "key" else curves[kind][1]["fvu"]
    result["model"] = "a$b_{$"  # no formula
    write_atomic(tmp_path / "tiny.json", json.dumps(result))
    assert script(plots, "--results", tmp_path, "--out", tmp_path) == 0
    capsys.readouterr()
    for other in (json.dumps({**result, "rows": [{}]}), "{", '"rows"', "[]", "3", "null"):
        write_atomic(tmp_path / "tiny.json", other)
        assert script(plots, "--results", tmp_path, "--out", tmp_path) == 2
        assert_one_line(capsys.readouterr().err, "tiny.json: not a result of evaluate.py")

# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("argv,message", [
    (["--model", "gpt5"], "--model gpt5: want a folder, one of tiny, yi-6b"),
    (["--model", "no-one/nothing"], "--model no-one/nothing: .* or a hub id that is reachable"),
    (["--layer", "6"], "--layer 6: .* layers 0 to 5"),
    (["--layer", "two"], "--layer two: want all, 12, 0-7 or 3,9"),
    (["--k-key", "0"], "--k-key 0: want 1 to 512 = --n-latents"),
    (["--n-latents", "40000"], "--n-latents 40000: want 1 to 32,768"),
    (["--tokens", "0"], "--tokens 0: want 1 to"),
    (["--lr", "nan"], "--lr nan, --seed 0: want a finite rate above 0"),
    (["--seed", "-1"], "--seed -1: want .* a seed of 0 to 2.40"),
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
    write_atomic(tmp_path / "code" / "config.json", json.dumps(
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
    (["--tasks", "{tmp}/label.jsonl"], "label.jsonl line 1: .* label 2, choices of .1, 1. tokens"),
    (["--tasks", "{tmp}/nothing.jsonl"], "nothing.jsonl line 1: .* choices of .1, 0. tokens: want"),
    (["--tasks", "{tmp}/long.jsonl"], "long.jsonl line 1: .* each of 1 to 256 tokens of its own"),
    (["--tasks", "{tmp}/short.txt.jsonl"], "short.txt.jsonl line 1: not JSON"),
    (["--tasks", "openbookqa", "--task-dir", "{tmp}"], "line 1: not a row of openbookqa"),
    (["--limit", "0"], "--limit 0: want 1 or more"),
    (["--tasks", "{tmp}/label.jsonl,{tmp}/../label.jsonl"], "--tasks: two of label, label have"),
    (["--rows", "int8"], "--rows int8: there is no beyond/int8.py"),
    (["--rows", "../sta"], "--rows ../sta: there is no beyond/../sta.py"),
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
        write_atomic(tmp_path / "older" / "tiny.json", '{"rows": []}')
        write_jsonl(tmp_path / f"{name}.jsonl", [
            {"context": "c", "choices": choices, "label": label}])
    argv = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    assert script(evaluate, "--saes", trained, "--out", tmp_path, *argv) == 2
    assert_one_line(capsys.readouterr().err, message)

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
                with contextlib.redirect_stdout(io.StringIO()):  # of training
                    verdict, reason = "works", check() or ""
            except Exception as error:
                verdict, reason = "refused", error
                verdict = "refused" if isinstance(error, sta.UsageError) else "FAILS"
        verdicts[verdict] += 1
        print(f"{name:26} {verdict:9}", " ".join(str(reason).split())[:100])
    print(dict(verdicts))
