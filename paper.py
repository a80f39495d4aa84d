"""The paper's published numbers, from configs/paper.json (its "about" says where each was read)."""
import functools
import json

from common import HERE

# source: (N, network, epochs, eps, attacks of AutoAttack); Table 1, Table 2, A.1
SETTINGS = {"cifar10": (50000, "preactresnet18", 200, 0.5, 4), "cifar100": (50000, "preactresnet18", 200, 0.5, 4),
            "imagenet200": (259906, "resnet50", 150, 3.0, 4)}
FINAL = {"cifar10": 9000, "cifar100": 9000, "imagenet200": 9000, "svhn": 23429, "caltech256": 5510, "flowers102": 918}  # 90 % of the test set
NAMES = {"airplane": "plane", "automobile": "car"}  # CIFAR-10's classes as the paper calls them


@functools.cache
def published():
    """configs/paper.json as it stands: percent unless said."""
    return json.loads((HERE / "configs" / "paper.json").read_text())


def base(data):
    """The paper's data set of which ours is a smaller part: cifar10 for cifar10-small, on either side of an arrow."""
    return data.replace("-small", "")


def caution(data, setting):
    """A sentence for runs of a data set of the paper at other settings than the paper's, else nothing.

    setting: (N, network, epochs, eps, number of AutoAttack's attacks, n) of our runs; data: a data set, or source->target.
    """
    data = base(data)
    source, target = data.split("->")[0], data.split("->")[-1]
    if source not in SETTINGS or setting == (*SETTINGS[source], FINAL.get(target)):
        return ""
    n, network, epochs, eps, _ = SETTINGS[source]
    return (f"Not the paper's setting, so the differences from it are no reproduction. The paper: N = {n:,}, {network}, {epochs} epochs, "
            f"eps {eps:g}, standard AutoAttack, n = {FINAL.get(target, 0):,}.")


def value(figure, data, line, share, kind):
    """The paper's accuracy (percent) in a figure, or None where it has no number.

    data: a data set, or source->target. line: what the line is called in our figure; "AT" and "no AT" are the baselines.
    share: |A|/N. kind: robust or clean.
    """
    numbers, data = published(), base(data)
    if line == "no AT":
        return numbers["fig2_single_class_csat_cifar10"]["no_at_robust"] if (data, kind) == ("cifar10", "robust") else None
    curves = {"fig6": "fig6_esat", "fig8": "fig8_s_esat", "fig16": "fig16_single_step"}
    if line == "AT":  # one model, shown in several figures
        curve = numbers[curves["fig8" if "->" in data else "fig6"]].get(data, {})
        if data == "cifar100->svhn" and kind == "robust":
            return numbers["fig14_s_esat_cifar100_to_svhn_robust"]["full_at"]
        return curve.get(kind, {}).get("full_at")
    at = [i for i, f in enumerate(numbers["fractions"]) if abs(f - share) < 0.004]
    if not at:
        return None
    curve = numbers[curves[figure]].get(data, {}).get(kind, {}) if figure in curves else {}
    key = {"random": "random_mean", "pgd": "pgd7_hardest", "fgsm-rs": "fgsm_rs_hardest"}.get(line, line)
    if key in curve:
        return curve[key][at[0]]
    if (figure, data, kind) == ("fig12", "cifar100", "robust"):
        return numbers["fig12_metrics_cifar100_esat_robust"].get(line, {}).get(f"{share:.1f}")
    if (figure, data, kind, at) == ("fig7", "cifar100->cifar10", "robust", [0]):
        return numbers["fig7_loss_weights_s_csat_cifar100_to_cifar10"]["A_10_classes"].get(line)
    if (figure, data, kind, line, at) == ("fig8", "cifar100->svhn", "robust", "hardest", [2]):  # Fig. 14
        return numbers["fig14_s_esat_cifar100_to_svhn_robust"]["0.3"]
    return None
