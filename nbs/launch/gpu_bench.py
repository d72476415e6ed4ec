"""What the paper's model does on one GPU, in three minutes.

    python nbs/launch/gpu_bench.py --out DIR            # the default parts
    python nbs/launch/gpu_bench.py --parts full_cells,embed,ladder_all
    python nbs/launch/gpu_bench.py --toy --out DIR      # every part on a CPU, tiny

Cell lengths are real (results/benchmarks/padding_ladder/lengths.json); genes are random, which
changes no time. Times are taken by a clock that waits for the GPU, in turn where two ways are
compared; a number stands with its median, lowest, highest and n. The JSON (gpu_bench_<device>.json)
is written after each part; a part that fails leaves its error in its place. A part whose estimate
does not fit into --minutes is left out, and named.

Operations are counted by scemb.model.flops: per token and layer 8D^2 + 4DF + 4DL forward, the head
for
hidden tokens only, three times that for training. MFU is that, of real tokens alone, over seconds
and the data sheet's dense 16-bit peak.

The parts `ceilings`, `full_cells`, `profile`, `ladder`, `head` and `optimizer` need torch,
transformers and numpy; `trainer`, `embed`, `perturb` and `screen` run the product itself. `bases`
does so on the published sizes of Geneformer, with random weights, beside a straight padded loop
over transformers' BertForMaskedLM; its LoRA step needs peft.
"""

import argparse
import inspect
import json
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_parts import (
    TOP,
    Report,
    device_name,
    file_name,
    forget_memory,
    minutes_gone,
    peak_gb,
    random_cells,
    rate,
    spread,
    timed,
    token_set,
    versions,
    vocabulary_of,
    wait,
)

from scemb.model import encoder as model_module
from scemb.model.flops import forward_flops, mfu, peak_flops, training_flops
from scemb.model.encoder import (
    ScembConfig,
    ScembForMaskedLM,
    Segments,
    _by_kernel,
    attention_kernel,
    autocast,
    compile_layers,
    ranks_of_segments,
)
from scemb.model.batching import (
    epoch_order,
    grouped_batches,
    packed_batches,
    token_budget_batches,
    unpadded_batches,
    useful_share,
)

GOALS = dict(full_cells_s=250.0, full_mfu=0.45, full_mfu_stretch=0.50, embed_cells_s=1500.0)
PAPER_DROPOUT = "paper's attention dropout"
SEPARATE = "eager, three products for q, k, v"
# Seconds that each part should take on an H100, compilation included, most wanted first.
DEFAULT = dict(
    full_cells=55,
    trainer=30,
    embed=15,
    profile=15,
    screen=20,
    ceilings=4,
    ladder=18,
    perturb=12,
    optimizer=3,
    head=6,
)
MORE = dict(
    kernels=45,
    cudnn_step=15,
    checkpointing=25,
    ladder_all=30,
    ladder_compiled=45,
    agreement=10,
    bases=90,
)


def cudnn_rows(kernel, q_THd, k_THd, v_THd, s, dropout=0.0):  # -> (T, H, d)
    "Attention within the cells of a row by cuDNN's kernel, called with torch's own derivative."
    q_THd, k_THd, v_THd = (x.contiguous() for x in (q_THd, k_THd, v_THd))
    return torch.ops.aten._cudnn_attention_forward(
        q_THd, k_THd, v_THd, None, s.cu, s.cu, s.longest, s.longest, True, 0.0, False, False
    )[0]


