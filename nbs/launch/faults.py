"""Kills, full disks, damage, two writers and strangers' files, tried on toys; what came of each try
is counted.

    python nbs/launch/faults.py --out benchmarks/faults.csv    # all of it: some 530 tries, about 20
    minutes
    python nbs/launch/faults.py --small --out FILE             # a few of each area, under a minute
    python nbs/launch/faults.py --only checkpoint              # one area

Every try runs a command (or a reader) in a process of its own, which is forked, so that no library
is loaded anew; it may take 3 GB more memory than its parent and two minutes. A try is

    right       refused with a sentence that names the file, or ended with the right result
    harmless    the damage changed nothing: the right result
    lost        the work could not be finished, or something outside the output was touched
    accepted    it ended well with another result
    traceback   it ended with a traceback, without end, or by taking all memory
    unclear     refused, but the sentence names neither file nor cause

A row an area: area, tries and these six. With --list every try that is not right is printed.
Disks are filled on a tmpfs where one can be mounted (as root), else by a limit on the size of
files.
"""

import argparse
import contextlib
import csv
import gc
import hashlib
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # a process with threads does not fork well
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import anndata as ad  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from scemb.data import datasets  # noqa: E402
from scemb.adapt.annotate import load_annotator  # noqa: E402
from scemb.model.checkpoint import save_checkpoint  # noqa: E402
from scemb.app.cli import app  # noqa: E402
from scemb.app.commands import refusing  # noqa: E402
from scemb.corpus.curate import read_corpus  # noqa: E402
from scemb.data.folders import checksum  # noqa: E402
from scemb.model.encoder import ScembConfig, ScembForMaskedLM  # noqa: E402
from scemb.tokens.ranking import TokenizerSettings, protein_vocabulary  # noqa: E402
from scemb.tokens.tokenize import read_tokens, tokenize  # noqa: E402

OUTCOMES = ("right", "harmless", "lost", "accepted", "traceback", "unclear")
TIMEOUT = 120  # seconds of one try
MEMORY = 3 << 30  # bytes that one try may take beside what its parent has


@dataclass
class Ended:
    "How a process ended."

    code: int  # Exit code; -9 when killed, 70 after a traceback
    said: str  # What it wrote to stdout and stderr


@dataclass
class Tally:
    "Tries of one area."

    area: str
    counts: dict = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    odd: list = field(default_factory=list)

    def add(self, outcome, story, ended=None):
        self.counts[outcome] += 1
        if outcome not in ("right", "harmless"):
            self.odd.append(
                f"{self.area}: {outcome}: {story}: {ended.said[-400:] if ended else ''}"
            )


def _memory_now():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[0]) * resource.getpagesize()


def _child(work, log, file_limit):
    "Run `work` as a command does, in the child; never returns."
    code = 70
    try:
        os.setsid()
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_memory_now() + MEMORY, resource.RLIM_INFINITY))
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        try:
            work()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException as e:
            known = getattr(e, "exit_code", None)
            if isinstance(known, int):  # typer.Exit
                code = known
            else:
                import traceback

                traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(work, kill_after=None, file_limit=None, log=None) -> Ended:
    "Run something in a forked process; kill it after so many seconds."
    log = log or tempfile.mkstemp()[1]
    pid = os.fork()
    if not pid:
        _child(work, log, file_limit)
    end = time.monotonic() + (TIMEOUT if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(
                pid, signal.SIGKILL
            )
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    said = Path(log).read_text(errors="replace")
    os.unlink(log)
    code = os.waitstatus_to_exitcode(status)
    if code == -9 and kill_after is None:
        said += "\n(stopped after two minutes)"
    return Ended(code, said)


def command(*words):
    "A command of scemb, as typed."

    def work():
        sys.argv = ["scemb", *map(str, words)]
        app([str(w) for w in words])

    return work


def reader(function):
    "A function of the package under the words of a command."

    def work():
        @refusing
        def opens():
            print("result", function())

        opens()

    return work


def judged(tally, story, end, result, truth, names, damaged=True):
    "Count a try by its end, its result (None: none) and the right one."
    if end.code == 70 or end.code < 0:
        tally.add("traceback", story, end)
    elif end.code == 0 and result == truth:
        tally.add("harmless" if damaged else "right", story)
    elif end.code == 0:
        tally.add("accepted", story, end)
    elif "Traceback" in end.said:
        tally.add("traceback", story, end)
    else:
        clear = any(str(n) in end.said for n in names)
        tally.add("right" if clear else "unclear", story, end)


# ---------------------------------------------------------------- toys


def digest(*things):
    h = hashlib.sha256()
    for x in things:
        h.update(x.tobytes() if hasattr(x, "tobytes") else repr(x).encode())
    return h.hexdigest()


def content(path):
    """Checksum of a file or of all files of a folder but hidden ones; of cells their arrays and
    columns; None: not there."""
    path = Path(path)
    if not path.exists():
        return None
    if path.is_dir():
        files = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and not any(x.startswith(".") for x in p.relative_to(path).parts)
        )
        return digest(*(f"{p.relative_to(path)} {checksum(p)}" for p in files))
    if path.suffix == ".h5ad":
        a = ad.read_h5ad(path)
        obs = {k: list(a.obs[k].astype(str)) for k in sorted(a.obs)}
        x = a.X.toarray() if hasattr(a.X, "toarray") else np.asarray(a.X)
        arrays = [np.nan_to_num(np.asarray(a.obsm[k], float)) for k in sorted(a.obsm)]
        return digest(obs, list(a.obs_names), np.nan_to_num(np.asarray(x, float)), *arrays)
    return checksum(path)


