"""A cache for transformers that stores codes: of any codec with sta.py's interface.

    python -m beyond.cache --contexts 64,128  # what a token costs: results/<model>-cache.json
    python evaluate.py --rows additive,cache  # rows through it: dual, and those of other --rows

    with compress(model, codecs, sink=1, recent=128, keep=0) as cache:
        model.generate(ids, past_key_values=cache)  # since transformers 5.24 cache=cache

The first `sink` real tokens of a text and its newest `recent` stay exact [sinks: arXiv 2309.17453;
recent tokens: KIVI, arXiv 2402.02750]; older ones are codes. Once a quarter of `recent` is there
beyond it, that quarter is coded at once. Keys are coded as they are before RoPE; when codes are
read, RoPE is applied again. Tokens that a chunk pushes out of the newest `recent` are coded before
attention reads them, even for the queries of the same chunk.
To decode all tokens for each new one takes as long as the model itself, or longer. So the first
`keep` of them also stay decoded, which takes as many bytes as a dense cache; cache.forget_decoded()
frees those.
Greedy, sampled and beam search, padding on either side, crops and chunks work, for the types of
model in ROTARY with plain RoPE. Non-goal: attention to codes that are not decoded.
"""
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import time

import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer

import evaluate
import sta
from beyond import parse_args, pick, table
from support.files import run_main, write_atomic
from support.results import check_pattern, load_run

N_TIMED = 32  # tokens: at recent = 128, a quarter of it is coded once among them
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
ARGUMENT = ("cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters
            else "past_key_values")  # its name before transformers 5.24

