"""What the GPU scripts share: parts that fail alone, a clock, and cells drawn at random.

A lease of a GPU can end at any time. So every part runs in its own try, and the JSON is written
after each one: what was measured is kept, and a failure stands in its place. A part that does not
end is broken off; where even that does not help, the script is started again for the parts after
it.
"""

import gc
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# `--hide anndata,scanpy` acts as if packages were not installed: a rehearsal of a bare machine.
# It must happen before anything else is imported.
HIDDEN = []
if "--hide" in sys.argv:
    HIDDEN = sys.argv[sys.argv.index("--hide") + 1].split(",")
for hidden_package in HIDDEN:
    sys.modules[hidden_package] = None

# `--began` is for a script that was started again: its time goes on, and so do its parts.
GOES_ON = "--began" in sys.argv
BEGAN = float(sys.argv[-1]) if GOES_ON else time.monotonic()
PACKAGES = ("torch", "transformers", "numpy", "accelerate", "peft", "numba", "triton")


def minutes_gone():
    "Minutes since this script began."
    return (time.monotonic() - BEGAN) / 60


def wait():
    "Until the GPU has done all that was asked of it; on a CPU at once."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(
    run,  # Called without arguments
    repeats: int,  # Timed calls
    warm: int = 1,  # Calls before them, untimed
) -> list:  # Seconds of each timed call
    "Time a piece of work by a clock that waits for the GPU before and after."
    for _ in range(warm):
        run()
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    return seconds


def spread(values, digits=4) -> dict:  # Numbers -> median, low, high and how many
    "A median with its spread."
    found = sorted(float(v) for v in values)
    return dict(
        median=round(float(np.median(found)), digits),
        low=round(found[0], digits),
        high=round(found[-1], digits),
        n=len(found),
    )


def rate(
    seconds,  # Of each repeat
    amount: float,  # Things that a repeat worked through
) -> dict:  # Things a second: median, low, high, n
    "Seconds a repeat into things a second."
    return spread([amount / s for s in seconds], 2)


def peak_gb():
    "Most memory that torch has held on the GPU since the last reset, in GB; None without a GPU."
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def forget_memory():
    "Give cached GPU memory back and begin a new peak; what was compiled is let go as well."
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def device_name(cuda: bool) -> str:
    "Name of the GPU, or cpu."
    return torch.cuda.get_device_name() if cuda else "cpu"


def file_name(kind: str, toy: bool, cuda: bool) -> str:  # "gpu_bench_NVIDIA_H100.json"
    "Where a script writes."
    name = "toy" if toy else device_name(cuda)
    for sign in " /":
        name = name.replace(sign, "_")
    return f"gpu_{kind}_{name}.json"


def versions() -> dict:
    "Versions of what decides a result."
    found = dict(python=platform.python_version(), cuda=torch.version.cuda, hidden=HIDDEN)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def plain(value):
    "What JSON has no word for: NumPy's numbers and truths as Python's, all else as text."
    return value.item() if isinstance(value, np.generic) else str(value)


class TooLong(BaseException):
    "A part did not end. No `except Exception` inside of it may take this for its own."


