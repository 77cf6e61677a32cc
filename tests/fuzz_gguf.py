"""Damages small model files at random and opens them, until time is up: `python tests/fuzz_gguf.py --seconds 600`.

Anything but success or an `EngineError` is a finding: the file is kept, and the exit code is 1. Memory is limited, and
a file that takes long is a finding too. If C code crashes, Python says where, and the file is the last one in the
folder for temporary files. Not part of the test suite; `test_gguf_mutations.py` is its short, fixed form.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_mutations import Parts, damage_bytes, damage_parts, exercise, peer_models, small_models

SECONDS_A_FILE = 10
MEMORY_BYTES = 4 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the random damages (default: the time)")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_findings"), help="folder for files that crash")
    parser.add_argument("files", nargs="*", type=Path, help="more files to damage, for example golden ones")
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _too_slow)
    n_files, findings = fuzz(seed, arguments.seconds, arguments.keep, [p.read_bytes() for p in arguments.files])
    print(f"seed {seed}: {n_files} files, {findings} findings")
    return 1 if findings else 0


def fuzz(seed: int, seconds: float, keep: Path, more: list[bytes]) -> tuple[int, int]:
    rng, models = random.Random(seed), [*small_models(), *peer_models()]
    outcomes: Counter[str] = Counter()
    known: set[str] = set()
    start = last_report = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while time.monotonic() - start < seconds:
            path = write_case(rng, Path(folder), models, more)
            try:
                signal.alarm(SECONDS_A_FILE)
                outcomes[exercise(path)] += 1
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
                outcomes[place] += 1
                if place not in known:
                    known.add(place)
                    keep.mkdir(parents=True, exist_ok=True)
                    kept = keep / f"{seed}-{outcomes.total()}.gguf"
                    kept.write_bytes(path.read_bytes())
                    print(f"FOUND {place}: {error!r}; kept as {kept}", flush=True)
            finally:
                signal.alarm(0)
            if time.monotonic() - last_report > 60:
                last_report = time.monotonic()
                print(f"{last_report - start:.0f} s: {outcomes.total()} files, {dict(outcomes)}", flush=True)
    return outcomes.total(), len(known)


def write_case(rng: random.Random, folder: Path, models: list[Parts], more: list[bytes]) -> Path:
    """Write one damaged file, now and then as the second part of two whose first is whole."""
    path = folder / "case.gguf"
    if more and rng.random() < 0.1:
        data = rng.choice(more)
        path.write_bytes(damage_bytes(rng, data, len(data) // 4))
        return path
    parts = rng.choice(models)
    if rng.random() < 0.1:
        half = len(parts.tensors) // 2
        shards = []
        for i, tensors in enumerate((parts.tensors[:half], parts.tensors[half:])):
            split = {"split.count": 2, "split.no": i, "split.tensors.count": len(parts.tensors)}
            shards.append(Parts({**parts.values, **split}, tensors))
        shards[1] = damage_parts(rng, shards[1])
        for i, shard in enumerate(shards):
            path = folder / f"case-{i + 1:05}-of-00002.gguf"
            path.write_bytes(shard.encode() if i == 0 else damage_bytes(rng, shard.encode(), 4000))
        return path
    if rng.random() < 0.5:
        parts = damage_parts(rng, parts)
    data = parts.encode(rng if rng.random() < 0.5 else None)
    path.write_bytes(damage_bytes(rng, data, 8000) if rng.random() < 0.7 else data)
    return path


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS_A_FILE} seconds")


if __name__ == "__main__":
    sys.exit(main())