def rotate(x, cos, sin):
    """RoPE as these types of model have it: x (B, T, H, D); cos, sin (B, T, D) -> (B, T, H, D)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]

class CodedLayer(DynamicLayer):
    """One layer of CodedCache. It keeps lists of tensors (B, T, ...):
        codes    what the codec stored of the oldest tokens
        exact    keys after RoPE and values of the newest tokens
        sinks    the same of the first tokens of each text
        decoded  of the oldest `keep` tokens that have codes, what attention reads: keys after
                 RoPE and values, with the sinks in their places
        slots    kept by the first layer for all: the positions (B, T) of all tokens so far, and
                 whether each is a sink"""

    def __init__(self, cache, codec):
        super().__init__()
        self.cache, self.codec = cache, codec
        self.reset()

    def reset(self):
        self.is_initialized, self.codes, self.exact, self.sinks = False, [], [], []
        self.decoded, self.slots = [], []

    def n_codes(self):
        return self.codes[0].shape[1] if self.codes else 0

    def get_seq_length(self):
        return self.n_codes() + (self.exact[0].shape[1] if self.exact else 0)

    def replace_all(self, function):
        """Each tensor becomes function(tensor)."""
        for name in ("codes", "exact", "sinks", "decoded", "slots"):
            setattr(self, name, [function(x) for x in getattr(self, name)])

    def reorder_cache(self, beam_idx):
        self.replace_all(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.replace_all(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove):
        """Forget the newest -tokens_to_remove tokens: exact ones first, then codes."""
        if tokens_to_remove > 0:  # as transformers has it since 5.24
            raise ValueError(f"crop({tokens_to_remove}): want minus the number of tokens to forget")
        if self.is_initialized:
            left = max(0, self.get_seq_length() + tokens_to_remove)
            n_codes = min(left, self.n_codes())
            self.exact = [x[:, :left - n_codes].clone() for x in self.exact]
            self.codes = [x[:, :n_codes].clone() for x in self.codes]
            self.decoded = [x[:, :n_codes].clone() for x in self.decoded]
            self.slots = [x[:, :left].clone() for x in self.slots]

    def update(self, keys, values, *args, **kwargs):
        """New keys (after RoPE) and values (B, H, T, D) -> all of them, as attention sees them."""
        if self.cache.slot_data is None:
            raise sta.UsageError("this cache works only inside `with compress`")
        slot_data = [x.to(keys.device) for x in self.cache.slot_data]
        new = [x.transpose(1, 2) for x in (keys, values)]  # (B, T, H, D)
        if not self.is_initialized:
            self.exact = [x[:, :0] for x in new]
            self.sinks = [x.new_zeros(len(x), self.cache.sink, *x.shape[2:]) for x in new]
            self.is_initialized = True
        self.exact = [torch.cat([old, x], 1) for old, x in zip(self.exact, new)]
        block = max(1, self.cache.recent // 4)
        n_leaving = max(0, self.exact[0].shape[1] - self.cache.recent) // block * block
        if n_leaving:
            self.code(n_leaving, *slot_data)
        older = self.read_codes(*slot_data)
        return [torch.cat(parts, 1).transpose(1, 2) for parts in zip(older, self.exact)]

    def code(self, n, cos, sin, is_sink):
        """The oldest n exact tokens become codes. cos, sin (B, slots, D) and is_sink (B, slots) are
        of all tokens so far."""
        start = self.n_codes()
        keys, values = leaving = [x[:, :n] for x in self.exact]
        row, slot, place = sinks_among(is_sink, start, start + n)
        for kept, x in zip(self.sinks, leaving):
            kept[row, place] = x[row, slot]
        c, s = (x[:, start:start + n].float() for x in (cos, sin))
        # RoPE undone; c and s are rounded, and some kinds of RoPE stretch them
        keys = rotate(keys.float(), c, -s) / (c.square() + s.square())[:, :, None]
        codes = self.codec.encode(keys, values.float())
        old = self.codes or [x[:, :0] for x in codes]
        self.codes = [torch.cat(parts, 1) for parts in zip(old, codes)]
        self.exact = [x[:, n:].clone() for x in self.exact]

    def read_codes(self, cos, sin, is_sink):
        """Keys after RoPE and values (B, n_codes, H, D) of the tokens that have codes."""
        whole = list(self.decoded) or [x[:, :0] for x in self.exact]
        start, end = whole[0].shape[1], self.n_codes()
        if start == end:
            return whole
        keys, values = self.codec.decode([x[:, start:] for x in self.codes])
        keys = rotate(keys, cos[:, start:end].float(), sin[:, start:end].float())
        row, slot, place = sinks_among(is_sink, start, end)
        for i, (x, kept) in enumerate(zip((keys, values), self.sinks)):
            x = x.to(kept.dtype)
            x[row, slot] = kept[row, place]
            whole[i] = torch.cat([whole[i], x], 1)
        if start < self.cache.keep:
            self.decoded = [x[:, :self.cache.keep].clone() for x in whole]
        return whole

    def tensors(self):
        return self.codes + self.exact + self.sinks + self.decoded + self.slots

def sinks_among(is_sink, start, end):
    """is_sink (B, slots) -> of each sink in slots start to end: its row, its slot counted from
    start, and its place among the row's sinks."""
    row, slot = is_sink[:, start:end].nonzero(as_tuple=True)
    return row, slot, is_sink.cumsum(1)[row, start + slot] - 1

def cache_bytes(cache):
    """Bytes of every tensor that a cache of transformers stores, codes or dense."""
    tensors = [x for layer in cache.layers for x in (
        layer.tensors() if isinstance(layer, CodedLayer) else (layer.keys, layer.values))]
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)

class CodedCache(Cache):
    """A cache of transformers that stores codes, made by `compress`."""
    def __init__(self, sink, recent, keep):
        super().__init__(layers=[])
        self.sink, self.recent, self.keep = sink, recent, keep
        self.slot_data = None  # in a call: cos, sin (B, slots, D), is_sink (B, slots)

    def forget_decoded(self):
        """Only codes remain; they are decoded again when the next token comes."""
        for layer in self.layers:
            layer.decoded = []

    def reset(self):
        super().reset()
        self.layers[:] = [layer if isinstance(layer, CodedLayer) else DynamicLayer()
                          for layer in self.layers]  # transformers 5.17 fills those with zeros

