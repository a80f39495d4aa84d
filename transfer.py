"""Transfers the network of a checkpoint to a target data set (S-SAT): freezes its features and trains a new
head with one hidden layer on clean images of the target.

Paper: Sec. 4.3, Table 2 (transfer setting). The whole network is then attacked on the target's test images.
    python transfer.py results/digits0-4/<run>/best.pt --config configs/transfer/digits5-9.yaml
Files in: a checkpoint of sat.py and the result.json beside it, the target's data. Files out, in
results/<target>/<source data set>-<source run>-seed<seed>/: those of sat.py.
"""
import torch

import common
import config
import evaluate
import models
import runs
from common import UserError, say
from data import open_dataset
from sat import fit

# What a result repeats from the result.json of its source run.
SOURCE = ("args", "N", "A", "A_classes", "w_A", "cost", "fingerprint", "weights")


def main(argv=None):
    """Loads the source, trains the head, and writes, prints and returns the result."""
    args = config.parse("transfer.py", __doc__, argv, "best.pt of the source run")
    path, args.checkpoint = args.checkpoint.resolve(), None  # source and source_weights identify it instead
    model, ckpt = models.load_model(path)
    result_path = path.with_name("result.json")
    if model.frozen:
        raise UserError(f"{path} is itself a transferred network; give the best.pt of a run of sat.py")
    result = runs.load(result_path, SOURCE) if result_path.exists() else {}
    if result.get("weights") != evaluate.weights_hash(ckpt["model"]):
        raise UserError(f"{result_path} is missing, or not of {path}: give the best.pt of a finished run")
    source = {"dataset": ckpt["args"]["dataset"], "run": path.parent.name, "ranking": result.get("ranking"),
              "precision": result.get("precision", "float32"), "processes": result.get("processes", 1),
              **{k: result[k] for k in SOURCE}}
    args.arch = args.base["arch"] = ckpt["arch"]
    args.source, args.source_weights = f"{source['dataset']}/{source['run']}", source["weights"]
    first_words = [*config.run_name_prefix(args), source["dataset"], source["run"]]
    device = common.set_up(args)
    folder, is_finished = common.from_process_0(
        runs.run_folder(args, first_words, {"source", "source_weights"}))
    if is_finished:
        return evaluate.result_of_finished_run(folder, args)
    data = open_dataset(args, device)
    settings = {prefix: evaluate.eval_settings(args, data.classes, prefix) for prefix in ("select", "eval")}
    channels, expected = data.train.x.shape[1], ckpt["model"]["mean"].shape[1]
    if channels != expected:
        raise UserError(f"{path} takes {expected} channels, {data.name} has {channels}: give another target")
    say(f"transfer {args.source} (|A| = {source['A']:,} of {source['N']:,}, w_A {source['w_A']:.3g}) -> "
        f"{data.name} ({len(data.train):,} training images, {len(data.classes)} classes): features frozen, "
        f"new head; {args.arch} on {common.device_name(device)}, seed {args.seed} -> {folder}")
    torch.manual_seed(args.seed)
    model = model.transfer(len(data.classes)).to(device)
    # A = {}: the head is trained on clean images, and the target is not split into A and B.
    empty_A = torch.zeros(len(data.train), dtype=torch.bool)
    return fit(folder, model, data, empty_A, 1.0, args, device, settings, source=source)


if __name__ == "__main__":
    common.script(main)
