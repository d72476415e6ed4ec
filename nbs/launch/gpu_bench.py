"""One lucky GPU, eight minutes: what the paper's model does there.

    python nbs/launch/gpu_bench.py                 # from the top folder; writes benchmarks/gpu_<name>.json
    python nbs/launch/gpu_bench.py --toy --out x   # every part on a CPU at toy size, in seconds; into folder x

Needs torch, transformers and numpy, and of scemb only `model`, `orders` and `flops`. Cell lengths are real (benchmarks/lengths.json);
genes and bins are random, which changes no time. The result is written after each part, so a run that breaks off has kept what it measured;
a part that fails leaves its error in its place. With --minutes the parts that would begin later are left out, and named.

Operations are counted by scemb.flops: per token and layer 8D^2 + 4DF + 4DL forward, the head for hidden tokens only, three times that for
training. MFU is that, of real tokens alone, over seconds and the data sheet's dense 16-bit peak.
"""
import argparse, json, math, os, platform, sys, time, traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
from scemb.flops import forward_flops, mfu, peak_flops, training_flops  # noqa: E402
from scemb.model import ScembConfig, ScembForMaskedLM, attention_kernel, segments  # noqa: E402
from scemb.orders import epoch_order, grouped_batches, token_budget_batches, unpadded_batches, useful_share  # noqa: E402

BEGAN = time.monotonic()


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def timed(run, repeats, warm=1):
    "Seconds of each repeat, after warming up."
    for _ in range(warm): run()
    out = []
    for _ in range(repeats):
        wait(); t = time.perf_counter(); run(); wait()
        out.append(time.perf_counter() - t)
    return out


def rate(seconds, n): # n things a repeat -> median, lowest, highest a second
    r = sorted(n/s for s in seconds)
    return dict(median=round(float(np.median(r)), 2), low=round(r[0], 2), high=round(r[-1], 2), n=len(r))


def peak_gb():
    return round(torch.cuda.max_memory_allocated()/1e9, 2) if torch.cuda.is_available() else None


