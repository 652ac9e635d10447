"""Measure this repository ("ours") against effdet 0.4.1 ("peer") on the same work, in turns, in one run.

Lives here: the driver that every script beside this file calls, and the arithmetic of its figures. It starts one worker
process for each side (worker.py), as the two packages have the same name. Both build the same work from the same seeds;
their outputs are compared first, and where they disagree nothing is timed. Then the sides take turns.

A script has `build(side, case) -> Work`, run in the worker, and calls `main` with its cases. Only the standard library
and numpy here: the peer's environment imports this file too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
MIN_SAMPLE_S = 0.2  # a sample of short work repeats it until it has taken this long


class Disagreement(RuntimeError):
    """The two sides do not compute the same, so their times say nothing."""


@dataclass
class Work:
    """What a script's `build` returns: something to do, and proof that it is the right thing.

    Args:
        run: does the work once; timed until `synchronize` returns.
        outputs: returns arrays by name for the comparison; may do the work.
        synchronize: waits for the device.
        measure: returns the figure itself, instead of the seconds of `run` (memory, counts).
        about: facts for the figure, such as the settings that the side chose.
        device: where all of the work is done; then the bytes that its kernels move are counted, see traffic.py.
        steps: how many times `run` does the work; the figure is that of one.
        count: does the work once, in a way in which its kernels can be counted; default is `run`.
    """

    run: Callable[[], Any]
    outputs: Callable[[], Mapping[str, Any]]
    synchronize: Callable[[], Any] = lambda: None
    measure: Callable[[], float] | None = None
    about: dict[str, Any] | None = None
    device: Any = None
    steps: int = 1
    count: Callable[[], Any] | None = None


class Side:
    """One worker process, spoken to in JSON lines."""

    def __init__(self, name: str, python: str, script: str, case: Mapping[str, Any]) -> None:
        self.name = name
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {"OMP_NUM_THREADS": str(case["threads"]), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        environment |= case.get("environment", {})
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("worker.py")), name, script, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )
        self.facts: dict[str, Any] = {}

    def wait_until_built(self) -> None:
        """Read the line that a worker writes when its work is built: versions and settings."""
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The worker of '{self.name}' ended with status {self.process.wait()}; its own message is above."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"The worker of '{self.name}' failed:\n{answer['error']}")
        return answer

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def outputs(self, folder: Path) -> dict[str, np.ndarray]:
        """Return the arrays that this side computes."""
        path = folder / f"{self.name}.npz"
        self._ask(do="outputs", path=str(path))
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}

    def calibrate(self) -> None:
        """Do the work once to warm up, and choose how often a sample repeats it."""
        self._ask(do="calibrate", seconds=MIN_SAMPLE_S)

    def sample(self) -> float:
        """Return one measurement: the seconds of one run, or what the work itself measures."""
        return self._ask(do="sample")["value"]

    def traffic(self) -> dict[str, float]:
        """Return 'bytes_moved' by one run and the device's 'copy_bytes_per_s'; nothing where they are not counted."""
        return self._ask(do="traffic")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def compare(
    ours: Mapping[str, np.ndarray], peer: Mapping[str, np.ndarray], tolerances: float | Mapping[str, float]
) -> dict[str, float]:
    """Compare two sets of arrays.

    Args:
        ours: arrays by name.
        peer: arrays by name.
        tolerances: the largest difference allowed, as a fraction of the peer's largest absolute value in that array; 0
            for equality. One number, or by name with "" for the rest. A pair (difference, share) is for detections
            [B, N, 6], where two of almost the same score may change places: that share of the rows must have a row of
            the same image and class (the last column) in the peer's that differs by no more.

    Returns:
        The difference found, by name, in the same measure.

    Raises:
        Disagreement: names, shapes or values differ, or a value is not finite.
    """
    if set(ours) != set(peer):
        raise Disagreement(f"ours gives {sorted(ours)}, the peer {sorted(peer)}")
    found = {}
    for name, expected in peer.items():
        actual = ours[name]
        if actual.shape != expected.shape:
            raise Disagreement(f"'{name}' has shape {actual.shape} in ours and {expected.shape} in the peer")
        if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
            raise Disagreement(f"'{name}' has values that are not finite")
        if actual.size == 0:
            found[name] = 0.0
            continue
        allowed = tolerances[name if name in tolerances else ""] if isinstance(tolerances, Mapping) else tolerances
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
        by_row = isinstance(allowed, Sequence)
        allowed, share = allowed if by_row else (allowed, 1.0)
        differences = nearest_rows(actual, expected) if by_row else np.abs(actual - expected)
        largest = float(np.abs(expected).max())
        difference = float(np.quantile(differences, share, method="higher"))
        found[name] = difference / largest if largest else difference
        if found[name] > allowed:
            raise Disagreement(f"'{name}' differs by {found[name]:.3g} of its largest value; allowed is {allowed:g}")
    return found


