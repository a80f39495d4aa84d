"""Draws the clean image, the magnified perturbation and the adversarial image of two test examples, one of A
and one of B.

Paper: Eq. 1 and 2. If A is empty or everything, only one example is drawn.
    python picture.py results/cifar10/csat-cat-balanced-seed0/best.pt
Files in: a checkpoint whose A is made of classes, the data. Files out: picture.png beside the checkpoint.
"""
from pathlib import Path

import common  # first, so that Ctrl-C while torch loads ends in one line
import torch
from matplotlib.figure import Figure

import attacks
import data as data_
import evaluate
import flags
from common import UserError, say
from runs import atomic

STEPS = 50  # of PGD, each of size eps / 10


def command_line(argv=None):
    """Parses the command line."""
    parser = flags.Parser(prog="picture.py", usage="python picture.py CHECKPOINT [--flag VALUE ...]",
                          description=__doc__, formatter_class=flags.Help)
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run of sat.py")
    parser.add_argument("--out", type=Path, help="the PNG (default: picture.png beside the checkpoint)")
    parser.add_argument("--magnify", type=flags.positive, default=10.0, help="factor of the perturbation")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds the data sets")
    flags.add_flags(parser, "machine")
    return parser.parse_args(argv)


def first_right(model, data, classes, device):
    """The first final test example of `classes` that the network gets right, with its label."""
    index = data_.selection_and_final(len(data.test))[1]
    index = index[torch.isin(data.test.y[index], classes)]
    for x, y, _ in data_.plain_batches(data.test, index, 50, device):
        with torch.no_grad():
            right = model(x).argmax(1) == y
        if right.any():
            return x[right][:1], y[right][:1]
    names = ", ".join(data.classes[c] for c in classes.tolist())
    raise UserError(f"the network gets no test example of {names} right: nothing to show")


def draw_row(axes, part, example, data, model, args, magnify):
    """Attacks an example, ((1, C, H, W), label (1,)), and draws, in three axes, the clean image, the
    perturbation (times `magnify`, around grey) and the adversarial image."""
    x, y = example
    settings = {"eps": args["eps"], "step_size": args["eps"] / 10, "norm": args["norm"]}
    adv = attacks.pgd(model, x, y, steps=STEPS, **settings)
    with torch.no_grad():
        probability, predicted = model(torch.cat([x, adv])).softmax(1).max(1)
    before, after = (f"{data.classes[c]}, {100 * p:.0f} %" for c, p in zip(predicted, probability))
    delta = adv - x
    for axis, image, title, label in (
            (axes[0], x, "clean", before), (axes[2], adv, "adversarial", after),
            (axes[1], 0.5 + magnify * delta, f"perturbation × {magnify:g}", f"L2 norm {delta.norm():.2f}")):
        pixels = image[0].clamp(0, 1).permute(1, 2, 0).squeeze(2).cpu().numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel(f"{part}: {data.classes[int(y)]}", fontsize=8)


def main(argv=None):
    """Loads the checkpoint, attacks one example of A and one of B, and draws them."""
    args = command_line(argv)
    out = args.out or args.checkpoint.with_name("picture.png")
    if out.suffix != ".png":
        raise UserError(f"--out: {str(out)!r} is not the name of a PNG file (x.png)")
    device = common.set_up(args)
    model, checkpoint = evaluate.load_model(args.checkpoint)
    made = checkpoint["args"]
    if made.get("split") not in ("csat", "none", "full"):
        raise UserError(f"{args.checkpoint} has no A made of whole classes, which would part the test set "
                        "too: give the best.pt of sat.py --split csat")
    data = data_.load_dataset(made["dataset"], args.data_dir, device, made["side"], args.workers)
    data_.check_fingerprint(data, checkpoint["fingerprint"], args.checkpoint)
    model = model.to(device).eval()
    A_classes = checkpoint["A_classes"] or (data.classes if made["split"] == "full" else [])
    parts = {}
    for i, c in enumerate(data.classes):
        parts.setdefault("A" if c in A_classes else "B", []).append(i)
    fig = Figure(figsize=(6.3, 2.4 * len(parts) + 0.5), layout="constrained")
    for axes, part in zip(fig.subplots(len(parts), 3, squeeze=False), sorted(parts)):
        example = first_right(model, data, torch.tensor(parts[part]), device)
        draw_row(axes, part, example, data, model, made, args.magnify)
    A = "+".join(checkpoint["A_classes"] or [made["split"]])
    fig.suptitle(f"{data.name}, A = {A}\nPGD-{STEPS}, {made['norm']} eps {made['eps']:g}; {made['arch']}, "
                 f"epoch {checkpoint['epoch']}", fontsize=9)
    atomic(out, lambda f: fig.savefig(f, format="png", dpi=120))
    say(f"wrote {out}")


if __name__ == "__main__":
    common.script(main)
