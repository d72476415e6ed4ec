"""Whether everything that scEMB does on a GPU is right: each check alone, in two minutes.

    python nbs/launch/gpu_check.py --out DIR             # on a GPU
    python nbs/launch/gpu_check.py --toy --out DIR       # every check on a CPU, small
    python nbs/launch/gpu_check.py --tokens FOLDER       # with real cells (a token set)

Reference is the same code on the CPU: in float64 for the attention, in float32 for the rest.
Errors are relative: the norm of the difference over the norm of the reference. Float32 lands far
below 1e-3, bfloat16 between 1e-3 and 1e-2 for one product, and a few times that after some layers.

A check prints one line: ok or FAIL, and its number. The JSON (gpu_check_<device>.json) is written
after each. The exit code is the number of failures with --toy, and 0 otherwise.
Neither anndata nor scanpy nor datasets is needed.
"""

import argparse
import copy
import importlib
import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))
from gpu_parts import (  # noqa: E402
    HIDDEN,
    TOP,
    Report,
    cells_of,
    device_name,
    file_name,
    minutes_gone,
    random_cells,
    token_set,
    versions,
    vocabulary_of,
)

from scemb.model import encoder as model_module  # noqa: E402
from scemb.model.encoder import (  # noqa: E402
    ScembConfig,
    ScembForMaskedLM,
    Segments,
    attention_kernel,
    autocast,
    chosen_precision,
    compile_layers,
)
from scemb.model.batching import HostReads  # noqa: E402

MODULES = (
    "adapt.finetune",
    "adapt.fit",
    "model.baselines",
    "model.batching",
    "model.checkpoint",
    "model.embed",
    "model.encoder",
    "model.gene_embeddings",
    "model.pretrain",
    "perturb.edits",
    "perturb.perturb",
    "perturb.screen",
    "tokens.tokenize",
)
KINDS = ("mask", "delete", "shift", "overexpress")
HIDDEN_LIMIT = dict(fp32=1e-4, bf16=3e-2)  # relative errors of hidden states
GRADIENT_LIMIT = dict(fp32=1e-3, bf16=8e-2)  # and of gradients


def relative(found, wanted) -> float:
    "Norm of the difference over the norm of what is wanted; NaN anywhere gives NaN."
    found = torch.as_tensor(found).double().cpu()
    wanted = torch.as_tensor(wanted).double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def cosine(found, wanted) -> float:  # rows (n, D) -> lowest cosine of a row with its reference
    "How far the worst row points elsewhere."
    found = torch.as_tensor(found).double().cpu()
    wanted = torch.as_tensor(wanted).double().cpu()
    return float(torch.nn.functional.cosine_similarity(found, wanted, dim=1).min())


