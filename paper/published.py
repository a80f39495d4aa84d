"""The paper's numbers (published.json) and settings (configs/), to put beside ours."""
import functools

from common import HERE
from config import from_yaml
from flags import DEFAULTS
from runs import read_json

NAMES = {"airplane": "plane", "automobile": "car"}  # CIFAR-10's classes as the paper calls them


@functools.cache
def numbers():
    """The content of published.json. Accuracies are in percent unless the file says otherwise."""
    return read_json(HERE / "paper" / "published.json")


def published_accuracy(figure, data, line, share, kind):
    """The accuracy (percent) that the paper gives in a figure, or None where it gives none.

    data: a data set, or source->target. line: the name of the line in our figure; the baselines "AT" and
    "no AT" belong to no figure. share: |A|/N. kind: robust or clean.
    """
    if line in ("AT", "no AT"):
        figure = "baselines"
    value = numbers()["curves"].get(figure, {}).get(data, {}).get(kind, {}).get(line)
    if not isinstance(value, dict):
        return value
    return next((accuracy for f, accuracy in value.items() if abs(float(f) - share) < 0.004), None)


def fig2_accuracy(a, c):
    """Fig. 2's robust accuracy (percent) on class `c`, or on "B_val", for CSAT on class `a` of CIFAR-10. None
    for classes that CIFAR-10 does not have."""
    fig2, a, c = numbers()["fig2"], NAMES.get(a, a), NAMES.get(c, c)
    if c == "B_val":
        return fig2["robust_B_val"].get(a)
    if not {a, c} <= set(fig2["classes"]):
        return None
    return fig2["robust_rows_are_A"][fig2["classes"].index(a)][fig2["classes"].index(c)]


@functools.cache
def published_setting(data):
    """The flags {dest: value} of the paper's runs on `data` (a data set, or source->target), from configs/.
    Empty for data that the paper does not have."""
    source, *target = data.split("->")
    folder = HERE / "configs"
    files = [folder / f"{source}.yaml", *(folder / "transfer" / f"{name}.yaml" for name in target)]
    if source not in numbers()["data sets"] or not all(file.exists() for file in files):
        return {}
    setting, *of_target = (DEFAULTS | from_yaml(file) for file in files)
    if target:
        setting |= {f"source's {k}": setting[k] for k in ("norm", "eps")}
        setting |= {f"target's {k}": v for k, v in of_target[0].items()}
    return setting


def comparable_data(data, setting):
    """The data whose published numbers may stand beside runs on `data`: these data, or "" if the norm or eps
    (in a transfer, also that of the source's training) is not the paper's."""
    threat_model = {k: v for k, v in published_setting(data).items() if k.split()[-1] in ("norm", "eps")}
    return data if all(setting.get(k, v) == v for k, v in threat_model.items()) else ""


def differences_from_paper(data, setting):
    """A sentence that lists where our setting differs from the paper's. Empty if it does not, or if the paper
    does not have these data."""
    paper, different = published_setting(data), []
    if paper:
        n = numbers()["data sets"][data.split("->")[0]]["train"]
        different += [f"N {setting['N']:,} ({n:,})"] if setting["N"] != n else []
    for k in (k for k, v in setting.items() if paper.get(k, v) != v):
        ours, published = ((" ".join(map(str, v)) or "none") if isinstance(v, list) else v
                           for v in (setting[k], paper[k]))
        different.append(f"{k.replace('_', ' ')} {ours} ({published})")
    if not different:
        return ""
    return ("Not the paper's setting, so the differences from it are no reproduction. "
            f"Ours (the paper's): {', '.join(different)}.")