class Report:
    "Parts of a script, each in its own try, written down after each."

    GRACE = 20.0  # Seconds that a part has to react before the script is started again

    def __init__(
        self,
        path: Path,  # JSON to write
        about: dict,  # What the JSON says before its parts
        minutes: float,  # No part begins after so many
        # Seconds that a part may take at least; three times its estimate if that is more
        limit: float = 60.0,
        goes_on: bool = GOES_ON,  # Take over the parts that are in the JSON
    ):
        self.path, self.minutes, self.limit = path, minutes, limit
        self.result = about | dict(parts={})
        if goes_on and path.exists():
            self.result["parts"] = json.loads(path.read_text())["parts"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # what is there now stays: it need not be looked through whenever memory is given back
        gc.collect()
        gc.freeze()

    def part(
        self,
        name: str,
        work,  # Called without arguments -> dict
        estimate: float = 0.0,  # Seconds that it will take; what does not fit is left out
    ) -> dict:  # The dict, or the error
        "Do one part; an error is its result and not the end."
        if name in self.result["parts"]:
            return self.result["parts"][name]
        forget_memory()
        began = time.monotonic()
        if minutes_gone() + estimate / 60 > self.minutes:
            found = dict(left_out="no time")
        else:
            try:
                with self.limited(name, max(self.limit, 3 * estimate)):
                    found = work()
            except (Exception, TooLong) as e:
                found = dict(
                    error=f"{type(e).__name__}: {e}"[:1500], where=traceback.format_exc()[-1500:]
                )
        found["part_seconds"] = round(time.monotonic() - began, 1)
        found["part_peak_gb"] = peak_gb()
        if estimate:
            found["part_estimate"] = estimate
        self.write(name, found)
        return found

    def write(self, name, found):
        "Keep the result of a part."
        self.result["parts"][name] = found
        self.result["minutes"] = round(minutes_gone(), 2)
        text = json.dumps(self.result, indent=1, default=plain)
        self.path.write_text(text + "\n")
        print(self.line(name, found), flush=True)

    @contextmanager
    def limited(self, name, seconds):
        "An alarm breaks the part off; if it hangs where no alarm is heard, a thread acts."

        def rings(*_):
            raise TooLong(f"not done after {seconds:g} s")

        before = signal.signal(signal.SIGALRM, rings)
        guard = threading.Timer(seconds + self.GRACE, self.start_again, (name, seconds))
        guard.daemon = True
        guard.start()
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            guard.cancel()

    def start_again(self, name, seconds):
        "Leave a part that hangs: this process becomes a new one, which does the parts after it."
        took = round(seconds + self.GRACE, 1)
        self.write(
            name,
            dict(
                error=f"TooLong: hung for {took:g} s; the script was started again",
                part_seconds=took,
                part_peak_gb=None,
            ),
        )
        command = [a for a in sys.orig_argv if not GOES_ON or a not in ("--began", str(BEGAN))]
        os.execv(sys.executable, [*command, "--began", str(BEGAN)])

    def line(self, name, found):  # The line that is printed for a part
        took = f"{found['part_seconds']} s"
        if found["part_peak_gb"] is not None:
            took += f", {found['part_peak_gb']} GB"
        if "error" in found:
            return f"FAIL {name}: {found['error'][:200]} ({took})"
        if "left_out" in found:
            return f"--   {name}: left out, {found['left_out']}"
        mark = "ok  " if found.get("ok", True) else "FAIL"
        return f"{mark} {name}: {found.get('number', '')} ({took})"

    def failed(self) -> list:  # Names of the parts that failed
        "Parts that broke off, or whose check did not hold."
        parts = self.result["parts"].items()
        return [name for name, found in parts if "error" in found or not found.get("ok", True)]


# --- cells drawn at random ---------------------------------------------------------------------


def random_cells(
    lengths,  # Genes of each cell, shape (cells,); 0 is an empty cell
    n_tokens: int,  # Tokens of the vocabulary, the four special ones included
    n_types: int = 2,  # Types of cells; each prefers genes of its own
    seed: int = 0,
) -> dict:  # genes, bins, offsets and detected as an `Encoder` gives them; values, types
    "Cells in rank order: common genes come first, each type has markers, low counts are tied."
    from scemb.tokens.ranking import SPECIAL, rank_bins

    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int64)
    n_genes = n_tokens - len(SPECIAL)
    if lengths.max(initial=0) > n_genes:
        raise ValueError(f"A cell of {lengths.max()} genes does not fit a vocabulary of {n_genes}.")
    common = rng.normal(0.0, 2.0, n_genes)  # log abundance of each gene
    markers = rng.random((n_types, n_genes)) < 0.05
    preference = (common + 3.0 * markers).astype(np.float32)  # (types, genes)
    types = rng.integers(n_types, size=len(lengths))
    genes, bins, values = [], [], []
    for length, kind in zip(lengths, types, strict=True):
        noise = -np.log(rng.standard_exponential(n_genes, np.float32) + 1e-20)
        score = preference[kind] + noise  # draws without replacement
        top = np.argpartition(-score, min(length, n_genes - 1))[:length]
        top = top[np.argsort(-score[top])]
        counts = np.maximum(1, length // (10 * np.arange(1, length + 1)))
        genes.append(top + len(SPECIAL))
        bins.append(rank_bins(counts))
        values.append(counts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return dict(
        genes=np.concatenate(genes).astype(np.uint16),
        offsets=offsets,
        bins=np.concatenate(bins).astype(np.uint8),
        detected=lengths,
        values=np.concatenate(values).astype(np.float64),
        types=types,
    )


def vocabulary_of(
    n_genes: int | None = None,  # The first protein-coding genes; None: all
):  # Vocabulary
    "A vocabulary of real genes."
    from scemb.tokens.ranking import Vocabulary, protein_vocabulary

    whole = protein_vocabulary()
    return whole if n_genes is None else Vocabulary(whole.genes[:n_genes])


def token_set(
    cells: dict,  # From `random_cells`
    vocabulary,  # Of the token set
    max_len: int,  # Genes a cell that the settings allow
):  # TokenSet, with the type of each cell in obs
    "Random cells as a token set in memory."
    import pandas as pd
    from scemb.tokens.ranking import TokenizerSettings
    from scemb.tokens.tokenize import TokenSet

    part = (cells["offsets"], cells["genes"], cells["bins"])
    obs = pd.DataFrame(dict(type=cells["types"].astype(str)))
    return TokenSet([part], obs, vocabulary, TokenizerSettings(max_len=max_len))


def cells_of(
    tokens,  # TokenSet
    which,  # Numbers of the cells
    max_len: int,  # Genes a cell at most
) -> dict:  # As from `random_cells`; the values are the bins, which keep the order
    "Cells of a token set as an `Encoder` gives them."
    from scemb.model.batching import truncated

    genes, bins, offsets = truncated(*tokens.gather(which), max_len)
    return dict(
        genes=genes,
        bins=bins,
        offsets=offsets,
        detected=np.diff(offsets),
        values=bins.astype(np.float64),
        types=np.zeros(len(which), int),
    )
