"""Draws the clean image, the magnified perturbation and the adversarial image of two test examples, one of A
and one of B.

Paper: Eq. 1 and 2. If A is empty or everything, only one example is drawn.
    python picture.py results/cifar10/csat-cat-balanced-seed0/best.pt
Files in: a checkpoint whose A is made of classes, the data. Files out: picture.png beside the checkpoint.
"""
import argparse
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch

import attacks
import data as data_
import evaluate
import figures
import flags
from common import UserError, say

STEPS = 50  # of PGD, each of size eps / 10


def png(text):
    """A type for argparse: the name of a PNG file."""
    if Path(text).suffix != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a PNG file (x.png)")
    return Path(text)


def command_line(argv=None):
    """Parses the command line."""
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
    """The position of the first test example among `index` whose class is in `classes` and that the network
    classifies correctly. UserError if there is none."""
    for x, y, i in data_.plain_batches(data.test, index[torch.isin(data.test.y[index], classes)], 50, device):
        with torch.no_grad():
            right = model(x).argmax(1).cpu() == y.cpu()
        if right.any():
            return int(i[right][0])
    raise UserError(f"the network gets no test example of "
                    f"{', '.join(data.classes[c] for c in classes.tolist())} right: nothing to show")


def perturbed(model, data, i, args, device):
    """Attacks test example i: {"x", "delta", "adv": (C, H, W), "class", "before", "after": (class,
    probability)}, where the last two are the network's predictions."""
    x, y = data.test.pixels(torch.tensor([i]), device), data.test.y[[i]].to(device)
    adv = attacks.pgd(model, x, y, eps=args["eps"], step_size=args["eps"] / 10, steps=STEPS,
                      norm=args["norm"])
    with torch.no_grad():
        p = model(torch.cat([x, adv])).softmax(1)
    said = [(data.classes[int(q.argmax())], float(q.max())) for q in p]
    return {"x": x[0].cpu(), "delta": (adv - x)[0].cpu(), "adv": adv[0].cpu(), "class": data.classes[int(y)],
            "before": said[0], "after": said[1]}


def main(argv=None):
    """Loads the checkpoint, attacks one example of A and one of B, and draws them."""
    args = command_line(argv)
    device = common.set_up(args)
    model, ckpt = evaluate.load_model(args.checkpoint)
    made, out = ckpt["args"], args.out or args.checkpoint.parent / "picture.png"
    if made.get("split") not in ("csat", "none", "full"):
        raise UserError(f"{args.checkpoint} has no A made of whole classes, which would part the test set "
                        "too: give the best.pt of sat.py --split csat")
    data = data_.load_dataset(made["dataset"], args.data_dir, device, made["side"], args.workers)
    data_.check_fingerprint(data, ckpt["fingerprint"], args.checkpoint)
    say(f"attacking an example of A and one of B of {data.name} with {args.checkpoint}: PGD-{STEPS}, "
        f"{made['norm']} eps {made['eps']:g}")
    model = model.to(device).eval()
    A_classes = ckpt["A_classes"] or (data.classes if made["split"] == "full" else [])
    index, rows = data_.selection_and_final(len(data.test))[1], {}
    for part, wanted in (("A", True), ("B", False)):
        classes = torch.tensor([i for i, c in enumerate(data.classes) if (c in A_classes) == wanted])
        if len(classes):
            i = first_right(model, data, index, classes, device)
            rows[part] = perturbed(model, data, i, made, device)
    title = (f"{data.name}, A = {'+'.join(ckpt['A_classes'] or [made['split']])}\nPGD-{STEPS}, "
             f"{made['norm']} eps {made['eps']:g}; {made['arch']}, epoch {ckpt['epoch']}")
    figures.perturbations(out.with_suffix(""), title, rows, args.magnify)
    say(f"wrote {out}")


if __name__ == "__main__":
    common.script(main)
