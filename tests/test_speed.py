"""The fast ways compute the same: bf16, torch.compile, padding, channels_last; nothing waits for the GPU.

    python -m pytest -q tests/test_speed.py -k cuda    # on a machine with a GPU
"""
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attacks
import models
import train
from conftest import CPU, GPU, arguments, digits, every, images, log_of, net
from data import Split


def test_the_step_keeps_channels_last():
    """Convolutions are slower in another layout, and compiled twice; index_copy would return another."""
    seen, model = [], net(channels=3)
    model.features.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    (x, y), optimizer = images(4, channels=3), torch.optim.SGD(model.parameters(), 0.1)
    attack = functools.partial(attacks.pgd, model, eps=0.5, step_size=0.1, steps=2)
    train.sat_step(model, optimizer, x.contiguous(memory_format=torch.channels_last), y, torch.tensor([1, 2]),
                   torch.ones(4), attack)
    assert seen == [True] * 3, "two steps of the attack and the training step"


@pytest.mark.parametrize("n_A,flags", [(1, []), (21, ["--random-start"]), (32, ["--attack", "fgsm-rs"])])
def test_padding_A_to_a_multiple_of_16_changes_nothing(n_A, flags):
    (x, y), model, sizes = images(n_A), net(), []
    starts = {"start": attacks.random_start(x, 0.5, "l2")} if flags else {}
    attack = train.training_attack(model, every(1, 64), 1.0, arguments(*flags), CPU)
    plain = attack(x, y, **starts)
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    padded = train.pad_to_multiple(attack)(x, y, **starts)
    torch.testing.assert_close(padded, plain, atol=2e-5, rtol=0)
    assert {*sizes} == {-(-n_A // 16) * 16}


def short_training(device, compiled=False, amp="off", k=3):
    """Four steps of SAT on digits with every k-th example in A: the change of all weights as one vector, and
    the line of the log."""
    torch.backends.cudnn.allow_tf32 = False  # as in common.set_up
    args = arguments("--epochs", "1", "--batch-size", "40", "--steps", "3", "--step-size", "0.5", "--eps",
                     "1.5", "--lr", "0.05", "--amp", amp, "--compile" if compiled else "--no-compile")
    torch.manual_seed(0)
    model = models.Classifier(models.preactresnet(1, (8, 8), 1), nn.Linear(8, 10), [0.3], [0.35]).to(device)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    row, = log_of(model, digits(160).to(device), every(k, 160), 2.0, args, device=torch.device(device))
    assert not [key for key in model.state_dict() if "_orig_mod" in key], "as of an uncompiled network"
    return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).cpu(), row


@pytest.mark.parametrize("device,compiled,amp,alike", [
    pytest.param("cpu", True, "off", 0.9999, marks=pytest.mark.slow), ("cpu", False, "bf16", 0.97),
    *(pytest.param("cuda", *case, marks=GPU.marks)
      for case in ((True, "off", 0.9999), (False, "bf16", 0.97), (True, "bf16", 0.97)))])
def test_compiled_and_bf16_training_are_the_plain_one_to_rounding(device, compiled, amp, alike):
    """--compile (on GPUs with A padded to 16 and 32 examples) and bf16 autocast, against float32 on the CPU:
    the same change of the weights, which training with hardly an attack does not give."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (plain, plain_row), (fast, fast_row) = short_training("cpu"), short_training(device, compiled, amp)
    other, _ = short_training("cpu", k=160)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graphs >= 2) == compiled, "one graph of the step, one or two of the attack"
    assert plain_row["attacked"] == fast_row["attacked"] == 54
    assert fast_row["loss"] == pytest.approx(plain_row["loss"], rel=0.02)
    assert F.cosine_similarity(fast, plain, dim=0) > alike > F.cosine_similarity(other, plain, dim=0)
    assert (fast.norm() / plain.norm()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("device", [GPU])
def test_no_step_waits_for_the_gpu(device, request):
    device, g = torch.device(device), torch.Generator().manual_seed(0)
    args, A = arguments("--augment", "full", "--random-start"), every(2, 256)
    x = torch.randint(0, 256, (256, 3, 32, 32), generator=g, dtype=torch.uint8)
    split = Split(x, torch.randint(0, 10, (256,), generator=g)).to(device)
    model, sums = net(channels=3).to(device).train(), train.EpochSums(0, device)
    optimizer = models.sgd(model, 0.1, 0.0, device)
    attack = train.training_attack(model, A, 2.0, args, device)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    for x, y, a, w, w_sum, start in train.epoch_batches(split, A, 2.0, args, 0, device):
        with models.autocast("bf16", device):
            loss, logits = train.sat_step(model, optimizer, x, y, a, w, attack, start, w_sum)
        sums.add(loss, logits, y, a)
        torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first one sets libraries up


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_attack_under_bf16_keeps_images_and_projection_in_float32(device, trained):
    model, data = trained
    x, y = data.test.pixels(torch.arange(64), "cpu"), data.test.y[:64]
    exact = attacks.pgd(model, x, y, eps=0.5, step_size=0.1)
    with torch.autocast(device, torch.bfloat16):
        x_adv = attacks.pgd(model.to(device), x.to(device), y.to(device), eps=0.5, step_size=0.1).cpu()
    model.cpu()
    delta, exact_delta = (x_adv - x).flatten(1), (exact - x).flatten(1)
    assert x_adv.dtype == torch.float32
    assert torch.equal(x_adv, x_adv.clamp(0, 1))
    assert delta.norm(dim=1).max() <= 0.5 + 1e-6, "a bfloat16 norm would miss the ball by 1e-3"
    assert F.cosine_similarity(delta, exact_delta).mean() > 0.98
    clean, loss, exact_loss = (F.cross_entropy(model(z), y).item() for z in (x, x_adv, exact))
    assert loss - clean == pytest.approx(exact_loss - clean, rel=0.02)


@pytest.mark.parametrize("arch,parameters,flop", [
    ("preactresnet18", 11.17e6, 1.11e9), ("preactresnet18-authors", 21.33e6, 3.64e9)])
def test_networks_have_the_sizes_that_the_authors_and_the_field_report(arch, parameters, flop):
    from torch.utils.flop_counter import FlopCounterMode
    model = net(channels=3, arch=arch).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert counter.get_total_flops() == pytest.approx(flop, rel=1e-2)