def check_rope(model):
    """Raises UsageError at a type of model whose RoPE `rotate` cannot undo."""
    config = model.get_decoder().config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ROTARY or rope not in ("default", "linear", "llama3"):
        raise sta.UsageError(f"the cache of codes takes {', '.join(ROTARY)} with plain RoPE; this "
                             f"is {config.model_type} with {rope}")

@contextlib.contextmanager
def compress(model, codecs, sink=1, recent=128, keep=0):
    """`with compress(model, {layer: codec}) as cache: model(..., past_key_values=cache)`.
    Raises UsageError as `check_rope` does, for absent layers, and for use without the cache."""
    check_rope(model)
    decoder, n_layers = model.get_decoder(), model.get_decoder().config.num_hidden_layers
    for layer in codecs.keys() - set(range(n_layers)):
        raise sta.UsageError(f"layer {layer}: the model has layers 0 to {n_layers - 1}")
    cache = CodedCache(sink, recent, keep)
    cache.layers += [CodedLayer(cache, codecs[layer]) if layer in codecs else DynamicLayer()
                     for layer in range(n_layers)]
    holder = cache.layers[min(codecs)]  # of the slots

    def find_sinks(call):
        if call.get("cache", call.get("past_key_values")) is not cache:
            raise sta.UsageError(f"inside compress, give the model {ARGUMENT}=the cache")
        cache.new_sinks = sta.live_tokens(call, 0) & ~sta.live_tokens(call, sink)  # (B, T)

    def extend_slots(module, args, kwargs, output):  # RoPE's angles of all slots: (B, slots, D)
        positions = kwargs.get("position_ids", args[-1]).int().expand(len(args[0]), -1)  # (B, T)
        new = positions, cache.new_sinks.to(positions.device)
        old = holder.slots or [x[:, :0] for x in new]
        holder.slots = [torch.cat([x.to(y.device), y], 1) for x, y in zip(old, new)]
        if holder.slots[1].sum(1).max() > sink:
            raise sta.UsageError("the cache of codes takes one text per row; these are packed")
        cache.slot_data = *module.forward(args[0], holder.slots[0]), holder.slots[1]

    def forget_slot_data(decoder, args, output):
        cache.slot_data = None

    with contextlib.ExitStack() as hooks:
        for hook in (decoder.rotary_emb.register_forward_hook(extend_slots, with_kwargs=True),
                     decoder.register_forward_hook(forget_slot_data)):
            hooks.callback(hook.remove)
        with sta.watch(model, [], None, find_sinks):
            yield cache

# ------------------------------------------------------------------ the rows of evaluate.py
@contextlib.contextmanager
def through_cache(model, row, sink, recent=128, chunk=128):
    """A function ids (B, T) -> logits that reads chunk by chunk, in place of
    evaluate.through_hooks. The row's bytes are those that the cache holds then."""
    with compress(model, row.codecs, sink, recent) as cache:
        def forward(ids):
            cache.reset()
            logits = torch.cat([model(input_ids=part, **{ARGUMENT: cache}).logits
                                for part in ids.split(chunk, 1)], 1)
            if row.bytes_per_token is None:
                row.bytes_per_token = cache_bytes(cache) / ids.numel()
            return logits
        yield forward

