"""Does CSAT on one class only shift the logit of that class? Lowers it by t log(w_A) in a trained network and
attacks the result as the run itself was evaluated.

    python results-published/logit_shift/shift.py RUN/best.pt --t 0 0.5 1 1.5 --json FILE
"""
import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import evaluate
import models
import runs
from data import load_dataset


class Shifted(torch.nn.Module):
    """A network with `shift` (C,) added to its logits."""

    def __init__(self, model, shift):
        super().__init__()
        self.model = model
        self.register_buffer("shift", shift)

    def forward(self, x):
        return self.model(x) + self.shift


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--t", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    model, checkpoint = models.load_model(args.checkpoint)
    result = runs.load(args.checkpoint.with_name("result.json"))
    data = load_dataset(checkpoint["args"]["dataset"], args.data_dir)
    runs.check_fingerprint(data, checkpoint["fingerprint"], args.checkpoint)
    A_classes, rows = checkpoint["A_classes"], []
    in_A = torch.tensor([c in A_classes for c in data.classes])
    for t in args.t:
        shifted = Shifted(model, -t * math.log(result["w_A"]) * in_A.float()).eval()
        _, evaluation = evaluate.evaluate(shifted, data, result["settings"], args.json.with_suffix(".chunks"),
                                          A_classes)
        parts = {part: {kind: a["accuracy"] for kind, a in evaluation["accuracy"][part].items()}
                 for part in ("all", "A_val", "B_val")}
        rows.append({"run": args.checkpoint.parent.name, "t": t, "w_A": result["w_A"],
                     "settings": result["settings"], "accuracy": evaluation["accuracy"]})
        print(t, parts, flush=True)
        runs.write_json(args.json, rows)


if __name__ == "__main__":
    common.script(main)