class Toys:
    "Small cells, and one sound result of each kind."

    def __init__(self, folder, small):
        self.top = folder
        baron = datasets.load("baron_pancreas")
        kinds = baron.obs.cell_type.astype(str)
        chosen = np.flatnonzero(kinds.isin(["alpha", "beta"]).to_numpy())[:110]
        cells = baron[chosen].copy()
        cells.obs["donor"] = [f"d{i % 3}" for i in range(cells.n_obs)]
        cells.obs["batch"] = [f"b{i % 2}" for i in range(cells.n_obs)]
        cells.X = cells.X.tocsr()
        cells[:80].write_h5ad(folder / "cells.h5ad")
        cells[80:].write_h5ad(folder / "query.h5ad")
        self.cells, self.query = folder / "cells.h5ad", folder / "query.h5ad"
        vocabulary, torch_seed = protein_vocabulary(), 0
        torch.manual_seed(torch_seed)
        config = ScembConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
        self.model = folder / "model"
        save_checkpoint(
            ScembForMaskedLM(config).eval(),
            self.model,
            vocabulary,
            settings=TokenizerSettings(max_len=64),
        )
        (folder / "small.toml").write_text(
            "\n".join(
                [
                    "layers = 1",
                    "width = 16",
                    "heads = 2",
                    "max_len = 64",
                    "token_budget = 512",
                    "save_every = 4",
                    "warmup_steps = 1",
                    "validation_share = 0.2",
                    "eval_cells = 10",
                    "eval_every = 4",
                    "learning_rate = 1e-3",
                    'start = "random"',
                    'precision = "fp32"',
                ]
            )
        )
        self.config = folder / "small.toml"
        self.tokens, self.corpus, self.adapter, self.run = (
            folder / n for n in ("tokens", "corpus", "adapter", "run")
        )

    def commands(self):
        "Name -> (words, ending of the output): the long commands."
        given = [
            "--assume",
            "disease=normal",
            "--assume",
            "suspension_type=cell",
            "--assume",
            "assay=inDrop",
            "--assume",
            "tissue=pancreas",
        ]
        fast = ["--max-len", "32", "--base", self.model]
        return {
            "curate": (["curate", self.cells, "--shard-cells", 20, *given], ""),
            "tokenize": (
                ["tokenize", self.cells, "--max-len", 64, "--obs", "donor", "--shard-cells", 16],
                "",
            ),
            "pretrain": (["pretrain", self.tokens, "--config", self.config, "--steps", 16], ""),
            "embed": (["embed", self.cells, "--model", self.model], ".h5ad"),
            "finetune": (
                [
                    "finetune",
                    self.cells,
                    "--label",
                    "cell_type",
                    "--way",
                    "lora",
                    "--epochs",
                    1,
                    *fast,
                ],
                "",
            ),
            "annotate": (
                ["annotate", self.query, "--reference", self.cells, "--label", "cell_type", *fast],
                ".h5ad",
            ),
            "integrate": (
                ["integrate", self.cells, "--batch", "batch", "--steps", 3, *fast],
                ".h5ad",
            ),
            "perturb": (
                ["perturb", self.cells, "--gene", "INS", "--gene", "GCG", "--model", self.model],
                ".h5ad",
            ),
            "screen": (
                [
                    "screen",
                    self.cells,
                    "--label",
                    "cell_type",
                    "--start",
                    "alpha",
                    "--goal",
                    "beta",
                    "--cells",
                    12,
                    "--refine",
                    2,
                    "--model",
                    self.model,
                ],
                ".csv",
            ),
        }

    def result(self, name, out):
        "Content of what a command made, without what tells the time."
        out = Path(out)
        if name == "pretrain":
            files = (
                "model.safetensors",
                "config.json",
                "gene_vocabulary.json",
                "token_settings.json",
                "loss.csv",
                "heldout.csv",
                "baselines.csv",
            )
            return (
                digest(*(content(out / f) for f in files))
                if (out / "training.json").exists()
                else None
            )
        if name == "screen":
            return (
                digest(content(out), content(out.with_name(f"{out.stem}_trust.csv")))
                if out.exists()
                else None
            )
        return content(out)

    def make(self):
        "One sound result of each command: the truth of all tries. And how long each takes."
        self.truth, self.seconds = {}, {}
        made = dict(
            curate=self.corpus, tokenize=self.tokens, pretrain=self.run, finetune=self.adapter
        )
        for name, (words, ending) in self.commands().items():
            out = made.get(name, self.top / f"{name}{ending}")
            began = time.monotonic()
            end = ended(command(*words, "--out", out))
            self.seconds[name] = time.monotonic() - began
            if end.code:
                raise SystemExit(f"{name} does not run on the toys: {end.said[-1500:]}")
            self.truth[name] = self.result(name, out)


