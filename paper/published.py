"""The paper's numbers (published.json) and settings (configs/), to put beside ours."""
import functools

from common import HERE
from config import from_yaml
from flags import DEFAULTS
from runs import load

NAMES = {"airplane": "plane", "automobile": "car"}  # CIFAR-10's classes as the paper calls them


@functools.cache
def numbers():
    """The content of published.json. Accuracies are in percent unless the file says otherwise."""
    return load(HERE / "paper" / "published.json")


def published_accuracy(figure_name, dataset, line, share, kind):
    """The paper's accuracy (percent) at |A|/N = share on a line of our figure (all have "AT" and "no AT"), or
    None if it gives none. dataset: a data set, or source->target. kind: robust or clean."""
    if line in ("AT", "no AT"):
        figure_name = "baselines"
    value = numbers()["curves"].get(figure_name, {}).get(dataset, {}).get(kind, {}).get(line)
    # One number, or {|A|/N as text: number}.
    return value.get(f"{round(share, 3):g}") if isinstance(value, dict) else value


def fig2_accuracy(a, c):
    """Fig. 2's robust accuracy (percent) on class `c` or "B_val" for CSAT on `a`, or of "AT"; None for
    other names."""
    fig2, a, c = numbers()["fig2"], NAMES.get(a, a), NAMES.get(c, c)
    rows = dict(zip(fig2["classes"], fig2["robust_rows_are_A"]))
    rows["AT"] = fig2["AT_robust"]
    row = {"B_val": fig2["robust_B_val"].get(a), **dict(zip(fig2["classes"], rows.get(a, [])))}
    return row.get(c)


@functools.cache
def published_setting(dataset):
    """The flags {dest: value} of the paper's runs on `dataset`, from configs/, and their N. Empty for a data
    set that the paper does not have."""
    source, *targets = dataset.split("->")
    files = [HERE / f"configs/transfer/{target}.yaml" for target in targets]
    if source not in numbers()["data sets"] or not all(file.exists() for file in files):
        return {}
    setting = DEFAULTS | from_yaml(HERE / f"configs/{source}.yaml")
    setting["N"] = numbers()["data sets"][source]["train"]
    for file in files:
        setting |= {f"source's {k}": setting[k] for k in ("norm", "eps")}
        setting |= {f"target's {k}": v for k, v in (DEFAULTS | from_yaml(file)).items()}
    return setting


def comparable_dataset(dataset, setting):
    """`dataset`, or "" if runs with another norm or eps than the paper's may not stand beside its numbers."""
    threat_model = {k: v for k, v in published_setting(dataset).items() if k.split()[-1] in ("norm", "eps")}
    return dataset if all(setting.get(k, v) == v for k, v in threat_model.items()) else ""


def differences_from_paper(dataset, setting):
    """A sentence that lists where our setting differs from the paper's. May be empty."""
    published_flags, differences = published_setting(dataset), []
    for k in (k for k, v in setting.items() if published_flags.get(k, v) != v):
        ours, published = ((" ".join(map(str, v)) or "none") if isinstance(v, list) else v
                           for v in (setting[k], published_flags[k]))
        differences.append(f"{k.replace('_', ' ')} {ours} ({published})")
    start = "Not the paper's setting, so our numbers do not reproduce the paper's. Ours (the paper's): "
    return f"{start}{', '.join(differences)}." if differences else ""
