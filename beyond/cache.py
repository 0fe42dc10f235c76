"""A cache for transformers that really stores codes: any codec of sta.py's interface.

    python -m beyond.cache --generate "The President"     # also with --rows, --only
    python evaluate.py --rows additive,cache    # through it: dual, and what other --rows add

    with compress(model, codecs, sink=1, recent=128) as cache:
        model.generate(ids, past_key_values=cache)  # since transformers 5.24 cache=cache

The first `sink` real tokens of a text and its newest `recent` stay exact; older ones are codes.
Keys are coded as they are before RoPE, and turned again when they are read. Tokens that a chunk
pushes out of the newest `recent` are coded before attention reads them, even for its own queries.
Greedy, sampled and beam search, padding on either side, crops and chunks work, for the types of
model in ROTARY with plain RoPE.
The row of evaluate.py reads chunk by chunk, and counts the bytes that are there. --generate writes
results/<model>-cache.json. Sources: arXiv 2309.17453 (sinks), KIVI (recent). Non-goal: speed.
"""
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import time
import types

import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer

import evaluate
import sta
from beyond import parse_args

ROTARY = ("llama", "mistral", "qwen2", "qwen3")
ARGUMENT = ("cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters
            else "past_key_values")  # its name before transformers 5.24

def rotate(x, cos, sin):
    """RoPE as these families have it: x (B, T, H, D); cos, sin (B, T, D) -> (B, T, H, D)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]

class CodedLayer(DynamicLayer):
    """One layer of CodedCache. Every tensor that it keeps has batch and tokens (B, T, ...) first:
    codes, what the codec stored of the oldest tokens; exact, keys after RoPE and values of the
    newest; sinks, the same of the sequence's first tokens. slots, kept by the first layer for all:
    the positions (B, T) of all tokens so far, and whether each is a sink."""

    def __init__(self, cache, codec):
        super().__init__()
        self.cache, self.codec = cache, codec
        self.reset()

    def reset(self):
        self.is_initialized, self.codes, self.exact, self.sinks, self.slots = False, [], [], [], []

    def n_codes(self):
        return self.codes[0].shape[1] if self.codes else 0

    def get_seq_length(self):
        return self.n_codes() + (self.exact[0].shape[1] if self.exact else 0)

    def change(self, how):
        """Each tensor becomes how(tensor)."""
        for name in ("codes", "exact", "sinks", "slots"):
            setattr(self, name, [how(x) for x in getattr(self, name)])

    def reorder_cache(self, beam_idx):
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove):
        """Forget the newest -tokens_to_remove tokens: exact ones first, then codes."""
        if tokens_to_remove > 0:  # as transformers has it since 5.24
            raise ValueError(f"crop({tokens_to_remove}): want minus the number of tokens to forget")
        if self.is_initialized:
            left = max(0, self.get_seq_length() + tokens_to_remove)
            n_codes = min(left, self.n_codes())
            self.exact = [x[:, :left - n_codes].clone() for x in self.exact]
            self.codes = [x[:, :n_codes].clone() for x in self.codes]
            self.slots = [x[:, :left].clone() for x in self.slots]

    def update(self, keys, values, *args, **kwargs):
        """New keys (after RoPE) and values (B, H, T, D) -> all of them, as attention sees them."""
        if self.cache.now is None:
            raise sta.UsageError("this cache works only inside `with compress`")
        cos, sin, is_sink = (x.to(keys.device) for x in self.cache.now)  # (B, slots, D), (B, slots)
        new = [x.transpose(1, 2) for x in (keys, values)]  # (B, T, H, D)
        if not self.is_initialized:
            self.exact = [x[:, :0] for x in new]
            self.sinks = [x.new_zeros(len(x), self.cache.sink, *x.shape[2:]) for x in new]
            self.is_initialized = True
        exact = [torch.cat([old, x], 1) for old, x in zip(self.exact, new)]
        start, n_leaving = self.n_codes(), max(0, exact[0].shape[1] - self.cache.recent)
        self.exact = [x[:, n_leaving:].clone() for x in exact]
        row, slot = is_sink.nonzero(as_tuple=True)
        i = is_sink.cumsum(1)[row, slot] - 1  # which of its row's sinks it is
        if n_leaving:
            leaving = [x[:, :n_leaving] for x in exact]
            which = (slot >= start) & (slot < start + n_leaving)  # of the sinks, those that leave
            for kept, x in zip(self.sinks, leaving):
                kept[row[which], i[which]] = x[row[which], slot[which] - start]
            c, s = (x[:, start:start + n_leaving].float() for x in (cos, sin))
            # turned back; c and s are rounded, and stretched by some kinds of RoPE
            back = rotate(leaving[0].float(), c, -s) / (c.square() + s.square())[:, :, None]
            codes = self.codec.encode(back, leaving[1].float())
            old = self.codes or [x[:, :0] for x in codes]
            self.codes = [torch.cat(parts, 1) for parts in zip(old, codes)]
        if not self.codes:
            return [x.transpose(1, 2) for x in self.exact]
        keys, values = self.codec.decode(self.codes)  # (B, n_codes, H, D)
        n = keys.shape[1]
        keys = rotate(keys, cos[:, :n].float(), sin[:, :n].float())
        coded, whole = slot < n, []
        for x, kept, recent in zip((keys, values), self.sinks, self.exact):
            x = x.to(recent.dtype)
            x[row[coded], slot[coded]] = kept[row[coded], i[coded]]
            whole.append(torch.cat([x, recent], 1).transpose(1, 2))  # (B, H, T, D)
        return whole

def cache_bytes(cache):
    """Bytes of every tensor that a cache of transformers stores, codes or dense."""
    tensors = [x for layer in cache.layers for x in (
        layer.codes + layer.exact + layer.sinks + layer.slots if isinstance(layer, CodedLayer)
        else (layer.keys, layer.values))]
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)

class CodedCache(Cache):
    """A cache of transformers that stores codes, made by `compress`."""
    def __init__(self, sink, recent):
        super().__init__(layers=[])
        self.sink, self.recent, self.now = sink, recent, None

    def reset(self):
        super().reset()
        self.layers[:] = [layer if isinstance(layer, CodedLayer) else DynamicLayer()
                          for layer in self.layers]  # transformers 5.17 fills those with zeros

def check_rope(model):
    """Raises UsageError for types of model whose RoPE `rotate` cannot undo."""
    config = model.get_decoder().config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ROTARY or rope not in ("default", "linear", "llama3"):
        raise sta.UsageError(f"the cache of codes takes {', '.join(ROTARY)} with plain RoPE; this "
                             f"is {config.model_type} with {rope}")

@contextlib.contextmanager
def compress(model, codecs, sink=1, recent=128):
    """`with compress(model, {layer: codec}) as cache: model(..., past_key_values=cache)`.
    Raises UsageError as `check_rope` does, for absent layers, and for use without the cache."""
    check_rope(model)
    decoder, config, begun = model.get_decoder(), model.get_decoder().config, {}
    cache = CodedCache(sink, recent)
    for layer in codecs.keys() - set(range(config.num_hidden_layers)):
        raise sta.UsageError(f"layer {layer}: the model has layers 0 to "
                             f"{config.num_hidden_layers - 1}")
    cache.layers += [CodedLayer(cache, codecs[layer]) if layer in codecs else DynamicLayer()
                     for layer in range(config.num_hidden_layers)]
    holder = cache.layers[min(codecs)]  # of the positions

    def begin(call):
        if call.get("cache", call.get("past_key_values")) is not cache:
            raise sta.UsageError(f"inside compress, give the model {ARGUMENT}=the cache")
        begun["sinks"] = sta.live_tokens(call, 0) & ~sta.live_tokens(call, sink)  # (B, T)

    def note_angles(module, args, kwargs, output):  # of RoPE, for all slots: (B, slots, D)
        new = kwargs.get("position_ids", args[-1]).int().expand(len(args[0]), -1)  # (B, T)
        old = holder.slots or [new[:, :0], begun["sinks"][:, :0]]
        holder.slots = [torch.cat([x.to(y.device), y], 1)
                        for x, y in zip(old, (new, begun["sinks"]))]
        if holder.slots[1].sum(1).max() > sink:
            raise sta.UsageError("the cache of codes takes one text per row; these are packed")
        cache.now = *module.forward(args[0], holder.slots[0]), holder.slots[1]

    def end(decoder, args, output):
        cache.now = None

    with contextlib.ExitStack() as hooks:
        for hook in (decoder.rotary_emb.register_forward_hook(note_angles, with_kwargs=True),
                     decoder.register_forward_hook(end)):
            hooks.callback(hook.remove)
        with sta.watch(model, [], None, begin):
            yield cache

# ------------------------------------------------------------------ the row, and --generate
@contextlib.contextmanager
def through_cache(model, row, sink, recent=128, chunk=128):
    """A function ids (B, T) -> logits, chunk by chunk, in place of evaluate.through_hooks."""
    with compress(model, row.codecs, sink, recent) as cache:
        def forward(ids):
            cache.reset()
            logits = torch.cat([model(input_ids=part, **{ARGUMENT: cache}).logits
                                for part in ids.split(chunk, 1)], 1)
            if row.bytes_per_token is None:
                row.bytes_per_token = cache_bytes(cache) / ids.numel()
            return logits
        yield forward

def stored(row):  # those that look across tokens, or have no place per token, are no cache
    return row.codecs and row.name != "l1" and not any(
        hasattr(codec, "roundtrip") for codec in row.codecs.values())

def rows(model, tokenizer, saes, args, before):
    """For evaluate.py: the dual budget, and what the --rows before this one added."""
    check_rope(model)
    new_rows = [dataclasses.replace(row, name=f"cache {row.name}".replace(" dual", ""), method=None)
            for row in before if stored(row) and row.name not in ("uniform", "reverse")]
    for row in new_rows:
        row.enter = functools.partial(through_cache, row=row, sink=args.sink)
    if not new_rows:
        raise sta.UsageError("--rows cache: needs SAEs (python train_sae.py), or rows before it")
    return new_rows

@torch.no_grad()
def write_on(model, tokenizer, rows, args):
    """The prompt continued greedily, with the cache of each row; prints and returns its cost."""
    ids, costs = torch.tensor([sta.encode(tokenizer, args.generate)]).long().to(model.device), []
    if ids.numel() == 0:
        raise sta.UsageError("--generate: no tokens in it; give a beginning to go on from")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for row in rows:
        n, at = inputs["input_ids"].shape[1], []  # times: at the start, then at each new token
        clock = types.SimpleNamespace(put=lambda ids: at.append(time.time()), end=lambda: None)
        with compress(model, row.codecs, args.sink, args.recent) if row.codecs else \
                contextlib.nullcontext(transformers.DynamicCache(config=model.config)) as cache:
            ids = model.generate(**inputs, **{ARGUMENT: cache}, max_new_tokens=args.new_tokens,
                                 do_sample=False, streamer=clock)[0, n:]
        ms = 1000 * (at[-1] - at[1]) / max(1, len(ids) - 1)
        print(f"{row.name}: {n:,} tokens in {at[1] - at[0]:.1f} s, then {ms:.1f} ms per token; "
              f"cache {cache_bytes(cache):,} bytes\n  {args.generate[-200:]}"
              f"{tokenizer.decode(ids, skip_special_tokens=True)}")
        costs.append({"name": row.name, "tokens": n, "prefill_s": at[1] - at[0], "token_ms": ms,
                      "bytes": cache_bytes(cache)})
    return costs

def main(argv=None):
    args = parse_args(
        __doc__, argv, "model saes layer k-key k-val sink device dtype out",
        rows=dict(default="", help="files of beyond/ that add rows, such as additive"),
        only=dict(default="", help="of the rows, those whose names match this pattern"),
        generate=dict(default="The President of the United States", help="the prompt"),
        new_tokens=dict(type=int, default=100, help="(default 100)"),
        recent=dict(type=int, default=16, help="newest tokens kept exact (default 16)"))
    evaluate.check_pattern(args.only)
    folder, has_saes, name = evaluate.find_fitted(args.saes, args.model)
    if not has_saes and not (args.rows and name):
        raise sta.UsageError(f"{args.saes}: no SAEs; first run: python train_sae.py")
    model, tokenizer, layers = sta.load_model(
        name, *sta.pick_device(args.device, args.dtype), args.layer or "all")
    check_rope(model)
    about = {"model": name, "prompt_sha256": sta.sha256(args.generate.encode()),
             **evaluate.provenance(model)}
    path = evaluate.result_path(args.out, name, about, "-cache")
    saes = sta.load_saes(folder, model, layers if args.layer else None)[0] if has_saes else {}
    dense, *paper = evaluate.paper_rows(saes, sta.kv_shape(model.get_decoder().config), args.k_key,
                                        args.k_val)
    paper = [row for row in paper if row.name == "dual"]
    rows = [dense] + [row for row in evaluate.more_rows(paper, model, tokenizer, saes, args)
                      if stored(row) and re.search(args.only, row.name)]
    costs = write_on(model, tokenizer, rows, args)
    sta.write_atomic(path, json.dumps({"caches": costs, **about}, indent=1))

if __name__ == "__main__":
    sta.run(main)