def load_before_the_forks(cells):
    "What the commands would import and compile in each process; nothing here may start a thread."
    for name in (
        "adapt.annotate",
        "adapt.finetune",
        "adapt.integrate",
        "corpus.curate",
        "corpus.filters",
        "model.batching",
        "model.embed_files",
        "model.pretrain",
        "perturb.perturb",
        "perturb.screen",
    ):
        importlib.import_module(f"scemb.{name}")
    for name in (
        "peft",
        "rich.progress",
        "sklearn.cluster",
        "sklearn.linear_model",
        "transformers.trainer",
        "xxhash",
    ):
        importlib.import_module(name)
    tokenize(ad.read_h5ad(cells)[:4].copy(), settings=TokenizerSettings(max_len=64), n_threads=1)
    importlib.import_module("scemb.model.batching").unpadded_batches(np.array([3, 4, 5]), 8)
    gc.collect()
    gc.freeze()


def read_all_tokens(folder):
    t = read_tokens(folder)
    return digest(
        *t.gather(np.arange(len(t))), t.obs.astype(str).to_csv(), t.settings, t.vocabulary.hash
    )


def read_annotator(folder, base):
    a = load_annotator(folder, str(base))
    state = [x.detach().numpy() for _, x in sorted(a.model.state_dict().items())]
    return digest(*state, list(a.classes), a.temperature, list(a.thresholds), a.tokenizing)


# ---------------------------------------------------------------- damage


def flip(path, rng):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_late(path, rng):
    "In the second half, where the numbers are."
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data) // 2, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"")


def emptied(path, rng):
    path.write_bytes(b"")


def missing(path, rng):
    path.unlink()


def a_list(path, rng):
    path.write_text("[]")


def zeros(path, rng):
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(data) - 64))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)


def another_number(path, rng):
    "One number of a JSON file changed, as by hand."
    record = json.loads(path.read_text())
    places = []

    def look(x):
        for k, v in (
            x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
        ):
            if isinstance(v, (int, float)) and not isinstance(v, bool):
                places.append((x, k))
            look(v)

    look(record)
    if places:
        where, key = rng.choice(places)
        where[key] = rng.choice([where[key] + 1, -1, 10**7, 0, 1.5])
    path.write_text(json.dumps(record))


def damages(folder, rng, n_random):
    "(story, function of a copy) for every file of a folder."
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".md"):
        name = str(path.relative_to(folder))
        kinds = [flip] * n_random + [flip_late] * n_random + [cut, emptied, missing, zeros]
        if path.suffix == ".json":
            kinds += [a_list, another_number, another_number]
        for kind in kinds:
            yield f"{name} {kind.__name__}", name, kind


def some(items, n, rng):
    "At most n of them, spread."
    items = list(items)
    return (
        items
        if n is None or len(items) <= n
        else [items[i] for i in sorted(rng.sample(range(len(items)), n))]
    )


def tried_damage(tally, folder, work, rng, n, n_random=2, result=None, sealed=(True,)):
    """Damage copies of a folder and read them. work(copy) -> what runs; result(copy, end) -> what
    came out."""
    copy = folder.with_name(f"damaged_{folder.name}")

    def printed(_, end):
        return next(
            (line.split()[-1] for line in end.said.splitlines() if line.startswith("result ")), None
        )

    result = result or printed
    shutil.copytree(folder, copy)
    control = ended(work(copy))
    truth = result(copy, control)
    if control.code or truth is None:
        raise SystemExit(f"{tally.area}: the sound copy is refused: {control.said[-800:]}")
    shutil.rmtree(copy)
    for seal in sealed:
        for story, name, kind in some(damages(folder, rng, n_random), n, rng):
            shutil.copytree(folder, copy)
            if not seal and (copy / "manifest.json").exists():
                (copy / "manifest.json").unlink()
            if (copy / name).exists():
                kind(copy / name, rng)
                end = ended(work(copy))
                judged(tally, story, end, result(copy, end), truth, [copy.name])
            shutil.rmtree(copy)


def checkpoint(toys, rng, n):
    tally = Tally("damaged checkpoint")
    out = toys.top / "x.npy"

    def work(copy):
        for p in (out, out.with_suffix(".json")):
            p.unlink(missing_ok=True)
        return command("embed", toys.query, "--model", copy, "--out", out)

    tried_damage(
        tally,
        toys.model,
        work,
        rng,
        n,
        result=lambda copy, end: content(out) if end.code == 0 else None,
    )
    return tally


def tokens(toys, rng, n):
    tally = Tally("damaged tokens")
    tried_damage(
        tally, toys.tokens, lambda copy: reader(lambda: read_all_tokens(copy)), rng, n, n_random=1
    )
    return tally


def corpus(toys, rng, n):
    tally = Tally("damaged corpus, read")

    def read(copy):
        from scemb.corpus.curate import shards

        card = read_corpus(copy)
        return digest(card["n_cells"], card["content_hash"], *(checksum(p) for p in shards(copy)))

    tried_damage(tally, toys.corpus, lambda copy: reader(lambda: read(copy)), rng, n, n_random=1)
    return tally


def repaired(toys, rng, n):
    "A damaged corpus and the same command again: the same bytes."
    tally = Tally("damaged corpus, repaired")
    words, _ = toys.commands()["curate"]
    tried_damage(
        tally,
        toys.corpus,
        lambda copy: command(*words, "--out", copy),
        rng,
        n,
        n_random=1,
        result=lambda copy, end: content(copy),
    )
    return tally


def adapter(toys, rng, n):
    tally = Tally("damaged adapter")
    tried_damage(
        tally,
        toys.adapter,
        lambda copy: reader(lambda: read_annotator(copy, toys.model)),
        rng,
        n,
        n_random=3,
    )
    return tally