def can_be_stored(row):
    """Codecs that look across tokens, or whose codes have no fixed size per token, cannot."""
    return row.codecs and row.name != "l1" and not any(
        hasattr(codec, "roundtrip") for codec in row.codecs.values())

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: the dual budget, and what the --rows before this one added."""
    check_rope(model)
    new_rows = []
    for row in before:
        if can_be_stored(row) and row.name not in ("means", "uniform", "reverse"):
            name = "cache" if row.name == "dual" else f"cache {row.name}"
            row = dataclasses.replace(row, name=name, method=None)
            row.make_forward = functools.partial(through_cache, row=row, sink=args.sink)
            new_rows.append(row)
    if not new_rows:
        raise sta.UsageError("--rows cache: needs SAEs (python train_sae.py), or rows before it")
    return new_rows

# ------------------------------------------------------------------ what a token costs
@torch.no_grad()
def time_tokens(model, row, ids, args):
    """Token ids (1, T) -> [{name, context, keep, token_ms, bytes}] of further tokens after T - 1,
    with nothing kept decoded, and with all. ms are a mean, as coding falls on few tokens."""
    context, costs = ids.shape[1] - 1, []
    dense = contextlib.nullcontext(transformers.DynamicCache(config=model.config))
    coded = compress(model, row.codecs, args.sink, args.recent) if row.codecs else dense
    with coded as cache:
        for part in ids[:, :-1].split(512, 1):
            model(part, **{ARGUMENT: cache}, logits_to_keep=1)
        for kept in (False, True) if row.codecs else (False,):
            cache.keep = context + 1 + N_TIMED if kept else 0
            model(ids[:, -1:], **{ARGUMENT: cache})  # which decodes what is kept
            began = time.time()
            for _ in range(N_TIMED):
                model(ids[:, -1:], **{ARGUMENT: cache}).logits.argmax().item()
            costs.append({"name": row.name, "context": context, "keep": kept,
                          "token_ms": 1000 * (time.time() - began) / N_TIMED,
                          "bytes": cache_bytes(cache)})
            print("after {context:6,} tokens, {name:16} {token_ms:8.1f} ms per token, "
                  "{bytes:13,} bytes".format(**costs[-1])
                  + ", all kept decoded" * kept, flush=True)
    return costs

def token_counts(text):
    """--contexts: "64,128" -> [64, 128]."""
    counts = [int(word) for word in text.split(",")]
    if not 1 <= min(counts) <= max(counts) < 1 << 24:
        raise ValueError("want 1 or more, and what memory can hold")
    return counts

def table_of_costs(lines, model):
    """Of beyond/cache.py --contexts: ms for a further token, and the bytes of the cache. Searched
    codes are decoded as dual ones are; what is kept decoded is the same for all codes."""
    return table("cache", {
        (cost["name"] + ", kept decoded" * cost["keep"], f"{cost['context']:,}"):
        f"{cost['token_ms']:.0f} ms, {cost['bytes'] / 1e6:.1f} MB"
        for line in pick(lines, kind="caches", model=model) for cost in line["caches"]
        if cost["name"] != "searched" and not (cost["keep"] and cost["name"] != "dual")})

def main(argv=None):
    args = parse_args(
        __doc__, argv, "model saes layer k-key k-val sink device dtype out",
        rows=dict(default="", help="files of beyond/ that add rows, such as additive"),
        only=dict(default="", help="of the rows, those whose names match this pattern"),
        contexts=dict(type=token_counts, default=[64, 128],
                      help="after how many tokens to time one more (default 64,128)"),
        recent=dict(type=int, default=16, least=0, help="newest tokens kept exact (default 16)"))
    check_pattern(args.only)
    run = load_run(args, "-cache", needs_saes=not args.rows)
    check_rope(run.model)
    shape = sta.kv_shape(run.model.get_decoder().config)
    dense, *paper = evaluate.paper_rows(run.saes, shape, args.k_key, args.k_val)
    paper = [row for row in paper if row.name == "dual"]
    rows = [dense] + [
        row for row in evaluate.more_rows(paper, run.model, run.tokenizer, run.saes, args)
        if can_be_stored(row) and re.search(args.only, row.name)]
    generator, costs = torch.Generator().manual_seed(0), []
    for context in args.contexts:
        ids = torch.randint(run.tokenizer.n_known, (1, context + 1), generator=generator)
        for row in rows:
            costs += time_tokens(run.model, row, ids.to(run.model.device), args)
    result = {"model": run.name, "caches": costs, **run.about}
    write_atomic(run.path, json.dumps(result, indent=1))
    print(f"wrote {run.path}")

if __name__ == "__main__":
    run_main(main)
