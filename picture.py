"""Draws clean image, perturbation (magnified) and adversarial image for a test example of A and one of B.

Paper: Eq. 1 and 2, seen. Of a run with A = {} or A = everything, one example of its one part.
    python picture.py results/cifar10-small/csat-airplane-seed0/best.pt
Files in: a checkpoint whose A is made of classes, the data. Files out: picture.png beside the checkpoint.
"""
import argparse
from pathlib import Path

import common  # first: Ctrl-C while torch loads ends in one line
import torch

import attacks
import data as datasets
import evaluate
import figures
import flags
from common import UserError, say

STEPS = 50


def png(text):
    """A type for argparse: the name of a PNG file."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a PNG file (x.png)")
    return Path(text)


def command_line(argv=None):
    """The command line."""
    parser = flags.Parser(prog="picture.py", usage="python picture.py CHECKPOINT [--flag VALUE ...]",
                          description=__doc__, formatter_class=flags.Help)
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run of sat.py")
    parser.add_argument("--out", type=png, help="the PNG (default: picture.png beside the checkpoint)")
    parser.add_argument("--magnify", type=flags.positive, default=10.0,
                        help="factor of the perturbation shown")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    flags.add_flags(parser, "machine")
    return parser.parse_args(argv)


def first_right(model, data, index, classes, device):
    """The first test example of `index` whose class is in `classes` and that the model gets right: its
    position."""
    for x, y, i in datasets.ordered(data.test, index[torch.isin(data.test.y[index], classes)], 50, device):
        with torch.no_grad():
            right = model(x).argmax(1).cpu() == y.cpu()
        if right.any():
            return int(i[right][0])
    raise UserError(f"the network gets no test example of "
                    f"{', '.join(data.classes[c] for c in classes.tolist())} right: nothing to show")


def perturbed(model, data, i, args, device):
    """Example i with its attack: {"x", "delta", "adv" (C, H, W), "class", "before", "after" (class,
    probability)}."""
    x, y = data.test.pixels(torch.tensor([i]), device), data.test.y[[i]].to(device)
    adv = attacks.pgd(model, x, y, eps=args["eps"], step_size=args["eps"] / 10, steps=STEPS,
                      norm=args["norm"])
    with torch.no_grad():
        p = model(torch.cat([x, adv])).softmax(1)
    said = [(data.classes[int(q.argmax())], float(q.max())) for q in p]
    return {"x": x[0].cpu(), "delta": (adv - x)[0].cpu(), "adv": adv[0].cpu(), "class": data.classes[int(y)],
            "before": said[0], "after": said[1]}


def main(argv=None):
    """Loads the checkpoint, attacks one example of A and one of B, draws them."""
    args = command_line(argv)
    device = common.set_up(args)
    model, ckpt = evaluate.load_model(args.checkpoint)
    made, out = ckpt["args"], args.out or args.checkpoint.parent / "picture.png"
    if made.get("split") not in ("csat", "none", "full"):
        raise UserError(f"{args.checkpoint} has no A made of whole classes, which would part the test set "
                        "too: give the best.pt of sat.py --split csat")
    data = datasets.get(made["dataset"], args.data_dir, device, made["side"], args.workers)
    datasets.check_fingerprint(data, ckpt["fingerprint"], args.checkpoint)
    say(f"attacking an example of A and one of B of {data.name} with {args.checkpoint}: PGD-{STEPS}, "
        f"{made['norm']} eps {made['eps']:g}")
    model = model.to(device).eval()
    in_A = [c in ckpt["A_classes"] if ckpt["A_classes"] else made["split"] == "full" for c in data.classes]
    index, rows = datasets.selection_and_final(len(data.test))[1], {}
    for part, wanted in (("A", True), ("B", False)):
        classes = torch.tensor([c for c, inside in enumerate(in_A) if inside == wanted])
        if len(classes):
            rows[part] = perturbed(model, data, first_right(model, data, index, classes, device), made,
                                   device)
    title = (f"{data.name}, A = {'+'.join(ckpt['A_classes'] or [made['split']])}\nPGD-{STEPS}, "
             f"{made['norm']} eps {made['eps']:g}; "
             f"{made['arch']}, epoch {ckpt['epoch']}")
    figures.perturbations(out.with_suffix(""), title, rows, args.magnify)
    say(f"wrote {out}")


if __name__ == "__main__":
    common.script(main)