class Bench:
    "Sizes, random batches and clocks of the parts."

    def __init__(self, toy: bool):
        self.toy = toy
        self.cuda = torch.cuda.is_available() and not toy
        self.device = "cuda" if self.cuda else "cpu"
        self.precision = "fp32" if toy else "bf16"
        self.dtype = torch.float32 if toy else torch.bfloat16
        self.window = 48 if toy else 2048
        self.repeats = 2 if toy else 5
        layers, width = (2, 32) if toy else (12, 768)
        self.vocab = 94 if toy else 19_448
        self.size = dict(
            vocab_size=self.vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=max(2, width // 64),
            intermediate_size=4 * width,
            max_position_embeddings=self.window,
            attention_probs_dropout_prob=0.0,
        )
        self.lengths = self.real_lengths()
        self.generator = torch.Generator().manual_seed(0)
        side = 256 if toy else 8192 if self.cuda else 1024
        self.peak, self.peak_source = peak_flops(self.device, self.dtype, side)

    def real_lengths(self, window=None):
        "Genes of each cell of several data sets, in one random order, cut to a window."
        found = json.loads((TOP / "results/benchmarks/padding_ladder/lengths.json").read_text())
        found.pop("note")
        lengths = np.concatenate([np.array(v, np.int32) for v in found.values()])
        lengths = lengths[epoch_order(len(lengths), 1)]
        if self.toy:
            lengths = lengths[:200] // 50
        return np.clip(lengths, 4, window or self.window)

    def about(self):
        "What the JSON says before its parts."
        return dict(
            device=device_name(self.cuda),
            peak_flops=self.peak,
            peak_source=self.peak_source,
            dtype=str(self.dtype).removeprefix("torch."),
            toy=self.toy,
            model=self.size,
            attention=attention_kernel(self.device, self.dtype),
            window=self.window,
            n_cells=len(self.lengths),
            mean_length=float(self.lengths.mean()),
            **versions(),
        )

    # --- models and batches --------------------------------------------------------------------

    def model(self, **change):
        "The paper's model with fresh weights."
        torch.manual_seed(0)
        return ScembForMaskedLM(ScembConfig(**self.size | change)).to(self.device)

    def compiled(self, model):
        "The same model with compiled layers; on a CPU their graphs are captured, no more."
        if not self.toy:
            return compile_layers(model)
        for layer in model.bert.encoder["layer"]:
            layer.compile(dynamic=True, backend="aot_eager")
        return model

    def separate(self, model):
        "The same model with three products for queries, keys and values, as BERT has them."
        for layer in model.bert.encoder["layer"]:
            layer.attention["self"].fused = False
        return model

    def autocast(self):
        "The precision of the run."
        return autocast(self.device, self.precision)

    def random(self, *shape):
        "Random genes and bins of a shape, a seventh of them to be guessed."
        ids = torch.randint(4, self.vocab, shape, generator=self.generator)
        bins = torch.randint(1, 101, shape, generator=self.generator)
        hidden = torch.rand(shape, generator=self.generator) < 0.15
        return dict(input_ids=ids, bins=bins, labels=torch.where(hidden, ids, -100))

    def put(self, batch):
        "A batch on the device."
        return {k: v.to(self.device) for k, v in batch.items()}

    def flat(self, lengths):
        "An unpadded row as the loader hands it over: nothing is left to ask the device for."
        batch = self.random(1, int(sum(lengths)))
        cells = Segments.of(lengths)
        batch["position_ids"] = ranks_of_segments(cells, int(sum(lengths)))
        batch["hidden"] = (batch["labels"].flatten() != -100).nonzero()[:, 0]
        return self.put(batch) | dict(cu_seqlens=Segments.of(lengths, self.device))

    def padded(self, lengths, width):
        "Rows of one width."
        real = torch.arange(width)[None] < torch.from_numpy(np.asarray(lengths))[:, None]
        batch = self.random(len(lengths), width)
        batch["input_ids"] = batch["input_ids"] * real
        batch["bins"] = batch["bins"] * real
        batch["labels"] = torch.where(real, batch["labels"], -100)
        if not real.all():
            batch["attention_mask"] = real.long()
        return self.put(batch)

    def pick(self, batches, n):
        "Lengths of n batches, at even quantiles of their tokens."
        order = np.argsort([self.lengths[b].sum() for b in batches], kind="stable")
        places = ((np.arange(n) + 0.5) / n * len(order)).astype(int)
        return [self.lengths[batches[int(order[p])]] for p in places]

    def training(self, model, batches, optimizer=None):
        "A piece of work: forward and backward of some batches, with the optimizer where given."

        def run():
            for batch in batches:
                model.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = model(**batch).loss
                loss.backward()
                if optimizer:
                    optimizer.step()

        return run

    def report(self, seconds, lengths):
        "Rates and MFU of training steps over batches with these lengths."
        flat = np.concatenate(lengths)
        flops = training_flops(ScembConfig(**self.size), flat)
        middle = float(np.median(seconds))
        return dict(
            cells_s=rate(seconds, len(flat)),
            tokens_s=rate(seconds, int(flat.sum())),
            mfu=round(mfu(flops, middle, self.peak), 4),
            seconds=[round(s, 5) for s in seconds],
            peak_memory_gb=peak_gb(),
        )

    # --- the ceilings ---------------------------------------------------------------------------

    def ceilings(self):
        "What the device can do at best: a large copy, and a large product in bfloat16."
        numbers = 2**18 if self.toy else 2**30 if self.cuda else 2**24

        def copying():
            source = torch.randn(numbers, device=self.device)
            target = torch.empty_like(source)
            return timed(lambda: target.copy_(source), 10, 3)

        moved = spread([8e-12 * numbers / s for s in copying()], 4)  # read and written, 4 bytes
        side = 256 if self.toy else 8192 if self.cuda else 1024
        rows = {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
            seconds = timed(lambda a=a, b=b: a @ b, 10, 3)
            rows[f"matmul_{name}_tflops"] = spread([2e-12 * side**3 / s for s in seconds], 3)
        number = f"{moved['median']} TB/s, {rows['matmul_bf16_tflops']['median']} TFLOP/s in bf16"
        return dict(copy_tb_s=moved, **rows, number=number)

    # --- training steps -------------------------------------------------------------------------

    def full_cells(self):
        """Steps on cells that fill the window, the ways in turn: the rate to hold against others.

        The peak of memory includes the weights of the other ways, some 5 GB.
        """
        makers = {
            "compiled": lambda: self.compiled(self.model()),
            "eager": self.model,
            SEPARATE: lambda: self.separate(self.model()),
            PAPER_DROPOUT: lambda: self.model(attention_probs_dropout_prob=0.1),
        }
        models, out = {}, {}
        for name, make in makers.items():
            model = make().train()
            models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for cells in (2,) if self.toy else (32, 16, 8):
            lengths = [np.full(cells, self.window)]
            batch = self.flat(lengths[0])
            seconds = {name: [] for name in models}
            for i in range(self.repeats + 2):
                for name in list(models):
                    if name == PAPER_DROPOUT and i > 3 and not self.toy:
                        continue  # two repeats are enough for it
                    if name == SEPARATE and cells > 16:
                        continue  # asked where launches weigh most
                    try:
                        forget = torch.cuda.reset_peak_memory_stats if self.cuda else list
                        forget()
                        took = timed(self.training(models[name][0], [batch], models[name][1]), 1, 0)
                    except Exception as e:
                        out[name] = dict(broke=f"{type(e).__name__}: {e}"[:500])
                        models.pop(name)
                        continue
                    if i > 1:  # two rounds warm up
                        seconds[name] += took
                        memory = peak_gb()
                        out[f"{name}, {cells} cells"] = self.report(seconds[name], lengths) | dict(
                            peak_memory_gb=memory
                        )
        kernels = {
            name: attention_kernel(self.device, self.dtype, dropout=0.1 * (name == PAPER_DROPOUT))
            for name in makers
        }
        best = max((v["cells_s"]["median"], v["mfu"], k) for k, v in out.items() if "mfu" in v)
        return out | dict(
            kernels=kernels, number=f"{best[0]:g} full cells/s, MFU {best[1]:.3f} ({best[2]})"
        )

    def profile(self):
        "The twelve kernels that take most time in a compiled step, and how long the device idles."
        from torch.profiler import ProfilerActivity, profile

        model = self.compiled(self.model()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        cells = 2 if self.toy else 16
        run = self.training(model, [self.flat(np.full(cells, self.window))], optimizer)
        plain = float(np.median(timed(run, 3, 3)))
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=kinds) as seen:
            timed(run, 1, 0)
        averages = seen.key_averages()
        key = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        table = averages.table(sort_by=key, row_limit=12, max_name_column_width=60)
        kernels = [e for e in averages if not self.cuda or "CUDA" in str(e.device_type)]
        rows = sorted(((getattr(e, key), e.count, e.key) for e in kernels), reverse=True)[:12]
        busy = sum(getattr(e, key) for e in kernels)
        idle = round(1 - busy / 1e6 / plain, 3) if self.cuda else None
        top = [dict(microseconds=round(t, 1), calls=n, kernel=k[:200]) for t, n, k in rows]
        return dict(
            step_seconds=plain,
            idle_share=idle,
            kernels=top,
            table=table[:8000],
            number=f"step {1e3 * plain:.1f} ms, idle {idle}; first: {top[0]['kernel'][:60]}",
        )

    def optimizer(self):
        "Clipping and AdamW on the weights of the paper's model."
        model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for p in model.parameters():
            p.grad = torch.randn_like(p)

        def clip():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        step = spread([1e3 * s for s in timed(optimizer.step, self.repeats, 2)])
        clipping = spread([1e3 * s for s in timed(clip, self.repeats, 2)])
        n = model.num_parameters()
        return dict(
            step_ms=step,
            clip_ms=clipping,
            weights=n,
            number=f"AdamW {step['median']:.2f} ms, clipping {clipping['median']:.2f} ms",
        )

    def head(self):
        "A step with the head on hidden genes, on every gene, and without it, in turn."
        lengths = self.pick(unpadded_batches(self.lengths, 8 * self.window, max_len=self.window), 1)
        batch, model = self.flat(lengths[0]), self.model().train()
        encoder = {k: v for k, v in batch.items() if k not in ("labels", "hidden")}
        head = model.cls["predictions"]

        def every_gene():
            logits = head(model.bert(**encoder).last_hidden_state)[0]
            return F.cross_entropy(logits.float(), batch["labels"][0], ignore_index=-100)

        losses = {
            "hidden genes": lambda: model(**batch).loss,
            "all genes": every_gene,
            "encoder alone": lambda: model.bert(**encoder).last_hidden_state.square().mean(),
        }

        def step(loss):
            model.zero_grad(set_to_none=True)
            with self.autocast():
                value = loss()
            value.float().backward()

        seconds, memory = {name: [] for name in losses}, {}
        for i in range(self.repeats + 1):
            for name, loss in losses.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                took = timed(lambda loss=loss: step(loss), 1, 0)
                memory[name] = peak_gb()
                seconds[name] += took * (i > 0)
        rows = {
            k: dict(ms=spread([1e3 * s for s in v]), peak_memory_gb=memory[k])
            for k, v in seconds.items()
        }
        text = "; ".join(f"{k} {v['ms']['median']:.1f} ms" for k, v in rows.items())
        return rows | dict(number=text)

    def rungs(self, whole):
        "Batches of real lengths by each way of making them -> (cell numbers, laid out flat)."
        budget = 8 * self.window
        order = epoch_order(len(self.lengths))
        eights = [b for b in np.split(order, range(8, len(order), 8)) if len(b) == 8]
        found = {
            "pad to window": (eights, False),
            "mega-batch 1000x": (list(grouped_batches(self.lengths)), False),
            "token budget": (list(token_budget_batches(self.lengths, budget)), False),
            "unpadded": (list(unpadded_batches(self.lengths, budget, max_len=self.window)), True),
        }
        if whole:
            found["dynamic"] = (eights, False)
            larger = unpadded_batches(self.lengths, 4 * budget, max_len=self.window)
            found["unpadded, 4 times the budget"] = (list(larger), True)
            filled = packed_batches(self.lengths, budget, max_len=self.window)
            found["unpadded, packed to fit"] = (list(filled), True)
        return found

    def ladder(self, whole=False, compiled=False):
        "Forward and backward on real lengths, one rung after the other in turn."
        n = 2 if self.toy else 4
        repeats = self.repeats if whole or self.toy else 3
        chosen, data, share = {}, {}, {}
        for name, (batches, is_flat) in self.rungs(whole).items():
            picked = self.pick(batches, n if len(batches) >= n else 1)
            fixed = self.window if name == "pad to window" else None
            chosen[name] = picked
            data[name] = [
                self.flat(x) if is_flat else self.padded(x, fixed or int(x.max())) for x in picked
            ]
            share[name] = 1.0 if is_flat else float(useful_share(batches, self.lengths, fixed))
        equal = np.quantile(self.lengths, (np.arange(n) + 0.5) / n).astype(int)
        chosen["bound"] = [np.full(8, q) for q in equal]  # no padding, no difference in length
        data["bound"], share["bound"] = [self.flat(x) for x in chosen["bound"]], 1.0
        model = self.model().train()
        if compiled:
            model = self.compiled(model)
        seconds, memory = {name: [] for name in data}, {}
        for i in range(repeats + 1):
            for name, batches in data.items():
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                took = timed(self.training(model, batches), 1, 0)
                memory[name] = peak_gb()
                seconds[name] += took * (i > 0)  # the first round warms up
        rows = {}
        for name in data:
            rows[name] = self.report(seconds[name], chosen[name])
            rows[name] |= dict(peak_memory_gb=memory[name], useful_share=round(share[name], 4))
        text = "; ".join(f"{k} {v['cells_s']['median']:g}" for k, v in rows.items())
        return rows | dict(number=f"cells/s: {text}")

    def trainer(self):
        "Steps of the product's own training: Trainer, loader, compiled layers, real lengths."
        from transformers import Trainer
        from scemb.model.pretrain import Batches, TrainSettings, new_model, pretrain

        steps, first = (8, 3) if self.toy else (45, 20)
        budget = 4 * self.window if self.toy else 32_768
        settings = TrainSettings(
            steps=1000,
            warmup_steps=10,
            token_budget=budget,
            max_len=self.window,
            start="random",
            precision=self.precision,
            compile=not self.toy,
            save_every=10_000,
        )
        tokens = self.tokens(60 if self.toy else 1400)
        size = dict(
            layers=self.size["num_hidden_layers"],
            width=self.size["hidden_size"],
            heads=self.size["num_attention_heads"],
        )
        model = new_model(tokens, settings, **size, attention_dropout=0.0)
        began, making = [], []
        training_step, getitem = Trainer.training_step, Batches.__getitem__

        def step(self, *a, **k):
            if len(began) in (first, steps):
                wait()  # the host may be steps ahead of the device
            began.append(time.perf_counter())
            if len(began) > steps:
                raise Enough
            return training_step(self, *a, **k)

        def item(self, i):
            start = time.perf_counter()
            batch = getitem(self, i)
            on_main = threading.current_thread() is threading.main_thread()
            making.append((time.perf_counter() - start, on_main))
            return batch

        with (
            tempfile.TemporaryDirectory() as d,
            mock.patch.object(Trainer, "training_step", step),
            mock.patch.object(Batches, "__getitem__", item),
        ):
            try:
                pretrain(tokens, Path(d) / "run", model, settings=settings, quiet=True)
            except Enough:
                pass
        torch.set_flush_denormal(False)
        batches = Batches(tokens, settings)
        lengths = [np.diff(np.asarray(batches[i]["cu_seqlens"])) for i in range(first, steps)]
        between = np.diff(began)[first:steps]
        row = self.report([float(between.sum())], lengths)
        row["step_ms"] = spread([1e3 * s for s in between])
        row["batch_ms"] = spread([1e3 * s for s, _ in making])
        row["batches_on_main_thread"] = sum(on_main for _, on_main in making)
        row["tokens_a_step"] = spread([n.sum() for n in lengths], 0)
        row |= self.without_trainer(model, batches, lengths, range(first, first + 6))
        row["trainer_share"] = round(row["tokens_s"]["median"] / row["alone_tokens_s"]["median"], 3)
        text = (
            f"{row['cells_s']['median']:g} cells/s, {row['tokens_s']['median']:,.0f} tokens/s, "
            f"MFU {row['mfu']:.3f}; {row['trainer_share']} of the bare step's rate; a batch is "
            f"made in {row['batch_ms']['median']:.1f} ms"
        )
        return row | dict(number=text)

    def without_trainer(self, model, batches, lengths, which):
        "The same batches, already on the device, through the bare step: what the Trainer costs."
        data = []
        for i in which:
            batch = batches[i]
            data.append(
                {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        seconds = timed(self.training(model.train(), data, optimizer), 3, 1)
        alone = self.report(seconds, lengths[: len(data)])
        return dict(alone_tokens_s=alone["tokens_s"], alone_mfu=alone["mfu"])

    def tokens(self, n):
        "Random cells of real lengths as a token set."
        vocabulary = vocabulary_of(self.vocab - 4 if self.toy else None)
        self.vocab = len(vocabulary)
        return token_set(self.cells(self.lengths[:n]), vocabulary, self.window)

    def cells(self, lengths):
        "Random cells as an `Encoder` gives them."
        return random_cells(lengths, self.vocab)

    # --- the product: embedding, perturbation, screen -------------------------------------------

    def coder(self, precision):
        "The paper's model as the product embeds with it."
        from scemb.model.embed import CellEncoder
        from scemb.tokens.ranking import TokenizerSettings

        vocabulary = vocabulary_of(self.vocab - 4 if self.toy else None)
        model = self.model(vocab_size=len(vocabulary)).eval()
        settings = TokenizerSettings(max_len=self.window)
        budget = 4096 if not self.cuda else 65_536
        return CellEncoder(model, vocabulary, settings, "mean12", precision, budget)

    def embed(self):
        "Cells a second of `encode_cells`, host work and copies included, at real lengths."
        from scemb.model.embed import encode_cells

        rows = {}
        sizes = dict(fp32=16, bf16=16) if self.toy else dict(bf16=1024, fp32=192)
        for precision, n in sizes.items():
            coder = self.coder(precision)
            cells = self.cells(self.lengths[:n])
            flat = cells["genes"], cells["bins"], cells["offsets"]

            def run(coder=coder, flat=flat, precision=precision):
                return encode_cells(coder.net, *flat, "mean12", coder.token_budget, precision)

            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(run, 2 if self.toy else 4, 1)
            flops = forward_flops(coder.net.config, self.lengths[:n], share=0.0)
            share = mfu(flops, float(np.median(seconds)), self.peak)
            rows[precision] = dict(
                cells_s=rate(seconds, n), mfu=round(share, 4), cells=n, peak_memory_gb=peak_gb()
            )
        text = "; ".join(
            f"{k} {v['cells_s']['median']:g} cells/s, MFU {v['mfu']:.3f}" for k, v in rows.items()
        )
        return rows | dict(number=text)

    def one_cell(self, length):
        "A random cell on the device, for edits."
        from scemb.perturb.edits import cells_on

        cells = self.cells(np.array([length]))
        return cells_on(self.device, cells, cells["values"], cells=np.array([0]))

    def exact(self, coder, cell, n):
        "Mask n genes of a cell exactly, evenly over its ranks -> (their places, shifts (n, D))."
        from scemb.perturb.perturb import shifts_of

        places = np.linspace(0, len(cell.ids) - 1, n).astype(int)
        tokens = cell.ids.cpu().numpy()[places]
        shifts, _, _ = shifts_of(
            coder, cell, np.zeros(n, int), places=places[:, None], tokens=tokens[:, None]
        )
        return places, shifts

    def perturb(self):
        "Variants a second of `shifts_of`, and seconds for all genes of a cell at that rate."
        rows = {}
        lengths = (16, 48) if self.toy else (512, 2048)
        for precision in ("fp32",) if self.toy else ("bf16", "fp32"):
            coder = self.coder(precision)
            for length in lengths:
                n = 16 if self.toy else 128
                if not self.toy and precision == "fp32":
                    n = 32
                cell = self.one_cell(length)
                seconds = timed(lambda c=coder, x=cell, n=n: self.exact(c, x, n), self.repeats, 1)
                rows[f"{precision}, {length} genes"] = dict(
                    variants_s=rate(seconds, n),
                    variants=n,
                    peak_memory_gb=peak_gb(),
                    seconds_a_cell=round(float(np.median(seconds)) * length / n, 4),
                )
        text = "; ".join(f"{k} {v['variants_s']['median']:g} variants/s" for k, v in rows.items())
        return rows | dict(number=text)

    def screen(self):
        "Seconds a cell of `screened`, and how its effects agree with exact runs in full precision."
        from scemb.perturb.screen import screened, trust

        ways = dict(fp32={})
        if "precision" in inspect.signature(screened).parameters:
            ways = {p: dict(precision=p) for p in ("fp32", "bf16")}
        coder = self.coder("fp32")
        generator = np.random.default_rng(0)
        unit = generator.normal(size=(3, self.size["hidden_size"]))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        put = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        rows = {}
        for length in (16, 48) if self.toy else (512, 2048):
            cell = self.one_cell(length)
            places, shifts = self.exact(coder, cell, 8 if self.toy else 48)
            settings = [(name, how, "highest") for name, how in ways.items()]
            if self.cuda:
                settings.append(("tf32", ways["fp32"], "high"))
            for name, how, products in settings:
                for n in (1, 3):

                    def run(n=n, how=how, cell=cell):
                        return screened(coder.net, cell.ids, cell.bins, directions=put[:n], **how)

                    torch.set_float32_matmul_precision(products)
                    seconds = timed(run, 2 if self.toy else 3, 1)
                    found = run()
                    torch.set_float32_matmul_precision("highest")
                    wanted = shifts @ unit[:n].T
                    agree = trust(found[:, places].T.ravel(), wanted.ravel())
                    rows[f"{name}, {length} genes, {n} directions"] = dict(
                        seconds_a_cell=spread(seconds), peak_memory_gb=peak_gb(), **agree
                    )
        text = "; ".join(f"{k} {v['seconds_a_cell']['median']:.3f} s" for k, v in rows.items())
        return rows | dict(number=text)

    # --- parts that are run when asked for ------------------------------------------------------

    def bases(self):
        "Embed, LoRA step, exact maskings and screen on Geneformer's sizes, beside a loop."
        from scemb.model.geneformer import SIZES

        out = {}
        for name in ("V1-10M", "V2-104M", "V2-316M"):
            forget_memory()
            size = SIZES[name]
            room = self.window if self.toy else 2048 if size["version"] == 1 else 4094
            ours, stock = self.both_nets(size, room)
            lengths = self.real_lengths(room)[: 8 if self.toy else 64]
            out[name] = dict(
                parameters=sum(p.numel() for p in stock.parameters()),
                mean_length=float(lengths.mean()),
                embed=self.embed_both(ours, stock, lengths),
                lora_step=self.lora_both(ours, stock, lengths[:8]),
                edits=self.edits_of_base(ours, stock, min(room, 16 if self.toy else 2048)),
            )
        found = {name: row["embed"] for name, row in out.items()}
        text = "; ".join(
            f"{name} {row['ours']['median']:g} cells/s, loop {row['loop']['median']:g}"
            for name, row in found.items()
        )
        return out | dict(number=text)

    def both_nets(self, size, room):
        "The same sizes as our model and as transformers', on the device, with fresh weights."
        from transformers import BertConfig, BertForMaskedLM

        vocabulary = vocabulary_of(self.vocab - 4 if self.toy else None)
        width = 32 if self.toy else size["width"]
        shape = dict(
            vocab_size=len(vocabulary),
            hidden_size=width,
            num_hidden_layers=2 if self.toy else size["layers"],
            num_attention_heads=2 if self.toy else size["heads"],
            intermediate_size=width * (2 if size["version"] == 1 else 4),
            hidden_act="relu",
            max_position_embeddings=room + 2,
            hidden_dropout_prob=0.02,
            attention_probs_dropout_prob=0.0,
        )
        torch.manual_seed(0)
        ours = ScembForMaskedLM(ScembConfig(type_vocab_size=101, **shape)).to(self.device).eval()
        stock = BertForMaskedLM(BertConfig(type_vocab_size=2, **shape)).to(self.device).eval()
        return ours, stock

    def alternating(self, ours, loop, n, warm=1):
        "Seconds of two ways in turn -> rates for n units of work, and peak memory of each."
        seconds, memory = dict(ours=[], loop=[]), {}
        for i in range(warm + (1 if self.toy else 3)):
            for name, work in (("ours", ours), ("loop", loop)):
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                took = timed(work, 1, 0)
                memory[f"{name}_peak_memory_gb"] = peak_gb()
                seconds[name] += took if i >= warm else []
        ratio = [b / a for a, b in zip(seconds["ours"], seconds["loop"], strict=True)]
        rates = {name: rate(s, n) for name, s in seconds.items()}
        return rates | memory | dict(loop_over_ours=spread(ratio, 2))

    def padded_ids(self, cells):
        "Padded tokens and the mask of what is real, on the device, rows as they come."
        rows = np.split(cells["genes"].astype(np.int64), cells["offsets"][1:-1])
        rows = [torch.from_numpy(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ids.to(self.device), (ids > 0).long().to(self.device)

    def loop_over(self, stock, ids, mask, batch=16):
        "Padded batches through BertForMaskedLM with all hidden states -> means over genes."
        means = []
        with torch.no_grad(), self.autocast():
            for i in range(0, len(ids), batch):
                here = mask[i : i + batch]
                here_ids = ids[i : i + batch, : int(here.sum(1).max())]
                here = here[:, : here_ids.shape[1]]
                got = stock(here_ids, attention_mask=here, output_hidden_states=True)
                state = got.hidden_states[-2] * here[..., None]
                means.append((state.sum(1) / here.sum(1, keepdim=True)).float().cpu())
        return torch.cat(means)

    def embed_both(self, ours, stock, lengths):
        "Cells a second of `encode_cells` and of the loop, in the precision of the run."
        from scemb.model.embed import encode_cells

        cells = random_cells(lengths, ours.config.vocab_size)
        flat = cells["genes"], np.ones_like(cells["bins"]), cells["offsets"]
        budget = 65_536 if self.cuda else 4096
        ids, mask = self.padded_ids(cells)
        return self.alternating(
            lambda: encode_cells(ours, *flat, "second-to-last", budget, self.precision),
            lambda: self.loop_over(stock, ids, mask),
            len(lengths),
        )

    def lora_both(self, ours, stock, lengths):
        "Optimizer steps a second of LoRA on eight cells: unpadded, and padded with peft on BERT."
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            return dict(missing="peft is not installed")
        from transformers import BertForSequenceClassification

        from scemb.adapt.cell_model import CellModel, FinetuneSettings

        settings = FinetuneSettings(method="lora", precision=self.precision)
        mine = CellModel(ours.bert, 2, settings).to(self.device).train()
        theirs = BertForSequenceClassification(stock.config)
        theirs.bert.load_state_dict(stock.bert.state_dict(), strict=False)
        how = LoraConfig(r=settings.rank, lora_alpha=16, target_modules=list(settings.lora_on))
        theirs = get_peft_model(theirs, how).to(self.device).train()
        cells = random_cells(lengths, ours.config.vocab_size)
        ids, mask = self.padded_ids(cells)
        labels = torch.arange(len(lengths), device=self.device) % 2
        flat = torch.from_numpy(cells["genes"].astype(np.int64))[None].to(self.device)
        where = Segments.of(lengths, self.device)
        batch = dict(input_ids=flat, bins=torch.ones_like(flat), cu_seqlens=where)
        works = []
        for model, scores in (
            (mine, lambda: mine(batch)),
            (theirs, lambda: theirs(input_ids=ids, attention_mask=mask).logits),
        ):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)

            def step(scores=scores, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = F.cross_entropy(scores().float(), labels)
                loss.backward()
                optimizer.step()

            works.append(step)
        return self.alternating(*works, 1)

    def edits_of_base(self, ours, stock, length):
        "Variants a second of exact maskings, beside the loop; seconds a cell of the screen."
        from scemb.model.embed import CellEncoder
        from scemb.perturb.screen import screened
        from scemb.tokens.ranking import TokenizerSettings

        vocabulary = vocabulary_of(self.vocab - 4 if self.toy else None)
        settings = TokenizerSettings(max_len=length)
        budget = 65_536 if self.cuda else 4096
        coder = CellEncoder(ours, vocabulary, settings, "mean12", self.precision, budget)
        cell = self.one_cell(length)
        n = 8 if self.toy else 32
        places = torch.linspace(0, length - 1, n).long()
        ids = cell.ids[None].repeat(n, 1)
        ids[torch.arange(n), places] = 1
        mask = torch.ones_like(ids)
        exact = self.alternating(
            lambda: self.exact(coder, cell, n), lambda: self.loop_over(stock, ids, mask), n
        )
        width = ours.config.hidden_size
        unit = torch.nn.functional.normalize(torch.ones(1, width, device=self.device))
        full = CellEncoder(ours, vocabulary, settings, "mean12", "fp32", budget)

        def screen():
            return screened(full.net, cell.ids, cell.bins, directions=unit)

        seconds = timed(screen, 2 if self.toy else 3, 1)
        of_loop = length / exact["loop"]["median"]
        return dict(
            exact,
            genes=length,
            screen_seconds_a_cell=spread(seconds),
            screen_peak_memory_gb=peak_gb(),
            loop_seconds_a_cell=round(of_loop, 3),
        )

    def agreement(self):
        "Unpadded attention against padded eager attention, in full precision and that of the run."
        lengths = self.lengths[:6]
        batch = self.padded(lengths, int(lengths.max()))
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        row = {k: batch[k][real][None] for k in ("input_ids", "bins", "labels")}
        row["cu_seqlens"] = Segments.of(lengths, self.device)
        inputs = [{k: v for k, v in b.items() if k != "labels"} for b in (batch, row)]
        model = self.model(num_hidden_layers=2, hidden_dropout_prob=0.0).eval()

        def gradient(b):
            model.zero_grad()
            model(**b).loss.backward()
            return torch.cat([p.grad.flatten().float() for p in model.parameters()])

        out = {}
        for name, precision in (("float32", "fp32"), ("run", self.precision)):
            with torch.no_grad(), autocast(self.device, precision):
                eager = model.bert(**inputs[0], output_attentions=True).last_hidden_state[real]
                ours = model.bert(**inputs[1]).last_hidden_state[0]
            with autocast(self.device, precision):
                a, b = gradient(batch), gradient(row)
            difference = float((eager.float() - ours.float()).abs().max())
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            out[name] = dict(
                hidden_max_difference=difference,
                gradient_relative_difference=float((a - b).norm() / a.norm()),
                kernel=attention_kernel(self.device, dtype),
            )
        return out | dict(number=f"{out['float32']['hidden_max_difference']:.1e}")

    def kernels(self):
        "Attention alone, forward and backward, in each kernel that is there."
        heads = self.size["num_attention_heads"]
        d = self.size["hidden_size"] // heads
        budget = 16 * self.window
        lengths = self.pick(unpadded_batches(self.lengths, budget, max_len=self.window), 1)[0]
        total = int(lengths.sum())
        cells = Segments.of(lengths, self.device)
        shape = total, heads, d
        qkv = [
            torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()
            for _ in range(3)
        ]
        flops = 3 * 4 * self.size["hidden_size"] * float((lengths.astype(float) ** 2).sum())

        def flex():
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            owner = torch.repeat_interleave(
                torch.arange(len(lengths), device=self.device),
                torch.from_numpy(lengths).to(self.device),
            )
            mask = create_block_mask(
                lambda b, h, i, j: owner[i] == owner[j],
                None,
                None,
                total,
                total,
                device=self.device,
            )
            attend = torch.compile(flex_attention)

            def run():
                q, k, v = (x.transpose(0, 1)[None] for x in qkv)
                return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

            return run

        found = {
            k: (lambda k=k: lambda: _by_kernel(k, *qkv, cells, 0.0))
            for k in ("varlen", "flash_attn", "padded")
        } | dict(flex=flex, cudnn=lambda: lambda: cudnn_rows("cudnn", *qkv, cells))
        with torch.no_grad():
            reference = _by_kernel("padded", *qkv, cells, 0.0).float()
        out = {}
        for name, make in found.items():
            try:
                if not self.cuda and name != "padded":
                    raise RuntimeError("measured on a GPU only")
                attend = make()

                def both(attend=attend):
                    torch.autograd.grad(attend().float().square().sum(), qkv)

                with torch.no_grad():
                    difference = float((attend().float() - reference).abs().max())
                seconds = timed(both, self.repeats)
                rates = spread([flops / s / 1e12 for s in seconds], 2)
                out[name] = dict(
                    ms=spread([1e3 * s for s in seconds]),
                    tflops=rates,
                    max_difference_to_padded=difference,
                )
            except Exception as e:
                out[name] = dict(broke=f"{type(e).__name__}: {e}"[:300])
        text = "; ".join(f"{k} {v['ms']['median']:.2f} ms" for k, v in out.items() if "ms" in v)
        return out | dict(tokens=total, cells=len(lengths), number=text)

    def cudnn_step(self):
        "Eager steps on full cells with torch's row kernel and with cuDNN's, in turn."
        ways = dict(flash=_by_kernel, cudnn=cudnn_rows)
        model, out = self.model().train(), {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        for cells in (2,) if self.toy else (32, 16):
            lengths = [np.full(cells, self.window)]
            batch = self.flat(lengths[0])
            seconds = {name: [] for name in ways}
            for i in range(self.repeats + 1):
                for name, kernel in ways.items():
                    with mock.patch.object(model_module, "_by_kernel", kernel):
                        took = timed(self.training(model, [batch], optimizer), 1, 0)
                    if i:  # the first round warms up
                        seconds[name] += took
            for name in ways:
                out[f"{name}, {cells} cells"] = self.report(seconds[name], lengths)
        # Ten cells of mixed lengths, without dropout: gradients of both, against each other
        model.eval()
        mixed = self.flat(np.linspace(self.window // 8, self.window, 10).astype(int))
        gradients = []
        for kernel in ways.values():
            model.zero_grad(set_to_none=True)
            with mock.patch.object(model_module, "_by_kernel", kernel), self.autocast():
                model(**mixed).loss.backward()
            some = [p.grad.flatten()[:10_000].float() for p in model.bert.encoder.parameters()]
            gradients.append(torch.cat(some))
        a, b = gradients
        text = "; ".join(f"{k} MFU {v['mfu']}" for k, v in out.items())
        return out | dict(
            gradient_relative_difference=float((a - b).norm() / a.norm()), number=text
        )

    def checkpointing(self):
        "The largest batch of full cells that fits, with and without gradient checkpointing."
        out = {}
        for name in ("plain", "gradient checkpointing"):
            model = self.model().train()
            if name != "plain":
                model.gradient_checkpointing_enable()
            for cells in (2, 4) if self.toy else (32, 64, 128, 256):
                try:
                    forget_memory()
                    batch = self.flat(np.full(cells, self.window))
                    seconds = timed(self.training(model, [batch]), 1)
                    out[f"{name}, {cells} full cells"] = dict(
                        cells_s=round(cells / seconds[0], 1), peak_memory_gb=peak_gb()
                    )
                except torch.OutOfMemoryError:
                    out[f"{name}, {cells} full cells"] = "out of memory"
                    break
            del model
        return out | dict(number=f"{len(out)} sizes")


class Enough(Exception):
    "Ends a training when its steps have been timed."


def goals(parts):
    "What was aimed at, what was found, and whether it is reached; computed from the parts."
    found = {}
    full = [v for v in parts.get("full_cells", {}).values() if isinstance(v, dict) and "mfu" in v]
    if full:
        best = max(full, key=lambda v: v["mfu"])
        found |= dict(
            full_cells_s=best["cells_s"]["median"],
            full_mfu=best["mfu"],
            full_mfu_stretch=best["mfu"],
        )
    embedded = [
        v["cells_s"]["median"]
        for v in parts.get("embed", {}).values()
        if isinstance(v, dict) and "cells_s" in v
    ]
    if embedded:
        found["embed_cells_s"] = max(embedded)
    rows = {k: dict(goal=GOALS[k], found=v, reached=bool(v >= GOALS[k])) for k, v in found.items()}
    text = "; ".join(f"{k} {v['found']:g} of {v['goal']:g}" for k, v in rows.items())
    return rows | dict(number=text or "nothing to judge by")


def main():
    names = list(DEFAULT) + list(MORE)
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--toy", action="store_true", help="every part on the CPU, tiny")
    ap.add_argument("--out", default=str(TOP / "results/benchmarks/gpu"), help="folder of the JSON")
    ap.add_argument(
        "--minutes", type=float, default=6.0, help="a part that would end later is left out"
    )
    ap.add_argument(
        "--parts", help=f"some of {','.join(names)}, or all; default {','.join(DEFAULT)}"
    )
    ap.add_argument(
        "--limit",
        type=float,
        default=45.0,
        help="seconds after which a part is broken off, unless it was to take longer",
    )
    ap.add_argument("--began", help=argparse.SUPPRESS)
    ap.add_argument("--hide", help="packages that are to look as if they were not installed")
    args = ap.parse_args()
    if args.toy:
        torch.cuda.is_available = lambda: False  # every part of the package stays on the CPU
    if not args.toy and not torch.cuda.is_available():
        sys.exit("There is no GPU that torch can use; --toy runs every part on the CPU.")
    chosen = names if args.toy or args.parts == "all" else list(DEFAULT)
    if args.toy:
        chosen.remove("ladder_compiled")  # a CPU would compile anew for each batch
    if args.parts and args.parts != "all":
        chosen = args.parts.split(",")
    if unknown := set(chosen) - set(names):
        sys.exit(f"--parts names {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    torch.set_float32_matmul_precision("highest")
    b = Bench(args.toy)
    work = {name: getattr(b, name) for name in names if not name.startswith("ladder_")}
    work["ladder_all"] = lambda: b.ladder(whole=True)
    work["ladder_compiled"] = lambda: b.ladder(whole=True, compiled=True)
    report = Report(
        Path(args.out) / file_name("bench", b.toy, b.cuda),
        b.about(),
        args.minutes,
        args.limit * (8 if args.toy else 1),
    )
    for name in chosen:
        estimate = 0.0 if b.toy else float((DEFAULT | MORE)[name])
        report.part(name, work[name], estimate)
    report.minutes = math.inf
    report.part("goals", lambda: goals(report.result["parts"]))
    failed = report.failed()
    print(
        f"{report.path.name}: {minutes_gone():.1f} minutes"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return len(failed) if args.toy else 0


if __name__ == "__main__":
    sys.exit(main())