class Bench:
    def __init__(self, args):
        self.toy, self.cuda = args.toy, torch.cuda.is_available() and not args.toy
        self.device, self.dtype = ("cuda", torch.bfloat16) if self.cuda else ("cpu", torch.float32 if args.toy else torch.bfloat16)
        self.L, self.repeats = (48, 2) if args.toy else (2048, 5)
        layers, width, vocab = (2, 32, 90) if args.toy else (12, 768, 19448)
        self.size = dict(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(2, width//64), intermediate_size=4*width,
                         max_position_embeddings=self.L, attention_probs_dropout_prob=0.)
        found = json.loads((TOP/"benchmarks"/"lengths.json").read_text()); found.pop("note")
        lengths = np.concatenate([np.array(v, np.int32) for v in found.values()])[epoch_order(sum(map(len, found.values())), 1)]
        self.lengths = np.clip(lengths//50 if args.toy else lengths, 4, self.L)[:200 if args.toy else None]
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.out = Path(args.out or TOP/"benchmarks")/f"gpu_{'toy' if args.toy else name.replace(' ', '_').replace('/', '_')}.json"
        self.peak, source = peak_flops(self.device, self.dtype, 256 if args.toy else 8192 if self.cuda else 1024)
        self.result = dict(device=name, peak_flops=self.peak, peak_source=source, dtype=str(self.dtype).removeprefix("torch."), attention=attention_kernel(self.device, self.dtype),
                           python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, transformers=transformers.__version__, numpy=np.__version__,
                           model=self.size, n_cells=len(self.lengths), mean_length=float(self.lengths.mean()), window=self.L, toy=self.toy, parts={})
        self.generator = torch.Generator().manual_seed(0)

    def part(self, name, run, minutes):
        if (time.monotonic() - BEGAN)/60 > minutes: self.result["parts"][name] = dict(left_out="no time")
        else:
            began = time.monotonic()
            try: self.result["parts"][name] = run()
            except Exception as e: self.result["parts"][name] = dict(error=f"{type(e).__name__}: {e}"[:2000], where=traceback.format_exc()[-1500:])
            self.result["parts"][name] |= dict(part_seconds=round(time.monotonic() - began, 1))
            if self.cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        self.result["minutes"] = round((time.monotonic() - BEGAN)/60, 2)
        self.out.parent.mkdir(parents=True, exist_ok=True); self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(name, json.dumps(self.result["parts"][name])[:600], flush=True)

    # --- batches of random genes --------------------------------------------------------------------------------------

    def model(self, **k):
        torch.manual_seed(0)
        return ScembForMaskedLM(ScembConfig(**self.size | k)).to(self.device)

    def random(self, *shape):
        V = self.size["vocab_size"]
        ids, bins = (torch.randint(a, b, shape, generator=self.generator) for a, b in ((4, V), (1, 101)))
        return dict(input_ids=ids, bins=bins, labels=torch.where(torch.rand(shape, generator=self.generator) < .15, ids, -100))

    def put(self, batch): return {k: v.to(self.device) for k, v in batch.items()}

    def flat(self, lengths):
        return self.put(self.random(1, int(sum(lengths))) | dict(cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))))

    def padded(self, lengths, width):
        mask = torch.arange(width)[None] < torch.from_numpy(np.asarray(lengths))[:, None]
        b = self.random(len(lengths), width)
        b |= dict(input_ids=b["input_ids"]*mask, bins=b["bins"]*mask, labels=torch.where(mask, b["labels"], -100))
        return self.put(b | ({} if mask.all() else dict(attention_mask=mask.long())))

    def pick(self, batches, n): # n batches at even quantiles of their tokens
        order = np.argsort([self.lengths[b].sum() for b in batches], kind="stable")
        return [self.lengths[batches[int(order[int((i + .5)/n*len(order))])]] for i in range(n)]

    def autocast(self): return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def training(self, model, batches, optimizer=None):
        def run():
            for b in batches:
                model.zero_grad(set_to_none=True)
                with self.autocast(): loss = model(**b).loss
                loss.backward()
                if optimizer: optimizer.step()
        return run

    def report(self, seconds, lengths): # of training batches with these lengths
        flat = np.concatenate(lengths)
        flops = training_flops(ScembConfig(**self.size), flat)
        return dict(cells_s=rate(seconds, len(flat)), tokens_s=rate(seconds, int(flat.sum())), mfu=round(mfu(flops, float(np.median(seconds)), self.peak), 4), peak_memory_gb=peak_gb())

    # --- parts --------------------------------------------------------------------------------------------------------

    def agreement(self):
        "Unpadded attention against padded eager attention, in full precision, and in the precision of the run."
        lengths = self.lengths[:6]; cu = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(self.device)
        batch = self.padded(lengths, int(lengths.max())); real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        row = {k: batch[k][real][None] for k in ("input_ids", "bins", "labels")} | dict(cu_seqlens=cu)
        model, out = self.model(num_hidden_layers=2, hidden_dropout_prob=0.).eval(), {}

        def gradient(b):
            model.zero_grad(); model(**b).loss.backward()
            return torch.cat([p.grad.flatten().float() for p in model.parameters()])
        for name, enabled in (("float32", False), ("run", self.dtype != torch.float32)):
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=enabled):
                eager = model.bert(batch["input_ids"], batch["bins"], attention_mask=batch.get("attention_mask"), output_attentions=True).last_hidden_state[real]
                ours = model.bert(row["input_ids"], row["bins"], cu_seqlens=cu).last_hidden_state[0]
            out[name] = dict(hidden_max_difference=float((eager.float() - ours.float()).abs().max()), kernel=attention_kernel(self.device, torch.bfloat16 if enabled else torch.float32))
            with torch.autocast(self.device, torch.bfloat16, enabled=enabled): a, b = gradient(batch), gradient(row)
            out[name]["gradient_relative_difference"] = float((a - b).norm()/a.norm())
        return out

    def kernels(self):
        "Attention alone, forward and backward, in each kernel that is there."
        from scemb.model import _by_kernel
        H, d = self.size["num_attention_heads"], self.size["hidden_size"]//self.size["num_attention_heads"]
        lengths = self.pick(unpadded_batches(self.lengths, 16*self.L, self.L), 1)[0]; T = int(lengths.sum())
        cu = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(self.device)
        s, q = segments(cu), [torch.randn(T, H, d, device=self.device, dtype=self.dtype).requires_grad_() for _ in range(3)]
        flops = 3*4*self.size["hidden_size"]*float((lengths.astype(float)**2).sum())

        def flex():
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), torch.from_numpy(lengths).to(self.device))
            mask = create_block_mask(lambda b, h, i, j: owner[i] == owner[j], None, None, T, T, device=self.device)
            attend = torch.compile(flex_attention)
            return lambda: attend(*(x.transpose(0, 1)[None] for x in q), block_mask=mask)[0].transpose(0, 1)
        found = {k: (lambda k=k: lambda: _by_kernel(k, *q, s, 0.)) for k in ("varlen", "flash_attn", "padded")} | dict(flex=flex)
        out, reference = {}, None
        with torch.no_grad(): reference = _by_kernel("padded", *q, s, 0.)
        for name, make in found.items():
            try:
                if not self.cuda and name != "padded": raise RuntimeError("measured on a GPU only")
                attend = make()
                with torch.no_grad(): difference = float((attend().float() - reference.float()).abs().max())
                def both(attend=attend): # forward and backward
                    torch.autograd.grad(attend().float().square().sum(), q)
                t = timed(both, self.repeats)
                out[name] = dict(ms=[round(1e3*x, 2) for x in t], tflops=round(flops/float(np.median(t))/1e12, 2), max_difference_to_padded=difference)
            except Exception as e: out[name] = dict(error=f"{type(e).__name__}: {e}"[:300])
        return out | dict(tokens=T, cells=len(lengths))

    def full_cells(self):
        "Training steps on cells that fill the window: the rate to hold against the paper's."
        out = {}
        for name, compiled in (("eager", False), ("compiled layers", True)):
            try:
                model = self.model().train()
                if compiled:
                    if self.toy: continue
                    for layer in model.bert.encoder["layer"]: layer.compile(dynamic=True)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
                for cells in (8, 32):
                    lengths = [np.full(cells, self.L)]
                    if self.cuda: torch.cuda.reset_peak_memory_stats()
                    out[f"{name}, {cells} cells"] = self.report(timed(self.training(model, [self.flat(lengths[0])], optimizer), self.repeats, 3), lengths)
            except Exception as e: out[name] = dict(error=f"{type(e).__name__}: {e}"[:500])
        return out | dict(paper="4-13 cells/s a GPU (30 million cells, 10 days, 8 H100; 1 to 3 epochs)")

    def ladder(self, compiled=False):
        "Forward and backward on real lengths, a rung at a time, in turn."
        n, budget, orders = (2, 8*self.L, {}) if self.toy else (4, 8*self.L, {})
        random = [b for b in np.split(epoch_order(len(self.lengths)), range(8, len(self.lengths), 8)) if len(b) == 8]
        orders = {"pad to window": random, "dynamic": random, "mega-batch 1000x": list(grouped_batches(self.lengths)), "token budget": list(token_budget_batches(self.lengths, budget)),
                  "unpadded": list(unpadded_batches(self.lengths, budget, self.L)), "unpadded, 4 times the budget": list(unpadded_batches(self.lengths, 4*budget, self.L))}
        chosen = {k: self.pick(b, n if len(b) >= n else 1) for k, b in orders.items()} | {"bound": [np.full(8, int(q)) for q in np.quantile(self.lengths, (np.arange(n) + .5)/n)]}
        make = lambda k, x: self.flat(x) if k.startswith(("unpadded", "bound")) else self.padded(x, self.L if k == "pad to window" else int(x.max()))
        data = {k: [make(k, x) for x in v] for k, v in chosen.items()}
        model = self.model().train()
        if compiled:
            for layer in model.bert.encoder["layer"]: layer.compile(dynamic=True)
        seconds, memory = {k: [] for k in data}, {}
        for r in range(self.repeats + 1):
            for k, batches in data.items():
                if self.cuda: torch.cuda.reset_peak_memory_stats()
                t = timed(self.training(model, batches), 1, 0)
                memory[k] = peak_gb()
                if r: seconds[k] += t        # the first round warms up
        share = {k: 1. if k.startswith(("unpadded", "bound")) else useful_share(orders[k], self.lengths, self.L if k == "pad to window" else None) for k in data}
        return {k: self.report(seconds[k], chosen[k]) | dict(peak_memory_gb=memory[k], useful_share=round(float(share[k]), 4)) for k in data}

    def head(self):
        "Time and memory of a step with the head on every token, on hidden ones, and without it."
        lengths = self.pick(unpadded_batches(self.lengths, 8*self.L, self.L), 1); b = self.flat(lengths[0]); model, out = self.model().train(), {}
        encoder = {k: v for k, v in b.items() if k != "labels"}
        losses = {"hidden genes": lambda: model(**b).loss, "encoder alone": lambda: model.bert(**encoder).last_hidden_state.float().square().mean(),
                  "all genes": lambda: F.cross_entropy(model.cls["predictions"](model.bert(**encoder).last_hidden_state)[0].float(), b["labels"][0], ignore_index=-100)}
        for name, loss in losses.items():
            def step(loss=loss):
                model.zero_grad(set_to_none=True)
                with self.autocast(): x = loss()
                x.backward()
            if self.cuda: torch.cuda.reset_peak_memory_stats()
            out[name] = dict(ms=[round(1e3*t, 2) for t in timed(step, self.repeats)], peak_memory_gb=peak_gb())
        return out

    def checkpointing(self):
        "The largest budget of tokens that a training step holds, with and without gradient checkpointing."
        out = {}
        for name in ("plain", "gradient checkpointing"):
            model = self.model().train()
            if name != "plain": model.gradient_checkpointing_enable()
            for cells in ((2, 4) if self.toy else (32, 64, 128, 256)):
                try:
                    if self.cuda: torch.cuda.reset_peak_memory_stats()
                    t = timed(self.training(model, [self.flat(np.full(cells, self.L))]), 1)
                    out[f"{name}, {cells} full cells"] = dict(cells_s=round(cells/t[0], 1), peak_memory_gb=peak_gb())
                except torch.cuda.OutOfMemoryError: out[f"{name}, {cells} full cells"] = "out of memory"; break
            del model
            if self.cuda: torch.cuda.empty_cache()
        return out

    def embedding(self):
        "Cells a second at real lengths: the mean over genes of the layers' mean (mean12), one layer's state in memory at a time."
        model, out = self.model().eval().to(self.dtype), {}

        @torch.no_grad()
        def embed(batch, n):
            cu = batch["cu_seqlens"]; s, owner = segments(cu), torch.repeat_interleave(torch.arange(n, device=self.device), cu.diff())
            place = torch.arange(len(owner), device=self.device) - cu[owner]
            x = model.bert.embeddings(batch["input_ids"], batch["bins"], place[None])
            total = x.new_zeros(n, x.shape[-1], dtype=torch.float32)
            for layer in model.bert.encoder["layer"]:
                x = layer(x, None, s)[0]; total.index_add_(0, owner, x[0].float())
            return total/cu.diff()[:, None]/len(model.bert.encoder["layer"])
        for budget in (8*self.L, 32*self.L) if self.toy else (32*self.L, 128*self.L):
            try:
                chosen = self.pick(list(unpadded_batches(self.lengths, budget, self.L)), 2); data = [self.flat(x) for x in chosen]; n = sum(map(len, chosen))
                if self.cuda: torch.cuda.reset_peak_memory_stats()
                t = timed(lambda: [embed(b, len(x)) for b, x in zip(data, chosen)], self.repeats)  # noqa: B023
                out[f"{budget:,} tokens"] = dict(cells_s=rate(t, n), mfu=round(mfu(forward_flops(model.config, np.concatenate(chosen), 0.), float(np.median(t)), self.peak), 4), peak_memory_gb=peak_gb())
            except Exception as e: out[f"{budget:,} tokens"] = dict(error=f"{type(e).__name__}: {e}"[:500])
        return out

    def perturbation(self):
        "Masked variants of one cell a second: the work of an exact in silico screen over its genes."
        model, out = self.model().eval().to(self.dtype), {}
        for length in (16, self.L) if self.toy else (512, 1024, self.L):
            n = max(1, 32*self.L//length); b = self.flat(np.full(n, length)); b.pop("labels")
            at = b["cu_seqlens"][:-1] + torch.arange(n, device=self.device) % length
            b["input_ids"] = b["input_ids"].view(n, length)[:1].expand(n, length).reshape(1, -1).clone(); b["input_ids"][0, at] = 1; b["bins"][0, at] = 0
            with torch.no_grad(): t = timed(lambda: model.bert(**b).last_hidden_state.float().view(n, length, -1).mean(1), self.repeats)  # noqa: B023
            out[f"{length} genes"] = dict(variants_s=rate(t, n), seconds_a_cell=round(float(np.median(t))*length/n, 3))
        return out

    def best_rate(self):
        "The goal: at least 250 cells/s of 2,048 tokens and an MFU of at least .40."
        full = {k: v for k, v in self.result["parts"].get("full_cells", {}).items() if isinstance(v, dict) and "mfu" in v}
        if self.toy or not full: return dict(left_out="no part to judge by")
        k = max(full, key=lambda k: full[k]["mfu"]); v = full[k]
        return dict(best=k, cells_s=v["cells_s"]["median"], mfu=v["mfu"], goal_250_cells_s=v["cells_s"]["median"] >= 250, goal_mfu_40=v["mfu"] >= .4)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--toy", action="store_true", help="toy size on the CPU")
    ap.add_argument("--out", help="folder for the JSON (default: benchmarks)")
    ap.add_argument("--minutes", type=float, default=7., help="begin no further part after this time")
    args = ap.parse_args()
    if not args.toy and not torch.cuda.is_available(): sys.exit("There is no GPU that torch can use; --toy runs every part on the CPU.")
    torch.set_float32_matmul_precision("high")
    b = Bench(args)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    # the most wanted first: a lease can end at any time
    for name, run in dict(agreement=b.agreement, full_cells=b.full_cells, ladder=b.ladder, embedding=b.embedding, perturbation=b.perturbation, head=b.head, kernels=b.kernels,
                          checkpointing=b.checkpointing, ladder_compiled=lambda: b.ladder(compiled=not b.toy)).items(): b.part(name, run, args.minutes)
    b.part("goals", b.best_rate, math.inf)
    failed = [k for k, v in b.result["parts"].items() if "error" in v]
    print(f"{b.out.name}: {b.result['minutes']} minutes" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed) if args.toy else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
