"""Print the results of a run and write them to CASE.log, from the files that train.py or validate.py left.

Used by common.sh. Standard library only, so that it needs no device and starts at once.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path

NETWORKS = {"tf_efficientdet_d0": "EfficientDetD0"}  # the name that the original port's results have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True, help="end of the case's name: perf or mAP")
    parser.add_argument("--metrics", required=True, type=Path, help="json with the evaluation and the facts of the run")
    parser.add_argument("--losses", type=Path, help="metrics.jsonl of the run")
    parser.add_argument("--since", required=True, type=int, help="when the run started: older results are another's")
    parser.add_argument("--seconds", required=True, type=int, help="duration from the script's start to now")
    parser.add_argument("--log-dir", required=True, type=Path, help="folder that receives the files")
    args = parser.parse_args()
    if not args.metrics.is_file() or args.metrics.stat().st_mtime < args.since:
        sys.exit(
            f"no results of this run in {args.metrics}: was its folder moved in another way than by --output and "
            "--experiment?"
        )
    content = json.loads(args.metrics.read_text(encoding="utf-8"))
    facts = content["run"]
    losses = read_losses(args.losses, facts["first_epoch"]) if args.losses else []

    fps, batch = facts["img_per_s"], facts["batch_size"]
    network = NETWORKS.get(facts["model"], facts["model"])
    case = f"{network}_bs{batch}_{facts['processes']}p_{args.kind}"
    accuracy = in_words(facts.get("best_AP", content["stats"]["AP"]), 5)
    if losses:
        (args.log_dir / f"train_{case}_loss.txt").write_text("".join(f"{loss:.5f}\n" for loss in losses))
    (args.log_dir / f"{case}.log").write_text(
        "".join(
            f"{name} = {value}\n"
            for name, value in (
                ("Network", network),
                ("RankSize", facts["processes"]),
                ("BatchSize", batch),
                ("DeviceType", platform.machine()),
                ("CaseName", case),
                ("ActualFPS", in_words(fps, 2)),
                ("TrainingTime", in_words(batch * 1000 / fps if fps else None, 2)),
                ("TrainAccuracy", accuracy),
                ("ActualLoss", in_words(losses[-1] if losses else None, 5)),
                ("E2ETrainingTime", args.seconds),
            )
        )
    )
    print("------------------ Final result ------------------")
    print(f"Final Performance images/sec : {in_words(fps, 2)}")
    print(f"Final Train Accuracy : {accuracy}")
    print(f"E2E Training Duration sec : {args.seconds}")


def read_losses(path: Path, first_epoch: int) -> list[float]:
    """Return the losses of this run; a run that was resumed in its folder has those before it in the file, too."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        math.nan if row["loss"] is None else row["loss"]
        for row in rows
        if row["kind"] == "interval" and row["epoch"] >= first_epoch
    ]


def in_words(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


if __name__ == "__main__":
    main()