def stopped_job(toys, name, out, rng):
    """Stop a command in its middle, so that unfinished work lies beside its output; the folder, or
    None."""
    words, ending = toys.commands()[name]
    for _ in range(25):
        ended(command(*words, "--out", out), kill_after=rng.uniform(0.3, 1.0) * toys.seconds[name])
        held = out if name in ("curate", "pretrain") else out.with_name(f".{out.name}.partial")
        whole = (
            out.exists() and name not in ("curate", "pretrain") or (out / "manifest.json").exists()
        )
        if not whole and held.exists() and sum(p.is_file() for p in held.rglob("*")) > 1:
            return held
        remove_output(out)
    return None


def remove_output(out):
    for p in [
        out,
        out.with_name(f"{out.stem}_trust.csv"),
        out.with_suffix(".json"),
        *out.parent.glob(f".{out.name}.*"),
    ]:
        if p.is_dir() and not p.is_symlink():
            shutil.rmtree(p)
        elif p.exists() or p.is_symlink():
            p.unlink()


def unfinished_work(toys, rng, n):
    """Work that was stopped and then damaged: the same command comes to the right result, or says
    what is in its way."""
    tally = Tally("damaged unfinished work")
    for name in ("tokenize", "embed", "perturb", "screen", "curate", "pretrain"):
        words, ending = toys.commands()[name]
        out = toys.top / f"half{ending}"
        held = stopped_job(toys, name, out, rng)
        if held is None:
            continue
        kept = toys.top / "kept"
        shutil.copytree(held, kept, symlinks=True)
        for story, file, kind in some(damages(kept, rng, 1), n and max(1, n // 6), rng):
            remove_output(out)
            shutil.copytree(kept, held, symlinks=True)
            kind(held / file, rng)
            more = ["--resume"] if name == "pretrain" else []
            end = ended(command(*words, "--out", out, *more))
            judged(
                tally,
                f"{name}: {story}",
                end,
                toys.result(name, out),
                toys.truth[name],
                [out.name, held.name],
                damaged=False,
            )
        remove_output(out)
        shutil.rmtree(kept)
    return tally


# ---------------------------------------------------------------- stops


def kills(toys, rng, n):
    """kill -9 at random moments, once to three times, then the same command: the result of an
    undisturbed run."""
    tally = Tally("kill -9")
    for name, (words, ending) in toys.commands().items():
        for i in range(n or 10):
            out = toys.top / f"killed_{name}{ending}"
            story = f"{name} {i}"
            for _ in range(rng.choice([1, 1, 2, 3])):
                more = ["--resume"] if name == "pretrain" and (out / "run.json").exists() else []
                end = ended(
                    command(*words, "--out", out, *more),
                    kill_after=rng.uniform(0.05, 1.05) * toys.seconds[name],
                )
                there = (
                    toys.result(name, out)
                    if out.exists() and name not in ("curate", "pretrain")
                    else None
                )
                if end.code != -9 or there is not None:
                    break
            if there is not None and there != toys.truth[name]:
                tally.add(
                    "accepted", f"{story}: something half stands under the name of the output", end
                )
                remove_output(out)
                continue
            more = ["--resume"] if name == "pretrain" and (out / "run.json").exists() else []
            finished = (
                name == "pretrain"
                and (out / "manifest.json").exists()
                or name != "curate"
                and name != "pretrain"
                and there is not None
            )
            end = Ended(0, "") if finished else ended(command(*words, "--out", out, *more))
            result = toys.result(name, out)
            left = [p.name for p in out.parent.glob(f".{out.name}.*")]
            if end.code == 0 and result == toys.truth[name] and not left:
                tally.add("right", story)
            elif end.code == 0 and result == toys.truth[name] and finished:
                tally.add("right", story)  # stopped after its result stood there
            elif end.code == 70 or "Traceback" in end.said:
                tally.add("traceback", story, end)
            else:
                tally.add("lost" if end.code else "accepted", f"{story} {left}", end)
            remove_output(out)
    return tally


def kills_of_two(toys, rng, n):
    "The same with two training processes, started anew each time."
    tally = Tally("kill -9, two processes")
    out = toys.top / "two"
    scemb = Path(sys.executable).parent / "scemb"
    words = [
        scemb,
        "pretrain",
        toys.tokens,
        "--config",
        toys.config,
        "--steps",
        16,
        "--nproc",
        2,
        "--out",
        out,
    ]

    def run(*more, seconds=None):
        p = subprocess.Popen(
            [str(w) for w in (*words, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said = p.communicate(timeout=seconds or 300)[0]
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)  # the launcher; its processes must end with it
            try:
                said = p.communicate(timeout=60)[0]
            except subprocess.TimeoutExpired:
                raise SystemExit("the processes of a killed launcher go on") from None
        return Ended(p.returncode, said)

    began = time.monotonic()
    end = run()
    seconds = time.monotonic() - began
    truth = toys.result("pretrain", out)
    if end.code or truth is None:
        tally.add("lost", "undisturbed", end)
        return tally
    for i in range(n or 5):
        shutil.rmtree(out)
        run(seconds=rng.uniform(0.5, 1.0) * seconds)
        more = ["--resume"] if (out / "run.json").exists() else []
        end = Ended(0, "") if (out / "manifest.json").exists() else run(*more)
        result = toys.result("pretrain", out)
        tally.add(
            "right" if result == truth else "lost" if result is None else "accepted",
            f"try {i}",
            end,
        )
    remove_output(out)
    return tally


@contextlib.contextmanager
def full_disk(folder, size):
    "A disk of so many bytes, where one can be mounted; yields None elsewhere."
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    try:
        yield None if done.returncode else folder
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def disks(toys, rng, n):
    "A disk that fills up, and a limit on the size of files; then room, and the same command."
    tally = Tally("disk full")
    words_said = ("disk is full", "ulimit -f", "quota")
    for name, (words, ending) in toys.commands().items():
        size = sum(p.stat().st_size for p in toys.top.glob(f"{name}*") if p.is_file()) or sum(
            p.stat().st_size
            for p in dict(
                curate=toys.corpus, tokenize=toys.tokens, pretrain=toys.run, finetune=toys.adapter
            )
            .get(name, toys.model)
            .rglob("*")
            if p.is_file()
        )
        for i in range(n or 4):
            disk, kept = toys.top / "disk", toys.top / f"saved{ending}"
            out = disk / f"out{ending}"
            share = rng.uniform(0.1, 0.9)
            more = []
            with full_disk(disk, max(8192, int(share * size))) as mounted:
                limit = None if mounted and i % 2 == 0 else max(512, int(share * size / 4))
                if limit:
                    out = toys.top / f"limited{ending}"
                end = ended(command(*words, "--out", out), file_limit=limit)
                story = f"{name} {'limit' if limit else 'tmpfs'} {share:.2f}"
                if end.code == 0:  # it was enough
                    result = toys.result(name, out)
                    tally.add("right" if result == toys.truth[name] else "accepted", story, end)
                    remove_output(out)
                    continue
                if end.code == 70 or "Traceback" in end.said or end.code < 0:
                    tally.add("traceback", story, end)
                    remove_output(out)
                    continue
                if not any(w in end.said for w in words_said):
                    tally.add("unclear", story, end)
                    remove_output(out)
                    continue
                if mounted and not limit:  # room is made: the folder moves to a larger disk
                    kept.parent.mkdir(exist_ok=True)
                    room = toys.top / "room"
                    shutil.copytree(disk, room, symlinks=True)
                    out = room / out.name
            if name == "pretrain" and (out / "run.json").exists():
                more = ["--resume"]
            end = ended(command(*words, "--out", out, *more))
            result = toys.result(name, out)
            if end.code == 0 and result == toys.truth[name]:
                tally.add("right", story)
            else:
                tally.add("lost" if end.code else "accepted", f"{story}, with room", end)
            remove_output(out)
            shutil.rmtree(toys.top / "room", ignore_errors=True)
    return tally


def writers(toys, rng, n):
    """The same command twice at once, on one output: one ends well, the other is refused, the
    result is right."""
    tally = Tally("two writers")
    for name, (words, ending) in some(toys.commands().items(), n, rng):
        out = toys.top / f"both{ending}"
        logs = [tempfile.mkstemp()[1] for _ in range(2)]
        pids = []
        for log in logs:
            pid = os.fork()
            if not pid:
                _child(command(*words, "--out", out), log, None)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        said = [Path(log).read_text(errors="replace") for log in logs]
        second = Ended(max(codes), said[int(np.argmax(codes))])
        result = toys.result(name, out)
        refused = "another command" in second.said or "exists" in second.said
        if sorted(codes) == [0, 1] and result == toys.truth[name] and refused:
            tally.add("right", name)
        elif "Traceback" in "".join(said):
            tally.add("traceback", name, second)
        elif result != toys.truth[name]:
            tally.add("lost" if result is None else "accepted", f"{name} {codes}", second)
        elif codes == [0, 0]:  # the second began after the first had ended, and repaired nothing
            tally.add("right", name)
        else:
            tally.add("unclear", f"{name} {codes}", second)
        remove_output(out)
    return tally


def repeated(toys, rng, n):
    "Each command once more: the same result to the last digit."
    tally = Tally("repeated with one seed")
    for name, (words, ending) in some(toys.commands().items(), n, rng):
        out = toys.top / f"again_{name}{ending}"
        end = ended(command(*words, "--out", out))
        tally.add("right" if toys.result(name, out) == toys.truth[name] else "accepted", name, end)
        remove_output(out)
    return tally


# ---------------------------------------------------------------- strangers


class Evil:
    "A pickle that leaves a mark when it is read."

    mark = ""

    def __reduce__(self):
        return (os.system, (f"touch {Evil.mark}",))


def strangers(toys, rng, n):
    """Files made by somebody who means harm: refused in words, quickly, in little memory; nothing
    runs, nothing outside is touched."""
    tally = Tally("strangers' files")
    Evil.mark = str(toys.top / "ran")
    victim = toys.top / "victim.h5ad"
    shutil.copy(toys.query, victim)
    before = content(victim)
    out = toys.top / "theirs.npy"

    def judge(story, end, names):
        if Path(Evil.mark).exists() or content(victim) != before:
            tally.add("lost", f"{story}: code ran, or a file outside was touched", end)
            Path(Evil.mark).unlink(missing_ok=True)
            shutil.copy(toys.query, victim)
            return
        judged(tally, story, end, "a result", "another", names)

    def config(**change):
        return lambda d: (d / "config.json").write_text(
            json.dumps(json.loads((d / "config.json").read_text()) | change)
        )

    def settings(**change):
        return lambda d: (d / "token_settings.json").write_text(
            json.dumps(json.loads((d / "token_settings.json").read_text()) | change)
        )

    def weights(change):
        return lambda d: save_file(
            change(load_file(d / "model.safetensors")), d / "model.safetensors"
        )

    big = "bert.encoder.layer.0.intermediate.dense.weight"
    models = {
        "a million layers": config(num_hidden_layers=1_000_000),
        "10^9 wide": config(hidden_size=10**9),
        "10^7 positions": config(max_position_embeddings=10**7),
        "no layer": config(num_hidden_layers=0),
        "minus one head": config(num_attention_heads=-1),
        "NaN in a size": config(hidden_size=float("nan")),
        "layers as text": config(num_hidden_layers="2"),
        "nested": config(num_hidden_layers=[[2]]),
        "epsilon 1000": config(layer_norm_eps=1000),
        "an activation by name": config(hidden_act="os.system"),
        "another model's type": config(model_type="bert"),
        "n_bins 50": settings(n_bins=50),
        "another seed": settings(seed=5),
        "an unknown setting": settings(evil=1),
        "a missing weight": weights(lambda w: {k: v for k, v in w.items() if k != big}),
        "a missing layer": weights(lambda w: {k: v for k, v in w.items() if ".layer.1." not in k}),
        "one weight more": weights(lambda w: w | dict(evil=torch.ones(2))),
        "NaN weights": weights(lambda w: {k: v * float("nan") for k, v in w.items()}),
        "an infinite weight": weights(
            lambda w: {
                k: torch.where(v == v.max(), float("inf"), v) if k == big else v
                for k, v in w.items()
            }
        ),
        "weights 0": weights(lambda w: {k: v * 0 for k, v in w.items()}),
        "a header of 2^62 bytes": lambda d: (d / "model.safetensors").write_bytes(
            (2**62).to_bytes(8, "little") + b"{}"
        ),
        "a pickle for weights": lambda d: (d / "model.safetensors").write_bytes(
            pickle.dumps(Evil())
        ),
        "a pickle for JSON": lambda d: (d / "config.json").write_bytes(pickle.dumps(Evil())),
        "100,000 brackets": lambda d: (d / "card.json").write_text("[" * 100_000),
        "a link for weights": lambda d: (
            (d / "model.safetensors").unlink(),
            (d / "model.safetensors").symlink_to(victim),
        ),
    }
    for story, spoil in some(models.items(), n, rng):
        d = toys.top / "their_model"
        shutil.copytree(toys.model, d)
        (d / "manifest.json").unlink()
        spoil(d)
        judge(
            f"model: {story}",
            ended(command("embed", toys.query, "--model", d, "--out", out)),
            [d.name],
        )
        shutil.rmtree(d)
        remove_output(out)

    def record(**change):
        return lambda d: (d / "adapter.json").write_text(
            json.dumps(json.loads((d / "adapter.json").read_text()) | change)
        )

    def inner(**change):
        return lambda d: record(
            settings=json.loads((d / "adapter.json").read_text())["settings"] | change
        )(d)

    adapters = {
        "rank 10^7": inner(rank=10**7),
        "rank as text": inner(rank="8"),
        "another way": inner(way="full"),
        "10^7 classes": record(classes=[str(i) for i in range(10**5)]),
        "temperature -1": record(temperature=-1.0),
        "temperature NaN": record(temperature=float("nan")),
        "temperature 0": record(temperature=0),
        "one class twice": record(classes=["a", "a"]),
        "classes as text": record(classes="ab"),
        "unknown settings": inner(evil=1),
        "a threshold of 7": record(thresholds=[7.0, 7.0]),
        "no base hash": record(base_hash=None),
        "a base elsewhere": record(base=str(toys.top / "nothing")),
        "a pickle": lambda d: (d / "adapter.safetensors").write_bytes(pickle.dumps(Evil())),
    }
    for story, spoil in some(adapters.items(), n, rng):
        d = toys.top / "their_adapter"
        shutil.copytree(toys.adapter, d)
        (d / "manifest.json").unlink()
        spoil(d)
        base = None if story == "a base elsewhere" else str(toys.model)
        judge(
            f"adapter: {story}",
            ended(reader(lambda d=d, base=base: bool(load_annotator(d, base)))),
            [d.name, "nothing"],
        )
        shutil.rmtree(d)

    card = json.loads((toys.tokens / "tokens.json").read_text())

    def shard(**change):
        return dict(shards=[card["shards"][0] | change, *card["shards"][1:]])

    cards = {
        "a shard above": shard(file="../victim.h5ad"),
        "a shard by its full path": shard(file=str(victim)),
        "10^15 tokens": shard(n_tokens=10**15),
        "minus 5 bytes": shard(bytes=-5),
        "another seed": dict(settings=card["settings"] | dict(seed=9)),
        "shards as text": dict(shards="x"),
        "no hash": dict(tokenizer_hash=None),
    }
    for story, change in some(cards.items(), n, rng):
        d = toys.top / "their_tokens"
        shutil.copytree(toys.tokens, d)
        (d / "manifest.json").unlink()
        (d / "tokens.json").write_text(json.dumps(card | change))
        judge(f"tokens: {story}", ended(reader(lambda d=d: read_all_tokens(d))), [d.name])
        shutil.rmtree(d)

    # a corpus whose record names a file elsewhere: made again, and the file is still there
    words, _ = toys.commands()["curate"]
    for where in some(
        ["../victim.h5ad", str(victim), "./../victim.h5ad", "sub/../../victim.h5ad"], n, rng
    ):
        d = toys.top / "their_corpus"
        shutil.copytree(toys.corpus, d)
        r = json.loads((d / "shard-00000.json").read_text())
        r = {k: v for k, v in r.items() if k != "record_xxh3"} | dict(
            file=where, bytes=victim.stat().st_size, xxh3_128=checksum(victim)
        )
        (d / "shard-00000.json").write_text(json.dumps(r))
        end = ended(command(*words, "--out", d))
        fine = end.code == 0 and content(d) == toys.truth["curate"] and content(victim) == before
        tally.add("right" if fine else "lost", f"corpus record {where}", end)
        shutil.rmtree(d)

    # links in the place of temporary names and unfinished work
    for name in some(["embed", "tokenize", "perturb", "screen", "curate"], n, rng):
        words, ending = toys.commands()[name]
        out_here = toys.top / f"linked{ending}"
        for ending_of_link in (".partial", ".part", ".new", ".lock"):
            link = out_here.with_name(f".{out_here.name}{ending_of_link}")
            link.symlink_to(victim)
        end = ended(command(*words, "--out", out_here))
        if content(victim) != before:
            tally.add("lost", f"{name}: a link was followed", end)
            shutil.copy(toys.query, victim)
        else:
            result = toys.result(name, out_here)
            judged(
                tally,
                f"{name}: links",
                end,
                result,
                toys.truth[name],
                [out_here.name],
                damaged=False,
            )
        remove_output(out_here)

    # a run whose optimizer wants to run a program
    out_run = toys.top / "their_run"
    words, _ = toys.commands()["pretrain"]
    for file in some(["optimizer.pt", "scheduler.pt", "rng_state.pth"], n, rng):
        shutil.copytree(toys.run, out_run)
        for name in ("training.json", "manifest.json", "model.safetensors"):
            (out_run / name).unlink()
        last = max(
            (out_run / "steps").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )
        shutil.rmtree(last)
        for step in (out_run / "steps").glob("checkpoint-*"):
            (step / "manifest.json").unlink()
            (step / file).write_bytes(pickle.dumps(Evil()))
        end = ended(command(*words, "--out", out_run, "--resume"))
        if Path(Evil.mark).exists():
            tally.add("lost", f"{file}: code ran", end)
            Path(Evil.mark).unlink()
        else:
            judged(
                tally,
                f"{file} of a run",
                end,
                toys.result("pretrain", out_run),
                toys.truth["pretrain"],
                ["checkpoint-"],
                damaged=False,
            )
        shutil.rmtree(out_run)
    return tally


def inputs(toys, rng, n):
    "Files of cells cut short, of another kind, with names that a terminal takes for marks."
    tally = Tally("input files")
    whole = toys.query.read_bytes()
    path = toys.top / "bad[" / "x].h5ad"  # a path with [/x] in it
    path.parent.mkdir()
    out = toys.top / "out.h5ad"
    contents = [("cut", whole[: rng.randrange(len(whole))]) for _ in range(6)] + [
        ("empty", b""),
        ("text", b"gene,cell\n"),
        ("a pickle", pickle.dumps(Evil())),
        ("the head of HDF5", b"\x89HDF\r\n\x1a\n"),
        ("zip", b"PK\x03\x04" + bytes(200)),
        ("gzip", b"\x1f\x8b" + bytes(50)),
    ]
    Evil.mark = str(toys.top / "ran")
    for story, data in some(contents, n, rng):
        for words in (
            ("embed", path, "--model", toys.model, "--out", out),
            ("doctor", path),
            ("tokenize", path, "--out", toys.top / "t"),
        ):
            path.write_bytes(data)
            end = ended(command(*words))
            if Path(Evil.mark).exists():
                tally.add("lost", f"{story}: code ran", end)
                continue
            judged(tally, f"{words[0]} {story}", end, "a result", "another", [path.name, "[/x]"])
    path.write_bytes(whole)
    end = ended(command("doctor", path))
    tally.add(
        "right"
        if end.code == 0 and "[/x]" in end.said
        else "traceback"
        if "Traceback" in end.said
        else "unclear",
        "doctor: a name with [/x]",
        end,
    )
    shutil.rmtree(path.parent)
    for p in (out, toys.top / "t"):
        remove_output(p)
    return tally


# ---------------------------------------------------------------- what the checks cost


def costs(folder, pairs):
    """Reading with and without checksums, in turns, each in a process of its own; files in the page
    cache. -> rows"""
    from scemb.corpus.curate import shards
    from scemb.model.batching import unpadded_batches
    from scemb.model.batching import masked_batch
    from scemb.corpus.sources import open_counts
    from scemb.tokens.ranking import Encoder
    from scemb.tokens.tokenize import encoded_chunks, write_tokens

    baron = datasets.load("baron_pancreas")
    cells = ad.concat([baron] * 5, index_unique="-")
    cells.var = baron.var
    write_tokens(cells, folder / "tokens", settings=TokenizerSettings(max_len=2048))
    baron.write_h5ad(folder / "cells.h5ad")
    given = [
        "--assume",
        "disease=normal",
        "--assume",
        "suspension_type=cell",
        "--assume",
        "assay=inDrop",
        "--assume",
        "tissue=pancreas",
    ]
    end = ended(command("curate", folder / "cells.h5ad", "--out", folder / "corpus", *given))
    if end.code:
        raise SystemExit(end.said[-800:])

    def gathered(checked):
        t = read_tokens(folder / "tokens")
        if not checked:
            t._unread.clear()
        order = np.random.default_rng(0).permutation(len(t))
        for first in range(0, len(order), 512):
            t.gather(order[first : first + 512])

    def batched(checked):
        t = read_tokens(folder / "tokens")
        if not checked:
            t._unread.clear()
        for batch in unpadded_batches(t.lengths, 16_384):
            masked_batch(t, batch, max_len=2048)

    def tokenized(checked):
        paths = shards(folder / "corpus") if checked else sorted((folder / "corpus").glob("*.h5ad"))
        for path in paths:
            counts = open_counts(path)
            vocabulary = protein_vocabulary()
            encoder = Encoder(
                vocabulary.token_of_rows(counts.genes.rows), vocabulary, TokenizerSettings()
            )
            for _ in encoded_chunks(counts, encoder):
                pass

    def seconds(work, checked):
        begin = tempfile.mktemp(dir=folder)

        def timed():
            began = time.perf_counter()
            work(checked)
            Path(begin).write_text(str(time.perf_counter() - began))

        end = ended(timed)
        if end.code:
            raise SystemExit(end.said[-1500:])
        return float(Path(begin).read_text())

    rows = []
    for story, work in (
        ("tokens gathered in random order, once", gathered),
        ("batches for training, one epoch", batched),
        ("a corpus read and tokenised", tokenized),
    ):
        seconds(work, True)  # compiled, and in the page cache
        pair = [
            (seconds(work, False), seconds(work, True))
            if i % 2
            else tuple(reversed((seconds(work, True), seconds(work, False))))
            for i in range(pairs)
        ]
        share = [b / a - 1 for a, b in pair]
        rows.append(
            dict(
                reading=story,
                pairs=pairs,
                seconds=round(float(np.median([a for a, _ in pair])), 3),
                median_cost=round(float(np.median(share)), 4),
                lowest=round(min(share), 4),
                highest=round(max(share), 4),
            )
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


AREAS = dict(
    checkpoint=checkpoint,
    tokens=tokens,
    corpus=corpus,
    repaired=repaired,
    adapter=adapter,
    unfinished=unfinished_work,
    kills=kills,
    two=kills_of_two,
    disks=disks,
    writers=writers,
    repeated=repeated,
    strangers=strangers,
    inputs=inputs,
)
SMALL = dict(
    checkpoint=6, tokens=6, corpus=5, repaired=2, adapter=6, strangers=3, writers=2, inputs=1
)
WHOLE = dict(
    checkpoint=None,
    tokens=60,
    corpus=40,
    repaired=20,
    adapter=None,
    unfinished=48,
    kills=10,
    two=10,
    disks=4,
    writers=None,
    repeated=None,
    strangers=None,
    inputs=None,
)


def write_rows(path, rows):
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="CSV to write: a row an area.")
    parser.add_argument(
        "--small", action="store_true", help="A few tries of the areas that need no kills."
    )
    parser.add_argument("--only", nargs="*", choices=list(AREAS), help="These areas.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Keep the rows that --out has already, and do the other areas.",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cost",
        type=Path,
        help="CSV to write, in place of all tries: what the checksums cost a reader.",
    )
    parser.add_argument(
        "--pairs", type=int, default=9, help="Readings with and without, for --cost."
    )
    parser.add_argument("--list", action="store_true", help="Print every try that is not right.")
    given = parser.parse_args()
    if given.cost:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            write_rows(given.cost, costs(Path(folder), given.pairs))
        return 0
    areas = {
        k: n
        for k, n in (SMALL if given.small else WHOLE).items()
        if not given.only or k in given.only
    }
    for area in given.only or ():
        areas.setdefault(area, WHOLE[area])
    torch.set_num_threads(1)
    rows = []
    if given.resume and given.out.exists():
        with open(given.out, newline="") as f:
            rows = [
                {k: v if k == "area" else int(v) for k, v in r.items()} for r in csv.DictReader(f)
            ]
        areas = dict(list(areas.items())[len(rows) :])
    with tempfile.TemporaryDirectory() as folder:
        toys = Toys(Path(folder), given.small)
        load_before_the_forks(toys.cells)
        toys.make()
        for name, n in areas.items():
            began = time.monotonic()
            tally = AREAS[name](toys, random.Random(f"{given.seed} {name}"), n)
            rows.append(dict(area=tally.area, tries=sum(tally.counts.values()), **tally.counts))
            if given.out:
                write_rows(given.out, rows)
            print(f"{rows[-1]}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            for line in tally.odd if given.list else ():
                print(f"    {line}", file=sys.stderr, flush=True)
    bad = sum(r[k] for r in rows for k in OUTCOMES[2:])
    print(
        f"{sum(r['tries'] for r in rows)} tries, {bad} of them lost, accepted, with a traceback "
        "or unclear",
        file=sys.stderr,
    )
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
