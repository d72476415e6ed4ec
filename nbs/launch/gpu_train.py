"""Several recipes for a cell's vector, trained side by side on one GPU and judged by one measure.

    python nbs/launch/gpu_pack.py                             # once, where the data sets are
    python nbs/launch/gpu_train.py --minutes 5.5 --out OUT    # where the GPU is
    python nbs/launch/gpu_train.py --toy --out OUT            # every part on a CPU

All recipes share the paper's masked-gene loss, the same small BERT and the same cells. They differ
in what they ask of the mean vector of a cell (section "Losses"). A recipe is a process of its own,
so that small models fill a GPU. Each times its steps 20 to 60; as many as then fit into the time
are
its schedule, so that the learning rate ends at zero however fast the machine is. The number of
steps
stands in the record, and `--steps` repeats the run with it.

OUT gets results.json and RECIPE.safetensors in float16, every ninety seconds and at the end, at
most `--keep` of them. `--unpack OUT --recipe NAME --folder F` makes a checkpoint folder of one.

The judged cells (PBMC 3k, two pancreas libraries) belong to the corpus: training has seen their
counts but never their labels, except for the recipe "supcon", whose name says so. Evaluation sets
are not in the pack at all.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP), str(Path(__file__).parent)]
from gpu_pack import read_counts, read_vectors  # noqa: E402
from scemb.model.batching import mask_genes  # noqa: E402
from scemb.judge.scores import depth_scores, macro_f1  # noqa: E402
from scemb.model.checkpoint import save_checkpoint  # noqa: E402
from scemb.model.encoder import ScembConfig, ScembForMaskedLM, Segments, ranks_of_segments  # noqa: E402
from scemb.tokens.ranking import Encoder, TokenizerSettings, Vocabulary  # noqa: E402

BEGAN = time.time()


@dataclass
class Size:
    "How large everything is."

    layers: int = 6
    width: int = 192  # 19,448 gene vectors and 6 layers: 12.9 MB in float16
    heads: int = 6  # of 32
    budget: int = 16_384  # tokens a step
    windows: tuple = (64, 128, 256, 512)  # genes a cell; a batch draws one of them
    peak_rate: float = 1.5e-3
    draws: int = 20  # of labelled cells, when recipes are judged
    judged: int = 10_000  # cells of each judged set at most
    others: int = 1500  # further corpus cells to which the read-out is fitted
    fit_steps: int = 300  # of a logistic regression


TOY = Size(
    layers=2,
    width=32,
    heads=2,
    budget=2048,
    windows=(32, 64),
    draws=2,
    judged=60,
    others=20,
    fit_steps=10,
)
SMALL = Size(budget=2048, draws=2, judged=40, others=20, fit_steps=10)  # a rehearsal
MASKED_SHARE = 0.3
SHIPPED = "scemb-small"
BESIDE = ("no-model", SHIPPED)  # judged, not trained


# --- The cells ----------------------------------------------------------------------------------


@dataclass
class Cells:
    "The pack, as `gpu_pack.py` wrote it."

    indptr: np.ndarray  # (cells + 1,) where the counts of each cell begin
    genes: np.ndarray  # (values,) token of each count
    counts: np.ndarray  # (values,)
    obs: object  # DataFrame: dataset_id, batch, cell_type, label ...
    components: np.ndarray  # (cells, 50) principal components of all log counts, half whitened
    depth_free: np.ndarray  # (cells, 50) the same without what follows log counts in a study
    label: np.ndarray  # (cells,) number of the label, -1 for none
    measured: np.ndarray  # (studies, tokens) whether a study measured a gene
    study: np.ndarray  # (cells,) row of `measured`
    vectors: np.ndarray  # (tokens, 192) gene vectors of the corpus' SVD
    vocabulary: Vocabulary

    @property
    def total(self):
        return np.add.reduceat(self.counts, self.indptr[:-1])


def read_pack(folder):
    "Open the pack."
    folder = Path(folder)
    indptr, genes, counts, obs = read_counts(folder / "counts.arrow")
    vocabulary = Vocabulary.load(folder)
    studies, study = np.unique(obs.dataset_id.to_numpy(str), return_inverse=True)
    measured = np.unpackbits(np.load(folder / "measured.npy"), axis=1)[:, : len(vocabulary)].astype(
        bool
    )
    names, label = np.unique(obs.label.to_numpy(str), return_inverse=True)
    label = label - (names[0] == "")  # the empty name sorts first and becomes -1
    # Half whitened: with its own spread the first component is all that counts, with equal spread
    # the last ones are mostly noise.
    z = np.load(folder / "components.npy").astype(np.float32)
    z = (z - z.mean(0)) / np.sqrt(z.std(0))
    z = z / z.std()
    depth_free = without_depth(z, np.log(np.add.reduceat(counts, indptr[:-1])), study)
    vectors = read_vectors(folder / "gene_vectors.npz")
    return Cells(
        indptr, genes, counts, obs, z, depth_free, label, measured, study, vectors, vocabulary
    )


def without_depth(z, log_counts, study):
    "Take out of each component what is linear in the cell's log counts, within each study."
    z = z.copy()
    for s in np.unique(study):
        cells = study == s
        depth = log_counts[cells] - log_counts[cells].mean()
        slope = depth @ z[cells] / max(depth @ depth, 1e-9)
        z[cells] -= depth[:, None] * slope
    return z.astype(np.float32)


HELD_OUT_SHARE = 0.03


def split_held_out(n_cells, share=HELD_OUT_SHARE):
    "Cells for training and cells held out for the masked-gene loss."
    order = np.random.default_rng(4).permutation(n_cells)
    n = round(share * n_cells)
    return np.sort(order[n:]), np.sort(order[:n])


# --- Views of a cell ----------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _gather(indptr, genes, counts, cells, p_gene, seed, out_indptr, out_genes, out_counts):
    "Counts of the chosen cells; each gene is kept with the cell's chance p_gene."
    np.random.seed(seed)
    at = 0
    for i in range(cells.size):
        for j in range(indptr[cells[i]], indptr[cells[i] + 1]):
            if p_gene[i] >= 1 or np.random.random() < p_gene[i]:
                out_genes[at] = genes[j]
                out_counts[at] = counts[j]
                at += 1
        out_indptr[i + 1] = at
    return at


@njit(nogil=True, cache=True)
def _binomial(indptr, counts, p_count, seed, part):
    "Of each cell's counts a random part: every single count is taken with the chance p_count."
    np.random.seed(seed)
    for i in range(indptr.size - 1):
        for j in range(indptr[i], indptr[i + 1]):
            if counts[j] > 50:
                part[j] = np.random.binomial(counts[j], p_count[i])
                continue
            taken = 0
            for _ in range(counts[j]):
                taken += np.random.random() < p_count[i]
            part[j] = taken


def random_share(total, most, rng):
    "The share of a cell's counts that leaves a random depth of 300 to 20,000 counts (log-uniform)."
    depth = np.exp(rng.uniform(np.log(300), np.log(20_000), len(total)))
    return np.minimum(depth / total, most)


def draw_view(cells, chosen, view, seed):
    "What the model may see of the chosen cells -> indptr, genes, counts seen, the other counts."
    rng = np.random.default_rng(seed)
    p_gene = np.ones(len(chosen))
    if view == "genes":  # of three cells in four; the fourth is seen whole, as later cells will be
        p_gene = np.where(rng.random(len(chosen)) < 0.75, rng.uniform(0.3, 0.6, len(chosen)), 1.0)
    size = int((cells.indptr[chosen + 1] - cells.indptr[chosen]).sum())
    indptr, genes, counts = (
        np.zeros(len(chosen) + 1, np.int64),
        np.empty(size, np.int32),
        np.empty(size, np.int32),
    )
    n = _gather(
        cells.indptr,
        cells.genes,
        cells.counts,
        chosen,
        p_gene,
        seed % 2**31,
        indptr,
        genes,
        counts,
    )
    genes, counts = genes[:n], counts[:n]
    if view in ("whole", "genes"):
        return indptr, genes, counts, None
    total = np.maximum(np.add.reduceat(counts, indptr[:-1]), 1)
    first = np.empty_like(counts)
    share = random_share(total, 0.7 if view == "part" else 0.5, rng)
    _binomial(indptr, counts, share, (seed + 1) % 2**31, first)
    rest = counts - first
    if view == "part":
        return indptr, genes, first, rest
    # A pair: the second part is drawn from what the first left, to a depth by the same law.
    second = np.empty_like(counts)
    left = random_share(total, 0.5, rng) / (1 - share)
    _binomial(indptr, rest, left, (seed + 2) % 2**31, second)
    return indptr, genes, first, second


# --- Batches, made ahead by threads -------------------------------------------------------------


def other_shares(indptr, genes, other):
    "Of the counts not shown: cell, gene, share of the gene in the logarithms of the counts."
    n_cells = len(indptr) - 1
    owner = np.repeat(np.arange(n_cells), np.diff(indptr))
    weight = np.log1p(other).astype(np.float32)
    sums = np.maximum(np.bincount(owner, weight, n_cells), 1e-6).astype(np.float32)
    there = other > 0
    return dict(
        other_owner=owner[there],
        other_gene=genes[there].astype(np.int64),
        other_share=weight[there] / sums[owner[there]],
    )


class Loader:
    "Batches of one recipe: batch i is a function of (seed, i), made by threads ahead of the GPU."

    def __init__(self, cells, chosen, recipe, size, seed, device, threads=2, ahead=6):
        self.cells, self.chosen, self.recipe = cells, chosen, (RECIPES | LATER)[recipe]
        self.size, self.seed, self.device, self.ahead = size, seed, device, ahead
        self.n_vocab = len(cells.vocabulary)
        self.encoders = {}
        for window in size.windows:
            settings = TokenizerSettings(max_len=window)
            every_token = np.arange(self.n_vocab)
            self.encoders[window] = Encoder(every_token, cells.vocabulary, settings)
        self.pool = ThreadPoolExecutor(threads)
        self.jobs, self.next = [], 0
        self.waited = 0.0  # seconds in which training stood still
        self.n_tokens = self.n_cells = 0

    def tokens(self, indptr, genes, counts, window):
        "Ranks and bins by the package's own rule -> genes, bins, tokens of each cell."
        shape = (len(indptr) - 1, self.n_vocab)
        chunk = SimpleNamespace(indptr=indptr, indices=genes, data=counts, shape=shape)
        encoded = self.encoders[window](chunk)
        return encoded["genes"], encoded["bins"], np.diff(encoded["offsets"])

    def make(self, i):
        "One batch as tensors in pinned memory, and the tokens of its cells."
        view = self.recipe.view
        rng = np.random.default_rng([self.seed, i])
        window = int(rng.choice(self.size.windows))
        views = 2 if view == "pair" else 1
        chosen = rng.choice(self.chosen, max(2, self.size.budget // window // views))
        seed = int(rng.integers(2**31))
        indptr, genes, seen, other = draw_view(self.cells, chosen, view, seed)
        shown = [seen, other] if view == "pair" else [seen]
        parts = [self.tokens(indptr, genes, counts, window) for counts in shown]
        tokens, bins, lengths = (np.concatenate(x) for x in zip(*parts))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        number = np.arange(len(lengths))
        masking = dict(seed=self.seed, epoch=i, share=MASKED_SHARE)
        ids, bins, labels = mask_genes(
            tokens, bins, offsets, cells=number, n_vocab=self.n_vocab, **masking
        )
        hidden = np.flatnonzero(labels >= 0)
        batch = dict(ids=ids, bins=bins, hidden=hidden, true=labels[hidden])
        free = self.recipe.depth_free
        batch["components"] = (self.cells.depth_free if free else self.cells.components)[chosen]
        batch["label"] = self.cells.label[chosen]
        batch["study"] = self.cells.study[chosen]
        if view == "part":
            batch |= other_shares(indptr, genes, other)
        batch = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in batch.items()}
        if self.device == "cuda":
            batch = {k: v.pin_memory() for k, v in batch.items()}
        return batch, lengths

    def __call__(self):
        "The next batch, on the device."
        while len(self.jobs) < self.ahead:
            self.jobs.append(self.pool.submit(self.make, self.next))
            self.next += 1
        began = time.perf_counter()
        batch, lengths = self.jobs.pop(0).result()
        self.waited += time.perf_counter() - began
        self.n_tokens += int(lengths.sum())
        self.n_cells += len(lengths)
        batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        return batch | dict(
            segments=Segments.of(lengths, self.device), total=int(lengths.sum()), n=len(lengths)
        )


# --- The model ----------------------------------------------------------------------------------


def new_model(cells, size, seed):
    "A fresh BERT whose gene vectors come from the corpus' SVD."
    torch.manual_seed(seed)
    config = ScembConfig(
        vocab_size=len(cells.vocabulary),
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=max(size.windows),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocabulary_hash=cells.vocabulary.hash,
    )
    model = ScembForMaskedLM(config)
    seen = np.bincount(cells.genes, minlength=len(cells.vocabulary))
    start = torch.from_numpy(cells.vectors[:, : size.width] * 2 * config.initializer_range)
    with torch.no_grad():
        weight = model.bert.embeddings.word_embeddings.weight
        weight[seen > 0] = start[seen > 0]
        often = np.maximum(seen, 0.1) / seen.sum()
        model.cls["predictions"].bias.copy_(torch.from_numpy(np.log(often)).float())
    return model


def hidden_states(model, batch):
    "All layers' states, layers + 1 times (T, D)."
    positions = ranks_of_segments(batch["segments"], batch["total"])
    out = model.bert(
        batch["ids"][None],
        batch["bins"][None],
        positions,
        cu_seqlens=batch["segments"],
        output_hidden_states=True,
    )
    return [x[0] for x in out.hidden_states]


def mean_vectors(states, batch):
    "The vector of each cell: mean over layers and over its genes, (cells, D) in full precision."
    x_TD = sum(x.float() for x in states[1:]) / (len(states) - 1)
    return mean_of_cells(x_TD, batch)


def mean_of_cells(x_TD, batch, weight_T=None):
    "Mean of tokens by cell, weighted if weights are given -> (cells, D)."
    lengths = batch["segments"].cu.diff()
    owner = torch.repeat_interleave(
        torch.arange(batch["n"], device=x_TD.device), lengths, output_size=batch["total"]
    )
    weight_T = x_TD.new_ones(len(x_TD)) if weight_T is None else weight_T
    total = x_TD.new_zeros(batch["n"], x_TD.shape[1]).index_add(0, owner, x_TD * weight_T[:, None])
    weight = x_TD.new_zeros(batch["n"]).index_add(0, owner, weight_T)
    return total / weight[:, None].clamp(min=1e-6)


# --- Losses: what is asked of the mean vector of a cell -----------------------------------------


def masked_genes(model, states, batch):
    "The paper's: guess each hidden gene from its own place."
    logits = model.cls["predictions"](states[-1].index_select(0, batch["hidden"]))
    return F.cross_entropy(logits.float(), batch["true"])


def hidden_genes_of_cell(model, heads, mean_CD, batch):
    "Guess the hidden genes of a cell from its mean vector."
    log_p = F.log_softmax(model.cls["predictions"](mean_CD).float(), 1)
    ends = batch["segments"].cu[1:].long()
    owner = torch.searchsorted(ends, batch["hidden"], right=True)
    return -log_p[owner, batch["true"]].mean()


def other_part(model, heads, mean_CD, batch):
    """Guess the part of the cell's counts that the model has not seen, at whatever depth.

    The target is the share of each gene in the logarithms of the other part's counts; genes that
    the study did not measure are no candidates.
    """
    scores = model.cls["predictions"](mean_CD).float()
    unknown = ~heads.measured[batch["study"]]
    log_p = F.log_softmax(scores.masked_fill(unknown, -1e4), 1)
    return -(batch["other_share"] * log_p[batch["other_owner"], batch["other_gene"]]).sum() / len(
        mean_CD
    )


def components_of_cell(model, heads, mean_CD, batch):
    "A linear head gives the principal components of all the counts, of which the model saw a part."
    return F.mse_loss(heads.components(mean_CD).float(), batch["components"])


def vicreg(model, heads, mean_CD, batch):
    """Two thinned parts of a cell lie together.

    Every direction keeps its spread, and no two directions say the same.
    """
    a, b = heads.projector(mean_CD).float().chunk(2)
    together = F.mse_loss(a, b)
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
    same = 0.0
    for z in (a, b):
        z = z - z.mean(0)
        with torch.autocast(z.device.type, enabled=False):
            covariance = z.T @ z / (len(z) - 1)
        same = same + (covariance.pow(2).sum() - covariance.diag().pow(2).sum()) / z.shape[1]
    return together + spread / 2 + same / 25


def labelled_contrast(model, heads, mean_CD, batch):
    "Cells of one label from different studies lie together, against all other labelled cells."
    z = F.normalize(heads.projector(mean_CD).float(), dim=1)
    label, study = batch["label"], batch["study"]
    labelled = label >= 0
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    candidate = labelled[None] & labelled[:, None] & ~itself
    alike = candidate & (label[None] == label[:, None])
    elsewhere = alike & (study[None] != study[:, None])
    wanted = torch.where(elsewhere.any(1, keepdim=True), elsewhere, alike).float()
    with torch.autocast(z.device.type, enabled=False):
        alikeness = z @ z.T
    scores = (alikeness / 0.1).masked_fill(~candidate, -1e4)
    of_cell = -(wanted * F.log_softmax(scores, 1)).sum(1) / wanted.sum(1).clamp(min=1)
    has = (wanted.sum(1) > 0).float()
    return (of_cell * has).sum() / has.sum().clamp(min=1)


@dataclass(frozen=True)
class Recipe:
    "What the model sees of a cell, and what is asked of its mean vector beside the masked genes."

    view: str  # "whole", "genes" (30 to 60 % of them), "part" or "pair" (parts of the counts)
    terms: tuple = ()  # (loss, weight)
    depth_free: bool = False  # whether the components to be given are those without depth


CELL = (hidden_genes_of_cell, 10.0)
RECIPES = {
    "base": Recipe("whole"),
    "cell": Recipe("whole", (CELL,)),
    "thin": Recipe("part", ((other_part, 10.0),)),
    "distil": Recipe("genes", (CELL, (components_of_cell, 20.0))),
    "thin_distil": Recipe("part", ((other_part, 10.0), (components_of_cell, 20.0)), True),
    "vicreg": Recipe("pair", ((hidden_genes_of_cell, 3.0), (vicreg, 25.0))),
    "supcon": Recipe("whole", (CELL, (labelled_contrast, 5.0))),
}
# What followed from the first comparison: "thin" with a little of what frees it of depth, or with
# labels.
LATER = {
    "thin_free": Recipe("part", ((other_part, 10.0), (components_of_cell, 5.0)), True),
    "thin_labels": Recipe("part", ((other_part, 10.0), (labelled_contrast, 5.0))),
}


class Heads(torch.nn.Module):
    "What only training needs: it is thrown away afterwards."

    def __init__(self, cells, size):
        super().__init__()
        self.components = torch.nn.Linear(size.width, cells.components.shape[1])
        wide = 2 * size.width
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(size.width, wide),
            torch.nn.LayerNorm(wide),
            torch.nn.GELU(),
            torch.nn.Linear(wide, wide),
        )
        self.register_buffer("measured", torch.from_numpy(cells.measured))


def losses(model, heads, recipe, batch):
    "All terms of a recipe by name, and their weighted sum."
    states = hidden_states(model, batch)
    found = dict(masked_genes=masked_genes(model, states, batch))
    total = found["masked_genes"]
    mean_CD = mean_vectors(states, batch) if recipe.terms else None
    for term, weight in recipe.terms:
        found[term.__name__] = term(model, heads, mean_CD, batch)
        total = total + weight * found[term.__name__]
    return total, found


# --- Training one recipe ------------------------------------------------------------------------


def make_optimizers(model, heads, size, muon, fused):
    "AdamW for all weights; with `muon`, Muon for the matrices inside the layers."
    matrices = [p for n, p in model.bert.encoder.named_parameters() if p.ndim == 2] if muon else []
    own = {id(p) for p in matrices}
    rest = [p for p in [*model.parameters(), *heads.parameters()] if id(p) not in own]
    decayed = [
        dict(params=[p for p in rest if p.ndim > 1], weight_decay=0.01),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    optimizers = [torch.optim.AdamW(decayed, lr=size.peak_rate, betas=(0.9, 0.98), fused=fused)]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=size.peak_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


WARM_UP = 200  # steps until the learning rate has its peak, or a fifth of all


class Schedule:
    """How many steps a training takes, and the learning rate of each.

    The first steps start kernels and threads and are not timed. The next tell how many fit into
    the time that is given; the learning rate falls to zero over these. Should the machine become
    slower, the clock ends the training before: `cut_short` says so.
    """

    UNTIMED, PROBE = 20, 60
    RESERVE = 0.03  # share of the time that is not planned for
    SAVING = 45.0  # seconds between two scores on held-out cells

    def __init__(self, steps=0, ends_at=0.0, clock=time.time):
        self.steps, self.ends_at, self.clock = steps, ends_at, clock
        self.by_probe, self.pace, self.cut_short = not steps, None, False

    def goes_on(self, step, scoring=lambda: None):
        "Whether a step is to be taken; `scoring` is done, and timed, once the probe has ended."
        now = self.clock()
        if self.by_probe and step == self.UNTIMED:
            self.timed_from = now
        if self.by_probe and step == self.PROBE:
            self.pace = (now - self.timed_from) / (self.PROBE - self.UNTIMED)
            scoring()
            self.steps = step + self.that_fit(self.clock() - now)
        if self.steps and step >= self.steps:
            return False
        self.cut_short = self.by_probe and self.clock() >= self.ends_at
        return not self.cut_short

    def that_fit(self, seconds_of_scoring):
        "Steps for the time that is left, with a score every now and then and one at the end."
        left = (self.ends_at - self.clock()) * (1 - self.RESERVE) - seconds_of_scoring
        share = self.SAVING / (self.SAVING + seconds_of_scoring)
        return max(1, int(left * share / max(self.pace, 1e-6)))

    def rate(self, step):
        "Share of the peak learning rate."
        if not self.steps:
            return min(1.0, (step + 1) / WARM_UP)
        warm_up = min(WARM_UP, max(1, self.steps // 5))
        return min(1.0, (step + 1) / warm_up) * (1 - step / self.steps)


def autocast(device):
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def encode(cells, chosen, window):
    "Tokens of whole cells -> genes, bins, lengths."
    indptr, genes, counts, _ = draw_view(cells, chosen, "whole", 0)
    encoder = Encoder(
        np.arange(len(cells.vocabulary)), cells.vocabulary, TokenizerSettings(max_len=window)
    )
    shape = (len(chosen), len(cells.vocabulary))
    encoded = encoder(SimpleNamespace(indptr=indptr, indices=genes, data=counts, shape=shape))
    return encoded["genes"], encoded["bins"], np.diff(encoded["offsets"])


def flat_batch(ids, bins, lengths, device):
    "Arrays of an unpadded row of cells -> what `hidden_states` takes."

    def put(x):
        return torch.from_numpy(x.astype(np.int64)).to(device)

    return dict(
        ids=put(ids),
        bins=put(bins),
        segments=Segments.of(lengths, device),
        total=int(lengths.sum()),
        n=len(lengths),
    )


@torch.no_grad()
def held_out_loss(model, cells, chosen, window, device, n_at_once=32):
    "Mean over cells of the loss of 15 % hidden genes, all shown as masks, in nats."
    model.eval()
    of_cell = []
    for first in range(0, len(chosen), n_at_once):
        some = chosen[first : first + n_at_once]
        genes, bins, lengths = encode(cells, some, window)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids, shown, labels = mask_genes(
            genes,
            bins,
            offsets,
            cells=some,
            n_vocab=len(cells.vocabulary),
            seed=1,
            p_mask=1.0,
            p_random=0.0,
        )
        hidden = np.flatnonzero(labels >= 0)
        batch = flat_batch(ids, shown, lengths, device)
        with autocast(device):
            last = hidden_states(model, batch)[-1]
            logits = model.cls["predictions"](last[torch.from_numpy(hidden).to(device)]).float()
        logits[:, :4] = -torch.inf
        nll = (
            F.cross_entropy(logits, torch.from_numpy(labels[hidden]).to(device), reduction="none")
            .cpu()
            .numpy()
        )
        owner = np.searchsorted(offsets[1:], hidden, side="right")
        of_cell.append(
            np.bincount(owner, nll, len(some))
            / np.maximum(np.bincount(owner, minlength=len(some)), 1)
        )
    model.train()
    return float(np.concatenate(of_cell).mean())


def write_whole(path, text):
    "A file is there whole or not at all."
    part = Path(path).with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def save(model, cells, size, folder, record):
    "Weights in float16 as a checkpoint folder, and what is known of them."
    settings = TokenizerSettings(max_len=max(size.windows))
    save_checkpoint(
        model,
        folder,
        cells.vocabulary,
        settings=settings,
        card=dict(recipe=record["recipe"]),
        half=True,
    )
    write_whole(Path(folder) / "record.json", json.dumps(record))


def train(name, cells, size, device, ends_at, steps, folder):
    "Train one recipe until the clock (or the number of steps) ends it."
    recipe_name, _, options = name.partition("-")  # "cell-s1-muon": recipe cell, seed 1, with Muon
    seed = next((int(o[1:]) for o in options.split("-") if o[:1] == "s"), 0)
    recipe, muon = (RECIPES | LATER)[recipe_name], "muon" in options
    chosen, held_out = split_held_out(len(cells.indptr) - 1)
    held_out = held_out[:40] if steps else held_out
    model = new_model(cells, size, seed).to(device).train()
    heads = Heads(cells, size).to(device)
    weights = [*model.parameters(), *heads.parameters()]
    optimizers = make_optimizers(model, heads, size, muon, device == "cuda")
    loader = Loader(cells, chosen, recipe_name, size, seed, device)
    record = dict(
        recipe=name,
        seed=seed,
        muon=muon,
        n_weights=model.num_parameters(),
        curve=[],
        held_out=[],
        config=model.config.to_dict(),
        windows=size.windows,
    )
    best, best_loss, step = None, np.inf, 0
    began = last_saved = time.time()
    schedule = Schedule(steps, ends_at)

    def score():
        "Score held-out cells; keep the weights that are best, and write what stands."
        nonlocal best, best_loss, last_saved
        found = held_out_loss(model, cells, held_out, max(size.windows), device)
        record["held_out"].append(dict(step=step, loss=round(found, 4)))
        if found < best_loss:
            best_loss = found
            best = {k: v.detach().clone() for k, v in model.state_dict().items()}
        save(model, cells, size, folder, record)
        last_saved = time.time()

    while True:
        if device == "cuda" and schedule.by_probe and step in (Schedule.UNTIMED, Schedule.PROBE):
            torch.cuda.synchronize()  # what was asked for has been done
        if not schedule.goes_on(step, score):
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = size.peak_rate * schedule.rate(step)
        batch = loader()
        with autocast(device):
            loss, terms = losses(model, heads, recipe, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == Schedule.UNTIMED:
            wait_began, timed_from, timed_step = loader.waited, time.time(), step
        if step % 50 == 0 or step == schedule.steps:
            now = {k: round(float(v.detach()), 4) for k, v in terms.items()}
            if not all(np.isfinite(list(now.values()))):
                raise FloatingPointError(
                    f"The loss of {name} at step {step} is {now}; "
                    f"lower peak_rate ({size.peak_rate:g})."
                )
            record["curve"].append(dict(step=step, seconds=round(time.time() - began, 1), **now))
        if step == steps // 2 or time.time() - last_saved > Schedule.SAVING:
            score()
    seconds = max(time.time() - began, 1e-9)
    score()
    last = record["held_out"][-1]["loss"]
    if last > round(best_loss, 4):  # it got worse: the best weights are kept
        model.load_state_dict(best)
        last, record["went_back"] = best_loss, True
    timed = step > Schedule.UNTIMED
    pace = time.time() - timed_from if timed else seconds
    record |= dict(
        steps=step,
        seconds=round(seconds, 1),
        held_out_loss=round(last, 4),
        n_tokens=loader.n_tokens,
        n_cells=loader.n_cells,
        tokens_a_second=round(loader.n_tokens / seconds),
        ms_a_step=round(1000 * pace / (step - timed_step), 2) if timed else None,
        share_waiting=round((loader.waited - (wait_began if timed else 0)) / pace, 4),
        planned_steps=schedule.steps,
        ms_a_step_in_probe=round(1000 * schedule.pace, 2) if schedule.pace else None,
        cut_short=schedule.cut_short,
    )
    loader.pool.shutdown(wait=False, cancel_futures=True)
    save(model.eval(), cells, size, folder, record)
    return model, record


# --- Judging ------------------------------------------------------------------------------------

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of logistic regression


def softmax_regression(x_BND, y_BNK, weight_BN, penalties, steps=300):
    """Many logistic regressions at once -> weights (B, C, D, K), biases (B, C, K).

    Each minimises the mean loss of its cells plus |w|^2/(2 C n), which is scikit-learn's with
    penalty C, by Nesterov's accelerated gradient. Cells of weight 0 take no part. One fit of
    scikit-learn takes 10 ms, and some thousand are needed for each method.
    """
    n_B = weight_BN.sum(1)
    B, N, D = x_BND.shape
    K, C = y_BNK.shape[2], len(penalties)
    decay_BC = 1 / (torch.tensor(penalties, device=x_BND.device) * n_B[:, None])
    weighted = x_BND * (weight_BN / n_B[:, None])[:, :, None]
    v = torch.ones(B, D, 1, device=x_BND.device)
    for _ in range(20):  # the largest curvature, by the power method
        v = weighted.transpose(1, 2) @ (x_BND @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-12)
    largest = (weighted.transpose(1, 2) @ (x_BND @ v)).norm(dim=1)
    rate = 1 / (0.5 * 1.05 * (largest + 1) + decay_BC)[:, :, None, None]
    w = x_BND.new_zeros(B, C, D + 1, K)
    ahead = w
    one = torch.cat([x_BND, x_BND.new_ones(B, N, 1)], 2)
    one_weighted = one * (weight_BN / n_B[:, None])[:, :, None]
    decay = decay_BC[:, :, None, None].expand(B, C, D + 1, 1).clone()
    decay[:, :, -1] = 0  # a bias is not penalised
    for t in range(steps):
        scores = (one @ ahead.permute(0, 2, 1, 3).reshape(B, D + 1, C * K)).view(B, N, C, K)
        error = scores.softmax(3) - y_BNK[:, :, None]
        slope = (
            (one_weighted.transpose(1, 2) @ error.reshape(B, N, C * K))
            .view(B, D + 1, C, K)
            .permute(0, 2, 1, 3)
        )
        new = ahead - rate * (slope + decay * ahead)
        ahead = new + t / (t + 3) * (new - w)
        w = new
    return w[:, :, :-1], w[:, :, -1]


def draw_shots(y, n_shots, n_draws):
    "Positions of n_shots cells of each class (draws, classes*n_shots), and the fold of each."
    shots, folds = [], []
    for d in range(n_draws):
        rng = np.random.default_rng([n_shots, d])
        shots.append(
            np.concatenate(
                [rng.permutation(np.flatnonzero(y == k))[:n_shots] for k in np.unique(y)]
            )
        )
        folds.append(np.tile(np.arange(n_shots) % 5, len(np.unique(y))))
    return np.stack(shots), np.stack(folds)


def few_shot_f1(
    x_reference, y_reference, x_query, y_query, same, n_shots, n_draws, device, fit_steps=300
):
    """Macro-F1 of logistic regression from n_shots labelled cells a class, of each draw.

    Scaling (one scale for all features, or one for each) and penalty are chosen in each draw by
    the loss in five folds of its labelled cells: the same rule for every method. An unscaled
    vector is one with a common scale and another penalty.
    """
    types, n = np.unique(y_reference, return_counts=True)
    types = types[n >= 2 * n_shots]
    keep, ask = np.isin(y_reference, types), np.isin(y_query, types)
    y_r, y_q = np.searchsorted(types, y_reference[keep]), np.searchsorted(types, y_query[ask])
    x_r, x_q = (
        torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
        for x in (x_reference[keep], x_query[ask])
    )
    K = len(types)
    if K < 2:
        return np.array([np.nan])
    shots, folds = draw_shots(y_r, n_shots, n_draws)
    x = x_r[torch.from_numpy(shots).to(device)]  # (draws, N, D)
    y = F.one_hot(torch.from_numpy(y_r[shots]).to(device), K).float()
    mean = x.mean(1, keepdim=True)
    each = x.std(1, keepdim=True).clamp(min=1e-6)
    scales = torch.stack(
        [each.pow(2).mean(2, keepdim=True).sqrt().expand_as(each), each]
    )  # (2, draws, 1, D)
    fold = torch.from_numpy(folds).to(device)
    in_fold = torch.stack(
        [(fold != f).float() for f in range(5)] + [torch.ones_like(fold).float()]
    )  # (6, draws, N)
    scaled = (x - mean) / scales  # (2, draws, N, D)
    S, A, N, D = scaled.shape
    problems = scaled[:, None].expand(S, 6, A, N, D).reshape(-1, N, D)
    targets = y.expand(S, 6, A, N, K).reshape(-1, N, K)
    weight = in_fold.expand(S, 6, A, N).reshape(-1, N)
    w, b = softmax_regression(problems, targets, weight, PENALTIES, fit_steps)
    scores = torch.einsum("bnd,bcdk->bcnk", problems, w) + b[:, :, None]
    loss = -(scores.log_softmax(3) * targets[:, None]).sum(3)  # (B, C, N)
    outside = (loss * (1 - weight[:, None])).sum(2).view(S, 6, A, -1)[:, :5].sum(1)  # (2, draws, C)
    best = outside.permute(1, 0, 2).reshape(A, -1).argmin(1)
    s, c, draw = best // len(PENALTIES), best % len(PENALTIES), torch.arange(A, device=device)
    w, b = (
        z.view(S, 6, A, *z.shape[1:])[s, 5, draw, c] for z in (w, b)
    )  # (draws, D, K), (draws, K)
    w = w / scales[s, draw].transpose(1, 2)
    b = b - (mean @ w)[:, 0]
    guess = (x_q @ w + b[:, None]).argmax(2).cpu().numpy()  # (draws, queries)
    found = []
    for d in range(A):
        asked = np.ones(len(y_q), bool)
        if same:
            asked[shots[d]] = False
        found.append(macro_f1(y_q[asked], guess[d][asked], K))
    return np.array(found)


def neighbour_accuracy(x_reference, y_reference, x_query, y_query, same, device, k=15):
    "Share of query cells named rightly by 15 neighbours, in the scaling best for the reference."

    def put(x):
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)

    reference, query = put(x_reference), put(x_query)
    each = reference.std(0).clamp(min=1e-6)
    best, answer = -1.0, None
    for scale in (torch.ones_like(each), each):
        inside = torch.cdist(reference / scale, reference / scale)
        inside.fill_diagonal_(torch.inf)
        right = vote(inside, y_reference, k) == y_reference
        if same:
            named = right
        else:
            named = vote(torch.cdist(query / scale, reference / scale), y_reference, k) == y_query
        if right.mean() > best:
            best, answer = right.mean(), named
    return float(answer.mean())


def vote(distances, y, k):
    "Majority of the nearest k; y are class numbers."
    nearest = distances.topk(min(k, len(y) - 1), largest=False).indices.cpu().numpy()
    counts = np.stack([(y[nearest] == c).sum(1) for c in range(y.max() + 1)], 1)
    return counts.argmax(1)


def judged_sets(cells, size):
    "Name -> list of (reference cells, query cells); each pancreas library is named by the other."
    obs = cells.obs
    known = ~obs.cell_type.isin(["unknown", "unassigned", "nan", ""]).to_numpy()

    def cut(rows):
        return np.sort(np.random.default_rng(0).permutation(np.flatnonzero(rows))[: size.judged])

    blood = cut((obs.dataset_id == "pbmc3k").to_numpy() & known)
    one, two = (cut((obs.batch == f"human1_lib{i}").to_numpy() & known) for i in (1, 2))
    return dict(pbmc3k=[(blood, blood)], baron=[(one, two), (two, one)])


def judge(x_of, cells, sets, size, device, depth=False):
    "Every question to one method; x_of(rows of cells) gives its vectors -> dict of scores by set."
    types, y = np.unique(cells.obs.cell_type.to_numpy(str), return_inverse=True)
    out = {}
    for name, pairs in sets.items():
        rows = []
        for reference, query in pairs:
            same = reference is query
            asked = (x_of(reference), y[reference], x_of(query), y[query], same)
            row = {}
            for shots in (5, 20):
                f1 = few_shot_f1(*asked, shots, size.draws, device, size.fit_steps)
                row[f"{shots}-shot"] = f1.mean()
            row["k-NN"] = neighbour_accuracy(*asked, device)
            rows.append(row)
        out[name] = {k: round(float(np.mean([r[k] for r in rows])), 4) for k in rows[0]}
        if depth:
            every = np.unique(np.concatenate([np.concatenate(p) for p in pairs]))
            detected = np.diff(cells.indptr)[every]
            found = depth_scores(x_of(every), detected, cells.total[every])
            r2 = next(r["value"] for r in found if r["metric"] == "depth R2, log counts")
            out[name]["depth R2"] = round(r2, 4)
    return out


def mean_score(scores, sets=("pbmc3k", "baron")):
    "One number to choose by: the mean of few-shot F1 and k-NN accuracy over sets."
    return float(np.nanmean([scores[s][k] for s in sets for k in ("5-shot", "20-shot", "k-NN")]))


# --- The read-out: which layers, genes and directions make the vector ---------------------------


@torch.no_grad()
def pooled(model, cells, chosen, window, rarity, device, n_at_once):
    """Vectors of the chosen cells from their first `window` genes, from every layer.

    Shape (2, layers + 2, cells, D): genes weighted alike, or by rarity in the corpus; the bag of
    gene vectors, the embeddings, then the layers' outputs.
    """
    out = []
    model.eval()
    for first in range(0, len(chosen), n_at_once):
        genes, bins, lengths = encode(cells, chosen[first : first + n_at_once], window)
        batch = flat_batch(genes, bins, lengths, device)
        with autocast(device):
            states = hidden_states(model, batch)
        slabs = [model.bert.embeddings.word_embeddings(batch["ids"]), *states]
        weights = [None, rarity[batch["ids"]]]
        out.append(
            torch.stack(
                [torch.stack([mean_of_cells(x.float(), batch, w) for x in slabs]) for w in weights]
            ).cpu()
        )
    return torch.cat(out, 2).numpy()


def gene_rarity(cells):
    "log(1 + cells / cells with the gene), of each token."
    n_cells = len(cells.indptr) - 1
    seen = np.bincount(cells.genes, minlength=len(cells.vocabulary))
    return np.log1p(n_cells / np.maximum(seen, 1)).astype(np.float32)


LAYERS = {  # of (bag, embeddings, layer 1, ..., layer L)
    "mean": lambda x: x[2:].mean(0),
    "last": lambda x: x[-1],
    "upper half": lambda x: x[len(x) // 2 + 1 :].mean(0),
    "all and embeddings": lambda x: x[1:].mean(0),
    "bag": lambda x: x[0],
}


def depth_directions(x, depth, n):
    "The first n directions along which log counts can be read off the vectors, in turn, (n, D)."
    left = (x - x.mean(0)).astype(np.float64)
    target = depth - depth.mean()
    found = []
    for _ in range(n):
        covariance = left.T @ left
        ridge = 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        direction = np.linalg.solve(covariance + ridge, left.T @ target)
        direction = direction / np.linalg.norm(direction)
        found.append(direction)
        left = left - np.outer(left @ direction, direction)
    return np.array(found)


CLEANINGS = (
    "nothing",
    "depth 1",
    "depth 2",
    "depth 4",
    "leading 1",
    "leading 2",
    "half whitened",
)


def cleaning(x, kind, depth):
    "The linear map (D, D) that follows the subtraction of the mean, for one of CLEANINGS."
    if kind.startswith("depth"):
        directions = depth_directions(x, depth, int(kind.split()[1]))
        return np.eye(x.shape[1]) - directions.T @ directions
    variance, axes = np.linalg.eigh(np.cov(x.T))
    variance, axes = np.maximum(variance[::-1], 0), axes.T[::-1]
    if kind.startswith("leading"):
        directions = axes[: int(kind.split()[1])]
        return np.eye(x.shape[1]) - directions.T @ directions
    return axes.T / (variance + 1e-8) ** 0.25  # half whitened


def read_out(features, choice, depth):
    "Vectors of all embedded cells by one choice (window, layers, weights, cleaning), and its map."
    window, layers, weighting, kind = choice
    x = LAYERS[layers](features[window][int(weighting == "rarity")])
    if kind == "nothing":
        return x, None
    linear = cleaning(x, kind, depth)
    return ((x - x.mean(0)) @ linear).astype(np.float32), dict(mean=x.mean(0), map=linear)


def choose_read_out(score_of, start, windows, layers):
    "Change one part of the read-out at a time and keep what scores better -> choice."
    best, best_score = start, score_of(start)
    options = (tuple(windows), tuple(layers), ("alike", "rarity"), CLEANINGS)
    for place in range(4):
        for option in options[place]:
            tried = (*best[:place], option, *best[place + 1 :])
            score = score_of(tried)
            if score > best_score + 1e-6:
                best, best_score = tried, score
    return best


class ReadOuts:
    "All vectors that one model can give for the judged cells, and their scores."

    def __init__(self, model, cells, size, device):
        self.cells, self.size, self.device = cells, size, device
        self.sets = judged_sets(cells, size)
        pairs = [p for of_set in self.sets.values() for p in of_set]
        judged = np.unique(np.concatenate([rows for p in pairs for rows in p]))
        n_cells = len(cells.indptr) - 1
        others = np.setdiff1d(np.arange(n_cells), judged)
        others = np.sort(np.random.default_rng(1).permutation(others)[: size.others])
        embedded = np.concatenate([judged, others])
        self.place = np.full(n_cells, -1)
        self.place[embedded] = np.arange(len(embedded))
        self.depth = np.log(cells.total[embedded])
        rarity = torch.from_numpy(gene_rarity(cells)).to(device)
        n_at_once = 256 if device == "cuda" else 32
        self.features = {
            w: pooled(model, cells, embedded, w, rarity, device, n_at_once) for w in size.windows
        }
        self.tried = {}

    def scores(self, choice, size, depth=False):
        "Every question to one read-out."
        x, _ = read_out(self.features, choice, self.depth)

        def vectors(rows):
            return x[self.place[rows]]

        return judge(vectors, self.cells, self.sets, size, self.device, depth)

    def quick(self, choice):
        "The same from a quarter of the draws, with coarser fits; each read-out once."
        if choice not in self.tried:
            draws, fit_steps = max(2, self.size.draws // 4), self.size.fit_steps // 2
            less = replace(self.size, draws=draws, fit_steps=fit_steps)
            self.tried[choice] = self.scores(choice, less)
        return self.tried[choice]

    def chosen_on(self, sets, start, layers):
        "The read-out that is best on the named sets."

        def score(choice):
            return mean_score(self.quick(choice), sets)

        return choose_read_out(score, start, self.size.windows, layers)


def judge_model(model, cells, size, device, say=print, keep=lambda rows: None):
    "All rows of one model: its standard vectors, its token bag, and read-outs of both."
    began = time.time()
    found = ReadOuts(model, cells, size, device)
    say(f"embedded {time.time() - began:.1f} s")
    longest, short = max(size.windows), size.windows[1]
    start = (longest, "mean", "alike", "nothing")
    bag = (longest, "bag", "alike", "nothing")
    standard = {
        "mean": start,
        "last layer": (longest, "last", "alike", "nothing"),
        f"first {short}": (short, "mean", "alike", "nothing"),
        "token bag": bag,
    }
    rows = {name: found.scores(choice, size, True) for name, choice in standard.items()}
    keep(rows)  # should the time end before the read-outs are chosen
    choices = {}
    for name, first, layers in (
        ("read-out", start, [k for k in LAYERS if k != "bag"]),
        ("token bag, read-out", bag, ["bag"]),
    ):
        # Chosen on one set and told on the other, so that the choice has not seen what is told.
        crossed = {}
        for told, other in (("pbmc3k", "baron"), ("baron", "pbmc3k")):
            choice = found.chosen_on((other,), first, layers)
            crossed[told] = found.scores(choice, size, True)[told]
            choices[f"{name}, for {told}"] = choice
        rows[f"{name} chosen on the other set"] = crossed
        choices[name] = found.chosen_on(("pbmc3k", "baron"), first, layers)
        rows[f"{name} chosen on both"] = found.scores(choices[name], size, True)
    _, map_ = read_out(found.features, choices["read-out"], found.depth)
    stored = {k: np.round(v, 5).tolist() for k, v in (map_ or {}).items()}
    say(f"judged {time.time() - began:.1f} s")
    tries = [dict(choice=c, pbmc3k=s["pbmc3k"], baron=s["baron"]) for c, s in found.tried.items()]
    seconds = round(time.time() - began, 1)
    return dict(rows=rows, choices=choices, read_out=stored, tries=tries, seconds=seconds)


def judge_without_model(pack, cells, size, device):
    "What needs no training: bag of SVD vectors, principal components of corpus and judged cells."
    sets = judged_sets(cells, size)
    n_cells = len(cells.indptr) - 1
    own = {}
    for method, file in (
        ("SVD-50 of the set's own cells", "svd50"),
        ("PCA-50 on its HVGs", "hvg50"),
    ):
        own[method] = np.zeros((n_cells, 50), np.float32)
        for name, study in (("pbmc3k", "pbmc3k"), ("baron", "baron_pancreas")):
            rows = (cells.obs.dataset_id == study).to_numpy()
            own[method][rows] = np.load(Path(pack) / f"{name}_{file}.npy").astype(np.float32)
    wanted = np.unique(
        np.concatenate([np.concatenate(p) for pairs in sets.values() for p in pairs])
    )
    bag = np.zeros((n_cells, size.width), np.float32)
    genes, _, lengths = encode(cells, wanted, max(size.windows))
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    bag[wanted] = np.add.reduceat(cells.vectors[genes, : size.width], first, 0) / lengths[:, None]
    raw = np.load(Path(pack) / "components.npy").astype(np.float32)
    methods = own | {
        "SVD bag": bag,
        "components of the corpus": raw,
        "components, half whitened": cells.components,
    }
    return {
        name: judge(lambda rows, x=x: x[rows], cells, sets, size, device, True)
        for name, x in methods.items()
    }


# --- One process a recipe, and one that watches -------------------------------------------------


def work(args):
    "What the process of one recipe does."
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # judging is in full precision
    device = "cuda" if torch.cuda.is_available() and not args.toy else "cpu"
    size = TOY if args.toy else SMALL if args.small else Size()
    name, folder = args.worker, Path(args.scratch) / args.worker
    folder.mkdir(parents=True, exist_ok=True)

    def say(text):
        return print(f"{name}, {time.time() - BEGAN:.0f} s: {text}", flush=True)

    def write(record):
        return write_whole(folder / "record.json", json.dumps(record))

    record = dict(recipe=name)
    try:
        cells = read_pack(args.pack)
        if name == "no-model":
            record["baselines"] = judge_without_model(args.pack, cells, size, device)
        elif name == SHIPPED:
            record["judged"] = judge_checkpoint(name, cells, size, device, say)
        else:
            model, record = train(name, cells, size, device, args.ends_at, args.steps, folder)
            say(f"{record['steps']} steps, held-out loss {record['held_out_loss']}")

            def keep(rows):
                return write(record | dict(judged=dict(rows=rows)))

            if not args.train_only:
                record["judged"] = judge_model(model, cells, size, device, say, keep)
    except Exception as e:
        record["error"] = f"{type(e).__name__}: {e}"[:1000]
        record["where"] = traceback.format_exc()[-2000:]
    write(record)


def best_score(record):
    "The score of the best read-out of a recipe; token bags do not count."
    rows = record.get("judged", {}).get("rows", {})
    return max(
        (mean_score(row) for name, row in rows.items() if "token bag" not in name), default=0
    )


def gather(args, names, out, final=False):
    "Write what stands: all records, the weights of the first or, at the end, the best recipes."
    records = {}
    for name in [*names, *BESIDE]:
        path = Path(args.scratch) / name / "record.json"
        if path.exists():
            records[name] = json.loads(path.read_text())
    ranked = list(names)
    if final:
        ranked = sorted(names, key=lambda name: -best_score(records.get(name, {})))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.toy else "cpu"
    result = dict(
        device=device,
        torch=torch.__version__,
        minutes=round((time.time() - BEGAN) / 60, 2),
        final=final,
        command=dict(minutes=args.minutes, steps=args.steps, toy=args.toy, recipes=args.recipes),
        ranked=ranked,
        recipes=records,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "results.json", json.dumps(result) + "\n")
    for name in ranked[args.keep :]:
        (out / f"{name}.safetensors").unlink(missing_ok=True)
    for name in ranked[: args.keep]:
        weights = Path(args.scratch) / name / "model.safetensors"
        if weights.exists():
            shutil.copyfile(weights, out / f"{name}.safetensors")
    return result


def table(result):
    "The short table at the end."
    lines = [
        f"{'':44} {'pbmc3k':^31} {'baron':^31}",
        f"{'':44} " + 2 * f"{'5':>7} {'20':>7} {'k-NN':>7} {'depth':>7} ",
    ]

    def line(name, scores):
        cells = [
            scores.get(s, {}).get(k, float("nan"))
            for s in ("pbmc3k", "baron")
            for k in ("5-shot", "20-shot", "k-NN", "depth R2")
        ]
        lines.append(f"{name[:44]:44} " + " ".join(f"{v:7.3f}" for v in cells))

    for name, record in result["recipes"].items():
        if "error" in record:
            lines.append(f"{name}: {record['error']}")
        for method, scores in record.get("baselines", {}).items():
            line(method, scores)
        for method, scores in record.get("judged", {}).get("rows", {}).items():
            line(f"{name}: {method}", scores)
        if "held_out_loss" in record:
            choice = record.get("judged", {}).get("choices", {}).get("read-out")
            lines.append(
                f"   held-out loss {record['held_out_loss']}, {record['steps']} steps, "
                f"{record['ms_a_step']} ms a step, {record['n_tokens'] / 1e6:.1f} M tokens, "
                f"waiting {record['share_waiting']}, read-out {choice}"
            )
    return "\n".join(lines)


class Here:
    "What stands for a process of its own when the work is done in this one."

    returncode = 0

    def __init__(self, args):
        work(args)

    def poll(self):
        return self.returncode


def watch(args):
    "Start a process a recipe, write what stands every ninety seconds, and the table at the end."
    names = args.recipes.split(",")
    for name in names:
        if name.split("-")[0] not in RECIPES | LATER:
            raise SystemExit(
                f"There is no recipe {name!r}; the recipes are {', '.join(RECIPES | LATER)} "
                "(with -s1 for another seed, -muon for Muon)."
            )
    args.scratch = tempfile.mkdtemp()
    ends_at = BEGAN + 60 * args.minutes - args.judging
    told = {"ends-at": ends_at, "steps": args.steps, "scratch": args.scratch}
    told |= {"pack": args.pack, "threads": args.threads}
    passed = [f"--{name}={value}" for name, value in told.items()]
    passed += ["--toy"] * args.toy + ["--small"] * args.small
    passed += ["--train-only"] * args.train_only
    beside = [] if args.train_only else BESIDE
    run = [sys.executable, str(Path(__file__).resolve())]
    # Without a limit each process would start a thread a core in every product.
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | {name: str(args.threads) for name in limits}

    def start(name):
        if args.toy and name != names[0]:  # a rehearsal needs one process to see that it works
            return Here(argparse.Namespace(**vars(args) | dict(worker=name, ends_at=ends_at)))
        said = subprocess.DEVNULL if args.toy else None  # an error stands in its record
        return subprocess.Popen([*run, "--worker", name, *passed], env=environment, stdout=said)

    out, last = Path(args.out), time.time()
    waiting, going = [*names, *beside], {}
    at_once = args.at_once or len(waiting)
    while waiting or going:
        while waiting and len(going) < at_once:
            name = waiting.pop(0)
            going[name] = start(name)
        time.sleep(0.5)
        for name, p in going.items():
            if p.poll():
                print(f"{name} ended with exit status {p.returncode}", flush=True)
        going = {k: p for k, p in going.items() if p.poll() is None}
        late = not args.steps and time.time() > BEGAN + 60 * args.minutes + args.grace
        if late:
            for p in going.values():
                p.kill()
            waiting = []
        if time.time() - last > 90:
            last = time.time()
            gather(args, names, out)
    result = gather(args, names, out, final=True)
    print(table(result), flush=True)
    shutil.rmtree(args.scratch, ignore_errors=True)
    started = [*names, *beside]
    failed = [name for name in started if "error" in result["recipes"].get(name, {"error": 0})]
    if failed:
        raise SystemExit(f"These gave no result: {', '.join(failed)}; see results.json.")


def unpack(args):
    "Make a checkpoint folder of the weights of one recipe, and score it where tokens are given."
    from safetensors.torch import load_file

    result = json.loads((Path(args.unpack) / "results.json").read_text())
    record = result["recipes"][args.recipe]
    model = ScembForMaskedLM(ScembConfig(**record["config"]))
    model.load_state_dict(load_file(Path(args.unpack) / f"{args.recipe}.safetensors"), strict=False)
    model.tie_weights()
    settings = TokenizerSettings(max_len=max(record["windows"]))
    folder = Path(args.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = Vocabulary.load(args.pack)
    recipe = dict(recipe=args.recipe)
    if not args.tokens:
        save_checkpoint(model.eval(), folder, vocabulary, settings=settings, card=recipe, half=True)
        return
    heldout, guesses = scores_of(model.eval(), args.tokens, settings.max_len)
    kept = ("steps", "windows", "seed", "n_tokens", "n_cells", "ms_a_step", "held_out_loss")
    training = dict(
        settings=recipe | {k: record[k] for k in kept} | dict(validation_share=HELD_OUT_SHARE),
        versions={k: result[k] for k in ("device", "torch")},
        n_cells=len(read_pack(args.pack).obs),
        heldout=heldout,
    )
    save_checkpoint(model, folder, vocabulary, settings=settings, card=recipe, half=True)
    write_whole(folder / "training.json", json.dumps(training) + "\n")
    guesses.to_csv(folder / "baselines.csv", index=False)


def scores_of(model, tokens, max_len):
    "Masked-gene scores on the held-out cells: of the model, and of tables that count."
    from scemb.model.baselines import masked_scores
    from scemb.model.pretrain import SCORED_SHARE, baseline_scorers, model_scorer, score_summary
    from scemb.tokens.tokenize import read_tokens

    cells = read_tokens(tokens)
    training, held_out = split_held_out(len(cells))
    asked = dict(max_len=max_len, seed=1, share=SCORED_SHARE)
    held_out = cells.subset(held_out)
    own = score_summary(masked_scores(held_out, dict(model=model_scorer(model)), **asked))
    guesses = baseline_scorers(cells.subset(training), max_len)
    return own.iloc[0].to_dict(), score_summary(masked_scores(held_out, guesses, **asked))


def judge_checkpoint(name, cells, size, device, say=print):
    "Judge a finished model, shipped or in a folder, as the recipes are judged."
    from scemb.model.checkpoint import load_checkpoint

    model = load_checkpoint(name)[0].to(device)
    longest = model.config.max_position_embeddings
    windows = tuple(w for w in size.windows if w <= longest)
    return judge_model(model, cells, replace(size, windows=windows), device, say)


def judge_only(args):
    "One finished model beside what needs no training."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    cells = read_pack(args.pack)
    size = Size(draws=args.draws, judged=args.judged, others=min(args.judged, Size.others))
    models = {args.judge: dict(judged=judge_checkpoint(args.judge, cells, size, device))}
    without = dict(baselines=judge_without_model(args.pack, cells, size, device))
    result = dict(recipes=models | {"no-model": without})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    write_whole(Path(args.out) / "judged.json", json.dumps(result) + "\n")
    print(table(result))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=5.5, help="of everything, judging included"
    )
    parser.add_argument(
        "--recipes",
        default=",".join(RECIPES),
        help="names, with -s1 for seed 1 and -muon for Muon",
    )
    parser.add_argument("--pack", default="local/gpu_pack")
    parser.add_argument("--out", default="local/gpu_out")
    parser.add_argument("--keep", type=int, default=4, help="weights that are written: 13 MB each")
    parser.add_argument(
        "--judging", type=float, default=60, help="seconds of the time that judging gets"
    )
    parser.add_argument(
        "--train-only",
        action="store_true",
        help="weights and curves; judge them later, see --judge",
    )
    parser.add_argument(
        "--grace", type=float, default=20, help="seconds after which late processes are ended"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="a fixed number of steps; 0: as many as fit into the time",
    )
    parser.add_argument(
        "--at-once", type=int, default=0, help="recipes trained at the same time; 0: all"
    )
    parser.add_argument("--threads", type=int, default=2, help="of a process")
    parser.add_argument("--toy", action="store_true", help="a tiny model on a CPU")
    parser.add_argument(
        "--small", action="store_true", help="the real model, judged on few cells: a rehearsal"
    )
    parser.add_argument("--scratch", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ends-at", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--unpack", default="", help="folder written by a run")
    parser.add_argument("--recipe", default="", help="with --unpack")
    parser.add_argument(
        "--tokens", default="", help="with --unpack: tokens of the corpus, to score held-out cells"
    )
    parser.add_argument("--judge", default="", help="only judge a finished model")
    parser.add_argument("--draws", type=int, default=20, help="with --judge: of labelled cells")
    parser.add_argument("--judged", type=int, default=10_000, help="with --judge: cells of a set")
    parser.add_argument("--folder", default="", help="with --unpack: the checkpoint to write")
    args = parser.parse_args(arguments)
    if args.toy:
        args.steps, args.at_once, args.threads = args.steps or 6, args.at_once or 1, 1
    if args.unpack:
        unpack(args)
    elif args.judge:
        judge_only(args)
    elif args.worker:
        work(args)
    else:
        watch(args)


if __name__ == "__main__":
    main()
