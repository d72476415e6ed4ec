"""Plant faults in exported functions, one by one, and see which page notices. Not part of the
suite.

    mutants.py                    every fault whose outcome is not yet in the table
    mutants.py --only WORD        faults whose page or story holds the word, anew
    mutants.py --check            only that every fault can still be planted: its text stands once
    on its page

A fault is a change of one piece of code. It is planted in a copy of the project, on the page and
in the module, and the page that must notice is run: its fast cells first, its slow ones too when
those see nothing. Only then does a fault survive. Outcomes go to
results/explain/mutants/mutants.csv.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checks import ROOT, pages, text
from suite import ENV

TABLE = ROOT / "results/explain/mutants/mutants.csv"
COLUMNS = ("page", "noticed_by", "fault", "before", "after", "outcome", "how")
TIMEOUT = 900  # seconds for one page


@dataclass(frozen=True)
class Fault:
    module: str  # Where it is planted
    before: str  # What stands there, once
    after: str  # What is put there
    story: str  # The fault in words
    page: str = ""  # Page that must notice; empty: the one that writes the module


FAULTS = [
    # statistics
    Fault(
        "stats.resampling",
        "greater = ((null >= observed - slack).sum(0) + 1) / (len(null) + 1)",
        "greater = ((null >= observed - slack).sum(0))/len(null)",
        "a permutation p can be zero",
    ),
    Fault(
        "stats.resampling",
        "(np.minimum(1, 2 * np.minimum(greater, less)), greater, less)",
        "(np.minimum(1, np.minimum(greater, less)), greater, less)",
        "a two-sided p counts one side",
    ),
    Fault(
        "stats.resampling",
        "return masks @ (values / information) - share @ (values / information)",
        "return share @ (values/information) - masks @ (values/information)",
        "sign of a difference of groups",
    ),
    Fault(
        "stats.resampling",
        "x.std(ddof=1) / sqrt(len(x))",
        "x.std(ddof=1)/len(x)",
        "standard error over n, not over its root",
    ),
    Fault(
        "stats.resampling",
        'adjusted[order] = np.maximum.accumulate(permutation_p(size[order], largest, "greater"))',
        'adjusted[order] = permutation_p(size[order], null[:, order], "greater")',
        "adjusted p-values are not adjusted",
    ),
    # tokens
    Fault(
        "tokens.ranking",
        "bins[on] = 1 + n_bins * (below + upto) // (2 * max(n, 1))",
        "bins[on] = 1 + n_bins*(below + below) // (2*max(n, 1))",
        "ties take the bin of their lowest rank",
    ),
    Fault(
        "tokens.ranking",
        ("else:\n            _tie_keys(gene, m, _mix64(h) ^ seed, key)"),
        "else: _tie_keys(gene, m, seed, key)",
        "the order of ties is the same in every cell",
    ),
    Fault(
        "tokens.ranking",
        "while lowest > 1 and above < limit:",
        "while lowest > 1 and above < limit - 1:",
        "off by one where a long cell is cut",
    ),
    Fault(
        "tokens.ranking",
        ("if t >= 0 and data[j] > 0:\n                hist[\n                    t,"),
        "if data[j] > 0: hist[t,",
        "unknown genes enter a gene median",
    ),
    Fault(
        "model.batching",
        "below = np.uint64(min(int(share * 2**64), 2**64 - 1))",
        "below = np.uint64(min(int(share*2**63), 2**64 - 1))",
        "half as many genes are hidden",
    ),
    Fault(
        "model.batching",
        ("if not keep_bin:\n                    bins[j] = 0"),
        "if keep_bin: bins[j] = 0",
        "the bin of a hidden gene stays visible",
    ),
    Fault(
        "model.batching",
        "mine = np.arange(rank, -(-n // world) * world, world) % max(n, 1)",
        "mine = np.arange(0, -(-n//world)*world, world) % max(n, 1)",
        "every device trains on the same batches",
    ),
    # corpus and leakage
    Fault(
        "corpus.filters",
        '("min_genes", m["n_genes"] >= filters.min_genes)',
        '("min_genes", m["n_genes"] > filters.min_genes)',
        "off by one in a filter",
    ),
    Fault(
        "corpus.filters",
        ("if mito[g]:\n                m += v"),
        "if mito[g]: m += 1",
        "mitochondrial genes are counted, not their counts",
    ),
    Fault(
        "corpus.leakage",
        "theirs[enough >= min_genes]) & (n >= min_genes)",
        "theirs)",
        "cells with too few genes count as leaked",
    ),
    # vectors
    Fault("model.embed", "/ cu.diff()[:, None]", "/cu.diff().max()", "mean over padding"),
    Fault(
        "tokens.other_orders",
        "as_float[0] = v * scale[t]",
        "as_float[0] = v/scale[t]",
        "counts are multiplied by gene medians",
    ),
    # perturbation
    Fault(
        "perturb.edits",
        "cells.bins[near].masked_fill(target, 0)",
        "cells.bins[near]",
        "a masked gene keeps its bin",
    ),
    Fault(
        "perturb.edits",
        "p, above + equal / 2 - 0.5)",
        "p, above)",
        "a lowered gene goes before its ties",
    ),
    Fault(
        "perturb.agreement",
        "rank = 1 + (similar > own).sum(1)",
        "rank = (similar > own).sum(1)",
        "ranks begin at 0",
    ),
    Fault(
        "perturb.agreement",
        "return shifts - (shifts.mean(0)",
        "return shifts + (shifts.mean(0)",
        "what all perturbations share is added",
    ),
    # links between genes
    Fault(
        "network.links",
        "hidden = np.isin(graph.pairs, gone).any(1)",
        "hidden = np.isin(graph.pairs, gone).all(1)",
        "links of hidden genes leak into training",
    ),
    Fault(
        "network.links",
        "bad = (out[:, 0] == out[:, 1]) | linked(out)",
        "bad = out[:, 0] == out[:, 1]",
        "false links may be true ones",
    ),
    Fault(
        "network.graph",
        "likeness = both / (size[here, None] + size - both)",
        "likeness = both/(size[here, None] + size)",
        "the union of two sets counts their overlap twice",
    ),
    # labels and scores
    Fault(
        "judge.scores",
        "classify(x[~query], labels[~query], x[query])",
        "classify(x, labels, x[query])",
        "a left-out batch is in the training set",
    ),
    Fault(
        "judge.scores",
        "asked = order[~np.isin(order, shown)][:max_query]",
        "asked = order[:max_query]",
        "labelled cells are asked about",
    ),
    Fault(
        "judge.scores",
        "f1 = 2 * hits[occurs] / (n_true + n_guessed)[occurs]",
        "f1 = hits[occurs] / n_true[occurs]",
        "recall is called F1",
    ),
    Fault(
        "judge.scores",
        "neighbour_vote(xr, yr, xq",
        "neighbour_vote(xr, np.random.default_rng(0).permutation(yr), xq",
        "shuffled labels",
    ),
    Fault(
        "judge.annotation_scores",
        "(rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m)",
        "1 - (rankdata(score)[positive].sum() - n*(n + 1)/2)/(n*m)",
        "sign of an area under the curve",
    ),
    # adapting a model
    Fault("adapt.cell_model", "lora_alpha=2 * s.rank", "lora_alpha=0", "LoRA is not applied"),
    Fault(
        "adapt.held_out",
        "return np.setdiff1d(np.arange(len(y)), held), held",
        "return np.arange(len(y)), held",
        "held-out cells are trained on",
    ),
    Fault(
        "adapt.held_out",
        "nll(scores / np.exp(log_temperature), y)",
        "nll(scores * np.exp(log_temperature), y)",
        "the temperature is inverted",
    ),
    # perturbation by direction, matches
    Fault(
        "perturb.screen",
        "d = np.nanmean(x[labels == goal], 0) - np.nanmean(x[labels == start], 0)",
        "d = np.nanmean(x[labels == start], 0) - np.nanmean(x[labels == goal], 0)",
        "the direction of a screen is turned round",
    ),
    Fault(
        "perturb.screen",
        "np.lexsort((-table.effect.abs(), table.group, table.direction))",
        "np.lexsort((-table.effect, table.group, table.direction))",
        "a screen is ordered by effects with their sign",
    ),
    Fault(
        "disease.correlate",
        'np.where(table.cosine < 0, "reversal", "mimic")',
        'np.where(table.cosine > 0, "reversal", "mimic")',
        "reversal is called mimic",
    ),
    Fault(
        "stats.resampling",
        "(np.minimum(1, 2 * np.minimum(greater, less)), greater, less)",
        "(np.minimum(greater, less), greater, less)",
        "a two-sided p is the smaller one",
    ),
    Fault(
        "perturb.edits",
        "wanted = torch.where(there, value[p] * factor, torch.inf)",
        "wanted = torch.where(there, value[p], torch.inf)",
        "a knocked-down gene keeps its rank",
    ),
    Fault(
        "data.counts",
        "bad |= ~(flat == np.floor(flat))",
        "bad |= flat > np.floor(flat)",
        "NaN passes as a count",
    ),
    # pretraining, files
    Fault(
        "model.pretrain",
        ("np.flatnonzero(~mask) if mask.any() else None,\n    )"),
        ("None,\n    )"),
        "held-out cells are trained on in pretraining",
    ),
    Fault(
        "model.embed_files",
        "first, vectors = number * windows.size, ",
        "first, vectors = number * windows.size + 1, ",
        "windows of vectors are shifted by a cell",
    ),
    # damage
    Fault(
        "data.folders",
        "found = _SEEN.get(mark) or checksum(path)",
        "found = sums",
        "a checksum is not compared",
    ),
    Fault(
        "data.folders",
        "if stat.st_size != size:",
        "    if stat.st_size < size:",
        "a file that is too long passes",
    ),
    Fault(
        "data.folders",
        'found.check(name, now=entry["bytes"] <= SMALL)',
        "found.check(name, now=False)",
        "small files are not checked when a folder is opened",
    ),
    Fault(
        "data.folders",
        "mark = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)",
        "mark = (stat.st_dev, stat.st_ino)",
        "a file that changed counts as checked",
    ),
    Fault(
        "data.folders",
        "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "a lock does not keep others out",
    ),
    Fault(
        "data.folders",
        'isinstance(name, str) and name not in ("", ".", "..") and not '
        're.search(r"[/\\\\\\x00:]", name)',
        "isinstance(name, str)",
        "a name in a record may lead outside",
    ),
    Fault(
        "data.folders",
        "if finite and tensor.is_floating_point() and not tensor.isfinite().all():",
        "if finite and tensor.isnan().any():",
        "infinite weights pass",
    ),
    Fault(
        "data.folders",
        "if signed != _sum_of(value):",
        "        if not signed:",
        "the checksum in a record is not compared",
    ),
    Fault(
        "data.folders",
        "place.mkdir(mode=0o700)  # exclusive",
        "place.mkdir(mode=0o700, exist_ok=True)          # exclusive",
        "the place of a new file may be there already",
    ),
    Fault(
        "tokens.ranking",
        "if found != identity:",
        "    if not identity:",
        "settings are not compared with their hash",
    ),
    Fault(
        "tokens.tokenize",
        "checks[number] = whole",
        "            checks[number] = lambda: None",
        "token shards are not checked when they are read",
    ),
    Fault(
        "data.jobs",
        "return records[: whole.index(False)] if False in whole else records",
        "return records",
        "finished shards of a stopped run are taken up unchecked",
        "tokens/01_tokenize.ipynb",
    ),
    Fault(
        "model.checkpoint",
        "if n_layers != config.num_hidden_layers:",
        "    if n_layers > config.num_hidden_layers:",
        "a configuration may claim more layers than the file has",
    ),
    Fault(
        "model.checkpoint",
        (
            "compare_shapes(\n"
            "        weights, {k: v for k, v in found.items() if k not in tied}, wanted, "
            "way_out=WAY_OUT\n"
            "    )"
        ),
        "",
        "weights may be missing",
    ),
    Fault(
        "adapt.cell_model",
        ('claims += [\n            ("rank", s.rank, shape[0]) for'),
        'claims += [("rank", shape[0], shape[0]) for',
        "an adapter's rank is not compared with its weights",
    ),
    Fault(
        "corpus.curate",
        (
            "def _keep_own(out, plan, say):\n"
            "    # the plan was lost: shards count only where their record names the same plan"
        ),
        (
            "def _keep_own(out, plan, say): # the plan was lost: shards count only where their "
            "record names the same plan\n"
            "    return\n"
            ""
        ),
        "shards of another plan are kept when the plan was lost",
    ),
    Fault(
        "corpus.shards",
        'if r["file"] != unit.shard or',
        "if",
        "a record may name another file than its unit's",
    ),
    Fault(
        "model.pretrain",
        "if step > s.steps or step == s.steps and not unfinished(out):",
        "if step >= s.steps:",
        "a run that has all steps cannot be finished",
    ),
    Fault(
        "model.pretrain",
        ("for name in manifest.files if manifest else ():\n                manifest.check(name)"),
        "",
        "a damaged checkpoint of a run is taken up",
    ),
    Fault(
        "data.jobs",
        "            except Damaged:\n                self.file(number).unlink()",
        "            except Damaged:\n                pass",
        "damaged windows of a stopped run are kept",
        "model/09_embed_files.ipynb",
    ),
    Fault(
        "data.jobs",
        "            self.forget_damaged()\n            numbers = self.missing()",
        "            numbers = self.missing()",
        "a damaged window stops the run",
        "perturb/03_screen.ipynb",
    ),
]


def home(module, found):
    "The page that writes a module."
    return next(p for p in found if p.module == module)


def place(fault, page):
    """Number of the cell that holds the text of a fault; ValueError unless it stands once on the
    page."""
    hits = [
        i
        for i, c in enumerate(page.cells)
        if c["cell_type"] == "code" and fault.before in text(c["source"])
    ]
    if len(hits) != 1 or text(page.cells[hits[0]]["source"]).count(fault.before) != 1:
        raise ValueError(
            f"{page.rel}: {fault.before[:60]!r} stands in {len(hits)} cells, wanted exactly "
            f"once; change the fault ({fault.story})."
        )
    return hits[0]


def misplaced(found):
    "Complaints about faults whose text does not stand once on their page any more."
    lost = []
    for fault in FAULTS:
        try:
            place(fault, home(fault.module, found))
        except ValueError as e:
            lost.append(str(e))
    return lost


def plant(fault, tree, found):
    "Put a fault into the page and the module of a copy of the project."
    page = home(fault.module, found)
    nb, i = json.loads(json.dumps(page.nb)), place(fault, page)
    nb["cells"][i]["source"] = text(nb["cells"][i]["source"]).replace(fault.before, fault.after)
    (tree / "nbs" / page.rel).write_text(json.dumps(nb))
    module = tree / "scemb" / f"{fault.module.replace('.', '/')}.py"
    code = module.read_text(encoding="utf-8")
    module.write_text(code.replace(fault.before, fault.after), encoding="utf-8")
    return page


def copied(folder):
    "A copy of the project, without what git ignores."
    tree = Path(folder) / "project"
    leave = shutil.ignore_patterns(
        ".git", ".venv", "runs", "local", "_docs", "_proc", "__pycache__", ".ruff_cache"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave)
    return tree


def failure(tree, page, flags):
    "The last line that a failing page prints, None when it passes."
    command = [sys.executable, str(tree / ".ci" / "one_page.py"), str(tree / "nbs" / page), *flags]
    env = {**ENV, "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {TIMEOUT} s"
    if not done.returncode:
        return None
    lines = [
        s
        for s in (done.stdout + done.stderr).splitlines()
        if re.match(r"^(\w+\.)*\w*(Error|Exception|Failed)\b", s)
    ]
    return lines[-1] if lines else "failed"


def outcome(fault, tree, found):
    "A row of the table: was the fault noticed, by which cells, with which error."
    page = fault.page or plant(fault, tree, found).rel
    if fault.page:
        plant(fault, tree, found)
    seen, by = failure(tree, page, []), "fast cells"
    if seen is None:
        seen, by = failure(tree, page, ["slow"]), "slow cells"
    how = "" if seen is None else f"{by}: {seen.split(':')[0]}"
    return dict(
        page=home(fault.module, found).rel,
        noticed_by=page,
        fault=fault.story,
        before=fault.before,
        after=fault.after,
        outcome="survives" if seen is None else "noticed",
        how=how,
    )


def table():
    "Outcomes so far: (before, after) -> row."
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as f:
        return {(r["before"], r["after"]): r for r in csv.DictReader(f)}


def write(rows):
    """Write the table in the order of the faults; a fault that is not in the list any more is left
    out."""
    ordered = [rows[f.before, f.after] for f in FAULTS if (f.before, f.after) in rows]
    with TABLE.open("w", newline="") as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        w.writeheader()
        w.writerows(ordered)
    from scemb.data.records import write_record

    write_record(TABLE.parent, ".ci/mutants.py", {}, shown="nbs/explain/mutants.ipynb")


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--only", default="", help="faults whose page or story holds this word, anew")
    ap.add_argument("--check", action="store_true", help="run nothing")
    args = ap.parse_args()
    found, rows = pages(ROOT), table()
    lost = misplaced(found)
    print(*lost, sep="\n", end="\n" if lost else "")
    fitting = [f for f in FAULTS if not any(f.story in line for line in lost)]
    if args.check:
        print(f"{len(fitting)} of {len(FAULTS)} faults can be planted, {len(rows)} have been")
        return 1 if lost else 0
    chosen = [
        f
        for f in fitting
        if args.only and (args.only in f.story or args.only in home(f.module, found).rel)
    ]
    todo = chosen or [f for f in fitting if (f.before, f.after) not in rows]
    for fault in todo:
        with tempfile.TemporaryDirectory() as tmp:
            row = outcome(fault, copied(tmp), found)
        rows[fault.before, fault.after] = row
        print(f"{row['outcome']:8}  {row['page']:28} {row['fault']}  ({row['how']})", flush=True)
        write(rows)
    alive = [r for r in rows.values() if r["outcome"] == "survives"]
    print(f"{len(rows)} of {len(FAULTS)} faults planted, {len(alive)} survive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