class Lab:
    "What the checks work with: a device, the shipped model, cells."

    def __init__(self, toy: bool, out: Path, tokens=None):
        self.toy, self.out = toy, out
        self.device = "cuda" if torch.cuda.is_available() and not toy else "cpu"
        self.cuda = self.device == "cuda"
        self.precisions = ("fp32", "bf16")
        self.rng = np.random.default_rng(0)
        from scemb.model.checkpoint import load_checkpoint
        from scemb.tokens.tokenize import read_tokens

        self.net, self.vocabulary, self.settings, _ = load_checkpoint("scemb-small")
        self.real = read_tokens(tokens) if tokens else None
        self.source = str(Path(tokens).name) if tokens else "random"

    def coder(self, device, precision="fp32", pooling="mean12"):
        "A CellEncoder of the shipped model on a device."
        from scemb.model.embed import CellEncoder

        net = copy.deepcopy(self.net).to(device).eval()
        return CellEncoder(
            net,
            self.vocabulary,
            self.settings,
            pooling,
            precision,
            token_budget=4096 if device == "cpu" else 65_536,
        )

    def cells(self, n, longest, seed=1):
        "Some cells of the shipped model's vocabulary, real ones where there are any."
        if self.real is not None:
            which = np.random.default_rng(seed).permutation(len(self.real))[:n]
            return cells_of(self.real, which, longest)
        lengths = np.random.default_rng(seed).integers(longest // 4, longest + 1, n)
        return random_cells(lengths, len(self.vocabulary), seed=seed)

    def small_model(self, head_width, layers=2, heads=2, longest=512, dropout=0.0, seed=0):
        "Fresh weights, large enough that attention is far from even."
        torch.manual_seed(seed)
        width = head_width * heads
        config = ScembConfig(
            vocab_size=500,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=longest,
            initializer_range=0.08,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=dropout,
        )
        return ScembForMaskedLM(config)

    def row(self, lengths, seed=0):
        "One unpadded row of random cells on the host, with the genes to guess."
        generator = torch.Generator().manual_seed(seed)
        total = int(sum(lengths))
        ids = torch.randint(4, 500, (1, total), generator=generator)
        bins = torch.randint(1, 101, (1, total), generator=generator)
        hidden = torch.rand((1, total), generator=generator) < 0.3
        hidden[0, 0] = True
        shown = ids.masked_fill(hidden, 1)
        return dict(input_ids=shown, bins=bins, labels=torch.where(hidden, ids, -100))


def padded(row, lengths):
    "The same cells as padded rows; empty cells have no row."
    lengths = [n for n in lengths if n]
    longest = max(lengths)
    real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    out = {}
    for name, fill in (("input_ids", 0), ("bins", 0), ("labels", -100)):
        x = torch.full(real.shape, fill)
        x[real] = row[name][0]
        out[name] = x
    return out | dict(attention_mask=real.long()), real


def to(batch, device):
    "A batch on a device."
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def states_and_gradients(model, batch, device, precision, real=None, layout=None, **more):
    "Hidden states of the real tokens (T, D) and all gradients in one vector, on the host."
    model = copy.deepcopy(model).to(device).train()
    batch = to(batch, device)
    cells = {} if layout is None else dict(cu_seqlens=Segments.of(layout, device))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with autocast(device, precision):
        hidden = model.bert(**inputs, **cells, **more).last_hidden_state
        loss = model(**batch, **cells, **more).loss
    loss.backward()
    hidden = hidden[0] if real is None else hidden[real.to(device)]
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return hidden.detach().cpu().double(), gradients.cpu().double()


# --- checks ------------------------------------------------------------------------------------


def check_imports(lab):
    "All modules that work on a GPU, without the packages that read files of counts."
    failed = {}
    for name in MODULES:
        try:
            importlib.import_module(f"scemb.{name}")
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {e}"[:300]
    absent = [
        n
        for n in ("anndata", "scanpy", "datasets", "deepspeed", "peft", "accelerate")
        if sys.modules.get(n, True) is None or not _there(n)
    ]
    text = f"{len(MODULES) - len(failed)} of {len(MODULES)}; not there: {', '.join(absent) or '-'}"
    return dict(ok=not failed, failed=failed, absent=absent, number=text)


def _there(name):
    "Whether a package is installed; a plain folder of that name on the path is none."
    try:
        found = importlib.util.find_spec(name)
    except ValueError:
        return False
    return found is not None and found.origin is not None


def check_precision(lab):
    "What precision='auto' means here."
    found = chosen_precision("auto", lab.device)
    wanted = "bf16" if lab.cuda else "fp32"
    return dict(ok=found == wanted, precision=found, number=f"auto is {found} on {lab.device}")


CASES = dict(
    mixed=[33, 5, 0, 1, 70, 64],
    equal=[48, 48, 48],
    single=[70],
    one_token=[1],
    one_token_cells=[1, 1, 1],
    empty_last=[20, 31, 0],
)


def check_attention(lab):
    "Unpadded rows by each kernel against padded rows and against float64 on the CPU."
    rows, worst = {}, {}
    for head_width in (32, 64):
        model = lab.small_model(head_width)
        for name, lengths in CASES.items():
            if lab.toy is False and name == "mixed":
                lengths = [*lengths, 500, 257]
            row = lab.row(lengths)
            rectangle, real = padded(row, lengths)
            double = copy.deepcopy(model).double()
            wanted = states_and_gradients(double, rectangle, "cpu", "fp32", real)
            runs = {"cpu fp32": states_and_gradients(model, row, "cpu", "fp32", layout=lengths)}
            for p in lab.precisions:
                runs[f"row {p}"] = states_and_gradients(model, row, lab.device, p, layout=lengths)
                runs[f"rows {p}"] = states_and_gradients(model, rectangle, lab.device, p, real)
            for p in lab.precisions:  # one product for q, k, v, or three
                other = copy.deepcopy(model)
                for layer in other.bert.encoder["layer"]:
                    layer.attention["self"].fused = not lab.cuda
                runs[f"products {p}"] = states_and_gradients(
                    other, row, lab.device, p, layout=lengths
                )
            if not lab.cuda:  # the kernel for full precision on a GPU
                with mock.patch.object(
                    model_module, "attention_kernel", lambda *a, **named: "padded"
                ):
                    runs["padded fp32"] = states_and_gradients(
                        model, row, "cpu", "fp32", layout=lengths
                    )
            for run, found in runs.items():
                errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
                rows[f"{head_width} {name} {run}"] = dict(hidden=errors[0], gradient=errors[1])
                before = worst.setdefault(run, [0.0, 0.0])
                worst[run] = [_largest(a, b) for a, b in zip(before, errors, strict=True)]
    ok = True
    for run, (hidden, gradient) in worst.items():
        p = run.split()[1]
        ok &= hidden < HIDDEN_LIMIT[p] and gradient < GRADIENT_LIMIT[p]
    kernels = {
        p: attention_kernel(lab.device, dict(fp32=torch.float32, bf16=torch.bfloat16)[p])
        for p in lab.precisions
    }
    text = "; ".join(f"{run} {h:.1e}/{g:.1e}" for run, (h, g) in worst.items())
    return dict(ok=ok, worst=worst, kernels=kernels, cases=rows, number=text)


def _largest(a, b):
    "The larger one; NaN wins."
    return float("nan") if a != a or b != b else max(a, b)


def check_dropout_kernel(lab):
    "Which kernel a training step takes with the paper's dropout on attention weights, and without."
    taken, losses = {}, {}
    lengths = [60, 31, 64]
    for dropout in (0.0, 0.1):
        asked = []
        original = model_module.attention_kernel

        def spy(*a, original=original, asked=asked, **k):
            asked.append(original(*a, **k))
            return asked[-1]

        model = lab.small_model(64, dropout=dropout).to(lab.device).train()
        with mock.patch.object(model_module, "attention_kernel", spy), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with autocast(lab.device, "bf16"):
                loss = model(
                    **to(lab.row(lengths), lab.device), cu_seqlens=Segments.of(lengths, lab.device)
                ).loss
            loss.backward()
        taken[str(dropout)] = sorted(set(asked))
        losses[str(dropout)] = float(loss.detach())
    ok = bool(np.isfinite(list(losses.values())).all())
    if lab.cuda:
        ok &= taken["0.0"] == ["varlen"]
    from scemb.model.pretrain import slow_attention

    said = {p: slow_attention(model.config, lab.device, p) for p in lab.precisions}
    text = f"dropout 0: {', '.join(taken['0.0'])}; dropout .1: {', '.join(taken['0.1'])}"
    return dict(ok=ok, kernels=taken, losses=losses, warning=said, number=text)


def check_compiled(lab):
    "Compiled layers give the loss and the gradients of eager ones, in one graph for all lengths."
    from torch._dynamo.utils import counters

    # a batch of a single cell is a graph of its own, so there is none here
    batches = [[33, 5, 70], [64, 64], [12, 40, 7, 90]]
    if lab.cuda:
        batches = [[8 * n for n in lengths] for lengths in batches]
    longest = max(map(max, batches))
    eager = lab.small_model(64, layers=2, longest=max(512, longest)).to(lab.device).train()
    compiled = copy.deepcopy(eager)
    # A CPU has no kernel for rows of cells: there the padded one stands in, and the graphs are
    # captured but not made into machine code.
    padded_kernel = mock.patch.object(
        model_module, "attention_kernel", lambda *a, **named: "padded"
    )
    precision = "bf16" if lab.cuda else "fp32"
    torch._dynamo.reset()
    counters.clear()
    if lab.toy:
        for layer in compiled.bert.encoder["layer"]:
            layer.compile(dynamic=True, backend="aot_eager")
    else:
        compile_layers(compiled)
    graphs, rows = [], []
    with nullcontext() if lab.cuda else padded_kernel:
        for i, lengths in enumerate(batches):
            batch = to(lab.row(lengths, i), lab.device)
            cells = Segments.of(lengths, lab.device)._replace(lengths=None)  # as on a GPU
            found = []
            for model in (eager, compiled):
                model.zero_grad(set_to_none=True)
                with autocast(lab.device, precision):
                    loss = model(**batch, cu_seqlens=cells).loss
                loss.backward()
                gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
                found.append((float(loss.detach()), gradients.double().cpu()))
            graphs.append(counters["stats"]["unique_graphs"])
            rows.append(
                dict(
                    lengths=lengths,
                    loss=abs(found[1][0] / found[0][0] - 1),
                    gradient=relative(found[1][1], found[0][1]),
                )
            )
    breaks = sum(counters["graph_break"].values())
    late = graphs[-1] - graphs[1]  # a graph more may come with the second shape
    loss = max(r["loss"] for r in rows)
    gradient = max(r["gradient"] for r in rows)
    limit = GRADIENT_LIMIT[precision]
    ok = loss < (1e-2 if lab.cuda else 1e-5) and gradient < limit and breaks == 0 and late == 0
    text = (
        f"loss {loss:.1e}, gradient {gradient:.1e}; {graphs[-1]} graphs, {breaks} breaks, "
        f"{late} graphs after the second shape"
    )
    return dict(
        ok=ok,
        batches=rows,
        graphs=graphs,
        breaks=breaks,
        late_graphs=late,
        reasons=dict(counters["graph_break"]),
        number=text,
    )


def check_embed(lab):
    "64 cells as vectors: three poolings, both precisions, an empty cell, against the CPU."
    from scemb.model.embed import encode_cells

    ranks = lab.net.config.max_position_embeddings
    n, longest = (8, 60) if lab.toy else (64, min(512, ranks - 1))  # <cls> takes a rank
    cells = lab.cells(n, longest)
    cells["offsets"] = np.append(cells["offsets"], cells["offsets"][-1])  # an empty cell
    rows, ok = {}, True
    for pooling in ("mean12", "last", "cls"):
        wanted = lab.coder("cpu", "fp32", pooling)(cells)
        if not np.isnan(wanted[-1]).all():
            raise AssertionError("The vector of an empty cell is NaN; found numbers.")
        for precision in lab.precisions:
            coder = lab.coder(lab.device, precision, pooling)
            found = encode_cells(
                coder.net,
                cells["genes"],
                cells["bins"],
                offsets=cells["offsets"],
                pooling=pooling,
                token_budget=coder.token_budget,
                precision=precision,
            )
            again = coder(cells)
            row = dict(
                largest=float(np.abs(found[:-1] - wanted[:-1]).max()),
                relative=relative(found[:-1], wanted[:-1]),
                cosine=cosine(found[:-1], wanted[:-1]),
                empty_is_nan=bool(np.isnan(found[-1]).all()),
                encoder_equal=bool(np.array_equal(found, again, equal_nan=True)),
            )
            ok &= row["relative"] < HIDDEN_LIMIT[precision] and row["cosine"] > 0.999
            ok &= row["empty_is_nan"]
            rows[f"{pooling} {precision}"] = row
    worst = {p: max(r["largest"] for k, r in rows.items() if k.endswith(p)) for p in lab.precisions}
    lowest = {p: min(r["cosine"] for k, r in rows.items() if k.endswith(p)) for p in lab.precisions}
    text = "; ".join(
        f"{p}: largest difference {worst[p]:.1e}, cosine {lowest[p]:.6f}" for p in lab.precisions
    )
    return dict(ok=ok, rows=rows, cells=n, number=text)


def check_genes(lab):
    "Vectors of genes in their cells, layer by layer, against the CPU."
    from scemb.model.embed import flat_cells, layer_outputs

    cells = lab.cells(4 if lab.toy else 16, 60 if lab.toy else 512, seed=2)
    flat = flat_cells(
        cells["genes"], cells["bins"], cells["offsets"], cells=np.arange(len(cells["offsets"]) - 1)
    )

    @torch.no_grad()
    def vectors(device, precision):
        coder = lab.coder(device)
        with autocast(device, precision):
            return [step[2][0].float().cpu() for step in layer_outputs(coder.net, *flat)]

    wanted = vectors("cpu", "fp32")
    errors = {}
    for precision in lab.precisions:
        found = vectors(lab.device, precision)
        errors[precision] = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
    ok = all(max(e) < HIDDEN_LIMIT[p] for p, e in errors.items())
    text = "; ".join(f"{p} {max(e):.1e}" for p, e in errors.items())
    return dict(ok=ok, errors=errors, number=f"worst layer: {text}")


def edits_of(cells, kind, n_targets, n_tokens, rng):
    "Variants to run: which cell, at which place, which gene (see `scemb.perturb.edits.variants`)."
    lengths = np.diff(cells["offsets"])
    which = np.repeat(np.arange(len(lengths)), n_targets)
    places = np.concatenate([np.sort(rng.permutation(n)[:n_targets]) for n in lengths])
    genes = cells["genes"].astype(np.int64)
    tokens = genes[cells["offsets"][which] + places]
    if kind == "overexpress":  # half of the genes were not expressed
        for i in range(0, len(which), 2):
            start, stop = cells["offsets"][which[i] : which[i] + 2]
            tokens[i] = np.setdiff1d(np.arange(4, n_tokens), genes[start:stop])[i]
            places[i] = -1
    return which, places[:, None], tokens[:, None]


def on_device(cells, device):
    "All cells of a chunk on a device."
    from scemb.perturb.edits import cells_on

    return cells_on(device, cells, cells["values"], cells=np.arange(len(cells["offsets"]) - 1))


def check_perturb(lab):
    "Four kinds of perturbation against the CPU: the shift of each cell, and its size."
    from scemb.perturb.perturb import shifts_of

    n, longest, n_targets = (3, 40, 4) if lab.toy else (6, 400, 16)
    cells = lab.cells(n, longest, seed=3)
    rows, ok = {}, True
    for kind in KINDS:
        rng = np.random.default_rng(4)
        which, places, tokens = edits_of(cells, kind, n_targets, len(lab.vocabulary), rng)
        wanted = shifts_of(
            lab.coder("cpu"),
            on_device(cells, "cpu"),
            which,
            places=places,
            tokens=tokens,
            kind=kind,
        )
        for precision in lab.precisions:
            coder = lab.coder(lab.device, precision)
            found = shifts_of(
                coder, on_device(cells, lab.device), which, places=places, tokens=tokens, kind=kind
            )
            row = dict(
                shift=relative(found[0], wanted[0]),
                impact=relative(found[1], wanted[1]),
                bag_impact=relative(found[2], wanted[2]),
                order=float(np.corrcoef(found[1], wanted[1])[0, 1]),
            )
            # a shift is a small difference of two states: in bf16 its error is larger than theirs
            ok &= row["shift"] < (1e-3 if precision == "fp32" else 0.5) and row["order"] > 0.98
            rows[f"{kind} {precision}"] = row
    text = "; ".join(f"{k} {v['shift']:.1e}" for k, v in rows.items())
    return dict(ok=ok, rows=rows, variants=n * n_targets, number=text)


def precisions_of(function):
    "Keyword arguments that set the precision of a function, for each precision that it knows."
    if "precision" not in inspect.signature(function).parameters:
        return dict(fp32={})
    return {p: dict(precision=p) for p in ("fp32", "bf16")}


def check_screen(lab):
    "The screen of a cell against exact runs, on the device in each precision and on the CPU."
    from scemb.perturb.perturb import shifts_of
    from scemb.perturb.screen import screened, trust

    longest, sample = (48, 16) if lab.toy else (512, 64)
    cells = lab.cells(1, longest, seed=5)
    direction = np.random.default_rng(6).normal(size=(2, lab.net.config.hidden_size))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    some = edits_of(
        cells,
        "mask",
        min(sample, int(np.diff(cells["offsets"])[0])),
        len(lab.vocabulary),
        np.random.default_rng(7),
    )
    exact = shifts_of(lab.coder("cpu"), on_device(cells, "cpu"), *some)[0] @ direction.T

    def run(device, **how):
        coder, cell = lab.coder(device), on_device(cells, device)
        put = torch.as_tensor(direction, dtype=torch.float32, device=device)
        return screened(coder.net, cell.ids, cell.bins, directions=put, pooling="mean12", **how)

    on_cpu = run("cpu")
    rows, ok = {}, True
    ways = dict(precisions_of(screened))
    for name, how in ways.items():
        found = run(lab.device, **how)
        rows[name] = row = trust(found[:, some[1][:, 0]].T.ravel(), exact.ravel())
        row["against_cpu"] = relative(found, on_cpu)
    if lab.cuda:
        torch.set_float32_matmul_precision("high")
        found = run(lab.device)
        torch.set_float32_matmul_precision("highest")
        rows["tf32"] = trust(found[:, some[1][:, 0]].T.ravel(), exact.ravel())
        rows["tf32"]["against_cpu"] = relative(found, on_cpu)
    rows["cpu"] = trust(on_cpu[:, some[1][:, 0]].T.ravel(), exact.ravel())
    ok = rows["fp32"]["against_cpu"] < 1e-3
    text = "; ".join(
        f"{k} Spearman {v['spearman']:.4f}, error {v['relative_rmse']:.3f}" for k, v in rows.items()
    )
    return dict(ok=ok, rows=rows, genes=int(np.diff(cells["offsets"])[0]), number=text)


def check_fit(lab):
    "Fine-tuning on the device: the loss falls, and a copy on the CPU predicts the same."
    from scemb.adapt.cell_model import CellModel, FinetuneSettings
    from scemb.adapt.fit import fit
    from scemb.adapt.predict import predict

    n, longest = (24, 40) if lab.toy else (96, 256)
    lengths = np.random.default_rng(8).integers(longest // 2, longest + 1, n)
    cells = random_cells(lengths, len(lab.vocabulary), n_types=2, seed=8)
    tokens = token_set(cells, lab.vocabulary, lab.settings.max_len)
    y = cells["types"].astype(np.int64)
    train, held = np.arange(0, n * 2 // 3), np.arange(n * 2 // 3, n)
    ways = {way: dict(method=way) for way in ("probe", "full", "freeze", "prefix")}
    if _there("peft"):
        ways["lora"] = dict(method="lora")
    if "precision" in inspect.signature(FinetuneSettings).parameters:
        ways["full, fp32"] = dict(method="full", precision="fp32")
    rows, ok = {}, True
    for way, how in ways.items():
        settings = FinetuneSettings(**how, epochs=1 if lab.toy else 2, gene_dropout=0.2)
        model = CellModel(copy.deepcopy(lab.net.bert), 2, settings).to(lab.device)
        history = fit(model, tokens, y, train=train)
        found = predict(model, tokens, cells=held)
        on_cpu = predict(copy.deepcopy(model).to("cpu"), tokens, cells=held)
        loss = [h["loss"] for h in history[1:]]
        row = dict(
            loss=loss,
            accuracy=float((found.argmax(1) == y[held]).mean()),
            against_cpu=relative(found, on_cpu),
            same_class=float((found.argmax(1) == on_cpu.argmax(1)).mean()),
        )
        limit = 0.15 if lab.cuda and "fp32" not in way else 1e-3
        ok &= row["against_cpu"] < limit and row["same_class"] > 0.95
        # A way that starts from the probe starts low: half of chance's loss is low enough.
        learns = len(loss) < 2 or loss[-1] < max(1.1 * loss[0], np.log(2) / 2)
        ok &= bool(np.isfinite(loss).all()) and learns
        rows[way] = row
    text = "; ".join(
        f"{k} accuracy {v['accuracy']:.2f}, CPU copy {v['against_cpu']:.1e}"
        for k, v in rows.items()
    )
    return dict(ok=ok, rows=rows, cells=n, number=text)


# --- pretraining -------------------------------------------------------------------------------


STEPS, SAVE, DIES_AT = 30, 10, 24
FEW = dict(steps=12, save_every=4)  # of a rehearsal, which dies in the tenth step


def training_run(toy, **change):
    "Cells, model and settings of a short pretraining, the same in every process."
    from scemb.model.pretrain import TrainSettings, new_model

    longest = 48 if toy else 512
    lengths = np.random.default_rng(9).integers(longest // 3, longest + 1, 60 if toy else 600)
    vocabulary = vocabulary_of(300)
    # a vocabulary of 300 genes holds cells of up to 200
    cells = random_cells(np.minimum(lengths, 200), len(vocabulary), seed=9)
    tokens = token_set(cells, vocabulary, longest)
    settings = dict(
        steps=STEPS,
        warmup_steps=3,
        token_budget=600 if toy else 8192,
        max_len=longest,
        mask_share=0.3,
        cell_weight=10.0,
        save_every=SAVE,
        precision="auto",
        start="random",
        compile=False,
        ahead=4,
    )
    settings |= (FEW if toy else {}) | change
    settings = TrainSettings(**settings)
    size = dict(layers=2, width=32, heads=2) if toy else dict(layers=4, width=256, heads=4)
    model = new_model(tokens, settings, **size, dropout=0.1, attention_dropout=0.0)
    return tokens, model, settings


def child(out, toy):
    "A training that is killed without a word in the middle of a step."
    from scemb.model.pretrain import Batches, pretrain

    original = Batches.__getitem__

    def dies(self, i):
        if i + self.start >= (9 if toy else DIES_AT):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, i)

    with mock.patch.object(Batches, "__getitem__", dies):
        tokens, model, settings = training_run(toy)
        pretrain(tokens, out, model, settings=settings, quiet=True)


def check_resume(lab):
    "Steps in one go, and as many killed and taken up again: the same losses and weights."
    import pandas as pd
    from safetensors.torch import load_file
    from scemb.model.pretrain import pretrain

    with tempfile.TemporaryDirectory() as d:
        whole, broken = Path(d) / "whole", Path(d) / "broken"
        # the child runs while this process trains: both are short
        command = [sys.executable, str(HERE), "--child", str(broken)] + ["--toy"] * lab.toy
        command += ["--hide", ",".join(HIDDEN)] * bool(HIDDEN)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            tokens, model, settings = training_run(lab.toy)
            pretrain(tokens, whole, model, settings=settings, quiet=True)
            said, _ = process.communicate(timeout=300 if lab.toy else 60)
        finally:
            process.kill()  # nothing, where it has ended
        if process.returncode != -signal.SIGKILL:
            raise AssertionError(
                f"The child was to be killed; it ended with {process.returncode}: {said[-600:]}"
            )
        kept = sorted(p.name for p in (broken / "steps").glob("checkpoint-*"))
        tokens, model, settings = training_run(lab.toy)
        pretrain(tokens, broken, model, settings=settings, resume=True, quiet=True)
        a, b = (pd.read_csv(f / "loss.csv").loss.to_numpy() for f in (whole, broken))
        first, second = (load_file(f / "model.safetensors") for f in (whole, broken))
    weights = max(float((first[k] - second[k]).abs().max()) for k in first)
    losses = float((np.abs(a - b) / a).max()) if len(a) == len(b) else float("nan")
    # sums of gradients on a GPU have no fixed order, so equal bits are not promised there
    ok = losses < (1e-7 if not lab.cuda else 1e-3) and a[-1] < a[0]
    text = (
        f"loss {a[0]:.3f} -> {a[-1]:.3f}; {len(a)} losses differ by {losses:.1e} of them, "
        f"weights by {weights:.1e}; taken up from {', '.join(kept)}"
    )
    return dict(
        ok=ok,
        losses=a.tolist(),
        resumed=b.tolist(),
        difference=losses,
        weights=weights,
        bit_equal=losses == 0.0 and weights == 0.0,
        kept=kept,
        number=text,
    )


def check_nan(lab):
    "A loss that is no number: the batch is saved, its file named, the run stops."
    from scemb.model.pretrain import pretrain

    tokens, model, settings = training_run(lab.toy)
    with torch.no_grad():
        model.cls["predictions"].bias[10] = float("nan")
    with tempfile.TemporaryDirectory() as d:
        try:
            pretrain(tokens, Path(d) / "run", model, settings=settings, quiet=True)
        except FloatingPointError as e:
            said = str(e)
        else:
            raise AssertionError("The run went on with a loss that is no number.")
        files = sorted((Path(d) / "run").glob("nan_batch*.npz"))
        held = sorted(np.load(files[0])) if files else []
    ok = len(files) > 0 and files[0].name in said and "input_ids" in held
    return dict(
        ok=ok,
        message=said,
        holds=held,
        number=f"{files[0].name if files else 'no file'} holds {', '.join(held)}",
    )


def check_scores(lab):
    "Held-out scores of the shipped model on the device against the CPU."
    from scemb.model.baselines import masked_scores
    from scemb.model.pretrain import model_scorer

    cells = lab.cells(6 if lab.toy else 48, 60 if lab.toy else 512, seed=10)
    tokens = token_set(cells, lab.vocabulary, lab.settings.max_len)

    def loss(device):
        score = model_scorer(copy.deepcopy(lab.net).to(device).eval())
        table = masked_scores(tokens, dict(model=score), max_len=lab.settings.max_len, seed=1)
        return float(table.select_dtypes("number").iloc[:, -1].mean()), table

    _, wanted = loss("cpu")
    _, found = loss(lab.device)
    numbers = wanted.select_dtypes("number")
    error = float(
        np.nanmax(
            np.abs(found[numbers.columns].to_numpy(float) - numbers.to_numpy(float)).mean(0)
            / np.maximum(1e-9, np.abs(numbers.to_numpy(float)).mean(0))
        )
    )
    return dict(
        ok=error < 0.02, difference=error, number=f"largest relative difference {error:.1e}"
    )


def check_batches(lab):
    "Batches made ahead by a thread are those made on demand, and start anywhere."
    from itertools import islice
    from scemb.model.batching import Prefetched
    from scemb.model.pretrain import Batches

    tokens, _, settings = training_run(lab.toy)
    n, later = 12, 7
    plain = [Batches(tokens, settings)[i] for i in range(n)]
    started = Batches(tokens, settings, start=later)
    rows = dict(later_start=all(_equal(plain[later + i], started[i]) for i in range(n - later)))
    for ahead in (0, 4):
        made = list(islice(Prefetched(Batches(tokens, settings), lab.device, ahead), n))
        rows[f"{ahead} ahead"] = all(_equal(a, b) for a, b in zip(plain, made, strict=True))
    on_device = sorted(
        k for k, v in made[0].items() if torch.is_tensor(v) and v.device.type == lab.device
    )
    text = f"{n} batches equal: " + ", ".join(f"{k} {v}" for k, v in rows.items())
    return dict(ok=all(rows.values()), rows=rows, on_device=on_device, number=text)


def _equal(a, b):
    "Whether two batches hold the same numbers."

    def host(v):
        return v.cpu() if torch.is_tensor(v) else torch.as_tensor(v)

    return a.keys() == b.keys() and all(torch.equal(host(a[k]), host(b[k])) for k in a)


# --- waits -------------------------------------------------------------------------------------


def _line_outside_torch(name):
    "The line of scemb, transformers or accelerate that asked for an operation."
    for frame in reversed(traceback.extract_stack()[:-4]):
        library = any(f"{os.sep}{n}{os.sep}" in frame.filename for n in PRODUCT)
        if library:
            return f"{Path(frame.filename).name}:{frame.lineno} {name}"
    return f"this script {name}"


PRODUCT = ("scemb", "transformers", "accelerate")  # whose lines are named


@contextmanager
def counted_waits(lab, lines):
    "Collect the lines that make the host wait for the device."
    if not lab.cuda:
        # what a loader does with NumPy is no wait
        with HostReads(lambda name: lines.append(_line_outside_torch(name)), reads=()):
            yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines += [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "called a synchronizing" in str(w.message)
    ]


def check_waits_model(lab):
    "Waits of forward, backward and optimizer alone, after warm-up, with a batch from the loader."
    from scemb.model.pretrain import Batches

    tokens, model, settings = training_run(lab.toy)
    model = model.to(lab.device).train()
    precision = chosen_precision("auto", lab.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = Batches(tokens, settings)
    data = [to(batches[i], lab.device) for i in range(4)]

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        with autocast(lab.device, precision):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    for batch in data[:2]:
        step(batch)
    lines = []
    with counted_waits(lab, lines):
        for batch in data[2:]:
            step(batch)
    counts = dict(Counter(lines).most_common())
    text = f"{len(lines) / 2:g} waits a step: " + (", ".join(list(counts)[:8]) or "none")
    return dict(
        ok=True, waits_a_step=len(lines) / 2, lines=counts, keys=sorted(data[0]), number=text
    )


def check_waits_edits(lab):
    "Waits of a perturbation do not grow with its batches; a pass with prefixes has none."
    from scemb.adapt.cell_model import Prefix, hidden_states
    from scemb.perturb.perturb import shifts_of

    n, longest, n_targets = (3, 40, 6) if lab.toy else (6, 400, 16)
    cells = lab.cells(n, longest, seed=3)
    coder = lab.coder(lab.device)
    rows = {}
    for kind in KINDS:
        rng = np.random.default_rng(4)
        asked = edits_of(cells, kind, n_targets, len(lab.vocabulary), rng)
        for name, budget in (("one batch", 10**6), ("many", 2 * longest)):
            coder.token_budget = budget
            on = on_device(cells, lab.device)
            for warm in (True, False):
                lines = []
                with counted_waits(lab, lines):
                    shifts_of(coder, on, *asked, kind)
            rows[f"{kind}, {name}"] = dict(Counter(lines))
    prefix = Prefix(coder.net.config).to(lab.device)
    lengths = np.diff(cells["offsets"])
    batch = {
        k: torch.from_numpy(cells[v].astype(np.int64))[None].to(lab.device)
        for k, v in dict(input_ids="genes", bins="bins").items()
    }
    batch["cu_seqlens"] = Segments.of(lengths, lab.device)
    lines = []
    for warm in (True, False):
        lines.clear()
        with counted_waits(lab, lines):
            hidden_states(coder.net.bert, batch, prefix=prefix)[-1].square().mean().backward()
    rows["prefix"] = dict(Counter(lines))
    counts = {k: sum(v.values()) for k, v in rows.items()}
    ok = counts["prefix"] == 0 and all(
        counts[f"{k}, one batch"] == counts[f"{k}, many"] for k in KINDS
    )
    text = "; ".join(f"{k} {v}" for k, v in counts.items())
    return dict(ok=ok, rows=rows, number=f"waits: {text}")


class Enough(Exception):
    "Ends a training when all has been seen."


def check_waits_trainer(lab):
    "Waits of whole steps of the Trainer, loader and all, after warm-up."
    from transformers import Trainer
    from scemb.model.pretrain import pretrain

    first, last = 14, 18  # no line is logged between steps 14 and 18
    tokens, model, settings = training_run(lab.toy, steps=400, save_every=1000)
    original, lines, running = Trainer.training_step, [], []

    def step(self, *a, **k):
        if self.state.global_step == first:
            running.append(counted_waits(lab, lines))
            running[0].__enter__()
        if self.state.global_step == last:
            running[0].__exit__(None, None, None)
            raise Enough
        return original(self, *a, **k)

    with tempfile.TemporaryDirectory() as d, mock.patch.object(Trainer, "training_step", step):
        try:
            pretrain(tokens, Path(d) / "run", model, settings=settings, quiet=True)
        except Enough:
            pass
        finally:
            if lab.cuda:
                torch.cuda.set_sync_debug_mode("default")
    counts = dict(Counter(lines).most_common())
    n = last - first
    text = f"{len(lines) / n:g} waits a step: " + (", ".join(list(counts)[:10]) or "none")
    return dict(ok=True, waits_a_step=len(lines) / n, lines=counts, number=text)


def check_devices(lab):
    "What is not there is said, not guessed."
    n = torch.cuda.device_count() if lab.cuda else 0
    text = f"{n} GPUs in sight; several at once were not checked" if n < 2 else f"{n} GPUs"
    return dict(ok=True, gpus=n, number=text)


def check_deepspeed(lab):
    "A few steps under ZeRO 2 in one process, where deepspeed is there."
    if not lab.cuda or not _there("deepspeed"):
        return dict(ok=True, left_out="no deepspeed" if lab.cuda else "on a GPU only")
    code = (
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); import gpu_check as g\n"
        "from scemb.model.pretrain import pretrain\n"
        "t, m, s = g.training_run(False, steps=5, precision='bf16', warmup_steps=1)\n"
        "pretrain(t, sys.argv[1], m, s, quiet=True, deepspeed='zero2')"
    )
    env = os.environ | dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511"
    )
    with tempfile.TemporaryDirectory() as d:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{d}/run"],
            env=env,
            text=True,
            capture_output=True,
            timeout=150,
        )
        written = (Path(d) / "run" / "model.safetensors").exists()
    return dict(
        ok=done.returncode == 0 and written,
        said=done.stderr[-800:],
        number=f"exit {done.returncode}, weights written: {written}",
    )


# The most wanted first: a lease can end at any time.
CHECKS = dict(
    imports=check_imports,
    precision=check_precision,
    attention=check_attention,
    dropout_kernel=check_dropout_kernel,
    embed=check_embed,
    perturb=check_perturb,
    screen=check_screen,
    resume=check_resume,
    nan=check_nan,
    waits_model=check_waits_model,
    waits_trainer=check_waits_trainer,
    waits_edits=check_waits_edits,
    fit=check_fit,
    compiled=check_compiled,
    genes=check_genes,
    scores=check_scores,
    batches=check_batches,
    deepspeed=check_deepspeed,
    devices=check_devices,
)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--toy", action="store_true", help="small, on the CPU")
    ap.add_argument("--out", default=str(TOP / "results/benchmarks/gpu"), help="folder of the JSON")
    ap.add_argument("--minutes", type=float, default=4.0, help="begin no check after this time")
    ap.add_argument("--tokens", help="token set folder: real cells instead of random ones")
    ap.add_argument("--parts", help=f"some of {','.join(CHECKS)}")
    ap.add_argument(
        "--limit",
        type=float,
        default=75.0,
        help="seconds after which a part is broken off, unless it was to take longer",
    )
    ap.add_argument("--began", help=argparse.SUPPRESS)
    ap.add_argument("--hide", help="packages that are to look as if they were not installed")
    ap.add_argument("--child", help=argparse.SUPPRESS)
    args = ap.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.toy:
        torch.cuda.is_available = lambda: False  # every part of the package stays on the CPU
    if args.child:
        return child(args.child, args.toy)
    if not args.toy and not torch.cuda.is_available():
        sys.exit("There is no GPU that torch can use; --toy runs every check on the CPU.")
    chosen = args.parts.split(",") if args.parts else list(CHECKS)
    if unknown := set(chosen) - set(CHECKS):
        sys.exit(f"--parts names {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}.")
    out = Path(args.out)
    lab = Lab(args.toy, out, args.tokens)
    about = dict(device=device_name(lab.cuda), cells=lab.source, toy=lab.toy, **versions())
    report = Report(
        out / file_name("check", lab.toy, lab.cuda),
        about,
        args.minutes,
        args.limit * (8 if args.toy else 1),
    )
    for name in chosen:
        report.part(name, lambda name=name: CHECKS[name](lab))
    failed = report.failed()
    print(
        f"{report.path.name}: {len(chosen) - len(failed)} of {len(chosen)} checks hold, "
        f"{minutes_gone():.1f} minutes" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return len(failed) if args.toy else 0


if __name__ == "__main__":
    sys.exit(main())