def nearest_rows(ours: np.ndarray, peer: np.ndarray) -> np.ndarray:
    """Return [B, N]: the largest difference of each row [x1, y1, x2, y2, score, class] to the peer's row nearest to it.

    A row whose class the peer has nowhere in that image differs by inf.
    """
    differences = np.abs(ours[:, :, None] - peer[:, None])
    differences[..., -1] = np.where(differences[..., -1] > 0, np.inf, 0)
    return differences.max(-1).min(-1)


def summarize(samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Turn the measurements of the sides, taken in turns, into medians and ratios.

    Returns:
        'ours', 'peer': medians; 'ratio': the peer's median over ours, above 1 where ours needs less; 'pairs': smallest
        and largest ratio of a pair taken one after the other, 'ratio_of_pairs' their median. Without a peer only
        'ours'.
    """
    result: dict[str, Any] = {side: statistics.median(values) for side, values in samples.items()}
    if "peer" in samples:
        pairs = [peer / ours for ours, peer in zip(samples["ours"], samples["peer"], strict=True)]
        result |= {
            "ratio": result["peer"] / result["ours"],
            "ratio_of_pairs": statistics.median(pairs),
            "pairs": [min(pairs), max(pairs)],
        }
    return result


def take_turns(sides: Sequence[Any], repeats: int) -> dict[str, list[float]]:
    """Sample each side `repeats` times; who goes first changes with every turn."""
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(repeats):
        for side in sides if turn % 2 == 0 else reversed(sides):
            samples[side.name].append(side.sample())
    return samples


def agree(sides: Sequence[Any], tolerances: float | Mapping[str, float]) -> dict[str, float]:
    """Compare the outputs of the sides; see `compare`. One side alone agrees with itself."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {side.name: side.outputs(Path(folder)) for side in sides}
    return compare(outputs["ours"], outputs["peer"], tolerances) if "peer" in outputs else {}


def measure(start: Callable[[], list[Any]], case: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Compare, then measure one case.

    Args:
        start: makes the sides, ready to work.
        case: 'tolerance' for `compare`; 'fresh': True where every sample needs new processes.
        repeats: samples for each side.

    Returns:
        `summarize`'s figures with 'samples', 'difference', and by side 'facts' and `add_floors`' 'traffic'.

    Raises:
        Disagreement: the sides do not compute the same.
    """
    sides = start()
    try:
        difference = agree(sides, case["tolerance"])
        facts, traffic = {side.name: side.facts for side in sides}, {}
        if not case.get("fresh"):
            for side in sides:
                side.calibrate()
            samples = take_turns(sides, repeats)
            traffic = {side.name: side.traffic() for side in sides}
    finally:
        for side in sides:
            side.close()
    if case.get("fresh"):
        samples = {name: [] for name in facts}
        for _ in range(repeats):
            for name, values in _once(start).items():
                samples[name] += values
    result = summarize(samples)
    return {
        **result,
        "samples": samples,
        "difference": difference,
        "facts": facts,
        "traffic": add_floors({name: counted for name, counted in traffic.items() if counted}, result),
    }


def add_floors(traffic: Mapping[str, Mapping[str, float]], result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Add to what each side counted its 'floor_s', the time of a copy of as many bytes, and that as a share."""
    floors = {name: counted["bytes_moved"] / counted["copy_bytes_per_s"] for name, counted in traffic.items()}
    return {
        name: {**counted, "floor_s": floors[name], "floor_share": floors[name] / result[name]}
        for name, counted in traffic.items()
    }


def _once(start: Callable[[], list[Any]]) -> dict[str, list[float]]:
    sides = start()
    try:
        return take_turns(sides, 1)
    finally:
        for side in sides:
            side.close()


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code: processor, its flags, cores, load before the run."""
    facts: dict[str, Any] = {"cores": os.cpu_count(), "system": platform.platform(), "cpu": platform.processor()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(
            reversed(part)
            for part in (  # the first processor's
                (line.split(":", 1)[1].strip(), line.split(":", 1)[0].strip())
                for line in reversed(lines)
                if ":" in line
            )
        )
        facts["cpu"] = fields.get("model name", facts["cpu"])
        facts["flags"] = [flag for flag in CPU_FLAGS if flag in fields.get("flags", "").split()]
        facts["load"] = round(os.getloadavg()[0], 2)
    except OSError:
        pass
    return facts


def format_figure(case: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return a line for people: what, both medians, and who needs how much less; a second for counted bytes."""

    def show(value: float) -> str:
        if case.get("unit", "s") == "bytes":
            return f"{value / 2**20:8.1f} MiB"
        if case.get("unit") == "image":
            return f"{value * 1e3 / case['images']:8.2f} ms an image"
        text = f"{value:8.3f} s" if value >= 1 else f"{value * 1e3:8.3f} ms"
        return f"{text} {case['images'] / value:8.1f}/s" if case.get("images") else text

    name = f"{case['figure']:<24} {case['device']} {case['dtype']:<8} {case['threads']}t batch {case['batch']:<4}"
    moved = "".join(
        f"   {side} {counted['bytes_moved'] / 1e9:.3g} GB in {counted['floor_share']:.0%} of the time"
        for side, counted in result.get("traffic", {}).items()
    )
    moved = moved and "\n    bytes moved by kernels, at the speed of a copy:" + moved
    if "peer" not in result:
        return f"{name} ours {show(result['ours'])}   (no peer){moved}"
    ratio = result["ratio"]
    verdict = f"ours needs {ratio:.2f}x less" if ratio >= 1 else f"PEER needs {1 / ratio:.2f}x less"
    low, high = result["pairs"]
    times = f"ours {show(result['ours'])}   peer {show(result['peer'])}"
    return f"{name} {times}   {verdict} (pairs {low:.2f}..{high:.2f}){moved}"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return the flags that all scripts share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each side (default 7)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[4], help="images in a batch; several make several figures"
    )
    parser.add_argument("--image-size", type=int, default=512, help="height and width in pixels (default 512)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=("float32", "bfloat16", "float16"),
        help="arithmetic; half precision by autocast (default %(default)s)",
    )
    parser.add_argument("--model", default="tf_efficientdet_d0")
    parser.add_argument("--classes", type=int, default=90)
    parser.add_argument("--quick", action="store_true", help="3 samples, for a look")
    parser.add_argument(
        "--flags", default="", metavar="TEXT", help="more flags of train.py for ours, such as --flags=--compile"
    )
    parser.add_argument("--ours-only", action="store_true", help="do not run the peer")
    parser.add_argument(
        "--peer-python",
        default=str(REPO / ".venv-peer" / "bin" / "python"),
        metavar="PATH",
        help="Python with effdet 0.4.1 (default: the one of `make bench`)",
    )
    parser.add_argument("--json", metavar="FILE", help="append the JSON lines to this file too")
    return parser


def fast_dtypes() -> list[str]:
    """Return float32, and bfloat16 where this machine computes in it; elsewhere a CPU is tens of times slower in it."""
    flags = machine().get("flags", [])
    return ["float32", "bfloat16"] if "avx512_bf16" in flags or "amx_bf16" in flags else ["float32"]


def base_case(options: argparse.Namespace, figure: str, **more: Any) -> dict[str, Any]:
    """Return a case with the shared settings; the first batch size and dtype unless `more` says otherwise."""
    shared = {key: getattr(options, key) for key in ("device", "threads", "image_size", "model", "classes", "flags")}
    return {"figure": figure, **shared, "batch": options.batch[0], "dtype": options.dtype[0], "tolerance": 1e-4, **more}


def make_file(folder: str, function: str, *arguments: Any) -> str:
    """Have a function of inputs.py make a file or folder, once; in a process, as this one does not import effdet.

    Returns:
        Its path, which the function gets as its first argument.
    """
    target = os.path.join(folder, "-".join((function, *map(str, arguments))))
    if not os.path.exists(target):
        paths = os.pathsep.join((str(REPO), str(Path(__file__).parent)))
        code = f"import effdet, inputs; inputs.{function}({', '.join(map(repr, (target, *arguments)))})"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
    return target


def write_figure(figure: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the JSON line of a figure, with the machine, and append it to the file of --json."""
    line = json.dumps({**figure, "machine": machine()})
    print(line, flush=True)
    if options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def main(script: str, options: argparse.Namespace, cases: Sequence[dict[str, Any]]) -> int:
    """Measure the cases of a script and print a line and a JSON line for each; return the exit status."""
    peer = not options.ours_only and Path(options.peer_python).exists()
    if not peer and not options.ours_only:
        print(f"No peer at {options.peer_python}: figures are of this repository alone. `make bench` installs it.")
    repeats = 3 if options.quick else options.repeats
    failed = False
    for case in cases:

        def start(case: dict[str, Any] = case) -> list[Side]:
            sides = [Side("ours", sys.executable, script, case)]
            if peer:
                sides.append(Side("peer", options.peer_python, script, case))
            for side in sides:
                side.wait_until_built()
            return sides

        try:
            result = measure(start, case, math.ceil(repeats * case.get("repeats_factor", 1)))
        except Disagreement as error:
            failed = True
            print(f"{case['figure']:<24} REFUSED, the sides do not agree: {error}", flush=True)
            continue
        print(format_figure(case, result))
        write_figure({**case, **result}, options)
    return int(failed)
